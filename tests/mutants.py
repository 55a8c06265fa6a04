"""Do the tests notice? One deliberate mistake at a time in a copy of the kernels: python -m tests.mutants [-k REGEX]

Every mutant is a textual change of one file of ``kernels/``. The relevant tests run on the changed copy in a subprocess
and must fail. The unchanged copy runs first and must pass, or a "killed" would prove nothing. Exit status 1 when the
control fails, a mutant survives, or a mutant's text no longer occurs exactly once.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
TIMEOUT = 600


class Mutant(NamedTuple):
    name: str
    file: str  # in kernels/
    old: str  # occurs exactly once
    new: str


CUDA_TESTS = ["tests/kernels/test_cuda.py", "-k", "not compiles and not builds"]

# The tests that must notice a mutant of a file: one dtype, to be quick; "float16" is in "bfloat16".
TESTS = {
    "gpu/jumprelu.py": ["tests/kernels/test_jumprelu.py", "-k", "not compiled and not opcheck and not float16"],
    "gpu/encode.py": ["tests/kernels/test_encode.py", "-k", "not float16 and not shipped_tiles"],
    "gpu/encode_gemm.py": [
        *("tests/kernels/test_encode.py", "tests/kernels/test_entries.py", "tests/kernels/test_dense.py"),
        *("tests/kernels/test_selection.py", "-k"),
        "not float16 and not shipped and not tf32 and not backward and not repeats and not chosen and not small",
    ],
    "gpu/entries.py": ["tests/kernels/test_entries.py", "-k", "not shipped and not repeats"],
    "gpu/dense.py": ["tests/kernels/test_dense.py", "-k", "not every_tiling and not repeats"],
    "gpu/decode.py": ["tests/kernels/test_decode.py", "-k", "not float16"],
    "gpu/residual.py": ["tests/kernels/test_residual.py", "-k", "(not float32 or visible) and not shipped"],
    "gpu/latents.py": ["tests/kernels/test_latents.py", "-k", "not shipped and not float32 and not encoder_times"],
    "gpu/weighted_sum.py": ["tests/kernels/test_latents.py", "-k", "encoder_times"],
    "gpu/update.py": ["tests/kernels/test_update.py", "-k", "not owed"],
    "gpu/transpose.py": ["tests/kernels/test_transpose.py", "-k", "not shipped and not one_latent"],
    "transpose.py": ["tests/kernels/test_latents.py", "-k", "by_latent"],
    "gpu/centring.py": ["tests/kernels/test_conclusion.py", "-k", "centre or not_finite_stays or thresholds_below"],
    "gpu/tokens.py": ["tests/kernels/test_conclusion.py", "-k", "token or missing or share or tanh_has"],
    "gpu/conclusion.py": [
        *("tests/kernels/test_conclusion.py", "-k", "figures or median or skipped or stall or touched"),
    ],
    "gpu/finishing.py": ["tests/kernels/test_conclusion.py", "-k", "finish"],
    "cuda/product.py": ["tests/kernels/test_cuda.py", "-k", "checked or refused"],
    "cuda/csrc/pipeline.h": CUDA_TESTS,
    "cuda/csrc/gate.h": CUDA_TESTS,
    "cuda/csrc/tile.h": CUDA_TESTS,
    "gpu/topk.py": ["tests/kernels/test_topk.py", "-k", "triton and not wait"],
    "gpu/selection.py": ["tests/kernels/test_selection.py", "-k", "not product"],
    "eager/topk.py": ["tests/kernels/test_topk.py", "-k", "pytorch"],
    "entries.py": ["tests/kernels/test_encode.py", "tests/kernels/test_entries.py", "-k", "chunk or scratch or read"],
}

JUMPRELU = [
    ("value at a tie", "f = tl.where(z > threshold, z,", "f = tl.where(z >= threshold, z,"),
    ("plain 0 hides -Inf", "z - z, float", "0.0, float"),
    ("forward bias dropped", "z = pre.to(tl.float32) + b_enc", "z = pre.to(tl.float32)"),
    ("count of masked rows", "((z > threshold) & mask).to", "(z > threshold).to"),
    ("count at a tie", "((z > threshold) & mask)", "((z >= threshold) & mask)"),
    ("l0 stored, not added", "tl.atomic_add(l0_ptr + rows, tl.sum(active, axis=1), mask=rows < N, sem=\"relaxed\")",
     "tl.store(l0_ptr + rows, tl.sum(active, axis=1), mask=rows < N)"),
    ("forward load mask", "stride_pre_n + pre_columns, mask=mask, other=0.0)", "stride_pre_n + pre_columns)"),
    ("forward store mask", "f.to(f_ptr.dtype.element_ty), mask=mask)",
     "f.to(f_ptr.dtype.element_ty), mask=(rows < N)[:, None])"),
    ("32-bit input columns, forward", "columns.to(tl.int64)[None, :] * stride_pre_f",
     "columns[None, :] * stride_pre_f"),
    ("32-bit input rows, forward", "pre_ptr + wide_rows * stride_pre_n + pre_columns",
     "pre_ptr + rows[:, None] * stride_pre_n + pre_columns"),
    ("32-bit output rows, forward", "f_ptr + wide_rows * F", "f_ptr + rows[:, None] * F"),
    ("gate at a tie", "tl.where(z > threshold, 1.0,", "tl.where(z >= threshold, 1.0,"),
    ("gate hides an infinite gradient", "dpre = u * _gate(z, threshold)", "dpre = tl.where(z > threshold, u, 0.0)"),
    ("window without its lower half", "inside = _window(z, threshold, half_bandwidth)",
     "inside = _window(z, threshold, half_bandwidth) * _gate(z, threshold)"),
    ("window includes its edge", "tl.where(distance < half_bandwidth", "tl.where(distance <= half_bandwidth"),
    ("window twice as wide", "half_bandwidth=bandwidth / 2", "half_bandwidth=bandwidth"),
    ("1/bandwidth missing", "slope = threshold / bandwidth", "slope = threshold"),
    ("1/bandwidth twice", "(s / bandwidth)[:, None]", "(s / bandwidth / bandwidth)[:, None]"),
    ("sign of the l0 gradient", "-slope * u - (s", "-slope * u + (s"),
    ("threshold gradient of active entries only, by u", "(-slope * u -", "(-slope * dpre -"),
    ("grad_f taken for contiguous", "wide_rows * stride_grad_f_n + wide_columns", "wide_rows * F + wide_columns"),
    ("grad_l0 taken for contiguous", "rows.to(tl.int64) * stride_grad_l0", "rows.to(tl.int64)"),
    ("32-bit input rows, backward", "pre_offsets = wide_rows * stride_pre_n",
     "pre_offsets = rows[:, None] * stride_pre_n"),
    ("32-bit gradient columns", "stride_grad_f_n + wide_columns * stride_grad_f_f",
     "stride_grad_f_n + columns[None, :] * stride_grad_f_f"),
    ("32-bit output rows, backward", "dpre_ptr + wide_rows * F", "dpre_ptr + rows[:, None] * F"),
    ("programs share partial sums", "partial_ptr + tl.program_id(1).to(tl.int64) * F + columns",
     "partial_ptr + columns"),
    ("sum over the first rows only", "range(0, N_PARTIAL, BLOCK_N)", "range(0, BLOCK_N, BLOCK_N)"),
    ("sum past the partial rows", "mask = (rows < N_PARTIAL)[:, None] &", "mask = (rows < N_PARTIAL + 1)[:, None] &"),
    ("dθ from the sums of db_enc", "partial_ptr + second + offsets", "partial_ptr + offsets"),
]  # fmt: skip

ENCODE_GEMM = [
    ("a tie is kept", "inactive = (z <= lower)", "inactive = (z < lower)"),
    ("+Inf hidden below an infinite threshold", "tl.minimum(threshold, LARGEST, propagate_nan=tl.PropagateNan.ALL)",
     "threshold"),
    ("NaN threshold hidden", "LARGEST, propagate_nan=tl.PropagateNan.ALL)", "LARGEST)"),
    ("-Inf hidden", "(z <= lower) & (z > float(\"-inf\"))", "(z <= lower)"),
    ("dense f at infinite z and threshold", "tl.where(z > threshold, z,", "tl.where(z >= threshold, z,"),
    ("masks left out", "N % config.block_m > 0 or F % config.block_n > 0", "False"),
    ("masks of the columns left out", "N % config.block_m > 0 or F % config.block_n > 0", "N % config.block_m > 0"),
    ("masks of the rows left out", "N % config.block_m > 0 or F % config.block_n > 0", "F % config.block_n > 0"),
    ("bias dropped", "z = acc + b_enc[None, :]", "z = acc"),
    ("row mask of the entries", "present = (rows < N)[:, None] &", "present = (rows >= 0)[:, None] &"),
    ("column mask of the entries", "(rows < N)[:, None] & in_columns[None, :]\n    if MASKED",
     "(rows < N)[:, None]\n    if MASKED"),
    ("kept past the edges", "        marked = marked & present\n", "        marked = marked\n"),
    ("mask of the words", "mask=(rows < N)[:, None] & (word_columns < n_words)[None, :])", "mask=(rows < N)[:, None])"),
    ("last bit of a word lost", "marked.to(tl.int32) << (tl.arange(0, WIDTH) % 32)",
     "marked.to(tl.int32) << (tl.arange(0, WIDTH) % 31)"),
    ("32-bit scratch rows", "z_ptr + rows.to(tl.int64)[:, None] * F", "z_ptr + rows[:, None] * F"),
    ("halves exchanged",
     "left, right = _halves(acc, BLOCK_M, BLOCK_N)", "right, left = _halves(acc, BLOCK_M, BLOCK_N)"),
    ("quarters exchanged", "_slab(left_1, rows, first + WIDTH,", "_slab(left_1, rows, first + 2 * WIDTH,"),
    ("ragged group of row tiles", "rows = tl.minimum(tiles_m - first_m, GROUP_M)", "rows = GROUP_M"),
    ("column past the depth", "in_depth = start + depth < D", "in_depth = start + depth < D + 1"),
    ("rows of x unmasked", "mask=in_rows & in_depth[None, :]", "mask=in_depth[None, :]"),
    ("columns of W unmasked", "mask=in_depth[:, None] & in_columns", "mask=in_depth[:, None]"),
    ("32-bit rows of x", "rows.to(tl.int64)[:, None] * stride_xn", "rows[:, None] * stride_xn"),
    ("32-bit columns of x", "depth.to(tl.int64)[None, :] * stride_xd", "depth[None, :] * stride_xd"),
    ("32-bit columns of W", "columns.to(tl.int64)[None, :] * stride_wf", "columns[None, :] * stride_wf"),
    ("32-bit step", "step = tl.full((), BLOCK_K, tl.int64)", "step = tl.full((), BLOCK_K, tl.int32)"),
    ("descriptor of the wrong tile", "W_enc_desc.load([pid_n * BLOCK_N, start])",
     "W_enc_desc.load([pid_m * BLOCK_N, start])"),
    ("entry's z gated", "tl.store(outputs, z, mask=marked)", "tl.store(outputs, tl.where(z > 0, z, 0.0), mask=marked)"),
    ("f hides bad input", "tl.where(inactive, 0.0, float(\"nan\"))", "0.0"),
    ("dense f where active only", "tl.store(outputs, f, mask=present)", "tl.store(outputs, f, mask=marked)"),
    ("dense window at its edge", "inside = tl.abs(z - threshold) < half", "inside = tl.abs(z - threshold) <= half"),
    ("dense window past the edges", "            inside = inside & present\n", "            inside = inside\n"),
    ("bits exchanged", "_store_bits(window_ptr, inside", "_store_bits(window_ptr, marked"),
    ("window twice as wide", "threshold, bandwidth / 2, z", "threshold, bandwidth, z"),
    ("descriptors everywhere", "datacentre, amd = describable and arch in DATACENTRE",
     "datacentre, amd = describable"),
    ("unaligned descriptor", "matrix.data_ptr() % 16 == 0", "True"),
    ("largest: masked latents", "tl.where((may > 0)[None, :], z, 0.0)", "z"),
    ("largest: bias dropped", "acc + b_enc.to(tl.float32)[None, :]", "acc"),
    ("largest: NaN below a number", "tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)", "tl.maximum(a, b)"),
    ("largest: -Inf hidden", "& (lowest > float(\"-inf\"))", ""),
    ("largest: below 0", "tl.where(highest > 0, highest, 0.0).to", "highest.to"),
    ("largest: rows past the last", "(rows < N)[:, None] & (group_columns", "(rows >= 0)[:, None] & (group_columns"),
    ("largest: groups past the last", "(group_columns < n_groups)[None, :])", "(group_columns >= 0)[None, :])"),
    ("tf32 always", "if not tf32 or (amd", "if (amd"),
    ("tf32 on every AMD card", "if not tf32 or (amd and arch != \"gfx942\"):", "if not tf32:"),
]  # fmt: skip

ENCODE = [
    ("full word counts 0", "(halves >> 16)) & 0x3F)", "(halves >> 16)) & 0x1F)"),
    ("count past the row", "[:, None] & (word_columns < n_words),\n        other=0", "[:, None],\n        other=0"),
    ("count past the segments", "mask=segments < n_segments)", "mask=segments <= n_segments)"),
    ("compaction past the row", "row * n_words + word_columns, mask=word_columns < n_words, other=0)",
     "row * n_words + word_columns)"),
    ("inclusive scan", "tl.cumsum(counts, 0) - counts\n        _move", "tl.cumsum(counts, 0)\n        _move"),
    ("inclusive starts", "tl.cumsum(counts, 0) - counts)\n", "tl.cumsum(counts, 0))\n"),
    ("32-bit starts", "starts = base + (", "starts = base.to(tl.int32) + ("),
    ("base not carried", "base = tl.load(starts_ptr, mask=first_row > 0, other=0)",
     "base = tl.load(starts_ptr, mask=first_row < 0, other=0)"),
    ("base read where there is none", "mask=first_row > 0, other=0)", "mask=first_row >= 0, other=0)"),
    ("totals of its own group", "last = group * TOTALS_OF_GROUP", "last = (group + 1) * TOTALS_OF_GROUP"),
    ("last totals only", "totals += tl.load(totals_ptr", "totals = tl.load(totals_ptr"),
    ("no last start", "& (segments <= n_segments)", "& (segments < n_segments)"),
    ("offsets of every segment", "is_new & (segments % per_row == 0)", "is_new"),
    ("segments past the last counted", "counts_ptr + segments, mask=segments < n_segments, other=0)",
     "counts_ptr + segments)"),
    ("too few programs to scan", "(triton.cdiv(segments + 1, SCAN_BLOCK),)", "(triton.cdiv(segments, SCAN_BLOCK),)"),
    ("-Inf as a value", "tl.where(z > threshold, z, float(\"nan\"))", "z"),
    ("+Inf at an infinite threshold as a value", "tl.where(z > threshold, z,", "tl.where(z >= threshold, z,"),
    ("rows: inclusive scan", "tl.cumsum(counts, 0) - counts\n        start", "tl.cumsum(counts, 0)\n        start"),
    ("rows: own words counted too", "mask=first + lanes < row_words, other=0)",
     "mask=first + lanes < row_words + n_words, other=0)"),
    ("rows: blocks not carried", "        start += tl.sum(counts, 0)\n", ""),
    ("rows: past the row", "row_words + word_columns, mask=word_columns < n_words, other=0)",
     "row_words + word_columns)"),
    ("rows: last offset not stored", "    if row == tl.num_programs(0) - 1:", "    if row == tl.num_programs(0):"),
    ("rows: scratch of the first row", "z_row = z_ptr + row.to(tl.int64) * F", "z_row = z_ptr"),
    ("store past the room", "stored = kept & (position < room)", "stored = kept"),
    ("room never widened", "        room = nnz\n", "        return values, indices, offsets\n"),
    ("every batch by rows", "if min(rows, FEW_TOKENS) >= N:", "if N <= rows:"),
    ("a few tokens scanned", "if min(rows, FEW_TOKENS) >= N:", "if N <= 0:"),
    ("one bit short", "range(tl.max(counts, 0))", "range(tl.max(counts, 0) - 1)"),
    ("position not advanced", "        position += 1\n", ""),
    ("32-bit row of the compaction", "row = (segment // per_row).to(tl.int64)", "row = segment // per_row"),
    ("chunks not added up", "chunk[2][1:] + nnz", "chunk[2][1:]"),
    ("tiling of the chunk", "config = launch_config(x, W_enc)", "config = launch_config(x[:16], W_enc)"),
]  # fmt: skip

ENTRIES = [
    ("count past the capacity stops", "(end > start) & (start < capacity)", "(end > start) & (end <= capacity)"),
    ("store past the capacity", "stored = kept & (position < capacity)", "stored = kept"),
    ("one short of the capacity", "kept & (position < capacity)", "kept & (position < capacity - 1)"),
    ("active at a tie", "inactive = (z <= threshold) &", "inactive = (z < threshold) &"),
    ("-Inf not active", "(z <= threshold) & (tl.abs(z) < float(\"inf\"))", "(z <= threshold)"),
    ("NaN not active", "tl.where(inactive, latent, latent | _ACTIVE)",
     "tl.where(z > threshold, latent | _ACTIVE, latent)"),
    ("token of the chunk", "tl.int32) + first_token + row", "tl.int32) + row"),
    ("inclusive scan", "start + tl.cumsum(counts, 0) - counts", "start + tl.cumsum(counts, 0)"),
    ("one bit short", "range(tl.max(counts, 0))", "range(tl.max(counts, 0) - 1)"),
    ("position not advanced", "            position += 1\n", ""),
    ("past the row's words", "mask=word_columns < n_words, other=0).to(tl.uint32)", "other=0).to(tl.uint32)"),
    ("32-bit scratch row", "row = (segment // per_row).to(tl.int64)", "row = segment // per_row"),
    ("32-bit positions", "position = start + tl.cumsum", "position = start.to(tl.int32) + tl.cumsum"),
    ("latents not filled", "tl.zeros([FILL], tl.int32) + F,", "tl.zeros([FILL], tl.int32),"),
    ("filled past the capacity", "mask=entries < capacity)", "mask=entries <= capacity)"),
    ("filled by the first turns only", "start in range(tl.program_id(0).to(tl.int64) * FILL, capacity,",
     "start in range(tl.program_id(0).to(tl.int64) * FILL, FILL,"),
    ("no programs to fill", "max(triton.cdiv(F, EDGE_BLOCK), min(triton.cdiv(capacity, FILL_BLOCK), FILL_PROGRAMS))",
     "triton.cdiv(min(F, capacity), EDGE_BLOCK)"),
    ("every chunk the first", "starts, offsets, first)\n", "starts, offsets)\n"),
    ("waits for the device", "    return entries\n", "    offsets[-1].item()\n    return entries\n"),
    ("tf32 dropped", "launch_config(x, W_enc, tf32)", "launch_config(x, W_enc)"),
    ("window twice as wide", "latents, bandwidth / 2, F", "latents, bandwidth, F"),
    ("window lost", "W_enc, b_enc, lower, z, words, config)", "W_enc, b_enc, threshold, z, words, config)"),
    ("edge of the window inside it", "inside = tl.abs(z - threshold) < half", "inside = tl.abs(z - threshold) <= half"),
    ("edge searched half way", "for _ in range(32)", "for _ in range(30)"),
    ("edge of a NaN threshold", "high = _rank(threshold)", "high = _rank(tl.maximum(threshold, -1.0))"),
    ("sum of ranks overflows", "(low | high) - ((low ^ high) >> 1)", "(low + high + 1) >> 1"),
    ("negative z out of order", "bits ^ ((bits >> 31) & 0x7FFFFFFF)", "bits"),
]  # fmt: skip

CHUNKS = [
    ("1 GiB for a million latents", "min(CHUNK_TOKENS, WIDE_SCRATCH_BYTES // each)", "1"),
    ("more scratch than allowed", "min(CHUNK_TOKENS, WIDE_SCRATCH_BYTES // each)", "CHUNK_TOKENS"),
    ("bits not counted", "4 * d_sae + 4 * math.ceil(d_sae / 32)", "4 * d_sae"),
    ("no token fits", "most = max(1, SCRATCH", "most = max(0, SCRATCH"),
    ("chunks not balanced", "tile * math.ceil(tiles / math.ceil(tiles / tiles_per_chunk))", "tile * tiles_per_chunk"),
    ("chunks of any size", "else min(CHUNK_TILE, most)", "else 1"),
    ("tokens that go together parted", "CHUNK_TOKENS if most >= CHUNK_TOKENS else ", ""),
]  # fmt: skip

DENSE = [
    ("octets exchanged", "latents = words * 32 + octet * 8 +", "latents = words * 32 + octet * 4 +"),
    ("count past the last latent", "mask=latents < F, sem", "mask=latents <= F, sem"),
    ("counters of seven bits", "(8 * octet).to(tl.uint32)) & 0xFF", "(8 * octet).to(tl.uint32)) & 0x7F"),
    ("count past the row", "(rows < N)[:, None] & (columns < n_words)[None, :]", "(rows < N)[:, None]"),
    ("count past the last token", "(rows < N)[:, None] & (columns < n_words)[None, :]", "(columns < n_words)[None, :]"),
    ("l0 stored, not added",
     "tl.atomic_add(l0_ptr + rows, tl.sum(_popcount(active), axis=1), mask=rows < N, sem=\"relaxed\")",
     "tl.store(l0_ptr + rows, tl.sum(_popcount(active), axis=1), mask=rows < N)"),
    ("l0 of the touched", "tl.sum(_popcount(active), axis=1)", "tl.sum(_popcount(active | window), axis=1)"),
    ("touched by the window only", "((active | window)[:, :, None]", "(window[:, :, None]"),
    ("bits in reverse", "words[:, :, None] >> tl.arange(0, 32)", "words[:, :, None] >> 31 - tl.arange(0, 32)"),
    ("bits past the row", "in_tile = in_rows[:, None] & in_words[None, :]", "in_tile = in_rows[:, None]"),
    ("2/N dropped", "u = scale * tl.load", "u = tl.load"),
    ("penalty of the frequency dropped", "(s + frequency) / bandwidth", "s / bandwidth"),
    ("frequency divided twice", "frequency_slope * count)", "frequency_slope * count / bandwidth)"),
    ("tanh slope not squared", "((1.0 + decay) * (1.0 + decay))", "(1.0 + decay)"),
    ("tanh of f scaled twice", "-2.0 * tl.abs(tanh_scale * f)", "-2.0 * tl.abs(tanh_scale * tanh_scale * f)"),
    ("sign of f", "tl.exp(-2.0 * tl.abs(tanh_scale * f))", "tl.exp(-tl.abs(tanh_scale * f))"),
    ("threshold gradient of active entries only", "q = inside * (", "q = active * inside * ("),
    ("1/bandwidth missing", "other=0.0) / bandwidth)[None, :]", "other=0.0))[None, :]"),
    ("sign of the threshold gradient", "(-slope * u - (s", "(slope * u - (s"),
    ("gate hides bad gradients", "dz = active * u", "dz = tl.where(active > 0, u, 0.0)"),
    ("straight-through sign", "dz -= q", "dz += q"),
    ("sums of rounded dz", "db_enc += dz", "db_enc += dz.to(u_ptr.dtype.element_ty).to(tl.float32)"),
    ("last tile only", "dthreshold += q", "dthreshold = q"),
    ("programs share partial sums", "partial_ptr + tl.program_id(1).to(tl.int64) * F + columns",
     "partial_ptr + columns"),
    ("32-bit rows of u", "u_ptr + wide_rows[:, None] * stride_un", "u_ptr + rows[:, None] * stride_un"),
    ("32-bit rows of f", "f_ptr + wide_rows[:, None] * F", "f_ptr + rows[:, None] * F"),
    ("s taken for contiguous", "s_ptr=s.contiguous()", "s_ptr=s"),
]  # fmt: skip

DECODE = [
    ("bias dropped", "    if HAS_BIAS:\n", "    if False:\n"),
    ("value dropped", "acc += values[:, None] * table.to(tl.float32)", "acc += table.to(tl.float32)"),
    ("entry past the list",
     "valid = start + lanes < length\n        values", "valid = start + lanes <= length\n        values"),
    ("column past the row", "mask = valid[:, None] & in_columns[None, :]", "mask = valid[:, None]"),
    ("store past the row", "out.to(out_ptr.dtype.element_ty), mask=in_columns)", "out.to(out_ptr.dtype.element_ty))"),
    ("first gather only",
     "tl.range(0, length, LANES, num_stages=NUM_STAGES)", "tl.range(0, LANES, LANES, num_stages=NUM_STAGES)"),
    ("32-bit table rows", "rows = tl.load(rows_ptr + first + start + lanes, mask=valid, other=0).to(tl.int64)",
     "rows = tl.load(rows_ptr + first + start + lanes, mask=valid, other=0)"),
    ("32-bit table columns", "columns.to(tl.int64)[None, :] * stride_column", "columns[None, :] * stride_column"),
    ("32-bit output rows", "i.to(tl.int64) * D", "i * D"),
    ("32-bit list starts", "first = tl.load(offsets_ptr + i)", "first = tl.load(offsets_ptr + i).to(tl.int32)"),
    ("gradient taken for contiguous", "n.to(tl.int64) * stride_grad_n", "n.to(tl.int64) * D"),
    ("32-bit gradient rows", "n.to(tl.int64) * stride_grad_n", "n * stride_grad_n"),
    ("32-bit gradient columns", "columns.to(tl.int64) * stride_grad_d", "columns * stride_grad_d"),
    ("32-bit W rows", "latents = tl.load(indices_ptr + first + start + lanes, mask=valid, other=0).to(tl.int64)",
     "latents = tl.load(indices_ptr + first + start + lanes, mask=valid, other=0)"),
    ("32-bit W columns", "columns.to(tl.int64) * stride_wd", "columns * stride_wd"),
    ("last column block only", "acc += W.to(tl.float32) * grad", "acc = W.to(tl.float32) * grad"),
    ("dot past the row", "in_columns = columns < D\n            grad", "in_columns = columns <= D\n            grad"),
    ("dot of the first entries only", "for start in range(0, length, LANES):", "for start in range(0, LANES, LANES):"),
    ("dvalues past the list", "+ lanes, dvalues, mask=valid)", "+ lanes, dvalues)"),
    ("latents one off",
     "torch.searchsorted(latents, boundaries)", "torch.searchsorted(latents, boundaries, right=True)"),
    ("tokens not sorted along", "values[order], tokens[order]", "values[order], tokens"),
    ("tokens in reverse", "latents, order = torch.sort(indices, stable=True)",
     "latents, order = torch.sort(indices.flip(0), stable=True)\n    order = indices.shape[0] - 1 - order"),
]  # fmt: skip

RESIDUAL = [
    ("inactive entries reconstruct", "tl.where(latents >= _ACTIVE, z, z - z)", "z"),
    ("-Inf hidden", "tl.where(latents >= _ACTIVE, z, z - z)", "tl.where(latents >= _ACTIVE, z, 0.0)"),
    ("coefficients past the list", "z = tl.load(z_ptr + start + e, mask=e < left, other=0.0)",
     "z = tl.load(z_ptr + start + e)"),
    ("rows past the list", "mask=(e < left)[:, None] & in_columns[None, :], other=0.0)",
     "mask=in_columns[None, :], other=0.0)"),
    ("column past the row", "mask=(e < left)[:, None] & in_columns[None, :], other=0.0)",
     "mask=(e < left)[:, None], other=0.0)"),
    ("second part dropped", "tl.where(part == 1, middle[:, None],", "tl.where(part == 1, zero,"),
    ("third part dropped", "tl.where(part == 2, low[:, None], zero)", "tl.where(part == 2, zero, zero)"),
    ("third part not added", "tl.arange(0, PARTS)[None, :] < 3", "tl.arange(0, PARTS)[None, :] < 2"),
    ("second part is the first again", "middle = rest.to(tl.bfloat16)", "middle = high"),
    ("u of all copies", "tl.where(tl.arange(0, PARTS)[None, :] == 0, tl.dot(W, copies), 0.0)", "tl.dot(W, copies)"),
    ("first tile only", "for start in tl.range(FIRST, length, REST, num_stages=1):\n        f_rest",
     "for start in tl.range(FIRST, FIRST, REST, num_stages=1):\n        f_rest"),
    ("tile after the first left out", "for start in tl.range(FIRST, length, REST, num_stages=1):\n        f_rest",
     "for start in tl.range(FIRST + REST, length, REST, num_stages=1):\n        f_rest"),
    ("last tile only", "acc = _add_rows(acc, f_rest", "acc = _add_rows(acc * 0, f_rest"),
    ("bias dropped", "residual = acc + b_dec - x", "residual = acc - x"),
    ("sign of the residual", "residual = acc + b_dec - x", "residual = x - acc - b_dec"),
    ("squared error past the row", "tl.where(in_columns, residual * residual, 0.0)", "residual * residual"),
    ("squared error of the rounded residual", "tl.where(in_columns, residual * residual, 0.0)",
     "residual.to(residual_ptr.dtype.element_ty).to(tl.float32)\n"
     "    squared = tl.where(in_columns, squared * squared, 0.0)"),
    ("residual past the row", "residual, mask=in_columns)", "residual)"),
    ("blocks share a row", "shares_ptr += block.to(tl.int64) * width", "shares_ptr += block.to(tl.int64)"),
    ("32-bit rows of shares", "shares_ptr += block.to(tl.int64) * width", "shares_ptr += block * width"),
    ("squared error among the entries", "tl.store(shares_ptr + capacity + n", "tl.store(shares_ptr + n"),
    ("u of the unrounded residual", "residual = residual.to(residual_ptr.dtype.element_ty)\n    tl.store(residual_ptr",
     "tl.store(residual_ptr"),
    ("u of NaN past the row", "residual = tl.where(in_columns, residual, tl.zeros_like(residual))\n", "\n"),
    ("u past the list", "_products(W, residual, PARTS), mask=e < length)",
     "_products(W, residual, PARTS))"),
    ("u past the list, tiles after the first", "u, mask=e_rest < length - start)", "u)"),
    ("u of the first tile only", "for start in tl.range(FIRST, length, REST, num_stages=1):\n        W_rest",
     "for start in tl.range(FIRST, FIRST, REST, num_stages=1):\n        W_rest"),
    ("window entries counted", "fired += (latents >= _ACTIVE).to(tl.int32)",
     "fired += (start + e < length).to(tl.int32)"),
    ("count of the first tile only", "tl.range(0, length, FIRST, num_stages=1)", "tl.range(0, FIRST, FIRST)"),
    ("start past the capacity", "first = tl.minimum(tl.load(offsets_ptr + n), capacity)",
     "first = tl.load(offsets_ptr + n)"),
    ("end past the capacity", "(tl.minimum(tl.load(offsets_ptr + n + 1), capacity) - first)",
     "(tl.load(offsets_ptr + n + 1) - first)"),
    ("32-bit list starts", "first = tl.minimum(tl.load(offsets_ptr + n), capacity)",
     "first = tl.minimum(tl.load(offsets_ptr + n), capacity).to(tl.int32)"),
    ("32-bit tokens", "n = tl.program_id(0).to(tl.int64)", "n = tl.program_id(0)"),
    ("32-bit W rows", "(latents & _LATENT).to(tl.int64)[:, None]", "(latents & _LATENT)[:, None]"),
    ("32-bit columns", "wide_columns = columns.to(tl.int64)", "wide_columns = columns"),
    ("32-bit shares", "i = tl.program_id(0).to(tl.int64) * BLOCK", "i = tl.program_id(0) * BLOCK"),
    ("32-bit blocks of shares", "tl.cast(block, tl.int64) * width", "block * width"),
    ("share of the last block only", "sums += tl.load", "sums = tl.load"),
    ("no block for no columns", "max(1, triton.cdiv(d, config.block_d))", "triton.cdiv(d, config.block_d)"),
    ("no squared errors", "((i < tl.load(last_ptr)) | (i >= capacity)) & (i < width)",
     "(i < tl.load(last_ptr)) & (i < width)"),
    ("sums past the last token", "(i >= capacity)) & (i < width)", "(i >= capacity)) & (i < width + 1)"),
    ("AMD takes tensor cores", "if dtype != torch.bfloat16 or target", "if dtype != torch.bfloat16 and target"),
]  # fmt: skip

LATENTS = [
    ("window includes its edge", "tl.abs(z - threshold) < half_bandwidth", "tl.abs(z - threshold) <= half_bandwidth"),
    ("window without its lower half", "inside = valid & (tl.abs", "inside = active & (tl.abs"),
    ("sign of the penalty", "du + (s + penalty)", "du - (s + penalty)"),
    ("1/bandwidth missing", "-(threshold * du + (s + penalty)) / bandwidth", "-(threshold * du + (s + penalty))"),
    ("frequency of one group only",
     "        fired = tl.zeros((LISTS, LANES), tl.int32)\n        for start in range(0, longest,",
     "        fired = tl.zeros((LISTS, LANES), tl.int32)\n        for start in range(0, LANES,"),
    ("frequency of window entries too", "(tl.load(latents_ptr + entries, mask=valid, other=0) >= _ACTIVE).to(tl.int32)",
     "valid.to(tl.int32)"),
    ("along is left at zero", "        along += f * du\n", ""),
    ("along without the gate", "along += f * du", "along += z * du"),
    ("tanh without its square", "(4.0 * t / ((1.0 + t) * (1.0 + t)))", "(2.0 * t / (1.0 + t))"),
    ("dz of window entries", "dz = tl.where(active, du, 0.0)", "dz = tl.where(valid, du, 0.0)"),
    ("sign of the straight-through part", "dz -= q", "dz += q"),
    ("2/N missing in dec", "tl.store(dec_ptr + places + start, scale * f", "tl.store(dec_ptr + places + start, f"),
    ("2/N is 1/N", "scale=2 / s.shape[0]", "scale=1 / s.shape[0]"),
    ("first group only", "    along = tl.zeros((LISTS, LANES), tl.float32)\n    for start in range(0, longest,",
     "    along = tl.zeros((LISTS, LANES), tl.float32)\n    for start in range(0, LANES,"),
    ("last group only", "db_enc += dz", "db_enc = dz"),
    ("entries in their first order", "tl.load(order_ptr + places + start, mask=valid, other=0)\n        active",
     "(places + start)\n        active"),
    ("latents past the last", "j + 1, mask=in_latents, other=0)", "j + 1)"),
    ("32-bit places", "places = first[:, None]", "places = first.to(tl.int32)[:, None]"),
    ("32-bit entries", "mask=valid, other=0)\n        active", "mask=valid, other=0).to(tl.int32)\n        active"),
    ("long lists never", "if entries > LONG:", "if entries > 2 * LONG:"),
    ("a list of every latent beside a long one", "if entries > LONG:", "if entries >= 0:"),
    ("lists just not long", "(length <= LONG)", "(length < LONG)"),
    ("long lists past the last latent", "end = tl.minimum(tl.program_id(0) * BLOCK_F + BLOCK_F, F)",
     "end = tl.program_id(0) * BLOCK_F + BLOCK_F"),
    ("slopes that are not 0 taken for none", "None if not isinstance(slope, Tensor) and slope == 0 else",
     "None if slope != 0 else"),
    ("weight gradients exchanged", "return sum_rows(sums.dz, x_centred), sum_rows(sums.dec, residual)",
     "return sum_rows(sums.dec, residual), sum_rows(sums.dz, x_centred)"),
]  # fmt: skip

WEIGHTED_SUM = [
    ("last group dropped", "triton.cdiv(rows, group), d,", "rows // group, d,"),
    ("group past the last row", "last = tl.minimum(first + GROUP, ROWS)", "last = first + GROUP"),
    ("groups overlap", "first = tl.program_id(1) * GROUP", "first = tl.program_id(1) * (GROUP - 1)"),
    ("coefficients left out", "acc += coefficients[:, None] * tl.load", "acc += tl.load"),
    ("rows with the coefficient 0 are read", "counts = coefficients != 0", "counts = rows < last"),
    ("rows with a NaN coefficient are not read", "counts = coefficients != 0",
     "counts = (coefficients < 0) | (coefficients > 0)"),
    ("rows past the group", "rows, mask=rows < last, other=0.0)", "rows, mask=rows < ROWS, other=0.0)"),
    ("last rows only", "acc += coefficients", "acc = coefficients"),
    ("columns past the row", "counts[:, None] & in_columns[None, :]", "counts[:, None]"),
    ("32-bit rows", "rows.to(tl.int64)[:, None] * stride_row", "rows[:, None] * stride_row"),
    ("table taken for contiguous", "columns.to(tl.int64)[None, :] * stride_column", "columns.to(tl.int64)[None, :]"),
    ("groups summed into one place", "tl.program_id(1).to(tl.int64) * D + columns", "columns"),
]  # fmt: skip

UPDATE = [
    ("updates without permission", "    if tl.load(ok_ptr) == 0:\n        return\n    j = ", "    j = "),
    ("long lists without permission", "    if tl.load(ok_ptr) == 0:\n        return\n    candidates", "    candidates"),
    ("updates without entries", "    if length <= 0:\n        return\n", ""),
    ("one update's decay only", "_power(step - last, LOG2_BETA2)", "_power(step - (step - 1), LOG2_BETA2)"),
    ("decay of one update too few", "_power(step - last, LOG2_BETA2)", "_power(step - 1 - last, LOG2_BETA2)"),
    ("β2 in fp32", "tl.full((), LOG2_BETA, tl.float64)", "tl.full((), LOG2_BETA, tl.float32).to(tl.float64)"),
    ("bias correction of the step before", "(1.0 - _power(step, LOG2_BETA2)", "(1.0 - _power(step - 1, LOG2_BETA2)"),
    ("one update's decay of m only", "_power(step - last, LOG2_BETA1)", "_power(step - (step - 1), LOG2_BETA1)"),
    ("decay of m of one update too few", "_power(step - last, LOG2_BETA1)", "_power(step - 1 - last, LOG2_BETA1)"),
    ("m does not decay", "m = m * decay +", "m = m +"),
    ("m decays like v", "dW_dec, decay_m, BETA1)", "dW_dec, decay, BETA1)"),
    ("no bias correction of m", " / (1.0 - _power(step, LOG2_BETA1))", ""),
    ("bias correction of m of the step before", "(1.0 - _power(step, LOG2_BETA1))",
     "(1.0 - _power(step - 1, LOG2_BETA1))"),
    ("m takes the whole gradient", "(1.0 - BETA1) * gradient", "gradient"),
    ("m not stored", "        tl.store(m_ptr + at, m, mask=mask, eviction_policy=\"evict_first\")\n", ""),
    ("encoder moves by its gradient", "_over(learning_rate * enc_m,", "_over(learning_rate * dW_enc,"),
    ("decoder moves by its gradient", "_over(learning_rate * dec_m,", "_over(learning_rate * dW_dec,"),
    ("bias moves by its gradient", "- learning_rate * m / _root(", "- learning_rate * gradient / _root("),
    ("θ moves by its gradient", "change = learning_rate * m /", "change = learning_rate * gradient /"),
    ("no projection", "dW_dec -= along * W_dec", "dW_dec -= 0.0 * W_dec"),
    ("eps inside the root", "tl.sqrt(v * unbias) + eps", "tl.sqrt(v * unbias + eps)"),
    ("gradient not squared", "(gradient * gradient)", "tl.abs(gradient)"),
    ("over the root of the root", "numerator * (inverse * inverse)", "numerator * inverse"),
    ("no unit norm", "other=0.0) * inverse_norm", "other=0.0)"),
    ("norm of the last block", "squares += W_dec * W_dec", "squares = W_dec * W_dec"),
    ("norm with columns beyond the row", "return tl.where(in_row, W_dec, 0.0)", "return W_dec"),
    ("norm of the first block of a long list", "mask=blocks < BLOCKS", "mask=blocks < 1"),
    ("copy before the norm", "low = W_dec.to(", "low = (W_dec / inverse_norm).to("),
    ("encoder copy of the old weight", "low = W_enc.to(",
     "low = (W_enc + _over(learning_rate * enc_m, _root(enc_v, unbias, eps))).to("),
    ("raw gradient for log θ", "        gradient *= threshold", "        gradient *= 1.0"),
    ("log moves like raw", "threshold = threshold * tl.exp(-change) if LOG_THRESHOLD else threshold - change",
     "threshold = threshold - change"),
    ("negative θ", "tl.where(threshold < 0, 0.0, threshold)", "threshold"),
    ("NaN θ hidden", "tl.where(threshold < 0, 0.0, threshold)", "tl.maximum(threshold, 0.0)"),
    ("last not advanced", "    tl.store(last_ptr + j, step)\n", ""),
    ("last one short", "tl.store(last_ptr + j, step)", "tl.store(last_ptr + j, step - 1)"),
    ("coefficients exchanged", "return tl.load(dz_ptr + entry), x", "return tl.load(dec_ptr + entry), x"),
    ("coefficients of a long list exchanged", "enc_sums += dz *", "enc_sums += dec *"),
    ("first entries only", "range(0, whole, UNROLL)", "range(0, min(whole, UNROLL), UNROLL)"),
    ("the rest forgotten", "for i in range(whole, length)", "for i in range(whole, whole)"),
    ("first entries of a long list only", "range(0, length, LANES * UNROLL)", "range(0, 1, LANES * UNROLL)"),
    ("beyond a long list", "valid = place < length", "valid = place < length + 1"),
    ("gather past the row", "mask = valid[:, None] & in_row[None, :]", "mask = valid[:, None]"),
    ("columns past the row", "return columns < D", "return columns < D + 1"),
    ("blocks that fill every row", "if D % BLOCK_D == 0:", "if D % BLOCK_D >= 0:"),
    ("along of the last block", "products += dW_dec", "products = dW_dec"),
    ("long lists begin one later", "- firsts >= LONG", "- firsts > LONG"),
    ("long lists taken twice", "length < LONG:", "length <= LONG:"),
    ("one long list a program", "j = tl.min(tl.where(is_long & (candidates > j), candidates, F), 0)", "j = j + F"),
    ("candidates past the last", "exists = candidates < F", "exists = candidates < F + 1"),
    ("too few candidates", "triton.cdiv(F, programs))", "F // programs)"),
    ("squares at another list's place", "place = first // LONG * BLOCKS", "place = first // (LONG + 1) * BLOCKS"),
    ("squares of another block", "* tl.num_programs(1) + tl.program_id(1)", "* tl.num_programs(1)"),
    ("32-bit latents", "j = tl.program_id(0).to(tl.int64)", "j = tl.program_id(0)"),
    ("32-bit latents of long lists", "at = j.to(tl.int64) * D", "at = j * D"),
    ("32-bit token rows", "tl.load(tokens_ptr + entry).to(tl.int64) * D", "tl.load(tokens_ptr + entry) * D"),
    ("32-bit token rows of long lists", "mask=valid, other=0).to(tl.int64)[:, None] * D",
     "mask=valid, other=0)[:, None] * D"),
    ("32-bit lists", "\n    first = tl.load(lists_ptr + j)", "\n    first = tl.load(lists_ptr + j).to(tl.int32)"),
    ("32-bit long lists", "\n        first = tl.load(lists_ptr + j)",
     "\n        first = tl.load(lists_ptr + j).to(tl.int32)"),
]  # fmt: skip

TRANSPOSE = [
    ("active entries behind", "entries.latents & LATENT", "entries.latents"),
    ("latents one off", "torch.searchsorted(latents, boundaries)",
     "torch.searchsorted(latents, boundaries, right=True)"),
    ("tokens in reverse", "torch.sort(entries.latents & LATENT, stable=True)",
     "torch.sort((entries.latents & LATENT).flip(0), stable=True)\n    order = entries.latents.shape[0] - 1 - order"),
]  # fmt: skip

CENTRING = [
    ("b_dec is left in", "x -= tl.load(b_dec_ptr", "x -= 0 * tl.load(b_dec_ptr"),
    ("sums of the centred", "        sums += x\n", ""),
    ("last tile of a part only", "        sums += x\n", "        sums = x\n"),
    ("norm of the last tile only", "squares += tl.where(mask", "squares = tl.where(mask"),
    ("norm of what is masked", "tl.where(mask, rounded * rounded, 0.0)", "rounded * rounded"),
    ("norm of what was not rounded", "rounded = centred.to(tl.float32)", "rounded = x"),
    ("squared norm", "norm = tl.sqrt(tl.sum(tl.sum(squares, 0), 0))", "norm = tl.sum(tl.sum(squares, 0), 0)"),
    ("column past the row", "(rows < last)[:, None] & in_columns[None, :]", "(rows < last)[:, None]"),
    ("parts share their norms", "tl.store(norms_ptr + program, norm)",
     "tl.store(norms_ptr + tl.program_id(0), norm)"),
    ("thresholds of the first program", "range(program * BLOCK_F, F,", "range(0 * program, BLOCK_F,"),
    ("thresholds past the last", "mask=j < F, other=0.0) < 0", "mask=j < F + 1, other=0.0) < 0"),
    ("thresholds above 0 too", "other=0.0) < 0\n", "other=0.0) != 0\n"),
]  # fmt: skip

TOKENS = [
    ("sum for mean", "mean = tl.sum(sums, 0) / N", "mean = tl.sum(sums, 0)"),
    ("mean of masked parts", "(parts_of_sum < parts)[:, None] & in_columns[None, :]", "in_columns[None, :]"),
    ("spread of the last block", "spread += tl.sum", "spread = tl.sum"),
    ("0/0 for a residual of 0", "tl.where(squared_error == 0, 1.0, spread)", "spread"),
    ("share upside down", "shares = squared_error / tl.where", "shares = 1 / squared_error * tl.where"),
    ("s of the sum of L0", "tl.sum(totals, 0) / N\n        s", "tl.sum(totals, 0)\n        s"),
    ("mean L0 of the last tile", "totals += tl.load(l0_ptr", "totals = tl.load(l0_ptr"),
    ("s without its 2", "(2.0 * (coefficient * factor) / N)", "((coefficient * factor) / N)"),
    ("s without 1/N", "s += (coefficient / N).to(tl.float32)", "s += coefficient.to(tl.float32)"),
    ("λ in fp32", "coefficient = tl.load(coefficient_ptr).to(tl.float64)",
     "coefficient = tl.load(coefficient_ptr).to(tl.float32).to(tl.float64) * 1.0000001"),
    ("window entries are activations", "other=0) >= _ACTIVE", "other=0) >= 0"),
    ("norm of the last tile of entries", "squares += f * f", "squares = f * f"),
    ("first entries of each block missing", "for start in range(0, length, BLOCK_E):",
     "for start in range(BLOCK_E, length, BLOCK_E):"),
    ("entries past the capacity", "tl.minimum(block * BLOCK_N + BLOCK_N, N)), capacity)",
     "tl.minimum(block * BLOCK_N + BLOCK_N, N)), 1 << 20)"),
    ("entries of all later tokens", "tl.load(offsets_ptr + tl.minimum(block * BLOCK_N + BLOCK_N, N))",
     "tl.load(offsets_ptr + N)"),
    ("Σ f doubled", "tanh_sums += f\n", "tanh_sums += 2 * f\n"),
    ("tanh of its argument", "tanh_sums += _tanh(tanh_scale * f)", "tanh_sums += tanh_scale * f"),
    ("tanh cancels near 0", "tl.where(b < 0.0625, series,", "tl.where(b < 0.0, series,"),
    ("series too far out", "tl.where(b < 0.0625, series,", "tl.where(b < 4.0, series,"),
    ("tanh without its sign", "tl.where(a < 0, -1.0, 1.0)", "1.0"),
    ("residual sums of one block", "residual_sums_ptr + block.to(tl.int64) * D + columns",
     "residual_sums_ptr + columns"),
]  # fmt: skip

CONCLUSION = [
    ("threshold of idle latents", "threshold = tl.where(touched > 0, threshold, 0.0)", "threshold = threshold"),
    ("NaN threshold hidden", "tl.where(threshold == threshold, threshold, float(\"inf\"))",
     "tl.where(threshold == threshold, threshold, 0.0)"),
    ("starts for lengths", "other=0) - touched", "other=0)"),
    ("share not squared", "tl.sum(share * share, 0)", "tl.sum(share, 0)"),
    ("encoder's copy not compared", "(W_enc.to(tl.float32) != W_enc_low.to(tl.float32)) | ", "False | "),
    ("decoder's copy not compared", " | (W_dec.to(tl.float32) != W_dec_low.to(tl.float32))", ""),
    ("first column only", "tl.load(column_ptr).to(tl.int64)", "0 * tl.load(column_ptr).to(tl.int64)"),
    ("copies of the first block only", "differ = _total(sums_ptr + 2 * blocks, blocks,",
     "differ = _total(sums_ptr + 2 * blocks, 1,"),
    ("last tile of a total", "totals += values * values if SQUARED else values",
     "totals = values * values if SQUARED else values"),
    ("upper median", "<= (length - 1) // 2", "<= length // 2"),
    ("median below", "(values < trial) & (places < length)", "(values <= trial) & (places < length)"),
    ("median hides NaN", "tl.where(tl.sum(nans, 0) > 0, float(\"nan\"), found.to(tl.float32, bitcast=True))",
     "found.to(tl.float32, bitcast=True)"),
    ("sum for mean of L0", "l0 = _total(l0_ptr, N, False, BLOCK) / N", "l0 = _total(l0_ptr, N, False, BLOCK)"),
    ("no penalty of L0", "loss += coefficient.to(tl.float32) * l0", "loss += 0.0"),
    ("factor forgotten", "loss += (coefficient * factor)", "loss += (coefficient)"),
    ("excess not squared", "tl.where(places < N, excess * excess, 0.0)", "tl.where(places < N, excess, 0.0)"),
    ("excess of masked tokens", "tl.where(places < N, excess * excess, 0.0)", "excess * excess"),
    ("frequency scale upside down", "coefficient / frequency_scale", "coefficient * frequency_scale"),
    ("tanh penalty not of the mean", "BLOCK) * (coefficient / N)", "BLOCK) * (coefficient)"),
    ("bound without s", "theta * u + tl.sum(slopes, 0)", "theta * u"),
    ("signs of s cancel", "slopes += tl.abs(tl.load(s_ptr + places, mask=places < N, other=0.0))",
     "slopes += tl.load(s_ptr + places, mask=places < N, other=0.0)"),
    ("bound without x", "(x_norm * dz <= limit) & ", ""),
    ("bound without f", "bounded = bounded & (error * f_norm / root_n <= limit)", "bounded = bounded"),
    ("bound without q", "(q <= limit) & (theta * q <= limit)", "(q == q)"),
    ("no bound", "may_be_made, free = finite & bounded, stalled == 0", "may_be_made, free = finite, stalled == 0"),
    ("Inf is finite", "finite = tl.abs(loss) < float(\"inf\")", "finite = loss == loss"),
    ("room for what is not finite", "(n_entries > capacity) & finite", "(n_entries > capacity)"),
    ("no room for the last", "n_entries > capacity", "n_entries >= capacity"),
    ("stall forgotten", "stalled = tl.load(stalled_ptr)", "stalled = tl.load(stalled_ptr) * 0"),
    ("stalled steps are counted as skipped", "((may_be_made == 0) & free)", "(may_be_made == 0)"),
    ("made while stalled", "ok = (may_be_made & free)", "ok = may_be_made"),
    ("number of the update before", "tl.load(updates_ptr) + 1", "tl.load(updates_ptr)"),
    ("FVU of sums", "(_total(spread_ptr, N, False, BLOCK) / N)", "_total(spread_ptr, N, False, BLOCK)"),
]  # fmt: skip

FINISHING = [
    ("moves without permission", "    if tl.load(ok_ptr) == 0:\n        return\n", ""),
    ("update not counted", "tl.store(updates_ptr, number)", "tl.store(updates_ptr, number - 1)"),
    ("since of those that fired", "tl.where(fired, 0, since)", "since"),
    ("one token a step", "other=0) + n_tokens", "other=0) + 1"),
    ("first parts only", "for start in range(0, parts, LANES):", "for start in range(0, LANES, LANES):"),
    ("last parts only", "totals += tl.load(parts_ptr", "totals = tl.load(parts_ptr"),
    ("2/N missing", "D, BLOCK_N, BLOCK_D) * scale", "D, BLOCK_N, BLOCK_D)"),
    ("encoder's part added", "gradient -= _sum_parts(of_encoder_ptr", "gradient += _sum_parts(of_encoder_ptr"),
    ("as many parts of the encoder", "of_encoder_ptr, encoder_parts, columns", "of_encoder_ptr, parts, columns"),
    ("correction of the update before", "power = tl.exp2(number.to(tl.float64)",
     "power = tl.exp2((number - 1).to(tl.float64)"),
    ("moments do not decay", "v = BETA2 * tl.load(v_ptr", "v = tl.load(v_ptr"),
    ("correction of m of the update before", "power_m = tl.exp2(number.to(tl.float64)",
     "power_m = tl.exp2((number - 1).to(tl.float64)"),
    ("no correction of m", " / (1.0 - power_m)", ""),
    ("m does not decay", "BETA1 * tl.load(m_ptr", "tl.load(m_ptr"),
    ("m takes the whole gradient", "(1.0 - BETA1) * gradient", "gradient"),
    ("m not stored", "            tl.store(m_ptr + columns, direction, mask=in_columns)\n", ""),
    ("moves by the gradient", "learning_rate * direction", "learning_rate * gradient"),
    ("eps inside the root", "(tl.sqrt(v / correction) + eps)", "tl.sqrt(v / correction + eps)"),
    ("column past the row", "(rows < parts)[:, None] & in_columns[None, :]", "(rows < parts)[:, None]"),
    ("latents past the last", "tl.where(fired, 0, since), mask=in_latents)", "tl.where(fired, 0, since))"),
]  # fmt: skip

GPU_TRANSPOSE = [
    ("active entries behind", "other=F) & _LATENT", "other=F)"),
    ("what lies beyond the last entry", "mask=entries < stored, other=F)", "mask=entries < capacity, other=F)"),
    ("entries past the capacity", "stored = tl.minimum(tl.load(offsets_ptr + N), capacity)",
     "stored = tl.load(offsets_ptr + N)"),
    ("block of the mark", "words = blocks * _WORDS + tokens // 32 % _WORDS", "words = blocks + tokens // 32 % _WORDS"),
    ("bit of the mark", "1 << tokens % 32, mask=valid", "1 << tokens % 31, mask=valid"),
    ("marks overwrite each other", "tl.atomic_or(marks_ptr + words, 1 << tokens % 32, mask=valid, sem=\"relaxed\")",
     "tl.store(marks_ptr + words, 1 << tokens % 32, mask=valid)"),
    ("counts overwrite each other", "tl.atomic_add(counts_ptr + blocks, 1, mask=valid, sem=\"relaxed\")",
     "tl.store(counts_ptr + blocks, 1, mask=valid)"),
    ("group of its own counted before", "mask=bins < group", "mask=bins <= group"),
    ("starts behind their entries", "tl.cumsum(counts, 0) - counts", "tl.cumsum(counts, 0)"),
    ("no last offset", "(blocks <= n_blocks)", "(blocks < n_blocks)"),
    ("offsets of every block", "(blocks % per_latent == 0) &", "(blocks >= 0) &"),
    ("rank in its own word only", "words[None, :] < own, -1,", "words[None, :] < own, 0,"),
    ("rank of whole words", "before = ~(-1 << tokens % 32)[:, None]", "before = (0 * tokens)[:, None]"),
    ("rank counts the token itself", "~(-1 << tokens % 32)", "~(-2 << tokens % 32)"),
    ("place of masked entries", "entries.to(tl.int64), mask=valid)", "entries.to(tl.int64))"),
    ("sorts where it should count", "n_blocks > MARKS_BYTES", "n_blocks >= MARKS_BYTES"),
    ("too few programs", "(triton.cdiv(possible, config.place),)", "(possible // config.place,)"),
]  # fmt: skip

GPU_TOPK = [
    ("latents that may not be chosen", "among.to(torch.int8)", "torch.ones_like(among, dtype=torch.int8)"),
    ("-Inf hidden from another chunk", "torch.where(z.isfinite(),", "torch.where(z.isfinite() | (z < 0),"),
    ("of equals the last", "(keys | places.flip(0))", "(keys | places)"),
    ("as they were found", ".indices.sort().values", ".indices"),
    ("chunks do not compete", "found = into if found is None else", "found = into if found is None or True else"),
    ("chunks in the wrong order", "_of_both(found, into, N", "_of_both(into, found, N"),
    ("tokens of the first chunk", "per_row + 1], first, into)", "per_row + 1], 0, into)"),
    ("starts of the first chunk", "starts[before * per_row : (before + n)", "starts[0 : n"),
    ("room of a chunk", "select_of_batch(z_of, keys_of, k * N, k)", "select_of_batch(z_of, keys_of, k * n, k)"),
    ("what does not fire is moved too", "torch.where(fires, torch.cumsum(fires, 0) - 1, room)",
     "torch.cumsum(fires, 0) - 1"),
    ("tokens past the last entry", "torch.where(tokens < n, tokens, 0)", "tokens"),
]  # fmt: skip

SELECTION = [
    ("NaN by its bits", "tl.where((bits & 0x7FFFFFFF) < INFINITE, bits, INFINITE)", "bits"),
    ("latents past the last", "(latents < F), other=0.0)", "(latents >= 0), other=0.0)"),
    ("groups past the list", "mask=(places < listed)[:, None] & (latents", "mask=(places >= 0)[:, None] & (latents"),
    ("bound above what k reach", "tl.where(reached >= k, middle, low)", "tl.where(reached >= k - 1, middle, low)"),
    ("ends too low", "tl.where(reached == k, middle, middle - 1)", "tl.where(reached == k, middle, middle - 2)"),
    ("groups counted that are not there", "    reached = 0\n    for first", "    reached = BLOCK\n    for first"),
    ("groups of the last block counted", "reached += _reach(tl.load(", "reached = _reach(tl.load("),
    ("search among all groups left out", "if n_groups > BLOCK and k < n_groups:", "if n_groups < 0:"),
    ("largest of the first block", "largest = tl.maximum(largest, tl.load", "largest = tl.minimum(largest, tl.load"),
    ("groups above the bound only", "reaches = (keys >= low)", "reaches = (keys > low)"),
    ("list of the last block", "places = listed + tl.cumsum(reaches, 0)", "places = tl.cumsum(reaches, 0)"),
    ("keys left for words", "tl.zeros([BLOCK], tl.int32), mask=first + lanes < n_groups)",
     "tl.zeros([BLOCK], tl.int32), mask=first + lanes < 0)"),
    ("last bit of a word", "<< tl.arange(0, 32)[None, :], 1)", "<< (tl.arange(0, 32) % 31)[None, :], 1)"),
    ("last of the equals", "words & (below >> 1)", "words & (words - 1)"),
    ("one of the equals too many", "_popcount(words) - most", "_popcount(words) - most - 1"),
    ("smear too short", "        below = below | (below >> 16)\n", ""),
    ("equals of v = 0", "ties = tl.where(v > 0, ties, 0)\n    for", "for"),
    ("equals of earlier groups", "tl.maximum(ties - before, 0)", "tl.maximum(ties, 0)"),
    ("equals of earlier tiles", "        ties -= tl.sum(count, 0)\n", ""),
    ("v not above itself", "_words(keys > v)", "_words(keys >= v)"),
    ("first tile again", "list_row, first + TILE, listed, F, TILE)", "list_row, first, listed, F, TILE)"),
    ("words past the list", "mask=first + tl.arange(0, TILE) < listed)", "mask=tl.arange(0, TILE) >= 0)"),
    ("first tile counted alone", "range(TILE, listed, TILE)", "range(listed, listed, TILE)"),
    ("none above", "above = tl.where(reached < k, reached, above)", "above = tl.where(reached < k, 0, above)"),
    ("other keys counted", "mask=(keys ^ low) >> (SHIFT + WIDTH) == 0", "mask=keys > 0"),
    ("digit of its neighbours", "& ((1 << WIDTH) - 1)", "& ((1 << WIDTH) - 2)"),
    ("groups past the last", "tl.load(keys_ptr + places, mask=places < size, other=0)", "tl.load(keys_ptr + places)"),
    ("first tile's digits", "found += _digits_of(", "found = _digits_of("),
    ("digit that too few reach", "reach >= wanted", "reach > 0"),
    ("reach without its own", "tl.cumsum(counts, 0) + counts", "tl.cumsum(counts, 0)"),
    ("wanted below the digit", "tl.where(digits > digit, counts, 0)", "tl.where(digits >= digit, counts, 0)"),
    ("digits lost", "low | (digit << SHIFT)", "digit << SHIFT"),
    ("groups of no key", "low = tl.maximum(tl.load(state_ptr), 1)", "low = tl.load(state_ptr) + 0"),
    ("ties of the row itself before it", "ties_ptr + row - 1, mask=row > 0, other=0", "ties_ptr + row"),
    ("more wanted than there are", "fill_(min(room, n * F))", "fill_(room % (n * F))"),
]  # fmt: skip

EAGER_TOPK = [
    ("latents that may not be chosen", "keys.masked_fill_(~among, 0)", "keys"),
    ("-Inf hidden", "torch.where(z.isfinite(),", "torch.where(z.isfinite() | (z < 0),"),
    ("equals at the border left out once it stands", "(keys >= self.bound)", "(keys > self.bound)"),
    ("border from what is beyond it", "float(keys.min())", "float(keys.max())"),
    ("places in the tile", "row * z.shape[1] + columns.start)", "row * z.shape[1])"),
    ("candidates after the tile", "zip(kept, tile, strict=True)", "zip(tile, kept, strict=True)"),
    ("tokens of the first block", "row + first_token, latents", "row, latents"),
]  # fmt: skip

CUDA_PRODUCT = [
    ("bits not checked", "torch.equal(bits[:, :F], kept) and ", ""),
    ("bits beyond F not checked", " and not bits[:, F:].any()", ""),
    ("z not checked", " and torch.equal(z, torch.where(kept, exact, -1e9))", ""),
]

CUDA_PIPELINE = [
    ("stage loaded while it is read", "      machine.wait_empty(stage, (step / STAGES + 1) & 1);\n", ""),
    ("waits for the wrong emptying", "(step / STAGES + 1) & 1", "(step / STAGES) & 1"),
    ("waits for the wrong filling", "machine.wait_full(stage, step / STAGES & 1)", "machine.wait_full(stage, 1)"),
    ("stage read before it is there", "      machine.wait_full(stage, step / STAGES & 1);\n", ""),
    ("stage released while it is read", "product_wait<1>(acc)", "product_wait<2>(acc)"),
    ("gate before the product", "product_wait<0>(acc)", "product_wait<1>(acc)"),
    ("last stage of a tile not released",
     "product_wait<0>(acc);\n    machine.release((step - 1) % STAGES, thread);", "product_wait<0>(acc);"),
    ("biases overwritten", "machine.columns(group, parity)", "machine.columns(group, 0)"),
    ("biases read before they are there", "    machine.group_barrier(group);", "    //"),
    ("halves of W_enc in one place", "share * ROW_BYTES", "0"),
    ("first half of W_enc twice", "tile.latent + share)", "tile.latent)"),
    ("a tile added to the one before", "k + i > 0", "1"),
    ("first 16 of d only", "descriptor(x + 32 * i)", "descriptor(x)"),
    ("rows of the first warpgroup", " + group * GROUP_TOKENS * ROW_BYTES", ""),
    ("stagger without steps", "k_steps < STAGGER + 1 ? k_steps - 1 : STAGGER", "STAGGER"),
    ("columns beyond F", "tile.latent + LATENTS <= p.F)", "true)"),
    ("odd column of the end", "column + 1 < p.F", "column + 2 < p.F"),
]  # fmt: skip

CUDA_GATE = [
    ("a tie kept", "!(z <= threshold)", "!(z < threshold)"),
    ("NaN hidden", "!(z <= threshold)", "(z > threshold)"),
    ("-Inf hidden", " | !(fabsf(z) < INFINITY)", ""),
    ("window closed", "< half_bandwidth);", "<= half_bandwidth);"),
    ("column after the last", "8 * j + 1 < width", "8 * j < width"),
    ("rows after the last", "    if (row < p.N) {", "    if (true) {"),
    ("words after the last", "row < p.N && word + i < n_words", "row < p.N"),
    ("bits of a quad in one place", "words[w] <<= 2 * q", "words[w] <<= q"),
    ("words of a quad exchanged", "word = latent / 32 + 2 * q", "word = latent / 32 + 6 - 2 * q"),
    ("half of a quad", "mine | machine.shuffle_xor(theirs, 2)", "mine"),
]  # fmt: skip

CUDA_TILE = [
    ("rows of 8 one apart", "uint64_t(8 * ROW_BYTES >> 4)", "uint64_t(ROW_BYTES >> 4)"),
    ("last band taken for whole", "rows = rows < TOGETHER ? rows : TOGETHER;", "rows = TOGETHER;"),
    ("two blocks, one tile", "* CLUSTER + rank)", "* CLUSTER)"),
    ("no bands", "TOGETHER * cdiv(F, LATENTS), first", "1 * cdiv(F, LATENTS), first"),
]  # fmt: skip

MUTANTS = [
    Mutant(name, file, old, new)
    for file, mutants in (
        ("gpu/jumprelu.py", JUMPRELU),
        ("gpu/encode_gemm.py", ENCODE_GEMM),
        ("gpu/encode.py", ENCODE),
        ("gpu/entries.py", ENTRIES),
        ("gpu/dense.py", DENSE),
        ("gpu/decode.py", DECODE),
        ("gpu/residual.py", RESIDUAL),
        ("gpu/latents.py", LATENTS),
        ("gpu/weighted_sum.py", WEIGHTED_SUM),
        ("gpu/update.py", UPDATE),
        ("transpose.py", TRANSPOSE),
        ("gpu/centring.py", CENTRING),
        ("gpu/tokens.py", TOKENS),
        ("gpu/conclusion.py", CONCLUSION),
        ("gpu/finishing.py", FINISHING),
        ("gpu/transpose.py", GPU_TRANSPOSE),
        ("gpu/topk.py", GPU_TOPK),
        ("gpu/selection.py", SELECTION),
        ("eager/topk.py", EAGER_TOPK),
        ("cuda/product.py", CUDA_PRODUCT),
        ("cuda/csrc/pipeline.h", CUDA_PIPELINE),
        ("cuda/csrc/gate.h", CUDA_GATE),
        ("cuda/csrc/tile.h", CUDA_TILE),
        ("entries.py", CHUNKS),
    )
    for name, old, new in mutants
]


def copy_project(to: Path) -> None:
    """The package as it is once installed, beside the tests."""
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "gemmascope", to / "gemmascope", ignore=ignore)
    shutil.copytree(ROOT / "kernels", to / "gemmascope" / "kernels", ignore=ignore)
    for name in ("tests", "bench"):
        shutil.copytree(ROOT / name, to / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", to)


def run(project: Path, command: list[str]) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(project), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=project, env=env, capture_output=True, text=True, timeout=TIMEOUT
    )


def run_tests(project: Path, file: str) -> tuple[bool, str]:
    """Whether the tests of a file pass, and the first failure."""
    try:
        done = run(project, ["-m", "pytest", "-x", "-p", "no:cacheprovider", *TESTS[file]])
    except subprocess.TimeoutExpired:
        return False, f"no end after {TIMEOUT} s"
    if done.returncode == 0:
        return True, ""
    if done.returncode != 1:
        raise SystemExit(f"pytest ended with status {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    failure = re.search(r"^(?:FAILED|ERROR) \S+?::(.*)", done.stdout, re.MULTILINE)
    return False, failure[1][:120] if failure else done.stdout[-120:]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.splitlines()[0])
    parser.add_argument(
        "-k",
        metavar="REGEX",
        default="",
        help="only mutants in whose 'FILE: NAME' this is found, as in 'decode.py: 32-bit'",
    )
    wanted = re.compile(parser.parse_args(argv).k)
    mutants = [mutant for mutant in MUTANTS if wanted.search(f"{mutant.file}: {mutant.name}")]
    bad = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        project = Path(folder)
        copy_project(project)
        where = run(project, ["-c", "import gemmascope.kernels; print(gemmascope.kernels.__file__)"]).stdout.strip()
        if not where.startswith(str(project)):
            raise SystemExit(f"the copy is not what the tests would import, but {where}")
        print("| file | mutant | result | first failure |\n|---|---|---|---|")
        for file in dict.fromkeys(mutant.file for mutant in mutants):
            passed, failure = run_tests(project, file)
            bad += not passed
            print(f"| {file} | none (control) | {'passes' if passed else 'FAILS'} | {failure} |", flush=True)
            if not passed:
                continue
            target = project / "gemmascope" / "kernels" / file
            source = target.read_text()
            for mutant in (m for m in mutants if m.file == file):
                if source.count(mutant.old) != 1:
                    result, failure = f"STALE: its text occurs {source.count(mutant.old)} times", ""
                else:
                    target.write_text(source.replace(mutant.old, mutant.new))
                    survived, failure = run_tests(project, file)
                    result = "SURVIVED" if survived else "killed"
                bad += result != "killed"
                print(f"| {file} | {mutant.name} | {result} | {failure} |", flush=True)
            target.write_text(source)
    print(f"{len(mutants)} mutants, {bad} not as they should be")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
