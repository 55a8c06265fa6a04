"""Which implementation of an operator runs, and why.

``impl="auto"`` chooses and never fails; an explicit request is met or raises, it never falls back.

* ``"reference"``: the specification, plain PyTorch written to be read;
* ``"pytorch"``: plain PyTorch written for speed on a CPU;
* ``"cpu"``: the native backend, where it was built (`cpu/build.py`);
* ``"triton"``: the GPU kernels.
"""

import os
from typing import NamedTuple

import torch

from .arguments import as_device, check_type, dtype_name
from .cpu import build

IMPLS = ("auto", "reference", "pytorch", "cpu", "triton")
NATIVE_DTYPES = (torch.float32, torch.bfloat16)
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OLDEST_TRITON = (3, 6)


class Choice(NamedTuple):
    impl: str  # one of IMPLS but "auto"
    reason: str


def interpreting() -> bool:
    """Whether Triton runs kernels in its CPU interpreter (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def triton_problem() -> str | None:
    """Why Triton cannot be used in this process, or None.

    Not cached: the look-up is cheap once triton is imported, and Dynamo warns of caches in what it traces.
    """
    try:  # rather than by `importlib`, which Dynamo of torch 2.11 does not trace
        import triton
    except ImportError:
        return "triton is not installed"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST_TRITON:
        return f"triton {triton.__version__} is older than {'.'.join(map(str, OLDEST_TRITON))}"
    return None


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot take tensors of this device and dtype, or None."""
    if dtype not in TRITON_DTYPES:
        return f"the kernels take float32, float16 or bfloat16, not {dtype_name(dtype)}"
    if device.type != "cuda" and not (device.type == "cpu" and interpreting()):
        return f"the tensors are on {device.type}; the kernels run on a GPU (or with TRITON_INTERPRET=1 on the CPU)"
    return triton_problem()


def why_not_native(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the native CPU backend cannot take tensors of this device and dtype, or None."""
    if device.type != "cpu":
        return f"the tensors are on {device.type}; the native backend is for the CPU"
    if dtype not in NATIVE_DTYPES:
        return f"the native backend takes float32 or bfloat16, not {dtype_name(dtype)}"
    return build.problem()


def _plain(why: str) -> Choice:
    """Plain PyTorch: what is written for speed loops over pieces, which a compiler would unroll."""
    return Choice("reference" if torch.compiler.is_compiling() else "pytorch", why)


def choose(impl: str, device: torch.device | str, dtype: torch.dtype) -> Choice:
    """The implementation that ``impl`` means for tensors of this device and dtype.

    Raises ValueError when ``impl`` is unknown or was asked for explicitly and cannot run.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    if not isinstance(device, torch.device):
        device = as_device("device", device)
    check_type("dtype", dtype, torch.dtype)
    if impl in ("reference", "pytorch"):
        return Choice(impl, "asked for")
    if impl == "cpu":
        problem = why_not_native(device, dtype)
        if problem:
            raise ValueError(f"impl='cpu': {problem}")
        return Choice("cpu", "asked for")
    if impl == "auto" and device.type == "cpu":
        problem = why_not_native(device, dtype)
        if problem:
            return _plain(problem)
        return Choice("cpu", f"the native backend, {build.isa()}")
    problem = why_not_triton(device, dtype)
    if impl == "triton":
        if problem:
            raise ValueError(f"impl='triton': {problem}")
        return Choice("triton", "asked for")
    if problem:
        return _plain(problem)
    return Choice("triton", f"{device.type} tensors and {dtype_name(dtype)}")
