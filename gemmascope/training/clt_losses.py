"""The loss of a cross-layer transcoder and its gradients, written out densely, which the fast routes are held to."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..checks import check_tensor, check_type, dtype_name
from ..kernels import reference
from ..saes.clt_source import check_layers, places
from ..saes.scaled_clt import ScaledCLT
from .config import Loss
from .losses import objective, penalty


class CLTLossAndGradients(NamedTuple):
    loss: Tensor  # []
    errors: list[Tensor]  # by layer: [N] ‖ŷ_l − y_l‖²
    l0: Tensor  # [L] mean active latents of each layer
    firing_counts: list[Tensor]  # by layer: [d_sae] int32, tokens on which each latent fired
    n_entries: Tensor  # [] latents above the threshold or in its window, over all tokens and layers
    gradients: list[reference.Parameters]  # by layer
    bound: Tensor  # [] of `kernels.reference.conclusion.gradient_bound`
    touched: list[Tensor]  # by layer: bool [d_sae], which latents have an entry


def check_clt_batch(clt: ScaledCLT, xs: Sequence[Tensor], ys: Sequence[Tensor], loss: Loss) -> None:
    """Raise ValueError or TypeError unless ``loss`` can be taken of xs [N, d_in] and ys [N, d_out], by layer, in the
    dtype and on the device of ``clt``, fp32 or fp64."""
    check_type("clt", clt, ScaledCLT)
    check_type("loss", loss, Loss)
    like = clt.sources[0].W_dec
    if like.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"clt: expected float32 or float64, got {dtype_name(like.dtype)}")
    check_layers("xs", xs, [source.d_in for source in clt.sources])
    check_layers("ys", ys, clt.d_outs)
    for name, rows in (("xs", xs), ("ys", ys)):
        for number, x in enumerate(rows):
            check_tensor(f"{name}[{number}]", x, (len(xs[0]), x.shape[-1]), (like.dtype,), like.device)
    if len(xs[0]) == 0:
        raise ValueError("xs: expected at least one token, got none")
    if loss.pre_act_coefficient:
        raise ValueError(f"pre_act_coefficient: expected 0 of a CLT, got {loss.pre_act_coefficient}")


@torch.no_grad()
@without_autocast
def clt_loss_and_gradients(
    clt: ScaledCLT, xs: Sequence[Tensor], ys: Sequence[Tensor], loss: Loss
) -> CLTLossAndGradients:
    r"""The loss of one batch and its gradients ("Circuit Tracing", transformer-circuits.pub 2025; for thresholds
    equations 11 and 12 of arXiv 2407.14435):

        L = Σ_l' mean_n ‖ŷ_l' − y_l'‖² + S

    S is the penalty of ``loss``, of all latents together: l0 is that of all layers. With g_l' = (2/N)·(ŷ_l' − y_l'), a
    latent of layer l has u = Σ_{l' ≥ l} ⟨g_l', W_dec^{l→l'}⟩, which takes the place of the u of an SAE.

    xs: [N, d_in], N ≥ 1, and ys: [N, d_out], by layer, divided by the scales, in the dtype and on the device of
    ``clt``, fp32 or fp64. Gradients of thresholds are with respect to θ itself; a θ below 0 counts as 0. Raises
    ValueError or TypeError for others, an empty batch among them.
    """
    check_clt_batch(clt, xs, ys, loss)
    n, d_outs, widths = len(xs[0]), clt.d_outs, places(clt.d_outs)
    thetas = [source.threshold.clamp(min=0) for source in clt.sources]
    zs = [torch.addmm(source.b_enc, x, source.W_enc) for source, x in zip(clt.sources, xs, strict=True)]
    active = [reference.gate(z, theta) for z, theta in zip(zs, thetas, strict=True)]
    inside = [reference.window(z, theta, loss.bandwidth) for z, theta in zip(zs, thetas, strict=True)]
    fs = [reference.activation(z, theta) for z, theta in zip(zs, thetas, strict=True)]
    counts = [(z > theta).sum(0).to(torch.int32) for z, theta in zip(zs, thetas, strict=True)]

    residual = torch.cat([source.b_dec - y for source, y in zip(clt.sources, ys, strict=True)], 1)
    for number, (source, f) in enumerate(zip(clt.sources, fs, strict=True)):
        residual[:, widths[number].start :] += f @ source.W_dec
    errors = [part.square().sum(1) for part in residual.split(d_outs, 1)]
    squared_error = torch.stack(errors).sum(0).mean()
    l0, weights, sparsity = torch.cat(active, 1).sum(1), objective(loss, n), penalty(loss)
    s, tanh = (
        reference.conclusion.l0_penalty(sparsity, l0)[1],
        reference.conclusion.tanh_sum(sparsity, torch.cat(fs, 1)),
    )
    total = reference.conclusion.total_loss(sparsity, squared_error, l0, torch.cat(counts), tanh)

    g, gradients = residual * (2 / n), []
    for number, (source, x, f, theta) in enumerate(zip(clt.sources, xs, fs, thetas, strict=True)):
        of_targets = g[:, widths[number].start :]
        u = of_targets @ source.W_dec.T
        if weights.tanh_slope:
            u += weights.tanh_slope / torch.cosh(weights.tanh_scale * f).square()  # 1 − tanh² would cancel
        frequency = weights.frequency_slope * counts[number].to(s.dtype)
        q = inside[number] * -(theta * u + s[:, None] + frequency) / loss.bandwidth
        dz = active[number] * u
        if loss.ste_to_z:
            dz -= q
        of_source = ((dz.T @ x).T, dz.sum(0), f.T @ of_targets, g[:, widths[number]].sum(0), q.sum(0))
        gradients.append(reference.Parameters(*of_source))
    is_entry = [torch.maximum(*pair) for pair in zip(active, inside, strict=True)]
    norms = torch.stack([torch.linalg.vector_norm(x) for x in xs]), torch.stack(list(map(torch.linalg.vector_norm, fs)))
    touched = [pairs.amax(0) for pairs in is_entry]
    of_norms = (norms[0].amax(), norms[1].amax())
    of_latents = (torch.cat(thetas), torch.cat(touched))
    bound = reference.conclusion.gradient_bound(weights, 0.0, squared_error, s, *of_norms, *of_latents)
    l0s = torch.stack([pairs.sum(1).mean() for pairs in active])
    n_entries = torch.stack([pairs.sum() for pairs in is_entry]).sum()
    moved = [each != 0 for each in touched]
    return CLTLossAndGradients(total, errors, l0s, counts, n_entries, gradients, bound, moved)
