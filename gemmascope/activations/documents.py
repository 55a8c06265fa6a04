"""Documents out of files and datasets, one at a time and strictly: what a text is made of before it is tokens."""

import contextlib
import glob
import gzip
import hashlib
import io
import json
import os
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checks import check_type
from ..errors import BadFileError, EnvironmentProblemError
from ..formats.arrays import printable
from ..formats.files import as_path, open_file, parse_json, sha256_of, shown

# A document is read whole, and tokenised it takes several times its size.
MAX_DOCUMENT_BYTES = 256 << 20
MAX_NAME_CHARACTERS = 1000
# Text deflates to a tenth to a third of its size. Beyond both bounds a .gz is a decompression bomb.
MAX_INFLATION = 200
SMALL_BYTES = 64 << 20
# Of a dataset's stream, between two rows; the waits double from a second to 32, a minute in all.
ATTEMPTS = 7
NETWORK = {"aiohttp", "asyncio", "fsspec", "http", "httpcore", "httpcore2", "httpx", "httpx2", "requests", "urllib3"}


@dataclass(frozen=True)
class Document:
    """A text. name: unique within its source, "corpus/a.txt" or "corpus/a.jsonl:17", say. source: the file or dataset
    that it is out of, or what a line of .jsonl gives as such."""

    name: str
    text: str
    source: str


# ---- files


def read_documents(
    patterns: Sequence[str | os.PathLike], *, field: str = "text", base: str | os.PathLike | None = None
) -> "FileDocuments":
    """The documents of all files that ``patterns`` match, in the order of the files' names, each file once.

    patterns: paths or globs, ``**`` for folders at any depth, relative to ``base`` (default: the current folder).
    A .jsonl file holds an object a line: its text is ``field``; a "name" and a "source" that are strings are the
    document's. Any other file is one document. Both may be compressed, with .gz behind the name. Documents are named
    by the path relative to ``base`` where it lies below, and the line number. All text is UTF-8; a byte-order mark at
    its start is left out. Blank lines of .jsonl hold no document, empty files an empty one.

    Raises, when called, TypeError or ValueError for a wrong argument and BadFileError for a pattern that matches
    nothing, or something that is no file. While the documents are read: BadFileError naming the file, with the line or
    byte, for what is not UTF-8, no object with a string ``field``, damaged or inflated too far, and for a document of
    over 256 MiB; EnvironmentProblemError for a file that cannot be read or changes meanwhile.
    """
    if isinstance(patterns, (str, bytes)) or not isinstance(patterns, Sequence):
        raise TypeError(f"patterns: expected a list of paths or globs, got {type(patterns).__name__}")
    if not patterns:
        raise ValueError("patterns: expected at least one path or glob, got none")
    check_type("field", field, str)
    if not field:
        raise ValueError("field: expected the name of a field, got ''")
    folder = Path(os.path.abspath(as_path("base", "." if base is None else base)))
    return FileDocuments(_files(patterns, folder), field)


def _files(patterns: Sequence[str | os.PathLike], base: Path) -> dict[str, Path]:
    """The files by name, in order."""
    found: dict[str, str] = {}  # by their real path: the shortest name is the one without a link to a folder above it
    for pattern in patterns:
        text = os.fspath(as_path("patterns", pattern))
        names = [text] if os.path.lexists(base / text) else glob.glob(text, root_dir=base, recursive=True)
        names = [name for name in names if _is_no_folder(base / name)]
        if not names:
            what = "a folder; its files are matched by **/*.txt behind it" if (base / text).is_dir() else "none"
            raise BadFileError(
                f"{shown(text)}: expected a file or a glob that matches some in {shown(base)}, found {what}"
            )
        for path, name in ((base / name, _name(name, base)) for name in names):
            real = os.path.realpath(path)
            found[real] = min(found.get(real, name), name, key=lambda name: (name.count("/"), name))
    return {name: base / name for name in sorted(found.values())}


def _is_no_folder(path: Path) -> bool:
    """Raises BadFileError unless it is a folder or a file."""
    if path.is_dir():
        return False
    open_file(path).close()
    return True


def _name(found: str, base: Path) -> str:
    path = Path(os.path.normpath(base / found))
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else Path(os.path.normpath(found)).as_posix()


class FileDocuments(Iterator[Document]):
    """Documents of files by name, made by `read_documents`; an iterator, used once.

    facts: what `tokenise` records of them.
    """

    def __init__(self, files: Mapping[str, Path], field: str):
        self._files = dict(files)
        self._field = field
        self._states: dict[str, tuple[int, ...]] = {}
        self._documents = self._read()
        self.facts: dict[str, Any] = {"files": len(self._files), "field": field}

    def __next__(self) -> Document:
        return next(self._documents)

    def content(self) -> str:
        """SHA-256 over name, size and SHA-256 of every file, all of which it reads.

        A file that changes between this and the reading of its documents raises EnvironmentProblemError there.
        """
        digest = hashlib.sha256(json.dumps(["files", self._field]).encode())
        for name, path in self._files.items():
            with open_file(path) as file, _damage_is_a_bad_file(path):
                self._states[name] = _state(file)
                digest.update(json.dumps([name, self._states[name][-2], sha256_of(file)]).encode())
                self._check_unchanged(name, path, file)
        return digest.hexdigest()

    def _check_unchanged(self, name: str, path: Path, file: io.BufferedReader) -> None:
        if self._states.setdefault(name, _state(file)) != _state(file):
            raise EnvironmentProblemError(
                f"{shown(path)}: expected it to stay the same while it is read, found it changed"
            )

    def _read(self) -> Iterator[Document]:
        for name, path in self._files.items():
            with open_file(path) as file, _damage_is_a_bad_file(path):
                self._check_unchanged(name, path, file)
                plain = name.lower().removesuffix(".gz")
                stream = _Bounded(path, file, inflate=plain != name.lower())
                if plain.endswith(".jsonl"):
                    yield from self._lines(name, stream)
                else:
                    yield Document(name, _text(stream), name)
                self._check_unchanged(name, path, file)

    def _lines(self, name: str, stream: "_Bounded") -> Iterator[Document]:
        number, start = 0, 0
        while line := stream.read_line():
            number += 1
            if line.strip():
                yield self._document(name, number, line, start, stream.name)
            start += len(line)

    def _document(self, name: str, number: int, line: bytes, start: int, file: str) -> Document:
        where = f"{file}: line {number}"
        if start == 0:
            line = line.removeprefix(b"\xef\xbb\xbf")
        _decoded(line, where, start)
        value = parse_json(line, where)
        if not isinstance(value, dict):
            raise BadFileError(f"{where}: expected an object, found {type(value).__name__}")
        if self._field not in value:
            keys = ", ".join(map(printable, list(value)[:8])) or "none"
            raise BadFileError(f"{where}: expected the field {self._field!r}, found {keys}")
        text = value[self._field]
        if not isinstance(text, str):
            raise BadFileError(f"{where}: {printable(self._field)}: expected a string, found {type(text).__name__}")
        given = {
            key: value[key] for key in ("name", "source") if isinstance(value.get(key), str) and key != self._field
        }
        for key, found in given.items():
            if len(found) > MAX_NAME_CHARACTERS:
                raise BadFileError(
                    f"{where}: {key}: expected at most {MAX_NAME_CHARACTERS} characters, found {len(found)}"
                )
        return Document(given.get("name", f"{name}:{number}"), text, given.get("source", name))


def _text(stream: "_Bounded") -> str:
    return _decoded(stream.read(), stream.name).removeprefix("\ufeff")


def _decoded(data: bytes, name: str, start: int = 0) -> str:
    """start: of ``data`` in its file."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte {data[error.start]:#04x} at {start + error.start}"
        raise BadFileError(f"{name}: expected UTF-8, found {found}") from error


def _state(file: io.BufferedReader) -> tuple[int, ...]:
    """What changes when a file does; its size is the last but one."""
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@contextlib.contextmanager
def _damage_is_a_bad_file(path: Path) -> Iterator[None]:
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BadFileError(f"{shown(path)}: expected a .gz file, found damage: {error}") from error
    except OSError as error:
        raise EnvironmentProblemError(f"{shown(path)}: cannot be read: {error.strerror or error}") from error


class _Bounded:
    """The text of an open file, which is at its beginning, inflated or not."""

    def __init__(self, path: Path, file: io.BufferedReader, inflate: bool):
        self.name = shown(path)
        self._stream = gzip.GzipFile(fileobj=file) if inflate else file
        size = os.fstat(file.fileno()).st_size
        self._most = max(SMALL_BYTES, MAX_INFLATION * size) if inflate else None
        self._limit = min(MAX_DOCUMENT_BYTES, self._most or MAX_DOCUMENT_BYTES) + 1

    def read(self) -> bytes:
        return self._checked(self._stream.read(self._limit))

    def read_line(self) -> bytes:
        return self._checked(self._stream.readline(self._limit))

    def _checked(self, data: bytes) -> bytes:
        if self._most is not None and self._stream.tell() > self._most:
            raise BadFileError(f"{self.name}: expected text, found over {self._most} bytes in so small a file")
        if len(data) > MAX_DOCUMENT_BYTES:
            raise BadFileError(
                f"{self.name}: expected documents of at most {MAX_DOCUMENT_BYTES >> 20} MiB, found a larger one"
            )
        return data


# ---- datasets


def read_dataset(
    name: str, *, split: str, column: str, revision: str | None = None, config: str | None = None
) -> "DatasetDocuments":
    """The documents of a dataset of the Hugging Face hub, streamed: the text in ``column`` of each row of ``split``.

    config: of the dataset's parts, where it has several. Rows are named "train:17", counted from 0; null is an empty
    document. What is read is one commit: that of ``revision`` when the reading begins. When the stream breaks off, or
    ends before the rows that the dataset says it has, it is opened again at the row where it stopped.

    Raises, when called, TypeError for a wrong argument and EnvironmentProblemError when `datasets` is not installed.
    While the documents are read: EnvironmentProblemError when the stream breaks off seven times at one row, about a
    minute in all; BadFileError for a dataset, split or column that is not there and a row without text.
    """
    for argument, value in (("name", name), ("split", split), ("column", column)):
        check_type(argument, value, str)
        if not value:
            raise ValueError(f"{argument}: expected some text, got ''")
    for argument, value in (("revision", revision), ("config", config)):
        if value is not None:
            check_type(argument, value, str)
    _datasets()
    return DatasetDocuments(name, split, column, revision, config)


def _datasets() -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise EnvironmentProblemError(
            'datasets: expected to be installed to read a dataset, found none: pip install "gemmascope[data]"'
        ) from error
    return datasets


class DatasetDocuments(Iterator[Document]):
    """Documents of a dataset, made by `read_dataset`; an iterator, used once.

    facts: what `tokenise` records of them; the commit once the reading has begun.
    """

    def __init__(self, name: str, split: str, column: str, revision: str | None, config: str | None):
        self.facts: dict[str, Any] = {
            "dataset": name, "config": config, "split": split, "column": column, "revision": revision
        }  # fmt: skip
        self._is_pinned = False
        self._identity = json.dumps(["dataset", *self.facts.values()])
        self._documents = self._read()

    def __next__(self) -> Document:
        return next(self._documents)

    def content(self) -> str:
        """SHA-256 of what was asked for. The rows are not looked at: a branch that has moved since is not noticed."""
        return hashlib.sha256(self._identity.encode()).hexdigest()

    def _read(self) -> Iterator[Document]:
        row, failures = 0, 0
        rows: Iterator[Any] | None = None
        announced, end = None, object()
        while True:
            try:
                if rows is None:
                    rows, announced = self._open(row)
                example = next(rows, end)
                if example is end and announced is not None and row < announced:
                    raise ConnectionError(f"its end, though it says that it has {announced:,}")
            except Exception as error:
                failures += 1
                self._wait(error, row, failures)
                rows = None
                continue
            if example is end:
                return
            failures = 0
            yield self._document(row, example)
            row += 1

    def _open(self, row: int) -> tuple[Iterator[Any], int | None]:
        """The rows from ``row`` on, and how many there are in all where the dataset says so."""
        facts = self.facts
        if not self._is_pinned and not os.path.isdir(facts["dataset"]):
            facts["revision"] = _commit(facts["dataset"], facts["revision"])
        self._is_pinned = True
        stream = _datasets().load_dataset(
            facts["dataset"], facts["config"], split=facts["split"], revision=facts["revision"], streaming=True
        )
        splits = getattr(getattr(stream, "info", None), "splits", None) or {}
        announced = getattr(splits.get(facts["split"]), "num_examples", None)
        return iter(stream.skip(row) if row else stream), announced or None

    def _wait(self, error: Exception, row: int, failures: int) -> None:
        """Until the next attempt. Raises the final error when there is no use in one."""
        name, reason = shown(self.facts["dataset"]), (str(error) or type(error).__name__).splitlines()[0]
        if isinstance(error, (MemoryError, EnvironmentProblemError, BadFileError)):
            raise error
        if _status(error) in (401, 403):
            raise EnvironmentProblemError(f"{name}: access is restricted: {reason}") from error
        where = f"{name}: row {row:,} of the split {self.facts['split']!r}"
        if not _may_pass(error):
            raise BadFileError(f"{where}: cannot be read: {reason}") from error
        if failures == ATTEMPTS:
            raise EnvironmentProblemError(
                f"{where}: the stream broke off there {ATTEMPTS} times: {reason}; start again when the network is back"
            ) from error
        time.sleep(2 ** (failures - 1))

    def _document(self, row: int, example: Any) -> Document:
        name, column = self.facts["dataset"], self.facts["column"]
        if column not in example:
            keys = ", ".join(map(printable, list(example)[:8]))
            raise BadFileError(f"{shown(name)}: expected the column {column!r}, found {keys}")
        text = example[column]
        if text is not None and not isinstance(text, str):
            raise BadFileError(
                f"{shown(name)}: row {row}: {printable(column)}: expected text, found {type(text).__name__}"
            )
        return Document(f"{self.facts['split']}:{row}", text or "", name)


def _commit(name: str, revision: str | None) -> str | None:
    """So that a stream opened again goes on in the same data."""
    import huggingface_hub

    return huggingface_hub.HfApi().dataset_info(name, revision=revision).sha


def _may_pass(error: Exception) -> bool:
    """Whether it is the network's, or a server's that may be up later."""
    status = _status(error)
    if isinstance(status, int) and 400 <= status < 500:
        return status in (408, 429)
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)):
        return False
    return isinstance(error, OSError) or any(kind.__module__.split(".")[0] in NETWORK for kind in type(error).__mro__)


def _status(error: Exception) -> Any:
    return getattr(getattr(error, "response", None), "status_code", None)
