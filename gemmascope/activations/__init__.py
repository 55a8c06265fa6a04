"""What flows through the sites of a language model, and the batches it is trained on in."""

from .harvest import Activations, Stream, harvest, stream
from .held_out import hold_out, sample_rows
from .order import batches
from .outliers import OUTLIER_RATIO, OutlierCounts

__all__ = [
    "OUTLIER_RATIO",
    "Activations",
    "OutlierCounts",
    "Stream",
    "batches",
    "harvest",
    "hold_out",
    "sample_rows",
    "stream",
]
