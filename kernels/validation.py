"""Argument checks of the operators: ValueError or TypeError naming the argument, what was expected and what came."""

import math
from typing import Any

import torch
from torch import Tensor

from .code import SparseCode
from .entries import ByLatent, DenseCode, Entries, LatentState, LatentSums, Objective, Rule

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MASTER = (torch.float32, torch.float64)


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" of torch.float32."""
    return str(dtype).removeprefix("torch.")


def check_number(
    name: str, value: float, low: float = -math.inf, high: float = math.inf, *, open_low: bool = False
) -> None:
    """Raise TypeError or ValueError unless ``value`` is a finite number in [low, high] (or (low, high])."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not (math.isfinite(value) and (low < value if open_low else low <= value) and value <= high):
        bounds = "" if low == -math.inf else f" {'>' if open_low else '≥'} {low:g}"
        bounds += "" if high == math.inf else f" and ≤ {high:g}"
        raise ValueError(f"{name}: expected a finite number{bounds}, got {value}")


def check_int(name: str, value: int, low: int) -> None:
    """Raise TypeError or ValueError unless ``value`` is an int of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < low:
        raise ValueError(f"{name}: expected at least {low}, got {value}")


def check_type(name: str, value: Any, kind: type) -> None:
    """Raise TypeError unless ``value`` is a ``kind``."""
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise TypeError(f"{name}: expected {article} {kind.__name__}, got {type(value).__name__}")


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
        expected = " or ".join(map(dtype_name, dtypes))
        raise TypeError(f"{name}: expected dtype {expected}, got {dtype_name(tensor.dtype)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}")


def _threshold_dtype(operand: Tensor) -> tuple[torch.dtype, ...]:
    return (torch.float64,) if operand.dtype == torch.float64 else (torch.float32,)


# ---- inference


def validate_jumprelu(pre: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float) -> None:
    check_tensor("pre", pre, ("N", "d_sae"))
    d_sae = pre.shape[1]
    check_tensor("b_enc", b_enc, (d_sae,), device=pre.device)
    check_tensor("threshold", threshold, (d_sae,), _threshold_dtype(pre), pre.device)
    check_number("bandwidth", bandwidth, 0, open_low=True)


def validate_product(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> None:
    check_tensor("x", x, ("N", "d_model"))
    check_tensor("W_enc", W_enc, (x.shape[1], "d_sae"), (x.dtype,), x.device)
    check_tensor("b_enc", b_enc, (W_enc.shape[1],), device=x.device)


def validate_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> None:
    validate_product(x, W_enc, b_enc)
    check_tensor("threshold", threshold, (W_enc.shape[1],), _threshold_dtype(x), x.device)


def validate_decode(code: SparseCode, W_dec: Tensor, b_dec: Tensor) -> None:
    check_type("code", code, SparseCode)
    check_tensor("W_dec", W_dec, ("d_sae", "d_model"))
    check_tensor("b_dec", b_dec, (W_dec.shape[1],), device=W_dec.device)
    if code.d_sae != W_dec.shape[0]:
        raise ValueError(f"code: expected d_sae = {W_dec.shape[0]} as in W_dec, got {code.d_sae}")
    check_tensor("code.values", code.values, ("nnz",), MASTER, W_dec.device)
    check_tensor("code.indices", code.indices, (code.values.shape[0],), (torch.int32,), W_dec.device)
    check_tensor("code.offsets", code.offsets, ("N + 1",), (torch.int64,), W_dec.device)
    if code.offsets.shape[0] == 0:
        raise ValueError("code.offsets: expected N + 1 entries, got none")


# ---- the training step


def validate_training_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float) -> None:
    validate_encode(x, W_enc, b_enc, threshold)
    check_number("bandwidth", bandwidth, 0, open_low=True)


def check_capacity(capacity: int | None) -> None:
    if capacity is not None:
        check_int("capacity", capacity, 0)


def check_entries(entries: Entries, device: torch.device) -> None:
    check_type("entries", entries, Entries)
    check_tensor("entries.z", entries.z, ("capacity",), MASTER, device)
    capacity = entries.z.shape[0]
    check_tensor("entries.latents", entries.latents, (capacity,), (torch.int32,), device)
    check_tensor("entries.tokens", entries.tokens, (capacity,), (torch.int32,), device)
    check_tensor("entries.offsets", entries.offsets, ("N + 1",), (torch.int64,), device)
    if entries.offsets.shape[0] == 0:
        raise ValueError("entries.offsets: expected N + 1 entries, got none")


def validate_residual_pass(entries: Entries, x: Tensor, W_dec: Tensor, b_dec: Tensor) -> None:
    check_tensor("W_dec", W_dec, ("d_sae", "d_model"))
    check_entries(entries, W_dec.device)
    check_tensor("x", x, (entries.offsets.shape[0] - 1, W_dec.shape[1]), MASTER, W_dec.device)
    check_tensor("b_dec", b_dec, (W_dec.shape[1],), MASTER, W_dec.device)


def check_by_latent(transposed: ByLatent, capacity: int, d_sae: int, device: torch.device) -> None:
    check_type("transposed", transposed, ByLatent)
    check_tensor("transposed.order", transposed.order, (capacity,), (torch.int64,), device)
    check_tensor("transposed.offsets", transposed.offsets, (d_sae + 1,), (torch.int64,), device)


def validate_latent_pass(
    entries: Entries, u: Tensor, transposed: ByLatent, threshold: Tensor, s: Tensor, objective: Objective
) -> None:
    check_tensor("threshold", threshold, ("d_sae",), MASTER)
    device = threshold.device
    check_entries(entries, device)
    check_tensor("u", u, (entries.z.shape[0],), MASTER, device)
    check_by_latent(transposed, entries.z.shape[0], threshold.shape[0], device)
    check_tensor("s", s, (entries.offsets.shape[0] - 1,), MASTER, device)
    validate_objective(objective)


def validate_objective(objective: Objective) -> None:
    check_type("objective", objective, Objective)
    check_number("objective.bandwidth", objective.bandwidth, 0, open_low=True)
    for name in ("frequency_slope", "tanh_slope", "tanh_scale"):
        check_number(f"objective.{name}", getattr(objective, name))
    check_type("objective.ste_to_z", objective.ste_to_z, bool)


def _check_sums(sums: LatentSums, transposed: ByLatent, d_sae: int, device: torch.device) -> None:
    check_type("sums", sums, LatentSums)
    capacity = transposed.order.shape[0]
    for name, shape, dtypes in (
        ("dec", (capacity,), MASTER),
        ("dz", (capacity,), MASTER),
        ("tokens", (capacity,), (torch.int32,)),
        ("db_enc", (d_sae,), MASTER),
        ("dthreshold", (d_sae,), MASTER),
        ("along", (d_sae,), MASTER),
        ("firing_count", (d_sae,), (torch.int32,)),
    ):
        check_tensor(f"sums.{name}", getattr(sums, name), shape, dtypes, device)


def _check_tables(residual: Tensor, x_centred: Tensor, d_model: int | str, device: torch.device) -> None:
    check_tensor("residual", residual, ("N", d_model), device=device)
    check_tensor("x_centred", x_centred, (residual.shape[0], residual.shape[1]), device=device)


def validate_weight_gradients(transposed: ByLatent, sums: LatentSums, residual: Tensor, x_centred: Tensor) -> None:
    check_type("transposed", transposed, ByLatent)
    d_sae, device = transposed.offsets.shape[0] - 1, transposed.offsets.device
    check_by_latent(transposed, transposed.order.shape[0], d_sae, device)
    _check_sums(sums, transposed, d_sae, device)
    _check_tables(residual, x_centred, "d_model", device)


def validate_encoder_times(W_enc: Tensor, db_enc: Tensor) -> None:
    check_tensor("W_enc", W_enc, ("d_sae", "d_model"))
    check_tensor("db_enc", db_enc, (W_enc.shape[0],), MASTER, W_enc.device)


def validate_dense_backward(u: Tensor, code: DenseCode, threshold: Tensor, s: Tensor, objective: Objective) -> None:
    check_tensor("u", u, ("N", "d_sae"))
    (n, d_sae), device = u.shape, u.device
    check_type("code", code, DenseCode)
    check_tensor("code.f", code.f, (n, d_sae), device=device)
    check_tensor("code.firing_count", code.firing_count, (d_sae,), (torch.int32,), device)
    check_tensor("threshold", threshold, (d_sae,), MASTER, device)
    check_tensor("s", s, (n,), MASTER, device)
    validate_objective(objective)


def check_state(state: LatentState) -> None:
    check_type("state", state, LatentState)
    check_tensor("state.W_dec", state.W_dec, ("d_sae", "d_model"), MASTER)
    (d_sae, d_model), dtype, device = state.W_dec.shape, (state.W_dec.dtype,), state.W_dec.device
    for name, shape, dtypes in (
        ("W_enc", (d_sae, d_model), dtype),
        ("b_enc", (d_sae,), dtype),
        ("threshold", (d_sae,), dtype),
        ("W_enc_v", (d_sae, d_model), dtype),
        ("W_dec_v", (d_sae, d_model), dtype),
        ("b_enc_v", (d_sae,), dtype),
        ("threshold_v", (d_sae,), dtype),
        ("last", (d_sae,), (torch.int64,)),
        ("W_enc_low", (d_sae, d_model), (torch.bfloat16,)),
        ("W_dec_low", (d_sae, d_model), (torch.bfloat16,)),
    ):
        if getattr(state, name) is not None or not name.endswith("_low"):
            check_tensor(f"state.{name}", getattr(state, name), shape, dtypes, device)
    for name, tensor in state._asdict().items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"state.{name}: expected a contiguous tensor, got strides {tensor.stride()}")


def check_rule(rule: Rule) -> None:
    check_type("rule", rule, Rule)
    check_number("rule.learning_rate", rule.learning_rate, 0)
    check_number("rule.beta2", rule.beta2, 0, 1, open_low=True)
    check_number("rule.eps", rule.eps, 0)
    check_type("rule.log_threshold", rule.log_threshold, bool)


def _check_scalars(ok: Tensor, step: Tensor, device: torch.device) -> None:
    check_tensor("ok", ok, (), (torch.int32,), device)
    check_tensor("step", step, (), (torch.int64,), device)


def validate_update_from_entries(
    state: LatentState, transposed: ByLatent, sums: LatentSums, residual: Tensor, x_centred: Tensor, rule: Rule,
    ok: Tensor, step: Tensor,
) -> None:  # fmt: skip
    check_state(state)
    (d_sae, d_model), device = state.W_dec.shape, state.W_dec.device
    check_type("transposed", transposed, ByLatent)
    check_by_latent(transposed, transposed.order.shape[0], d_sae, device)
    _check_sums(sums, transposed, d_sae, device)
    _check_tables(residual, x_centred, d_model, device)
    check_rule(rule)
    _check_scalars(ok, step, device)


def validate_update_from_dense(
    state: LatentState, dW_enc: Tensor, dW_dec: Tensor, db_enc: Tensor, dthreshold: Tensor, touched: Tensor,
    rule: Rule, ok: Tensor, step: Tensor,
) -> None:  # fmt: skip
    check_state(state)
    (d_sae, d_model), device = state.W_dec.shape, state.W_dec.device
    check_tensor("dW_enc", dW_enc, (d_sae, d_model), MASTER, device)
    check_tensor("dW_dec", dW_dec, (d_sae, d_model), MASTER, device)
    check_tensor("db_enc", db_enc, (d_sae,), MASTER, device)
    check_tensor("dthreshold", dthreshold, (d_sae,), MASTER, device)
    check_tensor("touched", touched, (d_sae,), (torch.int32,), device)
    check_rule(rule)
    _check_scalars(ok, step, device)


def validate_settle(state: LatentState, step: Tensor, beta2: float) -> None:
    check_state(state)
    check_tensor("step", step, (), (torch.int64,), state.W_dec.device)
    check_number("beta2", beta2, 0, 1, open_low=True)
