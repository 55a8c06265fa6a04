"""The demo: a small Gemma 2 trained on real text, an SAE at each of its twelve sites, judged, plotted and saved.

The stages follow each other in `run`; each leaves its result in the run's folder with a key of everything it depends
on, so that a second run does only what is missing.
"""

import dataclasses
import functools
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..activations import harvest, sample_rows
from ..activations.held_out import BLOCK_ROWS, HELD_OUT_EVERY
from ..checks import check_int, check_type
from ..evaluation import judge_suite, language_model_loss
from ..formats.arrays import read_safetensors
from ..formats.files import as_path, atomic_write, read_json, write_json
from ..kernels import choose
from ..reporting.progress import ErrorConsole, StageProgress, SuiteProgress
from ..reporting.results import FINISHED, FREQUENCIES, RESULTS, TRAIN_LOG, write_frequencies
from ..runs import Run, Stage
from ..sites import Site, all_sites
from ..training import TrainConfig, suite_memory, train_suite
from ..version import __version__
from . import small_gemma, text
from .small_gemma import CONTEXT, LanguageModelConfig, plain_defaults

LARGEST_SEED = 2**63 - 1  # the order of later epochs is drawn with larger ones, of which generators take up to 2⁶⁴ − 1


@dataclass(frozen=True)
class DemoConfig:
    """out: the run's folder. text: the user's own UTF-8 files instead of Python's documentation. fast: a shorter
    training. seed: of weights, held-out rows and data order. fresh: start over instead of resuming. impl: of the SAEs,
    see `choose`.

    Raises ValueError and TypeError naming the setting that is wrong.
    """

    out: Path = Path("runs/demo")
    text: tuple[Path, ...] = ()
    fast: bool = False
    seed: int = 0
    fresh: bool = False
    impl: str = "auto"

    def __post_init__(self):
        as_path("out", self.out)
        check_type("text", self.text, tuple)
        for name in ("fast", "fresh"):
            check_type(name, getattr(self, name), bool)
        check_int("seed", self.seed, 0)
        if self.seed > LARGEST_SEED:
            raise ValueError(f"seed: expected at most {LARGEST_SEED}, got {self.seed}")
        choose(self.impl, "cpu", torch.float32)  # refuses one that cannot run

    def language_model(self) -> LanguageModelConfig:
        return LanguageModelConfig(steps=220 if self.fast else 280, seed=self.seed)

    def sae(self) -> TrainConfig:
        fast = {"steps": 200, "l0_warmup_steps": 85, "lr_decay_steps": 75} if self.fast else {}
        return TrainConfig.short(seed=self.seed, **fast)

    @property
    def harvest_rows(self) -> int:
        return 640 if self.fast else 1280

    @property
    def held_out_rows(self) -> int:
        return 64 if self.fast else 96


def say(message: str) -> None:
    ErrorConsole().print(message, markup=False, soft_wrap=True)


@plain_defaults()
def run(config: DemoConfig) -> dict[str, Any]:
    """Do what is missing of the run in ``config.out`` and return its results, also written to results.json there.

    Raises ValueError for a text that is none or too short and as `Run`; BadFileError for a file of the run that was
    damaged since; EnvironmentProblemError as `Run` and when a file cannot be written; TrainingFailedError as
    `train_suite`.
    """
    check_type("config", config, DemoConfig)
    started = time.monotonic()
    corpus = text.read_files(config.text) if config.text else text.python_documentation()
    rows, all_held_out = text.split(corpus, CONTEXT, config.seed)
    # The same rows for every figure, that of the language model, its baseline and all that is said of the SAEs.
    held_out = sample_rows(all_held_out, config.held_out_rows, config.seed)
    # Rows that the language model was trained on or not: all are equally real text for the SAEs.
    generator = torch.Generator("cpu").manual_seed(config.seed)
    picked = torch.randperm(len(rows), generator=generator, device="cpu")[: config.harvest_rows]
    train_tokens = rows[picked]
    source = (
        ", ".join(Path(path).name for path in config.text) or "documentation of Python " + platform.python_version()
    )
    with Run(config.out, config.fresh, kind="demo") as work:
        trained = work.stage("model", dataclasses.asdict(config.language_model()), rows)
        model = language_model(config, trained, rows)
        harvested = work.stage("activations", train_tokens, after=[trained])
        activations = activations_of(harvested, model, train_tokens)
        judged_on = functools.cache(lambda: harvest(model, held_out, all_sites(model)))
        saved = work.stage("saes", config.sae().to_dict(), config.impl, held_out, after=[trained, harvested])
        paths = train_saes(config, saved, activations, judged_on)

        path = work.folder / RESULTS
        settings = (source, rows, train_tokens, held_out, config.impl)
        judged = work.stage(FINISHED, *settings, after=[trained, harvested, saved])
        if judged.done():
            say(f"{config.out}: finished before; start over with --fresh")
            return read_json(path)
        with judged.doing():
            loss = language_model_loss(model, held_out)
            saes = judge(config, work.folder, model, train_tokens, held_out, activations, judged_on(), paths, loss)
            facts = {
                "layers": model.config.num_hidden_layers,
                "d_model": model.config.hidden_size,
                "parameters": small_gemma.n_parameters(model),
                "text": source,
                "text_bytes": len(corpus),
                "tokens": config.language_model().steps * config.language_model().batch_rows * CONTEXT,
                "steps": config.language_model().steps,
                "seconds": trained.seconds,
                "loss": loss,
                "bigram_loss": text.bigram_loss(rows, held_out),
                "held_out_rows": len(held_out),
                "held_out_tokens": held_out[:, 1:].numel(),
                "held_out": f"{len(held_out):,} of {len(all_held_out):,} held-out rows, spread over all; held out is "
                f"one of each {HELD_OUT_EVERY} blocks of {BLOCK_ROWS} rows of the text; both drawn by the seed",
                "seed": config.seed,
            }
            results = {
                "title": "Sparse autoencoders on a small Gemma 2",
                "model": facts,
                "saes": saes,
                "training": config.sae().to_dict(),
                "environment": {
                    "gemmascope": __version__,
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    "threads": torch.get_num_threads(),
                    "processors": os.cpu_count(),
                },
                "seconds": {stage.name: stage.seconds for stage in (trained, harvested, saved, judged)}
                | {"this_run": round(time.monotonic() - started, 1)},
            }
            write_json(path, results)
            judged.keep(path, work.folder / FREQUENCIES, work.folder / TRAIN_LOG)
        return results


def language_model(demo: DemoConfig, stage: Stage, rows: Tensor):
    config, folder = demo.language_model(), stage.run.folder / "model"
    if stage.done():
        say(f"language model: resumed from {folder}")
        return small_gemma.load(folder, config)
    model = small_gemma.build(config)
    with (
        stage.doing(),
        StageProgress("Language model", config.steps, "tok", config.batch_rows * CONTEXT) as bar,
    ):
        small_gemma.train(model, rows, config, lambda step, loss: bar.update(step, f"loss {loss:.3f}"))
        stage.keep(*small_gemma.save(model, folder))
    return model


def activations_of(stage: Stage, model, tokens: Tensor) -> dict[Site, Tensor]:
    """Activations of every site on ``tokens``, bf16 as Gemma computes them; about 3 KB a token."""
    path = stage.run.folder / "activations.safetensors"
    if stage.done():
        say(f"activations: resumed from {path}")
        return {Site.parse(name): rows for name, rows in read_safetensors(path).items()}
    sites = all_sites(model)
    with stage.doing(), StageProgress("Activations", len(tokens), "tok", CONTEXT) as bar:
        activations = harvest(model, tokens, sites, dtype=torch.bfloat16, progress=bar.update)
        with atomic_write(path) as temporary:
            save_file({str(site): rows for site, rows in activations.items()}, temporary)
        stage.keep(path)
    return activations


def train_saes(
    demo: DemoConfig, stage: Stage, activations: dict[Site, Tensor], held_out: Callable[[], dict[Site, Tensor]]
) -> dict[Site, Path]:
    """Train the SAEs of all sites together and save them folded; {site: file}. held_out: activations by which they are
    named, as they are judged."""
    config, out = demo.sae(), stage.run.folder
    if stage.done():
        say(f"SAEs: resumed from {out / 'saes'}")
        return {Site.parse(name): out / path for name, path in stage.facts["paths"].items()}
    memory = suite_memory(config, (rows.shape[1] for rows in activations.values()))
    impl, why = choose(demo.impl, "cpu", torch.float32)
    say(f"SAEs: {len(activations)} of {config.d_sae} latents, at most {memory / 1e9:.2f} GB in training")
    say(f"SAEs are trained by impl={impl!r}: {why}")
    names = [str(site) for site in activations]
    with stage.doing():
        with SuiteProgress("SAEs", config.steps, names, "tok", config.batch_size) as bar:
            paths = train_suite(
                activations,
                config,
                out,
                model_name="gemma2-demo",
                impl=demo.impl,
                held_out=held_out(),
                log=bar.update,
            )
        stage.facts["paths"] = {str(site): path.relative_to(out).as_posix() for site, path in paths.items()}
        stage.keep(out / TRAIN_LOG, *paths.values(), *(path.with_name("config.json") for path in paths.values()))
    return paths


def judge(
    config: DemoConfig,
    out: Path,
    model,
    train_tokens: Tensor,
    held_out: Tensor,
    activations: dict[Site, Tensor],
    held_out_activations: dict[Site, Tensor],
    paths: dict[Site, Path],
    clean_loss: float,
) -> list[dict[str, Any]]:
    """Every metric of every SAE, as read back from its file, on held-out text."""
    with StageProgress("Evaluation", len(paths), "SAE") as bar:
        saes, frequencies = judge_suite(
            model,
            {str(site): (site, path) for site, path in paths.items()},
            train_tokens,
            held_out,
            impl=config.impl,
            clean_loss=clean_loss,
            on_done=bar.update,
            activations=activations,
            held_out_activations=held_out_activations,
        )
    write_frequencies(out, frequencies)
    return [row | {"path": path.relative_to(out).as_posix()} for row, path in zip(saes, paths.values(), strict=True)]
