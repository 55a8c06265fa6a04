"""Argument checks of the operators: ValueError or TypeError naming the argument, what was expected and what came."""

import math

import torch
from torch import Tensor

from .arguments import (
    FLOATS,
    check_indices,
    check_int,
    check_number,
    check_plain,
    check_present,
    check_starts,
    check_tensor,
    check_type,
)
from .arguments import as_device as as_device
from .arguments import dtype_name as dtype_name
from .code import SparseCode
from .entries import LATENT, ByLatent, DenseCode, Entries, LatentState, LatentSums, Objective, Rule

MASTER = (torch.float32, torch.float64)
# Room for more entries than there can be; beyond it a number of bytes is no int64.
LARGEST_CAPACITY = 1 << 60
LATEST_STEP = 1 << 53  # as an fp64, in which powers are taken
SMALLEST_NORMAL, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def _threshold_dtype(operand: Tensor) -> tuple[torch.dtype, ...]:
    return (torch.float64,) if operand.dtype == torch.float64 else (torch.float32,)


def check_bandwidth(name: str, bandwidth: float) -> None:
    """A finite number > 0, in fp32 too: one that vanished there would divide by 0."""
    check_number(name, bandwidth, 0, open_low=True)
    check_number(name, bandwidth, SMALLEST_NORMAL, LARGEST)


def check_scalar(name: str, value: float | Tensor, device: torch.device, low: float = -math.inf) -> None:
    """A finite number of at least ``low``, or a 0-d tensor of one on ``device``, where a GPU's is trusted."""
    if isinstance(value, Tensor):
        check_tensor(name, value, (), MASTER, device)
        if value.device.type != "cpu":  # a look at it would wait for the device
            return
        value = float(value.detach())
    check_number(name, value, low)


# ---- inference


def validate_jumprelu(pre: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float) -> None:
    check_tensor("pre", pre, ("N", "d_sae"))
    d_sae = pre.shape[1]
    check_tensor("b_enc", b_enc, (d_sae,), device=pre.device)
    check_tensor("threshold", threshold, (d_sae,), _threshold_dtype(pre), pre.device)
    check_bandwidth("bandwidth", bandwidth)


def validate_product(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> None:
    check_tensor("x", x, ("N", "d_model"))
    check_tensor("W_enc", W_enc, (x.shape[1], "d_sae"), (x.dtype,), x.device)
    check_tensor("b_enc", b_enc, (W_enc.shape[1],), device=x.device)


def validate_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> None:
    validate_product(x, W_enc, b_enc)
    check_present("x", x)
    check_tensor("threshold", threshold, (W_enc.shape[1],), _threshold_dtype(x), x.device)


def validate_decode(code: SparseCode, W_dec: Tensor, b_dec: Tensor) -> None:
    check_type("code", code, SparseCode)
    check_tensor("W_dec", W_dec, ("d_sae", "d_model"))
    check_tensor("b_dec", b_dec, (W_dec.shape[1],), device=W_dec.device)
    code.check_tensors()
    if code.d_sae != W_dec.shape[0]:
        raise ValueError(f"code: expected d_sae = {W_dec.shape[0]} as in W_dec, got {code.d_sae}")
    if code.values.device != W_dec.device:
        raise ValueError(f"code.values: expected device {W_dec.device}, got {code.values.device}")


# ---- the training step


def validate_training_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float, tf32: bool
) -> None:
    validate_encode(x, W_enc, b_enc, threshold)
    check_bandwidth("bandwidth", bandwidth)
    check_type("tf32", tf32, bool)


def validate_encode_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, of: str, among: Tensor | None, tf32: bool
) -> None:
    validate_product(x, W_enc, b_enc)
    check_present("x", x)
    d_sae = W_enc.shape[1]
    if d_sae == 0:
        raise ValueError(f"W_enc: expected at least one latent, got shape {list(W_enc.shape)}")
    check_int("k", k, 1)
    if k > d_sae:
        raise ValueError(f"k: expected 1 to d_sae = {d_sae}, got {k}")
    check_type("of", of, str)
    if of not in ("token", "batch"):
        raise ValueError(f"of: expected 'token' or 'batch', got {of!r}")
    if among is not None:
        check_tensor("among", among, (d_sae,), (torch.bool,), x.device)
    check_type("tf32", tf32, bool)


def check_capacity(capacity: int | None) -> None:
    if capacity is not None:
        check_int("capacity", capacity, 0, LARGEST_CAPACITY)


def check_entries(entries: Entries, device: torch.device | None = None) -> None:
    check_type("entries", entries, Entries)
    check_tensor("entries.z", entries.z, ("capacity",), MASTER, device)
    capacity, device = entries.z.shape[0], entries.z.device
    check_tensor("entries.latents", entries.latents, (capacity,), (torch.int32,), device)
    check_tensor("entries.tokens", entries.tokens, (capacity,), (torch.int32,), device)
    check_tensor("entries.offsets", entries.offsets, ("N + 1",), (torch.int64,), device)
    if entries.offsets.shape[0] == 0:
        raise ValueError("entries.offsets: expected N + 1 entries, got none")


def check_places(entries: Entries, d_sae: int) -> None:
    """What the stored entries say of tokens and latents: nothing outside of [N, d_sae]."""
    check_starts("entries.offsets", entries.offsets)
    if entries.offsets.device.type == "cpu":  # elsewhere it would wait for the device
        stored = min(int(entries.offsets[-1]), entries.z.shape[0])
        check_indices("entries.latents", entries.latents[:stored] & LATENT, d_sae)
        check_indices("entries.tokens", entries.tokens[:stored], entries.offsets.shape[0] - 1)


def check_lists(transposed: ByLatent) -> None:
    """Latents' lists lie within the capacity, and so do their entries."""
    capacity = transposed.order.shape[0]
    check_starts("transposed.offsets", transposed.offsets, most=capacity)
    if transposed.offsets.device.type == "cpu":
        check_indices("transposed.order", transposed.order[: int(transposed.offsets[-1])], capacity)


def check_listed_tokens(sums: LatentSums, transposed: ByLatent, n_tokens: int) -> None:
    """`check_lists`, and their tokens are rows of the tables that they pick from."""
    check_lists(transposed)
    if transposed.offsets.device.type == "cpu":
        check_indices("sums.tokens", sums.tokens[: int(transposed.offsets[-1])], n_tokens)


def validate_by_latent(entries: Entries, d_sae: int) -> None:
    check_entries(entries)
    check_int("d_sae", d_sae, 0, LATENT)


def validate_residual_pass(entries: Entries, x: Tensor, W_dec: Tensor, b_dec: Tensor) -> None:
    check_tensor("W_dec", W_dec, ("d_sae", "d_model"))
    check_entries(entries, W_dec.device)
    check_tensor("x", x, (entries.offsets.shape[0] - 1, W_dec.shape[1]), MASTER, W_dec.device)
    check_tensor("b_dec", b_dec, (W_dec.shape[1],), MASTER, W_dec.device)


def check_by_latent(
    transposed: ByLatent, capacity: int | str, starts: int | str, device: torch.device | None = None
) -> None:
    check_type("transposed", transposed, ByLatent)
    check_tensor("transposed.order", transposed.order, (capacity,), (torch.int64,), device)
    check_tensor("transposed.offsets", transposed.offsets, (starts,), (torch.int64,), transposed.order.device)
    if transposed.offsets.shape[0] == 0:
        raise ValueError("transposed.offsets: expected d_sae + 1 entries, got none")


def validate_latent_pass(
    entries: Entries, u: Tensor, transposed: ByLatent, threshold: Tensor, s: Tensor, objective: Objective
) -> None:
    check_tensor("threshold", threshold, ("d_sae",), MASTER)
    device = threshold.device
    check_entries(entries, device)
    check_tensor("u", u, (entries.z.shape[0],), (threshold.dtype,), device)
    check_by_latent(transposed, entries.z.shape[0], threshold.shape[0] + 1, device)
    check_tensor("s", s, (entries.offsets.shape[0] - 1,), (threshold.dtype,), device)
    validate_objective(objective, device)


def validate_objective(objective: Objective, device: torch.device | None) -> None:
    """device: that of slopes that come as tensors; None where they are numbers only."""
    check_type("objective", objective, Objective)
    check_bandwidth("objective.bandwidth", objective.bandwidth)
    for name in ("frequency_slope", "tanh_slope"):
        slope = getattr(objective, name)
        if device is None:
            check_number(f"objective.{name}", slope)
        else:
            check_scalar(f"objective.{name}", slope, device)
    check_number("objective.tanh_scale", objective.tanh_scale)
    check_type("objective.ste_to_z", objective.ste_to_z, bool)


def _check_sums(sums: LatentSums, transposed: ByLatent, d_sae: int, dtypes: tuple[torch.dtype, ...]) -> None:
    """dtypes: those that ``dz`` may have; the others are of the same."""
    check_type("sums", sums, LatentSums)
    capacity, device = transposed.order.shape[0], transposed.order.device
    check_tensor("sums.dz", sums.dz, (capacity,), dtypes, device)
    dtype = (sums.dz.dtype,)
    for name, shape, dtypes in (
        ("dec", (capacity,), dtype),
        ("tokens", (capacity,), (torch.int32,)),
        ("db_enc", (d_sae,), dtype),
        ("dthreshold", (d_sae,), dtype),
        ("along", (d_sae,), dtype),
        ("firing_count", (d_sae,), (torch.int32,)),
    ):
        check_tensor(f"sums.{name}", getattr(sums, name), shape, dtypes, device)


def _check_tables(residual: Tensor, x_centred: Tensor, d_in: int | str, d_out: int | str, device: torch.device) -> None:
    check_tensor("residual", residual, ("N", d_out), device=device)
    check_tensor("x_centred", x_centred, (residual.shape[0], d_in), (residual.dtype,), device)


def validate_weight_gradients(transposed: ByLatent, sums: LatentSums, residual: Tensor, x_centred: Tensor) -> None:
    check_by_latent(transposed, "capacity", "d_sae + 1")
    d_sae, device = transposed.offsets.shape[0] - 1, transposed.offsets.device
    _check_sums(sums, transposed, d_sae, MASTER)
    _check_tables(residual, x_centred, "d_in", "d_out", device)


def validate_encoder_times(W_enc: Tensor, db_enc: Tensor) -> None:
    check_tensor("W_enc", W_enc, ("d_sae", "d_model"))
    check_tensor("db_enc", db_enc, (W_enc.shape[0],), MASTER, W_enc.device)


def check_overwritten(u: Tensor) -> None:
    check_tensor("u", u, ("N", "d_sae"))
    if any(stride == 0 and size > 1 for stride, size in zip(u.stride(), u.shape, strict=True)):
        raise ValueError(f"u: expected elements of their own memory, got strides {list(u.stride())}")


def validate_dense_backward(
    u: Tensor, code: DenseCode, threshold: Tensor, s: Tensor, objective: Objective, bits: bool
) -> None:
    """bits: whether the implementation has the masks as words of bits."""
    (n, d_sae), device = u.shape, u.device
    check_type("code", code, DenseCode)
    check_tensor("code.f", code.f, (n, d_sae), device=device)
    for name in ("active", "window"):
        if bits:
            check_tensor(f"code.{name}", getattr(code, name), (n, (d_sae + 31) // 32), (torch.int32,), device)
        else:
            check_tensor(f"code.{name}", getattr(code, name), (n, d_sae), (torch.bool, *FLOATS), device)
    check_tensor("code.firing_count", code.firing_count, (d_sae,), (torch.int32,), device)
    for name in ("l0", "touched", "n_entries"):  # which the backward does not read
        if isinstance(getattr(code, name), Tensor):
            check_plain(f"code.{name}", getattr(code, name))
    check_tensor("threshold", threshold, (d_sae,), _threshold_dtype(u), device)
    check_tensor("s", s, (n,), _threshold_dtype(u), device)
    validate_objective(objective, None)


def check_state(state: LatentState) -> None:
    check_type("state", state, LatentState)
    check_tensor("state.W_dec", state.W_dec, ("d_sae", "d_out"), MASTER)
    (d_sae, d_out), dtype, device = state.W_dec.shape, (state.W_dec.dtype,), state.W_dec.device
    check_tensor("state.W_enc", state.W_enc, (d_sae, "d_in"), dtype, device)
    d_in = state.W_enc.shape[1]
    for name, shape, dtypes in (
        ("b_enc", (d_sae,), dtype),
        ("threshold", (d_sae,), dtype),
        ("W_enc_v", (d_sae, d_in), dtype),
        ("W_dec_v", (d_sae, d_out), dtype),
        ("b_enc_v", (d_sae,), dtype),
        ("threshold_v", (d_sae,), dtype),
        ("last", (d_sae,), (torch.int64,)),
        ("W_enc_low", (d_sae, d_in), (torch.bfloat16,)),
        ("W_dec_low", (d_sae, d_out), (torch.bfloat16,)),
        ("W_enc_m", (d_sae, d_in), dtype),
        ("W_dec_m", (d_sae, d_out), dtype),
        ("b_enc_m", (d_sae,), dtype),
        ("threshold_m", (d_sae,), dtype),
    ):
        if getattr(state, name) is not None or not name.endswith(("_low", "_m")):
            check_tensor(f"state.{name}", getattr(state, name), shape, dtypes, device)
    for name, tensor in state._asdict().items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"state.{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    first = {name: getattr(state, name) is not None for name in ("W_enc_m", "W_dec_m", "b_enc_m", "threshold_m")}
    if len(set(first.values())) > 1:
        missing = ", ".join(name for name, there in first.items() if not there)
        raise ValueError(f"state: expected all four first moments or none, got None for {missing}")


def check_first_moments(state: LatentState, beta1: float, name: str) -> None:
    check_number(name, beta1, 0, 1)
    if beta1 == 1:
        raise ValueError(f"{name}: expected a number below 1, with which moments would stay as they are, got 1")
    if (beta1 > 0) != (state.W_enc_m is not None):
        there = "none" if state.W_enc_m is None else "some"
        raise ValueError(f"state: expected first moments where {name} is above 0 alone, got {there} with {beta1}")


def check_rule(rule: Rule, device: torch.device) -> None:
    check_type("rule", rule, Rule)
    check_scalar("rule.learning_rate", rule.learning_rate, device, 0)
    check_number("rule.beta2", rule.beta2, 0, 1, open_low=True)
    if rule.beta2 == 1:
        raise ValueError("rule.beta2: expected a number below 1, with which moments would stay as they are, got 1")
    check_number("rule.eps", rule.eps, 0)
    check_type("rule.log_threshold", rule.log_threshold, bool)


def _check_scalars(ok: Tensor, step: Tensor, device: torch.device) -> None:
    check_tensor("ok", ok, (), (torch.int32,), device)
    check_step(step, device)


def check_step(step: Tensor, device: torch.device) -> None:
    check_tensor("step", step, (), (torch.int64,), device)
    if device.type == "cpu":  # elsewhere it would wait for the device
        check_int("step", int(step), 0, LATEST_STEP)


def validate_update_from_entries(
    state: LatentState, transposed: ByLatent, sums: LatentSums, residual: Tensor, x_centred: Tensor, rule: Rule,
    ok: Tensor, step: Tensor,
) -> None:  # fmt: skip
    check_state(state)
    d_sae, device = state.W_dec.shape[0], state.W_dec.device
    check_by_latent(transposed, "capacity", d_sae + 1, device)
    _check_sums(sums, transposed, d_sae, (state.W_dec.dtype,))
    _check_tables(residual, x_centred, state.W_enc.shape[1], state.W_dec.shape[1], device)
    check_rule(rule, device)
    check_first_moments(state, rule.beta1, "rule.beta1")
    _check_scalars(ok, step, device)


def validate_update_from_dense(
    state: LatentState, dW_enc: Tensor, dW_dec: Tensor, db_enc: Tensor, dthreshold: Tensor, touched: Tensor,
    rule: Rule, ok: Tensor, step: Tensor,
) -> None:  # fmt: skip
    check_state(state)
    (d_sae, d_out), device = state.W_dec.shape, state.W_dec.device
    dtype = (state.W_dec.dtype,)
    check_tensor("dW_enc", dW_enc, (d_sae, state.W_enc.shape[1]), dtype, device)
    check_tensor("dW_dec", dW_dec, (d_sae, d_out), dtype, device)
    check_tensor("db_enc", db_enc, (d_sae,), dtype, device)
    check_tensor("dthreshold", dthreshold, (d_sae,), dtype, device)
    check_tensor("touched", touched, (d_sae,), (torch.int32,), device)
    check_rule(rule, device)
    check_first_moments(state, rule.beta1, "rule.beta1")
    _check_scalars(ok, step, device)


def validate_settle(state: LatentState, step: Tensor, beta2: float, beta1: float) -> None:
    check_state(state)
    check_step(step, state.W_dec.device)
    check_number("beta2", beta2, 0, 1, open_low=True)
    check_first_moments(state, beta1, "beta1")
