"""The demo: a small Gemma 2 trained on real text, an SAE at each of its twelve sites, judged, plotted and saved.

The stages follow each other in `run`; each leaves its result in the run's folder with a key of everything it depends
on, so that a second run does only what is missing.
"""

import dataclasses
import hashlib
import json
import os
import platform
import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..activations import batches, harvest
from ..errors import BadFileError
from ..evaluation import evaluate_sae, evaluate_splice, language_model_loss, pair_table_fvu
from ..formats.files import atomic_write, read_json, write_json
from ..formats.release import gemma_scope_path
from ..kernels import choose
from ..reporting.progress import ErrorConsole, StageProgress, SuiteProgress
from ..saes import JumpReLUSAE
from ..sites import Site, all_sites
from ..training import SAETrainer, TrainConfig, train
from ..version import __version__
from . import small_gemma, text
from .small_gemma import CONTEXT, LanguageModelConfig

LOG_EVERY = 10


@dataclass(frozen=True)
class DemoConfig:
    """out: the run's folder. text: the user's own UTF-8 files instead of Python's documentation. fast: a shorter
    training. seed: of weights and data order. fresh: start over instead of resuming."""

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
        return 64 if self.fast else 80


@dataclass
class Run:
    """The folder of a run: which stages are done, under which key, and how long each took."""

    config: DemoConfig
    stages: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        out = self.config.out
        path = out / "stages.json"
        if path.exists() and not self.config.fresh:
            try:
                self.stages = dict(read_json(path))
            except (BadFileError, ValueError, TypeError):
                self.stages = {}
        elif not path.exists() and out.is_dir() and any(out.iterdir()):
            raise ValueError(f"out: expected a new folder or that of an earlier demo, found other files in {out}")
        write_json(path, self.stages)

    def done(self, stage: str, key: str, *files: Path) -> bool:
        stored = self.stages.get(stage)
        return isinstance(stored, dict) and stored.get("key") == key and all(path.exists() for path in files)

    @contextmanager
    def doing(self, stage: str, key: str, facts: dict[str, Any]):
        """Times the block; when it ends well, the stage is done with the ``facts`` it left."""
        start = time.monotonic()
        yield
        self.stages[stage] = {"key": key, "seconds": round(time.monotonic() - start, 2), **facts}
        write_json(self.config.out / "stages.json", self.stages)


def key_of(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def say(message: str) -> None:
    ErrorConsole().print(message, markup=False, soft_wrap=True)


def run(config: DemoConfig) -> dict[str, Any]:
    """Do what is missing of the run in ``config.out`` and return its results, also written to results.json there."""
    started = time.monotonic()
    config.sae()  # refuses a bad seed before anything is written
    corpus = text.read_files(config.text) if config.text else text.python_documentation()
    rows, held_out = text.split(corpus, CONTEXT)
    source = ", ".join(path.name for path in config.text) or "documentation of Python " + platform.python_version()
    text_key = key_of(hashlib.sha256(corpus).hexdigest(), __version__)
    work = Run(config)

    model, model_key = language_model(work, rows, text_key)
    # The language model has seen the first rows of its own shuffled order; all rows are equally real text for the SAEs.
    picked = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed))[: config.harvest_rows]
    train_tokens, held_out = rows[picked], held_out[: config.held_out_rows]
    activations, activations_key = activations_of(work, model, train_tokens, model_key)
    paths, saes_key = train_saes(work, activations, activations_key)

    results_path = config.out / "results.json"
    key = key_of(saes_key, len(held_out))
    if work.done("results", key, results_path, config.out / "frequencies.npz"):
        say(f"{config.out}: finished before; start over with --fresh")
        return read_json(results_path)
    with work.doing("results", key, {}):
        loss = language_model_loss(model, held_out)
        saes = judge(config, model, train_tokens, held_out, activations, paths, loss)
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
        "held_out_tokens": held_out[:, 1:].numel(),
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


def language_model(work: Run, rows: Tensor, text_key: str):
    config, folder = work.config.language_model(), work.config.out / "model"
    key = key_of(text_key, dataclasses.asdict(config))
    if work.done("model", key, folder / "model.safetensors"):
        say(f"language model: resumed from {folder}")
        return small_gemma.load(folder, config), key
    model = small_gemma.build(config)
    with (
        work.doing("model", key, {}),
        StageProgress("Language model", config.steps, "tok", config.batch_rows * CONTEXT) as bar,
    ):
        small_gemma.train(model, rows, config, lambda step, loss: bar.update(step, f"loss {loss:.3f}"))
        small_gemma.save(model, folder)
    return model, key


def activations_of(work: Run, model, tokens: Tensor, model_key: str) -> tuple[dict[Site, Tensor], str]:
    """Activations of every site on ``tokens``, bf16 as Gemma computes them; about 3 KB a token."""
    path = work.config.out / "activations.safetensors"
    key = key_of(model_key, len(tokens))
    if work.done("activations", key, path):
        say(f"activations: resumed from {path}")
        return {Site.parse(name): rows for name, rows in load_file(path).items()}, key
    sites = all_sites(model)
    with work.doing("activations", key, {}), StageProgress("Activations", len(tokens), "tok", CONTEXT) as bar:
        activations = harvest(model, tokens, sites, dtype=torch.bfloat16, progress=bar.update)
        with atomic_write(path) as temporary:
            save_file({str(site): rows for site, rows in activations.items()}, temporary)
    return activations, key


def train_saes(work: Run, activations: dict[Site, Tensor], activations_key: str) -> tuple[dict[Site, Path], str]:
    """Train the SAEs of all sites together and save them folded; {site: file}."""
    config, out = work.config.sae(), work.config.out
    key = key_of(activations_key, config.to_dict())
    stored = work.stages.get("saes", {}).get("paths", {})
    if work.done("saes", key, *(out / path for path in stored.values())):
        say(f"SAEs: resumed from {out / 'saes'}")
        return {Site.parse(name): out / path for name, path in stored.items()}, key
    facts: dict[str, Any] = {}
    memory = sum(SAETrainer.memory(config, rows.shape[1]).total for rows in activations.values())
    impl, why = choose(work.config.impl, "cpu", torch.float32)
    say(f"SAEs: {len(activations)} of {config.d_sae} latents, at most {memory / 1e9:.2f} GB in training")
    say(f"SAEs are trained by impl={impl!r}: {why}")
    with work.doing("saes", key, facts):
        trainers = {
            site: SAETrainer(
                config,
                rows,
                impl=work.config.impl,
                metadata={"model": "gemma2-demo", "site": site.name, "layer": site.layer},
            )
            for site, rows in activations.items()
        }
        stream = batches(activations, config.batch_size, config.steps, config.seed)
        log_rows: list[dict[str, Any]] = []
        with SuiteProgress("SAEs", config.steps, [str(site) for site in trainers], "tok", config.batch_size) as bar:

            def log(step: int, rows: dict[str, dict[str, float]] | None) -> None:
                bar.update(step, rows)
                log_rows.extend({"step": step, "site": name, **row} for name, row in (rows or {}).items())

            train(trainers, stream, log_every=LOG_EVERY, log=log)
        with atomic_write(out / "train_log.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in log_rows), encoding="utf-8")
        shutil.rmtree(out / "saes", ignore_errors=True)  # those of an earlier training in this folder
        facts["paths"] = {
            str(site): str(save_sae(out, site, trainer.sae, activations[site])) for site, trainer in trainers.items()
        }
    return {Site.parse(name): out / path for name, path in facts["paths"].items()}, key


def save_sae(out: Path, site: Site, sae: JumpReLUSAE, rows: Tensor) -> Path:
    """Fold and save in Gemma Scope 1's layout; returns the path relative to ``out``."""
    l0 = evaluate_sae(sae, rows[:20_000]).l0
    folded = sae.fold()
    folded.metadata["average_l0"] = l0
    path = Path("saes") / site.kind / gemma_scope_path(site.layer, sae.d_sae, l0)
    folded.save(out / path)
    return path


def judge(
    config: DemoConfig,
    model,
    train_tokens: Tensor,
    held_out: Tensor,
    activations: dict[Site, Tensor],
    paths: dict[Site, Path],
    clean_loss: float,
) -> list[dict[str, Any]]:
    """Every metric of every SAE, as read back from its file, on held-out text."""
    held_out_activations = harvest(model, held_out, paths)
    train_pairs, held_out_pairs = (
        torch.stack([tokens[:, :-1].flatten(), tokens[:, 1:].flatten()], 1) for tokens in (train_tokens, held_out)
    )
    saes, frequencies = [], {}
    with StageProgress("Evaluation", len(paths), "SAE") as bar:
        for done, (site, path) in enumerate(paths.items(), start=1):
            sae = JumpReLUSAE.load(path)
            sae.impl = config.impl
            rows = held_out_activations[site]
            metrics = evaluate_sae(sae, rows, activations[site])
            splice = evaluate_splice(model, held_out, site, sae, rows.mean(0), clean_loss=clean_loss)
            frequencies[str(site)] = metrics.firing_frequency.numpy()
            saes.append(
                {
                    "site": site.kind,
                    "layer": site.layer,
                    "width": sae.d_sae,
                    "l0": metrics.l0,
                    "fvu": metrics.fvu,
                    "pca_fvu": metrics.pca_fvu,
                    "pair_table_fvu": pair_table_fvu(activations[site], train_pairs, rows, held_out_pairs),
                    "delta_loss": splice.delta_loss,
                    "ablation_delta_loss": splice.ablation_delta_loss,
                    "loss_recovered": splice.loss_recovered,
                    "dead_fraction": metrics.dead_fraction,
                    "high_freq_fraction": metrics.high_freq_fraction,
                    "path": path.relative_to(config.out).as_posix(),
                }
            )
            bar.update(done, str(site))
    with atomic_write(config.out / "frequencies.npz") as temporary, open(temporary, "wb") as file:
        np.savez(file, **frequencies)
    return saes
