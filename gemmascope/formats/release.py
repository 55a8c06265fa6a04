"""SAEs on disk, Gemma Scope 1 and 2 files and our own folders, as checked tensors.

* Gemma Scope 1: ``layer_12/width_16k/average_l0_71/params.npz``, fp32 arrays W_enc [d_model, d_sae],
  W_dec [d_sae, d_model], b_enc [d_sae], b_dec [d_model], threshold [d_sae] of a folded SAE (arXiv 2408.05147, appendix
  A). We write a config.json beside it; it is optional on reading.
* A folder of ``params.safetensors``, the same tensors in the dtype of the module, and ``config.json``, which also holds
  input_scale and pre_encoder_bias: any SAE, folded or not.
* Gemma Scope 2 (read only): ``params.safetensors`` with the keys in lower case, and DeepMind's ``config.json``.
* Folders of SAELens, sparsify and dictionary_learning (read only): see `saelens`, `sparsify` and `dictionary_learning`.

Dimensions come from the tensors, never from names, and weights of the wrong shape are refused, never transposed. Our
config.json carries the SHA-256 of the weights beside it and its own; both are checked on loading.

Gemma Scope's SAEs of the token embeddings (``embedding/width_4k/average_l0_6/params.npz``) hold another scale. In a
file of that name, with no config of ours beside it, W_enc is divided by √d_model and W_dec multiplied by it, as in
SAELens; ``config.metadata["embedding_scale"]`` is √d_model then.

Transcoders of Gemma Scope 1 hold the same arrays. Where no config says that the weights are an SAE's, a name that says
transcoder, crosscoder or CLT (of the file, a folder above it or the repository) is believed, and they are refused. A
name nearer to the file that says SAE is believed first.
"""

import contextlib
import functools
import io
import itertools
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from ..checks import check_choice, check_int, check_number, check_type
from ..errors import BadFileError
from . import foreign, hub, manifest
from .arrays import Header, printable, read_npz, read_safetensors
from .fields import Fields
from .files import as_path, open_file, read_json_of, remove_stale_temporaries, sha256, sha256_of, shown
from .manifest import Manifest, SAEConfig
from .pair import Pair
from .stored import (
    DTYPES,
    KEYS,
    LOWER_CASE,
    OURS,
    StoredSAE,
    at_rest,
    keys_of,
    problem_in_headers,
    problem_in_values,
)

__all__ = ["KEYS", "SAEConfig", "StoredSAE", "gemma_scope_path", "read", "read_pretrained", "write"]

NPZ, SAFETENSORS = "params.npz", "params.safetensors"
SUFFIXES = (".npz", ".safetensors")
EMBEDDING = re.compile(r"(?:^|/)embedding/width_[^/]+/average_l0_[^/]+/params\.npz")
WIDTH_NAMES = {
    1 << 14: "16k", 1 << 15: "32k", 1 << 16: "65k", 1 << 17: "131k", 1 << 18: "262k", 1 << 19: "524k", 1 << 20: "1m",
}  # fmt: skip


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
    """The SAE in a .npz file, a .safetensors file (config.json beside it), the weights of another project (their config
    beside them), or a folder with one of these: params.npz, params.safetensors or a name of `foreign.FORMATS`.

    Tensors keep the dtype of the file (SAELens: that of its cfg.json). Raises BadFileError for a file that is not
    exactly one of the formats above: keys, shapes, dtypes, non-finite values, a negative threshold, damage, a
    decompression bomb, a config that does not belong to the weights, an SAE whose function this module cannot hold.
    """
    weights = as_path("path", path)
    if os.path.isdir(weights):
        weights = _weights_in(weights)
    _check_name(weights, shown(weights))
    if weights.name in foreign.FORMATS:
        return _read_foreign(weights, foreign.config_for(weights))
    pair = Pair(weights, manifest.path_for(weights))
    with pair.open() as (file, config_file):
        stated = manifest.read(weights, config_file)
        place = os.path.abspath(weights)
        _check_kind(stated, shown(weights), place)
        return _read(weights, file, stated, place)


def _weights_in(folder: Path) -> Path:
    found = [weights for weights in (folder / NPZ, folder / SAFETENSORS) if _is_there(weights)]
    found += [folder / name for name in foreign.FORMATS if os.path.lexists(folder / name)]
    if len(found) != 1:
        names = " and ".join(weights.name for weights in found) or f"neither, nor {foreign.NAMES}"
        raise BadFileError(f"{shown(folder)}: expected a folder with {NPZ} or {SAFETENSORS}, found {names}")
    return found[0]


def _is_there(weights: Path) -> bool:
    return any(map(os.path.lexists, Pair(weights, manifest.path_for(weights)).places(weights)))


def _check_name(path: PurePath, name: str) -> None:
    if path.name not in foreign.FORMATS and path.suffix not in SUFFIXES:
        raise BadFileError(f"{name}: expected a .npz file, a .safetensors file or a folder of one, found another name")


def _check_kind(stated: Manifest, name: str, place: str) -> None:
    part = None if stated.is_stated else foreign.named_for_another_kind(place)
    if part is not None:
        raise BadFileError(
            f"{name}: expected an SAE, found the name {part!r:.80}: transcoders, whose files look the same,"
            " are read by Transcoder.load; an SAE is read, in a folder named 'sae'"
        )


def _read_foreign(weights: Path, config: Path) -> StoredSAE:
    format = foreign.FORMATS[weights.name]
    if not os.path.lexists(config):
        raise BadFileError(
            f"{shown(weights)}: expected {config.name} beside it, found none: the weights alone do not say what"
            f" {format.project} makes of them"
        )
    with open_file(weights) as file, open_file(config) as config_file:
        stated = read_json_of(config_file, shown(config), manifest.MAX_CONFIG_BYTES)
        with at_rest(file, shown(weights)):
            return format.read(weights, file, Fields(stated, shown(config)))


def _read(weights: Path, file: io.BufferedReader, stated: Manifest, place: str) -> StoredSAE:
    """place: where the weights are said to be, the path of the file or that in its repository."""
    name, config = shown(weights), stated.config
    read_arrays, dtypes = read_safetensors, DTYPES
    if weights.suffix == ".npz":
        read_arrays, dtypes = read_npz, frozenset({torch.float32})

    def check(headers: dict[str, Header]) -> None:
        problem = _problem_in_headers(dtypes, config.shape, keys_of(config), headers)
        if problem:
            raise BadFileError(f"{name}: {problem}")

    with at_rest(file, name):
        if stated.sha256 is not None:
            digest = sha256_of(file)
            if stated.sha256 != digest:
                raise BadFileError(
                    f"{name}: expected SHA-256 {stated.sha256:.12}… as in {manifest.CONFIG}, found {digest[:12]}…"
                )
        tensors = {_canonical(key): tensor for key, tensor in read_arrays(weights, check, file).items()}
    problem = problem_in_values(tensors)
    if problem:
        raise BadFileError(f"{name}: {problem}")
    if not stated.is_stated and EMBEDDING.search(place):
        return _of_embeddings(tensors, config)
    return StoredSAE(tensors, config)


def _of_embeddings(tensors: dict[str, Tensor], config: SAEConfig) -> StoredSAE:
    scale = math.sqrt(tensors["W_dec"].shape[1])
    tensors = tensors | {"W_enc": tensors["W_enc"] / scale, "W_dec": tensors["W_dec"] * scale}
    return StoredSAE(tensors, config._replace(metadata=(config.metadata or {}) | {"embedding_scale": scale}))


def _canonical(key: str) -> str:
    return LOWER_CASE.get(key, key)


def _problem_in_headers(
    dtypes: frozenset[torch.dtype],
    expected: tuple[int, int] | None,
    keys: tuple[str, ...],
    headers: Mapping[str, Header],
) -> str | None:
    """Why these are not the tensors of an SAE, whose names may begin with w_."""
    found = {}
    for key, header in headers.items():
        if _canonical(key) in found:
            return f"{printable(key)}: expected one spelling, found both W_ and w_"
        found[_canonical(key)] = header
    return problem_in_headers({key: OURS[key] for key in keys}, found, dtypes=dtypes, stated=expected)


# ---- writing


def write(path: str | os.PathLike, tensors: dict[str, Tensor], config: SAEConfig) -> None:
    """Write an SAE to ``path``: a Gemma Scope 1 file when the name ends in .npz, else a folder of params.safetensors
    and config.json. The tensors, those that `stored.keys_of` names, are read back to the same bits; a .npz holds them
    as fp32.

    Both files take the place of those before in one step: `read` finds the old SAE or the new one, meanwhile and after
    a kill at any point. ``config.metadata`` travels in config.json; its customary keys are ``model``, ``site``
    (``model.layers.12.output``, …), ``layer`` and ``average_l0``.

    Raises ValueError or TypeError, before anything is touched, for all that `read` would refuse, for an SAE that is not
    folded, or is TopK or fp64 (.npz), and for a folder that holds another SAE or a foreign config.json;
    EnvironmentProblemError when the files cannot be written.
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
    check_choice("config.architecture", config.architecture, manifest.ARCHITECTURES)
    problem = _problem_in_headers(DTYPES, None, keys_of(config), headers) or problem_in_values(tensors)
    if problem:
        raise ValueError(f"sae: {problem}")
    tensors = {_canonical(key): tensor for key, tensor in tensors.items()}
    dtype, (d_sae, d_model) = tensors["W_dec"].dtype, tensors["W_dec"].shape
    config = config._replace(shape=(d_model, d_sae))
    manifest.text(config, dtype, weights, digest="0" * 64)  # refuses the metadata before anything is touched
    if is_npz and config.architecture == "topk":
        raise ValueError("sae: expected a JumpReLU SAE for a .npz file, got a TopK one: write a folder")
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
    if weights.name in foreign.FORMATS:
        files = (weights, foreign.config_for(weights))
    else:
        pair = Pair(weights, manifest.path_for(weights))
        files = itertools.chain.from_iterable(map(pair.places, pair))
    for file in files:
        if not file.resolve().is_relative_to(boundary):
            raise BadFileError(f"{shown(file)}: expected a file inside {shown(root)}, found a link out of it")
    return weights


def _read_from_hub(repo: str, path: PurePosixPath, revision: str | None) -> StoredSAE:
    fetch = functools.partial(hub.fetch, repo, revision)
    where = f"{repo}/{path}"
    if path.name in foreign.FORMATS:
        weights, config = fetch(path), fetch(foreign.config_for(path))
        assert weights is not None  # `hub.fetch` raises where a file that is not optional is missing
        assert config is not None
        return _from_repository(_read_foreign(weights, config), repo, path, _commit_of(weights, path) or revision)
    is_file = path.suffix in SUFFIXES
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
        weights = fetch(name, optional=True)
    if weights is None:
        theirs = _name_of_foreign(fetch, path)
        if theirs is not None:
            stored = _read_from_hub(repo, theirs, revision)
            return _from_repository(stored, repo, path, (stored.config.metadata or {})["revision"])
        weights = fetch(name)
    assert weights is not None
    with open_file(weights) as file, open_file(config) if config else contextlib.nullcontext() as config_file:
        stated = manifest.read(weights, config_file)
        _check_kind(stated, where, where)
        stored = _read(weights, file, stated, f"{repo}/{name}")
    return _from_repository(stored, repo, path, _commit_of(weights, name) or revision)


def _name_of_foreign(fetch: Callable[..., Path | None], path: PurePosixPath) -> PurePosixPath | None:
    """The weights of another project in the folder ``path`` of a repository."""
    for name in foreign.FORMATS:
        weights = path / name
        if fetch(foreign.config_for(weights), optional=True) and fetch(weights, optional=True):
            return weights
    return None


def _from_repository(stored: StoredSAE, repo: str, path: PurePosixPath, revision: str | None) -> StoredSAE:
    source = {"repo": repo, "path": str(path), "revision": revision}
    return stored._replace(config=stored.config._replace(metadata=(stored.config.metadata or {}) | source))


def _commit_of(file: Path, name: PurePosixPath) -> str | None:
    """The commit of a file of the hub's cache, …/snapshots/COMMIT/NAME."""
    snapshot = file.parents[len(name.parts) - 1]
    return snapshot.name if snapshot.parent.name == "snapshots" else None
