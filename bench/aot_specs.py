"""Which compilations `bench.aot` checks: every kernel in the configurations its operator file ships.

To add an operator: write a generator that takes the target and yields `Spec`s, with the block sizes and warps read from
the operator's own configuration table, and name it in `OPERATORS`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from gemmascope.kernels import _jumprelu


@dataclass(frozen=True)
class Spec:
    """One kernel as one launch would compile it.

    arguments: the type of every run-time argument in Triton's spelling: "*bf16" (pointer), "i32", "fp32",
    "tensordesc<bf16[128,64]>". Pointers and integers count as divisible by 16, like real tensors and sizes, unless the
    kernel does not specialise them or ``unaligned`` names them. constants: the constexpr arguments, and integers that
    are 1, which the JIT makes constant too. num_stages: None is the backend's default. expects: instruction classes
    of `bench.aot` that must occur. max_spill: bytes of spill stores and loads allowed.
    """

    name: str
    kernel: object
    arguments: dict[str, str]
    constants: dict[str, object]
    num_warps: int = 4
    num_stages: int | None = None
    unaligned: tuple[str, ...] = ()
    expects: tuple[str, ...] = field(default=())
    max_spill: int = 0


def jumprelu(target: str) -> Iterator[Spec]:
    counts = {"N": "i32", "F": "i32"}
    vector_load = ("load128",)
    for dtype in ("bf16", "fp32"):
        forward, backward = _jumprelu.FORWARD, _jumprelu.BACKWARD
        yield Spec(
            name=f"jumprelu_fwd_{dtype}",
            kernel=_jumprelu._jumprelu_fwd_kernel,
            arguments={
                "pre_ptr": f"*{dtype}",
                "b_enc_ptr": "*fp32",
                "threshold_ptr": "*fp32",
                "f_ptr": f"*{dtype}",
                "l0_ptr": "*i32",
                "firing_count_ptr": "*i32",
                "stride_pre_n": "i32",
                **counts,
            },
            constants={
                "stride_pre_f": 1,
                "BLOCK_N": forward.block_n,
                "BLOCK_F": forward.block_f,
                "TILES": forward.tiles,
            },
            num_warps=forward.num_warps,
            expects=vector_load,
        )
        yield Spec(
            name=f"jumprelu_bwd_{dtype}",
            kernel=_jumprelu._jumprelu_bwd_kernel,
            arguments={
                "grad_f_ptr": f"*{dtype}",
                "grad_l0_ptr": "*fp32",
                "pre_ptr": f"*{dtype}",
                "b_enc_ptr": "*fp32",
                "threshold_ptr": "*fp32",
                "dpre_ptr": f"*{dtype}",
                "partial_ptr": "*fp32",
                "bandwidth": "fp32",
                "half_bandwidth": "fp32",
                "stride_grad_f_n": "i32",
                "stride_pre_n": "i32",
                **counts,
            },
            constants={
                "stride_grad_f_f": 1,
                "stride_grad_l0": 1,
                "stride_pre_f": 1,
                "BLOCK_N": backward.block_n,
                "BLOCK_F": backward.block_f,
                "TILES": backward.tiles,
            },
            num_warps=backward.num_warps,
            expects=vector_load,
        )
    reduce = _jumprelu.REDUCE
    yield Spec(
        name="jumprelu_sum_partials",
        kernel=_jumprelu._sum_partials_kernel,
        arguments={
            "partial_ptr": "*fp32",
            "db_enc_ptr": "*fp32",
            "dthreshold_ptr": "*fp32",
            "N_PARTIAL": "i32",
            "F": "i32",
        },
        constants={"BLOCK_N": reduce.block_n, "BLOCK_F": reduce.block_f},
        num_warps=reduce.num_warps,
        expects=vector_load,
    )


OPERATORS = (jumprelu,)


def specs(target: str) -> list[Spec]:
    """Everything that is compiled for ``target`` ("sm_90", "gfx942", …)."""
    return [spec for operator in OPERATORS for spec in operator(target)]
