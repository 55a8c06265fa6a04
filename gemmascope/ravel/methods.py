"""What an SAE is judged beside: the controls, by name, and what trains each of them.

neurons   a mask over the coordinates as they are
pca       a mask over the principal directions of the training prompts' activations
random    a mask over random orthonormal directions, drawn by the seed
das       some orthonormal directions, learnt: Distributed Alignment Search
mdas      all of them, learnt, and a mask over them: the skyline
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..autocast import without_autocast
from . import features
from .pairs import Pair, PairSet
from .presets import Protocol
from .train import Interchange, Tick, Trained, steps_of, train_mask, train_rotation

CONTROLS = ("neurons", "pca", "random", "das", "mdas")
FLOORS = ("always base", "always source")


def train_control(name: str, on: Interchange, pairs: PairSet, protocol: Protocol, seed: int, tick: Tick) -> Trained:
    """The control of that name, trained on the pairs."""
    x = on.activations.vectors
    if name == "das":
        return train_rotation(on, pairs.train, protocol, seed, tick, min(protocol.directions, x.shape[1]))
    if name == "mdas":
        return train_rotation(on, pairs.train, protocol, seed, tick)
    if name == "neurons":
        found = features.neurons(x)
    elif name == "pca":
        found = features.principal(x, _prompts(pairs.train, x))
    else:
        found = features.random_directions(x, seed)
    return train_mask(on, found, pairs.train, protocol, seed, tick)


def train_sae(sae: Any, on: Interchange, pairs: PairSet, protocol: Protocol, seed: int, tick: Tick) -> Trained:
    """A mask over the latents of an SAE.

    SAEs of a model with LayerNorm are made on activations without their mean over coordinates, which the model does not
    see (TransformerLens takes it out of the weights), and are given them so here.
    """
    x = _given(on)
    latents = features.features_of(x, sae, protocol.error == "drop")
    return train_mask(on, latents, pairs.train, protocol, seed, tick)


@torch.no_grad()
@without_autocast
def entity_fvu(sae: Any, on: Interchange) -> float | None:
    """Of the variance of the activations at the entities' last tokens, over the prompts and about their mean, the share
    that the SAE does not reconstruct: no exchange of its latents can move it. 1 is what the mean alone would leave.
    None where all of them are the same activation."""
    x = _given(on)[on.activations.prompts]
    dtype = getattr(sae, "W_dec", x).dtype
    left = torch.cat(
        [sae.decode(sae.encode(part.to(dtype))).to(x) - part for part in x.split(features.ENCODED_AT_ONCE)]
    )
    wide = x.double()
    variance = (wide - wide.mean(0)).square().sum().item()
    return left.double().square().sum().item() / variance if variance else None


def steps_of_method(name: str, pairs: PairSet, protocol: Protocol) -> int:
    """Of a training."""
    epochs = protocol.rotation_epochs if name in ("das", "mdas") else protocol.epochs
    return steps_of(len(pairs.train), protocol, epochs)


def _given(on: Interchange) -> Tensor:
    """What SAEs encode: [prompts, width]."""
    x = on.activations.vectors
    return x if on.model.stack.is_gemma else x - x.mean(1, keepdim=True)


def _prompts(pairs: Sequence[Pair], x: Tensor) -> Tensor:
    """All of the training, once each."""
    return torch.tensor(sorted({each for pair in pairs for each in (pair.base, pair.source)}), device=x.device)
