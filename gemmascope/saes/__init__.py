"""The sparse autoencoders as torch modules."""

from .jumprelu import JumpReLUSAE
from .load import load_pretrained_sae, load_sae
from .protocol import SparseAutoencoder
from .topk import TopKSAE

__all__ = ["JumpReLUSAE", "SparseAutoencoder", "TopKSAE", "load_pretrained_sae", "load_sae"]
