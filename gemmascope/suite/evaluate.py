"""`gemmascope evaluate`: SAEs of any kind by Gemma Scope's protocol, in a folder of its own, from where it was left.

    text → means of the sites → blocks of rows → sums → controls → results.json

Each arrow is a stage, or many, of a `runs.Run`: every block is one, so that what is killed goes on with the next block,
to the same bits. SAEs that do not fit into memory together are judged a group at a time; the model's forward without
SAEs is made once a group, the ablations once a site.
"""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_type
from ..evaluation.bootstrap import LEVEL, Bootstrap
from ..evaluation.controls import ControlTokens, controls
from ..evaluation.figures import Figures, added, plain
from ..evaluation.language_model import rows_of_a_forward
from ..evaluation.protocol import Sums, measure
from ..evaluation.site_moments import SiteMoments
from ..evaluation.suite import MAX_BYTES
from ..formats.files import read_json, write_json
from ..kernels import choose
from ..reporting.progress import StageProgress
from ..reporting.results import FINISHED, FREQUENCIES, RESULTS, write_frequencies
from ..runs import Run, Stage
from ..sites import Site
from ..sites.decoder import find_decoder
from .blocks import Blocks, groups_that_fit, moments_of
from .judged import EvaluateConfig, Place, Sources, Texts, find_places, read_texts, say_what_changed, stated_otherwise
from .model import Loaded, as_device, environment
from .prepare import TOKENS, say
from .stopping import Stop, Stopped, stopping

BLOCKS = "blocks"
MOMENTS = "moments"


def evaluate_saes(config: EvaluateConfig, *, fresh: bool = False) -> dict[str, Any] | None:
    """Judge the SAEs of ``config``, and return the results, also written to results.json in its ``out``.

    fresh: start over instead of going on. The first SIGINT, SIGTERM or SIGHUP ends it and returns None; the same call
    goes on from there, to the same figures, bit for bit.

    The results have a row for each SAE, in their order: ``name``, ``site``, ``layer``, ``width``, ``kind``, the recipe
    as far as it is known, the figures of `evaluation.figures.Figures` and of `evaluation.controls.controls`, and γ =
    ‖mean‖/‖std‖ of its site as ``gamma``. What is undefined is None. frequencies.npz beside them holds the firing
    frequency of every latent.

    Raises ValueError for an SAE that does not fit the model, text that is too short and settings that contradict one
    another; BadFileError for files that are none of an SAE; EnvironmentProblemError as `Run` and `load_model`.
    """
    check_type("config", config, EvaluateConfig)
    sources = Sources.of(config.saes)
    out = config.folder
    started = time.monotonic()
    with Run(out, fresh, kind="evaluation") as work, stopping() as stop:
        try:
            return _evaluate(config, sources, work, stop, started)
        except Stopped:
            say(f"{out}: stopped; the same command goes on from there")
            return None


def _evaluate(config: EvaluateConfig, sources: Sources, work: Run, stop: Stop, started: float) -> dict[str, Any]:
    device = as_device(config.device)
    loaded = sources.model(config, device)
    places = find_places(config, sources, loaded)
    texts = read_texts(config, sources, loaded, work.folder / TOKENS, config.control_tokens)
    task = Task(config, loaded, places, texts, work, stop, sources.outlier_ratio(config))
    return task.results(started)


def _identity(place: Place) -> list[Any]:
    return [place.name, str(place.reads), str(place.writes), place.content, dict(place.facts)]


class Task:
    """The stages of an evaluation."""

    def __init__(
        self,
        config: EvaluateConfig,
        loaded: Loaded,
        places: Sequence[Place],
        texts: Texts,
        work: Run,
        stop: Stop,
        outlier_ratio: float,
    ):
        self.config, self.loaded, self.places, self.texts = config, loaded, tuple(places), texts
        self.work, self.stop, self.outlier_ratio = work, stop, outlier_ratio
        self.device = as_device(config.device)
        impl = choose(config.impl, self.device, torch.float32).impl
        self.environment = environment(self.device) | {"impl": impl}
        self.settings = [loaded.identity, self.environment, texts.content, outlier_ratio, config.control_tokens]

    def finished(self) -> dict[str, Any] | None:
        """The results, where they are there."""
        if not self._finished().done():
            return None
        self.clear()
        return read_json(self.work.folder / RESULTS)

    def results(self, started: float) -> dict[str, Any]:
        """The results, written where they were not there. started: when this process began, of the monotonic clock."""
        if (before := self.finished()) is not None:
            say(f"{self.work.folder}: finished before; start over with --fresh")
            return before
        say_what_changed(self.work.folder / RESULTS, self.environment)
        moments = self.moments()
        sums = added(self.blocks(moments), self.texts.judged.documents)
        figures = Figures(sums, Bootstrap(len(sums["documents"]), draws=self.config.draws, seed=self.config.seed))
        found = {place.name: figures.of(place.name, place.writes) for place in self.places}
        beside = self.controls(moments, {name: each["l0"] for name, each in found.items()})
        self.stop.check()
        finished = self._finished()
        with finished.doing():
            rows = []
            for place in self.places:
                site = moments[place.writes]
                of_site = {"median_norm": site.median_norm, "outlier_norm": site.max_norm}
                of_site |= figures.gamma(place.name, site.means)
                own = {"name": place.name, **place.facts}
                rows.append(own | plain(found[place.name] | beside[place.name] | of_site))
            results = self._summary(figures, rows, started)
            write_json(self.work.folder / RESULTS, results)
            frequencies = {place.name: figures.frequency(place.name).float() for place in self.places}
            write_frequencies(self.work.folder, frequencies)
            finished.keep(self.work.folder / RESULTS, self.work.folder / FREQUENCIES)
        self.clear()
        return results

    def _finished(self) -> Stage:
        which = [_identity(place) for place in self.places]
        return self.work.stage(FINISHED, self.settings, which, self.config.draws, self.config.seed)

    def _summary(self, figures: Figures, rows: list[dict[str, Any]], started: float) -> dict[str, Any]:
        config, loaded, texts = self.config, self.loaded, self.texts
        return {
            "title": f"Evaluation on {loaded.name}",
            "model": _model_facts(loaded, texts, figures),
            "saes": rows,
            "evaluation": {
                "sequences": len(texts.judged.tokens),
                "context": texts.judged.tokens.shape[1],
                "outlier_ratio": self.outlier_ratio,
                "draws": config.draws,
                "seed": config.seed,
                "level": LEVEL,
                "control_tokens": config.control_tokens,
                "model": dict(loaded.identity),
            },
            "warnings": warnings_of(config, texts, self.places, loaded),
            "environment": self.environment,
            "seconds": {"this_run": round(time.monotonic() - started, 1)},
        }

    def moments(self) -> dict[Site, SiteMoments]:
        """Of every site that is written to."""
        sites = list(dict.fromkeys(place.writes for place in self.places))
        text, model = self.texts, self.loaded.model
        given = (model, text.train, text.judged, sites, self.outlier_ratio)
        return moments_of(self.work, self.stop, MOMENTS, self.settings, *given)

    def blocks(self, moments: Mapping[Site, SiteMoments]) -> Iterator[Sums]:
        """The sums of every block of every group."""
        model, text = self.loaded.model, self.texts.judged
        # Whole forwards of the model, so that none is cut short.
        rows = rows_of_a_forward(model, text.tokens.shape[1])
        groups = groups_that_fit(self.places, self.config.max_sae_bytes)
        return Blocks(self.work, self.stop, BLOCKS, self.settings, text, rows, groups).sums(
            "Evaluation",
            lambda place: place.subject(self.device, self.config.impl),
            lambda part, subjects, sites: measure(model, text.rows(part), subjects, moments, ablations=sites),
        )

    def clear(self) -> None:
        """Remove the sums of blocks, once the results are there."""
        shutil.rmtree(self.work.folder / BLOCKS, ignore_errors=True)

    def controls(self, moments: Mapping[Site, SiteMoments], l0: Mapping[str, float]) -> dict[str, dict[str, Any]]:
        """Those of every SAE by name; its activations are held for as many pairs of sites as fit, at least one."""
        pairs: dict[tuple[Site, Site], list[Place]] = {}
        for place in self.places:
            pairs.setdefault((place.reads, place.writes), []).append(place)
        found: dict[str, dict[str, Any]] = {}
        with StageProgress("Controls", len(self.places), "SAE") as bar:
            for group in self._pairs_that_fit(list(pairs)):
                stages = {pair: self._of_controls(pair, pairs[pair], l0) for pair in group}
                tokens = None
                for pair, stage in stages.items():
                    self.stop.check()
                    if not stage.done():
                        if tokens is None:
                            tokens = self._control_tokens([site for each in group for site in each])
                        with stage.doing():
                            of_pair = {place.name: (l0[place.name], place.facts["width"]) for place in pairs[pair]}
                            values = controls(tokens, *pair, of_pair, moments[pair[1]])
                            stage.facts["saes"] = {name: plain(each) for name, each in values.items()}
                    found |= stage.facts["saes"]
                    bar.update(len(found))
        return found

    def _of_controls(self, pair: tuple[Site, Site], places: Sequence[Place], l0: Mapping[str, float]) -> Stage:
        of_each = [[place.name, round(l0[place.name]), place.facts["width"]] for place in places]
        return self.work.stage(f"controls {pair[0]} {pair[1]}", self.settings, of_each)

    def _held_out(self) -> Tensor:
        """The rows that controls are judged on: all, or some spread over them."""
        tokens = self.texts.judged.tokens
        wanted = -(-self.config.control_tokens // tokens.shape[1])
        step = max(1, -(-len(tokens) // wanted))
        return tokens[::step]

    def _control_tokens(self, sites: Sequence[Site]) -> ControlTokens:
        unique = list(dict.fromkeys(sites))
        return ControlTokens(self.loaded.model, self.texts.train, self._held_out(), unique)

    def _pairs_that_fit(self, pairs: Sequence[tuple[Site, Site]]) -> Iterator[list[tuple[Site, Site]]]:
        tokens = self.texts.train.numel() + self._held_out().numel()
        group: list[tuple[Site, Site]] = []
        size = 0
        for pair in pairs:
            new = sum(self.loaded.width(site) for site in set(pair)) * 4 * tokens
            if group and size + new > MAX_BYTES:
                yield group
                group, size = [], 0
            group.append(pair)
            size += new
        yield group


# ---- results


def _model_facts(loaded: Loaded, texts: Texts, figures: Figures) -> dict[str, Any]:
    architecture = find_decoder(loaded.model).config
    n, there = texts.facts["sequences"], texts.facts["sequences_there"]
    return {
        "name": loaded.name,
        "layers": architecture.num_hidden_layers,
        "d_model": architecture.hidden_size,
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "loss": plain({"loss": figures.clean_loss})["loss"],
        **texts.facts,
        "predictions": figures.predictions,
        "held_out": f"{n:,} of {there:,} rows of {texts.facts['context']:,} tokens, "
        f"of {texts.facts['documents']:,} documents",
    }


def warnings_of(config: EvaluateConfig, texts: Texts, places: Sequence[Place], loaded: Loaded) -> list[str]:
    """What a reader of the figures should know of the text and the SAEs."""
    found = []
    if texts.facts["sequences"] < config.sequences:
        n = texts.facts["sequences"]
        found.append(f"judged on {n:,} rows of text, not on {config.sequences:,}: there are no more")
    if texts.facts["documents"] < 2:
        found.append("the text is of one document: there are no intervals")
    return found + stated_otherwise(places, loaded)
