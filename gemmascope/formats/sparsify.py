"""Folders of sparsify: ``cfg.json`` and ``sae.safetensors``, a TopK SAE that subtracts b_dec from its input.

    encoder.weight [d_sae, d_model]   W_enc, transposed
    encoder.bias [d_sae]              b_enc
    W_dec [d_sae, d_model], b_dec     the same

Refused by name: transcoders, skip connections, the activation "groupmax" and ``signed`` activations of old versions.
"""

import io
from pathlib import Path

from .arrays import read_safetensors
from .convert import made, read_slots
from .fields import Fields
from .manifest import SAEConfig
from .stored import MODEL, SAE, Slot, StoredSAE

SLOTS = {
    "encoder.weight": Slot((SAE, MODEL)),
    "encoder.bias": Slot((SAE,)),
    "W_dec": Slot((SAE, MODEL)),
    "b_dec": Slot((MODEL,)),
}
DEFAULT_K, DEFAULT_EXPANSION = 32, 32


def read(weights: Path, file: io.BufferedReader, config: Fields) -> StoredSAE:
    """The SAE of the open file ``weights`` and its cfg.json. Raises BadFileError."""
    for key, what in (("transcode", "a transcoder"), ("skip_connection", "a skip connection"), ("signed", "signs")):
        if config.take(key, bool, False):
            raise config.wrong(key, "false", f"true: {what} is not an SAE's")
    activation = config.take("activation", str, "topk")
    if activation != "topk":
        raise config.wrong("activation", "'topk'", f"{activation!r:.40}")
    d_model, d_sae = config.size("d_in"), config.take("num_latents", int, 0)
    if not d_sae and d_model is not None:  # 0 means a multiple
        d_sae = d_model * (config.size("expansion_factor") or DEFAULT_EXPANSION)
    found = read_slots(weights, file, read_safetensors, SLOTS, (d_model, d_sae or None))
    tensors = {
        "W_enc": found["encoder.weight"].T,
        "W_dec": found["W_dec"],
        "b_enc": found["encoder.bias"],
        "b_dec": found["b_dec"],
    }
    metadata = {"converted_from": {"format": "sparsify", "architecture": "topk", "folded": []}}
    k = config.size("k") or DEFAULT_K
    return made(weights, tensors, SAEConfig(pre_encoder_bias=True, metadata=metadata, architecture="topk", k=k))
