"""When L0 no longer answers to λ: from trainings in which it does, does not and is not yet to."""

import itertools
import math

import pytest
import torch

from gemmascope.activations import batches
from gemmascope.sites import Site
from gemmascope.training.config import TrainConfig
from gemmascope.training.saturation import History, saturated
from gemmascope.training.trainer import SAETrainer

A = Site(0, "resid")
STEPS = 240
TARGET = {"sparsity": "quadratic_l0", "target_l0": 5, "l0_of": "batch", "l0_coefficient": 0.02}
LONG_WARM_UP = {"l0_coefficient": 8e-3, "l0_warmup_steps": 220, "lr_decay_steps": 20}
RUNS = {
    "healthy": TARGET | {"bandwidth": 0.05},
    "saturated": TARGET | {"bandwidth": 1e-6},
    "healthy l0": LONG_WARM_UP | {"bandwidth": 0.05},
    "saturated l0": LONG_WARM_UP | {"bandwidth": 1e-6},
    "weak": TARGET | {"l0_coefficient": 1e-5, "bandwidth": 0.05},
}


def activations(n=4000, d=16, k=60):
    generator = torch.Generator().manual_seed(0)
    dictionary = torch.randn(k, d, generator=generator)
    dictionary /= dictionary.norm(dim=1, keepdim=True)
    codes = torch.rand(n, k, generator=generator) * (torch.rand(n, k, generator=generator) < 0.06)
    return 3 * codes @ dictionary + 0.5 + 0.2 * torch.randn(n, d, generator=generator)


@pytest.fixture(scope="module")
def runs():
    rows, found = activations(), {}
    for name, changes in RUNS.items():
        settings = TrainConfig.short(d_sae=64, batch_size=128, steps=STEPS, scale_by="variance", **changes)
        trainer, found[name] = SAETrainer(settings, rows), []
        for i, batch in enumerate(batches({A: rows}, 128, STEPS, seed=0)):
            trainer.update(batch[A])
            if i % 4 == 3:
                found[name].append(trainer.report())
    return found


def said(rows):
    """{step: what was said at it}, with the rows up to it alone."""
    answers = {rows[i - 1]["step"]: saturated(rows[:i]) for i in range(1, len(rows) + 1)}
    return {step: answer for step, answer in answers.items() if answer is not None}


@pytest.mark.parametrize("name", ["healthy", "healthy l0", "weak"])
def test_nothing_is_said_while_it_answers(runs, name):
    """Nor of an L0 above its target for a small λ alone, which a larger one would mend."""
    assert said(runs[name]) == {}


def test_a_healthy_run_comes_near_its_target_and_the_saturated_one_does_not(runs):
    assert runs["healthy"][-1]["l0"] < 1.5 * 5 < 2 * 5 < runs["saturated"][-1]["l0"]


@pytest.mark.parametrize("name", ["saturated", "saturated l0"])
def test_a_window_that_is_far_too_narrow_is_said(runs, name):
    found = said(runs[name])
    assert len(found) >= 8
    assert all("of the entries lie in the window below θ, and θ moved by" in answer for answer in found.values())
    config = TrainConfig.short(steps=STEPS)
    assert min(found) > config.lr_warmup_steps
    assert any("while λ rose by" in answer for answer in found.values())
    assert any("its target is 5: " in answer for answer in found.values()) == (name == "saturated")


@pytest.mark.parametrize("name", RUNS)
def test_nothing_is_said_while_it_is_warming_up(runs, name):
    warm_up = [row for row in runs[name] if row["step"] <= TrainConfig.short(steps=STEPS).lr_warmup_steps]
    assert len(warm_up) > 8
    assert saturated(warm_up) is None


@pytest.mark.parametrize("name", RUNS)
def test_a_thinned_history_says_the_same(runs, name):
    history, found = History(), []
    history.LIMIT = 50
    for row in runs[name]:
        history.add(row)
        assert len(history.rows) < 50
        found.append(saturated(history.rows))
    assert any(found) == bool(said(runs[name]))


def test_a_thinned_history_is_even():
    history = History()
    for step in range(1, 100_001):
        history.add({"step": step})
    steps = [row["step"] for row in history.rows]
    assert history.LIMIT / 2 <= len(steps) < history.LIMIT
    assert len({b - a for a, b in itertools.pairwise(steps)}) == 1
    assert steps[0] == 1
    assert steps[-1] > 95_000


def test_rows_that_are_not_finite_are_left_out(runs):
    rows = runs["saturated"][:45]
    assert saturated(rows) is not None
    spoilt = [row | ({"l0": math.nan} if i % 3 == 0 else {}) for i, row in enumerate(rows)]
    assert saturated(spoilt) == saturated([row for i, row in enumerate(rows) if i % 3])
    assert saturated([row | {"lr": None} for row in rows]) is None


@pytest.mark.parametrize("rows", [[], ()])
def test_no_rows(rows):
    assert saturated(rows) is None


def test_rows_of_another_kind():
    with pytest.raises(TypeError, match=r"^rows: expected a Sequence, got int$"):
        saturated(3)


def test_an_l0_that_rests_at_its_target_while_lambda_rises():
    """As with ``l0_warmup_power=4``, where λ rises to the end."""
    row = {"l0": 44.0, "lr": 1e-3, "window": 0.6, "threshold": 0.05, "target_l0": 40.0}
    rows = [row | {"step": 10 * step, "l0_coefficient": step**4 / 1e4} for step in range(1, 41)]
    assert saturated(rows) is None
    assert saturated([each | {"l0": 50.0} for each in rows]) is not None
