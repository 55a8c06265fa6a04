"""`Tap` hands over what `Capture` records, keeps nothing, and ends the forward after the deepest site."""

import weakref

import pytest
import torch

from gemmascope.errors import EnvironmentProblemError
from gemmascope.sites import Capture, Site, Tap, all_sites
from gemmascope.sites.decoder import find_decoder
from tests.tiny_models import LAYERS, gemma2, gemma3, gemma3_multimodal, tokens

MODELS = [gemma2, gemma3, gemma3_multimodal]


def forward(model, tap):
    with torch.no_grad():
        tap.text_model(input_ids=tokens(), use_cache=False)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("depth", range(1, LAYERS + 1))
def test_equals_capture_of_the_whole_forward(make, depth):
    model = make()
    sites = [site for site in all_sites(model) if site.layer < depth]
    taken, ran = {}, []
    for layer in find_decoder(model).layers:
        layer.register_forward_hook(lambda layer, *_: ran.append(layer))
    with Tap(model, sites, lambda site, x: taken.update({site: x.clone()})) as tap:
        forward(model, tap)
    assert len(ran) == depth
    with torch.no_grad(), Capture(model, sites) as capture:
        find_decoder(model).text_model(input_ids=tokens(), use_cache=False)
    assert len(ran) == depth + LAYERS
    assert list(taken) == list(tap.sites) == sites
    assert all(torch.equal(taken[site], capture[site]) for site in sites)


def test_keeps_nothing():
    model, references = gemma2(), []
    with Tap(model, all_sites(model), lambda site, x: references.append(weakref.ref(x))) as tap:
        forward(model, tap)
        assert len(references) == len(tap.sites)
        assert [reference() for reference in references] == [None] * len(references)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("before", [2, LAYERS])
def test_leaves_the_model_as_it_was(make, before):
    model = make()
    config = find_decoder(model).config
    config.num_hidden_layers = before

    def fail(site, x):
        assert config.num_hidden_layers == 1
        raise KeyError(site)

    with pytest.raises(KeyError), Tap(model, [Site(0, "mlp")], fail) as tap:
        forward(model, tap)
    assert config.num_hidden_layers == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_wrong_arguments():
    model = gemma2()
    with pytest.raises(ValueError, match="sites: expected at least one, got none"):
        Tap(model, [], print)
    with pytest.raises(ValueError, match=f"expected a layer from 0 to {LAYERS - 1}, got {LAYERS}"):
        Tap(model, [Site(LAYERS, "resid")], print)
    with (
        Tap(model, ["layer_0/resid"], lambda site, x: None) as tap,
        pytest.raises(ValueError, match="expected to be entered once"),
    ):
        tap.__enter__()
    model.config._attn_implementation = "sdpa"
    with pytest.raises(EnvironmentProblemError, match="attention: expected one that applies attn_logit_softcapping"):
        Tap(model, ["layer_0/resid"], print)
