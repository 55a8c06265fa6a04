"""The variance of activations x [n, d_model] and the share of it that is unexplained, in bounded memory and fp64.

FVU = Σ‖x − x̂‖² / Σ‖x − x̄‖²,  x̄ the mean of the same x: 0 is exact, 1 no better than predicting the mean
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..checks import check_floating

# Elements of the largest temporary: latents of a chunk of tokens, or logits of a batch of rows.
CHUNK_ELEMENTS = 2**24
# Narrow activations are worked on in pieces that a CPU's caches hold: three times as fast at d_model 128.
_CHUNK_ROWS = 4096


def check_activations(name: str, activations: Tensor, d_model: int | None = None) -> None:
    check_floating(name, activations)
    if activations.ndim != 2 or (d_model is not None and activations.shape[1] != d_model):
        width = "d_model" if d_model is None else d_model
        raise ValueError(f"{name}: expected shape [n, {width}], got {list(activations.shape)}")
    if activations.shape[0] == 0:
        raise ValueError(f"{name}: expected at least one row, got none")


def chunks(activations: Tensor, width: int) -> Iterator[Tensor]:
    """Rows of ``activations`` in pieces, so that [rows, width] stays bounded."""
    return iter(activations.split(max(1, min(_CHUNK_ROWS, CHUNK_ELEMENTS // width))))


def mean_row(name: str, activations: Tensor) -> Tensor:
    """The fp64 mean row; ValueError when it is not finite."""
    total = torch.zeros(activations.shape[1], dtype=torch.float64, device=activations.device)
    for x in chunks(activations, activations.shape[1]):
        total += x.sum(0, dtype=torch.float64)
    if not total.isfinite().all():
        raise ValueError(f"{name}: expected finite values, found NaN or Inf")
    return total / activations.shape[0]


def fvu_of(name: str, activations: Tensor, reconstruct: Callable[[Tensor, int], Tensor], width: int) -> float:
    """FVU of ``reconstruct(x, start)`` for chunks x of ``activations``, whose first row is ``start``."""
    mean = mean_row(name, activations)
    error = torch.zeros((), dtype=torch.float64, device=activations.device)
    variance, start = error.clone(), 0
    for x in chunks(activations, width):
        x_hat, x64 = reconstruct(x, start), x.double()
        error += (x64 - x_hat.to(x64)).square().sum()
        variance += (x64 - mean).square().sum()
        start += x.shape[0]
    return (error / variance).item() if variance > 0 else math.nan
