"""The config.json beside an SAE's weights: ours, and Gemma Scope 2's.

Ours carries two SHA-256: ``sha256`` of the file of weights and ``config_sha256`` of its own other keys, since a flipped
bit in ``input_scale`` does as much harm as one in the weights.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..checks import dtype_name
from ..errors import BadFileError
from ..version import __version__
from .arrays import printable
from .files import json_text, read_json, sha256, shown

CONFIG = "config.json"
FORMAT, FORMAT_VERSION = "gemmascope", 1
CONFIG_KEYS = {
    "format", "format_version", "gemmascope_version", "architecture", "d_model", "d_sae", "dtype", "input_scale",
    "pre_encoder_bias", "weights", "metadata", "sha256", "config_sha256",
}  # fmt: skip
MAX_CONFIG_BYTES = 1 << 20


class SAEConfig(NamedTuple):
    """What the weights alone do not say. shape: (d_model, d_sae) where the file states it."""

    input_scale: float = 1.0
    pre_encoder_bias: bool = False
    metadata: dict[str, Any] | None = None
    shape: tuple[int, int] | None = None

    @property
    def is_folded(self) -> bool:
        return self.input_scale == 1.0 and not self.pre_encoder_bias


def path_for(weights: Path) -> Path:
    return weights.with_name(CONFIG) if weights.stem == "params" else weights.with_suffix(".json")


def text(config: SAEConfig, dtype: torch.dtype, weights: Path, digest: str) -> str:
    """Our config.json of an SAE whose weights, in ``dtype``, go into a file named like ``weights`` with the SHA-256
    ``digest``.

    Raises ValueError or TypeError when ``config.metadata`` does not fit into JSON.
    """
    assert config.shape is not None  # only configs of others, which are read and not written, leave it out
    d_model, d_sae = config.shape
    entries = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "gemmascope_version": __version__,
        "architecture": "jump_relu",
        "d_model": d_model,
        "d_sae": d_sae,
        "dtype": "float32" if weights.suffix == ".npz" else dtype_name(dtype),
        "input_scale": config.input_scale,
        "pre_encoder_bias": config.pre_encoder_bias,
        "weights": weights.name,
        "metadata": config.metadata,
        "sha256": digest,
    }
    entries = json.loads(json_text(entries, "sae.metadata"))
    return json_text(entries | {"config_sha256": seal(entries)}, "sae.metadata")


def seal(config: dict[str, Any]) -> str:
    """SHA-256 of all of ``config`` but the seal itself, in a canonical form."""
    rest = {key: value for key, value in config.items() if key != "config_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def is_ours(path: Path) -> bool:
    try:
        config = read_json(path, MAX_CONFIG_BYTES)
    except BadFileError:
        return False
    return isinstance(config, dict) and config.get("format") == FORMAT


def read(weights: Path, path: Path | None) -> SAEConfig:
    is_npz = weights.suffix == ".npz"
    if path is None:
        if is_npz:
            return SAEConfig()
        name = path_for(weights).name
        raise BadFileError(
            f"{shown(weights)}: expected {name} beside it, found none: the weights alone do not say enough"
        )
    config = read_json(path, MAX_CONFIG_BYTES)
    name = shown(path)
    if isinstance(config, dict) and config.get("format") == FORMAT:
        return _read_ours(config, name, weights)
    if is_npz:
        return SAEConfig()
    if isinstance(config, dict) and "hf_hook_point_in" in config:
        return _read_gemma_scope_2(config, name)
    raise BadFileError(f"{name}: expected a gemmascope or Gemma Scope 2 config, found another")


def _read_ours(config: dict, name: str, weights: Path) -> SAEConfig:
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise BadFileError(f"{name}: format_version: expected {FORMAT_VERSION}, found {version!r:.40}")
    if config.keys() != CONFIG_KEYS:
        wrong = ", ".join(sorted(map(printable, config.keys() ^ CONFIG_KEYS)))
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
    if config["architecture"] != "jump_relu":
        raise BadFileError(f"{name}: architecture: expected 'jump_relu', found {config['architecture']!r:.40}")
    if config["weights"] != weights.name:
        raise BadFileError(f"{name}: weights: expected {weights.name!r}, found {config['weights']!r:.40}")
    if weights.suffix == ".npz" and (scale != 1 or config["pre_encoder_bias"]):
        raise BadFileError(f"{name}: expected a folded SAE beside a .npz file, found input_scale {scale!r:.40}")
    digest = sha256(weights)
    if config["sha256"] != digest:
        raise BadFileError(
            f"{shown(weights)}: expected SHA-256 {config['sha256']!s:.12}… as in {CONFIG}, found {digest[:12]}…"
        )
    shape = (config["d_model"], config["d_sae"])
    return SAEConfig(float(scale), config["pre_encoder_bias"], config["metadata"], shape)


def _read_gemma_scope_2(config: dict, name: str) -> SAEConfig:
    if config.get("architecture") != "jump_relu":
        raise BadFileError(f"{name}: architecture: expected 'jump_relu', found {config.get('architecture')!r:.40}")
    site = config["hf_hook_point_in"]
    if config.get("affine_connection") or config.get("hf_hook_point_out", site) != site:
        raise BadFileError(f"{name}: expected an SAE, which reads and writes one site, found a transcoder")
    names = {"model": "model_name", "site": "hf_hook_point_in", "l0": "l0"}
    return SAEConfig(metadata={ours: config[theirs] for ours, theirs in names.items() if theirs in config})
