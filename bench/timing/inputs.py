"""The SAE and the activations that are timed: constructed, so that they are the same everywhere and their L0 is known.

Nothing is downloaded or trained. A random SAE on normal deviates would be a poor stand-in for a trained one: all its
latents fire equally often, on noise. So the activations are made the way SAEs take them to be: each token is a sum of
about L0 rows of W_dec with positive coefficients, on a background of normal deviates with a decaying spectrum, which
holds a fifth of the variance. Which latents take part is as unequal as in trained SAEs: log10 of the frequency is
normal with ``skew`` decades of deviation (0: all alike), so some are rare or dead and a few fire on many tokens. θ
differs by latent, and one factor common to all makes the mean L0 of the batch what was asked for. W_enc is W_decᵀ.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import SKEW
from bench.contenders import Inputs
from gemmascope.kernels import Rule
from gemmascope.saes import JumpReLUSAE
from gemmascope.training.config import Loss

LOSS = Loss(l0_coefficient=6e-4, bandwidth=1e-3)
# So small that no latent moves far enough to change L0 while the same batch is used again and again.
RULE = Rule(learning_rate=1e-7, beta2=0.999, eps=1e-8, log_threshold=True)
BACKGROUND = 0.2
LEAST_FREQUENT, MOST_FREQUENT = 1e-7, 0.3
CHUNK = 16384
BINS = 1 << 14


def activations(n: int, d: int, device: torch.device, seed: int) -> Tensor:
    """[n, d] fp32 normal deviates of a decaying spectrum, mean squared norm 1; one distribution whatever the seed."""
    mixing, fresh = (torch.Generator(device).manual_seed(s) for s in (0, 1 + seed))
    spectrum = torch.arange(1, d + 1, device=device) ** -0.5
    mix = torch.randn(d, d, generator=mixing, device=device) * (spectrum / (d**0.5 * spectrum.norm()))[:, None]
    return torch.randn(n, d, generator=fresh, device=device) @ mix


def firing_frequencies(d_sae: int, l0: float, skew: float, generator: torch.Generator) -> Tensor:
    """[d_sae] fp64, of sum l0 (less where the most frequent are capped), in random order."""
    deviates = torch.randn(d_sae, generator=generator, dtype=torch.float64)
    frequency = 10 ** (skew * deviates)
    return (frequency * (l0 / frequency.sum())).clamp(LEAST_FREQUENT, MOST_FREQUENT)


def sums_of_rows(W_dec: Tensor, n: int, l0: float, frequency: Tensor, generator: torch.Generator) -> Tensor:
    """[n, d] sums of rows of W_dec: about l0 a token, drawn by frequency, with coefficients between 0.5 and 1.5."""
    spread = torch.exp(0.3 * torch.randn(n, generator=generator) - 0.045)
    counts = torch.poisson(l0 * spread, generator=generator).long()
    total = int(counts.sum())
    cumulative = frequency.cumsum(0)
    uniform = torch.rand(total, generator=generator, dtype=torch.float64) * cumulative[-1]
    latents = torch.searchsorted(cumulative, uniform).clamp(max=len(frequency) - 1)
    coefficients = 0.5 + torch.rand(total, generator=generator)
    offsets = F.pad(counts.cumsum(0), (1, 0))[:-1]
    latents, coefficients, offsets = (t.to(W_dec.device) for t in (latents, coefficients, offsets))
    return F.embedding_bag(latents, W_dec, offsets, mode="sum", per_sample_weights=coefficients)


def common_factor(sae: JumpReLUSAE, x: Tensor, scale: Tensor, l0: float) -> float:
    """t at which θ = t·scale lets ``l0`` latents a token of x fire, by a histogram of z/scale between 0 and 1."""
    counts, above = torch.zeros(BINS, dtype=torch.float64), 0.0
    x_centred = x - sae.b_dec
    for start in range(0, sae.d_sae, CHUNK):
        part = slice(start, start + CHUNK)
        for rows in x_centred.split(4096):
            ratio = (rows @ sae.W_enc[:, part] + sae.b_enc[part]) / scale[part]
            counts += torch.histc(ratio, BINS, 0.0, 1.0).double().cpu()
            above += (ratio > 1).sum().item()
    exceeding = above + counts.flip(0).cumsum(0).flip(0)  # [i]: how many are above the lower edge of bin i
    wanted = l0 * len(x)
    bin_ = int((exceeding > wanted).sum()) - 1
    if bin_ < 0:
        return 1.0
    return (bin_ + (exceeding[bin_].item() - wanted) / max(counts[bin_].item(), 1.0)) / BINS


@torch.no_grad()
def construct(
    d: int,
    f: int,
    tokens: int,
    l0: float,
    device: torch.device,
    *,
    dtype: str = "fp32",
    skew: float = SKEW,
    beta1: float = 0.0,
) -> Inputs:
    """The inputs of one case. dtype: other than "fp32", weights and activations are numbers that bf16 holds and b_dec
    is 0, so that every implementation decides alike which latents fire, however it rounds its operands."""
    generator = torch.Generator().manual_seed(0)
    sae = JumpReLUSAE(d, f, generator=generator).to(device)
    if dtype == "fp32":
        sae.b_dec.copy_(0.1 / d**0.5 * torch.randn(d, generator=generator))
    sae.b_enc.copy_(0.1 / d**0.5 * torch.randn(f, generator=generator))
    scale = (0.8 + 0.4 * torch.rand(f, generator=generator)).to(device)
    frequency = firing_frequencies(f, l0, skew, generator)
    signal = sums_of_rows(sae.W_dec, tokens, l0, frequency, generator)
    signal *= ((1 - BACKGROUND) / signal.square().sum(1).mean()) ** 0.5
    x = sae.b_dec + signal + BACKGROUND**0.5 * activations(tokens, d, device, seed=1)
    if dtype != "fp32":
        for tensor in (sae.W_enc, sae.W_dec, x):
            tensor.copy_(tensor.bfloat16())
    sae.threshold.copy_(scale * common_factor(sae, x, scale, l0))
    return Inputs(sae, x, LOSS, RULE._replace(beta1=beta1) if beta1 else RULE, l0, dtype)
