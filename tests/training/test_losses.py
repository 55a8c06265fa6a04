"""The written gradients against the fp64 reference and against autograd through the module."""

import pytest
import torch

from gemmascope.kernels import reference
from gemmascope.saes import JumpReLUSAE
from gemmascope.training.config import Loss
from gemmascope.training.losses import frequency_penalty, l0_penalty, loss_and_gradients

BANDWIDTH, L0_COEFFICIENT = 0.3, 0.07
L0 = Loss(L0_COEFFICIENT, BANDWIDTH)


def make(dtype=torch.float64, pre_encoder_bias=True):
    generator = torch.Generator().manual_seed(4)
    sae = JumpReLUSAE(
        6, 11, pre_encoder_bias=pre_encoder_bias, threshold_init=0.2, generator=generator, dtype=dtype, impl="reference"
    )
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter))
        sae.threshold.clamp_(min=0.05)
    return sae, torch.randn(13, 6, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("pre_encoder_bias", [True, False])
def test_equals_the_reference(pre_encoder_bias):
    sae, x = make(pre_encoder_bias=pre_encoder_bias)
    p = reference.Parameters(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.threshold)
    p = reference.Parameters(*(t.detach().double() for t in p))
    forward = reference.sae_forward(x, p, pre_encoder_bias)
    expected = reference.sae_backward(x, p, forward, L0_COEFFICIENT, BANDWIDTH, pre_encoder_bias)

    out = loss_and_gradients(sae, x, L0)
    torch.testing.assert_close(out.loss, reference.sae_loss(x, forward, L0_COEFFICIENT))
    torch.testing.assert_close(out.residual, forward.x_hat - x)
    assert torch.equal(out.firing_count.long(), (forward.f != 0).sum(0))
    assert (reference.window(forward.z, p.threshold, BANDWIDTH).bool() & (forward.z < p.threshold)).any()
    for name, ours, exact in zip(p._fields, out.gradients, expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("pre_encoder_bias", [True, False])
def test_equals_autograd_through_the_module(pre_encoder_bias):
    sae, x = make(pre_encoder_bias=pre_encoder_bias)
    f, l0, _ = sae.jumprelu(x, BANDWIDTH)
    loss = ((sae.decode(f) - x).square().sum(1) + L0_COEFFICIENT * l0).mean()
    loss.backward()
    out = loss_and_gradients(sae, x, L0)
    torch.testing.assert_close(out.loss, loss.detach())
    for name, gradient in out.gradients._asdict().items():
        torch.testing.assert_close(gradient, getattr(sae, name).grad, msg=lambda text, name=name: f"{name}: {text}")


def test_the_encoder_gradient_is_stored_latent_major():
    sae, x = make(torch.float32)
    gradients = loss_and_gradients(sae, x, L0).gradients
    assert gradients.W_enc.stride() == sae.W_enc.stride() == (1, 6)


def test_an_empty_batch_has_no_loss():
    sae, x = make()
    with pytest.raises(ValueError, match="x: expected at least one token, got an empty batch"):
        loss_and_gradients(sae, x[:0], L0)


class Rectangle(torch.autograd.Function):
    """H(z − θ) with derivative K((z − θ)/ε)/ε, by θ with the opposite sign, by z only if asked."""

    @staticmethod
    def forward(ctx, z, theta, bandwidth, to_z):
        ctx.save_for_backward(z, theta)
        ctx.options = bandwidth, to_z
        return (z > theta).to(z.dtype)

    @staticmethod
    def backward(ctx, grad):
        (z, theta), (bandwidth, to_z) = ctx.saved_tensors, ctx.options
        slope = ((z - theta).abs() < bandwidth / 2) * grad / bandwidth
        return slope if to_z else None, -slope.sum(0), None, None


class JumpReLU(torch.autograd.Function):
    """z·H(z − θ): by z its own derivative H, plus (θ/ε)·K if asked; by θ −(θ/ε)·K."""

    @staticmethod
    def forward(ctx, z, theta, bandwidth, to_z):
        ctx.save_for_backward(z, theta)
        ctx.options = bandwidth, to_z
        return z * (z > theta)

    @staticmethod
    def backward(ctx, grad):
        (z, theta), (bandwidth, to_z) = ctx.saved_tensors, ctx.options
        slope = ((z - theta).abs() < bandwidth / 2) * theta / bandwidth * grad
        return grad * (z > theta) + (slope if to_z else 0), -slope.sum(0), None, None


def autograd_loss(sae, x, loss, dead):
    """The table of `Loss`, by automatic differentiation through the two straight-through functions."""
    n = len(x)
    z = ((x - sae.b_dec) if sae.pre_encoder_bias else x) @ sae.W_enc + sae.b_enc
    options = (sae.threshold, loss.bandwidth, loss.ste_to_z)
    fires, f = Rectangle.apply(z, *options), JumpReLU.apply(z, *options)
    l0 = fires.sum(1)
    if loss.l0_of == "batch":
        l0 = l0.mean()
    penalty = {
        "l0": lambda: loss.l0_coefficient * l0.mean(),
        "target_l0": lambda: loss.l0_coefficient * (l0 / loss.target_l0 - 1).square().mean(),
        "quadratic_l0": lambda: loss.l0_coefficient * (2 / loss.target_l0) * (l0 - loss.target_l0).square().mean(),
        "tanh": lambda: loss.l0_coefficient * torch.tanh(loss.tanh_scale * f).sum() / n,
    }[loss.sparsity]()
    if loss.frequency_scale:
        penalty = penalty + loss.l0_coefficient * fires.mean(0).square().sum() / loss.frequency_scale
    if loss.pre_act_coefficient:
        penalty = penalty + loss.pre_act_coefficient * torch.relu(sae.threshold - z)[:, dead].sum() / n
    return (f @ sae.W_dec + sae.b_dec - x).square().sum(1).mean() + penalty


LOSSES = {
    "l0": L0,
    "target": Loss(0.4, BANDWIDTH, sparsity="target_l0", target_l0=2.0),
    "target-batch": Loss(0.4, BANDWIDTH, sparsity="target_l0", target_l0=2.0, l0_of="batch"),
    "quadratic": Loss(0.1, BANDWIDTH, sparsity="quadratic_l0", target_l0=2.0),
    "frequency": Loss(0.2, BANDWIDTH, frequency_scale=0.1),
    "tanh": Loss(0.2, BANDWIDTH, sparsity="tanh"),
    "tanh-frequency": Loss(0.2, BANDWIDTH, sparsity="tanh", frequency_scale=0.3),
    "ste": Loss(0.2, BANDWIDTH, ste_to_z=True),
    "ste-all": Loss(0.2, BANDWIDTH, sparsity="quadratic_l0", target_l0=3.0, frequency_scale=0.1, ste_to_z=True),
    "pre-act": Loss(0.2, BANDWIDTH, sparsity="tanh", pre_act_coefficient=0.3),
    "pre-act-ste": Loss(0.2, BANDWIDTH, pre_act_coefficient=0.3, ste_to_z=True),
}


@pytest.mark.parametrize("pre_encoder_bias", [True, False])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_every_loss_equals_automatic_differentiation(loss, pre_encoder_bias):
    sae, x = make(pre_encoder_bias=pre_encoder_bias)
    dead = torch.arange(11) % 3 == 0
    expected = autograd_loss(sae, x, loss, dead)
    expected.backward()
    out = loss_and_gradients(sae, x, loss, dead)
    torch.testing.assert_close(out.loss, expected.detach())
    for name, gradient in out.gradients._asdict().items():
        torch.testing.assert_close(gradient, getattr(sae, name).grad, msg=lambda text, name=name: f"{name}: {text}")


def test_losses_by_hand():
    l0 = torch.tensor([1.0, 3.0])
    value, s = l0_penalty(Loss(0.5, 1.0), l0)
    assert (value.item(), s.tolist()) == (1.0, [0.25, 0.25])
    value, s = l0_penalty(Loss(0.5, 1.0, sparsity="target_l0", target_l0=2.0), l0)
    assert (value.item(), s.tolist()) == (0.125, [-0.125, 0.125])
    value, s = l0_penalty(Loss(0.5, 1.0, sparsity="target_l0", target_l0=2.0, l0_of="batch"), l0)
    assert (value.item(), s.tolist()) == (0.0, [0.0, 0.0])
    value, s = l0_penalty(Loss(0.5, 1.0, sparsity="quadratic_l0", target_l0=2.0), l0)
    assert (value.item(), s.tolist()) == (0.5, [-0.5, 0.5])
    assert frequency_penalty(Loss(0.5, 1.0, frequency_scale=0.25), torch.tensor([2, 1, 0]), 2).item() == 2.5
