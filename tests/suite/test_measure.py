"""Measurements leave everything as it was, and measure what they should."""

import threading

import pytest
import torch

from gemmascope.sites import Site
from gemmascope.suite import measure
from gemmascope.suite.measure import Stopwatch
from gemmascope.training import SAETrainer, TrainConfig
from tests import tiny_models

CPU = torch.device("cpu")
CONFIG = TrainConfig.short(d_sae=96, batch_size=128, target_l0=6.0, sparsity="quadratic_l0")


@pytest.fixture(autouse=True)
def no_budget(monkeypatch):
    monkeypatch.setattr(measure, "BUDGET", 0.0)


def test_a_forward_stops_below_the_deepest_site_and_leaves_the_model(monkeypatch):
    model = tiny_models.gemma2()
    ran = [0, 0, 0]
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *args, index=index: ran.__setitem__(index, ran[index] + 1))
    model.train()
    assert Stopwatch().forward(model, [Site(0, "att"), Site(1, "resid")], 2, 8) > 0
    assert ran[0] == ran[1] > 1
    assert ran[2] == 0
    assert model.config.num_hidden_layers == tiny_models.LAYERS
    assert model.training


def test_a_model_that_fails_is_left_as_it_was():
    model = tiny_models.gemma2()
    model.model.layers[0].register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Stopwatch().forward(model, [Site(0, "att")], 2, 8)
    assert model.config.num_hidden_layers == tiny_models.LAYERS


def test_a_slow_forward_is_timed_on_one_row():
    model, rows = tiny_models.gemma2(), []
    model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True
    )
    Stopwatch().forward(model, [Site(0, "att")], 3, 8)  # every forward is above a budget of nothing
    assert set(rows) == {1}


@pytest.mark.parametrize(
    "config", [CONFIG, TrainConfig.short(d_sae=96, batch_size=128), TrainConfig.gemma_scope(d_sae=96)]
)
def test_a_step(config):
    assert Stopwatch().step(config, 16, CPU, "auto", threads=1) > 0


def test_a_step_is_taken_by_as_many_threads_as_asked(monkeypatch):
    seen = []
    monkeypatch.setattr(
        measure,
        "_step_seconds",
        lambda *args: seen.append((threading.current_thread(), torch.get_num_threads())) or 0.5,
    )
    before = torch.get_num_threads()
    assert Stopwatch().step(CONFIG, 16, CPU, "auto", threads=before + 1) == 0.5
    assert Stopwatch().step(CONFIG, 16, CPU, "auto", threads=before) == 0.5
    assert [threads for _, threads in seen] == [before + 1, before]
    assert seen[0][0] is not threading.current_thread() is seen[1][0]
    assert torch.get_num_threads() == before


def test_large_saes_are_timed_at_a_part_of_their_size(monkeypatch):
    made = []

    class Trainer(SAETrainer):
        def __init__(self, config, sample, **options):
            made.append((config.d_sae, config.batch_size, len(sample)))
            super().__init__(config, sample, **options)

    monkeypatch.setattr(measure, "SAETrainer", Trainer)
    monkeypatch.setattr(measure, "_seconds", lambda run, device, budget: 1.0)
    monkeypatch.setattr(measure, "MOST_WEIGHTS", 16 * 512)
    monkeypatch.setattr(measure, "MOST_PRODUCTS", {"cpu": 16 * 512 * 128})
    wide = CONFIG.changed(d_sae=2048, batch_size=1024)
    assert Stopwatch().step(wide, 16, CPU, "auto", threads=1) == 4 * 8
    assert made == [(512, 128, 128)]


def test_the_step_timed_has_the_l0_that_is_aimed_at():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 16, generator=generator)
    trainer = SAETrainer(CONFIG, x)
    measure._set_l0(trainer, x, 6)
    trainer.update(x)
    assert trainer.report()["l0"] == pytest.approx(6, rel=0.15)
