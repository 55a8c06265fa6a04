"""Trackers that work, are missing, fail or hang: the run they belong to never notices more than a warning."""

import sys
import threading
import time
import types
import warnings

import pytest

from gemmascope.reporting import trackers
from gemmascope.reporting.trackers import TRACKERS, open_trackers

CONFIG = {"d_sae": 2560, "seed": 0}


class Fake(types.ModuleType):
    """A package like trackio and wandb, whose calls are recorded; ``at`` is where ``act`` is called."""

    def __init__(self, name, at=None, act=lambda: None):
        super().__init__(name)
        self.calls, self.at, self.act = [], at, act

    def _called(self, name, *arguments):
        if name == self.at:
            self.act()
        self.calls.append((name, *arguments))

    def init(self, **options):
        self._called("init", options)
        return self

    def log(self, metrics, step):
        self._called("log", step, metrics)

    def finish(self):
        self._called("finish")

    # what TensorBoard has
    def SummaryWriter(self, log_dir):  # noqa: N802
        self._called("init", {"log_dir": log_dir})
        return self

    def add_text(self, key, text):
        self._called("text", key, text)

    def add_scalar(self, key, value, step):
        self._called("log", step, {key: value})

    def close(self):
        self._called("finish")


@pytest.fixture
def fake(monkeypatch):
    def install(name, *arguments):
        module = TRACKERS[name][0]
        package = Fake(module, *arguments)
        monkeypatch.setitem(sys.modules, module, package)
        return package

    return install


def opened(names, tmp_path, **options):
    return open_trackers(names, run_name="suite", folder=tmp_path, config=CONFIG, **options)


def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("name", list(TRACKERS))
def test_figures_arrive_in_order(fake, tmp_path, name):
    package = fake(name)
    with opened([name], tmp_path) as run:
        for step in range(3):
            run.log(step, {"layer_0/att/l0": 40 + step, "layer_0/att/fvu": None})
        assert run.names == (name,)
    logged = [call for call in package.calls if call[0] == "log"]
    assert logged == [("log", step, {"layer_0/att/l0": 40.0 + step}) for step in range(3)]
    assert package.calls[-1] == ("finish",)
    run.finish()
    assert package.calls.count(("finish",)) == 1


def test_runs_are_named_and_resumed(fake, tmp_path):
    packages = {name: fake(name) for name in TRACKERS}
    for _ in range(2):
        opened(list(TRACKERS), tmp_path).finish()
    opened(["wandb"], tmp_path, run_id="mine").finish()
    started = {name: [call[1] for call in package.calls if call[0] == "init"] for name, package in packages.items()}
    assert started["trackio"][0] == {"project": "gemmascope", "name": "suite", "config": CONFIG, "resume": "allow"}
    first, second, third = started["wandb"]
    assert first == second == started["trackio"][0] | {"id": first["id"], "dir": str(tmp_path)}
    assert third["id"] == "mine"
    assert started["tensorboard"][0] == {"log_dir": str(tmp_path / "tensorboard")}


@pytest.mark.parametrize("name", list(TRACKERS))
def test_a_missing_package_is_one_warning(monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, TRACKERS[name][0], None)
    with pytest.warns(RuntimeWarning, match=rf"^{name}: cannot be imported.*pip install {name}$") as caught:
        run = opened([name], tmp_path)
    assert len(caught) == 1
    run.log(1, {"a": 1.0})
    run.finish()


def test_a_package_that_fails_to_import_is_one_warning(monkeypatch, tmp_path):
    def broken(name):
        raise RuntimeError("protobuf is too old")

    monkeypatch.setattr(trackers.importlib, "import_module", broken)
    with pytest.warns(RuntimeWarning, match=r"^wandb: cannot be imported.*RuntimeError: protobuf is too old$"):
        assert opened(["wandb"], tmp_path).names == ()


def fail():
    raise OSError("quota\nexceeded")


def leave():
    sys.exit(1)


@pytest.mark.parametrize("act", [fail, leave])
@pytest.mark.parametrize("at", ["init", "log"])
@pytest.mark.parametrize("name", list(TRACKERS))
def test_one_that_fails_is_dropped_with_one_warning_and_the_others_go_on(fake, tmp_path, name, at, act):
    other = "wandb" if name == "trackio" else "trackio"
    package, works = fake(name, at, act), fake(other)
    run = opened([name, other], tmp_path)
    failing = run._workers[0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.log(0, {"a": 0.0})
        until(lambda: failing.problem is not None)
        for step in range(1, 20):
            run.log(step, {"a": 1.0})
        run.finish()
    reason = "OSError: quota exceeded" if act is fail else "SystemExit: 1"
    assert [str(each.message) for each in caught] == [
        f"{name}: gets no more figures of this run, which goes on without: {reason}"
    ]
    assert sum(call[0] == "log" for call in works.calls) == 20
    assert ("finish",) not in package.calls


def test_one_that_fails_at_the_end_is_a_warning(fake, tmp_path):
    fake("wandb", "finish", fail)
    run = opened(["wandb"], tmp_path)
    with pytest.warns(RuntimeWarning, match="quota exceeded"):
        run.finish()


@pytest.mark.parametrize("at", ["init", "log", "finish"])
def test_one_that_hangs_is_not_waited_for(fake, tmp_path, monkeypatch, at):
    release = threading.Event()
    fake("wandb", at, lambda: release.wait(60))
    works = fake("trackio")
    run = opened(["wandb", "trackio"], tmp_path)
    started = time.monotonic()
    run.log(0, {"a": 0.0})
    with pytest.warns(RuntimeWarning, match=r"^wandb: .*it hangs"):
        run.finish(seconds=0.2)
    assert time.monotonic() - started < 30
    until(lambda: ("finish",) in works.calls)
    release.set()


def test_rows_do_not_pile_up_behind_one_that_hangs(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "MOST_WAITING", 5)
    release = threading.Event()
    fake("wandb", "log", lambda: release.wait(60))
    run = opened(["wandb"], tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(50):
            run.log(step, {"a": 0.0})
    (warning,) = caught
    assert str(warning.message).endswith("it hangs: 5 rows wait for it")
    assert run.names == ()
    run.finish()
    release.set()


def test_figures_that_are_none_are_the_trackers_problem_not_the_trainings(fake, tmp_path):
    fake("trackio")
    run = opened(["trackio"], tmp_path)
    run.log(0, {"a": "no number"})
    with pytest.warns(RuntimeWarning, match="ValueError: could not convert"):
        run.finish()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"names": ["mlflow"]}, ValueError, "names: expected among trackio, wandb, tensorboard, got 'mlflow'"),
        ({"names": "wandb"}, TypeError, "names: expected a list of trackers, got str"),
        ({"names": [["wandb"]]}, ValueError, "names: expected among"),
        ({"names": ["wandb", "wandb"]}, ValueError, "names: expected each tracker once, got wandb, wandb"),
        ({"run_name": 3}, TypeError, "run_name: expected a str, got int"),
        ({"config": []}, TypeError, "config: expected a dict, got list"),
        ({"folder": 3}, TypeError, "folder: expected a str"),
        ({"run_id": 3}, TypeError, "run_id: expected a str, got int"),
    ],
)
def test_refusals(tmp_path, arguments, error, message):
    with pytest.raises(error, match=f"^{message}"):
        open_trackers(**({"names": [], "run_name": "a", "folder": tmp_path, "config": {}} | arguments))
