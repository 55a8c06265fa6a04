"""Forwards that begin at a layer give the bits of those that begin at the tokens."""

import pytest
import torch

from gemmascope.sites import Capture, Site, attach
from gemmascope.sites.beginning import beginning_at
from tests import tiny_models as tiny

pytest.importorskip("transformers")


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("make", [tiny.gemma2, tiny.gemma3, tiny.gemma3_multimodal])
@pytest.mark.parametrize("layer", [1, 2])
def test_same_bits(make, layer):
    model, ids = make(), tiny.tokens(3, 12)
    with Capture(model, [Site(layer - 1, "resid")]) as capture:
        whole = logits(model, ids)
    stream = capture[Site(layer - 1, "resid")]

    def halved(x):
        return x / 2

    for kind in ("att", "mlp", "resid"):
        with attach(model, {Site(layer, kind): halved}):
            spliced = logits(model, ids)
            with beginning_at(model, layer, stream):
                assert torch.equal(logits(model, ids), spliced)
        assert not torch.equal(spliced, whole)
    ran = []
    handles = [each.self_attn.register_forward_hook(lambda *args, n=n: ran.append(n)) for n, each in layers_of(model)]
    with beginning_at(model, layer, stream):
        assert torch.equal(logits(model, ids), whole)
    assert ran == list(range(layer, tiny.LAYERS))
    for handle in handles:
        handle.remove()
    assert torch.equal(logits(model, ids), whole), "afterwards it is as it was"


def layers_of(model):
    inner = model.model
    return list(enumerate(getattr(inner, "language_model", inner).layers))


def test_a_forward_that_someone_has_put_there_is_there_again():
    model, ids = tiny.gemma2(), tiny.tokens()
    (_, first), *_ = layers_of(model)
    whole = logits(model, ids)
    own = first.forward
    calls = []
    first.forward = lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs)

    def fails():
        with beginning_at(model, 1, torch.zeros(2, 9, tiny.WIDTH)):
            logits(model, ids)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert not calls
    assert torch.equal(logits(model, ids), whole)
    assert calls


def test_the_first_layer_begins_at_the_tokens():
    model, ids = tiny.gemma2(), tiny.tokens()
    with beginning_at(model, 0, torch.zeros(2, 9, tiny.WIDTH)):
        found = logits(model, ids)
    assert torch.equal(found, logits(model, ids))


@pytest.mark.parametrize("layer", [-1, tiny.LAYERS])
def test_refusals(layer):
    with pytest.raises(ValueError, match=r"^layer: expected"), beginning_at(tiny.gemma2(), layer, torch.zeros(1, 1, 1)):
        pass
