"""Which z [n, F] are among the largest, from z and the largest of each 32 of them: a bit for each that is.

    key_nj = the bits of z_nj where z > 0, those of +Inf where z is not finite, else at most 0
    v = the k-th largest key of the token's row, or the k·N-th largest of the batch
    chosen: key > v, and of those with key = v the first ones, as many as are still wanted; only where key > 0

The bits of positive fp32 numbers ascend as the numbers do. Of each 32 latents, a group, the product leaves the largest
key (`encode_gemm`, mode "largest"). The k-th largest of these is reached by k keys at least, so that no group below it
holds one of the k largest: of 64 random latents among 16,384, some 64 of 512 groups are read.

A token's v is found by bisection of the keys of such groups, in the program that owns the token, and it ends as soon as
exactly k reach its middle. Of the batch each pass counts the keys by 8 of their 31 bits, the highest first, in launches
of their own: two passes over the groups bound v from below, four over the keys of what is left find it. Counts are
integers, so no order matters, and nothing waits for the device.

The words of bits take the place of the groups' keys; `encode.scan` and `entries` make entries of them.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import launch
from .encode import _popcount
from .encode_gemm import INFINITE


@dataclass(frozen=True)
class SelectConfig:
    block: int  # groups of a row that a program looks at at a time
    tile: int  # groups whose z it holds at a time
    num_warps: int


# A warp for each token needs no barrier. Its tile of z takes 64 registers a thread.
FEW = SelectConfig(block=512, tile=64, num_warps=1)
MANY = SelectConfig(block=1024, tile=256, num_warps=4)
# Groups that a program counts.
COUNT_BLOCK = 4096
# The digits of a key, the highest first: how far to shift it, and how many bits there are.
DIGITS = ((23, 8), (15, 8), (7, 8), (0, 7))
# As many of them bound v by the groups: within a 256th.
GROUP_DIGITS = 2
_BINS = tl.constexpr(256)


def select_config(k: int) -> SelectConfig:
    """Of the selection of k of a row: the groups that hold them should fit the tile."""
    return FEW if k <= FEW.tile else MANY


@triton.jit
def _key(z):
    bits = z.to(tl.int32, bitcast=True)
    return tl.where((bits & 0x7FFFFFFF) < INFINITE, bits, INFINITE)


@triton.jit
def _tile_keys(z_row, list_row, first, listed, F, TILE: tl.constexpr):
    """Keys [TILE, 32] of some groups of the list, 0 where there is none, and which they are."""
    places = first + tl.arange(0, TILE)
    groups = tl.load(list_row + places, mask=places < listed, other=0)
    latents = groups[:, None] * 32 + tl.arange(0, 32)[None, :]
    z = tl.load(z_row + latents, mask=(places < listed)[:, None] & (latents < F), other=0.0)
    return _key(z), groups


@triton.jit
def _reach(keys, level):
    return tl.sum((keys >= level).to(tl.int32))


@triton.jit
def _halve(low, high, middle, reached, k):
    """What is left of low and high, between which v lies, when so many keys reach their middle."""
    return tl.where(reached >= k, middle, low), tl.where(reached > k, high, tl.where(reached == k, middle, middle - 1))


@triton.jit
def _reach_of_row(keys_row, level, n_groups, BLOCK: tl.constexpr):
    reached = 0
    for first in range(0, n_groups, BLOCK):
        groups = first + tl.arange(0, BLOCK)
        reached += _reach(tl.load(keys_row + groups, mask=groups < n_groups, other=0), level)
    return reached


@triton.jit
def _bound(keys_row, k, n_groups, BLOCK: tl.constexpr):
    """What the k-th largest key of a row is at least, from the largest of its groups, and the largest.

    The largest of each BLOCK-th group are held, and the k-th of them is a bound too. Where it lets more than 3/2·k
    groups through, the search goes on among all groups, until it lets fewer through.
    """
    lanes = tl.arange(0, BLOCK)
    largest = tl.load(keys_row + lanes, mask=lanes < n_groups, other=0)
    for first in range(BLOCK, n_groups, BLOCK):
        groups = first + lanes
        largest = tl.maximum(largest, tl.load(keys_row + groups, mask=groups < n_groups, other=0))
    top = tl.maximum(tl.max(largest, 0), 1)
    low, high = top * 0 + 1, tl.where(k < tl.minimum(n_groups, BLOCK), top, 1)
    while low < high:
        middle = low + (high - low + 1) // 2
        low, high = _halve(low, high, middle, _reach(largest, middle), k)
    if n_groups > BLOCK and k < n_groups:
        most = k + k // 2
        high = tl.where(_reach_of_row(keys_row, low, n_groups, BLOCK) > most, top, low)
        while low < high:
            middle = low + (high - low + 1) // 2
            reached = _reach_of_row(keys_row, middle, n_groups, BLOCK)
            low, high = _halve(low, high, middle, tl.where(reached <= most, tl.minimum(reached, k), reached), k)
    return low, top


@triton.jit
def _list_groups(keys_row, list_row, low, n_groups, BLOCK: tl.constexpr):
    """Lists the groups that reach ``low``, ascending, and leaves a word of no bits for every group. How many there
    are."""
    lanes = tl.arange(0, BLOCK)
    listed = 0
    for first in range(0, n_groups, BLOCK):
        groups = first + lanes
        keys = tl.load(keys_row + groups, mask=groups < n_groups, other=0)
        reaches = (keys >= low).to(tl.int32)
        places = listed + tl.cumsum(reaches, 0) - reaches
        tl.store(list_row + places, groups, mask=reaches > 0)
        listed += tl.sum(reaches, 0)
    tl.debug_barrier()  # no thread writes what another has yet to read
    for first in range(0, n_groups, BLOCK):
        tl.store(keys_row + first + lanes, tl.zeros([BLOCK], tl.int32), mask=first + lanes < n_groups)
    tl.debug_barrier()  # nor reads what another has yet to write
    return listed


@triton.jit
def _words(marked):
    """Of [TILE, 32]."""
    return tl.sum(marked.to(tl.int32) << tl.arange(0, 32)[None, :], 1)


@triton.jit
def _first_bits(words, most):
    """The lowest bits of each word, ``most`` of them."""
    words = words.to(tl.uint32)
    excess = _popcount(words) - most
    for _ in range(tl.max(excess, 0)):
        below = words | (words >> 1)
        below = below | (below >> 2)
        below = below | (below >> 4)
        below = below | (below >> 8)
        below = below | (below >> 16)
        words = tl.where(excess > 0, words & (below >> 1), words)
        excess -= 1
    return words.to(tl.int32)


@triton.jit
def _mark(z_row, list_row, words_row, keys, groups, listed, v, ties, F, TILE: tl.constexpr):
    """A bit for each key of the list that is above v, and for the first ``ties`` of those that equal it; none of these
    where v is 0. keys, groups: the first tile."""
    ties = tl.where(v > 0, ties, 0)
    for first in range(0, listed, TILE):
        level = _words(keys == v)
        count = _popcount(level.to(tl.uint32))
        before = tl.cumsum(count, 0) - count
        chosen = _words(keys > v) | _first_bits(level, tl.maximum(ties - before, 0))
        ties -= tl.sum(count, 0)
        tl.store(words_row + groups, chosen, mask=first + tl.arange(0, TILE) < listed)
        if first + TILE < listed:
            keys, groups = _tile_keys(z_row, list_row, first + TILE, listed, F, TILE)


@triton.jit(do_not_specialize=["k"])
def _select_kernel(z_ptr, keys_ptr, list_ptr, k, F, n_groups, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Of each token. keys: of the groups [n, n_groups], which become words; list: of as many."""
    row = tl.program_id(0).to(tl.int64)
    z_row, keys_row, list_row = z_ptr + row * F, keys_ptr + row * n_groups, list_ptr + row * n_groups
    low, high = _bound(keys_row, k, n_groups, BLOCK)
    listed = _list_groups(keys_row, list_row, low, n_groups, BLOCK)
    tile, groups = _tile_keys(z_row, list_row, 0, listed, F, TILE)
    above = 0  # keys beyond high
    while low < high:
        middle = low + (high - low + 1) // 2
        reached = _reach(tile, middle)
        for first in range(TILE, listed, TILE):
            keys, _ = _tile_keys(z_row, list_row, first, listed, F, TILE)
            reached += _reach(keys, middle)
        above = tl.where(reached < k, reached, above)
        low, high = _halve(low, high, middle, reached, k)
    _mark(z_row, list_row, keys_row, tile, groups, listed, low, k - above, F, TILE)


def select_of_tokens(z: Tensor, keys: Tensor, k: int) -> None:
    """Of each row of z [n, F] the k largest. keys [n, ⌈F/32⌉]: the largest of each group, which become words."""
    (n, F), n_groups, config = z.shape, keys.shape[1], select_config(k)
    listed = torch.empty_like(keys)
    blocks = {"BLOCK": config.block, "TILE": config.tile}
    launch(_select_kernel, (n,), z, keys, listed, k, F, n_groups, on=z, **blocks, num_warps=config.num_warps)


@triton.jit
def _digits_of(keys, low, SHIFT: tl.constexpr, WIDTH: tl.constexpr):
    """How often each digit occurs in the keys whose higher digits are those of ``low``. Zeros may be too many: none is
    below them."""
    return tl.histogram((keys >> SHIFT) & ((1 << WIDTH) - 1), _BINS, mask=(keys ^ low) >> (SHIFT + WIDTH) == 0)


@triton.jit
def _add(counts_ptr, found):
    tl.atomic_add(counts_ptr + tl.arange(0, _BINS), found, mask=found > 0, sem="relaxed")


@triton.jit
def _count_groups_kernel(
    keys_ptr, counts_ptr, state_ptr, size, SHIFT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Of the largest of each group, [size] of them."""
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keys = tl.load(keys_ptr + places, mask=places < size, other=0)
    _add(counts_ptr, _digits_of(keys, tl.load(state_ptr), SHIFT, WIDTH))


@triton.jit
def _count_keys_kernel(
    z_ptr, list_ptr, listed_ptr, counts_ptr, state_ptr, F, n_groups, SHIFT: tl.constexpr, WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Of the keys of the listed groups of a row."""
    row = tl.program_id(0).to(tl.int64)
    listed, low = tl.load(listed_ptr + row), tl.load(state_ptr)
    found = tl.zeros([_BINS], tl.int32)
    for first in range(0, listed, TILE):
        keys, _ = _tile_keys(z_ptr + row * F, list_ptr + row * n_groups, first, listed, F, TILE)
        found += _digits_of(tl.reshape(keys, (TILE * 32,)), low, SHIFT, WIDTH)
    _add(counts_ptr, found)


@triton.jit
def _pick_kernel(counts_ptr, state_ptr, SHIFT: tl.constexpr):
    """state: the digits of v so far, and how many keys that begin with them are wanted. The next digit is the highest
    that as many reach, or 0."""
    digits = tl.arange(0, _BINS)
    counts = tl.load(counts_ptr + digits)
    low, wanted = tl.load(state_ptr), tl.load(state_ptr + 1)
    reach = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
    digit = tl.max(tl.where(reach >= wanted, digits, 0), 0)
    tl.store(state_ptr, low | (digit << SHIFT))
    tl.store(state_ptr + 1, wanted - tl.sum(tl.where(digits > digit, counts, 0), 0))


@triton.jit
def _list_kernel(keys_ptr, list_ptr, listed_ptr, state_ptr, n_groups, BLOCK: tl.constexpr):
    """Lists the groups of a row that reach what is known of v, and leaves words of no bits."""
    row = tl.program_id(0).to(tl.int64)
    low = tl.maximum(tl.load(state_ptr), 1)
    tl.store(listed_ptr + row, _list_groups(keys_ptr + row * n_groups, list_ptr + row * n_groups, low, n_groups, BLOCK))


@triton.jit
def _count_ties_kernel(z_ptr, list_ptr, listed_ptr, state_ptr, ties_ptr, F, n_groups, TILE: tl.constexpr):
    """Keys of a row that equal v; of 0 it does not matter."""
    row = tl.program_id(0).to(tl.int64)
    listed, v = tl.load(listed_ptr + row), tl.load(state_ptr)
    count = 0
    for first in range(0, listed, TILE):
        keys, _ = _tile_keys(z_ptr + row * F, list_ptr + row * n_groups, first, listed, F, TILE)
        count += tl.sum((keys == v).to(tl.int32))
    tl.store(ties_ptr + row, count)


@triton.jit
def _mark_kernel(
    z_ptr, list_ptr, listed_ptr, words_ptr, state_ptr, ties_ptr, F, n_groups, TILE: tl.constexpr
):  # fmt: skip
    """ties: of each row and all before it."""
    row = tl.program_id(0).to(tl.int64)
    before = tl.load(ties_ptr + row - 1, mask=row > 0, other=0)
    ties = tl.maximum(tl.load(state_ptr + 1) - before, 0).to(tl.int32)
    z_row, list_row, words_row = z_ptr + row * F, list_ptr + row * n_groups, words_ptr + row * n_groups
    listed = tl.load(listed_ptr + row)
    keys, groups = _tile_keys(z_row, list_row, 0, listed, F, TILE)
    _mark(z_row, list_row, words_row, keys, groups, listed, tl.load(state_ptr), ties, F, TILE)


def select_of_batch(z: Tensor, keys: Tensor, room: int, k: int) -> None:
    """Of z [n, F] the ``room`` largest of all, some k of a row; otherwise as `select_of_tokens`."""
    (n, F), n_groups, config = z.shape, keys.shape[1], select_config(k)
    listed, in_list = torch.empty_like(keys), keys.new_empty(n)
    counts = keys.new_zeros(GROUP_DIGITS + len(DIGITS), _BINS.value)
    of_groups, of_keys = state = keys.new_zeros(2, 2)
    state[:, 1].fill_(min(room, n * F))
    warps, tile = config.num_warps, config.tile
    for (shift, width), found in zip(DIGITS[:GROUP_DIGITS], counts, strict=False):
        programs = triton.cdiv(keys.numel(), COUNT_BLOCK)
        given = (keys, found, of_groups, keys.numel(), shift, width)
        launch(_count_groups_kernel, (programs,), *given, on=z, BLOCK=COUNT_BLOCK, num_warps=4)
        launch(_pick_kernel, (1,), found, of_groups, shift, on=z, num_warps=4)
    launch(_list_kernel, (n,), keys, listed, in_list, of_groups, n_groups, on=z, BLOCK=config.block, num_warps=warps)
    for (shift, width), found in zip(DIGITS, counts[GROUP_DIGITS:], strict=True):
        given = (z, listed, in_list, found, of_keys, F, n_groups, shift, width)
        launch(_count_keys_kernel, (n,), *given, on=z, TILE=tile, num_warps=warps)
        launch(_pick_kernel, (1,), found, of_keys, shift, on=z, num_warps=4)
    ties = keys.new_empty(n)
    launch(_count_ties_kernel, (n,), z, listed, in_list, of_keys, ties, F, n_groups, on=z, TILE=tile, num_warps=warps)
    given = (z, listed, in_list, keys, of_keys, ties.cumsum(0), F, n_groups)
    launch(_mark_kernel, (n,), *given, on=z, TILE=tile, num_warps=warps)
