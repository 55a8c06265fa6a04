"""Checks of single arguments: ValueError or TypeError naming the argument, what was expected and what came."""

import math
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    is_legacy_batchedtensor,
    peek_interpreter_stack,
)
from torch.autograd import forward_ad

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" of torch.float32."""
    return str(dtype).removeprefix("torch.")


def check_number(
    name: str, value: float, low: float = -math.inf, high: float = math.inf, *, open_low: bool = False
) -> None:
    """Raise TypeError or ValueError unless ``value`` is a finite number in [low, high] (or (low, high])."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    # An int beyond int64 is no number to PyTorch, and may be beyond every float.
    finite = math.isfinite(value) if isinstance(value, float) else value.bit_length() < 64
    if not (finite and (low < value if open_low else low <= value) and value <= high):
        bounds = "" if low == -math.inf else f" {'>' if open_low else '≥'} {low:g}"
        bounds += "" if high == math.inf else f" and ≤ {high:g}"
        raise ValueError(f"{name}: expected a finite number{bounds}, got {_shown(value)}")


def check_int(name: str, value: int, low: int, high: int | None = None) -> None:
    """Raise TypeError or ValueError unless ``value`` is an int of at least ``low``, and at most ``high``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < low:
        raise ValueError(f"{name}: expected at least {low}, got {_shown(value)}")
    if high is not None and value > high:
        raise ValueError(f"{name}: expected at most {high}, got {_shown(value)}")


def _shown(value: float) -> str:
    """The number, or how long it is: Python does not print an int of thousands of digits."""
    return str(value) if not isinstance(value, int) or value.bit_length() <= 128 else f"{value.bit_length()} bits"


def check_type(name: str, value: Any, kind: type) -> None:
    """Raise TypeError unless ``value`` is a ``kind``."""
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise TypeError(f"{name}: expected {article} {kind.__name__}, got {type(value).__name__}")


def check_tensor(name: str, tensor: Tensor, shape: tuple[int | str, ...], dtypes=FLOATS, device=None) -> None:
    """Raise TypeError or ValueError unless ``tensor`` is a plain one of that shape, one of those dtypes, that device.

    ``shape`` holds sizes and, for free dimensions, their names.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    check_plain(name, tensor)
    matches = tensor.ndim == len(shape) and all(
        isinstance(want, str) or want == got for want, got in zip(shape, tensor.shape, strict=False)
    )
    if not matches:
        raise ValueError(f"{name}: expected shape [{', '.join(map(str, shape))}], got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        expected = " or ".join(map(dtype_name, dtypes))
        raise TypeError(f"{name}: expected dtype {expected}, got {dtype_name(tensor.dtype)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}")


def check_plain(name: str, tensor: Tensor) -> None:
    """Raise TypeError for a tensor whose numbers are not simply there: of a transform, in parts, sparse."""
    kind = _unusual_kind(tensor)
    if kind:
        raise TypeError(f"{name}: expected a plain tensor, got {kind}")


def check_present(name: str, tensor: Tensor) -> None:
    """Raise ValueError for a tensor without numbers, where what comes out is as large as they say."""
    if tensor.is_meta:
        raise ValueError(f"{name}: expected a tensor that holds numbers, got one on the meta device")


def _unusual_kind(tensor: Tensor) -> str | None:
    batched = is_batchedtensor(tensor) or is_legacy_batchedtensor(tensor)
    if batched:  # by is_grads_batched too
        return "one of torch.func.vmap, which the operators do not support (they take batches as they are)"
    if is_functorch_wrapped_tensor(tensor):
        key = peek_interpreter_stack().key()
        transform = "jvp" if key == TransformType.Jvp else "grad"
        return f"one of torch.func.{transform}, which the operators do not support (backward() gives gradients)"
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
        return "one of forward-mode differentiation, which the operators do not support (backward() gives gradients)"
    if type(tensor) is not Tensor and type(tensor).__module__.startswith("torch.distributed"):
        return f"a {type(tensor).__name__}, of which this process may hold a part (full_tensor() gathers it)"
    if tensor.layout != torch.strided:
        return f"one of layout {str(tensor.layout).removeprefix('torch.')}"
    return None


def as_device(name: str, device: torch.device | str) -> torch.device:
    """The device, or ValueError or TypeError where it is none."""
    if not isinstance(device, (torch.device, str)):
        raise TypeError(f"{name}: expected a torch.device or its name, got {type(device).__name__}")
    try:
        return torch.device(device)
    except (RuntimeError, UnicodeError) as error:
        expected = "the name of a device, such as 'cpu' or 'cuda:0'"
        raise ValueError(f"{name}: expected {expected}, got {device!r}") from error


# ---- what tensors hold: read on a CPU alone, since on a GPU that would wait for the device


def check_starts(name: str, starts: Tensor, total: int | None = None, most: int | None = None) -> None:
    """Raise ValueError unless ``starts``, where lists begin and the last one ends, ascend from 0.

    Given ``total`` they end with it, given ``most`` with no more than that.
    """
    if starts.device.type != "cpu":
        return
    first, last = int(starts[0]), int(starts[-1])
    if first != 0:
        raise ValueError(f"{name}: expected a first entry of 0, got {first}")
    if (starts[1:] < starts[:-1]).any():
        raise ValueError(f"{name}: expected ascending entries")
    if total is not None and last != total:
        raise ValueError(f"{name}: expected to end with {total}, got {last}")
    if most is not None and last > most:
        raise ValueError(f"{name}: expected to end with at most {most}, got {last}")


def check_indices(name: str, indices: Tensor, limit: int) -> None:
    """Raise ValueError unless all ``indices`` are in [0, limit)."""
    if indices.device.type != "cpu" or indices.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(indices))
    if low < 0 or high >= limit:
        raise ValueError(f"{name}: expected indices in [0, {limit}), got {low if low < 0 else high}")
