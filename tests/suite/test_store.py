"""Activations by way of the disk, SAEs alone and together, and SAEs that start from those of another run."""

import signal
from pathlib import Path

import pytest

from gemmascope import JumpReLUSAE
from gemmascope.__main__ import main
from gemmascope.commands import train
from gemmascope.formats.files import read_json
from gemmascope.suite.run import train_suite
from tests.suite.small_runs import config, hash_of, tables, write_config

pytestmark = pytest.mark.filterwarnings("ignore:.*never fired:RuntimeWarning")


@pytest.fixture
def file(tmp_path, model_folder, text_file, monkeypatch) -> str:
    monkeypatch.setattr(train, "present", lambda run, results: None)
    return str(write_config(tmp_path / "config.toml", tables(model_folder, text_file, tmp_path / "run")))


@pytest.fixture(scope="module")
def store(tmp_path_factory, worker, model_folder, text_file) -> Path:
    """Harvested with interruptions; of the config that `undisturbed` was trained by."""
    folder = tmp_path_factory.mktemp("harvest")
    made = write_config(folder / "config.toml", tables(model_folder, text_file, folder / "run"))
    arguments = ["harvest", str(made), "--out", str(folder / "store")]
    options = {"arguments": arguments, "output": str(folder)}
    assert worker(**options, signals=[["harvesting", 20, signal.SIGKILL]]) == {"signal": 9}
    assert worker(**options, signals=[["harvesting", 20, signal.SIGINT]]) == {"exit": 130}
    assert (folder / "err").read_text().splitlines()[-1] == (
        "gemmascope: error: interrupted; the same command goes on after the last finished superblock"
    )
    assert worker(**options) == {"exit": 0}
    assert "superblocks at 3 sites in" in (folder / "out").read_text()
    return folder / "store"


def test_from_a_store_come_the_bits_of_streaming(file, store, tmp_path, undisturbed):
    assert main(["train", file, "--from-store", str(store)]) == 0
    assert hash_of(tmp_path / "run") == hash_of(undisturbed)


def test_a_run_may_change_over_to_a_store(worker, file, store, tmp_path, undisturbed):
    options = {"output": str(tmp_path), "signals": [["stepping", 40, signal.SIGTERM]]}
    assert worker(arguments=["train", file], **options) == {"exit": 0}
    assert main(["train", file, "--from-store", str(store)]) == 0
    assert hash_of(tmp_path / "run") == hash_of(undisturbed)


@pytest.mark.parametrize(
    ("setting", "code", "message"),
    [
        ("suite.seed=1", 3, "seed: the store has 0, this run 1"),
        ("activations.dtype=bfloat16", 2, "expected float32 as in"),
        ("activations.ring_tokens=2048", 3, "rows_per_block: the store has 32, this run 64"),
        ("text.context=16", 3, "context: the store has 32, this run 16"),
        ("suite.tokens=12000", 2, "harvest again"),
    ],
)
def test_a_store_of_something_else(file, store, capsys, tmp_path, setting, code, message):
    assert main(["train", file, "--from-store", str(store), "--set", setting]) == code
    line = capsys.readouterr().err.splitlines()[-1]
    assert message in line
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def test_a_damaged_shard_is_named_and_made_again(file, store, capsys, tmp_path, undisturbed):
    shard = store / "superblock-000001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    assert main(["train", file, "--from-store", str(store)]) == 3
    assert shard.name in capsys.readouterr().err.splitlines()[-1]
    shard.unlink()
    assert main(["train", file, "--from-store", str(store)]) == 3
    assert shard.name in capsys.readouterr().err.splitlines()[-1]
    assert main(["harvest", file, "--out", str(store)]) == 0
    assert main(["train", file, "--from-store", str(store)]) == 0
    assert hash_of(tmp_path / "run") == hash_of(undisturbed)


def test_a_harvest_leaves_the_text_of_a_run_alone(file, store, capsys, tmp_path, undisturbed):
    assert main(["train", file, "--from-store", str(store)]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run" / "tokens").iterdir()}
    assert main(["harvest", file, "--out", str(tmp_path / "other"), "--set", "text.context=16"]) == 2
    assert "text: expected that of the run" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "run" / "tokens").iterdir()} == before


@pytest.mark.parametrize(
    "block",
    [
        {"d_sae": 48, "target_l0": 6, "sites": ["layer_1/resid"]},
        {"d_sae": 32, "target_l0": 8, "sites": ["layer_0/mlp"]},
    ],
    ids=["of three sites", "of two at one site"],
)
def test_an_sae_alone_is_that_of_a_suite(tmp_path, model_folder, text_file, undisturbed, block):
    suite = {"sites": block["sites"], "sae": [block]}
    train_suite(config(model_folder, text_file, tmp_path / "run", suite=suite))
    alone, together = hash_of(tmp_path / "run"), hash_of(undisturbed)
    assert len(alone) == 1
    assert set(alone.values()) <= set(together.values())


def test_going_on_from_the_sae_of_a_run(tmp_path, model_folder, text_file, undisturbed):
    first = next(undisturbed.glob("saes/resid/**/params.npz"))
    block = {"d_sae": 48, "target_l0": 6, "sites": ["layer_1/resid"], "init_from": str(first)}
    suite = {"sites": ["layer_1/resid"], "sae": [block]}
    results = train_suite(config(model_folder, text_file, tmp_path / "run", suite=suite))
    assert results is not None
    [row] = results["saes"]
    tuned, before = JumpReLUSAE.load(tmp_path / "run" / row["path"]), JumpReLUSAE.load(first)
    assert tuned.metadata["init_from"] == str(first)
    scratch = next(row for row in read_rows(undisturbed) if row["name"] == "layer_1/resid/width_48/target_l0_6")
    assert row["fvu"] < scratch["fvu"]
    assert (tuned.W_dec - before.W_dec).norm() < 0.5 * before.W_dec.norm()


def read_rows(folder: Path) -> list[dict]:
    return read_json(folder / "results.json")["saes"]
