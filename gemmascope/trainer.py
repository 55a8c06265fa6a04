"""Training of many SAEs from one stream of activations, with the recipe of Gemma Scope (arXiv 2408.05147 §3.2)."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .config import TrainConfig
from .errors import TrainingFailedError
from .kernels.reference import Parameters
from .losses import LossAndGradients, loss_and_gradients
from .sae import JumpReLUSAE
from .sites import Site

DEAD_AFTER_TOKENS = 20_000


class SAETrainer:
    """One SAE, its optimiser state and its counters.

    sample: [n, d_model] activations that set the input scale C (mean squared norm 1 after division), the variance that
    FVU is measured against and, with ``b_dec_init="mean"``, b_dec. Raises ValueError when they are not finite, are all
    zero or do not vary.
    """

    def __init__(
        self,
        config: TrainConfig,
        sample: Tensor,
        *,
        impl: str = "auto",
        metadata: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
    ):
        sample = sample.float()
        mean = sample.mean(0)
        mean_square = sample.square().sum(1).mean()
        variance = mean_square - mean.square().sum()
        if not (torch.isfinite(mean_square) and variance > 1e-9 * mean_square):
            raise ValueError(f"sample: expected finite activations that vary, got mean squared norm {mean_square:.3g}")
        scale = math.sqrt(mean_square)
        self.config = config
        self.variance = float(variance) / scale**2
        self.sae = JumpReLUSAE(
            sample.shape[1],
            config.d_sae,
            input_scale=scale,
            threshold_init=config.threshold_init,
            impl=impl,
            metadata=metadata,
            generator=torch.Generator().manual_seed(config.seed),
            device=device,
        )
        if config.b_dec_init == "mean":
            with torch.no_grad():
                self.sae.b_dec.copy_(mean / scale)
        self.second_moments = Parameters(*(torch.zeros_like(p) for p in self._parameters()))
        self.tokens_since_fired = torch.zeros(config.d_sae, dtype=torch.int64, device=self.sae.b_enc.device)
        self.step = 0

    def _parameters(self) -> Parameters:
        sae = self.sae
        return Parameters(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.threshold)

    @torch.no_grad()
    def update(self, x_raw: Tensor) -> LossAndGradients:
        """One step on activations [N, d_model] as harvested; returns what the loss was before it."""
        sae, config = self.sae, self.config
        x = x_raw.to(device=sae.W_enc.device, dtype=sae.W_enc.dtype) / sae.input_scale
        out = loss_and_gradients(sae, x, config.l0_coefficient_at(self.step), config.bandwidth)
        self._adam(out.gradients, config.learning_rate_at(self.step))
        self.tokens_since_fired.add_(len(x)).masked_fill_(out.firing_count > 0, 0)
        self.step += 1
        return out

    def _adam(self, gradients: Parameters, learning_rate: float) -> None:
        """Adam with β1 = 0. The decoder moves orthogonally to its rows and is renormalised; θ stays ≥ 0."""
        config, sae = self.config, self.sae
        along = (gradients.W_dec * sae.W_dec).sum(1, keepdim=True)
        gradients.W_dec.sub_(along * sae.W_dec)
        logarithmic = config.threshold_parametrisation == "log"
        if logarithmic:
            gradients.threshold.mul_(sae.threshold)  # dL/dt = θ·dL/dθ for θ = exp(t)
        correction = 1 - config.adam_beta2 ** (self.step + 1)
        for parameter, gradient, v in zip(self._parameters(), gradients, self.second_moments, strict=True):
            v.mul_(config.adam_beta2).addcmul_(gradient, gradient, value=1 - config.adam_beta2)
            scale = (v / correction).sqrt_().add_(config.adam_eps)
            if parameter is sae.threshold and logarithmic:
                parameter.mul_(torch.exp(-learning_rate * gradient / scale))
            else:
                parameter.addcdiv_(gradient, scale, value=-learning_rate)
        sae.threshold.clamp_(min=0)
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))

    def report(self, out: LossAndGradients) -> dict[str, float]:
        """The figures of the step that `update` returned ``out`` for."""
        return {
            "loss": out.loss.item(),
            "l0": out.l0.item(),
            "fvu": out.squared_error.item() / self.variance,
            "dead": (self.tokens_since_fired >= DEAD_AFTER_TOKENS).double().mean().item(),
            "lr": self.config.learning_rate_at(self.step - 1),
            "l0_coefficient": self.config.l0_coefficient_at(self.step - 1),
        }


def train(
    trainers: Mapping[Site, SAETrainer],
    stream: Iterable[Mapping[Site, Tensor]],
    *,
    log_every: int = 10,
    log: Callable[[int, dict[str, dict[str, float]] | None], None] = lambda step, rows: None,
) -> None:
    """Give every batch {site: [N, width]} of ``stream`` to the trainer of its site.

    ``log(step, rows)`` is called after each step, every ``log_every``-th with {str(site): figures}. Raises
    TrainingFailedError naming the site when its loss is not finite.
    """
    for batch in stream:
        outs = {site: trainer.update(batch[site]) for site, trainer in trainers.items()}
        step = next(iter(trainers.values())).step
        if step % log_every:
            log(step, None)
            continue
        rows = {str(site): trainers[site].report(out) for site, out in outs.items()}
        for name, row in rows.items():
            if not math.isfinite(row["loss"]):
                raise TrainingFailedError(f"{name}: the loss is {row['loss']} at step {step}; lower the learning rate")
        log(step, rows)
