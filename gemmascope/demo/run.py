"""The demo: a small Gemma 2 trained on real text, an SAE at each of its twelve sites, judged, plotted and saved.

The stages follow each other in `run`; each leaves its result in the run's folder with a key of everything it depends
on, so that a second run does only what is missing.
"""

import dataclasses
import functools
import hashlib
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..activations import harvest, sample_rows
from ..activations.held_out import BLOCK_ROWS, HELD_OUT_EVERY
from ..evaluation import judge_suite, language_model_loss
from ..formats.files import atomic_write, read_json, write_json
from ..kernels import choose
from ..reporting.progress import ErrorConsole, StageProgress, SuiteProgress
from ..runs import Run, key_of
from ..sites import Site, all_sites
from ..training import TrainConfig, suite_memory, train_suite
from ..version import __version__
from . import small_gemma, text
from .small_gemma import CONTEXT, LanguageModelConfig


@dataclass(frozen=True)
class DemoConfig:
    """out: the run's folder. text: the user's own UTF-8 files instead of Python's documentation. fast: a shorter
    training. seed: of weights, held-out rows and data order. fresh: start over instead of resuming."""

    out: Path = Path("runs/demo")
    text: tuple[Path, ...] = ()
    fast: bool = False
    seed: int = 0
    fresh: bool = False
    impl: str = "auto"

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
        return 64 if self.fast else 128


def digest(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


def say(message: str) -> None:
    ErrorConsole().print(message, markup=False, soft_wrap=True)


def run(config: DemoConfig) -> dict[str, Any]:
    """Do what is missing of the run in ``config.out`` and return its results, also written to results.json there."""
    started = time.monotonic()
    config.sae()  # refuses a bad seed before anything is written
    corpus = text.read_files(config.text) if config.text else text.python_documentation()
    rows, all_held_out = text.split(corpus, CONTEXT, config.seed)
    # The same rows for every figure, that of the language model, its baseline and all that is said of the SAEs.
    held_out = sample_rows(all_held_out, config.held_out_rows, config.seed)
    source = ", ".join(path.name for path in config.text) or "documentation of Python " + platform.python_version()
    text_key = key_of(digest(rows), __version__)
    with Run(config.out, config.fresh, kind="demo") as work:
        model, model_key = language_model(config, work, rows, text_key)
        # Rows that the language model was trained on or not: all are equally real text for the SAEs.
        generator = torch.Generator("cpu").manual_seed(config.seed)
        picked = torch.randperm(len(rows), generator=generator, device="cpu")[: config.harvest_rows]
        train_tokens = rows[picked]
        activations, activations_key = activations_of(work, model, train_tokens, model_key)
        judged_on = functools.cache(lambda: harvest(model, held_out, all_sites(model)))
        paths, saes_key = train_saes(config, work, activations, judged_on, key_of(activations_key, digest(held_out)))

        results_path = config.out / "results.json"
        key = key_of(saes_key)
        if work.done("results", key, results_path, config.out / "frequencies.npz"):
            say(f"{config.out}: finished before; start over with --fresh")
            return read_json(results_path)
        with work.doing("results", key):
            results_path.unlink(missing_ok=True)  # written below, when the stage is done
            loss = language_model_loss(model, held_out)
            saes = judge(config, model, train_tokens, held_out, activations, judged_on(), paths, loss)
        facts = {
            "layers": model.config.num_hidden_layers,
            "d_model": model.config.hidden_size,
            "parameters": small_gemma.n_parameters(model),
            "text": source,
            "text_bytes": len(corpus),
            "tokens": config.language_model().steps * config.language_model().batch_rows * CONTEXT,
            "steps": config.language_model().steps,
            "seconds": work.stages["model"]["seconds"],
            "loss": loss,
            "bigram_loss": text.bigram_loss(rows, held_out),
            "held_out_rows": len(held_out),
            "held_out_tokens": held_out[:, 1:].numel(),
            "held_out": f"{len(held_out):,} of {len(all_held_out):,} held-out rows, spread over all; held out is one "
            f"of each {HELD_OUT_EVERY} blocks of {BLOCK_ROWS} rows of the text; both drawn by the seed",
            "seed": config.seed,
        }
        results = {
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
            "seconds": {name: stage["seconds"] for name, stage in work.stages.items()}
            | {"this_run": round(time.monotonic() - started, 1)},
        }
        write_json(results_path, results)
        return results


def language_model(demo: DemoConfig, work: Run, rows: Tensor, text_key: str):
    config, folder = demo.language_model(), work.folder / "model"
    key = key_of(text_key, dataclasses.asdict(config))
    if work.done("model", key, folder / "model.safetensors"):
        say(f"language model: resumed from {folder}")
        return small_gemma.load(folder, config), key
    model = small_gemma.build(config)
    with (
        work.doing("model", key),
        StageProgress("Language model", config.steps, "tok", config.batch_rows * CONTEXT) as bar,
    ):
        small_gemma.train(model, rows, config, lambda step, loss: bar.update(step, f"loss {loss:.3f}"))
        small_gemma.save(model, folder)
    return model, key


def activations_of(work: Run, model, tokens: Tensor, model_key: str) -> tuple[dict[Site, Tensor], str]:
    """Activations of every site on ``tokens``, bf16 as Gemma computes them; about 3 KB a token."""
    path = work.folder / "activations.safetensors"
    key = key_of(model_key, len(tokens))
    if work.done("activations", key, path):
        say(f"activations: resumed from {path}")
        return {Site.parse(name): rows for name, rows in load_file(path).items()}, key
    sites = all_sites(model)
    with work.doing("activations", key), StageProgress("Activations", len(tokens), "tok", CONTEXT) as bar:
        activations = harvest(model, tokens, sites, dtype=torch.bfloat16, progress=bar.update)
        with atomic_write(path) as temporary:
            save_file({str(site): rows for site, rows in activations.items()}, temporary)
    return activations, key


def train_saes(
    demo: DemoConfig,
    work: Run,
    activations: dict[Site, Tensor],
    held_out: Callable[[], dict[Site, Tensor]],
    activations_key: str,
) -> tuple[dict[Site, Path], str]:
    """Train the SAEs of all sites together and save them folded; {site: file}. held_out: activations by which they are
    named, as they are judged."""
    config, out = demo.sae(), work.folder
    key = key_of(activations_key, config.to_dict())
    stored = work.facts("saes").get("paths", {})
    if work.done("saes", key, *(out / path for path in stored.values())):
        say(f"SAEs: resumed from {out / 'saes'}")
        return {Site.parse(name): out / path for name, path in stored.items()}, key
    memory = suite_memory(config, (rows.shape[1] for rows in activations.values()))
    impl, why = choose(demo.impl, "cpu", torch.float32)
    say(f"SAEs: {len(activations)} of {config.d_sae} latents, at most {memory / 1e9:.2f} GB in training")
    say(f"SAEs are trained by impl={impl!r}: {why}")
    names = [str(site) for site in activations]
    with work.doing("saes", key) as facts:
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
        facts["paths"] = {str(site): path.relative_to(out).as_posix() for site, path in paths.items()}
    return paths, key


def judge(
    config: DemoConfig,
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
            train_tokens,
            held_out,
            activations,
            paths,
            impl=config.impl,
            clean_loss=clean_loss,
            held_out_activations=held_out_activations,
            on_done=lambda done, site: bar.update(done, str(site)),
        )
    with atomic_write(config.out / "frequencies.npz") as temporary, open(temporary, "wb") as file:
        arrays: dict[str, Any] = {str(site): frequency.numpy() for site, frequency in frequencies.items()}
        np.savez(file, **arrays)
    return [
        row | {"path": path.relative_to(config.out).as_posix()} for row, path in zip(saes, paths.values(), strict=True)
    ]
