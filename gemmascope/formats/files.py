"""Files in and out: written whole or not at all, read strictly.

What is read may be damaged or hostile. Every refusal is a `BadFileError` of one line naming the file, what was
expected and what was found; what the machine cannot do is an `EnvironmentProblemError`.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors

from ..checks import check_int, check_type
from ..errors import BadFileError, EnvironmentProblemError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MAX_JSON_BYTES = 16 << 20
MAX_JSON_DEPTH = 64
MAX_JSON_DIGITS = 40


def shown(path: str | os.PathLike) -> str:
    """``path`` as one printable line."""
    text = os.fspath(path)
    return text if text.isprintable() else repr(text)


def as_path(name: str, path: str | os.PathLike) -> Path:
    """The argument ``name`` as a Path. Raises TypeError for what is none."""
    try:
        return Path(path)
    except TypeError as error:
        raise TypeError(f"{name}: expected a str or an os.PathLike, got {type(path).__name__}") from error


# ---- writing

# The folder in which a writer works, beside what it writes. With a suffix: a file that earlier versions wrote there.
TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{16}(\.\w+)?")
LOCK = ".tmp-lock"
ATTEMPTS = 100


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Write the file ``path`` whole or not at all: yields a temporary path, renamed to ``path`` when the block ends.

        with atomic_write("runs/a/results.npz") as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)

    The temporary file has the name of ``path`` and lies in a folder ``.tmp-…`` beside it (folders that are missing are
    made). It is flushed to the disk before the rename, so that ``path`` holds the old bytes or all of the new ones,
    whatever happens. Its mode is the one that the umask gives, whatever wrote it. When the block raises, the temporary
    folder and the folders made for it are removed; what a killed process leaves, `remove_stale_temporaries` removes.
    Raises EnvironmentProblemError when the file cannot be written: unwritable folder, full disk, ``path`` is a folder,
    ….
    """
    path = as_path("path", path)
    with staging(path) as stage:
        temporary = stage / path.name
        mode = create(temporary)
        yield temporary
        finish(temporary, mode)
        os.replace(temporary, path)
        flush_folder(path.parent)


@contextlib.contextmanager
def staging(path: Path) -> Iterator[Path]:
    """A new folder for what will take the place of ``path``, beside it; gone when the block ends.

    When the block raises, the folders made for it go too, and an OSError becomes an EnvironmentProblemError.
    """
    try:
        os.stat(path)
    except OSError:
        pass
    except ValueError as error:  # a NUL, or characters that no file name can hold
        raise ValueError(f"path: expected a path, got {shown(path)}") from error
    missing = [folder for folder in path.parents if not os.path.lexists(folder)]
    stage, lock, done = None, None, False
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        stage, lock = _locked_folder(path.parent)
        yield stage
        done = True
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise EnvironmentProblemError(f"{shown(path)}: cannot be written: {reason}") from error
    finally:
        with contextlib.suppress(OSError):
            if stage is not None:
                _discard(stage)
            for folder in missing if not done else ():
                folder.rmdir()
        if lock is not None:
            os.close(lock)


def create(path: Path) -> int:
    """Make the new file ``path``; its mode."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)


def finish(path: Path, mode: int) -> None:
    """Flush what was written to the disk, in ``mode``: `safetensors` puts a file of mode 0600 in the place of ours."""
    if stat.S_IMODE(path.stat().st_mode) != mode:
        path.chmod(mode)
    _flush_to_disk(path)


def flush_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some network file systems cannot
        _flush_to_disk(folder)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_stale_temporaries(folder: str | os.PathLike) -> None:
    """Remove from ``folder`` what writers left that were killed. What a living process writes there stays.

    A writer holds a lock of the kernel while it lives. Without such locks (Windows, some network file systems) nothing
    is removed. Subfolders are not searched.
    """
    folder = as_path("folder", folder)
    with contextlib.suppress(OSError, ValueError):
        for path in [path for path in folder.iterdir() if TEMPORARY.fullmatch(path.name)]:
            with contextlib.suppress(OSError):
                _remove_unless_alive(path)


def _remove_unless_alive(path: Path) -> None:
    if fcntl is None:
        return
    if not stat.S_ISDIR(path.lstat().st_mode):
        path.unlink()
        return
    try:
        lock = os.open(path / LOCK, os.O_RDWR)
    except FileNotFoundError:
        path.rmdir()  # killed between making the folder and locking it, or about to: then it makes another
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _discard(path)
    finally:
        os.close(lock)


def is_being_written(folder: str | os.PathLike) -> bool:
    """Whether a living process writes into ``folder`` now. False where there are no locks to tell it by."""
    if fcntl is None:
        return False
    with contextlib.suppress(OSError, ValueError):
        for path in [path for path in as_path("folder", folder).iterdir() if TEMPORARY.fullmatch(path.name)]:
            with contextlib.suppress(OSError), open(path / LOCK, "r+b") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return True
    return False


def _locked_folder(parent: Path) -> tuple[Path, int | None]:
    """A new temporary folder, and the descriptor that holds its lock where there are locks."""
    for _ in range(ATTEMPTS):  # until no other process takes it for a dead one's before it is locked
        parent.mkdir(parents=True, exist_ok=True)
        folder = parent / f".tmp-{secrets.token_hex(8)}"
        with contextlib.suppress(FileNotFoundError):
            folder.mkdir()
            if fcntl is None:
                return folder, None
            try:
                lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            except BaseException:
                folder.rmdir()
                raise
            if _is_held(lock):
                return folder, lock
            os.close(lock)
    raise FileNotFoundError("its folder vanishes as soon as it is made")


def _is_held(lock: int) -> bool:
    """Whether this process now holds the lock, or nobody can."""
    assert fcntl is not None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return os.fstat(lock).st_nlink > 0


def _discard(folder: Path) -> None:
    """Remove a temporary folder, its lock last: without it, nobody could tell that its writer is dead."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == LOCK):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    folder.rmdir()


def json_text(obj: Any, name: str) -> str:
    """``obj`` as strict JSON. Raises ValueError or TypeError naming ``name`` for NaN, Inf, what JSON cannot hold and
    what `parse_json` would refuse."""
    try:
        text = json.dumps(obj, indent=2, allow_nan=False) + "\n"
        parse_json(text.encode(), name)
        return text
    except BadFileError as error:
        raise ValueError(str(error)) from error
    except TypeError as error:
        raise TypeError(f"{name}: expected values that JSON can hold: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: expected values that JSON can hold: {error}") from error


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """Write ``obj`` as JSON, atomically. What `read_json` would refuse raises ValueError, as do NaN and Inf: write None
    for what is not a number."""
    path = as_path("path", path)
    text = json_text(obj, shown(path))
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"{shown(path)}: expected at most {MAX_JSON_BYTES} bytes of JSON, got {len(text)}")
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


# ---- reading


def open_file(path: str | os.PathLike) -> io.BufferedReader:
    """Open a regular file for reading bytes. Raises BadFileError when there is none (a pipe would hang the reader)."""
    path = as_path("path", path)
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            found = "a folder" if stat.S_ISDIR(mode) else "a device, pipe or socket"
            raise BadFileError(f"{shown(path)}: expected a file, found {found}")
        return open(path, "rb")
    except BadFileError:
        raise
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise BadFileError(f"{shown(path)}: expected a file, found none") from error
    except OSError as error:
        raise EnvironmentProblemError(f"{shown(path)}: cannot be read: {error.strerror}") from error


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of the bytes of a file, in hexadecimal."""
    with open_file(path) as file:
        return sha256_of(file)


def sha256_of(file: io.BufferedReader) -> str:
    """The same of an open file, which is at its beginning before and after."""
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    file.seek(0)
    return digest


def read_json(path: str | os.PathLike, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """The value of a JSON file. Raises BadFileError for all that `parse_json` refuses and for over ``max_bytes``."""
    check_int("max_bytes", max_bytes, 0)
    with open_file(path) as file:
        return read_json_of(file, shown(path), max_bytes)


def read_manifest(path: str | os.PathLike, format: str, version: int) -> dict[str, Any]:
    """The object in a JSON file of ours. Raises BadFileError as `read_json` does, and for one that does not say that it
    is of this ``format`` and ``format_version``."""
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != format:
        raise BadFileError(f"{shown(path)}: format: expected {format!r}, found another file")
    if manifest.get("format_version") != version:
        found = f"{manifest.get('format_version')!r:.40}"
        raise BadFileError(f"{shown(path)}: format_version: expected {version}, found {found}")
    return manifest


def seal(content: Mapping[str, Any]) -> str:
    """The SHA-256 of what a manifest says, in an order that is always the same."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_json_of(file: io.BufferedReader, name: str, max_bytes: int) -> Any:
    """The same of an open file."""
    data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise BadFileError(f"{name}: expected at most {max_bytes} bytes of JSON, found more")
    return parse_json(data, name)


def parse_json(data: bytes, name: str) -> Any:
    """The value of JSON bytes in UTF-8.

    Raises BadFileError naming ``name`` for what is not JSON (NaN and Infinity are not), duplicate keys, numbers of
    over 40 digits or beyond float64, and nesting deeper than 64.
    """
    check_type("data", data, bytes)
    try:
        value = json.loads(
            data.decode("utf-8"),
            parse_constant=_refuse_constant,
            parse_int=_parse_int,
            parse_float=_parse_float,
            object_pairs_hook=_parse_object,
        )
        _check_depth(value)
    except RecursionError as error:
        raise BadFileError(f"{name}: expected JSON, found nesting deeper than {MAX_JSON_DEPTH}") from error
    except ValueError as error:
        raise BadFileError(f"{name}: expected JSON, found {error}") from error
    return value


def _refuse_constant(text: str):
    raise ValueError(f"the constant {text}")


def _parse_int(text: str) -> int:
    if len(text) > MAX_JSON_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _parse_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"a number beyond float64, {text[:MAX_JSON_DIGITS]}")
    return value


def _parse_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {duplicate[:40]!r} twice")
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise RecursionError
