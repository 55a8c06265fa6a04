"""Whatever is done to an SAE in training or to its trainer, they stay one thing, or the next step says what is wrong.

What a step must come to is told by a twin: a trainer of its own that is given the same weights, second moments and
counters value by value, and bf16 copies made of those weights.
"""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gemmascope.kernels import Rule
from gemmascope.kernels.dispatch import triton_problem
from gemmascope.saes import JumpReLUSAE
from gemmascope.training.config import TrainConfig
from gemmascope.training.state import COPIES, ROOM, TrainState
from gemmascope.training.step import dense_step, sparse_step
from gemmascope.training.trainer import SAETrainer

D, F, N = 8, 24, 64
WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
WAYS = [(dtype, route) for dtype in ("fp32", "bf16") for route in ("sparse", "dense")] + [("fp32", "reference")]
every_way = pytest.mark.parametrize(("compute_dtype", "route"), WAYS)


def rows(seed=0, n=N):
    generator = torch.Generator().manual_seed(seed)
    dictionary = torch.randn(20, D, generator=generator)
    return 5 * torch.rand(n, 20, generator=generator).pow(4) @ dictionary + 1


def fresh(compute_dtype="bf16", route="sparse", **options):
    config = TrainConfig.short(
        d_sae=F, batch_size=N, steps=100, learning_rate=5e-3, lr_warmup_steps=0, l0_warmup_steps=0, bandwidth=0.05,
        compute_dtype=compute_dtype, route=route, lr_decay_steps=0,
    )  # fmt: skip
    return SAETrainer(config, rows(n=400), **options)


def take(trainer, steps=3, seed=100):
    for step in range(steps):
        trainer.update(rows(seed + step))


def in_training(*arguments, **options):
    trainer = fresh(*arguments, **options)
    take(trainer, 4, seed=50)
    return trainer


def by_itself(step, state):
    """One step without a trainer."""
    x, config = rows(200) / state.sae.input_scale, fresh().config
    rule = Rule(5e-3, config.adam_beta2, config.adam_eps, False)
    return step(state, x, config.loss, rule, *([None] if step is sparse_step else []))


def values(owner):
    state = owner.state if isinstance(owner, SAETrainer) else owner
    return {name: tensor.clone() for name, tensor in state.tensors().items()}


def assert_same(found, expected, but=()):
    found, expected = (t if isinstance(t, dict) else values(t) for t in (found, expected))
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert name in but or torch.equal(found[name], tensor), name


def twin_of(trainer, others):
    """A trainer with the weights of ``trainer`` and ``others`` for its second moments and counters."""
    twin = fresh(trainer.config.compute_dtype, trainer.config.route)
    twin.step = trainer.step
    twin.sae.input_scale, twin.sae.pre_encoder_bias = trainer.sae.input_scale, trainer.sae.pre_encoder_bias
    given = dict(others) | {name: getattr(trainer.sae, name).detach() for name in WEIGHTS}
    given["W_enc"] = given["W_enc"].T
    given |= {f"{name}_low": given[name].bfloat16() for name in ("W_enc", "W_dec") if f"{name}_low" in given}
    for name, tensor in twin.state.tensors().items():
        tensor.copy_(given[name])
    return twin


def copies_are_right(state):
    weights = state.tensors()
    return all(torch.equal(weights[f"{n}_low"], weights[n].bfloat16()) for n in ("W_enc", "W_dec"))


def unit_rows(seed=7):
    W = torch.randn(F, D, generator=torch.Generator().manual_seed(seed))
    return W / W.norm(dim=1, keepdim=True)


def other_sae():
    generator = torch.Generator().manual_seed(3)
    sae = JumpReLUSAE(D, F, input_scale=9.0, pre_encoder_bias=False, threshold_init=0.1, generator=generator)
    with torch.no_grad():
        sae.b_dec.add_(0.1)
    return sae


# ---- what a user may do to the SAE of a trainer


def replace_data(sae):
    sae.W_dec.data = unit_rows()


def replace_all_data(sae):
    for name in WEIGHTS:
        getattr(sae, name).data = getattr(other_sae(), name).data


def replace_data_at_the_same_address(sae):
    """The allocator may, and here does, give the second copy the address of the first."""
    address = sae.W_dec.data_ptr()
    storage = sae.W_dec.untyped_storage()
    for _ in range(100):
        storage = None
        sae.W_dec.data = unit_rows()
        sae.W_dec.data = unit_rows(8)
        if sae.W_dec.data_ptr() == address:
            return
    assert storage is None


def write_all(sae):
    sae.W_dec.data[:] = unit_rows()


def write_row(sae):
    sae.W_dec.data[3] = unit_rows()[3]


def write_encoder_row(sae):
    sae.W_enc.data[:, 5] = unit_rows()[5]


def multiply(sae):
    sae.W_enc.data.mul_(1.25)


def write_counted(sae):
    with torch.no_grad():
        sae.W_dec[2] = unit_rows()[2]
        sae.W_enc.mul_(0.75)


def optimise(sae):
    sae(rows()).square().mean().backward()
    torch.optim.SGD(sae.parameters(), lr=1e-2).step()


def replace_parameter(sae):
    sae.W_dec = nn.Parameter(unit_rows())


def replace_every_parameter(sae):
    for name in WEIGHTS:
        setattr(sae, name, nn.Parameter(getattr(other_sae(), name).detach().clone().contiguous()))


def made_in_inference_mode(sae):
    with torch.inference_mode():
        W_dec = nn.Parameter(unit_rows())
    sae.W_dec = W_dec


def other_strides(sae):
    sae.W_enc.data = sae.W_enc.data.contiguous()
    sae.W_dec.data = sae.W_dec.data.T.contiguous().T
    sae.b_enc.data = sae.b_enc.data.repeat_interleave(2)[::2]


def one_memory_for_two(sae):
    sae.W_enc.data = sae.W_dec.data.T


def load(sae):
    sae.load_state_dict(other_sae().state_dict())


def load_assigned(sae):
    sae.load_state_dict(other_sae().state_dict(), assign=True)


def load_assigned_not_latent_major(sae):
    state = {name: value.contiguous() for name, value in other_sae().state_dict().items()}
    sae.load_state_dict(state, assign=True)


def bf16_and_back(sae):
    sae.bfloat16().float()


def fp64_and_back(sae):
    sae.to(torch.float64).to(torch.float32)


def another_scale(sae):
    sae.input_scale *= 2


ACTIONS = [
    replace_data, replace_all_data, replace_data_at_the_same_address, write_all, write_row, write_encoder_row, multiply,
    write_counted, optimise, replace_parameter, replace_every_parameter, made_in_inference_mode, other_strides,
    one_memory_for_two, load, load_assigned, load_assigned_not_latent_major, bf16_and_back, fp64_and_back,
    another_scale,
]  # fmt: skip
UNCOUNTED = [write_all, write_row, write_encoder_row, multiply]


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


def test_fvu_is_measured_in_the_units_of_the_sae():
    trainer = in_training()
    variance = trainer.variance
    trainer.sae.input_scale *= 2
    assert trainer.variance == variance / 4


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
    sae.W_enc = None


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
    remove: rf"sae: W_enc is missing; training began with one of shape \[{D}, {F}\]",
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
