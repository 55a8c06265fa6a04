"""`gemmascope ravel`: SAEs and controls by RAVEL, in a folder of its own, from where it was left.

    prompts → what the model knows → activations of the sites → interventions → results.json

Each arrow is a stage, or many, of a `runs.Run`: every training of an intervention is one. The layers before a site run
once, for the prompts that pairs are made of, whatever the number of SAEs.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..checks import check_choice, check_int, check_type
from ..evaluation.bootstrap import DRAWS, LEVEL
from ..evaluation.figures import plain
from ..formats.arrays import read_safetensors
from ..formats.files import as_path, atomic_write, read_json, write_json
from ..kernels import choose, dispatch
from ..ravel import (
    CONTROLS,
    FLOORS,
    Activations,
    Asked,
    Continuation,
    Entities,
    EntityData,
    Interchange,
    PairSet,
    Protocol,
    Reader,
    activations,
    answers,
    cities,
    entity_fvu,
    figures,
    floors,
    known,
    make_pairs,
    mean_figures,
    protocol_of,
    read_ravel,
    right_pairs,
    train_control,
    train_sae,
)
from ..ravel.continuation import Streams, stack_of
from ..ravel.knowledge import by_template
from ..ravel.methods import steps_of_method
from ..reporting.progress import StageProgress
from ..reporting.results import FINISHED, RESULTS
from ..runs import Run, Stage, key_of
from ..sites import Site
from ..sites.site import as_site
from .config import ModelSection
from .judged import Place, Sources, find_places, say_what_changed, stated_otherwise
from .model import Loaded, as_device, environment, load_model
from .prepare import say
from .stopping import Stop, Stopped, stopping

ACTIVATIONS, INTERVENTIONS = "activations", "interventions"
KINDS = ("resid", "mlp")
SEEDS = 1
MOST_TENSORS = 1 << 20
GPT2 = "gpt2"


@dataclass(frozen=True)
class RavelConfig:
    """What to judge, and how.

    saes: as `EvaluateConfig` has them; none for the controls alone. model: by default that of the run. sites: where the
    controls are tried where there are no SAEs; else the one site of every SAE, by default the one that each states. Of
    kinds resid and mlp. data: a folder of the benchmark's own files, by default the cities of this package, of which
    ``entity_type`` chooses. attributes: at least two of them, by default all. templates: of each attribute and split,
    at most. controls: some of `CONTROLS`. protocol: every other choice, see `gemmascope.ravel.protocol_of`. seeds: so
    many trainings of everything that is trained, from ``seed`` on. draws: of the bootstrap over entities. out: the
    folder of the results, by default ``ravel`` in that of the run, else ``runs/ravel``. device, impl: as there.

    Raises ValueError and TypeError naming the setting that is wrong.
    """

    saes: Sequence[str | os.PathLike] = ()
    model: ModelSection | None = None
    sites: Sequence[Site | str] = ()
    data: str | os.PathLike | None = None
    entity_type: str = "city"
    attributes: Sequence[str] = ()
    templates: int | None = None
    controls: Sequence[str] = CONTROLS
    protocol: Protocol = field(default_factory=lambda: protocol_of("ravel"))
    seeds: int = SEEDS
    seed: int = 0
    draws: int = DRAWS
    out: str | os.PathLike | None = None
    device: str = "auto"
    impl: str = "auto"

    def __post_init__(self):
        for name in ("saes", "sites", "attributes", "controls"):
            value = getattr(self, name)
            if isinstance(value, (str, bytes, os.PathLike, Site)) or not isinstance(value, Sequence):
                raise TypeError(f"{name}: expected a list, got {type(value).__name__}")
        if self.model is not None:
            check_type("model", self.model, ModelSection)
        if self.saes and len(self.sites) > 1:
            raise ValueError(f"site: expected at most one beside SAEs, which say their own, got {len(self.sites)}")
        if not self.saes and not self.sites:
            raise ValueError("saes: expected some, or --site for the controls alone, got neither")
        if not self.saes and not self.controls:
            raise ValueError("controls: expected some where there are no SAEs, got none")
        for site in map(as_site, self.sites):
            if site.kind not in KINDS:
                raise ValueError(f"site: expected one of kind {' or '.join(KINDS)}, got {site}")
        if self.data is not None:
            as_path("data", self.data)
        check_type("entity_type", self.entity_type, str)
        if self.data is None:
            check_choice("entity_type", self.entity_type, ("city",))
        if self.templates is not None:
            check_int("templates", self.templates, 1)
        for control in self.controls:
            check_choice("controls", control, CONTROLS)
        check_type("protocol", self.protocol, Protocol)
        check_int("seeds", self.seeds, 1)
        check_int("seed", self.seed, 0, 2**62)
        check_int("draws", self.draws, 2)
        if self.out is not None:
            as_path("out", self.out)
        check_type("device", self.device, str)
        check_choice("impl", self.impl, dispatch.IMPLS)

    @property
    def site(self) -> Site | str | None:
        """Of every SAE."""
        return self.sites[0] if self.saes and self.sites else None

    @property
    def folder(self) -> Path:
        """Of the results."""
        if self.out is not None:
            return Path(self.out)
        only = Path(self.saes[0]) if len(self.saes) == 1 else None
        of_run = only is not None and os.path.lexists(only / RESULTS)
        return (only if only is not None and of_run else Path("runs")) / "ravel"


def ravel_saes(config: RavelConfig, *, fresh: bool = False) -> dict[str, Any] | None:
    """Judge the SAEs and controls of ``config``, and return the results, also written to results.json in its ``out``.

    fresh: start over instead of going on. The first SIGINT, SIGTERM or SIGHUP ends it and returns None; the same call
    goes on from there, to the same figures.

    The results have ``rows``, one for each site, method, attribute, part of the test and seed, and ``summary``, the
    means over attributes and seeds: ``cause``, ``isolation`` and ``disentangle``, each with its interval, and of SAEs
    ``entity_fvu``. The masks and rotations that were learnt are in the folder ``interventions``.

    Raises ValueError for attributes, sites and SAEs that do not fit, for a model that knows too few entities and for
    too few pairs; BadFileError for files that are not what they should be; EnvironmentProblemError as `Run` and
    `load_model`.
    """
    check_type("config", config, RavelConfig)
    sources = Sources.of(config.saes)
    started = time.monotonic()
    with Run(config.folder, fresh, kind="RAVEL evaluation") as work, stopping() as stop:
        try:
            return _ravel(config, sources, work, stop, started)
        except Stopped:
            say(f"{config.folder}: stopped; the same command goes on from there")
            return None


@dataclass(frozen=True)
class Entry:
    """A method at a site: a control, or an SAE."""

    method: str
    site: Site
    place: Place | None = None

    @property
    def key(self) -> str:
        return self.method if self.place is None else f"sae {self.place.name}"

    @property
    def label(self) -> str:
        return f"{self.site} {self.key}"

    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = {"site": self.site.kind, "layer": self.site.layer, "method": self.method}
        if self.place is not None:
            found |= {"name": self.place.name}
            found |= {name: self.place.facts[name] for name in ("kind", "width", "path")}
        return found


def _ravel(config: RavelConfig, sources: Sources, work: Run, stop: Stop, started: float) -> dict[str, Any]:
    data = cities() if config.data is None else read_ravel(config.data, config.entity_type)
    data = data.chosen(config.attributes or data.attributes).limited(config.templates)
    device = as_device(config.device)
    loaded = _loaded(config, sources, device)
    places = _places(config, sources, loaded)
    sites = list(dict.fromkeys([place.reads for place in places] or map(as_site, config.sites)))
    for site in sites:
        loaded.width(site)  # refuses one that the model does not have
    entries = [
        entry
        for site in sorted(sites)
        for entry in (
            *(Entry("sae", site, place) for place in places if place.reads == site),
            *(Entry(control, site) for control in config.controls),
        )
    ]
    task = _Task(config, data, loaded, entries, work, stop)
    finished = work.stage(FINISHED, task.settings, [task.identity(entry) for entry in entries], config.draws)
    if finished.done():
        say(f"{work.folder}: finished before; start over with --fresh")
        return read_json(work.folder / RESULTS)
    say_what_changed(work.folder / RESULTS, task.environment)
    results = task.results(finished, places)
    results["seconds"] = {"this_run": round(time.monotonic() - started, 1)}
    with finished.doing():
        write_json(work.folder / RESULTS, results)
        finished.keep(work.folder / RESULTS)
    return results


class _Task:
    """The stages of a RAVEL evaluation."""

    def __init__(
        self,
        config: RavelConfig,
        data: EntityData,
        loaded: Loaded,
        entries: Sequence[Entry],
        work: Run,
        stop: Stop,
    ):
        self.config, self.data, self.loaded, self.entries = config, data, loaded, tuple(entries)
        self.work, self.stop, self.protocol = work, stop, config.protocol
        self.device = as_device(config.device)
        self.model = Continuation(loaded.model)
        self.reader = Reader(loaded.tokenizer, self.protocol.bos)
        impl = choose(config.impl, self.device, torch.float32).impl
        self.environment = environment(self.device) | {"impl": impl}
        protocol, data_key = self.protocol.to_dict(), key_of(data.identity())
        self.settings = [loaded.identity, self.environment, data_key, protocol, config.seeds, config.seed]
        p = self.protocol
        self._asking = [loaded.identity, self.environment, data_key, p.bos, p.score, p.entity_tokens]

    def identity(self, entry: Entry) -> list[Any]:
        return [entry.key, str(entry.site), None if entry.place is None else entry.place.content]

    def results(self, finished: Stage, places: Sequence[Place]) -> dict[str, Any]:
        every, left_out = self.reader.asked(self.data, self.protocol.entity_tokens)
        if not every:
            raise ValueError(
                f"entities: expected prompts with an entity that can be found, got none: {_reasons(left_out)}"
            )
        right = self._knowledge(every)
        asked, knowledge = known(every, right, self.protocol)
        pairs = {
            attribute: make_pairs(self.data, asked, attribute, self.protocol, self.config.seed)
            for attribute in self.data.attributes
        }
        used = {
            each
            for of in pairs.values()
            for part in (of.train, *of.tests.values())
            for pair in part
            for each in (pair.base, pair.source)
        }
        say(_said(knowledge, pairs, left_out))
        made = self._interventions(asked, sorted(used), pairs)
        rows, summary = self._scored(asked, pairs, made)
        return {
            "title": f"RAVEL on {self.loaded.name}",
            "ravel": {
                "protocol": self.protocol.to_dict(),
                "data": "built-in" if self.config.data is None else os.fspath(self.config.data),
                "entity_type": self.data.name,
                "attributes": list(self.data.attributes),
                "templates": {name: len(each) for name, each in self.data.templates.items()},
                "knowledge": knowledge,
                "left_out": left_out,
                "pairs": {attribute: each.to_dict() for attribute, each in pairs.items()},
                "seeds": list(range(self.config.seed, self.config.seed + self.config.seeds)),
                "seed": self.config.seed,
                "draws": self.config.draws,
                "level": LEVEL,
            },
            "model": {"name": self.loaded.name, **self.loaded.identity},
            "rows": rows,
            "summary": summary,
            "warnings": _warnings(self.config, pairs, places, self.loaded),
            "environment": self.environment,
            "version": self.environment["gemmascope"],
        }

    # ---- stages

    def _knowledge(self, every: Sequence[Asked]) -> list[bool]:
        stage = self.work.stage("knowledge", self._asking)
        if not stage.done():
            with stage.doing(), StageProgress("What the model knows", len(every), "prompt") as bar:
                right = answers(self.model, self.reader, every, self.protocol.score, lambda n: self._tick(bar, n))
                stage.facts["right"] = "".join("01"[each] for each in right)
        return [each == "1" for each in stage.facts["right"]]

    def _tick(self, bar: StageProgress, step: int) -> None:
        bar.update(step)
        self.stop.check()

    def _activations(self, asked: Sequence[Asked], used: Sequence[int]) -> dict[Site, Activations]:
        """At every site, of the prompts ``used``: from files, or one forward."""
        sites = list(dict.fromkeys(entry.site for entry in self.entries))
        few = [asked[index] for index in used]
        texts = [each.prompt.text for each in few]
        path = {site: self.work.folder / ACTIVATIONS / f"{site}.safetensors" for site in sites}
        stages = {site: self.work.stage(f"{ACTIVATIONS} {site}", self._asking, texts) for site in sites}
        missing = [site for site in sites if not stages[site].done()]
        made: dict[Site, Activations] = {}
        if missing:
            with StageProgress("Activations", len(few), "prompt") as bar:
                made = activations(self.model, few, missing, lambda n: self._tick(bar, n))
        for site in missing:
            with stages[site].doing():
                _save(path[site], _tensors(made[site]))
                stages[site].keep(path[site])
        for site in sites:
            if site not in made:
                made[site] = self._read_activations(site, path[site], few)
            made[site] = _renumbered(made[site], used)
        return made

    def _read_activations(self, site: Site, path: Path, few: Sequence[Asked]) -> Activations:
        tensors = _read(path)
        templates = {}
        for number, (name, indices) in enumerate(by_template(few).items()):
            template = self.model.template([few[index].tokens for index in indices])
            stream, vectors, positions, ends = (tensors[f"{number}/{part}"] for part in Streams._fields)
            dtype = self.model.stack.dtype
            streams = Streams(stream.to(dtype), vectors.to(dtype), positions.long(), ends.long())
            templates[name] = (template, indices, Streams(*(each.to(self.model.device) for each in streams)))
        return Activations(site, templates)

    def _interventions(
        self, asked: Sequence[Asked], used: Sequence[int], pairs: Mapping[str, PairSet]
    ) -> dict[tuple[str, str, int], dict[str, Any]]:
        """{(label of an entry, attribute, seed): what is right in each part of the test, and how much is exchanged}."""
        cells = [
            (entry, attribute, self.config.seed + number)
            for entry in self.entries
            for attribute in self.data.attributes
            for number in range(self.config.seeds)
        ]
        total = sum(steps_of_method(entry.method, pairs[attribute], self.protocol) for entry, attribute, _ in cells)
        found: dict[tuple[str, str, int], dict[str, Any]] = {}
        at_sites: dict[Site, Activations] | None = None
        loaded_sae: tuple[Place, nn.Module] | None = None
        with StageProgress("Interventions", total, "step") as bar:
            done = 0
            for entry, attribute, seed in cells:
                self.stop.check()
                stage, path = self._cell(entry, attribute, seed)
                if not stage.done():
                    if at_sites is None:
                        at_sites = self._activations(asked, used)
                    on = Interchange(self.model, at_sites[entry.site])
                    bar.note = f"{entry.label} {attribute}"

                    def tick(step: int, done: int = done) -> None:
                        self._tick(bar, done + step)

                    if entry.place is not None and (loaded_sae is None or loaded_sae[0] is not entry.place):
                        loaded_sae = (entry.place, entry.place.subject(self.device, self.config.impl).sae)
                    with stage.doing():
                        if entry.place is None:
                            trained = train_control(entry.method, on, pairs[attribute], self.protocol, seed, tick)
                        else:
                            assert loaded_sae is not None
                            trained = train_sae(loaded_sae[1], on, pairs[attribute], self.protocol, seed, tick)
                            stage.facts["entity_fvu"] = entity_fvu(loaded_sae[1], on)
                        tensors = dict(trained.tensors)
                        for name, test in pairs[attribute].tests.items():
                            right = right_pairs(
                                on,
                                self.reader,
                                asked,
                                test,
                                trained.exchange,
                                self.protocol,
                                lambda n: self.stop.check(),
                            )
                            tensors[f"right {name}"] = right.float()
                        _save(path, tensors)
                        stage.facts["exchanged"] = trained.count
                        stage.keep(path)
                done += steps_of_method(entry.method, pairs[attribute], self.protocol)
                bar.update(done)
                tensors = _read(path)
                right = {name: tensors[f"right {name}"] for name in pairs[attribute].tests}
                found[entry.label, attribute, seed] = {"right": right, **stage.facts}
        return found

    def _cell(self, entry: Entry, attribute: str, seed: int) -> tuple[Stage, Path]:
        # Whatever an SAE is called beside others.
        of = [entry.method, str(entry.site), None if entry.place is None else entry.place.content]
        name = key_of(of, attribute, seed)
        settings = [self.settings[:-2], self.config.seed]  # more seeds leave those that are there
        stage = self.work.stage(f"intervention {name}", settings, of, attribute, seed)
        return stage, self.work.folder / INTERVENTIONS / f"{name}.safetensors"

    # ---- figures

    def _scored(
        self,
        asked: Sequence[Asked],
        pairs: Mapping[str, PairSet],
        made: Mapping[tuple[str, str, int], Mapping[str, Any]],
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """A row for each entry, attribute, part of the test and seed, and the means over attributes and seeds."""
        rows: list[dict[str, Any]] = []
        summary: list[dict[str, Any]] = []
        tests = list(dict.fromkeys(name for each in pairs.values() for name in each.tests))
        seeds = range(self.config.seed, self.config.seed + self.config.seeds)
        for test in tests:
            of = {attribute: each.tests[test] for attribute, each in pairs.items() if test in each.tests}
            entities = [asked[pair.base].prompt.entity for each in of.values() for pair in each]
            bootstrap = Entities(sorted(set(entities)), self.config.draws, self.config.seed)
            for floor in FLOORS:
                every = {}
                for attribute, part in of.items():
                    every[attribute] = figures(part, floors(part)[floor], asked, bootstrap)
                    own = {"method": floor, "attribute": attribute, "test": test, "seed": None, "exchanged": None}
                    rows.append(own | plain(bootstrap.described(every[attribute])))
                mean = bootstrap.described(mean_figures(list(every.values())))
                summary.append({"method": floor, "test": test} | plain(mean))
            for entry in self.entries:
                of_seeds, exchanged = [], []
                for seed in seeds:
                    every = {}
                    for attribute, part in of.items():
                        cell = made[entry.label, attribute, seed]
                        every[attribute] = figures(part, cell["right"][test], asked, bootstrap)
                        exchanged.append(cell["exchanged"])
                        own = {"attribute": attribute, "test": test, "seed": seed, "exchanged": cell["exchanged"]}
                        own["entity_fvu"] = cell.get("entity_fvu")
                        rows.append(entry.facts() | own | plain(bootstrap.described(every[attribute])))
                    of_seeds.append(mean_figures(list(every.values())))
                mean = bootstrap.described(mean_figures(of_seeds))
                each = [values["disentangle"][0].item() for values in of_seeds]
                fvu = [made[entry.label, attribute, seed].get("entity_fvu") for attribute in of for seed in seeds]
                known_fvu = [each for each in fvu if each is not None]
                own = {"test": test, "exchanged": sum(exchanged) / len(exchanged), "disentangle_of_seeds": each}
                own["entity_fvu"] = sum(known_fvu) / len(known_fvu) if known_fvu else None
                summary.append(entry.facts() | own | plain(mean))
        return rows, summary


# ---- model and places


class _Gpt2(Loaded):
    """A GPT-2, which has the residual sites only."""

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(Site(layer, "resid") for layer in range(len(stack_of(self.model).layers)))

    def width(self, site: Site) -> int:
        if site not in self.sites:
            raise ValueError(f"site {site}: expected layer_0/resid to layer_{len(self.sites) - 1}/resid of a GPT-2")
        return stack_of(self.model).width


def _loaded(config: RavelConfig, sources: Sources, device: torch.device) -> Loaded:
    """The model of the settings, a GPT-2 too, or that of the run."""
    if config.model is None:
        return sources.model(config, device)
    found = load_model(config.model, device, others=(GPT2,))
    if getattr(found.model, "config", None) is not None and found.identity["type"] == GPT2:
        return _Gpt2(found.model, found.tokenizer, found.identity, found.name)
    return found


def _places(config: RavelConfig, sources: Sources, loaded: Loaded) -> tuple[Place, ...]:
    places = find_places(config, sources, loaded)
    for place in places:
        if place.reads != place.writes or place.reads.kind not in KINDS:
            raise ValueError(
                f"{place.name}: expected an SAE of a site of kind {' or '.join(KINDS)}, got one that reads at "
                f"{place.reads} and writes at {place.writes}"
            )
    return places


# ---- files


def _tensors(found: Activations) -> dict[str, Tensor]:
    return {
        f"{number}/{name}": value.double() if value.dtype == torch.float64 else value.float()
        for number, (_, _, streams) in enumerate(found.templates.values())
        for name, value in streams._asdict().items()
    }


def _renumbered(found: Activations, used: Sequence[int]) -> Activations:
    """With the numbers of all prompts in place of those of the ones used."""
    templates = {
        name: (template, [used[index] for index in indices], streams)
        for name, (template, indices, streams) in found.templates.items()
    }
    return Activations(found.site, templates)


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with atomic_write(path) as temporary:
        safetensors.torch.save_file(
            {name: x.detach().cpu().contiguous() for name, x in tensors.items()}, temporary, metadata={"format": "pt"}
        )


def _read(path: Path) -> dict[str, Tensor]:
    dtypes = {"F64": torch.float64, "F32": torch.float32}
    return read_safetensors(path, dtypes=dtypes, max_arrays=MOST_TENSORS)


# ---- what is said


def _reasons(left_out: Mapping[str, int]) -> str:
    return "; ".join(f"{count:,} prompts: {why}" for why, count in left_out.items() if count) or "none left out"


def _said(knowledge: Mapping[str, Any], pairs: Mapping[str, PairSet], left_out: Mapping[str, int]) -> str:
    right = ", ".join(f"{attribute} {share:.0%}" for attribute, share in knowledge["right"].items())
    lines = [f"known: {knowledge['known_entities']:,} of {knowledge['entities']:,} entities; right answers: {right}"]
    if any(left_out.values()):
        lines.append(f"left out: {_reasons(left_out)}")
    for attribute, each in pairs.items():
        counts = {"training": each.train, **each.tests}
        parts = ", ".join(f"{name} {len(some):,}" for name, some in counts.items())
        clashes = f"; {each.dropped:,} dropped, whose labels begin with the same token" if each.dropped else ""
        lines.append(f"pairs of {attribute}: {parts}{clashes}")
    return "\n".join(lines)


def _warnings(config: RavelConfig, pairs: Mapping[str, PairSet], places: Sequence[Place], loaded: Loaded) -> list[str]:
    found = stated_otherwise(places, loaded)
    if config.protocol.split == "pairs":
        found.append("the pairs were split, not the entities: the same entity is in training and test")
    if config.protocol.clashes == "isolate":
        found.append("pairs whose labels begin with the same token count to isolate, with the source's label")
    few = min(len(part) for each in pairs.values() for part in each.tests.values())
    if few < 100:
        found.append(f"a part of the test has {few} pairs only")
    return found
