"""What a person sees of a RAVEL evaluation: the table and the figure, from the file that it left."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadFileError
from ..formats.files import as_path, atomic_write, read_json, shown
from ..runs import check_finished
from .results import FINISHED, MAX_SAES, RESULTS, checked_number, formatted

if TYPE_CHECKING:
    import rich.table
    from matplotlib.figure import Figure

FIGURES = ("cause", "isolation", "disentangle")
# Of a row of results: texts that it must have.
FLOORS = ("always base", "always source")
NAMES = {"das": "DAS", "mdas": "DAS + mask", "pca": "PCA", "random": "random directions", "neurons": "neurons"}
FLOOR_SITE = "any"
_BESIDE = ("exchanged", "entity_fvu")
_MARKS = {"sae": "o", "neurons": "s", "pca": "^", "random": "v", "das": "D", "mdas": "*"}


def is_ravel(folder: str | os.PathLike) -> bool:
    """Whether the results in ``folder`` are those of `gemmascope ravel`; a file that cannot be read is none."""
    try:
        found = read_json(as_path("folder", folder) / RESULTS)
    except BadFileError:
        return False
    return isinstance(found, dict) and isinstance(found.get("ravel"), dict)


def read_ravel_results(folder: str | os.PathLike) -> dict[str, Any]:
    """The checked contents of the results.json of a RAVEL evaluation.

    Raises BadFileError when the file is missing or is not what a finished one writes.
    """
    path = as_path("folder", folder) / RESULTS
    check_finished(folder, FINISHED)
    name, found = shown(path), read_json(path)
    if not isinstance(found, dict) or not isinstance(found.get("ravel"), dict):
        raise BadFileError(f"{name}: expected the results of a RAVEL evaluation, found others")
    for key in ("model", "environment"):
        if not isinstance(found.get(key), dict):
            raise BadFileError(f"{name}: expected an object {key!r}, found {found.get(key)!r:.40}")
    summary, warnings = found.get("summary"), found.get("warnings")
    if not isinstance(warnings, list) or not all(isinstance(each, str) for each in warnings):
        raise BadFileError(f"{name}: expected a list of strings 'warnings', found {warnings!r:.40}")
    if not isinstance(summary, list) or not 0 < len(summary) <= 8 * MAX_SAES:
        raise BadFileError(f"{name}: expected a list 'summary', found {summary!r:.40}")
    return {**found, "summary": [_checked(f"{name}: summary[{n}]", row) for n, row in enumerate(summary)]}


def _checked(where: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("method", "test")):
        raise BadFileError(f"{where}: expected an object with the strings 'method' and 'test'")
    if row["method"] not in FLOORS and not (isinstance(row.get("site"), str) and type(row.get("layer")) is int):
        raise BadFileError(f"{where}: expected the string 'site' and the integer 'layer'")
    checked: dict[str, Any] = {key: checked_number(where, key, row.get(key)) for key in (*FIGURES, *_BESIDE)}
    for key in (f"{each}_interval" for each in FIGURES):
        ends = row.get(key)
        if ends is not None and not (isinstance(ends, list) and len(ends) == 2):
            raise BadFileError(f"{where}: expected two numbers {key!r}, found {ends!r:.40}")
        checked[key] = None if ends is None else [checked_number(where, key, each) for each in ends]
    return {**row, **checked}


def method_name(row: Mapping[str, Any]) -> str:
    """Of a row of the summary, for people: that of a control, or of an SAE its kind and name."""
    if row["method"] != "sae":
        return NAMES.get(row["method"]) or str(row["method"])
    return f"{row.get('kind', 'SAE')} {row.get('name', '')}".strip()


def _with_half(row: Mapping[str, Any], key: str) -> str:
    text, ends = formatted(row[key], ".3f"), row[f"{key}_interval"]
    return text if ends is None or None in ends else f"{text} ±{(ends[1] - ends[0]) / 2:.3f}"


def ravel_table(results: Mapping[str, Any]) -> "rich.table.Table":
    """The summary as a `rich.table.Table`: a row for each method at each site, best first.

    results: as `read_ravel_results` returns them. The figures are those of the first part of the test; of the others
    there is Disentangle.
    """
    import rich.box
    import rich.table
    import rich.text

    summary, ravel = results["summary"], results["ravel"]
    tests = list(dict.fromkeys(row["test"] for row in summary))
    others = {test: {_key(row): row for row in summary if row["test"] == test} for test in tests[1:]}
    attributes = ", ".join(map(str, ravel.get("attributes", [])))
    draws, level = ravel.get("draws"), ravel.get("level")
    said = f"Test: new {tests[0]}." if tests != ["pairs"] else "Test: other pairs of the same entities."
    if isinstance(draws, int) and isinstance(level, float):
        said += f" ±: half of the {level:.0%} interval over entities, {draws:,} draws."
    said += "".join(f" {test.capitalize()}: disentangle on new {test}." for test in tests[1:])
    if any(row["entity_fvu"] is not None for row in summary):
        said += " FVU: of the variance among the entities, what the SAE leaves and so cannot exchange."
    table = rich.table.Table(
        title=rich.text.Text(f"RAVEL, {attributes}: {results['model'].get('name', 'model')}"),
        caption=rich.text.Text(said),
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("method", overflow="fold", min_width=18)
    for heading in ("exchanged", "FVU", "cause", "isolation", "disentangle", *tests[1:]):
        table.add_column(heading, justify="right", no_wrap=True)
    first = [row for row in summary if row["test"] == tests[0]]
    by_site: dict[str, list[Mapping[str, Any]]] = {}
    for row in first:
        by_site.setdefault(_site(row), []).append(row)
    for site, rows in by_site.items():
        table.add_row(rich.text.Text("floors" if site == FLOOR_SITE else site, style="bold"))
        ordered = sorted(rows, key=lambda row: -(row["disentangle"] or 0))
        for index, row in enumerate(ordered):
            cells = [formatted(row["exchanged"], ".0f"), formatted(row["entity_fvu"], ".2f")]
            cells += [formatted(row[key], ".3f") for key in ("cause", "isolation")]
            cells += [_with_half(row, "disentangle")]
            cells += [
                formatted(found[_key(row)]["disentangle"], ".3f") if _key(row) in found else "–"
                for found in others.values()
            ]
            table.add_row(*map(rich.text.Text, [method_name(row), *cells]), end_section=index + 1 == len(ordered))
    return table


def _site(row: Mapping[str, Any]) -> str:
    return FLOOR_SITE if row["method"] in FLOORS else f"layer_{row['layer']}/{row['site']}"


def _key(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return _site(row), row["method"], str(row.get("name", ""))


def write_ravel(folder: str | os.PathLike) -> Path:
    """Draw ``folder``/plots/cause_isolation.png and return its path. Needs matplotlib."""
    folder = as_path("folder", folder)
    figure = cause_against_isolation(read_ravel_results(folder)["summary"])
    path = folder / "plots" / "cause_isolation.png"
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", facecolor="white")
    return path


def cause_against_isolation(summary: Sequence[Mapping[str, Any]]) -> "Figure":
    """Cause and isolation of every method with their intervals, a panel a site, on the first part of the test. Dashed:
    where Disentangle is what the better of the two floors has. Up and to the right is better."""
    from matplotlib.lines import Line2D

    from .plots import GREY, KIND_STYLES, LIGHT, entitle, legend_below, new_figure, tidy

    first = [row for row in summary if row["test"] == summary[0]["test"]]
    floors = [row["disentangle"] for row in first if row["method"] in FLOORS and row["disentangle"] is not None]
    shown_rows = [row for row in first if row["method"] not in FLOORS and row["disentangle"] is not None]
    sites = list(dict.fromkeys(map(_site, shown_rows)))
    figure = new_figure(max(5.6, 3.6 * len(sites) + 0.6), 4.6)
    grid = figure.subplots(1, max(1, len(sites)), squeeze=False, sharex=True, sharey=True)[0]
    colours = [f"C{number}" for number in range(10)]
    labels = list(dict.fromkeys(_short(row) for row in shown_rows))
    handles = []
    for label in labels:
        row = next(each for each in shown_rows if _short(each) == label)
        marker = KIND_STYLES[row["kind"]][0] if row.get("kind") in KIND_STYLES else _MARKS.get(row["method"], "o")
        colour = GREY if row["method"] != "sae" else colours[labels.index(label) % len(colours)]
        handles.append(Line2D([], [], color=colour, marker=marker, linestyle="", label=label))
        for each in (each for each in shown_rows if _short(each) == label):
            axes = grid[sites.index(_site(each))]
            axes.plot(each["cause"], each["isolation"], marker, color=colour, markersize=6)
            for key, flat in (("cause", True), ("isolation", False)):
                ends = each[f"{key}_interval"]
                if ends is not None:
                    x, y = (ends, [each["isolation"]] * 2) if flat else ([each["cause"]] * 2, ends)
                    axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.6)
    for axes, site in zip(grid, sites, strict=False):
        if floors:
            best = max(floors)
            axes.plot([2 * best - 1, 1], [1, 2 * best - 1], color=LIGHT, linestyle="--", linewidth=1)
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
        axes.set_title(site, fontsize=11)
        axes.set_xlabel("cause", fontsize=10)
        tidy(axes)
    grid[0].set_ylabel("isolation", fontsize=10)
    if handles:
        legend_below(figure, handles)
    entitle(figure, "One attribute exchanged, the others kept")
    return figure


def _short(row: Mapping[str, Any]) -> str:
    """What a method is called in the legend: an SAE by its kind alone."""
    return method_name(row) if row["method"] != "sae" else str(row.get("kind", "SAE"))
