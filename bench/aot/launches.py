"""What a sparse step launches of PyTorch's besides its own kernels, and what that should cost.

    seconds = launches · LAUNCH + bytes of every operation's tensors / HBM rate

`bench.launches` records a step of small sizes that no two quantities share, so that each dimension of a tensor says
which one it is, and is then priced at the sizes of a case. What a step does once for each chunk of tokens counts once.
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
from bench.aot.lists import MARGIN, Case

# Of the step that is written down; one more of F is the length of offsets.
SIZES = {"N": 24, "d": 48, "F": 224, "room": 1792}
ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Operation:
    name: str
    tensors: tuple[tuple[tuple[int, ...], int], ...]
    """Shape and bytes an element of each tensor it reads or writes."""

    def bytes(self, sizes: Mapping[str, int]) -> float:
        """At other sizes."""

        def at(dimension: int) -> int:
            for name, size in SIZES.items():
                if dimension in (size, size + 1):
                    return sizes[name] + dimension - size
            return dimension

        return float(sum(math.prod(map(at, shape)) * size for shape, size in self.tensors))


def record() -> dict:
    """Runs the step; in a process with TRITON_INTERPRET=1. Launches of our own kernels, and PyTorch's operations."""
    from bench.launches import record_step

    calls = record_step("bf16", SIZES["N"], SIZES["d"], SIZES["F"], SIZES["room"]).kernels
    others = [{"name": call.name, "tensors": call.tensors} for call in calls if not call.triton]
    return {"kernels": len(calls) - len(others), "operations": others}


def recorded() -> tuple[int, list[Operation]]:
    """Launches of our own kernels in one step, and its other operations. Raises RuntimeError where it did not run."""
    program = "import json; from bench.aot.launches import record; print(json.dumps(record()))"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the step did not run in the interpreter: {done.stderr.strip()[-300:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    rows = found["operations"]
    return found["kernels"], [
        Operation(row["name"], tuple((tuple(shape), size) for shape, size in row["tensors"])) for row in rows
    ]


@dataclass(frozen=True)
class Small:
    """The operations of a step together, seconds."""

    calls: int
    launches: int
    bytes: float
    seconds: float


def small(
    found: list[Operation],
    case: Case,
    card: Card,
    kernels: int,
    others: float = 0.0,
    margin: float = MARGIN,
    share: Utilisation = EXPECTED,
) -> Small:
    """kernels: launches of the step's own, which cost a gap each. others: bytes of those that are not followed. margin:
    room for entries, for one that there is."""
    sizes = {"N": case.tokens, "d": case.d, "F": case.F, "room": int(margin * case.entries)}
    launches = kernels + len(found)
    moved = others + sum(operation.bytes(sizes) for operation in found)
    return Small(len(found), launches, moved, launches * LAUNCH + moved / card.hbm / share.hbm)
