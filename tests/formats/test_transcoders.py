"""Transcoders out of the files of others: each layout, and everything that is not exactly one of them."""

import json
import struct
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch

from gemmascope import JumpReLUSAE
from gemmascope.errors import BadFileError
from gemmascope.formats import transcoders
from gemmascope.formats.export import write
from gemmascope.formats.transcoders import read
from tests.formats.test_export import FACTS, SITES, assert_equal, transcoder_config, transcoder_tensors
from tests.formats.test_release import make_sae

NORMALISED = {
    "site": "model.layers.3.pre_feedforward_layernorm.normalized",
    "site_out": "model.layers.3.post_feedforward_layernorm.output",
}


@pytest.fixture
def two(tmp_path):
    """A folder of Gemma Scope 2."""
    write("gemma-scope-2", transcoder_tensors(), transcoder_config(), tmp_path / "two")
    return tmp_path / "two"


@pytest.fixture
def tracer(tmp_path):
    """A folder of circuit-tracer, of one layer."""
    write("circuit-tracer", transcoder_tensors(), transcoder_config(), tmp_path / "set")
    return tmp_path / "set"


@pytest.fixture
def one(tmp_path):
    """A file of Gemma Scope 1, without any config."""
    folder = tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_3" / "width_16k" / "average_l0_6"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{key: t.numpy() for key, t in transcoder_tensors(skip=False).items()})
    return folder / "params.npz"


def change(file, **changes):
    """Rewrite a safetensors file with some tensors changed; None leaves one out."""
    tensors = safetensors.torch.load_file(file) | changes
    kept = {key: tensor.contiguous() for key, tensor in tensors.items() if tensor is not None}
    safetensors.torch.save_file(kept, file)


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def refusal(path) -> str:
    with pytest.raises(BadFileError) as caught:
        read(path)
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith(str(path))
    return message


# ---- what is read


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("format", ["gemma-scope-2", "circuit-tracer"])
def test_round_trip_is_exact(tmp_path, format, dtype, skip):
    tensors = transcoder_tensors(dtype, skip)
    write(format, tensors, transcoder_config(), tmp_path / "it")
    found = read(tmp_path / "it")
    assert_equal(found.tensors, tensors)
    assert found.config.architecture == "transcoder"
    facts = {key: FACTS[key] for key in ("model", "layer", "site", "site_out")}
    assert found.config.metadata == (facts | {"l0": 21.4} if format == "gemma-scope-2" else facts)
    [file] = (tmp_path / "it").glob("*.safetensors")
    assert_equal(read(file).tensors, tensors)


def test_gemma_scope_1_reads_the_input_without_gain(one):
    """The folders say the layer; the site is not the one that Gemma Scope 2's read."""
    for path in (one, one.parent):
        found = read(path)
        assert_equal(found.tensors, transcoder_tensors(skip=False))
        assert found.config.metadata == {"layer": 3, **NORMALISED}


def test_gemma_scope_1_of_ours_says_its_sites(tmp_path):
    write("gemma-scope", transcoder_tensors(skip=False), transcoder_config(**NORMALISED), tmp_path / "it")
    assert read(tmp_path / "it").config.metadata == {"model": FACTS["model"], "layer": 3, "l0": 21.4, **NORMALISED}


def test_gemma_scope_1_without_folders_says_nothing(tmp_path):
    np.savez(tmp_path / "weights.npz", **{key: t.numpy() for key, t in transcoder_tensors(skip=False).items()})
    assert read(tmp_path / "weights.npz").config.metadata == {}


def test_relu_of_circuit_tracer_has_thresholds_of_0(tracer):
    change(tracer / "layer_3.safetensors", **{"activation_function.threshold": None})
    assert_equal(read(tracer).tensors, transcoder_tensors() | {"threshold": torch.zeros(7)})


@pytest.mark.parametrize(
    ("text", "metadata"),
    [
        ("", {}),
        (
            "model_name: google/gemma-2-2b\nfeature_input_hook: 'ln2.hook_normalized'  \n",
            {"model": "google/gemma-2-2b"},
        ),
        ('# a comment\nscan:\n- a\n- b\nmodel_name: "a\\tb"\nunknown: &a [1, *a]\n', {"model": "a\tb"}),
        ('model_name: "broken\nmodel_kind: transcoder_set\n', {"model": '"broken'}),
    ],
)
def test_config_yaml_is_read_as_lines(tracer, text, metadata):
    (tracer / "config.yaml").write_text(text)
    found = read(tracer).config.metadata
    site = {"site": NORMALISED["site"]} if "ln2" in text else {}
    assert found == {"layer": 3} | metadata | site


def test_circuit_tracer_without_config(tracer):
    (tracer / "config.yaml").unlink()
    assert read(tracer).config.metadata == {"layer": 3}


@pytest.mark.parametrize("kind", ["two", "tracer", "one"])
def test_transcoders_are_told_from_saes(tmp_path, request, kind):
    path = request.getfixturevalue(kind)
    assert transcoders.is_named_so(path)
    with pytest.raises(BadFileError):
        JumpReLUSAE.load(path)
    for name in ("sae", "params.npz"):
        make_sae().save(tmp_path / "transcoders" / name)
        assert not transcoders.is_named_so(tmp_path / "transcoders" / name)
    (tmp_path / "transcoders" / "theirs").mkdir()
    for name in ("sae_weights.safetensors", "cfg.json"):
        (tmp_path / "transcoders" / "theirs" / name).write_text("")
    for path in ("theirs", "theirs/sae_weights.safetensors"):
        assert not transcoders.is_named_so(tmp_path / "transcoders" / path), "read by load_sae, which knows their kinds"


# ---- refusals


def test_an_sae_is_no_transcoder(tmp_path, two):
    make_sae().save(tmp_path / "sae.npz")
    assert refusal(tmp_path / "sae.npz").endswith("expected a transcoder, found an SAE: read it with load_sae")
    make_sae().save(tmp_path / "ours")
    assert "expected a config.json of Gemma Scope 2 beside it, found another" in refusal(
        tmp_path / "ours" / "params.safetensors"
    )
    edit(two, type="sae")
    with pytest.raises(BadFileError, match=r"config.json: expected a transcoder, found type 'sae': is it an SAE\?"):
        read(two)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "topk"}, "architecture: expected 'jump_relu', found 'topk'"),
        ({"type": "crosscoder", "affine_connection": ...}, "expected no skip connection as in its config, found one"),
        ({"affine_connection": False}, "expected no skip connection as in its config, found one"),
        ({"hf_hook_point_in": 3}, "hf_hook_point_in: expected str, found int"),
        ({"model_name": ["x"]}, "model_name: expected str, found list"),
        ({"hf_hook_point_in": ...}, "expected a config.json of Gemma Scope 2 beside it, found another"),
    ],
)
def test_configs_of_gemma_scope_2(two, changes, message):
    edit(two, **changes)
    with pytest.raises(BadFileError) as caught:
        read(two)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["[]", '{"l0": NaN}', "{", '{"a": 1, "a": 2}', "[" * 100_000, "1" * 5000])
def test_hostile_json(two, text):
    (two / "config.json").write_text(text)
    with pytest.raises(BadFileError, match=r"config\.json"):
        read(two)


def test_weights_alone(two):
    (two / "config.json").unlink()
    assert "beside it, found none: the weights alone do not say" in refusal(two / "params.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w_enc": torch.zeros(7, 4)}, "W_enc: expected shape [7, 7] (b_enc has 7 entries, b_dec 5), found [7, 4]"),
        ({"w_dec": torch.zeros(5, 7)}, "W_dec: expected shape [7, 5] (b_enc has 7 entries, b_dec 5), found [5, 7]"),
        ({"w_dec": torch.zeros(7, 2, 5)}, "W_dec: expected shape [7, 5]"),
        ({"affine_skip_connection": torch.zeros(5, 4)}, "W_skip: expected shape [4, 5]"),
        ({"threshold": torch.zeros(6)}, "threshold: expected shape [7]"),
        ({"threshold": None}, "found no threshold"),
        ({"extra": torch.zeros(1)}, "found also extra"),
        ({"W_enc": torch.zeros(4, 7)}, ": expected one spelling, found two"),
        ({"b_enc": torch.zeros(7, 1)}, "b_enc: expected one dimension, found [7, 1]"),
        ({"b_dec": torch.zeros(0)}, "b_dec: expected one dimension, found [0]"),
        ({"w_enc": torch.zeros(0, 7)}, "W_enc: expected two dimensions, found [0, 7]"),
        ({"b_enc": torch.zeros(7, dtype=torch.float64)}, "b_enc: expected float32, found float64"),
        ({"threshold": torch.zeros(7, dtype=torch.float16)}, "threshold: expected float32, found float16"),
        ({"w_enc": torch.full((4, 7), torch.nan)}, "W_enc: expected finite values, found nan"),
        ({"affine_skip_connection": torch.full((4, 5), torch.inf)}, "W_skip: expected finite values, found inf"),
        ({"threshold": torch.full((7,), -1.0)}, "threshold: expected values ≥ 0, found -1"),
    ],
)
def test_tensors_of_gemma_scope_2(two, changes, message):
    change(two / "params.safetensors", **changes)
    assert message in refusal(two / "params.safetensors")


def test_w_enc_of_circuit_tracer_is_not_turned(tracer):
    change(tracer / "layer_3.safetensors", W_enc=transcoder_tensors()["W_enc"])
    assert "W_enc: expected shape [7, 7]" in refusal(tracer / "layer_3.safetensors")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model_kind: cross_layer_transcoder\n",
            "model_kind: expected 'transcoder_set', found 'cross_layer_transcoder'",
        ),
        ("activation: topk\nk: 32\n", "activation: expected ReLU or JumpReLU, found 'topk'"),
    ],
)
def test_other_kinds_of_circuit_tracer(tracer, text, message):
    (tracer / "config.yaml").write_text(text)
    with pytest.raises(BadFileError) as caught:
        read(tracer)
    assert str(caught.value) == f"{tracer}/config.yaml: {message}"


@pytest.mark.parametrize("data", [b"\xff\xfe", b"a" * ((1 << 20) + 1)])
def test_hostile_yaml(tracer, data):
    (tracer / "config.yaml").write_bytes(data)
    with pytest.raises(BadFileError, match=r"config\.yaml: expected (UTF-8|at most)"):
        read(tracer)


def test_several_layers_are_not_one(tracer):
    (tracer / "layer_12.safetensors").write_bytes((tracer / "layer_3.safetensors").read_bytes())
    assert refusal(tracer).endswith("found layer_3.safetensors, layer_12.safetensors")
    assert [file.name for file in transcoders.layer_files(tracer)] == ["layer_3.safetensors", "layer_12.safetensors"]
    assert read(tracer / "layer_12.safetensors").config.metadata["layer"] == 12


@pytest.mark.parametrize("name", ["", "weights.pt", "absent.npz", "layer_3.safetensors"])
def test_what_is_not_there(tmp_path, name):
    assert "expected" in refusal(tmp_path / name if name else tmp_path)


# ---- damage and bombs


def test_gemma_scope_1_files(one):
    tensors = {key: t.numpy() for key, t in transcoder_tensors(skip=False).items()}
    np.savez(one, **tensors | {"W_enc": tensors["W_enc"].astype(np.float64)})
    assert "W_enc: expected float32, found float64" in refusal(one)
    np.savez(one, **tensors | {"W_enc": np.array([{}], dtype=object)}, allow_pickle=True)
    assert "found pickled objects" in refusal(one)
    with zipfile.ZipFile(one, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("W_enc.npy", bytes(200 << 20))
    assert "announced" in refusal(one)


@pytest.mark.parametrize("fixture", ["two", "tracer"])
@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_truncated(request, fixture, length):
    [file] = request.getfixturevalue(fixture).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:length])
    assert "expected" in refusal(file)


def test_a_shape_larger_than_memory(tracer):
    """Refused by the header, before memory is taken."""
    header = json.dumps({"W_enc": {"dtype": "F32", "shape": [1 << 20, 1 << 20], "data_offsets": [0, 1 << 42]}}).encode()
    file = tracer / "layer_3.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    assert refusal(file).endswith(f"expected {1 << 42} bytes of data, found 0")


def test_sites_are_kept(two):
    assert {key: read(two).config.metadata[key] for key in SITES} == SITES
