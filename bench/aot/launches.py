"""What a sparse step launches besides its kernels: one step in the interpreter, every PyTorch operation written down.

    seconds = launches · LAUNCH + bytes of every operation's tensors / HBM rate

The step runs at small sizes that no two quantities share, so that each dimension of a tensor says which one it is, and
is then priced at the sizes of a case. Operations that only make another view, or memory, launch nothing.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.aot.cards import EXPECTED, LAUNCH, Card, Utilisation
from bench.aot.lists import Case

# Of the step that is written down; one more of F is the length of offsets.
SIZES = {"N": 24, "d": 48, "F": 224, "room": 1792, "entries": 1}
# Kernels of an operation that takes several: a radix sort of 32-bit keys counts and then passes over them four times.
KERNELS = {"sort": 6, "argsort": 6, "cumsum": 2, "bincount": 3, "median": 4, "index_put_": 2}
# Bytes an element of such a sort: keys read once to count, then keys and 64-bit places read and written, four times.
SORT_BYTES = 4 + 4 * 2 * (4 + 8)
ROOT = Path(__file__).resolve().parent.parent.parent
NO_LAUNCH = (
    "empty",
    "empty_strided",
    "empty_like",
    "new_empty",
    "resize_",
    "set_",
    "detach",
    "alias",
    "lift_fresh",
    "scalar_tensor",
)


@dataclass(frozen=True)
class Operation:
    name: str
    tensors: tuple[tuple[tuple[int, ...], int], ...]
    """Shape and bytes an element of each tensor it reads or writes."""

    @property
    def kernels(self) -> int:
        return KERNELS.get(self.name, 1)

    def bytes(self, sizes: Mapping[str, int]) -> float:
        """At other sizes."""

        def at(dimension: int) -> int:
            for name, size in SIZES.items():
                if size > 1 and dimension in (size, size + 1):
                    return sizes[name] + dimension - size
            return dimension

        total = sum(math.prod(map(at, shape)) * size for shape, size in self.tensors)
        if self.name in ("sort", "argsort"):
            total = math.prod(map(at, self.tensors[0][0])) * SORT_BYTES
        return float(total)


# What runs in these happens on a CPU only: reading what tensors hold, and the interpreter's copies of arguments.
CPU_ONLY = ("kernels/validation.py", "kernels/arguments.py", "triton/runtime/interpreter.py")


def _on_a_cpu_only() -> bool:
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.endswith(CPU_ONLY):
            return True
        frame = frame.f_back
    return False


def _record() -> list[dict]:
    """Runs the step; in a process with TRITON_INTERPRET=1."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from bench.timing.inputs import LOSS, RULE
    from gemmascope.saes import JumpReLUSAE
    from gemmascope.training.state import TrainState
    from gemmascope.training.step import sparse_step

    found = []

    class Written(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            name = function.overloadpacket.__name__
            schema = function._schema
            views = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
            if function.namespace == "aten" and not views and name not in NO_LAUNCH and not _on_a_cpu_only():
                tensors = [
                    (list(t.shape), t.element_size())
                    for t in torch.utils._pytree.tree_leaves((args, kwargs or {}, out))
                    if isinstance(t, torch.Tensor)
                ]
                found.append({"name": name, "tensors": tensors})
            return out

    sae = JumpReLUSAE(SIZES["d"], SIZES["F"], generator=torch.Generator().manual_seed(0))
    sae.impl = "triton"
    state = TrainState.start(sae, "bf16")
    x = torch.randn(SIZES["N"], SIZES["d"], generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # the first also does what is done once
        found.clear()
        with Written():
            sparse_step(state, x, LOSS, RULE, SIZES["room"])
    return found


def operations() -> list[Operation]:
    """Of one step. Raises RuntimeError where it could not be run."""
    program = "import json; from bench.aot.launches import _record; print(json.dumps(_record()))"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the step did not run in the interpreter: {done.stderr.strip()[-300:]}")
    rows = json.loads(done.stdout.splitlines()[-1])
    return [Operation(row["name"], tuple((tuple(shape), size) for shape, size in row["tensors"])) for row in rows]


@dataclass(frozen=True)
class Small:
    """The operations of a step together, seconds."""

    calls: int
    launches: int
    bytes: float
    seconds: float


def small(
    found: list[Operation], case: Case, card: Card, kernels: int, margin: float = 1.5, share: Utilisation = EXPECTED
) -> Small:
    """kernels: launches of the step's own, which cost a gap each. margin: room for entries, for one that there is."""
    sizes = {"N": case.tokens, "d": case.d, "F": case.F, "room": int(margin * case.entries), "entries": 1}
    launches = kernels + sum(operation.kernels for operation in found)
    moved = sum(operation.bytes(sizes) for operation in found)
    return Small(len(found), launches, moved, launches * LAUNCH + moved / card.hbm / share.hbm)
