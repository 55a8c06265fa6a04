"""The specification of the activation, encoding and decoding, with the backward formulas written out.

Symbols: N tokens, d = d_model, F = d_sae, θ = threshold, ε = bandwidth. Sources: Gemma Scope (arXiv 2408.05147)
equations 1-4; JumpReLU SAEs (arXiv 2407.14435) equations 11 and 12.
"""

import torch
from torch import Tensor

from .gates import activation, compute_dtype, gate, greater, threshold_gradient, window, without_autocast


@without_autocast
def jumprelu_forward(pre: Tensor, b_enc: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """f [N, F] in the dtype of ``pre``, l0 [N], firing_count [F] int32."""
    dtype = compute_dtype(pre)
    theta = threshold.to(dtype)
    z = pre.to(dtype) + b_enc.to(dtype)
    active = greater(z, theta)
    return activation(z, theta).to(pre.dtype), active.sum(1), active.sum(0).to(torch.int32)


@without_autocast
def jumprelu_backward(
    grad_f: Tensor, grad_l0: Tensor, pre: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dpre [N, F], db_enc [F], dthreshold [F] in the dtypes of ``pre``, ``b_enc``, ``threshold``."""
    dtype = compute_dtype(pre)
    u, s, theta = grad_f.to(dtype), grad_l0.to(dtype), threshold.to(dtype)
    z = pre.to(dtype) + b_enc.to(dtype)
    dz = u * gate(z, theta)
    dtheta = threshold_gradient(window(z, theta, bandwidth), u, s, theta, bandwidth)
    return dz.to(pre.dtype), dz.sum(0).to(b_enc.dtype), dtheta.to(threshold.dtype)


@without_autocast
def preactivations(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    """z = x·W_enc + b_enc [N, F], which decides every gate, in the compute dtype."""
    dtype = compute_dtype(x)
    return x.to(dtype) @ W_enc.to(dtype) + b_enc.to(dtype)


@without_autocast
def encode_forward(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """values [nnz], indices [nnz] int32, offsets [N + 1] int64."""
    z = preactivations(x, W_enc, b_enc)
    theta = threshold.to(z.dtype)
    f = activation(z, theta)
    kept = (z > theta) | f.isnan()
    token, latent = torch.nonzero(kept, as_tuple=True)
    offsets = torch.zeros(x.shape[0] + 1, dtype=torch.int64, device=x.device)
    offsets[1:] = torch.cumsum(kept.sum(1), 0)
    return f[token, latent], latent.to(torch.int32), offsets


def _token_indices(values: Tensor, offsets: Tensor) -> Tensor:
    tokens = torch.arange(offsets.shape[0] - 1, device=offsets.device)
    return torch.repeat_interleave(tokens, offsets[1:] - offsets[:-1], output_size=values.shape[0])


@without_autocast
def decode_forward(values: Tensor, indices: Tensor, offsets: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """x̂ [N, d] in the dtype of ``W_dec``."""
    dtype = compute_dtype(W_dec)
    x_hat = b_dec.to(dtype).repeat(offsets.shape[0] - 1, 1)
    rows = W_dec.index_select(0, indices).to(dtype) * values.to(dtype)[:, None]
    return x_hat.index_add_(0, _token_indices(values, offsets), rows).to(W_dec.dtype)


@without_autocast
def decode_backward(
    grad: Tensor, values: Tensor, indices: Tensor, offsets: Tensor, W_dec: Tensor, need_values: bool, need_W: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dvalues_e = ⟨g_n, W_dec[j]⟩ [nnz] and dW_dec[j] = Σ_e values_e·g_n [F, d], for entry e = (token n, latent j)."""
    dtype = compute_dtype(W_dec)
    g = grad.to(dtype).index_select(0, _token_indices(values, offsets))
    dvalues = dW_dec = None
    if need_values:
        dvalues = (g * W_dec.index_select(0, indices).to(dtype)).sum(1).to(values.dtype)
    if need_W:
        dW_dec = torch.zeros_like(W_dec, dtype=dtype, memory_format=torch.contiguous_format)
        dW_dec = dW_dec.index_add_(0, indices, g * values.to(dtype)[:, None]).to(W_dec.dtype)
    return dvalues, dW_dec
