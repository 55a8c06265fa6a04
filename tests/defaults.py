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
    """A compiler cannot trace who asks for a tensor."""
    if config.getoption("--default-dtype") is None and config.getoption("--default-device") is None:
        return
    for item in items:
        if item.path.stem in ("test_compile", "test_compiled"):
            item.add_marker(pytest.mark.skip(reason="under other defaults nothing is compiled"))


def _package_asks() -> bool:
    frame = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] not in TRANSPARENT and module not in TRANSPARENT:
            return module.startswith("gemmascope")
        frame = frame.f_back
    return False


_contexts = 0


def _is_overridden() -> bool:
    """Whether somebody has entered a default device since, as transformers does to load a model."""
    return torch._C._len_torch_function_stack() > _contexts > 0


@contextlib.contextmanager
def _ordinary():
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(ORDINARY_DTYPE)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def _for_the_package_alone(factory):
    @functools.wraps(factory)
    def wrapped(*args, **kwargs):
        if _package_asks() or _is_overridden():
            return factory(*args, **kwargs)
        with _ordinary():
            return factory(*args, **kwargs)

    return wrapped


@pytest.fixture(autouse=True)
def changed_defaults(request, monkeypatch):
    """The defaults that the command line asks for."""
    global _contexts
    dtype, device = request.config.getoption("--default-dtype"), request.config.getoption("--default-device")
    if dtype is None and device is None:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Scripts its own calls of factories, which it must find unchanged.
        importlib.import_module("torch._decomp.decompositions_for_jvp")
    for factory in FACTORIES:
        monkeypatch.setattr(torch, factory.__name__, _for_the_package_alone(factory))
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype or "float32"))
    try:
        with torch.device(device or "cpu"):
            _contexts = torch._C._len_torch_function_stack()
            yield
    finally:
        _contexts = 0
        torch.set_default_dtype(before)
