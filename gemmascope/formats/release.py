"""SAEs on disk, Gemma Scope 1 and 2 files and our own folders, as checked tensors.

* Gemma Scope 1: ``layer_12/width_16k/average_l0_71/params.npz``, fp32 arrays W_enc [d_model, d_sae],
  W_dec [d_sae, d_model], b_enc [d_sae], b_dec [d_model], threshold [d_sae] of a folded SAE (arXiv 2408.05147, appendix
  A). We write a config.json beside it; it is optional on reading.
* A folder of ``params.safetensors``, the same tensors in the dtype of the module, and ``config.json``, which also holds
  input_scale and pre_encoder_bias: any SAE, folded or not.
* Gemma Scope 2 (read only): ``params.safetensors`` with the keys in lower case, and DeepMind's ``config.json``.

Dimensions come from the tensors, never from names, and weights of the wrong shape are refused, never transposed. Our
config.json carries the SHA-256 of the weights beside it and its own; both are checked on loading.
"""

import functools
import math
import os
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..checks import check_int, check_number, dtype_name
from ..errors import BadFileError, EnvironmentProblemError
from . import hub, manifest
from .arrays import Header, printable, read_npz, read_safetensors
from .files import atomic_write, sha256, shown
from .manifest import SAEConfig

KEYS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
NPZ, SAFETENSORS = "params.npz", "params.safetensors"
WIDTH_NAMES = {
    1 << 14: "16k", 1 << 15: "32k", 1 << 16: "65k", 1 << 17: "131k", 1 << 18: "262k", 1 << 19: "524k", 1 << 20: "1m",
}  # fmt: skip


class StoredSAE(NamedTuple):
    """An SAE as its files hold it, checked. tensors: those of `KEYS`."""

    tensors: dict[str, Tensor]
    config: SAEConfig


def gemma_scope_path(layer: int, width: int, average_l0: float) -> str:
    """Gemma Scope's own name: ``gemma_scope_path(12, 16384, 71.3) == "layer_12/width_16k/average_l0_71/params.npz"``.

    Widths that Gemma Scope does not have are written in digits: ``width_512``. Raises ValueError for layer < 0,
    width < 1 and an average_l0 that is negative or not finite.
    """
    check_int("layer", layer, 0)
    check_int("width", width, 1)
    check_number("average_l0", average_l0, 0)
    return f"layer_{layer}/width_{WIDTH_NAMES.get(width, width)}/average_l0_{round(average_l0)}/{NPZ}"


# ---- reading


def read(path: str | os.PathLike) -> StoredSAE:
    """The SAE in a .npz file, a .safetensors file (config.json beside it), or a folder with params.npz or
    params.safetensors.

    Tensors keep the dtype of the file. Raises BadFileError for a file that is not exactly one of the formats above:
    keys, shapes, dtypes, non-finite values, a negative threshold, damage, a decompression bomb, a config that does not
    belong to the weights.
    """
    path = Path(path)
    if os.path.isdir(path):
        path = _weights_in(path)
    config = manifest.path_for(path)
    return _read(path, config if os.path.lexists(config) else None)


def _weights_in(folder: Path) -> Path:
    found = [name for name in (NPZ, SAFETENSORS) if os.path.lexists(folder / name)]
    if len(found) != 1:
        what = "both" if found else "neither"
        raise BadFileError(f"{shown(folder)}: expected a folder with {NPZ} or {SAFETENSORS}, found {what}")
    return folder / found[0]


def _read(weights: Path, config_path: Path | None) -> StoredSAE:
    name = shown(weights)
    if weights.suffix == ".npz":
        read_arrays, dtypes = read_npz, {torch.float32}
    elif weights.suffix == ".safetensors":
        read_arrays, dtypes = read_safetensors, {torch.float16, torch.bfloat16, torch.float32, torch.float64}
    else:
        raise BadFileError(f"{name}: expected a .npz file, a .safetensors file or a folder of one, found another name")
    config = manifest.read(weights, config_path)
    stored = read_arrays(weights, functools.partial(_check_headers, name, dtypes, config.shape))
    tensors = {_canonical(key): tensor for key, tensor in stored.items()}
    problem = _problem_in_values(tensors)
    if problem:
        raise BadFileError(f"{name}: {problem}")
    return StoredSAE(tensors, config)


def _canonical(key: str) -> str:
    return {"w_enc": "W_enc", "w_dec": "W_dec"}.get(key, key)


def _check_headers(
    name: str, dtypes: set[torch.dtype], expected: tuple[int, int] | None, headers: dict[str, Header]
) -> None:
    """Refuse a file before its data is read. d_model and d_sae are the lengths of b_dec and b_enc."""
    found = {}
    for key, header in headers.items():
        if _canonical(key) in found:
            raise BadFileError(f"{name}: {printable(key)}: expected one spelling, found both W_ and w_")
        if _canonical(key) not in KEYS:
            raise BadFileError(f"{name}: expected the keys {', '.join(KEYS)}, found also {printable(key)}")
        found[_canonical(key)] = header
    missing = [key for key in KEYS if key not in found]
    if missing:
        raise BadFileError(f"{name}: expected the keys {', '.join(KEYS)}, found no {', '.join(missing)}")
    for key, size in (("b_enc", "d_sae"), ("b_dec", "d_model")):
        shape = found[key].shape
        if len(shape) != 1 or shape[0] < 1:
            raise BadFileError(f"{name}: {key}: expected shape [{size}], found {list(shape)}")
    d_sae, d_model = found["b_enc"].shape[0], found["b_dec"].shape[0]
    for key, shape in (("W_enc", (d_model, d_sae)), ("W_dec", (d_sae, d_model)), ("threshold", (d_sae,))):
        if found[key].shape != shape:
            raise BadFileError(
                f"{name}: {key}: expected shape {list(shape)} (b_dec has {d_model} = d_model entries, b_enc"
                f" {d_sae} = d_sae), found {list(found[key].shape)}"
            )
    if expected is not None and expected != (d_model, d_sae):
        raise BadFileError(f"{name}: expected d_model, d_sae = {expected} as in its config, found {(d_model, d_sae)}")
    weights = found["W_enc"].dtype
    allowed = {key: {weights} for key in KEYS} | {"W_enc": dtypes, "threshold": {weights, torch.float32}}
    for key in KEYS:
        if found[key].dtype not in allowed[key]:
            expected_names = " or ".join(sorted(dtype_name(dtype) for dtype in allowed[key]))
            raise BadFileError(f"{name}: {key}: expected {expected_names}, found {dtype_name(found[key].dtype)}")


def _problem_in_values(tensors: dict[str, Tensor]) -> str | None:
    for key, tensor in tensors.items():
        # The extremes are NaN when anything is, and need no second tensor of that size.
        low, high = (extreme.item() for extreme in torch.aminmax(tensor))
        if not (math.isfinite(low) and math.isfinite(high)):
            return f"{key}: expected finite values, found {high if math.isfinite(low) else low}"
        if key == "threshold" and low < 0:
            return f"threshold: expected values ≥ 0, found {low:.6g}"
    return None


# ---- writing


def write(path: str | os.PathLike, tensors: dict[str, Tensor], config: SAEConfig) -> None:
    """Write an SAE to ``path``: a Gemma Scope 1 file when the name ends in .npz, else a folder of params.safetensors
    and config.json. The tensors, those of `KEYS`, are read back to the same bits; a .npz holds them as fp32.

    Both files are written whole or not at all. ``config.metadata`` travels in config.json; its customary keys are
    ``model``, ``site`` (``model.layers.12.output``, …), ``layer`` and ``average_l0``. Raises ValueError for an SAE that
    is not folded or is fp64 (.npz), for weights that `read` would refuse and for a folder that holds another SAE or a
    foreign config.json; EnvironmentProblemError when the files cannot be written.
    """
    path = Path(path)
    is_npz = path.suffix == ".npz"
    if path.suffix == ".safetensors":
        raise ValueError(f"path: expected a name ending in .npz or a folder, got {shown(path)}")
    weights = path if is_npz else path / SAFETENSORS
    config_path = manifest.path_for(weights)
    dtype, (d_sae, d_model) = tensors["W_dec"].dtype, tensors["W_dec"].shape
    config = config._replace(shape=(d_model, d_sae))
    problem = _problem_in_values(tensors)
    if problem:
        raise ValueError(f"sae: {problem}")
    if is_npz and not config.is_folded:
        raise ValueError(
            f"sae: expected a folded SAE for a .npz file, got input_scale {config.input_scale:.6g}, pre_encoder_bias"
            f" {config.pre_encoder_bias}: call fold() first"
        )
    if is_npz and dtype == torch.float64:
        raise ValueError("sae: expected at most float32 for a .npz file, got float64: call float() first")
    _check_replaceable(weights, config_path)

    manifest.text(config, dtype, weights, digest="")  # refuses the metadata before anything is written
    # Both files are complete before the first takes its place, and until the second does the hashes differ.
    with atomic_write(config_path) as temporary_config, atomic_write(weights) as temporary:
        _write_npz(tensors, temporary) if is_npz else _write_safetensors(tensors, temporary, weights)
        temporary_config.write_text(manifest.text(config, dtype, weights, sha256(temporary)), encoding="utf-8")


def _check_replaceable(weights: Path, config_path: Path) -> None:
    other = weights.with_name(SAFETENSORS if weights.suffix == ".npz" else NPZ)
    if weights.name in (NPZ, SAFETENSORS) and os.path.lexists(other):
        raise ValueError(f"path: expected a folder for one SAE, got one that holds {shown(other)}")
    if os.path.lexists(config_path) and not manifest.is_ours(config_path):
        raise ValueError(f"path: expected a folder without a foreign config, got one that holds {shown(config_path)}")


def _write_npz(tensors: dict[str, Tensor], temporary: Path) -> None:
    # Any, because one of the names might be that of an option of savez, as far as types say.
    arrays: dict[str, Any] = {k: t.to("cpu", torch.float32).contiguous().numpy() for k, t in tensors.items()}
    with open(temporary, "wb") as file:
        np.savez(file, **arrays)


def _write_safetensors(tensors: dict[str, Tensor], temporary: Path, weights: Path) -> None:
    stored = {key: tensor.to("cpu").contiguous() for key, tensor in tensors.items()}
    try:
        safetensors.torch.save_file(stored, temporary, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise EnvironmentProblemError(f"{shown(weights)}: cannot be written: {error}") from error


# ---- repositories


def read_pretrained(repo: str, path: str, revision: str | None = None) -> StoredSAE:
    """An SAE of a Hugging Face repository, or of the local folder ``repo`` when there is one.

        read_pretrained("google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71")

    path: a folder inside the repository, or a .npz or .safetensors file. revision: branch, tag or commit (hub only).
    Where it came from goes into ``config.metadata`` (``repo``, ``path``, ``revision``: the commit).

    Raises BadFileError for a path that leaves the repository, for a repository, revision or file that does not exist
    and for all that `read` refuses; EnvironmentProblemError when huggingface_hub is not installed, the network is away
    or access is restricted.
    """
    path = os.fspath(path)
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path or PureWindowsPath(path).drive:
        raise BadFileError(f"path: expected a relative path inside the repository, found {path!r}")
    if os.path.isdir(repo):
        if revision is not None:
            raise ValueError(f"revision: expected None for the local folder {shown(repo)}, got {revision!r}")
        return read(_inside(Path(repo), pure))
    return _read_from_hub(repo, pure, revision)


def _inside(root: Path, path: PurePosixPath) -> Path:
    target = root / path
    boundary = root.resolve()
    if boundary.parent.name == "snapshots":
        boundary = boundary.parent.parent  # the hub's cache links snapshots/COMMIT/FILE to blobs/HASH beside it
    weights = _weights_in(target) if target.is_dir() else target
    for file in (weights, manifest.path_for(weights)):
        if not file.resolve().is_relative_to(boundary):
            raise BadFileError(f"{shown(file)}: expected a file inside {shown(root)}, found a link out of it")
    return weights


def _read_from_hub(repo: str, path: PurePosixPath, revision: str | None) -> StoredSAE:
    fetch = functools.partial(hub.fetch, repo, revision)
    if path.suffix in (".npz", ".safetensors"):
        name, weights = path, fetch(path)
    else:
        name, weights = path / NPZ, fetch(path / NPZ, optional=True)
        if weights is None:
            name, weights = path / SAFETENSORS, fetch(path / SAFETENSORS)
    assert weights is not None  # `hub.fetch` raises where a file that is not optional is missing
    config_name = PurePosixPath(manifest.path_for(Path(name)))
    tensors, config = _read(weights, fetch(config_name, optional=name.suffix == ".npz"))
    snapshot = weights.parents[len(name.parts) - 1]  # …/snapshots/COMMIT
    commit = snapshot.name if snapshot.parent.name == "snapshots" else revision
    source = {"repo": repo, "path": str(path), "revision": commit}
    return StoredSAE(tensors, config._replace(metadata=(config.metadata or {}) | source))
