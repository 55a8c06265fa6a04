"""Atomic writing and strict reading."""

import errno
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from gemmascope.errors import BadFileError, EnvironmentProblemError
from gemmascope.formats.files import (
    LOCK,
    atomic_write,
    is_being_written,
    json_text,
    open_file,
    read_json,
    remove_stale_temporaries,
    sha256,
    shown,
    write_json,
)


@pytest.fixture
def as_user(tmp_path):
    """Skips where file permissions do not bind the user running the tests."""
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    if os.access(locked, os.W_OK):
        pytest.skip("permissions do not bind this user")
    yield locked
    locked.chmod(0o700)


# ---- atomic_write


def test_file_appears_whole_with_ordinary_permissions(tmp_path):
    target = tmp_path / "new" / "folder" / "a.json"
    with atomic_write(target) as temporary:
        assert temporary.parent.parent == target.parent
        assert temporary.name == target.name
        temporary.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"
    assert os.listdir(target.parent) == ["a.json"]
    umask = os.umask(0)
    os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_failure_leaves_the_old_file_and_nothing_else(tmp_path, error):
    old, new = tmp_path / "old", tmp_path / "x" / "y" / "new"
    old.write_text("old")

    def write_half(target):
        with atomic_write(target) as temporary:
            temporary.write_text("half")
            raise error

    for target in (old, new):
        with pytest.raises(error):
            write_half(target)
    assert old.read_text() == "old"
    assert os.listdir(tmp_path) == ["old"]


def test_a_living_writer_is_seen_and_a_dead_one_is_not(tmp_path):
    assert not is_being_written(tmp_path)
    assert not is_being_written(tmp_path / "missing")
    with atomic_write(tmp_path / "a"):
        assert is_being_written(tmp_path)
    assert not is_being_written(tmp_path)
    (tmp_path / ".tmp-0123456789abcdef").mkdir()
    assert not is_being_written(tmp_path)
    (tmp_path / ".tmp-0123456789abcdef" / LOCK).touch()
    assert not is_being_written(tmp_path)


def test_killed_writer_leaves_the_old_file(tmp_path):
    target = tmp_path / "a"
    target.write_text("old")
    code = f"""
        import os, signal
        from gemmascope.formats.files import atomic_write
        with atomic_write({str(target)!r}) as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)]).returncode == -signal.SIGKILL
    assert target.read_text() == "old"
    assert len(os.listdir(tmp_path)) == 2
    remove_stale_temporaries(tmp_path)
    assert os.listdir(tmp_path) == ["a"]


def test_temporaries_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    stale = tmp_path / ".tmp-0123456789abcdef"
    for path in (stale / LOCK, stale / "a", stale / "b" / "c", tmp_path / ".tmp-1123456789abcdef.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / ".tmp-2123456789abcdef").mkdir()
    (tmp_path / ".tmp-notes").touch()
    with atomic_write(tmp_path / "a") as temporary:
        temporary.write_text("a")
        remove_stale_temporaries(tmp_path)
        assert sorted(os.listdir(tmp_path)) == sorted([".tmp-notes", temporary.parent.name])
    assert (tmp_path / "a").read_text() == "a"
    remove_stale_temporaries(tmp_path / "missing")


def test_writer_whose_new_folder_is_taken_for_a_dead_ones_makes_another(tmp_path, monkeypatch):
    """Between making its folder and locking it, and between making the lock and taking it."""
    steps, flock, locks = [], fcntl.flock, []

    def flock_after_another(lock, how):
        steps.append("flock")
        if len(steps) == 1:
            remove_stale_temporaries(tmp_path)  # takes the lock itself, by the second call
        flock(lock, how)

    def open_after_another(path, *arguments):
        if Path(path).name == LOCK and arguments[0] & os.O_CREAT:
            locks.append(path)
            if len(locks) == 1:
                remove_stale_temporaries(tmp_path)
        return os_open(path, *arguments)

    os_open = os.open
    monkeypatch.setattr(fcntl, "flock", flock_after_another)
    monkeypatch.setattr(os, "open", open_after_another)
    write_json(tmp_path / "a.json", 1)
    assert len(locks) == 3
    assert read_json(tmp_path / "a.json") == 1
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("name", [LOCK, "a.json"])
def test_full_disk_before_the_first_byte(tmp_path, monkeypatch, name):
    def full(path, *arguments):
        if Path(path).name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return os_open(path, *arguments)

    os_open = os.open
    monkeypatch.setattr(os, "open", full)
    with pytest.raises(EnvironmentProblemError, match=r"a.json: cannot be written: No space left on device$"):
        write_json(tmp_path / "new" / "a.json", 1)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0])
def test_mode_is_that_of_the_umask_whoever_writes(tmp_path, umask):
    before = os.umask(umask)
    try:
        with atomic_write(tmp_path / "a") as temporary:
            safetensors.torch.save_file({"a": torch.ones(1)}, temporary)
        write_json(tmp_path / "b", 1)
    finally:
        os.umask(before)
    for name in ("a", "b"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask


def test_symbolic_link_is_replaced_and_its_target_left_alone(tmp_path):
    precious, link = tmp_path / "precious", tmp_path / "link"
    precious.write_text("precious")
    link.symlink_to(precious)
    write_json(link, 1)
    assert precious.read_text() == "precious"
    assert read_json(link) == 1


def test_path_is_a_folder(tmp_path):
    with pytest.raises(EnvironmentProblemError, match=r"cannot be written: it is a folder$"):
        write_json(tmp_path, 1)
    assert os.listdir(tmp_path) == []


def test_parent_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        EnvironmentProblemError, match=r"file/a.json: cannot be written: (Not a directory|File exists)$"
    ):
        write_json(tmp_path / "file" / "a.json", 1)


def test_name_too_long(tmp_path):
    with pytest.raises(EnvironmentProblemError, match=r"cannot be written: File name too long$"):
        write_json(tmp_path / "d" / ("n" * 300), 1)
    assert os.listdir(tmp_path) == []
    write_json(tmp_path / ("n" * 255), 1)


def test_unwritable_folder(as_user):
    with pytest.raises(EnvironmentProblemError, match=r"a.json: cannot be written: Permission denied$"):
        write_json(as_user / "a.json", 1)


def save_text(path):
    path.write_text("x" * 5000)


def save_npz(path):
    with open(path, "wb") as file:
        np.savez(file, a=np.ones(5000))


def save_safetensors(path):
    safetensors.torch.save_file({"a": torch.ones(5000)}, path)


@pytest.mark.parametrize("save", [save_text, save_npz, save_safetensors])
def test_full_disk(tmp_path, save):
    """The limit on file sizes stands for the full disk: the write fails half-way."""

    def write():
        with atomic_write(target) as temporary:
            save(temporary)

    target = tmp_path / "a"
    target.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(EnvironmentProblemError, match=r"a: cannot be written: .*File too large"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


# ---- JSON


def test_json_round_trip(tmp_path):
    value = {"a": [1, 2.5, True, None, "ünï\n\ud800"], "b": {"c": {}}, "big": 10**39, "small": 5e-324}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


@pytest.mark.parametrize(
    ("value", "error"), [(float("nan"), ValueError), ([float("inf")], ValueError), ({"a": {1}}, TypeError)]
)
def test_write_json_refuses_what_json_cannot_hold(tmp_path, value, error):
    with pytest.raises(error, match=r"a.json: expected values that JSON can hold: "):
        write_json(tmp_path / "a.json", value)
    assert os.listdir(tmp_path) == []


def test_json_text_refuses_a_cycle():
    cycle = []
    cycle.append(cycle)
    with pytest.raises(ValueError, match="results: expected values that JSON can hold: Circular reference"):
        json_text(cycle, "results")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b"", "Expecting value"),
        (b'{"a": 1', "Expecting ',' delimiter"),
        (b"{} {}", "Extra data"),
        (b"[NaN]", "the constant NaN"),
        (b"[-Infinity]", "the constant -Infinity"),
        (b"[1e999]", "a number beyond float64, 1e999"),
        (b"1" * 5000, "a number of 5000 digits"),
        (b"1" * 41, "a number of 41 digits"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' twice"),
        (b'{"x": {"\\n": 1, "\\n": 3}}', r"the key '\\n' twice"),
        (b"\xff\xfe", "'utf-8' codec can't decode byte 0xff"),
        (b"\xef\xbb\xbf{}", "Unexpected UTF-8 BOM"),
        (b"[" * 100_000, "nesting deeper than 64"),
        (b'{"a":' * 100_000, "nesting deeper than 64"),
        (b"[" * 65 + b"]" * 65, "nesting deeper than 64"),
    ],
)
def test_read_json_refuses(tmp_path, text, found):
    path = tmp_path / "a.json"
    path.write_bytes(text)
    with pytest.raises(BadFileError, match=f"a.json: expected JSON, found {found}") as caught:
        read_json(path)
    assert len(str(caught.value).splitlines()) == 1


def test_read_json_takes_nesting_up_to_the_limit(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"[" * 64 + b"]" * 64)
    assert json.dumps(read_json(path)).count("[") == 64


def test_read_json_refuses_a_large_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b" " * 101)
    with pytest.raises(BadFileError, match=r"a.json: expected at most 100 bytes of JSON, found more$"):
        read_json(path, max_bytes=100)


# ---- open_file


def test_open_file_refuses_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "file").touch()
    for name, found in {
        "pipe": "a device, pipe or socket",
        "dangling": "none",
        "missing": "none",
        "file/inside": "none",
        "nul\0": "none",
        "": "a folder",
    }.items():
        with pytest.raises(BadFileError, match=f"expected a file, found {found}$"):
            open_file(tmp_path / name)


def test_open_file_without_permission(tmp_path):
    path = tmp_path / "secret"
    path.touch()
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("permissions do not bind this user")
    with pytest.raises(EnvironmentProblemError, match=r"secret: cannot be read: Permission denied$"):
        open_file(path)


def test_open_file_name_too_long(tmp_path):
    with pytest.raises(EnvironmentProblemError, match=r"cannot be read: File name too long$"):
        open_file(tmp_path / ("n" * 300))


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_messages_stay_on_one_line(tmp_path):
    assert shown("a/b ü") == "a/b ü"
    assert shown("a\nb\x1b[31m") == r"'a\nb\x1b[31m'"
    with pytest.raises(BadFileError) as caught:
        read_json(tmp_path / "two\nlines")
    assert "\n" not in str(caught.value)
