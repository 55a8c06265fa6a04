"""What is sparsify's alone."""

import pytest

from gemmascope import load_sae
from gemmascope.errors import BadFileError
from tests.formats.others import D_MODEL, D_SAE, K, sparsify, write_sparsify


def refusal(folder, **changes) -> str:
    case = sparsify(**changes)
    write_sparsify(folder, case.tensors, case.config)
    with pytest.raises(BadFileError) as caught:
        load_sae(folder)
    return str(caught.value).removeprefix(f"{folder}/")


def test_metadata(tmp_path):
    case = sparsify()
    sae = load_sae(write_sparsify(tmp_path, case.tensors, case.config))
    assert sae.metadata == {"converted_from": {"format": "sparsify", "architecture": "topk", "folded": []}}
    assert (sae.k, sae.pre_encoder_bias, sae.input_scale) == (K, True, 1.0)


def test_defaults_of_the_package(tmp_path):
    case = sparsify(k=..., expansion_factor=..., activation=..., transcode=..., skip_connection=..., num_latents=D_SAE)
    assert refusal(tmp_path, k=..., num_latents=D_SAE).endswith(f"k: expected 1 to d_sae = {D_SAE}, found 32")
    assert load_sae(write_sparsify(tmp_path, case.tensors, case.config | {"k": 2})).k == 2
    assert refusal(tmp_path, expansion_factor=...) == (
        f"sae.safetensors: expected d_model, d_sae = ({D_MODEL}, {32 * D_MODEL}) as in its config, found"
        f" ({D_MODEL}, {D_SAE})"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transcode": True}, "transcode: expected false, found true: a transcoder is not an SAE's"),
        ({"skip_connection": True}, "skip_connection: expected false, found true: a skip connection is not an SAE's"),
        ({"signed": True}, "signed: expected false, found true: signs is not an SAE's"),
        ({"transcode": 1}, "transcode: expected bool, found int"),
        ({"activation": "groupmax"}, "activation: expected 'topk', found 'groupmax'"),
        ({"num_latents": "a"}, "num_latents: expected int, found str"),
        ({"expansion_factor": 0}, "expansion_factor: expected at least 1, found 0"),
    ],
)
def test_refused_by_name(tmp_path, changes, message):
    assert refusal(tmp_path, **changes) == f"cfg.json: {message}"


def test_num_latents_of_another_file(tmp_path):
    for wrong in (-1, D_SAE + 1):
        assert refusal(tmp_path, num_latents=wrong).startswith(
            f"sae.safetensors: expected d_model, d_sae = (4, {wrong})"
        )
