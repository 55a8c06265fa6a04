"""What flows through the sites of a language model, and the batches it is trained on in."""

from .documents import Document, read_dataset, read_documents
from .harvest import Activations, Stream, harvest, stream
from .held_out import hold_out, sample_rows
from .order import batches
from .outliers import OUTLIER_RATIO, OutlierCounts
from .tokens import TokenRows, tokenise

__all__ = [
    "OUTLIER_RATIO",
    "Activations",
    "Document",
    "OutlierCounts",
    "Stream",
    "TokenRows",
    "batches",
    "harvest",
    "hold_out",
    "read_dataset",
    "read_documents",
    "sample_rows",
    "stream",
    "tokenise",
]
