"""Orders that are pure functions of a seed and of a place in them: of batches of activations, of rows of a text."""

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..checks import check_int
from ..sites import Site

LARGEST_SEED = 2**63 - 1


def permutation(n: int, *key: str | int) -> Tensor:
    """A permutation of 0 … n − 1, int64 [n] on the CPU, drawn from ``key``."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little"))
    return torch.randperm(n, generator=generator, dtype=torch.int64, device="cpu")


def check_seed(seed: int) -> None:
    check_int("seed", seed, 0, LARGEST_SEED)


class RowOrder:
    """The endless order of the rows 0 … n − 1 of a text: epoch after epoch, each a permutation of (seed, epoch).

    Raises ValueError for no rows and for a seed that is not from 0 to 2⁶³ − 1.
    """

    def __init__(self, n: int, seed: int):
        check_int("n", n, 1)
        check_seed(seed)
        self._n, self._seed = n, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64, device="cpu")

    def block(self, block: int, rows_per_block: int) -> Tensor:
        """The rows of superblock ``block``, int64 [rows_per_block]; it may reach into the next epochs."""
        place, end, parts = block * rows_per_block, (block + 1) * rows_per_block, []
        while place < end:
            epoch, first = divmod(place, self._n)
            if epoch != self._epoch:
                self._epoch, self._order = epoch, permutation(self._n, "rows", self._seed, epoch)
            parts.append(self._order[first : first + end - place])
            place += len(parts[-1])
        return torch.cat(parts)


def batches(
    activations: Mapping[Site, Tensor], batch_size: int, steps: int, seed: int, first_step: int = 0
) -> Iterator[dict[Site, Tensor]]:
    """Yield ``steps`` − ``first_step`` batches {site: [batch_size, width]}, the same tokens at every site.

    activations: {site: [n, width]} with one n ≥ batch_size. Each epoch is one permutation of the tokens, drawn from
    (seed, epoch); the tokens left over at its end are not used in that epoch. seed: from 0 to 2⁶⁴ − 1.

    Raises, when called, TypeError or ValueError naming the argument.
    """
    if not isinstance(activations, Mapping):
        raise TypeError(f"activations: expected a dict from Site to torch.Tensor, got {type(activations).__name__}")
    for site, rows in activations.items():
        if not isinstance(rows, Tensor):
            raise TypeError(f"activations[{site}]: expected a torch.Tensor, got {type(rows).__name__}")
        if rows.ndim != 2:
            raise ValueError(f"activations[{site}]: expected shape [n, width], got {list(rows.shape)}")
    sizes = {len(rows) for rows in activations.values()}
    if len(sizes) != 1:
        raise ValueError(f"activations: expected as many tokens at every site, got {sorted(sizes) or 'no site'}")
    n = sizes.pop()
    check_int("batch_size", batch_size, 1)
    if n < batch_size:
        raise ValueError(f"batch_size: expected at most the {n} tokens harvested, got {batch_size}")
    check_int("steps", steps, 0)
    check_int("first_step", first_step, 0)
    if first_step > steps:
        raise ValueError(f"first_step: expected at most the {steps} steps there are, got {first_step}")
    check_int("seed", seed, 0)
    if seed >= 2**64:
        raise ValueError(f"seed: expected at most 2**64 - 1, got {seed}")
    return _batches(activations, n, batch_size, range(first_step, steps), seed)


def _batches(
    activations: Mapping[Site, Tensor], n: int, batch_size: int, steps: range, seed: int
) -> Iterator[dict[Site, Tensor]]:
    per_epoch = n // batch_size
    epoch, order = None, torch.empty(0, dtype=torch.int64, device="cpu")
    for step in steps:
        if epoch != step // per_epoch:
            epoch = step // per_epoch
            generator = torch.Generator("cpu").manual_seed((seed + 1_000_003 * epoch) % 2**64)
            order = torch.randperm(n, generator=generator, dtype=torch.int64, device="cpu")
        first = step % per_epoch * batch_size
        picked = order[first : first + batch_size]
        yield {site: rows[picked] for site, rows in activations.items()}
