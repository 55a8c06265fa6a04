"""Nearest latents: those whose decoder rows point the same way."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..autocast import without_autocast
from .largest import LargestOf

ROWS, COLUMNS = 1024, 16384


@without_autocast
@torch.no_grad()
def nearest(decoder: Tensor, k: int, check: Callable[[int], None] = lambda done: None) -> tuple[Tensor, Tensor]:
    """Of each row of ``decoder`` [F, width] the ``k`` other rows of largest cosine: int32 [F, k], the largest first, of
    equals the smaller number, and the cosines in fp32; −1 and 0 where there are no more. A row of zeros has cosine 0 to
    all. check: called with the number of rows done."""
    unit = decoder.double()
    unit = (unit / unit.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)).float()
    cosines, latents = [], []
    for first in range(0, len(unit), ROWS):
        rows = unit[first : first + ROWS]
        largest = LargestOf(len(rows), k, unit.device)
        for start in range(0, len(unit), COLUMNS):
            block = rows @ unit[start : start + COLUMNS].T
            own = torch.arange(len(rows), device=unit.device) + first - start
            inside = (own >= 0) & (own < block.shape[1])
            block[inside.nonzero().squeeze(1), own[inside]] = -torch.inf
            largest.add(block, start)
        found = largest.found()
        cosines.append(found[0])
        latents.append(found[1])
        check(min(first + ROWS, len(unit)))
    return torch.cat(latents), torch.cat(cosines)
