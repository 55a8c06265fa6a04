"""Whether an SAE fits, on activations whose dictionary is known: figures, where, at which scale, BOS, rounding."""

import json
import math

import pytest
import torch

from gemmascope.evaluation import compare_beginnings, diagnose, measure_fit, measure_rounding, survey
from gemmascope.evaluation.diagnosis import Diagnosis, Finding
from gemmascope.evaluation.fit import SURVEY_TOKENS, Beginnings, Rounding, coarse_dtype
from gemmascope.saes import JumpReLUSAE
from gemmascope.sites import Site

WIDTH, LATENTS, ACTIVE = 32, 16, 4
HERE, NEXT, BESIDE = Site(1, "resid"), Site(2, "resid"), Site(1, "mlp")


def dictionary(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal rows [16, 32], and a mean of norm 3 that is orthogonal to them."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q
    return rows[:LATENTS].contiguous(), 3 * rows[LATENTS]


def activations(seed: int, n: int = SURVEY_TOKENS, draw: int = 0) -> torch.Tensor:
    """Sums of about 4 rows of a dictionary and its mean, with some noise."""
    generator = torch.Generator().manual_seed(1000 * seed + draw)
    rows, mean = dictionary(seed)
    fires = torch.rand(n, LATENTS, generator=generator) < ACTIVE / LATENTS
    f = fires * (0.5 + torch.rand(n, LATENTS, generator=generator))
    return f @ rows + mean + 0.02 * torch.randn(n, WIDTH, generator=generator)


def fitting(seed: int, factor: float = 1.0) -> JumpReLUSAE:
    """The SAE of that dictionary, or the one that fits the activations times ``factor``."""
    sae, (rows, mean) = JumpReLUSAE(WIDTH, LATENTS, pre_encoder_bias=False), dictionary(seed)
    with torch.no_grad():
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows.T)
        sae.b_dec.copy_(factor * mean)
        sae.threshold.fill_(0.25 * factor)
    return sae


@pytest.fixture
def sae():
    return fitting(1)


@pytest.fixture
def by_site():
    return {HERE: activations(1), NEXT: activations(2), BESIDE: activations(3)}


def finding(diagnosis: Diagnosis, name: str) -> Finding:
    [found] = [each for each in diagnosis.findings if each.name == name]
    return found


# ---- figures


def test_both_conventions_by_their_formulas(sae, by_site):
    x = by_site[HERE].double()
    error = (x - sae(by_site[HERE]).double().detach()).square().sum()
    fit = measure_fit(sae, by_site[HERE])
    assert fit.fvu == pytest.approx((error / (x - x.mean(0)).square().sum()).item(), rel=1e-6)
    assert fit.fvu_zero == pytest.approx((error / x.square().sum()).item(), rel=1e-6)
    assert fit.fvu_zero < 0.7 * fit.fvu
    assert fit.explained_variance == 1 - fit.fvu
    assert fit.explained_variance_zero == 1 - fit.fvu_zero
    assert fit.l0 == pytest.approx(ACTIVE, rel=0.05)
    assert fit.tokens == SURVEY_TOKENS


def test_the_mean_is_worth_nothing_about_the_mean_and_much_about_zero(by_site):
    sae, x = fitting(1), by_site[HERE]
    with torch.no_grad():
        sae.threshold.fill_(1e3)
        sae.b_dec.copy_(x.mean(0))
    fit = measure_fit(sae, x)
    assert fit.fvu == pytest.approx(1, abs=1e-6)
    assert fit.fvu_zero == pytest.approx(((x - x.mean(0)).square().sum() / x.square().sum()).item(), rel=1e-5)
    assert fit.fvu_zero < 0.5
    assert fit.l0 == 0


@pytest.mark.parametrize("factor", [0.03, 1.0, 40.0])
def test_a_factor_is_put_on_the_input_and_taken_off_the_output(by_site, factor):
    """Also with an SAE that has the dense code alone."""

    class Dense:
        def __init__(self, sae):
            self.W_dec, self.d_model, self.d_sae = sae.W_dec, sae.d_model, sae.d_sae
            self.encode, self.decode = sae.encode, sae.decode

        def __call__(self, x):
            return self.decode(self.encode(x))

    expected = measure_fit(fitting(1), by_site[HERE])
    for sae in (fitting(1, factor), Dense(fitting(1, factor))):
        found = measure_fit(sae, by_site[HERE], factor)
        assert found.l0 == pytest.approx(expected.l0, rel=1e-2)
        assert found.fvu == pytest.approx(expected.fvu, rel=1e-2)


def test_activations_that_do_not_vary_have_no_figures(sae):
    fit = measure_fit(sae, dictionary(1)[1].expand(8, WIDTH))
    assert math.isnan(fit.fvu)
    assert math.isnan(fit.fvu_zero)


@pytest.mark.parametrize("factor", [0, -1.0, math.nan, math.inf, "1", True])
def test_a_factor_that_is_none(sae, by_site, factor):
    with pytest.raises((TypeError, ValueError), match="factor: expected"):
        measure_fit(sae, by_site[HERE], factor)


# ---- where, and at which scale


@pytest.mark.parametrize("stated", [HERE, "layer_1/resid", None])
def test_an_sae_where_it_belongs(sae, by_site, stated):
    found = survey(sae, by_site, stated)
    assert found.best == (HERE, 1.0)
    assert found.site == HERE == found.ranking[0]
    assert found.fits[HERE].fvu == found.best_fit.fvu < 0.05
    assert min(found.fits[site].fvu for site in (NEXT, BESIDE)) > 0.5


@pytest.mark.parametrize("stated", [NEXT, BESIDE])
def test_an_sae_of_another_site(sae, by_site, stated):
    found = survey(sae, by_site, stated)
    assert (found.site, found.best) == (stated, (HERE, 1.0))


@pytest.mark.parametrize("stated", [HERE, None])
@pytest.mark.parametrize("factor", [1e-4, 1 / 30, 0.7, 1.5, 5.7, 3e4])
def test_another_scale_is_found(by_site, factor, stated):
    found = survey(fitting(1, factor), by_site, stated)
    assert found.best[0] == found.site == HERE
    assert found.best[1] == pytest.approx(factor, rel=0.25)
    assert found.best_fit.fvu < 0.1 < found.fits[HERE].fvu


def test_more_latents_are_no_reason_for_another_scale(by_site):
    """One whose thresholds leave out what would fire at a larger scale: less FVU there, and more latents."""
    sae, given = fitting(1), {HERE: by_site[HERE] - dictionary(1)[1]}
    with torch.no_grad():
        sae.b_dec.zero_()
        sae.threshold.fill_(1.2)
    l0 = measure_fit(sae, given[HERE]).l0
    found = survey(sae, given, HERE)
    assert found.best[1] > 1
    assert found.best_fit.l0 > 2 * l0
    assert survey(sae, given, HERE, average_l0=l0).best == (HERE, 1.0)


def test_more_tokens_at_one_site_than_at_others(sae, by_site):
    found = survey(sae, by_site | {HERE: torch.cat([by_site[HERE], activations(2, 4096)])})
    assert found.fits[HERE].tokens == found.fits[NEXT].tokens == SURVEY_TOKENS
    assert found.best == (HERE, 1.0)


@pytest.mark.parametrize(
    ("given", "options", "error", "message"),
    [
        ({}, {}, ValueError, "activations: expected those of at least one site, got none"),
        ([], {}, TypeError, "activations: expected"),
        ({"layer_1/out": activations(1)}, {}, ValueError, "site: expected layer_L/KIND"),
        ({HERE: activations(1)}, {"site": NEXT}, ValueError, "site: expected one of layer_1/resid, got layer_2/resid"),
        ({HERE: activations(1)}, {"average_l0": 0}, ValueError, "average_l0: expected"),
        ({HERE: activations(1)[:, :8]}, {}, ValueError, r"activations\[layer_1/resid\]: expected shape"),
        ({HERE: activations(1)[:0]}, {}, ValueError, r"activations\[layer_1/resid\]: expected at least one row"),
        ({HERE: activations(1) * math.nan}, {}, ValueError, "expected finite values, found NaN or Inf"),
    ],
)
def test_what_a_survey_refuses(sae, given, options, error, message):
    with pytest.raises(error, match=message):
        survey(sae, given, **options)


# ---- how a text begins


def beginnings(seed: int, rows: int = 64, off: float = 0.0) -> torch.Tensor:
    x = activations(seed, rows * 8, draw=7).view(rows, 8, WIDTH)
    x[:, 0] += off * dictionary(9)[0][0]
    return x


def test_where_a_bos_helps_and_where_it_does_not(sae):
    plain, disturbed = beginnings(1), beginnings(1, off=2.0)
    helps = compare_beginnings(sae, plain, disturbed)
    assert helps.rows == 64
    assert helps.fvu_without > 3 * helps.fvu_with
    assert helps.t > 8
    harms = compare_beginnings(sae, disturbed, plain)
    assert (harms.fvu_with, harms.fvu_without, harms.t) == (helps.fvu_without, helps.fvu_with, -helps.t)
    assert compare_beginnings(sae, plain, plain).t == 0
    scaled = compare_beginnings(fitting(1, 8.0), plain, disturbed, 8.0)
    assert scaled.fvu_without == pytest.approx(helps.fvu_without, rel=1e-3)


def test_beginnings_that_do_not_vary_decide_nothing(sae, by_site):
    """FVU is NaN there, and so is t: no word of a BOS that is missing."""
    alike = dictionary(1)[1].expand(4, 8, WIDTH)
    for with_bos, without in ((alike, beginnings(1, 4)), (beginnings(1, 4), alike)):
        found = compare_beginnings(sae, with_bos, without)
        assert math.isnan(found.t)
        for bos in (True, False):
            line = finding(diagnosed(sae, by_site, bos=bos, beginnings=found), "bos")
            assert (line.status, line.text[:34]) == ("note", "cannot be told without figures: in")


def test_a_rise_without_any_spread_is_certain(sae):
    """Every text is the same one."""
    one, off = (beginnings(1, 1, off).expand(4, 8, WIDTH) for off in (0.0, 2.0))
    assert compare_beginnings(sae, one, off).t == math.inf
    assert compare_beginnings(sae, off, one).t == -math.inf


def test_chance_decides_nothing(sae):
    """The same in distribution and not the same texts: t is that of noise."""
    other = activations(1, 64 * 8, draw=8).view(64, 8, WIDTH)
    assert abs(compare_beginnings(sae, beginnings(1), other).t) < 3


@pytest.mark.parametrize(
    ("with_bos", "without", "message"),
    [
        (torch.ones(4, 8, 3), torch.ones(4, 8, 3), r"with_bos: expected shape \[rows, tokens, 32\]"),
        (torch.ones(4, 8, WIDTH), torch.ones(4, 7, WIDTH), r"without_bos: expected shape \[4, 8, 32\]"),
        (torch.ones(1, 8, WIDTH), torch.ones(1, 8, WIDTH), "with_bos: expected at least 2 rows, got 1"),
    ],
)
def test_beginnings_that_do_not_match(sae, with_bos, without, message):
    with pytest.raises(ValueError, match=message):
        compare_beginnings(sae, with_bos, without)


# ---- rounding


def test_the_cost_of_rounding(sae, by_site):
    x = by_site[HERE]
    rounded = x.bfloat16().float()
    found = measure_rounding(sae, rounded, x)
    exact = x.double()
    share = (exact - rounded.double()).square().sum() / (exact - exact.mean(0)).square().sum()
    assert found.share == pytest.approx(share.item(), rel=1e-9)
    assert 0 < found.share < 1e-4
    assert found.fvu == measure_fit(sae, rounded).fvu
    assert found.fvu_exact == measure_fit(sae, x).fvu
    with pytest.raises(ValueError, match="exact: expected shape"):
        measure_rounding(sae, rounded, x[1:])


def test_what_values_were_rounded_to(by_site):
    x = by_site[HERE]
    assert coarse_dtype(x) is None
    assert coarse_dtype(x.bfloat16().float()) == coarse_dtype(x.bfloat16()) == torch.bfloat16
    assert coarse_dtype(x.half().float()) == torch.float16
    assert coarse_dtype(x.bfloat16().double()) == torch.bfloat16
    assert coarse_dtype(torch.ones(8, 8)) is None  # too few values to tell
    assert coarse_dtype(torch.cat([x.bfloat16().float(), x[:1]])) is None
    with pytest.raises(TypeError, match="values: expected a floating dtype"):
        coarse_dtype(torch.ones(3, dtype=torch.int64))


# ---- in words


def diagnosed(sae, by_site, stated: Site | None = HERE, **options) -> Diagnosis:
    found = survey(sae, by_site, stated, options.get("average_l0"))
    return diagnose(sae, found, by_site[found.site], **options)


def test_an_sae_that_fits(sae, by_site):
    found = diagnosed(sae, by_site, average_l0=4, dtype=torch.float32, beginnings=Beginnings(64, 0.01, 0.03, 12.0))
    assert found.fits
    assert found.verdict == "fits"
    assert {each.status for each in found.findings} == {"ok"}
    assert [each.name for each in found.findings] == ["site", "norm", "scale", "bos", "dtype", "fvu", "l0", "errors"]
    lines = found.lines()
    assert len(lines) == len(found.findings) + 1
    assert not any("\n" in line for line in lines)
    fit = measure_fit(sae, by_site[HERE])
    assert (
        f"{fit.fvu:.3g} about the mean (explained variance {fit.explained_variance:.3g})" in finding(found, "fvu").text
    )
    assert f"{fit.fvu_zero:.3g} about zero" in finding(found, "fvu").text
    assert found.figures["explained_variance_zero"] == fit.explained_variance_zero


def test_the_wrong_layer_and_the_wrong_site(sae, by_site):
    layer = diagnosed(sae, by_site, NEXT)
    assert layer.verdict.startswith("does not fit: the wrong layer: at layer_2/resid FVU is ")
    assert ", at layer_1/resid 0.0" in layer.verdict
    site = diagnosed(sae, by_site, BESIDE)
    assert site.verdict.startswith("does not fit: the wrong site: at layer_1/mlp FVU is ")
    assert finding(diagnosed(sae, by_site, None), "site").status == "note"


def test_the_only_site(sae, by_site):
    only = {HERE: by_site[HERE]}
    assert finding(diagnosed(sae, only), "site").text == f"{HERE}, as stated; the only site of its width"
    text = finding(diagnosed(sae, only, None), "site").text
    assert text == f"stated nowhere; the only site of its width is {HERE}, which it fits best"


def test_no_site_fits(by_site):
    found = diagnosed(fitting(5), by_site)
    assert not found.fits
    assert finding(found, "fvu").text.startswith("no better than predicting the mean")


@pytest.mark.parametrize(
    ("factor_of", "words"),
    [
        (lambda rms: 1 / rms, "mean squared norm 1: perhaps the scale of its training was not folded in"),
        (lambda rms: math.sqrt(WIDTH) / rms, "mean squared norm d_model"),
        (lambda rms: math.sqrt(WIDTH), "about √d_model"),
        (lambda rms: 1 / math.sqrt(WIDTH), "about 1/√d_model"),
        (lambda rms: 900.0, "against"),
    ],
)
def test_the_wrong_scale(by_site, factor_of, words):
    rms = by_site[HERE].square().sum(1).mean().sqrt().item()
    found = diagnosed(fitting(1, factor_of(rms)), by_site)
    assert found.verdict.startswith("does not fit: the wrong scale: it fits inputs times ")
    assert words in found.verdict


@pytest.mark.parametrize(
    ("bos", "seen", "status", "words"),
    [
        (True, Beginnings(64, 0.1, 0.2, 9.0), "ok", "0.1 with BOS, 0.2 without"),
        (False, Beginnings(64, 0.1, 0.2, 9.0), "wrong", "BOS is missing, put it before every text"),
        (False, Beginnings(64, 0.1, 0.2, 3.0), "note", "makes no difference that can be told"),
        (False, Beginnings(64, 0.1, 0.104, 9.0), "note", "makes no difference that can be told"),
        (True, Beginnings(64, 0.2, 0.15, -9.0), "note", "perhaps it was trained without BOS"),
        (True, Beginnings(64, 0.5, 0.15, -9.0), "wrong", "perhaps it was trained without BOS"),
        (False, Beginnings(64, 0.2, 0.15, -9.0), "ok", "0.15 without BOS, 0.2 with it"),
    ],
)
def test_bos(sae, by_site, bos, seen, status, words):
    found = finding(diagnosed(sae, by_site, bos=bos, beginnings=seen), "bos")
    assert found.status == status
    assert words in found.text


def test_bos_is_not_judged_by_an_sae_that_fits_nowhere(by_site):
    found = finding(diagnosed(fitting(5), by_site, bos=False, beginnings=Beginnings(64, 0.1, 0.2, 9.0)), "bos")
    assert (found.status, found.text[:38]) == ("note", "cannot be told while nothing fits: in ")


def test_dtypes(sae, by_site):
    x = {site: rows.bfloat16().float() for site, rows in by_site.items()}
    found = finding(diagnosed(sae, x), "dtype")
    assert (found.status, found.text) == (
        "note",
        "the activations were rounded to bfloat16; weights of the SAE in float32",
    )
    found = finding(diagnosed(sae, x, dtype=torch.bfloat16, rounding=Rounding(1e-4, 0.0101, 0.01)), "dtype")
    assert found.status == "note"
    assert found.text.startswith(
        "the model ran in bfloat16; rounding is 0.0001 of the variance, FVU 0.0101, in float32 "
    )
    found = finding(diagnosed(sae, x, dtype=torch.bfloat16, rounding=Rounding(0.1, 0.13, 0.1)), "dtype")
    assert found.status == "wrong"
    with torch.no_grad():
        sae.W_dec.copy_(sae.W_dec.bfloat16())
    found = finding(diagnosed(sae, by_site), "dtype")
    assert (found.status, found.text) == ("note", "weights of the SAE in float32, once rounded to bfloat16")


@pytest.mark.parametrize(("stated", "status"), [(4, "ok"), (3, "note"), (1.5, "wrong"), (9, "wrong")])
def test_l0_beside_what_is_stated(sae, by_site, stated, status):
    assert finding(diagnosed(sae, by_site, average_l0=stated), "l0").status == status


def test_an_sae_that_never_fires_is_far_from_any_l0(sae, by_site):
    with torch.no_grad():
        sae.threshold.fill_(1e3)
    assert finding(diagnosed(sae, by_site, average_l0=4), "l0").status == "wrong"


def test_tokens_that_hold_the_error_and_the_norm(sae, by_site):
    x = by_site[HERE].clone()
    x[5] *= 40
    found = diagnosed(sae, {HERE: x})
    assert finding(found, "norm").text.startswith("median ‖x‖ ")
    assert "; 1 of 512 tokens above 5 times that" in finding(found, "norm").text
    assert finding(found, "errors").status == finding(found, "norm").status == "note"
    assert found.figures["top_error_share"] > 0.9


def test_the_cause_comes_before_what_follows_from_it():
    l0, site = Finding("l0", "wrong", "l0"), Finding("site", "wrong", "site")
    assert Diagnosis((l0, site), {}).verdict == "does not fit: site"


def test_json_holds_no_nan(sae, by_site):
    found = diagnosed(sae, by_site, average_l0=4, beginnings=Beginnings(2, 0.1, 0.2, math.inf))
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["fits"] is True
    assert values["figures"]["beginnings"] == {"rows": 2, "fvu_with": 0.1, "fvu_without": 0.2, "t": None}
    assert values["figures"]["fvu_by_site"].keys() == {"layer_1/resid", "layer_2/resid", "layer_1/mlp"}
    assert [each["name"] for each in values["findings"]] == [each.name for each in found.findings]


@pytest.mark.parametrize(("name", "status", "text"), [("colour", "ok", ""), ("site", "fine", ""), ("site", "ok", None)])
def test_findings_that_are_none(name, status, text):
    with pytest.raises((ValueError, TypeError), match="expected"):
        Finding(name, status, text)


@pytest.mark.parametrize("options", [{"average_l0": -1}, {"bos": 1}])
def test_what_a_diagnosis_refuses(sae, by_site, options):
    with pytest.raises((ValueError, TypeError), match=f"{next(iter(options))}: expected"):
        diagnose(sae, survey(sae, by_site, HERE), by_site[HERE], **options)
