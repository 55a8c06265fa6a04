"""Gemma Scope's studies of SAEs: what each measures, its rows, its figure and what follows, one study a file."""

from .common import COLUMNS, Finding, Listed, Study, Work, csv_of
from .registry import STUDIES

__all__ = ["COLUMNS", "STUDIES", "Finding", "Listed", "Study", "Work", "csv_of"]
