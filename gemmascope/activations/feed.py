"""`Feed`: batches for the SAEs of a suite, superblock after superblock, in an order that two integers resume."""

import time
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..checks import check_int, check_number, check_type
from ..errors import EnvironmentProblemError
from ..sites import Site
from .order import check_seed, permutation
from .outliers import OUTLIER_RATIO, are_outliers
from .ring import Ring, Source, check_place
from .statistics import SiteStatistics

Batch = dict[Site, Tensor]


class Feed:
    """Batches {site: [batch_size, width]} of ``dtype`` on ``device``, the same tokens at every site.

    source: a `Harvester`, or an `ActivationStore` that holds what one would harvest. Of each superblock, all tokens are
    in a `Ring`; those that are kept come in the order of a permutation of (seed, superblock), ``batch_size`` at a time,
    and those left over at its end are not used. Thus a batch is a pure function of (seed, superblock, batch), and
    ``cursor`` is all that a resumed run needs, besides ``statistics`` and, to count on, ``counts`` and ``outliers_at``.

    drop_norm: leave out, at every site alike, tokens whose norm at one of them is above so many times the median norm
    there in superblock 0. Outliers are counted in any case, without it those above `OUTLIER_RATIO` times.

    ring_device: where the ring is, ``device`` or the CPU; by default ``device``. From a ring on the host a thread
    gathers the next batch into pinned memory and copies it on a stream of its own while a GPU works on the latest.
    prefetch: whether there is that thread, by default where it is of use; the batches are the same either way. With it
    one batch more is in memory than the caller holds.

    Raises ValueError and TypeError naming the argument; EnvironmentProblemError when the ring does not fit, for
    activations that are not finite, which are never trained on, and as the source does. The ring is filled with
    superblock 0 now, unless ``statistics`` are given.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        seed: int,
        dtype: torch.dtype,
        device: torch.device | str,
        drop_norm: float | None = None,
        ring_device: torch.device | str | None = None,
        statistics: Mapping[Site, SiteStatistics] | None = None,
        cursor: tuple[int, int] = (0, 0),
        counts: Mapping[str, int] | None = None,
        outliers_at: Mapping[Site, int] | None = None,
        prefetch: bool | None = None,
    ):
        check_int("batch_size", batch_size, 1)
        check_seed(seed)
        if drop_norm is not None:
            check_number("drop_norm", drop_norm, 1)
        self.cursor = _checked_cursor(cursor)
        """(superblock, batch) of the next batch."""
        self.device = check_place("device", device)
        place = self.device if ring_device is None else check_place("ring_device", ring_device)
        if place.type != "cpu" and place != self.device:
            raise ValueError(f"ring_device: expected {self.device} or cpu, got {place}")
        self._source, self._batch_size, self._seed = source, batch_size, seed
        self._drops = drop_norm is not None
        self._ratio = OUTLIER_RATIO if drop_norm is None else float(drop_norm)
        to_gpu = place.type == "cpu" and self.device.type == "cuda"
        self._prefetches = to_gpu if prefetch is None else prefetch
        self._ring = Ring(source.widths, source.capacity, dtype=dtype, device=place, pinned=to_gpu)
        self._copies = _Copies(self._ring, batch_size, self.device) if to_gpu else None
        self._block: int | None = None
        self._running: weakref.ref[Generator[Batch, None, None]] | None = None
        self.seconds = {"forward": 0.0, "gather": 0.0, "waiting": 0.0}
        """Of the caller's time so far: filling the ring; gathering batches; waiting for one that the thread gathers."""
        self.counts = _checked_counts(counts)
        """Tokens of the superblocks up to the latest batch: harvested, kept, outliers among them, left over."""
        self.outliers_at = dict.fromkeys(source.sites, 0) | dict(outliers_at or {})
        """Outliers by site; a token may be one at several."""
        if statistics is None:
            self._fill(0)
            self.statistics = self._measured()
        else:
            self.statistics = self._checked(statistics)
        """By site, of superblock 0."""

    @property
    def sites(self) -> tuple[Site, ...]:
        return self._source.sites

    @property
    def row(self) -> Tensor:
        """Of each token in the ring, the row of the text that it is in: int64 [n]."""
        return self._ring.row[: self._ring.n]

    @property
    def position(self) -> Tensor:
        """Where in that row it is, int32 [n]."""
        return self._ring.position[: self._ring.n]

    def batches(self) -> Generator[Batch, None, None]:
        """Batches from `cursor` on, without end; each is new memory. A second call ends the iterator of the first.

        When the iterator is closed or dropped its thread has ended.
        """
        self.close()
        batches = self._batches()
        self._running = weakref.ref(batches)
        return batches

    def close(self) -> None:
        """End the iterator that is running and its thread; another may follow."""
        running = self._running and self._running()
        if running is not None:
            running.close()

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    # ---- a superblock

    def _fill(self, block: int) -> None:
        if self._block == block:
            return
        self._block, began = None, time.monotonic()
        self._ring.fill(self._source, block)
        self._block = block
        self.seconds["forward"] += time.monotonic() - began

    def _outliers(self, medians: Mapping[Site, float]) -> dict[Site, Tensor]:
        """Which tokens of the ring are outliers at each site: bool [n] on the CPU."""
        norms = {site: norms[: self._ring.n] for site, norms in self._ring.norms.items()}
        return {site: are_outliers(norms[site], median, self._ratio).cpu() for site, median in medians.items()}

    def _kept(self, outliers: Mapping[Site, Tensor]) -> tuple[Tensor, Tensor]:
        """Which tokens of the ring are outliers at any site, and which are kept: bool [n]."""
        at_any = torch.stack(list(outliers.values())).any(0)
        return at_any, ~at_any if self._drops else torch.ones_like(at_any)

    def _measured(self) -> dict[Site, SiteStatistics]:
        ring = self._ring
        if ring.n == 0:
            raise ValueError(self._too_few(0, 0))
        norms = {site: norms[: ring.n] for site, norms in ring.norms.items()}
        _, kept = self._kept(self._outliers({site: norm.nanmedian().item() for site, norm in norms.items()}))
        return {
            site: SiteStatistics.measure(
                x[: ring.n],
                kept,
                outlier_ratio=self._ratio,
                norms=norms[site],
                device=self.device,
                name=str(site),
            )
            for site, x in ring.activations.items()
        }

    def _order(self, block: int) -> tuple[Tensor, dict[str, int], dict[Site, int]]:
        """The batches of the ring [n_batches, batch_size], which are rows of it, and what there is to count."""
        outliers = self._outliers({site: self.statistics[site].median_norm for site in self.sites})
        at_any, is_kept = self._kept(outliers)
        kept = is_kept.nonzero().flatten()
        n_batches, left = divmod(len(kept), self._batch_size)
        if n_batches == 0:
            raise ValueError(self._too_few(block, len(kept)))
        order = kept[permutation(len(kept), "batches", self._seed, block)]
        counts = {"harvested": self._ring.n, "kept": len(kept), "outliers": int(at_any.sum()), "unused": left}
        return (
            order[: n_batches * self._batch_size].view(n_batches, self._batch_size).to(self._ring.device),
            counts,
            {site: int(where.sum()) for site, where in outliers.items()},
        )

    def _too_few(self, block: int, kept: int) -> str:
        return (
            f"batch_size: expected at most the {kept} tokens kept of the {self._ring.n} of superblock {block}, got "
            f"{self._batch_size}; raise rows_per_block (ring_tokens)"
        )

    # ---- batches

    def _batches(self) -> Generator[Batch, None, None]:
        with ThreadPoolExecutor(1, "gather") if self._prefetches else nullcontext() as pool:
            while True:
                block, first = self.cursor
                self._fill(block)
                batches, counts, outliers_at = self._order(block)
                if first >= len(batches):
                    raise ValueError(
                        f"cursor: expected a batch from 0 to {len(batches) - 1} of superblock {block}, got {first}"
                    )
                for batch in self._gathered(pool, batches[first:]):
                    if self._copies is not None:
                        self._copies.hand_over(batch)
                    if self.cursor == (block, 0):
                        self._count(counts, outliers_at)
                    number = self.cursor[1] + 1
                    self.cursor = (block, number) if number < len(batches) else (block + 1, 0)
                    yield batch
                    del batch  # it would live until the next is there

    def _gathered(self, pool: ThreadPoolExecutor | None, batches: Tensor) -> Iterator[Batch]:
        if pool is None:
            for index in batches:
                began = time.monotonic()
                batch = self._gather(index)
                self.seconds["gather"] += time.monotonic() - began
                yield batch
                del batch
            return
        ahead: Future[Batch] | None = pool.submit(self._gather, batches[0])
        for following in (*batches[1:], None):
            assert ahead is not None
            began = time.monotonic()
            batch = ahead.result()
            self.seconds["waiting"] += time.monotonic() - began
            ahead = None if following is None else pool.submit(self._gather, following)
            yield batch
            del batch

    def _gather(self, index: Tensor) -> Batch:
        if self._copies is not None:
            return self._copies.gather(index)
        return {site: x.index_select(0, index) for site, x in self._ring.activations.items()}

    def _count(self, counts: Mapping[str, int], outliers_at: Mapping[Site, int]) -> None:
        for name, count in counts.items():
            self.counts[name] += count
        for site, count in outliers_at.items():
            self.outliers_at[site] += count

    def _checked(self, statistics: Mapping[Site, SiteStatistics]) -> dict[Site, SiteStatistics]:
        check_type("statistics", statistics, Mapping)
        for site in self.sites:
            if site not in statistics:
                raise ValueError(f"statistics: expected those of every site, found none of {site}")
            if (ratio := statistics[site].outlier_ratio) != self._ratio:
                raise ValueError(
                    f"statistics[{site}]: expected outliers above {self._ratio:g} times the median norm, got {ratio:g}"
                )
        return {site: statistics[site] for site in self.sites}


class _Copies:
    """Batches of a ring on the host, copied to a GPU."""

    def __init__(self, ring: Ring, batch_size: int, device: torch.device):
        self._ring, self._device = ring, device
        self._stream = torch.cuda.Stream(device)
        try:
            self._staging = {
                site: torch.empty(batch_size, x.shape[1], dtype=x.dtype, device="cpu", pin_memory=True)
                for site, x in ring.activations.items()
            }
        except RuntimeError as error:
            raise EnvironmentProblemError(
                f"ring: expected to pin a batch of {batch_size} tokens at {len(ring.sites)} sites, found {error}"
            ) from error

    def gather(self, index: Tensor) -> Batch:
        """The rows ``index`` of the ring; the copies have ended when it returns, so that it may be called again."""
        batch = {}
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            for site, x in self._ring.activations.items():
                torch.index_select(x, 0, index, out=self._staging[site])
                batch[site] = self._staging[site].to(self._device, non_blocking=True)
            self._stream.synchronize()
        return batch

    def hand_over(self, batch: Batch) -> None:
        """To the stream of the caller, until whose end its memory is not used again."""
        stream = torch.cuda.current_stream(self._device)
        for x in batch.values():
            x.record_stream(stream)


def _checked_cursor(cursor: Any) -> tuple[int, int]:
    if isinstance(cursor, str) or not isinstance(cursor, Sequence) or len(cursor) != 2:
        raise TypeError(f"cursor: expected (superblock, batch), got {cursor!r}")
    for name, number in zip(("superblock", "batch"), cursor, strict=True):
        check_int(f"cursor: {name}", number, 0)
    return cursor[0], cursor[1]


def _checked_counts(counts: Mapping[str, int] | None) -> dict[str, int]:
    names = ("harvested", "kept", "outliers", "unused")
    if counts is None:
        return dict.fromkeys(names, 0)
    if not isinstance(counts, Mapping) or set(counts) != set(names):
        raise ValueError(f"counts: expected {', '.join(names)}, got {counts!r}")
    return {name: counts[name] for name in names}
