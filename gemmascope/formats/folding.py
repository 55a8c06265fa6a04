"""The same function without input scale and pre-encoder bias, on the tensors of an SAE."""

import torch
from torch import Tensor

from .manifest import SAEConfig


def fold(tensors: dict[str, Tensor], config: SAEConfig) -> tuple[dict[str, Tensor], SAEConfig]:
    """The tensors and config of the same function with input_scale 1 and no pre-encoder bias (arXiv 2408.05147,
    appendix A). W_enc and W_dec are those given.

        b_enc' = C·b_enc − C·b_dec·W_enc;  b_dec' = C·b_dec;  θ' = C·max(θ, 0)

    tensors: b_enc [d_sae], b_dec [d_model], W_enc [d_model, d_sae] and, unless it is a TopK SAE, threshold [d_sae], of
    float dtypes, in which the products are formed: what was rounded before is rounded anew. As C > 0, the k largest
    pre-activations stay the k largest.
    """
    scale, b_enc = config.input_scale, tensors["b_enc"]
    if config.pre_encoder_bias:
        b_enc = b_enc - tensors["b_dec"] @ tensors["W_enc"]
    folded = dict(tensors, b_enc=b_enc * scale, b_dec=tensors["b_dec"] * scale)
    if "threshold" in tensors:
        folded["threshold"] = torch.clamp(tensors["threshold"], min=0) * scale
    return folded, config._replace(input_scale=1.0, pre_encoder_bias=False)
