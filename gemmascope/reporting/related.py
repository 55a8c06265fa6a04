"""What else is in the folder of a run, linked from its page: evaluation, studies, RAVEL, probes, dashboards."""

import os
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from ..errors import BadFileError
from ..formats.files import as_path, read_json
from .results import RESULTS, read_studies, source_of

MOST_BYTES = 64 << 20  # of a file of results; a larger one is linked, not read
# Of a folder's own files, those to look at.
SHOWN = (".svg", ".png", ".csv", ".json")


class Related(NamedTuple):
    """A line of the page."""

    title: str
    says: str
    """What was found or can be seen there."""
    source: str
    """Rows, seed and version of its figures."""
    links: Mapping[str, str]
    """Text → path in the folder of the run; the first is that of the title."""


def related(run_dir: str | os.PathLike) -> list[Related]:
    """All that is there: evaluation, studies, RAVEL, probes, dashboards. Of results that cannot be read that is said; a
    study that cannot be read is left out."""
    run_dir = as_path("run_dir", run_dir)
    found: list[Related] = []
    if (run_dir / "evaluation" / "report.html").is_file():
        what = "all SAEs by Gemma Scope's protocol, with intervals and controls"
        found.append(_of_results(run_dir, "evaluation", "Evaluation", what, {"page": "evaluation/report.html"}))
    found += _studies(run_dir)
    if (run_dir / "ravel" / RESULTS).is_file():
        what = "whether latents separate the attributes of an entity, beside controls"
        found.append(_of_results(run_dir, "ravel", "RAVEL", what, _files(run_dir, run_dir / "ravel")))
    if (run_dir / "probing" / RESULTS).is_file():
        what = "what a few latents tell of labels of the text, beside coordinates and a random dictionary"
        found.append(_of_results(run_dir, "probing", "Probes", what, _files(run_dir, run_dir / "probing")))
    if (run_dir / "dashboards" / "site" / "index.html").is_file():
        what = "what each latent fires on and what it does to the next token, to look through"
        links = {"site": "dashboards/site/index.html"}
        found.append(_of_results(run_dir, "dashboards", "Dashboards of latents", what, links))
    return found


def as_html(found: list[Related]) -> str:
    """A list of them."""
    parts: list[str] = []
    for each in found:
        first, *others = each.links.items()
        parts.append(f'<dt><a href="{quote(first[1])}">{escape(each.title)}</a></dt>')
        more = " · ".join(f'<a href="{quote(path)}">{escape(text)}</a>' for text, path in others)
        sentences = (f"{escape(text[:1].upper() + text[1:])}." for text in (each.says, each.source) if text)
        parts.append(f"<dd>{' '.join(sentences)}{' ' if more else ''}{more}</dd>")
    return "<dl>\n" + "\n".join(parts) + "\n</dl>"


def _of_results(run_dir: Path, folder: str, title: str, says: str, links: Mapping[str, str]) -> Related:
    results = _read(run_dir / folder / RESULTS)
    return Related(title, says, "its results cannot be read" if results is None else source_of(results), links)


def _studies(run_dir: Path) -> Iterator[Related]:
    for path, study in read_studies(run_dir / "studies"):
        own = [path.with_suffix(suffix) for suffix in SHOWN]
        links = {each.suffix[1:].upper(): _inside(run_dir, each) for each in own if each.is_file()}
        says = study["conclusion"].rstrip(".")
        yield Related(f"Study: {study['study'].replace('-', ' ')}", says, source_of(study), links)


def _files(run_dir: Path, folder: Path) -> dict[str, str]:
    paths = [path for suffix in SHOWN for path in sorted(folder.glob(f"*{suffix}")) if path.name != "stages.json"]
    return {path.name: _inside(run_dir, path) for path in paths}


def _inside(run_dir: Path, path: Path) -> str:
    return path.relative_to(run_dir).as_posix()


def _read(path: Path) -> Mapping[str, Any] | None:
    """None for what cannot be read, or is no object."""
    try:
        found = read_json(path, MOST_BYTES)
    except BadFileError:
        return None
    return found if isinstance(found, dict) else None
