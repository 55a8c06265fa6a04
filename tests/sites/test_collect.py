"""Sparse codes of many sites from one pass: in memory and on disk.

pytest tests/sites/test_collect.py
"""

import gc
import importlib
import os

import pytest
import torch
from torch import Tensor, nn

from gemmascope import SparseCode
from gemmascope.errors import EnvironmentProblemError
from gemmascope.sites import (
    Add,
    Capture,
    Site,
    all_sites,
    attach,
    collect,
    collect_to_store,
)
from gemmascope.sites.scales import ScaleSums
from tests import tiny_models as tiny
from tests.helpers import assert_bitwise_equal
from tests.sites.test_attach import ATT, MLP, RESID, hook_count, random_sae
from tests.sites.test_edits import DenseSAE
from tests.sites.test_sites import every_model, text_model

pytest.importorskip("transformers")

joining = importlib.import_module("gemmascope.sites.collect")  # the name in the package is the function's
SAES = {ATT: random_sae(ATT, 1), RESID: random_sae(RESID, 2)}


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def ids(rows=5):
    ids = tiny.tokens(rows=rows)
    ids[0, 4], ids[1, 7:] = tiny.EOS, tiny.PAD
    ids[3, 1:] = tiny.PAD  # a row of which nothing is kept
    return ids


def assert_same_codes(found, expected):
    assert list(found) == list(expected)
    for site, code in expected.items():
        assert found[site].d_sae == code.d_sae
        for name in ("values", "indices", "offsets"):
            assert_bitwise_equal(f"{site} {name}", getattr(found[site], name), getattr(code, name))


@every_model
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_codes_are_those_of_the_activations(build, batch_size):
    model, tokens = build().train(), ids()
    saes = {site: random_sae(site, seed) for seed, site in enumerate(all_sites(model))}
    codes = collect(model, tokens, saes, batch_size=batch_size)
    assert model.training
    assert hook_count(model) == 0
    assert torch.equal(codes.kept, tokens > 2)
    model.eval()
    for start in range(0, 5, batch_size):
        rows = slice(start, start + batch_size)
        with torch.no_grad(), Capture(model, saes) as capture:
            text_model(model)(tokens[rows], use_cache=False)
        first, stop = int(codes.kept[:start].sum()), int(codes.kept[: start + batch_size].sum())
        for site, sae in saes.items():
            expected = sae.encode_sparse(capture[site][codes.kept[rows]]).to_dense()
            assert torch.equal(codes[site].to_dense()[first:stop], expected)
    assert all(code.n_tokens == int((tokens > 2).sum()) for code in codes.values())
    assert all(code.nnz > 0 for code in codes.values())


def test_scales_are_those_of_the_codes():
    codes = collect(tiny.gemma2(), ids(), SAES, batch_size=2)
    for site, scales in codes.latent_scales.items():
        dense = codes[site].to_dense()
        count = (dense != 0).sum(0)
        assert torch.equal(scales.max, dense.amax(0))
        assert torch.equal(scales.firing_count, count)
        torch.testing.assert_close(scales.mean, dense.sum(0) / count.clamp(min=1))
        assert scales.n_tokens == codes[site].n_tokens
        assert (count == 0).any() or (count < len(dense)).any()
        j = int(count.argmax())
        assert (scales.unit("max", j), scales.unit("mean", j)) == (float(scales.max[j]), float(scales.mean[j]))


def test_the_largest_of_a_latent_that_fires_below_zero_alone():
    sums = ScaleSums(3)
    sums.add(SparseCode.from_dense(torch.tensor([[-2.0, 0, 1], [-1, 0, -3]])))
    scales = sums.scales()
    assert scales.max.tolist() == [-1, 0, 1]
    assert scales.mean.tolist() == [-1.5, 0, -1]


def test_padding_and_tokens_of_ones_own():
    model, tokens = tiny.gemma2(), tiny.tokens()
    expected = collect(model, tokens, SAES)
    padded = torch.cat([torch.full((2, 3), tiny.PAD), tokens], 1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    found = collect(model, padded, SAES, attention_mask=mask)
    assert torch.equal(found.kept[:, 3:], expected.kept)
    assert not found.kept[:, :3].any()
    for site, code in expected.items():
        torch.testing.assert_close(found[site].to_dense(), code.to_dense(), rtol=1e-4, atol=1e-4)
    everything = collect(model, tokens, SAES, skip_token_ids=())
    assert everything.kept.all()
    assert torch.equal(everything[RESID].to_dense()[expected.kept.flatten()], expected[RESID].to_dense())


def test_the_effect_of_attached_saes_is_collected():
    model, tokens = tiny.gemma2(), tiny.tokens()
    clean = collect(model, tokens, {RESID: SAES[RESID]})[RESID].to_dense()
    with attach(model, {ATT: SAES[ATT]}, mode="with_error"):
        assert torch.equal(collect(model, tokens, {RESID: SAES[RESID]})[RESID].to_dense(), clean)
    with attach(model, {ATT: SAES[ATT]}, mode="with_error", edits={ATT: Add(0, 5.0)}):
        steered = collect(model, tokens, {RESID: SAES[RESID]})[RESID].to_dense()
    assert (steered - clean).abs().max() > 0.1


def test_an_sae_of_the_protocol_and_one_of_fp64():
    model, tokens = tiny.gemma2(dtype=torch.float64), tiny.tokens()
    double = random_sae(RESID, 2).double()
    codes = collect(model, tokens, {RESID: double})
    assert codes[RESID].values.dtype == torch.float64
    dense = collect(model, tokens, {RESID: DenseSAE(double)})
    torch.testing.assert_close(dense[RESID].to_dense(), codes[RESID].to_dense())


def test_no_further_than_the_deepest_site_and_no_logits():
    model, reached = tiny.gemma2(), []
    model.model.layers[2].register_forward_pre_hook(lambda module, args: reached.append("layer 2"))
    model.lm_head.register_forward_pre_hook(lambda module, args: reached.append("lm_head"))
    done = []
    collect(model, ids(), SAES, batch_size=2, progress=done.append)
    assert reached == []
    assert done == [2, 4, 5]
    assert model.config.num_hidden_layers == tiny.LAYERS


class TestMemory:
    def needed(self, codes, batches):
        """Everything, and what is joined last a second time; each batch has an offset of its own."""
        sizes = [8 * code.nnz + 8 * (code.n_tokens + batches) for code in codes.values()]
        return sum(sizes) + max(sizes)

    def test_the_bound_is_exact(self):
        model, tokens = tiny.gemma2(), ids()
        codes = collect(model, tokens, SAES, batch_size=2)
        needed = self.needed(codes, batches=3)
        assert codes.nbytes == sum(8 * code.nnz + 8 * (code.n_tokens + 1) for code in codes.values())
        assert_same_codes(collect(model, tokens, SAES, batch_size=2, max_bytes=needed), codes)
        message = (
            rf"^max_bytes: expected room for the codes, at least {needed} bytes for 5 of 5 rows, got {needed - 1}; "
        )
        with pytest.raises(ValueError, match=message):
            collect(model, tokens, SAES, batch_size=2, max_bytes=needed - 1)
        assert hook_count(model) == 0

    def test_too_much_is_noticed_as_soon_as_it_is(self):
        model, tokens, forwards = tiny.gemma2(), ids(), []
        model.model.layers[0].register_forward_pre_hook(lambda module, args: forwards.append(1))
        with pytest.raises(ValueError, match=r"^max_bytes: .* for 2 of 5 rows, got 100; give more, or use"):
            collect(model, tokens, SAES, batch_size=2, max_bytes=100)
        assert len(forwards) == 1

    def test_what_is_alive_while_batches_are_joined(self, monkeypatch):
        """Of the indices, counted in the tensors themselves: all of them once, and those of one site twice."""
        join, peaks, before = joining._joined, [], indices_alive()

        def counting(parts):
            joined = join(parts)
            peaks.append(indices_alive() - before)
            return joined

        monkeypatch.setattr(joining, "_joined", counting)
        codes = collect(tiny.gemma2(), ids(), SAES, batch_size=1)
        sizes = [code.indices.nbytes for code in codes.values()]
        assert sum(sizes) < max(peaks) <= sum(sizes) + max(sizes)


def indices_alive():
    """Bytes of the tensors of int32 that Python holds."""
    gc.collect()
    storages = [
        tensor.untyped_storage()
        for tensor in gc.get_objects()
        if type(tensor) is Tensor and tensor.dtype == torch.int32
    ]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"saes": {}}, ValueError, r"^saes: expected at least one site, got none$"),
            ({"saes": [RESID]}, TypeError, r"^saes: expected a dict from Site to SAE, got list$"),
            ({"saes": {RESID: SAES[ATT]}}, ValueError, r"^site layer_1/resid: expected an SAE of d_model 16, got 24$"),
            ({"saes": {RESID: nn.Identity()}}, TypeError,
             r"^site layer_1/resid: expected an SAE with encode and d_sae, got"),
            ({"saes": {Site(3, "mlp"): random_sae(MLP)}}, ValueError,
             r"^site layer_3/mlp: expected a layer from 0 to 2"),
            ({"saes": {RESID: SAES[RESID], "blocks.1.hook_resid_post": SAES[RESID]}}, ValueError,
             r"^saes: expected each site once, got layer_1/resid under several names$"),
            ({"tokens": torch.zeros(2, 3, dtype=torch.long)}, ValueError,
             r"^tokens: expected some that are kept, found none"),
            ({"tokens": torch.full((2, 3), 99)}, ValueError, r"^tokens: expected ids from 0 to 60, got 99$"),
            ({"tokens": [[2, 3]]}, TypeError, r"^tokens: expected a torch.Tensor of int64 or int32, got list$"),
            ({"batch_size": 0}, ValueError, r"^batch_size: expected at least 1, got 0$"),
            ({"max_bytes": 0}, ValueError, r"^max_bytes: expected at least 1, got 0$"),
            ({"progress": 3}, TypeError, r"^progress: expected a function, got int$"),
            ({"attention_mask": torch.ones(2, 3)}, TypeError, r"^attention_mask: expected a torch.Tensor of bool"),
        ],
    )  # fmt: skip
    def test_before_the_model_runs(self, tmp_path, options, error, message):
        arguments = {"tokens": tiny.tokens(), "saes": SAES} | options
        tokens, saes = arguments.pop("tokens"), arguments.pop("saes")
        for use in (collect, lambda *given, **rest: collect_to_store(*given, tmp_path / "codes", **rest)):
            with pytest.raises(error, match=message):
                use(tiny.gemma2(), tokens, saes, **arguments)
        assert not (tmp_path / "codes").exists()

    def test_activations_that_are_not_finite(self):
        sae = random_sae(RESID)
        nn.init.constant_(sae.b_enc, torch.nan)
        message = r"^site layer_1/resid: expected finite activations, found NaN or Inf in rows 0 to 1$"
        with pytest.raises(EnvironmentProblemError, match=message):
            collect(tiny.gemma2(), tiny.tokens(), {RESID: sae})
