"""Sparse encoding: f = z·1[z > θ] with z = x·W_enc + b_enc, as compressed sparse rows, without a dense [N, F] pass.

x [N, d], W_enc [d, F], b_enc [F], θ = threshold [F] fp32  →  values [nnz] fp32, indices [nnz] int32, offsets [N + 1].

The GEMM leaves one bit per entry and the value of the entries it keeps, in scratch (`encode_gemm`). The bits are then
counted per segment of a row, the counts are scanned, and a second light kernel moves the kept values to their place in
the rows, latents ascending. Nothing is bounded by an assumed L0, and no order depends on scheduling.
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


@triton.jit
def _popcount(words):  # uint32
    pairs = words - ((words >> 1) & 0x55555555)
    nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    octets = (nibbles + (nibbles >> 4)) & 0x0F0F0F0F
    halves = octets + (octets >> 8)
    return ((halves + (halves >> 16)) & 0x3F).to(tl.int32)


@triton.jit(do_not_specialize=["n_segments"])
def _count_kernel(words_ptr, counts_ptr, n_segments, n_words, per_row, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """Kept entries of each segment: WORDS words of one row, ``per_row`` segments a row, BLOCK segments a program."""
    segments = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    word_columns = (segments % per_row)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    words = tl.load(
        words_ptr + (segments // per_row).to(tl.int64)[:, None] * n_words + word_columns,
        mask=(segments < n_segments)[:, None] & (word_columns < n_words),
        other=0,
    )
    tl.store(counts_ptr + segments, tl.sum(_popcount(words.to(tl.uint32)), 1), mask=segments < n_segments)


@triton.jit
def _compact_kernel(
    words_ptr, z_ptr, starts_ptr, values_ptr, indices_ptr, F, n_words, per_row, WORDS: tl.constexpr
):  # fmt: skip
    """Moves the kept entries of a segment to starts[segment] (int64) and on; most segments of a wide code are empty."""
    segment = tl.program_id(0)
    start = tl.load(starts_ptr + segment)
    if tl.load(starts_ptr + segment + 1) > start:
        row = (segment // per_row).to(tl.int64)
        word_columns = (segment % per_row) * WORDS + tl.arange(0, WORDS)
        words = tl.load(words_ptr + row * n_words + word_columns, mask=word_columns < n_words, other=0).to(tl.uint32)
        counts = _popcount(words)
        position = tl.cumsum(counts, 0) - counts
        for _ in range(tl.max(counts, 0)):  # each word gives up its lowest bit
            kept = words != 0
            lower = words - kept.to(tl.uint32)
            latent = word_columns * 32 + _popcount(lower & (lower ^ words))
            z = tl.load(z_ptr + row * F + latent, mask=kept, other=0.0)
            tl.store(values_ptr + start + position, z, mask=kept)
            tl.store(indices_ptr + start + position, latent, mask=kept)
            words = words & lower
            position += 1


def _count(words: Tensor, counts: Tensor, per_row: int):
    grid = (triton.cdiv(counts.shape[0], COUNT_BLOCK),)
    arguments = (words, counts, counts.shape[0], words.shape[1], per_row)
    launch(_count_kernel, grid, *arguments, on=words, WORDS=SEGMENT // 32, BLOCK=COUNT_BLOCK, num_warps=4)


def _compact(words: Tensor, z: Tensor, starts: Tensor, values: Tensor, indices: Tensor):
    F, segments = z.shape[1], starts.shape[0] - 1
    arguments = (words, z, starts, values, indices, F, words.shape[1], triton.cdiv(F, SEGMENT))
    launch(_compact_kernel, (segments,), *arguments, on=words, WORDS=SEGMENT // 32, num_warps=1)


def _encode_chunk(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, config: EncodeConfig):
    """values, indices and offsets of a few tokens; waits for the device once, to learn nnz."""
    N, F = x.shape[0], W_enc.shape[1]
    per_row = triton.cdiv(F, SEGMENT)
    z = x.new_empty(N, F, dtype=torch.float32)
    words = x.new_empty(N, words_per_row(F), dtype=torch.int32)
    counts = x.new_empty(N * per_row, dtype=torch.int32)
    encode_gemm(x, W_enc, b_enc, threshold, z, words, config)
    _count(words, counts, per_row)
    starts = torch.zeros(counts.shape[0] + 1, dtype=torch.int64, device=x.device)
    torch.cumsum(counts, 0, dtype=torch.int64, out=starts[1:])
    nnz = int(starts[-1])
    values = x.new_empty(nnz, dtype=torch.float32)
    indices = x.new_empty(nnz, dtype=torch.int32)
    _compact(words, z, starts, values, indices)
    return values, indices, starts[::per_row]


def _encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    N, F = x.shape[0], W_enc.shape[1]
    offsets = torch.zeros(N + 1, dtype=torch.int64, device=x.device)
    if N == 0 or F == 0:
        return x.new_empty(0, dtype=torch.float32), x.new_empty(0, dtype=torch.int32), offsets
    config = launch_config(x, W_enc)
    rows = tokens_per_chunk(N, F)
    values, indices, nnz = [], [], 0
    for start in range(0, N, rows):
        chunk = _encode_chunk(x[start : start + rows], W_enc, b_enc.contiguous(), threshold.contiguous(), config)
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
        threshold = torch.zeros(F, dtype=torch.float32, device=x.device)
        words = x.new_empty(N, words_per_row(F), dtype=torch.int32)
        # a window of infinite width keeps every z
        encode_gemm(x, W_enc, b_enc.contiguous(), threshold, z, words, launch_config(x, W_enc), "entries", float("inf"))
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
