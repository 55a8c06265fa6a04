"""The selection by the largest pre-activations: the product by the encoder's kernel, the selection by `torch.topk`.

    key_nj = the bits of z_nj where z > 0, those of +Inf where z is not finite, else 0
    the k largest key·2³² + (what comes first has more) of each row, or the k·N largest of the batch

The bits of positive fp32 numbers ascend as the numbers do, and with its place in the lower half no key equals another:
which latents are chosen is the same in every run, however `torch.topk` treats equals. Nothing waits for the device.

A chunk of tokens is encoded and selected from at a time (`entries.tokens_per_chunk`). Beside its z that takes 8 bytes
of key for each, and what `torch.topk` holds. Of the batch, each chunk leaves its k·N largest, which compete with those
of the chunks before it.
"""

import torch
from torch import Tensor

from ..entries import ACTIVE, Entries, tokens_per_chunk
from .encode_gemm import encode_gemm, launch_config, words_per_row

_INFINITE = 0x7F800000  # the bits of +Inf


def _keys(z: Tensor, among: Tensor | None) -> Tensor:
    """int64, of the shape of z [n, F]: bits of what is compared, in the upper half; 0 where z may not be chosen."""
    bits = torch.where(z.isfinite(), z.clamp(min=0).view(torch.int32), _INFINITE)
    if among is not None:
        bits = bits * among
    return bits.to(torch.int64) << 32


def _first_largest(keys: Tensor, k: int) -> Tensor:
    """Places of the k largest of each row of keys [R, C < 2³²], ascending; of equals the first ones. All, if k ≥ C."""
    columns = keys.shape[1]
    last_first = torch.arange(columns - 1, -1, -1, dtype=torch.int64, device=keys.device)
    if columns <= k:
        return last_first.flip(0).expand(keys.shape)
    return (keys | last_first).topk(k, dim=1, sorted=False).indices.sort(dim=1).values


def encode_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, of: str = "token", among: Tensor | None = None, tf32: bool = False
) -> Entries:
    """By the contract of `reference.encode_topk`."""
    (N, _), d_sae, device = x.shape, W_enc.shape[1], x.device
    room = k * N
    entries = Entries(
        torch.zeros(room, dtype=torch.float32, device=device),
        torch.full((room,), d_sae, dtype=torch.int32, device=device),
        torch.zeros(room, dtype=torch.int32, device=device),
        torch.zeros(N + 1, dtype=torch.int64, device=device),
    )
    if N == 0:
        return entries
    config, b_enc, chunk = launch_config(x, W_enc, tf32), b_enc.contiguous(), tokens_per_chunk(N, d_sae)
    scratch = x.new_empty(chunk, d_sae, dtype=torch.float32)
    words = x.new_empty(chunk, words_per_row(d_sae), dtype=torch.int32)
    lower = torch.full((d_sae,), torch.nan, dtype=torch.float32, device=device)  # nothing compares with it
    found: list[tuple[Tensor, Tensor, Tensor]] = []  # keys, z and token·d_sae + latent
    for first in range(0, N, chunk):
        n = min(chunk, N - first)
        z = scratch[:n]
        encode_gemm(x[first : first + n], W_enc, b_enc, lower, z, words, config)
        keys = _keys(z, among)
        numbers = torch.arange(first, first + n, dtype=torch.int64, device=device)[:, None] * d_sae
        if of == "token":
            places = _first_largest(keys, k)
            numbers = numbers + places
        else:
            keys, z = keys.view(1, -1), z.view(1, -1)
            places = _first_largest(keys, room)
            numbers = places + first * d_sae
        kept = (keys.gather(1, places), z.gather(1, places), numbers)
        if of == "batch" and found:
            kept = tuple(torch.cat(pair, 1) for pair in zip(found.pop(), kept, strict=True))
            places = _first_largest(kept[0], room)
            kept = tuple(t.gather(1, places) for t in kept)
        found.append(kept)  # pyright: ignore[reportArgumentType]
    keys, z, numbers = (torch.cat([part.flatten() for part in parts]) for parts in zip(*found, strict=True))
    return _in_order(entries, keys > 0, z, numbers, d_sae)


def _in_order(entries: Entries, fires: Tensor, z: Tensor, numbers: Tensor, d_sae: int) -> Entries:
    """Those that fire, without gaps. Their numbers ascend."""
    places = torch.cumsum(fires, 0)
    total, room = places[-1:], entries.z.shape[0]
    places = torch.where(fires, places - 1, room)  # the rest goes where it is cut off

    def moved(values: Tensor, into: Tensor) -> Tensor:
        return torch.cat((into, into.new_empty(1))).scatter_(0, places, values.to(into.dtype))[:room]

    tokens = numbers // d_sae
    # Numbers of what does not fire are passed over: they lie behind the last entry.
    of_entries = moved(tokens, torch.full((room,), entries.offsets.shape[0] - 1, dtype=torch.int64, device=z.device))
    bounds = torch.arange(entries.offsets.shape[0], dtype=torch.int64, device=z.device)
    offsets = torch.minimum(torch.searchsorted(of_entries, bounds), total)
    return Entries(
        moved(z, entries.z), moved(numbers - tokens * d_sae + ACTIVE, entries.latents), moved(tokens, entries.tokens),
        offsets,
    )  # fmt: skip
