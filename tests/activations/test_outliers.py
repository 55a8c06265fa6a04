"""Tokens of outlying norm: counted always, left out at every site alike where that is asked for.

pytest tests/activations/test_outliers.py
"""

import pytest
import torch

from gemmascope.activations import OUTLIER_RATIO, harvest, stream
from gemmascope.sites import Site
from tests import tiny_models as tiny

pytest.importorskip("transformers")

RESID, MLP = Site(1, "resid"), Site(0, "mlp")
SITES = [RESID, MLP]
LOUD = 7  # the token whose embedding is a hundred times too large


@pytest.fixture
def model():
    model = tiny.gemma2()
    with torch.no_grad():
        model.model.embed_tokens.weight[LOUD] *= 100
    return model


@pytest.fixture
def ids():
    ids = tiny.tokens(rows=6)
    ids[ids == LOUD] = 8
    ids[[1, 4, 4], [3, 2, 8]] = LOUD
    return ids


def test_counted_and_kept_by_default(model, ids):
    harvested = harvest(model, ids, SITES)
    counts = harvested.outliers
    assert (counts.ratio, counts.tokens, counts.outliers, counts.dropped) == (OUTLIER_RATIO, 48, 3, 0)
    assert counts.outliers_at == {RESID: 3, MLP: 0}  # the norm before the MLP hides it there
    assert torch.equal(harvested.kept, ids > 2)
    for site in SITES:
        assert counts.median_norms[site] == harvested[site].norm(dim=1).median().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_left_out_at_every_site(model, ids, dtype):
    everything = harvest(model, ids, SITES, dtype=dtype)
    harvested = harvest(model, ids, SITES, dtype=dtype, max_norm_ratio=5)
    assert (harvested.outliers.dropped, harvested.outliers.outliers, harvested.outliers.tokens) == (3, 3, 48)
    assert torch.equal(harvested.kept, (ids > 2) & (ids != LOUD))
    for site in SITES:
        assert torch.equal(harvested[site], everything[site][ids[ids > 2] != LOUD])
        assert harvested[site].untyped_storage().nbytes() == harvested[site].nbytes


def test_a_stream_leaves_out_the_same(model, ids):
    """The median is that of the first batch: a pure function of the tokens and the batch size."""
    harvested = harvest(model, ids, SITES, batch_size=2, max_norm_ratio=5)
    batches = stream(model, ids.split(4), SITES, batch_size=2, max_norm_ratio=5)
    seen, kept = [], []
    for batch in batches:
        seen.append(batch)
        kept.append(batches.kept)
    assert [len(batch[RESID]) for batch in seen] == [15, 16, 14]
    assert torch.equal(torch.cat(kept), harvested.kept)
    assert batches.outliers == harvested.outliers
    for site in SITES:
        assert torch.equal(torch.cat([batch[site] for batch in seen]), harvested[site])


def test_held_out_text_by_the_medians_of_another(model, ids):
    medians = harvest(model, ids, SITES).outliers.median_norms
    only_loud = torch.full((1, 4), LOUD)
    assert harvest(model, only_loud, SITES).outliers.outliers == 0  # by its own median nothing is
    counts = harvest(model, only_loud, SITES, median_norms=medians).outliers
    assert (counts.outliers, counts.median_norms) == (4, medians)
    assert list(stream(model, only_loud, SITES, median_norms=medians, max_norm_ratio=5)) == []


def test_fp16_that_does_not_hold_them(model, ids):
    with torch.no_grad():
        model.model.embed_tokens.weight[LOUD] *= 1000
    message = r"^dtype: expected one that holds the activations of layer_1/resid, got float16, whose range they leave$"
    with pytest.raises(ValueError, match=message):
        harvest(model, ids, SITES, dtype=torch.float16)
    harvest(model, ids, SITES, dtype=torch.float16, max_norm_ratio=5)
