"""Activations whose features are known: planted directions that fire by a power law and together in groups.

    x = mean + Σ_i a_i·d_i + noise,   a_i = s_i·m_i,   s_i ~ Bernoulli(p_i),   p_i ∝ (i + 1)^−power,   Σ_i p_i = l0

Features of a group fire together more often than by chance: s_i says whether √ρ·g + √(1 − ρ)·e_i, a standard normal
whose g the group shares, is above the quantile of p_i. m_i is log-normal. What an SAE made of them is compared with the
directions themselves (`compare`), which no real activations allow.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemmascope.checks import check_int, check_number

LARGEST_FREQUENCY = 0.5
SAME, ALIKE = 0.9, 0.7
"""Cosines from which on a latent counts as a feature, and as one of the latents that share it."""


@dataclass(frozen=True)
class Planted:
    """What lies in the activations. Raises ValueError or TypeError naming what cannot be."""

    n_features: int = 256
    d_model: int = 64
    l0: float = 8.0
    """Features that fire on a token on average."""
    power: float = 1.0
    group: int = 4
    """Features that share g; 1: none does."""
    correlation: float = 0.5
    """ρ."""
    noise: float = 0.02
    """Standard deviation of each coordinate."""
    seed: int = 0
    """Of the directions and of the tokens."""

    def __post_init__(self):
        for name in ("n_features", "d_model", "group"):
            check_int(name, getattr(self, name), 1)
        check_int("seed", self.seed, 0)
        check_number("l0", self.l0, 0, LARGEST_FREQUENCY * self.n_features, open_low=True)
        check_number("power", self.power, 0)
        check_number("correlation", self.correlation, 0, 1)
        check_number("noise", self.noise, 0)

    def frequencies(self) -> Tensor:
        """fp64 [n_features], descending, at most one half; what is cut off goes to the others in proportion."""
        weights = torch.arange(1, self.n_features + 1, dtype=torch.float64).pow(-self.power)
        found = weights * (self.l0 / weights.sum())
        for _ in range(self.n_features):
            capped = found >= LARGEST_FREQUENCY
            if not (found > LARGEST_FREQUENCY).any():
                break
            found[capped] = LARGEST_FREQUENCY
            rest = self.l0 - LARGEST_FREQUENCY * int(capped.sum())
            found[~capped] *= rest / found[~capped].sum()
        return found

    def directions(self) -> Tensor:
        """fp32 [n_features, d_model], rows of unit norm."""
        generator = torch.Generator("cpu").manual_seed(self.seed)
        drawn = torch.randn(self.n_features, self.d_model, generator=generator, dtype=torch.float32)
        return drawn / drawn.norm(dim=1, keepdim=True)

    def draw(self, n: int) -> Tensor:
        """Activations fp32 [n, d_model], the same at every call."""
        check_int("n", n, 1)
        generator = torch.Generator("cpu").manual_seed(self.seed + 1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float32)

        directions, mean, blocks = self.directions(), normal(self.d_model), []
        groups = torch.arange(self.n_features) // self.group
        border = torch.special.ndtri(1 - self.frequencies()).float()
        for start in range(0, n, 4096):
            rows = min(4096, n - start)
            shared = normal(rows, int(groups[-1]) + 1)[:, groups]
            own = normal(rows, self.n_features)
            fires = self.correlation**0.5 * shared + (1 - self.correlation) ** 0.5 * own > border
            sizes = (0.25 * normal(rows, self.n_features)).exp()
            blocks.append(mean + (fires * sizes) @ directions + self.noise * normal(rows, self.d_model))
        return torch.cat(blocks)


def assignment(similarity: Tensor) -> tuple[Tensor, str]:
    """For each row of ``similarity`` [m, n] a column of its own, −1 where there are too few, by which the sum is large:
    the largest there is where SciPy is installed ("optimal"), else row and column of the largest entry first
    ("greedy")."""
    found = torch.full((similarity.shape[0],), -1, dtype=torch.int64)
    try:
        from scipy.optimize import linear_sum_assignment  # type: ignore
    except ImportError:
        left = similarity.clone()
        for _ in range(min(left.shape)):
            row, column = divmod(int(left.argmax()), left.shape[1])
            found[row] = column
            left[row], left[:, column] = -torch.inf, -torch.inf
        return found, "greedy"
    rows, columns = linear_sum_assignment(similarity.numpy(), maximize=True)
    found[torch.from_numpy(rows)] = torch.from_numpy(columns)
    return found, "optimal"


def compare(planted: Planted, W_dec: Tensor, frequency: Tensor, l0: float) -> dict[str, Any]:
    """What the SAE of these decoder rows [d_sae, d_model] made of the planted features.

    frequency [d_sae]: how often each latent fires; those that never do are left out. l0: its mean L0.

    ``cosine``: the mean over features of the cosine with the latent assigned to it, 0 without one; ``found``: the share
    of them from `SAME` on. ``split``: of the latents that are like some feature, from `ALIKE` on, the share that is
    like one which another latent is nearer to. ``l0_error``: L0 over the true one, less 1.
    """
    alive = W_dec.detach().float().cpu()[frequency.cpu() > 0]
    unit = alive / alive.norm(dim=1, keepdim=True).clamp(min=1e-12)
    similarity = planted.directions() @ unit.T
    if not len(alive):
        return {"cosine": 0.0, "found": 0.0, "split": 0.0, "l0_error": -1.0, "assignment": "none"}
    columns, how = assignment(similarity)
    rows = torch.arange(len(columns))
    matched = torch.where(columns >= 0, similarity[rows, columns.clamp(min=0)], 0)
    best = similarity.max(0)
    like = best.values >= ALIKE
    features = best.indices[like]
    return {
        "cosine": matched.mean().item(),
        "found": (matched >= SAME).double().mean().item(),
        "split": 1 - len(features.unique()) / len(features) if len(features) else 0.0,
        "l0_error": l0 / planted.l0 - 1,
        "assignment": how,
    }
