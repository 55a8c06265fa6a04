"""The training loss as a differentiable scalar, its gradients formed on the entries: for one's own optimiser.

    loss = sparse_loss(sae, x, Loss(l0_coefficient=6e-4, bandwidth=1e-3))
    loss.backward()

Gradients add up over calls and can be clipped like any others. `SAETrainer` is faster: it never stores a gradient.
"""

import torch
from torch import Tensor

from .. import kernels
from ..checks import dtype_name
from ..saes import JumpReLUSAE
from .config import Loss
from .step import sparse_gradients


class _SparseLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W_enc, b_enc, W_dec, b_dec, threshold, pre_encoder_bias, loss, impl):
        x_centred = x - b_dec if pre_encoder_bias else x
        entries = kernels.encode_entries(x_centred, W_enc, b_enc, threshold, loss.bandwidth, impl=impl)
        out = sparse_gradients(impl, entries, x, W_enc.T, W_dec, b_dec, threshold, loss, pre_encoder_bias)
        dW_enc, dW_dec = kernels.weight_gradients(out.transposed, out.sums, out.residual, x_centred, impl=impl)
        ctx.save_for_backward(dW_enc.T, out.sums.db_enc, dW_dec, out.db_dec, out.sums.dthreshold)
        return out.loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return None, *(grad * gradient for gradient in ctx.saved_tensors), None, None, None


def sparse_loss(sae: JumpReLUSAE, x: Tensor, loss: Loss) -> Tensor:
    """The scalar ``loss`` of x [N, d_model], N ≥ 1, with gradients for the five parameters of ``sae``.

    x: fp32, on the SAE's device, divided by its input_scale; it gets no gradient. The SAE must be fp32 and store W_enc
    latent-major, as `JumpReLUSAE` does. Waits for the device once, to learn how many latents fire. Raises ValueError or
    TypeError for other inputs, and for a pre-activation loss, which only `loss_and_gradients` has.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
    if x.ndim != 2 or x.shape[1] != sae.d_model or x.shape[0] == 0:
        raise ValueError(f"x: expected shape [N ≥ 1, {sae.d_model}], got {list(x.shape)}")
    if x.dtype != sae.W_dec.dtype or x.dtype not in (torch.float32, torch.float64):
        found = " and ".join(dtype_name(t.dtype) for t in (x, sae.W_dec))
        raise TypeError(f"x: expected float32 for x and sae alike, got {found}")
    if x.requires_grad:
        raise ValueError("x: expected activations that need no gradient, got requires_grad=True")
    if loss.pre_act_coefficient:
        raise ValueError(
            f"loss.pre_act_coefficient: expected 0 (loss_and_gradients has it), got {loss.pre_act_coefficient}"
        )
    impl = kernels.choose(sae.impl, x.device, x.dtype).impl
    weights = (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.threshold)
    return _SparseLoss.apply(x, *weights, sae.pre_encoder_bias, loss, impl)
