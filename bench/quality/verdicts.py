"""What the rows of `bench.quality` say: figures by site, ours beside the curves of others and beside the reference."""

import bisect
import math
from collections.abc import Sequence
from typing import Any

OURS = ("ours", "reference")
PARITY = 0.01
Row = dict[str, Any]


def interpolate(l0: float, points: Sequence[tuple[float, float]]) -> float | None:
    """FVU at ``l0`` on the curve through (L0, FVU), a straight line between neighbours in logarithms; None outside."""
    points = sorted(points)
    place = bisect.bisect_left(points, (l0, -math.inf))
    if place < len(points) and points[place][0] == l0:
        return points[place][1]
    if place in (0, len(points)):
        return None
    (l0_a, a), (l0_b, b) = points[place - 1 : place + 1]
    share = math.log(l0 / l0_a) / math.log(l0_b / l0_a)
    return math.exp((1 - share) * math.log(a) + share * math.log(b))


def points_of(rows: Sequence[Row], contender: str, site: str) -> list[tuple[float, float]]:
    mine = (row for row in rows if row["kind"] == "quality" and row["contender"] == contender and row["site"] == site)
    return [(row["l0"], row["fvu"]) for row in mine if row["l0"] > 0 and row["fvu"]]


def compare(rows: Sequence[Row], contender: str, site: str) -> Row:
    """FVU of ours over the contender's at the same L0, wherever one has a point that the other's curve passes over."""
    ours, theirs = points_of(rows, "ours", site), points_of(rows, contender, site)
    ratios = [mine / fvu for l0, fvu in theirs if (mine := interpolate(l0, ours))]
    ratios += [fvu / other for l0, fvu in ours if (other := interpolate(l0, theirs))]
    least, most = min(ratios, default=None), max(ratios, default=None)
    met = None if most is None else most <= 1
    return {"contender": contender, "site": site, "least": least, "most": most, "points": len(ratios), "met": met}


def table(rows: Sequence[Row]) -> list[str]:
    """Lines for the terminal: figures by site, then what each trainer does otherwise."""
    lines, sites = [], dict.fromkeys(row["site"] for row in rows)
    for site in sites:
        lines += [
            f"{site}",
            f"  {'trainer':20s} {'sparsity':>12s} {'L0':>7s} {'FVU':>8s} {'PCA':>7s} {'dead':>6s} {'s':>7s}",
        ]
        for row in rows:
            if row["site"] != site:
                continue
            if row["kind"] == "skipped":
                lines.append(f"  {row['contender']:20s} {row['reason']}")
            elif row["kind"] == "quality":
                (sparsity,) = row["sparsity"].items()
                sign = "λ" if sparsity[0] == "l0_coefficient" else "L0"
                fvu, pca = (math.nan if row[name] is None else row[name] for name in ("fvu", "pca_fvu"))
                lines.append(
                    f"  {row['contender']:20s} {f'{sign} {sparsity[1]:g}':>12s} {row['l0']:7.2f} {fvu:8.4f} {pca:7.3f} "
                    f"{100 * row['dead']:5.0f}% {row['seconds']:7.1f}"
                )
    told = {row["contender"]: row["differs"] for row in rows if row["kind"] == "quality" and row["differs"]}
    if told:
        lines += ["Otherwise than ours:", *(f"  {name}: {differs}" for name, differs in told.items())]
    return lines


def verdicts(rows: Sequence[Row]) -> list[Row]:
    """`parity` rows judged, and ours against every trainer that is not of ours."""
    found = []
    for site in dict.fromkeys(row["site"] for row in rows):
        for row in rows:
            if row["kind"] == "parity" and row["site"] == site:
                found.append(row | {"met": max(row["l0"], row["fvu"]) <= PARITY})
        others = [row["contender"] for row in rows if row["site"] == site and row["kind"] == "quality"]
        for contender in dict.fromkeys(others):
            if contender not in OURS:
                found.append({"kind": "curves"} | compare(rows, contender, site))
        pairs = zip(points_of(rows, "ours", site), points_of(rows, "reference", site), strict=False)
        gaps = [(abs(a[0] / b[0] - 1), abs(a[1] / b[1] - 1)) for a, b in pairs]
        if gaps:
            l0, fvu = (max(column) for column in zip(*gaps, strict=True))
            found.append({"kind": "fp32", "site": site, "l0": l0, "fvu": fvu})
    return found


def verdict_line(verdict: Row) -> str:
    site = verdict["site"]
    if verdict["kind"] == "parity":
        said = "met" if verdict["met"] else "missed"
        gaps = f"L0 {verdict['l0']:.1e}, FVU {verdict['fvu']:.1e}"
        return f"{site}: ours against the reference in fp64, {verdict['route']} at the end: {gaps}: {said}"
    if verdict["kind"] == "fp32":
        return (
            f"{site}: in fp32 they part by rounding: L0 {100 * verdict['l0']:.1f} %, FVU {100 * verdict['fvu']:.1f} %"
        )
    if not verdict["points"]:
        return f"{site}: ours against {verdict['contender']}: no common range of L0"
    said = "on or below" if verdict["met"] else "not below everywhere"
    spread = f"{verdict['least']:.2f} to {verdict['most']:.2f} times its FVU at equal L0 ({verdict['points']} points)"
    return f"{site}: ours against {verdict['contender']}: {spread}: {said}"
