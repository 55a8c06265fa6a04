"""Settings of PyTorch around a call: its default dtype and device, and autocast. No operator's bits depend on them."""

import contextlib

import pytest
import torch
from torch import Tensor

from gemmascope import kernels
from gemmascope.kernels.dispatch import triton_problem
from tests.helpers import assert_bitwise_equal
from tests.kernels.native import needs_native
from tests.kernels.operators import OPERATORS, arguments, copied

needs_triton = pytest.mark.skipif(triton_problem() is not None, reason=triton_problem() or "")
DIFFERENTIABLE = {
    "jumprelu": ("pre", "b_enc", "threshold"),
    "preactivations": ("x", "W_enc", "b_enc"),
    "decode": ("code", "W_dec", "b_dec"),
}


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS = {
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "default float64": lambda: default_dtype(torch.float64),
    "default device meta": lambda: torch.device("meta"),
    "autocast bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
}


def tensors_of(name: str, value) -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, tuple):
        names = getattr(value, "_fields", range(len(value)))
        parts = (tensors_of(f"{name}.{part}", each) for part, each in zip(names, value, strict=True))
        return {key: tensor for part in parts for key, tensor in part.items()}
    return {}


def outcome(name: str, given: dict, impl: str) -> dict[str, Tensor]:
    """What an operator returns, what its arguments have become, and the gradients of its float results."""
    given = copied_arguments(given)
    leaves = {}
    for argument in DIFFERENTIABLE.get(name, ()):
        if argument == "code":
            leaves["values"] = given["code"].values.requires_grad_()
        else:
            leaves[argument] = given[argument].requires_grad_()
    out = tensors_of("out", getattr(kernels, name)(**given, impl=impl))
    if leaves:
        floats = [t for t in out.values() if t.requires_grad]
        # Of the operator's own dtype, whatever the defaults are.
        weights = [t.detach().mul(0.5).add(0.25) for t in floats]
        gradients = torch.autograd.grad(floats, list(leaves.values()), weights)
        out |= {f"gradient of {key}": each for key, each in zip(leaves, gradients, strict=True)}
    if name not in DIFFERENTIABLE:
        out |= {key: tensor for argument in given for key, tensor in tensors_of(argument, given[argument]).items()}
    return out


def copied_arguments(given: dict) -> dict:
    return {name: copied(value) for name, value in given.items()}


def surroundings_of_each_implementation():
    """All; by the interpreter, which takes half a minute for each, two in every run and the others in the slow lane."""
    for impl in ("reference", "pytorch", "cpu", "triton"):
        for name in SURROUNDINGS:
            marks = {"cpu": [needs_native], "triton": [needs_triton]}.get(impl, [])
            if impl == "triton" and name not in ("default bfloat16", "autocast bfloat16"):
                marks = [*marks, pytest.mark.slow]
            yield pytest.param(impl, name, marks=marks)


@pytest.mark.parametrize(("impl", "surroundings"), list(surroundings_of_each_implementation()))
def test_the_same_bits(impl, surroundings, device):
    if device.type != "cpu":
        pytest.skip("the interpreter's launchers are those of the device")
    given = arguments(impl)
    for name in OPERATORS:
        expected = outcome(name, given[name], impl)
        with SURROUNDINGS[surroundings]():
            found = outcome(name, given[name], impl)
        assert found.keys() == expected.keys()
        for key in expected:
            assert found[key].device == expected[key].device, f"{name}: {key}"
            assert_bitwise_equal(f"{name}: {key}", found[key], expected[key])


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_codes_are_the_same(surroundings):
    def methods(code):
        again = kernels.SparseCode.from_dense(code.to_dense())
        return [code.l0(), code.token_indices(), code.firing_count(), code.to_dense(), *again[:3], *code.to("cpu")[:3]]

    code = arguments("reference")["decode"]["code"]
    expected = methods(code)
    with SURROUNDINGS[surroundings]():
        found = methods(code)
    for a, b in zip(found, expected, strict=True):
        assert a.device == b.device
        assert_bitwise_equal("tensor", a, b)
