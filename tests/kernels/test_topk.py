"""`encode_topk` by every implementation against the reference, bit for bit on numbers that every sum gets exactly."""

import pytest
import torch

from gemmascope import kernels
from gemmascope.kernels import Entries, reference
from gemmascope.kernels.dispatch import triton_problem
from gemmascope.kernels.eager import inference as eager_inference
from gemmascope.kernels.entries import ACTIVE, LATENT, scratch_bytes
from gemmascope.kernels.implementations import operator
from tests.helpers import assert_bitwise_equal, lattice, normal
from tests.kernels.entries import limit_scratch
from tests.kernels.native import ISAS, needs_native, threads

# In the interpreter, or on a GPU where there is one.
needs_triton = (
    pytest.mark.gpu
    if torch.cuda.is_available()
    else pytest.mark.skipif(triton_problem() is not None, reason="needs triton")
)
IMPLS = [
    pytest.param("pytorch", id="pytorch"),
    pytest.param("cpu", id="cpu", marks=needs_native),
    pytest.param("triton", id="triton", marks=needs_triton),
]
every_impl = pytest.mark.parametrize("impl", IMPLS)
every_of = pytest.mark.parametrize("of", ["token", "batch"])


@pytest.fixture(params=IMPLS)
def impl(request, monkeypatch) -> str:
    """In small pieces: tiles of three tokens and a few latents, chunks of three tokens."""
    monkeypatch.setattr(eager_inference, "PRODUCT_TOKENS", 3)
    monkeypatch.setattr(eager_inference, "Z_ELEMENTS", 12)
    limit_scratch(monkeypatch, 3 * scratch_bytes(41))
    return request.param


def device_of(impl: str) -> torch.device:
    return torch.device("cuda" if impl == "triton" and torch.cuda.is_available() else "cpu")


def encode(impl, x, W_enc, b_enc, k, **options) -> Entries:
    device = device_of(impl)
    options = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    found = kernels.encode_topk(x.to(device), W_enc.to(device), b_enc.to(device), k, impl=impl, **options)
    return Entries(*(t.cpu() for t in found))


def assert_same(found: Entries, expected: Entries):
    for name in Entries._fields:
        assert_bitwise_equal(name, getattr(found, name), getattr(expected, name))


def operands(N, d, F, dtype=torch.float32, make=lattice):
    return make(N, d, dtype=dtype), make(F, d, dtype=dtype, seed=1).T, make(F, seed=2)


# ---- the reference


def by_hand(z, k, of, among):
    """Chosen pairs, in order, by sorting them all."""
    pairs = [
        (-(value if abs(value) < torch.inf else torch.inf), n, j)
        for n, row in enumerate(z.tolist())
        for j, value in enumerate(row)
        if ((among is None or among[j]) and not value <= 0) or (value == -torch.inf and (among is None or among[j]))
    ]
    if of == "batch":
        chosen = sorted(pairs)[: k * len(z)]
    else:
        chosen = [pair for n in range(len(z)) for pair in sorted(p for p in pairs if p[1] == n)[:k]]
    return sorted((n, j) for _, n, j in chosen)


def spoil(z):
    """Values that are no number, one of each kind and two of one, in a row and a column each."""
    z[1, 2], z[1, 3], z[2, 0], z[2, 4], z[3, 1] = torch.nan, torch.inf, -torch.inf, torch.inf, torch.nan
    return z


@every_of
@pytest.mark.parametrize("k", [1, 2, 5, 6])
@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("some", [False, True])
def test_reference_is_a_sort_of_all_pairs(of, k, bad, some):
    z = lattice(5, 6, reach=3)  # many ties
    z[0] = -1
    z = spoil(z) if bad else z
    among = torch.tensor([True, True, False, True, True, False]) if some else None
    chosen = reference.largest(z, k, of, among)
    expected = by_hand(z, k, of, among)
    assert chosen.nonzero().tolist() == [list(pair) for pair in expected]
    eye = torch.eye(6)
    if bad:  # no product leaves what is not finite where it is
        return
    found = reference.encode_topk(z, eye, torch.zeros(6), k, of, among)
    nnz = len(expected)
    assert found.z.shape == found.latents.shape == found.tokens.shape == (5 * k,)
    assert found.offsets.tolist() == [sum(n < row for n, _ in expected) for row in range(6)]
    assert (found.latents[:nnz] & LATENT).tolist() == [j for _, j in expected]
    assert (found.latents[:nnz] >= ACTIVE).all()
    assert found.tokens[:nnz].tolist() == [n for n, _ in expected]
    assert found.z[:nnz].tolist() == [z[n, j] for n, j in expected]
    assert (found.latents[nnz:] == 6).all()
    assert not found.z[nnz:].any()
    assert not found.tokens[nnz:].any()


# ---- the implementations

SHAPES = [(1, 1, 1), (1, 3, 5), (7, 5, 41), (6, 3, 16), (3, 1, 2), (5, 4, 40)]


@every_of
@pytest.mark.parametrize(("N", "d", "F"), SHAPES)
def test_equals_the_reference(impl, N, d, F, of):
    x, W_enc, b_enc = operands(N, d, F)
    for k in sorted({1, min(3, F), F - F // 3, F}):
        assert_same(encode(impl, x, W_enc, b_enc, k, of=of), reference.encode_topk(x, W_enc, b_enc, k, of))


@pytest.mark.parametrize("impl", ["pytorch", pytest.param("cpu", marks=needs_native)])
def test_random_cases(impl, monkeypatch):
    """Small shapes, many ties, some latents, what is not finite, in tiles of a few latents."""
    monkeypatch.setattr(eager_inference, "PRODUCT_TOKENS", 4)
    monkeypatch.setattr(eager_inference, "Z_ELEMENTS", 32)
    generator = torch.Generator().manual_seed(0)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    for seed in range(150):
        N, d, F = draw(1, 30), draw(1, 4), draw(1, 30)
        x, W_enc = lattice(N, d, seed=seed, reach=2), lattice(F, d, seed=seed + 1000, reach=2).T
        b_enc, k = lattice(F, seed=seed + 2000, reach=2), draw(1, F)
        if draw(0, 2) == 0:
            b_enc[draw(0, F - 1)] = (torch.nan, torch.inf, -torch.inf)[draw(0, 2)]
        among = torch.rand(F, generator=generator) < 0.5 if draw(0, 1) else None
        of = ("token", "batch")[draw(0, 1)]
        found = encode(impl, x, W_enc, b_enc, k, of=of, among=among)
        assert_same(found, reference.encode_topk(x, W_enc, b_enc, k, of, among))


@every_of
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6])
def test_among_some_latents(impl, of, share):
    x, W_enc, b_enc = operands(6, 3, 40)
    among = torch.rand(40, generator=torch.Generator().manual_seed(0)) < share
    assert among.any() == (share > 0)
    for k in (1, 5, 40):
        found = encode(impl, x, W_enc, b_enc, k, of=of, among=among)
        assert_same(found, reference.encode_topk(x, W_enc, b_enc, k, of, among))


@every_of
def test_what_is_equal_or_not_positive(impl, of):
    x, W_enc, b_enc = torch.zeros(5, 2), torch.zeros(2, 9), torch.tensor([0, 1, 1, 2, 1, 0, -1, 1, 2.0])
    for k in (1, 3, 9):  # ties alone
        assert_same(encode(impl, x, W_enc, b_enc, k, of=of), reference.encode_topk(x, W_enc, b_enc, k, of))
    b_enc[4] = torch.finfo(torch.float32).tiny / 8  # positive, if only just
    b_enc[5] = -0.0
    assert_same(encode(impl, x, W_enc, b_enc, 9, of=of), reference.encode_topk(x, W_enc, b_enc, 9, of))
    found = encode(impl, x, W_enc, -b_enc.abs(), 3, of=of)
    assert found.offsets.tolist() == [0] * 6
    assert (found.latents == 9).all()


@every_of
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_comes_first(impl, of, value):
    x, W_enc, b_enc = operands(6, 3, 40)
    b_enc[[3, 11, 12, 38]] = value
    for k in (1, 3, 6):
        found = encode(impl, x, W_enc, b_enc, k, of=of)
        assert_same(found, reference.encode_topk(x, W_enc, b_enc, k, of))
        assert not found.z.isfinite().all()
    among = torch.ones(40, dtype=torch.bool)
    among[[3, 11, 12, 38]] = False
    assert encode(impl, x, W_enc, b_enc, 3, of=of, among=among).z.isfinite().all()


@every_impl  # in one piece: the interpreter's products depend on where in a tile a row lies
@every_of
def test_z_has_the_bits_of_preactivations(impl, of):
    device = device_of(impl)
    for dtype in (torch.float32, torch.bfloat16):
        x, W_enc, b_enc = operands(7, 33, 41, dtype, normal)
        z = kernels.preactivations(x.to(device), W_enc.to(device), b_enc.to(device), impl=impl).cpu()
        among = normal(41, seed=5) > 0.3
        for chosen_from in (None, among):
            expected = reference.topk.selected(z, 4, of, chosen_from)
            assert_same(encode(impl, x, W_enc, b_enc, 4, of=of, among=chosen_from), expected)


@every_impl
@every_of
def test_no_tokens(impl, of):
    x, W_enc, b_enc = operands(0, 3, 5)
    found = encode(impl, x, W_enc, b_enc, 2, of=of)
    assert [len(t) for t in found] == [0, 0, 0, 1]


@pytest.mark.parametrize("impl", ["reference", "pytorch"])
@every_of
def test_fp64(impl, of):
    x, W_enc, b_enc = (t.double() for t in operands(9, 5, 30, make=normal))
    b_enc[2:4] = 1 + 1e-12 * torch.arange(2)
    W_enc[:, 2:4] = 0  # equal in fp32
    found = encode(impl, x, W_enc, b_enc, 4, of=of)
    assert found.z.dtype == torch.float64
    z = x @ W_enc + b_enc
    expected = reference.topk.selected(z, 4, of)
    assert torch.equal(found.latents, expected.latents)
    torch.testing.assert_close(found.z, expected.z, rtol=1e-13, atol=0)


@needs_native
@every_of
@pytest.mark.parametrize("isa", ISAS)
def test_native_bits_do_not_depend_on_threads(of, isa):
    """More latents than a block has, more tokens than go through at once, more candidates than are kept."""
    x, W_enc, b_enc = operands(70, 12, 900, make=normal)
    before, results = torch.ops.gemmascope_cpu.isa(), []
    torch.ops.gemmascope_cpu.use_isa(isa)
    try:
        for count in (1, 2, 3):
            with threads(count):
                results.append(kernels.encode_topk(x, W_enc, b_enc, 5, of=of, impl="cpu"))
        z = kernels.preactivations(x, W_enc, b_enc, impl="cpu")
    finally:
        torch.ops.gemmascope_cpu.use_isa(before)
    for found in results:
        assert_same(found, reference.topk.selected(z, 5, of))


@needs_triton
def test_triton_does_not_wait_for_the_device():
    """Nothing between the launches asks for a number: it runs on meta, where there is none."""
    from gemmascope.kernels.gpu import topk as gpu_topk

    room = Entries(*(torch.empty(12, device="meta", dtype=t) for t in (torch.float32, torch.int32, torch.int32)),
                   torch.empty(5, dtype=torch.int64, device="meta"))  # fmt: skip
    assert [len(t) for t in gpu_topk._of_both(room, room, 4, 30)] == [12, 12, 12, 5]


# ---- arguments


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"k": 0}, ValueError, "k: expected at least 1, got 0"),
        ({"k": 6}, ValueError, "k: expected 1 to d_sae = 5, got 6"),
        ({"k": 2.0}, TypeError, "k: expected an int, got float"),
        ({"of": "row"}, ValueError, "of: expected 'token' or 'batch', got 'row'"),
        ({"of": None}, TypeError, "of: expected a str, got NoneType"),
        ({"among": torch.ones(4, dtype=torch.bool)}, ValueError, r"among: expected shape \[5\], got \[4\]"),
        ({"among": torch.ones(5)}, TypeError, "among: expected dtype bool, got float32"),
        ({"tf32": 1}, TypeError, "tf32: expected a bool, got int"),
        ({"x": torch.zeros(3)}, ValueError, r"x: expected shape \[N, d_model\], got \[3\]"),
        ({"b_enc": torch.zeros(4)}, ValueError, r"b_enc: expected shape \[5\], got \[4\]"),
        ({"W_enc": torch.zeros(3, 0), "b_enc": torch.zeros(0)}, ValueError, "W_enc: expected at least one latent"),
        ({"impl": "fast"}, ValueError, "impl: expected one of"),
    ],
)
def test_wrong_arguments(changes, error, message):
    x, W_enc, b_enc = operands(2, 3, 5)
    with pytest.raises(error, match=message):
        kernels.encode_topk(**({"x": x, "W_enc": W_enc, "b_enc": b_enc, "k": 2} | changes))


def test_is_an_operator_of_every_implementation():
    assert {operator("encode_topk", name).__name__ for name in ("reference", "pytorch")}
    assert "encode_topk" in kernels.__all__
