"""Features of an activation, and what exchanging some of them makes of it.

With features f of base b and source s, a mask μ in [0, 1] and a decoder that is affine, x̂ = f·W + c, exchanging is

    x' = x_b + e·(x̂_b − x_b) + Σ_j μ_j·(f_s,j − f_b,j)·W_j        e = 1: the error is dropped, 0: it stays

so that a pair touches the latents of two codes and no others, and the gradient of μ is zero elsewhere. Codes do not
depend on μ: they are made once for all prompts.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..checks import check_int
from ..evaluation.baselines import fit_pca
from ..kernels import SparseCode
from ..saes.base import BaseSAE

ENCODED_AT_ONCE = 4096
# Of an SAE of others: by how much its decoder may differ from an affine one, relative to the largest output.
AFFINE_WITHIN = 1e-4


class Features(Protocol):
    """size: how many there are."""

    size: int

    def exchanged(self, base: Tensor, source: Tensor, mask: Tensor) -> Tensor:
        """Activations [n, width] of the prompts with the indices ``base`` [n] (int64), with the features of ``source``
        where ``mask`` [size] is 1. Differentiable in ``mask``."""
        ...


class Directions:
    """The coordinates of orthonormal directions, ``rows`` [size, width]: nothing is lost, so there is no error.

    activations: [prompts, width].
    """

    def __init__(self, activations: Tensor, rows: Tensor):
        self.x, self.rows, self.size = activations, rows.to(activations), len(rows)

    def exchanged(self, base: Tensor, source: Tensor, mask: Tensor) -> Tensor:
        difference = self.x[source] - self.x[base]
        return self.x[base] + (difference @ self.rows.T * mask) @ self.rows


def neurons(activations: Tensor) -> Directions:
    """The coordinates as they are."""
    return Directions(activations, torch.eye(activations.shape[1], dtype=activations.dtype, device=activations.device))


def principal(activations: Tensor, fitted_on: Tensor) -> Directions:
    """All principal directions of the rows ``fitted_on`` of the activations (their indices, int64)."""
    return Directions(activations, fit_pca(activations[fitted_on].float()).directions.T)


def random_directions(activations: Tensor, seed: int) -> Directions:
    """As many orthonormal directions as there are coordinates, uniform over all such sets, drawn on the CPU by ``seed``
    (QR of a Gaussian matrix)."""
    check_int("seed", seed, 0, 2**63 - 1)
    width = activations.shape[1]
    generator = torch.Generator("cpu").manual_seed(seed)
    gaussian = torch.randn(width, width, generator=generator, dtype=torch.float64, device="cpu")
    return Directions(activations, orthonormal(gaussian).T)


def orthonormal(matrix: Tensor) -> Tensor:
    """The Q [n, k] of a matrix of rank k whose R has a positive diagonal: unique, and the matrix itself where its
    columns are orthonormal already."""
    Q, R = torch.linalg.qr(matrix)
    return Q * torch.sign(R.diagonal())


class Latents:
    """The latents of an SAE of affine decoder: codes of all ``activations`` [prompts, width], made now.

    drop_error: what the SAE does not reconstruct of the base is dropped. Raises ValueError for an SAE of another width,
    of codes that are not finite and, where it is no SAE of this package, for a decoder that is not affine; use
    `DenseLatents` for that.
    """

    @torch.no_grad()
    @without_autocast
    def __init__(self, activations: Tensor, sae: Any, drop_error: bool):
        self.size = sae.d_sae
        self.rows, self.start = _decoder(sae)
        codes = [_code(sae, part) for part in activations.split(ENCODED_AT_ONCE)]
        if not all(code.values.isfinite().all() for code in codes):
            raise ValueError("sae: expected finite codes of the activations, found NaN or Inf")
        self.values = torch.cat([code.values for code in codes])
        self.indices = torch.cat([code.indices for code in codes]).long()
        lengths = torch.cat([code.offsets.diff() for code in codes])
        self.offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        # The model's dtype is that of the mixture's base.
        self.values = self.values.to(self.rows.dtype)
        if drop_error:
            parts = [sae.decode(code).float() for code in codes] if isinstance(sae, BaseSAE) else [self._decoded()]
            self.base = torch.cat(parts).to(self.rows.dtype)
        else:
            self.base = activations.to(self.rows.dtype)

    def exchanged(self, base: Tensor, source: Tensor, mask: Tensor) -> Tensor:
        """A latent of both codes is in the sum twice, with either sign."""
        entries, rows = self._entries(torch.stack([base, source], 1).flatten())
        signs = torch.where(rows % 2 == 0, -1.0, 1.0).to(self.values)
        latents = self.indices[entries]
        weights = mask.to(self.values.dtype)[latents] * self.values[entries] * signs
        counts = torch.bincount(rows // 2, minlength=len(base))
        starts = counts.cumsum(0) - counts
        change = torch.nn.functional.embedding_bag(latents, self.rows, starts, mode="sum", per_sample_weights=weights)
        return self.base[base] + change

    def _entries(self, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """The entries of the codes of ``prompts`` after one another, and the position in ``prompts`` of each."""
        lengths = self.offsets[prompts + 1] - self.offsets[prompts]
        rows = torch.repeat_interleave(torch.arange(len(prompts), device=lengths.device), lengths)
        within = torch.arange(len(rows), device=lengths.device) - (lengths.cumsum(0) - lengths)[rows]
        return self.offsets[prompts][rows] + within, rows

    def _decoded(self) -> Tensor:
        starts = self.offsets[:-1]
        found = torch.nn.functional.embedding_bag(
            self.indices, self.rows, starts, mode="sum", per_sample_weights=self.values
        )
        return found + self.start


class DenseLatents:
    """The latents of anything with ``d_sae``, ``encode`` and ``decode``, as the formula is written: whole matrices and
    autograd. What `Latents` is held to."""

    @torch.no_grad()
    def __init__(self, activations: Tensor, sae: Any, drop_error: bool):
        self.size, self.sae = sae.d_sae, sae
        self.x = activations
        self.f = torch.cat([sae.encode(part) for part in activations.split(ENCODED_AT_ONCE)])
        self.drop_error = drop_error
        if not self.f.isfinite().all():
            raise ValueError("sae: expected finite codes of the activations, found NaN or Inf")

    def exchanged(self, base: Tensor, source: Tensor, mask: Tensor) -> Tensor:
        mask = mask.to(self.f.dtype)
        mixed = self.sae.decode((1 - mask) * self.f[base] + mask * self.f[source])
        if self.drop_error:
            return mixed
        return self.x[base] + mixed - self.sae.decode(self.f[base])


def features_of(activations: Tensor, sae: Any, drop_error: bool) -> Features:
    """`Latents` where the decoder is affine, else `DenseLatents`. Raises ValueError for an SAE of another width."""
    width = activations.shape[1]
    if (d_model := getattr(sae, "d_model", width)) != width:
        raise ValueError(f"sae: expected d_model {width}, the width of the site, got {d_model}")
    if isinstance(sae, BaseSAE) or _is_affine(sae, activations):
        return Latents(activations, sae, drop_error)
    return DenseLatents(activations, sae, drop_error)


def _code(sae: Any, x: Tensor) -> SparseCode:
    """Of x [n, width]."""
    if hasattr(sae, "encode_sparse"):
        return sae.encode_sparse(x.to(sae.W_dec.dtype))
    dense = sae.encode(x)
    tokens, latents = dense.nonzero(as_tuple=True)
    counts = torch.bincount(tokens, minlength=len(dense))
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return SparseCode(dense[tokens, latents].float(), latents.int(), offsets, dense.shape[1])


def _decoder(sae: Any) -> tuple[Tensor, Tensor]:
    """W [d_sae, width], detached, in fp32 or fp64, and c [width]."""
    W = sae.W_dec.detach()
    W = W if W.dtype == torch.float64 else W.float()
    if isinstance(sae, BaseSAE):
        return W * sae.input_scale, sae.b_dec.detach().to(W.dtype) * sae.input_scale
    return W, sae.decode(sae.encode(W.new_zeros(1, W.shape[1])) * 0)[0].detach().to(W.dtype)


@torch.no_grad()
def _is_affine(sae: Any, activations: Tensor) -> bool:
    """Whether an SAE of others decodes by its W_dec and a constant, as tried on some activations."""
    if not isinstance(getattr(sae, "W_dec", None), Tensor) or sae.W_dec.shape != (sae.d_sae, activations.shape[1]):
        return False
    f = sae.encode(activations[:64])
    decoded = sae.decode(f)
    W, start = _decoder(sae)
    error = (f.to(W.dtype) @ W + start - decoded.to(W.dtype)).abs().max()
    return bool(error <= AFFINE_WITHIN * decoded.abs().max())
