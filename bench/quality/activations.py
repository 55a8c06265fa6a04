"""Activations of a demo's language model on rows of its text that were not held out, for the comparisons here.

    python -m bench.quality.activations runs/demo

Writes activations.safetensors, bf16 [tokens, width] by site, into the folder of the run, and beside it the
(previous, current) ids of each token, token_pairs.safetensors.
"""

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemmascope.activations import TokenRows, harvest
from gemmascope.evaluation.suite import token_pairs
from gemmascope.formats.files import atomic_write
from gemmascope.reporting.progress import StageProgress
from gemmascope.suite.config import ModelSection
from gemmascope.suite.model import load_model

FILE, PAIRS = "activations.safetensors", "token_pairs.safetensors"
ROWS = 1280


def write(run: Path, n_rows: int = ROWS, seed: int = 0) -> Path:
    """Those of ``n_rows`` training rows, drawn by the seed one by one; the file."""
    loaded = load_model(ModelSection(str(run / "model")), "cpu")
    rows = TokenRows.open(run / "tokens")
    generator = torch.Generator("cpu").manual_seed(seed)
    tokens = rows.train(torch.randperm(rows.n_train, generator=generator)[:n_rows])
    with StageProgress("Activations", len(tokens), "tok", rows.context) as bar:
        found = harvest(loaded.model, tokens, loaded.sites, dtype=torch.bfloat16, progress=bar.update)
    with atomic_write(run / FILE) as temporary:
        save_file({str(site): x for site, x in found.items()}, temporary)
    with atomic_write(run / PAIRS) as temporary:
        save_file({"pairs": token_pairs(loaded.model, tokens)}, temporary)
    return run / FILE


def read_pairs(path: Path) -> Tensor | None:
    """int64 [tokens, 2] beside the activations at ``path``; None where there are none."""
    beside = path.with_name(PAIRS)
    return load_file(beside)["pairs"] if beside.exists() else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.quality.activations", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished demo")
    parser.add_argument("--rows", type=int, default=ROWS)
    given = parser.parse_args(arguments)
    print(write(given.run, given.rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
