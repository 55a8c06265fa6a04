"""W_enc·db_enc, which the pre-encoder bias takes from its gradient: Σ_j db_enc_j·W_enc[j] over the latents j.

W_enc [F, d] of any float dtype and strides, db_enc [F] fp32; products and sums are fp32. A product of W_enc in bf16
would round db_enc too; this does not.

A row with the coefficient 0 is not read, and most latents of a wide SAE have no entry in a batch. What such a row holds
is therefore not seen; a latent whose weights are not finite has an entry for every token, and its coefficient is NaN.

The latents are cut into groups by their number alone. One program sums a group's rows, `lanes` at a time, for a block
of columns; a second launch of the same kernel sums the groups, or in a step `finishing.py`. So the order of every sum
depends on F alone.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import launch


@dataclass(frozen=True)
class SumConfig:
    lanes: int  # rows taken together
    block_d: int  # columns of a program
    num_warps: int
    num_stages: int


# A warp reads 256 columns of a bf16 row as one 16-byte word a lane. Nothing is fetched ahead, so that a group of rows
# with no coefficient but 0 is passed over: at a million latents that is half of them, and there are warps enough.
ROWS = SumConfig(lanes=4, block_d=256, num_warps=1, num_stages=1)
GROUPS = SumConfig(lanes=64, block_d=32, num_warps=8, num_stages=3)

# At most this many groups, of no fewer rows than this: the partial sums stay small.
_GROUPS, _GROUP_ROWS = 1024, 64


@triton.jit
def _sum_rows_kernel(
    coefficients_ptr, table_ptr, out_ptr, ROWS, GROUP, D, stride_row, stride_column,
    LANES: tl.constexpr, BLOCK_D: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """out[i] = Σ_j coefficients_j·table[j] over the rows j of group i. Without coefficients, Σ_j table[j]."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_columns = columns < D
    first = tl.program_id(1) * GROUP
    last = tl.minimum(first + GROUP, ROWS)
    table_columns = table_ptr + columns.to(tl.int64)[None, :] * stride_column
    acc = tl.zeros((LANES, BLOCK_D), tl.float32)
    for start in tl.range(first, last, LANES, num_stages=NUM_STAGES):
        rows = start + tl.arange(0, LANES)
        table_rows = table_columns + rows.to(tl.int64)[:, None] * stride_row
        if coefficients_ptr is not None:
            coefficients = tl.load(coefficients_ptr + rows, mask=rows < last, other=0.0)
            counts = coefficients != 0
            if tl.max(counts.to(tl.int32), 0) > 0:
                mask = counts[:, None] & in_columns[None, :]
                acc += coefficients[:, None] * tl.load(table_rows, mask=mask, other=0.0).to(tl.float32)
        else:
            mask = (rows < last)[:, None] & in_columns[None, :]
            acc += tl.load(table_rows, mask=mask, other=0.0)
    tl.store(out_ptr + tl.program_id(1).to(tl.int64) * D + columns, tl.sum(acc, 0), mask=in_columns)


def _sum_rows(coefficients: Tensor | None, table: Tensor, group: int, config: SumConfig) -> Tensor:
    """The sum of each ``group`` of rows: [groups, d] fp32."""
    rows, d = table.shape
    out = torch.empty(triton.cdiv(rows, group), d, dtype=torch.float32, device=table.device)
    if out.numel() > 0:
        launch(
            _sum_rows_kernel,
            (triton.cdiv(d, config.block_d), out.shape[0]),
            on=table,
            coefficients_ptr=coefficients,
            table_ptr=table,
            out_ptr=out,
            ROWS=rows,
            GROUP=group,
            D=d,
            stride_row=table.stride(0),
            stride_column=table.stride(1),
            LANES=config.lanes,
            BLOCK_D=config.block_d,
            NUM_STAGES=config.num_stages,
            num_warps=config.num_warps,
        )
    return out


def encoder_parts(W_enc: Tensor, db_enc: Tensor) -> Tensor:
    """By the contract of `reference.encoder_parts`: the groups."""
    return _sum_rows(db_enc.contiguous(), W_enc, max(_GROUP_ROWS, triton.cdiv(W_enc.shape[0], _GROUPS)), ROWS)


def encoder_times(W_enc: Tensor, db_enc: Tensor) -> Tensor:
    """Σ_j db_enc_j·W_enc[j], [d] fp32, by the contract of `kernels.encoder_times`."""
    F, d = W_enc.shape
    if F == 0:
        return torch.zeros(d, dtype=torch.float32, device=W_enc.device)
    parts = encoder_parts(W_enc, db_enc)
    return _sum_rows(None, parts, parts.shape[0], GROUPS)[0]
