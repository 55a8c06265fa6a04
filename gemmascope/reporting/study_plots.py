"""The figure of a study, from its rows: panels of points, lines or histograms, by what its plot says."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .plots import (
    GREY,
    KIND_STYLES,
    LINES,
    SITES,
    entitle,
    layer_handles,
    legend_below,
    literal,
    new_figure,
    plain_log,
    site_title,
    spread,
    tidy,
)
from .results import kinds_of, site_of

Row = Mapping[str, Any]

MOST_PANELS = 4
MOST_ROWS = 6
# Okabe and Ito's, and what is left of them in other shades.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933", "#882255", "#44AA99")
HOLLOW = ("o", "s", "D", "v", "P")
# Of the y axis above and below what is drawn, where the paper's range does not hold it.
MARGIN = 1.15


def draw(study: Mapping[str, Any]) -> Figure:
    """study: the contents of its JSON."""
    plot = study["plot"]
    rows = [
        row
        for row in study["rows"]
        if None not in (row["x"], row["y"]) and not any(row["series"].endswith(each) for each in plot["left_out"])
    ]
    return _Drawing(study, plot, rows).figure()


class _Drawing:
    def __init__(self, study: Mapping[str, Any], plot: Mapping[str, Any], rows: Sequence[Row]):
        self.study, self.plot, self.rows = study, plot, rows
        self.controls = [each for each in plot["controls"] if any(row["series"] == each for row in rows)]
        self.kinds = kinds_of(rows)
        self.notes: list[str] = []
        self.columns = self._columns()
        self.panel_rows = self._panel_rows()
        self.ranks, self.by = self._ranks(), self._by()
        self.colours = self._colours()

    def _columns(self) -> list[str]:
        """Kinds of site where layers have colours, else sites."""
        if self.plot["colours"] == "layer":
            return [site for site in SITES if any(row["site"] == site for row in self.rows)] + sorted(
                {row["site"] for row in self.rows} - set(SITES)
            )
        every = list(dict.fromkeys(site_of(row) for row in sorted(self.rows, key=lambda row: row["layer"])))
        kept = spread(every, MOST_PANELS)
        if len(kept) < len(every):
            self.notes.append(f"{len(kept)} of {len(every)} sites")
        return kept

    def _panel_rows(self) -> list[tuple[str, str | None]]:
        """Figure and kind of SAE: histograms have a panel for each kind."""
        figures = [name for name in self.plot["figures"] if any(row["figure"] == name for row in self.rows)]
        if self.plot["mark"] == "steps" and self.kinds:
            return [(figure, kind) for figure in figures for kind in self.kinds]
        return [(figure, None) for figure in figures]

    def _ranks(self) -> dict[str, tuple]:
        """Of each SAE, by name, width and place by L0 among those of its site, kind and width: those of one place have
        one colour or line."""
        groups: dict[tuple, dict[str, float]] = {}
        for row in self.rows:
            group = groups.setdefault((row["site"], row["layer"], row["kind"], row["width"]), {})
            group.setdefault(row["sae"], row["L0"] or 0.0)
        found: dict[str, tuple] = {}
        for (*_, width), group in groups.items():
            for rank, name in enumerate(sorted(group, key=lambda name: (group[name], name))):
                found[name] = (width, rank)
        return found

    def _by(self) -> str:
        """What colours are by: kinds or widths, where the layers or the SAEs would have one colour or far too many."""
        by, mark = self.plot["colours"], self.plot["mark"]
        one_layer = len({row["layer"] for row in self.rows}) == 1
        if len(self.kinds) > 1 and ((by == "layer" and one_layer) or (by == "sae" and mark == "lines")):
            return "kind"
        if by == "layer" and one_layer and len({row["width"] for row in self.rows}) > 1:
            return "width"
        return by

    def _key(self, row: Row) -> Any:
        """By what a row has its colour."""
        return self.ranks[row["sae"]] if self.by == "sae" else row[self.by]

    def _colours(self) -> dict[Any, str]:
        if self.by == "kind":
            return {kind: PALETTE[index] for index, kind in enumerate(self.kinds)}
        keys = list(dict.fromkeys(self._key(row) for row in self.rows if row["series"] not in self.controls))
        if self.by == "series":
            return {key: PALETTE[index % len(PALETTE)] for index, key in enumerate(keys)}
        ordered = sorted(keys)
        share = {key: index / max(1, len(ordered) - 1) for index, key in enumerate(ordered)}
        return {key: to_hex(colormaps["viridis"](0.85 * each)) for key, each in share.items()}

    def _line(self, row: Row) -> Any:
        """The line of an SAE in a panel of lines."""
        if self.by != "kind":
            return KIND_STYLES[row["kind"]][1]
        ranks = sorted(set(self.ranks.values()))
        return LINES[ranks.index(self.ranks[row["sae"]]) % len(LINES)]

    def _label(self, rank: tuple) -> str:
        """Of the SAEs of one place: their L0, and their width where there are several."""
        found = sorted({row["L0"] for row in self.rows if self.ranks[row["sae"]] == rank and row["L0"] is not None})
        low, high = (f"{each:.3g}" for each in (found[0], found[-1])) if found else ("–", "–")
        several = len({width for width, _ in self.ranks.values()}) > 1
        return f"L0 {low if low == high else f'{low}–{high}'}" + (f", width {rank[0]:,}" if several else "")

    def figure(self) -> Figure:
        wide, high = len(self.columns), len(self.panel_rows)
        tall = 1.7 if self.plot["mark"] == "steps" and high > 1 else 3.1
        figure = new_figure(max(7.2, 3.9 * wide + 0.6), tall * max(1, high) + 1.6)
        if not self.rows:
            entitle(figure, self.plot["title"], "nothing to draw")
            return figure
        grid = figure.subplots(high, wide, squeeze=False, sharex=True, sharey="row")
        for row, (name, kind) in enumerate(self.panel_rows):
            for column, site in enumerate(self.columns):
                axes: Axes = grid[row, column]
                here = [each for each in self._at(site) if each["figure"] == name and kind in (None, each["kind"])]
                tidy(axes)
                self._scale(axes, name)
                {"points": self._points, "lines": self._lines, "steps": self._steps}[self.plot["mark"]](axes, here)
                if row == 0:
                    axes.set_title(site_title(site) if self.plot["colours"] == "layer" else literal(site), fontsize=11)
                if column == 0:
                    label = self.plot["figures"][name]["label"]
                    axes.set_ylabel(f"{kind}\n{label}" if kind else label, fontsize=9 if kind else 10)
                if row == high - 1:
                    axes.set_xlabel(self.plot["x"]["label"], fontsize=10)
            self._limits(grid[row], [each for each in self.rows if each["figure"] == name])
        handles = self._handles()
        if handles:
            legend_below(figure, handles)
        second = self.study["second_model"]
        models = literal(self.study["model"] + (f" and {second}" if second else ""))
        entitle(figure, f"{self.plot['title']}: {models}", "; ".join(self.notes))
        return figure

    def _at(self, site: str) -> list[Row]:
        by_kind = self.plot["colours"] == "layer"
        return [row for row in self.rows if (row["site"] if by_kind else site_of(row)) == site]

    # ---- axes

    def _scale(self, axes: Axes, name: str) -> None:
        for each, spec, rows in (
            ("x", self.plot["x"], self.rows),
            ("y", self.plot["figures"][name], [row for row in self.rows if row["figure"] == name]),
        ):
            scale = spec["scale"]
            if scale == "log" and any(row[each] <= 0 for row in rows):
                least = min((abs(row[each]) for row in rows if row[each]), default=1.0)
                getattr(axes, f"set_{each}scale")("symlog", linthresh=max(least, 1e-5))
            else:
                getattr(axes, f"set_{each}scale")(scale)

    def _limits(self, panels: Sequence[Axes], rows: Sequence[Row]) -> None:
        """The paper's ranges where they hold all points of this row of panels and every x."""
        axes = panels[0]
        name = rows[0]["figure"]
        for each, spec, values in (
            ("x", self.plot["x"], [row["x"] for row in self.rows]),
            ("y", self.plot["figures"][name], [row["y"] for row in rows]),
        ):
            low, high = min(values), max(values)
            paper = spec["range"]
            if paper is not None and paper[0] <= low and high <= paper[1]:
                getattr(axes, f"set_{each}lim")(*paper)
            elif each == "y" and self.plot["mark"] == "lines" and axes.get_yscale() == "linear":
                top = max([*(row["high"] for row in rows if row["high"] is not None), high])
                axes.set_ylim(min(0.0, low), MARGIN * min(top, 2 * high))
        for panel in panels:
            for axis in (panel.xaxis, panel.yaxis):
                if axis.get_scale() == "log":
                    plain_log(axis)

    # ---- marks

    def _points(self, axes: Axes, rows: Sequence[Row]) -> None:
        curves: dict[tuple, list[Row]] = {}
        for row in rows:
            if row["series"] in self.controls:
                marker = HOLLOW[self.controls.index(row["series"]) % len(HOLLOW)]
                axes.plot(
                    row["x"],
                    row["y"],
                    marker,
                    markerfacecolor="white",
                    markeredgecolor="#999999",
                    markersize=5,
                    zorder=1,
                )
            else:
                key = (row["layer"], row["site"], row["kind"], row["width"], row["series"])
                curves.setdefault(key, []).append(row)
        for curve in curves.values():
            curve.sort(key=lambda row: row["x"])
            marker, line = KIND_STYLES[curve[0]["kind"]]
            colour = self.colours[self._key(curve[0])]
            x, y = ([row[each] for row in curve] for each in ("x", "y"))
            axes.plot(
                x, y, marker, color=colour, linestyle=line, linewidth=1.1, markersize=self._size(curve[0]), zorder=3
            )
            for row in curve:
                self._interval(axes, row, colour)

    def _size(self, row: Row) -> float:
        """Of a mark: of series that lie on one another the first are larger."""
        behind = len(self.colours) - 1 - list(self.colours).index(row["series"]) if self.plot["nested"] else 0
        return 3.5 + 3.0 * behind if self.plot["nested"] else 5.0

    def _interval(self, axes: Axes, row: Row, colour: str) -> None:
        if row["low"] is None:
            return
        low = row["low"]
        if axes.get_yscale() == "log" and low <= 0:
            low = row["y"] / 10
        if row["high"] > 0 or axes.get_yscale() != "log":
            axes.plot([row["x"]] * 2, [low, row["high"]], color=colour, linewidth=0.9, alpha=0.6, zorder=2)

    def _lines(self, axes: Axes, rows: Sequence[Row]) -> None:
        for (_, series), curve in self._by_sae(rows).items():
            x, y = ([row[each] for row in curve] for each in ("x", "y"))
            if series in self.controls:
                axes.plot(x, y, color=GREY, linewidth=1.2, linestyle="--", zorder=1)
                continue
            colour = self.colours[self._key(curve[0])]
            axes.plot(x, y, color=colour, linewidth=1.3, linestyle=self._line(curve[0]), zorder=3)
            inside = [row for row in curve if row["low"] is not None]
            at, low, high = ([row[each] for row in inside] for each in ("x", "low", "high"))
            axes.fill_between(at, low, high, color=colour, alpha=0.07, linewidth=0, zorder=2)

    def _steps(self, axes: Axes, rows: Sequence[Row]) -> None:
        for (_, series), curve in self._by_sae(rows).items():
            colour = self.colours[self._key(curve[0])]
            if series in self.controls:
                axes.axvline(curve[0]["x"], color=colour, linewidth=1.1, linestyle="--", zorder=1)
                continue
            x, y = (np.array([row[each] for row in curve], dtype=float) for each in ("x", "y"))
            width = x[1] - x[0] if len(x) > 1 else 0.2
            edges = np.append(x - width / 2, x[-1] + width / 2)
            axes.stairs(y, edges, color=colour, linewidth=1.3, zorder=3)
            axes.stairs(y, edges, color=colour, fill=True, alpha=0.15, zorder=2)

    @staticmethod
    def _by_sae(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
        found: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            found.setdefault((row["sae"], row["series"]), []).append(row)
        for curve in found.values():
            curve.sort(key=lambda row: row["x"])
        return found

    # ---- legend

    def _handles(self) -> list[Line2D]:
        mark = self.plot["mark"]
        if self.by == "layer":
            handles = layer_handles(self.colours)
        else:
            kept = spread(list(self.colours), len(PALETTE))
            name = {"sae": self._label, "width": "width {:,}".format}.get(self.by, str)
            handles = [
                Line2D([], [], color=self.colours[key], linewidth=2, label=literal(name(key)))
                for key in kept
                if self.by != "kind" or mark != "points"
            ]
        if self.by == "kind" and mark == "lines":
            ranks = sorted(set(self.ranks.values()))
            for index, rank in enumerate(spread(ranks, len(LINES))):
                handles.append(Line2D([], [], color=GREY, linestyle=LINES[index], label=self._label(rank)))
        for kind in self.kinds if mark == "points" else ():
            marker, line = KIND_STYLES[kind]
            colour = self.colours[kind] if self.by == "kind" else GREY
            handles.append(Line2D([], [], color=colour, marker=marker, linestyle=line, label=kind))
        for index, name in enumerate(self.controls):
            style: dict[str, Any] = {"color": GREY, "linestyle": "--"}
            if mark == "points":
                shape = HOLLOW[index % len(HOLLOW)]
                style = {"marker": shape, "markerfacecolor": "white", "markeredgecolor": GREY, "linestyle": ""}
            handles.append(Line2D([], [], label=name, **style))
        return handles
