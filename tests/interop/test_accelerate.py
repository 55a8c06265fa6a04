"""`accelerate` on the objects of the packages themselves. Each test needs its package, and is skipped without it."""

import contextlib
import importlib
import os
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from gemmascope import Site, accelerate, decelerate
from tests import tiny_models as tiny
from tests.helpers import assert_bitwise_equal, assert_within_budget, normal
from tests.saes.parity import assert_same_function, counted, made

D, F, OUT = 24, 160, 16


def package(name: str):
    """The package of that name, whatever it warns of or prints when it is imported."""
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        pytest.importorskip(name.partition(".")[0], exc_type=ImportError)
        return importlib.import_module(name)


@torch.no_grad()
def fill(module):
    """Weights at which some latents fire on a normal deviate, none of them 0."""
    for name, parameter in module.named_parameters():
        short = name.rpartition(".")[2]
        if short == "threshold":
            parameter.copy_(1.7 + 0.2 * torch.randn(parameter.shape))
        elif parameter.ndim == 2:
            parameter.copy_(torch.randn(parameter.shape) * parameter.shape[0 if short == "W_enc" else 1] ** -0.5)
        else:
            parameter.copy_(0.1 * torch.randn(parameter.shape) - int("gate" in name))
    return module


SAELENS = {
    "StandardSAE": {},
    "JumpReLUSAE": {},
    "TopKSAE": {"k": 5},
    "GatedSAE": {},
}
VARIANTS = {
    "as by default": {},
    "folded": {"apply_b_dec_to_input": False},
    "layer_norm": {"normalize_activations": "layer_norm"},
    "constant_norm_rescale": {"normalize_activations": "constant_norm_rescale"},
}
TRANSCODERS = ("Transcoder", "SkipTranscoder", "JumpReLUTranscoder", "JumpReLUSkipTranscoder")


def saelens(name: str, **options):
    """A function that makes an SAE of that class of SAELens."""
    module = package("sae_lens.saes.transcoder" if "Transcoder" in name else "sae_lens")
    config = getattr(module, f"{name}Config")
    return lambda: fill(getattr(module, name)(config(D, F, **options)))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SAELENS)
def test_saelens(name, variant):
    for shape in ((1, D), (3, 11, D)):
        assert_same_function(saelens(name, **SAELENS[name], **VARIANTS[variant]), normal(*shape, seed=1))


def test_saelens_topk_by_the_decoders_norms():
    assert_same_function(saelens("TopKSAE", k=5, rescale_acts_by_decoder_norm=True), normal(33, D, seed=1))


@pytest.mark.parametrize("name", TRANSCODERS)
def test_saelens_transcoders(name):
    make = saelens(name, d_out=OUT, apply_b_dec_to_input=False)
    f, x_hat = assert_same_function(make, normal(3, 11, D, seed=2))
    assert (f.shape, x_hat.shape) == ((3, 11, F), (3, 11, OUT))
    ours, x = accelerate(made(make)), normal(9, D)
    with torch.no_grad():
        both = ours.forward_with_activations(x)
        assert_bitwise_equal("x_hat", both[0], ours(x))


def test_saelens_attention_heads():
    sae_lens = package("sae_lens")
    metadata = sae_lens.saes.sae.SAEMetadata(hook_name="blocks.0.attn.hook_z")
    make = saelens("JumpReLUSAE", reshape_activations="hook_z", metadata=metadata)
    _, x_hat = assert_same_function(make, normal(2, 3, 4, D // 4, seed=3))
    assert x_hat.shape == (2, 3, 4, D // 4)


def test_saelens_object(tmp_path):
    """Saved, folded, moved, copied by their own methods, and hooks fire."""
    sae_lens, make, x = package("sae_lens"), saelens("JumpReLUSAE"), normal(3, 5, D, seed=4)
    theirs, ours = made(make), accelerate(made(make))
    assert isinstance(ours, sae_lens.SAE)
    assert ours.cfg == theirs.cfg
    ours.save_model(tmp_path)
    for name, value in theirs.state_dict().items():
        assert_bitwise_equal(name, load_file(tmp_path / "sae_weights.safetensors")[name], value)
    again = sae_lens.SAE.load_from_disk(tmp_path)
    with torch.no_grad():
        assert_bitwise_equal("reloaded", again(x), theirs(x))
        for sae in (theirs, ours):
            sae.fold_W_dec_norm()
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
        seen = []
        for sae in (theirs, ours):
            for name in ("hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons", "hook_sae_output"):
                getattr(sae, name).add_hook(lambda value, hook: seen.append(value))
            sae(x)
        for one, other in zip(seen[:4], seen[4:], strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
        ours.to(torch.float64)
        assert ours.dtype == ours.encode(x).dtype == torch.float64
    out = ours(x)
    assert out.requires_grad


def test_saelens_what_is_not_taken():
    sae_lens = package("sae_lens")
    config = sae_lens.BatchTopKTrainingSAEConfig(D, F, k=3)
    with pytest.raises(ValueError, match=r"got BatchTopKTrainingSAE \(save_inference_model"):
        accelerate(sae_lens.BatchTopKTrainingSAE(config))
    with pytest.raises(ValueError, match="got MatchingPursuitSAE"):
        accelerate(sae_lens.MatchingPursuitSAE(sae_lens.MatchingPursuitSAEConfig(D, F)))


def test_saelens_batchtopk_as_it_is_stored(tmp_path):
    sae_lens = package("sae_lens")
    training = sae_lens.BatchTopKTrainingSAE(sae_lens.BatchTopKTrainingSAEConfig(D, F, k=3))
    training.topk_threshold.fill_(0.02)
    training.save_inference_model(tmp_path)
    f, _ = assert_same_function(lambda: sae_lens.SAE.load_from_disk(tmp_path), normal(33, D, seed=5))
    assert 0 < f.count_nonzero() < f.numel() / 4


@pytest.mark.parametrize("error_term", [False, True])
def test_a_hooked_transformer(error_term):
    sae_lens = package("sae_lens")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformer_lens = importlib.import_module("transformer_lens")
        config = transformer_lens.HookedTransformerConfig(
            n_layers=2, d_model=D, n_ctx=16, d_head=6, n_heads=4, d_vocab=31, act_fn="gelu", device="cpu", seed=0
        )
        model = sae_lens.HookedSAETransformer(config)
        tokens = torch.randint(31, (2, 8), generator=torch.Generator().manual_seed(0))
        saes = []
        for i, (name, hook, options) in enumerate(
            [
                ("JumpReLUSAE", "blocks.0.hook_resid_post", {}),
                ("TopKSAE", "blocks.1.hook_mlp_out", {"k": 5}),
                ("JumpReLUSAE", "blocks.1.attn.hook_z", {"reshape_activations": "hook_z"}),
            ]
        ):
            metadata = sae_lens.saes.sae.SAEMetadata(hook_name=hook)
            saes.append(made(saelens(name, metadata=metadata, **options), i))
            model.add_sae(saes[-1], use_error_term=error_term)
        names = ("blocks.0.hook_resid_post.hook_sae_acts_post", "blocks.1.hook_mlp_out.hook_sae_acts_pre")
        with torch.no_grad():
            expected, clean = model(tokens), model.run_with_cache(tokens)[1]
            assert accelerate(model) is model
            with counted() as calls:
                found = model(tokens)
            cached = model.run_with_cache(tokens)[1]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            for name in names:
                torch.testing.assert_close(cached[name], clean[name], rtol=1e-4, atol=1e-5)
            assert calls["encode"] == 2 * (1 + error_term)
            assert calls["preactivations"] == 1 + error_term
            decelerate(model)
            assert_bitwise_equal("given back", model(tokens), expected)


def test_a_transformer_bridge(tmp_path):
    """TransformerLens' wrapper of a transformers model, with SAELens's SAEs in it."""
    sae_lens = package("sae_lens")
    if not hasattr(sae_lens, "SAETransformerBridge"):
        pytest.skip("this SAELens has no SAETransformerBridge")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hf_model = tiny.gemma2()
        words = {str(token): token for token in range(hf_model.config.vocab_size)}
        PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel(words, unk_token="0")), bos_token="2", eos_token="1", pad_token="0"
        ).save_pretrained(tmp_path)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
        model = sae_lens.SAETransformerBridge.boot_transformers(
            "google/gemma-2-2b", hf_model=hf_model, tokenizer=tokenizer, device="cpu"
        )
        tokens, clean = tiny.tokens(), None
        for layer, name in enumerate(("hook_resid_post", "hook_mlp_out")):
            metadata = sae_lens.saes.sae.SAEMetadata(hook_name=f"blocks.{layer}.{name}")
            config = sae_lens.JumpReLUSAEConfig(tiny.width(Site(layer, "resid")), F, metadata=metadata)
            sae = fill(sae_lens.JumpReLUSAE(config))
            with torch.no_grad():
                clean = model(tokens) if clean is None else clean
            model.add_sae(sae)
        with torch.no_grad():
            expected = model(tokens)
            assert (expected - clean).abs().max() > 0.01
            assert accelerate(model) is model
            with counted() as calls:
                found = model(tokens)
            assert calls["encode"] == 2
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            decelerate(model)
            assert_bitwise_equal("given back", model(tokens), expected)


def dictionary(name: str, **options):
    module = {
        "AutoEncoderTopK": "trainers.top_k",
        "BatchTopKSAE": "trainers.batch_top_k",
        "MatryoshkaBatchTopKSAE": "trainers.matryoshka_batch_top_k",
    }.get(name, "dictionary")
    kind = getattr(package(f"dictionary_learning.{module}"), name)

    def make():
        sae = fill(kind(D, F, **options))
        if "BatchTopK" in name:
            sae.threshold.fill_(1.2)
        return sae

    return make


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AutoEncoder", {}),
        ("AutoEncoderNew", {}),
        ("GatedAutoEncoder", {}),
        ("JumpReluAutoEncoder", {}),
        ("AutoEncoderTopK", {"k": 5}),
        ("BatchTopKSAE", {"k": 5}),
        ("MatryoshkaBatchTopKSAE", {"k": 5, "group_sizes": [60, 100]}),
    ],
)
def test_dictionary_learning(name, options):
    make, x = dictionary(name, **options), normal(33, D, seed=6)
    assert_same_function(make, x)
    theirs, ours = made(make), accelerate(made(make))
    with torch.no_grad():
        for one, other in zip(ours(x, output_features=True), theirs(x, output_features=True), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        for sae in (theirs, ours):
            sae.scale_biases(2.0) if hasattr(sae, "scale_biases") else None
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_dictionary_learning_what_is_not_taken():
    with pytest.raises(ValueError, match="got IdentityDict"):
        accelerate(package("dictionary_learning.dictionary").IdentityDict(D))


@pytest.mark.parametrize(
    "options", [{}, {"activation": "groupmax"}, {"transcode": True, "skip_connection": True}], ids=str
)
def test_sparsify(options, tmp_path):
    sparsify = package("sparsify")
    make = lambda: fill(sparsify.SparseCoder(D, sparsify.SparseCoderConfig(num_latents=F, k=8, **options)))  # noqa: E731
    theirs, exact, ours, x = made(make), made(make).double(), accelerate(made(make)), normal(33, D, seed=7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of autocast for GPUs where there is none
        with torch.no_grad(), counted() as calls:
            found, plain, goal = ours(x), theirs(x), exact(x.double())
        assert type(found) is type(plain)
        for name in ("sae_out", "fvu"):
            assert_within_budget(name, getattr(found, name), getattr(goal, name), getattr(plain, name))
        assert torch.equal(found.latent_indices.sort(1).values, plain.latent_indices.sort(1).values)
        assert calls == {"encode": 0, "decode": 1, "preactivations": 1}
        ours.save_to_disk(tmp_path)
        with torch.no_grad():
            assert_bitwise_equal("saved", sparsify.SparseCoder.load_from_disk(tmp_path)(x).sae_out, plain.sae_out)
        ours(x).fvu.backward()
        assert ours.W_dec.grad.any()
