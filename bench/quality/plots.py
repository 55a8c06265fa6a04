"""The picture of `bench.quality`, from its rows alone: FVU against L0, and against the seconds of training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median_low
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gemmascope.formats.files import atomic_write
from gemmascope.reporting.plots import LIGHT, new_figure, plain_log, tidy

STYLES = {
    "ours": ("gemmascope", "#0072B2", "^"),
    "reference": ("gemmascope, reference", "#56B4E9", "v"),
    "saelens": ("SAELens", "#D55E00", "o"),
    "dictionary_learning": ("dictionary_learning", "#E69F00", "s"),
    "sparsify": ("sparsify (TopK)", "#CC79A7", "D"),
    "sparsify_adam": ("sparsify, Adam", "#555555", "P"),
}


def drawn(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those that have a place on logarithmic axes."""
    return [row for row in rows if row["kind"] == "quality" and row["fvu"] and row["l0"] > 0]


def nearest(rows: Sequence[Mapping[str, Any]], l0: float) -> Mapping[str, Any]:
    return min(rows, key=lambda row: abs(row["l0"] - l0))


def picture(rows: Sequence[Mapping[str, Any]], machine: Mapping[str, Any]) -> Figure:
    """A row of two panels for each site. At least one row must be `drawn`."""
    rows = drawn(rows)
    sites = list(dict.fromkeys(row["site"] for row in rows))
    contenders = [name for name in STYLES if any(row["contender"] == name for row in rows)]
    figure = new_figure(10.6, 4.3 * len(sites) + 0.7)
    grid = figure.subplots(len(sites), 2, squeeze=False)
    for site, (curves, clock) in zip(sites, grid, strict=True):
        here = [row for row in rows if row["site"] == site]
        middle = median_low(row["l0"] for row in here if row["contender"] == here[0]["contender"])
        baseline = sorted((round(row["l0"]), row["pca_fvu"]) for row in here if row["pca_fvu"] and round(row["l0"]) > 0)
        ranks, pca = [rank for rank, _ in baseline], [fvu for _, fvu in baseline]
        curves.plot(ranks, pca, color=LIGHT, marker="o", markerfacecolor="white", linewidth=1)
        for name in contenders:
            mine = sorted((row for row in here if row["contender"] == name), key=lambda row: row["l0"])
            if not mine:
                continue
            _, colour, marker = STYLES[name]
            style = {"color": colour, "marker": marker, "markersize": 6, "linewidth": 1.5}
            curves.plot([row["l0"] for row in mine], [row["fvu"] for row in mine], **style)
            path = [point for point in nearest(mine, middle)["curve"] if point["fvu"]]
            clock.plot([p["seconds"] for p in path], [p["fvu"] for p in path], **style | {"markersize": 4})
        curves.set_title(f"{site}: after {here[0]['tokens_seen']:,} tokens", fontsize=11)
        clock.set_title(f"{site}: on the way, to L0 of about {middle:.1f}", fontsize=11)
        curves.set_xlabel("L0: active latents a token", fontsize=10)
        clock.set_xlabel("seconds of training", fontsize=10)
        for axes in (curves, clock):
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_ylabel("FVU (lower is better)", fontsize=10)
            tidy(axes)
            plain_log(axes.xaxis)
            plain_log(axes.yaxis)
    handles = [
        Line2D([], [], color=colour, marker=marker, label=label)
        for label, colour, marker in (STYLES[name] for name in contenders)
    ]
    handles.append(Line2D([], [], color=LIGHT, marker="o", markerfacecolor="white", label="PCA, same rank"))
    threads = f"{machine['threads']} thread{'s' if machine['threads'] != 1 else ''}"
    caption = f"{machine['device']}, {threads}, torch {machine['versions']['torch']}, {machine['date'][:10]}"
    legend = figure.legend(
        handles=handles, loc="outside lower center", ncols=(len(handles) + 1) // 2, frameon=False, fontsize=9
    )
    legend.set_title(caption, {"size": 8})
    figure.suptitle("The same SAE by every trainer, on held-out activations", fontsize=13, fontweight="bold")
    return figure


def save(rows: Sequence[Mapping[str, Any]], machine: Mapping[str, Any], folder: Path) -> Path | None:
    """Write quality.png into the folder; None when there is nothing to draw."""
    if not drawn(rows):
        return None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "quality.png"
    with atomic_write(path) as temporary:
        picture(rows, machine).savefig(temporary, format="png")
    return path
