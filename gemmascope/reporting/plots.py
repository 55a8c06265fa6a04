"""The figures of a run. Colours are Okabe and Ito's, which colour-blind readers tell apart; shapes repeat them."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from .log import sae_of
from .results import kind_of, kinds_of, name_of, site_of

Item = TypeVar("Item")

SITES = {
    "att": ("attention heads", "#D55E00", "o"),
    "mlp": ("MLP output", "#009E73", "s"),
    "resid": ("residual stream", "#0072B2", "^"),
}
OTHER = ("#CC79A7", "D")
# Of the kinds of SAE where there are others than JumpReLU ones: marker and line.
KIND_STYLES: dict[str, tuple[str, Any]] = {
    "jumprelu": ("o", "-"),
    "relu": ("v", ":"),
    "gated": ("s", "--"),
    "topk": ("^", "-."),
    "batchtopk": ("D", (0, (5, 1))),
    "matryoshka": ("P", (0, (1, 1))),
}
GREY, LIGHT = "#555555", "#BBBBBB"
FREQUENT = 0.1
# What stays readable; figures say what they leave out.
MOST_LAYERS_IN_LEGEND = 8
MOST_PANEL_ROWS = 12
MOST_CURVES = 32
MOST_ROWS = 40
MOST_LABELLED = 24
# Those of the SAEs of one site, in the order of `variants`.
LINES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")


def literal(text: str) -> str:
    """``text`` as matplotlib shows it, which takes what stands between two $ for a formula."""
    return text.replace("$", r"\$")


def site_title(site: str) -> str:
    return f"{site}: {SITES[site][0]}" if site in SITES else literal(site)


def site_style(site: str) -> tuple[str, str]:
    """Colour and marker."""
    return SITES[site][1:] if site in SITES else OTHER


def kinds(saes: Sequence[Mapping[str, Any]]) -> list[str]:
    present = {sae["site"] for sae in saes}
    return [site for site in SITES if site in present] + sorted(present - set(SITES))


def layer_colours(layers: Sequence[int]) -> dict[int, str]:
    """Dark to light with depth (viridis without its palest end)."""
    positions = np.linspace(0, 0.85, max(len(layers), 2))
    return {layer: to_hex(colormaps["viridis"](x)) for layer, x in zip(layers, positions, strict=False)}


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many of ``items``, from the first to the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)] if most > 1 else [items[0]]


# Of a figure, so that its title has room.
LEAST_WIDTH = 5.6
# Of a legend: a line with the gaps around it, and a letter of the text.
INCHES_OF_HANDLE, INCHES_OF_LETTER = 0.75, 0.075
# What tells the SAEs of one site apart: key of a row of results, and how it is called.
APART = (("width", "width"), ("target_l0", "target L0"), ("l0_coefficient", "λ"), ("k", "k"), ("seed", "seed"))


def variants(saes: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """``saes`` by what tells those of one site apart, such as "target L0 20" or "gated, λ 0.1"; all under "" where no
    site has two."""
    by_site: dict[str, list[Mapping[str, Any]]] = {}
    for sae in saes:
        by_site.setdefault(site_of(sae), []).append(sae)
    keys = [
        (key, label)
        for key, label in APART
        if any(len({sae.get(key) for sae in group}) > 1 for group in by_site.values())
    ]
    present = kinds_of(saes)
    if any(key == "target_l0" for key, _ in keys) and not present:
        keys = [each for each in keys if each[0] != "l0_coefficient"]

    def value(sae: Mapping[str, Any], key: str) -> float:
        aimed = key == "l0_coefficient" and sae.get("target_l0") is not None
        return -1.0 if sae.get(key) is None or aimed else float(sae[key])

    found: dict[tuple, list[Mapping[str, Any]]] = {}
    for group in by_site.values():
        seen: dict[tuple, int] = {}
        for sae in group:
            kind = float(present.index(kind_of(sae))) if present else 0.0
            values = (kind, *(value(sae, key) for key, _ in keys))
            seen[values] = seen.get(values, 0) + 1
            found.setdefault((*values, seen[values]), []).append(sae)

    def label(values: tuple) -> str:
        parts = [f"{name} {each:g}" for (_, name), each in zip(keys, values[1:], strict=False) if each >= 0]
        return ", ".join(
            [*present[int(values[0]) : int(values[0]) + 1], *parts, *([f"no. {values[-1]}"] if values[-1] > 1 else [])]
        )

    return {label(values): found[values] for values in sorted(found)}


def select(
    saes: Sequence[Mapping[str, Any]], most_layers: int
) -> tuple[dict[str, list[Mapping[str, Any]]], list[int], str]:
    """The variants and the layers of ``saes`` to draw, and what is left out as a line of text (or none)."""
    by_variant = variants(saes)
    kept = spread(list(by_variant), len(LINES))
    all_layers = sorted({sae["layer"] for sae in saes})
    layers = spread(all_layers, max(2, most_layers))
    notes = []
    if len(layers) < len(all_layers):
        notes.append(f"{len(layers)} of {len(all_layers)} layers")
    if len(kept) < len(by_variant):
        notes.append(f"{len(kept)} of {len(by_variant)} SAEs a site")
    chosen = {label: [sae for sae in by_variant[label] if sae["layer"] in set(layers)] for label in kept}
    return chosen, layers, f"shown: {' and '.join(notes)}" if notes else ""


def entitle(figure: Figure, title: str, note: str = "") -> None:
    figure.suptitle(f"{title}\n({note})" if note else title, fontsize=13, fontweight="bold")


def layer_handles(colours: Mapping[int, str]) -> list[Line2D]:
    layers = list(colours)
    shown = layers if len(layers) <= MOST_LAYERS_IN_LEGEND else spread(layers, 3)
    return [Line2D([], [], color=colours[layer], linewidth=2, label=f"layer {layer}") for layer in shown]


def variant_handles(labels: Iterable[str]) -> list[Line2D]:
    return [
        Line2D([], [], color=GREY, linestyle=line, label=label)
        for label, line in zip(labels, LINES, strict=False)
        if label
    ]


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(max(width, LEAST_WIDTH), height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)  # no window system, whatever the user's matplotlibrc says
    return figure


def legend_below(figure: Figure, handles: Sequence[Line2D]) -> None:
    """A legend under the axes, in as many columns as the width has room for."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    room = int(figure.get_figwidth() / (INCHES_OF_HANDLE + INCHES_OF_LETTER * longest))
    columns = max(1, min(len(handles), room, 8))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E5E5E5", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9, colors="#333333")


def plain_log(axis) -> None:
    """0.01 0.1 1 10 instead of powers, with labels in between where fewer than two decades are shown."""
    low, high = sorted(axis.get_view_interval())
    span = high / low if low > 0 else math.inf
    leads = (1, 2, 3, 4, 5, 6, 8) if span < 10 else (1, 2, 3, 5) if span < 100 else (1,)

    def label(value: float, position=None) -> str:
        lead = round(value / 10 ** math.floor(math.log10(value) + 1e-9))
        return f"{value:g}" if lead in leads else ""

    axis.set_major_formatter(FuncFormatter(label))
    axis.set_minor_formatter(FuncFormatter(label))
    axis.set_tick_params(which="minor", labelsize=9, labelcolor="#333333")


def training_curves(saes: Sequence[Mapping[str, Any]], log: Sequence[Mapping[str, Any]]) -> Figure:
    """FVU and L0 against the training step, one column a kind of site, one line a layer and SAE."""
    columns = kinds(saes)
    chosen, layers, note = select(saes, MOST_CURVES // len(variants(saes)))
    colours = layer_colours(layers)
    rows_of: dict[str, list[Mapping[str, Any]]] = {}
    for row in log:
        rows_of.setdefault(sae_of(row), []).append(row)
    figure = new_figure(3.6 * len(columns) + 0.6, 5.6)
    grid = figure.subplots(2, len(columns), squeeze=False, sharex=True, sharey="row")
    for column, site in enumerate(columns):
        for line, of_variant in zip(LINES, chosen.values(), strict=False):
            for sae in (sae for sae in of_variant if sae["site"] == site):
                for axes, key in zip(grid[:, column], ("fvu", "l0"), strict=True):
                    rows = rows_of.get(name_of(sae), [])
                    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None and row[key] > 0]
                    if points:
                        colour = colours[sae["layer"]]
                        axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.4, linestyle=line)
        grid[0, column].set_title(site_title(site), fontsize=11)
        grid[1, column].set_xlabel("training step", fontsize=10)
    for row, name in zip(grid, ("FVU (lower is better)", "L0: active latents a token"), strict=True):
        row[0].set_ylabel(name, fontsize=10)
        for axes in row:
            tidy(axes)
            axes.set_yscale("log")
            plain_log(axes.yaxis)
    handles = layer_handles(colours) + variant_handles(chosen)
    legend_below(figure, handles)
    entitle(figure, "Training curves", note)
    return figure


def l0_against_fvu(saes: Sequence[Mapping[str, Any]]) -> Figure:
    """Every SAE as a filled mark over PCA of the same rank as a hollow one, and a curve through those of one kind at a
    site. Marks and lines tell the kinds of SAE where there are several.

    Many SAEs have a panel for each kind of site, where colours tell the layers."""
    by_kind = len(saes) > MOST_LABELLED
    panels = kinds(saes) if by_kind else [""]
    figure = new_figure(3.8 * len(panels) + 0.6 if by_kind else 8.4, 5.4)
    grid = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)[0]
    colours = layer_colours(sorted({sae["layer"] for sae in saes}))
    present = kinds_of(saes)
    sites: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for sae in saes:
        if sae["l0"] and sae["fvu"] and sae["fvu"] > 0 and sae["l0"] > 0:
            sites.setdefault((site_of(sae), kind_of(sae)), []).append(sae)
    for (_, kind), of_site in sites.items():
        of_site.sort(key=lambda sae: sae["l0"])
        site, layer = of_site[0]["site"], of_site[0]["layer"]
        axes = grid[panels.index(site)] if by_kind else grid[0]
        colour, marker = (colours[layer], site_style(site)[1]) if by_kind else site_style(site)
        marker, line = KIND_STYLES[kind] if present else (marker, "-")
        if len(of_site) > 1:
            points = [sae["l0"] for sae in of_site], [sae["fvu"] for sae in of_site]
            axes.plot(*points, color=colour, linewidth=1.2, linestyle=line)
        for sae in of_site:
            l0, fvu, pca = sae["l0"], sae["fvu"], sae["pca_fvu"]
            if pca and pca > 0:
                axes.plot([l0, l0], [fvu, pca], color=LIGHT, linewidth=0.5 if by_kind else 1, zorder=1)
                size = 4 if by_kind else 7
                axes.plot(l0, pca, marker, markerfacecolor="white", markeredgecolor=colour, markersize=size, zorder=2)
            axes.plot(l0, fvu, marker, color=colour, markersize=5 if by_kind else 8, zorder=3)
        if not by_kind:
            place = (of_site[-1]["l0"], of_site[-1]["fvu"])
            axes.annotate(str(layer), place, xytext=(6, -9), textcoords="offset points", fontsize=8, color=GREY)
    for axes, site in zip(grid, panels, strict=True):
        axes.set_xscale("log")
        axes.set_yscale("log")
        tidy(axes)
        plain_log(axes.xaxis)
        plain_log(axes.yaxis)
        axes.set_xlabel("L0: active latents a token (fewer is sparser)" if not by_kind else "L0", fontsize=10)
        if by_kind:
            axes.set_title(site_title(site), fontsize=11)
    grid[0].set_ylabel("FVU: unexplained variance (lower is better)", fontsize=10)
    handles = layer_handles(colours) if by_kind else []
    for site in () if by_kind else kinds(saes):
        colour, marker = site_style(site)
        handles.append(Line2D([], [], color=colour, marker=marker, linestyle="", markersize=8, label=site_title(site)))
    for kind in present:
        marker, line = KIND_STYLES[kind]
        handles.append(Line2D([], [], color=GREY, marker=marker, linestyle=line, label=kind))
    handles.append(
        Line2D([], [], markeredgecolor=GREY, markerfacecolor="white", marker="o", linestyle="", label="PCA, same rank")
    )
    columns = min(len(handles), 5 if present else 8)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    entitle(figure, "Sparsity against fidelity" + ("" if by_kind else " (numbers: layers)"))
    return figure


def firing_frequencies(saes: Sequence[Mapping[str, Any]], frequencies: Mapping[str, np.ndarray]) -> Figure:
    """A histogram of log frequency for every SAE, with the latents that never fired as a bar on the left."""
    columns = kinds(saes)
    chosen, layers, note = select(saes, MOST_PANEL_ROWS)
    several = len(chosen) > 1
    fired = [values[values > 0] for values in frequencies.values()]
    lowest = min((values.min() for values in fired if values.size), default=1e-4)
    low = math.floor(math.log10(lowest) * 2) / 2
    bins = np.linspace(low, 0, max(round(-low * 5), 5) + 1)
    never = bins[0] - 2.5 * (bins[1] - bins[0])
    ticks = [exponent for exponent in range(math.ceil(low), 1) if exponent % max(1, round(-low / 4)) == 0]
    ticks = [exponent for exponent in ticks if exponent - never > -never / 6]  # clear of the label of the bar
    figure = new_figure(3.2 * len(columns) + 0.6, (1.8 if several else 1.5) * len(layers) + 1.2)
    grid = figure.subplots(len(layers), len(columns), squeeze=False, sharex=True, sharey=True)
    for row, layer in enumerate(layers):
        for column, site in enumerate(columns):
            axes = grid[row, column]
            tidy(axes)
            if row == 0:
                axes.set_title(site_title(site), fontsize=11)
            if column == 0:
                axes.set_ylabel(f"layer {layer}\nlatents", fontsize=9)
            if row == len(layers) - 1:
                axes.set_xticks([never, *ticks], ["never", *(f"{100 * 10.0**exponent:g}%" for exponent in ticks)])
                axes.tick_params(axis="x", labelsize=8)
                axes.set_xlabel("share of tokens a latent fires on", fontsize=10)
            shares, step = [], bins[1] - bins[0]
            for index, (label, of_variant) in enumerate(chosen.items()):
                here = [sae for sae in of_variant if (sae["layer"], sae["site"]) == (layer, site)]
                values = frequencies.get(name_of(here[0])) if here else None
                if values is None:
                    continue
                width = 1.8 * step / len(chosen)
                left = never + (index - (len(chosen) - 1) / 2) * width
                line = {"linestyle": LINES[index], "edgecolor": GREY} if several else {}
                axes.bar(left, np.count_nonzero(values == 0), width=width, color=LIGHT, **line)
                counts, _ = np.histogram(np.log10(values[values > 0]), bins)
                line = {"linestyle": LINES[index], "linewidth": 1.3} if several else {}
                axes.stairs(counts, bins, fill=not several, color=site_style(site)[0], **line)
                share = f"{np.mean(values == 0):.0%} never, {np.mean(values > FREQUENT):.0%} over {FREQUENT:.0%}"
                shares.append(f"{label}: {share}" if label else share)
            if not shares:
                axes.set_axis_off()
                continue
            axes.axvline(math.log10(FREQUENT), color=GREY, linewidth=0.9, linestyle="--")
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.8 if several else 1.0}
            options = {"ha": "right", "va": "top", "fontsize": 7 if several else 8, "color": GREY, "bbox": box}
            axes.text(0.98, 0.95, "\n".join(shares), transform=axes.transAxes, **options)
    if several:
        low, high = grid[0, 0].get_ylim()
        grid[0, 0].set_ylim(low, high * (1.1 + 0.15 * len(chosen)))  # room for the lines of text
    handles = variant_handles(chosen)
    if handles:
        legend_below(figure, handles)
    entitle(figure, "How often latents fire (dashed: 10 % of tokens)", note)
    return figure


def loss_increases(saes: Sequence[Mapping[str, Any]]) -> Figure:
    """ΔLM loss with the SAE spliced in, against that of replacing the site by its mean: a row for each SAE, or, of many
    sites, a panel for each kind and a curve over the layers for each variant."""
    if len({site_of(sae) for sae in saes}) > MOST_ROWS:
        return _loss_by_layer(saes)
    by_variant = variants(saes)
    most = max(1, MOST_ROWS // len({site_of(sae) for sae in saes}))
    kept = spread(list(by_variant), most)
    note = f"shown: {len(kept)} of {len(by_variant)} SAEs a site" if len(kept) < len(by_variant) else ""
    labelled = [(sae, label) for label in kept for sae in by_variant[label]]
    labelled.sort(key=lambda each: (each[0]["layer"], kept.index(each[1])))
    ordered = [each for site in kinds(saes) for each in labelled if each[0]["site"] == site]
    figure = new_figure(8.4, 0.3 * len(ordered) + 1.9)
    axes = figure.subplots()
    positions = np.arange(len(ordered), dtype=float)
    positions += np.cumsum([0] + [a["site"] != b["site"] for (a, _), (b, _) in itertools.pairwise(ordered)]) * 0.6
    for y, (sae, _) in zip(positions, ordered, strict=True):
        colour, marker = site_style(sae["site"])
        with_sae, ablated = sae["delta_loss"], sae.get("ablation_delta_loss")
        if with_sae is not None and ablated is not None:
            axes.plot([with_sae, ablated], [y, y], color=LIGHT, linewidth=1.4, zorder=1)
        if ablated is not None:
            axes.plot(ablated, y, marker, markerfacecolor="white", markeredgecolor=colour, markersize=7, zorder=2)
        if with_sae is not None:
            axes.plot(with_sae, y, marker, color=colour, markersize=7, zorder=3)
    tidy(axes)
    names = [f"{literal(sae['site'])} {sae['layer']}" + (f", {label}" if label else "") for sae, label in ordered]
    axes.set_yticks(positions, names)
    axes.set_ylim(positions[-1] + 0.8, positions[0] - 0.8)
    axes.grid(axis="y", visible=False)
    low, high = _loss_range([sae for sae, _ in ordered])
    axes.set_xscale("symlog", linthresh=0.01, linscale=0.6)
    axes.set_xlim(low, high)
    axes.xaxis.set_major_formatter(FuncFormatter(plain))
    axes.axvline(0, color=GREY, linewidth=0.9)
    axes.set_xlabel(LOSS_AXIS, fontsize=10)
    handles = [
        Line2D([], [], color=GREY, marker="o", linestyle="", label="SAE spliced in"),
        Line2D([], [], markeredgecolor=GREY, markerfacecolor="white", marker="o", linestyle="", label="mean ablation"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    entitle(figure, "What the language model loses at each site", note)
    return figure


LOSS_AXIS = "increase of the language model's loss (nats a token; linear below 0.01)"


def plain(value: float, position=None) -> str:
    return f"{value:g}"


def _loss_range(saes: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Room for all losses of ``saes``."""
    values = [sae[key] for sae in saes for key in ("delta_loss", "ablation_delta_loss") if sae.get(key) is not None]
    return min([-0.002, *(1.5 * value for value in values)]), 1.3 * max([0.01, *values])


def _loss_by_layer(saes: Sequence[Mapping[str, Any]]) -> Figure:
    columns = kinds(saes)
    chosen, _, note = select(saes, len(saes))
    figure = new_figure(3.8 * len(columns) + 0.6, 5.0)
    grid = figure.subplots(1, len(columns), squeeze=False, sharex=True, sharey=True)[0]
    for axes, site in zip(grid, columns, strict=True):
        colour, marker = site_style(site)
        for index, of_variant in enumerate(chosen.values()):
            here = sorted((sae for sae in of_variant if sae["site"] == site), key=lambda sae: sae["layer"])
            points = [(sae["layer"], sae["delta_loss"]) for sae in here if sae["delta_loss"] is not None]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4, linestyle=LINES[index])
        ablated = {
            sae["layer"]: sae["ablation_delta_loss"]
            for sae in saes
            if sae["site"] == site and sae.get("ablation_delta_loss") is not None
        }
        if ablated:
            style = {"color": LIGHT, "marker": marker, "markerfacecolor": "white", "markersize": 4, "linewidth": 1}
            axes.plot(*zip(*sorted(ablated.items()), strict=True), **style)
        tidy(axes)
        axes.axhline(0, color=GREY, linewidth=0.9)
        axes.set_title(site_title(site), fontsize=11)
        axes.set_xlabel("layer", fontsize=10)
    low, high = _loss_range(saes)
    grid[0].set_yscale("symlog", linthresh=0.01, linscale=0.6)
    grid[0].set_ylim(low, high)
    grid[0].yaxis.set_major_formatter(FuncFormatter(plain))
    grid[0].set_ylabel(LOSS_AXIS.replace(" (", "\n("), fontsize=10)
    handles = [
        *variant_handles(chosen),
        *([] if len(chosen) > 1 else [Line2D([], [], color=GREY, marker="o", label="SAE spliced in")]),
        Line2D([], [], color=LIGHT, marker="o", markerfacecolor="white", label="mean ablation"),
    ]
    legend_below(figure, handles)
    entitle(figure, "What the language model loses at each site", note)
    return figure
