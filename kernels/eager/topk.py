"""The selection by the largest pre-activations in plain PyTorch: a tile of z at a time, of which what may still be
among the largest is kept."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..entries import ACTIVE, Entries
from ..reference.gates import compute_dtype
from .inference import linear, row_blocks, row_offsets, true_positions


def _keys(z: Tensor, among: Tensor | None) -> Tensor:
    """What is compared: z where it may be chosen, +Inf where it is not finite, else 0."""
    keys = torch.where(z.isfinite(), z.clamp(min=0), torch.inf)
    return keys if among is None else keys.masked_fill_(~among, 0)


def _first_largest(keys: Tensor, k: int) -> Tensor:
    """Positions of the k largest of each row of keys [R, C], ascending; of equals the first ones. All, if k ≥ C."""
    if keys.shape[1] <= k:
        return torch.arange(keys.shape[1], device=keys.device).expand(keys.shape)
    border = keys.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    above, level = keys > border, keys == border
    chosen = above | (level & (level.cumsum(1) <= k - above.sum(1, keepdim=True)))
    return torch.nonzero(chosen)[:, 1].view(-1, k)


Tiles = Iterator[tuple[slice, Tensor]]
Found = tuple[Tensor, Tensor, Tensor]  # z, token and latent of entries


def _of_each_token(first_token: int, tiles: Tiles, k: int, among: Tensor | None) -> Found:
    """Those of a block of tokens. Candidates lie before the tile, so that latents ascend along the rows."""
    kept: Found | None = None
    for columns, z in tiles:
        latents = torch.arange(columns.start, columns.start + z.shape[1], device=z.device).expand(z.shape)
        tile = (_keys(z, None if among is None else among[columns]), z, latents)
        if kept is not None:
            tile = tuple(torch.cat(pair, 1) for pair in zip(kept, tile, strict=True))
        places = _first_largest(tile[0], k)
        kept = tile[0].gather(1, places), tile[1].gather(1, places), tile[2].gather(1, places)
    assert kept is not None  # there is a latent
    keys, z, latents = kept
    row, column = torch.nonzero(keys > 0, as_tuple=True)
    return z[row, column], row + first_token, latents[row, column]


class _OfBatch:
    """The ``room`` largest of all that were added. What is below the smallest of as many is left out at once."""

    def __init__(self, room: int, d_sae: int):
        self.room, self.d_sae, self.bound = room, d_sae, 0.0
        self.keys: list[Tensor] = []
        self.z: list[Tensor] = []
        self.numbers: list[Tensor] = []  # token·d_sae + latent
        self.held = 0

    def add(self, first_token: int, tiles: Tiles, among: Tensor | None) -> None:
        for columns, z in tiles:
            keys = _keys(z, None if among is None else among[columns])
            places = true_positions((keys >= self.bound) & (keys > 0))
            row = places // z.shape[1]
            self.keys.append(keys.view(-1).index_select(0, places))
            self.z.append(z.reshape(-1).index_select(0, places))
            self.numbers.append((row + first_token) * self.d_sae + (places - row * z.shape[1] + columns.start))
            self.held += len(places)
            if self.held > 2 * self.room:
                self._prune()

    def _prune(self) -> None:
        numbers, order = torch.cat(self.numbers).sort()
        keys, z = torch.cat(self.keys).index_select(0, order), torch.cat(self.z).index_select(0, order)
        if len(keys) > self.room:
            (places,) = _first_largest(keys[None], self.room)
            keys, z, numbers = (t.index_select(0, places) for t in (keys, z, numbers))
            self.bound = float(keys.min())
        self.keys, self.z, self.numbers, self.held = [keys], [z], [numbers], len(keys)

    def found(self) -> Found:
        self._prune()
        (z,), (numbers,) = self.z, self.numbers
        token = numbers // self.d_sae
        return z, token, numbers - token * self.d_sae


def encode_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, of: str = "token", among: Tensor | None = None, tf32: bool = False
) -> Entries:
    """By the contract of `reference.encode_topk`. Beside a tile of z and its keys it holds k candidates for each token
    of a block, or 2·k·N and a tile's for the batch."""
    (N, _), d_sae, dtype = x.shape, W_enc.shape[1], compute_dtype(x)
    b_enc = b_enc.to(dtype)

    def tiles_of(rows: Tensor, tiles: list[slice]) -> Tiles:
        for tile in tiles:
            yield tile, linear(rows, W_enc[:, tile].to(dtype), b_enc[tile])

    nothing = torch.empty(0, dtype=torch.int64, device=x.device)
    parts, batch = [(b_enc.new_empty(0), nothing, nothing)], _OfBatch(k * N, d_sae)
    for tokens, tiles in row_blocks(x, W_enc):
        block = tiles_of(x[tokens].to(dtype), tiles)
        if of == "token":
            parts.append(_of_each_token(tokens.start, block, k, among))
        else:
            batch.add(tokens.start, block, among)
    if of == "batch" and N:
        parts.append(batch.found())
    z, token, latent = map(torch.cat, zip(*parts, strict=True))
    room = k * N - len(z)
    return Entries(
        F.pad(z, (0, room)),
        F.pad((latent + ACTIVE).to(torch.int32), (0, room), value=d_sae),
        F.pad(token.to(torch.int32), (0, room)),
        row_offsets(token, N),
    )
