"""How the native CPU backend is built and found: nothing is compiled unasked, and no failure is more than a line."""

import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from gemmascope.kernels.cpu import build as native_build
from gemmascope.kernels.cpu import inference

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
    monkeypatch.setattr(inference, "register_fakes", lambda: None)
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
    assert native_build.problem() is None
    assert built == [True]


@pytest.mark.parametrize("made_from", ["torch 2.1, sources 0123456789ab", None, "these"])
def test_asked_for_where_the_installed_one_cannot_be_used(fresh, monkeypatch, made_from):
    """Stale, of unknown origin, or damaged: who asks for a build gets one, and needs no Makefile for it."""
    built = []
    monkeypatch.setattr(native_build, "build", lambda: built.append(True))
    monkeypatch.setenv("GEMMASCOPE_NATIVE", "1")
    (fresh / "_csrc.so").write_bytes(b"not a library")
    if made_from:
        (fresh / "_csrc_stamp.txt").write_text(native_build.stamp() if made_from == "these" else made_from)
    assert native_build.problem() is None
    assert built == [True]


def test_what_a_killed_build_left_is_no_lock(monkeypatch, tmp_path):
    """PyTorch waits for the file that its build makes and removes, for ever when a kill came between."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    found = []

    def load(name, *_, **__):
        folder = Path(cpp_extension._get_build_directory(name, False))
        found.append((folder / "lock").exists())
        (folder / "lock").write_bytes(b"")

    monkeypatch.setattr(cpp_extension, "load", load)
    assert native_build.build() == native_build.build()
    assert found == [False, False]


def test_who_waits_for_a_build_says_so_and_takes_over_when_its_owner_dies(tmp_path, capsys):
    code = (
        "import fcntl, sys; file = open('owner', 'a+'); fcntl.flock(file, fcntl.LOCK_EX);"
        "file.write('process 7'); file.flush(); print('held', flush=True); sys.stdin.read()"
    )
    held = threading.Event()

    def wait_for_it():
        with native_build._alone_in(tmp_path):
            held.set()

    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, **pipes) as owner:
        assert owner.stdout.readline() == b"held\n"
        waiting = threading.Thread(target=wait_for_it)
        waiting.start()
        said, deadline = "", time.monotonic() + 60
        while not said and time.monotonic() < deadline:
            said = capsys.readouterr().err
            time.sleep(0.01)
        assert said == f"gemmascope: waiting for process 7 to build the native CPU backend in {tmp_path}\n"
        assert not held.is_set()
        owner.kill()
        assert held.wait(60)
        waiting.join()
    assert (tmp_path / "owner").read_text() == f"process {os.getpid()}\n"


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
    assert "error: #error broken on purpose" in said[0]
    assert "-c " in done.stdout + done.stderr, "what the compiler was asked is not shown"
    (wheel,) = tmp_path.glob("gemmascope-*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        reason = file.read("gemmascope/kernels/cpu/_csrc_failure.txt").decode()
    assert reason.strip() == said[0].partition("could not be built: ")[2].strip()
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
    operators = {"arguments.cpp", "dense.cpp", "dispatch.cpp", "encode.cpp", "register.cpp", "sums.cpp", "topk.cpp"}
    operators |= {"update.cpp"}
    assert names == operators | {"isa_avx2.cpp", "isa_avx512.cpp", "isa_avx512vnni.cpp", "isa_portable.cpp"}
