"""What a table says of activations, from all of them at once, in fp64 and plain loops."""

import math
from typing import NamedTuple

from torch import Tensor

from gemmascope.dashboards.table import Sizes

Example = tuple[int, int, float, list[float]]


class Latent(NamedTuple):
    fired: int
    total: float
    largest: float
    end: float
    histogram: list[int]
    top: list[Example]
    cells: list[int]
    """How many there are in each stratum."""
    members: list[list[Example]]
    """All of each stratum."""


def of_latent(f: Tensor, counted: Tensor, sizes: Sizes) -> Latent:
    """f: the activations of one latent [rows, context]; where not ``counted`` they do not count."""
    rows, context = f.shape
    values = [[float(f[r, p]) if counted[r, p] else 0.0 for p in range(context)] for r in range(rows)]
    firing = [v for row in values for v in row if v > 0]
    largest = max(firing, default=0.0)
    end = 2.0 ** (math.floor(math.log2(largest)) + 1) if firing else 0.0
    histogram = [0] * sizes.bins
    for v in firing:
        histogram[int(v / end * sizes.bins)] += 1
    peaks: list[Example] = []
    for r in range(rows):
        for first in range(0, context, sizes.window):
            cell = range(first, min(first + sizes.window, context))
            p = max(cell, key=lambda q: (values[r][q], -q))
            if values[r][p] > 0:
                start = min(max(p - sizes.before, 0), context - sizes.window)
                peaks.append((r, p, values[r][p], values[r][start : start + sizes.window]))
    members: list[list[Example]] = [[] for _ in range(sizes.strata)]
    for peak in peaks:
        octave = 0
        while octave < sizes.strata - 1 and peak[2] < end / 2 ** (octave + 1):
            octave += 1
        members[octave].append(peak)
    top = sorted(peaks, key=lambda peak: (-peak[2], peak[0], peak[1]))[: sizes.top]
    return Latent(len(firing), math.fsum(firing), largest, end, histogram, top, [len(m) for m in members], members)


def together(f: Tensor, tokens: list[tuple[int, int]], related: int) -> list[list[tuple[int, int]]]:
    """Of each latent of f [rows, context, F] its ``related`` companions and on how many of ``tokens`` both fire."""
    d_sae = f.shape[2]
    fires = [{(r, p) for r, p in tokens if f[r, p, j] > 0} for j in range(d_sae)]
    found = []
    for j in range(d_sae):
        shared = [(i, len(fires[i] & fires[j]), len(fires[i] | fires[j])) for i in range(d_sae) if i != j]
        shared = sorted((s for s in shared if s[1]), key=lambda s: (-s[1] / s[2], s[0]))
        found.append([(i, both) for i, both, _ in shared[:related]])
    return found


def splitmix(row: int, position: int, seed: int) -> int:
    """Sebastiano Vigna's splitmix64 of one number, as a signed one."""
    mask = (1 << 64) - 1
    x = ((row << 32) + position + (seed + 1) * 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    x ^= x >> 31
    return x - (1 << 64) if x >> 63 else x
