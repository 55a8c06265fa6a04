"""`train_suite`: all of `gemmascope train`, in the folder of the run, from where it was left.

    text → tokens → (superblocks → batches → steps, checkpoints) → SAEs folded and saved → judged → results.json

Each arrow is a stage of the run (`runs.Run`); the training has checkpoints within.
"""

import dataclasses
import os
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..activations import ActivationStore, TokenRows, harvest_to_store, sample_rows
from ..checks import check_choice, check_type
from ..errors import EnvironmentProblemError, TrainingFailedError
from ..evaluation import judge_suite, judge_transcoders, language_model_loss
from ..formats.differences import differences, unequal
from ..formats.files import read_json, shown, write_json
from ..reporting.progress import StageProgress
from ..reporting.results import FINISHED, FREQUENCIES, RESULTS, SAES_FOLDER, TRAIN_LOG, write_frequencies
from ..runs import Run, Stage
from ..sites.decoder import find_decoder
from ..training.config import BY_BATCH, TOP_K
from .config import SuiteConfig
from .finish import calibrated, held_out_l0, save_suite
from .model import load_architecture, load_model
from .plan import Plan, make_plan
from .prepare import TOKENS, Prepared, prepare, say, settings
from .stopping import Stop, Stopped, stopping
from .training import CHECKPOINTS, Trained, restored, train

IDENTITY = "identity.json"
# What may differ from the run that is gone on with, when that is asked for; anything else is another run.
ALLOWABLE = ("environment", "model")


def train_suite(
    config: SuiteConfig,
    *,
    fresh: bool = False,
    allow: Collection[str] = (),
    store: str | os.PathLike | None = None,
    before: Callable[[Plan], Any] = lambda plan: None,
) -> dict[str, Any] | None:
    """Do what is missing of the run in ``config.run.out``, and return its results, also written to results.json there.

    fresh: start over instead of going on. store: an `ActivationStore` to read activations from, with the same bits as
    if the model ran. ``before(plan)`` is called before the training starts. allow: of `ALLOWABLE`, what may differ from
    the run that is gone on with.

    The first SIGINT, SIGTERM or SIGHUP saves a checkpoint and returns None; the same call goes on from there, to the
    same bits. The second ends the process.

    Raises ValueError for a config, text, model or environment that changed since the run began, and for what is wrong
    in them; BadFileError for a file of the run that was damaged since, and when no checkpoint can be read;
    EnvironmentProblemError as `Run`, for what does not fit into memory or on the disk and for files that cannot be
    written; TrainingFailedError when every SAE gave up.
    """
    check_type("config", config, SuiteConfig)
    check_type("fresh", fresh, bool)
    with Run(config.run.out, fresh, kind="training") as work:
        if fresh:
            forget(work.folder)
        return run_suite(config, work, allow=allow, store=store, before=before)


def run_suite(
    config: SuiteConfig,
    work: Run,
    *,
    allow: Collection[str] = (),
    store: str | os.PathLike | None = None,
    before: Callable[[Plan], Any] = lambda plan: None,
    measured: bool = True,
    after: Sequence[Stage] = (),
    restart: bool = False,
    model_facts: Mapping[str, Any] = MappingProxyType({}),
    started: float | None = None,
) -> dict[str, Any] | None:
    """`train_suite` in a run that the caller has opened, whose folder ``config.run.out`` is.

    measured: whether the plan has times. after: stages that made the text or the model. restart: what changed, but for
    what ``allow`` names, begins another training in the place of the one before, instead of being refused. model_facts:
    go into ``model`` of the results. started: by `time.monotonic`, when the caller's run began.
    """
    for name in allow:
        check_choice("allow", name, ALLOWABLE)
    started = time.monotonic() if started is None else started
    with stopping() as stop:
        try:
            prepared = _prepared(config, work, allow, restart)
            stop.check()
            return _run(prepared, work, stop, store, before, measured, after, model_facts, started)
        except Stopped:
            say(f"{config.run.out}: stopped; the same command goes on from there")
            return None


def plan_suite(config: SuiteConfig) -> Plan:
    """What a run of ``config`` would take. Nothing is written, tokenised or fetched but the model's config.json.

    A model in a folder is run for a second or two to measure it; of one on the hub the sizes alone are told. Raises as
    `make_plan`, and as `load_model` or `load_architecture`.
    """
    check_type("config", config, SuiteConfig)
    local = os.path.isdir(config.model.name)
    loaded = (load_model if local else load_architecture)(config.model, config.run.device)
    tokens = Path(config.run.out) / TOKENS
    rows = TokenRows.open(tokens) if (tokens / "manifest.json").exists() else None
    return make_plan(config, loaded, rows)


def harvest_suite(config: SuiteConfig, out: str | os.PathLike) -> ActivationStore:
    """Write to the folder ``out`` the activations that `train_suite` of ``config`` would see, as it takes ``store``.

    The text is tokenised into the folder of the run, where the training finds it. The same call goes on where it was
    stopped. Raises as `train_suite` and `harvest_to_store`.
    """
    check_type("config", config, SuiteConfig)
    with Run(config.run.out, kind="training") as work:
        prepared = prepare(config, work.folder, (work.folder / IDENTITY).exists())
        harvester = prepared.harvester()
        blocks, steps = 0, 0
        while steps < config.steps:
            kept = int(harvester.tokens(blocks) * config.activations.least_kept)
            if kept < config.suite.batch_size:
                raise ValueError(
                    f"activations.ring_tokens: expected at least one batch of {config.suite.batch_size} tokens in "
                    f"every superblock, found {kept} in superblock {blocks}"
                )
            steps, blocks = steps + kept // config.suite.batch_size, blocks + 1
        with StageProgress("Activations", blocks, "superblock") as bar:
            return harvest_to_store(
                harvester, out, blocks=blocks, dtype=getattr(torch, config.activations.dtype), progress=bar.update
            )


def forget(folder: Path) -> None:
    """Remove what a run goes on from; what it ends with is made again. The tokens stay, for `tokenise` to compare."""
    try:
        for name in (CHECKPOINTS, SAES_FOLDER):
            if (folder / name).exists():
                shutil.rmtree(folder / name)
        for name in (IDENTITY, TRAIN_LOG):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:  # what is left would be gone on from
        raise EnvironmentProblemError(
            f"{shown(error.filename or folder)}: cannot be removed: {error.strerror or error}"
        ) from error


def _prepared(config: SuiteConfig, work: Run, allow: Collection[str], restart: bool) -> Prepared:
    """What the run works with. Raises ValueError unless that is what it began with, up to what is allowed to differ;
    with ``restart`` it begins again then."""
    path = work.folder / IDENTITY
    begun = read_json(path) if path.exists() else None
    goes_on = begun is not None and not restart
    if begun is not None and goes_on:  # before the model is loaded
        _check_unchanged(work.folder, begun, settings(config, begun.get("text", {}).get("content")), allow)
    prepared = prepare(config, work.folder, goes_on)
    now = prepared.identity
    if begun is not None:
        if restart and any(any(unequal(begun.get(part), now[part])) for part in now if part not in allow):
            forget(work.folder)
            begun = None
        else:
            _check_unchanged(work.folder, begun, now, allow)
    run_id = secrets.token_hex(8) if begun is None else begun.get("run")
    write_json(path, now | {"run": run_id})
    return dataclasses.replace(prepared, run_id=run_id)


def _run(
    prepared: Prepared,
    work: Run,
    stop: Stop,
    store: str | os.PathLike | None,
    before: Callable[[Plan], Any],
    measured: bool,
    after: Sequence[Stage],
    model_facts: Mapping[str, Any],
    started: float,
) -> dict[str, Any]:
    config = prepared.config
    identity = {name: prepared.identity[name] for name in ("config", "text")}
    training = work.stage("training", identity, after=after)
    trained: Trained | None = None
    if training.done():
        say(f"training: finished before, {training.facts['steps']:,} steps")
    else:
        plan = prepared.plan(measured)
        before(plan)
        plan.refuse()
        with training.doing():
            trained = train(prepared, plan, work.folder, stop, store)
            training.facts |= trained.facts
            training.keep(work.folder / TRAIN_LOG)

    stop.check()
    rows = prepared.rows
    held_out = rows.held_out(spread(rows.n_held_out, config.evaluate.rows))
    train_tokens = rows.train(spread(rows.n_train, config.evaluate.train_rows))
    calibrates = any(
        spec.config.kind in BY_BATCH or (spec.config.kind in TOP_K and spec.target is not None)
        for spec in prepared.specs
    )  # on training rows
    saved = work.stage("saes", held_out, *([train_tokens] if calibrates else []), after=[training])
    if not saved.done():
        with saved.doing():
            trained = trained or restored(prepared, work.folder)
            saved.facts["paths"] = _save(prepared, trained, work.folder, train_tokens, held_out)
            paths = [work.folder / path for path in saved.facts["paths"].values()]
            saved.keep(*paths, *(path.with_name("config.json") for path in paths))
    del trained

    stop.check()
    loss_rows = config.evaluate.loss_rows
    read = held_out if loss_rows is None else held_out[spread(len(held_out), loss_rows)]
    judged = work.stage(FINISHED, train_tokens, held_out, read, config.run.impl, after=[training, saved])
    if judged.done():
        say(f"{config.run.out}: finished before; start over with --fresh")
        return read_json(work.folder / RESULTS)
    with judged.doing():
        saes, frequencies, facts = _judge(prepared, training, saved, work.folder, train_tokens, held_out, read)
        write_frequencies(work.folder, frequencies)
        stages = {stage.name: stage.seconds for stage in (*after, training, saved, judged)}
        results = {
            "model": facts | dict(model_facts),
            "saes": saes,
            "training": config.to_dict(),
            "statistics": training.facts["statistics"],
            "counts": training.facts["counts"],
            "parked": training.facts["parked"],
            "warnings": training.facts["warnings"],
            "environment": prepared.identity["environment"],
            "seconds": stages | training.facts["seconds"] | {"this_run": round(time.monotonic() - started, 1)},
        }
        write_json(work.folder / RESULTS, results)
        judged.keep(work.folder / RESULTS, work.folder / FREQUENCIES, work.folder / TRAIN_LOG)
    return results


def spread(n: int, rows: int) -> Tensor:
    """Which of n rows stand for all of them, int64."""
    return sample_rows(torch.arange(n, dtype=torch.int64, device="cpu"), rows)


def _check_unchanged(folder: Path, found: dict[str, Any], now: dict[str, Any], allow: Collection[str]) -> None:
    """Raise ValueError unless the run goes on from what it began with, up to what is allowed to differ."""
    for part in now:
        lines = "; ".join(differences(found.get(part, {}), now[part], "the run", "now"))
        if not lines:
            continue
        if part not in allow:
            hint = f"; --allow-{part}-change goes on all the same" if part in ALLOWABLE else ""
            raise ValueError(
                f"{part}: expected that of the run in {folder}, found a change: {lines}; "
                f"take another folder, or start over with --fresh{hint}"
            )
        say(f"goes on with another {part}: {lines}")


def _save(prepared: Prepared, trained: Trained, folder: Path, train_tokens: Tensor, held_out: Tensor) -> dict[str, str]:
    """The SAEs that did not give up, {name: path in the run's folder}. train_tokens: what those are calibrated on that
    were trained by batches, none of it held out."""
    suite = trained.suite
    specs = [spec for spec in prepared.specs if spec.name not in suite.parked]
    if not specs:
        raise TrainingFailedError("; ".join(suite.parked.values()))
    kept: dict[str, Any] = {
        "max_norm_ratio": prepared.config.activations.drop_norm,
        "median_norms": trained.median_norms,
        "targets": {spec.name: spec.target for spec in specs if spec.target is not None},
    }
    in_training = {spec.name: (spec.site, suite.trainers[spec.name].sae) for spec in specs}
    dtype = getattr(torch, prepared.config.activations.dtype)
    calibrations = calibrated(prepared.model, train_tokens, in_training, dtype=dtype, **kept)
    saes = {
        name: (site, (calibrations[name][0] if name in calibrations else sae).released())
        for name, (site, sae) in in_training.items()
    }
    say(f"SAEs: L0 of {len(saes)} on {len(held_out)} held-out rows")
    l0 = held_out_l0(prepared.model, held_out, saes, **kept)
    folded = {name: sae for name, (_, sae) in saes.items()}
    facts = {"model": prepared.name, "tokens": prepared.config.suite.tokens}
    of_each = {name: calibration for name, (_, calibration) in calibrations.items()}
    paths = save_suite(folder / SAES_FOLDER, specs, folded, l0, facts, of_each)
    return {name: path.relative_to(folder).as_posix() for name, path in paths.items()}


def _judge(
    prepared: Prepared,
    training: Stage,
    saved: Stage,
    folder: Path,
    train_tokens: Tensor,
    held_out: Tensor,
    read: Tensor,
) -> tuple[list[dict[str, Any]], dict[str, Tensor], dict[str, Any]]:
    """Every metric of every SAE, as read back from its file, and what is known of the model. read: of ``held_out``,
    the rows that the model itself reads."""
    specs = {spec.name: spec for spec in prepared.specs}
    sites = {name: spec.site for name, spec in specs.items() if spec.target is None}
    paths: dict[str, str] = saved.facts["paths"]
    config, model, rows = prepared.config, prepared.model, prepared.rows
    architecture = find_decoder(model).config
    every = {site for spec in specs.values() for site in spec.sites}
    medians = {site: training.facts["statistics"][str(site)]["median_norm"] for site in every}
    with StageProgress("Evaluation", len(paths), "SAE") as bar:
        loss = language_model_loss(model, read)
        shared: dict[str, Any] = {"impl": config.run.impl, "loss_tokens": read, "clean_loss": loss}
        shared |= {"max_norm_ratio": config.activations.drop_norm, "median_norms": medians}
        found: dict[str, dict[str, Any]] = {}
        frequencies: dict[str, Tensor] = {}
        if of_saes := {name: (sites[name], folder / path) for name, path in paths.items() if name in sites}:
            rows_of_saes, frequencies = judge_suite(
                model,
                of_saes,
                train_tokens,
                held_out,
                on_done=lambda done, name: bar.update(done, str(name)),
                **shared,
            )
            found = dict(zip(of_saes, rows_of_saes, strict=True))
        others = {}
        for name, path in paths.items():
            if (target := specs[name].target) is not None:
                others[name] = specs[name].site, target, folder / path
        if others:
            begun = len(found)
            rows_of_others, of_others = judge_transcoders(
                model,
                others,
                train_tokens,
                held_out,
                on_done=lambda done, name: bar.update(begun + done, name),
                **shared,
            )
            for name, row in zip(others, rows_of_others, strict=True):
                recipe = specs[name].config  # which Gemma Scope 2's files have no room for
                aims = {"target_l0": recipe.loss.target_l0, "l0_coefficient": recipe.loss.l0_coefficient}
                if recipe.k is not None:
                    aims = {"k": recipe.k}
                found[name] = row | aims | {"seed": recipe.seed, "kind": recipe.kind}
            frequencies |= of_others
        saes = [found[name] for name in paths]
    facts = {
        "name": prepared.name,
        "layers": architecture.num_hidden_layers,
        "d_model": architecture.hidden_size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "text": ", ".join(config.text.files) or config.text.dataset,
        "context": config.text.context,
        "tokens": config.steps * config.suite.batch_size,
        "loss": loss,
        "held_out_rows": len(held_out),
        "loss_rows": len(read),
        "held_out_tokens": held_out.numel(),
        "held_out": f"{len(held_out):,} of {rows.n_held_out:,} rows of held-out documents, spread over all; held out "
        f"is one document of {config.text.held_out_every}, by the hash of its name",
        "seed": config.suite.seed,
    }
    return [row | {"path": paths[row["name"]]} for row in saes], frequencies, facts
