"""The comparison of the routes, on activations small enough for a test."""

import pytest
import torch
from safetensors.torch import save_file

from bench.quality import routes
from gemmascope.training.config import TrainConfig
from gemmascope.training.trainer import SAETrainer
from tests.training.test_trainer import sample


@pytest.fixture
def activations(tmp_path):
    path = tmp_path / "activations.safetensors"
    rows = {f"layer_{layer}/resid": sample(3000, seed=layer).bfloat16() for layer in range(2)}
    save_file(rows, path)
    return path


def test_the_routes_train_the_same_saes(activations, capsys):
    assert routes.main([str(activations), "--steps", "60", "--sites", "1", "--device", "cpu"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(routes.ROUTES)]
    assert [row[0] for row in rows] == list(routes.ROUTES)
    assert all(float(figure.rstrip("%")) < 1e-6 for row in rows for figure in row[2:])


def test_the_control_starts_one_ulp_away(activations, capsys):
    trainer = SAETrainer(TrainConfig.short(d_sae=16), sample())
    before = trainer.sae.W_enc.detach().clone()
    routes.move_one_ulp(trainer)
    change = (trainer.sae.W_enc - before).abs()
    assert (change > 0).all()
    assert (change <= torch.finfo(torch.float32).eps * before.abs()).all()
    arguments = ["--routes", "sparse", "control", "--steps", "10", "--dtype", "fp32", "--device", "cpu"]
    assert routes.main([str(activations), *arguments]) == 0
    assert "control" in capsys.readouterr().out


def test_a_route_that_differs_is_noticed(activations, monkeypatch):
    train_suite = routes.train_suite

    def spoilt(rows, config, *machine, moved):
        found = train_suite(rows, config, *machine, moved=moved)
        if config.route == "sparse":
            found["figures"]["layer_0/resid"]["fvu"] *= 1.02
        return found

    monkeypatch.setattr(routes, "train_suite", spoilt)
    arguments = [str(activations), "--steps", "10", "--sites", "1", "--device", "cpu"]
    assert routes.main(arguments) == 1
    assert routes.main([*arguments, "--dtype", "fp32"]) == 0


def test_deviations_are_the_worst_site():
    figures = {"a": {"l0": 2.0, "fvu": 0.5}, "b": {"l0": 4.0, "fvu": 0.25}}
    reference = {"figures": figures, "curves": {"a": [1.0, 2.0], "b": [1.0, 1.0]}}
    found = {
        "figures": {"a": {"l0": 2.2, "fvu": 0.5}, "b": {"l0": 4.0, "fvu": 0.2}},
        "curves": {"a": [1.0, 2.0], "b": [1.0, 1.5]},
    }
    means = {"mean_l0": 6.2 / 6 - 1, "mean_fvu": 1 - 0.7 / 0.75}
    expected = {"l0": 0.1, "fvu": 0.2, "curve": 0.5} | means
    assert routes.deviations(found, reference) == pytest.approx(expected)
    assert torch.tensor(list(routes.deviations(reference, reference).values())).eq(0).all()
