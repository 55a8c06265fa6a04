"""Folders as SAELens, sparsify and dictionary_learning write them, by their documented keys, and what they compute.

Weights are small multiples of 1/8 (b_enc: of 1/512) and inputs small integers, so that sums are exact in any order:
results are compared bit by bit.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

D_MODEL, D_SAE, K = 4, 12, 3
ROWS = torch.randint(-3, 4, (200, D_MODEL), generator=torch.Generator().manual_seed(9)).float()


def exact(*shape: int, seed: int, low: int = -8, high: int = 9) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).float() / 8


def common() -> dict[str, Tensor]:
    return {
        "W_enc": exact(D_MODEL, D_SAE, seed=1),
        "W_dec": exact(D_SAE, D_MODEL, seed=2),
        # Each latent with a fraction of its own: no two z are equal, whose order `torch.topk` does not promise.
        "b_enc": exact(D_SAE, seed=3) + torch.arange(D_SAE) / 512,
        "b_dec": exact(D_MODEL, seed=4),
    }


def topk(z: Tensor, k: int = K) -> Tensor:
    """relu of the k largest; of equals the first."""
    latents = z.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(z).scatter(1, latents, z.gather(1, latents).relu())


def gate(z: Tensor, threshold: Tensor | float) -> Tensor:
    return z.relu() * (z.relu() > threshold)


class Case(NamedTuple):
    """What is in the folder, and encode and decode in the words of the project."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]


def write_saelens(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def write_sparsify(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def write_dictionary_learning(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# ---- SAELens


def saelens_config(architecture: str, /, **changes: Any) -> dict[str, Any]:
    """As version 6 writes it."""
    metadata = {"sae_lens_version": "6.54.12", "model_name": "gemma-2-2b", "hook_name": "blocks.3.hook_resid_post"}
    config = {
        "d_in": D_MODEL,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata | {"hf_hook_name": "model.layers.3.output", "prepend_bos": True, "context_size": 1024},
        "architecture": architecture,
    } | changes
    return {key: value for key, value in config.items() if value is not ...}


def saelens(architecture: str, /, **changes: Any) -> Case:
    tensors, config = common(), saelens_config(architecture, **changes)
    threshold, gates = exact(D_SAE, seed=5, low=-2), [exact(D_SAE, seed=seed) for seed in (6, 7)]
    r_mag = torch.zeros(D_SAE)  # e⁰ = 1 is exact
    if architecture == "gated":
        tensors |= {"b_gate": gates[0], "b_mag": gates[1], "r_mag": r_mag}
        del tensors["b_enc"]
    if architecture == "jumprelu":
        tensors["threshold"] = threshold
    if architecture == "topk":
        config["k"] = K
    if architecture in ("batchtopk", "matryoshka_batchtopk"):
        tensors["topk_threshold"] = torch.tensor(0.75, dtype=torch.float64)
        config["k"] = 2.5

    def encode(x: Tensor) -> Tensor:
        z = (x - tensors["b_dec"] * config.get("apply_b_dec_to_input", True)) @ tensors["W_enc"]
        if architecture == "gated":
            return (z + gates[0] > 0) * (r_mag.exp() * z + gates[1]).relu()
        z = z + tensors["b_enc"]
        if architecture == "standard":
            return z.relu()
        if architecture == "jumprelu":
            return z.relu() * (z > threshold)
        return topk(z) if architecture == "topk" else gate(z, 0.75)

    return Case(tensors, config, encode, lambda f: f @ tensors["W_dec"] + tensors["b_dec"])


# ---- sparsify


def sparsify(**changes: Any) -> Case:
    ours = common()
    tensors = {"encoder.weight": ours["W_enc"].T.contiguous(), "encoder.bias": ours["b_enc"]}
    tensors |= {"W_dec": ours["W_dec"], "b_dec": ours["b_dec"]}
    config = {
        "activation": "topk",
        "expansion_factor": D_SAE // D_MODEL,
        "normalize_decoder": True,
        "num_latents": 0,
        "k": K,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": D_MODEL,
    } | changes
    return Case(
        tensors,
        {key: value for key, value in config.items() if value is not ...},
        lambda x: topk(((x - tensors["b_dec"]) @ tensors["encoder.weight"].T + tensors["encoder.bias"]).relu()),
        lambda f: f @ tensors["W_dec"] + tensors["b_dec"],
    )


# ---- dictionary_learning


def dictionary(kind: str, **changes: Any) -> Case:
    ours, trainer = common(), {"dict_class": kind, "activation_dim": D_MODEL, "dict_size": D_SAE, "layer": 3}
    trainer |= {
        "lm_name": "google/gemma-2-2b",
        "submodule_name": "resid_post_layer_3",
        "trainer_class": "Any",
    } | changes
    linear = {"encoder.weight": ours["W_enc"].T, "decoder.weight": ours["W_dec"].T}
    bias = {"encoder.bias": ours["b_enc"]}
    gates = {"gate_bias": exact(D_SAE, seed=6), "mag_bias": exact(D_SAE, seed=7), "r_mag": torch.zeros(D_SAE)}
    threshold = {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(0.75)}
    jump = exact(D_SAE, seed=5, low=0)
    tensors = {
        "AutoEncoder": linear | bias | {"bias": ours["b_dec"]},
        "AutoEncoderNew": linear | bias | {"decoder.bias": ours["b_dec"]},
        "GatedAutoEncoder": linear | gates | {"decoder_bias": ours["b_dec"]},
        "JumpReluAutoEncoder": ours | {"threshold": jump},
        "AutoEncoderTopK": linear | bias | threshold | {"b_dec": ours["b_dec"]},
        "BatchTopKSAE": linear | bias | threshold | {"b_dec": ours["b_dec"]},
        "MatryoshkaBatchTopKSAE": ours | threshold | {"group_sizes": torch.tensor([4, 8])},
    }.get(kind, {})

    def encode(x: Tensor) -> Tensor:
        if kind not in ("AutoEncoderNew", "JumpReluAutoEncoder"):
            x = x - ours["b_dec"]
        z = x @ ours["W_enc"]
        if kind == "GatedAutoEncoder":
            return (z + gates["gate_bias"] > 0) * (z + gates["mag_bias"]).relu()
        z = z + ours["b_enc"]
        if kind == "JumpReluAutoEncoder":
            return (z * (z > jump)).relu()
        if kind == "AutoEncoderTopK":
            return topk(z.relu())
        return gate(z, tensors["threshold"]) if "threshold" in tensors else z.relu()

    config = {
        "trainer": {key: value for key, value in trainer.items() if value is not ...},
        "buffer": {"d_submodule": 4},
    }
    return Case(tensors, config, encode, lambda f: f @ ours["W_dec"] + ours["b_dec"])
