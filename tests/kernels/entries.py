"""Batches of entries for the tests of the training kernels."""

from typing import NamedTuple

import torch
from torch import Tensor

from gemmascope.kernels import entries as currency
from gemmascope.kernels import reference
from gemmascope.kernels.entries import Entries
from tests.helpers import normal

BANDWIDTH = 0.5


def limit_scratch(monkeypatch, room: int) -> None:
    """Bytes that encoding holds for a chunk of tokens, however wide the code."""
    monkeypatch.setattr(currency, "SCRATCH_BYTES", room)
    monkeypatch.setattr(currency, "WIDE_SCRATCH_BYTES", room)


class Batch(NamedTuple):
    entries: Entries
    x: Tensor  # [N, d]
    W_dec: Tensor  # [F, d]
    b_dec: Tensor  # [d]
    threshold: Tensor  # [F]
    s: Tensor  # [N]

    @property
    def nnz(self) -> int:
        return min(int(self.entries.offsets[-1]), self.entries.z.shape[0])


def from_pre_activations(z: Tensor, threshold: Tensor, capacity: int | None = None, bandwidth: float = BANDWIDTH):
    """The entries of z [N, F] exactly; without a capacity, room for three more than there are."""
    identity, zeros = torch.eye(z.shape[1], device=z.device), torch.zeros_like(threshold)
    with torch.no_grad():
        entries = reference.encode_entries(z, identity, zeros, threshold, bandwidth, None)
        if capacity is None:
            capacity = len(entries.z) + 3
        entries = reference.encode_entries(z, identity, zeros, threshold, bandwidth, capacity)
    # What lies beyond the last entry is undefined but for the latent.
    entries.z[int(entries.offsets[-1]) :] = torch.nan
    entries.tokens[int(entries.offsets[-1]) :] = torch.iinfo(torch.int32).max
    return entries


def batch(N, F, d, dtype=torch.float32, device="cpu", capacity=None, seed=0) -> Batch:
    """About a quarter of the pairs are active and a tenth more in the window below θ.

    In batches large enough the second token has no entry, the fourth is the third again and the fifth has every
    latent but the last, which has no entry at all.
    """
    threshold = 0.6 + 0.2 * torch.rand(F, generator=torch.Generator().manual_seed(seed))
    z, x = normal(N, F, seed=seed + 1), normal(N, d, seed=seed + 2)
    if N > 4:
        z[1], z[4] = -9, 2
        z[3], x[3] = z[2], x[2]
    if F > 1:
        z[:, -1] = -9
    W_dec = torch.nn.functional.normalize(normal(F, d, seed=seed + 3), dim=1)
    entries = from_pre_activations(z, threshold, capacity)
    rest = x, W_dec.to(dtype), 0.1 * normal(d, seed=seed + 4), threshold, 0.01 * normal(N, seed=seed + 5).abs()
    return Batch(Entries(*(t.to(device) for t in entries)), *(t.to(device) for t in rest))


def double(value):
    """Every float tensor of a tuple in fp64; Entries and Batches stay what they are."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, tuple):
        parts = (double(part) for part in value)
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value
