"""What flows through the sites of a language model, and the batches it is trained on in."""

from .harvest import harvest, stream
from .order import batches

__all__ = ["batches", "harvest", "stream"]
