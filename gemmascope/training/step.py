"""One training step of one SAE, by routes that make the same update up to rounding.

* `sparse_step`: only the pre-activations are dense; everything else runs on the entries, the active or nearly active
  pairs of token and latent. For trained SAEs, of which less than a percent of the latents fire.
* `dense_step`: products of whole matrices with everything elementwise fused. For the first steps, when half fire.
* `reference_step`: the written formulas, densely, for every loss there is.

The first two never ask the device for a number. An update is withheld on the device, bit for bit, when

* the loss is not finite, or `losses.gradient_bound` exceeds `gradient_limit`, beyond which second moments or weights
  might not be finite after it: that update is skipped and counted;
* the entries did not fit or the bf16 copies were not those of the weights: `SAETrainer` reads that later, mends it and
  repeats the steps.

Each raises ValueError for an SAE that is not the one training began with, see `TrainState.ready`.
"""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from .. import kernels
from ..autocast import without_autocast
from ..kernels import ACTIVE, ByLatent, Entries, LatentState, LatentSums, Rule
from .config import Loss
from .losses import frequency_penalty, gradient_bound, l0_penalty, loss_and_gradients, objective, tanh_penalty
from .memory import dense_tile
from .state import COPIES, ROOM, TrainState


@dataclass(frozen=True)
class StepFigures:
    """What one step measured, as scalars on the device."""

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

    def pack(self) -> Tensor:
        """All of them in one fp64 tensor, so that one copy brings them to the host."""
        return torch.stack([getattr(self, field.name).double() for field in fields(self)])

    @classmethod
    def unpack(cls, packed: Tensor) -> dict[str, float]:
        return {field.name: value for field, value in zip(fields(cls), packed.tolist(), strict=True)}


@contextmanager
def _tf32():
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


def _centred(state: TrainState, x: Tensor) -> Tensor:
    x = x - state.sae.b_dec if state.sae.pre_encoder_bias else x
    return x.to(state.encoder_rows.dtype)


def _fidelity(x: Tensor, errors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean squared error, FVU of x [N, d_model] and that of its median token, as in `evaluation.variance`.

    errors: [N], ‖x̂_n − x_n‖².
    """
    spread = torch.linalg.vector_norm(x - x.mean(0), dim=1).square_()
    by_token = torch.where(errors == 0, errors, errors / spread)
    return errors.mean(), errors.mean() / spread.mean(), by_token.median()


def gradient_limit(dtype: torch.dtype) -> float:
    """What gradients of latents may be for an update to be made: 2⁴⁰ in fp32.

    Second moments are then at most 2⁸⁰ of 2¹²⁸. The rest is for what `gradient_bound` leaves out: decoder rows that a
    user gave another norm than 1, and the gradient of b_dec, to which every latent adds.
    """
    return torch.finfo(dtype).max ** 0.5 / 2**24


def _permission(state: TrainState, loss: Tensor, bound: Tensor, fits: Tensor | bool) -> Tensor:
    """int32 scalar: 1 when the update may be made. Counts what is withheld."""
    finite, differ = loss.isfinite(), state.copies_differ()
    may_be_made = finite & (bound <= gradient_limit(bound.dtype))
    if differ is not None:
        state.stalled |= COPIES * differ
    if fits is not True:  # room would not help a batch that is not finite, whose NaN are all entries
        state.stalled |= ROOM * (~fits & finite)
    free = state.stalled == 0
    state.skipped += ~may_be_made & free
    return (may_be_made & free).to(torch.int32)


def _finish(state: TrainState, db_dec: Tensor, firing_count: Tensor, n: int, rule: Rule, ok: Tensor) -> None:
    """The decoder's bias by Adam, and the counters; nothing moves unless ``ok``."""
    b_dec, allowed = state.sae.b_dec.data, ok > 0
    v = rule.beta2 * state.b_dec_v + (1 - rule.beta2) * db_dec.square()
    correction = (1 - torch.pow(rule.beta2, (state.updates + 1).double())).to(v.dtype)
    moved = b_dec - rule.learning_rate * db_dec / ((v / correction).sqrt() + rule.eps)
    b_dec.copy_(torch.where(allowed, moved, b_dec))
    state.b_dec_v.copy_(torch.where(allowed, v, state.b_dec_v))
    since = torch.where(firing_count > 0, 0, state.tokens_since_fired + n)
    state.tokens_since_fired.copy_(torch.where(allowed, since, state.tokens_since_fired))
    state.updates += ok


class SparseGradients(NamedTuple):
    """What the entries say of the loss and of every gradient but those of the weights, which `transposed`, `sums` and
    `residual` still hold by entry."""

    loss: Tensor
    errors: Tensor  # [N], ‖r_n‖²
    l0: Tensor
    transposed: ByLatent
    sums: LatentSums
    residual: Tensor
    db_dec: Tensor
    bound: Tensor


def sparse_gradients(
    impl: str,
    entries: Entries,
    x: Tensor,
    x_centred: Tensor,
    W_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    threshold: Tensor,
    loss: Loss,
    pre_encoder_bias: bool,
) -> SparseGradients:
    """From the entries of x [N, d_model] on. W_enc and W_dec: [d_sae, d_model], as the products read them."""
    n = x.shape[0]
    stored = torch.arange(len(entries.z), dtype=torch.int64, device=x.device) < entries.offsets[-1]
    f = torch.where(stored & (entries.latents >= ACTIVE), entries.z, 0)
    tanh, f_norm = tanh_penalty(loss, f, n), torch.linalg.vector_norm(f)
    del stored, f
    out = kernels.residual_pass(entries, x, W_dec, b_dec, impl=impl)
    transposed = kernels.by_latent(entries, threshold.shape[0], impl=impl)
    penalty, s = l0_penalty(loss, out.l0)
    sums = kernels.latent_pass(entries, out.u, transposed, threshold, s, objective(loss, n), impl=impl)
    squared_error = out.squared_error.mean()
    total = squared_error + penalty + frequency_penalty(loss, sums.firing_count, n) + tanh
    db_dec = out.residual.sum(0, dtype=x.dtype) * (2 / n)
    if pre_encoder_bias:
        db_dec = db_dec - kernels.encoder_times(W_enc, sums.db_enc, impl=impl)
    bound = gradient_bound(loss, squared_error, s, x_centred, f_norm, threshold, transposed.offsets.diff())
    return SparseGradients(total, out.squared_error, out.l0.mean(), transposed, sums, out.residual, db_dec, bound)


@torch.no_grad()
@without_autocast
def sparse_step(state: TrainState, x: Tensor, loss: Loss, rule: Rule, capacity: int | None) -> StepFigures:
    """Update ``state`` by the loss on x [N, d_model] fp32, divided by the input scale. capacity: room for entries; the
    reference, which knows how many there are, also takes None."""
    sae, impl, latents = state.sae, state.impl, state.ready()
    x_centred, W_enc, W_dec = _centred(state, x), state.encoder_rows, state.decoder_rows
    tf32 = state.compute_dtype == "tf32"
    entries = kernels.encode_entries(
        x_centred, W_enc.T, sae.b_enc, sae.threshold, loss.bandwidth, capacity, tf32=tf32, impl=impl
    )
    weights = (W_enc, W_dec, sae.b_dec, sae.threshold)
    out = sparse_gradients(impl, entries, x, x_centred, *weights, loss, sae.pre_encoder_bias)
    n_entries = entries.offsets[-1]
    ok = _permission(state, out.loss, out.bound, n_entries <= len(entries.z))
    kernels.update_from_entries(
        latents, out.transposed, out.sums, out.residual, x_centred, rule, ok, state.updates, impl=impl
    )
    _finish(state, out.db_dec, out.sums.firing_count, x.shape[0], rule, ok)
    fidelity = _fidelity(x, out.errors)
    return StepFigures(out.loss, *fidelity, out.l0, n_entries, state.stalled, ok, state.skipped)


@torch.no_grad()
@without_autocast
def dense_step(state: TrainState, x: Tensor, loss: Loss, rule: Rule) -> StepFigures:
    """The same update without a limit on the entries."""
    latents, d_sae = state.ready(), state.sae.d_sae
    with _tf32() if state.compute_dtype == "tf32" else nullcontext():
        width = dense_tile(x.shape[0], d_sae)
        tiles = [slice(start, start + width) for start in range(0, d_sae, width)]
        return _dense_step(state, latents, x, loss, rule, tiles)


def _dense_step(
    state: TrainState, latents: LatentState, x: Tensor, loss: Loss, rule: Rule, tiles: list[slice]
) -> StepFigures:
    sae, impl, n = state.sae, state.impl, x.shape[0]
    x_centred = _centred(state, x)

    def encode(tile: slice):
        weights = (state.encoder_rows[tile].T, sae.b_enc[tile], sae.threshold[tile])
        tf32 = state.compute_dtype == "tf32"
        return kernels.dense_encode(x_centred, *weights, loss.bandwidth, tf32=tf32, impl=impl)

    x_hat, l0, tanh, counts, touched, f_norms, n_entries = sae.b_dec.expand(x.shape), 0.0, 0.0, [], [], [], 0
    for tile in tiles:
        code = encode(tile)
        x_hat = x_hat + matmul(code.f, state.decoder_rows[tile])
        l0, n_entries = l0 + code.l0, n_entries + code.n_entries
        tanh = tanh + tanh_penalty(loss, code.f, n)
        counts.append(code.firing_count)
        touched.append(code.touched)
        f_norms.append(torch.linalg.vector_norm(code.f, dtype=x.dtype))
    assert isinstance(l0, Tensor)  # a sum over at least one tile
    assert isinstance(n_entries, Tensor)
    firing_count = torch.cat(counts)
    residual = x_hat - x
    penalty, s = l0_penalty(loss, l0)
    errors = residual.square().sum(1)
    squared_error = errors.mean()
    total = squared_error + penalty + frequency_penalty(loss, firing_count, n) + tanh

    f_norm = torch.linalg.vector_norm(torch.stack(f_norms))
    bound = gradient_bound(loss, squared_error, s, x_centred, f_norm, sae.threshold, torch.cat(touched))
    ok = _permission(state, total, bound, True)
    low, g = (t.to(state.decoder_rows.dtype) for t in (residual, residual * (2 / n)))
    db_dec = low.sum(0, dtype=x.dtype) * (2 / n)
    for tile in tiles:
        code = code if len(tiles) == 1 else encode(tile)
        u = low @ state.decoder_rows[tile].T
        dz, db_enc, dthreshold = kernels.dense_backward(u, code, sae.threshold[tile], s, objective(loss, n), impl=impl)
        if sae.pre_encoder_bias:
            db_dec = db_dec - kernels.encoder_times(state.encoder_rows[tile], db_enc, impl=impl)
        kernels.update_from_dense(
            LatentState._make(None if t is None else t[tile] for t in latents),
            matmul(dz.T, x_centred),
            matmul(code.f.T, g),
            db_enc,
            dthreshold,
            code.touched,
            rule,
            ok,
            state.updates,
            impl=impl,
        )
    _finish(state, db_dec, firing_count, n, rule, ok)
    fidelity = _fidelity(x, errors)
    return StepFigures(total, *fidelity, l0.mean(), n_entries, state.stalled, ok, state.skipped)


@torch.no_grad()
@without_autocast
def reference_step(state: TrainState, x: Tensor, loss: Loss, rule: Rule, dead: Tensor | None = None) -> StepFigures:
    """The same update by `loss_and_gradients`, in fp32. dead: bool [d_sae], for the pre-activation loss."""
    latents, out = state.ready(), loss_and_gradients(state.sae, x, loss, dead)
    ok = _permission(state, out.loss, out.bound, True)
    gradients = out.gradients
    kernels.update_from_dense(
        latents,
        gradients.W_enc.T,
        gradients.W_dec,
        gradients.b_enc,
        gradients.threshold,
        torch.ones_like(out.firing_count),
        rule,
        ok,
        state.updates,
        impl="reference",
    )
    _finish(state, gradients.b_dec, out.firing_count, x.shape[0], rule, ok)
    fidelity = _fidelity(x, out.residual.square().sum(1))
    return StepFigures(out.loss, *fidelity, out.l0, out.n_entries, state.stalled, ok, state.skipped)
