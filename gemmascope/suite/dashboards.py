"""`gemmascope dashboards`: what each latent of SAEs does, in a folder of its own, from where it was left.

    text → a pass of the model, of as many SAEs as fit → a table of each SAE → the overview → files for others

The pass is saved every minute and when it is stopped; a killed one goes on from there, to the same bits.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..activations.packing import as_encoder
from ..checks import check_int, check_type
from ..dashboards import circuit_tracer, delphi, neuronpedia
from ..dashboards.codes import PIECE_BYTES, CodeStream, Piece, read_piece
from ..dashboards.collect import Collector, state_bytes
from ..dashboards.logits import LogitLens
from ..dashboards.naming import plain_names
from ..dashboards.overview import TABLES, Overview, TableOf, Text, table_path, write_overview
from ..dashboards.strings import vocabulary_of
from ..dashboards.table import LatentTable, Sizes, save
from ..dashboards.watch import watch
from ..dashboards.weights import complete
from ..evaluation.figures import plain
from ..evaluation.protocol import Subject
from ..formats.arrays import STORED_DTYPES, read_safetensors
from ..formats.files import read_json, write_json
from ..kernels import choose
from ..reporting.progress import StageProgress
from ..reporting.results import FINISHED, RESULTS
from ..reporting.website import write_website
from ..runs import Run, Stage
from ..sites.tokens import vocabulary_size
from ..version import __version__
from .blocks import MOST_TENSORS
from .judged import (
    MAX_SAE_BYTES,
    JudgedConfig,
    Place,
    Sources,
    Texts,
    find_places,
    read_texts,
    say_what_changed,
    stated_otherwise,
)
from .model import Loaded, as_device, environment
from .prepare import TOKENS, say
from .stopping import Stop, Stopped, stopping

SITE = "site"
WRITERS = (SITE, "neuronpedia", "delphi", "circuit-tracer")
PASS, CODES = "pass", "codes"
# Between two savings of a pass.
SAVE_SECONDS = 60.0
# Of a pass, with all that it holds of the SAEs.
MAX_STATE_BYTES = 8 << 30
MOST_TOGETHER = 256
# Files for others whose checksums are remembered.
MOST_KEPT = 1000
_SIZES = Sizes()


@dataclass(frozen=True)
class DashboardConfig(JudgedConfig):
    """Which SAEs, and on what, as of `JudgedConfig`; the results are in ``dashboards``.

    sizes: how much is kept of each latent; the window is at most the context. writers: what is written besides, of
    `WRITERS`: the site to look at, files for others. seed: of the samples. max_sae_bytes,
    max_state_bytes: of weights that are on the device at once, and of what a pass holds of them; more SAEs take more
    passes.
    """

    FOLDER: ClassVar[str] = "dashboards"

    sizes: Sizes = _SIZES
    writers: Sequence[str] = (SITE,)
    max_sae_bytes: int = MAX_SAE_BYTES
    max_state_bytes: int = MAX_STATE_BYTES

    def __post_init__(self):
        super().__post_init__()
        check_type("sizes", self.sizes, Sizes)
        if isinstance(self.writers, str) or not isinstance(self.writers, Sequence):
            raise TypeError(f"writers: expected a list of names, got {type(self.writers).__name__}")
        for writer in self.writers:
            if writer not in WRITERS:
                raise ValueError(f"writers: expected {', '.join(WRITERS)}, got {writer!r}")
        check_int("max_sae_bytes", self.max_sae_bytes, 1)
        check_int("max_state_bytes", self.max_state_bytes, 1)


def make_dashboards(config: DashboardConfig, *, fresh: bool = False) -> dict[str, Any] | None:
    """Write the dashboards of the SAEs of ``config``, and return the results, also written to results.json in its
    folder; `Overview.open` reads the rest.

    fresh: start over instead of going on. The first SIGINT, SIGTERM or SIGHUP ends it and returns None; the same call
    goes on from there, to the same bits. The results have a row for each SAE, in their order: ``name``, ``site``,
    ``layer``, ``width``, ``kind``, ``l0``, ``dead`` and ``high_freq``, shares of latents, and ``largest``.

    Raises as `evaluate_saes` does, and ValueError for a writer that cannot hold what was found.
    """
    check_type("config", config, DashboardConfig)
    sources = Sources.of(config.saes)
    started = time.monotonic()
    with Run(config.folder, fresh, kind="run of dashboards") as work, stopping() as stop:
        try:
            return _make(config, sources, work, stop, started)
        except Stopped:
            say(f"{config.folder}: stopped; the same command goes on from there")
            return None


def _make(config: DashboardConfig, sources: Sources, work: Run, stop: Stop, started: float) -> dict[str, Any]:
    device = as_device(config.device)
    loaded = sources.model(config, device)
    places = find_places(config, sources, loaded)
    texts = read_texts(config, sources, loaded, work.folder / TOKENS)
    task = _Task(config, loaded, places, texts, work, stop)
    finished = work.stage(FINISHED, task.settings, task.which(places))
    if not finished.done():
        say_what_changed(work.folder / RESULTS, task.environment)
        task.forget()
    task.tables()
    if not finished.done():
        with finished.doing():
            rows = [row | task.table_stage(number, place).facts["figures"] for number, place, row in task.rows()]
            kept = task.overview()
            results = {
                "title": f"Dashboards of latents of {loaded.name}",
                "model": {"name": loaded.name, **texts.facts},
                "rows": rows,
                "seed": config.seed,
                "version": __version__,
                "tokens": int(texts.judged.is_text.sum()),
                "sizes": asdict(task.sizes),
                "warnings": [*task.warnings(), *stated_otherwise(places, loaded)],
                "environment": task.environment,
                "seconds": {"this_run": round(time.monotonic() - started, 1)},
            }
            write_json(work.folder / RESULTS, results)
            finished.keep(work.folder / RESULTS, *kept)
    elif not task.missing(finished):
        say(f"{work.folder}: finished before; start over with --fresh")
    task.write(finished)
    task.clear()
    return read_json(work.folder / RESULTS)


@dataclass(frozen=True)
class _Group:
    """SAEs of one pass, by their numbers."""

    number: int
    places: Mapping[int, Place]


class _Task:
    """The stages of dashboards."""

    def __init__(
        self,
        config: DashboardConfig,
        loaded: Loaded,
        places: Sequence[Place],
        texts: Texts,
        work: Run,
        stop: Stop,
    ):
        self.config, self.loaded, self.places, self.texts = config, loaded, tuple(places), texts
        self.work, self.stop, self.device = work, stop, as_device(config.device)
        self.context = texts.judged.tokens.shape[1]
        self.sizes = replace(config.sizes, window=min(config.sizes.window, self.context))
        impl = choose(config.impl, self.device, torch.float32).impl
        self.environment = environment(self.device) | {"impl": impl}
        self.settings = [loaded.identity, self.environment, texts.content, asdict(self.sizes), config.seed]
        self.groups = tuple(self._groups())
        self.vocabulary = vocabulary_size(loaded.model)

    def which(self, places: Sequence[Place]) -> list[list[Any]]:
        return [[p.name, str(p.reads), str(p.writes), p.content, dict(p.facts)] for p in places]

    def _groups(self) -> Iterator[_Group]:
        """As many SAEs at a time as memory holds, at least one."""
        together: dict[int, Place] = {}
        size = state = 0
        for number, place in enumerate(self.places):
            more = state_bytes(place.facts["width"], self.sizes)
            full = size + place.bytes > self.config.max_sae_bytes or state + more > self.config.max_state_bytes
            if together and (full or len(together) == MOST_TOGETHER):
                yield _Group(next(iter(together)), together)
                together, size, state = {}, 0, 0
            together[number] = place
            size, state = size + place.bytes, state + more
        yield _Group(next(iter(together)), together)

    # ---- the pass

    def tables(self) -> None:
        """Make those that are missing, by a pass of each group."""
        for group in self.groups:
            stages = {number: self.table_stage(number, place) for number, place in group.places.items()}
            missing = [number for number, stage in stages.items() if not stage.done()]
            if missing:
                subjects = self._subjects(group)
                collectors = self._pass(group, subjects)
                self._complete(group, {number: (subjects[number], collectors[number]) for number in missing})

    def _subjects(self, group: _Group) -> dict[int, Subject]:
        return {n: place.subject(self.device, self.config.impl) for n, place in group.places.items()}

    def table_stage(self, number: int, place: Place) -> Stage:
        return self.work.stage(f"tables/{number:04d}", self.settings, self.which([place]))

    def _pass(self, group: _Group, subjects: Mapping[int, Subject]) -> dict[int, Collector]:
        """The model's pass over the text, from where it was left."""
        text = self.texts.judged
        collectors = {
            number: Collector(place.facts["width"], self.context, self.sizes, self.config.seed)
            for number, place in group.places.items()
        }
        saved = self._saved(group)
        row, before = (saved.facts["row"], saved) if saved else (0, None)
        if saved:
            self._restore(self._state_path(group, row), collectors)
        streams = {number: CodeStream() for number in subjects} if "delphi" in self.config.writers else {}
        takers = [[collectors[n].add, *([streams[n].add] if streams else [])] for n in subjects]
        piece = row
        with StageProgress("Tokens", text.tokens.numel(), "tok") as bar:
            bar.update(row * self.context, f"{len(subjects)} SAEs")
            since = time.monotonic()
            while row < len(text.tokens):
                with self.stop.held():
                    row = watch(self.loaded.model, text, list(subjects.values()), takers, row)
                    saves = time.monotonic() - since >= SAVE_SECONDS or self.stop.asked or row == len(text.tokens)
                    if streams and (saves or _held(streams) >= PIECE_BYTES):
                        self._write_piece(group, piece, row, streams)
                        piece = row
                    if saves:
                        before = self._save(group, row, collectors, before)
                        since = time.monotonic()
                self.stop.check()
                bar.update(row * self.context, f"{len(subjects)} SAEs")
        return collectors

    def _pass_stage(self, group: _Group, row: int) -> Stage:
        name = f"{PASS}/{group.number}/{row}"
        return self.work.stage(name, self.settings, self.which(list(group.places.values())), row)

    def _state_path(self, group: _Group, row: int) -> Path:
        return self.work.folder / PASS / f"{group.number:04d}_{row}.safetensors"

    def _saved(self, group: _Group) -> Stage | None:
        """The saving of the pass that is furthest."""
        prefix = f"{PASS}/{group.number}/"
        rows = [name.removeprefix(prefix) for name in self.work.stages if name.startswith(prefix)]
        for row in sorted((int(row) for row in rows if row.isdecimal()), reverse=True):
            stage = self._pass_stage(group, row)
            if stage.done():
                return stage
        return None

    def _save(self, group: _Group, row: int, collectors: Mapping[int, Collector], before: Stage | None) -> Stage:
        path = self._state_path(group, row)
        stage = self._pass_stage(group, row)
        with stage.doing():
            save(path, {f"{n}/{name}": x for n, each in collectors.items() for name, x in each.tensors().items()})
            stage.facts["row"] = row
            stage.keep(path)
        if before is not None:
            self._state_path(group, before.facts["row"]).unlink(missing_ok=True)
        return stage

    def _restore(self, path: Path, collectors: Mapping[int, Collector]) -> None:
        tensors = read_safetensors(path, dtypes=STORED_DTYPES, max_arrays=MOST_TENSORS)
        for number, collector in collectors.items():
            prefix = f"{number}/"
            own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
            collector.restore(own)

    # ---- tables

    def _complete(self, group: _Group, found: Mapping[int, tuple[Subject, Collector]]) -> None:
        tokens = min(self.vocabulary, as_encoder(self.loaded.tokenizer).size)
        lens = LogitLens(self.loaded.model, tokens)
        total = sum(2 * collector.d_sae for _, collector in found.values())
        done = 0
        with StageProgress("Logits and neighbours", total, "latent") as bar:
            for number, (subject, collector) in found.items():
                place = group.places[number]

                def check(steps: int, done: int = done, name: str = place.name) -> None:
                    bar.update(done + steps, name)
                    self.stop.check()

                stage, path = self.table_stage(number, place), table_path(self.work.folder, number)
                with stage.doing():
                    table = complete(collector.found(), subject, lens, self.sizes, check)
                    stage.facts |= {"entry": table.save(path), "n_sampled": table.n_sampled, "figures": _figures(table)}
                    stage.keep(path)
                done += 2 * collector.d_sae

    def rows(self) -> Iterator[tuple[int, Place, dict[str, Any]]]:
        for number, place in enumerate(self.places):
            yield number, place, {"name": place.name, **place.facts}

    def overview(self) -> list[Path]:
        """Write it; the files that it consists of, but for the tables."""
        text = self.texts.judged
        tokens = text.tokens.to(torch.int32)
        ids = [tokens.unique()]
        saes: list[tuple[TableOf, Mapping[str, Any]]] = []
        for number, place, row in self.rows():
            facts = self.table_stage(number, place).facts
            of = TableOf(
                place.name,
                place.reads,
                place.writes,
                place.facts["kind"],
                place.facts["width"],
                facts["n_sampled"],
                plain(row | facts["figures"]),
            )
            saes.append((of, facts["entry"]))
            ids.append(self._tokens_of(number))
        folder = self.work.folder
        made = write_overview(
            folder,
            model=self.loaded.name,
            what=self.texts.facts["text"],
            seed=self.config.seed,
            sizes=self.sizes,
            text=Text(tokens, text.is_text.cpu()),
            vocabulary=vocabulary_of(self.loaded.tokenizer, torch.cat(ids).unique()),
            n_vocabulary=self.vocabulary,
            saes=saes,
        )
        return made.files()

    def _tokens_of(self, number: int) -> Tensor:
        """The tokens whose logits a table names."""
        tensors = read_safetensors(table_path(self.work.folder, number), dtypes=STORED_DTYPES)
        found = torch.cat([tensors["promoted"].flatten(), tensors["suppressed"].flatten()]).unique()
        return found[found >= 0]

    def warnings(self) -> list[str]:
        there = self.texts.facts["sequences"]
        if there < self.config.sequences:
            return [f"made from {there:,} rows of text, not from {self.config.sequences:,}: there are no more"]
        return []

    # ---- files for others

    def missing(self, finished: Stage) -> dict[str, Stage]:
        """Of ``writers`` those whose files are not there."""
        measured = {SITE: self._measured()}  # of others, nothing but what is in the tables
        stages = {w: self.work.stage(w, measured.get(w, []), after=[finished]) for w in self.config.writers}
        return {w: stage for w, stage in stages.items() if not (stage.done() and (self.work.folder / w).is_dir())}

    def write(self, finished: Stage) -> None:
        """What ``writers`` ask for and is not there."""
        for writer, stage in self.missing(finished).items():
            folder = self.work.folder / writer
            with stage.doing():
                shutil.rmtree(folder, ignore_errors=True)
                overview = Overview.open(self.work.folder)
                with StageProgress(f"Files of {writer}", sum(of.d_sae for of in overview.saes), "latent") as bar:

                    def check(done: int, bar: StageProgress = bar) -> None:
                        bar.update(done)
                        self.stop.check()

                    written = self._written(writer, overview, folder, check)
                stage.facts["files"] = len(written)
                if len(written) <= MOST_KEPT:
                    stage.keep(*written)

    def _written(self, writer: str, overview: Overview, folder: Path, check: Callable[[int], None]) -> Sequence[Path]:
        if writer == SITE:
            return write_website(overview, folder, results=self._measured(), check=check)
        if writer == "neuronpedia":
            return neuronpedia.write(overview, folder, created=datetime.now(UTC).replace(microsecond=0), check=check)
        if writer == "circuit-tracer":
            return circuit_tracer.write(overview, folder, check=check)
        written: list[Path] = []
        names = plain_names([of.name for of in overview.saes])
        for group in self.groups:
            pieces = self._code_pieces(group)
            for number in group.places:
                of = overview.saes[number]
                written += delphi.write(
                    folder / delphi.LATENTS / names[number],
                    of.d_sae,
                    overview,
                    lambda number=number, pieces=pieces: (piece(number) for piece in pieces),
                )
                check(sum(each.d_sae for each in overview.saes[: number + 1]))
        return written

    def _measured(self) -> list[dict[str, Any]]:
        """What the run says of its SAEs."""
        return [{**place.source.row, "name": place.name} for place in self.places if place.source.row is not None]

    def _code_pieces(self, group: _Group) -> list[Callable[[int], Piece]]:
        """All that fires, on disk; of each piece a reader for the SAE of a number. Where the pass of the tables left
        none, the model runs again."""
        rows, found = len(self.texts.judged.tokens), []
        subjects: dict[int, Subject] = {}
        row = 0
        with StageProgress("Codes", rows * self.context, "tok") as bar:
            while row < rows:
                stage = self._piece_stage(group, row)
                if not stage.done():
                    subjects = subjects or self._subjects(group)
                    streams = {number: CodeStream() for number in subjects}
                    takers = [[stream.add] for stream in streams.values()]
                    after = row
                    while after < rows and _held(streams) < PIECE_BYTES:
                        after = watch(self.loaded.model, self.texts.judged, list(subjects.values()), takers, after)
                        bar.update(after * self.context)
                        self.stop.check()
                    stage = self._write_piece(group, row, after, streams)

                def piece(number: int, row: int = row, stage: Stage = stage) -> Piece:
                    return read_piece(self._piece_path(number, row), stage.facts["entries"][str(number)])

                found.append(piece)
                row = stage.facts["after"]
                bar.update(row * self.context)
        return found

    def _piece_stage(self, group: _Group, row: int) -> Stage:
        which = self.which(list(group.places.values()))
        return self.work.stage(f"{CODES}/{group.number}/{row}", self.settings, which, row)

    def _piece_path(self, number: int, row: int) -> Path:
        return self.work.folder / CODES / f"{number:04d}_{row}.safetensors"

    def _write_piece(self, group: _Group, row: int, after: int, streams: Mapping[int, CodeStream]) -> Stage:
        """What the streams hold, of the rows from ``row`` to before ``after``."""
        stage = self._piece_stage(group, row)
        with stage.doing():
            entries = {str(number): each.write(self._piece_path(number, row)) for number, each in streams.items()}
            stage.facts |= {"entries": entries, "after": after}
            stage.keep(*(self._piece_path(number, row) for number in streams))
        return stage

    def forget(self) -> None:
        """Remove what was made from something else."""
        for writer in WRITERS:
            shutil.rmtree(self.work.folder / writer, ignore_errors=True)
        own = {table_path(self.work.folder, number) for number in range(len(self.places))}
        for path in (self.work.folder / TABLES).glob("*"):
            if path not in own:
                path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove what only a run that goes on needs."""
        for name in (PASS, CODES):
            shutil.rmtree(self.work.folder / name, ignore_errors=True)


def _held(streams: Mapping[int, CodeStream]) -> int:
    return sum(stream.nbytes for stream in streams.values())


def _figures(table: LatentTable) -> dict[str, Any]:
    fired = table.fired
    return {
        "tokens": table.n_tokens,
        "l0": float(fired.sum()) / max(table.n_tokens, 1),
        "dead": float((fired == 0).double().mean()),
        "high_freq": float((table.frequency > 0.1).double().mean()),
        "largest": float(table.largest.max()),
        "sampled": table.n_sampled,
    }
