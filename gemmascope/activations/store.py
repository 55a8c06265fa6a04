"""`ActivationStore`: superblocks on disk, bit for bit those that a `Harvester` streams.

One safetensors file a superblock, superblock-000000.safetensors, …: a tensor [n, width] per site, named as the site;
``norms`` fp32 [sites, n]; ``row`` int64 [n] and ``position`` int32 [n] of each token. manifest.json says what they were
made from and holds the size and the SHA-256 of each. Files are read by pread: one that is cut short under the reader
gives an error, where a map of it would kill the process.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..checks import check_int, check_type, dtype_name
from ..errors import BadFileError, EnvironmentProblemError
from ..formats.differences import differences
from ..formats.files import as_path, atomic_write, open_file, read_manifest, seal, sha256, shown, write_json
from ..runs import Run, key_of
from ..sites import Site
from .harvester import Harvester
from .ring import RING_DTYPES, Ring, check_dtype

MANIFEST = "manifest.json"
FORMAT, FORMAT_VERSION = "gemmascope-activations", 1
_KEYS = {"format", "format_version", "identity", "shards", "sha256"}
_CHUNK_BYTES = 16 << 20
_READERS = 4
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32"}


class Shard(NamedTuple):
    """The file of one superblock, as the manifest has it."""

    file: str
    tokens: int
    bytes: int
    sha256: str


def harvest_to_store(
    source: Harvester,
    out: str | os.PathLike,
    *,
    blocks: int,
    dtype: torch.dtype,
    progress: Callable[[int], Any] | None = None,
) -> "ActivationStore":
    """Write superblocks 0 … ``blocks`` − 1 of ``source`` to the folder ``out``, in ``dtype``.

    Superblocks that are there and whole are kept, after their checksums were verified; those that are missing or
    damaged are harvested again, so that the same call goes on after an interruption, extends a store and repairs one.
    progress: called with the number of superblocks that are there.

    Raises ValueError for numbers and dtypes that cannot be and for a folder of other files; BadFileError for a store of
    something else, saying what differs, and for a damaged manifest; EnvironmentProblemError when the disk is full or
    cannot be written, when another process writes there, for activations that are not finite, and when a superblock
    comes out other than it was. What was finished before is kept in any case.
    """
    check_type("source", source, Harvester)
    check_int("blocks", blocks, 1)
    check_dtype("dtype", dtype)
    if progress is not None and not callable(progress):
        raise TypeError(f"progress: expected a function, got {type(progress).__name__}")
    identity = source.identity | {"dtype": dtype_name(dtype)}
    with Run(out, kind="activation store") as run:
        folder, shards = run.folder, []
        if os.path.lexists(folder / MANIFEST):
            found, shards = _read_manifest(folder)
            _refuse_other(folder, found, identity)
        ring = None
        for block in range(blocks):
            if block >= len(shards) or not _is_whole(folder, shards[block]):
                if ring is None:
                    ring = Ring(
                        source.widths, source.capacity, dtype=dtype, device="cpu", pinned=source.device.type == "cuda"
                    )
                ring.fill(source, block)
                shard = _write_shard(folder, block, ring)
                if block < len(shards) and shard != shards[block]:
                    raise EnvironmentProblemError(
                        f"{shown(folder / shard.file)}: expected the activations harvested before, found other ones: "
                        "something that they depend on has changed (PyTorch, the machine?); harvest into a new folder"
                    )
                if block == len(shards):
                    shards.append(shard)
                    _write_manifest(folder, identity, shards)
            if progress is not None:
                progress(block + 1)
    return ActivationStore.open(folder)


class ActivationStore:
    """A folder that `harvest_to_store` wrote: a source of superblocks for a `Feed`, in place of its `Harvester`.

    A shard is verified when it is first read: by its size each time, by its checksum once.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], shards: list[Shard]):
        self.folder, self.identity, self.shards = folder, identity, tuple(shards)
        """identity: that of the `Harvester`, and the dtype."""
        sites = map(Site.parse, identity["sites"])
        self.widths: dict[Site, int] = dict(zip(sites, identity["widths"], strict=True))
        self.capacity: int = identity["rows_per_block"] * identity["context"]
        """The most tokens that a superblock can have."""
        self.dtype = _dtype_of(identity)
        self.content = key_of({name: value for name, value in identity.items() if name != "dtype"})
        """That of the `Harvester`."""
        self._verified: set[int] = set()

    @classmethod
    def open(cls, folder: str | os.PathLike, identity: Mapping[str, Any] | None = None) -> "ActivationStore":
        """The store in ``folder``.

        identity: what it must have been made from, a `Harvester.identity`, with a ``dtype`` if that matters. Raises
        BadFileError for what is no store or a store of something else, saying what differs, and for shards that are
        missing or of another size, naming each.
        """
        folder = as_path("folder", folder)
        found, shards = _read_manifest(folder)
        if identity is not None:
            check_type("identity", identity, Mapping)
            _refuse_other(folder, found if "dtype" in identity else _without(found, "dtype"), identity)
        missing = [shard.file for shard in shards if _size(folder / shard.file) != shard.bytes]
        if missing:
            raise BadFileError(
                f"{shown(folder)}: expected the {len(shards)} files of {MANIFEST}, found these missing or of another "
                f"size: {', '.join(missing)}; harvest into the folder again to have them made anew"
            )
        return cls(folder, found, shards)

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(self.widths)

    @property
    def blocks(self) -> int:
        """How many superblocks there are."""
        return len(self.shards)

    def verify(self) -> None:
        """Read everything. Raises BadFileError naming the files that are missing or damaged."""
        bad = [shard.file for shard in self.shards if not _is_whole(self.folder, shard)]
        if bad:
            raise BadFileError(f"{shown(self.folder)}: expected whole files, found these damaged: {', '.join(bad)}")

    def fill(self, block: int, ring: Ring) -> None:
        """Add the tokens of superblock ``block`` to ``ring``; see `Ring.fill`.

        Raises ValueError for a superblock beyond the last and for a ring of another dtype, BadFileError naming a file
        that is missing or damaged.
        """
        check_int("block", block, 0)
        if block >= self.blocks:
            raise ValueError(
                f"{shown(self.folder)}: expected a superblock from 0 to {self.blocks - 1}, got {block}; harvest more "
                "(blocks) or train on fewer tokens"
            )
        if ring.dtype != self.dtype:
            raise ValueError(
                f"dtype: expected {dtype_name(self.dtype)} as in {shown(self.folder)}, got {dtype_name(ring.dtype)}"
            )
        shard = self.shards[block]
        path = self.folder / shard.file
        with open_file(path) as file:
            digest = None if block in self._verified else hashlib.sha256()
            with ThreadPoolExecutor(_READERS, "read") as pool:
                self._read(_Reader(file.fileno(), path, shard, digest, pool), shard.tokens, ring)
            if digest is not None and digest.hexdigest() != shard.sha256:
                raise BadFileError(f"{_damaged(path)} another checksum")
        self._verified.add(block)
        self._read_ahead(block + 1)

    def _read(self, reader: "_Reader", n: int, ring: Ring) -> None:
        layout = _layout(self.widths, n, self.dtype)
        reader.header(_header(layout))
        own = {name: torch.empty(shape, dtype=dtype, device="cpu") for name, (dtype, shape) in layout.items()
               if name in ("norms", "row", "position")}  # fmt: skip
        place = slice(ring.n, ring.n + n)
        on_host = ring.device.type == "cpu"
        if place.stop > ring.capacity:
            raise ValueError(f"ring: expected room for {place.stop} tokens, got {ring.capacity}")
        for name, (dtype, shape) in layout.items():
            if name in own:
                reader.read(own[name])
                continue
            target = ring.activations[Site.parse(name)][place]
            read = target if on_host else torch.empty(shape, dtype=dtype, device="cpu")
            reader.read(read)
            if read is not target:
                target.copy_(read)
        reader.end()
        ring.add(own["row"], own["position"])
        for site, norms in zip(self.sites, own["norms"], strict=True):
            ring.norms[site][place] = norms.to(ring.device)

    def _read_ahead(self, block: int) -> None:
        """Have the kernel read the next shard while this one is trained on."""
        if block < self.blocks and hasattr(os, "posix_fadvise"):
            try:
                with open(self.folder / self.shards[block].file, "rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
            except OSError:
                pass  # whoever needs it will say so


# ---- the manifest


def _write_manifest(folder: Path, identity: Mapping[str, Any], shards: list[Shard]) -> None:
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "identity": dict(identity),
        "shards": [shard._asdict() for shard in shards],
    }
    write_json(folder / MANIFEST, content | {"sha256": seal(content)})


def _read_manifest(folder: Path) -> tuple[dict[str, Any], list[Shard]]:
    path = folder / MANIFEST
    manifest = read_manifest(path, FORMAT, FORMAT_VERSION)
    whole = manifest.keys() == _KEYS and manifest["sha256"] == seal(_without(manifest, "sha256"))
    if not whole or not _is_identity(manifest["identity"]) or not _are_shards(manifest["shards"]):
        raise BadFileError(
            f"{shown(path)}: expected the manifest as it was written, found it changed; delete it, and harvesting into "
            "the folder makes everything anew"
        )
    return manifest["identity"], [Shard(**shard) for shard in manifest["shards"]]


def _is_identity(identity: Any) -> bool:
    numbers = ("rows_per_block", "context")
    try:
        sites, widths = identity["sites"], identity["widths"]
        sizes = [*widths, *(identity[name] for name in numbers)]
        return (
            len({Site.parse(site) for site in sites}) == len(widths) > 0
            and all(type(size) is int and size > 0 for size in sizes)
            and identity["dtype"] in map(dtype_name, RING_DTYPES)
        )
    except (KeyError, TypeError, ValueError):
        return False


def _are_shards(shards: Any) -> bool:
    kinds = {"file": str, "tokens": int, "bytes": int, "sha256": str}
    return isinstance(shards, list) and all(
        isinstance(shard, dict)
        and {name: type(value) for name, value in shard.items()} == kinds
        and shard["file"] == _file(block)
        and shard["tokens"] >= 0
        for block, shard in enumerate(shards)
    )


def _file(block: int) -> str:
    return f"superblock-{block:06d}.safetensors"


def _without(mapping: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key != name}


def _refuse_other(folder: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    lines = differences(found, json.loads(json.dumps(expected)), "the store", "this run")
    if lines:
        raise BadFileError(f"{shown(folder)}: expected a store of the same, found {'; '.join(lines)}")


def _dtype_of(identity: Mapping[str, Any]) -> torch.dtype:
    return next(dtype for dtype in RING_DTYPES if dtype_name(dtype) == identity["dtype"])


def _size(path: Path) -> int | None:
    return os.path.getsize(path) if os.path.isfile(path) else None


def _is_whole(folder: Path, shard: Shard) -> bool:
    path = folder / shard.file
    return _size(path) == shard.bytes and sha256(path) == shard.sha256


# ---- a shard

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def _layout(widths: Mapping[Site, int], n: int, dtype: torch.dtype) -> Layout:
    """The tensors of a shard of ``n`` tokens, in order; each begins at a multiple of its itemsize."""
    first: Layout = {
        "row": (torch.int64, (n,)),
        "position": (torch.int32, (n,)),
        "norms": (torch.float32, (len(widths), n)),
    }
    return first | {str(site): (dtype, (n, width)) for site, width in widths.items()}


def _header(layout: Layout) -> bytes:
    """Of a safetensors file: the length of the JSON, 8 bytes, and the JSON, padded to a multiple of 8."""
    entries, start = {}, 0
    for name, (dtype, shape) in layout.items():
        end = start + dtype.itemsize * torch.Size(shape).numel()
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_shard(folder: Path, block: int, ring: Ring) -> Shard:
    """The superblock that ``ring``, which is on the CPU, holds."""
    n, file = ring.n, _file(block)
    own = {
        "row": ring.row[:n],
        "position": ring.position[:n],
        "norms": torch.stack([norms[:n] for norms in ring.norms.values()]),
    }
    tensors = own | {str(site): x[:n] for site, x in ring.activations.items()}
    digest, size = hashlib.sha256(), 0
    with atomic_write(folder / file) as temporary, open(temporary, "wb") as stream:
        layout = _layout({site: x.shape[1] for site, x in ring.activations.items()}, n, ring.dtype)
        for piece in (memoryview(_header(layout)), *(_bytes(tensors[name]) for name in layout)):
            for chunk in _chunks(piece):
                stream.write(chunk)
                digest.update(chunk)
                size += len(chunk)
    return Shard(file, n, size, digest.hexdigest())


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return cast(memoryview, tensor.reshape(-1).view(torch.uint8).numpy().data)


def _chunks(data: memoryview) -> list[memoryview]:
    return [data[start : start + _CHUNK_BYTES] for start in range(0, len(data), _CHUNK_BYTES)]


class _Reader:
    """Reads a shard from its beginning to its end, several chunks at a time, and hashes them in order."""

    def __init__(self, descriptor: int, path: Path, shard: Shard, digest: Any, pool: ThreadPoolExecutor):
        self._descriptor, self._path, self._digest, self._pool = descriptor, path, digest, pool
        self._position, self._expected = 0, shard.bytes
        if os.fstat(descriptor).st_size != shard.bytes:
            raise BadFileError(f"{_damaged(path)} {os.fstat(descriptor).st_size} bytes instead of {shard.bytes}")

    def header(self, expected: bytes) -> None:
        found = bytearray(len(expected))
        self._into(memoryview(found))
        if found != expected:
            raise BadFileError(f"{_damaged(self._path)} another header")

    def read(self, tensor: Tensor) -> None:
        """The next bytes, into ``tensor``."""
        self._into(_bytes(tensor))

    def end(self) -> None:
        if self._position != self._expected:
            raise BadFileError(f"{_damaged(self._path)} {self._expected} bytes instead of {self._position}")

    def _into(self, data: memoryview) -> None:
        starts = range(self._position, self._position + len(data), _CHUNK_BYTES)
        chunks = _chunks(data)
        for chunk, _ in zip(chunks, self._pool.map(self._pread, chunks, starts), strict=True):
            if self._digest is not None:
                self._digest.update(chunk)
        self._position += len(data)

    def _pread(self, chunk: memoryview, position: int) -> None:
        done = 0
        while done < len(chunk):
            try:
                count = os.preadv(self._descriptor, [chunk[done:]], position + done)
            except OSError as error:
                raise EnvironmentProblemError(f"{shown(self._path)}: cannot be read: {error.strerror}") from error
            if count == 0:
                raise BadFileError(f"{_damaged(self._path)} fewer bytes")
            done += count


def _damaged(path: Path) -> str:
    return (
        f"{shown(path)}: expected the shard as it was written (harvesting into its folder again makes a damaged one "
        "anew), found"
    )
