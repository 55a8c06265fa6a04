"""What a person sees of probes: the table and the figure, from the file that they left."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadFileError
from ..formats.files import as_path, atomic_write, shown
from .log import is_figure
from .results import RESULTS, formatted, kind_of, kinds_of, read_results

if TYPE_CHECKING:
    import rich.table

VERSION = 1
# What a probe reads: k latents of an SAE or of a random dictionary, k coordinates of the activation, or all of them.
PROBES = ("latents", "random", "neurons", "dense")
MOST_PANELS = 9
FIGURE = "score_against_k.png"


def is_probing(folder: str | os.PathLike) -> bool:
    """Whether the results in ``folder`` are those of probes. Raises as `read_probing`."""
    return isinstance(read_results(folder, ()).get("probing"), dict)


def read_probing(folder: str | os.PathLike) -> dict[str, Any]:
    """The checked contents of the results.json of probes.

    Raises BadFileError when the file is missing or is not what `gemmascope probe` writes.
    """
    results, name = read_results(folder, ()), shown(Path(folder) / RESULTS)
    probing = results.get("probing")
    if not isinstance(probing, dict) or results.get("version") != VERSION:
        raise BadFileError(f"{name}: expected the results of probes of version {VERSION}, found others")
    ks, tasks = probing.get("ks"), probing.get("tasks")
    if not isinstance(ks, list) or not ks or not all(type(k) is int and k > 0 for k in ks):
        raise BadFileError(f"{name}: probing: expected a list of numbers 'ks', found {ks!r:.40}")
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise BadFileError(f"{name}: probing: expected a list of objects 'tasks', found {tasks!r:.40}")
    if not isinstance(results.get("rows"), list):
        raise BadFileError(f"{name}: expected a list 'rows', found {results.get('rows')!r:.40}")
    for position, sae in enumerate(results["saes"]):
        for probe in PROBES:
            key = f"{probe}_balanced_accuracy"
            means = sae.get(key)
            if not isinstance(means, dict) or not all(map(is_figure, means.values())):
                raise BadFileError(f"{name}: saes[{position}]: expected numbers by k {key!r}, found {means!r:.40}")
    return results


def _lines(results: Mapping[str, Any]) -> list[tuple[list[str], list[str], bool]]:
    """Of each SAE and what it is compared with: names, scores by k and with all coordinates, whether a site ends."""
    ks, saes = [str(k) for k in results["probing"]["ks"]], results["saes"]
    found: list[tuple[list[str], list[str], bool]] = []
    sites = list(dict.fromkeys((sae["layer"], sae["site"]) for sae in saes))
    for layer, site in sites:
        of_site = [sae for sae in saes if (sae["layer"], sae["site"]) == (layer, site)]

        def scores(sae: Mapping[str, Any], probe: str, last: str = "") -> list[str]:
            means = sae[f"{probe}_balanced_accuracy"]
            return [*(formatted(means.get(k), ".3f") for k in ks), last]

        first, place = of_site[0], [site, str(layer)]
        all_of_it = formatted(first["dense_balanced_accuracy"].get("all"), ".3f")
        found.append(([*place, "coordinates", "", ""], scores(first, "neurons", all_of_it), False))
        for number, sae in enumerate(of_site):
            own = [kind_of(sae), str(sae["width"]), formatted(sae["l0"], ".1f")]
            found.append(([*place, *own], scores(sae, "latents"), False))
            ends = number + 1 == len(of_site)
            found.append((["", "", "  random", "", ""], scores(sae, "random"), ends))
    return found


def probing_table(results: Mapping[str, Any]) -> "rich.table.Table":
    """Balanced accuracy, the mean over all tasks, by k: of the latents of each SAE and, below it, of those of a random
    dictionary of its width and L0; of the coordinates of a site, k or all of them."""
    import rich.box
    import rich.table
    import rich.text

    probing = results["probing"]
    tasks, documents = len(probing["tasks"]), results["model"].get("documents")
    caption = f"Mean of {tasks} labels and {probing['splits']} splits of {documents} documents; .5 is chance."
    table = rich.table.Table(
        title=rich.text.Text("Balanced accuracy of probes that read k latents"),
        caption=rich.text.Text(caption),
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title_justify="left",
        caption_justify="left",
    )
    for head in ("site", "layer", "kind", "width", "L0", *(f"k {k}" for k in probing["ks"]), "all"):
        table.add_column(head, justify="left" if head in ("site", "kind") else "right", no_wrap=True)
    for names, scores, ends in _lines(results):
        table.add_row(*map(rich.text.Text, (*names, *scores)), end_section=ends)
    return table


def write_probing(folder: str | os.PathLike) -> Path:
    """Draw the figure of probes into ``folder``/plots and return its path. Needs matplotlib."""
    folder = as_path("folder", folder)
    figure = score_against_k(read_probing(folder))
    path = folder / "plots" / FIGURE
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", facecolor="white")
    return path


def score_against_k(results: Mapping[str, Any]) -> Any:
    """Balanced accuracy, the mean over all tasks, against k: a panel for each site, a line for each SAE, by kind; grey
    lines of the coordinates and of a random dictionary, and one of all coordinates."""
    from matplotlib.lines import Line2D

    from .plots import (
        GREY,
        KIND_STYLES,
        LIGHT,
        entitle,
        layer_colours,
        legend_below,
        new_figure,
        site_title,
        spread,
        tidy,
    )

    saes: Sequence[Mapping[str, Any]] = results["saes"]
    ks = results["probing"]["ks"]
    every = sorted({(sae["layer"], sae["site"]) for sae in saes})
    panels = spread(every, MOST_PANELS)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(4.2 * columns + 0.6, 3.6 * rows + 1.0)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    kinds = kinds_of(saes) or ["jumprelu"]
    colours = dict(zip(kinds, layer_colours(range(len(kinds))).values(), strict=True))
    for axes, (layer, site) in zip(grid, panels, strict=False):
        of_site = [sae for sae in saes if (sae["layer"], sae["site"]) == (layer, site)]

        def draw(sae: Mapping[str, Any], probe: str, axes=axes, **style: Any) -> None:
            means = sae[f"{probe}_balanced_accuracy"]
            known = [k for k in ks if str(k) in means]
            axes.plot(known, [means[str(k)] for k in known], **style)

        for sae in of_site:
            draw(sae, "random", color=LIGHT, linewidth=0.9)
        for sae in of_site:
            kind = kind_of(sae)
            marker, line = KIND_STYLES[kind]
            draw(sae, "latents", color=colours[kind], marker=marker, linestyle=line, linewidth=1.2, markersize=5)
        draw(of_site[0], "neurons", color=GREY, linewidth=1.6, linestyle="--", marker="x", markersize=5)
        if (level := of_site[0]["dense_balanced_accuracy"].get("all")) is not None:
            axes.axhline(level, color=GREY, linewidth=1.2, linestyle=":")
        tidy(axes)
        axes.set_title(f"layer {layer}, {site_title(site)}", fontsize=11)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ks, [str(k) for k in ks])
        axes.minorticks_off()
        axes.set_xlabel("k", fontsize=10)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    grid[0].set_ylabel("balanced accuracy", fontsize=10)
    handles = [
        Line2D([], [], color=colours[kind], marker=KIND_STYLES[kind][0], linestyle=KIND_STYLES[kind][1], label=kind)
        for kind in kinds
    ]
    handles += [
        Line2D([], [], color=GREY, linestyle="--", marker="x", label="coordinates"),
        Line2D([], [], color=GREY, linestyle=":", label="all coordinates"),
        Line2D([], [], color=LIGHT, label="random dictionary"),
    ]
    legend_below(figure, handles)
    left_out = len(every) - len(panels)
    entitle(figure, "What k latents tell of labels", f"{len(panels)} of {len(every)} sites" if left_out else "")
    return figure
