"""The entries of a batch in the order of their latents. Plain PyTorch: for the eager route,
and for what is too large for the counting sort of `gpu/transpose.py`."""

import torch

from .entries import LATENT, ByLatent, Entries


def by_latent(entries: Entries, d_sae: int) -> ByLatent:
    """Sort the entries by latent, tokens ascending within a latent; without atomics or a look from the host.

    What lies beyond the last entry carries the latent ``d_sae``, so it sorts behind every list.
    """
    latents, order = torch.sort(entries.latents & LATENT, stable=True)
    boundaries = torch.arange(d_sae + 1, dtype=latents.dtype, device=latents.device)
    return ByLatent(order, torch.searchsorted(latents, boundaries))
