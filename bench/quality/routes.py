"""Do the routes of the training step train the same SAEs?

    python -m bench.quality.activations runs/demo
    python -m bench.quality.routes runs/demo/activations.safetensors

Trains the demo's suite once by each route, from the same start on the same batches, and compares the loss curves and
what the trained SAEs do with the first of the routes. Exit status 1 when the L0 or the FVU of a trained SAE differs by
more than one percent.

Training amplifies rounding: in fp32 the paths of two exact implementations part after some hundred steps. In fp64, the
default, they do not get that far apart, so that a difference means different mathematics. With --dtype fp32 the route
`control`, the first route from a start with W_enc moved by one unit in the last place, shows what rounding alone
does, and the exit status says nothing.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from gemmascope.activations import batches
from gemmascope.evaluation import evaluate_sae
from gemmascope.reporting.progress import SuiteProgress
from gemmascope.sites import Site
from gemmascope.training.config import TrainConfig
from gemmascope.training.suite import train
from gemmascope.training.trainer import SAETrainer

ROUTES = ("reference", "dense", "sparse", "auto")
DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
LOG_EVERY = 10
JUDGED_ROWS = 20_000
TOLERANCE = 0.01


@torch.no_grad()
def move_one_ulp(trainer: SAETrainer) -> None:
    weight = trainer.sae.W_enc
    weight.copy_(torch.nextafter(weight, torch.full_like(weight, torch.inf)))


def train_suite(
    activations: dict[Site, torch.Tensor], config: TrainConfig, impl: str, device: str, dtype: str, moved: bool = False
) -> dict:
    """Seconds, the loss curve and final L0 and FVU of each site."""
    options = {"impl": impl, "device": device, "dtype": DTYPES[dtype]}
    trainers = {site: SAETrainer(config, rows, **options) for site, rows in activations.items()}
    if moved:
        for trainer in trainers.values():
            move_one_ulp(trainer)
    curves: dict[str, list[float]] = {str(site): [] for site in trainers}
    start = time.monotonic()
    title = "control" if moved else config.route
    with SuiteProgress(title, config.steps, list(curves), "tok", config.batch_size) as bar:

        def log(step: int, rows: dict | None) -> None:
            bar.update(step, rows)
            for name, row in (rows or {}).items():
                curves[name].append(row["loss"])

        train(
            trainers, batches(activations, config.batch_size, config.steps, config.seed), log_every=LOG_EVERY, log=log
        )
    seconds = time.monotonic() - start
    figures = {}
    for site, trainer in trainers.items():
        metrics = evaluate_sae(trainer.sae, activations[site][:JUDGED_ROWS].to(device))
        figures[str(site)] = {"l0": metrics.l0, "fvu": metrics.fvu}
    return {"seconds": seconds, "curves": curves, "figures": figures}


def deviations(found: dict, reference: dict) -> dict[str, float]:
    """The largest relative difference over the sites, of each figure and of the loss at any logged step, and the
    difference of the figures' means over the sites."""
    worst = dict.fromkeys(("l0", "fvu", "curve", "mean_l0", "mean_fvu"), 0.0)
    for name in ("l0", "fvu"):
        ours, theirs = ([figures[name] for figures in run["figures"].values()] for run in (found, reference))
        worst[name] = max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))
        worst[f"mean_{name}"] = abs(sum(ours) / sum(theirs) - 1)
    for site, curve in reference["curves"].items():
        difference = torch.tensor(found["curves"][site]) / torch.tensor(curve) - 1
        worst["curve"] = max(worst["curve"], difference.abs().max().item())
    return worst


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("activations", type=Path, help="as bench.quality.activations writes them")
    parser.add_argument("--routes", nargs="+", choices=(*ROUTES, "control"), default=list(ROUTES))
    parser.add_argument("--steps", type=int, default=None, help="default: all of the demo's recipe")
    parser.add_argument("--sites", type=int, default=None, help="only the first so many")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp64")
    parser.add_argument("--impl", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    activations = {Site.parse(name): rows for name, rows in load_file(options.activations).items()}
    activations = dict(list(activations.items())[: options.sites])
    changes = {} if options.steps is None else {"steps": options.steps}
    first, runs = options.routes[0], {}
    for route in options.routes:
        config = TrainConfig.short(route=first if route == "control" else route, **changes)
        machine = (options.impl, options.device, options.dtype)
        runs[route] = train_suite(activations, config, *machine, moved=route == "control")
    print(f"{options.dtype}: largest difference from {first} over the sites; difference of the means over the sites")
    print(f"{'route':10} {'seconds':>8} {'L0':>10} {'FVU':>10} {'any loss':>10} {'mean L0':>10} {'mean FVU':>10}")
    failed = False
    for route, run in runs.items():
        worst = deviations(run, runs[first])
        failed |= max(worst["l0"], worst["fvu"]) > TOLERANCE
        print(f"{route:10} {run['seconds']:8.1f} " + " ".join(f"{100 * value:9.2g}%" for value in worst.values()))
    return int(failed and options.dtype == "fp64")


if __name__ == "__main__":
    sys.exit(main())
