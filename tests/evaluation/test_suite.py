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
        splice = evaluate_splice(model, held_out, site, sae, rows.mean(0))
        assert torch.equal(frequencies[site], metrics.firing_frequency)
        pairs = token_pairs(model, train_tokens), token_pairs(model, held_out)
        expected = {
            "site": site.kind,
            "layer": site.layer,
            "width": 20,
            "pair_table_fvu": pair_table_fvu(activations[site], pairs[0], rows, pairs[1]),
        }
        expected |= {name: getattr(metrics, name) for name in ("l0", "fvu", "pca_fvu")}
        expected |= {name: getattr(metrics, name) for name in ("dead_fraction", "high_freq_fraction")}
        expected |= {name: getattr(splice, name) for name in ("delta_loss", "ablation_delta_loss", "loss_recovered")}
        assert row == pytest.approx(expected)
