"""Where SAEs and transcoders come from: files, folders of one or many, runs, and the hub."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch

from ..errors import BadFileError
from ..formats import foreign, transcoders
from ..formats.files import as_path, shown
from ..formats.release import NPZ, SAFETENSORS
from ..reporting.results import RESULTS, SAES_FOLDER, read_results
from ..saes import JumpReLUSAE, TopKSAE, Transcoder, load_sae
from ..saes.load import load_named

# Names of weights, one of which makes a folder that of an SAE.
WEIGHTS = (NPZ, SAFETENSORS, *foreign.FORMATS)
# Of a folder of folders.
MOST_SAES = 10_000


class Source(NamedTuple):
    """Where an SAE is. row: its row of the results of a run, if it is of one. name: what tells it from the others of
    its folder; of one alone, its path."""

    path: str | os.PathLike
    row: Mapping[str, Any] | None = None
    name: str = ""

    def load(self, dtype: torch.dtype | None = None) -> JumpReLUSAE | TopKSAE | Transcoder:
        """The SAE or transcoder, on the CPU."""
        return load(self.path, dtype) if self.row is None else _load_at(Path(self.path), dtype)


def load(name: str | os.PathLike, dtype: torch.dtype | None = None) -> JumpReLUSAE | TopKSAE | Transcoder:
    """The SAE or transcoder at a path, whichever its files say it is, or the SAE of that name on the hub."""
    return _load_at(Path(name), dtype) if os.path.lexists(name) else load_named(name, dtype=dtype)


def _load_at(path: Path, dtype: torch.dtype | None = None) -> JumpReLUSAE | TopKSAE | Transcoder:
    return Transcoder.load(path, dtype=dtype) if transcoders.is_named_so(path) else load_sae(path, dtype=dtype)


def expand(source: str | os.PathLike, runs: dict[Path, Mapping[str, Any]], *, below: bool = False) -> Iterator[Source]:
    """The SAEs at ``source``: of the folder of a run all, with their rows; of one of circuit-tracer every layer. The
    results of a run go to ``runs``, by its folder. below: of a file or folder among the SAEs of a run those that are
    there, as of the run; of another folder without weights of its own, those of the folders below it, in the order of
    their names.

    Raises BadFileError for a row whose file is elsewhere and for too many folders, and what `read_results` does.
    """
    path = as_path("sources", source)
    if os.path.lexists(path / RESULTS):
        runs[path] = read_results(path)
        yield from _of_run(path, runs[path])
    elif below and (found := _among_those_of_a_run(path, runs)):
        yield from found
    elif layers := transcoders.layer_files(path):
        for layer in layers:
            yield Source(layer, None, layer.stem)
    elif below and path.is_dir() and not _has_weights(path):
        found = sorted(_folders_below(path))
        if not found:  # what it lacks is for its reader to say
            yield Source(source, None, os.fspath(source))
        for folder in found:
            yield Source(folder, None, folder.relative_to(path).as_posix())
    else:
        yield Source(source, None, os.fspath(source))


def _of_run(run: Path, results: Mapping[str, Any]) -> Iterator[Source]:
    for row in results["saes"]:
        yield Source(_inside(run, row), row, row["name"])


def _among_those_of_a_run(path: Path, runs: dict[Path, Mapping[str, Any]]) -> list[Source]:
    """Those that a run lists at or below ``path``, a place among its SAEs; the run goes to ``runs``."""
    place = Path(os.path.abspath(path))
    for folder in (place, *place.parents) if place.exists() else ():
        run = folder.parent
        if folder.name == SAES_FOLDER and os.path.lexists(run / RESULTS):
            try:
                results = read_results(run)
            except BadFileError:  # of something else
                return []
            found = [each for each in _of_run(run, results) if Path(each.path).is_relative_to(place)]
            if found:
                runs[run] = results
            return found
    return []


def _has_weights(folder: Path) -> bool:
    return any(os.path.lexists(folder / name) for name in WEIGHTS)


def _folders_below(folder: Path) -> list[Path]:
    """Those with the weights of an SAE; what is below one of them is its own."""
    found: list[Path] = []
    for place, inner, _ in os.walk(folder):
        inner[:] = [name for name in inner if not name.startswith(".")]
        if _has_weights(Path(place)):
            found.append(Path(place))
            inner.clear()
            if len(found) > MOST_SAES:
                raise BadFileError(f"{shown(folder)}: expected at most {MOST_SAES} SAEs, found more")
    return found


def _inside(run: Path, row: Mapping[str, Any]) -> Path:
    """The file of the SAE of a row of results, which must be in the folder of the run."""
    name, where = row.get("path"), f"{shown(run / RESULTS)}: {row['name']!r:.60}: path"
    if not isinstance(name, str) or not name or "\0" in name:
        raise BadFileError(f"{where}: expected that of an SAE, found {name!r:.60}")
    pure, path = PurePosixPath(name), run / name
    if pure.is_absolute() or ".." in pure.parts or not path.resolve().is_relative_to(run.resolve()):
        raise BadFileError(f"{where}: expected a file in the folder of the run, found {name!r:.60}")
    return path
