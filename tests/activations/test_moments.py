"""Mean and variance against formulas in exact arithmetic."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemmascope.activations import moments as module
from gemmascope.activations.moments import check_activations, moments

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def exactly(x):
    """The mean row and the variance in fractions."""
    rows = [[Fraction(value) for value in row] for row in x.tolist()]
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    return mean, sum((a - b) ** 2 for row in rows for a, b in zip(row, mean, strict=True)) / len(rows)


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 12),
    d=st.integers(1, 4),
    dtype=st.sampled_from(DTYPES),
    centre=st.sampled_from([0.0, 1.0, 3e4]),
    spread=st.sampled_from([1e-7, 1.0, 1e3]),
    seed=st.integers(0, 99),
)
def test_against_fractions(n, d, dtype, centre, spread, seed):
    x = centre + spread * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x.to(dtype)
    mean, variance = moments("x", x)
    exact_mean, exact_variance = exactly(x)
    assert mean.dtype == torch.float64
    assert mean.tolist() == pytest.approx([float(value) for value in exact_mean], rel=1e-13, abs=1e-13)
    assert variance == pytest.approx(float(exact_variance), rel=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.1, 1 / 3, -7e4, 1e-30])
def test_rows_that_do_not_vary_have_a_variance_of_exactly_zero(dtype, value):
    row = torch.tensor([value, 2 * value, 0.0], dtype=torch.float64).clamp(-6e4, 6e4).to(dtype)
    for n in (1, 2, 3, 1001, 5000):
        mean, variance = moments("x", row.expand(n, 3))
        assert variance == 0
        assert torch.equal(mean, row.double())


def test_the_least_that_a_row_can_vary_is_seen():
    for dtype in DTYPES:
        x = torch.full((1000, 2), 0.1, dtype=dtype)
        x[17, 1] = torch.nextafter(x[17, 1], torch.tensor(1.0, dtype=dtype))
        _, variance = moments("x", x)
        step = (x[17, 1].double() - x[0, 1].double()).item()
        assert variance == pytest.approx(step**2 * (1 - 1e-3) / 1000, rel=1e-2)


@pytest.mark.parametrize("elements", [1, 50, 2**24])
def test_chunks_do_not_change_the_result(monkeypatch, elements):
    x = 1e3 + torch.randn(300, 7, generator=torch.Generator().manual_seed(0))
    mean, variance = moments("x", x)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", elements)
    other, same = moments("x", x)
    torch.testing.assert_close(other, mean, rtol=1e-14, atol=0)
    assert same == pytest.approx(variance, rel=1e-12)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (None, TypeError, "expected a torch.Tensor, got NoneType"),
        ([[1.0]], TypeError, "expected a torch.Tensor, got list"),
        (torch.ones(3, 2).int(), TypeError, "expected dtype float16 or bfloat16 or float32 or float64, got int32"),
        (torch.ones(3, 2).bool(), TypeError, "expected dtype .*, got bool"),
        (torch.ones(3, 2, dtype=torch.complex64), TypeError, "expected dtype .*, got complex64"),
        (torch.ones(3, 2).to(torch.float8_e4m3fn), TypeError, "expected dtype .*, got float8_e4m3fn"),
        (torch.ones(3, 2).to_sparse(), TypeError, "expected a dense torch.Tensor that holds values, got .*sparse_coo"),
        (torch.ones(3, 2, device="meta"), TypeError, "expected a dense torch.Tensor that holds values, got .* meta"),
        (torch.ones(3), ValueError, r"expected shape \[n, d_model\], got \[3\]"),
        (torch.ones(0, 3), ValueError, "expected at least one row, got none"),
        (torch.ones(3, 0), ValueError, "expected at least one column, got none"),
        (torch.tensor([[1.0], [math.nan]]), ValueError, "expected finite values, found NaN or Inf"),
        (torch.tensor([[1.0], [-math.inf]]), ValueError, "expected finite values, found NaN or Inf"),
        (
            torch.tensor([[0.0], [1e200]], dtype=torch.float64),
            ValueError,
            "expected values whose squares fp64 can hold",
        ),
    ],
)
def test_refusals(x, error, message):
    with pytest.raises(error, match=f"^x: {message}"):
        moments("x", x)


def test_a_width_can_be_asked_for():
    check_activations("x", torch.ones(3, 2), 2)
    with pytest.raises(ValueError, match=r"^x: expected shape \[n, 5\], got \[3, 2\]$"):
        check_activations("x", torch.ones(3, 2), 5)
