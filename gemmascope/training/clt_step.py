"""One training step of a cross-layer transcoder, by the routes of `step`: the same update up to rounding.

Every layer has a `TrainState` of its own, whose latents read its input and write to its output and those after it. A
step first lets all of them write, which gives the residual of every output, then goes through them once more: what a
latent's gradients are made of are the residuals of the outputs it writes to, side by side, which is what the operators
of one SAE take for its own. Loss, permission and the number of the update are those of all layers together: all are
updated, or none is.

    route      residuals r of all outputs                             gradients and update of each layer
    sparse     `encode_entries`, `residual_pass` of each layer        `residual_pass`: u; `by_latent`, `latent_pass`,
               in turn, of what those before it leave                 `update_from_entries`
    dense      `dense_encode`, products of whole matrices             `dense_backward`, `update_from_dense`
    reference  `clt_loss_and_gradients`                               the gradients that it gives

The sparse route passes over the entries twice, as that of a Matryoshka SAE does. On a GPU the host waits for the device
to learn how many entries there are, layer by layer.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import kernels
from ..autocast import without_autocast
from ..kernels import Entries, LatentState, Rule, entries, reference
from ..saes.clt_source import places
from ..saes.scaled_clt import ScaledCLT
from .clt_losses import clt_loss_and_gradients
from .config import Loss
from .losses import l0_penalty, objective, penalty
from .memory import DENSE_ELEMENTS, dense_tiles
from .state import TrainState
from .step import matmul, tf32_products


@dataclass(frozen=True)
class CLTFigures:
    """What one step measured, on the host. Lists are by layer."""

    loss: float
    l0: list[float]
    """Latents of the layer that fire on a token, on average."""
    fvu: list[float]
    """Of the layer's output, against the variance of the batch."""
    n_entries: float
    made: bool
    skipped: int
    """Updates withheld so far because the loss or what they would have made was not finite."""


class _Batch(NamedTuple):
    states: Sequence[TrainState]
    xs: Sequence[Tensor]
    ys: Sequence[Tensor]
    loss: Loss
    rule: Rule


class _Measured(NamedTuple):
    errors: list[Tensor]  # by layer: [N] ‖r‖² of the layer's output
    l0: Tensor  # [L] mean active latents
    firing_counts: list[Tensor]  # by layer: [d_sae] int32
    n_entries: Tensor  # []


class _Verdict(NamedTuple):
    loss: Tensor
    ok: Tensor
    number: Tensor


@torch.no_grad()
@without_autocast
def clt_step(
    clt: ScaledCLT,
    states: Sequence[TrainState],
    xs: Sequence[Tensor],
    ys: Sequence[Tensor],
    loss: Loss,
    rule: Rule,
    route: str,
) -> CLTFigures:
    """Update ``states``, those of the sources of ``clt``, by the loss on xs [N, d_in] and ys [N, d_out], by layer, fp32
    (fp64: plain PyTorch), divided by the scales. route: `sparse`, `dense` or `reference`.

    An update is withheld and counted as in `step`, bit for bit. Raises ValueError for a CLT that is not the one
    training began with, see `TrainState.ready`.
    """
    batch, latents = _Batch(states, xs, ys, loss, rule), [state.ready() for state in states]
    if route == "reference":
        return _reference_step(clt, batch, latents)
    with tf32_products() if states[0].compute_dtype == "tf32" else nullcontext():
        return _sparse_step(batch, latents) if route == "sparse" else _dense_step(batch, latents)


def _without_latents(batch: _Batch) -> Tensor:
    """b_dec − y [N, Σ d_out], to which the layers add what they write."""
    return torch.cat([state.sae.b_dec.data - y for state, y in zip(batch.states, batch.ys, strict=True)], 1)


def _starts(batch: _Batch) -> list[int]:
    """Where the outputs that each layer writes to begin; they go on to the last."""
    return [place.start for place in places([y.shape[1] for y in batch.ys])]


def _errors(batch: _Batch, residual: Tensor) -> list[Tensor]:
    return [part.square().sum(1) for part in residual.split([y.shape[1] for y in batch.ys], 1)]


# ---- by entries


def _sparse_step(batch: _Batch, latents: list[LatentState]) -> CLTFigures:
    states, xs, _, loss, rule = batch
    residual, n = _without_latents(batch), len(xs[0])
    found, l0s, starts = [], [], _starts(batch)
    for state, x, start in zip(states, xs, starts, strict=True):
        encoder = (state.encoder_rows.T, state.sae.b_enc.data, state.threshold, loss.bandwidth, None)
        each = kernels.encode_entries(x, *encoder, tf32=state.compute_dtype == "tf32", impl=state.impl)
        out = _residual(state, each, -residual[:, start:])
        residual[:, start:] = out.residual
        found.append(each)
        l0s.append(out.l0)
    l0, weights = torch.stack(l0s).sum(0), objective(loss, n)
    s, sums = l0_penalty(loss, l0)[1], []
    for state, each, start in zip(states, found, starts, strict=True):
        inactive = each._replace(latents=each.latents & entries.LATENT)  # they add nothing: the residual stays
        out = _residual(state, inactive, -residual[:, start:])
        transposed = kernels.by_latent(each, state.sae.d_sae, impl=state.impl)
        of_latents = kernels.latent_pass(each, out.u, transposed, state.threshold, s, weights, impl=state.impl)
        sums.append((transposed, of_latents, out.residual))

    f = [_active(each) for each in found]
    counts = [of_latents.firing_count for _, of_latents, _ in sums]
    touched = torch.cat([transposed.offsets.diff() for transposed, _, _ in sums])
    n_entries = torch.stack([each.offsets[-1] for each in found]).sum()
    measured = _Measured(_errors(batch, residual), torch.stack(l0s).mean(1), counts, n_entries)
    tanh = [reference.conclusion.tanh_sum(penalty(loss), each) for each in f]
    verdict = _conclude(batch, measured, l0, tanh, [torch.linalg.vector_norm(each) for each in f], touched)
    for state, of_layer, x, (transposed, of_latents, written) in zip(states, latents, xs, sums, strict=True):
        given = (transposed, of_latents, written, x, rule, verdict.ok, state.updates)
        kernels.update_from_entries(of_layer, *given, impl=state.impl)
    return _finish(batch, residual, measured, verdict)


def _residual(state: TrainState, found: Entries, target: Tensor) -> kernels.Residual:
    nothing = torch.zeros_like(target[0])
    return kernels.residual_pass(found, target, state.decoder_rows, nothing, impl=state.impl)


def _active(found: Entries) -> Tensor:
    """z of the active entries, [capacity], 0 elsewhere."""
    places = torch.arange(len(found.z), dtype=torch.int64, device=found.z.device)
    return torch.where((places < found.offsets[-1]) & (found.latents >= entries.ACTIVE), found.z, 0)


# ---- by whole matrices


class _Tile(NamedTuple):
    """Some latents of one layer."""

    state: TrainState
    x: Tensor
    start: int
    latents: slice


def _dense_step(batch: _Batch, latents: list[LatentState]) -> CLTFigures:
    states, xs, _, loss, rule = batch
    residual, n = _without_latents(batch), len(xs[0])
    tiles: list[list[_Tile]] = []
    for state, x, start in zip(states, xs, _starts(batch), strict=True):
        tiles.append([_Tile(state, x, start, tile) for tile in dense_tiles(n, state.sae.d_sae)])
    is_kept = n * sum(state.sae.d_sae for state in states) <= DENSE_ELEMENTS

    def encode(tile: _Tile) -> kernels.DenseCode:
        state, part = tile.state, tile.latents
        encoder = (state.encoder_rows[part].T, state.sae.b_enc.data[part], state.threshold[part], loss.bandwidth)
        return kernels.dense_encode(tile.x, *encoder, tf32=state.compute_dtype == "tf32", impl=state.impl)

    kept: list[kernels.DenseCode] = []
    l0s, counts, touched, f_norms, tanh, n_entries = [], [], [], [], [], []
    for of_layer in tiles:
        l0, firing, norms = torch.zeros_like(residual[:, 0]), [], []
        for tile in of_layer:
            code = encode(tile)
            residual[:, tile.start :] += matmul(code.f, tile.state.decoder_rows[tile.latents])
            l0 = l0 + code.l0
            firing.append(code.firing_count)
            touched.append(code.touched)
            norms.append(torch.linalg.vector_norm(code.f, dtype=residual.dtype))
            tanh.append(reference.conclusion.tanh_sum(penalty(loss), code.f))
            n_entries.append(code.n_entries)
            kept += [code] * is_kept
        l0s.append(l0)
        counts.append(torch.cat(firing))
        f_norms.append(torch.linalg.vector_norm(torch.stack(norms)))
    l0, weights = torch.stack(l0s).sum(0), objective(loss, n)
    measured = _Measured(_errors(batch, residual), torch.stack(l0s).mean(1), counts, torch.stack(n_entries).sum())
    verdict = _conclude(batch, measured, l0, tanh, f_norms, torch.cat(touched))

    s, g, codes = l0_penalty(loss, l0)[1], residual * (2 / n), iter(kept)
    for of_layer, state_of_layer in zip(tiles, latents, strict=True):
        for tile in of_layer:
            state, part = tile.state, tile.latents
            code = next(codes) if is_kept else encode(tile)
            u = residual[:, tile.start :] @ state.decoder_rows[part].T
            of_loss = (state.threshold[part], s, weights)
            dz, db_enc, dthreshold = kernels.dense_backward(u, code, *of_loss, impl=state.impl)
            kernels.update_from_dense(
                LatentState._make(None if t is None else t[part] for t in state_of_layer),
                matmul(dz.T, tile.x),
                matmul(code.f.T, g[:, tile.start :]),
                db_enc,
                dthreshold,
                code.touched,
                rule,
                verdict.ok,
                state.updates,
                impl=state.impl,
            )
    return _finish(batch, residual, measured, verdict)


# ---- as it is written


def _reference_step(clt: ScaledCLT, batch: _Batch, latents: list[LatentState]) -> CLTFigures:
    states, xs, ys, loss, rule = batch
    out = clt_loss_and_gradients(clt, xs, ys, loss)
    verdict = _permitted(states, out.loss, out.bound)
    for state, of_layer, gradients, touched in zip(states, latents, out.gradients, out.touched, strict=True):
        given = (gradients.W_enc.T, gradients.W_dec, gradients.b_enc, gradients.threshold, touched.int())
        kernels.update_from_dense(of_layer, *given, rule, verdict.ok, state.updates, impl="reference")
    measured = _Measured(out.errors, out.l0, out.firing_counts, out.n_entries)
    return _move(batch, [gradients.b_dec for gradients in out.gradients], measured, verdict)


# ---- what the routes share


def _conclude(
    batch: _Batch,
    measured: _Measured,
    l0: Tensor,
    tanh: Sequence[Tensor | None],
    f_norms: Sequence[Tensor],
    touched: Tensor,
) -> _Verdict:
    """l0: [N] of all layers. tanh: sums, by layer or tile. touched: [Σ d_sae]."""
    sparsity, weights = penalty(batch.loss), objective(batch.loss, len(l0))
    squared_error = torch.stack(measured.errors).sum(0).mean()
    sums = [each for each in tanh if each is not None]
    of_latents = (torch.cat(measured.firing_counts), torch.stack(sums) if sums else None)
    total = reference.conclusion.total_loss(sparsity, squared_error, l0, *of_latents)
    s = reference.conclusion.l0_penalty(sparsity, l0)[1]
    x_norm = torch.stack([torch.linalg.vector_norm(x) for x in batch.xs]).amax()
    thetas = torch.cat([state.threshold for state in batch.states])
    norms = (x_norm, torch.stack(list(f_norms)).amax())
    bound = reference.conclusion.gradient_bound(weights, 0.0, squared_error, s, *norms, thetas, touched)
    return _permitted(batch.states, total, bound)


def _permitted(states: Sequence[TrainState], loss: Tensor, bound: Tensor) -> _Verdict:
    """Whether the update of all layers may be made; each of them counts what is withheld."""
    first = states[0]
    ok = reference.conclusion.permission(loss, bound, None, None, first.stalled, first.skipped)
    for state in states[1:]:
        state.skipped.copy_(first.skipped)
    return _Verdict(loss, ok, first.updates + 1)


def _finish(batch: _Batch, residual: Tensor, measured: _Measured, verdict: _Verdict) -> CLTFigures:
    sums = residual.sum(0) * (2 / len(residual))
    return _move(batch, list(sums.split([y.shape[1] for y in batch.ys])), measured, verdict)


def _move(batch: _Batch, db_decs: list[Tensor], measured: _Measured, verdict: _Verdict) -> CLTFigures:
    """The biases of the outputs and the counters, unless the update is withheld. The host waits for the figures."""
    states, xs, ys, _, rule = batch
    for state, db_dec, firing_count in zip(states, db_decs, measured.firing_counts, strict=True):
        counters = (state.tokens_since_fired, state.updates)
        given = (db_dec, firing_count, len(xs[0]), rule, verdict.ok, verdict.number, state.b_dec_m)
        reference.conclusion.move(state.sae.b_dec.data, state.b_dec_v, *counters, *given)
    spreads = [
        reference.conclusion.spread_and_shares(y, y.sum(0)[None], errors)[0]
        for y, errors in zip(ys, measured.errors, strict=True)
    ]
    fvu = [(errors.mean() / spread.mean()).double() for errors, spread in zip(measured.errors, spreads, strict=True)]
    scalars = torch.stack([each.double() for each in (verdict.loss, measured.n_entries, verdict.ok, states[0].skipped)])
    loss, n_entries, made, skipped, *by_layer = torch.cat((scalars, measured.l0.double(), torch.stack(fvu))).tolist()
    l0, fvus = by_layer[: len(ys)], by_layer[len(ys) :]
    return CLTFigures(loss, l0, fvus, n_entries, bool(made), int(skipped))
