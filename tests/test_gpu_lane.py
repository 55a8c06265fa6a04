"""The lane of a GPU machine, `pytest -m gpu`: what it selects where there is a GPU, and that it needs no extras.

In a process that believes in a GPU and has only what a bare machine has.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ABSENT = ("pytest_timeout", "hypothesis", "matplotlib", "xdist", "transformers", "huggingface_hub", "typer", "rich")
PLUGIN = f"""
import sys
import torch
torch.cuda.is_available = lambda: True
sys.modules.update(dict.fromkeys({ABSENT!r}))  # importing them raises ModuleNotFoundError
"""
KERNELS = ("decode", "dense", "encode", "entries", "jumprelu", "latents", "residual", "selection", "topk", "update")
KINDS = ("gated", "relu", "topk", "transcoder")
FILES = [
    *(f"tests/kernels/test_{name}.py" for name in KERNELS),
    "tests/kernels/test_native.py",  # needs hypothesis
    "tests/bench/test_report.py",  # needs matplotlib
    "tests/training/test_step.py",
    "tests/training/test_sparse_loss.py",
    *(f"tests/training/test_{kind}.py" for kind in KINDS),
]


@pytest.fixture(scope="module")
def collected(tmp_path_factory) -> list[str]:
    """The lines of a collection of `FILES` on a bare machine with a GPU."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "bare_gpu_machine.py").write_text(PLUGIN, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(folder), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "bare_gpu_machine", "-p", "no:cacheprovider", "--collect-only"]
    done = subprocess.run(
        [*command, "-m", "gpu", *FILES], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout.splitlines()


def test_says_first_what_it_leaves_out(collected):
    assert collected[0].startswith("GPU lane: left out, for want of pytest_timeout, hypothesis, matplotlib, ")


@pytest.mark.parametrize("name", KERNELS)
def test_unit_tests_of_every_kernel_are_selected(collected, name):
    found = [line for line in collected if line.startswith(f"tests/kernels/test_{name}.py::")]
    assert any("::test_full_shapes" not in line and "shipped_tiles" not in line for line in found)
    assert len(found) > 10, "and not only a few of them"


def test_steps_are_selected(collected):
    assert any(line.startswith("tests/training/test_step.py::test_full_shapes") for line in collected)
    assert any("test_step.py" in line and "triton" in line for line in collected)
    assert any(line.startswith("tests/training/test_sparse_loss.py::") for line in collected)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_every_kind_are_selected(collected, kind):
    assert any(line.startswith(f"tests/training/test_{kind}.py::") for line in collected)


def test_a_folder_named_gpu_marks_nothing(request):
    """Names of folders are keywords of a test, not marks; they once skipped every test of a checkout named so."""
    assert request.node.get_closest_marker("gpu") is None
