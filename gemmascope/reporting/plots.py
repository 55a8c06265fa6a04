"""The figures of a run. Colours are Okabe and Ito's, which colour-blind readers tell apart; shapes repeat them."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

SITES = {
    "att": ("attention heads", "#D55E00", "o"),
    "mlp": ("MLP output", "#009E73", "s"),
    "resid": ("residual stream", "#0072B2", "^"),
}
OTHER = ("#CC79A7", "D")
GREY, LIGHT = "#555555", "#BBBBBB"
MOST_LAYERS_IN_LEGEND = 8
FREQUENT = 0.1


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


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)  # no window system, whatever the user's matplotlibrc says
    return figure


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
    """FVU and L0 against the training step, one column a kind of site, one line a layer."""
    columns = kinds(saes)
    layers = sorted({sae["layer"] for sae in saes})
    colours = layer_colours(layers)
    figure = new_figure(3.6 * len(columns) + 0.6, 5.6)
    grid = figure.subplots(2, len(columns), squeeze=False, sharex=True, sharey="row")
    for column, site in enumerate(columns):
        for layer in layers:
            rows = [row for row in log if row["site"] == f"layer_{layer}/{site}"]
            for axes, key in zip(grid[:, column], ("fvu", "l0"), strict=True):
                points = [(row["step"], row[key]) for row in rows if row.get(key) is not None and row[key] > 0]
                if points:
                    axes.plot(*zip(*points, strict=True), color=colours[layer], linewidth=1.4, label=f"layer {layer}")
        grid[0, column].set_title(site_title(site), fontsize=11)
        grid[1, column].set_xlabel("training step", fontsize=10)
    for row, name in zip(grid, ("FVU (lower is better)", "L0: active latents a token"), strict=True):
        row[0].set_ylabel(name, fontsize=10)
        for axes in row:
            tidy(axes)
            axes.set_yscale("log")
            plain_log(axes.yaxis)
    shown = layers if len(layers) <= MOST_LAYERS_IN_LEGEND else [layers[0], layers[len(layers) // 2], layers[-1]]
    handles = [Line2D([], [], color=colours[layer], linewidth=2, label=f"layer {layer}") for layer in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    figure.suptitle("Training curves", fontsize=13, fontweight="bold")
    return figure


def l0_against_fvu(saes: Sequence[Mapping[str, Any]]) -> Figure:
    """Every SAE as a filled mark over PCA of the same rank as a hollow one."""
    figure = new_figure(8.4, 5.4)
    axes = figure.subplots()
    colours = {site: site_style(site) for site in kinds(saes)}
    for sae in saes:
        colour, marker = colours[sae["site"]]
        l0, fvu, pca = sae["l0"], sae["fvu"], sae["pca_fvu"]
        if not l0 or not fvu or fvu < 0:
            continue
        if pca and pca > 0:
            axes.plot([l0, l0], [fvu, pca], color=LIGHT, linewidth=1, zorder=1)
            axes.plot(l0, pca, marker, markerfacecolor="white", markeredgecolor=colour, markersize=7, zorder=2)
        axes.plot(l0, fvu, marker, color=colour, markersize=8, zorder=3)
        if len(saes) <= 24:
            axes.annotate(
                str(sae["layer"]), (l0, fvu), xytext=(6, -9), textcoords="offset points", fontsize=8, color=GREY
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    tidy(axes)
    plain_log(axes.xaxis)
    plain_log(axes.yaxis)
    axes.set_xlabel("L0: active latents a token (fewer is sparser)", fontsize=10)
    axes.set_ylabel("FVU: unexplained variance (lower is better)", fontsize=10)
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", markersize=8, label=site_title(site))
        for site, (colour, marker) in colours.items()
    ]
    handles.append(
        Line2D([], [], markeredgecolor=GREY, markerfacecolor="white", marker="o", linestyle="", label="PCA, same rank")
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    figure.suptitle("Sparsity against fidelity (numbers: layers)", fontsize=13, fontweight="bold")
    return figure


def firing_frequencies(saes: Sequence[Mapping[str, Any]], frequencies: Mapping[str, np.ndarray]) -> Figure:
    """A histogram of log frequency for every SAE, with the latents that never fired as a grey bar on the left."""
    columns = kinds(saes)
    layers = sorted({sae["layer"] for sae in saes})
    fired = [values[values > 0] for values in frequencies.values()]
    lowest = min((values.min() for values in fired if values.size), default=1e-4)
    low = math.floor(math.log10(lowest) * 2) / 2
    bins = np.linspace(low, 0, max(round(-low * 5), 5) + 1)
    never = bins[0] - 2.5 * (bins[1] - bins[0])
    ticks = [exponent for exponent in range(math.ceil(low), 1) if exponent % max(1, round(-low / 4)) == 0]
    figure = new_figure(3.2 * len(columns) + 0.6, 1.5 * len(layers) + 1.2)
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
            values = frequencies.get(f"layer_{layer}/{site}")
            if values is None:
                axes.set_axis_off()
                continue
            axes.bar(never, np.count_nonzero(values == 0), width=1.8 * (bins[1] - bins[0]), color=LIGHT)
            counts, _ = np.histogram(np.log10(values[values > 0]), bins)
            axes.stairs(counts, bins, fill=True, color=site_style(site)[0])
            axes.axvline(math.log10(FREQUENT), color=GREY, linewidth=0.9, linestyle="--")
            share = f"{np.mean(values == 0):.0%} never, {np.mean(values > FREQUENT):.0%} over {FREQUENT:.0%}"
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
            axes.text(
                0.98, 0.95, share, transform=axes.transAxes, ha="right", va="top", fontsize=8, color=GREY, bbox=box
            )
    figure.suptitle("How often latents fire (dashed: 10 % of tokens)", fontsize=13, fontweight="bold")
    return figure


def loss_increases(saes: Sequence[Mapping[str, Any]]) -> Figure:
    """ΔLM loss with the SAE spliced in, against that of replacing the site by its mean, by site and layer."""
    ordered = [sae for site in kinds(saes) for sae in sorted(saes, key=lambda sae: sae["layer"]) if sae["site"] == site]
    figure = new_figure(8.4, 0.3 * len(ordered) + 1.9)
    axes = figure.subplots()
    positions = np.arange(len(ordered), dtype=float)
    positions += np.cumsum([0] + [a["site"] != b["site"] for a, b in itertools.pairwise(ordered)]) * 0.6
    for y, sae in zip(positions, ordered, strict=True):
        colour, marker = site_style(sae["site"])
        with_sae, ablated = sae["delta_loss"], sae.get("ablation_delta_loss")
        if with_sae is not None and ablated is not None:
            axes.plot([with_sae, ablated], [y, y], color=LIGHT, linewidth=1.4, zorder=1)
        if ablated is not None:
            axes.plot(ablated, y, marker, markerfacecolor="white", markeredgecolor=colour, markersize=7, zorder=2)
        if with_sae is not None:
            axes.plot(with_sae, y, marker, color=colour, markersize=7, zorder=3)
    tidy(axes)
    axes.set_yticks(positions, [f"{literal(sae['site'])} {sae['layer']}" for sae in ordered])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xscale("symlog", linthresh=0.01, linscale=0.6)
    values = [sae[key] for sae in ordered for key in ("delta_loss", "ablation_delta_loss") if sae.get(key) is not None]
    axes.set_xlim(min([-0.002, *(1.5 * value for value in values)]), 1.3 * max([0.01, *values]))
    axes.axvline(0, color=GREY, linewidth=0.9)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))
    axes.set_xlabel("increase of the language model's loss (nats a token; linear below 0.01)", fontsize=10)
    handles = [
        Line2D([], [], color=GREY, marker="o", linestyle="", label="SAE spliced in"),
        Line2D([], [], markeredgecolor=GREY, markerfacecolor="white", marker="o", linestyle="", label="mean ablation"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle("What the language model loses at each site", fontsize=13, fontweight="bold")
    return figure
