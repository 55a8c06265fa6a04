"""Any wrong argument of a public function is a ValueError or TypeError that names one: by hypothesis."""

import functools
import math
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemmascope import kernels
from tests.kernels.native import needs_native
from tests.kernels.operators import OPERATORS, arguments, copied

IMPLS = ["reference", "pytorch", pytest.param("cpu", marks=needs_native)]
quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool,
    torch.complex64,
)  # fmt: skip
plain_values = st.sampled_from(
    [
        None,
        "x",
        "",
        [],
        {},
        (),
        object(),
        -1,
        0,
        3,
        2**70,
        10**400,
        -2.5,
        0.0,
        1e-60,
        1e300,
        math.nan,
        math.inf,
        True,
        1j,
        b"x",
        torch.float32,
        lambda: None,
    ]
)


@st.composite
def tensors(draw):
    """Of any dtype, few dimensions, on the CPU or nowhere, dense or sparse."""
    shape = draw(st.lists(st.integers(0, 6), max_size=3))
    tensor = torch.ones(shape, dtype=draw(st.sampled_from(DTYPES)))
    kind = draw(st.sampled_from(["dense", "dense", "dense", "meta", "sparse", "grad"]))
    if kind == "meta":
        return tensor.to("meta")
    if kind == "sparse" and tensor.ndim:
        return tensor.to_sparse()
    if kind == "grad" and tensor.is_floating_point():
        return tensor.requires_grad_()
    return tensor


@st.composite
def variations(draw, tensor):
    """A tensor that is wrong in one thing: dtype, one size, device, the numbers."""
    kind = draw(st.sampled_from(["dtype", "longer", "shorter", "meta", "numbers", "scalar", "more"]))
    if kind == "dtype":
        return tensor.to(draw(st.sampled_from(DTYPES)))
    if kind in ("longer", "shorter") and tensor.ndim and tensor.shape[0]:
        return tensor[:-1].clone() if kind == "shorter" else torch.cat((tensor, tensor[:1]))
    if kind == "meta":
        return tensor.to("meta")
    if kind == "numbers" and not tensor.is_floating_point():
        wrong = tensor.clone()
        if wrong.numel():
            place = draw(st.integers(0, wrong.numel() - 1))
            wrong.view(-1)[place] = draw(st.sampled_from([-1, 7, 10**6, -(2**31), 2**31 - 1]))
        return wrong
    if kind == "scalar":
        return torch.zeros((), dtype=tensor.dtype)
    return tensor[None].clone()


@st.composite
def wrong(draw, value):
    """Something else in the place of ``value``: anything, or itself with one thing changed."""
    if isinstance(value, tuple) and draw(st.integers(0, 3)):
        field = draw(st.sampled_from(range(len(value))))
        parts = list(value)
        parts[field] = draw(wrong(parts[field]))
        return type(value)(*parts)
    if isinstance(value, torch.Tensor) and draw(st.booleans()):
        return draw(variations(value))
    return draw(plain_values | tensors())


good = functools.cache(arguments)


def refuses(name: str, names, call) -> None:
    """``call`` runs, or raises a ValueError or TypeError that begins with one of ``names``."""
    said = None
    try:
        call()
    except (ValueError, TypeError) as error:
        said = f"{type(error).__name__}: {error}"
    if said is not None:
        assert re.match(rf"\w+: ({'|'.join(names)})(\.\w+)*: ", said), f"{name}: {said}"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", OPERATORS)
@quick
@given(data=st.data())
def test_operators(name, impl, data):
    chosen = {key: copied(value) for key, value in good(impl)[name].items()}
    argument = data.draw(st.sampled_from(sorted(chosen)))
    fields = [field for value in chosen.values() for field in getattr(value, "_fields", ())]  # the native names
    chosen[argument] = data.draw(wrong(chosen[argument]))
    refuses(name, [*chosen, *fields, f"impl={impl!r}"], lambda: getattr(kernels, name)(**chosen, impl=impl))


@quick
@given(impl=plain_values, device=plain_values | tensors(), dtype=plain_values)
def test_choose(impl, device, dtype):
    refuses("choose", ["impl", "impl='cpu'", "device", "dtype"], lambda: kernels.choose(impl, "cpu", torch.float32))
    refuses("choose", ["device"], lambda: kernels.choose("auto", device, torch.float32))
    refuses("choose", ["dtype"], lambda: kernels.choose("auto", "cpu", dtype))


@pytest.mark.parametrize("method", ["check", "l0", "token_indices", "firing_count", "to_dense"])
@quick
@given(data=st.data())
def test_codes(method, data):
    code = data.draw(wrong(copied(good("reference")["decode"]["code"])))
    if isinstance(code, kernels.SparseCode):
        refuses(method, ["code"], getattr(code, method))


@quick
@given(f=wrong(torch.eye(3, 4)), device=plain_values)
def test_making_and_moving_codes(f, device):
    refuses("from_dense", ["f"], lambda: kernels.SparseCode.from_dense(f))
    refuses("to", ["device"], lambda: kernels.SparseCode.from_dense(torch.eye(3, 4)).to(device))
