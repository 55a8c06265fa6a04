"""Copies of a trainer, of its state and of its SAE; the bf16 copies of the weights."""

import copy
import io
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gemmascope.kernels.dispatch import triton_problem
from gemmascope.training.state import COPIES, ROOM
from gemmascope.training.step import dense_step, sparse_step
from tests.training.changes import (
    ACTIONS,
    UNCOUNTED,
    D,
    F,
    assert_same,
    by_itself,
    copies_are_right,
    every_way,
    fresh,
    in_training,
    other_strides,
    replace_data,
    rows,
    take,
    values,
    write_all,
    write_counted,
    write_row,
)

# ---- copies of a trainer, of its state, of its SAE


def saved_and_loaded(owner):
    file = io.BytesIO()
    torch.save(owner, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # noqa: TID251


COPIERS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda owner: pickle.loads(pickle.dumps(owner)),
    "torch.save": saved_and_loaded,
}
every_copier = pytest.mark.parametrize("copier", COPIERS.values(), ids=COPIERS)


@every_copier
@every_way
def test_a_copied_trainer_goes_on_alone(copier, compute_dtype, route):
    trainer, uncopied = in_training(compute_dtype, route), in_training(compute_dtype, route)
    twin = copier(trainer)
    assert twin.sae is twin.state.sae
    assert twin.sae is not trainer.sae
    before = values(trainer)
    assert_same(twin, before)
    take(twin)
    assert_same(trainer, before)
    for each in (trainer, uncopied):
        take(each)
    assert_same(trainer, uncopied)
    assert_same(twin, uncopied)
    assert twin.report() == trainer.report() == uncopied.report()
    if compute_dtype == "bf16":
        assert copies_are_right(twin.state)


@every_copier
def test_a_copied_trainer_holds_the_steps_in_flight(copier):
    trainer, other = in_training(), in_training()
    trainer.run_ahead = 3
    for each in (trainer, other):
        write_row(each.sae)  # so that those in flight are withheld
        take(each, 2)
    assert trainer.state.updates == 4
    twin = copier(trainer)
    assert trainer.state.updates == twin.state.updates == 6
    assert_same(twin, other)
    for each in (trainer, twin, other):
        take(each)
        each.flush()
    assert_same(trainer, other)
    assert_same(twin, other)


@every_copier
@pytest.mark.parametrize("step", [sparse_step, dense_step])
@pytest.mark.parametrize("compute_dtype", ["fp32", "bf16"])
def test_a_copied_state_goes_on_alone(copier, step, compute_dtype):
    state = in_training(compute_dtype).state
    twin = copier(state)
    before = values(state)
    figures = by_itself(step, twin)
    assert_same(state, before)
    assert by_itself(step, state).loss == figures.loss
    assert_same(state, twin)
    write_all(twin.sae)
    assert not torch.equal(twin.sae.W_dec, state.sae.W_dec)


@every_copier
def test_a_copied_sae_is_left_alone(copier):
    trainer, uncopied = in_training(), in_training()
    sae = copier(trainer.sae)
    weights = copy.deepcopy(sae.state_dict())
    take(trainer)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in sae.state_dict().items())
    sae.bfloat16().W_dec.data.zero_()
    for each in (trainer, uncopied):
        take(each, 3 if each is uncopied else 0)
    assert_same(trainer, uncopied)


def test_a_trainer_copied_with_its_sae_stays_one_thing():
    trainer = in_training()
    twin, sae = copy.deepcopy((trainer, trainer.sae))
    assert twin.sae is sae


# ---- bf16 copies


def test_copies_are_made_anew_only_after_a_change():
    trainer = in_training()
    for _ in range(2):
        turn = trainer.state.turn
        for step in range(20):
            take(trainer, 1, step)
            assert not trainer.state._fresh
        assert trainer.state.turn == turn + 20
        write_counted(trainer.sae)
        take(trainer, 1)
        assert trainer.state._fresh
        assert trainer.state.turn == turn + 20


def test_what_no_count_shows_costs_one_repetition():
    trainer, launched = in_training(), []
    launch, trainer._launch = trainer._launch, lambda *job: launched.append(job[1]) or launch(*job)
    take(trainer, 1)
    write_row(trainer.sae)
    take(trainer, 2)
    assert launched == [4, 5, 5, 6]


@pytest.mark.parametrize("step", [sparse_step, dense_step])
@pytest.mark.parametrize("action", UNCOUNTED, ids=lambda action: action.__name__)
def test_a_step_by_itself_is_withheld_and_says_why(action, step):
    state = in_training().state
    action(state.sae)
    before = values(state)
    for _ in range(2):
        assert by_itself(step, state).stalled == COPIES
        assert_same(state, before, but=("stalled",))
    state.resume()
    assert by_itself(step, state).stalled == 0
    assert state.updates == before["updates"] + 1
    assert copies_are_right(state)


@pytest.mark.parametrize("step", [sparse_step, dense_step])
@pytest.mark.parametrize("action", [action for action in ACTIONS if action not in UNCOUNTED], ids=lambda a: a.__name__)
def test_a_step_by_itself_makes_copies_anew(action, step):
    state = in_training().state
    action(state.sae)
    updates = state.updates.clone()
    assert by_itself(step, state).stalled == 0
    assert state.updates == updates + 1
    assert copies_are_right(state)


def test_one_element_is_found_when_its_column_comes():
    state = in_training().state
    quiet = 3
    for name, column in (("W_dec", 2), ("W_enc", 6)):
        found = 0
        state.tensors()[name][quiet, column] += 0.5
        for _ in range(D):
            state.ready()
            found += int(state.copies_differ())
        assert found == 1
        state.resume()
        state.ready()


def test_copies_that_are_not_finite_are_no_endless_repetition():
    trainer = in_training()
    trainer.sae.W_dec.data[3, 1] = torch.nan
    take(trainer, D + 1)
    assert trainer.step == 4 + D + 1
    assert trainer.state.updates + trainer.state.skipped == trainer.step
    assert trainer.state.skipped > 0


def test_looking_does_not_wait_for_the_device():
    class NoAnswers(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return function(*args, **(kwargs or {}))

    state = in_training().state
    with NoAnswers(), torch.no_grad():
        for action in (replace_data, write_row, other_strides):
            action(state.sae)
            for _ in range(2):
                state.ready()
                state.copies_differ()
            state.resume()


@pytest.mark.skipif(triton_problem() is not None, reason="needs triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernels in the interpreter")
def test_room_and_copies_are_told_apart():
    """Steps that lack room, then one whose copies are stale as well, all of them looked at two steps later."""
    trainers = [fresh(impl="triton") for _ in range(2)]
    roomy, cramped = trainers
    roomy.capacity, cramped.capacity, cramped.run_ahead = 6 * F, 8, 2
    reasons, retire = [], cramped._make_room
    cramped._make_room = lambda n_entries: reasons.append(int(cramped.state.stalled)) or retire(n_entries)
    for trainer in trainers:
        for seed in range(2):
            trainer.update(rows(seed, 6))
        trainer.flush()
        write_row(trainer.sae)
        trainer.capacity = 6 * F if trainer is roomy else 8
        for seed in range(2, 4):
            trainer.update(rows(seed, 6))
        trainer.flush()
    assert_same(cramped, roomy)
    assert reasons == [ROOM, ROOM]
    assert cramped.state.updates == 4
