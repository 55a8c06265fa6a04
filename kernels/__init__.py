"""JumpReLU sparse-autoencoder operators: one contract, several implementations.

Importing this package imports torch and nothing else: Triton is loaded when an operator first needs it.
"""

from .api import JumpReLUOutput, decode, encode, jumprelu
from .code import SparseCode
from .dispatch import Choice, choose

__all__ = ["Choice", "JumpReLUOutput", "SparseCode", "choose", "decode", "encode", "jumprelu"]
