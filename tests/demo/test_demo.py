"""The demo end to end, at a size of seconds: what it writes, that it reloads, resumes and survives an interruption."""

import argparse
import dataclasses
import json
from pathlib import Path

import pytest
import torch

from gemmascope.activations import harvest, sample_rows
from gemmascope.demo import run as demo
from gemmascope.demo import small_gemma, text
from gemmascope.demo.run import DemoConfig
from gemmascope.demo.small_gemma import CONTEXT, LanguageModelConfig
from gemmascope.errors import BadFileError, EnvironmentProblemError
from gemmascope.evaluation import evaluate_sae, language_model_loss
from gemmascope.runs import Run
from gemmascope.saes import JumpReLUSAE
from gemmascope.sites import KINDS, Site
from gemmascope.training import suite
from gemmascope.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class TinyConfig(DemoConfig):
    harvest_rows = 24
    held_out_rows = 6

    def language_model(self):
        return LanguageModelConfig(n_layers=2, d_model=32, steps=6, batch_rows=4, seed=self.seed)

    def sae(self):
        return TrainConfig.short(
            d_sae=40, steps=8, batch_size=128, lr_warmup_steps=2, l0_warmup_steps=4, seed=self.seed
        )


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "own.txt"
    path.write_bytes(Path(argparse.__file__).read_bytes()[:60_000])
    return path


@pytest.fixture
def config(tmp_path, corpus):
    return TinyConfig(out=tmp_path / "run", text=(corpus,))


def test_writes_everything_and_the_saes_reload(config):
    results = demo.run(config)
    assert json.loads((config.out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert [(row["layer"], row["site"]) for row in results["saes"]] == [
        (layer, kind) for layer in (0, 1) for kind in KINDS
    ]
    assert results["model"]["bigram_loss"] > 0 < results["model"]["loss"]
    log = [json.loads(line) for line in (config.out / "train_log.jsonl").read_text().splitlines()]
    assert {row["site"] for row in log} <= {f"layer_{layer}/{kind}" for layer in (0, 1) for kind in KINDS}

    model = small_gemma.load(config.out / "model", config.language_model())
    rows, all_held_out = text.split(config.text[0].read_bytes(), CONTEXT, config.seed)
    held_out = sample_rows(all_held_out, 6, config.seed)
    facts = results["model"]
    assert facts["loss"] == pytest.approx(language_model_loss(model, held_out), rel=1e-6)
    assert facts["bigram_loss"] == pytest.approx(text.bigram_loss(rows, held_out), rel=1e-12)
    assert (facts["held_out_rows"], facts["held_out_tokens"]) == (6, 6 * 127)
    assert facts["held_out"].startswith(f"6 of {len(all_held_out)} held-out rows, spread over all")
    for row in results["saes"]:
        site = Site(row["layer"], row["site"])
        path = config.out / row["path"]
        sae = JumpReLUSAE.load(path)
        assert sae.is_folded
        assert sae.metadata["site"] == site.name
        assert (path.parent / "config.json").exists()
        metrics = evaluate_sae(sae, harvest(model, held_out, [site])[site])
        assert (metrics.l0, metrics.fvu) == pytest.approx((row["l0"], row["fvu"]), rel=1e-6)
        assert (row["tokens"], row["predictions"]) == (6 * 127, 6 * 126)
        assert row["l0"] == sae.metadata["average_l0"], "one L0, in the results and in the file"
        assert path.parent.name == f"average_l0_{round(row['l0'])}"


def test_the_second_run_does_nothing(config, monkeypatch):
    first = demo.run(config)
    for owner, name in ((small_gemma, "train"), (demo, "train_suite"), (demo, "judge_suite")):
        monkeypatch.setattr(owner, name, None)
    assert demo.run(config) == json.loads(json.dumps(first))


def test_resumes_after_an_interruption_with_the_same_result(config, tmp_path, monkeypatch):
    whole = demo.run(dataclasses.replace(config, out=tmp_path / "whole"))
    train, language_model = suite.train, small_gemma.train

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.run(config)
    assert not (config.out / "results.json").exists()
    assert not (config.out / "saes").exists()
    monkeypatch.setattr(suite, "train", train)
    monkeypatch.setattr(small_gemma, "train", None)  # must not be needed again
    results = demo.run(config)
    monkeypatch.setattr(small_gemma, "train", language_model)
    for ours, theirs in zip(results["saes"], whole["saes"], strict=True):
        assert ours == pytest.approx(theirs)


def test_another_seed_or_text_is_another_run(config, corpus):
    first = demo.run(config)
    second = demo.run(dataclasses.replace(config, seed=1))
    assert first["saes"][0]["fvu"] != second["saes"][0]["fvu"]
    corpus.write_bytes(corpus.read_bytes().upper())
    assert demo.run(dataclasses.replace(config, seed=1))["model"]["loss"] != second["model"]["loss"]


def test_fresh_starts_over(config, monkeypatch):
    demo.run(config)
    monkeypatch.setattr(small_gemma, "train", lambda *args: pytest.fail("trained again, as asked"))
    with pytest.raises(pytest.fail.Exception):
        demo.run(dataclasses.replace(config, fresh=True))


def test_another_training_leaves_no_old_saes(config):
    demo.run(config)
    results = demo.run(dataclasses.replace(config, seed=1))
    found = {path.relative_to(config.out).as_posix() for path in config.out.rglob("params.npz")}
    assert found == {row["path"] for row in results["saes"]}


def test_a_folder_of_something_else_is_left_alone(config):
    (config.out / "saes").mkdir(parents=True)
    with pytest.raises(ValueError, match="out: expected a new folder or that of an earlier demo, found other files in"):
        demo.run(config)
    assert [path.name for path in config.out.iterdir()] == ["saes"]


def test_a_folder_that_another_process_works_in(config):
    with Run(config.out), pytest.raises(EnvironmentProblemError, match="expected no other process to work in it"):
        demo.run(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"seed": -1}, "seed: expected at least 0, got -1", id="seed"),
        pytest.param({"text": (Path("no such file"),)}, "text: cannot read no such file", id="text"),
    ],
)
def test_bad_settings_leave_nothing_behind(config, changes, message):
    with pytest.raises(ValueError, match=message):
        demo.run(dataclasses.replace(config, **changes))
    assert not config.out.exists()


def test_a_damaged_model_is_named(config):
    demo.run(config)
    path = config.out / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(BadFileError, match="model: expected the demo's language model, found"):
        demo.run(config)


def test_the_small_model_learns_and_keeps_its_seed():
    rows = text.rows(b"the cat sat on the mat. " * 400, 33)
    config = LanguageModelConfig(n_layers=1, d_model=32, steps=25, batch_rows=8, warmup_steps=5)
    model, twin = small_gemma.build(config), small_gemma.build(config)
    assert torch.equal(model.model.embed_tokens.weight, twin.model.embed_tokens.weight)
    losses = []
    small_gemma.train(model, rows, config, lambda step, loss: losses.append(loss))
    assert losses[-1] < 0.6 * losses[0]
    assert not model.training
