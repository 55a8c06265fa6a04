"""Sparse autoencoders on every layer of Gemma 2."""

from .kernels import SparseCode
from .sae import JumpReLUSAE

__version__ = "0.1.0"
__all__ = ["JumpReLUSAE", "SparseCode"]
