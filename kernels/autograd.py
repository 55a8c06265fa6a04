"""The autograd glue of the operators, one Function for all implementations.

`implementations.py` says what an implementation consists of.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .implementations import operator


def _output(value: Tensor) -> Tensor:
    """What `forward` returns. To Dynamo of torch 2.11 a conversion to the dtype that a tensor has is a second tensor in
    the place of the first, and when it is the last operation the gradient goes to the wrong one: all zeros come out,
    without a word. A view is a tensor of its own."""
    return value.view_as(value) if torch.compiler.is_compiling() else value


class JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pre: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float, impl: str):
        f, l0, firing_count = operator("jumprelu_forward", impl)(pre, b_enc, threshold)
        ctx.save_for_backward(pre, b_enc, threshold)
        ctx.bandwidth, ctx.impl = bandwidth, impl
        ctx.mark_non_differentiable(firing_count)
        return _output(f), _output(l0), firing_count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_f: Tensor, grad_l0: Tensor, _):
        pre, b_enc, threshold = ctx.saved_tensors
        backward = operator("jumprelu_backward", ctx.impl)
        dpre, db_enc, dthreshold = backward(grad_f, grad_l0, pre, b_enc, threshold, ctx.bandwidth)
        return dpre, db_enc, dthreshold, None, None


class PreActivations(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, W_enc: Tensor, b_enc: Tensor, impl: str):
        ctx.save_for_backward(x, W_enc)
        ctx.bias_dtype = b_enc.dtype
        return _output(operator("preactivations", impl)(x, W_enc, b_enc))

    @staticmethod
    @once_differentiable
    def backward(ctx, dz: Tensor):
        x, W_enc = ctx.saved_tensors
        need_x, need_W, need_b, _ = ctx.needs_input_grad
        with torch.autocast(dz.device.type, enabled=False):
            operand = dz.to(x.dtype)
            dx = operand @ W_enc.T if need_x else None
            dW_enc = (operand.T @ x).T if need_W else None  # latent-major, as the weight is stored
        return dx, dW_enc, dz.sum(0).to(ctx.bias_dtype) if need_b else None, None


class Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, indices: Tensor, offsets: Tensor, W_dec: Tensor, b_dec: Tensor, impl: str):
        ctx.save_for_backward(values, indices, offsets, W_dec, b_dec)
        ctx.impl = impl
        return _output(operator("decode_forward", impl)(values, indices, offsets, W_dec, b_dec))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        values, indices, offsets, W_dec, b_dec = ctx.saved_tensors
        need_values, _, _, need_W, need_b, _ = ctx.needs_input_grad
        backward = operator("decode_backward", ctx.impl)
        dvalues, dW_dec = backward(grad, values, indices, offsets, W_dec, need_values, need_W)
        db_dec = grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(b_dec.dtype) if need_b else None
        return dvalues, None, None, dW_dec, db_dec, None
