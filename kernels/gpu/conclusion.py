"""Whether the update of a training step may be made, and the step's figures, from what was summed before; two launches.

The formulas are those of `reference/conclusion.py`:

    L = mean_n ‖r_n‖² + S;   an update is permitted when L is finite, no gradient of a latent can exceed the limit, and
    neither this step nor one before it lacked room for entries or found copies that are not those of the weights

First a program looks at a block of latents: the largest threshold that was touched, Σ_j (count_j/N)², and whether one
column of the weights differs from its bf16 copy. Then a single program adds up what is left by token, by part and by
block, in fixed orders, decides, and leaves the figures, fp64, as `training.step.StepFigures` names them. Sums are fp32.
The median is the value that fewer than half of the tokens lie below, found bit by bit from the highest one.

What λ and the column are is read from the device, so a captured launch does what they say when it is replayed.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..entries import COPIES, ROOM, ByLatent, Conclusion, LatentState, Objective, Penalty, TokenSums
from ..reference.conclusion import gradient_limit
from .common import device_scalar, launch

_ROOM, _COPIES = tl.constexpr(ROOM), tl.constexpr(COPIES)
FIGURES = 9


@dataclass(frozen=True)
class ConcludeConfig:
    block_f: int  # latents of a program
    warps_f: int
    block: int  # tokens, or parts, that the last program takes together
    num_warps: int


# The last program runs alone, so that registers cost nothing: a batch of 4,096 tokens is one tile, for each of the
# median's bits too. More warps, or smaller tiles, spilt a few words on sm_80 or sm_100.
CONFIG = ConcludeConfig(block_f=1024, warps_f=4, block=4096, num_warps=4)


@triton.jit
def _touched_kernel(
    threshold_ptr, lists_ptr, firing_count_ptr, W_enc_ptr, W_dec_ptr, W_enc_low_ptr, W_dec_low_ptr, column_ptr,
    sums_ptr, N, F, D, FROM_LISTS: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """sums [3, blocks]: the largest threshold touched, Σ (count/N)², 1 where a copy differs. lists: the offsets of the
    latents' entries, or, not FROM_LISTS, whether each was touched."""
    block, blocks = tl.program_id(0), tl.num_programs(0)
    j = block * BLOCK_F + tl.arange(0, BLOCK_F)
    in_latents = j < F
    touched = tl.load(lists_ptr + j, mask=in_latents, other=0)
    if FROM_LISTS:
        touched = tl.load(lists_ptr + j + 1, mask=in_latents, other=0) - touched
    threshold = tl.load(threshold_ptr + j, mask=in_latents, other=0.0)
    threshold = tl.where(touched > 0, threshold, 0.0)
    threshold = tl.where(threshold == threshold, threshold, float("inf"))  # a maximum would hide NaN
    tl.store(sums_ptr + block, tl.max(threshold, 0))
    share = tl.load(firing_count_ptr + j, mask=in_latents, other=0).to(tl.float32) / N
    tl.store(sums_ptr + blocks + block, tl.sum(share * share, 0))
    if column_ptr is not None:
        places = j.to(tl.int64) * D + tl.load(column_ptr).to(tl.int64)
        W_enc = tl.load(W_enc_ptr + places, mask=in_latents, other=0.0).to(W_enc_low_ptr.dtype.element_ty)
        W_dec = tl.load(W_dec_ptr + places, mask=in_latents, other=0.0).to(W_dec_low_ptr.dtype.element_ty)
        W_enc_low = tl.load(W_enc_low_ptr + places, mask=in_latents, other=0.0)
        W_dec_low = tl.load(W_dec_low_ptr + places, mask=in_latents, other=0.0)
        differ = (W_enc.to(tl.float32) != W_enc_low.to(tl.float32)) | (W_dec.to(tl.float32) != W_dec_low.to(tl.float32))
        tl.store(sums_ptr + 2 * blocks + block, tl.max(differ.to(tl.int32), 0).to(tl.float32))


@triton.jit
def _total(ptr, length, SQUARED: tl.constexpr, BLOCK: tl.constexpr):
    """Σ of fp32 numbers, or of their squares."""
    totals = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, length, BLOCK):
        places = start + tl.arange(0, BLOCK)
        values = tl.load(ptr + places, mask=places < length, other=0.0)
        totals += values * values if SQUARED else values
    return tl.sum(totals, 0)


@triton.jit
def _median(ptr, length, BLOCK: tl.constexpr):
    """The lower median of numbers that are not negative, NaN if one is NaN; as ordered bits, highest first."""
    nans = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, length, BLOCK):
        places = start + tl.arange(0, BLOCK)
        values = tl.load(ptr + places, mask=places < length, other=0.0)
        nans += (values != values).to(tl.int32)
    found = tl.full((), 0, tl.int32)
    for bit in range(0, 31):
        trial = found | (1 << (30 - bit))
        below = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, length, BLOCK):
            places = start + tl.arange(0, BLOCK)
            values = tl.load(ptr + places, mask=places < length, other=float("inf")).to(tl.int32, bitcast=True)
            below += ((values < trial) & (places < length)).to(tl.int32)
        found = tl.where(tl.sum(below, 0) <= (length - 1) // 2, trial, found)
    return tl.where(tl.sum(nans, 0) > 0, float("nan"), found.to(tl.float32, bitcast=True))


@triton.jit
def _conclude_kernel(
    squared_error_ptr, l0_ptr, s_ptr, spread_ptr, shares_ptr, x_norms_ptr, f_norms_ptr, tanh_sums_ptr, sums_ptr,
    coefficient_ptr, n_entries_ptr, stalled_ptr, skipped_ptr, updates_ptr, ok_ptr, number_ptr, figures_ptr,
    N, capacity, x_parts, f_parts, blocks, factor, target, frequency_scale, tanh_scale, bandwidth, limit, root_n,
    OF_L0: tl.constexpr, OF_BATCH: tl.constexpr, HAS_FREQUENCY: tl.constexpr, OF_F: tl.constexpr,
    STE_TO_Z: tl.constexpr, HAS_COPIES: tl.constexpr, HAS_CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    coefficient = tl.load(coefficient_ptr).to(tl.float64)
    squared_error = _total(squared_error_ptr, N, False, BLOCK) / N
    l0 = _total(l0_ptr, N, False, BLOCK) / N

    loss = squared_error
    if OF_L0 == "linear":
        loss += coefficient.to(tl.float32) * l0
    if OF_L0 == "quadratic":
        if OF_BATCH:
            excess = (l0 - target) * (l0 - target)
        else:
            excesses = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, N, BLOCK):
                places = start + tl.arange(0, BLOCK)
                excess = tl.load(l0_ptr + places, mask=places < N, other=0.0) - target
                excesses += tl.where(places < N, excess * excess, 0.0)
            excess = tl.sum(excesses, 0) / N
        loss += (coefficient * factor).to(tl.float32) * excess
    frequency_slope, tanh_slope = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)  # times N², N
    if HAS_FREQUENCY:
        per_share = (coefficient / frequency_scale).to(tl.float32)
        loss += _total(sums_ptr + blocks, blocks, False, BLOCK) * per_share
        frequency_slope += 2.0 * per_share
    if tanh_sums_ptr is not None:
        loss += _total(tanh_sums_ptr, f_parts, False, BLOCK) * (coefficient / N).to(tl.float32)
        if OF_F:
            tanh_slope += coefficient.to(tl.float32)
        else:
            tanh_slope += (coefficient * tanh_scale).to(tl.float32)

    theta = tl.full((), 0.0, tl.float32)
    for start in range(0, blocks, BLOCK):
        places = start + tl.arange(0, BLOCK)
        theta = tl.maximum(theta, tl.max(tl.load(sums_ptr + places, mask=places < blocks, other=0.0), 0))
    slopes = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        places = start + tl.arange(0, BLOCK)
        slopes += tl.abs(tl.load(s_ptr + places, mask=places < N, other=0.0))
    error = 2.0 * tl.sqrt(squared_error)
    u = error + tanh_slope
    q = (theta * u + tl.sum(slopes, 0) + frequency_slope) / bandwidth
    dz = u
    if STE_TO_Z:
        dz += q
    x_norm = tl.sqrt(_total(x_norms_ptr, x_parts, True, BLOCK))
    f_norm = tl.sqrt(_total(f_norms_ptr, f_parts, True, BLOCK))
    finite = tl.abs(loss) < float("inf")
    # Each is a comparison that NaN fails.
    bounded = (dz <= limit) & (x_norm * dz <= limit) & (q <= limit) & (theta * q <= limit)
    bounded = bounded & (error * f_norm / root_n <= limit)

    n_entries = tl.load(n_entries_ptr)
    stalled = tl.load(stalled_ptr)
    if HAS_COPIES:
        differ = _total(sums_ptr + 2 * blocks, blocks, False, BLOCK) > 0
        stalled = stalled | tl.where(differ, _COPIES, 0).to(tl.int64)
    if HAS_CAPACITY:
        stalled = stalled | tl.where((n_entries > capacity) & finite, _ROOM, 0).to(tl.int64)
    may_be_made, free = finite & bounded, stalled == 0
    skipped = tl.load(skipped_ptr) + ((may_be_made == 0) & free).to(tl.int64)
    ok = (may_be_made & free).to(tl.int32)
    tl.store(stalled_ptr, stalled)
    tl.store(skipped_ptr, skipped)
    tl.store(ok_ptr, ok)
    tl.store(number_ptr, tl.load(updates_ptr) + 1)

    tl.store(figures_ptr, loss.to(tl.float64))
    tl.store(figures_ptr + 1, squared_error.to(tl.float64))
    tl.store(figures_ptr + 2, (squared_error / (_total(spread_ptr, N, False, BLOCK) / N)).to(tl.float64))
    tl.store(figures_ptr + 3, _median(shares_ptr, N, BLOCK).to(tl.float64))
    tl.store(figures_ptr + 4, l0.to(tl.float64))
    tl.store(figures_ptr + 5, n_entries.to(tl.float64))
    tl.store(figures_ptr + 6, stalled.to(tl.float64))
    tl.store(figures_ptr + 7, ok.to(tl.float64))
    tl.store(figures_ptr + 8, skipped.to(tl.float64))


def conclude(
    latents: LatentState,
    squared_error: Tensor,
    l0: Tensor,
    tokens: TokenSums,
    x_norms: Tensor,
    touched: ByLatent | Tensor,
    firing_count: Tensor,
    n_entries: Tensor,
    capacity: int | None,
    penalty: Penalty,
    objective: Objective,
    column: int | Tensor | None,
    stalled: Tensor,
    skipped: Tensor,
    updates: Tensor,
) -> Conclusion:
    """By the contract of `reference.conclusion.conclude`. Every batch has a token."""
    config, device = CONFIG, l0.device
    (F, d), N = latents.W_dec.shape, l0.shape[0]
    blocks, from_lists = triton.cdiv(F, config.block_f), isinstance(touched, ByLatent)
    place = None if column is None or latents.W_enc_low is None else device_scalar(column, l0)
    sums = torch.empty(3, blocks, dtype=torch.float32, device=device)
    if blocks > 0:
        launch(
            _touched_kernel,
            (blocks,),
            on=l0,
            threshold_ptr=latents.threshold,
            lists_ptr=touched.offsets if isinstance(touched, ByLatent) else touched,
            firing_count_ptr=firing_count,
            W_enc_ptr=latents.W_enc,
            W_dec_ptr=latents.W_dec,
            W_enc_low_ptr=latents.W_enc_low,
            W_dec_low_ptr=latents.W_dec_low,
            column_ptr=place,
            sums_ptr=sums,
            N=N,
            F=F,
            D=d,
            FROM_LISTS=from_lists,
            BLOCK_F=config.block_f,
            num_warps=config.warps_f,
        )
    ok = torch.empty((), dtype=torch.int32, device=device)
    number = torch.empty((), dtype=torch.int64, device=device)
    figures = torch.empty(FIGURES, dtype=torch.float64, device=device)
    has_frequency, has_tanh = penalty.frequency_scale is not None, penalty.tanh_scale is not None
    launch(
        _conclude_kernel,
        (1,),
        on=l0,
        squared_error_ptr=squared_error,
        l0_ptr=l0,
        s_ptr=tokens.s,
        spread_ptr=tokens.spread,
        shares_ptr=tokens.shares,
        x_norms_ptr=x_norms,
        f_norms_ptr=tokens.f_norms,
        tanh_sums_ptr=tokens.tanh_sums if has_tanh else None,
        sums_ptr=sums,
        coefficient_ptr=device_scalar(penalty.coefficient, l0),
        n_entries_ptr=n_entries,
        stalled_ptr=stalled,
        skipped_ptr=skipped,
        updates_ptr=updates,
        ok_ptr=ok,
        number_ptr=number,
        figures_ptr=figures,
        N=N,
        capacity=0 if capacity is None else capacity,
        x_parts=x_norms.shape[0],
        f_parts=tokens.f_norms.shape[0],
        blocks=blocks,
        factor=penalty.factor,
        target=penalty.target,
        frequency_scale=penalty.frequency_scale if has_frequency else 1.0,
        tanh_scale=penalty.tanh_scale if has_tanh else 0.0,
        bandwidth=objective.bandwidth,
        limit=gradient_limit(torch.float32),
        root_n=math.sqrt(N),
        OF_L0=penalty.of_l0,
        OF_BATCH=penalty.of_batch,
        HAS_FREQUENCY=has_frequency,
        OF_F=penalty.tanh_scale == 0,
        STE_TO_Z=objective.ste_to_z,
        HAS_COPIES=place is not None,
        HAS_CAPACITY=capacity is not None,
        BLOCK=config.block,
        num_warps=config.num_warps,
    )
    return Conclusion(ok, number, figures)
