"""The variance of activations x [n, d_model] and the share of it that is unexplained, in fp64.

FVU = Σ‖x − x̂‖² / Σ‖x − x̄‖²,  x̄ the mean of the same x: 0 is exact, 1 no better than predicting the mean

A few tokens of huge norm can hold most of both sums. Then FVU speaks of them alone, and what it says of the others is
in the figures beside it.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..activations.moments import check_squares, chunks, mean_row

# Of so many tokens one counts among the top.
TOP_OF = 1000


class Fidelity(NamedTuple):
    """How well x is reconstructed. NaN where x does not vary; NaN or Inf where x̂ is not finite."""

    fvu: float
    median_fvu: float
    """The median over tokens (the lower of two) of ‖x − x̂‖² / ‖x − x̄‖²."""
    top_error_share: float
    """Share of Σ‖x − x̂‖² held by the 0.1 % of the tokens, at least one, where it is largest; NaN where it is 0."""
    top_variance_share: float
    """Likewise of Σ‖x − x̄‖²."""
    bias: float
    """γ = Σ‖x̂‖² / Σ⟨x̂, x⟩, by which x̂ is to be divided to come nearest to x (the relative
    reconstruction bias of arXiv 2404.16014): 1 is unbiased, below it x̂ is too small. NaN where Σ⟨x̂, x⟩ is 0."""


class ByToken(NamedTuple):
    """Of each token, fp64 [n]."""

    error: Tensor
    """‖x − x̂‖²."""
    spread: Tensor
    """‖x − x̄‖²."""
    square: Tensor
    """‖x̂‖²."""
    product: Tensor
    """⟨x̂, x⟩."""


def by_token(x: Tensor, x_hat: Tensor, mean: Tensor) -> ByToken:
    """The terms of which every figure here is a sum, of x and x̂ [n, d_model] and x̄ = ``mean`` [d_model], in fp64.

    Raises ValueError for a reconstruction of another shape.
    """
    if x_hat.shape != x.shape:
        raise ValueError(f"sae: expected a reconstruction of shape {list(x.shape)}, got {list(x_hat.shape)}")
    x64 = x.double()
    x_hat = x_hat.to(x64)
    error, spread = (x64 - x_hat).square().sum(1), (x64 - mean).square().sum(1)
    return ByToken(error, spread, x_hat.square().sum(1), (x_hat * x64).sum(1))


def fidelity(
    name: str, activations: Tensor, reconstruct: Callable[[Tensor, int], Tensor], width: int | None = None
) -> Fidelity:
    """The fidelity of ``reconstruct(x, start)`` for chunks x of ``activations``, whose first row is ``start``.

    width: of the widest temporary it makes, by default d_model. Memory beyond that of a chunk is 16 bytes a token.
    Raises as `moments.moments`, and ValueError for a reconstruction of another shape.
    """
    mean = mean_row(name, activations)
    n, d_model = activations.shape
    errors = torch.empty(n, dtype=torch.float64, device=activations.device)
    spread, start = torch.empty_like(errors), 0
    square, product = errors.new_zeros(()), errors.new_zeros(())
    for x in chunks(activations, max(width or 0, d_model)):
        found, rows = by_token(x, reconstruct(x, start), mean), slice(start, start + len(x))
        errors[rows], spread[rows] = found.error, found.spread
        square, product = square + found.square.sum(), product + found.product.sum()
        start += len(x)
    variance = spread.sum()
    check_squares(name, variance)
    if variance == 0:
        return Fidelity(math.nan, math.nan, math.nan, math.nan, math.nan)
    shares = torch.where(errors == 0, errors, errors / spread)  # a token that is the mean, exactly, is not 0/0
    return Fidelity(
        fvu=(errors.sum() / variance).item(),
        median_fvu=shares.median().item(),
        top_error_share=_top_share(errors),
        top_variance_share=_top_share(spread),
        bias=(square / product).item() if product != 0 else math.nan,
    )


def _top_share(squares: Tensor) -> float:
    """Share of Σ ``squares`` [n] that its largest 0.1 % hold."""
    return (squares.topk(-(-len(squares) // TOP_OF)).values.sum() / squares.sum()).item()
