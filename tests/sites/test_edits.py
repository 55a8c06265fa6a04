"""Edits of codes inside a model: ablating, steering, clamping, patching, with and without the error of the SAE.

pytest tests/sites/test_edits.py
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gemmascope import SparseCode
from gemmascope.sites import Ablate, Add, Capture, Clamp, LatentScales, Patch, all_sites, attach
from gemmascope.sites.splice import Splice
from gemmascope.sites.window import Window
from tests import tiny_models as tiny
from tests.helpers import assert_bitwise_equal, lattice
from tests.sites.test_attach import ATT, MLP, RESID, hook_count, logits, random_sae
from tests.sites.test_sites import every_model

pytest.importorskip("transformers")

SITES = [ATT, MLP, RESID]
every_site = pytest.mark.parametrize("site", SITES, ids=str)
D_SAE = 24


class DenseSAE(nn.Module):
    """Somebody's SAE: the protocol and nothing more."""

    def __init__(self, sae):
        super().__init__()
        self.sae, self.W_dec, self.d_model, self.d_sae = sae, sae.W_dec, sae.d_model, sae.d_sae

    def encode(self, x):
        return self.sae.encode(x)

    def decode(self, f):
        return self.sae.decode(f)

    def forward(self, x):
        return self.decode(self.encode(x)).to(x.dtype)


def seen(model, saes, ids, **options):
    """What the rest of the model is given at each site, and the model's own activations before the SAEs of it."""
    with torch.no_grad(), Capture(model, saes) as before, attach(model, saes, **options), Capture(model, saes) as after:
        model(ids)
    return {site: (before[site], after[site]) for site in before.sites}


def code_of(sae, x):
    with torch.no_grad():
        return sae.encode_sparse(x)


def firing(sae, x, least=1):
    """A latent that fires on some tokens of x and not on others."""
    counts = code_of(sae, x).firing_count()
    return int(((counts >= least) & (counts < x[..., 0].numel())).nonzero()[0])


# ---- sparse and dense are the same function


def random_mask(seed, *shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


@st.composite
def edits_and_windows(draw):
    batch, seq, start = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(0, 3))
    seed = draw(st.integers(0, 999))
    columns = draw(st.integers(0, 8))
    shape = draw(st.sampled_from([(columns,), (1, columns), (batch, columns)]))
    positions = draw(st.none() | st.just(random_mask(seed, *shape)))
    latents = draw(st.lists(st.integers(0, 6), min_size=1, max_size=3))
    amount = draw(st.sampled_from([-1.0, -0.25, 0.0, 0.5, 3.0]))
    of = random_mask(seed + 1, *draw(st.sampled_from([(columns,), (1, columns), (batch, columns)])))
    given_code = SparseCode.from_dense(lattice(int(of.sum()), 7, seed=seed + 2).relu())
    edit = draw(
        st.sampled_from(
            [
                Ablate(latents, positions=positions),
                Add(latents[0], amount, positions=positions),
                Clamp(latents[0], amount, positions=positions),
                Patch(given_code, of, positions=positions),
                Patch(given_code, of, latents, positions=positions),
            ]
        )
    )
    return edit.resolved(7, None), Window(batch, seq, start), seed


@settings(deadline=None, max_examples=150)
@given(edits_and_windows())
def test_sparse_edits_are_the_dense_ones(case):
    edit, window, seed = case
    f = lattice(window.batch * window.seq, 7, seed=seed + 3).relu()
    dense = edit.dense(f, window)
    code = edit.sparse(SparseCode.from_dense(f), window)
    code.check()
    expected = SparseCode.from_dense(dense)
    for name in ("values", "indices", "offsets"):
        assert_bitwise_equal(name, getattr(code, name), getattr(expected, name))


def test_dense_edits_by_hand():
    f = torch.tensor([[1.0, 0, 2], [0, 3, 0], [0, 0, 4], [5, 0, 0]])
    two_rows = Window(2, 2, 1)  # columns 1 and 2 of two sequences
    at = torch.tensor([[True, True, False], [False, False, True]])  # so token 0 and token 3 of f
    assert Ablate([0, 2], positions=at).dense(f, two_rows).tolist() == [[0, 0, 0], [0, 3, 0], [0, 0, 4], [0, 0, 0]]
    assert Add(1, -2, positions=at).dense(f, two_rows).tolist() == [[1, -2, 2], [0, 3, 0], [0, 0, 4], [5, -2, 0]]
    assert Clamp(0, 7, positions=at[:1]).dense(f, two_rows).tolist() == [[7, 0, 2], [0, 3, 0], [7, 0, 4], [5, 0, 0]]
    code = SparseCode.from_dense(torch.tensor([[9.0, 0, 0], [0, 8, 0], [0, 0, 7]]))
    patched = Patch(code, at).dense(f, two_rows)  # of column 0 of row 0, then of the two tokens that are here
    assert patched.tolist() == [[0, 8, 0], [0, 3, 0], [0, 0, 4], [0, 0, 7]]
    assert Patch(code, at, latents=0).dense(f, two_rows).tolist() == [[0, 0, 2], [0, 3, 0], [0, 0, 4], [0, 0, 0]]


# ---- with the error: x itself where nothing is edited


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_error_and_without_edits_is_the_identity(build, dtype):
    model, ids = build(dtype=dtype), tiny.tokens()
    clean = logits(model, ids)
    saes = {site: random_sae(site) for site in all_sites(model)}
    for options in ({}, {"skip_token_ids": ()}):
        with attach(model, saes, mode="with_error", **options):
            assert torch.equal(logits(model, ids), clean)
            with torch.inference_mode():
                assert torch.equal(model(ids).logits, clean)
            assert torch.equal(model(ids).logits.detach(), clean)  # with gradients


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wrap", [lambda sae: sae, DenseSAE], ids=["sparse", "dense"])
def test_edits_that_change_nothing_are_the_identity(build, dtype, wrap):
    """The code runs, is edited and decoded twice; the difference is 0 to the bit."""
    model, ids = build(dtype=dtype), tiny.tokens()
    clean = logits(model, ids)
    saes = {site: wrap(random_sae(site)) for site in all_sites(model)}
    nowhere = torch.zeros(ids.shape, dtype=torch.bool)
    for edit in (Add(3, 0.0), Ablate(range(D_SAE), positions=nowhere), Clamp(1, 9.0, positions=nowhere[0])):
        with attach(model, saes, mode="with_error", edits=dict.fromkeys(saes, edit)):
            assert torch.equal(logits(model, ids), clean)
            assert torch.equal(model(ids).logits.detach(), clean)


@pytest.mark.parametrize("gradients", [False, True])
def test_with_error_keeps_the_sign_of_zero(gradients):
    x = torch.zeros(1, 2, 16)
    x[:, 1] = -0.0
    splice = Splice(RESID, random_sae(RESID), "with_error", [Add(3, 0.0)])
    with torch.set_grad_enabled(gradients):
        found = splice(x, Window(1, 2, 0))
    assert found.requires_grad is gradients
    assert_bitwise_equal("x", found.detach(), x)


@every_site
def test_what_is_not_edited_keeps_its_activation(site):
    model, ids, sae = tiny.gemma2(), tiny.tokens(), random_sae(site)
    at = torch.zeros(ids.shape, dtype=torch.bool)
    at[0, 4], at[1, 2] = True, True
    before, after = seen(model, {site: sae}, ids, mode="with_error", edits={site: Add(2, 3.0, positions=at)})[site]
    assert torch.equal(after[~at], before[~at])
    assert (after[at] != before[at]).all()


# ---- what each edit does


@every_site
@pytest.mark.parametrize("mode", ["replace", "with_error"])
def test_edits_move_the_reconstruction(site, mode):
    """Against the formula in fp64."""
    model, ids, sae = tiny.gemma2(dtype=torch.float64), tiny.tokens(), random_sae(site).double()
    (x, _) = seen(model, {site: sae}, ids)[site]
    code = code_of(sae, x).to_dense().reshape(*x.shape[:2], D_SAE)
    j = firing(sae, x)
    edited = code.clone()
    edited[..., j] = 0
    edited[..., 5] = 2.5
    edited[..., 6] += 1.5
    base = sae.decode(edited).detach()
    expected = base if mode == "replace" else x + sae.input_scale * ((edited - code) @ sae.W_dec.detach())
    edits = [Ablate(j), Clamp(5, 2.5), Add(6, 1.5)]
    _, after = seen(model, {site: sae}, ids, mode=mode, edits={site: edits})[site]
    torch.testing.assert_close(after[:, 1:], expected[:, 1:], rtol=1e-12, atol=1e-12)
    assert torch.equal(after[:, 0], x[:, 0])  # BOS
    assert not torch.allclose(after[:, 1:], sae(x)[:, 1:] if mode == "replace" else x[:, 1:])


def test_edits_are_made_in_their_order():
    model, ids, sae = tiny.gemma2(), tiny.tokens(), random_sae(RESID)
    last_adds = seen(model, {RESID: sae}, ids, edits={RESID: [Clamp(3, 2.0), Add(3, 1.0)]})[RESID][1]
    last_clamps = seen(model, {RESID: sae}, ids, edits={RESID: [Add(3, 1.0), Clamp(3, 2.0)]})[RESID][1]
    assert torch.equal(last_adds, seen(model, {RESID: sae}, ids, edits={RESID: Clamp(3, 3.0)})[RESID][1])
    assert torch.equal(last_clamps, seen(model, {RESID: sae}, ids, edits={RESID: Clamp(3, 2.0)})[RESID][1])


def test_units_are_those_of_the_scales():
    model, ids, sae = tiny.gemma2(), tiny.tokens(), random_sae(RESID)
    largest, mean = torch.zeros(D_SAE), torch.zeros(D_SAE)
    largest[4], mean[4] = 8.0, 2.0
    scales = {RESID: LatentScales(largest, mean, (mean > 0).long(), 10)}

    def steered(edit):
        return seen(model, {RESID: sae}, ids, edits={"layer_1/resid": edit}, latent_scales=scales)[RESID][1]

    assert torch.equal(steered(Add(4, 0.5, "max")), steered(Add(4, 4.0)))
    assert torch.equal(steered(Add(4, -0.5, "mean")), steered(Add(4, -1.0)))
    assert torch.equal(steered(Clamp(4, 0.5, unit="max")), steered(Clamp(4, 4.0)))
    assert not torch.equal(steered(Add(4, 4.0)), steered(Add(4, 1.0)))


@pytest.mark.parametrize("mode", ["replace", "with_error"])
def test_patching_in_another_run(mode):
    """All of it: the site then holds what the SAE makes of the other run (and the error of this one)."""
    model, sae = tiny.gemma2(dtype=torch.float64), random_sae(RESID).double()
    ids, others = tiny.tokens(seed=0), tiny.tokens(seed=1)
    other, reconstructed = seen(model, {RESID: sae}, others)[RESID]
    kept = others > 2
    code = code_of(sae, other[kept])
    x, after = seen(model, {RESID: sae}, ids, mode=mode, edits={RESID: Patch(code, kept)})[RESID]
    expected = reconstructed if mode == "replace" else x + (sae(other) - sae(x)).detach()
    torch.testing.assert_close(after[:, 1:], expected[:, 1:], rtol=1e-12, atol=1e-12)
    whole = code_of(sae, other)
    x, after = seen(model, {RESID: sae}, ids, mode=mode, edits={RESID: Patch(whole)})[RESID]
    torch.testing.assert_close(after[:, 1:], expected[:, 1:], rtol=1e-12, atol=1e-12)
    at = torch.zeros(ids.shape[1], dtype=torch.bool)
    at[3] = True
    x, after = seen(model, {RESID: sae}, ids, mode="with_error", edits={RESID: Patch(code, kept, positions=at)})[RESID]
    assert (after != x).any(-1).nonzero().tolist() == [[0, 3], [1, 3]]


@pytest.mark.parametrize("mask_of", ["row", "rows"])
def test_positions_of_the_splice(mask_of):
    model, ids, sae = tiny.gemma2(), tiny.tokens(), random_sae(RESID)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    mask[:, :4] = True  # of which BOS is left alone all the same
    if mask_of == "rows":
        mask[1] = False
    given_mask = mask if mask_of == "rows" else mask[0]
    for options in ({}, {"skip_token_ids": ()}):
        before, after = seen(model, {RESID: sae}, ids, positions=given_mask, **options)[RESID]
        spliced = mask if options else mask & (ids > 2)
        assert torch.equal(after[~spliced], before[~spliced])
        assert torch.equal(after[spliced], sae(before).detach()[spliced])


def test_edits_at_several_sites_at_once():
    model, ids = tiny.gemma2(), tiny.tokens()
    saes = {site: random_sae(site, seed) for seed, site in enumerate(SITES)}
    edits = {ATT: Ablate([0, 1]), "layer_1/resid": [Add(2, 1.0), Clamp(3, 2.0)]}
    with attach(model, saes, edits=edits):
        together = logits(model, ids)
    at_resid = {RESID: edits["layer_1/resid"]}
    with (
        attach(model, {ATT: saes[ATT]}, edits={ATT: edits[ATT]}),
        attach(model, {MLP: saes[MLP]}),
        attach(model, {RESID: saes[RESID]}, edits=at_resid),
    ):
        assert torch.equal(logits(model, ids), together)
    with attach(model, saes):
        assert not torch.equal(logits(model, ids), together)
    assert hook_count(model) == 0


# ---- other ways to run


@every_site
@pytest.mark.parametrize("mode", ["replace", "with_error"])
def test_any_sae_with_encode_and_decode(site, mode):
    model, ids, sae = tiny.gemma2(dtype=torch.float64), tiny.tokens(), random_sae(site).double()
    edits = {site: [Ablate(range(12)), Add(20, 1.0)]}
    ours = seen(model, {site: sae}, ids, mode=mode, edits=edits)[site][1]
    dense = seen(model, {site: DenseSAE(sae)}, ids, mode=mode, edits=edits)[site][1]
    torch.testing.assert_close(ours, dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["replace", "with_error"])
def test_gradients_are_those_of_the_formula(mode):
    model, ids, sae = tiny.gemma2(dtype=torch.float64), tiny.tokens(), random_sae(RESID).double()
    model.requires_grad_(False)
    x = seen(model, {RESID: sae}, ids)[RESID][0]
    weights = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def gradients(value):
        sae.zero_grad()
        (value[:, 1:] * weights[:, 1:]).sum().backward()
        return {name: parameter.grad.clone() for name, parameter in sae.named_parameters()}

    f = sae.encode(x)
    edited = f.index_fill(2, torch.tensor([0, 3]), 0) + 2.0 * (torch.arange(D_SAE) == 7)
    expected = gradients(sae.decode(edited) if mode == "replace" else x + sae.decode(edited) - sae.decode(f))
    kept = []
    with attach(model, {RESID: sae}, mode=mode, edits={RESID: [Ablate([0, 3]), Add(7, 2.0)]}):
        model.model.layers[1].register_forward_hook(lambda module, args, output: kept.append(output))
        value = model(ids).logits.sum()
    found = gradients(kept[0])
    assert value.requires_grad
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-10)
    assert found["W_enc"].abs().sum() > 0


def test_inference_mode_compiled_and_copied():
    model, ids, sae = tiny.gemma2(), tiny.tokens(), random_sae(RESID)
    at = torch.arange(9) % 2 == 0
    edits = {RESID: [Ablate([1, 2]), Add(3, 1.0, positions=at)]}
    with attach(model, {RESID: sae}, mode="with_error", edits=edits):
        expected = logits(model, ids)
        with torch.inference_mode():
            assert torch.equal(model(ids).logits, expected)
        other = copy.deepcopy(model)
        model.compile(backend="eager")
        assert torch.equal(logits(model, ids), expected)
    assert torch.equal(logits(other, ids), expected)
    clean = logits(model, ids)
    assert not torch.equal(clean, expected)
    with attach(model, {RESID: sae}, mode="with_error", edits=edits):  # compiled before
        assert torch.equal(logits(model, ids), expected)
    assert torch.equal(logits(model, ids), clean)


@pytest.mark.parametrize("wrap", [lambda sae: sae, DenseSAE], ids=["sparse", "dense"])
@pytest.mark.parametrize("mode", ["replace", "with_error"])
def test_nan_stays_visible(mode, wrap):
    sae = random_sae(RESID)
    model, ids = tiny.gemma2(), tiny.tokens()
    model.model.layers[1].register_forward_hook(lambda module, args, output: output + torch.tensor([torch.nan] * 16))
    after = seen(model, {RESID: wrap(sae)}, ids, mode=mode, edits={RESID: Add(0, 1.0)})[RESID][1]
    assert after.isnan().all()


class TestRefusals:
    CODE = SparseCode.from_dense(torch.ones(3, D_SAE))

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"mode": "error"}, ValueError, r"^mode: expected 'replace' or 'with_error', got 'error'$"),
            ({"edits": [Ablate(0)]}, TypeError, r"^edits: expected a dict by Site, got list$"),
            ({"edits": {MLP: Ablate(0)}}, ValueError,
             r"^edits: expected sites of saes, layer_1/resid, got layer_2/mlp$"),
            ({"edits": {RESID: "ablate"}}, TypeError,
             r"^edits: expected an edit or a list of them at layer_1/resid, got str"),
            ({"edits": {RESID: [3]}}, TypeError,
             r"^edits: expected Ablate, Add, Clamp or Patch at layer_1/resid, got int$"),
            ({"edits": {RESID: Ablate(24)}}, ValueError, r"^site layer_1/resid: latent: expected at most 23, got 24$"),
            ({"edits": {RESID: Add(24, 1.0)}}, ValueError,
             r"^site layer_1/resid: latent: expected at most 23, got 24$"),
            ({"edits": {RESID: Patch(CODE, latents=99)}}, ValueError,
             r"^site layer_1/resid: latent: expected at most 23, "),
            ({"edits": {RESID: Patch(SparseCode.from_dense(torch.ones(3, 8)))}}, ValueError,
             r"^site layer_1/resid: code: expected one of 24 latents, as the SAE has, got 8$"),
            ({"edits": {RESID: Add(3, 1.0, "max")}}, ValueError,
             r"^site layer_1/resid: latent_scales: expected those of the site, for the unit 'max', got none$"),
            ({"edits": {RESID: Add(3, 1.0, "mean")},
              "latent_scales": {RESID: LatentScales(torch.ones(24), torch.ones(24), torch.zeros(24).long(), 5)}},
             ValueError, r"^site layer_1/resid: latent 3: expected one that fires, .* fired on none of 5 tokens$"),
            ({"edits": {RESID: Add(3, 1.0, "mean")},
              "latent_scales": {RESID: LatentScales(torch.ones(9), torch.ones(9), torch.ones(9).long(), 5)}},
             ValueError, r"^site layer_1/resid: latent_scales: expected those of 24 latents, as the SAE has, got 9$"),
            ({"latent_scales": {RESID: torch.ones(24)}}, TypeError,
             r"^latent_scales: layer_1/resid: expected a LatentScales, got Tensor$"),
            ({"positions": torch.ones(3)}, TypeError, r"^positions: expected a torch.Tensor of bool, got float32$"),
            ({"positions": torch.ones(1, 1, 1, dtype=torch.bool)}, ValueError,
             r"^positions: expected shape \[columns\] or "),
        ],
    )  # fmt: skip
    def test_nothing_is_attached(self, options, error, message):
        model = tiny.gemma2()
        with pytest.raises(error, match=message):
            attach(model, {RESID: random_sae(RESID)}, **options)
        assert hook_count(model) == 0

    @pytest.mark.parametrize("options", [{"mode": "with_error"}, {"edits": {RESID: Ablate(0)}}])
    def test_a_function_without_a_code(self, options):
        message = r"^site layer_1/resid: expected an SAE with encode, decode and d_sae, whose code can be edited, got "
        with pytest.raises(TypeError, match=message):
            attach(tiny.gemma2(), {RESID: nn.Identity()}, **options)

    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (lambda: Ablate([]), ValueError, r"^latents: expected at least one, got none$"),
            (lambda: Ablate("3"), TypeError, r"^latents: expected an int or several, got str$"),
            (lambda: Ablate(True), TypeError, r"^latents: expected an int or several, got bool$"),
            (lambda: Ablate([0.5]), TypeError, r"^latents: expected an int, got float$"),
            (lambda: Ablate(torch.ones(2)), TypeError, r"^latents: expected an int or several, got Tensor$"),
            (lambda: Ablate(-1), ValueError, r"^latents: expected at least 0, got -1$"),
            (lambda: Add(1.0, 1.0), TypeError, r"^latent: expected an int, got float$"),
            (lambda: Add(1, float("nan")), ValueError, r"^amount: expected a finite number, got nan$"),
            (lambda: Clamp(1, 1.0, "median"), ValueError, r"^unit: expected 'max' or 'mean', got 'median'$"),
            (lambda: Add(1, 1.0, positions=[True]), TypeError,
             r"^positions: expected a torch.Tensor of bool, got list$"),
            (lambda: Patch(torch.ones(2, 2)), TypeError, r"^code: expected a SparseCode, got Tensor$"),
            (lambda: Patch(TestRefusals.CODE, torch.tensor([True, False])), ValueError,
             r"^of: expected True 3 times, as code has tokens, got 1$"),
            (lambda: Patch(TestRefusals.CODE._replace(d_sae=2)), ValueError, r"^code.indices: "),
        ],
    )  # fmt: skip
    def test_edits_that_cannot_be(self, make, error, message):
        with pytest.raises(error, match=message):
            make()

    def test_masks_of_other_rows(self):
        model, ids, sae = tiny.gemma2(), tiny.tokens(rows=4), random_sae(RESID)
        mask = torch.ones(2, 9, dtype=torch.bool)
        message = (
            r"^positions: expected 1 row or 4, as the model runs on, got 2; for beams .* repeat_interleave the rows$"
        )
        for options in ({"positions": mask}, {"edits": {RESID: Add(0, 1.0, positions=mask)}}):
            with attach(model, {RESID: sae}, **options), pytest.raises(ValueError, match=message):
                logits(model, ids)
        with (
            attach(model, {RESID: sae}, edits={RESID: Patch(self.CODE)}),
            pytest.raises(ValueError, match=r"^code: expected 36 tokens, as the model runs on, got 3; say by `of`"),
        ):
            logits(model, ids)

    @pytest.mark.parametrize("gradients", [False, True])
    def test_an_sae_that_decodes_to_another_shape(self, gradients):
        """By entries too, where it could be taken for the right one."""
        sae = random_sae(RESID)
        decode = sae.decode
        sae.decode = lambda f: decode(f).mT
        model = tiny.gemma2()
        message = r"^site layer_1/resid: expected a reconstruction of shape \[.*\], got \[.*\]$"
        with (
            attach(model, {RESID: sae}, edits={RESID: Ablate(0)}),
            torch.set_grad_enabled(gradients),
            pytest.raises(ValueError, match=message),
        ):
            model(tiny.tokens())

    def test_an_sae_whose_code_has_another_shape(self):
        sae = random_sae(RESID)
        sae.encode = lambda x: torch.zeros(2, 9, 5)
        sae.requires_grad_(True)
        message = r"^site layer_1/resid: expected activations of shape \[2, 9, 24\], got shape \[2, 9, 5\]$"
        model = tiny.gemma2()
        with attach(model, {RESID: sae}, edits={RESID: Ablate(0)}), pytest.raises(ValueError, match=message):
            model(tiny.tokens())
