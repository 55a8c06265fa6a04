"""Operators of sparse autoencoders: one contract, several implementations.

`jumprelu`, `preactivations`, `encode` and `decode` are the activation and inference; the others are one exact training
step, in the order in which it runs. Importing this package imports torch and nothing else: Triton is loaded when an
operator first needs it.
"""

from .api import (
    JumpReLUOutput,
    by_latent,
    decode,
    dense_backward,
    dense_encode,
    encode,
    encode_entries,
    encode_topk,
    encoder_times,
    jumprelu,
    latent_pass,
    preactivations,
    residual_pass,
    settle,
    update_from_dense,
    update_from_entries,
    weight_gradients,
)
from .code import SparseCode
from .dispatch import Choice, choose
from .entries import (
    ACTIVE,
    LATENT,
    ByLatent,
    DenseCode,
    Entries,
    LatentState,
    LatentSums,
    Objective,
    Residual,
    Rule,
)

__all__ = [
    "ACTIVE",
    "LATENT",
    "ByLatent",
    "Choice",
    "DenseCode",
    "Entries",
    "JumpReLUOutput",
    "LatentState",
    "LatentSums",
    "Objective",
    "Residual",
    "Rule",
    "SparseCode",
    "by_latent",
    "choose",
    "decode",
    "dense_backward",
    "dense_encode",
    "encode",
    "encode_entries",
    "encode_topk",
    "encoder_times",
    "jumprelu",
    "latent_pass",
    "preactivations",
    "residual_pass",
    "settle",
    "update_from_dense",
    "update_from_entries",
    "weight_gradients",
]
