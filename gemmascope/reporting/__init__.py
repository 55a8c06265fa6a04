"""What a person sees of a run: progress while it lasts, then the table, the figures and the page from its files."""

from .evaluation import evaluation_table, is_evaluation, read_evaluation, write_evaluation
from .log import TrainLog
from .probing import is_probing, probing_table, read_probing, write_probing
from .ravel import is_ravel, ravel_table, read_ravel_results, write_ravel
from .report import link_from_run, write_html, write_plots, write_study
from .results import read_frequencies, read_log, read_results, read_studies
from .table import final_table
from .trackers import Trackers, open_trackers

__all__ = [
    "Trackers",
    "TrainLog",
    "evaluation_table",
    "final_table",
    "is_evaluation",
    "is_probing",
    "is_ravel",
    "link_from_run",
    "open_trackers",
    "probing_table",
    "ravel_table",
    "read_evaluation",
    "read_frequencies",
    "read_log",
    "read_probing",
    "read_ravel_results",
    "read_results",
    "read_studies",
    "write_evaluation",
    "write_html",
    "write_plots",
    "write_probing",
    "write_ravel",
    "write_study",
]
