"""What follows a changed activation, held to the whole model with a hook in it."""

import pytest
import torch
from torch import nn

from gemmascope.errors import EnvironmentProblemError
from gemmascope.ravel import Continuation
from gemmascope.ravel.continuation import Tokens
from gemmascope.sites import Site

from .. import tiny_models

# Of one template: five tokens, an entity of one, two or one, an end that differs in length.
PROMPTS = [
    Tokens((2, 5, 6, 7, 8, 9, 10, 11, 20, 21), 5),
    Tokens((2, 5, 6, 7, 8, 30, 31, 32, 10, 11, 20), 7),
    Tokens((2, 5, 6, 7, 8, 33, 10, 11, 12), 5),
]


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=tiny_models.VOCAB,
            n_embd=tiny_models.WIDTH,
            n_layer=tiny_models.LAYERS,
            n_head=2,
            n_positions=64,
            initializer_range=0.3,
            bos_token_id=2,
            eos_token_id=1,
        )
        return GPT2LMHeadModel(config).eval()


MODELS = {
    "gemma2": (tiny_models.gemma2, ("resid", "mlp")),
    "gemma3": (tiny_models.gemma3, ("resid", "mlp")),
    "gemma3, sdpa": (lambda: tiny_models.gemma3(attention="sdpa"), ("resid", "mlp")),
    "gpt2": (gpt2, ("resid",)),
}


def module_at(model: nn.Module, site: Site) -> nn.Module:
    if hasattr(model, "transformer"):
        return model.get_submodule(f"transformer.h.{site.layer}")
    layer = model.get_submodule(f"model.layers.{site.layer}")
    return layer if site.kind == "resid" else layer.get_submodule("post_feedforward_layernorm")


def whole(model, tokens: Tokens, site: Site | None = None, new: torch.Tensor | None = None, more: tuple = ()):
    """Logits of what comes next, by one forward of everything; what was at the site."""
    seen = []

    def replace(module, inputs, out):
        seen.append(out[0, tokens.position].clone())
        if new is not None:
            out = out.clone()
            out[0, tokens.position] = new
        return out

    handle = None if site is None else module_at(model, site).register_forward_hook(replace)
    try:
        logits = model(input_ids=torch.tensor([[*tokens.ids, *more]]), use_cache=False).logits[0, -1]
    finally:
        if handle is not None:
            handle.remove()
    return logits, seen[0] if seen else None


@pytest.mark.parametrize("name", MODELS)
def test_as_the_whole_model(name):
    build, kinds = MODELS[name]
    model = build().double().requires_grad_(False)
    on = Continuation(model)
    template = on.template(PROMPTS)
    assert template.start == 5
    sites = [Site(layer, kind) for layer in range(tiny_models.LAYERS) for kind in kinds]
    logits, streams = on.streams(template, PROMPTS, sites)
    generator = torch.Generator().manual_seed(0)
    for row, tokens in enumerate(PROMPTS):
        torch.testing.assert_close(logits[row], whole(model, tokens)[0], rtol=1e-9, atol=1e-9)
    for site in sites:
        new = torch.randn(3, tiny_models.WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
        changed = on.logits(on.continued(template, site, streams[site], new))
        said = on.generated(template, PROMPTS, 2, site, new.detach())
        for row, tokens in enumerate(PROMPTS):
            expected, clean = whole(model, tokens, site, new[row].detach())
            torch.testing.assert_close(changed[row], expected, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(streams[site].vectors[row], clean, rtol=1e-9, atol=1e-9)
            assert said[row, 0] == expected.argmax()
            second = whole(model, tokens, site, new[row].detach(), (int(said[row, 0]),))[0]
            assert said[row, 1] == second.argmax()
        # Into the last layer's stream nothing moves from the entity to the end of the prompt.
        changed.square().sum().backward()
        is_last = site == Site(tiny_models.LAYERS - 1, site.kind)
        assert new.grad is not None
        assert bool((new.grad != 0).any()) != is_last


def test_an_activation_that_stays_changes_nothing_to_the_bit():
    model = tiny_models.gemma2().requires_grad_(False)
    on = Continuation(model)
    template = on.template(PROMPTS)
    for site in (Site(0, "resid"), Site(1, "mlp"), Site(2, "resid")):
        logits, streams = on.streams(template, PROMPTS, [site])
        assert torch.equal(on.logits(on.continued(template, site, streams[site], streams[site].vectors)), logits)


def test_the_common_beginning_ends_before_the_entity():
    on = Continuation(tiny_models.gemma2().requires_grad_(False))
    same = [Tokens((2, 5, 6, 7), 2), Tokens((2, 5, 6, 8), 2)]
    assert on.template(same).start == 2  # though the entity is the same
    first = [Tokens((5, 6), 0), Tokens((7, 6), 0)]
    template = on.template(first)
    assert template.start == 0
    assert template.keys == ()
    logits, _ = on.streams(template, first, ())
    expected = whole(tiny_models.gemma2(), first[1])[0]
    torch.testing.assert_close(logits[1], expected, rtol=1e-4, atol=1e-4)


def test_a_model_whose_logits_are_scaled_is_refused():
    model = tiny_models.gemma2(final_logit_softcapping=None).requires_grad_(False)
    forward = model.forward

    def scaled(*args, **kwargs):
        found = forward(*args, **kwargs)
        found.logits = found.logits * 2
        return found

    model.forward = scaled
    with pytest.raises(EnvironmentProblemError, match="logits of its output embeddings"):
        Continuation(model)
