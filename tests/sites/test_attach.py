"""Splicing SAEs into Gemma 2 and Gemma 3 with `attach`.

pytest tests/sites/test_attach.py
"""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gemmascope import JumpReLUSAE
from gemmascope.sites import Capture, Site, all_sites, attach
from tests import tiny_models as tiny
from tests.sites.test_sites import every_model, hook_count, text_model

pytest.importorskip("transformers")

RESID, ATT, MLP = Site(1, "resid"), Site(0, "att"), Site(2, "mlp")


class Constant(nn.Module):
    def __init__(self, value=0.0):
        super().__init__()
        self.value = value

    def forward(self, x):
        return torch.full_like(x, self.value)


def random_sae(site, seed=0):
    """An SAE that reconstructs badly, so that splicing it in is seen."""
    sae = JumpReLUSAE(
        tiny.width(site), 24, impl="reference", generator=torch.Generator().manual_seed(seed), input_scale=2.0
    )
    nn.init.constant_(sae.b_dec, 0.1)
    return sae


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def spliced_activations(model, saes, inputs, **options):
    """What the rest of the model sees: a `Capture` inside `attach`."""
    with torch.no_grad(), attach(model, saes, **options), Capture(model, saes) as capture:
        model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return capture


@every_model
def test_an_identity_changes_nothing(build):
    model, ids = build(), tiny.tokens()
    ids[:, 3], ids[:, 5] = tiny.EOS, tiny.PAD
    clean = logits(model, ids)
    for skip in (None, ()):
        with attach(model, {site: nn.Identity() for site in all_sites(model)}, skip):
            assert torch.equal(logits(model, ids), clean)


@settings(deadline=None, max_examples=20)
@given(
    chosen=st.sets(st.sampled_from(range(3 * tiny.LAYERS)), min_size=1),
    skip=st.none() | st.lists(st.integers(0, 60), max_size=4),
)
def test_an_identity_changes_nothing_anywhere(chosen, skip):
    model, ids = tiny.gemma2(), tiny.tokens()
    sites = [all_sites(model)[index] for index in chosen]
    clean = logits(model, ids)
    with attach(model, {site: nn.Identity() for site in sites}, skip) as attachment:
        assert set(attachment.sites) == set(sites)
        assert torch.equal(logits(model, ids), clean)
    assert hook_count(model) == 0


@every_model
@pytest.mark.parametrize("site", [ATT, MLP, RESID], ids=str)
def test_each_site_takes_the_reconstruction(build, site):
    model, ids, sae = build(), tiny.tokens(), random_sae(site)
    clean = logits(model, ids)
    with torch.no_grad(), Capture(model, [site]) as capture:
        model(ids)
    x = capture[site]
    seen = spliced_activations(model, {site: sae}, ids)[site]
    assert torch.equal(seen[:, 1:], sae(x)[:, 1:])
    assert torch.equal(seen[:, 0], x[:, 0])  # BOS
    assert (seen - x)[:, 1:].abs().max() > 0.1
    with attach(model, {site: sae}):
        assert (logits(model, ids) - clean).abs().max() > 1e-3
    assert torch.equal(logits(model, ids), clean)


def test_special_tokens_anywhere_are_left_alone():
    model, ids = tiny.gemma2(), tiny.tokens()
    ids[0, 4], ids[1, 7:] = tiny.EOS, tiny.PAD
    with torch.no_grad(), Capture(model, [RESID]) as capture:
        model(ids)
    special = ids <= 2
    assert special.sum() == 5
    seen = spliced_activations(model, {RESID: Constant()}, ids)[RESID]
    assert torch.equal(seen[special], capture[RESID][special])
    assert (seen[~special] == 0).all()
    seen = spliced_activations(model, {RESID: Constant()}, ids, skip_token_ids=())[RESID]
    assert (seen == 0).all()
    seen = spliced_activations(model, {RESID: Constant()}, ids, skip_token_ids=[int(ids[0, 1])])[RESID]
    assert torch.equal((seen != 0).all(-1), ids == ids[0, 1])


@every_model
def test_the_ids_are_found_however_the_model_is_called(build):
    model, ids = build(), tiny.tokens()
    expected = spliced_activations(model, {RESID: Constant()}, ids)[RESID]
    calls = [
        lambda: model(input_ids=ids),
        lambda: model.model(ids),
        lambda: model.model(input_ids=ids, use_cache=False),
        lambda: text_model(model)(ids),
        lambda: text_model(model)(input_ids=ids),
    ]
    with torch.no_grad(), attach(model, {RESID: Constant()}), Capture(model, [RESID]) as capture:
        for call in calls:
            call()
            assert torch.equal(capture[RESID], expected)


@every_model
def test_inputs_without_ids(build):
    """Also right after a forward with ids, whose mask must not be used again."""
    model, ids = build(), tiny.tokens()
    embeds = model.get_input_embeddings()(ids).detach()
    message = r"^input_ids: expected them with the inputs, .* found only inputs_embeds; attach with skip_token_ids=\(\)"
    with torch.no_grad(), attach(model, {RESID: Constant()}):
        logits(model, ids)
        for part in (model, model.model, text_model(model)):
            with pytest.raises(ValueError, match=message):
                part(inputs_embeds=embeds)
        logits(model, ids)
    seen = spliced_activations(model, {RESID: Constant()}, {"inputs_embeds": embeds}, skip_token_ids=())
    assert (seen[RESID] == 0).all()


def test_ids_of_another_length_than_the_activations():
    """As with a prefix of virtual tokens."""
    model, ids = tiny.gemma2(), tiny.tokens()
    lengthen = model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0][:, :5],), kwargs), with_kwargs=True
    )
    model.model.layers[0].forward = lambda x, **kwargs: x
    message = r"^input_ids: expected shape \[2, 5\] as at site layer_0/resid, found \[2, 9\]$"
    with attach(model, {Site(0, "resid"): Constant()}), pytest.raises(ValueError, match=message):
        logits(model, ids)
    lengthen.remove()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_dtype_is_kept(dtype):
    model, ids = tiny.gemma2(dtype=dtype), tiny.tokens()
    saes = {site: random_sae(site) for site in (ATT, MLP, RESID)}
    capture = spliced_activations(model, saes, ids)
    assert {capture[site].dtype for site in saes} == {dtype}
    wide = spliced_activations(model, {RESID: lambda x: x.double() * 2}, ids)[RESID]
    assert wide.dtype == dtype


def test_a_layer_that_returns_a_tuple_keeps_its_rest():
    model, ids = tiny.gemma2(), tiny.tokens()
    expected = spliced_activations(model, {RESID: Constant()}, ids)[RESID]
    layer = model.model.layers[1]
    run, seen = layer.forward, []
    layer.forward = lambda *args, **kwargs: (run(*args, **kwargs), "rest")
    with attach(model, {RESID: Constant()}):
        layer.register_forward_hook(lambda module, args, output: seen.append(output) or output[0])
        logits(model, ids)
    [(stream, rest)] = seen
    assert rest == "rest"
    assert torch.equal(stream, expected)


def test_gradients_reach_the_saes():
    model, sae = tiny.gemma2(), random_sae(RESID)
    model.requires_grad_(False)
    with attach(model, {RESID: sae}):
        model(tiny.tokens()).logits.logsumexp(-1).sum().backward()
    assert sae.W_dec.grad.abs().sum() > 0
    assert sae.b_dec.grad.abs().sum() > 0


@every_model
def test_generation_with_a_cache_equals_the_full_forward(build):
    """One token a step: the mask must be that of the step, and special tokens left alone there too."""
    model, ids = build(), tiny.tokens(length=5)
    saes = {site: random_sae(site) for site in (ATT, MLP, RESID)}
    options = {"max_new_tokens": 7, "do_sample": False, "min_new_tokens": 7, "pad_token_id": tiny.PAD}
    with torch.no_grad(), attach(model, saes):
        generated = model.generate(ids, use_cache=True, **options)
        assert torch.equal(generated, model.generate(ids, use_cache=False, **options))
        # A special token in the middle, fed alone on top of a cache.
        ids = torch.cat([ids, torch.full((2, 1), tiny.EOS), ids[:, 1:3]], dim=1)
        full, past, steps = model(ids).logits, None, []
        for position in range(ids.shape[1]):
            output = model(input_ids=ids[:, position : position + 1], past_key_values=past, use_cache=True)
            past = output.past_key_values
            steps.append(output.logits)
        torch.testing.assert_close(torch.cat(steps, dim=1), full, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        clean = model.generate(ids, use_cache=True, **options)
        with attach(model, dict.fromkeys(saes, nn.Identity())):
            assert torch.equal(model.generate(ids, use_cache=True, **options), clean)


class TestDetaching:
    def test_by_handle_and_twice(self):
        model, ids = tiny.gemma2(), tiny.tokens()
        clean = logits(model, ids)
        attachment = attach(model, {RESID: Constant(), ATT: Constant()})
        assert not torch.equal(logits(model, ids), clean)
        attachment.detach()
        other = attach(model, {RESID: nn.Identity()})
        attachment.detach()  # must not take the other one's place
        with pytest.raises(ValueError, match="expected no SAE attached yet"):
            attach(model, {RESID: nn.Identity()})
        other.detach()
        assert hook_count(model) == 0
        assert torch.equal(logits(model, ids), clean)

    @pytest.mark.parametrize("where", ["block", "forward", "sae"])
    def test_after_an_exception(self, where):
        model, ids = tiny.gemma2(), tiny.tokens()
        clean = logits(model, ids)
        fails = {site: (lambda x: 1 / 0) if where == "sae" and site == RESID else Constant() for site in (ATT, RESID)}
        with contextlib.suppress(ZeroDivisionError), attach(model, fails):
            if where == "block":
                raise ZeroDivisionError
            if where == "forward":
                model.model.layers[2].mlp.forward = lambda x: 1 / 0
            logits(model, ids)
            pytest.fail("the exception was swallowed")
        model.model.layers[2].mlp.__dict__.pop("forward", None)
        assert hook_count(model) == 0
        assert torch.equal(logits(model, ids), clean)
        attach(model, {RESID: nn.Identity()}).detach()

    def test_a_forward_that_failed_does_not_confuse_the_next(self):
        model, ids = tiny.gemma2(), tiny.tokens()
        expected = spliced_activations(model, {RESID: Constant()}, ids)[RESID]
        embeds = model.get_input_embeddings()(ids).detach()
        with torch.no_grad(), attach(model, {RESID: Constant()}), Capture(model, [RESID]) as capture:
            handle = model.model.layers[2].register_forward_pre_hook(lambda module, args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(ids)
            handle.remove()
            with pytest.raises(ValueError, match="found only inputs_embeds"):
                model.model(inputs_embeds=embeds)
            model(ids)
            assert torch.equal(capture[RESID], expected)

    def test_different_sites_nest(self):
        model, ids = tiny.gemma2(), tiny.tokens()
        with attach(model, {RESID: Constant(), ATT: Constant()}):
            together = logits(model, ids)
        with attach(model, {RESID: Constant()}):
            alone = logits(model, ids)
            with attach(model, {ATT: Constant()}):
                assert torch.equal(logits(model, ids), together)
            assert torch.equal(logits(model, ids), alone)


class TestRefusals:
    @pytest.mark.parametrize(
        ("saes", "error", "message"),
        [
            ({}, ValueError, r"^saes: expected at least one site, got none$"),
            ([RESID], TypeError, r"^saes: expected a dict from Site to SAE, got list$"),
            ({RESID: 3}, TypeError, r"^site layer_1/resid: expected a module or function, got int$"),
            ({RESID: JumpReLUSAE(24, 8)}, ValueError, r"^site layer_1/resid: expected an SAE of d_model 16, got 24$"),
            ({ATT: JumpReLUSAE(16, 8)}, ValueError, r"^site layer_0/att: expected an SAE of d_model 24, got 16$"),
            ({Site(3, "mlp"): Constant()}, ValueError, r"^site layer_3/mlp: expected a layer from 0 to 2, got 3$"),
            ({"layer_1": Constant()}, ValueError, r"^site: expected layer_L/KIND"),
        ],
    )
    def test_nothing_is_attached(self, saes, error, message):
        model = tiny.gemma2()
        saes = {MLP: Constant()} | saes if isinstance(saes, dict) and saes else saes
        with pytest.raises(error, match=message):
            attach(model, saes)
        assert hook_count(model) == 0
        attach(model, {MLP: Constant()}).detach()

    def test_a_second_sae_at_a_site(self):
        model = tiny.gemma2()
        message = r"^site layer_1/resid: expected no SAE attached yet, found one; detach it first$"
        with attach(model, {"layer_1/resid": Constant()}):
            hooks = hook_count(model)
            with pytest.raises(ValueError, match=message):
                attach(model, {ATT: Constant(), RESID: Constant()})
            assert hook_count(model) == hooks
            attach(model, {ATT: Constant()}).detach()

    def test_an_sae_that_changes_the_shape(self):
        model = tiny.gemma2()
        message = r"^site layer_1/resid: expected a reconstruction of shape \[2, 9, 16\], got \[18, 16\]$"
        with attach(model, {RESID: lambda x: x.flatten(0, 1)}), pytest.raises(ValueError, match=message):
            logits(model, tiny.tokens())
