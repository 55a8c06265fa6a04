"""Folders of SAELens: ``cfg.json`` and ``sae_weights.safetensors``, of its versions 3 to 6.

    cfg.json                     ours
    d_in, d_sae                  d_model, d_sae, where they are written
    apply_b_dec_to_input         pre_encoder_bias; true where it is missing
    dtype                        that of the tensors, cast to as SAELens does
    architecture                 see below; "standard" where it is missing, as in the oldest
    activation_fn(_str), …       "topk" with its k makes a standard SAE a TopK one (before version 6)
    metadata, or the top level   `METADATA`

* ``standard``: f = relu(z), which is JumpReLU with threshold 0.
* ``jumprelu``: threshold, or its logarithm log_threshold of training checkpoints. Below 0 it counts as 0.
* ``gated``: JumpReLU by `gated.as_jumprelu`.
* ``topk``: k.
* ``batchtopk``, ``matryoshka_batchtopk``: training checkpoints, whose one topk_threshold is JumpReLU's.

What the weights alone then would not compute is refused by name: transcoders and the other architectures, activations
that are normalised at run time or by factors that are not in the folder, activation functions but ReLU. Where weights
are not those of the file any more, ``folded`` in ``config.metadata["converted_from"]`` says what went into them:
``gate``; ``decoder_norm`` (rescale_acts_by_decoder_norm); ``finetuning_scaling_factor``, by which old versions
multiplied the activations.
"""

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BadFileError
from .arrays import read_safetensors
from .convert import made, read_slots, without_decoder_norm
from .fields import Fields
from .files import shown
from .gated import as_jumprelu
from .manifest import SAEConfig
from .stored import DTYPES, OURS, SAE, Slot, StoredSAE

COMMON = {key: OURS[key] for key in ("W_enc", "W_dec", "b_dec")}
ANY_FLOAT = frozenset({None, *DTYPES})
OPTIONAL = Slot((SAE,), ANY_FLOAT, is_optional=True)
FACTORS = ("scaling_factor", "finetuning_scaling_factor")
# Besides those in `COMMON` and the factors.
SLOTS = {
    "standard": {"b_enc": Slot((SAE,))},
    "topk": {"b_enc": Slot((SAE,))},
    "jumprelu": {"b_enc": Slot((SAE,)), "threshold": OPTIONAL, "log_threshold": OPTIONAL},
    "gated": {"b_gate": Slot((SAE,)), "b_mag": Slot((SAE,)), "r_mag": Slot((SAE,))},
    "batchtopk": {"b_enc": Slot((SAE,)), "topk_threshold": Slot((), ANY_FLOAT)},
}
SLOTS["matryoshka_batchtopk"] = SLOTS["batchtopk"]
RESCALED = ("topk", "batchtopk", "matryoshka_batchtopk")
DTYPE_NAMES = {
    "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64,
    "float": torch.float32, "half": torch.float16, "double": torch.float64,
}  # fmt: skip
NORMALISATIONS = {
    "expected_average_only_in": "whose factor the folder does not hold: fold it in with"
    " fold_activation_norm_scaling_factor and save again",
    "covariance_whitening": "whose statistics the folder does not hold: save the SAE that training folded",
    "layer_norm": "which is not in the weights",
    "constant_norm_rescale": "which is not in the weights",
}
# Their metadata under our names; that of the first key that is there.
METADATA = {
    "model": (("model_name",), str),
    "site": (("hf_hook_name", "hook_name", "hook_point"), str),
    "hook_name": (("hook_name", "hook_point"), str),
    "hook_head_index": (("hook_head_index", "hook_point_head_index"), int),
    "prepend_bos": (("prepend_bos",), bool),
    "context_size": (("context_size",), int),
    "neuronpedia_id": (("neuronpedia_id",), str),
}


def read(weights: Path, file: io.BufferedReader, config: Fields) -> StoredSAE:
    """The SAE of the open file ``weights`` and its cfg.json. Raises BadFileError."""
    architecture, k = _architecture(config)
    _check_function(config)
    slots = COMMON | SLOTS[architecture] | dict.fromkeys(FACTORS, OPTIONAL)
    found = read_slots(weights, file, read_safetensors, slots, (config.size("d_in"), config.size("d_sae")))
    dtype = _dtype(config) or found["W_enc"].dtype
    found = {key: tensor.to(dtype) for key, tensor in found.items()}
    folded = ["gate"] if architecture == "gated" else []
    tensors = {key: found[key] for key in COMMON} | _encoder(architecture, found, shown(weights))
    if architecture in RESCALED and config.take("rescale_acts_by_decoder_norm", bool, False):
        folded.append("decoder_norm")
        scaled = without_decoder_norm(tensors["W_enc"], tensors["b_enc"], tensors["W_dec"])
        tensors |= dict(zip(("W_enc", "b_enc", "W_dec"), scaled, strict=True))
    factor = _factor(found, config, shown(weights))
    if factor is not None:
        folded.append("finetuning_scaling_factor")
        tensors["W_dec"] = tensors["W_dec"] * factor[:, None]
    metadata = _metadata(config)
    metadata["converted_from"] = {"format": "saelens", "architecture": architecture, "folded": folded}
    version = config.inner("metadata").take("sae_lens_version", str) or config.take("sae_lens_version", str)
    if version is not None:
        metadata["converted_from"]["version"] = version
    sae_config = SAEConfig(
        pre_encoder_bias=config.take("apply_b_dec_to_input", bool, True),
        metadata=metadata,
        architecture="jump_relu" if k is None else "topk",
        k=k,
    )
    return made(weights, tensors, sae_config)


def _architecture(config: Fields) -> tuple[str, int | None]:
    """The key of `SLOTS`, and k of a TopK SAE."""
    architecture = config.take("architecture", str, "standard")
    key = "activation_fn_str" if "activation_fn_str" in config.config else "activation_fn"
    activation = config.take(key, str, "relu")
    if activation not in ("relu", "topk"):
        raise config.wrong(key, "'relu' or 'topk'", f"{activation!r:.40}")
    if activation == "topk" and architecture == "standard":
        architecture = "topk"
    if "transcoder" in architecture:
        raise config.wrong("architecture", "an SAE", f"{architecture!r:.40}, which reads one site and writes another")
    if architecture not in SLOTS:
        raise config.wrong("architecture", ", ".join(SLOTS), f"{architecture!r:.40}")
    if architecture != "topk":
        return architecture, None
    k = config.size("k") or config.inner("activation_fn_kwargs").size("k")
    if k is None:
        raise config.wrong("k", "the number of latents of a TopK SAE", "none")
    return architecture, k


def _check_function(config: Fields) -> None:
    """Refuse an SAE that computes more than its weights say."""
    key = "normalize_activations"
    stated = config.config.get(key)
    if type(stated) is bool:  # of the oldest
        stated = "expected_average_only_in" if stated else "none"
    if stated is not None and not isinstance(stated, str):
        raise config.wrong(key, "str", type(stated).__name__)
    if stated not in (None, "none"):
        raise config.wrong(key, "'none'", f"{stated!r:.40}, {NORMALISATIONS.get(stated, 'which is not known')}")
    reshape = config.take("reshape_activations", str, "none")
    if reshape not in ("none", "hook_z"):  # of a z that is flat already
        raise config.wrong("reshape_activations", "'none' or 'hook_z'", f"{reshape!r:.40}")


def _dtype(config: Fields) -> torch.dtype | None:
    stated = config.take("dtype", str)
    if stated is None:
        return None
    name = stated.removeprefix("torch.")
    if name not in DTYPE_NAMES:
        raise config.wrong("dtype", ", ".join(DTYPE_NAMES), f"{stated!r:.40}")
    return DTYPE_NAMES[name]


def _encoder(architecture: str, found: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """b_enc and threshold, and W_enc where it is another than that of the file. TopK has no threshold."""
    if architecture == "gated":
        return as_jumprelu(found["W_enc"], found["b_gate"], found["r_mag"], found["b_mag"])._asdict()
    b_enc = found["b_enc"]
    if architecture == "topk":
        return {"b_enc": b_enc}
    if architecture == "standard":
        threshold = torch.zeros_like(b_enc)
    elif architecture == "jumprelu":
        both = [key for key in ("threshold", "log_threshold") if key in found]
        if len(both) != 1:
            raise BadFileError(f"{name}: expected threshold or log_threshold, found {'both' if both else 'neither'}")
        threshold = found["threshold"] if both == ["threshold"] else found["log_threshold"].exp()
    else:
        threshold = found["topk_threshold"].expand_as(b_enc).clone()
    threshold = threshold.clamp(min=0).to(torch.promote_types(b_enc.dtype, torch.float32))
    return {"b_enc": b_enc, "threshold": threshold}


def _factor(found: dict[str, Tensor], config: Fields, name: str) -> Tensor | None:
    """What activations are multiplied by before they are decoded, where it is not 1."""
    keys = [key for key in FACTORS if key in found]
    if len(keys) > 1:
        raise BadFileError(f"{name}: expected one of {' and '.join(FACTORS)}, found both")
    factor = found[keys[0]] if keys else None
    if factor is None or torch.allclose(factor, torch.ones_like(factor)):  # as SAELens tells them from an unused one
        return None
    if not config.take("finetuning_scaling_factor", bool, False):
        raise config.wrong("finetuning_scaling_factor", f"true, as {keys[0]} of the weights is not 1", "false")
    return factor


def _metadata(config: Fields) -> dict[str, Any]:
    found = {}
    inner = config.inner("metadata")
    for ours, (keys, kind) in METADATA.items():
        values = [fields.take(key, kind) for key in keys for fields in (inner, config)]
        value = next((value for value in values if value is not None), None)
        if value is not None:
            found[ours] = value
    return found
