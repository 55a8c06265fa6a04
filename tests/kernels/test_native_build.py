"""How the native CPU backend is built and found: nothing is compiled unasked, and no failure is more than a line."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from gemmascope.kernels.cpu import build as native_build

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a new process, with nothing installed."""
    monkeypatch.setattr(native_build, "_state", {})
    monkeypatch.setattr(native_build, "installed_library", lambda: tmp_path / "_csrc.so")
    monkeypatch.delenv("GEMMASCOPE_NATIVE", raising=False)
    monkeypatch.setattr(native_build, "build", lambda: pytest.fail("compiled unasked"))
    return tmp_path


def test_nothing_is_compiled_unasked(fresh):
    assert native_build.problem() == f"the native backend is not built ({native_build.HOW_TO_BUILD})"


def test_is_asked_once(fresh, monkeypatch):
    first = native_build.problem()
    monkeypatch.setenv("GEMMASCOPE_NATIVE", "1")
    assert native_build.problem() is first


@pytest.mark.parametrize("wish", ["0", "off", "False"])
def test_can_be_turned_off(fresh, monkeypatch, wish):
    monkeypatch.setenv("GEMMASCOPE_NATIVE", wish)
    (fresh / "_csrc.so").write_bytes(b"")
    assert native_build.problem() == f"GEMMASCOPE_NATIVE={wish.lower()} turns the native backend off"


@pytest.mark.parametrize("made_from", ["torch 2.1, sources 0123456789ab", None])
def test_a_library_from_other_sources_or_for_another_pytorch_is_not_loaded(fresh, made_from):
    (fresh / "_csrc.so").write_bytes(b"")
    if made_from:
        (fresh / "_csrc_stamp.txt").write_text(made_from + "\n")
    expected = (
        f"the native backend was built from {made_from or 'nothing known'}, not {native_build.stamp()}: build it again"
    )
    assert native_build.problem() == f"{expected} ({native_build.HOW_TO_BUILD})"


def test_a_damaged_library_is_one_line(fresh):
    (fresh / "_csrc.so").write_bytes(b"not a library")
    (fresh / "_csrc_stamp.txt").write_text(native_build.stamp())
    problem = native_build.problem()
    assert problem.startswith("the native backend does not load: ")
    assert "\n" not in problem


def test_asked_for_at_first_use(fresh, monkeypatch):
    built = []
    monkeypatch.setattr(native_build, "build", lambda: built.append(True))
    monkeypatch.setenv("GEMMASCOPE_NATIVE", "1")
    if not hasattr(torch.ops.gemmascope_cpu, "isas"):
        pytest.skip("needs the operators")
    assert native_build.problem() is None
    assert built == [True]


def run(arguments, tmp_path, **env):
    inherited = {name: value for name, value in os.environ.items() if name != "GEMMASCOPE_NATIVE"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        env=inherited | env,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@needs_compiler
def test_a_build_that_fails_at_first_use_is_one_line(tmp_path):
    """With a compiler that is none, `auto` goes on without and an explicit request says why."""
    code = (
        "import torch\n"
        "from gemmascope.kernels import choose\n"
        "from gemmascope.kernels.cpu import build\n"
        "from pathlib import Path\n"
        "build.installed_library = lambda: Path('absent')\n"
        "print(choose('auto', 'cpu', torch.float32))\n"
        "try: choose('cpu', 'cpu', torch.float32)\n"
        "except ValueError as error: print(error)\n"
    )
    env = {"GEMMASCOPE_NATIVE": "1", "CXX": "false", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    done = run(["-c", code], tmp_path, **env)
    assert done.returncode == 0, done.stderr
    auto, explicit = done.stdout.splitlines()[-2:]
    assert "Choice(impl='pytorch', reason=" in auto
    assert "the native CPU backend could not be built" in auto
    assert explicit.startswith("impl='cpu': the native CPU backend could not be built: ")


def copy_of_the_tree(tmp_path):
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns(".git", ".venv*", "runs", "build", "*.egg-info", "__pycache__", "_csrc*")
    shutil.copytree(ROOT, tree, ignore=ignored)
    return tree


@needs_compiler
def test_an_installation_whose_build_fails_goes_on_without(tmp_path):
    tree = copy_of_the_tree(tmp_path)
    (tree / "kernels" / "cpu" / "csrc" / "arguments.cpp").write_text("#error broken on purpose\n")
    command = ["-m", "pip", "wheel", "-v", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(tmp_path), "."]
    done = run(command, tree, GEMMASCOPE_NATIVE="1", MAX_JOBS="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    said = [line for line in (done.stdout + done.stderr).splitlines() if "could not be built" in line]
    assert len(said) == 1
    (wheel,) = tmp_path.glob("gemmascope-*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    assert "gemmascope/kernels/cpu/_csrc_failure.txt" in names
    assert not [name for name in names if name.endswith(".so")]


def test_why_an_installation_is_without_is_remembered(fresh, monkeypatch):
    """Whatever the locale: the record is UTF-8, and damage to it is no reason to fail."""
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "ascii")
    (fresh / "_csrc_failure.txt").write_bytes("error: »größer« ".encode() + b"\xff\n")
    expected = "the native backend could not be built when installed: error: »größer« \ufffd"
    assert native_build.problem() == f"{expected} ({native_build.HOW_TO_BUILD})"


def test_an_installation_without_torch_at_hand_says_what_to_add(tmp_path):
    tree = copy_of_the_tree(tmp_path)
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '--version']; exec(open('setup.py').read())"
    )
    done = run(["-c", code], tree, GEMMASCOPE_NATIVE="1")
    assert done.returncode == 0, done.stderr
    assert "no torch to build the native CPU backend with; add --no-build-isolation" in done.stderr


def test_sources_travel_with_the_wheel():
    names = {Path(path).name for path in native_build.sources()}
    operators = {"arguments.cpp", "dense.cpp", "dispatch.cpp", "encode.cpp", "register.cpp", "sums.cpp", "update.cpp"}
    assert names == operators | {"isa_avx2.cpp", "isa_avx512.cpp", "isa_avx512vnni.cpp", "isa_portable.cpp"}
