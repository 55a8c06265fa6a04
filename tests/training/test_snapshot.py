"""A training that is stopped at any step and goes on elsewhere: the same bits, or an error that says the difference."""

import json
import math

import pytest
import torch

from gemmascope.kernels.density import TRAINING_STEP, Switch
from gemmascope.training.trainer import SAETrainer
from tests.training.changes import assert_same, fresh, in_training, rows, take, values, write_row
from tests.training.test_trainer import config, sample

STEPS = 7
WAYS = [(dtype, route) for dtype in ("fp32", "bf16") for route in ("auto", "sparse", "dense")] + [("fp32", "reference")]
ways = pytest.mark.parametrize(("compute_dtype", "route"), WAYS)


def moved(trainer, into=None):
    """The snapshot of a trainer in another one, after a way through JSON and memory of its own."""
    tensors, facts = trainer.snapshot()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    into = fresh(trainer.config.compute_dtype, trainer.config.route) if into is None else into
    into.restore(tensors, json.loads(json.dumps(facts, allow_nan=False)))
    return into


def everything(trainer):
    tensors, facts = trainer.snapshot()
    return {name: tensor.clone() for name, tensor in tensors.items()}, facts


def assert_equal(trainer, other):
    (found, facts), (expected, expected_facts) = everything(trainer), everything(other)
    assert_same(found, expected)
    assert facts == expected_facts
    assert trainer.report() == other.report()


def step(trainer, i):
    trainer.update(rows(i % 4, 64 - 3 * (i % 4)))


@ways
@pytest.mark.parametrize("k", range(STEPS + 1))
def test_a_run_goes_on_with_the_same_bits(compute_dtype, route, k, monkeypatch):
    """Twice in a row, on batches of several sizes; route auto changes on the way."""
    monkeypatch.setitem(TRAINING_STEP, "cpu", Switch(0.45, 0.40))
    whole, trainer = fresh(compute_dtype, route), fresh(compute_dtype, route)
    for i in range(STEPS):
        step(whole, i)
        if i in (k, k + 2):
            trainer = moved(trainer)
        step(trainer, i)
    assert_equal(moved(trainer), whole)
    assert whole.state.turn == (STEPS if compute_dtype == "bf16" and route != "reference" else 0)


def test_a_change_that_no_step_has_seen_is_kept():
    trainer, other = in_training(), in_training()
    for each in (trainer, other):
        each.sae.W_dec.data.mul_(1.5)
        with torch.no_grad():
            each.sae.W_enc.mul_(1.5)
    trainer = moved(trainer)
    for each in (trainer, other):
        take(each)
    assert_equal(trainer, other)


def test_figures_that_are_not_finite_are_kept():
    trainer, nan = fresh(), torch.full((64, 8), math.nan)
    trainer.update(nan)
    again = moved(trainer)
    assert math.isnan(again.figures["loss"])
    assert again.skipped_in_a_row == again.withheld_in_a_row == 1


def test_a_snapshot_changes_nothing_of_the_run():
    trainer, other = fresh(), fresh()
    for i in range(5):
        step(trainer, i)
        step(other, i)
        trainer.snapshot()
    assert_equal(trainer, other)


def test_a_trainer_can_go_back():
    trainer = in_training()
    tensors, facts = everything(trainer)
    take(trainer)
    once = values(trainer)
    trainer.restore(tensors, facts)
    take(trainer)
    assert_same(trainer, once)


@pytest.mark.parametrize("run_ahead", [1, 4])
@pytest.mark.parametrize("when", [range(40), range(5, 40, 7), [20]], ids=["always", "now and then", "once"])
def test_looking_at_the_figures_sooner_changes_nothing(run_ahead, when, monkeypatch):
    """As a GPU: the host reads them some steps later, or at once for a report, a checkpoint."""
    monkeypatch.setitem(TRAINING_STEP, "cpu", Switch(0.40, 0.38))
    trainers = [SAETrainer(config(l0_coefficient=0.02, learning_rate=5e-3), sample()) for _ in range(3)]
    routes = []
    for i in range(40):
        x = sample(64, seed=i)
        x[0, 0] += math.nan if i in (3, 4) else 1e12 if i == 30 else 0
        for which, trainer in enumerate(trainers):
            trainer.run_ahead = run_ahead
            trainer.update(x)
            if which == 1 and i in when:
                trainer.flush()
            if which == 2 and i in when:
                into = SAETrainer(trainer.config, sample())
                into.run_ahead = run_ahead
                trainers[2] = moved(trainer, into)
        routes.append([trainer.route for trainer in trainers])
        assert len({trainer.withheld_in_a_row for trainer in trainers}) == 1
    assert all(len(set(each)) == 1 for each in routes)
    assert {route for route, *_ in routes} == {"dense", "sparse"}
    never, sooner, moved_on = trainers
    for each in (sooner, moved_on):
        assert_equal(each, never)


@pytest.mark.parametrize("run_ahead", [0, 1, 4])
def test_a_decision_is_taken_so_many_steps_later(run_ahead, monkeypatch):
    """The first figures say sparse, and the first step that the host gives after it could know them is."""
    monkeypatch.setitem(TRAINING_STEP, "cpu", Switch(1.0, 0.99))
    trainer, launched = SAETrainer(config(), sample()), []
    trainer.run_ahead = run_ahead
    launch = trainer._launch
    monkeypatch.setattr(trainer, "_launch", lambda *job: launched.append(job[2]) or launch(*job))
    for i in range(8):
        trainer.update(sample(64, seed=i))
        trainer.flush()
    assert launched == ["dense"] * (run_ahead + 1) + ["sparse"] * (7 - run_ahead)


def test_room_is_that_of_figures_that_were_due():
    trainers = [SAETrainer(config(), sample()) for _ in range(2)]
    for trainer in trainers:
        trainer.run_ahead = 2
        for i in range(5):
            trainer.update(sample(64, seed=i))
            if trainer is trainers[0]:
                trainer.flush()
        assert trainer._decided.step == 2
    assert trainers[0]._decided == trainers[1]._decided


# ---- what is refused


def changed(facts, **changes):
    return lambda tensors, known: (tensors, known | facts | changes)


def tensor(name, value):
    return lambda tensors, facts: (tensors | {name: value}, facts)


def without(name):
    return lambda tensors, facts: ({key: t for key, t in tensors.items() if key != name}, facts)


def recipe(**changes):
    return lambda tensors, facts: (tensors, facts | {"config": fresh().config.changed(**changes).to_dict()})


DUE = {"step": 3, "density": 0.5, "n_entries": 7.0, "skipped_in_a_row": 0}
REFUSED = [
    (recipe(learning_rate=1e-3), ValueError, r"config.learning_rate: expected 0.005, got 0.001"),
    (recipe(bandwidth=0.5), ValueError, r"config.loss.bandwidth: expected 0.05, got 0.5"),
    (recipe(seed=1), ValueError, r"config.seed: expected 0, got 1"),
    (changed({"config": {}}), ValueError, r"config.d_sae: expected 24, got nothing"),
    (changed({"config": 3}), TypeError, r"config: expected a Mapping, got int"),
    (changed({"more": 1}), ValueError, r"facts: expected the keys .*; found also 'more'"),
    (changed({}, step=-1), ValueError, r"facts.step: expected at least 0, got -1"),
    (changed({}, step=True), TypeError, r"facts.step: expected an int, got bool"),
    (changed({}, turn=1.5), TypeError, r"facts.turn: expected an int, got float"),
    (changed({}, route="dense"), ValueError, r"facts.route: expected 'sparse', got 'dense'"),
    (changed({}, capacity=0), ValueError, r"facts.capacity: expected at least 1, got 0"),
    (changed({}, input_scale=0.0), ValueError, r"facts.input_scale: expected a finite number > 0, got 0"),
    (changed({}, pre_encoder_bias=1), TypeError, r"facts.pre_encoder_bias: expected a bool, got int"),
    (changed({}, copies_seen=None), TypeError, r"facts.copies_seen: expected a bool, got NoneType"),
    (changed({}, figures={"loss": "no"}), TypeError, r"facts.figures\['loss'\]: expected a number, got str"),
    (changed({}, figures={"loss": math.nan}), ValueError, r"facts.figures\['loss'\]: expected a finite number"),
    (changed({}, decided={}), ValueError, r"facts.decided: expected the keys .*; 'density' is missing"),
    (changed({}, due={}), TypeError, r"facts.due: expected a list, got dict"),
    (changed({}, due=[DUE, DUE | {"density": -1.0}]), ValueError, r"facts.due\[1\].density: expected a finite number"),
    (without("W_dec_v"), ValueError, r"tensors: expected the keys .*; 'W_dec_v' is missing"),
    (tensor("b_dec", [0.0] * 8), TypeError, r"tensors\['b_dec'\]: expected a Tensor, got list"),
    (tensor("b_dec", torch.zeros(7)), ValueError, r"tensors\['b_dec'\]: expected float32 \[8\], got float32 \[7\]"),
    (tensor("last", torch.zeros(24)), ValueError, r"tensors\['last'\]: expected int64 \[24\], got float32 \[24\]"),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_is_not_its_own_is_refused_and_changes_nothing(change, error, message):
    trainer = in_training()
    source = in_training()
    take(source)
    before, before_facts = everything(trainer)
    with pytest.raises(error, match="^" + message):
        trainer.restore(*change(*source.snapshot()))
    tensors, facts = trainer.snapshot()
    assert_same(tensors, before)
    assert facts == before_facts


def test_copies_that_are_stale_are_found_after_it_too():
    trainer, other = in_training(), in_training()
    for each in (trainer, other):
        write_row(each.sae)
    trainer = moved(trainer)
    for each in (trainer, other):
        take(each)
    assert_equal(trainer, other)
