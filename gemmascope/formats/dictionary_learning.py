"""Folders of dictionary_learning: ``config.json`` and ``ae.pt``, a state dict that is read without unpickling.

The config's ``trainer`` names the class of the dictionary, its sizes and the site:

* ``AutoEncoder``: f = relu((x − bias)·Wᵀ + b), JumpReLU with threshold 0; ``AutoEncoderNew`` subtracts nothing;
* ``GatedAutoEncoder``: JumpReLU by `gated.as_jumprelu`;
* ``JumpReluAutoEncoder``: as it is. It does not subtract b_dec; the flag by which it can is not in the file;
* ``AutoEncoderTopK``: TopK with the k of the file;
* ``BatchTopKSAE``, ``MatryoshkaBatchTopKSAE``: JumpReLU with the one threshold of the file, by which they encode. One
  that was never measured is −1, and means 0.

The weights are those of the state dict: the scaling to a unit decoder that ``AutoEncoder.from_pretrained`` does unless
told otherwise is left out.
"""

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .convert import made, read_slots
from .fields import Fields
from .gated import as_jumprelu
from .manifest import SAEConfig
from .stored import MODEL, OURS, SAE, Slot, StoredSAE
from .torch_file import read_torch_file

LINEAR = {"encoder.weight": Slot((SAE, MODEL)), "decoder.weight": Slot((MODEL, SAE))}
INTEGERS = frozenset({torch.int32, torch.int64})
THRESHOLD = {"k": Slot((), INTEGERS), "threshold": Slot((), frozenset({None, torch.float32}))}
TOPK = LINEAR | {"encoder.bias": Slot((SAE,)), "b_dec": Slot((MODEL,))} | THRESHOLD
SLOTS = {
    "AutoEncoder": LINEAR | {"encoder.bias": Slot((SAE,)), "bias": Slot((MODEL,))},
    "AutoEncoderNew": LINEAR | {"encoder.bias": Slot((SAE,)), "decoder.bias": Slot((MODEL,))},
    "GatedAutoEncoder": LINEAR
    | {"r_mag": Slot((SAE,)), "gate_bias": Slot((SAE,)), "mag_bias": Slot((SAE,)), "decoder_bias": Slot((MODEL,))},
    "JumpReluAutoEncoder": OURS,
    "AutoEncoderTopK": TOPK,
    "BatchTopKSAE": TOPK,
    "MatryoshkaBatchTopKSAE": {key: OURS[key] for key in ("W_enc", "W_dec", "b_enc", "b_dec")}
    | THRESHOLD
    | {"group_sizes": Slot(("groups",), INTEGERS)},
}
# Those that do not subtract what they add.
WITHOUT_PRE_ENCODER_BIAS = ("AutoEncoderNew", "JumpReluAutoEncoder")
# Our names of what is called otherwise, for the matrices their transposes.
NAMES = {"encoder.bias": "b_enc", "bias": "b_dec", "decoder.bias": "b_dec", "decoder_bias": "b_dec"}
TRANSPOSED = {"encoder.weight": "W_enc", "decoder.weight": "W_dec"}


def read(weights: Path, file: io.BufferedReader, config: Fields) -> StoredSAE:
    """The SAE of the open file ``weights`` and its config.json. Raises BadFileError."""
    trainer = config.inner("trainer")
    kind = trainer.take("dict_class", str)
    if kind not in SLOTS:
        found = "none" if kind is None else f"{kind!r:.40}"
        raise trainer.wrong("dict_class", ", ".join(SLOTS), found)
    stated = (trainer.size("activation_dim"), trainer.size("dict_size"))
    found = read_slots(weights, file, read_torch_file, SLOTS[kind], stated)
    named = {NAMES.get(key, key): tensor for key, tensor in found.items() if key not in TRANSPOSED}
    named |= {TRANSPOSED[key]: tensor.T for key, tensor in found.items() if key in TRANSPOSED}
    tensors = {key: named[key] for key in ("W_enc", "W_dec", "b_dec")} | _encoder(kind, named)
    folded = ["gate"] if kind == "GatedAutoEncoder" else []
    metadata = _metadata(trainer) | {
        "converted_from": {"format": "dictionary_learning", "architecture": kind, "folded": folded}
    }
    architecture, k = ("topk", int(named["k"])) if kind == "AutoEncoderTopK" else ("jump_relu", None)
    pre_encoder_bias = kind not in WITHOUT_PRE_ENCODER_BIAS
    return made(
        weights,
        tensors,
        SAEConfig(pre_encoder_bias=pre_encoder_bias, metadata=metadata, architecture=architecture, k=k),
    )


def _encoder(kind: str, named: dict[str, Tensor]) -> dict[str, Tensor]:
    """b_enc and, but for TopK, threshold; W_enc where it is another than that of the file."""
    if kind == "GatedAutoEncoder":
        gate = (named[key] for key in ("W_enc", "gate_bias", "r_mag", "mag_bias"))
        return as_jumprelu(*gate)._asdict()
    b_enc = named["b_enc"]
    if kind == "AutoEncoderTopK":
        return {"b_enc": b_enc}
    threshold = named.get("threshold", torch.zeros((), dtype=b_enc.dtype, device="cpu"))
    threshold = threshold.clamp(min=0).to(torch.promote_types(b_enc.dtype, torch.float32))
    return {"b_enc": b_enc, "threshold": threshold.expand_as(b_enc).clone()}


def _metadata(trainer: Fields) -> dict[str, Any]:
    names = {"model": ("lm_name", str), "layer": ("layer", int), "submodule_name": ("submodule_name", str)}
    found = {ours: trainer.take(theirs, kind) for ours, (theirs, kind) in names.items()}
    return {ours: value for ours, value in found.items() if value is not None}
