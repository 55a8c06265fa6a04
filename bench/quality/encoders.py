"""Activations of an encoder of transformers, BERT for one, at the outputs of its blocks, layer_N/resid:

    python -m bench.quality.encoders --model MiniLM --text english.jsonl --out runs/minilm/activations.safetensors

Files are as `bench.quality.activations` writes them, the last ones of documents of their own.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.quality.activations import MOST_PER_SOURCE, joined, save
from gemmascope.activations import read_documents
from gemmascope.activations.packing import is_held_out
from gemmascope.evaluation.suite import pairs_of
from gemmascope.reporting.progress import StageProgress
from gemmascope.sites import Site

HELD_OUT_EVERY = 8
BATCH = 32
CHARACTERS = 4
"""Of a text, for each token of a row."""


def write_encoder(model: str, text: Sequence[str], sites: Sequence[str], out: Path, n_rows: int, context: int) -> Path:
    """Those of ``n_rows`` pieces of text, a tenth of them of documents that the others are not of. Padding and special
    tokens are left out. Raises ValueError for other sites and for too little text."""
    from transformers import AutoModel, AutoTokenizer

    wanted = [Site.parse(site) for site in sites]
    if any(site.kind != "resid" for site in wanted):
        raise ValueError(f"sites: expected layer_N/resid of an encoder, found {', '.join(sites)}")
    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()
    found, pairs, done = [], [], 0
    with StageProgress("Activations", n_rows, "row") as bar:
        for texts in _pieces(text, n_rows, context):
            parts, of_part = [], []
            for start in range(0, len(texts), BATCH):
                batch = texts[start : start + BATCH]
                activations, ids = _forward(network, tokenizer, batch, wanted, context)
                parts.append(activations)
                of_part.append(ids)
                done += len(batch)
                bar.update(done)
            found.append(joined(parts))
            pairs.append(torch.cat(of_part))
    return save(out, joined(found), torch.cat(pairs), len(pairs[1]))


def _pieces(text: Sequence[str], n_rows: int, context: int) -> tuple[list[str], list[str]]:
    """To train on, and held out."""
    wants, parts, used = (n_rows - n_rows // 10, n_rows // 10), ([], []), {}
    size = CHARACTERS * context
    for document in read_documents(text):
        part = parts[is_held_out(document, HELD_OUT_EVERY)]
        room = CHARACTERS * MOST_PER_SOURCE - used.get(document.source, 0)
        taken = document.text[: max(0, room)]
        used[document.source] = used.get(document.source, 0) + len(taken)
        part += [taken[start : start + size] for start in range(0, len(taken), size)]
    if any(len(part) < want for part, want in zip(parts, wants, strict=True)):
        raise ValueError(f"rows: expected text for {wants[0]} + {wants[1]}, found {len(parts[0])} + {len(parts[1])}")
    return parts[0][: wants[0]], parts[1][: wants[1]]


@torch.no_grad()
def _forward(
    network: Any, tokenizer: Any, batch: list[str], sites: list[Site], context: int
) -> tuple[dict[Site, Tensor], Tensor]:
    options = {"truncation": True, "max_length": context, "padding": True, "return_tensors": "pt"}
    given = tokenizer(batch, **options, return_special_tokens_mask=True)
    keep = given["attention_mask"].bool() & ~given.pop("special_tokens_mask").bool()
    states = network(**given, output_hidden_states=True).hidden_states
    found = {site: states[site.layer + 1][keep].to(torch.bfloat16) for site in sites}
    return found, pairs_of(given["input_ids"], network.config.vocab_size)[keep]


def main(arguments: list[str] | None = None) -> int:
    top = argparse.ArgumentParser(
        prog="python -m bench.quality.encoders",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--model", required=True, help="a folder or a name on the hub")
    top.add_argument("--text", nargs="+", required=True, help="files or patterns, as of [text] files")
    top.add_argument("--out", type=Path, required=True)
    top.add_argument("--sites", nargs="+", default=["layer_3/resid"])
    top.add_argument("--context", type=int, default=128)
    top.add_argument("--rows", type=int, default=1400)
    given = top.parse_args(arguments)
    print(write_encoder(given.model, given.text, given.sites, given.out, given.rows, given.context))
    return 0


if __name__ == "__main__":
    sys.exit(main())
