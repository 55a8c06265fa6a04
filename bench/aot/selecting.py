"""The selection of TopK and BatchTopK, counted as the kernels of the step are: the product that leaves z and the
largest key of each 32, and the k largest of each token, or the k·N largest of the batch
(`gemmascope.kernels.gpu.selection`).

What a program of the selection does depends on its z. So some rows of normal z are drawn, each followed and standing
for as many tokens as the others; `Path` says how often each of its loops turns, `Batch` what the rows have in common.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from gemmascope.kernels.gpu import selection as gpu_selection

# Rows of z that are drawn, by so many seeds from 0 on.
ROWS = 8
INFINITE = 0x7F800000


@dataclass(frozen=True)
class Path:
    """How a program goes. groups: that are listed. among_groups: turns that read the keys of all groups again.
    among_keys: turns that read the z of the listed ones."""

    groups: int
    among_groups: int
    among_keys: int


def keys_of(z: np.ndarray) -> np.ndarray:
    """int64 [F] the keys of z, fp32 [F]."""
    bits = z.view(np.int32).astype(np.int64)
    return np.where((bits & 0x7FFFFFFF) < INFINITE, bits, INFINITE)


def largest_of_groups(z: np.ndarray) -> np.ndarray:
    """int64 [⌈F/32⌉]; latents beyond the last one count as 0."""
    keys = keys_of(z)
    return np.append(keys, np.zeros(-len(keys) % 32, np.int64)).reshape(-1, 32).max(1)


def _search(low: int, high: int, reached: Callable[[int], int], k: int) -> tuple[int, int]:
    """Where a search by halves ends, and its turns."""
    turns = 0
    while low < high:
        middle, turns = low + (high - low + 1) // 2, turns + 1
        found = reached(middle)
        low, high = (middle if found >= k else low), (high if found > k else middle if found == k else middle - 1)
    return low, turns


def path(z: np.ndarray, k: int) -> tuple[Path, np.ndarray]:
    """How the program of a row goes, and the groups that it lists."""
    config, largest = gpu_selection.select_config(k), largest_of_groups(z)
    n, block = len(largest), config.block
    held = np.append(largest, np.zeros(-n % block, np.int64)).reshape(-1, block).max(0)
    top = max(1, int(held.max()))
    low, among_groups = _search(1, top if k < min(n, block) else 1, lambda level: int((held >= level).sum()), k)[0], 0
    if n > block and k < n:
        most = k + k // 2
        among_groups = 1
        if int((largest >= low).sum()) > most:

            def reached(level: int) -> int:
                found = int((largest >= level).sum())
                return min(found, k) if found <= most else found

            low, turns = _search(low, top, reached, k)
            among_groups += turns
    groups = np.flatnonzero(largest >= low)
    keys = keys_of(np.append(z, np.zeros(-len(z) % 32, np.float32))).reshape(-1, 32)[groups]
    _, among_keys = _search(low, top, lambda level: int((keys >= level).sum()), k)
    return Path(len(groups), among_groups, among_keys), groups


def select_bytes(F: int, k: int, of: Path) -> float:
    """Loaded and stored by the program of a row whose groups are all whole: keys for the bound and for the list, zeros
    for words; the list, a tile of it for each look at z; words."""
    n_groups, tile = -(-F // 32), gpu_selection.select_config(k).tile
    later = max(0, of.groups - tile)  # what is beyond the first tile is read in every turn, and once to be marked
    looked_at = min(of.groups, tile) + later * (of.among_keys + 1)
    return 4 * n_groups * (3 + of.among_groups) + 4 * of.groups + (4 + 128) * looked_at + 4 * of.groups


@cache
def drawn(F: int, k: int, number: int) -> tuple[np.ndarray, Path, np.ndarray]:
    """A row of z, how its program goes, and the groups that it lists."""
    z = np.random.default_rng(number).standard_normal(F).astype(np.float32)
    return z, *path(z, k)


@dataclass(frozen=True)
class Batch:
    """What is found of a batch of the drawn rows. v: the key that the last of the chosen has. ties: of those that equal
    it, how many are chosen. bound: what the groups' highest digits say that v is at least. listed: the groups of each
    row that reach it."""

    v: int
    ties: int
    bound: int
    listed: tuple[np.ndarray, ...]


@cache
def batch(F: int, k: int) -> Batch:
    """k·`ROWS` latents are chosen."""
    rows = [drawn(F, k, number)[0] for number in range(ROWS)]
    largest = np.stack([largest_of_groups(z) for z in rows])
    room, keys = k * ROWS, np.sort(np.concatenate([keys_of(z) for z in rows]))[::-1]
    v = max(0, int(keys[room - 1]))
    last, _ = gpu_selection.DIGITS[gpu_selection.GROUP_DIGITS - 1]
    bound = max(0, int(np.sort(largest, None)[-room])) >> last << last if room <= largest.size else 0
    listed = tuple(np.flatnonzero(of_row >= max(1, bound)) for of_row in largest)
    return Batch(v, room - int((keys > v).sum()), bound, listed)


def count_groups_bytes() -> int:
    """Of a full program: keys of groups, and the digits so far."""
    return 4 * gpu_selection.COUNT_BLOCK + 4


def list_bytes(n_groups: int, listed: int) -> int:
    """Keys, words of no bits, the list, its length, and the digits so far."""
    return 8 * n_groups + 4 * listed + 8


def listed_bytes(listed: int) -> int:
    """The list, its length, the z of its groups, and the digits so far."""
    return (4 + 128) * listed + 8


def pick_bytes() -> int:
    """Counts, and both numbers of the state, which it changes."""
    return 4 * 256 + 16
