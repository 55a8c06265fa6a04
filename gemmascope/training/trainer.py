"""The training of one SAE, with the recipe of Gemma Scope (arXiv 2408.05147 §3.2)."""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..activations.moments import moments
from ..activations.statistics import SiteStatistics
from ..checks import check_device, check_floating, check_int, check_type, dtype_name
from ..errors import EnvironmentProblemError
from ..kernels import Rule, implementations
from ..kernels import density as densities
from ..saes import JumpReLUSAE
from ..saes.base import BaseSAE
from ..saes.scaled_transcoder import TrainedTranscoder
from .annealing import annealed
from .config import TOP_K, TrainConfig
from .gated_step import gated_step
from .kinds import new_sae, new_transcoder, of_kind
from .memory import TrainingMemory, available_memory, training_memory
from .resample import observe, resample, seed_of
from .revive import revive
from .snapshot import Checked, check_facts, check_keys, check_same, check_tensors, packed
from .start import first_threshold
from .state import COPIES, MASTER_DTYPES, TrainState
from .step import StepFigures, dense_step, reference_step, sparse_step
from .topk import sizes_of_step, topk_step
from .unfold import check_fits, unfolded
from .upload import uploaded

# Steps that a GPU is given before the host looks at the figures of the first of them.
RUN_AHEAD = 4
# Room for entries is made in these units, half as much again as were seen.
CAPACITY_UNIT = 4096
CAPACITY_MARGIN = 1.5
FACTS = (
    *(
        "config",
        "input_scale",
        "output_scale",
        "pre_encoder_bias",
        "step",
        "route",
        "capacity",
        "turn",
        "copies_seen",
        "figures",
    ),
    *("skipped_in_a_row", "decided", "due"),
)
# Of the mean squared norm: less than that the rounding of fp32 hides, in which the SAE is trained.
LEAST_VARIANCE = 1e-9


def steps_ahead(device: torch.device) -> int:
    """Steps that may be under way on a device when the next one is given to it."""
    return RUN_AHEAD if device.type == "cuda" else 0


def _to_host(packed: Tensor) -> "tuple[Tensor, torch.cuda.Event | None]":
    """A copy of a small tensor on the host, and the event after which it is there; without waiting for the device.

    The event belongs to the stream of the tensor's device, which makes the copy and need not be the current device.
    """
    if not packed.is_cuda:
        return packed, None
    pinned = torch.empty(packed.shape, dtype=packed.dtype, device="cpu", pin_memory=True)  # else the copy would wait
    copy, copied = pinned.copy_(packed, non_blocking=True), torch.cuda.Event()
    copied.record(torch.cuda.current_stream(packed.device))
    return copy, copied


@dataclass(frozen=True)
class _Decision:
    """What the figures of a step decide on, once `run_ahead` steps more were given to the device: no sooner, whenever
    the host looked at them, so that looking changes nothing."""

    step: int
    density: float
    """Entries of each pair of token and latent; that, and the next, of the last update that was made."""
    n_entries: float
    skipped_in_a_row: int


@dataclass
class _Job:
    """A step the device has been given, with what it takes to give it again."""

    x: Tensor
    target: Tensor | None
    step: int
    route: str
    figures: Tensor
    copied: "torch.cuda.Event | None"


def _first_route(config: TrainConfig) -> str:
    """Half of the latents fire at first, but for those kinds of which k do."""
    if config.route != "auto":
        return config.route
    return "sparse" if config.kind in TOP_K else "dense"


def check_rows(name: str, x: Tensor, width: int | None = None) -> None:
    """Raise ValueError or TypeError unless x is [N, width] floats; any precision and any device will do."""
    check_floating(name, x)
    if x.ndim != 2 or (width is not None and x.shape[1] != width):
        raise ValueError(f"{name}: expected shape [N ≥ 1, {width or 'd_model'}], got {list(x.shape)}")
    if x.is_meta:
        raise ValueError(f"{name}: expected activations, got a tensor on meta, which holds none")


def moments_of(sample: "Tensor | SiteStatistics", name: str = "sample") -> tuple[Tensor, float]:
    """Mean [d_model] and variance of a sample, or as they were measured; ValueError for what sets no scale."""
    if isinstance(sample, SiteStatistics):
        mean, variance = sample.mean, sample.variance
        check_floating(f"{name}.mean", mean)
        if mean.ndim != 1 or not len(mean):
            raise ValueError(f"{name}.mean: expected shape [d_model ≥ 1], got {list(mean.shape)}")
        if not (mean.isfinite().all() and math.isfinite(variance)):
            raise ValueError(f"{name}: expected a finite mean and variance, found NaN or Inf")
    else:
        check_rows(name, sample)
        if 0 in sample.shape:
            raise ValueError(f"{name}: expected shape [N ≥ 1, d_model ≥ 1], got {list(sample.shape)}")
        mean, variance = moments(name, sample)
    mean_square = variance + mean.square().sum().item()
    if not variance > LEAST_VARIANCE * mean_square:
        raise ValueError(
            f"{name}: expected activations that vary, got a variance of {variance:.3g} "
            f"and a mean squared norm of {mean_square:.3g}"
        )
    return mean, variance


def scale_of(config: TrainConfig, mean: Tensor, variance: float) -> float:
    """C of activations with these moments."""
    of_mean = 0.0 if config.scale_by == "variance" else mean.square().sum().item()
    return math.sqrt(variance + of_mean)


def _of_target(
    config: TrainConfig, target: Tensor | SiteStatistics | None, init_from: JumpReLUSAE | None
) -> tuple[Tensor, float] | None:
    """Mean and variance of a transcoder's target, or None without one."""
    if target is None:
        if config.skip:
            raise ValueError("skip: expected a target with skip=True, got none: an SAE would learn the identity")
        return None
    if init_from is not None:
        raise ValueError("init_from: expected none with a target, got one: transcoders begin anew")
    if config.resample_steps:
        raise ValueError(f"resample_steps: expected none with a target, got {list(config.resample_steps)}")
    return moments_of(target, "target")


class SAETrainer:
    """One SAE, its optimiser state and its counters.

    sample: [n ≥ 1, d_model] floats, or the `SiteStatistics` of such: the activations that set the input scale C (mean
    squared norm or variance 1 after division, by ``scale_by``), and, with ``b_dec_init="mean"``, b_dec. Raises
    ValueError when they are not finite, are all zero or do not vary, ValueError or TypeError on other bad arguments,
    and EnvironmentProblemError when there is no such device or too little free memory on it.

    init_from: an SAE to go on from, folded or not, instead of random weights: in the units of this run it computes the
    same at first, up to rounding, its decoder rows scaled to unit norm (`unfold.unfolded`). It is left as it is. Raises
    ValueError for one of another ``d_model`` or ``d_sae``.

    target: likewise a sample of other activations of the same tokens, [n ≥ 1, d_out]: then a transcoder is trained,
    which makes those of what ``sample`` is of, and every `update` takes both. They have an input scale and an output
    scale of their own, W_enc does not begin as W_decᵀ, and there is no pre-encoder bias (arXiv 2408.05147, appendix B);
    with ``config.skip`` a linear map of the input is learned beside the latents, from 0. Raises ValueError for a
    ``skip`` without target and for ``init_from`` with one.

    dtype: fp64 is for comparisons, on a CPU.

    A step whose loss is not finite, or whose gradients are so large that second moments or weights might not be after
    it (`kernels.reference.conclusion.gradient_bound`), changes nothing but the count of skipped steps.

    The SAE may be loaded, changed in place and copied at any time, and cast or moved there and back: the next step
    trains what it then is, or raises ValueError when it is of another shape, dtype or device than at the start. Second
    moments and counters stay. The trainer itself can be deep-copied and pickled. All of this after `flush`, on a GPU.
    """

    def __init__(
        self,
        config: TrainConfig,
        sample: Tensor | SiteStatistics,
        *,
        target: Tensor | SiteStatistics | None = None,
        init_from: JumpReLUSAE | None = None,
        impl: str = "auto",
        metadata: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        check_type("config", config, TrainConfig)
        if dtype not in MASTER_DTYPES:
            found = dtype_name(dtype) if isinstance(dtype, torch.dtype) else type(dtype).__name__
            raise TypeError(f"dtype: expected float32 or float64, got {found}")
        device = check_device("device", "cpu" if device is None else device)
        mean, variance = moments_of(sample)
        d_model = len(mean)
        of_target = _of_target(config, target, init_from)
        if init_from is not None:
            check_fits("init_from", init_from, d_model, config.d_sae)
        scale = scale_of(config, mean, variance)
        self.config = config
        self._d_out = None if of_target is None else len(of_target[0])
        memory, self._available = self.memory(config, d_model, device, self._d_out), available_memory(device)
        if self._available and memory.total > self._available:
            raise EnvironmentProblemError(memory.advice(self._available))
        options: dict[str, Any] = {
            "input_scale": scale,
            "impl": impl,
            "metadata": metadata,
            "generator": torch.Generator("cpu").manual_seed(config.seed),
            "device": device,
            "dtype": dtype,
        }
        if of_target is None:
            sae = new_sae(config, d_model, first_threshold(config, mean, variance, scale), **options)
        else:
            options["output_scale"] = scale_of(config, *of_target)
            sae = new_transcoder(config, d_model, len(of_target[0]), **options)
        with torch.no_grad():
            if init_from is not None:
                for name, value in of_kind(config, unfolded(init_from, scale)).items():
                    getattr(sae, name).copy_(value)
            elif config.b_dec_init == "mean" and of_target is None:
                sae.b_dec.copy_(mean / scale)
            elif config.b_dec_init == "mean" and of_target is not None:
                sae.b_dec.copy_(of_target[0] / options["output_scale"])
                sae.b_enc.copy_(-((mean / scale).to(sae.W_enc) @ sae.W_enc))
        self.state = TrainState.start(
            sae,
            config.compute_dtype,
            annealed=config.p_end is not None,
            resampled=bool(config.resample_steps),
            first_moments=config.adam_beta1 > 0,
        )
        self.step = 0
        self.route = _first_route(config)
        self.capacity: int | None = None
        self.figures: dict[str, float] = {}
        self.skipped_in_a_row = 0
        self.run_ahead = steps_ahead(sae.W_dec.device)
        self._pending: deque[_Job] = deque()
        self._due: deque[_Decision] = deque()
        self._decided = _Decision(-1, 0.0, 0.0, 0)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which hold every step given so far and none in flight."""
        self.flush()
        return self.__dict__ | {"_pending": deque()}

    @property
    def sae(self) -> BaseSAE:
        """The SAE in training; `flush` first to have every step so far in it."""
        return self.state.sae

    @property
    def is_transcoder(self) -> bool:
        return self._d_out is not None

    @staticmethod
    def memory(
        config: TrainConfig, d_model: int, device: torch.device | str = "cpu", d_out: int | None = None
    ) -> TrainingMemory:
        """What training an SAE on activations of that width takes on its device; d_out: of a transcoder's target."""
        check_type("config", config, TrainConfig)
        check_int("d_model", d_model, 1)
        if d_out is not None:
            check_int("d_out", d_out, 1)
        sizes = (d_model, config.d_sae, config.batch_size, config.compute_dtype)
        options: dict[str, Any] = {"pending": steps_ahead(torch.device(device)), "kind": config.kind}
        options |= {"resampled": bool(config.resample_steps), "first_moments": config.adam_beta1 > 0}
        options["of_power"] = config.loss.p < 1 or config.p_end is not None
        if config.kind in TOP_K:
            options["l0"], options["blocks"] = sizes_of_step(config, d_model if d_out is None else d_out)
        return training_memory(*sizes, **options, d_out=d_out, skip=config.skip)

    def update(self, x_raw: Tensor, y_raw: Tensor | None = None) -> None:
        """One step on activations [N ≥ 1, d_model] as harvested, floats of any precision on any device; of a transcoder
        with its target y_raw [N, d_out], row i of both the same token.

        On a GPU it returns before the step is made, and activations on the host are copied there beside the steps under
        way (`upload.uploaded`). Raises ValueError or TypeError for another batch, ValueError for an
        SAE that is not what it was (`TrainState.ready`), and EnvironmentProblemError when memory runs out.
        """
        self.check_batch(x_raw, target=y_raw)
        x = self._scaled(x_raw, self.sae.input_scale)
        y = None if y_raw is None else self._scaled(y_raw, self.output_scale)
        if self.config.observes(self.step):
            self._observe(x)
        self._launch(x, self.step, self.route, y)
        self.step += 1
        while len(self._pending) > self.run_ahead:
            self._retire()
        self._decide()

    @property
    def output_scale(self) -> float:
        """C_out of a transcoder; of an SAE that is its input scale."""
        sae = self.sae
        return sae.output_scale if isinstance(sae, TrainedTranscoder) else sae.input_scale

    def _scaled(self, raw: Tensor, scale: float) -> Tensor:
        given = raw.detach()
        x = uploaded(given, self.state.b_dec_v).to(self.state.b_dec_v)
        return x / scale if x is given else x.div_(scale)

    def check_batch(self, x_raw: Tensor, name: str = "x", target: Tensor | None = None, target_name: str = "y") -> None:
        """Raise ValueError or TypeError naming ``name`` or ``target_name`` for a batch that `update` would not take."""
        check_rows(name, x_raw, self.state.W_enc_v.shape[1])
        if x_raw.shape[0] == 0:
            raise ValueError(f"{name}: expected at least one token, got an empty batch")
        if self.is_transcoder and target is None:
            raise ValueError(f"{target_name}: expected the target of a transcoder, got None")
        if target is None:
            return
        if not self.is_transcoder:
            raise ValueError(f"{target_name}: expected none for an SAE, got a target; SAETrainer(target=...) takes it")
        check_rows(target_name, target, len(self.state.b_dec_v))
        if len(target) != len(x_raw):
            raise ValueError(f"{target_name}: expected the {len(x_raw)} tokens of {name}, got {len(target)}")

    def flush(self) -> None:
        """Wait for every step that was given to the device."""
        while self._pending:
            self._retire()

    def stop(self) -> None:
        """Make the steps under way, or forget them where that is an error."""
        try:
            self.flush()
        except Exception:  # that for which it is stopped
            self._pending.clear()

    def _launch(self, x: Tensor, step: int, route: str, target: Tensor | None) -> None:
        config, state = self.config, self.state
        loss, annealing = config.loss_at(step), config.annealing_at(step)
        rule = Rule(
            config.learning_rate_at(step),
            config.adam_beta2,
            config.adam_eps,
            config.threshold_parametrisation == "log" or config.kind != "jumprelu",
            config.adam_beta1,
        )
        try:
            if config.kind == "gated":
                room = self._room(len(x)) if route == "sparse" else None
                figures = gated_step(state, x, loss, rule, route, room, target, annealing)
            elif config.kind in TOP_K:
                dead = state.tokens_since_fired >= config.dead_after_tokens
                figures = topk_step(state, x, config, rule, dead, target)
            elif route == "sparse":
                room = self._room(len(x))
                figures = sparse_step(state, x, loss, rule, room, target=target, annealing=annealing)
            elif route == "dense":
                figures = dense_step(state, x, loss, rule, target, annealing)
            else:
                dead = state.tokens_since_fired >= config.dead_after_tokens if config.loss.pre_act_coefficient else None
                figures = reference_step(state, x, loss, rule, dead, target, annealing)
        except torch.OutOfMemoryError as error:
            memory = self.memory(replace(config, batch_size=len(x)), x.shape[1], x.device, self._d_out)
            raise EnvironmentProblemError(memory.advice(self._available)) from error
        if config.revival_rate:
            fall = config.revival_rate * config.learning_rate_at(step)
            revive(state, config.dead_after_tokens, fall, rule.log_threshold, figures.made)
        self._pending.append(_Job(x, target, step, route, *_to_host(figures.packed)))

    def _observe(self, x: Tensor) -> None:
        """Keep tokens for dead latents to begin at, and let them begin anew when it is time, every step so far made:
        what is repeated comes after it."""
        self.flush()
        self.state.ready()
        observe(self.state, x, seed_of(self.config.seed, self.step))
        if self.step in self.config.resample_steps:
            resample(self.state, self.state.tokens_since_fired >= self.config.dead_after_tokens)

    def _room(self, n_tokens: int) -> int | None:
        """Entries the sparse route makes room for, where it must be told."""
        if self.state.impl not in implementations.NEED_CAPACITY:
            return None
        if self.capacity is None:
            self._make_room(self._decided.n_entries or 64 * n_tokens)
        return self.capacity

    def _make_room(self, n_entries: float) -> None:
        self.capacity = CAPACITY_UNIT * math.ceil(CAPACITY_MARGIN * max(1, n_entries) / CAPACITY_UNIT)

    def _retire(self) -> None:
        """Read the figures of the oldest step; if its update was withheld for something that can be mended, mend that
        and repeat it and all since."""
        job = self._pending.popleft()
        if job.copied is not None:
            job.copied.synchronize()
        figures = StepFigures.unpack(job.figures)
        if figures["stalled"]:
            if not int(figures["stalled"]) & COPIES:  # else the entries were those of other weights
                self._make_room(figures["n_entries"])
            self._repeat(deque([job, *self._pending]))
            return
        self.figures = figures | {"n_tokens": float(len(job.x))}
        self.skipped_in_a_row = 0 if figures["made"] else self.skipped_in_a_row + 1
        last = self._due[-1] if self._due else self._decided
        if figures["made"]:
            n_pairs = len(job.x) * self.sae.d_sae
            last = replace(last, density=figures["n_entries"] / n_pairs, n_entries=figures["n_entries"])
        self._due.append(replace(last, step=job.step, skipped_in_a_row=self.skipped_in_a_row))

    def _decide(self) -> None:
        """Take the decisions that are due."""
        while self._due and self._due[0].step + self.run_ahead < self.step:
            self._decided = self._due.popleft()
            if self.config.route == "auto" and self.config.kind not in TOP_K and not self._decided.skipped_in_a_row:
                self._choose_route(self._decided.density)

    @property
    def withheld_in_a_row(self) -> int:
        """`skipped_in_a_row` as of ``run_ahead`` steps ago, whatever the host has seen since: for what must not depend
        on when it looked."""
        return self._decided.skipped_in_a_row

    def _repeat(self, jobs: deque[_Job]) -> None:
        self._pending.clear()
        self.state.resume()
        try:
            while jobs:
                self._launch(jobs[0].x, jobs[0].step, jobs[0].route, jobs[0].target)
                jobs.popleft()
                self._retire()
        finally:
            self._pending.extend(jobs)  # those an error left, for when the SAE is mended

    def _choose_route(self, density: float) -> None:
        switch = densities.training_switch(self.sae.W_dec.device)
        if density > switch.dense_above:
            self.route = "dense"
        elif density < switch.sparse_below:
            self.route = "sparse"

    def report(self) -> dict[str, float]:
        """The figures of the last step, measured on its batch before its update. ``fvu`` and ``median_fvu`` are what
        `evaluation.evaluate_sae` gives of those rows, up to rounding; ``window`` is the share of the batch's entries
        that lie below θ, through which L0 answers to λ, and ``threshold`` the mean θ, after the update, in units of C.
        ``target_l0`` is there where the loss has one, ``p`` where that is annealed. Raises ValueError when there was no
        step."""
        self.flush()
        figures, config, last = self.figures, self.config, self.step - 1
        if not figures:
            raise ValueError("report: expected at least one update before it, got none")
        annealing = config.annealing_at(last)
        n_entries = figures["n_entries"]
        row = {"step": self.step} | {name: figures[name] for name in ("loss", "l0", "fvu", "median_fvu")}
        row |= {
            "dead": (self.state.tokens_since_fired >= config.dead_after_tokens).double().mean().item(),
            "skipped": int(figures["skipped"]),
            "lr": config.learning_rate_at(last),
            "l0_coefficient": annealed(config.loss_at(last), self.state.annealing, annealing).l0_coefficient,
            "window": max(0.0, 1 - figures["l0"] * figures["n_tokens"] / n_entries) if n_entries else 0.0,
            "threshold": self.state.threshold.double().mean().item(),
        }
        if annealing is not None:
            row["p"] = annealing.p
        return row if config.loss.target_l0 is None else row | {"target_l0": config.loss.target_l0}

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that `restore` needs to go on with the same bits, every step so far made: the tensors of the state, in
        their own memory, to be copied before the next step, and facts of JSON without NaN."""
        self.flush()
        facts = {
            "config": self.config.to_dict(),
            "input_scale": self.sae.input_scale,
            "output_scale": self.output_scale,
            "pre_encoder_bias": self.sae.pre_encoder_bias,
            "step": self.step,
            "route": self.route,
            "capacity": self.capacity,
            "turn": self.state.turn,
            "copies_seen": self.state.copies_seen,
            "figures": packed(self.figures),
            "skipped_in_a_row": self.skipped_in_a_row,
            "decided": asdict(self._decided),
            "due": [asdict(decision) for decision in self._due],
        }
        return self.state.tensors(), facts

    def check_snapshot(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Checked:
        """The facts as `restore` sets them. Raises as that does."""
        check_keys("facts", facts, FACTS)
        check_same("config", facts["config"], self.config.to_dict())
        chosen = self.config.route
        routes = ("sparse",) if self.config.kind in TOP_K else ("dense", "sparse")
        found = check_facts(facts, routes if chosen == "auto" else (chosen,))
        check_tensors(tensors, self.state.tensors())
        return found

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Become what the trainer of `snapshot` was, steps in flight forgotten.

        Raises ValueError or TypeError, saying the difference, for a snapshot of another recipe, of other tensors,
        shapes or dtypes, or of other facts; then nothing is changed.
        """
        found = self.check_snapshot(tensors, facts)
        self._pending.clear()
        self.state.put(tensors, found["turn"], found["copies_seen"])
        self.sae.input_scale, self.sae.pre_encoder_bias = found["input_scale"], found["pre_encoder_bias"]
        if isinstance(self.sae, TrainedTranscoder):
            self.sae.output_scale = found["output_scale"]
        for name in ("step", "route", "capacity", "figures", "skipped_in_a_row"):
            setattr(self, name, found[name])
        self._decided = _Decision(**found["decided"])
        self._due = deque(_Decision(**decision) for decision in found["due"])
