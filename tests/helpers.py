"""What the kernel tests share: the error budget, inputs, shapes and memory layouts."""

import math

import pytest
import torch
from torch import Tensor

from bench.arithmetic import INSTRUCTION_DEPTH, truncation

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# The rounding band: one unit in the last place, for results that eager PyTorch happens to compute without any error.
TOLERANCES = {dtype: torch.finfo(dtype).eps for dtype in (*DTYPES, torch.float64)}


def errors(value: Tensor, exact: Tensor) -> dict[str, float]:
    """Error in the Euclidean norm and at the worst element, each relative to the same norm of ``exact``."""
    difference, exact = (value.double() - exact.double()).flatten(), exact.double().flatten()
    if exact.numel() == 0:
        return {"norm": 0.0, "max": 0.0}
    return {
        name: (norm(difference) / norm(exact)).item() if norm(exact) > 0 else norm(difference).item()
        for name, norm in (("norm", torch.linalg.vector_norm), ("max", lambda t: t.abs().amax()))
    }


def assert_within_budget(
    name: str,
    actual: Tensor,
    exact: Tensor,
    eager: Tensor,
    *,
    rounding: torch.dtype | None = None,
    slack: float = 0.0,
) -> float:
    """``actual`` is as good as eager PyTorch: err(actual, exact) ≤ 2·err(eager, exact) + one ulp, in both norms.

    exact: the reference run in fp64. eager: the reference run in the dtype under test. rounding: the coarsest dtype
    that a value passed through on its way, where that is not the dtype of ``actual`` (rounded GEMM operands, say).
    slack: what the hardware may be off by beyond that (`product_slack`, `exp_slack`).

    Not-finite elements must be the same ones in ``actual`` and ``eager``; the errors are taken over the rest. Returns
    the largest share that one of them takes of its limit.
    """
    assert actual.shape == exact.shape == eager.shape, f"{name}: shapes {actual.shape} {exact.shape} {eager.shape}"
    assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype}, expected {eager.dtype}"
    actual, exact, eager = actual.detach().cpu(), exact.detach().cpu(), eager.detach().cpu()
    finite = eager.isfinite()
    assert_same_not_finite(name, actual, eager)
    assert exact[finite].isfinite().all(), f"{name}: the fp64 reference is not finite where eager PyTorch is"
    band = TOLERANCES[rounding or actual.dtype]
    allowed, share = errors(eager[finite], exact[finite]), 0.0
    for norm, error in errors(actual[finite], exact[finite]).items():
        limit = 2 * allowed[norm] + band + slack
        assert error <= limit, f"{name}: {norm} error {error:.3g} exceeds {limit:.3g} (eager {allowed[norm]:.3g})"
        share = max(share, error / limit)
    return share


def products_of(x: Tensor) -> str:
    """What makes the products of ``x`` where it is: "fp32", or "bf16" for tensor cores with operands of 16 bits. (A
    test that asks for "tf32" knows.)"""
    return "bf16" if x.is_cuda and x.dtype != torch.float32 else "fp32"


def product_slack(depth: int, precision: str) -> float:
    """Relative error in either norm that sums of ``depth`` products may have beyond the budget: the truncation of
    tensor cores; with tf32 also the operands, of which the hardware cuts off up to 2⁻¹⁰ each."""
    return truncation(depth, precision) + (2 * 2.0**-10 if precision == "tf32" else 0.0)


def product_bound(depth: int, precision: str) -> float:
    """The error that no sum of ``depth`` products x·w, and a bias, can exceed, in units of Σ|x·w| and |bias|.

    fp32: as many roundings as terms. Tensor cores: the k products of an instruction and the accumulator each lose less
    than 2⁻²⁴ of the largest of them, the result less than 2⁻²³ of itself; tf32 operands less than 2⁻¹⁰ each.
    """
    if precision == "fp32":
        return (depth + 2) * 2.0**-24
    k = INSTRUCTION_DEPTH[precision]
    sums = (math.ceil(depth / k) * (k + 3) + 2) * 2.0**-24
    return sums + (2 * 2.0**-10 * (1 + 2.0**-10) if precision == "tf32" else 0.0)


def exp_slack(exponent: float) -> float:
    """Relative error of exp on a GPU, which is 2 to the power of a product rounded to fp32: that of the product, of its
    constant and of the instruction, which is good to 2⁻²²."""
    return 1.5 * abs(exponent) * 2.0**-24 + 2.0**-22


def assert_same_not_finite(name: str, actual: Tensor, expected: Tensor) -> None:
    """NaN at the same places, and the same infinities."""
    assert torch.equal(actual.isnan(), expected.isnan()), f"{name}: NaN at different places"
    infinite = expected.isinf()
    assert torch.equal(actual.isinf(), infinite), f"{name}: Inf at different places"
    assert torch.equal(actual[infinite], expected[infinite]), f"{name}: infinities of different sign"


def assert_bitwise_equal(name: str, actual: Tensor, expected: Tensor) -> None:
    """Same dtype, shape and values; NaN equals NaN."""
    assert actual.dtype == expected.dtype, f"{name}: dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, expected {expected.shape}"
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    assert same.all(), f"{name}: {(~same).sum().item()} of {same.numel()} elements differ"


def normal(*shape: int, dtype=torch.float32, device="cpu", seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).to(device, dtype)


def lattice(
    *shape: int, dtype=torch.float32, device="cpu", seed: int = 0, step: float = 0.25, reach: int = 8
) -> Tensor:
    """Random multiples of ``step`` up to ``reach`` steps from 0.

    Sums of them are exact in every dtype, so all precisions take the same decisions, and ties (z = θ, |z − θ| = ε/2)
    are common, while normal deviates never meet one.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(-reach, reach + 1, shape, generator=generator)
    return (step * steps).to(device, dtype)


def shape_cases(*blocks: int, empty: bool = True) -> list:
    """Named shapes, one size per block of the kernel under test, each with a reason to be there."""
    rank = len(blocks)
    cases = {
        "ones": (1,) * rank,  # broadcasting bugs and stride-1 specialisation of size-1 dimensions
        "odd": tuple(2 * i + 3 for i in range(rank)),  # below any block, no alignment
        "prime": (13, 37, 31)[:rank],  # nothing divides it
        "block-1": tuple(b - 1 for b in blocks),  # the last lane is masked
        "block": blocks,  # no lane is masked
        "block+1": tuple(b + 1 for b in blocks),  # a tail of one in a second block
    }
    if empty:
        for axis in range(rank):  # nothing to launch, results still defined
            cases[f"empty-{axis}"] = tuple(0 if i == axis else 3 for i in range(rank))
    return [pytest.param(*shape, id=f"{name}-{'x'.join(map(str, shape))}") for name, shape in cases.items()]


def _surrounded(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A NaN (integers: garbage) buffer, so that reading past a view shows."""
    fill = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    return torch.full(shape, fill, dtype=tensor.dtype, device=tensor.device)


def every_other(tensor: Tensor) -> Tensor:
    """Same values, every dimension strided by two."""
    buffer = _surrounded(tensor, tuple(2 * size for size in tensor.shape))
    view = buffer[tuple(slice(0, 2 * size, 2) for size in tensor.shape)]
    return view.copy_(tensor)


def transposed(tensor: Tensor) -> Tensor:
    """Same values, dimensions in the opposite order in memory."""
    order = tuple(reversed(range(tensor.ndim)))
    return tensor.permute(order).contiguous().permute(order)


def offset(tensor: Tensor) -> Tensor:
    """Same values, rows with a gap, starting one element into the storage: no 16-byte alignment anywhere."""
    buffer = _surrounded(tensor, (*tensor.shape[:-1], tensor.shape[-1] + 3))
    return buffer[..., 1 : tensor.shape[-1] + 1].copy_(tensor)


def expanded(tensor: Tensor) -> Tensor:
    """The first row repeated by stride 0 (a 1-D tensor: its first element)."""
    return tensor[:1].expand(tensor.shape) if tensor.shape[0] else tensor


LAYOUTS = {"every_other": every_other, "transposed": transposed, "offset": offset, "expanded": expanded}
