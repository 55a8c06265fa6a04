"""Saving over a saved SAE: the old one or the new one, at every kill point, for every reader, for every writer."""

import errno
import os
import sys
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from gemmascope import JumpReLUSAE
from gemmascope.errors import BadFileError, EnvironmentProblemError
from gemmascope.formats import pair as pair_module
from gemmascope.formats.pair import Pair
from tests.formats.test_release import METADATA, assert_same_bits, make_sae

NAMES = ("other.npz", "sae")
STEPS = {
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.chmod",
    "os.listdir",
    "os.scandir",
    "fcntl.flock",
}
KILLED, FAILED = 9, 10


def numbered(seed: int) -> JumpReLUSAE:
    sae = make_sae(seed=seed)
    sae.metadata = METADATA | {"seed": seed}
    return sae


def seed_of(path) -> int:
    """Which of `numbered` is there, whole, with its own metadata."""
    sae = JumpReLUSAE.load(path)
    assert_same_bits(sae, make_sae(seed=sae.metadata["seed"]))
    return sae.metadata["seed"]


def in_child(act: Callable[[], None]) -> int:
    """The exit code of ``act`` in a child process."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            act()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def at_step(number: int, act: Callable[[], None]) -> None:
    """Calls ``act`` before the ``number``-th operation on files from now on. For child processes: it stays for good."""
    count = 0

    def hook(event, _):
        nonlocal count
        if event in STEPS:
            count += 1
            if count == number:
                act()

    sys.addaudithook(hook)


def steps(action: Callable[[int], int]) -> Iterator[int]:
    """The exit codes of ``action(1)``, ``action(2)``, … until one is 0: there was no such step."""
    for number in range(1, 200):
        code = action(number)
        yield code
        if code == 0:
            return
    raise AssertionError("a save of 200 steps")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("replaces", [True, False])
def test_killed_at_any_point(tmp_path, name, replaces):
    found = []
    folder = tmp_path / "0"

    def save_and_die(number: int) -> int:
        nonlocal folder
        folder = tmp_path / str(number)
        if replaces:
            numbered(1).save(folder / name)

        def child():
            at_step(number, lambda: os._exit(KILLED))
            numbered(2).save(folder / name)

        return in_child(child)

    for code in steps(save_and_die):
        assert code in (0, KILLED)
        try:
            found.append(seed_of(folder / name))
        except BadFileError:
            assert not replaces
            found.append(1)
        numbered(3).save(folder / name)
        assert seed_of(folder / name) == 3
        assert number_of_files(folder) == 2
    assert len(found) > 15
    assert found == sorted(found)  # the old one up to some point, from then on the new one
    assert found.count(2) > 3


@pytest.mark.parametrize("name", NAMES)
def test_full_disk_at_any_point(tmp_path, name):
    """The save that fails leaves the old SAE or, from the commit on, the new one; the next one succeeds."""
    found = []
    folder = tmp_path / "0"

    def save_on_a_full_disk(number: int) -> int:
        nonlocal folder
        folder = tmp_path / str(number)
        numbered(1).save(folder / name)

        def child():
            code = 0

            def full():
                nonlocal code
                code = FAILED
                raise OSError(errno.ENOSPC, "No space left on device")

            at_step(number, full)
            try:
                numbered(2).save(folder / name)
                assert seed_of(folder / name) == 2
            except EnvironmentProblemError as error:
                assert "No space left on device" in str(error)  # noqa: PT017
            os._exit(code)

        return in_child(child)

    for code in steps(save_on_a_full_disk):
        assert code in (0, FAILED)
        found.append(seed_of(folder / name))
        numbered(3).save(folder / name)
        assert seed_of(folder / name) == 3
        assert number_of_files(folder) == 2
    assert set(found) == {1, 2}


def number_of_files(folder) -> int:
    """Hidden ones too, and no hidden folders."""
    paths = list(folder.rglob("*"))
    assert not any(path.name.startswith(".") for path in paths)
    return sum(path.is_file() for path in paths)


@pytest.mark.parametrize("name", NAMES)
def test_readers_and_writers_at_once(tmp_path, name):
    """Two processes save in turns of their own while a third reads: no load ever fails or mixes."""
    path = tmp_path / name
    numbered(0).save(path)
    end = time.monotonic() + 1.5
    writers = []
    for writer in (1, 2):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                torch.set_num_threads(1)
                saes = [numbered(10 * writer + i) for i in range(3)]
                turn = 0
                while time.monotonic() < end:
                    saes[turn % 3].save(path)
                    turn += 1
                code = 0
            finally:
                os._exit(code)
        writers.append(pid)
    seen, loads = set(), 0
    try:
        while time.monotonic() < end:
            seen.add(seed_of(path))
            loads += 1
    finally:
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in writers]
    assert codes == [0, 0]
    assert loads > 20
    assert len(seen) > 2
    assert seed_of(path) in range(10, 23)
    assert number_of_files(tmp_path) == 2


def test_a_config_that_comes_between_is_read_again(tmp_path, monkeypatch):
    """The first look finds weights alone, the second, of another save, both."""
    path = tmp_path / "params.npz"
    numbered(1).save(path)
    (tmp_path / "config.json").unlink()
    opened, real = [], Pair._open

    def open_after_a_save(self, place, files):
        opened.append(place.name)
        if len(opened) == 2:
            numbered(2).save(path)
        return real(self, place, files)

    monkeypatch.setattr(Pair, "_open", open_after_a_save)
    assert seed_of(path) == 2
    assert opened == ["config.json", "params.npz", "config.json"] * 2


def test_weights_that_move_while_they_are_looked_for_are_found(tmp_path, monkeypatch):
    """A look into the committed folder finds them; before the next look they are at their place."""
    path = tmp_path / "params.npz"
    numbered(1).save(path)
    committed = Pair(path, tmp_path / "config.json").committed
    committed.mkdir()
    path.rename(committed / path.name)
    real = os.path.lexists

    def move_what_was_found(place):
        found = real(place)
        if found and os.fspath(place) == os.fspath(committed / path.name):
            os.replace(place, path)
        return found

    monkeypatch.setattr(os.path, "lexists", move_what_was_found)
    assert seed_of(tmp_path) == 1


def test_another_save_in_the_place_of_the_one_that_moved_on_is_no_error(tmp_path, monkeypatch):
    """Between the look and the opening one save comes to its place, and the next one is committed."""
    path = tmp_path / "params.npz"
    for seed in (2, 1):
        numbered(seed).save(tmp_path / str(seed) / "params.npz")
    pair = Pair(path, tmp_path / "config.json")
    os.rename(tmp_path / "1", pair.committed)
    real = pair_module.open_file

    def move_on(place):
        if os.fspath(place) == os.fspath(pair.committed / "config.json") and not path.exists():
            pair._settle()
            try:
                return real(place)  # it is gone
            finally:
                os.rename(tmp_path / "2", pair.committed)
        return real(place)

    monkeypatch.setattr(pair_module, "open_file", move_on)
    assert seed_of(tmp_path) == 2


def test_what_is_always_replaced_is_said(tmp_path, monkeypatch):
    path = tmp_path / "params.npz"
    numbered(1).save(path)
    monkeypatch.setattr("gemmascope.formats.pair._is_same", lambda one, other: False)
    with pytest.raises(
        EnvironmentProblemError, match=r"params.npz: cannot be read: other processes keep replacing it$"
    ):
        JumpReLUSAE.load(path)


def test_committed_files_of_a_dead_writer_count_as_the_sae_that_is_there(tmp_path):
    """Killed between the commit and the moves into an empty folder."""
    numbered(1).save(tmp_path / "params.npz")
    committed = tmp_path / ".new-params.npz"
    committed.mkdir()
    for name in ("params.npz", "config.json"):
        (tmp_path / name).rename(committed / name)
    assert seed_of(tmp_path) == seed_of(tmp_path / "params.npz") == 1
    with pytest.raises(ValueError, match=r"path: expected a folder for one SAE, got one that holds .*/params.npz$"):
        numbered(2).save(tmp_path)
    (committed / "notes").touch()
    with pytest.raises(EnvironmentProblemError, match=r"cannot be written: other files stay in .new-params.npz$"):
        numbered(2).save(tmp_path / "params.npz")
    assert seed_of(tmp_path) == 1
