"""Several trainers that take their steps together: side by side on a CPU, one after another on a GPU."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..errors import TrainingFailedError
from ..sites import Site
from .trainer import SAETrainer

# Updates withheld one after another before an SAE gives up.
GIVE_UP_AFTER = 10
Key = TypeVar("Key")


@contextmanager
def _threads(n: int) -> Iterator[None]:
    """PyTorch's number of threads, for the calling thread and those that first compute meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# What a trainer is given in a step: activations, for a transcoder with its target.
Rows = tuple[Tensor] | tuple[Tensor, Tensor]


def _attempt(trainer: SAETrainer, rows: Rows) -> Exception | None:
    try:
        trainer.update(*rows)
    except Exception as error:  # whatever befalls one SAE, the others go on
        return error
    return None


class _Steps:
    """Takes a step of each of several trainers.

    On a CPU they run side by side, with ``threads`` of PyTorch's threads each: small operations keep a second thread
    waiting more than working, and sums over more threads have other bits. threads: None for one each, but all of them
    for a trainer alone.
    """

    def __init__(self, trainers: Sequence[SAETrainer], threads: int | None):
        available = torch.get_num_threads()
        if threads is None and len(trainers) == 1:
            threads = available
        self._each = threads or 1
        self._on_gpu = any(trainer.sae.W_dec.is_cuda for trainer in trainers)
        workers = 1 if self._on_gpu else min(len(trainers), max(1, available // self._each))
        start = {"initializer": torch.set_num_threads, "initargs": (self._each,)}
        self._pool = ThreadPoolExecutor(workers, **start) if workers > 1 else None

    def __call__(self, jobs: Sequence[tuple[SAETrainer, Rows]]) -> list[Exception | None]:
        """The error of each step, or None."""
        if self._on_gpu:
            return [_attempt(*job) for job in jobs]
        with _threads(self._each):
            if self._pool is None:
                return [_attempt(*job) for job in jobs]
            steps = [self._pool.submit(_attempt, *job) for job in jobs]
            try:
                return [step.result() for step in steps]
            finally:
                wait(steps)  # an interrupt leaves none half made

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()


class Company(Generic[Key]):
    """Trainers by name, each of which takes its batches from a site, or from those of ``sites``, the target behind.

    One that is parked takes no more steps; the others go on as they would without it.
    """

    def __init__(self, trainers: Mapping[Key, SAETrainer], sites: Mapping[Key, tuple[Site, ...]], threads: int | None):
        self.trainers = dict(trainers)
        self.parked: dict[Key, str] = {}
        """Those that gave up, and why."""
        self.finished: set[Key] = set()
        """Those that have taken all their steps."""
        self._sites = sites
        self._steps = _Steps(list(self.trainers.values()), threads)

    @property
    def active(self) -> list[Key]:
        """Those that take part in the next step."""
        return [name for name in self.trainers if name not in self.parked and name not in self.finished]

    def rows(self, argument: str, batch: Any, names: Sequence[Key]) -> list[Rows]:
        """The activations for each of ``names``; TypeError or ValueError naming ``argument`` where there are none."""
        if not isinstance(batch, Mapping):
            raise TypeError(f"{argument}: expected batches {{site: activations}}, got {type(batch).__name__}")
        missing = [site for name in names for site in self._sites[name] if site not in batch]
        if missing:
            raise ValueError(f"{argument}: expected batches of every trainer's site, {missing[0]} is missing")
        found: list[Rows] = []
        for name in names:
            site, *target = self._sites[name]
            found.append((batch[site], batch[target[0]]) if target else (batch[site],))
        return found

    def take(self, names: Sequence[Key], rows: Sequence[Rows]) -> dict[Key, Exception]:
        """A step of each of ``names``; the errors there were."""
        errors = self._steps([(self.trainers[name], each) for name, each in zip(names, rows, strict=True)])
        return {name: error for name, error in zip(names, errors, strict=True) if error is not None}

    def park(self, reasons: Mapping[Key, str]) -> None:
        """Raises TrainingFailedError when none is left and none has finished."""
        for name in reasons:
            self.trainers[name].stop()
        self.parked |= reasons
        if len(self.parked) == len(self.trainers):
            raise TrainingFailedError("; ".join(self.parked.values()))

    def why(self, name: Key, n: int) -> str:
        """What to say of one whose last ``n`` updates were withheld."""
        return (
            f"{name}: the loss or the gradients were not finite in the last {n} updates, up to step "
            f"{self.trainers[name].step}; lower the learning rate, or look for activations that are not finite"
        )

    def close(self) -> None:
        """End the threads that steps were taken by."""
        self._steps.close()
