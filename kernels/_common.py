"""What every Triton operator needs around its kernels: the target of a device, and launching on that device."""

import contextlib
import functools

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


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the one that holds the tensors."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
