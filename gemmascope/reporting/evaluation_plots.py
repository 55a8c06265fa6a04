"""The figure of an evaluation that a run does not have: sparsity against the loss of the model, with intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .plots import (
    GREY,
    KIND_STYLES,
    entitle,
    kinds,
    layer_colours,
    layer_handles,
    new_figure,
    plain_log,
    site_title,
    tidy,
)
from .results import kind_of, kinds_of, site_of

NARROWEST = 7.2


def l0_against_delta_loss(saes: Sequence[Mapping[str, Any]]) -> Figure:
    """L0 and ΔLM loss of every SAE on logarithmic axes, as in Gemma Scope's figure 2, with the interval of the loss; a
    panel for each kind of site, colours by layer, marks and lines by kind of SAE. A rise that is not above 0 has no
    place on them and is counted in the title."""
    panels = kinds(saes)
    figure = new_figure(max(NARROWEST, 3.8 * len(panels) + 0.6), 4.8)
    grid = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)[0]
    colours = layer_colours(sorted({sae["layer"] for sae in saes}))
    curves: dict[tuple, list[Mapping[str, Any]]] = {}
    shown = [sae for sae in saes if (sae.get("l0") or 0) > 0 and (sae.get("delta_loss") or 0) > 0]
    for sae in shown:
        curves.setdefault((site_of(sae), kind_of(sae), sae["width"], sae.get("seed")), []).append(sae)
    for (_, kind, *_), curve in curves.items():
        curve.sort(key=lambda sae: sae["l0"])
        axes, colour = grid[panels.index(curve[0]["site"])], colours[curve[0]["layer"]]
        marker, line = KIND_STYLES[kind]
        l0, delta = [sae["l0"] for sae in curve], [sae["delta_loss"] for sae in curve]
        axes.plot(l0, delta, marker, color=colour, linestyle=line, linewidth=1.1, markersize=5)
        for sae in curve:
            ends = sae.get("delta_loss_interval")
            if ends is not None and ends[1] > 0:
                low = ends[0] if ends[0] > 0 else sae["delta_loss"] / 10
                axes.plot([sae["l0"]] * 2, [low, ends[1]], color=colour, linewidth=0.9, alpha=0.6)
    for axes, site in zip(grid, panels, strict=True):
        axes.set_xscale("log")
        axes.set_yscale("log")
        tidy(axes)
        if shown:
            plain_log(axes.xaxis)
            plain_log(axes.yaxis)
        axes.set_title(site_title(site), fontsize=11)
        axes.set_xlabel("L0", fontsize=10)
    grid[0].set_ylabel("ΔLM loss, nats a token", fontsize=10)
    handles = layer_handles(colours)
    for kind in kinds_of(saes):
        marker, line = KIND_STYLES[kind]
        handles.append(Line2D([], [], color=GREY, marker=marker, linestyle=line, label=kind))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), 4 * len(panels)), frameon=False, fontsize=9
    )
    left_out = len(saes) - len(shown)
    entitle(figure, "Sparsity against the model's loss", f"without {left_out} that cost nothing" if left_out else "")
    return figure
