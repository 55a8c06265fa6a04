"""The loss of one SAE on one batch, and its gradients by the written formulas.

Autograd through the module gives the same numbers (tested), but would form ∂L/∂x, a whole extra matrix product, only to
reduce it to the gradient of the pre-encoder bias; here that gradient is one matrix-vector product.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .kernels.autograd import operator
from .kernels.dispatch import choose
from .kernels.reference import Parameters
from .sae import JumpReLUSAE


class LossAndGradients(NamedTuple):
    loss: Tensor  # [] mean_n(‖x − x̂‖² + λ‖f‖₀)
    squared_error: Tensor  # [] mean_n ‖x − x̂‖²
    l0: Tensor  # [] mean active latents
    firing_count: Tensor  # [d_sae] int32, tokens on which each latent fired
    residual: Tensor  # [N, d_model] x̂ − x
    gradients: Parameters


@torch.no_grad()
def loss_and_gradients(sae: JumpReLUSAE, x: Tensor, l0_coefficient: float, bandwidth: float) -> LossAndGradients:
    """L = mean_n(‖x_n − x̂_n‖² + λ‖f_n‖₀) and its straight-through gradients (arXiv 2407.14435, equations 11 and 12).

    x: [N, d_model], N ≥ 1, already divided by the SAE's input_scale, on its device and in its dtype. l0_coefficient: λ;
    bandwidth: ε. The threshold's gradient is with respect to θ itself. Raises ValueError for an empty batch, which has
    no mean.
    """
    n = x.shape[0]
    if n == 0:
        raise ValueError("x: expected at least one token, got an empty batch")
    impl = choose(sae.impl, x.device, x.dtype).impl
    jumprelu = operator("jumprelu", impl)
    centred = x - sae.b_dec if sae.pre_encoder_bias else x
    pre = centred @ sae.W_enc
    f, l0, firing_count = jumprelu.jumprelu_forward(pre, sae.b_enc, sae.threshold)
    residual = torch.addmm(sae.b_dec, f, sae.W_dec) - x
    squared_error, mean_l0 = residual.square().sum(1).mean(), l0.mean()

    g = residual * (2 / n)
    u = g @ sae.W_dec.T
    grad_l0 = l0.new_full((1,), l0_coefficient / n).expand(n)
    dz, db_enc, dthreshold = jumprelu.jumprelu_backward(u, grad_l0, pre, sae.b_enc, sae.threshold, bandwidth)
    db_dec = g.sum(0)
    if sae.pre_encoder_bias:
        db_dec -= sae.W_enc @ db_enc
    gradients = Parameters((dz.T @ centred).T, db_enc, f.T @ g, db_dec, dthreshold)
    loss = squared_error + l0_coefficient * mean_l0
    return LossAndGradients(loss, squared_error, mean_l0, firing_count, residual, gradients)
