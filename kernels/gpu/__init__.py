"""The Triton kernels, one operator a file: formula, kernel, launcher."""

from ..reference.training import settle
from .centring import centre
from .conclusion import conclude
from .decode import decode_backward, decode_forward
from .dense import dense_backward, dense_encode
from .encode import encode_forward, preactivations
from .entries import encode_entries
from .finishing import finish
from .jumprelu import jumprelu_backward, jumprelu_forward
from .latents import latent_pass, weight_gradients
from .residual import residual_pass
from .tokens import token_pass
from .topk import encode_topk
from .transpose import by_latent
from .update import update_from_dense, update_from_entries
from .weighted_sum import encoder_parts, encoder_times

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
