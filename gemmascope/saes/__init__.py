"""The sparse autoencoders as torch modules."""

from .accelerate import accelerate, decelerate
from .jumprelu import JumpReLUSAE
from .protocol import SparseAutoencoder

__all__ = ["JumpReLUSAE", "SparseAutoencoder", "accelerate", "decelerate"]
