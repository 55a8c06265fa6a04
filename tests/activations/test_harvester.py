"""A superblock is what `Capture` sees of its rows, special tokens left out, and the model is as it was."""

import pytest
import torch
from torch import nn

from gemmascope.activations import Harvester, Ring, order
from gemmascope.sites import Capture, Site, all_sites
from tests.activations.superblocks import FakeRows
from tests.tiny_models import BOS, EOS, PAD, VOCAB, gemma2, gemma3, gemma3_multimodal

SITES = [Site(0, "att"), Site(1, "mlp"), Site(1, "resid")]


def harvester(model, rows, sites=SITES, **settings):
    return Harvester(model, rows, sites, **({"seed": 3, "rows_per_block": 4, "forward_rows": 3} | settings))


def filled(source, block, dtype=torch.float32):
    ring = Ring(source.widths, source.capacity, dtype=dtype, device="cpu")
    ring.fill(source, block)
    return ring


def captured(model, ids, sites, forward_rows):
    """The tokens of each forward at each site that are not BOS, EOS or PAD."""
    parts = {site: [] for site in sites}
    with torch.no_grad(), Capture(model, sites) as capture:
        for some in ids.split(forward_rows):
            model(some, use_cache=False)
            kept = (some != BOS) & (some != EOS) & (some != PAD)
            for site in sites:
                parts[site].append(capture[site][kept])
    return {site: torch.cat(part) for site, part in parts.items()}


@pytest.mark.parametrize("make", [gemma2, gemma3, gemma3_multimodal])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_capture_bit_for_bit(make, dtype):
    model, rows = make(), FakeRows()
    source = harvester(model, rows)
    for block in (0, 2):
        ring = filled(source, block, dtype)
        ids = rows.ids[rows.read[-4:]]
        expected = captured(model, ids, SITES, 3)
        assert len(set(rows.read[-4:])) == 4
        for site in SITES:
            assert torch.equal(ring.activations[site][: ring.n], expected[site].to(dtype))
        kept = rows.ids[ring.row[: ring.n], ring.position[: ring.n].long()]
        assert torch.equal(kept, ids[(ids != BOS) & (ids != PAD)])


def test_a_model_in_bfloat16_into_a_ring_in_fp32():
    model, rows = gemma3(dtype=torch.bfloat16), FakeRows()
    source = harvester(model, rows)
    ring = filled(source, 0, torch.float32)
    expected = captured(model, rows.ids[rows.read], SITES, 3)
    assert all(torch.equal(ring.activations[site][: ring.n], expected[site].float()) for site in SITES)


def test_superblocks_go_through_all_rows_again_and_again():
    model, rows = gemma2(), FakeRows(n_train=10)
    source = harvester(model, rows, [Site(0, "mlp")])
    for block in range(5):
        filled(source, block)
    assert sorted(rows.read[:10]) == sorted(rows.read[10:]) == list(range(10))
    assert rows.read[:10] != rows.read[10:]
    in_turn, rows.read = rows.read, []
    for block in (4, 0, 2):
        filled(source, block)
    assert rows.read == in_turn[16:20] + in_turn[0:4] + in_turn[8:12]
    assert list(order.RowOrder(10, seed=3).block(0, 20)) == in_turn


def test_the_base_model_alone_runs_and_stays_as_it_was():
    model, rows = gemma2(), FakeRows()
    source = harvester(model, rows)
    model.train()
    model.model.layers[0].eval()
    training = [module.training for module in model.modules()]

    def refuse(*arguments):
        raise AssertionError("expected no logits, and no layer beyond the deepest site")

    def check(module, args, kwargs):
        assert kwargs["use_cache"] is False
        assert not torch.is_grad_enabled()
        assert not module.training

    model.lm_head.register_forward_pre_hook(refuse)
    model.model.layers[2].register_forward_pre_hook(refuse)
    model.model.register_forward_pre_hook(check, with_kwargs=True)
    ring = filled(source, 0)
    assert [module.training for module in model.modules()] == training
    assert model.config.num_hidden_layers == 3
    assert not any(tensor.requires_grad for tensor in ring.activations.values())
    assert not any(module._forward_hooks for module in model.modules())


def test_bits_do_not_depend_on_autocast_or_on_the_sites_beside():
    model, rows = gemma2(), FakeRows()
    all_of_them = filled(harvester(model, rows, all_sites(model)), 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ring = filled(harvester(model, rows), 0)
    assert all(torch.equal(ring.activations[site][: ring.n], all_of_them.activations[site][: ring.n]) for site in SITES)


def test_rows_of_special_tokens_only():
    model, rows = gemma2(), FakeRows()
    rows.ids[:] = EOS
    assert filled(harvester(model, rows), 0).n == 0


def test_identity_and_content():
    model, rows = gemma2(), FakeRows()
    source = harvester(model, rows, identity={"name": "tiny", "revision": None})
    assert source.identity["model"] == {"name": "tiny", "revision": None}
    others = [
        harvester(gemma2(seed=1), rows, identity=source.identity["model"]),
        harvester(gemma2(dtype=torch.bfloat16), rows, identity=source.identity["model"]),
        harvester(model, rows, identity={"name": "tiny", "revision": "1"}),
        harvester(model, FakeRows(content="other"), identity=source.identity["model"]),
        harvester(model, rows, SITES[:1], identity=source.identity["model"]),
        harvester(model, rows, seed=2**63 - 1, identity=source.identity["model"]),
        harvester(model, rows, rows_per_block=5, identity=source.identity["model"]),
        harvester(model, rows, forward_rows=2, identity=source.identity["model"]),
    ]
    same = harvester(gemma2(), FakeRows(), list(map(str, SITES)), identity=source.identity["model"])
    assert same.content == source.content
    assert len({source.content, *(other.content for other in others)}) == 1 + len(others)


def test_seeds_that_differ_in_any_bit():
    model, rows = gemma2(), FakeRows(n_train=100)
    orders = {
        tuple(order.RowOrder(100, seed).block(0, 100).tolist())
        for seed in (0, 1, 2**31, 2**32, 2**32 + 1, 2**62, 2**63 - 1)
    }
    assert len(orders) == 7
    assert harvester(model, rows, seed=2**63 - 1).identity["seed"] == 2**63 - 1
    with pytest.raises(ValueError, match="seed: expected at most 9223372036854775807, got 9223372036854775808"):
        harvester(model, rows, seed=2**63)


def test_wrong_arguments():
    model, rows = gemma2(), FakeRows()
    with pytest.raises(ValueError, match="sites: expected at least one, got none"):
        harvester(model, rows, [])
    with pytest.raises(ValueError, match="rows_per_block: expected at least 1, got 0"):
        harvester(model, rows, rows_per_block=0)
    with pytest.raises(ValueError, match="forward_rows: expected at least 1, got 0"):
        harvester(model, rows, forward_rows=0)
    with pytest.raises(TypeError, match="identity: expected values that JSON can hold"):
        harvester(model, FakeRows(), identity={"name": object()})
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got NoneType"):
        harvester(None, rows)
    with pytest.raises(ValueError, match="expected exactly one stack of Gemma 2 or Gemma 3 decoder layers"):
        harvester(nn.Linear(2, 2), rows)
    rows.n_train = 0
    with pytest.raises(ValueError, match="rows: expected some to train on, got none"):
        harvester(model, rows)


def test_ids_beyond_the_vocabulary_and_padding_before_text():
    model, rows = gemma2(), FakeRows()
    source = harvester(model, rows)
    rows.ids[:, 3] = VOCAB
    with pytest.raises(ValueError, match=f"rows: expected ids from 0 to {VOCAB - 1}, got {VOCAB}"):
        filled(source, 0)
    rows.ids[:, 3] = PAD
    with pytest.raises(ValueError, match="rows: expected padding only after the text, found PAD before it"):
        filled(source, 0)


def test_progress_and_the_count_of_tokens():
    source, seen = harvester(gemma2(), FakeRows(), rows_per_block=4, forward_rows=3), []
    source.progress = seen.append
    for block in (0, 1):
        n = source.tokens(block)
        assert seen == [3, 4] * block  # the model did not run
        assert filled(source, block).n == n
    assert seen == [3, 4, 3, 4]
