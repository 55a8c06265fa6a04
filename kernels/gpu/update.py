"""The update of the training step: gradients, projection, Adam, unit norm and copies of each latent, in one pass.

For a latent j with entries, k = step + 1 updates after this one and `last` of them when it was last touched:

    dW_dec ← dW_dec − ⟨dW_dec, W_dec⟩·W_dec                                        (the row of latent j)
    m ← β1^(k − last)·m + (1 − β1)·g;   v ← β2^(k − last)·v + (1 − β2)·g²           for each parameter p, gradient g
    p ← p − lr·(m/(1 − β1^k))/(√(v/(1 − β2^k)) + eps)
    θ ← θ·exp(−lr·…) with g = θ·dθ (log), or θ − lr·… (raw), not below 0;   W_dec ← W_dec/‖W_dec‖;   last ← k

A latent without entries has zero gradients: with β1 = 0, where m is g and is neither kept nor compiled, it stays where
it is, and the decay of its v is owed until it is touched again, so skipping it changes nothing. With β1 > 0 it waits
where Adam would let it drift on, and owes the decay of its m too. With `ok` = 0 nothing is written at all. The
gradients are summed from the entries in registers, dW_enc = Σ dz·(x − b_dec) and dW_dec = Σ dec·r, or read from memory.
The state and all arithmetic are fp32, the powers of β1 and β2 fp64. The host reads neither `ok` nor `step` nor the
length of a list.

The rows of W_enc and W_dec may differ in width; columns that one of them lacks are masked.

One warp does a latent, column block by column block, entry after entry, then goes over its decoder row again to divide
by the norm. A list of `long` entries or more would keep it busy long after all others: such lists are done first, by a
program for each column block, in which entry i is added to partial sum i mod `lanes`. It leaves the row's squares in
memory, from which the ordinary program, in the second launch, takes the norm. Two long lists begin at least `long`
entries apart, so the latent's offset divided by `long` is a place in memory that is its own. Every sum depends on the
latent's entries alone.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..entries import ByLatent, LatentState, LatentSums, Rule
from ..reference.training import settle
from .common import device_scalar, launch

__all__ = ["settle", "update_from_dense", "update_from_entries"]


@dataclass(frozen=True)
class UpdateConfig:
    block_d: int  # columns taken together
    unroll: int  # entries whose rows are on their way together, in each lane
    num_warps: int
    long: int  # entries from which a list is long
    lanes: int  # partial sums of a long list
    long_warps: int
    long_programs: int  # that look for long lists, for each column block


# One warp reads 256 columns of a row and needs no other to sum them: by count a latent of 17 entries takes 11,500
# instructions on sm_90, where four warps took 41,000, and 64 registers. Four entries are fetched in about 1,000 cycles,
# so that a list of 64, with 9 blocks, should be over within .1 ms.
CONFIG = UpdateConfig(block_d=256, unroll=4, num_warps=1, long=64, lanes=8, long_warps=8, long_programs=1024)

# Columns of a thread, whatever their type: 16 bytes of fp32. For 8, as bf16 has them, each store would first exchange
# its values among the threads.
_COLUMNS = tl.constexpr(4)


@triton.jit
def _power(exponent, LOG2_BETA: tl.constexpr):
    """β to an int64: fp64, since β2 in fp32 is wrong in the fourth digit after ten thousand steps."""
    return tl.exp2(exponent.to(tl.float64) * tl.full((), LOG2_BETA, tl.float64))


@triton.jit
def _factors(step, last, learning_rate_ptr, LOG2_BETA1: tl.constexpr, LOG2_BETA2: tl.constexpr):
    """The decays that m and v owe, 1/(1 − β2^k) and the learning rate over 1 − β1^k, in fp32. LOG2_BETA1: None where β1
    is 0 and the decay 0."""
    decay = _power(step - last, LOG2_BETA2)
    unbias = 1.0 / (1.0 - _power(step, LOG2_BETA2))
    decay, unbias = decay.to(tl.float32), unbias.to(tl.float32)
    if LOG2_BETA1 is None:
        return 0.0, decay, unbias, tl.load(learning_rate_ptr).to(tl.float32)
    else:
        decay_m = _power(step - last, LOG2_BETA1)
        learning_rate = tl.load(learning_rate_ptr) / (1.0 - _power(step, LOG2_BETA1))
        return decay_m.to(tl.float32), decay, unbias, learning_rate.to(tl.float32)


@triton.jit
def _first_moment(m_ptr, at, mask, gradient, decay, BETA1: tl.constexpr):
    """Brought up to date in memory; without one, the gradient."""
    if m_ptr is None:
        return gradient
    else:
        m = tl.load(m_ptr + at, mask=mask, other=0.0, eviction_policy="evict_first")
        m = m * decay + (1.0 - BETA1) * gradient
        tl.store(m_ptr + at, m, mask=mask, eviction_policy="evict_first")
        return m


@triton.jit
def _second_moment(v, gradient, decay, BETA2: tl.constexpr):
    return v * decay + (1.0 - BETA2) * (gradient * gradient)


@triton.jit
def _root(v, unbias, eps):
    return tl.sqrt(v * unbias) + eps


@triton.jit
def _over(numerator, root):
    """numerator/root in 3 instructions instead of the 8 of a division, which looks for roots beyond 2^±126: that of an
    fp32 second moment is never there."""
    inverse = tl.rsqrt(root)
    return numerator * (inverse * inverse)


@triton.jit
def _in_row(columns, D: tl.constexpr, LONGEST: tl.constexpr, BLOCK_D: tl.constexpr):
    """Which of the columns, up to LONGEST and the end of its block, a row of D has: all of them, and the compiler knows
    it, where the blocks fill the row."""
    if D % BLOCK_D == 0 and D == LONGEST:
        return tl.full((BLOCK_D,), True, tl.int1)
    else:
        return columns < D


@triton.jit
def _columns_from(column, BLOCK_D: tl.constexpr):
    return tl.max_contiguous(column + tl.arange(0, BLOCK_D), _COLUMNS)


@triton.jit
def _entry(
    dz_ptr, dec_ptr, tokens_ptr, enc_table, dec_table, entry, in_enc, in_dec, D_IN: tl.constexpr, D_OUT: tl.constexpr
):  # fmt: skip
    """The two coefficients of an entry, each with its row's columns of a table."""
    token = tl.load(tokens_ptr + entry).to(tl.int64)
    x = tl.load(enc_table + token * D_IN, mask=in_enc, other=0.0).to(tl.float32)
    r = tl.load(dec_table + token * D_OUT, mask=in_dec, other=0.0).to(tl.float32)
    return tl.load(dz_ptr + entry), x, tl.load(dec_ptr + entry), r


@triton.jit
def _update_columns(
    W_enc_ptr, W_dec_ptr, W_enc_m_ptr, W_dec_m_ptr, W_enc_v_ptr, W_dec_v_ptr, W_enc_low_ptr, at_enc, at_dec, in_enc,
    in_dec, dW_enc, dW_dec, along, decay_m, decay, unbias, learning_rate, eps, BETA1: tl.constexpr,
    BETA2: tl.constexpr,
):  # fmt: skip
    """Projection and Adam of the columns ``at_enc`` and ``at_dec``; returns the decoder row's, its norm still to be
    divided by.

    What passes by once is the first that the caches may give up, before the rows that the entries gather.
    """
    W_enc = tl.load(W_enc_ptr + at_enc, mask=in_enc, other=0.0, eviction_policy="evict_first")
    W_dec = tl.load(W_dec_ptr + at_dec, mask=in_dec, other=0.0, eviction_policy="evict_first")
    enc_v = tl.load(W_enc_v_ptr + at_enc, mask=in_enc, other=0.0, eviction_policy="evict_first")
    dec_v = tl.load(W_dec_v_ptr + at_dec, mask=in_dec, other=0.0, eviction_policy="evict_first")

    enc_v = _second_moment(enc_v, dW_enc, decay, BETA2)
    enc_m = _first_moment(W_enc_m_ptr, at_enc, in_enc, dW_enc, decay_m, BETA1)
    W_enc -= _over(learning_rate * enc_m, _root(enc_v, unbias, eps))
    tl.store(W_enc_v_ptr + at_enc, enc_v, mask=in_enc, eviction_policy="evict_first")
    tl.store(W_enc_ptr + at_enc, W_enc, mask=in_enc, eviction_policy="evict_first")
    if W_enc_low_ptr is not None:
        low = W_enc.to(W_enc_low_ptr.dtype.element_ty)
        tl.store(W_enc_low_ptr + at_enc, low, mask=in_enc, eviction_policy="evict_first")

    dW_dec -= along * W_dec
    dec_v = _second_moment(dec_v, dW_dec, decay, BETA2)
    dec_m = _first_moment(W_dec_m_ptr, at_dec, in_dec, dW_dec, decay_m, BETA1)
    W_dec -= _over(learning_rate * dec_m, _root(dec_v, unbias, eps))
    tl.store(W_dec_v_ptr + at_dec, dec_v, mask=in_dec, eviction_policy="evict_first")
    tl.store(W_dec_ptr + at_dec, W_dec, mask=in_dec)
    return tl.where(in_dec, W_dec, 0.0)  # 0/0 and 0·NaN beyond the row would spoil its norm


@triton.jit
def _long_lists_kernel(
    W_enc_ptr, W_dec_ptr, W_enc_m_ptr, W_dec_m_ptr, W_enc_v_ptr, W_dec_v_ptr, last_ptr, W_enc_low_ptr,
    lists_ptr, dz_ptr, dec_ptr, tokens_ptr, along_ptr, enc_rows_ptr, dec_rows_ptr, squares_ptr,
    ok_ptr, step_ptr, learning_rate_ptr, F, eps, D_IN: tl.constexpr, D_OUT: tl.constexpr,
    BETA1: tl.constexpr, LOG2_BETA1: tl.constexpr, BETA2: tl.constexpr, LOG2_BETA2: tl.constexpr,
    LONG: tl.constexpr, LISTS: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The long lists among LISTS that lie as far apart as they can (neighbours may be alike), for a block of columns.

    squares: [capacity // LONG, blocks], at the place of the list.
    """
    LONGEST: tl.constexpr = D_IN if D_IN > D_OUT else D_OUT
    if tl.load(ok_ptr) == 0:
        return
    candidates = tl.program_id(0) + tl.num_programs(0) * tl.arange(0, LISTS)
    exists = candidates < F
    firsts = tl.load(lists_ptr + candidates, mask=exists, other=0)
    is_long = tl.load(lists_ptr + candidates + 1, mask=exists, other=0) - firsts >= LONG
    j = tl.min(tl.where(is_long, candidates, F), 0)
    if j >= F:
        return
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_enc, in_dec = _in_row(columns, D_IN, LONGEST, BLOCK_D), _in_row(columns, D_OUT, LONGEST, BLOCK_D)
    enc_table, dec_table = enc_rows_ptr + columns[None, :], dec_rows_ptr + columns[None, :]
    lanes = tl.arange(0, LANES)
    step = tl.load(step_ptr) + 1
    while j < F:
        first = tl.load(lists_ptr + j)
        length = (tl.load(lists_ptr + j + 1) - first).to(tl.int32)
        enc_sums = tl.zeros((LANES, BLOCK_D), tl.float32)
        dec_sums = tl.zeros((LANES, BLOCK_D), tl.float32)
        for start in range(0, length, LANES * UNROLL):
            for i in tl.static_range(UNROLL):
                place = start + i * LANES + lanes
                valid = place < length
                rows = tl.load(tokens_ptr + first + place, mask=valid, other=0).to(tl.int64)[:, None]
                dz = tl.load(dz_ptr + first + place, mask=valid, other=0.0)[:, None]
                dec = tl.load(dec_ptr + first + place, mask=valid, other=0.0)[:, None]
                enc_mask, dec_mask = valid[:, None] & in_enc[None, :], valid[:, None] & in_dec[None, :]
                enc_sums += dz * tl.load(enc_table + rows * D_IN, mask=enc_mask, other=0.0).to(tl.float32)
                dec_sums += dec * tl.load(dec_table + rows * D_OUT, mask=dec_mask, other=0.0).to(tl.float32)

        last = tl.load(last_ptr + j)
        decay_m, decay, unbias, learning_rate = _factors(step, last, learning_rate_ptr, LOG2_BETA1, LOG2_BETA2)
        at_enc, at_dec = j.to(tl.int64) * D_IN + columns, j.to(tl.int64) * D_OUT + columns
        W_dec = _update_columns(
            W_enc_ptr, W_dec_ptr, W_enc_m_ptr, W_dec_m_ptr, W_enc_v_ptr, W_dec_v_ptr, W_enc_low_ptr, at_enc, at_dec,
            in_enc, in_dec, tl.sum(enc_sums, 0), tl.sum(dec_sums, 0), tl.load(along_ptr + j), decay_m, decay, unbias,
            learning_rate, eps, BETA1, BETA2,
        )  # fmt: skip
        place = first // LONG * tl.num_programs(1) + tl.program_id(1)
        tl.store(squares_ptr + place, tl.sum(W_dec * W_dec, 0))
        j = tl.min(tl.where(is_long & (candidates > j), candidates, F), 0)


@triton.jit
def _update_kernel(
    W_enc_ptr, W_dec_ptr, b_enc_ptr, threshold_ptr, W_enc_m_ptr, W_dec_m_ptr, b_enc_m_ptr, threshold_m_ptr,
    W_enc_v_ptr, W_dec_v_ptr, b_enc_v_ptr, threshold_v_ptr,
    last_ptr, W_enc_low_ptr, W_dec_low_ptr, lists_ptr, dz_ptr, dec_ptr, tokens_ptr, along_ptr,
    enc_rows_ptr, dec_rows_ptr, db_enc_ptr, dthreshold_ptr, squares_ptr, ok_ptr, step_ptr, learning_rate_ptr, eps,
    D_IN: tl.constexpr, D_OUT: tl.constexpr,
    BETA1: tl.constexpr, LOG2_BETA1: tl.constexpr, BETA2: tl.constexpr, LOG2_BETA2: tl.constexpr,
    LOG_THRESHOLD: tl.constexpr, FROM_ENTRIES: tl.constexpr, LONG: tl.constexpr, BLOCKS: tl.constexpr,
    UNROLL: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """lists: the offsets of the latents' entries, rows by token; or, not FROM_ENTRIES, touched, gradients by latent."""
    LONGEST: tl.constexpr = D_IN if D_IN > D_OUT else D_OUT
    if tl.load(ok_ptr) == 0:
        return
    j = tl.program_id(0).to(tl.int64)
    first = tl.load(lists_ptr + j)
    length = (tl.load(lists_ptr + j + 1) - first).to(tl.int32) if FROM_ENTRIES else first
    if length <= 0:
        return
    step = tl.load(step_ptr) + 1
    last = tl.load(last_ptr + j)
    decay_m, decay, unbias, learning_rate = _factors(step, last, learning_rate_ptr, LOG2_BETA1, LOG2_BETA2)

    if FROM_ENTRIES:
        along = tl.load(along_ptr + j)
        whole = length - length % UNROLL
        dz_ptr += first
        dec_ptr += first
        tokens_ptr += first
    else:
        products = tl.zeros((BLOCK_D,), tl.float32)
        for column in range(0, D_OUT, BLOCK_D):
            columns = _columns_from(column, BLOCK_D)
            at, in_row = j * D_OUT + columns, _in_row(columns, D_OUT, D_OUT, BLOCK_D)
            dW_dec = tl.load(dec_rows_ptr + at, mask=in_row, other=0.0)
            products += dW_dec * tl.load(W_dec_ptr + at, mask=in_row, other=0.0)
        along = tl.sum(products, 0)

    if squares_ptr is None or length < LONG:
        squares = tl.zeros((BLOCK_D,), tl.float32)
        for column in range(0, LONGEST, BLOCK_D):
            columns = _columns_from(column, BLOCK_D)
            in_enc, in_dec = _in_row(columns, D_IN, LONGEST, BLOCK_D), _in_row(columns, D_OUT, LONGEST, BLOCK_D)
            at_enc, at_dec = j * D_IN + columns, j * D_OUT + columns
            if FROM_ENTRIES:
                dW_enc = tl.zeros((BLOCK_D,), tl.float32)
                dW_dec = tl.zeros((BLOCK_D,), tl.float32)
                enc_table, dec_table = enc_rows_ptr + columns, dec_rows_ptr + columns
                for start in range(0, whole, UNROLL):
                    for i in tl.static_range(UNROLL):
                        dz, x, dec, r = _entry(
                            dz_ptr, dec_ptr, tokens_ptr, enc_table, dec_table, start + i, in_enc, in_dec, D_IN, D_OUT
                        )  # fmt: skip
                        dW_enc += dz * x
                        dW_dec += dec * r
                for i in range(whole, length):
                    dz, x, dec, r = _entry(
                        dz_ptr, dec_ptr, tokens_ptr, enc_table, dec_table, i, in_enc, in_dec, D_IN, D_OUT
                    )
                    dW_enc += dz * x
                    dW_dec += dec * r
            else:
                dW_enc = tl.load(enc_rows_ptr + at_enc, mask=in_enc, other=0.0)
                dW_dec = tl.load(dec_rows_ptr + at_dec, mask=in_dec, other=0.0)
            W_dec = _update_columns(
                W_enc_ptr, W_dec_ptr, W_enc_m_ptr, W_dec_m_ptr, W_enc_v_ptr, W_dec_v_ptr, W_enc_low_ptr, at_enc,
                at_dec, in_enc, in_dec, dW_enc, dW_dec, along, decay_m, decay, unbias, learning_rate, eps, BETA1,
                BETA2,
            )  # fmt: skip
            squares += W_dec * W_dec
        square = tl.sum(squares, 0)
    else:
        blocks = tl.arange(0, triton.next_power_of_2(BLOCKS))
        place = first // LONG * BLOCKS + blocks
        square = tl.sum(tl.load(squares_ptr + place, mask=blocks < BLOCKS, other=0.0), 0)

    gradient = tl.load(db_enc_ptr + j)
    v = _second_moment(tl.load(b_enc_v_ptr + j), gradient, decay, BETA2)
    tl.store(b_enc_v_ptr + j, v)
    m = _first_moment(b_enc_m_ptr, j, True, gradient, decay_m, BETA1)
    tl.store(b_enc_ptr + j, tl.load(b_enc_ptr + j) - learning_rate * m / _root(v, unbias, eps))

    threshold = tl.load(threshold_ptr + j)
    gradient = tl.load(dthreshold_ptr + j)
    if LOG_THRESHOLD:
        gradient *= threshold  # dL/dt = θ·dL/dθ for θ = exp(t)
    v = _second_moment(tl.load(threshold_v_ptr + j), gradient, decay, BETA2)
    m = _first_moment(threshold_m_ptr, j, True, gradient, decay_m, BETA1)
    change = learning_rate * m / _root(v, unbias, eps)
    threshold = threshold * tl.exp(-change) if LOG_THRESHOLD else threshold - change
    tl.store(threshold_v_ptr + j, v)
    tl.store(threshold_ptr + j, tl.where(threshold < 0, 0.0, threshold))  # a maximum would hide NaN

    inverse_norm = tl.div_rn(1.0, tl.sqrt_rn(square))
    # What follows may read what other threads of the program stored, and overwrites what they read.
    tl.debug_barrier()
    tl.store(last_ptr + j, step)
    for column in range(0, D_OUT, BLOCK_D):
        columns = _columns_from(column, BLOCK_D)
        at, in_row = j * D_OUT + columns, _in_row(columns, D_OUT, D_OUT, BLOCK_D)
        W_dec = tl.load(W_dec_ptr + at, mask=in_row, other=0.0) * inverse_norm
        tl.store(W_dec_ptr + at, W_dec, mask=in_row, eviction_policy="evict_first")
        if W_dec_low_ptr is not None:
            low = W_dec.to(W_dec_low_ptr.dtype.element_ty)
            tl.store(W_dec_low_ptr + at, low, mask=in_row, eviction_policy="evict_first")


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
    (F, d_out), d_in = state.W_dec.shape, state.W_enc.shape[1]
    if F == 0:
        return
    blocks = triton.cdiv(max(d_in, d_out), config.block_d)
    shared = {
        "on": state.W_dec,
        "W_enc_ptr": state.W_enc,
        "W_dec_ptr": state.W_dec,
        "W_enc_m_ptr": state.W_enc_m,
        "W_dec_m_ptr": state.W_dec_m,
        "W_enc_v_ptr": state.W_enc_v,
        "W_dec_v_ptr": state.W_dec_v,
        "last_ptr": state.last,
        "W_enc_low_ptr": state.W_enc_low,
        "lists_ptr": lists,
        "dz_ptr": sums.dz if sums else None,
        "dec_ptr": sums.dec if sums else None,
        "tokens_ptr": sums.tokens if sums else None,
        "along_ptr": sums.along if sums else None,
        "enc_rows_ptr": enc_rows.contiguous(),
        "dec_rows_ptr": dec_rows.contiguous(),
        "squares_ptr": None,
        "ok_ptr": ok,
        "step_ptr": step,
        "learning_rate_ptr": device_scalar(rule.learning_rate, state.W_dec),
        "eps": rule.eps,
        "D_IN": d_in,
        "D_OUT": d_out,
        "BETA1": rule.beta1,
        "LOG2_BETA1": math.log2(rule.beta1) if rule.beta1 else None,
        "BETA2": rule.beta2,
        "LOG2_BETA2": math.log2(rule.beta2),
        "LONG": config.long,
        "UNROLL": config.unroll,
        "BLOCK_D": config.block_d,
    }
    most_long = len(sums.dz) // config.long if sums else 0
    if most_long > 0:
        programs = min(F, config.long_programs)
        shared["squares_ptr"] = torch.empty(most_long, blocks, dtype=torch.float32, device=state.W_dec.device)
        launch(
            _long_lists_kernel,
            (programs, blocks),
            **shared,
            F=F,
            LISTS=triton.next_power_of_2(triton.cdiv(F, programs)),
            LANES=config.lanes,
            num_warps=config.long_warps,
        )
    launch(
        _update_kernel,
        (F,),
        **shared,
        b_enc_ptr=state.b_enc,
        threshold_ptr=state.threshold,
        b_enc_m_ptr=state.b_enc_m,
        threshold_m_ptr=state.threshold_m,
        b_enc_v_ptr=state.b_enc_v,
        threshold_v_ptr=state.threshold_v,
        W_dec_low_ptr=state.W_dec_low,
        db_enc_ptr=db_enc,
        dthreshold_ptr=dthreshold,
        LOG_THRESHOLD=rule.log_threshold,
        FROM_ENTRIES=sums is not None,
        BLOCKS=blocks,
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

    residual [N, d_out] and x_centred = x − b_dec [N, d_in] of any float dtype. The state's tensors are contiguous.
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
    """The same from gradients [F, d_in] and [F, d_out] in memory, of the latents with touched [F] (int32) > 0."""
    _launch(state, touched, None, dW_enc, dW_dec, db_enc, dthreshold, rule, ok, step)
