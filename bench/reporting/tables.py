"""Rows as text for a terminal."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.contenders import PARTS

Row = Mapping[str, Any]


def case_title(row: Row) -> str:
    return (
        f"{row['shape']} ({row['d_model']} x {row['d_sae']}), {row['tokens']:,} tokens, L0 {row['target_l0']:g}, "
        + (f"{row['dtype']}")
        + (f", β1 {row['beta1']:g}" if row["beta1"] else "")
    )


def by_case(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of one comparison together, in the order they come in."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(case_title(row), []).append(row)
    return groups


def milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def aligned(table: Sequence[Sequence[str]], first: int = 1) -> list[str]:
    """Columns of equal width, the ``first`` ones to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = [c.ljust(w) if i < first else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        return "  ".join(cells).rstrip()

    return [line(row) for row in table]


def part_lines(part: str, rows: Sequence[Row]) -> list[str]:
    """One part of one case: a line for each contender, the fastest first."""
    known = {name for row in rows for name in row["ratio_to"]}
    ours = [row["contender"] for row in rows if row["contender"] in known]
    head = [part, "p50 ms", "p20", "p80", *(f"x {name}" for name in ours), "roofline", "peak MiB"]
    table = [head]
    for row in sorted(rows, key=lambda row: row["p50_ms"]):
        ratios = [f"{row['ratio_to'][name]:.2f}" if name in row["ratio_to"] else "1" for name in ours]
        peak = f"{row['peak_mib']:,.0f}" if "peak_mib" in row else "-"
        times = [milliseconds(row[key]) for key in ("p50_ms", "p20_ms", "p80_ms")]
        table.append([row["contender"], *times, *ratios, f"{row['pct_roofline']:.0f} %", peak])
    return aligned(table)


def operator_lines(rows: Sequence[Row]) -> list[str]:
    table = [["operator of the sparse step", "p50 ms", "floor ms", "roofline"]]
    for row in rows:
        times = [milliseconds(row[key]) for key in ("p50_ms", "floor_ms")]
        table.append([f"{row['operator']} ({row['contender']})", *times, f"{row['pct_roofline']:.0f} %"])
    return aligned(table)


def note_lines(rows: Sequence[Row]) -> list[str]:
    """What the numbers do not say: what was left out and why, what contenders do differently."""
    lines = [f"{row['contender']}: {row['reason']}" for row in rows if row["kind"] == "skipped"]
    lines += [f"{row['contender']}: no memory figure: {row['no_memory']}" for row in rows if "no_memory" in row]
    differs = {row["contender"]: row["differs"] for row in rows if row["kind"] == "time" and row["differs"]}
    lines += [f"{name}: {text}" for name, text in differs.items()]
    for row in rows:
        if row["kind"] == "determinism":
            lines.append(f"{row['contender']}: {row['different']} of {row['runs']} runs differ from the first")
    return list(dict.fromkeys(lines))


def case_lines(rows: Sequence[Row]) -> list[str]:
    """Everything about one case."""
    lines = []
    times = [row for row in rows if row["kind"] == "time"]
    if times:
        found = times[0]
        ceiling = found["ceilings"]
        lines.append(
            f"L0 {found['l0']:.1f}, {found['entries']:.1f} entries a token, {found['touched']:.0%} of them touched; "
            f"ceilings {ceiling['copy_gbps']:.1f} GB/s, {1000 * ceiling['product_tflops']:,.0f} GFLOP/s"
        )
    for part in PARTS:
        of_part = [row for row in times if row["part"] == part]
        if of_part:
            lines += ["", *part_lines(part, of_part)]
    operators = [row for row in rows if row["kind"] == "operator"]
    if operators:
        lines += ["", *operator_lines(operators)]
    notes = note_lines(rows)
    return [*lines, "", *notes] if notes else lines


def bar_lines(bars: Sequence[Row]) -> list[str]:
    words = {True: "met", False: "MISSED", None: "not measured"}
    table = [["bar", "at least", "found", ""]]
    for bar in bars:
        found = "-" if bar["ratio"] is None else f"{bar['ratio']:.2f}"
        name = f"{bar['part']}: {bar['contender']} / {bar['ours']}{', every case' if bar['everywhere'] else ''}"
        table.append([name, f"{bar['at_least']:g}", found, words[bar["met"]]])
    return aligned(table)


def machine_line(machine: Row) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    dirty = " with changes" if machine["dirty"] else ""
    device = machine["device"] if machine["device"] != machine["cpu"] else f"{machine['cpu']} ({machine['isa']})"
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    return f"{device}, {threads}; {versions}; commit {machine['commit']}{dirty}, {machine['date'][:10]}"
