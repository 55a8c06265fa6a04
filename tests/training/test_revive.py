"""θ of dead latents that falls: by how much, for which, on every route, with the same bits after a resume."""

import copy
import math

import pytest
import torch

from gemmascope.saes import JumpReLUSAE
from gemmascope.training import SAETrainer, TrainConfig
from gemmascope.training.revive import revive
from gemmascope.training.state import TrainState

MADE, WITHHELD = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)


def rows(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator) * torch.arange(1, 7) + 1


def state_of(thresholds, since):
    sae = JumpReLUSAE(6, len(thresholds), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        sae.threshold.copy_(torch.tensor(thresholds))
    state = TrainState.start(sae)
    state.tokens_since_fired.copy_(torch.tensor(since))
    return state


def test_of_dead_latents_alone_and_not_below_0():
    state = state_of([0.5, 0.5, 0.1, 0.0], [99, 100, 1000, 100])
    revive(state, 100, 0.25, False, MADE)
    torch.testing.assert_close(state.threshold, torch.tensor([0.5, 0.25, 0.0, 0.0]), rtol=0, atol=0)


def test_of_log_theta():
    state = state_of([0.5, 0.5], [0, 100])
    revive(state, 100, 0.25, True, MADE)
    torch.testing.assert_close(state.threshold, torch.tensor([0.5, 0.5 * math.exp(-0.25)]))


@pytest.mark.parametrize("log", [False, True])
def test_nothing_changes_where_the_update_was_withheld(log):
    state = state_of([0.5, 0.2], [100, 100])
    before = copy.deepcopy(state).tensors()
    revive(state, 100, 0.25, log, WITHHELD)
    for name, tensor in state.tensors().items():
        assert torch.equal(tensor, before[name]), name


def config_of(**changes):
    options = {"d_sae": 24, "steps": 60, "batch_size": 16, "dead_after_tokens": 64, "revival_rate": 1.0, "seed": 3}
    return TrainConfig.short(**options | changes)


def trained(config, steps, dtype=torch.float64, impl="pytorch"):
    trainer = SAETrainer(config, rows(200), dtype=dtype, impl=impl)
    trainer.sae.W_dec.data.div_(trainer.sae.W_dec.data.norm(dim=1, keepdim=True))
    trainer.sae.b_enc.data[::3] = -100.0
    for step in range(steps):
        trainer.update(rows(16, 100 + step))
    trainer.flush()
    return trainer


def test_it_is_what_the_pre_activation_loss_does_to_a_latent_that_nothing_else_moves():
    """Once Adam's second moment is that of the one gradient there is."""
    options = {"lr_warmup_steps": 0, "lr_decay_steps": 0, "threshold_init": 0.3, "learning_rate": 1e-4}
    falling = config_of(route="reference", **options)
    with_loss = falling.changed(revival_rate=0.0, pre_act_coefficient=2e-3)
    for config in (with_loss, falling):
        paces = trained(config, 30).state.threshold - trained(config, 40).state.threshold
        torch.testing.assert_close(paces[::3], torch.full_like(paces[::3], 10 * 1e-4), rtol=0.04, atol=0)


@pytest.mark.parametrize("route", ["sparse", "dense", "reference"])
def test_routes_agree_and_a_latent_that_died_fires_again(route):
    config = config_of(route=route, threshold_init=0.05, learning_rate=3e-3)
    trainer, expected = trained(config, 40), trained(config.changed(route="reference"), 40)
    for name, tensor in trainer.state.tensors().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, expected.state.tensors()[name], rtol=1e-9, atol=1e-12)
    raised = SAETrainer(config, rows(200), dtype=torch.float64)
    raised.sae.threshold.data[::3] = 1.0  # which no z reaches
    still = SAETrainer(config.changed(revival_rate=0.0), rows(200), dtype=torch.float64)
    still.sae.threshold.data[::3] = 1.0
    for each in (raised, still):
        for step in range(60):
            each.update(rows(16, 100 + step))
        each.flush()
    dead = [int((each.state.tokens_since_fired[::3] >= 64).sum()) for each in (raised, still)]
    assert raised.state.threshold[::3].max() < still.state.threshold[::3].max()
    assert dead[0] < dead[1]


def test_resumed_to_the_bit():
    whole = trained(config_of(), 30, torch.float32)
    half = trained(config_of(), 17, torch.float32)
    tensors, facts = half.snapshot()
    again = SAETrainer(config_of(), rows(200), impl="pytorch")
    again.restore({name: tensor.clone() for name, tensor in tensors.items()}, facts)
    for step in range(17, 30):
        again.update(rows(16, 100 + step))
    again.flush()
    for name, tensor in whole.state.tensors().items():
        assert torch.equal(again.state.tensors()[name], tensor), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"revival_rate": -1.0}, r"revival_rate: expected "),
        ({"kind": "relu"}, r"revival_rate: expected 0 with kind='relu', got 1"),
        ({"kind": "topk", "k": 3}, r"revival_rate: expected 0 with kind='topk', got 1"),
    ],
)
def test_what_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        config_of(**changes)
