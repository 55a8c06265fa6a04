"""`Strata`: of every latent, a sample of its examples in each octave of activation below its largest."""

import torch
from torch import Tensor

from .examples import MOVED, Items, Slots, Windows

# Of splitmix64, as signed.
_STEP, _FACTORS = -0x61C8864680B583EB, (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)


def shuffled(row: Tensor, position: Tensor, seed: int) -> Tensor:
    """int64: a number for each token that looks drawn at random, the same for the same seed: splitmix64's mixing of
    seed, row and position. Tokens of rows below 2³¹ and positions below 2³² all have different ones."""
    x = (row << 32) + position + _signed((seed + 1) * _STEP)
    x = (x ^ _shifted(x, 30)) * _FACTORS[0]
    x = (x ^ _shifted(x, 27)) * _FACTORS[1]
    return x ^ _shifted(x, 31)


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


def _shifted(x: Tensor, by: int) -> Tensor:
    """The bits of x moved right, zeros behind them."""
    return (x >> by) & ((1 << (64 - by)) - 1)


class Strata:
    """Strata by octaves: s has activations in [2^(e−s−1), 2^(e−s)), e being the exponent of the latent's largest, the
    last all that are smaller. Of each, the ``of_stratum`` examples first in the order of `shuffled` are held.

    When e grows, strata move down and those that reach the last are one; its sample is that of their union, since a
    sample of each part has all that can be in it.
    """

    def __init__(self, d_sae: int, strata: int, of_stratum: int, window: int, seed: int):
        self.strata = strata
        self.cells = torch.zeros(d_sae, strata, dtype=torch.int64, device="cpu")
        self.slots = Slots(d_sae * strata, of_stratum, window, lambda items: shuffled(items.row, items.position, seed))

    def grow(self, latents: Tensor, by: Tensor) -> None:
        """The exponents of ``latents`` [n], which are different ones, ascending, have grown by so much [n]."""
        step = max(1, MOVED // (self.strata * self.slots.slots * self.slots.held.window.shape[2]))
        for start in range(0, len(latents), step):
            self._grow(latents[start : start + step], by[start : start + step])

    def _grow(self, latents: Tensor, by: Tensor) -> None:
        every = torch.arange(self.strata, dtype=torch.int64, device="cpu")
        target = (every + by[:, None]).clamp(max=self.strata - 1)
        self.cells[latents] = torch.zeros_like(target).scatter_add_(1, target, self.cells[latents])
        items, windows = self.slots.take((latents[:, None] * self.strata + every).flatten())
        local = torch.searchsorted(latents, items.group // self.strata)
        group = latents[local] * self.strata + target[local, items.group % self.strata]
        self.slots.merge(items._replace(group=group), lambda numbers: windows[numbers])

    def add(self, items: Items, below: Tensor, windows: Windows) -> None:
        """Examples, whose groups are their latents and whose exponents are ``below`` [n] under those of the latents."""
        stratum = below.clamp(max=self.strata - 1)
        group = items.group * self.strata + stratum
        self.cells.view(-1).index_add_(0, group, torch.ones_like(group))
        self.slots.merge(items._replace(group=group), windows)
