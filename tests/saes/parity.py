"""The same SAE in its own package's arithmetic, in fp64 and accelerated: that the three agree."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gemmascope import accelerate, decelerate, kernels
from tests.helpers import assert_bitwise_equal, assert_within_budget


def made(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """What ``make`` draws, the same weights each time."""
    torch.manual_seed(seed)
    return make()


@contextlib.contextmanager
def counted():
    """A dict of how often each operator of inference ran inside."""
    calls = dict.fromkeys(("encode", "decode", "preactivations"), 0)
    with pytest.MonkeyPatch.context() as patch:
        for name in calls:
            right = getattr(kernels, name)

            def call(*arguments, name=name, right=right, **options):
                calls[name] += 1
                return right(*arguments, **options)

            patch.setattr(kernels, name, call)
        yield calls


@torch.no_grad()
def assert_same_function(make: Callable[[], nn.Module], x: Tensor, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Codes and reconstructions of x by encode, decode and a call, within the budget of the package's own fp32; it is
    our kernels that encode, in both.

    Returns the code and the reconstruction, after the object has been given back as it was.
    """
    theirs, exact, ours = made(make), made(make).to(torch.float64), made(make)
    before = {name: (id(p), p.clone(), p.stride()) for name, p in ours.named_parameters()}
    kind = type(ours)
    assert accelerate(ours, impl=impl) is ours
    assert isinstance(ours, kind)
    # Each code is decoded at once: some normalise, and remember the norm of what they encoded last.
    (plain_f, plain), (exact_f, goal) = (
        (code := one.encode(given), one.decode(code)) for one, given in ((theirs, x), (exact, x.double()))
    )
    with counted() as calls:
        again = ours.decode(f := ours.encode(x))
        x_hat = ours(x)
    assert calls["encode"] + calls["preactivations"] == 2, calls
    assert_within_budget("encode", f, exact_f, plain_f)
    assert_within_budget("decode", again, goal, plain)
    assert_within_budget("forward", x_hat, exact(x.double()), theirs(x))
    assert decelerate(ours) is ours
    assert type(ours) is kind
    for name, parameter in ours.named_parameters():
        same, value, stride = before[name]
        assert (id(parameter), parameter.stride()) == (same, stride), name
        assert_bitwise_equal(name, parameter, value)
    assert_bitwise_equal("given back", ours(x), theirs(x))
    return f, x_hat
