"""The operators under torch.compile: what they are without it, gradients included. Those of inference to the bit, as
one graph and without recompilation for another batch size."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from gemmascope import kernels
from gemmascope.kernels import Objective, Rule, SparseCode, decode, encode
from gemmascope.kernels.dispatch import triton_problem
from gemmascope.kernels.implementations import NEED_CAPACITY
from tests.helpers import LAYOUTS, assert_bitwise_equal, expanded, normal
from tests.kernels.entries import batch
from tests.kernels.native import needs_native

needs_triton = pytest.mark.skipif(triton_problem() is not None, reason=triton_problem() or "")
IMPLS = ["reference", pytest.param("cpu", marks=needs_native), pytest.param("triton", marks=needs_triton)]
EVERY_IMPL = ["pytorch", *IMPLS]  # plain PyTorch written for speed is more than one graph
BATCHES = (5, 9, 2)

pytestmark = [
    # Dynamo itself makes what PyTorch deprecates.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    # What plain PyTorch says once is said at every compilation.
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """None here: Dynamo does not trace what poisons it."""


@pytest.fixture
def counter():
    """A fresh compiler, allowed to trace outputs whose size depends on the data; counts what it compiles."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield CompileCounterWithBackend("aot_eager")  # the default backend would need a C++ compiler
    torch._dynamo.reset()


@pytest.fixture
def device(device, request) -> torch.device:
    """That of the implementation under test."""
    impl = request.node.callspec.params.get("impl", "triton")
    return device if impl == "triton" else torch.device("cpu")


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


def differentiable(name, impl, device, dtype):
    """A function of tensors to tensors, its leaves, and the gradients of its outputs."""
    (x, W_enc, b_enc, threshold), (W_dec, b_dec) = operands(7, device, dtype)
    code = encode(x, W_enc, b_enc, threshold, impl="reference")
    low = {"dtype": dtype, "device": device}
    if name == "decode":
        function = lambda values, *decoder: (decode(code._replace(values=values), *decoder, impl=impl),)  # noqa: E731
        return function, (code.values, W_dec, b_dec), (normal(7, 12, seed=4, **low),)
    if name == "preactivations":
        function = lambda *leaves: (kernels.preactivations(*leaves, impl=impl),)  # noqa: E731
        return function, (x, W_enc, b_enc), (normal(7, 40, device=device, seed=4),)
    function = lambda *leaves: kernels.jumprelu(*leaves, 0.5, impl=impl)[:2]  # noqa: E731
    upstream = normal(7, 40, seed=4, **low), normal(7, device=device, seed=5)
    return function, (3 * normal(7, 40, seed=6, **low), b_enc, threshold), upstream


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", EVERY_IMPL)
@pytest.mark.parametrize("name", ["decode", "preactivations", "jumprelu"])
def test_gradients_are_the_eager_ones(name, impl, dtype, counter, device):
    """Also where nothing is converted: torch 2.11 then loses gradients, see `autograd._output`.

    What is written for speed in plain PyTorch may be too much for the compiler, which then says so; nothing is wrong.
    """
    function, leaves, upstream = differentiable(name, impl, device, dtype)
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    results = []
    for run in (function, torch.compile(function, backend=counter)):
        try:
            outputs = run(*leaves)
        except torch._dynamo.exc.TorchDynamoException:
            assert (impl, name) == ("pytorch", "decode")
            return
        results.append((*outputs, *torch.autograd.grad(outputs, leaves, upstream)))
    for want, got in zip(*results, strict=True):
        assert want.any()
        assert_bitwise_equal(name, got, want)


def every_result(impl, inputs, W_enc, b_enc, u):
    """Of the operators of a training step, on both routes, from entries of the reference."""
    results = []
    entries, x, W_dec, b_dec, threshold, s = inputs
    d_sae, objective, rule = len(threshold), Objective(0.5, 0.03, 0.2, 0.7, True), Rule(0.1, 0.9, 1e-3, True)
    arguments = x, W_enc.T, b_enc, threshold, 0.5
    found = kernels.encode_entries(*arguments, 99 if impl in NEED_CAPACITY else None, impl=impl)
    nnz = found.offsets[-1]
    results += (found.z[:nnz], found.latents[:nnz], found.tokens[:nnz], found.offsets)
    out = kernels.residual_pass(entries, x, W_dec, b_dec, impl=impl)
    stored = entries.offsets[-1]
    results += (out.residual, out.squared_error, out.l0, out.u[:stored])
    transposed = kernels.by_latent(entries, d_sae, impl=impl)
    results += (transposed.order[:stored], transposed.offsets)
    sums = kernels.latent_pass(entries, out.u, transposed, threshold, s, objective, impl=impl)
    results += (*(part[:stored] for part in sums[:3]), *sums[3:])
    gradients = kernels.weight_gradients(transposed, sums, out.residual, x, impl=impl)
    results += gradients
    results.append(kernels.encoder_times(W_enc, sums.db_enc, impl=impl))
    code = kernels.dense_encode(*arguments, impl=impl)
    results += code
    dense = kernels.dense_backward(u.clone(), code, threshold, s, objective, impl=impl)
    results += dense
    ok, step = torch.ones((), dtype=torch.int32, device=x.device), torch.tensor(5, device=x.device)
    moments = [torch.full_like(t, 0.01) for t in (W_enc, W_dec, b_enc, threshold)]
    last = torch.arange(d_sae, device=x.device) % 5
    for update in ("entries", "dense", "nothing"):
        weights = (t.clone() for t in (W_enc, W_dec, b_enc, threshold, *moments, last))
        state = kernels.LatentState(*weights)
        if update == "entries":
            kernels.update_from_entries(state, transposed, sums, out.residual, x, rule, ok, step, impl=impl)
        elif update == "dense":
            kernels.update_from_dense(state, *gradients, *dense[1:], code.touched, rule, ok, step, impl=impl)
        else:
            kernels.settle(state, step, rule.beta2, impl=impl)
        results += [t for t in state if t is not None]
    return results


@pytest.mark.parametrize(
    "impl",
    [
        "reference",
        "pytorch",
        pytest.param("cpu", marks=needs_native),
        pytest.param("triton", marks=pytest.mark.gpu),  # Dynamo knows kernels, not their interpreter
    ],
)
def test_operators_of_the_training_step(impl, device):
    """They need not be one graph, only right."""
    inputs = batch(5, 6, 4, device=device)
    shapes = (6, 4), (6,), (5, 6)
    weights = [normal(*shape, device=device, seed=20 + i) for i, shape in enumerate(shapes)]
    torch._dynamo.reset()
    eager = every_result(impl, inputs, *weights)
    compiled = torch.compile(every_result, backend="eager")(impl, inputs, *weights)
    rounding = 4 * torch.finfo(torch.float32).eps  # Dynamo takes `addcdiv_` apart, which rounds once more
    for got, want in zip(compiled, eager, strict=True):
        exact = {} if want.is_floating_point() else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(got, want, **{"rtol": rounding, "atol": rounding} | exact)
    torch._dynamo.reset()


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
