"""Which rows of a text are held out: blocks of neighbours drawn over the whole of it, and a sample of such rows.

Neighbouring rows of a text are alike. Held out in one piece, they say how easy that piece is; drawn one by one, each
has its neighbours among the training rows.
"""

from typing import Any

import torch
from torch import Tensor

from ..checks import check_int, check_type

HELD_OUT_EVERY = 16
BLOCK_ROWS = 32


def hold_out(
    rows: Tensor, seed: int = 0, *, every: int = HELD_OUT_EVERY, block: int = BLOCK_ROWS
) -> tuple[Tensor, Tensor]:
    """``rows`` [n, …] in the order of a text → (training rows, held-out rows), both in that order.

    The rows are cut into blocks of ``block`` neighbours, or of n // ``every`` where that is less. Of each ``every``
    blocks in turn one is held out, drawn from ``seed``.

    Raises TypeError or ValueError for what is no tensor of rows, fewer rows than ``every``, and for numbers below 0
    (``seed``), 2 (``every``) and 1 (``block``).
    """
    generator = _generator(seed)
    check_int("every", every, 2)
    check_int("block", block, 1)
    n = _length(rows)
    if n < every:
        raise ValueError(f"rows: expected at least {every}, one to hold out of each {every}, got {n}")
    block = min(block, n // every)
    number = torch.arange(n, dtype=torch.int64, device="cpu") // block
    group = number // every
    drawn = torch.randint(every, (int(group[-1]) + 1,), generator=generator, dtype=torch.int64, device="cpu")
    held_out = (number % every == drawn[group]).to(rows.device)
    return rows[~held_out], rows[held_out]


def sample_rows(rows: Tensor, n: int, seed: int = 0) -> Tensor:
    """``n`` of ``rows``, in order and spread over all of them: one, drawn from ``seed``, of each of n equal pieces.

    All of them when there are no more. Raises TypeError or ValueError for what is no tensor of rows, n below 1 and a
    seed below 0.
    """
    generator = _generator(seed)
    check_int("n", n, 1)
    length = _length(rows)
    if length <= n:
        return rows
    within = torch.rand(n, generator=generator, dtype=torch.float64, device="cpu")
    first = torch.arange(n + 1, dtype=torch.int64, device="cpu") * length // n  # of each piece
    picked = first[:-1] + (within * first.diff()).long()
    return rows[picked.to(rows.device)]


def _generator(seed: int) -> torch.Generator:
    check_int("seed", seed, 0)
    if seed >= 2**64:
        raise ValueError(f"seed: expected less than 2**64, got {seed}")
    return torch.Generator(device="cpu").manual_seed(seed)


def _length(rows: Any) -> int:
    check_type("rows", rows, Tensor)
    if rows.ndim == 0:
        raise ValueError("rows: expected shape [n, …], got a scalar")
    return len(rows)
