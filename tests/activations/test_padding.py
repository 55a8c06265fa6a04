"""Padding: with a mask the side does not matter, without one it must come after the text.

pytest tests/activations/test_padding.py
"""

import pytest
import torch

from gemmascope.activations import harvest, stream
from gemmascope.evaluation import delta_loss, evaluate_splice, language_model_loss, mean_ablation_loss
from gemmascope.sites import Site, all_sites
from tests import tiny_models as tiny
from tests.sites.test_attach import Constant
from tests.sites.test_sites import every_model

pytest.importorskip("transformers")

RESID = Site(1, "resid")
PADDED = 3


def padded():
    """The same text padded on the right, and on the left with its mask."""
    ids = tiny.tokens(rows=3, length=9)
    right = ids.clone()
    right[1:, 9 - PADDED :] = tiny.PAD
    left = ids.clone()
    left[1:] = right[1:].roll(PADDED, 1)
    return right, left, (left != tiny.PAD).long()


@every_model
def test_a_harvest_is_the_same_on_either_side(build):
    model, (right, left, mask) = build(), padded()
    sites = all_sites(model)
    expected = harvest(model, right, sites)
    for given in (mask, mask.bool(), mask.int()):
        harvested = harvest(model, left, sites, attention_mask=given, batch_size=2)
        assert torch.equal(harvested.kept, (left > 2))
        for site in sites:
            torch.testing.assert_close(harvested[site], expected[site], rtol=1e-4, atol=1e-4)
    streamed = stream(model, left.split(1), sites, attention_mask=mask.split(1), batch_size=2)
    rows = [batch[RESID] for batch in streamed]
    assert torch.equal(torch.cat(rows), harvest(model, left, sites, attention_mask=mask, batch_size=2)[RESID])


def test_a_mask_leaves_out_more_than_special_tokens():
    model, ids = tiny.gemma2(), tiny.tokens(rows=2)
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    harvested = harvest(model, ids, [RESID], attention_mask=mask)
    expected = harvest(model, ids[:, :6], [RESID])
    torch.testing.assert_close(harvested[RESID], expected[RESID], rtol=1e-4, atol=1e-4)
    assert language_model_loss(model, ids, attention_mask=mask) == pytest.approx(
        language_model_loss(model, ids[:, :6]), rel=1e-5
    )


def test_losses_are_the_same_on_either_side():
    model, (right, left, mask) = tiny.gemma2(), padded()
    mean = torch.ones(16)
    for batch_size in (None, 2):
        options = {"batch_size": batch_size, "attention_mask": mask}
        loss = language_model_loss(model, left, **options)
        assert loss == pytest.approx(language_model_loss(model, right), rel=1e-5)
        delta = delta_loss(model, left, {RESID: Constant()}, **options)
        assert delta == pytest.approx(delta_loss(model, right, {RESID: Constant()}), rel=1e-4)
        assert mean_ablation_loss(model, left, RESID, mean, **options) == pytest.approx(
            mean_ablation_loss(model, right, RESID, mean), rel=1e-5
        )
        found = evaluate_splice(model, left, RESID, Constant(), mean, **options)
        assert (found.clean_loss, found.delta_loss) == (loss, delta)


@pytest.mark.parametrize(
    "row",
    [[0, 0, 2, 5, 6, 7], [0, 2, 5, 6, 7, 8], [2, 5, 0, 0, 6, 7]],
    ids=["two before", "one before", "between"],
)
def test_padding_before_text_needs_a_mask(row):
    model, ids = tiny.gemma2(), torch.tensor([[2, 5, 6, 7, 0, 0], row])
    message = (
        r": expected padding only after the text, found PAD before it, .*; pass attention_mask, or pad on the right$"
    )
    for use in (
        lambda: harvest(model, ids, [RESID]),
        lambda: stream(model, ids, [RESID]),
        lambda: next(stream(model, [ids], [RESID])),
        lambda: language_model_loss(model, ids),
        lambda: evaluate_splice(model, ids, RESID, Constant(), torch.ones(16)),
    ):
        with pytest.raises(ValueError, match=message):
            use()


def test_a_pad_token_that_also_separates_texts():
    """One before a text is a separator; a run of them is padding."""
    model = tiny.gemma2(pad_token_id=tiny.EOS)
    harvest(model, torch.tensor([[1, 2, 5, 6, 1, 2, 7, 8]]), [RESID])
    with pytest.raises(ValueError, match="found PAD before it"):
        harvest(model, torch.tensor([[1, 1, 2, 5, 6, 7]]), [RESID])


def test_masks_beside_pieces():
    model, (_, left, mask) = tiny.gemma2(), padded()
    with pytest.raises(ValueError, match=r"^attention_mask: expected as many tensors as in rows_of_tokens, got fewer$"):
        list(stream(model, left.split(1), [RESID], attention_mask=[mask[:1]]))
    with pytest.raises(ValueError, match=r"^attention_mask: expected as many tensors as in rows_of_tokens, got more$"):
        list(stream(model, [left], [RESID], attention_mask=[mask, mask]))
    with pytest.raises(TypeError, match=r"^attention_mask: expected an iterable like rows_of_tokens, got int64$"):
        stream(model, left.split(1), [RESID], attention_mask=mask)
