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
    shape_cases,
)
from tests.kernels import sanitizer
from tests.kernels.entries import batch, double, from_pre_activations

pytest.importorskip("triton")
from gemmascope.kernels.gpu import residual as gpu_residual
from gemmascope.kernels.gpu.decode import GatherConfig
from gemmascope.kernels.gpu.residual import residual_pass

DTYPES = (torch.float32, torch.bfloat16)
interpreted = pytest.mark.skipif(not interpreting(), reason="forces tiles or programs, in the interpreter only")


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(gpu_residual, "CONFIG", GatherConfig(lanes=4, block_d=16, num_warps=1, num_stages=3))


def check(entries, x, W_dec, b_dec, *_):
    nnz = min(int(entries.offsets[-1]), len(entries.z))
    actual, eager = residual_pass(entries, x, W_dec, b_dec), reference.residual_pass(entries, x, W_dec, b_dec)
    exact = reference.residual_pass(*double((entries, x, W_dec, b_dec)))
    assert_within_budget("residual", actual.residual, exact.residual, eager.residual)
    assert_within_budget("squared_error", actual.squared_error, exact.squared_error, eager.squared_error)
    assert_bitwise_equal("l0", actual.l0, eager.l0)
    # u is that of the residual as rounded, which the reference may round differently
    r, W = (t[rows[:nnz].long()] for t, rows in ((actual.residual, entries.tokens), (W_dec, entries.latents & LATENT)))
    exact_u = (r.double() * W.double()).sum(1)
    assert_within_budget("u", actual.u[:nnz], exact_u, (r.float() * W.float()).sum(1))
    return actual


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "F", "d"), shape_cases(4, 20, 16, empty=False))
def test_matches_reference(small_tiles, N, F, d, dtype):
    check(*batch(N, F, d, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, gpu_residual.CONFIG.block_d + 1])
def test_shipped_tiles_match_reference(d, dtype, device):
    check(*batch(6, 40, d, dtype, device))


@interpreted
@pytest.mark.parametrize("F", [1, 3, 4, 5, 8, 9])
def test_entries_around_the_gather(small_tiles, F):
    entries = from_pre_activations(normal(2, F).abs() + 1, torch.full((F,), 0.5))
    check(entries, normal(2, 7), normal(F, 7, seed=1), normal(7, seed=2))


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
    arguments = list(batch(5, 13, 19))[:4]
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


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["z", "x", "W_dec", "b_dec"])
def test_bad_input_stays_visible(where, bad, device):
    inputs = batch(6, 12, 9, device=device)
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
    for name in ("residual", "squared_error"):
        assert_same_not_finite(name, getattr(actual, name), getattr(eager, name))
    assert_same_not_finite("u", actual.u[: inputs.nnz], eager.u[: inputs.nnz])


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
    x, W_dec, b_dec = normal(3, 5).bfloat16(), normal(3, 5, seed=1).bfloat16(), normal(5, seed=2)
    memory = torch.empty(2, 2 * far_row + 4 * far_column + 1, dtype=torch.bfloat16)
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
    monkeypatch.setattr(gpu_residual, "CONFIG", GatherConfig(lanes=4, block_d=4096, num_warps=1, num_stages=3))
    N, d, capacity = 2**16 + 1, 2**15, 2**31 + 3
    z, latents, tokens = (torch.empty(capacity, dtype=dtype) for dtype in (torch.float32, torch.int32, torch.int32))
    z[-3:], latents[-3:] = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2, 0, 1], dtype=torch.int32) + ACTIVE
    offsets = torch.zeros(N + 1, dtype=torch.int64)
    offsets[-2:] = torch.tensor([capacity - 3, capacity])
    W_dec, x, b_dec = normal(3, d).bfloat16(), normal(1, d, seed=1), normal(d, seed=2)
    with sanitizer.sanitize(race=False, programs=lambda dims: [dims[0] - 1]):
        far = residual_pass(Entries(z, latents, tokens, offsets), x.expand(N, d), W_dec, b_dec)
    last = Entries(z[-3:], latents[-3:], torch.zeros(3, dtype=torch.int32), torch.tensor([0, 3]))
    near = residual_pass(last, x, W_dec, b_dec)
    assert_bitwise_equal("residual", far.residual[-1:], near.residual)
    assert_bitwise_equal("u", far.u[-3:], near.u)
