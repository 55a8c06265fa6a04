"""The operators of the training step by Triton; each has its counterpart in `training_reference.py`."""

from ._dense import dense_backward, dense_encode
from ._entries import encode_entries

__all__ = ["dense_backward", "dense_encode", "encode_entries"]
