"""`TopKSAE`: an SAE of which a fixed number of latents fires."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import kernels
from ..autocast import without_autocast
from ..checks import check_int, found, is_integer
from ..formats.manifest import SAEConfig
from ..kernels import LATENT, Entries, SparseCode
from .base import BaseSAE


class OfK(BaseSAE):
    """``k`` of an SAE, in its state and in what it says of itself."""

    k: int

    def extra_repr(self) -> str:
        return f"k={self.k}, {super().extra_repr()}"

    def _scalar_problem(self, name: str, value: Any) -> str | None:
        return problem_in_k(value, self.d_sae) if name == "k" else super()._scalar_problem(name, value)


class TopKSAE(OfK):
    r"""TopK sparse autoencoder (arXiv 2406.04093); `SAETrainer` trains it (``kind="topk"``).

        z = (x/C − b_dec)·W_enc + b_enc;   f = the k largest of relu(z), the rest 0;   x̂ = C·(f·W_dec + b_dec)

    Of equal z at the border the latents of smaller number fire; a z of at most 0 never does, so that fewer than k may.
    NaN counts as larger than every number and stays NaN, as does −Inf, so that bad input stays visible.

    Parameters: ``W_enc`` [d_model, d_sae] (stored latent-major, as in `JumpReLUSAE`), ``W_dec`` [d_sae, d_model],
    ``b_enc`` [d_sae], ``b_dec`` [d_model]. z is fp32 whatever the dtype of the weights, or fp64 with fp64. Without a
    gradient `gemmascope.kernels.encode_topk` selects, and decoding runs on the entries.

    d_model, d_sae: positive ints. k: 1 to d_sae. The others as of `JumpReLUSAE`. Raises ValueError or TypeError on bad
    values.
    """

    ARCHITECTURE = "topk"
    SCALARS: ClassVar[Mapping[str, torch.dtype]] = {**BaseSAE.SCALARS, "k": torch.int64}

    def __init__(
        self,
        d_model: int,
        d_sae: int,
        k: int,
        *,
        pre_encoder_bias: bool = True,
        input_scale: float = 1.0,
        impl: str = "auto",
        metadata: dict[str, Any] | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(
            d_model,
            d_sae,
            pre_encoder_bias=pre_encoder_bias,
            input_scale=input_scale,
            impl=impl,
            metadata=metadata,
            generator=generator,
            device=device,
            dtype=dtype,
        )
        check_int("k", k, 1, d_sae)
        self.k = k

    def _preactivations(self, x: Tensor) -> Tensor:
        """z [N, d_sae] of x [N, d_model] as it comes out of `_encoder_input`, in which −Inf is NaN."""
        z = kernels.preactivations(x, self.W_enc, self.b_enc, impl=self.impl)
        return torch.where(z == -torch.inf, torch.nan, z)

    @without_autocast
    def _encode_densely(self, x: Tensor) -> Tensor:
        z = self._preactivations(self._encoder_input(x))
        chosen = torch.zeros_like(z, dtype=torch.bool).scatter(1, top_latents(z.detach(), self.k), True)
        return torch.where(chosen, torch.relu(z), 0).to(self.W_enc.dtype)

    @without_autocast
    def encode_sparse(self, x: Tensor) -> SparseCode:
        """Active latents of the tokens of x [..., d_model], flattened to N rows: at most k each. Not differentiable."""
        with torch.no_grad():
            rows = self._encoder_input(x)
            return code_of(kernels.encode_topk(rows, self.W_enc, self.b_enc, self.k, impl=self.impl), self.d_sae)

    def _config(self) -> SAEConfig:
        return super()._config()._replace(k=self.k)

    @classmethod
    def _of_config(cls, config: SAEConfig, **options: Any) -> "TopKSAE":
        sae = cls(1, 1, 1, **options)
        assert config.k is not None  # of a config of this architecture
        sae.k = config.k
        return sae


def problem_in_k(value: Any, d_sae: int) -> str | None:
    """Why ``value`` of a state dict cannot be k, or None."""
    if not is_integer(value) or value.shape != ():
        return f"expected a scalar of integers, got {found(value)}"
    return None if 1 <= value.item() <= d_sae else f"expected 1 to d_sae = {d_sae}, got {value.item()}"


def code_of(entries: Entries, d_sae: int) -> SparseCode:
    """Active entries as a code, in which −Inf is NaN. On a GPU it waits for the device."""
    nnz = int(entries.offsets[-1])
    z = entries.z[:nnz]
    return SparseCode(
        torch.where(z == -torch.inf, torch.nan, z), entries.latents[:nnz] & LATENT, entries.offsets, d_sae
    )


def top_latents(z: Tensor, k: int) -> Tensor:
    """The k largest of each row of z [N, d_sae], ascending by number: [N, k] int64. Of equals those of smaller number
    come first; NaN counts as +Inf."""
    order = torch.where(torch.isnan(z), torch.inf, z)
    if torch.compiler.is_compiling():  # nothing may depend on what the numbers are
        latents = order.sort(dim=1, descending=True, stable=True).indices[:, :k]
        return latents.sort(dim=1).values
    top = order.topk(min(k + 1, z.shape[1]), dim=1)
    latents = top.indices[:, :k]
    if k < z.shape[1]:
        # `topk` breaks ties as it likes: at the border of what fires they are broken by the number.
        tied = (top.values[:, k - 1] == top.values[:, k]) & (top.values[:, k - 1] > 0)
        if bool(tied.any()):
            latents = latents.clone()
            latents[tied] = order[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return latents.sort(dim=1).values
