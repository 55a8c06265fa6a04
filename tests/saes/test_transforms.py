"""What PyTorch can do to a `JumpReLUSAE` as a module: supported, or refused by name."""

import re

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from gemmascope import JumpReLUSAE
from tests.helpers import assert_bitwise_equal, normal

# jvp compiles its rules by what PyTorch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


@pytest.fixture
def sae():
    return JumpReLUSAE(4, 8, generator=torch.Generator().manual_seed(0))


def test_functional_call(sae):
    """Other weights for one call, of plain tensors, with gradients to them."""
    x, weights = normal(3, 4), {name: 2 * weight.detach() for name, weight in sae.named_parameters()}
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    found = torch.func.functional_call(sae, leaves, x)
    before = {name: weight.clone() for name, weight in sae.named_parameters()}
    with torch.no_grad():
        for name, weight in sae.named_parameters():
            weight.copy_(weights[name])
    assert_bitwise_equal("x_hat", found.detach(), sae(x).detach())
    found.square().sum().backward()
    sae(x).square().sum().backward()
    for name, weight in sae.named_parameters():
        assert_bitwise_equal(name, leaves[name].grad, weight.grad)
        assert not torch.equal(weight, before[name]) or not weight.any()


@pytest.mark.parametrize("method", ["forward", "encode", "encode_sparse", "jumprelu"])
def test_transforms(sae, method):
    call, x = getattr(sae, method), normal(3, 4)

    def refused(transform):
        return pytest.raises(
            TypeError, match=re.escape(f"x: expected a plain tensor, got one of torch.func.{transform},")
        )

    with refused("vmap"):
        torch.func.vmap(call)(x)
    with refused("jvp"):
        torch.func.jvp(call, (x,), (x,))
    with refused("grad"):
        torch.func.grad(lambda x: call(x).sum())(x)


def test_gradients_to_functional_weights(sae):
    def loss(weights):
        return torch.func.functional_call(sae, weights, normal(3, 4)).sum()

    with pytest.raises(TypeError, match=r"expected a plain tensor, got one of torch\.func\.grad,"):
        torch.func.grad(loss)(dict(sae.named_parameters()))


@pytest.mark.skipif(not distributed.is_available() or not distributed.is_gloo_available(), reason="needs gloo")
def test_fully_shard(sae, tmp_path):
    """FSDP2 refuses a parameter that is not contiguous, as the latent-major W_enc is: nothing is sharded."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(NotImplementedError, match=r"does not support non-contiguous parameters yet"):
            fully_shard(sae, mesh=init_device_mesh("cpu", (1,)))
    finally:
        distributed.destroy_process_group()
    assert type(sae) is JumpReLUSAE
    assert sae(normal(3, 4)).shape == (3, 4)
