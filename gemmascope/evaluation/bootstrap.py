"""Intervals by drawing documents anew (Efron's percentile bootstrap).

Tokens of one document are alike, so that a document, not a token, is what is drawn: D of D documents with replacement,
``draws`` times. A figure that is a ratio of two sums over tokens has a value for each draw, and its interval is between
two quantiles of these. Every figure of every SAE sees the same draws.
"""

import torch
from torch import Tensor

from ..checks import check_int, check_number

DRAWS, LEVEL = 1000, 0.95
_AT_ONCE = 64


class Bootstrap:
    """Draws of ``documents`` documents by ``seed``, and intervals at ``level``.

    ``times``: how often each document is drawn, int32 [draws, documents].

    Raises TypeError or ValueError for no documents, draws below 2, a seed below 0 and a level beyond 0 to 1.
    """

    def __init__(self, documents: int, *, draws: int = DRAWS, seed: int = 0, level: float = LEVEL):
        check_int("documents", documents, 1)
        check_int("draws", draws, 2)
        check_int("seed", seed, 0, 2**63 - 1)
        check_number("level", level, 0, open_low=True)
        if level >= 1:
            raise ValueError(f"level: expected less than 1, got {level}")
        self.level, self._documents = level, documents
        generator = torch.Generator("cpu").manual_seed(seed)
        drawn = (
            torch.randint(documents, (documents,), generator=generator, dtype=torch.int64, device="cpu")
            for _ in range(draws)
        )
        self.times = torch.stack([torch.bincount(each, minlength=documents).to(torch.int32) for each in drawn])

    def ratio(self, numerators: Tensor, denominators: Tensor) -> tuple[float, float] | None:
        """The interval of Σ numerators / Σ denominators, each fp64 [documents].

        None with fewer than two documents, and where one of the draws has no finite value.
        """
        return self.interval(self.drawn(numerators, denominators))

    def ratios(self, numerators: Tensor, denominators: Tensor) -> list[tuple[float, float] | None]:
        """`ratio` of each column of fp64 [documents, columns]."""
        return [self.interval(found) for found in self.drawn(numerators, denominators).T]

    def drawn(self, numerators: Tensor, denominators: Tensor) -> Tensor:
        """Σ numerators / Σ denominators of every draw: fp64 [draws] of [documents], [draws, columns] of [documents,
        columns]. For figures that are made of several such ratios."""
        columns = numerators.shape[1:]
        for name, each in (("numerators", numerators), ("denominators", denominators)):
            if each.shape != (self._documents, *columns) or len(columns) > 1:
                raise ValueError(f"{name}: expected shape {[self._documents, *columns][:2]}, got {list(each.shape)}")
        both = torch.stack([numerators, denominators], -1).double().cpu().view(self._documents, -1)
        sums = torch.cat([part.double() @ both for part in self.times.split(_AT_ONCE)])
        sums = sums.view(len(sums), *numerators.shape[1:], 2)
        return sums[..., 0] / sums[..., 1]

    def interval(self, found: Tensor) -> tuple[float, float] | None:
        """The interval of a figure whose values in the draws are ``found``, fp64 [draws]; None as of `ratio`."""
        if self._documents < 2 or not found.isfinite().all():
            return None
        ends = torch.tensor([(1 - self.level) / 2, (1 + self.level) / 2], dtype=torch.float64, device="cpu")
        low, high = torch.quantile(found, ends).tolist()
        return low, high
