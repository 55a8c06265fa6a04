"""The folder of a run: its stages, what each of them left there, and a lock for the process that works in it.

stages.json holds, of every stage that is done, a key of all that it depends on, the content of the stages before it
included, and the checksums of the files it left. A later run does only what is missing or was made from something
else, and notices what was damaged since.
"""

import hashlib
import json
import math
import os
import socket
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from .checks import check_type
from .errors import BadFileError, EnvironmentProblemError
from .formats.files import TEMPORARY, as_path, read_json, remove_stale_temporaries, sha256, shown, write_json
from .version import __version__

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

STAGES, LOCK = "stages.json", "run.lock"


def key_of(*parts: Any) -> str:
    """16 hexadecimal digits that differ when ``parts`` do.

    They are made of what JSON holds, paths, bytes and tensors, which count by dtype, shape and content. Raises
    TypeError for anything else, whose text might hide a difference.
    """
    return hashlib.sha256(json.dumps(_plain(parts), sort_keys=True).encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, bytes):
        return {"bytes": hashlib.sha256(value).hexdigest()}
    if isinstance(value, torch.Tensor):
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return {"tensor": [str(value.dtype), list(value.shape), hashlib.sha256(content.data).hexdigest()]}
    what = "a dict with other keys than strings" if isinstance(value, dict) else type(value).__name__
    raise TypeError(f"parts: expected values of JSON, paths, bytes and tensors, got {what}")


class Run:
    """A run in ``folder``, made if missing, and locked until `close`, the end of a ``with`` or that of the process.

        with Run("runs/a") as run:
            model = run.stage("model", settings)
            if not model.done():
                with model.doing():
                    model.facts["loss"] = train_and_save(path)  # best by `formats.files.atomic_write`
                    model.keep(path)
            figures = run.stage("figures", after=[model])
            ...

    fresh: forget the stages that are done. kind: what the message below calls the run.

    A stages.json that is damaged counts as none, an entry of it that is not a stage as not done. What killed processes
    left half written is removed. Raises ValueError for a file, and for a folder of other files, which is left alone;
    EnvironmentProblemError when another process, or another `Run` of this one, works in the folder and when it cannot
    be written.

    The lock is the kernel's, on run.lock, and ends with the process however that ends. A child made by fork shares it.
    Without fcntl (Windows) there is none: a RuntimeWarning says so.
    """

    def __init__(self, folder: str | os.PathLike, fresh: bool = False, kind: str = "run"):
        self.folder = as_path("folder", folder)
        check_type("fresh", fresh, bool)
        self._lock: int | None = None
        if "\0" in str(self.folder) or (os.path.lexists(folder) and not os.path.isdir(folder)):
            raise ValueError(f"out: expected a folder, found none: {shown(self.folder)}")
        if _holds_other_files(self.folder):
            raise ValueError(
                f"out: expected a new folder or that of an earlier {kind}, found other files in {shown(self.folder)}"
            )
        self._lock = _locked(self.folder)
        try:
            for inner, *_ in os.walk(self.folder):
                remove_stale_temporaries(inner)
            self.stages: dict[str, dict[str, Any]] = {} if fresh else _stages_in(self.folder)
            self._write(self.stages)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let other processes work in the folder; a second call does nothing."""
        descriptor, self._lock = self._lock, None
        if descriptor is not None:
            with suppress(OSError):
                os.ftruncate(descriptor, 0)
            os.close(descriptor)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def stage(self, name: str, *settings: Any, after: Sequence["Stage"] = ()) -> "Stage":
        """The stage ``name``, which depends on ``settings`` (see `key_of`), on what the stages ``after`` left and on
        the version of this package.

        Raises ValueError when one of those is not done.
        """
        check_type("name", name, str)
        before = {stage.name: stage.content for stage in after}
        return Stage(self, name, key_of(__version__, settings, before), before)

    def _check_held(self) -> None:
        if fcntl is None:
            return
        if self._lock is None:
            raise ValueError(f"{shown(self.folder)}: expected an open run, found it closed")
        if not _is_at(self.folder / LOCK, self._lock):
            raise EnvironmentProblemError(f"{shown(self.folder)}: expected {LOCK} of this run in it, found it removed")

    def _write(self, stages: dict[str, dict[str, Any]]) -> None:
        self._check_held()
        write_json(self.folder / STAGES, stages)
        self.stages = stages


class Stage:
    """A stage of a `Run`, made by `Run.stage`. facts: values of JSON that it leaves besides files."""

    def __init__(self, run: Run, name: str, key: str, before: dict[str, str]):
        self.run, self.name, self.key = run, name, key
        self.facts: dict[str, Any] = dict(self._record["facts"]) if self._record else {}
        self._before = before
        self._kept: dict[str, Path] = {}
        self._started: float | None = None

    @property
    def _record(self) -> dict[str, Any]:
        record = self.run.stages.get(self.name, {})
        return record if record.get("key") == self.key else {}

    def done(self) -> bool:
        """Whether the stage was done with this key and its files are all there.

        Raises BadFileError for a file that is not what the stage left: deleted, it is made again.
        """
        return bool(self._record) and _unchanged(self.run.folder, self.name, self._record)

    @property
    def content(self) -> str:
        """A key of what the stage left. Raises ValueError when it is not done."""
        if not self._record:
            raise ValueError(f"after: expected stages that are done, got {self.name!r}, which is not")
        return _content(self._record)

    @property
    def seconds(self) -> float:
        """How long the stage took or, while it is being done, has taken so far."""
        if self._started is not None:
            return round(time.monotonic() - self._started, 2)
        return self._record.get("seconds", 0.0)

    def keep(self, *paths: str | os.PathLike) -> None:
        """Files in the run's folder that the stage leaves, for the block of `doing` to name."""
        for path in (as_path("paths", path) for path in paths):
            if not path.is_relative_to(self.run.folder) or ".." in path.parts:
                raise ValueError(f"paths: expected files in {shown(self.run.folder)}, got {shown(path)}")
            self._kept[path.relative_to(self.run.folder).as_posix()] = path

    @contextmanager
    def doing(self) -> Iterator["Stage"]:
        """The block does the stage, adds to `facts` and names the files it leaves by `keep`.

        The stage is done when the block ends well. From its start until then it is not, whatever was done before, for
        its files may be in pieces.
        """
        run = self.run
        run._write({name: record for name, record in run.stages.items() if name != self.name})
        self.facts, self._kept, self._started = {}, {}, time.monotonic()
        try:
            yield self
            files = {name: {"sha256": sha256(path), "bytes": path.stat().st_size} for name, path in self._kept.items()}
            record = {"key": self.key, "seconds": self.seconds, "after": self._before}
            run._write(run.stages | {self.name: record | {"files": files, "facts": self.facts}})
        finally:
            self._started = None


def check_finished(folder: str | os.PathLike, stage: str) -> None:
    """Raise BadFileError unless ``stage`` of the run in ``folder`` is done, from what the stages before it hold now.

    A folder without stages.json, into which results alone were copied, is let through.
    """
    folder = as_path("folder", folder)
    if not os.path.lexists(folder / STAGES):
        return
    stages, names = _stages_in(folder), [stage]
    for name in names:  # grows
        for before, content in stages.get(name, {}).get("after", {}).items():
            if before not in names:
                names.append(before)
            if before in stages and _content(stages[before]) != content:
                raise BadFileError(f"{shown(folder)}: expected a finished run, found {before!r} done again since")
        if name not in stages or (name == stage and not _unchanged(folder, name, stages[name])):
            raise BadFileError(f"{shown(folder)}: expected a finished run, found {name!r} not done")


def _content(record: dict[str, Any]) -> str:
    return key_of(record["files"], record["facts"])


def _unchanged(folder: Path, name: str, record: dict[str, Any]) -> bool:
    """False when a file of the stage is missing. Raises BadFileError for one that changed."""
    for file, left in record["files"].items():
        path, size = folder / file, left["bytes"]
        if not os.path.lexists(path):
            return False
        found = os.path.getsize(path) if os.path.isfile(path) else None
        if found != size or sha256(path) != left["sha256"]:
            raise BadFileError(
                f"{shown(path)}: expected the {size} bytes that the stage {name!r} left, found "
                f"{'other ones' if found == size else 'no file' if found is None else found}; "
                "delete it to have it made again"
            )
    return True


def _holds_other_files(folder: Path) -> bool:
    if not os.path.isdir(folder) or any(os.path.lexists(folder / name) for name in (STAGES, LOCK)):
        return False
    try:
        return any(not TEMPORARY.fullmatch(path.name) for path in folder.iterdir())
    except OSError as error:
        raise EnvironmentProblemError(f"{shown(folder)}: cannot be read: {error.strerror}") from error


def _stages_in(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        found = read_json(folder / STAGES)
    except BadFileError:
        return {}
    return {name: stage for name, stage in found.items() if _is_record(stage)} if isinstance(found, dict) else {}


def _is_record(record: Any) -> bool:
    kinds = {"key": str, "seconds": (int, float), "after": dict, "files": dict, "facts": dict}
    return (
        isinstance(record, dict)
        and record.keys() == kinds.keys()
        and all(isinstance(record[key], kind) for key, kind in kinds.items())
        and math.isfinite(record["seconds"])
        and all(isinstance(content, str) for content in record["after"].values())
        and all(_is_inside(file) and _is_checksum(left) for file, left in record["files"].items())
    )


def _is_inside(file: str) -> bool:
    path = PurePosixPath(file)
    return file != "" and "\0" not in file and not path.is_absolute() and ".." not in path.parts


def _is_checksum(left: Any) -> bool:
    return isinstance(left, dict) and {key: type(value) for key, value in left.items()} == {"sha256": str, "bytes": int}


def _locked(folder: Path) -> int | None:
    """The descriptor that holds the lock of ``folder``; None where the platform has no such lock."""
    if fcntl is None:
        warnings.warn(
            f"{shown(folder)}: not locked, this platform has no fcntl; do not run twice in it at once",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    descriptor = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
        return descriptor
    except OSError as error:
        if isinstance(error, BlockingIOError) and descriptor is not None:
            problem = f"expected no other process to work in it, found {_holder(descriptor)}"
        else:
            problem = f"cannot be locked: {error.strerror or error}"
        if descriptor is not None:
            os.close(descriptor)
        raise EnvironmentProblemError(f"{shown(folder)}: {problem}") from error


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


def _holder(descriptor: int) -> str:
    """Who holds the lock, as it wrote; it may not have come to that yet."""
    text = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip()
    return text if text.startswith("pid ") and text.isprintable() else "one"
