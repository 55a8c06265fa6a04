"""The operators in plain PyTorch for a CPU against the fp64 reference: python -m pytest tests/test_pytorch_route.py"""

import pytest
import torch

from gemmascope.kernels import SparseCode, decode, encode, jumprelu
from gemmascope.kernels.eager import inference as eager
from gemmascope.kernels.eager import training as eager_training
from gemmascope.kernels.entries import ACTIVE, LATENT, LatentState, LatentSums, Rule
from tests.helpers import (
    DTYPES,
    LAYOUTS,
    assert_bitwise_equal,
    assert_same_not_finite,
    assert_within_budget,
    lattice,
    normal,
    shape_cases,
)
from tests.kernels.entries import BANDWIDTH, batch, double, from_pre_activations

NAMES = ("x_hat", "dvalues", "dW_dec", "db_dec")
ALL_DTYPES = (*DTYPES, torch.float64)
BAD = (torch.nan, torch.inf, -torch.inf)


@pytest.fixture
def small_pieces(monkeypatch):
    """Several tiles of z, pieces of rows and of latents at the sizes of these tests."""
    monkeypatch.setattr(eager, "PRODUCT_TOKENS", 5)
    monkeypatch.setattr(eager, "Z_ELEMENTS", 24)
    monkeypatch.setattr(eager, "GATHER_ELEMENTS", 40)
    monkeypatch.setattr(eager, "CORE_ELEMENTS", 48)
    monkeypatch.setattr(eager_training, "GATHER_ELEMENTS", 40)
    monkeypatch.setattr(eager_training, "CORE_ELEMENTS", 48)


# ---- encode


def operands(N, d, F, dtype=torch.float32, make=normal, seed=0):
    x, W = make(N, d, dtype=dtype, seed=seed), make(F, d, dtype=dtype, seed=seed + 1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        x,
        W.T,
        make(F, dtype=wide, seed=seed + 2),
        max(d, 1) ** 0.5 * (1 + 0.25 * make(F, dtype=wide, seed=seed + 3)),
    )


def check_encode(*arguments):
    """On operands whose z is exact in every dtype, so that the entries must be the same ones."""
    code, expected = (encode(*arguments, impl=impl) for impl in ("pytorch", "reference"))
    for name, actual, want in zip(("values", "indices", "offsets"), code, expected, strict=False):
        assert_bitwise_equal(name, actual, want)
    return code


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize(("N", "F", "d"), shape_cases(5, 24, 16))
def test_encode_of_exact_products(small_pieces, N, F, d, dtype):
    check_encode(*operands(N, d, F, dtype, lattice))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "d", "F"), [(1, 2304, 40), (37, 48, 300), (1100, 3, 1030)])
def test_encode_at_shipped_tiles(N, d, F, dtype):
    x, W_enc, b_enc, threshold = arguments = operands(N, d, F, dtype)
    code = encode(*arguments, impl="pytorch")
    rows, columns = code.token_indices(), code.indices.long()
    assert ((rows * F + columns).diff() > 0).all(), "latents do not ascend inside the rows"
    z = x.double() @ W_enc.double() + b_enc.double()
    certain = (z - threshold).abs() > 1e-5 * (x.double().abs() @ W_enc.double().abs() + 1)
    kept = torch.zeros(N, F, dtype=torch.bool)
    kept[rows, columns] = True
    assert torch.equal(kept[certain], (z > threshold)[certain])
    wide = torch.promote_types(dtype, torch.float32)
    eager = x.to(wide) @ W_enc.to(wide) + b_enc
    assert_within_budget("values", code.values, z[kept], eager[kept])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", range(4), ids=["x", "W_enc", "b_enc", "threshold"])
def test_encode_any_strides(small_pieces, which, layout):
    arguments = list(operands(7, 6, 13, make=lattice))
    arguments[which] = LAYOUTS[layout](arguments[which])
    check_encode(*arguments)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("which", range(4), ids=["x", "W_enc", "b_enc", "threshold"])
def test_encode_shows_bad_input(small_pieces, which, bad):
    arguments = list(operands(7, 6, 16, make=lattice))
    arguments[which] = arguments[which].contiguous()
    arguments[which].view(-1)[arguments[which].numel() // 2] = bad
    check_encode(*arguments)


def test_encode_keeps_what_cannot_be_compared():
    """z = −Inf, z = θ = Inf and a NaN θ, each alone among finite values, are kept as NaN."""
    x, W = torch.ones(2, 1), torch.tensor([[1.0, -torch.inf, torch.inf, 1.0, torch.inf]])
    threshold = torch.tensor([2.0, 0.0, torch.inf, torch.nan, 0.0])
    code = check_encode(x, W, torch.zeros(5), threshold)
    assert code.indices.tolist() == 2 * [1, 2, 3, 4]
    assert code.values.isnan().tolist() == 2 * [True, True, True, False]
    alone = check_encode(x, torch.ones(1, 2), torch.zeros(2), torch.tensor([2.0, torch.nan]))
    assert alone.indices.tolist() == [1, 1]


@pytest.mark.parametrize("density", [0.0, 0.01, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 16), (7, 8), (0, 8)])
def test_true_positions(shape, density):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < density
    assert torch.equal(eager.true_positions(mask), torch.nonzero(mask.view(-1))[:, 0])


def test_linear_with_and_without_onednn(monkeypatch):
    x, W_enc, b_enc, _ = operands(9, 300, 1000)
    exact = x.double() @ W_enc.double() + b_enc.double()
    assert eager._onednn_is_faster(x, W_enc) == torch.backends.mkldnn.is_available()
    ours = eager.linear(x, W_enc, b_enc)
    monkeypatch.setattr(eager, "_onednn_is_faster", lambda *_: False)
    without = eager.linear(x, W_enc, b_enc)
    assert_within_budget("oneDNN", ours, exact, without)
    assert_within_budget("mm", without, exact, ours)


# ---- decode


def code_inputs(N, F, d, dtype=torch.float32, active=0.25, seed=0):
    generator = torch.Generator().manual_seed(seed + 1)
    dense = (normal(N, F, seed=seed).abs() + 0.1) * (torch.rand(N, F, generator=generator) < active)
    values, indices, offsets, _ = SparseCode.from_dense(dense)
    W_dec, b_dec = (normal(*shape, dtype=dtype, seed=5) for shape in ((F, d), (d,)))
    return values, indices, offsets, W_dec, b_dec, normal(N, d, dtype=dtype, seed=6)


def run(impl, values, indices, offsets, W_dec, b_dec, grad):
    leaves = [t.detach().requires_grad_() for t in (values, W_dec, b_dec)]
    x_hat = decode(SparseCode(leaves[0], indices, offsets, W_dec.shape[0]), *leaves[1:], impl=impl)
    return dict(zip(NAMES, (x_hat, *torch.autograd.grad(x_hat, leaves, grad)), strict=True))


def check_decode(*arguments):
    actual, eager = run("pytorch", *arguments), run("reference", *arguments)
    exact = run("reference", *double(arguments))
    for name in NAMES:
        assert_within_budget(name, actual[name], exact[name], eager[name])
    return actual


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize(("N", "F", "d"), shape_cases(4, 20, 16))
def test_decode_matches_reference(small_pieces, N, F, d, dtype):
    check_decode(*code_inputs(N, F, d, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "F", "d"), [(1, 300, 257), (40, 500, 130)])
def test_decode_at_shipped_pieces(N, F, d, dtype):
    check_decode(*code_inputs(N, F, d, dtype, active=0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decode_of_empty_and_full_rows(small_pieces, dtype):
    *_, W_dec, b_dec, grad = code_inputs(5, 33, 11, dtype)
    full = torch.ones(5, 33)
    full[1] = full[4] = 0
    check_decode(*SparseCode.from_dense(full)[:3], W_dec, b_dec, grad)
    nothing = check_decode(*SparseCode.from_dense(0 * full)[:3], W_dec, b_dec, grad)
    assert_bitwise_equal("x_hat", nothing["x_hat"], b_dec.expand(5, 11))
    assert not nothing["dW_dec"].any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", range(6), ids=["values", "indices", "offsets", "W_dec", "b_dec", "grad"])
def test_decode_any_strides(small_pieces, which, layout, dtype):
    arguments = list(code_inputs(5, 13, 19, dtype))
    if layout == "expanded" and which in (1, 2):
        pytest.skip("the same latent twice in a row, or tokens without entries: not a code")
    arguments[which] = LAYOUTS[layout](arguments[which])
    check_decode(*arguments)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("where", [0, 3, 4, 5], ids=["values", "W_dec", "b_dec", "grad"])
def test_decode_shows_bad_input(small_pieces, where, dtype, bad):
    arguments = list(code_inputs(6, 12, 9, dtype))
    arguments[where].view(-1)[arguments[where].numel() // 2] = bad
    arguments[0][0] = 0.0  # and 0·Inf is NaN
    arguments[3][arguments[1][0]] = torch.inf
    actual, eager = run("pytorch", *arguments), run("reference", *arguments)
    assert not all(t.isfinite().all() for t in eager.values())
    for name in NAMES:
        assert_same_not_finite(name, actual[name], eager[name])


def test_decode_of_other_dtypes(small_pieces):
    values, indices, offsets, W_dec, b_dec, grad = code_inputs(5, 13, 19, torch.float16)
    actual = check_decode(values.double(), indices, offsets, W_dec, b_dec.float(), grad)
    assert [actual[name].dtype for name in NAMES] == [torch.float16, torch.float64, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decode_repeats_bit_for_bit_and_by_token(small_pieces, dtype):
    arguments = code_inputs(20, 30, 40, dtype)
    first, again = run("pytorch", *arguments), run("pytorch", *arguments)
    for name in NAMES:
        assert_bitwise_equal(name, again[name], first[name])
    values, indices, offsets, W_dec, b_dec, _ = arguments
    entries = slice(int(offsets[4]), int(offsets[5]))
    alone = eager.decode_forward(values[entries], indices[entries], offsets[4:6] - offsets[4], W_dec, b_dec)
    assert_bitwise_equal("row", alone[0], first["x_hat"][4])


# ---- jumprelu


@pytest.mark.parametrize("bad", [None, *BAD])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_jumprelu_matches_reference(small_pieces, dtype, bad):
    wide = torch.promote_types(dtype, torch.float32)
    pre, b_enc, grad = lattice(9, 17, dtype=dtype), lattice(17, dtype=wide, seed=1), normal(9, 17, dtype=dtype, seed=2)
    threshold = lattice(17, dtype=wide, seed=3).abs() + 0.25
    if bad is not None:
        pre[4, 5] = grad[6, 7] = bad

    def results(impl, *arguments):
        leaves = [t.clone().requires_grad_() for t in arguments[:3]]
        f, l0, firing_count = jumprelu(*leaves, BANDWIDTH, impl=impl)
        gradients = torch.autograd.grad([f, l0], leaves, [arguments[3], torch.ones_like(l0)])
        return f, l0, firing_count, *gradients

    arguments = pre, b_enc, threshold, grad
    actual, eager = results("pytorch", *arguments), results("reference", *arguments)
    exact = results("reference", *double(arguments))
    assert_bitwise_equal("firing_count", actual[2], eager[2])
    for name, a, b, c in zip(("f", "l0", "", "dpre", "db_enc", "dthreshold"), actual, exact, eager, strict=True):
        if name:
            assert_within_budget(name, a, b, c)


# ---- the training step in pieces


@pytest.mark.parametrize("capacity", [None, 3, 400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_entries_do_not_depend_on_the_tiles(monkeypatch, dtype, capacity):
    x, W_enc, b_enc, threshold = operands(13, 6, 21, dtype, lattice)
    arguments = x, W_enc, b_enc, threshold, BANDWIDTH, capacity
    whole = eager_training.encode_entries(*arguments)
    monkeypatch.setattr(eager, "PRODUCT_TOKENS", 5)
    monkeypatch.setattr(eager, "Z_ELEMENTS", 24)
    tiled = eager_training.encode_entries(*arguments)
    z = x.double() @ W_enc.double() + b_enc
    active, inside = z > threshold, (z - threshold).abs() < BANDWIDTH / 2
    assert int(whole.offsets[-1]) == (active | inside).sum()
    n = min(int(whole.offsets[-1]), len(whole.z))
    token, latent = whole.tokens[:n].long(), (whole.latents[:n] & LATENT).long()
    assert torch.equal(whole.latents[:n] >= ACTIVE, active[token, latent])
    for name, a, b in zip(whole._fields, tiled, whole, strict=True):
        assert_bitwise_equal(name, a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_residual_pass_in_pieces(small_pieces, dtype):
    b = batch(23, 20, 16, dtype)
    arguments = b.entries, b.x, b.W_dec, b.b_dec
    actual = eager_training.residual_pass(*arguments)
    latents, f = b.entries.latents[: b.nnz], b.entries.z[: b.nnz].double()
    dense = torch.zeros(23, 20, dtype=torch.float64)
    active = latents >= ACTIVE
    dense[b.entries.tokens[: b.nnz][active].long(), (latents & LATENT)[active].long()] = f[active]
    exact = dense @ b.W_dec.double() + b.b_dec.double() - b.x.double()
    eager = dense.float() @ b.W_dec.float() + b.b_dec - b.x
    assert_within_budget("residual", actual.residual, exact, eager.to(dtype))
    assert_within_budget("squared_error", actual.squared_error, exact.square().sum(1), eager.square().sum(1))
    assert torch.equal(actual.l0, (dense != 0).sum(1).float())


RULE = Rule(learning_rate=1e-2, beta2=0.999, eps=1e-8, log_threshold=False)


def training_state(F, d, low, momentum=False) -> LatentState:
    generator = torch.Generator().manual_seed(11)
    weights = normal(F, d, seed=12), torch.nn.functional.normalize(normal(F, d, seed=13), dim=1), normal(F, seed=14)
    threshold, *moments = (
        0.1 + torch.rand(*shape, generator=generator) for shape in ((F,), (F, d), (F, d), (F,), (F,))
    )
    last = torch.randint(0, 21, (F,), generator=generator)
    low_copies = [w.bfloat16() if low else None for w in weights[:2]]
    first = [normal(*shape, seed=s) for s, shape in enumerate(((F, d), (F, d), (F,), (F,)), 40)] if momentum else []
    return LatentState(*weights, threshold, *moments, last, *low_copies, *first)


@pytest.mark.parametrize("beta1", [0.0, 0.6])
@pytest.mark.parametrize("rule", [RULE, RULE._replace(log_threshold=True)], ids=["raw", "log"])
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("idle", [0.1, 0.7], ids=["in place", "gathered"])
def test_update_in_pieces_is_plain_adam(small_pieces, idle, low, rule, beta1):
    """Against dense matrices and the owed decay written out in fp64; idle latents keep every bit."""
    N, F, d = 8, 60, 7
    z = torch.where(torch.rand(F, generator=torch.Generator().manual_seed(3)) < idle, -9.0, normal(N, F, seed=1))
    threshold = torch.full((F,), 0.4)
    entries = from_pre_activations(z, threshold)
    touched = (z > threshold - BANDWIDTH / 2).sum(0) > 0
    assert 0 < touched.sum() < F
    state, rule = training_state(F, d, low, beta1 > 0), rule._replace(beta1=beta1)
    pieces = list(eager_training._pieces(touched, d))
    assert len(pieces) > 1
    assert all(isinstance(piece.rows, slice) for piece in pieces) == (idle < 0.5)

    transposed = eager_training.by_latent(entries, F)
    nnz = int(transposed.offsets[-1])
    dec, dz = (torch.nn.functional.pad(normal(nnz, seed=s), (0, 3), value=torch.nan) for s in (4, 5))
    tokens = torch.nn.functional.pad(entries.tokens[transposed.order[:nnz]], (0, 3))
    totals = normal(F, seed=6), normal(F, seed=7), normal(F, seed=8)
    sums = LatentSums(dec, dz, tokens, *totals, torch.zeros(F, dtype=torch.int32))
    residual, x_centred = normal(N, d, seed=9), normal(N, d, seed=10)

    coefficients = torch.zeros(2, F, N, dtype=torch.float64)
    latents = torch.arange(F).repeat_interleave(transposed.offsets.diff())
    coefficients[:, latents, tokens[:nnz].long()] = torch.stack((dz, dec))[:, :nnz].double()
    ok, step = torch.tensor(1, dtype=torch.int32), torch.tensor(20)

    def expected(dtype):
        part = [t.to(dtype) for t in state[:8]]
        W_enc, W_dec, b_enc, theta = part[:4]
        db_enc, dtheta, along = (t.to(dtype) for t in totals)
        dW_enc, dW_dec = coefficients[0].to(dtype) @ x_centred.to(dtype), coefficients[1].to(dtype) @ residual.to(dtype)
        gradients = dW_enc, dW_dec - along[:, None] * W_dec, db_enc, theta * dtheta if rule.log_threshold else dtheta
        decay = (rule.beta2 ** (21 - state.last).double()).to(dtype)
        moved = []
        decay_m, firsts = (beta1 ** (21 - state.last).double()).to(dtype), list(state[11:15])
        for weight, v, m, g in zip(part[:4], part[4:], firsts, gradients, strict=True):
            column = (-1, *[1] * (v.ndim - 1))
            v = v * decay.view(column) + (1 - rule.beta2) * g.square()
            m = g if m is None else m.to(dtype) * decay_m.view(column) + (1 - beta1) * g
            change = rule.learning_rate * m / (1 - beta1**21) / ((v / (1 - rule.beta2**21)).sqrt() + rule.eps)
            moved.append((weight, change, v, m))
        (W_enc, c_enc, *_), (W_dec, c_dec, *_), (b_enc, c_b, *_), (theta, c_t, *_) = moved
        W_dec = W_dec - c_dec
        theta = theta * torch.exp(-c_t) if rule.log_threshold else (theta - c_t).clamp(min=0)
        weights = W_enc - c_enc, W_dec / W_dec.norm(dim=1, keepdim=True), b_enc - c_b, theta
        return *weights, *(each[2] for each in moved), *(each[3] for each in moved if beta1)

    exact, eager = expected(torch.float64), expected(torch.float32)
    before = [None if t is None else t.clone() for t in state]
    eager_training.update_from_entries(state, transposed, sums, residual, x_centred, rule, ok, step)
    places = [*range(8), *range(11, 3 + len(exact))]  # without ``last`` and the copies
    for place, e, c in zip(places, exact, eager, strict=True):
        name, a, b = state._fields[place], state[place], before[place]
        assert_within_budget(name, a[touched], e[touched], c[touched])
        assert_bitwise_equal(name, a[~touched], b[~touched])
    assert torch.equal(state.last, torch.where(touched, 21, before[8]))
    if low:
        assert torch.equal(state.W_enc_low, state.W_enc.bfloat16())
        assert torch.equal(state.W_dec_low, state.W_dec.bfloat16())
