"""SAEs and transcoders in the formats of others: which files, which keys, which bits, and what is refused."""

import json
import os

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from gemmascope import JumpReLUSAE
from gemmascope.errors import EnvironmentProblemError
from gemmascope.formats import export, hook_names
from gemmascope.formats.export import FORMATS, TRANSCODER, write
from gemmascope.formats.manifest import SAEConfig
from gemmascope.formats.stored import KEYS
from tests.formats.test_release import METADATA, assert_same_bits, make_sae
from tests.helpers import lattice, normal

D_IN, D_SAE, D_OUT = 4, 7, 5
SITES = {
    "site": "model.layers.3.pre_feedforward_layernorm.output",
    "site_out": "model.layers.3.post_feedforward_layernorm.output",
}
FACTS = {"model": "google/gemma-3-1b-pt", "layer": 3, "average_l0": 21.4, **SITES}


def tensors_of(sae: JumpReLUSAE) -> dict[str, Tensor]:
    return {key: getattr(sae, key).detach() for key in KEYS}


def transcoder_tensors(dtype=torch.float32, skip=True, seed=0) -> dict[str, Tensor]:
    shapes = {
        "W_enc": (D_IN, D_SAE),
        "W_dec": (D_SAE, D_OUT),
        "b_enc": (D_SAE,),
        "b_dec": (D_OUT,),
        "threshold": (D_SAE,),
        "W_skip": (D_OUT, D_IN),
    }
    made = {key: normal(*shape, seed=seed + n).to(dtype) for n, (key, shape) in enumerate(shapes.items())}
    made["threshold"] = made["threshold"].abs().to(torch.promote_types(dtype, torch.float32))
    return made if skip else {key: tensor for key, tensor in made.items() if key != "W_skip"}


def transcoder_config(**changes) -> SAEConfig:
    return SAEConfig(metadata=FACTS | changes, architecture=TRANSCODER)


def topk_tensors() -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors_of(make_sae()).items() if key != "threshold"}


def files_in(folder) -> list[str]:
    return sorted(os.listdir(folder))


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


# ---- what is written


@pytest.mark.parametrize(
    ("format", "dtype"),
    [
        (format, dtype)
        for format in ("gemma-scope", "gemma-scope-2", "safetensors")
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        if (format, dtype) != ("gemma-scope", torch.float64)
    ],
)
def test_what_is_written_is_read_back_to_the_same_bits(tmp_path, format, dtype):
    sae = make_sae(dtype)
    said = write(format, tensors_of(sae), SAEConfig(metadata=METADATA), tmp_path / "sae")
    widened = format == "gemma-scope" and dtype in export.HALVES
    assert len(said) == widened
    assert_same_bits(JumpReLUSAE.load(tmp_path / "sae"), sae.float() if widened else sae)


def test_gemma_scope_2_has_deepminds_keys(tmp_path):
    sae = make_sae()
    assert write("gemma-scope-2", tensors_of(sae), SAEConfig(metadata=METADATA), tmp_path / "sae") == []
    assert files_in(tmp_path / "sae") == ["config.json", "params.safetensors"]
    stored = safetensors.torch.load_file(tmp_path / "sae" / "params.safetensors")
    assert_equal(stored, {key.lower(): tensor for key, tensor in tensors_of(sae).items()})
    assert json.loads((tmp_path / "sae" / "config.json").read_text()) == {
        "hf_hook_point_in": "model.layers.3.output",
        "hf_hook_point_out": "model.layers.3.output",
        "width": 7,
        "model_name": "google/gemma-2-2b",
        "architecture": "jump_relu",
        "l0": 5.5,
        "affine_connection": False,
        "type": "sae",
    }
    loaded = JumpReLUSAE.load(tmp_path / "sae")
    assert loaded.metadata == {"model": "google/gemma-2-2b", "site": "model.layers.3.output", "l0": 5.5}


def test_saelens_files(tmp_path):
    sae = make_sae()
    assert write("saelens", tensors_of(sae), SAEConfig(metadata=METADATA), tmp_path / "sae") == []
    assert files_in(tmp_path / "sae") == ["cfg.json", "sae_weights.safetensors"]
    assert_equal(safetensors.torch.load_file(tmp_path / "sae" / "sae_weights.safetensors"), tensors_of(sae))
    assert json.loads((tmp_path / "sae" / "cfg.json").read_text()) == {
        "architecture": "jumprelu",
        "d_in": 4,
        "d_sae": 7,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.0.0",
            "model_name": "google/gemma-2-2b",
            "hook_name": "blocks.3.hook_resid_post",
            "hf_hook_name": "model.layers.3.output",
            "average_l0": 5.5,
        },
    }


def test_saelens_keeps_a_pre_encoder_bias(tmp_path):
    """It has a place for that, so nothing is rounded anew."""
    sae = make_sae()
    config = SAEConfig(pre_encoder_bias=True, metadata=METADATA)
    assert write("saelens", tensors_of(sae), config, tmp_path / "sae") == []
    assert json.loads((tmp_path / "sae" / "cfg.json").read_text())["apply_b_dec_to_input"] is True
    assert_equal(safetensors.torch.load_file(tmp_path / "sae" / "sae_weights.safetensors"), tensors_of(sae))


def test_saelens_reshapes_heads(tmp_path):
    metadata = METADATA | {"site": "model.layers.3.self_attn.o_proj.input"}
    write("saelens", tensors_of(make_sae()), SAEConfig(metadata=metadata), tmp_path / "sae")
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    assert (config["reshape_activations"], config["metadata"]["hook_name"]) == ("hook_z", "blocks.3.attn.hook_z")


def test_saelens_topk(tmp_path):
    config = SAEConfig(metadata=METADATA, architecture="topk", k=3, pre_encoder_bias=True)
    assert write("saelens", topk_tensors(), config, tmp_path / "sae") == []
    told = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    assert (told["architecture"], told["k"], told["rescale_acts_by_decoder_norm"]) == ("topk", 3, False)
    assert told["apply_b_dec_to_input"] is True
    assert_equal(safetensors.torch.load_file(tmp_path / "sae" / "sae_weights.safetensors"), topk_tensors())


@pytest.mark.parametrize("dtype", export.HALVES)
def test_saelens_gets_16_bits_as_fp32(tmp_path, dtype):
    """It would round the threshold to 16 bits, and the gate would move."""
    sae = make_sae(dtype)
    [said] = write("saelens", tensors_of(sae), SAEConfig(metadata=METADATA), tmp_path / "sae")
    assert said.endswith("written as float32, which holds the same values")
    assert_equal(
        safetensors.torch.load_file(tmp_path / "sae" / "sae_weights.safetensors"), tensors_of(make_sae(dtype).float())
    )
    assert json.loads((tmp_path / "sae" / "cfg.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("skip", [False, True])
def test_saelens_transcoder(tmp_path, skip):
    write("saelens", transcoder_tensors(skip=skip), transcoder_config(), tmp_path / "it")
    assert_equal(
        safetensors.torch.load_file(tmp_path / "it" / "sae_weights.safetensors"), transcoder_tensors(skip=skip)
    )
    told = json.loads((tmp_path / "it" / "cfg.json").read_text())
    assert told["architecture"] == ("jumprelu_skip_transcoder" if skip else "jumprelu_transcoder")
    assert (told["d_in"], told["d_sae"], told["d_out"]) == (D_IN, D_SAE, D_OUT)
    assert told["metadata"] == {
        "sae_lens_version": "6.0.0",
        "model_name": "google/gemma-3-1b-pt",
        "hook_name": "blocks.3.mlp.hook_in",
        "hf_hook_name": SITES["site"],
        "average_l0": 21.4,
        "hook_name_out": "blocks.3.hook_mlp_out",
        "hf_hook_name_out": SITES["site_out"],
    }


def test_gemma_scope_2_transcoder_has_its_skip_turned(tmp_path):
    write("gemma-scope-2", transcoder_tensors(), transcoder_config(), tmp_path / "it")
    stored = safetensors.torch.load_file(tmp_path / "it" / "params.safetensors")
    assert torch.equal(stored["affine_skip_connection"], transcoder_tensors()["W_skip"].T)
    told = json.loads((tmp_path / "it" / "config.json").read_text())
    assert (told["type"], told["affine_connection"]) == ("transcoder", True)
    assert (told["hf_hook_point_in"], told["hf_hook_point_out"]) == tuple(SITES.values())


def test_circuit_tracer_set(tmp_path):
    made = {layer: transcoder_tensors(seed=layer) for layer in range(2)}
    for layer, tensors in made.items():
        sites = {key: site.replace("layers.3", f"layers.{layer}") for key, site in SITES.items()}
        assert write("circuit-tracer", tensors, transcoder_config(layer=layer, **sites), tmp_path / "set") == []
    assert files_in(tmp_path / "set") == ["config.yaml", "layer_0.safetensors", "layer_1.safetensors"]
    for layer, tensors in made.items():
        stored = safetensors.torch.load_file(tmp_path / "set" / f"layer_{layer}.safetensors")
        theirs = {key: tensor for key, tensor in tensors.items() if key != "threshold"}
        theirs |= {"W_enc": tensors["W_enc"].T, "activation_function.threshold": tensors["threshold"]}
        assert_equal(stored, theirs)
    assert (tmp_path / "set" / "config.yaml").read_text() == (
        'model_name: "google/gemma-3-1b-pt"\nmodel_kind: "transcoder_set"\n'
        'feature_input_hook: "mlp.hook_in"\nfeature_output_hook: "hook_mlp_out"\n'
    )


def test_gemma_scope_transcoder_says_what_it_is(tmp_path):
    """The arrays are those of an SAE: read as one, it would be wrong in silence."""
    write("gemma-scope", transcoder_tensors(skip=False), transcoder_config(), tmp_path / "it")
    with np.load(tmp_path / "it" / "params.npz", allow_pickle=False) as file:
        assert sorted(file.files) == sorted(KEYS)
        assert np.array_equal(file["W_enc"], transcoder_tensors()["W_enc"].numpy())
    with pytest.raises(ValueError, match=r"expected 'sae', found 'transcoder': read it with Transcoder.load"):
        JumpReLUSAE.load(tmp_path / "it")


@pytest.mark.parametrize("format", ["gemma-scope", "gemma-scope-2", "saelens"])
def test_what_has_no_room_for_a_scale_gets_a_folded_sae(tmp_path, format):
    """On numbers whose sums are exact, the same bits as `JumpReLUSAE.fold`, and the same function."""
    sae = JumpReLUSAE(D_IN, D_SAE, input_scale=2.0)
    with torch.no_grad():
        for number, parameter in enumerate(sae.parameters()):
            parameter.copy_(lattice(*parameter.shape, seed=number))
        sae.threshold.abs_()
    tensors = tensors_of(sae)
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    [said] = write(format, tensors, SAEConfig(2.0, True, METADATA), tmp_path / "sae")
    assert said == (
        "folded: input_scale 2 and the pre-encoder bias moved into the weights, the same function, rounded anew"
    )
    assert_equal(tensors, before)
    if format == "saelens":
        assert_equal(safetensors.torch.load_file(tmp_path / "sae" / "sae_weights.safetensors"), tensors_of(sae.fold()))
        return
    loaded, x = JumpReLUSAE.load(tmp_path / "sae"), lattice(9, D_IN, seed=9)
    assert_same_bits(loaded, sae.fold())
    assert torch.equal(loaded(x), sae(x))


def test_our_own_format_folds_nothing(tmp_path):
    sae = make_sae(folded=False)
    config = SAEConfig(sae.input_scale, True, METADATA)
    assert write("safetensors", tensors_of(sae), config, tmp_path / "sae") == []
    assert_same_bits(JumpReLUSAE.load(tmp_path / "sae"), sae)


def test_dtype_is_that_asked_for(tmp_path):
    sae = make_sae(torch.float64)
    config = SAEConfig(metadata=METADATA)
    assert write("gemma-scope", tensors_of(sae), config, tmp_path / "sae", dtype=torch.float32) == []
    assert_same_bits(JumpReLUSAE.load(tmp_path / "sae"), sae.float())
    write("gemma-scope-2", tensors_of(make_sae()), config, tmp_path / "half", dtype=torch.bfloat16)
    half = JumpReLUSAE.load(tmp_path / "half")
    assert (half.W_enc.dtype, half.threshold.dtype) == (torch.bfloat16, torch.float32)
    assert_same_bits(half, make_sae().to(torch.bfloat16))


def test_metadata_of_other_kinds_is_left_out(tmp_path):
    """It is free-form: what is no text says nothing about a site."""
    config = SAEConfig(metadata={"site": 3, "model": ["a"], "layer": "x"})
    write("saelens", tensors_of(make_sae()), config, tmp_path / "lens")
    assert json.loads((tmp_path / "lens" / "cfg.json").read_text())["metadata"] == {"sae_lens_version": "6.0.0"}
    write("gemma-scope-2", tensors_of(make_sae()), config, tmp_path / "two")
    assert JumpReLUSAE.load(tmp_path / "two").metadata == {}


def test_files_are_plain(tmp_path):
    """Contiguous copies, for tensors that are views of others."""
    large = normal(9, D_SAE, D_IN)
    tensors = tensors_of(make_sae()) | {"W_dec": large[3], "W_enc": large[4].T}
    write("saelens", tensors, SAEConfig(), tmp_path / "sae")
    with safe_open(tmp_path / "sae" / "sae_weights.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("W_enc"), tensors["W_enc"])
    assert os.path.getsize(tmp_path / "sae" / "sae_weights.safetensors") < 2000


# ---- refusals


def refusal(*arguments, error=ValueError, **options) -> str:
    with pytest.raises(error) as caught:
        write(*arguments, **options)
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize(
    ("format", "architecture", "expected"),
    [
        ("circuit-tracer", "jump_relu", "gemma-scope or gemma-scope-2 or saelens or safetensors for a JumpReLU SAE"),
        ("gemma-scope", "topk", "saelens or safetensors for a TopK SAE"),
        ("gemma-scope-2", "topk", "saelens or safetensors for a TopK SAE"),
        ("circuit-tracer", "topk", "saelens or safetensors for a TopK SAE"),
        ("safetensors", TRANSCODER, "gemma-scope or gemma-scope-2 or saelens or circuit-tracer for a transcoder"),
    ],
)
def test_what_a_format_cannot_hold(tmp_path, format, architecture, expected):
    config = SAEConfig(architecture=architecture, k=2)
    message = refusal(format, tensors_of(make_sae()), config, tmp_path / "sae")
    assert message == f"format: expected {expected}, got {format!r}"
    assert not (tmp_path / "sae").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"W_dec": None}, "expected the tensors W_enc, W_dec, b_enc, b_dec, threshold, got more or fewer: W_dec"),
        ({"other": torch.zeros(1)}, "got more or fewer: other"),
        ({"W_skip": torch.zeros(4, 4)}, "got more or fewer: W_skip"),
        ({"W_enc": torch.zeros(7, 4)}, "W_enc: expected shape [4, 7], got [7, 4]"),
        (
            {"W_enc": torch.zeros(4, 7, 1)},
            "expected W_enc [d_in, d_sae], b_enc [d_sae] and b_dec [d_out], got [4, 7, 1]",
        ),
        ({"b_enc": torch.zeros(0)}, "W_enc: expected shape [4, 0], got [4, 7]"),
        ({"b_enc": torch.zeros(7, dtype=torch.int64)}, "b_enc: expected one float dtype for all, got int64"),
        ({"b_dec": torch.zeros(4, dtype=torch.float64)}, "b_dec: expected one float dtype for all, got float64"),
        ({"threshold": -torch.ones(7)}, "threshold: expected values ≥ 0, found -1"),
        (
            {"threshold": torch.zeros(7, dtype=torch.float16)},
            "threshold: expected one float dtype for all, got float16",
        ),
        ({"b_enc": torch.full((7,), torch.nan)}, "b_enc: expected finite values, found nan"),
        ({"b_enc": torch.zeros(7, device="meta")}, "b_enc: expected a dense tensor, found one without data"),
        ({"b_enc": [0.0]}, "b_enc: expected a torch.Tensor, got list"),
    ],
)
def test_tensors_that_are_none_of_an_sae(tmp_path, changes, message):
    tensors = {key: value for key, value in (tensors_of(make_sae()) | changes).items() if value is not None}
    found = refusal("saelens", tensors, SAEConfig(), tmp_path / "sae")
    assert found.startswith("sae: ")
    assert message in found
    assert not (tmp_path / "sae").exists()


@pytest.mark.parametrize("k", [None, 0, 8, True, 2.0])
def test_topk_needs_its_k(tmp_path, k):
    config = SAEConfig(architecture="topk", k=k)
    message = refusal("saelens", topk_tensors(), config, tmp_path / "sae")
    assert message == f"sae: k: expected an int from 1 to d_sae = 7, got {k!r}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": None}, "sae.metadata['layer']: expected the layer of the transcoder, got None"),
        ({"layer": -1}, "sae.metadata['layer']: expected the layer of the transcoder, got -1"),
        ({"model": None}, "sae.metadata['model']: expected the name of the model, got None"),
        ({"site": "model.layers.4.output"}, "sae.metadata['site']: expected a site of layer 3"),
        ({"site_out": "elsewhere"}, "sae.metadata['site_out']: expected a site of layer 3"),
        ({"site": None}, "sae.metadata['site']: expected a site of layer 3"),
    ],
)
def test_circuit_tracer_needs_its_facts(tmp_path, changes, message):
    assert refusal("circuit-tracer", transcoder_tensors(), transcoder_config(**changes), tmp_path / "set").startswith(
        message
    )
    assert not (tmp_path / "set").exists()


def test_circuit_tracer_holds_one_model(tmp_path):
    write("circuit-tracer", transcoder_tensors(), transcoder_config(), tmp_path / "set")
    sites = {key: site.replace("layers.3", "layers.4") for key, site in SITES.items()}
    other = transcoder_config(layer=4, model="another", **sites)
    message = refusal("circuit-tracer", transcoder_tensors(), other, tmp_path / "set")
    assert message.endswith("config.yaml of transcoders of the same model and sites, found that of others")
    assert files_in(tmp_path / "set") == ["config.yaml", "layer_3.safetensors"]


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_is_overwritten(tmp_path, format):
    tensors, config = tensors_of(make_sae()), SAEConfig(metadata=METADATA)
    if format == "circuit-tracer":
        tensors, config = transcoder_tensors(), transcoder_config()
    write(format, tensors, config, tmp_path / "sae")
    before = {name: (tmp_path / "sae" / name).read_bytes() for name in files_in(tmp_path / "sae")}
    assert "path: expected a folder without" in refusal(format, tensors, config, tmp_path / "sae")
    assert before == {name: (tmp_path / "sae" / name).read_bytes() for name in files_in(tmp_path / "sae")}


def test_arguments(tmp_path):
    tensors, config = tensors_of(make_sae()), SAEConfig()
    assert refusal("sae-lens", tensors, config, tmp_path).startswith("format: expected 'gemma-scope' or ")
    assert refusal(3, tensors, config, tmp_path).startswith("format: expected ")
    assert refusal("saelens", [], config, tmp_path, error=TypeError).startswith("tensors: expected ")
    assert refusal("saelens", tensors, {}, tmp_path, error=TypeError).startswith("config: expected ")
    assert refusal("saelens", tensors, config, 3, error=TypeError).startswith("path: expected a str or ")
    assert refusal("saelens", tensors, config, tmp_path, dtype=torch.int8).startswith("dtype: expected ")
    assert refusal("saelens", tensors, config, tmp_path, dtype="float32", error=TypeError).startswith("dtype: ")
    other = SAEConfig(architecture="gated")
    assert refusal("saelens", tensors, other, tmp_path).startswith("sae: expected architecture jump_relu or topk or ")
    fp64 = tensors_of(make_sae(torch.float64))
    assert refusal("gemma-scope", fp64, config, tmp_path).endswith("pass dtype=torch.float32")
    scaled = transcoder_config()._replace(input_scale=2.0)
    assert "expected a transcoder with input_scale 1" in refusal("saelens", transcoder_tensors(), scaled, tmp_path)
    with_skip = refusal("gemma-scope", transcoder_tensors(), transcoder_config(), tmp_path)
    assert with_skip == "format: expected another than gemma-scope for a transcoder with W_skip, which it cannot hold"
    nan = SAEConfig(metadata=METADATA | {"average_l0": float("nan")})
    assert refusal("saelens", tensors, nan, tmp_path).startswith("sae.metadata: expected values that JSON can hold")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("format", ["gemma-scope-2", "saelens", "circuit-tracer"])
def test_what_a_dtype_cannot_hold_is_not_written(tmp_path, format):
    tensors = transcoder_tensors(skip=False)
    tensors["W_dec"] *= 1e6
    message = refusal(format, tensors, transcoder_config(), tmp_path / "it", dtype=torch.float16)
    assert message.startswith("dtype: W_dec: expected finite values, found ")
    assert not (tmp_path / "it").exists()


def test_what_folding_overflows_is_not_written(tmp_path):
    config = SAEConfig(input_scale=1e38, metadata=METADATA)
    tensors = tensors_of(make_sae()) | {"b_enc": torch.full((D_SAE,), 1e6)}
    message = refusal("gemma-scope-2", tensors, config, tmp_path / "it")
    assert message == "sae: b_enc: expected finite values, found inf"
    assert not (tmp_path / "it").exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblemError, match="cannot be written"):
        write("saelens", tensors_of(make_sae()), SAEConfig(), tmp_path / "file" / "sae")


# ---- names of sites


@pytest.mark.parametrize(
    ("site", "name"),
    [
        ("model.layers.3.output", "blocks.3.hook_resid_post"),
        ("model.layers.12.post_feedforward_layernorm.output", "blocks.12.hook_mlp_out"),
        ("model.layers.0.self_attn.o_proj.input", "blocks.0.attn.hook_z"),
        ("model.layers.0.pre_feedforward_layernorm.output", "blocks.0.mlp.hook_in"),
        ("model.layers.0.pre_feedforward_layernorm.normalized", "blocks.0.ln2.hook_normalized"),
        ("blocks.12.attn.hook_z", "blocks.12.attn.hook_z"),
        ("blocks.12.hook_embed", None),
        ("model.layers.03.output", None),
        ("model.layers.3.output.x", None),
        ("model.embed_tokens.output", None),
        (None, None),
        (3, None),
    ],
)
def test_names_of_transformer_lens(site, name):
    assert hook_names.transformer_lens(site) == name
