"""`CodeStream`: all that fires, written to disk while a pass runs, a piece of consecutive rows after another."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import SparseCode
from .table import read, save

# Of a piece in memory.
PIECE_BYTES = 64 << 20
_LAYOUT = {"token": torch.int64, "latent": torch.int32, "value": torch.float32}


class Piece(NamedTuple):
    """Entries of consecutive rows, by token, then latent, [n] each. token int64 is row·context + position; latent
    int32; value fp32."""

    token: Tensor
    latent: Tensor
    value: Tensor


class CodeStream:
    """The entries of one SAE since the last piece."""

    def __init__(self):
        self._parts: list[Piece] = []

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for part in self._parts for tensor in part)

    def add(self, code: SparseCode, counted: Tensor, first_row: int) -> None:
        """As `Collector.add`."""
        token = counted.flatten().nonzero().squeeze(1) + first_row * counted.shape[1]
        self._parts.append(Piece(token[code.token_indices()], code.indices, code.values.float()))

    def write(self, path: Path) -> dict[str, Any]:
        """The piece as a file, after which nothing is held; what `read_piece` takes."""
        empty = {name: torch.empty(0, dtype=dtype, device="cpu") for name, dtype in _LAYOUT.items()}
        parts = [Piece(**empty), *self._parts]
        self._parts = []
        return save(path, Piece(*map(torch.cat, zip(*parts, strict=True)))._asdict())


def read_piece(path: Path, entry: Mapping[str, Any]) -> Piece:
    """What `CodeStream.write` wrote. Raises BadFileError for another file."""
    return Piece(**read(path, entry, {name: (dtype, (None,)) for name, dtype in _LAYOUT.items()}))
