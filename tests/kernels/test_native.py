"""The native CPU backend's encode, decode and jumprelu against the fp64 reference, by each instruction set."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemmascope import kernels
from gemmascope.kernels import SparseCode, reference
from gemmascope.kernels.cpu import build as native_build
from gemmascope.kernels.implementations import operator
from tests.helpers import (
    LAYOUTS,
    assert_bitwise_equal,
    assert_same_not_finite,
    assert_within_budget,
    lattice,
    normal,
    shape_cases,
)
from tests.kernels.native import ISAS, needs_native, operands_with_ties, screening, threads  # noqa: F401 (a fixture)

pytestmark = needs_native
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=ISAS, autouse=True)
def isa(request):
    before = torch.ops.gemmascope_cpu.isa()
    torch.ops.gemmascope_cpu.use_isa(request.param)
    yield request.param
    torch.ops.gemmascope_cpu.use_isa(before)


def operands(N, d, F, dtype=torch.float32, make=normal):
    """x, latent-major W_enc, b_enc and a threshold that one entry in six passes."""
    x, W = make(N, d, dtype=dtype), make(F, d, dtype=dtype, seed=1)
    return x, W.T, make(F, seed=2), max(d, 1) ** 0.5 + 0.25 * make(F, seed=3).abs()


def assert_code_matches(x, W_enc, b_enc, threshold):
    """Entries of the exact z, up to those whose z is within its rounding of the threshold."""
    code = kernels.encode(x, W_enc, b_enc, threshold, impl="cpu")
    values, indices, offsets, F = code
    assert (values.dtype, indices.dtype, offsets.dtype) == (torch.float32, torch.int32, torch.int64)
    assert (offsets[0], offsets[-1], F) == (0, len(values), W_enc.shape[1])
    tokens = code.token_indices()
    assert ((tokens * F + indices).diff() > 0).all(), "latents do not ascend inside the rows"
    z = x.double() @ W_enc.double() + b_enc.double()
    rounding = (x.shape[1] + 2) * 2.0**-24 * (x.double().abs() @ W_enc.double().abs() + b_enc.double().abs())
    certain = (z - threshold).abs() > rounding
    kept = torch.zeros_like(certain)
    kept[tokens, indices.long()] = True
    assert torch.equal(kept[certain], (z > threshold)[certain])
    eager = x.float() @ W_enc.float() + b_enc.float()
    assert_within_budget("values", values, z[kept], eager[kept])


@pytest.mark.usefixtures("screening")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "F", "d"), shape_cases(32, 96, 256))
def test_encode_matches_reference(N, F, d, dtype):
    assert_code_matches(*operands(N, d, F, dtype))


@pytest.mark.usefixtures("screening")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [2, 4, 5, 8, 9, 15, 16, 17, 511, 512, 513, 1030])
def test_encode_around_the_blocks_of_tokens(N, dtype):
    assert_code_matches(*operands(N, 19, 101, dtype))


@pytest.mark.usefixtures("screening")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [1, 5, 16, 33, 600])
@pytest.mark.parametrize(("d", "bias"), [(1, 1.0), (31, 1.0), (256, 1.0), (300, 1.0), (700, 1.0), (2048, 3e7)])
def test_encode_decides_by_the_preactivations(d, bias, N, dtype):
    """A bias that dwarfs the products rounds off as much of each piece of them as the threshold is away."""
    x, W_enc, b_enc, threshold, z = operands_with_ties(N, d, dtype, bias)
    active = z > threshold
    for count in (1, 3):
        with threads(count):
            code = kernels.encode(x, W_enc, b_enc, threshold, impl="cpu")
            assert_bitwise_equal("z", operator("preactivations", "cpu")(x, W_enc, b_enc), z)
        assert_bitwise_equal("values", code.values, z[active])
        assert_bitwise_equal("indices", code.indices, active.nonzero()[:, 1].int())
        assert_bitwise_equal("l0", code.offsets.diff(), active.sum(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "F", "d"), shape_cases(32, 96, 256))
def test_preactivations_match_reference(N, F, d, dtype):
    for layout in (lambda t: t, *LAYOUTS.values()):
        x, W_enc, b_enc = (layout(t) for t in operands(N, d, F, dtype)[:3])
        z = operator("preactivations", "cpu")(x, W_enc, b_enc)
        exact, eager = x.double() @ W_enc.double() + b_enc, x.float() @ W_enc.float() + b_enc
        assert z.is_contiguous()
        assert_within_budget("z", z, exact, eager)


def test_shapes_of_the_preactivations_are_known_in_advance():
    x, W_enc, b_enc, _ = operands(3, 5, 7, torch.bfloat16)
    preactivations = torch.ops.gemmascope_cpu.preactivations.default
    torch.library.opcheck(preactivations, (x, W_enc.T, b_enc), test_utils="test_faketensor")


@pytest.mark.usefixtures("screening")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_encode_any_strides(layout):
    x, W_enc, b_enc, threshold = operands(19, 21, 70)
    assert_code_matches(layout(x), layout(W_enc), layout(b_enc), layout(threshold))


@pytest.mark.usefixtures("screening")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [3, 20])
def test_a_tie_is_not_active(N, dtype):
    """On a lattice every precision computes the same z, so the code must be the reference's, bit for bit."""
    x, W_enc, b_enc, _ = operands(N, 6, 200, dtype, lattice)
    threshold = lattice(200, seed=9).abs()
    assert ((x.double() @ W_enc.double() + b_enc) == threshold).sum() > 5
    code = kernels.encode(x, W_enc, b_enc, threshold, impl="cpu")
    for name, ours, expected in zip(
        ("values", "indices", "offsets"),
        code[:3],
        reference.encode_forward(x, W_enc, b_enc, threshold),
        strict=True,
    ):
        assert_bitwise_equal(name, ours, expected)


@pytest.mark.usefixtures("screening")
@pytest.mark.parametrize("d", [1023, 1024, 1300])
def test_encode_of_more_columns_than_a_piece(d):
    assert_code_matches(*operands(40, d, 50))


# Of both signs, far apart, all in one, and squares that leave fp32 or its normal numbers.
SIZES = {
    "like real ones": lambda t: t * (20 * normal(t.shape[1], seed=8)).exp2().clamp(max=30),
    "one column": lambda t: t * torch.eye(t.shape[1])[0] * 1e3,
    "one column above the rest": lambda t: t + torch.eye(t.shape[1])[0] * 1e4,
    "rows apart": lambda t: t * torch.logspace(-12, 12, len(t))[:, None],
    "columns apart": lambda t: t * torch.logspace(-9, 9, t.shape[1]),
    "tiny": lambda t: t * 1e-16,
    "huge": lambda t: t * 1e17,
    "some rows zero": lambda t: t * (torch.arange(len(t)) % 3 > 0)[:, None],
    "zero": torch.zeros_like,
}


@pytest.mark.usefixtures("screening")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_encode_of_any_size(size, dtype):
    """Thresholds in the midst of what a latent finds, exactly at it, and just below and above it."""
    x, W = SIZES[size](normal(40, 131)).to(dtype), SIZES[size](normal(96, 131, seed=1)).to(dtype)
    b_enc = normal(96, seed=2) * (x.float() @ W.float().T).std()
    z = x.float() @ W.float().T + b_enc
    nearly = torch.tensor([1.0, 1 - 1e-3, 1 + 1e-3, 1 - 1e-6]).repeat(24)
    threshold = (z.sort(0).values[32] * nearly).abs()
    assert_code_matches(x, W.T, b_enc, threshold)
    assert_code_matches(x, W.T, torch.zeros(96), threshold)


@pytest.mark.usefixtures("screening")
def test_the_bound_of_the_screen_holds_where_all_errors_add_up():
    """All columns alike: each is rounded the same way, and the error is the largest that Cauchy and Schwarz allow."""
    missed = []
    for d in range(1, 256):
        x, W, z = torch.ones(20, d), torch.ones(3, d), torch.full((3,), float(d))
        for threshold in (z * (1 - 1e-5), z * (1 + 1e-5)):
            code = kernels.encode(x, W.T, torch.zeros(3), threshold, impl="cpu")
            if (len(code.values) == 60) != bool(threshold[0] < d):
                missed.append((d, float(threshold[0])))
    assert not missed


@pytest.mark.parametrize("share", [0.001, 0.02, 0.2])
def test_screening_or_not_is_a_matter_of_time_alone(share):
    """Left to itself it is one or the other, block by block; the entries are the same to the bit."""
    use = torch.ops.gemmascope_cpu.use_screening
    x, W, b_enc = normal(600, 128), normal(200, 128, seed=1), torch.zeros(200)
    W[:48] = 0.0
    threshold = torch.full((200,), 128**0.5 * float(torch.special.ndtri(torch.tensor(1 - share))))
    codes = {}
    try:
        for limit in (None, -1.0, 0.05, 1.0):
            use(limit)
            codes[limit] = kernels.encode(x, W.T, b_enc, threshold, impl="cpu")
    finally:
        use(None)
    for code in codes.values():
        for name in ("values", "indices", "offsets"):
            assert_bitwise_equal(name, getattr(code, name), getattr(codes[-1.0], name))


def test_screening_gives_up_late_where_its_first_tokens_misled():
    """Silent tokens first: only the rest fires."""
    use = torch.ops.gemmascope_cpu.use_screening
    x, W, b_enc, threshold = normal(200, 64), normal(90, 64, seed=1), torch.zeros(90), torch.full((90,), 4.0)
    x[:64] = 0.0
    codes = []
    try:
        for limit in (-1.0, 0.05):
            use(limit)
            codes.append(kernels.encode(x, W.T, b_enc, threshold, impl="cpu"))
    finally:
        use(None)
    for a, b in zip(*(code[:3] for code in codes), strict=True):
        assert_bitwise_equal("entry", a, b)


NOT_FINITE = (torch.nan, torch.inf, -torch.inf)
# Sums of these overflow or not by their order; a product with a window of 0 must not.
HOSTILE = (*NOT_FINITE, 3e38, -3e38, -0.0)


@pytest.mark.usefixtures("screening")
@pytest.mark.parametrize("N", [5, 40])
@pytest.mark.parametrize("where", ["x", "W_enc", "b_enc", "threshold"])
@pytest.mark.parametrize("value", NOT_FINITE, ids=str)
def test_encode_keeps_what_is_not_finite_visible(where, value, N):
    x, W_enc, b_enc, threshold = operands(N, 6, 40, make=lattice)
    operand = {"x": x, "W_enc": W_enc.T, "b_enc": b_enc, "threshold": threshold}[where]
    operand.view(-1)[3:5] = value
    code = SparseCode(*kernels.encode(x, W_enc, b_enc, threshold, impl="cpu")[:3], 40)
    expected = SparseCode(*reference.encode_forward(x, W_enc, b_enc, threshold), 40)
    for name in ("indices", "offsets"):
        assert_bitwise_equal(name, getattr(code, name), getattr(expected, name))
    assert_same_not_finite("values", code.values, expected.values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "F", "d"), shape_cases(7, 20, 33))
def test_decode_matches_reference(N, F, d, dtype):
    code = SparseCode.from_dense(normal(N, F).relu())
    W_dec, b_dec, grad = normal(F, d, dtype=dtype, seed=1), normal(d, seed=2), normal(N, d, dtype=dtype, seed=3)
    exact = reference.decode_forward(code.values.double(), *code[1:3], W_dec.double(), b_dec.double())
    eager = reference.decode_forward(*code[:3], W_dec, b_dec)
    assert_within_budget("x_hat", kernels.decode(code, W_dec, b_dec, impl="cpu"), exact, eager)
    backward = operator("decode_backward", "cpu")
    exact = reference.decode_backward(
        grad.double(), code.values.double(), *code[1:3], W_dec.double(), need_values=True, need_W=True
    )
    eager = reference.decode_backward(grad, *code[:3], W_dec, need_values=True, need_W=True)
    ours = backward(grad, *code[:3], W_dec, need_values=True, need_W=True)
    for name, *three in zip(("dvalues", "dW_dec"), ours, exact, eager, strict=True):
        assert_within_budget(name, *three)
    assert backward(grad, *code[:3], W_dec, need_values=False, need_W=False) == (None, None)


def test_decode_by_autograd():
    values = torch.tensor([2.0, 3.0], requires_grad=True)
    code = SparseCode(values, torch.tensor([1, 0], dtype=torch.int32), torch.tensor([0, 1, 1, 2]), 2)
    W_dec = torch.tensor([[1.0, 10.0], [2.0, 20.0]], requires_grad=True)
    x_hat = kernels.decode(code, W_dec, torch.tensor([0.5, -0.5]), impl="cpu")
    assert x_hat.tolist() == [[4.5, 39.5], [0.5, -0.5], [3.5, 29.5]]
    x_hat.backward(torch.tensor([[1.0, 0.0], [5.0, 5.0], [0.0, 1.0]]))
    assert values.grad.tolist() == [2.0, 10.0]
    assert W_dec.grad.tolist() == [[0.0, 3.0], [2.0, 0.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "F"), shape_cases(33, 64))
def test_jumprelu_matches_reference(N, F, dtype):
    pre, b_enc, threshold = normal(N, F, dtype=dtype), normal(F, seed=1), normal(F, seed=2).abs()
    out = kernels.jumprelu(pre, b_enc, threshold, impl="cpu")
    f, l0, count = reference.jumprelu_forward(pre, b_enc, threshold)
    assert_bitwise_equal("f", out.f, f)
    assert_bitwise_equal("l0", out.l0, l0)
    assert_bitwise_equal("firing_count", out.firing_count, count)
    arguments = normal(N, F, dtype=dtype, seed=3), normal(N, seed=4), pre, b_enc, threshold
    exact = reference.jumprelu_backward(*(t.double() for t in arguments), 0.5)
    eager = reference.jumprelu_backward(*arguments, 0.5)
    ours = operator("jumprelu_backward", "cpu")(*arguments, 0.5)
    for name, *three in zip(("dpre", "db_enc", "dthreshold"), ours, exact, eager, strict=True):
        assert_within_budget(name, *three)


@pytest.mark.parametrize("value", HOSTILE, ids=str)
@pytest.mark.parametrize("where", range(5), ids=["grad_f", "grad_l0", "pre", "b_enc", "threshold"])
def test_jumprelu_keeps_what_is_not_finite_visible(where, value):
    arguments = [
        lattice(40, 37),
        lattice(40, seed=1),
        lattice(40, 37, seed=2),
        lattice(37, seed=3),
        lattice(37, seed=4).abs(),
    ]
    if where == 4 and abs(value) == 3e38:
        value = 1e37  # θ/ε is to stay finite
    arguments[where].view(-1)[3:9] = value
    forward = operator("jumprelu_forward", "cpu")(*arguments[2:])
    for name, ours, expected in zip(
        ("f", "l0", "firing_count"), forward, reference.jumprelu_forward(*arguments[2:]), strict=True
    ):
        assert_bitwise_equal(name, ours, expected)
    ours = operator("jumprelu_backward", "cpu")(*arguments, 0.5)
    expected = reference.jumprelu_backward(*arguments, 0.5)
    for name, a, b in zip(("dpre", "db_enc", "dthreshold"), ours, expected, strict=True):
        assert_same_not_finite(name, a, b)


@pytest.mark.usefixtures("screening")
def test_same_bits_with_any_number_of_threads():
    x, W_enc, b_enc, threshold = operands(530, 40, 300)
    W_dec, b_dec = W_enc.T.contiguous(), normal(40, seed=5)
    pre, grad = x @ W_enc, normal(530, 40, seed=6)
    found = []
    for count in (1, 2, 5):
        with threads(count):
            code = kernels.encode(x, W_enc, b_enc, threshold, impl="cpu")
            found.append(
                [
                    *code[:3],
                    kernels.decode(code, W_dec, b_dec, impl="cpu"),
                    *operator("decode_backward", "cpu")(grad, *code[:3], W_dec, need_values=True, need_W=True),
                    *kernels.jumprelu(pre, b_enc, threshold, impl="cpu"),
                    *operator("jumprelu_backward", "cpu")(pre, grad[:, 0], pre, b_enc, threshold, 0.5),
                ]
            )
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert_bitwise_equal("result", a, b)


def index(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    ("indices", "offsets", "message"),
    [
        (index(0, 3), index(0, 2, dtype=torch.int64), r"indices: expected indices in \[0, 3\), got 3 at 1"),
        (index(-1, 0), index(0, 2, dtype=torch.int64), r"indices: expected indices in \[0, 3\), got -1 at 0"),
        (index(0, 1), index(1, 2, dtype=torch.int64), "offsets: expected a first entry of 0, got 1"),
        (index(0, 1), index(0, 3, 2, dtype=torch.int64), "offsets: expected ascending entries, got 2 after 3"),
        (index(0, 1), index(0, 7, dtype=torch.int64), "offsets: expected to end with 2, got 7"),
        (index(0, 1), index(0, -1, dtype=torch.int64), "offsets: expected ascending entries, got -1 after 0"),
    ],
)
def test_every_index_is_checked(indices, offsets, message):
    code, W_dec, b_dec = SparseCode(torch.ones(2), indices, offsets, 3), torch.ones(3, 4), torch.ones(4)
    with pytest.raises(ValueError, match=message):
        kernels.decode(code, W_dec, b_dec, impl="cpu")
    with pytest.raises(ValueError, match=message):
        torch.ops.gemmascope_cpu.decode_values_gradient(torch.ones(len(offsets) - 1, 4), indices, offsets, W_dec)


def test_operators_refuse_what_they_do_not_take():
    ops, x, W = torch.ops.gemmascope_cpu, torch.ones(2, 3), torch.ones(4, 3)
    with pytest.raises(TypeError, match="x: expected dtype Float or BFloat16, got Double"):
        ops.encode(x.double(), W, torch.ones(4), torch.ones(4))
    with pytest.raises(ValueError, match="W_enc: expected 3 columns, got 2"):
        ops.encode(x, W[:, :2], torch.ones(4), torch.ones(4))
    with pytest.raises(ValueError, match="W_enc: expected 3 columns, got 2"):
        ops.preactivations(x, W[:, :2], torch.ones(4))
    with pytest.raises(TypeError, match="W_enc: expected the dtype of x, got BFloat16"):
        ops.encode(x, W.bfloat16(), torch.ones(4), torch.ones(4))
    with pytest.raises(ValueError, match=r"b_enc: expected shape \[4\], got \[5\]"):
        ops.encode(x, W, torch.ones(5), torch.ones(4))
    with pytest.raises(TypeError, match="threshold: expected dtype Float, got Double"):
        ops.encode(x, W, torch.ones(4), torch.ones(4).double())
    with pytest.raises(ValueError, match=r"isa: expected one of .*portable, got mmx"):
        ops.use_isa("mmx")


HUGE = 2**63 - 1

ABSURD = {
    "latents of no columns": lambda ops: ops.weighted_sum(torch.empty(HUGE, 0), torch.empty(0)),
    "columns of no tokens": lambda ops: ops.dense_gate(torch.empty(0, HUGE), torch.empty(0), 0.5, False),
    "tokens of no columns": lambda ops: ops.encode(torch.empty(HUGE, 0), torch.empty(1, 0), *torch.ones(2, 1)),
    "columns of nothing": lambda ops: ops.preactivations(torch.empty(0, HUGE), torch.empty(0, HUGE), torch.empty(0)),
    "fewer latents than none": lambda ops: ops.by_latent(index(), None, -1),
    "more latents than int64 counts": lambda ops: ops.by_latent(index(), None, HUGE),
    "fewer entries than none": lambda ops: ops.by_latent(index(0), -1, 1),
    "room for fewer than none": lambda ops: ops.encode_entries(*torch.ones(2, 1, 1), *torch.ones(2, 1), 0.5, -1),
    "no step": lambda ops: update_by_native(ops, step=0),
}


def update_by_native(ops, step, last=0):
    state = [torch.ones(1, 1), torch.ones(1, 1), torch.ones(1), torch.ones(1)]
    state += [torch.zeros_like(t) for t in state] + [index(last, dtype=torch.int64), *[torch.empty(0)] * 6]
    gradients = torch.ones(1, 1), torch.ones(1, 1), torch.ones(1), torch.ones(1), index(1)
    ops.update_from_dense(state, *gradients, 1e-3, 0.999, 1e-8, False, 0.0, step)
    return state


@pytest.mark.parametrize("name", ABSURD)
def test_no_number_is_too_absurd_to_be_refused(name):
    """Sizes that cost no memory where another size is 0, and counts: nothing may overflow before it is checked."""
    with pytest.raises(ValueError, match="expected"):
        ABSURD[name](torch.ops.gemmascope_cpu)


def test_room_beyond_memory_is_refused_by_pytorch():
    with pytest.raises(RuntimeError, match="overflow"):
        torch.ops.gemmascope_cpu.encode_entries(*torch.ones(2, 1, 1), *torch.ones(2, 1), 0.5, HUGE)


@pytest.mark.parametrize(("step", "last"), [(HUGE, -HUGE - 1), (1, HUGE), (HUGE, 0)])
def test_updates_of_any_age_decay(step, last):
    """The difference of two int64 need not be one; β2 to its power is 0 or Inf, as for any number as large."""
    state = update_by_native(torch.ops.gemmascope_cpu, step, last)
    assert state[8].tolist() == [step]
    assert state[4].isfinite().all() == (step > last)


def test_what_is_written_in_place_leaves_a_lazy_copy_alone():
    """Memory that is shared until someone writes: only the tensor that was given may change."""
    ops, names = torch.ops.gemmascope_cpu, ("z", "u", "W_enc")
    tensors = {name: normal(3, 4, seed=seed) for seed, name in enumerate(names)}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    lazy = {name: torch._lazy_clone(tensor) for name, tensor in tensors.items()}
    z = ops.dense_gate(lazy["z"], torch.full((4,), 0.5), 0.1, False)[0]
    words = index(1, 2, 3).view(3, 1)
    ops.dense_backward(
        lazy["u"], normal(3, 4), words, words, index(1, 1, 1, 1), torch.ones(4), torch.ones(3), 0.5, 0, 0, 0, False
    )
    state = [lazy["W_enc"], torch.ones(3, 4), torch.ones(3), torch.ones(3)]
    state += [torch.zeros_like(t) for t in state] + [index(0, 0, 0, dtype=torch.int64), *[torch.empty(0)] * 6]
    gradients = torch.ones(3, 4), torch.ones(3, 4), torch.ones(3), torch.ones(3), index(1, 1, 1)
    ops.update_from_dense(state, *gradients, 1e-3, 0.999, 1e-8, False, 0.0, 1)
    assert z.data_ptr() == lazy["z"].data_ptr()
    for name in names:
        assert_bitwise_equal(name, tensors[name], before[name])
        assert not torch.equal(lazy[name], before[name])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_code_decodes_or_is_refused(data):
    """Whatever the indices and offsets: either the reference's result or a ValueError, never a crash."""
    F, d, N = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 40)), data.draw(st.integers(0, 6))
    nnz = data.draw(st.integers(0, 12))
    valid = data.draw(st.booleans())
    numbers = st.integers(0, F - 1) if valid else st.integers(-(2**31), 2**31 - 1) | st.integers(-2, F + 2)
    indices = torch.tensor(data.draw(st.lists(numbers, min_size=nnz, max_size=nnz)), dtype=torch.int32)
    cuts = st.integers(0, nnz) if valid else st.integers(-3, nnz + 3)
    inner = data.draw(st.lists(cuts, min_size=max(N - 1, 0), max_size=max(N - 1, 0)))
    starts = [0, *(sorted(inner) if valid else inner), *([nnz] if N else [])]
    offsets = torch.tensor(starts, dtype=torch.int64)
    values, W_dec, b_dec = normal(nnz), normal(F, d, seed=1), normal(d, seed=2)
    lawful = offsets[0] == 0 and (offsets.diff() >= 0).all() and offsets[-1] == nnz
    lawful = lawful and ((indices >= 0) & (indices < F)).all()
    if not lawful:
        with pytest.raises(ValueError):
            kernels.decode(SparseCode(values, indices, offsets, F), W_dec, b_dec, impl="cpu")
        return
    ours = kernels.decode(SparseCode(values, indices, offsets, F), W_dec, b_dec, impl="cpu")
    torch.testing.assert_close(ours, reference.decode_forward(values, indices, offsets, W_dec, b_dec))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    N=st.integers(0, 40),
    d=st.integers(0, 70),
    F=st.integers(0, 130),
    seed=st.integers(0, 999),
    dtype=st.sampled_from(DTYPES),
    limit=st.sampled_from([None, -1.0, 0.0, 0.05, 1.0]),
)
def test_any_shape_encodes(N, d, F, seed, dtype, limit):
    """On a lattice, where rounding decides nothing."""
    torch.ops.gemmascope_cpu.use_screening(limit)
    x, W = lattice(N, d, dtype=dtype, seed=seed), lattice(F, d, dtype=dtype, seed=seed + 1)
    b_enc, threshold = lattice(F, seed=seed + 2), lattice(F, seed=seed + 3).abs() * (1 + d**0.5)
    try:
        ours = kernels.encode(x, W.T, b_enc, threshold, impl="cpu")
    finally:
        torch.ops.gemmascope_cpu.use_screening(None)
    for a, b in zip(ours[:3], reference.encode_forward(x, W.T, b_enc, threshold), strict=True):
        assert_bitwise_equal("entry", a, b)


def test_the_best_instruction_set_is_the_default():
    assert ISAS[0] == torch.ops.gemmascope_cpu.isas().split()[0]
    assert native_build.problem() is None
