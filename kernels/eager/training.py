"""The operators of the training step by PyTorch's own sparse operations: a CPU without the native backend runs them.

Same signatures and results as `reference_training.py`, which has the formulas. Sums over entries go through
`embedding_bag`, which a CPU does 40 times faster than the dense products it replaces; what is as large as the weights
is worked on a cache-full of rows at a time. Computes in fp32, or in fp64 when the state is fp64.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
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
from ..reference.gates import activation, compute_dtype
from ..reference.training import settle as settle
from ..transpose import by_latent as by_latent
from .inference import (
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


def encode_entries(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    bandwidth: float,
    capacity: int | None,
    tf32: bool = False,
) -> Entries:
    """The candidates above θ − ε, which `near_threshold` finds tile by tile, less those below the window."""
    z, token, latent = near_threshold(x, W_enc, b_enc, threshold, bandwidth)
    theta = threshold.index_select(0, latent)
    active = ~(z <= theta) | z.isinf()  # NaN and ±Inf are entries, so that they spoil the loss
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
    """How many entries are stored, which waits for the device."""
    return min(int(entries.offsets[-1]), entries.z.shape[0])


def residual_pass(entries: Entries, x: Tensor, W_dec: Tensor, b_dec: Tensor) -> Residual:
    """r_n and u, for so many tokens at a time that both sums find the rows of W_dec in a cache."""
    dtype, nnz = compute_dtype(x, W_dec), _count(entries)
    latents, tokens = entries.latents[:nnz] & LATENT, entries.tokens[:nnz]
    active = entries.latents[:nnz] >= ACTIVE
    z = entries.z[:nnz]
    f = torch.where(active, z, z - z).to(dtype)  # z − z is 0, or NaN for −Inf: a plain 0 would hide it
    offsets = entries.offsets.clamp(max=nnz)
    residual = torch.empty(x.shape, dtype=W_dec.dtype, device=x.device)
    squared_error = torch.empty(x.shape[0], dtype=dtype, device=x.device)
    u = torch.zeros(entries.z.shape[0], dtype=dtype, device=x.device)
    for rows, part in row_pieces(offsets, max(1, GATHER_ELEMENTS // max(1, x.shape[1]))):
        W, columns = rows_in(dtype, W_dec, latents[part])
        r = sum_rows(f[part], columns, W, offsets[rows] - part.start).add_(b_dec).sub_(x[rows])
        squared_error[rows] = r.square().sum(1)
        residual[rows] = r
        starts = offsets[rows.start : rows.stop + 1] - part.start
        u[part] = dot_rows(residual[rows].to(dtype), W, starts, columns)
    l0 = torch.zeros(x.shape[0], dtype=dtype, device=x.device).index_add_(0, tokens, active.to(dtype))
    return Residual(residual, squared_error, l0, u)


def _penalised(u: Tensor, f: Tensor, objective: Objective) -> Tensor:
    """u, and the slope of a tanh penalty: 1/cosh² = 1 − tanh², without its cancellation."""
    if not isinstance(objective.tanh_slope, Tensor) and objective.tanh_slope == 0:
        return u
    return u + objective.tanh_slope * torch.cosh(objective.tanh_scale * f).reciprocal_().square_()


def latent_pass(
    entries: Entries, u: Tensor, transposed: ByLatent, threshold: Tensor, s: Tensor, objective: Objective
) -> LatentSums:
    """All coefficients at once, then `index_add_` for the sums by latent: vectors as long as there are entries."""
    d_sae, scale, bandwidth = threshold.shape[0], 2 / max(1, s.shape[0]), objective.bandwidth
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
    penalty = s.index_select(0, tokens) + objective.frequency_slope * count.index_select(0, latents).to(u.dtype)
    q = torch.where(inside, -(theta * u + penalty) / bandwidth, 0)
    dz = torch.where(active, u, 0)
    if objective.ste_to_z:
        dz = dz - q
    db_enc, dthreshold = by_latent_sum(dz), by_latent_sum(q)
    dec, dz, tokens = (F.pad(values, (0, room)) for values in (scale * f, dz, tokens))
    return LatentSums(dec, dz, tokens, db_enc, dthreshold, along, count)


def weight_gradients(
    transposed: ByLatent, sums: LatentSums, residual: Tensor, x_centred: Tensor
) -> tuple[Tensor, Tensor]:
    """dW_enc and dW_dec: the rows of the tokens that each latent's list names, weighted and summed."""
    nnz, dtype = int(transposed.offsets[-1]), sums.dz.dtype
    dW_enc, dW_dec = (
        sum_rows(coefficients[:nnz], sums.tokens[:nnz], table.to(dtype), transposed.offsets[:-1])
        for coefficients, table in ((sums.dz, x_centred), (sums.dec, residual))
    )
    return dW_enc, dW_dec


def encoder_times(W_enc: Tensor, db_enc: Tensor) -> Tensor:
    """Σ_j db_enc_j·W_enc[j], one product of a vector and a matrix."""
    return db_enc @ W_enc.to(db_enc.dtype)


def encoder_parts(W_enc: Tensor, db_enc: Tensor) -> Tensor:
    return encoder_times(W_enc, db_enc)[None]


# ---- dense


def dense_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float, tf32: bool = False
) -> DenseCode:
    """The masks are 0 and 1 in the dtype of z, which a CPU makes and multiplies faster than bool."""
    z = preactivations(x, W_enc, b_enc)
    f = activation(z, threshold)
    inside = (z - threshold).abs_().lt_(bandwidth / 2)
    # z − z is 0, but NaN where z is not finite, which then is not ≤ θ: such pairs are active.
    active = (z - z).add_(z).le_(threshold).neg_().add_(1)
    touched = torch.maximum(active, inside).sum(0).to(torch.int32)
    return DenseCode(
        f.to(x.dtype), active, inside, active.sum(1), active.sum(0).to(torch.int32), touched, touched.sum()
    )


def dense_backward(
    u: Tensor, code: DenseCode, threshold: Tensor, s: Tensor, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """dz in the memory of u, db_enc, dθ. q is made only for the straight-through estimator on z, else summed alone."""
    dtype, bandwidth = compute_dtype(u), objective.bandwidth
    du = _penalised(u.to(dtype).mul(2 / max(1, u.shape[0])), code.f.to(dtype), objective)
    frequency = objective.frequency_slope * code.firing_count.to(dtype)
    if objective.ste_to_z:
        q = code.window * -(threshold * du + (s[:, None] + frequency)) / bandwidth
        dz, dthreshold = du.mul_(code.active).sub_(q), q.sum(0)
    else:
        frequency = frequency * code.window.sum(0)
        dthreshold = -(threshold * (code.window * du).sum(0) + s @ code.window + frequency) / bandwidth
        dz = du.mul_(code.active)
    return u.copy_(dz), dz.sum(0), dthreshold


# ---- the update


def _owed_decay(last: Tensor, step: Tensor, beta: float) -> Tensor:
    """β to the power of the updates from ``last`` to ``step``, in fp64."""
    return torch.pow(torch.tensor(beta, dtype=torch.float64, device=last.device), (step - last).double())


class _Piece(NamedTuple):
    """Latents that are updated together, all of them in the range first:stop.

    Indexing a weight with ``rows`` gives their rows. Where ``rows`` is the slice first:stop that is a view, so that the
    update writes into the weight itself, but latents that are not touched may be among them and must not move. Where
    it is a tensor of latents, all of them touched, it is a copy, which is written back.
    """

    rows: slice | Tensor
    first: int
    stop: int


def _pieces(touched: Tensor, d: int) -> Iterator[_Piece]:
    """All latents with ``touched`` [F], ascending, as many at a time as have their rows of d elements in a cache.

    Neighbours, with few others between them, come as a slice; latents that are far apart come as their numbers.
    """
    (latents,) = torch.nonzero(touched, as_tuple=True)
    for numbers in latents.split(max(1, CORE_ELEMENTS // max(1, d))):
        if len(numbers):
            first, stop = int(numbers[0]), int(numbers[-1]) + 1
            rows = slice(first, stop) if stop - first <= 1.5 * len(numbers) else numbers
            yield _Piece(rows, first, stop)


class _Rows(NamedTuple):
    """Of Adam, by latent. A row that is not touched has decays of 1, a gradient of 0 and a share of 0."""

    decay: Tensor  # of second moments
    decay_m: Tensor  # of first moments
    share: Tensor  # 1/(1 − β1^k), by which the first moment moves the weight
    correction: float  # 1 − β2^k

    def of(self, piece: _Piece) -> "_Rows":
        decay, decay_m, share = (each[piece.rows, None] for each in (self.decay, self.decay_m, self.share))
        return _Rows(decay, decay_m, share, self.correction)


def _adam_(weight: Tensor, m: Tensor | None, v: Tensor, gradient: Tensor, rows: _Rows, rule: Rule) -> None:
    """m ← decay_m·m + (1 − β1)·g;  v ← decay·v + (1 − β2)·g²;  weight ← weight − lr·share·m / (√(v/correction) + eps),
    in place, with g for share·m where β1 is 0.

    A row that is not touched stays bit for bit as it was.
    """
    v.mul_(rows.decay).addcmul_(gradient, gradient, value=1 - rule.beta2)
    rate = rule.learning_rate.detach() if isinstance(rule.learning_rate, Tensor) else rule.learning_rate
    root, direction = rows.correction**0.5, gradient
    if m is not None:
        direction = m.mul_(rows.decay_m).add_(gradient, alpha=1 - rule.beta1) * rows.share
    weight.addcdiv_(direction, v.sqrt().add_(rule.eps * root), value=-float(rate) * root)


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
    """A piece of latents at a time: the sums of its entries, which lie next to each other, are its gradient, which is
    used up while it is in a cache. The matrices dW_enc and dW_dec never stand in memory."""
    if not ok:
        return
    dtype, bounds, touched = sums.dz.dtype, transposed.offsets.tolist(), transposed.offsets.diff() > 0
    starts, along = transposed.offsets[:-1].to(sums.tokens.dtype), torch.where(touched, sums.along, 0)[:, None]
    x_centred, residual = x_centred.to(dtype), residual.to(dtype)

    def gradient(coefficients: Tensor, table: Tensor, piece: _Piece) -> Tensor:
        # Those of the piece's latents and of no other: what lies between them is not touched and has none.
        entries = slice(bounds[piece.first], bounds[piece.stop])
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
        """0 in the rows of latents that a slice holds by the way, whatever their gradient is."""
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
    """Adam on the latents with ``touched`` [F], as `reference.training._update` has it, piece by piece.

    dW_enc and dW_dec are functions: of a piece and its rows of the weight, to the gradient of those rows, the decoder's
    without its component along the row. Rows that a slice holds by the way have a gradient of 0, decays of 1, a share
    of 0 and are divided by 1, which leaves every bit of them.
    """
    step, dtype = step + 1, state.W_dec.dtype

    def decays(beta: float) -> Tensor:
        return torch.where(touched, _owed_decay(state.last, step, beta).to(dtype), 1)

    share = touched.to(dtype) / (1 - rule.beta1 ** int(step))
    every = _Rows(decays(rule.beta2), decays(rule.beta1), share, 1 - rule.beta2 ** int(step))
    for piece in _pieces(touched, state.W_dec.shape[1]):
        rows = every.of(piece)
        for weights, firsts, seconds, low, gradient in (
            (state.W_enc, state.W_enc_m, state.W_enc_v, state.W_enc_low, dW_enc),
            (state.W_dec, state.W_dec_m, state.W_dec_v, state.W_dec_low, dW_dec),
        ):
            weight, v, m = weights[piece.rows], seconds[piece.rows], None if firsts is None else firsts[piece.rows]
            _adam_(weight, m, v, gradient(piece, weight), rows, rule)
            if weights is state.W_dec:
                weight.div_(torch.where(touched[piece.rows, None], weight.norm(dim=1, keepdim=True), 1))
            if not isinstance(piece.rows, slice):
                weights[piece.rows], seconds[piece.rows] = weight, v
                if firsts is not None and m is not None:
                    firsts[piece.rows] = m
            if low is not None:
                low[piece.rows] = weight.to(low.dtype)

    db_enc, dthreshold = (torch.where(touched, gradient, 0) for gradient in (db_enc, dthreshold))
    _adam_(state.b_enc, state.b_enc_m, state.b_enc_v, db_enc, every, rule)
    if rule.log_threshold:  # dL/dt = θ·dL/dθ for θ = exp(t)
        change = torch.zeros_like(state.threshold)
        _adam_(change, state.threshold_m, state.threshold_v, state.threshold * dthreshold, every, rule)
        state.threshold.mul_(change.exp())
    else:
        _adam_(state.threshold, state.threshold_m, state.threshold_v, dthreshold, every, rule)
        state.threshold.copy_(torch.where(touched, state.threshold.clamp(min=0), state.threshold))
    state.last.copy_(torch.where(touched, step, state.last))
