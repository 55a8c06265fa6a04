"""Experiment trackers beside the log of a run: trackio, Weights & Biases, TensorBoard.

They are other people's programs, with networks, quotas and processes of their own. Each therefore works in a thread of
its own, behind a queue that training never waits for. One that fails or hangs is let go with one warning.
"""

import hashlib
import importlib
import os
import queue
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..checks import check_number, check_type
from ..formats.files import as_path

PROJECT = "gemmascope"
# Rows that wait for a tracker before it counts as hanging, and the longest that the end of a run waits for all of them.
MOST_WAITING = 1000
FINISH_SECONDS = 30.0


class Tracker(Protocol):
    """What a tracker's package is used for."""

    def log(self, step: int, metrics: dict[str, float]) -> None: ...
    def finish(self) -> None: ...


@dataclass(frozen=True)
class RunFacts:
    """What a tracker is told of a run when it starts."""

    name: str
    id: str
    folder: Path
    config: dict[str, Any]


class _WithRun:
    """trackio and wandb, whose runs have the same two methods."""

    def __init__(self, run: Any):
        self.run = run

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.run.log(metrics, step=step)

    def finish(self) -> None:
        self.run.finish()


def _trackio(package: Any, run: RunFacts) -> Tracker:
    return _WithRun(package.init(project=PROJECT, name=run.name, config=run.config, resume="allow"))


def _wandb(package: Any, run: RunFacts) -> Tracker:
    return _WithRun(
        package.init(project=PROJECT, name=run.name, id=run.id, dir=str(run.folder), config=run.config, resume="allow")
    )


class _TensorBoard:
    def __init__(self, package: Any, run: RunFacts):
        self.writer = package.SummaryWriter(log_dir=str(run.folder / "tensorboard"))
        self.writer.add_text("config", "\n".join(f"    {key} = {value}" for key, value in run.config.items()))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for key, value in metrics.items():
            self.writer.add_scalar(key, value, step)

    def finish(self) -> None:
        self.writer.close()


# The module to import, the package to install, and what starts it.
TRACKERS: dict[str, tuple[str, str, Callable[[Any, RunFacts], Tracker]]] = {
    "trackio": ("trackio", "trackio", _trackio),
    "wandb": ("wandb", "wandb", _wandb),
    "tensorboard": ("torch.utils.tensorboard", "tensorboard", _TensorBoard),
}

_END = object()


class _Worker:
    """A tracker in its thread. ``problem``: why it is to be let go, None as long as it works."""

    def __init__(self, name: str, start: Callable[[], Tracker]):
        self.name = name
        self.problem: str | None = None
        self._queue: queue.Queue[Any] = queue.Queue(MOST_WAITING)
        # A daemon: one that hangs does not keep the process from ending.
        self._thread = threading.Thread(target=self._work, args=(start,), name=f"tracker {name}", daemon=True)
        self._thread.start()

    def _work(self, start: Callable[[], Tracker]) -> None:
        try:
            tracker = start()
            while (item := self._queue.get()) is not _END:
                step, metrics = item
                tracker.log(int(step), {key: float(value) for key, value in metrics.items() if value is not None})
            tracker.finish()
        except BaseException as error:  # SystemExit too: nothing of it may reach the training
            text = " ".join(str(error).split())[:300]
            self.problem = f"{type(error).__name__}: {text}" if text else type(error).__name__

    def put(self, item: Any) -> None:
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self.problem = self.problem or f"it hangs: {MOST_WAITING} rows wait for it"

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)
        if self._thread.is_alive():
            self.problem = self.problem or "it hangs, and was not waited for any longer"


class Trackers:
    """Trackers of one run, from `open_trackers`. As a context manager it finishes them at the end of the block."""

    def __init__(self, workers: Sequence[_Worker] = ()):
        self._workers = list(workers)

    @property
    def names(self) -> tuple[str, ...]:
        """Of those that still work."""
        return tuple(worker.name for worker in self._workers)

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Hand ``metrics`` {name: number} of a step to every tracker, without waiting for it; None is left out.

        A RuntimeWarning says which tracker failed since the last call, and why; it gets nothing more.
        """
        for worker in self._workers:
            worker.put((step, dict(metrics)))
        self._let_go()

    def finish(self, seconds: float = FINISH_SECONDS) -> None:
        """Let the trackers write what waits and end, all of them within ``seconds``; who needs longer is let go with a
        RuntimeWarning. A second call does nothing."""
        check_number("seconds", seconds, 0)
        deadline = time.monotonic() + seconds
        for worker in self._workers:
            worker.put(_END)
        for worker in self._workers:
            worker.join(max(0.0, deadline - time.monotonic()))
        self._let_go()
        self._workers.clear()

    def _let_go(self) -> None:
        failed = [worker for worker in self._workers if worker.problem is not None]
        self._workers = [worker for worker in self._workers if worker.problem is None]
        for worker in failed:
            warnings.warn(
                f"{worker.name}: gets no more figures of this run, which goes on without: {worker.problem}",
                RuntimeWarning,
                stacklevel=3,
            )

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *exception) -> None:
        self.finish()


def open_trackers(
    names: Sequence[str],
    *,
    run_name: str,
    folder: str | os.PathLike,
    config: dict[str, Any],
    run_id: str | None = None,
) -> Trackers:
    """Start the trackers ``names``: any of "trackio", "wandb" and "tensorboard".

    run_name: what they show the run as. folder: of the run, where those that write files write theirs. config: values
    of JSON to show with it. run_id: what a resumed run is known by, by default a digest of ``run_name`` and ``folder``.

    Raises ValueError for an unknown name or one given twice, TypeError for other arguments. A package that is missing
    or that cannot be imported gives a RuntimeWarning, and the run goes on without.
    """
    if isinstance(names, (str, bytes)) or not isinstance(names, Sequence):
        raise TypeError(f"names: expected a list of trackers, got {type(names).__name__}")
    for name in names:
        if not isinstance(name, str) or name not in TRACKERS:
            raise ValueError(f"names: expected among {', '.join(TRACKERS)}, got {name!r:.40}")
    if len(set(names)) < len(names):
        raise ValueError(f"names: expected each tracker once, got {', '.join(names)}")
    check_type("run_name", run_name, str)
    check_type("config", config, dict)
    folder = as_path("folder", folder)
    if run_id is None:
        run_id = hashlib.sha256(f"{run_name}\0{folder.absolute()}".encode()).hexdigest()[:16]
    check_type("run_id", run_id, str)
    facts = RunFacts(run_name, run_id, folder, dict(config))
    workers = []
    for name in names:
        module, package, start = TRACKERS[name]
        try:
            imported = importlib.import_module(module)
        except ImportError as error:
            message = f"{name}: cannot be imported, and the run goes on without: {error}; pip install {package}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        except Exception as error:
            message = f"{name}: cannot be imported, and the run goes on without: {type(error).__name__}: {error}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        else:
            workers.append(_Worker(name, lambda start=start, imported=imported: start(imported, facts)))
    return Trackers(workers)
