"""The product of `encode_entries` in CUDA C++ for Hopper cards, built and taken only on request."""

from .build import asked
from .product import product_of_entries, takes

__all__ = ["asked", "product_of_entries", "takes"]
