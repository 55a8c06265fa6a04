"""The order of the data: a pure function of (seed, step), the same tokens at every site."""

import pytest
import torch

from gemmascope.activations import batches
from gemmascope.sites import Site

A, B = Site(0, "resid"), Site(1, "att")


def store(n=10):
    rows = torch.arange(n, dtype=torch.float32)[:, None]
    return {A: rows, B: -rows.expand(n, 3)}


def test_every_token_once_an_epoch_and_the_same_at_every_site():
    stream = list(batches(store(), 5, 6, seed=1))
    assert len(stream) == 6
    for epoch in range(3):
        tokens = torch.cat([batch[A][:, 0] for batch in stream[2 * epoch : 2 * epoch + 2]])
        assert sorted(tokens.tolist()) == list(range(10))
    for batch in stream:
        assert torch.equal(batch[B], -batch[A].expand(5, 3))


def test_resuming_gives_the_same_batches():
    whole = list(batches(store(), 3, 9, seed=2))
    rest = list(batches(store(), 3, 9, seed=2, first_step=5))
    assert all(torch.equal(x[A], y[A]) for x, y in zip(whole[5:], rest, strict=True))


def test_epochs_and_seeds_differ():
    first, second = batches(store(), 10, 2, seed=3)
    (other,) = batches(store(), 10, 1, seed=4)
    assert not torch.equal(first[A], second[A])
    assert not torch.equal(first[A], other[A])


def test_too_few_tokens():
    with pytest.raises(ValueError, match="batch_size: expected at most the 10 tokens harvested, got 11"):
        next(batches(store(), 11, 1, seed=0))


def test_unequal_sites():
    with pytest.raises(ValueError, match=r"activations: expected as many tokens at every site, got \[9, 10\]"):
        next(batches(store() | {B: torch.zeros(9, 3)}, 2, 1, seed=0))
