"""The folder of a run: which stages are done, and a lock for the process that works in it.

A stage leaves its files in the folder and a key of all that they depend on in stages.json, so that a later run does
only what is missing or was made from something else.
"""

import hashlib
import json
import math
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import BadFileError, EnvironmentProblemError
from .formats.files import read_json, shown, write_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

STAGES, LOCK = "stages.json", "run.lock"


def key_of(*parts: Any) -> str:
    """16 hexadecimal digits that differ when ``parts`` do. What JSON cannot hold counts by its ``str``."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Run:
    """A run in ``folder``, made if missing, and locked until `close`, the end of a ``with`` or that of the process.

        with Run("runs/a") as run:
            key = key_of(settings)
            if not run.done("model", key, path):
                with run.doing("model", key) as facts:
                    facts["loss"] = train_and_save(path)  # best by `formats.files.atomic_write`

    fresh: forget the stages that are done. kind: what the message below calls the run.

    A stages.json that is damaged counts as none, an entry of it that is not a stage as not done. Raises ValueError for
    a folder of other files, which is left alone; EnvironmentProblemError when another process, or another `Run` of this
    one, works in the folder and when it cannot be written.

    The lock is the kernel's, on run.lock, and ends with the process however that ends. A child made by fork shares it.
    Without fcntl (Windows) there is none: a RuntimeWarning says so.
    """

    def __init__(self, folder: str | os.PathLike, fresh: bool = False, kind: str = "run"):
        self.folder = Path(folder)
        path = self.folder / STAGES
        is_ours = any(os.path.lexists(file) for file in (path, self.folder / LOCK))
        if not is_ours and self.folder.is_dir() and any(self.folder.iterdir()):
            raise ValueError(
                f"out: expected a new folder or that of an earlier {kind}, found other files in {self.folder}"
            )
        self._lock: int | None = _locked(self.folder)
        try:
            self.stages: dict[str, dict[str, Any]] = _stages_in(path) if path.exists() and not fresh else {}
            write_json(path, self.stages)
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

    def done(self, stage: str, key: str, *files: Path) -> bool:
        """Whether ``stage`` was done with this ``key`` and its ``files`` are still there."""
        return self.facts(stage).get("key") == key and all(path.exists() for path in files)

    def facts(self, stage: str) -> dict[str, Any]:
        """What a stage that is done left: its key, its seconds and the facts given in `doing`; else nothing."""
        return self.stages.get(stage, {})

    @contextmanager
    def doing(self, stage: str, key: str) -> Iterator[dict[str, Any]]:
        """Times the block, which may add facts (values of JSON) to the dict it is given.

        The stage is done when the block ends well. From its start until then it is not, whatever was done before, for
        its files may be in pieces.
        """
        if self._lock is None and fcntl is not None:
            raise ValueError(f"{shown(self.folder)}: expected an open run, found it closed")
        if self.stages.pop(stage, None) is not None:
            write_json(self.folder / STAGES, self.stages)
        facts: dict[str, Any] = {}
        start = time.monotonic()
        yield facts
        stages = self.stages | {stage: {"key": key, "seconds": round(time.monotonic() - start, 2), **facts}}
        write_json(self.folder / STAGES, stages)
        self.stages = stages


def _stages_in(path: Path) -> dict[str, dict[str, Any]]:
    try:
        found = read_json(path)
    except BadFileError:
        return {}
    return {name: stage for name, stage in found.items() if _is_stage(stage)} if isinstance(found, dict) else {}


def _is_stage(stage: Any) -> bool:
    if not isinstance(stage, dict) or not isinstance(stage.get("key"), str):
        return False
    seconds = stage.get("seconds")
    return isinstance(seconds, (int, float)) and math.isfinite(seconds)


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
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
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


def _holder(descriptor: int) -> str:
    """Who holds the lock, as it wrote; it may not have come to that yet."""
    text = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip()
    return text if text.startswith("pid ") and text.isprintable() else "one"
