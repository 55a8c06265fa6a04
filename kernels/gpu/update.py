"""The update of the training step: gradients, projection, Adam, unit norm and copies of each latent, in one kernel.

For a latent j with entries, k = step + 1 updates after this one and `last` of them when it was last touched:

    dW_dec ← dW_dec − ⟨dW_dec, W_dec⟩·W_dec                                        (the row of latent j)
    v ← β2^(k − last)·v + (1 − β2)·g²;   p ← p − lr·g/(√(v/(1 − β2^k)) + eps)       for each parameter p, gradient g
    θ ← θ·exp(−lr·…) with g = θ·dθ (log), or θ − lr·… (raw), not below 0;   W_dec ← W_dec/‖W_dec‖;   last ← k

A latent without entries has zero gradients: under Adam with β1 = 0 it stays where it is, and the decay of its v is
owed until it is touched again, so skipping it changes nothing. With `ok` = 0 nothing is written at all. The gradients
are summed from the entries in registers, dW_enc = Σ dz·(x − b_dec) and dW_dec = Σ dec·r, or read from memory.

The state and all arithmetic are fp32, the powers of β2 fp64. One program does a latent, column block by column block,
then goes over its decoder row again to divide by the norm. Entry i of the latent is added to partial sum i mod `lanes`,
so the result depends on the latent's entries alone. The host reads neither `ok` nor `step`.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from ..entries import ByLatent, LatentState, LatentSums, Rule
from ..reference.training import settle
from .common import device_scalar, launch
from .decode import GatherConfig

__all__ = ["settle", "update_from_dense", "update_from_entries"]


# The two gathers and the update of a block take 64 registers on sm_90 (fp32 rows: 72), hence 28 warps a multiprocessor;
# twice the columns or lanes take 110 and leave 16.
CONFIG = GatherConfig(lanes=4, block_d=256, num_warps=4, num_stages=3)


@triton.jit
def _power_of_beta2(exponent, LOG2_BETA2: tl.constexpr):
    """β2 to an int64: fp64, since β2 in fp32 is wrong in the fourth digit after ten thousand steps."""
    return tl.exp2(exponent.to(tl.float64) * tl.full((), LOG2_BETA2, tl.float64))


@triton.jit
def _adam(v, gradient, decay, correction, learning_rate, eps, BETA2: tl.constexpr):
    """The second moments, brought up to date, and the step to subtract."""
    v = v * decay + (1.0 - BETA2) * (gradient * gradient)
    return v, learning_rate * gradient / (tl.sqrt(v / correction) + eps)


@triton.jit
def _update_kernel(
    W_enc_ptr, W_dec_ptr, b_enc_ptr, threshold_ptr, W_enc_v_ptr, W_dec_v_ptr, b_enc_v_ptr, threshold_v_ptr,
    last_ptr, W_enc_low_ptr, W_dec_low_ptr, lists_ptr, dz_ptr, dec_ptr, tokens_ptr, along_ptr,
    enc_rows_ptr, dec_rows_ptr, db_enc_ptr, dthreshold_ptr, ok_ptr, step_ptr, learning_rate_ptr, D, eps,
    BETA2: tl.constexpr, LOG2_BETA2: tl.constexpr, LOG_THRESHOLD: tl.constexpr, FROM_ENTRIES: tl.constexpr,
    LANES: tl.constexpr, BLOCK_D: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """lists: the offsets of the latents' entries, rows by token; or, not FROM_ENTRIES, touched, gradients by latent."""
    if tl.load(ok_ptr) == 0:
        return
    j = tl.program_id(0).to(tl.int64)
    first = tl.load(lists_ptr + j)
    length = (tl.load(lists_ptr + j + 1) - first).to(tl.int32) if FROM_ENTRIES else first
    if length <= 0:
        return
    step = tl.load(step_ptr) + 1
    learning_rate = tl.load(learning_rate_ptr).to(tl.float32)
    decay = _power_of_beta2(step - tl.load(last_ptr + j), LOG2_BETA2).to(tl.float32)
    correction = (1.0 - _power_of_beta2(step, LOG2_BETA2)).to(tl.float32)
    lanes = tl.arange(0, LANES)

    if FROM_ENTRIES:
        along = tl.load(along_ptr + j)
    else:
        products = tl.zeros((BLOCK_D,), tl.float32)
        for column in range(0, D, BLOCK_D):
            columns = column + tl.arange(0, BLOCK_D)
            in_columns = columns < D
            dW_dec = tl.load(dec_rows_ptr + j * D + columns, mask=in_columns, other=0.0).to(tl.float32)
            products += dW_dec * tl.load(W_dec_ptr + j * D + columns, mask=in_columns, other=0.0)
        along = tl.sum(products, 0)

    squares = tl.zeros((BLOCK_D,), tl.float32)
    for column in range(0, D, BLOCK_D):
        columns = column + tl.arange(0, BLOCK_D)
        in_columns = columns < D
        row = j * D + columns
        if FROM_ENTRIES:
            enc_sums = tl.zeros((LANES, BLOCK_D), tl.float32)
            dec_sums = tl.zeros((LANES, BLOCK_D), tl.float32)
            for start in tl.range(0, length, LANES, num_stages=NUM_STAGES):
                valid = start + lanes < length
                entries = first + start + lanes
                rows = tl.load(tokens_ptr + entries, mask=valid, other=0).to(tl.int64)[:, None] * D + columns[None, :]
                dz = tl.load(dz_ptr + entries, mask=valid, other=0.0)[:, None]
                dec = tl.load(dec_ptr + entries, mask=valid, other=0.0)[:, None]
                mask = valid[:, None] & in_columns[None, :]
                enc_sums += dz * tl.load(enc_rows_ptr + rows, mask=mask, other=0.0).to(tl.float32)
                dec_sums += dec * tl.load(dec_rows_ptr + rows, mask=mask, other=0.0).to(tl.float32)
            dW_enc, dW_dec = tl.sum(enc_sums, 0), tl.sum(dec_sums, 0)
        else:
            dW_enc = tl.load(enc_rows_ptr + row, mask=in_columns, other=0.0).to(tl.float32)
            dW_dec = tl.load(dec_rows_ptr + row, mask=in_columns, other=0.0).to(tl.float32)

        v = tl.load(W_enc_v_ptr + row, mask=in_columns, other=0.0)
        v, change = _adam(v, dW_enc, decay, correction, learning_rate, eps, BETA2)
        W_enc = tl.load(W_enc_ptr + row, mask=in_columns, other=0.0) - change
        tl.store(W_enc_v_ptr + row, v, mask=in_columns)
        tl.store(W_enc_ptr + row, W_enc, mask=in_columns)
        if W_enc_low_ptr is not None:
            tl.store(W_enc_low_ptr + row, W_enc.to(W_enc_low_ptr.dtype.element_ty), mask=in_columns)

        W_dec = tl.load(W_dec_ptr + row, mask=in_columns, other=0.0)
        v = tl.load(W_dec_v_ptr + row, mask=in_columns, other=0.0)
        v, change = _adam(v, dW_dec - along * W_dec, decay, correction, learning_rate, eps, BETA2)
        W_dec -= change
        tl.store(W_dec_v_ptr + row, v, mask=in_columns)
        tl.store(W_dec_ptr + row, W_dec, mask=in_columns)
        squares += W_dec * W_dec

    v = tl.load(b_enc_v_ptr + j)
    v, change = _adam(v, tl.load(db_enc_ptr + j), decay, correction, learning_rate, eps, BETA2)
    tl.store(b_enc_v_ptr + j, v)
    tl.store(b_enc_ptr + j, tl.load(b_enc_ptr + j) - change)

    threshold = tl.load(threshold_ptr + j)
    gradient = tl.load(dthreshold_ptr + j)
    if LOG_THRESHOLD:
        gradient *= threshold  # dL/dt = θ·dL/dθ for θ = exp(t)
    v = tl.load(threshold_v_ptr + j)
    v, change = _adam(v, gradient, decay, correction, learning_rate, eps, BETA2)
    threshold = threshold * tl.exp(-change) if LOG_THRESHOLD else threshold - change
    tl.store(threshold_v_ptr + j, v)
    tl.store(threshold_ptr + j, tl.where(threshold < 0, 0.0, threshold))  # a maximum would hide NaN

    norm = tl.sqrt(tl.sum(squares, 0))
    # What follows reads what other threads of the program stored, and overwrites what they read.
    tl.debug_barrier()
    tl.store(last_ptr + j, step)
    for column in range(0, D, BLOCK_D):
        columns = column + tl.arange(0, BLOCK_D)
        in_columns = columns < D
        row = j * D + columns
        W_dec = tl.load(W_dec_ptr + row, mask=in_columns, other=0.0) / norm
        tl.store(W_dec_ptr + row, W_dec, mask=in_columns)
        if W_dec_low_ptr is not None:
            tl.store(W_dec_low_ptr + row, W_dec.to(W_dec_low_ptr.dtype.element_ty), mask=in_columns)


def _launch(
    state: LatentState,
    lists: Tensor,
    sums: LatentSums | None,
    enc_rows: Tensor,
    dec_rows: Tensor,
    db_enc: Tensor,
    dthreshold: Tensor,
    rule: Rule,
    ok: Tensor,
    step: Tensor,
) -> None:
    config = CONFIG
    F, d = state.W_dec.shape
    if F == 0:
        return
    launch(
        _update_kernel,
        (F,),
        on=state.W_dec,
        W_enc_ptr=state.W_enc,
        W_dec_ptr=state.W_dec,
        b_enc_ptr=state.b_enc,
        threshold_ptr=state.threshold,
        W_enc_v_ptr=state.W_enc_v,
        W_dec_v_ptr=state.W_dec_v,
        b_enc_v_ptr=state.b_enc_v,
        threshold_v_ptr=state.threshold_v,
        last_ptr=state.last,
        W_enc_low_ptr=state.W_enc_low,
        W_dec_low_ptr=state.W_dec_low,
        lists_ptr=lists,
        dz_ptr=sums.dz if sums else None,
        dec_ptr=sums.dec if sums else None,
        tokens_ptr=sums.tokens if sums else None,
        along_ptr=sums.along if sums else None,
        enc_rows_ptr=enc_rows.contiguous(),
        dec_rows_ptr=dec_rows.contiguous(),
        db_enc_ptr=db_enc,
        dthreshold_ptr=dthreshold,
        ok_ptr=ok,
        step_ptr=step,
        learning_rate_ptr=device_scalar(rule.learning_rate, state.W_dec),
        D=d,
        eps=rule.eps,
        BETA2=rule.beta2,
        LOG2_BETA2=math.log2(rule.beta2),
        LOG_THRESHOLD=rule.log_threshold,
        FROM_ENTRIES=sums is not None,
        LANES=config.lanes,
        BLOCK_D=config.block_d,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
    )


def update_from_entries(
    state: LatentState,
    transposed: ByLatent,
    sums: LatentSums,
    residual: Tensor,
    x_centred: Tensor,
    rule: Rule,
    ok: Tensor,
    step: Tensor,
) -> None:
    """Adam on every latent that has entries, unless ``ok`` (int32 scalar) is 0. step: int64 scalar, updates so far.

    residual and x_centred = x − b_dec: [N, d] of any float dtype. The state's tensors are contiguous.
    """
    _launch(state, transposed.offsets, sums, x_centred, residual, sums.db_enc, sums.dthreshold, rule, ok, step)


def update_from_dense(
    state: LatentState,
    dW_enc: Tensor,
    dW_dec: Tensor,
    db_enc: Tensor,
    dthreshold: Tensor,
    touched: Tensor,
    rule: Rule,
    ok: Tensor,
    step: Tensor,
) -> None:
    """The same from gradients [F, d] that stand in memory, of the latents with touched [F] (int32) > 0."""
    _launch(state, touched, None, dW_enc, dW_dec, db_enc, dthreshold, rule, ok, step)
