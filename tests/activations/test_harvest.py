"""Harvested activations are those that `Capture` sees, special tokens left out, rows aligned across sites."""

import pytest
import torch

from gemmascope.activations import harvest
from gemmascope.sites import Capture, Site, all_sites, site_width
from tests.tiny_models import BOS, PAD, gemma2


def tokens(rows=7, context=9):
    ids = torch.randint(3, 60, (rows, context), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = BOS
    ids[2, 5:] = PAD
    return ids


def test_equals_one_capture_of_everything():
    model, ids = gemma2(), tokens()
    sites = all_sites(model)
    done = []
    harvested = harvest(model, ids, sites, batch_size=3, progress=done.append)
    with torch.no_grad(), Capture(model, sites) as capture:
        model.model(ids, use_cache=False)
    keep = (ids != BOS) & (ids != PAD)
    for site in sites:
        assert harvested[site].shape == (int(keep.sum()), site_width(model, site))
        torch.testing.assert_close(harvested[site], capture[site][keep])
    assert done == [3, 6, 7]


def test_stores_the_dtype_asked_for_and_leaves_the_model_as_it_was():
    model = gemma2()
    model.train()
    site = Site(1, "mlp")
    harvested = harvest(model, tokens(), [site], dtype=torch.bfloat16)
    assert harvested[site].dtype == torch.bfloat16
    assert not harvested[site].requires_grad
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_only_special_tokens():
    with pytest.raises(ValueError, match="tokens: expected some that are not BOS, EOS or PAD, found none"):
        harvest(gemma2(), torch.full((2, 4), PAD), [Site(0, "resid")])


def test_shape_of_tokens():
    with pytest.raises(ValueError, match=r"tokens: expected integers \[rows, context\], got torch.int64 \[4\]"):
        harvest(gemma2(), torch.zeros(4, dtype=torch.int64), [Site(0, "resid")])
