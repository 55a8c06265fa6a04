"""Checkpoints of a run: tensors and JSON in folders that are there whole and verified, or not at all.

    checkpoints = Checkpoints("runs/a/checkpoints", identity={"config": config, "model": model})
    found = checkpoints.latest()  # the newest that verifies, or None
    for step in range(found.step if found else 0, steps):
        ...
        checkpoints.save(step, {"sae": tensors}, {"cursor": [3, 17]})  # returns once the tensors are copied
    checkpoints.close()

A checkpoint is written in a temporary folder beside its place: one .safetensors a part, then manifest.json, which names
each of them with its size and SHA-256 and is sealed by a SHA-256 of its own. All is flushed to the disk before the
folder is renamed to ``step-000000100``, so that a process killed at any moment, or a full disk, leaves the checkpoints
before it as they were. Nothing is pickled.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import check_int, check_type, dtype_name
from ..errors import BadFileError, EnvironmentProblemError
from ..formats.arrays import MAX_DIMENSIONS, MAX_HEADER_BYTES, STORED_DTYPES, read_safetensors
from ..formats.differences import differences
from ..formats.files import (
    MAX_JSON_BYTES,
    as_path,
    flush_folder,
    json_text,
    open_file,
    parse_json,
    remove_stale_temporaries,
    sha256_of,
    shown,
    staging,
)

SCHEMA = 1
MANIFEST = "manifest.json"
MANIFEST_KEYS = {"schema", "step", "identity", "facts", "parts", "sha256"}
MAX_STEP = 10**15
STEP = re.compile(r"step-(\d{9,16})")
BAD = re.compile(r"\.bad-step-\d{9,16}-[0-9a-f]{16}")
DELETED = re.compile(r"\.del-step-\d{9,16}(-[0-9a-f]{16}){1,2}")
PART_FILE = re.compile(r"\w[\w.-]{0,120}\.safetensors", re.ASCII)
SHA256 = re.compile(r"[0-9a-f]{64}")
SEAL, SEAL_END = ',\n  "sha256": "', '"\n}\n'

NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}
WRITE_BYTES = 1 << 20
# Pinned memory comes in powers of two, which would waste up to half of it for a large tensor in one piece.
PINNED_BYTES = 64 << 20
READERS = 8


class _NewerSchemaError(BadFileError):
    """Not damage: another version wrote it."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint that verified when `Checkpoints.latest` read it.

    step: of the run. facts: what was saved besides tensors, as JSON gives it back (lists for tuples). identity: of the
    run that wrote it, for `differences`. path: its folder. files: {part: {"file", "bytes", "sha256"}}.
    """

    step: int
    facts: dict[str, Any]
    identity: dict[str, Any]
    path: Path
    files: dict[str, dict[str, Any]]

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors of a part by name, on the CPU in memory of their own, with the dtypes and shapes that were saved.

        Verified once more. Raises ValueError for a part that it does not have, BadFileError when its file changed or
        vanished, EnvironmentProblemError when it cannot be read or held in memory.
        """
        if name not in self.files:
            raise ValueError(f"name: expected one of the parts {sorted(self.files)}, got {name!r}")
        record = self.files[name]
        path = self.path / record["file"]
        with _environment(path, "cannot be read"), open_file(path) as file:
            _check_file(file, path, record)
            return read_safetensors(path, file=file, dtypes=STORED_DTYPES, max_arrays=MAX_HEADER_BYTES)


class Checkpoints:
    """The checkpoints of a run in ``folder``, made if missing.

    keep: how many that verified are kept, at least 2; older ones are removed once a new one is on the disk, so that
    there may be ``keep + 1`` for a while. identity: values of JSON that a run must share with a checkpoint to go on
    from it. It is stored and given back; comparing is the caller's (`formats.differences`).

    For one process at a time (`runs.Run` sees to that); a second one would get errors, not mixed checkpoints. What
    killed processes left half written or half removed goes when this object is made. Other files in the folder are left
    alone. Raises EnvironmentProblemError when the folder cannot be read or written.
    """

    def __init__(self, folder: str | os.PathLike, *, keep: int = 2, identity: Mapping[str, Any]):
        self.folder = as_path("folder", folder)
        check_int("keep", keep, 2)
        self.keep = keep
        self.identity = _json("identity", identity)
        self.seconds = 0.0
        self._verified: set[int] = set()
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None
        self._warnings: list[str] = []
        with staging(self.folder / MANIFEST):  # makes the folder, and shows that it can be written
            pass
        flush_folder(self.folder.parent)
        remove_stale_temporaries(self.folder)
        self._sweep()
        self._tell()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    # ---- saving

    @staticmethod
    def bytes_of(parts: Mapping[str, Mapping[str, Tensor]]) -> int:
        """How many bytes a checkpoint of ``parts`` takes on the disk, but for its manifest, and in host memory while it
        is being written. Tensors on the meta device count too. Raises as `Checkpoints.save` does for ``parts``."""
        return sum(len(header) + sum(t.nbytes for t in tensors) for header, tensors in _laid_out(parts).values())

    def save(
        self,
        step: int,
        parts: Mapping[str, Mapping[str, Tensor]],
        facts: Mapping[str, Any],
        *,
        wait: bool = False,
    ) -> None:
        """Save ``parts`` {part: {name: tensor}} and ``facts``, values of JSON, as the checkpoint of ``step``.

        Returns once the tensors are copied to host memory; a thread writes. wait: returns when it is on the disk. One
        save is in flight: another waits for it first. A step that is there and verifies is not saved again.

        Tensors have any strides, any device, may share memory and be empty, and are bool, integers or floats. CUDA
        tensors are copied in the order of the current stream.

        Raises ValueError or TypeError for what cannot be stored (NaN in ``facts``, say); EnvironmentProblemError when
        the earlier save failed (nothing of this one is done then: call again), with ``wait`` when this one did, when
        memory does not suffice for the copies and when the folder holds a later checkpoint or another run's of that
        step. What a failed save wrote is removed, the checkpoints before it stay. That old ones cannot be removed is a
        RuntimeWarning.
        """
        started = time.perf_counter()
        try:
            check_int("step", step, 0, MAX_STEP)
            check_type("wait", wait, bool)
            laid_out = _laid_out(parts)
            manifest = self._manifest(step, laid_out, facts)
            self._finish()
            if self._has(step):
                return
            arguments = (step, manifest, _copies(step, laid_out))
            self._writer = threading.Thread(target=self._work, args=arguments, name=f"checkpoint of step {step}")
            del arguments
            self._writer.start()
            if wait:
                self._finish()
        finally:
            self.seconds += time.perf_counter() - started

    def poll(self) -> None:
        """Raise what the save in flight failed with, if it has; does not wait."""
        if self._writer is None or not self._writer.is_alive():
            self._finish()

    def close(self) -> None:
        """Wait for the save in flight and raise what it failed with; a second call does nothing."""
        started = time.perf_counter()
        try:
            self._finish()
        finally:
            self.seconds += time.perf_counter() - started

    def _finish(self) -> None:
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        self._tell()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _tell(self) -> None:
        messages, self._warnings = self._warnings, []
        for message in messages:
            warnings.warn(message, RuntimeWarning, stacklevel=4)

    def _manifest(self, step: int, laid_out: "_LaidOut", facts: Mapping[str, Any]) -> dict[str, Any]:
        """The manifest but for the checksums, which have their length."""
        records = {}
        for number, (part, (header, tensors)) in enumerate(laid_out.items()):
            file = f"{number:04d}-{re.sub('[^A-Za-z0-9_.-]+', '_', part)[:100]}.safetensors"
            records[part] = {
                "file": file,
                "bytes": len(header) + sum(tensor.nbytes for tensor in tensors),
                "sha256": "0" * 64,
            }
        manifest = {
            "schema": SCHEMA,
            "step": step,
            "identity": self.identity,
            "facts": _json("facts", facts),
            "parts": records,
        }
        if len(_sealed(manifest)) > MAX_JSON_BYTES:
            raise ValueError(f"facts: expected a manifest of at most {MAX_JSON_BYTES} bytes, got more")
        return manifest

    def _has(self, step: int) -> bool:
        """Whether the checkpoint of ``step`` is there and verifies; what does not is set aside."""
        path = self._path(step)
        later = self._steps()[:1]
        if later > [step]:  # it would be taken for the newest
            raise EnvironmentProblemError(
                f"{shown(self.folder)}: expected no checkpoint after step {step}, found step {later[0]}; "
                "go on from it, or clear the folder"
            )
        if not os.path.lexists(path):
            self._verified.discard(step)
            return False
        if step in self._verified:
            return True
        try:
            other = differences(_verify(path).identity, self.identity, "the checkpoint", "this run")
        except _NewerSchemaError:
            raise
        except BadFileError as error:
            self._set_aside(path, error)
            self._tell()
            return False
        if other:
            raise EnvironmentProblemError(
                f"{shown(path)}: expected no checkpoint of another run, found one: {other[0]}"
            )
        self._verified.add(step)
        return True

    # ---- the writer's thread

    def _work(self, step: int, manifest: dict[str, Any], copies: dict[str, deque]) -> None:
        path = self._path(step)
        try:
            self._write(path, manifest, copies)
            self._verified.add(step)
            self._retain()
        except BaseException as error:
            if isinstance(error, MemoryError):
                error = EnvironmentProblemError(f"{shown(path)}: cannot be written: not enough memory")
            _forget_locals(error)
            self._error = error
        finally:
            copies.clear()  # or the thread, or an error, would keep them

    def _write(self, path: Path, manifest: dict[str, Any], copies: dict[str, deque]) -> None:
        remove_stale_temporaries(self.folder)  # of a save that failed and could not remove its own
        with staging(path) as stage:
            folder = stage / path.name
            folder.mkdir()
            for part, record in manifest["parts"].items():
                record["sha256"] = _write_file(folder / record["file"], copies[part])
            _write_file(folder / MANIFEST, deque([_sealed(manifest)]))
            flush_folder(folder)
            os.rename(folder, path)
            flush_folder(self.folder)

    def _retain(self) -> None:
        """Remove what is older than ``keep`` verified ones. What fails here is a warning: the checkpoint is saved."""
        kept = 0
        try:
            for step in self._steps():
                if kept < self.keep:
                    kept += self._is_good(step)
                else:
                    self._remove(self._path(step))
            self._sweep()
        except (OSError, EnvironmentProblemError) as error:
            reason = getattr(error, "strerror", None) or error
            self._warnings.append(f"{shown(self.folder)}: old checkpoints cannot be removed: {reason}")

    def _is_good(self, step: int) -> bool:
        if step in self._verified:
            return True
        try:
            _verify(self._path(step))
        except _NewerSchemaError:
            return False
        except BadFileError as error:
            self._set_aside(self._path(step), error)
            return False
        self._verified.add(step)
        return True

    # ---- reading

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint, by its step, whose manifest and files all verify; None when there is none.

        One that does not is renamed to ``.bad-…``, kept, and named with the reason in a RuntimeWarning; the next older
        is tried. Raises BadFileError when there are only such, now or from an earlier call, and for one that a newer
        version wrote; EnvironmentProblemError when one cannot be read. Waits for the save in flight and raises what it
        failed with.
        """
        self._finish()
        for step in self._steps():
            path = self._path(step)
            try:
                checkpoint = _verify(path)
            except _NewerSchemaError:
                raise
            except BadFileError as error:
                self._set_aside(path, error)
                self._tell()
            else:
                self._verified.add(step)
                return checkpoint
        if bad := ", ".join(path.name for path in self._bad()):
            raise BadFileError(
                f"{shown(self.folder)}: expected a checkpoint that verifies, found only damaged ones, {bad}; "
                "delete them to start from nothing"
            )
        return None

    def clear(self) -> None:
        """Remove every checkpoint, the damaged ones too: for a run that starts afresh.

        Raises EnvironmentProblemError when one cannot be removed. Waits for the save in flight.
        """
        with contextlib.suppress(EnvironmentProblemError):
            self._finish()
        with _environment(self.folder, "cannot be removed"):
            for path in [*map(self._path, self._steps()), *self._bad()]:
                self._remove(path)
        self._verified.clear()
        self._sweep()
        self._tell()

    # ---- the folder

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}"

    def _names(self) -> list[str]:
        with _environment(self.folder, "cannot be read"):
            return sorted(os.listdir(self.folder), reverse=True)

    def _steps(self) -> list[int]:
        """Newest first. By number alone: clocks jump."""
        steps = [int(match[1]) for match in map(STEP.fullmatch, self._names()) if match]
        return sorted({step for step in steps if os.path.lexists(self._path(step))}, reverse=True)

    def _bad(self) -> list[Path]:
        return [self.folder / name for name in self._names() if BAD.fullmatch(name)]

    def _set_aside(self, path: Path, error: BadFileError) -> None:
        bad = self.folder / f".bad-{path.name}-{secrets.token_hex(8)}"
        with _environment(path, "is damaged and cannot be renamed"), contextlib.suppress(FileNotFoundError):
            os.rename(path, bad)
            flush_folder(self.folder)
            self._warnings.append(f"{error}; the checkpoint is kept as {bad.name} and not used")

    def _remove(self, path: Path) -> None:
        """Rename it, so that no half of it ever counts; `_sweep` does the rest."""
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            os.rename(path, self.folder / f".del-{path.name.removeprefix('.bad-')}-{secrets.token_hex(8)}")
            flush_folder(self.folder)

    def _sweep(self) -> None:
        for name in self._names():
            if DELETED.fullmatch(name):
                try:
                    _delete(self.folder / name)
                except OSError as error:
                    self._warnings.append(f"{shown(self.folder / name)}: cannot be removed: {error.strerror}")


# ---- what is written

# {part: (header of its file, its tensors in the order of the file)}
_LaidOut = dict[str, tuple[bytes, list[Tensor]]]


def _laid_out(parts: Mapping[str, Mapping[str, Tensor]]) -> _LaidOut:
    """Raises TypeError and ValueError naming what cannot be stored."""
    check_type("parts", parts, Mapping)
    found = {}
    for part, tensors in parts.items():
        check_type("parts: name", part, str)
        check_type(f"parts: {part}", tensors, Mapping)
        for name, tensor in tensors.items():
            _check_stored(f"parts: {part}/{name}", name, tensor)
        order = sorted(tensors, key=lambda name: -tensors[name].itemsize)  # so that each is aligned
        entries, end = {}, 0
        for name in order:
            start, end = end, end + tensors[name].nbytes
            entries[name] = {
                "dtype": NAMES[tensors[name].dtype],
                "shape": list(tensors[name].shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        if len(text) > MAX_HEADER_BYTES:
            raise ValueError(
                f"parts: {part}: expected fewer tensors or shorter names, got a header of {len(text)} bytes"
            )
        found[part] = (len(text).to_bytes(8, "little") + text, [tensors[name] for name in order])
    return found


def _check_stored(where: str, name: Any, tensor: Any) -> None:
    check_type(f"{where}: name", name, str)
    if name == "__metadata__":
        raise ValueError(f"{where}: expected another name, which the format does not use itself")
    check_type(where, tensor, Tensor)
    if tensor.dtype not in NAMES:
        raise TypeError(f"{where}: expected bool, integers or floats, got {dtype_name(tensor.dtype)}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{where}: expected a dense tensor, got {tensor.layout}")
    if tensor.ndim > MAX_DIMENSIONS:
        raise ValueError(f"{where}: expected at most {MAX_DIMENSIONS} dimensions, got {tensor.ndim}")


def _copies(step: int, laid_out: _LaidOut) -> dict[str, deque]:
    """Of each part the bytes of its file in order: the header, then copies of the tensors, which share nothing."""
    devices: set[torch.device] = set()
    copies = {}
    try:
        for part, (header, tensors) in laid_out.items():
            copies[part] = deque([header])
            for tensor in tensors:
                copies[part] += _copied(tensor.detach())
                devices.add(tensor.device)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
    except (RuntimeError, MemoryError) as error:
        size = sum(tensor.nbytes for _, tensors in laid_out.values() for tensor in tensors)
        reason = str(error).partition("\n")[0]
        raise EnvironmentProblemError(
            f"checkpoint of step {step}: its {size} bytes cannot be copied to host memory: {reason}"
        ) from error
    return copies


def _copied(tensor: Tensor) -> list[Tensor]:
    if tensor.device.type != "cuda":
        return [torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor)]
    pieces = tensor.reshape(-1).split(PINNED_BYTES // tensor.itemsize)
    return [_pinned(piece).copy_(piece, non_blocking=True) for piece in pieces]


def _pinned(like: Tensor) -> Tensor:
    try:
        return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=True)
    except RuntimeError:  # there may be less of it; the copy is a slower one
        return torch.empty(like.shape, dtype=like.dtype, device="cpu")


def _write_file(path: Path, chunks: deque) -> str:
    """Write the new file ``path`` and flush it to the disk; its SHA-256. Takes the chunks out, which frees them."""
    digest = hashlib.sha256()
    with open(path, "xb", buffering=0) as file:
        while chunks:
            chunk = chunks.popleft()
            data = memoryview(chunk if isinstance(chunk, bytes) else chunk.reshape(-1).view(torch.uint8).numpy())
            del chunk
            for start in range(0, len(data), WRITE_BYTES):
                piece = data[start : start + WRITE_BYTES]
                digest.update(piece)
                while piece:
                    piece = piece[os.write(file.fileno(), piece) :]
        os.fsync(file.fileno())
    return digest.hexdigest()


def _sealed(manifest: Mapping[str, Any]) -> bytes:
    """The text of a manifest, its last key the SHA-256 of all bytes before that. Every schema keeps to this."""
    body = json_text(manifest, "facts").removesuffix("\n}\n") + SEAL
    return (body + hashlib.sha256(body.encode()).hexdigest() + SEAL_END).encode()


def _json(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """``value`` as JSON gives it back; nothing of it is shared."""
    check_type(name, value, Mapping)
    text = json_text(dict(value), name)
    _check_keys(name, value)
    return parse_json(text.encode(), name)


def _check_keys(name: str, value: Any) -> None:
    """JSON turns other keys into strings, silently."""
    if isinstance(value, Mapping):
        for key in value:
            check_type(f"{name}: key {key!r}", key, str)
    if isinstance(value, (Mapping, list, tuple)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            _check_keys(name, inner)


def _forget_locals(error: BaseException | None) -> None:
    """The frames of an error that waits to be raised would keep tensors alive."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _delete(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # another process may be at it
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


# ---- what is read


def _verify(path: Path) -> Checkpoint:
    """The checkpoint in ``path``. Raises BadFileError for whatever is not as it was written."""
    with _environment(path, "cannot be read"):
        manifest = _read_manifest(path)
        checkpoint = Checkpoint(manifest["step"], manifest["facts"], manifest["identity"], path, manifest["parts"])
        for record in checkpoint.files.values():
            _check_size(path / record["file"], record)
        with ThreadPoolExecutor(max(1, min(READERS, os.cpu_count() or 1, len(checkpoint.files)))) as pool:
            for _ in pool.map(lambda record: _check_content(path / record["file"], record), checkpoint.files.values()):
                pass
        return checkpoint


def _read_manifest(path: Path) -> dict[str, Any]:
    name = shown(path / MANIFEST)
    with open_file(path / MANIFEST) as file:
        data = file.read(MAX_JSON_BYTES + 1)
    end = len(data) - len(SEAL_END)
    body, digest = data[: end - 64], data[end - 64 : end]
    if data[end:] != SEAL_END.encode() or hashlib.sha256(body).hexdigest().encode() != digest:
        raise BadFileError(f"{name}: expected a manifest and its SHA-256, found damage")
    manifest = parse_json(data, name)
    schema = manifest.get("schema")
    if type(schema) is int and schema > SCHEMA:
        raise _NewerSchemaError(
            f"{name}: expected schema {SCHEMA}, found {schema}: a newer version of this package wrote it; "
            "update the package, or move the checkpoint away"
        )
    if not _is_manifest(manifest):
        raise BadFileError(f"{name}: expected a manifest of schema {SCHEMA}, found something else")
    if path.name != f"step-{manifest['step']:09d}":
        raise BadFileError(f"{name}: expected a checkpoint of {path.name}, found step {manifest['step']}")
    return manifest


def _is_manifest(manifest: dict[str, Any]) -> bool:
    return (
        manifest.keys() == MANIFEST_KEYS
        and manifest["schema"] == SCHEMA
        and type(manifest["step"]) is int
        and all(isinstance(manifest[key], dict) for key in ("identity", "facts", "parts"))
        and all(map(_is_record, manifest["parts"].values()))
    )


def _is_record(record: Any) -> bool:
    return (
        isinstance(record, dict)
        and {key: type(value) for key, value in record.items()} == {"file": str, "bytes": int, "sha256": str}
        and PART_FILE.fullmatch(record["file"]) is not None
        and SHA256.fullmatch(record["sha256"]) is not None
    )


def _check_size(path: Path, record: Mapping[str, Any]) -> None:
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
    if size != record["bytes"]:
        raise BadFileError(f"{shown(path)}: expected {record['bytes']} bytes, found {size}")


def _check_content(path: Path, record: Mapping[str, Any]) -> None:
    with open_file(path) as file:
        _check_file(file, path, record)


def _check_file(file, path: Path, record: Mapping[str, Any]) -> None:
    if sha256_of(file) != record["sha256"]:
        raise BadFileError(f"{shown(path)}: expected the {record['bytes']} bytes of its manifest, found other ones")


@contextlib.contextmanager
def _environment(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EnvironmentProblemError(f"{shown(path)}: {what}: {error.strerror or error}") from error
