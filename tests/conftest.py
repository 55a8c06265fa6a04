"""Test set-up: one BLAS thread, Triton's interpreter where there is no GPU, and two safety nets for every test.

``pytest -m gpu`` is the lane of a GPU machine: the tests marked so, and where there is a GPU every test that takes the
fixture `device`. It needs pytest, numpy, safetensors, torch and Triton; modules that need more are left out, as its
first line says.

* Memory that `gemmascope.kernels` allocates without initialising is filled with NaN (integers: a garbage pattern), so
  that an element nobody writes, or a read before the write, fails a comparison.
* Interpreted launches run under `tests.sanitizer`: repaired bf16, bounds and race checks.
"""

import importlib.util
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the interpreter's small numpy products are 18 times faster so

import pytest
import torch

from tests import defaults
from tests.defaults import changed_defaults  # noqa: F401

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, hence before anything imports it

# Tests of 64-bit offsets allocate address space they never touch; filling it would commit it.
LARGEST_POISONED_ON_CPU = 256 * 2**20


if importlib.util.find_spec("hypothesis") is not None:
    import hypothesis

    # The same examples in every run: a failure is that of a change. HYPOTHESIS_RANDOM=1 looks for new ones.
    hypothesis.settings.register_profile("same", derandomize="HYPOTHESIS_RANDOM" not in os.environ)
    hypothesis.settings.load_profile("same")

# What some tests need that a GPU machine with torch, Triton and pytest may not have.
EXTRAS = ("hypothesis", "matplotlib", "transformers", "tokenizers", "huggingface_hub", "typer", "rich")


def is_gpu_lane(config) -> bool:
    return config.getoption("markexpr") == "gpu"


def pytest_addoption(parser):
    defaults.add_options(parser)
    if importlib.util.find_spec("pytest_timeout") is None:
        parser.addini("timeout", "of pytest-timeout, which is not installed")


def pytest_configure(config):
    # What nohup or a shell's background job ignores would be ignored by the tests of signals too.
    for name in {"SIGINT", "SIGTERM", "SIGHUP"} & set(dir(signal)):
        number = getattr(signal, name)
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)


def pytest_sessionstart(session):
    if not is_gpu_lane(session.config):
        return
    missing = [name for name in ("pytest_timeout", *EXTRAS) if importlib.util.find_spec(name) is None]
    left_out = f"left out, for want of {', '.join(missing)}: what needs it" if missing else "nothing is left out"
    session.config.get_terminal_writer().line(f"GPU lane: {left_out}")


class _ModuleOfTheLane(pytest.Module):
    """A module whose import fails for want of an extra is skipped, not an error."""

    def _getobj(self):
        try:
            return super()._getobj()
        except self.CollectError as error:
            cause = error.__cause__
            name = (cause.name or "").split(".")[0] if isinstance(cause, ModuleNotFoundError) else ""
            if name not in EXTRAS:
                raise
            pytest.skip(f"needs {name}", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent):
    return _ModuleOfTheLane.from_parent(parent, path=module_path) if is_gpu_lane(parent.config) else None


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config, items):
    defaults.skip_what_compiles(config, items)
    if torch.cuda.is_available():
        for item in items:
            if "device" in getattr(item, "fixturenames", ()):
                item.add_marker("gpu")
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    if type(tensor) is not torch.Tensor:  # a fake tensor of torch.compile holds nothing
        return tensor
    if tensor.device.type == "cpu" and tensor.nbytes > LARGEST_POISONED_ON_CPU:
        return tensor
    if tensor.is_floating_point():
        return tensor.fill_(torch.nan)
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    return tensor.fill_(0x5A5A5A5A5A5A5A5A & torch.iinfo(tensor.dtype).max)


def _poisoned(allocate):
    def wrapped(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return poison(tensor) if caller.startswith("gemmascope.kernels") else tensor

    return wrapped


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch, changed_defaults):  # noqa: F811
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def sanitized_interpreter():
    """Yields the `Report` of every interpreted launch of the test, or None where kernels are not interpreted."""
    from gemmascope.kernels.dispatch import interpreting

    if not interpreting() or importlib.util.find_spec("triton") is None:
        yield None
        return
    from tests.kernels import sanitizer

    with sanitizer.sanitize() as report:
        yield report


@pytest.fixture
def device() -> torch.device:
    """Where the Triton kernels run: on the GPU, or on the CPU under the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
