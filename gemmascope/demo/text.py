"""Text for the demo: the documentation every Python carries, or the user's own files, as byte tokens.

A token is a byte (0-255); `BOS` (256) starts every row. Nothing is downloaded.
"""

import ast
import gc
import os
import sysconfig
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ..activations import hold_out
from ..activations.held_out import HELD_OUT_EVERY
from ..errors import BadFileError, EnvironmentProblemError
from ..formats.files import as_path, open_file, shown

BOS = 256
VOCAB_SIZE = 257
MAX_TEXT_BYTES = 64 << 20


def python_documentation() -> bytes:
    """The language reference's help topics and the docstrings of the standard library, about 2 MB."""
    with _no_garbage_collection():
        return b"\n\n".join(part.encode("utf-8", "replace") for part in _documentation())


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Syntax trees are many objects without cycles: looking for cycles takes as long as parsing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _documentation() -> Iterator[str]:
    try:
        import pydoc_data.topics as documented

        topics = documented.topics
    except ImportError:  # some Linux packages leave the topics out
        topics = {}
    yield from (topics[name] for name in sorted(topics))
    library = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    files = []
    for folder, inner, names in os.walk(library):
        inner[:] = [name for name in inner if name not in skipped]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    for path in sorted(files):
        yield from docstrings(path)


def docstrings(path: Path) -> Iterator[str]:
    """Every docstring of a Python file; nothing from a file that does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    # As ast.walk, but not into expressions, where no definition can be.
    queue = deque([tree])
    while queue:
        node = queue.popleft()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield text
        for block in ("body", "handlers", "orelse", "finalbody", "cases"):
            queue.extend(getattr(node, block, ()))


def read_files(paths: Iterable[str | os.PathLike]) -> bytes:
    """The user's own text, at most `MAX_TEXT_BYTES` in all: as tokens, each takes eight bytes of memory and more.

    Raises TypeError for what is no path; ValueError for one that cannot be read or is no file, and for a file that is
    empty, too large or not UTF-8.
    """
    parts, left = [], MAX_TEXT_BYTES
    for path in paths:
        name, data = shown(as_path("text", path)), _bytes_of(path, left)
        if not data.strip():
            raise ValueError(f"text: expected some text in {name}, found an empty file")
        try:
            data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"text: expected UTF-8 in {name}, found byte {data[error.start]:#04x} at {error.start}"
            ) from error
        parts.append(data)
        left -= len(data)
    return b"\n\n".join(parts)


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


def split(text: bytes, context: int, seed: int) -> tuple[Tensor, Tensor]:
    """Training and held-out rows [rows, context] int64: BOS and context − 1 bytes each, by `activations.hold_out`.

    Raises ValueError when the text is too short to hold any out.
    """
    whole = rows(text, context)
    if len(whole) < HELD_OUT_EVERY:
        need = HELD_OUT_EVERY * (context - 1)
        raise ValueError(f"text: expected at least {need} bytes for rows of {context} tokens, got {len(text)}")
    return hold_out(whole, seed)


def rows(text: bytes, context: int) -> Tensor:
    """Rows of BOS and context − 1 bytes; a last partial row is dropped."""
    n = len(text) // (context - 1)
    body = torch.frombuffer(bytearray(text), dtype=torch.uint8)[: n * (context - 1)]
    tokens = torch.full((n, context), BOS, dtype=torch.int64, device="cpu")
    tokens[:, 1:] = body.view(n, context - 1)
    return tokens


def bigram_loss(train: Tensor, held_out: Tensor) -> float:
    """Cross-entropy (nats a token) of a smoothed bigram model fitted on ``train``, on the tokens ``held_out``.

    Rows [rows, context]. The smoothing strength is the best of a grid *on the held-out text*, in the baseline's favour.
    """
    counts = torch.zeros(VOCAB_SIZE, VOCAB_SIZE, dtype=torch.float64, device=train.device)
    for piece in train.split(4096):  # 64 MiB of text would otherwise take gigabytes
        pairs = piece[:, :-1] * VOCAB_SIZE + piece[:, 1:]
        counts += pairs.flatten().bincount(minlength=counts.numel()).view_as(counts)
    unigram = (counts.sum(0) + 1) / (counts.sum() + VOCAB_SIZE)
    previous, current = held_out[:, :-1].flatten(), held_out[:, 1:].flatten()
    totals = counts.sum(1)[previous]
    hits = counts[previous, current]
    prior = unigram[current]
    return min(
        float(-((hits + alpha * prior) / (totals + alpha)).log().mean()) for alpha in (0.1, 0.3, 1, 3, 10, 30, 100, 300)
    )
