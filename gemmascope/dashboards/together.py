"""`TokenSample`: what fires on a bounded sample of tokens, and which latents fire together on them."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import SparseCode

# Bounds of a sample. Pairs: over its tokens, the square of how many latents fire on one, which is the work of counting.
MAX_TOKENS, MAX_PAIRS = 1 << 16, 1 << 26
# Pairs that are counted at once.
COUNTED = 1 << 22
_SLACK = 1.25


class Together(NamedTuple):
    """As in `table.LatentTable`."""

    together: Tensor
    together_tokens: Tensor
    sampled: Tensor
    n_sampled: int


class TokenSample:
    """The tokens first in an order that looks random (`strata.shuffled`), as many as the bounds allow: which they are
    depends on the tokens alone. Entries are held of ``max_tokens`` tokens at most, and a quarter more between cuts."""

    def __init__(self, d_sae: int, max_tokens: int = MAX_TOKENS, max_pairs: int = MAX_PAIRS):
        self.d_sae, self.max_tokens, self.max_pairs = d_sae, max_tokens, max_pairs
        whole = {"dtype": torch.int64, "device": "cpu"}
        self.order, self.lengths = torch.empty(0, **whole), torch.empty(0, **whole)
        self.latents = torch.empty(0, dtype=torch.int32, device="cpu")
        self._before: int | None = None
        """Tokens from here on in the order are too many."""
        self._pairs = 0

    @property
    def nbytes(self) -> int:
        return self.order.nbytes + self.lengths.nbytes + self.latents.nbytes

    def add(self, code: SparseCode, order: Tensor) -> None:
        """Tokens and their numbers [n] in the order, no two alike."""
        chosen = torch.ones_like(order, dtype=torch.bool) if self._before is None else order < self._before
        if not chosen.any():
            return
        lengths = code.offsets[1:] - code.offsets[:-1]
        self.latents = torch.cat([self.latents, code.indices[chosen.repeat_interleave(lengths)]])
        self.order = torch.cat([self.order, order[chosen]])
        self.lengths = torch.cat([self.lengths, lengths[chosen]])
        self._pairs += int((lengths[chosen] ** 2).sum())
        if len(self.order) > _SLACK * self.max_tokens or self._pairs > _SLACK * self.max_pairs:
            self.cut()

    def cut(self) -> None:
        """Keep what is within the bounds, in the order. What exceeded them once does so with all tokens."""
        order = self.order.sort().indices
        starts = self.lengths.cumsum(0) - self.lengths
        lengths = self.lengths[order]
        fits = (lengths**2).cumsum(0) <= self.max_pairs
        fits[self.max_tokens :] = False
        kept = int(fits.sum())
        if kept < len(order):
            self._before = int(self.order[order[kept]])
        order, lengths = order[:kept], lengths[:kept]
        within = torch.arange(int(lengths.sum()), dtype=torch.int64, device="cpu")
        within -= (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        self.latents = self.latents[starts[order].repeat_interleave(lengths) + within]
        self.order, self.lengths, self._pairs = self.order[order], lengths, int((lengths**2).sum())

    def tensors(self) -> dict[str, Tensor]:
        """What `restore` takes."""
        before = [] if self._before is None else [self._before]
        return {
            "order": self.order,
            "lengths": self.lengths,
            "latents": self.latents,
            "before": torch.tensor(before, dtype=torch.int64, device="cpu"),
        }

    def restore(self, order: Tensor, lengths: Tensor, latents: Tensor, before: Tensor) -> None:
        self.order, self.lengths, self.latents = order, lengths, latents
        self._before = int(before[0]) if len(before) else None
        self._pairs = int((lengths**2).sum())

    def count(self, related: int) -> Together:
        """The ``related`` latents that fire most together with each."""
        self.cut()
        d_sae, n = self.d_sae, len(self.lengths)
        latents, tokens = self.latents.long(), torch.arange(n, device="cpu").repeat_interleave(self.lengths)
        fired = torch.bincount(latents, minlength=d_sae)
        found = torch.full((d_sae, related), -1, dtype=torch.int32, device="cpu")
        counts = torch.zeros(d_sae, related, dtype=torch.int64, device="cpu")
        starts = self.lengths.cumsum(0) - self.lengths
        by_latent = latents.sort(stable=True).indices
        # Pairs that latents up to each are in, by which they are parted into blocks.
        pairs = torch.zeros(d_sae, dtype=torch.int64, device="cpu").index_add_(0, latents, self.lengths[tokens])
        ends, entry_ends = pairs.cumsum(0), fired.cumsum(0)
        first = 0
        while first < d_sae:
            counted = int(ends[first - 1]) if first else 0
            after = int(torch.searchsorted(ends, counted + COUNTED, right=True))
            after = min(max(after, first + 1), d_sae)
            block = by_latent[int(entry_ends[first - 1]) if first else 0 : int(entry_ends[after - 1])]
            lengths = self.lengths[tokens[block]]
            within = torch.arange(int(lengths.sum()), dtype=torch.int64, device="cpu")
            within -= (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
            others = latents[starts[tokens[block]].repeat_interleave(lengths) + within]
            keys = latents[block].repeat_interleave(lengths) * d_sae + others
            keys, both = keys.unique(return_counts=True)
            one, other = keys // d_sae, keys % d_sae
            different = one != other
            one, other, both = one[different], other[different], both[different]
            share = both.double() / (fired[one] + fired[other] - both).double()
            order = share.sort(descending=True, stable=True).indices
            order = order[one[order].sort(stable=True).indices]
            one = one[order]
            rank = torch.arange(len(one), device="cpu") - torch.searchsorted(one, one)
            stays = rank < related
            at = (one[stays], rank[stays])
            found[at], counts[at] = other[order[stays]].int(), both[order[stays]]
            first = after
        return Together(found, counts, fired, n)
