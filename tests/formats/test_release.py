"""SAE files: round trips, the formats of others, and the tensors that are refused."""

import json
import os

import numpy as np
import pytest
import safetensors.torch
import torch

from gemmascope import JumpReLUSAE
from gemmascope.errors import BadFileError
from gemmascope.formats import release
from gemmascope.formats.files import sha256
from gemmascope.formats.manifest import SAEConfig
from gemmascope.formats.release import KEYS, gemma_scope_path

D_MODEL, D_SAE = 4, 7
METADATA = {"model": "google/gemma-2-2b", "site": "model.layers.3.output", "layer": 3, "average_l0": 5.5}


def make_sae(dtype=torch.float32, folded=True, seed=0) -> JumpReLUSAE:
    generator = torch.Generator().manual_seed(seed)
    sae = JumpReLUSAE(D_MODEL, D_SAE, input_scale=2.5, generator=generator, metadata=METADATA)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        sae.threshold.abs_()
    return (sae.fold() if folded else sae).to(dtype)


def arrays(**changes) -> dict[str, np.ndarray]:
    """The arrays of a valid file, with some changed; None leaves one out."""
    rng = np.random.default_rng(0)
    shapes = {
        "W_enc": (D_MODEL, D_SAE),
        "W_dec": (D_SAE, D_MODEL),
        "b_enc": D_SAE,
        "b_dec": D_MODEL,
        "threshold": D_SAE,
    }
    valid = {key: rng.random(shape, dtype=np.float32) for key, shape in shapes.items()}
    return {key: value for key, value in (valid | changes).items() if value is not None}


def write_gemma_scope_2(folder, tensors=None, **changes):
    """A Gemma Scope 2 folder, with some config keys changed; None leaves one out."""
    tensors = arrays() if tensors is None else tensors
    config = {
        "hf_hook_point_in": "model.layers.17.output",
        "hf_hook_point_out": "model.layers.17.output",
        "width": D_SAE,
        "model_name": "google/gemma-3-270m-pt",
        "architecture": "jump_relu",
        "l0": 20,
        "affine_connection": False,
        "type": "sae",
    } | changes
    folder.mkdir(exist_ok=True)
    lower = {key.lower(): torch.from_numpy(np.ascontiguousarray(value)) for key, value in tensors.items()}
    safetensors.torch.save_file(lower, folder / "params.safetensors")
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def assert_same_bits(actual: JumpReLUSAE, expected: JumpReLUSAE) -> None:
    assert (actual.input_scale, actual.pre_encoder_bias) == (expected.input_scale, expected.pre_encoder_bias)
    for (name, a), (_, b) in zip(actual.named_parameters(), expected.named_parameters(), strict=True):
        assert a.dtype == b.dtype, name
        assert a.stride() == b.stride(), name
        assert torch.equal(a, b), name


def refusal(path, error=BadFileError) -> str:
    with pytest.raises(error) as caught:
        JumpReLUSAE.load(path)
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith(str(path))
    return message


# ---- round trips


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_folder_round_trip_is_exact(tmp_path, dtype, folded):
    sae = make_sae(dtype, folded)
    sae.save(tmp_path / "sae")
    assert sorted(os.listdir(tmp_path / "sae")) == ["config.json", "params.safetensors"]
    for path in (tmp_path / "sae", tmp_path / "sae" / "params.safetensors", str(tmp_path / "sae")):
        loaded = JumpReLUSAE.load(path)
        assert_same_bits(loaded, sae)
        assert loaded.metadata == METADATA


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gemma_scope_round_trip_is_exact(tmp_path, dtype):
    sae = make_sae(dtype)
    path = tmp_path / gemma_scope_path(3, D_SAE, 5.5)
    sae.save(path)
    for place in (path, path.parent):
        loaded = JumpReLUSAE.load(place)
        assert_same_bits(loaded, sae.float())
        assert loaded.metadata == METADATA
    x = torch.randn(9, D_MODEL, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(x), sae(x))


def test_gemma_scope_file_is_what_numpy_expects(tmp_path):
    sae = make_sae()
    sae.save(tmp_path / "params.npz")
    with np.load(tmp_path / "params.npz", allow_pickle=False) as file:
        assert sorted(file.files) == sorted(KEYS)
        for key in KEYS:
            assert file[key].dtype == np.dtype("<f4")
            assert file[key].flags.c_contiguous
            assert np.array_equal(file[key], getattr(sae, key).detach().numpy())


def test_config_says_what_the_file_holds(tmp_path):
    from gemmascope import __version__

    make_sae(folded=False, dtype=torch.bfloat16).save(tmp_path / "sae")
    config = json.loads((tmp_path / "sae" / "config.json").read_text())
    assert config.pop("sha256") == sha256(tmp_path / "sae" / "params.safetensors")
    assert len(config.pop("config_sha256")) == 64
    assert config == {
        "format": "gemmascope",
        "format_version": 1,
        "gemmascope_version": __version__,
        "architecture": "jump_relu",
        "d_model": D_MODEL,
        "d_sae": D_SAE,
        "dtype": "bfloat16",
        "input_scale": 2.5,
        "pre_encoder_bias": True,
        "weights": "params.safetensors",
        "metadata": METADATA,
    }


def test_saving_again_replaces(tmp_path):
    for path in (tmp_path / "folder", tmp_path / "npz" / "params.npz"):
        for seed in (1, 2):
            make_sae(seed=seed).save(path)
            assert_same_bits(JumpReLUSAE.load(path), make_sae(seed=seed))
        assert len(os.listdir(tmp_path / path.relative_to(tmp_path).parts[0])) == 2


def test_two_files_of_other_names_in_one_folder(tmp_path):
    for seed in (1, 2):
        make_sae(seed=seed).save(tmp_path / f"{seed}.npz")
    for seed in (1, 2):
        assert_same_bits(JumpReLUSAE.load(tmp_path / f"{seed}.npz"), make_sae(seed=seed))
    assert sorted(os.listdir(tmp_path)) == ["1.json", "1.npz", "2.json", "2.npz"]


@pytest.mark.parametrize(
    ("width", "name"),
    [
        (16384, "16k"), (32768, "32k"), (65536, "65k"), (131072, "131k"), (262144, "262k"), (524288, "524k"),
        (1048576, "1m"), (512, "512"), (16000, "16000"),
    ],
)  # fmt: skip
def test_gemma_scope_path(width, name):
    assert gemma_scope_path(12, width, 70.6) == f"layer_12/width_{name}/average_l0_71/params.npz"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 16384, 71), "layer: expected at least 0, got -1"),
        ((0, 0, 71), "width: expected at least 1, got 0"),
        ((0, 1, -0.5), "average_l0: expected a finite number ≥ 0, got -0.5"),
        ((0, 1, float("nan")), "average_l0: expected a finite number ≥ 0, got nan"),
    ],
)
def test_gemma_scope_path_refuses(arguments, message):
    with pytest.raises(ValueError) as caught:
        gemma_scope_path(*arguments)
    assert str(caught.value) == message


# ---- files of others


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">f4"])
def test_foreign_npz(tmp_path, lower, order, dtype):
    expected = arrays()
    names = {key: key.lower() if lower else key for key in KEYS}
    np.savez(tmp_path / "a.npz", **{names[key]: np.array(expected[key], dtype, order=order) for key in KEYS})
    sae = JumpReLUSAE.load(tmp_path / "a.npz")
    assert sae.is_folded
    assert sae.metadata == {}
    for key in KEYS:
        assert np.array_equal(getattr(sae, key).detach().numpy(), expected[key])
    assert sae.W_enc.T.is_contiguous()
    assert sae.W_dec.is_contiguous()


def test_square_weights_are_taken_as_documented(tmp_path):
    rng = np.random.default_rng(0)
    square = {key: rng.random((5, 5) if key.startswith("W") else 5, dtype=np.float32) for key in KEYS}
    np.savez(tmp_path / "a.npz", **square)
    x = rng.random((3, 5), dtype=np.float32)
    z = x @ square["W_enc"] + square["b_enc"]
    torch.testing.assert_close(
        JumpReLUSAE.load(tmp_path / "a.npz").encode(torch.from_numpy(x)).detach().numpy(),
        np.where(z > square["threshold"], z, 0),
    )


def test_foreign_config_beside_a_npz_is_left_alone(tmp_path):
    np.savez(tmp_path / "params.npz", **arrays())
    (tmp_path / "config.json").write_text('{"model_type": "gemma2"}')
    assert JumpReLUSAE.load(tmp_path).metadata == {}


EMBEDDING = "embedding/width_4k/average_l0_6"


def test_embedding_saes_are_rescaled(tmp_path):
    """W_enc/√d_model and W_dec·√d_model, with d_model = 4."""
    folder = tmp_path / EMBEDDING
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **arrays())
    for place in (folder, folder / "params.npz"):
        sae = JumpReLUSAE.load(place)
        assert np.array_equal(sae.W_enc.detach().numpy(), arrays()["W_enc"] / 2)
        assert np.array_equal(sae.W_dec.detach().numpy(), arrays()["W_dec"] * 2)
        for key in ("b_enc", "b_dec", "threshold"):
            assert np.array_equal(getattr(sae, key).detach().numpy(), arrays()[key])
        assert sae.metadata == {"embedding_scale": 2.0}


def test_embedding_saes_are_rescaled_once(tmp_path):
    """What was saved in a folder of that name is ours, whose config says what it is."""
    (tmp_path / EMBEDDING).mkdir(parents=True)
    np.savez(tmp_path / EMBEDDING / "params.npz", **arrays())
    sae = JumpReLUSAE.load(tmp_path / EMBEDDING)
    again = tmp_path / "again" / EMBEDDING / "params.npz"
    sae.save(again)
    assert_same_bits(JumpReLUSAE.load(again), sae)
    assert JumpReLUSAE.load(again).metadata == {"embedding_scale": 2.0}


@pytest.mark.parametrize(
    "name",
    [
        "embedding/layer_3/width_16k/average_l0_71/params.npz", "embedding/params.npz",
        "my_embedding/width_4k/average_l0_6/params.npz", "embedding/width_4k/average_l0_6/a.npz",
    ],
)  # fmt: skip
def test_folders_that_only_look_like_embeddings(tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True)
    np.savez(tmp_path / name, **arrays())
    sae = JumpReLUSAE.load(tmp_path / name)
    assert np.array_equal(sae.W_enc.detach().numpy(), arrays()["W_enc"])
    assert sae.metadata == {}


def test_gemma_scope_2(tmp_path):
    sae = JumpReLUSAE.load(write_gemma_scope_2(tmp_path / "sae"))
    assert sae.is_folded
    assert sae.metadata == {"model": "google/gemma-3-270m-pt", "site": "model.layers.17.output", "l0": 20}
    for key, expected in arrays().items():
        assert np.array_equal(getattr(sae, key).detach().numpy(), expected)
    assert_same_bits(JumpReLUSAE.load(tmp_path / "sae" / "params.safetensors"), sae)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "topk"}, "architecture: expected 'jump_relu', found 'topk'"),
        ({"architecture": None}, "architecture: expected 'jump_relu', found None"),
        (
            {"hf_hook_point_out": "model.layers.5.post_feedforward_layernorm.output"},
            "expected an SAE, which reads and writes one site, found a transcoder, for Transcoder.load",
        ),
        (
            {"affine_connection": True},
            "expected an SAE, which reads and writes one site, found a transcoder, for Transcoder.load",
        ),
        ({"hf_hook_point_in": None}, "expected a gemmascope or Gemma Scope 2 config, found another"),
    ],
)
def test_gemma_scope_2_refuses_what_is_no_sae(tmp_path, changes, message):
    with pytest.raises(BadFileError) as caught:
        JumpReLUSAE.load(write_gemma_scope_2(tmp_path / "sae", **changes))
    assert str(caught.value) == f"{tmp_path}/sae/config.json: {message}"


# ---- refusals


def shape_message(key, expected, found) -> str:
    entries = f"b_dec has {D_MODEL} = d_model entries, b_enc {D_SAE} = d_sae"
    return f"{key}: expected shape {expected} ({entries}), found {found}"


def swap(name: str) -> np.ndarray:
    return np.ascontiguousarray(arrays()[name].T)


def with_one(key: str, value: float) -> np.ndarray:
    array = arrays()[key]
    array.flat[-1] = value
    return array


ALL_KEYS = "expected the keys W_enc, W_dec, b_enc, b_dec, threshold"
BAD_TENSORS = [
    ({"W_enc": swap("W_enc")}, shape_message("W_enc", [4, 7], [7, 4])),
    ({"W_dec": swap("W_dec")}, shape_message("W_dec", [7, 4], [4, 7])),
    ({"W_enc": swap("W_enc"), "W_dec": swap("W_dec")}, shape_message("W_enc", [4, 7], [7, 4])),
    ({"threshold": np.ones((7, 1), "<f4")}, shape_message("threshold", [7], [7, 1])),
    ({"b_enc": np.ones((1, 7), "<f4")}, "b_enc: expected shape [d_sae], found [1, 7]"),
    ({"b_dec": np.ones(0, "<f4")}, "b_dec: expected shape [d_model], found [0]"),
    ({"b_dec": np.array(1, "<f4")}, "b_dec: expected shape [d_model], found []"),
    ({"threshold": None}, f"{ALL_KEYS}, found no threshold"),
    ({"W_enc": None, "b_dec": None}, f"{ALL_KEYS}, found no W_enc, b_dec"),
    ({"W_skip": np.ones((4, 4), "<f4")}, f"{ALL_KEYS}, found also W_skip"),
    ({"\n../x": np.ones(4, "<f4")}, f"{ALL_KEYS}, found also '\\n../x'"),
    ({"w_enc": np.ones((4, 7), "<f4")}, "w_enc: expected one spelling, found both W_ and w_"),
    ({"W_dec": with_one("W_dec", np.nan)}, "W_dec: expected finite values, found nan"),
    ({"b_enc": with_one("b_enc", np.inf)}, "b_enc: expected finite values, found inf"),
    ({"W_enc": with_one("W_enc", -np.inf)}, "W_enc: expected finite values, found -inf"),
    ({"threshold": with_one("threshold", -0.25)}, "threshold: expected values ≥ 0, found -0.25"),
    ({"b_enc": np.ones(7, "<f2")}, "b_enc: expected float32, found float16"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_TENSORS)
def test_npz_refuses(tmp_path, changes, message):
    path = tmp_path / "params.npz"
    np.savez(path, **arrays(**changes))
    assert refusal(path) == f"{path}: {message}"


@pytest.mark.parametrize(("changes", "message"), BAD_TENSORS)
def test_safetensors_refuses(tmp_path, changes, message):
    path = tmp_path / "params.safetensors"
    write_gemma_scope_2(tmp_path)
    safetensors.torch.save_file({key: torch.from_numpy(value) for key, value in arrays(**changes).items()}, path)
    assert refusal(path) == f"{path}: {message}"


@pytest.mark.parametrize("dtype", ["<f2", "<f8"])
def test_npz_must_be_fp32(tmp_path, dtype):
    np.savez(tmp_path / "a.npz", **{key: value.astype(dtype) for key, value in arrays().items()})
    assert refusal(tmp_path / "a.npz").endswith(f"W_enc: expected float32, found float{8 * int(dtype[2])}")


def test_missing_and_ambiguous_paths(tmp_path):
    expected = f"{tmp_path}: expected a folder with params.npz or params.safetensors, found"
    others = "sae_weights.safetensors (SAELens), sae.safetensors (sparsify), ae.pt (dictionary_learning)"
    assert refusal(tmp_path) == f"{expected} neither, nor {others}"
    for name in ("params.npz", "params.safetensors"):
        (tmp_path / name).touch()
    assert refusal(tmp_path) == f"{expected} params.npz and params.safetensors"
    (tmp_path / "params.npz").rename(tmp_path / "ae.pt")
    assert refusal(tmp_path) == f"{expected} params.safetensors and ae.pt"
    missing = tmp_path / "missing.npz"
    assert refusal(missing) == f"{missing}: expected a file, found none"
    other = tmp_path / "sae.pt"
    assert (
        refusal(other) == f"{other}: expected a .npz file, a .safetensors file or a folder of one, found another name"
    )


def test_safetensors_alone_do_not_say_enough(tmp_path):
    make_sae(folded=False).save(tmp_path)
    (tmp_path / "config.json").unlink()
    expected = "expected config.json beside it, found none: the weights alone do not say whether"
    assert refusal(tmp_path).startswith(f"{tmp_path}/params.safetensors: {expected}")


@pytest.mark.parametrize("name", ["params.npz", "sae"])
def test_what_is_read_is_tensors_and_what_they_do_not_say(tmp_path, name):
    sae = make_sae(folded=name == "params.npz")
    sae.save(tmp_path / name)
    stored = release.read(tmp_path / name)
    assert stored.tensors.keys() == set(KEYS)
    for key, tensor in stored.tensors.items():
        assert torch.equal(tensor, getattr(sae, key)), key
    expected = SAEConfig(sae.input_scale, sae.pre_encoder_bias, METADATA, (D_MODEL, D_SAE))
    assert stored.config == expected
    assert stored.config.is_folded == sae.is_folded

    release.write(tmp_path / "again" / name, *stored)
    again = release.read(tmp_path / "again" / name)
    assert again.config == expected
    assert all(torch.equal(again.tensors[key], stored.tensors[key]) for key in KEYS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["params.npz", "sae"])
def test_default_dtype_and_device_do_not_matter(tmp_path, name, dtype):
    sae = make_sae()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            sae.save(tmp_path / name)
            stored = release.read(tmp_path / name)
    finally:
        torch.set_default_dtype(torch.float32)
    for key, tensor in stored.tensors.items():
        assert (tensor.device.type, tensor.dtype) == ("cpu", torch.float32)
        assert torch.equal(tensor, getattr(sae, key))


def test_state_dict_and_safetensors(tmp_path):
    """A state dict refers to the parameters, and W_enc is a transposed view, which `save_file` refuses by name;
    `save_model` and `load_model` take the module."""
    sae, other = make_sae(torch.bfloat16, folded=False), make_sae(torch.bfloat16, seed=1)
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="non contiguous tensor: `W_enc`"):
        safetensors.torch.save_file(sae.state_dict(), path)
    safetensors.torch.save_model(sae, str(path))
    safetensors.torch.load_model(other, str(path))
    assert_same_bits(other, sae)
