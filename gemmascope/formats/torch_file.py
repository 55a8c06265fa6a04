"""Tensors out of a state dict that `torch.save` wrote, without unpickling anything.

Such a file is a zip of raw storages and of a pickle that says which tensors lie in them. The pickle is a program; only
the few instructions that a dict of tensors consists of are followed here, by hand. Nothing is imported or called. As in
`arrays`, headers are checked before data is read, and what is allocated is bounded by the size of the file.
"""

import contextlib
import io
import os
import pickletools
import zipfile
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import BadFileError
from .arrays import (
    MAX_ARRAYS,
    MAX_DIMENSIONS,
    Check,
    Header,
    allocate,
    damage_is_a_bad_file,
    fill,
    printable,
    small_reads,
)
from .files import as_path, open_file, shown

MAX_PICKLE_BYTES = 1 << 16
STORAGES = {
    "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16, "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64, "IntStorage": torch.int32, "LongStorage": torch.int64,
}  # fmt: skip
ORDERED_DICT = "collections OrderedDict"
REBUILD_TENSOR, REBUILD_PARAMETER = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"
NAMES = {ORDERED_DICT, REBUILD_TENSOR, REBUILD_PARAMETER} | {f"torch {name}" for name in STORAGES}


class _Name(NamedTuple):
    """A class or function that the pickle names: never looked up."""

    name: str


class _Storage(NamedTuple):
    key: str
    dtype: torch.dtype
    numel: int


class _Stored(NamedTuple):
    """A tensor: a view of a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Refusal(Exception):  # noqa: N818 no error, a reason
    """What the pickle holds instead of a dict of tensors."""


def read_torch_file(
    path: str | os.PathLike, check: Check | None = None, file: io.BufferedReader | None = None
) -> dict[str, Tensor]:
    """The tensors of a state dict, on the CPU, with the strides that they were saved with.

    float16, bfloat16, float32, float64, int32 or int64, at most 64 of them. check, file: as for `arrays.read_npz`.
    Raises BadFileError for a file that is no zip of `torch.save` (its older format is none), is damaged (each member
    has a CRC-32), is compressed, or whose pickle holds anything but a dict of such tensors.
    """
    name = shown(as_path("path", path))
    with (
        contextlib.nullcontext(file) if file else open_file(path) as file,
        small_reads(file) as small,
        damage_is_a_bad_file(name, "torch.save"),
        zipfile.ZipFile(small) as archive,
    ):
        members = _members(archive, name, os.fstat(file.fileno()).st_size)
        with archive.open(_member(members, "data.pkl", name, MAX_PICKLE_BYTES)) as pickle:
            program = pickle.read()
        try:
            tensors = _Program().run(program)
        except _Refusal as refusal:
            raise BadFileError(f"{name}: expected a dict of tensors and nothing else, found {refusal}") from refusal
        infos = {tensor.storage: _record(members, tensor.storage, name) for tensor in tensors.values()}
        if check is not None:
            check({key: Header(tensor.storage.dtype, tensor.shape) for key, tensor in tensors.items()})
        storages = {}
        for storage, info in infos.items():
            where = f"{name}: {printable(info.filename)}"
            storages[storage] = allocate(Header(storage.dtype, (storage.numel,)), where)
            with archive.open(info) as record:
                fill(storages[storage], record, where)
        return {
            key: torch.as_strided(storages[tensor.storage], tensor.shape, tensor.stride, tensor.offset)
            for key, tensor in tensors.items()
        }


def _members(archive: zipfile.ZipFile, name: str, file_size: int) -> dict[str, zipfile.ZipInfo]:
    """The members by their path below the one folder that they all lie in."""
    infos = archive.infolist()
    if len(infos) > MAX_ARRAYS + 16:
        raise BadFileError(f"{name}: expected at most {MAX_ARRAYS + 16} members, found {len(infos)}")
    members = {}
    for info in infos:
        folder, _, inner = info.filename.partition("/")
        if inner in members or folder != infos[0].filename.partition("/")[0]:
            raise BadFileError(f"{name}: {printable(info.filename)}: expected members of one folder, each once")
        if info.flag_bits & 1 or info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise BadFileError(f"{name}: {printable(inner)}: expected stored data, found another method")
        members[inner] = info
    total = sum(info.file_size for info in infos)
    if total > file_size:
        raise BadFileError(f"{name}: expected at most {file_size} bytes, that of the file, found {total} announced")
    if "byteorder" in members:
        with archive.open(_member(members, "byteorder", name, 16)) as member:
            order = member.read()
        if order != b"little":
            raise BadFileError(f"{name}: byteorder: expected 'little', found {order!r}")
    return members


def _member(members: dict[str, zipfile.ZipInfo], key: str, name: str, most: int) -> zipfile.ZipInfo:
    if key not in members:
        raise BadFileError(f"{name}: expected the members of torch.save, found no {key}")
    if members[key].file_size > most:
        raise BadFileError(f"{name}: {key}: expected at most {most} bytes, found {members[key].file_size}")
    return members[key]


def _record(members: dict[str, zipfile.ZipInfo], storage: _Storage, name: str) -> zipfile.ZipInfo:
    info = members.get(f"data/{storage.key}")
    if info is None:
        raise BadFileError(f"{name}: expected the data {printable(storage.key)} that its pickle names, found none")
    if info.file_size != storage.numel * storage.dtype.itemsize:
        raise BadFileError(
            f"{name}: data/{storage.key:.40}: expected {storage.numel * storage.dtype.itemsize} bytes for"
            f" {storage.numel} numbers, found {info.file_size}"
        )
    return info


class _Mark:
    pass


class _Program:
    """The stack machine of pickle, as far as a dict of tensors needs it. What it refuses raises _Refusal."""

    def __init__(self):
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, program: bytes) -> dict[str, _Stored]:
        try:
            for opcode, argument, _ in pickletools.genops(program):
                if opcode.name == "STOP":
                    return self._result()
                self._follow(opcode.name, argument)
        except _Refusal:
            raise
        except (ValueError, IndexError, KeyError, TypeError) as error:  # TypeError: what cannot be unpacked or hashed
            raise _Refusal("damage of its pickle") from error
        raise _Refusal("a pickle without an end")

    def _result(self) -> dict[str, _Stored]:
        value = self._pop()
        if type(value) is not dict:
            raise _Refusal(f"a {_kind(value)}")
        if len(value) > MAX_ARRAYS:
            raise _Refusal(f"{len(value)} entries, over {MAX_ARRAYS}")
        for key, tensor in value.items():
            if type(tensor) is not _Stored:
                raise _Refusal(f"a {_kind(tensor)} as {printable(key)}")
        return value

    def _pop(self) -> Any:
        value = self.stack.pop()
        if type(value) is _Mark:
            raise ValueError
        return value

    def _pop_to_mark(self) -> list[Any]:
        start = max(at for at, value in enumerate(self.stack) if type(value) is _Mark)
        values = self.stack[start + 1 :]
        del self.stack[start:]
        return values

    def _follow(self, name: str, argument: Any) -> None:
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.stack.append(_Mark())
            case "EMPTY_DICT":
                self.stack.append({})
            case "EMPTY_TUPLE":
                self.stack.append(())
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                self.stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1":
                self.stack.append(argument)
            case "TUPLE":
                self.stack.append(tuple(self._pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                values = [self._pop() for _ in range(int(name[-1]))]
                self.stack.append(tuple(reversed(values)))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[argument])
            case "GLOBAL":
                self.stack.append(_named(argument))
            case "STACK_GLOBAL":
                attribute, module = self._pop(), self._pop()
                self.stack.append(_named(f"{_text(module)} {_text(attribute)}"))
            case "BINPERSID":
                self.stack.append(_storage(self._pop()))
            case "REDUCE":
                arguments, called = self._pop(), self._pop()
                self.stack.append(_rebuilt(called, arguments))
            case "SETITEM":
                value, key = self._pop(), self._pop()
                self._set([key, value])
            case "SETITEMS":
                self._set(self._pop_to_mark())
            case "BUILD":  # the _metadata of a state dict
                state, target = self._pop(), self.stack[-1]
                if type(state) is not dict or type(target) is not dict:
                    raise _Refusal(f"a {_kind(target)} with a state")
            case _:
                raise _Refusal(f"the instruction {name}")

    def _set(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(pairs) % 2:
            raise ValueError
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if _text(key) in target:
                raise _Refusal(f"the key {printable(key)} twice")
            target[key] = value


def _named(name: str) -> _Name:
    if name not in NAMES:
        raise _Refusal(f"the object {name.replace(' ', '.')[:80]!r}")
    return _Name(name)


def _storage(value: Any) -> _Storage:
    kind, storage, key, _, numel = value  # the device is where the tensor was saved from
    if kind != "storage" or type(storage) is not _Name or not storage.name.startswith("torch "):
        raise ValueError
    return _Storage(_text(key), STORAGES[storage.name.removeprefix("torch ")], _count(numel))


def _rebuilt(called: Any, arguments: Any) -> Any:
    if type(called) is not _Name or type(arguments) is not tuple:
        raise ValueError
    if called.name == ORDERED_DICT and arguments == ():
        return {}
    if called.name == REBUILD_PARAMETER and type(arguments[0]) is _Stored:
        return arguments[0]
    if called.name != REBUILD_TENSOR:
        raise _Refusal(f"a call of {called.name.replace(' ', '.')}")
    storage, offset, shape, stride, *_ = arguments
    if type(storage) is not _Storage or type(shape) is not tuple or type(stride) is not tuple:
        raise ValueError
    return _view(storage, _count(offset), tuple(map(_count, shape)), tuple(map(_count, stride)))


def _view(storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> _Stored:
    """Checked: within the storage, and no larger than it."""
    if len(shape) != len(stride) or len(shape) > MAX_DIMENSIONS:
        raise ValueError
    numel = 1
    for size in shape:
        numel *= size
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if numel > storage.numel or (numel and last >= storage.numel):
        raise _Refusal(f"a tensor of shape {list(shape)!s:.60} in a storage of {storage.numel} numbers")
    return _Stored(storage, offset, shape, stride)


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError
    return value


def _count(value: Any) -> int:
    """A size or an offset: beyond 2⁴⁸ there is no such memory."""
    if type(value) is not int or not 0 <= value < 1 << 48:
        raise ValueError
    return value


def _kind(value: Any) -> str:
    """What it is in the pickle, in a word; never its content, which may be without end."""
    return {_Stored: "tensor", _Storage: "storage", _Name: "class or function"}.get(type(value), type(value).__name__)
