"""Sparse autoencoders on every layer of Gemma 2."""

__version__ = "0.1.0"
