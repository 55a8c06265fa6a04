"""A sparse step by the kernels can be captured in a CUDA graph, as far as that shows without a GPU.

A replay runs the same kernels on the same memory with the same arguments, whatever the numbers in that memory have
become. So the step must ask the host for nothing, and two steps that differ in every number that is scheduled must ask
for the same operators and launches with the same arguments, up to what their tensors hold.
"""

from dataclasses import replace
from unittest import mock

import pytest
import torch

from bench.launches import Recorder, record_step, small_step
from gemmascope.kernels import Rule
from gemmascope.kernels.dispatch import interpreting
from gemmascope.training.config import Loss
from gemmascope.training.step import Scheduled, sparse_step
from tests.training.test_losses import LOSSES

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not interpreting(), reason="records launches of the interpreter")
EARLY, LATE = Rule(3e-4, 0.999, 1e-8, True), Rule(7e-5, 0.999, 1e-8, True)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Not here: filling memory is an operator too."""


def scheduled(loss, rule, column):
    return Scheduled.of(loss, rule, 6, column).to(torch.device("cpu"))


def recorded(loss, given, compute_dtype="bf16"):
    state, x, loss, room = small_step(compute_dtype, loss)
    sparse_step(state, x, loss, EARLY, room, given(state))
    recorder = Recorder()
    with recorder.recording():
        figures = sparse_step(state, x, loss, EARLY, room, given(state))
    return recorder, figures, state


def test_the_step_asks_the_host_for_nothing():
    for compute_dtype in ("fp32", "bf16"):
        assert [(call.name, call.place) for call in record_step(compute_dtype).waits] == []


def test_it_launches_no_more_than_it_must():
    """What stands around the passes: the clamp of the thresholds and five kernels."""
    own = ("centring", "tokens", "conclusion", "finishing")
    calls = record_step().kernels
    around = [call.name for call in calls if not call.in_operator or call.place.split(".")[2] in own]
    assert [name.partition("[")[0] for name in around] == [
        "clamp_", "_centre_kernel", "_tokens_kernel", "_touched_kernel", "_conclude_kernel", "_finish_kernel",
    ]  # fmt: skip
    assert not [call for call in calls if not call.in_operator and call.name != "clamp_"]


@pytest.mark.parametrize(
    "loss",
    [
        Loss(0.1, 0.1),
        Loss(0.1, 0.1, "target_l0", 4.0, l0_of="batch"),
        Loss(0.1, 0.1, "l1"),
        Loss(0.1, 0.1, "tanh", frequency_scale=0.2, ste_to_z=True),
    ],
    ids=["l0", "batch", "l1", "tanh and frequency"],
)
def test_a_replay_sees_the_schedule(loss):
    """Other rates, λ, slopes and columns are other numbers in tensors, not other arguments."""
    other, found = replace(loss, l0_coefficient=0.9), {}
    for rule, weights, column in ((EARLY, loss, 1), (LATE, other, 5)):
        recorder, figures, state = recorded(loss, lambda _, g=(weights, rule, column): scheduled(*g))
        found[column] = recorder.calls, figures.loss.item(), state.sae.W_dec.detach().clone()
    assert found[1][0] == found[5][0]
    assert found[1][1] != found[5][1]
    assert not torch.equal(found[1][2], found[5][2])


def test_a_python_number_would_show():
    """The recording notices one that is another in the next step."""
    calls = []
    for rule in (EARLY, LATE):
        given = scheduled(Loss(0.1, 0.1), rule, 1)._replace(learning_rate=rule.learning_rate)
        calls.append(recorded(Loss(0.1, 0.1), lambda _, g=given: g)[0].calls)
    assert calls[0] != calls[1]


def test_a_look_from_the_host_would_show():
    with Recorder().recording() as recorder:
        torch.ones(3).sum().item()
        torch.ones(3).nonzero()
    assert [call.name for call in recorder.waits] == ["_local_scalar_dense", "nonzero"]


def test_scheduled_numbers_are_those_of_the_loss_and_the_rule():
    for name, loss in LOSSES.items():
        given = Scheduled.of(loss, EARLY, 6, 3)
        there = given.to(torch.device("cpu"))
        for field, number, tensor in zip(given._fields, given, there, strict=True):
            assert (number is None) == (tensor is None), f"{name}: {field}"
            if number is not None:
                assert (tensor.item(), tensor.dtype, tensor.ndim) == (number, torch.float64, 0), f"{name}: {field}"
        assert (given.frequency_slope is None) == (loss.frequency_scale is None)
        assert (given.tanh_slope is None) == (loss.sparsity not in ("tanh", "l1"))


def test_steps_from_the_device_are_those_from_the_host():
    """A step that is given its numbers makes the update of one that finds them, bit for bit."""
    states = []
    for own in (True, False):
        state, x, loss, room = small_step("bf16")
        for _ in range(3):
            state.ready()
            given = None if own else scheduled(loss, EARLY, state.next_column())
            sparse_step(state, x, loss, EARLY, room, given)
        states.append(state.tensors())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_the_values_of_a_captured_step_can_be_replaced():
    given = Scheduled.of(Loss(0.1, 0.1), EARLY, 6, 3)
    memory = given.values()
    there = given.like(memory)
    memory.copy_(Scheduled.of(Loss(0.2, 0.1), LATE, 6, 4).values())
    assert [number.item() for number in there if number is not None] == [LATE.learning_rate, 0.2, 4]


def test_numbers_for_a_gpu_are_pinned():
    """A copy from other memory would wait for the steps under way."""
    with mock.patch.object(torch.cuda, "is_available", return_value=True), mock.patch.object(torch, "tensor") as made:
        Scheduled.of(Loss(0.1, 0.1), EARLY, 6, 3).values()
    assert made.call_args.kwargs["pin_memory"]
