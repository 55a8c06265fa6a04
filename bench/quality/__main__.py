"""Does every trainer make an SAE as good? python -m bench quality [--sites layer_2/resid] [--save]

Trains the same SAE (same width, start, activations in the same order, number of tokens) with each trainer at several
sparsities, and measures L0, FVU, dead latents and PCA of equal rank on held-out activations of the demo: the last tenth
of its tokens, whose rows its seed drew one by one over the whole text. Trainers that are given an L0 (sparsify,
dictionary_learning) are given what ours reached, so that the curves overlap. What a trainer does otherwise than ours is
said under the table; --recipe shared takes away what a package's options let one take away.

Ours against the reference is judged in fp64, where rounding has no time to grow; their fp32 figures are shown. The last
line of standard output is one JSON document; --save appends its rows to the results. The exit status is 1 when a
training of ours failed or ours differs from the reference by more than one percent.

With --architectures KIND … other kinds of SAE are compared too: `bench.quality.architectures`, whose --help says how.
"""

import argparse
import contextlib
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from bench.contenders import UnavailableError
from bench.ours import OursTrainer
from bench.quality import plots
from bench.quality.reading import load
from bench.quality.verdicts import OURS, Row, points_of, table, verdict_line, verdicts
from bench.reporting import records
from bench.trainers import RECIPES, TRAINERS, Setting, Trainer, class_of, make
from gemmascope.activations import batches
from gemmascope.evaluation import evaluate_sae
from gemmascope.reporting.progress import StageProgress
from gemmascope.sites import Site
from gemmascope.training.config import TrainConfig
from gemmascope.training.trainer import SAETrainer

ACTIVATIONS = Path("runs/demo/activations.safetensors")
OUT = Path("runs/bench")
L0_COEFFICIENTS = (2e-3, 4e-3, 8e-3, 16e-3)
CURVE_POINTS, CURVE_TOKENS = 10, 8192


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def train(trainer: Trainer, setting: Setting, site: Site, rows: Tensor, held_out: Tensor, tick=lambda: None) -> Row:
    """One training: the figures on ``held_out`` and the curve on the way there. Evaluation is not in the seconds."""
    config = setting.config
    start = SAETrainer(config, rows).sae
    marks = {round(config.steps * (i + 1) / CURVE_POINTS) for i in range(CURVE_POINTS)}
    seconds, curve = 0.0, []
    with contextlib.redirect_stdout(sys.stderr):
        trainer.start(setting, start, rows)
        for step, batch in enumerate(batches({site: rows}, config.batch_size, config.steps, config.seed), start=1):
            begun = time.perf_counter()
            trainer.update(batch[site])
            if step in marks:
                sae = trainer.sae()
            seconds += time.perf_counter() - begun
            if step in marks:
                found = evaluate_sae(sae, held_out[:CURVE_TOKENS])
                curve.append({"step": step, "seconds": seconds, "l0": found.l0, "fvu": finite(found.fvu)})
            tick()
    found = evaluate_sae(sae, held_out, rows)
    return {
        "held_out_tokens": found.tokens,
        "l0": found.l0,
        "fvu": finite(found.fvu),
        "pca_fvu": finite(found.pca_fvu),
        "median_fvu": finite(found.median_fvu),
        "pca_median_fvu": finite(found.pca_median_fvu),
        "dead": found.dead_fraction,
        "high_frequency": found.high_freq_fraction,
        "seconds": seconds,
        "curve": curve,
    }


def parity(config: TrainConfig, site: Site, rows: Tensor, held_out: Tensor, impl: str, tick=lambda: None) -> Row:
    """Ours against the reference in fp64: relative differences of L0 and FVU."""
    ours = OursTrainer(impl=impl, dtype=torch.float64)
    reference = OursTrainer("reference", "reference", "reference", torch.float64)
    runs = [train(one, Setting(config, 0.0), site, rows, held_out, tick) for one in (ours, reference)]
    row: Row = {"kind": "parity", "contender": "ours", "site": str(site), "dtype": "fp64", "steps": config.steps}
    row |= {"l0_coefficient": config.loss.l0_coefficient, "impl": ours.trainer.state.impl, "route": ours.trainer.route}
    return row | {name: abs(runs[0][name] / runs[1][name] - 1) for name in ("l0", "fvu")}


def settings(name: str, configs: Sequence[TrainConfig], reached: Sequence[float], recipe: str, fixes_l0: bool):
    """A setting for each sparsity. reached: the L0 of ours at each; a whole number of latents for TopK."""
    for config, l0 in zip(configs, reached, strict=True):
        yield Setting(config, max(1, round(l0)) if fixes_l0 else l0, recipe)


def facts_of(trainer: Trainer, setting: Setting, site: Site, width: int) -> Row:
    config = setting.config
    sparsity = {"target_l0": setting.l0} if trainer.fixes_l0 else {"l0_coefficient": config.loss.l0_coefficient}
    return {
        "kind": "quality",
        "contender": trainer.name,
        "site": str(site),
        "recipe": setting.recipe,
        "sparsity": sparsity,
        "d_model": width,
        "d_sae": config.d_sae,
        "steps": config.steps,
        "batch_size": config.batch_size,
        "tokens_seen": config.steps * config.batch_size,
        "learning_rate": config.learning_rate,
        "adam_beta1": config.adam_beta1,
        "adam_beta2": config.adam_beta2,
        "seed": config.seed,
        "differs": trainer.differences(setting.recipe),
    }


def run_site(given: argparse.Namespace, site: Site, rows: Tensor, held_out: Tensor, bar) -> list[Row]:
    """Every trainer at every sparsity, and the comparison in fp64."""
    found: list[Row] = []
    configs = [config_of(given, coefficient) for coefficient in given.l0_coefficients]
    reached = [float(l0) for l0 in given.l0 or (2 ** (5 - i) for i in range(len(configs)))]
    for name in given.trainers:
        try:
            trainer = make(name, given.impl)
            for setting in settings(name, configs, reached, given.recipe, trainer.fixes_l0):
                bar.note(f"{site} {name}")
                facts = facts_of(trainer, setting, site, rows.shape[1])
                found.append(facts | train(trainer, setting, site, rows, held_out, bar.tick))
        except Exception as error:
            reason = str(error) if isinstance(error, UnavailableError) else f"failed: {type(error).__name__}: {error}"
            first = (reason.strip().splitlines() or ["no reason given"])[0]
            found.append(
                {"kind": "skipped", "contender": name, "site": str(site), "recipe": given.recipe, "reason": first}
            )
        if name == "ours" and not given.l0 and len(points := points_of(found, "ours", str(site))) == len(configs):
            reached = [l0 for l0, _ in points]
    if given.parity:
        bar.note(f"{site} fp64")
        middle = config_of(given, given.l0_coefficients[len(configs) // 2])
        found.append(parity(middle, site, rows, held_out, given.impl, bar.tick))
    return found


def config_of(given: argparse.Namespace, coefficient: float) -> TrainConfig:
    changes = {"steps": given.steps, "d_sae": given.d_sae, "batch_size": given.batch_size}
    changes |= {"learning_rate": given.lr, "adam_beta2": given.beta2}
    changes = {name: value for name, value in changes.items() if value is not None}
    if given.steps:
        whole = TrainConfig.short()
        for name in ("lr_warmup_steps", "lr_decay_steps", "l0_warmup_steps"):
            changes[name] = getattr(whole, name) * given.steps // whole.steps
    return TrainConfig.short(l0_coefficient=coefficient, seed=given.seed, **changes)


class Bar:
    """Progress over all trainings, in steps."""

    def __init__(self, bar: StageProgress):
        self.bar, self.steps, self.text = bar, 0, ""

    def note(self, text: str) -> None:
        self.text = text

    def tick(self) -> None:
        self.steps += 1
        self.bar.update(self.steps, self.text)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m bench quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--activations", type=Path, default=ACTIVATIONS, help="as bench.quality.activations writes them")
    top.add_argument("--sites", nargs="+", default=["layer_2/resid"])
    top.add_argument("--trainers", nargs="+", choices=tuple(TRAINERS), default=list(TRAINERS))
    top.add_argument("--l0-coefficients", nargs="+", type=float, default=list(L0_COEFFICIENTS))
    top.add_argument(
        "--l0", nargs="+", type=float, help="for trainers that are given an L0; default: what ours reached"
    )
    top.add_argument("--recipe", choices=RECIPES, default=RECIPES[0])
    top.add_argument("--steps", type=int, help="of each training, its warm-ups in proportion; default: the demo's")
    top.add_argument("--d-sae", type=int)
    top.add_argument("--batch-size", type=int)
    top.add_argument("--lr", type=float)
    top.add_argument("--beta2", type=float, help="of our Adam")
    top.add_argument("--seed", type=int, default=0)
    top.add_argument("--impl", default="auto", help="of ours")
    top.add_argument("--no-parity", dest="parity", action="store_false", help="leave out the comparison in fp64")
    top.add_argument("--save", action="store_true", help="append the rows to the results")
    top.add_argument("--results", type=Path, default=records.RESULTS, help="folder of the results")
    top.add_argument("--out", type=Path, default=OUT, help="folder for the picture")
    return top


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if any(argument.split("=")[0] == "--architectures" for argument in arguments):
        from bench.quality import architectures

        return architectures.main(arguments)
    top = parser()
    given = top.parse_args(arguments)
    if given.l0 and len(given.l0) != len(given.l0_coefficients):
        top.error(f"--l0: expected {len(given.l0_coefficients)} numbers, one a coefficient, found {len(given.l0)}")
    try:
        activations = load(given.activations, given.sites)
        steps = config_of(given, given.l0_coefficients[0]).steps
    except ValueError as error:
        top.error(str(error))
    packages = dict.fromkeys(package for name in given.trainers for package in class_of(name).requires)
    machine = records.provenance(torch.device("cpu"), packages)
    trainings = len(given.trainers) * len(given.l0_coefficients) + 2 * given.parity
    rows: list[Row] = []
    with StageProgress("Quality", len(activations) * trainings * steps, "step") as progress:
        bar = Bar(progress)
        for site, (train_rows, held_out) in activations.items():
            rows += run_site(given, site, train_rows, held_out, bar)
    judged = verdicts(rows)
    print("\n".join([*table(rows), *map(verdict_line, judged)]))
    if given.save:
        path = records.append("quality", [row | {"machine": machine} for row in rows], given.results)
        print(f"appended {len(rows)} rows to {path}")
    picture = plots.save(rows, machine, given.out)
    print(f"picture: {picture or 'nothing to draw'}")
    print(json.dumps({"suite": "quality", "machine": machine, "rows": rows, "verdicts": judged}), flush=True)
    failed = any(row["kind"] == "skipped" and row["contender"] in OURS for row in rows)
    return int(failed or any(verdict["kind"] == "parity" and not verdict["met"] for verdict in judged))


if __name__ == "__main__":
    sys.exit(main())
