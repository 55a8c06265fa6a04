"""Thresholds that begin so high that the first reconstruction is not many times its input."""

import math

import pytest
import torch

from gemmascope import JumpReLUSAE, TrainConfig
from gemmascope.training import SAETrainer
from gemmascope.training.start import first_threshold

D = 64


def rows(n: int, offset: float = 3.0) -> torch.Tensor:
    """Far from isotropic, far from 0."""
    x = torch.randn(n, D, generator=torch.Generator().manual_seed(1)) * torch.logspace(-1, 1, D)
    return x + offset


def gain(trainer: SAETrainer, x: torch.Tensor) -> float:
    """The component of the reconstruction along the input, both less b_dec, as a share of the input."""
    sae = trainer.sae
    with torch.no_grad():
        x, x_hat = x / sae.input_scale - sae.b_dec, sae(x) / sae.input_scale - sae.b_dec
        return ((x * x_hat).sum() / x.square().sum()).item()


def first(trainer: SAETrainer) -> float:
    (only,) = trainer.state.threshold.unique().tolist()
    return only


def config(**changes) -> TrainConfig:
    return TrainConfig.small(**{"d_sae": 4096, **changes})


@pytest.mark.parametrize("overshoot", [1.0, 3.0, 10.0])
def test_the_first_reconstruction_is_so_many_times_its_input(overshoot):
    # Each token of norm 1, so that its own share is that of the mean. In few dimensions unit vectors have less in their
    # tails than the normal distribution: 512 here.
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(1))
    x = torch.cat([x, -x]) / torch.cat([x, x]).norm(dim=1, keepdim=True)
    trainer = SAETrainer(config(d_sae=16384, overshoot=overshoot), x)
    assert gain(trainer, x) == pytest.approx(overshoot, rel=0.06)
    assert gain(SAETrainer(config(d_sae=16384, overshoot=None), x), x) == pytest.approx(16, rel=0.06)


def test_the_norm_is_that_of_what_the_encoder_sees():
    x = rows(500)
    about_mean = SAETrainer(config(overshoot=1.0), x)
    about_zero = SAETrainer(config(overshoot=1.0, b_dec_init="zeros", scale_by="mean_square"), x)
    theta = first(about_mean)
    assert theta > 0.1
    # Both have inputs of mean squared norm 1 in their own units.
    assert first(about_zero) == pytest.approx(theta, rel=1e-5)
    about_zero = SAETrainer(config(overshoot=1.0, b_dec_init="mean", scale_by="mean_square"), x)
    share = x.var(0, correction=0).sum() / x.square().sum(1).mean()
    assert first(about_zero) == pytest.approx(theta * share.sqrt().item(), rel=1e-4)


@pytest.mark.parametrize(("d_sae", "overshoot"), [(2 * D, 1.0), (384, 3.0), (4096, None), (4096, 32.0)])
def test_what_is_no_longer_than_that_begins_at_threshold_init(d_sae, overshoot):
    trainer = SAETrainer(config(d_sae=d_sae, overshoot=overshoot), rows(100))
    assert first(trainer) == pytest.approx(0.01)


def test_a_higher_threshold_init_stays():
    assert first(SAETrainer(config(threshold_init=0.9), rows(100))) == pytest.approx(0.9)


@pytest.mark.parametrize("share", [0.4999, 0.3, 0.04, 1e-6, 1e-30])
def test_the_expectation_over_what_fires(share):
    # By the trapezoidal rule: E[u²; u > t] of a standard normal u.
    given = config(overshoot=share * 4096 / D, threshold_init=1e-9)
    t = first_threshold(given, torch.zeros(D), 1.0, 1.0) * math.sqrt(D)
    u = torch.linspace(t, t + 14, 2_000_001, dtype=torch.float64)
    density = torch.exp(-u.square() / 2) / math.sqrt(2 * math.pi)
    assert torch.trapezoid(u.square() * density, u).item() == pytest.approx(share, rel=1e-5)


def test_transcoders_and_saes_to_go_on_from_begin_as_they_did():
    x = rows(200)
    transcoder = SAETrainer(config(), x, target=x.flip(1))
    assert first(transcoder) == pytest.approx(0.01)
    sae = JumpReLUSAE(D, 4096, threshold_init=0.3)
    trainer = SAETrainer(config(), x, init_from=sae)
    torch.testing.assert_close(trainer.sae(x[:8]), sae(x[:8]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["relu", "gated", "topk"])
def test_other_kinds_have_nothing_of_it(kind):
    k = {"k": 4} if kind == "topk" else {}
    with_it, without = (SAETrainer(config(kind=kind, overshoot=o, **k), rows(50)).sae for o in (1.0, None))
    for a, b in zip(with_it.parameters(), without.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("overshoot", [0.0, -1.0, math.nan, math.inf, "3"])
def test_bad_values(overshoot):
    with pytest.raises((ValueError, TypeError), match="overshoot: expected"):
        config(overshoot=overshoot)
