"""Judging a suite gives what the metrics give one by one, on activations whose tokens are known."""

import itertools

import pytest
import torch

from gemmascope.activations import harvest
from gemmascope.evaluation import evaluate_sae, evaluate_splice, judge_suite, pair_table_fvu
from gemmascope.evaluation.suite import token_pairs
from gemmascope.saes import JumpReLUSAE
from gemmascope.sites import Site
from tests.tiny_models import EOS, PAD, VOCAB, gemma2, tokens, width

SITES = (Site(0, "att"), Site(2, "resid"))


def test_pairs_are_those_of_the_tokens_harvested():
    ids = tokens(rows=3, length=6)
    ids[1, 3], ids[2, 4:] = EOS, PAD
    ids[0, 0] = 7  # a row that starts in the middle of a text
    pairs = token_pairs(gemma2(), ids)
    expected = [(VOCAB, 7)]
    for row in ids.tolist():
        expected += [(a, b) for a, b in itertools.pairwise(row) if b > 2]
    assert pairs.tolist() == [list(pair) for pair in expected]
    assert len(pairs) == len(harvest(gemma2(), ids, SITES)[SITES[0]])


def test_each_row_holds_the_metrics_of_its_sae(tmp_path):
    model, train_tokens, held_out = gemma2(), tokens(6, 9, seed=1), tokens(4, 9, seed=2)
    held_out[3, 4] = EOS
    activations, paths = harvest(model, train_tokens, SITES), {}
    for site in SITES:
        generator = torch.Generator().manual_seed(site.layer)
        paths[site] = tmp_path / str(site) / "params.npz"
        JumpReLUSAE(width(site), 20, pre_encoder_bias=False, threshold_init=0.5, generator=generator).save(paths[site])
    done = []
    results, frequencies = judge_suite(
        model,
        train_tokens,
        held_out,
        activations,
        paths,
        impl="reference",
        on_done=lambda n, site: done.append((n, site)),
    )
    assert done == [(1, SITES[0]), (2, SITES[1])]
    held_out_activations = harvest(model, held_out, SITES)
    for site, row in zip(SITES, results, strict=True):
        sae, rows = JumpReLUSAE.load(paths[site]), held_out_activations[site]
        sae.impl = "reference"
        metrics = evaluate_sae(sae, rows, activations[site])
        splice = evaluate_splice(model, held_out, site, sae, rows.double().mean(0))
        assert torch.equal(frequencies[site], metrics.firing_frequency)
        pairs = token_pairs(model, train_tokens), token_pairs(model, held_out)
        expected = {
            "site": site.kind,
            "layer": site.layer,
            "width": 20,
            "tokens": 4 * 8 - 1,
            "predictions": 4 * 7 - 2,  # neither EOS nor what follows it
            "pair_table_fvu": pair_table_fvu(activations[site], pairs[0], rows, pairs[1]),
        }
        expected |= {name: getattr(metrics, name) for name in ("l0", "fvu", "pca_fvu", "median_fvu", "pca_median_fvu")}
        expected |= {name: getattr(metrics, name) for name in ("top_error_share", "top_variance_share")}
        expected |= {name: getattr(metrics, name) for name in ("dead_fraction", "high_freq_fraction")}
        expected |= {name: getattr(splice, name) for name in ("delta_loss", "ablation_delta_loss", "loss_recovered")}
        assert row == pytest.approx(expected)


def judged(tmp_path, **changes):
    model, train_tokens, held_out = gemma2(), tokens(6, 9, seed=1), tokens(4, 9, seed=2)
    path = tmp_path / "params.npz"
    generator = torch.Generator().manual_seed(0)
    JumpReLUSAE(width(SITES[0]), 20, pre_encoder_bias=False, threshold_init=0.5, generator=generator).save(path)
    arguments = {
        "model": model,
        "train_tokens": train_tokens,
        "held_out": held_out,
        "activations": harvest(model, train_tokens, SITES[:1]),
        "paths": {SITES[0]: path},
    }
    return judge_suite(**(arguments | changes))


def test_held_out_activations_can_be_given(tmp_path):
    held_out = harvest(gemma2(), tokens(4, 9, seed=2), SITES[:1])
    expected, _ = judged(tmp_path)
    found, _ = judged(tmp_path, held_out_activations=held_out)
    assert found == expected


def test_what_is_undefined_is_none(tmp_path):
    """JSON has no NaN."""
    same = torch.ones(32, width(SITES[0]))
    (row,), _ = judged(tmp_path, held_out_activations={SITES[0]: same})
    assert row["fvu"] is row["median_fvu"] is row["pca_fvu"] is row["top_variance_share"] is None
    assert row["tokens"] == 32


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"paths": {}}, ValueError, "paths: expected at least one site, got none"),
        ({"paths": ["params.npz"]}, TypeError, "paths: expected a Mapping, got list"),
        ({"paths": {"layer_0/att": "params.npz"}}, TypeError, "paths: key: expected a Site, got str"),
        ({"activations": {}}, ValueError, "activations: expected those of layer_0/att, got none"),
        (
            {"activations": {SITES[0]: torch.ones(5, 24)}},
            ValueError,
            r"activations\[layer_0/att\]: expected those of the 48",
        ),
        (
            {"held_out_activations": {SITES[0]: [1]}},
            TypeError,
            r"held_out_activations\[layer_0/att\]: expected a torch",
        ),
        ({"held_out_activations": 3}, TypeError, "held_out_activations: expected a Mapping, got int"),
        ({"train_tokens": [[1, 2]]}, TypeError, "train_tokens: expected an integer torch.Tensor, got list"),
        ({"held_out": torch.ones(9).long()}, ValueError, r"held_out: expected shape \[rows, context\], got \[9\]"),
        ({"on_done": 3}, TypeError, "on_done: expected a function, got int"),
        ({"clean_loss": "1"}, TypeError, "clean_loss: expected a number, got str"),
    ],
)
def test_refusals(tmp_path, changes, error, message):
    with pytest.raises(error, match=f"^{message}"):
        judged(tmp_path, **changes)
