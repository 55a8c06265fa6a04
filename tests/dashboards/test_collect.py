"""The collector against all activations at once, in plain loops; its independence of how the work is cut; its bounds.

pytest tests/dashboards/test_collect.py
"""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gemmascope.dashboards import collect
from gemmascope.dashboards.collect import Collector, Found, state_bytes
from gemmascope.dashboards.strata import shuffled
from gemmascope.dashboards.table import Examples, Sizes
from gemmascope.dashboards.together import TokenSample
from gemmascope.errors import EnvironmentProblemError
from gemmascope.kernels import SparseCode

from . import plain

SIZES = Sizes(top=4, strata=3, of_stratum=2, window=5, bins=8, logits=3, related=3)


def activations(rows=6, context=12, d_sae=7, seed=0, density=0.3, spread=6.0) -> tuple[Tensor, Tensor]:
    """f [rows, context, d_sae] over several octaves, with ties, and which tokens count."""
    draw = torch.Generator().manual_seed(seed)
    size = torch.randint(1, 9, (rows, context, d_sae), generator=draw).float()
    octave = (torch.rand(rows, context, d_sae, generator=draw) * spread).floor() - spread / 2
    fires = torch.rand(rows, context, d_sae, generator=draw) < density
    fires[..., -1] = False
    counted = torch.rand(rows, context, generator=draw) < 0.85
    return (size * 2.0**octave).where(fires, 0), counted


def code_of(f: Tensor, counted: Tensor) -> SparseCode:
    return SparseCode.from_dense(f[counted])


def collected(f: Tensor, counted: Tensor, cuts: list[int], sizes=SIZES, seed=0) -> Collector:
    """By a collector that is given the rows in pieces ending at ``cuts``."""
    made = Collector(f.shape[2], f.shape[1], sizes, seed)
    start = 0
    for end in [*cuts, len(f)]:
        made.add(code_of(f[start:end], counted[start:end]), counted[start:end], start)
        start = end
    return made


def listed(examples: Examples, *at: int) -> list[plain.Example]:
    row, position, value, window = (part[at].tolist() for part in examples)
    return [found for found in zip(row, position, value, window, strict=True) if found[0] >= 0]


def assert_same(a: Found, b: Found) -> None:
    def flat(found):
        for part in found:
            yield from flat(part) if isinstance(part, tuple) else [part]

    for one, other in zip(flat(a), flat(b), strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("cuts", [[], [1, 2, 3, 4, 5], [2, 4]])
def test_against_plain_loops(seed, cuts):
    f, counted = activations(seed=seed)
    found = collected(f, counted, cuts).found()
    assert found.n_tokens == counted.sum()
    for j in range(f.shape[2]):
        expected = plain.of_latent(f[..., j], counted, SIZES)
        assert found.fired[j] == expected.fired
        assert found.total[j].item() == pytest.approx(expected.total, rel=1e-15)
        assert found.largest[j] == expected.largest
        assert found.histogram_end[j] == expected.end
        assert found.histogram[j].tolist() == expected.histogram
        assert listed(found.top, j) == expected.top
        assert found.stratum_cells[j].tolist() == expected.cells
        for s, members in enumerate(expected.members):
            in_order = sorted(members, key=lambda m: plain.splitmix(m[0], m[1], 0))
            assert listed(found.strata, j, s) == in_order[: SIZES.of_stratum]


def test_empty_slots_are_marked():
    f, counted = activations()
    found = collected(f, counted, []).found()
    for examples in (found.top, found.strata):
        empty = examples.row < 0
        assert empty[-1].all()
        assert not empty.all()
        assert (examples.position[empty] == -1).all()
        assert (examples.value[empty] == 0).all()
        assert (examples.window[empty] == 0).all()


def test_together_against_plain_loops():
    f, counted = activations(seed=5)
    found = collected(f, counted, [2]).found().together
    tokens = [(r, p) for r, p in counted.nonzero().tolist()]
    expected = plain.together(f, tokens, SIZES.related)
    assert found.n_sampled == len(tokens)
    assert torch.equal(found.sampled, (f[counted] > 0).sum(0))
    for j, of_latent in enumerate(expected):
        pairs = zip(found.together[j].tolist(), found.together_tokens[j].tolist(), strict=True)
        assert [pair for pair in pairs if pair[0] >= 0] == of_latent


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("max_tokens", "max_pairs"), [(9, 10**6), (10**6, 60), (1, 1), (5, 40), (10**6, 200)])
def test_the_sample_is_the_longest_beginning_that_fits(max_tokens, max_pairs, seed, monkeypatch):
    monkeypatch.setattr("gemmascope.dashboards.together.COUNTED", 7)
    f, counted = activations(rows=10, seed=seed)
    ordered = sorted(counted.nonzero().tolist(), key=lambda t: plain.splitmix(t[0], t[1], 3))
    chosen: list[tuple[int, int]] = []
    pairs = 0
    for r, p in ordered[:max_tokens]:
        pairs += int((f[r, p] > 0).sum()) ** 2
        if pairs > max_pairs:
            break
        chosen.append((r, p))
    expected = plain.together(f, chosen, 3)
    for step in (1, 4, 10):
        sample = TokenSample(f.shape[2], max_tokens, max_pairs)
        for start in range(0, len(f), step):
            rows = slice(start, start + step)
            row, position = counted[rows].nonzero(as_tuple=True)
            sample.add(code_of(f[rows], counted[rows]), shuffled(row + start, position, 3))
        found = sample.count(3)
        assert found.n_sampled == len(chosen)
        for j in range(f.shape[2]):
            there = zip(found.together[j].tolist(), found.together_tokens[j].tolist(), strict=True)
            assert [pair for pair in there if pair[0] >= 0] == expected[j]


@pytest.mark.parametrize("cuts", [[], [2, 5], list(range(1, 10))])
def test_a_sample_is_of_the_rows_of_the_whole_text(cuts):
    """By the number that a row has there, in whatever pieces it comes."""
    f, counted = activations(rows=10, seed=2)
    ordered = sorted(counted.nonzero().tolist(), key=lambda t: plain.splitmix(t[0], t[1], 0))
    rows, positions = torch.tensor(ordered[:9]).T
    made = Collector(f.shape[2], f.shape[1], SIZES)
    made.sample.max_tokens = 9
    for start, end in itertools.pairwise([0, *cuts, 10]):
        made.add(code_of(f[start:end], counted[start:end]), counted[start:end], start)
    found = made.found().together
    assert found.n_sampled == 9
    assert torch.equal(found.sampled, (f[rows, positions] > 0).sum(0))


@given(
    seed=st.integers(0, 100),
    cuts=st.lists(st.integers(0, 8), max_size=6).map(sorted),
    entries=st.sampled_from([1, 17, 1 << 21]),
    moved=st.sampled_from([1, 200, 1 << 22]),
)
@settings(max_examples=60, deadline=None)
def test_how_the_work_is_cut_changes_no_bit(seed, cuts, entries, moved):
    f, counted = activations(rows=8, seed=seed, spread=12.0)
    f = f * 1.1  # sums that round
    whole = collected(f, counted, []).found()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect, "ENTRIES", entries)
        patch.setattr("gemmascope.dashboards.examples.MOVED", moved)
        patch.setattr("gemmascope.dashboards.strata.MOVED", moved)
        assert_same(collected(f, counted, cuts).found(), whole)


def test_restored_goes_on_to_the_same_bits():
    f, counted = activations(seed=3)
    whole = collected(f * 1.1, counted, []).found()
    first = collected(f[:4] * 1.1, counted[:4], [1])
    other = Collector(f.shape[2], f.shape[1], SIZES)
    other.restore({name: tensor.clone() for name, tensor in first.tensors().items()})
    other.add(code_of(f[4:] * 1.1, counted[4:]), counted[4:], 4)
    assert_same(other.found(), whole)


def test_the_seed_draws_another_sample_and_nothing_else():
    f, counted = activations(rows=20, seed=1, spread=1.0)
    one, other = (collected(f, counted, [], seed=seed).found() for seed in (0, 1))
    assert not torch.equal(one.strata.row, other.strata.row)
    assert torch.equal(one.top.row, other.top.row)
    assert torch.equal(one.stratum_cells, other.stratum_cells)


def test_memory_does_not_grow_with_the_text():
    peaks = []
    for rows in (64, 128, 512):
        f, counted = activations(rows=rows, d_sae=20)
        made = Collector(20, 12, SIZES)
        made.sample.max_tokens = 32
        peak = 0
        for start in range(0, rows, 4):
            part = slice(start, start + 4)
            made.add(code_of(f[part], counted[part]), counted[part], start)
            peak = max(peak, made.nbytes)
        fixed = made.nbytes - made.sample.nbytes - 16 - made.sample.tensors()["before"].nbytes
        assert fixed == state_bytes(20, SIZES)
        peaks.append(peak)
    assert max(peaks) - min(peaks) <= 0.02 * min(peaks)  # how far the sample runs over before it is cut


def test_what_comes_after_a_token_that_was_too_much_is_not_sampled():
    """Of three tokens in the order the second exceeds the bound: the third must not come in its place."""
    sample = TokenSample(4, max_pairs=4)
    sample.add(SparseCode.from_dense(torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 0]])), torch.tensor([0, 10]))
    sample.cut()
    sample.add(SparseCode.from_dense(torch.tensor([[1.0, 0, 0, 0]])), torch.tensor([20]))
    assert sample.count(1).n_sampled == 1


def test_the_bounds_of_a_sample_bound_its_entries():
    """Cauchy–Schwarz: entries ≤ √(tokens · pairs)."""
    f, counted = activations(rows=64, d_sae=30, density=0.9)
    sample = TokenSample(30, 50, 5000)
    for start in range(0, 64, 2):
        row, position = counted[start : start + 2].nonzero(as_tuple=True)
        code = code_of(f[start : start + 2], counted[start : start + 2])
        sample.add(code, shuffled(row + start, position, 0))
        assert len(sample.latents) <= math.sqrt(1.25**2 * 50 * 5000)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 2.0**127, -1.0, 1e-50])
def test_what_is_no_activation_is_refused(value):
    made = Collector(4, 6, SIZES)
    values = torch.tensor([1.0, value], dtype=torch.float64)
    code = SparseCode(values, torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0, 1, 2, 2, 2, 2, 2]), 4)
    with pytest.raises(EnvironmentProblemError, match="rows 0 to 0: expected finite activations above 0"):
        made.add(code, torch.ones(1, 6, dtype=torch.bool), 0)


def test_the_largest_and_smallest_activations_are_counted():
    f = torch.zeros(2, 6, 2)
    f[0, 0, 0], f[0, 1, 0], f[1, 5, 1] = 2.0**126, 2.0**-149, 2.0**-149
    counted = torch.ones(2, 6, dtype=torch.bool)
    found = collected(f, counted, [1], Sizes(top=2, strata=2, of_stratum=1, window=3, bins=4)).found()
    assert found.histogram.tolist() == [[1, 0, 1, 0], [0, 0, 1, 0]]
    assert found.histogram_end.tolist() == [2.0**127, 2.0**-148]


def test_wrong_arguments():
    f, counted = activations()
    made = Collector(7, 12, SIZES)
    code = code_of(f[:2], counted[:2])
    with pytest.raises(ValueError, match="first_row: expected 0, the row after the last, got 2"):
        made.add(code, counted[:2], 2)
    with pytest.raises(ValueError, match=r"code: expected the \d+ tokens where counted"):
        made.add(code, counted[:3], 0)
    with pytest.raises(ValueError, match=r"counted: expected bool \[rows, 12\]"):
        made.add(code, counted[:2].int(), 0)
    with pytest.raises(ValueError, match="d_sae 7, got 8"):
        made.add(code._replace(d_sae=8), counted[:2], 0)
    with pytest.raises(ValueError, match="context: expected at least 5, got 4"):
        Collector(7, 4, SIZES)
    with pytest.raises(TypeError, match="sizes"):
        Collector(7, 12, None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="bins: expected a power of 2, got 6"):
        Sizes(bins=6)
    with pytest.raises(ValueError, match="top: expected at least 1, got 0"):
        Sizes(top=0)


def test_shuffled_is_splitmix64():
    rows, positions = torch.tensor([0, 1, 5, 2**31 - 1]), torch.tensor([0, 7, 1023, 65535])
    for seed in (0, 3, 2**63 - 1):
        expected = [plain.splitmix(r, p, seed) for r, p in zip(rows.tolist(), positions.tolist(), strict=True)]
        assert shuffled(rows, positions, seed).tolist() == expected
