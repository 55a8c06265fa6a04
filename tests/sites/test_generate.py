"""Generation with SAEs in the model gives what full forwards, without any cache, give.

pytest tests/sites/test_generate.py
"""

import pytest
import torch

from gemmascope.sites import Ablate, Add, Capture, Clamp, Patch, Site, attach
from tests import tiny_models as tiny
from tests.sites.test_attach import ATT, MLP, RESID, random_sae
from tests.sites.test_sites import every_model

pytest.importorskip("transformers")

NEW = 8
OPTIONS = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": tiny.PAD}
PROMPT = 6


def saes():
    return {site: random_sae(site) for site in (ATT, MLP, RESID)}


def options(rows=1):
    """Edits of each kind, some of them at columns of the prompt and of what is generated alike, and nowhere else."""
    columns = torch.zeros(rows, PROMPT + 3, dtype=torch.bool)
    columns[:, 3:] = True
    columns[0, 4] = False
    edits = {
        ATT: [Ablate(range(6)), Add(8, 1.0, positions=columns)],
        RESID: [Clamp(3, 3.0, positions=columns), Add(4, -2.0)],
    }
    return {"edits": edits}


MODES = pytest.mark.parametrize("mode", ["replace", "with_error"])


def prompt(rows=2):
    return tiny.tokens(rows=rows, length=PROMPT)


@torch.no_grad()
def by_hand(model, ids, attention_mask=None, n=NEW):
    """Greedy: the whole text anew for each token, EOS never."""
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    for _ in range(n):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
        logits[:, tiny.EOS] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(ids[:, -1:])], 1)
    return ids


def dynamic_cache(model):
    from transformers import DynamicCache

    return {"past_key_values": DynamicCache()}  # no layer slides


def sliding_cache(model):
    from transformers import DynamicCache

    return {"past_key_values": DynamicCache(config=model.config.get_text_config())}


def static_cache(model):
    from transformers import StaticCache

    return {"past_key_values": StaticCache(config=model.config.get_text_config(), max_cache_len=32)}


CACHES = {
    "none": lambda model: {"use_cache": False},
    "default": lambda model: {},
    "dynamic": lambda model: {"cache_implementation": "dynamic"},
    "static": lambda model: {"cache_implementation": "static"},
    "dynamic object": dynamic_cache,
    "sliding object": sliding_cache,
    "static object": static_cache,
}


@every_model
@MODES
@pytest.mark.parametrize("cache", CACHES)
def test_every_cache(build, mode, cache):
    model, ids = build(), prompt()
    clean = by_hand(model, ids)
    with attach(model, saes(), mode=mode, **options(rows=2)):
        expected = by_hand(model, ids)
        assert torch.equal(model.generate(ids, **OPTIONS, **CACHES[cache](model)), expected)
    assert not torch.equal(expected, clean)
    assert torch.equal(model.generate(ids, **OPTIONS, **CACHES[cache](model)), clean)


@every_model
def test_with_error_and_without_edits_nothing_changes(build):
    model, ids = build(), prompt()
    scores = {"return_dict_in_generate": True, "output_scores": True}
    clean = model.generate(ids, **OPTIONS, **scores)
    with attach(model, saes(), mode="with_error"):
        found = model.generate(ids, **OPTIONS, **scores)
    assert torch.equal(found.sequences, clean.sequences)
    assert all(torch.equal(*pair) for pair in zip(found.scores, clean.scores, strict=True))


@every_model
@MODES
def test_prompts_padded_on_the_left(build, mode):
    """Each row alone, without padding, says the same; the columns of a mask count the padding."""
    model, short, long = build(), prompt(1), tiny.tokens(rows=1, length=PROMPT + 3, seed=4)
    rows = torch.cat([torch.cat([torch.full((1, 3), tiny.PAD), short], 1), long])
    mask = torch.ones_like(rows)
    mask[0, :3] = 0
    at = torch.zeros(PROMPT + 5, dtype=torch.bool)
    at[5:] = True

    def steered(columns):
        return {RESID: [Add(4, 3.0, positions=columns), Ablate([0, 1])], ATT: Clamp(5, 2.0)}

    expected = []
    for ids, columns in ((short, at[3:]), (long, at)):
        with attach(model, saes(), mode=mode, edits=steered(columns)):
            expected.append(by_hand(model, ids)[0, ids.shape[1] :])
    with attach(model, saes(), mode=mode, edits=steered(at)):
        found = model.generate(rows, attention_mask=mask, **OPTIONS)[:, rows.shape[1] :]
    assert torch.equal(found, torch.stack(expected))


@every_model
@MODES
def test_beams(build, mode):
    """Rows are reordered while they grow; the masks of both beams of a prompt are the same."""
    model, ids, beams = build(), prompt(), {"num_beams": 3, "num_return_sequences": 2}
    clean = model.generate(ids, **OPTIONS, **beams)
    found = {}
    for use_cache in (False, True):
        edits = options(rows=2)["edits"]
        edits[ATT][1] = Add(8, 1.0, positions=edits[ATT][1].positions.repeat_interleave(3, 0))
        edits[RESID][0] = Clamp(3, 3.0, positions=edits[RESID][0].positions.repeat_interleave(3, 0))
        with attach(model, saes(), mode=mode, edits=edits):
            found[use_cache] = model.generate(ids, **OPTIONS, **beams, use_cache=use_cache)
    assert torch.equal(found[True], found[False])
    assert not torch.equal(found[True], clean)
    message = r"^positions: expected 1 row or 6, as the model runs on, got 2; for beams .* repeat_interleave the rows$"
    with attach(model, saes(), mode=mode, **options(rows=2)), pytest.raises(ValueError, match=message):
        model.generate(ids, **OPTIONS, **beams)


@every_model
@MODES
def test_prompt_lookup(build, mode):
    """Several tokens are tried in one forward, and some of them taken back out of the cache."""
    model = build()
    ids = prompt(1)[:, [0, 1, 2, 3, 1, 2]]  # something to look up
    tried = []
    with attach(model, saes(), mode=mode, **options()):
        expected = by_hand(model, ids)
        handle = model.register_forward_hook(lambda module, args, output: tried.append(output.logits.shape[1]))
        found = model.generate(ids, **OPTIONS, prompt_lookup_num_tokens=3)
        handle.remove()
    assert torch.equal(found, expected)
    assert any(n > 1 for n in tried[1:])


@MODES
@pytest.mark.parametrize("build", [tiny.gemma2, tiny.gemma3])
def test_an_assistant(build, mode):
    """SAEs are in the model alone, and decide what is kept of what the assistant proposes."""
    model, assistant, ids = build(), build(seed=1), prompt(1)
    with attach(model, saes(), mode=mode, **options()):
        expected = by_hand(model, ids)
        assert torch.equal(model.generate(ids, **OPTIONS, assistant_model=assistant), expected)
    alone = assistant.generate(ids, **OPTIONS)
    in_both = attach(assistant, {Site(0, "resid"): random_sae(RESID)})
    with in_both, attach(model, saes(), mode=mode, **options()):
        assert torch.equal(model.generate(ids, **OPTIONS, assistant_model=assistant), expected)
    assert torch.equal(assistant.generate(ids, **OPTIONS), alone)


@every_model
def test_sampling_from_one_seed(build):
    model, ids = build(), prompt()
    sampled = OPTIONS | {"do_sample": True, "top_k": 8}
    found = {}
    for use_cache in (False, True):
        with attach(model, saes(), **options(rows=2)), torch.random.fork_rng():
            torch.manual_seed(3)
            found[use_cache] = model.generate(ids, **sampled, use_cache=use_cache)
    assert torch.equal(found[True], found[False])


def test_codes_of_a_prompt_patched_while_another_is_continued():
    """The prompt's columns alone are patched: behind it the model runs on its own."""
    model, sae, ids, others = tiny.gemma2(), random_sae(RESID), prompt(), tiny.tokens(length=PROMPT, seed=1)
    with torch.no_grad(), Capture(model, [RESID]) as capture:
        model(others)
    kept = others > 2
    code = sae.encode_sparse(capture[RESID][kept])
    clean, generated = by_hand(model, ids), []
    for edit in (Patch(code, kept), Patch(sae.encode_sparse(capture[RESID]))):
        with attach(model, {RESID: sae}, mode="with_error", edits={RESID: edit}):
            generated.append(model.generate(ids, **OPTIONS))
            if edit.of is not None:  # without a mask a forward must begin with the other run's tokens, all of them
                assert torch.equal(generated[0], by_hand(model, ids))
    assert torch.equal(*generated)  # BOS, which `kept` leaves out, is not spliced
    assert not torch.equal(generated[0], clean)


def in_place(model):
    model.compile(backend="eager")


def its_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")


@pytest.mark.parametrize("compiled", [in_place, its_forward])
def test_compiled(compiled):
    model, ids = tiny.gemma2(), prompt()
    clean = by_hand(model, ids)
    with attach(model, saes(), **options(rows=2)):
        expected = by_hand(model, ids)
    assert not torch.equal(expected, clean)
    compiled(model)
    with attach(model, saes(), **options(rows=2)):
        assert torch.equal(model.generate(ids, **OPTIONS), expected)
    assert torch.equal(model.generate(ids, **OPTIONS), clean)
