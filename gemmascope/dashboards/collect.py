"""`Collector`: what a table says of activations, gathered from sparse codes as they stream by, in bounded memory."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_int, check_type
from ..errors import EnvironmentProblemError
from ..kernels import SparseCode
from .examples import Items, Slots, by_value
from .histogram import Histograms, exponents
from .strata import Strata, shuffled
from .table import Examples, Sizes, window_start
from .together import Together, TokenSample

# Entries that are worked on at once, but for those of one row.
ENTRIES = 1 << 21
# From here on the end of a histogram would be no number of fp32.
_TOO_LARGE = 2.0**127


class Found(NamedTuple):
    """As in `table.LatentTable`."""

    fired: Tensor
    total: Tensor
    largest: Tensor
    histogram: Tensor
    histogram_end: Tensor
    top: Examples
    strata: Examples
    stratum_cells: Tensor
    together: Together
    n_tokens: int


class Collector:
    """Of one SAE with ``d_sae`` latents, on rows of ``context`` tokens.

    What it holds does not grow with the number of tokens, and what it finds does not depend on how rows are parted into
    calls of `add`, to the bit. seed: of the samples. Raises TypeError and ValueError on sizes that are wrong.
    """

    def __init__(self, d_sae: int, context: int, sizes: Sizes, seed: int = 0):
        check_int("d_sae", d_sae, 1)
        check_type("sizes", sizes, Sizes)
        check_int("context", context, sizes.window)
        check_int("seed", seed, 0, 2**63 - 1)
        self.d_sae, self.context, self.sizes, self.seed = d_sae, context, sizes, seed
        self.fired = torch.zeros(d_sae, dtype=torch.int64, device="cpu")
        self.total = torch.zeros(d_sae, dtype=torch.float64, device="cpu")
        self.largest = torch.zeros(d_sae, dtype=torch.float32, device="cpu")
        self.histograms = Histograms(d_sae, sizes.bins)
        self.top = Slots(d_sae, sizes.top, sizes.window, by_value)
        self.strata = Strata(d_sae, sizes.strata, sizes.of_stratum, sizes.window, seed)
        self.sample = TokenSample(d_sae)
        self.n_tokens, self._next_row = 0, 0

    def add(self, code: SparseCode, counted: Tensor, first_row: int) -> None:
        """The codes, on the CPU, of the tokens of whole rows of text where ``counted`` [rows, context], row after row;
        the first of the rows has the number ``first_row``, which is that after the last row before.

        Raises ValueError for a code of other tokens and rows out of order; EnvironmentProblemError for activations that
        are not finite, not above 0 or 2¹²⁷ and more.
        """
        code.check()
        if code.d_sae != self.d_sae:
            raise ValueError(f"code: expected d_sae {self.d_sae}, got {code.d_sae}")
        if counted.dtype != torch.bool or counted.ndim != 2 or counted.shape[1] != self.context:
            raise ValueError(
                f"counted: expected bool [rows, {self.context}], got {counted.dtype} {list(counted.shape)}"
            )
        if (n := int(counted.sum())) != code.n_tokens:
            raise ValueError(f"code: expected the {n} tokens where counted, got {code.n_tokens}")
        if first_row != self._next_row:
            raise ValueError(f"first_row: expected {self._next_row}, the row after the last, got {first_row}")
        values = code.values.float()
        if not bool(((values > 0) & (values < _TOO_LARGE)).all()):  # NaN is neither
            raise EnvironmentProblemError(
                f"rows {first_row} to {first_row + len(counted) - 1}: expected finite activations above 0 and below "
                "2**127, found others"
            )
        for part, rows in _parts(code._replace(values=values), counted):
            self._add(part, counted[rows], first_row + rows.start)
        self.n_tokens += n
        self._next_row += len(counted)

    def _add(self, code: SparseCode, counted: Tensor, first_row: int) -> None:
        row, position = counted.nonzero(as_tuple=True)
        self.sample.add(code, shuffled(row + first_row, position, self.seed))
        latents, order = code.indices.long().sort(stable=True)
        token = (row * self.context + position)[code.token_indices()[order]]
        batch = _Batch(latents, token, code.values[order], self.context, first_row, self.sizes)
        ones = torch.ones_like(latents)
        self.fired.index_add_(0, latents, ones)
        self.total.index_add_(0, latents, batch.value.double())
        self._grow(batch)
        self.histograms.add(latents, batch.value)
        peaks, numbers = batch.peaks()
        keys = batch.keys()

        def windows(which: Tensor) -> Tensor:
            return batch.windows(numbers[which], keys)

        below = self.histograms.exponent[peaks.group] - exponents(peaks.value)
        self.strata.add(peaks, below, windows)
        self.top.merge(peaks, windows)

    def _grow(self, batch: "_Batch") -> None:
        """The largest activations, and all that depends on them."""
        had = self.largest > 0
        before = self.largest.clone()
        self.largest.scatter_reduce_(0, batch.latent, batch.value, "amax")
        grown = (self.largest > before).nonzero().squeeze(1)
        exponent = exponents(self.largest[grown])
        first = ~had[grown]
        self.histograms.exponent[grown[first]] = exponent[first]
        more = exponent > self.histograms.exponent[grown]
        grown, exponent = grown[more], exponent[more]
        self.strata.grow(grown, exponent - self.histograms.exponent[grown])
        self.histograms.grow(grown, exponent)

    def found(self) -> Found:
        """What was found so far. It is the collector's own memory, but for what is counted together."""
        shape = (self.d_sae, self.sizes.strata, self.sizes.of_stratum)
        held = self.strata.slots.held
        strata = Examples(*(part.view(*shape, *part.shape[2:]) for part in held))
        return Found(
            self.fired,
            self.total,
            self.largest,
            self.histograms.counts,
            self.histograms.end(self.fired > 0),
            self.top.held,
            strata,
            self.strata.cells,
            self.sample.count(self.sizes.related),
            self.n_tokens,
        )

    # ---- to be gone on with

    def tensors(self) -> dict[str, Tensor]:
        """All that it holds, by name: its own memory, for `restore` of a new one."""
        progress = torch.tensor([self.n_tokens, self._next_row], dtype=torch.int64, device="cpu")
        return self._fixed() | {"progress": progress} | {f"sample/{k}": x for k, x in self.sample.tensors().items()}

    def _fixed(self) -> dict[str, Tensor]:
        """What keeps its size."""
        return {
            "fired": self.fired,
            "total": self.total,
            "largest": self.largest,
            "histogram": self.histograms.counts,
            "exponent": self.histograms.exponent,
            "cells": self.strata.cells,
            **{f"top/{name}": part for name, part in self.top.held._asdict().items()},
            **{f"strata/{name}": part for name, part in self.strata.slots.held._asdict().items()},
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Be as the one whose `tensors` these are. Raises KeyError or RuntimeError for those of another size."""
        for name, held in self._fixed().items():
            held.copy_(tensors[name])
        self.n_tokens, self._next_row = tensors["progress"].tolist()
        self.sample.restore(**{name: tensors[f"sample/{name}"] for name in ("order", "lengths", "latents", "before")})

    @property
    def nbytes(self) -> int:
        """What it holds now."""
        return sum(tensor.nbytes for tensor in self.tensors().values())


def state_bytes(d_sae: int, sizes: Sizes) -> int:
    """What a `Collector` holds but for its `TokenSample`, at most."""
    examples = sizes.top + sizes.strata * sizes.of_stratum
    return d_sae * (28 + 8 * sizes.bins + 8 * sizes.strata + examples * (12 + 4 * sizes.window))


class _Batch(NamedTuple):
    """Entries of some rows, by latent, then token: latent and token [n] int64, the token counted from the beginning of
    the rows, value [n] fp32."""

    latent: Tensor
    token: Tensor
    value: Tensor
    context: int
    first_row: int
    sizes: Sizes

    def peaks(self) -> tuple[Items, Tensor]:
        """The largest entry of each latent in each cell, the first of equals, and their numbers among the entries."""
        n = len(self.latent)
        if not n:
            return Items(self.latent, self.token, self.token, self.value), self.token
        row, position = self.token // self.context, self.token % self.context
        cell = position // self.sizes.window
        new = torch.ones(n, dtype=torch.bool, device="cpu")
        same = (self.latent[1:] == self.latent[:-1]) & (row[1:] == row[:-1]) & (cell[1:] == cell[:-1])
        new[1:] = ~same
        segment = new.long().cumsum(0) - 1
        segments = int(segment[-1]) + 1
        most = torch.zeros(segments, dtype=torch.float32, device="cpu")
        most.scatter_reduce_(0, segment, self.value, "amax")
        largest = (self.value == most[segment]).nonzero().squeeze(1)
        of = segment[largest]
        first = torch.ones_like(of, dtype=torch.bool)
        first[1:] = of[1:] != of[:-1]
        numbers = largest[first]
        rows = row[numbers] + self.first_row
        return Items(self.latent[numbers], rows, position[numbers], self.value[numbers]), numbers

    @property
    def _stride(self) -> int:
        """More than any token, by a window."""
        return self.sizes.window + (int(self.token.max()) + 1 if len(self.token) else 1)

    def keys(self) -> Tensor:
        """int64 [n], ascending: each entry's place in the order of latents and tokens."""
        return self.latent * self._stride + self.token

    def windows(self, numbers: Tensor, keys: Tensor) -> Tensor:
        """fp32 [n, window]: the activations around the entries ``numbers`` [n]. keys: `keys`."""
        latent, token, window = self.latent[numbers], self.token[numbers], self.sizes.window
        start = token - token % self.context + window_start(token % self.context, self.context, self.sizes)
        low = latent * self._stride + start
        begin, end = torch.searchsorted(keys, low), torch.searchsorted(keys, low + window)
        counts = end - begin
        within = torch.arange(int(counts.sum()), dtype=torch.int64, device="cpu")
        within -= (counts.cumsum(0) - counts).repeat_interleave(counts)
        entries = begin.repeat_interleave(counts) + within
        found = torch.zeros(len(numbers), window, dtype=torch.float32, device="cpu")
        which = torch.arange(len(numbers), dtype=torch.int64, device="cpu").repeat_interleave(counts)
        found[which, self.token[entries] - start[which]] = self.value[entries]
        return found


def _parts(code: SparseCode, counted: Tensor) -> Iterator[tuple[SparseCode, slice]]:
    """The code in pieces of whole rows, of at most `ENTRIES` entries, but of one row at least."""
    tokens = counted.sum(1).cumsum(0)
    ends = code.offsets[tokens]  # of the entries of each row
    row = 0
    while row < len(counted):
        done, token = (int(ends[row - 1]), int(tokens[row - 1])) if row else (0, 0)
        after = max(row + 1, int(torch.searchsorted(ends, done + ENTRIES, right=True)))
        last = int(ends[after - 1])
        offsets = code.offsets[token : int(tokens[after - 1]) + 1] - done
        yield SparseCode(code.values[done:last], code.indices[done:last], offsets, code.d_sae), slice(row, after)
        row = after
