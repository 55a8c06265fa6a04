"""What a `Loss` means: its penalties, and its straight-through gradients written out densely, which the fast routes are
held to."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..checks import check_tensor, check_type, dtype_name
from ..kernels import Objective, reference
from ..saes import JumpReLUSAE
from .config import Loss


def l0_penalty(loss: Loss, l0: Tensor) -> tuple[Tensor, Tensor]:
    """The part of the sparsity penalty S that depends on l0 [N], and s [N] = ∂S/∂l0_n."""
    n = l0.shape[0]
    if loss.l0_of == "batch":
        l0 = l0.mean().expand(n)
    if loss.sparsity == "l0":
        return loss.l0_coefficient * l0.mean(), torch.full_like(l0, loss.l0_coefficient / n)
    if loss.target_l0 is None:  # tanh
        return l0.new_zeros(()), torch.zeros_like(l0)
    weight = loss.l0_coefficient * (2 / loss.target_l0 if loss.sparsity == "quadratic_l0" else loss.target_l0**-2)
    excess = l0 - loss.target_l0
    return weight * excess.square().mean(), excess * (2 * weight / n)


def frequency_penalty(loss: Loss, firing_count: Tensor, n: int) -> Tensor | float:
    """λ·Σ_j p_j²/s for firing_count [d_sae] over n tokens; 0 without a ``frequency_scale``."""
    if loss.frequency_scale is None:
        return 0.0
    return (firing_count.float() / n).square().sum() * (loss.l0_coefficient / loss.frequency_scale)


def tanh_penalty(loss: Loss, f: Tensor, n: int) -> Tensor | float:
    """The `tanh` penalty over n tokens. f: activations of any shape, inactive ones 0."""
    if loss.sparsity != "tanh":
        return 0.0
    return torch.tanh(loss.tanh_scale * f).sum() * (loss.l0_coefficient / n)


def objective(loss: Loss, n: int) -> Objective:
    """What the kernels need to know of ``loss``, for a batch of n tokens."""
    scale, tanh = loss.frequency_scale, loss.sparsity == "tanh"
    return Objective(
        loss.bandwidth,
        frequency_slope=0.0 if scale is None else 2 * loss.l0_coefficient / (scale * n * n),
        tanh_slope=loss.l0_coefficient * loss.tanh_scale / n if tanh else 0.0,
        tanh_scale=loss.tanh_scale if tanh else 0.0,
        ste_to_z=loss.ste_to_z,
    )


def gradient_bound(
    loss: Loss, squared_error: Tensor, s: Tensor, x_centred: Tensor, f_norm: Tensor, threshold: Tensor, touched: Tensor
) -> Tensor:
    """[] What no element of the gradients of the latents exceeds, nor θ·dθ: from scalars that every route has.

    With E = √squared_error the mean of ‖r_n‖ is at most E, so that, for decoder rows of unit norm and by the formulas
    of `kernels.entries`, the sums over the entries of a latent are at most

        Σ_n |u_nj| ≤ U = 2E + N·tanh_slope
        Σ_n |q_nj| ≤ Q = (θ·U + Σ_n |s_n| + N·t)/ε,  t ≤ N·frequency_slope,  θ the largest that was touched
        Σ_n |dz_nj| ≤ U, or U + Q where the estimator passes to z too
        |dW_enc| ≤ ‖x‖·Σ_n |dz_nj|;  |dW_dec| ≤ 2E·‖f‖/√N

    squared_error: [] mean_n ‖r_n‖². s: [N] of `l0_penalty`. x_centred: [N, d_model]. f_norm: [] of all activations.
    threshold: [d_sae]. touched: [d_sae], whether a latent has entries.
    """
    n = len(s)
    weights, error = objective(loss, n), 2 * squared_error.sqrt()
    theta = torch.where(touched > 0, threshold, 0).amax()
    u = error + n * weights.tanh_slope
    q = (theta * u + s.abs().sum() + n * n * weights.frequency_slope) / weights.bandwidth + loss.pre_act_coefficient
    dz = u + loss.pre_act_coefficient + (q if loss.ste_to_z else 0)
    x_norm = torch.linalg.vector_norm(x_centred, dtype=dz.dtype)
    return torch.stack((dz, x_norm * dz, error * f_norm / n**0.5, q, theta * q)).amax()


class LossAndGradients(NamedTuple):
    loss: Tensor  # []
    squared_error: Tensor  # [] mean_n ‖x − x̂‖²
    l0: Tensor  # [] mean active latents
    firing_count: Tensor  # [d_sae] int32, tokens on which each latent fired
    n_entries: Tensor  # [] latents above the threshold or in its window, over all tokens
    residual: Tensor  # [N, d_model] x̂ − x
    gradients: reference.Parameters
    bound: Tensor  # [] of `gradient_bound`


def check_batch(sae: JumpReLUSAE, x: Tensor, loss: Loss) -> None:
    """Raise ValueError or TypeError unless ``loss`` can be taken of x [N, d_model], in the dtype and on the device of
    ``sae``, which is fp32 or fp64."""
    check_type("sae", sae, JumpReLUSAE)
    check_type("loss", loss, Loss)
    loss.check_width(sae.d_sae)
    if sae.W_dec.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"sae: expected float32 or float64, got {dtype_name(sae.W_dec.dtype)}")
    check_tensor("x", x, ("N ≥ 1", sae.d_model), (sae.W_dec.dtype,), sae.W_dec.device)
    if len(x) == 0:
        raise ValueError(f"x: expected shape [N ≥ 1, {sae.d_model}], got {list(x.shape)}")


@torch.no_grad()
@without_autocast
def loss_and_gradients(sae: JumpReLUSAE, x: Tensor, loss: Loss, dead: Tensor | None = None) -> LossAndGradients:
    """The loss of one batch and its gradients (arXiv 2407.14435, equations 11 and 12).

    x: [N, d_model], N ≥ 1, already divided by the SAE's input_scale, on its device and in its dtype, fp32 or fp64.
    dead: bool [d_sae], for the pre-activation loss. The threshold's gradient is with respect to θ itself; a θ below 0
    counts as 0. Raises ValueError or TypeError for others, an empty batch, which has no mean, among them.
    """
    check_batch(sae, x, loss)
    if dead is not None:
        check_tensor("dead", dead, (sae.d_sae,), (torch.bool,), x.device)
    n = x.shape[0]
    centred, theta = x - sae.b_dec if sae.pre_encoder_bias else x, sae.threshold.clamp(min=0)
    z = torch.addmm(sae.b_enc, centred, sae.W_enc)
    active, inside = reference.gate(z, theta), reference.window(z, theta, loss.bandwidth)
    f = reference.activation(z, theta)
    firing_count = (z > theta).sum(0).to(torch.int32)
    residual = torch.addmm(sae.b_dec, f, sae.W_dec) - x
    l0, weights = active.sum(1), objective(loss, n)
    squared_error, (penalty, s) = residual.square().sum(1).mean(), l0_penalty(loss, l0)
    total = squared_error + penalty + frequency_penalty(loss, firing_count, n) + tanh_penalty(loss, f, n)

    g = residual * (2 / n)
    u = g @ sae.W_dec.T
    if weights.tanh_slope:
        u += weights.tanh_slope / torch.cosh(weights.tanh_scale * f).square()  # 1 − tanh² would cancel
    frequency = weights.frequency_slope * firing_count.to(s.dtype)  # times an integer it were of the default dtype
    q = inside * -(theta * u + s[:, None] + frequency) / loss.bandwidth
    dz = active * u
    dthreshold = q.sum(0)
    if loss.ste_to_z:
        dz -= q
    if loss.pre_act_coefficient and dead is not None:
        below = ((z < theta) & dead).to(z.dtype)
        total = total + (loss.pre_act_coefficient / n) * (below * (theta - z)).sum()
        dz -= (loss.pre_act_coefficient / n) * below
        dthreshold += (loss.pre_act_coefficient / n) * below.sum(0)
    db_enc, db_dec = dz.sum(0), g.sum(0)
    if sae.pre_encoder_bias:
        db_dec -= sae.W_enc @ db_enc
    gradients = reference.Parameters((dz.T @ centred).T, db_enc, f.T @ g, db_dec, dthreshold)
    is_entry = torch.maximum(active, inside)
    touched = torch.ones_like(theta) if loss.pre_act_coefficient else is_entry.amax(0)
    bound = gradient_bound(loss, squared_error, s, centred, torch.linalg.vector_norm(f), theta, touched)
    return LossAndGradients(total, squared_error, l0.mean(), firing_count, is_entry.sum(), residual, gradients, bound)
