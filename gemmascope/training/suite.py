"""Training of the SAEs of many sites at once, from one stream of activations, and what it leaves on the disk."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ..activations import batches
from ..errors import TrainingFailedError
from ..formats.files import atomic_write
from ..formats.release import gemma_scope_path
from ..saes import JumpReLUSAE
from ..sites import Site
from .config import TrainConfig
from .trainer import SAETrainer

LOG_EVERY = 10
LOG_FILE, SAES_FOLDER = "train_log.jsonl", "saes"
# Activations that the L0 in a file's name is measured on.
L0_ROWS = 20_000
# The pieces they are measured in, which keep the latents of one bounded; those of `evaluation`, for the same figure.
_CHUNK_ROWS, _CHUNK_ELEMENTS = 4096, 2**24

Log = Callable[[int, dict[str, dict[str, float]] | None], None]


def train_suite(
    activations: Mapping[Site, Tensor],
    config: TrainConfig,
    out: str | os.PathLike,
    *,
    model_name: str,
    impl: str = "auto",
    device: torch.device | str | None = None,
    log_every: int = LOG_EVERY,
    log: Log = lambda step, rows: None,
) -> dict[Site, Path]:
    """Train an SAE at every site of ``activations`` {site: [n, width]} and save it folded: {site: its file}.

    model_name: for the metadata of the SAEs. ``log(step, rows)`` as in `train`; the rows also go into train_log.jsonl
    in ``out``. The files are those of Gemma Scope 1, ``saes/KIND/layer_L/width_W/average_l0_L0/params.npz``; once the
    training is over they replace the whole folder ``saes``.

    Raises ValueError for no site, unequal or too few rows and as `SAETrainer`; EnvironmentProblemError as `SAETrainer`
    and when a file cannot be written; TrainingFailedError as `train`.
    """
    if not activations:
        raise ValueError("activations: expected at least one site, got none")
    out = Path(out)
    trainers = make_trainers(activations, config, model_name=model_name, impl=impl, device=device)
    lines: list[str] = []

    def log_and_keep(step: int, rows: dict[str, dict[str, float]] | None) -> None:
        log(step, rows)
        lines.extend(json.dumps({"step": step, "site": name, **row}) + "\n" for name, row in (rows or {}).items())

    stream = batches(activations, config.batch_size, config.steps, config.seed)
    train(trainers, stream, log_every=log_every, log=log_and_keep)
    with atomic_write(out / LOG_FILE) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    shutil.rmtree(out / SAES_FOLDER, ignore_errors=True)  # those of an earlier training in this folder
    return {
        site: save_sae(out / SAES_FOLDER, site, trainer.sae, activations[site][:L0_ROWS])
        for site, trainer in trainers.items()
    }


def make_trainers(
    samples: Mapping[Site, Tensor],
    config: TrainConfig,
    *,
    model_name: str,
    impl: str = "auto",
    device: torch.device | str | None = None,
) -> dict[Site, SAETrainer]:
    """A trainer for every site of ``samples`` {site: [n, width]}, its SAE's metadata saying of what model and site."""
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


def suite_memory(config: TrainConfig, widths: Iterable[int], device: torch.device | str = "cpu") -> int:
    """Bytes that training an SAE on activations of each of ``widths`` takes at most, on a device of that type."""
    return sum(SAETrainer.memory(config, width, device).total for width in widths)


def save_sae(folder: Path, site: Site, sae: JumpReLUSAE, rows: Tensor) -> Path:
    """Fold the SAE and save it in Gemma Scope 1's layout in ``folder``; returns its file.

    rows: activations [n, width] of the site; the SAE's mean L0 on them goes into the name and the metadata.
    """
    average_l0 = mean_l0(sae, rows)
    folded = sae.fold()
    folded.metadata["average_l0"] = average_l0
    path = folder / site.kind / gemma_scope_path(site.layer, sae.d_sae, average_l0)
    folded.save(path)
    return path


def mean_l0(sae: JumpReLUSAE, rows: Tensor) -> float:
    """Mean number of active latents on activations [n ≥ 1, d_model], the figure of `evaluation.evaluate_sae`."""
    n_active = 0
    for x in rows.split(max(1, min(_CHUNK_ROWS, _CHUNK_ELEMENTS // max(sae.d_sae, sae.d_model)))):
        code = sae.encode_sparse(x.to(device=sae.W_dec.device, dtype=sae.W_dec.dtype))
        n_active += len(code.indices)
    return n_active / len(rows)


def train(
    trainers: Mapping[Site, SAETrainer],
    stream: Iterable[Mapping[Site, Tensor]],
    *,
    log_every: int = LOG_EVERY,
    log: Log = lambda step, rows: None,
) -> None:
    """Give every batch {site: [N, width]} of ``stream`` to the trainer of its site.

    ``log(step, rows)`` is called after each step, every ``log_every``-th with {str(site): figures}. Raises
    TrainingFailedError naming the site when every step since the last such call was skipped, its loss not finite.
    """
    skipped = dict.fromkeys(trainers, 0.0)
    since = 0
    with _updating(trainers) as update:
        for batch in stream:
            update(batch)
            step = next(iter(trainers.values())).step
            since += 1
            if step % log_every:
                log(step, None)
                continue
            rows = {site: trainer.report() for site, trainer in trainers.items()}
            for site, row in rows.items():
                if row["skipped"] - skipped[site] == since:
                    raise TrainingFailedError(
                        f"{site}: the loss was not finite in the {since} steps up to step {step}; "
                        "lower the learning rate"
                    )
                skipped[site] = row["skipped"]
            since = 0
            log(step, {str(site): row for site, row in rows.items()})
    for trainer in trainers.values():
        trainer.flush()


@contextmanager
def _updating(trainers: Mapping[Site, SAETrainer]) -> Iterator[Callable[[Mapping[Site, Tensor]], object]]:
    """Gives every trainer its batch. On a CPU as many SAEs are trained side by side as PyTorch has threads, each by one
    of them: small operations keep a second thread waiting more than working."""
    threads = torch.get_num_threads()
    if min(threads, len(trainers)) == 1 or any(trainer.sae.W_dec.is_cuda for trainer in trainers.values()):

        def update(batch: Mapping[Site, Tensor]) -> None:
            for site, trainer in trainers.items():
                trainer.update(batch[site])

        yield update
        return
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield lambda batch: list(pool.map(lambda site: trainers[site].update(batch[site]), trainers))
        finally:
            torch.set_num_threads(threads)  # for threads that start later
