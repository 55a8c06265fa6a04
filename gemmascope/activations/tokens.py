"""Rows of tokens on disk: documents tokenised and packed once, read at random ever after.

A folder holds the training and the held-out rows in shards of about 32 MB, the names of the documents, and last of all
manifest.json with the size and SHA-256 of each file. Without it nothing there counts.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import check_int, check_type, found, is_integer
from ..errors import BadFileError, EnvironmentProblemError
from ..formats.arrays import printable
from ..formats.files import (
    LOCK,
    TEMPORARY,
    as_path,
    flush_folder,
    is_being_written,
    json_text,
    open_file,
    parse_json,
    read_manifest,
    remove_stale_temporaries,
    sha256_of,
    shown,
    staging,
)
from .documents import Document
from .held_out import HELD_OUT_EVERY
from .packing import (
    PARTS,
    Part,
    Progress,
    RowsWriter,
    as_encoder,
    digest,
    shard_header,
    tokenizer_hash,
    write,
)

MANIFEST = "manifest.json"
FORMAT, FORMAT_VERSION = "gemmascope tokens", 1
OURS = re.compile(r"(train|held_out)-\d{5,}\.safetensors|documents-\d{5,}\.jsonl|manifest\.json")


# ---- making


def tokenise(
    documents: Iterable[Document],
    tokenizer: Any,
    out: str | os.PathLike,
    *,
    context: int,
    held_out_every: int = HELD_OUT_EVERY,
    max_tokens: int | None = None,
    max_tokens_per_source: int | None = None,
    key: str = "",
    progress: Progress | None = None,
) -> "TokenRows":
    """Tokenise ``documents`` into rows in the folder ``out``, unless it holds just these already.

    A document is BOS and its tokens; documents follow each other, cut into rows of ``context``, each of which begins
    with a BOS of its own. A BOS in the text's own words ("<bos>") stays text. The last row of a part is filled up with
    PAD (without one in the tokenizer: EOS, or BOS). Documents without text are skipped; lone surrogates become U+FFFD;
    a text of over 2¹⁵ characters is tokenised in pieces, cut at ends of lines.

    One document of ``held_out_every`` is held out, by the SHA-256 of its source and name alone: more documents move
    none to the other side, and no row has documents of both. max_tokens: of text in the training rows (BOS and PAD do
    not count); there reading ends, or at the first held-out document if none came before; the held-out rows get no more
    either. max_tokens_per_source: from one source, in both parts together. The document at a limit is cut.

    What ``out`` holds is opened as it is when it was made with the same settings, tokenizer, ``key`` and documents.
    These are known by their ``content()`` (`read_documents`, `read_dataset`); by reading them once more, when they are
    a collection; when they are another iterator, by ``key`` alone, and without one they are tokenised again. Else the
    new rows take the place of the old when they are complete: killed before, the old ones stay. progress: called with
    the documents and the tokens of text so far.

    Raises TypeError or ValueError naming the argument, also when no document, or every one, is held out; BadFileError
    when ``out`` was damaged; EnvironmentProblemError when it cannot be written or another process is writing it; and
    what reading ``documents`` raises.
    """
    if isinstance(documents, (str, bytes, Document)) or not isinstance(documents, Iterable):
        raise TypeError(f"documents: expected an iterable of Document, got {type(documents).__name__}")
    encoder = as_encoder(tokenizer)
    check_int("context", context, 2)
    check_int("held_out_every", held_out_every, 2)
    for name, value in (("max_tokens", max_tokens), ("max_tokens_per_source", max_tokens_per_source)):
        if value is not None:
            check_int(name, value, 1)
    check_type("key", key, str)
    out = as_path("out", out)
    _check_out(out)
    settings = {
        "context": context,
        "held_out_every": held_out_every,
        "max_tokens": max_tokens,
        "max_tokens_per_source": max_tokens_per_source,
    }
    content = _content_of(documents, key)
    identity = {"tokenizer": tokenizer_hash(tokenizer), "settings": settings, "key": key, "documents": content}
    remove_stale_temporaries(out)
    if content is not None and os.path.lexists(out / MANIFEST):
        try:
            found = TokenRows.open(out)
        except BadFileError as error:
            raise BadFileError(f"{error}; delete {shown(out)} to have the rows made again") from error
        if found.identity == identity:
            return found
    if is_being_written(out):
        raise EnvironmentProblemError(f"{shown(out)}: expected no other process to write there, found one")
    with staging(out / MANIFEST) as stage:
        writer = RowsWriter(stage, encoder, settings, progress)
        for document in _reading(documents):
            if not writer.add(document):
                break
        manifest = writer.finish()
        manifest["facts"] |= {"text": getattr(documents, "facts", {})}
        _commit(stage, out, manifest | {"identity": identity})
    return TokenRows.open(out)


def _check_out(out: Path) -> None:
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise ValueError(f"out: expected a folder, found a file: {shown(out)}")
    names = [name for name in os.listdir(out) if not TEMPORARY.fullmatch(name)]
    if names and MANIFEST not in names and not all(map(OURS.fullmatch, names)):
        raise ValueError(f"out: expected a new folder or one of tokens, found other files in {shown(out)}")


def _content_of(documents: Any, key: str) -> str | None:
    """What is known of the documents without using them up."""
    if hasattr(documents, "content"):
        return documents.content()
    if not isinstance(documents, Iterator):
        found = hashlib.sha256()
        for document in _reading(documents):
            for text in (document.source, document.name, document.text):
                data = text.encode("utf-8", "surrogatepass")
                found.update(b"%d " % len(data))
                found.update(data)
        return found.hexdigest()
    return f"key {key}" if key else None


def _reading(documents: Iterable[Document]) -> Iterator[Document]:
    """The documents; their OSErrors are not those of the disk that the rows are written to."""
    try:
        for document in documents:
            if not isinstance(document, Document):
                raise TypeError(f"documents: expected an iterable of Document, got {type(document).__name__} in it")
            yield document
    except OSError as error:
        raise EnvironmentProblemError(f"documents: cannot be read: {error.strerror or error}") from error


def _commit(stage: Path, out: Path, manifest: dict[str, Any]) -> None:
    """Put the files of ``stage`` in the place of those in ``out``, the manifest last: from the moment the old one is
    gone until then there are no rows."""
    name = shown(out / MANIFEST)
    entries = json.loads(json_text({"format": FORMAT, "format_version": FORMAT_VERSION, **manifest}, name))
    text = json_text(entries | {"manifest_sha256": digest(entries)}, name)
    names = sorted(name for name in os.listdir(stage) if name != LOCK)
    (out / MANIFEST).unlink(missing_ok=True)
    flush_folder(out)
    for name in os.listdir(out):
        if OURS.fullmatch(name):
            (out / name).unlink()
    for name in names:
        os.replace(stage / name, out / name)
    flush_folder(out)
    write(stage / MANIFEST, text.encode())
    os.replace(stage / MANIFEST, out / MANIFEST)
    flush_folder(out)


# ---- reading


@dataclass(frozen=True)
class _File:
    file: str
    bytes: int
    sha256: str
    documents: int


@dataclass(frozen=True)
class _Shard(_File):
    rows: int
    padding: int


class TokenRows:
    """Rows of tokens that `tokenise` left in a folder; see there for what a row is. `open` gives one.

    context: tokens of a row. n_train, n_held_out: rows of the two parts. bos, eos, pad: the tokenizer's special ids
    (eos may be None), special_ids: all of them, sorted; n_ids: all ids are below it. n_documents: of both parts,
    numbered in the order in which they came. facts: counts of documents, tokens of text and bytes, per source too, and
    what was skipped, cut or left out. identity: what the rows were made of. content: SHA-256 over all of it.

    A shard's checksum is verified when it is first read, and again when the file has changed since. Nothing is mapped,
    so that a file that is cut off is an error and no crash. Threads may read at once.
    """

    context: int
    n_train: int
    n_held_out: int
    facts: dict[str, Any]
    content: str

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder = folder
        self.context = manifest["context"]
        self.bos, self.eos, self.pad = manifest["bos"], manifest["eos"], manifest["pad"]
        self.special_ids = tuple(sorted({self.bos, self.pad} | ({self.eos} if self.eos is not None else set())))
        self.n_ids = manifest["n_ids"]
        self.facts, self.identity = manifest["facts"], manifest["identity"]
        self._shards = {part: [_Shard(**shard) for shard in manifest["parts"][part]] for part in PARTS}
        self._names = [_File(**file) for file in manifest["documents"]]
        self._firsts = {part: np.cumsum([0] + [shard.rows for shard in self._shards[part]]) for part in PARTS}
        self.n_train, self.n_held_out = (int(self._firsts[part][-1]) for part in PARTS)
        self._first_documents = np.cumsum([0] + [file.documents for file in self._names])
        self.n_documents = int(self._first_documents[-1])
        self.content = digest({name: value for name, value in manifest.items() if name not in ("facts", "identity")})
        self._verified: dict[str, tuple[int, ...]] = {}
        self._last: tuple[int, list[bytes]] = (-1, [])

    @classmethod
    def open(cls, folder: str | os.PathLike) -> "TokenRows":
        """The rows in ``folder``. Raises BadFileError naming the file for a manifest that is missing, damaged or of
        another version, and for files that are missing, of another size or none of its own."""
        folder = as_path("folder", folder)
        manifest = _read_manifest(folder / MANIFEST)
        rows = cls(folder, manifest)
        files = [*rows._names, *(shard for part in PARTS for shard in rows._shards[part])]
        for file in files:
            with open_file(folder / file.file) as found:
                _check_size(folder, file, os.fstat(found.fileno()).st_size)
        expected = {MANIFEST, *(file.file for file in files)}
        extra = {name for name in os.listdir(folder) if OURS.fullmatch(name)} - expected
        if extra:
            raise BadFileError(f"{shown(folder / min(extra))}: expected no such file beside this manifest, found one")
        return rows

    def __repr__(self) -> str:
        return f"TokenRows({shown(self.folder)!r}: {self.n_train} + {self.n_held_out} rows of {self.context})"

    def train(self, rows: Tensor) -> Tensor:
        """Ids int64 [len(rows), context] of the training rows with the numbers ``rows``, in their order, on the CPU.

        Raises TypeError or ValueError for numbers of no rows, BadFileError for a shard that was damaged.
        """
        return self._read("train", rows)

    def held_out(self, rows: Tensor) -> Tensor:
        """The same of the held-out rows."""
        return self._read("held_out", rows)

    def documents_of(self, part: Part, rows: Tensor) -> Tensor:
        """The number of the document that each token is of, int64 [len(rows), context]; −1 at BOS and PAD."""
        if part not in PARTS:
            raise ValueError(f"part: expected 'train' or 'held_out', got {part!r}")
        numbers = self._numbers(part, rows)
        found = np.full((len(numbers), self.context), -1, dtype=np.int64)
        columns = np.arange(self.context, dtype=np.int64)
        for shard, picked, within in self._by_shard(part, numbers):
            with self._opened(shard) as descriptor:
                head = len(shard_header(shard.rows, self.context, shard.documents))
                both = np.empty((2, shard.documents), dtype="<i8")
                self._fill(descriptor, both, head, shard)
            documents, starts = both
            position = within[:, None] * self.context + columns
            index = np.searchsorted(starts, position, side="right") - 1
            is_text = (columns > 0) & (starts[index] != position)
            is_text &= position < shard.rows * self.context - shard.padding
            found[picked] = np.where(is_text, documents[index], -1)
        return torch.from_numpy(found)

    def document_names(self, numbers: Tensor | Sequence[int]) -> list[tuple[str, str]]:
        """(source, name) of the documents with these numbers, each from 0 to ``n_documents`` − 1."""
        if isinstance(numbers, Tensor):
            numbers = numbers.tolist()
        return [self._document_name(number) for number in numbers]

    def _document_name(self, number: int) -> tuple[str, str]:
        check_int("numbers", number, 0)
        if number >= self.n_documents:
            raise ValueError(f"numbers: expected less than the {self.n_documents} documents, got {number}")
        index = int(np.searchsorted(self._first_documents, number, side="right")) - 1
        last, lines = self._last
        if last != index:
            lines = self._lines(self._names[index])
            self._last = index, lines
        where = shown(self.folder / self._names[index].file)
        found = parse_json(lines[number - int(self._first_documents[index])], where)
        _check_kinds(found, NAME_KINDS, where)
        return found["source"], found["name"]

    def _lines(self, file: _File) -> list[bytes]:
        data = np.empty(file.bytes, dtype=np.uint8)
        with self._opened(file) as descriptor:
            self._fill(descriptor, data, 0, file)
        lines = data.tobytes().split(b"\n")
        if len(lines) != file.documents + 1:
            raise BadFileError(
                f"{shown(self.folder / file.file)}: expected {file.documents} lines, found {len(lines) - 1}"
            )
        return lines

    def _read(self, part: Part, rows: Tensor) -> Tensor:
        numbers = self._numbers(part, rows)
        found = np.empty((len(numbers), self.context), dtype="<u4")
        for shard, picked, within in self._by_shard(part, numbers):
            head = len(shard_header(shard.rows, self.context, shard.documents)) + 16 * shard.documents
            with self._opened(shard) as descriptor:
                for index, row in zip(picked.tolist(), within.tolist(), strict=True):
                    self._fill(descriptor, found[index], head + 4 * self.context * row, shard)
        return torch.from_numpy(found.astype(np.int64))

    def _numbers(self, part: Part, rows: Tensor) -> np.ndarray:
        if not is_integer(rows):
            raise TypeError(f"rows: expected a torch.Tensor of integers, got {found(rows)}")
        if rows.ndim != 1:
            raise ValueError(f"rows: expected shape [n], got {list(rows.shape)}")
        numbers, n = rows.detach().cpu().long().numpy(), int(self._firsts[part][-1])
        if len(numbers) and not (numbers.min() >= 0 and numbers.max() < n):
            wrong = numbers.min() if numbers.min() < 0 else numbers.max()
            raise ValueError(f"rows: expected numbers from 0 to {n - 1}, got {wrong}")
        return numbers

    def _by_shard(self, part: Part, numbers: np.ndarray) -> Iterator[tuple[_Shard, np.ndarray, np.ndarray]]:
        """Each shard that is needed, where its rows go, and which of its rows they are."""
        firsts = self._firsts[part]
        index = np.searchsorted(firsts, numbers, side="right") - 1
        for shard in np.unique(index).tolist():
            picked = np.flatnonzero(index == shard)
            yield self._shards[part][shard], picked, numbers[picked] - firsts[shard]

    @contextlib.contextmanager
    def _opened(self, file: _File) -> Iterator[int]:
        path = self.folder / file.file
        with open_file(path) as opened:
            stat = os.fstat(opened.fileno())
            state = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
            try:
                if self._verified.get(file.file) != state:
                    self._verify(file, opened)
                    self._verified[file.file] = state
                yield opened.fileno()
            except OSError as error:
                raise EnvironmentProblemError(f"{shown(path)}: cannot be read: {error.strerror}") from error

    def _verify(self, file: _File, opened: Any) -> None:
        _check_size(self.folder, file, os.fstat(opened.fileno()).st_size)
        found = sha256_of(opened)
        if found != file.sha256:
            raise BadFileError(
                f"{shown(self.folder / file.file)}: expected SHA-256 {file.sha256}, found {found}: delete the folder "
                "to have it made again"
            )
        if isinstance(file, _Shard):
            header = shard_header(file.rows, self.context, file.documents)
            if opened.read(len(header)) != header:
                raise BadFileError(f"{shown(self.folder / file.file)}: expected rows of tokens, found another header")

    def _fill(self, descriptor: int, array: np.ndarray, start: int, file: _File) -> None:
        view, at = array.reshape(-1).view(np.uint8).data, 0
        while at < len(view):
            count = os.preadv(descriptor, [view[at:]], start + at)
            if count == 0:
                raise BadFileError(
                    f"{shown(self.folder / file.file)}: expected {len(view)} bytes at {start}, found {at}"
                )
            at += count


def _check_size(folder: Path, file: _File, size: int) -> None:
    if size != file.bytes:
        raise BadFileError(f"{shown(folder / file.file)}: expected {file.bytes} bytes, found {size}")


MANIFEST_KINDS = {
    "format": str, "format_version": int, "bos": int, "eos": (int, type(None)), "pad": int, "n_ids": int,
    "context": int, "parts": dict, "documents": list, "facts": dict, "identity": dict, "manifest_sha256": str,
}  # fmt: skip
NAME_KINDS = {"source": str, "name": str, "part": str, "tokens": int}
FILE_KINDS = {"file": str, "bytes": int, "sha256": str, "documents": int}
SHARD_KINDS = FILE_KINDS | {"rows": int, "padding": int}


def _read_manifest(path: Path) -> dict[str, Any]:
    """What a manifest says, without its seal. Raises BadFileError for anything but a sound one of this version."""
    name = shown(path)
    found = read_manifest(path, FORMAT, FORMAT_VERSION)
    _check_kinds(found, MANIFEST_KINDS, name)
    rest = {key: value for key, value in found.items() if key != "manifest_sha256"}
    if found["manifest_sha256"] != digest(rest):
        raise BadFileError(f"{name}: expected manifest_sha256 {digest(rest)}, found {found['manifest_sha256']!r:.70}")
    context = found["context"]
    if context < 2:
        raise BadFileError(f"{name}: context: expected at least 2, found {context}")
    _check_kinds(found["parts"], dict.fromkeys(PARTS, list), f"{name}: parts")
    for part in PARTS:
        for number, shard in enumerate(found["parts"][part]):
            _check_kinds(shard, SHARD_KINDS, f"{name}: {part} {number}")
            rows, documents, padding = shard["rows"], shard["documents"], shard["padding"]
            if rows < 1 or documents < 1 or not 0 <= padding < context:
                raise BadFileError(f"{name}: {part} {number}: expected rows and documents, found none")
            size = len(shard_header(rows, context, documents)) + 16 * documents + 4 * rows * context
            _check_entry(shard, f"{part}-{number:05d}.safetensors", size, name)
    for number, file in enumerate(found["documents"]):
        _check_kinds(file, FILE_KINDS, f"{name}: documents {number}")
        _check_entry(file, f"documents-{number:05d}.jsonl", file["bytes"], name)
    return rest


def _check_kinds(found: Any, kinds: dict[str, Any], name: str) -> None:
    if not isinstance(found, dict) or found.keys() != kinds.keys():
        keys = found.keys() ^ kinds.keys() if isinstance(found, dict) else []
        raise BadFileError(
            f"{name}: expected {', '.join(kinds)}, found {', '.join(sorted(map(printable, keys)))} wrong"
        )
    for key, kind in kinds.items():
        if not isinstance(found[key], kind) or isinstance(found[key], bool):
            raise BadFileError(f"{name}: {key}: expected another type, found {type(found[key]).__name__}")


def _check_entry(entry: dict[str, Any], file: str, size: int, name: str) -> None:
    if entry["file"] != file or entry["bytes"] != size:
        raise BadFileError(
            f"{name}: expected {file} of {size} bytes, found {entry['file']!r:.60} of {entry['bytes']} bytes"
        )
