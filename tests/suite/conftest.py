"""One model and one text for all tests of whole runs."""

from pathlib import Path

import pytest

from gemmascope.suite import measure
from tests.suite.small_runs import write_model, write_text


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny-gemma")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "documents.jsonl")


@pytest.fixture(autouse=True)
def no_long_measurement(monkeypatch):
    """What a plan measures is measured once."""
    monkeypatch.setattr(measure, "BUDGET", 0.0)
