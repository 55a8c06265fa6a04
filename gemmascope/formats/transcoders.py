"""Transcoders on disk, of Gemma Scope 1 and 2 and of circuit-tracer, as checked tensors.

* Gemma Scope 1: ``params.npz``, the keys of an SAE in fp32, as `release` reads them. Nothing in it says that it is a
  transcoder; its folder does, ``…-transcoders/layer_3/…``.
* Gemma Scope 2: ``params.safetensors`` with the keys in lower case and, with a skip connection,
  ``affine_skip_connection`` [d_in, d_out]; DeepMind's ``config.json`` names both sites.
* circuit-tracer: ``layer_L.safetensors`` with W_enc [d_sae, d_in], W_dec [d_sae, d_out], b_enc, b_dec, the threshold
  under ``activation_function.threshold`` (none: ReLU, whose threshold is 0) and perhaps W_skip [d_out, d_in], beside a
  ``config.yaml`` for all layers.

Of config.yaml only lines ``key: text`` are read, as text; nothing in it is carried out.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import dtype_name
from ..errors import BadFileError
from . import foreign, hook_names, manifest
from .arrays import Header, printable, read_npz, read_safetensors
from .export import SKIP, TRANSCODER
from .files import as_path, open_file, read_json, shown
from .manifest import MAX_CONFIG_BYTES, SAEConfig
from .release import NPZ, SAFETENSORS
from .stored import DTYPES, KEYS, LOWER_CASE, StoredSAE, problem_in_values
from .writers import CIRCUIT_TRACER_CONFIG, SKIP_OF_GEMMA_SCOPE_2, THRESHOLD_OF_CIRCUIT_TRACER

LAYER_FILE = re.compile(r"layer_(0|[1-9][0-9]{0,3})\.safetensors")
LAYER_FOLDER = re.compile(r"layer_(0|[1-9][0-9]{0,3})(?![0-9])")
OF_GEMMA_SCOPE_2 = LOWER_CASE | {SKIP_OF_GEMMA_SCOPE_2: SKIP}
OF_CIRCUIT_TRACER = {THRESHOLD_OF_CIRCUIT_TRACER: "threshold"}


def layer_files(folder: str | os.PathLike) -> list[Path]:
    """The circuit-tracer files of a folder, by layer; none where there are none."""
    try:
        names = [path for path in as_path("folder", folder).iterdir() if LAYER_FILE.fullmatch(path.name)]
    except OSError:
        return []
    return sorted(names, key=lambda path: int(path.stem.partition("_")[2]))


def is_named_so(path: str | os.PathLike) -> bool:
    """Whether the files at ``path`` say, by their layout, config or name, that they are a transcoder's."""
    path = Path(path)
    if layer_files(path) or LAYER_FILE.fullmatch(path.name):
        return True
    if path.name in foreign.FORMATS or any(os.path.lexists(path / name) for name in foreign.FORMATS):
        return False
    config = path / manifest.CONFIG if path.is_dir() else manifest.path_for(path)
    if config.is_file():
        found = read_json(config, MAX_CONFIG_BYTES)
        if isinstance(found, dict) and "hf_hook_point_in" in found:
            return _is_transcoder(found)
        if manifest.says_ours(found):
            return False
    return foreign.named_for_another_kind(os.path.abspath(path)) is not None


def read(path: str | os.PathLike) -> StoredSAE:
    """The transcoder in a file or folder of one of the layouts above.

    Tensors keep the dtype of the file: W_enc [d_in, d_sae], W_dec [d_sae, d_out], b_enc, threshold [d_sae], b_dec
    [d_out] and perhaps W_skip [d_out, d_in]. ``config.metadata`` holds what the files and their names say: ``model``,
    ``site`` (where it reads), ``site_out``, ``layer``, ``l0``. Gemma Scope 1's read the normalised input without its
    gain (``hook_names.NORMALISED``), Gemma Scope 2's the one with it.

    Raises BadFileError for a file that is not exactly one of them: keys, shapes, dtypes, non-finite values, a negative
    threshold, damage, a decompression bomb; for an SAE's; for a folder of several layers.
    """
    file = as_path("path", path)
    if os.path.isdir(file):
        file = _file_in(file)
    if LAYER_FILE.fullmatch(file.name):
        tensors, metadata = _read_circuit_tracer(file)
    elif file.suffix == ".npz":
        tensors, metadata = _read_gemma_scope(file)
    elif file.suffix == ".safetensors":
        tensors, metadata = _read_gemma_scope_2(file)
    else:
        raise BadFileError(
            f"{shown(file)}: expected a .npz file, a .safetensors file or a folder of one, found another name"
        )
    problem = problem_in_values(tensors)
    if problem:
        raise BadFileError(f"{shown(file)}: {problem}")
    d_in, d_sae = tensors["W_enc"].shape
    config = SAEConfig(metadata=metadata, shape=(d_in, d_sae), architecture=TRANSCODER)
    return StoredSAE(tensors, config)


def _file_in(folder: Path) -> Path:
    found = [folder / name for name in (NPZ, SAFETENSORS) if os.path.lexists(folder / name)] + layer_files(folder)
    if len(found) != 1:
        names = ", ".join(file.name for file in found[:4]) or "none"
        raise BadFileError(
            f"{shown(folder)}: expected one transcoder, {NPZ}, {SAFETENSORS} or layer_L.safetensors, found {names}"
        )
    return found[0]


def _read_gemma_scope(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    config = _config_beside(file) or {}
    if manifest.says_ours(config):
        raise BadFileError(f"{shown(file)}: expected a transcoder, found an SAE: read it with load_sae")
    metadata = _facts_of(config, file) if "hf_hook_point_in" in config else _sites_by_name(file)

    def check(headers: dict[str, Header]) -> None:
        _check_headers(headers, LOWER_CASE, shown(file), dtypes=frozenset({torch.float32}))

    arrays = read_npz(file, check)
    return {LOWER_CASE.get(key, key): array for key, array in arrays.items()}, metadata


def _sites_by_name(file: Path) -> dict[str, Any]:
    """What the folders of Gemma Scope 1 say."""
    found = LAYER_FOLDER.findall(str(file))
    if not found:
        return {}
    layer = int(found[-1])
    sites = {"site": hook_names.NORMALISED, "site_out": hook_names.MLP_OUT}
    return {"layer": layer} | {key: hook_names.site_name(layer, point) for key, point in sites.items()}


def _read_gemma_scope_2(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    config = _config_beside(file)
    if config is None or "hf_hook_point_in" not in config:
        raise BadFileError(
            f"{shown(file)}: expected a config.json of Gemma Scope 2 beside it, found"
            f" {'none' if config is None else 'another'}: the weights alone do not say what they are"
        )
    metadata = _facts_of(config, file)

    def check(headers: dict[str, Header]) -> None:
        _check_headers(headers, OF_GEMMA_SCOPE_2, shown(file))

    tensors = {OF_GEMMA_SCOPE_2.get(key, key): tensor for key, tensor in read_safetensors(file, check).items()}
    if SKIP in tensors:
        tensors[SKIP] = tensors[SKIP].T
    stated = bool(config.get("affine_connection"))
    if stated != (SKIP in tensors):
        raise BadFileError(
            f"{shown(file)}: expected {'a' if stated else 'no'} skip connection as in its config, found"
            f" {'none' if stated else 'one'}"
        )
    return tensors, metadata


def _config_beside(file: Path) -> dict[str, Any] | None:
    path = manifest.path_for(file)
    if not os.path.lexists(path):
        return None
    config = read_json(path, MAX_CONFIG_BYTES)
    if not isinstance(config, dict):
        raise BadFileError(f"{shown(path)}: expected an object, found {type(config).__name__}")
    return config


def _is_transcoder(config: Mapping[str, Any]) -> bool:
    """Whether a config of Gemma Scope 2 says so."""
    hooks = [config.get(f"hf_hook_point_{end}") for end in ("in", "out")]
    differ = None not in hooks and hooks[0] != hooks[1]
    return config.get("type") != "sae" and bool(
        config.get("type") == "transcoder" or config.get("affine_connection") or differ
    )


def _facts_of(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The metadata of a config of Gemma Scope 2."""
    where = shown(manifest.path_for(file))
    if config.get("architecture") != "jump_relu":
        raise BadFileError(f"{where}: architecture: expected 'jump_relu', found {config.get('architecture')!r:.40}")
    if not _is_transcoder(config):
        raise BadFileError(f"{where}: expected a transcoder, found type {config.get('type')!r:.40}: is it an SAE?")
    names = {"model": "model_name", "site": "hf_hook_point_in", "site_out": "hf_hook_point_out", "l0": "l0"}
    metadata = {ours: config[theirs] for ours, theirs in names.items() if config.get(theirs) is not None}
    for key in ("model", "site", "site_out"):
        if not isinstance(metadata.get(key, ""), str):
            raise BadFileError(f"{where}: {names[key]}: expected str, found {type(metadata[key]).__name__}")
    found = hook_names.split(metadata.get("site"))
    return metadata | ({"layer": found[0]} if found else {})


def _read_circuit_tracer(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    metadata = _facts_of_yaml(file)

    def check(headers: dict[str, Header]) -> None:
        _check_headers(headers, OF_CIRCUIT_TRACER, shown(file), encoder_rows=True)

    tensors = {OF_CIRCUIT_TRACER.get(key, key): tensor for key, tensor in read_safetensors(file, check).items()}
    tensors["W_enc"] = tensors["W_enc"].T
    if "threshold" not in tensors:
        tensors["threshold"] = torch.zeros_like(tensors["b_enc"])
    return tensors, metadata


def _facts_of_yaml(file: Path) -> dict[str, Any]:
    layer = int(file.stem.partition("_")[2])
    path = file.with_name(CIRCUIT_TRACER_CONFIG)
    if not os.path.lexists(path):
        return {"layer": layer}
    entries = scalars_of_yaml(path)
    if entries.get("model_kind", "transcoder_set") != "transcoder_set":
        raise BadFileError(f"{shown(path)}: model_kind: expected 'transcoder_set', found {entries['model_kind']!r:.40}")
    if entries.get("activation", "relu") not in ("relu", "jumprelu", "jump_relu"):
        raise BadFileError(f"{shown(path)}: activation: expected ReLU or JumpReLU, found {entries['activation']!r:.40}")
    metadata: dict[str, Any] = {"layer": layer}
    if "model_name" in entries:
        metadata["model"] = entries["model_name"]
    for key, field in (("site", "feature_input_hook"), ("site_out", "feature_output_hook")):
        point = hook_names.POINTS.get(entries.get(field, ""))
        if point is not None:
            metadata[key] = hook_names.site_name(layer, point)
    return metadata


def scalars_of_yaml(path: Path) -> dict[str, str]:
    """The lines ``key: text`` of a file of YAML, as text. Raises BadFileError for one that is too long or no UTF-8."""
    with open_file(path) as opened:
        data = opened.read(MAX_CONFIG_BYTES + 1)
    if len(data) > MAX_CONFIG_BYTES:
        raise BadFileError(f"{shown(path)}: expected at most {MAX_CONFIG_BYTES} bytes, found more")
    try:
        lines = data.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise BadFileError(f"{shown(path)}: expected UTF-8, found other bytes") from error
    matches = (re.fullmatch(r"(\w+):[ \t]+(\S.*?)\s*", line) for line in lines)
    return {match[1]: _plain(match[2]) for match in matches if match}


def _plain(text: str) -> str:
    """A scalar of YAML as text: one in quotes without them."""
    if len(text) > 1 and text[0] == text[-1] == '"':
        try:
            return str(json.loads(text))
        except ValueError:
            return text
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == "'" else text


def _check_headers(
    headers: dict[str, Header],
    names: Mapping[str, str],
    where: str,
    *,
    encoder_rows: bool = False,
    dtypes: frozenset[torch.dtype] = DTYPES,
) -> None:
    """Raise BadFileError unless these are the tensors of a transcoder. ``names``: theirs → ours. encoder_rows: W_enc
    and W_skip are [d_sae, d_in] and [d_out, d_in], else [d_in, d_sae] and [d_in, d_out]."""
    found = {}
    for key, header in headers.items():
        ours = names.get(key, key)
        if ours in found:
            raise BadFileError(f"{where}: {printable(key)}: expected one spelling, found two")
        found[ours] = header
    optional = {SKIP} | ({"threshold"} if encoder_rows else set())
    missing = [key for key in KEYS if key not in found and key not in optional]
    extra = [key for key in found if key not in KEYS and key not in optional]
    if missing or extra:
        what = f"no {', '.join(missing)}" if missing else f"also {printable(extra[0])}"
        raise BadFileError(f"{where}: expected the tensors {', '.join(KEYS)} of a transcoder, found {what}")
    for key in ("b_enc", "b_dec"):
        if len(found[key].shape) != 1 or found[key].shape[0] < 1:
            raise BadFileError(f"{where}: {key}: expected one dimension, found {list(found[key].shape)}")
    d_sae, d_out = found["b_enc"].shape[0], found["b_dec"].shape[0]
    W_enc = found["W_enc"].shape
    d_in = W_enc[1 if encoder_rows else 0] if len(W_enc) == 2 else 0
    if d_in < 1:
        raise BadFileError(f"{where}: W_enc: expected two dimensions, found {list(W_enc)}")
    expected = {
        "W_enc": (d_sae, d_in) if encoder_rows else (d_in, d_sae),
        "W_dec": (d_sae, d_out),
        "threshold": (d_sae,),
        SKIP: (d_out, d_in) if encoder_rows else (d_in, d_out),
    }
    weights = found["W_enc"].dtype
    for key in (key for key in (*KEYS, SKIP) if key in found):
        header = found[key]
        if header.shape != expected.get(key, header.shape):
            raise BadFileError(
                f"{where}: {key}: expected shape {list(expected[key])} (b_enc has {d_sae} entries, b_dec {d_out}),"
                f" found {list(header.shape)}"
            )
        allowed = dtypes if key == "W_enc" else {weights, torch.float32} if key == "threshold" else {weights}
        if header.dtype not in allowed:
            any_of = " or ".join(sorted(map(dtype_name, allowed)))
            raise BadFileError(f"{where}: {key}: expected {any_of}, found {dtype_name(header.dtype)}")
