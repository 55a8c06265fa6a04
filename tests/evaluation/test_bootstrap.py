"""Intervals over documents: by hand, against the normal approximation, and the same in every run."""

import math

import pytest
import torch

from gemmascope.evaluation.bootstrap import Bootstrap


def test_against_draws_made_by_hand():
    numerators = torch.tensor([1.0, 4.0, 2.0], dtype=torch.float64)
    denominators = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(7)
    found = []
    for _ in range(40):
        drawn = torch.randint(3, (3,), generator=generator)
        found.append((numerators[drawn].sum() / denominators[drawn].sum()).item())
    ends = torch.quantile(torch.tensor(found, dtype=torch.float64), torch.tensor([0.05, 0.95], dtype=torch.float64))
    bootstrap = Bootstrap(3, draws=40, seed=7, level=0.9)
    assert bootstrap.ratio(numerators, denominators) == pytest.approx(tuple(ends.tolist()), rel=1e-12)


def test_of_many_documents_it_is_nearly_the_normal_one():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(400, generator=generator, dtype=torch.float64) + 3
    found = Bootstrap(400, draws=4000).ratio(values, torch.ones_like(values))
    assert found is not None
    error = 1.96 * values.std().item() / math.sqrt(400)
    assert found[0] == pytest.approx(values.mean().item() - error, abs=0.1 * error)
    assert found[1] == pytest.approx(values.mean().item() + error, abs=0.1 * error)


def test_tokens_of_one_document_count_as_one():
    """Two documents of 100 tokens each, all alike within: the interval is from one to the other."""
    found = Bootstrap(2, draws=500).ratio(
        torch.tensor([0.0, 100.0], dtype=torch.float64), torch.tensor([100.0, 100.0], dtype=torch.float64)
    )
    assert found == (0, 1)


def test_same_seed_same_interval():
    values = torch.rand(30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ones = torch.ones_like(values)
    first, again, other = (Bootstrap(30, seed=seed).ratio(values, ones) for seed in (3, 3, 4))
    assert first == again != other


def test_where_there_is_none():
    one = torch.ones(1, dtype=torch.float64)
    assert Bootstrap(1).ratio(one, one) is None
    two = torch.ones(2, dtype=torch.float64)
    assert Bootstrap(2).ratio(two, torch.zeros_like(two)) is None
    assert Bootstrap(2).ratio(two * math.nan, two) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"documents": 0}, "documents: expected at least 1, got 0"),
        ({"documents": 2, "draws": 1}, "draws: expected at least 2, got 1"),
        ({"documents": 2, "seed": -1}, "seed: expected "),
        ({"documents": 2, "level": 1.0}, "level: expected less than 1, got 1.0"),
        ({"documents": 2, "level": 0}, "level: expected "),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Bootstrap(**arguments)


def test_sums_of_other_documents():
    with pytest.raises(ValueError, match=r"^denominators: expected shape \[3\], got \[2\]"):
        Bootstrap(3).ratio(torch.ones(3), torch.ones(2))
