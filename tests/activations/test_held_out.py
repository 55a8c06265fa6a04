"""Held-out rows: disjoint from training by block, drawn by the seed, and spread over the whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemmascope.activations import hold_out, sample_rows


def numbered(n):
    return torch.arange(n)[:, None]


@settings(deadline=None)
@given(n=st.integers(2, 3000), every=st.integers(2, 20), block=st.integers(1, 40), seed=st.integers(0, 2**64 - 1))
def test_every_row_is_in_one_part_and_blocks_are_whole(n, every, block, seed):
    if n < every:
        with pytest.raises(ValueError, match=f"^rows: expected at least {every}, one to hold out of each {every}, got"):
            hold_out(numbered(n), seed, every=every, block=block)
        return
    training, held_out = (part.flatten().tolist() for part in hold_out(numbered(n), seed, every=every, block=block))
    assert sorted(training + held_out) == list(range(n))
    assert held_out == sorted(held_out)
    assert training == sorted(training)
    block = min(block, n // every)
    groups = {}
    for row in held_out:
        groups.setdefault(row // (block * every), set()).add(row // block)
    assert all(len(blocks) == 1 for blocks in groups.values()), "one block of each group"
    whole = n // (block * every)
    assert set(range(whole)) <= set(groups), "none of the complete groups is left out"
    assert len(held_out) >= whole * block > 0


def test_the_seed_decides_and_nothing_else():
    one, again, other = (hold_out(numbered(4000), seed)[1] for seed in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    state = torch.random.get_rng_state()
    hold_out(numbered(4000), 3)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_every_block_is_as_likely():
    counts = torch.zeros(160)
    for seed in range(400):
        counts[hold_out(numbered(160), seed, every=16, block=1)[1].flatten()] += 1
    assert counts.sum() == 400 * 10
    assert counts.min() > 5
    assert counts.max() < 60


@settings(deadline=None)
@given(length=st.integers(0, 400), n=st.integers(1, 400), seed=st.integers(0, 2**64 - 1))
def test_a_sample_has_one_row_of_each_piece(length, n, seed):
    picked = sample_rows(numbered(length), n, seed).flatten().tolist()
    assert len(picked) == min(length, n)
    assert len(set(picked)) == len(picked)
    if length > n:
        for piece, row in enumerate(picked):
            assert piece * length // n <= row < (piece + 1) * length // n


def test_a_sample_is_of_the_seed():
    one, again, other = (sample_rows(numbered(4000), 50, seed) for seed in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_defaults_of_torch_change_nothing():
    expected = hold_out(numbered(500), 1), sample_rows(numbered(500), 20, 1)
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    try:
        rows = torch.arange(500, device="cpu")[:, None]
        found = hold_out(rows, 1), sample_rows(rows, 20, 1)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found[0][1], expected[0][1])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        (hold_out, ([[1]],), TypeError, "rows: expected a Tensor, got list"),
        (hold_out, (torch.tensor(3),), ValueError, r"rows: expected shape \[n, …\], got a scalar"),
        (hold_out, (numbered(9), -1), ValueError, "seed: expected at least 0, got -1"),
        (hold_out, (numbered(9), 2**64), ValueError, r"seed: expected less than 2\*\*64, got 18446744073709551616"),
        (hold_out, (numbered(9), 1.0), TypeError, "seed: expected an int, got float"),
        (sample_rows, (numbered(9), 0), ValueError, "n: expected at least 1, got 0"),
        (sample_rows, (numbered(9), None), TypeError, "n: expected an int, got NoneType"),
        (sample_rows, (None, 3), TypeError, "rows: expected a Tensor, got NoneType"),
    ],
)
def test_refusals(function, arguments, error, message):
    with pytest.raises(error, match=f"^{message}"):
        function(*arguments)


@pytest.mark.parametrize(("name", "value"), [("every", 1), ("block", 0)])
def test_numbers_that_hold_out_nothing(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected at least {value + 1}, got {value}"):
        hold_out(numbered(9), **{name: value})
