"""Choosing an implementation: explicit requests are met or refused with the reason, ``auto`` never fails."""

import sys

import pytest
import torch

from gemmascope import kernels
from gemmascope.kernels.cpu import build as native_build


@pytest.fixture
def interpreter(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_unknown_name():
    message = "impl: expected one of 'auto', 'reference', 'pytorch', 'cpu', 'triton', got 'cuda'"
    with pytest.raises(ValueError, match=message):
        kernels.choose("cuda", "cpu", torch.float32)


@pytest.mark.parametrize("impl", ["reference", "pytorch"])
def test_plain_pytorch_is_always_met(impl):
    assert kernels.choose(impl, "cuda", torch.float64) == (impl, "asked for")


@pytest.fixture
def no_native(monkeypatch):
    monkeypatch.setattr(native_build, "problem", lambda: "the native backend is not built")


@pytest.fixture
def with_native(monkeypatch):
    monkeypatch.setattr(native_build, "problem", lambda: None)
    monkeypatch.setattr(native_build, "isa", lambda: "avx2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_on_the_cpu(with_native, interpreter, dtype):
    """The native backend, and never Triton's interpreter, which is for tests."""
    assert kernels.choose("auto", "cpu", dtype) == ("cpu", "the native backend, avx2")
    assert kernels.choose("cpu", "cpu", dtype) == ("cpu", "asked for")


def test_auto_on_the_cpu_without_the_native_backend(no_native, interpreter):
    assert kernels.choose("auto", "cpu", torch.float32) == ("pytorch", "the native backend is not built")
    with pytest.raises(ValueError, match="impl='cpu': the native backend is not built"):
        kernels.choose("cpu", "cpu", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_native_dtypes(with_native, dtype):
    reason = f"the native backend takes float32 or bfloat16, not {str(dtype).removeprefix('torch.')}"
    assert kernels.choose("auto", "cpu", dtype) == ("pytorch", reason)
    with pytest.raises(ValueError, match=f"impl='cpu': {reason}"):
        kernels.choose("cpu", "cpu", dtype)


def test_explicit_native_refuses_the_gpu(with_native):
    with pytest.raises(ValueError, match="impl='cpu': the tensors are on cuda; the native backend is for the CPU"):
        kernels.choose("cpu", "cuda", torch.float32)


def test_auto_on_a_gpu(interpreter):
    assert kernels.choose("auto", "cuda", torch.bfloat16) == ("triton", "cuda tensors and bfloat16")


def test_auto_takes_plain_pytorch_for_fp64(interpreter):
    choice = kernels.choose("auto", "cuda", torch.float64)
    assert choice == ("pytorch", "the kernels take float32, float16 or bfloat16, not float64")


def test_explicit_triton_is_met_in_the_interpreter(interpreter):
    assert kernels.choose("triton", "cpu", torch.float16) == ("triton", "asked for")


def test_explicit_triton_refuses_the_cpu(no_interpreter):
    with pytest.raises(ValueError, match="impl='triton': the tensors are on cpu; the kernels run on a GPU"):
        kernels.choose("triton", "cpu", torch.float32)


def test_explicit_triton_refuses_fp64(interpreter):
    with pytest.raises(ValueError, match="impl='triton': the kernels take float32, float16 or bfloat16, not float64"):
        kernels.choose("triton", "cpu", torch.float64)


def test_explicit_triton_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match="impl='triton': triton is not installed"):
        kernels.choose("triton", "cuda", torch.float32)
    assert kernels.choose("auto", "cuda", torch.float32) == ("pytorch", "triton is not installed")


def test_explicit_triton_with_an_old_triton(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    with pytest.raises(ValueError, match=r"impl='triton': triton 3.5.1 is older than 3.6"):
        kernels.choose("triton", "cuda", torch.float32)


def call(name, impl):
    zeros = torch.zeros
    if name == "jumprelu":
        return kernels.jumprelu(zeros(2, 3), zeros(3), zeros(3), 0.5, impl=impl)
    if name == "encode":
        return kernels.encode(zeros(2, 4), zeros(4, 3), zeros(3), zeros(3), impl=impl)
    return kernels.decode(kernels.SparseCode.from_dense(torch.eye(2, 3)), zeros(3, 4), zeros(4), impl=impl)


OPERATORS = ("jumprelu", "encode", "decode")


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_never_fall_back(name, no_interpreter):
    with pytest.raises(ValueError, match="impl='triton': the tensors are on cpu"):
        call(name, "triton")


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_run_what_was_chosen(name, interpreter, sanitized_interpreter):
    call(name, "reference")
    call(name, "auto")
    assert sanitized_interpreter.launches == 0
    call(name, "triton")
    assert sanitized_interpreter.launches > 0


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_refuse_unknown_names(name):
    with pytest.raises(ValueError, match="impl: expected one of"):
        call(name, "Triton")
