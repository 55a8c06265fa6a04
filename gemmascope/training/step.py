"""One training step of one SAE, by routes that make the same update up to rounding.

* `sparse_step`: only the pre-activations are dense; everything else runs on the entries, the active or nearly active
  pairs of token and latent. For trained SAEs, of which less than a percent of the latents fire.
* `dense_step`: products of whole matrices with everything elementwise fused. For the first steps, when half fire.
* `reference_step`: the written formulas, densely, for every loss there is.

The first two never ask the device for a number. An update is withheld on the device, bit for bit, when

* the loss is not finite, or a gradient might exceed what second moments and weights can bear
  (`kernels.reference.conclusion`): that update is skipped and counted;
* the entries did not fit or the bf16 copies were not those of the weights: `SAETrainer` reads that later, mends it and
  repeats the steps.

Each takes a target, what is to be made of x: x itself unless a transcoder is trained. Where that has a skip connection,
latents and b_dec are to give what it leaves of the target.

Each raises ValueError for an SAE that is not the one training began with, see `TrainState.ready`.

What differs from one step to the next besides tensors are the learning rate, λ with what follows from it, and the
column of the weights that is compared with the copies: `Scheduled`. The kernels read them from the device, so that a
sparse step by the kernels can be captured in a CUDA graph and replayed with other values in them.
"""

from collections.abc import Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from .. import kernels
from ..autocast import without_autocast
from ..formats.export import SKIP
from ..kernels import ByLatent, Entries, LatentState, LatentSums, Residual, Rule, implementations, reference
from ..saes import JumpReLUSAE
from .annealing import annealed, compared, concave, factor, follow, slope
from .config import Annealing, Loss
from .losses import l0_penalty, loss_and_gradients, objective, penalty
from .memory import dense_tiles
from .state import TrainState


@dataclass(frozen=True)
class StepFigures:
    """What one step measured, as fp64 scalars on the device."""

    loss: Tensor
    squared_error: Tensor
    fvu: Tensor
    """Of the batch, against the variance of the batch."""
    median_fvu: Tensor
    """Of the median token."""
    l0: Tensor
    n_entries: Tensor
    """Entries of the batch, whether or not they fitted."""
    stalled: Tensor
    """0, or why the update was withheld, in this step or one before: `state.ROOM`, `state.COPIES` or both."""
    made: Tensor
    """1 when the update was made, 0 when it was withheld, whatever for."""
    skipped: Tensor
    """Updates withheld so far because the loss or what they would have made was not finite."""
    packed: Tensor
    """All of them in one tensor, so that one copy brings them to the host."""

    @classmethod
    def of(cls, packed: Tensor) -> "StepFigures":
        names = (field.name for field in fields(cls))
        return cls(packed=packed, **dict(zip(names, packed.unbind(), strict=False)))

    @classmethod
    def unpack(cls, packed: Tensor) -> dict[str, float]:
        names = [field.name for field in fields(cls) if field.name != "packed"]
        return dict(zip(names, packed.tolist(), strict=True))


class Scheduled(NamedTuple):
    """The numbers of a step that are others in the next one: floats, or 0-d fp64 tensors on the device of the SAE.

    Those of a penalty that the loss does not have are None, and so is the column where none is compared.
    """

    learning_rate: float | Tensor
    l0_coefficient: float | Tensor
    frequency_slope: float | Tensor | None
    tanh_slope: float | Tensor | None
    column: int | Tensor | None

    @classmethod
    def of(cls, loss: Loss, rule: Rule, n: int, column: int | None) -> "Scheduled":
        """Those of a step on n tokens, calculated on the host in fp64."""
        weights = objective(loss, n)
        return cls(
            rule.learning_rate,
            penalty(loss).coefficient,
            None if loss.frequency_scale is None else weights.frequency_slope,
            weights.tanh_slope if loss.sparsity in ("tanh", "l1") else None,
            column,
        )

    def values(self) -> Tensor:
        """What `like` takes, on the host: pinned where there is a GPU, so that a copy of it need not wait."""
        numbers = [number for number in self if number is not None]
        return torch.tensor(numbers, dtype=torch.float64, device="cpu", pin_memory=torch.cuda.is_available())

    def like(self, values: Tensor) -> "Scheduled":
        """The same as parts of one tensor, whose values may be replaced before a captured step is replayed."""
        parts = dict(
            zip([name for name, number in self._asdict().items() if number is not None], values.unbind(), strict=True)
        )
        return self._replace(**parts)

    def to(self, device: torch.device) -> "Scheduled":
        """On a device, without waiting for it."""
        return self.like(self.values().to(device, non_blocking=True))


@contextmanager
def tf32_products():
    products = torch.backends.cuda.matmul
    before, products.fp32_precision = products.fp32_precision, "tf32"
    try:
        yield
    finally:
        products.fp32_precision = before


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a·b with an fp32 result, also for bf16 operands."""
    if a.dtype != torch.bfloat16:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


class SparsePass(NamedTuple):
    """What the entries say of the loss and of every gradient but those of the weights, which `transposed`, `sums` and
    `out.residual` still hold by entry, and what a pre-encoder bias takes from that of b_dec."""

    tokens: kernels.entries.TokenSums
    out: Residual
    transposed: ByLatent
    sums: LatentSums


def sparse_pass(
    impl: str,
    entries: Entries,
    x: Tensor,
    centred: kernels.entries.Centred,
    W_dec: Tensor,
    b_dec: Tensor,
    threshold: Tensor,
    loss: Loss,
    scheduled: Scheduled | None = None,
    to_latents: Tensor | None = None,
) -> SparsePass:
    """From the entries on. x: [N, d_out], what is reconstructed, and ``centred`` with its column sums; to_latents: what
    is left of it for the latents, by default all. W_dec: by latent, as the products read it."""
    out = kernels.residual_pass(entries, x if to_latents is None else to_latents, W_dec, b_dec, impl=impl)
    tokens = implementations.operator("token_pass", impl)(entries, x, centred, out, _penalty(loss, scheduled))
    transposed = kernels.by_latent(entries, threshold.shape[0], impl=impl)
    weights = _objective(loss, len(x), scheduled)
    at_once = weights if loss.p == 1 else weights._replace(tanh_slope=0.0)
    sums = kernels.latent_pass(entries, out.u, transposed, threshold, tokens.s, at_once, impl=impl)
    if loss.p != 1:
        f = active(entries)
        tokens = tokens._replace(tanh_sums=concave(f, loss.p).sum()[None])
        steepness = reference.conclusion.as_number(weights.tanh_slope, f) * (len(x) / 2)  # `latent_pass` takes 2/N
        of_penalty = (slope(f, loss.p) * steepness, transposed, threshold, torch.zeros_like(tokens.s))
        plain = kernels.Objective(loss.bandwidth, ste_to_z=loss.ste_to_z)
        added = kernels.latent_pass(entries, *of_penalty, plain, impl=impl)
        both = {name: getattr(sums, name) + getattr(added, name) for name in ("dz", "db_enc", "dthreshold")}
        sums = sums._replace(**both)
    return SparsePass(tokens, out, transposed, sums)


def active(found: Entries) -> Tensor:
    """z of the active entries, [capacity], 0 elsewhere."""
    places = torch.arange(len(found.z), dtype=torch.int64, device=found.z.device)
    return torch.where((places < found.offsets[-1]) & (found.latents >= kernels.entries.ACTIVE), found.z, 0)


def _penalty(loss: Loss, scheduled: Scheduled | None) -> kernels.entries.Penalty:
    found = penalty(loss)
    return found if scheduled is None else found._replace(coefficient=scheduled.l0_coefficient)


def _objective(loss: Loss, n: int, scheduled: Scheduled | None) -> kernels.Objective:
    found = objective(loss, n)
    if scheduled is None:
        return found
    slopes = {"frequency_slope": scheduled.frequency_slope, "tanh_slope": scheduled.tanh_slope}
    return found._replace(**{name: slope for name, slope in slopes.items() if slope is not None})


def _annealed(scheduled: Scheduled, state: TrainState, annealing: Annealing | None) -> Scheduled:
    """With the λ that annealing has come to, if there is any."""
    if annealing is None or state.annealing is None:
        return scheduled
    times, steepest = factor(state.annealing, annealing), scheduled.tanh_slope
    assert steepest is not None  # of a loss that has a p
    return scheduled._replace(l0_coefficient=scheduled.l0_coefficient * times, tanh_slope=steepest * times)


def centre(state: TrainState, x: Tensor, target: Tensor | None, clamp: bool = True) -> kernels.entries.Centred:
    """x as the encoder reads it; the column sums are those of the target. Thresholds below 0 become 0 with ``clamp``:
    then it comes before all that reads them."""
    b_dec = state.sae.b_dec.data if state.sae.pre_encoder_bias else None
    centring, dtype = implementations.operator("centre", state.impl), state.encoder_rows.dtype
    centred = centring(x, b_dec, state.threshold if clamp else None, dtype)
    return centred if target is None else centred._replace(column_sums=centring(target, None, None, dtype).column_sums)


def skipped_target(state: TrainState, x: Tensor, target: Tensor) -> Tensor:
    """What a skip connection leaves of the target [N, d_out]. x: as the products read it."""
    if SKIP not in state.sae.OTHERS:
        return target
    W_skip = getattr(state.sae, SKIP).data.to(x.dtype)
    with tf32_products() if state.compute_dtype == "tf32" else nullcontext():
        return target - matmul(x, W_skip.T).to(target.dtype)


def move_others(state: TrainState, gradients: Mapping[str, Tensor], rule: Rule, ok: Tensor, number: Tensor) -> None:
    """The parameters of ``sae.OTHERS``, unless the update is withheld."""
    for name, gradient in gradients.items():
        moved = (getattr(state.sae, name).data, state.others_v[name])
        reference.conclusion.adam(*moved, gradient, rule, ok, number, state.others_m.get(name))


def gradient_of_skip(state: TrainState, residual: Tensor, x: Tensor) -> dict[str, Tensor]:
    """The gradient (2/N)·rᵀx of a skip connection, if there is one. No bound of its own is needed: that on dW_enc,
    ‖x‖·2E at least, is one for it too."""
    if SKIP not in state.sae.OTHERS:
        return {}
    with tf32_products() if state.compute_dtype == "tf32" else nullcontext():
        return {SKIP: matmul(residual.T, x) * (2 / len(x))}


def _conclude(
    state: TrainState,
    latents: LatentState,
    squared_error: Tensor,
    l0: Tensor,
    tokens: kernels.entries.TokenSums,
    centred: kernels.entries.Centred,
    touched: ByLatent | Tensor,
    firing_count: Tensor,
    n_entries: Tensor,
    capacity: int | None,
    sparsity: kernels.entries.Penalty,
    weights: kernels.Objective,
    column: int | Tensor | None,
) -> kernels.entries.Conclusion:
    """Whether the update may be made; counts in the state what is withheld."""
    counters = (state.stalled, state.skipped, state.updates)
    of_latents = (touched, firing_count, n_entries, capacity)
    of_tokens = (squared_error, l0, tokens, centred.norms)
    conclude = implementations.operator("conclude", state.impl)
    return conclude(latents, *of_tokens, *of_latents, sparsity, weights, column, *counters)


def _finish(
    state: TrainState,
    tokens: kernels.entries.TokenSums,
    of_encoder: Tensor | None,
    firing_count: Tensor,
    rule: Rule,
    conclusion: kernels.entries.Conclusion,
) -> StepFigures:
    """The decoder's bias and the counters, unless the update is withheld."""
    moved = (state.sae.b_dec.data, state.b_dec_v, state.tokens_since_fired, state.updates)
    given = (tokens.residual_sums, of_encoder, firing_count, len(tokens.s), rule)
    implementations.operator("finish", state.impl)(*moved, *given, conclusion.ok, conclusion.number, state.b_dec_m)
    return StepFigures.of(conclusion.figures)


@torch.no_grad()
@without_autocast
def sparse_step(
    state: TrainState,
    x: Tensor,
    loss: Loss,
    rule: Rule,
    capacity: int | None,
    scheduled: Scheduled | None = None,
    target: Tensor | None = None,
    annealing: Annealing | None = None,
) -> StepFigures:
    """Update ``state`` by the loss on x [N, d_in] fp32, divided by the input scale. target: [N, d_out] fp32, divided by
    the output scale; by default x. capacity: room for entries; the
    reference, which knows how many there are, also takes None. scheduled: takes the place of the learning rate of
    ``rule``, of λ and of the column whose copies are compared, for a step that is captured; by default those of
    ``loss``, ``rule`` and `TrainState.next_column`, on the device where the kernels run. annealing: of the p of
    ``loss``, whose λ then is another multiple."""
    sae, impl, latents = state.sae, state.impl, state.ready(clamp=False)
    if scheduled is None:
        scheduled = Scheduled.of(loss, rule, len(x), state.next_column())
        if impl == "triton":
            scheduled = scheduled.to(x.device)
    scheduled = _annealed(scheduled, state, annealing)
    rule = rule._replace(learning_rate=scheduled.learning_rate)
    W_enc, W_dec, b_dec = state.encoder_rows, state.decoder_rows, sae.b_dec.data
    centred = centre(state, x, target)
    y = x if target is None else target
    entries = kernels.encode_entries(
        centred.x,
        W_enc.T,
        sae.b_enc,
        state.threshold,
        loss.bandwidth,
        capacity,
        tf32=state.compute_dtype == "tf32",
        impl=impl,
    )
    weights = (W_dec, b_dec, state.threshold)
    to_latents = None if target is None else skipped_target(state, centred.x, target)
    tokens, out, transposed, sums = sparse_pass(impl, entries, y, centred, *weights, loss, scheduled, to_latents)
    encoder_parts = implementations.operator("encoder_parts", impl)
    of_encoder = encoder_parts(W_enc, sums.db_enc) if sae.pre_encoder_bias else None
    of_latents = (transposed, sums.firing_count, entries.offsets[-1], len(entries.z))
    of_loss = (_penalty(loss, scheduled), _objective(loss, len(x), scheduled), scheduled.column)
    conclusion = _conclude(state, latents, out.squared_error, out.l0, tokens, centred, *of_latents, *of_loss)
    kernels.update_from_entries(
        latents, transposed, sums, out.residual, centred.x, rule, conclusion.ok, state.updates, impl=impl
    )
    move_others(state, gradient_of_skip(state, out.residual, centred.x), rule, conclusion.ok, conclusion.number)
    if annealing is not None and state.annealing is not None:
        follow(state.annealing, annealing, compared(annealing, active(entries)), conclusion.ok)
    return _finish(state, tokens, of_encoder, sums.firing_count, rule, conclusion)


@torch.no_grad()
@without_autocast
def dense_step(
    state: TrainState,
    x: Tensor,
    loss: Loss,
    rule: Rule,
    target: Tensor | None = None,
    annealing: Annealing | None = None,
) -> StepFigures:
    """The same update without a limit on the entries."""
    latents, d_sae = state.ready(clamp=False), state.sae.d_sae
    with tf32_products() if state.compute_dtype == "tf32" else nullcontext():
        tiles = dense_tiles(x.shape[0], d_sae)
        return _dense_step(state, latents, x, loss, rule, tiles, target, annealing)


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
    sae, impl, n, b_dec = state.sae, state.impl, x.shape[0], state.sae.b_dec.data
    scheduled = _annealed(Scheduled.of(loss, rule, n, None), state, annealing)
    sparsity, weights = _penalty(loss, scheduled), _objective(loss, n, scheduled)
    centred = centre(state, x, target)
    y = x if target is None else target
    to_latents = x if target is None else skipped_target(state, centred.x, target)

    def encode(tile: slice):
        weights = (state.encoder_rows[tile].T, sae.b_enc[tile], state.threshold[tile])
        tf32 = state.compute_dtype == "tf32"
        return kernels.dense_encode(centred.x, *weights, loss.bandwidth, tf32=tf32, impl=impl)

    x_hat, l0, tanh, counts, touched, f_norms, n_entries = b_dec.expand(y.shape), 0.0, [], [], [], [], 0
    of_penalties: list[Tensor] = []
    for tile in tiles:
        code = encode(tile)
        x_hat = x_hat + matmul(code.f, state.decoder_rows[tile])
        l0, n_entries = l0 + code.l0, n_entries + code.n_entries
        tanh.append(reference.conclusion.tanh_sum(sparsity, concave(code.f, loss.p)))
        if annealing is not None:
            of_penalties.append(compared(annealing, code.f))
        counts.append(code.firing_count)
        touched.append(code.touched)
        f_norms.append(torch.linalg.vector_norm(code.f, dtype=x.dtype))
    assert isinstance(l0, Tensor)  # a sum over at least one tile
    assert isinstance(n_entries, Tensor)
    firing_count, residual = torch.cat(counts), x_hat - to_latents
    low, g = (t.to(state.decoder_rows.dtype) for t in (residual, residual * (2 / n)))
    errors, s = residual.square().sum(1), l0_penalty(loss, l0)[1]
    tokens = kernels.entries.TokenSums(
        s,
        *reference.conclusion.spread_and_shares(y, centred.column_sums, errors),
        torch.stack(f_norms),
        None if sparsity.tanh_scale is None else torch.stack(tanh),
        low.sum(0, dtype=x.dtype)[None],
    )
    of_latents = (torch.cat(touched), firing_count, n_entries, None)
    of_loss = (sparsity, weights, state.next_column())
    conclusion = _conclude(state, latents, errors, l0, tokens, centred, *of_latents, *of_loss)
    of_encoder = None
    for tile in tiles:
        code = code if len(tiles) == 1 else encode(tile)
        u = low @ state.decoder_rows[tile].T
        at_once = weights
        if loss.p != 1 or annealing is not None:  # `dense_backward` takes 2/N, and its slope is a number on the host
            steepness = reference.conclusion.as_number(weights.tanh_slope, x) * (n / 2)
            u.add_(slope(code.f, loss.p) * steepness)
            at_once = weights._replace(tanh_slope=0.0)
        dz, db_enc, dthreshold = kernels.dense_backward(u, code, state.threshold[tile], s, at_once, impl=impl)
        if sae.pre_encoder_bias:
            part = kernels.encoder_times(state.encoder_rows[tile], db_enc, impl=impl)
            of_encoder = part if of_encoder is None else of_encoder + part
        kernels.update_from_dense(
            LatentState._make(None if t is None else t[tile] for t in latents),
            matmul(dz.T, centred.x),
            matmul(code.f.T, g),
            db_enc,
            dthreshold,
            code.touched,
            rule,
            conclusion.ok,
            state.updates,
            impl=impl,
        )
    move_others(state, gradient_of_skip(state, low, centred.x), rule, conclusion.ok, conclusion.number)
    if annealing is not None and state.annealing is not None:
        follow(state.annealing, annealing, torch.stack(of_penalties).sum(0), conclusion.ok)
    parts = None if of_encoder is None else of_encoder[None]
    return _finish(state, tokens, parts, firing_count, rule, conclusion)


def update_by_gradients(
    state: TrainState,
    latents: LatentState,
    loss: Tensor,
    bound: Tensor,
    W_enc: Tensor,
    W_dec: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    touched: Tensor,
    rule: Rule,
) -> tuple[Tensor, Tensor]:
    """The latents with ``touched`` [d_sae] by gradients written out densely, of the parameters of those names, in their
    shapes; the others have none.

    loss, bound: [], on which it depends whether the update is made. Returns that, an int32 scalar, and which update it
    is, counted from 1.
    """
    ok = reference.conclusion.permission(loss, bound, None, state.copies_differ(), state.stalled, state.skipped)
    gradients = (W_enc.T, W_dec, b_enc, threshold, touched.int())
    kernels.update_from_dense(latents, *gradients, rule, ok, state.updates, impl="reference")
    return ok, state.updates + 1


@torch.no_grad()
@without_autocast
def reference_step(
    state: TrainState,
    x: Tensor,
    loss: Loss,
    rule: Rule,
    dead: Tensor | None = None,
    target: Tensor | None = None,
    annealing: Annealing | None = None,
) -> StepFigures:
    """The same update by `loss_and_gradients`, in fp32. dead: bool [d_sae], for the pre-activation loss."""
    assert isinstance(state.sae, JumpReLUSAE)  # the trainer has chosen the step
    latents, loss, n = state.ready(), annealed(loss, state.annealing, annealing), x.shape[0]
    out = loss_and_gradients(state.sae, x, loss, dead, target)
    gradients = out.gradients
    of_latents = (gradients.W_enc, gradients.W_dec, gradients.b_enc, gradients.threshold, out.touched)
    ok, number = update_by_gradients(state, latents, out.loss, out.bound, *of_latents, rule)
    move_others(state, out.others, rule, ok, number)
    counters = (state.tokens_since_fired, state.updates)
    given = (gradients.b_dec, out.firing_count, n, rule, ok, number, state.b_dec_m)
    reference.conclusion.move(state.sae.b_dec.data, state.b_dec_v, *counters, *given)
    if annealing is not None and state.annealing is not None:
        follow(state.annealing, annealing, compared(annealing, out.f), ok)
    errors, y = out.residual.square().sum(1), x if target is None else target
    means = reference.conclusion.fidelity(errors, *reference.conclusion.spread_and_shares(y, y.sum(0)[None], errors))
    return StepFigures.of(
        reference.conclusion.pack(out.loss, *means, out.l0, out.n_entries, state.stalled, ok, state.skipped)
    )
