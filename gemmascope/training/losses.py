"""What a `Loss` means: its penalties, and its straight-through gradients written out densely, which the fast routes are
held to."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..checks import check_tensor, check_type, dtype_name
from ..formats.export import SKIP
from ..kernels import Objective, entries, reference
from ..saes import JumpReLUSAE
from ..saes.base import BaseSAE
from ..saes.scaled_transcoder import TrainedTranscoder
from .annealing import concave, slope, steepest
from .config import Loss


def penalty(loss: Loss) -> entries.Penalty:
    """What the sums over tokens and latents need to know of ``loss``; with a p < 1 the steepest slope of its penalty
    and Σφ take the places of λ and Σf, see `annealing`."""
    of_l0, factor = {"l0": "linear", "tanh": "none", "l1": "none", "none": "none"}.get(loss.sparsity, "quadratic"), 1.0
    if loss.target_l0 is not None:
        factor = 2 / loss.target_l0 if loss.sparsity == "quadratic_l0" else loss.target_l0**-2
    return entries.Penalty(
        loss.l0_coefficient * steepest(loss.p),
        of_l0,
        factor,
        loss.target_l0 or 0.0,
        of_batch=loss.l0_of == "batch",
        frequency_scale=loss.frequency_scale,
        tanh_scale={"tanh": loss.tanh_scale, "l1": 0.0}.get(loss.sparsity),
    )


def l0_penalty(loss: Loss, l0: Tensor) -> tuple[Tensor, Tensor]:
    """The part of the sparsity penalty S that depends on l0 [N], and s [N] = ∂S/∂l0_n."""
    return reference.conclusion.l0_penalty(penalty(loss), l0)


def frequency_penalty(loss: Loss, firing_count: Tensor, n: int) -> Tensor | float:
    """λ·Σ_j p_j²/s for firing_count [d_sae] over n tokens; 0 without a ``frequency_scale``."""
    return reference.conclusion.frequency_penalty(penalty(loss), firing_count, n)


def objective(loss: Loss, n: int) -> Objective:
    """What the kernels need to know of ``loss``, for a batch of n tokens; ``tanh_slope`` is the steepest, with a p < 1
    that at f = 0."""
    scale, tanh = loss.frequency_scale, loss.sparsity == "tanh"
    slope = loss.l0_coefficient * {"tanh": loss.tanh_scale, "l1": steepest(loss.p)}.get(loss.sparsity, 0.0)
    return Objective(
        loss.bandwidth,
        frequency_slope=0.0 if scale is None else 2 * loss.l0_coefficient / (scale * n * n),
        tanh_slope=slope / n,
        tanh_scale=loss.tanh_scale if tanh else 0.0,
        ste_to_z=loss.ste_to_z,
    )


class LossAndGradients(NamedTuple):
    loss: Tensor  # []
    squared_error: Tensor  # [] mean_n ‖x − x̂‖²
    l0: Tensor  # [] mean active latents
    firing_count: Tensor  # [d_sae] int32, tokens on which each latent fired
    n_entries: Tensor  # [] latents above the threshold or in its window, over all tokens
    residual: Tensor  # [N, d_model] x̂ − x, of a transcoder ŷ − y
    gradients: reference.Parameters
    bound: Tensor  # [] of `kernels.reference.conclusion.gradient_bound`
    f: Tensor  # [N, d_sae] the activations
    touched: Tensor  # bool [d_sae], which latents have an entry, or a gradient of the pre-activation loss
    others: Mapping[str, Tensor] = MappingProxyType({})  # the gradients of ``sae.OTHERS``


def check_batch(
    sae: BaseSAE, x: Tensor, loss: Loss, target: Tensor | None = None, cls: type[BaseSAE] = JumpReLUSAE
) -> None:
    """Raise ValueError or TypeError unless ``loss`` can be taken of x [N, d_in] and ``target`` [N, d_out], by default x
    itself, in the dtype and on the device of ``sae``, which is a ``cls`` in fp32 or fp64."""
    check_type("sae", sae, cls)
    check_type("loss", loss, Loss)
    loss.check_width(sae.d_sae)
    if sae.W_dec.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"sae: expected float32 or float64, got {dtype_name(sae.W_dec.dtype)}")
    d_in = sae.W_enc.shape[0]
    check_tensor("x", x, ("N ≥ 1", d_in), (sae.W_dec.dtype,), sae.W_dec.device)
    if len(x) == 0:
        raise ValueError(f"x: expected shape [N ≥ 1, {d_in}], got {list(x.shape)}")
    if target is not None:
        check_tensor("target", target, (len(x), sae.d_model), (sae.W_dec.dtype,), sae.W_dec.device)
    elif isinstance(sae, TrainedTranscoder):
        raise ValueError("target: expected what the transcoder is to give, got None")


def to_latents(sae: BaseSAE, x: Tensor, target: Tensor | None) -> Tensor:
    """What the latents and b_dec are to give: the target [N, d_out] without what a skip connection carries of x."""
    if target is None:
        return x
    skipped = sae.skipped(x) if isinstance(sae, TrainedTranscoder) else None
    return target if skipped is None else target - skipped


@torch.no_grad()
@without_autocast
def loss_and_gradients(
    sae: JumpReLUSAE, x: Tensor, loss: Loss, dead: Tensor | None = None, target: Tensor | None = None
) -> LossAndGradients:
    """The loss of one batch and its gradients (arXiv 2407.14435, equations 11 and 12).

    x: [N, d_model], N ≥ 1, already divided by the SAE's input_scale, on its device and in its dtype, fp32 or fp64.
    target: [N, d_out], divided by the output_scale of a transcoder: what is to be reconstructed in the place of x.
    dead: bool [d_sae], for the pre-activation loss. The threshold's gradient is with respect to θ itself; a θ below 0
    counts as 0. Raises ValueError or TypeError for others, an empty batch, which has no mean, among them.
    """
    check_batch(sae, x, loss, target)
    if dead is not None:
        check_tensor("dead", dead, (sae.d_sae,), (torch.bool,), x.device)
    n = x.shape[0]
    centred, theta = x - sae.b_dec if sae.pre_encoder_bias else x, sae.threshold.clamp(min=0)
    z = torch.addmm(sae.b_enc, centred, sae.W_enc)
    active, inside = reference.gate(z, theta), reference.window(z, theta, loss.bandwidth)
    f = reference.activation(z, theta)
    firing_count = (z > theta).sum(0).to(torch.int32)
    residual = torch.addmm(sae.b_dec, f, sae.W_dec) - to_latents(sae, x, target)
    l0, weights = active.sum(1), objective(loss, n)
    squared_error, sparsity = residual.square().sum(1).mean(), penalty(loss)
    s = reference.conclusion.l0_penalty(sparsity, l0)[1]
    tanh = reference.conclusion.tanh_sum(sparsity, concave(f, loss.p))
    total = reference.conclusion.total_loss(sparsity, squared_error, l0, firing_count, tanh)

    g = residual * (2 / n)
    u = g @ sae.W_dec.T
    if loss.p != 1:
        u += weights.tanh_slope * slope(f, loss.p)
    elif weights.tanh_slope:
        u += weights.tanh_slope / torch.cosh(weights.tanh_scale * f).square()  # 1 − tanh² would cancel
    frequency = weights.frequency_slope * firing_count.to(s.dtype)  # times an integer it were of the default dtype
    q = inside * -(theta * u + s[:, None] + frequency) / loss.bandwidth
    dz = active * u
    dthreshold = q.sum(0)
    if loss.ste_to_z:
        dz -= q
    is_entry = torch.maximum(active, inside)
    touched = is_entry.amax(0) != 0
    if loss.pre_act_coefficient and dead is not None:
        below = ((z < theta) & dead).to(z.dtype)
        total = total + (loss.pre_act_coefficient / n) * (below * (theta - z)).sum()
        dz -= (loss.pre_act_coefficient / n) * below
        dthreshold += (loss.pre_act_coefficient / n) * below.sum(0)
        touched |= below.amax(0) != 0
    db_enc, db_dec = dz.sum(0), g.sum(0)
    if sae.pre_encoder_bias:
        db_dec -= sae.W_enc @ db_enc
    gradients = reference.Parameters((dz.T @ centred).T, db_enc, f.T @ g, db_dec, dthreshold)
    reached = torch.ones_like(theta) if loss.pre_act_coefficient else is_entry.amax(0)
    norms = torch.linalg.vector_norm(centred), torch.linalg.vector_norm(f)
    others = {SKIP: g.T @ x} if SKIP in sae.OTHERS else {}
    coefficient = loss.pre_act_coefficient
    bound = reference.conclusion.gradient_bound(weights, coefficient, squared_error, s, *norms, theta, reached)
    figures = (total, squared_error, l0.mean(), firing_count, is_entry.sum())
    return LossAndGradients(*figures, residual, gradients, bound, f, touched, others)
