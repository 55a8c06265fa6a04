"""The token-major pass of the training step: x̂, the residual, and its product with the decoder row of every entry.

    x̂_n = Σ_active z_e·W_dec[j_e] + b_dec;   r_n = x̂_n − x_n;   u_e = ⟨r_n, W_dec[j_e]⟩, also in the window below θ

x [N, d] and b_dec [d] of any float dtype, W_dec [F, d] of fp32 or bf16, any strides of x and W_dec. Products and sums
are fp32; the residual is rounded once, to the dtype of W_dec, after its squared norm was taken, and u is that of the
rounded residual, which is the one the weight gradients read.

One program does a token: column block by column block it gathers the rows of its active entries and stores the
residual, then it goes through its entries once more, each against the whole row of the residual, which is in cache by
then. The order of every sum depends on the token alone, so a token's results do not depend on its batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..entries import ACTIVE, LATENT, Entries, Residual
from .common import launch
from .decode import GatherConfig

_ACTIVE = tl.constexpr(ACTIVE)
_LATENT = tl.constexpr(LATENT)


# A warp reads 256 columns of a bf16 row as one 16-byte word a lane, so that each entry's dot product stays inside one
# warp and the entries of a gather are spread over the warps.
CONFIG = GatherConfig(lanes=8, block_d=256, num_warps=4, num_stages=3)


@triton.jit
def _residual_kernel(
    z_ptr, latents_ptr, offsets_ptr, x_ptr, W_dec_ptr, b_dec_ptr, residual_ptr, squared_error_ptr, l0_ptr, u_ptr,
    capacity, D, stride_xn, stride_xd, stride_wf, stride_wd,
    LANES: tl.constexpr, BLOCK_D: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    first = tl.minimum(tl.load(offsets_ptr + n), capacity)
    length = (tl.minimum(tl.load(offsets_ptr + n + 1), capacity) - first).to(tl.int32)
    lanes = tl.arange(0, LANES)
    residual_row = residual_ptr + n * D

    squared = tl.zeros((BLOCK_D,), tl.float32)
    for column in range(0, D, BLOCK_D):
        columns = column + tl.arange(0, BLOCK_D)
        in_columns = columns < D
        wide_columns = columns.to(tl.int64)
        acc = tl.zeros((LANES, BLOCK_D), tl.float32)
        for start in tl.range(0, length, LANES, num_stages=NUM_STAGES):
            valid = start + lanes < length
            latents = tl.load(latents_ptr + first + start + lanes, mask=valid, other=0)
            active = latents >= _ACTIVE
            z = tl.load(z_ptr + first + start + lanes, mask=valid, other=0.0)
            # z - z is 0, or NaN for -Inf, which no threshold lets pass: a plain 0 would hide bad input.
            f = tl.where(active, z, z - z)
            W_rows = W_dec_ptr + (latents & _LATENT).to(tl.int64)[:, None] * stride_wf
            W_mask = active[:, None] & in_columns[None, :]
            W = tl.load(W_rows + wide_columns[None, :] * stride_wd, mask=W_mask, other=0.0)
            acc += f[:, None] * W.to(tl.float32)
        x = tl.load(x_ptr + n * stride_xn + wide_columns * stride_xd, mask=in_columns, other=0.0).to(tl.float32)
        b_dec = tl.load(b_dec_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)
        residual = tl.sum(acc, 0) + b_dec - x
        squared += tl.where(in_columns, residual * residual, 0.0)  # an infinite f is NaN past the row
        tl.store(residual_row + columns, residual.to(residual_ptr.dtype.element_ty), mask=in_columns)
    tl.store(squared_error_ptr + n, tl.sum(squared, 0))

    # The second loop reads what other threads of the program stored.
    tl.debug_barrier()
    fired = tl.zeros((LANES,), tl.int32)
    for start in range(0, length, LANES):
        valid = start + lanes < length
        latents = tl.load(latents_ptr + first + start + lanes, mask=valid, other=0)
        fired += (latents >= _ACTIVE).to(tl.int32)
        W_rows = W_dec_ptr + (latents & _LATENT).to(tl.int64)[:, None] * stride_wf
        acc = tl.zeros((LANES, BLOCK_D), tl.float32)
        for column in tl.range(0, D, BLOCK_D, num_stages=NUM_STAGES):
            columns = (column + tl.arange(0, BLOCK_D))[None, :]
            in_columns = columns < D
            residual = tl.load(residual_row + columns, mask=in_columns, other=0.0).to(tl.float32)
            W_mask = valid[:, None] & in_columns
            W = tl.load(W_rows + columns.to(tl.int64) * stride_wd, mask=W_mask, other=0.0)
            acc += W.to(tl.float32) * residual
        tl.store(u_ptr + first + start + lanes, tl.sum(acc, 1), mask=valid)
    tl.store(l0_ptr + n, tl.sum(fired, 0).to(tl.float32))


def residual_pass(entries: Entries, x: Tensor, W_dec: Tensor, b_dec: Tensor) -> Residual:
    """x [N, d] (not rounded, b_dec not subtracted), W_dec [F, d] fp32 or bf16, b_dec [d]; u beyond the last entry is
    undefined.
    """
    config = CONFIG
    (N, d), capacity = x.shape, entries.z.shape[0]
    residual = torch.empty(N, d, dtype=W_dec.dtype, device=x.device)
    squared_error, l0 = torch.empty(2, N, dtype=torch.float32, device=x.device)
    u = torch.empty(capacity, dtype=torch.float32, device=x.device)
    if N > 0:
        launch(
            _residual_kernel,
            (N,),
            on=x,
            z_ptr=entries.z,
            latents_ptr=entries.latents,
            offsets_ptr=entries.offsets,
            x_ptr=x,
            W_dec_ptr=W_dec,
            b_dec_ptr=b_dec.contiguous(),
            residual_ptr=residual,
            squared_error_ptr=squared_error,
            l0_ptr=l0,
            u_ptr=u,
            capacity=capacity,
            D=d,
            stride_xn=x.stride(0),
            stride_xd=x.stride(1),
            stride_wf=W_dec.stride(0),
            stride_wd=W_dec.stride(1),
            LANES=config.lanes,
            BLOCK_D=config.block_d,
            NUM_STAGES=config.num_stages,
            num_warps=config.num_warps,
        )
    return Residual(residual, squared_error, l0, u)
