"""The run folder: what is done stays done, what was interrupted is not, and one process at a time works in it."""

import json
import os
import subprocess
import sys
from contextlib import suppress

import pytest

from gemmascope import runs
from gemmascope.errors import EnvironmentProblemError
from gemmascope.runs import Run, key_of

# Does stage a, begins stage b, says so and waits to be killed.
WORKER = """
import sys, time
from pathlib import Path
from gemmascope.runs import Run

run = Run(sys.argv[1])
with run.doing("a", "key"):
    pass
with run.doing("b", "key"):
    Path(sys.argv[1], "b.bin").write_bytes(b"half")
    print("ready", flush=True)
    time.sleep(300)
"""


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "a"


def do(folder, stage="a", key="key", **facts):
    with Run(folder) as run, run.doing(stage, key) as left:
        left.update(facts)


def test_what_was_done_is_found_again(folder):
    do(folder, paths={"x": "y"})
    with Run(folder) as run:
        assert run.done("a", "key")
        assert run.facts("a")["paths"] == {"x": "y"}
        assert run.facts("a")["seconds"] >= 0
        assert not run.done("b", "key")
        assert run.facts("b") == {}


def test_another_key_or_a_missing_file(folder):
    do(folder)
    file = folder / "a.bin"
    with Run(folder) as run:
        assert not run.done("a", "other")
        assert not run.done("a", "key", file)
        file.touch()
        assert run.done("a", "key", file)


def test_keys():
    assert key_of("a", {"x": 1, "y": 2}) == key_of("a", {"y": 2, "x": 1})
    assert len({key_of("a"), key_of("a", None), key_of("b"), key_of(1), key_of("1")}) == 5
    assert len(key_of()) == 16


def test_fresh_forgets(folder):
    do(folder)
    with Run(folder, fresh=True) as run:
        assert not run.done("a", "key")
    with Run(folder) as run:
        assert not run.done("a", "key")


def test_a_stage_done_again_is_not_done_until_it_ends(folder):
    do(folder)
    do(folder, "b")
    with Run(folder) as run:
        with suppress(KeyboardInterrupt), run.doing("a", "other"):
            assert not run.done("a", "key")
            assert list(json.loads((folder / "stages.json").read_text())) == ["b"]
            raise KeyboardInterrupt
        assert not run.done("a", "key")
        assert not run.done("a", "other")
    with Run(folder) as run:  # its files may be those of the other key by now
        assert not run.done("a", "key")
        assert run.done("b", "key")


def test_facts_that_json_cannot_hold(folder):
    with Run(folder) as run:
        with pytest.raises(ValueError, match="values that JSON can hold"), run.doing("a", "key") as facts:
            facts["loss"] = float("nan")
        assert not run.done("a", "key")
        with run.doing("a", "key"):
            pass
        assert run.done("a", "key")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '[["a", {}]]', '{"a": {"key": "key", "seconds": NaN}}', "\xff"], ids=repr
)
def test_damaged_stages_count_as_none(folder, text):
    do(folder)
    (folder / "stages.json").write_bytes(text.encode("latin-1"))
    with Run(folder) as run:
        assert run.stages == {}
    assert json.loads((folder / "stages.json").read_text()) == {}


def test_a_damaged_stage_is_not_done(folder):
    do(folder)
    path = folder / "stages.json"
    damaged = {"b": 3, "c": {"key": ["key"], "seconds": 1}, "d": {"key": "key"}, "e": {"key": "key", "seconds": "1"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | damaged))
    with Run(folder) as run:
        assert list(run.stages) == ["a"]


def test_a_folder_of_something_else_is_left_alone(folder):
    folder.mkdir(parents=True)
    (folder / "thesis.tex").touch()
    for fresh in (False, True):
        with pytest.raises(ValueError, match="out: expected a new folder or that of an earlier study, found other"):
            Run(folder, fresh, kind="study")
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


def test_a_run_killed_before_its_first_stage_is_taken_up(folder):
    folder.mkdir(parents=True)
    (folder / "run.lock").touch()
    (folder / ".tmp-0123.json").touch()
    with Run(folder) as run:
        assert run.stages == {}


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "a"):
        with pytest.raises(EnvironmentProblemError, match=r"file.*: cannot be locked: "):
            Run(folder)


def test_one_run_at_a_time_in_this_process(folder):
    with Run(folder), pytest.raises(EnvironmentProblemError, match=f"found pid {os.getpid()} on "):
        Run(folder)
    run = Run(folder)
    run.close()
    run.close()
    with pytest.raises(ValueError, match="expected an open run, found it closed"), run.doing("a", "key"):
        pass
    assert (folder / "run.lock").read_bytes() == b""


def test_a_run_that_cannot_begin_lets_go_of_the_folder(folder, monkeypatch):
    def full(path, stages):
        raise EnvironmentProblemError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(runs, "write_json", full)
        with pytest.raises(EnvironmentProblemError, match="no space left"):
            Run(folder)
    Run(folder).close()


@pytest.mark.parametrize("text", [b"", b"\xff\xfe", b"pid 1\x1b[2J"])
def test_a_holder_that_has_not_said_who_it_is(folder, text):
    with Run(folder):
        (folder / "run.lock").write_bytes(text)
        with pytest.raises(EnvironmentProblemError, match=r"work in it, found one$"):
            Run(folder)


def test_without_fcntl_a_warning_says_so(folder, monkeypatch):
    monkeypatch.setattr(runs, "fcntl", None)
    with pytest.warns(RuntimeWarning, match="not locked, this platform has no fcntl"):
        run = Run(folder)
    with run, run.doing("a", "key"):
        pass
    assert run.done("a", "key")
    assert not (folder / "run.lock").exists()


def test_two_processes_and_one_of_them_killed_in_a_stage(folder):
    with subprocess.Popen([sys.executable, "-c", WORKER, str(folder)], stdout=subprocess.PIPE, text=True) as worker:
        try:
            assert worker.stdout.readline() == "ready\n"
            with pytest.raises(EnvironmentProblemError) as refused:
                Run(folder)
        finally:
            worker.kill()  # SIGKILL
    assert str(refused.value).startswith(
        f"{folder}: expected no other process to work in it, found pid {worker.pid} on "
    )
    with Run(folder) as run:
        assert run.done("a", "key")
        assert not run.done("b", "key", folder / "b.bin")
