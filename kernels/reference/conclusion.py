"""What a training step does around its operators, in plain PyTorch: sums over x, the penalty, whether the update may be
made, the figures, the decoder's bias and the counters. Every implementation but the kernels runs it, in this order:

    centre      x_n − b_dec as the products read it, Σ_n x_n, ‖x − b_dec‖; thresholds below 0 become 0
    token_pass  s_n = ∂L/∂l0_n, ‖x_n − mean x‖², ‖f‖, Σ tanh(c·f) or Σ f, Σ_n r_n
    conclude    L, the bound on what an update could make, permission, the figures
    finish      b_dec by Adam on (2/N)·Σ_n r_n − W_enc·db_enc, tokens since each latent fired, the count of updates

Nothing here waits for the device. An update is permitted when the loss is finite, no gradient of a latent can exceed
`gradient_limit`, and neither this step nor one before it found that entries did not fit or that copies were not those
of the weights, which is kept in ``stalled`` until somebody mends it. One that is withheld for the first two reasons
alone is counted in ``skipped``; room would not help a batch that is not finite, whose NaN are all entries.
"""

import torch
from torch import Tensor

from ..entries import (
    ACTIVE,
    COPIES,
    ROOM,
    ByLatent,
    Centred,
    Conclusion,
    Entries,
    LatentState,
    Objective,
    Penalty,
    Residual,
    Rule,
    TokenSums,
)


def as_number(value: float | Tensor, like: Tensor) -> float | Tensor:
    """A number that may come as a tensor, to calculate with it in the dtype of ``like``; without waiting for a GPU."""
    if not isinstance(value, Tensor):
        return value
    return float(value.detach()) if value.device.type == "cpu" else value.to(like.dtype)


# ---- the penalty


def l0_penalty(penalty: Penalty, l0: Tensor) -> tuple[Tensor, Tensor]:
    """The part of the penalty that depends on l0 [N], and s [N] = ∂S/∂l0_n."""
    n, coefficient = l0.shape[0], as_number(penalty.coefficient, l0)
    if penalty.of_batch:
        l0 = l0.mean().expand(n)
    if penalty.of_l0 == "linear":
        return coefficient * l0.mean(), torch.ones_like(l0) * (coefficient / n)
    if penalty.of_l0 == "none":
        return l0.new_zeros(()), torch.zeros_like(l0)
    weight, excess = coefficient * penalty.factor, l0 - penalty.target
    return weight * excess.square().mean(), excess * (2 * weight / n)


def frequency_penalty(penalty: Penalty, firing_count: Tensor, n: int) -> Tensor | float:
    """λ·Σ_j p_j²/s for firing_count [F] over n tokens; 0 without a scale s."""
    if penalty.frequency_scale is None:
        return 0.0
    squares = (firing_count.float() / n).square().sum()
    return squares * (as_number(penalty.coefficient, squares) / penalty.frequency_scale)


def tanh_sum(penalty: Penalty, f: Tensor) -> Tensor | None:
    """Σ tanh(c·f) over activations of any shape, inactive ones 0, or Σ f where c is 0; None without that penalty."""
    if penalty.tanh_scale is None:
        return None
    return (torch.tanh(penalty.tanh_scale * f) if penalty.tanh_scale else f).sum()


def tanh_penalty(penalty: Penalty, sums: Tensor | None, n: int) -> Tensor | float:
    """λ·mean_n Σ_j tanh(c·f_nj), or that of f_nj, from the sums of its parts."""
    if sums is None:
        return 0.0
    return sums.sum() * (as_number(penalty.coefficient, sums) / n)


def total_loss(
    penalty: Penalty, squared_error: Tensor, l0: Tensor, firing_count: Tensor, tanh_sums: Tensor | None
) -> Tensor:
    """mean_n ‖r_n‖² and the penalty. squared_error: [] that mean. l0: [N]."""
    n = len(l0)
    of_l0, of_frequency = l0_penalty(penalty, l0)[0], frequency_penalty(penalty, firing_count, n)
    return squared_error + of_l0 + of_frequency + tanh_penalty(penalty, tanh_sums, n)


# ---- permission


def gradient_limit(dtype: torch.dtype) -> float:
    """What gradients of latents may be for an update to be made: 2⁴⁰ in fp32.

    Second moments are then at most 2⁸⁰ of 2¹²⁸. The rest is for what `gradient_bound` leaves out: decoder rows that a
    user gave another norm than 1, and the gradient of b_dec, to which every latent adds.
    """
    return torch.finfo(dtype).max ** 0.5 / 2**24


def gradient_bound(
    objective: Objective,
    pre_act_coefficient: float,
    squared_error: Tensor,
    s: Tensor,
    x_norm: Tensor,
    f_norm: Tensor,
    threshold: Tensor,
    touched: Tensor,
) -> Tensor:
    """[] What no element of the gradients of the latents exceeds, nor θ·dθ: from scalars that every route has.

    With E = √squared_error the mean of ‖r_n‖ is at most E, so that, for decoder rows of unit norm and by the formulas
    of `kernels.entries`, the sums over the entries of a latent are at most

        Σ_n |u_nj| ≤ U = 2E + N·tanh_slope
        Σ_n |q_nj| ≤ Q = (θ·U + Σ_n |s_n| + N·t)/ε,  t ≤ N·frequency_slope,  θ the largest that was touched
        Σ_n |dz_nj| ≤ U, or U + Q where the estimator passes to z too
        |dW_enc| ≤ ‖x‖·Σ_n |dz_nj|;  |dW_dec| ≤ 2E·‖f‖/√N

    squared_error: [] mean_n ‖r_n‖². s: [N] of `l0_penalty`. x_norm, f_norm: [] of x − b_dec and of all activations.
    threshold: [F]. touched: [F], whether a latent has entries.
    """
    n, error = len(s), 2 * squared_error.sqrt()
    theta = torch.where(touched > 0, threshold, 0).amax()
    u = error + n * as_number(objective.tanh_slope, error)
    q = theta * u + s.abs().sum() + n * n * as_number(objective.frequency_slope, error)
    q = q / objective.bandwidth + pre_act_coefficient
    dz = u + pre_act_coefficient + (q if objective.ste_to_z else 0)
    return torch.stack((dz, x_norm * dz, error * f_norm / n**0.5, q, theta * q)).amax()


def copies_differ(latents: LatentState, column: int | Tensor | None) -> Tensor | None:
    """Bool scalar: whether a column of the weights differs from what the bf16 copies have there; None without a look.

    column: a number, or a 0-d tensor of it on the device; of a matrix of fewer columns, the one that it is when
    counting goes on from the first.
    """
    if column is None or latents.W_enc_low is None or latents.W_dec_low is None:
        return None

    def at(rows: Tensor) -> Tensor:
        if isinstance(column, Tensor):
            return rows.index_select(1, column.reshape(1).long() % rows.shape[1])[:, 0]
        return rows[:, column % rows.shape[1]]

    weights = torch.stack((at(latents.W_enc), at(latents.W_dec)))
    copies = torch.stack((at(latents.W_enc_low), at(latents.W_dec_low)))
    return (weights.bfloat16() != copies).any()


def permission(
    loss: Tensor, bound: Tensor, fits: Tensor | None, differ: Tensor | None, stalled: Tensor, skipped: Tensor
) -> Tensor:
    """int32 scalar: 1 when the update may be made. Counts what is withheld. None: nothing was looked for."""
    finite = loss.isfinite()
    may_be_made = finite & (bound <= gradient_limit(bound.dtype))
    if differ is not None:
        stalled |= COPIES * differ
    if fits is not None:
        stalled |= ROOM * (~fits & finite)
    free = stalled == 0
    skipped += ~may_be_made & free
    return (may_be_made & free).to(torch.int32)


# ---- the operators


def centre(x: Tensor, b_dec: Tensor | None, threshold: Tensor | None, dtype: torch.dtype) -> Centred:
    """x: [N, d]. b_dec: [d], None without a pre-encoder bias. threshold: [F], whose elements below 0 are set, in place,
    to the 0 they count as; None where a caller has seen to that. dtype: of the products."""
    if threshold is not None:
        threshold.clamp_(min=0)
    centred = (x if b_dec is None else x - b_dec).to(dtype)
    return Centred(centred, x.sum(0)[None], torch.linalg.vector_norm(centred, dtype=x.dtype)[None])


def spread_and_shares(x: Tensor, column_sums: Tensor, squared_error: Tensor) -> tuple[Tensor, Tensor]:
    """‖x_n − mean x‖² and the share ‖r_n‖² is of it, as in `evaluation.variance`: [N] each."""
    spread = torch.linalg.vector_norm(x - column_sums.sum(0) / len(x), dim=1).square_()
    return spread, torch.where(squared_error == 0, squared_error, squared_error / spread)


def token_pass(entries: Entries, x: Tensor, centred: Centred, out: Residual, penalty: Penalty) -> TokenSums:
    """What there is to sum over the tokens. x: [N, d], not centred. out: of `residual_pass`."""
    stored = torch.arange(len(entries.z), dtype=torch.int64, device=x.device) < entries.offsets[-1]
    f = torch.where(stored & (entries.latents >= ACTIVE), entries.z, 0)
    tanh = tanh_sum(penalty, f)
    return TokenSums(
        l0_penalty(penalty, out.l0)[1],
        *spread_and_shares(x, centred.column_sums, out.squared_error),
        torch.linalg.vector_norm(f)[None],
        None if tanh is None else tanh[None],
        out.residual.sum(0, dtype=x.dtype)[None],
    )


def pack(*figures: Tensor) -> Tensor:
    return torch.stack([figure.double() for figure in figures])


def fidelity(squared_error: Tensor, spread: Tensor, shares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[] each: the mean squared error, the FVU of the batch, that of the median token."""
    mean = squared_error.mean()
    return mean, mean / spread.mean(), shares.median()


def conclude(
    latents: LatentState,
    squared_error: Tensor,
    l0: Tensor,
    tokens: TokenSums,
    x_norms: Tensor,
    touched: ByLatent | Tensor,
    firing_count: Tensor,
    n_entries: Tensor,
    capacity: int | None,
    penalty: Penalty,
    objective: Objective,
    column: int | Tensor | None,
    stalled: Tensor,
    skipped: Tensor,
    updates: Tensor,
) -> Conclusion:
    """Whether the update may be made, and the figures of the step.

    squared_error, l0: [N]. x_norms: of `centre`. touched: [F] integers, > 0 where a latent has entries, or the lists
    themselves. n_entries: int64 scalar. capacity: the room there was for them, None for as much as needed. column: that
    of the weights which is compared with the copies, None for no look. stalled, skipped, updates: int64 scalars; the
    first two change.
    """
    touched = touched.offsets.diff() if isinstance(touched, ByLatent) else touched
    means = fidelity(squared_error, tokens.spread, tokens.shares)
    total = total_loss(penalty, means[0], l0, firing_count, tokens.tanh_sums)
    x_norm, f_norm = torch.linalg.vector_norm(x_norms), torch.linalg.vector_norm(tokens.f_norms)
    bound = gradient_bound(objective, 0.0, means[0], tokens.s, x_norm, f_norm, latents.threshold, touched)
    fits = None if capacity is None else n_entries <= capacity
    ok = permission(total, bound, fits, copies_differ(latents, column), stalled, skipped)
    return Conclusion(ok, updates + 1, pack(total, *means, l0.mean(), n_entries, stalled, ok, skipped))


def adam(
    p: Tensor, v: Tensor, gradient: Tensor, rule: Rule, ok: Tensor, number: Tensor, m: Tensor | None = None
) -> None:
    """Adam on a parameter that every update moves, in place; nothing moves unless ``ok``.

        m ← β1·m + (1 − β1)·g;   v ← β2·v + (1 − β2)·g²;   p ← p − lr·(m/(1 − β1^k))/(√(v/(1 − β2^k)) + eps)

    p, its moments m and v and its gradient g: of one shape. m: None where β1 is 0, where it would be g. k: ``number``,
    an int64 scalar, which update this is, counted from 1. Does not wait for the device.
    """
    allowed, second, direction = ok > 0, rule.beta2 * v + (1 - rule.beta2) * gradient.square(), gradient
    if m is not None:
        first = rule.beta1 * m + (1 - rule.beta1) * gradient
        direction = first / (1 - torch.pow(rule.beta1, number.double())).to(m.dtype)
        m.copy_(torch.where(allowed, first, m))
    correction = (1 - torch.pow(rule.beta2, number.double())).to(v.dtype)
    moved = p - as_number(rule.learning_rate, p) * direction / ((second / correction).sqrt() + rule.eps)
    p.copy_(torch.where(allowed, moved, p))
    v.copy_(torch.where(allowed, second, v))


def move(
    b_dec: Tensor,
    b_dec_v: Tensor,
    tokens_since_fired: Tensor,
    updates: Tensor,
    db_dec: Tensor,
    firing_count: Tensor,
    n: int,
    rule: Rule,
    ok: Tensor,
    number: Tensor,
    b_dec_m: Tensor | None = None,
) -> None:
    """`finish` from the gradient of b_dec [d] itself."""
    adam(b_dec, b_dec_v, db_dec, rule, ok, number, b_dec_m)
    since = torch.where(firing_count > 0, 0, tokens_since_fired + n)
    tokens_since_fired.copy_(torch.where(ok > 0, since, tokens_since_fired))
    updates += ok


def finish(
    b_dec: Tensor,
    b_dec_v: Tensor,
    tokens_since_fired: Tensor,
    updates: Tensor,
    residual_sums: Tensor,
    of_encoder: Tensor | None,
    firing_count: Tensor,
    n: int,
    rule: Rule,
    ok: Tensor,
    number: Tensor,
    b_dec_m: Tensor | None = None,
) -> None:
    """The decoder's bias [d] by Adam, and the counters, in place; nothing moves unless ``ok``.

    residual_sums: [parts, d] over n tokens. of_encoder: [parts, d] of `encoder_parts`, or `encoder_times` as the only
    one; None without a pre-encoder bias.
    firing_count: [F]. number: int64 scalar, which update this is, counted from 1. b_dec_m: None where β1 is 0.
    """
    db_dec = residual_sums.sum(0) * (2 / n)
    if of_encoder is not None:
        db_dec = db_dec - of_encoder.sum(0)
    move(b_dec, b_dec_v, tokens_since_fired, updates, db_dec, firing_count, n, rule, ok, number, b_dec_m)
