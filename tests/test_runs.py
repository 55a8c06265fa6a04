"""The run folder: what is done stays done, what was interrupted is not, and one process at a time works in it."""

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from gemmascope import runs
from gemmascope.errors import BadFileError, EnvironmentProblemError
from gemmascope.formats import files
from gemmascope.formats.files import atomic_write, read_json, write_json
from gemmascope.runs import Run, check_finished, key_of

# Does stage a, begins stage b, says so and waits to be killed.
WORKER = """
import sys, time
from pathlib import Path
from gemmascope.runs import Run

run = Run(sys.argv[1])
with run.stage("a").doing():
    pass
with run.stage("b").doing():
    Path(sys.argv[1], "b.bin").write_bytes(b"half")
    print("ready", flush=True)
    time.sleep(300)
"""


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "a"


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch):
    """What a killed process wrote is there for the next one, flushed to the disk or not."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def do(folder, name="a", *settings, content="content", **facts):
    with Run(folder) as run, run.stage(name, *settings).doing() as stage:
        write_json(folder / f"{name}.json", content)
        stage.keep(folder / f"{name}.json")
        stage.facts.update(facts)


# ---- stages and keys


def test_what_was_done_is_found_again(folder):
    do(folder, "a", "x", loss=2.5)
    with Run(folder) as run:
        stage = run.stage("a", "x")
        assert stage.done()
        assert stage.facts == {"loss": 2.5}
        assert stage.seconds >= 0
        for other in (run.stage("a", "y"), run.stage("b", "x")):
            assert not other.done()
            assert (other.facts, other.seconds) == ({}, 0)


def test_a_missing_file(folder):
    do(folder)
    (folder / "a.json").unlink()
    with Run(folder) as run:
        assert not run.stage("a").done()


def test_a_key_covers_what_the_stages_before_left(folder):
    do(folder, content="old", loss=1)
    with Run(folder) as run:
        keys = [run.stage("b", after=[run.stage("a")]).key]
    for content, facts in (("new", {"loss": 1}), ("new", {"loss": 2}), ("old", {"loss": 1})):
        do(folder, content=content, **facts)
        with Run(folder) as run:
            keys.append(run.stage("b", after=[run.stage("a")]).key)
    assert len(set(keys)) == 3
    assert keys[0] == keys[3], "the same content, whenever it was made"
    with Run(folder) as run, pytest.raises(ValueError, match="after: expected stages that are done, got 'c'"):
        run.stage("b", after=[run.stage("c")])


def test_a_key_covers_the_version_of_the_package(folder, monkeypatch):
    do(folder)
    monkeypatch.setattr(runs, "__version__", "0")
    with Run(folder) as run:
        assert not run.stage("a").done()


def test_keys():
    assert key_of("a", {"x": 1, "y": 2}) == key_of("a", {"y": 2, "x": 1})
    assert len(key_of()) == 16
    tensors = [torch.zeros(2000), torch.zeros(2000, dtype=torch.int32), torch.zeros(2, 1000), torch.zeros(0)]
    tensors.append(torch.zeros(2000).index_fill(0, torch.tensor([1000]), 1))  # where its text shows "…"
    different = ["a", b"a", "b", Path("c"), 1, "1", 1.0, True, None, math.nan, [], {}, [[]], [1], {"1": 1}, *tensors]
    assert len({key_of(part) for part in different} | {key_of(), key_of(1, 2), key_of(1, [2])}) == len(different) + 3
    assert key_of(torch.zeros(2, 1000).T) == key_of(torch.zeros(1000, 2))


@pytest.mark.parametrize("part", [object(), {1: 2}, {"a": {3}}, [1j]])
def test_what_no_key_can_be_made_of(part):
    with pytest.raises(TypeError, match="parts: expected values of JSON, paths, bytes and tensors, got"):
        key_of(part)


def test_fresh_forgets(folder):
    do(folder)
    with Run(folder, fresh=True) as run:
        assert not run.stage("a").done()
    with Run(folder) as run:
        assert not run.stage("a").done()


def test_a_stage_done_again_is_not_done_until_it_ends(folder):
    do(folder)
    do(folder, "b")
    with Run(folder) as run:
        again = run.stage("a", "other")
        with contextlib.suppress(KeyboardInterrupt), again.doing():
            assert not run.stage("a").done()
            assert list(json.loads((folder / "stages.json").read_text())) == ["b"]
            raise KeyboardInterrupt
        assert not run.stage("a").done()
        assert not again.done()
    with Run(folder) as run:  # its files may be those of the other key by now
        assert not run.stage("a").done()
        assert run.stage("b").done()


def test_seconds_of_a_stage_that_is_being_done(folder, monkeypatch):
    clock = itertools.count(10.0)
    monkeypatch.setattr(runs.time, "monotonic", lambda: next(clock))
    with Run(folder) as run, run.stage("a").doing() as stage:
        assert (stage.seconds, stage.seconds) == (1, 2)
    assert stage.seconds == 3
    assert json.loads((folder / "stages.json").read_text())["a"]["seconds"] == 3


def test_what_a_stage_cannot_leave(folder):
    with Run(folder) as run:
        stage = run.stage("a")
        with pytest.raises(ValueError, match="values that JSON can hold"), stage.doing():
            stage.facts["loss"] = math.nan
        assert not stage.done()
        for path in (folder.parent / "x", folder / ".." / "x", Path("x")):
            with pytest.raises(ValueError, match=r"paths: expected files in .*, got .*x"), stage.doing():
                stage.keep(path)
        with pytest.raises(BadFileError, match="x: expected a file, found none"), stage.doing():
            stage.keep(folder / "x")
        assert not stage.done()
        with stage.doing():
            pass
        assert stage.done()


# ---- damage


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-1]), "9", id="truncated"),
        pytest.param(lambda path: path.write_bytes(b'"c\x6entent"\n'), "other ones", id="flipped"),
        pytest.param(lambda path: (path.unlink(), path.mkdir()), "no file", id="folder"),
        pytest.param(lambda path: (path.unlink(), path.symlink_to("nothing")), "no file", id="link"),
        pytest.param(lambda path: (path.unlink(), os.mkfifo(path)), "no file", id="fifo"),
    ],
)
def test_a_file_that_changed_is_named(folder, damage, found):
    do(folder)
    damage(folder / "a.json")
    with Run(folder) as run:
        with pytest.raises(BadFileError) as refused:
            run.stage("a").done()
        assert not run.stage("a", "another key").done()
    assert str(refused.value) == (
        f"{folder / 'a.json'}: expected the 10 bytes that the stage 'a' left, found {found}; "
        "delete it to have it made again"
    )


def test_every_flipped_bit_of_a_file_is_found(folder):
    do(folder)
    path = folder / "a.json"
    whole = path.read_bytes()
    with Run(folder) as run:
        for bit in range(8 * len(whole)):
            path.write_bytes(bytes(byte ^ (1 << bit % 8 if i == bit // 8 else 0) for i, byte in enumerate(whole)))
            with pytest.raises(BadFileError, match="found other ones"):
                run.stage("a").done()
        path.write_bytes(whole)
        assert run.stage("a").done()


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '[["a", {}]]', "\xff"], ids=repr)
def test_damaged_stages_count_as_none(folder, text):
    do(folder)
    (folder / "stages.json").write_bytes(text.encode("latin-1"))
    with Run(folder) as run:
        assert run.stages == {}
    assert json.loads((folder / "stages.json").read_text()) == {}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def done_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("done")
    do(folder)
    return folder


@hypothesis.given(data=st.data())
@hypothesis.settings(deadline=None, max_examples=60)
def test_any_other_record_is_refused_or_harmless(done_folder, data):
    record = json.loads((done_folder / "stages.json").read_text())["a"]
    key = data.draw(st.sampled_from(sorted(record)))
    changed = record | {key: data.draw(JSON)} if data.draw(st.booleans()) else {key: record[key]}
    stages = {"a": data.draw(st.one_of(st.just(changed), JSON)), "b": record}
    folder = done_folder.parent / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(done_folder, folder)
    (folder / "stages.json").write_text(json.dumps(stages))
    with Run(folder) as run:
        assert "b" in run.stages
        for act in (run.stage("a").done, lambda: run.stage("b", after=[run.stage("a")]), run.stage("a").facts.copy):
            with contextlib.suppress(BadFileError, ValueError):
                act()
    with contextlib.suppress(BadFileError):
        check_finished(folder, "a")


@pytest.mark.parametrize("file", ["", "/etc/passwd", "../a.json", "x/../../a.json", "a\0b"])
def test_a_record_reaches_no_file_outside(folder, file):
    do(folder)
    stages = json.loads((folder / "stages.json").read_text())
    stages["a"]["files"] = {file: {"bytes": 1, "sha256": "0"}}
    (folder / "stages.json").write_text(json.dumps(stages))
    with Run(folder) as run:
        assert run.stages == {}


# ---- killed, interrupted, full


def seed_run(folder, seed, fresh=False):
    """A run in three stages, each made of what it reads from the files of those before."""
    with Run(folder, fresh) as run:
        model = run.stage("model", seed)
        if not model.done():
            with model.doing():
                write_json(folder / "model" / "weights.json", seed)
                model.keep(folder / "model" / "weights.json")
        saes = run.stage("saes", after=[model])
        if not saes.done():
            with saes.doing():
                shutil.rmtree(folder / "saes", ignore_errors=True)
                path = folder / "saes" / f"l0_{seed}" / "sae.json"
                write_json(path, [read_json(folder / "model" / "weights.json"), "sae"])
                saes.keep(path)
                saes.facts["path"] = path.relative_to(folder).as_posix()
        results = run.stage("results", after=[model, saes])
        if not results.done():
            with results.doing():
                figures = [read_json(folder / "model" / "weights.json"), read_json(folder / saes.facts["path"])]
                write_json(folder / "results.json", figures)
                results.keep(folder / "results.json")
        return read_json(folder / "results.json")


def in_child(act):
    """The exit status of ``act`` in a process of its own, which a fork makes in a millisecond."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads: the child uses none
        child = os.fork()
    if child == 0:
        status = 1
        try:
            act()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


CHANGES = {"os.chmod", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate"}


def killed_at(point, act):
    """``act`` in a child that dies before its ``point``-th change to the file system; whether it came to that."""
    changes = itertools.count()

    def hook(event, arguments):
        opened = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (opened or event in CHANGES) and next(changes) == point:
            os._exit(99)

    def act_watched():
        sys.addaudithook(hook)
        act()

    status = in_child(act_watched)
    assert status in (0, 99)
    return status == 99


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("before", [None, 0])
def test_killed_anywhere_either_seed_comes_out_right(tmp_path, before):
    """Seed 1, killed in a new folder or in one that seed 0 finished: the next run shows its own figures."""
    start = tmp_path / "start"
    start.mkdir()
    if before is not None:
        seed_run(start, before)
    for point in itertools.count():
        killed = shutil.copytree(start, tmp_path / f"{point}-0")
        if not killed_at(point, lambda killed=killed: seed_run(killed, 1)):
            break
        for seed, folder in enumerate((killed, shutil.copytree(killed, tmp_path / f"{point}-1"))):
            with contextlib.suppress(BadFileError):
                check_finished(folder, "results")
                if (folder / "stages.json").exists():  # what calls itself finished is of one seed
                    assert read_json(folder / "results.json") in ([one, [one, "sae"]] for one in (0, 1))
            assert seed_run(folder, seed) == [seed, [seed, "sae"]]
            check_finished(folder, "results")
            left = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
            made = {"stages.json", "results.json", "model/weights.json", f"saes/l0_{seed}/sae.json"}
            assert left - {"run.lock"} == made
    assert point > 60


def test_a_finished_run_does_nothing_again(folder, monkeypatch):
    seed_run(folder, 0)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json") if path.name != "stages.json"}
    assert seed_run(folder, 0) == [0, [0, "sae"]]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    seed_run(folder, 0, fresh=True)
    assert {path: path.stat().st_mtime_ns for path in before} != before


@pytest.mark.parametrize("name", ["model/weights.json", "saes/l0_0/sae.json", "results.json"])
def test_a_deleted_file_is_made_again(folder, name):
    seed_run(folder, 0)
    (folder / name).unlink()
    assert seed_run(folder, 0) == [0, [0, "sae"]]
    assert (folder / name).exists()


@pytest.mark.parametrize("full_at", range(8))
def test_a_full_disk_is_the_environments_problem(folder, monkeypatch, full_at):
    """Writes fail from the n-th file on; with space again, the run goes on."""
    written, finish = itertools.count(), files.finish

    def full(path, mode):
        if next(written) >= full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finish(path, mode)

    with monkeypatch.context() as patch:
        patch.setattr(files, "finish", full)
        with pytest.raises(EnvironmentProblemError, match="cannot be written: No space left on device"):
            seed_run(folder, 0)
    assert seed_run(folder, 0) == [0, [0, "sae"]]


def test_only_temporaries_of_killed_writers_are_removed(folder):
    Run(folder).close()
    dead = folder / "model" / ".tmp-0123456789abcdef"
    dead.mkdir(parents=True)
    (folder / ".tmp-0123456789abcdef.json").touch()  # as earlier versions left
    with atomic_write(folder / "plots" / "a.png") as alive, Run(folder):
        alive.write_text("whole")
    assert not dead.exists()
    assert (folder / "plots" / "a.png").read_text() == "whole"
    assert {path.name for path in folder.iterdir()} == {"model", "plots", "stages.json", "run.lock"}


# ---- whose folder it is


def test_a_folder_of_something_else_is_left_alone(folder):
    folder.mkdir(parents=True)
    (folder / "thesis.tex").touch()
    for fresh in (False, True):
        with pytest.raises(ValueError, match="out: expected a new folder or that of an earlier study, found other"):
            Run(folder, fresh, kind="study")
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("left", [[".tmp-0123456789abcdef.json"], ["run.lock"], ["run.lock", ".tmp-0123456789abcdef"]])
@pytest.mark.parametrize("fresh", [False, True])
def test_a_run_killed_before_its_first_stage_is_taken_up(folder, left, fresh):
    folder.mkdir(parents=True)
    for name in left:
        (folder / name).touch()
    with Run(folder, fresh) as run:
        assert run.stages == {}
    assert {path.name for path in folder.iterdir()} == {"stages.json", "run.lock"}


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "a", tmp_path / ("x" * 300)):
        with pytest.raises(EnvironmentProblemError, match=r"(a|xxx): cannot be locked: "):
            Run(folder)
    for folder in (tmp_path / "file", "a\0b"):
        with pytest.raises(ValueError, match="out: expected a folder, found none: "):
            Run(folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: Run(3), "folder: expected a str or an os.PathLike, got int"),
        (lambda folder: Run(folder, "no"), "fresh: expected a bool, got str"),
        (lambda folder: Run(folder).stage(3), "name: expected a str, got int"),
        (lambda folder: Run(folder).stage("a", object()), "parts: expected values of JSON, .* got object"),
    ],
)
def test_wrong_types(folder, make, message):
    with pytest.raises(TypeError, match=message):
        make(folder)


# ---- the lock


def test_one_run_at_a_time_in_this_process(folder):
    with Run(folder), pytest.raises(EnvironmentProblemError, match=f"found pid {os.getpid()} on "):
        Run(folder)
    run = Run(folder)
    run.close()
    run.close()
    with pytest.raises(ValueError, match="expected an open run, found it closed"), run.stage("a").doing():
        pass
    assert (folder / "run.lock").read_bytes() == b""


@pytest.mark.parametrize("remove", [lambda folder: (folder / "run.lock").unlink(), shutil.rmtree])
def test_a_run_whose_lock_was_removed_writes_no_more(folder, remove):
    def do_while_another_takes_the_folder():
        with Run(folder) as run, run.stage("a").doing():
            remove(folder)
            others.append(Run(folder))

    others = []
    with pytest.raises(EnvironmentProblemError, match=r"expected run.lock of this run in it, found it removed"):
        do_while_another_takes_the_folder()
    assert others[0].stages == {}
    assert json.loads((folder / "stages.json").read_text()) == {}
    others[0].close()


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
    with run, run.stage("a").doing():
        pass
    assert run.stage("a").done()
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
        assert run.stage("a").done()
        assert not run.stage("b").done()


# ---- finished or not


def test_a_finished_run_is_one_whose_stages_fit_each_other(folder):
    check_finished(folder, "results")  # results without stages.json
    with Run(folder):
        pass
    with pytest.raises(BadFileError, match="expected a finished run, found 'results' not done"):
        check_finished(folder, "results")
    seed_run(folder, 0)
    check_finished(folder, "results")
    do(folder, "model", content=1)
    with pytest.raises(BadFileError, match="expected a finished run, found 'model' done again since"):
        check_finished(folder, "results")
    with Run(folder) as run, contextlib.suppress(KeyboardInterrupt), run.stage("saes", "other").doing():
        raise KeyboardInterrupt
    seed_run(folder, 0)
    with Run(folder) as run, contextlib.suppress(KeyboardInterrupt), run.stage("saes", "other").doing():
        raise KeyboardInterrupt
    with pytest.raises(BadFileError, match="expected a finished run, found 'saes' not done"):
        check_finished(folder, "results")


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("[0, [1, 2]]")])
def test_results_that_changed_are_not_finished(folder, damage):
    seed_run(folder, 0)
    damage(folder / "results.json")
    with pytest.raises(BadFileError, match=r"expected (a finished run|the \d+ bytes that the stage 'results' left)"):
        check_finished(folder, "results")


def test_records_in_a_circle_end(folder):
    record = {"key": "", "seconds": 1, "files": {}, "facts": {}}
    content = hashlib.sha256(json.dumps([{}, {}]).encode()).hexdigest()[:16]
    folder.mkdir(parents=True)
    stages = {"a": record | {"after": {"b": content}}, "b": record | {"after": {"a": content}}}
    (folder / "stages.json").write_text(json.dumps(stages))
    check_finished(folder, "a")
