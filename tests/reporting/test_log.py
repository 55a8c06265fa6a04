"""The log of a training: appended, cut at a resume, repaired after a kill, and read."""

import errno
import json
import math
import os
import subprocess
import sys

import pytest

from gemmascope.errors import BadFileError, EnvironmentProblemError
from gemmascope.reporting import log as module
from gemmascope.reporting.log import TrainLog, read_rows, sae_of
from gemmascope.sites import Site

SITES = {"a": Site(3, "resid"), "b": Site(3, "resid"), "c": Site(0, "att")}


def figures(step):
    return {name: {"l0": 10.0 * step + i, "fvu": 0.5} for i, name in enumerate(SITES)}


def written(path, steps, step=0):
    with TrainLog(path, SITES, step=step) as log:
        for each in steps:
            log.append(each, figures(each))
    return path.read_bytes()


def test_a_row_a_line(tmp_path):
    path = tmp_path / "new folder" / "train_log.jsonl"
    with TrainLog(path, SITES) as log:
        log.append(10, {"a": {"l0": 41.5, "fvu": math.nan, "loss": math.inf, "skipped": 2}, "c": {"fvu": None}})
        log.sync()
        lines = path.read_text().splitlines()  # there before the log is closed
    assert [json.loads(line) for line in lines] == [
        {"step": 10, "sae": "a", "site": "layer_3/resid", "l0": 41.5, "fvu": None, "loss": None, "skipped": 2},
        {"step": 10, "sae": "c", "site": "layer_0/att", "fvu": None},
    ]
    assert [sae_of(row) for row in read_rows(path)] == ["a", "c"]
    log.close()
    with pytest.raises(ValueError, match="closed"):
        log.append(11, {})


@pytest.mark.parametrize("resumed", range(0, 60, 10))
def test_a_resumed_log_is_that_of_a_run_without_interruption(tmp_path, resumed):
    whole = written(tmp_path / "whole.jsonl", range(10, 60, 10))
    written(tmp_path / "cut.jsonl", range(10, 50, 10))
    assert written(tmp_path / "cut.jsonl", range(resumed + 10, 60, 10), step=resumed) == (
        whole if resumed < 50 else written(tmp_path / "x.jsonl", range(10, 50, 10))
    )


def test_every_way_a_line_can_be_cut_is_repaired(tmp_path):
    path = tmp_path / "log.jsonl"
    whole = written(path, [10, 20])
    kept = written(tmp_path / "first.jsonl", [10])
    last = whole.rindex(b"\n", 0, -1) + 1
    for size in range(len(kept), len(whole)):
        path.write_bytes(whole[:size])
        TrainLog(path, SITES, step=20).close()
        assert path.read_bytes() == whole[: whole.rindex(b"\n", 0, size) + 1 if size >= len(kept) else 0]
    path.write_bytes(whole[:last] + b'{"step": 20, "sae": "c", "site": "la')
    assert written(path, [30], step=20) == whole[:last] + written(tmp_path / "third.jsonl", [30])


def test_a_new_training_starts_a_new_log(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"anything\n")
    assert written(path, []) == b""


def test_zeros_that_a_power_failure_left_are_dropped_with_a_warning(tmp_path):
    path = tmp_path / "log.jsonl"
    whole = written(path, [10])
    path.write_bytes(whole + b"\0" * 200_000 + b"\n" + b"\0" * 7)
    with pytest.warns(RuntimeWarning, match="damaged lines at its end are dropped"):
        TrainLog(path, SITES, step=10).close()
    assert path.read_bytes() == whole


def test_damage_before_the_end_is_refused_and_left_as_it_is(tmp_path):
    path = tmp_path / "log.jsonl"
    damaged = b"[1]\n" + written(path, [10])
    path.write_bytes(damaged)
    with pytest.raises(BadFileError, match="line 1: expected an object with 'step' and 'site'"):
        TrainLog(path, SITES, step=10)
    assert path.read_bytes() == damaged


def test_a_full_disk_is_an_error_and_leaves_whole_rows(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    whole = written(path, [10])
    real = os.write

    def full(descriptor, data):
        if len(data) < 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, bytes(data)[:40])

    with TrainLog(path, SITES, step=10) as log:
        monkeypatch.setattr(module.os, "write", full)
        with pytest.raises(EnvironmentProblemError, match=r"log.jsonl: cannot be written: No space left on device"):
            log.append(20, figures(20))
        monkeypatch.setattr(module.os, "write", real)
        assert path.read_bytes() == whole
        log.append(20, figures(20))
    assert path.read_bytes() == written(tmp_path / "other.jsonl", [10, 20])


def test_where_no_file_can_be(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "log.jsonl"):
        with pytest.raises(EnvironmentProblemError, match="cannot be written"):
            TrainLog(path, SITES)
    with pytest.raises(ValueError, match="path: expected a path"):
        TrainLog(tmp_path / "a\0b", SITES)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"path": 3}, TypeError, "path: expected a str"),
        ({"sites": 3}, TypeError, "sites: expected a Mapping, got int"),
        ({"sites": {"a": "layer_0/att"}}, TypeError, r"sites\['a'\]: expected a Site, got str"),
        ({"sites": {3: SITES["a"]}}, TypeError, "sites: key: expected a str, got int"),
        ({"step": -1}, ValueError, "step: expected at least 0"),
    ],
)
def test_refusals(tmp_path, arguments, error, message):
    with pytest.raises(error, match=f"^{message}"):
        TrainLog(**({"path": tmp_path / "log", "sites": SITES} | arguments))


def test_rows_that_are_none(tmp_path):
    with TrainLog(tmp_path / "log", SITES) as log:
        with pytest.raises(ValueError, match="rows: expected SAEs among sites, got 'd'"):
            log.append(1, {"a": {"l0": 1.0}, "d": {}})
        with pytest.raises(ValueError, match=r"rows\['a'\]\['l0'\]: expected a number or None, got 'x'"):
            log.append(1, {"a": {"l0": "x"}})
    assert (tmp_path / "log").read_bytes() == b""


def test_a_kill_at_any_time_leaves_rows_that_a_resume_goes_on_from(tmp_path):
    program = (
        "import sys\n"
        "from gemmascope.reporting.log import TrainLog\n"
        "from gemmascope.sites import Site\n"
        "log = TrainLog(sys.argv[1], {'a': Site(0, 'att')})\n"
        "for step in range(1, 1_000_000):\n"
        "    log.append(step, {'a': {'l0': step}})\n"
        "    if step == 100: print('running', flush=True)\n"
    )
    path = tmp_path / "log.jsonl"
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"running\n"
        process.kill()
    with TrainLog(path, {"a": SITES["c"]}, step=90) as log:
        log.append(91, {"a": {"l0": 91}})
    assert [(row["step"], row["l0"]) for row in read_rows(path)] == [(step, step) for step in range(1, 92)]


def test_long_logs_are_thinned_by_whole_steps(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    written(path, range(10, 210, 10))
    monkeypatch.setattr(module, "MAX_ROWS", 20)
    rows = read_rows(path)
    assert [row["step"] for row in rows] == [step for step in range(10, 210, 40) for _ in SITES]


def test_one_step_of_very_many_saes_is_read_whole(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    written(path, [10])
    monkeypatch.setattr(module, "MAX_ROWS", 2)
    assert len(read_rows(path)) == 3


def test_rows_of_before_saes_had_names(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "site": "layer_0/att", "l0": 3.0}\n')
    (row,) = read_rows(path)
    assert row == {"step": 1, "site": "layer_0/att", "l0": 3.0}
    assert sae_of(row) == "layer_0/att"
    path.write_text('{"step": 1, "sae": 3, "site": "layer_0/att"}\n')
    with pytest.raises(BadFileError, match="line 1"):
        read_rows(path)
