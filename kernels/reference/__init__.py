"""The specification: every operator in plain PyTorch, written to be read.

Computes in the inputs' dtype promoted to at least fp32 (fp64 stays fp64), with autocast off, on any device. Imports
nothing of the code written for speed, which is judged against it.
"""

from .autoencoder import Forward, Parameters, sae_backward, sae_forward, sae_loss
from .conclusion import centre, conclude, finish, token_pass
from .gates import activation, compute_dtype, gate, greater, nan_or_zero, threshold_gradient, window, without_autocast
from .inference import (
    decode_backward,
    decode_forward,
    encode_forward,
    jumprelu_backward,
    jumprelu_forward,
    preactivations,
)
from .topk import encode_topk, largest
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
    "Forward",
    "Parameters",
    "activation",
    "by_latent",
    "centre",
    "compute_dtype",
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
    "gate",
    "greater",
    "jumprelu_backward",
    "jumprelu_forward",
    "largest",
    "latent_pass",
    "nan_or_zero",
    "preactivations",
    "residual_pass",
    "sae_backward",
    "sae_forward",
    "sae_loss",
    "settle",
    "threshold_gradient",
    "token_pass",
    "update_from_dense",
    "update_from_entries",
    "weight_gradients",
    "window",
    "without_autocast",
]
