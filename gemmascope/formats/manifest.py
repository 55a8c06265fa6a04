"""The config.json beside an SAE's weights: ours, and Gemma Scope 2's.

Ours carries two SHA-256: ``sha256`` of the file of weights and ``config_sha256`` of its own other keys, since a flipped
bit in ``input_scale`` does as much harm as one in the weights.
"""

import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..checks import check_choice, check_int, check_number, check_type, dtype_name
from ..errors import BadFileError
from ..version import __version__
from .arrays import printable
from .files import json_text, read_json, read_json_of, shown

CONFIG = "config.json"
FORMAT, FORMAT_VERSION = "gemmascope", 1
CONFIG_KEYS = {
    "format", "format_version", "gemmascope_version", "architecture", "d_model", "d_sae", "dtype", "input_scale",
    "pre_encoder_bias", "weights", "metadata", "sha256", "config_sha256",
}  # fmt: skip
# Of a TopK SAE, besides those.
TOPK_CONFIG_KEYS = CONFIG_KEYS | {"k"}
ARCHITECTURES = ("jump_relu", "topk")
# Those that nobody else has: one damaged byte leaves two of them.
OUR_OWN_KEYS = {"format_version", "gemmascope_version", "config_sha256"}
MAX_CONFIG_BYTES = 1 << 20


class SAEConfig(NamedTuple):
    """What the weights alone do not say. shape: (d_model, d_sae) where the file states it. architecture: "jump_relu" or
    "topk", whose k latents fire."""

    input_scale: float = 1.0
    pre_encoder_bias: bool = False
    metadata: dict[str, Any] | None = None
    shape: tuple[int, int] | None = None
    architecture: str = "jump_relu"
    k: int | None = None

    @property
    def is_folded(self) -> bool:
        return self.input_scale == 1.0 and not self.pre_encoder_bias


class Manifest(NamedTuple):
    """What is written beside weights. sha256: that of the file of weights, where it is stated. is_stated: whether it
    says that they are an SAE's."""

    config: SAEConfig = SAEConfig()
    sha256: str | None = None
    is_stated: bool = False


def path_for(weights: Path) -> Path:
    return weights.with_name(CONFIG) if weights.stem == "params" else weights.with_suffix(".json")


def text(config: SAEConfig, dtype: torch.dtype, weights: Path, digest: str) -> str:
    """Our config.json of an SAE whose weights, in ``dtype``, go into a file named like ``weights`` with the SHA-256
    ``digest``.

    Raises ValueError or TypeError for what `read` would refuse: metadata that does not fit into JSON, or is too much.
    """
    check_number("sae.input_scale", config.input_scale, 0, open_low=True)
    check_type("sae.pre_encoder_bias", config.pre_encoder_bias, bool)
    check_choice("sae.architecture", config.architecture, ARCHITECTURES)
    metadata = {} if config.metadata is None else config.metadata
    check_type("sae.metadata", metadata, dict)
    assert config.shape is not None  # only configs of others, which are read and not written, leave it out
    d_model, d_sae = config.shape
    is_topk = config.architecture == "topk"
    if is_topk:
        if config.k is None:
            raise TypeError("sae.k: expected an int, got NoneType")
        check_int("sae.k", config.k, 1, d_sae)
    elif config.k is not None:
        raise ValueError(f"sae.k: expected None of a JumpReLU SAE, got {config.k!r}")
    entries = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "gemmascope_version": __version__,
        "architecture": config.architecture,
        **({"k": config.k} if is_topk else {}),
        "d_model": d_model,
        "d_sae": d_sae,
        "dtype": "float32" if weights.suffix == ".npz" else dtype_name(dtype),
        "input_scale": config.input_scale,
        "pre_encoder_bias": config.pre_encoder_bias,
        "weights": weights.name,
        "metadata": metadata,
        "sha256": digest,
    }
    entries = json.loads(json_text(entries, "sae.metadata"))
    text = json_text(entries | {"config_sha256": seal(entries)}, "sae.metadata")
    if len(text) > MAX_CONFIG_BYTES:
        raise ValueError(f"sae.metadata: expected a config of at most {MAX_CONFIG_BYTES} bytes, got {len(text)}")
    return text


def seal(config: dict[str, Any]) -> str:
    """SHA-256 of all of ``config`` but the seal itself, in a canonical form."""
    rest = {key: value for key, value in config.items() if key != "config_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def is_ours(path: Path) -> bool:
    """Whether it is a config of ours, be it damaged."""
    try:
        return says_ours(read_json(path, MAX_CONFIG_BYTES))
    except BadFileError:
        return False


def says_ours(config: Any) -> bool:
    """Whether what a config.json holds is ours, be it damaged."""
    return isinstance(config, dict) and (config.get("format") == FORMAT or not OUR_OWN_KEYS.isdisjoint(config))


def read(weights: Path, file: io.BufferedReader | None) -> Manifest:
    """What ``file``, the open config beside ``weights``, says. Others' beside a .npz says nothing, but
    Gemma Scope 2's, which a transcoder of ours in a .npz has too."""
    is_npz = weights.suffix == ".npz"
    path = path_for(weights)
    if file is None:
        if is_npz:
            return Manifest()
        raise BadFileError(
            f"{shown(weights)}: expected {path.name} beside it, found none: the weights alone do not say whether they"
            " are an SAE's, a transcoder's or of inputs that were scaled (Gemma Scope 2 has one in each folder)"
        )
    name = shown(path)
    config = read_json_of(file, name, MAX_CONFIG_BYTES)
    if says_ours(config):
        return _read_ours(config, name, weights)
    if isinstance(config, dict) and "hf_hook_point_in" in config:
        return _read_gemma_scope_2(config, name)
    if is_npz:
        return Manifest()
    raise BadFileError(f"{name}: expected a gemmascope or Gemma Scope 2 config, found another")


def _read_ours(config: dict, name: str, weights: Path) -> Manifest:
    if config.get("format") != FORMAT:
        raise BadFileError(f"{name}: format: expected {FORMAT!r}, found {config.get('format')!r:.40}")
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise BadFileError(f"{name}: format_version: expected {FORMAT_VERSION}, found {version!r:.40}")
    is_topk = config.get("architecture") == "topk"
    keys = TOPK_CONFIG_KEYS if is_topk else CONFIG_KEYS
    if config.keys() != keys:
        wrong = ", ".join(sorted(map(printable, config.keys() ^ keys)))
        raise BadFileError(
            f"{name}: expected the keys of format version {FORMAT_VERSION}, found more or fewer: {wrong}"
        )
    if config["config_sha256"] != seal(config):
        raise BadFileError(f"{name}: expected config_sha256 {seal(config)}, found {config['config_sha256']!r:.70}")
    for key, kind in (("d_model", int), ("d_sae", int), ("pre_encoder_bias", bool), ("metadata", dict)):
        if type(config[key]) is not kind:
            raise BadFileError(f"{name}: {key}: expected {kind.__name__}, found {type(config[key]).__name__}")
    scale = config["input_scale"]
    if type(scale) not in (int, float) or scale <= 0:
        raise BadFileError(f"{name}: input_scale: expected a number > 0, found {scale!r:.40}")
    if config["architecture"] not in ARCHITECTURES:
        expected = " or ".join(map(repr, ARCHITECTURES))
        raise BadFileError(f"{name}: architecture: expected {expected}, found {config['architecture']!r:.40}")
    if is_topk and not (type(config["k"]) is int and 1 <= config["k"] <= config["d_sae"]):
        raise BadFileError(f"{name}: k: expected 1 to d_sae = {config['d_sae']}, found {config['k']!r:.40}")
    if config["weights"] != weights.name:
        raise BadFileError(f"{name}: weights: expected {weights.name!r}, found {config['weights']!r:.40}")
    if weights.suffix == ".npz" and is_topk:
        raise BadFileError(f"{name}: architecture: expected 'jump_relu' beside a .npz file, found 'topk'")
    if weights.suffix == ".npz" and (scale != 1 or config["pre_encoder_bias"]):
        raise BadFileError(f"{name}: expected a folded SAE beside a .npz file, found input_scale {scale!r:.40}")
    if not (isinstance(config["sha256"], str) and re.fullmatch("[0-9a-f]{64}", config["sha256"])):
        raise BadFileError(f"{name}: sha256: expected 64 hexadecimal digits, found {config['sha256']!r:.70}")
    shape = (config["d_model"], config["d_sae"])
    architecture = (config["architecture"], config.get("k"))
    sae_config = SAEConfig(float(scale), config["pre_encoder_bias"], config["metadata"], shape, *architecture)
    return Manifest(sae_config, config["sha256"], is_stated=True)


def _read_gemma_scope_2(config: dict, name: str) -> Manifest:
    """null means that nothing is stated."""
    if config.get("architecture") != "jump_relu":
        raise BadFileError(f"{name}: architecture: expected 'jump_relu', found {config.get('architecture')!r:.40}")
    kind = config.get("type")
    if kind not in (None, "sae"):
        way_out = ": read it with Transcoder.load" if kind == "transcoder" else ""
        raise BadFileError(f"{name}: type: expected 'sae', found {kind!r:.40}{way_out}")
    hooks = [config.get(f"hf_hook_point_{end}") for end in ("in", "out")]
    for hook, end in zip(hooks, ("in", "out"), strict=True):
        if not isinstance(hook, str | None):
            raise BadFileError(f"{name}: hf_hook_point_{end}: expected str, found {type(hook).__name__}")
    if config.get("affine_connection") or len(set(hooks) - {None}) > 1:
        raise BadFileError(
            f"{name}: expected an SAE, which reads and writes one site, found a transcoder, for Transcoder.load"
        )
    names = {"model": "model_name", "site": "hf_hook_point_in", "l0": "l0"}
    metadata = {ours: config[theirs] for ours, theirs in names.items() if config.get(theirs) is not None}
    return Manifest(SAEConfig(metadata=metadata), is_stated=kind == "sae" or None not in hooks)
