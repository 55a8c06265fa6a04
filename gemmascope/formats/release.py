"""SAEs on disk, Gemma Scope 1 and 2 files and our own folders, as checked tensors.

* Gemma Scope 1: ``layer_12/width_16k/average_l0_71/params.npz``, fp32 arrays W_enc [d_model, d_sae],
  W_dec [d_sae, d_model], b_enc [d_sae], b_dec [d_model], threshold [d_sae] of a folded SAE (arXiv 2408.05147, appendix
  A). We write a config.json beside it; it is optional on reading.
* A folder of ``params.safetensors``, the same tensors in the dtype of the module, and ``config.json``, which also holds
  input_scale and pre_encoder_bias: any SAE, folded or not.
* Gemma Scope 2 (read only): ``params.safetensors`` with the keys in lower case, and DeepMind's ``config.json``.

Dimensions come from the tensors, never from names, and weights of the wrong shape are refused, never transposed. Our
config.json carries the SHA-256 of the weights beside it and its own; both are checked on loading.

Transcoders of Gemma Scope 1 hold the same arrays. Where no config says that the weights are an SAE's, a name that says
transcoder, crosscoder or CLT (of the file, a folder above it or the repository) is believed, and they are refused. A
name nearer to the file that says SAE is believed first.
"""

import contextlib
import functools
import io
import math
import os
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from ..checks import check_int, check_number, check_type, dtype_name
from ..errors import BadFileError
from . import foreign, hub, manifest
from .arrays import Header, printable, read_npz, read_safetensors
from .files import as_path, open_file, remove_stale_temporaries, sha256, sha256_of, shown
from .manifest import Manifest, SAEConfig
from .pair import Pair

KEYS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
NPZ, SAFETENSORS = "params.npz", "params.safetensors"
SUFFIXES = (".npz", ".safetensors")
DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
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
    weights = as_path("path", path)
    if os.path.isdir(weights):
        weights = _weights_in(weights)
    _check_name(weights, shown(weights))
    pair = Pair(weights, manifest.path_for(weights))
    with pair.open() as (file, config_file):
        stated = manifest.read(weights, config_file)
        _check_kind(stated, shown(weights), os.path.abspath(weights))
        return _read(weights, file, stated)


def _weights_in(folder: Path) -> Path:
    found = [weights for weights in (folder / NPZ, folder / SAFETENSORS) if _is_there(weights)]
    if len(found) != 1:
        what = "both" if found else foreign.found_in(folder) or "neither"
        raise BadFileError(f"{shown(folder)}: expected a folder with {NPZ} or {SAFETENSORS}, found {what}")
    return found[0]


def _is_there(weights: Path) -> bool:
    return os.path.lexists(Pair(weights, manifest.path_for(weights)).in_force(weights))


def _check_name(path: PurePath, name: str) -> None:
    what = foreign.LAYOUTS.get(path.name)
    if what is None and path.suffix not in SUFFIXES:
        what = "another name"
    if what is not None:
        raise BadFileError(f"{name}: expected a .npz file, a .safetensors file or a folder of one, found {what}")


def _check_kind(stated: Manifest, name: str, place: str) -> None:
    part = None if stated.is_stated else foreign.named_for_another_kind(place)
    if part is not None:
        raise BadFileError(
            f"{name}: expected an SAE, found the name {part!r:.80}: transcoders, whose files look the same,"
            " are read by Transcoder.load; an SAE is read, in a folder named 'sae'"
        )


def _read(weights: Path, file: io.BufferedReader, stated: Manifest) -> StoredSAE:
    name, before = shown(weights), os.fstat(file.fileno())
    if stated.sha256 is not None:
        digest = sha256_of(file)
        if stated.sha256 != digest:
            raise BadFileError(
                f"{name}: expected SHA-256 {stated.sha256:.12}… as in {manifest.CONFIG}, found {digest[:12]}…"
            )
    read_arrays, dtypes = (read_npz, {torch.float32}) if weights.suffix == ".npz" else (read_safetensors, DTYPES)

    def check(headers: dict[str, Header]) -> None:
        problem = _problem_in_headers(dtypes, stated.config.shape, headers)
        if problem:
            raise BadFileError(f"{name}: {problem}")

    tensors = {_canonical(key): tensor for key, tensor in read_arrays(weights, check, file).items()}
    after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise BadFileError(f"{name}: expected a file at rest, found it written to while it was read")
    problem = _problem_in_values(tensors)
    if problem:
        raise BadFileError(f"{name}: {problem}")
    return StoredSAE(tensors, stated.config)


def _canonical(key: str) -> str:
    return {"w_enc": "W_enc", "w_dec": "W_dec"}.get(key, key)


def _problem_in_headers(
    dtypes: set[torch.dtype], expected: tuple[int, int] | None, headers: dict[str, Header]
) -> str | None:
    """Why these are not the tensors of an SAE. d_model and d_sae are the lengths of b_dec and b_enc."""
    found = {}
    for key, header in headers.items():
        if _canonical(key) in found:
            return f"{printable(key)}: expected one spelling, found both W_ and w_"
        if _canonical(key) not in KEYS:
            return f"expected the keys {', '.join(KEYS)}, found also {printable(key)}"
        found[_canonical(key)] = header
    missing = [key for key in KEYS if key not in found]
    if missing:
        return f"expected the keys {', '.join(KEYS)}, found no {', '.join(missing)}"
    for key, size in (("b_enc", "d_sae"), ("b_dec", "d_model")):
        shape = found[key].shape
        if len(shape) != 1 or shape[0] < 1:
            return f"{key}: expected shape [{size}], found {list(shape)}"
    d_sae, d_model = found["b_enc"].shape[0], found["b_dec"].shape[0]
    for key, shape in (("W_enc", (d_model, d_sae)), ("W_dec", (d_sae, d_model)), ("threshold", (d_sae,))):
        if found[key].shape != shape:
            return (
                f"{key}: expected shape {list(shape)} (b_dec has {d_model} = d_model entries, b_enc"
                f" {d_sae} = d_sae), found {list(found[key].shape)}"
            )
    if expected is not None and expected != (d_model, d_sae):
        return f"expected d_model, d_sae = {expected} as in its config, found {(d_model, d_sae)}"
    weights = found["W_enc"].dtype
    allowed = {key: {weights} for key in KEYS} | {"W_enc": dtypes, "threshold": {weights, torch.float32}}
    for key in KEYS:
        if found[key].dtype not in allowed[key]:
            expected_names = " or ".join(sorted(dtype_name(dtype) for dtype in allowed[key]))
            return f"{key}: expected {expected_names}, found {dtype_name(found[key].dtype)}"
    return None


def _problem_in_values(tensors: dict[str, Tensor]) -> str | None:
    for key, tensor in tensors.items():
        if tensor.is_meta or tensor.layout != torch.strided:
            return f"{key}: expected a dense tensor, found {'one without data' if tensor.is_meta else tensor.layout}"
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

    Both files take the place of those before in one step: `read` finds the old SAE or the new one, meanwhile and after
    a kill at any point. ``config.metadata`` travels in config.json; its customary keys are ``model``, ``site``
    (``model.layers.12.output``, …), ``layer`` and ``average_l0``.

    Raises ValueError or TypeError, before anything is touched, for all that `read` would refuse, for an SAE that is not
    folded or is fp64 (.npz) and for a folder that holds another SAE or a foreign config.json; EnvironmentProblemError
    when the files cannot be written.
    """
    path = as_path("path", path)
    check_type("tensors", tensors, dict)
    check_type("config", config, SAEConfig)
    is_npz = path.suffix == ".npz"
    if path.suffix == ".safetensors":
        raise ValueError(f"path: expected a name ending in .npz or a folder, got {shown(path)}")
    weights = path if is_npz else path / SAFETENSORS
    pair = Pair(weights, manifest.path_for(weights))
    for key, tensor in tensors.items():
        check_type(f"tensors[{key!r}]", tensor, Tensor)
    headers = {str(key): Header(tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    problem = _problem_in_headers(DTYPES, None, headers) or _problem_in_values(tensors)
    if problem:
        raise ValueError(f"sae: {problem}")
    tensors = {_canonical(key): tensor for key, tensor in tensors.items()}
    dtype, (d_sae, d_model) = tensors["W_dec"].dtype, tensors["W_dec"].shape
    config = config._replace(shape=(d_model, d_sae))
    manifest.text(config, dtype, weights, digest="0" * 64)  # refuses the metadata before anything is touched
    if is_npz and not config.is_folded:
        raise ValueError(
            f"sae: expected a folded SAE for a .npz file, got input_scale {config.input_scale:.6g}, pre_encoder_bias"
            f" {config.pre_encoder_bias}: call fold() first"
        )
    if is_npz and dtype == torch.float64:
        raise ValueError("sae: expected at most float32 for a .npz file, got float64: call float() first")
    _check_replaceable(pair)

    remove_stale_temporaries(weights.parent)
    with pair.replacing() as new:
        _write_npz(tensors, new.weights) if is_npz else _write_safetensors(tensors, new.weights)
        new.config.write_text(manifest.text(config, dtype, weights, sha256(new.weights)), encoding="utf-8")


def _check_replaceable(pair: Pair) -> None:
    other = pair.weights.with_name(SAFETENSORS if pair.weights.suffix == ".npz" else NPZ)
    if pair.weights.name in (NPZ, SAFETENSORS) and _is_there(other):
        raise ValueError(f"path: expected a folder for one SAE, got one that holds {shown(other)}")
    if os.path.lexists(pair.config) and not manifest.is_ours(pair.config):
        raise ValueError(f"path: expected a folder without a foreign config, got one that holds {shown(pair.config)}")


def _write_npz(tensors: dict[str, Tensor], temporary: Path) -> None:
    # Any, because one of the names might be that of an option of savez, as far as types say.
    arrays: dict[str, Any] = {key: _stored(tensor.float()).numpy() for key, tensor in tensors.items()}
    with open(temporary, "wb") as file:
        np.savez(file, **arrays)


def _write_safetensors(tensors: dict[str, Tensor], temporary: Path) -> None:
    stored = {key: _stored(tensor) for key, tensor in tensors.items()}
    safetensors.torch.save_file(stored, temporary, metadata={"format": "pt"})


def _stored(tensor: Tensor) -> Tensor:
    """In C order on the CPU, in memory of its own, without which `safetensors` refuses it."""
    tensor = tensor.detach().to("cpu").contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


# ---- repositories


def read_pretrained(repo: str | os.PathLike, path: str | os.PathLike, revision: str | None = None) -> StoredSAE:
    """An SAE of a Hugging Face repository, or of the local folder ``repo`` when there is one.

        read_pretrained("google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71")

    path: a folder inside the repository, or a .npz or .safetensors file. revision: branch, tag or commit (hub only).
    Where it came from goes into ``config.metadata`` (``repo``, ``path``, ``revision``: the commit).

    Raises BadFileError for a path that leaves the repository, for a repository, revision or file that does not exist
    and for all that `read` refuses; EnvironmentProblemError when huggingface_hub is not installed, the network is away
    or access is restricted.
    """
    root = repo if isinstance(repo, str) else str(as_path("repo", repo))
    path = str(path) if isinstance(path, str) else as_path("path", path).as_posix()
    if revision is not None:
        check_type("revision", revision, str)
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path or PureWindowsPath(path).drive:
        raise BadFileError(f"path: expected a relative path inside the repository, found {path!r}")
    if os.path.isdir(root):
        if revision is not None:
            raise ValueError(f"revision: expected None for the local folder {shown(root)}, got {revision!r}")
        return read(_inside(Path(root), pure))
    return _read_from_hub(root, pure, revision)


def _inside(root: Path, path: PurePosixPath) -> Path:
    target = root / path
    boundary = root.resolve()
    if boundary.parent.name == "snapshots":
        boundary = boundary.parent.parent  # the hub's cache links snapshots/COMMIT/FILE to blobs/HASH beside it
    weights = _weights_in(target) if target.is_dir() else target
    pair = Pair(weights, manifest.path_for(weights))
    for file in (*pair, *map(pair.in_force, pair)):
        if not file.resolve().is_relative_to(boundary):
            raise BadFileError(f"{shown(file)}: expected a file inside {shown(root)}, found a link out of it")
    return weights


def _read_from_hub(repo: str, path: PurePosixPath, revision: str | None) -> StoredSAE:
    fetch = functools.partial(hub.fetch, repo, revision)
    where = f"{repo}/{path}"
    is_file = path.suffix in SUFFIXES or path.name in foreign.LAYOUTS
    name = path if is_file else path / NPZ
    _check_name(name, where)
    config_name = PurePosixPath(manifest.path_for(Path(name)))
    config = fetch(config_name, optional=True)
    if config is None:
        _check_kind(Manifest(), where, where)  # before much is fetched
    else:
        revision = _commit_of(config, config_name) or revision  # the branch may move on
        fetch = functools.partial(hub.fetch, repo, revision)
    weights = fetch(name, optional=not is_file)
    if weights is None:
        name = path / SAFETENSORS
        weights = fetch(name)
    assert weights is not None  # `hub.fetch` raises where a file that is not optional is missing
    with open_file(weights) as file, open_file(config) if config else contextlib.nullcontext() as config_file:
        stated = manifest.read(weights, config_file)
        _check_kind(stated, where, where)
        tensors, sae_config = _read(weights, file, stated)
    source = {"repo": repo, "path": str(path), "revision": _commit_of(weights, name) or revision}
    return StoredSAE(tensors, sae_config._replace(metadata=(sae_config.metadata or {}) | source))


def _commit_of(file: Path, name: PurePosixPath) -> str | None:
    """The commit of a file of the hub's cache, …/snapshots/COMMIT/NAME."""
    snapshot = file.parents[len(name.parts) - 1]
    return snapshot.name if snapshot.parent.name == "snapshots" else None
