"""Dead latents begun anew, from the tokens that are reconstructed worst, as in *Towards Monosemanticity* (Bricken et
al. 2023, appendix on neuron resampling), which arXiv 2404.16014 follows.

They are drawn from many batches, of which a bounded sample is kept: every token n of those before a resampling gets the
key log(u_n)/‖x_n − x̂_n‖⁴ with a uniform u_n, its error as of its own update, and the tokens of the `RESERVOIR` largest
keys stay. Those of the m largest are a draw of m tokens without replacement, with probabilities in proportion to the
square of the loss (Efraimidis and Spirakis 2006), so that no two latents begin as one. Checkpoints hold the sample.
"""

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
def observe(state: TrainState, x: Tensor, seed: int) -> None:
    """Add the tokens of x [N, d_model], in the dtype of the SAE and divided by the input scale, to those that dead
    latents may begin at. Tokens without an error, or whose error is not finite, are none. The same seed gives the same
    sample."""
    assert state.seen is not None  # the trainer keeps one
    assert state.seen_keys is not None
    sae, n = state.sae, len(x)
    x_hat = sae(x * sae.input_scale) / sae.input_scale
    weights = (x - x_hat).double().square().sum(1).square()
    drawn = torch.rand(n, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float64, device="cpu")
    keys = torch.log1p(-drawn).to(x.device) / weights
    keys = torch.where((weights > 0) & weights.isfinite(), keys, -torch.inf)
    keys, order = torch.cat((state.seen_keys, keys)).sort(descending=True, stable=True)
    order = order[: len(state.seen_keys)]
    state.seen.copy_(torch.cat((state.seen, x))[order])
    state.seen_keys.copy_(keys[: len(order)])


@torch.no_grad()
@without_autocast
def resample(state: TrainState, dead: Tensor) -> Tensor:
    """Put each latent j with ``dead`` [d_sae] (bool) where one of the tokens x_n is that were drawn from all `observe`
    was given since the last time:

        W_dec[j] ← (x_n − b_dec)/‖x_n − b_dec‖;   W_enc[:, j] ← 0.2·c·W_dec[j];   biases, r_mag and their moments ← 0

    c is the mean norm of the encoder columns of the others, 1 where there are none. b_dec counts as 0 without a
    pre-encoder bias. The bf16 copies are made anew by the next step. Of more dead latents than there are tokens those
    of larger number stay as they are.

    Returns how many began anew. Waits for the device.
    """
    assert state.seen is not None
    assert state.seen_keys is not None
    sae, found = state.sae, state.seen[state.seen_keys > -torch.inf]
    state.seen_keys.fill_(-torch.inf)
    rows = found - sae.b_dec if sae.pre_encoder_bias else found
    rows = rows / rows.norm(dim=1, keepdim=True)
    rows = rows[rows.isfinite().all(1)]  # a token that is b_dec has no direction
    latents = torch.nonzero(dead)[: len(rows), 0]
    rows = rows[: len(latents)]
    if not len(latents):
        return torch.zeros((), dtype=torch.int64, device=dead.device)

    alive = sae.W_enc.data.T[~dead]
    norm = alive.norm(dim=1).mean() if len(alive) else alive.new_ones(())
    tensors = state.latents
    tensors.W_dec[latents] = rows
    tensors.W_enc[latents] = ENCODER_NORM * norm * rows
    tensors.b_enc[latents] = 0
    second = (tensors.W_enc_v, tensors.W_dec_v, tensors.b_enc_v, tensors.threshold_v)
    for moment in (*second, tensors.W_enc_m, tensors.W_dec_m, tensors.b_enc_m, tensors.threshold_m):
        if moment is not None:
            moment[latents] = 0
    for name in sae.OTHERS:
        for tensor in (getattr(sae, name).data, state.others_v[name], state.others_m.get(name)):
            if tensor is not None:
                tensor[latents] = 0
    state.tokens_since_fired[latents] = 0
    state.renew_copies()
    return torch.full((), len(latents), dtype=torch.int64, device=dead.device)
