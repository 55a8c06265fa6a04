"""The SAE or transcoder that a recipe trains, by its kind."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..saes import BatchTopKSAE, GatedSAE, JumpReLUSAE, MatryoshkaSAE, TopKSAE
from ..saes.base import BaseSAE
from ..saes.gated_transcoder import GatedTranscoder, SkipGatedTranscoder
from ..saes.scaled_transcoder import ScaledSkipTranscoder, ScaledTranscoder, TrainedTranscoder
from ..saes.topk_transcoder import SkipTopKTranscoder, TopKTranscoder
from .config import TrainConfig


def new_sae(config: TrainConfig, d_model: int, threshold_init: float | None = None, **options: Any) -> BaseSAE:
    """Of random weights. threshold_init: of a JumpReLU SAE, by default the recipe's; options: as of `JumpReLUSAE`."""
    if config.kind == "jumprelu":
        threshold_init = config.threshold_init if threshold_init is None else threshold_init
        return JumpReLUSAE(d_model, config.d_sae, threshold_init=threshold_init, **options)
    if config.kind == "relu":  # θ = 0, which as log θ never moves
        options["metadata"] = {**(options.get("metadata") or {}), "kind": "relu"}
        return JumpReLUSAE(d_model, config.d_sae, threshold_init=0.0, **options)
    if config.kind == "gated":
        return GatedSAE(d_model, config.d_sae, **options)
    if config.k is not None:  # the recipe has checked that the others have none
        if config.kind == "topk":
            return TopKSAE(d_model, config.d_sae, config.k, **options)
        if config.kind == "batchtopk":
            return BatchTopKSAE(d_model, config.d_sae, config.k, **options)
        if config.kind == "matryoshka":
            return MatryoshkaSAE(d_model, config.d_sae, config.k, config.prefixes, **options)
    raise NotImplementedError(config.kind)


def of_kind(config: TrainConfig, jumprelu: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The parameters with which an SAE of that kind computes what the JumpReLU SAE of these does (`unfold.unfolded`).

    Gated: r = 0, b_mag = b_enc and b_gate = b_enc − θ, since z > θ is z − θ > 0. TopK, of which others fire, has the
    weights alone. Raises ValueError where there are none.
    """
    if config.kind == "jumprelu":
        return jumprelu
    threshold, b_enc = jumprelu["threshold"], jumprelu["b_enc"]
    others = {name: value for name, value in jumprelu.items() if name != "threshold"}
    if config.kind == "topk":
        return others
    if config.kind == "gated":
        return others | {"b_enc": b_enc - threshold, "b_mag": b_enc, "r_mag": torch.zeros_like(b_enc)}
    if config.kind == "relu" and threshold.any():
        raise ValueError(
            f"init_from: expected thresholds of 0 with kind='relu', got one of {threshold.max().item():.4g}"
        )
    return jumprelu


def new_transcoder(config: TrainConfig, d_in: int, d_out: int, **options: Any) -> TrainedTranscoder:
    """Of random weights. options: as of `TrainedTranscoder`."""
    if config.k is not None:
        of_k = SkipTopKTranscoder if config.skip else TopKTranscoder
        return of_k(d_in, d_out, config.d_sae, k=config.k, **options)
    if config.kind == "gated":
        gated = SkipGatedTranscoder if config.skip else GatedTranscoder
        return gated(d_in, d_out, config.d_sae, **options)
    threshold = config.threshold_init if config.kind == "jumprelu" else 0.0
    made = ScaledSkipTranscoder if config.skip else ScaledTranscoder
    return made(d_in, d_out, config.d_sae, threshold_init=threshold, **options)
