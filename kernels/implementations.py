"""The implementations of the operators: name → package, and the one thing that tells them apart for a caller.

This is the one place that knows where an implementation lives. An implementation is a package with functions of the
same names and signatures: `jumprelu_forward`, `jumprelu_backward`, `preactivations`, `encode_forward`,
`decode_forward`, `decode_backward` for inference, and the operators of the training step under their public names
(`api.py` has their contracts). It is imported when one of its functions is first asked for.
"""

from collections.abc import Callable
from types import ModuleType

# Those whose `encode_entries` does not wait for the device to learn how many entries there are: they must be told for
# how many to make room.
NEED_CAPACITY = ("triton",)


def _package(impl: str) -> ModuleType:
    # Written out as imports, which `torch.compile` can trace.
    if impl == "triton":
        from . import gpu

        return gpu
    if impl == "cpu":
        from . import cpu

        return cpu
    if impl == "pytorch":
        from . import eager

        return eager
    from . import reference

    return reference


def operator(name: str, impl: str) -> Callable:
    """The function that implements operator ``name``. impl: "reference", "pytorch", "cpu" or "triton"."""
    return getattr(_package(impl), name)
