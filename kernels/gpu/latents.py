"""The latent-major pass of the training step: what the entries contribute to the gradients, latent by latent.

For entry e = (token n, latent j), with f_e = z_e where active, else 0, and u_e = ⟨r_n, W_dec[j]⟩ from `residual.py`:

    du_e = (2/N)·u_e + tanh_slope·(1 − tanh²(tanh_scale·f_e));   along_j = Σ_e (2/N)·f_e·u_e
    q_e  = 1[|z_e − θ_j| < ε/2]·( −(θ_j·du_e + s_n + frequency_slope·count_j)/ε );   dθ_j = Σ_e q_e
    dz_e = 1[active]·du_e, less q_e with the straight-through estimator on z;   db_enc_j = Σ_e dz_e

and, for those who want gradients in memory, dW_enc[j] = Σ_e dz_e·(x_n − b_dec) and dW_dec[j] = Σ_e (2/N)·f_e·r_n;
`update.py` forms these two in registers instead. Everything is fp32.

A program does a few latents, a group of entries of each at a time, and then those of its latents whose lists are long
one by one, with more entries in a group: a list that fires on every third token would keep the others waiting. Entry i
of a latent is added to partial sum i mod `lanes`, for a long list i mod `long_lanes`, then the partial sums are added:
no atomics, and every sum depends on its latent alone.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..entries import ACTIVE, ByLatent, Entries, LatentSums, Objective
from .common import device_scalar, launch
from .decode import _gather_sum

_ACTIVE = tl.constexpr(ACTIVE)


@dataclass(frozen=True)
class LatentConfig:
    block_f: int  # latents of a program
    lanes: int  # entries of a latent taken together
    long: int  # entries of the longest list that is not long
    long_lanes: int
    num_warps: int


# Most lists take a group or two, so nothing is fetched ahead: buffers would need barriers. A latent is the work of one
# warp, a long list that of all four. With every option 8 bytes spill on sm_80 under Triton 3.6, more with 16 lanes.
CONFIG = LatentConfig(block_f=32, lanes=8, long=64, long_lanes=512, num_warps=4)


@triton.jit
def _sum_lists(
    j, mask, first, length,
    z_ptr, latents_ptr, tokens_ptr, u_ptr, order_ptr, threshold_ptr, s_ptr,
    dec_ptr, dz_ptr, tokens_out_ptr, db_enc_ptr, dthreshold_ptr, along_ptr, count_ptr,
    scale, bandwidth, half_bandwidth, frequency_slope_ptr, tanh_slope_ptr, tanh_scale,
    STE_TO_Z: tl.constexpr, LISTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Latents j [LISTS], ``LANES`` entries of each at a time. Those that ``mask`` leaves out have the length 0, and
    nothing is stored of them."""
    longest = tl.max(length, 0)
    last = (first + length)[:, None]
    places = first[:, None] + tl.arange(0, LANES)[None, :]
    threshold = tl.load(threshold_ptr + j, mask=mask, other=0.0)[:, None]

    penalty = tl.zeros((LISTS, 1), tl.float32)
    if frequency_slope_ptr is not None:
        fired = tl.zeros((LISTS, LANES), tl.int32)
        for start in range(0, longest, LANES):
            valid = places + start < last
            entries = tl.load(order_ptr + places + start, mask=valid, other=0)
            fired += (tl.load(latents_ptr + entries, mask=valid, other=0) >= _ACTIVE).to(tl.int32)
        penalty += tl.load(frequency_slope_ptr).to(tl.float32) * tl.sum(fired, 1).to(tl.float32)[:, None]

    count = tl.zeros((LISTS, LANES), tl.int32)
    db_enc = tl.zeros((LISTS, LANES), tl.float32)
    dthreshold = tl.zeros((LISTS, LANES), tl.float32)
    along = tl.zeros((LISTS, LANES), tl.float32)
    for start in range(0, longest, LANES):
        valid = places + start < last
        entries = tl.load(order_ptr + places + start, mask=valid, other=0)
        active = tl.load(latents_ptr + entries, mask=valid, other=0) >= _ACTIVE
        tokens = tl.load(tokens_ptr + entries, mask=valid, other=0)
        z = tl.load(z_ptr + entries, mask=valid, other=0.0)
        du = scale * tl.load(u_ptr + entries, mask=valid, other=0.0)
        s = tl.load(s_ptr + tokens, mask=valid, other=0.0).to(tl.float32)
        f = tl.where(active, z, 0.0)
        along += f * du
        if tanh_slope_ptr is not None:
            # 1 − tanh²(a) = 4t/(1 + t)² with t = exp(−2|a|), without cancellation
            t = tl.exp(-2.0 * tl.abs(tanh_scale * f))
            du += tl.load(tanh_slope_ptr).to(tl.float32) * (4.0 * t / ((1.0 + t) * (1.0 + t)))
        inside = valid & (tl.abs(z - threshold) < half_bandwidth)
        q = tl.where(inside, -(threshold * du + (s + penalty)) / bandwidth, 0.0)
        dz = tl.where(active, du, 0.0)
        if STE_TO_Z:
            dz -= q
        count += active.to(tl.int32)
        db_enc += dz
        dthreshold += q
        tl.store(dec_ptr + places + start, scale * f, mask=valid)
        tl.store(dz_ptr + places + start, dz, mask=valid)
        tl.store(tokens_out_ptr + places + start, tokens, mask=valid)
    tl.store(db_enc_ptr + j, tl.sum(db_enc, 1), mask=mask)
    tl.store(dthreshold_ptr + j, tl.sum(dthreshold, 1), mask=mask)
    tl.store(along_ptr + j, tl.sum(along, 1), mask=mask)
    tl.store(count_ptr + j, tl.sum(count, 1), mask=mask)


@triton.jit
def _latents_kernel(
    z_ptr, latents_ptr, tokens_ptr, u_ptr, order_ptr, offsets_ptr, threshold_ptr, s_ptr,
    dec_ptr, dz_ptr, tokens_out_ptr, db_enc_ptr, dthreshold_ptr, along_ptr, count_ptr,
    F, scale, bandwidth, half_bandwidth, frequency_slope_ptr, tanh_slope_ptr, tanh_scale,
    STE_TO_Z: tl.constexpr, BLOCK_F: tl.constexpr, LANES: tl.constexpr, LONG: tl.constexpr, LONG_LANES: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    in_latents = j < F
    first = tl.load(offsets_ptr + j, mask=in_latents, other=0)
    length = (tl.load(offsets_ptr + j + 1, mask=in_latents, other=0) - first).to(tl.int32)
    is_short = in_latents & (length <= LONG)
    _sum_lists(
        j, is_short, first, tl.where(is_short, length, 0),
        z_ptr, latents_ptr, tokens_ptr, u_ptr, order_ptr, threshold_ptr, s_ptr,
        dec_ptr, dz_ptr, tokens_out_ptr, db_enc_ptr, dthreshold_ptr, along_ptr, count_ptr,
        scale, bandwidth, half_bandwidth, frequency_slope_ptr, tanh_slope_ptr, tanh_scale,
        STE_TO_Z, BLOCK_F, LANES,
    )  # fmt: skip
    if tl.max(length, 0) > LONG:
        end = tl.minimum(tl.program_id(0) * BLOCK_F + BLOCK_F, F)
        for latent in range(tl.program_id(0) * BLOCK_F, end):
            start = tl.load(offsets_ptr + latent)
            entries = (tl.load(offsets_ptr + latent + 1) - start).to(tl.int32)
            if entries > LONG:
                one = tl.arange(0, 1)
                _sum_lists(
                    latent + one, one == 0, start + one, entries + one,
                    z_ptr, latents_ptr, tokens_ptr, u_ptr, order_ptr, threshold_ptr, s_ptr,
                    dec_ptr, dz_ptr, tokens_out_ptr, db_enc_ptr, dthreshold_ptr, along_ptr, count_ptr,
                    scale, bandwidth, half_bandwidth, frequency_slope_ptr, tanh_slope_ptr, tanh_scale,
                    STE_TO_Z, 1, LONG_LANES,
                )  # fmt: skip


def _on_device(slope: float | Tensor, on: Tensor) -> Tensor | None:
    """None: there is no such penalty. A tensor is one whatever it holds, which the host does not look at."""
    return None if not isinstance(slope, Tensor) and slope == 0 else device_scalar(slope, on)


def latent_pass(
    entries: Entries, u: Tensor, transposed: ByLatent, threshold: Tensor, s: Tensor, objective: Objective
) -> LatentSums:
    """u [capacity] of `residual_pass`, θ [F], s [N] = ∂L/∂l0."""
    config = CONFIG
    capacity, F = entries.z.shape[0], threshold.shape[0]
    dec, dz = (torch.empty(capacity, dtype=torch.float32, device=u.device) for _ in range(2))
    tokens = torch.empty(capacity, dtype=torch.int32, device=u.device)
    db_enc, dthreshold, along = (torch.empty(F, dtype=torch.float32, device=u.device) for _ in range(3))
    count = torch.empty(F, dtype=torch.int32, device=u.device)
    if F > 0:
        launch(
            _latents_kernel,
            (triton.cdiv(F, config.block_f),),
            on=u,
            z_ptr=entries.z,
            latents_ptr=entries.latents,
            tokens_ptr=entries.tokens,
            u_ptr=u,
            order_ptr=transposed.order,
            offsets_ptr=transposed.offsets,
            threshold_ptr=threshold.contiguous(),
            s_ptr=s.contiguous(),
            dec_ptr=dec,
            dz_ptr=dz,
            tokens_out_ptr=tokens,
            db_enc_ptr=db_enc,
            dthreshold_ptr=dthreshold,
            along_ptr=along,
            count_ptr=count,
            F=F,
            scale=2 / s.shape[0] if s.shape[0] else 0.0,
            bandwidth=objective.bandwidth,
            half_bandwidth=objective.bandwidth / 2,
            frequency_slope_ptr=_on_device(objective.frequency_slope, u),
            tanh_slope_ptr=_on_device(objective.tanh_slope, u),
            tanh_scale=objective.tanh_scale,
            STE_TO_Z=objective.ste_to_z,
            BLOCK_F=config.block_f,
            LANES=config.lanes,
            LONG=config.long,
            LONG_LANES=config.long_lanes,
            num_warps=config.num_warps,
        )
    return LatentSums(dec, dz, tokens, db_enc, dthreshold, along, count)


def weight_gradients(
    transposed: ByLatent, sums: LatentSums, residual: Tensor, x_centred: Tensor
) -> tuple[Tensor, Tensor]:
    """dW_enc and dW_dec, [F, d] each, fp32. residual and x_centred = x − b_dec: [N, d]."""

    def sum_rows(coefficients: Tensor, table: Tensor) -> Tensor:
        F = transposed.offsets.shape[0] - 1
        out = torch.empty(F, table.shape[1], dtype=torch.float32, device=table.device)
        return _gather_sum(coefficients, sums.tokens, transposed.offsets, table=table, bias=None, out=out)

    return sum_rows(sums.dz, x_centred), sum_rows(sums.dec, residual)
