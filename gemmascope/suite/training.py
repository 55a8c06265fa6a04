"""The loop of `gemmascope train`: batches of activations, a step of every SAE, checkpoints."""

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..activations import ActivationStore, Feed, Harvester, SiteStatistics, warnings_for
from ..errors import BadFileError, TrainingFailedError
from ..formats.files import shown
from ..reporting.log import TrainLog
from ..reporting.progress import StageProgress, SuiteProgress
from ..reporting.results import TRAIN_LOG
from ..reporting.trackers import open_trackers
from ..sites import Site
from ..training import Suite
from ..training.checkpoint import Checkpoint, Checkpoints
from ..training.saturation import History, saturated
from .config import SuiteConfig
from .memory import DEVICE
from .plan import Plan
from .prepare import Prepared, say
from .stopping import Stop, Stopped

CHECKPOINTS = "checkpoints"
STATISTICS = "statistics"


class Trained:
    """The SAEs of a run at a step, and what else goes into a checkpoint."""

    def __init__(self, prepared: Prepared, statistics: Mapping[Site, SiteStatistics], found: Checkpoint | None):
        self.statistics = dict(statistics)
        config = prepared.config
        self.suite = Suite(
            prepared.specs, self.statistics, model_name=prepared.name, impl=config.run.impl, device=prepared.device
        )
        self.step = 0
        self.cursor: tuple[int, int] = (0, 0)
        """Of the batch after the last one that was trained on."""
        self.counts: dict[str, int] | None = None
        self.outliers_at: dict[Site, int] | None = None
        self.warnings: list[str] = []
        self.seconds: dict[str, float] = {}
        if found is not None:
            self._restore(found)

    @property
    def median_norms(self) -> dict[Site, float]:
        return {site: each.median_norm for site, each in self.statistics.items()}

    @property
    def facts(self) -> dict[str, Any]:
        """What the run says of the training once it is over."""
        return {
            "steps": self.step,
            "parked": self.suite.parked,
            "warnings": self.warnings,
            "statistics": {str(site): each.facts() | {"gamma": each.gamma} for site, each in self.statistics.items()},
            "counts": self.counts,
            "outliers_at": {str(site): count for site, count in (self.outliers_at or {}).items()},
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
        }

    def save(self, checkpoints: Checkpoints, wait: bool = False) -> None:
        parts, facts = self.suite.snapshot()
        part_of = {name: f"sae-{number:04}" for number, name in enumerate(parts)}
        means = {str(site): each.mean for site, each in self.statistics.items()}
        checkpoints.save(
            self.step,
            {part_of[name]: tensors for name, tensors in parts.items()} | {STATISTICS: means},
            {
                "cursor": list(self.cursor),
                "parts": part_of,
                "suite": facts,
                "statistics": {str(site): each.facts() for site, each in self.statistics.items()},
                "counts": self.counts,
                "outliers_at": {str(site): count for site, count in (self.outliers_at or {}).items()},
                "warnings": self.warnings,
                "seconds": self.seconds,
            },
            wait=wait,
        )

    def _restore(self, found: Checkpoint) -> None:
        facts = found.facts
        self.suite.restore({name: found.part(part) for name, part in facts["parts"].items()}, facts["suite"])
        self.step, self.cursor = found.step, (facts["cursor"][0], facts["cursor"][1])
        self.counts, self.warnings, self.seconds = facts["counts"], facts["warnings"], facts["seconds"]
        self.outliers_at = {Site.parse(name): count for name, count in facts["outliers_at"].items()}


def statistics_of(found: Checkpoint) -> dict[Site, SiteStatistics]:
    means = found.part(STATISTICS)
    return {
        Site.parse(name): SiteStatistics.from_facts(facts, means[name])
        for name, facts in found.facts["statistics"].items()
    }


def restored(prepared: Prepared, folder: Path) -> Trained:
    """The SAEs of the newest checkpoint. Raises BadFileError when there is none."""
    with Checkpoints(folder / CHECKPOINTS, keep=prepared.config.checkpoint.keep, identity={}) as checkpoints:
        found = checkpoints.latest()
    if found is None:
        raise BadFileError(f"{folder / CHECKPOINTS}: expected the checkpoint of the finished training, found none")
    return Trained(prepared, statistics_of(found), found)


def train(prepared: Prepared, plan: Plan, folder: Path, stop: Stop, store: str | os.PathLike | None) -> Trained:
    """Train to the last step, from the newest checkpoint if there is one.

    Raises `Stopped`, with a checkpoint written, when that was asked for.
    """
    config = prepared.config
    with (
        Checkpoints(folder / CHECKPOINTS, keep=config.checkpoint.keep, identity=prepared.identity) as checkpoints,
        contextlib.ExitStack() as opened,
    ):
        found = checkpoints.latest()
        options: dict[str, Any] = {}
        if found is not None:
            say(f"training: goes on from step {found.step:,}")
            options = {
                "statistics": statistics_of(found),
                "cursor": tuple(found.facts["cursor"]),
                "counts": found.facts["counts"],
                "outliers_at": {Site.parse(name): count for name, count in found.facts["outliers_at"].items()},
            }
        harvester = prepared.harvester()
        source = harvester if store is None else _opened(store, harvester, config)
        filling = StageProgress("Activations", config.rows_per_block, "tok", config.text.context)
        harvester.progress = filling.update
        with filling:
            feed = opened.enter_context(
                Feed(
                    source,
                    batch_size=config.suite.batch_size,
                    seed=config.suite.seed,
                    dtype=getattr(torch, config.activations.dtype),
                    device=prepared.device,
                    drop_norm=config.activations.drop_norm,
                    ring_device=prepared.device if plan.ring == DEVICE else "cpu",
                    **options,
                )
            )
        trained = Trained(prepared, feed.statistics, found)
        opened.callback(trained.suite.close)
        loop = _Loop(prepared, trained, feed, checkpoints, folder)
        harvester.progress = loop.show
        opened.callback(loop.close)
        if found is None:
            scales = {spec.config.scale_by for spec in prepared.specs}
            for line in warnings_for(
                feed.statistics,
                drop_norm=config.activations.drop_norm,
                scale_by="mean_square" if "mean_square" in scales else "variance",
            ):
                loop.warn(line)
        try:
            loop.run(stop)
        except TrainingFailedError as error:
            raise TrainingFailedError(
                f"{error}; the same command tries again from the last checkpoint, another config begins with --fresh"
            ) from error
        return trained


def _opened(store: str | os.PathLike, harvester: Harvester, config: SuiteConfig) -> ActivationStore:
    """Raises ValueError for one that ends before the training does."""
    found = ActivationStore.open(store, harvester.identity)
    steps = sum(shard.tokens // config.suite.batch_size for shard in found.shards)
    if steps < config.steps:
        raise ValueError(
            f"store: expected activations for {config.steps} steps, found some for at most {steps} in "
            f"{shown(found.folder)}; harvest again, with this config"
        )
    return found


class _Loop:
    """Steps, and what is told, logged and saved on the way."""

    def __init__(self, prepared: Prepared, trained: Trained, feed: Feed, checkpoints: Checkpoints, folder: Path):
        self.config, self.trained, self.feed, self.checkpoints = prepared.config, trained, feed, checkpoints
        self.seconds = {"steps": 0.0}
        self._before = dict(trained.seconds)
        self._history = {spec.name: History() for spec in prepared.specs}
        self._told: set[str] = set()
        self.sites = {spec.name: spec.site for spec in prepared.specs}
        self._bar = SuiteProgress("SAEs", self.config.steps, list(self.sites), "tok", self.config.suite.batch_size)
        self.log = TrainLog(folder / TRAIN_LOG, self.sites, step=trained.step)
        self.trackers = open_trackers(
            self.config.run.trackers,
            run_name=folder.name,
            folder=folder,
            config=self.config.to_dict(),
            run_id=prepared.run_id,
        )

    def close(self) -> None:
        self.log.close()
        self.trackers.finish()

    def run(self, stop: Stop) -> None:
        config, trained = self.config, self.trained
        saved_at, saved_step = time.monotonic(), trained.step
        batches = self.feed.batches()
        try:
            with self._bar as bar:
                bar.update(trained.step)
                while trained.step < config.steps and trained.suite.active:
                    batch = next(batches)
                    with stop.held():
                        rows = self.step(batch)
                        del batch
                        bar.update(trained.step, rows, shares=self.shares(), parked=trained.suite.parked)
                        self.checkpoints.poll()
                        if self._is_due(trained.step - saved_step, time.monotonic() - saved_at):
                            self.save()
                            saved_at, saved_step = time.monotonic(), trained.step
                    stop.check()
        except Stopped:
            if trained.step:
                self.save(wait=True)
                say(f"training: saved at step {trained.step:,}")
            raise
        with stop.held():
            self.save(wait=True)

    def show(self, rows: int) -> None:
        """Time goes on while the model runs."""
        self._bar.update(self.trained.step, shares=self.shares())

    def _is_due(self, steps: int, seconds: float) -> bool:
        every = self.config.checkpoint
        return seconds >= 60 * every.minutes if every.steps is None else steps >= every.steps

    def step(self, batch: Mapping[Site, Tensor]) -> dict[str, dict[str, float]] | None:
        """A step of every SAE; its figures when they are due."""
        trained, began, rows = self.trained, time.monotonic(), None
        trained.suite.update(batch)
        trained.step, trained.cursor = trained.step + 1, self.feed.cursor
        trained.counts, trained.outliers_at = dict(self.feed.counts), dict(self.feed.outliers_at)
        if trained.step % self.config.run.log_every == 0 or trained.step == self.config.steps:
            rows = trained.suite.report()
        self.seconds["steps"] += time.monotonic() - began
        if rows is not None:
            self.tell(rows)
        return rows

    def tell(self, rows: dict[str, dict[str, float]]) -> None:
        step = self.trained.step
        self.log.append(step, rows)
        self.trackers.log(step, {f"{name}/{key}": value for name, row in rows.items() for key, value in row.items()})
        for name, row in rows.items():
            history = self._history[name]
            history.add({"step": step, **row})
            if name not in self._told and (why := saturated(history.rows)):
                self._told.add(name)
                self.warn(f"{name}: {why}")

    def warn(self, message: str) -> None:
        self.trained.warnings.append(message)
        say(f"warning: {message}")

    def so_far(self) -> dict[str, float]:
        """Seconds of the whole run by what took them."""
        now = self.feed.seconds | self.seconds | {"checkpoint": self.checkpoints.seconds}
        return {name: self._before.get(name, 0.0) + value for name, value in now.items()}

    def shares(self) -> dict[str, float]:
        seconds = self.so_far()
        total = sum(seconds.values())
        return {name: value / total for name, value in seconds.items()} if total else {}

    def save(self, wait: bool = False) -> None:
        self.log.sync()
        self.trained.seconds = self.so_far()
        self.trained.save(self.checkpoints, wait)
