"""The native CPU backend of `jumprelu`, `encode` and `decode`: what `csrc/` computes, under the operators' names.

fp32 and bf16, accumulated in fp32; contracts and NaN policy as in `reference/`. Every index is checked as it is read:
ValueError.
"""

import torch
from torch import Tensor

_ops = torch.ops.gemmascope_cpu


def _fp32(t: Tensor) -> Tensor:
    return t.to(torch.float32).contiguous()


def jumprelu_forward(pre: Tensor, b_enc: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _ops.jumprelu(pre.contiguous(), _fp32(b_enc), threshold.contiguous())


def jumprelu_backward(
    grad_f: Tensor, grad_l0: Tensor, pre: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float
) -> tuple[Tensor, Tensor, Tensor]:
    dpre, db_enc, dthreshold = _ops.jumprelu_backward(
        grad_f.contiguous(), _fp32(grad_l0), pre.contiguous(), _fp32(b_enc), threshold.contiguous(), bandwidth
    )
    return dpre, db_enc.to(b_enc.dtype), dthreshold


def encode_forward(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _ops.encode(x, W_enc.T, _fp32(b_enc), threshold.contiguous())


def preactivations(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    """z [N, F] in fp32, to the bit what encoding compares with the thresholds."""
    return _ops.preactivations(x, W_enc.T, _fp32(b_enc))


def decode_forward(values: Tensor, indices: Tensor, offsets: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    return _ops.decode(_fp32(values), indices.contiguous(), offsets.contiguous(), W_dec.contiguous(), _fp32(b_dec))


def decode_backward(
    grad: Tensor, values: Tensor, indices: Tensor, offsets: Tensor, W_dec: Tensor, need_values: bool, need_W: bool
) -> tuple[Tensor | None, Tensor | None]:
    dvalues = dW_dec = None
    indices, offsets = indices.contiguous(), offsets.contiguous()
    if need_values:
        dvalues = _ops.decode_values_gradient(_fp32(grad), indices, offsets, W_dec.contiguous()).to(values.dtype)
    if need_W:
        order, starts = _ops.by_latent(indices, None, W_dec.shape[0])
        lengths = offsets[1:] - offsets[:-1]
        tokens = torch.arange(len(lengths), dtype=torch.int32, device=lengths.device).repeat_interleave(lengths)
        dW_dec = _ops.sum_rows(_fp32(values)[order], tokens[order], starts, _fp32(grad)).to(W_dec.dtype)
    return dvalues, dW_dec


def register_fakes() -> None:
    """What `torch.compile` needs to know of the operators' results."""
    fake = torch.library.register_fake

    @fake("gemmascope_cpu::jumprelu")
    def _(pre, b_enc, threshold):
        n, f = pre.shape
        return (
            torch.empty_like(pre),
            pre.new_empty(n, dtype=torch.float32),
            pre.new_empty(f, dtype=torch.int32),
        )

    @fake("gemmascope_cpu::jumprelu_backward")
    def _(grad_f, grad_l0, pre, b_enc, threshold, bandwidth):
        return torch.empty_like(pre), torch.empty_like(b_enc), torch.empty_like(threshold)

    @fake("gemmascope_cpu::encode")
    def _(x, W, b_enc, threshold):
        nnz = torch.library.get_ctx().new_dynamic_size()
        return (
            x.new_empty(nnz, dtype=torch.float32),
            x.new_empty(nnz, dtype=torch.int32),
            x.new_empty(x.shape[0] + 1, dtype=torch.int64),
        )

    @fake("gemmascope_cpu::preactivations")
    def _(x, W, b_enc):
        return x.new_empty(x.shape[0], W.shape[0], dtype=torch.float32)

    @fake("gemmascope_cpu::decode")
    def _(values, indices, offsets, W, b_dec):
        return W.new_empty(offsets.shape[0] - 1, W.shape[1])

    @fake("gemmascope_cpu::decode_values_gradient")
    def _(grad, indices, offsets, W):
        return grad.new_empty(indices.shape[0])

    @fake("gemmascope_cpu::by_latent")
    def _(latents, count, d_sae):
        return latents.new_empty(latents.shape[0], dtype=torch.int64), latents.new_empty(d_sae + 1, dtype=torch.int64)

    @fake("gemmascope_cpu::sum_rows")
    def _(coefficients, rows, offsets, table):
        return table.new_empty(offsets.shape[0] - 1, table.shape[1], dtype=torch.float32)
