"""The pass over text against plain hooks: each SAE its own codes, of the tokens of text alone.

pytest tests/dashboards/test_watch.py
"""

import pytest
import torch

from gemmascope.dashboards import watch as watching
from gemmascope.dashboards.watch import watch
from gemmascope.errors import EnvironmentProblemError
from gemmascope.evaluation.protocol import Subject
from tests import tiny_models as tiny
from tests.evaluation import plain as by_hand
from tests.evaluation.test_protocol import ATT, RESID, dense, random_sae, text_of

pytest.importorskip("transformers")


@pytest.mark.parametrize("tokens", [11, 22, 2048])
def test_codes_are_those_of_plain_hooks(tokens, monkeypatch):
    """A row at a time, two and all; two SAEs at one site and one at another."""
    monkeypatch.setattr(watching, "TOKENS", tokens)
    model = tiny.gemma2(dtype=torch.float64)
    text, _ = text_of(model)
    sites = (RESID, ATT, RESID)
    subjects = [Subject(str(n), site, site, random_sae(site, n, 18 + n)) for n, site in enumerate(sites)]
    found = [torch.zeros(*text.tokens.shape, 18 + n, dtype=torch.float64) for n in range(3)]
    counted = torch.zeros_like(text.is_text)

    def taker(number: int):
        def take(code, of, first_row):
            rows = slice(first_row, first_row + len(of))
            found[number][rows][of] = code.to_dense().double()
            counted[rows] |= of

        return [take]

    row = 0
    while row < len(text.tokens):
        after = watch(model, text, subjects, [taker(number) for number in range(3)], row)
        assert after == min(len(text.tokens), row + tokens // 11)
        row = after
    assert torch.equal(counted, text.is_text)
    for subject, f in zip(subjects, found, strict=True):
        x = by_hand.activation(model, subject.reads, text.tokens)
        expected = dense(subject.sae, x)[0] * text.is_text[..., None]
        torch.testing.assert_close(f, expected, rtol=1e-6, atol=1e-7)
        assert (expected != 0).any()


def test_activations_that_are_not_finite_are_said():
    model = tiny.gemma2(dtype=torch.float64)
    text, _ = text_of(model)
    sae = random_sae(RESID)
    with torch.no_grad():
        sae.W_enc[0, 0] = torch.nan
    with pytest.raises(EnvironmentProblemError, match="broken: expected finite activations, found NaN or Inf in rows"):
        watch(model, text, [Subject("broken", RESID, RESID, sae)], [[]], 0)
