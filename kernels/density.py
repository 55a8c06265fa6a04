"""How dense a code may be before products of whole matrices beat sums over its entries: every such number, once.

Density is the share of the N·F pairs of token and latent that are entries. Numbers by type of device; those of a CPU
are measured, those of a GPU arithmetic until one is measured (notes/).
"""

from typing import NamedTuple

import torch

from .code import SparseCode


class Switch(NamedTuple):
    """With hysteresis: dense above the one, sparse below the other, between the two as before."""

    dense_above: float
    sparse_below: float


TRAINING_STEP = {"cpu": Switch(0.20, 0.16), "cuda": Switch(0.010, 0.007)}
# Without hysteresis, so that x̂ depends on the input alone.
DECODE_DENSE_ABOVE = {"cpu": 0.12, "cuda": 0.006}


def training_switch(device: torch.device) -> Switch:
    """When the training step of an SAE changes its route on this device."""
    return TRAINING_STEP["cpu" if device.type == "cpu" else "cuda"]


def decode_dense_above(device: torch.device) -> float:
    """The density above which a product of whole matrices decodes faster on this device."""
    return DECODE_DENSE_ABOVE["cpu" if device.type == "cpu" else "cuda"]


def is_sparse(code: SparseCode) -> bool:
    """Whether `decode` of ``code`` is faster than a product with its dense form."""
    return code.nnz <= decode_dense_above(code.values.device) * code.n_tokens * code.d_sae
