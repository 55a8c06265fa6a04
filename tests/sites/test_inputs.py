"""The two sites where transcoders read, and transcoders spliced in where they write."""

import copy

import pytest
import torch

from gemmascope import Transcoder
from gemmascope.activations import Feed, Harvester, harvest, harvest_to_store
from gemmascope.evaluation import evaluate_transcoder
from gemmascope.sites import (
    INPUT_KINDS,
    KINDS,
    Ablate,
    Add,
    Capture,
    Site,
    Tap,
    all_sites,
    attach,
    collect,
    detach_all,
    probe,
    site_width,
)
from gemmascope.training import SAETrainer, TrainConfig
from tests import tiny_models

IN, NORMED, MLP = Site(1, "mlp_in"), Site(1, "mlp_in_normed"), Site(1, "mlp")
MODELS = {"gemma2": tiny_models.gemma2, "gemma3": tiny_models.gemma3, "multimodal": tiny_models.gemma3_multimodal}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.fixture(scope="module")
def ids():
    return tiny_models.tokens(6, 11)


def norm_of(model, layer=1):
    decoder = next(m for name, m in model.named_modules() if name.endswith("layers") and len(m) == tiny_models.LAYERS)
    return decoder[layer].pre_feedforward_layernorm


def transcoder(seed=0, site=IN, skip=True, d_in=tiny_models.WIDTH, d_out=tiny_models.WIDTH):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator) / 4

    tensors = {"W_enc": normal(d_in, 20), "W_dec": normal(20, d_out), "b_enc": normal(20), "b_dec": normal(d_out)}
    tensors |= {"threshold": normal(20).abs()} | ({"W_skip": normal(d_out, d_in)} if skip else {})
    return Transcoder(tensors, metadata={} if site is None else {"site": site.name})


# ---- what is captured


def test_they_are_what_goes_into_the_mlp(model, ids):
    """With the gain: the output of the norm. Without: x/rms(x) of its input, and the gain is all that is between."""
    norm, seen = norm_of(model), []
    handle = norm.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    with Capture(model, [IN, NORMED]) as capture, torch.no_grad():
        model(ids)
    handle.remove()
    [(x, output)] = seen
    assert torch.equal(capture[IN], output)
    by_hand = x.double() / (x.double().square().mean(-1, keepdim=True) + norm.eps).sqrt()
    torch.testing.assert_close(capture[NORMED].double(), by_hand, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(capture[NORMED] * (1 + norm.weight), capture[IN], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(capture[NORMED].square().sum(-1).sqrt(), torch.full((6, 11), 4.0), rtol=1e-3, atol=0)
    assert not torch.allclose(capture[NORMED], capture[IN], rtol=1e-2)


def test_a_gain_of_zero_hides_nothing(ids):
    model = tiny_models.gemma2()
    with torch.no_grad():
        norm_of(model).weight[3] = -1
    with Capture(model, [IN, NORMED]) as capture, torch.no_grad():
        model(ids)
    assert not capture[IN][..., 3].any()
    assert capture[NORMED][..., 3].abs().min() > 0


def test_in_bfloat16_it_is_computed_in_fp32(ids):
    model, seen = tiny_models.gemma2(dtype=torch.bfloat16), []
    norm_of(model).register_forward_hook(lambda module, args, output: seen.append(args[0]))
    with Capture(model, [NORMED]) as capture, torch.no_grad():
        model(ids)
    x = seen[0].float()
    expected = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm_of(model).eps)).bfloat16()
    assert torch.equal(capture[NORMED], expected)


def test_the_sites_of_saes_are_those_they_were(model):
    assert KINDS == ("att", "mlp", "resid")
    assert INPUT_KINDS == ("mlp_in", "mlp_in_normed")
    assert {site.kind for site in all_sites(model)} == set(KINDS)
    assert [site_width(model, site) for site in (IN, NORMED)] == [tiny_models.WIDTH] * 2


@pytest.mark.parametrize(
    ("site", "name", "transformer_lens", "nnsight"),
    [
        (
            *(IN, "model.layers.1.pre_feedforward_layernorm.output", "blocks.1.mlp.hook_in"),
            "model.layers[1].pre_feedforward_layernorm.output",
        ),
        (
            *(NORMED, "model.layers.1.pre_feedforward_layernorm.normalized", "blocks.1.ln2.hook_normalized"),
            "model.layers[1].pre_feedforward_layernorm.source.self__norm_0.output",
        ),
    ],
)
def test_names(site, name, transformer_lens, nnsight):
    assert (site.name, site.transformer_lens_name, site.nnsight_name) == (name, transformer_lens, nnsight)
    assert all(Site.parse(each) == site for each in (str(site), name, transformer_lens, nnsight))


def test_a_model_without_that_norm_is_refused(ids):
    model = tiny_models.gemma2()
    del model.get_submodule("model.layers.1")._modules["pre_feedforward_layernorm"]
    with pytest.raises(
        ValueError, match=r"^site layer_1/mlp_in: expected layers with a pre_feedforward_layernorm, found"
    ):
        Capture(model, [IN])


def test_batches_hold_the_same_tokens_at_every_site(tmp_path):
    """A harvester, a feed, a store: bits of `harvest`, rows of all sites in one order."""
    model = tiny_models.gemma2()
    rows = tiny_models.tokens(8, 12)
    sites, known = [NORMED, IN, MLP], harvest(model, rows, [NORMED, IN, MLP])

    class Rows:
        context, n_train, content = 12, 8, "rows"

        def train(self, index):
            return rows[index]

    source = Harvester(model, Rows(), sites, seed=0, rows_per_block=8, forward_rows=3)  # pyright: ignore
    store = harvest_to_store(source, tmp_path / "store", blocks=1, dtype=torch.float32)
    for each in (source, store):
        with Feed(each, batch_size=11, seed=0, dtype=torch.float32, device="cpu") as feed:
            batch = next(feed.batches())
        order = [(known[NORMED] == row).all(1).nonzero()[0, 0] for row in batch[NORMED]]
        assert len(set(map(int, order))) > 5
        for site in sites:
            torch.testing.assert_close(batch[site], known[site][torch.stack(order)], rtol=1e-5, atol=1e-5)


# ---- splicing


def test_a_transcoder_takes_the_place_of_the_mlp(model, ids):
    sae, norm, seen = transcoder(), norm_of(model), []
    clean = model(ids).logits
    with attach(model, {MLP: sae}, ()) as attached, torch.no_grad():
        spliced = model(ids).logits
        with Capture(model, [MLP, IN]) as capture:
            model(ids)
        expected = sae(capture[IN])
    torch.testing.assert_close(capture[MLP], expected)
    assert attached.sites == (MLP,)
    assert not torch.allclose(spliced, clean)
    assert torch.equal(model(ids).logits, clean)

    handles = [norm.register_forward_hook(lambda module, args, output: seen.append(output))]
    after = next(m for n, m in model.named_modules() if n.endswith("layers.1.post_feedforward_layernorm"))
    handles.append(after.register_forward_hook(lambda module, args, output: sae(seen[-1])))
    torch.testing.assert_close(model(ids).logits, spliced)
    for handle in handles:
        handle.remove()


def test_special_tokens_and_positions_keep_theirs(model, ids):
    positions = torch.arange(11) > 4
    sae = transcoder(site=NORMED)
    with Capture(model, [MLP]) as before, torch.no_grad():
        model(ids)
    with attach(model, {MLP: sae}, positions=positions), torch.no_grad(), Capture(model, [MLP]) as capture:
        model(ids)
    assert torch.equal(capture[MLP][:, :5], before[MLP][:, :5])
    assert not torch.isclose(capture[MLP][:, 5:], before[MLP][:, 5:]).all(-1).any()


def test_which_input_is_meant(model, ids):
    """That of ``inputs``; else that of the metadata, in the layer where it writes, whatever layer it was trained on."""
    by_metadata, bare = transcoder(site=Site(2, "mlp_in_normed")), transcoder(site=None)
    found = []
    for sae, inputs in ((by_metadata, None), (bare, {MLP: NORMED}), (bare, {str(MLP): str(NORMED)}), (bare, {MLP: IN})):
        with attach(model, {MLP: sae}, inputs=inputs), torch.no_grad():
            found.append(model(ids).logits)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])
    assert not torch.allclose(found[2], found[3], atol=1e-3)


def test_several_read_and_write_in_one_forward(model, ids):
    """From different sites, by transcoders of different widths."""
    reads_att = transcoder(1, site=Site(1, "att"), skip=False, d_in=24)
    saes = {Site(0, "mlp"): transcoder(2), MLP: transcoder(3), Site(1, "resid"): reads_att}
    with attach(model, saes), torch.no_grad(), Capture(model, [*saes, Site(1, "att"), Site(0, "mlp_in")]) as capture:
        model(ids)
    kept = ids != tiny_models.BOS
    torch.testing.assert_close(capture[Site(1, "resid")][kept], reads_att(capture[Site(1, "att")])[kept])
    torch.testing.assert_close(capture[Site(0, "mlp")][kept], saes[Site(0, "mlp")](capture[Site(0, "mlp_in")])[kept])
    with (
        attach(model, {Site(1, "resid"): reads_att}),
        attach(model, {Site(1, "att"): lambda x: 0 * x}),
        torch.no_grad(),
        Capture(model, [Site(1, "resid")]) as capture,
    ):
        model(ids)
    probe(model)  # everything was taken out


def test_edits_of_a_transcoder(model, ids):
    """Its skip connection stays; without an edit "with_error" is the model's own, to the bit."""
    sae = transcoder()
    clean = model(ids).logits
    with attach(model, {MLP: sae}, mode="with_error"), torch.no_grad():
        assert torch.equal(model(ids).logits, clean)
    ablated = attach(model, {MLP: sae}, (), edits={MLP: Ablate(range(20))})
    with ablated, Capture(model, [MLP, IN]) as capture, torch.no_grad():
        model(ids)
    torch.testing.assert_close(capture[MLP], capture[IN] @ sae.W_skip.T + sae.b_dec)
    with Capture(model, [MLP]) as before, torch.no_grad():
        model(ids)
    for gradients in (False, True):
        steered = attach(model, {MLP: sae}, (), mode="with_error", edits={MLP: Add(7, 2.0)})
        with steered, Capture(model, [MLP]) as capture, torch.set_grad_enabled(gradients):
            model(ids)
        torch.testing.assert_close(capture[MLP], before[MLP] + 2 * sae.W_dec[7], rtol=1e-4, atol=1e-4)


def test_gradients_and_copies(model, ids):
    sae = transcoder()
    with attach(model, {MLP: sae}):
        twin = copy.deepcopy(model)
        model(ids).logits.square().sum().backward()
        spliced = model(ids).logits
    assert all(p.grad is not None and p.grad.any() for p in (sae.W_dec, sae.W_enc, sae.W_skip))
    model.zero_grad()
    assert torch.equal(twin(ids).logits, spliced)
    detach_all(twin)
    assert torch.equal(twin(ids).logits, model(ids).logits)


def test_where_a_transcoder_only_reads_an_sae_may_be(model):
    """It is no second one there; at the site where the transcoder writes it would be."""
    reads_att = transcoder(1, site=Site(1, "att"), skip=False, d_in=24)
    reads = attach(model, {Site(1, "resid"): reads_att})
    with (
        reads,
        attach(model, {Site(1, "att"): lambda x: x}),
        pytest.raises(ValueError, match=r"^site layer_1/resid: exp"),
    ):
        attach(model, {Site(1, "resid"): lambda x: x})


@pytest.mark.parametrize(
    ("saes", "inputs", "message"),
    [
        (
            {IN: transcoder()},
            None,
            r"^site layer_1/mlp_in: expected one where SAEs write, att, mlp, resid, got 'mlp_in'$",
        ),
        ({NORMED: lambda x: x}, None, r"^site layer_1/mlp_in_normed: expected one where SAEs write"),
        ({MLP: transcoder(site=None)}, None, r"^inputs: expected the site that the transcoder at layer_1/mlp reads"),
        (
            {MLP: transcoder(site=NORMED)},
            {MLP: IN},
            r"^site layer_1/mlp_in: expected a transcoder that reads mlp_in, got one that reads mlp_in_normed \(",
        ),
        ({MLP: transcoder()}, {MLP: NORMED}, r"^site layer_1/mlp_in_normed: expected .*, got one that reads mlp_in \("),
        ({MLP: transcoder(d_in=5)}, None, r"^site layer_1/mlp_in: expected a transcoder of d_in 16, got 5$"),
        ({MLP: transcoder(d_out=5)}, None, r"^site layer_1/mlp: expected a transcoder of d_out 16, got 5$"),
        ({MLP: lambda x: x}, {MLP: IN}, r"^inputs: expected sites of transcoders in saes, got layer_1/mlp$"),
    ],
)
def test_bad_splices_are_refused_by_name(model, ids, saes, inputs, message):
    clean = model(ids).logits
    with pytest.raises(ValueError, match=message):
        attach(model, saes, inputs=inputs)
    assert torch.equal(model(ids).logits, clean)


def test_codes_are_collected_where_it_reads(model, ids):
    sae = transcoder(site=NORMED)
    codes = collect(model, ids, {NORMED: sae})
    with Capture(model, [NORMED]) as capture, torch.no_grad():
        model(ids)
        expected = sae.encode(capture[NORMED])[ids != tiny_models.BOS]
    torch.testing.assert_close(codes[NORMED].to_dense(), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"^site layer_1/mlp_in: expected a transcoder that reads mlp_in, got one that"
    ):
        collect(model, ids, {IN: sae})


def test_taps_take_them(model, ids):
    seen = {}
    with Tap(model, [IN, NORMED], lambda site, x: seen.update({site: x.clone()})) as tap, torch.no_grad():
        tap.text_model(input_ids=ids, use_cache=False)
    with Capture(model, [IN, NORMED]) as capture, torch.no_grad():
        model(ids)
    assert all(torch.equal(seen[site], capture[site]) for site in (IN, NORMED))


@pytest.mark.parametrize(("site", "other"), [(IN, NORMED), (NORMED, IN)], ids=["gemma-scope-2", "gemma-scope-1"])
def test_a_transcoder_on_the_other_site_is_far_worse(site, other):
    """The trap: of one width, and with the gain or without. Gains as far from 1 as those of real layers."""
    model = tiny_models.gemma2()
    with torch.no_grad():
        norm_of(model).weight.uniform_(-0.8, 4.0, generator=torch.Generator().manual_seed(0))
    found = harvest(model, tiny_models.tokens(400, 24), [IN, NORMED, MLP])
    n = len(found[MLP]) // 2
    config = TrainConfig.short(d_sae=128, steps=500, batch_size=256, skip=True, l0_coefficient=1e-3)
    trainer = SAETrainer(config, found[site][:n], target=found[MLP][:n])
    for number in range(500):
        rows = torch.randint(n, (256,), generator=torch.Generator().manual_seed(number))
        trainer.update(found[site][rows], found[MLP][rows])
    released = trainer.sae.released()
    right, wrong = (evaluate_transcoder(released, found[each][n:], found[MLP][n:]).fvu for each in (site, other))
    assert right < 0.3
    assert wrong > 2.5 * right
