"""Figures of sums that are made up, and the sets of tokens, by hand."""

import math

import pytest
import torch

from gemmascope.evaluation.bootstrap import Bootstrap
from gemmascope.evaluation.figures import Figures, plain
from gemmascope.evaluation.protocol import TERMS, Sums
from gemmascope.evaluation.token_sets import MarkedText
from gemmascope.sites import Site

RESID = Site(1, "resid")


def made_up(fired: list[int], tokens: tuple[int, int] = (4, 6)) -> Sums:
    """Two documents, 3 and 2 predictions; every token has the same terms, and a special one more is in ``every``."""
    terms = {name: 1.0 for name in TERMS} | {"error": 2.0, "spread": 8.0, "about_zero": 16.0, "l0": 3.0}
    one = torch.tensor([terms[name] for name in TERMS], dtype=torch.float64)
    counts = torch.tensor([[n, n - 1, n + 1] for n in tokens], dtype=torch.float64)
    losses = torch.zeros(2, 3, 2, dtype=torch.float64)
    return {
        "documents": torch.tensor([0.0, 1.0], dtype=torch.float64),
        "clean": torch.tensor([[3.0, 6.0], [2.0, 8.0]], dtype=torch.float64),
        "a/tokens": counts[..., None] * one,
        "a/losses": losses + 9,
        "a/fired": torch.tensor(fired, dtype=torch.float64),
        f"{RESID}/zero": losses + 10,
        f"{RESID}/mean": losses + 11,
    }


def test_latents_by_hand():
    """Of ten tokens of the text: once is a tenth, which is not above a tenth, and always is in the last bin."""
    figures = Figures(made_up([1, 10, 0, 2, 3]), Bootstrap(2, draws=4))
    assert figures.frequency("a").tolist() == [0.1, 1.0, 0.0, 0.2, 0.3]
    found = figures.of("a", RESID)
    assert found["dead_fraction"] == 1 / 5
    assert found["high_freq_fraction"] == 3 / 5
    histogram = found["frequency_histogram"]
    assert histogram["log10_edges"] == [-8 + each / 2 for each in range(17)]
    assert histogram["latents"] == [0] * 14 + [3, 1]  # a tenth, two and three tenths below √0.1; 1
    assert histogram["never"] == 1


def test_what_a_third_of_a_decade_is_not():
    """0.3 is below √0.1 = 0.316, 0.4 above it."""
    found = Figures(made_up([3, 4]), Bootstrap(2, draws=4)).of("a", RESID)
    assert found["frequency_histogram"]["latents"][-2:] == [1, 1]


def test_what_has_no_value_is_none():
    """No predictions, no tokens and a mean of 0 have no plausible figure."""
    sums = made_up([0, 0], (1, 1))  # a token each, which are outliers
    sums["clean"] = torch.zeros(2, 2, dtype=torch.float64)
    found = Figures(sums, Bootstrap(2, draws=4)).of("a", RESID)
    for name in ("delta_loss", "kl", "ablation_delta_loss", "fvu_inliers", "l0_inliers", "cosine_inliers"):
        assert math.isnan(found[name]), name
    assert found["loss_recovered"] is None
    assert found["fvu_interval_inliers"] is None
    written = plain(found | {"high": math.inf, "low": -math.inf, "pair": (1.0, 2.0)})
    assert written["fvu_inliers"] is written["delta_loss"] is written["high"] is written["low"] is None
    assert written["pair"] == [1.0, 2.0]


def test_gamma_is_the_norm_of_the_mean_by_the_deviation():
    """Σ‖x − x̄‖² / n = 8, ‖x̄‖ = 4: 4/√8, in each set."""
    figures = Figures(made_up([1]), Bootstrap(2, draws=4))
    means = {name: torch.tensor([0.0, 4.0], dtype=torch.float64) * k for k, name in enumerate(("every", "text"))}
    found = figures.gamma("a", means | {"inliers": means["text"] / 2})
    assert found == {
        "gamma": pytest.approx(4 / math.sqrt(8)),
        "gamma_inliers": pytest.approx(2 / math.sqrt(8)),
        "gamma_every": 0.0,
    }


def test_sets_by_hand():
    """A token of just that norm is no outlier, nor is NaN, which must stay visible."""
    is_text = torch.tensor([[False, True, True, True, False]])
    text = MarkedText(torch.tensor([[2, 5, 6, 7, 0]]), torch.tensor([[0, 0, 0, 0, -1]]), is_text)
    activations = torch.tensor([[[1.0, 0.0], [3.0, 4.0], [6.0, 8.0], [math.nan, 0.0], [0.0, 0.0]]])
    found = text.masks(activations, 5.0)
    assert found["text"].tolist() == [[False, True, True, True, False]]
    assert found["inliers"].tolist() == [[False, True, False, True, False]]
    assert found["every"].tolist() == [[True, True, True, True, False]]
