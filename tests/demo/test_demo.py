"""The demo end to end, at a size of seconds: what it writes, that it reloads, resumes and survives an interruption."""

import argparse
import contextlib
import dataclasses
import json
import os
import resource
import shutil
import signal
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
from gemmascope.reporting import read_results
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
        ({"seed": -1}, "seed: expected at least 0, got -1"),
        ({"seed": 2**63}, "seed: expected at most 9223372036854775807, got 9223372036854775808"),
        ({"seed": True}, "seed: expected an int, got bool"),
        ({"seed": 1.0}, "seed: expected an int, got float"),
        ({"text": "own.txt"}, "text: expected a tuple, got str"),
        ({"text": (Path("no such file"),)}, "text: cannot read no such file"),
        ({"text": (3,)}, "text: expected a str or an os.PathLike, got int"),
        ({"out": 3}, "out: expected a str or an os.PathLike, got int"),
        ({"fast": 1}, "fast: expected a bool, got int"),
        ({"fresh": "no"}, "fresh: expected a bool, got str"),
        ({"impl": "fastest"}, "impl: expected one of .*, got 'fastest'"),
    ],
    ids=str,
)
def test_bad_settings_leave_nothing_behind(config, changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        demo.run(dataclasses.replace(config, **changes))
    assert not config.out.exists()


def test_what_is_no_config(tmp_path):
    with pytest.raises(TypeError, match="config: expected a DemoConfig, got dict"):
        demo.run({"out": tmp_path})


def test_the_largest_seed(config):
    seed = 2**63 - 1
    assert demo.run(dataclasses.replace(config, seed=seed))["model"]["seed"] == seed


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """By seed, the config of a finished run, which tests leave as they found it, and its results."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "own.txt").write_bytes(Path(argparse.__file__).read_bytes()[:60_000])
    configs = [TinyConfig(out=folder / str(seed), text=(folder / "own.txt",), seed=seed) for seed in (0, 1)]
    return [(config, json.loads(json.dumps(demo.run(config)))) for config in configs]


@pytest.mark.parametrize("file", ["model/model.safetensors", "activations.safetensors", "frequencies.npz"])
@pytest.mark.parametrize("damage", [lambda data: data[:1000], lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_damage_is_named_and_deleting_the_file_mends_it(finished, file, damage):
    config, results = finished[0]
    path = config.out / file
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    with pytest.raises(BadFileError, match=f"{file}: expected the {len(whole)} bytes that the stage '.*' left, found"):
        demo.run(config)
    path.unlink()
    assert demo.run(config)["saes"] == results["saes"]
    assert path.read_bytes() == whole


@pytest.mark.parametrize("stage", ["activations_of", "judge"])
def test_two_seeds_in_one_folder_and_one_of_them_interrupted(finished, tmp_path, stage, monkeypatch):
    """Whichever comes next shows its own figures, and until then the folder passes for no finished run."""
    out = shutil.copytree(finished[0][0].out, tmp_path / "run")
    first, second = (dataclasses.replace(config, out=out) for config, _ in finished)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(demo, stage, interrupted)
        demo.run(second)
    with pytest.raises(BadFileError, match="expected a finished run, found"):
        read_results(out)
    for config, (_, results) in ((second, finished[1]), (first, finished[0])):
        assert demo.run(config)["saes"] == results["saes"]
        assert read_results(out)["model"]["loss"] == results["model"]["loss"]


def test_a_disk_that_is_full_for_the_activations(config):
    """The limit on a file's size stands in for the disk: safetensors fails to write in words of its own."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))  # the model has 0.2 MB, activations 1.2
        with pytest.raises(EnvironmentProblemError, match=r"activations.safetensors: cannot be written: "):
            demo.run(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(config.out.glob(".tmp-*"))
    assert os.path.getsize(config.out / "model" / "model.safetensors") < 1_000_000


@contextlib.contextmanager
def defaults(dtype, device):
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
        assert torch.get_default_dtype() == dtype
        assert torch.get_default_device().type == device
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def test_the_demo_depends_on_no_default(finished, tmp_path):
    config, results = finished[0]
    with defaults(torch.bfloat16, "meta"):
        again = demo.run(dataclasses.replace(config, out=tmp_path / "run"))
    assert again["saes"] == results["saes"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_small_model_depends_on_no_default(dtype):
    rows = text.rows(b"the cat sat on the mat. " * 40, 33)
    config = LanguageModelConfig(n_layers=1, d_model=32, steps=2, batch_rows=4)

    def trained():
        model = small_gemma.build(config)
        small_gemma.train(model, rows, config)
        return model.state_dict()

    expected = trained()
    with defaults(dtype, "meta"):
        found = trained()
        assert text.rows(b"abcdefgh", 4).tolist() == [[256, 97, 98, 99], [256, 100, 101, 102]]
        assert text.bigram_loss(rows, rows[:2]) < 3
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_the_small_model_learns_and_keeps_its_seed():
    rows = text.rows(b"the cat sat on the mat. " * 400, 33)
    config = LanguageModelConfig(n_layers=1, d_model=32, steps=25, batch_rows=8, warmup_steps=5)
    model, twin = small_gemma.build(config), small_gemma.build(config)
    assert torch.equal(model.model.embed_tokens.weight, twin.model.embed_tokens.weight)
    losses = []
    small_gemma.train(model, rows, config, lambda step, loss: losses.append(loss))
    assert losses[-1] < 0.6 * losses[0]
    assert not model.training
