"""Sparse decoding and its backward: x̂_n = Σ_e values_e·W_dec[j_e] + b_dec over the entries e = (token n, latent j_e).

    dvalues_e = ⟨g_n, W_dec[j_e]⟩;   dW_dec[j] = Σ_{e: j_e = j} values_e·g_{n_e}

values [nnz], indices [nnz] int32, offsets [N + 1] int64; W_dec [F, d], b_dec [d] and g = ∂L/∂x̂ [N, d] of any float
dtype and strides. Products and sums are fp32, rounded once at the store.

Forward and dW_dec are the same gather: rows of a table, scaled and summed. Forward, the lists are the tokens' and the
table is W_dec; for dW_dec they are the latents' (the transposed code, tokens ascending) and the table is g. Each sum is
formed by one program in an order that depends on its list alone: entry e of the list is added to partial sum e mod 4,
then the four partial sums are added. So there are no atomics, and a latent that no token touches gets an exact zero.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import launch, register


@dataclass(frozen=True)
class GatherConfig:
    lanes: int  # entries gathered together
    block_d: int  # columns of a program
    num_warps: int
    num_stages: int  # gathers under way while one is summed, plus one


# A warp reads 256 columns of a bf16 row as one 16-byte word a lane and needs no barrier. Four rows at three stages keep
# 8 rows under way a warp in 66 registers (70 on gfx942); eight rows take 100 (132) and leave fewer warps.
GATHER = GatherConfig(lanes=4, block_d=256, num_warps=1, num_stages=3)
# Here every lane row reuses the loaded part of g, so eight rows, of half the width to stay below 90 registers.
DOT = GatherConfig(lanes=8, block_d=128, num_warps=1, num_stages=3)


@triton.jit
def _gather_sum_kernel(
    values_ptr, rows_ptr, offsets_ptr, table_ptr, bias_ptr, out_ptr, D, stride_row, stride_column,
    HAS_BIAS: tl.constexpr, LANES: tl.constexpr, BLOCK_D: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """out[i] = Σ_e values_e·table[rows_e] + bias over the entries e of list i, a program per list and column block."""
    i = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_columns = columns < D
    first = tl.load(offsets_ptr + i)
    length = (tl.load(offsets_ptr + i + 1) - first).to(tl.int32)
    lanes = tl.arange(0, LANES)
    table_columns = table_ptr + columns.to(tl.int64)[None, :] * stride_column
    acc = tl.zeros((LANES, BLOCK_D), tl.float32)
    for start in tl.range(0, length, LANES, num_stages=NUM_STAGES):
        valid = start + lanes < length
        values = tl.load(values_ptr + first + start + lanes, mask=valid, other=0.0).to(tl.float32)
        rows = tl.load(rows_ptr + first + start + lanes, mask=valid, other=0).to(tl.int64)
        mask = valid[:, None] & in_columns[None, :]
        table = tl.load(table_columns + rows[:, None] * stride_row, mask=mask, other=0.0)
        acc += values[:, None] * table.to(tl.float32)
    out = tl.sum(acc, 0)
    if HAS_BIAS:
        out += tl.load(bias_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)
    tl.store(out_ptr + i.to(tl.int64) * D + columns, out.to(out_ptr.dtype.element_ty), mask=in_columns)


@triton.jit
def _gather_dot_kernel(
    grad_ptr, indices_ptr, offsets_ptr, W_dec_ptr, dvalues_ptr, D,
    stride_grad_n, stride_grad_d, stride_wf, stride_wd,
    LANES: tl.constexpr, BLOCK_D: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """dvalues_e = ⟨grad[n], W_dec[indices_e]⟩ for the entries e of token n, one program per token."""
    n = tl.program_id(0)
    first = tl.load(offsets_ptr + n)
    length = (tl.load(offsets_ptr + n + 1) - first).to(tl.int32)
    lanes = tl.arange(0, LANES)
    grad_row = grad_ptr + n.to(tl.int64) * stride_grad_n
    for start in range(0, length, LANES):
        valid = start + lanes < length
        latents = tl.load(indices_ptr + first + start + lanes, mask=valid, other=0).to(tl.int64)
        W_rows = W_dec_ptr + latents[:, None] * stride_wf
        acc = tl.zeros((LANES, BLOCK_D), tl.float32)
        for column in tl.range(0, D, BLOCK_D, num_stages=NUM_STAGES):
            columns = (column + tl.arange(0, BLOCK_D))[None, :]
            in_columns = columns < D
            grad = tl.load(grad_row + columns.to(tl.int64) * stride_grad_d, mask=in_columns, other=0.0)
            W_mask = valid[:, None] & in_columns
            W = tl.load(W_rows + columns.to(tl.int64) * stride_wd, mask=W_mask, other=0.0)
            acc += W.to(tl.float32) * grad.to(tl.float32)
        dvalues = tl.sum(acc, 1).to(dvalues_ptr.dtype.element_ty)
        tl.store(dvalues_ptr + first + start + lanes, dvalues, mask=valid)


def _gather_sum(values: Tensor, rows: Tensor, offsets: Tensor, table: Tensor, bias: Tensor | None, out: Tensor):
    config = GATHER
    lists, D = out.shape
    if out.numel() == 0:
        return out
    launch(
        _gather_sum_kernel,
        (lists, triton.cdiv(D, config.block_d)),
        on=out,
        values_ptr=values,
        rows_ptr=rows,
        offsets_ptr=offsets,
        table_ptr=table,
        bias_ptr=bias,
        out_ptr=out,
        D=D,
        stride_row=table.stride(0),
        stride_column=table.stride(1),
        HAS_BIAS=bias is not None,
        LANES=config.lanes,
        BLOCK_D=config.block_d,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
    )
    return out


def _forward(values: Tensor, indices: Tensor, offsets: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    out = W_dec.new_empty(offsets.shape[0] - 1, W_dec.shape[1])
    code = (values.contiguous(), indices.contiguous(), offsets.contiguous())
    return _gather_sum(*code, table=W_dec, bias=b_dec.contiguous(), out=out)


def _backward_values(grad: Tensor, values: Tensor, indices: Tensor, offsets: Tensor, W_dec: Tensor) -> Tensor:
    config = DOT
    dvalues = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    if values.numel() == 0:
        return dvalues
    launch(
        _gather_dot_kernel,
        (offsets.shape[0] - 1,),
        on=grad,
        grad_ptr=grad,
        indices_ptr=indices.contiguous(),
        offsets_ptr=offsets.contiguous(),
        W_dec_ptr=W_dec,
        dvalues_ptr=dvalues,
        D=grad.shape[1],
        stride_grad_n=grad.stride(0),
        stride_grad_d=grad.stride(1),
        stride_wf=W_dec.stride(0),
        stride_wd=W_dec.stride(1),
        LANES=config.lanes,
        BLOCK_D=config.block_d,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
    )
    return dvalues


def latent_major(values: Tensor, indices: Tensor, offsets: Tensor, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """The transposed code: values [nnz], tokens [nnz] int32 by latent, tokens ascending; offsets [d_sae + 1] int64."""
    latents, order = torch.sort(indices, stable=True)
    tokens = torch.arange(offsets.shape[0] - 1, dtype=torch.int32, device=offsets.device)
    tokens = torch.repeat_interleave(tokens, offsets.diff(), output_size=values.shape[0])
    boundaries = torch.arange(d_sae + 1, dtype=latents.dtype, device=latents.device)
    return values[order], tokens[order], torch.searchsorted(latents, boundaries)


def _backward_weight(grad: Tensor, values: Tensor, indices: Tensor, offsets: Tensor, W_dec: Tensor) -> Tensor:
    out = torch.empty(W_dec.shape, dtype=W_dec.dtype, device=W_dec.device)
    return _gather_sum(*latent_major(values, indices, offsets, W_dec.shape[0]), table=grad, bias=None, out=out)


def _fake_forward(values: Tensor, indices: Tensor, offsets: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    return W_dec.new_empty(offsets.shape[0] - 1, W_dec.shape[1])


def _fake_backward_values(grad: Tensor, values: Tensor, indices: Tensor, offsets: Tensor, W_dec: Tensor) -> Tensor:
    return values.new_empty(values.shape)


def _fake_backward_weight(grad: Tensor, values: Tensor, indices: Tensor, offsets: Tensor, W_dec: Tensor) -> Tensor:
    return W_dec.new_empty(W_dec.shape)


decode_forward = register(
    "decode_forward(Tensor values, Tensor indices, Tensor offsets, Tensor W_dec, Tensor b_dec) -> Tensor",
    _forward,
    _fake_forward,
)
backward_values_op = register(
    "decode_backward_values(Tensor grad, Tensor values, Tensor indices, Tensor offsets, Tensor W_dec) -> Tensor",
    _backward_values,
    _fake_backward_values,
)
backward_weight_op = register(
    "decode_backward_weight(Tensor grad, Tensor values, Tensor indices, Tensor offsets, Tensor W_dec) -> Tensor",
    _backward_weight,
    _fake_backward_weight,
)


def decode_backward(
    grad: Tensor, values: Tensor, indices: Tensor, offsets: Tensor, W_dec: Tensor, need_values: bool, need_W: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dvalues [nnz] and dW_dec [F, d] in the dtypes of ``values`` and ``W_dec``, each None unless needed."""
    arguments = (grad, values, indices, offsets, W_dec)
    return backward_values_op(*arguments) if need_values else None, backward_weight_op(*arguments) if need_W else None
