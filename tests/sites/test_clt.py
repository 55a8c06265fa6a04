"""A cross-layer transcoder in a model: every MLP replaced at once, by parts that share what they wrote."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from gemmascope import CrossLayerTranscoder, attach
from gemmascope.errors import EnvironmentProblemError
from gemmascope.evaluation import delta_loss
from gemmascope.sites import Capture, Site
from tests import tiny_models
from tests.saes.test_clt import clt_tensors

LAYERS, WIDTH = tiny_models.LAYERS, tiny_models.WIDTH
READS, WRITES = ([Site(layer, kind) for layer in range(LAYERS)] for kind in ("mlp_in", "mlp"))


@pytest.fixture(scope="module")
def model():
    return tiny_models.gemma2()


@pytest.fixture(scope="module")
def ids():
    return tiny_models.tokens(6, 11)


def make(skip=False, **metadata):
    layers = clt_tensors(skip, d_in=(WIDTH,) * LAYERS, d_sae=(20, 9, 14), d_out=(WIDTH,) * LAYERS)
    sites = {"sites": [site.name for site in READS], "sites_out": [site.name for site in WRITES]}
    return CrossLayerTranscoder(layers, metadata=sites | metadata)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_every_mlp_is_what_the_clt_makes_of_the_inputs_of_the_same_forward(model, ids, skip, grad):
    clt = make(skip)
    before = model(ids).logits
    with torch.set_grad_enabled(grad), attach(model, clt.parts(), ()), Capture(model, [*READS, *WRITES]) as capture:
        logits = model(ids).logits
        expected = clt([capture[site].detach() for site in READS])
    assert not torch.allclose(logits, before, atol=1e-2)
    for site, y in zip(WRITES, expected, strict=True):
        torch.testing.assert_close(capture[site].detach(), y.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(model(ids).logits, before)


def test_gradients_flow_to_the_first_layer(model, ids):
    clt = make()
    with attach(model, clt.parts()):
        model(ids).logits.square().mean().backward()
    for source in clt.sources:
        for name in ("W_enc", "W_dec", "b_dec"):
            assert getattr(source, name).grad.abs().max() > 0, name
    model.zero_grad()


def test_the_loss_with_every_mlp_replaced(model, ids):
    rise = delta_loss(model, ids, make().parts())
    assert abs(rise) > 0.01
    alone = CrossLayerTranscoder(make().tensors, metadata=make().metadata)
    assert delta_loss(model, ids, alone.parts()) == rise


def test_it_generates(model, ids):
    clt = make()
    parts = clt.parts()
    with torch.no_grad(), attach(model, parts, ()):
        whole = model(ids).logits
        first = model(ids[:, :5], use_cache=True)
        rest = model(ids[:, 5:], past_key_values=first.past_key_values, use_cache=True).logits
    torch.testing.assert_close(torch.cat((first.logits, rest), 1), whole, rtol=1e-4, atol=1e-4)


def test_threads_do_not_meet(model, ids):
    def logits(rows):
        with torch.no_grad():
            return model(rows).logits

    batches = [ids[:n] for n in (1, 2, 3, 4, 5, 6)] * 4
    with attach(model, make().parts(), ()):
        expected = [logits(rows) for rows in batches]
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(logits, batches))
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_a_copy_of_an_attached_model_has_its_own(model, ids):
    with attach(model, make().parts()), torch.no_grad():
        other = copy.deepcopy(model)
        assert torch.equal(other(ids).logits, model(ids).logits)


def test_parts_alone_are_refused(model, ids):
    parts = make().parts()
    first, second, third = parts
    for chosen, layer in (((second, third), 1), ((first, third), 2), ((third,), 2)):
        message = f"layer {layer} of the CLT: expected the part before it to have fired"
        with (
            attach(model, {site: parts[site] for site in chosen}),
            pytest.raises(EnvironmentProblemError, match=message),
        ):
            model(ids)
    with attach(model, parts), torch.no_grad():
        model(ids)  # what an error left behind harms no later forward
    parts[first](torch.randn(5, WIDTH))
    with pytest.raises(EnvironmentProblemError, match="on the same tokens"):
        parts[second](torch.randn(6, WIDTH))


def test_a_clt_that_does_not_say_where_it_reads(model):
    for metadata, message in (
        ({"sites": None}, r"metadata\['sites'\]: expected the names of 3 sites, got None"),
        ({"sites_out": ["a", "b"]}, r"metadata\['sites_out'\]: expected the names of 3 sites, got \['a', 'b'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**metadata).parts()
    with pytest.raises(ValueError, match="site: expected"):
        attach(model, make(sites_out=["a", "b", "c"]).parts())
