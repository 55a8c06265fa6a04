"""`CodeStore`: the sparse codes of many sites on disk, shard by shard, as `collect_to_store` writes them.

One safetensors file a shard, codes-000000.safetensors, …, of consecutive rows of tokens: ``kept`` bool [rows, context],
and for each site ``SITE/values`` [nnz], ``SITE/indices`` [nnz] int32 and ``SITE/offsets`` [n + 1] int64 of a
`SparseCode` of its n kept tokens. scales.safetensors holds ``SITE/max``, ``SITE/mean`` and ``SITE/firing_count`` of
`LatentScales`. manifest.json, written last, has the size and the SHA-256 of each file.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..checks import check_int
from ..errors import BadFileError
from ..formats.arrays import STORED_DTYPES, Header, read_safetensors
from ..formats.files import as_path, atomic_write, open_file, read_manifest, seal, sha256_of, shown, write_json
from ..kernels import SparseCode
from ..runs import Run
from .collect import BATCH_ROWS, Codes, Pass, code_bytes, pieces_of
from .scales import LatentScales
from .site import Site

MANIFEST, SCALES = "manifest.json", "scales.safetensors"
FORMAT, FORMAT_VERSION = "gemmascope-codes", 1
_KEYS = {"format", "format_version", "sites", "d_sae", "rows", "context", "n_tokens", "shards", "scales", "sha256"}
_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}
_FLOATS = (torch.float32, torch.float64)
_PARTS = ("values", "indices", "offsets")
_SCALES = {"max": torch.float32, "mean": torch.float32, "firing_count": torch.int64}


def collect_to_store(
    model: nn.Module,
    tokens: Tensor,
    saes: Mapping[Site, Any] | Mapping[str, Any] | Mapping[Site | str, Any],
    out: str | os.PathLike,
    *,
    attention_mask: Tensor | None = None,
    batch_size: int = BATCH_ROWS,
    skip_token_ids: Iterable[int] | None = None,
    max_bytes: int = 1 << 30,
    progress: Callable[[int], Any] | None = None,
) -> "CodeStore":
    """`collect`, onto the disk: the codes go to the folder ``out`` a shard at a time.

    max_bytes: bound on the codes of a shard, which are what is held on the CPU beside those of one batch: 8 bytes an
    entry (12 of an fp64 SAE), 8 a token and 8 a batch, at each site. Other arguments and errors as of `collect`; and
    ValueError for a folder that holds a store or other files, and for a batch whose codes alone are more than
    ``max_bytes``; EnvironmentProblemError when the disk is full or cannot be written. What an interrupted call left in
    the folder is written anew.
    """
    check_int("max_bytes", max_bytes, 1)
    pass_ = Pass(model, tokens, saes, attention_mask, batch_size, skip_token_ids, progress)
    with Run(out, fresh=True, kind="code store") as run:
        if os.path.lexists(run.folder / MANIFEST):
            raise ValueError(f"out: expected a new folder, found a store in {shown(run.folder)}; delete it first")
        for path in run.folder.glob("codes-*.safetensors"):
            path.unlink()
        writer = _Writer(run.folder, pass_, max_bytes)
        for rows, batch in pass_.batches():
            writer.add(rows, batch)
        writer.finish(tokens)
    return CodeStore.open(out)


class CodeStore:
    """A folder that `collect_to_store` wrote. Each shard is read whole and checked by its checksum when asked for.

    for codes in CodeStore.open("codes"):  # the `Codes` of one shard after another
        codes[Site(3, "resid")], codes.kept
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], latent_scales: dict[Site, LatentScales]):
        self.folder, self.latent_scales = folder, latent_scales
        sites = map(Site.parse, manifest["sites"])
        self.d_sae: dict[Site, int] = dict(zip(sites, manifest["d_sae"], strict=True))
        self.rows: int = manifest["rows"]
        self.context: int = manifest["context"]
        self._shards: list[dict[str, Any]] = manifest["shards"]

    @classmethod
    def open(cls, folder: str | os.PathLike) -> "CodeStore":
        """Raises BadFileError for what is no store, and for one that is damaged. Of the shards only the sizes are
        checked now, the rest when they are read."""
        folder = as_path("folder", folder)
        manifest = _read_manifest(folder)
        for file in (*manifest["shards"], manifest["scales"]):
            path = folder / file["file"]
            found = os.path.getsize(path) if os.path.isfile(path) else None
            if found != file["bytes"]:
                what = "no file" if found is None else f"{found} bytes"
                raise BadFileError(f"{shown(path)}: expected {file['bytes']} bytes, found {what}")
        return cls(folder, manifest, _read_scales(folder, manifest))

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(self.d_sae)

    def __len__(self) -> int:
        """How many shards there are."""
        return len(self._shards)

    def __iter__(self) -> Iterator[Codes]:
        return (self.read(shard) for shard in range(len(self)))

    def read(self, shard: int) -> Codes:
        """The codes of one shard, which alone is read. Raises ValueError for a number beyond the last, BadFileError
        for a file that is missing or not what was written."""
        check_int("shard", shard, 0, len(self) - 1)
        entry = self._shards[shard]
        path, n_rows = self.folder / entry["file"], entry["rows"]
        names = {"kept", *(f"{site}/{part}" for site in self.sites for part in _PARTS)}

        def check(headers: dict[str, Header]) -> None:
            _check_names(path, headers, names)
            _check_header(path, "kept", headers["kept"], (torch.bool,), (n_rows, self.context))
            for site in self.sites:
                values, indices, offsets = (headers[f"{site}/{part}"] for part in _PARTS)
                nnz = values.shape[0] if len(values.shape) == 1 else -1
                _check_header(path, f"{site}/values", values, _FLOATS, (max(nnz, 0),))
                _check_header(path, f"{site}/indices", indices, (torch.int32,), (nnz,))
                _check_header(path, f"{site}/offsets", offsets, (torch.int64,), (entry["tokens"] + 1,))

        tensors = _read(path, entry, check, len(names))
        kept, codes = tensors["kept"], {}
        if kept.view(torch.uint8).max() > 1 or int(kept.sum()) != entry["tokens"]:
            raise BadFileError(f"{shown(path)}: kept: expected True {entry['tokens']} times, found it otherwise")
        for site, d_sae in self.d_sae.items():
            values, indices, offsets = (tensors[f"{site}/{part}"] for part in _PARTS)
            code = SparseCode(values, indices, offsets, d_sae)
            try:
                code.check()
            except ValueError as error:
                raise BadFileError(f"{shown(path)}: {site}: expected a code, found {error}") from error
            if not code.values.isfinite().all():
                raise BadFileError(f"{shown(path)}: {site}: expected finite activations, found NaN or Inf")
            codes[site] = code
        return Codes(codes, kept, self.latent_scales)


# ---- writing


class _Writer:
    """Gathers batches, and writes them when there is no room for more."""

    def __init__(self, folder: Path, pass_: Pass, max_bytes: int):
        self._folder, self._pass, self._max_bytes = folder, pass_, max_bytes
        self._parts: dict[Site, list[SparseCode]] = {site: [] for site in pass_.saes}
        self._held, self._first = 0, 0
        self._shards: list[dict[str, Any]] = []

    def add(self, rows: slice, batch: dict[Site, SparseCode]) -> None:
        needed = sum(map(code_bytes, batch.values()))
        if needed > self._max_bytes:
            raise ValueError(
                f"max_bytes: expected room for the codes of a batch, {needed} bytes for rows {rows.start} to "
                f"{rows.stop - 1}, got {self._max_bytes}; give more, or a smaller batch_size"
            )
        if self._held + needed > self._max_bytes:
            self._write(rows.start)
        for site, code in batch.items():
            self._parts[site].append(code)
        self._held += needed

    def _write(self, stop: int) -> None:
        """A shard of the rows before ``stop``."""
        kept = self._pass.kept[self._first : stop]
        pieces: dict[str, list[Tensor]] = {"kept": [kept]}
        for site, parts in self._parts.items():
            pieces |= {f"{site}/{part}": each for part, each in zip(_PARTS, pieces_of(parts), strict=True)}
        file = _file(len(self._shards))
        facts = {"rows": stop - self._first, "tokens": int(kept.sum())}
        self._shards.append(_write_tensors(self._folder / file, pieces) | facts)
        self._parts, self._held, self._first = {site: [] for site in self._parts}, 0, stop

    def finish(self, tokens: Tensor) -> None:
        self._write(len(tokens))
        scales = self._pass.latent_scales()
        pieces = {f"{site}/{name}": [getattr(each, name)] for site, each in scales.items() for name in _SCALES}
        content = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "sites": [str(site) for site in scales],
            "d_sae": [len(each.max) for each in scales.values()],
            "rows": tokens.shape[0],
            "context": tokens.shape[1],
            "n_tokens": int(self._pass.kept.sum()),
            "shards": self._shards,
            "scales": _write_tensors(self._folder / SCALES, pieces),
        }
        write_json(self._folder / MANIFEST, content | {"sha256": seal(content)})


def _write_tensors(path: Path, pieces: Mapping[str, list[Tensor]]) -> dict[str, Any]:
    """A safetensors file of tensors in pieces, which are not joined in memory; its name, size and checksum."""
    entries, start = {}, 0
    # Widest first, so that each begins at a multiple of its itemsize.
    ordered = dict(sorted(pieces.items(), key=lambda item: -item[1][0].itemsize))
    for name, parts in ordered.items():
        shape = [sum(len(part) for part in parts), *parts[0].shape[1:]]
        end = start + sum(part.nbytes for part in parts)
        entries[name] = {"dtype": _NAMES[parts[0].dtype], "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    with atomic_write(path) as temporary, open(temporary, "wb") as stream:
        for piece in (len(text).to_bytes(8, "little"), text, *(_bytes(p) for parts in ordered.values() for p in parts)):
            stream.write(piece)
            digest.update(piece)
            size += len(piece)
    return {"file": path.name, "bytes": size, "sha256": digest.hexdigest()}


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a CPU tensor."""
    return cast(memoryview, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _file(shard: int) -> str:
    return f"codes-{shard:06d}.safetensors"


# ---- reading


def _read(path: Path, entry: Mapping[str, Any], check: Callable[[dict[str, Header]], None], n: int) -> dict[str, Any]:
    with open_file(path) as file:
        if sha256_of(file) != entry["sha256"]:
            raise BadFileError(f"{shown(path)}: expected the file as it was written, found another checksum")
        return read_safetensors(path, check, file, dtypes=STORED_DTYPES, max_arrays=n)


def _check_names(path: Path, headers: Mapping[str, Header], names: set[str]) -> None:
    if headers.keys() != names:
        differing = sorted(headers.keys() ^ names)
        raise BadFileError(f"{shown(path)}: expected {len(names)} tensors, found other ones: {differing[0][:60]!r}")


def _check_header(path: Path, name: str, header: Header, dtypes: tuple[torch.dtype, ...], shape: tuple) -> None:
    if header.dtype not in dtypes or header.shape != shape:
        raise BadFileError(
            f"{shown(path)}: {name}: expected {' or '.join(_NAMES[dtype] for dtype in dtypes)} {list(shape)}, found "
            f"{_NAMES[header.dtype]} {list(header.shape)}"
        )


def _read_scales(folder: Path, manifest: Mapping[str, Any]) -> dict[Site, LatentScales]:
    path = folder / SCALES
    expected = {
        f"{site}/{name}": (dtype, (d_sae,))
        for site, d_sae in zip(manifest["sites"], manifest["d_sae"], strict=True)
        for name, dtype in _SCALES.items()
    }

    def check(headers: dict[str, Header]) -> None:
        _check_names(path, headers, set(expected))
        for name, (dtype, shape) in expected.items():
            _check_header(path, name, headers[name], (dtype,), shape)

    tensors = _read(path, manifest["scales"], check, len(expected))
    found = {}
    for site in manifest["sites"]:
        largest, mean, count = (tensors[f"{site}/{name}"] for name in _SCALES)
        if not (largest.isfinite().all() and mean.isfinite().all() and (count >= 0).all()):
            raise BadFileError(f"{shown(path)}: {site}: expected finite scales and counts, found others")
        found[Site.parse(site)] = LatentScales(largest, mean, count, manifest["n_tokens"])
    return found


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    manifest = read_manifest(path, FORMAT, FORMAT_VERSION)
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    if manifest.keys() != _KEYS or manifest["sha256"] != seal(content) or not _is_whole(manifest):
        raise BadFileError(f"{shown(path)}: expected the manifest as it was written, found it changed")
    return manifest


def _is_whole(manifest: dict[str, Any]) -> bool:
    sites, widths, shards = manifest["sites"], manifest["d_sae"], manifest["shards"]
    file = {"file": str, "bytes": int, "sha256": str}
    try:
        counts = [*widths, *(manifest[name] for name in ("rows", "context", "n_tokens"))]
        return (
            len({Site.parse(site) for site in sites}) == len(widths) > 0
            and all(type(count) is int and count > 0 for count in counts)
            and all(_kinds(shard) == file | {"rows": int, "tokens": int} for shard in shards)
            and [shard["file"] for shard in shards] == [_file(number) for number in range(len(shards))]
            and all(shard["rows"] > 0 and shard["tokens"] >= 0 for shard in shards)
            and sum(shard["rows"] for shard in shards) == manifest["rows"]
            and sum(shard["tokens"] for shard in shards) == manifest["n_tokens"]
            and _kinds(manifest["scales"]) == file
            and manifest["scales"]["file"] == SCALES
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        return False


def _kinds(entry: dict[str, Any]) -> dict[str, type]:
    return {name: type(value) for name, value in entry.items()}
