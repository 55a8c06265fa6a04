"""What flows through the sites of a language model, and the batches it is trained on in."""

from .documents import Document, read_dataset, read_documents
from .feed import Feed
from .harvest import Activations, Stream, harvest, stream
from .harvester import Harvester
from .held_out import hold_out, sample_rows
from .order import batches
from .outliers import OUTLIER_RATIO, OutlierCounts
from .ring import Ring, Source, ring_bytes
from .statistics import SiteStatistics, warnings_for
from .store import ActivationStore, harvest_to_store
from .tokens import TokenRows, tokenise

__all__ = [
    "OUTLIER_RATIO",
    "ActivationStore",
    "Activations",
    "Document",
    "Feed",
    "Harvester",
    "OutlierCounts",
    "Ring",
    "SiteStatistics",
    "Source",
    "Stream",
    "TokenRows",
    "batches",
    "harvest",
    "harvest_to_store",
    "hold_out",
    "read_dataset",
    "read_documents",
    "ring_bytes",
    "sample_rows",
    "stream",
    "tokenise",
    "warnings_for",
]
