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
from transformers import AutoModelForCausalLM, AutoTokenizer

from gemmascope.activations import TokenRows, harvest
from gemmascope.demo import run as demo
from gemmascope.demo import small_gemma, text
from gemmascope.demo.byte_tokenizer import BOS
from gemmascope.demo.run import DemoConfig
from gemmascope.demo.small_gemma import LanguageModelConfig
from gemmascope.errors import BadFileError, EnvironmentProblemError
from gemmascope.evaluation import evaluate_sae, language_model_loss
from gemmascope.formats.files import read_json, write_json
from gemmascope.reporting import read_results
from gemmascope.reporting.results import title_of
from gemmascope.runs import Run
from gemmascope.saes import JumpReLUSAE
from gemmascope.sites import KINDS, Site
from gemmascope.suite import SuiteConfig, train_suite
from gemmascope.suite import run as suite
from gemmascope.suite.run import spread
from gemmascope.training import Suite


@dataclasses.dataclass(frozen=True)
class TinyConfig(DemoConfig):
    def language_model(self):
        return LanguageModelConfig(n_layers=2, d_model=32, steps=6, batch_rows=4, seed=self.seed)

    def suite(self):
        tables = super().suite().to_dict()
        tables["suite"] |= {"tokens": 8 * 128, "batch_size": 128, "sae": [{"d_sae": 40, "target_l0": 5}]}
        tables["activations"] |= {"ring_tokens": 1024}
        tables["evaluate"] = {"rows": 6, "train_rows": 24}
        tables["checkpoint"] |= {"steps": 3}
        return SuiteConfig.from_dict(tables)


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
    assert read_json(config.out / "results.json") == json.loads(json.dumps(results))
    assert [(row["layer"], row["site"]) for row in results["saes"]] == [
        (layer, kind) for layer in (0, 1) for kind in sorted(KINDS)
    ]
    assert results["model"]["bigram_loss"] > 0 < results["model"]["loss"]
    assert title_of(read_results(config.out)) == "Sparse autoencoders on a small Gemma 2"
    log = [json.loads(line) for line in (config.out / "train_log.jsonl").read_text().splitlines()]
    assert {row["site"] for row in log} == {f"layer_{layer}/{kind}" for layer in (0, 1) for kind in KINDS}
    assert {"text", "model", "training", "saes", "results", "this_run"} <= results["seconds"].keys()

    model = AutoModelForCausalLM.from_pretrained(config.out / "model", attn_implementation="eager")
    rows = TokenRows.open(config.out / "tokens")
    train_rows, held_out = rows.train(torch.arange(rows.n_train)), rows.held_out(spread(rows.n_held_out, 6))
    counted = int((held_out != BOS).sum())
    facts = results["model"]
    assert facts["loss"] == pytest.approx(language_model_loss(model, held_out), rel=1e-6)
    assert facts["bigram_loss"] == pytest.approx(text.bigram_loss(train_rows, held_out), rel=1e-12)
    assert (facts["text"], facts["text_bytes"], facts["steps"]) == ("own.txt", 60_000, 6)
    assert facts["held_out_rows"] == 6
    assert facts["held_out"].startswith(f"6 of {rows.n_held_out} rows of held-out documents, spread over all")
    for row in results["saes"]:
        site = Site(row["layer"], row["site"])
        path = config.out / row["path"]
        sae = JumpReLUSAE.load(path)
        assert sae.is_folded
        assert sae.metadata["site"] == site.name
        assert (path.parent / "config.json").exists()
        metrics = evaluate_sae(sae, harvest(model, held_out, [site])[site])
        assert (metrics.l0, metrics.fvu) == pytest.approx((row["l0"], row["fvu"]), rel=1e-6)
        assert row["tokens"] == counted
        assert row["l0"] == pytest.approx(sae.metadata["average_l0"]), "one L0, in the results and in the file"
        assert path.parent.name.startswith(f"average_l0_{round(row['l0'])}")


def test_model_and_tokenizer_are_an_ordinary_folder(finished):
    config, results = finished[0]
    tokenizer = AutoTokenizer.from_pretrained(config.out / "model")
    assert tokenizer("ß", add_special_tokens=False)["input_ids"] == [*"ß".encode()]
    model = AutoModelForCausalLM.from_pretrained(config.out / "model")
    assert model.config.model_type == "gemma2"
    assert sum(p.numel() for p in model.parameters()) == results["model"]["parameters"]


def test_the_model_sees_no_held_out_document(config, monkeypatch):
    seen = []
    train = small_gemma.train
    monkeypatch.setattr(small_gemma, "train", lambda model, rows, *rest: (seen.append(rows), train(model, rows, *rest)))
    demo.run(config)
    rows = TokenRows.open(config.out / "tokens")
    assert torch.equal(seen[0], rows.train(torch.arange(rows.n_train)))
    held_out = rows.held_out(torch.arange(rows.n_held_out))
    assert not any((held_out == row).all(1).any() for row in seen[0])


def test_train_on_what_the_demo_left_gives_the_same_saes(finished, tmp_path):
    """The demo is `gemmascope train` on its own small model."""
    config, results = finished[0]
    tables = config.suite().to_dict()
    tables["run"]["out"] = str(tmp_path / "run")
    again = train_suite(SuiteConfig.from_dict(tables))
    assert again is not None
    assert json.loads(json.dumps(again["saes"])) == results["saes"]


def test_the_second_run_does_nothing(config, monkeypatch):
    first = demo.run(config)
    for owner, name in ((small_gemma, "train"), (suite, "train"), (suite, "judge_suite")):
        monkeypatch.setattr(owner, name, None)
    assert demo.run(config) == json.loads(json.dumps(first))


def test_stopped_in_the_training_it_goes_on_to_the_same_bits(finished, tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(finished[0][0], out=tmp_path / "run")
    update = Suite.update

    def stopped(self, batch):
        update(self, batch)
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Suite, "update", stopped)
        assert demo.run(config) is None
    assert "stopped; the same command goes on from there" in " ".join(capsys.readouterr().err.split())
    assert not (config.out / "results.json").exists()
    assert not (config.out / "saes").exists()
    monkeypatch.setattr(small_gemma, "train", None)  # must not be needed again
    assert demo.run(config)["saes"] == finished[0][1]["saes"]


def test_interrupted_in_the_language_model_it_begins_that_again(finished, tmp_path, monkeypatch):
    config = dataclasses.replace(finished[0][0], out=tmp_path / "run")

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(small_gemma, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            demo.run(config)
    assert demo.run(config)["saes"] == finished[0][1]["saes"]


def test_another_seed_or_text_is_another_run(config, corpus):
    first = demo.run(config)
    second = demo.run(dataclasses.replace(config, seed=1))
    assert first["saes"][0]["fvu"] != second["saes"][0]["fvu"]
    corpus.write_bytes(corpus.read_bytes().upper())
    assert demo.run(dataclasses.replace(config, seed=1))["model"]["loss"] != second["model"]["loss"]


def test_another_environment_is_no_reason_to_begin_again(finished, tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(finished[0][0], out=shutil.copytree(finished[0][0].out, tmp_path / "run"))
    identity = read_json(config.out / "identity.json")
    identity["environment"]["torch"] = "2.0.0"
    write_json(config.out / "identity.json", identity)
    monkeypatch.setattr(suite, "train", None)
    assert demo.run(config) == finished[0][1]
    assert "goes on with another environment: torch: the run has '2.0.0'" in " ".join(capsys.readouterr().err.split())


def test_fresh_starts_over(config, monkeypatch):
    demo.run(config)
    monkeypatch.setattr(small_gemma, "train", lambda *args: pytest.fail("trained again, as asked"))
    with pytest.raises(pytest.fail.Exception):
        demo.run(dataclasses.replace(config, fresh=True))
    assert not (config.out / "saes").exists()
    assert not (config.out / "checkpoints").exists()


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
        ({"out": Path("a\nb")}, "out: expected printable text"),
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


@pytest.mark.parametrize("file", ["text.jsonl", "model/model.safetensors", "model/tokenizer.json", "frequencies.npz"])
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


def test_damaged_tokens_are_named(finished, tmp_path):
    config = dataclasses.replace(finished[0][0], out=shutil.copytree(finished[0][0].out, tmp_path / "run"))
    (shard,) = (config.out / "tokens").glob("train-*")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(BadFileError, match=r"train-00000\.safetensors: "):
        demo.run(config)


@pytest.mark.parametrize("owner", [small_gemma, suite], ids=["language model", "suite"])
def test_two_seeds_in_one_folder_and_one_of_them_interrupted(finished, tmp_path, owner, monkeypatch):
    """Whichever comes next shows its own figures, and until then the folder passes for no finished run."""
    out = shutil.copytree(finished[0][0].out, tmp_path / "run")
    first, second = (dataclasses.replace(config, out=out) for config, _ in finished)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(owner, "train", interrupted)
        demo.run(second)
    with pytest.raises(BadFileError, match="expected a finished run, found"):
        read_results(out)
    for config, (_, results) in ((second, finished[1]), (first, finished[0])):
        assert demo.run(config)["saes"] == results["saes"]
        assert read_results(out)["model"]["loss"] == results["model"]["loss"]


def test_a_run_that_was_moved_is_finished_still(finished, tmp_path, monkeypatch):
    config, results = finished[0]
    shutil.copytree(config.out, tmp_path / "elsewhere")
    monkeypatch.setattr(suite, "train", None)
    monkeypatch.setattr(small_gemma, "train", None)
    monkeypatch.chdir(tmp_path)
    assert demo.run(dataclasses.replace(config, out=Path("elsewhere"))) == results


def test_a_disk_that_is_full_for_the_model(config):
    """The limit on a file's size stands in for the disk: safetensors fails to write in words of its own."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # the model has 0.2 MB
        with pytest.raises(EnvironmentProblemError, match=r"text.jsonl|model.safetensors: cannot be written: "):
            demo.run(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(config.out.rglob(".tmp-*"))


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


def sentence_rows(times):
    data = torch.tensor([*b"the cat sat on the mat. " * times], device="cpu")
    body = data[: len(data) // 32 * 32].view(-1, 32)
    return torch.cat([torch.full((len(body), 1), BOS, device="cpu"), body], 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_small_model_depends_on_no_default(dtype):
    rows = sentence_rows(40)
    config = LanguageModelConfig(n_layers=1, d_model=32, steps=2, batch_rows=4)

    def trained():
        model = small_gemma.build(config)
        small_gemma.train(model, rows, config)
        return model.state_dict()

    expected = trained()
    with defaults(dtype, "meta"):
        found = trained()
        assert text.bigram_loss(rows, rows[:2]) < 3
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_the_small_model_learns_and_keeps_its_seed():
    rows = sentence_rows(400)
    config = LanguageModelConfig(n_layers=1, d_model=32, steps=25, batch_rows=8, warmup_steps=5)
    model, twin = small_gemma.build(config), small_gemma.build(config)
    assert torch.equal(model.model.embed_tokens.weight, twin.model.embed_tokens.weight)
    losses = []
    small_gemma.train(model, rows, config, lambda step, loss: losses.append(loss))
    assert losses[-1] < 0.6 * losses[0]
    assert not model.training
