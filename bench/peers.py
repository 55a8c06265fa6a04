"""The training steps that ours is measured against, as their users run them."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from gemmascope.kernels.training import Rule
from gemmascope.losses import Loss
from gemmascope.sae import JumpReLUSAE


class JumpReLU(torch.autograd.Function):
    """z·1[z > θ] with the straight-through gradient of θ, as dense PyTorch has it (arXiv 2407.14435, equation 11)."""

    @staticmethod
    def forward(ctx, z, threshold, bandwidth):
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return z * (z > threshold)

    @staticmethod
    def backward(ctx, u):
        z, threshold = ctx.saved_tensors
        window = (z - threshold).abs() < ctx.bandwidth / 2
        return u * (z > threshold), (-(threshold / ctx.bandwidth) * window * u).sum(0), None


class Step(torch.autograd.Function):
    """1[z > θ] (equation 12)."""

    @staticmethod
    def forward(ctx, z, threshold, bandwidth):
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx, u):
        z, threshold = ctx.saved_tensors
        window = (z - threshold).abs() < ctx.bandwidth / 2
        return None, (-(1 / ctx.bandwidth) * window * u).sum(0), None


def plain_loss(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, log_threshold: Tensor, loss: Loss
) -> Tensor:
    threshold = log_threshold.exp()
    z = (x - b_dec) @ W_enc + b_enc
    x_hat = JumpReLU.apply(z, threshold, loss.bandwidth) @ W_dec + b_dec
    l0 = Step.apply(z, threshold, loss.bandwidth).sum(1)
    return (x_hat - x).square().sum(1).mean() + loss.coefficient * l0.mean()


def project(gradient: Tensor, W_dec: Tensor) -> None:
    gradient -= (gradient * W_dec).sum(1, keepdim=True) * W_dec


def renormalise(W_dec: Tensor) -> None:
    W_dec /= W_dec.norm(dim=1, keepdim=True)


def plain_parameters(sae: JumpReLUSAE) -> list[Tensor]:
    """The SAE's own, but the logarithm of its threshold."""
    return [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, torch.nn.Parameter(sae.threshold.detach().log())]


def plain_step(
    parameters: list[Tensor], x: Tensor, loss: Loss, rule: Rule, autocast: bool = True, compiled: bool = False
) -> Callable[[], None]:
    """The step of dense PyTorch: autograd, projection of the decoder's gradient, fused Adam, renormalisation."""
    W_dec = parameters[2]
    optimiser = torch.optim.Adam(parameters, lr=rule.learning_rate, betas=(0.0, rule.beta2), eps=rule.eps, fused=True)
    parts = [plain_loss, project, renormalise]
    if compiled:
        torch.compiler.reset()  # the limit on recompilations is not for a benchmark of many shapes
    loss_of, project_, renormalise_ = [torch.compile(part, dynamic=False) for part in parts] if compiled else parts

    def step() -> None:
        optimiser.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            total = loss_of(x, *parameters, loss)
        total.backward()
        with torch.no_grad():
            project_(W_dec.grad, W_dec)
            optimiser.step()
            renormalise_(W_dec)

    return step


def saelens_step(sae: JumpReLUSAE, x: Tensor, rule: Rule, autocast: bool) -> Callable[[], None]:
    """SAELens' step as its trainer makes it: loss, firing counts, backward, clipping, Adam; its loss and defaults."""
    from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    config = JumpReLUTrainingSAEConfig(d_in=sae.d_model, d_sae=sae.d_sae, device=str(x.device))
    theirs = JumpReLUTrainingSAE(config).to(x.device)
    with torch.no_grad():
        for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"):
            getattr(theirs, name).copy_(getattr(sae, name))
    values = {"sae_in": x, "coefficients": {"l0": config.l0_coefficient}, "dead_neuron_mask": None}
    values |= {"n_training_steps": 0, "is_logging_step": False}
    given = {field.name for field in dataclasses.fields(TrainStepInput)}  # versions differ in the last two
    inputs = TrainStepInput(**{name: value for name, value in values.items() if name in given})
    optimiser = torch.optim.Adam(theirs.parameters(), lr=rule.learning_rate)
    since_fired = torch.zeros(sae.d_sae, device=x.device)

    def step() -> None:
        optimiser.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            out = theirs.training_forward_pass(inputs)
        with torch.no_grad():
            fired = (out.feature_acts > 0).float().sum(0) > 0
            since_fired.add_(1).masked_fill_(fired, 0)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimiser.step()

    return step
