"""The end of a training step: the decoder's bias by Adam, and the counters; nothing moves unless ``ok``.

    db_dec = (2/N)·Σ_n r_n − W_enc·db_enc;   m ← β1·m + (1 − β1)·db_dec;   v ← β2·v + (1 − β2)·db_dec²
    b_dec ← b_dec − lr·(m/(1 − β1^k))/(√(v/(1 − β2^k)) + eps);   k: which update this is, counted from 1
    tokens since latent j fired ← 0 where it did, else + N

With β1 = 0, m is db_dec and neither kept nor compiled. One launch: some programs do a block of latents, the others a
block of columns, for which each adds up the parts of both sums in their order. The first of them counts the update; the
others do not read that counter, but k. Sums are fp32, the powers of β1 and β2 fp64.
"""

import math
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ..entries import Rule
from .common import device_scalar, launch


@dataclass(frozen=True)
class FinishConfig:
    block_f: int  # latents of a program
    block_d: int  # columns of a program
    block_n: int  # parts of the residual's sum taken together
    lanes: int  # parts of W_enc·db_enc taken together
    num_warps: int


# 1,024 parts of W_enc·db_enc, the most there are, take sixteen turns.
CONFIG = FinishConfig(block_f=1024, block_d=32, block_n=32, lanes=64, num_warps=4)


@triton.jit
def _sum_parts(parts_ptr, parts, columns, in_columns, D, LANES: tl.constexpr, BLOCK_D: tl.constexpr):
    """Σ of parts [parts, D] in the given columns, LANES at a time."""
    totals = tl.zeros((LANES, BLOCK_D), tl.float32)
    for start in range(0, parts, LANES):
        rows = start + tl.arange(0, LANES)
        mask = (rows < parts)[:, None] & in_columns[None, :]
        totals += tl.load(parts_ptr + rows.to(tl.int64)[:, None] * D + columns[None, :], mask=mask, other=0.0)
    return tl.sum(totals, 0)


@triton.jit
def _finish_kernel(
    b_dec_ptr, m_ptr, v_ptr, since_ptr, updates_ptr, sums_ptr, of_encoder_ptr, firing_count_ptr, learning_rate_ptr,
    ok_ptr, number_ptr, F, D, parts, encoder_parts, latent_blocks, n_tokens, scale, eps,
    BETA1: tl.constexpr, LOG2_BETA1: tl.constexpr, BETA2: tl.constexpr, LOG2_BETA2: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    if tl.load(ok_ptr) == 0:
        return
    pid = tl.program_id(0)
    number = tl.load(number_ptr)
    if pid == 0:
        tl.store(updates_ptr, number)
    if pid < latent_blocks:
        j = pid * BLOCK_F + tl.arange(0, BLOCK_F)
        in_latents = j < F
        fired = tl.load(firing_count_ptr + j, mask=in_latents, other=0) > 0
        since = tl.load(since_ptr + j, mask=in_latents, other=0) + n_tokens
        tl.store(since_ptr + j, tl.where(fired, 0, since), mask=in_latents)
    else:
        columns = (pid - latent_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
        in_columns = columns < D
        gradient = _sum_parts(sums_ptr, parts, columns, in_columns, D, BLOCK_N, BLOCK_D) * scale
        if of_encoder_ptr is not None:
            gradient -= _sum_parts(of_encoder_ptr, encoder_parts, columns, in_columns, D, LANES, BLOCK_D)
        power = tl.exp2(number.to(tl.float64) * tl.full((), LOG2_BETA2, tl.float64))
        correction = (1.0 - power).to(tl.float32)
        direction = gradient
        if m_ptr is None:
            learning_rate = tl.load(learning_rate_ptr).to(tl.float32)
        else:
            power_m = tl.exp2(number.to(tl.float64) * tl.full((), LOG2_BETA1, tl.float64))
            learning_rate = (tl.load(learning_rate_ptr) / (1.0 - power_m)).to(tl.float32)
            direction = BETA1 * tl.load(m_ptr + columns, mask=in_columns, other=0.0) + (1.0 - BETA1) * gradient
            tl.store(m_ptr + columns, direction, mask=in_columns)
        v = BETA2 * tl.load(v_ptr + columns, mask=in_columns, other=0.0) + (1.0 - BETA2) * (gradient * gradient)
        b_dec = tl.load(b_dec_ptr + columns, mask=in_columns, other=0.0)
        b_dec -= learning_rate * direction / (tl.sqrt(v / correction) + eps)
        tl.store(v_ptr + columns, v, mask=in_columns)
        tl.store(b_dec_ptr + columns, b_dec, mask=in_columns)


def finish(
    b_dec: Tensor,
    b_dec_v: Tensor,
    tokens_since_fired: Tensor,
    updates: Tensor,
    residual_sums: Tensor,
    of_encoder: Tensor | None,
    firing_count: Tensor,
    n: int,
    rule: Rule,
    ok: Tensor,
    number: Tensor,
    b_dec_m: Tensor | None = None,
) -> None:
    """By the contract of `reference.conclusion.finish`. Every SAE has a latent."""
    config, F, d = CONFIG, firing_count.shape[0], b_dec.shape[0]
    latent_blocks = triton.cdiv(F, config.block_f)
    launch(
        _finish_kernel,
        (latent_blocks + triton.cdiv(d, config.block_d),),
        on=b_dec,
        b_dec_ptr=b_dec,
        m_ptr=b_dec_m,
        v_ptr=b_dec_v,
        since_ptr=tokens_since_fired,
        updates_ptr=updates,
        sums_ptr=residual_sums.contiguous(),
        of_encoder_ptr=None if of_encoder is None else of_encoder.contiguous(),
        firing_count_ptr=firing_count,
        learning_rate_ptr=device_scalar(rule.learning_rate, b_dec),
        ok_ptr=ok,
        number_ptr=number,
        F=F,
        D=d,
        parts=residual_sums.shape[0],
        encoder_parts=0 if of_encoder is None else of_encoder.shape[0],
        latent_blocks=latent_blocks,
        n_tokens=n,
        scale=2 / n,
        eps=rule.eps,
        BETA1=rule.beta1,
        LOG2_BETA1=math.log2(rule.beta1) if rule.beta1 else None,
        BETA2=rule.beta2,
        LOG2_BETA2=math.log2(rule.beta2),
        BLOCK_F=config.block_f,
        BLOCK_D=config.block_d,
        BLOCK_N=config.block_n,
        LANES=config.lanes,
        num_warps=config.num_warps,
    )
