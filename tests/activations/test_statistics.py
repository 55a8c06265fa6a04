"""What is measured of a site equals NumPy's fp64, and the warnings come when they should."""

import math

import numpy as np
import pytest
import torch

from gemmascope.activations import SiteStatistics, statistics, warnings_for
from gemmascope.sites import Site

SITE = Site(3, "resid")


def activations(n=500, width=7, outliers=0, seed=0, mean=2.0):
    x = mean + torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    x[:outliers] *= 100
    return x


def numpy_statistics(x, kept, ratio):
    x, kept = x.double().numpy(), kept.numpy()
    norms = np.linalg.norm(x, axis=1)
    distances = ((x - x.mean(0)) ** 2).sum(1)
    top = np.sort(distances)[::-1][: math.ceil(len(x) / 1000)]
    median = np.sort(norms)[(len(x) - 1) // 2]
    return {
        "tokens": kept.sum(),
        "mean": x[kept].mean(0),
        "variance": ((x[kept] - x[kept].mean(0)) ** 2).sum(1).mean(),
        "median_norm": median,
        "outliers": (norms > ratio * median).sum(),
        "top_variance_share": top.sum() / distances.sum() if len(x) > 1 else 0.0,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2, 999, 3001])
@pytest.mark.parametrize("dropped", [False, True], ids=["all", "kept"])
@pytest.mark.parametrize("rows", [2**20, 64], ids=["one piece", "pieces"])
def test_equals_numpy(dtype, n, dropped, rows, monkeypatch):
    monkeypatch.setattr(statistics, "CHUNK_ELEMENTS", 8 * 7 * rows)
    x = activations(n, outliers=min(3, n - 1)).to(dtype)
    kept = torch.ones(n, dtype=torch.bool)
    if dropped:
        kept[: min(3, n - 1)] = False
    measured = SiteStatistics.measure(x, kept if dropped else None, outlier_ratio=3.0)
    expected = numpy_statistics(x, kept, 3.0)
    assert measured.tokens == expected["tokens"]
    assert measured.outliers == expected["outliers"]
    assert measured.mean.dtype == torch.float64
    np.testing.assert_allclose(measured.mean, expected["mean"], rtol=1e-12)
    np.testing.assert_allclose(measured.variance, expected["variance"], rtol=1e-12)
    np.testing.assert_allclose(measured.median_norm, expected["median_norm"], rtol=1e-6)
    np.testing.assert_allclose(measured.top_variance_share, expected["top_variance_share"], rtol=1e-12)


def test_a_mean_far_beyond_what_varies_costs_no_digits():
    x = activations(4000, mean=0.0).double()
    far = (x.float() + 2**14).contiguous()  # exactly representable steps of 2⁻⁹
    measured = SiteStatistics.measure(far)
    np.testing.assert_allclose(measured.variance, far.double().var(0, correction=0).sum().item(), rtol=1e-10)
    assert measured.gamma == pytest.approx(2**14 * math.sqrt(7) / math.sqrt(measured.variance), rel=1e-3)


def test_equal_rows_do_not_vary():
    row = torch.tensor([0.1, -0.7, 1e6])
    measured = SiteStatistics.measure(row.repeat(1000, 1))
    assert measured.variance == 0
    assert torch.equal(measured.mean, row.double())
    assert measured.gamma == math.inf


def test_norms_that_are_known_are_taken():
    x = activations(10)
    norms = torch.arange(10, dtype=torch.float32)
    measured = SiteStatistics.measure(x, norms=norms, outlier_ratio=2.0)
    assert measured.median_norm == 4
    assert measured.outliers == 1


def test_facts_and_mean_are_all_of_it():
    measured = SiteStatistics.measure(activations())
    again = SiteStatistics.from_facts(measured.facts(), measured.mean)
    assert again.facts() == measured.facts()
    assert again.gamma == measured.gamma


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite(value):
    x = activations()
    x[7, 2] = value
    with pytest.raises(ValueError, match=r"layer_3/resid: expected finite values, found NaN or Inf"):
        SiteStatistics.measure(x, name=str(SITE))


def test_wrong_arguments():
    x = activations()
    with pytest.raises(ValueError, match="activations: expected some tokens that are kept, found none"):
        SiteStatistics.measure(x, torch.zeros(len(x), dtype=torch.bool))
    with pytest.raises(ValueError, match=r"kept: expected shape \[500\], got \[3\]"):
        SiteStatistics.measure(x, torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"outlier_ratio: expected a finite number ≥ 1, got 0\.5"):
        SiteStatistics.measure(x, outlier_ratio=0.5)
    with pytest.raises(ValueError, match="activations: expected at least one row, got none"):
        SiteStatistics.measure(x[:0])


def test_warns_of_few_tokens_that_hold_the_variance():
    measured = {SITE: SiteStatistics.measure(activations(2000, outliers=2))}
    [line] = warnings_for(measured)
    assert "layer_3/resid: the 0.1 % of tokens farthest from the mean hold 9" in line
    assert "set drop_norm (2 above 5 times the median norm)" in line
    [line] = warnings_for(measured, drop_norm=5.0)
    assert "drop_norm leaves out 2 above 5 times the median norm" in line
    assert warnings_for({SITE: SiteStatistics.measure(activations(2000))}) == []


@pytest.mark.parametrize(("mean", "warns"), [(0.5, False), (0.9, False), (1.1, True), (5.0, True)])
def test_warns_of_a_mean_that_outweighs_what_varies(mean, warns):
    """Each coordinate has variance 1, so γ is the mean of one."""
    measured = {SITE: SiteStatistics.measure(activations(5000, mean=mean))}
    lines = warnings_for(measured, scale_by="mean_square")
    assert [line for line in lines if 'set scale_by = "variance"' in line] == lines
    assert bool(lines) == warns
    assert warnings_for(measured, scale_by="variance") == warnings_for(measured) == []
