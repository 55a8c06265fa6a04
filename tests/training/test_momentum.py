"""Adam with a first moment in training, of every kind: python -m pytest tests/training/test_momentum.py"""

import copy

import pytest
import torch

from gemmascope.training.config import KINDS, TOP_K, TrainConfig
from gemmascope.training.resample import resample
from gemmascope.training.trainer import SAETrainer

D, F, N = 8, 40, 6
BETA1 = 0.5


def rows(seed=0, n=N):
    generator = torch.Generator().manual_seed(seed)
    present = torch.rand(n, 20, generator=generator) < 0.15
    strength = torch.rand(n, 20, generator=generator) * present
    return (strength @ torch.randn(20, D, generator=torch.Generator().manual_seed(99))).double() + 1


def config(kind, **changes):
    given = {"d_sae": F, "steps": 40, "batch_size": N, "kind": kind, "adam_beta1": BETA1, "dead_after_tokens": 64}
    if kind in TOP_K:
        given |= {"k": 3, "prefixes": (6, F)} if kind == "matryoshka" else {"k": 3}
    elif kind == "jumprelu":
        given["target_l0"] = 3.0
    else:
        given["l0_coefficient"] = 0.6
    return TrainConfig.small(**(given | changes))


def trained(kind, steps=30, impl="auto", dtype=torch.float64, **changes):
    trainer = SAETrainer(config(kind, **changes), rows(n=200).to(dtype), impl=impl, dtype=dtype)
    for step in range(steps):
        trainer.update(rows(step).to(dtype))
    trainer.flush()
    return trainer


def assert_close(found, expected, tolerance):
    ours, theirs = found.state.tensors(), expected.state.tensors()
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        if tensor.is_floating_point() and tensor.isfinite().all():
            assert (ours[name] - tensor).norm() <= tolerance * (tensor.norm() + 1e-6), name


@pytest.mark.parametrize("kind", KINDS)
def test_routes_agree_in_fp64(kind):
    """The written-out gradients and the entries, thirty steps, between which many latents are idle for three."""
    by_reference, by_entries = (trained(kind, 15, route=route, impl="pytorch") for route in ("reference", "sparse"))
    for trainer in (by_reference, by_entries):
        for seed in range(3):
            trainer.update(rows(seed, 1))
        trainer.flush()
        idle = trainer.state.last < trainer.state.updates - 2
        assert 0 < idle.sum() < F
        for seed in range(15, 30):
            trainer.update(rows(seed))
        trainer.flush()
        assert trainer.state.updates == 33
        trainer.state.settle(trainer.config.adam_beta2, BETA1)
    assert_close(by_entries, by_reference, 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_first_moments_count(kind):
    """Another training than without, and one that the moments of every parameter take part in."""
    with_them, without = trained(kind), trained(kind, adam_beta1=0.0)
    names = set(with_them.state.tensors())
    kept = {name for name in names if name.endswith("_m")}
    assert kept == {f"{name[:-2]}_m" for name in names if name.endswith("_v")}
    assert {name for name in without.state.tensors() if name.endswith("_m")} == set()
    assert not torch.equal(with_them.sae.W_enc, without.sae.W_enc)
    assert not torch.equal(with_them.sae.b_dec, without.sae.b_dec)
    never = {"threshold_m"} if kind != "jumprelu" else set()
    assert {name for name in kept if not with_them.state.tensors()[name].any()} == never


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_goes_on_with_the_same_bits(kind):
    uninterrupted, stopped = (trained(kind, steps, dtype=torch.float32) for steps in (20, 12))
    other = SAETrainer(config(kind), rows(n=200).float())
    other.state.put(stopped.state.tensors(), stopped.state.turn, False)
    other.step, other.route, other.capacity = stopped.step, stopped.route, stopped.capacity
    for trainer in (other, copy.deepcopy(stopped)):
        for step in range(12, 20):
            trainer.update(rows(step).float())
        trainer.flush()
        for name, tensor in uninterrupted.state.tensors().items():
            assert torch.equal(trainer.state.tensors()[name], tensor), name


@pytest.mark.parametrize("kind", ["relu", "gated"])
def test_a_latent_that_begins_anew_has_no_moments(kind):
    trainer = trained(kind, 30, resample_steps=(35,), resample_tokens=2048)
    dead = torch.zeros(F, dtype=torch.bool)
    dead[[2, 5]] = True
    before = copy.deepcopy(trainer.state)
    assert before.b_enc_m is not None
    assert before.W_dec_m is not None
    before.W_dec_m[dead] = 1.0
    before.b_enc_m[dead] = 1.0
    before.seen_keys[:4] = 1.0
    before.seen[:4] = rows(7, 4)
    assert resample(before, dead) == 2
    for name in ("W_enc_m", "W_dec_m", "b_enc_m", "threshold_m"):
        assert not getattr(before, name)[dead].any(), name
    assert before.W_dec_m[~dead].any()
    assert all(not m[dead].any() for m in before.others_m.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adam_beta1": 1.5}, "adam_beta1: expected a finite number ≥ 0 and ≤ 1"),
        ({"adam_beta1": -0.1}, "adam_beta1: expected a finite number ≥ 0 and ≤ 1"),
        ({"adam_beta1": 0.95}, r"adam_beta1: expected less than √adam_beta2 = 0\.949, got 0\.95"),
    ],
)
def test_bad_beta1(changes, message):
    with pytest.raises(ValueError, match=message):
        config("jumprelu", **changes)


def test_the_largest_rate_of_a_log_threshold():
    """By Cauchy and Schwarz an update is at most lr/√((1 − β2)(1 − β1²/β2)): 1/√(.001·(1 − .81/.999)) = 72.7."""
    steep = {"threshold_parametrisation": "log", "adam_beta2": 0.999, "adam_beta1": 0.9, "threshold_init": 0.1}
    assert config("jumprelu", learning_rate=0.55, **steep).adam_beta1 == 0.9
    with pytest.raises(ValueError, match=r"learning_rate: expected at most 0\.55 for log θ"):
        config("jumprelu", learning_rate=0.56, **steep)


def test_memory_of_first_moments():
    counted = SAETrainer.memory(config("gated"), D)
    state = trained("gated", 1, dtype=torch.float32).state
    held = sum(tensor.nbytes for name, tensor in state.tensors().items() if name.endswith("_m"))
    assert counted.first_moments == counted.second_moments == held
    assert "first moments, fp32" in counted.table()
    without = SAETrainer.memory(config("gated", adam_beta1=0.0), D)
    assert without.first_moments == 0
    assert "first moments" not in without.table()
    assert counted.total - without.total == held
