"""Dashboards as the folder that Neuronpedia's bulk import takes, as SAEDashboard's ``neuronpedia_export`` writes it.

``MODEL/SOURCE/`` holds release.jsonl, model.jsonl, sourceset.jsonl and source.jsonl, of one line each, and
features/batch-N.jsonl.gz and activations/batch-N.jsonl.gz. A source is ``LAYER-SET``, such as ``12-resid-16k``. A batch
of latents that never fired has no file of activations: the import fails at an empty one.
"""

import gzip
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ..formats.files import atomic_write
from .naming import rounded, source_sets
from .overview import Overview, Shown, TableOf
from .table import LatentTable

# Whom Neuronpedia's own scripts name where none is given.
CREATOR = "clkht01d40000jv08hvalcvly"
LATENTS_OF_BATCH = 256


def write(
    overview: Overview, folder: Path, *, created: datetime, check: Callable[[int], Any] = lambda done: None
) -> list[Path]:
    """Write all SAEs of ``overview`` into ``folder``; the files.

    Of a latent come the largest examples, whose ``binMin`` and ``binContains`` are −1, then those of each stratum, with
    its bounds and the share of all tokens on which the latent fires in it. A histogram's values are the middles of its
    bins, up to the largest activation. Correlations, neuron alignment, the histogram of logits and vectors are left
    empty: they are not in the table. created: what is written as the time of it all. check: called with the number of
    latents done.
    """
    model = overview.model.rstrip("/").rpartition("/")[2]
    written: list[Path] = []
    done = 0
    for of, source_set in zip(overview.saes, source_sets(overview), strict=True):
        table = overview.table(of.name)
        writer = _Source(overview, of, table, model, source_set, created)
        place = folder / model / writer.source
        for name, line in writer.heads():
            written.append(_write_plain(place / name, line))
        for number, first in enumerate(range(0, of.d_sae, LATENTS_OF_BATCH)):
            latents = range(first, min(first + LATENTS_OF_BATCH, of.d_sae))
            features = (writer.feature(latent) for latent in latents)
            written.append(_write_gzip(place / "features" / f"batch-{number}.jsonl.gz", features))
            if bool((table.fired[latents.start : latents.stop] > 0).any()):
                activations = writer.activations(latents)
                written.append(_write_gzip(place / "activations" / f"batch-{number}.jsonl.gz", activations))
            check(done + latents.stop)
        done += of.d_sae
    return written


class _Source:
    """The lines of one SAE."""

    def __init__(
        self, overview: Overview, of: TableOf, table: LatentTable, model: str, source_set: str, created: datetime
    ):
        self.overview, self.of, self.table, self.model, self.set = overview, of, table, model, source_set
        self.bounds = table.stratum_bounds().tolist()
        self.shares = (table.stratum_share() * table.frequency[:, None]).tolist()
        self.source = f"{of.reads.layer}-{source_set}"
        self.created = created.isoformat()

    def heads(self) -> Iterator[tuple[str, dict[str, Any]]]:
        rows, context = self.overview.text.tokens.shape
        release = f"{self.model}-{self.set}"
        made = {"creatorId": CREATOR, "createdAt": self.created}
        named = {"name": release, "description": release, "creatorName": "gemmascope"}
        yield "release.jsonl", {**named, "visibility": "PUBLIC", **made}
        yield (
            "model.jsonl",
            {
                "id": self.model,
                "instruct": self.model.endswith("-it"),
                "displayNameShort": self.model,
                "displayName": self.model,
                "owner": "",
                "layers": 0,
                "neuronsPerLayer": 0,
                "visibility": "PUBLIC",
                **made,
                "updatedAt": self.created,
            },
        )
        yield (
            "sourceset.jsonl",
            {
                "modelId": self.model,
                "name": self.set,
                "creatorName": "gemmascope",
                "releaseName": release,
                "description": f"{self.of.kind} at {self.of.reads.kind}",
                "visibility": "PUBLIC",
                **made,
            },
        )
        yield (
            "source.jsonl",
            {
                "id": self.source,
                "modelId": self.model,
                "setName": self.set,
                "dataset": self.overview.what,
                "num_prompts": rows,
                "num_tokens_in_prompt": context,
                "hfRepoId": None,
                "hfFolderId": None,
                "visibility": "PUBLIC",
                **made,
            },
        )

    def feature(self, latent: int) -> dict[str, Any]:
        table = self.table
        largest = round(float(table.largest[latent]), 5)
        heights, middles = table.bars(latent)
        promoted, suppressed = table.promoted[latent], table.suppressed[latent]
        near = table.near[latent] >= 0
        return {
            "modelId": self.model,
            "layer": self.source,
            "index": str(latent),
            "creatorId": CREATOR,
            "createdAt": self.created,
            "sourceSetName": self.set,
            "maxActApprox": largest,
            "hasVector": False,
            "vector": [],
            "vectorLabel": None,
            "vectorDefaultSteerStrength": largest,
            "hookName": self.of.reads.transformer_lens_name,
            "topkCosSimIndices": table.near[latent][near].tolist(),
            "topkCosSimValues": rounded(table.near_cosine[latent][near].tolist()),
            **{key: [] for key in _EMPTY},
            "pos_str": self.overview.vocabulary.of(promoted[promoted >= 0]),
            "pos_values": rounded(table.promoted_logit[latent][promoted >= 0].tolist()),
            "neg_str": self.overview.vocabulary.of(suppressed[suppressed >= 0]),
            "neg_values": rounded(table.suppressed_logit[latent][suppressed >= 0].tolist()),
            "frac_nonzero": int(table.fired[latent]) / table.n_tokens,
            "freq_hist_data_bar_heights": heights,
            "freq_hist_data_bar_values": rounded(middles),
        }

    def activations(self, latents: range) -> Iterator[dict[str, Any]]:
        table, sizes = self.table, self.overview.sizes
        tops, strata = (self.overview.shown(examples.of(latents)) for examples in (table.top, table.strata))
        for place, latent in enumerate(latents):
            top = tops[place * sizes.top :][: sizes.top]
            yield from self._activations(latent, "top", top, -1, float(table.largest[latent]), -1)
            for stratum, (low, high) in enumerate(self.bounds[latent]):
                first = (place * sizes.strata + stratum) * sizes.of_stratum
                examples, share = strata[first : first + sizes.of_stratum], self.shares[latent][stratum]
                yield from self._activations(latent, str(stratum), examples, low, high, share)

    def _activations(
        self, latent: int, group: str, examples: Sequence[Shown | None], low: float, high: float, share: float
    ) -> Iterator[dict[str, Any]]:
        for n, example in enumerate(examples):
            if example is None:
                return
            values = rounded(example.values)
            identity = json.dumps([self.model, self.source, latent, group, n]).encode()
            yield {
                "id": "c" + hashlib.sha256(identity).hexdigest()[:24],
                "tokens": example.tokens,
                "index": str(latent),
                "layer": self.source,
                "modelId": self.model,
                "dataIndex": None,
                "dataSource": None,
                "maxValue": max(values),
                "maxValueTokenIndex": max(range(len(values)), key=example.values.__getitem__),
                "minValue": min(values),
                "values": values,
                "dfaValues": [],
                "dfaTargetIndex": None,
                "dfaMaxValue": None,
                "creatorId": CREATOR,
                "createdAt": self.created,
                "lossValues": [],
                "logitContributions": None,
                "binMin": round(low, 5),
                "binMax": round(high, 5),
                "binContains": share,
                "qualifyingTokenIndex": example.at,
            }


_EMPTY = (
    *("neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1"),
    *("correlated_neurons_indices", "correlated_neurons_pearson", "correlated_neurons_l1"),
    *("correlated_features_indices", "correlated_features_pearson", "correlated_features_l1"),
    *("logits_hist_data_bar_heights", "logits_hist_data_bar_values", "decoder_weights_dist"),
)


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _write_plain(path: Path, line: dict[str, Any]) -> Path:
    with atomic_write(path) as temporary:
        temporary.write_bytes(_line(line))
    return path


def _write_gzip(path: Path, lines: Iterator[dict[str, Any]]) -> Path:
    """The same lines always give the same bytes."""
    with (
        atomic_write(path) as temporary,
        open(temporary, "wb") as raw,
        gzip.GzipFile("", "wb", 5, raw, mtime=0) as packed,
        io.BufferedWriter(packed) as out,  # pyright: ignore[reportArgumentType]
    ):
        for line in lines:
            out.write(_line(line))
    return path
