"""What each kernel of the sparse training step is given, and what it moves: one function a kernel, `Case` → `Pass`.

A pass says how many programs there are of each length, what one of that length is given (from which `follow` counts its
instructions), and its bytes: `requested` by the lanes of one program, first-level cache or not, and from HBM by all.
Block sizes are read from the kernels' own configurations. Where a kernel changes, its function here does, nothing else.

The step is that of bf16 copies with weights stored by latent, D aligned, the entries' room as `SAETrainer` makes it.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from bench.aot.inference import encode
from bench.aot.lists import MARGIN, Case, Lengths
from bench.aot.selecting import (
    ROWS,
    batch,
    count_groups_bytes,
    drawn,
    largest_of_groups,
    list_bytes,
    listed_bytes,
    pick_bytes,
    select_bytes,
)
from bench.aot.spec import Spec
from bench.aot.training import around_the_step, sparse_step, topk, training_encode, update_specs
from gemmascope.kernels.entries import tokens_per_chunk
from gemmascope.kernels.gpu import centring as gpu_centring
from gemmascope.kernels.gpu import conclusion as gpu_conclusion
from gemmascope.kernels.gpu import encode as gpu_encode
from gemmascope.kernels.gpu import encode_gemm as gpu_encode_gemm
from gemmascope.kernels.gpu import latents as gpu_latents
from gemmascope.kernels.gpu import residual as gpu_residual
from gemmascope.kernels.gpu import selection as gpu_selection
from gemmascope.kernels.gpu import tokens as gpu_tokens
from gemmascope.kernels.gpu import transpose as gpu_transpose
from gemmascope.kernels.gpu import update as gpu_update
from gemmascope.kernels.gpu import weighted_sum as gpu_weighted_sum

TARGET = "sm_90"
L2_BYTES = 50e6
# [A] The share of L2 that the rows of a gather hold against what streams through.
L2_SHARE = 0.7
SECTOR = 32  # bytes that the least access moves
# A radix sort of 32-bit keys counts once, then passes over keys and 64-bit places four times.
KERNELS_OF_A_SORT, SORT_BYTES = 6, 4 + 4 * 2 * (4 + 8)

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
    """0: it is a part of the one before."""
    most: int = 1 << 30
    """The greatest length there can be."""
    longest_first: bool = False
    """Whether long programs start before short ones; otherwise the longest may start last."""
    tiles: bool = False
    """Whether it is a product whose tiles are copied whole."""
    program: tuple[int, int, int] = (0, 0, 0)
    """Which of the grid it is."""
    grid: tuple[int, ...] = ()
    """Sizes of the grid, where the kernel asks for them."""


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
    chunk = tokens_per_chunk(case.tokens, case.F)
    chunks = [min(chunk, case.tokens - first) for first in range(0, case.tokens, chunk)]
    tiles = sum(_blocks(rows, config.block_m) for rows in chunks) * _blocks(case.F, config.block_n)
    W_bytes, strip = 2 * case.d * case.F, config.group_m * config.block_m
    reads = 1 if W_bytes <= L2_SHARE * L2_BYTES else sum(_blocks(rows, strip) for rows in chunks)
    depth = _blocks(case.d, config.block_k) * config.block_k
    kept = case.entries / tiles
    bits = config.block_m * config.block_n / 8
    whole = all(rows % config.block_m == 0 for rows in chunks) and case.F % config.block_n == 0

    def requested(_: int) -> float:
        return 2 * depth * (config.block_m + config.block_n) + 8 * config.block_n + 4 * kept + bits

    return Pass(
        "encode",
        f"encode_tma_{config.block_m}x{config.block_n}x{config.block_k}_bf16{'_even' if whole else ''}",
        Lengths(np.array([0]), np.array([float(tiles)])),
        lambda _: ({"N": chunks[0], "F": case.F, "D": case.d}, {}),
        requested,
        reads * W_bytes + 2 * case.tokens * case.d + SECTOR * case.entries + case.tokens * case.F / 8,
        len(chunks),
        tiles=True,
    )


def _segments(case: Case) -> dict[str, int]:
    return {"n_words": _blocks(case.F, 32), "per_row": _blocks(case.F, gpu_encode.SEGMENT)}


def count(case: Case) -> Pass:
    """The bits of each segment counted, COUNT_BLOCK segments a program."""
    sizes, launches = _segments(case), product(case).launches
    segments = case.tokens * sizes["per_row"]
    programs = launches * _blocks(segments // launches, gpu_encode.COUNT_BLOCK)
    scalars = sizes | {"n_segments": segments // launches}
    of_program = gpu_encode.COUNT_BLOCK * (min(case.F, gpu_encode.SEGMENT) / 8 + 4) + 4
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


def _residual_blocks(d: int) -> int:
    return _blocks(d, gpu_residual.residual_config(TARGET, torch.bfloat16).block_d)


def residual_bytes(d: int, length: int) -> float:
    """Loaded and stored for one token with so many entries: a row of each, and again what is beyond the first tile.

    The block 0 also counts the active ones; shares of u and of the squared norm are stored by block.
    """
    config = gpu_residual.residual_config(TARGET, torch.bfloat16)
    blocks = _residual_blocks(d)
    more = max(0, length - config.first)
    of_block = 16 + (8 + 4) * length + 4 * more + 4 * length + 4
    return blocks * of_block + 2 * d * (length + more) + (4 + 4 + 2) * d + 4 * length + 4


def residual(case: Case) -> Pass:
    """A program a token and column block; a few more instructions for the first block, which counts what fires."""
    d = case.d
    blocks = _residual_blocks(d)
    scalars = {"capacity": 1 << 30, "width": 1 << 30, "D": d, "stride_xn": d, "stride_wf": d}
    return Pass(
        "residual", "residual_bf16", case.of_tokens.times(blocks),
        lambda length: (scalars, {"offsets_ptr": np.array([0, length], np.int64)}),
        lambda length: residual_bytes(d, length) / blocks,
        _gather_misses(case, 2 * d) + 6 * case.tokens * d + 12 * case.entries + 4 * blocks * case.entries,
        program=(0, 1, 0),
    )  # fmt: skip


def shares_bytes(wanted: float, blocks: int) -> float:
    """Loaded and stored to add up so many shares of each block, what says how many there are aside."""
    return 4 * wanted * (blocks + 1)


def sum_shares(case: Case) -> Pass:
    """The shares of u and of the squared norms added up: of the entries, and of every token."""
    d, block = case.d, gpu_residual.SUM_BLOCK
    blocks = _residual_blocks(d)
    wanted = case.entries + case.tokens
    scalars = {"capacity": int(wanted), "width": int(wanted), "n_blocks": blocks}
    memory = {"last_ptr": np.array([int(wanted)], np.int64)}
    return Pass(
        "sum_shares", "residual_sum_shares", Lengths(np.array([0]), np.array([float(_blocks(int(wanted), block))])),
        lambda _: (scalars, memory), lambda _: 8 + shares_bytes(block, blocks), shares_bytes(wanted, blocks),
    )  # fmt: skip


def latents_bytes(entries: float, latents: int, long_lists: int = 0) -> float:
    """Loaded and stored by one program whose latents have so many entries together; long lists among them make it look
    at the offsets of all of them once more."""
    looked_at = 16 * latents if long_lists else 0
    return latents * (16 + 4 + 16) + entries * (8 + 5 * 4 + 3 * 4) + looked_at


def latents(case: Case) -> Pass:
    """A program for `block_f` latents, as many turns as the longest needs of those lists that are not long."""
    config = gpu_latents.CONFIG

    def given(length: int) -> Arguments:
        offsets = np.full(config.block_f + 1, length, np.int64)
        offsets[0] = 0  # the first latent has them all
        return {"F": case.F}, {"offsets_ptr": offsets}

    lists = case.of_latents
    short = float((lists.length * lists.count)[lists.length <= config.long].sum())
    of_program = latents_bytes(short / (case.F / config.block_f), config.block_f)
    programs = case.longest_of(config.block_f, config.long)
    return Pass("latents", "latents", programs, given, lambda _: of_program, short * 36 + 24 * case.F)


def long_latents(case: Case) -> Pass:
    """The long lists of `latents`, one by one; counted as if each were in a program of its own."""
    config, given = gpu_latents.CONFIG, latents(case).given
    lists = case.of_latents.at_least(config.long + 1)
    return Pass(
        "latents, long",
        "latents",
        lists,
        given,
        lambda length: latents_bytes(length, 0, 1),
        36 * lists.total,
        launches=0,
    )


def _group_rows(F: int) -> int:
    return max(gpu_weighted_sum._GROUP_ROWS, _blocks(F, gpu_weighted_sum._GROUPS))


def encoder_times(case: Case) -> Pass:
    """W_enc·db_enc: groups of consecutive rows, a program for each group and column block. Rows with the coefficient 0
    are not read; the instructions count as if all were."""
    config, d = gpu_weighted_sum.ROWS, case.d
    rows = _group_rows(case.F)
    programs = _blocks(case.F, rows) * _blocks(d, config.block_d)
    share = case.of_latents.touched / case.F
    return Pass(
        "encoder_times", "encoder_times_bf16", Lengths(np.array([rows]), np.array([float(programs)])),
        lambda length: ({"ROWS": case.F, "GROUP": length, "D": d, "stride_row": d}, {}),
        lambda length: length * (4 + 2 * config.block_d * share) + 4 * config.block_d, 2 * d * case.F * share,
    )  # fmt: skip


def of_update(name: str, d: int, beta1: float) -> str:
    """A compilation of the update, whose width and β1 are constants; those of `bench.aot.specs` are 2,304 and 0. All β1
    above 0 are one: another number in the same code."""
    named = f"{name}_beta1" if beta1 else name
    return named if d == 2304 else f"{named}_{d}"


def first_moment_bytes(d: int, beta1: float) -> float:
    """Read and written of the fp32 first moments of a latent's rows of W_enc and W_dec; nothing where β1 is 0."""
    return 2 * (4 + 4) * d if beta1 else 0


def small_first_moment_bytes(beta1: float) -> float:
    """Likewise of its b_enc and θ, which the ordinary program moves, also that of a long list."""
    return first_moment_bytes(1, beta1)


def update_bytes(d: int, length: int, beta1: float = 0.0) -> float:
    """Loaded and stored for one latent with so many entries, by a program for a list that is not long; or, for one that
    is, by the program that norms its row."""
    if length == 0:
        return 4 + 16
    config = gpu_update.CONFIG
    blocks = _blocks(d, config.block_d)
    of_latent, sweep = 4 + 16 + 8 + 8 + 8 + 4 + 10 * 4 + 8 + small_first_moment_bytes(beta1), (4 + 4 + 2) * d
    if length >= config.long:
        return of_latent + 4 * blocks + sweep
    columns = (4 * 4 + 4 * 4 + 2) * d + first_moment_bytes(d, beta1)
    return of_latent + 12 * length * blocks + 4 * d * length + columns + sweep


def search_bytes(candidates: int) -> float:
    """Loaded by one program that looks for long lists among so many."""
    return 4 + 16 * candidates


def long_update_bytes(d: int, length: int, beta1: float = 0.0) -> float:
    """Loaded and stored for one long list by the programs of its column blocks, the search for it aside."""
    of_block = 16 + 3 * 8 + 4 + 12 * length + 4
    columns = (4 * 4 + 4 * 4 + 2) * d + first_moment_bytes(d, beta1)
    return _blocks(d, gpu_update.CONFIG.block_d) * of_block + 4 * d * length + columns


def long_lists(case: Case) -> Pass:
    """Gradients and Adam of the long lists, a program for each and each column block; programs that find none are of
    length 0. Counted as if no program found two, and each looked at 16 latents, as with 16,384 of them.

    26 bytes a weight: W_enc and v of both matrices read and written, the copy of W_enc; 16 more of first moments.
    """
    config, d, beta1 = gpu_update.CONFIG, case.d, case.beta1
    blocks = _blocks(d, config.block_d)
    programs = min(case.F, config.long_programs)
    found = case.of_latents.at_least(config.long)
    idle = max(0.0, (programs - found.lists)) * blocks
    lengths = Lengths(np.append(0, found.length), np.append(idle, found.count * blocks))

    def given(length: int) -> Arguments:
        return {"F": 1}, {"ok_ptr": np.ones(1, np.int32), "lists_ptr": np.array([0, length], np.int64)}

    candidates = _blocks(case.F, programs)
    hbm = found.lists * (26 * d + first_moment_bytes(d, beta1)) + 8 * case.F
    return Pass(
        "update, long", of_update("update_long_lists_bf16", d, beta1), lengths, given,
        lambda length: search_bytes(candidates) + (long_update_bytes(d, length, beta1) / blocks if length else 0), hbm,
        longest_first=True, grid=(programs, blocks),
    )  # fmt: skip


def update(case: Case) -> Pass:
    """A program a latent: both gathers, column block by column block, the update of the block, the sweep by the norm;
    for a long list the sweep alone.

    36 bytes a weight of a touched latent: W and v of both matrices read and written, two copies written. With first
    moments 16 more, and 16 a latent.
    """
    d, long, beta1 = case.d, gpu_update.CONFIG.long, case.beta1

    def given(length: int) -> Arguments:
        return {}, {"ok_ptr": np.ones(1, np.int32), "lists_ptr": np.array([0, length], np.int64)}

    touched, swept = case.of_latents.touched, case.of_latents.at_least(long).lists
    hbm = touched * 36 * d - swept * 26 * d + 4 * case.tokens * d + 12 * case.entries
    hbm += (touched - swept) * first_moment_bytes(d, beta1) + touched * small_first_moment_bytes(beta1)
    return Pass(
        "update", of_update("update_entries_bf16", d, beta1), case.of_latents.clipped(long), given,
        lambda length: update_bytes(d, length, beta1), hbm, most=long,
    )  # fmt: skip


def conclude(case: Case) -> Pass:
    """One program: all sums of the step, and the median token."""
    centre, of_tokens = gpu_centring.CONFIG, gpu_tokens.CONFIG
    parts = {
        "x_parts": centre.parts * _blocks(case.d, centre.block_d),
        "f_parts": _blocks(case.tokens, of_tokens.block_n),
    }
    sizes = {"N": case.tokens, "capacity": 1 << 30} | parts
    return Pass(
        "conclude", "conclude", Lengths(np.array([0]), np.array([1.0])),
        lambda _: (sizes | {"blocks": _blocks(case.F, gpu_conclusion.CONFIG.block_f)}, {}),
        lambda _: 33 * 4 * case.tokens, 0.0,
    )  # fmt: skip


@dataclass(frozen=True)
class Light:
    """A kernel that moves what it must and is not followed. hbm: bytes."""

    name: str
    launches: int
    hbm: float


def lights(case: Case) -> tuple[Light, ...]:
    """What else the step launches of Triton's. Atomics and gathers count a sector each."""
    N, d, F, entries = case.tokens, case.d, case.F, case.entries
    blocks, room = F * _blocks(N, gpu_transpose.BLOCK_TOKENS), MARGIN * entries
    segments, chunks = N * _segments(case)["per_row"], product(case).launches
    found = [
        Light("begin", 1, 8 * F + 4 * room),
        Light("scan", chunks, (4 + 8) * segments),
        Light("centre", 1, (4 + 2) * N * d + 4 * F),
        Light("tokens", 1, (4 + 2) * N * d + 8 * entries),
        Light("touched", 1, (4 + 4 + 8) * F + 4 * SECTOR * F),
        Light("finish", 1, (8 + 8 + 4) * F + 4 * d * _blocks(F, _group_rows(F)) + (8 * d if case.beta1 else 0)),
    ]
    if 4 * gpu_transpose._WORDS.value * blocks > gpu_transpose.MARKS_BYTES:
        return (*found, Light("sort", KERNELS_OF_A_SORT, SORT_BYTES * room))
    return (
        *found,
        Light("mark", 1, 4 * 9 * blocks + (8 + 2 * SECTOR) * entries),
        Light("starts", 1, 12 * blocks),
        Light("place", 1, (8 + 3 * SECTOR) * entries),
    )


def largest(case: Case) -> Pass:
    """The product of `encode_topk`: that of the step, but that it stores all of z and a key for each 32 of them."""
    of_step, config = product(case), gpu_encode_gemm.encode_config(TARGET, torch.bfloat16, case.tokens, True)
    depth, groups = _blocks(case.d, config.block_k) * config.block_k, _blocks(case.F, 32)
    stored = config.block_m * config.block_n * (4 + 4 / 32)
    reads = of_step.hbm - SECTOR * case.entries - case.tokens * case.F / 8
    return replace(
        of_step,
        name="product, z",
        spec=of_step.spec.replace("encode_", "topk_"),
        requested=lambda _: 2 * depth * (config.block_m + config.block_n) + 4 * config.block_n + stored,
        hbm=reads + 4 * case.tokens * (case.F + groups),
    )


def select(case: Case) -> Pass:
    """The k largest of each token, k its L0: a program a token, each of some drawn rows standing for as many."""
    k, n_groups = round(case.l0), _blocks(case.F, 32)
    config = gpu_selection.select_config(k)
    scalars = {"k": k, "F": case.F, "n_groups": n_groups}

    def given(number: int) -> Arguments:
        z, _, groups = drawn(case.F, k, number)
        listed = np.zeros(n_groups, np.int32)
        listed[: len(groups)] = groups
        keys = largest_of_groups(z).astype(np.int32)
        return scalars, {"z_ptr": z.view(np.int32), "keys_ptr": keys, "list_ptr": listed}

    def requested(number: int) -> float:
        return select_bytes(case.F, k, drawn(case.F, k, number)[1])

    groups = sum(drawn(case.F, k, number)[1].groups for number in range(ROWS)) / ROWS
    hbm = case.tokens * (4 * n_groups * 2 + 128 * groups)  # keys and words, and the z that are looked at
    return Pass(
        "select", "topk_select_64" if config is gpu_selection.FEW else "topk_select_256",
        _each_row(case), given, requested, hbm, product(case).launches, ROWS - 1,
    )  # fmt: skip


def count_groups(case: Case) -> Iterator[Pass]:
    """The largest of the groups counted by their highest digits, a launch for each."""
    k, keys = round(case.l0), case.tokens * _blocks(case.F, 32)
    largest = np.concatenate([largest_of_groups(drawn(case.F, k, number)[0]) for number in range(ROWS)]).astype(
        np.int32
    )
    of_program = np.resize(largest, gpu_selection.COUNT_BLOCK)
    programs = Lengths(np.array([0]), np.array([float(_blocks(keys, gpu_selection.COUNT_BLOCK))]))
    for turn, (shift, width) in enumerate(gpu_selection.DIGITS[: gpu_selection.GROUP_DIGITS]):
        known = batch(case.F, k).bound >> shift + width << shift + width

        def given(_: int, known: int = known) -> Arguments:
            return {"size": keys}, {"keys_ptr": of_program, "state_ptr": np.array([known, 0], np.int32)}

        hbm = 0.0 if turn and 4 * keys <= L2_SHARE * L2_BYTES else 4.0 * keys
        yield Pass(
            f"count groups, {shift}", f"topk_count_groups_{shift}", programs, given,
            lambda _: count_groups_bytes(), hbm,
        )  # fmt: skip


def list_groups(case: Case) -> Pass:
    """Those that reach what is known of the batch's v, a program a token."""
    k, n_groups = round(case.l0), _blocks(case.F, 32)
    found = batch(case.F, k)

    def given(number: int) -> Arguments:
        keys = largest_of_groups(drawn(case.F, k, number)[0]).astype(np.int32)
        return {"n_groups": n_groups}, {"keys_ptr": keys, "state_ptr": np.array([found.bound, 0], np.int32)}

    def requested(number: int) -> float:
        return list_bytes(n_groups, len(found.listed[number]))

    hbm = case.tokens * 4 * (n_groups + _listed(case))
    return Pass("list groups", "topk_list", _each_row(case), given, requested, hbm, most=ROWS - 1)


def of_listed(case: Case) -> Iterator[Pass]:
    """The z of the groups that are listed: their keys counted by each digit, those counted that equal v, and a bit left
    for each that is chosen. They stay in L2 after the first time, if they fit."""
    k, n_groups = round(case.l0), _blocks(case.F, 32)
    found, read = batch(case.F, k), case.tokens * 128 * _listed(case)
    again = 0.0 if read <= L2_SHARE * L2_BYTES else read

    def passed(name: str, spec: str, known: int, hbm: float, stored: Callable[[int], float]) -> Pass:
        def given(number: int) -> Arguments:
            list_of_row = np.zeros(n_groups, np.int32)
            list_of_row[: len(found.listed[number])] = found.listed[number]
            memory = {
                "z_ptr": drawn(case.F, k, number)[0].view(np.int32),
                "list_ptr": list_of_row,
                "listed_ptr": np.array([len(found.listed[number])], np.int32),
                "state_ptr": np.array([known, found.ties], np.int32),
            }
            return {"F": case.F, "n_groups": n_groups}, memory

        def requested(number: int) -> float:
            listed = len(found.listed[number])
            return listed_bytes(listed) + stored(listed)

        return Pass(name, spec, _each_row(case), given, requested, hbm, most=ROWS - 1)

    for turn, (shift, width) in enumerate(gpu_selection.DIGITS):
        known = found.v >> shift + width << shift + width
        yield passed(f"count z, {shift}", f"topk_count_keys_{shift}", known, again if turn else read, lambda _: 0)
    yield passed("count ties", "topk_count_ties", found.v, again, lambda _: 4)
    # How many are wanted, those of the tokens before, and a word for each.
    yield passed("mark", "topk_mark", found.v, again + case.tokens * 4 * _listed(case), lambda listed: 4 * listed + 12)


def pick() -> Pass:
    """One program after each count."""
    return Pass(
        "pick", "topk_pick", Lengths(np.array([0]), np.array([1.0])),
        lambda _: ({}, {"counts_ptr": np.ones(256, np.int32), "state_ptr": np.array([0, 1], np.int32)}),
        lambda _: pick_bytes(), 0.0, len(gpu_selection.DIGITS) + gpu_selection.GROUP_DIGITS,
    )  # fmt: skip


def _each_row(case: Case) -> Lengths:
    return Lengths(np.arange(ROWS), np.full(ROWS, case.tokens / ROWS))


def _listed(case: Case) -> float:
    """Groups of a row, on average."""
    return sum(len(of_row) for of_row in batch(case.F, round(case.l0)).listed) / ROWS


def of_batch(case: Case) -> tuple[Pass, ...]:
    """The k·N largest of a batch, after the product; nothing of several chunks of tokens, whose lists are sorted."""
    if product(case).launches > 1:
        return ()
    return (*count_groups(case), list_groups(case), *of_listed(case), pick())


STEP = (
    product, count, move, residual, sum_shares, latents, long_latents, encoder_times, conclude, long_lists,
    update,
)  # fmt: skip
MEASURED = Case(2304, 16384)
RECORDED = (MEASURED, replace(MEASURED, beta1=0.9))  # whose programs are recorded


def specs(target: str = TARGET, cases: Iterable[Case] = ()) -> Iterator[Spec]:
    """The compilations of the step in the given cases, and in those that are recorded."""
    given = (*RECORDED, *cases)
    of_step = (encode, training_encode, topk, sparse_step, around_the_step)
    found = {spec.name: spec for of in of_step for spec in of(target)}
    for d, beta1 in sorted({(case.d, case.beta1) for case in given if case.d != 2304}):
        for spec in update_specs(target, d, beta1):
            name = of_update(spec.name, d, beta1)
            found[name] = replace(spec, name=name)
    wanted = names(given)
    yield from (spec for spec in found.values() if spec.name in wanted)


def names(cases: Iterable[Case] = RECORDED) -> frozenset[str]:
    """The compilations of the step and of the selection."""
    return frozenset(step.spec for case in cases for step in every(case))


@functools.cache
def passes(case: Case) -> tuple[Pass, ...]:
    """Those that have a program to run."""
    return tuple(each for each in (step(case) for step in STEP) if each.programs.lists >= 0.5)


@functools.cache
def selection(case: Case) -> Mapping[str, tuple[Pass, ...]]:
    """What takes the place of the product where k latents of a token fire, its L0 a whole number: of either kind, and
    what each of them does then. Count and move of the entries follow as in the step."""
    if case.l0 != round(case.l0):
        return {}
    found = {"product": (largest(case),), "TopK": (select(case),), "BatchTopK": of_batch(case)}
    return {kind: of_kind for kind, of_kind in found.items() if of_kind}


def every(case: Case) -> Iterator[Pass]:
    """Of the step and of the selection."""
    yield from passes(case)
    yield from itertools.chain.from_iterable(selection(case).values())


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
