"""What goes wrong around a run, and within it: each fault has a defined outcome, and none costs the run."""

import errno
import json
import os
import random
import signal
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from gemmascope.__main__ import main
from gemmascope.activations import Harvester
from gemmascope.commands import train
from gemmascope.reporting import read_results
from gemmascope.reporting.results import read_log
from gemmascope.reporting.trackers import Trackers
from gemmascope.runs import Run
from gemmascope.sites import Site
from gemmascope.suite.run import train_suite
from gemmascope.training import SAETrainer
from tests.suite.small_runs import config, hash_of, tables, write_config

pytestmark = pytest.mark.filterwarnings("ignore:.*never fired:RuntimeWarning")


@pytest.fixture
def make(tmp_path, model_folder, text_file):
    return lambda **sections: config(model_folder, text_file, tmp_path / "run", **sections)


@pytest.fixture
def command(tmp_path, model_folder, text_file, monkeypatch):
    """The arguments of ``gemmascope train`` for a run in ``run``."""
    monkeypatch.setattr(train, "present", lambda run, results: None)
    file = write_config(tmp_path / "config.toml", tables(model_folder, text_file, tmp_path / "run"))
    return ["train", str(file)]


def last_line(capsys) -> str:
    return capsys.readouterr().err.splitlines()[-1]


# ---- a full disk


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_a_disk_that_is_full_at_every_file(command, tmp_path, monkeypatch, capsys, undisturbed):
    """Where the file system notices last: when the file is flushed. Each time the same command goes on."""
    flush, full, steps = os.fsync, [""], []

    def fsync(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if full[0] and full[0] in path and not os.path.isdir(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    for name in (
        "run/stages.json",
        "train-00000.safetensors",
        "tokens/.tmp",
        "identity.json",
        "0000-sae-0000.safetensors",
        "step-000000010/manifest.json",
        "train_log.jsonl",
        "params.npz",
        "frequencies.npz",
        "results.json",
    ):
        full[0] = name.removeprefix("run/")
        assert main(command) == 4, name
        line = last_line(capsys)
        assert line.startswith("gemmascope: error: ")
        assert "No space left on device" in line, name
        steps.append(sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")))
    assert steps[4] == []
    assert steps[5] == ["step-000000005"]
    full[0] = ""
    assert main(command) == 0
    assert hash_of(tmp_path / "run") == hash_of(undisturbed)
    assert not list((tmp_path / "run").rglob(".tmp-*"))


@pytest.mark.parametrize("nth", [3, 40])
def test_a_disk_that_is_full_at_any_write(command, tmp_path, monkeypatch, capsys, undisturbed, nth):
    """Of a checkpoint or the log, half of which is then written."""
    write, left = os.write, [nth]

    def writing(descriptor, data):
        if descriptor > 2 and b"pid" not in bytes(data[:8]):
            left[0] -= 1
            if left[0] == 0:
                write(descriptor, data[: len(data) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", writing)
        assert main(command) == 4
    assert "No space left on device" in last_line(capsys)
    assert main(command) == 0
    assert hash_of(tmp_path / "run") == hash_of(undisturbed)
    assert read_log(tmp_path / "run") == read_log(undisturbed)


def test_files_that_may_not_grow(worker, command, tmp_path, undisturbed):
    """A quota, of the kernel's: smaller than the tokens, than a checkpoint, than the log, than the results."""
    results = (undisturbed / "results.json").stat().st_size
    for limit in (1000, 6000, results - 100):
        assert worker(arguments=command, output=str(tmp_path), limit=limit) == {"exit": 4}, limit
        err = (tmp_path / "err").read_text()
        assert err.splitlines()[-1].startswith("gemmascope: error: ")
        assert "File too large" in err
    assert worker(arguments=command, output=str(tmp_path)) == {"exit": 0}
    assert hash_of(tmp_path / "run") == hash_of(undisturbed)


# ---- two runs


def test_two_runs_in_one_folder(command, make, tmp_path, capsys, undisturbed):
    with Run(tmp_path / "run", kind="training"):
        assert main(command) == 4
        assert f"expected no other process to work in it, found pid {os.getpid()} on " in last_line(capsys)
    (tmp_path / "run" / "run.lock").write_text("pid 1 on elsewhere\n")  # of a process that was killed
    assert main(command) == 0
    assert hash_of(tmp_path / "run") == hash_of(undisturbed)


def test_two_runs_at_once(worker, tmp_path, model_folder, text_file, undisturbed):
    one, other = (tables(model_folder, text_file, tmp_path / name) for name in ("one", "other"))
    assert worker.at_once({"tables": one}, {"tables": other}) == [{"exit": 0}] * 2
    assert hash_of(tmp_path / "one") == hash_of(tmp_path / "other") == hash_of(undisturbed)


# ---- trackers


class TrackerDownError(RuntimeError):
    pass


class FakeRun:
    def __init__(self, broken: str):
        self.broken = broken
        self._may_fail("init")

    def log(self, metrics, step):
        self._may_fail("log")

    def finish(self):
        self._may_fail("finish")

    def _may_fail(self, what: str) -> None:
        if self.broken == what:
            raise TrackerDownError("no network")
        if self.broken == f"{what} hangs":
            time.sleep(20)


@pytest.mark.parametrize("broken", ["init", "log", "finish", "log hangs"])
def test_a_dead_tracker(make, monkeypatch, tmp_path, undisturbed, broken):
    fake = types.ModuleType("wandb")
    fake.init = lambda **options: FakeRun(broken)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(Trackers.finish, "__defaults__", (0.2,))
    with pytest.warns(RuntimeWarning) as warned:
        train_suite(make(run={"trackers": ["wandb"]}))
    ours = [str(each.message) for each in warned if str(each.message).startswith("wandb: ")]
    assert len(ours) == 1
    assert ("hangs" if "hangs" in broken else "no network") in ours[0]
    assert hash_of(tmp_path / "run") == hash_of(undisturbed)
    assert read_log(tmp_path / "run") == read_log(undisturbed)


def test_a_tracker_that_is_not_installed(make, monkeypatch, tmp_path, undisturbed):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.warns(RuntimeWarning, match="pip install trackio"):
        train_suite(make(run={"trackers": ["trackio"]}))
    assert hash_of(tmp_path / "run") == hash_of(undisturbed)


# ---- clocks


def test_clocks_that_jump(make, monkeypatch, tmp_path, undisturbed):
    """The wall clock goes back, and far ahead; files have times of any order."""
    draw = random.Random(0)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: draw.choice([0.0, 1e9, 4e9]))
        patch.setattr(time, "time_ns", lambda: int(time.time() * 1e9))
        update, left = SAETrainer.update, [50]

        def updated(self, x):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            update(self, x)

        patch.setattr(SAETrainer, "update", updated)
        assert train_suite(make()) is None
        newest, oldest = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[::-1]
        os.utime(newest, (0, 0))
        os.utime(oldest, (4e9, 4e9))
        before = len(read_log(tmp_path / "run"))
        assert train_suite(make()) is not None
    assert before > 0
    assert hash_of(tmp_path / "run") == hash_of(undisturbed)
    assert read_log(tmp_path / "run") == read_log(undisturbed)


# ---- numbers that are not finite


def not_finite_at(monkeypatch, site: Site, block: int) -> None:
    fill = Harvester.fill

    def filled(self, number, ring):
        fill(self, number, ring)
        if number == block:
            ring.activations[site][3, 5] = torch.nan
            ring.norms[site][3] = torch.nan

    monkeypatch.setattr(Harvester, "fill", filled)


@pytest.mark.parametrize("block", [0, 1])
def test_activations_that_are_not_finite_are_never_trained_on(
    command, monkeypatch, tmp_path, capsys, undisturbed, block
):
    with monkeypatch.context() as patch:
        not_finite_at(patch, Site(1, "att"), block)
        assert main(command) == 4
    assert "site layer_1/att: expected finite activations, found NaN or Inf in 1 of the" in last_line(capsys)
    saved = list((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert bool(saved) == (block > 0)
    assert main(command) == 0
    assert hash_of(tmp_path / "run") == hash_of(undisturbed)


def spoil(monkeypatch, names: list[str], step: int) -> None:
    """From that step on the weights of these SAEs are NaN."""
    update = SAETrainer.update

    def updated(self, x):
        if self.step == step and self.sae.metadata.get("site") in names:
            with torch.no_grad():
                self.sae.W_enc.fill_(torch.nan)
        update(self, x)

    monkeypatch.setattr(SAETrainer, "update", updated)


def test_one_sae_that_is_nan_is_parked(command, monkeypatch, tmp_path, capsys, undisturbed):
    from gemmascope.formats.files import read_json

    spoil(monkeypatch, [Site(1, "resid").name], 4)
    with pytest.warns(RuntimeWarning, match="layer_1/resid.*not finite in the last 10 updates"):
        assert main(command) == 0
    results = read_json(tmp_path / "run" / "results.json")
    assert list(results["parked"]) == ["layer_1/resid/width_48/target_l0_6"]
    assert [row["name"] for row in results["saes"]] == [
        "layer_0/mlp/width_32/target_l0_4",
        "layer_0/mlp/width_32/target_l0_8",
        "layer_1/att/width_48/target_l0_6",
    ]
    ours, theirs = hash_of(tmp_path / "run"), hash_of(undisturbed)
    assert len(ours) == 3
    assert all(theirs[path] == digest for path, digest in ours.items())


def test_all_of_them_parked(command, monkeypatch, tmp_path, capsys, undisturbed):
    """The line says what may be done."""
    with monkeypatch.context() as patch:
        spoil(patch, [Site(1, "resid").name, Site(1, "att").name, Site(0, "mlp").name], 11)
        assert main(command) == 5
    line = last_line(capsys)
    assert "lower the learning rate" in line
    assert "--fresh" in line
    assert not (tmp_path / "run" / "saes").exists()
    assert main([*command, "--fresh"]) == 0
    assert hash_of(tmp_path / "run") == hash_of(undisturbed)


# ---- the text


def documents(file: Path, count: int, words: int = 60) -> Path:
    """Names of their own: those by the file's would be held out or not by where the test's folder is."""
    lines = [
        {"source": "tests", "name": f"document {i}", "text": f"{i} " + "the of and to " * words} for i in range(count)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_more_tokens_than_text(tmp_path, model_folder):
    text = documents(tmp_path / "text.jsonl", 8, 30)
    results = train_suite(config(model_folder, text, tmp_path / "run"))
    assert results is not None
    assert results["model"]["tokens"] == 24 * 120
    assert results["counts"]["harvested"] > 0


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_documents(tmp_path, model_folder, capsys, count):
    text = documents(tmp_path / "text.jsonl", count)
    file = write_config(tmp_path / "config.toml", tables(model_folder, text, tmp_path / "run"))
    assert main(["train", str(file)]) == 2
    line = last_line(capsys)
    assert "documents: expected " in line
    assert ("give more documents" in line) == (count == 1)


def test_less_text_than_a_batch_is_read_again(tmp_path, model_folder):
    text = documents(tmp_path / "text.jsonl", 6, 1)
    file = write_config(tmp_path / "config.toml", tables(model_folder, text, tmp_path / "run"))
    assert main(["train", str(file)]) == 0
    assert len(read_results(tmp_path / "run")["saes"]) == 4
