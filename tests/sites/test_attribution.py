"""∂metric/∂f of the latents that fire: against autograd through the model with that latent moved by an amount.

pytest tests/sites/test_attribution.py
"""

import copy

import pytest
import torch
from torch import nn

from gemmascope.sites import Add, Site, attach, attribute, collect
from tests import tiny_models as tiny
from tests.sites.test_attach import ATT, MLP, RESID, hook_count, random_sae
from tests.sites.test_collect import assert_same_codes
from tests.sites.test_edits import DenseSAE
from tests.sites.test_sites import every_model

pytest.importorskip("transformers")

SITES = (ATT, RESID, MLP)  # two of them in front of another


def saes():
    return {site: random_sae(site, seed).double() for seed, site in enumerate(SITES)}


def metric(output):
    return output.logits[:, -1].logsumexp(-1).sum() + output.logits[0, 4, 7]


def tokens():
    ids = tiny.tokens()
    ids[0, 3] = tiny.EOS
    return ids


def some_entries(code, n=3):
    """(row of the code, latent, place) of a few entries, of different tokens."""
    places = torch.linspace(0, code.nnz - 1, n).long().tolist()
    return [(int(code.token_indices()[place]), int(code.indices[place]), place) for place in places]


def moved(sae, mode, position, latent, amount):
    """The function at a site, with f of one latent at one position moved by a tensor ``amount``."""

    def splice(x):
        one = torch.zeros(*x.shape[:2], sae.d_sae, dtype=x.dtype)
        one[(*position, latent)] = 1
        if mode == "with_error":
            return x + sae.input_scale * amount * (one @ sae.W_dec)
        return sae.decode(sae.encode(x) + amount * one)

    return splice


@every_model
@pytest.mark.parametrize("mode", ["with_error", "replace"])
def test_gradients_are_those_of_the_model_with_a_latent_moved(build, mode):
    model, ids, at = build(dtype=torch.float64), tokens(), saes()
    found = attribute(model, ids, at, metric, mode=mode)
    assert torch.equal(found.kept, ids > 2)
    where = found.kept.nonzero().tolist()
    for site, gradient in found.gradients.items():
        for row, latent, place in some_entries(gradient):
            amount = torch.zeros((), dtype=torch.float64, requires_grad=True)
            splices = dict(at) if mode == "replace" else {}
            splices[site] = moved(at[site], mode, where[row], latent, amount)
            with attach(model, splices):
                [expected] = torch.autograd.grad(metric(model(ids)), amount)
            # The model forms norms and softmax in fp32 whatever its dtype.
            assert float(gradient.values[place]) == pytest.approx(float(expected), rel=1e-4, abs=1e-6)
        assert gradient.values.abs().max() > 1e-2
    assert hook_count(model) == 0


def test_codes_and_metric_are_those_of_the_model_itself():
    model, ids, at = tiny.gemma2(), tokens(), {site: random_sae(site) for site in SITES}
    found = attribute(model, ids, at, metric)
    with torch.no_grad():
        assert found.metric == float(metric(model(ids)))
    collected = collect(model, ids, at)
    assert_same_codes(found.codes, collected)
    assert torch.equal(found.kept, collected.kept)
    for site in SITES:
        code, gradient = found.codes[site], found.gradients[site]
        assert torch.equal(found.effects(site).values, -code.values * gradient.values)
        assert torch.equal(gradient.indices, code.indices)


def test_the_metric_of_the_replaced_model():
    model, ids, at = tiny.gemma2(), tokens(), {site: random_sae(site) for site in SITES}
    found = attribute(model, ids, at, metric, mode="replace")
    with attach(model, at):
        assert found.metric == pytest.approx(float(metric(model(ids)).detach()), rel=1e-5)


@pytest.mark.parametrize("mode", ["with_error", "replace"])
def test_a_small_step_does_what_the_gradient_says(mode):
    """To first order, for the latent that counts most."""
    model, ids, sae = tiny.gemma2(), tokens(), random_sae(MLP)
    found = attribute(model, ids, {MLP: sae}, metric, mode=mode)
    gradient = found.gradients[MLP]
    place = int(gradient.values.abs().argmax())
    row, latent = int(gradient.token_indices()[place]), int(gradient.indices[place])
    position = torch.zeros(ids.shape, dtype=torch.bool)
    position[tuple(found.kept.nonzero()[row])] = True
    step = 1e-2
    values = []
    for amount in (step, -step):
        edits = {MLP: Add(latent, amount, positions=position)}
        with torch.no_grad(), attach(model, {MLP: sae}, mode=mode, edits=edits):
            values.append(float(metric(model(ids))))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(gradient.values[place]), rel=0.02)


@pytest.mark.parametrize("mode", ["with_error", "replace"])
def test_any_sae_with_encode_and_decode(mode):
    model, ids, at = tiny.gemma2(dtype=torch.float64), tokens(), saes()
    ours = attribute(model, ids, at, metric, mode=mode)
    dense = attribute(model, ids, {site: DenseSAE(sae) for site, sae in at.items()}, metric, mode=mode)
    for site in SITES:
        torch.testing.assert_close(dense.gradients[site].to_dense(), ours.gradients[site].to_dense())


def test_nothing_dense_is_made_with_the_error(monkeypatch):
    at = {site: random_sae(site) for site in SITES}
    for sae in at.values():
        monkeypatch.setattr(sae, "encode", lambda x: pytest.fail("dense"))
        monkeypatch.setattr(sae, "jumprelu", lambda x: pytest.fail("dense"))
    attribute(tiny.gemma2(), tokens(), at, metric)


def test_model_and_saes_are_left_as_they_were():
    model, at = tiny.gemma2().train(), {site: random_sae(site) for site in SITES}
    with torch.no_grad():  # gradients are made all the same
        attribute(model, tokens(), at, metric)
    assert model.training
    assert all(each.grad is None for module in (model, *at.values()) for each in module.parameters())
    frozen, ids = copy.deepcopy(model).requires_grad_(False), tokens()
    still = {site: copy.deepcopy(sae).requires_grad_(False) for site, sae in at.items()}
    expected = attribute(model, ids, at, metric)
    for mode in ("with_error", "replace"):
        found = attribute(frozen, ids, still, metric, mode=mode)
        assert found.gradients[RESID].values.abs().sum() > 0
    assert torch.equal(attribute(frozen, ids, still, metric).gradients[RESID].values, expected.gradients[RESID].values)


def test_padding_on_the_left():
    model, ids, at = tiny.gemma2(), tiny.tokens(), {RESID: random_sae(RESID)}
    padded = torch.cat([torch.full((2, 3), tiny.PAD), ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0

    def last(output):
        return output.logits[:, -1, 3].sum()

    expected = attribute(model, ids, at, last)
    found = attribute(model, padded, at, last, attention_mask=mask)
    found, expected = (each.gradients[RESID].to_dense() for each in (found, expected))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert expected.abs().max() > 0.1


def test_a_latent_that_the_metric_does_not_see():
    """Behind the position that is measured: 0, not missing."""
    found = attribute(tiny.gemma2(), tokens(), {RESID: random_sae(RESID)}, lambda output: output.logits[0, 1, 5])
    gradients = found.gradients[RESID].to_dense()
    assert (gradients[0] != 0).any()
    assert (gradients[1:] == 0).all()


class TestRefusals:
    @pytest.mark.parametrize(
        ("metric", "error", "message"),
        [
            (3, TypeError, r"^metric: expected a function, got int$"),
            (lambda output: 1.0, TypeError, r"^metric: expected a function to a torch.Tensor, got one to float$"),
            (lambda output: output.logits[0, 0], ValueError,
             r"^metric: expected a function to a scalar, .* shape \[61\]$"),
            (lambda output: output.logits.detach().sum(), ValueError,
             r"^metric: expected one that depends on the model's"),
        ],
    )  # fmt: skip
    def test_metrics_that_cannot_be(self, metric, error, message):
        model = tiny.gemma2()
        with pytest.raises(error, match=message):
            attribute(model, tokens(), {RESID: random_sae(RESID)}, metric)
        assert hook_count(model) == 0

    def test_other_arguments(self):
        model, sae = tiny.gemma2(), random_sae(RESID)
        with pytest.raises(ValueError, match=r"^mode: expected 'replace' or 'with_error', got 'zero'$"):
            attribute(model, tokens(), {RESID: sae}, metric, mode="zero")
        with pytest.raises(
            TypeError, match=r"^site layer_1/resid: expected an SAE with encode and d_sae, got Identity$"
        ):
            attribute(model, tokens(), {RESID: nn.Identity()}, metric)
        encoder = nn.Identity()
        encoder.encode, encoder.d_sae = sae.encode, sae.d_sae
        with pytest.raises(
            TypeError, match=r"^site layer_1/resid: expected an SAE with encode and decode, got Identity$"
        ):
            attribute(model, tokens(), {RESID: encoder}, metric)
        with attach(model, {RESID: sae}), pytest.raises(ValueError, match="expected no SAE attached yet, found one"):
            attribute(model, tokens(), {RESID: sae}, metric)
        with pytest.raises(ValueError, match=r"^tokens: expected some that are kept, found none"):
            attribute(model, torch.zeros(1, 3, dtype=torch.long), {RESID: sae}, metric)
        with pytest.raises(ValueError, match=r"^site layer_3/att: expected a layer from 0 to 2, got 3$"):
            attribute(model, tokens(), {Site(3, "att"): sae}, metric)
