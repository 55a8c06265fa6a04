"""The training of one SAE, with the recipe of Gemma Scope (arXiv 2408.05147 §3.2)."""

import math
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..activations.moments import moments
from ..checks import check_device, check_floating, check_int, check_type, dtype_name
from ..errors import EnvironmentProblemError
from ..kernels import Rule, implementations
from ..kernels import density as densities
from ..saes import JumpReLUSAE
from .config import TrainConfig
from .memory import TrainingMemory, available_memory, training_memory
from .state import COPIES, MASTER_DTYPES, TrainState
from .step import StepFigures, dense_step, reference_step, sparse_step

# Steps that a GPU is given before the host looks at the figures of the first of them.
RUN_AHEAD = 4
# Room for entries is made in these units, half as much again as were seen.
CAPACITY_UNIT = 4096
CAPACITY_MARGIN = 1.5
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


@dataclass
class _Job:
    """A step the device has been given, with what it takes to give it again."""

    x: Tensor
    step: int
    route: str
    figures: Tensor
    copied: "torch.cuda.Event | None"


def _check_activations(name: str, x: Tensor, width: int | None = None) -> None:
    """Raise ValueError or TypeError unless x is [N, width] floats; any precision and any device will do."""
    check_floating(name, x)
    if x.ndim != 2 or (width is not None and x.shape[1] != width):
        raise ValueError(f"{name}: expected shape [N ≥ 1, {width or 'd_model'}], got {list(x.shape)}")
    if x.is_meta:
        raise ValueError(f"{name}: expected activations, got a tensor on meta, which holds none")


class SAETrainer:
    """One SAE, its optimiser state and its counters.

    sample: [n ≥ 1, d_model] floats, the activations that set the input scale C (mean squared norm 1 after division),
    and, with ``b_dec_init="mean"``, b_dec. Raises ValueError when they are
    not finite, are all zero or do not vary, ValueError or TypeError on other bad arguments, and EnvironmentProblemError
    when there is no such device or too little free memory on it.

    dtype: fp64 is for comparisons, on a CPU.

    A step whose loss is not finite, or whose gradients are so large that second moments or weights might not be after
    it (`losses.gradient_bound`), changes nothing but the count of skipped steps.

    The SAE may be loaded, changed in place and copied at any time, and cast or moved there and back: the next step
    trains what it then is, or raises ValueError when it is of another shape, dtype or device than at the start. Second
    moments and counters stay. The trainer itself can be deep-copied and pickled. All of this after `flush`, on a GPU.
    """

    def __init__(
        self,
        config: TrainConfig,
        sample: Tensor,
        *,
        impl: str = "auto",
        metadata: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        check_type("config", config, TrainConfig)
        _check_activations("sample", sample)
        if 0 in sample.shape:
            raise ValueError(f"sample: expected shape [N ≥ 1, d_model ≥ 1], got {list(sample.shape)}")
        if dtype not in MASTER_DTYPES:
            found = dtype_name(dtype) if isinstance(dtype, torch.dtype) else type(dtype).__name__
            raise TypeError(f"dtype: expected float32 or float64, got {found}")
        device = check_device("device", "cpu" if device is None else device)
        mean, variance = moments("sample", sample)
        mean_square = variance + mean.square().sum().item()
        if variance <= LEAST_VARIANCE * mean_square:
            raise ValueError(
                f"sample: expected activations that vary, got a variance of {variance:.3g} "
                f"and a mean squared norm of {mean_square:.3g}"
            )
        scale = math.sqrt(mean_square)
        self.config = config
        memory, self._available = self.memory(config, sample.shape[1], device), available_memory(device)
        if self._available and memory.total > self._available:
            raise EnvironmentProblemError(memory.advice(self._available))
        sae = JumpReLUSAE(
            sample.shape[1],
            config.d_sae,
            input_scale=scale,
            threshold_init=config.threshold_init,
            impl=impl,
            metadata=metadata,
            generator=torch.Generator("cpu").manual_seed(config.seed),
            device=device,
            dtype=dtype,
        )
        if config.b_dec_init == "mean":
            with torch.no_grad():
                sae.b_dec.copy_(mean / scale)
        self.state = TrainState.start(sae, config.compute_dtype)
        self.step = 0
        self.route = "dense" if config.route == "auto" else config.route
        self.capacity: int | None = None
        self._n_entries = 0.0  # of the last update that was made
        self.figures: dict[str, float] = {}
        self.skipped_in_a_row = 0
        self.run_ahead = steps_ahead(sae.W_dec.device)
        self._pending: deque[_Job] = deque()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which hold every step given so far and none in flight."""
        self.flush()
        return self.__dict__ | {"_pending": deque()}

    @property
    def sae(self) -> JumpReLUSAE:
        """The SAE in training; `flush` first to have every step so far in it."""
        return self.state.sae

    @staticmethod
    def memory(config: TrainConfig, d_model: int, device: torch.device | str = "cpu") -> TrainingMemory:
        """What training an SAE on activations of that width takes on its device."""
        check_type("config", config, TrainConfig)
        check_int("d_model", d_model, 1)
        sizes = (d_model, config.d_sae, config.batch_size, config.compute_dtype)
        return training_memory(*sizes, pending=steps_ahead(torch.device(device)))

    def update(self, x_raw: Tensor) -> None:
        """One step on activations [N ≥ 1, d_model] as harvested, floats of any precision on any device.

        On a GPU it returns before the step is made. Raises ValueError or TypeError for another batch, ValueError for an
        SAE that is not what it was (`TrainState.ready`), and EnvironmentProblemError when memory runs out.
        """
        _check_activations("x", x_raw, len(self.state.b_dec_v))
        if x_raw.shape[0] == 0:
            raise ValueError("x: expected at least one token, got an empty batch")
        x = x_raw.to(self.state.b_dec_v) / self.sae.input_scale
        self._launch(x, self.step, self.route)
        self.step += 1
        while len(self._pending) > self.run_ahead:
            self._retire()

    def flush(self) -> None:
        """Wait for every step that was given to the device."""
        while self._pending:
            self._retire()

    def _launch(self, x: Tensor, step: int, route: str) -> None:
        config, state, sae = self.config, self.state, self.sae
        loss = config.loss_at(step)
        rule = Rule(
            config.learning_rate_at(step),
            config.adam_beta2,
            config.adam_eps,
            config.threshold_parametrisation == "log",
        )
        try:
            if route == "sparse":
                figures = sparse_step(state, x, loss, rule, self._room(len(x)))
            elif route == "dense":
                figures = dense_step(state, x, loss, rule)
            else:
                dead = state.tokens_since_fired >= config.dead_after_tokens if config.loss.pre_act_coefficient else None
                figures = reference_step(state, x, loss, rule, dead)
        except torch.OutOfMemoryError as error:
            memory = self.memory(replace(config, batch_size=len(x)), sae.d_model, x.device)
            raise EnvironmentProblemError(memory.advice(self._available)) from error
        self._pending.append(_Job(x, step, route, *_to_host(figures.pack())))

    def _room(self, n_tokens: int) -> int | None:
        """Entries the sparse route makes room for, where it must be told."""
        if self.state.impl not in implementations.NEED_CAPACITY:
            return None
        if self.capacity is None:
            self._make_room(self._n_entries or 64 * n_tokens)
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
        self.figures = figures
        self.skipped_in_a_row = 0 if figures["made"] else self.skipped_in_a_row + 1
        if self.skipped_in_a_row:
            return
        self._n_entries = figures["n_entries"]
        if self.config.route == "auto":
            self._choose_route(self._n_entries / (len(job.x) * self.sae.d_sae))

    def _repeat(self, jobs: deque[_Job]) -> None:
        self._pending.clear()
        self.state.resume()
        try:
            while jobs:
                self._launch(jobs[0].x, jobs[0].step, jobs[0].route)
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
        `evaluation.evaluate_sae` gives of those rows, up to rounding. Raises ValueError when there was none."""
        self.flush()
        if not self.figures:
            raise ValueError("report: expected at least one update before it, got none")
        return {
            "loss": self.figures["loss"],
            "l0": self.figures["l0"],
            "fvu": self.figures["fvu"],
            "median_fvu": self.figures["median_fvu"],
            "dead": (self.state.tokens_since_fired >= self.config.dead_after_tokens).double().mean().item(),
            "skipped": int(self.figures["skipped"]),
            "lr": self.config.learning_rate_at(self.step - 1),
            "l0_coefficient": self.config.l0_coefficient_at(self.step - 1),
        }
