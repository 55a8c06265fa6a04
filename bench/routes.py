"""Do the routes of the training step train the same SAEs? python -m bench.routes runs/demo/activations.safetensors

Trains the demo's suite once by each route from the same start on the same batches, and compares the loss curves and
what the trained SAEs do. Every figure is a relative difference from the `reference` route. Exit status 1 when the L0 or
the FVU of a trained SAE differs by more than one percent.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from gemmascope.buffer import batches
from gemmascope.config import TrainConfig
from gemmascope.evaluate import evaluate_sae
from gemmascope.progress import SuiteProgress
from gemmascope.sites import Site
from gemmascope.trainer import SAETrainer, train

ROUTES = ("reference", "dense", "sparse", "auto")
LOG_EVERY = 10
JUDGED_ROWS = 20_000
TOLERANCE = 0.01


def train_suite(activations: dict[Site, torch.Tensor], config: TrainConfig, impl: str, device: str) -> dict:
    """Seconds, the loss curve and final L0 and FVU of each site."""
    trainers = {site: SAETrainer(config, rows, impl=impl, device=device) for site, rows in activations.items()}
    curves: dict[str, list[float]] = {str(site): [] for site in trainers}
    start = time.monotonic()
    with SuiteProgress(config.route, config.steps, list(curves), "tok", config.batch_size) as bar:

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
        figures[str(site)] = {"l0": metrics.l0, "fvu": metrics.fvu, "route": trainer.route}
    return {"seconds": seconds, "curves": curves, "figures": figures}


def deviations(found: dict, reference: dict) -> dict[str, float]:
    """The largest relative difference over the sites, of each figure and of the loss at any logged step."""
    worst = {name: 0.0 for name in ("l0", "fvu", "curve")}
    for site, figures in reference["figures"].items():
        for name in ("l0", "fvu"):
            worst[name] = max(worst[name], abs(found["figures"][site][name] / figures[name] - 1))
        ours, theirs = (torch.tensor(run["curves"][site]) for run in (found, reference))
        worst["curve"] = max(worst["curve"], (ours / theirs - 1).abs().max().item())
    return worst


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("activations", type=Path, help="activations.safetensors of a demo run")
    parser.add_argument("--steps", type=int, default=None, help="default: all of the demo's recipe")
    parser.add_argument("--sites", type=int, default=None, help="only the first so many")
    parser.add_argument("--impl", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    activations = {Site.parse(name): rows for name, rows in load_file(options.activations).items()}
    activations = dict(list(activations.items())[: options.sites])
    changes = {} if options.steps is None else {"steps": options.steps}
    runs = {
        route: train_suite(activations, TrainConfig.short(route=route, **changes), options.impl, options.device)
        for route in ROUTES
    }
    print(f"{'route':10} {'seconds':>8} {'L0':>9} {'FVU':>9} {'any loss':>9}   (largest difference from reference)")
    failed = False
    for route, run in runs.items():
        worst = deviations(run, runs["reference"])
        failed |= max(worst["l0"], worst["fvu"]) > TOLERANCE
        shown = " ".join(f"{100 * value:8.3f}%" for value in worst.values())
        print(f"{route:10} {run['seconds']:8.1f} {shown}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
