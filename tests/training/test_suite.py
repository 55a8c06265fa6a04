"""Many SAEs trained at once: each as if it were alone, their files, and the end of a training that fails."""

import json
import math
import re

import pytest
import torch

from gemmascope.activations import batches
from gemmascope.errors import TrainingFailedError
from gemmascope.evaluation import evaluate_sae
from gemmascope.saes import JumpReLUSAE
from gemmascope.sites import Site
from gemmascope.training import suite as suite_module
from gemmascope.training.suite import make_trainers, mean_l0, suite_memory, train, train_suite
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


def test_files_of_a_suite_of_which_one_gives_up(tmp_path, monkeypatch):
    activations, settings = {A: sample(2000), B: sample(2000, seed=2)}, config(steps=30)
    samples = {site: rows[:200].clone() for site, rows in activations.items()}
    activations[B].fill_(math.nan)
    monkeypatch.setattr(suite_module, "make_trainers", lambda _, *args, **named: make_trainers(samples, *args, **named))
    with pytest.warns(RuntimeWarning, match=r"^layer_1/att: .*: it gave up$"):
        paths = train_suite(activations, settings, tmp_path, model_name="a model", log_every=5)
    assert list(paths) == [A]
    assert list(tmp_path.rglob("params.npz")) == [paths[A]]
    text = (tmp_path / "train_log.jsonl").read_text()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert [(line["step"], line["site"]) for line in lines] == [
        *((step, site) for step in (5, 10) for site in ("layer_0/resid", "layer_1/att")),
        *((step, "layer_0/resid") for step in (15, 20, 25, 30)),
    ]
    assert (lines[1]["loss"], lines[1]["skipped"]) == (None, 5)


def test_files_of_a_suite(tmp_path):
    activations = {A: sample(seed=1), B: sample(d=6, seed=2)}
    (tmp_path / "saes" / "old").mkdir(parents=True)
    (tmp_path / "results.json").touch()
    settings, logged = config(steps=6), []
    paths = train_suite(
        activations,
        settings,
        tmp_path,
        model_name="a model",
        log_every=3,
        log=lambda step, rows: logged.append((step, rows)),
    )
    twins = make_trainers(activations, settings, model_name="a model")
    train(twins, batches(activations, settings.batch_size, settings.steps, settings.seed))
    assert list(paths) == [A, B]
    for site, path in paths.items():
        sae = JumpReLUSAE.load(path)
        l0 = evaluate_sae(sae, activations[site]).l0
        folder = tmp_path / "saes" / site.kind / f"layer_{site.layer}" / f"width_{settings.d_sae}"
        assert path == folder / f"average_l0_{round(l0)}" / "params.npz"
        assert sae.is_folded
        assert torch.equal(sae.W_dec, twins[site].sae.W_dec)
        expected = {"model": "a model", "site": site.name, "layer": site.layer}
        expected |= {"average_l0": l0, "average_l0_of": "training rows", "average_l0_tokens": 400}
        assert {name: sae.metadata[name] for name in expected} == expected
    assert [step for step, _ in logged] == [1, 2, 3, 4, 5, 6]
    lines = [json.loads(line) for line in (tmp_path / "train_log.jsonl").read_text().splitlines()]
    assert lines == [{"step": step, "site": name, **row} for step, rows in logged if rows for name, row in rows.items()]
    assert len(lines) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "saes", "train_log.jsonl"]
    assert not (tmp_path / "saes" / "old").exists()


def test_l0_in_the_name_is_that_of_the_held_out_rows(tmp_path):
    """To the bit what the evaluation of the saved SAE gives, which is what a reader compares it with."""
    activations, held_out = {A: sample(seed=1).bfloat16()}, {A: sample(5000, seed=2)}
    (path,) = train_suite(activations, config(steps=6), tmp_path, model_name="none", held_out=held_out).values()
    sae = JumpReLUSAE.load(path)
    l0 = evaluate_sae(sae, held_out[A]).l0
    assert path.parent.name == f"average_l0_{round(l0)}"
    said = {name: sae.metadata[name] for name in ("average_l0", "average_l0_of", "average_l0_tokens")}
    assert said == {"average_l0": l0, "average_l0_of": "held-out rows", "average_l0_tokens": 5000}


def test_without_them_it_is_that_of_training_rows_from_all_over(tmp_path, monkeypatch):
    monkeypatch.setattr("gemmascope.training.suite.L0_ROWS", 100)
    rows = torch.cat([sample(200, seed=1), 0.01 * sample(150, seed=2)])  # the end is like nothing at the beginning
    (path,) = train_suite({A: rows}, config(steps=6), tmp_path, model_name="none").values()
    sae = JumpReLUSAE.load(path)
    assert sae.metadata["average_l0"] == evaluate_sae(sae, rows[::4]).l0
    assert sae.metadata["average_l0_tokens"] == 88


@pytest.mark.parametrize(
    ("held_out", "error"), [({}, TypeError), ({A: sample(d=5)}, ValueError), ({A: sample()[:0]}, ValueError)]
)
def test_held_out_rows_are_checked_before_anything_is_trained(tmp_path, monkeypatch, held_out, error):
    monkeypatch.setattr(SAETrainer, "update", None)
    with pytest.raises(error, match=r"^held_out\[layer_0/resid\]: expected "):
        train_suite({A: sample()}, config(steps=6), tmp_path, model_name="none", held_out=held_out)
    assert list(tmp_path.iterdir()) == []


def test_a_training_that_fails_leaves_the_earlier_saes(tmp_path, monkeypatch):
    (tmp_path / "saes" / "old").mkdir(parents=True)
    monkeypatch.setattr(SAETrainer, "update", lambda trainer, x: math.sqrt(-1))
    with pytest.raises(ValueError, match="math domain error"):
        train_suite({A: sample()}, config(), tmp_path, model_name="a model")
    assert [path.name for path in tmp_path.rglob("*")] == ["saes", "old"]


def test_no_site(tmp_path):
    with pytest.raises(ValueError, match="activations: expected at least one site, got none"):
        train_suite({}, config(), tmp_path, model_name="a model")


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
        (
            lambda: make_trainers({"layer_0/resid": sample()}, config(), model_name="m"),
            TypeError,
            "activations: expected a Site for every key, got str",
        ),
        (
            lambda: make_trainers({A: sample()}, config(), model_name=3),
            TypeError,
            "model_name: expected a str, got int",
        ),
        (lambda: suite_memory({}, [3]), TypeError, "config: expected a TrainConfig, got dict"),
        (lambda: suite_memory(config(), 3), TypeError, "widths: expected an iterable of ints, got int"),
        (lambda: suite_memory(config(), [0]), ValueError, "d_model: expected at least 1, got 0"),
    ],
)
def test_messages(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


def test_a_path_that_is_none():
    with pytest.raises(TypeError, match=r"^out: expected a str or an os.PathLike, got int$"):
        train_suite({A: sample()}, config(), 3, model_name="m")


@pytest.mark.parametrize("d_sae", [24, 5000])
def test_l0_is_that_of_the_evaluation(d_sae):
    rows = sample(5000)  # more than one piece
    sae = JumpReLUSAE(rows.shape[1], d_sae, threshold_init=0.5, generator=torch.Generator().manual_seed(0))
    assert mean_l0(sae, rows) == evaluate_sae(sae, rows).l0
    assert mean_l0(sae, rows.bfloat16()) == evaluate_sae(sae, rows.bfloat16()).l0


def test_memory_of_a_suite():
    widths = [8, 6]
    assert suite_memory(config(), iter(widths)) == sum(SAETrainer.memory(config(), width).total for width in widths)
