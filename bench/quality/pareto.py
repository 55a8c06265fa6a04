"""What the rows of `bench.quality.architectures` say: curves, intervals over seeds, who wins where; and the page."""

import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench.quality.plots import STYLES
from bench.quality.verdicts import interpolate
from gemmascope.formats.files import atomic_write
from gemmascope.reporting.html import document, figure, section
from gemmascope.reporting.plots import KIND_STYLES, LIGHT, new_figure, plain_log, tidy

Row = Mapping[str, Any]
# Of Student's distribution, 95 % on both sides, by the number of seeds.
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
STYLE = "pre.table { background: none; padding: 0; }\n"
TOKENS = {"": "all tokens", "_kept": "without the token in a thousand of the largest norm"}


class Interval(NamedTuple):
    """A mean over seeds and the half-width of its 95 % interval; None of a single seed."""

    mean: float
    half: float | None

    def text(self, form: str = ".4f") -> str:
        return format(self.mean, form) + ("" if self.half is None else f" ± {format(self.half, form.lstrip('+'))}")


def interval(values: Sequence[float]) -> Interval:
    n = len(values)
    half = None if n < 2 else STUDENT.get(n, 2.0) * stdev(values) / math.sqrt(n)
    return Interval(mean(values), half)


def trained(rows: Sequence[Row], site: str) -> dict[tuple[str, str], list[Row]]:
    """The trainings of a site by contender and architecture."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["kind"] == "architecture" and row["site"] == site:
            found.setdefault((row["contender"], row["architecture"]), []).append(row)
    return found


def sites_of(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["site"] for row in rows))


def at_l0(rows: Sequence[Row], l0: float, suffix: str = "") -> Interval | None:
    """FVU at ``l0`` on the curve of each seed, over the seeds; None unless every seed's curve passes over it."""
    values = []
    for seed in dict.fromkeys(row["seed"] for row in rows):
        mine = [row for row in rows if row["seed"] == seed]
        points = [(row[f"l0{suffix}"], row[f"fvu{suffix}"]) for row in mine]
        value = interpolate(l0, [point for point in points if point[0] > 0 and point[1]])
        if value is None:
            return None
        values.append(value)
    return interval(values) if values else None


def levels(rows: Sequence[Row], site: str) -> list[float]:
    """The L0 at which curves are compared: those that were asked for, and the middles between them, which the curves of
    kinds that do not hit it exactly pass over too."""
    asked = sorted({row["at_l0"] for row in rows if row["site"] == site and row.get("at_l0") is not None})
    middles = [math.sqrt(a * b) for a, b in pairwise(asked)]
    return sorted([*asked, *middles])


def winners(rows: Sequence[Row], site: str, suffix: str = "") -> list[dict[str, Any]]:
    """Of each level the kinds and trainers by FVU, best first, and whether the first is clear of the second: their
    intervals apart."""
    found = []
    for l0 in levels(rows, site):
        places = [
            (value, *who) for who, of in trained(rows, site).items() if (value := at_l0(of, l0, suffix)) is not None
        ]
        places.sort(key=lambda each: each[0].mean)
        clear = None
        if len(places) > 1 and None not in (places[0][0].half, places[1][0].half):
            first, second = places[0][0], places[1][0]
            clear = first.mean + (first.half or 0) < second.mean - (second.half or 0)
        found.append({"l0": l0, "places": places, "clear": clear})
    return found


def texts(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(title, table) of each site."""
    found = []
    for site in sites_of(rows):
        found.append((f"{site}: figures", "\n".join(_figures(rows, site))))
        if any(row.get("planted") for row in rows if row["site"] == site):
            found.append((f"{site}: planted features", "\n".join(_planted(rows, site))))
        for suffix, tokens in TOKENS.items():
            found.append((f"{site}: who wins where, {tokens}", "\n".join(_winners(rows, site, suffix))))
        found.append((f"{site}: controls", "\n".join(_controls(rows, site))))
    told = {
        f"{row['contender']} {row['architecture']}": row["differs"]
        for row in rows
        if row["kind"] == "architecture" and row["differs"]
    }
    if told:
        found.append(("Otherwise than ours", "\n".join(f"{name}: {differs}" for name, differs in told.items())))
    return found


def _by_level(rows: Sequence[Row]) -> dict[float, list[Row]]:
    found: dict[float, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["at_l0"]):
        found.setdefault(row["at_l0"], []).append(row)
    return found


def _mean_of(rows: Sequence[Row], key: str, form: str) -> str:
    values = [row[key] for row in rows if row[key] is not None]
    return interval(values).text(form) if len(values) == len(rows) else "–"


def _figures(rows: Sequence[Row], site: str) -> list[str]:
    head = f"{'trainer':20s} {'kind':11s} {'sparsity':>14s} {'L0':>15s} {'FVU':>17s} {'FVU, kept':>17s} {'dead':>5s}"
    lines = [f"{head} {'s':>7s} {'MiB':>6s} seeds"]
    for (contender, kind), of in trained(rows, site).items():
        for same in _by_level(of).values():
            (aim,) = same[0]["sparsity"].items()
            peaks = [row["peak_bytes"] for row in same if row["peak_bytes"] is not None]
            memory = f"{median(peaks) / 2**20:6.0f}" if peaks else f"{'–':>6s}"
            sign = {"l0_coefficient": "λ", "target_l0": "L0"}.get(aim[0], aim[0])
            lines.append(
                f"{contender:20s} {kind:11s} {f'{sign} {aim[1]:g}':>14s} {_mean_of(same, 'l0', '.2f'):>15s} "
                f"{_mean_of(same, 'fvu', '.4f'):>17s} {_mean_of(same, 'fvu_kept', '.4f'):>17s} "
                f"{mean(row['dead'] for row in same):5.0%} {median(row['seconds'] for row in same):7.1f} {memory} "
                f"{len(same)}"
            )
    lines += [
        f"{row['contender']:20s} {row['architecture']:11s} {row['reason']}"
        for row in rows
        if row["kind"] == "skipped" and row["site"] == site
    ]
    return lines


def _planted(rows: Sequence[Row], site: str) -> list[str]:
    head = f"{'trainer':20s} {'kind':11s} {'L0':>6s} {'cosine':>17s} {'found':>15s} {'split':>15s} {'L0 error':>15s}"
    lines = [head]
    for (contender, kind), of in trained(rows, site).items():
        for same in _by_level(of).values():
            each = [row["planted"] for row in same]
            lines.append(
                f"{contender:20s} {kind:11s} {mean(row['l0'] for row in same):6.2f} "
                f"{_mean_of(each, 'cosine', '.4f'):>17s} {_mean_of(each, 'found', '.3f'):>15s} "
                f"{_mean_of(each, 'split', '.3f'):>15s} {_mean_of(each, 'l0_error', '+.2f'):>15s}"
            )
    return lines


def _winners(rows: Sequence[Row], site: str, suffix: str) -> list[str]:
    lines = [f"{'L0':>6s}  {'first':54s} {'second':54s} apart"]
    for level in winners(rows, site, suffix):
        said = [f"{kind} by {contender}, {value.text()}" for value, contender, kind in level["places"][:2]]
        first, second = (*said, "–", "–")[:2]
        apart = {True: "yes", False: "no", None: "–"}[level["clear"]]
        lines.append(f"{level['l0']:6.2f}  {first:54s} {second:54s} {apart}")
    return lines


def _controls(rows: Sequence[Row], site: str) -> list[str]:
    lines = [f"{'control':20s} {'L0':>6s} {'FVU':>8s} {'FVU, kept':>10s}"]
    for row in rows:
        if row["kind"] == "control" and row["site"] == site:
            l0 = "–" if row["l0"] is None else f"{row['l0']:.2f}"
            lines.append(f"{row['contender']:20s} {l0:>6s} {row['fvu']:8.4f} {row['fvu_kept']:10.4f}")
    return lines


def picture(rows: Sequence[Row]) -> Figure:
    """Two panels a site: all tokens, and those kept. A curve for each kind and trainer, a bar for the interval."""
    sites = sites_of(rows)
    contenders = [name for name in STYLES if any(row["contender"] == name for row in rows)]
    kinds = [kind for kind in KIND_STYLES if any(row.get("architecture") == kind for row in rows)]
    newly = new_figure(10.6, 4.6 * len(sites) + 0.9)
    grid = newly.subplots(len(sites), 2, squeeze=False)
    for site, panels in zip(sites, grid, strict=True):
        for (suffix, tokens), axes in zip(TOKENS.items(), panels, strict=True):
            for control, line in (("pca", ":"), ("random dictionary", "--")):
                found = [row for row in rows if row["contender"] == control and row["site"] == site]
                points = sorted((row["l0"], row[f"fvu{suffix}"]) for row in found if row["l0"])
                if points:
                    axes.plot(*zip(*points, strict=True), color=LIGHT, linestyle=line, linewidth=1.2)
            for (contender, kind), of in trained(rows, site).items():
                marks = []
                for same in _by_level(of).values():
                    good = [row for row in same if row[f"fvu{suffix}"] and row[f"l0{suffix}"] > 0]
                    if good:
                        fvu = interval([row[f"fvu{suffix}"] for row in good])
                        marks.append((mean(row[f"l0{suffix}"] for row in good), fvu.mean, fvu.half or 0.0))
                if not marks:
                    continue
                l0s, fvus, halves = zip(*sorted(marks), strict=True)
                marker, line = KIND_STYLES[kind]
                lower = [min(half, 0.9 * fvu) for half, fvu in zip(halves, fvus, strict=True)]
                style = {"color": STYLES[contender][1], "marker": marker, "linestyle": line, "linewidth": 1.3}
                axes.errorbar(l0s, fvus, yerr=(lower, halves), markersize=5, capsize=2, **style)
            axes.set_title(f"{site}: {tokens}", fontsize=10)
            axes.set_xlabel("L0: active latents a token", fontsize=10)
            axes.set_ylabel("FVU (lower is better)", fontsize=10)
            axes.set_xscale("log")
            axes.set_yscale("log")
            tidy(axes)
            plain_log(axes.xaxis)
            plain_log(axes.yaxis)
    handles = [Line2D([], [], color=STYLES[name][1], linewidth=3, label=STYLES[name][0]) for name in contenders]
    for kind in kinds:
        marker, line = KIND_STYLES[kind]
        handles.append(Line2D([], [], color="#555555", marker=marker, linestyle=line, label=kind))
    handles.append(Line2D([], [], color=LIGHT, linestyle=":", label="PCA, same rank"))
    handles.append(Line2D([], [], color=LIGHT, linestyle="--", label="random dictionary"))
    newly.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    newly.suptitle("Kinds of SAE by trainer, on held-out activations", fontsize=13, fontweight="bold")
    return newly


def write_page(rows: Sequence[Row], machine: Mapping[str, Any], folder: Path) -> Path | None:
    """Write architectures.html into the folder; None without a training to show."""
    if not any(row["kind"] == "architecture" and row["fvu"] and row["l0"] > 0 for row in rows):
        return None
    stream = io.BytesIO()
    picture(rows).savefig(stream, format="png")
    n = len({row["seed"] for row in rows if row["kind"] == "architecture"})
    seeds = f"{n} seed{'s' if n != 1 else ''}"
    first = next(row for row in rows if row["kind"] == "architecture")
    said = (
        f"{first['tokens_seen']:,} tokens each, {first['d_sae']} latents, {seeds}, recipe "
        f"{first['recipe']}; {machine['device']}, {machine['threads']} threads, torch {machine['versions']['torch']}, "
        f"commit {machine['commit']}, {machine['date'][:10]}"
    )
    body = [
        "<h1>Kinds of SAE, by trainer</h1>",
        f"<p>{escape(said)}. Figures are means over seeds ± 95 % intervals of Student's distribution; at an L0 between "
        "two trainings FVU is interpolated, a straight line in logarithms. The last panel and the columns "
        "“kept” leave out one held-out token in a thousand, those of the largest norm. Seconds and memory are "
        "medians.</p>",
        section("Curves", figure(stream.getvalue(), "FVU over L0")),
        *(section(title, f"<pre class=table>{escape(text)}</pre>") for title, text in texts(rows)),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "architectures.html"
    with atomic_write(path) as temporary:
        temporary.write_text(document("gemmascope: kinds of SAE", "\n".join(body), STYLE), encoding="utf-8")
    return path
