"""Wider SAEs at the same L0: ΔLM loss and FVU against L0, a curve for each width (arXiv 2408.05147 §4.3)."""

import itertools
import math
from collections.abc import Sequence

from .common import DELTA_LOSS, FVU, L0_AXIS, Axis, Finding, Listed, Plot, Row, Study, Work, short
from .common import row_of as row
from .sparsity_fidelity import PCA

NAME = "width-ladder"
Point = tuple[float, float]


def ladders(saes: Sequence[Listed]) -> dict[tuple[str, int, str], list[Listed]]:
    """The SAEs by site, layer and kind, where there are several widths of them."""
    found: dict[tuple[str, int, str], list[Listed]] = {}
    for sae in saes:
        found.setdefault((sae.site, sae.layer, sae.kind), []).append(sae)
    return {key: group for key, group in found.items() if len({sae.width for sae in group}) > 1}


def lacks(work: Work) -> str | None:
    if ladders(work.saes):
        return None
    widths = sorted({sae.width for sae in work.saes})
    what = f"width {widths[0]} alone" if len(widths) == 1 else "each of them at another site or of another kind"
    return f"saes: expected several widths of one kind at one site, got {what}"


def run(work: Work) -> Finding:
    found = work.evaluation()
    rows: list[Row] = []
    for group in ladders(work.saes).values():
        for sae in group:
            figures = found[sae.name]
            at = {"l0": figures["l0"], "x": figures["l0"]}
            for figure, key, n in ((DELTA_LOSS, "delta_loss", "predictions"), (FVU, "fvu", "tokens")):
                if figures[key] is not None:
                    interval = figures[f"{key}_interval"]
                    rows.append(
                        row(NAME, work, sae, y=figures[key], n=figures[n], figure=figure, interval=interval, **at)
                    )
            if figures["pca_fvu"] is not None:
                n = figures["control_tokens"]
                rows.append(row(NAME, work, sae, y=figures["pca_fvu"], n=n, figure=FVU, series=PCA, **at))
    return Finding(rows, "; ".join(_sentence(work, key, group) for key, group in ladders(work.saes).items()))


def _sentence(work: Work, key: tuple[str, int, str], group: Sequence[Listed]) -> str:
    found = work.evaluation()
    widths = sorted({sae.width for sae in group})

    def curve(width: int, name: str) -> list[Point]:
        rows = [found[sae.name] for sae in group if sae.width == width]
        return sorted((row["l0"], row[name]) for row in rows if row["l0"] and row[name] is not None and row[name] > 0)

    curves = {width: curve(width, "fvu") for width in widths}
    site, layer, kind = key
    which = f"layer_{layer}/{site}, {kind}"
    l0 = common_l0([points for points in curves.values() if points])
    if l0 is None:
        parts = [f"{width}: {_points(points)}" for width, points in curves.items()]
        return f"{which}: no L0 in common; (L0, FVU) of width {', '.join(parts)}"
    parts = []
    for width in widths:
        values = [interpolated(curve(width, name), l0) for name in ("fvu", "pca_fvu")]
        losses = interpolated(curve(width, "delta_loss"), l0)
        parts.append(f"{width}: {short(values[0])}, {short(losses)} (PCA {short(values[1])})")
    return f"{which}: at L0 {short(l0)} FVU and ΔLM loss of width {'; '.join(parts)}"


def _points(points: Sequence[Point]) -> str:
    return " ".join(f"({short(l0)}, {short(y)})" for l0, y in points) or "–"


def common_l0(curves: Sequence[Sequence[Point]]) -> float | None:
    """The geometric middle of the L0 that all curves span, or None. Where they span none but are within a tenth of each
    other, the middle of them."""
    if not curves:
        return None
    low, high = max(points[0][0] for points in curves), min(points[-1][0] for points in curves)
    return math.sqrt(low * high) if low <= 1.1 * high else None


def interpolated(points: Sequence[Point], l0: float) -> float | None:
    """y at ``l0``, linear in the logarithms of both; beyond the ends that of the end. None without points."""
    if not points:
        return None
    if l0 <= points[0][0] or len(points) == 1:
        return points[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if l0 <= x1:
            share = math.log(l0 / x0) / math.log(x1 / x0) if x1 > x0 else 0.0
            return y0 * (y1 / y0) ** share
    return points[-1][1]


STUDY = Study(
    NAME,
    "Are wider SAEs better at the same L0? Needs several widths at one site.",
    "arXiv 2408.05147 §4.3, figure 4",
    Plot(
        "Width at the same sparsity",
        L0_AXIS,
        {DELTA_LOSS: Axis("ΔLM loss, nats a token", "log", (0.1, 0.5)), FVU: Axis("FVU", "log", (0.1, 0.8))},
        colours="width",
        controls=(PCA,),
    ),
    run,
    lacks,
)
