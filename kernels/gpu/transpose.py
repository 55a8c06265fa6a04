"""The entries of a batch in the order of their latents, by counting: for entry e = (token n, latent j),

    marks[j, n] = 1;   counts[j, b] = how many tokens of block b = ⌊n/256⌋ are marked
    starts = what is counted before [j, b], latent after latent, block after block;   offsets[j] = starts[j, 0]
    place of e = starts[j, b] + how many tokens of the block before n are marked;   order[place] = e

A pair (n, j) is one entry at most, so a bit holds it, and its rank among the tokens of its latent is a count of bits.
Marks and counts are made by atomics on integers: which program comes first changes neither, hence no place either.

The marks take a bit for each pair, N·F/8 bytes, and setting them to zero is most of the work once F is large: beyond
`MARKS_BYTES` the entries are sorted instead, as in plain PyTorch, whose sort reads them four times whatever F is.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .. import transpose
from ..entries import LATENT, ByLatent, Entries
from .common import launch
from .encode import _popcount

_LATENT = tl.constexpr(LATENT)


@dataclass(frozen=True)
class TransposeConfig:
    mark: int  # entries that a program marks
    group: int  # starts that a program writes
    place: int  # entries that a program places
    num_warps: int


CONFIG = TransposeConfig(mark=1024, group=4096, place=128, num_warps=4)
# 131,072 latents of 8,192 tokens.
MARKS_BYTES = 1 << 27

# Words of marks in a block: together one sector of memory, from which a thread or two count.
_WORDS = tl.constexpr(8)
BLOCK_TOKENS = 32 * _WORDS.value


@triton.jit
def _pairs(latents_ptr, tokens_ptr, offsets_ptr, N, F, capacity, BLOCK: tl.constexpr):
    """The entries of this program, whether they are any, and for each its latent and its token."""
    stored = tl.minimum(tl.load(offsets_ptr + N), capacity)
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    latents = tl.load(latents_ptr + entries, mask=entries < stored, other=F) & _LATENT
    valid = latents < F
    return entries, valid, latents, tl.load(tokens_ptr + entries, mask=valid, other=0)


@triton.jit(do_not_specialize=["N", "capacity", "per_latent"])
def _mark_kernel(
    latents_ptr, tokens_ptr, offsets_ptr, marks_ptr, counts_ptr, groups_ptr, N, F, capacity, per_latent,
    GROUP: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """per_latent: blocks of tokens. groups: the sums of ``GROUP`` counts each."""
    _, valid, latents, tokens = _pairs(latents_ptr, tokens_ptr, offsets_ptr, N, F, capacity, BLOCK)
    blocks = latents * per_latent + tokens // (32 * _WORDS)
    words = blocks * _WORDS + tokens // 32 % _WORDS
    tl.atomic_or(marks_ptr + words, 1 << tokens % 32, mask=valid, sem="relaxed")
    tl.atomic_add(counts_ptr + blocks, 1, mask=valid, sem="relaxed")
    found = tl.histogram(blocks // GROUP, BINS, mask=valid)
    tl.atomic_add(groups_ptr + tl.arange(0, BINS), found, mask=found > 0, sem="relaxed")


@triton.jit(do_not_specialize=["n_blocks", "per_latent"])
def _starts_kernel(
    counts_ptr, groups_ptr, starts_ptr, offsets_ptr, n_blocks, per_latent, GROUP: tl.constexpr, BINS: tl.constexpr
):
    group, bins = tl.program_id(0), tl.arange(0, BINS)
    before = tl.sum(tl.load(groups_ptr + bins, mask=bins < group, other=0), 0)
    blocks = group * GROUP + tl.arange(0, GROUP)
    counts = tl.load(counts_ptr + blocks)  # there is room for whole groups
    starts = before + tl.cumsum(counts, 0) - counts
    tl.store(starts_ptr + blocks, starts)
    is_first = (blocks % per_latent == 0) & (blocks <= n_blocks)  # the last of the offsets is how many there are
    tl.store(offsets_ptr + blocks // per_latent, starts.to(tl.int64), mask=is_first)


@triton.jit(do_not_specialize=["N", "capacity", "per_latent"])
def _place_kernel(
    latents_ptr, tokens_ptr, offsets_ptr, marks_ptr, starts_ptr, order_ptr, N, F, capacity, per_latent,
    BLOCK: tl.constexpr,
):  # fmt: skip
    entries, valid, latents, tokens = _pairs(latents_ptr, tokens_ptr, offsets_ptr, N, F, capacity, BLOCK)
    blocks = latents * per_latent + tokens // (32 * _WORDS)
    words = tl.arange(0, _WORDS)
    marks = tl.load(marks_ptr + blocks[:, None] * _WORDS + words[None, :], mask=valid[:, None], other=0)
    own = (tokens // 32 % _WORDS)[:, None]
    before = ~(-1 << tokens % 32)[:, None]  # the tokens before this one in its own word
    before = tl.where(words[None, :] < own, -1, tl.where(words[None, :] == own, before, 0))
    rank = tl.sum(_popcount((marks & before).to(tl.uint32, bitcast=True)), 1)
    place = tl.load(starts_ptr + blocks, mask=valid, other=0) + rank
    tl.store(order_ptr + place, entries.to(tl.int64), mask=valid)


def by_latent(entries: Entries, d_sae: int) -> ByLatent:
    """By the contract of `kernels.by_latent`; order is undefined beyond the last entry. Never waits for the device.

    Scratch: `MARKS_BYTES` at most, and three sixteenths of the marks on top.
    """
    config = CONFIG
    N, capacity, device = entries.offsets.shape[0] - 1, entries.latents.shape[0], entries.latents.device
    per_latent = triton.cdiv(N, BLOCK_TOKENS)
    n_blocks = d_sae * per_latent
    possible = min(capacity, N * d_sae)
    if possible == 0 or 4 * _WORDS.value * n_blocks > MARKS_BYTES:
        return transpose.by_latent(entries, d_sae)
    n_groups = triton.cdiv(n_blocks + 1, config.group)
    bins = max(32, triton.next_power_of_2(n_groups))
    rooms = _WORDS.value * n_blocks, n_groups * config.group, bins
    zeros = torch.zeros(sum(rooms), dtype=torch.int32, device=device)
    marks, counts, groups = zeros.split(rooms)
    starts = torch.empty_like(counts)
    order = torch.empty(capacity, dtype=torch.int64, device=device)
    offsets = torch.empty(d_sae + 1, dtype=torch.int64, device=device)
    read = {"latents_ptr": entries.latents, "tokens_ptr": entries.tokens, "offsets_ptr": entries.offsets}
    sizes = {"N": N, "F": d_sae, "capacity": capacity, "per_latent": per_latent, "num_warps": config.num_warps}
    grouping = {"GROUP": config.group, "BINS": bins}
    launch(
        _mark_kernel,
        (triton.cdiv(possible, config.mark),),
        on=order,
        **read,
        marks_ptr=marks,
        counts_ptr=counts,
        groups_ptr=groups,
        **sizes,
        **grouping,
        BLOCK=config.mark,
    )
    launch(
        _starts_kernel,
        (n_groups,),
        on=order,
        counts_ptr=counts,
        groups_ptr=groups,
        starts_ptr=starts,
        offsets_ptr=offsets,
        n_blocks=n_blocks,
        per_latent=per_latent,
        **grouping,
        num_warps=config.num_warps,
    )
    launch(
        _place_kernel,
        (triton.cdiv(possible, config.place),),
        on=order,
        **read,
        marks_ptr=marks,
        starts_ptr=starts,
        order_ptr=order,
        **sizes,
        BLOCK=config.place,
    )
    return ByLatent(order, offsets)
