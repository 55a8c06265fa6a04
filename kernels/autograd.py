"""The autograd glue of the operators, one Function for all implementations.

An implementation is a module with `jumprelu_forward`, `jumprelu_backward`, `encode_forward`, `decode_forward`,
`decode_backward`; `reference.py`, `_pytorch.py` and `_cpu.py` have all of them, each Triton operator file has its own.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def operator(name: str, impl: str):
    """The module that implements operator ``name``.

    Operator files begin with an underscore: importing a submodule binds it in the package under its own name, and
    `gemmascope.kernels.jumprelu` is the public function.
    """
    if impl == "reference":
        from . import reference

        return reference
    if impl == "pytorch":
        from . import _pytorch

        return _pytorch
    if impl == "cpu":
        from . import _cpu

        return _cpu
    if name == "jumprelu":
        from . import _jumprelu

        return _jumprelu
    if name == "encode":
        from . import _encode

        return _encode
    from . import _decode

    return _decode


class JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pre: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float, impl: str):
        f, l0, firing_count = operator("jumprelu", impl).jumprelu_forward(pre, b_enc, threshold)
        ctx.save_for_backward(pre, b_enc, threshold)
        ctx.bandwidth, ctx.impl = bandwidth, impl
        ctx.mark_non_differentiable(firing_count)
        return f, l0, firing_count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_f: Tensor, grad_l0: Tensor, _):
        pre, b_enc, threshold = ctx.saved_tensors
        backward = operator("jumprelu", ctx.impl).jumprelu_backward
        dpre, db_enc, dthreshold = backward(grad_f, grad_l0, pre, b_enc, threshold, ctx.bandwidth)
        return dpre, db_enc, dthreshold, None, None


class Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, indices: Tensor, offsets: Tensor, W_dec: Tensor, b_dec: Tensor, impl: str):
        ctx.save_for_backward(values, indices, offsets, W_dec, b_dec)
        ctx.impl = impl
        return operator("decode", impl).decode_forward(values, indices, offsets, W_dec, b_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        values, indices, offsets, W_dec, b_dec = ctx.saved_tensors
        need_values, _, _, need_W, need_b, _ = ctx.needs_input_grad
        backward = operator("decode", ctx.impl).decode_backward
        dvalues, dW_dec = backward(grad, values, indices, offsets, W_dec, need_values, need_W)
        db_dec = grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(b_dec.dtype) if need_b else None
        return dvalues, None, None, dW_dec, db_dec, None
