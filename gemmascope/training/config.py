"""Every number of the training recipe, validated, with its source."""

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch

from ..checks import check_choice, check_int, check_number, check_type

KINDS = ("jumprelu", "relu", "gated", "topk", "batchtopk", "matryoshka")
SPARSITIES = ("l0", "target_l0", "quadratic_l0", "tanh", "l1", "none")
# The penalties an SAE of a kind may have, its default first. What a TopK SAE fires on needs none.
SPARSITIES_OF = {
    "jumprelu": ("l0", "target_l0", "quadratic_l0", "tanh"),
    "relu": ("l1",),
    "gated": ("l1",),
    "topk": ("none",),
    "batchtopk": ("none",),
    "matryoshka": ("none",),
}
RESAMPLED = ANNEALED = ("relu", "gated")
TOP_K = ("topk", "batchtopk", "matryoshka")
# Of which k fire on average over a batch, and afterwards those above a threshold.
BY_BATCH = ("batchtopk", "matryoshka")
L0_OF = ("token", "batch")
COMPUTE_DTYPES = ("fp32", "tf32", "bf16")
PARAMETRISATIONS = ("log", "raw")
B_DEC_INITS = ("zeros", "mean")
SCALES = ("mean_square", "variance")
ROUTES = ("auto", "reference", "dense", "sparse")
TARGETED = ("target_l0", "quadratic_l0")
# λ where none is given; its unit is another in each kind of penalty. That of `l0` is Gemma Scope's. With those of the
# two that aim at an L0 the SAEs of the demo come within a tenth of it, at L0 5 to 50; a larger λ comes closer to it and
# reconstructs worse. That of `l1` is amid those which SAEBench's gated and ReLU SAEs were trained with (.012 to .08).
L0_COEFFICIENTS = {"l0": 6e-4, "target_l0": 0.3, "quadratic_l0": 0.02, "tanh": 6e-4, "l1": 0.04, "none": 0.0}
# For hundreds of updates, where these two differ.
SHORT_L0_COEFFICIENTS = L0_COEFFICIENTS | {"l0": 8e-3, "tanh": 8e-3, "l1": 0.2}
# In units of variance. The L0 rests above its target by about s·FVU/(2λ) of it with `target_l0`, s ≈ 0.3 the slope of
# log FVU over log L0: a percent or two, whatever the target. A larger λ lets latents die and reconstructs worse.
# With .2 of `l1`, 500 updates on synthetic activations of width 256 (11 of 1,024 directions a token) left L0 9 to a
# ReLU SAE of 1,024 latents and 11 to a gated one; with .1 they left 26 and 89, with .3 both 6.
SMALL_L0_COEFFICIENTS = L0_COEFFICIENTS | {"l0": 1e-3, "target_l0": 1.6, "l1": 0.2}
# ε of the kinds whose thresholds are 0 and stay there: no entry lies in so narrow a window but a z of 0 itself.
CLOSED_WINDOW = 1e-30
SMALLEST_EPS = torch.finfo(torch.float32).tiny
# Adam moves by at most lr/√((1 − β2)·(1 − β1²/β2)), by which factor of e a θ may grow in one update.
LARGEST_LOG_STEP = 40.0
# The seeds of later epochs follow on it, and a generator takes 64 bits.
LARGEST_SEED = 2**63 - 1
# δ of the penalties of a power p < 1, small beside activations of which a few make up an x of norm 1.
P_OFFSET = 1e-4
# Updates before a change of p over which the penalties of the old and the new p are compared.
P_WINDOW = 10


@dataclass(frozen=True)
class Loss:
    r"""L = mean_n ‖x_n − x̂_n‖² + S, with l0_n = ‖f_n‖₀ over N tokens and S by ``sparsity``:

    | `l0` | λ·mean_n l0_n | arXiv 2408.05147, equation 4 |
    | `target_l0` | λ·mean_n (l0_n/L0* − 1)² | arXiv 2407.14435, appendix F |
    | `quadratic_l0` | λ·(2/L0*)·mean_n (l0_n − L0*)² | Gemma Scope 2 |
    | `tanh` | λ·mean_n Σ_j tanh(c·f_nj), rows of W_dec having unit norm | Anthropic, January 2025 update |
    | `l1` | λ·mean_n Σ_j f_nj (relu(π_nj) of a gated SAE), rows of W_dec having unit norm | arXiv 2404.16014 |
    | `l1`, p < 1 | λ·mean_n Σ_j ((f_nj + δ)^p − δ^p) | arXiv 2408.00113, with δ = 0 |
    | `none` | 0, for the kinds of which a fixed number of latents fires | arXiv 2406.04093 |

    ``l0_coefficient`` is λ, by default that of the kind; ``target_l0`` is L0*, ``tanh_scale`` c; δ is `P_OFFSET`,
    without which the slope at f = 0 were infinite. With ``l0_of="batch"`` the mean L0 of the batch takes the place of
    each l0_n. ``frequency_scale`` s adds λ·Σ_j p_j²/s, p_j the share of the tokens that latent j fires on (Smith et
    al., March 2025). ``pre_act_coefficient`` λ_P adds λ_P·mean_n Σ_j relu(θ_j − z_nj) over the dead latents.

    The straight-through estimator of width ``bandwidth`` passes gradients to θ, and with ``ste_to_z`` to z too.

    Raises ValueError or TypeError on bad values, on a kind that aims at an L0 without one and on one that does not with
    one.
    """

    l0_coefficient: float = cast(float, None)
    """λ. None: `L0_COEFFICIENTS` of the kind."""
    bandwidth: float = 1e-3
    """ε, the width of the straight-through window around the threshold."""
    sparsity: str = "l0"
    target_l0: float | None = None
    """L0*, which `target_l0` and `quadratic_l0` aim at."""
    l0_of: str = "token"
    """Whether those two compare L0* with the L0 of each `token` or of the `batch` on average."""
    frequency_scale: float | None = None
    """s: adds the penalty λ·Σ_j p_j²/s on the frequencies of the latents."""
    tanh_scale: float = 4.0
    """c of the `tanh` penalty."""
    p: float = 1.0
    """Of `l1`: the power of the activations that is penalised."""
    pre_act_coefficient: float = 0.0
    """λ_P of the pre-activation loss, which pulls dead latents towards firing; on the `reference` route only."""
    ste_to_z: bool = False
    """Whether the straight-through gradient reaches the pre-activations, or only the threshold."""

    def __post_init__(self):
        check_choice("sparsity", self.sparsity, SPARSITIES)
        if self.l0_coefficient is None:
            object.__setattr__(self, "l0_coefficient", L0_COEFFICIENTS[self.sparsity])
        check_number("l0_coefficient", self.l0_coefficient, 0)
        check_number("bandwidth", self.bandwidth, 0, open_low=True)
        check_number("tanh_scale", self.tanh_scale, 0, open_low=True)
        check_number("p", self.p, 0, 1, open_low=True)
        check_number("pre_act_coefficient", self.pre_act_coefficient, 0)
        for name in ("target_l0", "frequency_scale"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 0, open_low=True)
        check_type("ste_to_z", self.ste_to_z, bool)
        check_choice("l0_of", self.l0_of, L0_OF)
        if self.sparsity == "none" and self.l0_coefficient:
            raise ValueError(f"l0_coefficient: expected 0 with sparsity='none', got {self.l0_coefficient}")
        if self.sparsity != "l1" and self.p != 1:
            raise ValueError(f"p: expected 1 with sparsity={self.sparsity!r}, got {self.p:g}")
        if (self.sparsity in TARGETED) != (self.target_l0 is not None):
            expected = "a number" if self.target_l0 is None else "None"
            raise ValueError(f"target_l0: expected {expected} with sparsity={self.sparsity!r}, got {self.target_l0}")

    def check_width(self, d_sae: int) -> None:
        """Raise ValueError when L0* is more than all of ``d_sae`` latents."""
        if self.target_l0 is not None and self.target_l0 > d_sae:
            raise ValueError(f"target_l0: expected at most d_sae = {d_sae}, got {self.target_l0:g}")


def _sparsity_of(changes: dict, of_jumprelu: str) -> str:
    """The penalty where ``changes`` name none."""
    kind = changes.get("kind", "jumprelu")
    check_choice("kind", kind, KINDS)
    return of_jumprelu if kind == "jumprelu" else SPARSITIES_OF[kind][0]


class Annealing(NamedTuple):
    """Where p-annealing is at an update."""

    changes: int
    """Of p, so far."""
    p: float
    next_p: float | None
    """The p after the next change, where the update is one of those before it that compare the penalties of both."""


LOSS_FIELDS = frozenset(field.name for field in dataclasses.fields(Loss))


@dataclass(frozen=True)
class TrainConfig:
    """The recipe of Gemma Scope (arXiv 2408.05147 §3.2) by default; `short` for runs of under a million tokens.

    Inputs are divided by one scalar C so that their mean squared norm is 1, or their variance, by ``scale_by``; losses,
    thresholds and the bandwidth are in those units.

    Schedules count ``steps``; past the last of them they hold what they gave it. Raises ValueError or TypeError on bad
    values, those together that cannot be met and schedules that do not end within ``steps``.
    """

    d_sae: int = 16384
    """Latents of each SAE."""
    kind: str = "jumprelu"
    """Which latents fire: `jumprelu`, `relu`, `gated` (arXiv 2404.16014), `topk` (arXiv 2406.04093), `batchtopk`
    (arXiv 2412.06410) or `matryoshka` (arXiv 2503.17547). Thresholds and their window are those of `jumprelu` alone."""
    k: int | None = None
    """Latents that fire on a token: each (`topk`) or on average over a batch (`batchtopk`, `matryoshka`)."""
    aux_coefficient: float = 1 / 32
    """α of AuxK, the reconstruction of what is left over by dead latents; of those three kinds. 0: without it."""
    aux_k: int | None = None
    """Dead latents that take part in it on each token; None: half of d_model."""
    prefixes: tuple[int, ...] = ()
    """Of `matryoshka`: latents of which each reconstruction is made, ascending, the last d_sae."""
    skip: bool = False
    """Of a transcoder: whether a linear map of its input is learned beside the latents (arXiv 2501.18823)."""
    steps: int = 976_562
    """Updates; 4 billion tokens at the default batch."""
    batch_size: int = 4096
    """Tokens of each update."""
    learning_rate: float = 7e-5
    lr_warmup_steps: int = 1000
    """Cosine warm-up from ``lr_warmup_start`` times the rate to the rate."""
    lr_warmup_start: float = 0.1
    lr_decay_steps: int = 0
    """Linear decay to zero over the last steps; the paper has none."""
    adam_beta1: float = 0.0
    """Adam has no first moment by default (the paper). With one, latents without an entry in a batch wait, as in
    `torch.optim.SparseAdam`, and training holds half as much again of what it holds by latent."""
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    loss: Loss = Loss()
    """What is minimised; its λ is where the warm-up ends."""
    l0_warmup_steps: int = 10_000
    """Warm-up of λ from 0."""
    l0_warmup_power: float = 1.0
    """λ rises with that power of the share of the warm-up that is over: linearly (the paper), or late."""
    p_end: float | None = None
    """Of `relu` and `gated`: p-annealing (arXiv 2408.00113). In equal parts the p of the `l1` penalty goes down from
    the loss's to this one, and at each change λ is multiplied by what the penalty of the old p was, over the `P_WINDOW`
    updates before, as a multiple of that of the new. None: p stays."""
    anneal_start: int | None = None
    """The first update after a change of p; None: when the warm-up of λ ends."""
    anneal_changes: int = 10
    """Changes of p from there to the end, of equal length: with the last p the last tenth is trained."""
    threshold_init: float = 1e-3
    overshoot: float | None = None
    """Of `jumprelu` SAEs: θ begins higher where the first reconstruction would be more than so many times its input, as
    in wide dictionaries, where thousands of latents fire at first (`start.first_threshold`). None: it may be."""
    threshold_parametrisation: str = "log"
    """What Adam moves: log θ (the paper), or θ itself (`raw`, clamped at 0). Log θ moves at most about the learning
    rate a step, too slowly for short runs."""
    b_dec_init: str = "zeros"
    """`zeros` (the paper), or the `mean` of the activations. Of a transcoder that is the mean of its target, and b_enc
    then begins at −mean·W_enc of its input, so that latents begin by what varies there too."""
    scale_by: str = "mean_square"
    """C² is the mean squared norm E‖x‖² (the paper), or the `variance` E‖x − mean‖². λ, θ and ε then mean the same at
    every site, however far its mean outweighs what varies: 3 to 9 parts of E‖x‖² in 10 in a real residual stream. That
    unit leaves the mean to b_dec, which must begin there: ``b_dec_init="mean"``."""
    compute_dtype: str = "fp32"
    """Of the operands of matrix products: `fp32`, `tf32` (GPU) or `bf16`. Weights, second moments, sums and the gate
    are fp32 always."""
    route: str = "auto"
    """`dense`, `sparse` (see `step`), `auto` (dense while many latents fire, then sparse) or the `reference`."""
    dead_after_tokens: int = 20_000
    """A latent is dead when it has not fired for so many tokens."""
    revival_rate: float = 0.0
    """Of `jumprelu`: θ of a dead latent falls by so many learning rates at each update, until it fires again. That is
    what the pre-activation loss would do to a latent that nothing else moves, whatever its weight: alone, a gradient
    moves what Adam without a first moment moves by the learning rate."""
    resample_steps: tuple[int, ...] = ()
    """Of `relu` and `gated`: updates, counted from 0 and ascending, before which dead latents begin anew where tokens
    are reconstructed worst (`resample.resample`). Then the learning rate warms up once more."""
    resample_tokens: int = 819_200
    """Of the batches up to that update: those that the tokens are drawn from."""
    seed: int = 0

    def __post_init__(self):
        for name in ("d_sae", "batch_size", "dead_after_tokens"):
            check_int(name, getattr(self, name), 1)
        for name in ("steps", "lr_warmup_steps", "lr_decay_steps", "l0_warmup_steps"):
            check_int(name, getattr(self, name), 0)
        check_type("skip", self.skip, bool)
        check_int("seed", self.seed, 0)
        if self.seed > LARGEST_SEED:
            raise ValueError(f"seed: expected at most {LARGEST_SEED}, got {self.seed}")
        check_number("learning_rate", self.learning_rate, 0, 1, open_low=True)
        check_number("lr_warmup_start", self.lr_warmup_start, 0, 1)
        check_number("adam_beta2", self.adam_beta2, 0, 1 - 1e-9, open_low=True)
        check_number("adam_beta1", self.adam_beta1, 0, 1)
        if self.adam_beta1**2 >= self.adam_beta2:
            raise ValueError(
                f"adam_beta1: expected less than √adam_beta2 = {math.sqrt(self.adam_beta2):.3g}, got "
                f"{self.adam_beta1}: while gradients vanish updates would grow without bound"
            )
        check_number("adam_eps", self.adam_eps, SMALLEST_EPS)
        check_number("l0_warmup_power", self.l0_warmup_power, 0, open_low=True)
        log = self.threshold_parametrisation == "log"
        check_number("threshold_init", self.threshold_init, 0, open_low=log)
        if self.overshoot is not None:
            check_number("overshoot", self.overshoot, 0, open_low=True)
        check_type("loss", self.loss, Loss)
        self.loss.check_width(self.d_sae)
        self._check_kind()
        check_choice("threshold_parametrisation", self.threshold_parametrisation, PARAMETRISATIONS)
        check_choice("b_dec_init", self.b_dec_init, B_DEC_INITS)
        check_choice("scale_by", self.scale_by, SCALES)
        if self.scale_by == "variance" and self.b_dec_init != "mean":
            raise ValueError(
                f"b_dec_init: expected 'mean' with scale_by='variance', got {self.b_dec_init!r}: else the "
                "latents have to learn the mean, which that unit leaves out"
            )
        check_choice("compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
        check_choice("route", self.route, ROUTES)
        if self.loss.pre_act_coefficient and self.route != "reference":
            raise ValueError(f"route: expected 'reference', the one with a pre-activation loss, got {self.route!r}")
        if self.compute_dtype != "fp32" and self.route == "reference":
            raise ValueError(f"compute_dtype: expected 'fp32' with route='reference', got {self.compute_dtype!r}")
        steepest = (1 - self.adam_beta2) * (1 - self.adam_beta1**2 / self.adam_beta2)
        largest = LARGEST_LOG_STEP * math.sqrt(steepest)
        if log and self.learning_rate > largest:
            raise ValueError(
                f"learning_rate: expected at most {largest:.3g} for log θ with adam_beta2={self.adam_beta2}, got "
                f"{self.learning_rate}: one update could take θ to infinity"
            )
        if self.l0_warmup_steps > self.steps:
            raise ValueError(
                f"l0_warmup_steps: expected at most steps = {self.steps}, got {self.l0_warmup_steps}: "
                "λ would not be reached"
            )
        if self.lr_warmup_steps + self.lr_decay_steps > self.steps:
            raise ValueError(
                f"lr_warmup_steps: expected at most steps = {self.steps} with lr_decay_steps, got "
                f"{self.lr_warmup_steps} + {self.lr_decay_steps}: the learning rate would not be reached"
            )

    def _check_kind(self) -> None:
        check_choice("kind", self.kind, KINDS)
        if self.loss.sparsity not in SPARSITIES_OF[self.kind]:
            expected = " or ".join(map(repr, SPARSITIES_OF[self.kind]))
            raise ValueError(f"sparsity: expected {expected} with kind={self.kind!r}, got {self.loss.sparsity!r}")
        check_number("aux_coefficient", self.aux_coefficient, 0)
        if self.aux_k is not None:
            check_int("aux_k", self.aux_k, 1)
        if (self.kind in TOP_K) != (self.k is not None):
            expected = "None" if self.k is not None else "an int"
            raise ValueError(f"k: expected {expected} with kind={self.kind!r}, got {self.k}")
        if self.k is not None:
            check_int("k", self.k, 1, self.d_sae)
        check_number("revival_rate", self.revival_rate, 0)
        if self.revival_rate and self.kind != "jumprelu":
            raise ValueError(f"revival_rate: expected 0 with kind={self.kind!r}, got {self.revival_rate:g}")
        self._check_resampling()
        self._check_annealing()
        check_type("prefixes", self.prefixes, tuple)
        for index, prefix in enumerate(self.prefixes):
            check_int(f"prefixes[{index}]", prefix, 1)
        if (self.kind == "matryoshka") != bool(self.prefixes):
            expected = "none" if self.prefixes else "some"
            raise ValueError(f"prefixes: expected {expected} with kind={self.kind!r}, got {list(self.prefixes)}")
        ascending = all(a < b for a, b in itertools.pairwise(self.prefixes))
        if self.prefixes and not (ascending and self.prefixes[-1] == self.d_sae):
            raise ValueError(
                f"prefixes: expected numbers that ascend to d_sae = {self.d_sae}, got {list(self.prefixes)}"
            )
        if self.kind != "jumprelu":
            for name, value in (("ste_to_z", self.loss.ste_to_z), ("frequency_scale", self.loss.frequency_scale)):
                if value:
                    raise ValueError(f"{name}: expected kind='jumprelu' with it, got {self.kind!r}")
            if self.loss.pre_act_coefficient:
                raise ValueError(f"pre_act_coefficient: expected 0 with kind={self.kind!r}")
        if self.kind in TOP_K and self.route == "dense":
            raise ValueError(f"route: expected 'auto', 'sparse' or 'reference' with kind={self.kind!r}, got 'dense'")

    def _check_resampling(self) -> None:
        check_int("resample_tokens", self.resample_tokens, 1)
        check_type("resample_steps", self.resample_steps, tuple)
        for index, step in enumerate(self.resample_steps):
            check_int(f"resample_steps[{index}]", step, 1, max(1, self.steps - 1))
        if any(a >= b for a, b in itertools.pairwise(self.resample_steps)):
            raise ValueError(f"resample_steps: expected numbers that ascend, got {list(self.resample_steps)}")
        if self.resample_steps and self.kind not in RESAMPLED:
            raise ValueError(f"resample_steps: expected none with kind={self.kind!r}, got {list(self.resample_steps)}")

    def _check_annealing(self) -> None:
        check_int("anneal_changes", self.anneal_changes, 1)
        if self.anneal_start is not None:
            check_int("anneal_start", self.anneal_start, 1)
        if self.p_end is None:
            if self.anneal_start is not None:
                raise ValueError(f"anneal_start: expected None without p_end, got {self.anneal_start}")
            return
        if self.kind not in ANNEALED:
            raise ValueError(f"p_end: expected None with kind={self.kind!r}, got {self.p_end}")
        check_number("p_end", self.p_end, 0, self.loss.p, open_low=True)
        if self._first_change() + self.anneal_changes > self.steps:
            raise ValueError(
                f"anneal_changes: expected at most the {max(0, self.steps - self._first_change())} updates from "
                f"update {self._first_change()} to the end, got {self.anneal_changes}"
            )

    def _first_change(self) -> int:
        """The first update with another p; there is one before it, to compare."""
        return max(1, self.l0_warmup_steps) if self.anneal_start is None else self.anneal_start

    def changed(self, **changes) -> "TrainConfig":
        """A copy with other numbers, those of the loss by their own names: ``config.changed(target_l0=50, seed=1)``.

        Another ``sparsity`` comes with its own λ, unless one is given, and another ``kind`` with its own penalty and
        without revival.
        Raises TypeError for a name that neither the recipe nor its loss has, and else as the constructor.
        """
        kind = changes.get("kind", self.kind)
        if kind != self.kind and "loss" not in changes and kind in SPARSITIES_OF:
            changes = {"sparsity": SPARSITIES_OF[kind][0]} | changes
        if kind != self.kind and kind in KINDS:
            changes.setdefault("revival_rate", 0.0)
        of_loss = {name: changes.pop(name) for name in list(changes) if name in LOSS_FIELDS}
        unknown = changes.keys() - {field.name for field in dataclasses.fields(self)}
        if unknown:
            raise TypeError(f"TrainConfig: expected the names of its fields or its loss's, got {min(unknown)!r}")
        if of_loss:
            loss = changes.get("loss", self.loss)
            check_type("loss", loss, Loss)
            if of_loss.get("sparsity", loss.sparsity) != loss.sparsity:
                target = loss.target_l0 if of_loss["sparsity"] in TARGETED else None
                of_loss = {"l0_coefficient": None, "target_l0": target} | of_loss
            changes["loss"] = dataclasses.replace(loss, **of_loss)
        for name in ("prefixes", "resample_steps"):
            if isinstance(changes.get(name), list):
                changes[name] = tuple(changes[name])
        return dataclasses.replace(self, **changes)

    @classmethod
    def gemma_scope(cls, **changes) -> "TrainConfig":
        """The published recipe, with ``changes`` as of `changed`."""
        return cls().changed(**changes)

    @classmethod
    def short(cls, **changes) -> "TrainConfig":
        """A recipe for small models and short runs, hundreds of updates instead of a million; ``changes`` as of
        `changed`. Its schedules take a share of the ``steps``."""
        steps, sparsity = changes.get("steps", 400), changes.get("sparsity", _sparsity_of(changes, "l0"))
        check_int("steps", steps, 0)
        check_choice("sparsity", sparsity, SPARSITIES)
        recipe = cls(
            d_sae=512,
            steps=steps,
            batch_size=1024,
            learning_rate=3e-3,
            lr_warmup_steps=steps * 100 // 400,
            lr_decay_steps=steps * 150 // 400,
            adam_beta2=0.9,
            loss=Loss(SHORT_L0_COEFFICIENTS["l0"], bandwidth=5e-3),
            l0_warmup_steps=steps * 170 // 400,
            threshold_init=0.05,
            threshold_parametrisation="raw",
            b_dec_init="mean",
        )
        if "loss" not in changes:
            changes = {"l0_coefficient": SHORT_L0_COEFFICIENTS[sparsity]} | changes
        return recipe.changed(**changes)

    @classmethod
    def small(cls, **changes) -> "TrainConfig":
        """A recipe for real models and hundreds or thousands of updates, whose L0 comes out near ``target_l0``, by
        default 40, at every site with the same numbers; ``changes`` as of `changed`.

        Units are those of the variance, and the target is the batch's, so that tokens may differ. λ rises linearly in
        the first third: latents learn what they are only while few of them fire. That pushes some out of reach of any
        gradient, while L0 is far above the target; ``revival_rate`` brings them back, the faster, from 1 to 4, the more
        tokens there are for each latent, since what comes back must learn again. Many fire at first, and the
        window is wide, for the same reason; in wide dictionaries fewer, so that the first reconstruction is at most
        three times its input (``overshoot``). A first moment averages the gradients of some batches. Schedules take a
        share of the ``steps``. With another ``sparsity``, `l0` for one, no target is set.
        """
        steps, sparsity = changes.get("steps", 500), changes.get("sparsity", _sparsity_of(changes, "target_l0"))
        check_int("steps", steps, 0)
        check_choice("sparsity", sparsity, SPARSITIES)
        d_sae, batch_size = changes.get("d_sae", 4096), changes.get("batch_size", 1024)
        check_int("d_sae", d_sae, 1)
        check_int("batch_size", batch_size, 1)
        recipe = cls.short(
            d_sae=4096,
            steps=steps,
            loss=Loss(sparsity="target_l0", target_l0=40, l0_of="batch", bandwidth=5e-2),
            learning_rate=4e-3,
            adam_beta1=0.7,
            l0_warmup_steps=steps // 3,
            revival_rate=min(4.0, max(1.0, steps * batch_size / (25 * d_sae))),
            threshold_init=0.01,
            overshoot=3.0,
            scale_by="variance",
        )
        if "loss" not in changes:
            changes = {"l0_coefficient": SMALL_L0_COEFFICIENTS[sparsity]} | changes
        return recipe.changed(**changes)

    def _counted(self, step: int) -> int:
        """``step``, or the last of `steps` if it is past that."""
        check_int("step", step, 0)
        return min(step, max(0, self.steps - 1))

    def observes(self, step: int) -> bool:
        """Whether the batch of update ``step``, counted from 0, is among those that dead latents begin at."""
        batches = math.ceil(self.resample_tokens / self.batch_size)
        return any(step <= each < step + batches for each in self.resample_steps)

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of update ``step``, counted from 0."""
        step, rate = self._counted(step), self.learning_rate
        since = step - max((begun for begun in self.resample_steps if begun <= step), default=0)
        if since < self.lr_warmup_steps:
            rise = 0.5 * (1 - math.cos(math.pi * since / self.lr_warmup_steps))
            rate *= self.lr_warmup_start + (1 - self.lr_warmup_start) * rise
        left = self.steps - step
        return rate * min(1.0, left / self.lr_decay_steps) if self.lr_decay_steps else rate

    def l0_coefficient_at(self, step: int) -> float:
        """λ of update ``step``, counted from 0."""
        share = min(1.0, self._counted(step) / self.l0_warmup_steps) if self.l0_warmup_steps else 1.0
        return self.loss.l0_coefficient * share**self.l0_warmup_power

    def annealing_at(self, step: int) -> Annealing | None:
        """Where p-annealing is at update ``step``, counted from 0; None without it."""
        if self.p_end is None:
            return None
        step, first = self._counted(step), self._first_change()
        span, changes = self.steps - first, 0
        if step >= first:
            changes = 1 + (step - first) * self.anneal_changes // span
        next_change = first + math.ceil(changes * span / self.anneal_changes)  # beyond the end after the last
        compares = next_change < self.steps and next_change - step <= P_WINDOW
        shares = (changes / self.anneal_changes, (changes + 1) / self.anneal_changes)
        p, next_p = ((1 - share) * self.loss.p + share * self.p_end for share in shares)
        return Annealing(changes, p, next_p if compares else None)

    def loss_at(self, step: int) -> Loss:
        """The loss of update ``step``, counted from 0, but for the factor of λ that annealing measures. Without
        thresholds to learn their window is closed."""
        annealing = self.annealing_at(step)
        p = self.loss.p if annealing is None else annealing.p
        loss = dataclasses.replace(self.loss, l0_coefficient=self.l0_coefficient_at(step), p=p)
        return loss if self.kind == "jumprelu" else dataclasses.replace(loss, bandwidth=CLOSED_WINDOW)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)
