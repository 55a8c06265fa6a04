"""How good an SAE is: on held-out activations, against baselines, and inside the language model."""

from .baselines import pair_table_fvu, pca_fvu, random_dictionary_fvu
from .fidelity import HIGH_FREQUENCY, SAEMetrics, evaluate_sae
from .language_model import (
    SparingOutliers,
    SpliceMetrics,
    delta_loss,
    evaluate_splice,
    language_model_loss,
    loss_recovered,
    mean_ablation_loss,
)
from .suite import judge_suite

__all__ = [
    "HIGH_FREQUENCY",
    "SAEMetrics",
    "SparingOutliers",
    "SpliceMetrics",
    "delta_loss",
    "evaluate_sae",
    "evaluate_splice",
    "judge_suite",
    "language_model_loss",
    "loss_recovered",
    "mean_ablation_loss",
    "pair_table_fvu",
    "pca_fvu",
    "random_dictionary_fvu",
]
