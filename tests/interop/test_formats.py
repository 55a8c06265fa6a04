"""Files between here and other packages: the same bits of encode and decode on both sides.

Weights and inputs are whole numbers whose sums are exact in fp32, so that results are equal exactly when the functions
are, whatever the order of a sum; values at the threshold and equal values are common among them.
"""

import contextlib
import importlib
import importlib.metadata
import itertools
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemmascope import CrossLayerTranscoder, JumpReLUSAE, TopKSAE, Transcoder, load_sae
from gemmascope.suite import export_saes
from tests.helpers import lattice
from tests.interop.table import (
    CIRCUIT_TRACER,
    CIRCUIT_TRACER_CLT,
    DICTIONARY_LEARNING,
    GEMMA_SCOPE,
    GEMMA_SCOPE_2,
    GEMMA_SCOPE_2_CLT,
    MODULES,
    PROOFS,
    SAELENS,
    SPARSIFY,
    Proof,
    versions,
)
from tests.saes.test_clt import clt_tensors

D_IN, D_SAE, K = 12, 48, 5
SITE = {"model": "google/gemma-2-2b", "site": "model.layers.0.output", "layer": 0}
SITES = {
    "model": "google/gemma-3-1b-pt",
    "site": "model.layers.0.pre_feedforward_layernorm.output",
    "site_out": "model.layers.0.post_feedforward_layernorm.output",
    "layer": 0,
}
CLT_SITES = {"sites": "site", "sites_out": "site_out"}


def package(name: str):
    """The module of the package ``name``, whatever it warns of or prints when it is imported."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        pytest.importorskip(MODULES[name], exc_type=ImportError)
        return importlib.import_module(MODULES[name])


def whole(*shape: int, seed: int, reach: int = 2) -> Tensor:
    return lattice(*shape, seed=seed, step=1.0, reach=reach)


@torch.no_grad()
def filled(module, threshold: int = 6, reach: int = 2):
    """``module`` with whole numbers for weights; encoder biases tell latents apart, so that no two z are equal."""
    for number, (name, parameter) in enumerate(sorted(module.named_parameters())):
        parameter.copy_(whole(*parameter.shape, seed=number, reach=reach))
        if parameter.ndim == 1 and len(parameter) == D_SAE and "threshold" not in name:
            parameter += torch.arange(D_SAE) / 64
    if isinstance(getattr(module, "threshold", None), torch.nn.Parameter):
        module.threshold.copy_(whole(*module.threshold.shape, seed=99, reach=reach).abs() + threshold)
    if hasattr(module, "r_mag"):
        module.r_mag.zero_()  # of which the exponential is a whole number
    return module


def transcoder(skip: bool) -> Transcoder:
    shapes = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_enc": (D_SAE,), "b_dec": (D_IN,)}
    shapes |= {"threshold": (D_SAE,)} | ({"W_skip": (D_IN, D_IN)} if skip else {})
    return filled(Transcoder({key: torch.zeros(shape) for key, shape in shapes.items()}, metadata=SITES))


@torch.no_grad()
def assert_one_function(
    ours, encode: Callable, decode: Callable, forward: Callable | None = None, *, decode_takes_input: bool = False
) -> None:
    d_in = ours.W_enc.shape[0]
    x = whole(5, 7, d_in, seed=1, reach=1)
    f, theirs = ours.encode(x), encode(x)
    assert torch.equal(f, theirs)
    fired = (f != 0).float().mean().item()
    assert 0.001 < fired < 0.6, "enough fire to tell, and not all"
    if decode_takes_input:
        assert torch.equal(ours.decode(f, x), decode(theirs, x))
    else:
        assert torch.equal(ours.decode(f), decode(theirs))
    if forward is not None:
        assert torch.equal(ours(x), forward(x))


def exported(sae, format: str, folder: Path, **options) -> Path:
    """The folder of ``sae`` in ``format``, by way of a file of ours."""
    sae.save(folder / "ours")
    export_saes([folder / "ours"], format, folder / "theirs", **options)
    return folder / "theirs"


# ---- SAELens


def saelens_reads(ours, tmp_path: Path) -> None:
    found = package("sae-lens").SAE.load_from_disk(exported(ours, "saelens", tmp_path))
    for name, parameter in ours.named_parameters():
        assert torch.equal(getattr(found, name), parameter), name
    assert_one_function(ours, found.encode, found.decode, found)


def saelens_out_jumprelu(tmp_path, monkeypatch):
    for bias in (False, True):
        sae = filled(JumpReLUSAE(D_IN, D_SAE, pre_encoder_bias=bias, metadata=SITE))
        saelens_reads(sae, tmp_path / str(bias))


def saelens_out_topk(tmp_path, monkeypatch):
    for bias in (False, True):
        saelens_reads(filled(TopKSAE(D_IN, D_SAE, K, pre_encoder_bias=bias, metadata=SITE)), tmp_path / str(bias))


def saelens_out_transcoder(tmp_path, monkeypatch):
    saelens_reads(transcoder(skip=False), tmp_path)


def saelens_out_skip_transcoder(tmp_path, monkeypatch):
    saelens_reads(transcoder(skip=True), tmp_path)


def saelens_writes(tmp_path: Path, architecture: str, **options) -> None:
    sae_lens = package("sae-lens")
    for bias in (False, True):
        config = {"architecture": architecture, "d_in": D_IN, "d_sae": D_SAE, "apply_b_dec_to_input": bias, **options}
        sae = filled(sae_lens.SAE.from_dict(config | {"dtype": "float32", "device": "cpu", "metadata": {}}))
        sae.save_model(tmp_path / str(bias))
        assert_one_function(load_sae(tmp_path / str(bias)), sae.encode, sae.decode, sae)


def saelens_in_standard(tmp_path, monkeypatch):
    saelens_writes(tmp_path, "standard")


def saelens_in_jumprelu(tmp_path, monkeypatch):
    saelens_writes(tmp_path, "jumprelu")


def saelens_in_topk(tmp_path, monkeypatch):
    saelens_writes(tmp_path, "topk", k=K)


def saelens_in_gated(tmp_path, monkeypatch):
    saelens_writes(tmp_path, "gated")


def saelens_in_batchtopk(tmp_path, monkeypatch):
    """As SAELens stores it once it is trained: with one threshold in the place of the batch's k."""
    sae_lens = package("sae-lens")
    config = sae_lens.BatchTopKTrainingSAEConfig(D_IN, D_SAE, k=K, device="cpu")
    sae = filled(sae_lens.BatchTopKTrainingSAE(config))
    sae.topk_threshold.fill_(7)
    sae.save_inference_model(tmp_path / "it")
    found = sae_lens.SAE.load_from_disk(tmp_path / "it")
    assert_one_function(load_sae(tmp_path / "it"), found.encode, found.decode, found)


def by_a_loader_of_the_hub(repo: str, folder: str, loader: str, root: Path, monkeypatch):
    """The SAE that SAELens makes of a file of a repository, which lies under ``root``."""
    sae_lens = package("sae-lens")
    loaders = importlib.import_module("sae_lens.loading.pretrained_sae_loaders")

    def fetch(repo_id, filename, subfolder=None, **_):
        return str(root / (subfolder or "") / filename)

    def shapes(repo_id, filename):
        return {key: list(tensor.shape) for key, tensor in load_file(root / filename).items()}

    monkeypatch.setattr(loaders, "hf_hub_download", fetch)
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes, raising=False)
    config, state, _ = getattr(loaders, loader)(repo, folder, "cpu", False, None)
    sae = sae_lens.SAE.from_dict(loaders.handle_config_defaulting(config))
    sae.load_state_dict(state)
    return sae


def gemma_scope_is_read(sae, format: str, loader: str, repo: str, folder: str, tmp_path: Path, monkeypatch):
    """What SAELens makes of ``sae`` as that ``format`` in a ``folder`` of a repository of DeepMind's."""
    sae.save(tmp_path / "ours")
    export_saes([tmp_path / "ours"], format, tmp_path / folder)
    found = by_a_loader_of_the_hub(f"google/{repo}", folder, loader, tmp_path, monkeypatch)
    assert_one_function(load_sae(tmp_path / folder), found.encode, found.decode, found)
    return found


def gemma_scope_jumprelu(tmp_path, monkeypatch):
    """Of the least sizes there are names for: SAELens takes d_model from the repository's, d_sae from the folder's."""
    sae = filled(JumpReLUSAE(2304, 4096, pre_encoder_bias=False, metadata=SITE), threshold=80, reach=1)
    names = ("gemma_2_sae_huggingface_loader", "gemma-scope-2b-pt-res", "layer_0/width_4k/average_l0_5")
    gemma_scope_is_read(sae, "gemma-scope", *names, tmp_path, monkeypatch)


def gemma_scope_2_jumprelu(tmp_path, monkeypatch):
    sae = filled(JumpReLUSAE(D_IN, D_SAE, pre_encoder_bias=False, metadata=SITE))
    names = ("gemma_3_sae_huggingface_loader", "gemma-scope-2-270m-pt", "resid_post/layer_0_width_48_l0_medium")
    found = gemma_scope_is_read(sae, "gemma-scope-2", *names, tmp_path, monkeypatch)
    assert found.cfg.metadata.hf_hook_name == "model.layers.0.output"


# ---- circuit-tracer


def circuit_tracer_reads(format: str, loader: str, skip: bool, tmp_path: Path) -> None:
    package("circuit-tracer")
    module = importlib.import_module("circuit_tracer.transcoder.single_layer_transcoder")
    ours, folder = transcoder(skip), exported(transcoder(skip), format, tmp_path)
    [file] = [*folder.glob("*.npz"), *folder.glob("*.safetensors")]
    options = {"lazy_encoder": False, "lazy_decoder": False}
    found = getattr(module, loader)(str(file), 0, device=torch.device("cpu"), dtype=torch.float32, **options)
    for sae in (ours, Transcoder.load(file)):
        assert_one_function(sae, found.encode, found.decode, found, decode_takes_input=True)


def circuit_tracer_transcoder(tmp_path, monkeypatch):
    circuit_tracer_reads("circuit-tracer", "load_relu_transcoder", False, tmp_path)


def circuit_tracer_skip_transcoder(tmp_path, monkeypatch):
    circuit_tracer_reads("circuit-tracer", "load_relu_transcoder", True, tmp_path)


def gemma_scope_transcoder(tmp_path, monkeypatch):
    circuit_tracer_reads("gemma-scope", "load_gemma_scope_transcoder", False, tmp_path)


def gemma_scope_2_transcoder(tmp_path, monkeypatch):
    circuit_tracer_reads("gemma-scope-2", "load_gemma_scope_2_transcoder", False, tmp_path)


def gemma_scope_2_skip_transcoder(tmp_path, monkeypatch):
    circuit_tracer_reads("gemma-scope-2", "load_gemma_scope_2_transcoder", True, tmp_path)


def clt(skip: bool) -> CrossLayerTranscoder:
    """Three layers; ``filled`` would take another tensor's size for that of a threshold."""
    layers = clt_tensors(skip, whole, d_in=(D_IN,) * 3, d_sae=(D_SAE,) * 3, d_out=(D_IN,) * 3)
    for tensors in layers:
        tensors["threshold"] += 6
    sites = {key: [SITES[name].replace("0", str(layer)) for layer in range(3)] for key, name in CLT_SITES.items()}
    return CrossLayerTranscoder(layers, metadata={"model": SITES["model"], **sites})


@torch.no_grad()
def assert_one_clt(ours: CrossLayerTranscoder, theirs) -> None:
    """theirs: a CrossLayerTranscoder of circuit-tracer."""
    xs = [whole(35, D_IN, seed=layer, reach=1) for layer in range(3)]
    fired = [(f != 0).float().mean().item() for f in ours.encode(xs)]
    assert all(0.001 < each < 0.6 for each in fired), "enough fire to tell, and not all"
    x = torch.stack(xs)
    codes, outputs = theirs.encode(x), theirs.decode(theirs.encode(x), x)  # its forward forgets x for a skip
    for one, two in ((ours.encode(xs), codes), (ours(xs), outputs)):
        assert all(itertools.starmap(torch.equal, zip(one, two, strict=True)))


def circuit_tracer_clt(tmp_path, monkeypatch):
    package("circuit-tracer")
    module = importlib.import_module("circuit_tracer.transcoder.cross_layer_transcoder")
    clt(False).save(tmp_path / "clt")
    for lazy in (False, True):
        options = {"device": torch.device("cpu"), "dtype": torch.float32, "lazy_encoder": lazy, "lazy_decoder": lazy}
        found = module.load_clt(str(tmp_path / "clt"), "mlp.hook_in", "hook_mlp_out", **options)
        assert_one_clt(clt(False), found)
    assert_one_clt(CrossLayerTranscoder.load(tmp_path / "clt"), found)


def gemma_scope_2_is_read_as_clt(skip: bool, folder: Path) -> None:
    package("circuit-tracer")
    module = importlib.import_module("circuit_tracer.transcoder.cross_layer_transcoder")
    for layer, tensors in enumerate(clt(skip).tensors):
        w_dec = torch.ones(D_SAE, 3, D_IN)
        w_dec[:, layer:] = tensors["W_dec"].view(D_SAE, -1, D_IN)
        theirs = {"w_enc": tensors["W_enc"], "w_dec": w_dec} | {k: tensors[k] for k in ("b_enc", "b_dec", "threshold")}
        if skip:
            theirs["affine_skip_connection"] = tensors["W_skip"].T
        theirs = {key: tensor.contiguous() for key, tensor in theirs.items()}
        save_file(theirs, folder / f"params_layer_{layer}.safetensors")
    paths = {layer: str(folder / f"params_layer_{layer}.safetensors") for layer in range(3)}
    options = {"device": torch.device("cpu"), "dtype": torch.float32}
    found = module.load_gemma_scope_2_clt(paths | {3: ""}, **options)  # it stops one short of the largest number
    assert_one_clt(CrossLayerTranscoder.load(folder), found)


def gemma_scope_2_clt(tmp_path, monkeypatch):
    gemma_scope_2_is_read_as_clt(False, tmp_path)


def gemma_scope_2_skip_clt(tmp_path, monkeypatch):
    gemma_scope_2_is_read_as_clt(True, tmp_path)


# ---- sparsify and dictionary_learning


def sparsify_topk(tmp_path, monkeypatch):
    sparsify = package("eai-sparsify")
    coder = filled(sparsify.SparseCoder(D_IN, sparsify.SparseCoderConfig(num_latents=D_SAE, k=K), device="cpu"))
    coder.save_to_disk(tmp_path / "it")

    def encode(x):
        found = coder.encode(x)
        zeros = torch.zeros(*x.shape[:-1], D_SAE)
        return zeros.scatter(-1, found.top_indices, found.top_acts)

    def decode(f):
        acts, indices = f.flatten(0, 1).topk(K)
        return coder.decode(acts, indices).reshape(*f.shape[:-1], D_IN)

    assert_one_function(load_sae(tmp_path / "it"), encode, decode)


def dictionary_learning_in(name: str, *arguments, module: str = "dictionary", threshold: float | None = None):
    """What proves a class of dictionary_learning: files that hold one are read."""

    def proof(tmp_path, monkeypatch):
        package("dictionary-learning")
        kind = getattr(importlib.import_module(f"dictionary_learning.{module}"), name)
        dictionary = filled(kind(D_IN, D_SAE, *arguments))
        if threshold is not None:
            dictionary.threshold.fill_(threshold)
        trainer = {"dict_class": name, "activation_dim": D_IN, "dict_size": D_SAE}
        tmp_path.joinpath("config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
        torch.save(dictionary.state_dict(), tmp_path / "ae.pt")
        assert_one_function(load_sae(tmp_path), dictionary.encode, dictionary.decode, dictionary)

    return proof


HOW = {
    (GEMMA_SCOPE, "both", "JumpReLU"): gemma_scope_jumprelu,
    (GEMMA_SCOPE, "both", "transcoder"): gemma_scope_transcoder,
    (GEMMA_SCOPE_2, "both", "JumpReLU"): gemma_scope_2_jumprelu,
    (GEMMA_SCOPE_2, "both", "transcoder"): gemma_scope_2_transcoder,
    (GEMMA_SCOPE_2, "both", "skip transcoder"): gemma_scope_2_skip_transcoder,
    (SAELENS, "in", "standard"): saelens_in_standard,
    (SAELENS, "in", "JumpReLU"): saelens_in_jumprelu,
    (SAELENS, "in", "TopK"): saelens_in_topk,
    (SAELENS, "in", "gated"): saelens_in_gated,
    (SAELENS, "in", "BatchTopK"): saelens_in_batchtopk,
    (SAELENS, "out", "JumpReLU"): saelens_out_jumprelu,
    (SAELENS, "out", "TopK"): saelens_out_topk,
    (SAELENS, "out", "transcoder"): saelens_out_transcoder,
    (SAELENS, "out", "skip transcoder"): saelens_out_skip_transcoder,
    (CIRCUIT_TRACER, "both", "transcoder"): circuit_tracer_transcoder,
    (CIRCUIT_TRACER, "both", "skip transcoder"): circuit_tracer_skip_transcoder,
    (CIRCUIT_TRACER_CLT, "both", "CLT"): circuit_tracer_clt,
    (GEMMA_SCOPE_2_CLT, "in", "CLT"): gemma_scope_2_clt,
    (GEMMA_SCOPE_2_CLT, "in", "skip CLT"): gemma_scope_2_skip_clt,
    (SPARSIFY, "in", "TopK"): sparsify_topk,
    (DICTIONARY_LEARNING, "in", "standard"): dictionary_learning_in("AutoEncoder"),
    (DICTIONARY_LEARNING, "in", "JumpReLU"): dictionary_learning_in("JumpReluAutoEncoder"),
    (DICTIONARY_LEARNING, "in", "TopK"): dictionary_learning_in("AutoEncoderTopK", K, module="trainers.top_k"),
    (DICTIONARY_LEARNING, "in", "gated"): dictionary_learning_in("GatedAutoEncoder"),
    (DICTIONARY_LEARNING, "in", "BatchTopK"): dictionary_learning_in(
        "BatchTopKSAE", K, module="trainers.batch_top_k", threshold=7
    ),
}


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_of_this_run(proof: Proof) -> bool:
    """With the older version of a package, only what is proven with it too."""
    return installed(proof.package) == versions()[proof.package][0] or (
        proof.old and installed(proof.package) == versions()[proof.package][-1]
    )


@pytest.mark.parametrize("proof", [proof for proof in PROOFS if is_of_this_run(proof)], ids=str)
def test_bit_equal(proof, tmp_path, monkeypatch):
    for folder in ("True", "False"):
        (tmp_path / folder).mkdir()
    HOW[proof.format, proof.way, proof.kind](tmp_path, monkeypatch)


def test_the_versions_are_those_of_the_table():
    for name, known in versions().items():
        found = installed(name)
        assert found is None or found in known, f"{name} {found}: expected one of {', '.join(known)}"
    assert len(versions()["sae-lens"]) == 2
