"""The counting sort by latent against a stable sort: python -m pytest tests/kernels/test_transpose.py"""

import pytest
import torch

from gemmascope.kernels.dispatch import interpreting
from gemmascope.kernels.entries import ACTIVE, Entries
from tests.helpers import assert_bitwise_equal
from tests.kernels import sanitizer

pytest.importorskip("triton")
from gemmascope.kernels.gpu import transpose as gpu_transpose
from gemmascope.kernels.gpu.transpose import BLOCK_TOKENS, MARKS_BYTES, TransposeConfig, by_latent

interpreted = pytest.mark.skipif(not interpreting(), reason="forces tiles or programs, in the interpreter only")


@pytest.fixture
def small_tiles(monkeypatch):
    """Several programs of each kernel, and several groups."""
    monkeypatch.setattr(gpu_transpose, "CONFIG", TransposeConfig(mark=32, group=8, place=16, num_warps=1))


def entries_of(mask, spare=5, missing=0, device="cpu"):
    """The pairs [N, F] of a mask, every third active; ``missing`` of them beyond the capacity. What is undefined holds
    what would be noticed."""
    tokens, latents = mask.nonzero(as_tuple=True)
    capacity = len(tokens) - missing if missing else len(tokens) + spare
    stored = min(len(tokens), capacity)
    offsets = torch.zeros(len(mask) + 1, dtype=torch.int64)
    offsets[1:] = mask.sum(1).cumsum(0)
    entries = Entries(
        torch.full((capacity,), torch.nan),
        torch.full((capacity,), mask.shape[1], dtype=torch.int32),
        torch.full((capacity,), torch.iinfo(torch.int32).max, dtype=torch.int32),
        offsets,
    )
    entries.latents[:stored] = (latents + ACTIVE * (torch.arange(len(latents)) % 3 == 0)).int()[:stored]
    entries.tokens[:stored] = tokens.int()[:stored]
    return Entries(*(t.to(device) for t in entries)), latents[:stored]


def check(mask, device="cpu", **room):
    entries, latents = entries_of(mask, **room, device=device)
    order, offsets = by_latent(entries, mask.shape[1])
    assert order.shape == entries.latents.shape
    assert_bitwise_equal("order", order[: len(latents)].cpu(), torch.argsort(latents, stable=True))
    counts = torch.bincount(latents, minlength=mask.shape[1])
    assert_bitwise_equal("offsets", offsets.cpu(), torch.cat((counts.new_zeros(1), counts.cumsum(0))))


def random_mask(N, F, density=0.3, seed=0):
    return torch.rand(N, F, generator=torch.Generator().manual_seed(seed)) < density


@interpreted
@pytest.mark.parametrize(
    ("N", "F", "density"),
    [
        *((1, 1, 1.0), (1, 40, 0.5), (5, 1, 0.5), (31, 7, 0.4), (32, 8, 0.4), (33, 9, 0.4)),
        *((BLOCK_TOKENS - 1, 3, 0.1), (BLOCK_TOKENS, 3, 0.1), (BLOCK_TOKENS + 1, 3, 0.1), (3 * BLOCK_TOKENS, 5, 0.05)),
    ],
)
def test_matches_a_stable_sort(small_tiles, N, F, density):
    check(random_mask(N, F, density))


@pytest.mark.parametrize(("N", "F"), [(700, 33), (40, 4200)])
def test_shipped_tiles_match_a_stable_sort(N, F, device):
    """Two blocks of tokens and more, two groups of starts and more."""
    check(random_mask(N, F, 0.05), device)


@interpreted
@pytest.mark.parametrize("N", [1, 31, 32, BLOCK_TOKENS + 3])
def test_every_pair_is_an_entry(small_tiles, N):
    check(torch.ones(N, 2, dtype=torch.bool))


@interpreted
@pytest.mark.parametrize("latent", [0, 4, 9])
def test_all_entries_of_one_latent(small_tiles, latent):
    mask = torch.zeros(BLOCK_TOKENS + 9, 10, dtype=torch.bool)
    mask[:, latent] = True
    check(mask)


@interpreted
def test_all_entries_of_one_token(small_tiles):
    mask = torch.zeros(300, 10, dtype=torch.bool)
    mask[290] = True
    check(mask)


@pytest.mark.parametrize(("N", "F", "spare"), [(6, 9, 0), (6, 9, 7), (0, 4, 0), (0, 4, 3), (6, 0, 3), (6, 0, 0)])
def test_no_entry_at_all(N, F, spare, device):
    check(torch.zeros(N, F, dtype=torch.bool), device, spare=spare)


@interpreted
@pytest.mark.parametrize("spare", [0, 1, 16, 400])
def test_room_to_spare(small_tiles, spare):
    check(random_mask(20, 9), spare=spare)


@pytest.mark.parametrize("missing", [1, 10, 54])
def test_entries_beyond_the_capacity(missing, device):
    check(torch.ones(6, 9, dtype=torch.bool), device, missing=missing)


@interpreted
def test_repeats_in_any_order_of_programs(small_tiles):
    entries, latents = entries_of(random_mask(BLOCK_TOKENS + 9, 12, 0.03))
    first = by_latent(entries, 12)
    for seed in (1, 2, 3):
        with sanitizer.sanitize(race=True, seed=seed) as report:
            again = by_latent(entries, 12)
        assert report.launches == 3
        assert report.programs > 12
        assert_bitwise_equal("order", again.order[: len(latents)], first.order[: len(latents)])
        assert_bitwise_equal("offsets", again.offsets, first.offsets)


@interpreted
def test_more_marks_than_there_is_room_for(monkeypatch):
    mask = random_mask(9, 12)
    monkeypatch.setattr(gpu_transpose, "MARKS_BYTES", 12 * 32)
    with sanitizer.sanitize(race=False) as report:
        check(mask)
        assert report.launches == 3
        check(random_mask(9, 13))
        assert report.launches == 3


def test_places_fit_into_32_bits():
    """There are no more entries than bits of marks."""
    assert 8 * MARKS_BYTES + max(gpu_transpose.CONFIG.mark, gpu_transpose.CONFIG.place) < 2**31


@interpreted
def test_capacity_beyond_32_bits(small_tiles):
    """Room for 2³¹ + 3 entries, of which there are two."""
    few, latents = entries_of(torch.eye(2, 3, dtype=torch.bool).flip(1), spare=0)
    capacity = 2**31 + 3
    entries = Entries(torch.empty(0), *(torch.empty(capacity, dtype=torch.int32) for _ in range(2)), few.offsets)
    entries.latents[:2], entries.tokens[:2] = few.latents, few.tokens
    entries.latents[2:8] = 3
    with sanitizer.sanitize(race=False):
        order, offsets = by_latent(entries, 3)
    assert order[:2].tolist() == torch.argsort(latents, stable=True).tolist() == [1, 0]
    assert offsets.tolist() == [0, 0, 1, 2]
