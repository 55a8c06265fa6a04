"""SAE files that were tampered with or damaged, and savings that fail."""

import json
import os
import resource
import shutil
import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemmascope import JumpReLUSAE
from gemmascope.errors import BadFileError, EnvironmentProblemError
from gemmascope.formats import manifest, release
from gemmascope.formats.files import sha256
from gemmascope.formats.manifest import SAEConfig
from tests.formats.test_release import assert_same_bits, make_sae, refusal


@pytest.fixture
def folder(tmp_path):
    make_sae(folded=False).save(tmp_path / "sae")
    return tmp_path / "sae"


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config | {"config_sha256": manifest.seal(config)}))


# ---- our config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version: expected 1, found 2"),
        ({"format_version": ...}, "format_version: expected 1, found None"),
        ({"format": "other"}, "format: expected 'gemmascope', found 'other'"),
        ({"format": ...}, "format: expected 'gemmascope', found None"),
        ({"sha256": None}, "sha256: expected 64 hexadecimal digits, found None"),
        ({"sha256": "\n"}, "sha256: expected 64 hexadecimal digits, found '\\n'"),
        ({"d_sae": ...}, "expected the keys of format version 1, found more or fewer: d_sae"),
        ({"new\n": 1}, "expected the keys of format version 1, found more or fewer: 'new\\n'"),
        ({"d_model": "4"}, "d_model: expected int, found str"),
        ({"d_sae": True}, "d_sae: expected int, found bool"),
        ({"pre_encoder_bias": 1}, "pre_encoder_bias: expected bool, found int"),
        ({"metadata": []}, "metadata: expected dict, found list"),
        ({"input_scale": -1}, "input_scale: expected a number > 0, found -1"),
        ({"input_scale": "1"}, "input_scale: expected a number > 0, found '1'"),
        ({"input_scale": True}, "input_scale: expected a number > 0, found True"),
        ({"architecture": "gated"}, "architecture: expected 'jump_relu' or 'topk', found 'gated'"),
        ({"architecture": ["topk"]}, "architecture: expected 'jump_relu' or 'topk', found ['topk']"),
        ({"k": 3}, "expected the keys of format version 1, found more or fewer: k"),
        ({"architecture": "topk"}, "expected the keys of format version 1, found more or fewer: k"),
        ({"architecture": "topk", "k": 0}, "k: expected 1 to d_sae = 7, found 0"),
        ({"architecture": "topk", "k": 8}, "k: expected 1 to d_sae = 7, found 8"),
        ({"architecture": "topk", "k": True}, "k: expected 1 to d_sae = 7, found True"),
        ({"architecture": "topk", "k": "3"}, "k: expected 1 to d_sae = 7, found '3'"),
        ({"weights": "../x"}, "weights: expected 'params.safetensors', found '../x'"),
    ],
)
def test_config_refuses(folder, changes, message):
    edit_config(folder, **changes)
    assert refusal(folder) == f"{folder}/config.json: {message}"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "Expecting value: line 1 column 1 (char 0)"),
        ('{"format": "gemmascope", "input_scale": NaN}', "the constant NaN"),
        ('{"format": "gemmascope", "input_scale": 1e999}', "a number beyond float64, 1e999"),
        ('{"format": "a", "format": "b"}', "the key 'format' twice"),
    ],
)
def test_config_must_be_strict_json(folder, text, found):
    (folder / "config.json").write_text(text)
    assert refusal(folder) == f"{folder}/config.json: expected JSON, found {found}"


def test_config_with_one_changed_digit(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"input_scale": 2.5', '"input_scale": 3.5'))
    assert refusal(folder).startswith(f"{path}: expected config_sha256 ")


def test_config_of_other_dimensions(folder):
    edit_config(folder, d_model=7, d_sae=4)
    expected = "expected d_model, d_sae = (7, 4) as in its config, found (4, 7)"
    assert refusal(folder) == f"{folder}/params.safetensors: {expected}"


def test_npz_with_the_config_of_an_unfolded_sae(tmp_path):
    make_sae().save(tmp_path / "params.npz")
    edit_config(tmp_path, input_scale=2.0)
    expected = "expected a folded SAE beside a .npz file, found input_scale 2.0"
    assert refusal(tmp_path) == f"{tmp_path}/config.json: {expected}"


@pytest.mark.parametrize("name", ["params.safetensors", "params.npz"])
def test_weights_of_another_sae_under_our_config(tmp_path, name):
    paths = [tmp_path / "1", tmp_path / "2"]
    for seed, path in enumerate(paths):
        make_sae(seed=seed).save(path / name if name.endswith("npz") else path)
    found, expected = (sha256(path / name)[:12] for path in paths)
    shutil.copy(paths[0] / name, paths[1] / name)
    expected = f"expected SHA-256 {expected}… as in config.json, found {found}…"
    assert refusal(paths[1]) == f"{paths[1] / name}: {expected}"


# ---- saving


def refuses_to_save(sae, path) -> str:
    before = sorted(os.walk(path.parent))
    with pytest.raises(ValueError) as caught:
        sae.save(path)
    assert sorted(os.walk(path.parent)) == before
    return str(caught.value)


def test_only_folded_saes_go_into_a_npz(tmp_path):
    message = (
        "sae: expected a folded SAE for a .npz file, got input_scale 2.5, pre_encoder_bias True: call fold() first"
    )
    assert refuses_to_save(make_sae(folded=False), tmp_path / "params.npz") == message


def test_fp64_does_not_go_into_a_npz(tmp_path):
    message = "sae: expected at most float32 for a .npz file, got float64: call float() first"
    assert refuses_to_save(make_sae(torch.float64), tmp_path / "params.npz") == message


@pytest.mark.parametrize("name", ["params.npz", "folder"])
def test_weights_that_load_would_refuse_are_not_saved(tmp_path, name):
    for key, value, message in (
        ("W_dec", float("nan"), "sae: W_dec: expected finite values, found nan"),
        ("threshold", float("inf"), "sae: threshold: expected finite values, found inf"),
    ):
        sae = make_sae()
        with torch.no_grad():
            getattr(sae, key).view(-1)[2] = value
        assert refuses_to_save(sae, tmp_path / name) == message


@pytest.mark.parametrize("name", ["params.npz", "folder"])
def test_thresholds_below_0_are_no_file(tmp_path, name):
    """`JumpReLUSAE.save` writes the 0 that they count as; what is given as tensors is taken at its word."""
    sae = make_sae()
    tensors = {key: getattr(sae, key).detach() for key in release.KEYS}
    tensors["threshold"] = torch.full_like(tensors["threshold"], -1)
    with pytest.raises(ValueError, match="sae: threshold: expected values ≥ 0, found -1"):
        release.write(tmp_path / name, tensors, SAEConfig(sae.input_scale, sae.pre_encoder_bias, {}))
    assert not (tmp_path / name).exists()


def test_safetensors_is_not_a_folder_name(tmp_path):
    path = tmp_path / "a.safetensors"
    assert refuses_to_save(make_sae(), path) == f"path: expected a name ending in .npz or a folder, got {path}"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"a": 10**40}, "expected JSON, found a number of 41 digits"),
        ({"a": -(10**39)}, "expected JSON, found a number of 41 digits"),
        ({"a": json.loads("[" * 63 + "]" * 63)}, "expected JSON, found nesting deeper than 64"),
        ({"a": "x" * (1 << 20)}, "expected a config of at most 1048576 bytes, got 1049"),
        ({1: "a", "1": "b"}, "expected JSON, found the key '1' twice"),
    ],
)
@pytest.mark.parametrize("name", ["params.npz", "sae"])
def test_metadata_that_load_would_refuse_is_not_saved(tmp_path, name, metadata, message):
    sae = make_sae()
    sae.save(tmp_path / name)
    sae.metadata = metadata
    assert refuses_to_save(sae, tmp_path / name).startswith(f"sae.metadata: {message}")
    assert refuses_to_save(sae, tmp_path / "new" / name).startswith(f"sae.metadata: {message}")
    assert_same_bits(JumpReLUSAE.load(tmp_path / name), make_sae())
    make_sae(seed=1).save(tmp_path / name)
    assert_same_bits(JumpReLUSAE.load(tmp_path / name), make_sae(seed=1))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**45), 10**45) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(metadata=st.dictionaries(st.text(), JSON_VALUES, max_size=4))
def test_metadata_comes_back_or_is_refused(tmp_path_factory, metadata):
    folder = tmp_path_factory.mktemp("sae")
    sae = make_sae()
    sae.metadata = metadata
    try:
        sae.save(folder)
    except ValueError as error:
        assert str(error).startswith("sae.metadata: expected ")  # noqa: PT017
        assert os.listdir(folder) == []
    else:
        assert JumpReLUSAE.load(folder).metadata == metadata


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("input_scale", float("nan"), "sae.input_scale: expected a finite number > 0, got nan"),
        ("input_scale", 0, "sae.input_scale: expected a finite number > 0, got 0"),
        ("input_scale", "2", "sae.input_scale: expected a number, got str"),
        ("pre_encoder_bias", 1, "sae.pre_encoder_bias: expected a bool, got int"),
        ("metadata", [], "sae.metadata: expected a dict, got list"),
        ("b_enc", torch.nn.Parameter(torch.zeros(8)), "sae: W_enc: expected shape [4, 8] (b_dec has"),
        ("b_dec", torch.nn.Parameter(torch.zeros(4).half()), "sae: b_dec: expected float32, found float16"),
        ("b_dec", torch.nn.Parameter(torch.zeros(4, device="meta")), "sae: b_dec: expected a dense tensor, found one"),
        ("b_dec", torch.nn.Parameter(torch.zeros(4).to_sparse()), "sae: b_dec: expected a dense tensor, found torch.s"),
        ("b_enc", torch.nn.Parameter(torch.zeros(0)), "sae: b_enc: expected shape [d_sae], found [0]"),
    ],
)
def test_what_load_would_refuse_is_not_saved(tmp_path, attribute, value, message):
    sae = make_sae(folded=False)
    setattr(sae, attribute, value)
    for name in ("sae", "params.npz"):
        with pytest.raises((ValueError, TypeError)) as caught:
            sae.save(tmp_path / name)
        assert str(caught.value).startswith(message)
    assert os.listdir(tmp_path) == []


def test_what_is_written_needs_no_metadata_and_no_memory_of_its_own(tmp_path):
    sae = make_sae()
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in sae.parameters()]).requires_grad_()
    tensors, start = {}, 0
    for key, parameter in sae.named_parameters():
        tensors[key] = flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    for path in (tmp_path / "sae", tmp_path / "params.npz"):
        release.write(path, tensors, SAEConfig())
        assert_same_bits(JumpReLUSAE.load(path), sae)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0])
@pytest.mark.parametrize("name", ["params.npz", "sae"])
def test_modes_are_those_of_the_umask(tmp_path, name, umask):
    before = os.umask(umask)
    try:
        make_sae().save(tmp_path / "new" / name)
    finally:
        os.umask(before)
    for path in (tmp_path / "new").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask


def test_metadata_must_fit_into_json(tmp_path):
    sae = make_sae()
    sae.metadata = {"loss": float("nan")}
    assert refuses_to_save(sae, tmp_path / "params.npz").startswith(
        "sae.metadata: expected values that JSON can hold: "
    )
    sae.metadata = {"tensor": torch.ones(1)}
    with pytest.raises(TypeError, match=r"sae.metadata: expected values that JSON can hold: "):
        sae.save(tmp_path / "params.npz")
    assert os.listdir(tmp_path) == []


def test_one_sae_per_folder(tmp_path):
    make_sae().save(tmp_path / "a" / "params.npz")
    expected = f"path: expected a folder for one SAE, got one that holds {tmp_path}/a/params.npz"
    assert refuses_to_save(make_sae(), tmp_path / "a") == expected
    make_sae().save(tmp_path / "b")
    expected = f"path: expected a folder for one SAE, got one that holds {tmp_path}/b/params.safetensors"
    assert refuses_to_save(make_sae(), tmp_path / "b" / "params.npz") == expected


def test_foreign_config_is_not_overwritten(tmp_path):
    for text in ('{"model_type": "gemma2"}', "not JSON"):
        (tmp_path / "config.json").write_text(text)
        expected = f"path: expected a folder without a foreign config, got one that holds {tmp_path}/config.json"
        assert refuses_to_save(make_sae(), tmp_path / "params.npz") == expected
        assert (tmp_path / "config.json").read_text() == text


@pytest.mark.parametrize("name", ["params.npz", "params.safetensors"])
def test_full_disk_leaves_the_old_sae(tmp_path, name):
    """The limit on file sizes stands for the full disk."""
    path = tmp_path / "sae" if name == "params.safetensors" else tmp_path / "sae" / name
    old, large = make_sae(), JumpReLUSAE(64, 512).fold()
    old.save(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(EnvironmentProblemError, match=rf"/sae/{name}: cannot be written: .*[Ff]ile too large"):
            large.save(path)
        with pytest.raises(EnvironmentProblemError):
            large.save(tmp_path / "new" / path.relative_to(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_same_bits(JumpReLUSAE.load(path), old)
    assert sorted(os.listdir(tmp_path / "sae")) == ["config.json", name]
    assert os.listdir(tmp_path) == ["sae"]


def test_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "params.npz"):
        with pytest.raises(EnvironmentProblemError, match=r"cannot be written: "):
            make_sae().save(path)


# ---- damage

KINDS = ("flip", "set", "cut", "insert", "copy")
MUTATION = st.tuples(st.sampled_from(KINDS), st.floats(0, 1, exclude_max=True), st.integers(0, 255))
MUTATIONS = st.lists(MUTATION, min_size=1, max_size=4)


def mutate(data: bytes, mutations) -> bytes:
    data = bytearray(data)
    for kind, position, value in mutations:
        at = int(position * len(data))
        if kind == "flip":
            data[at] ^= 1 << value % 8
        elif kind == "set":
            data[at : at + 4] = struct.pack("<I", value * 0x01000000 + value)[: len(data[at : at + 4])]
        elif kind == "cut":
            del data[at : at + value]
        elif kind == "insert":
            data[at:at] = bytes([value])
        else:
            data[at:at] = data[max(0, at - value) : at]
        data = data or bytearray(b"\0")
    return bytes(data)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("originals")
    make_sae().save(root / "npz" / "params.npz")
    make_sae(folded=False).save(root / "safetensors")
    np.savez_compressed(root / "plain.npz", **dict(np.load(root / "npz" / "params.npz")))
    return root


@pytest.mark.parametrize("file", ["npz/params.npz", "npz/config.json", "plain.npz"])
@settings(max_examples=250, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(mutations=MUTATIONS)
def test_damaged_gemma_scope_file(originals, file, mutations):
    check_damage(originals, file, "npz" if "/" in file else file, mutations)


@pytest.mark.parametrize("file", ["safetensors/params.safetensors", "safetensors/config.json"])
@settings(max_examples=250, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(mutations=MUTATIONS)
def test_damaged_folder(originals, file, mutations):
    check_damage(originals, file, "safetensors", mutations)


def check_damage(root, file, what, mutations):
    """Loading refuses in one line or gives the same SAE (damage to padding; a config beside a .npz of which none of our
    own keys is left is ignored)."""
    original = JumpReLUSAE.load(root / what)
    data = (root / file).read_bytes()
    try:
        (root / file).write_bytes(mutate(data, mutations))
        try:
            loaded = JumpReLUSAE.load(root / what)
        except BadFileError as error:
            message = str(error)
        else:
            message = ""
            assert_same_bits(loaded, original)
            ignored = file == "npz/config.json" and not manifest.is_ours(root / file)
            assert loaded.metadata == ({} if ignored else original.metadata)
        assert message.isprintable()
    finally:
        (root / file).write_bytes(data)


def test_every_bit_of_a_small_npz_matters_or_changes_nothing(tmp_path):
    """One flipped bit in every byte, without the help of our SHA-256: the CRC-32 of the format finds it."""
    make_sae().save(tmp_path / "params.npz")
    (tmp_path / "config.json").unlink()
    original, data = JumpReLUSAE.load(tmp_path), (tmp_path / "params.npz").read_bytes()
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        (tmp_path / "params.npz").write_bytes(flipped)
        try:
            loaded = JumpReLUSAE.load(tmp_path)
        except BadFileError:
            continue
        assert_same_bits(loaded, original)


@pytest.mark.parametrize("name", ["params.npz", "sae"])
def test_every_byte_of_our_config_matters(tmp_path, name):
    make_sae().save(tmp_path / name)
    path = manifest.path_for(tmp_path / name) if name.endswith("npz") else tmp_path / name / "config.json"
    data = path.read_bytes()
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        path.write_bytes(flipped)
        try:
            loaded = JumpReLUSAE.load(tmp_path / name)
        except BadFileError:
            continue
        assert loaded.metadata == make_sae().metadata  # white space between the values
