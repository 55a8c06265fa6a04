"""`load_sae`, `device` and `dtype`, and what the files of each class say."""

import hashlib
import json

import numpy as np
import pytest
import torch

import gemmascope
from gemmascope import JumpReLUSAE, TopKSAE, load_pretrained_sae, load_sae
from gemmascope.errors import BadFileError
from gemmascope.formats import release
from gemmascope.formats.manifest import SAEConfig, seal, text

D_MODEL, D_SAE, K = 4, 7, 3


def of_class(cls, dtype=torch.float32):
    arguments = (D_MODEL, D_SAE, K) if cls is TopKSAE else (D_MODEL, D_SAE)
    sae = cls(*arguments, input_scale=2.5, metadata={"layer": 3}, generator=torch.Generator().manual_seed(0))
    return sae.to(dtype)


@pytest.mark.parametrize("cls", [JumpReLUSAE, TopKSAE])
def test_the_file_says_the_class(tmp_path, cls):
    of_class(cls).save(tmp_path / "sae")
    for sae in (load_sae(tmp_path / "sae"), load_pretrained_sae(tmp_path, "sae"), cls.from_pretrained(tmp_path, "sae")):
        assert type(sae) is cls
        assert torch.equal(sae.W_enc, of_class(cls).W_enc)
    other = TopKSAE if cls is JumpReLUSAE else JumpReLUSAE
    for call in (lambda: other.load(tmp_path / "sae"), lambda: other.from_pretrained(tmp_path, "sae")):
        with pytest.raises(BadFileError) as caught:
            call()
        assert str(caught.value).startswith(f"{tmp_path}/sae: expected a ")
        assert str(caught.value).endswith(": gemmascope.load_sae opens both")


@pytest.mark.parametrize("cls", [JumpReLUSAE, TopKSAE])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype(tmp_path, cls, stored, dtype):
    sae = of_class(cls, stored)
    sae.save(tmp_path / "sae")
    loaded = cls.load(tmp_path / "sae", dtype=dtype)
    for name, parameter in loaded.named_parameters():
        expected = dtype or stored
        if name == "threshold":
            expected = torch.promote_types(expected, torch.float32)
        assert parameter.dtype == expected, name
        assert torch.equal(parameter, getattr(sae, name).to(expected)), name
    assert loaded.W_enc.T.is_contiguous()
    assert loaded.W_dec.is_contiguous()


@pytest.mark.parametrize("cls", [JumpReLUSAE, TopKSAE])
def test_device(tmp_path, cls):
    of_class(cls).save(tmp_path / "sae")
    assert cls.load(tmp_path / "sae", device="meta").b_enc.is_meta
    assert cls.load(tmp_path / "sae", device=torch.device("cpu")).b_enc.device.type == "cpu"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtype": "float32"}, TypeError, "dtype: expected a dtype, got str"),
        ({"dtype": torch.int8}, TypeError, "dtype: expected float"),
        ({"device": "nowhere"}, ValueError, "device: expected "),
        ({"device": 1.5}, TypeError, "device: expected "),
    ],
)
def test_arguments_are_checked_before_anything_is_read(arguments, error, message):
    for call in (load_sae, JumpReLUSAE.load, TopKSAE.load):
        with pytest.raises(error) as caught:
            call("missing", **arguments)
        assert str(caught.value).startswith(message)
    with pytest.raises(error):
        load_pretrained_sae("missing", "missing", **arguments)


@pytest.mark.parametrize(("dtype", "key"), [(torch.float16, "W_dec"), (torch.float32, "threshold")])
def test_weights_that_a_dtype_does_not_hold(tmp_path, dtype, key):
    sae = of_class(JumpReLUSAE, torch.float64)
    with torch.no_grad():
        getattr(sae, key).view(-1)[0] = 1e5 if dtype == torch.float16 else 1e300
    sae.save(tmp_path / "sae")
    with pytest.raises(
        ValueError, match=f"^dtype: expected one that holds {key}, got {str(dtype)[6:]}, in which it is"
    ):
        load_sae(tmp_path / "sae", dtype=dtype)


def test_names_at_the_top():
    assert {"load_sae", "load_pretrained_sae", "TopKSAE"} <= set(gemmascope.__all__)


# ---- our config


def test_the_config_of_a_jumprelu_sae_is_as_it_was(tmp_path):
    """Byte by byte: files of before TopK and after are the same files."""
    config = SAEConfig(2.5, True, {"layer": 3}, (D_MODEL, D_SAE))
    written = text(config, torch.float32, tmp_path / "params.safetensors", "0" * 64)
    expected = f"""{{
  "format": "gemmascope",
  "format_version": 1,
  "gemmascope_version": "{gemmascope.__version__}",
  "architecture": "jump_relu",
  "d_model": 4,
  "d_sae": 7,
  "dtype": "float32",
  "input_scale": 2.5,
  "pre_encoder_bias": true,
  "weights": "params.safetensors",
  "metadata": {{
    "layer": 3
  }},
  "sha256": "{"0" * 64}",
  "config_sha256": "{seal(json.loads(written))}"
}}
"""
    assert written == expected
    canonical = json.dumps(
        {key: value for key, value in json.loads(expected).items() if key != "config_sha256"},
        sort_keys=True,
        separators=(",", ":"),
    )
    assert json.loads(written)["config_sha256"] == hashlib.sha256(canonical.encode()).hexdigest()


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (
            SAEConfig(architecture="gated"),
            ValueError,
            "config.architecture: expected 'jump_relu' or 'topk', got 'gated'",
        ),
        (SAEConfig(architecture="topk"), TypeError, "sae.k: expected an int, got NoneType"),
        (SAEConfig(architecture="topk", k=0), ValueError, "sae.k: expected at least 1, got 0"),
        (SAEConfig(architecture="topk", k=8), ValueError, "sae.k: expected at most 7, got 8"),
        (SAEConfig(architecture="topk", k=True), TypeError, "sae.k: expected an int, got bool"),
        (SAEConfig(k=3), ValueError, "sae.k: expected None of a JumpReLU SAE, got 3"),
    ],
)
def test_configs_that_are_not_written(tmp_path, config, error, message):
    keys = release.keys_of(config)
    tensors = {key: getattr(of_class(JumpReLUSAE), key).detach() for key in keys}
    with pytest.raises(error) as caught:
        release.write(tmp_path / "sae", tensors, config)
    assert str(caught.value) == message
    assert list(tmp_path.iterdir()) == []


def test_tensors_of_the_other_architecture(tmp_path):
    tensors = {key: getattr(of_class(JumpReLUSAE), key).detach() for key in release.KEYS}
    with pytest.raises(ValueError, match=r"^sae: expected the keys W_enc, W_dec, b_enc, b_dec, found also threshold$"):
        release.write(tmp_path / "sae", tensors, SAEConfig(architecture="topk", k=2))
    of_class(TopKSAE).save(tmp_path / "sae")
    config = json.loads((tmp_path / "sae" / "config.json").read_text())
    del config["k"]
    config |= {"architecture": "jump_relu"}
    (tmp_path / "sae" / "config.json").write_text(json.dumps(config | {"config_sha256": seal(config)}))
    with pytest.raises(BadFileError, match=r"found no threshold$"):
        load_sae(tmp_path / "sae")


def test_a_topk_config_beside_a_npz(tmp_path):
    sae = JumpReLUSAE(D_MODEL, D_SAE, pre_encoder_bias=False)
    sae.save(tmp_path / "params.npz")
    config = json.loads((tmp_path / "config.json").read_text()) | {"architecture": "topk", "k": 2}
    (tmp_path / "config.json").write_text(json.dumps(config | {"config_sha256": seal(config)}))
    with pytest.raises(BadFileError, match=r"architecture: expected 'jump_relu' beside a .npz file, found 'topk'$"):
        load_sae(tmp_path)
    assert np.load(tmp_path / "params.npz")["W_enc"].shape == (D_MODEL, D_SAE)
