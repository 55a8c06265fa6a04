"""What the trainings are given: which prompts directions are fitted on, what an SAE encodes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemmascope.ravel import methods, protocol_of, train_control, train_sae
from gemmascope.ravel.pairs import Pair, PairSet
from gemmascope.saes import JumpReLUSAE

N, WIDTH = 12, 6
X = torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(0)) + 2
PAIRS = [Pair(base, source, True, "x", 1, 2, 1) for base, source in ((0, 3), (3, 7), (7, 8), (9, 0))]
SETS = PairSet("land", tuple(PAIRS), {"entities": (Pair(4, 5, True, "x", 1, 2, 1),)}, 0)


def place(is_gemma: bool = True) -> Any:
    return SimpleNamespace(
        activations=SimpleNamespace(vectors=X, prompts=torch.arange(N)),
        model=SimpleNamespace(stack=SimpleNamespace(is_gemma=is_gemma)),
    )


@pytest.fixture
def given(monkeypatch):
    """The features that a mask is to be trained over, and the pairs."""
    monkeypatch.setattr(methods, "train_mask", lambda on, features, pairs, *others: (features, pairs))


def test_principal_directions_are_those_of_the_training(given):
    """Of its bases and its sources, once each; the test's prompts have no part in them."""
    features, pairs = train_control("pca", place(), SETS, protocol_of("ravel"), 0, print)
    few = X[[0, 3, 7, 8, 9]].double()
    assert pairs == SETS.train
    expected = torch.linalg.svd(few - few.mean(0)).Vh[:4].float()
    found = features.rows[-4:].flip(0)  # five rows have four directions
    torch.testing.assert_close((found @ expected.T).abs(), torch.eye(4), rtol=1e-4, atol=1e-4)


def sae() -> JumpReLUSAE:
    found = JumpReLUSAE(WIDTH, 20, threshold_init=0.1, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found.b_dec.copy_(torch.linspace(-1, 1, WIDTH))
    return found


@pytest.mark.parametrize("is_gemma", [True, False])
@pytest.mark.parametrize("error", ["keep", "drop"])
def test_what_an_sae_encodes(given, is_gemma, error):
    """Where LayerNorm takes the mean over coordinates out, the SAE is given each activation without it."""
    features, _ = train_sae(sae(), place(is_gemma), SETS, protocol_of("ravel", error=error), 0, print)
    x = X if is_gemma else X - X.mean(1, keepdim=True)
    with torch.no_grad():
        base = sae().decode(sae().encode(x)) if error == "drop" else x
        nothing = features.exchanged(torch.arange(N), torch.arange(N).flip(0), torch.zeros(20))
    torch.testing.assert_close(nothing, base)
