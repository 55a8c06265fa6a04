"""How sparse an SAE is and how well it reconstructs held-out activations (arXiv 2408.05147 §3.4).

L0 is the mean of ‖f(x)‖₀; FVU and what stands beside it are in `variance`, their control is PCA whose rank is the L0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..activations.moments import check_activations, check_dense
from ..checks import dtype_name
from ..kernels import density
from ..saes import SparseAutoencoder
from .baselines import pca_fidelity
from .variance import fidelity

HIGH_FREQUENCY = 0.1


@dataclass(frozen=True, eq=False)
class SAEMetrics:
    """What `evaluate_sae` found on the held-out activations."""

    tokens: int
    """Activations that were counted."""
    l0: float
    """Mean number of active latents."""
    fvu: float
    """Fraction of variance unexplained; NaN when the activations do not vary, NaN or Inf when x̂ is not finite."""
    median_fvu: float
    """FVU of the median token: the median of ‖x − x̂‖² / ‖x − x̄‖². Far above ``fvu`` where a few tokens hold most of
    the variance."""
    pca_fvu: float | None
    """FVU of PCA of rank round(l0); None when no training activations were given."""
    pca_median_fvu: float | None
    """That of its median token."""
    top_error_share: float
    """Share of the squared error held by the 0.1 % of the tokens where it is largest, at least one; NaN without any."""
    top_variance_share: float
    """Share of the variance held by the 0.1 % of the tokens that lie farthest from the mean, at least one."""
    reconstruction_bias: float
    """γ = E‖x̂‖² / E⟨x̂, x⟩: 1 where x̂ is unbiased, below it where it is too small, as an L1 penalty makes it; of x
    itself, so that a large mean, which b_dec holds, brings it near 1. NaN where E⟨x̂, x⟩ is 0."""
    dead_fraction: float
    """Share of the latents that never fired here."""
    high_freq_fraction: float
    """Share of the latents that fired on more than 10 % of the activations."""
    firing_frequency: Tensor
    """Share of the activations that each latent fired on, float32 [d_sae] on the CPU."""


@torch.no_grad()
def evaluate_sae(
    sae: SparseAutoencoder,
    activations: Tensor,
    train_activations: Tensor | None = None,
    keep: Tensor | None = None,
) -> SAEMetrics:
    """Sparsity, fidelity and firing of ``sae`` on held-out activations.

    activations [n, d_model]: float16, bfloat16, float32 or float64 on any device. Which tokens they are is the caller's
    choice: drawn over the whole text (`activations.hold_out`), none of them trained on. train_activations [m, d_model]:
    where the PCA baseline is fitted; without them it is left out. keep: bool [n], False for positions to leave out
    (BOS, EOS, PAD); by default all count. Beyond the arguments themselves memory is bounded but for 16 bytes a token.

    Raises TypeError or ValueError: no SAE, not a float matrix, a width other than ``sae.d_model``, no rows, none kept,
    NaN or Inf, an SAE that reconstructs another shape.
    """
    _check_sae(sae)
    check_activations("activations", activations, sae.d_model)
    if train_activations is not None:
        check_activations("train_activations", train_activations, sae.d_model)
    if keep is not None:
        activations = activations[_checked_keep(keep, activations)]

    device = sae.W_dec.device
    n, fired = activations.shape[0], torch.zeros(sae.d_sae, dtype=torch.int64, device=device)

    encode_sparse = getattr(sae, "encode_sparse", None)  # another package's module may have the dense code alone

    def reconstruct(x: Tensor, start: int) -> Tensor:
        # The weights' precision, not that of the stored activations: rounding x̂ to bf16 would count as SAE error.
        x = x.to(device=device, dtype=sae.W_dec.dtype)
        if encode_sparse is None:
            f = sae.encode(x)
            fired.add_((f != 0).sum(0))
            return sae.decode(f)
        code = encode_sparse(x)
        fired.add_(code.firing_count())
        return sae.decode(code if density.is_sparse(code) else code.to_dense())

    found = fidelity("activations", activations, reconstruct, sae.d_sae)
    l0 = fired.sum().item() / n
    pca = None if train_activations is None else pca_fidelity(train_activations, activations, round(l0))
    frequency = fired.double() / n
    return SAEMetrics(
        tokens=n,
        l0=l0,
        fvu=found.fvu,
        median_fvu=found.median_fvu,
        pca_fvu=None if pca is None else pca.fvu,
        pca_median_fvu=None if pca is None else pca.median_fvu,
        top_error_share=found.top_error_share,
        top_variance_share=found.top_variance_share,
        reconstruction_bias=found.bias,
        dead_fraction=(fired == 0).double().mean().item(),
        high_freq_fraction=(frequency > HIGH_FREQUENCY).double().mean().item(),
        firing_frequency=frequency.float().cpu(),
    )


_OF_AN_SAE = ("W_dec", "d_model", "d_sae", "encode", "decode")


def _check_sae(sae: SparseAutoencoder) -> None:
    if isinstance(sae, type) or not all(hasattr(sae, name) for name in _OF_AN_SAE):
        raise TypeError(f"sae: expected a SparseAutoencoder, with {', '.join(_OF_AN_SAE)}, got {type(sae).__name__}")
    if sae.W_dec.is_meta:
        raise ValueError("sae: expected weights that hold values, got those of a module on the device meta")


def _checked_keep(keep: Tensor, activations: Tensor) -> Tensor:
    check_dense("keep", keep)
    if keep.dtype != torch.bool:
        raise TypeError(f"keep: expected dtype bool, got {dtype_name(keep.dtype)}")
    if keep.shape != activations.shape[:1]:
        raise ValueError(f"keep: expected shape [{activations.shape[0]}], got {list(keep.shape)}")
    if not keep.any():
        raise ValueError(f"keep: expected at least one position to count, got none of {keep.shape[0]}")
    return keep.to(activations.device)
