"""An SAE as files hold it, and the checks that every format shares: which tensors, of which shapes, dtypes and values.

A format says what its tensors are called and how they lie, as `Slot`s. Dimensions come from the vectors among them,
never from names, and what has another shape is refused, never transposed.
"""

import contextlib
import io
import math
import os
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import dtype_name
from ..errors import BadFileError
from .arrays import Header, printable
from .manifest import SAEConfig

KEYS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
TOPK_KEYS = KEYS[:-1]
# As Gemma Scope 2 spells them.
LOWER_CASE = {"w_enc": "W_enc", "w_dec": "W_dec"}
DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
MODEL, SAE = "d_model", "d_sae"


class StoredSAE(NamedTuple):
    """An SAE as its files hold it, checked. tensors: those of `keys_of` its config."""

    tensors: dict[str, Tensor]
    config: SAEConfig


class Slot(NamedTuple):
    """One tensor of a format. shape: names of sizes; d_model and d_sae are checked. dtypes: those allowed, None for
    that of the weights."""

    shape: tuple[str, ...]
    dtypes: frozenset[torch.dtype | None] = frozenset({None})
    is_optional: bool = False


Slots = Mapping[str, Slot]
# Of a format whose keys are ours. The first slot is that of the weights, whose dtype others must share.
OURS: Slots = {
    "W_enc": Slot((MODEL, SAE)),
    "W_dec": Slot((SAE, MODEL)),
    "b_enc": Slot((SAE,)),
    "b_dec": Slot((MODEL,)),
    "threshold": Slot((SAE,), frozenset({None, torch.float32})),
}


def keys_of(config: SAEConfig) -> tuple[str, ...]:
    """The tensors of an SAE with this config: W_enc [d_model, d_sae], W_dec [d_sae, d_model], b_enc [d_sae], b_dec
    [d_model] and, but for TopK, threshold [d_sae]."""
    return TOPK_KEYS if config.architecture == "topk" else KEYS


def problem_in_headers(
    slots: Slots,
    headers: Mapping[str, Header],
    *,
    dtypes: frozenset[torch.dtype] = DTYPES,
    stated: tuple[int | None, int | None] | None = None,
) -> str | None:
    """Why these are not the tensors of ``slots``. dtypes: of the first slot. stated: d_model and d_sae as the config
    has them, None where it has none."""
    keys = ", ".join(key for key, slot in slots.items() if not slot.is_optional)
    for key in headers:
        if key not in slots:
            return f"expected the keys {keys}, found also {printable(key)}"
    missing = [key for key, slot in slots.items() if key not in headers and not slot.is_optional]
    if missing:
        return f"expected the keys {keys}, found no {', '.join(missing)}"
    sizes, vectors = {}, {}
    for size in (SAE, MODEL):
        key = next(key for key, slot in slots.items() if slot.shape == (size,) and not slot.is_optional)
        shape = headers[key].shape
        if len(shape) != 1 or shape[0] < 1:
            return f"{key}: expected shape [{size}], found {list(shape)}"
        sizes[size], vectors[size] = shape[0], key
    d_model, d_sae = sizes[MODEL], sizes[SAE]
    for key, slot in slots.items():
        if key not in headers:
            continue
        header, shape = headers[key], tuple(sizes.get(size) for size in slot.shape)
        if None in shape and len(header.shape) == len(shape):
            continue
        if header.shape != shape:
            return (
                f"{key}: expected shape {list(shape)} ({vectors[MODEL]} has {d_model} = d_model entries, {vectors[SAE]}"
                f" {d_sae} = d_sae), found {list(header.shape)}"
            )
    if stated is not None:
        expected = tuple(size if given is None else given for given, size in zip(stated, (d_model, d_sae), strict=True))
        if expected != (d_model, d_sae):
            return f"expected d_model, d_sae = {expected} as in its config, found {(d_model, d_sae)}"
    return _problem_in_dtypes(slots, headers, dtypes)


def _problem_in_dtypes(slots: Slots, headers: Mapping[str, Header], dtypes: frozenset[torch.dtype]) -> str | None:
    first = next(iter(slots))
    weights = headers[first].dtype
    for key, slot in slots.items():
        if key not in headers:
            continue
        allowed = dtypes if key == first else {weights if dtype is None else dtype for dtype in slot.dtypes}
        if headers[key].dtype not in allowed:
            names = " or ".join(sorted(dtype_name(dtype) for dtype in allowed))
            return f"{key}: expected {names}, found {dtype_name(headers[key].dtype)}"
    return None


def is_of_one_dtype(key: str, tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor may stand beside those of ``dtype``: thresholds may be fp32 among any."""
    return dtype in DTYPES and tensor.dtype in ({dtype, torch.float32} if key == "threshold" else {dtype})


def problem_in_values(tensors: Mapping[str, Tensor]) -> str | None:
    """Why these cannot be the tensors of an SAE: NaN, Inf, a threshold below 0, no dense data."""
    problem = problem_in_numbers(tensors)
    if problem is None and "threshold" in tensors and (low := tensors["threshold"].min().item()) < 0:
        return f"threshold: expected values ≥ 0, found {low:.6g}"
    return problem


def problem_in_numbers(tensors: Mapping[str, Tensor]) -> str | None:
    """The same without the sign of the threshold."""
    for key, tensor in tensors.items():
        if tensor.is_meta or tensor.layout != torch.strided:
            return f"{key}: expected a dense tensor, found {'one without data' if tensor.is_meta else tensor.layout}"
        # The extremes are NaN when anything is, and need no second tensor of that size.
        low, high = (extreme.item() for extreme in torch.aminmax(tensor))
        if not (math.isfinite(low) and math.isfinite(high)):
            return f"{key}: expected finite values, found {high if math.isfinite(low) else low}"
    return None


@contextlib.contextmanager
def at_rest(file: io.BufferedReader, name: str) -> Iterator[None]:
    """Raise BadFileError when ``file`` is written to in this block."""
    before = os.fstat(file.fileno())
    yield
    after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise BadFileError(f"{name}: expected a file at rest, found it written to while it was read")
