"""Sparse encoding: f = z·1[z > θ] with z = x·W_enc + b_enc, as compressed sparse rows, without a dense [N, F] pass.

x [N, d], W_enc [d, F], b_enc [F], θ = threshold [F] fp32  →  values [nnz] fp32, indices [nnz] int32, offsets [N + 1].

The GEMM leaves one bit per entry and the z of the entries it keeps, in scratch (`encode_gemm`). The bits are then
counted per segment of a row, the counts are scanned, and a second light kernel moves the kept values to their place in
the rows, latents ascending. Nothing is bounded by an assumed L0, and no order depends on scheduling.

A few tokens, as in generation, take two kernels in all: after the GEMM, a program for each row counts the bits of the
rows before it, so that nobody scans, and moves its own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..entries import tokens_per_chunk
from .common import launch, register
from .encode_gemm import EncodeConfig, encode_gemm, launch_config, words_per_row

# Latents per program of the compaction: 128 words, four for each lane of one warp, which needs no barrier. Work goes by
# the word: one lane per latent was compiled too, and its registers leave half as many rows under way.
SEGMENT = 4096
# Segments per program of the count: 4 KiB of words for four warps.
COUNT_BLOCK = 8
# Segments per program of the scan, and programs of the count that it adds up at a time.
SCAN_BLOCK, SCAN_TOTALS = 4096, 1024
# Up to that many tokens a row's program counts the rows before it: 128 KiB of words at most for F = 16k.
FEW_TOKENS = 64
# Words that it takes at a time, four for each lane of four warps.
ROW_BLOCK = 512
# What a few tokens' code has room for before its size is known: 4 KiB a token. More than that is moved a second time.
FEW_TOKENS_L0 = 512


@triton.jit
def _popcount(words):  # uint32
    pairs = words - ((words >> 1) & 0x55555555)
    nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    octets = (nibbles + (nibbles >> 4)) & 0x0F0F0F0F
    halves = octets + (octets >> 8)
    return ((halves + (halves >> 16)) & 0x3F).to(tl.int32)


@triton.jit(do_not_specialize=["n_segments"])
def _count_kernel(
    words_ptr, counts_ptr, totals_ptr, n_segments, n_words, per_row, WORDS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Kept entries of each segment, and of this program: WORDS words of one row are a segment, ``per_row`` segments a
    row, BLOCK segments a program."""
    segments = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    word_columns = (segments % per_row)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    words = tl.load(
        words_ptr + (segments // per_row).to(tl.int64)[:, None] * n_words + word_columns,
        mask=(segments < n_segments)[:, None] & (word_columns < n_words),
        other=0,
    )
    counts = tl.sum(_popcount(words.to(tl.uint32)), 1)
    tl.store(counts_ptr + segments, counts, mask=segments < n_segments)
    tl.store(totals_ptr + tl.program_id(0), tl.sum(counts, 0))


@triton.jit(do_not_specialize=["n_segments", "first_row", "per_row"])
def _scan_kernel(
    counts_ptr, totals_ptr, starts_ptr, offsets_ptr, n_segments, first_row, per_row,
    GROUP: tl.constexpr, TOTALS_OF_GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """starts [n_segments + 1]: what is counted before each segment of some rows, and offsets those of the rows.

    The first rows start at 0, later ones where those before them end, which is in starts[0] already.
    """
    group, lanes = tl.program_id(0), tl.arange(0, BLOCK)
    totals = tl.zeros([BLOCK], tl.int32)
    last = group * TOTALS_OF_GROUP
    for first in range(0, last, BLOCK):
        totals += tl.load(totals_ptr + first + lanes, mask=first + lanes < last, other=0)
    base = tl.load(starts_ptr, mask=first_row > 0, other=0)
    segments = group * GROUP + tl.arange(0, GROUP)
    counts = tl.load(counts_ptr + segments, mask=segments < n_segments, other=0)
    starts = base + (tl.sum(totals, 0) + tl.cumsum(counts, 0) - counts)
    is_new = (segments >= tl.minimum(first_row, 1)) & (segments <= n_segments)
    tl.store(starts_ptr + segments, starts, mask=is_new)
    tl.store(offsets_ptr + segments // per_row, starts, mask=is_new & (segments % per_row == 0))


@triton.jit
def _move_words(
    words, counts, position, word_columns, z_ptr, threshold_ptr, values_ptr, indices_ptr, room
):  # fmt: skip
    """Moves the kept entries of some words of one row; those of a word go to ``position`` and on."""
    for _ in range(tl.max(counts, 0)):  # each word gives up its lowest bit
        kept = words != 0
        lower = words - kept.to(tl.uint32)
        latent = word_columns * 32 + _popcount(lower & (lower ^ words))
        z = tl.load(z_ptr + latent, mask=kept, other=0.0)
        threshold = tl.load(threshold_ptr + latent, mask=kept, other=0.0)
        stored = kept & (position < room)
        # What is kept and not active is bad input: NaN, -Inf, or a NaN θ.
        tl.store(values_ptr + position, tl.where(z > threshold, z, float("nan")), mask=stored)
        tl.store(indices_ptr + position, latent, mask=stored)
        words = words & lower
        position += 1


@triton.jit(do_not_specialize=["room"])
def _compact_kernel(
    words_ptr, z_ptr, threshold_ptr, starts_ptr, values_ptr, indices_ptr, room, F, n_words, per_row, WORDS: tl.constexpr
):  # fmt: skip
    """Moves the kept entries of a segment to starts[segment] (int64) and on; most segments of a wide code are empty."""
    segment = tl.program_id(0)
    start = tl.load(starts_ptr + segment)
    if tl.load(starts_ptr + segment + 1) > start:
        row = (segment // per_row).to(tl.int64)
        word_columns = (segment % per_row) * WORDS + tl.arange(0, WORDS)
        words = tl.load(words_ptr + row * n_words + word_columns, mask=word_columns < n_words, other=0).to(tl.uint32)
        counts = _popcount(words)
        position = start + tl.cumsum(counts, 0) - counts
        _move_words(
            words, counts, position, word_columns, z_ptr + row * F, threshold_ptr, values_ptr, indices_ptr, room
        )  # fmt: skip


@triton.jit(do_not_specialize=["room"])
def _compact_rows_kernel(
    words_ptr, z_ptr, threshold_ptr, offsets_ptr, values_ptr, indices_ptr, room, F, n_words, WORDS: tl.constexpr
):  # fmt: skip
    """Counts the rows before this one, whose words lie before its own, and moves its entries as far as room goes."""
    row = tl.program_id(0)
    lanes = tl.arange(0, WORDS)
    row_words = row.to(tl.int64) * n_words
    before = tl.zeros([WORDS], tl.int64)
    for first in range(0, row_words, WORDS):
        words = tl.load(words_ptr + first + lanes, mask=first + lanes < row_words, other=0)
        before += _popcount(words.to(tl.uint32))
    start = tl.sum(before, 0)
    tl.store(offsets_ptr + row, start)
    for first in range(0, n_words, WORDS):
        word_columns = first + lanes
        words = tl.load(words_ptr + row_words + word_columns, mask=word_columns < n_words, other=0).to(tl.uint32)
        counts = _popcount(words)
        position = start + tl.cumsum(counts, 0) - counts
        start += tl.sum(counts, 0)
        z_row = z_ptr + row.to(tl.int64) * F
        _move_words(words, counts, position, word_columns, z_row, threshold_ptr, values_ptr, indices_ptr, room)
    if row == tl.num_programs(0) - 1:
        tl.store(offsets_ptr + row + 1, start)


def scan(words: Tensor, rows: int, per_row: int, starts: Tensor, offsets: Tensor, first_row: int = 0) -> None:
    """Count and scan the kept entries of ``rows`` rows of words, the first of them ``first_row`` of a batch whose
    starts [segments + 1] and offsets [rows + 1] are int64; two launches."""
    segments = rows * per_row
    programs = triton.cdiv(segments, COUNT_BLOCK)
    counts, totals = words.new_empty(segments), words.new_empty(programs)
    arguments = (words, counts, totals, segments, words.shape[1], per_row)
    launch(_count_kernel, (programs,), *arguments, on=words, WORDS=SEGMENT // 32, BLOCK=COUNT_BLOCK, num_warps=4)
    launch(
        _scan_kernel,
        (triton.cdiv(segments + 1, SCAN_BLOCK),),
        on=words,
        counts_ptr=counts,
        totals_ptr=totals,
        starts_ptr=starts[first_row * per_row :],
        offsets_ptr=offsets[first_row:],
        n_segments=segments,
        first_row=first_row,
        per_row=per_row,
        GROUP=SCAN_BLOCK,
        TOTALS_OF_GROUP=SCAN_BLOCK // COUNT_BLOCK,
        BLOCK=SCAN_TOTALS,
        num_warps=4,
    )


def _compact(words: Tensor, z: Tensor, threshold: Tensor, starts: Tensor, values: Tensor, indices: Tensor):
    F, segments = z.shape[1], starts.shape[0] - 1
    sizes = (values.shape[0], F, words.shape[1], triton.cdiv(F, SEGMENT))
    arguments = (words, z, threshold, starts, values, indices, *sizes)
    launch(_compact_kernel, (segments,), *arguments, on=words, WORDS=SEGMENT // 32, num_warps=1)


def _compact_rows(words: Tensor, z: Tensor, threshold: Tensor, offsets: Tensor, values: Tensor, indices: Tensor):
    N, F = z.shape
    arguments = (words, z, threshold, offsets, values, indices, values.shape[0], F, words.shape[1])
    launch(_compact_rows_kernel, (N,), *arguments, on=words, WORDS=ROW_BLOCK, num_warps=4)


def _product(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, config: EncodeConfig):
    """Scratch z [N, F], written where kept, and the words that say where."""
    N, F = x.shape[0], W_enc.shape[1]
    z = x.new_empty(N, F, dtype=torch.float32)
    words = x.new_empty(N, words_per_row(F), dtype=torch.int32)
    encode_gemm(x, W_enc, b_enc, threshold, z, words, config)
    return z, words


def _outputs(nnz: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Values and indices."""
    return like.new_empty(nnz, dtype=torch.float32), like.new_empty(nnz, dtype=torch.int32)


def _encode_chunk(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, config: EncodeConfig):
    """values, indices and offsets of a chunk of tokens; waits for the device once, to learn nnz."""
    z, words = _product(x, W_enc, b_enc, threshold, config)
    rows, per_row = z.shape[0], triton.cdiv(z.shape[1], SEGMENT)
    starts, offsets = (x.new_empty(n + 1, dtype=torch.int64) for n in (rows * per_row, rows))
    scan(words, rows, per_row, starts, offsets)
    values, indices = _outputs(int(offsets[-1]), x)
    _compact(words, z, threshold, starts, values, indices)
    return values, indices, offsets


def _encode_few(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, config: EncodeConfig):
    """The same of up to FEW_TOKENS tokens in two kernels. Values and indices are views of the room they were given."""
    z, words = _product(x, W_enc, b_enc, threshold, config)
    offsets = x.new_empty(z.shape[0] + 1, dtype=torch.int64)
    room = min(z.numel(), FEW_TOKENS_L0 * z.shape[0])
    while True:
        values, indices = _outputs(room, x)
        _compact_rows(words, z, threshold, offsets, values, indices)
        nnz = int(offsets[-1])
        if nnz <= room:
            return values[:nnz], indices[:nnz], offsets
        room = nnz


def _encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    N, F = x.shape[0], W_enc.shape[1]
    if N == 0 or F == 0:
        return *_outputs(0, x), torch.zeros(N + 1, dtype=torch.int64, device=x.device)
    config = launch_config(x, W_enc)
    rows = tokens_per_chunk(N, F)
    b_enc, threshold = b_enc.contiguous(), threshold.contiguous()
    if min(rows, FEW_TOKENS) >= N:
        return _encode_few(x, W_enc, b_enc, threshold, config)
    offsets = torch.zeros(N + 1, dtype=torch.int64, device=x.device)
    values, indices, nnz = [], [], 0
    for start in range(0, N, rows):
        chunk = _encode_chunk(x[start : start + rows], W_enc, b_enc, threshold, config)
        values.append(chunk[0])
        indices.append(chunk[1])
        offsets[start + 1 : start + rows + 1] = chunk[2][1:] + nnz
        nnz += chunk[0].shape[0]
    if len(values) == 1:
        return values[0], indices[0], offsets
    return torch.cat(values), torch.cat(indices), offsets


def _preactivations(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    N, F = x.shape[0], W_enc.shape[1]
    z = x.new_empty(N, F, dtype=torch.float32)
    if z.numel() > 0:
        # Nothing compares with NaN, so every z is kept.
        lower = torch.full((F,), torch.nan, dtype=torch.float32, device=x.device)
        words = x.new_empty(N, words_per_row(F), dtype=torch.int32)
        encode_gemm(x, W_enc, b_enc.contiguous(), lower, z, words, launch_config(x, W_enc))
    return z


def _preactivations_fake(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], W_enc.shape[1], dtype=torch.float32)


preactivations = register(
    "preactivations(Tensor x, Tensor W_enc, Tensor b_enc) -> Tensor", _preactivations, _preactivations_fake
)


def _encode_fake(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    nnz = torch.library.get_ctx().new_dynamic_size()
    offsets = x.new_empty(x.shape[0] + 1, dtype=torch.int64)
    return x.new_empty(nnz, dtype=torch.float32), x.new_empty(nnz, dtype=torch.int32), offsets


encode_op = register(
    "encode_forward(Tensor x, Tensor W_enc, Tensor b_enc, Tensor threshold)"
    " -> (Tensor values, Tensor indices, Tensor offsets)",
    _encode,
    _encode_fake,
)


def encode_forward(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """values [nnz] fp32, indices [nnz] int32, offsets [N + 1] int64, by the contract of `reference.encode_forward`.

    x [N, d] and W_enc [d, F] may have any strides. Latent-major W_enc (a transposed contiguous [F, d]) and row-major x
    whose rows start on 16-byte boundaries are the fast path; others are read in place, never copied, by narrower loads.
    """
    return encode_op(x, W_enc, b_enc, threshold)
