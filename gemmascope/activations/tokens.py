"""Rows of tokens on disk: documents tokenised and packed once, read at random ever after.

A folder holds the training and the held-out rows in shards of about 32 MB, the names of the documents, and last of all
manifest.json with the size and SHA-256 of each file. Without it nothing there counts.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..checks import check_int, check_type, is_integer
from ..errors import BadFileError, EnvironmentProblemError
from ..formats.arrays import printable
from ..formats.files import (
    LOCK,
    TEMPORARY,
    as_path,
    create,
    finish,
    flush_folder,
    json_text,
    open_file,
    read_json,
    remove_stale_temporaries,
    sha256_of,
    shown,
    staging,
)
from .documents import Document
from .held_out import HELD_OUT_EVERY

Part = Literal["train", "held_out"]
PARTS: tuple[Part, ...] = ("train", "held_out")

MANIFEST = "manifest.json"
FORMAT, FORMAT_VERSION = "gemmascope tokens", 1
OURS = re.compile(r"(train|held_out)-\d{5,}\.safetensors|documents-\d{5,}\.jsonl|manifest\.json")
SHARD_BYTES = 32 << 20
DOCUMENTS_PER_FILE = 1 << 16
# What the tokenizer is given at once, in characters; it takes a hundred bytes and more for each.
BATCH_CHARACTERS = 1 << 20
PIECE_CHARACTERS = 1 << 18
# Sources counted one by one in the manifest.
MAX_SOURCES = 256


# ---- the tokenizer


@dataclass(frozen=True)
class _Tokenizer:
    """What rows depend on of a tokenizer. size: ids are below it."""

    tokenizer: Any
    bos: int
    eos: int | None
    pad: int
    size: int

    @property
    def special(self) -> tuple[int, ...]:
        return tuple(sorted({self.bos, self.pad} | ({self.eos} if self.eos is not None else set())))

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text, int64, none of them special: its text may name special tokens, but contains none."""
        found = self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        arrays = [np.asarray(ids, dtype=np.int64) for ids in found]
        for ids in arrays:
            if len(ids) and not (ids.min() >= 0 and ids.max() < self.size):
                wrong = ids.min() if ids.min() < 0 else ids.max()
                raise ValueError(f"tokenizer: expected ids from 0 to {self.size - 1}, the largest it has, got {wrong}")
        return arrays


def _as_tokenizer(tokenizer: Any) -> _Tokenizer:
    if not callable(tokenizer) or not hasattr(tokenizer, "bos_token_id") or not hasattr(tokenizer, "get_vocab"):
        raise TypeError(f"tokenizer: expected a tokenizer of transformers, got {type(tokenizer).__name__}")
    bos, eos = tokenizer.bos_token_id, getattr(tokenizer, "eos_token_id", None)
    if bos is None:
        raise ValueError("tokenizer: expected one with a BOS token, which begins every row, got one without")
    pad = getattr(tokenizer, "pad_token_id", None)
    pad = pad if pad is not None else eos if eos is not None else bos
    size = 1 + max([*tokenizer.get_vocab().values(), bos, pad])
    if size > 1 << 32:
        raise ValueError(f"tokenizer: expected ids below 2**32, got {size - 1}")
    return _Tokenizer(tokenizer, bos, eos, pad, size)


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 over what decides the ids that a tokenizer of transformers gives; the same in every process.

    Of a fast tokenizer: its whole state without padding and truncation, and the special ids. Of another: class,
    vocabulary and special ids.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if hasattr(backend, "to_str"):
        state = json.loads(backend.to_str())
        state = {key: value for key, value in state.items() if key not in ("padding", "truncation")}
    else:
        kind = type(tokenizer)
        state = {"class": f"{kind.__module__}.{kind.__qualname__}", "vocabulary": tokenizer.get_vocab()}
    special = [getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "unk")]
    return _digest([state, special])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# ---- making


Progress = Callable[[int, int], Any]


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
    a text of over 2¹⁸ characters is tokenised in pieces, cut at ends of lines.

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
    checked = _as_tokenizer(tokenizer)
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
        found = TokenRows.open(out)
        if found.identity == identity:
            return found
    _check_alone(out)
    with staging(out / MANIFEST) as stage:
        writer = _Writer(stage, checked, settings, progress)
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


def _check_alone(out: Path) -> None:
    """Stale temporaries are gone: one that is left has a living writer, or nobody can tell."""
    with contextlib.suppress(FileNotFoundError):
        if any((out / name / LOCK).exists() for name in os.listdir(out) if TEMPORARY.fullmatch(name)):
            raise EnvironmentProblemError(f"{shown(out)}: expected no other process to write there, found one")


def _content_of(documents: Any, key: str) -> str | None:
    """What is known of the documents without using them up."""
    if hasattr(documents, "content"):
        return documents.content()
    if not isinstance(documents, Iterator):
        digest = hashlib.sha256()
        for document in _reading(documents):
            parts = [part.encode("utf-8", "surrogatepass") for part in (document.source, document.name, document.text)]
            for part in parts:
                digest.update(b"%d " % len(part))
                digest.update(part)
        return digest.hexdigest()
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


def is_held_out(document: Document, every: int) -> bool:
    """Whether it is the one of ``every`` documents that is held out, by the SHA-256 of its source and name."""
    names = json.dumps([document.source, document.name]).encode()
    return int.from_bytes(hashlib.sha256(names).digest()[:8], "big") % every == 0


def _plain(text: str) -> tuple[str, int]:
    """The text with U+FFFD for lone surrogates, which no tokenizer takes, and its bytes in UTF-8."""
    try:
        return text, len(text.encode())
    except UnicodeEncodeError:
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return text, len(text.encode())


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces that are tokenised alike alone and together: cut, if it can be, between two lines."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        end = _cut(text, start + PIECE_CHARACTERS // 2, start + PIECE_CHARACTERS)
        yield text[start:end]
        start = end
    yield text[start:]


def _cut(text: str, low: int, high: int) -> int:
    for mark, after in (("\n", 1), (" ", 0)):  # behind a line feed, before a space: each alone between other characters
        at = text.rfind(mark, low, high)
        while at > low:
            if not text[at - 1].isspace() and not text[at + 1].isspace():
                return at + after
            at = text.rfind(mark, low, at)
    return high


class _Writer:
    """Documents in, files in ``stage`` out."""

    def __init__(self, stage: Path, tokenizer: _Tokenizer, settings: dict[str, Any], progress: Progress | None):
        self._tokenizer, self._settings, self._progress = tokenizer, settings, progress
        self._parts = {part: _PartWriter(stage, part, settings["context"], tokenizer) for part in PARTS}
        self._names = _NamesWriter(stage)
        self._queue: list[tuple[_Open, str, bool]] = []
        self._queued = 0
        self._sources: dict[str, list[int]] = {}
        self._counts = dict.fromkeys(("skipped", "repaired", "cut", "left_out", "bytes", "special_ids_dropped"), 0)

    def add(self, document: Document) -> bool:
        """False when there is no use in more of them."""
        part: Part = "held_out" if is_held_out(document, self._settings["held_out_every"]) else "train"
        text, n_bytes = _plain(document.text)
        self._counts["repaired"] += text is not document.text
        if not text or text.isspace():
            self._counts["skipped"] += 1
            return not self._complete
        opened = _Open(document.source, document.name, part, n_bytes)
        pieces = _pieces(text)
        following = next(pieces, None)
        while following is not None:
            piece, following = following, next(pieces, None)
            self._queue.append((opened, piece, following is None))
            self._queued += len(piece)
            if self._queued >= BATCH_CHARACTERS:
                self._place()
                if following is not None and self._room(opened) == 0:  # the rest of it would be tokenised in vain
                    opened.lost = True
                    self._queue.append((opened, "", True))
                    break
        return not self._complete

    @property
    def _complete(self) -> bool:
        most = self._settings["max_tokens"]
        train, held_out = (self._parts[part] for part in PARTS)
        return most is not None and train.tokens >= most and held_out.documents > 0

    def _room(self, opened: "_Open") -> int:
        """Tokens that may still come from it."""
        most, per_source = self._settings["max_tokens"], self._settings["max_tokens_per_source"]
        room = 1 << 62
        if most is not None:
            room = most - self._parts[opened.part].tokens
        if per_source is not None:
            room = min(room, per_source - self._sources.get(opened.source, [0, 0])[1])
        return room

    def _place(self) -> None:
        queue, self._queue, self._queued = self._queue, [], 0
        texts = [piece for _, piece, _ in queue]
        encoded = self._tokenizer.encode(texts) if texts else []
        for (opened, _, is_last), ids in zip(queue, encoded, strict=True):
            if not self._complete or opened.tokens:
                self._append(opened, ids)
                if is_last:
                    self._close(opened)
        if self._progress is not None:
            self._progress(self._names.documents, sum(part.tokens for part in self._parts.values()))

    def _append(self, opened: "_Open", ids: np.ndarray) -> None:
        text = ids[~np.isin(ids, self._tokenizer.special)]
        self._counts["special_ids_dropped"] += len(ids) - len(text)
        room = self._room(opened)
        opened.lost |= len(text) > room
        text = text[:room]
        if len(text):
            counts = self._sources.setdefault(opened.source, [0, 0])
            counts[0] += opened.tokens == 0
            counts[1] += len(text)
            self._parts[opened.part].append(self._names.documents, text, begins=opened.tokens == 0)
            opened.tokens += len(text)

    def _close(self, opened: "_Open") -> None:
        if opened.tokens:
            self._names.add(opened)
            self._counts["bytes"] += opened.bytes
            self._counts["cut"] += opened.lost
        else:
            self._counts["left_out" if opened.lost else "skipped"] += 1

    def finish(self) -> dict[str, Any]:
        self._place()
        train, held_out = (self._parts[part] for part in PARTS)
        self._check_both(train.documents, held_out.documents)
        for part in self._parts.values():
            part.finish()
        self._names.flush()
        most = sorted(self._sources.items(), key=lambda item: (-item[1][1], item[0]))
        facts = {
            "documents": {part: self._parts[part].documents for part in PARTS},
            "tokens": {part: self._parts[part].tokens for part in PARTS},
            **self._counts,
            "sources": {
                _json_key(name): {"documents": n, "tokens": tokens} for name, (n, tokens) in most[:MAX_SOURCES]
            },
            "n_sources": len(most),
            "packing": "BOS before each document and at the start of each row; a document goes on in the next row",
        }
        return {
            "bos": self._tokenizer.bos,
            "eos": self._tokenizer.eos,
            "pad": self._tokenizer.pad,
            "n_ids": self._tokenizer.size,
            "context": self._settings["context"],
            "parts": {part: self._parts[part].shards for part in PARTS},
            "documents": self._names.files,
            "facts": facts,
        }

    def _check_both(self, train: int, held_out: int) -> None:
        if train and held_out:
            return
        every, skipped = self._settings["held_out_every"], self._counts["skipped"]
        if not train and not held_out:
            raise ValueError(f"documents: expected text, got none ({skipped} empty documents)")
        raise ValueError(
            f"documents: expected some to train on and some held out (one of {every}, by the hash of its name), got "
            f"{train} and {held_out}: give more documents, split long ones (one a line of a .jsonl file), or change "
            "held_out_every"
        )


@dataclass
class _Open:
    """A document on its way into rows. lost: whether a limit cut it."""

    source: str
    name: str
    part: Part
    bytes: int
    tokens: int = 0
    lost: bool = False


def _json_key(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


class _PartWriter:
    """Rows of one part: a shard is written when it is full. shards: what the manifest says of them."""

    def __init__(self, stage: Path, part: Part, context: int, tokenizer: _Tokenizer):
        self.shards: list[dict[str, Any]] = []
        self.documents = self.tokens = 0
        self._stage, self._part, self._context = stage, part, context
        self._bos, self._pad = tokenizer.bos, tokenizer.pad
        self._rows = np.empty((max(1, SHARD_BYTES // (4 * context)), context), dtype="<u4")
        self._row = self._column = 0
        self._numbers: list[int] = []
        self._starts: list[int] = []

    def append(self, number: int, ids: np.ndarray, *, begins: bool) -> None:
        """Tokens of the document ``number``. begins: whether they are its first."""
        self.tokens += len(ids)
        if begins:
            self.documents += 1
            self._mark(number, self._row * self._context + self._column)
            self._put(np.array([self._bos]))
        at = 0
        while at < len(ids):
            if not self._starts:
                self._mark(number, -1)
            if self._column == 0:
                self._put(np.array([self._bos]))
            n = min(self._context - self._column, len(ids) - at)
            self._put(ids[at : at + n])
            at += n

    def _mark(self, number: int, start: int) -> None:
        self._numbers.append(number)
        self._starts.append(start)

    def _put(self, ids: np.ndarray) -> None:
        """Into the row that is being filled, where there is room for them."""
        self._rows[self._row, self._column : self._column + len(ids)] = ids
        self._column += len(ids)
        if self._column == self._context:
            self._row, self._column = self._row + 1, 0
            if self._row == len(self._rows):
                self._flush()

    def finish(self) -> None:
        padding = (self._context - self._column) % self._context
        if padding:
            self._rows[self._row, self._column :] = self._pad
            self._row, self._column = self._row + 1, 0
        if self._row:
            self._flush(padding)

    def _flush(self, padding: int = 0) -> None:
        numbers, starts = (np.array(values, dtype="<i8") for values in (self._numbers, self._starts))
        header = _shard_header(self._row, self._context, len(numbers))
        name = f"{self._part}-{len(self.shards):05d}.safetensors"
        written = _write(
            self._stage / name, header, numbers.data, starts.data, self._rows[: self._row].reshape(-1).data
        )
        self.shards.append({**written, "rows": self._row, "documents": len(numbers), "padding": padding})
        self._row, self._numbers, self._starts = 0, [], []


class _NamesWriter:
    """A line of JSON for each document, by number."""

    def __init__(self, stage: Path):
        self.documents = 0
        self.files: list[dict[str, Any]] = []
        self._stage = stage
        self._lines: list[bytes] = []

    def add(self, opened: _Open) -> None:
        line = {"source": opened.source, "name": opened.name, "part": opened.part, "tokens": opened.tokens}
        self._lines.append(json.dumps(line).encode() + b"\n")
        self.documents += 1
        if len(self._lines) == DOCUMENTS_PER_FILE:
            self.flush()

    def flush(self) -> None:
        if self._lines:
            written = _write(self._stage / f"documents-{len(self.files):05d}.jsonl", *self._lines)
            self.files.append({**written, "documents": len(self._lines)})
            self._lines = []


def _write(path: Path, *parts: Any) -> dict[str, Any]:
    """Write the file and say what the manifest has of it."""
    digest, size = hashlib.sha256(), 0
    mode = create(path)
    with open(path, "wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
            size += memoryview(part).nbytes
    finish(path, mode)
    return {"file": path.name, "bytes": size, "sha256": digest.hexdigest()}


def _shard_header(rows: int, context: int, documents: int) -> bytes:
    """The head of a shard, a safetensors file: documents' numbers, where they start in the shard's tokens (−1: in an
    earlier shard), and the tokens."""
    ends = [8 * documents, 16 * documents, 16 * documents + 4 * rows * context]
    entries = {
        "documents": {"dtype": "I64", "shape": [documents], "data_offsets": [0, ends[0]]},
        "starts": {"dtype": "I64", "shape": [documents], "data_offsets": ends[:2]},
        "tokens": {"dtype": "U32", "shape": [rows, context], "data_offsets": ends[1:]},
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _commit(stage: Path, out: Path, manifest: dict[str, Any]) -> None:
    """Put the files of ``stage`` in the place of those in ``out``, the manifest last: from the moment the old one is
    gone until then there are no rows."""
    entries = {"format": FORMAT, "format_version": FORMAT_VERSION, **manifest}
    text = json_text(entries | {"manifest_sha256": _digest(entries)}, shown(out / MANIFEST))
    names = sorted(name for name in os.listdir(stage) if name != LOCK)
    (out / MANIFEST).unlink(missing_ok=True)
    flush_folder(out)
    for name in os.listdir(out):
        if OURS.fullmatch(name):
            (out / name).unlink()
    for name in names:
        os.replace(stage / name, out / name)
    flush_folder(out)
    _write(stage / MANIFEST, text.encode())
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
    (eos may be None), special_ids: all of them, sorted. facts: counts of documents, tokens and bytes, per source too,
    and what was skipped, cut or left out. identity: what the rows were made of. content: SHA-256 over all of it.

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
        self.facts, self.identity = manifest["facts"], manifest["identity"]
        self._shards = {part: [_Shard(**shard) for shard in manifest["parts"][part]] for part in PARTS}
        self._names = [_File(**file) for file in manifest["documents"]]
        self._firsts = {part: np.cumsum([0] + [shard.rows for shard in self._shards[part]]) for part in PARTS}
        self.n_train, self.n_held_out = (int(self._firsts[part][-1]) for part in PARTS)
        self.n_documents = sum(file.documents for file in self._names)
        self.content = _digest({name: value for name, value in manifest.items() if name not in ("facts", "identity")})
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
        extra = (
            {name for name in os.listdir(folder) if OURS.fullmatch(name)} - {file.file for file in files} - {MANIFEST}
        )
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
                head = len(_shard_header(shard.rows, self.context, shard.documents))
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
        index, line = divmod(number, DOCUMENTS_PER_FILE)
        last, lines = self._last
        if last != index:
            file = self._names[index]
            with self._opened(file) as descriptor:
                data = np.empty(file.bytes, dtype=np.uint8)
                self._fill(descriptor, data, 0, file)
            lines = data.tobytes().splitlines()
            self._last = index, lines
        found = json.loads(lines[line])
        return found["source"], found["name"]

    def _read(self, part: Part, rows: Tensor) -> Tensor:
        numbers = self._numbers(part, rows)
        found = np.empty((len(numbers), self.context), dtype="<u4")
        for shard, picked, within in self._by_shard(part, numbers):
            head = len(_shard_header(shard.rows, self.context, shard.documents)) + 16 * shard.documents
            with self._opened(shard) as descriptor:
                for index, row in zip(picked.tolist(), within.tolist(), strict=True):
                    self._fill(descriptor, found[index], head + 4 * self.context * row, shard)
        return torch.from_numpy(found.astype(np.int64))

    def _numbers(self, part: Part, rows: Tensor) -> np.ndarray:
        if not is_integer(rows):
            raise TypeError(f"rows: expected a torch.Tensor of integers, got {type(rows).__name__}")
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
        digest = sha256_of(opened)
        if digest != file.sha256:
            raise BadFileError(
                f"{shown(self.folder / file.file)}: expected SHA-256 {file.sha256}, found {digest}: delete the folder "
                "to have it made again"
            )
        if isinstance(file, _Shard):
            header = _shard_header(file.rows, self.context, file.documents)
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
FILE_KINDS = {"file": str, "bytes": int, "sha256": str, "documents": int}
SHARD_KINDS = FILE_KINDS | {"rows": int, "padding": int}


def _read_manifest(path: Path) -> dict[str, Any]:
    """What a manifest says, without its seal. Raises BadFileError for anything but a sound one of this version."""
    name = shown(path)
    found = read_json(path)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise BadFileError(f"{name}: format: expected {FORMAT!r}, found another file")
    if found.get("format_version") != FORMAT_VERSION:
        raise BadFileError(
            f"{name}: format_version: expected {FORMAT_VERSION}, found {found.get('format_version')!r:.40}"
        )
    _check_kinds(found, MANIFEST_KINDS, name)
    rest = {key: value for key, value in found.items() if key != "manifest_sha256"}
    if found["manifest_sha256"] != _digest(rest):
        raise BadFileError(f"{name}: expected manifest_sha256 {_digest(rest)}, found {found['manifest_sha256']!r:.70}")
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
            size = len(_shard_header(rows, context, documents)) + 16 * documents + 4 * rows * context
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
