"""SAEs and transcoders in the formats of others: one verb, `write`, and what each format can hold.

| format | holds | files |
|---|---|---|
| gemma-scope | folded SAEs and transcoders without skip, fp32 | params.npz |
| gemma-scope-2 | folded SAEs and transcoders | params.safetensors, config.json |
| saelens | SAEs, TopK SAEs and transcoders with input scale 1, fp32 or fp64 | sae_weights.safetensors, cfg.json |
| circuit-tracer | transcoders of one width, a layer a file | layer_L.safetensors, config.yaml |
| safetensors | SAEs as they are | params.safetensors, our config.json |
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_choice, check_type, dtype_name
from . import release, writers
from .files import as_path, shown
from .folding import fold
from .manifest import CONFIG, SAEConfig
from .stored import DTYPES, KEYS, TOPK_KEYS, is_of_one_dtype, problem_in_values

FORMATS = ("gemma-scope", "gemma-scope-2", "saelens", "circuit-tracer", "safetensors")
TRANSCODER = "transcoder"
HALVES = (torch.float16, torch.bfloat16)
SKIP = "W_skip"


class Kind(NamedTuple):
    """What an architecture is called, and which tensors it has."""

    name: str
    keys: tuple[str, ...]
    formats: tuple[str, ...]


KINDS = {
    "jump_relu": Kind("a JumpReLU SAE", KEYS, ("gemma-scope", "gemma-scope-2", "saelens", "safetensors")),
    "topk": Kind("a TopK SAE", TOPK_KEYS, ("saelens", "safetensors")),
    TRANSCODER: Kind("a transcoder", KEYS, ("gemma-scope", "gemma-scope-2", "saelens", "circuit-tracer")),
}


def write(
    format: str,
    tensors: dict[str, Tensor],
    config: SAEConfig,
    path: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Write one SAE or transcoder to the folder ``path`` in the format ``format``, one of `FORMATS`.

    tensors: W_enc [d_in, d_sae], W_dec [d_sae, d_out], b_enc [d_sae], b_dec [d_out] and, unless it is a TopK SAE,
    threshold [d_sae], of one float dtype (the threshold may be float32); a transcoder's (``config.architecture`` is
    "transcoder") may have W_skip [d_out, d_in]. ``config.metadata`` goes where the format has room: ``model``, ``site``
    (of a transcoder's input, with ``site_out``), ``layer``, ``average_l0``. dtype: the tensors are cast to it first.

    Returns what had to be done to them, a sentence each: an SAE that is not folded is folded where the format has no
    room for its scale or bias (the same function, rounded anew), 16 bits become fp32 where the format would round the
    threshold to them. Nothing is done when nothing is said: the file holds the same bits.

    circuit-tracer has one folder for all layers: write the others to the same ``path``.

    Raises ValueError or TypeError, before anything is written, for what the format cannot hold, tensors that are not
    those of one SAE or are not finite, metadata that JSON cannot hold, and a folder that has such files already;
    EnvironmentProblemError when the files cannot be written.
    """
    check_choice("format", format, FORMATS)
    check_type("tensors", tensors, dict)
    check_type("config", config, SAEConfig)
    folder = as_path("path", path)
    kind = KINDS.get(config.architecture)
    if kind is None:
        raise ValueError(f"sae: expected architecture {' or '.join(KINDS)}, got {config.architecture!r}")
    if format not in kind.formats:
        raise ValueError(f"format: expected {' or '.join(kind.formats)} for {kind.name}, got {format!r}")
    if format == "gemma-scope" and SKIP in tensors:
        raise ValueError("format: expected another than gemma-scope for a transcoder with W_skip, which it cannot hold")
    problem = problem_in(tensors, kind, config)
    if problem:
        raise ValueError(f"sae: {problem}")
    tensors = {key: tensor.detach() for key, tensor in tensors.items()}
    said = []
    if dtype is not None:
        check_type("dtype", dtype, torch.dtype)
        if dtype not in DTYPES:
            raise ValueError(f"dtype: expected float16, bfloat16, float32 or float64, got {dtype_name(dtype)}")
        tensors = cast(tensors, dtype)
    if format == "gemma-scope" and tensors["W_dec"].dtype == torch.float64:
        raise ValueError("format: expected at most float32 for gemma-scope, got float64: pass dtype=torch.float32")
    if format in ("gemma-scope", "saelens") and tensors["W_dec"].dtype in HALVES:
        said.append(f"{dtype_name(tensors['W_dec'].dtype)} written as float32, which holds the same values")
        tensors = cast(tensors, torch.float32)
    holds_bias = format == "saelens" and config.input_scale == 1
    if format != "safetensors" and not (config.is_folded or holds_bias):
        moved = f"input_scale {config.input_scale:.6g}{' and the pre-encoder bias' if config.pre_encoder_bias else ''}"
        said.append(f"folded: {moved} moved into the weights, the same function, rounded anew")
        tensors, config = fold(tensors, config)
    problem = problem_in_values(tensors)  # what was cast or folded may have overflowed
    if problem:
        raise ValueError(f"{'dtype' if dtype is not None else 'sae'}: {problem}")
    write_one, names = WRITERS[format]
    for file in (folder / name for name in names(config.metadata or {})):
        if os.path.lexists(file):
            raise ValueError(f"path: expected a folder without {file.name}, got {shown(folder)}")
    write_one(tensors, config, folder)
    return said


def cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors in ``dtype``, but the threshold in float32 at least, as in the modules."""
    wide = torch.promote_types(dtype, torch.float32)
    return {key: tensor.to(wide if key == "threshold" else dtype) for key, tensor in tensors.items()}


def problem_in(tensors: dict[str, Tensor], kind: Kind, config: SAEConfig) -> str | None:
    """Why these are not the tensors of a ``kind``; None when they are."""
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            return f"{key}: expected a torch.Tensor, got {type(tensor).__name__}"
    optional = (SKIP,) if kind is KINDS[TRANSCODER] else ()
    wrong = sorted({*kind.keys} ^ ({*tensors} - {*optional}))
    if wrong:
        expected = ", ".join((*kind.keys, *optional))
        return f"expected the tensors {expected}, got more or fewer: {', '.join(map(str, wrong))}"
    W_enc, b_enc, b_dec = (tensors[key] for key in ("W_enc", "b_enc", "b_dec"))
    if W_enc.ndim != 2 or b_enc.ndim != 1 or b_dec.ndim != 1 or 0 in (*W_enc.shape, *b_dec.shape):
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (W_enc, b_enc, b_dec))
        return f"expected W_enc [d_in, d_sae], b_enc [d_sae] and b_dec [d_out], got {shapes}"
    d_sae, d_out = len(b_enc), len(b_dec)
    d_in = W_enc.shape[0] if kind is KINDS[TRANSCODER] else d_out
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "threshold": (d_sae,), SKIP: (d_out, d_in)}
    dtype = tensors["W_dec"].dtype
    for key, tensor in tensors.items():
        if key in shapes and tuple(tensor.shape) != shapes[key]:
            return f"{key}: expected shape {list(shapes[key])}, got {list(tensor.shape)}"
        if not is_of_one_dtype(key, tensor, dtype):
            return f"{key}: expected one float dtype for all, got {dtype_name(tensor.dtype)}"
    problem = problem_in_values(tensors)
    if problem:
        return problem
    if kind is KINDS["topk"] and (type(config.k) is not int or not 1 <= config.k <= d_sae):
        return f"k: expected an int from 1 to d_sae = {d_sae}, got {config.k!r}"
    if kind is KINDS[TRANSCODER] and not config.is_folded:
        return "expected a transcoder with input_scale 1 and no pre-encoder bias, got another"
    return None


def _write_ours(tensors: dict[str, Tensor], config: SAEConfig, folder: Path) -> None:
    release.write(folder, tensors, config)


PARAMS = (release.NPZ, release.SAFETENSORS, CONFIG)
Write = Callable[[dict[str, Tensor], SAEConfig, Path], None]
WRITERS: dict[str, tuple[Write, Callable[[dict], tuple[str, ...]]]] = {
    "gemma-scope": (writers.gemma_scope, lambda metadata: PARAMS),
    "gemma-scope-2": (writers.gemma_scope_2, lambda metadata: PARAMS),
    "saelens": (writers.saelens, lambda metadata: (writers.SAELENS_WEIGHTS, writers.SAELENS_CONFIG)),
    "circuit-tracer": (writers.circuit_tracer, lambda metadata: (writers.layer_file(metadata),)),
    "safetensors": (_write_ours, lambda metadata: PARAMS),
}
