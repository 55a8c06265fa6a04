"""What every Triton operator needs around its kernels: the target of a device, launching there, registration."""

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor


@functools.cache
def architecture(device: torch.device) -> str:
    """The compilation target of a device, spelt as the compilers do: "sm_90", "gfx942"; "cpu" for the interpreter."""
    if device.type == "cpu":
        return "cpu"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


# Triton 3.9 contracts multiplications and additions unless told otherwise and warns that 3.10 will not; the budgets of
# the tests and the registers of `bench.aot` are those of contracted ones.
LAUNCH_OPTIONS = {"enable_fp_fusion": True}


def launch(kernel, grid: tuple[int, ...], *arguments, on: Tensor, **named) -> None:
    """Runs a kernel on the device of ``on``: Triton takes the current one, which need not hold the tensors."""
    with torch.cuda.device(on.device) if on.is_cuda else contextlib.nullcontext():
        kernel[grid](*arguments, **named, **LAUNCH_OPTIONS)


def device_scalar(value: float | Tensor, on: Tensor) -> Tensor:
    """A number as a 0-d fp64 tensor on the device of ``on``, without waiting for it. A tensor is taken as it is, so
    that a captured launch reads what it holds when it is replayed."""
    return value if isinstance(value, Tensor) else torch.full((), value, dtype=torch.float64, device=on.device)


_LIBRARY = torch.library.Library("gemmascope", "FRAGMENT")


def register(schema: str, launch: Callable, fake: Callable):
    """Registers an operator, so that `torch.compile` keeps its launches whole, and binds it.

    launch: runs the kernels, on CUDA and, in the interpreter, on the CPU. fake: makes outputs of the right shape.
    """
    name = _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for dispatch_key in ("CUDA", "CPU"):
        _LIBRARY.impl(name, launch, dispatch_key)
    torch.library.register_fake(f"gemmascope::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.gemmascope, name).default
