"""Judging a suite gives what the metrics give one by one, on activations whose tokens are known."""

import itertools

import pytest
import torch

from gemmascope.activations import harvest
from gemmascope.evaluation import (
    SparingOutliers,
    delta_loss,
    evaluate_sae,
    evaluate_splice,
    judge_suite,
    language_model_loss,
    loss_recovered,
    mean_ablation_loss,
    pair_table_fvu,
    random_dictionary_fvu,
    suite,
)
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


def saved(folder, site, width_of_sae=20, seed=0, **metadata):
    """The file of a random SAE."""
    path = folder / str(site) / f"{width_of_sae}-{seed}" / "params.npz"
    generator = torch.Generator().manual_seed(seed)
    options = {"threshold_init": 0.5, "generator": generator, "metadata": metadata}
    JumpReLUSAE(width(site), width_of_sae, pre_encoder_bias=False, **options).save(path)
    return path


ON_ROWS = (
    *("l0", "fvu", "pca_fvu", "median_fvu", "pca_median_fvu", "top_error_share", "top_variance_share"),
    *("reconstruction_bias", "dead_fraction", "high_freq_fraction", "tokens"),
)


def expected_on(path, site, train, train_pairs, rows, pairs):
    """What the metrics of activations give one by one."""
    sae = JumpReLUSAE.load(path)
    sae.impl = "reference"
    metrics = evaluate_sae(sae, rows, train)
    figures = {name: getattr(metrics, name) for name in ON_ROWS}
    figures["pair_table_fvu"] = pair_table_fvu(train, train_pairs, rows, pairs)
    figures["random_fvu"] = random_dictionary_fvu(train, rows, round(metrics.l0), sae.d_sae, 0)
    return figures, metrics.firing_frequency


@pytest.mark.parametrize("max_bytes", [1, 2**30], ids=["site by site", "together"])
def test_each_row_holds_the_metrics_of_its_sae(tmp_path, max_bytes):
    model, train_tokens, held_out = gemma2(), tokens(6, 9, seed=1), tokens(4, 9, seed=2)
    held_out[3, 4] = EOS
    # Two SAEs of one site, one of another between them.
    recipe = {"training": {"seed": 3, "loss": {"target_l0": 40.0, "l0_coefficient": 8e-3}}}
    recipe |= {"kind": "batchtopk", "k": 12}
    saes = {
        "a": (SITES[0], saved(tmp_path, SITES[0])),
        "b": (SITES[1], saved(tmp_path, SITES[1], seed=1, **recipe)),
        "c": (SITES[0], saved(tmp_path, SITES[0], 30, seed=2, seed_of_training=4)),
    }
    done = []
    results, frequencies = judge_suite(
        model,
        saes,
        train_tokens,
        held_out,
        impl="reference",
        max_bytes=max_bytes,
        on_done=lambda n, name: done.append((n, name)),
    )
    assert done == [(1, "a"), (2, "c"), (3, "b")], "site by site"
    assert list(frequencies) == [row["name"] for row in results] == ["a", "b", "c"]
    activations, held_out_activations = harvest(model, train_tokens, SITES), harvest(model, held_out, SITES)
    pairs = token_pairs(model, train_tokens), token_pairs(model, held_out)
    for row in results:
        site, path = saes[row["name"]]
        rows = held_out_activations[site]
        expected, frequency = expected_on(path, site, activations[site], pairs[0], rows, pairs[1])
        sae = JumpReLUSAE.load(path)
        sae.impl = "reference"
        splice = evaluate_splice(model, held_out, site, sae, rows.double().mean(0))
        assert torch.equal(frequencies[row["name"]], frequency)
        centred = rows.double() - rows.double().mean(0)
        expected |= {name: getattr(splice, name) for name in ("delta_loss", "ablation_delta_loss", "loss_recovered")}
        expected |= {
            "name": row["name"],
            "site": site.kind,
            "layer": site.layer,
            "width": 30 if row["name"] == "c" else 20,
            "kind": "batchtopk" if row["name"] == "b" else "jumprelu",
            "k": 12 if row["name"] == "b" else None,
            "seed": 3 if row["name"] == "b" else None,
            "target_l0": 40.0 if row["name"] == "b" else None,
            "l0_coefficient": 8e-3 if row["name"] == "b" else None,
            "predictions": 4 * 7 - 2,  # neither EOS nor what follows it
            "gamma": (rows.double().mean(0).norm() / centred.square().sum(1).mean().sqrt()).item(),
            "outliers": 0,
            "outlier_ratio": 5.0,
        }
        assert row["tokens"] == 4 * 8 - 1
        assert row == pytest.approx(expected)


RATIO = 1.05  # of the tiny model's norms some are above so many times the median


def test_outliers_are_left_out_and_all_tokens_stand_beside(tmp_path):
    model, train_tokens, held_out = gemma2(), tokens(6, 9, seed=1), tokens(4, 9, seed=2)
    site = SITES[1]
    path = saved(tmp_path, site)
    (row,), frequencies = judge_suite(
        model, {"a": (site, path)}, train_tokens, held_out, max_norm_ratio=RATIO, impl="reference"
    )
    train, rows = (harvest(model, ids, [site])[site] for ids in (train_tokens, held_out))
    pairs = token_pairs(model, train_tokens), token_pairs(model, held_out)
    most = RATIO * train.norm(dim=1).median()
    kept = [each.norm(dim=1) <= most for each in (train, rows)]
    assert 0 < (~kept[1]).sum() == row["outliers"] < len(rows)
    assert row["outlier_ratio"] == RATIO
    on_all, _ = expected_on(path, site, train, pairs[0], rows, pairs[1])
    on_kept, frequency = expected_on(path, site, train[kept[0]], pairs[0][kept[0]], rows[kept[1]], pairs[1][kept[1]])
    assert torch.equal(frequencies["a"], frequency)
    sae, clean = JumpReLUSAE.load(path), language_model_loss(model, held_out)
    sae.impl = "reference"
    on_all["delta_loss"] = delta_loss(model, held_out, {site: sae})
    on_kept["delta_loss"] = delta_loss(model, held_out, {site: SparingOutliers(sae, most.item())})
    on_all["ablation_delta_loss"] = mean_ablation_loss(model, held_out, site, rows.double().mean(0)) - clean
    mean = rows[kept[1]].double().mean(0)
    on_kept["ablation_delta_loss"] = mean_ablation_loss(model, held_out, site, mean, max_norm=most.item()) - clean
    for figures in (on_all, on_kept):
        figures["loss_recovered"] = loss_recovered(figures["delta_loss"], figures["ablation_delta_loss"])
    assert on_kept["delta_loss"] != on_all["delta_loss"]
    expected = on_kept | {f"{name}_all": value for name, value in on_all.items()}
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    centred = rows[kept[1]].double() - mean
    assert row["gamma"] == pytest.approx((mean.norm() / centred.square().sum(1).mean().sqrt()).item())


def test_without_outliers_all_tokens_are_those_kept(tmp_path):
    (row,), _ = judged(tmp_path, max_norm_ratio=100)
    assert row["outliers"] == 0
    both = [name.removesuffix("_all") for name in row if name.endswith("_all")]
    assert "delta_loss" in both
    assert [row[name] for name in both] == [row[f"{name}_all"] for name in both]


def test_median_norms_given_decide_who_is_an_outlier(tmp_path):
    rows = harvest(gemma2(), tokens(4, 9, seed=2), SITES[:1])[SITES[0]]
    norm = rows.norm(dim=1).median().item()
    (row,), _ = judged(tmp_path, max_norm_ratio=1, median_norms={SITES[0]: norm})
    assert row["outliers"] == len(rows) // 2
    assert row["tokens"] == len(rows) - len(rows) // 2


def test_what_does_not_depend_on_the_sae_is_computed_once_a_site(tmp_path, monkeypatch):
    calls = dict.fromkeys(("fit_pca", "mean_ablation_loss", "language_model_loss", "pair_table_fvu"), 0)

    def counting(name, function):
        def counted(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return counted

    for name in calls:
        monkeypatch.setattr(suite, name, counting(name, getattr(suite, name)))
    saes = {str(seed): (SITES[0], saved(tmp_path, SITES[0], seed=seed)) for seed in range(3)}
    judged(tmp_path, saes=saes | {"other": (SITES[1], saved(tmp_path, SITES[1]))})
    assert calls == {"fit_pca": 2, "mean_ablation_loss": 2, "language_model_loss": 1, "pair_table_fvu": 2}


@pytest.mark.parametrize(
    ("max_bytes", "groups"),
    [(1, [["a"], ["b"], ["c"]]), (5, [["a", "b"], ["c"]]), (7, [["a", "b"], ["c"]]), (9, [["a", "b", "c"]])],
)
def test_groups_of_sites_fit_the_bytes(max_bytes, groups):
    assert list(suite._groups({"a": 2, "b": 3, "c": 4}, max_bytes)) == groups


def judged(tmp_path, **changes):
    arguments = {
        "model": gemma2(),
        "saes": {"a": (SITES[0], saved(tmp_path, SITES[0]))},
        "train_tokens": tokens(6, 9, seed=1),
        "held_out": tokens(4, 9, seed=2),
    }
    return judge_suite(**(arguments | changes))


def test_activations_can_be_given(tmp_path):
    train, held_out = (harvest(gemma2(), tokens(rows, 9, seed=seed), SITES[:1]) for rows, seed in ((6, 1), (4, 2)))
    expected, _ = judged(tmp_path)
    found, _ = judged(tmp_path, held_out_activations=held_out, activations=train)
    assert found == expected
    assert SITES[0] in train, "what is given is left as it is"


@pytest.mark.parametrize("ratio", [None, 1.05])
def test_losses_of_fewer_rows(tmp_path, ratio):
    """Those of the model alone; the mean that an ablation puts in is that of all held-out rows."""
    held_out = tokens(4, 9, seed=2)
    (expected,), _ = judged(tmp_path, max_norm_ratio=ratio)
    (found,), _ = judged(tmp_path, max_norm_ratio=ratio, loss_tokens=held_out[1:3])
    changed = {name for name in expected if found[name] != expected[name]}
    losses = {"delta_loss", "ablation_delta_loss", "loss_recovered"}
    assert changed == {"predictions", *losses, *(f"{name}_all" for name in losses if ratio)}
    if ratio is None:
        (path,) = tmp_path.rglob("params.npz")
        sae = JumpReLUSAE.load(path)
        mean = harvest(gemma2(), held_out, SITES[:1])[SITES[0]].mean(0)
        splice = evaluate_splice(gemma2(), held_out[1:3], SITES[0], sae, mean=mean)
        assert found["delta_loss"] == pytest.approx(splice.delta_loss, rel=1e-4)
        assert found["ablation_delta_loss"] == pytest.approx(splice.ablation_delta_loss, rel=1e-4)
        assert found["predictions"] == 2 * 7  # from neither BOS nor the last token


def test_what_is_undefined_is_none(tmp_path):
    """JSON has no NaN."""
    same = torch.ones(32, width(SITES[0]))
    (row,), _ = judged(tmp_path, held_out_activations={SITES[0]: same})
    assert row["fvu"] is row["median_fvu"] is row["pca_fvu"] is row["top_variance_share"] is None
    assert row["random_fvu"] is row["gamma"] is None
    assert row["tokens"] == 32


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"saes": {}}, ValueError, "saes: expected at least one, got none"),
        ({"saes": ["params.npz"]}, TypeError, "saes: expected a Mapping, got list"),
        ({"saes": {"a": "params.npz"}}, TypeError, r"saes\['a'\]: expected \(Site, path\), got 'params.npz'"),
        ({"saes": {"a": ("layer_0/att", "params.npz")}}, TypeError, r"saes\['a'\]: expected \(Site, path\), got "),
        ({"saes": {SITES[0]: (SITES[0], "params.npz")}}, TypeError, "saes: key: expected a str, got Site"),
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
        ({"max_norm_ratio": 0.5}, ValueError, "max_norm_ratio: expected a"),
        ({"median_norms": {}}, ValueError, "median_norms: expected one for each site of saes, found none for layer_0"),
        ({"median_norms": 3}, TypeError, "median_norms: expected a Mapping, got int"),
        (
            {"max_norm_ratio": 3, "median_norms": {SITES[0]: 1e-9}},
            ValueError,
            "median_norms: expected that of layer_0/att, got one that leaves none of held_out",
        ),
        ({"max_bytes": 0}, ValueError, "max_bytes: expected"),
        ({"dtype": "bf16"}, TypeError, "dtype: expected"),
        ({"train_tokens": [[1, 2]]}, TypeError, "train_tokens: expected an integer torch.Tensor, got list"),
        ({"loss_tokens": [[1, 2]]}, TypeError, "loss_tokens: expected an integer torch.Tensor, got list"),
        ({"held_out": torch.ones(9).long()}, ValueError, r"held_out: expected shape \[rows, context\], got \[9\]"),
        ({"on_done": 3}, TypeError, "on_done: expected a function, got int"),
        ({"clean_loss": "1"}, TypeError, "clean_loss: expected a number, got str"),
    ],
)
def test_refusals(tmp_path, changes, error, message):
    with pytest.raises(error, match=f"^{message}"):
        judged(tmp_path, **changes)
