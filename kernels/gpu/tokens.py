"""What a training step sums over its tokens once their residuals are known, of a block of tokens a program:

    s_n = ∂L/∂l0_n of the penalty;   spread_n = ‖x_n − m‖², m = mean_n x_n;   share_n = ‖r_n‖²/spread_n, 0 where r_n is
    ‖f‖ and Σ tanh(c·f), or Σ f where c = 0, over the active entries;   Σ_n r_n, column by column

x [N, d] fp32, r [N, d] fp32 or bf16; all sums are fp32. The mean comes from the parts of its sum that `centring.py`
left, which every program adds up itself. With a penalty on the mean L0 of the batch each adds up the L0 of all tokens
too. What is summed over tokens is left by program; every order depends on the shapes and the lists alone. The entries
of neighbouring tokens are neighbours, so a program goes through its own without asking which token they are of.

With l = l0_n, or its mean: s = λ/N ("linear"), or (2/N)·λ·factor·(l − target) ("quadratic"); λ is read from the device.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..entries import ACTIVE, Centred, Entries, Penalty, Residual, TokenSums
from .common import device_scalar, launch

_ACTIVE = tl.constexpr(ACTIVE)


@dataclass(frozen=True)
class TokenConfig:
    block_n: int  # tokens of a program
    block_d: int
    block_e: int  # entries, or tokens of the mean L0, taken together
    num_warps: int


# 4096 tokens are 128 programs, about one a multiprocessor, so the mean is summed from L2 some 128 times.
CONFIG = TokenConfig(block_n=32, block_d=128, block_e=1024, num_warps=8)


@triton.jit
def _tanh(a):
    """From exp(−2|a|), which cannot overflow, but for a near 0, where 1 − exp would cancel. NaN stays NaN."""
    t = tl.exp(-2.0 * tl.abs(a))
    b = a * a
    series = a + a * b * (-1 / 3 + b * (2 / 15 + b * (-17 / 315 + b * (62 / 2835))))  # to 10⁻⁸ of itself at ¼
    return tl.where(b < 0.0625, series, tl.where(a < 0, -1.0, 1.0) * ((1.0 - t) / (1.0 + t)))


@triton.jit
def _tokens_kernel(
    z_ptr, latents_ptr, offsets_ptr, x_ptr, column_sums_ptr, residual_ptr, squared_error_ptr, l0_ptr, coefficient_ptr,
    s_ptr, spread_ptr, shares_ptr, f_norms_ptr, tanh_sums_ptr, residual_sums_ptr,
    N, D, capacity, parts, factor, target, tanh_scale,
    OF_L0: tl.constexpr, OF_BATCH: tl.constexpr, OF_F: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < N
    row_starts = rows.to(tl.int64)[:, None] * D
    parts_of_sum = tl.arange(0, PARTS)

    spread = tl.zeros((BLOCK_N,), tl.float32)
    for column in range(0, D, BLOCK_D):
        columns = column + tl.arange(0, BLOCK_D)
        in_columns = columns < D
        mask = in_rows[:, None] & in_columns[None, :]
        sums_mask = (parts_of_sum < parts)[:, None] & in_columns[None, :]
        sums = tl.load(column_sums_ptr + parts_of_sum[:, None] * D + columns[None, :], mask=sums_mask, other=0.0)
        mean = tl.sum(sums, 0) / N
        deviation = tl.load(x_ptr + row_starts + columns[None, :], mask=mask, other=0.0) - mean[None, :]
        spread += tl.sum(deviation * deviation, 1)  # 0 − 0 past the row
        residual = tl.load(residual_ptr + row_starts + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(residual_sums_ptr + block.to(tl.int64) * D + columns, tl.sum(residual, 0), mask=in_columns)
    squared_error = tl.load(squared_error_ptr + rows, mask=in_rows, other=0.0)
    tl.store(spread_ptr + rows, spread, mask=in_rows)
    shares = squared_error / tl.where(squared_error == 0, 1.0, spread)
    tl.store(shares_ptr + rows, shares, mask=in_rows)

    coefficient = tl.load(coefficient_ptr).to(tl.float64)
    if OF_L0 == "quadratic":
        l0 = tl.load(l0_ptr + rows, mask=in_rows, other=0.0)
        if OF_BATCH:
            totals = tl.zeros((BLOCK_E,), tl.float32)
            for start in range(0, N, BLOCK_E):
                others = start + tl.arange(0, BLOCK_E)
                totals += tl.load(l0_ptr + others, mask=others < N, other=0.0)
            l0 = tl.zeros((BLOCK_N,), tl.float32) + tl.sum(totals, 0) / N
        s = (l0 - target) * (2.0 * (coefficient * factor) / N).to(tl.float32)
    else:
        s = tl.zeros((BLOCK_N,), tl.float32)
        if OF_L0 == "linear":
            s += (coefficient / N).to(tl.float32)
    tl.store(s_ptr + rows, s, mask=in_rows)

    first = tl.minimum(tl.load(offsets_ptr + block * BLOCK_N), capacity)
    last = tl.minimum(tl.load(offsets_ptr + tl.minimum(block * BLOCK_N + BLOCK_N, N)), capacity)
    length = (last - first).to(tl.int32)
    squares = tl.zeros((BLOCK_E,), tl.float32)
    tanh_sums = tl.zeros((BLOCK_E,), tl.float32)
    for start in range(0, length, BLOCK_E):
        places = start + tl.arange(0, BLOCK_E)
        active = tl.load(latents_ptr + first + places, mask=places < length, other=0) >= _ACTIVE
        f = tl.where(active, tl.load(z_ptr + first + places, mask=places < length, other=0.0), 0.0)
        squares += f * f
        if tanh_sums_ptr is not None:
            if OF_F:
                tanh_sums += f
            else:
                tanh_sums += _tanh(tanh_scale * f)
    tl.store(f_norms_ptr + block, tl.sqrt(tl.sum(squares, 0)))
    if tanh_sums_ptr is not None:
        tl.store(tanh_sums_ptr + block, tl.sum(tanh_sums, 0))


def token_pass(entries: Entries, x: Tensor, centred: Centred, out: Residual, penalty: Penalty) -> TokenSums:
    """By the contract of `reference.conclusion.token_pass`."""
    config, (N, d) = CONFIG, x.shape
    blocks, parts = triton.cdiv(N, config.block_n), centred.column_sums.shape[0]
    has_tanh = penalty.tanh_scale is not None
    s, spread, shares = torch.empty(3, N, dtype=torch.float32, device=x.device)
    f_norms, tanh_sums = torch.empty(2, blocks, dtype=torch.float32, device=x.device)
    residual_sums = torch.empty(blocks, d, dtype=torch.float32, device=x.device)
    if N > 0:
        launch(
            _tokens_kernel,
            (blocks,),
            on=x,
            z_ptr=entries.z,
            latents_ptr=entries.latents,
            offsets_ptr=entries.offsets,
            x_ptr=x.contiguous(),
            column_sums_ptr=centred.column_sums,
            residual_ptr=out.residual.contiguous(),
            squared_error_ptr=out.squared_error,
            l0_ptr=out.l0,
            coefficient_ptr=device_scalar(penalty.coefficient, x),
            s_ptr=s,
            spread_ptr=spread,
            shares_ptr=shares,
            f_norms_ptr=f_norms,
            tanh_sums_ptr=tanh_sums if has_tanh else None,
            residual_sums_ptr=residual_sums,
            N=N,
            D=d,
            capacity=entries.z.shape[0],
            parts=parts,
            factor=penalty.factor,
            target=penalty.target,
            tanh_scale=penalty.tanh_scale if has_tanh else 0.0,
            OF_L0=penalty.of_l0,
            OF_BATCH=penalty.of_batch,
            OF_F=penalty.tanh_scale == 0,
            PARTS=triton.next_power_of_2(max(2, parts)),
            BLOCK_N=config.block_n,
            BLOCK_D=config.block_d,
            BLOCK_E=config.block_e,
            num_warps=config.num_warps,
        )
    return TokenSums(s, spread, shares, f_norms, tanh_sums if has_tanh else None, residual_sums)
