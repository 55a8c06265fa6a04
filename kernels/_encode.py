"""Sparse encoding: f = z·1[z > θ] with z = x·W_enc + b_enc, as compressed sparse rows, without a dense [N, F] pass.

x [N, d], W_enc [d, F], b_enc [F], θ = threshold [F] fp32  →  values [nnz] fp32, indices [nnz] int32, offsets [N + 1].

The GEMM's epilogue decides each entry on the fp32 accumulator, packs the decisions into one bit per entry and writes
the value only of the entries it keeps, into scratch that nobody initialises and nobody reads back whole. The bits are
then counted per segment of a row, the counts are scanned, and a second light kernel moves the kept values to their
place in the rows, latents ascending. Nothing is bounded by an assumed L0, and no order depends on scheduling.

Compacting inside the epilogue instead was compiled and rejected: a scan over the accumulator spills kilobytes of
registers per thread. For the same reason the accumulator is split by columns before the epilogue.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._common import architecture, on_device, register

# Scratch for one chunk of tokens: fp32 z, of which only the kept entries are written, and one bit per entry.
SCRATCH_BYTES = 1 << 30
# Latents per program of the compaction: 128 words, four for each lane of one warp, which needs no barrier. Work goes by
# the word: one lane per latent was compiled too, and its registers leave half as many rows under way.
SEGMENT = 4096
# Segments per program of the count: 4 KiB of words for four warps.
COUNT_BLOCK = 8


@dataclass(frozen=True)
class EncodeConfig:
    block_m: int  # tokens per tile
    block_n: int  # latents per tile, a multiple of 32·split
    block_k: int
    split: int  # column slabs the epilogue handles one after the other: 1, 2 or 4
    num_warps: int
    num_stages: int
    descriptors: bool = False  # operands through tensor descriptors (TMA) instead of pointers
    group_m: int = 8  # row tiles that run side by side so that a column of W_enc tiles stays in L2


# Compiled for these with room for three stages of [128 + 256, 64] tiles, and real TMA loads.
DATACENTRE = ("sm_90", "sm_100", "sm_103")

# fp32 products run on the FP32 units (matrix cores on AMD) and keep accumulator and operands in registers: with 32
# accumulators a thread two blocks fit an SM; 64, as of 128 x 128, took 236-255 registers and spilt on sm_100.
FP32 = EncodeConfig(128, 64, 32, 1, 8, 3)
# Up to 16 tokens the product is bound by reading W_enc: the smallest row tile there is, and a deep, narrow tile of
# W_enc so that even F = 16k gives every SM work.
FP32_TINY = EncodeConfig(16, 64, 64, 1, 4, 3)
TINY = EncodeConfig(16, 64, 128, 1, 4, 3)
# Up to 128 tokens tiles of 128 x 256 would be too few: 64 of them for F = 16k.
SMALL = EncodeConfig(64, 128, 64, 2, 4, 3)
# 64 KiB of shared memory fits every card since sm_80. In two slabs the epilogue needs 157-184 registers.
POINTERS = EncodeConfig(128, 128, 64, 2, 8, 3)
# 64 KiB is all there is on gfx942, so two stages.
POINTERS_AMD = EncodeConfig(128, 128, 64, 2, 8, 2)
# In two slabs this epilogue spills on sm_100 with Triton 3.6, in one on every target; in four nowhere. Persistent and
# warp-specialised forms of it spill too.
DESCRIPTORS = EncodeConfig(128, 256, 64, 4, 8, 3, descriptors=True)


def encode_config(arch: str, dtype: torch.dtype, n_tokens: int, describable: bool) -> EncodeConfig:
    """The launch of one GEMM, from the target, the operands' dtype, N, and whether descriptors can address them."""
    if dtype == torch.float32:
        return FP32_TINY if n_tokens <= 16 else FP32
    if n_tokens <= 16:
        return TINY
    if n_tokens <= 128:
        return SMALL
    if describable and arch in DATACENTRE:
        return DESCRIPTORS
    return POINTERS_AMD if arch.startswith("gfx") else POINTERS


@triton.jit
def _popcount(words):  # uint32
    pairs = words - ((words >> 1) & 0x55555555)
    nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    octets = (nibbles + (nibbles >> 4)) & 0x0F0F0F0F
    halves = octets + (octets >> 8)
    return ((halves + (halves >> 16)) & 0x3F).to(tl.int32)


@triton.jit
def _tile(N, F, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row tile and column tile of this program, GROUP_M row tiles advancing together over the columns."""
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(N, BLOCK_M)
    group = GROUP_M * tl.cdiv(F, BLOCK_N)
    first_m = (pid // group) * GROUP_M
    rows = tl.minimum(tiles_m - first_m, GROUP_M)
    return first_m + (pid % group) % rows, (pid % group) // rows


@triton.jit
def _gate_slab(
    acc, rows, first_column, b_enc_ptr, threshold_ptr, z_ptr, words_ptr, N, F,
    BLOCK_M: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Bias, gate, bits and kept values of one [BLOCK_M, WIDTH] slab of the accumulator."""
    columns = first_column + tl.arange(0, WIDTH)
    in_rows, in_columns = rows < N, columns < F
    b_enc = tl.load(b_enc_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)
    threshold = tl.load(threshold_ptr + columns, mask=in_columns, other=0.0)[None, :]
    z = acc + b_enc[None, :]
    active = z > threshold
    # What is neither active nor a finite z at most θ is bad input and must stay visible: NaN, -Inf, or a NaN θ.
    inactive = (z <= threshold) & (tl.abs(z) < float("inf"))
    kept = ~inactive & in_rows[:, None] & in_columns[None, :]
    value = tl.where(active, z, float("nan"))
    tl.store(z_ptr + rows.to(tl.int64)[:, None] * F + columns[None, :], value, mask=kept)
    bits = kept.to(tl.int32) << (tl.arange(0, WIDTH) % 32)[None, :]
    words = tl.sum(tl.reshape(bits, (BLOCK_M, WIDTH // 32, 32)), 2)
    word_columns = first_column // 32 + tl.arange(0, WIDTH // 32)
    n_words = tl.cdiv(F, 32)
    tl.store(
        words_ptr + rows.to(tl.int64)[:, None] * n_words + word_columns[None, :],
        words,
        mask=in_rows[:, None] & (word_columns < n_words)[None, :],
    )


@triton.jit
def _halves(acc, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, WIDTH // 2)), (0, 2, 1)))


@triton.jit
def _gate(
    acc, pid_m, pid_n, b_enc_ptr, threshold_ptr, z_ptr, words_ptr, N, F,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    first = pid_n * BLOCK_N
    out = (b_enc_ptr, threshold_ptr, z_ptr, words_ptr, N, F)
    WIDTH: tl.constexpr = BLOCK_N // SPLIT
    if SPLIT == 1:
        _gate_slab(acc, rows, first, *out, BLOCK_M, WIDTH)
    else:
        left, right = _halves(acc, BLOCK_M, BLOCK_N)
        if SPLIT == 2:
            _gate_slab(left, rows, first, *out, BLOCK_M, WIDTH)
            _gate_slab(right, rows, first + WIDTH, *out, BLOCK_M, WIDTH)
        else:
            left_0, left_1 = _halves(left, BLOCK_M, BLOCK_N // 2)
            _gate_slab(left_0, rows, first, *out, BLOCK_M, WIDTH)
            _gate_slab(left_1, rows, first + WIDTH, *out, BLOCK_M, WIDTH)
            right_0, right_1 = _halves(right, BLOCK_M, BLOCK_N // 2)
            _gate_slab(right_0, rows, first + 2 * WIDTH, *out, BLOCK_M, WIDTH)
            _gate_slab(right_1, rows, first + 3 * WIDTH, *out, BLOCK_M, WIDTH)


@triton.jit(do_not_specialize=["N"])
def _encode_fwd_kernel(
    x_ptr, W_enc_ptr, b_enc_ptr, threshold_ptr, z_ptr, words_ptr, N, F, D,
    stride_xn, stride_xd, stride_wd, stride_wf,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile of z, gated: into z [N, F] fp32 where kept, and one bit an entry into words [N, ceil(F / 32)] int32."""
    pid_m, pid_n = _tile(N, F, BLOCK_M, BLOCK_N, GROUP_M)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    in_rows, in_columns = (rows < N)[:, None], (columns < F)[None, :]
    step = tl.full((), BLOCK_K, tl.int64)
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * stride_xn + depth.to(tl.int64)[None, :] * stride_xd
    W_ptrs = W_enc_ptr + depth.to(tl.int64)[:, None] * stride_wd + columns.to(tl.int64)[None, :] * stride_wf
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        in_depth = start + depth < D
        x = tl.load(x_ptrs, mask=in_rows & in_depth[None, :], other=0.0)
        W = tl.load(W_ptrs, mask=in_depth[:, None] & in_columns, other=0.0)
        acc = tl.dot(x, W, acc, input_precision="ieee")
        x_ptrs += step * stride_xd
        W_ptrs += step * stride_wd
    _gate(acc, pid_m, pid_n, b_enc_ptr, threshold_ptr, z_ptr, words_ptr, N, F, BLOCK_M, BLOCK_N, SPLIT)


@triton.jit(do_not_specialize=["N"])
def _encode_fwd_descriptor_kernel(
    x_desc, W_enc_desc, b_enc_ptr, threshold_ptr, z_ptr, words_ptr, N, F, D,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """The same by descriptors: x [N, d] in blocks of [BLOCK_M, BLOCK_K], W_enc [F, d] in [BLOCK_N, BLOCK_K]."""
    pid_m, pid_n = _tile(N, F, BLOCK_M, BLOCK_N, GROUP_M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        x = x_desc.load([pid_m * BLOCK_M, start])
        W = W_enc_desc.load([pid_n * BLOCK_N, start])
        acc = tl.dot(x, W.T, acc, input_precision="ieee")
    _gate(acc, pid_m, pid_n, b_enc_ptr, threshold_ptr, z_ptr, words_ptr, N, F, BLOCK_M, BLOCK_N, SPLIT)


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


def _describable(matrix: Tensor) -> bool:
    """Whether TMA can address a matrix: dense rows that do not overlap, 16-byte aligned base and row stride."""
    return (
        matrix.stride(1) == 1
        and matrix.stride(0) >= matrix.shape[1] > 0
        and matrix.stride(0) * matrix.element_size() % 16 == 0
        and matrix.data_ptr() % 16 == 0
    )


def _gemm(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, z: Tensor, words: Tensor, config: EncodeConfig):
    (N, d), F = x.shape, W_enc.shape[1]
    tiles = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    tiles |= {"SPLIT": config.split, "GROUP_M": config.group_m}
    tiles |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
    grid = (triton.cdiv(N, config.block_m) * triton.cdiv(F, config.block_n),)
    outputs = (b_enc, threshold, z, words, N, F, d)
    if config.descriptors:
        x_desc = TensorDescriptor.from_tensor(x, [config.block_m, config.block_k])
        W_desc = TensorDescriptor.from_tensor(W_enc.T, [config.block_n, config.block_k])
        _encode_fwd_descriptor_kernel[grid](x_desc, W_desc, *outputs, **tiles)
    else:
        _encode_fwd_kernel[grid](x, W_enc, *outputs, *x.stride(), *W_enc.stride(), **tiles)


def _count(words: Tensor, counts: Tensor, per_row: int):
    grid = (triton.cdiv(counts.shape[0], COUNT_BLOCK),)
    _count_kernel[grid](
        words, counts, counts.shape[0], words.shape[1], per_row, WORDS=SEGMENT // 32, BLOCK=COUNT_BLOCK, num_warps=4
    )


def _compact(words: Tensor, z: Tensor, starts: Tensor, values: Tensor, indices: Tensor):
    F, segments = z.shape[1], starts.shape[0] - 1
    _compact_kernel[(segments,)](
        words, z, starts, values, indices, F, words.shape[1], triton.cdiv(F, SEGMENT), WORDS=SEGMENT // 32, num_warps=1
    )


def _encode_chunk(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, config: EncodeConfig):
    """values, indices and offsets of a few tokens; waits for the device once, to learn nnz."""
    N, F = x.shape[0], W_enc.shape[1]
    per_row = triton.cdiv(F, SEGMENT)
    z = x.new_empty(N, F, dtype=torch.float32)
    words = x.new_empty(N, triton.cdiv(F, 32), dtype=torch.int32)
    counts = x.new_empty(N * per_row, dtype=torch.int32)
    _gemm(x, W_enc, b_enc, threshold, z, words, config)
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
    config = encode_config(architecture(x.device), x.dtype, N, _describable(x) and _describable(W_enc.T))
    rows = max(1, SCRATCH_BYTES // (4 * F + 4 * triton.cdiv(F, 32)))
    if rows > config.block_m:
        rows -= rows % config.block_m
    values, indices, nnz = [], [], 0
    with on_device(x):
        for start in range(0, N, rows):
            chunk = _encode_chunk(x[start : start + rows], W_enc, b_enc.contiguous(), threshold.contiguous(), config)
            values.append(chunk[0])
            indices.append(chunk[1])
            offsets[start + 1 : start + rows + 1] = chunk[2][1:] + nnz
            nnz += chunk[0].shape[0]
    if len(values) == 1:
        return values[0], indices[0], offsets
    return torch.cat(values), torch.cat(indices), offsets


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
