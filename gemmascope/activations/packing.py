"""Documents into rows of tokens, shard by shard: what `tokens.tokenise` writes.

A shard is a safetensors file whose head is known beforehand, so that reading it needs no parsing of foreign bytes.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..formats.files import create, finish
from .documents import Document

Part = Literal["train", "held_out"]
PARTS: tuple[Part, ...] = ("train", "held_out")
Progress = Callable[[int, int], Any]

SHARD_BYTES = 32 << 20
DOCUMENTS_PER_FILE = 1 << 16
# What the tokenizer is given at once, in characters; it takes a hundred bytes and more for each.
BATCH_CHARACTERS = 1 << 20
PIECE_CHARACTERS = 1 << 15  # tokenizers take longer than in proportion
DOCUMENT_CHARACTERS = 1 << 6  # what a short document takes more
# Sources counted one by one in the manifest.
MAX_SOURCES = 256


# ---- the tokenizer


@dataclass(frozen=True)
class Encoder:
    """What rows depend on of a tokenizer. size: ids are below it."""

    tokenizer: Any
    bos: int
    eos: int | None
    pad: int
    size: int

    def encode(self, texts: list[str]) -> list[tuple[np.ndarray, int]]:
        """The ids of each text, int64, and how many were left out since they are special: a text may name special
        tokens, but contains none."""
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
        ends = np.cumsum([len(ids) for ids in found])
        whole = np.fromiter(itertools.chain.from_iterable(found), dtype=np.int64, count=int(ends[-1]))
        if len(whole) and not (whole.min() >= 0 and whole.max() < self.size):
            wrong = whole.min() if whole.min() < 0 else whole.max()
            raise ValueError(f"tokenizer: expected ids from 0 to {self.size - 1}, the largest it has, got {wrong}")
        special = (whole == self.bos) | (whole == self.eos) | (whole == self.pad)
        if not special.any():
            return [(ids, 0) for ids in np.split(whole, ends[:-1])]
        pieces = zip(np.split(whole, ends[:-1]), np.split(special, ends[:-1]), strict=True)
        return [(ids[~mask], int(mask.sum())) for ids, mask in pieces]


def as_encoder(tokenizer: Any) -> Encoder:
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
    return Encoder(tokenizer, bos, eos, pad, size)


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 over what decides the ids that a tokenizer of transformers gives; the same in every process.

    Of a fast tokenizer: its whole state without padding and truncation, and the special ids. Of another: class,
    vocabulary and special ids.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if hasattr(backend, "to_str"):
        text = backend.to_str()
        state = text[max(0, text.find('"added_tokens"')) :]  # before it stand the version, truncation and padding
    else:
        kind = type(tokenizer)
        state = {"class": f"{kind.__module__}.{kind.__qualname__}", "vocabulary": tokenizer.get_vocab()}
    special = [getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "unk")]
    return digest([state, special])


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def is_held_out(document: Document, every: int) -> bool:
    """Whether it is the one of ``every`` documents that is held out, by the SHA-256 of its source and name."""
    names = json.dumps([document.source, document.name]).encode()
    return int.from_bytes(hashlib.sha256(names).digest()[:8], "big") % every == 0


def _plain(text: str) -> tuple[str, int]:
    """The text with U+FFFD for lone surrogates, which no tokenizer takes, and its bytes in UTF-8."""
    if text.isascii():
        return text, len(text)
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


# ---- rows


class RowsWriter:
    """Documents in, files in ``stage`` out."""

    def __init__(self, stage: Path, tokenizer: Encoder, settings: dict[str, Any], progress: Progress | None):
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
        if self._is_full(opened):
            self._counts["left_out"] += 1
            return not self._complete
        pieces = _pieces(text)
        following = next(pieces, None)
        while following is not None:
            piece, following = following, next(pieces, None)
            self._queue.append((opened, piece, following is None))
            self._queued += len(piece) + DOCUMENT_CHARACTERS
            if self._queued >= BATCH_CHARACTERS:
                self._place()
                if following is not None and self._is_full(opened):
                    opened.lost = True
                    self._queue.append((opened, "", True))
                    break
        return not self._complete

    @property
    def _complete(self) -> bool:
        most = self._settings["max_tokens"]
        train, held_out = (self._parts[part] for part in PARTS)
        return most is not None and train.tokens >= most and held_out.documents > 0

    def _is_full(self, opened: "_Open") -> bool:
        """Whether more of it would be tokenised in vain."""
        return self._room(opened) == 0 or (self._complete and not opened.tokens)

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
        for (opened, _, is_last), (ids, dropped) in zip(queue, encoded, strict=True):
            if not self._complete or opened.tokens:
                self._append(opened, ids)
                self._counts["special_ids_dropped"] += dropped
                if is_last:
                    self._close(opened)
        if self._progress is not None:
            self._progress(self._names.documents, sum(part.tokens for part in self._parts.values()))

    def _append(self, opened: "_Open", ids: np.ndarray) -> None:
        room = self._room(opened)
        opened.lost |= len(ids) > room
        ids = ids[:room]
        if len(ids):
            counts = self._sources.setdefault(opened.source, [0, 0])
            counts[0] += opened.tokens == 0
            counts[1] += len(ids)
            self._parts[opened.part].append(self._names.documents, ids, begins=opened.tokens == 0)
            opened.tokens += len(ids)

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

    def __init__(self, stage: Path, part: Part, context: int, tokenizer: Encoder):
        self.shards: list[dict[str, Any]] = []
        self.documents = self.tokens = 0
        self._stage, self._part, self._context = stage, part, context
        self._bos, self._pad = np.array([tokenizer.bos]), tokenizer.pad
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
            self._put(self._bos)
        at = 0
        while at < len(ids):
            if not self._starts:
                self._mark(number, -1)
            if self._column == 0:
                self._put(self._bos)
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
        header = shard_header(self._row, self._context, len(numbers))
        name = f"{self._part}-{len(self.shards):05d}.safetensors"
        written = write(self._stage / name, header, numbers.data, starts.data, self._rows[: self._row].reshape(-1).data)
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
            written = write(self._stage / f"documents-{len(self.files):05d}.jsonl", *self._lines)
            self.files.append({**written, "documents": len(self._lines)})
            self._lines = []


def write(path: Path, *parts: Any) -> dict[str, Any]:
    """Write the file and say what the manifest has of it."""
    found, size = hashlib.sha256(), 0
    mode = create(path)
    with open(path, "wb") as file:
        for part in parts:
            file.write(part)
            found.update(part)
            size += memoryview(part).nbytes
    finish(path, mode)
    return {"file": path.name, "bytes": size, "sha256": found.hexdigest()}


def shard_header(rows: int, context: int, documents: int) -> bytes:
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
