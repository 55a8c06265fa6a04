"""The sparse autoencoders as torch modules."""

from .accelerate import accelerate, decelerate
from .batchtopk import BatchTopKSAE
from .clt import CrossLayerTranscoder
from .crosscoder import Crosscoder, SideBySide
from .gated import GatedSAE
from .jumprelu import JumpReLUSAE
from .load import load_pretrained_sae, load_sae
from .matryoshka import MatryoshkaSAE
from .protocol import SparseAutoencoder
from .topk import TopKSAE
from .transcoder import Transcoder

__all__ = [
    "BatchTopKSAE",
    "CrossLayerTranscoder",
    "Crosscoder",
    "GatedSAE",
    "JumpReLUSAE",
    "MatryoshkaSAE",
    "SideBySide",
    "SparseAutoencoder",
    "TopKSAE",
    "Transcoder",
    "accelerate",
    "decelerate",
    "load_pretrained_sae",
    "load_sae",
]
