"""The SAE that a recipe trains, by its kind."""

from typing import Any

from ..saes import BatchTopKSAE, JumpReLUSAE, MatryoshkaSAE, TopKSAE
from ..saes.base import BaseSAE
from .config import TrainConfig


def new_sae(config: TrainConfig, d_model: int, **options: Any) -> BaseSAE:
    """Of random weights. options: as of `JumpReLUSAE`."""
    if config.kind == "jumprelu":
        return JumpReLUSAE(d_model, config.d_sae, threshold_init=config.threshold_init, **options)
    if config.kind == "relu":  # θ = 0, which as log θ never moves
        return JumpReLUSAE(d_model, config.d_sae, threshold_init=0.0, **options)
    if config.k is not None:  # the recipe has checked that the others have none
        if config.kind == "topk":
            return TopKSAE(d_model, config.d_sae, config.k, **options)
        if config.kind == "batchtopk":
            return BatchTopKSAE(d_model, config.d_sae, config.k, **options)
        if config.kind == "matryoshka":
            return MatryoshkaSAE(d_model, config.d_sae, config.k, config.prefixes, **options)
    raise NotImplementedError(config.kind)
