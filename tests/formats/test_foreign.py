"""What is no SAE of ours or Gemma Scope's: named, and the way out."""

import json
import os

import numpy as np
import pytest

from gemmascope import JumpReLUSAE
from gemmascope.errors import BadFileError
from tests.formats.test_release import arrays, assert_same_bits, make_sae, refusal, write_gemma_scope_2

TRANSCODER = (
    "expected an SAE, found the name {!r}: transcoders, whose files look the same, are read by Transcoder.load; an SAE"
    " is read, in a folder named 'sae'"
)


@pytest.mark.parametrize(
    ("name", "config", "project"),
    [
        ("sae_weights.safetensors", "cfg.json", "SAELens"),
        ("sae.safetensors", "cfg.json", "sparsify"),
        ("ae.pt", "config.json", "dictionary_learning"),
    ],
)
def test_files_of_others_without_their_config(tmp_path, name, config, project):
    (tmp_path / name).touch()
    for path in (tmp_path, tmp_path / name):
        assert refusal(path) == (
            f"{tmp_path}/{name}: expected {config} beside it, found none: the weights alone do not say what {project}"
            " makes of them"
        )


@pytest.mark.parametrize(
    "name",
    ["gemma-scope-2b-pt-transcoders", "transcoder", "Transcoders", "transcoder_all", "clt", "crosscoders", "sae/clt"],
)
def test_name_of_another_kind(tmp_path, monkeypatch, name):
    folder = tmp_path / name / "layer_5" / "average_l0_37"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **arrays())
    for path in (folder, folder / "params.npz"):
        assert refusal(path) == f"{folder}/params.npz: {TRANSCODER.format(os.path.basename(name))}"
    with pytest.raises(BadFileError, match="found the name"):
        JumpReLUSAE.from_pretrained(str(tmp_path / name), "layer_5/average_l0_37")
    monkeypatch.chdir(folder)
    with pytest.raises(BadFileError, match=r"^params.npz: expected an SAE, found the name"):
        JumpReLUSAE.load("params.npz")


@pytest.mark.parametrize(
    "name", ["intertranscoderal", "eclteic", "transcoding", "clt/sae", "transcoders/gemma-scope-2b-pt-res/layer_1"]
)
def test_name_that_only_looks_like_it(tmp_path, name):
    (tmp_path / name).mkdir(parents=True)
    np.savez(tmp_path / name / "params.npz", **arrays())
    JumpReLUSAE.load(tmp_path / name)


def test_what_is_written_counts_more_than_names(tmp_path):
    sae = make_sae()
    sae.save(tmp_path / "transcoders" / "params.npz")
    assert_same_bits(JumpReLUSAE.load(tmp_path / "transcoders"), sae)
    JumpReLUSAE.load(write_gemma_scope_2(tmp_path / "transcoders" / "b"))
    out = {"hf_hook_point_out": None}
    JumpReLUSAE.load(write_gemma_scope_2(tmp_path / "transcoders" / "c", **out))
    JumpReLUSAE.load(write_gemma_scope_2(tmp_path / "transcoders" / "d", type=None))
    with pytest.raises(BadFileError, match="found the name 'transcoders'"):
        JumpReLUSAE.load(write_gemma_scope_2(tmp_path / "transcoders" / "e", type=None, **out))


@pytest.mark.parametrize("hooks", [{"hf_hook_point_out": None}, {"hf_hook_point_in": None}])
@pytest.mark.parametrize("kind", ["sae", None])
def test_gemma_scope_2_null_states_nothing(tmp_path, hooks, kind):
    folder = write_gemma_scope_2(tmp_path / "a")
    config = json.loads((folder / "config.json").read_text()) | hooks | {"type": kind}
    (folder / "config.json").write_text(json.dumps(config))
    sae = JumpReLUSAE.load(folder)
    site = {} if "hf_hook_point_in" in hooks else {"site": "model.layers.17.output"}
    assert sae.metadata == {"model": "google/gemma-3-270m-pt", "l0": 20} | site
    sae.save(tmp_path / "b")
    assert JumpReLUSAE.load(tmp_path / "b").metadata == sae.metadata


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "transcoder"}, "type: expected 'sae', found 'transcoder': read it with Transcoder.load"),
        ({"type": "crosscoder"}, "type: expected 'sae', found 'crosscoder'"),
        ({"type": ["sae"]}, "type: expected 'sae', found ['sae']"),
        (
            {"type": "transcoder", "hf_hook_point_out": None},
            "type: expected 'sae', found 'transcoder': read it with Transcoder.load",
        ),
        ({"hf_hook_point_in": ["a", "b"]}, "hf_hook_point_in: expected str, found list"),
        ({"hf_hook_point_out": 3}, "hf_hook_point_out: expected str, found int"),
    ],
)
def test_gemma_scope_2_of_another_kind(tmp_path, changes, message):
    folder = write_gemma_scope_2(tmp_path / "a", **changes)
    assert refusal(folder) == f"{folder}/config.json: {message}"


def test_gemma_scope_2_without_its_config(tmp_path):
    folder = write_gemma_scope_2(tmp_path / "a")
    os.remove(folder / "config.json")
    assert refusal(folder) == (
        f"{folder}/params.safetensors: expected config.json beside it, found none: the weights alone do not say whether"
        " they are an SAE's, a transcoder's or of inputs that were scaled (Gemma Scope 2 has one in each folder)"
    )
