r"""Logistic regression, and how well scores tell two classes apart.

    min over w, b of  Σ_i c_i·log(1 + exp(−s_i·(⟨w, x̃_i⟩ + b))) + ½·l2·‖w‖²

s_i = ±1; x̃ is x less its mean over its standard deviation, both of the training rows; c_i = n/(2·n_class), so that
both classes weigh the same. The loss is convex, and with l2 > 0 it has one minimum, which Newton's method finds: its
steps by conjugate gradients, so that no matrix of the width of x is formed. l2 = 1 is what scikit-learn calls C = 1,
its default.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_number, check_tensor, check_type

L2 = 1.0
# A gradient is 0 when its largest element is so small beside the number of rows, of which it is a sum.
TOLERANCE = 1e-9
MOST_STEPS, MOST_PRODUCTS, MOST_HALVINGS = 60, 500, 40
_SLOPE = 1e-4  # Armijo's
_ROUNDING = 1e-10


class LogisticProbe(NamedTuple):
    """The probe of `fit_logistic`, fp64."""

    weight: Tensor
    """[k], of standardised columns."""
    bias: Tensor
    """[]."""
    mean: Tensor
    """[k], as the next of the training rows."""
    deviation: Tensor
    """[k]; 1 where a column does not vary, whose weight is 0."""
    converged: bool
    """Whether the gradient is 0, up to `TOLERANCE`."""

    def scores(self, x: Tensor) -> Tensor:
        """⟨w, x̃⟩ + b of rows [n, k]: fp64 [n], above 0 for the class True."""
        return ((x.double() - self.mean) / self.deviation) @ self.weight + self.bias


def fit_logistic(x: Tensor, labels: Tensor, l2: float = L2) -> LogisticProbe:
    """The probe of rows x [n, k], floats, of the classes ``labels``, bool [n]; the same bits for the same input.

    Raises TypeError or ValueError for an l2 that is not above 0, for other shapes and dtypes, for x that is not finite
    and for labels of one class.
    """
    check_type("x", x, Tensor)
    check_tensor("labels", labels, (len(x),), (torch.bool,), x.device)
    check_number("l2", l2, 0, open_low=True)
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"x: expected floats of shape [n, k], got {x.dtype} {list(x.shape)}")
    if not x.isfinite().all():
        raise ValueError("x: expected finite features, found NaN or Inf")
    n, positive = len(x), int(labels.sum())
    if not 0 < positive < n:
        raise ValueError(f"labels: expected two classes, got one of {n} rows")
    x = x.double()
    mean = x.mean(0)
    deviation = (x - mean).square().mean(0).sqrt()
    # What does not vary: the rounding of the mean alone.
    deviation = torch.where(deviation <= 1e-12 * mean.abs(), 1.0, deviation)
    rows = torch.cat([(x - mean) / deviation, x.new_ones(n, 1)], 1)
    sign = labels.to(x.dtype) * 2 - 1
    weights = torch.where(labels, x.new_tensor(n / (2 * positive)), x.new_tensor(n / (2 * (n - positive))))
    penalty = torch.full_like(rows[0], l2)
    penalty[-1] = 0  # the bias is free

    def value(v: Tensor) -> Tensor:
        return (weights * torch.nn.functional.softplus(-sign * (rows @ v))).sum() + 0.5 * (penalty * v * v).sum()

    v, converged = torch.zeros_like(rows[0]), False
    for _ in range(MOST_STEPS):
        margins = sign * (rows @ v)
        missing = torch.sigmoid(-margins)
        gradient = -rows.T @ (weights * sign * missing) + penalty * v
        if gradient.abs().max() <= TOLERANCE * n:
            converged = True
            break
        curvature = weights * missing * torch.sigmoid(margins)
        step = _solved(rows, curvature, penalty, -gradient)
        slope, before, size = gradient @ step, value(v), 1.0
        if -slope <= _ROUNDING * before:  # the end is so near that values no longer say which is lower
            v = v + step
            continue
        for _ in range(MOST_HALVINGS):
            if value(v + size * step) <= before + _SLOPE * size * slope:
                break
            size /= 2
        else:
            break  # as small as rounding lets it be
        v = v + size * step
    return LogisticProbe(v[:-1], v[-1], mean, deviation, converged)


def _solved(rows: Tensor, curvature: Tensor, penalty: Tensor, wanted: Tensor) -> Tensor:
    """v with (rowsᵀ·diag(curvature)·rows + diag(penalty))·v near ``wanted``, by conjugate gradients that are
    preconditioned by the diagonal; exact where there are few columns."""
    diagonal = curvature @ rows.square() + penalty
    diagonal = torch.where(diagonal > 0, diagonal, 1.0)
    v, rest = torch.zeros_like(wanted), wanted.clone()
    scaled = rest / diagonal
    direction, product = scaled.clone(), rest @ scaled
    norm = torch.linalg.vector_norm(wanted)
    enough = norm * torch.clamp(norm.sqrt() * 1e-3, max=1e-2)  # Newton's steps need few digits while they are large
    for _ in range(min(MOST_PRODUCTS, 2 * len(wanted) + 10)):
        image = rows.T @ (curvature * (rows @ direction)) + penalty * direction
        along = direction @ image
        if not along > 0:
            break
        size = product / along
        v, rest = v + size * direction, rest - size * image
        if torch.linalg.vector_norm(rest) <= enough:
            break
        scaled = rest / diagonal
        following = rest @ scaled
        direction, product = scaled + (following / product) * direction, following
    return v


def balanced_accuracy(predicted: Tensor, labels: Tensor, times: Tensor | None = None) -> Tensor:
    """The mean of the shares of either class that are told right: fp64 [], or [draws] by ``times``.

    predicted, labels: bool [n]. times: [draws, n], how often each row counts. NaN without rows of both classes.
    """
    right, of_all = (torch.stack([each & labels, each & ~labels], 1).double() for each in (predicted == labels, True))
    weights = right.new_ones(1, len(labels)) if times is None else times.double()
    found = ((weights @ right) / (weights @ of_all)).mean(1)
    return found[0] if times is None else found


def area_under_curve(scores: Tensor, labels: Tensor, times: Tensor | None = None) -> Tensor:
    """The share of pairs of a row of either class in which the one of True has the higher score, a tie counting half:
    fp64 [], or [draws] by ``times``; arguments and NaN as of `balanced_accuracy`."""
    levels, places = scores.double().unique(return_inverse=True)
    weights = torch.ones(1, len(labels), dtype=torch.float64, device=scores.device) if times is None else times.double()
    of_class = []
    for mask in (labels, ~labels):
        counts = weights.new_zeros(len(weights), len(levels))
        of_class.append(counts.index_add_(1, places[mask], weights[:, mask]))
    positive, negative = of_class
    below = negative.cumsum(1) - negative / 2
    found = (positive * below).sum(1) / (positive.sum(1) * negative.sum(1))
    return found[0] if times is None else found
