"""Controls fitted on one text and judged on another, against the same sums on activations from plain hooks."""

import pytest
import torch

from gemmascope.evaluation.baselines import pair_table_fvu, random_dictionary_fvu
from gemmascope.evaluation.controls import ControlTokens, controls
from gemmascope.evaluation.site_moments import SiteMoments
from gemmascope.evaluation.token_sets import SETS
from gemmascope.sites import Site
from tests import tiny_models as tiny
from tests.evaluation import plain as by_hand

pytest.importorskip("transformers")

READS, WRITES = Site(0, "mlp_in"), Site(0, "mlp")
SAES = {"a": (2.6, 20), "b": (4.4, 24)}
ROWS = (8, 6)


@pytest.fixture(scope="module")
def model():
    return tiny.gemma2(dtype=torch.float64)


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    train, held_out = tiny.tokens(ROWS[0], 9, seed=1), tiny.tokens(ROWS[1], 9, seed=2)
    train[2, 4], held_out[1, 3] = tiny.EOS, tiny.EOS
    return train, held_out


def at(model, site: Site, ids: torch.Tensor) -> torch.Tensor:
    """Of the tokens that are not special, in fp32 as they are held."""
    return by_hand.activation(model, site, ids)[ids > 2].float()


def pairs_of(ids: torch.Tensor) -> torch.Tensor:
    before = torch.cat([torch.full_like(ids[:, :1], tiny.VOCAB), ids[:, :-1]], 1)
    return torch.stack([before, ids], -1)[ids > 2]


def moments(max_norm: float, median: float = 0.0) -> SiteMoments:
    return SiteMoments({name: torch.zeros(tiny.WIDTH) for name in SETS}, dict.fromkeys(SETS, 1), median, max_norm)


def pca_fvu(train, rows, rank):
    """By the singular vectors of the fit's own tokens."""
    train, rows = train.double(), rows.double()
    V = torch.linalg.svd(train - train.mean(0)).Vh[:rank].T
    left = (rows - train.mean(0)) - (rows - train.mean(0)) @ V @ V.T
    return (left.square().sum() / (rows - rows.mean(0)).square().sum()).item()


def linear_fvu(train_x, train_y, x, y):
    with_one = [torch.cat([each.double(), torch.ones(len(each), 1, dtype=torch.float64)], 1) for each in (train_x, x)]
    weight = torch.linalg.lstsq(with_one[0], train_y.double()).solution
    left = with_one[1] @ weight - y.double()
    return (left.square().sum() / (y.double() - y.double().mean(0)).square().sum()).item()


def bound_between(*norms: torch.Tensor) -> float:
    """A norm that some tokens of every text are above."""
    low = min(each.max() for each in norms)
    ordered = torch.cat(norms).sort().values
    below = ordered[ordered < low]
    return ((below[-3] + below[-2]) / 2).item()


def test_an_sae(model):
    """Fitted on the one text, judged on the other; among the inliers both without the outliers."""
    train, held_out = texts()
    site = Site(1, "resid")
    x, y = (at(model, site, ids) for ids in (train, held_out))
    bound = bound_between(x.norm(dim=1), y.norm(dim=1))
    tokens = ControlTokens(model, train, held_out, [site])
    found = controls(tokens, site, site, SAES, moments(bound))
    everything = [torch.ones(len(each), dtype=torch.bool) for each in (x, y)]
    inliers = [each.norm(dim=1) <= bound for each in (x, y)]
    assert all(0 < int((~mask).sum()) < len(mask) // 2 for mask in inliers)
    for suffix, (train_kept, kept) in (("", everything), ("_inliers", inliers)):
        a, b = x[train_kept], y[kept]
        table = pair_table_fvu(a, pairs_of(train)[train_kept], b, pairs_of(held_out)[kept])
        for name, (rank, d_sae) in {"a": (3, 20), "b": (4, 24)}.items():
            of = found[name]
            assert of[f"pca_fvu{suffix}"] == pytest.approx(pca_fvu(a, b, rank), rel=1e-6)
            expected = random_dictionary_fvu(a, b, rank, d_sae)
            assert of[f"random_fvu{suffix}"] == pytest.approx(expected, rel=1e-6)
            assert of[f"pair_table_fvu{suffix}"] == pytest.approx(table, rel=1e-6)
            assert of[f"control_tokens{suffix}"] == len(b)
            assert f"linear_fvu{suffix}" not in of
    assert found["a"]["pca_fvu"] != found["b"]["pca_fvu"]


def test_a_transcoder(model):
    """It is judged where it writes; what is an outlier is one there."""
    train, held_out = texts()
    read, written = ([at(model, site, ids) for ids in (train, held_out)] for site in (READS, WRITES))
    bound = bound_between(*(each.norm(dim=1) for each in written))
    found = controls(ControlTokens(model, train, held_out, [READS, WRITES]), READS, WRITES, SAES, moments(bound))["a"]
    kept = [each.norm(dim=1) <= bound for each in written]
    assert any(not torch.equal(mask, each.norm(dim=1) <= bound) for mask, each in zip(kept, read, strict=True))
    assert found["linear_fvu"] == pytest.approx(linear_fvu(read[0], written[0], read[1], written[1]), rel=1e-4)
    few = [each[mask] for both in (read, written) for each, mask in zip(both, kept, strict=True)]
    assert found["linear_fvu_inliers"] == pytest.approx(linear_fvu(few[0], few[2], few[1], few[3]), rel=1e-4)
    assert found["pca_fvu_inliers"] == pytest.approx(pca_fvu(few[2], few[3], 3), rel=1e-6)
    assert found["random_fvu"] is None
    assert found["control_tokens_inliers"] == len(few[3]) < found["control_tokens"]


def test_outliers_of_the_fit_alone(model):
    """They are left out of it, though none is judged; without any in both texts the figures are the same."""
    train, held_out = texts()
    site = Site(1, "resid")
    x, y = (at(model, site, ids) for ids in (train, held_out))
    if x.norm(dim=1).max() < y.norm(dim=1).max():
        train, held_out, x, y = held_out, train, y, x
    highest = y.norm(dim=1).max().item()
    tokens = ControlTokens(model, train, held_out, [site])
    found = controls(tokens, site, site, SAES, moments(highest + 1e-4))["a"]
    kept = x.norm(dim=1) <= highest
    assert not kept.all()
    assert found["pca_fvu_inliers"] == pytest.approx(pca_fvu(x[kept], y, 3), rel=1e-6)
    assert found["pca_fvu_inliers"] != found["pca_fvu"]
    without = controls(tokens, site, site, SAES, moments(1e9))["a"]
    assert all(without[f"{name}_inliers"] == without[name] for name in ("pca_fvu", "random_fvu", "pair_table_fvu"))
