"""Logistic regression against a case by hand and its own gradient; accuracy and area against counting."""

import math

import pytest
import torch

from gemmascope.probing import area_under_curve, balanced_accuracy, fit_logistic
from gemmascope.probing.probes import TOLERANCE


def drawn(n=200, k=5, seed=0, share=0.3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, k, generator=generator, dtype=torch.float64) * torch.arange(1, k + 1) + 3
    score = x[:, 0] - 0.2 * x[:, -1] + torch.randn(n, generator=generator, dtype=torch.float64)
    return x, score > score.quantile(1 - share)


def gradient_by_autograd(x, labels, probe, l2):
    """Of the loss as the docstring has it, in the probe's own units."""
    weight, bias = (t.clone().requires_grad_() for t in (probe.weight, probe.bias))
    z = ((x.double() - x.double().mean(0)) / x.double().std(0, correction=0)) @ weight + bias
    sign = torch.where(labels, 1.0, -1.0).double()
    n, positive = len(x), labels.double().sum()
    c = torch.where(labels, n / (2 * positive), n / (2 * (n - positive)))
    loss = (c * torch.log1p(torch.exp(-sign * z))).sum() + l2 / 2 * weight.square().sum()
    loss.backward()
    assert weight.grad is not None
    assert bias.grad is not None
    return torch.cat([weight.grad, bias.grad[None]])


@pytest.mark.parametrize("l2", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("k", [1, 5, 60])
def test_its_gradient_is_zero(k, l2):
    x, labels = drawn(k=k)
    probe = fit_logistic(x, labels, l2)
    assert probe.converged
    assert gradient_by_autograd(x, labels, probe, l2).abs().max() <= 10 * TOLERANCE * len(x)


def test_by_hand():
    """x = ∓1, which is standardised already, two rows of each class: w > 0 with 4·σ(−w) = l2·w, b = 0. With w = ln 3,
    σ(−w) = ¼ and l2 = 1/ln 3."""
    x = torch.tensor([[-1.0], [-1.0], [1.0], [1.0]])
    labels = x[:, 0] > 0
    probe = fit_logistic(x, labels, 1 / math.log(3))
    assert probe.weight.item() == pytest.approx(math.log(3), rel=1e-8)
    assert probe.bias.item() == pytest.approx(0, abs=1e-9)
    assert probe.scores(torch.tensor([[2.0]])).item() == pytest.approx(2 * math.log(3))
    # Rows that are judged are measured by the mean and the deviation of those that it was trained on.
    probe = fit_logistic(10 + 3 * x, labels, 1 / math.log(3))
    assert probe.scores(torch.tensor([[16.0], [10.0]])).tolist() == pytest.approx([2 * math.log(3), 0], abs=1e-8)


def test_both_classes_weigh_the_same():
    """Rows of one class that are there twice change nothing but the mean and the deviation, which here they leave."""
    x = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]] + [[-1.0], [1.0]] * 3)
    labels = torch.tensor([True, True, False, False] + [False] * 6)
    assert fit_logistic(x, labels).weight.abs().item() < 1e-9
    assert fit_logistic(x, labels).bias.abs().item() < 1e-9


def test_columns_that_say_nothing_weigh_nothing():
    x, labels = drawn()
    constant = torch.full((len(x), 1), 0.1, dtype=torch.float64)
    probe, without = fit_logistic(torch.cat([x, constant], 1), labels), fit_logistic(x, labels)
    assert probe.weight[-1].abs() < 1e-9
    torch.testing.assert_close(probe.weight[:-1], without.weight, rtol=1e-6, atol=1e-8)


def test_separable_classes_have_an_end():
    x = torch.tensor([[-2.0, 0], [-1, 0], [1, 0], [2, 0]])
    probe = fit_logistic(x, x[:, 0] > 0)
    assert probe.converged
    assert balanced_accuracy(probe.scores(x) > 0, x[:, 0] > 0) == 1


def test_the_same_input_has_the_same_bits():
    x, labels = drawn()
    probes = [fit_logistic(x, labels) for _ in range(2)]
    assert torch.equal(probes[0].weight, probes[1].weight)
    assert torch.equal(probes[0].weight, fit_logistic(x * 4, labels).weight)  # standardised


def test_bad_input_is_refused_by_name():
    x, labels = drawn(8)
    for arguments, error, message in (
        ((x[:, 0], labels), ValueError, r"^x: expected floats of shape \[n, k\]"),
        ((x, labels[1:]), ValueError, r"^labels: expected shape \[8\], got \[7\]"),
        ((x, labels.int()), TypeError, r"^labels: expected dtype bool, got int32"),
        ((x, labels, 0.0), ValueError, r"^l2: expected"),
        ((x, torch.ones(8, dtype=torch.bool)), ValueError, r"^labels: expected two classes, got one of 8 rows"),
        ((torch.where(x > 3, torch.nan, x), labels), ValueError, r"^x: expected finite features, found NaN or Inf"),
    ):
        with pytest.raises(error, match=message):
            fit_logistic(*arguments)


def test_figures_are_those_of_counting():
    generator = torch.Generator().manual_seed(3)
    scores = torch.randint(0, 6, (40,), generator=generator).double() - 2  # with ties
    labels = torch.rand(40, generator=generator) < 0.3
    pairs = [(p, q) for p in scores[labels].tolist() for q in scores[~labels].tolist()]
    area = sum((p > q) + 0.5 * (p == q) for p, q in pairs) / len(pairs)
    assert area_under_curve(scores, labels).item() == pytest.approx(area)
    right = [(scores[mask] > 0).eq(value).double().mean() for mask, value in ((labels, True), (~labels, False))]
    assert balanced_accuracy(scores > 0, labels).item() == pytest.approx((right[0] + right[1]).item() / 2)


def test_a_draw_counts_rows_as_often_as_it_says():
    generator = torch.Generator().manual_seed(4)
    scores, labels = torch.randn(12, generator=generator), torch.arange(12) % 3 == 0
    times = torch.randint(0, 3, (5, 12), generator=generator, dtype=torch.int32)
    areas, accuracies = area_under_curve(scores, labels, times), balanced_accuracy(scores > 0, labels, times)
    for draw in range(5):
        rows = torch.repeat_interleave(torch.arange(12), times[draw])
        assert areas[draw].item() == pytest.approx(area_under_curve(scores[rows], labels[rows]).item())
        assert accuracies[draw].item() == pytest.approx(balanced_accuracy(scores[rows] > 0, labels[rows]).item())
    none = torch.zeros(1, 12, dtype=torch.int32)
    assert area_under_curve(scores, labels, none).isnan()
    assert balanced_accuracy(scores > 0, labels, none).isnan()
