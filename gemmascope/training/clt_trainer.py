"""The training of a cross-layer transcoder: the recipe of an SAE for all layers together."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..activations.statistics import SiteStatistics
from ..checks import check_choice, check_device, check_int, check_number, check_type, dtype_name
from ..errors import EnvironmentProblemError
from ..kernels import Rule
from ..kernels import density as densities
from ..saes.clt import CrossLayerTranscoder
from ..saes.clt_source import check_layers
from ..saes.scaled_clt import ScaledCLT
from .clt_step import CLTFigures, clt_step
from .config import TrainConfig
from .memory import available_memory
from .revive import revive
from .snapshot import check_keys, check_same, check_tensors, packed, unpacked
from .state import MASTER_DTYPES, TrainState
from .trainer import moments_of, scale_of
from .upload import uploaded

FACTS = ("config", "input_scales", "output_scales", "step", "route", "figures")
COMPUTE_DTYPES = ("fp32", "tf32")
OF_CLTS = ("jumprelu", "relu")
Samples = Sequence[Tensor | SiteStatistics]


class CLTTrainer:
    """A cross-layer transcoder in training, its optimiser state and its counters.

    samples, targets: for each layer, ascending, a sample [n ≥ 1, d] of what its latents read and of what is to be made
    of it, or the `SiteStatistics` of such. They set the scales, C_l and D_l, and with ``b_dec_init="mean"`` the biases,
    as of a transcoder (`SAETrainer`).

    config: ``d_sae`` latents for each layer; the penalty, its λ and a target L0 (at most ``d_sae``) are of all layers
    together. kind: `jumprelu` or `relu`. All that `TrainConfig` says of SAEs holds but for what is refused: bf16, a
    skip connection, a pre-activation loss, annealing, latents that begin anew. metadata: JSON-able facts; ``model``,
    ``sites`` and ``sites_out`` go into files.

    dtype: fp64 is for comparisons, on a CPU. Raises ValueError or TypeError on bad arguments and samples that set no
    scale, and EnvironmentProblemError when there is no such device or too little memory.

    A step whose loss is not finite, or whose gradients are so large that second moments or weights might not be after
    it, changes nothing in any layer but the count of skipped steps.
    """

    def __init__(
        self,
        config: TrainConfig,
        samples: Samples,
        *,
        targets: Samples,
        impl: str = "auto",
        metadata: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        _check_config(config)
        if dtype not in MASTER_DTYPES:
            found = dtype_name(dtype) if isinstance(dtype, torch.dtype) else type(dtype).__name__
            raise TypeError(f"dtype: expected float32 or float64, got {found}")
        device = check_device("device", "cpu" if device is None else device)
        of_inputs, of_targets = _moments("samples", samples), _moments("targets", targets)
        if len(of_inputs) != len(of_targets):
            raise ValueError(f"targets: expected those of {len(of_inputs)} layers as of samples, got {len(of_targets)}")
        self.config = config
        d_ins, d_outs = ([len(mean) for mean, _ in each] for each in (of_inputs, of_targets))
        needed, available = self.memory(config, d_ins, d_outs), available_memory(device)
        if available and needed > available:
            raise EnvironmentProblemError(
                f"out of memory: a CLT of {len(d_ins)} layers with d_sae {config.d_sae} takes about"
                f" {needed / 2**30:.1f} GiB of the {available / 2**30:.1f} GiB there are; make d_sae smaller"
            )
        self.clt = ScaledCLT(
            d_ins,
            d_outs,
            config.d_sae,
            input_scales=[scale_of(config, *each) for each in of_inputs],
            output_scales=[scale_of(config, *each) for each in of_targets],
            metadata=metadata,
            threshold_init=config.threshold_init if config.kind == "jumprelu" else 0.0,
            impl=impl,
            generator=torch.Generator("cpu").manual_seed(config.seed),
            device=device,
            dtype=dtype,
        )
        if config.b_dec_init == "mean":
            with torch.no_grad():
                means = zip(self.clt.sources, self.clt.output_scales, of_inputs, of_targets, strict=True)
                for source, output_scale, (mean, _), (mean_out, _) in means:
                    source.b_dec.copy_(mean_out / output_scale)
                    source.b_enc.copy_(-((mean / source.input_scale).to(source.W_enc) @ source.W_enc))
        first, compute_dtype = config.adam_beta1 > 0, config.compute_dtype
        self.states = [TrainState.start(source, compute_dtype, first_moments=first) for source in self.clt.sources]
        self.step = 0
        self.route = "dense" if config.route == "auto" else config.route
        self.figures: CLTFigures | None = None

    @staticmethod
    def memory(config: TrainConfig, d_ins: Sequence[int], d_outs: Sequence[int]) -> int:
        """Bytes that the weights, moments and the activations of a step take in fp32, without its scratch."""
        check_type("config", config, TrainConfig)
        if len(d_ins) != len(d_outs):
            raise ValueError(f"d_outs: expected those of {len(d_ins)} layers, got {len(d_outs)}")
        rows = sum(d_in + sum(d_outs[layer:]) + 2 for layer, d_in in enumerate(d_ins))
        weights = 4 * (rows * config.d_sae + sum(d_outs))
        return (3 if config.adam_beta1 else 2) * weights + 4 * config.batch_size * (sum(d_ins) + 4 * sum(d_outs))

    @property
    def n_layers(self) -> int:
        return len(self.states)

    def released(self) -> CrossLayerTranscoder:
        """What the training leaves, its scales in the weights: a copy. See `ScaledCLT.released`."""
        return self.clt.released()

    def update(self, xs: Sequence[Tensor], ys: Sequence[Tensor]) -> None:
        """One step on activations as harvested: xs [N ≥ 1, d_in] and ys [N, d_out] for each layer, floats of any
        precision on any device, row i of all of them the same token.

        Raises ValueError or TypeError for another batch, ValueError for a CLT that is not what it was
        (`TrainState.ready`), and EnvironmentProblemError when memory runs out.
        """
        check_layers("xs", xs, [source.d_in for source in self.clt.sources])
        check_layers("ys", ys, self.clt.d_outs)
        for name, rows in (("xs", xs), ("ys", ys)):
            if rows[0].ndim != 2 or not len(rows[0]):
                raise ValueError(f"{name}[0]: expected shape [N ≥ 1, {rows[0].shape[-1]}], got {list(rows[0].shape)}")
        if len(xs[0]) != len(ys[0]):
            raise ValueError(f"ys: expected the {len(xs[0])} tokens of xs, got {len(ys[0])}")
        config = self.config
        log = config.threshold_parametrisation == "log" or config.kind != "jumprelu"
        rate = config.learning_rate_at(self.step)
        rule = Rule(rate, config.adam_beta2, config.adam_eps, log, config.adam_beta1)
        batches = self._scaled(xs, self.clt.input_scales), self._scaled(ys, self.clt.output_scales)
        try:
            self.figures = clt_step(self.clt, self.states, *batches, config.loss_at(self.step), rule, self.route)
        except torch.OutOfMemoryError as error:
            raise EnvironmentProblemError(
                f"out of memory: a batch of {len(xs[0])} tokens of {self.n_layers} layers; make batch_size or d_sae"
                " smaller"
            ) from error
        if config.revival_rate:
            fall, made = config.revival_rate * rate, torch.tensor(self.figures.made)
            for state in self.states:
                revive(state, config.dead_after_tokens, fall, log, made.to(state.threshold.device))
        self.step += 1
        if config.route == "auto" and self.figures.made:
            self._choose_route(self.figures.n_entries / (len(xs[0]) * config.d_sae * self.n_layers))

    def _scaled(self, rows: Sequence[Tensor], scales: Sequence[float]) -> list[Tensor]:
        like = self.states[0].b_dec_v
        return [uploaded(x.detach(), like).to(like) / scale for x, scale in zip(rows, scales, strict=True)]

    def _choose_route(self, density: float) -> None:
        switch = densities.training_switch(self.states[0].b_dec_v.device)
        if density > switch.dense_above:
            self.route = "dense"
        elif density < switch.sparse_below:
            self.route = "sparse"

    def report(self) -> dict[str, Any]:
        """The figures of the last step, measured on its batch before its update: ``l0`` of all layers and ``fvu``, the
        mean of the FVU of the outputs, with both of each layer in ``l0_of_layers`` and ``fvu_of_layers``; the rest as
        of `SAETrainer.report`. Raises ValueError when there was no step."""
        if self.figures is None:
            raise ValueError("report: expected at least one update before it, got none")
        dead = [state.tokens_since_fired >= self.config.dead_after_tokens for state in self.states]
        return {
            "step": self.step,
            "loss": self.figures.loss,
            "l0": sum(self.figures.l0),
            "fvu": sum(self.figures.fvu) / self.n_layers,
            "l0_of_layers": self.figures.l0,
            "fvu_of_layers": self.figures.fvu,
            "dead": torch.cat(dead).double().mean().item(),
            "skipped": self.figures.skipped,
            "lr": self.config.learning_rate_at(self.step - 1),
            "l0_coefficient": self.config.l0_coefficient_at(self.step - 1),
        }

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that `restore` needs to go on with the same bits: the tensors of every layer, named LAYER.NAME, in their
        own memory, to be copied before the next step, and facts of JSON without NaN."""
        figures = None
        if self.figures is not None:
            numbers = {"loss": self.figures.loss, "n_entries": self.figures.n_entries}
            for name in ("l0", "fvu"):
                numbers |= {f"{name}.{layer}": value for layer, value in enumerate(getattr(self.figures, name))}
            figures = packed(numbers) | {"made": self.figures.made, "skipped": self.figures.skipped}
        facts = {
            "config": self.config.to_dict(),
            "input_scales": self.clt.input_scales,
            "output_scales": self.clt.output_scales,
            "step": self.step,
            "route": self.route,
            "figures": figures,
        }
        return self._tensors(), facts

    def _tensors(self) -> dict[str, Tensor]:
        found = (state.tensors().items() for state in self.states)
        return {f"{layer}.{name}": tensor for layer, tensors in enumerate(found) for name, tensor in tensors}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Become what the trainer of `snapshot` was.

        Raises ValueError or TypeError, saying the difference, for a snapshot of another recipe, of other tensors,
        shapes or dtypes, or of other facts; then nothing is changed.
        """
        check_keys("facts", facts, FACTS)
        check_same("config", facts["config"], self.config.to_dict())
        for name in ("input_scales", "output_scales"):
            check_type(f"facts.{name}", facts[name], list)
            if len(facts[name]) != self.n_layers:
                raise ValueError(f"facts.{name}: expected those of {self.n_layers} layers, got {len(facts[name])}")
            for layer, scale in enumerate(facts[name]):
                check_number(f"facts.{name}[{layer}]", scale, 0, open_low=True)
        check_int("facts.step", facts["step"], 0)
        chosen = self.config.route
        check_choice("facts.route", facts["route"], ("dense", "sparse") if chosen == "auto" else (chosen,))
        figures = None if facts["figures"] is None else _figures(facts["figures"], self.n_layers)
        check_tensors(tensors, self._tensors())
        for layer, state in enumerate(self.states):
            own = {name: tensors[f"{layer}.{name}"] for name in state.tensors()}
            state.put(own, turn=0, copies_seen=False)
            state.sae.input_scale = facts["input_scales"][layer]
        self.clt.output_scales = list(facts["output_scales"])
        self.step, self.route, self.figures = facts["step"], facts["route"], figures


def _check_config(config: Any) -> None:
    check_type("config", config, TrainConfig)
    check_choice("kind", config.kind, OF_CLTS)
    check_choice("compute_dtype", config.compute_dtype, COMPUTE_DTYPES)
    if config.skip:
        raise ValueError("skip: expected False of a CLT, got True")
    if config.resample_steps:
        raise ValueError(f"resample_steps: expected none of a CLT, got {list(config.resample_steps)}")
    if config.loss.pre_act_coefficient:
        raise ValueError(f"pre_act_coefficient: expected 0 of a CLT, got {config.loss.pre_act_coefficient}")
    if config.p_end is not None:
        raise ValueError(f"p_end: expected None of a CLT, got {config.p_end}")
    if config.loss.p != 1:
        raise ValueError(f"p: expected 1 of a CLT, got {config.loss.p:g}")


def _moments(name: str, samples: Samples) -> list[tuple[Tensor, float]]:
    if isinstance(samples, Tensor) or not isinstance(samples, Sequence):
        raise TypeError(f"{name}: expected a list of samples, one for each layer, got {type(samples).__name__}")
    if not samples:
        raise ValueError(f"{name}: expected at least one layer, got none")
    return [moments_of(sample, f"{name}[{layer}]") for layer, sample in enumerate(samples)]


def _figures(found: Any, n_layers: int) -> CLTFigures:
    by_layer = [f"{name}.{layer}" for name in ("l0", "fvu") for layer in range(n_layers)]
    check_keys("facts.figures", found, ("loss", "n_entries", "made", "skipped", *by_layer))
    check_type("facts.figures.made", found["made"], bool)
    check_int("facts.figures.skipped", found["skipped"], 0)
    numbers = unpacked("facts.figures", {name: found[name] for name in ("loss", "n_entries", *by_layer)})
    l0, fvu = ([numbers[f"{name}.{layer}"] for layer in range(n_layers)] for name in ("l0", "fvu"))
    return CLTFigures(numbers["loss"], l0, fvu, numbers["n_entries"], found["made"], found["skipped"])
