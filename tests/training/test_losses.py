"""The written gradients against the fp64 reference and against autograd through the module."""

import math

import pytest
import torch

from gemmascope.kernels import reference
from gemmascope.saes import JumpReLUSAE
from gemmascope.training.config import Loss
from gemmascope.training.losses import frequency_penalty, l0_penalty, loss_and_gradients
from gemmascope.training.sparse_loss import sparse_loss

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


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda sae, x: (None, x, L0), TypeError, "sae: expected a JumpReLUSAE, got NoneType"),
        (lambda sae, x: (sae.bfloat16(), x, L0), TypeError, "sae: expected float32 or float64, got bfloat16"),
        (lambda sae, x: (sae, [1.0], L0), TypeError, "x: expected a torch.Tensor, got list"),
        (lambda sae, x: (sae, x[:0], L0), ValueError, "x: expected shape [N ≥ 1, 6], got [0, 6]"),
        (lambda sae, x: (sae, x[:, :1], L0), ValueError, "x: expected shape [N ≥ 1, 6], got [13, 1]"),
        (lambda sae, x: (sae, x[None], L0), ValueError, "x: expected shape [N ≥ 1, 6], got [1, 13, 6]"),
        (lambda sae, x: (sae, x.half(), L0), TypeError, "x: expected dtype float64, got float16"),
        (lambda sae, x: (sae, x.to("meta"), L0), ValueError, "x: expected device cpu, got meta"),
        (lambda sae, x: (sae, x, 0.1), TypeError, "loss: expected a Loss, got float"),
        (
            lambda sae, x: (sae, x, Loss(sparsity="target_l0", target_l0=12)),
            ValueError,
            "target_l0: expected at most d_sae = 11, got 12",
        ),
    ],
)
@pytest.mark.parametrize("function", [loss_and_gradients, sparse_loss], ids=lambda function: function.__name__)
def test_messages(function, change, error, message):
    with pytest.raises(error) as caught:
        function(*change(*make()))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("dead", "error", "message"),
    [
        (torch.zeros(11), TypeError, "dead: expected dtype bool, got float32"),
        (torch.zeros(4, dtype=torch.bool), ValueError, r"dead: expected shape \[11\], got \[4\]"),
    ],
)
def test_bad_masks_of_dead_latents(dead, error, message):
    with pytest.raises(error, match=message):
        loss_and_gradients(*make(), LOSSES["pre-act"], dead)


def test_the_slope_of_tanh_does_not_cancel():
    """1 − tanh² would be 0 in fp32 from tanh = 1 − 2⁻²⁵ on, where the slope is 6e-8."""
    loss, found = Loss(0.5, BANDWIDTH, sparsity="tanh", tanh_scale=8.0), []
    for dtype in (torch.float32, torch.float64):
        sae = JumpReLUSAE(1, 1, pre_encoder_bias=False, dtype=dtype)
        with torch.no_grad():
            for name, value in {"W_enc": 1.0, "W_dec": 1.0, "threshold": 0.5}.items():
                getattr(sae, name).fill_(value)
        x = torch.tensor([[1.25]], dtype=dtype)  # reconstructed exactly, so that the penalty's is the whole gradient
        found.append(loss_and_gradients(sae, x, loss).gradients.b_enc.item())
    assert found[1] == pytest.approx(0.5 * 8 / math.cosh(10) ** 2, rel=1e-12)
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def bound_by_entries(sae, x, loss, gradients):
    """The largest element of the gradients of the latents, and of θ·dθ."""
    tensors = [gradients.W_enc, gradients.W_dec, gradients.b_enc, gradients.threshold]
    return max(t.abs().max() for t in [*tensors, sae.threshold.detach() * gradients.threshold])


@pytest.mark.parametrize("loss", range(12))
def test_no_gradient_exceeds_the_bound(loss):
    loss = list(LOSSES.values())[loss]
    for seed in range(20):
        sae, x = make()
        with torch.no_grad():
            sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
        generator = torch.Generator().manual_seed(seed)
        x = x * 10 ** (3 * torch.randn(len(x), 1, generator=generator, dtype=x.dtype))
        out = loss_and_gradients(sae, x, loss, torch.arange(11) % 3 == 0)
        largest = bound_by_entries(sae, x, loss, out.gradients)
        assert largest <= out.bound
        assert out.bound < 1e4 * max(1, largest)  # and it is not met by being absurd


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
        "l1": lambda: loss.l0_coefficient * f.sum() / n,
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
    "l1": Loss(0.2, BANDWIDTH, sparsity="l1"),
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
