"""Text for the demo: the documentation every Python carries, or the user's own files, as documents.

Nothing is downloaded.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..activations import Document
from ..activations.held_out import HELD_OUT_EVERY
from ..activations.packing import is_held_out
from ..activations.python_docs import python_documentation
from ..errors import BadFileError, EnvironmentProblemError
from ..formats.files import as_path, open_file, shown
from .byte_tokenizer import BOS

VOCAB_SIZE = BOS + 1
MAX_TEXT_BYTES = 64 << 20
PIECE_CHARACTERS = 4096
"""Of the pieces that a file is cut into; a short text has smaller ones, down to `SMALLEST_PIECE`."""
SMALLEST_PIECE = 32


def read(paths: Sequence[str | os.PathLike], context: int) -> list[Document]:
    """The documents of the files ``paths``; without any, Python's own documentation. Some of them are held out.

    A file is cut at blank lines, or where there is none at ends of lines or words, into documents of a few kB named
    FILE:OFFSET, in characters: enough of them that some are held out, even of one short file.

    Raises TypeError and ValueError as `read_files`, and ValueError for text that is too short for rows of ``context``
    tokens on both sides.
    """
    if not paths:
        return python_documentation()
    texts = read_files(paths)
    found = sum(len(text.encode()) for _, text in texts)
    need = HELD_OUT_EVERY * (context - 1)
    if found < need:
        raise ValueError(f"text: expected at least {need} bytes for rows of {context} tokens, got {found}")
    size = PIECE_CHARACTERS
    while size >= SMALLEST_PIECE:
        documents = [document for name, text in texts for document in cut(name, text, size)]
        held_out = {is_held_out(document, HELD_OUT_EVERY) for document in documents if not document.text.isspace()}
        if len(held_out) == 2:
            return documents
        size //= 2
    raise ValueError("text: expected some text to train on and some to hold out, found blanks almost alone")


def cut(name: str, text: str, size: int) -> Iterator[Document]:
    """Documents of at most ``size`` characters, which are ``text`` together."""
    start = 0
    while start < len(text):
        end = _end(text, start, start + size)
        yield Document(f"{name}:{start}", text[start:end], name)
        start = end


def _end(text: str, start: int, most: int) -> int:
    if most >= len(text):
        return len(text)
    for mark in ("\n\n", "\n", " "):
        at = text.rfind(mark, (start + most) // 2, most)
        if at >= 0:
            return at + len(mark)
    return most


def lines(documents: Iterable[Document]) -> bytes:
    """A line of JSON for each document, as `activations.read_documents` reads them."""
    rows = ({"name": each.name, "source": each.source, "text": each.text} for each in documents)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def read_files(paths: Iterable[str | os.PathLike]) -> list[tuple[str, str]]:
    """The name and the text of the user's own files, at most `MAX_TEXT_BYTES` in all.

    Raises TypeError for what is no path; ValueError for one that cannot be read or is no file, and for a file that is
    empty, too large or not UTF-8.
    """
    found, left = [], MAX_TEXT_BYTES
    for path in paths:
        name, data = shown(as_path("text", path)), _bytes_of(path, left)
        if not data.strip():
            raise ValueError(f"text: expected some text in {name}, found an empty file")
        try:
            found.append((shown(Path(path).name), data.decode("utf-8")))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"text: expected UTF-8 in {name}, found byte {data[error.start]:#04x} at {error.start}"
            ) from error
        left -= len(data)
    return found


def _bytes_of(path: str | os.PathLike, most: int) -> bytes:
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size  # 0 in /proc, some of whose files never end
            if size > most:
                raise ValueError(
                    f"text: expected at most {MAX_TEXT_BYTES} bytes in all, found {size} in {shown(path)}: "
                    "give a part of it, the demo learns from less than a megabyte"
                )
            return file.read(size)
    except (BadFileError, EnvironmentProblemError) as error:
        raise ValueError(f"text: cannot read {error}") from error
    except OSError as error:
        raise ValueError(f"text: cannot read {shown(path)}: {error.strerror}") from error


def bigram_loss(train: Tensor, held_out: Tensor) -> float:
    """Cross-entropy (nats a token) of a smoothed bigram model fitted on ``train``, on the tokens ``held_out``.

    Rows [rows, context]; as in `evaluation.language_model_loss`, a BOS is neither predicted nor predicted from. The
    smoothing strength is the best of a grid *on the held-out text*, in the baseline's favour.
    """
    counts = torch.zeros(VOCAB_SIZE, VOCAB_SIZE, dtype=torch.float64, device=train.device)
    for piece in train.split(4096):  # 64 MiB of text would otherwise take gigabytes
        previous, current = _pairs(piece)
        counts += (previous * VOCAB_SIZE + current).bincount(minlength=counts.numel()).view_as(counts)
    unigram = (counts.sum(0) + 1) / (counts.sum() + VOCAB_SIZE)
    previous, current = _pairs(held_out)
    totals = counts.sum(1)[previous]
    hits = counts[previous, current]
    prior = unigram[current]
    return min(
        float(-((hits + alpha * prior) / (totals + alpha)).log().mean()) for alpha in (0.1, 0.3, 1, 3, 10, 30, 100, 300)
    )


def _pairs(rows: Tensor) -> tuple[Tensor, Tensor]:
    previous, current = rows[:, :-1].flatten(), rows[:, 1:].flatten()
    counted = (previous != BOS) & (current != BOS)
    return previous[counted], current[counted]
