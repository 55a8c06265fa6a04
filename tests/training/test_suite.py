"""Many SAEs trained at once: each as if it were alone, their files, and the end of a training that fails."""

import json
import math

import pytest
import torch

from gemmascope.activations import batches
from gemmascope.errors import TrainingFailedError
from gemmascope.evaluation import evaluate_sae
from gemmascope.saes import JumpReLUSAE
from gemmascope.sites import Site
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


def test_training_ends_when_no_step_is_finite():
    rows, site = sample(), Site(1, "resid")
    bad = torch.full((64, 8), math.nan)
    message = r"layer_1/resid: the loss was not finite in the 2 steps up to step 4; lower the learning rate"
    with pytest.raises(TrainingFailedError, match=message):
        train({site: SAETrainer(config(), rows)}, [{site: x} for x in (rows[:64], bad, bad, bad)], log_every=2)


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


@pytest.mark.parametrize("d_sae", [24, 5000])
def test_l0_is_that_of_the_evaluation(d_sae):
    rows = sample(5000)  # more than one piece
    sae = JumpReLUSAE(rows.shape[1], d_sae, threshold_init=0.5, generator=torch.Generator().manual_seed(0))
    assert mean_l0(sae, rows) == evaluate_sae(sae, rows).l0
    assert mean_l0(sae, rows.bfloat16()) == evaluate_sae(sae, rows.bfloat16()).l0


def test_memory_of_a_suite():
    widths = [8, 6]
    assert suite_memory(config(), iter(widths)) == sum(SAETrainer.memory(config(), width).total for width in widths)
