"""What each kernel of the sparse training step is given, and what it moves: one function a kernel, `Case` → `Pass`.

A pass says how many programs there are of each length, what one of that length is given (from which `follow` counts its
instructions), and its bytes: `requested` by the lanes of one program, first-level cache or not, and from HBM by all.
Block sizes are read from the kernels' own configurations. Where a kernel changes, its function here does, nothing else.

The step is that of bf16 copies with weights stored by latent, D aligned, the entries' room as `SAETrainer` makes it.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from bench.aot.lists import WINDOW, Case, Lengths
from bench.aot.specs import Spec, decode, encode, sparse_step, training_encode
from gemmascope.kernels.gpu import decode as gpu_decode
from gemmascope.kernels.gpu import encode as gpu_encode
from gemmascope.kernels.gpu import encode_gemm as gpu_encode_gemm
from gemmascope.kernels.gpu import latents as gpu_latents
from gemmascope.kernels.gpu import residual as gpu_residual
from gemmascope.kernels.gpu import update as gpu_update

TARGET = "sm_90"
L2_BYTES = 50e6
# [A] The share of L2 that the rows of a gather hold against what streams through.
L2_SHARE = 0.7
SECTOR = 32  # bytes that the least access moves

Arguments = tuple[Mapping[str, int], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Pass:
    """One kernel in one case."""

    name: str
    spec: str
    programs: Lengths
    given: Callable[[int], Arguments]
    """The integers and the memory that decide the control flow of a program of this length."""
    requested: Callable[[int], float]
    """Bytes that the lanes of such a program load and store."""
    hbm: float
    launches: int = 1
    most: int = 1 << 30
    """The greatest length there can be."""
    longest_first: bool = False
    """Whether long programs start before short ones; otherwise the longest may start last."""


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _gather_misses(case: Case, row_bytes: int) -> float:
    """Bytes that one gather of the row of every entry takes from HBM: rows of the most frequent latents are in L2."""
    rows = int(L2_SHARE * L2_BYTES / row_bytes)
    frequency = case.frequencies
    share = 1.0 if rows >= case.F else frequency[len(frequency) - rows :].sum() / frequency.sum()
    return max(case.entries * (1 - share), case.of_latents.touched) * row_bytes


def product(case: Case) -> Pass:
    """`encode_entries`: tiles of [block_m, block_n], a launch for each chunk of tokens whose scratch fits.

    W_enc is streamed once for every `group_m` row tiles of a chunk, unless it stays in L2.
    """
    config = gpu_encode_gemm.encode_config(TARGET, torch.bfloat16, case.tokens, True)
    chunk = min(case.tokens, gpu_encode_gemm.tokens_per_chunk(case.F, config))
    chunks = [min(chunk, case.tokens - first) for first in range(0, case.tokens, chunk)]
    tiles = sum(_blocks(rows, config.block_m) for rows in chunks) * _blocks(case.F, config.block_n)
    W_bytes, strip = 2 * case.d * case.F, config.group_m * config.block_m
    reads = 1 if W_bytes <= L2_SHARE * L2_BYTES else sum(_blocks(rows, strip) for rows in chunks)
    depth = _blocks(case.d, config.block_k) * config.block_k
    kept = case.entries / tiles
    bits = config.block_m * config.block_n / 8

    def requested(_: int) -> float:
        return 2 * depth * (config.block_m + config.block_n) + 8 * config.block_n + 4 * kept + bits

    return Pass(
        "encode",
        f"training_entries_tma_{config.block_m}x{config.block_n}x{config.block_k}_bf16",
        Lengths(np.array([0]), np.array([float(tiles)])),
        lambda _: ({"N": chunks[0], "F": case.F, "D": case.d}, {}),
        requested,
        reads * W_bytes + 2 * case.tokens * case.d + SECTOR * case.entries + case.tokens * case.F / 8,
        len(chunks),
    )


def _segments(case: Case) -> dict[str, int]:
    return {"n_words": _blocks(case.F, 32), "per_row": _blocks(case.F, gpu_encode.SEGMENT)}


def count(case: Case) -> Pass:
    """The bits of each segment counted, COUNT_BLOCK segments a program."""
    sizes, launches = _segments(case), product(case).launches
    segments = case.tokens * sizes["per_row"]
    programs = launches * _blocks(segments // launches, gpu_encode.COUNT_BLOCK)
    scalars = sizes | {"n_segments": segments // launches}
    of_program = gpu_encode.COUNT_BLOCK * (min(case.F, gpu_encode.SEGMENT) / 8 + 4)
    return Pass(
        "count", "encode_count", Lengths(np.array([0]), np.array([float(programs)])), lambda _: (scalars, {}),
        lambda _: of_program, case.tokens * case.F / 8, launches,
    )  # fmt: skip


def move(case: Case) -> Pass:
    """The kept entries of each segment moved: as many turns as its fullest word has bits."""
    sizes, launches = _segments(case), product(case).launches
    programs = case.fullest_word(gpu_encode.SEGMENT)
    words = min(gpu_encode.SEGMENT, case.F) // 32
    of_segment = case.entries / max(programs.touched, 1)
    scalars = sizes | {"F": case.F, "first_token": 0, "capacity": 1 << 30}

    def given(bits: int) -> Arguments:
        held = np.zeros(sizes["n_words"], np.uint32)
        held[0] = (1 << bits) - 1
        return scalars, {"words_ptr": held, "starts_ptr": np.array([0, bits], np.int64)}

    def requested(bits: int) -> float:
        return 16 + (4 * words + (4 + 4 + 12) * of_segment if bits else 0)

    hbm = case.tokens * case.F / 8 + (SECTOR + 12) * case.entries
    return Pass("move", "training_entries_move", programs, given, requested, hbm, launches, 32)


def residual_bytes(d: int, length: int, active: float) -> float:
    """Loaded and stored for one token with so many entries, `active` of them not only in the window."""
    config = gpu_residual.CONFIG
    first = 8 * length * _blocks(d, config.block_d) + 2 * d * active + (4 + 4 + 2) * d + 4
    second = 4 * length + 2 * d * _blocks(length, config.lanes) + 2 * d * length + 4 * length + 4
    return 16 + first + second


def residual(case: Case) -> Pass:
    """A program a token: the rows of its active entries summed, column block by column block, then each entry's row
    against the residual."""
    d = case.d
    scalars = {"capacity": 1 << 30, "D": d, "stride_xn": d, "stride_wf": d}
    return Pass(
        "residual", "residual_bf16", case.of_tokens,
        lambda length: (scalars, {"offsets_ptr": np.array([0, length], np.int64)}),
        lambda length: residual_bytes(d, length, length / (1 + WINDOW)),
        2 * _gather_misses(case, 2 * d) + 6 * case.tokens * d + 12 * case.entries,
    )  # fmt: skip


def latents_bytes(entries: float) -> float:
    """Loaded and stored by one program whose latents have so many entries together."""
    return gpu_latents.CONFIG.block_f * (16 + 4 + 16) + entries * (8 + 5 * 4 + 3 * 4)


def latents(case: Case) -> Pass:
    """A program for `block_f` latents, as many turns as the longest of their lists needs."""
    config = gpu_latents.CONFIG

    def given(length: int) -> Arguments:
        offsets = np.full(config.block_f + 1, length, np.int64)
        offsets[0] = 0  # the first latent has them all
        return {"F": case.F}, {"offsets_ptr": offsets}

    of_program = latents_bytes(case.entries / (case.F / config.block_f))
    hbm = case.entries * (8 + 4 * 4 + 3 * 4) + 24 * case.F
    return Pass("latents", "latents", case.longest_of(config.block_f), given, lambda _: of_program, hbm)


def encoder_times(case: Case) -> Pass:
    """W_enc·db_enc: lists of consecutive rows, a program for each list and column block."""
    config, d = gpu_decode.GATHER, case.d
    rows = max(gpu_latents._LIST_ROWS, _blocks(case.F, gpu_latents._LISTS))
    programs = _blocks(case.F, rows) * _blocks(d, config.block_d)
    return Pass(
        "encoder_times", "model_encoder_times", Lengths(np.array([rows]), np.array([float(programs)])),
        lambda length: ({"D": d, "stride_row": d}, {"offsets_ptr": np.array([0, length], np.int64)}),
        lambda length: 16 + length * (8 + 2 * config.block_d) + 4 * config.block_d, 2 * d * case.F,
    )  # fmt: skip


def update_bytes(d: int, length: int) -> float:
    """Loaded and stored for one latent with so many entries: the second sweep reads the decoder's row once more."""
    if length == 0:
        return 4 + 16
    gathers = 12 * length * _blocks(d, gpu_update.CONFIG.block_d) + 4 * d * length
    block = (4 * 4 + 4 * 4 + 2) * d
    sweep = (4 + 4 + 2) * d
    return 4 + 16 + 8 + 8 + 8 + 4 + gathers + block + 10 * 4 + 8 + sweep


def update(case: Case) -> Pass:
    """A program a latent: both gathers, column block by column block, the update of the block, the sweep by the norm.

    36 bytes a weight of a touched latent: W and v of both matrices read and written, two copies written.
    """
    d = case.d

    def given(length: int) -> Arguments:
        return {"D": d}, {"ok_ptr": np.ones(1, np.int32), "lists_ptr": np.array([0, length], np.int64)}

    hbm = case.of_latents.touched * 36 * d + 4 * case.tokens * d + 12 * case.entries
    return Pass("update", "update_entries_bf16", case.of_latents, given, lambda length: update_bytes(d, length), hbm)


STEP = (product, count, move, residual, latents, encoder_times, update)


def specs(target: str = TARGET) -> Iterator[Spec]:
    """The compilations of the step, those that `bench.aot.specs` has and what the step compiles besides."""
    found = {spec.name: spec for of in (encode, training_encode, decode, sparse_step) for spec in of(target)}
    gather = found["decode_gather_sum_bf16"]
    arguments = {name: kind for name, kind in gather.arguments.items() if name != "bias_ptr"} | {"out_ptr": "*fp32"}
    constants = gather.constants | {"bias_ptr": None, "HAS_BIAS": False}
    found["model_encoder_times"] = replace(gather, name="model_encoder_times", arguments=arguments, constants=constants)
    yield from (spec for spec in found.values() if spec.name in names())


@functools.cache
def names() -> frozenset[str]:
    """The compilations of the step."""
    return frozenset(step.spec for step in passes(Case(2304, 16384, skew=0.0)))


@functools.cache
def passes(case: Case) -> tuple[Pass, ...]:
    return tuple(step(case) for step in STEP)


def argument_sizes(spec: Spec) -> list[tuple[str, int]]:
    """The arguments of a compiled kernel in order, with their bytes; a descriptor comes with its sizes and strides."""
    found = []
    for name in spec.kernel.arg_names:
        kind = spec.arguments.get(name)
        if kind is None:
            continue
        if kind.startswith("tensordesc"):
            rank = kind.count(",") + 1
            found += [(name, 128), *((f"{name}.shape{i}", 4) for i in range(rank))]
            found += [(f"{name}.stride{i}", 8) for i in range(rank)]
        else:
            found.append((name, 8 if kind.startswith("*") or kind.endswith("64") else 4))
    return found
