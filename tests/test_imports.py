"""What importing does and does not do, each in a fresh process."""

import os
import subprocess
import sys

import pytest

OPTIONAL = ("triton", "transformers", "tokenizers", "datasets", "matplotlib", "huggingface_hub", "typer", "rich")

# Importing a blocked name raises ImportError, and `importlib.util.find_spec` does not find it, as if it were missing.
BLOCK = f"""
import importlib.util, sys
for name in {OPTIONAL}:
    sys.modules[name] = None
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in {OPTIONAL} else find_spec(name, *rest)
"""

USE_KERNELS = """
import torch
from gemmascope import kernels
x, W, zero = torch.ones(2, 3), torch.ones(3, 4), torch.zeros(4)
pre = (x @ W).requires_grad_()
kernels.jumprelu(pre, zero, zero + 0.5).f.sum().backward()
code = kernels.encode(x, W, zero, zero + 0.5)
assert kernels.decode(code, W.T.contiguous(), torch.zeros(3)).shape == (2, 3)
assert kernels.choose("auto", "cuda", torch.float32).impl == "pytorch"
"""


def python(source: str, cwd, **env: str) -> subprocess.CompletedProcess:
    inherited = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", source], cwd=cwd, env=inherited | env, capture_output=True, text=True
    )


def check(source: str, cwd, **env: str) -> str:
    done = python(source, cwd, **env)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_kernels_work_without_optional_packages(tmp_path):
    check(BLOCK + USE_KERNELS, tmp_path)


def test_package_imports_without_optional_packages(tmp_path):
    check(BLOCK + "import gemmascope; [getattr(gemmascope, name) for name in gemmascope.__all__]", tmp_path)


def test_blocking_is_effective(tmp_path):
    done = python(BLOCK + "import triton", tmp_path)
    assert done.returncode != 0
    assert "import of triton halted" in done.stderr


@pytest.mark.parametrize("module", ["gemmascope", "gemmascope.kernels"])
def test_import_does_no_work(module, tmp_path):
    """No Triton, no optional package, no device query, no change to the environment or to the logging set-up."""
    check(
        f"""
import logging, os, sys, torch
environment, handlers, threads = dict(os.environ), list(logging.root.handlers), torch.get_num_threads()
torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = None
import {module}
assert dict(os.environ) == environment
assert logging.root.handlers == handlers and torch.get_num_threads() == threads
assert not torch.cuda.is_initialized()
loaded = [name for name in {OPTIONAL} if name in sys.modules]
assert not loaded, loaded
""",
        tmp_path,
    )


def test_importing_operator_files_does_not_hide_the_public_functions(tmp_path):
    pytest.importorskip("triton")
    check(
        """
from gemmascope import kernels
from gemmascope.kernels.implementations import operator
operator("decode_forward", "triton"), operator("update_from_entries", "triton")
for name in ("jumprelu", "encode", "decode", "encode_entries", "dense_encode"):
    assert callable(getattr(kernels, name)), name
""",
        tmp_path,
        TRITON_INTERPRET="1",
    )


def test_top_level_name_kernels_is_not_ours(tmp_path):
    """transformers imports a foreign package of that name, which ours must not shadow."""
    source = """
import importlib.util, gemmascope.kernels
spec = importlib.util.find_spec("kernels")
print(spec.origin if spec else "absent")
assert not spec or spec.origin != gemmascope.kernels.__file__
"""
    check(source, tmp_path)


def test_no_module_hides_a_public_name(tmp_path):
    """Importing `activations.harvest`, a module, must leave `activations.harvest`, the function, where it was."""
    for package in ("typer", "rich", "matplotlib"):
        pytest.importorskip(package)
    check(
        """
import pkgutil, sys, types, gemmascope
for module in pkgutil.walk_packages(gemmascope.__path__, "gemmascope."):
    __import__(module.name)
for package in [module for name, module in sys.modules.items() if name.startswith("gemmascope")]:
    for name in getattr(package, "__all__", ()):
        assert not isinstance(getattr(package, name), types.ModuleType), (package, name)
assert "gemmascope.activations.harvest" in sys.modules
""",
        tmp_path,
    )
