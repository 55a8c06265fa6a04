"""The written gradients against the fp64 reference and against autograd through the module."""

import pytest
import torch

from gemmascope.kernels import reference
from gemmascope.losses import loss_and_gradients
from gemmascope.sae import JumpReLUSAE

BANDWIDTH, L0_COEFFICIENT = 0.3, 0.07


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

    out = loss_and_gradients(sae, x, L0_COEFFICIENT, BANDWIDTH)
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
    out = loss_and_gradients(sae, x, L0_COEFFICIENT, BANDWIDTH)
    torch.testing.assert_close(out.loss, loss.detach())
    for name, gradient in out.gradients._asdict().items():
        torch.testing.assert_close(gradient, getattr(sae, name).grad, msg=lambda text, name=name: f"{name}: {text}")


def test_the_encoder_gradient_is_stored_latent_major():
    sae, x = make(torch.float32)
    gradients = loss_and_gradients(sae, x, L0_COEFFICIENT, BANDWIDTH).gradients
    assert gradients.W_enc.stride() == sae.W_enc.stride() == (1, 6)


def test_an_empty_batch_has_no_loss():
    sae, x = make()
    with pytest.raises(ValueError, match="x: expected at least one token, got an empty batch"):
        loss_and_gradients(sae, x[:0], L0_COEFFICIENT, BANDWIDTH)
