"""Cross-layer transcoders on disk, of circuit-tracer and of Gemma Scope 2, as checked tensors.

* circuit-tracer: for each layer i of n ``W_enc_i.safetensors`` with W_enc_i [d_sae, d_model], b_enc_i, threshold_i
  [d_sae] (none: ReLU, whose threshold is 0) and b_dec_i [d_model], and ``W_dec_i.safetensors`` with W_dec_i [d_sae,
  n − i, d_model]: what latents of layer i add to the outputs of layers i to n − 1. Beside them a ``config.yaml``.
* Gemma Scope 2 (read only): a folder of ``params_layer_i.safetensors`` with w_enc [d_model, d_sae], w_dec [d_sae, n,
  d_model], b_enc, b_dec, threshold and perhaps affine_skip_connection [d_model, d_model]. What w_dec holds for layers
  before i is not read: latents write to their own layer and later ones.

Here a CLT is a list of the tensors of its layers: W_enc [d_in, d_sae], b_enc, threshold [d_sae], W_dec [d_sae, Σ d_out
of this layer and those after it] and b_dec [d_out], perhaps W_skip [d_out, d_in].
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_type, dtype_name
from ..errors import BadFileError
from . import hook_names
from .arrays import Header, printable, read_safetensors
from .export import SKIP
from .files import as_path, read_json, remove_stale_temporaries, shown
from .manifest import CONFIG, MAX_CONFIG_BYTES
from .stored import LOWER_CASE, is_of_one_dtype, problem_in_values
from .transcoders import scalars_of_yaml
from .writers import CIRCUIT_TRACER_CONFIG, SKIP_OF_GEMMA_SCOPE_2, write_safetensors, write_text

KEYS = ("W_enc", "b_enc", "threshold", "W_dec", "b_dec")
MODEL_KIND = "cross_layer_transcoder"
ENCODER_FILE = re.compile(r"W_enc_(0|[1-9][0-9]{0,3})\.safetensors")
FILES = re.compile(r"(W_enc|W_dec|params_layer)_[0-9]+\.safetensors")
GEMMA_SCOPE_2_FILE = re.compile(r"params_layer_(0|[1-9][0-9]{0,3})\.safetensors")

LayerTensors = dict[str, Tensor]
Shapes = Mapping[str, tuple[int | None, ...]]


class StoredCLT(NamedTuple):
    """layers: the tensors of each layer, checked. metadata: what the files say of ``model``, ``sites`` (where layers
    read) and ``sites_out`` (where they write)."""

    layers: list[LayerTensors]
    metadata: dict[str, Any]


def problem_in(layers: Sequence[Mapping[str, Tensor]]) -> str | None:
    """Why these are not the tensors of a CLT; None when they are."""
    if not layers:
        return "layers: expected at least one layer, got none"
    for number, tensors in enumerate(layers):
        wrong = sorted(map(str, {*KEYS} ^ ({*tensors} - {SKIP})))
        if wrong:
            expected = ", ".join((*KEYS, SKIP))
            return f"layers[{number}]: expected the tensors {expected}, got more or fewer: {', '.join(wrong)}"
        for key, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                return f"layers[{number}][{key!r}]: expected a torch.Tensor, got {type(tensor).__name__}"
            if tensor.ndim != (2 if key in ("W_enc", "W_dec", SKIP) else 1) or 0 in tensor.shape:
                kind = "a matrix" if key.startswith("W_") else "a vector"
                return f"layers[{number}][{key!r}]: expected {kind}, got shape {list(tensor.shape)}"
    widths, dtype = [len(tensors["b_dec"]) for tensors in layers], layers[0]["W_dec"].dtype
    for number, tensors in enumerate(layers):
        d_in, d_sae = tensors["W_enc"].shape
        written = sum(widths[number:])
        shapes = {
            "b_enc": (d_sae,),
            "threshold": (d_sae,),
            "W_dec": (d_sae, written),
            SKIP: (widths[number], d_in),
        }
        for key, tensor in tensors.items():
            where = f"layers[{number}][{key!r}]"
            if tuple(tensor.shape) != shapes.get(key, tuple(tensor.shape)):
                what = f" for outputs {' + '.join(map(str, widths[number:]))} wide" if key == "W_dec" else ""
                return f"{where}: expected shape {list(shapes[key])}{what}, got {list(tensor.shape)}"
            if not is_of_one_dtype(key, tensor, dtype):
                return f"{where}: expected one float dtype for all, got {dtype_name(tensor.dtype)}"
        problem = problem_in_values(tensors)
        if problem:
            return f"layers[{number}]: {problem}"
    return None


# ---- reading


def read(path: str | os.PathLike) -> StoredCLT:
    """The CLT in a folder of one of the layouts above, its tensors in the dtype of the files.

    Raises BadFileError for a folder that is not exactly one of them: keys, shapes, dtypes, a layer that is missing,
    non-finite values, a negative threshold, damage.
    """
    folder = as_path("path", path)
    of_circuit_tracer, of_gemma_scope = _numbers(folder, ENCODER_FILE), _numbers(folder, GEMMA_SCOPE_2_FILE)
    if bool(of_circuit_tracer) == bool(of_gemma_scope):
        found = "both" if of_gemma_scope else "neither"
        raise BadFileError(
            f"{shown(folder)}: expected a folder of W_enc_L.safetensors or of params_layer_L.safetensors, found {found}"
        )
    numbers = of_circuit_tracer or of_gemma_scope
    if numbers != list(range(len(numbers))):
        missing = next(number for number, given in enumerate([*numbers, -1]) if number != given)
        raise BadFileError(f"{shown(folder)}: expected layers from 0 without a gap, found none of layer {missing}")
    if of_circuit_tracer:
        layers, metadata = _read_circuit_tracer(folder, len(numbers)), _facts_of_yaml(folder, len(numbers))
    else:
        layers, metadata = _read_gemma_scope_2(folder, len(numbers)), _facts_of_json(folder, len(numbers))
    problem = problem_in(layers)
    if problem:
        raise BadFileError(f"{shown(folder)}: {problem}")
    return StoredCLT(layers, metadata)


def _numbers(folder: Path, pattern: re.Pattern) -> list[int]:
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError as error:
        raise BadFileError(f"{shown(folder)}: expected a folder, found none: {error.strerror}") from error
    return sorted(int(match[1]) for match in map(pattern.fullmatch, names) if match)


def _read_circuit_tracer(folder: Path, n: int) -> list[LayerTensors]:
    layers, width = [], None
    for i in range(n):
        optional = {f"threshold_{i}": (None,)}
        shapes = {f"W_enc_{i}": (None, width), f"b_enc_{i}": (None,), f"b_dec_{i}": (width,)}
        found = _tensors(folder / f"W_enc_{i}.safetensors", shapes, optional)
        d_sae, width = found[f"W_enc_{i}"].shape
        tensors = {key.removesuffix(f"_{i}"): tensor for key, tensor in found.items()}
        tensors["W_enc"] = tensors["W_enc"].T
        tensors.setdefault("threshold", torch.zeros_like(tensors["b_enc"]))
        written = _tensors(folder / f"W_dec_{i}.safetensors", {f"W_dec_{i}": (d_sae, n - i, width)}, {})
        layers.append(tensors | {"W_dec": written[f"W_dec_{i}"].flatten(1)})
    return layers


def _read_gemma_scope_2(folder: Path, n: int) -> list[LayerTensors]:
    layers, width = [], None
    for i in range(n):
        vectors = {"b_enc": (None,), "b_dec": (width,), "threshold": (None,)}
        shapes = {"w_enc": (width, None), "w_dec": (None, n, width)} | vectors
        found = _tensors(folder / f"params_layer_{i}.safetensors", shapes, {SKIP_OF_GEMMA_SCOPE_2: (width, width)})
        width = found["w_enc"].shape[0]
        names = LOWER_CASE | {SKIP_OF_GEMMA_SCOPE_2: SKIP}
        tensors = {names.get(key, key): tensor for key, tensor in found.items()}
        if tensors["W_dec"].shape[2] != width:
            raise BadFileError(
                f"{shown(folder)}: w_dec of layer {i}: expected rows {width} wide as w_enc is, found"
                f" {tensors['W_dec'].shape[2]}"
            )
        tensors["W_dec"] = tensors["W_dec"][:, i:].flatten(1)
        if SKIP in tensors:
            tensors[SKIP] = tensors[SKIP].T
        layers.append(tensors)
    return layers


def _tensors(file: Path, shapes: Shapes, optional: Shapes) -> LayerTensors:
    """Those of a file that has exactly these; None is a size that is not known yet."""
    where = shown(file)

    def check(headers: dict[str, Header]) -> None:
        for key in shapes.keys() - headers.keys():
            raise BadFileError(f"{where}: expected the tensors {', '.join(shapes)}, found no {key}")
        for key, header in headers.items():
            expected = {**shapes, **optional}.get(key)
            if expected is None:
                raise BadFileError(f"{where}: expected the tensors {', '.join(shapes)}, found also {printable(key)}")
            pairs = zip(expected, header.shape, strict=False)
            if len(expected) != len(header.shape) or any(a not in (None, b) for a, b in pairs):
                sizes = ", ".join("any" if size is None else str(size) for size in expected)
                raise BadFileError(f"{where}: {key}: expected shape [{sizes}], found {list(header.shape)}")

    return read_safetensors(file, check)


def _facts_of_yaml(folder: Path, n: int) -> dict[str, Any]:
    file = folder / CIRCUIT_TRACER_CONFIG
    if not os.path.lexists(file):
        return {}
    entries = scalars_of_yaml(file)
    kind = entries.get("model_kind", MODEL_KIND)
    if kind != MODEL_KIND:
        raise BadFileError(f"{shown(file)}: model_kind: expected {MODEL_KIND!r}, found {kind!r:.40}")
    metadata: dict[str, Any] = {"model": entries["model_name"]} if "model_name" in entries else {}
    for key, field in (("sites", "feature_input_hook"), ("sites_out", "feature_output_hook")):
        point = hook_names.POINTS.get(entries.get(field, ""))
        if point is not None:
            metadata[key] = [hook_names.site_name(layer, point) for layer in range(n)]
    return metadata


def _facts_of_json(folder: Path, n: int) -> dict[str, Any]:
    """Where Gemma Scope 2's CLTs read and write, and what a config beside them says of the model."""
    points = {"sites": hook_names.MLP_IN, "sites_out": hook_names.MLP_OUT}
    metadata: dict[str, Any] = {
        key: [hook_names.site_name(layer, point) for layer in range(n)] for key, point in points.items()
    }
    file = folder / CONFIG
    config = read_json(file, MAX_CONFIG_BYTES) if os.path.lexists(file) else {}
    if isinstance(config, dict) and isinstance(config.get("model_name"), str):
        metadata["model"] = config["model_name"]
    return metadata


# ---- writing


def write(layers: Sequence[LayerTensors], metadata: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Write a CLT to the folder ``path`` as circuit-tracer has it; `read` gives back the same bits.

    metadata: ``model``, its name, and ``sites`` and ``sites_out``, the names of the sites where layers 0, 1, … read and
    write: all of one kind, since the format names one for all.

    Raises ValueError or TypeError, before anything is written, for tensors that are not those of a CLT, for a skip
    connection, which circuit-tracer would leave out unsaid, for layers of different widths, for other sites and for a
    folder that has such files; EnvironmentProblemError when the files cannot be written.
    """
    folder = as_path("path", path)
    check_type("layers", layers, Sequence)
    check_type("metadata", metadata, Mapping)
    problem = problem_in(layers)
    if problem:
        raise ValueError(problem)
    n, (width, d_sae) = len(layers), layers[0]["W_enc"].shape
    for number, tensors in enumerate(layers):
        if SKIP in tensors:
            raise ValueError(f"layers[{number}]: expected none with a skip connection, which circuit-tracer leaves out")
        sizes = (*tensors["W_enc"].shape, len(tensors["b_dec"]))
        if sizes != (width, d_sae, width):
            raise ValueError(
                f"layers[{number}]: expected d_in, d_sae, d_out = {width}, {d_sae}, {width} as layer 0 reads, got"
                f" {', '.join(map(str, sizes))}"
            )
    text = _config(n, metadata)
    for name in (*_names(folder, FILES), CIRCUIT_TRACER_CONFIG):
        if os.path.lexists(folder / name):
            raise ValueError(f"path: expected a folder without {name}, got {shown(folder)}")
    remove_stale_temporaries(folder)
    for i, tensors in enumerate(layers):
        encoder = {f"{key}_{i}": tensors[key] for key in ("b_enc", "b_dec", "threshold")}
        write_safetensors(encoder | {f"W_enc_{i}": tensors["W_enc"].T}, folder / f"W_enc_{i}.safetensors")
        written = tensors["W_dec"].reshape(d_sae, n - i, width)
        write_safetensors({f"W_dec_{i}": written}, folder / f"W_dec_{i}.safetensors")
    write_text(folder / CIRCUIT_TRACER_CONFIG, text)


def _names(folder: Path, pattern: re.Pattern) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if pattern.fullmatch(path.name)) if folder.is_dir() else []


def _config(n: int, metadata: Mapping[str, Any]) -> str:
    """config.yaml: strings of JSON, which are strings of YAML too."""
    model = metadata.get("model")
    if not isinstance(model, str):
        raise ValueError(f"metadata['model']: expected the name of the model, got {model!r:.40}")
    entries = {"model_name": model, "model_kind": MODEL_KIND}
    for key, field in (("sites", "feature_input_hook"), ("sites_out", "feature_output_hook")):
        sites = metadata.get(key)
        sites = list(sites) if isinstance(sites, (list, tuple)) else []
        found = [hook_names.split(site) for site in sites]
        points = {each and each[1] for each in found}
        if len(found) != n or [each and each[0] for each in found] != list(range(n)) or len(points) != 1:
            raise ValueError(
                f"metadata[{key!r}]: expected the sites of layers 0 to {n - 1}, all of one kind that TransformerLens"
                f" has a name for, got {sites!r:.200}"
            )
        (point,) = points
        assert point is not None  # one that `split` found
        entries[field] = hook_names.TRANSFORMER_LENS[point]
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in entries.items())
