"""The specification of the training step's operators in plain PyTorch: the formulas of `entries.py`, in its order.

Written to be read: matrices [N, F] and [entries, d] stand in memory. Computes in fp32, in fp64 for fp64 inputs, on any
device. Symbols as in `inference.py`, with r_n = x̂_n − x_n.

Sources: JumpReLU SAEs (arXiv 2407.14435) equations 11 and 12 for the gradients; Gemma Scope (arXiv 2408.05147) section
3.2 for the optimiser.
"""

import torch
from torch import Tensor

from ..entries import (
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
from .gates import activation, compute_dtype, without_autocast
from .inference import preactivations


def _active_and_window(z: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
    """1[z > θ] and 1[|z − θ| < ε/2], bool [N, F]; the two are the indicators of equations 11 and 12.

    Pairs that cannot be compared, and z = ±Inf, are active too, so that they spoil the loss instead of being left out.
    """
    inactive = (z <= threshold) & z.isfinite()
    return ~inactive, (z - threshold).abs() < bandwidth / 2


def _with_tanh_slope(u: Tensor, f: Tensor, objective: Objective) -> Tensor:
    """∂L/∂f: u, and the slope of a penalty λ·tanh(c·f), of which tanh' = 1/cosh² does not cancel as 1 − tanh² does."""
    if not isinstance(objective.tanh_slope, Tensor) and objective.tanh_slope == 0:
        return u
    return u + objective.tanh_slope * torch.cosh(objective.tanh_scale * f).reciprocal().square()


# ---- by entries


def encode_entries(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    bandwidth: float,
    capacity: int | None,
    tf32: bool = False,
) -> Entries:
    """The pairs (n, j) with z_nj > θ_j or |z_nj − θ_j| < ε/2, z = x·W_enc + b_enc: what equations 11 and 12 sum over.

    The first ``capacity`` of them are stored (None: all of them), and room that is left holds z = 0, token 0 and the
    latent d_sae. tf32: only a GPU has it.
    """
    z = preactivations(x, W_enc, b_enc)
    active, inside = _active_and_window(z, threshold.to(z.dtype), bandwidth)
    is_entry = active | inside
    offsets = torch.zeros(x.shape[0] + 1, dtype=torch.int64, device=x.device)
    offsets[1:] = torch.cumsum(is_entry.sum(1), 0)

    token, latent = torch.nonzero(is_entry, as_tuple=True)
    token, latent = token[:capacity], latent[:capacity]
    stored = len(token)
    room = stored if capacity is None else capacity
    entries = Entries(
        z=torch.zeros(room, dtype=z.dtype, device=x.device),
        latents=torch.full((room,), W_enc.shape[1], dtype=torch.int32, device=x.device),
        tokens=torch.zeros(room, dtype=torch.int32, device=x.device),
        offsets=offsets,
    )
    entries.z[:stored] = z[token, latent]
    entries.latents[:stored] = (latent + ACTIVE * active[token, latent]).to(torch.int32)
    entries.tokens[:stored] = token.to(torch.int32)
    return entries


def residual_pass(entries: Entries, x: Tensor, W_dec: Tensor, b_dec: Tensor) -> Residual:
    """r_n = Σ_e f_e·W_dec[j] + b_dec − x_n over the stored entries e = (n, j); ‖r_n‖²; u_e = ⟨r_n, W_dec[j]⟩.

    This is ∂‖r_n‖²/∂f_nj without its factor 2, with r as it was rounded to the dtype of W_dec.
    """
    dtype = compute_dtype(x, W_dec)
    stored = min(int(entries.offsets[-1]), len(entries.z))
    z, latents, tokens = (t[:stored] for t in (entries.z.to(dtype), entries.latents, entries.tokens))
    active, rows = latents >= ACTIVE, W_dec[latents & LATENT].to(dtype)
    f = torch.where(active, z, 0 * z)  # a plain 0 would hide a z that is not finite

    sums = torch.zeros(x.shape, dtype=dtype, device=x.device).index_add_(0, tokens, f[:, None] * rows)
    r = sums + b_dec.to(dtype) - x.to(dtype)
    residual = r.to(W_dec.dtype)
    l0 = torch.zeros(len(x), dtype=dtype, device=x.device).index_add_(0, tokens, active.to(dtype))
    u = torch.zeros(len(entries.z), dtype=dtype, device=x.device)
    u[:stored] = (residual[tokens].to(dtype) * rows).sum(1)
    return Residual(residual, r.square().sum(1), l0, u)


def by_latent(entries: Entries, d_sae: int) -> ByLatent:
    """The entries sorted by latent, in a stable way: they come token after token, so tokens ascend within a latent.

    What lies beyond the last entry carries the latent ``d_sae`` and sorts behind them all.
    """
    latents = entries.latents & LATENT
    offsets = torch.zeros(d_sae + 1, dtype=torch.int64, device=latents.device)
    offsets[1:] = torch.cumsum(torch.bincount(latents, minlength=d_sae + 1)[:d_sae], 0)
    return ByLatent(torch.argsort(latents, stable=True), offsets)


def latent_pass(
    entries: Entries, u: Tensor, transposed: ByLatent, threshold: Tensor, s: Tensor, objective: Objective
) -> LatentSums:
    """Each entry's share of the gradients, and their sums by latent (equations 11 and 12), with s_n = ∂L/∂l0_n:

        u_e  = (2/N)·⟨r_n, W_dec[j]⟩ + the slope of a tanh penalty
        q_e  = 1[window]·( −(θ_j/ε)·u_e − (s_n + t_j)/ε );   dθ_j = Σ_e q_e;   t_j = frequency_slope·firing_count_j
        dz_e = 1[active]·u_e (− q_e with the straight-through estimator on z too);   db_enc_j = Σ_e dz_e

    u: [capacity] ⟨r_n, W_dec[j]⟩ of `residual_pass`.
    """
    d_sae, bandwidth, scale = len(threshold), objective.bandwidth, 2 / max(1, len(s))
    order = transposed.order[: transposed.offsets[-1]]
    latents, tokens, z, u = entries.latents[order], entries.tokens[order], entries.z[order].to(u.dtype), u[order]
    active, latents = latents >= ACTIVE, latents & LATENT
    theta, s = threshold[latents], s[tokens]
    f = torch.where(active, z, 0)

    def sum_by_latent(values: Tensor) -> Tensor:
        return torch.zeros(d_sae, dtype=values.dtype, device=values.device).index_add_(0, latents, values)

    firing_count = sum_by_latent(active.to(torch.int32))
    t = objective.frequency_slope * firing_count[latents].to(u.dtype)
    dec = scale * f
    along = sum_by_latent(dec * u)
    u = _with_tanh_slope(scale * u, f, objective)
    inside = (z - theta).abs() < bandwidth / 2
    q = torch.where(inside, -(theta / bandwidth) * u - (s + t) / bandwidth, 0)
    dz = torch.where(active, u, 0)
    if objective.ste_to_z:
        dz = dz - q

    room = len(transposed.order) - len(order)
    db_enc, dthreshold = sum_by_latent(dz), sum_by_latent(q)
    dec, dz, tokens = (torch.cat((values, values.new_zeros(room))) for values in (dec, dz, tokens))
    return LatentSums(dec, dz, tokens, db_enc, dthreshold, along, firing_count)


def weight_gradients(
    transposed: ByLatent, sums: LatentSums, residual: Tensor, x_centred: Tensor
) -> tuple[Tensor, Tensor]:
    """dW_enc[j] = Σ_e dz_e·(x_n − b_dec) and dW_dec[j] = Σ_e (2/N)·f_e·r_n over the entries of latent j: [F, d] each.

    residual and x_centred = x − b_dec: [N, d].
    """
    lengths = transposed.offsets.diff()
    latents = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    tokens = sums.tokens[: len(latents)]

    def sum_of_rows(coefficients: Tensor, rows: Tensor) -> Tensor:
        shares = coefficients[: len(latents), None] * rows[tokens].to(coefficients.dtype)
        zeros = torch.zeros(len(lengths), rows.shape[1], dtype=shares.dtype, device=rows.device)
        return zeros.index_add_(0, latents, shares)

    return sum_of_rows(sums.dz, x_centred), sum_of_rows(sums.dec, residual)


@without_autocast
def encoder_times(W_enc: Tensor, db_enc: Tensor) -> Tensor:
    """Σ_j db_enc_j·W_enc[j] for W_enc [F, d]. As z = (x − b_dec)·W_enc + b_enc, b_dec's gradient loses it. [d]"""
    return db_enc @ W_enc.to(db_enc.dtype)


def encoder_parts(W_enc: Tensor, db_enc: Tensor) -> Tensor:
    """Parts [parts, d] whose sum is `encoder_times`. How many there are is up to the implementation."""
    return encoder_times(W_enc, db_enc)[None]


# ---- by whole matrices


def dense_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float, tf32: bool = False
) -> DenseCode:
    """f = z·1[z > θ] of every pair, and which pairs `encode_entries` would find, as bool [N, F]. tf32 as there."""
    z = preactivations(x, W_enc, b_enc)
    theta = threshold.to(z.dtype)
    active, inside = _active_and_window(z, theta, bandwidth)
    is_entry = active | inside
    return DenseCode(
        f=activation(z, theta).to(x.dtype),
        active=active,
        window=inside,
        l0=active.sum(1).to(z.dtype),
        firing_count=active.sum(0).to(torch.int32),
        touched=is_entry.sum(0).to(torch.int32),
        n_entries=is_entry.sum(),
    )


def dense_backward(
    u: Tensor, code: DenseCode, threshold: Tensor, s: Tensor, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """The formulas of `latent_pass` for every pair: dz [N, F] in the memory of u, db_enc [F] and dθ [F].

    u: [N, F] r·W_decᵀ, without its 2/N. The gates are factors: a u that is not finite shows where they are 0 too.
    """
    dtype, bandwidth = compute_dtype(u), objective.bandwidth
    active, inside = code.active.to(dtype), code.window.to(dtype)
    t = objective.frequency_slope * code.firing_count.to(dtype)
    du = _with_tanh_slope(2 / max(1, len(u)) * u.to(dtype), code.f.to(dtype), objective)
    q = inside * (-(threshold / bandwidth) * du - (s[:, None] + t) / bandwidth)
    dz = active * du
    if objective.ste_to_z:
        dz = dz - q
    return u.copy_(dz), dz.sum(0), q.sum(0)


# ---- the update: Adam, by default with β1 = 0, decoder rows of unit norm (arXiv 2408.05147, section 3.2)


def _decayed(moment: Tensor, last: Tensor, step: Tensor, beta: float) -> Tensor:
    """β^(step − last_j)·v_j: what updates with a gradient of 0 would have made of a moment v as of ``last``.

    The power is taken in fp64; β in fp32 would be wrong in the fourth digit after ten thousand steps.
    """
    powers = torch.pow(torch.tensor(beta, dtype=torch.float64, device=last.device), (step - last).double())
    decay = powers.to(moment.dtype)
    return moment * (decay if moment.ndim == 1 else decay[:, None])


def settle(state: LatentState, step: Tensor, beta2: float, beta1: float = 0.0) -> None:
    """Pay every moment the decay it owes, up to ``step`` (int64 scalar: updates made)."""
    for v in (state.W_enc_v, state.W_dec_v, state.b_enc_v, state.threshold_v):
        v.copy_(_decayed(v, state.last, step, beta2))
    for m in (state.W_enc_m, state.W_dec_m, state.b_enc_m, state.threshold_m):
        if m is not None:
            m.copy_(_decayed(m, state.last, step, beta1))
    state.last.copy_(step.expand_as(state.last))


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
    """`_update` of the latents that have entries, by `weight_gradients`; nothing at all where ``ok`` is 0."""
    if not ok:
        return
    dW_enc, dW_dec = weight_gradients(transposed, sums, residual, x_centred)
    touched = transposed.offsets.diff() > 0
    _update(state, touched, dW_enc, dW_dec, sums.along, sums.db_enc, sums.dthreshold, rule, step)


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
    """`_update` of the latents with touched [F] (int32) > 0; nothing at all where ``ok`` is 0."""
    if not ok:
        return
    along = (dW_dec * state.W_dec).sum(1)
    _update(state, touched > 0, dW_enc, dW_dec, along, db_enc, dthreshold, rule, step)


def _update(
    state: LatentState,
    touched: Tensor,
    dW_enc: Tensor,
    dW_dec: Tensor,
    along: Tensor,
    db_enc: Tensor,
    dthreshold: Tensor,
    rule: Rule,
    step: Tensor,
) -> None:
    """Adam, in place, on the latents with ``touched`` [F]; no bit of the others changes.

    For a parameter p with gradient g, its moments m and v as of update last_j, and this update the k-th, k = step + 1:

        m ← β1^(k − last_j)·m + (1 − β1)·g;   v ← β2^(k − last_j)·v + (1 − β2)·g²
        p ← p − lr·(m/(1 − β1^k))/(√(v/(1 − β2^k)) + eps);   last_j ← k

    With β1 = 0 that moves as Adam does, since then nothing else would move; m is g and is not kept. With β1 > 0 an idle
    latent waits, as in `torch.optim.SparseAdam`, where Adam would let it drift on; its m has decayed when it moves.

    The gradient of a decoder row first loses its component along the row, ``along`` = ⟨dW_dec[j], W_dec[j]⟩ times the
    row, and the moved row is divided by its norm. θ = exp(t) moves by t, with dL/dt = θ·dL/dθ, where the rule says so,
    and it does not fall below 0.
    """
    rows = torch.nonzero(touched)[:, 0]
    k = step + 1
    correction, correction_m = 1 - rule.beta2 ** int(k), 1 - rule.beta1 ** int(k)

    def change(m: Tensor | None, v: Tensor, gradient: Tensor) -> Tensor:
        """What is to be added to the parameter in ``rows``; brings m and v up to date there."""
        g, last = gradient[rows], state.last[rows]
        v[rows] = _decayed(v[rows], last, k, rule.beta2) + (1 - rule.beta2) * g.square()
        if m is not None:
            m[rows] = _decayed(m[rows], last, k, rule.beta1) + (1 - rule.beta1) * g
            g = m[rows] / correction_m
        return -rule.learning_rate * g / ((v[rows] / correction).sqrt() + rule.eps)

    state.W_enc[rows] += change(state.W_enc_m, state.W_enc_v, dW_enc)
    W_dec = state.W_dec[rows] + change(state.W_dec_m, state.W_dec_v, dW_dec - along[:, None] * state.W_dec)
    state.W_dec[rows] = W_dec / W_dec.norm(dim=1, keepdim=True)
    state.b_enc[rows] += change(state.b_enc_m, state.b_enc_v, db_enc)
    if rule.log_threshold:
        state.threshold[rows] *= change(state.threshold_m, state.threshold_v, state.threshold * dthreshold).exp()
    else:
        state.threshold[rows] += change(state.threshold_m, state.threshold_v, dthreshold)
    state.threshold[rows] = state.threshold[rows].clamp(min=0)
    state.last[rows] = k

    if state.W_enc_low is not None:
        state.W_enc_low[rows] = state.W_enc[rows].to(state.W_enc_low.dtype)
    if state.W_dec_low is not None:
        state.W_dec_low[rows] = state.W_dec[rows].to(state.W_dec_low.dtype)
