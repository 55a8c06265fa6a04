"""The dense route's passes over [N, F]: encode with its gates as bits, and the elementwise backward in place.

    z = x·W_enc + b_enc;   f = z·1[z > θ];   active = 1[z > θ];   window = 1[|z − θ| < ε/2]
    u' = (2/N)·u + c·sech²(t·f);   q = window·( −(θ/ε)·u' − (s_n + t_j)/ε )
    dz = active·u' (− q);   db_enc = Σ_n dz;   dθ = Σ_n q

x [N, d] and W_enc [d, F] of one dtype, b_enc, θ [F], s [N] fp32, u = r·W_decᵀ [N, F]. Symbols of the backward as in
`training.Objective`: c and t of the tanh penalty, t_j = frequency_slope·firing_count_j. z is never stored: two bits an
entry say all that the backward needs of it, and f only comes back where there is a tanh penalty.

Memory traffic of a whole step, in bytes per entry of [N, F] at b bytes for f and u (bf16: b = 2):

    encode            f written b, bits 0.25
    counts            bits read 0.25
    x̂ = f·W_dec       f read b (by tiles, as far as caches serve the repeats; so below)
    u = r·W_decᵀ      u written b
    backward          u read b, bits 0.25, dz written b; partial sums 0.13 written and read
    dW_dec = fᵀ·g     f read b
    dW_enc = xᵀ·dz    dz read b

7b + 0.9: 14.9 in bf16, and b more with a tanh penalty.

A NaN or −Inf in z is NaN in f and reaches every gradient through the loss. Bits cannot carry it; they count such an
entry as active. Counts are sums of integers by atomics, exact in any order. The float sums have two stages, each of a
fixed order, as in `_jumprelu`.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..entries import DenseCode, Objective
from .common import launch
from .encode import _popcount
from .encode_gemm import encode_gemm, launch_config, words_per_row
from .jumprelu import _sum_partials


@dataclass(frozen=True)
class DenseConfig:
    block_n: int  # tokens per tile
    words: int  # words of 32 latents per tile
    tiles: int  # tiles of one program, one below the other
    num_warps: int


# A byte counts the tokens of one program for one latent: block_n·tiles ≤ 255.
COUNT = DenseConfig(block_n=16, words=32, tiles=8, num_warps=4)
# A row of a tile is 256 latents, which one warp reads as 16-byte words. Eight rows instead of four took 128-167
# registers instead of 79-96, and with every option spilt on sm_90.
BACKWARD = DenseConfig(block_n=4, words=8, tiles=32, num_warps=4)


@triton.jit
def _add_counts(counts, out_ptr, first_word, F, WORDS: tl.constexpr):
    """counts [WORDS, 8]: byte b of counter k counts latent 8·b + k of a word."""
    octet = tl.arange(0, 4)[None, :, None]
    words = first_word + tl.arange(0, WORDS)[:, None, None]
    latents = words * 32 + octet * 8 + tl.arange(0, 8)[None, None, :]
    count = (counts[:, None, :] >> (8 * octet).to(tl.uint32)) & 0xFF
    tl.atomic_add(out_ptr + latents, count.to(tl.int32), mask=latents < F, sem="relaxed")


@triton.jit(do_not_specialize=["N"])
def _count_bits_kernel(
    active_ptr, window_ptr, l0_ptr, firing_count_ptr, touched_ptr, N, F, n_words,
    BLOCK_N: tl.constexpr, WORDS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    first_word = tl.program_id(0) * WORDS
    columns = first_word + tl.arange(0, WORDS)
    shifts = tl.arange(0, 8).to(tl.uint32)[None, None, :]
    fired = tl.zeros([BLOCK_N, WORDS, 8], tl.uint32)
    touched = tl.zeros([BLOCK_N, WORDS, 8], tl.uint32)
    for tile in range(TILES):
        rows = (tl.program_id(1) * TILES + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (rows < N)[:, None] & (columns < n_words)[None, :]
        offsets = rows.to(tl.int64)[:, None] * n_words + columns[None, :]
        active = tl.load(active_ptr + offsets, mask=mask, other=0).to(tl.uint32)
        window = tl.load(window_ptr + offsets, mask=mask, other=0).to(tl.uint32)
        tl.atomic_add(l0_ptr + rows, tl.sum(_popcount(active), axis=1), mask=rows < N, sem="relaxed")
        fired += (active[:, :, None] >> shifts) & 0x01010101
        touched += ((active | window)[:, :, None] >> shifts) & 0x01010101
    _add_counts(tl.sum(fired, axis=0), firing_count_ptr, first_word, F, WORDS)
    _add_counts(tl.sum(touched, axis=0), touched_ptr, first_word, F, WORDS)


@triton.jit
def _bits(words_ptr, rows, word_columns, mask, n_words, BLOCK_N: tl.constexpr, WORDS: tl.constexpr):
    """The bits of a tile of words as 0.0 and 1.0: [BLOCK_N, 32 * WORDS] fp32."""
    words = tl.load(words_ptr + rows[:, None] * n_words + word_columns[None, :], mask=mask, other=0)
    bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return tl.reshape(bits, (BLOCK_N, 32 * WORDS)).to(tl.float32)


@triton.jit(do_not_specialize=["N"])
def _dense_bwd_kernel(
    u_ptr, f_ptr, active_ptr, window_ptr, threshold_ptr, s_ptr, firing_count_ptr, partial_ptr, N, F, n_words,
    stride_un, stride_uf, scale, bandwidth, frequency_slope, tanh_slope, tanh_scale,
    HAS_TANH: tl.constexpr, STE_TO_Z: tl.constexpr, BLOCK_N: tl.constexpr, WORDS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * (32 * WORDS) + tl.arange(0, 32 * WORDS)
    word_columns = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    in_columns, in_words = columns < F, word_columns < n_words
    slope = (tl.load(threshold_ptr + columns, mask=in_columns, other=0.0) / bandwidth)[None, :]
    count = tl.load(firing_count_ptr + columns, mask=in_columns, other=0).to(tl.float32)
    frequency = (frequency_slope * count)[None, :]
    u_columns = columns.to(tl.int64)[None, :] * stride_uf
    db_enc = tl.zeros([BLOCK_N, 32 * WORDS], tl.float32)
    dthreshold = tl.zeros([BLOCK_N, 32 * WORDS], tl.float32)
    for tile in range(TILES):
        rows = (tl.program_id(1) * TILES + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        in_rows = rows < N
        mask = in_rows[:, None] & in_columns[None, :]
        wide_rows = rows.to(tl.int64)
        in_tile = in_rows[:, None] & in_words[None, :]
        active = _bits(active_ptr, wide_rows, word_columns, in_tile, n_words, BLOCK_N, WORDS)
        inside = _bits(window_ptr, wide_rows, word_columns, in_tile, n_words, BLOCK_N, WORDS)
        u_ptrs = u_ptr + wide_rows[:, None] * stride_un + u_columns
        u = scale * tl.load(u_ptrs, mask=mask, other=0.0).to(tl.float32)
        if HAS_TANH:
            f = tl.load(f_ptr + wide_rows[:, None] * F + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            # sech² = 1 − tanh², without its cancellation.
            decay = tl.exp(-2.0 * tl.abs(tanh_scale * f))
            u += tanh_slope * (4.0 * decay / ((1.0 + decay) * (1.0 + decay)))
        s = tl.load(s_ptr + rows, mask=in_rows, other=0.0)[:, None]
        # Products rather than selections: 0·NaN is NaN, and a gradient that is not finite must stay visible.
        q = inside * (-slope * u - (s + frequency) / bandwidth)
        dz = active * u
        if STE_TO_Z:
            dz -= q
        tl.store(u_ptrs, dz.to(u_ptr.dtype.element_ty), mask=mask)
        db_enc += dz  # masked lanes have no bits and add 0
        dthreshold += q
    # partial [2, programs over N, F]: the sums for db_enc, then those for dθ
    partial = partial_ptr + tl.program_id(1).to(tl.int64) * F + columns
    tl.store(partial, tl.sum(db_enc, axis=0), mask=in_columns)
    tl.store(partial + tl.num_programs(1).to(tl.int64) * F, tl.sum(dthreshold, axis=0), mask=in_columns)


def _grid(config: DenseConfig, N: int, F: int) -> tuple[int, int]:
    return triton.cdiv(F, 32 * config.words), triton.cdiv(N, config.block_n * config.tiles)


def _count_bits(active: Tensor, window: Tensor, l0: Tensor, firing_count: Tensor, touched: Tensor) -> None:
    """Adds to l0 [N], firing_count [F] and touched [F], int32."""
    N, F = l0.shape[0], firing_count.shape[0]
    launch(
        _count_bits_kernel,
        _grid(COUNT, N, F),
        on=active,
        active_ptr=active,
        window_ptr=window,
        l0_ptr=l0,
        firing_count_ptr=firing_count,
        touched_ptr=touched,
        N=N,
        F=F,
        n_words=active.shape[1],
        BLOCK_N=COUNT.block_n,
        WORDS=COUNT.words,
        TILES=COUNT.tiles,
        num_warps=COUNT.num_warps,
    )


def dense_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float, tf32: bool = False
) -> DenseCode:
    """By the contract of `reference_training.dense_encode`, with active and window as words of bits.

    x [N, d] and W_enc [d, F] fp32, fp16 or bf16 of any strides; fast paths as of `encode_entries`. Does not wait for
    the device.
    """
    N, F = x.shape[0], W_enc.shape[1]
    f = x.new_empty(N, F)
    active = x.new_empty(N, words_per_row(F), dtype=torch.int32)
    window = torch.empty_like(active)
    l0 = torch.zeros(N, dtype=torch.int32, device=x.device)
    firing_count = torch.zeros(F, dtype=torch.int32, device=x.device)
    touched = torch.zeros(F, dtype=torch.int32, device=x.device)
    if f.numel() > 0:
        config = launch_config(x, W_enc, tf32)
        encode_gemm(x, W_enc, b_enc.contiguous(), threshold.contiguous(), f, active, config, "dense", bandwidth, window)
        _count_bits(active, window, l0, firing_count, touched)
    return DenseCode(f, active, window, l0.to(torch.float32), firing_count, touched, touched.sum(dtype=torch.int64))


def dense_backward(
    u: Tensor, code: DenseCode, threshold: Tensor, s: Tensor, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """dz [N, F] in the memory and dtype of u (fp32, fp16 or bf16, rounded once), db_enc [F] and dθ [F] fp32.

    By the contract of `reference_training.dense_backward`; ``code`` is that of `dense_encode`, s [N] fp32.
    """
    N, F = u.shape
    db_enc = torch.empty(F, dtype=torch.float32, device=u.device)
    dthreshold = torch.empty_like(db_enc)
    if u.numel() == 0:
        return u, db_enc.zero_(), dthreshold.zero_()
    grid = _grid(BACKWARD, N, F)
    partial = torch.empty(2, grid[1], F, dtype=torch.float32, device=u.device)
    launch(
        _dense_bwd_kernel,
        grid,
        on=u,
        u_ptr=u,
        f_ptr=code.f,
        active_ptr=code.active,
        window_ptr=code.window,
        threshold_ptr=threshold.contiguous(),
        s_ptr=s.contiguous(),
        firing_count_ptr=code.firing_count,
        partial_ptr=partial,
        N=N,
        F=F,
        n_words=code.active.shape[1],
        stride_un=u.stride(0),
        stride_uf=u.stride(1),
        scale=2 / N,
        bandwidth=objective.bandwidth,
        frequency_slope=objective.frequency_slope,
        tanh_slope=objective.tanh_slope,
        tanh_scale=objective.tanh_scale,
        HAS_TANH=objective.tanh_slope != 0,
        STE_TO_Z=objective.ste_to_z,
        BLOCK_N=BACKWARD.block_n,
        WORDS=BACKWARD.words,
        TILES=BACKWARD.tiles,
        num_warps=BACKWARD.num_warps,
    )
    _sum_partials(partial, db_enc, dthreshold)
    return u, db_enc, dthreshold
