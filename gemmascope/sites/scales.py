"""`LatentScales`: how large the activations of each latent are, in whose units it is steered."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_choice, check_int
from ..kernels import SparseCode

UNITS = ("max", "mean")


class LatentScales(NamedTuple):
    """Of the activations of each latent over ``n_tokens`` tokens, on the CPU; `collect` measures them."""

    max: Tensor
    """[d_sae] fp32 the largest; 0 for a latent that did not fire."""
    mean: Tensor
    """[d_sae] fp32 the mean over the tokens on which it fired; 0 for a latent that did not."""
    firing_count: Tensor
    """[d_sae] int64 on how many it fired."""
    n_tokens: int

    def unit(self, name: str, latent: int) -> float:
        """The max or mean of ``latent``. Raises ValueError for a latent that never fired, and so has neither."""
        check_choice("unit", name, UNITS)
        check_int("latent", latent, 0, len(self.firing_count) - 1)
        if self.firing_count[latent] == 0:
            raise ValueError(
                f"latent {latent}: expected one that fires, to measure its {name} by, found that it fired on none of "
                f"{self.n_tokens} tokens"
            )
        return float(getattr(self, name)[latent])


class ScaleSums:
    """What `LatentScales` are made of, batch by batch; 20 bytes a latent."""

    def __init__(self, d_sae: int):
        self._max = torch.full((d_sae,), -torch.inf, dtype=torch.float32, device="cpu")
        self._sum = torch.zeros(d_sae, dtype=torch.float64, device="cpu")
        self._count = torch.zeros(d_sae, dtype=torch.int64, device="cpu")
        self._n_tokens = 0

    def add(self, code: SparseCode) -> None:
        """The tokens of ``code``, which is on the CPU."""
        latents = code.indices.long()
        self._max.scatter_reduce_(0, latents, code.values.float(), "amax")
        self._sum.index_add_(0, latents, code.values.double())
        self._count += torch.bincount(latents, minlength=len(self._count))
        self._n_tokens += code.n_tokens

    def scales(self) -> LatentScales:
        largest = self._max.where(self._count > 0, 0)
        mean = (self._sum / self._count.clamp(min=1)).float()
        return LatentScales(largest, mean, self._count.clone(), self._n_tokens)
