"""`Crosscoder`: the formula site by site, its training by every route, files, what is refused."""

import math

import pytest
import torch

from gemmascope import Crosscoder, JumpReLUSAE, Loss, SAETrainer, SideBySide, Site, TopKSAE, TrainConfig, load_sae
from gemmascope.errors import BadFileError
from gemmascope.training import loss_and_gradients

SITES, WIDTHS, F, N = ("layer_1/resid", "layer_2/att", "layer_2/resid"), (7, 4, 6), 24, 50
KEYS = [Site.parse(name) for name in SITES]
NAMES = tuple(site.name for site in KEYS)


def activations(n=N, seed=0, dtype=torch.float32):
    """Sites that share what a few directions carry, of other sizes."""
    generator, weights = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(5)
    shared = torch.relu(torch.randn(n, 10, generator=generator, dtype=torch.float64) - 1)
    return {
        site: (scale * (shared @ torch.randn(10, width, generator=weights, dtype=torch.float64) + 0.3)).to(dtype)
        for site, width, scale in zip(KEYS, WIDTHS, (1.0, 20.0, 0.1), strict=True)
    }


def make(dtype=torch.float64, **options):
    of = SideBySide(NAMES, WIDTHS, (2.0, 30.0, 0.25))
    generator = torch.Generator().manual_seed(1)
    sae = JumpReLUSAE(of.width, F, threshold_init=0.1, generator=generator, dtype=dtype, **options)
    with torch.no_grad():
        sae.b_enc.add_(0.05 * torch.randn(F, generator=generator))
        sae.b_dec.add_(0.05 * torch.randn(of.width, generator=generator))
    return Crosscoder(sae, of)


@pytest.mark.parametrize("grad", [False, True])
def test_it_is_the_formula_site_by_site(grad):
    crosscoder, x = make(pre_encoder_bias=False), activations(dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        f, x_hat = crosscoder.encode(x), crosscoder(x)
        decoded = crosscoder.decode(f)
    z = crosscoder.sae.b_enc.expand(N, -1)
    for site, scale in zip(KEYS, crosscoder.of.scales, strict=True):
        z = z + (x[site] / scale) @ crosscoder.encoder(site)
    expected = z * (z > 0.1)
    torch.testing.assert_close(f, expected, rtol=1e-12, atol=1e-13)
    assert 0 < (f > 0).sum() < f.numel()
    assert list(x_hat) == list(NAMES)
    for site, scale in zip(KEYS, crosscoder.of.scales, strict=True):
        b_dec = crosscoder.sae.b_dec[crosscoder.of.columns(site)]
        of_site = scale * (expected @ crosscoder.decoder(site.name) + b_dec)
        for found in (x_hat, decoded):
            torch.testing.assert_close(found[site.name], of_site, rtol=1e-12, atol=1e-13)
            assert found[site.name].requires_grad == grad


def test_entries_give_the_same():
    crosscoder, x = make(), activations(dtype=torch.float64)
    code = crosscoder.encode_sparse(x)
    assert torch.equal(code.to_dense(), crosscoder.encode(x).detach())
    for one, two in zip(crosscoder.decode(code).values(), crosscoder(x).values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-13)


def test_any_number_of_dimensions_and_precision():
    crosscoder = make(torch.float32)
    x = {site: rows.view(5, 10, -1).bfloat16() for site, rows in activations().items()}
    assert crosscoder.encode(x).shape == (5, 10, F)
    found = crosscoder(x)
    assert [(t.shape, t.dtype) for t in found.values()] == [((5, 10, width), torch.bfloat16) for width in WIDTHS]


def test_views_and_norms():
    crosscoder = make()
    for site, width in zip(KEYS, WIDTHS, strict=True):
        assert crosscoder.encoder(site).shape == (width, F)
        assert crosscoder.decoder(site).shape == (F, width)
        assert crosscoder.decoder(site).untyped_storage().data_ptr() == crosscoder.sae.W_dec.data_ptr()
    norms = crosscoder.decoder_norms()
    assert norms.shape == (3, F)
    torch.testing.assert_close(norms.square().sum(0), torch.ones(F, dtype=torch.float64))
    torch.testing.assert_close(norms[1], crosscoder.decoder(KEYS[1]).norm(dim=1).detach())
    with torch.no_grad():
        crosscoder.decoder(KEYS[1])[3] = 0
    assert crosscoder.decoder_norms()[1, 3] == 0


def test_the_loss_is_the_sum_over_the_sites():
    crosscoder, x = make(), activations(dtype=torch.float64)
    found = loss_and_gradients(crosscoder.sae, crosscoder.of.join(x), Loss(0.0))
    errors = [
        ((x[site] - x_hat) / scale).square().sum(1).mean()
        for site, scale, x_hat in zip(KEYS, crosscoder.of.scales, crosscoder(x).values(), strict=True)
    ]
    assert found.loss.item() == pytest.approx(sum(errors).item(), rel=1e-12)


@pytest.mark.parametrize("scale_by", ["mean_square", "variance"])
def test_every_site_counts_the_same(scale_by):
    x = activations(500)
    of = SideBySide.of(x, scale_by)
    assert of.sites == NAMES
    assert of.widths == WIDTHS
    assert list(of.split(of.join(x))) == list(NAMES)
    for rows in of.join(x).split(WIDTHS, 1):
        mean = rows.mean(0) if scale_by == "variance" else 0
        assert (rows - mean).square().sum(1).mean().item() == pytest.approx(1, rel=1e-5)
    for site, rows in of.split(of.join(x)).items():
        torch.testing.assert_close(rows, x[Site.parse(site)], rtol=1e-6, atol=1e-6)


def test_joined_by_any_name_of_a_site():
    x = activations()
    of = SideBySide.of({site.transformer_lens_name: rows for site, rows in x.items()})
    assert of.sites == NAMES
    assert torch.equal(of.join(x), of.join({site.name: rows for site, rows in x.items()}))
    assert torch.equal(of.join(x), of.join(x | {Site(5, "mlp"): torch.zeros(3, 3)}))
    of = SideBySide.of({"base": x[KEYS[0]], "chat": x[KEYS[0]] * 2})  # of two models
    assert of.columns("chat") == slice(7, 14)


@pytest.mark.parametrize("kind", ["jumprelu", "relu", "gated", "topk", "batchtopk", "matryoshka"])
def test_every_kind_trains(kind):
    x = activations(2000)
    of = SideBySide.of(x)
    changes = {
        "jumprelu": {"l0_coefficient": 1e-3},
        "relu": {"l0_coefficient": 0.02},
        "gated": {"l0_coefficient": 0.02},
        "matryoshka": {"k": 5, "prefixes": (8, F)},
    }.get(kind, {"k": 5})
    recipe = TrainConfig.short(d_sae=F, steps=200, batch_size=128, kind=kind, **changes)
    joined = of.join(x)
    trainer = SAETrainer(recipe, joined)
    for step in range(recipe.steps):
        trainer.update(joined[torch.randint(2000, (128,), generator=torch.Generator().manual_seed(step))])
    crosscoder = Crosscoder(trainer.sae.released(), of)
    assert trainer.report()["l0"] < F - 4
    for site, x_hat in crosscoder(x).items():
        rows = x[Site.parse(site)]
        assert (rows - x_hat).square().sum() / (rows - rows.mean(0)).square().sum() < 0.6
    assert (crosscoder.decoder_norms() > 0.1).sum(0).float().mean() > 1.5  # latents are in several sites


@pytest.mark.parametrize("sae", ["jumprelu", "scaled", "topk"])
def test_files_give_back_the_same_bits(tmp_path, sae):
    crosscoder = make(torch.float32, input_scale=1.7 if sae == "scaled" else 1.0, metadata={"model": "tiny"})
    if sae == "topk":
        crosscoder = Crosscoder(TopKSAE(17, F, 5, metadata={"model": "tiny"}), crosscoder.of)
    crosscoder.save(tmp_path / "crosscoder")
    found = Crosscoder.load(tmp_path / "crosscoder")
    assert found.of == crosscoder.of
    assert found.sae.metadata == {"model": "tiny"}
    x = activations()
    for (site, one), two in zip(found(x).items(), crosscoder(x).values(), strict=True):
        assert torch.equal(one, two), site
    for (name, one), two in zip(found.named_parameters(), crosscoder.parameters(), strict=True):
        assert torch.equal(one, two), name
    assert "crosscoder" not in crosscoder.sae.metadata
    assert load_sae(tmp_path / "crosscoder").d_model == 17
    assert Crosscoder.load(tmp_path / "crosscoder", dtype=torch.float64).sae.W_dec.dtype == torch.float64


def test_what_is_no_crosscoder_is_refused(tmp_path):
    crosscoder = make(torch.float32)
    crosscoder.sae.save(tmp_path / "sae")
    with pytest.raises(BadFileError, match="expected a crosscoder, found an SAE of one site"):
        Crosscoder.load(tmp_path / "sae")
    for facts, message in (
        ({"sites": ["a"], "widths": [9], "scales": [1.0]}, "sae: expected one on activations 9 = 9 wide, got 17"),
        ({"sites": ["a"], "widths": [17], "scales": [0.0]}, r"scales\[0\]: expected"),
        ({"sites": ["a"], "widths": 17, "scales": [1.0]}, "widths: expected"),
        ({"sites": ["a"]}, "facts: expected sites, widths and scales, got sites"),
        ([1], "facts: expected"),
    ):
        crosscoder.sae.metadata = {"crosscoder": facts}
        crosscoder.sae.save(tmp_path / "other")
        with pytest.raises(BadFileError, match=message):
            Crosscoder.load(tmp_path / "other")
    with pytest.raises(ValueError, match="path: expected a folder, got"):
        make(torch.float32).save(tmp_path / "params.npz")


def test_bad_arguments():
    x = activations()
    of = SideBySide.of(x)
    first, *rest = KEYS
    for call, error, message in (
        (lambda: SideBySide.of({}), ValueError, "sites: expected at least one"),
        (lambda: SideBySide.of(x, "norm"), ValueError, "scale_by: expected 'mean_square' or 'variance'"),
        (lambda: SideBySide.of([x]), TypeError, "samples: expected a dict by site, got list"),
        (lambda: SideBySide.of({3: x[first]}), TypeError, "samples: key: expected a name or a Site, got int"),
        (lambda: SideBySide.of({first: x[first].int()}), TypeError, r"samples\['.*'\]: expected a floating dtype"),
        (lambda: SideBySide.of({first: x[first][0]}), ValueError, r"samples\['.*'\]: expected shape \[n ≥ 1, width"),
        (lambda: SideBySide.of({first: x[first] * math.nan}), ValueError, "expected finite activations"),
        (lambda: SideBySide.of({first: x[first] * 0}), ValueError, "expected finite activations that are not all"),
        (lambda: SideBySide.of({first: x[first] * 0 + 1}, "variance"), ValueError, "a variance of 0"),
        (lambda: SideBySide.of({rest[1]: x[rest[1]], first: x[first]}), ValueError, "got layer 1 behind layer 2"),
        (lambda: SideBySide.of({first: x[first], first.name: x[first]}), ValueError, "under several names"),
        (lambda: SideBySide(("a", "a"), (1, 1), (1.0, 1.0)), ValueError, "sites: expected each once"),
        (lambda: SideBySide(("a",), (1, 1), (1.0,)), ValueError, "widths: expected one for each of 1 sites"),
        (lambda: SideBySide(("a",), (1,), (-1.0,)), ValueError, r"scales\[0\]: expected"),
        (lambda: of.join({first: x[first]}), ValueError, "found none of model.layers.2.self_attn.o_proj.input"),
        (lambda: of.join(x | {first: x[first][:, :3]}), ValueError, r"expected shape \[..., 7\], got \[50, 3\]"),
        (
            lambda: of.join(x | {rest[0]: x[rest[0]][:9]}),
            ValueError,
            r"expected the tokens of model.*\[50\], got \[9\]",
        ),
        (lambda: of.split(torch.zeros(3, 5)), ValueError, r"joined: expected shape \[..., 17\], got \[3, 5\]"),
        (
            lambda: of.columns("model.layers.9.output"),
            ValueError,
            "site: expected one of .*, got model.layers.9.output",
        ),
        (lambda: Crosscoder(make().sae, SideBySide(("a",), (9,), (1.0,))), ValueError, "9 = 9 wide, got 17"),
        (lambda: Crosscoder(torch.nn.Linear(3, 3), of), TypeError, "sae: expected"),
        (lambda: Crosscoder(make().sae, "a"), TypeError, "of: expected"),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_visible(bad):
    crosscoder, x = make(torch.float32), activations()
    x[KEYS[1]][3, 2] = bad
    for rows in crosscoder(x).values():
        assert not rows[3].isfinite().all()
        assert rows[:3].isfinite().all()
