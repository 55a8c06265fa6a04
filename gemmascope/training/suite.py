"""Training of the SAEs of many sites at once, from one stream of activations, and what it leaves on the disk."""

import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..activations import batches
from ..activations.moments import check_activations, chunks
from ..checks import check_int, check_type
from ..errors import TrainingFailedError
from ..formats.files import as_path, atomic_write
from ..formats.release import gemma_scope_path
from ..saes import JumpReLUSAE
from ..sites import Site
from .config import TrainConfig
from .trainer import SAETrainer

LOG_EVERY = 10
# Updates withheld one after another before an SAE gives up.
GIVE_UP_AFTER = 10
LOG_FILE, SAES_FOLDER = "train_log.jsonl", "saes"
# Of the training activations, so many are the rows that the L0 in a file's name is measured on without others.
L0_ROWS = 20_000

Log = Callable[[int, dict[str, dict[str, float]] | None], None]


def train_suite(
    activations: Mapping[Site, Tensor],
    config: TrainConfig,
    out: str | os.PathLike,
    *,
    model_name: str,
    impl: str = "auto",
    device: torch.device | str | None = None,
    held_out: Mapping[Site, Tensor] | None = None,
    log_every: int = LOG_EVERY,
    log: Log = lambda step, rows: None,
) -> dict[Site, Path]:
    """Train an SAE at every site of ``activations`` {site: [n, width]} and save it folded: {site: its file}.

    model_name: for the metadata of the SAEs. ``log(step, rows)`` as in `train`; the rows also go into train_log.jsonl
    in ``out``, figures that are not finite as null. The files are those of Gemma Scope 1,
    ``saes/KIND/layer_L/width_W/average_l0_L0/params.npz``; once the training is over they replace the whole folder
    ``saes``. An SAE that gave up, as in `train`, has none and is missing in what is returned.

    L0 is that of the SAE as it is saved, on ``held_out`` {site: [m, width]}: the figure that `evaluation.judge_suite`
    gives of the same rows. Without them it is that of `L0_ROWS` training rows, spread over all. The metadata says of
    which: ``average_l0``, ``average_l0_of`` and ``average_l0_tokens``.

    Raises ValueError for no site, unequal or too few rows, and ValueError or TypeError on other bad arguments;
    EnvironmentProblemError as `SAETrainer` and when a file cannot be written; TrainingFailedError as `train`.
    """
    out = as_path("out", out)
    _check_log(log_every, log)
    trainers = make_trainers(activations, config, model_name=model_name, impl=impl, device=device)
    if held_out is not None:
        check_type("held_out", held_out, Mapping)
        for site, rows in activations.items():
            check_activations(f"held_out[{site}]", held_out.get(site), rows.shape[1])
    lines: list[str] = []

    def log_and_keep(step: int, rows: dict[str, dict[str, float]] | None) -> None:
        log(step, rows)
        for name, row in (rows or {}).items():
            figures = {key: value if math.isfinite(value) else None for key, value in row.items()}
            lines.append(json.dumps({"step": step, "site": name, **figures}) + "\n")

    def l0_rows(site: Site) -> tuple[Tensor, str]:
        if held_out is not None:
            return held_out[site], "held-out rows"
        rows = activations[site]
        return rows[:: -(-len(rows) // L0_ROWS)], "training rows"

    stream = batches(activations, config.batch_size, config.steps, config.seed)
    gave_up = train(trainers, stream, log_every=log_every, log=log_and_keep)
    with atomic_write(out / LOG_FILE) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    shutil.rmtree(out / SAES_FOLDER, ignore_errors=True)  # those of an earlier training in this folder
    return {
        site: save_sae(out / SAES_FOLDER, site, trainer.sae, *l0_rows(site))
        for site, trainer in trainers.items()
        if site not in gave_up
    }


def make_trainers(
    samples: Mapping[Site, Tensor],
    config: TrainConfig,
    *,
    model_name: str,
    impl: str = "auto",
    device: torch.device | str | None = None,
) -> dict[Site, SAETrainer]:
    """A trainer for every site of ``samples`` {site: [n, width]}, its SAE's metadata saying of what model and site.

    Raises ValueError or TypeError on bad arguments, and else as `SAETrainer`.
    """
    _check_sites("activations", samples)
    for site in samples:
        if not isinstance(site, Site):
            raise TypeError(f"activations: expected a Site for every key, got {type(site).__name__}")
    check_type("model_name", model_name, str)
    return {
        site: SAETrainer(
            config,
            rows,
            impl=impl,
            metadata={"model": model_name, "site": site.name, "layer": site.layer},
            device=device,
        )
        for site, rows in samples.items()
    }


def _check_sites(name: str, by_site: Any) -> None:
    if not isinstance(by_site, Mapping):
        raise TypeError(f"{name}: expected a mapping by site, got {type(by_site).__name__}")
    if not by_site:
        raise ValueError(f"{name}: expected at least one site, got none")


def _check_log(log_every: Any, log: Any) -> None:
    check_int("log_every", log_every, 1)
    if not callable(log):
        raise TypeError(f"log: expected a function, got {type(log).__name__}")


def suite_memory(config: TrainConfig, widths: Iterable[int], device: torch.device | str = "cpu") -> int:
    """Bytes that training an SAE on activations of each of ``widths`` takes at most, on a device of that type."""
    if not isinstance(widths, Iterable) or isinstance(widths, Tensor):
        raise TypeError(f"widths: expected an iterable of ints, got {type(widths).__name__}")
    return sum(SAETrainer.memory(config, width, device).total for width in widths)


def save_sae(folder: Path, site: Site, sae: JumpReLUSAE, rows: Tensor, what: str) -> Path:
    """Fold the SAE and save it in Gemma Scope 1's layout in ``folder``; returns its file.

    rows: activations [n, width] of the site, which ``what`` describes; the mean L0 of the folded SAE on them goes into
    the name and, with what they are, into the metadata.
    """
    folded = sae.fold()
    average_l0 = mean_l0(folded, rows)
    folded.metadata |= {"average_l0": average_l0, "average_l0_of": what, "average_l0_tokens": len(rows)}
    path = folder / site.kind / gemma_scope_path(site.layer, sae.d_sae, average_l0)
    folded.save(path)
    return path


def mean_l0(sae: JumpReLUSAE, rows: Tensor) -> float:
    """Mean number of active latents on activations [n ≥ 1, d_model], the figure of `evaluation.evaluate_sae`."""
    n_active = 0
    for x in chunks(rows, max(sae.d_sae, sae.d_model)):
        code = sae.encode_sparse(x.to(device=sae.W_dec.device, dtype=sae.W_dec.dtype))
        n_active += len(code.indices)
    return n_active / len(rows)


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
    for trainer in trainers.values():
        check_type("trainers", trainer, SAETrainer)
    if not isinstance(stream, Iterable) or isinstance(stream, Tensor):
        raise TypeError(f"stream: expected an iterable of batches, got {type(stream).__name__}")
    _check_log(log_every, log)
    training, gave_up, steps = dict(trainers), dict[Site, str](), 0

    def part(patience: int) -> None:
        """From those that made none of their last ``patience`` updates."""
        for site, trainer in list(training.items()):
            if trainer.skipped_in_a_row >= patience:
                gave_up[site] = _why(site, training.pop(site)) + ": it gave up"
        if not training:
            raise TrainingFailedError("; ".join(gave_up.values()))

    with _updating(training) as update:
        for batch in stream:
            update(batch)
            steps += 1
            step = next(iter(training.values())).step
            log(step, None if step % log_every else {str(site): each.report() for site, each in training.items()})
            part(GIVE_UP_AFTER)
    for trainer in training.values():
        trainer.flush()
    if steps:
        part(min(GIVE_UP_AFTER, steps))
    for message in gave_up.values():
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    for site, trainer in training.items():
        if trainer.skipped_in_a_row:
            warnings.warn(_why(site, trainer), RuntimeWarning, stacklevel=2)
    return gave_up


def _why(site: Site, trainer: SAETrainer) -> str:
    n = trainer.skipped_in_a_row
    return (
        f"{site}: the loss or the gradients were not finite in the last {n} updates, up to step {trainer.step}; "
        "lower the learning rate, or look for activations that are not finite"
    )


@contextmanager
def _updating(trainers: Mapping[Site, SAETrainer]) -> Iterator[Callable[[Mapping[Site, Tensor]], object]]:
    """Gives every trainer its batch. On a CPU as many SAEs are trained side by side as PyTorch has threads, each by one
    of them: small operations keep a second thread waiting more than working."""
    threads = torch.get_num_threads()

    def rows(batch: Mapping[Site, Tensor], site: Site) -> Tensor:
        if not isinstance(batch, Mapping):
            raise TypeError(f"stream: expected batches {{site: activations}}, got {type(batch).__name__}")
        if site not in batch:
            raise ValueError(f"stream: expected batches of every trainer's site, {site} is missing")
        return batch[site]

    if min(threads, len(trainers)) == 1 or any(trainer.sae.W_dec.is_cuda for trainer in trainers.values()):

        def update(batch: Mapping[Site, Tensor]) -> None:
            for site, trainer in trainers.items():
                trainer.update(rows(batch, site))

        yield update
        return
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield lambda batch: list(pool.map(lambda site: trainers[site].update(rows(batch, site)), trainers))
        finally:
            torch.set_num_threads(threads)  # for threads that start later
