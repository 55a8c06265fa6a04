"""The encoder's product z = x·W_enc + b_enc, with what becomes of each z decided in its epilogue.

x [N, d] and W_enc [d, F] of one dtype and any strides, b_enc [F], θ = threshold [F] fp32. Three modes:

    sparse   z where z > lower     z into scratch fp32 where kept, kept in bits
    dense    f = z·1[z > θ]        f of every entry in its own dtype, z > θ in bits, |z − θ| < ε/2 in bits
    largest  z                     every z fp32, and in the place of a word the largest key of its 32 latents

lower [F] is the largest z of a latent that is not kept: θ itself, or with a window of width ε the last z below it
(`entries.begin`), so that one comparison decides for both. Bits are packed by 32 along the latents, lowest first,
into int32 words [N, ⌈F/32⌉]. Everything is decided on the fp32 accumulator. Scratch is written only where kept; nobody
initialises it and nobody reads it back whole. A key is the bits of a positive z, those of +Inf where z is not finite,
else 0 (`selection`). In that mode the place of θ is taken by which latents may be chosen, int8 [F] or None: all; the z
of the others becomes 0.

What cannot be compared, NaN or −Inf, is bad input and must stay visible: it counts as kept and as active.

The epilogue holds a tile of z and what it makes of it. A scan over it, to compact the kept entries on the spot, was
compiled and rejected: kilobytes of spilt registers per thread. For the same reason the accumulator is split by columns.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .common import architecture, launch


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
    input_precision: str = "ieee"  # of fp32 products; "tf32" rounds the operands and runs on tensor cores


# Compiled for these with room for four stages of [128 + 256, 64] tiles, and real TMA loads.
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
DESCRIPTORS = EncodeConfig(128, 256, 64, 4, 8, 4, descriptors=True)
# tf32 on tensor cores: the tiles of the 16-bit dtypes, half as deep for the same bytes.
TF32 = EncodeConfig(128, 128, 32, 2, 8, 3, input_precision="tf32")
TF32_AMD = EncodeConfig(128, 128, 32, 2, 8, 2, input_precision="tf32")
TF32_DESCRIPTORS = EncodeConfig(128, 256, 32, 4, 8, 4, descriptors=True, input_precision="tf32")


def encode_config(arch: str, dtype: torch.dtype, n_tokens: int, describable: bool, tf32: bool = False) -> EncodeConfig:
    """The launch of one GEMM, from the target, the operands' dtype, N, and whether descriptors can address them.

    tf32: whether fp32 operands may be rounded to it. Of AMD's cards only gfx942 has the instructions.
    """
    datacentre, amd = describable and arch in DATACENTRE, arch.startswith("gfx")
    if dtype == torch.float32:
        if n_tokens <= 16:
            return FP32_TINY
        if not tf32 or (amd and arch != "gfx942"):
            return FP32
        return TF32_DESCRIPTORS if datacentre else TF32_AMD if amd else TF32
    if n_tokens <= 16:
        return TINY
    if n_tokens <= 128:
        return SMALL
    if datacentre:
        return DESCRIPTORS
    return POINTERS_AMD if amd else POINTERS


INFINITE = tl.constexpr(0x7F800000)  # the bits of +Inf
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


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
def _store_bits(
    words_ptr, marked, rows, first_column, N, F, MASKED: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    bits = marked.to(tl.int32) << (tl.arange(0, WIDTH) % 32)[None, :]
    words = tl.sum(tl.reshape(bits, (BLOCK_M, WIDTH // 32, 32)), 2)
    word_columns = first_column // 32 + tl.arange(0, WIDTH // 32)
    n_words = tl.cdiv(F, 32)
    outputs = words_ptr + rows.to(tl.int64)[:, None] * n_words + word_columns[None, :]
    if MASKED:
        tl.store(outputs, words, mask=(rows < N)[:, None] & (word_columns < n_words)[None, :])
    else:
        tl.store(outputs, words)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b)


@triton.jit
def _largest_slab(
    acc, rows, first_column, b_enc_ptr, may_ptr, z_ptr, keys_ptr, N, F,
    MASKED: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Bias, z and the largest key of each 32 of one [BLOCK_M, WIDTH] slab. What is beyond F counts as 0."""
    columns = first_column + tl.arange(0, WIDTH)
    in_columns = columns < F
    b_enc = tl.load(b_enc_ptr + columns, mask=in_columns) if MASKED else tl.load(b_enc_ptr + columns)
    z = acc + b_enc.to(tl.float32)[None, :]
    if may_ptr is not None:
        may = tl.load(may_ptr + columns, mask=in_columns, other=0) if MASKED else tl.load(may_ptr + columns)
        z = tl.where((may > 0)[None, :], z, 0.0)
    wide_rows = rows.to(tl.int64)[:, None]
    outputs = z_ptr + wide_rows * F + columns[None, :]
    if MASKED:
        z = tl.where(in_columns[None, :], z, 0.0)
        tl.store(outputs, z, mask=(rows < N)[:, None] & in_columns[None, :])
    else:
        tl.store(outputs, z)
    groups = tl.reshape(z, (BLOCK_M, WIDTH // 32, 32))
    highest, lowest = tl.reduce(groups, 2, _larger), tl.reduce(groups, 2, _smaller)
    bits = tl.where(highest > 0, highest, 0.0).to(tl.int32, bitcast=True)
    # NaN compares with nothing.
    keys = tl.where((highest < float("inf")) & (lowest > float("-inf")), bits, INFINITE)
    group_columns = first_column // 32 + tl.arange(0, WIDTH // 32)
    n_groups = tl.cdiv(F, 32)
    outputs = keys_ptr + wide_rows * n_groups + group_columns[None, :]
    if MASKED:
        tl.store(outputs, keys, mask=(rows < N)[:, None] & (group_columns < n_groups)[None, :])
    else:
        tl.store(outputs, keys)


@triton.jit
def _gate_slab(
    acc, rows, first_column, b_enc_ptr, threshold_ptr, half_bandwidth, z_ptr, words_ptr, window_ptr, N, F,
    MODE: tl.constexpr, MASKED: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Bias, gate, values and bits of one [BLOCK_M, WIDTH] slab of the accumulator."""
    columns = first_column + tl.arange(0, WIDTH)
    in_columns = columns < F
    present = (rows < N)[:, None] & in_columns[None, :]
    if MASKED:
        b_enc = tl.load(b_enc_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)
        threshold = tl.load(threshold_ptr + columns, mask=in_columns, other=0.0)[None, :]
    else:
        b_enc = tl.load(b_enc_ptr + columns).to(tl.float32)
        threshold = tl.load(threshold_ptr + columns)[None, :]
    z = acc + b_enc[None, :]
    # What is neither active nor a finite z at most θ is bad input and must stay visible: NaN, -Inf, or a NaN θ.
    if MODE == "sparse":
        # With a finite edge +Inf lies above it, so two comparisons see all: |z| < Inf takes more instructions.
        lower = tl.minimum(threshold, LARGEST, propagate_nan=tl.PropagateNan.ALL)
        inactive = (z <= lower) & (z > float("-inf"))
    else:  # the edges as well as θ would spill on sm_80
        inactive = (z <= threshold) & (tl.abs(z) < float("inf"))
    marked = ~inactive
    if MASKED:
        marked = marked & present
    outputs = z_ptr + rows.to(tl.int64)[:, None] * F + columns[None, :]
    if MODE == "sparse":
        tl.store(outputs, z, mask=marked)
    else:
        f = tl.where(z > threshold, z, tl.where(inactive, 0.0, float("nan"))).to(z_ptr.dtype.element_ty)
        inside = tl.abs(z - threshold) < half_bandwidth
        if MASKED:
            inside = inside & present
            tl.store(outputs, f, mask=present)
        else:
            tl.store(outputs, f)
        _store_bits(window_ptr, inside, rows, first_column, N, F, MASKED, BLOCK_M, WIDTH)
    _store_bits(words_ptr, marked, rows, first_column, N, F, MASKED, BLOCK_M, WIDTH)


@triton.jit
def _slab(
    acc, rows, first_column, b_enc_ptr, threshold_ptr, half_bandwidth, z_ptr, words_ptr, window_ptr, N, F,
    MODE: tl.constexpr, MASKED: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    of_slab = (acc, rows, first_column, b_enc_ptr, threshold_ptr)
    if MODE == "largest":
        _largest_slab(*of_slab, z_ptr, words_ptr, N, F, MASKED, BLOCK_M, WIDTH)
    else:
        outputs = (z_ptr, words_ptr, window_ptr)
        _gate_slab(*of_slab, half_bandwidth, *outputs, N, F, MODE, MASKED, BLOCK_M, WIDTH)


@triton.jit
def _halves(acc, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, WIDTH // 2)), (0, 2, 1)))


@triton.jit
def _gate(
    acc, pid_m, pid_n, b_enc_ptr, threshold_ptr, half_bandwidth, z_ptr, words_ptr, window_ptr, N, F,
    MODE: tl.constexpr, MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    first = pid_n * BLOCK_N
    out = (b_enc_ptr, threshold_ptr, half_bandwidth, z_ptr, words_ptr, window_ptr, N, F)
    WIDTH: tl.constexpr = BLOCK_N // SPLIT
    if SPLIT == 1:
        _slab(acc, rows, first, *out, MODE, MASKED, BLOCK_M, WIDTH)
    else:
        left, right = _halves(acc, BLOCK_M, BLOCK_N)
        if SPLIT == 2:
            _slab(left, rows, first, *out, MODE, MASKED, BLOCK_M, WIDTH)
            _slab(right, rows, first + WIDTH, *out, MODE, MASKED, BLOCK_M, WIDTH)
        else:
            left_0, left_1 = _halves(left, BLOCK_M, BLOCK_N // 2)
            _slab(left_0, rows, first, *out, MODE, MASKED, BLOCK_M, WIDTH)
            _slab(left_1, rows, first + WIDTH, *out, MODE, MASKED, BLOCK_M, WIDTH)
            right_0, right_1 = _halves(right, BLOCK_M, BLOCK_N // 2)
            _slab(right_0, rows, first + 2 * WIDTH, *out, MODE, MASKED, BLOCK_M, WIDTH)
            _slab(right_1, rows, first + 3 * WIDTH, *out, MODE, MASKED, BLOCK_M, WIDTH)


@triton.jit(do_not_specialize=["N"])
def _encode_fwd_kernel(
    x_ptr, W_enc_ptr, b_enc_ptr, threshold_ptr, half_bandwidth, z_ptr, words_ptr, window_ptr, N, F, D,
    stride_xn, stride_xd, stride_wd, stride_wf,
    MODE: tl.constexpr, MASKED: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile of z, gated: values into z [N, F], and one bit an entry into words and window [N, ceil(F / 32)]."""
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
        acc = tl.dot(x, W, acc, input_precision=INPUT_PRECISION)
        x_ptrs += step * stride_xd
        W_ptrs += step * stride_wd
    _gate(
        acc, pid_m, pid_n, b_enc_ptr, threshold_ptr, half_bandwidth, z_ptr, words_ptr, window_ptr, N, F,
        MODE, MASKED, BLOCK_M, BLOCK_N, SPLIT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def _encode_fwd_descriptor_kernel(
    x_desc, W_enc_desc, b_enc_ptr, threshold_ptr, half_bandwidth, z_ptr, words_ptr, window_ptr, N, F, D,
    MODE: tl.constexpr, MASKED: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """The same by descriptors: x [N, d] in blocks of [BLOCK_M, BLOCK_K], W_enc [F, d] in [BLOCK_N, BLOCK_K]."""
    pid_m, pid_n = _tile(N, F, BLOCK_M, BLOCK_N, GROUP_M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        x = x_desc.load([pid_m * BLOCK_M, start])
        W = W_enc_desc.load([pid_n * BLOCK_N, start])
        acc = tl.dot(x, W.T, acc, input_precision=INPUT_PRECISION)
    _gate(
        acc, pid_m, pid_n, b_enc_ptr, threshold_ptr, half_bandwidth, z_ptr, words_ptr, window_ptr, N, F,
        MODE, MASKED, BLOCK_M, BLOCK_N, SPLIT,
    )  # fmt: skip


def describable(matrix: Tensor) -> bool:
    """Whether TMA can address a matrix: dense rows that do not overlap, 16-byte aligned base and row stride."""
    return (
        matrix.stride(1) == 1
        and matrix.stride(0) >= matrix.shape[1] > 0
        and matrix.stride(0) * matrix.element_size() % 16 == 0
        and matrix.data_ptr() % 16 == 0
    )


def launch_config(x: Tensor, W_enc: Tensor, tf32: bool = False) -> EncodeConfig:
    """`encode_config` of these operands."""
    return encode_config(architecture(x.device), x.dtype, x.shape[0], describable(x) and describable(W_enc.T), tf32)


def words_per_row(F: int) -> int:
    return triton.cdiv(F, 32)


def encode_gemm(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor | None, z: Tensor, words: Tensor, config: EncodeConfig,
    mode: str = "sparse", bandwidth: float = 0.0, window: Tensor | None = None,
) -> None:  # fmt: skip
    """Launches one product into z [N, F] (fp32, dense: in any float dtype), words and, if dense, window.

    b_enc, threshold and the outputs are contiguous. Sparse: ``threshold`` is lower, the largest z that is not kept;
    largest: int8 [F], 1 for the latents that may be chosen, or None, and words are keys.
    """
    (N, d), F = x.shape, W_enc.shape[1]
    options = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    options |= {"SPLIT": config.split, "GROUP_M": config.group_m, "INPUT_PRECISION": config.input_precision}
    # Dense by pointers keeps its masks: without them 64 x 128 spills on sm_80.
    masked = N % config.block_m > 0 or F % config.block_n > 0 or (mode == "dense" and not config.descriptors)
    options |= {"MASKED": masked, "MODE": mode}
    options |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
    grid = (triton.cdiv(N, config.block_m) * triton.cdiv(F, config.block_n),)
    rest = (b_enc, threshold, bandwidth / 2, z, words, words if window is None else window, N, F, d)
    if config.descriptors:
        x_desc = TensorDescriptor.from_tensor(x, [config.block_m, config.block_k])
        W_desc = TensorDescriptor.from_tensor(W_enc.T, [config.block_n, config.block_k])
        launch(_encode_fwd_descriptor_kernel, grid, x_desc, W_desc, *rest, on=x, **options)
    else:
        launch(_encode_fwd_kernel, grid, x, W_enc, *rest, *x.stride(), *W_enc.stride(), on=x, **options)
