"""The specification of the selection by the largest pre-activations: TopK (arXiv 2406.04093), BatchTopK (arXiv
2412.06410)."""

import torch
from torch import Tensor

from ..entries import ACTIVE, Entries
from .gates import without_autocast
from .inference import preactivations


def largest(z: Tensor, k: int, of: str = "token", among: Tensor | None = None) -> Tensor:
    """Which z [N, F] are positive and among the k largest of their row, or the k·N largest of them all: bool [N, F].

    A z that is not finite counts as larger than every number, so that it is chosen and spoils what is made of it. Of
    equals the smaller token comes first, then the smaller latent. among: bool [F], latents that may be chosen.
    """
    bad = ~z.isfinite()
    key = torch.where(bad, torch.inf, z)
    may = (z > 0) | bad
    if among is not None:
        may = may & among
    key = torch.where(may, key, 0)
    rows, room = (key, k) if of == "token" else (key.reshape(1, -1), k * len(key))
    order = rows.sort(dim=1, descending=True, stable=True).indices[:, :room]
    chosen = torch.zeros_like(rows, dtype=torch.bool).scatter(1, order, True)
    return chosen.reshape(z.shape) & may


@without_autocast
def encode_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, of: str = "token", among: Tensor | None = None, tf32: bool = False
) -> Entries:
    """The entries of z = x·W_enc + b_enc that are `largest`, all of them active; room for k·N, filled up as
    `encode_entries` does. tf32: only a GPU has it."""
    return selected(preactivations(x, W_enc, b_enc), k, of, among)


def selected(z: Tensor, k: int, of: str = "token", among: Tensor | None = None) -> Entries:
    """The same of z [N, F] itself."""
    chosen = largest(z, k, of, among)
    (n, d_sae), room, device = z.shape, k * len(z), z.device
    offsets = torch.zeros(n + 1, dtype=torch.int64, device=device)
    offsets[1:] = torch.cumsum(chosen.sum(1), 0)
    token, latent = torch.nonzero(chosen, as_tuple=True)
    stored = len(token)
    entries = Entries(
        z=torch.zeros(room, dtype=z.dtype, device=device),
        latents=torch.full((room,), d_sae, dtype=torch.int32, device=device),
        tokens=torch.zeros(room, dtype=torch.int32, device=device),
        offsets=offsets,
    )
    entries.z[:stored] = z[token, latent]
    entries.latents[:stored] = (latent + ACTIVE).to(torch.int32)
    entries.tokens[:stored] = token.to(torch.int32)
    return entries
