"""The operators of the training step in plain PyTorch: their specification, and how they run on a CPU.

`training.py` says what each exchanges with the next. Sums over entries go through `embedding_bag`, which a CPU does
40 times faster than the dense products it replaces. Computes in fp32, or in fp64 when the state is fp64.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._pytorch import (
    CORE_ELEMENTS,
    GATHER_ELEMENTS,
    dot_rows,
    near_threshold,
    preactivations,
    row_offsets,
    row_pieces,
    rows_in,
    sum_rows,
    true_positions,
)
from ._transpose import by_latent as by_latent
from .entries import (
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
from .reference import activation, compute_dtype, gate, window


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
    z, token, latent = near_threshold(x, W_enc, b_enc, threshold, bandwidth)
    theta = threshold.index_select(0, latent)
    active = ~(z <= theta) | (z == -torch.inf)  # NaN and ±Inf are entries, so that they spoil the loss
    kept = true_positions(active | ((z - theta).abs() < bandwidth / 2))
    latent = (latent + ACTIVE * active).to(torch.int32)
    values, latent, token = (t.index_select(0, kept) for t in (z, latent, token.to(torch.int32)))
    offsets = row_offsets(token, x.shape[0])
    values, latent, token = values[:capacity], latent[:capacity], token[:capacity]
    room = 0 if capacity is None else capacity - len(values)
    return Entries(
        F.pad(values, (0, room)), F.pad(latent, (0, room), value=W_enc.shape[1]), F.pad(token, (0, room)), offsets
    )


def _count(entries: Entries) -> int:
    return min(int(entries.offsets[-1]), entries.z.shape[0])


def residual_pass(entries: Entries, x: Tensor, W_dec: Tensor, b_dec: Tensor) -> Residual:
    """x [N, d] fp32 (not rounded, b_dec not subtracted), W_dec [F, d] fp32 or bf16, b_dec [d] fp32."""
    dtype, nnz = compute_dtype(x, W_dec), _count(entries)
    latents, tokens = entries.latents[:nnz] & LATENT, entries.tokens[:nnz]
    active = entries.latents[:nnz] >= ACTIVE
    z = entries.z[:nnz]
    f = torch.where(active, z, z - z).to(dtype)  # z − z is 0, or NaN for −Inf: a plain 0 would hide it
    offsets = entries.offsets.clamp(max=nnz)
    residual = torch.empty(x.shape, dtype=W_dec.dtype, device=x.device)
    squared_error = torch.empty(x.shape[0], dtype=dtype, device=x.device)
    u = torch.zeros(entries.z.shape[0], dtype=dtype, device=x.device)
    for rows, part in row_pieces(
        offsets, max(1, GATHER_ELEMENTS // max(1, x.shape[1]))
    ):  # both sums find the rows of W_dec in a cache
        W, columns = rows_in(dtype, W_dec, latents[part])
        r = sum_rows(f[part], columns, W, offsets[rows] - part.start).add_(b_dec).sub_(x[rows])
        squared_error[rows] = r.square().sum(1)
        residual[rows] = r
        starts = offsets[rows.start : rows.stop + 1] - part.start
        u[part] = dot_rows(residual[rows].to(dtype), W, starts, columns)
    l0 = torch.zeros(x.shape[0], dtype=dtype, device=x.device).index_add_(0, tokens, active.to(dtype))
    return Residual(residual, squared_error, l0, u)


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
    latents = entries.latents.index_select(0, order)
    active, latents = latents >= ACTIVE, latents & LATENT
    z, tokens = (t.index_select(0, order) for t in (entries.z.to(u.dtype), entries.tokens))
    theta = threshold.index_select(0, latents)
    inside = (z - theta).abs() < bandwidth / 2
    f, u = torch.where(active, z, 0), scale * u.index_select(0, order)

    def by_latent_sum(values: Tensor) -> Tensor:
        return torch.zeros(d_sae, dtype=values.dtype, device=values.device).index_add_(0, latents, values)

    count = by_latent_sum(active.to(torch.int32))
    along = by_latent_sum(f * u)
    u = _penalised(u, f, objective)
    penalty = s.index_select(0, tokens) + objective.frequency_slope * count.index_select(0, latents)
    q = torch.where(inside, -(theta * u + penalty) / bandwidth, 0)
    dz = torch.where(active, u, 0)
    if objective.ste_to_z:
        dz = dz - q
    padded = (F.pad(values, (0, room)) for values in (scale * f, dz, tokens))
    return LatentSums(*padded, by_latent_sum(dz), by_latent_sum(q), along, count)


def weight_gradients(
    transposed: ByLatent, sums: LatentSums, residual: Tensor, x_centred: Tensor
) -> tuple[Tensor, Tensor]:
    """dW_enc and dW_dec, [F, d] each, fp32. residual and x_centred = x − b_dec: [N, d]."""
    nnz, dtype = int(transposed.offsets[-1]), sums.dz.dtype
    return tuple(
        sum_rows(coefficients[:nnz], sums.tokens[:nnz], table.to(dtype), transposed.offsets[:-1])
        for coefficients, table in ((sums.dz, x_centred), (sums.dec, residual))
    )


def encoder_times(W_enc: Tensor, db_enc: Tensor) -> Tensor:
    """Σ_j db_enc_j·W_enc[j] for W_enc [F, d]: what the pre-encoder bias takes from its gradient. [d] fp32."""
    return db_enc @ W_enc.to(db_enc.dtype)


# ---- dense


def dense_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float, tf32: bool = False
) -> DenseCode:
    """Arguments as of `encode_entries`; every latent of every token."""
    z = preactivations(x, W_enc, b_enc)
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


class _Piece(NamedTuple):
    """Latents updated together, from ``first`` to before ``stop``: ``rows`` is that slice, or some numbers in it."""

    rows: slice | Tensor
    first: int
    stop: int


def _pieces(touched: Tensor, d: int) -> Iterator[_Piece]:
    """The latents with ``touched`` [F], a cache-full of rows at a time: a slice where they are most of it, whose rows
    are then worked on where they lie, else their numbers."""
    (latents,) = torch.nonzero(touched, as_tuple=True)
    for numbers in latents.split(max(1, CORE_ELEMENTS // max(1, d))):
        if len(numbers):
            first, stop = int(numbers[0]), int(numbers[-1]) + 1
            rows = slice(first, stop) if stop - first <= 1.5 * len(numbers) else numbers
            yield _Piece(rows, first, stop)


def _adam_(weight: Tensor, v: Tensor, gradient: Tensor, decay: Tensor, rule: Rule, correction: float) -> None:
    """v ← decay·v + (1 − β2)·g²;  weight ← weight − lr·g / (√(v/correction) + eps), in place.

    A gradient of 0 with a decay of 1 leaves a row bit for bit as it was.
    """
    v.mul_(decay).addcmul_(gradient, gradient, value=1 - rule.beta2)
    root = correction**0.5
    weight.addcdiv_(gradient, v.sqrt().add_(rule.eps * root), value=-rule.learning_rate * root)


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
    dtype, bounds, touched = sums.dz.dtype, transposed.offsets.tolist(), transposed.offsets.diff() > 0
    starts, along = transposed.offsets[:-1].to(sums.tokens.dtype), torch.where(touched, sums.along, 0)[:, None]
    x_centred, residual = x_centred.to(dtype), residual.to(dtype)

    def gradient(coefficients: Tensor, table: Tensor, piece: _Piece) -> Tensor:
        entries = slice(bounds[piece.first], bounds[piece.stop])  # idle latents between the others have none
        return sum_rows(coefficients[entries], sums.tokens[entries], table, starts[piece.rows] - entries.start)

    def encoder(piece: _Piece, W_enc: Tensor) -> Tensor:
        return gradient(sums.dz, x_centred, piece)

    def decoder(piece: _Piece, W_dec: Tensor) -> Tensor:
        return gradient(sums.dec, residual, piece).addcmul_(along[piece.rows], W_dec, value=-1)

    _update(state, encoder, decoder, sums.db_enc, sums.dthreshold, touched, rule, step)


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
    if not ok:
        return
    touched = touched > 0
    every = bool(touched.all())

    def of_touched(gradient: Tensor, piece: _Piece) -> Tensor:
        return gradient if every else torch.where(touched[piece.rows, None], gradient, 0)

    def encoder(piece: _Piece, W_enc: Tensor) -> Tensor:
        return of_touched(dW_enc[piece.rows], piece)

    def decoder(piece: _Piece, W_dec: Tensor) -> Tensor:
        g = dW_dec[piece.rows]
        return of_touched(torch.addcmul(g, (g * W_dec).sum(1, keepdim=True), W_dec, value=-1), piece)

    _update(state, encoder, decoder, db_enc, dthreshold, touched, rule, step)


def _update(
    state: LatentState,
    dW_enc: Callable[[_Piece, Tensor], Tensor],
    dW_dec: Callable[[_Piece, Tensor], Tensor],
    db_enc: Tensor,
    dthreshold: Tensor,
    touched: Tensor,
    rule: Rule,
    step: Tensor,
) -> None:
    """dW_enc and dW_dec: from a piece and its weights to the gradient of those rows, 0 where nothing is touched."""
    step = step + 1
    decay = torch.where(touched, _owed_decay(state.last, step, rule.beta2).to(state.W_dec.dtype), 1)
    correction, by_row = 1 - rule.beta2 ** int(step), (touched[:, None], decay[:, None])
    for piece in _pieces(touched, state.W_dec.shape[1]):
        moving, factor = (column[piece.rows] for column in by_row)
        for weights, moments, low, gradient in (
            (state.W_enc, state.W_enc_v, state.W_enc_low, dW_enc),
            (state.W_dec, state.W_dec_v, state.W_dec_low, dW_dec),
        ):
            weight, v = weights[piece.rows], moments[piece.rows]
            _adam_(weight, v, gradient(piece, weight), factor, rule, correction)
            if weights is state.W_dec:
                weight.div_(torch.where(moving, weight.norm(dim=1, keepdim=True), 1))
            if not isinstance(piece.rows, slice):
                weights[piece.rows], moments[piece.rows] = weight, v
            if low is not None:
                low[piece.rows] = weight.to(low.dtype)

    db_enc, dthreshold = (torch.where(touched, gradient, 0) for gradient in (db_enc, dthreshold))
    _adam_(state.b_enc, state.b_enc_v, db_enc, decay, rule, correction)
    if rule.log_threshold:  # dL/dt = θ·dL/dθ for θ = exp(t)
        change = torch.zeros_like(state.threshold)
        _adam_(change, state.threshold_v, state.threshold * dthreshold, decay, rule, correction)
        state.threshold.mul_(change.exp())
    else:
        _adam_(state.threshold, state.threshold_v, dthreshold, decay, rule, correction)
        state.threshold.copy_(torch.where(touched, state.threshold.clamp(min=0), state.threshold))
    state.last.copy_(torch.where(touched, step, state.last))
