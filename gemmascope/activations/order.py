"""Batches of activations in an order that is a pure function of (seed, step)."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..sites import Site


def batches(
    activations: Mapping[Site, Tensor], batch_size: int, steps: int, seed: int, first_step: int = 0
) -> Iterator[dict[Site, Tensor]]:
    """Yield ``steps`` − ``first_step`` batches {site: [batch_size, width]}, the same tokens at every site.

    activations: {site: [n, width]} with one n ≥ batch_size. Each epoch is one permutation of the tokens, drawn from
    (seed, epoch); the tokens left over at its end are not used in that epoch.
    """
    sizes = {len(rows) for rows in activations.values()}
    if len(sizes) != 1:
        raise ValueError(f"activations: expected as many tokens at every site, got {sorted(sizes)}")
    n = sizes.pop()
    if n < batch_size:
        raise ValueError(f"batch_size: expected at most the {n} tokens harvested, got {batch_size}")
    per_epoch = n // batch_size
    epoch, order = None, torch.empty(0)
    for step in range(first_step, steps):
        if epoch != step // per_epoch:
            epoch = step // per_epoch
            order = torch.randperm(n, generator=torch.Generator().manual_seed(seed + 1_000_003 * epoch))
        first = step % per_epoch * batch_size
        picked = order[first : first + batch_size]
        yield {site: rows[picked] for site, rows in activations.items()}
