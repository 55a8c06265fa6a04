"""Dashboards as the files of features that circuit-tracer's viewer reads, and Neuronpedia's graphs in "Anthropic
format".

``SET/NUMBER.json`` is a latent: the number is that of the node in a graph, Cantor's pairing of layer and latent, so
that the layers of a set of transcoders lie in one folder, whose address is a graph's ``feature_json_base_url``.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .naming import rounded, source_sets
from .overview import Overview, Shown
from .table import LatentTable

LATENTS_AT_ONCE = 256


def write(overview: Overview, folder: Path, *, check: Callable[[int], Any] = lambda done: None) -> list[Path]:
    """Write a file for each latent of all SAEs of ``overview`` into ``folder``, which should be a new one; the files,
    each of which is written at once, but not flushed to the disk. check: called with the number of latents done."""
    written: list[Path] = []
    for of, name in zip(overview.saes, source_sets(overview), strict=True):
        table, layer = overview.table(of.name), of.reads.layer
        (folder / name).mkdir(parents=True, exist_ok=True)
        for first in range(0, of.d_sae, LATENTS_AT_ONCE):
            latents = range(first, min(first + LATENTS_AT_ONCE, of.d_sae))
            for latent, found in zip(latents, features(overview, table, layer, latents), strict=True):
                path = folder / name / f"{cantor(layer, latent)}.json"
                path.write_text(json.dumps(found, allow_nan=False, ensure_ascii=False), encoding="utf-8")
                written.append(path)
            check(len(written))
    return written


def cantor(layer: int, latent: int) -> int:
    """Cantor's pairing: a number for each pair."""
    return (layer + latent) * (layer + latent + 1) // 2 + latent


def features(overview: Overview, table: LatentTable, layer: int, latents: range) -> Iterator[dict[str, Any]]:
    """The JSON of each of ``latents``."""
    vocabulary, sizes = overview.vocabulary, overview.sizes
    bounds = table.stratum_bounds()[latents.start : latents.stop].tolist()
    tops, strata = (overview.shown(examples.of(latents)) for examples in (table.top, table.strata))
    for place, latent in enumerate(latents):
        quantiles = [_quantile("Top activations", tops[place * sizes.top :][: sizes.top])]
        for stratum, (low, high) in enumerate(bounds[place]):
            first = (place * sizes.strata + stratum) * sizes.of_stratum
            title = f"Activations from {low:.5g} to {high:.5g}"
            quantiles.append(_quantile(title, strata[first : first + sizes.of_stratum]))
        promoted, suppressed = table.promoted[latent], table.suppressed[latent]
        yield {
            "transcoder_id": str(layer),
            "index": cantor(layer, latent),
            "examples_quantiles": [quantile for quantile in quantiles if quantile["examples"]],
            "top_logits": vocabulary.of(promoted[promoted >= 0]),
            "bottom_logits": vocabulary.of(suppressed[suppressed >= 0]),
            "act_min": 0.0,
            "act_max": round(float(table.largest[latent]), 5),
            "quantile_values": rounded(table.percentiles(latent)),
            "histogram": table.bars(latent)[0],
            "activation_frequency": int(table.fired[latent]) / table.n_tokens,
        }


def _quantile(title: str, examples: Sequence[Shown | None]) -> dict[str, Any]:
    found = [
        {
            "tokens": example.tokens,
            "tokens_acts_list": rounded(example.values),
            "train_token_ind": example.at,
            "is_repeated_datapoint": False,
        }
        for example in examples
        if example is not None
    ]
    return {"quantile_name": title, "examples": found}
