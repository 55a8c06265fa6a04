"""One model and one text for all tests of whole runs."""

import warnings
from pathlib import Path

import pytest
import torch

from gemmascope.suite import measure
from gemmascope.suite.run import train_suite
from tests.suite.small_runs import config, write_model, write_text
from tests.suite.worker import Worker


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


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, model_folder, text_file) -> Path:
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train_suite(config(model_folder, text_file, out))
    return out


@pytest.fixture(scope="session")
def worker():
    found = Worker()
    yield found
    found.close()


@pytest.fixture
def another_thread():
    """PyTorch has one more: how that is said."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    yield f"threads: that there has {threads}, this process {threads + 1}"
    torch.set_num_threads(threads)
