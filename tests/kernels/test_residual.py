"""The token-major pass by Triton against the fp64 reference: python -m pytest tests/test_residual.py"""

import pytest
import torch

from gemmascope.kernels import reference
from gemmascope.kernels.dispatch import interpreting
from gemmascope.kernels.entries import ACTIVE, LATENT, Entries
from tests.helpers import (
    LAYOUTS,
    assert_bitwise_equal,
    assert_same_not_finite,
    assert_within_budget,
    normal,
    product_slack,
    products_of,
    shape_cases,
)
from tests.kernels import sanitizer
from tests.kernels.entries import batch, double, from_pre_activations

pytest.importorskip("triton")
import triton
import triton.language as tl

from gemmascope.kernels.gpu import residual as gpu_residual
from gemmascope.kernels.gpu.residual import (
    TENSOR_MEMORY,
    VECTORS,
    WARP_GROUPS,
    WARPS,
    ResidualConfig,
    residual_config,
    residual_pass,
)

DTYPES = (torch.float32, torch.bfloat16)
interpreted = pytest.mark.skipif(not interpreting(), reason="forces tiles or programs, in the interpreter only")


ROUTES = {
    "bfloat16": (torch.bfloat16, 8),
    "bfloat16-vectors": (torch.bfloat16, 0),
    "float32": (torch.float32, 0),
}


@pytest.fixture(params=ROUTES)
def small_tiles(request, monkeypatch) -> torch.dtype:
    """Tiles of 8 entries, then of 4, and 16 columns; the dtype of W_dec."""
    dtype, parts = ROUTES[request.param]
    config = ResidualConfig(first=8, rest=4, block_d=16, num_warps=1, parts=parts)
    monkeypatch.setattr(gpu_residual, "residual_config", lambda target, dtype: config)
    return dtype


def check(entries, x, W_dec, b_dec, *_):
    nnz = min(int(entries.offsets[-1]), len(entries.z))
    actual, eager = residual_pass(entries, x, W_dec, b_dec), reference.residual_pass(entries, x, W_dec, b_dec)
    exact = reference.residual_pass(*double((entries, x, W_dec, b_dec)))
    lists = int(entries.offsets.diff().max()) if len(entries.offsets) > 1 else 0
    slack = product_slack(lists, products_of(W_dec))  # of x̂; twice that of its square
    assert_within_budget("residual", actual.residual, exact.residual, eager.residual, slack=slack)
    squares = actual.squared_error, exact.squared_error, eager.squared_error
    assert_within_budget("squared_error", *squares, slack=2 * slack)
    assert_bitwise_equal("l0", actual.l0, eager.l0)
    # u is that of the residual as rounded, which the reference may round differently
    r, W = (t[rows[:nnz].long()] for t, rows in ((actual.residual, entries.tokens), (W_dec, entries.latents & LATENT)))
    exact_u = (r.double() * W.double()).sum(1)
    slack = product_slack(x.shape[1], products_of(W_dec))
    assert_within_budget("u", actual.u[:nnz], exact_u, (r.float() * W.float()).sum(1), slack=slack)
    return actual


@interpreted
@pytest.mark.parametrize(("N", "F", "d"), shape_cases(4, 20, 16, empty=False))
def test_matches_reference(small_tiles, N, F, d):
    check(*batch(N, F, d, small_tiles))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, WARP_GROUPS.block_d + 1])
def test_shipped_tiles_match_reference(d, dtype, device):
    inputs = batch(6, 3 * WARP_GROUPS.first, d, dtype, device)
    assert inputs.entries.offsets.diff().max() > WARP_GROUPS.first + WARP_GROUPS.rest
    check(*inputs)


@interpreted
@pytest.mark.parametrize("shipped", [WARP_GROUPS, TENSOR_MEMORY, WARPS, VECTORS])
def test_every_shipped_tile(monkeypatch, shipped):
    monkeypatch.setattr(gpu_residual, "residual_config", lambda target, dtype: shipped)
    check(*batch(6, 40 + shipped.first, 300, torch.bfloat16))


def test_choice_of_the_tile():
    choice = {"sm_80": WARPS, "sm_90": WARP_GROUPS, "sm_100": TENSOR_MEMORY, "sm_120": WARPS, "gfx942": VECTORS}
    for target, config in choice.items():
        assert residual_config(target, torch.bfloat16) is config
        assert residual_config(target, torch.float32) is VECTORS


@interpreted
@pytest.mark.parametrize("F", [1, 7, 8, 9, 11, 12, 13, 17])
def test_entries_around_the_tiles(small_tiles, F):
    entries = from_pre_activations(normal(2, F).abs() + 1, torch.full((F,), 0.5))
    check(entries, normal(2, 7), normal(F, 7, seed=1).to(small_tiles), normal(7, seed=2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tokens_result_does_not_depend_on_its_batch(dtype, device):
    """Nor on the capacity, which may change from step to step."""
    inputs = batch(6, 2 * WARP_GROUPS.first, 20, dtype, device)
    whole = residual_pass(*inputs[:4])
    for n in range(6):
        start, end = inputs.entries.offsets[n : n + 2].tolist()
        own = torch.arange(start, end + 100 * n, device=device).clamp(max=len(inputs.entries.z) - 1)
        z, latents, tokens = (t[own] for t in inputs.entries[:3])
        entries = Entries(z, latents, tokens, torch.tensor([0, end - start], device=device))
        alone = residual_pass(entries, inputs.x[n : n + 1], inputs.W_dec, inputs.b_dec)
        for name in ("residual", "squared_error", "l0"):
            assert_bitwise_equal(name, getattr(alone, name), getattr(whole, name)[n : n + 1])
        assert_bitwise_equal("u", alone.u[: end - start], whole.u[start:end])


@triton.jit
def _split_kernel(f_ptr, parts_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    high, middle, low = gpu_residual._split(tl.load(f_ptr + i, mask=i < n, other=0.0))
    tl.store(parts_ptr + i, high.to(tl.float32), mask=i < n)
    tl.store(parts_ptr + n + i, middle.to(tl.float32), mask=i < n)
    tl.store(parts_ptr + 2 * n + i, low.to(tl.float32), mask=i < n)


def test_three_parts_are_the_coefficient(device):
    """Of any bit pattern: exact where bf16 reaches its last bit, never finite where it is too large or not a number."""
    bits = torch.randint(0, 1 << 32, (1 << 16,), generator=torch.Generator().manual_seed(0))
    powers = torch.arange(0, 256) << 23
    edges = torch.cat((powers, powers + 1, powers + 0x7FFFFF, powers + 0x8000, powers + 0x7FFF, powers + 0x808080))
    bits = torch.cat((bits, edges, edges + (1 << 31))).to(torch.uint32).view(torch.int32)
    f, n = bits.view(torch.float32), len(bits)
    parts = torch.empty(3, n, device=device)
    gpu_residual.launch(_split_kernel, (triton.cdiv(n, 4096),), f.to(device), parts, n, BLOCK=4096, on=parts)
    parts = parts.double().cpu()
    size, total = f.double().abs(), parts.sum(0)
    rounds_to_infinity = size >= 2.0**128 - 2.0**119
    assert not total[rounds_to_infinity | f.isnan()].isfinite().any()
    exact = (size >= 2.0**-110) & ~rounds_to_infinity
    assert exact.sum() > 50_000
    assert torch.equal(total[exact], f.double()[exact])
    tiny = size < 2.0**-110
    assert tiny.sum() > 1000
    assert (total - f.double())[tiny].abs().max() <= 2.0**-134
    assert torch.equal(parts.bfloat16().double()[:, exact], parts[:, exact])


def test_large_coefficients_lose_nothing(device):
    """Each part of z matters: of 1 + 2⁻²⁰ the first is 1, of 1 + 2⁻⁹ + 2⁻¹⁸ the third is 2⁻¹⁸."""
    z = torch.tensor([[1 + 2.0**-20], [1 + 2.0**-9 + 2.0**-18], [3e38], [2.0**-130]])
    entries = Entries(*(t.to(device) for t in from_pre_activations(z, torch.zeros(1))))
    W_dec = torch.tensor([[1.0, -0.5]], dtype=torch.bfloat16, device=device)
    zeros = torch.zeros(2, device=device)
    # Less the first part, what is left fits into bf16.
    x = z.bfloat16().float().to(device) * W_dec.float()
    out = residual_pass(entries, x, W_dec, zeros)
    expected = (z.double() * W_dec.double().cpu() - x.double().cpu()).to(torch.bfloat16)
    assert_bitwise_equal("residual", out.residual.cpu(), expected)


def test_entries_of_the_reference_have_the_dtypes_of_the_contract():
    """What the kernels are tested with must be what they will meet."""
    assert [t.dtype for t in batch(3, 4, 2).entries] == [torch.float32, torch.int32, torch.int32, torch.int64]


def test_window_entries_have_u_but_no_part_in_the_reconstruction(device):
    z = torch.tensor([[0.4, 0.8, 0.6]])  # below θ inside the window, active in it, a tie
    entries = Entries(*(t.to(device) for t in from_pre_activations(z, torch.full((3,), 0.6))))
    x, W_dec, b_dec = (t.to(device) for t in (torch.zeros(1, 3), torch.eye(3), torch.ones(3)))
    out = residual_pass(entries, x, W_dec, b_dec)
    assert torch.equal(out.residual.cpu(), torch.tensor([[1.0, 1.0 + z[0, 1], 1.0]]))
    assert torch.equal(out.u[:3].cpu(), out.residual[0].cpu())
    assert out.l0.tolist() == [1.0]


def test_tokens_without_entries_and_twins(device):
    inputs = batch(6, 12, 9, device=device)
    out = check(*inputs)
    assert_bitwise_equal("empty token", out.residual[1], inputs.b_dec - inputs.x[1])
    assert out.l0[1] == 0
    assert_bitwise_equal("twins", out.residual[2], out.residual[3])


@pytest.mark.parametrize(("N", "capacity"), [(0, 0), (0, 4), (3, 0)])
def test_nothing_to_sum(N, capacity, device):
    inputs = batch(N, 5, 4, device=device, capacity=capacity)
    out = residual_pass(inputs.entries, inputs.x, inputs.W_dec, inputs.b_dec)
    assert_bitwise_equal("residual", out.residual, inputs.b_dec - inputs.x)
    assert (out.u.shape[0], out.l0.tolist()) == (capacity, [0.0] * N)


def test_no_columns(device):
    inputs = batch(6, 12, 0, torch.bfloat16, device)
    out = residual_pass(*inputs[:4])
    assert out.residual.shape == (6, 0)
    assert out.squared_error.tolist() == [0.0] * 6
    assert out.u[: inputs.nnz].tolist() == [0.0] * inputs.nnz
    assert out.l0.tolist() == reference.residual_pass(*inputs[:4]).l0.tolist()


@pytest.mark.parametrize("missing", [1, 10, 1000])
def test_entries_beyond_the_capacity(missing, device):
    """They are left out; tokens whose entries all found room are not affected."""
    whole = batch(7, 15, 9, device=device)
    capacity = max(0, whole.nnz - missing)
    cut = batch(7, 15, 9, device=device, capacity=capacity)
    full = residual_pass(whole.entries, whole.x, whole.W_dec, whole.b_dec)
    part = residual_pass(cut.entries, cut.x, cut.W_dec, cut.b_dec)
    complete = int((whole.entries.offsets[1:] <= capacity).sum())
    assert_bitwise_equal("residual", part.residual[:complete], full.residual[:complete])
    entries = int(whole.entries.offsets[complete])
    assert_bitwise_equal("u", part.u[:entries], full.u[:entries])
    assert part.l0.sum() == (cut.entries.latents[:capacity] >= ACTIVE).sum()


def test_capacity_short_by_billions(device):
    """What a dense batch of a wide SAE needs: the distance to the capacity does not fit 32 bits."""
    inputs = batch(2, 9, 4, device=device)
    capacity = len(inputs.entries.z)
    offsets = torch.tensor([0, capacity + 2**31 + 10, capacity + 2**32], device=device)
    entries = inputs.entries._replace(
        offsets=offsets,
        z=torch.ones_like(inputs.entries.z),
        latents=torch.full_like(inputs.entries.latents, ACTIVE),
        tokens=torch.zeros_like(inputs.entries.tokens),
    )
    out = residual_pass(entries, inputs.x, inputs.W_dec, inputs.b_dec)
    assert_bitwise_equal("residual", out.residual[1], inputs.b_dec - inputs.x[1])
    assert out.l0.tolist() == [capacity, 0]


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", [1, 2, 3], ids=["x", "W_dec", "b_dec"])
def test_any_strides(small_tiles, which, layout):
    arguments = list(batch(5, 13, 19, small_tiles))[:4]
    arguments[which] = LAYOUTS[layout](arguments[which])
    check(*arguments)


def test_wide_input_is_not_rounded_first(device):
    """x in fp32 beside W_dec in bf16: the difference is rounded, not x."""
    inputs = batch(4, 6, 8, torch.bfloat16, device)
    x = 1000 + inputs.x
    out = residual_pass(inputs.entries, x, inputs.W_dec, inputs.b_dec + 1000)
    assert out.residual.float().abs().max() < 30
    exact = reference.residual_pass(*double((inputs.entries, x, inputs.W_dec, inputs.b_dec + 1000)))
    eager = exact.residual.to(torch.bfloat16)
    assert_within_budget("residual", out.residual, exact.residual, eager)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["z", "x", "W_dec", "b_dec"])
def test_bad_input_stays_visible(where, bad, dtype, device):
    inputs = batch(6, 12, 9, dtype, device)
    if where == "z":
        place = int(inputs.entries.offsets[2])
        inputs.entries.z[place] = bad
        flag = 0 if bad == -torch.inf else ACTIVE
        inputs.entries.latents[place] = (inputs.entries.latents[place] & LATENT) + flag
    else:
        latent = (inputs.entries.latents[inputs.entries.offsets[4]] & LATENT).item()
        target = getattr(inputs, where)
        target.view(-1)[target.shape[-1] * (latent if where == "W_dec" else 0) + 3] = bad
    actual, eager = (f(*inputs[:4]) for f in (residual_pass, reference.residual_pass))
    assert not eager.squared_error.isfinite().all()
    for name in ("residual", "squared_error", "u"):
        a, b = (getattr(out, name)[: inputs.nnz] for out in (actual, eager))
        if dtype == torch.float32:
            assert_same_not_finite(name, a, b)
        else:  # the parts of an infinity add up to NaN
            assert torch.equal(a.isfinite(), b.isfinite()), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_of_other_tokens_do_not_matter(bad, dtype, device):
    """Places in a tile past a list have a latent too, 0."""
    z = torch.tensor([[0.0, 2.0, 3.0], [4.0, 5.0, 0.0], [0.0, 0.0, 0.0]])
    entries = Entries(*(t.to(device) for t in from_pre_activations(z, torch.ones(3))))
    x, W_dec, b_dec = (t.to(device) for t in (normal(3, 5), normal(3, 5, seed=1).to(dtype), normal(5, seed=2)))
    before = residual_pass(entries, x, W_dec, b_dec)
    W_dec[0] = bad
    after = residual_pass(entries, x, W_dec, b_dec)
    for n, own in ((0, slice(0, 2)), (2, slice(0, 0))):
        assert_bitwise_equal("residual", after.residual[n], before.residual[n])
        assert_bitwise_equal("squared_error", after.squared_error[n], before.squared_error[n])
        assert_bitwise_equal("u", after.u[own], before.u[own])
    assert not after.residual[1].isfinite().any()
    assert not after.u[2:4].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_infinite_weight_spoils_its_own_entry_alone(dtype, device):
    """Latent 1 is in the window, weight 0 in x̂ but not in u; latent 0, in column 3, leaves the other columns alone."""
    z = torch.tensor([[2.0, 0.9], [0.0, 2.0]])
    entries = Entries(*(t.to(device) for t in from_pre_activations(z, torch.ones(2))))
    W_dec = normal(2, 5).to(device, dtype)
    W_dec[0, 3] = torch.inf
    out = residual_pass(entries, normal(2, 5).to(device), W_dec, torch.zeros(5, device=device))
    assert out.residual.isfinite().tolist() == [[True, True, True, False, True], [True] * 5]
    assert out.u[:3].isfinite().tolist() == [False, False, True]


def test_repeats_bit_for_bit(device):
    inputs = batch(9, 20, 40, device=device)
    first = residual_pass(*inputs[:4])
    for seed in (1, 2):
        with sanitizer.sanitize(race=True, seed=seed):
            again = residual_pass(*inputs[:4])
        for name, a, b in zip(first._fields, again, first, strict=True):
            assert_bitwise_equal(name, a, b)


@interpreted
@pytest.mark.parametrize(("far_row", "far_column"), [(2**30 + 7, 1), (1, 2**29 + 1)], ids=["row", "column"])
def test_operand_offsets_beyond_32_bits(small_tiles, far_row, far_column):
    entries = from_pre_activations(torch.full((3, 3), 2.0), torch.ones(3))
    x, W_dec, b_dec = normal(3, 5).to(small_tiles), normal(3, 5, seed=1).to(small_tiles), normal(5, seed=2)
    memory = [torch.empty(2 * far_row + 4 * far_column + 1, dtype=small_tiles) for _ in range(2)]
    far_x, far_W = (m.as_strided((3, 5), (far_row, far_column)) for m in memory)
    far_x.copy_(x), far_W.copy_(W_dec)
    near = residual_pass(entries, x, W_dec, b_dec)
    with sanitizer.sanitize(race=False):
        far = residual_pass(entries, far_x, far_W, b_dec)
    assert_bitwise_equal("residual", far.residual, near.residual)
    assert_bitwise_equal("u", far.u[:9], near.u[:9])


@interpreted
def test_result_and_entry_offsets_beyond_32_bits(monkeypatch):
    """The last token of a residual of 2³¹ + 2¹⁵ elements, its entries beyond 2³¹."""
    N, d, capacity = 2**16 + 1, 2**15, 2**31 + 3
    config = ResidualConfig(first=4, rest=4, block_d=d, num_warps=1, parts=8)
    monkeypatch.setattr(gpu_residual, "residual_config", lambda target, dtype: config)
    z, latents, tokens = (torch.empty(capacity, dtype=dtype) for dtype in (torch.float32, torch.int32, torch.int32))
    z[-3:], latents[-3:] = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2, 0, 1], dtype=torch.int32) + ACTIVE
    offsets = torch.zeros(N + 1, dtype=torch.int64)
    offsets[-2:] = torch.tensor([capacity - 3, capacity])
    W_dec, x, b_dec = normal(3, d).bfloat16(), normal(1, d, seed=1), normal(d, seed=2)
    places = [(capacity - 3) // gpu_residual.SUM_BLOCK, (capacity + N - 1) // gpu_residual.SUM_BLOCK]
    with sanitizer.sanitize(race=False, programs=lambda dims: [N - 1] if dims[0] == N else places):
        far = residual_pass(Entries(z, latents, tokens, offsets), x.expand(N, d), W_dec, b_dec)
    last = Entries(z[-3:], latents[-3:], torch.zeros(3, dtype=torch.int32), torch.tensor([0, 3]))
    near = residual_pass(last, x, W_dec, b_dec)
    assert_bitwise_equal("residual", far.residual[-1:], near.residual)
    assert_bitwise_equal("squared_error", far.squared_error[-1:], near.squared_error)
    assert_bitwise_equal("u", far.u[-3:], near.u)


@interpreted
def test_shares_beyond_32_bits(small_tiles):
    """Five blocks of shares of 2²⁹ entries each."""
    near = batch(1, 9, 5 * 16, small_tiles)
    capacity = 2**29
    far_entries = [torch.empty(capacity, dtype=t.dtype) for t in near.entries[:3]]
    for far, t in zip(far_entries, near.entries[:3], strict=True):
        far[: len(t)] = t
    with sanitizer.sanitize(race=False, programs=lambda dims: range(5) if dims[0] == 1 else [0, dims[0] - 1]):
        far = residual_pass(Entries(*far_entries, near.entries.offsets), *near[1:4])
    expected = residual_pass(*near[:4])
    assert_bitwise_equal("u", far.u[: near.nnz], expected.u[: near.nnz])
    assert_bitwise_equal("squared_error", far.squared_error, expected.squared_error)
