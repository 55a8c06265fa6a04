"""What evaluation and splicing need of a sparse autoencoder, whatever its architecture."""

from typing import Protocol

from torch import Tensor


class SparseAutoencoder(Protocol):
    """A module that has these is judged by `gemmascope.evaluation` and spliced in by `gemmascope.sites.attach`.

    One that also has ``encode_sparse(x) -> SparseCode``, and whose ``decode`` takes such a code, is judged on its
    active entries.
    """

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

    def decode(self, f: Tensor) -> Tensor:
        """The reconstruction [..., d_model] of dense activations."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """The reconstruction of x, in its shape and dtype."""
        ...
