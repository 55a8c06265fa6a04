"""Choosing an implementation: explicit requests are met or refused with the reason, ``auto`` never fails."""

import pytest
import torch

from gemmascope import kernels
from gemmascope.kernels import dispatch


@pytest.fixture
def interpreter(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_unknown_name():
    with pytest.raises(ValueError, match="impl: expected one of 'auto', 'reference', 'triton', got 'cuda'"):
        kernels.choose("cuda", "cpu", torch.float32)


def test_reference_is_always_met():
    assert kernels.choose("reference", "cuda", torch.float64) == ("reference", "asked for")


def test_auto_on_the_cpu_says_why(no_interpreter):
    choice = kernels.choose("auto", "cpu", torch.float32)
    assert choice.impl == "reference"
    assert "the tensors are on cpu; the kernels run on a GPU" in choice.reason


def test_auto_does_not_choose_the_interpreter(interpreter):
    choice = kernels.choose("auto", "cpu", torch.float32)
    assert choice == ("reference", "the tensors are on cpu; the interpreter is for tests and must be asked for")


def test_auto_on_a_gpu(interpreter):
    assert kernels.choose("auto", "cuda", torch.bfloat16) == ("triton", "cuda tensors and bfloat16")


def test_auto_takes_the_reference_for_fp64(interpreter):
    choice = kernels.choose("auto", "cuda", torch.float64)
    assert choice == ("reference", "the kernels take float32, float16 or bfloat16, not float64")


def test_explicit_triton_is_met_in_the_interpreter(interpreter):
    assert kernels.choose("triton", "cpu", torch.float16) == ("triton", "asked for")


def test_explicit_triton_refuses_the_cpu(no_interpreter):
    with pytest.raises(ValueError, match="impl='triton': the tensors are on cpu; the kernels run on a GPU"):
        kernels.choose("triton", "cpu", torch.float32)


def test_explicit_triton_refuses_fp64(interpreter):
    with pytest.raises(ValueError, match="impl='triton': the kernels take float32, float16 or bfloat16, not float64"):
        kernels.choose("triton", "cpu", torch.float64)


def test_explicit_triton_without_triton(monkeypatch):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="impl='triton': triton is not installed"):
        kernels.choose("triton", "cuda", torch.float32)
    assert kernels.choose("auto", "cuda", torch.float32) == ("reference", "triton is not installed")


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
