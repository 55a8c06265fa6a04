"""Sparse autoencoders on every layer of Gemma."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from .activations import harvest
    from .evaluation import evaluate_sae, evaluate_splice
    from .kernels import SparseCode
    from .saes import (
        BatchTopKSAE,
        Crosscoder,
        CrossLayerTranscoder,
        GatedSAE,
        JumpReLUSAE,
        MatryoshkaSAE,
        SideBySide,
        TopKSAE,
        Transcoder,
        accelerate,
        decelerate,
        load_pretrained_sae,
        load_sae,
    )
    from .sites import Capture, Site, attach
    from .training import CLTTrainer, Loss, SAETrainer, TrainConfig, sparse_loss, train

__all__ = [
    "BatchTopKSAE",
    "CLTTrainer",
    "Capture",
    "CrossLayerTranscoder",
    "Crosscoder",
    "GatedSAE",
    "JumpReLUSAE",
    "Loss",
    "MatryoshkaSAE",
    "SAETrainer",
    "SideBySide",
    "Site",
    "SparseCode",
    "TopKSAE",
    "TrainConfig",
    "Transcoder",
    "accelerate",
    "attach",
    "decelerate",
    "evaluate_sae",
    "evaluate_splice",
    "harvest",
    "load_pretrained_sae",
    "load_sae",
    "sparse_loss",
    "train",
]

if not TYPE_CHECKING:
    # Imported when first asked for: PyTorch takes seconds, in which the command line must know an interruption as one.
    _ORIGINS = {
        "activations": ("harvest",),
        "evaluation": ("evaluate_sae", "evaluate_splice"),
        "kernels": ("SparseCode",),
        "saes": (
            *("BatchTopKSAE", "CrossLayerTranscoder", "Crosscoder", "GatedSAE", "JumpReLUSAE", "MatryoshkaSAE"),
            *("SideBySide", "TopKSAE", "Transcoder"),
            *("accelerate", "decelerate", "load_pretrained_sae", "load_sae"),
        ),
        "sites": ("Capture", "Site", "attach"),
        "training": ("CLTTrainer", "Loss", "SAETrainer", "TrainConfig", "sparse_loss", "train"),
    }
    _ORIGIN_OF = {name: package for package, names in _ORIGINS.items() for name in names}

    def __getattr__(name: str) -> Any:
        if name in _ORIGINS:
            return import_module(f".{name}", __name__)
        if name not in _ORIGIN_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f".{_ORIGIN_OF[name]}", __name__), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *_ORIGINS, *_ORIGIN_OF})
