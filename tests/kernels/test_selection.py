"""The selection of the largest z by Triton: its product, and the bits of what it chooses, against the reference."""

import pytest
import torch

from gemmascope.kernels import reference
from tests.helpers import assert_bitwise_equal, lattice, normal

pytest.importorskip("triton")
import triton
import triton.language as tl

from gemmascope.kernels.dispatch import interpreting
from gemmascope.kernels.gpu import encode_gemm as gpu_encode_gemm
from gemmascope.kernels.gpu import selection
from gemmascope.kernels.gpu.encode import preactivations
from gemmascope.kernels.gpu.encode_gemm import EncodeConfig, encode_gemm, launch_config, words_per_row
from gemmascope.kernels.gpu.selection import SelectConfig, select_of_batch, select_of_tokens

SPLIT_1 = EncodeConfig(16, 32, 16, 1, 1, 1)
SPLIT_2 = EncodeConfig(16, 64, 16, 2, 1, 1, group_m=2)
SPLIT_4 = EncodeConfig(16, 128, 16, 4, 1, 1)
DESCRIPTORS = EncodeConfig(16, 128, 16, 4, 1, 1, descriptors=True)

interpreted = pytest.mark.skipif(not interpreting(), reason="forces tiles or programs, in the interpreter only")


# ---- the product


def key_of(z):
    """int32, by definition."""
    bits = torch.where(z > 0, z, 0).float().view(torch.int32)
    return torch.where(z.isfinite(), bits, 0x7F800000)


def group_keys(z):
    """The largest key of each 32 latents, the last of them filled up with 0."""
    keys = key_of(z)
    return torch.nn.functional.pad(keys, (0, -z.shape[1] % 32)).view(len(z), -1, 32).amax(2)


def product(x, W_enc, b_enc, among=None, tf32=False):
    N, F = len(x), W_enc.shape[1]
    z = torch.full((N + 1, F), -7.0, device=x.device)
    keys = torch.full((N + 1, words_per_row(F)), -7, dtype=torch.int32, device=x.device)
    may = None if among is None else among.to(torch.int8)
    encode_gemm(x, W_enc, b_enc, may, z[:N], keys[:N], launch_config(x, W_enc, tf32), "largest")
    assert (z[N] == -7).all()
    assert (keys[N] == -7).all()
    return z[:N], keys[:N]


@interpreted
@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        pytest.param(SPLIT_1, torch.float16, id="split1"),
        pytest.param(SPLIT_2, torch.float32, id="split2"),
        pytest.param(SPLIT_4, torch.bfloat16, id="split4"),
        pytest.param(DESCRIPTORS, torch.bfloat16, id="descriptors"),
    ],
)
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("some", [False, True])
def test_product_leaves_z_and_the_largest_keys(monkeypatch, config, dtype, whole, some):
    """Whole tiles, which have no masks, or tails."""
    monkeypatch.setattr(gpu_encode_gemm, "encode_config", lambda *_: config)
    N, F = (32, 2 * config.block_n) if whole else (19, config.block_n + 37)
    x, W_enc, b_enc = normal(N, 24, dtype=dtype), normal(F, 24, dtype=dtype, seed=1).T, normal(F, seed=2)
    b_enc[32:64] = -99  # a group without a positive z
    among = normal(F, seed=3) > 0.2 if some else None
    z, keys = product(x, W_enc, b_enc, among)
    expected = preactivations(x, W_enc, b_enc)
    if among is not None:
        expected = torch.where(among, expected, 0)
    assert_bitwise_equal("z", z, expected)
    assert_bitwise_equal("keys", keys, group_keys(expected))
    assert not keys[:, 1].any()


@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("F", [40, 64])
def test_product_shows_what_is_not_finite(device, value, F):
    """In the group that it is in, also where every other z is below it; not where the latent may not be chosen."""
    x, W_enc, b_enc = (t.to(device) for t in (normal(6, 5), normal(F, 5, seed=1).T, normal(F, seed=2)))
    b_enc[[3, 35]] = value
    assert (product(x, W_enc, b_enc)[1] == 0x7F800000).all()
    among = torch.ones(F, dtype=torch.bool, device=device)
    among[35] = False
    z, keys = product(x, W_enc, b_enc, among)
    assert (keys[:, 0] == 0x7F800000).all()
    assert not z[:, 35].any()
    assert_bitwise_equal("keys", keys, group_keys(z))


def test_what_lies_past_the_latents_is_no_key(device):
    """Every z is below 0, which is what the columns past the last hold; of a row that is NaN every one is."""
    x, W_enc, b_enc = torch.zeros(3, 4, device=device), torch.ones(4, 33, device=device), -torch.ones(33, device=device)
    x[2] = torch.nan
    z, keys = product(x, W_enc, b_enc)
    assert (z[:2] == -1).all()
    assert not keys[:2].any()
    assert (keys[2] == 0x7F800000).all()
    z, keys = product(x, W_enc, b_enc, torch.zeros(33, dtype=torch.bool, device=device))
    assert not z.any()
    assert not keys.any()


# ---- the selection


def bits_of(words, F):
    found = (words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=words.device)) & 1
    found = found.flatten(1)
    assert not found[:, F:].any()
    return found[:, :F].bool()


def chosen(z, k, of, room=None):
    """The bits that the selection leaves of z [n, F]."""
    words = group_keys(z)
    if of == "token":
        select_of_tokens(z, words, k)
    else:
        select_of_batch(z, words, k * len(z) if room is None else room, k)
    return bits_of(words, z.shape[1])


def assert_chosen(z, k, of):
    found, expected = chosen(z, k, of).cpu(), reference.largest(z.cpu(), k, of)
    assert torch.equal(found, expected), f"{int((found != expected).sum())} of {int(expected.sum())}"


SMALL = SelectConfig(block=2, tile=2, num_warps=1), SelectConfig(block=4, tile=8, num_warps=1)


@pytest.fixture(params=["shipped", "small"])
def sizes(request, monkeypatch):
    """Small: a row takes many turns, and tokens have more groups than a tile."""
    if request.param == "small":
        if not interpreting():
            pytest.skip("forces tiles, in the interpreter only")
        monkeypatch.setattr(selection, "FEW", SMALL[0])
        monkeypatch.setattr(selection, "MANY", SMALL[1])
        monkeypatch.setattr(selection, "COUNT_BLOCK", 8)


every_of = pytest.mark.parametrize("of", ["token", "batch"])


@every_of
@pytest.mark.parametrize("F", [1, 31, 32, 33, 300])
def test_equals_the_reference(sizes, of, F, device):
    z = normal(4, F).to(device)
    for k in sorted({1, min(2, F), min(3, F), min(9, F), F // 2 + 1, F}):
        assert_chosen(z, k, of)


@every_of
@pytest.mark.parametrize("reach", [1, 3])
def test_of_equals_the_first(sizes, of, reach, device):
    """Few values: many are equal, in groups of one tile and of several."""
    z = lattice(4, 170, reach=reach).to(device)
    for k in (1, 40, 100, 170):
        assert_chosen(z, k, of)
    for k in (1, 32, 33, 95):
        assert_chosen(torch.ones(3, 100, device=device), k, of)


@every_of
def test_what_is_not_finite_comes_first(sizes, of, device):
    z = normal(5, 200)
    z[0, 7], z[0, 100], z[0, 150], z[1, 199] = torch.nan, -torch.inf, torch.inf, -torch.nan
    z[3, 20:90] = torch.nan
    z[4] = -torch.inf
    for k in (1, 3, 50, 199):
        assert_chosen(z.to(device), k, of)


@every_of
def test_what_is_not_positive_is_not_chosen(sizes, of, device):
    """Zeros, those below, and the least number that is above; fewer than k in some rows."""
    tiny = torch.tensor(1, dtype=torch.int32).view(torch.float32)
    z = -normal(4, 120).abs()
    z[1, 5], z[1, 6], z[1, 40] = 0.0, -0.0, tiny
    z[2, 3], z[2, 99] = tiny, 2 * tiny
    for k in (1, 2, 3, 60, 120):
        assert_chosen(z.to(device), k, of)
    nothing = torch.zeros(3, 70, device=device)
    assert not chosen(nothing, 5, of).any()


@every_of
def test_every_exponent(sizes, of, device):
    """Keys whose first digits differ, and those that differ in the last only."""
    exponents = torch.linspace(-149, 127, 256)
    z = torch.stack((2.0**exponents, torch.full((256,), 1.0), 2.0 ** exponents.flip(0)))
    z[1] = (z[1].view(torch.int32) + torch.arange(256, dtype=torch.int32).flip(0)).view(torch.float32)
    for k in (1, 17, 100, 255):
        assert_chosen(z.to(device), k, of)


def test_the_batch_may_take_all_of_a_row_and_nothing_of_another(sizes, device):
    z = normal(4, 150).abs().to(device)
    z[2] += 10
    found = chosen(z, 37, "batch", room=150)
    assert found[2].all()
    assert int(found.sum()) == 150
    found = chosen(z, 37, "batch", room=10_000)  # room for more than there are
    assert found.all()
    ties = torch.ones(4, 150, device=device)
    assert chosen(ties, 50, "batch", room=301).sum(1).tolist() == [150, 150, 1, 0]


_bound = selection._bound


@triton.jit
def _bound_kernel(keys_ptr, found_ptr, k, n_groups, BLOCK: tl.constexpr):
    low, top = _bound(keys_ptr + tl.program_id(0) * n_groups, k, n_groups, BLOCK)
    tl.store(found_ptr + 2 * tl.program_id(0), low)
    tl.store(found_ptr + 2 * tl.program_id(0) + 1, top)


@pytest.mark.parametrize(("n_groups", "k"), [(60, 20), (64, 1), (200, 20), (200, 64), (200, 90), (200, 250), (500, 63)])
def test_bound_lets_few_groups_through(n_groups, k, device):
    """Where the largest of each 64th group tell, and where they do not: few are held, or the first groups fire most."""
    z = normal(3, 32 * n_groups, device=device)
    z[1, : 32 * n_groups // 8] += 3
    z[2, :: 32 * 64] += 9  # all of the largest groups share a place
    keys = group_keys(z)
    found = torch.full((3, 2), -1, dtype=torch.int32, device=device)
    _bound_kernel[(3,)](keys, found, k, n_groups, BLOCK=64)
    assert_bitwise_equal("largest", found[:, 1], keys.amax(1))
    reached = (keys >= found[:, :1]).sum(1).tolist()
    assert all(min(k, n_groups) <= count <= max(k, min(3 * k // 2, n_groups)) for count in reached)


@interpreted
@every_of
def test_random_cases(sizes, of):
    generator = torch.Generator().manual_seed(0)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    for seed in range(20):
        n, F = draw(1, 4), draw(1, 400)
        z = lattice(n, F, seed=seed, reach=draw(1, 40)) if draw(0, 1) else normal(n, F, seed=seed)
        if draw(0, 3) == 0:
            z[draw(0, n - 1), draw(0, F - 1)] = (torch.nan, torch.inf, -torch.inf)[draw(0, 2)]
        assert_chosen(z, draw(1, F), of)


def test_the_configuration_holds_the_groups_of_k():
    assert selection.select_config(1) is selection.select_config(selection.FEW.tile) is selection.FEW
    assert selection.select_config(selection.FEW.tile + 1) is selection.MANY
    assert sum(width for _, width in selection.DIGITS) == 31
    assert all(shift == sum(w for _, w in selection.DIGITS[i + 1 :]) for i, (shift, _) in enumerate(selection.DIGITS))


@pytest.mark.gpu
@every_of
@pytest.mark.parametrize(("n", "F", "k"), [(300, 16384, 64), (65, 131072, 64), (40, 16384, 1152), (16, 2**20, 200)])
def test_shipped_sizes(of, n, F, k):
    z = torch.randn(n, F, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    expected = reference.largest(z, k, of)
    for _ in range(3):
        assert torch.equal(chosen(z, k, of), expected)


@pytest.mark.gpu
@every_of
def test_offsets_beyond_32_bits(of):
    """The last rows begin beyond 2³¹ numbers."""
    n, F, k = 2**16 + 3, 2**15, 5
    z = torch.zeros(n, F, device="cuda")
    z[-3:] = torch.randn(3, F, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    words = torch.zeros(n, F // 32, dtype=torch.int32, device="cuda")
    words[-3:] = group_keys(z[-3:])
    if of == "token":
        select_of_tokens(z, words, k)
    else:
        select_of_batch(z, words, 3 * k, k)
    assert torch.equal(bits_of(words[-3:], F), reference.largest(z[-3:], k, of))
    assert not words[:-3].any()
