"""Dead latents brought back: begun anew from the tokens that are reconstructed worst, as in *Towards Monosemanticity*
(Bricken et al. 2023, appendix on neuron resampling), which arXiv 2404.16014 follows, or with a θ that falls until they
fire."""

import math

import torch
from torch import Tensor

from ..autocast import without_autocast
from .state import TrainState

# Of the mean norm of the encoder columns of living latents.
ENCODER_NORM = 0.2


def seed_of(seed: int, step: int) -> int:
    """Another one for each step of a training with that seed, within the 63 bits a generator takes."""
    return (seed + step * 0x9E3779B97F4A7C15) % 2**63


@torch.no_grad()
@without_autocast
def resample(state: TrainState, x: Tensor, dead: Tensor, seed: int) -> Tensor:
    """Put each latent j with ``dead`` [d_sae] (bool) where a token n of x [N, d_model] is, drawn with a probability in
    proportion to ‖x_n − x̂_n‖⁴:

        W_dec[j] ← (x_n − b_dec)/‖x_n − b_dec‖;   W_enc[:, j] ← 0.2·c·W_dec[j];   biases, r_mag and second moments ← 0

    c is the mean norm of the encoder columns of the others, 1 where there are none. x: in the dtype of the SAE, divided
    by the input scale. b_dec counts as 0 without a pre-encoder bias. The bf16 copies are made anew by the next step.
    Nothing changes where the errors say nothing: one is not finite, or all are 0. The same seed draws the same tokens.

    Returns how many began anew. Waits for the device.
    """
    sae, latents = state.sae, torch.nonzero(dead)[:, 0]
    x_hat = sae(x * sae.input_scale) / sae.input_scale
    weights = (x - x_hat).double().square().sum(1).square()
    sums = weights.cumsum(0)
    if not len(latents) or not (sums[-1] > 0 and sums[-1].isfinite()):
        return torch.zeros((), dtype=torch.int64, device=x.device)
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.rand(len(latents), generator=generator, dtype=torch.float64, device="cpu").to(x.device)
    tokens = torch.searchsorted(sums, drawn * sums[-1], right=True).clamp(max=len(x) - 1)
    rows = x[tokens] - sae.b_dec if sae.pre_encoder_bias else x[tokens]
    rows = rows / rows.norm(dim=1, keepdim=True)
    usable = rows.isfinite().all(1)  # a token that is b_dec has no direction
    latents, rows = latents[usable], rows[usable]

    alive = sae.W_enc.data.T[~dead]
    norm = alive.norm(dim=1).mean() if len(alive) else alive.new_ones(())
    tensors = state.latents
    tensors.W_dec[latents] = rows
    tensors.W_enc[latents] = ENCODER_NORM * norm * rows
    tensors.b_enc[latents] = 0
    for moment in (tensors.W_enc_v, tensors.W_dec_v, tensors.b_enc_v, tensors.threshold_v):
        moment[latents] = 0
    for name in sae.OTHERS:
        getattr(sae, name).data[latents] = 0
        state.others_v[name][latents] = 0
    state.tokens_since_fired[latents] = 0
    state.renew_copies()
    return usable.sum()


@torch.no_grad()
@without_autocast
def revive(state: TrainState, dead_after_tokens: int, fall: float, log_threshold: bool, made: Tensor) -> None:
    """Let θ of each latent that has not fired for so many tokens fall by ``fall``, down to 0, or log θ by it. Nothing
    changes where the update was not ``made`` [] (0 or 1). Does not wait for the device.

    With the learning rate as ``fall`` it is the step that Adam without a first moment comes to by the pre-activation
    loss λ_P·mean_n Σ_j (θ_j − z_nj)₊ of dead latents (`training.config.Loss`), which alone has a gradient for their θ:
    that is λ_P at every update, and g/√v is 1 whatever λ_P is.
    """
    theta = state.threshold
    lower = theta * math.exp(-fall) if log_threshold else (theta - fall).clamp(min=0)
    falls = (state.tokens_since_fired >= dead_after_tokens) & (made > 0)
    theta.copy_(torch.where(falls, lower, theta))
