"""The specification of a whole autoencoder: forward, loss, and the gradients that the training step must equal.

Sources: Gemma Scope (arXiv 2408.05147) equations 1-4; JumpReLU SAEs (arXiv 2407.14435) equations 11 and 12.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .gates import activation, compute_dtype, gate, threshold_gradient, window, without_autocast


class Parameters(NamedTuple):
    W_enc: Tensor  # [d, F]
    b_enc: Tensor  # [F]
    W_dec: Tensor  # [F, d]
    b_dec: Tensor  # [d]
    threshold: Tensor  # [F]


class Forward(NamedTuple):
    z: Tensor  # [N, F]
    f: Tensor  # [N, F]
    l0: Tensor  # [N]
    x_hat: Tensor  # [N, d]


@without_autocast
def sae_forward(x: Tensor, p: Parameters, pre_encoder_bias: bool = True) -> Forward:
    """z = (x − b_dec)·W_enc + b_enc; f = z·1[z > θ]; x̂ = f·W_dec + b_dec, in the compute dtype."""
    dtype = compute_dtype(x, p.W_enc)
    x, p = x.to(dtype), Parameters(*(t.to(dtype) for t in p))
    z = ((x - p.b_dec) if pre_encoder_bias else x) @ p.W_enc + p.b_enc
    f = activation(z, p.threshold)
    return Forward(z, f, (z > p.threshold).sum(1).to(dtype), f @ p.W_dec + p.b_dec)


def sae_loss(x: Tensor, out: Forward, l0_coefficient: float) -> Tensor:
    """L = mean_n( ‖x_n − x̂_n‖² + λ‖f_n‖₀ ), squared error summed over d."""
    return ((x.to(out.x_hat.dtype) - out.x_hat).square().sum(1) + l0_coefficient * out.l0).mean()


@without_autocast
def sae_backward(
    x: Tensor,
    p: Parameters,
    out: Forward,
    l0_coefficient: float,
    bandwidth: float,
    pre_encoder_bias: bool = True,
    threshold_parametrisation: str = "raw",
) -> Parameters:
    """Gradients of `sae_loss`, straight-through for the threshold.

    With ``threshold_parametrisation="log"`` the last one is dL/dt for θ = exp(t), that is θ·dL/dθ.
    """
    n, dtype = x.shape[0], out.x_hat.dtype
    x, p = x.to(dtype), Parameters(*(t.to(dtype) for t in p))
    g = 2 * (out.x_hat - x) / n
    u = g @ p.W_dec.T
    dz = u * gate(out.z, p.threshold)
    db_enc = dz.sum(0)
    s = torch.full_like(out.l0, l0_coefficient) / n
    dtheta = threshold_gradient(window(out.z, p.threshold, bandwidth), u, s, p.threshold, bandwidth)
    if threshold_parametrisation == "log":
        dtheta = p.threshold * dtheta
    elif threshold_parametrisation != "raw":
        raise ValueError(f"threshold_parametrisation: expected 'log' or 'raw', got {threshold_parametrisation!r}")
    x_centred = (x - p.b_dec) if pre_encoder_bias else x
    db_dec = g.sum(0) - (p.W_enc @ db_enc if pre_encoder_bias else 0)
    return Parameters(x_centred.T @ dz, db_enc, out.f.T @ g, db_dec, dtheta)
