"""What the operators of one exact training step exchange.

A JumpReLU step needs the pre-activations z of every latent, but beyond them only the *entries*: the pairs (token n,
latent j) that are active, z > θ, or in the window of the threshold's straight-through gradient, |z − θ| < ε/2. With
g_n = (2/N)·r_n and r_n = x̂_n − x_n, every gradient is a sum over entries (arXiv 2407.14435, equations 11 and 12):

    u_e   = (2/N)·⟨r_n, W_dec[j]⟩ (+ the slope of a tanh penalty)
    q_e   = 1[window]·( −(θ_j/ε)·u_e − (s_n + t_j)/ε )        the entry's share of dθ_j
    dz_e  = 1[active]·u_e  (− q_e with the straight-through estimator on z too)
    dW_dec[j] = Σ_e f_e·g_n;   dW_enc[j] = Σ_e dz_e·(x_n − b_dec);   db_enc_j = Σ_e dz_e

where s_n = ∂L/∂l0_n and t_j is the same for a penalty on the latent's frequency. A latent without entries has zero
gradients: under Adam with β1 = 0 it does not move and its second moments decay, by a factor that can be owed.

The sparse route runs, in this order: `encode_entries`, `residual_pass` (token by token), `by_latent`, `latent_pass` and
`update_from_entries` (latent by latent). The dense route, for a code that is not sparse yet: `dense_encode`, products
of whole matrices, `dense_backward`, `update_from_dense`. Symbols as in `reference/`; capacity is the room for
entries, a number on the host, while how many there are is only known on the device.
"""

import math
from typing import NamedTuple

from torch import Tensor

# Added to the latent of an entry that is active, that is, above the threshold and not merely in the window.
ACTIVE = 1 << 30
LATENT = ACTIVE - 1
# What keeps updates back until the host mends it, as bits: entries did not fit, or a copy was not that of its weight.
ROOM, COPIES = 1, 2
# What encoding may hold for a chunk of tokens: fp32 z, of which only the kept entries are written, and a bit for each.
SCRATCH_BYTES = 1 << 30
# Tokens that go through W_enc together in a launch: a chunk reads all of it once for each so many, and below some 300
# an H100 would wait for it. So a chunk of a wide SAE may hold more, up to them: with a million latents 2³⁰ z and their
# bits.
CHUNK_TOKENS = 1024
WIDE_SCRATCH_BYTES = 33 << 27
# Smaller chunks are multiples of it where they can be, which are whole tiles of every launch.
CHUNK_TILE = 128


def scratch_bytes(d_sae: int) -> int:
    """Of one token."""
    return 4 * d_sae + 4 * math.ceil(d_sae / 32)


def tokens_per_chunk(n_tokens: int, d_sae: int) -> int:
    """Tokens that are encoded at a time: as many as the scratch allows, in whole `CHUNK_TOKENS`
    or tiles, and as equal as these can be.

    A function of the sizes alone, never of the memory that happens to be free.
    """
    each = scratch_bytes(d_sae)
    most = max(1, SCRATCH_BYTES // each, min(CHUNK_TOKENS, WIDE_SCRATCH_BYTES // each))
    if n_tokens <= most:
        return n_tokens
    tile = CHUNK_TOKENS if most >= CHUNK_TOKENS else min(CHUNK_TILE, most)
    tiles, tiles_per_chunk = math.ceil(n_tokens / tile), most // tile
    return tile * math.ceil(tiles / math.ceil(tiles / tiles_per_chunk))


class Entries(NamedTuple):
    """The entries of N tokens, token after token, latents ascending within a token.

    Token n owns ``offsets[n]:offsets[n + 1]``. When ``offsets[N] > capacity`` the entries beyond the capacity are
    missing and nothing computed from the rest may be used; ``offsets`` itself is always right.
    """

    z: Tensor  # [capacity] fp32
    latents: Tensor  # [capacity] int32: the latent, plus ACTIVE where z > θ; d_sae beyond the last entry
    tokens: Tensor  # [capacity] int32, undefined beyond the last entry
    offsets: Tensor  # [N + 1] int64


class Residual(NamedTuple):
    residual: Tensor  # [N, d] x̂ − x, in the dtype of W_dec
    squared_error: Tensor  # [N] fp32 ‖x̂ − x‖² before that rounding
    l0: Tensor  # [N] fp32, active entries
    u: Tensor  # [capacity] fp32 ⟨r_n, W_dec[j]⟩ of each entry, r as rounded; without the factor 2/N


class ByLatent(NamedTuple):
    """The entries latent after latent, tokens ascending: entry order[i] for i in offsets[j]:offsets[j + 1]."""

    order: Tensor  # [capacity] int64
    offsets: Tensor  # [F + 1] int64


class LatentSums(NamedTuple):
    """The first three are coefficients by entry in the order of `ByLatent`, undefined beyond the last entry."""

    dec: Tensor  # [capacity] fp32 (2/N)·f_e: dW_dec[j] = Σ dec·r_n
    dz: Tensor  # [capacity] fp32: dW_enc[j] = Σ dz·(x_n − b_dec)
    tokens: Tensor  # [capacity] int32
    db_enc: Tensor  # [F] fp32
    dthreshold: Tensor  # [F] fp32
    along: Tensor  # [F] fp32 ⟨dW_dec[j], W_dec[j]⟩ = Σ dec·u
    firing_count: Tensor  # [F] int32, active entries


class DenseCode(NamedTuple):
    f: Tensor  # [N, F] in the dtype of x
    active: Tensor  # z > θ: 0 and 1 [N, F] of any dtype, or int32 words [N, ⌈F/32⌉] of one bit a latent, lowest first
    window: Tensor  # |z − θ| < ε/2, likewise
    l0: Tensor  # [N] fp32
    firing_count: Tensor  # [F] int32, active
    touched: Tensor  # [F] int32, active or in the window
    n_entries: Tensor  # [] int64, their sum


class Objective(NamedTuple):
    """What the entries need to know of the loss."""

    bandwidth: float
    # The slopes: a float, or a 0-d tensor on the device, which a captured launch reads anew. 0.0, not a tensor of it,
    # means that there is no such penalty.
    frequency_slope: float | Tensor = 0.0  # t_j = frequency_slope · firing_count_j
    tanh_slope: float | Tensor = 0.0  # adds tanh_slope·(1 − tanh²(tanh_scale·f)) to u: λ·c/N of a penalty λ·tanh(c·f)
    tanh_scale: float = 0.0  # with 0 the slope is added as it is: λ/N of a penalty λ·f
    ste_to_z: bool = False


class Rule(NamedTuple):
    """Adam; with β1 = 0, as in arXiv 2408.05147, without first moments."""

    learning_rate: float | Tensor  # or a 0-d tensor on the device, which a captured launch reads anew
    beta2: float
    eps: float
    log_threshold: bool  # Adam moves log θ instead of θ
    beta1: float = 0.0


class LatentState(NamedTuple):
    """Everything a training step holds by latent, updated in place. Moments are as of step last[j]."""

    W_enc: Tensor  # [F, d_in] fp32: the transposed weight, contiguous
    W_dec: Tensor  # [F, d_out] fp32; the two widths are one but in transcoders
    b_enc: Tensor  # [F] fp32
    threshold: Tensor  # [F] fp32
    W_enc_v: Tensor  # second moments, shapes as above
    W_dec_v: Tensor
    b_enc_v: Tensor
    threshold_v: Tensor
    last: Tensor  # [F] int64, updates made when the latent was last touched
    W_enc_low: Tensor | None = None  # bf16 copies that the products read; None: they read the weights
    W_dec_low: Tensor | None = None
    W_enc_m: Tensor | None = None  # first moments, shapes as above; None where β1 is 0
    W_dec_m: Tensor | None = None
    b_enc_m: Tensor | None = None
    threshold_m: Tensor | None = None


# ---- around the operators: what a step does before and after them, see `reference/conclusion.py`


class Penalty(NamedTuple):
    """The sparsity penalty, a multiple of λ: of l0, of the latents' frequencies, of tanh(c·f) or f itself."""

    coefficient: float | Tensor  # λ, or a 0-d tensor of it on the device
    of_l0: str  # "linear": λ·mean l0_n; "quadratic": λ·factor·mean (l0_n − target)²; "none"
    factor: float = 1.0
    target: float = 0.0
    of_batch: bool = False  # the mean of the batch takes the place of each l0_n
    frequency_scale: float | None = None  # s of λ·Σ_j p_j²/s, p_j the share of tokens that latent j fires on
    tanh_scale: float | None = None  # c of λ·mean_n Σ_j tanh(c·f_nj); with c = 0 of λ·mean_n Σ_j f_nj


class Centred(NamedTuple):
    """How many parts there are is up to the implementation; so it is in what follows."""

    x: Tensor  # [N, d] x − b_dec, or x without a pre-encoder bias, as the products read it
    column_sums: Tensor  # [parts, d] of x itself, by parts of the tokens
    norms: Tensor  # [parts] of the rounded x − b_dec; ‖x − b_dec‖ is theirs


class TokenSums(NamedTuple):
    s: Tensor  # [N] ∂L/∂l0_n
    spread: Tensor  # [N] ‖x_n − mean x‖²
    shares: Tensor  # [N] ‖r_n‖²/spread_n, 0 where r_n is
    f_norms: Tensor  # [parts], ‖f‖ is theirs
    tanh_sums: Tensor | None  # [parts] of tanh(c·f), or of f; None without that penalty
    residual_sums: Tensor  # [parts, d] of r


class Conclusion(NamedTuple):
    ok: Tensor  # int32 scalar: 1 when the update may be made
    number: Tensor  # int64 scalar: which update it is, counted from 1
    figures: Tensor  # [9] fp64, those of `training.step.StepFigures` in its order
