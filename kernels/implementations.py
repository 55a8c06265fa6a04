"""The implementations of the operators: name → package, and the one thing that tells them apart for a caller.

This is the one place that knows where an implementation lives. An implementation is a package with functions of the
same names and signatures: `jumprelu_forward`, `jumprelu_backward`, `preactivations`, `encode_forward`,
`decode_forward`, `decode_backward` for inference, and the operators of the training step under their public names
(`api.py` has their contracts), with `centre`, `token_pass`, `conclude` and `finish`, which surround them in a step and
are not public (`reference/conclusion.py` has those), nor is `encoder_parts` (`reference/training.py`). It is imported
when one of its functions is first asked for.
"""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from .arguments import check_plain
from .autocast import autocast_off

# Those whose `encode_entries` does not wait for the device to learn how many entries there are: they must be told for
# how many to make room.
NEED_CAPACITY = ("triton",)
# Those that check every index and every start of a list as they read them, as their callers do for the others.
CHECK_WHAT_THEY_READ = ("cpu",)
# Those whose `DenseCode` holds its masks as words of bits.
MASKS_AS_BITS = ("cpu", "triton")


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
    """The function that implements operator ``name``, forward or backward, with autocast off: gates and sums are what
    the contract says wherever it is called. impl: "reference", "pytorch", "cpu" or "triton".
    """
    function = getattr(_package(impl), name)

    def without_autocast(*arguments, **options):
        tensors = [t for a in arguments for t in (a if isinstance(a, tuple) else (a,)) if isinstance(t, Tensor)]
        if name.endswith("_backward") and not torch.compiler.is_compiling():
            for tensor in tensors:  # the gradient may come from a transform that the forward pass was not in
                check_plain(name, tensor)
        with autocast_off(tensors[0].device):
            return function(*arguments, **options)

    return without_autocast
