"""Tokens whose activations have many times the usual norm: counted always, left out where that is asked for.

Trained models have them (Gemma 3 270M: 27 of 16,311 tokens hold 71 % of the variance of a layer's residual), and an SAE
trained or scored with them is judged by them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..checks import check_number
from ..sites import Site
from ..sites.site import as_site

OUTLIER_RATIO = 5.0


@dataclass
class OutlierCounts:
    """How many tokens are outliers: their norm is above ``ratio`` times the median norm, at one site or more."""

    ratio: float
    median_norms: dict[Site, float] = field(default_factory=dict)
    """Those given, else of the first tokens that were seen."""
    tokens: int = 0
    """Seen so far, outliers included."""
    outliers: int = 0
    outliers_at: dict[Site, int] = field(default_factory=dict)
    """By site; a token may be one at several."""
    dropped: int = 0
    """``outliers`` where they are left out, else 0."""


class OutlierFilter:
    """Counts the outliers among tokens and says which to keep; the arguments are those of `stream`."""

    def __init__(
        self, sites: tuple[Site, ...], max_norm_ratio: float | None, median_norms: Mapping[Site, float] | None
    ):
        self._drops = max_norm_ratio is not None
        if max_norm_ratio is not None:
            check_number("max_norm_ratio", max_norm_ratio, 1)
        self.counts = OutlierCounts(OUTLIER_RATIO if max_norm_ratio is None else float(max_norm_ratio))
        self.counts.outliers_at = dict.fromkeys(sites, 0)
        if median_norms is not None:
            self.counts.median_norms = _checked(median_norms, sites)

    def keep(self, activations: Mapping[Site, Tensor]) -> Tensor | None:
        """Count the tokens of {site: [n, width]}; bool [n] on the CPU of those to keep, None where that is all."""
        counts = self.counts
        n = len(next(iter(activations.values())))
        is_outlier = torch.zeros(n, dtype=torch.bool, device="cpu")
        for site, x in activations.items():
            norms = norms_of(x)
            if site not in counts.median_norms:
                counts.median_norms[site] = norms.nanmedian().item()
            is_outlier_here = are_outliers(norms, counts.median_norms[site], counts.ratio).cpu()
            counts.outliers_at[site] += int(is_outlier_here.sum())
            is_outlier |= is_outlier_here
        counts.tokens += n
        found = int(is_outlier.sum())
        counts.outliers += found
        if not self._drops or not found:
            return None
        counts.dropped += found
        return ~is_outlier


def norms_of(x: Tensor) -> Tensor:
    """‖x_n‖ of the rows of x [n, width]: fp32 [n], of fp64 fp64."""
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.promote_types(x.dtype, torch.float32))


def are_outliers(norms: Tensor, median_norm: float, ratio: float) -> Tensor:
    """Which of ``norms`` [n] are above ``ratio`` times ``median_norm``: bool [n]."""
    return norms > ratio * median_norm


def _checked(median_norms: Any, sites: tuple[Site, ...]) -> dict[Site, float]:
    if not isinstance(median_norms, Mapping):
        raise TypeError(f"median_norms: expected a dict from Site to float, got {type(median_norms).__name__}")
    norms = {as_site(site): norm for site, norm in median_norms.items()}
    for site in sites:
        if site not in norms:
            raise ValueError(f"median_norms: expected one for each of sites, found none for {site}")
        check_number(f"median_norms[{site}]", norms[site], 0, open_low=True)
    return {site: float(norms[site]) for site in sites}
