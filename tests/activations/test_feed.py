"""Batches are a function of (seed, superblock, batch): those of a plain loop, streamed, from a store and resumed."""

import gc
import hashlib
import itertools
import math
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch

from gemmascope.activations import ActivationStore, Feed, Harvester, SiteStatistics, harvest_to_store
from gemmascope.errors import EnvironmentProblemError
from gemmascope.sites import Capture, Site
from tests.activations.superblocks import FakeRows, FakeSource
from tests.tiny_models import BOS, EOS, PAD, gemma2, gemma3

SITES = [Site(0, "att"), Site(1, "mlp"), Site(1, "resid")]


def feed_of(source, **settings):
    return Feed(source, **({"batch_size": 8, "seed": 5, "dtype": torch.float32, "device": "cpu"} | settings))


def first(feed, n):
    batches = feed.batches()
    taken = list(itertools.islice(batches, n))
    feed.close()
    return taken


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert list(batch) == list(other)
        assert all(torch.equal(batch[site], other[site]) for site in batch)


def permutation(n, *key):
    seed = int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest()[:8], "little")
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def plain_loop(model, rows, sites, n_batches, *, seed, rows_per_block, forward_rows, batch_size, dtype, drop_norm):
    """All of it written out: whole forwards, everything in memory."""
    epochs = [permutation(rows.n_train, "rows", seed, epoch) for epoch in range(9)]
    endless, batches, medians = torch.cat(epochs), [], {}
    for block in itertools.count():
        ids = rows.ids[endless[block * rows_per_block : (block + 1) * rows_per_block]]
        x = {site: [] for site in sites}
        for some in ids.split(forward_rows):
            with torch.no_grad(), Capture(model, sites) as capture:
                model(some, use_cache=False)
            for site in sites:
                x[site].append(capture[site][(some != BOS) & (some != EOS) & (some != PAD)])
        x = {site: torch.cat(parts).to(dtype) for site, parts in x.items()}
        norms = {site: torch.linalg.vector_norm(x[site].float(), dim=1) for site in sites}
        medians = medians or {site: norms[site].median().item() for site in sites}
        kept = torch.ones(len(x[sites[0]]), dtype=torch.bool)
        for site in sites if drop_norm else ():
            kept &= norms[site] <= drop_norm * medians[site]
        x = {site: x[site][kept] for site in sites}
        order = permutation(int(kept.sum()), "batches", seed, block)
        for picked in order.split(batch_size):
            if len(picked) == batch_size:
                batches.append({site: x[site][picked] for site in sites})
            if len(batches) == n_batches:
                return batches


@pytest.mark.parametrize("make", [gemma2, gemma3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("drop_norm", [None, 1.3], ids=["all", "dropped"])
def test_streaming_equals_a_store_equals_a_plain_loop(make, dtype, drop_norm, tmp_path):
    model, rows, n = make(), FakeRows(), 14
    settings = {"seed": 2**63 - 1, "rows_per_block": 4, "forward_rows": 3}
    batching = {"seed": 2**63 - 1, "batch_size": 8, "dtype": dtype, "drop_norm": drop_norm}
    expected = plain_loop(model, rows, SITES, n, **settings | batching)
    harvester = Harvester(model, rows, SITES, **settings)
    streamed = feed_of(harvester, **batching)
    assert_same(first(streamed, n), expected)
    harvest_to_store(harvester, tmp_path / "store", blocks=7, dtype=dtype)
    store = ActivationStore.open(tmp_path / "store", harvester.identity)
    stored = feed_of(store, **batching)
    assert_same(first(stored, n), expected)
    assert store.content == harvester.content
    assert stored.counts == streamed.counts
    assert stored.outliers_at == streamed.outliers_at
    assert (streamed.counts["outliers"] > 0) == (drop_norm is not None)
    for site in SITES:
        assert stored.statistics[site].facts() == streamed.statistics[site].facts()
        assert torch.equal(stored.statistics[site].mean, streamed.statistics[site].mean)


@pytest.mark.parametrize("prefetch", [False, True])
def test_every_kept_token_once_and_the_same_at_every_site(prefetch):
    source = FakeSource(40, scale={3: 100, 17: 50})
    feed = feed_of(source, drop_norm=3.0, batch_size=9, prefetch=prefetch)
    batches = first(feed, 8)
    for block in (0, 1):
        places = []
        for batch in batches[4 * block : 4 * block + 4]:
            at = {
                site: [(source.x(block, site) == row).all(1).nonzero().item() for row in x] for site, x in batch.items()
            }
            assert at[source.sites[0]] == at[source.sites[1]]
            places += at[source.sites[0]]
        assert len(set(places)) == 36
        assert not {3, 17} & set(places)
    assert places != sorted(places)


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("start", range(9))
def test_resumes_at_any_batch(prefetch, start):
    whole = feed_of(FakeSource(45, scale={3: 100}), prefetch=prefetch, drop_norm=10.0)
    expected, cursors, counts = [], [whole.cursor], [(dict(whole.counts), dict(whole.outliers_at))]
    for batch in itertools.islice(whole.batches(), 10):
        expected.append(batch)
        cursors.append(whole.cursor)
        counts.append((dict(whole.counts), dict(whole.outliers_at)))
    assert cursors[:6] == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0)]
    source = FakeSource(45, scale={3: 100})
    resumed = feed_of(
        source,
        prefetch=prefetch,
        drop_norm=10.0,
        cursor=cursors[start],
        statistics=whole.statistics,
        counts=counts[start][0],
        outliers_at=counts[start][1],
    )
    assert source.filled == []
    assert_same(first(resumed, 10 - start), expected[start:])
    assert resumed.cursor == whole.cursor
    assert resumed.counts == whole.counts
    assert resumed.outliers_at == whole.outliers_at


def test_without_statistics_a_resumed_run_measures_superblock_0_again():
    source = FakeSource()
    expected = first(feed_of(source), 12)
    source.filled = []
    feed = feed_of(source, cursor=(2, 1))
    assert_same(first(feed, 1), expected[11:])
    assert source.filled == [0, 2]


def test_superblock_0_is_harvested_once():
    source = FakeSource()
    first(feed_of(source), 6)
    assert source.filled == [0, 1]


@pytest.mark.parametrize("prefetch", [False, True])
def test_batches_are_new_memory(prefetch):
    feed = feed_of(FakeSource(), prefetch=prefetch)
    taken, copies = [], []
    for batch in itertools.islice(feed.batches(), 11):
        taken.append(batch)
        copies.append({site: x.clone() for site, x in batch.items()})
    assert_same(taken, copies)


def test_seeds_and_superblocks_have_orders_of_their_own():
    def order(seed, block):
        feed = feed_of(FakeSource(widths={Site(0, "resid"): 1}), batch_size=40, seed=seed, cursor=(block, 0))
        [batch] = first(feed, 1)
        return tuple(batch[Site(0, "resid")].flatten().argsort(stable=True).argsort(stable=True).tolist())

    seeds = (0, 1, 2**32, 2**63 - 1)
    assert len({order(seed, 0) for seed in seeds}) == len(seeds)
    assert len({order(0, block) for block in range(3)}) == 3


def test_counts_and_statistics():
    source = FakeSource(45, scale={4: 1000, 9: 2000})
    counted = feed_of(source, batch_size=10)
    assert counted.counts == {"harvested": 0, "kept": 0, "outliers": 0, "unused": 0}
    first(counted, 1)
    assert counted.counts == {"harvested": 45, "kept": 45, "outliers": 2, "unused": 5}
    assert counted.outliers_at == {site: 2 for site in source.sites}
    dropped = feed_of(source, batch_size=10, drop_norm=20.0)
    first(dropped, 5)
    assert dropped.counts == {"harvested": 90, "kept": 86, "outliers": 4, "unused": 6}
    for site in source.sites:
        x = source.x(0, site)
        kept = torch.tensor([token not in (4, 9) for token in range(45)])
        assert counted.statistics[site].tokens == 45
        assert dropped.statistics[site].tokens == 43
        for feed, ratio, of in ((counted, 5.0, x), (dropped, 20.0, x[kept])):
            measured = feed.statistics[site]
            assert measured.outlier_ratio == ratio
            assert measured.outliers == 2
            torch.testing.assert_close(measured.mean, of.double().mean(0))
            assert measured.variance == pytest.approx(of.double().var(0, correction=0).sum().item())
            assert measured.top_variance_share == dropped.statistics[site].top_variance_share


def test_an_outlier_at_one_site_is_left_out_at_all():
    class OneSite(FakeSource):
        def x(self, block, site):
            x = super().x(block, site)
            if site == self.sites[1]:
                x[7] *= 1000
            return x

    source = OneSite()
    feed = feed_of(source, batch_size=39, drop_norm=50.0)
    [batch] = first(feed, 1)
    assert feed.outliers_at == {source.sites[0]: 0, source.sites[1]: 1}
    for site, x in batch.items():
        kept = torch.cat([source.x(0, site)[:7], source.x(0, site)[8:]])
        assert torch.equal(x.sum(1).sort().values, kept.sum(1).sort().values)
        assert feed.statistics[site].tokens == 39


def test_which_token_a_row_of_the_ring_is():
    feed = feed_of(FakeSource(40))
    batches = feed.batches()
    for _ in range(6):
        next(batches)
    assert torch.equal(feed.row, torch.arange(40) + 40)
    assert torch.equal(feed.position, (torch.arange(40) % 7).int())


@pytest.mark.parametrize("drop_norm", [None, 3.0])
def test_fewer_tokens_than_a_batch(drop_norm):
    source = FakeSource(40, scale={3: 1000})
    with pytest.raises(
        ValueError,
        match=r"batch_size: expected at most the (40|39) tokens kept of the 40 of superblock 0, got 41; raise "
        r"rows_per_block \(ring_tokens\)",
    ):
        next(feed_of(source, batch_size=41, drop_norm=drop_norm).batches())
    with pytest.raises(ValueError, match=r"expected at most the 0 tokens kept of the 0 of superblock 0"):
        feed_of(FakeSource(0))


@pytest.mark.parametrize("prefetch", [False, True])
def test_activations_that_are_not_finite_are_never_trained_on(prefetch):
    class Breaking(FakeSource):
        def x(self, block, site):
            x = super().x(block, site)
            if block == 1:
                x[7, 0] = math.nan
            return x

    feed = feed_of(Breaking(), prefetch=prefetch)
    batches = feed.batches()
    for _ in range(5):
        next(batches)
    with pytest.raises(EnvironmentProblemError, match=r"site layer_0/resid: .* of superblock 1: row 47 position 0;"):
        next(batches)
    assert feed.cursor == (1, 0)
    assert gather_threads() == []


# ---- the thread


def gather_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("gather")]


def test_one_batch_ahead_and_no_more(monkeypatch):
    feed = feed_of(FakeSource(), prefetch=True)
    gathered = []
    gather = feed._gather
    monkeypatch.setattr(feed, "_gather", lambda index: (gathered.append(threading.current_thread()), gather(index))[1])
    batches = feed.batches()
    for n in range(1, 5):
        next(batches)
        deadline = time.monotonic() + 10
        while len(gathered) < n + 1 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert len(gathered) == n + 1
    next(batches)
    assert len(gathered) == 5  # the ring is filled anew before more can be gathered
    assert threading.main_thread() not in gathered
    feed.close()


def test_what_goes_wrong_in_the_thread_is_raised_where_the_batch_is_asked_for(monkeypatch):
    feed = feed_of(FakeSource(), prefetch=True)
    gather, calls = feed._gather, itertools.count()

    def failing(index):
        if next(calls) == 2:
            raise MemoryError("no room")
        return gather(index)

    monkeypatch.setattr(feed, "_gather", failing)
    expected = first(feed_of(FakeSource()), 4)
    batches = feed.batches()
    taken = [next(batches), next(batches)]
    with pytest.raises(MemoryError, match="no room"):
        next(batches)
    assert gather_threads() == []
    assert feed.cursor == (0, 2)
    assert_same(taken + first(feed, 2), expected)


@pytest.mark.parametrize("how", ["close the feed", "close the iterator", "drop it", "leave the block", "start another"])
def test_the_thread_ends_with_the_iterator(how):
    feed = feed_of(FakeSource(), prefetch=True)
    with feed:
        batches = feed.batches()
        next(batches)
        assert len(gather_threads()) == 1
        if how == "close the feed":
            feed.close()
        elif how == "close the iterator":
            batches.close()
        elif how == "drop it":
            del batches
            gc.collect()
        elif how == "start another":
            another = feed.batches()
            with pytest.raises(StopIteration):
                next(batches)
            next(another)
            assert feed.cursor == (0, 2)
            assert len(gather_threads()) == 1
            another.close()
    assert gather_threads() == []


@pytest.mark.parametrize(("prefetch", "ahead"), [(False, 0), (True, 1)])
def test_no_batch_is_kept(prefetch, ahead, monkeypatch):
    feed = feed_of(FakeSource(), prefetch=prefetch)
    gather, references, alive = feed._gather, [], []

    def counting(index):
        alive.append(sum(reference() is not None for reference in references))
        batch = gather(index)
        references.extend(weakref.ref(x) for x in batch.values())
        return batch

    monkeypatch.setattr(feed, "_gather", counting)
    batches = feed.batches()
    for _ in range(12):
        next(batches)
    assert max(alive) <= ahead * len(feed.sites)
    assert len(references) >= 24
    feed.close()


@pytest.mark.parametrize("prefetch", [False, True])
def test_seconds(prefetch, monkeypatch):
    spent, not_spent = ("waiting", "gather") if prefetch else ("gather", "waiting")
    feed = feed_of(FakeSource(), prefetch=prefetch)
    gather = feed._gather
    monkeypatch.setattr(feed, "_gather", lambda index: (time.sleep(0.02), gather(index))[1])
    assert feed.seconds["forward"] > 0
    first(feed, 3)
    assert feed.seconds[spent] > 0
    assert feed.seconds[not_spent] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("ring_device", ["cuda", "cpu"])
@pytest.mark.parametrize("prefetch", [None, False])
def test_batches_on_a_gpu(ring_device, prefetch):
    expected = first(feed_of(FakeSource(4000), batch_size=300, drop_norm=3.0), 30)
    feed = feed_of(
        FakeSource(4000), batch_size=300, drop_norm=3.0, device="cuda", ring_device=ring_device, prefetch=prefetch
    )
    taken = first(feed, 30)
    assert all(x.is_cuda for batch in taken for x in batch.values())
    assert_same([{site: x.cpu() for site, x in batch.items()} for batch in taken], expected)


@pytest.mark.gpu
@pytest.mark.parametrize("ring_device", ["cuda", "cpu"])
def test_a_model_on_a_gpu(ring_device):
    model, rows = gemma2().cuda(), FakeRows()
    settings = {"seed": 3, "rows_per_block": 4, "forward_rows": 3}
    feed = feed_of(Harvester(model, rows, SITES, **settings), device="cuda", ring_device=ring_device)
    again = feed_of(Harvester(model, rows, SITES, **settings), device="cuda")
    assert_same(first(feed, 9), first(again, 9))


# ---- arguments


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"batch_size": 0}, ValueError, "batch_size: expected at least 1, got 0"),
        ({"seed": -1}, ValueError, "seed: expected at least 0, got -1"),
        ({"seed": 2**63}, ValueError, "seed: expected at most 9223372036854775807"),
        ({"dtype": torch.float16}, ValueError, "dtype: expected torch.bfloat16 or torch.float32, got torch.float16"),
        ({"drop_norm": 0.9}, ValueError, "drop_norm: expected a finite number ≥ 1, got 0.9"),
        ({"drop_norm": math.nan}, ValueError, "drop_norm: expected a finite number ≥ 1, got nan"),
        ({"device": "meta"}, ValueError, "device: expected the CPU or a GPU, got meta"),
        ({"ring_device": "meta"}, ValueError, "ring_device: expected the CPU or a GPU, got meta"),
        ({"cursor": (0, -1)}, ValueError, "cursor: batch: expected at least 0, got -1"),
        ({"cursor": (True, 0)}, TypeError, "cursor: superblock: expected an int, got bool"),
        ({"cursor": 3}, TypeError, r"cursor: expected \(superblock, batch\), got 3"),
        ({"statistics": {}}, ValueError, "statistics: expected those of every site, found none of layer_0/resid"),
        ({"counts": {"kept": 3}}, ValueError, "counts: expected harvested, kept, outliers, unused, got"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wrong_arguments(settings, error, match):
    with pytest.raises(error, match=match):
        feed_of(FakeSource(), **settings)


def test_statistics_of_another_ratio():
    statistics = {site: SiteStatistics.measure(FakeSource().x(0, site)) for site in FakeSource().sites}
    feed_of(FakeSource(), statistics=statistics)
    with pytest.raises(ValueError, match=r"statistics\[layer_0/resid\]: expected outliers above 3 times .*, got 5"):
        feed_of(FakeSource(), statistics=statistics, drop_norm=3.0)


def test_a_cursor_beyond_the_superblock():
    with pytest.raises(ValueError, match="cursor: expected a batch from 0 to 4 of superblock 1, got 5"):
        next(feed_of(FakeSource(), cursor=(1, 5)).batches())


# ---- memory

TEN_TIMES = """
import resource, sys
import torch
from gemmascope.activations import Feed, Harvester
from gemmascope.sites import all_sites
from tests.activations.superblocks import FakeRows
from tests.tiny_models import gemma2

torch.set_num_threads(1)
model, rows = gemma2(), FakeRows(n_train=512, context=65)
source = Harvester(model, rows, all_sites(model), seed=0, rows_per_block=128, forward_rows=32)
feed = Feed(source, batch_size=4000, seed=0, dtype=torch.float32, device="cpu", prefetch=sys.argv[1] == "thread")
peaks = {}
for batch in feed.batches():
    peaks.setdefault(feed.cursor[0], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    if feed.cursor[0] == 20:
        break
feed.close()
print(peaks[2], peaks[20], sum(x.nbytes for x in batch.values()), feed.counts["harvested"])
"""


def test_memory_does_not_grow_with_the_superblocks():
    ran = subprocess.run([sys.executable, "-c", TEN_TIMES, "thread"], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    after_2, after_20, batch_bytes, harvested = map(int, ran.stdout.split())
    assert harvested > 20 * 8_000
    assert 18 * batch_bytes > 0.06 * after_2 * 1024  # had one batch of each been held, it would show
    assert after_20 <= 1.03 * after_2
