"""The native CPU backend of the training step; each operator has its counterpart in `reference_training.py`.

The sparse route runs in `csrc/` as a whole. The dense route has z from there too, so that both routes agree on which
latents fire; the other products of whole matrices are PyTorch's, what is elementwise is one pass forward and one
backward. fp32 or bf16 operands, accumulated in fp32.
"""

import torch
from torch import Tensor

from ..entries import ByLatent, DenseCode, Entries, LatentState, LatentSums, Objective, Residual, Rule
from ..reference.training import settle as settle
from .inference import preactivations

_ops = torch.ops.gemmascope_cpu


def _numbers(values: Rule | Objective) -> list:
    """Numbers that may come as tensors."""
    return [float(value.detach()) if isinstance(value, Tensor) else value for value in values]


def encode_entries(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    bandwidth: float,
    capacity: int | None,
    tf32: bool = False,
) -> Entries:
    """As `reference_training.encode_entries`; tf32 changes nothing on a CPU."""
    found = _ops.encode_entries(x, W_enc.T, b_enc.float().contiguous(), threshold.contiguous(), bandwidth, capacity)
    return Entries(*found)


def residual_pass(entries: Entries, x: Tensor, W_dec: Tensor, b_dec: Tensor) -> Residual:
    out = _ops.residual_pass(
        entries.z,
        entries.latents,
        entries.offsets,
        x.float().contiguous(),
        W_dec.contiguous(),
        b_dec.float().contiguous(),
    )
    return Residual(*out)


def by_latent(entries: Entries, d_sae: int) -> ByLatent:
    nnz = min(int(entries.offsets[-1]), entries.latents.shape[0])
    return ByLatent(*_ops.by_latent(entries.latents, nnz, d_sae))


def latent_pass(
    entries: Entries, u: Tensor, transposed: ByLatent, threshold: Tensor, s: Tensor, objective: Objective
) -> LatentSums:
    dec, dz, tokens, db_enc, dthreshold, along, count = _ops.latent_pass(
        entries.z,
        entries.latents,
        entries.tokens,
        u.contiguous(),
        *transposed,
        threshold.contiguous(),
        s.float().contiguous(),
        *_numbers(objective),
    )
    return LatentSums(dec, dz, tokens, db_enc, dthreshold, along, count)


def weight_gradients(
    transposed: ByLatent, sums: LatentSums, residual: Tensor, x_centred: Tensor
) -> tuple[Tensor, Tensor]:
    offsets = transposed.offsets
    return (
        _ops.sum_rows(sums.dz, sums.tokens, offsets, x_centred.contiguous()),
        _ops.sum_rows(sums.dec, sums.tokens, offsets, residual.contiguous()),
    )


def encoder_times(W_enc: Tensor, db_enc: Tensor) -> Tensor:
    return _ops.weighted_sum(W_enc.contiguous(), db_enc.contiguous())


def encoder_parts(W_enc: Tensor, db_enc: Tensor) -> Tensor:
    return encoder_times(W_enc, db_enc)[None]


def _state(state: LatentState) -> list[Tensor]:
    none = state.W_enc.new_empty(0)
    return [none if t is None else t for t in state]


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
    if not ok:
        return
    _ops.update_from_entries(
        _state(state),
        transposed.offsets,
        sums.dz,
        sums.dec,
        sums.tokens,
        sums.along,
        sums.db_enc,
        sums.dthreshold,
        residual.contiguous(),
        x_centred.contiguous(),
        *_numbers(rule),
        int(step) + 1,
    )


def dense_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float, tf32: bool = False
) -> DenseCode:
    """active and window as bits."""
    low = x.dtype == torch.bfloat16
    z = preactivations(x, W_enc, b_enc)
    return DenseCode(*_ops.dense_gate(z, threshold.contiguous(), bandwidth, low))


def dense_backward(
    u: Tensor, code: DenseCode, threshold: Tensor, s: Tensor, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    db_enc, dthreshold = _ops.dense_backward(
        u,
        code.f,
        code.active,
        code.window,
        code.firing_count,
        threshold.contiguous(),
        s.float().contiguous(),
        *_numbers(objective),
    )
    return u, db_enc, dthreshold


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
    if not ok:
        return
    _ops.update_from_dense(
        _state(state),
        dW_enc.float().contiguous(),
        dW_dec.float().contiguous(),
        db_enc,
        dthreshold,
        touched,
        *_numbers(rule),
        int(step) + 1,
    )
