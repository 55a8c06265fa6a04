"""`gemmascope study`: Gemma Scope's studies of any SAEs, each from where it was left, in one folder.

    SAEs, model, text → what a study asks for → rows → NAME.csv, NAME.json

What a study needs is measured in pieces, every one a stage of a `runs.Run`, as `gemmascope evaluate` does it; figures
of an evaluation are read where one of the same SAEs on the same text is at hand.
"""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..activations import read_documents
from ..activations.packing import is_held_out
from ..checks import check_type, dtype_name
from ..errors import BadFileError, EnvironmentProblemError
from ..evaluation.bootstrap import LEVEL, Bootstrap
from ..evaluation.figures import SUFFIXES, added
from ..evaluation.language_model import rows_of_a_forward
from ..evaluation.protocol import Subject, Sums, measure
from ..evaluation.site_moments import SiteMoments
from ..evaluation.token_sets import MarkedText
from ..formats.files import atomic_write, read_json, write_json
from ..kernels import choose
from ..reporting.results import RESULTS, read_frequencies
from ..runs import Run, key_of
from ..sites import Site
from ..sites.decoder import find_decoder
from ..studies import STUDIES, Finding, Listed, Study, csv_of
from ..studies.common import Conversations
from ..studies.uniformity import attribution_sums
from ..version import __version__
from .blocks import Blocks, Measure, groups_that_fit, moments_of
from .config import ModelSection
from .conversations import ROLES, Markers, conversation_rows
from .evaluate import Task, warnings_of
from .judged import JUDGED_EVERY, EvaluateConfig, Place, Sources, find_places, load_named, read_texts, say_what_changed
from .model import Loaded, as_device, environment
from .prepare import TOKENS, say
from .stopping import Stop, Stopped, stopping

ALL = "all"
EVALUATION, BLOCKS = "evaluation", "blocks"
WITHOUT_OUTLIERS = "-no-outliers"
On = Literal["model", "second", "float32", "bfloat16"]


@dataclass(frozen=True)
class StudyConfig(EvaluateConfig):
    """What to study, and on what: as `EvaluateConfig`, by default into ``studies`` in the folder of the run.

    second_model: of the shape and the vocabulary of the model, for the study `transfer`. without_outliers: of the text
    the tokens that are no outliers at the site, as an SAE trained with ``drop_norm`` has seen them.
    """

    FOLDER: ClassVar[str] = "studies"

    second_model: ModelSection | None = None
    without_outliers: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_type("without_outliers", self.without_outliers, bool)
        if self.second_model is not None:
            check_type("second_model", self.second_model, ModelSection)

    def called(self, study: str) -> str:
        """The name of what is left of it: of all tokens and of those without outliers beside one another."""
        return f"{study}{WITHOUT_OUTLIERS}" if self.without_outliers else study


@dataclass(frozen=True)
class Studied:
    """done: by name of study, the contents of its JSON. left_out: by name, what was missing for it."""

    done: Mapping[str, Mapping[str, Any]]
    left_out: Mapping[str, str]


def study_saes(
    names: Sequence[str],
    config: StudyConfig,
    *,
    fresh: bool = False,
    on_study: Callable[[str, Mapping[str, Any]], Any] = lambda name, found: None,
) -> Studied | None:
    """Make the studies ``names`` of the SAEs of ``config``, "all" for those that can be made, and write NAME.csv and
    NAME.json into its folder.

    fresh: start over instead of going on. on_study: called with NAME, as of `StudyConfig.called`, and the contents of
    the JSON of each that is done. The first SIGINT, SIGTERM or SIGHUP ends it and returns None; the same call goes on
    from there, to the same bits. The JSON has ``rows`` of the columns `studies.COLUMNS`, ``conclusion``, ``plot``,
    ``seed``, ``version`` and what the text is.

    Raises ValueError for a study that there is not, one named that lacks something, and all that `evaluate_saes` does.
    """
    check_type("config", config, StudyConfig)
    wanted = _studies(names)
    sources = Sources.of(config.saes)
    with Run(config.folder, fresh, kind="study") as run, stopping() as stop:
        try:
            work = _Work(config, sources, run, stop, fresh)
            left_out = {study.name: why for study in wanted if (why := _lacks(study, config, work)) is not None}
            for name, why in left_out.items():
                if ALL not in names:
                    raise ValueError(f"{name}: {why}")
            done = {}
            for study in wanted:
                if study.name not in left_out:
                    done[study.name] = work.made(study)
                    on_study(config.called(study.name), done[study.name])
            return Studied(done, left_out)
        except Stopped:
            say(f"{config.folder}: stopped; the same command goes on from there")
            return None


def _lacks(study: Study, config: StudyConfig, work: "_Work") -> str | None:
    if study.of_all_tokens and config.without_outliers:
        return "it counts all tokens, outliers too: leave --no-outliers out"
    return study.lacks(work)


def _studies(names: Sequence[str]) -> list[Study]:
    if isinstance(names, str) or not names:
        raise ValueError(f"names: expected a list of {', '.join(STUDIES)} or {ALL}, got {names!r}")
    for name in names:
        if name not in (*STUDIES, ALL):
            raise ValueError(f"study: expected {', '.join(STUDIES)} or {ALL}, got {name!r}")
    return [study for name, study in STUDIES.items() if name in names or ALL in names]


class _Work:
    """A `studies.Work` whose sums are stages of a run."""

    def __init__(self, config: StudyConfig, sources: Sources, run: Run, stop: Stop, fresh: bool):
        self._config, self._run_sources, self._run, self._stop, self._fresh = config, sources, run, stop, fresh
        self._started = time.monotonic()
        self._device = as_device(config.device)
        self._loaded = sources.model(config, self._device)
        self._places = find_places(config, sources, self._loaded)
        self._texts = read_texts(config, sources, self._loaded, run.folder / TOKENS, config.control_tokens)
        self._ratio = sources.outlier_ratio(config)
        self._set = "inliers" if config.without_outliers else "text"
        impl = choose(config.impl, self._device, torch.float32).impl
        self._environment = environment(self._device) | {"impl": impl}
        self._others: dict[str, Loaded] = {}
        self._blocks: list[Blocks] = []
        self._saes = tuple(
            Listed(place.name, facts["site"], facts["layer"], facts["width"], facts["kind"], place.writes)
            for place, facts in ((place, place.facts) for place in self._places)
        )

    # ---- what a study asks for

    @property
    def model(self) -> str:
        return self._loaded.name

    @property
    def saes(self) -> Sequence[Listed]:
        return self._saes

    @property
    def text(self) -> MarkedText:
        return self._texts.judged

    @property
    def second_model(self) -> str | None:
        return None if self._config.second_model is None else self._second.name

    def sources(self) -> Mapping[int, str]:
        return self._sources

    def bootstrap(self, documents: int) -> Bootstrap:
        return Bootstrap(documents, draws=self._config.draws, seed=self._config.seed)

    def evaluation(self) -> Mapping[str, Mapping[str, Any]]:
        rows = {row["name"]: row for row in self._evaluated[1]["saes"]}
        ending = SUFFIXES[self._set]
        if not ending:
            return rows
        return {
            name: row | {key: row[key + ending] for key in row if key + ending in row} for name, row in rows.items()
        }

    def frequencies(self) -> Mapping[str, Tensor]:
        return {name: torch.from_numpy(each) for name, each in read_frequencies(self._evaluated[0]).items()}

    def sums(
        self, name: str, text: MarkedText | None = None, *, on: On = "model", sae_dtype: torch.dtype | None = None
    ) -> Sums:
        loaded, given = self._on(on), self.text if text is None else text
        moments = self._moments(loaded, given)

        def measured(rows: slice, subjects: Sequence[Subject], sites: Sequence[Site]) -> Sums:
            return measure(loaded.model, given.rows(rows), subjects, moments, ablations=sites, sets=(self._set,))

        dtype = None if sae_dtype is None else dtype_name(sae_dtype)
        settings = [loaded.identity, key_of(self._texts.train), self._ratio, self._set, dtype]
        return self._summed(name, settings, loaded, given, measured, sae_dtype)

    def attributions(self, name: str, columns: Tensor) -> Sums:
        loaded, given, seed = self._loaded, self.text, self._config.seed

        def measured(rows: slice, subjects: Sequence[Subject], sites: Sequence[Site]) -> Sums:
            return attribution_sums(loaded.model, given.rows(rows), columns[rows], subjects, seed)

        return self._summed(name, [loaded.identity, key_of(columns), seed], loaded, given, measured)

    def conversations(self) -> Conversations:
        plain = Conversations(self.text, torch.zeros_like(self.text.tokens), ("text",))
        markers = Markers.of(self._second.tokenizer)
        if markers is None or not self._config.text:
            return plain
        documents = (
            each for each in enumerate(read_documents(list(self._config.text))) if is_held_out(each[1], JUDGED_EVERY)
        )
        context, most = self.text.tokens.shape[1], self._config.sequences
        tokens, owners, roles = conversation_rows(documents, self._loaded.tokenizer, markers, context, most)
        if not len(tokens):
            return plain
        return Conversations(MarkedText.of(self._second.model, tokens, owners), roles, ROLES)

    # ---- how it is measured

    def made(self, study: Study) -> dict[str, Any]:
        """The contents of NAME.json, written where they were not there."""
        identities = [self._loaded.identity] + ([self._second.identity] if study.needs_second else [])
        which = [[place.name, str(place.reads), str(place.writes), place.content] for place in self._places]
        config = self._config
        settings, name = [identities, self._environment, self._texts.content, self._ratio], config.called(study.name)
        stage = self._run.stage(name, settings, which, config.draws, config.seed, config.control_tokens)
        table, path = (self._run.folder / f"{name}.{ending}" for ending in ("csv", "json"))
        if stage.done():
            say(f"{path}: made before; start over with --fresh")
            return read_json(path)
        say_what_changed(path, self._environment)
        finding = study.run(self)
        self._stop.check()
        with stage.doing():
            found = self._contents(study, finding)
            write_json(path, found)
            with atomic_write(table) as temporary:
                temporary.write_text(csv_of(finding.rows), encoding="utf-8")
            stage.keep(path, table)
        while self._blocks:
            self._blocks.pop().clear()
        return found

    def _contents(self, study: Study, finding: Finding) -> dict[str, Any]:
        without = f"without tokens of over {self._ratio:g} times the median norm" if self._set == "inliers" else ""
        found = {
            "study": study.name,
            "question": study.question,
            "source": study.source,
            "conclusion": finding.conclusion + (f"; {without}" if without else ""),
            "model": self.model,
            "second_model": self.second_model if study.needs_second else None,
            "text": dict(self._texts.facts),
            "seed": self._config.seed,
            "draws": self._config.draws,
            "level": LEVEL,
            "outlier_ratio": self._ratio,
            "tokens": self._set,
            "version": __version__,
            "environment": self._environment,
            "warnings": warnings_of(self._config, self._texts, self._places, self._loaded),
            "plot": dataclasses.asdict(study.plot) | {"title": study.plot.title + (", no outliers" if without else "")},
            "facts": finding.facts,
            "rows": finding.rows,
        }
        return _jsonable(found)

    def _summed(
        self,
        name: str,
        settings: Sequence[Any],
        loaded: Loaded,
        text: MarkedText,
        measured: Measure,
        dtype: torch.dtype | None = None,
    ) -> Sums:
        content = key_of(text.tokens, text.documents, text.is_text)
        rows = rows_of_a_forward(loaded.model, text.tokens.shape[1])
        groups = groups_that_fit(self._places, self._config.max_sae_bytes)
        every = [settings, self._environment, content]
        blocks = Blocks(self._run, self._stop, f"{BLOCKS}/{self._config.called(name)}", every, text, rows, groups)
        self._blocks.append(blocks)

        def load(place: Place) -> Subject:
            return place.subject(self._device, self._config.impl, dtype)

        return added(blocks.sums(name, load, measured), text.documents)

    def _moments(self, loaded: Loaded, text: MarkedText) -> dict[Site, SiteMoments]:
        sites = list(dict.fromkeys(place.writes for place in self._places))
        content = key_of(self._texts.train, text.tokens, text.documents >= 0, text.is_text)
        settings = [loaded.identity, self._environment, content, self._ratio]
        given = (loaded.model, self._texts.train, text, sites, self._ratio)
        return moments_of(self._run, self._stop, f"moments/{key_of(settings)}", settings, *given)

    @cached_property
    def _sources(self) -> dict[int, str]:
        numbers = self.text.documents[self.text.documents >= 0].unique().tolist()
        named = self._texts.rows.document_names(numbers)
        return {number: source for number, (source, _) in zip(numbers, named, strict=True)}

    @cached_property
    def _evaluated(self) -> tuple[Path, dict[str, Any]]:
        """Folder and results of an evaluation: one that is there already, else one in the folder of the studies."""
        folder = self._config.beside(EVALUATION)
        if os.path.lexists(folder / RESULTS):
            with suppress(BadFileError, EnvironmentProblemError), Run(folder, kind="evaluation") as run:
                if (found := self._evaluation_in(run).finished()) is not None:
                    say(f"{folder}: read, it is of the same SAEs and text")
                    return folder, found
        folder = self._run.folder / EVALUATION
        with Run(folder, self._fresh, kind="evaluation") as run:
            return folder, self._evaluation_in(run).results(self._started)

    def _evaluation_in(self, run: Run) -> Task:
        return Task(self._config, self._loaded, self._places, self._texts, run, self._stop, self._ratio)

    def _on(self, on: On) -> Loaded:
        if on == "second":
            return self._second
        if on == "model" or self._loaded.identity["dtype"] == on:
            return self._loaded
        if on not in self._others:
            self._others[on] = self._run_sources.model(self._config, self._device, on)
        return self._others[on]

    @cached_property
    def _second(self) -> Loaded:
        section = self._config.second_model
        assert section is not None
        found, own = load_named(section, self._device), self._loaded
        for place in self._places:
            for site in (place.reads, place.writes):
                if site.layer >= len(find_decoder(found.model).layers) or found.width(site) != own.width(site):
                    raise ValueError(f"second_model: expected the shape of {own.name}, found another one at {site}")
        if found.tokenizer.get_vocab() != own.tokenizer.get_vocab():
            raise ValueError(f"second_model: expected the vocabulary of {own.name}, found another one")
        return found


def _jsonable(value: Any) -> Any:
    """None in the place of what is not finite, lists and dicts."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _jsonable(each) for name, each in value.items()}
    return [_jsonable(each) for each in value] if isinstance(value, (list, tuple)) else value
