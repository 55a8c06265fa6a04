"""JumpReLU over dense pre-activations, in one pass over [N, F] forward and one backward.

    z = pre + b_enc;   f = z·1[z > θ];   l0_n = Σ_j 1[z_nj > θ_j];   firing_count_j = Σ_n 1[z_nj > θ_j]
    dpre = u·1[z > θ];   db_enc = Σ_n dpre;   dθ = Σ_n 1[|z − θ| < ε/2]·( −(θ/ε)·u − s_n/ε )

with u = ∂L/∂f [N, F] and s = ∂L/∂l0 [N] (Rajamanoharan et al. 2024, arXiv 2407.14435, equations 11 and 12). pre [N, F]
in fp16, bf16 or fp32; b_enc [F] of any float dtype; θ [F] fp32. `reference/` is the specification, also for NaN and
Inf.

Memory traffic, for entries of b bytes: forward 2b per entry of [N, F] (read pre, write f) and 0.08 bytes of counts;
backward 3b (read pre and u, write dpre) and 0.13 bytes of partial sums, written and read. z is recomputed, never
stored.

The counts are sums of integers, so atomics cannot make them depend on the order of the programs. The float sums db_enc
and dθ are formed in two stages instead: each program adds up its own rows in a fixed order, then a second kernel adds
up the programs' rows of partial sums.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import launch, register


@dataclass(frozen=True)
class JumpReLUConfig:
    block_n: int  # tokens per tile
    block_f: int  # latents per tile: one warp reads a row of the tile as 16-byte words
    tiles: int  # tiles of one program, one below the other: bounds the partial sums to 8/(block_n·tiles) bytes an entry
    num_warps: int


FORWARD = JumpReLUConfig(block_n=8, block_f=256, tiles=8, num_warps=4)
BACKWARD = JumpReLUConfig(block_n=8, block_f=256, tiles=16, num_warps=4)
# Rows of partial sums per step of the second stage.
REDUCE = JumpReLUConfig(block_n=32, block_f=128, tiles=1, num_warps=4)


@triton.jit
def _gate(z, threshold):
    """1 where z > θ, 0 where z ≤ θ, NaN where they cannot be compared."""
    return tl.where(z > threshold, 1.0, tl.where(z <= threshold, 0.0, float("nan")))


@triton.jit
def _window(z, threshold, half_bandwidth):
    """1[|z − θ| < ε/2], NaN where z or θ is NaN."""
    distance = tl.abs(z - threshold)
    return tl.where(distance < half_bandwidth, 1.0, tl.where(distance >= half_bandwidth, 0.0, float("nan")))


@triton.jit(do_not_specialize=["N"])
def _jumprelu_fwd_kernel(
    pre_ptr, b_enc_ptr, threshold_ptr, f_ptr, l0_ptr, firing_count_ptr, N, F, stride_pre_n, stride_pre_f,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    in_columns = columns < F
    b_enc = tl.load(b_enc_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    threshold = tl.load(threshold_ptr + columns, mask=in_columns, other=0.0)[None, :]
    pre_columns = columns.to(tl.int64)[None, :] * stride_pre_f
    counts = tl.zeros([BLOCK_N, BLOCK_F], tl.int32)
    for tile in range(TILES):
        rows = (tl.program_id(1) * TILES + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (rows < N)[:, None] & in_columns[None, :]
        wide_rows = rows.to(tl.int64)[:, None]
        pre = tl.load(pre_ptr + wide_rows * stride_pre_n + pre_columns, mask=mask, other=0.0)
        z = pre.to(tl.float32) + b_enc
        # z - z is 0, or NaN where z is not finite: a plain 0 would hide bad input.
        f = tl.where(z > threshold, z, tl.where(z <= threshold, z - z, float("nan")))
        tl.store(f_ptr + wide_rows * F + columns[None, :], f.to(f_ptr.dtype.element_ty), mask=mask)
        active = ((z > threshold) & mask).to(tl.int32)
        tl.atomic_add(l0_ptr + rows, tl.sum(active, axis=1), mask=rows < N, sem="relaxed")
        counts += active
    tl.atomic_add(firing_count_ptr + columns, tl.sum(counts, axis=0), mask=in_columns, sem="relaxed")


@triton.jit(do_not_specialize=["N"])
def _jumprelu_bwd_kernel(
    grad_f_ptr, grad_l0_ptr, pre_ptr, b_enc_ptr, threshold_ptr, dpre_ptr, partial_ptr, N, F, bandwidth, half_bandwidth,
    stride_grad_f_n, stride_grad_f_f, stride_grad_l0, stride_pre_n, stride_pre_f,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    in_columns = columns < F
    b_enc = tl.load(b_enc_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    threshold = tl.load(threshold_ptr + columns, mask=in_columns, other=0.0)[None, :]
    slope = threshold / bandwidth
    wide_columns = columns.to(tl.int64)[None, :]
    db_enc = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)
    dthreshold = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)
    for tile in range(TILES):
        rows = (tl.program_id(1) * TILES + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        in_rows = rows < N
        mask = in_rows[:, None] & in_columns[None, :]
        wide_rows = rows.to(tl.int64)[:, None]
        pre_offsets = wide_rows * stride_pre_n + wide_columns * stride_pre_f
        u_offsets = wide_rows * stride_grad_f_n + wide_columns * stride_grad_f_f
        z = tl.load(pre_ptr + pre_offsets, mask=mask, other=0.0).to(tl.float32) + b_enc
        u = tl.load(grad_f_ptr + u_offsets, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(grad_l0_ptr + rows.to(tl.int64) * stride_grad_l0, mask=in_rows, other=0.0).to(tl.float32)
        # Products rather than selections: 0·Inf is NaN, and a gradient that is not finite must stay visible.
        dpre = u * _gate(z, threshold)
        tl.store(dpre_ptr + wide_rows * F + columns[None, :], dpre.to(dpre_ptr.dtype.element_ty), mask=mask)
        inside = _window(z, threshold, half_bandwidth)
        db_enc += tl.where(mask, dpre, 0.0)
        dthreshold += tl.where(mask, inside * (-slope * u - (s / bandwidth)[:, None]), 0.0)
    # partial [2, programs over N, F]: the sums for db_enc, then those for dθ
    partial = partial_ptr + tl.program_id(1).to(tl.int64) * F + columns
    tl.store(partial, tl.sum(db_enc, axis=0), mask=in_columns)
    tl.store(partial + tl.num_programs(1).to(tl.int64) * F, tl.sum(dthreshold, axis=0), mask=in_columns)


@triton.jit(do_not_specialize=["N_PARTIAL"])
def _sum_partials_kernel(
    partial_ptr, db_enc_ptr, dthreshold_ptr, N_PARTIAL, F, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr
):
    columns = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    in_columns = columns < F
    db_enc = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)
    dthreshold = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)
    for start in range(0, N_PARTIAL, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        mask = (rows < N_PARTIAL)[:, None] & in_columns[None, :]
        offsets = rows.to(tl.int64)[:, None] * F + columns[None, :]
        db_enc += tl.load(partial_ptr + offsets, mask=mask, other=0.0)
        second = tl.cast(N_PARTIAL, tl.int64) * F
        dthreshold += tl.load(partial_ptr + second + offsets, mask=mask, other=0.0)
    tl.store(db_enc_ptr + columns, tl.sum(db_enc, axis=0).to(db_enc_ptr.dtype.element_ty), mask=in_columns)
    tl.store(dthreshold_ptr + columns, tl.sum(dthreshold, axis=0), mask=in_columns)


def _launch_forward(pre: Tensor, b_enc: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    N, F = pre.shape
    f = torch.empty(N, F, dtype=pre.dtype, device=pre.device)
    l0 = torch.zeros(N, dtype=torch.int32, device=pre.device)
    firing_count = torch.zeros(F, dtype=torch.int32, device=pre.device)
    if pre.numel() > 0:
        config = FORWARD
        grid = (triton.cdiv(F, config.block_f), triton.cdiv(N, config.block_n * config.tiles))
        launch(
            _jumprelu_fwd_kernel,
            grid,
            on=pre,
            pre_ptr=pre,
            b_enc_ptr=b_enc.contiguous(),
            threshold_ptr=threshold.contiguous(),
            f_ptr=f,
            l0_ptr=l0,
            firing_count_ptr=firing_count,
            N=N,
            F=F,
            stride_pre_n=pre.stride(0),
            stride_pre_f=pre.stride(1),
            BLOCK_N=config.block_n,
            BLOCK_F=config.block_f,
            TILES=config.tiles,
            num_warps=config.num_warps,
        )
    return f, l0.to(torch.float32), firing_count


def _sum_partials(partial: Tensor, db_enc: Tensor, dthreshold: Tensor) -> None:
    """partial [2, programs over N, F] fp32, summed over the programs into db_enc [F] and dthreshold [F]."""
    _, n_partial, F = partial.shape
    launch(
        _sum_partials_kernel,
        (triton.cdiv(F, REDUCE.block_f),),
        on=partial,
        partial_ptr=partial,
        db_enc_ptr=db_enc,
        dthreshold_ptr=dthreshold,
        N_PARTIAL=n_partial,
        F=F,
        BLOCK_N=REDUCE.block_n,
        BLOCK_F=REDUCE.block_f,
        num_warps=REDUCE.num_warps,
    )


def _launch_backward(
    grad_f: Tensor, grad_l0: Tensor, pre: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float
) -> tuple[Tensor, Tensor, Tensor]:
    N, F = pre.shape
    dpre = torch.empty(N, F, dtype=pre.dtype, device=pre.device)
    if pre.numel() == 0:
        return dpre, b_enc.new_zeros(F), threshold.new_zeros(F)
    config = BACKWARD
    grid = (triton.cdiv(F, config.block_f), triton.cdiv(N, config.block_n * config.tiles))
    partial = torch.empty(2, grid[1], F, dtype=torch.float32, device=pre.device)
    db_enc = torch.empty(F, dtype=b_enc.dtype, device=pre.device)
    dthreshold = torch.empty(F, dtype=threshold.dtype, device=pre.device)
    launch(
        _jumprelu_bwd_kernel,
        grid,
        on=pre,
        grad_f_ptr=grad_f,
        grad_l0_ptr=grad_l0,
        pre_ptr=pre,
        b_enc_ptr=b_enc.contiguous(),
        threshold_ptr=threshold.contiguous(),
        dpre_ptr=dpre,
        partial_ptr=partial,
        N=N,
        F=F,
        bandwidth=bandwidth,
        half_bandwidth=bandwidth / 2,
        stride_grad_f_n=grad_f.stride(0),
        stride_grad_f_f=grad_f.stride(1),
        stride_grad_l0=grad_l0.stride(0),
        stride_pre_n=pre.stride(0),
        stride_pre_f=pre.stride(1),
        BLOCK_N=config.block_n,
        BLOCK_F=config.block_f,
        TILES=config.tiles,
        num_warps=config.num_warps,
    )
    _sum_partials(partial, db_enc, dthreshold)
    return dpre, db_enc, dthreshold


def _fake_forward(pre: Tensor, b_enc: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    N, F = pre.shape
    return pre.new_empty(N, F), threshold.new_empty(N), pre.new_empty(F, dtype=torch.int32)


def _fake_backward(
    grad_f: Tensor, grad_l0: Tensor, pre: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float
) -> tuple[Tensor, Tensor, Tensor]:
    N, F = pre.shape
    return pre.new_empty(N, F), b_enc.new_empty(F), threshold.new_empty(F)


jumprelu_forward = register(
    "jumprelu_forward(Tensor pre, Tensor b_enc, Tensor threshold) -> (Tensor, Tensor, Tensor)",
    _launch_forward,
    _fake_forward,
)
jumprelu_backward = register(
    "jumprelu_backward(Tensor grad_f, Tensor grad_l0, Tensor pre, Tensor b_enc, Tensor threshold, float bandwidth)"
    " -> (Tensor, Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
)
