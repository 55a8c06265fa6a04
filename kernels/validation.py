"""Argument checks of the operators: ValueError or TypeError naming the argument, what was expected and what came."""

import math

import torch
from torch import Tensor

from .code import SparseCode

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensor(name: str, tensor: Tensor, shape: tuple[int | str, ...], dtypes=FLOATS, device=None) -> None:
    """``shape`` holds sizes and, for free dimensions, their names."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    matches = tensor.ndim == len(shape) and all(
        isinstance(want, str) or want == got for want, got in zip(shape, tensor.shape, strict=False)
    )
    if not matches:
        raise ValueError(f"{name}: expected shape [{', '.join(map(str, shape))}], got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        expected = " or ".join(map(_name, dtypes))
        raise TypeError(f"{name}: expected dtype {expected}, got {_name(tensor.dtype)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}")


def _threshold_dtype(operand: Tensor) -> tuple[torch.dtype, ...]:
    return (torch.float64,) if operand.dtype == torch.float64 else (torch.float32,)


def validate_jumprelu(pre: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float) -> None:
    check_tensor("pre", pre, ("N", "d_sae"))
    d_sae = pre.shape[1]
    check_tensor("b_enc", b_enc, (d_sae,), device=pre.device)
    check_tensor("threshold", threshold, (d_sae,), _threshold_dtype(pre), pre.device)
    check_bandwidth(bandwidth)


def check_bandwidth(bandwidth: float) -> None:
    if isinstance(bandwidth, bool) or not isinstance(bandwidth, (int, float)):
        raise TypeError(f"bandwidth: expected a number, got {type(bandwidth).__name__}")
    if not (math.isfinite(bandwidth) and bandwidth > 0):
        raise ValueError(f"bandwidth: expected a finite number > 0, got {bandwidth}")


def validate_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> None:
    check_tensor("x", x, ("N", "d_model"))
    check_tensor("W_enc", W_enc, (x.shape[1], "d_sae"), (x.dtype,), x.device)
    check_tensor("b_enc", b_enc, (W_enc.shape[1],), device=x.device)
    check_tensor("threshold", threshold, (W_enc.shape[1],), _threshold_dtype(x), x.device)


def validate_decode(code: SparseCode, W_dec: Tensor, b_dec: Tensor) -> None:
    if not isinstance(code, SparseCode):
        raise TypeError(f"code: expected a SparseCode, got {type(code).__name__}")
    check_tensor("W_dec", W_dec, ("d_sae", "d_model"))
    check_tensor("b_dec", b_dec, (W_dec.shape[1],), device=W_dec.device)
    if code.d_sae != W_dec.shape[0]:
        raise ValueError(f"code: expected d_sae = {W_dec.shape[0]} as in W_dec, got {code.d_sae}")
    check_tensor("code.values", code.values, ("nnz",), (torch.float32, torch.float64), W_dec.device)
    check_tensor("code.indices", code.indices, (code.values.shape[0],), (torch.int32,), W_dec.device)
    check_tensor("code.offsets", code.offsets, ("N + 1",), (torch.int64,), W_dec.device)
    if code.offsets.shape[0] == 0:
        raise ValueError("code.offsets: expected N + 1 entries, got none")
