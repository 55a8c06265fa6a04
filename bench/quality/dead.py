"""Which latents die, and what keeps them alive? python -m bench.quality.dead FILE … [--save]

Trains SAEs on every site of files of activations (`bench.quality.activations`, with outliers and means as harvested),
once for each treatment, all else equal, and says which share of the latents never fires on held-out tokens, beside L0
and FVU and γ = ‖mean‖/‖std‖ of the activations, which is said to predict it (arXiv 2605.31518). FVU is of the held-out
tokens that are no outliers, whose norm is at most `OUTLIERS` times the median, whatever the SAE was trained on.

The last lines are Spearman's rank correlations of γ with the share of dead latents over the sites. --save appends the
rows to the results.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from bench.quality.reading import load
from bench.reporting import records
from gemmascope.activations import batches
from gemmascope.evaluation import evaluate_sae
from gemmascope.reporting.progress import StageProgress
from gemmascope.sites import Site
from gemmascope.training.config import TrainConfig
from gemmascope.training.trainer import SAETrainer

Row = dict[str, Any]
OUTLIERS = 3.0


def unchanged(rows: Tensor) -> Tensor:
    return rows


def without_outliers(rows: Tensor) -> Tensor:
    """rows [n, width] but for those whose norm is above `OUTLIERS` times the median."""
    return rows[kept(rows, rows)]


def kept(rows: Tensor, reference: Tensor) -> Tensor:
    return rows.norm(dim=1) <= OUTLIERS * reference.norm(dim=1).median()


@dataclass(frozen=True)
class Treatment:
    """What is done to the training rows, and changes of the recipe."""

    kind: str
    changes: dict[str, Any] = field(default_factory=dict)
    rows: Callable[[Tensor], Tensor] = unchanged


PLAIN = {"b_dec_init": "zeros", "scale_by": "mean_square"}
MEAN = {"b_dec_init": "mean", "scale_by": "mean_square"}
UNITS = {"b_dec_init": "mean", "scale_by": "variance"}


def treatments(l0: int, steps: int) -> dict[str, Treatment]:
    """By name. "all" is what `TrainConfig.small` and an outlier filter do, but for what brings dead latents back; those
    before it lack something of it, those after it add something."""
    found: dict[str, Treatment] = {}
    jumprelu: dict[str, Any] = {"target_l0": float(l0), "revival_rate": 0.0}
    topk: dict[str, Any] = {"k": l0, "aux_coefficient": 0.0}
    for kind, aim in (("jumprelu", jumprelu), ("topk", topk)):
        found |= {
            f"{kind}: as harvested": Treatment(kind, aim | PLAIN),
            f"{kind}: b_dec from the mean": Treatment(kind, aim | MEAN),
            f"{kind}: and units of variance": Treatment(kind, aim | UNITS),
            f"{kind}: outliers left out": Treatment(kind, aim | PLAIN, without_outliers),
            f"{kind}: all": Treatment(kind, aim | UNITS, without_outliers),
        }

    def added(name: str, kind: str, changes: dict[str, Any]) -> None:
        found[f"{kind}: {name}"] = Treatment(kind, changes | UNITS, without_outliers)

    added("all, AuxK", "topk", {"k": l0})
    found["topk: as harvested, AuxK"] = Treatment("topk", {"k": l0} | PLAIN)
    added("all, revived", "jumprelu", jumprelu | {"revival_rate": 1.0})
    found["jumprelu: as harvested, revived"] = Treatment("jumprelu", jumprelu | PLAIN | {"revival_rate": 1.0})
    added("all, λ that rises late", "jumprelu", jumprelu | {"l0_warmup_steps": steps, "l0_warmup_power": 4.0})
    added("all, narrow window", "jumprelu", jumprelu | {"bandwidth": 5e-3})
    added("all, pre-act loss", "jumprelu", jumprelu | {"pre_act_coefficient": 3e-3, "route": "reference"})
    again = tuple(sorted({max(1, steps // 3), max(1, steps // 2)}))
    added("all", "relu", {"l0_coefficient": 0.15})
    added("all, resampled", "relu", {"l0_coefficient": 0.15, "resample_steps": again})
    return found


def gamma(rows: Tensor) -> float:
    """‖mean‖/‖std‖ of rows [n, width]."""
    centre = rows.mean(0)
    return (centre.norm() / (rows - centre).square().sum(1).mean().sqrt()).item()


def run(site: Site, rows: Tensor, held_out: Tensor, name: str, given: argparse.Namespace, seed: int) -> Row:
    treatment = treatments(given.l0, given.steps)[name]
    size = {"steps": given.steps, "d_sae": given.d_sae, "batch_size": given.batch_size, "seed": seed}
    size["dead_after_tokens"] = 10 * given.batch_size
    config = TrainConfig.small(kind=treatment.kind, **size, **treatment.changes)
    train = treatment.rows(rows)
    begun = time.perf_counter()
    trainer = SAETrainer(config, train)
    for batch in batches({site: train}, config.batch_size, config.steps, config.seed):
        trainer.update(batch[site])
    trainer.flush()
    seconds = time.perf_counter() - begun
    found = evaluate_sae(trainer.sae.released(), held_out, keep=kept(held_out, rows))
    return {
        "kind": "dead",
        "contender": "ours",
        "architecture": treatment.kind,
        "treatment": name,
        "site": str(site),
        "d_model": rows.shape[1],
        "d_sae": config.d_sae,
        "steps": config.steps,
        "batch_size": config.batch_size,
        "seed": seed,
        "gamma": gamma(rows),
        "gamma_seen": gamma(train),
        "outlier_share": 1 - len(without_outliers(rows)) / len(rows),
        "held_out_tokens": found.tokens,
        "dead": found.dead_fraction,
        "l0": found.l0,
        "fvu": found.fvu,
        "seconds": seconds,
    }


def spearman(x: list[float], y: list[float]) -> float:
    """Pearson's correlation of the ranks, ties at their mean rank; NaN for fewer than three pairs or equal ranks."""
    if len(x) < 3:
        return float("nan")
    ranks = [_ranks(torch.tensor(values, dtype=torch.float64)) for values in (x, y)]
    a, b = (rank - rank.mean() for rank in ranks)
    return ((a @ b) / (a.norm() * b.norm())).item()


def _ranks(values: Tensor) -> Tensor:
    below = (values[:, None] > values).double().sum(1)
    return below + ((values[:, None] == values).double().sum(1) - 1) / 2


def table(rows: list[Row]) -> list[str]:
    """A line for each treatment: means over sites and seeds, and the rank correlation of γ with dead over the sites."""
    lines = [f"{'treatment':36} {'dead':>6} {'most':>6} {'L0':>7} {'FVU':>7} {'ρ(γ, dead)':>11}"]
    for name in dict.fromkeys(row["treatment"] for row in rows):
        of = [row for row in rows if row["treatment"] == name]
        places = dict.fromkeys((row["data"], row["site"]) for row in of)
        by_site = [[row for row in of if (row["data"], row["site"]) == place] for place in places]
        dead = [mean(row["dead"] for row in site) for site in by_site]
        rho = spearman([site[0]["gamma"] for site in by_site], dead)
        figures = f"{mean(row['l0'] for row in of):7.1f} {mean(row['fvu'] for row in of):7.4f} {rho:11.2f}"
        lines.append(f"{name:36} {mean(dead):6.3f} {max(dead):6.3f} {figures}")
    return lines


def sites_of(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return sorted(file.keys())


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m bench.quality.dead", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("files", nargs="+", type=Path, help="activations as bench.quality.activations writes them")
    top.add_argument("--sites", nargs="+", help="of the files; default: all of them")
    top.add_argument("--treatments", nargs="+", choices=list(treatments(1, 1)), help="default: all of them")
    top.add_argument("--seeds", nargs="+", type=int, default=[0])
    top.add_argument("--l0", type=int, default=20)
    top.add_argument("--d-sae", type=int, default=1024)
    top.add_argument("--steps", type=int, default=300)
    top.add_argument("--batch-size", type=int, default=1024)
    top.add_argument("--save", action="store_true", help="append the rows to the results")
    top.add_argument("--results", type=Path, default=records.RESULTS, help="folder of the results")
    return top


def main(arguments: list[str] | None = None) -> int:
    top = parser()
    given = top.parse_args(arguments)
    names, rows = given.treatments or list(treatments(given.l0, given.steps)), []
    machine = records.provenance(torch.device("cpu"))
    jobs = []
    for path in given.files:
        try:
            wanted = given.sites or sites_of(path)
            load(path, wanted)
        except (ValueError, OSError) as error:
            top.error(str(error))
        jobs += [(path, site) for site in wanted]
    with StageProgress("Dead latents", len(jobs) * len(names) * len(given.seeds), "SAE") as progress:
        for path, site in jobs:
            ((place, (train, held_out)),) = load(path, [site]).items()
            for name in names:
                for seed in given.seeds:
                    row = run(place, train.float(), held_out.float(), name, given, seed)
                    rows.append(row | {"data": path.parent.name, "machine": machine})
                    progress.update(len(rows), f"{path.parent.name} {site} {name}")
                    if given.save:
                        records.append("dead", rows[-1:], given.results)
    print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
