"""Sparse autoencoders on every layer of Gemma 2."""

from .activations import harvest
from .evaluation import evaluate_sae, evaluate_splice
from .kernels import SparseCode
from .saes import JumpReLUSAE
from .sites import Capture, Site, attach
from .training import Loss, SAETrainer, TrainConfig, sparse_loss, train
from .version import __version__ as __version__

__all__ = [
    "Capture",
    "JumpReLUSAE",
    "Loss",
    "SAETrainer",
    "Site",
    "SparseCode",
    "TrainConfig",
    "attach",
    "evaluate_sae",
    "evaluate_splice",
    "harvest",
    "sparse_loss",
    "train",
]
