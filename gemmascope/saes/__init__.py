"""The sparse autoencoders as torch modules."""

from .jumprelu import JumpReLUSAE
from .protocol import SparseAutoencoder
from .transcoder import Transcoder

__all__ = ["JumpReLUSAE", "SparseAutoencoder", "Transcoder"]
