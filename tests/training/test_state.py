"""Whatever is done to an SAE in training or to its trainer, they stay one thing, or the next step says what is wrong.

What a step must come to is told by a twin (`tests.changes.twin_of`).
"""

import pytest
import torch
from torch import nn

from gemmascope.saes import JumpReLUSAE
from gemmascope.training.state import TrainState
from tests.training.changes import (
    ACTIONS,
    WEIGHTS,
    D,
    F,
    assert_same,
    copies_are_right,
    every_way,
    fresh,
    in_training,
    other_sae,
    take,
    twin_of,
    unit_rows,
    values,
    write_row,
)


@every_way
def test_a_threshold_below_0_counts_as_0(compute_dtype, route):
    """However it was written, from the next step on and in what is saved before it."""
    trainers = [in_training(compute_dtype, route) for _ in range(2)]
    for trainer, value in zip(trainers, (-2.0, 0.0), strict=True):
        trainer.sae.threshold.data[3::2] = value
        take(trainer, 2)
    assert_same(*trainers)
    for trainer, value in zip(trainers, (-2.0, 0.0), strict=True):
        trainer.sae.threshold.data[3::2] = value
        trainer.state.settle(0.999)
    assert_same(*trainers)


@every_way
@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.__name__)
def test_a_change_is_trained_on(action, compute_dtype, route):
    trainer = in_training(compute_dtype, route)
    others = values(trainer)
    action(trainer.sae)
    twin = twin_of(trainer, others)
    for seed in range(3):
        before = values(twin)
        for each in (trainer, twin):
            take(each, 1, seed)
        assert_same(trainer, twin)
        assert not torch.equal(values(twin)["W_dec"], before["W_dec"])
    assert trainer.report() == twin.report()
    assert trainer.state.updates == trainer.step == 7
    assert trainer.sae.W_enc.T.is_contiguous()
    assert trainer.sae.W_enc.data_ptr() != trainer.sae.W_dec.data_ptr()
    if compute_dtype == "bf16":
        assert copies_are_right(trainer.state)


@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.__name__)
@pytest.mark.parametrize("compute_dtype", ["fp32", "bf16"])
def test_a_change_before_the_first_step(action, compute_dtype):
    trainer = fresh(compute_dtype)
    others = values(trainer)
    action(trainer.sae)
    twin = twin_of(trainer, others)
    for each in (trainer, twin):
        take(each)
    assert_same(trainer, twin)


@pytest.mark.parametrize("run_ahead", [1, 3])
@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.__name__)
def test_a_change_is_trained_on_when_the_host_looks_later(action, run_ahead):
    trainer = in_training()
    others = values(trainer)
    trainer.run_ahead = run_ahead
    action(trainer.sae)
    twin = twin_of(trainer, others)
    for each in (trainer, twin):
        take(each, 5)
        each.flush()
    assert_same(trainer, twin)
    assert trainer.report() == twin.report()


def test_another_sae_of_the_same_shape():
    trainer = in_training()
    others = values(trainer)
    trainer.state.sae = other_sae()
    twin = twin_of(trainer, others)
    for each in (trainer, twin):
        take(each)
    assert_same(trainer, twin)
    with pytest.raises(AttributeError):
        trainer.sae = other_sae()


# ---- what is refused


def cast_to_bf16(sae):
    sae.bfloat16()


def cast_to_fp64(sae):
    sae.double()


def move(sae):
    sae.to("meta")


def narrow(sae):
    sae.W_dec.data = unit_rows()[:, :5]


def fewer_latents(sae):
    sae.b_enc = nn.Parameter(torch.zeros(F - 1))


def remove(sae):
    sae.W_dec = None


def assign_bf16(sae):
    state = sae.state_dict()
    sae.load_state_dict({n: t.bfloat16() if n in WEIGHTS else t for n, t in state.items()}, assign=True)


REFUSED = {
    cast_to_bf16: "sae: W_enc is bfloat16; training needs the float32 master weights it started with: load them, or go "
    r"on with rounded ones by sae.to\(torch.float32\), and cast a copy.deepcopy instead",
    assign_bf16: "sae: W_enc is bfloat16; training needs the float32",
    cast_to_fp64: "sae: W_enc is float64; training needs the float32",
    move: r"sae: W_enc is on meta; training began on cpu, where the second moments are: move the SAE back with sae.to",
    narrow: rf"sae: W_dec has shape \[{F}, 5\]; training began with \[{F}, {D}\]: give it weights of that shape",
    fewer_latents: rf"sae: b_enc has shape \[{F - 1}\]; training began with \[{F}\]",
    remove: rf"sae: W_dec is missing; training began with one of shape \[{F}, {D}\]",
}


@every_way
@pytest.mark.parametrize("action", REFUSED, ids=lambda action: action.__name__)
def test_what_cannot_be_trained_is_refused_until_it_is_mended(action, compute_dtype, route):
    trainer, other = in_training(compute_dtype, route), in_training(compute_dtype, route)
    weights = {name: getattr(trainer.sae, name).detach().clone() for name in WEIGHTS}
    action(trainer.sae)
    for _ in range(2):
        with pytest.raises(ValueError, match="^" + REFUSED[action]):
            take(trainer, 1)
    for name, tensor in weights.items():
        setattr(trainer.sae, name, nn.Parameter(tensor))
    for each in (trainer, other):
        take(each)
    assert_same(trainer, other)


def test_master_weights_of_few_digits():
    with pytest.raises(ValueError, match=r"^sae: expected float32 or float64 master weights, got bfloat16$"):
        TrainState.start(JumpReLUSAE(D, F, dtype=torch.bfloat16))


def test_steps_that_wait_for_repetition_are_not_lost_by_an_error():
    trainer, other = in_training(), in_training()
    trainer.run_ahead = 3
    for each in (trainer, other):
        write_row(each.sae)
        take(each)
    trainer.sae.double()
    with pytest.raises(ValueError, match="sae: W_enc is float64"):
        trainer.flush()
    trainer.sae.float()
    trainer.flush()
    assert_same(trainer, other)


# ---- the list of everything


@pytest.mark.parametrize("compute_dtype", ["fp32", "bf16"])
def test_tensors_are_everything_and_can_be_copied_to(compute_dtype):
    trainer = in_training(compute_dtype)
    found = trainer.state.tensors()
    low = ["W_enc_low", "W_dec_low"] if compute_dtype == "bf16" else []
    assert list(found) == [
        *("W_enc", "b_enc", "W_dec", "b_dec", "threshold"),
        *("W_enc_v", "W_dec_v", "b_enc_v", "threshold_v", "b_dec_v", "last"),
        *low,
        *("updates", "skipped", "stalled", "tokens_since_fired"),
    ]
    assert all(tensor.is_contiguous() for tensor in found.values())
    held = [t.data_ptr() for t in (*trainer.sae.parameters(), *vars(trainer.state).values()) if torch.is_tensor(t)]
    held += [t.data_ptr() for t in trainer.state.latents if t is not None]
    assert {t.data_ptr() for t in found.values()} == set(held)
    before = values(trainer)
    take(trainer)
    after = values(trainer)
    assert all(not torch.equal(after[name], before[name]) for name in before if name not in ("skipped", "stalled"))
    for name, tensor in trainer.state.tensors().items():
        tensor.copy_(before[name])
    trainer.step -= 3
    take(trainer)
    assert_same(trainer, after)
