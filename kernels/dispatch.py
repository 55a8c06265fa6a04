"""Which implementation of an operator runs, and why.

``impl="auto"`` chooses and never fails; an explicit request is met or raises, it never falls back.
"""

import importlib.util
import os
from typing import NamedTuple

import torch

IMPLS = ("auto", "reference", "triton")
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OLDEST_TRITON = (3, 6)


class Choice(NamedTuple):
    impl: str  # "reference" or "triton"
    reason: str


def interpreting() -> bool:
    """Whether Triton runs kernels in its CPU interpreter (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def triton_problem() -> str | None:
    """Why Triton cannot be used in this process, or None.

    Not cached: the look-up is cheap once triton is imported, and Dynamo warns of caches in what it traces.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST_TRITON:
        return f"triton {triton.__version__} is older than {'.'.join(map(str, OLDEST_TRITON))}"
    return None


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot take tensors of this device and dtype, or None."""
    if dtype not in TRITON_DTYPES:
        return f"the kernels take float32, float16 or bfloat16, not {str(dtype).removeprefix('torch.')}"
    if device.type != "cuda" and not (device.type == "cpu" and interpreting()):
        return f"the tensors are on {device.type}; the kernels run on a GPU (or with TRITON_INTERPRET=1 on the CPU)"
    return triton_problem()


def choose(impl: str, device: torch.device | str, dtype: torch.dtype) -> Choice:
    """The implementation that ``impl`` means for tensors of this device and dtype.

    Raises ValueError when ``impl`` is unknown or was asked for explicitly and cannot run.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    device = torch.device(device)
    if impl == "reference":
        return Choice("reference", "asked for")
    problem = why_not_triton(device, dtype)
    if impl == "triton":
        if problem:
            raise ValueError(f"impl='triton': {problem}")
        return Choice("triton", "asked for")
    if problem:
        return Choice("reference", problem)
    if device.type == "cpu":
        return Choice("reference", "the tensors are on cpu; the interpreter is for tests and must be asked for")
    return Choice("triton", f"{device.type} tensors and {str(dtype).removeprefix('torch.')}")
