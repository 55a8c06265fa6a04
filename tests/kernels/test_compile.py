"""The sparse operators under torch.compile: one graph, the eager bits, no recompilation for another batch size."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from gemmascope.kernels import SparseCode, decode, encode
from gemmascope.kernels.dispatch import triton_problem
from tests.helpers import LAYOUTS, assert_bitwise_equal, expanded, normal
from tests.kernels.native import needs_native

needs_triton = pytest.mark.skipif(triton_problem() is not None, reason=triton_problem() or "")
IMPLS = ["reference", pytest.param("cpu", marks=needs_native), pytest.param("triton", marks=needs_triton)]
BATCHES = (5, 9, 2)

# Dynamo itself makes what PyTorch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture
def counter():
    """A fresh compiler, allowed to trace outputs whose size depends on the data; counts what it compiles."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield CompileCounterWithBackend("aot_eager")  # the default backend would need a C++ compiler
    torch._dynamo.reset()


def operands(N, device, dtype=torch.float32):
    """x, W_enc, b_enc, threshold; W_dec, b_dec"""
    W = normal(40, 12, dtype=dtype, device=device, seed=1)
    biases = normal(40, device=device, seed=2), normal(40, device=device, seed=3).abs() + 3
    return (normal(N, 12, dtype=dtype, device=device), W.T, *biases), (W, W[0].clone())


@pytest.mark.parametrize("impl", IMPLS)
def test_encode(impl, counter, device):
    compiled = torch.compile(encode, backend=counter, fullgraph=True)
    for N in BATCHES:
        arguments, _ = operands(N, device)
        torch._dynamo.mark_dynamic(arguments[0], 0)
        expected = encode(*arguments, impl=impl)
        code = compiled(*arguments, impl=impl)
        assert expected.nnz > 0
        assert code.d_sae == 40
        for name in ("values", "indices", "offsets"):
            assert_bitwise_equal(name, getattr(code, name), getattr(expected, name))
    assert counter.frame_count == 1


@pytest.mark.parametrize("impl", IMPLS)
def test_decode_and_its_backward(impl, counter, device):
    def step(values, indices, offsets, W_dec, b_dec):
        return decode(SparseCode(values, indices, offsets, W_dec.shape[0]), W_dec, b_dec, impl=impl)

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for N in BATCHES:
        arguments, decoder = operands(N, device)
        code = encode(*arguments, impl="reference")[:3]
        for tensor in code:
            torch._dynamo.mark_dynamic(tensor, 0)
        leaves = [t.requires_grad_() for t in (code[0], *decoder)]
        grad = normal(N, 12, device=device, seed=4)
        results = []
        for function in (compiled, step):
            x_hat = function(leaves[0], *code[1:], *leaves[1:])
            results.append((x_hat, *torch.autograd.grad(x_hat, leaves, grad)))
        for name, got, want in zip(("x_hat", "dvalues", "dW_dec", "db_dec"), *results, strict=True):
            assert_bitwise_equal(name, got, want)
    assert counter.frame_count == 1


@pytest.mark.parametrize("impl", IMPLS)
def test_encode_and_decode_in_one_graph(impl, counter, device):
    """nnz is unknown while tracing and never leaves the graph."""

    def step(encoder, decoder):
        return decode(encode(*encoder, impl=impl), *decoder, impl=impl)

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for N in BATCHES:
        arguments = operands(N, device, torch.bfloat16)
        torch._dynamo.mark_dynamic(arguments[0][0], 0)
        assert_bitwise_equal("x_hat", compiled(*arguments), step(*arguments))
    assert counter.frame_count == 1


@needs_triton
@pytest.mark.parametrize("layout", [None, "transposed"])
def test_registered_operators_pass_opcheck(layout, device):
    from gemmascope.kernels.gpu import decode as gpu_decode
    from gemmascope.kernels.gpu import encode as gpu_encode

    (x, W_enc, b_enc, threshold), (W_dec, b_dec) = operands(7, device, torch.float16)
    lay = LAYOUTS.get(layout, lambda tensor: tensor)
    x, W_enc, W_dec = lay(x), lay(W_enc), lay(W_dec)
    code = encode(x, W_enc, b_enc, threshold, impl="reference")[:3]
    grad = expanded(normal(7, 12, dtype=torch.float16, device=device, seed=4))
    torch.library.opcheck(gpu_encode.encode_op, (x, W_enc, b_enc, threshold))
    torch.library.opcheck(gpu_decode.decode_forward, (*code, W_dec, b_dec))
    torch.library.opcheck(gpu_decode.backward_values_op, (grad, *code, W_dec))
    torch.library.opcheck(gpu_decode.backward_weight_op, (grad, *code, W_dec))
