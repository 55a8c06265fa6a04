"""What a person sees of a run: progress while it lasts, then the table, the figures and the page from its files."""

from .evaluation import evaluation_table, is_evaluation, read_evaluation, write_evaluation
from .log import TrainLog
from .report import link_from_run, write_html, write_plots
from .results import read_frequencies, read_log, read_results
from .table import final_table
from .trackers import Trackers, open_trackers

__all__ = [
    "Trackers",
    "TrainLog",
    "evaluation_table",
    "final_table",
    "is_evaluation",
    "link_from_run",
    "open_trackers",
    "read_evaluation",
    "read_frequencies",
    "read_log",
    "read_results",
    "write_evaluation",
    "write_html",
    "write_plots",
]
