"""The sparse autoencoders as torch modules."""

from .jumprelu import JumpReLUSAE

__all__ = ["JumpReLUSAE"]
