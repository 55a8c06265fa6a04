"""The sparse autoencoders as torch modules."""

from .jumprelu import JumpReLUSAE
from .protocol import SparseAutoencoder

__all__ = ["JumpReLUSAE", "SparseAutoencoder"]
