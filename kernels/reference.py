"""The specification of every operator in plain PyTorch, with the backward formulas written out; those of the training
step are in `reference_training.py`.

Computes in the inputs' dtype promoted to at least fp32 (fp64 stays fp64), with autocast off, on any device. The
straight-through gradients are definitions, not derivatives, so autograd cannot be their oracle: they stand here as
formulas. Symbols: N tokens, d = d_model, F = d_sae, θ = threshold, ε = bandwidth, λ = l0_coefficient.

Sources: Gemma Scope (arXiv 2408.05147) equations 1-4; JumpReLU SAEs (arXiv 2407.14435) equations 11 and 12.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)


def without_autocast(function):
    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        device = next(a.device for a in args if isinstance(a, Tensor))
        with torch.autocast(device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapped


# ---- jumprelu: the activation


def greater(a: Tensor, b: Tensor) -> Tensor:
    """1[a > b] in the dtype of a [N, F]: ten times faster on a CPU than by way of bool."""
    return a.clone().gt_(b)


def nan_or_zero(a: Tensor) -> Tensor:
    """NaN where a is NaN, else 0 (also for ±Inf)."""
    return a.clamp(0, 0)


def gate(z: Tensor, threshold: Tensor) -> Tensor:
    """1 where z > θ, 0 where z ≤ θ, NaN where they cannot be compared."""
    return greater(z, threshold).add_(nan_or_zero(z)).add_(nan_or_zero(threshold))


def activation(z: Tensor, threshold: Tensor) -> Tensor:
    """z·1[z > θ] as a product: a selected 0 would hide NaN and −Inf. The added 0 makes −0 a 0 and passes on NaN θ."""
    return torch.addcmul(nan_or_zero(threshold), z, greater(z, threshold))


def window(z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """1[|z − θ| < ε/2], both sides of the threshold; NaN where z or θ is NaN."""
    distance = (z - threshold).abs_()
    poison = nan_or_zero(distance)
    return distance.lt_(bandwidth / 2).add_(poison)


def threshold_gradient(inside: Tensor, u: Tensor, s: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """dθ_j = Σ_n w_nj·( −(θ_j/ε)·u_nj − s_n/ε ) for the window w = ``inside``, u = ∂L/∂f and s_n = ∂L/∂l0_n."""
    return -(threshold / bandwidth) * (inside * u).sum(0) - (s @ inside) / bandwidth


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


# ---- encode and decode: sparse inference


@without_autocast
def preactivations(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    """z = x·W_enc + b_enc [N, F] in the compute dtype of x; of inference and of the training step alike."""
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


# ---- the whole autoencoder: forward, loss, backward


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
