"""Harvested activations are those that `Capture` sees, special tokens left out, rows aligned across sites; streamed
they are the same, one batch at a time."""

import importlib
import weakref

import pytest
import torch

from gemmascope.activations import harvest, stream
from gemmascope.errors import EnvironmentProblemError
from gemmascope.sites import Capture, Site, all_sites, site_width
from tests.tiny_models import BOS, EOS, PAD, gemma2


def tokens(rows=7, context=9):
    ids = torch.randint(3, 60, (rows, context), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = BOS
    ids[2:3, 5:] = PAD
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


def test_progress_counts_batches_of_special_tokens_too():
    ids, done = tokens(), []
    ids[3:6] = PAD
    harvest(gemma2(), ids, [Site(0, "resid")], batch_size=3, progress=done.append)
    assert done == [3, 6, 7]


def test_only_special_tokens():
    with pytest.raises(ValueError, match="tokens: expected some that are not BOS, EOS or PAD, found none"):
        harvest(gemma2(), torch.full((2, 4), PAD), [Site(0, "resid")])


def test_shape_of_tokens():
    with pytest.raises(ValueError, match=r"^tokens: expected shape \[rows, context\], got \[4\]$"):
        harvest(gemma2(), torch.zeros(4, dtype=torch.int64), [Site(0, "resid")])


# ---- stream


def is_untouched(model):
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return not hooked and all(module.training for module in model.modules())


@pytest.mark.parametrize("sizes", [(7,), (3, 3, 1), (1,) * 7, (0, 2, 0, 5, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_stream_is_the_harvest_however_the_rows_are_divided(sizes, dtype):
    model, ids = gemma2(), tokens()
    sites = all_sites(model)
    harvested = harvest(model, ids, sites, batch_size=3, dtype=dtype)
    streamed = list(stream(model, iter(ids.split(sizes)), sites, batch_size=3, dtype=dtype))
    assert [len(batch[sites[0]]) for batch in streamed] == [20, 24, 8]
    for site in sites:
        rows = torch.cat([batch[site] for batch in streamed])
        assert rows.dtype == dtype
        assert not rows.requires_grad
        assert torch.equal(rows, harvested[site])


def test_a_stream_of_one_tensor_and_of_int32():
    model, site = gemma2(), Site(1, "att")
    expected = harvest(model, tokens(), [site])[site]
    for ids in (tokens(), tokens().int()):
        [batch] = stream(model, ids, [site], device=torch.device("cpu"))
        assert torch.equal(batch[site], expected)


def test_tokens_to_skip():
    model, ids, site = gemma2(), tokens(rows=2), Site(0, "mlp")
    ids[1, 4] = EOS
    with torch.no_grad(), Capture(model, [site]) as capture:
        model.model(ids, use_cache=False)
    for skipped, keep in (((), ids >= 0), (iter([EOS]), ids != EOS), (None, ids > BOS)):
        [batch] = stream(model, ids, [site], skip_token_ids=skipped)
        assert torch.equal(batch[site], capture[site][keep])


def test_nothing_is_read_ahead_and_one_batch_is_alive():
    model, sites, read = gemma2(), [Site(0, "att"), Site(2, "resid")], []

    def pieces():
        for piece in tokens(rows=8).split(2):
            read.append(len(piece))
            assert not any(reference() is not None for reference in alive)
            yield piece

    alive = []
    batches = stream(model, pieces(), sites, batch_size=2)
    assert read == []
    for n in range(1, 5):
        batch = next(batches)
        assert len(read) == n
        alive = [weakref.ref(rows) for rows in batch.values()]
        assert all(reference() is not None for reference in alive)
        del batch
    assert next(batches, None) is None


def test_what_the_model_computed_is_let_go(monkeypatch):
    captures = []

    class Watched(Capture):
        def __enter__(self):
            captures.append(weakref.ref(self))
            return super().__enter__()

    monkeypatch.setattr(importlib.import_module("gemmascope.activations.harvest"), "Capture", Watched)
    batches = stream(gemma2(), tokens(), all_sites(gemma2()), batch_size=4)
    next(batches)
    assert [capture() for capture in captures] == [None]


def test_activations_own_their_memory():
    model, ids = gemma2(), tokens(rows=2)
    [batch] = stream(model, ids, [Site(0, "resid")], skip_token_ids=())
    rows = batch[Site(0, "resid")]
    assert rows.untyped_storage().nbytes() == rows.numel() * 4


def test_the_model_is_untouched_between_batches_and_after_an_early_close():
    model = gemma2().train()
    batches = stream(model, tokens(), [Site(0, "resid")], batch_size=2)
    assert is_untouched(model)
    next(batches)
    assert is_untouched(model)
    assert torch.is_grad_enabled()
    batches.close()
    assert is_untouched(model)
    assert list(batches) == []


def test_an_error_in_the_model_and_one_in_the_tokens():
    model, bad = gemma2().train(), tokens(rows=2)
    bad[1, 1] = 10_000
    batches = stream(model, [tokens(rows=2), bad], [Site(0, "resid")], batch_size=2)
    next(batches)
    with pytest.raises(ValueError, match=r"^rows_of_tokens: expected ids from 0 to 60, got 10000$"):
        next(batches)
    assert is_untouched(model)

    def pieces():
        yield tokens(rows=2)
        raise OSError("disk gone")

    batches = stream(model, pieces(), [Site(0, "resid")], batch_size=2)
    next(batches)
    with pytest.raises(OSError, match="disk gone"):
        next(batches)
    assert is_untouched(model)


@pytest.mark.parametrize(
    "rows",
    [[], iter(()), torch.zeros(0, 9, dtype=torch.int64), [torch.zeros(0, 9).long()] * 2, torch.zeros(3, 0).long()],
)
def test_a_stream_of_nothing(rows):
    assert list(stream(gemma2(), rows, [Site(0, "resid")])) == []


def test_batches_of_special_tokens_are_passed_over(monkeypatch):
    model, ids, site = gemma2(), tokens(), Site(0, "resid")
    ids[3:6] = PAD
    harvested = harvest(model, ids, [site], batch_size=3)[site]
    batches = stream(model, ids, [site], batch_size=3)
    monkeypatch.setattr(model.model, "forward", counting := Counting(model.model.forward))
    streamed = [batch[site] for batch in batches]
    assert [len(rows) for rows in streamed] == [20, 8]
    assert counting.calls == 2
    assert torch.equal(torch.cat(streamed), harvested)


class Counting:
    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.function(*args, **kwargs)


def test_rows_of_another_length():
    pieces = [tokens(rows=2, context=9), tokens(rows=3, context=7)]
    for batch_size in (2, 3):  # with and without rows left from before
        with pytest.raises(ValueError, match="rows_of_tokens: expected rows of 9 tokens like those before, got 7; pad"):
            list(stream(gemma2(), pieces, [Site(0, "resid")], batch_size=batch_size))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rows_of_tokens": 3}, TypeError, "rows_of_tokens: expected a torch.Tensor or an iterable of them, got int"),
        ({"rows_of_tokens": torch.zeros(2, 3)}, TypeError, r"rows_of_tokens: .* of int64 or int32, got float32"),
        ({"rows_of_tokens": torch.zeros(2, 3).byte()}, TypeError, r"rows_of_tokens: .* of int64 or int32, got uint8"),
        ({"rows_of_tokens": tokens() + 60}, ValueError, "rows_of_tokens: expected ids from 0 to 60, got 119"),
        ({"batch_size": 2.0}, TypeError, "batch_size: expected an int, got float"),
        ({"dtype": torch.int64}, TypeError, "dtype: expected a floating dtype, got int64"),
        ({"dtype": "float32"}, TypeError, "dtype: expected a dtype, got str"),
        ({"device": "gpu"}, ValueError, "device: expected the name of a device, .* got 'gpu'"),
        ({"device": 0.5}, TypeError, "device: expected a torch.device or its name, got float"),
        ({"skip_token_ids": 3}, TypeError, "skip_token_ids: expected an iterable of ints, got int"),
        ({"skip_token_ids": [-1]}, ValueError, "skip_token_ids: expected token ids, got -1"),
        ({"skip_token_ids": [1.5]}, TypeError, "skip_token_ids: expected an iterable of ints, got float in it"),
        ({"sites": 3}, TypeError, "sites: expected a list of sites, got int"),
        ({"sites": [3]}, TypeError, "site: expected a Site or a str, got int"),
        ({"attention_mask": [[1]]}, TypeError, "attention_mask: expected a torch.Tensor of bool, int64 or int32, got"),
        ({"attention_mask": torch.ones(7, 9)}, TypeError, "attention_mask: .* got float32"),
        ({"attention_mask": torch.ones(7, 8).bool()}, ValueError, r"attention_mask: expected shape \[7, 9\] like"),
        ({"attention_mask": torch.full((7, 9), 2)}, ValueError, "attention_mask: expected 1 at tokens and 0 at"),
        ({"max_norm_ratio": 0.5}, ValueError, "max_norm_ratio: expected a finite number ≥ 1, got 0.5"),
        ({"max_norm_ratio": "5"}, TypeError, "max_norm_ratio: expected a number, got str"),
        ({"median_norms": 3.0}, TypeError, "median_norms: expected a dict from Site to float, got float"),
        ({"median_norms": {}}, ValueError, "median_norms: .* found none for layer_0/resid"),
        ({"median_norms": {Site(0, "resid"): 0.0}}, ValueError, r"median_norms\[layer_0/resid\]: expected .* > 0"),
        ({"sites": []}, ValueError, "sites: expected at least one, got none"),
        ({"sites": "layer_0/resid"}, TypeError, "sites: expected a list of sites, got str"),
        ({"sites": [Site(7, "mlp")]}, ValueError, "layer_7/mlp"),
        ({"batch_size": 0}, ValueError, "batch_size: expected at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused_at_once(changes, error, message):
    with pytest.raises(error, match=message):
        stream(gemma2(), **({"rows_of_tokens": tokens(), "sites": [Site(0, "resid")]} | changes))


@pytest.mark.parametrize(
    ("piece", "error", "message"),
    [
        ([[1, 2]], TypeError, r"rows_of_tokens: expected a torch.Tensor of int64 or int32, got list"),
        (torch.zeros(4).long(), ValueError, r"rows_of_tokens: expected shape \[rows, context\], got \[4\]"),
        (torch.zeros(4, 2).bool(), TypeError, r"rows_of_tokens: expected a torch.Tensor of int64 .* got bool"),
    ],
)
def test_bad_pieces_are_refused_when_read(piece, error, message):
    batches = stream(gemma2(), [piece], [Site(0, "resid")])
    with pytest.raises(error, match=message):
        next(batches)


def test_the_model_is_probed_once_at_the_start():
    model = gemma2()
    batches = stream(model, tokens(), [Site(0, "resid")], batch_size=2)
    model.model.layers[1].register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(EnvironmentProblemError, match="layer_1: expected resid to equal"):
        stream(model, tokens(), [Site(0, "resid")])
    assert len(list(batches)) == 4
