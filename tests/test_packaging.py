"""The wheel, the pins and the Makefile, without a network."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAKE = shutil.which("make")


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = (line.partition(";")[0].strip() for line in lines if line.strip() and not line.startswith("#"))
    return dict(line.split("==") for line in found)


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built offline from a copy of what git knows, so that stray files cannot slip in or be left behind."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    ignored = shutil.ignore_patterns(".git", ".venv*", "runs", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=ignored)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "-w",
        folder,
        tree,
    ]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_every_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
    expected = set()
    for root, target in ((ROOT / "gemmascope", "gemmascope"), (ROOT / "kernels", "gemmascope/kernels")):
        expected.add(f"{target}/py.typed")
        for package in (path.parent for path in root.rglob("__init__.py")):
            data = (path for folder in ("csrc", "web") for path in package.glob(f"{folder}/*") if path.is_file())
            files = [*package.glob("*.py"), *data]
            expected |= {f"{target}/{path.relative_to(root).as_posix()}" for path in files}
    assert names == expected
    assert {"gemmascope/sites/attach.py", "gemmascope/kernels/api.py"} <= names
    assert any(name.endswith(".cpp") for name in names)
    assert {"gemmascope/reporting/web/site.js", "gemmascope/reporting/web/site.css"} <= names


def test_every_module_lies_in_a_package():
    """Else it would run from here and be missing from the wheel."""
    for root in (ROOT / "gemmascope", ROOT / "kernels"):
        for path in root.rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), path


def test_wheel_runs_from_another_folder_and_hides_no_other_kernels_package(wheel, tmp_path):
    code = (
        "import importlib.util, sys, gemmascope, gemmascope.kernels as kernels\n"
        "from gemmascope.kernels import encode, decode, jumprelu\n"
        "assert '.whl' in gemmascope.__file__ and '.whl' in kernels.__file__, kernels.__file__\n"
        "spec = importlib.util.find_spec('kernels')\n"
        "assert spec is None or 'gemmascope' not in str(spec.origin), spec\n"
        "print(gemmascope.__version__)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(wheel)!r})\n{code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (run.stdout, run.stderr) == (f"{project()['version']}\n", "")


def test_wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as file:
        (metadata,) = (file.read(name).decode() for name in file.namelist() if name.endswith("/METADATA"))
        (entry_points,) = (file.read(name).decode() for name in file.namelist() if name.endswith("/entry_points.txt"))
    assert "Requires-Python: >=3.11" in metadata
    assert "gemmascope = gemmascope.__main__:main" in entry_points
    core = {line.split(">")[0] for line in re.findall(r"^Requires-Dist: ([^;\n]+)$", metadata, re.MULTILINE)}
    assert core == {"torch", "numpy", "safetensors"}


def test_version_is_the_same_everywhere():
    import gemmascope

    assert gemmascope.__version__ == project()["version"]


def test_everything_declared_is_pinned_within_its_bounds():
    from packaging.requirements import Requirement

    pinned = {canonical(name): version for name, version in pins().items()}
    extras = project()["optional-dependencies"]
    declared = [*project()["dependencies"], *extras["train"], *extras["test"]]
    for requirement in map(Requirement, declared):
        assert canonical(requirement.name) in pinned
        assert requirement.specifier.contains(pinned[canonical(requirement.name)]), requirement
    assert pinned["torch"] == "2.13.0"


def test_pins_are_closed_under_their_own_requirements():
    """`make` installs the pins with --no-deps: whatever they need must be pinned too, in a version they accept."""
    import importlib.metadata

    from packaging.requirements import Requirement

    pinned = {canonical(name): version for name, version in pins().items()}
    for name, version in pinned.items():
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if distribution.version.partition("+")[0] != version:
            continue
        for requirement in map(Requirement, distribution.requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                needed = canonical(requirement.name)
                if name == "torch" and needed not in pinned:
                    continue  # a CUDA build's own libraries come with torch itself
                assert needed in pinned, f"{name} needs {requirement}"
                assert requirement.specifier.contains(pinned[needed]) or needed == "triton", f"{name}: {requirement}"


def test_no_registry_is_named():
    for name in ("Makefile", "constraints.txt", "pyproject.toml", "setup.py", ".ci/run"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"https?://|--(extra-)?index-url|--find-links|pypi", text, re.IGNORECASE), name


def test_ci_script_runs_what_the_readme_says():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    text = script.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text
    assert text.index("make lint") < text.index("make test")


def make(*arguments, folder=ROOT):
    return subprocess.run([MAKE, *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def clone(tmp_path):
    for name in ("Makefile", "constraints.txt", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


needs_make = pytest.mark.skipif(MAKE is None, reason="make is not installed")


@needs_make
@pytest.mark.parametrize("target", ["demo", "test", "lint", "aot"])
def test_first_run_installs_torch_first_and_the_second_nothing(clone, target):
    steps = make("-n", target, folder=clone).stdout
    installs = re.findall(r"pip install (.*)", steps)
    assert "-c .venv/constraints.txt torch" in installs[0]
    assert all("--no-deps" in install for install in installs[1:])
    assert all("--only-binary :all:" in install for install in installs[:-1])
    assert "--no-build-isolation -e ." in installs[-1]
    (clone / ".venv").mkdir()
    (clone / ".venv" / ".installed").touch()
    assert "pip" not in make("-n", target, folder=clone).stdout


@needs_make
@pytest.mark.parametrize("changed", ["constraints.txt", "pyproject.toml", "setup.py"])
def test_a_change_of_the_pins_installs_again(clone, changed):
    import os

    (clone / "env").mkdir()
    stamp = clone / "env" / ".installed"
    stamp.touch()
    assert make("-q", "install", "VENV=env", folder=clone).returncode == 0
    later = stamp.stat().st_mtime + 5
    os.utime(clone / changed, (later, later))
    assert make("-q", "install", "VENV=env", folder=clone).returncode == 1


@needs_make
def test_triton36_environment_differs_in_triton_alone(clone):
    assert "triton==3.6.0" not in make("-n", "test", folder=clone).stdout
    steps = make("-n", "test-triton36", folder=clone).stdout
    assert ".venv-triton36" in steps
    assert re.search(r"pip install .*--no-deps triton==3\.6\.0", steps)


@needs_make
def test_torch211_environment_has_that_torch_and_what_it_needs(clone):
    steps = make("-n", "test-torch211", folder=clone).stdout
    assert re.search(r"pip install .*-c .venv-torch211/constraints.txt torch==2\.11\.0 'setuptools>=77'", steps)
    assert "grep -vE '^(triton|torch|setuptools)==' constraints.txt > .venv-torch211/constraints.txt" in steps
    assert re.search(r"pip install .*--no-deps triton==3\.6\.0", steps)
    assert "OMP_NUM_THREADS=1 .venv-torch211/bin/python -m pytest" in steps


@needs_make
def test_too_old_python_is_one_clear_line(clone):
    old = clone / "old-python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.10.9" && exit 0\nexit 1\n')
    old.chmod(0o755)
    result = make("demo", f"PYTHON={old}", folder=clone)
    assert result.returncode == 2
    assert result.stderr.splitlines()[0] == (
        f"gemmascope needs Python 3.11 or newer, set PYTHON=; {old} is: Python 3.10.9"
    )
    assert not (clone / ".venv").exists()


@needs_make
def test_gpu_tests_use_the_given_python_and_install_nothing(clone):
    steps = make("-n", "test-gpu", "PYTHON=/opt/some/python", folder=clone).stdout
    assert "/opt/some/python -m pytest -m gpu" in steps
    assert "pip install -e . --no-deps" in steps, "named in the message"
    assert not re.search(r"^\S*python -m pip", steps, re.MULTILINE)
    (clone / ".venv" / "bin").mkdir(parents=True)
    (clone / ".venv" / "bin" / "python").touch()
    assert ".venv/bin/python -m pytest -m gpu" in make("-n", "test-gpu", folder=clone).stdout
    assert "/opt/x -m pytest -m gpu" in make("-n", "test-gpu", "PYTHON=/opt/x", folder=clone).stdout


@needs_make
def test_gpu_tests_without_a_gpu_say_so(clone):
    result = make("test-gpu", "PYTHON=false", folder=clone)
    assert result.returncode == 2
    assert "false needs a GPU that torch sees" in result.stderr
