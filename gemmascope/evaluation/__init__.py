"""How good an SAE is: on held-out activations, against baselines, and inside the language model."""

from .baselines import pair_table_fvu, pca_fvu, random_dictionary_fvu
from .bootstrap import Bootstrap
from .cross_layer import CLTMetrics, CrosscoderMetrics, evaluate_clt, evaluate_crosscoder
from .diagnosis import Diagnosis, Finding, diagnose
from .fidelity import HIGH_FREQUENCY, SAEMetrics, evaluate_sae
from .fit import Fit, Survey, compare_beginnings, measure_fit, measure_rounding, survey
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
from .transcoders import evaluate_transcoder, judge_transcoders, linear_fvu

__all__ = [
    "HIGH_FREQUENCY",
    "Bootstrap",
    "CLTMetrics",
    "CrosscoderMetrics",
    "Diagnosis",
    "Finding",
    "Fit",
    "SAEMetrics",
    "SparingOutliers",
    "SpliceMetrics",
    "Survey",
    "compare_beginnings",
    "delta_loss",
    "diagnose",
    "evaluate_clt",
    "evaluate_crosscoder",
    "evaluate_sae",
    "evaluate_splice",
    "evaluate_transcoder",
    "judge_suite",
    "judge_transcoders",
    "language_model_loss",
    "linear_fvu",
    "loss_recovered",
    "mean_ablation_loss",
    "measure_fit",
    "measure_rounding",
    "pair_table_fvu",
    "pca_fvu",
    "random_dictionary_fvu",
    "survey",
]
