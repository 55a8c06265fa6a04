"""The operators of the training step by Triton; each has its counterpart in `reference_training.py`."""

from ._dense import dense_backward, dense_encode
from ._entries import encode_entries
from ._latents import encoder_times, latent_pass, weight_gradients
from ._residual import residual_pass
from ._transpose import by_latent
from ._update import settle, update_from_dense, update_from_entries

__all__ = [
    "by_latent",
    "dense_backward",
    "dense_encode",
    "encode_entries",
    "encoder_times",
    "latent_pass",
    "residual_pass",
    "settle",
    "update_from_dense",
    "update_from_entries",
    "weight_gradients",
]
