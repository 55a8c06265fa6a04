"""`SparseCode`: the active latents of a batch of tokens, as compressed sparse rows (CSR)."""

from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import as_device, check_indices, check_int, check_present, check_starts, check_tensor
from .entries import LATENT


class SparseCode(NamedTuple):
    """Active latents of N tokens out of F = ``d_sae``.

    Row n owns entries ``offsets[n]:offsets[n + 1]``; inside a row the latents ascend, so that the same input always
    gives the same bits.

    values: [nnz] activations, fp32 (fp64 when computed in fp64).
    indices: [nnz] int32 latent numbers in [0, d_sae).
    offsets: [N + 1] int64, ``offsets[0] == 0``, ``offsets[N] == nnz``.
    d_sae: F, the number of latents.

    A tuple takes what it is given; every method but the two sizes begins with `check`, and so does `decode`.
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

    def check_tensors(self) -> None:
        """Raise TypeError or ValueError unless shapes, dtypes and devices are those of a code."""
        check_int("code.d_sae", self.d_sae, 0, LATENT)
        check_tensor("code.values", self.values, ("nnz",), (torch.float32, torch.float64))
        device = self.values.device
        check_tensor("code.indices", self.indices, (self.nnz,), (torch.int32,), device)
        check_tensor("code.offsets", self.offsets, ("N + 1",), (torch.int64,), device)
        if self.offsets.shape[0] == 0:
            raise ValueError("code.offsets: expected N + 1 entries, got none")

    def check(self) -> None:
        """`check_tensors`, and ValueError unless offsets ascend from 0 to nnz and indices are in [0, d_sae).

        Numbers are read on a CPU alone: on a GPU that would wait for the device, and they are trusted.
        """
        if torch.compiler.is_compiling():
            return
        self.check_tensors()
        check_starts("code.offsets", self.offsets, total=self.nnz)
        check_indices("code.indices", self.indices, self.d_sae)

    def l0(self) -> Tensor:
        """Active latents of each token: [N] int64."""
        self.check()
        return self.offsets[1:] - self.offsets[:-1]

    def token_indices(self) -> Tensor:
        """The token each entry belongs to: [nnz] int64."""
        lengths = self.l0()
        tokens = torch.arange(self.n_tokens, device=self.offsets.device)
        return torch.repeat_interleave(tokens, lengths, output_size=self.nnz)

    def firing_count(self) -> Tensor:
        """Tokens on which each latent fires: [F] int64."""
        self.check()
        return torch.bincount(self.indices, minlength=self.d_sae)

    def to_dense(self) -> Tensor:
        """The dense activations: [N, F], dtype of ``values``."""
        tokens = self.token_indices()
        dense = self.values.new_zeros(self.n_tokens, self.d_sae)
        return dense.index_put((tokens, self.indices.long()), self.values)

    def to(self, device: torch.device | str) -> "SparseCode":
        self.check_tensors()
        device = as_device("device", device)
        return SparseCode(self.values.to(device), self.indices.to(device), self.offsets.to(device), self.d_sae)

    @staticmethod
    def from_dense(f: Tensor) -> "SparseCode":
        """The non-zero entries of ``f`` [N, F], of a float dtype (NaN counts as non-zero)."""
        check_tensor("f", f, ("N", "d_sae"))
        check_present("f", f)
        token, latent = torch.nonzero(f, as_tuple=True)
        offsets = torch.zeros(f.shape[0] + 1, dtype=torch.int64, device=f.device)
        offsets[1:] = torch.cumsum((f != 0).sum(1), 0)
        values = f[token, latent].to(torch.promote_types(f.dtype, torch.float32))
        return SparseCode(values, latent.to(torch.int32), offsets, f.shape[1])
