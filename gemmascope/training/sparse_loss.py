"""The training loss as a differentiable scalar, its gradients formed on the entries: for one's own optimiser.

    loss = sparse_loss(sae, x, Loss(l0_coefficient=6e-4, bandwidth=1e-3))
    loss.backward()

Gradients add up over calls and can be clipped like any others. After the optimiser's step `JumpReLUSAE.project_` does
what the recipe does after each of its own. `SAETrainer` is faster: it never stores a gradient.
"""

import torch
from torch import Tensor

from .. import kernels
from ..autocast import without_autocast
from ..saes import JumpReLUSAE
from .config import Loss
from .losses import check_batch, penalty
from .step import sparse_pass


class _SparseLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W_enc, b_enc, W_dec, b_dec, threshold, pre_encoder_bias, loss, impl):
        threshold = threshold.clamp(min=0)
        centre = kernels.implementations.operator("centre", impl)
        centred = centre(x, b_dec if pre_encoder_bias else None, None, x.dtype)
        entries = kernels.encode_entries(centred.x, W_enc, b_enc, threshold, loss.bandwidth, impl=impl)
        tokens, out, transposed, sums = sparse_pass(impl, entries, x, centred, W_dec, b_dec, threshold, loss)
        dW_enc, dW_dec = kernels.weight_gradients(transposed, sums, out.residual, centred.x, impl=impl)
        db_dec = tokens.residual_sums.sum(0) * (2 / len(x))
        if pre_encoder_bias:
            db_dec = db_dec - kernels.encoder_times(W_enc.T, sums.db_enc, impl=impl)
        ctx.save_for_backward(dW_enc.T, sums.db_enc, dW_dec, db_dec, sums.dthreshold)
        return kernels.reference.conclusion.total_loss(
            penalty(loss), out.squared_error.mean(), out.l0, sums.firing_count, tokens.tanh_sums
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return None, *(grad * gradient for gradient in ctx.saved_tensors), None, None, None


@without_autocast
def sparse_loss(sae: JumpReLUSAE, x: Tensor, loss: Loss) -> Tensor:
    """The scalar ``loss`` of x [N, d_model], N ≥ 1, with gradients for the five parameters of ``sae``.

    x: of the SAE's dtype, fp32 or fp64, on its device, divided by its input_scale; it gets no gradient. The SAE must
    store W_enc latent-major, as `JumpReLUSAE` does. A θ below 0 counts as 0. Waits for the device once, to learn how
    many latents fire. Raises ValueError or TypeError for other inputs, and for a pre-activation loss, which only
    `loss_and_gradients` has.
    """
    check_batch(sae, x, loss)
    if x.requires_grad:
        raise ValueError("x: expected activations that need no gradient, got requires_grad=True")
    if loss.pre_act_coefficient:
        raise ValueError(
            f"loss.pre_act_coefficient: expected 0 (loss_and_gradients has it), got {loss.pre_act_coefficient}"
        )
    impl = kernels.choose(sae.impl, x.device, x.dtype).impl
    weights = (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.threshold)
    return _SparseLoss.apply(x, *weights, sae.pre_encoder_bias, loss, impl)
