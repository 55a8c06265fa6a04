"""What PyTorch can do to a function beside calling it: the operators refuse it by name, forward and backward."""

import re

import pytest
import torch
from torch.autograd import forward_ad

from gemmascope import kernels
from gemmascope.kernels.arguments import check_tensor
from tests.helpers import normal

# jvp compiles its rules by what PyTorch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning", "ignore:Sparse:UserWarning")

N, D, F = 3, 4, 5
X, PRE, CODE = normal(N, D), normal(N, F), kernels.SparseCode.from_dense(torch.eye(N, F))
W, B, THETA, B_DEC = normal(F, D, seed=1), normal(F, seed=2), normal(F, seed=3).abs(), torch.zeros(D)
PUBLIC = {
    "x": lambda x: kernels.preactivations(x, W.T, B),
    "W_enc": lambda W_enc: kernels.preactivations(X, W_enc, B),
    "pre": lambda pre: kernels.jumprelu(pre, B, THETA).f,
    "threshold": lambda threshold: kernels.jumprelu(PRE, B, threshold).f,
    "W_dec": lambda W_dec: kernels.decode(CODE, W_dec, B_DEC),
}
GIVEN = {"x": X, "W_enc": W.T, "pre": PRE, "threshold": THETA, "W_dec": W}


def refused(name: str, kind: str):
    return pytest.raises(TypeError, match=re.escape(f"{name}: expected a plain tensor, got one of {kind}, which"))


@pytest.mark.parametrize("name", PUBLIC)
def test_transforms(name):
    function, given = PUBLIC[name], GIVEN[name]
    with refused(name, "torch.func.vmap"):
        torch.func.vmap(function)(torch.stack((given, given)))
    with refused(name, "torch.func.grad"):
        torch.func.grad(lambda t: function(t).sum())(given)
    with refused(name, "torch.func.grad"):
        torch.func.jacrev(function)(given)
    with refused(name, "torch.func.jvp"):
        torch.func.jvp(function, (given,), (given,))


@pytest.mark.parametrize("name", PUBLIC)
def test_forward_mode(name):
    with forward_ad.dual_level():
        PUBLIC[name](GIVEN[name])  # a plain tensor is none of its business
        with refused(name, "forward-mode differentiation"):
            PUBLIC[name](forward_ad.make_dual(GIVEN[name], GIVEN[name]))


@pytest.mark.parametrize("impl", ["reference", "pytorch"])
def test_several_gradients_at_once(impl):
    pre = normal(N, F).requires_grad_()
    f = kernels.jumprelu(pre, B, THETA, impl=impl).f
    with refused("jumprelu_backward", "torch.func.vmap"):
        torch.autograd.grad(f, pre, torch.ones(2, N, F), is_grads_batched=True)


def test_distributed_tensors():
    """Without a process group: the name of the class is all that is looked at."""
    sharded = type("DTensor", (torch.Tensor,), {"__module__": "torch.distributed.tensor"})
    with pytest.raises(TypeError, match=re.escape("x: expected a plain tensor, got a DTensor, of which this process")):
        check_tensor("x", torch.ones(2, 2).as_subclass(sharded), ("N", "d_model"))


@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr"])
def test_sparse_tensors(layout):
    x = torch.eye(3).to_sparse() if layout == "sparse_coo" else torch.sparse_csr_tensor([0, 1], [0], [1.0], size=(1, 3))
    with pytest.raises(TypeError, match=f"x: expected a plain tensor, got one of layout {layout}"):
        check_tensor("x", x, ("N", "d_model"))
