"""Argument checks of the whole package: ValueError or TypeError naming the argument, what was expected and what came.

Those of the kernels are among them, so that each check is written once.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from .errors import EnvironmentProblemError
from .kernels import validation

__all__ = [
    "FLOATS",
    "check_choice",
    "check_device",
    "check_floating",
    "check_int",
    "check_number",
    "check_tensor",
    "check_type",
    "dtype_name",
    "found",
    "is_integer",
]

FLOATS = validation.FLOATS

check_int = validation.check_int
check_number = validation.check_number
check_tensor = validation.check_tensor
check_type = validation.check_type
dtype_name = validation.dtype_name


def is_integer(tensor: Any) -> bool:
    """Whether it is a tensor of integers, which bool is not."""
    return isinstance(tensor, Tensor) and not (
        tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool
    )


def found(value: Any) -> str:
    """What came instead of a certain tensor: its dtype, or the type of what is none."""
    return dtype_name(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def check_choice(name: str, value: Any, options: Collection[Any]) -> None:
    """Raise ValueError unless ``value`` is one of ``options``."""
    if type(value) not in map(type, options) or value not in options:
        raise ValueError(f"{name}: expected {' or '.join(map(repr, options))}, got {value!r}")


def check_device(name: str, device: torch.device | str) -> torch.device:
    """``device`` as such; raise TypeError or ValueError when it is none, EnvironmentProblemError when PyTorch does not
    see that GPU here."""
    found = validation.as_device(name, device)
    if found.type == "cuda" and (found.index or 0) >= (count := torch.cuda.device_count()):
        raise EnvironmentProblemError(f"{name}: expected one of the {count} GPUs that PyTorch sees here, got {found}")
    return found


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless ``tensor`` is a tensor of floats."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {dtype_name(tensor.dtype)}")
