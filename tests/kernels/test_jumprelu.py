"""The JumpReLU kernels against the reference: python -m pytest tests/test_jumprelu.py"""

import itertools

import pytest
import torch

from gemmascope import kernels
from gemmascope.kernels.dispatch import interpreting
from tests.helpers import (
    DTYPES,
    LAYOUTS,
    assert_bitwise_equal,
    assert_within_budget,
    expanded,
    lattice,
    normal,
    shape_cases,
)

pytest.importorskip("triton")
from gemmascope.kernels.gpu import jumprelu as gpu_jumprelu

BANDWIDTH = 0.5  # two lattice steps: |z − θ| = ε/2 happens, and ε ≠ 1 cannot hide a missing 1/ε
BLOCK_F = gpu_jumprelu.FORWARD.block_f
CASES = [
    *shape_cases(gpu_jumprelu.BACKWARD.block_n * gpu_jumprelu.BACKWARD.tiles, BLOCK_F),
    pytest.param(gpu_jumprelu.FORWARD.block_n + 1, 3, id="one row in a second tile"),
    pytest.param(gpu_jumprelu.FORWARD.block_n * gpu_jumprelu.FORWARD.tiles + 1, 3, id="one row in a second program"),
]


def inputs(n, f, dtype=torch.float32, device="cpu", make=lattice):
    """pre, b_enc, threshold, grad_f, grad_l0. On the lattice, decisions in every precision are those of fp64."""
    pre, b_enc = make(n, f, dtype=dtype, device=device, seed=1), make(f, dtype=dtype, device=device, seed=2)
    threshold = make(f, device=device, seed=3).abs()
    return pre, b_enc, threshold, normal(n, f, dtype=dtype, device=device, seed=4), normal(n, device=device, seed=5)


def run(impl, pre, b_enc, threshold, grad_f, grad_l0, bandwidth=BANDWIDTH):
    """Outputs and gradients through the public function."""
    leaves = [t.detach().requires_grad_() for t in (pre, b_enc, threshold)]
    out = kernels.jumprelu(*leaves, bandwidth, impl=impl)
    grads = torch.autograd.grad((out.f, out.l0), leaves, (grad_f, grad_l0))
    names = ("f", "l0", "firing_count", "dpre", "db_enc", "dthreshold")
    return dict(zip(names, (*out, *grads), strict=True))


def check(pre, b_enc, threshold, grad_f, grad_l0, bandwidth=BANDWIDTH):
    """Elementwise results bit for bit like the reference in the same dtype; sums within the error budget."""
    args = (pre, b_enc, threshold, grad_f, grad_l0)
    actual = run("triton", *args, bandwidth)
    eager = run("reference", *args, bandwidth)
    for name in ("f", "l0", "firing_count", "dpre"):
        assert_bitwise_equal(name, actual[name], eager[name])
    exact = run("reference", *(t.double() for t in args), bandwidth)
    for name in ("f", "dpre", "db_enc", "dthreshold"):
        assert_within_budget(name, actual[name], exact[name], eager[name])
    return actual, exact


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "f"), CASES)
def test_matches_reference(n, f, dtype, device):
    actual, exact = check(*inputs(n, f, dtype, device))
    assert torch.equal(actual["l0"].double(), exact["l0"])
    assert torch.equal(actual["firing_count"], exact["firing_count"])


@pytest.mark.parametrize("n_partial", [1, gpu_jumprelu.REDUCE.block_n, 2 * gpu_jumprelu.REDUCE.block_n + 1])
def test_second_stage_of_the_sums(n_partial, device):
    """Alone, because it takes thousands of tokens to fill more than one of its steps."""
    partial = normal(2, n_partial, 37, device=device)
    db_enc, dthreshold = torch.empty(2, 37, device=device)
    gpu_jumprelu._sum_partials(partial, db_enc, dthreshold)
    for name, actual, rows in (("db_enc", db_enc, partial[0]), ("dthreshold", dthreshold, partial[1])):
        assert_within_budget(name, actual, rows.double().sum(0), rows.sum(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decides_in_fp32_whatever_the_input_dtype(dtype, device):
    pre, b_enc, threshold, grad_f, grad_l0 = inputs(65, 37, dtype, device, make=normal)
    threshold = (pre[7].float() + b_enc.float()).nextafter(torch.tensor(torch.inf, device=device))
    actual = run("triton", pre, b_enc, threshold, grad_f, grad_l0, bandwidth=1e-3)
    eager = run("reference", pre, b_enc, threshold, grad_f, grad_l0, bandwidth=1e-3)
    for name in ("f", "l0", "firing_count", "dpre"):
        assert_bitwise_equal(name, actual[name], eager[name])
    assert_within_budget("dthreshold", actual["dthreshold"], eager["dthreshold"].double(), eager["dthreshold"])
    assert actual["f"][7].count_nonzero() == 0  # one fp32 ulp below the threshold, equal to it in fp16 and bf16
    assert actual["dthreshold"].count_nonzero() == 37  # and inside of the window


def test_lattice_inputs_meet_ties_and_window_edges():
    pre, b_enc, threshold, *_ = inputs(65, 37)
    z = pre + b_enc
    assert (z == threshold).any()
    assert ((z - threshold).abs() == BANDWIDTH / 2).any()
    assert (((z - threshold).abs() < BANDWIDTH / 2) & (z < threshold)).sum() == 0  # one step is the edge itself
    check(*inputs(65, 37), bandwidth=2 * BANDWIDTH)  # now entries below the threshold lie in the window


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["pre", "b_enc", "threshold", "grad_f", "grad_l0"])
def test_honours_strides(which, layout, device):
    args = dict(zip(("pre", "b_enc", "threshold", "grad_f", "grad_l0"), inputs(13, 37, device=device), strict=True))
    args[which] = LAYOUTS[layout](args[which])
    check(**args)


def test_all_strided_at_once(device):
    for layout in LAYOUTS.values():
        check(*map(layout, inputs(9, 35, torch.bfloat16, device)))


def test_expanded_gradients_of_plain_sums(device):
    pre, b_enc, threshold, *_ = inputs(13, 37, device=device)
    ones = expanded(torch.ones(13, 37, device=device)), expanded(torch.ones(13, device=device))
    leaves = [t.clone().requires_grad_() for t in (pre, b_enc, threshold)]
    out = kernels.jumprelu(*leaves, BANDWIDTH, impl="triton")
    (out.f.sum() + out.l0.sum()).backward()
    expected = run("reference", pre, b_enc, threshold, *ones)
    for name, leaf in zip(("dpre", "db_enc", "dthreshold"), leaves, strict=True):
        torch.testing.assert_close(leaf.grad, expected[name])


@pytest.mark.parametrize("needs", [n for n in itertools.product((False, True), repeat=3) if any(n)])
def test_every_subset_of_gradients(needs, device):
    *tensors, grad_f, grad_l0 = inputs(13, 37, device=device)
    expected = run("reference", *tensors, grad_f, grad_l0)
    leaves = [t.clone().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
    out = kernels.jumprelu(*leaves, BANDWIDTH, impl="triton")
    assert out.f.requires_grad
    assert not out.firing_count.requires_grad
    torch.autograd.backward((out.f, out.l0), (grad_f, grad_l0))
    for name, leaf, need in zip(("dpre", "db_enc", "dthreshold"), leaves, needs, strict=True):
        assert (leaf.grad is not None) == need
        if need:
            torch.testing.assert_close(leaf.grad, expected[name])


@pytest.mark.parametrize("used", ["f", "l0"])
def test_one_output_used(used, device):
    pre, b_enc, threshold, grad_f, grad_l0 = inputs(13, 37, device=device)
    grads = {}
    for impl in ("reference", "triton"):
        leaf = threshold.clone().requires_grad_()
        out = kernels.jumprelu(pre, b_enc, leaf, 2 * BANDWIDTH, impl=impl)
        (grads[impl],) = torch.autograd.grad(getattr(out, used), leaf, {"f": grad_f, "l0": grad_l0}[used])
    assert grads["reference"].count_nonzero() > 0
    torch.testing.assert_close(grads["triton"], grads["reference"])


@pytest.mark.parametrize("b_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_bias_of_another_dtype(b_dtype, device):
    pre, b_enc, threshold, grad_f, grad_l0 = inputs(13, 37, torch.bfloat16, device)
    check(pre, b_enc.to(b_dtype), threshold, grad_f, grad_l0)


SPECIAL = (torch.nan, torch.inf, -torch.inf)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_finite_stays_visible(dtype, device):
    tensors = list(inputs(len(SPECIAL) * 4 + 1, 11, dtype, device))
    pre, b_enc, threshold, grad_f, grad_l0 = tensors
    for i, value in enumerate(SPECIAL):
        pre[i, 0], b_enc[1 + i], threshold[4 + i] = value, value, value
        grad_f[i, 7], grad_l0[i] = value, value
        pre[4 + i, 5] = value  # meets the infinite threshold
    actual, eager = run("triton", *tensors), run("reference", *tensors)
    assert not actual["f"][:3, 0].isfinite().any() or actual["f"][1, 0] == torch.inf
    for name, value in actual.items():
        assert torch.equal(value.isnan(), eager[name].isnan()), name
    for name in ("f", "l0", "firing_count", "dpre"):
        assert_bitwise_equal(name, actual[name], eager[name])
    for name in ("db_enc", "dthreshold"):
        torch.testing.assert_close(actual[name], eager[name], equal_nan=True)


@pytest.mark.skipif(not interpreting(), reason="the order of programs can be chosen in the interpreter only")
def test_bits_do_not_depend_on_program_order():
    from tests.kernels import sanitizer

    args = inputs(130, 300, make=normal)
    first = run("triton", *args)
    with sanitizer.sanitize(seed=1) as report:
        again = run("triton", *args)
    assert report.programs > 10
    for name in first:
        assert torch.equal(first[name], again[name]), name


def test_inputs_are_not_written(device):
    args = inputs(13, 37, device=device)
    before = [t.clone() for t in args]
    run("triton", *args)
    assert all(map(torch.equal, args, before))


def test_second_derivatives_raise(device):
    pre, b_enc, threshold, *_ = inputs(5, 7, device=device)
    leaf = pre.requires_grad_()
    out = kernels.jumprelu(leaf, b_enc, threshold, BANDWIDTH, impl="triton")
    (grad,) = torch.autograd.grad((out.f**2).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_registered_operators_pass_opcheck(device):
    pre, b_enc, threshold, grad_f, grad_l0 = inputs(13, 37, torch.float16, device)
    torch.library.opcheck(gpu_jumprelu.jumprelu_forward, (pre, b_enc, threshold))
    strided = LAYOUTS["transposed"](pre), b_enc, threshold
    torch.library.opcheck(gpu_jumprelu.jumprelu_forward, strided)
    torch.library.opcheck(gpu_jumprelu.jumprelu_backward, (expanded(grad_f), expanded(grad_l0), *strided, BANDWIDTH))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does so itself
def test_compiled_equals_eager_and_batch_is_dynamic(device):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")  # the default backend would need a C++ compiler

    def step(pre, b_enc, threshold):
        return kernels.jumprelu(pre, b_enc, threshold, BANDWIDTH, impl="triton")

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for n in (13, 65, 8):
        pre, b_enc, threshold, grad_f, grad_l0 = inputs(n, 37, device=device)
        torch._dynamo.mark_dynamic(pre, 0)
        results = []
        for function in (compiled, step):
            leaves = [t.requires_grad_() for t in (pre, b_enc, threshold)]
            out = function(*leaves)
            results.append((*out, *torch.autograd.grad((out.f, out.l0), leaves, (grad_f, grad_l0))))
        assert all(map(torch.equal, *results))
    assert counter.frame_count == 1


class TestOffsetsPast31Bits:
    """Proven by strides and outputs whose far end lies past 2³¹ elements, in address space that is never committed."""

    pytestmark = pytest.mark.skipif(not interpreting(), reason="single programs can be chosen in the interpreter only")

    @staticmethod
    def far_apart(shape, strides):
        """Two tensors of ``shape`` with huge strides, interleaved in one storage."""
        reach = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
        assert reach > 2**31
        storage = torch.empty(reach + 4096, dtype=torch.float16)
        return storage.as_strided(shape, strides), storage.as_strided(shape, strides, 4096)

    @pytest.mark.parametrize(
        # Strides that fit into 32 bits, so that only the product needs more: a larger one would widen it by itself.
        ("shape", "strides"),
        [((5, 7), (2**29 + 64, 1)), ((5, 3), (1, 2**30 + 64))],
        ids=["rows", "columns"],
    )
    def test_input_strides(self, shape, strides):
        from tests.kernels import sanitizer

        pre, b_enc, threshold, grad_f, grad_l0 = inputs(*shape, torch.float16)
        far_pre, far_grad = self.far_apart(shape, strides)
        far_pre.copy_(pre)
        far_grad.copy_(grad_f)
        with sanitizer.sanitize(race=False):
            actual = run("triton", far_pre, b_enc, threshold, far_grad, grad_l0)
            near = run("triton", pre, b_enc, threshold, grad_f, grad_l0)
        for name in near:
            assert torch.equal(actual[name], near[name]), name

    def test_outputs(self):
        from tests.kernels import sanitizer

        n, f = 2**15 + 1, 2**16  # the last row begins at element 2³¹
        pre, b_enc, threshold, grad_f, grad_l0 = inputs(1, f, torch.float16)
        last = slice(f - BLOCK_F, f)
        expected = run("reference", *(t[..., last] for t in (pre, b_enc, threshold, grad_f)), grad_l0)
        pre, grad_f, grad_l0 = pre.expand(n, f), grad_f.expand(n, f), grad_l0.expand(n)
        with sanitizer.sanitize(race=False, programs=lambda dims: [dims[0] * dims[1] - 1]):
            out, *_ = gpu_jumprelu.jumprelu_forward(pre, b_enc, threshold)
            dpre, *_ = gpu_jumprelu.jumprelu_backward(grad_f, grad_l0, pre, b_enc, threshold, BANDWIDTH)
        assert torch.equal(out[-1, last], expected["f"][0])
        assert torch.equal(dpre[-1, last], expected["dpre"][0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "f"), [(4096, 16384), (4095, 16411), (128, 131072)])
def test_full_shapes(n, f, dtype):
    actual, exact = check(*inputs(n, f, dtype, "cuda"))
    assert torch.equal(actual["l0"].double(), exact["l0"])
    again = run("triton", *inputs(n, f, dtype, "cuda"))
    for name in actual:
        assert torch.equal(actual[name], again[name]), name


@pytest.mark.gpu
def test_more_than_31_bits_of_entries():
    n, f = 2**15 + 3, 2**16
    pre, b_enc, threshold, grad_f, grad_l0 = inputs(3, f, torch.float16, "cuda")
    near = run("triton", pre, b_enc, threshold, grad_f, grad_l0)
    far = pre.new_zeros(n, f)
    far[-3:] = pre
    out, l0, _ = gpu_jumprelu.jumprelu_forward(far, b_enc, threshold)
    assert torch.equal(out[-3:], near["f"])
    assert torch.equal(l0[-3:], near["l0"])
