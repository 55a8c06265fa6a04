"""Penalties of a power of the activations, and how λ follows when that power is annealed (arXiv 2408.00113, §4.2).

The penalty is λ·mean_n Σ_j ((f_nj + δ)^p − δ^p), with p = 1 that of f itself. It is steepest at f = 0, where its slope
is λ·c/N with c = p·δ^(p − 1), and calculated in that unit:

    λ·c·mean_n Σ_j φ(f_nj);   φ(f) = ((1 + f/δ)^p − 1)·δ/p ≤ f;   φ'(f) = (1 + f/δ)^(p − 1) ≤ 1

so that the bound on the gradients that an L1 penalty of the weight λ·c has is one for it, too.

Before each change of p the penalties of the old p and of the new are summed over a few updates. λ is then multiplied by
the one as a multiple of the other, and the penalty is at first as large as it was. That factor and the sums are four
numbers on the device, which a checkpoint holds; what is withheld neither adds to them nor changes them.
"""

from dataclasses import replace

import torch
from torch import Tensor

from .config import P_OFFSET, Annealing, Loss


def steepest(p: float) -> float:
    """c, the slope of (f + δ)^p at f = 0."""
    return p * P_OFFSET ** (p - 1)


def concave(f: Tensor, p: float) -> Tensor:
    """φ of activations f ≥ 0, in their shape and dtype; NaN of NaN."""
    return f if p == 1 else torch.expm1(p * torch.log1p(f / P_OFFSET)) * (P_OFFSET / p)


def slope(f: Tensor, p: float) -> Tensor:
    """φ', likewise."""
    if p == 1:
        return torch.ones_like(f)
    return torch.exp((p - 1) * torch.log1p(f / P_OFFSET))


def start(device: torch.device) -> Tensor:
    """What `factor` and `follow` keep, fp64 [4]: changes of p, the factor of λ, the sums with the old p and the new."""
    return torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64, device=device)


def factor(kept: Tensor, now: Annealing) -> Tensor:
    """[] fp64, by which λ is multiplied in an update that is the first after a change or a later one."""
    changes, before, old, new = kept.unbind()
    compared = (changes < now.changes) & (old > 0) & (new > 0)
    return torch.where(compared, before * (old / new), before)


def annealed(loss: Loss, kept: Tensor | None, now: Annealing | None) -> Loss:
    """``loss`` with the λ that annealing has come to. Waits for the device."""
    if kept is None or now is None:
        return loss
    return replace(loss, l0_coefficient=loss.l0_coefficient * factor(kept, now).item())


def compared(now: Annealing, f: Tensor) -> Tensor:
    """Σ (f + δ)^p − δ^p with the p that there is and with the next, fp64 [2], for activations of any shape; zeros where
    an update compares nothing."""
    if now.next_p is None:
        return torch.zeros(2, dtype=torch.float64, device=f.device)
    sums = [steepest(p) * concave(f, p).sum(dtype=torch.float64) for p in (now.p, now.next_p)]
    return torch.stack(sums)


def follow(kept: Tensor, now: Annealing, of_batch: Tensor, ok: Tensor) -> None:
    """Add what an update `compared`, if it was made."""
    sums = torch.where(kept[0] < now.changes, 0, kept[2:]) + of_batch
    changes = torch.full_like(kept[0], now.changes)
    kept.copy_(torch.where(ok > 0, torch.cat((torch.stack((changes, factor(kept, now))), sums)), kept))
