"""Training inside `torch.autocast` has the bits that it has without, by every route of every implementation."""

import copy

import pytest
import torch

from gemmascope.saes import JumpReLUSAE
from gemmascope.training.config import Loss
from gemmascope.training.losses import loss_and_gradients
from gemmascope.training.sparse_loss import sparse_loss
from gemmascope.training.trainer import SAETrainer
from tests.kernels.native import needs_native
from tests.training.test_losses import LOSSES
from tests.training.test_trainer import config, sample

IMPLS = ["reference", "pytorch", pytest.param("cpu", marks=needs_native)]
every_impl = pytest.mark.parametrize("impl", IMPLS)
every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def make(impl):
    sae = JumpReLUSAE(8, 24, impl=impl, threshold_init=0.15, generator=torch.Generator().manual_seed(1))
    return sae, torch.randn(40, 8, generator=torch.Generator().manual_seed(2)) / 3


def gradients(sae):
    return [p.grad for p in sae.parameters()]


@every_dtype
@every_impl
@pytest.mark.parametrize("route", ["dense", "sparse", "reference"])
@pytest.mark.parametrize("compute_dtype", ["fp32", "bf16"])
def test_the_trainer(impl, route, compute_dtype, dtype):
    if compute_dtype == "bf16" and route == "reference":
        pytest.skip("the reference route is fp32")
    rows = sample()
    settings = config(route=route, compute_dtype=compute_dtype, lr_warmup_steps=0)
    plain, cast = (SAETrainer(settings, rows, impl=impl) for _ in range(2))
    batches = [sample(64, seed=seed) for seed in range(4)]
    for x in batches:
        plain.update(x)
    with torch.autocast("cpu", dtype=dtype):
        for x in batches:
            cast.update(x)
    assert plain.report() == cast.report()
    assert plain.report()["skipped"] == 0
    for name, tensor in plain.state.tensors().items():
        assert torch.equal(cast.state.tensors()[name], tensor), name


@every_dtype
@every_impl
@pytest.mark.parametrize("loss", ["l0", "tanh-frequency"])
@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
def test_the_differentiable_loss(impl, loss, inside, dtype):
    sae, x = make(impl)
    cast = copy.deepcopy(sae)
    plain = sparse_loss(sae, x, LOSSES[loss])
    plain.backward()
    with torch.autocast("cpu", dtype=dtype):
        value = sparse_loss(cast, x, LOSSES[loss])
        if inside:
            value.backward()
    if not inside:
        value.backward()
    assert torch.equal(value, plain)
    assert all(map(torch.equal, gradients(cast), gradients(sae)))


@every_dtype
def test_the_written_gradients(dtype):
    sae, x = make("reference")
    plain = loss_and_gradients(sae, x, Loss(0.1, 0.3))
    with torch.autocast("cpu", dtype=dtype):
        cast = loss_and_gradients(sae, x, Loss(0.1, 0.3))
    assert all(map(torch.equal, plain.gradients, cast.gradients))
    assert all(torch.equal(getattr(plain, name), getattr(cast, name)) for name in ("loss", "residual", "bound"))
