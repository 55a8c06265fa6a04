"""`Spec`: one kernel as one launch would compile it, and what the lists of them share."""

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Spec:
    """One kernel as one launch would compile it.

    arguments: the type of every run-time argument in Triton's spelling: "*bf16" (pointer), "i32", "fp32",
    "tensordesc<bf16[128,64]>". Pointers and integers count as divisible by 16, like real tensors and sizes, unless the
    kernel does not specialise them or ``unaligned`` names them. constants: the constexpr arguments, and integers that
    are 1, which the JIT makes constant too. num_stages: None is the backend's default. expects: instruction classes
    of `bench.aot.compilation` that must occur. max_spill: bytes of spill stores and loads allowed.
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


def matrix_instruction(target: str, dtype: str, block_m: int) -> str:
    """The instruction class that ``tl.dot`` should become."""
    if target.startswith("gfx"):
        return "mfma"
    wide = {"sm_90": "HGMMA", "sm_100": "tcgen05"}.get(target)
    return wide if wide and block_m >= 64 else "HMMA"


def with_ones(spec: Spec, *sizes: str) -> Spec:
    """The compilation for sizes of 1, which the JIT makes constants and the interpreter does not show."""
    arguments = {name: kind for name, kind in spec.arguments.items() if name not in sizes}
    constants = spec.constants | dict.fromkeys(sizes, 1)
    return replace(spec, name=f"{spec.name}_ones", arguments=arguments, constants=constants, expects=())
