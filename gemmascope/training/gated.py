"""The loss of a gated SAE and its gradients written out densely, which the fast routes are held to.

With the symbols of `GatedSAE`, r = x̂ − x and ρ = relu(π)·W_dec + b_dec − x (arXiv 2404.16014, equation 8):

    L = mean_n( ‖r_n‖² + λ·Σ_j relu(π_nj) + ‖ρ_n‖² ),   W_dec and b_dec constant in ρ

With a p < 1 the penalty is λ·c·Σ_j φ(relu(π_nj)) and λ·c·φ' takes the place of the slope λ, see `annealing`.

The step 1[π > 0] has no gradient: the magnitudes learn from the first term, the gate from the two others. With
u = (2/N)·r·W_decᵀ and w = (2/N)·ρ·W_decᵀ,

    dm = 1[f > 0]·u;   dπ = 1[π > 0]·(w + λ/N);   dy = e^r ⊙ dm + dπ
    dW_enc = (x − b_dec)ᵀ·dy;   db_gate = Σ_n dπ;   db_mag = Σ_n dm;   dr = Σ_n dm·(m − b_mag)
    dW_dec = (2/N)·fᵀ·r;   db_dec = (2/N)·Σ_n r_n − W_enc·Σ_n dy, the last with a pre-encoder bias

A transcoder has a target y in the place of the x that r and ρ are judged by, and no b_dec in π. A skip connection adds
x·W_skipᵀ to both reconstructions, constant in ρ as the decoder is: dW_skip = (2/N)·rᵀ·x.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..formats.export import SKIP
from ..kernels import reference
from ..saes import GatedSAE
from ..saes.gated import magnitude
from .annealing import concave, slope, steepest
from .config import CLOSED_WINDOW, Loss
from .losses import check_batch, to_latents


class GatedGradients(NamedTuple):
    W_enc: Tensor  # [d_model, d_sae]
    b_enc: Tensor  # [d_sae] of b_gate
    W_dec: Tensor  # [d_sae, d_model]
    b_dec: Tensor  # [d_model]
    b_mag: Tensor  # [d_sae]
    r_mag: Tensor  # [d_sae]


class GatedLossAndGradients(NamedTuple):
    loss: Tensor  # []
    errors: Tensor  # [N] ‖r_n‖²
    l0: Tensor  # [] mean of ‖f_n‖₀
    firing_count: Tensor  # [d_sae] int32, tokens on which each latent fired: f > 0
    n_entries: Tensor  # [] pairs of token and latent whose gate is open
    gradients: GatedGradients
    bound: Tensor  # [] of `gradient_bound`
    rectified: Tensor  # [N, d_sae] relu(π)
    touched: Tensor  # bool [d_sae], of which latents the gate is open somewhere
    others: Mapping[str, Tensor]  # the gradients of ``sae.OTHERS``


@torch.no_grad()
@without_autocast
def gated_loss_and_gradients(
    sae: GatedSAE, x: Tensor, loss: Loss, target: Tensor | None = None
) -> GatedLossAndGradients:
    """The loss of one batch and its gradients.

    x: [N, d_model], N ≥ 1, already divided by the SAE's input_scale, on its device and in its dtype, fp32 or fp64.
    loss: of the sparsity `l1`, whose λ it is. target: [N, d_out], divided by the output_scale of a transcoder; by
    default x. Raises ValueError or TypeError for others.
    """
    check_batch(sae, x, loss, target, cls=GatedSAE)
    if loss.sparsity != "l1":
        raise ValueError(f"loss.sparsity: expected 'l1' with a GatedSAE, got {loss.sparsity!r}")
    n, zeros = len(x), torch.zeros_like(sae.b_enc)
    centred = x - sae.b_dec if sae.pre_encoder_bias else x
    pi = torch.addmm(sae.b_enc, centred, sae.W_enc)
    m, opened = magnitude(pi, sae.b_enc, sae.r_mag, sae.b_mag), reference.gate(pi, zeros)
    fires, f = opened * reference.gate(m, zeros), opened * reference.activation(m, zeros)
    rectified, y = reference.activation(pi, zeros), to_latents(sae, x, target)
    residual, frozen = (torch.addmm(sae.b_dec, code, sae.W_dec) - y for code in (f, rectified))
    errors, frozen_errors = residual.square().sum(1), frozen.square().sum(1)
    weight = loss.l0_coefficient * steepest(loss.p)
    total = errors.mean() + weight * concave(rectified, loss.p).sum() / n + frozen_errors.mean()

    g = residual * (2 / n)
    dm = fires * (g @ sae.W_dec.T)
    dpi = opened * ((frozen * (2 / n)) @ sae.W_dec.T + weight / n * slope(rectified, loss.p))
    dy = sae.r_mag.exp() * dm + dpi
    db_dec = g.sum(0)
    if sae.pre_encoder_bias:
        db_dec -= sae.W_enc @ dy.sum(0)
    gradients = GatedGradients(
        (dy.T @ centred).T, dpi.sum(0), f.T @ g, db_dec, dm.sum(0), (dm * (m - sae.b_mag)).sum(0)
    )
    norms = torch.linalg.vector_norm(centred), torch.linalg.vector_norm(f)
    bound = gradient_bound(weight, errors, frozen_errors, *norms, sae.r_mag, sae.b_mag)
    firing_count, pairs = fires.sum(0).to(torch.int32), is_entry(pi)
    figures = (total, errors, fires.sum(1).mean(), firing_count, pairs.sum())
    others = {"b_mag": gradients.b_mag, "r_mag": gradients.r_mag} | ({SKIP: g.T @ x} if SKIP in sae.OTHERS else {})
    return GatedLossAndGradients(*figures, gradients, bound, rectified, pairs.any(0), others)


def is_entry(pi: Tensor) -> Tensor:
    """Which pairs `encode_entries` finds: π > 0, and a π of 0 itself."""
    return ~(pi <= -CLOSED_WINDOW / 2)


def gradient_bound(
    weight: float | Tensor,
    errors: Tensor,
    frozen_errors: Tensor,
    x_norm: Tensor,
    f_norm: Tensor,
    r_mag: Tensor,
    b_mag: Tensor,
) -> Tensor:
    """[] What no element of the gradients of the latents exceeds, from scalars that every route has.

    With E and A the roots of the mean squared errors, the mean norms are at most E and A, so that, for decoder rows of
    unit norm, over the tokens of a latent

        Σ_n |dm| ≤ 2E;   Σ_n |dπ| ≤ 2A + λ;   Σ_n |dy| ≤ D = max_j e^r_j·2E + 2A + λ
        |dW_enc| ≤ ‖x‖·D;   |dW_dec| ≤ B = 2E·‖f‖/√N;   |dr| ≤ B + max_j |b_mag_j|·2E, for Σ_n |dm|·f ≤ B
        |dW_skip| ≤ ‖x‖·2E, of a transcoder

    weight: λ, times the steepest slope of its penalty. errors, frozen_errors: [N] ‖r_n‖² and ‖ρ_n‖². x_norm, f_norm: []
    of x − b_dec and of all activations.
    """
    main, frozen = (2 * squares.mean().sqrt() for squares in (errors, frozen_errors))
    dpi, of_decoder = frozen + weight, main * f_norm / len(errors) ** 0.5
    dy = r_mag.exp().amax() * main + dpi
    of_input = x_norm * torch.maximum(dy, main)
    return torch.stack((main, dpi, dy, of_input, of_decoder, of_decoder + b_mag.abs().amax() * main)).amax()
