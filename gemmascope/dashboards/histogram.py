"""`Histograms`: of every latent, bins of equal width whose end grows with the largest activation, exactly."""

import torch
from torch import Tensor


class Histograms:
    """Bins of equal width from 0 to the power of 2 just above the largest activation of each latent.

    When that grows, bins are merged in groups of a power of 2, whose bounds are bounds of the new bins: so the counts
    are those that the largest activation alone decides, in whatever order activations come.
    """

    def __init__(self, d_sae: int, bins: int):
        self.counts = torch.zeros(d_sae, bins, dtype=torch.int64, device="cpu")
        self.exponent = torch.zeros(d_sae, dtype=torch.int64, device="cpu")
        """End = 2^exponent, of latents that fired."""

    @property
    def bins(self) -> int:
        return self.counts.shape[1]

    def grow(self, latents: Tensor, exponent: Tensor) -> None:
        """The ends of ``latents`` [n], which are different ones and have fired, become 2^``exponent`` [n]."""
        by = (exponent - self.exponent[latents]).clamp(max=self.bins.bit_length())
        bins = torch.arange(self.bins, dtype=torch.int64, device="cpu") >> by[:, None]
        merged = torch.zeros(len(latents), self.bins, dtype=torch.int64, device="cpu")
        self.counts[latents] = merged.scatter_add_(1, bins, self.counts[latents])
        self.exponent[latents] = exponent

    def add(self, latents: Tensor, values: Tensor) -> None:
        """Activations ``values`` [n] fp32 of ``latents`` [n], below their ends."""
        # Exact: a power of 2 scales, and fp64 holds every fp32.
        share = torch.ldexp(values.double(), -self.exponent[latents])
        at = latents * self.bins + (share * self.bins).long()
        self.counts.view(-1).index_add_(0, at, torch.ones_like(at))

    def end(self, fired: Tensor) -> Tensor:
        """fp32 [d_sae]: the ends; 0 of latents not in ``fired`` bool [d_sae]."""
        one = torch.ones(len(fired), dtype=torch.float64, device="cpu")
        return torch.ldexp(one, self.exponent).float().where(fired, 0)


def exponents(values: Tensor) -> Tensor:
    """int64: e with 2^(e−1) ≤ value < 2^e of each value > 0."""
    return torch.frexp(values).exponent.long()
