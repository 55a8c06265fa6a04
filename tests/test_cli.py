"""The command line: what each command does, and one line and an exit code for every failure."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import gemmascope.demo
from gemmascope.__main__ import main
from gemmascope.errors import BadFileError, EnvironmentProblemError, TrainingFailedError
from gemmascope.kernels.cpu import build as native_build
from tests.reporting.test_report import make_results, write_run


@dataclass(frozen=True)
class DemoConfig:
    out: Path = Path("runs/demo")
    text: tuple[Path, ...] = ()
    fast: bool = False
    seed: int = 0
    fresh: bool = False
    impl: str = "auto"


@pytest.fixture
def demo(monkeypatch):
    """A stand-in for gemmascope.demo.run; ``demo.run`` may be replaced."""

    def run(config):
        module.config = config
        write_run(config.out, results := make_results())
        return results

    module = types.ModuleType("gemmascope.demo.run")
    module.DemoConfig, module.run = DemoConfig, run
    monkeypatch.setitem(sys.modules, "gemmascope.demo.run", module)
    monkeypatch.setattr(gemmascope.demo, "run", module, raising=False)
    return module


def run_python(code, *arguments, **options):
    environment = {**os.environ, "COLUMNS": "100"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment, **options)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr() == (f"gemmascope {gemmascope.__version__}\n", "")


def test_no_command_shows_the_commands(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("demo", "report", "info"))


@pytest.mark.parametrize("command", ["demo", "report", "info"])
def test_help_of_every_command(command, capsys):
    assert main([command, "--help"]) == 0
    assert "--debug" in capsys.readouterr().out


def test_demo_passes_its_options_on_and_shows_the_results(demo, tmp_path, capsys):
    out, text = tmp_path / "run", [tmp_path / "a.txt", tmp_path / "b.txt"]
    options = ["--out", str(out), "--text", str(text[0]), "--text", str(text[1]), "--fast", "--seed", "7", "--fresh"]
    assert main(["demo", *options]) == 0
    assert demo.config == DemoConfig(out, tuple(text), fast=True, seed=7, fresh=True)
    shown = capsys.readouterr().out
    assert "12 of 12 SAEs beat PCA" in shown
    assert str(out / "report.html") in shown
    assert max(map(len, (line for line in shown.splitlines() if str(out) not in line))) <= 100


def test_a_demo_that_was_stopped_has_nothing_to_show(demo, capsys):
    demo.run = lambda config: None
    assert main(["demo"]) == 0
    assert capsys.readouterr().out == ""


def test_demo_defaults(demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gemmascope.commands.train.present", lambda run, results: None)
    assert main(["demo"]) == 0
    assert demo.config == DemoConfig()


def test_options_are_those_of_the_real_demo():
    from gemmascope.demo.run import DemoConfig as Real

    assert Real() == Real(out=Path("runs/demo"), text=(), fast=False, seed=0, fresh=False)


def test_report_makes_everything_again(tmp_path, capsys):
    write_run(tmp_path, make_results())
    assert main(["report", str(tmp_path)]) == 0
    assert "12 of 12" in capsys.readouterr().out
    assert (tmp_path / "report.html").is_file()
    assert len(list((tmp_path / "plots").glob("*.png"))) == 4


def test_info_names_versions_devices_and_every_choice(capsys):
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    for package in ("python", "torch", "triton", "transformers", "numpy", "safetensors"):
        assert any(line.startswith(package) for line in shown.splitlines())
    assert torch.__version__.partition("+")[0] in shown  # a build of CUDA says so in the one place and not in the other
    assert "GiB" in shown
    rows = [line.split() for line in shown.partition("impl='auto'")[2].splitlines() if line.startswith(("cpu", "cuda"))]
    chosen = {(row[0], row[1]): row[2] for row in rows}
    for dtype in ("float16", "float64"):
        assert chosen["cpu", dtype] == "pytorch"
    for dtype in ("float32", "bfloat16"):
        assert chosen["cpu", dtype] == ("pytorch" if native_build.problem() else "cpu")
    for index in range(torch.cuda.device_count()):
        assert chosen[f"cuda:{index}", "bfloat16"] == "triton"


def test_info_says_what_is_not_installed(capsys, monkeypatch):
    from gemmascope.commands import info

    monkeypatch.setattr(info, "PACKAGES", ("a-package-nobody-has",))
    assert main(["info"]) == 0
    assert "a-package-nobody-has  not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        pytest.param(ValueError("seed: expected 0, got 1"), 2, "seed: expected 0, got 1", id="value"),
        pytest.param(TypeError("x: expected an int"), 2, "x: expected an int", id="type"),
        pytest.param(BadFileError("a.npz: cut\nshort"), 3, "a.npz: cut short", id="file"),
        pytest.param(EnvironmentProblemError("no space"), 4, "no space", id="environment"),
        pytest.param(PermissionError(13, "Permission denied", "/x"), 4, "/x: Permission denied", id="permission"),
        pytest.param(OSError(28, "No space left on device"), 4, "No space left on device", id="full"),
        pytest.param(MemoryError(), 4, "MemoryError", id="memory"),
        pytest.param(TrainingFailedError("loss is NaN"), 5, "loss is NaN", id="training"),
        pytest.param(
            ModuleNotFoundError("No module named 'matplotlib.figure'", name="matplotlib.figure"),
            4,
            "the package matplotlib is missing: pip install 'gemmascope[train]'",
            id="package",
        ),
        pytest.param(KeyError("x"), 1, "unexpected KeyError: 'x' (--debug shows where)", id="defect"),
        pytest.param(
            KeyboardInterrupt(), 130, "interrupted; the same command goes on from the last finished stage", id="ctrl-c"
        ),
    ],
)
def test_failures_are_one_line_and_an_exit_code(demo, capsys, error, code, message):
    def run(config):
        raise error

    demo.run = run
    assert main(["demo"]) == code
    assert capsys.readouterr() == ("", f"gemmascope: error: {message}\n")
    if not isinstance(error, KeyboardInterrupt):
        assert main(["demo", "--debug"]) == code
        shown = capsys.readouterr().err
        assert shown.startswith("Traceback")
        assert shown.endswith(f"gemmascope: error: {message}\n")


def test_interruption_names_the_command_that_resumes(demo, capsys):
    def run(config):
        raise KeyboardInterrupt

    demo.run = run
    assert main(["demo", "--fresh"]) == 130
    assert "the same command without --fresh goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tarin"], "No such command 'tarin'"),
        (["train"], "config: expected a file or --preset, got neither"),
        (["demo", "--slow"], "No such option: --slow"),
        (["demo", "--seed", "x"], "Invalid value for '--seed'"),
        (["report"], "Missing argument 'RUN_DIR'"),
    ],
)
def test_usage_errors(arguments, message, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("gemmascope: error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.fixture
def real_demo(monkeypatch, tmp_path):
    """The demo's own settings and checks, and a text without reading documentation; only the training is missing."""
    from gemmascope.demo import run as job

    def no_training(*args, **kwargs):
        raise TrainingFailedError("got as far as training")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job.text, "python_documentation", lambda: list(job.text.cut("docs", "text " * 1000, 64)))
    monkeypatch.setattr(job, "tokenised", no_training)
    (tmp_path / "file").touch()
    (tmp_path / "latin").write_bytes(b"\xe9" * 3000)
    (tmp_path / "short").write_bytes(b"short")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    return job


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "-1"], "seed: expected at least 0, got -1"),
        (["--seed", str(2**64)], f"seed: expected at most {2**63 - 1}, got {2**64}"),
        (["--seed", "9" * 5000], "Invalid value for '--seed'"),
        (["--seed", "1.5"], "Invalid value for '--seed'"),
        (["--seed", ""], "Invalid value for '--seed'"),
        (["--seed"], "Option '--seed' requires an argument"),
        (["--text", "none"], "text: cannot read none: expected a file, found none"),
        (["--text", ""], "text: cannot read .: expected a file, found a folder"),
        (["--text", "file"], "text: expected some text in file, found an empty file"),
        (["--text", "latin"], "text: expected UTF-8 in latin, found byte 0xe9 at 0"),
        (["--text", "short"], "text: expected at least"),
        (["--text", "/dev/zero"], "text: cannot read /dev/zero: expected a file, found a device, pipe or socket"),
        (["--out", "file"], "out: expected a folder, found none: file"),
        (["--out", "other"], "out: expected a new folder or that of an earlier demo, found other files in other"),
        (["--fast=yes"], "Option '--fast' does not take a value"),
        (["--fresh=1"], "Option '--fresh' does not take a value"),
        (["\x1b[2J"], "Got unexpected extra argument"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value)[:24],
)
def test_wrong_options_are_named_and_leave_nothing_behind(real_demo, tmp_path, capsys, arguments, message):
    before = sorted(tmp_path.rglob("*"))
    assert main(["demo", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"gemmascope: error: {message}")
    assert err.endswith("\n")
    assert err[:-1].isprintable()
    assert sorted(tmp_path.rglob("*")) == before


@hypothesis.given(
    option=st.sampled_from(["--seed", "--text", "--out", "--fast", "--fresh", "--debug"]), value=st.text()
)
@hypothesis.settings(deadline=None, max_examples=60, suppress_health_check=list(hypothesis.HealthCheck))
def test_any_option_works_or_is_refused_in_one_line(real_demo, option, value):
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = main(["demo", "--out", "run", option, value])
    assert code in (2, 4, 5)  # 4: a name that the file system does not take
    *trace, line = (line for line in errors.getvalue().splitlines() if not line.startswith("Text "))
    assert line.startswith("gemmascope: error: ")
    assert line.isprintable()
    assert not trace or option == "--debug"


@pytest.mark.parametrize("run", ["results.json", "none", ""])
def test_report_of_what_is_no_run(tmp_path, monkeypatch, capsys, run):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    assert main(["report", run]) == 3
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("gemmascope: error: ")
    assert "results.json: expected " in err


def test_report_of_a_folder_without_a_run(tmp_path, capsys):
    assert main(["report", str(tmp_path / "none")]) == 3
    assert capsys.readouterr().err == (
        f"gemmascope: error: {tmp_path / 'none' / 'results.json'}: expected a file, found none\n"
    )


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_the_training_packages(package):
    code = (
        f"import sys; sys.modules[{package!r}] = None; from gemmascope.__main__ import main; sys.exit(main(['info']))"
    )
    finished = run_python(code)
    expected = f"gemmascope: error: the package {package} is missing: pip install 'gemmascope[train]'\n"
    assert (finished.returncode, finished.stdout, finished.stderr) == (4, "", expected)


@pytest.mark.parametrize(("reader", "code"), [("true", 141), ("cat", 0)])
def test_a_reader_that_goes_away_ends_quietly(reader, code, tmp_path):
    command = f"set -o pipefail; (sleep 0; {sys.executable} -m gemmascope info) 2>{tmp_path / 'err'} | {reader}"
    finished = subprocess.run(["bash", "-c", command], capture_output=True, timeout=120, check=False)
    assert finished.returncode == code
    assert (tmp_path / "err").read_text() == ""


def test_closed_standard_output(tmp_path):
    command = f"{sys.executable} -m gemmascope info >&- 2>{tmp_path / 'err'}"
    assert subprocess.run(["bash", "-c", command], timeout=120, check=False).returncode == 0
    assert (tmp_path / "err").read_text() == ""


def test_a_terminal_without_unicode_shows_question_marks(tmp_path):
    results = make_results()
    write_run(tmp_path, results | {"saes": results["saes"][:1]})
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "gemmascope", "report", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert "?LM" in finished.stdout


def test_interrupting_the_process(tmp_path):
    ready = tmp_path / "ready"
    code = (
        "import signal, sys, time, types, pathlib\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        "demo = types.ModuleType('gemmascope.demo.run')\n"
        "demo.DemoConfig = lambda **options: None\n"
        f"demo.run = lambda config: (pathlib.Path({str(ready)!r}).touch(), time.sleep(60))\n"
        "sys.modules['gemmascope.demo.run'] = demo\n"
        "from gemmascope.__main__ import main\n"
        "sys.exit(main(['demo']))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=30)
    assert process.returncode == 130
    assert shown == "gemmascope: error: interrupted; the same command goes on from the last finished stage\n"


@pytest.mark.parametrize("module", ["rich", "torch", "gemmascope.demo.run"])
@pytest.mark.parametrize(
    "start",
    [
        pytest.param("import runpy; runpy.run_module('gemmascope', run_name='__main__')", id="python -m"),
        pytest.param("from gemmascope.__main__ import main; sys.exit(main())", id="script"),
    ],
)
def test_interrupting_the_imports(module, start):
    """Even where a library swallows the KeyboardInterrupt."""
    code = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        "class Interrupts:\n"
        "    def find_spec(name, path, target=None):\n"
        f"        if name == {module!r}:\n"
        "            try:\n"
        "                signal.raise_signal(signal.SIGINT)\n"
        "            except KeyboardInterrupt:\n"
        "                pass\n"
        "sys.meta_path.insert(0, Interrupts)\n"
    )
    finished = run_python(code + start, "demo")
    assert (finished.returncode, finished.stdout) == (130, "")
    assert finished.stderr == "gemmascope: error: interrupted; the same command goes on from the last finished stage\n"


def test_what_a_command_imports_before_it_can_be_interrupted():
    code = (
        "import sys, gemmascope.__main__; print([name for name in sys.modules if name in ('torch', 'numpy', 'rich')])"
    )
    assert run_python(code).stdout == "[]\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["demo", "--seed", "x"], ["demo", "--seed", "x", "--debug"]])
def test_a_full_standard_error_hides_no_exit_code(arguments, monkeypatch):
    with open("/dev/full", "w") as full:  # closing it would fail if anything were left in it
        monkeypatch.setattr(sys, "stderr", full)
        assert main(arguments) == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_standard_output_is_the_environments_problem(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["--version"]) == 4
    assert capsys.readouterr().err == "gemmascope: error: No space left on device\n"


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_closed_streams_hide_no_exit_code(closed, monkeypatch, capsys):
    monkeypatch.setattr(sys, closed, None)
    assert main(["demo", "--seed", "x"]) == 2
    assert capsys.readouterr().out == ""


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path):
    code = (
        "import os; os.close(0); os.close(2)\n"
        "from gemmascope.process import open_missing; open_missing()\n"
        f"print(os.open({str(tmp_path / 'file')!r}, os.O_CREAT) > 2)"
    )
    assert run_python(code).stdout == "True\n"


def test_importing_the_package_needs_none_of_the_training_packages():
    blocked = ("transformers", "huggingface_hub", "typer", "rich", "matplotlib", "triton")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked})); import gemmascope, gemmascope.__main__; print('ok')"
    )
    finished = run_python(code)
    assert (finished.stdout, finished.stderr) == ("ok\n", "")
