"""Mean and variance of activations x [n, d_model], in bounded memory and fp64."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..checks import check_tensor

# Elements of the largest temporary: latents of a chunk of tokens, or logits of a batch of rows.
CHUNK_ELEMENTS = 2**24
# Narrow activations are worked on in pieces that a CPU's caches hold: three times as fast at d_model 128.
_CHUNK_ROWS = 4096


def check_dense(name: str, tensor: Any) -> None:
    """Raise TypeError unless it is a tensor with a value for every element in memory."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
        kind = "nested" if tensor.is_nested else f"{tensor.layout} on {tensor.device}"
        raise TypeError(f"{name}: expected a dense torch.Tensor that holds values, got one that is {kind}")


def check_activations(name: str, activations: Any, d_model: int | None = None) -> None:
    """Raise TypeError or ValueError unless it is a dense float matrix [n ≥ 1, d_model ≥ 1], whatever its values."""
    check_dense(name, activations)
    check_tensor(name, activations, ("n", "d_model" if d_model is None else d_model))
    for axis, what in enumerate(("row", "column")):
        if activations.shape[axis] == 0:
            raise ValueError(f"{name}: expected at least one {what}, got none")


def chunks(activations: Tensor, width: int) -> Iterator[Tensor]:
    """Rows of ``activations`` in pieces, so that [rows, width] stays bounded."""
    return iter(activations.split(max(1, min(_CHUNK_ROWS, CHUNK_ELEMENTS // width))))


def mean_row(name: str, activations: Tensor) -> Tensor:
    """The mean row x̄ [d_model], fp64 on their device.

    Summed about the first row, so that of rows that do not vary it is exactly that row. Raises ValueError naming
    ``name`` for values that are not finite, and as `check_activations`.
    """
    check_activations(name, activations)
    n, width = activations.shape
    first = activations[0].double()
    total = torch.zeros(width, dtype=torch.float64, device=activations.device)
    for x in chunks(activations, width):
        total += (x.double() - first).sum(0)
    mean = first + total / n
    if not mean.isfinite().all():
        raise ValueError(f"{name}: expected finite values, found NaN or Inf")
    return mean


def moments(name: str, activations: Tensor) -> tuple[Tensor, float]:
    """The mean row and the variance mean_n ‖x_n − x̄‖², exactly 0 of rows that do not vary.

    Raises as `mean_row`, and ValueError for values whose squares fp64 cannot hold.
    """
    mean = mean_row(name, activations)
    squares = torch.zeros((), dtype=torch.float64, device=activations.device)
    for x in chunks(activations, activations.shape[1]):
        squares += (x.double() - mean).square().sum()
    check_squares(name, squares)
    return mean, squares.item() / len(activations)


def check_squares(name: str, total: Tensor) -> None:
    """Raise ValueError unless the sum of squares ``total`` is finite."""
    if not total.isfinite():
        raise ValueError(f"{name}: expected values whose squares fp64 can hold, found a sum of them beyond it")
