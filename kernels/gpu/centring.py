"""What a training step reads of its activations before the product: x_n − b_dec as the products take it, and two sums.

    centred_n = x_n − b_dec, rounded to the dtype of the products;   Σ_n x_n;   ‖centred‖;   θ_j ← 0 where θ_j < 0

x [N, d], b_dec [d] and θ [F] fp32. A program does one part of the tokens and a block of columns: it leaves the sum of
x over them and the norm of what it centred, in an order that depends on the shape alone. `tokens.py` and
`conclusion.py` add the parts up. x is read once. Each program looks at its share of the thresholds too.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..entries import Centred
from .common import launch


@dataclass(frozen=True)
class CentreConfig:
    parts: int  # of the tokens, at most; every program of `tokens.py` adds them up
    block_n: int
    block_d: int
    block_f: int  # thresholds taken together
    num_warps: int


# With 16 parts, 4096 × 2304 are 144 programs, one a multiprocessor, and a tile of 16 KiB is loaded at a time.
CONFIG = CentreConfig(parts=16, block_n=16, block_d=256, block_f=256, num_warps=8)


@triton.jit
def _centre_kernel(
    x_ptr, b_dec_ptr, threshold_ptr, centred_ptr, sums_ptr, norms_ptr, N, D, F, tokens_per_part,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_columns = columns < D
    first = part * tokens_per_part
    last = tl.minimum(first + tokens_per_part, N)
    sums = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    squares = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(first, last, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        mask = (rows < last)[:, None] & in_columns[None, :]
        places = rows.to(tl.int64)[:, None] * D + columns[None, :]
        x = tl.load(x_ptr + places, mask=mask, other=0.0)
        sums += x
        if b_dec_ptr is not None:
            x -= tl.load(b_dec_ptr + columns, mask=in_columns, other=0.0)[None, :]
        centred = x.to(centred_ptr.dtype.element_ty)
        tl.store(centred_ptr + places, centred, mask=mask)
        rounded = centred.to(tl.float32)
        squares += tl.where(mask, rounded * rounded, 0.0)
    tl.store(sums_ptr + part * D + columns, tl.sum(sums, 0), mask=in_columns)
    norm = tl.sqrt(tl.sum(tl.sum(squares, 0), 0))
    program = part * tl.num_programs(0) + tl.program_id(0)
    tl.store(norms_ptr + program, norm)
    if threshold_ptr is not None:
        for start in range(program * BLOCK_F, F, tl.num_programs(0) * tl.num_programs(1) * BLOCK_F):
            j = start + tl.arange(0, BLOCK_F)
            below = tl.load(threshold_ptr + j, mask=j < F, other=0.0) < 0
            tl.store(threshold_ptr + j, tl.zeros([BLOCK_F], tl.float32), mask=below)


def centre(x: Tensor, b_dec: Tensor | None, threshold: Tensor | None, dtype: torch.dtype) -> Centred:
    """By the contract of `reference.conclusion.centre`. Every batch has a token."""
    config, (N, d) = CONFIG, x.shape
    tokens_per_part = config.block_n * triton.cdiv(triton.cdiv(N, config.parts), config.block_n)
    parts, blocks = triton.cdiv(N, max(1, tokens_per_part)), triton.cdiv(d, config.block_d)
    centred = torch.empty(N, d, dtype=dtype, device=x.device)
    sums = torch.empty(parts, d, dtype=torch.float32, device=x.device)
    norms = torch.empty(parts * blocks, dtype=torch.float32, device=x.device)
    if parts * blocks > 0:
        launch(
            _centre_kernel,
            (blocks, parts),
            on=x,
            x_ptr=x.contiguous(),
            b_dec_ptr=None if b_dec is None else b_dec.contiguous(),
            threshold_ptr=threshold,
            centred_ptr=centred,
            sums_ptr=sums,
            norms_ptr=norms,
            N=N,
            D=d,
            F=0 if threshold is None else threshold.shape[0],
            tokens_per_part=tokens_per_part,
            BLOCK_N=config.block_n,
            BLOCK_D=config.block_d,
            BLOCK_F=config.block_f,
            num_warps=config.num_warps,
        )
    return Centred(centred, sums, norms)
