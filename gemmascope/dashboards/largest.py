"""`LargestOf`: the largest few of each row of a matrix that is only ever there in blocks of columns."""

import torch
from torch import Tensor


class LargestOf:
    """Of each of ``rows`` rows the ``k`` largest values and their columns, of equals the smaller column first.

    Columns come in ascending blocks. Where a row has fewer than ``k`` columns above −Inf, the rest is column −1.
    """

    def __init__(self, rows: int, k: int, device: torch.device):
        self.k = k
        self.values = torch.full((rows, k), -torch.inf, dtype=torch.float32, device=device)
        self.columns = torch.full((rows, k), -1, dtype=torch.int64, device=device)

    def add(self, block: Tensor, first: int) -> None:
        """A block fp32 [rows, n] whose first column has the number ``first``."""
        values, columns = first_largest(block, min(self.k, block.shape[1]))
        values = torch.cat([self.values, values], 1)
        columns = torch.cat([self.columns, columns + first], 1)
        order = values.sort(dim=1, descending=True, stable=True).indices[:, : self.k]
        self.values, self.columns = values.gather(1, order), columns.gather(1, order)

    def found(self) -> tuple[Tensor, Tensor]:
        """Values fp32 and columns int32 [rows, k] on the CPU; 0 and −1 where there are no more."""
        there = self.values > -torch.inf
        return self.values.where(there, 0).cpu(), self.columns.where(there, -1).int().cpu()


def first_largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest values of each row of ``x`` and their columns, of equals the smaller column first, which
    `torch.topk` leaves open."""
    values, columns = x.topk(k, dim=1)
    least = values[:, -1:]
    torn = (x == least).sum(1) > (values == least).sum(1)
    if bool(torn.any()):
        rows = torn.nonzero().squeeze(1)
        whole = x[rows].sort(dim=1, descending=True, stable=True)
        values[rows], columns[rows] = whole.values[:, :k], whole.indices[:, :k]
    columns, order = columns.sort(1)
    values = values.gather(1, order)
    order = values.sort(dim=1, descending=True, stable=True).indices
    return values.gather(1, order), columns.gather(1, order)
