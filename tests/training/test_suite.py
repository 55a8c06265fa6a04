"""Many SAEs trained at once: each as if it were alone, and the end of a training that fails."""

import math
import re

import pytest
import torch

from gemmascope.activations import batches
from gemmascope.errors import TrainingFailedError
from gemmascope.sites import Site
from gemmascope.training.suite import train
from gemmascope.training.trainer import SAETrainer
from tests.training.test_trainer import config, sample

A, B = Site(0, "resid"), Site(1, "att")


def test_suite_learns_and_is_deterministic():
    sites = {Site(0, "resid"): sample(2000, seed=1), Site(1, "att"): sample(2000, d=6, seed=2)}
    settings = config(steps=150, learning_rate=5e-3, l0_coefficient=0.01, l0_warmup_steps=50, lr_warmup_steps=10)

    def run():
        trainers = {site: SAETrainer(settings, rows) for site, rows in sites.items()}
        logged = []
        stream = batches(sites, settings.batch_size, settings.steps, seed=3)
        train(trainers, stream, log_every=10, log=lambda step, rows: logged.append((step, rows)))
        return trainers, logged

    trainers, logged = run()
    assert [step for step, _ in logged] == list(range(1, 151))
    assert all((rows is None) == bool(step % 10) for step, rows in logged)
    first, last = logged[9][1], logged[-1][1]
    assert set(last) == {"layer_0/resid", "layer_1/att"}
    for name, row in last.items():
        assert row["fvu"] < 0.5 * first[name]["fvu"], name
        assert 0 < row["l0"] < 12, name
    again, _ = run()
    for site, trainer in trainers.items():
        for ours, theirs in zip(trainer.sae.parameters(), again[site].sae.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_one_sae_is_the_same_alone_and_in_company():
    rows, site = sample(), Site(2, "mlp")
    company = {site: rows, Site(0, "att"): sample(seed=9)}
    trainers = {key: SAETrainer(config(), value) for key, value in company.items()}
    train(trainers, batches(company, 64, 5, seed=0))
    alone = {site: SAETrainer(config(), rows)}
    train(alone, batches({site: rows}, 64, 5, seed=0))
    assert torch.equal(alone[site].sae.W_enc, trainers[site].sae.W_enc)


def test_side_by_side_is_the_same_as_one_after_another():
    company = {Site(layer, "mlp"): sample(seed=layer) for layer in range(5)}
    threads, suites = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            suites.append({site: SAETrainer(config(), rows) for site, rows in company.items()})
            train(suites[-1], batches(company, 64, 40, seed=0))
            assert torch.get_num_threads() == n
    finally:
        torch.set_num_threads(threads)
    for site in company:
        for one, other in zip(*(suite[site].sae.parameters() for suite in suites), strict=True):
            assert torch.equal(one, other)


def test_an_error_of_one_side_by_side_is_raised(monkeypatch):
    company = {Site(layer, "mlp"): sample(seed=layer) for layer in range(3)}
    trainers, threads = {site: SAETrainer(config(), rows) for site, rows in company.items()}, torch.get_num_threads()
    monkeypatch.setattr(trainers[Site(1, "mlp")], "update", lambda x: math.sqrt(-1))
    try:
        torch.set_num_threads(2)
        with pytest.raises(ValueError, match="math domain error"):
            train(trainers, batches(company, 64, 1, seed=0))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


# ---- SAEs that give up

NAN = torch.full((64, 8), math.nan)
WHY = (
    r"the loss or the gradients were not finite in the last {} updates, up to step {}; lower the learning rate, or look"
)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("log_every", [1, 4, 1000])
def test_one_that_gives_up_leaves_the_others_as_they_would_be_without_it(log_every, threads):
    company = {Site(layer, "mlp"): sample(2000, seed=layer) for layer in range(3)}
    bad, logged, before = Site(1, "mlp"), [], torch.get_num_threads()

    def stream(sites):
        for step, batch in enumerate(batches(company, 64, 40, seed=0), start=1):
            yield {site: NAN if site == bad and step > 7 else batch[site] for site in sites}

    trainers = {site: SAETrainer(config(), rows) for site, rows in company.items()}
    try:
        torch.set_num_threads(threads)
        with pytest.warns(RuntimeWarning, match="^layer_1/mlp: " + WHY.format(10, 17) + ".*: it gave up$"):
            gave_up = train(trainers, stream(company), log_every=log_every, log=lambda *row: logged.append(row))
    finally:
        torch.set_num_threads(before)
    assert list(gave_up) == [bad]
    assert re.match("layer_1/mlp: " + WHY.format(10, 17), gave_up[bad])
    assert (trainers[bad].step, trainers[bad].state.updates, trainers[bad].state.skipped) == (17, 7, 10)
    others = [site for site in company if site != bad]
    alone, once = {site: SAETrainer(config(), company[site]) for site in others}, SAETrainer(config(), company[bad])
    assert train(alone, stream(others)) == {}
    for batch in batches(company, 64, 7, seed=0):
        once.update(batch[bad])
    for site, twin in (*alone.items(), (bad, once)):
        for name, tensor in twin.state.tensors().items():
            assert name == "skipped" or torch.equal(trainers[site].state.tensors()[name], tensor), name
    assert [step for step, _ in logged] == list(range(1, 41))
    for step, rows in logged:
        assert (rows is None) == bool(step % log_every)
        assert rows is None or list(rows) == [str(site) for site in (company if step <= 17 else others)]


@pytest.mark.parametrize("log_every", [1, 2, 10])
def test_training_ends_when_all_gave_up(log_every):
    sites = {A: sample(), B: sample(seed=2)}
    trainers, logged = {site: SAETrainer(config(), rows) for site, rows in sites.items()}, []
    good = next(iter(batches(sites, 64, 1, seed=0)))

    def stream():
        yield good
        for step in range(2, 100):
            yield {A: NAN, B: NAN if step > 5 else good[B]}

    message = f"^layer_0/resid: {WHY.format(10, 11)}.*; layer_1/att: {WHY.format(10, 15)}"
    with pytest.raises(TrainingFailedError, match=message):
        train(trainers, stream(), log_every=log_every, log=lambda *row: logged.append(row))
    assert [step for step, _ in logged] == list(range(1, 16))


@pytest.mark.parametrize("steps", [1, 3, 9])
def test_a_short_run_of_nothing_but_nan(steps):
    with pytest.raises(TrainingFailedError, match=f"^layer_0/resid: {WHY.format(steps, steps)}"):
        train({A: SAETrainer(config(), sample())}, [{A: NAN}] * steps)


@pytest.mark.parametrize("bad", [1, 9])
def test_a_last_piece_of_nothing_but_nan_is_said(bad):
    good = sample()[:64]
    trainer = SAETrainer(config(), sample())
    with pytest.warns(RuntimeWarning, match=f"^layer_0/resid: {WHY.format(bad, 11 + bad)}.*finite$"):
        assert train({A: trainer}, [{A: x} for x in [good] * 11 + [NAN] * bad]) == {}
    assert trainer.state.updates == 11


def test_nan_now_and_then_is_no_reason_to_give_up():
    good = sample()[:64]
    trainer = SAETrainer(config(), sample())
    assert train({A: trainer}, [{A: x} for x in ([NAN] * 9 + [good]) * 3], log_every=1) == {}
    assert (trainer.state.updates, trainer.state.skipped) == (3, 27)


def test_outliers_alone_are_no_training_either():
    with pytest.raises(TrainingFailedError, match=f"^layer_0/resid: {WHY.format(10, 10)}"):
        train({A: SAETrainer(config(), sample())}, [{A: 1e15 * sample()[:64]}] * 12)


def test_a_stream_of_nothing_trains_nothing():
    assert train({A: SAETrainer(config(), sample())}, []) == {}


def a_trainer():
    return {A: SAETrainer(config(), sample())}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: train({}, []), ValueError, "trainers: expected at least one site, got none"),
        (lambda: train([1], []), TypeError, "trainers: expected a mapping by site, got list"),
        (lambda: train({A: 1}, []), TypeError, "trainers: expected a SAETrainer, got int"),
        (lambda: train(a_trainer(), None), TypeError, "stream: expected an iterable of batches, got NoneType"),
        (
            lambda: train(a_trainer(), {A: sample()}),
            TypeError,
            "stream: expected batches {site: activations}, got Site",
        ),
        (
            lambda: train(a_trainer(), [{B: sample()}]),
            ValueError,
            "stream: expected batches of every trainer's site, layer_0/resid is missing",
        ),
        (
            lambda: train(a_trainer(), [{A: sample(d=1)}]),
            ValueError,
            "x: expected shape [N ≥ 1, 8], got [400, 1]",
        ),
        (lambda: train(a_trainer(), [], log_every=0), ValueError, "log_every: expected at least 1, got 0"),
        (lambda: train(a_trainer(), [], log=3), TypeError, "log: expected a function, got int"),
    ],
)
def test_messages(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
