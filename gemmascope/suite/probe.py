"""`gemmascope probe`: k-sparse probes of SAEs beside those of the activations, in a folder of its own, from where it
was left.

    text and labels → activations of the sites → probes of each site and each SAE → results.json

The probes of a site, and those of an SAE, are a stage of a `runs.Run` each: what is killed goes on with the next one,
to the same figures. One forward of the model gives the activations of as many sites as memory holds.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..activations import harvest
from ..checks import check_int, check_type
from ..evaluation.bootstrap import LEVEL, Bootstrap
from ..evaluation.site_moments import FORWARD_TOKENS
from ..evaluation.suite import MAX_BYTES
from ..formats.files import as_path, read_json, write_json
from ..kernels import choose
from ..probing import (
    KS,
    DenseFeatures,
    Features,
    LatentFeatures,
    Score,
    Split,
    Task,
    probe_task,
    random_dictionary,
    split_by_document,
)
from ..reporting.probing import PROBES, VERSION
from ..reporting.progress import StageProgress
from ..reporting.results import FINISHED, RESULTS
from ..runs import Run, Stage
from ..sites import Site
from ..sites.decoder import find_decoder
from .judged import JudgedConfig, Place, Sources, find_places, say_what_changed, stated_otherwise
from .labelled import LabelledText, read_labelled
from .model import Loaded, as_device, environment
from .prepare import say
from .stopping import Stop, Stopped, stopping

PROBED_TOKENS, SPLITS, PROBE_DRAWS = 1 << 16, 3, 200
# Tokens that an SAE encodes at a time.
ENCODED = 4096


@dataclass(frozen=True)
class ProbeConfig(JudgedConfig):
    """What to probe, and for which labels, as of `JudgedConfig`; the results are in ``probing``.

    labels: a .jsonl file of texts and labels, see `labelled.read_labels`, in the place of the text and of the labels
    that it gives of itself. ks: how many latents probes read. splits: of the documents, by ``seed`` and those after it.
    tokens: of text, at most. draws: of the bootstrap.
    """

    FOLDER: ClassVar[str] = "probing"

    draws: int = PROBE_DRAWS
    labels: str | os.PathLike | None = None
    ks: Sequence[int] = KS
    splits: int = SPLITS
    tokens: int = PROBED_TOKENS

    def __post_init__(self):
        super().__post_init__()
        if self.labels is not None:
            as_path("labels", self.labels)
            if self.text:
                raise ValueError("text: expected none beside labels, whose file has the texts, got some")
        if isinstance(self.ks, (str, bytes)) or not isinstance(self.ks, Sequence):
            raise TypeError(f"ks: expected a list of ints, got {type(self.ks).__name__}")
        if not self.ks or list(self.ks) != sorted(set(self.ks)):
            raise ValueError(f"ks: expected at least one, ascending, got {list(self.ks)}")
        for k in self.ks:
            check_int("ks", k, 1)
        check_int("draws", self.draws, 2)
        check_int("splits", self.splits, 1, 1000)
        check_int("tokens", self.tokens, 1)


def probe_saes(config: ProbeConfig, *, fresh: bool = False) -> dict[str, Any] | None:
    """Probe the SAEs of ``config``, and return the results, also written to results.json in its folder.

    fresh: start over instead of going on. The first SIGINT, SIGTERM or SIGHUP ends it and returns None; the same call
    goes on from there, to the same figures.

    The results have ``rows``, one for each SAE or site, probe, task and k: ``sae`` (of a site None), ``probe``, one of
    `reporting.probing.PROBES`, ``task``, ``of``, ``k`` (of all columns None) and the figures of `probing.Score`; and
    ``saes``, one for each SAE, with the means over the tasks by k.

    Raises ValueError for an SAE that does not fit the model, for text that gives no label both of whose classes have
    enough rows, and for settings that contradict one another; BadFileError for files that are none of an SAE or of
    labels; EnvironmentProblemError as `Run` and `load_model`.
    """
    check_type("config", config, ProbeConfig)
    sources = Sources.of(config.saes)
    started = time.monotonic()
    with Run(config.folder, fresh, kind="probing") as work, stopping() as stop:
        try:
            return _probe(config, sources, work, stop, started)
        except Stopped:
            say(f"{config.folder}: stopped; the same command goes on from there")
            return None


def _probe(config: ProbeConfig, sources: Sources, work: Run, stop: Stop, started: float) -> dict[str, Any]:
    loaded = sources.model(config, as_device(config.device))
    places = find_places(config, sources, loaded)
    text = read_labelled(config, sources, loaded, work.folder, config.tokens, config.labels)
    task = _Probing(config, loaded, places, text, work, stop)
    which = [[place.name, str(place.reads), place.content, dict(place.facts)] for place in places]
    finished = work.stage(FINISHED, task.settings, which)
    if finished.done():
        say(f"{work.folder}: finished before; start over with --fresh")
        return read_json(work.folder / RESULTS)
    say_what_changed(work.folder / RESULTS, task.environment)
    rows, l0 = task.rows()
    with finished.doing():
        results = {
            "title": f"Probes on {loaded.name}",
            "version": VERSION,
            "seed": config.seed,
            "model": _model_facts(loaded, text),
            "saes": [_row_of(place, l0[place.name], rows) for place in places],
            "rows": rows,
            "probing": {
                "ks": list(config.ks),
                "splits": config.splits,
                "draws": config.draws,
                "level": LEVEL,
                "tasks": [{"name": each.name, "of": each.of, **_sizes(each)} for each in task.tasks],
                "left_out": task.left_out,
                "model": dict(loaded.identity),
            },
            "warnings": [*text.warnings, *task.warnings(rows), *stated_otherwise(places, loaded)],
            "environment": task.environment,
            "seconds": {"this_run": round(time.monotonic() - started, 1)},
        }
        write_json(work.folder / RESULTS, results)
        finished.keep(work.folder / RESULTS)
    return results


def _sizes(task: Task) -> dict[str, int]:
    return {"rows": int(task.known.sum()), "positive": int((task.labels & task.known).sum())}


class _Probing:
    """The stages: tasks and their splits, and the probes of every site and SAE."""

    def __init__(
        self, config: ProbeConfig, loaded: Loaded, places: Sequence[Place], text: LabelledText, work: Run, stop: Stop
    ):
        self.config, self.loaded, self.places, self.text = config, loaded, tuple(places), text
        self.work, self.stop = work, stop
        self.device = as_device(config.device)
        impl = choose(config.impl, self.device, torch.float32).impl
        self.environment = environment(self.device) | {"impl": impl}
        self.owners = {"tokens": text.owners[text.sample], "documents": torch.arange(text.documents)}
        self.tasks, self.splits, self.left_out = self._split()
        self.bootstrap = Bootstrap(text.documents, draws=config.draws, seed=config.seed)
        numbers = [list(config.ks), config.splits, config.draws, config.seed]
        self.settings = [loaded.identity, self.environment, text.content, numbers]

    def _split(self) -> tuple[list[Task], dict[str, list[Split]], dict[str, str]]:
        tasks, splits, left_out = [], {}, {}
        for task in self.text.tasks:
            found: list[Split] = []
            for number in range(self.config.splits):
                split = split_by_document(task, self.owners[task.of], self.config.seed + number)
                if isinstance(split, str):
                    left_out[task.name] = split
                    break
                found.append(split)
            else:
                tasks.append(task)
                splits[task.name] = found
        if not tasks:
            why = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
            raise ValueError(f"text: expected labels both of whose classes have enough rows, got none ({why})")
        return tasks, splits, left_out

    def rows(self) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """All rows of results, and the L0 of each SAE on the text."""
        found: dict[Site | str, list[dict[str, Any]]] = {}
        l0: dict[str, float] = {}
        sites = list(dict.fromkeys(place.reads for place in self.places))
        with StageProgress("Probes", len(sites) + len(self.places), "SAE or site") as bar:
            for group in self._sites_that_fit(sites):
                x: Mapping[Site, Tensor] | None = None
                for subject in [*group, *(place for place in self.places if place.reads in group)]:
                    self.stop.check()
                    stage = self._stage(subject)
                    if not stage.done():
                        if x is None:
                            x = self._harvested(group)
                        with stage.doing():
                            self._fill(stage, subject, x)
                    key = subject.name if isinstance(subject, Place) else subject
                    found[key] = stage.facts["rows"]
                    if isinstance(subject, Place):
                        l0[subject.name] = stage.facts["l0"]
                    bar.update(len(found), str(key))
        order = [*sites, *(place.name for place in self.places)]
        return [row for key in order for row in found[key]], l0

    def _stage(self, subject: Place | Site) -> Stage:
        if isinstance(subject, Site):
            return self.work.stage(f"site {subject}", self.settings)
        return self.work.stage(f"sae {subject.name}", self.settings, str(subject.reads), subject.content)

    def _fill(self, stage: Stage, subject: Place | Site, x: Mapping[Site, Tensor]) -> None:
        if isinstance(subject, Site):
            dense = DenseFeatures(x[subject])
            documents = dense.by_document(self.text.owners, self.text.documents)
            features: dict[str, Features] = {
                "tokens": DenseFeatures(dense.x[self.text.sample]),
                "documents": documents,
            }
            rows = self._probed(features, [None])
            stage.facts["rows"] = [
                *_rows(rows, None, "dense", subject),
                *_rows(self._probed(features, self.config.ks), None, "neurons", subject),
            ]
            return
        site = subject.reads
        sae = subject.subject(self.device, self.config.impl).sae
        latents = self._latents(sae, x[site])
        l0 = stage.facts["l0"] = len(latents.values) / len(latents)
        rows = list(_rows(self._probed(self._both(latents), self.config.ks), subject.name, "latents", site))
        if l0 > 0:
            random = random_dictionary(self._training_tokens(x[site]), latents.width, l0, self.config.seed)
            random.impl = self.config.impl
            chance = self._latents(random.to(self.device), x[site])
            rows += _rows(self._probed(self._both(chance), self.config.ks), subject.name, "random", site)
        stage.facts["rows"] = rows

    def _training_tokens(self, x: Tensor) -> Tensor:
        """Those of the documents that the first split of the first task trains on."""
        task = self.tasks[0]
        trained = self.owners[task.of][self.splits[task.name][0].train].unique()
        return x[torch.isin(self.text.owners, trained)]

    def _latents(self, sae: Any, x: Tensor) -> LatentFeatures:
        rows, latents, values = [], [], []
        with torch.no_grad():
            for start in range(0, len(x), ENCODED):
                self.stop.check()
                code = sae.encode_sparse(x[start : start + ENCODED].to(sae.W_dec))
                rows.append(code.token_indices().long().cpu() + start)
                latents.append(code.indices.long().cpu())
                values.append(code.values.float().cpu())
        return LatentFeatures(torch.cat(rows), torch.cat(latents), torch.cat(values), len(x), sae.d_sae)

    def _both(self, latents: LatentFeatures) -> dict[str, Features]:
        found: dict[str, Features] = {}
        if any(task.of == "tokens" for task in self.tasks):
            found["tokens"] = latents.of(self.text.sample)
        if any(task.of == "documents" for task in self.tasks):
            found["documents"] = latents.by_document(self.text.owners, self.text.documents)
        return found

    def _probed(
        self, features: Mapping[str, Features], ks: Sequence[int | None]
    ) -> Iterator[tuple[Task, int | None, Score]]:
        for task in self.tasks:
            self.stop.check()
            scores = probe_task(
                features[task.of], task, self.owners[task.of], self.splits[task.name], ks, self.bootstrap
            )
            for k, score in scores.items():
                yield task, k, score

    def _sites_that_fit(self, sites: Sequence[Site]) -> Iterator[list[Site]]:
        tokens = int(self.text.text.is_text.sum())
        group: list[Site] = []
        size = 0
        for site in sites:
            new = self.loaded.width(site) * 4 * tokens
            if group and size + new > MAX_BYTES:
                yield group
                group, size = [], 0
            group.append(site)
            size += new
        yield group

    def _harvested(self, sites: Sequence[Site]) -> Mapping[Site, Tensor]:
        """Activations of every token of text, [tokens, width] fp32 on the CPU."""
        text = self.text.text
        mask = text.documents >= 0
        mask[:, 0] = True
        # What is masked is at the end of a row, and no token before it looks there.
        found = harvest(
            self.loaded.model,
            text.tokens,
            sites,
            attention_mask=mask.long(),
            batch_size=max(1, FORWARD_TOKENS // text.tokens.shape[1]),
        )
        return {site: x[text.is_text[found.kept]] for site, x in found.items()}

    def warnings(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        found = [f"{name}: not probed, {why}" for name, why in self.left_out.items()]
        unfinished = sum(not row["converged"] for row in rows)
        if unfinished:
            found.append(f"probes that did not come to their minimum: {unfinished} of {len(rows)}")
        return found


def _rows(scored: Any, sae: str | None, probe: str, site: Site) -> Iterator[dict[str, Any]]:
    assert probe in PROBES
    for task, k, score in scored:
        yield {
            "sae": sae,
            "probe": probe,
            "site": site.kind,
            "layer": site.layer,
            "task": task.name,
            "of": task.of,
            "k": k,
            **{name: list(value) if isinstance(value, tuple) else value for name, value in asdict(score).items()},
        }


def _row_of(place: Place, l0: float, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The row of an SAE: what it is, and for each probe the mean over the tasks, by k as text, ``all`` for all."""
    own = {"name": place.name, **place.facts, "site": place.reads.kind, "layer": place.reads.layer, "l0": l0}
    for figure in ("balanced_accuracy", "auc"):
        for probe in PROBES:
            of_probe = [
                row
                for row in rows
                if row["probe"] == probe
                and (row["sae"] == place.name or (row["sae"] is None and _site_of(row) == place.reads))
            ]
            by_k: dict[str, list[float]] = {}
            for row in of_probe:
                by_k.setdefault("all" if row["k"] is None else str(row["k"]), []).append(row[figure])
            own[f"{probe}_{figure}"] = {k: sum(values) / len(values) for k, values in by_k.items()}
    return own


def _site_of(row: Mapping[str, Any]) -> Site:
    return Site(row["layer"], row["site"])


def _model_facts(loaded: Loaded, text: LabelledText) -> dict[str, Any]:
    architecture, facts = find_decoder(loaded.model).config, text.facts
    return {
        "name": loaded.name,
        "layers": architecture.num_hidden_layers,
        "d_model": architecture.hidden_size,
        **facts,
        "held_out": f"{facts['sequences']:,} of {facts['sequences_there']:,} rows, of {facts['documents']:,} documents",
    }
