"""`Window`: which columns of the sequences a forward computes, and what masks say about them."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import found


class Window(NamedTuple):
    """A forward over columns ``start`` … ``start + seq`` − 1 of ``batch`` sequences; those before are in its cache."""

    batch: int
    seq: int
    start: int

    def cut(self, name: str, table: Tensor, beyond: int | bool) -> Tensor:
        """[batch, seq] of ``table`` [columns], [1, columns] or [batch, columns]; ``beyond`` past its last column."""
        table = table[None] if table.ndim == 1 else table
        if table.shape[0] not in (1, self.batch):
            raise ValueError(
                f"{name}: expected 1 row or {self.batch}, as the model runs on, got {table.shape[0]}; for beams or "
                "several sequences a prompt, repeat_interleave the rows"
            )
        columns = table[:, self.start : self.start + self.seq]
        columns = F.pad(columns, (0, self.seq - columns.shape[1]), value=beyond)
        return columns.expand(self.batch, -1)


def start_of(arguments: list[Any]) -> int:
    """How many columns the cache among the arguments of a text model holds."""
    caches = [value for value in arguments if hasattr(value, "get_seq_length")]
    return int(caches[0].get_seq_length()) if caches else 0


def check_mask(name: str, mask: Any) -> None:
    """Raise TypeError or ValueError unless ``mask`` is a bool tensor [columns] or [rows, columns]."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"{name}: expected a torch.Tensor of bool, got {found(mask)}")
    if mask.ndim not in (1, 2):
        raise ValueError(f"{name}: expected shape [columns] or [rows, columns], got {list(mask.shape)}")
