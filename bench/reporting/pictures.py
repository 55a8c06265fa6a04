"""The figures of a suite, from rows alone. Colours are those of `reporting.plots`: ours coloured, all others grey."""

import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.reporting.tables import Row, milliseconds
from gemmascope.reporting.plots import GREY, LIGHT, SITES, new_figure, plain_log, tidy

OURS_COLOURS = (SITES["resid"][1], SITES["mlp"][1], "#56B4E9")
OTHER_COLOURS = (SITES["att"][1], "#E69F00", "#CC79A7", "#555555", "#999999", "#F0E442", "#000000")
LABELS = {
    "ours": "gemmascope",
    "ours_cpu": "gemmascope, native",
    "ours_pytorch": "gemmascope, PyTorch only",
    "ours_dense": "gemmascope, dense route",
    "products": "dense products alone",
    "dense": "dense PyTorch",
    "dense_compiled": "dense PyTorch, compiled",
    "embedding_bag": "embedding_bag decoder",
    "torch_sparse": "torch.sparse decoder",
    "saelens": "SAELens",
    "saelens_autocast": "SAELens, autocast",
    "saelens_compiled": "SAELens, compiled",
    "dictionary_learning": "dictionary_learning",
    "sparsify": "sparsify (TopK)",
}
TITLES = {
    "step": "One training step",
    "forward": "Forward",
    "backward": "Backward",
    "infer": "Inference, encode and decode",
    "module": "Inference, the module called",
    "encode": "Encode",
    "decode": "Decode",
    "decode_backward": "Backward of decode",
    "jumprelu": "JumpReLU",
    "jumprelu_backward": "Backward of JumpReLU",
}
# The parts a picture shows, the first that a suite has; the tables have all of them.
SHOWN = {"cpu": ("step", "infer"), "step": ("step",), "inference": ("infer",)}
WIDE_RANGE = 25  # slowest over fastest, beyond which bars are drawn on a logarithmic scale
Panel = tuple[str, Sequence[Row]]


def label(row: Row) -> str:
    name = LABELS.get(row["contender"], row["contender"])
    version = next(iter(row.get("versions", {}).values()), "")
    return f"{name} {version}".rstrip()


def duration(ms: float) -> str:
    if ms < 0.1:
        return f"{1e3 * ms:.0f} µs"
    return f"{ms:,.0f} ms" if ms >= 100 else f"{milliseconds(ms)} ms"


def bars(axes: Axes, title: str, rows: Sequence[Row]) -> None:
    """A bar for each contender, the fastest on top, with its time and how many times ours that is."""
    rows = sorted(rows, key=lambda row: row["p50_ms"])
    ours = [row["contender"] for row in rows if row["ours"]]
    unit = ours[0] if ours else None
    slowest, fastest = rows[-1]["p50_ms"], rows[0]["p50_ms"]
    log = slowest > WIDE_RANGE * fastest
    for y, row in enumerate(rows):
        colour = OURS_COLOURS[ours.index(row["contender"]) % len(OURS_COLOURS)] if row["ours"] else LIGHT
        axes.barh(y, row["p50_ms"], height=0.68, color=colour)
        axes.plot([row["p20_ms"], row["p80_ms"]], [y, y], color="#333333", linewidth=1.2)
        ratio = row["ratio_to"].get(unit)
        text = duration(row["p50_ms"]) + (f"   {ratio:.1f}×" if ratio else "")
        axes.annotate(
            text,
            (max(row["p50_ms"], row["p80_ms"]), y),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            fontweight="bold" if row["ours"] else "normal",
        )
    tidy(axes)
    axes.grid(axis="y", visible=False)
    axes.set_yticks(range(len(rows)), [label(row) for row in rows])
    axes.invert_yaxis()
    if log:
        axes.set_xscale("log")
        axes.set_xlim(fastest / 2, slowest * (slowest / fastest) ** 0.45)
        plain_log(axes.xaxis)
    else:
        axes.set_xlim(0, 1.3 * max(row["p80_ms"] for row in rows))
        axes.xaxis.set_major_formatter("{x:,.10g}")
    scale = ", logarithmic" if log else ""
    axes.set_xlabel(f"milliseconds (median; line: 20th to 80th percentile{scale})", fontsize=9)
    axes.set_title(title, loc="left", fontsize=11)


def curves(axes: Axes, title: str, rows: Sequence[Row]) -> None:
    """Time against tokens, a line for each contender, over the floor of the roofline."""
    names = list(dict.fromkeys(row["contender"] for row in rows))
    ours = [name for name in names if any(row["ours"] for row in rows if row["contender"] == name)]
    others = [name for name in names if name not in ours]
    for name in names:
        mine = sorted((row for row in rows if row["contender"] == name), key=lambda row: row["tokens"])
        colours, position = (OURS_COLOURS, ours.index(name)) if name in ours else (OTHER_COLOURS, others.index(name))
        axes.plot(
            [row["tokens"] for row in mine],
            [row["p50_ms"] for row in mine],
            color=colours[position % len(colours)],
            marker="o",
            markersize=4,
            linewidth=2.2 if name in ours else 1.2,
            label=label(mine[0]),
        )
    floor = {row["tokens"]: row["floor_ms"] for row in rows}
    axes.plot(*zip(*sorted(floor.items()), strict=True), color=GREY, linestyle="--", linewidth=1, label="roofline")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    tidy(axes)
    tokens = sorted(floor)
    axes.set_xticks(tokens, [f"{n:,}" for n in tokens])
    plain_log(axes.yaxis)
    axes.set_xlabel("tokens", fontsize=9)
    axes.set_ylabel("milliseconds", fontsize=9)
    axes.set_title(title, loc="left", fontsize=11)
    axes.legend(fontsize=8, frameon=False)


def sizes(row: Row) -> str:
    return f"{row['shape']} ({row['d_model']:,} × {row['d_sae']:,})"


def panels(suite: str, times: Sequence[Row]) -> list[tuple[str, Sequence[Row], bool]]:
    """(title, rows, whether they are curves over the tokens) of each panel."""
    shown = SHOWN.get(suite) or tuple(dict.fromkeys(row["part"] for row in times))
    groups: dict[tuple, list[Row]] = {}
    for part in shown:
        for row in times:
            if row["part"] == part:
                groups.setdefault((part, sizes(row), row["target_l0"], row["dtype"], row["beta1"]), []).append(row)
    found = []
    for (part, shape, l0, dtype, beta1), rows in groups.items():
        tokens = sorted({row["tokens"] for row in rows})
        title = f"{TITLES[part]}\n{shape}, L0 {l0:g}, {dtype}" + (f", β1 {beta1:g}" if beta1 else "")
        if len(tokens) > 2:
            found.append((title, rows, True))
            continue
        for n in tokens:
            found.append((f"{title}, {n:,} tokens", [row for row in rows if row["tokens"] == n], False))
    return found


def picture(suite: str, times: Sequence[Row], caption: str) -> Figure:
    """All panels of a suite on one machine, one above the other."""
    found = panels(suite, times)
    heights = [3.6 if curve else 0.32 * len(rows) + 1.25 for _, rows, curve in found]
    lines = textwrap.wrap(caption, 125)
    figure = new_figure(8.6, sum(heights) + 0.2 * len(lines) + 0.2)
    grid = figure.subplots(len(found), 1, squeeze=False, height_ratios=heights)
    for axes, (title, rows, curve) in zip(grid[:, 0], found, strict=True):
        (curves if curve else bars)(axes, title, rows)
    figure.supxlabel("\n".join(lines), fontsize=7.5, color=GREY, x=0.01, ha="left")
    return figure
