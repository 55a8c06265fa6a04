"""The tests under other defaults of PyTorch: ``pytest --default-dtype bfloat16 --default-device meta``.

Nothing in the package may depend on them, so every test must pass under any. They hold for what the package asks of
PyTorch, the conversions of its integers included. The tests' own tensors, and those of libraries that they or the
package call, are made as ever: who asks is the nearest caller that is not PyTorch's own code.
"""

import contextlib
import functools
import importlib
import sys
import warnings

import pytest
import torch
from torch import overrides
from torch.utils import _device

ORDINARY_DTYPE = torch.get_default_dtype()
TRANSPARENT = ("torch", "tests.conftest", "tests.defaults", "contextlib", "functools")
# Those whose results depend on a default; read before any is replaced, since PyTorch goes by identity.
FACTORIES = [function for function in _device._device_constructors() if hasattr(torch, function.__name__)]


def add_options(parser) -> None:
    group = parser.getgroup("gemmascope")
    group.addoption("--default-dtype", help="PyTorch's default dtype for what the package makes, e.g. bfloat16")
    group.addoption("--default-device", help="PyTorch's default device for what the package makes, e.g. meta")


def skip_what_compiles(config, items) -> None:
    """And what sets other defaults itself. A compiler cannot trace who asks for a tensor."""
    if config.getoption("--default-dtype") is None and config.getoption("--default-device") is None:
        return
    for item in items:
        if item.path.stem in ("test_compile", "test_compiled"):
            item.add_marker(pytest.mark.skip(reason="under other defaults nothing is compiled"))
        if "depends_on_no_default" in item.name:
            item.add_marker(pytest.mark.skip(reason="sets defaults of its own"))


def _package_asks() -> bool:
    frame = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] not in TRANSPARENT and module not in TRANSPARENT:
            return module.startswith("gemmascope")
        frame = frame.f_back
    return False


@contextlib.contextmanager
def _ordinary():
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(ORDINARY_DTYPE)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def _depth() -> int:
    """How many ``with torch.device(...)`` there are around the caller."""
    return len(overrides._get_current_function_mode_stack())


def _for_the_package_alone(factory, depth: int):
    @functools.wraps(factory)
    def wrapped(*args, **kwargs):
        # Within a device that somebody chose since, as transformers chooses meta to load a model, the defaults are his.
        if _depth() > depth or _package_asks():
            return factory(*args, **kwargs)
        with _ordinary():
            return factory(*args, **kwargs)

    return wrapped


@pytest.fixture(autouse=True)
def changed_defaults(request, monkeypatch):
    """The defaults that the command line asks for."""
    dtype, device = request.config.getoption("--default-dtype"), request.config.getoption("--default-device")
    if dtype is None and device is None:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Scripts its own calls of factories, which it must find unchanged.
        importlib.import_module("torch._decomp.decompositions_for_jvp")
    depth = _depth() + 1
    for factory in FACTORIES:
        monkeypatch.setattr(torch, factory.__name__, _for_the_package_alone(factory, depth))
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype or "float32"))
    try:
        with torch.device(device or "cpu"):
            yield
    finally:
        torch.set_default_dtype(before)
