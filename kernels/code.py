"""`SparseCode`: the active latents of a batch of tokens, as compressed sparse rows (CSR)."""

from typing import NamedTuple

import torch
from torch import Tensor


class SparseCode(NamedTuple):
    """Active latents of N tokens out of F = ``d_sae``.

    Row n owns entries ``offsets[n]:offsets[n + 1]``; inside a row the latents ascend, so that the same input always
    gives the same bits.

    values: [nnz] activations, fp32 (fp64 when computed in fp64).
    indices: [nnz] int32 latent numbers in [0, d_sae).
    offsets: [N + 1] int64, ``offsets[0] == 0``, ``offsets[N] == nnz``.
    d_sae: F, the number of latents.
    """

    values: Tensor
    indices: Tensor
    offsets: Tensor
    d_sae: int

    @property
    def n_tokens(self) -> int:
        return self.offsets.shape[0] - 1

    @property
    def nnz(self) -> int:
        return self.values.shape[0]

    def l0(self) -> Tensor:
        """Active latents of each token: [N] int64."""
        return self.offsets[1:] - self.offsets[:-1]

    def token_indices(self) -> Tensor:
        """The token each entry belongs to: [nnz] int64."""
        tokens = torch.arange(self.n_tokens, device=self.offsets.device)
        return torch.repeat_interleave(tokens, self.l0(), output_size=self.nnz)

    def firing_count(self) -> Tensor:
        """Tokens on which each latent fires: [F] int64."""
        return torch.bincount(self.indices, minlength=self.d_sae)

    def to_dense(self) -> Tensor:
        """The dense activations: [N, F], dtype of ``values``."""
        dense = self.values.new_zeros(self.n_tokens, self.d_sae)
        return dense.index_put((self.token_indices(), self.indices.long()), self.values)

    def to(self, device: torch.device | str) -> "SparseCode":
        return SparseCode(self.values.to(device), self.indices.to(device), self.offsets.to(device), self.d_sae)

    @staticmethod
    def from_dense(f: Tensor) -> "SparseCode":
        """The non-zero entries of ``f`` [N, F] (NaN counts as non-zero)."""
        if f.ndim != 2:
            raise ValueError(f"f: expected [N, d_sae], got shape {tuple(f.shape)}")
        token, latent = torch.nonzero(f, as_tuple=True)
        offsets = torch.zeros(f.shape[0] + 1, dtype=torch.int64, device=f.device)
        offsets[1:] = torch.cumsum((f != 0).sum(1), 0)
        values = f[token, latent].to(torch.promote_types(f.dtype, torch.float32))
        return SparseCode(values, latent.to(torch.int32), offsets, f.shape[1])
