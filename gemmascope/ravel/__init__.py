"""RAVEL: whether one attribute of an entity can be exchanged inside a language model while the others stay."""

from .cities import cities
from .continuation import Continuation
from .data import EntityData, Prompt, read_ravel
from .features import DenseLatents, Directions, Latents, features_of
from .knowledge import Activations, activations, answers, known
from .methods import CONTROLS, FLOORS, entity_fvu, train_control, train_sae
from .pairs import Pair, PairSet, floors, make_pairs
from .presets import PRESETS, Protocol, protocol_of
from .prompts import Asked, Reader
from .score import Entities, figures, mean_figures, right_pairs
from .train import Interchange, Trained, train_mask, train_rotation

__all__ = [
    "CONTROLS",
    "FLOORS",
    "PRESETS",
    "Activations",
    "Asked",
    "Continuation",
    "DenseLatents",
    "Directions",
    "Entities",
    "EntityData",
    "Interchange",
    "Latents",
    "Pair",
    "PairSet",
    "Prompt",
    "Protocol",
    "Reader",
    "Trained",
    "activations",
    "answers",
    "cities",
    "entity_fvu",
    "features_of",
    "figures",
    "floors",
    "known",
    "make_pairs",
    "mean_figures",
    "protocol_of",
    "read_ravel",
    "right_pairs",
    "train_control",
    "train_mask",
    "train_rotation",
    "train_sae",
]
