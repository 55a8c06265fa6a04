"""Every number of the training recipe, validated, with its source."""

import dataclasses
import math
from dataclasses import dataclass

from .losses import L0_OF, SPARSITIES, Loss
from .step import COMPUTE_DTYPES

PARAMETRISATIONS = ("log", "raw")
B_DEC_INITS = ("zeros", "mean")
ROUTES = ("auto", "reference", "dense", "sparse")
TARGETED = ("target_l0", "quadratic_l0")


def check_number(name: str, value: float, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    """Raise TypeError or ValueError unless ``value`` is a finite number in [low, high] (or (low, high])."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not (math.isfinite(value) and (low < value if open_low else low <= value) and value <= high):
        bounds = f"{'>' if open_low else '≥'} {low:g}" + ("" if high == math.inf else f" and ≤ {high:g}")
        raise ValueError(f"{name}: expected a finite number {bounds}, got {value}")


def check_int(name: str, value: int, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < low:
        raise ValueError(f"{name}: expected at least {low}, got {value}")


@dataclass(frozen=True)
class TrainConfig:
    """The recipe of Gemma Scope (arXiv 2408.05147 §3.2) by default; `short` for runs of under a million tokens.

    Inputs are divided by one scalar so that their mean squared norm is 1; losses, thresholds and the bandwidth are in
    those units.
    """

    d_sae: int = 16384
    """Latents of each SAE."""
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
    adam_beta2: float = 0.999
    """Adam without a first moment (beta1 = 0)."""
    adam_eps: float = 1e-8
    l0_coefficient: float = 6e-4
    """λ, the weight of the mean number of active latents."""
    l0_warmup_steps: int = 10_000
    """Linear warm-up of λ from 0."""
    bandwidth: float = 1e-3
    """ε, the width of the straight-through window around the threshold."""
    sparsity: str = "l0"
    """The sparsity penalty: `l0`, `target_l0`, `quadratic_l0` or `tanh`; formulas and sources in `losses.Loss`."""
    target_l0: float | None = None
    """L0*, which `target_l0` and `quadratic_l0` aim at."""
    l0_of: str = "token"
    """Whether those two compare L0* with the L0 of each `token` or of the `batch` on average."""
    frequency_scale: float | None = None
    """s: adds the penalty λ·Σ_j p_j²/s on the frequencies of the latents."""
    tanh_scale: float = 4.0
    """c of the `tanh` penalty."""
    pre_act_coefficient: float = 0.0
    """λ_P of the pre-activation loss, which pulls dead latents towards firing; on the `reference` route only."""
    ste_to_z: bool = False
    """Whether the straight-through gradient reaches the pre-activations, or only the threshold."""
    threshold_init: float = 1e-3
    threshold_parametrisation: str = "log"
    """What Adam moves: log θ (the paper), or θ itself (`raw`, clamped at 0). Log θ moves at most about the learning
    rate a step, too slowly for short runs."""
    b_dec_init: str = "zeros"
    """`zeros` (the paper), or the `mean` of the activations."""
    compute_dtype: str = "fp32"
    """Of the operands of matrix products: `fp32`, `tf32` (GPU) or `bf16`. Weights, second moments, sums and the gate
    are fp32 always."""
    route: str = "auto"
    """`dense`, `sparse` (see `step`), `auto` (dense while many latents fire, then sparse) or the `reference`."""
    dead_after_tokens: int = 20_000
    """A latent is dead when it has not fired for so many tokens."""
    seed: int = 0

    def __post_init__(self):
        for name in ("d_sae", "batch_size", "dead_after_tokens"):
            check_int(name, getattr(self, name), 1)
        for name in ("steps", "lr_warmup_steps", "lr_decay_steps", "l0_warmup_steps"):
            check_int(name, getattr(self, name), 0)
        check_int("seed", self.seed, 0)
        check_number("learning_rate", self.learning_rate, 0, 1, open_low=True)
        check_number("lr_warmup_start", self.lr_warmup_start, 0, 1)
        check_number("adam_beta2", self.adam_beta2, 0, 1 - 1e-9, open_low=True)
        check_number("adam_eps", self.adam_eps, 0, open_low=True)
        check_number("l0_coefficient", self.l0_coefficient, 0)
        check_number("bandwidth", self.bandwidth, 0, open_low=True)
        log = self.threshold_parametrisation == "log"
        check_number("threshold_init", self.threshold_init, 0, open_low=log)
        check_number("tanh_scale", self.tanh_scale, 0, open_low=True)
        check_number("pre_act_coefficient", self.pre_act_coefficient, 0)
        for name in ("target_l0", "frequency_scale"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 0, open_low=True)
        if not isinstance(self.ste_to_z, bool):
            raise TypeError(f"ste_to_z: expected a bool, got {type(self.ste_to_z).__name__}")
        choices = {
            "threshold_parametrisation": PARAMETRISATIONS,
            "b_dec_init": B_DEC_INITS,
            "sparsity": SPARSITIES,
            "l0_of": L0_OF,
            "compute_dtype": COMPUTE_DTYPES,
            "route": ROUTES,
        }
        for name, options in choices.items():
            if getattr(self, name) not in options:
                expected = " or ".join(map(repr, options))
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")
        if self.sparsity in TARGETED and self.target_l0 is None:
            raise ValueError(f"target_l0: expected a number with sparsity={self.sparsity!r}, got None")
        if self.pre_act_coefficient and self.route != "reference":
            raise ValueError(f"route: expected 'reference', the one with a pre-activation loss, got {self.route!r}")
        if self.compute_dtype != "fp32" and self.route == "reference":
            raise ValueError(f"compute_dtype: expected 'fp32' with route='reference', got {self.compute_dtype!r}")

    @classmethod
    def gemma_scope(cls, **changes) -> "TrainConfig":
        """The published recipe."""
        return cls(**changes)

    @classmethod
    def short(cls, **changes) -> "TrainConfig":
        """A recipe for small models and short runs: hundreds of updates instead of a million."""
        defaults = {
            "d_sae": 512,
            "steps": 400,
            "batch_size": 1024,
            "learning_rate": 3e-3,
            "lr_warmup_steps": 100,
            "lr_decay_steps": 150,
            "adam_beta2": 0.9,
            "l0_coefficient": 8e-3,
            "l0_warmup_steps": 170,
            "bandwidth": 5e-3,
            "threshold_init": 0.05,
            "threshold_parametrisation": "raw",
            "b_dec_init": "mean",
        }
        return cls(**(defaults | changes))

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of update ``step``, counted from 0."""
        rate = self.learning_rate
        if step < self.lr_warmup_steps:
            rise = 0.5 * (1 - math.cos(math.pi * step / self.lr_warmup_steps))
            rate *= self.lr_warmup_start + (1 - self.lr_warmup_start) * rise
        left = self.steps - step
        return rate * min(1.0, left / self.lr_decay_steps) if self.lr_decay_steps else rate

    def l0_coefficient_at(self, step: int) -> float:
        """λ of update ``step``, counted from 0."""
        return self.l0_coefficient * (min(1.0, step / self.l0_warmup_steps) if self.l0_warmup_steps else 1.0)

    def loss_at(self, step: int) -> Loss:
        """The loss of update ``step``, counted from 0."""
        return Loss(
            self.l0_coefficient_at(step),
            self.bandwidth,
            sparsity=self.sparsity,
            target_l0=self.target_l0,
            l0_of=self.l0_of,
            frequency_scale=self.frequency_scale,
            tanh_scale=self.tanh_scale,
            pre_act_coefficient=self.pre_act_coefficient,
            ste_to_z=self.ste_to_z,
        )

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)
