"""How long a forward of the model and a step of an SAE take here: a second or two each, before a run is planned."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import nn

from ..sites import Capture, Site, evaluating
from ..sites.decoder import find_decoder, input_device
from ..training import SAETrainer, TrainConfig
from ..training.config import TOP_K

BUDGET = 1.0
# A larger SAE or batch is timed at a part of its size: what it takes is nearly proportional to both.
MOST_WEIGHTS = 1 << 26
MOST_PRODUCTS = {"cpu": 1 << 35, "cuda": 1 << 45}
# Latents that fire on a token where the config aims at no L0.
TYPICAL_L0 = 64


class Measure(Protocol):
    """What a plan asks; tests answer with constants."""

    def forward(self, model: nn.Module, sites: Sequence[Site], rows: int, context: int) -> float:
        """Seconds of one forward of ``rows`` rows, up to the deepest of ``sites``."""
        ...

    def step(self, config: TrainConfig, width: int, device: torch.device, impl: str, threads: int) -> float:
        """Seconds of one step of an SAE on activations of that width, with so many threads on a CPU."""
        ...


class Stopwatch:
    """Measures by running."""

    def forward(self, model: nn.Module, sites: Sequence[Site], rows: int, context: int) -> float:
        decoder, device = find_decoder(model), input_device(model)
        first, layers = 3 % decoder.config.vocab_size, decoder.config.num_hidden_layers

        def run(n: int) -> None:
            ids = torch.full((n, context), first, dtype=torch.int64, device=device)
            with torch.no_grad(), evaluating(decoder.text_model), Capture(decoder.text_model, sites):
                decoder.text_model(input_ids=ids, use_cache=False)

        decoder.config.num_hidden_layers = 1 + max(site.layer for site in sites)
        try:
            run(1)
            one = _seconds(lambda: run(1), device, 0)
            return one * rows if one * rows > BUDGET else _seconds(lambda: run(rows), device, BUDGET)
        finally:
            decoder.config.num_hidden_layers = layers

    def step(self, config: TrainConfig, width: int, device: torch.device, impl: str, threads: int) -> float:
        if device.type != "cpu" or threads == torch.get_num_threads():
            return _step_seconds(config, width, device, impl)
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
            before = torch.get_num_threads()
            try:
                return pool.submit(_step_seconds, config, width, device, impl).result()
            finally:
                torch.set_num_threads(before)  # for threads that start later


def _step_seconds(config: TrainConfig, width: int, device: torch.device, impl: str) -> float:
    """At the L0 that the config aims at: the first steps of a training, in which half of the latents fire, take longer,
    but there are few of them."""
    l0 = min(config.d_sae / 2, config.k or config.loss.target_l0 or TYPICAL_L0)
    d_sae = min(config.d_sae, max(256, MOST_WEIGHTS // width))
    products = MOST_PRODUCTS.get(device.type, MOST_PRODUCTS["cpu"])
    batch_size = min(config.batch_size, max(64, products // (width * d_sae)))
    l0 = min(l0, d_sae / 2)
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(batch_size, width, generator=generator, dtype=torch.float32, device="cpu").to(device)
    plain = {"steps": 1_000_000, "lr_warmup_steps": 1000, "lr_decay_steps": 0, "l0_warmup_steps": 1000}
    changes = {"batch_size": batch_size, "target_l0": config.loss.target_l0 and l0}
    trainer = SAETrainer(narrowed(config, d_sae).changed(**changes, **plain), x, impl=impl, device=device)
    if config.kind not in TOP_K:  # of which k fire anyway
        _set_l0(trainer, x, l0)

    def step() -> None:
        trainer.update(x)
        trainer.flush()

    step()  # on the dense route, which sees how few latents fire
    step()
    return _seconds(step, device, BUDGET) * (config.d_sae / d_sae) * (config.batch_size / batch_size)


def narrowed(config: TrainConfig, d_sae: int) -> TrainConfig:
    """The same with ``d_sae`` latents, no more than it has; prefixes keep their shares of them."""
    changes: dict[str, Any] = {"d_sae": d_sae}
    if d_sae < config.d_sae:
        target, k = config.loss.target_l0, config.k
        changes["target_l0"] = None if target is None else min(target, d_sae)
        changes["k"] = None if k is None else max(1, min(k, d_sae))
        shares = {max(1, prefix * d_sae // config.d_sae) for prefix in config.prefixes}
        changes["prefixes"] = tuple(sorted(shares))
    return config.changed(**changes)


@torch.no_grad()
def _set_l0(trainer: SAETrainer, x: torch.Tensor, l0: float) -> None:
    sae = trainer.sae
    few = x[:64] / sae.input_scale
    z = (few - sae.b_dec) @ sae.W_enc + sae.b_enc
    kept = max(1, round(l0 * len(few)))
    border = z.flatten().topk(kept).values[-1].clamp(min=1e-6)
    if trainer.config.kind == "jumprelu":
        trainer.state.threshold.fill_(border)
    else:
        sae.b_enc.sub_(border)


def _seconds(run: Callable[[], None], device: torch.device, budget: float) -> float:
    """The mean of as many runs as ``budget`` seconds hold, at least one."""
    _wait(device)
    began, runs = time.perf_counter(), 0
    while runs == 0 or time.perf_counter() - began < budget:
        run()
        _wait(device)
        runs += 1
    return (time.perf_counter() - began) / runs


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
