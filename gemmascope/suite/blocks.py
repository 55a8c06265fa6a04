"""Sums over a text in pieces, each a stage of a run: what is killed goes on with the next piece, to the same bits."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..evaluation.protocol import Subject, Sums
from ..evaluation.site_moments import SiteMoments, site_moments
from ..evaluation.token_sets import MarkedText
from ..formats.arrays import read_safetensors
from ..formats.files import atomic_write
from ..reporting.progress import StageProgress
from ..runs import Run, Stage
from ..sites import Site
from .judged import Place
from .stopping import Stop

# A text is judged in so many pieces, or rows where it has fewer.
MOST_BLOCKS = 64
MOST_TENSORS = 1 << 20
_DTYPES = {"F64": torch.float64, "F32": torch.float32}

Load = Callable[[Place], Subject]
Measure = Callable[[slice, Sequence[Subject], Sequence[Site]], Sums]


@dataclass(frozen=True)
class Group:
    """SAEs that are in memory together. ablations: the sites that are ablated with them."""

    number: int
    places: tuple[Place, ...]
    ablations: tuple[Site, ...]


def groups_that_fit(places: Sequence[Place], max_bytes: int) -> list[Group]:
    """The SAEs of a site after one another, as many at a time as ``max_bytes`` of weights hold and at least one; a
    site is ablated with the first of them."""
    ordered = sorted(places, key=lambda place: (place.writes, place.reads))
    groups: list[Group] = []
    ablated: set[Site] = set()
    while ordered:
        size, count = 0, 0
        for place in ordered:
            size += place.bytes
            if count and size > max_bytes:
                break
            count += 1
        together, ordered = ordered[:count], ordered[count:]
        new = dict.fromkeys(place.writes for place in together if place.writes not in ablated)
        ablated |= set(new)
        groups.append(Group(len(groups), tuple(together), tuple(new)))
    return groups


@dataclass(frozen=True, eq=False)
class Blocks:
    """Sums of ``text``, a block of whole forwards and a group of SAEs at a time.

    folder: below that of ``work``, of the sums. settings: what they depend on beside the text, the SAEs and their
    sites. of_forward: rows of the text that the model runs on at once.
    """

    work: Run
    stop: Stop
    folder: str
    settings: Sequence[Any]
    text: MarkedText
    of_forward: int
    groups: Sequence[Group]

    def sums(self, title: str, load: Load, measure: Measure) -> Iterator[Sums]:
        """The sums of every block of every group by ``measure(rows, subjects, ablations)``; "clean", which all groups
        share, of the first alone. load: an SAE, on the device."""
        text = self.text
        rows = self.of_forward * -(-len(text.tokens) // (MOST_BLOCKS * self.of_forward))
        with StageProgress(title, len(self.groups) * len(text.tokens), "row") as bar:
            done = 0
            for group in self.groups:
                subjects = None
                for number, start in enumerate(range(0, len(text.tokens), rows)):
                    self.stop.check()
                    stage, path = self._block(group, number, start, rows)
                    if not stage.done():
                        if subjects is None:
                            subjects = [load(place) for place in group.places]
                        with stage.doing():
                            save(path, measure(slice(start, start + rows), subjects, group.ablations))
                            stage.keep(path)
                    found = read(path)
                    done += min(rows, len(text.tokens) - start)
                    bar.update(done, f"{len(group.places)} SAEs")
                    yield {key: x for key, x in found.items() if key != "clean" or group.number == 0}

    def clear(self) -> None:
        """Remove the sums, once the results are there."""
        shutil.rmtree(self.work.folder / self.folder, ignore_errors=True)

    def _block(self, group: Group, number: int, start: int, rows: int) -> tuple[Stage, Path]:
        name = f"{self.folder}/group_{group.number}/block_{number}"
        which = [[place.name, str(place.reads), str(place.writes), place.content] for place in group.places]
        stage = self.work.stage(name, self.settings, which, list(map(str, group.ablations)), start, rows)
        return stage, self.work.folder / f"{name}.safetensors"


def moments_of(
    work: Run,
    stop: Stop,
    name: str,
    settings: Sequence[Any],
    model: nn.Module,
    train: Tensor,
    text: MarkedText,
    sites: Sequence[Site],
    outlier_ratio: float,
) -> dict[Site, SiteMoments]:
    """`site_moments` as the stage ``name`` of a run, kept in the file of that name."""
    path = work.folder / f"{name}.safetensors"
    stage = work.stage(name, settings, [str(site) for site in sites])
    if not stage.done():
        with stage.doing(), StageProgress("Means of the sites", len(train) + len(text.tokens), "row") as bar:

            def tick(rows: int) -> None:
                bar.update(rows)
                stop.check()

            found = site_moments(model, train, text, sites, outlier_ratio, tick)
            save(path, {f"{site}/{key}": x for site in sites for key, x in found[site].to_tensors().items()})
            stage.keep(path)
    tensors = read(path)
    return {
        site: SiteMoments.from_tensors({key: tensors[f"{site}/{key}"] for key in ("means", "facts")}) for site in sites
    }


def save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with atomic_write(path) as temporary:
        safetensors.torch.save_file(
            {name: x.detach().cpu().contiguous() for name, x in tensors.items()}, temporary, metadata={"format": "pt"}
        )


def read(path: Path) -> dict[str, Tensor]:
    return read_safetensors(path, dtypes=_DTYPES, max_arrays=MOST_TENSORS)
