"""Mean and variance of activations x [n, d_model], in bounded memory and fp64."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..checks import check_tensor

# Elements of the largest temporary: latents of a chunk of tokens, or logits of a batch of rows.
CHUNK_ELEMENTS = 2**24
# Narrow activations are worked on in pieces that a CPU's caches hold: three times as fast at d_model 128.
_CHUNK_ROWS = 4096


def check_activations(name: str, activations: Tensor, d_model: int | None = None) -> None:
    """Raise TypeError or ValueError unless it is a dense float matrix [n ≥ 1, d_model ≥ 1], whatever its values."""
    if isinstance(activations, Tensor) and (
        activations.layout != torch.strided or activations.is_nested or activations.is_meta
    ):
        kind = "nested" if activations.is_nested else f"{activations.layout} on {activations.device}"
        raise TypeError(f"{name}: expected a dense torch.Tensor that holds values, got one that is {kind}")
    check_tensor(name, activations, ("n", "d_model" if d_model is None else d_model))
    for axis, what in enumerate(("row", "column")):
        if activations.shape[axis] == 0:
            raise ValueError(f"{name}: expected at least one {what}, got none")


def chunks(activations: Tensor, width: int) -> Iterator[Tensor]:
    """Rows of ``activations`` in pieces, so that [rows, width] stays bounded."""
    return iter(activations.split(max(1, min(_CHUNK_ROWS, CHUNK_ELEMENTS // width))))


def moments(name: str, activations: Tensor) -> tuple[Tensor, float]:
    """The mean row x̄ [d_model], fp64 on their device, and the variance mean_n ‖x_n − x̄‖².

    Summed about the first row, so that the variance of rows that do not vary is exactly 0. Raises ValueError naming
    ``name`` for values that are not finite, or whose squares fp64 cannot hold, and as `check_activations`.
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
    squares = torch.zeros((), dtype=torch.float64, device=activations.device)
    for x in chunks(activations, width):
        squares += (x.double() - mean).square().sum()
    variance = squares.item() / n
    if variance == float("inf"):
        raise ValueError(f"{name}: expected values whose squares fp64 can hold, found a variance beyond it")
    return mean, variance
