"""What evaluation and splicing need of a sparse autoencoder, whatever its architecture."""

from typing import Protocol

from torch import Tensor

from ..kernels import SparseCode


class SparseAutoencoder(Protocol):
    """A module that has these is judged by `gemmascope.evaluation` and spliced in by `gemmascope.sites.attach`."""

    @property
    def W_dec(self) -> Tensor:  # noqa: N802 as every SAE calls it
        """[d_sae, d_model]; its dtype and device are those of the SAE."""
        ...

    @property
    def d_model(self) -> int: ...

    @property
    def d_sae(self) -> int: ...

    def encode(self, x: Tensor) -> Tensor:
        """Dense activations [..., d_sae] of x [..., d_model]."""
        ...

    def encode_sparse(self, x: Tensor) -> SparseCode:
        """The active latents of x [N, d_model]."""
        ...

    def decode(self, f: Tensor | SparseCode) -> Tensor:
        """The reconstruction [..., d_model] of dense activations, or [N, d_model] of a code."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """The reconstruction of x, in its shape and dtype."""
        ...
