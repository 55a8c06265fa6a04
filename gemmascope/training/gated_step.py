"""One training step of a gated SAE, by the routes of `step`: the same update up to rounding.

What an entry is says the gate: a pair of token and latent with π > 0. On the entries the `sparse` route makes two
residuals, of f and of relu(π), and from them two coefficients an entry, which add up to that of the encoder. Beside the
latents' update b_mag and r_mag move by Adam too, every one of them in every update. Both residuals of a transcoder are
those of its target.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from .. import kernels
from ..autocast import without_autocast
from ..kernels import Entries, LatentState, Objective, Rule, entries, reference
from ..saes import GatedSAE
from ..saes.gated import magnitude
from .annealing import annealed, compared, concave, factor, follow, slope, steepest
from .config import CLOSED_WINDOW, Annealing, Loss
from .gated import gated_loss_and_gradients, gradient_bound, is_entry
from .memory import dense_tiles
from .state import TrainState
from .step import (
    StepFigures,
    active,
    centre,
    gradient_of_skip,
    matmul,
    move_others,
    skipped_target,
    tf32_products,
    update_by_gradients,
)


class _Measured(NamedTuple):
    """What is told of the batch."""

    errors: Tensor  # [N] ‖x̂ − x‖², of a transcoder ‖ŷ − y‖²
    l0: Tensor  # [] or [N], of which it is the mean
    firing_count: Tensor  # [d_sae] int32
    n_entries: Tensor  # [] int64


class _Others(NamedTuple):
    """Gradients of what every update moves."""

    b_dec: Tensor
    named: Mapping[str, Tensor]  # of ``sae.OTHERS``


class _Verdict(NamedTuple):
    loss: Tensor
    ok: Tensor
    number: Tensor


@torch.no_grad()
@without_autocast
def gated_step(
    state: TrainState,
    x: Tensor,
    loss: Loss,
    rule: Rule,
    route: str,
    capacity: int | None = None,
    target: Tensor | None = None,
    annealing: Annealing | None = None,
) -> StepFigures:
    """Update ``state``, that of a `GatedSAE`, by the loss on x [N, d_model] in its dtype, divided by the input scale.

    loss: of the sparsity `l1`. route: `sparse`, `dense` or `reference`. capacity: room for entries on the sparse route;
    None: as much as is needed, which the kernels do not take. target: [N, d_out] in that dtype, divided by the output
    scale, of a `GatedTranscoder`. annealing: as of `sparse_step`. An update is withheld and counted as in `step`.
    Raises ValueError for an SAE that is not the one training began with, see `TrainState.ready`.
    """
    if route == "sparse":
        return _sparse_step(state, x, loss, rule, capacity, target, annealing)
    if route == "reference":
        return _reference_step(state, x, loss, rule, target, annealing)
    latents, sae = state.ready(), _sae(state)
    with tf32_products() if state.compute_dtype == "tf32" else nullcontext():
        tiles = dense_tiles(len(x), sae.d_sae, "gated")
        return _dense_step(state, latents, x, loss, rule, tiles, target, annealing)


def _weight(state: TrainState, loss: Loss, annealing: Annealing | None) -> float | Tensor:
    """λ, times the steepest slope of its penalty."""
    weight = loss.l0_coefficient * steepest(loss.p)
    if annealing is None or state.annealing is None:
        return weight
    return weight * factor(state.annealing, annealing)


def _sae(state: TrainState) -> GatedSAE:
    assert isinstance(state.sae, GatedSAE)  # the trainer has chosen the step
    return state.sae


# ---- by entries


def _sparse_step(
    state: TrainState,
    x: Tensor,
    loss: Loss,
    rule: Rule,
    capacity: int | None,
    target: Tensor | None,
    annealing: Annealing | None,
) -> StepFigures:
    sae, impl, latents, n = _sae(state), state.impl, state.ready(), len(x)
    W_enc, W_dec, b_dec = state.encoder_rows, state.decoder_rows, sae.b_dec.data
    centred, tf32 = centre(state, x, target, clamp=False), state.compute_dtype == "tf32"
    to_latents = x if target is None else skipped_target(state, centred.x, target)
    encoder = (W_enc.T, sae.b_enc.data, state.threshold, CLOSED_WINDOW, capacity)
    gate = kernels.encode_entries(centred.x, *encoder, tf32=tf32, impl=impl)
    magnitudes = _magnitudes(sae, gate)
    out, frozen = (kernels.residual_pass(each, to_latents, W_dec, b_dec, impl=impl) for each in (magnitudes, gate))

    transposed = kernels.by_latent(gate, sae.d_sae, impl=impl)
    s, plain = torch.zeros_like(out.squared_error), Objective(CLOSED_WINDOW)
    of_f = kernels.latent_pass(magnitudes, out.u, transposed, state.threshold, s, plain, impl=impl)
    weight, rectified, u = _weight(state, loss, annealing), active(gate), frozen.u
    penalised = plain
    if loss.p == 1:
        penalised = plain._replace(tanh_slope=weight / n)  # of scale 0: λ/N as it is
    else:  # `latent_pass` takes 2/N, and the sum along W_dec is that of f
        u = u + slope(rectified, loss.p) * (reference.conclusion.as_number(weight, x) / 2)
    of_gate = kernels.latent_pass(gate, u, transposed, state.threshold, s, penalised, impl=impl)
    scale = sae.r_mag.data.exp()
    sums = of_f._replace(dz=scale[_latents(transposed)] * of_f.dz + of_gate.dz, db_enc=of_gate.db_enc)
    db_dec = out.residual.sum(0, dtype=x.dtype) * (2 / n)
    if sae.pre_encoder_bias:
        db_dec = db_dec - kernels.encoder_times(W_enc, scale * of_f.db_enc + of_gate.db_enc, impl=impl)
    # m − b_mag = e^r·y, and the sum of dm·m is that of f's share along the decoder row.
    of_magnitudes = {"b_mag": of_f.db_enc, "r_mag": of_f.along - sae.b_mag.data * of_f.db_enc}
    others = _Others(db_dec, of_magnitudes | gradient_of_skip(state, out.residual, centred.x))

    measured = _Measured(out.squared_error, out.l0, of_f.firing_count, gate.offsets[-1])
    activity, f_norm = concave(rectified, loss.p).sum(), torch.linalg.vector_norm(active(magnitudes))
    fits = None if capacity is None else measured.n_entries <= capacity
    verdict = _conclude(state, centred, out.squared_error, frozen.squared_error, activity, f_norm, fits, weight)
    if annealing is not None and state.annealing is not None:
        follow(state.annealing, annealing, compared(annealing, rectified), verdict.ok)
    kernels.update_from_entries(
        latents, transposed, sums, out.residual, centred.x, rule, verdict.ok, state.updates, impl=impl
    )
    y = x if target is None else target
    return _finish(state, y, centred.column_sums, measured, others, rule, verdict)


def _magnitudes(sae: GatedSAE, gate: Entries) -> Entries:
    """The same entries with m for π, active where the gate is open and m > 0."""
    numbers = (gate.latents & entries.LATENT).clamp(max=sae.d_sae - 1)  # beyond the last entry there is d_sae
    m = magnitude(gate.z, *(t.data[numbers] for t in (sae.b_enc, sae.r_mag, sae.b_mag)))
    # NaN, too, is active: it is to be seen.
    return gate._replace(z=m, latents=torch.where(m <= 0, gate.latents & entries.LATENT, gate.latents))


def _latents(transposed: kernels.ByLatent) -> Tensor:
    """The latent of each entry in the order of the lists, [capacity]; some latent beyond the last entry."""
    ends = transposed.offsets[1:]
    places = torch.arange(len(transposed.order), dtype=torch.int64, device=ends.device)
    return torch.searchsorted(ends, places, right=True).clamp(max=len(ends) - 1)


# ---- by whole matrices


def _dense_step(
    state: TrainState,
    latents: LatentState,
    x: Tensor,
    loss: Loss,
    rule: Rule,
    tiles: list[slice],
    target: Tensor | None,
    annealing: Annealing | None,
) -> StepFigures:
    sae, impl, n, b_dec, low = _sae(state), state.impl, len(x), state.sae.b_dec.data, state.decoder_rows.dtype
    centred = centre(state, x, target, clamp=False)
    to_latents = x if target is None else skipped_target(state, centred.x, target)

    def encode(tile: slice) -> tuple[Tensor, Tensor, Tensor]:
        """π, relu(π) and f [N, tile], in the dtype of x."""
        b_gate, r_mag, b_mag = (t.data[tile] for t in (sae.b_enc, sae.r_mag, sae.b_mag))
        pi = kernels.preactivations(centred.x, state.encoder_rows[tile].T, b_gate, impl=impl)
        zeros = torch.zeros_like(b_gate)
        m = magnitude(pi, b_gate, r_mag, b_mag)
        return pi, reference.activation(pi, zeros), reference.gate(pi, zeros) * reference.activation(m, zeros)

    residual, frozen, l0 = b_dec - to_latents, b_dec - to_latents, torch.zeros_like(x[:, 0])
    activity, f_norms, counts, touched, of_penalties = [], [], [], [], []
    weight = _weight(state, loss, annealing)
    for tile in tiles:
        pi, rectified, f = encode(tile)
        residual, frozen = (
            r + matmul(code.to(low), state.decoder_rows[tile]) for r, code in ((residual, f), (frozen, rectified))
        )
        l0 = l0 + (f > 0).sum(1)
        activity.append(concave(rectified, loss.p).sum())
        if annealing is not None:
            of_penalties.append(compared(annealing, rectified))
        f_norms.append(torch.linalg.vector_norm(f))
        counts.append((f > 0).sum(0).to(torch.int32))
        touched.append(is_entry(pi).sum(0).to(torch.int32))
    of_gate = torch.cat(touched)
    measured = _Measured(residual.square().sum(1), l0, torch.cat(counts), of_gate.sum())
    of_entries = torch.stack(activity).sum(), torch.linalg.vector_norm(torch.stack(f_norms))
    verdict = _conclude(state, centred, measured.errors, frozen.square().sum(1), *of_entries, None, weight)
    if annealing is not None and state.annealing is not None:
        follow(state.annealing, annealing, torch.stack(of_penalties).sum(0), verdict.ok)

    rounded, frozen = residual.to(low), frozen.to(low)
    g, db_dec = (residual * (2 / n)).to(low), rounded.sum(0, dtype=x.dtype) * (2 / n)
    db_mag, dr_mag, per_token = [], [], reference.conclusion.as_number(weight, x) / n
    for tile in tiles:
        if len(tiles) > 1:
            pi, rectified, f = encode(tile)
        W_dec = state.decoder_rows[tile].T
        dm = (f > 0) * (matmul(rounded, W_dec) * (2 / n))
        of_penalty = per_token if loss.p == 1 else slope(rectified, loss.p) * per_token
        dpi = (pi > 0) * (matmul(frozen, W_dec) * (2 / n) + of_penalty)
        db_gate = dpi.sum(0)
        db_mag.append(dm.sum(0))
        dr_mag.append((dm * f).sum(0) - sae.b_mag.data[tile] * db_mag[-1])
        dy = dpi.addcmul_(sae.r_mag.data[tile].exp(), dm)
        if sae.pre_encoder_bias:
            db_dec = db_dec - kernels.encoder_times(state.encoder_rows[tile], dy.sum(0), impl=impl)
        kernels.update_from_dense(
            LatentState._make(None if t is None else t[tile] for t in latents),
            matmul(dy.to(low).T, centred.x),
            matmul(f.to(low).T, g),
            db_gate,
            torch.zeros_like(db_gate),
            of_gate[tile],
            rule,
            verdict.ok,
            state.updates,
            impl=impl,
        )
    of_magnitudes = {"b_mag": torch.cat(db_mag), "r_mag": torch.cat(dr_mag)}
    others = _Others(db_dec, of_magnitudes | gradient_of_skip(state, rounded, centred.x))
    return _finish(state, x if target is None else target, centred.column_sums, measured, others, rule, verdict)


def _reference_step(
    state: TrainState, x: Tensor, loss: Loss, rule: Rule, target: Tensor | None, annealing: Annealing | None
) -> StepFigures:
    """By `gated_loss_and_gradients`."""
    loss = annealed(loss, state.annealing, annealing)
    latents, out = state.ready(), gated_loss_and_gradients(_sae(state), x, loss, target)
    gradients = out.gradients
    of_latents = (gradients.W_enc, gradients.W_dec, gradients.b_enc, torch.zeros_like(gradients.b_enc), out.touched)
    ok, number = update_by_gradients(state, latents, out.loss, out.bound, *of_latents, rule)
    if annealing is not None and state.annealing is not None:
        follow(state.annealing, annealing, compared(annealing, out.rectified), ok)
    measured = _Measured(out.errors, out.l0, out.firing_count, out.n_entries)
    others, y = _Others(gradients.b_dec, out.others), x if target is None else target
    return _finish(state, y, y.sum(0)[None], measured, others, rule, _Verdict(out.loss, ok, number))


# ---- what the routes share


def _conclude(
    state: TrainState,
    centred: entries.Centred,
    errors: Tensor,
    frozen_errors: Tensor,
    activity: Tensor,
    f_norm: Tensor,
    fits: Tensor | None,
    weight: float | Tensor,
) -> _Verdict:
    """The loss and whether the update may be made; counts in the state what is withheld.

    errors, frozen_errors: [N] of f and of relu(π). activity: [] Σ φ(relu(π)), φ that of its penalty (`annealing`), with
    p = 1 the identity; weight: λ times its steepest slope. fits: whether there was room for the entries, None where
    none was needed.
    """
    sae = _sae(state)
    weight = reference.conclusion.as_number(weight, errors)
    total = errors.mean() + weight * activity / len(errors) + frozen_errors.mean()
    norms = torch.linalg.vector_norm(centred.norms), f_norm
    bound = gradient_bound(weight, errors, frozen_errors, *norms, sae.r_mag.data, sae.b_mag.data)
    ok = reference.conclusion.permission(total, bound, fits, state.copies_differ(), state.stalled, state.skipped)
    return _Verdict(total, ok, state.updates + 1)


def _finish(
    state: TrainState,
    y: Tensor,
    column_sums: Tensor,
    measured: _Measured,
    others: _Others,
    rule: Rule,
    verdict: _Verdict,
) -> StepFigures:
    """The parameters that every update moves and the counters, unless the update is withheld; the figures. y: what is
    reconstructed, x or a target, whose column sums they are."""
    sae, ok, number = _sae(state), verdict.ok, verdict.number
    move_others(state, others.named, rule, ok, number)
    counters = (state.tokens_since_fired, state.updates)
    of_batch = (others.b_dec, measured.firing_count, len(y), rule, ok, number, state.b_dec_m)
    reference.conclusion.move(sae.b_dec.data, state.b_dec_v, *counters, *of_batch)
    spread = reference.conclusion.spread_and_shares(y, column_sums, measured.errors)
    means = reference.conclusion.fidelity(measured.errors, *spread)
    return StepFigures.of(
        reference.conclusion.pack(
            verdict.loss, *means, measured.l0.mean(), measured.n_entries, state.stalled, ok, state.skipped
        )
    )
