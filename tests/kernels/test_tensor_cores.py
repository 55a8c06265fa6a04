"""The budgets of products on tensor cores, held against an emulation of them: wide enough for what such hardware does,
and not so wide that anything would pass.

Emulated as measured on Hopper and its predecessors (arXiv 2512.07004): the products of one instruction are exact; they
and the accumulator lose all bits below 2⁻²⁴ of the largest of them, and the sum what fp32 does not hold, both towards
zero. Of fp32 operands for tf32 the hardware ignores 13 bits; rounding them to nearest is the other usage.
"""

import pytest
import torch

from bench.arithmetic import INSTRUCTION_DEPTH
from gemmascope.kernels import SparseCode
from tests.helpers import normal, product_bound
from tests.kernels.test_encode import assert_matches_reference, operands

GENERATOR = torch.Generator().manual_seed(0)
ROUNDINGS = {"cut off": 0, "to nearest": 1 << 12}


def as_tf32(t, half):
    return ((t.contiguous().view(torch.int32) + half) & ~0x1FFF).view(torch.float32)


def cut(t, quantum):
    return torch.trunc(t / quantum) * quantum


def power_of_two(t):
    """2 to the exponent of t, of a number 1.f·2^e that is 2^e; tiny for 0."""
    return torch.ldexp(torch.ones_like(t), torch.frexp(t.abs().clamp(min=1e-300)).exponent - 1)


def product(x, W, precision, half=0):
    """x [N, d] times W [d, F] as tensor cores add it up, [N, F] fp32."""
    if precision == "tf32":
        x, W = as_tf32(x, half), as_tf32(W, half)
    x, W, k = x.double(), W.double(), INSTRUCTION_DEPTH[precision]
    acc = torch.zeros(x.shape[0], W.shape[1], dtype=torch.float64)
    for start in range(0, x.shape[1], k):
        terms = x[:, start : start + k, None] * W[None, start : start + k]
        terms = torch.cat((acc[:, None], terms), 1)
        total = cut(terms, power_of_two(terms.abs().amax(1, keepdim=True)) * 2.0**-24).sum(1)
        acc = cut(total, power_of_two(total) * 2.0**-23)
    return acc.float()


def emulated(x, W_enc, b_enc, threshold, precision, half=0):
    z = product(x, W_enc, precision, half) + b_enc
    kept = z > threshold
    offsets = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0))
    return SparseCode(z[kept], kept.nonzero()[:, 1].int(), offsets, W_enc.shape[1])


def case(precision, d):
    return operands(40, d, 300, torch.float32 if precision == "tf32" else torch.bfloat16)


@pytest.mark.parametrize("d", [264, 2304])
@pytest.mark.parametrize(
    ("precision", "rounding", "least"),
    [("bf16", "cut off", 0.15), ("tf32", "cut off", 0.3), ("tf32", "to nearest", 0.03)],
)
def test_budget_is_reached_and_kept(precision, rounding, least, d):
    arguments = case(precision, d)
    code = emulated(*arguments, precision, ROUNDINGS[rounding])
    assert least < assert_matches_reference(*arguments, code, precision) < 1


def test_budget_of_fp32_sums_is_too_narrow():
    for precision, message in (("bf16", "error .* exceeds"), ("tf32", None)):
        arguments = case(precision, 2304)
        with pytest.raises(AssertionError, match=message):
            assert_matches_reference(*arguments, emulated(*arguments, precision), "fp32")


@pytest.mark.parametrize("precision", INSTRUCTION_DEPTH)
def test_a_block_too_few_and_a_rounding_too_many_are_noticed(precision):
    x, W_enc, b_enc, threshold = case(precision, 264)
    for wrong_x in (x.clone().index_fill_(1, torch.arange(8), 0), (8 * x).round() / 8):
        code = emulated(wrong_x, W_enc, b_enc, threshold, precision)
        with pytest.raises(AssertionError):
            assert_matches_reference(x, W_enc, b_enc, threshold, code, precision)


@pytest.mark.parametrize("precision", INSTRUCTION_DEPTH)
def test_bound_holds_where_every_bit_is_lost(precision):
    """Sums in which small terms meet large ones, which lose the most."""
    d, dtype = 264, torch.float32 if precision == "tf32" else torch.bfloat16
    scales = torch.logspace(-4, 4, d)[torch.randperm(d, generator=GENERATOR)]
    x = (normal(40, d) * scales).to(dtype)
    W = normal(d, 100, dtype=dtype, seed=1)
    error = (product(x, W, precision).double() - x.double() @ W.double()).abs()
    share = error / (product_bound(d, precision) * (x.double().abs() @ W.double().abs()))
    assert share.max() < 1
