"""The training losses, and their straight-through gradients written out densely: what the fast routes are held to."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels import Objective
from .kernels.reference import Parameters, activation, gate, window
from .sae import JumpReLUSAE

SPARSITIES = ("l0", "target_l0", "quadratic_l0", "tanh")
L0_OF = ("token", "batch")


@dataclass(frozen=True)
class Loss:
    r"""L = mean_n ‖x_n − x̂_n‖² + S, with l0_n = ‖f_n‖₀ over N tokens and S by ``sparsity``:

    | `l0` | λ·mean_n l0_n | arXiv 2408.05147, equation 4 |
    | `target_l0` | λ·mean_n (l0_n/L0* − 1)² | arXiv 2407.14435, appendix F |
    | `quadratic_l0` | λ·(2/L0*)·mean_n (l0_n − L0*)² | Gemma Scope 2 |
    | `tanh` | λ·mean_n Σ_j tanh(c·f_nj), rows of W_dec having unit norm | Anthropic, January 2025 update |

    ``coefficient`` is λ, ``target_l0`` L0*, ``tanh_scale`` c. With ``l0_of="batch"`` the mean L0 of the batch takes the
    place of each l0_n. ``frequency_scale`` s adds λ·Σ_j p_j²/s, p_j the share of the tokens that latent j fires on
    (Smith et al., March 2025). ``pre_act_coefficient`` λ_P adds λ_P·mean_n Σ_j relu(θ_j − z_nj) over the dead latents.

    The straight-through estimator of width ``bandwidth`` passes gradients to θ, and with ``ste_to_z`` to z too.
    Numbers are checked where users write them, in `TrainConfig`.
    """

    coefficient: float
    bandwidth: float
    sparsity: str = "l0"
    target_l0: float | None = None
    l0_of: str = "token"
    frequency_scale: float | None = None
    tanh_scale: float = 4.0
    pre_act_coefficient: float = 0.0
    ste_to_z: bool = False

    def l0_penalty(self, l0: Tensor) -> tuple[Tensor, Tensor]:
        """The part of S that depends on l0 [N], and s [N] = ∂S/∂l0_n."""
        n = l0.shape[0]
        if self.l0_of == "batch":
            l0 = l0.mean().expand(n)
        if self.sparsity == "l0":
            return self.coefficient * l0.mean(), torch.full_like(l0, self.coefficient / n)
        if self.sparsity == "tanh":
            return l0.new_zeros(()), torch.zeros_like(l0)
        weight = self.coefficient * (2 / self.target_l0 if self.sparsity == "quadratic_l0" else self.target_l0**-2)
        excess = l0 - self.target_l0
        return weight * excess.square().mean(), excess * (2 * weight / n)

    def frequency_penalty(self, firing_count: Tensor, n: int) -> Tensor | float:
        if self.frequency_scale is None:
            return 0.0
        return (firing_count.float() / n).square().sum() * (self.coefficient / self.frequency_scale)

    def tanh_penalty(self, f: Tensor, n: int) -> Tensor | float:
        """f: activations of any shape, inactive ones 0."""
        if self.sparsity != "tanh":
            return 0.0
        return torch.tanh(self.tanh_scale * f).sum() * (self.coefficient / n)

    def objective(self, n: int) -> Objective:
        """What the kernels need to know of it, for a batch of n tokens."""
        scale, tanh = self.frequency_scale, self.sparsity == "tanh"
        return Objective(
            self.bandwidth,
            frequency_slope=0.0 if scale is None else 2 * self.coefficient / (scale * n * n),
            tanh_slope=self.coefficient * self.tanh_scale / n if tanh else 0.0,
            tanh_scale=self.tanh_scale if tanh else 0.0,
            ste_to_z=self.ste_to_z,
        )


class LossAndGradients(NamedTuple):
    loss: Tensor  # []
    squared_error: Tensor  # [] mean_n ‖x − x̂‖²
    l0: Tensor  # [] mean active latents
    firing_count: Tensor  # [d_sae] int32, tokens on which each latent fired
    n_entries: Tensor  # [] latents above the threshold or in its window, over all tokens
    residual: Tensor  # [N, d_model] x̂ − x
    gradients: Parameters


@torch.no_grad()
def loss_and_gradients(sae: JumpReLUSAE, x: Tensor, loss: Loss, dead: Tensor | None = None) -> LossAndGradients:
    """The loss of one batch and its gradients (arXiv 2407.14435, equations 11 and 12).

    x: [N, d_model], N ≥ 1, already divided by the SAE's input_scale, on its device and in its dtype. dead: bool
    [d_sae], for the pre-activation loss. The threshold's gradient is with respect to θ itself. Raises ValueError for an
    empty batch, which has no mean.
    """
    n = x.shape[0]
    if n == 0:
        raise ValueError("x: expected at least one token, got an empty batch")
    centred, theta = x - sae.b_dec if sae.pre_encoder_bias else x, sae.threshold
    z = torch.addmm(sae.b_enc, centred, sae.W_enc)
    active, inside, f = gate(z, theta), window(z, theta, loss.bandwidth), activation(z, theta)
    firing_count = (z > theta).sum(0).to(torch.int32)
    residual = torch.addmm(sae.b_dec, f, sae.W_dec) - x
    l0, objective = active.sum(1), loss.objective(n)
    squared_error, (penalty, s) = residual.square().sum(1).mean(), loss.l0_penalty(l0)
    total = squared_error + penalty + loss.frequency_penalty(firing_count, n) + loss.tanh_penalty(f, n)

    g = residual * (2 / n)
    u = g @ sae.W_dec.T
    if objective.tanh_slope:
        u += objective.tanh_slope * (1 - torch.tanh(objective.tanh_scale * f).square())
    q = inside * -(theta * u + s[:, None] + objective.frequency_slope * firing_count) / loss.bandwidth
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
    gradients = Parameters((dz.T @ centred).T, db_enc, f.T @ g, db_dec, dthreshold)
    n_entries = torch.maximum(active, inside).sum()
    return LossAndGradients(total, squared_error, l0.mean(), firing_count, n_entries, residual, gradients)
