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
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import BadFileError, EnvironmentProblemError

MAX_JSON_BYTES = 16 << 20
MAX_JSON_DEPTH = 64
MAX_JSON_DIGITS = 40


def shown(path: str | os.PathLike) -> str:
    """``path`` as one printable line."""
    text = os.fspath(path)
    return text if text.isprintable() else repr(text)


# ---- writing


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Write the file ``path`` whole or not at all: yields a temporary path, renamed to ``path`` when the block ends.

        with atomic_write("runs/a/results.npz") as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)

    The temporary file lies in the same folder (created if missing) and is flushed to the disk before the rename, so
    that ``path`` holds the old bytes or all of the new ones, whatever happens. When the block raises, the temporary
    file and the folders created for it are removed. Raises EnvironmentProblemError when the file cannot be written:
    unwritable folder, full disk, ``path`` is a folder, ….
    """
    path = Path(path)
    missing = [folder for folder in path.parents if not os.path.lexists(folder)]
    temporary = path.parent / f".tmp-{secrets.token_hex(8)}{path.suffix}"
    written = False
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        yield temporary
        _flush_to_disk(temporary)
        os.replace(temporary, path)
        written = True
        with contextlib.suppress(OSError):  # some network file systems cannot flush a folder
            _flush_to_disk(path.parent)
    except OSError as error:
        raise EnvironmentProblemError(f"{shown(path)}: cannot be written: {error.strerror or error}") from error
    finally:
        if not written:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
                for folder in missing:
                    folder.rmdir()


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_text(obj: Any, name: str) -> str:
    """``obj`` as strict JSON. Raises ValueError or TypeError naming ``name`` for NaN, Inf and what JSON cannot hold."""
    try:
        return json.dumps(obj, indent=2, allow_nan=False) + "\n"
    except TypeError as error:
        raise TypeError(f"{name}: expected values that JSON can hold: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: expected values that JSON can hold: {error}") from error


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """Write ``obj`` as JSON, atomically. NaN and Inf raise ValueError: write None for what is not a number."""
    text = json_text(obj, shown(path))
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


# ---- reading


def open_file(path: str | os.PathLike) -> io.BufferedReader:
    """Open a regular file for reading bytes. Raises BadFileError when there is none (a pipe would hang the reader)."""
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
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: str | os.PathLike, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """The value of a JSON file. Raises BadFileError for all that `parse_json` refuses and for over ``max_bytes``."""
    with open_file(path) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise BadFileError(f"{shown(path)}: expected at most {max_bytes} bytes of JSON, found more")
    return parse_json(data, shown(path))


def parse_json(data: bytes, name: str) -> Any:
    """The value of JSON bytes in UTF-8.

    Raises BadFileError naming ``name`` for what is not JSON (NaN and Infinity are not), duplicate keys, numbers of
    over 40 digits or beyond float64, and nesting deeper than 64.
    """
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
