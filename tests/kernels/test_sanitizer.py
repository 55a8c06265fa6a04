"""The sanitizer finds what it claims to find, and lets correct kernels pass."""

import contextlib

import pytest
import torch

from tests.helpers import assert_bitwise_equal, normal
from tests.kernels import sanitizer

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.runtime.interpreter import InterpreterBuilder, InterpreterError  # noqa: E402

from gemmascope.kernels.dispatch import interpreting  # noqa: E402

pytestmark = pytest.mark.skipif(not interpreting(), reason="kernels are compiled here, not interpreted")


@triton.jit
def _copy_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < (N if MASKED else N + BLOCK)
    tl.store(out_ptr + index, tl.load(x_ptr + index, mask=mask, other=0.0), mask=mask)


@triton.jit
def _shifted_load_kernel(x_ptr, out_ptr, shift, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(out_ptr + index, tl.load(x_ptr + shift + index))


@triton.jit
def _sum_kernel(x_ptr, out_ptr, ATOMIC: tl.constexpr):
    value = tl.load(x_ptr + tl.program_id(0))
    if ATOMIC:
        tl.atomic_add(out_ptr, value)
    else:
        tl.store(out_ptr, tl.load(out_ptr) + value)


@triton.jit
def _overlapping_store_kernel(out_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.program_id(0) * WIDTH + tl.arange(0, BLOCK), tl.program_id(0))


@triton.jit
def _colliding_lanes_kernel(out_ptr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(out_ptr + lane // 2, lane)


@triton.jit
def _read_of_neighbour_kernel(x_ptr, BLOCK: tl.constexpr):
    program, lane = tl.program_id(0), tl.arange(0, BLOCK)
    neighbour = tl.load(x_ptr + ((program + 1) % 2) * BLOCK + lane)
    tl.store(x_ptr + program * BLOCK + lane, neighbour)


@triton.jit
def _order_kernel(out_ptr, counter_ptr):
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(out_ptr + program, tl.atomic_add(counter_ptr, 1))


@triton.jit
def _bf16_kernel(x_ptr, y_ptr, dot_ptr, cast_ptr, B: tl.constexpr):
    tile = tl.arange(0, B)[:, None] * B + tl.arange(0, B)[None, :]
    x, y = tl.load(x_ptr + tile), tl.load(y_ptr + tile)
    tl.store(dot_ptr + tile, tl.dot(x, y))
    tl.store(cast_ptr + tile, (x.to(tl.float32) * y.to(tl.float32)).to(tl.bfloat16))


@triton.jit
def _bf16_add_kernel(x_ptr, out_ptr, B: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, B))
    tl.store(out_ptr + tl.arange(0, B), x + x)


@triton.jit
def _loop_kernel(x_ptr, out_ptr, count_ptr, BLOCK: tl.constexpr):
    count, total = tl.load(count_ptr), tl.zeros([BLOCK], tl.int32)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + index, mask=(index < count) & (count > 2), other=0)
    tl.store(out_ptr, tl.sum(total, axis=0))


def test_correct_kernel_passes_and_is_counted():
    x, out = normal(37), torch.zeros(37)
    with sanitizer.sanitize(seed=1) as report:
        _copy_kernel[(3,)](x, out, 37, BLOCK=16, MASKED=True)
    assert_bitwise_equal("copy", out, x)
    assert (report.launches, report.programs, report.elements) == (1, 3, 74)


def test_dropped_mask_is_out_of_bounds():
    with pytest.raises(sanitizer.OutOfBoundsError, match="program 2: load of 4 bytes out of bounds of x_ptr"):
        _copy_kernel[(3,)](normal(37), torch.zeros(37), 37, BLOCK=16, MASKED=False)


@pytest.mark.parametrize("shift", [-1, 1])
def test_access_that_lands_in_a_neighbouring_tensor_is_out_of_bounds(shift):
    memory = torch.arange(48.0)
    x, before, after = memory[16:32], memory[:16], memory[32:]
    with pytest.raises(sanitizer.OutOfBoundsError, match="x_ptr"):
        _shifted_load_kernel[(1,)](x, after if shift > 0 else before, shift, BLOCK=16)


def test_access_to_an_empty_tensor_is_out_of_bounds():
    with pytest.raises(sanitizer.OutOfBoundsError):
        _copy_kernel[(1,)](torch.zeros(0), torch.zeros(16), 16, BLOCK=16, MASKED=True)


def test_plain_accumulation_is_a_race_and_atomic_is_not():
    x = torch.arange(4, dtype=torch.int32)
    with pytest.raises(sanitizer.RaceError, match="program 1: load meets an access by program 0"):
        _sum_kernel[(4,)](x, torch.zeros(1, dtype=torch.int32), ATOMIC=False)
    out = torch.zeros(1, dtype=torch.int32)
    _sum_kernel[(4,)](x, out, ATOMIC=True)
    assert out.item() == 6


def test_overlapping_stores_are_a_race():
    with pytest.raises(sanitizer.RaceError, match="store meets an access by program 0"):
        _overlapping_store_kernel[(2,)](torch.zeros(32, dtype=torch.int32), WIDTH=15, BLOCK=16)
    _overlapping_store_kernel[(2,)](torch.zeros(32, dtype=torch.int32), WIDTH=16, BLOCK=16)


def test_two_lanes_of_one_store_are_a_race():
    with pytest.raises(sanitizer.RaceError, match="two lanes of one store"):
        _colliding_lanes_kernel[(1,)](torch.zeros(16, dtype=torch.int32), BLOCK=16)


def test_reading_what_another_program_writes_is_a_race():
    with pytest.raises(sanitizer.RaceError):
        _read_of_neighbour_kernel[(2,)](torch.zeros(32), BLOCK=16)
    with sanitizer.sanitize(race=False):
        _read_of_neighbour_kernel[(2,)](torch.zeros(32), BLOCK=16)


def test_seed_shuffles_programs_and_programs_selects_them():
    def order(**options):
        out, counter = torch.full((16,), -1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        with sanitizer.sanitize(**options):
            _order_kernel[lambda meta: (4, 4)](out, counter)
        return out.tolist()

    assert order() == list(range(16))
    shuffled = order(seed=0)
    assert shuffled != list(range(16))
    assert sorted(shuffled) == list(range(16))
    assert order(seed=0) == shuffled
    assert order(programs=lambda dims: [dims[0] * dims[1] - 1]) == [-1] * 15 + [0]


def test_bf16_dot_and_rounding():
    x, y = normal(16, 16, dtype=torch.bfloat16), normal(16, 16, dtype=torch.bfloat16, seed=1)
    dot, cast = torch.zeros(16, 16), torch.zeros(16, 16, dtype=torch.bfloat16)
    _bf16_kernel[(1,)](x, y, dot, cast, B=16)
    torch.testing.assert_close(dot, x.float() @ y.float(), rtol=1e-6, atol=1e-6)
    assert_bitwise_equal("rounded product", cast, (x.float() * y.float()).bfloat16())


def test_bf16_arithmetic_is_refused():
    with pytest.raises(sanitizer.BFloat16ArithmeticError, match="convert to fp32 first"):
        _bf16_add_kernel[(1,)](normal(16, dtype=torch.bfloat16), torch.zeros(16), B=16)


def test_runtime_loop_bound_and_scalar_comparison_in_a_mask():
    x, out = torch.arange(37, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    _loop_kernel[(1,)](x, out, torch.tensor([37], dtype=torch.int32), BLOCK=16)
    assert out.item() == sum(range(37))


def test_other_errors_are_not_swallowed():
    with pytest.raises(InterpreterError):
        _copy_kernel[(1,)](normal(16), torch.zeros(16), 16, BLOCK=15, MASKED=True)


def test_patches_are_undone():
    before = {name: getattr(InterpreterBuilder, name) for name in dir(InterpreterBuilder)}
    with contextlib.ExitStack() as stack:
        sanitizer._install(stack)
        assert InterpreterBuilder.cast_impl is not before["cast_impl"]
    assert {name: getattr(InterpreterBuilder, name) for name in dir(InterpreterBuilder)} == before


def test_poisoned_memory_reaches_the_kernels_package_only(monkeypatch):
    namespace = {"__name__": "gemmascope.kernels.probe", "torch": torch}
    with torch.device("cpu"):
        exec("fresh = torch.empty(3), torch.empty(3, dtype=torch.int32), torch.ones(2).new_empty(4)", namespace)
    floats, ints, new = namespace["fresh"]
    assert floats.isnan().all()
    assert new.isnan().all()
    assert (ints == 0x5A5A5A5A).all()
    namespace["__name__"] = "somewhere.else"
    with monkeypatch.context() as patch:
        patch.setattr("tests.conftest.poison", lambda tensor: pytest.fail("poisoned a foreign tensor"))
        exec("torch.empty(3)", namespace)
