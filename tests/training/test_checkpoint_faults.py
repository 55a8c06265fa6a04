"""Checkpoints under faults: killed, disk full, damaged, unwritable, two processes. Only whole ones are ever used."""

import builtins
import contextlib
import errno
import fcntl
import json
import os
import re
import resource
import shutil
import signal
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gemmascope.errors import BadFileError, EnvironmentProblemError
from gemmascope.training import checkpoint as module
from tests.training.test_checkpoint import Gate, assert_is, checkpoints_in, names_in, save, steps_in

NO_SPACE = "No space left on device"
HALF_DONE = (".tmp-0123456789abcdef", ".del-step-000000009-0123456789abcdef")
STEP_1 = "step-000000001"

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch):
    """What a killed process wrote is there for the next one, flushed to the disk or not."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def child(act: Callable[[], int | None]) -> int:
    """The process that does ``act`` and ends with the code that it returns."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            code = act() or 0
        finally:
            os._exit(code)
    return pid


def in_child(act: Callable[[], int | None]) -> int:
    """The exit code of ``act`` in a child process, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child(act), 0)[1])


class Operations:
    """Calls ``act`` before every operation on files, in any thread, with its number and with whether it needs room on
    the disk; writes are done in halves, so that files are in pieces between two."""

    def __init__(self, patch: pytest.MonkeyPatch, act: Callable[[int, bool], None]):
        self.act, self.count, self.lock = act, 0, threading.Lock()
        names = (
            "open",
            "mkdir",
            "rename",
            "replace",
            "unlink",
            "rmdir",
            "listdir",
            "scandir",
            "write",
            "fsync",
        )
        for owner, name in [*((os, name) for name in names), (builtins, "open"), (fcntl, "flock")]:
            patch.setattr(owner, name, self.watched(name, getattr(owner, name)))

    def watched(self, name: str, function: Callable) -> Callable:
        def operation(*arguments, **options):
            with self.lock:
                self.count += 1
                number = self.count
            writes = any((isinstance(flag, int) and flag & os.O_CREAT) or flag == "xb" for flag in arguments[1:2])
            self.act(number, name in ("mkdir", "write", "fsync") or (name == "open" and writes))
            if name == "write":
                arguments = (arguments[0], arguments[1][: max(1, len(arguments[1]) // 2)])
            return function(*arguments, **options)

        return operation


def begin(folder: Path) -> None:
    """Two checkpoints, what dead writers left and what is not ours."""
    save(checkpoints_in(folder), 1, 2)
    for name in HALF_DONE:
        (folder / name / "step-000000009").mkdir(parents=True)
        (folder / name / "step-000000009" / "manifest.json").touch()
    (folder / HALF_DONE[0] / ".tmp-lock").touch()
    (folder / "notes").mkdir()
    (folder / "notes" / "text").touch()


def at_every_operation(tmp_path: Path, act: Callable[[Path, int], bool]) -> Iterator[Path]:
    """The folder after ``act`` in it with operation 1, 2, …, until there was none of that number."""
    begin(tmp_path / "0")
    for number in range(1, 400):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "0", folder)
        came_to_it = act(folder, number)
        yield folder
        shutil.rmtree(folder)
        if not came_to_it:
            return
    raise AssertionError("a save of 400 operations")


def found_after(folder: Path) -> int:
    """The step of the checkpoint that the next run goes on from; it then runs to its end."""
    checkpoints = checkpoints_in(folder)
    for path in folder.glob("step-*"):  # the older ones too, of which one was about to be removed
        assert_is(module._verify(path), int(path.name[5:]))
    found = checkpoints.latest()
    assert_is(found, found.step)
    assert [name for name in names_in(folder) if not name.startswith("step-")] == ["notes"]
    save(checkpoints, 3, 4)
    assert_is(checkpoints_in(folder).latest(), 4)
    assert names_in(folder) == ["notes", "step-000000003", "step-000000004"]
    assert names_in(folder / "notes") == ["text"]
    return found.step


# ---- killed, disk full


@needs_fork
def test_killed_at_any_operation(tmp_path, monkeypatch):
    """Of a start, a resume, a save in the background, the removal of an older one."""

    def run(folder: Path, number: int) -> None:
        Operations(monkeypatch, lambda now, _: os.kill(os.getpid(), signal.SIGKILL) if now == number else None)
        checkpoints = checkpoints_in(folder)
        assert checkpoints.latest().step == 2
        save(checkpoints, 3, wait=False)
        checkpoints.close()

    def killed(folder: Path, number: int) -> bool:
        code = in_child(lambda: run(folder, number))
        assert code in (0, -signal.SIGKILL)
        return code != 0

    found = [found_after(folder) for folder in at_every_operation(tmp_path, killed)]
    assert found == sorted(found)  # the old one up to some point, from then on the new one
    assert found.count(2) > 50
    assert found.count(3) > 10


@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for good"])
def test_full_disk_at_any_operation(tmp_path, monkeypatch, for_good):
    """An error that says so, or a warning when what is on the disk is whole; with room again, the same object saves."""

    def filled(folder: Path, number: int) -> bool:
        is_full, came_to_it = False, False

        def fill(now: int, needs_room: bool) -> None:
            nonlocal is_full, came_to_it
            if now == number or (is_full and for_good and needs_room):
                is_full = came_to_it = True
                raise OSError(errno.ENOSPC, NO_SPACE)

        def try_twice(act: Callable[[], Any]) -> Any:
            nonlocal is_full
            try:
                return act()
            except EnvironmentProblemError as error:
                assert str(folder) in str(error)  # noqa: PT017
                assert NO_SPACE in str(error)  # noqa: PT017
                is_full = False
                return act()

        def save_and_close() -> None:
            save(checkpoints, 3, wait=False)
            checkpoints.close()

        with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            Operations(patch, fill)
            checkpoints = try_twice(lambda: checkpoints_in(folder))
            assert try_twice(checkpoints.latest).step == 2
            try_twice(save_and_close)
        for warning in warned:
            assert re.search(f"cannot be removed: .*{NO_SPACE}", str(warning.message))
        assert_is(checkpoints.latest(), 3)
        return came_to_it

    left = []
    for folder in at_every_operation(tmp_path, filled):
        checkpoints_in(folder)
        left.append([name for name in names_in(folder) if name != STEP_1])
    assert len(left) > 60
    assert left == [["notes", "step-000000002", "step-000000003"]] * len(left)


@pytest.fixture
def full(monkeypatch):
    """Sets whether every write fails."""
    state = {"full": False}

    def write(descriptor, data, write=os.write):
        if state["full"]:
            raise OSError(errno.ENOSPC, NO_SPACE)
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    return state


@pytest.mark.parametrize("told", ["save", "poll", "close", "latest"])
def test_a_save_that_failed_is_told_once_and_may_be_tried_again(tmp_path, full, told):
    checkpoints = checkpoints_in(tmp_path)
    save(checkpoints, 1)
    full["full"] = True
    save(checkpoints, 2, wait=False)
    while checkpoints._writer.is_alive():
        checkpoints._writer.join()
    full["full"] = False
    act = {"save": lambda: save(checkpoints, 3)}.get(told) or getattr(checkpoints, told)
    with pytest.raises(EnvironmentProblemError, match=rf"step-000000002: cannot be written: {NO_SPACE}$"):
        act()
    assert steps_in(tmp_path) == [1]
    checkpoints.poll()
    checkpoints.close()
    save(checkpoints, 2, 3)
    assert steps_in(tmp_path) == [2, 3]


def test_a_save_that_failed_holds_no_copies(tmp_path, full):
    checkpoints = checkpoints_in(tmp_path)
    full["full"] = True
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        copied = module._copied
        patch.setattr(module, "_copied", lambda tensor: [kept.append(weakref.ref(c := copied(tensor)[0])) or c])
        save(checkpoints, 1, wait=False)
    checkpoints._writer.join()
    assert len(kept) == 3
    assert [copy() for copy in kept] == [None] * 3
    with pytest.raises(EnvironmentProblemError, match=NO_SPACE):
        checkpoints.close()


def test_a_file_too_large_for_the_disk(tmp_path):
    """A limit on file sizes stands for the full disk: the write of a tensor fails half-way."""
    checkpoints = checkpoints_in(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(EnvironmentProblemError, match="step-000000001: cannot be written: File too large"):
            checkpoints.save(1, {"a": {"W": torch.ones(1 << 20, dtype=torch.float32)}}, {}, wait=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names_in(tmp_path) == []
    save(checkpoints, 1)
    assert_is(checkpoints.latest(), 1)


def failing(error: BaseException) -> Callable:
    def fail(*_, **__):
        raise error

    return fail


def test_no_memory_for_the_copies(tmp_path, monkeypatch):
    checkpoints = checkpoints_in(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_copied", failing(RuntimeError("no memory\nat some place")))
        with pytest.raises(EnvironmentProblemError, match=r"step 1: its 72 bytes cannot be .* host memory: no memory$"):
            save(checkpoints, 1)
    save(checkpoints, 1)
    assert_is(checkpoints.latest(), 1)


def test_no_memory_for_the_writer(tmp_path, monkeypatch):
    checkpoints = checkpoints_in(tmp_path)
    monkeypatch.setattr(module, "_write_file", failing(MemoryError()))
    with pytest.raises(EnvironmentProblemError, match="step-000000001: cannot be written: not enough memory"):
        save(checkpoints, 1)
    assert names_in(tmp_path) == []


# ---- damage


def test_every_flipped_byte_is_found(tmp_path):
    """Of the manifest and of each part."""
    checkpoints = checkpoints_in(tmp_path)
    save(checkpoints, 1)
    flips = 0
    for path in sorted((tmp_path / STEP_1).iterdir()):
        whole = path.read_bytes()
        for place in range(len(whole)):
            flips += 1
            path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
            with pytest.raises(BadFileError, match=rf"{path.name}: expected"):
                module._verify(tmp_path / STEP_1)
        path.write_bytes(whole)
    assert flips > 800
    assert_is(checkpoints.latest(), 1)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def part_in(step: Path) -> Path:
    return min(step.glob("*.safetensors"))


DAMAGES = {
    "part truncated": lambda step: truncate(part_in(step)),
    "part longer": lambda step: part_in(step).write_bytes(part_in(step).read_bytes() + b"0"),
    "part empty": lambda step: part_in(step).write_bytes(b""),
    "part missing": lambda step: part_in(step).unlink(),
    "part renamed": lambda step: part_in(step).rename(step / "other.safetensors"),
    "part of another step": lambda step: shutil.copy(part_in(step.with_name(STEP_1)), part_in(step)),
    "part a folder": lambda step: (part_in(step).unlink(), (step / "0000-sae.safetensors").mkdir()),
    "part a pipe": lambda step: (part_in(step).unlink(), os.mkfifo(step / "0000-sae.safetensors")),
    "part a broken link": lambda step: (part_in(step).unlink(), (step / "0000-sae.safetensors").symlink_to("x")),
    "manifest truncated": lambda step: truncate(step / "manifest.json"),
    "manifest longer": lambda step: os.truncate(step / "manifest.json", 2000),
    "manifest empty": lambda step: (step / "manifest.json").write_bytes(b""),
    "manifest huge": lambda step: os.truncate(step / "manifest.json", 1 << 40),
    "manifest missing": lambda step: (step / "manifest.json").unlink(),
    "manifest of another step": lambda step: shutil.copy(step.with_name(STEP_1) / "manifest.json", step),
    "manifest a folder": lambda step: ((step / "manifest.json").unlink(), (step / "manifest.json").mkdir()),
    "folder empty": lambda step: (shutil.rmtree(step), step.mkdir()),
    "folder a file": lambda step: (shutil.rmtree(step), step.touch()),
    "folder a broken link": lambda step: (shutil.rmtree(step), step.symlink_to("nothing")),
}
FORGERIES = {
    "older schema": {"schema": 0},
    "schema no number": {"schema": "1"},
    "another step": {"step": 3},
    "step no number": {"step": None},
    "unknown key": {"more": 1},
    "facts no object": {"facts": []},
    "parts no object": {"parts": []},
    "part no object": {"parts": {"sae": 1}},
    "part without file": {"parts": {"sae": {"bytes": 1, "sha256": "0" * 64}}},
    "part elsewhere": {"parts": {"sae": {"file": "../x.safetensors", "bytes": 1, "sha256": "0" * 64}}},
    "part without checksum": {"parts": {"sae": {"file": "x.safetensors", "bytes": 1, "sha256": ""}}},
}


def forge(step: Path, changes: dict[str, Any]) -> None:
    """A manifest whose seal is right."""
    manifest = json.loads((step / "manifest.json").read_text())
    del manifest["sha256"]
    (step / "manifest.json").write_bytes(module._sealed(manifest | changes))


@pytest.mark.parametrize("name", [*DAMAGES, *FORGERIES])
def test_the_one_before_a_damaged_one_is_used(tmp_path, name):
    save(checkpoints_in(tmp_path), 1, 2)
    step = tmp_path / "step-000000002"
    DAMAGES[name](step) if name in DAMAGES else forge(step, FORGERIES[name])
    checkpoints = checkpoints_in(tmp_path)
    with pytest.warns(RuntimeWarning, match=r"step-000000002.*: expected .*, found .*; the .* is kept as .bad-step-"):
        assert_is(checkpoints.latest(), 1)
    bad, good = names_in(tmp_path)
    assert (bad.startswith(".bad-step-000000002-"), good) == (True, STEP_1)
    save(checkpoints, 2)
    assert_is(checkpoints_in(tmp_path).latest(), 2)
    assert names_in(tmp_path) == [bad, STEP_1, "step-000000002"]


def test_all_damaged(tmp_path):
    """Not a start from nothing, at this start and at the next; all is kept."""
    save(checkpoints_in(tmp_path), 1, 2)
    for step in ("step-000000001", "step-000000002"):
        truncate(tmp_path / step / "manifest.json")
    with pytest.warns(RuntimeWarning, match="found damage") as warned, pytest.raises(BadFileError) as refused:
        checkpoints_in(tmp_path).latest()
    assert len(warned) == 2
    names = names_in(tmp_path)
    assert [name[:19] for name in names] == [".bad-step-000000001", ".bad-step-000000002"]
    assert str(refused.value) == (
        f"{tmp_path}: expected a checkpoint that verifies, found only damaged ones, {', '.join(reversed(names))}; "
        "delete them to start from nothing"
    )
    assert all(len(names_in(tmp_path / name)) == 3 for name in names)
    with pytest.raises(BadFileError, match="found only damaged ones"):
        checkpoints_in(tmp_path).latest()


def test_files_besides_and_links_do_no_harm(tmp_path):
    """Nobody reads them: what an indexer, a copy or a network file system left, a folder that was moved and linked."""
    save(checkpoints_in(tmp_path / "a"), 1, 2)
    (tmp_path / "a" / STEP_1 / ".DS_Store").write_bytes(b"\0")
    (tmp_path / "a" / STEP_1).rename(tmp_path / "moved")
    (tmp_path / "a" / STEP_1).symlink_to(tmp_path / "moved")
    shutil.rmtree(tmp_path / "a" / "step-000000002")
    checkpoints = checkpoints_in(tmp_path / "a")
    assert_is(checkpoints.latest(), 1)
    save(checkpoints, 2, 3)
    assert steps_in(tmp_path / "a") == [2, 3]
    assert (tmp_path / "moved" / "manifest.json").exists()


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_what_changes_after_it_verified_is_not_used(tmp_path, damage):
    checkpoints = checkpoints_in(tmp_path)
    save(checkpoints, 1)
    found = checkpoints.latest()
    path = part_in(found.path)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1])) if damage == "flipped" else path.unlink()
    with pytest.raises(BadFileError, match=r"0000-sae.safetensors: expected .*, found (other ones|none)$"):
        found.part("sae")


def test_a_disk_that_cannot_be_read_is_not_damage(tmp_path, monkeypatch):
    checkpoints = checkpoints_in(tmp_path)
    save(checkpoints, 1)
    found = checkpoints.latest()
    with monkeypatch.context() as patch:
        patch.setattr(module, "sha256_of", failing(OSError(errno.EIO, "Input/output error")))
        for read in (checkpoints.latest, lambda: found.part("sae")):
            with pytest.raises(EnvironmentProblemError, match="cannot be read: Input/output error"):
                read()
    assert steps_in(tmp_path) == [1]
    assert_is(checkpoints.latest(), 1)


# ---- folders


@pytest.mark.parametrize("name", ["mkdir", "listdir"])
def test_a_folder_that_cannot_be_used(tmp_path, monkeypatch, name):
    monkeypatch.setattr(os, name, failing(OSError(errno.EROFS, "Read-only file system")))
    with pytest.raises(EnvironmentProblemError, match=rf"{tmp_path}.*: cannot be (written|read): Read-only file"):
        checkpoints_in(tmp_path)


@needs_fork
@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_a_folder_without_permission(tmp_path):
    """As a user whom permissions bind: read-only at the start, and from then on."""

    def run() -> None:
        if os.geteuid() == 0:
            for folder in (tmp_path, *tmp_path.parents):
                if folder.name.startswith(("test_", "popen-", "pytest-")):  # pytest's own, with workers one more
                    folder.chmod(0o755)
            os.chown(tmp_path, 65534, 65534)
            os.seteuid(65534)
        tmp_path.chmod(0o500)
        with pytest.raises(EnvironmentProblemError, match="cannot be written: Permission denied"):
            checkpoints_in(tmp_path)
        tmp_path.chmod(0o700)
        checkpoints = checkpoints_in(tmp_path)
        save(checkpoints, 1)
        tmp_path.chmod(0o500)
        save(checkpoints, 2, wait=False)
        with pytest.raises(EnvironmentProblemError, match="step-000000002: cannot be written: Permission denied"):
            checkpoints.close()
        assert_is(checkpoints.latest(), 1)
        tmp_path.chmod(0o700)

    assert in_child(run) == 0


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "a").touch()
    for folder in ("a", "a/b"):
        with pytest.raises(EnvironmentProblemError, match=r"cannot be written: (File exists|Not a directory)"):
            checkpoints_in(tmp_path / folder)


def test_a_folder_that_vanishes(tmp_path):
    """Not made again: a disk that is not mounted any more would come to lie under it."""
    checkpoints = checkpoints_in(tmp_path / "a")
    save(checkpoints, 1)
    shutil.rmtree(tmp_path / "a")
    for act in (checkpoints.latest, lambda: save(checkpoints, 2)):
        with pytest.raises(EnvironmentProblemError, match="a: cannot be read: No such file"):
            act()
    assert not (tmp_path / "a").exists()


def test_old_ones_that_cannot_be_removed(tmp_path, monkeypatch):
    """The checkpoint is saved; the next save removes them."""
    checkpoints = checkpoints_in(tmp_path)
    save(checkpoints, 1, 2)

    busy = failing(OSError(errno.EBUSY, "Device or resource busy"))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        with pytest.warns(RuntimeWarning, match=r"\.del-.*: cannot be removed: Device or resource busy"):
            save(checkpoints, 3)
    assert [name[:19] for name in names_in(tmp_path)] == [".del-step-000000001", "step-000000002", "step-000000003"]
    save(checkpoints, 4)
    assert steps_in(tmp_path) == [3, 4]
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", busy)
        with pytest.raises(EnvironmentProblemError, match="cannot be removed: Device or resource busy"):
            checkpoints.clear()


# ---- two processes


@needs_fork
def test_the_temporary_folder_of_a_living_writer_is_left_alone(tmp_path, monkeypatch):
    """A second process starts while the first one writes, and looks; both end well."""
    ready, go = os.pipe(), os.pipe()

    def run() -> None:
        gate = Gate(monkeypatch)
        checkpoints = checkpoints_in(tmp_path)
        save(checkpoints, 2, wait=False)
        gate.reached.wait(60)
        gate.write(ready[1], b"1")
        os.read(go[0], 1)
        gate.open.set()
        checkpoints.close()

    save(checkpoints_in(tmp_path), 1)
    pid = child(run)
    try:
        os.read(ready[0], 1)
        assert_is(checkpoints_in(tmp_path).latest(), 1)
        assert [name[:5] for name in names_in(tmp_path)] == [".tmp-", "step-"]
    finally:
        os.write(go[1], b"1")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        for descriptor in (*ready, *go):
            os.close(descriptor)
    assert_is(checkpoints_in(tmp_path).latest(), 2)
    assert steps_in(tmp_path) == [1, 2]


@needs_fork
def test_two_processes_that_save_the_same_steps(tmp_path):
    """One of them may be told that it cannot; what is there is always whole."""

    def run() -> None:
        checkpoints = checkpoints_in(tmp_path)
        for step in range(1, 30):
            with contextlib.suppress(EnvironmentProblemError):
                save(checkpoints, step)

    pids = [child(run) for _ in range(2)]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0]
    assert_is(checkpoints_in(tmp_path).latest(), 29)
    assert set(steps_in(tmp_path)) >= {28, 29}
