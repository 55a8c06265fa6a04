r"""Training of the SAEs of which a fixed number of latents fires: TopK, BatchTopK and Matryoshka BatchTopK.

    z = (x − b_dec)·W_enc + b_enc;   f = z at the k largest positive z of the token (TopK, arXiv 2406.04093), or at the
    k·N largest of the batch (BatchTopK, arXiv 2412.06410), the rest 0
    x̂_m = f[:m]·W_dec[:m] + b_dec for each m of the prefixes (Matryoshka, arXiv 2503.17547), else for m = d_sae alone
    L = Σ_m mean_n ‖x_n − x̂_m,n‖² + α·Σ_n ‖e_n − ê_n‖² / Σ_n ‖e_n − mean e‖²

The sum over the prefixes is a sum, not a mean. The last term is AuxK: e = x − x̂ of all latents, ê = f'·W_dec without a
bias, f' the ``aux_k`` largest positive z of the token among the dead latents. No gradient passes to e or the
denominator. It is 0 without dead latents, and where e does not vary.

With r_m = x̂_m − x and R_j = Σ r_m over the prefixes that latent j is in, all gradients are those of a JumpReLU SAE with
R in the place of r and no window: dz = (2/N)·⟨R_j, W_dec[j]⟩, dW_dec[j] = Σ (2/N)·f·R_j over the entries of latent j.
AuxK adds entries of its own, with r' = ê − e in the place of R and α·N/Σ‖e − mean e‖² as a factor.

A transcoder has a target y in the place of the x that is reconstructed, and no b_dec in z. A skip connection adds
x·W_skipᵀ to every x̂_m, with the gradient (2/N)·(Σ_m r_m)ᵀ·x.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .. import kernels
from ..autocast import without_autocast
from ..formats.export import SKIP
from ..kernels import LATENT, Entries, Objective, Rule, reference
from ..saes import BatchTopKSAE
from ..saes.base import BaseSAE
from ..saes.topk_transcoder import TopKTranscoder
from .config import TrainConfig
from .losses import to_latents
from .state import TrainState
from .step import StepFigures, centre, gradient_of_skip, move_others, skipped_target, update_by_gradients

# Of the moving average of the smallest z that fires, which the k·N-th of so many hardly scatters, while it drifts as
# the SAE learns.
THRESHOLD_DECAY = 0.99
# No z lies in so narrow a window, and thresholds have no gradient.
_WITHOUT_WINDOW = Objective(bandwidth=1e-30)


def _of(config: TrainConfig) -> str:
    return "token" if config.kind == "topk" else "batch"


def _prefixes(config: TrainConfig) -> tuple[int, ...]:
    return config.prefixes or (config.d_sae,)


def _aux_k(config: TrainConfig, d_model: int, dead: Tensor | None) -> int:
    """Dead latents that take part in AuxK on each token. Waits for the device to count them."""
    if dead is None or not config.aux_coefficient:
        return 0
    return min(config.aux_k or max(1, d_model // 2), int(dead.sum()))


def sizes_of_step(config: TrainConfig, d_model: int) -> tuple[int, int]:
    """Entries of a token that a step makes room for at most, and residuals of a token."""
    assert config.k is not None
    k, prefixes = config.k, len(_prefixes(config))
    if not config.aux_coefficient:
        return k, prefixes
    aux_k = min(config.aux_k or max(1, d_model // 2), config.d_sae)
    return 2 * (k + aux_k), prefixes + 1  # each selection, and both together


def _aux_scale(e: Tensor, coefficient: float) -> Tensor:
    """α/Σ‖e_n − mean e‖²; 0 where e [N, d] does not vary."""
    spread = (e - e.mean(0)).square().sum()
    return torch.where(spread == 0, spread, coefficient / spread)


def _bound(parts: list[tuple[Tensor, Tensor]], x_norm: Tensor, n: int) -> Tensor:
    """[] What no element of the gradients of the latents exceeds. parts: the sum over residuals of the roots of their
    mean squared norms, times their factor, and the norm of the activations that they belong to. See
    `kernels.reference.conclusion.gradient_bound`."""
    dz = torch.stack([2 * error for error, _ in parts]).sum()
    decoder = torch.stack([2 * error * f_norm / n**0.5 for error, f_norm in parts]).sum()
    return torch.stack((dz, x_norm * dz, decoder)).amax()


# ---- the reference


class TopKLoss(NamedTuple):
    """squared_error, l0, firing_count, n_entries and residual are those of all latents, without AuxK."""

    loss: Tensor  # []
    squared_error: Tensor  # [] mean_n ‖x − x̂‖²
    l0: Tensor  # [] mean active latents
    firing_count: Tensor  # [d_sae] int32, tokens on which each latent fired
    n_entries: Tensor  # [] latents that fired, over all tokens
    residual: Tensor  # [N, d_model] x̂ − x
    gradients: reference.Parameters
    bound: Tensor  # [] what no element of a latent's gradients exceeds
    smallest: Tensor  # [] of `_smallest`
    touched: Tensor  # bool [d_sae], which latents fired or took part in AuxK
    others: Mapping[str, Tensor]  # the gradients of ``sae.OTHERS``


@torch.no_grad()
@without_autocast
def topk_loss_and_gradients(
    sae: BaseSAE, x: Tensor, config: TrainConfig, dead: Tensor | None = None, target: Tensor | None = None
) -> TopKLoss:
    """The loss of one batch and its gradients, by whole matrices.

    x: [N ≥ 1, d_model], divided by the SAE's input_scale, on its device and in its dtype, fp32 or fp64. dead: bool
    [d_sae], latents that AuxK revives; None: without AuxK. target: [N, d_out], divided by the output_scale of a
    transcoder; by default x.
    """
    assert config.k is not None  # of a recipe of these kinds
    n = x.shape[0]
    centred = x - sae.b_dec if sae.pre_encoder_bias else x
    z = torch.addmm(sae.b_enc, centred, sae.W_enc)
    active = reference.largest(z, config.k, _of(config))
    f = torch.where(active, z, 0)

    loss, bounds, groups, first = z.new_zeros(()), [], [], 0
    y = x if target is None else target
    residual, R = sae.b_dec - to_latents(sae, x, target), torch.zeros_like(y)
    for m in _prefixes(config):
        residual = residual + f[:, first:m] @ sae.W_dec[first:m]
        loss = loss + residual.square().sum(1).mean()
        bounds.append(residual.square().sum(1).mean().sqrt())
        groups.append((slice(first, m), residual))
        first = m
    dz, dW_dec = torch.zeros_like(z), torch.zeros_like(sae.W_dec)
    for group, of_prefix in reversed(groups):
        R = R + of_prefix
        g = (2 / n) * R
        dz[:, group] = active[:, group] * (g @ sae.W_dec[group].T)
        dW_dec[group] = f[:, group].T @ g
    parts = [(torch.stack(bounds).sum(), torch.linalg.vector_norm(f))]

    aux_k, touched = _aux_k(config, sae.d_model, dead), (active != 0).any(0)
    if aux_k:
        revived = reference.largest(z, aux_k, among=dead)
        touched |= (revived != 0).any(0)
        f_aux = torch.where(revived, z, 0)
        scale = _aux_scale(-residual, config.aux_coefficient)
        of_aux = f_aux @ sae.W_dec + residual  # ê − e
        loss = loss + scale * of_aux.square().sum()
        dz += revived * (2 * scale * of_aux @ sae.W_dec.T)
        dW_dec += f_aux.T @ (2 * scale * of_aux)
        error = n * scale * of_aux.square().sum(1).mean().sqrt()
        parts.append((error, torch.linalg.vector_norm(f_aux)))

    db_enc, db_dec = dz.sum(0), (2 / n) * R.sum(0)
    if sae.pre_encoder_bias:
        db_dec = db_dec - sae.W_enc @ db_enc
    gradients = reference.Parameters((dz.T @ centred).T, db_enc, dW_dec, db_dec, torch.zeros_like(sae.b_enc))
    n_entries = active.sum()
    of_token = torch.where(active, z, torch.inf).amin(1)
    return TopKLoss(
        loss,
        residual.square().sum(1).mean(),
        active.sum(1).to(z.dtype).mean(),
        active.sum(0).to(torch.int32),
        n_entries,
        residual,
        gradients,
        _bound(parts, torch.linalg.vector_norm(centred), n),
        _smallest(of_token, n_entries == config.k * n, config),
        touched,
        {SKIP: (2 / n) * R.T @ x} if SKIP in sae.OTHERS else {},
    )


def _smallest(of_token: Tensor, full: Tensor, config: TrainConfig) -> Tensor:
    """[] The smallest z that fired in a batch, 0 when fewer fired than might have; where each token has k of its own,
    the mean over the tokens of the smallest there. of_token: [N] those, Inf where none fired; of a batch all z will do.
    full: bool scalar."""
    if _of(config) == "batch":
        return torch.where(full, of_token.amin(), 0)
    fired = of_token != torch.inf
    return torch.where(fired, of_token, 0).sum() / fired.sum().clamp(min=1)


def _follow(state: TrainState, smallest: Tensor, ok: Tensor, number: Tensor) -> None:
    """The threshold of a BatchTopK SAE after a step in which the ``smallest`` z fired: the moving average of those of
    the updates made, which weighs none before the first."""
    if state.smallest_kept is None:
        return
    assert isinstance(state.sae, BatchTopKSAE | TopKTranscoder)
    threshold = state.sae.threshold.data
    mean = THRESHOLD_DECAY * state.smallest_kept + (1 - THRESHOLD_DECAY) * smallest.double()
    unbiased = (mean / (1 - torch.pow(THRESHOLD_DECAY, number.double()))).to(threshold.dtype)
    threshold.copy_(torch.where(ok > 0, unbiased, threshold))
    state.smallest_kept.copy_(torch.where(ok > 0, mean, state.smallest_kept))


def _reference_step(
    state: TrainState, x: Tensor, config: TrainConfig, rule: Rule, dead: Tensor | None, target: Tensor | None
) -> StepFigures:
    latents, out, n = state.ready(), topk_loss_and_gradients(state.sae, x, config, dead, target), x.shape[0]
    gradients = out.gradients
    of_latents = (gradients.W_enc, gradients.W_dec, gradients.b_enc, gradients.threshold, out.touched)
    ok, number = update_by_gradients(state, latents, out.loss, out.bound, *of_latents, rule)
    counters = (state.tokens_since_fired, state.updates)
    moved = (state.sae.b_dec.data, state.b_dec_v, *counters)
    reference.conclusion.move(*moved, gradients.b_dec, out.firing_count, n, rule, ok, number, state.b_dec_m)
    move_others(state, out.others, rule, ok, number)
    _follow(state, out.smallest, ok, number)
    errors, y = out.residual.square().sum(1), x if target is None else target
    means = reference.conclusion.fidelity(errors, *reference.conclusion.spread_and_shares(y, y.sum(0)[None], errors))
    return StepFigures.of(
        reference.conclusion.pack(out.loss, *means, out.l0, out.n_entries, state.stalled, ok, state.skipped)
    )


# ---- by the entries


class _Part(NamedTuple):
    """Entries of one or more blocks of N rows, what their gradients are made of, and the factor of those."""

    entries: Entries
    u: Tensor  # [capacity] ⟨residual, W_dec[j]⟩
    residual: Tensor  # [blocks·N, d]
    weight: Tensor | None  # []; None: 1


class _Main(NamedTuple):
    part: _Part
    last: Tensor  # [N, d] x̂ − x of all latents, in the dtype of x
    errors: Tensor  # [N] its squared norm
    total: Tensor  # [] Σ_m mean_n ‖x − x̂_m‖²
    root: Tensor  # [] Σ_m √(mean_n ‖x − x̂_m‖²)
    residual_sums: Tensor  # [d] Σ_m Σ_n of x̂_m − x
    R: Tensor  # [N, d] Σ_m of x̂_m − x, as the products read it


def _whole(entries: Entries, x: Tensor, W_dec: Tensor, b_dec: Tensor, impl: str) -> _Main:
    """One reconstruction, by all latents."""
    out = kernels.residual_pass(entries, x, W_dec, b_dec, impl=impl)
    last, mean = out.residual.to(x.dtype), out.squared_error.mean()
    part = _Part(entries, out.u, out.residual, None)
    return _Main(part, last, out.squared_error, mean, mean.sqrt(), last.sum(0), out.residual)


def _by_prefix(
    entries: Entries, x: Tensor, W_dec: Tensor, b_dec: Tensor, prefixes: tuple[int, ...], impl: str
) -> _Main:
    """A reconstruction by each prefix. Latents between two prefixes are a block of N rows of their own: two passes over
    the entries, one for what each block adds to the reconstruction, one for ⟨R_j, W_dec[j]⟩."""
    (n, d), blocks = x.shape, len(prefixes)
    bounds = torch.tensor(prefixes, dtype=torch.int32, device=x.device)
    block, order = torch.bucketize(entries.latents & LATENT, bounds, right=True).sort(stable=True)
    rows = block * n + entries.tokens[order]  # what lies beyond the last entry belongs to no block
    starts = torch.arange(blocks * n + 1, dtype=torch.int64, device=x.device)
    grouped = Entries(entries.z[order], entries.latents[order], rows.to(torch.int32), torch.searchsorted(rows, starts))
    nothing = torch.zeros_like(b_dec)
    target = torch.cat((x - b_dec, x.new_zeros((blocks - 1) * n, d)))
    added = kernels.residual_pass(grouped, target, W_dec, nothing, impl=impl).residual
    R = added.to(x.dtype).view(blocks, n, d).clone()
    for i in range(1, blocks):
        R[i] += R[i - 1]
    errors = R.square().sum(2)
    means = errors.mean(1)
    for i in range(blocks - 1, 0, -1):
        R[i - 1] += R[i]
    inactive = grouped._replace(latents=grouped.latents & LATENT)  # they add nothing: the residual is R itself
    out = kernels.residual_pass(inactive, -R.view(blocks * n, d), W_dec, nothing, impl=impl)
    part = _Part(grouped, out.u, out.residual, None)
    return _Main(part, R[-1], errors[-1], means.sum(), means.sqrt().sum(), R[0].sum(0), R[0].to(W_dec.dtype))


def _joined(parts: list[_Part], d_sae: int) -> _Part:
    """All of them as one, block after block, without gaps, and without a look from the host."""
    like, room = parts[0], sum(len(part.u) for part in parts)
    z, u = like.entries.z.new_zeros(room), like.u.new_zeros(room)
    latents = like.entries.latents.new_full((room,), d_sae)
    tokens, offsets = like.entries.tokens.new_zeros(room), [like.entries.offsets[:1]]
    start, rows = torch.zeros_like(like.entries.offsets[0]), 0
    for part in parts:
        entries = part.entries
        # The room that a list leaves is overwritten by the next.
        places = start + torch.arange(len(part.u), dtype=torch.int64, device=u.device)
        z.index_copy_(0, places, entries.z)
        u.index_copy_(0, places, part.u if part.weight is None else part.u * part.weight)
        latents.index_copy_(0, places, entries.latents)
        tokens.index_copy_(0, places, entries.tokens + rows)
        offsets.append(entries.offsets[1:] + start)
        start, rows = start + entries.offsets[-1], rows + len(part.residual)
    residual = torch.cat([part.residual for part in parts])
    return _Part(Entries(z, latents, tokens, torch.cat(offsets)), u, residual, None)


def _sparse_step(
    state: TrainState, x: Tensor, config: TrainConfig, rule: Rule, dead: Tensor | None, target: Tensor | None
) -> StepFigures:
    assert config.k is not None
    sae, impl, latents = state.sae, state.impl, state.ready()
    (n, _), d_sae, W_dec, b_dec = x.shape, sae.d_sae, state.decoder_rows, sae.b_dec.data
    centred, y = centre(state, x, target, clamp=False), x if target is None else target
    left = x if target is None else skipped_target(state, centred.x, target)

    def encode(k: int, of: str, among: Tensor | None = None) -> Entries:
        tf32 = state.compute_dtype == "tf32"
        given = (centred.x, state.encoder_rows.T, sae.b_enc.data)
        return kernels.encode_topk(*given, k, of=of, among=among, tf32=tf32, impl=impl)

    entries, prefixes = encode(config.k, _of(config)), _prefixes(config)
    if len(prefixes) == 1:
        main = _whole(entries, left, W_dec, b_dec, impl)
    else:
        main = _by_prefix(entries, left, W_dec, b_dec, prefixes, impl)
    loss, parts = main.total, [main.part]
    bounds = [(main.root, torch.linalg.vector_norm(entries.z))]
    aux_k = _aux_k(config, sae.d_model, dead)
    if aux_k:
        revived = encode(aux_k, "token", dead)
        scale = _aux_scale(main.last, config.aux_coefficient)
        out = kernels.residual_pass(revived, -main.last, W_dec, torch.zeros_like(b_dec), impl=impl)  # ê − e
        loss = loss + scale * out.squared_error.sum()
        parts.append(_Part(revived, out.u, out.residual, n * scale))
        error = n * scale * out.squared_error.mean().sqrt()
        bounds.append((error, torch.linalg.vector_norm(revived.z)))

    # `latent_pass` divides by all rows, of which there are `blocks` for each token.
    joined = parts[0] if len(parts) == 1 else _joined(parts, d_sae)
    blocks = len(joined.residual) // n
    transposed = kernels.by_latent(joined.entries, d_sae, impl=impl)
    thresholds, s = torch.zeros_like(latents.b_enc), joined.u.new_zeros(blocks * n)
    u = joined.u if blocks == 1 else joined.u * blocks
    sums = kernels.latent_pass(joined.entries, u, transposed, thresholds, s, _WITHOUT_WINDOW, impl=impl)
    firing_count = sums.firing_count
    if blocks > 1:
        factor, own = torch.full_like(sums.dec, blocks), len(main.part.residual)
        if aux_k:
            weight = parts[1].weight
            assert weight is not None
            factor = torch.where(sums.tokens < own, factor, factor * weight)
            count = torch.zeros(d_sae + 1, dtype=torch.int32, device=x.device)
            fired = (entries.latents & LATENT).long()
            firing_count = count.scatter_add_(0, fired, torch.ones_like(entries.latents))[:d_sae].contiguous()
        sums = sums._replace(dec=sums.dec * factor)
    of_encoder = kernels.encoder_times(state.encoder_rows, sums.db_enc, impl=impl) if sae.pre_encoder_bias else None

    bound = _bound(bounds, torch.linalg.vector_norm(centred.norms), n)
    ok = reference.conclusion.permission(loss, bound, None, state.copies_differ(), state.stalled, state.skipped)
    number, x_centred = state.updates + 1, centred.x if blocks == 1 else centred.x.repeat(blocks, 1)
    kernels.update_from_entries(
        latents, transposed, sums, joined.residual, x_centred, rule, ok, state.updates, impl=impl
    )
    db_dec = main.residual_sums * (2 / n)
    if of_encoder is not None:
        db_dec = db_dec - of_encoder
    counters = (state.tokens_since_fired, state.updates)
    given = (db_dec, firing_count, n, rule, ok, number, state.b_dec_m)
    reference.conclusion.move(b_dec, state.b_dec_v, *counters, *given)
    move_others(state, gradient_of_skip(state, main.R, centred.x), rule, ok, number)
    if state.smallest_kept is not None:
        stored = torch.arange(len(entries.z), dtype=torch.int64, device=x.device) < entries.offsets[-1]
        kept = torch.where(stored, entries.z, torch.inf)
        of_token = kept
        if _of(config) == "token":
            tokens = torch.where(stored, entries.tokens, 0).long()
            of_token = torch.full_like(kept[:1], torch.inf).expand(n).scatter_reduce(0, tokens, kept, "amin")
        _follow(state, _smallest(of_token, entries.offsets[-1] == config.k * n, config), ok, number)
    of_tokens = reference.conclusion.spread_and_shares(y, centred.column_sums, main.errors)
    means = reference.conclusion.fidelity(main.errors, *of_tokens)
    n_entries = entries.offsets[-1]
    figures = (loss, *means, n_entries.double() / n, n_entries, state.stalled, ok, state.skipped)
    return StepFigures.of(reference.conclusion.pack(*figures))


@torch.no_grad()
@without_autocast
def topk_step(
    state: TrainState,
    x: Tensor,
    config: TrainConfig,
    rule: Rule,
    dead: Tensor | None = None,
    target: Tensor | None = None,
) -> StepFigures:
    """Update ``state`` by the loss on x [N, d_model] fp32, divided by the input scale; on the entries alone, but with
    the ``reference`` route by whole matrices. dead: bool [d_sae], latents that AuxK revives. target: [N, d_out] fp32,
    divided by the output scale, of a transcoder.

    On a GPU it waits for the device where there is AuxK, once, to learn how many latents are dead: without any, which
    is usual, half of the step falls away. In bf16 the sums over the prefixes are of reconstructions rounded to it.
    """
    step = _reference_step if config.route == "reference" else _sparse_step
    return step(state, x, config, rule, dead, target)
