"""The native CPU backend: its build, its operators, and their C++ in csrc/."""

from ..reference.conclusion import centre, conclude, finish, token_pass
from .inference import (
    decode_backward,
    decode_forward,
    encode_forward,
    jumprelu_backward,
    jumprelu_forward,
    preactivations,
)
from .topk import encode_topk
from .training import (
    by_latent,
    dense_backward,
    dense_encode,
    encode_entries,
    encoder_parts,
    encoder_times,
    latent_pass,
    residual_pass,
    settle,
    update_from_dense,
    update_from_entries,
    weight_gradients,
)

__all__ = [
    "by_latent",
    "centre",
    "conclude",
    "decode_backward",
    "decode_forward",
    "dense_backward",
    "dense_encode",
    "encode_entries",
    "encode_forward",
    "encode_topk",
    "encoder_parts",
    "encoder_times",
    "finish",
    "jumprelu_backward",
    "jumprelu_forward",
    "latent_pass",
    "preactivations",
    "residual_pass",
    "settle",
    "token_pass",
    "update_from_dense",
    "update_from_entries",
    "weight_gradients",
]
