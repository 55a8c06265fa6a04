"""Rows that probes read: activations of tokens, or their means over documents; all coordinates, or sparse latents."""

from typing import Protocol

import torch
from torch import Tensor

from ..checks import check_floating, check_int, check_tensor


class Features(Protocol):
    """[n, width] numbers, of which classes have means and a few columns are taken."""

    width: int

    def __len__(self) -> int: ...

    def differences(self, positive: Tensor, negative: Tensor) -> Tensor:
        """How far apart the means of two sets of rows, bool [n] each, are: fp64 [width], at least 0."""
        ...

    def columns(self, which: Tensor) -> Tensor:
        """fp64 [n, k] of those columns, int64 [k]."""
        ...


class DenseFeatures:
    """x [n, width], floats: the activations as they are.

    The differences are in units of the standard deviation of the rows of both sets, since coordinates are of unequal
    size: in Gemma's residual stream a single one may hold most of the variance. Raises ValueError for x that is not
    finite.
    """

    def __init__(self, x: Tensor):
        check_floating("x", x)
        if x.ndim != 2:
            raise ValueError(f"x: expected shape [n, width], got {list(x.shape)}")
        if not x.isfinite().all():
            raise ValueError("x: expected finite activations, found NaN or Inf")
        self.x, self.width = x, x.shape[1]

    def __len__(self) -> int:
        return len(self.x)

    def differences(self, positive: Tensor, negative: Tensor) -> Tensor:
        both = self.x[positive | negative].double()
        means = [self.x[mask].double().mean(0) for mask in (positive, negative)]
        deviation = (both - both.mean(0)).square().mean(0).sqrt()
        return torch.where(deviation > 0, (means[0] - means[1]).abs() / deviation, 0.0)

    def columns(self, which: Tensor) -> Tensor:
        return self.x[:, which].double()

    def by_document(self, owners: Tensor, documents: int) -> "DenseFeatures":
        """The means over the rows of each document. owners: int64 [n], each from 0 to ``documents`` − 1; of one
        without rows they are 0."""
        sums = torch.zeros(documents, self.width, dtype=torch.float64, device="cpu")
        sums.index_add_(0, owners, self.x.double())
        return DenseFeatures(sums / torch.bincount(owners, minlength=documents).clamp(min=1)[:, None])


class LatentFeatures:
    """The entries (row, latent, value) of n rows of ``width`` latents, 0 elsewhere, in any order, on the CPU; no pair
    of row and latent twice.

    The differences are those of the means themselves (arXiv 2305.01610, §3; SAEBench). Raises ValueError for values
    that are not finite and for rows and latents that are out of range.
    """

    def __init__(self, rows: Tensor, latents: Tensor, values: Tensor, n: int, width: int):
        check_int("n", n, 1)
        check_int("width", width, 1)
        check_tensor("latents", latents, (len(rows),), (torch.int64,), rows.device)
        for name, each, end in (("rows", rows, n), ("latents", latents, width)):
            if len(each) and not (each.min() >= 0 and each.max() < end):
                raise ValueError(f"{name}: expected numbers from 0 to {end - 1}, got {each.min()} to {each.max()}")
        if not values.isfinite().all():
            raise ValueError("values: expected finite activations, found NaN or Inf")
        order = latents.argsort(stable=True)
        self.rows, self.latents, self.values = rows[order], latents[order], values[order].double()
        self.starts = torch.searchsorted(self.latents, torch.arange(width + 1, dtype=torch.int64, device="cpu"))
        self.n, self.width = n, width

    def __len__(self) -> int:
        return self.n

    def differences(self, positive: Tensor, negative: Tensor) -> Tensor:
        means = []
        for mask in (positive, negative):
            kept = mask[self.rows]
            sums = torch.zeros(self.width, dtype=torch.float64, device="cpu")
            means.append(sums.index_add_(0, self.latents[kept], self.values[kept]) / mask.sum())
        return (means[0] - means[1]).abs()

    def columns(self, which: Tensor) -> Tensor:
        found = torch.zeros(self.n, len(which), dtype=torch.float64, device="cpu")
        for place, latent in enumerate(which.tolist()):
            entries = slice(int(self.starts[latent]), int(self.starts[latent + 1]))
            found[self.rows[entries], place] = self.values[entries]
        return found

    def by_document(self, owners: Tensor, documents: int) -> "LatentFeatures":
        """As of `DenseFeatures`."""
        pairs, places = (owners[self.rows] * self.width + self.latents).unique(return_inverse=True)
        sums = torch.zeros(len(pairs), dtype=torch.float64, device="cpu").index_add_(0, places, self.values)
        rows = pairs // self.width
        means = sums / torch.bincount(owners, minlength=documents)[rows]
        return LatentFeatures(rows, pairs % self.width, means, documents, self.width)

    def of(self, kept: Tensor) -> "LatentFeatures":
        """Those of some rows, bool [n]."""
        numbers, entries = kept.cumsum(0) - 1, kept[self.rows]
        rows, latents = numbers[self.rows[entries]], self.latents[entries]
        return LatentFeatures(rows, latents, self.values[entries], int(kept.sum()), self.width)
