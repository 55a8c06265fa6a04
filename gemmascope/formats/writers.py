"""The files of each foreign format, from tensors that `formats.export` has checked.

Weights come first and the config after them: a reader that finds the config finds all.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from ..checks import dtype_name
from . import hook_names, release
from .files import atomic_write, json_text, shown
from .manifest import CONFIG, SAEConfig

SAELENS_WEIGHTS, SAELENS_CONFIG = "sae_weights.safetensors", "cfg.json"
CIRCUIT_TRACER_CONFIG = "config.yaml"
# What a file of SAELens must say to be read as one of version 6, of any version since.
SAELENS_VERSION = "6.0.0"
THRESHOLD_OF_CIRCUIT_TRACER = "activation_function.threshold"
SKIP_OF_GEMMA_SCOPE_2 = "affine_skip_connection"


def gemma_scope(tensors: dict[str, Tensor], config: SAEConfig, folder: Path) -> None:
    if config.architecture == "jump_relu":
        release.write(folder / release.NPZ, tensors, config)
        return
    text = gemma_scope_2_config(tensors, config)
    arrays: dict[str, Any] = {key: stored(tensor).numpy() for key, tensor in tensors.items()}
    with atomic_write(folder / release.NPZ) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)
    write_text(folder / CONFIG, text)


def gemma_scope_2(tensors: dict[str, Tensor], config: SAEConfig, folder: Path) -> None:
    text = gemma_scope_2_config(tensors, config)
    theirs = {key.lower(): tensor for key, tensor in tensors.items() if key != "W_skip"}
    if "W_skip" in tensors:
        theirs[SKIP_OF_GEMMA_SCOPE_2] = tensors["W_skip"].T
    write_safetensors(theirs, folder / release.SAFETENSORS)
    write_text(folder / CONFIG, text)


def gemma_scope_2_config(tensors: dict[str, Tensor], config: SAEConfig) -> str:
    metadata, is_sae = config.metadata or {}, config.architecture == "jump_relu"
    site = hook_names.hugging_face(metadata.get("site"))
    entries = {
        "hf_hook_point_in": site,
        "hf_hook_point_out": site if is_sae else hook_names.hugging_face(metadata.get("site_out")),
        "width": len(tensors["b_enc"]),
        "model_name": text_of(metadata, "model"),
        "architecture": "jump_relu",
        "l0": l0_of(metadata),
        "affine_connection": "W_skip" in tensors,
        "type": "sae" if is_sae else "transcoder",
    }
    return json_text(entries, "sae.metadata")


def text_of(metadata: dict[str, Any], key: str) -> str | None:
    """What a free-form fact says, where it is text."""
    value = metadata.get(key)
    return value if isinstance(value, str) else None


def l0_of(metadata: dict[str, Any]) -> Any:
    """The L0 by our name, or by that of Gemma Scope 2's config."""
    return metadata.get("average_l0", metadata.get("l0"))


def saelens(tensors: dict[str, Tensor], config: SAEConfig, folder: Path) -> None:
    text = saelens_config(tensors, config)
    write_safetensors(tensors, folder / SAELENS_WEIGHTS)
    write_text(folder / SAELENS_CONFIG, text)


def saelens_config(tensors: dict[str, Tensor], config: SAEConfig) -> str:
    """Its cfg.json. hook_z of TransformerLens has the heads apart, which its SAEs then reshape."""
    metadata, (d_in, d_sae) = config.metadata or {}, tensors["W_enc"].shape
    site = hook_names.hugging_face(metadata.get("site"))
    hook, split = hook_names.transformer_lens(site), hook_names.split(site)
    architecture = {"jump_relu": "jumprelu", "topk": "topk"}.get(config.architecture, "jumprelu_transcoder")
    told = {
        "sae_lens_version": SAELENS_VERSION,
        "model_name": text_of(metadata, "model"),
        "hook_name": hook,
        "hf_hook_name": site,
        "average_l0": l0_of(metadata),
    }
    entries = {
        "architecture": architecture if "W_skip" not in tensors else "jumprelu_skip_transcoder",
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": dtype_name(tensors["W_dec"].dtype),
        "device": "cpu",
        "apply_b_dec_to_input": config.pre_encoder_bias,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if split and split[1] == hook_names.ATTENTION_OUT else "none",
    }
    if config.architecture == "topk":
        entries |= {"k": config.k, "rescale_acts_by_decoder_norm": False}
    elif config.architecture != "jump_relu":
        out = hook_names.hugging_face(metadata.get("site_out"))
        entries["d_out"] = len(tensors["b_dec"])
        told |= {"hook_name_out": hook_names.transformer_lens(out), "hf_hook_name_out": out}
    entries["metadata"] = {key: value for key, value in told.items() if value is not None}
    return json_text(entries, "sae.metadata")


def layer_file(metadata: dict[str, Any]) -> str:
    layer = metadata.get("layer")
    if type(layer) is not int or layer < 0:
        raise ValueError(f"sae.metadata['layer']: expected the layer of the transcoder, got {layer!r:.40}")
    return f"layer_{layer}.safetensors"


def circuit_tracer(tensors: dict[str, Tensor], config: SAEConfig, folder: Path) -> None:
    """One layer of a set; the config, which is that of all layers, is written with the first of them."""
    metadata, file = config.metadata or {}, folder / CIRCUIT_TRACER_CONFIG
    text = circuit_tracer_config(metadata)
    if file.exists() and file.read_bytes() != text.encode():
        raise ValueError(
            f"path: expected {shown(file)} of transcoders of the same model and sites, found that of others"
        )
    theirs = {key: tensor for key, tensor in tensors.items() if key != "threshold"}
    theirs["W_enc"], theirs[THRESHOLD_OF_CIRCUIT_TRACER] = tensors["W_enc"].T, tensors["threshold"]
    write_safetensors(theirs, folder / layer_file(metadata))
    write_text(file, text)


def circuit_tracer_config(metadata: dict[str, Any]) -> str:
    """Its config.yaml: strings of JSON, which are strings of YAML too."""
    layer = metadata.get("layer")
    hooks = {}
    for key, field in (("site", "feature_input_hook"), ("site_out", "feature_output_hook")):
        found = hook_names.split(metadata.get(key))
        if found is None or found[0] != layer:
            raise ValueError(
                f"sae.metadata[{key!r}]: expected a site of layer {layer} that TransformerLens has a name for, got"
                f" {metadata.get(key)!r:.80}"
            )
        hooks[field] = hook_names.TRANSFORMER_LENS[found[1]]
    model = metadata.get("model")
    if not isinstance(model, str):
        raise ValueError(f"sae.metadata['model']: expected the name of the model, got {model!r:.40}")
    entries = {"model_name": model, "model_kind": "transcoder_set", **hooks}
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in entries.items())


def write_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    with atomic_write(path) as temporary:
        safetensors.torch.save_file(
            {key: stored(tensor) for key, tensor in tensors.items()}, temporary, metadata={"format": "pt"}
        )


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def stored(tensor: Tensor) -> Tensor:
    """In C order on the CPU, in memory of its own, without which `safetensors` refuses it."""
    tensor = tensor.detach().to("cpu").contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else torch.clone(tensor)
