"""Crosscoders and cross-layer transcoders judged: the figures by their formulas, and what is refused."""

import math

import pytest
import torch

from gemmascope import CrossLayerTranscoder
from gemmascope.evaluation import evaluate_clt, evaluate_crosscoder
from tests.saes.test_clt import clt_tensors, inputs
from tests.saes.test_crosscoder import KEYS, NAMES, activations
from tests.saes.test_crosscoder import make as make_crosscoder


def fvu(y, guess):
    return ((y - guess).square().sum() / (y - y.mean(0)).square().sum()).item()


@pytest.mark.parametrize("skip", [False, True])
def test_a_clt(skip, monkeypatch):
    monkeypatch.setattr("gemmascope.evaluation.cross_layer.TOKENS", 7)
    layers = clt_tensors(skip)
    layers[1]["threshold"][:3] = 1e9
    clt, xs = CrossLayerTranscoder(layers), inputs(shape=(50,))
    with torch.no_grad():
        ys = [y + torch.randn(y.shape, generator=torch.Generator().manual_seed(1)) for y in clt(xs)]
        found = evaluate_clt(clt, [x.half().float() for x in xs], ys)
        exact = clt([x.half().float() for x in xs])
    assert found.tokens == 50
    assert found.l0 == pytest.approx([(f != 0).sum(1).double().mean().item() for f in clt.encode(xs)], rel=0.01)
    assert found.fvu == pytest.approx([fvu(y, guess) for y, guess in zip(ys, exact, strict=True)], rel=1e-5)
    assert found.dead_fraction[1] >= 3 / 9
    assert all(0 < each < 2 for each in found.median_fvu)
    perfect = evaluate_clt(clt, xs, [y.detach() for y in clt(xs)])
    assert max(perfect.fvu) < 1e-10


def test_a_crosscoder(monkeypatch):
    monkeypatch.setattr("gemmascope.evaluation.cross_layer.TOKENS", 7)
    crosscoder, x = make_crosscoder(torch.float32), activations()
    found = evaluate_crosscoder(crosscoder, x)
    f, x_hat = crosscoder.encode(x), crosscoder(x)
    assert found.tokens == 50
    assert found.l0 == pytest.approx((f > 0).sum(1).double().mean().item())
    assert found.dead_fraction == pytest.approx((~(f > 0).any(0)).double().mean().item())
    assert list(found.fvu) == list(NAMES)
    for site in KEYS:
        assert found.fvu[site.name] == pytest.approx(fvu(x[site], x_hat[site.name]), rel=1e-4)
        assert found.median_fvu[site.name] > 0


def test_what_does_not_vary_has_no_fvu():
    clt, xs = CrossLayerTranscoder(clt_tensors()), inputs()
    ys = [y.detach() for y in clt(xs)]
    found = evaluate_clt(clt, xs, [ys[0], torch.ones_like(ys[1]), ys[2]])
    assert math.isnan(found.fvu[1])
    assert found.fvu[0] < 1e-10


def test_bad_arguments():
    clt, xs = CrossLayerTranscoder(clt_tensors()), inputs()
    ys = [y.detach() for y in clt(xs)]
    crosscoder, x = make_crosscoder(), activations()
    nan = [ys[0], ys[1].clone().fill_(math.nan), ys[2]]
    for call, error, message in (
        (lambda: evaluate_clt(crosscoder, xs, ys), TypeError, "clt: expected"),
        (lambda: evaluate_clt(clt, xs[0], ys), TypeError, "inputs: expected a list of activations"),
        (lambda: evaluate_clt(clt, xs, ys[:2]), ValueError, "targets: expected activations of 3 layers, got 2"),
        (lambda: evaluate_clt(clt, xs, ys[::-1]), ValueError, r"targets\[0\]: expected"),
        (lambda: evaluate_clt(clt, xs, [ys[0], ys[1][:3], ys[2]]), ValueError, r"targets\[1\]: expected the 30 tokens"),
        (lambda: evaluate_clt(clt, [z[:0] for z in xs], [y[:0] for y in ys]), ValueError, "at least one row"),
        (lambda: evaluate_clt(clt, xs, nan), ValueError, r"targets\[1\]: expected finite"),
        (lambda: evaluate_crosscoder(clt, x), TypeError, "crosscoder: expected"),
        (lambda: evaluate_crosscoder(crosscoder, {KEYS[0]: x[KEYS[0]]}), ValueError, "found none of"),
        (lambda: evaluate_crosscoder(crosscoder, x | {KEYS[0]: x[KEYS[0]] * math.nan}), ValueError, "expected finite"),
    ):
        with pytest.raises(error, match=message):
            call()
