"""The operators of inference by Triton; each has its counterpart in `reference.py`."""

from ._decode import decode_backward, decode_forward
from ._encode import encode_forward, preactivations
from ._jumprelu import jumprelu_backward, jumprelu_forward

__all__ = [
    "decode_backward",
    "decode_forward",
    "encode_forward",
    "jumprelu_backward",
    "jumprelu_forward",
    "preactivations",
]
