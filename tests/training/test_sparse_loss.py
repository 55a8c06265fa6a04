"""The differentiable loss: its gradients, any optimiser, accumulation and clipping, and its messages."""

import copy

import pytest
import torch

from gemmascope.kernels import api
from gemmascope.saes import JumpReLUSAE
from gemmascope.training.config import Loss
from gemmascope.training.losses import loss_and_gradients
from gemmascope.training.sparse_loss import sparse_loss
from tests.kernels.native import needs_native
from tests.training.test_step import DEVICE, FAST_LOSSES, LARGE, NAMES, SMALL, data, needs_triton, start


def gradients(sae):
    return {name: getattr(sae, name).grad for name in NAMES}


@pytest.mark.parametrize("pre_encoder_bias", [True, False])
@pytest.mark.parametrize("loss", FAST_LOSSES.values(), ids=FAST_LOSSES)
def test_gradients_are_the_written_ones(loss, pre_encoder_bias):
    sae = start(dtype=torch.float64, pre_encoder_bias=pre_encoder_bias).sae
    x = next(data(1)).double()
    value = sparse_loss(sae, x, loss)
    value.backward()
    expected = loss_and_gradients(sae, x, loss)
    torch.testing.assert_close(value.detach(), expected.loss)
    for name, gradient in gradients(sae).items():
        torch.testing.assert_close(gradient, getattr(expected.gradients, name), msg=name)


@needs_triton
@pytest.mark.parametrize("first_room", [1, 128], ids=["grows", "fits"])
def test_the_kernels(monkeypatch, first_room):
    monkeypatch.setattr(api, "FIRST_ROOM", first_room)
    loss, x = FAST_LOSSES["ste-all"], next(data(1, SMALL))
    sae, exact = start("triton").sae, start(dtype=torch.float64, sizes=SMALL).sae
    eager = start(sizes=SMALL).sae
    sparse_loss(sae, x.to(DEVICE), loss).backward()
    expected = loss_and_gradients(exact, x.double(), loss).gradients
    allowed = loss_and_gradients(eager, x, loss).gradients
    for name, gradient in gradients(sae).items():
        target = getattr(expected, name)
        error, of_eager = ((g.cpu() - target).norm() / target.norm() for g in (gradient, getattr(allowed, name)))
        assert error <= 2 * of_eager + torch.finfo(torch.float32).eps, name


def test_gradients_add_up_and_scale():
    sae, loss = start(dtype=torch.float64).sae, FAST_LOSSES["l0"]
    first, second = (x.double() for x in data(2))
    (0.5 * sparse_loss(sae, first, loss)).backward()
    (2 * sparse_loss(sae, second, loss)).backward()
    parts = [loss_and_gradients(sae, x, loss).gradients for x in (first, second)]
    for name, gradient in gradients(sae).items():
        torch.testing.assert_close(gradient, 0.5 * getattr(parts[0], name) + 2 * getattr(parts[1], name))


@pytest.mark.parametrize("impl", ["reference", "pytorch", pytest.param("cpu", marks=needs_native)])
def test_thresholds_that_an_optimiser_takes_below_zero(impl, tmp_path):
    """They count as 0 and their gradients arrive; whatever comes out can be saved, to the same function."""
    generator = torch.Generator().manual_seed(0)
    sae, loss = JumpReLUSAE(10, 37, impl=impl, threshold_init=0.01, generator=generator), Loss(1e-4, 0.05)
    twin = copy.deepcopy(sae)
    optimiser, other = (torch.optim.Adam(each.parameters(), lr=3e-3) for each in (sae, twin))
    for x in data(100, LARGE._replace(n=80)):
        for each, steps in ((sae, optimiser), (twin, other)):
            steps.zero_grad()
            sparse_loss(each, x, loss).backward()
            steps.step()
        twin.project_()
        twin_rows = twin.W_dec.norm(dim=1)
        assert twin.threshold.min() >= 0
        torch.testing.assert_close(twin_rows, torch.ones_like(twin_rows))
    below = sae.threshold < 0
    assert below.any()
    assert sae.encode(x).min() == 0
    exact = copy.deepcopy(sae)
    with torch.no_grad():
        exact.threshold.clamp_(min=0)
    values = [sparse_loss(each, x, loss) for each in (sae, exact)]
    assert values[0] == values[1]
    for each, value in zip((sae, exact), values, strict=True):
        each.zero_grad()
        value.backward()
    assert torch.equal(sae.threshold.grad, exact.threshold.grad)
    assert sae.threshold.grad[below].any()
    written = loss_and_gradients(sae, x, loss).gradients, loss_and_gradients(exact, x, loss).gradients
    assert all(map(torch.equal, *written))
    sae.fold().save(tmp_path / "params.npz")
    assert torch.equal(JumpReLUSAE.load(tmp_path / "params.npz")(x), sae.fold()(x))


def test_any_optimiser_and_clipping():
    sae, loss = start().sae, Loss(1e-3, 0.05)
    optimiser = torch.optim.AdamW(sae.parameters(), lr=3e-3)
    batches = list(data(60, LARGE._replace(n=80)))
    values = []
    for x in batches:
        optimiser.zero_grad()
        value = sparse_loss(sae, x, loss)
        value.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 0.5)
        norm = torch.cat([g.flatten() for g in gradients(sae).values()]).norm()
        assert norm <= 0.5 * (1 + 1e-5)
        optimiser.step()
        values.append(value.item())
    assert sum(values[-10:]) < 0.9 * sum(values[:10])


def test_activations_that_ask_for_a_gradient():
    with pytest.raises(ValueError, match=r"^x: expected activations that need no gradient, got requires_grad"):
        sparse_loss(start().sae, next(data(1)).requires_grad_(), FAST_LOSSES["l0"])


def test_losses_it_does_not_have():
    with pytest.raises(ValueError, match=r"^loss.pre_act_coefficient: expected 0 .*, got 0.3$"):
        sparse_loss(start().sae, next(data(1)), Loss(0.1, 0.1, pre_act_coefficient=0.3))
    with pytest.raises(ValueError, match=r"^bandwidth: expected a finite number > 0, got 0$"):
        sparse_loss(start().sae, next(data(1)), Loss(0.1, 0))
