"""An SAE in training and what a user may do to it, for the tests of the training state."""

import pytest
import torch
from torch import nn

from gemmascope.kernels import Rule
from gemmascope.saes import JumpReLUSAE
from gemmascope.training.config import TrainConfig
from gemmascope.training.step import sparse_step
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
    """What `trainer` must be equal to: one of its own, given the same weights and `others`, the second moments and
    counters, value by value, and bf16 copies made of those weights."""
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
    """As the allocator may do of itself: new memory where the old lay."""
    address, given, others = sae.W_dec.data_ptr(), unit_rows(), []
    sae.W_dec.data = torch.empty(0)
    while not others or (others[-1].data_ptr() != address and len(others) < 1000):
        others.append(torch.empty(F, D))
    sae.W_dec.data = others[-1].copy_(given)


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
