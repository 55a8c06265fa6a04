"""The implementations of the operators: name → modules, and the one thing that tells them apart for a caller.

This is the one place that knows where an implementation lives. An implementation is a set of functions of the same
names and signatures: `jumprelu_forward`, `jumprelu_backward`, `preactivations`, `encode_forward`, `decode_forward`,
`decode_backward` for inference, and the operators of the training step under their public names (`api.py` has their
contracts). Modules are imported when one of their functions is first asked for.
"""

from collections.abc import Callable
from types import ModuleType

# Those whose `encode_entries` does not wait for the device to learn how many entries there are: they must be told for
# how many to make room.
NEED_CAPACITY = ("triton",)


def _modules(impl: str) -> tuple[ModuleType, ModuleType]:
    # Written out as imports, which `torch.compile` can trace.
    if impl == "triton":
        from . import _inference, _training

        return _inference, _training
    if impl == "cpu":
        from . import _cpu, _cpu_training

        return _cpu, _cpu_training
    if impl == "pytorch":
        from . import _pytorch, _pytorch_training

        return _pytorch, _pytorch_training
    from . import reference, reference_training

    return reference, reference_training


def operator(name: str, impl: str) -> Callable:
    """The function that implements operator ``name``. impl: "reference", "pytorch", "cpu" or "triton"."""
    inference, training = _modules(impl)
    return getattr(inference if hasattr(inference, name) else training, name)
