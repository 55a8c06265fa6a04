"""Which numbers the products of a case are made of, "fp32", "tf32" or "bf16", and how far off their sums may be."""

import contextlib
import math
from collections.abc import Iterator

import torch

OPERAND_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
# Products that one instruction of a tensor core adds to its accumulator: 32 bytes of each operand.
INSTRUCTION_DEPTH = {"tf32": 8, "bf16": 16}


def truncation(depth: int, dtype: str) -> float:
    """Relative error of a sum of ``depth`` products on tensor cores, beyond that of rounding each to nearest in fp32.

    An instruction cuts off the bits of its sum that fp32 does not hold, half a unit in the last place on average: at
    most 2⁻²⁴ of the partial sum, always towards zero, so that the losses add up; and the partial sums of what ends
    large grow towards it.
    """
    return math.ceil(depth / INSTRUCTION_DEPTH[dtype]) * 2.0**-24 if dtype in INSTRUCTION_DEPTH else 0.0


@contextlib.contextmanager
def allowing_tf32(allowed: bool) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
