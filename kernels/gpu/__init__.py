"""The Triton kernels, one operator a file: formula, kernel, launcher."""

from ..reference.training import settle
from .decode import decode_backward, decode_forward
from .dense import dense_backward, dense_encode
from .encode import encode_forward, preactivations
from .entries import encode_entries
from .jumprelu import jumprelu_backward, jumprelu_forward
from .latents import latent_pass, weight_gradients
from .residual import residual_pass
from .transpose import by_latent
from .update import update_from_dense, update_from_entries
from .weighted_sum import encoder_times

__all__ = [
    "by_latent",
    "decode_backward",
    "decode_forward",
    "dense_backward",
    "dense_encode",
    "encode_entries",
    "encode_forward",
    "encoder_times",
    "jumprelu_backward",
    "jumprelu_forward",
    "latent_pass",
    "preactivations",
    "residual_pass",
    "settle",
    "update_from_dense",
    "update_from_entries",
    "weight_gradients",
]
