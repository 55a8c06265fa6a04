"""The commands train and harvest as a user meets them: signals, streams that close, what changed, what is wrong."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from gemmascope.__main__ import main
from gemmascope.commands import train
from gemmascope.formats.files import read_json, write_json
from gemmascope.reporting.results import read_log
from gemmascope.training.checkpoint import Checkpoints
from tests.suite.small_runs import hash_of, tables, write_config, write_model, write_text

pytestmark = pytest.mark.filterwarnings("ignore:.*never fired:RuntimeWarning")

GOES_ON = "stopped; the same command goes on from there"


@pytest.fixture
def command(tmp_path, model_folder, text_file):
    """The arguments of ``gemmascope train`` for a run in ``run``."""
    file = write_config(tmp_path / "config.toml", tables(model_folder, text_file, tmp_path / "run"))
    return ["train", str(file)]


@pytest.fixture
def no_report(monkeypatch):
    monkeypatch.setattr(train, "present", lambda run, results: None)


@pytest.fixture
def shown(tmp_path):
    """What the latest process of the worker wrote to standard error."""
    return lambda: (tmp_path / "err").read_text()


# ---- signals


def test_a_signal_in_any_phase_ends_in_good_order(worker, command, tmp_path, undisturbed, shown):
    phases = ["loading", "tokenising", "measuring", "harvesting", "stepping", "writing", "retention", "saving"]
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    for index, event in enumerate([*phases, "judging"]):
        count = {"tokenising": 20, "harvesting": 5, "stepping": 10, "writing": 20}.get(event, 1)
        signals = [[event, count, numbers[index % 3]]]
        ended = worker(arguments=command, output=str(tmp_path), signals=signals)
        assert ended == {"exit": 0}, (event, shown())
        assert shown().endswith(f"run: {GOES_ON}\n"), event
        assert "Traceback" not in shown()
    assert worker(arguments=command, output=str(tmp_path)) == {"exit": 0}
    assert "SAEs in" in (tmp_path / "out").read_text()
    assert hash_of(tmp_path / "run") == hash_of(undisturbed)
    assert read_log(tmp_path / "run") == read_log(undisturbed)


def test_the_second_signal_ends_the_process_at_once(worker, command, tmp_path, undisturbed, shown):
    signals = [["stepping", 30, signal.SIGINT], ["writing", 3, signal.SIGTERM]]
    ended = worker(arguments=command, output=str(tmp_path), signals=signals)
    assert ended == {"exit": 128 + signal.SIGTERM}
    assert "stopped" not in shown()
    assert worker(arguments=command, output=str(tmp_path)) == {"exit": 0}
    assert hash_of(tmp_path / "run") == hash_of(undisturbed)


def test_a_real_process(command, tmp_path):
    """As a scheduler ends it: SIGTERM to ``python -m gemmascope train``."""
    arguments = [*command, "--set", "suite.tokens=10M", "--set", "checkpoint.steps=20"]
    checkpoints = tmp_path / "run" / "checkpoints"
    process = subprocess.Popen(
        [sys.executable, "-m", "gemmascope", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while not any(checkpoints.glob("step-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert GOES_ON in err
    step = re.search(r"training: saved at step ([\d,]+)", err)
    assert step is not None
    with Checkpoints(checkpoints, identity={}) as found:
        latest = found.latest()
    assert latest is not None
    assert latest.step == int(step[1].replace(",", ""))


def test_ctrl_c_during_the_imports(command):
    code = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Interrupts:\n"
        "    def find_spec(name, path, target=None):\n"
        "        if name == 'gemmascope.suite.run':\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupts)\n"
        "from gemmascope.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, timeout=300, check=False
    )
    assert (finished.returncode, finished.stdout) == (130, "")
    assert finished.stderr == "gemmascope: error: interrupted; the same command goes on where it was\n"


# ---- streams


@pytest.mark.parametrize(("gone", "code"), [([1], 141), ([2], 0), ([1, 2], 141)], ids=["out", "err", "both"])
def test_readers_that_go_away_leave_the_training_alone(worker, command, tmp_path, undisturbed, gone, code):
    """As in ``gemmascope train … | head -1``; the results, which are printed last, are then lost to the pipe alone."""
    assert worker(arguments=command, output=str(tmp_path), gone=gone) == {"exit": code}
    assert hash_of(tmp_path / "run") == hash_of(undisturbed)
    assert read_log(tmp_path / "run") == read_log(undisturbed)
    assert (tmp_path / "run" / "results.json").exists()


def test_no_streams_at_all(command, monkeypatch, tmp_path, undisturbed, no_report):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(command) == 0
    assert hash_of(tmp_path / "run") == hash_of(undisturbed)


def test_the_plan_and_the_progress_leave_standard_output_to_the_results(command, capsys, tmp_path, undisturbed):
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert "parameters" in err
    assert "parameters" not in out
    assert "report.html" in out
    assert (tmp_path / "run" / "report.html").is_file()


# ---- what changed


def begin(worker, command, tmp_path) -> None:
    """A run that was stopped after a few steps."""
    assert worker(arguments=command, output=str(tmp_path), signals=[["stepping", 40, signal.SIGTERM]]) == {"exit": 0}
    assert any((tmp_path / "run" / "checkpoints").glob("step-*"))


def refused(capsys, code: int, arguments: list[str]) -> str:
    """The line of a command that fails with that code."""
    capsys.readouterr()
    assert main(arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("gemmascope: error: ")]
    assert len(lines) == 1
    assert "Traceback" not in err
    return lines[0]


def test_another_config_and_fresh(worker, command, tmp_path, capsys, undisturbed, no_report):
    other = [*command, "--set", "suite.seed=1"]
    begin(worker, other, tmp_path)
    line = refused(capsys, 2, command)
    assert "suite.seed: the run has 1, now 0" in line
    assert "--fresh" in line
    assert main([*command, "--fresh"]) == 0
    assert hash_of(tmp_path / "run") == hash_of(undisturbed)


def test_another_text(worker, tmp_path, model_folder, capsys, undisturbed, text_file, no_report):
    """The tokens of the run stay: what was written back goes on without another look at it."""
    text = write_text(tmp_path / "text.jsonl")
    command = ["train", str(write_config(tmp_path / "a.toml", tables(model_folder, text, tmp_path / "run")))]
    begin(worker, command, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "tokens").iterdir()}
    write_text(text, seed=1)
    line = refused(capsys, 2, command)
    assert "text: expected that of the run" in line
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "tokens").iterdir()} == before
    write_text(text)
    assert main(command) == 0
    write_text(text, seed=1)
    assert "text: expected that of the run" in refused(capsys, 2, command)
    assert main([*command, "--fresh"]) == 0


def test_another_model_and_environment(worker, tmp_path, text_file, capsys, no_report):
    model = write_model(tmp_path / "model")
    command = ["train", str(write_config(tmp_path / "a.toml", tables(model, text_file, tmp_path / "run")))]
    begin(worker, command, tmp_path)
    write_model(model, seed=1)
    assert "--allow-model-change" in refused(capsys, 2, command)
    identity = read_json(tmp_path / "run" / "identity.json")
    identity["environment"]["torch"] = "2.0.0"
    write_json(tmp_path / "run" / "identity.json", identity)
    line = refused(capsys, 2, [*command, "--allow-model-change"])
    assert "torch: the run has '2.0.0'" in line
    assert "--allow-environment-change" in line
    assert main([*command, "--allow-model-change", "--allow-environment-change"]) == 0
    assert main(command) == 0


# ---- configs


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("suite.sae.d_sea=8", "suite.sae[0].d_sea: "),
        ("suite.batch_size=0", "suite.batch_size: expected at least 1, got 0"),
        ("suite.tokens=1e999", "suite.tokens: "),
        ("activations.drop_norm=nan", "activations.drop_norm: "),
        ("suite.sites=['layer_9/resid']", "suite.sites[0]: expected sites among"),
        ("run.device=cuda:7", "run.device: "),
        ("run.trackers=['mlflow']", "run.trackers[0]: "),
        ("model.name=none/such/model", "model.name: expected a folder or OWNER/NAME"),
        ("nonsense", ""),
    ],
)
def test_a_wrong_setting_is_named(command, capsys, tmp_path, setting, message):
    code = 4 if "cuda" in setting else 2
    assert message in refused(capsys, code, [*command, "--set", setting])
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_config_that_is_not_there(tmp_path, capsys):
    assert "none.toml" in refused(capsys, 2, ["train", str(tmp_path / "none.toml")])
    assert "config: expected a file or --preset" in refused(capsys, 2, ["train"])
    (tmp_path / "bad.toml").write_text("[model\n")
    assert "bad.toml" in refused(capsys, 2, ["train", str(tmp_path / "bad.toml")])
    (tmp_path / "latin.toml").write_bytes(b"[model]\nname = '\xe9'\n")
    assert "latin.toml" in refused(capsys, 2, ["train", str(tmp_path / "latin.toml")])


# ---- plans


def test_a_plan_changes_nothing_on_the_disk(command, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert main([*command, "--plan"]) == 0
    assert "parameters" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_plan_that_cannot_fit(command, tmp_path, capsys):
    huge = [*command, "--set", "suite.sae.d_sae=16777216", "--set", "activations.ring_tokens=1073741824"]
    before = sorted(tmp_path.rglob("*"))
    assert main([*huge, "--plan"]) == 4
    out, err = capsys.readouterr()
    assert "does not fit: " in out
    assert re.search(r"GiB.*GiB", err), err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert re.search(r"GiB.*GiB", refused(capsys, 4, huge))
    assert not (tmp_path / "run" / "checkpoints").exists()


# ---- folders


def test_folders_that_cannot_be(command, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    before = sorted(tmp_path.rglob("*"))
    for code, out in [
        (2, tmp_path / "file"),
        (4, tmp_path / "file" / "run"),
        (2, tmp_path / "other"),
        (4, tmp_path / ("long" * 100)),
        (4, "/proc/run"),
    ]:
        assert re.match(
            "gemmascope: error: .*" + re.escape(str(out)), refused(capsys, code, [*command, "--out", str(out)])
        )
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(command, tmp_path, capsys):
    (tmp_path / "run").mkdir(mode=0o500)
    assert "Permission denied" in refused(capsys, 4, command)
