"""Tensors out of .npz and .safetensors files that may be damaged or hostile.

Every header is read and checked before any array is allocated, and what is allocated is bounded by the size of the
file, so that a refusal takes little time and memory. Nothing is unpickled, mapped or guessed. Arrays come out with the
dtype and shape that the file documents, in memory of their own.
"""

import contextlib
import io
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..checks import check_int
from ..errors import BadFileError, EnvironmentProblemError
from .files import as_path, open_file, parse_json, shown

MAX_ARRAYS = 64
MAX_HEADER_BYTES = 1 << 20
MAX_NPY_HEADER_BYTES = 4096
MAX_DIMENSIONS = 8
# Weights barely compress, but for rows of zeros (a few of Gemma Scope's files hold a sixth of their arrays' bytes) and
# small arrays of equal values. Beyond both bounds a .npz is a decompression bomb.
MAX_INFLATION = 20
SMALL_BYTES = 64 << 20
CHUNK_BYTES = 1 << 20

NPY_DTYPES = {"f2": torch.float16, "f4": torch.float32, "f8": torch.float64}
SAFETENSORS_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
# What files of our own may hold besides.
STORED_DTYPES = SAFETENSORS_DTYPES | {
    "BOOL": torch.bool, "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
# What numpy writes, and nothing else: no expression is ever evaluated.
NPY_HEADER = re.compile(
    r"\{'descr': *('[^']{1,16}'), *'fortran_order': *(True|False), "
    r"*'shape': *\(((?:\d{1,15}, *)*(?:\d{1,15})?)\),? *\}\s*"
)


class Header(NamedTuple):
    """What a file says about one array, before any of its data is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


Check = Callable[[dict[str, Header]], None]


def read_npz(
    path: str | os.PathLike,
    check: Check | None = None,
    file: io.BufferedReader | None = None,
    *,
    max_arrays: int = MAX_ARRAYS,
) -> dict[str, Tensor]:
    """The arrays of a .npz file, on the CPU: float16, float32 or float64, either byte order, C or Fortran order.

    check: called with the headers before any data is read; raises to refuse them. file: that of ``path``, already open
    and at its beginning. Raises BadFileError for a file that is damaged (each member has a CRC-32), holds anything but
    such arrays or more than ``max_arrays``, repeats a name or would inflate too far.
    """
    name = shown(as_path("path", path))
    check_int("max_arrays", max_arrays, 0)
    with (
        contextlib.nullcontext(file) if file else open_file(path) as file,
        small_reads(file) as small,
        damage_is_a_bad_file(name, ".npz"),
        zipfile.ZipFile(small) as archive,
    ):
        members = _npz_members(archive, name, os.fstat(file.fileno()).st_size, max_arrays)
        parsed = {key: _read_npy_header(archive, info, f"{name}: {printable(key)}") for key, info in members.items()}
        if check is not None:
            check({key: header for key, (header, *_) in parsed.items()})
        return {key: _read_npy(archive, members[key], *parsed[key], f"{name}: {printable(key)}") for key in members}


def read_safetensors(
    path: str | os.PathLike,
    check: Check | None = None,
    file: io.BufferedReader | None = None,
    *,
    dtypes: Mapping[str, torch.dtype] = SAFETENSORS_DTYPES,
    max_arrays: int = MAX_ARRAYS,
) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, on the CPU: float16, bfloat16, float32 or float64.

    check, file: as for `read_npz`. Raises BadFileError for a header over 1 MiB, over 64 tensors, duplicate keys, and
    data that the header does not account for byte by byte. The format has no checksum: flipped bits in the data go
    unseen. dtypes, max_arrays: other limits, for a file that is known by its checksum.
    """
    name = shown(as_path("path", path))
    with contextlib.nullcontext(file) if file else open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise BadFileError(
                f"{name}: expected a safetensors header of {length} bytes, found {max(size - 8, 0)} bytes"
            )
        if length > MAX_HEADER_BYTES:
            raise BadFileError(f"{name}: expected a header of at most {MAX_HEADER_BYTES} bytes, found {length}")
        entries = parse_json(file.read(length), f"{name}: header")
        headers, starts = _safetensors_headers(entries, name, size - 8 - length, dtypes, max_arrays)
        if check is not None:
            check(headers)
        tensors = {}
        for key, header in headers.items():
            where = f"{name}: {printable(key)}"
            file.seek(8 + length + starts[key])
            tensors[key] = allocate(header, where)
            fill(tensors[key], file, where)
        return tensors


def printable(key: str) -> str:
    """A key from a foreign file, safe to show in one line."""
    return key if key.isidentifier() and key.isprintable() and len(key) <= 40 else repr(key[:40])


@contextlib.contextmanager
def damage_is_a_bad_file(name: str, kind: str) -> Iterator[None]:
    """What zip files raise in this block becomes a BadFileError: ``name`` should be a ``kind`` file."""
    try:
        yield
    except (BadFileError, EnvironmentProblemError):
        raise
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, RuntimeError, ValueError) as error:
        # RuntimeError has NotImplementedError and zipfile's plain ones under it, ValueError the Unicode errors.
        raise BadFileError(
            f"{name}: expected a {kind} file, found damage: {str(error) or type(error).__name__!r}"
        ) from error


class _SmallReads(io.BufferedReader):
    """Refuses to read a zip directory of gigabytes, which `zipfile` would load whole."""

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(MAX_HEADER_BYTES + 1 if size is None or size < 0 else min(size, MAX_HEADER_BYTES + 1))
        if len(data) > MAX_HEADER_BYTES:
            raise zipfile.BadZipFile(f"a directory over {MAX_HEADER_BYTES} bytes")
        return data


@contextlib.contextmanager
def small_reads(file: io.BufferedReader) -> Iterator[_SmallReads]:
    """``file`` for `zipfile`, which then cannot be made to read much at once."""
    small = _SmallReads(file.raw)
    try:
        yield small
    finally:
        small.detach()  # closing it would close the file of the caller


def _npz_members(archive: zipfile.ZipFile, name: str, file_size: int, max_arrays: int) -> dict[str, zipfile.ZipInfo]:
    infos = archive.infolist()
    if len(infos) > max_arrays:
        raise BadFileError(f"{name}: expected at most {max_arrays} arrays, found {len(infos)}")
    members = {}
    for info in infos:
        key = info.filename.removesuffix(".npy")
        if key == info.filename:
            raise BadFileError(f"{name}: expected members ending in .npy, found {info.filename[:40]!r}")
        if key in members:
            raise BadFileError(f"{name}: {printable(key)}: expected one array of that name, found two")
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise BadFileError(f"{name}: {printable(key)}: expected stored or deflated data, found another method")
        members[key] = info
    total, bound = sum(info.file_size for info in infos), max(SMALL_BYTES, MAX_INFLATION * file_size)
    if total > bound:
        raise BadFileError(f"{name}: expected at most {bound} bytes in a file of {file_size}, found {total} announced")
    return members


def _read_npy_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo, where: str) -> tuple[Header, str, bool, int]:
    """The header, the byte order, whether the data is in Fortran order, and where the data starts."""
    with archive.open(info) as member:
        start = member.read(12)
        if len(start) < 12 or start[:6] != b"\x93NUMPY" or start[6] not in (1, 2, 3):
            raise BadFileError(f"{where}: expected a .npy array, found {start[:8]!r}")
        begin = 10 if start[6] == 1 else 12
        length = int.from_bytes(start[8:begin], "little")
        if not 16 <= length <= MAX_NPY_HEADER_BYTES:
            raise BadFileError(f"{where}: expected a header of 16 to {MAX_NPY_HEADER_BYTES} bytes, found {length}")
        text = (start[begin:] + member.read(length - (12 - begin))).decode("latin-1")
    match = NPY_HEADER.fullmatch(text)
    if match is None:
        raise BadFileError(f"{where}: expected the header of a plain array, found {text[:60]!r}")
    descr, fortran_order, sizes = match[1].strip("'"), match[2] == "True", re.findall(r"\d+", match[3])
    if descr[0] not in "<>" or descr[1:] not in NPY_DTYPES:
        kind = "pickled objects" if descr.startswith("|O") else f"dtype {descr!r}"
        raise BadFileError(f"{where}: expected float16, float32 or float64, found {kind}")
    header = Header(NPY_DTYPES[descr[1:]], tuple(map(int, sizes)))
    _check_header(header, info.file_size - begin - length, where)
    return header, descr[0], fortran_order, begin + length


def _check_header(header: Header, nbytes: int, where: str) -> None:
    if len(header.shape) > MAX_DIMENSIONS:
        raise BadFileError(f"{where}: expected at most {MAX_DIMENSIONS} dimensions, found {len(header.shape)}")
    if header.nbytes != nbytes:
        raise BadFileError(
            f"{where}: expected {header.nbytes} bytes of data for shape {list(header.shape)}, found {nbytes}"
        )


def _read_npy(
    archive: zipfile.ZipFile,
    info: zipfile.ZipInfo,
    header: Header,
    byte_order: str,
    fortran_order: bool,
    start: int,
    where: str,
) -> Tensor:
    if fortran_order:
        header = header._replace(shape=header.shape[::-1])
    tensor = allocate(header, where)
    with archive.open(info) as member:
        member.read(start)
        fill(tensor, member, where)
    if byte_order == ">":
        _bytes_of(tensor).view(f"u{header.dtype.itemsize}").byteswap(inplace=True)
    return tensor.permute(*reversed(range(tensor.ndim))) if fortran_order else tensor


def _safetensors_headers(
    entries, name: str, payload: int, dtypes: Mapping[str, torch.dtype], max_arrays: int
) -> tuple[dict[str, Header], dict[str, int]]:
    if not isinstance(entries, dict):
        raise BadFileError(f"{name}: header: expected an object, found {type(entries).__name__}")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadFileError(f"{name}: header: __metadata__: expected strings, found something else")
    if len(entries) > max_arrays:
        raise BadFileError(f"{name}: expected at most {max_arrays} tensors, found {len(entries)}")
    headers, starts, ends = {}, {}, {}
    for key, entry in entries.items():
        where = f"{name}: {printable(key)}"
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise BadFileError(f"{where}: expected dtype, shape and data_offsets, found {str(entry)[:60]!r}")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in dtypes:
            raise BadFileError(f"{where}: expected dtype {', '.join(dtypes)}, found {str(dtype)[:20]!r}")
        if not (_is_sizes(shape) and _is_sizes(offsets) and len(offsets) == 2):
            raise BadFileError(f"{where}: expected sizes and two offsets, found {shape!s:.40} and {offsets!s:.40}")
        headers[key] = Header(dtypes[dtype], tuple(shape))
        starts[key], ends[key] = offsets
        _check_header(headers[key], ends[key] - starts[key], where)
    position = 0
    for key in sorted(headers, key=lambda key: (starts[key], ends[key])):
        if starts[key] != position:
            raise BadFileError(f"{name}: {printable(key)}: expected data at byte {position}, found it at {starts[key]}")
        position = ends[key]
    if position != payload:
        raise BadFileError(f"{name}: expected {position} bytes of data, found {payload}")
    return headers, starts


def _is_sizes(value) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def allocate(header: Header, where: str) -> Tensor:
    """A new tensor. Raises EnvironmentProblemError when there is no memory for it."""
    try:
        return torch.empty(header.shape, dtype=header.dtype, device="cpu")
    except RuntimeError as error:
        raise EnvironmentProblemError(f"{where}: not enough memory for {header.nbytes} bytes") from error


def _bytes_of(tensor: Tensor) -> np.ndarray:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def fill(tensor: Tensor, file, where: str) -> None:
    """Fill a contiguous tensor with the next bytes of ``file``. Raises BadFileError when there are too few."""
    data = _bytes_of(tensor).data
    position = 0
    while position < len(data):
        count = file.readinto(data[position : position + CHUNK_BYTES])
        if not count:
            raise BadFileError(f"{where}: expected {len(data)} bytes of data, found {position}")
        position += count
