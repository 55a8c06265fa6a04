"""What the recipe needs to know of a site's activations before training on them, measured on the first superblock."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import check_number, check_tensor
from ..sites import Site
from .moments import CHUNK_ELEMENTS, check_activations, check_squares
from .outliers import OUTLIER_RATIO, are_outliers, norms_of

TOP_SHARE = 1e-3
# Beyond these `warnings_for` has something to say.
LARGE_VARIANCE_SHARE = 0.25
LARGE_GAMMA = 1.0


@dataclass(frozen=True, eq=False)
class SiteStatistics:
    """Mean and variance of the tokens that are kept, and what the outliers among all tokens do to them."""

    tokens: int
    """Kept tokens that were measured."""
    mean: Tensor
    """fp64 [width] on the CPU."""
    variance: float
    """mean_n ‖x_n − x̄‖²."""
    median_norm: float
    """Of all tokens, those left out included."""
    outlier_ratio: float
    """A token is an outlier here when its norm is above so many times the median norm."""
    outliers: int
    """Of the tokens measured, kept or not."""
    top_variance_share: float
    """Share of the variance of all tokens held by the 0.1 % of them that lie farthest from the mean."""

    @property
    def mean_square(self) -> float:
        """mean_n ‖x_n‖²."""
        return self.variance + self.mean.square().sum().item()

    @property
    def gamma(self) -> float:
        """γ = ‖mean‖/‖std‖: how far the mean outweighs what varies; Inf where nothing does."""
        norm = torch.linalg.vector_norm(self.mean).item()
        return norm / math.sqrt(self.variance) if self.variance > 0 else math.inf

    @classmethod
    def measure(
        cls,
        activations: Tensor,
        kept: Tensor | None = None,
        *,
        outlier_ratio: float = OUTLIER_RATIO,
        norms: Tensor | None = None,
        device: torch.device | str | None = None,
        name: str = "activations",
    ) -> "SiteStatistics":
        """Of ``activations`` [n, width], of which those are trained on where ``kept``, bool [n], is true; all by
        default.

        Sums are fp64, taken in pieces on ``device``, by default where the activations are. norms: fp32 [n], where they
        are known. Raises ValueError naming ``name`` for activations that are not finite or of which none is kept, and
        as `moments.moments`.
        """
        check_activations(name, activations)
        check_number("outlier_ratio", outlier_ratio, 1)
        n = len(activations)
        if kept is not None:
            check_tensor("kept", kept, (n,), (torch.bool,))
        if norms is None:
            norms = norms_of(activations)
        mask = torch.ones(n, dtype=torch.bool, device="cpu") if kept is None else kept.cpu()
        if not mask.any():
            raise ValueError(f"{name}: expected some tokens that are kept, found none")
        pieces = _Pieces(activations, mask, activations.device if device is None else torch.device(device))
        mean, mean_of_kept = pieces.means()
        if not mean.isfinite().all():
            raise ValueError(f"{name}: expected finite values, found NaN or Inf")
        distances, squares_of_kept = pieces.squares(mean, mean_of_kept)
        total = distances.sum()
        check_squares(name, total)
        top = distances.topk(math.ceil(TOP_SHARE * n)).values.sum()
        median = norms.nanmedian().item()
        return cls(
            tokens=int(mask.sum()),
            mean=mean_of_kept.cpu(),
            variance=squares_of_kept / int(mask.sum()),
            median_norm=median,
            outlier_ratio=float(outlier_ratio),
            outliers=int(are_outliers(norms, median, outlier_ratio).sum()),
            top_variance_share=(top / total).item() if total > 0 else 0.0,
        )

    def facts(self) -> dict[str, Any]:
        """All but the mean, as values of JSON; `from_facts` takes both."""
        return {name: value for name, value in self.__dict__.items() if name != "mean"}

    @classmethod
    def from_facts(cls, facts: dict[str, Any], mean: Tensor) -> "SiteStatistics":
        return cls(mean=mean, **facts)


def warnings_for(
    statistics: Mapping[Site, SiteStatistics], *, drop_norm: float | None = None, scale_by: str | None = None
) -> list[str]:
    """What a user should know before training on such activations, a line for each.

    Few tokens hold much of the variance: the 0.1 % farthest from the mean over 25 % of it. The mean outweighs what
    varies: γ above 1 where ``scale_by`` is "mean_square", whose units λ, θ and ε then have.
    """
    lines = []
    for site, measured in statistics.items():
        if measured.top_variance_share > LARGE_VARIANCE_SHARE:
            outliers = f"{measured.outliers} above {measured.outlier_ratio:g} times the median norm"
            advice = (
                f"set drop_norm ({outliers}), or FVU is a matter of these few"
                if drop_norm is None
                else f"drop_norm leaves out {outliers}; judge what is left by the figures for kept tokens"
            )
            lines.append(
                f"{site}: the 0.1 % of tokens farthest from the mean hold {measured.top_variance_share:.0%} of the "
                f"variance; {advice}"
            )
        if scale_by == "mean_square" and measured.gamma > LARGE_GAMMA:
            share = 1 - measured.variance / measured.mean_square if measured.mean_square > 0 else 0.0
            lines.append(
                f"{site}: the mean holds {share:.0%} of the mean square (γ {measured.gamma:.2g}), so that λ, θ and ε "
                'are in units of what does not vary; set scale_by = "variance"'
            )
    return lines


class _Pieces:
    """Activations in fp64, a bounded piece at a time."""

    def __init__(self, activations: Tensor, kept: Tensor, device: torch.device):
        self._rows = max(1, CHUNK_ELEMENTS // 8 // activations.shape[1])
        self._activations, self._kept, self._device = activations, kept, device
        self._all_kept = bool(kept.all())

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All rows of a piece, and those of it that are kept."""
        for x, kept in zip(self._activations.split(self._rows), self._kept.split(self._rows), strict=True):
            x = x.to(self._device).double()
            yield x, x if self._all_kept else x[kept.to(self._device)]

    def means(self) -> tuple[Tensor, Tensor]:
        """Of all rows and of those kept, summed about the first row, so that of equal rows it is exactly that row."""
        first = self._activations[0].to(self._device).double()
        sums = torch.zeros(2, len(first), dtype=torch.float64, device=self._device)
        for x, kept in self:
            sums[0] += (x - first).sum(0)
            if not self._all_kept:
                sums[1] += (kept - first).sum(0)
        if self._all_kept:
            sums[1] = sums[0]
        return first + sums[0] / len(self._activations), first + sums[1] / int(self._kept.sum())

    def squares(self, mean: Tensor, mean_of_kept: Tensor) -> tuple[Tensor, float]:
        """‖x_n − mean‖² of every row [n], and the sum of ‖x_n − mean_of_kept‖² over those kept."""
        distances, total = [], torch.zeros((), dtype=torch.float64, device=self._device)
        for x, kept in self:
            distances.append((x - mean).square().sum(1))
            total += distances[-1].sum() if self._all_kept else (kept - mean_of_kept).square().sum()
        return torch.cat(distances), total.item()
