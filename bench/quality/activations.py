"""Activations for the comparisons here: of a demo's language model, or of another model on a text.

    python -m bench.quality.activations runs/demo
    python -m bench.quality.activations --model gemma-3-270m --text english.jsonl --out runs/gemma3.safetensors

Writes bf16 [tokens, width] by site, of a demo into its folder as activations.safetensors, and beside it the
(previous, current) ids of each token, token_pairs.safetensors. Of a demo they are of rows that were not held out; else
the last ones are of documents of their own, and the file says how many. An encoder such as BERT is read by
`bench.quality.encoders`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemmascope.activations import TokenRows, harvest
from gemmascope.evaluation.suite import token_pairs
from gemmascope.formats.files import atomic_write
from gemmascope.reporting.progress import StageProgress
from gemmascope.sites import Site
from gemmascope.suite.config import ModelSection, TextSection
from gemmascope.suite.model import load_model
from gemmascope.suite.prepare import tokens as tokenised

FILE, PAIRS, HELD_OUT = "activations.safetensors", "token_pairs.safetensors", "held_out"
ROWS = 1280
MOST_PER_SOURCE = 60_000
"""Tokens of one source of documents, so that none outweighs the rest."""


def write(run: Path, n_rows: int = ROWS, seed: int = 0) -> Path:
    """Those of ``n_rows`` training rows of a demo, drawn by the seed one by one; the file."""
    loaded = load_model(ModelSection(str(run / "model")), "cpu")
    rows = TokenRows.open(run / "tokens")
    generator = torch.Generator("cpu").manual_seed(seed)
    tokens = rows.train(torch.randperm(rows.n_train, generator=generator)[:n_rows])
    with StageProgress("Activations", len(tokens), "tok", rows.context) as bar:
        found = harvest(loaded.model, tokens, loaded.sites, dtype=torch.bfloat16, progress=bar.update)
    return save(run / FILE, dict(found), token_pairs(loaded.model, tokens), None)


def write_text(
    model: str, text: Sequence[str], sites: Sequence[str], out: Path, n_rows: int, context: int, drop_norm: float | None
) -> Path:
    """Those of ``n_rows`` rows of ``context`` tokens, a tenth of them of documents that the others are not of.

    drop_norm: leave out tokens whose norm is above so many times the median of the first rows; None: none.
    """
    loaded = load_model(ModelSection(model, dtype="float32"), "cpu")
    section = TextSection(files=tuple(text), context=context, held_out_every=8, max_tokens_per_source=MOST_PER_SOURCE)
    rows = tokenised(section, loaded.tokenizer, out.with_suffix(".tokens"))
    generator = torch.Generator("cpu").manual_seed(0)
    last = min(n_rows // 10, rows.n_held_out)
    parts = [
        rows.train(torch.randperm(rows.n_train, generator=generator)[: n_rows - last]),
        rows.held_out(torch.randperm(rows.n_held_out, generator=generator)[:last]),
    ]
    found, pairs, medians = [], [], None
    with StageProgress("Activations", sum(map(len, parts)), "tok", context) as bar:
        for done, tokens in zip((0, len(parts[0])), parts, strict=True):
            each = harvest(
                loaded.model,
                tokens,
                sites,
                dtype=torch.bfloat16,
                max_norm_ratio=drop_norm,
                median_norms=medians,
                progress=lambda n, done=done: bar.update(done + n),
            )
            medians = each.outliers.median_norms
            print(f"{each.outliers.dropped} of {each.outliers.tokens} tokens left out", file=sys.stderr)
            found.append(dict(each))
            pairs.append(token_pairs(loaded.model, tokens, kept=each.kept))
    return save(out, joined(found), torch.cat(pairs), len(pairs[1]))


def joined(parts: list[dict[Site, Tensor]]) -> dict[Site, Tensor]:
    return {site: torch.cat([part[site] for part in parts]) for site in parts[0]}


def save(path: Path, found: dict[Site, Tensor], pairs: Tensor, held_out: int | None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        metadata = None if held_out is None else {HELD_OUT: str(held_out)}
        save_file({str(site): x.contiguous() for site, x in found.items()}, temporary, metadata)
    with atomic_write(path.with_name(PAIRS)) as temporary:
        save_file({"pairs": pairs}, temporary)
    return path


def read_pairs(path: Path) -> Tensor | None:
    """int64 [tokens, 2] beside the activations at ``path``; None where there are none."""
    beside = path.with_name(PAIRS)
    return load_file(beside)["pairs"] if beside.exists() else None


def main(arguments: list[str] | None = None) -> int:
    top = argparse.ArgumentParser(
        prog="python -m bench.quality.activations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("run", type=Path, nargs="?", help="folder of a finished demo")
    top.add_argument("--rows", type=int, default=ROWS)
    top.add_argument("--model", help="another model, a folder or a name on the hub, instead of a demo's")
    top.add_argument("--text", nargs="+", default=[], help="files or patterns, as of [text] files")
    top.add_argument("--sites", nargs="+", default=["layer_9/resid", "layer_9/mlp", "layer_9/att"])
    top.add_argument("--context", type=int, default=256)
    top.add_argument("--drop-norm", type=float, default=None, help="as of [activations] drop_norm")
    top.add_argument("--out", type=Path, help="file of the activations of --model")
    given = top.parse_args(arguments)
    if (given.run is None) == (given.model is None):
        top.error("run: expected the folder of a demo, or --model with --text and --out")
    if given.run is not None:
        print(write(given.run, given.rows))
        return 0
    if not given.text or given.out is None:
        top.error("--model: expected --text and --out with it")
    wanted = (given.model, given.text, given.sites, given.out, given.rows, given.context)
    print(write_text(*wanted, given.drop_norm))
    return 0


if __name__ == "__main__":
    sys.exit(main())
