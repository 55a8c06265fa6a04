"""What the recipe needs to know of a site's activations before training on them, measured on the first superblock."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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

    def facts(self) -> dict[str, Any]:
        """All but the mean, as values of JSON; `from_facts` takes both."""
        return {name: value for name, value in self.__dict__.items() if name != "mean"}

    @classmethod
    def from_facts(cls, facts: dict[str, Any], mean: Tensor) -> "SiteStatistics":
        return cls(mean=mean, **facts)
