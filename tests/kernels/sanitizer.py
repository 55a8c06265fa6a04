"""Repairs and checks for Triton's interpreter, as a context manager: ``with sanitize(race=True, seed=3) as report:``.

Repaired: bf16 casts round to nearest even and bf16 ``tl.dot`` computes (the interpreter truncates the one and
multiplies bit patterns in the other); comparisons of scalars are masks; loop bounds work with numpy 2.4 on Triton 3.6.

Checked, each as an AssertionError that names the argument and the program:

* `OutOfBoundsError`: an active lane leaves the extent of the tensor its pointer was derived from;
* `RaceError`: one element is touched by two programs, one of them by a plain store, or one element by two lanes of one
  store; atomics may meet atomics;
* `BFloat16ArithmeticError`: arithmetic on bf16 values, which the interpreter computes on their bit patterns. Kernels
  convert to fp32 first.

``seed`` runs the programs of every launch in a random order; ``programs`` runs only some of them.

Limits. It patches private names of Triton (tried on 3.6 and 3.9). A pointer made from an integer, or chosen between
two tensors, is only checked against the union of the launch's tensors; so is a tensor descriptor. A strided view's
extent includes its gaps. Nothing below the program exists here: missing barriers, asynchronous copies and the rounding
of tensor cores (tf32, wgmma) cannot be seen. Masked-off lanes without ``other=`` read 0 here, anything on a GPU.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

from bench.interpreter import with_loop_bounds

MANY = -1


class SanitizerError(AssertionError):
    pass


class OutOfBoundsError(SanitizerError):
    pass


class RaceError(SanitizerError):
    pass


class BFloat16ArithmeticError(SanitizerError):
    pass


@dataclasses.dataclass
class Report:
    """What was seen, for tests that must know that the sanitizer was at work."""

    launches: int = 0
    programs: int = 0
    elements: int = 0


@dataclasses.dataclass(frozen=True)
class _Settings:
    race: bool
    seed: int | None
    programs: Callable[[tuple[int, int, int]], Sequence[int]] | None
    report: Report


_settings: list[_Settings] = []
_launches: list["_Launch"] = []


@contextlib.contextmanager
def sanitize(
    race: bool = True,
    seed: int | None = None,
    programs: Callable[[tuple[int, int, int]], Sequence[int]] | None = None,
) -> Iterator[Report]:
    """Repair and check every interpreted launch inside the block. Nested blocks: the innermost one's options hold.

    race: keep the shadow memory that finds races, 12 bytes for each byte of the launch's tensors.
    seed: run the programs in a random order. programs: from the grid, the linear indices of the programs to run.
    """
    report = Report()
    with contextlib.ExitStack() as stack:
        if not _settings:
            _install(stack)
        _settings.append(_Settings(race, seed, programs, report))
        stack.callback(_settings.pop)
        yield report


class _Launch:
    """The tensors of one launch, who touched them, and the order of its programs."""

    def __init__(self, arguments: list[tuple[str, object]], settings: _Settings):
        self.settings = settings
        self.program = 0
        self.extents: dict[int, tuple[int, str]] = {}  # first address -> (end, name)
        for name, value in arguments:
            self._add(name, value)
        self.regions: list[tuple[int, int]] = []  # disjoint, ascending: aliases and overlapping views are one
        for start, (end, _) in sorted(self.extents.items()):
            if self.regions and start < self.regions[-1][1]:
                self.regions[-1] = (self.regions[-1][0], max(end, self.regions[-1][1]))
            elif end > start:
                self.regions.append((start, end))
        if settings.race:
            self.shadow = [np.zeros((3, end - start), np.int32) for start, end in self.regions]

    def _add(self, name: str, value: object) -> None:
        if isinstance(value, (tuple, list)):
            for i, item in enumerate(value):
                self._add(f"{name}[{i}]", item)
        elif hasattr(value, "data_ptr") and hasattr(value, "stride"):
            reach = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True)) + 1
            start = value.data_ptr()
            end = start + (reach * value.element_size() if value.numel() else 0)
            known_end, known_name = self.extents.get(start, (start, name))
            self.extents[start] = max(end, known_end), known_name
        elif hasattr(value, "base"):
            self._add(name, value.base)

    def plan(self, dims: tuple[int, int, int]) -> int:
        """Fixes the order of the programs of a grid; their number."""
        self.dims = dims
        if self.settings.programs is not None:
            self.order = np.asarray(self.settings.programs(dims), dtype=np.int64)
        else:
            self.order = np.arange(int(np.prod(dims)))
        if self.settings.seed is not None:
            self.order = np.random.default_rng(self.settings.seed).permutation(self.order)
        self.settings.report.launches += 1
        self.settings.report.programs += len(self.order)
        return len(self.order)

    def start_program(self, position: int) -> tuple[int, int, int]:
        self.program = int(self.order[position])
        x, y, z = np.unravel_index(self.program, self.dims)
        return int(x), int(y), int(z)

    def origin(self, pointer: TensorHandle) -> int | None:
        """First address of the tensor that a pointer was derived from, where that is known."""
        if "origin" in pointer.attr:
            return pointer.attr["origin"]
        if pointer.data.dtype == np.uint64 and pointer.data.size == 1:
            address = int(pointer.data.reshape(-1)[0])
            return address if address in self.extents else None
        return None

    def check(self, kind: str, pointer: TensorHandle, mask: np.ndarray) -> None:
        addresses, mask = np.broadcast_arrays(pointer.data, mask)
        addresses = addresses[mask.astype(bool)].astype(np.int64).ravel()
        if addresses.size == 0:
            return
        self.settings.report.elements += addresses.size
        size = max(1, pointer.get_element_ty().primitive_bitwidth // 8)
        starts = np.array([start for start, _ in self.regions], dtype=np.int64)
        ends = np.array([end for _, end in self.regions], dtype=np.int64)
        region = np.searchsorted(starts, addresses, side="right") - 1
        outside = (region < 0) | (addresses + size > ends[np.maximum(region, 0)] if len(ends) else True)
        origin, name = self.origin(pointer), "every tensor"
        if origin is not None:
            end, name = self.extents[origin]
            outside |= (addresses < origin) | (addresses + size > end)
        if outside.any():
            first = int(addresses[outside][0])
            place = f"byte {first - origin}" if origin is not None else f"address {first:#x}"
            raise OutOfBoundsError(
                f"program {self.program}: {kind} of {size} bytes out of bounds of {name} at {place}, "
                f"{int(outside.sum())} lanes"
            )
        if self.settings.race:
            for r in np.unique(region):
                self._check_race(kind, name, self.shadow[r], addresses[region == r] - starts[r])

    def _check_race(self, kind: str, name: str, shadow: np.ndarray, at: np.ndarray) -> None:
        me = self.program + 1
        readers, writers, atomics = shadow
        rivals = {"load": (writers, atomics), "store": (readers, writers, atomics), "atomic": (readers, writers)}[kind]
        for rival in rivals:
            conflict = (rival[at] != 0) & (rival[at] != me)
            if conflict.any():
                byte = int(at[conflict][0])
                other = "several programs" if rival[byte] == MANY else f"program {rival[byte] - 1}"
                raise RaceError(f"program {self.program}: {kind} meets an access by {other} at byte {byte} of {name}")
        if kind == "store":
            if np.unique(at).size < at.size:
                raise RaceError(f"program {self.program}: two lanes of one store write the same element of {name}")
            writers[at] = me
        else:
            touched = readers if kind == "load" else atomics
            touched[at] = np.where((touched[at] == 0) | (touched[at] == me), me, MANY)


def _from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bf16(values: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16)).reshape(values.shape)


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _cast(original):
    def cast_impl(self, src, dst_type):
        to = dst_type.scalar
        if _is_bf16(src) and to != tl.bfloat16:
            return TensorHandle(_from_bf16(src.data).astype(interpreter._get_np_dtype(to)), to)
        if to == tl.bfloat16 and not _is_bf16(src):
            return TensorHandle(_to_bf16(src.data.astype(np.float32)), to)
        return original(self, src, dst_type)

    return cast_impl


def _dot(original):
    def create_dot(self, a, b, *rest):
        a, b = (TensorHandle(_from_bf16(t.data), tl.float32) if _is_bf16(t) else t for t in (a, b))
        return original(self, a, b, *rest)

    return create_dot


def _no_bf16(original):
    def operate(self, *args):
        if any(isinstance(arg, TensorHandle) and _is_bf16(arg) for arg in args):
            raise BFloat16ArithmeticError(f"{args[-1].__name__} on bf16 values: convert to fp32 first")
        return original(self, *args)

    return operate


def _as_mask(original):
    def compare(self, lhs, rhs):
        return TensorHandle(original(self, lhs, rhs).data, tl.int1)

    return compare


def _keeping_origin(original, position: int):
    """``original`` is a builder method whose argument at ``position`` may be a pointer."""

    def derive(self, *args):
        result = original(self, *args)
        origin = _launches[-1].origin(args[position]) if _launches else None
        if origin is not None:
            result.attr["origin"] = origin
        return result

    return derive


def _checked(original, kind: str, pointer: int, mask: int | None):
    def access(self, *args, **kwargs):
        active = np.ones_like(args[pointer].data, dtype=bool) if mask is None else args[mask].data
        _launches[-1].check(kind, args[pointer], active)
        return original(self, *args, **kwargs)

    return access


def _set_grid_dim(original):
    def set_grid_dim(self, *_):
        original(self, *_launches[-1].dims)

    return set_grid_dim


def _set_grid_idx(original):
    def set_grid_idx(self, position, *_):
        original(self, *_launches[-1].start_program(position))

    return set_grid_idx


def _execute(original):
    @functools.wraps(original)
    def call(self, *args, **kwargs):
        launch = _Launch([*zip(self.arg_names, args, strict=False), *kwargs.items()], _settings[-1])
        grid = self.grid

        def flat_grid(meta):
            dims = tuple(grid(meta) if callable(grid) else grid)
            return (launch.plan(dims + (1,) * (3 - len(dims))),)

        self.grid = flat_grid
        _launches.append(launch)
        try:
            with np.errstate(all="ignore"):  # a GPU does not warn of overflow or NaN
                return original(self, *args, **kwargs)
        except interpreter.InterpreterError as error:
            cause = error
            while isinstance(cause, interpreter.InterpreterError) and cause.__cause__ is not None:
                cause = cause.__cause__
            if isinstance(cause, SanitizerError):
                raise cause from None
            raise
        finally:
            _launches.pop()
            self.grid = grid

    return call


def _install(stack: contextlib.ExitStack) -> None:
    def patch(owner, name: str, wrap, *options) -> None:
        original = getattr(owner, name)
        setattr(owner, name, wrap(original, *options))
        stack.callback(setattr, owner, name, original)

    builder = InterpreterBuilder
    patch(builder, "cast_impl", _cast)
    patch(builder, "create_dot", _dot)
    for name in ("binary_op", "unary_op"):
        patch(builder, name, _no_bf16)
    for name in dir(builder):
        if name.startswith(("create_icmp", "create_fcmp")):
            patch(builder, name, _as_mask)
    for name in ("addptr", "broadcast", "expand_dims", "reshape", "trans", "bitcast", "unsplat"):
        if hasattr(builder, f"create_{name}"):
            patch(builder, f"create_{name}", _keeping_origin, 0)
    patch(builder, "create_splat", _keeping_origin, 1)
    patch(builder, "create_masked_load", _checked, "load", 0, 1)
    patch(builder, "create_masked_store", _checked, "store", 0, 2)
    patch(builder, "create_atomic_rmw", _checked, "atomic", 1, 3)
    patch(builder, "create_atomic_cas", _checked, "atomic", 0, None)
    patch(builder, "set_grid_dim", _set_grid_dim)
    patch(builder, "set_grid_idx", _set_grid_idx)
    patch(GridExecutor, "__call__", _execute)
    patch(interpreter, "_patch_lang_tensor", with_loop_bounds)
