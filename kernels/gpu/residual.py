"""The token-major pass of the training step: x̂, the residual, and its product with the decoder row of every entry.

    x̂_n = Σ_active z_e·W_dec[j_e] + b_dec;   r_n = x̂_n − x_n;   u_e = ⟨r_n, W_dec[j_e]⟩, also in the window below θ

x [N, d] and b_dec [d] of any float dtype, W_dec [F, d] of fp32 or bf16, any strides of x and W_dec. Products and sums
are fp32; the residual is rounded once, to the dtype of W_dec, after its squared norm was taken, and u is that of the
rounded residual, which is the one the weight gradients read.

Column c of r needs only column c of W_dec. So a program does one token and one block of columns: it gathers that part
of the rows of the token's entries once, forms x̂ and r from it and, from the same tile, the block's share of every u and
of ‖r‖². A second kernel adds the shares up, first block to last. The blocks are the slow axis of the grid: all tokens
take the same columns of W_dec, a slice that stays in the L2 cache, before any takes the next.

On tensor cores both products are exact up to the fp32 sums. A bf16 row times the rounded residual is one of bf16
operands; for x̂ each z_e is split into three bf16 parts that add up to it, three columns of an operand that is no
narrower than eight. Elsewhere the products are fp32.

A list longer than the tile goes on in smaller ones, which are gathered a second time for u. The order of every sum
depends on the token's list alone, so a token's results do not depend on its batch.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..entries import ACTIVE, LATENT, Entries, Residual
from .common import architecture, launch

_ACTIVE = tl.constexpr(ACTIVE)
_LATENT = tl.constexpr(LATENT)


@dataclass(frozen=True)
class ResidualConfig:
    first: int  # entries of the tile that is gathered once
    rest: int  # entries of the tiles after it
    block_d: int  # columns of a program
    num_warps: int
    parts: int  # columns of the narrow operand of tensor cores, at least the three parts of z; 0: no tensor cores


# A warp reads 256 columns of a bf16 row as one 16-byte word a lane, 16 such words under way at once. Warp groups read
# the tile from shared memory, 50 KiB with that of the later entries; four programs share a multiprocessor. For operands
# narrower than 16 Triton 3.6 takes no warp groups and moves the tile through shared memory twice, 17 barriers more.
WARP_GROUPS = ResidualConfig(first=64, rest=32, block_d=256, num_warps=4, parts=16)
# Tensor memory: for operands of 16 columns Triton 3.6 fails to compile.
TENSOR_MEMORY = replace(WARP_GROUPS, parts=8)
# Where the products take the tile from registers, twice the entries leave half the warps.
WARPS = ResidualConfig(first=32, rest=32, block_d=256, num_warps=4, parts=8)
# fp32 rows, and AMD, whose matrix instructions take 300 registers for these shapes.
VECTORS = ResidualConfig(first=16, rest=16, block_d=256, num_warps=4, parts=0)

# Elements that a program of the second kernel adds up.
SUM_BLOCK, SUM_WARPS = 512, 4


def residual_config(target: str, dtype: torch.dtype) -> ResidualConfig:
    """target: as `architecture` spells it. The interpreter takes what an sm_90 does."""
    if dtype != torch.bfloat16 or target.startswith("gfx"):
        return VECTORS
    if target in ("sm_90", "cpu"):
        return WARP_GROUPS
    return TENSOR_MEMORY if target in ("sm_100", "sm_103") else WARPS


@triton.jit
def _split(f):
    """Three bf16 that add up to f exactly: 8 of its 24 bits each, down to 2⁻¹³³, where bf16 ends. NaN if f is Inf."""
    high = f.to(tl.bfloat16)
    rest = f - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _coefficients(z_ptr, latents_ptr, start, left, TILE: tl.constexpr):
    """f of the entries from start on; 0 past the list."""
    e = tl.arange(0, TILE)
    latents = tl.load(latents_ptr + start + e, mask=e < left, other=0)
    z = tl.load(z_ptr + start + e, mask=e < left, other=0.0)
    # z - z is 0, or NaN for -Inf, which no threshold lets pass: a plain 0 would hide bad input.
    return tl.where(latents >= _ACTIVE, z, z - z)


@triton.jit
def _rows(latents_ptr, start, left, W_columns, in_columns, stride_wf, TILE: tl.constexpr):
    """The rows of those entries; zeros past the list, since 0 times a row that is not the token's may be NaN."""
    e = tl.arange(0, TILE)
    latents = tl.load(latents_ptr + start + e, mask=e < left, other=0)
    rows = W_columns[None, :] + (latents & _LATENT).to(tl.int64)[:, None] * stride_wf
    return tl.load(rows, mask=(e < left)[:, None] & in_columns[None, :], other=0.0)


@triton.jit
def _add_rows(acc, f, W, PARTS: tl.constexpr):
    """acc + Σ_e f_e·W_e; on tensor cores [columns, PARTS], the sums of each part of f."""
    if PARTS > 0:
        part = tl.arange(0, PARTS)[None, :]
        high, middle, low = _split(f)
        zero = tl.zeros_like(high)[:, None]
        others = tl.where(part == 1, middle[:, None], tl.where(part == 2, low[:, None], zero))
        return tl.dot(tl.trans(W), tl.where(part == 0, high[:, None], others), acc)
    else:
        return acc + tl.sum(f[:, None] * W.to(tl.float32), 0)


@triton.jit
def _products(W, residual, PARTS: tl.constexpr):
    """⟨W_e, residual⟩ over the columns of the tile."""
    if PARTS > 0:
        # Copies of the residual, of which one counts: no zeros to put beside it.
        copies = tl.broadcast_to(residual[:, None], (residual.shape[0], PARTS))
        return tl.sum(tl.where(tl.arange(0, PARTS)[None, :] == 0, tl.dot(W, copies), 0.0), 1)
    else:
        return tl.sum(W.to(tl.float32) * residual.to(tl.float32)[None, :], 1)


@triton.jit
def _residual_kernel(
    z_ptr, latents_ptr, offsets_ptr, x_ptr, W_dec_ptr, b_dec_ptr, residual_ptr, shares_ptr, l0_ptr,
    capacity, width, D, stride_xn, stride_xd, stride_wf, stride_wd,
    FIRST: tl.constexpr, REST: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Stores a row of shares [blocks, width = capacity + N] in parts: those of u by entry, then of ‖r‖² by token."""
    n = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    first = tl.minimum(tl.load(offsets_ptr + n), capacity)
    length = (tl.minimum(tl.load(offsets_ptr + n + 1), capacity) - first).to(tl.int32)
    columns = block * BLOCK_D + tl.arange(0, BLOCK_D)
    in_columns = columns < D
    wide_columns = columns.to(tl.int64)
    W_columns = W_dec_ptr + wide_columns * stride_wd

    f = _coefficients(z_ptr, latents_ptr, first, length, FIRST)
    W = _rows(latents_ptr, first, length, W_columns, in_columns, stride_wf, FIRST)
    if PARTS > 0:
        acc = _add_rows(tl.zeros((BLOCK_D, PARTS), tl.float32), f, W, PARTS)
    else:
        acc = _add_rows(tl.zeros((BLOCK_D,), tl.float32), f, W, PARTS)
    for start in tl.range(FIRST, length, REST, num_stages=1):
        f_rest = _coefficients(z_ptr, latents_ptr, first + start, length - start, REST)
        W_rest = _rows(latents_ptr, first + start, length - start, W_columns, in_columns, stride_wf, REST)
        acc = _add_rows(acc, f_rest, W_rest, PARTS)
    if PARTS > 0:
        acc = tl.sum(tl.where(tl.arange(0, PARTS)[None, :] < 3, acc, 0.0), 1)

    x = tl.load(x_ptr + n * stride_xn + wide_columns * stride_xd, mask=in_columns, other=0.0).to(tl.float32)
    b_dec = tl.load(b_dec_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)
    residual = acc + b_dec - x
    squared = tl.where(in_columns, residual * residual, 0.0)  # an infinite f is NaN past the row
    residual = residual.to(residual_ptr.dtype.element_ty)
    tl.store(residual_ptr + n * D + columns, residual, mask=in_columns)
    shares_ptr += block.to(tl.int64) * width
    tl.store(shares_ptr + capacity + n, tl.sum(squared, 0))

    # Past the row W is 0 and the residual may be NaN.
    residual = tl.where(in_columns, residual, tl.zeros_like(residual))
    e = tl.arange(0, FIRST)
    tl.store(shares_ptr + first + e, _products(W, residual, PARTS), mask=e < length)
    e_rest = tl.arange(0, REST)
    for start in tl.range(FIRST, length, REST, num_stages=1):
        W_rest = _rows(latents_ptr, first + start, length - start, W_columns, in_columns, stride_wf, REST)
        u = _products(W_rest, residual, PARTS)
        tl.store(shares_ptr + first + start + e_rest, u, mask=e_rest < length - start)

    if block == 0:
        fired = tl.zeros((FIRST,), tl.int32)
        for start in tl.range(0, length, FIRST, num_stages=1):
            latents = tl.load(latents_ptr + first + start + e, mask=start + e < length, other=0)
            fired += (latents >= _ACTIVE).to(tl.int32)
        tl.store(l0_ptr + n, tl.sum(fired, 0).to(tl.float32))


@triton.jit
def _sum_shares_kernel(shares_ptr, sums_ptr, last_ptr, capacity, width, n_blocks, BLOCK: tl.constexpr):
    """sums [width]: the shares of all blocks in their order, of the entries there are and of every token."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wanted = ((i < tl.load(last_ptr)) | (i >= capacity)) & (i < width)
    sums = tl.zeros((BLOCK,), tl.float32)
    for block in range(n_blocks):
        sums += tl.load(shares_ptr + tl.cast(block, tl.int64) * width + i, mask=wanted, other=0.0)
    tl.store(sums_ptr + i, sums, mask=wanted)


def residual_pass(entries: Entries, x: Tensor, W_dec: Tensor, b_dec: Tensor) -> Residual:
    """x [N, d] (not rounded, b_dec not subtracted), W_dec [F, d] fp32 or bf16, b_dec [d]; u beyond the last entry is
    undefined. Scratch: 4 bytes for each entry there is room for and each token, times ⌈d / block_d⌉.
    """
    config = residual_config(architecture(x.device), W_dec.dtype)
    (N, d), capacity = x.shape, entries.z.shape[0]
    n_blocks, width = max(1, triton.cdiv(d, config.block_d)), capacity + N
    residual = torch.empty(N, d, dtype=W_dec.dtype, device=x.device)
    l0 = torch.empty(N, dtype=torch.float32, device=x.device)
    sums = torch.empty(width, dtype=torch.float32, device=x.device)
    if N > 0:
        shares = torch.empty(n_blocks, width, dtype=torch.float32, device=x.device)
        launch(
            _residual_kernel,
            (N, n_blocks),
            on=x,
            z_ptr=entries.z,
            latents_ptr=entries.latents,
            offsets_ptr=entries.offsets,
            x_ptr=x,
            W_dec_ptr=W_dec,
            b_dec_ptr=b_dec.contiguous(),
            residual_ptr=residual,
            shares_ptr=shares,
            l0_ptr=l0,
            capacity=capacity,
            width=width,
            D=d,
            stride_xn=x.stride(0),
            stride_xd=x.stride(1),
            stride_wf=W_dec.stride(0),
            stride_wd=W_dec.stride(1),
            FIRST=config.first,
            REST=config.rest,
            BLOCK_D=config.block_d,
            PARTS=config.parts,
            num_warps=config.num_warps,
        )
        launch(
            _sum_shares_kernel,
            (triton.cdiv(width, SUM_BLOCK),),
            on=x,
            shares_ptr=shares,
            sums_ptr=sums,
            last_ptr=entries.offsets[-1:],
            capacity=capacity,
            width=width,
            n_blocks=n_blocks,
            BLOCK=SUM_BLOCK,
            num_warps=SUM_WARPS,
        )
    return Residual(residual, sums[capacity:], l0, sums[:capacity])
