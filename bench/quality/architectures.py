"""Which kind of SAE is best, by which trainer? python -m bench quality --architectures jumprelu topk … [--save]

Trains every kind with every trainer that has it: same width, start, activations in the same order and number of tokens,
several sparsities and seeds. Kinds of a fixed number of latents are given --l0 as k, those that aim at an L0 as their
target; ReLU and gated SAEs have --l1-coefficients, SAELens' JumpReLU --l0-coefficients. All are compared on curves of
FVU over L0, on held-out activations, with and without the one token in a thousand whose norm is the largest, beside
PCA of equal rank, a random dictionary whose threshold is fitted to the L0, and, where the file has them, the table of
token pairs. BatchTopK and Matryoshka of ours get their threshold on training activations.

--data synthetic plants the features (`bench.quality.synthetic`) and says how well they were found. Else it is a file of
activations (`bench.quality.activations`). The last line of standard output is one JSON document; --save appends its
rows to the results; a page, architectures.html, is written to --out. Exit status 1 when a training of ours failed.
"""

import argparse
import contextlib
import copy
import gc
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.contenders import Contender, UnavailableError
from bench.quality import pareto
from bench.quality.controls import control_rows
from bench.quality.reading import HELD_OUT, load
from bench.quality.synthetic import Planted, compare
from bench.reporting import records
from bench.trainers import RECIPES, Setting, Trainer, class_of, make
from gemmascope.activations import batches
from gemmascope.evaluation import evaluate_sae
from gemmascope.reporting.progress import StageProgress
from gemmascope.saes import BatchTopKSAE
from gemmascope.saes.base import BaseSAE
from gemmascope.sites import Site
from gemmascope.training import calibrate_threshold
from gemmascope.training.config import KINDS, TOP_K, TrainConfig
from gemmascope.training.trainer import SAETrainer

Row = dict[str, Any]
TRAINERS = ("ours", "saelens", "dictionary_learning", "sparsify")
SYNTHETIC = "synthetic"
SYNTHETIC_TOKENS = 1 << 17
OUTLIERS = 1e-3
"""Share of the held-out tokens, by norm, without which the figures are given too."""
CALIBRATION_TOKENS = 16_384


@dataclass(frozen=True)
class Data:
    site: Site
    rows: Tensor
    held_out: Tensor
    planted: Planted | None = None
    pairs: tuple[Tensor, Tensor] | None = None
    """(previous, current) ids of the rows and of those held out."""
    centred: bool = False

    @property
    def kept(self) -> Tensor:
        """bool [n]: the held-out tokens but for the `OUTLIERS`."""
        norms = self.held_out.float().norm(dim=1)
        dropped = norms.topk(math.ceil(OUTLIERS * len(norms))).indices
        kept = torch.ones(len(norms), dtype=torch.bool)
        kept[dropped] = False
        return kept


def available(trainer: str, kind: str) -> bool:
    return trainer != "sparsify" or kind == "topk"


def trainer_of(name: str, kind: str, impl: str) -> Trainer:
    """Raises `UnavailableError` where the package is missing."""
    if name in ("ours", "sparsify") or kind == "jumprelu":
        return make(name, impl)
    from bench.peers import architectures

    found = {"saelens": "SAELensArchitecture", "dictionary_learning": "DictionaryLearningArchitecture"}[name]
    package = Contender()
    package.requires = class_of(name).requires
    package.check_available(torch.device("cpu"))
    return getattr(architectures, found)(kind)


def settings(given: argparse.Namespace, trainer: str, kind: str, seed: int) -> Iterator[Setting]:
    """One for each sparsity."""
    size = {"steps": given.steps, "d_sae": given.d_sae, "batch_size": given.batch_size, "seed": seed, "kind": kind}
    own = dict(given.coefficients).get((trainer, kind))
    for index, l0 in enumerate(given.l0):
        aim: dict[str, Any]
        if kind in TOP_K:
            aim = {"k": round(l0)}
            if kind == "matryoshka":
                aim["prefixes"] = prefixes(given.d_sae)
        elif kind != "jumprelu":
            aim = {"l0_coefficient": (own or given.l1_coefficients)[index]}
        elif trainer == "saelens":  # whose penalty aims at no L0
            aim = {"sparsity": "l0", "l0_coefficient": (own or given.l0_coefficients)[index]}
        else:
            aim = {"target_l0": float(l0)}
        yield Setting(TrainConfig.small(**size, **aim), l0, given.recipe)


def own_coefficients(text: str) -> tuple[tuple[str, str], list[float]]:
    """Of "saelens/gated=.1,.2"."""
    place, found, numbers = text.partition("=")
    trainer, _, kind = place.partition("/")
    if not found or trainer not in TRAINERS or kind not in KINDS:
        raise argparse.ArgumentTypeError(f"expected TRAINER/KIND=NUMBER,…, found {text!r}")
    return (trainer, kind), [float(number) for number in numbers.split(",")]


def prefixes(d_sae: int) -> tuple[int, ...]:
    """The shares of arXiv 2503.17547 as far as there are latents: 1/32, 1/8, 1/4, 15/32 and all."""
    shares = (1 / 32, 1 / 8, 1 / 4, 15 / 32, 1)
    return tuple(sorted({max(1, round(share * d_sae)) for share in shares}))


class Peak:
    """The memory that a block took at most beyond what was there, where Linux tells; else None."""

    nbytes: int | None = None

    def __enter__(self) -> "Peak":
        gc.collect()
        self.before = _resident("VmRSS")
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        return self

    def __exit__(self, *problem: object) -> None:
        after = _resident("VmHWM")
        self.nbytes = None if after is None or self.before is None else max(0, after - self.before)


def _resident(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), None)


def released(trainer: Trainer, rows: Tensor) -> Any:
    """What is judged: ours as a suite saves it, that of others as they leave it."""
    sae: Any = trainer.sae()
    if isinstance(sae, BatchTopKSAE):
        sae, sample = copy.deepcopy(sae), rows[:: -(-len(rows) // CALIBRATION_TOKENS)].float()
        calibrate_threshold(sae, lambda: [sample])
    return sae.released() if isinstance(sae, BaseSAE) else sae


def train(trainer: Trainer, setting: Setting, data: Data, tick: Callable[[], None] = lambda: None) -> Row:
    """The figures of one training. Its seconds are those of the updates alone."""
    config, seconds, cpu_seconds = setting.config, 0.0, 0.0
    start = SAETrainer(config, data.rows).sae
    with contextlib.redirect_stdout(sys.stderr), Peak() as peak:
        trainer.start(setting, start, data.rows)  # type: ignore
        for batch in batches({data.site: data.rows}, config.batch_size, config.steps, config.seed):
            begun, begun_cpu = time.perf_counter(), time.process_time()
            trainer.update(batch[data.site])
            seconds, cpu_seconds = seconds + time.perf_counter() - begun, cpu_seconds + time.process_time() - begun_cpu
            tick()
        begun, begun_cpu = time.perf_counter(), time.process_time()
        trainer.sae()  # waits for the last update
        seconds, cpu_seconds = seconds + time.perf_counter() - begun, cpu_seconds + time.process_time() - begun_cpu
    sae = released(trainer, data.rows)
    every, kept = evaluate_sae(sae, data.held_out), evaluate_sae(sae, data.held_out, keep=data.kept)
    found: Row = {
        "held_out_tokens": every.tokens,
        "l0": every.l0,
        "fvu": finite(every.fvu),
        "median_fvu": finite(every.median_fvu),
        "l0_kept": kept.l0,
        "fvu_kept": finite(kept.fvu),
        "dead": every.dead_fraction,
        "high_frequency": every.high_freq_fraction,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_bytes": peak.nbytes,
    }
    if data.planted is not None:
        found["planted"] = compare(data.planted, sae.W_dec, every.firing_frequency, every.l0)
    return found


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def facts_of(name: str, kind: str, trainer: Trainer, setting: Setting, data: Data) -> Row:
    config = setting.config
    aim = {"k": config.k} if config.k is not None else {"l0_coefficient": config.loss.l0_coefficient}
    if kind == "jumprelu" and config.loss.target_l0 is not None:
        aim = {"target_l0": config.loss.target_l0}
    return {
        "kind": "architecture",
        "contender": name,
        "architecture": kind,
        "site": str(data.site) if data.planted is None else SYNTHETIC,
        "recipe": setting.recipe,
        "at_l0": setting.l0,
        "sparsity": aim,
        "d_model": data.rows.shape[1],
        "d_sae": config.d_sae,
        "steps": config.steps,
        "batch_size": config.batch_size,
        "tokens_seen": config.steps * config.batch_size,
        "learning_rate": config.learning_rate,
        "seed": config.seed,
        "centred": data.centred,
        "differs": trainer.differences(setting.recipe),
    }


def run(given: argparse.Namespace, data: Data, tick: Callable[[str], None] = lambda note: None) -> list[Row]:
    """Every trainer, kind, sparsity and seed, and the controls."""
    site = str(data.site) if data.planted is None else SYNTHETIC
    rows: list[Row] = []
    for kind in given.architectures:
        for name in given.trainers:
            if not available(name, kind):
                continue
            note = f"{site} {name} {kind}"
            facts = {"contender": name, "architecture": kind, "site": site, "recipe": given.recipe}
            try:
                for seed in given.seeds:
                    for setting in settings(given, name, kind, seed):
                        trainer = trainer_of(name, kind, given.impl)
                        said = facts_of(name, kind, trainer, setting, data)
                        rows.append(said | train(trainer, setting, data, lambda note=note: tick(note)))
            except Exception as error:
                reason = (
                    str(error) if isinstance(error, UnavailableError) else f"failed: {type(error).__name__}: {error}"
                )
                first = (reason.strip().splitlines() or ["no reason given"])[0]
                rows.append({"kind": "skipped", **facts, "reason": first})
    controls = control_rows(data.rows, data.held_out, data.kept, given.d_sae, given.l0, data.pairs)
    return rows + [{"site": site, "recipe": given.recipe, "d_sae": given.d_sae, **row} for row in controls]


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m bench quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--architectures", nargs="+", choices=KINDS, required=True)
    top.add_argument("--data", default=SYNTHETIC, help="'synthetic', or a file as bench.quality.activations writes it")
    top.add_argument("--sites", nargs="+", default=["layer_2/resid"], help="of the file")
    top.add_argument(
        "--centred",
        action="store_true",
        help="subtract the mean, at which the b_dec of ours begins and which the encoders of others see",
    )
    top.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    top.add_argument("--seeds", nargs="+", type=int, default=[0])
    top.add_argument("--l0", nargs="+", type=float, default=[4, 8, 16], help="ks and targets, one a sparsity")
    few = [1.0, 0.7, 0.45]
    top.add_argument("--l1-coefficients", nargs="+", type=float, default=few, help="of ReLU and gated SAEs")
    top.add_argument(
        "--l0-coefficients", nargs="+", type=float, default=[8e-3, 4e-3, 2e-3], help="of SAELens' JumpReLU"
    )
    top.add_argument(
        "--coefficients",
        nargs="+",
        type=own_coefficients,
        default=[],
        metavar="TRAINER/KIND=λ,…",
        help="those of one trainer in the place of either, as saelens/gated=.1,.2",
    )
    top.add_argument("--recipe", choices=RECIPES, default=RECIPES[0])
    top.add_argument("--steps", type=int, default=400)
    top.add_argument("--d-sae", type=int, default=512)
    top.add_argument("--batch-size", type=int, default=1024)
    top.add_argument("--tokens", type=int, default=SYNTHETIC_TOKENS, help="of synthetic data")
    top.add_argument("--features", type=int, default=Planted.n_features, help="planted in synthetic data")
    top.add_argument("--impl", default="auto", help="of ours")
    top.add_argument("--save", action="store_true", help="append the rows to the results")
    top.add_argument("--results", type=Path, default=records.RESULTS, help="folder of the results")
    top.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for the page")
    return top


def data_of(given: argparse.Namespace) -> list[Data]:
    """Raises ValueError for what is not there."""
    if given.data == SYNTHETIC:
        planted = Planted(n_features=given.features)
        x = planted.draw(given.tokens)
        held_out = math.ceil(HELD_OUT * len(x))
        return [Data(Site(0, "resid"), x[:-held_out], x[-held_out:], planted)]
    from bench.quality.activations import read_pairs

    path, found = Path(given.data), []
    for site, (rows, held_out) in load(path, given.sites).items():
        pairs = read_pairs(path)
        split = None if pairs is None else (pairs[: len(rows)], pairs[len(rows) :])
        mean = rows.float().mean(0) if given.centred else torch.zeros(())
        found.append(Data(site, rows.float() - mean, held_out.float() - mean, pairs=split, centred=given.centred))
    return found


def main(arguments: list[str] | None = None) -> int:
    top = parser()
    given = top.parse_args(arguments)
    for name in ("l1_coefficients", "l0_coefficients"):
        if len(getattr(given, name)) != len(given.l0):
            option = name.replace("_", "-")
            top.error(
                f"--{option}: expected {len(given.l0)} numbers, one for each of --l0, found {getattr(given, name)}"
            )
    for place, numbers in given.coefficients:
        if len(numbers) != len(given.l0):
            top.error(f"--coefficients: expected {len(given.l0)} numbers for {'/'.join(place)}, found {numbers}")
    try:
        every = data_of(given)
        for kind in given.architectures:
            next(settings(given, "ours", kind, 0))
    except ValueError as error:
        top.error(str(error))
    packages = dict.fromkeys(package for name in given.trainers for package in class_of(name).requires)
    machine = records.provenance(torch.device("cpu"), packages)
    pairs = sum(available(name, kind) for kind in given.architectures for name in given.trainers)
    rows: list[Row] = []
    steps = len(every) * pairs * len(given.seeds) * len(given.l0) * given.steps
    with StageProgress("Quality", steps, "step") as progress:
        done = 0

        def tick(note: str) -> None:
            nonlocal done
            done += 1
            progress.update(done, note)

        for data in every:
            rows += run(given, data, tick)
    print("\n".join(line for title, text in pareto.texts(rows) for line in (f"\n{title}", text)))
    if given.save:
        path = records.append("architectures", [row | {"machine": machine} for row in rows], given.results)
        print(f"appended {len(rows)} rows to {path}")
    print(f"page: {pareto.write_page(rows, machine, given.out) or 'nothing to draw'}")
    print(json.dumps({"suite": "architectures", "machine": machine, "rows": rows}), flush=True)
    return int(any(row["kind"] == "skipped" and row["contender"] == "ours" for row in rows))
