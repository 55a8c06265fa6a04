"""The selection by the largest pre-activations: z by the native backend."""

from torch import Tensor

from ..entries import Entries
from ..reference.topk import selected
from .inference import preactivations


def encode_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, of: str = "token", among: Tensor | None = None, tf32: bool = False
) -> Entries:
    """As `reference.encode_topk`; tf32 changes nothing on a CPU."""
    return selected(preactivations(x, W_enc, b_enc), k, of, among)
