"""Dashboards as the files of features that circuit-tracer's viewer reads, and Neuronpedia's graphs in "Anthropic
format".

``SET/NUMBER.json`` is a latent: the number is that of the node in a graph, Cantor's pairing of layer and latent, so
that the layers of a set of transcoders lie in one folder, whose address is a graph's ``feature_json_base_url``.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .naming import rounded, source_sets
from .overview import Overview
from .table import Examples, LatentTable


def write(overview: Overview, folder: Path, *, check: Callable[[int], Any] = lambda done: None) -> list[Path]:
    """Write a file for each latent of all SAEs of ``overview`` into ``folder``, which should be a new one; the files,
    each of which is written at once, but not flushed to the disk. check: called with the number of latents done."""
    written: list[Path] = []
    for of, name in zip(overview.saes, source_sets(overview), strict=True):
        table = overview.table(of.name)
        (folder / name).mkdir(parents=True, exist_ok=True)
        bounds = table.stratum_bounds().tolist()
        for latent in range(of.d_sae):
            layer = of.reads.layer
            path = folder / name / f"{cantor(layer, latent)}.json"
            text = json.dumps(
                feature(overview, table, bounds[latent], layer, latent), allow_nan=False, ensure_ascii=False
            )
            path.write_text(text, encoding="utf-8")
            written.append(path)
            check(len(written))
    return written


def cantor(layer: int, latent: int) -> int:
    """Cantor's pairing: a number for each pair."""
    return (layer + latent) * (layer + latent + 1) // 2 + latent


def feature(
    overview: Overview, table: LatentTable, bounds: list[list[float]], layer: int, latent: int
) -> dict[str, Any]:
    """The JSON of a latent. bounds: of its strata."""
    vocabulary = overview.vocabulary
    promoted, suppressed = table.promoted[latent], table.suppressed[latent]
    quantiles = []
    groups = [("Top activations", Examples(*(part[latent] for part in table.top)))]
    for stratum, (low, high) in enumerate(bounds):
        examples = Examples(*(part[latent, stratum] for part in table.strata))
        groups.append((f"Activations from {low:.5g} to {high:.5g}", examples))
    for title, examples in groups:
        tokens, starts = overview.window_tokens(examples), overview.starts(examples)
        found = [
            {
                "tokens": vocabulary.of(tokens[n]),
                "tokens_acts_list": rounded(examples.window[n].tolist()),
                "train_token_ind": int(examples.position[n] - starts[n]),
                "is_repeated_datapoint": False,
            }
            for n in examples.there.nonzero().flatten().tolist()
        ]
        if found:
            quantiles.append({"quantile_name": title, "examples": found})
    heights, _ = table.bars(latent)
    return {
        "transcoder_id": str(layer),
        "index": cantor(layer, latent),
        "examples_quantiles": quantiles,
        "top_logits": vocabulary.of(promoted[promoted >= 0]),
        "bottom_logits": vocabulary.of(suppressed[suppressed >= 0]),
        "act_min": 0.0,
        "act_max": round(float(table.largest[latent]), 5),
        "histogram": heights,
        "activation_frequency": float(table.frequency[latent]),
    }
