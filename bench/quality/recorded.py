"""The page of all recorded trainings: python -m bench.quality.recorded [--results FOLDER] [--out FOLDER]

From `architectures.jsonl`, as `python -m bench quality --architectures … --save` appended it. Of each kind, trainer,
seed and sparsity in each setting (site, recipe, width) the newest row counts. Writes kinds.html into the folder and
prints its tables in Markdown.

Trainers that aim at no L0 come out near the one that was asked for. So that they can be compared there, FVU is also
given at it: between two trainings of a seed along a straight line in logarithms; beyond them, or where there is one,
along FVU ∝ L0^−`SLOPE`, as measured at these sites, from no further away than `NEAR`. What lies elsewhere is not
compared.
"""

import argparse
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

from bench.quality.pareto import Row, picture
from bench.quality.plots import STYLES
from bench.quality.verdicts import interpolate
from bench.reporting import records
from gemmascope.formats.files import atomic_write
from gemmascope.reporting.html import document, figure, section

SUITE = "architectures"
SLOPE, NEAR = 0.27, 0.25
# A training in a process that has held more before shows no peak of its own.
LEAST_PEAK = 100 << 20
HEADINGS = ("kind", "trainer", "L0", "FVU", "FVU at {l0:g}", "± over seeds", "dead", "CPU s", "peak MiB", "seeds")


class Setting(NamedTuple):
    site: str
    recipe: str
    d_sae: int

    def title(self) -> str:
        return f"{self.site}, {self.recipe} recipe, {self.d_sae:,} latents"


class Line(NamedTuple):
    """What the seeds of one kind by one trainer came to at one sparsity: means, but for ``at_l0`` and what it cost,
    which are medians. spread: half of what lies between the seeds. None where it was not measured or cannot be
    compared."""

    kind: str
    trainer: str
    l0: float
    fvu: float
    at_l0: float | None
    spread: float | None
    dead: float
    seconds: float | None
    peak_bytes: float | None
    seeds: int

    def cells(self) -> list[str]:
        peak = None if self.peak_bytes is None else self.peak_bytes / 2**20
        return [
            self.kind,
            STYLES[self.trainer][0],
            f"{self.l0:.1f}",
            f"{self.fvu:.4f}",
            _number(self.at_l0, ".4f"),
            _number(self.spread, ".4f"),
            f"{self.dead:.0%}",
            _number(self.seconds, ".1f"),
            _number(peak, ",.0f"),
            str(self.seeds),
        ]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def fvu_at(l0: float, rows: Sequence[Row]) -> float | None:
    """Of one seed's trainings at several sparsities, or at one; None where ``l0`` is out of reach."""
    points = [(row["l0"], row["fvu"]) for row in rows if row["l0"] > 0 and row["fvu"]]
    between = interpolate(l0, points)
    if between is not None or not points:
        return between
    at, fvu = min(points, key=lambda point: abs(math.log(point[0] / l0)))
    return fvu * (at / l0) ** SLOPE if abs(math.log(at / l0)) <= math.log1p(NEAR) else None


def newest(rows: Sequence[Row]) -> dict[Setting, list[Row]]:
    """Of each setting the rows that count, in the order in which they were first seen."""
    found: dict[Setting, dict[tuple[Any, ...], Row]] = {}
    for row in rows:
        if row["kind"] in ("architecture", "control"):
            setting = Setting(row["site"], row["recipe"], row["d_sae"])
            who = tuple(row.get(name) for name in ("kind", "contender", "architecture", "seed", "at_l0"))
            found.setdefault(setting, {})[who] = row
    return {setting: list(of.values()) for setting, of in found.items()}


def lines_at(rows: Sequence[Row], l0: float) -> list[Line]:
    """Those of one setting, the least FVU at ``l0`` first; what cannot be compared comes last."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["kind"] == "architecture" and row["fvu"] is not None:
            groups.setdefault((row["architecture"], row["contender"]), []).append(row)
    there = {who: of for who, of in groups.items() if any(row["at_l0"] == l0 for row in of)}
    lines = [_line(kind, trainer, of, l0) for (kind, trainer), of in there.items()]
    return sorted(lines, key=lambda line: (line.at_l0 is None, line.at_l0 or line.fvu))


def _line(kind: str, trainer: str, every: Sequence[Row], l0: float) -> Line:
    """every: of all sparsities and seeds."""
    of = [row for row in every if row["at_l0"] == l0]
    seeds = [row["seed"] for row in of]
    at = [fvu_at(l0, [row for row in every if row["seed"] == seed]) for seed in seeds]
    there = [value for value in at if value is not None]
    whole = len(there) == len(of)

    def middle(key: str, least: float = 0.0) -> float | None:
        values = [row[key] for row in of if row.get(key) is not None]
        return median(values) if values and min(values) >= least else None

    return Line(
        kind,
        trainer,
        mean(row["l0"] for row in of),
        mean(row["fvu"] for row in of),
        median(there) if whole else None,
        (max(there) - min(there)) / 2 if whole and len(there) > 1 else None,
        mean(row["dead"] for row in of),
        middle("cpu_seconds") or middle("seconds"),
        middle("peak_bytes", LEAST_PEAK),
        len(of),
    )


def controls_at(rows: Sequence[Row], l0: float) -> str:
    """What leaves as much without a dictionary that was learnt."""
    of = [row for row in rows if row["kind"] == "control" and row["at_l0"] in (l0, None)]
    return ", ".join(
        f"{row['contender']} {row['fvu']:.3f}" + (f" at L0 {row['l0']:.1f}" if row["l0"] is not None else "")
        for row in of
    )


def levels_of(rows: Sequence[Row]) -> list[float]:
    return sorted({row["at_l0"] for row in rows if row["kind"] == "architecture"})


def facts_of(rows: Sequence[Row]) -> str:
    """How the trainings of a setting were made."""
    of = [row for row in rows if row["kind"] == "architecture"]
    tokens = sorted({row["tokens_seen"] for row in of})
    held_out = sorted({row["held_out_tokens"] for row in of})
    dates = sorted({row["machine"]["date"][:10] for row in of})
    return (
        f"{' or '.join(f'{n:,}' for n in tokens)} tokens each, judged on {' or '.join(f'{n:,}' for n in held_out)} "
        f"others; {' and '.join(dates)}, commits {', '.join(sorted({row['machine']['commit'] for row in of}))}"
    )


def tables(rows: Sequence[Row]) -> str:
    """In Markdown, one for each sparsity of a setting."""
    found = []
    for l0 in levels_of(rows):
        head = [name.format(l0=l0) for name in HEADINGS]
        lines = [f"| {' | '.join(line.cells())} |" for line in lines_at(rows, l0)]
        found.append("\n".join([f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *lines]))
    return "\n\n".join(found)


def markdown(setting: Setting, rows: Sequence[Row]) -> str:
    controls = [f"Controls at L0 {l0:g}: {controls_at(rows, l0)}." for l0 in levels_of(rows)]
    return "\n\n".join([f"### {setting.title()}", f"{facts_of(rows)}.", tables(rows), *controls])


def write_page(found: Mapping[Setting, Sequence[Row]], folder: Path) -> Path:
    """Write kinds.html, and return its path."""
    body = [
        "<h1>Kinds of SAE, by trainer</h1>",
        "<p>At equal tokens, width, start and order. FVU and L0 are means over seeds; FVU at an L0 is the median "
        "of the seeds, between two trainings of each, or, where they do not lie on both sides, moved along FVU ∝ "
        f"L0<sup>−{SLOPE}</sup> from at most {NEAR:.0%} away. Least first. CPU seconds are of one training.</p>",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for setting, rows in found.items():
        stream = io.BytesIO()
        picture(rows).savefig(stream, format="png")
        parts = [f"<p>{escape(facts_of(rows))}.</p>", figure(stream.getvalue(), f"FVU over L0: {setting.title()}")]
        for l0 in levels_of(rows):
            cells = [[name.format(l0=l0) for name in HEADINGS], *(line.cells() for line in lines_at(rows, l0))]
            table = [
                "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) + "</tr>"
                for row, tag in zip(cells, ["th", *["td"] * len(cells)], strict=False)
            ]
            parts += [f"<table>{''.join(table)}</table>", f"<p>Controls: {escape(controls_at(rows, l0))}.</p>"]
        body.append(section(setting.title(), "\n".join(parts)))
    page = folder / "kinds.html"
    with atomic_write(page) as temporary:
        temporary.write_text(document("gemmascope: kinds of SAE", "\n".join(body)), encoding="utf-8")
    return page


def main(arguments: list[str] | None = None) -> int:
    top = argparse.ArgumentParser(prog="python -m bench.quality.recorded", description=(__doc__ or "").split("\n")[0])
    top.add_argument("--results", type=Path, default=records.RESULTS, help="folder of the rows")
    top.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for the page")
    given = top.parse_args(arguments)
    path = given.results / f"{SUITE}.jsonl"
    found = newest(records.read(path)) if path.exists() else {}
    if not found:
        top.error(f"--results: expected rows in {path}, found none; `python -m bench quality --architectures … --save`")
    print("\n\n".join(markdown(setting, rows) for setting, rows in found.items()))
    print(f"\npage: {write_page(found, given.out)}")
    return 0


if __name__ == "__main__":
    main()
