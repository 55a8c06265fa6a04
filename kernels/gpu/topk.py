"""The selection by the largest pre-activations: a product that leaves z and the largest of each 32, `selection`, and
entries of the bits that it leaves, as `entries.encode_entries` makes them.

A chunk of tokens is encoded and selected from at a time (`entries.tokens_per_chunk`). Of a batch of several chunks,
each leaves its k·N largest, which compete with those of the chunks before it, by `torch.topk` of

    key·2³² + (what comes first has more)

of which none equals another, so that the same are chosen in every run, however `torch.topk` treats equals. Nothing
waits for the device.
"""

import torch
import triton
from torch import Tensor

from ..entries import Entries, tokens_per_chunk
from .encode import SEGMENT, scan
from .encode_gemm import INFINITE, encode_gemm, launch_config, words_per_row
from .entries import move
from .selection import select_of_batch, select_of_tokens


def encode_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, of: str = "token", among: Tensor | None = None, tf32: bool = False
) -> Entries:
    """By the contract of `reference.encode_topk`. Beside the scratch of `encode_entries` it holds a list of groups, 4
    bytes for each 32 latents of a token of a chunk."""
    (N, _), d_sae = x.shape, W_enc.shape[1]
    entries = _nothing(x, N, d_sae, k * N)
    if N == 0:
        return entries
    config, b_enc, chunk = launch_config(x, W_enc, tf32), b_enc.contiguous(), tokens_per_chunk(N, d_sae)
    may = None if among is None else among.to(torch.int8)
    z = x.new_empty(chunk, d_sae, dtype=torch.float32)
    keys = x.new_empty(chunk, words_per_row(d_sae), dtype=torch.int32)
    per_row, zeros = triton.cdiv(d_sae, SEGMENT), x.new_zeros(d_sae, dtype=torch.float32)
    starts = x.new_empty(N * per_row + 1, dtype=torch.int64)
    found: Entries | None = None
    for first in range(0, N, chunk):
        n = min(chunk, N - first)
        z_of, keys_of = z[:n], keys[:n]
        encode_gemm(x[first : first + n], W_enc, b_enc, may, z_of, keys_of, config, "largest")
        if of == "token":
            select_of_tokens(z_of, keys_of, k)
            into, before = entries, first
        else:
            select_of_batch(z_of, keys_of, k * N, k)
            into, before = (entries if n == N else _nothing(x, n, d_sae, k * N)), 0
        scan(keys_of, n, per_row, starts, into.offsets, before)
        move(keys_of, z_of, zeros, starts[before * per_row : (before + n) * per_row + 1], first, into)
        if into is not entries:
            found = into if found is None else _of_both(found, into, N, d_sae)
    return entries if found is None else found


def _nothing(x: Tensor, n: int, d_sae: int, room: int) -> Entries:
    """Room for the entries of n tokens, filled up as the contract says; offsets as of none."""
    return Entries(
        x.new_zeros(room, dtype=torch.float32),
        x.new_full((room,), d_sae, dtype=torch.int32),
        x.new_zeros(room, dtype=torch.int32),
        x.new_zeros(n + 1, dtype=torch.int64),
    )


def _keys(z: Tensor) -> Tensor:
    """int64 [room]: bits of what is compared, in the upper half; 0 where there is no entry, since z is 0 there."""
    return torch.where(z.isfinite(), z.view(torch.int32), INFINITE.value).to(torch.int64) << 32


def _first_largest(keys: Tensor, k: int) -> Tensor:
    """Places of the k largest of keys [C < 2³²], ascending; of equals the first ones. All, if k ≥ C."""
    places = torch.arange(len(keys), dtype=torch.int64, device=keys.device)
    if len(keys) <= k:
        return places
    return (keys | places.flip(0)).topk(k, sorted=False).indices.sort().values


def _of_both(before: Entries, after: Entries, n: int, d_sae: int) -> Entries:
    """The largest of two lists of the entries of n tokens, of which the first one's tokens come first; as many as each
    has room for."""
    z, latents, tokens = (torch.cat(pair) for pair in zip(before[:3], after[:3], strict=True))
    keys, room = _keys(z), len(after.z)
    places = _first_largest(keys, room)
    z, latents, tokens = z[places], latents[places], tokens[places]
    fires = keys[places] > 0
    places = torch.where(fires, torch.cumsum(fires, 0) - 1, room)  # the rest goes where it is cut off

    def moved(values: Tensor, rest: float) -> Tensor:
        return values.new_full((room + 1,), rest).scatter_(0, places, values)[:room]

    tokens = moved(tokens, n)
    bounds = torch.arange(n + 1, dtype=torch.int32, device=z.device)
    offsets = torch.searchsorted(tokens, bounds)
    return Entries(moved(z, 0), moved(latents, d_sae), torch.where(tokens < n, tokens, 0), offsets)
