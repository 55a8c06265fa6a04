"""The protocol against plain hooks and loops in fp64, against itself in parts, and where the answer is known."""

import math

import pytest
import torch

from gemmascope import JumpReLUSAE, TopKSAE, Transcoder
from gemmascope.evaluation import (
    SparingOutliers,
    delta_loss,
    judge_suite,
    language_model,
    language_model_loss,
    mean_ablation_loss,
)
from gemmascope.evaluation.bootstrap import Bootstrap
from gemmascope.evaluation.figures import Figures, added, plain
from gemmascope.evaluation.protocol import LOSSES, TERMS, Subject, measure
from gemmascope.evaluation.site_moments import SiteMoments, site_moments
from gemmascope.evaluation.token_sets import SETS, MarkedText
from gemmascope.sites import Site
from tests import tiny_models as tiny
from tests.evaluation import plain as by_hand

pytest.importorskip("transformers")

ATT, MLP, RESID = Site(1, "att"), Site(0, "mlp"), Site(1, "resid")
RATIO = 1.05  # of the tiny model's norms some are above so many times the median
BOS, EOS, PAD = tiny.BOS, tiny.EOS, tiny.PAD


def text_of(model, rows=4, length=11):
    """Rows of which one holds two documents, one an EOS, one padding; two documents go over two rows."""
    ids = tiny.tokens(rows, length, seed=2)
    ids[1, 5] = BOS
    ids[2, 3] = EOS
    ids[3, 8:] = PAD
    documents = torch.tensor([[4] * length, [4] * 5 + [7] * (length - 5), [7] * length, [9] * 8 + [-1] * (length - 8)])
    given = torch.where(torch.isin(ids, torch.tensor([BOS, EOS, PAD])), -1, documents)
    return MarkedText.of(model, ids, given), documents


@pytest.fixture(scope="module")
def model():
    return tiny.gemma2(dtype=torch.float64)


@pytest.fixture(scope="module")
def moments(model):
    text, _ = text_of(model)
    return site_moments(model, tiny.tokens(6, 9, seed=1), text, [ATT, MLP, RESID], RATIO)


def random_sae(site, seed=0, d_sae=20, threshold=0.5):
    generator = torch.Generator().manual_seed(seed)
    sae = JumpReLUSAE(
        tiny.width(site), d_sae, pre_encoder_bias=False, threshold_init=threshold, generator=generator
    ).double()
    with torch.no_grad():
        sae.b_dec.copy_(torch.randn(tiny.width(site), generator=generator, dtype=torch.float64) * 0.1)
        sae.b_enc.copy_(torch.randn(d_sae, generator=generator, dtype=torch.float64) * 0.1)
    return sae


def dense(sae, x):
    z = x @ sae.W_enc.detach() + sae.b_enc.detach()
    f = z * (z > sae.threshold.detach())
    return f, f @ sae.W_dec.detach() + sae.b_dec.detach()


def figures_of(sums, draws=20):
    return Figures(added([sums], sums["documents"]), Bootstrap(len(sums["documents"]), draws=draws))


# ---- tokens


def test_whose_document_a_token_is(model):
    text, documents = text_of(model)
    assert torch.equal(text.documents, documents)
    assert torch.equal(text.is_text, (documents >= 0) & (text.tokens > 2))
    assert text.is_scored[1].tolist() == [False, *[True] * 3, False, False, *[True] * 4]
    assert text.is_scored[2].tolist() == [False, True, False, False, *[True] * 6]
    assert not text.is_scored[3, 7:].any()


def test_documents_of_another_shape(model):
    with pytest.raises(ValueError, match=r"^documents: expected shape \[2, 9\], got \[2, 8\]"):
        MarkedText.of(model, tiny.tokens(), torch.zeros(2, 8, dtype=torch.int64))


def test_moments_of_a_site(model, moments):
    text, documents = text_of(model)
    for site in (ATT, MLP, RESID):
        x = by_hand.activation(model, site, text.tokens)
        train = by_hand.activation(model, site, tiny.tokens(6, 9, seed=1))[:, 1:]
        found = moments[site]
        assert found.median_norm == pytest.approx(train.norm(dim=-1).flatten().median().item(), rel=1e-6)
        assert found.max_norm == RATIO * found.median_norm
        for name, mask in by_hand.masks(x, text.tokens, documents, found.max_norm).items():
            assert found.tokens[name] == int(mask.sum())
            assert found.means[name] == pytest.approx(x[mask].mean(0), rel=1e-5, abs=1e-6)  # harvested in fp32
    assert moments[RESID].tokens["inliers"] < moments[RESID].tokens["text"] < moments[RESID].tokens["every"]


@pytest.mark.parametrize("forward_tokens", [1, 22])
def test_moments_are_the_same_in_any_batches(model, moments, forward_tokens, monkeypatch):
    """Of a row each, and of two; those of all rows at once are those of plain hooks."""
    text, _ = text_of(model)
    done = []
    monkeypatch.setattr("gemmascope.evaluation.site_moments.FORWARD_TOKENS", forward_tokens)
    found = site_moments(model, tiny.tokens(6, 9, seed=1), text, [ATT, RESID], RATIO, done.append)
    for site in (ATT, RESID):
        assert found[site].tokens == moments[site].tokens
        assert found[site].median_norm == pytest.approx(moments[site].median_norm, rel=1e-6)
        for name in SETS:
            assert found[site].means[name] == pytest.approx(moments[site].means[name], rel=1e-5, abs=1e-6)
    assert done[-1] == 6 + 4
    assert done == sorted(done)


def test_moments_go_through_a_file(moments):
    found = SiteMoments.from_tensors(moments[ATT].to_tensors())
    assert (found.tokens, found.median_norm, found.max_norm) == (
        moments[ATT].tokens,
        moments[ATT].median_norm,
        moments[ATT].max_norm,
    )
    assert all(torch.equal(found.means[name], moments[ATT].means[name]) for name in SETS)


def test_a_site_without_a_token_that_is_kept(model):
    text, _ = text_of(model)
    with pytest.raises(ValueError, match=r"^text: expected some tokens to be left at layer_1/resid, found none"):
        site_moments(model, tiny.tokens(6, 9, seed=1), text, [RESID], 1e-6)
    with pytest.raises(ValueError, match=r"^train_tokens: expected some that are not BOS"):
        site_moments(model, torch.full((2, 5), BOS), text, [RESID], RATIO)


# ---- every figure by hand


@pytest.mark.parametrize("site", [ATT, MLP, RESID], ids=str)
def test_sums_are_those_of_plain_hooks(model, moments, site):
    text, documents = text_of(model)
    ids, sae, facts = text.tokens, random_sae(site), moments[site]
    sums = measure(model, text, [Subject("a", site, site, sae)], moments)
    assert sums["documents"].tolist() == [4, 7, 9]
    x = by_hand.activation(model, site, ids)
    f, x_hat = dense(sae, x)
    masks = by_hand.masks(x, ids, documents, facts.max_norm)
    for index, name in enumerate(SETS):
        mean = facts.means[name]
        expected = torch.zeros(3, len(TERMS), dtype=torch.float64)
        for row, column in torch.nonzero(masks[name]).tolist():
            a, b = x[row, column], x_hat[row, column]
            error, spread = ((a - b) ** 2).sum(), ((a - mean) ** 2).sum()
            terms = {
                "tokens": 1.0,
                "l0": float((f[row, column] != 0).sum()),
                "error": error,
                "spread": spread,
                "about_zero": (a * a).sum(),
                "square": (b * b).sum(),
                "product": (a * b).sum(),
                "cosine": (a * b).sum() / (a.norm() * b.norm()),
                "norm_ratio": b.norm() / a.norm(),
                "explained": 1 - error / spread,
            }
            document = [4, 7, 9].index(int(documents[row, column]))
            expected[document] += torch.tensor([float(terms[term]) for term in TERMS], dtype=torch.float64)
        assert sums["a/tokens"][:, index] == pytest.approx(expected, rel=1e-12)
    fired = (f[masks["text"]] != 0).sum(0)
    assert sums["a/fired"].tolist() == fired.tolist()
    zero = torch.zeros(tiny.width(site), dtype=torch.float64)
    for index, name in enumerate(SETS):
        replaced = {"a/losses": x_hat, f"{site}/zero": zero, f"{site}/mean": facts.means[name]}
        for key, value in replaced.items():
            by_document = by_hand.losses_with(model, ids, documents, site, value, masks[name])
            clean = by_hand.losses(model, ids, documents, by_hand.run(model, ids), by_hand.run(model, ids))
            for document, number in enumerate((4, 7, 9)):
                count, loss, divergence = by_document[number]
                assert sums["clean"][document].tolist() == pytest.approx([count, clean[number][1]], rel=1e-12)
                found = dict(zip(LOSSES, sums[key][document, index].tolist(), strict=True))
                assert found["loss"] == pytest.approx(loss, rel=1e-11)
                assert found["divergence"] == pytest.approx(divergence, rel=1e-9, abs=1e-13)
    assert len({sums["a/losses"][:, index].sum().item() for index in range(3)}) == 3, "each set is spliced as it says"


@pytest.mark.parametrize("rows", [1, 3])
def test_how_many_logits_are_worked_on_at_a_time_changes_nothing(model, moments, rows, monkeypatch):
    text, _ = text_of(model)
    given = (model, text, [Subject("a", RESID, RESID, random_sae(RESID))], moments)
    whole = measure(*given)
    monkeypatch.setattr(language_model, "_CACHED_ELEMENTS", rows * tiny.VOCAB)
    pieces = measure(*given)
    assert pieces.keys() == whole.keys()
    assert all(torch.equal(pieces[name], whole[name]) for name in whole)


def test_figures_of_the_sums(model, moments):
    text, documents = text_of(model)
    sae = random_sae(RESID)
    sums = measure(model, text, [Subject("a", RESID, RESID, sae)], moments)
    found = figures_of(sums).of("a", RESID)
    x = by_hand.activation(model, RESID, text.tokens)
    f, x_hat = dense(sae, x)
    for suffix, name in (("", "text"), ("_inliers", "inliers"), ("_every", "every")):
        mask = by_hand.masks(x, text.tokens, documents, moments[RESID].max_norm)[name]
        a, b = x[mask], x_hat[mask]
        error, spread = ((a - b) ** 2).sum(1), ((a - moments[RESID].means[name]) ** 2).sum(1)
        expected = {
            "tokens": len(a),
            "l0": (f[mask] != 0).sum(1).double().mean().item(),
            "fvu": (error.sum() / spread.sum()).item(),
            "explained_variance": 1 - (error.sum() / spread.sum()).item(),
            "explained_variance_of_tokens": (1 - error / spread).mean().item(),
            "fvu_zero": (error.sum() / (a**2).sum()).item(),
            "cosine": torch.cosine_similarity(a, b).mean().item(),
            "norm_ratio": (b.norm(dim=1) / a.norm(dim=1)).mean().item(),
            "reconstruction_bias": ((b**2).sum() / (a * b).sum()).item(),
        }
        for key, value in expected.items():
            assert found[f"{key}{suffix}"] == pytest.approx(value, rel=1e-10), key
        low, high = found[f"fvu_interval{suffix}"]
        assert low <= expected["fvu"] <= high
    mask = by_hand.masks(x, text.tokens, documents, moments[RESID].max_norm)
    outlying = mask["text"] & ~mask["inliers"]
    error, square = ((x - x_hat) ** 2).sum(-1), (x**2).sum(-1)
    assert found["outliers"] == int(outlying.sum()) > 0
    for key, each in (("outlier_error_share", error), ("outlier_square_share", square)):
        assert found[key] == pytest.approx((each[outlying].sum() / each[mask["text"]].sum()).item(), rel=1e-10)
    frequency = (f[mask["text"]] != 0).double().mean(0)
    assert figures_of(sums).frequency("a") == pytest.approx(frequency.float())
    assert found["dead_fraction"] == (frequency == 0).double().mean().item()
    assert found["high_freq_fraction"] == (frequency > 0.1).double().mean().item()
    histogram = found["frequency_histogram"]
    assert sum(histogram["latents"]) + histogram["never"] == sae.d_sae
    edges = torch.tensor(histogram["log10_edges"], dtype=torch.float64)
    for index, count in enumerate(histogram["latents"]):
        exponents = frequency[frequency > 0].log10().clamp(max=-1e-12)
        assert count == int(((exponents >= edges[index]) & (exponents < edges[index + 1])).sum())


def test_losses_of_the_sums(model, moments):
    """The sums of each document, which plain hooks confirm, and each figure by its formula."""
    text, _ = text_of(model)
    sums = measure(model, text, [Subject("a", RESID, RESID, random_sae(RESID))], moments)
    sums["clean"][:, 1] -= 5 * sums["clean"][:, 0]  # a better model, which every ablation hurts
    found = figures_of(sums).of("a", RESID)
    n, clean = sums["clean"].T
    assert found["predictions"] == n.sum() == int(text.is_scored.sum())
    assert found["documents"] == 3
    for index, suffix in enumerate(("", "_inliers", "_every")):
        rises = {
            name: (sums[key][:, index, 0] - clean)
            for name, key in (("sae", "a/losses"), ("mean", f"{RESID}/mean"), ("zero", f"{RESID}/zero"))
        }
        mean = {name: (each.sum() / n.sum()).item() for name, each in rises.items()}
        assert found[f"delta_loss{suffix}"] == pytest.approx(mean["sae"], rel=1e-12)
        assert found[f"ablation_delta_loss{suffix}"] == pytest.approx(mean["mean"], rel=1e-12)
        assert found[f"zero_ablation_delta_loss{suffix}"] == pytest.approx(mean["zero"], rel=1e-12)
        for key, ablated in (("loss_recovered", "mean"), ("loss_recovered_from_zero", "zero")):
            assert found[f"{key}{suffix}"] == pytest.approx(1 - mean["sae"] / mean[ablated], rel=1e-9)
        assert mean["mean"] != mean["zero"]
        kl = (sums["a/losses"][:, index, 1].sum() / n.sum()).item()
        assert found[f"kl{suffix}"] == pytest.approx(kl, rel=1e-12)
        assert kl > 0
        assert found[f"delta_loss_interval{suffix}"] == Bootstrap(3, draws=20).ratio(rises["sae"], n)
        tokens = sums["a/tokens"][:, index]
        for key, term in (("l0", "l0"), ("fvu", "error")):
            below = tokens[:, TERMS.index("tokens" if key == "l0" else "spread")]
            interval = Bootstrap(3, draws=20).ratio(tokens[:, TERMS.index(term)], below)
            assert found[f"{key}_interval{suffix}"] == interval


def transcoder_tensors() -> dict[str, torch.Tensor]:
    """Of one with a skip connection, as wide as the tiny model: fp64."""
    generator = torch.Generator().manual_seed(3)
    tensors = {
        "W_enc": torch.randn(tiny.WIDTH, 12, generator=generator),
        "W_dec": torch.randn(12, tiny.WIDTH, generator=generator) * 0.3,
        "b_enc": torch.randn(12, generator=generator),
        "b_dec": torch.randn(tiny.WIDTH, generator=generator) * 0.1,
        "threshold": torch.full((12,), 0.5),
        "W_skip": torch.randn(tiny.WIDTH, tiny.WIDTH, generator=generator) * 0.1,
    }
    return {key: tensor.double() for key, tensor in tensors.items()}


def test_a_transcoder_is_judged_on_what_it_writes(model):
    text, documents = text_of(model)
    reads, writes = Site(0, "mlp_in"), MLP
    wide = transcoder_tensors()
    transcoder = Transcoder(wide, metadata={"site": reads.name})
    facts = site_moments(model, tiny.tokens(6, 9, seed=1), text, [writes], 5.0)
    sums = measure(model, text, [Subject("t", reads, writes, transcoder)], facts)
    found = figures_of(sums).of("t", writes)
    x, y = (by_hand.activation(model, site, text.tokens) for site in (reads, writes))
    z = x @ wide["W_enc"] + wide["b_enc"]
    f = z * (z > 0.5)
    y_hat = f @ wide["W_dec"] + wide["b_dec"] + x @ wide["W_skip"].T
    mask = by_hand.masks(y, text.tokens, documents, math.inf)["text"]
    assert found["l0"] == pytest.approx((f[mask] != 0).sum(1).double().mean().item())
    spread = ((y[mask] - facts[writes].means["text"]) ** 2).sum()
    assert found["fvu"] == pytest.approx((((y - y_hat)[mask] ** 2).sum() / spread).item(), rel=1e-10)
    assert found["delta_loss"] == pytest.approx(delta_loss(model, text.tokens, {writes: transcoder}), rel=1e-9)
    by_document = by_hand.losses_with(model, text.tokens, documents, writes, y_hat, mask)
    assert sums["t/losses"][:, 0, 0].tolist() == pytest.approx([by_document[n][1] for n in (4, 7, 9)], rel=1e-11)


# ---- where the answer is known


def constant(site, value):
    sae = random_sae(site, threshold=1e30)
    with torch.no_grad():
        sae.b_dec.copy_(value)
    return sae


def identity(site):
    """x = relu(x) − relu(−x)."""
    width = tiny.width(site)
    sae = JumpReLUSAE(width, 2 * width, pre_encoder_bias=False, threshold_init=1.0).double()
    eye = torch.eye(width, dtype=torch.float64)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([eye, -eye], 1))
        sae.W_dec.copy_(torch.cat([eye, -eye]))
        sae.threshold.zero_()
    return sae


@pytest.mark.parametrize("site", [ATT, MLP, RESID], ids=str)
def test_the_mean_has_fvu_1_and_costs_what_mean_ablation_costs(model, moments, site):
    text, _ = text_of(model)
    sums = measure(model, text, [Subject("a", site, site, constant(site, moments[site].means["text"]))], moments)
    found = figures_of(sums).of("a", site)
    assert found["fvu"] == pytest.approx(1, rel=1e-12)
    assert found["explained_variance_of_tokens"] == pytest.approx(0, abs=1e-12)
    assert found["l0"] == 0
    assert found["dead_fraction"] == 1
    assert torch.equal(sums["a/losses"][:, 0], sums[f"{site}/mean"][:, 0])
    if found["ablation_delta_loss"] > 0:
        assert found["loss_recovered"] == 0


@pytest.mark.parametrize("site", [ATT, MLP, RESID], ids=str)
def test_the_identity_costs_nothing(model, moments, site):
    text, _ = text_of(model)
    sums = measure(model, text, [Subject("a", site, site, identity(site))], moments)
    found = figures_of(sums).of("a", site)
    assert found["fvu"] == found["delta_loss"] == found["kl"] == found["delta_loss_every"] == 0
    assert found["cosine"] == pytest.approx(1)
    assert found["norm_ratio"] == found["reconstruction_bias"] == pytest.approx(1)
    assert found["loss_recovered"] == (1 if found["ablation_delta_loss"] > 0 else None)


@pytest.mark.parametrize("site", [ATT, MLP, RESID], ids=str)
def test_zero_costs_what_zero_ablation_costs(model, moments, site):
    text, _ = text_of(model)
    sums = measure(model, text, [Subject("a", site, site, constant(site, 0.0))], moments)
    assert torch.equal(sums["a/losses"], sums[f"{site}/zero"])
    found = figures_of(sums).of("a", site)
    assert found["fvu_zero"] == 1
    assert found["cosine"] == found["norm_ratio"] == 0
    assert math.isnan(found["reconstruction_bias"])
    assert plain(found)["reconstruction_bias"] is None


def test_a_text_of_one_token_is_explained_by_itself():
    """Nothing is to be explained, and nothing is wrong; FVU has no value."""
    model = tiny.gemma2()  # the mean is that of activations in fp32
    text = MarkedText.of(model, torch.tensor([[BOS, 7]]), torch.tensor([[-1, 0]]))
    facts = site_moments(model, tiny.tokens(6, 9, seed=1), text, [RESID], 1e6)
    sums = measure(model, text, [Subject("a", RESID, RESID, identity(RESID).float())], facts)
    found = figures_of(sums).of("a", RESID)
    assert found["explained_variance_of_tokens"] == 1
    assert math.isnan(found["fvu"])


# ---- one forward for all


def subjects():
    topk = TopKSAE(tiny.WIDTH, 18, 3, generator=torch.Generator().manual_seed(5)).double()
    return [
        Subject("a", RESID, RESID, random_sae(RESID)),
        Subject("b", ATT, ATT, random_sae(ATT, 1)),
        Subject("c", RESID, RESID, random_sae(RESID, 2, 30)),
        Subject("d", RESID, RESID, topk),
    ]


def test_shared_passes_give_what_separate_ones_give(model, moments):
    text, _ = text_of(model)
    together = measure(model, text, subjects(), moments)
    for subject in subjects():
        alone = measure(model, text, [subject], moments)
        assert {name.partition("/")[0] for name in alone} < {name.partition("/")[0] for name in together}
        for name, values in alone.items():
            assert torch.equal(values, together[name]), name


def test_the_model_runs_once_as_it_is_and_once_for_each_replacement(model, moments, monkeypatch):
    text, _ = text_of(model)
    calls = []
    handle = model.register_forward_hook(lambda *args: calls.append(1))
    try:
        measure(model, text, subjects(), moments)
        assert len(calls) == 1 + 3 * (2 * 2 + 4)  # sets · (ablations · sites + SAEs)
        calls.clear()
        far = {
            site: SiteMoments(each.means | {"inliers": each.means["text"]}, each.tokens, 1.0, 1e9)
            for site, each in moments.items()
        }
        measure(model, text, subjects(), far, ablations=[RESID])
        assert len(calls) == 1 + 2 * (2 * 1 + 4), "without outliers two of the sets are one"
    finally:
        handle.remove()


def test_sets_that_are_one_in_a_batch_may_have_means_of_their_own(model, moments):
    """Of the whole text the outliers are somewhere else."""
    text, documents = text_of(model)
    mean = moments[RESID].means["inliers"]
    facts = SiteMoments(moments[RESID].means | {"inliers": mean + 1}, moments[RESID].tokens, 1.0, 1e9)
    sums = measure(model, text, [Subject("a", RESID, RESID, random_sae(RESID))], {RESID: facts})
    assert torch.equal(sums["a/losses"][:, 0], sums["a/losses"][:, 1])
    expected = by_hand.losses_with(model, text.tokens, documents, RESID, mean + 1, text.is_text)
    assert sums[f"{RESID}/mean"][:, 1, 0].tolist() == pytest.approx([expected[n][1] for n in (4, 7, 9)], rel=1e-11)


def test_an_sae_may_be_called_like_a_site(model, moments):
    text, _ = text_of(model)
    plain_name, like_site = (
        measure(model, text, [Subject(name, RESID, RESID, random_sae(RESID))], moments) for name in ("a", str(RESID))
    )
    for key in ("tokens", "losses", "fired"):
        assert torch.equal(plain_name[f"a/{key}"], like_site[f"{RESID}/{key}"])
    assert torch.equal(plain_name[f"{RESID}/zero"], like_site[f"{RESID}/zero"])


@pytest.mark.parametrize("make", [tiny.gemma2, tiny.gemma3, tiny.gemma3_multimodal])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("site", [Site(0, "resid"), Site(2, "att"), Site(2, "resid")], ids=str)
def test_any_gemma_in_any_precision(make, dtype, site):
    """The layers before the site are not run again, and what comes out is the same as if they were."""
    model = make(dtype=dtype)
    text, _ = text_of(model)
    facts = site_moments(model, tiny.tokens(6, 9, seed=1), text, [site], 5.0)
    sae = random_sae(site).float()
    sums = measure(model, text, [Subject("a", site, site, sae)], facts)
    found = figures_of(sums).of("a", site)
    clean = language_model_loss(model, text.tokens)
    mean = mean_ablation_loss(model, text.tokens, site, facts[site].means["text"].float()) - clean
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    assert found["delta_loss"] == pytest.approx(delta_loss(model, text.tokens, {site: sae}), abs=tolerance)
    assert found["ablation_delta_loss"] == pytest.approx(mean, abs=tolerance)
    assert 0 < found["fvu"] < 100


def test_blocks_add_up(model, moments):
    text, _ = text_of(model)
    whole = added([measure(model, text, subjects(), moments)], text.documents)
    parts = [measure(model, text.rows(rows), subjects(), moments) for rows in (slice(0, 1), slice(1, 3), slice(3, 4))]
    assert [part["documents"].tolist() for part in parts] == [[4], [4, 7], [9]]
    together = added(iter(parts), text.documents)
    assert together.keys() == whole.keys()
    for name, values in together.items():
        assert values == pytest.approx(whole[name], rel=1e-9, abs=1e-12), name


def test_the_model_is_left_as_it_was(model, moments):
    text, _ = text_of(model)
    model.train()
    try:
        measure(model, text, subjects()[:1], moments)
        assert model.training
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    finally:
        model.eval()


# ---- beside the judgement of a suite


def test_figures_are_those_of_judge_suite(tmp_path):
    """Of text alone and, where it leaves outliers out, of the inliers, with the same median norm."""
    model, train, held_out = tiny.gemma2(), tiny.tokens(6, 9, seed=1), tiny.tokens(4, 9, seed=2)
    sae = JumpReLUSAE(
        tiny.WIDTH, 20, pre_encoder_bias=False, threshold_init=0.5, generator=torch.Generator().manual_seed(0)
    )
    sae.save(tmp_path / "params.npz")
    documents = torch.where(held_out == BOS, -1, 0)
    text = MarkedText.of(model, held_out, documents)
    facts = site_moments(model, train, text, [RESID], RATIO)
    sums = measure(model, text, [Subject("a", RESID, RESID, sae)], facts)
    figures = figures_of(sums)
    found = figures.of("a", RESID) | figures.gamma("a", facts[RESID].means)
    saes = {"a": (RESID, tmp_path / "params.npz")}
    medians = {RESID: facts[RESID].median_norm}
    (row,), _ = judge_suite(model, saes, train, held_out, max_norm_ratio=RATIO, median_norms=medians)
    _, frequencies = judge_suite(model, saes, train, held_out)
    assert figures.frequency("a") == pytest.approx(frequencies["a"])
    assert row["outliers"] == found["outliers"] > 0
    for suffix, theirs in (("", "_all"), ("_inliers", "")):
        keys = ("tokens", "l0", "fvu", "reconstruction_bias", "delta_loss", "ablation_delta_loss", "loss_recovered")
        for key in keys:
            expected = row[f"{key}{theirs}"]
            close = expected if expected is None else pytest.approx(expected, rel=1e-4, abs=1e-6)
            assert found[f"{key}{suffix}"] == close, key
    assert found["gamma_inliers"] == pytest.approx(row["gamma"], rel=1e-6)
    assert found["dead_fraction"] == row["dead_fraction_all"]
    clean = language_model_loss(model, held_out)
    assert figures.clean_loss == pytest.approx(clean, rel=1e-6)
    spared = SparingOutliers(sae, facts[RESID].max_norm)
    assert found["delta_loss_inliers"] == pytest.approx(delta_loss(model, held_out, {RESID: spared}), rel=1e-4)
    everywhere = delta_loss(model, held_out, {RESID: sae})
    assert found["delta_loss"] == pytest.approx(everywhere, rel=1e-4)
    mean = mean_ablation_loss(model, held_out, RESID, facts[RESID].means["text"]) - clean
    assert found["ablation_delta_loss"] == pytest.approx(mean, rel=1e-4, abs=1e-6)
