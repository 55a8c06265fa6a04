"""Which compilations `bench.aot` checks: every kernel in the configurations its operator file ships.

To add an operator: write a generator that takes the target and yields `Spec`s, with the block sizes and warps read from
the operator's own configuration table, in `inference.py` or `training.py`, and name it in `OPERATORS`.
"""

from bench.aot.inference import decode, encode, jumprelu
from bench.aot.spec import Spec
from bench.aot.training import around_the_step, dense, sparse_step, topk, training_encode

OPERATORS = (jumprelu, encode, training_encode, topk, dense, decode, sparse_step, around_the_step)


def specs(target: str) -> list[Spec]:
    """Everything that is compiled for ``target`` ("sm_90", "gfx942", …)."""
    return [spec for operator in OPERATORS for spec in operator(target)]
