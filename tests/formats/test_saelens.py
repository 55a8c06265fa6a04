"""What is SAELens's alone: its versions, what was folded into weights, what is refused by name."""

import math

import pytest
import torch

from gemmascope import JumpReLUSAE, TopKSAE, load_sae
from gemmascope.errors import BadFileError
from tests.formats import others
from tests.formats.others import D_MODEL, D_SAE, ROWS, K, saelens, saelens_config, write_saelens


def refusal(folder, name="cfg.json") -> str:
    with pytest.raises(BadFileError) as caught:
        load_sae(folder)
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith(f"{folder}/{name}: ")
    return message.removeprefix(f"{folder}/{name}: ")


def written(folder, architecture="jumprelu", tensors=None, **changes):
    case = saelens(architecture, **changes)
    return write_saelens(folder, case.tensors | (tensors or {}), case.config)


# ---- configs of its versions


def test_metadata_of_version_6(tmp_path):
    sae = load_sae(written(tmp_path))
    assert sae.metadata == {
        "model": "gemma-2-2b",
        "site": "model.layers.3.output",
        "hook_name": "blocks.3.hook_resid_post",
        "prepend_bos": True,
        "context_size": 1024,
        "converted_from": {"format": "saelens", "architecture": "jumprelu", "folded": [], "version": "6.54.12"},
    }


def old_config(**changes):
    """As version 3 to 5 writes it: flat, by other names."""
    config = {
        "architecture": "standard",
        "d_in": D_MODEL,
        "d_sae": D_SAE,
        "activation_fn_str": "relu",
        "apply_b_dec_to_input": False,
        "finetuning_scaling_factor": False,
        "context_size": 128,
        "model_name": "gemma-2b",
        "hook_name": "blocks.6.hook_resid_post",
        "hook_layer": 6,
        "hook_head_index": None,
        "prepend_bos": True,
        "dataset_path": "a/b",
        "dataset_trust_remote_code": True,
        "normalize_activations": "none",
        "dtype": "torch.float32",
        "device": "cuda",
        "sae_lens_training_version": "3.2.1",
        "activation_fn_kwargs": {},
        "neuronpedia_id": "gemma-2b/6-res",
    } | changes
    return {key: value for key, value in config.items() if value is not ...}


def test_flat_config_of_version_5(tmp_path):
    sae = load_sae(write_saelens(tmp_path, others.common(), old_config()))
    assert type(sae) is JumpReLUSAE
    assert sae.metadata == {
        "model": "gemma-2b",
        "site": "blocks.6.hook_resid_post",
        "hook_name": "blocks.6.hook_resid_post",
        "prepend_bos": True,
        "context_size": 128,
        "neuronpedia_id": "gemma-2b/6-res",
        "converted_from": {"format": "saelens", "architecture": "standard", "folded": []},
    }
    assert not sae.threshold.any()
    assert torch.equal(sae.encode(ROWS), saelens("standard", apply_b_dec_to_input=False).encode(ROWS))


def test_topk_as_an_activation_function(tmp_path):
    for architecture in ("standard", "topk", ...):
        config = old_config(architecture=architecture, activation_fn_str="topk", activation_fn_kwargs={"k": K})
        sae = load_sae(write_saelens(tmp_path, others.common(), config))
        assert type(sae) is TopKSAE
        assert torch.equal(sae.encode(ROWS), saelens("topk", apply_b_dec_to_input=False).encode(ROWS))


def test_the_oldest_names(tmp_path):
    config = old_config(
        hook_name=..., hook_point="blocks.2.hook_resid_pre", activation_fn_str=..., activation_fn="relu"
    )
    config |= {"hook_point_head_index": 5, "normalize_activations": False}
    del config["apply_b_dec_to_input"], config["architecture"], config["dtype"]
    sae = load_sae(write_saelens(tmp_path, others.common(), config))
    assert (sae.metadata["site"], sae.metadata["hook_head_index"]) == ("blocks.2.hook_resid_pre", 5)
    assert torch.equal(sae.encode(ROWS), saelens("standard").encode(ROWS)), "b_dec is subtracted where nothing is said"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("bfloat16", torch.bfloat16), ("torch.float16", torch.float16), ("float64", torch.float64), (..., torch.float32)],
)
def test_weights_are_cast_to_the_dtype_of_the_config(tmp_path, name, dtype):
    case = saelens("jumprelu", dtype=name)
    case.tensors["W_dec"] += 1e-4
    sae = load_sae(write_saelens(tmp_path, case.tensors, case.config))
    assert torch.equal(sae.W_dec, case.tensors["W_dec"].to(dtype))
    assert sae.threshold.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(sae.threshold, case.tensors["threshold"].to(dtype).clamp(min=0).to(sae.threshold.dtype))


def test_files_without_sizes(tmp_path):
    assert load_sae(written(tmp_path, d_sae=..., d_in=...)).d_sae == D_SAE


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    written(tmp_path)
    (tmp_path / "sparsity.safetensors").write_bytes(b"damaged")
    (tmp_path / "runner_cfg.json").write_text("damaged")
    load_sae(tmp_path)


# ---- thresholds


def test_log_threshold(tmp_path):
    case = saelens("jumprelu")
    log = case.tensors.pop("threshold").abs().add(0.1).log()
    sae = load_sae(write_saelens(tmp_path, case.tensors | {"log_threshold": log}, case.config))
    assert torch.equal(sae.threshold, log.exp())


def test_thresholds_below_0_count_as_0(tmp_path):
    sae = load_sae(written(tmp_path, tensors={"threshold": torch.linspace(-1, 1, D_SAE)}))
    assert torch.equal(sae.threshold, torch.linspace(-1, 1, D_SAE).clamp(min=0))


def test_a_log_threshold_that_overflows(tmp_path):
    case = saelens("jumprelu")
    del case.tensors["threshold"]
    write_saelens(tmp_path, case.tensors | {"log_threshold": torch.full((D_SAE,), 1e3)}, case.config)
    assert refusal(tmp_path, "sae_weights.safetensors") == "threshold: expected finite values, found inf"


def test_one_threshold(tmp_path):
    expected = "expected threshold or log_threshold, found"
    log = {"log_threshold": torch.zeros(D_SAE)}
    assert refusal(written(tmp_path, tensors=log), "sae_weights.safetensors") == f"{expected} both"
    case = saelens("jumprelu")
    del case.tensors["threshold"]
    assert refusal(write_saelens(tmp_path, *case[:2]), "sae_weights.safetensors") == f"{expected} neither"


# ---- what is folded into the weights


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_decoder_norms(tmp_path, architecture):
    """Latents are chosen by z·‖W_dec‖, and divided by it before they are decoded."""
    case = saelens(architecture, rescale_acts_by_decoder_norm=True)
    norm = case.tensors["W_dec"].norm(dim=1)
    z = (ROWS - case.tensors["b_dec"]) @ case.tensors["W_enc"] + case.tensors["b_enc"]
    z = z.double() * norm.double()
    f = others.topk(z) if architecture == "topk" else others.gate(z, 0.75)
    sae = load_sae(write_saelens(tmp_path, case.tensors, case.config), dtype=torch.float64)
    assert sae.metadata["converted_from"]["folded"] == ["decoder_norm"]
    torch.testing.assert_close(sae.encode(ROWS.double()), f, rtol=1e-5, atol=1e-5)
    x_hat = (f / norm.double()) @ case.tensors["W_dec"].double() + case.tensors["b_dec"].double()
    torch.testing.assert_close(sae(ROWS.double()), x_hat, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_a_latent_that_writes_nothing(tmp_path):
    case = saelens("topk", rescale_acts_by_decoder_norm=True)
    case.tensors["W_dec"][2] = 0
    sae = load_sae(write_saelens(tmp_path, case.tensors, case.config))
    assert not sae.encode(ROWS)[:, 2].any()
    assert sae(ROWS).isfinite().all()


@pytest.mark.parametrize("key", ["scaling_factor", "finetuning_scaling_factor"])
def test_finetuning_factor(tmp_path, key):
    factor = 2.0 ** (torch.arange(D_SAE) % 3 - 1)
    sae = load_sae(written(tmp_path, "standard", {key: factor}, finetuning_scaling_factor=True))
    case = saelens("standard")
    assert sae.metadata["converted_from"]["folded"] == ["finetuning_scaling_factor"]
    assert torch.equal(sae.encode(ROWS), case.encode(ROWS))
    assert torch.equal(sae(ROWS), case.decode(case.encode(ROWS) * factor))


def test_factor_of_ones_is_none(tmp_path):
    sae = load_sae(written(tmp_path, "standard", {"scaling_factor": torch.ones(D_SAE)}))
    assert sae.metadata["converted_from"]["folded"] == []
    assert torch.equal(sae.W_dec, others.common()["W_dec"])


def test_factor_that_the_config_does_not_know(tmp_path):
    factor = {"scaling_factor": torch.full((D_SAE,), 2.0)}
    assert refusal(written(tmp_path, "standard", factor)) == (
        "finetuning_scaling_factor: expected true, as scaling_factor of the weights is not 1, found false"
    )
    both = factor | {"finetuning_scaling_factor": torch.ones(D_SAE)}
    assert refusal(written(tmp_path, "standard", both), "sae_weights.safetensors") == (
        "expected one of scaling_factor and finetuning_scaling_factor, found both"
    )


def test_gated_says_so(tmp_path):
    sae = load_sae(written(tmp_path, "gated"))
    assert sae.metadata["converted_from"] == {
        "format": "saelens", "architecture": "gated", "folded": ["gate"], "version": "6.54.12",
    }  # fmt: skip


def test_gated_that_overflows(tmp_path):
    written(tmp_path, "gated", {"r_mag": torch.full((D_SAE,), 1e3)})
    assert "expected finite values, found" in refusal(tmp_path, "sae_weights.safetensors")


# ---- refusals


ARCHITECTURES = "standard, topk, jumprelu, gated, batchtopk, matryoshka_batchtopk"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "temporal"}, f"architecture: expected {ARCHITECTURES}, found 'temporal'"),
        ({"architecture": "a\n"}, f"architecture: expected {ARCHITECTURES}, found 'a\\n'"),
        ({"architecture": 3}, "architecture: expected str, found int"),
        (
            {"architecture": "skip_transcoder"},
            "architecture: expected an SAE, found 'skip_transcoder', which reads one site and writes another",
        ),
        ({"activation_fn": "tanh-relu"}, "activation_fn: expected 'relu' or 'topk', found 'tanh-relu'"),
        ({"architecture": "topk"}, "k: expected the number of latents of a TopK SAE, found none"),
        (
            {"normalize_activations": "expected_average_only_in"},
            "normalize_activations: expected 'none', found 'expected_average_only_in', whose factor the folder does not"
            " hold: fold it in with fold_activation_norm_scaling_factor and save again",
        ),
        (
            {"normalize_activations": True},
            "normalize_activations: expected 'none', found 'expected_average_only_in', whose factor the folder does not"
            " hold: fold it in with fold_activation_norm_scaling_factor and save again",
        ),
        (
            {"normalize_activations": "layer_norm"},
            "normalize_activations: expected 'none', found 'layer_norm', which is not in the weights",
        ),
        ({"normalize_activations": "x"}, "normalize_activations: expected 'none', found 'x', which is not known"),
        ({"normalize_activations": 3}, "normalize_activations: expected str, found int"),
        ({"reshape_activations": "x"}, "reshape_activations: expected 'none' or 'hook_z', found 'x'"),
        ({"apply_b_dec_to_input": 1}, "apply_b_dec_to_input: expected bool, found int"),
        ({"dtype": "int8"}, "dtype: expected float16, bfloat16, float32, float64, float, half, double, found 'int8'"),
        ({"d_in": 0}, "d_in: expected at least 1, found 0"),
        ({"d_sae": "12"}, "d_sae: expected int, found str"),
        ({"metadata": [1]}, "metadata: expected dict, found list"),
        ({"metadata": {"hook_name": 3}}, "metadata: hook_name: expected str, found int"),
    ],
)
def test_refused_by_name(tmp_path, changes, message):
    case = saelens("standard", **changes)
    assert refusal(write_saelens(tmp_path, case.tensors, saelens_config("standard") | changes)) == message


def test_hook_z_is_read_flat(tmp_path):
    case = saelens("jumprelu", reshape_activations="hook_z")
    assert load_sae(write_saelens(tmp_path, case.tensors, case.config)).d_model == D_MODEL


def test_dtype_that_does_not_hold_the_weights(tmp_path):
    written(tmp_path, tensors={"W_dec": torch.full((D_SAE, D_MODEL), 1e6)}, dtype="float16")
    assert refusal(tmp_path, "sae_weights.safetensors") == "W_dec: expected finite values, found inf"
    assert math.isinf(torch.tensor(1e6).half().item())
