"""Training of the SAEs and transcoders of many sites at once, from one stream of activations."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from ..activations.statistics import SiteStatistics
from ..checks import check_int, check_type
from ..sites import Site
from .company import GIVE_UP_AFTER, Company
from .snapshot import check_keys
from .spec import SAESpec
from .trainer import SAETrainer
from .unfold import check_fits, load

LOG_EVERY = 10

Log = Callable[[int, dict[str, dict[str, float]] | None], None]


class Suite(Company[str]):
    """The SAEs of ``specs`` in training, several at a site if need be, with the `SiteStatistics` of every site.

    ``trainers`` {name: SAETrainer}, ``parked`` {name: why it gave up}, ``finished``, the names of those that have taken
    the steps of their recipe, and ``active``, the others, in the order of the specs. What one of them becomes does not
    depend on which others there are, bit for bit: on a CPU each step is computed by ``threads`` threads, side by side
    on as many as PyTorch has when the suite is made.

    model_name: for the metadata of the SAEs. Raises ValueError for no spec, two of one name, a site without statistics
    and an ``init_from`` of another width, ValueError or TypeError on other bad arguments, BadFileError for an
    ``init_from`` that cannot be read, and EnvironmentProblemError as `SAETrainer`.

        with closing(Suite(specs, statistics, model_name="google/gemma-2-2b")) as suite:
            for batch in feed.batches():
                suite.update(batch)
                if not suite.active:
                    break
    """

    def __init__(
        self,
        specs: Sequence[SAESpec],
        statistics: Mapping[Site, SiteStatistics],
        *,
        model_name: str,
        impl: str = "auto",
        device: torch.device | str | None = None,
        threads: int = 1,
    ):
        self.specs = _checked(specs)
        check_type("statistics", statistics, Mapping)
        check_type("model_name", model_name, str)
        check_int("threads", threads, 1)
        for site in (site for spec in self.specs.values() for site in spec.sites):
            if site not in statistics:
                raise ValueError(f"statistics: expected those of every SAE's site, {site} is missing")
            check_type(f"statistics[{site}]", statistics[site], SiteStatistics)
        trainers = {}
        for name, spec in self.specs.items():
            metadata = site_metadata(model_name, spec.site, spec.target)
            options: dict[str, Any] = {"impl": impl, "device": device, "metadata": metadata}
            if spec.target is not None:
                options["target"] = statistics[spec.target]
            if spec.init_from is not None:
                metadata["init_from"] = spec.init_from
                options["init_from"] = load(spec.init_from)
                sizes = len(statistics[spec.site].mean), spec.config.d_sae
                check_fits(f"init_from of {name}, {spec.init_from!r}", options["init_from"], *sizes)
            trainers[name] = SAETrainer(spec.config, statistics[spec.site], **options)
        super().__init__(trainers, {name: spec.sites for name, spec in self.specs.items()}, threads)
        self.finished = {name for name, spec in self.specs.items() if not spec.config.steps}
        self._last = self.active
        self._whole = True  # but while steps are taken

    @property
    def step(self) -> int:
        """Batches so far."""
        return max(trainer.step for trainer in self.trainers.values())

    def update(self, batch: Mapping[Site, Tensor]) -> None:
        """Give a batch {site: [N ≥ 1, width]} to every active SAE, floats of any precision on any device.

        An SAE whose step raises an Exception, or whose last `GIVE_UP_AFTER` updates were withheld, is parked, with a
        RuntimeWarning, and gets no more batches; so does one that has taken the steps of its recipe. The others go on
        as they would without it. Raises ValueError or TypeError, before any step, for a batch that lacks a site or is
        not of its width and when no SAE is active; TrainingFailedError when all are parked. An interrupt, such as
        KeyboardInterrupt, may leave steps half made: there is no further update or snapshot then, but `restore`.
        """
        self._check_whole()
        names = self.active
        if not names:
            raise ValueError("update: expected an active SAE, found none: all have taken their steps or gave up")
        rows = self.rows("batch", batch, names)
        for name, each in zip(names, rows, strict=True):
            spec, target = self.specs[name], each[1] if len(each) > 1 else None
            self.trainers[name].check_batch(each[0], f"batch[{spec.site}]", target, f"batch[{spec.target}]")
        self._whole = False
        errors = self.take(names, rows)
        self._whole = True
        gone = {name: _what(name, error, self.trainers[name].step) for name, error in errors.items()}
        for name in names:
            if name in gone:
                continue
            trainer, steps = self.trainers[name], self.specs[name].config.steps
            skipped, patience = trainer.withheld_in_a_row, GIVE_UP_AFTER
            if trainer.step >= steps:
                trainer.flush()
                skipped, patience = trainer.skipped_in_a_row, min(GIVE_UP_AFTER, steps)
            if skipped >= patience:
                gone[name] = self.why(name, skipped) + ": it gave up"
            elif trainer.step >= steps:
                self.finished.add(name)
                if skipped:
                    warnings.warn(self.why(name, skipped), RuntimeWarning, stacklevel=2)
        self._last = [name for name in names if name not in gone]
        self.park(gone)
        for message in gone.values():
            warnings.warn(message, RuntimeWarning, stacklevel=2)

    def report(self) -> dict[str, dict[str, float]]:
        """{name: `SAETrainer.report`} of the SAEs that took part in the last update, but for those parked in it."""
        return {name: self.trainers[name].report() for name in self._last}

    def snapshot(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """{name: tensors} of all but those parked, in their own memory, and facts of JSON: what `restore` takes."""
        self._check_whole()
        parts, facts = {}, {}
        for name, trainer in self.trainers.items():
            if name not in self.parked:
                parts[name], facts[name] = trainer.snapshot()
        return parts, {"saes": facts, "parked": dict(self.parked), "finished": sorted(self.finished)}

    def restore(self, parts: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]) -> None:
        """Become what the suite of `snapshot` was; those that were parked stay as they are here.

        Raises ValueError or TypeError, saying the difference, for a snapshot of other SAEs, recipes or sizes; then
        nothing is changed.
        """
        check_keys("facts", facts, ("saes", "parked", "finished"))
        parked, finished = facts["parked"], facts["finished"]
        check_type("facts.parked", parked, Mapping)
        check_type("facts.finished", finished, list)
        check_keys("facts: SAEs", {**facts["saes"], **parked}, self.trainers)
        check_keys("parts", parts, facts["saes"])
        for name in parts:
            try:
                self.trainers[name].check_snapshot(parts[name], facts["saes"][name])
            except (ValueError, TypeError) as error:
                raise type(error)(f"{name}: {error}") from error
        for name in parts:
            self.trainers[name].restore(parts[name], facts["saes"][name])
        self.parked, self.finished = dict(parked), set(finished)
        self._last, self._whole = self.active, True

    def _check_whole(self) -> None:
        if not self._whole:
            raise RuntimeError("suite: expected whole steps, found an update that was interrupted: restore a snapshot")


def _checked(specs: Any) -> dict[str, SAESpec]:
    """The specs by name."""
    if not isinstance(specs, Sequence):
        raise TypeError(f"specs: expected a sequence of SAESpec, got {type(specs).__name__}")
    if not specs:
        raise ValueError("specs: expected at least one SAE, got none")
    by_name: dict[str, SAESpec] = {}
    for spec in specs:
        check_type("specs", spec, SAESpec)
        if spec.name in by_name:
            raise ValueError(f"specs: expected a name of its own for each SAE, got two of {spec.name!r}")
        by_name[spec.name] = spec
    return by_name


def _what(name: str, error: Exception, step: int) -> str:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return f"{name}: {type(error).__name__} in its update after step {step}: {reason}: it gave up"


def site_metadata(model_name: str, site: Site, target: Site | None = None) -> dict[str, Any]:
    """What an SAE's metadata says of what it was trained on."""
    found = {"model": model_name, "site": site.name, "layer": site.layer}
    return found if target is None else found | {"site_out": target.name}


def _check_sites(name: str, by_site: Any) -> None:
    if not isinstance(by_site, Mapping):
        raise TypeError(f"{name}: expected a mapping by site, got {type(by_site).__name__}")
    if not by_site:
        raise ValueError(f"{name}: expected at least one site, got none")


def _check_log(log_every: Any, log: Any) -> None:
    check_int("log_every", log_every, 1)
    if not callable(log):
        raise TypeError(f"log: expected a function, got {type(log).__name__}")


def train(
    trainers: Mapping[Site, SAETrainer],
    stream: Iterable[Mapping[Site, Tensor]],
    *,
    log_every: int = LOG_EVERY,
    log: Log = lambda step, rows: None,
) -> dict[Site, str]:
    """Give every batch {site: [N, width]} of ``stream`` to the trainer of its site.

    ``log(step, rows)`` is called after each step, every ``log_every``-th with {str(site): figures}.

    An SAE gives up when its last `GIVE_UP_AFTER` updates were withheld one and all, their loss or gradients not finite,
    or every update of a shorter stream. It is left as it was before them, gets no more batches and has no more rows in
    the log; the others go on as they would without it. Returns {site: why} of those that gave up. A RuntimeWarning says
    so of each, and of an SAE whose very last updates were withheld. Raises TrainingFailedError when all gave up, and
    ValueError or TypeError on bad arguments.
    """
    _check_sites("trainers", trainers)
    for site, trainer in trainers.items():
        check_type("trainers", trainer, SAETrainer)
        if trainer.is_transcoder:
            raise ValueError(f"trainers: expected SAEs, got a transcoder at {site}; Suite trains those")
    if not isinstance(stream, Iterable) or isinstance(stream, Tensor):
        raise TypeError(f"stream: expected an iterable of batches, got {type(stream).__name__}")
    _check_log(log_every, log)
    steps, company = 0, Company(trainers, {site: (site,) for site in trainers}, None)

    def part(skipped: Mapping[Site, int], patience: int) -> None:
        gone = {site: company.why(site, n) + ": it gave up" for site, n in skipped.items() if n >= patience}
        company.park(gone)

    with closing(company):
        for batch in stream:
            active = company.active
            for error in company.take(active, company.rows("stream", batch, active)).values():
                raise error
            steps += 1
            step = trainers[active[0]].step
            log(step, None if step % log_every else {str(site): trainers[site].report() for site in active})
            part({site: trainers[site].withheld_in_a_row for site in active}, GIVE_UP_AFTER)
    left = company.active
    for site in left:
        trainers[site].flush()
    skipped = {site: trainers[site].skipped_in_a_row for site in left}
    if steps:
        part(skipped, min(GIVE_UP_AFTER, steps))
    for message in company.parked.values():
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    for site in company.active:
        if skipped[site]:
            warnings.warn(company.why(site, skipped[site]), RuntimeWarning, stacklevel=2)
    return company.parked
