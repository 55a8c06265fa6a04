"""The SAE or transcoder that a recipe trains, by its kind."""

from typing import Any

from ..saes import JumpReLUSAE
from ..saes.base import BaseSAE
from ..saes.scaled_transcoder import ScaledSkipTranscoder, ScaledTranscoder
from .config import TrainConfig


def new_sae(config: TrainConfig, d_model: int, **options: Any) -> BaseSAE:
    """Of random weights. options: as of `JumpReLUSAE`."""
    if config.kind == "jumprelu":
        return JumpReLUSAE(d_model, config.d_sae, threshold_init=config.threshold_init, **options)
    if config.kind == "relu":  # θ = 0, which as log θ never moves
        return JumpReLUSAE(d_model, config.d_sae, threshold_init=0.0, **options)
    raise NotImplementedError(config.kind)


# Kinds that reconstruct another activation than they read.
OF_TRANSCODERS = ("jumprelu", "relu")


def new_transcoder(config: TrainConfig, d_in: int, d_out: int, **options: Any) -> ScaledTranscoder:
    """Of random weights. options: as of `ScaledTranscoder`. Raises ValueError for a kind that is not one's."""
    if config.kind not in OF_TRANSCODERS:
        raise ValueError(f"kind: expected {' or '.join(OF_TRANSCODERS)} with a target, got {config.kind!r}")
    threshold = config.threshold_init if config.kind == "jumprelu" else 0.0
    made = ScaledSkipTranscoder if config.skip else ScaledTranscoder
    return made(d_in, d_out, config.d_sae, threshold_init=threshold, **options)
