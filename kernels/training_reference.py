"""The operators of the training step in plain PyTorch: their specification, and how they run on a CPU.

`training.py` says what each exchanges with the next. Sums over entries go through `embedding_bag`, which a CPU does
40 times faster than the dense products it replaces. Computes in fp32, or in fp64 when the state is fp64.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from ._transpose import by_latent as by_latent
from .reference import activation, compute_dtype, gate, window
from .training import (
    ACTIVE,
    LATENT,
    ByLatent,
    DenseCode,
    Entries,
    LatentState,
    LatentSums,
    Objective,
    Residual,
    Rule,
)


def encode_entries(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    bandwidth: float,
    capacity: int | None,
    tf32: bool = False,
) -> Entries:
    """x [N, d] and W_enc [d, F] of one dtype (fp32, bf16; fp64), b_enc and θ [F]. capacity: None for as much as there
    is. tf32: only the GPU has it."""
    dtype = compute_dtype(x)
    z = torch.addmm(b_enc.to(dtype), x.to(dtype), W_enc.to(dtype))
    near = z > threshold - bandwidth  # all that may be entries, in one pass
    if not z.sum().isfinite():  # NaN and ±Inf are entries, so that they spoil the loss
        near |= ~(z <= threshold) | (z == -torch.inf)
    token, latent = torch.nonzero(near, as_tuple=True)
    values, theta = z[token, latent], threshold[latent]
    active = ~(values <= theta) | (values == -torch.inf)
    kept = active | ((values - theta).abs() < bandwidth / 2)
    offsets = F.pad(torch.bincount(token[kept], minlength=x.shape[0]).cumsum(0), (1, 0))
    latent = (latent + ACTIVE * active).to(torch.int32)
    values, latent, token = (t[kept][:capacity] for t in (values, latent, token.to(torch.int32)))
    room = 0 if capacity is None else capacity - len(values)
    return Entries(
        F.pad(values, (0, room)), F.pad(latent, (0, room), value=W_enc.shape[1]), F.pad(token, (0, room)), offsets
    )


def _count(entries: Entries) -> int:
    return min(int(entries.offsets[-1]), entries.z.shape[0])


def _dot_rows(a: Tensor, b: Tensor, offsets: Tensor, columns: Tensor) -> Tensor:
    """⟨a[n], b[columns_e]⟩ for the entries e of each row n in compressed rows."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse")  # a notice that CSR tensors are new, once a process
        pattern = torch.sparse_csr_tensor(
            offsets.to(torch.int32),
            columns,
            torch.zeros(columns.shape, dtype=a.dtype, device=a.device),
            size=(a.shape[0], b.shape[0]),
            check_invariants=False,
        )
        return torch.sparse.sampled_addmm(pattern, a, b.T, beta=0).values()


def residual_pass(entries: Entries, x: Tensor, W_dec: Tensor, b_dec: Tensor) -> Residual:
    """x [N, d] fp32 (not rounded, b_dec not subtracted), W_dec [F, d] fp32 or bf16, b_dec [d] fp32."""
    dtype, nnz = compute_dtype(x, W_dec), _count(entries)
    latents, tokens = entries.latents[:nnz] & LATENT, entries.tokens[:nnz]
    active = entries.latents[:nnz] >= ACTIVE
    z = entries.z[:nnz]
    f = torch.where(active, z, z - z).to(dtype)  # z − z is 0, or NaN for −Inf: a plain 0 would hide it
    W = W_dec.to(dtype)
    starts = entries.offsets[:-1].clamp(max=nnz)
    x_hat = F.embedding_bag(latents.long(), W, starts, mode="sum", per_sample_weights=f) + b_dec
    residual = x_hat - x
    rounded = residual.to(W_dec.dtype)
    u = F.pad(_dot_rows(rounded.to(dtype), W, entries.offsets.clamp(max=nnz), latents), (0, entries.z.shape[0] - nnz))
    l0 = torch.zeros(x.shape[0], dtype=dtype, device=x.device).index_add_(0, tokens, active.to(dtype))
    return Residual(rounded, residual.square().sum(1), l0, u)


def _penalised(u: Tensor, f: Tensor, objective: Objective) -> Tensor:
    if not objective.tanh_slope:
        return u
    return u + objective.tanh_slope * (1 - torch.tanh(objective.tanh_scale * f).square())


def latent_pass(
    entries: Entries, u: Tensor, transposed: ByLatent, threshold: Tensor, s: Tensor, objective: Objective
) -> LatentSums:
    """u [capacity] of `residual_pass`, θ [F], s [N] = ∂L/∂l0."""
    d_sae, scale, bandwidth = threshold.shape[0], 2 / s.shape[0], objective.bandwidth
    nnz = int(transposed.offsets[-1])
    order, room = transposed.order[:nnz], transposed.order.shape[0] - nnz
    latents = entries.latents[order]
    active, latents = latents >= ACTIVE, latents & LATENT
    z, tokens, theta = entries.z[order].to(u.dtype), entries.tokens[order], threshold[latents]
    inside = (z - theta).abs() < bandwidth / 2
    f, u = torch.where(active, z, 0), scale * u[order]

    def by_latent_sum(values: Tensor) -> Tensor:
        return torch.zeros(d_sae, dtype=values.dtype, device=values.device).index_add_(0, latents, values)

    count = by_latent_sum(active.to(torch.int32))
    along = by_latent_sum(f * u)
    u = _penalised(u, f, objective)
    penalty = s[tokens] + objective.frequency_slope * count[latents]
    q = torch.where(inside, -(theta * u + penalty) / bandwidth, 0)
    dz = torch.where(active, u, 0)
    if objective.ste_to_z:
        dz = dz - q
    padded = (F.pad(values, (0, room)) for values in (scale * f, dz, tokens))
    return LatentSums(*padded, by_latent_sum(dz), by_latent_sum(q), along, count)


def _sum_rows(coefficients: Tensor, rows: Tensor, table: Tensor, offsets: Tensor) -> Tensor:
    """Σ_e coefficients_e·table[rows_e] for each latent's entries e: [F, d]."""
    nnz, dtype = int(offsets[-1]), coefficients.dtype
    return F.embedding_bag(
        rows[:nnz].long(), table.to(dtype), offsets[:-1], mode="sum", per_sample_weights=coefficients[:nnz]
    )


def weight_gradients(
    transposed: ByLatent, sums: LatentSums, residual: Tensor, x_centred: Tensor
) -> tuple[Tensor, Tensor]:
    """dW_enc and dW_dec, [F, d] each, fp32. residual and x_centred = x − b_dec: [N, d]."""
    return (
        _sum_rows(sums.dz, sums.tokens, x_centred, transposed.offsets),
        _sum_rows(sums.dec, sums.tokens, residual, transposed.offsets),
    )


def encoder_times(W_enc: Tensor, db_enc: Tensor) -> Tensor:
    """Σ_j db_enc_j·W_enc[j] for W_enc [F, d]: what the pre-encoder bias takes from its gradient. [d] fp32."""
    return db_enc @ W_enc.to(db_enc.dtype)


# ---- dense


def dense_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float, tf32: bool = False
) -> DenseCode:
    """Arguments as of `encode_entries`; every latent of every token."""
    dtype = compute_dtype(x)
    z = torch.addmm(b_enc.to(dtype), x.to(dtype), W_enc.to(dtype))
    active, inside = gate(z, threshold), window(z, threshold, bandwidth)
    touched = torch.maximum(active, inside).sum(0)
    return DenseCode(
        activation(z, threshold).to(x.dtype),
        active,
        inside,
        active.sum(1),
        active.sum(0).nan_to_num_(0).to(torch.int32),
        touched.nan_to_num(1).to(torch.int32),
        touched.nan_to_num(1).sum().to(torch.int64),
    )


def dense_backward(
    u: Tensor, code: DenseCode, threshold: Tensor, s: Tensor, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """dz [N, F] in the dtype of u (in its memory), db_enc [F], dθ [F], from u = r·W_decᵀ [N, F] without its 2/N."""
    dtype, bandwidth = compute_dtype(u), objective.bandwidth
    du = _penalised(u.to(dtype).mul(2 / u.shape[0]), code.f.to(dtype), objective)
    penalty = s[:, None] + objective.frequency_slope * code.firing_count
    if objective.ste_to_z:
        q = code.window * -(threshold * du + penalty) / bandwidth
        dz, dthreshold = du.mul_(code.active).sub_(q), q.sum(0)
    else:
        frequency = objective.frequency_slope * code.firing_count * code.window.sum(0)
        dthreshold = -(threshold * (code.window * du).sum(0) + s @ code.window + frequency) / bandwidth
        dz = du.mul_(code.active)
    return u.copy_(dz), dz.sum(0), dthreshold


# ---- the update


def _owed_decay(last: Tensor, step: Tensor, beta2: float) -> Tensor:
    """β2 to the power of the updates from ``last`` to ``step``, in fp64."""
    return torch.pow(torch.tensor(beta2, dtype=torch.float64, device=last.device), (step - last).double())


def settle(state: LatentState, step: Tensor, beta2: float) -> None:
    """Pay every second moment the decay it owes, up to ``step`` (int64 scalar: updates made)."""
    decay = _owed_decay(state.last, step, beta2)
    for v in (state.W_enc_v, state.W_dec_v, state.b_enc_v, state.threshold_v):
        v.mul_(decay.to(v.dtype).view(-1, *[1] * (v.ndim - 1)))
    state.last.copy_(step.expand_as(state.last))


def adam_direction(v: Tensor, gradient: Tensor, decay: Tensor | float, rule: Rule, correction: float) -> Tensor:
    """Bring the second moments v up to date in place; returns g / (√(v/correction) + eps)."""
    v.mul_(decay).addcmul_(gradient, gradient, value=1 - rule.beta2)
    return gradient / (v / correction).sqrt_().add_(rule.eps)


def update_from_entries(
    state: LatentState,
    transposed: ByLatent,
    sums: LatentSums,
    residual: Tensor,
    x_centred: Tensor,
    rule: Rule,
    ok: Tensor,
    step: Tensor,
) -> None:
    """Adam on every latent that has entries, unless ``ok`` (int32 scalar) is 0. step: int64 scalar, updates so far.

    The decoder's gradient loses its component along the latent, and the latent returns to unit norm.
    """
    if not ok:
        return
    dW_enc, dW_dec = weight_gradients(transposed, sums, residual, x_centred)
    dW_dec -= sums.along[:, None] * state.W_dec
    touched = transposed.offsets.diff() > 0
    _update(state, dW_enc, dW_dec, sums.db_enc, sums.dthreshold, touched, rule, step)


def update_from_dense(
    state: LatentState,
    dW_enc: Tensor,
    dW_dec: Tensor,
    db_enc: Tensor,
    dthreshold: Tensor,
    touched: Tensor,
    rule: Rule,
    ok: Tensor,
    step: Tensor,
) -> None:
    """The same from gradients [F, d] that stand in memory, of the latents with touched [F] (int32) > 0."""
    if ok:
        dW_dec = dW_dec - (dW_dec * state.W_dec).sum(1, keepdim=True) * state.W_dec
        _update(state, dW_enc, dW_dec, db_enc, dthreshold, touched > 0, rule, step)


def _update(
    state: LatentState,
    dW_enc: Tensor,
    dW_dec: Tensor,
    db_enc: Tensor,
    dthreshold: Tensor,
    touched: Tensor,
    rule: Rule,
    step: Tensor,
) -> None:
    (rows,) = torch.nonzero(touched, as_tuple=True)
    step = step + 1
    decay = _owed_decay(state.last[rows], step, rule.beta2).to(state.W_dec.dtype)
    correction = 1 - rule.beta2 ** int(step)

    def moved(parameter: Tensor, v: Tensor, gradient: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        v_rows = v[rows]
        direction = adam_direction(v_rows, gradient[rows], factor, rule, correction)
        v[rows] = v_rows
        return parameter[rows], rule.learning_rate * direction

    weight, change = moved(state.W_enc, state.W_enc_v, dW_enc, decay[:, None])
    state.W_enc[rows] = weight - change
    weight, change = moved(state.W_dec, state.W_dec_v, dW_dec, decay[:, None])
    weight = weight - change
    state.W_dec[rows] = weight / weight.norm(dim=1, keepdim=True)
    bias, change = moved(state.b_enc, state.b_enc_v, db_enc, decay)
    state.b_enc[rows] = bias - change
    dt = state.threshold * dthreshold if rule.log_threshold else dthreshold  # dL/dt = θ·dL/dθ for θ = exp(t)
    theta, change = moved(state.threshold, state.threshold_v, dt, decay)
    theta = theta * torch.exp(-change) if rule.log_threshold else theta - change
    state.threshold[rows] = theta.clamp(min=0)
    state.last[rows] = step
    for weight, low in ((state.W_enc, state.W_enc_low), (state.W_dec, state.W_dec_low)):
        if low is not None:
            low[rows] = weight[rows].to(low.dtype)
