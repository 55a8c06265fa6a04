"""What flows through the sites of a language model, and the batches it is trained on in."""

from .harvest import harvest, stream
from .held_out import hold_out, sample_rows
from .order import batches

__all__ = ["batches", "harvest", "hold_out", "sample_rows", "stream"]
