"""ReLU with an L1 penalty: JumpReLU with thresholds of 0 that stay 0, whose λ·mean_n Σ_j f_nj is reported right."""

import math

import pytest
import torch

from gemmascope.saes import JumpReLUSAE
from gemmascope.training import SAETrainer, TrainConfig
from gemmascope.training.config import CLOSED_WINDOW, Loss
from gemmascope.training.losses import loss_and_gradients
from tests.training.test_step import (
    EVERYWHERE,
    LARGE,
    SIZES,
    data,
    distance,
    everything,
    needs_triton,
    rule,
    start,
    take,
)

L1 = Loss(0.15, CLOSED_WINDOW, sparsity="l1")


def relu_start(impl="reference", dtype=torch.float32, sizes=None):
    state = start(impl, dtype, sizes=sizes)
    with torch.no_grad():
        state.sae.threshold.zero_()
        state.sae.b_enc[:3] = -3.0  # never fire, never move
    return state


def autograd_loss(sae, x):
    f = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    return ((f @ sae.W_dec + sae.b_dec - x).square().sum(1) + L1.l0_coefficient * f.sum(1)).mean()


def test_gradients_equal_automatic_differentiation():
    sae, x = relu_start(dtype=torch.float64).sae, next(data(1)).double()
    expected = autograd_loss(sae, x)
    expected.backward()
    out = loss_and_gradients(sae, x, L1)
    torch.testing.assert_close(out.loss, expected.detach())
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        torch.testing.assert_close(getattr(out.gradients, name), getattr(sae, name).grad)
    assert not out.gradients.threshold.any()


def test_by_hand():
    """f = 2, x̂ = 2 and x = 3: ‖r‖² = 1, λ·f = ½; ∂L/∂f = 2·(−1) + ¼."""
    sae = JumpReLUSAE(1, 1, threshold_init=0.0, dtype=torch.float64)
    with torch.no_grad():
        for name, value in {"W_enc": 1, "W_dec": 1, "b_enc": -1}.items():
            getattr(sae, name).fill_(value)
    out = loss_and_gradients(sae, torch.tensor([[3.0]], dtype=torch.float64), Loss(0.25, sparsity="l1"))
    assert (out.loss.item(), out.l0.item(), out.gradients.b_enc.item()) == (1.5, 1, -1.75)


@pytest.mark.parametrize("route", ["sparse", "dense", "reference"])
def test_fifty_steps_in_fp64(route):
    found = []
    for each in (route, None):
        state = relu_start(dtype=torch.float64)
        v = {name: torch.zeros_like(getattr(state.sae, name)) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        for number, x in enumerate(data(50), start=1):
            if each is not None:
                take(each, state, x, L1, rule(True))
                continue
            state.sae.zero_grad()
            autograd_loss(state.sae, x.double()).backward()
            plain_step(state.sae, v, number, rule(True))
        found.append(everything(state))
        assert not state.sae.threshold.any()
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    ours, exact = ({name: each[name] for name in names} for each in found)
    assert max(distance(ours, exact).values()) < 1e-11


def plain_step(sae, v, number, how):
    with torch.no_grad():
        for name, moment in v.items():
            p = getattr(sae, name)
            g = p.grad
            if name == "W_dec":
                g = g - (g * p).sum(1, keepdim=True) * p
            moment.mul_(how.beta2).add_((1 - how.beta2) * g * g)
            p.sub_(how.learning_rate * g / ((moment / (1 - how.beta2**number)).sqrt() + how.eps))
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))


@pytest.mark.parametrize(("impl", "route"), EVERYWHERE)
def test_figures_and_thresholds(impl, route):
    """Loss and L0 are those of the formulas, and an entry is what fires; θ stays 0 to the bit."""
    sizes = SIZES.get(impl, LARGE)
    state, exact = relu_start(impl, sizes=sizes), relu_start(dtype=torch.float64, sizes=sizes)
    for x in data(3, sizes):
        found, expected = (take(each, of, x, L1, rule(True)) for each, of in ((route, state), ("reference", exact)))
        for name in ("loss", "squared_error", "l0"):
            assert getattr(found, name).item() == pytest.approx(getattr(expected, name).item(), rel=1e-5), name
        assert found.n_entries == round(found.l0.item() * len(x))
        assert expected.loss > expected.squared_error + 1e-3
    assert not state.sae.threshold.any()
    assert (state.updates, state.skipped) == (3, 0)


@needs_triton
@pytest.mark.parametrize("route", ["sparse", "dense"])
def test_a_penalty_too_steep_for_second_moments_is_withheld_everywhere(route):
    """Its value stays finite where hardly anything fires; its slope, which nothing else bounds, does not pass."""
    made = set()
    for impl in ("reference", "triton"):
        state = relu_start(impl, sizes=SIZES["triton"])
        x = next(data(1, SIZES["triton"]))
        figures = take(route, state, x, Loss(1e20, CLOSED_WINDOW, sparsity="l1"), rule(True))
        assert figures.loss.isfinite()
        made.add(figures.made.item())
    assert made == {0}


def recipe(**changes):
    return TrainConfig.short(**{"kind": "relu", "d_sae": 24, "steps": 200, "l0_coefficient": 0.05, **changes})


def rows(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator) * torch.arange(1, 7) + 1


def test_a_training_reports_its_loss_and_lowers_it():
    trained, found = SAETrainer(recipe(), rows(64)), []
    for seed in range(200):
        before = {name: value.detach().clone() for name, value in trained.sae.named_parameters()}
        trained.update(rows(16, seed))
        found.append(trained.report())
    x = rows(16, 199) / trained.sae.input_scale
    f = torch.relu((x - before["b_dec"]) @ before["W_enc"] + before["b_enc"])
    x_hat = f @ before["W_dec"] + before["b_dec"]
    loss = ((x - x_hat).square().sum(1) + found[-1]["l0_coefficient"] * f.sum(1)).mean()
    assert found[-1]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert found[-1]["l0"] == (f > 0).sum(1).float().mean()
    assert (found[-1]["window"], found[-1]["threshold"], found[-1]["skipped"]) == (0, 0, 0)
    assert found[-1]["fvu"] < 0.3 * found[0]["fvu"]
    assert found[-1]["l0"] < 0.9 * found[0]["l0"]


def test_what_is_saved_by_hand_says_what_it_is(tmp_path):
    given = {"site": "model.layers.0.output", "kind": "jumprelu"}
    sae = SAETrainer(recipe(), rows(64), metadata=given).sae
    assert sae.kind == "relu"
    sae.save(tmp_path / "as_it_is")
    sae.released().save(tmp_path / "folded")
    for name in ("as_it_is", "folded"):
        found = JumpReLUSAE.load(tmp_path / name)
        assert (found.kind, found.metadata["site"]) == ("relu", given["site"])
    assert given["kind"] == "jumprelu"
    assert SAETrainer(TrainConfig.short(d_sae=24), rows(64), metadata={}).sae.metadata == {}


def test_it_goes_on_from_a_relu_sae_alone():
    other = JumpReLUSAE(6, 24, threshold_init=0.0)
    begun = SAETrainer(recipe(), rows(64), init_from=other).sae
    torch.testing.assert_close(begun(rows(9)), other(rows(9)), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        other.threshold[3] = math.sqrt(2)
    with pytest.raises(ValueError, match="init_from: expected thresholds of 0 with kind='relu', got one of"):
        SAETrainer(recipe(), rows(64), init_from=other)
