"""What a few latents tell of a text: k-sparse probes of labels, beside probes of all that the model has."""

from .features import DenseFeatures, Features, LatentFeatures
from .k_sparse import KS, Score, Split, best, probe_task, random_dictionary, split_by_document
from .labels import Task, document_tasks, labelled_tasks, pieces_of, token_tasks
from .probes import LogisticProbe, area_under_curve, balanced_accuracy, fit_logistic

__all__ = [
    "KS",
    "DenseFeatures",
    "Features",
    "LatentFeatures",
    "LogisticProbe",
    "Score",
    "Split",
    "Task",
    "area_under_curve",
    "balanced_accuracy",
    "best",
    "document_tasks",
    "fit_logistic",
    "labelled_tasks",
    "pieces_of",
    "probe_task",
    "random_dictionary",
    "split_by_document",
    "token_tasks",
]
