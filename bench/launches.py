"""What one sparse training step gives a GPU to do, counted without one: python -m bench.launches [--calls]

The step runs in Triton's interpreter while every operator of PyTorch that would launch a kernel, every launch of a
Triton kernel and everything for which the host would wait is recorded, with the place that asked for it. An operator
counts as one, though some, as a sort, are several kernels; views and allocations count as none.

    inside operators   asked for by a file of kernels/
    the step itself    everything else

What the host would wait for: numbers it reads, sizes that depend on them, and copies from memory that is not pinned.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from bench import interpreter
from bench.timing.inputs import construct
from gemmascope.kernels import Rule
from gemmascope.kernels.gpu import common
from gemmascope.saes import JumpReLUSAE
from gemmascope.training.config import Loss
from gemmascope.training.state import TrainState
from gemmascope.training.step import Scheduled, sparse_step

# Besides views, which are told by their schema.
NO_KERNEL = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh"),
    *("record_stream", "_unsafe_view", "resize_", "set_"),
}
WAITS = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "nonzero_static", "masked_select", "_unique2"),
    *("unique_dim", "unique_consecutive", "bincount", "histc", "allclose"),
}
"""Those that read a number on the host, or make a result as long as one says."""
FROM_PYTHON = {"lift_fresh"}
"""A tensor made of Python's numbers comes to a GPU from memory that is not pinned."""


@dataclass(frozen=True)
class Call:
    """One operator or launch. triton: a launch of one of our kernels. given: what it was given besides the numbers
    inside tensors, as far as a replay of the recorded launch would keep it. tensors: shape and bytes an element of each
    that an operator reads or writes."""

    name: str
    place: str
    in_operator: bool
    kernel: bool
    waits: bool
    triton: bool
    given: tuple
    tensors: tuple[tuple[tuple[int, ...], int], ...] = ()


def describe(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ("tensor", tuple(value.shape), value.stride(), value.dtype)
    if isinstance(value, (list, tuple)):
        return tuple(describe(each) for each in value)
    if isinstance(value, dict):
        return tuple((key, describe(each)) for key, each in sorted(value.items()))
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _asked_by() -> tuple[str, bool]:
    """The innermost function of the package on the stack, and whether an operator is among those that wait for it."""
    frame, place, in_operator = sys._getframe(2), "", False
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("gemmascope."):
            place = place or f"{module.removeprefix('gemmascope.')}.{frame.f_code.co_name}"
            in_operator |= module.startswith("gemmascope.kernels.")
        frame = frame.f_back
    return place, in_operator


class Recorder(TorchDispatchMode):
    """Every operator that runs inside it."""

    def __init__(self):
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, schema = func._schema.name.split("::")[1], func._schema
        is_view = bool(schema.returns) and all(
            r.alias_info is not None and not r.alias_info.is_write for r in schema.returns
        )
        described, (place, in_operator) = describe((args, kwargs)), _asked_by()
        out = func(*args, **kwargs)
        # On a GPU a copy between devices shows as one of these with a tensor of the host.
        waits = name in WAITS | FROM_PYTHON
        kernel = waits or (not is_view and name not in NO_KERNEL)
        tensors = tuple((tuple(t.shape), t.element_size()) for t in _tensors((args, kwargs, out)))
        self.calls.append(Call(name, place, in_operator, kernel, waits, False, described, tensors))
        return out

    @contextlib.contextmanager
    def recording(self) -> Iterator["Recorder"]:
        """Record operators and launches; the checks of numbers that only a CPU makes are left out."""
        run = common.launch

        def launch(kernel, grid, *arguments, on, **named):
            place, in_operator = _asked_by()
            given = describe((grid, arguments, named))
            self.calls.append(Call(f"{kernel.__name__}[{grid}]", place, in_operator, True, False, True, given))
            with _disable_current_modes():  # the interpreter's own operators
                run(kernel, grid, *arguments, on=on, **named)

        modules = [m for name, m in sys.modules.items() if name.startswith("gemmascope.kernels.gpu.") and m]
        with contextlib.ExitStack() as stack:
            for module in modules:
                if getattr(module, "launch", None) is run:
                    stack.enter_context(mock.patch.object(module, "launch", launch))
            stack.enter_context(mock.patch.object(torch.compiler, "is_compiling", return_value=True))
            stack.enter_context(self)
            yield self

    @property
    def kernels(self) -> list[Call]:
        return [call for call in self.calls if call.kernel]

    @property
    def waits(self) -> list[Call]:
        return [call for call in self.calls if call.waits]


def small_step(
    compute_dtype: str = "bf16",
    loss: Loss | None = None,
    tokens: int = 6,
    d: int = 16,
    F: int = 64,
    beta1: float = 0.0,
) -> tuple[TrainState, Tensor, Loss, int]:
    """State, with first moments where beta1 is above 0, activations, loss and room for entries of a step that the
    interpreter takes in a second."""
    inputs = construct(d, F, tokens, 4.0, torch.device("cpu"), dtype="fp32")
    sae = JumpReLUSAE(d, F, threshold_init=0.05, impl="triton", generator=torch.Generator().manual_seed(0))
    state = TrainState.start(sae, compute_dtype, first_moments=beta1 > 0)
    return state, inputs.x, loss or inputs.loss, tokens * F


def record_step(
    compute_dtype: str = "bf16", tokens: int = 6, d: int = 16, F: int = 64, room: int = 0, beta1: float = 0.0
) -> Recorder:
    """The second step of a training, as every later one is. room: for entries; 0: for all there can be."""
    state, x, loss, most = small_step(compute_dtype, None, tokens, d, F, beta1)
    room = room or most
    rule = Rule(1e-3, 0.999, 1e-8, True, beta1)
    scheduled = Scheduled.of(loss, rule, len(x), column=0).to(x.device)
    recorder = Recorder()
    with interpreter.mended():
        sparse_step(state, x, loss, rule, room)
        with recorder.recording():
            sparse_step(state, x, loss, rule, room, scheduled)
    return recorder


def table(recorder: Recorder) -> str:
    rows = [f"{'':<44}{'kernels':>8}{'waits':>7}"]
    for title, inside in (("the step itself", False), ("inside operators", True)):
        calls = [call for call in recorder.kernels if call.in_operator == inside]
        rows.append(f"{title:<44}{len(calls):>8}{sum(call.waits for call in calls):>7}")
        by_place = Counter(call.place for call in calls)
        for place, count in by_place.items():
            waits = sum(call.waits for call in calls if call.place == place)
            rows.append(f"  {place:<42}{count:>8}{waits:>7}")
    rows.append(f"{'total':<44}{len(recorder.kernels):>8}{len(recorder.waits):>7}")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.launches", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--compute-dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--calls", action="store_true", help="every call in its order")
    arguments = parser.parse_args(argv)
    recorder = record_step(arguments.compute_dtype)
    if arguments.calls:
        for call in recorder.kernels:
            print(f"{call.name:<50} {call.place}{'  WAITS' if call.waits else ''}")
    print(table(recorder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
