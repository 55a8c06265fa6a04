"""The entries of a batch: the pairs (token, latent) with z > θ or |z − θ| < ε/2, where z = x·W_enc + b_enc.

x [N, d], W_enc [d, F] of one dtype (fp32, fp16, bf16), b_enc [F], θ = threshold [F] fp32  →  `Entries`.

As in sparse inference (`encode.py`), the GEMM leaves one bit per entry and the fp32 z of the entries it keeps, in
scratch for a chunk of tokens at a time; the bits are counted and scanned; a light kernel moves the kept entries where
they go. Here the room for them is given beforehand and the host never waits: the scan runs on, on the device, from
chunk to chunk, and what falls beyond the capacity is counted but not written. Whether an entry is active is decided
once more from the same z and θ when it is moved.

The rounded distance |z − θ| never grows as z rises to θ. So a latent's entries are all z above some edge: the last
z ≤ θ outside the window. It is searched once a batch, in the arithmetic that the definition above is decided in, and
the GEMM compares with it alone. The same launch writes F for the latent of every entry there is room for, which stays
beyond the last one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import cuda
from ..entries import ACTIVE, Entries, tokens_per_chunk
from .common import launch
from .encode import SEGMENT, _popcount, scan
from .encode_gemm import encode_gemm, launch_config, words_per_row

_ACTIVE = tl.constexpr(ACTIVE)
# Latents per program of the search: few, so that every SM has some. Entries that it fills at a time, and programs that
# there are for them at least, if not each would have some.
EDGE_BLOCK, FILL_BLOCK, FILL_PROGRAMS = 128, 1024, 128


@triton.jit
def _rank(z):
    """Place of an fp32 in the order of all of them, −0 below 0. The same turns the bits of a rank into those of z."""
    bits = z.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _begin_kernel(
    threshold_ptr, lower_ptr, latents_ptr, half_bandwidth, F, capacity, BLOCK: tl.constexpr, FILL: tl.constexpr
):  # fmt: skip
    """By bisection of the ranks: low is never inside the window, and everything above high is.

    −Inf is outside. Nothing is near a NaN, so for a NaN θ it ends at θ.
    """
    latents = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    threshold = tl.load(threshold_ptr + latents, mask=latents < F, other=0.0)
    low = _rank(tl.full([BLOCK], float("-inf"), tl.float32))
    high = _rank(threshold)
    for _ in range(32):
        middle = (low | high) - ((low ^ high) >> 1)  # rounded up, where a sum could overflow
        z = _rank(middle.to(tl.float32, bitcast=True)).to(tl.float32, bitcast=True)
        inside = tl.abs(z - threshold) < half_bandwidth
        low = tl.where(inside, low, middle)
        high = tl.where(inside, middle - 1, high)
    lower = _rank(low.to(tl.float32, bitcast=True)).to(tl.float32, bitcast=True)
    tl.store(lower_ptr + latents, lower, mask=latents < F)
    for start in range(tl.program_id(0).to(tl.int64) * FILL, capacity, tl.num_programs(0) * FILL):
        entries = start + tl.arange(0, FILL)
        tl.store(latents_ptr + entries, tl.zeros([FILL], tl.int32) + F, mask=entries < capacity)


def begin(threshold: Tensor, bandwidth: float, latents: Tensor) -> Tensor:
    """The largest z ≤ θ with |z − θ| ≥ ε/2 in fp32, by latent; −Inf where there is none and NaN where θ is. Every one
    of ``latents`` [capacity] becomes F."""
    lower, F, capacity = torch.empty_like(threshold), threshold.shape[0], latents.shape[0]
    programs = max(triton.cdiv(F, EDGE_BLOCK), min(triton.cdiv(capacity, FILL_BLOCK), FILL_PROGRAMS))
    arguments = (threshold, lower, latents, bandwidth / 2, F, capacity)
    blocks = {"BLOCK": EDGE_BLOCK, "FILL": FILL_BLOCK}
    launch(_begin_kernel, (programs,), *arguments, on=threshold, **blocks, num_warps=4)
    return lower


@triton.jit(do_not_specialize=["first_token", "capacity"])
def _entries_kernel(
    words_ptr, z_ptr, threshold_ptr, starts_ptr, z_out_ptr, latents_ptr, tokens_ptr, first_token, capacity, F, n_words,
    per_row, WORDS: tl.constexpr,
):  # fmt: skip
    """Moves the kept entries of one segment of a row to starts[segment] (int64) and on, as far as capacity allows."""
    segment = tl.program_id(0)
    start = tl.load(starts_ptr + segment)
    end = tl.load(starts_ptr + segment + 1)
    if (end > start) & (start < capacity):
        row = (segment // per_row).to(tl.int64)
        word_columns = (segment % per_row) * WORDS + tl.arange(0, WORDS)
        words = tl.load(words_ptr + row * n_words + word_columns, mask=word_columns < n_words, other=0).to(tl.uint32)
        counts = _popcount(words)
        position = start + tl.cumsum(counts, 0) - counts
        for _ in range(tl.max(counts, 0)):  # each word gives up its lowest bit
            kept = words != 0
            lower = words - kept.to(tl.uint32)
            latent = word_columns * 32 + _popcount(lower & (lower ^ words))
            z = tl.load(z_ptr + row * F + latent, mask=kept, other=0.0)
            threshold = tl.load(threshold_ptr + latent, mask=kept, other=0.0)
            inactive = (z <= threshold) & (tl.abs(z) < float("inf"))
            stored = kept & (position < capacity)
            tl.store(z_out_ptr + position, z, mask=stored)
            tl.store(latents_ptr + position, tl.where(inactive, latent, latent | _ACTIVE), mask=stored)
            tl.store(tokens_ptr + position, tl.zeros([WORDS], tl.int32) + first_token + row.to(tl.int32), mask=stored)
            words = words & lower
            position += 1


def move(words: Tensor, z: Tensor, threshold: Tensor, starts: Tensor, first_token: int, entries: Entries) -> None:
    """From one chunk's words and scratch to its entries; ``starts``: [segments of the chunk + 1]."""
    F = threshold.shape[0]
    launch(
        _entries_kernel,
        (starts.shape[0] - 1,),
        on=z,
        words_ptr=words,
        z_ptr=z,
        threshold_ptr=threshold,
        starts_ptr=starts,
        z_out_ptr=entries.z,
        latents_ptr=entries.latents,
        tokens_ptr=entries.tokens,
        first_token=first_token,
        capacity=entries.z.shape[0],
        F=F,
        n_words=words.shape[1],
        per_row=triton.cdiv(F, SEGMENT),
        WORDS=SEGMENT // 32,
        num_warps=1,
    )


def encode_entries(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float, capacity: int, tf32: bool = False
) -> Entries:
    """By the contract of `reference_training.encode_entries`; z and tokens beyond the last entry are undefined.

    Launches without waiting for the device. Any strides; x whose rows start on 16-byte boundaries and latent-major
    W_enc (a transposed contiguous [F, d]) are the fast path. Scratch: `scratch_bytes` of `tokens_per_chunk`
    tokens, and 12 bytes for each `SEGMENT` latents of a token.
    """
    N, F = x.shape[0], W_enc.shape[1]
    z_out = x.new_empty(capacity, dtype=torch.float32)
    latents, tokens = (x.new_empty(capacity, dtype=torch.int32) for _ in range(2))
    if N == 0 or F == 0:
        return Entries(z_out, latents.fill_(F), tokens, torch.zeros(N + 1, dtype=torch.int64, device=x.device))
    config = launch_config(x, W_enc, tf32)
    chunk, per_row = tokens_per_chunk(N, F), triton.cdiv(F, SEGMENT)
    z = x.new_empty(chunk, F, dtype=torch.float32)
    words = x.new_empty(chunk, words_per_row(F), dtype=torch.int32)
    starts, offsets = (x.new_empty(n + 1, dtype=torch.int64) for n in (N * per_row, N))
    entries = Entries(z_out, latents, tokens, offsets)
    b_enc, threshold = b_enc.contiguous(), threshold.contiguous()
    by_cuda = cuda.asked() and cuda.takes(x, W_enc, b_enc, threshold)
    lower = begin(threshold, bandwidth, latents)
    for first in range(0, N, chunk):
        rows = min(chunk, N - first)
        part_of_x = x[first : first + rows]
        if by_cuda and cuda.takes(part_of_x, W_enc, b_enc, threshold):
            cuda.product_of_entries(part_of_x, W_enc, b_enc, threshold, bandwidth, z, words)
        else:
            encode_gemm(part_of_x, W_enc, b_enc, lower, z, words, config)
        scan(words, rows, per_row, starts, offsets, first)
        move(words, z, threshold, starts[first * per_row : (first + rows) * per_row + 1], first, entries)
    return entries
