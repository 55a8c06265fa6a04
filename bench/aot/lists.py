"""How long the lists of a training step are: the expected number of lists of each length, without sampling.

    frequency of latent j: 10^(skew·Φ⁻¹((j + ½)/F)), of sum L0, at most .3: the quantiles of `bench.timing.inputs`
    list of a latent  ~ Poisson(N·frequency·(1 + WINDOW))      its entries, those in the window below θ with them
    list of a token   ~ Poisson(L0·spread·(1 + WINDOW)), log spread normal with deviation .3, mean spread 1

Latents lie in random order: what a kernel takes together, the latents of a program or of a word of bits, counts as
drawn independently. A list is no longer than there are tokens or latents.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from bench.timing.inputs import LEAST_FREQUENT, MOST_FREQUENT

SPREAD = 0.3
# Entries in the window below θ for one that is active: notes/2026-11-23-what-should-a-training-step-cost-on-a-gpu.md.
WINDOW = 0.05
# Room for entries, for one that there is, as `SAETrainer` makes it.
MARGIN = 1.5


def _normal_quantiles(count: int) -> np.ndarray:
    """The middles of ``count`` equal shares of a normal distribution."""
    return torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count).numpy()


def poisson(rates: np.ndarray, most: int) -> np.ndarray:
    """[rates, most + 1] the probability of each count, what is above ``most`` added to it."""
    counts = torch.arange(most + 1, dtype=torch.float64)
    rate = torch.as_tensor(rates, dtype=torch.float64)[:, None]
    found = torch.exp(torch.xlogy(counts, rate) - rate - torch.lgamma(counts + 1)).numpy()
    found[:, -1] += np.maximum(0.0, 1 - found.sum(1))
    return found


def grouped(rates: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means, sizes and members of groups of rates that differ by half a percent: so do their distributions, nearly."""
    group = np.round(np.log(rates) * 200).astype(np.int64)
    _, where, sizes = np.unique(group, return_inverse=True, return_counts=True)
    return np.bincount(where, rates) / sizes, sizes, where


@dataclass(frozen=True)
class Lengths:
    """length[i] stands count[i] times, on average."""

    length: np.ndarray
    count: np.ndarray

    @property
    def lists(self) -> float:
        return float(self.count.sum())

    @property
    def total(self) -> float:
        return float((self.length * self.count).sum())

    @property
    def touched(self) -> float:
        """Lists that are not empty."""
        return float(self.count[self.length > 0].sum())

    def times(self, number: int) -> "Lengths":
        """So many of each."""
        return Lengths(self.length, self.count * number)

    def at_least(self, length: int) -> "Lengths":
        kept = self.length >= length
        return Lengths(self.length[kept], self.count[kept])

    def clipped(self, most: int) -> "Lengths":
        """What is longer than ``most`` counts as that."""
        short = self.length < most
        above = float(self.count[~short].sum())
        return Lengths(np.append(self.length[short], most), np.append(self.count[short], above))

    @property
    def longest(self) -> int:
        """The length that half a list is expected to reach."""
        reach = np.cumsum(self.count[::-1])[::-1]
        return int(self.length[np.flatnonzero(reach >= 0.5)[-1]])


def _lengths(probabilities: np.ndarray, count: float) -> Lengths:
    counts = probabilities * count
    kept = counts > 1e-6
    return Lengths(np.flatnonzero(kept), counts[kept])


@dataclass(frozen=True)
class Case:
    """The sizes of a step. tokens: of the batch. skew: decades, see `bench.timing.inputs`. beta1: Adam's; above 0 the
    update has first moments."""

    d: int
    F: int
    l0: float = 64.0
    skew: float = 0.7
    tokens: int = 4096
    beta1: float = 0.0

    def __post_init__(self):
        for name in ("d", "F", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 < self.l0 <= self.F:
            raise ValueError(f"l0: expected more than 0 and at most F = {self.F}, got {self.l0}")
        if self.skew < 0:
            raise ValueError(f"skew: expected at least 0, got {self.skew}")
        if not 0 <= self.beta1 < 1:
            raise ValueError(f"beta1: expected at least 0 and less than 1, got {self.beta1}")

    @property
    def title(self) -> str:
        moment = f" beta1 {self.beta1:g}" if self.beta1 else ""
        return f"{self.d}x{self.F} N {self.tokens} L0 {self.l0:g} skew {self.skew:g}{moment}"

    @cached_property
    def frequencies(self) -> np.ndarray:
        """[F] of entries, those in the window with them, rising."""
        found = 10 ** (self.skew * _normal_quantiles(self.F))
        return (found * (self.l0 / found.sum())).clip(LEAST_FREQUENT, MOST_FREQUENT) * (1 + WINDOW)

    @cached_property
    def _of_latents(self) -> np.ndarray:
        """[tokens + 1] the share of latents with each length."""
        total = np.zeros(self.tokens + 1)
        mean, sizes, _ = grouped(self.tokens * self.frequencies)
        for rate, size in zip(mean, sizes, strict=True):
            most = min(self.tokens, int(rate + 12 * rate**0.5 + 20))
            total[: most + 1] += size * poisson(np.array([rate]), most)[0]
        return total / sizes.sum()

    @cached_property
    def of_latents(self) -> Lengths:
        return _lengths(self._of_latents, self.F)

    @cached_property
    def entries(self) -> float:
        return self.of_latents.total

    @cached_property
    def of_tokens(self) -> Lengths:
        mean = self.entries / self.tokens
        spread = np.exp(SPREAD * _normal_quantiles(256))
        most = min(self.F, int(6 * mean + 60))
        shares = poisson(mean * spread / spread.mean(), most).mean(0)
        return _lengths(shares, self.tokens)

    def longest_of(self, together: int, most: int | None = None) -> Lengths:
        """The longest of so many latents' lists, of those no longer than ``most``: [F / together] of them."""
        reached = np.cumsum(self._of_latents).clip(max=1.0)
        if most is not None and most < len(reached):
            reached = (reached + 1 - reached[most])[: most + 1]
        reached = reached**together
        return _lengths(np.diff(reached, prepend=0.0), -(-self.F // together))

    def fullest_word(self, latents: int) -> Lengths:
        """Of each segment of ``latents`` latents of a token, the most bits that one of its words of 32 has."""
        words = -(-latents // 32)
        rate = np.random.default_rng(0).permutation(
            np.resize(self.frequencies, -(-self.F // (32 * words)) * 32 * words)
        )
        rate = rate.reshape(-1, 32).sum(1)
        spread = np.exp(SPREAD * _normal_quantiles(16))
        shares = np.zeros(33)
        mean, _, where = grouped(rate)
        for factor in spread / spread.mean():
            below = np.log(np.cumsum(poisson(mean * factor, 32), 1).clip(1e-300, 1.0))
            of_segments = np.exp(below[where].reshape(-1, words, 33).sum(1)).mean(0)
            shares += np.diff(of_segments, prepend=0.0) / len(spread)
        return _lengths(shares, self.tokens * -(-self.F // latents))
