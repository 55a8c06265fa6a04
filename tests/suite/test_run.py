"""A whole run: what it leaves, and that it goes on to the same bits however often it is stopped."""

import os
import signal

import pytest

from gemmascope import JumpReLUSAE
from gemmascope.errors import BadFileError
from gemmascope.formats.files import read_json, write_json
from gemmascope.reporting import read_results
from gemmascope.reporting.results import read_log
from gemmascope.sites import Site
from gemmascope.suite.run import train_suite
from gemmascope.training import SAETrainer, Suite
from tests.suite.small_runs import config, hash_of, write_model, write_text

pytestmark = pytest.mark.filterwarnings("ignore:.*never fired:RuntimeWarning")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_folder, text_file):
    """A run that nothing disturbed, and its results."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    return out, train_suite(config(model_folder, text_file, out))


@pytest.fixture
def make(tmp_path, model_folder, text_file):
    return lambda **sections: config(model_folder, text_file, tmp_path / "run", **sections)


def stop_after(monkeypatch, step: int, number: int = signal.SIGTERM) -> None:
    """The signal comes while that step is being made."""
    update = Suite.update

    def stopped(self, batch):
        update(self, batch)
        if next(iter(self.trainers.values())).step == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Suite, "update", stopped)


def test_what_a_run_leaves(finished):
    out, results = finished
    assert results == read_json(out / "results.json")
    names = [row["name"] for row in results["saes"]]
    assert names == [
        "layer_0/mlp/width_32/target_l0_4",
        "layer_0/mlp/width_32/target_l0_8",
        "layer_1/att/width_48/target_l0_6",
        "layer_1/resid/width_48/target_l0_6",
    ]
    for row in results["saes"]:
        sae = JumpReLUSAE.load(out / row["path"])
        assert sae.is_folded
        assert sae.metadata["name"] == row["name"]
        assert sae.metadata["average_l0"] == pytest.approx(row["l0"])
        assert row["path"].startswith(f"saes/{row['site']}/layer_{row['layer']}/width_{row['width']}/average_l0_")
    assert len(read_results(out)["saes"]) == 4
    assert {row["step"] for row in read_log(out)} == {4, 8, 12, 16, 20, 24}


def test_a_finished_run_is_left_as_it_is(finished, model_folder, text_file):
    out, results = finished
    before = {path: path.stat().st_mtime_ns for path in (out / "saes").rglob("*")}
    assert train_suite(config(model_folder, text_file, out)) == results
    assert {path: path.stat().st_mtime_ns for path in (out / "saes").rglob("*")} == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_saves_and_the_run_goes_on_to_the_same_bits(finished, make, monkeypatch, tmp_path, number):
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    with monkeypatch.context() as patch:
        stop_after(patch, 7, number)
        assert train_suite(make()) is None
    assert (tmp_path / "run" / "checkpoints" / "step-000000007").is_dir()
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == handlers
    train_suite(make())
    assert hash_of(tmp_path / "run") == hash_of(finished[0])
    assert read_log(tmp_path / "run") == read_log(finished[0])


def test_stopped_again_and_again(finished, make, monkeypatch, tmp_path):
    for step in (1, 5, 8, 9, 23):
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            assert train_suite(make()) is None
    train_suite(make())
    assert hash_of(tmp_path / "run") == hash_of(finished[0])


def test_stopped_while_the_model_runs(finished, make, monkeypatch, tmp_path):
    from gemmascope.activations import Harvester

    fill = Harvester.fill

    def stopped(self, block, ring):
        if block == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        fill(self, block, ring)

    with monkeypatch.context() as patch:
        patch.setattr(Harvester, "fill", stopped)
        assert train_suite(make()) is None
    train_suite(make())
    assert hash_of(tmp_path / "run") == hash_of(finished[0])


# ---- what changed


def begin(make, monkeypatch, **sections) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        assert train_suite(make(**sections)) is None


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"suite": {"seed": 1}}, "suite.seed: the run has 0, now 1"),
        ({"activations": {"drop_norm": 3.0}}, "activations.drop_norm: the run has nothing, now 3.0"),
        ({"suite": {"tokens": 30 * 120}}, "suite.tokens: the run has 2880, now 3600"),
        ({"text": {"context": 40}}, "text: expected that of the run"),
    ],
    ids=["seed", "drop_norm", "tokens", "context"],
)
def test_another_config_is_refused(make, monkeypatch, tmp_path, sections, message):
    begin(make, monkeypatch)
    before = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    with pytest.raises(ValueError, match=message):
        train_suite(make(**sections))
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == before


def test_what_may_differ(finished, make, monkeypatch, tmp_path):
    """When the run is saved, told of and judged is nothing that its bits depend on."""
    begin(make, monkeypatch)
    train_suite(make(checkpoint={"steps": 3}, evaluate={"rows": 8, "loss_rows": 3}, run={"log_every": 4}))
    weights = {path.rpartition("/average")[0]: digest for path, digest in hash_of(tmp_path / "run").items()}
    assert len(weights) == 3
    for path, digest in hash_of(finished[0]).items():
        assert digest in hash_of(tmp_path / "run").values(), path


def test_another_text_is_refused(tmp_path, model_folder, monkeypatch):
    text = write_text(tmp_path / "text.jsonl")
    make = lambda **sections: config(model_folder, text, tmp_path / "run", **sections)  # noqa: E731
    begin(make, monkeypatch)
    write_text(text, seed=1)
    with pytest.raises(ValueError, match="text: expected that of the run"):
        train_suite(make())
    write_text(text)
    assert train_suite(make()) is not None


def test_another_model_is_refused_unless_allowed(tmp_path, text_file, monkeypatch):
    model = write_model(tmp_path / "model")
    make = lambda **sections: config(model, text_file, tmp_path / "run", **sections)  # noqa: E731
    begin(make, monkeypatch)
    write_model(model, seed=1)
    with pytest.raises(ValueError, match=r"model: expected that of the run.*--allow-model-change"):
        train_suite(make())
    assert train_suite(make(), allow=("model",)) is not None


def test_another_environment_is_refused_unless_allowed(make, monkeypatch, tmp_path):
    begin(make, monkeypatch)
    path = tmp_path / "run" / "identity.json"
    identity = read_json(path)
    identity["environment"]["torch"] = "2.0.0"
    write_json(path, identity)
    with pytest.raises(ValueError, match=r"environment: expected .* torch: the run has '2.0.0'.*--allow-environment"):
        train_suite(make())
    assert train_suite(make(), allow=("environment",)) is not None


def test_fresh_starts_over(finished, make, monkeypatch, tmp_path):
    begin(make, monkeypatch, suite={"seed": 1})
    train_suite(make(), fresh=True)
    assert hash_of(tmp_path / "run") == hash_of(finished[0])


# ---- SAEs that fail


def test_one_that_fails_leaves_the_others_as_they_were(finished, make, monkeypatch, tmp_path):
    update = SAETrainer.update

    def failing(self, x):
        if self.sae.metadata.get("site") == Site(1, "att").name and self.step == 9:
            raise RuntimeError("a defect")
        update(self, x)

    monkeypatch.setattr(SAETrainer, "update", failing)
    with pytest.warns(RuntimeWarning, match="layer_1/att"):
        results = train_suite(make())
    assert list(results["parked"]) == ["layer_1/att/width_48/target_l0_6"]
    assert "a defect" in results["parked"]["layer_1/att/width_48/target_l0_6"]
    ours, theirs = hash_of(tmp_path / "run"), hash_of(finished[0])
    assert len(ours) == 3
    assert all(theirs[path] == digest for path, digest in ours.items())


# ---- damage


def test_damaged_checkpoints(finished, make, monkeypatch, tmp_path):
    begin(make, monkeypatch)
    newest, _ = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[::-1]
    weights = max(newest.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    with pytest.warns(RuntimeWarning, match="step-000000006"):
        train_suite(make())
    assert hash_of(tmp_path / "run") == hash_of(finished[0])


def test_only_damaged_checkpoints(make, monkeypatch, tmp_path):
    begin(make, monkeypatch)
    for path in (tmp_path / "run" / "checkpoints").glob("step-*/manifest.json"):
        path.write_text("{")
    with pytest.warns(RuntimeWarning), pytest.raises(BadFileError, match="checkpoint"):
        train_suite(make())
