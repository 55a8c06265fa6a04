"""Compile the shipped kernels for GPUs that are not here, and judge registers, spills and instructions.

    python -m bench.aot [--targets sm_80,sm_90,sm_100,gfx942] [-k NAME] [--update] [--markdown] [-j JOBS]
    python -m bench.aot --table [VERSION ...]    what is recorded, as a Markdown table; compiles nothing

No GPU or driver is needed. Exit status 1 when a kernel does not compile, spills more than its specification allows,
needs more shared memory than the target has (not a compile error: it would fail at launch), lacks an instruction it is
expected to have, or is worse than the baseline of this Triton version in ``bench/aot/baselines`` (``--update`` rewrites
that).
"""

import argparse
import json
import os
import sys
from pathlib import Path

from bench.aot.compilation import compile_all, work

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
BASELINES = Path(__file__).parent / "baselines"

# Bytes of shared memory one block may use (CUDA C++ programming guide, technical specifications; LDS of CDNA 3).
SHARED_MEMORY_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}


def triton_version() -> str:
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def problems(row: dict, spec, baseline: dict | None) -> list[str]:
    """What is wrong with a row, measured by its specification, its target and the baseline's row."""
    if "error" in row:
        return [row["error"]]
    found = []
    if row["spills"] > spec.max_spill:
        found.append(f"spills {row['spills']} bytes, {spec.max_spill} allowed")
    limit = SHARED_MEMORY_LIMIT[row["target"]]
    if row["shared"] > limit:
        found.append(f"needs {row['shared']} bytes of shared memory, {row['target']} has {limit}")
    found += [f"expected {name} instructions, found none" for name in spec.expects if name not in row["classes"]]
    if baseline:
        allowed = {
            "registers": baseline["registers"] + 8,
            "spills": baseline["spills"],
            "shared": baseline["shared"],
            "instructions": round(1.15 * baseline["instructions"]),
        }
        found += [
            f"{key} {row[key]}, baseline {baseline[key]}, allowed {most}"
            for key, most in allowed.items()
            if row[key] > most
        ]
    return found


def render(rows: list[dict], markdown: bool) -> str:
    header = ["kernel", "target", "registers", "spills", "shared", "instructions", "seconds", "classes"]
    table = [header]
    for row in rows:
        if "error" in row:
            table.append([row["name"], row["target"], "failed", "", "", "", str(row["seconds"]), ""])
        else:
            classes = " ".join(f"{name}={n}" for name, n in row["classes"].items())
            table.append([row["name"], *(str(row[key]) for key in header[1:-1]), classes])
    if markdown:
        lines = [f"| {' | '.join(cells)} |" for cells in table]
        return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip() for cells in table)


def baseline_path(version: str | None = None) -> Path:
    """Of a Triton version such as "3.9"; by default of the one that is installed."""
    return BASELINES / f"triton-{version or triton_version()}.json"


def recorded_versions() -> list[str]:
    """Triton versions that have a baseline, the newest first."""
    found = (path.stem.removeprefix("triton-") for path in BASELINES.glob("triton-*.json"))
    return sorted(found, key=lambda version: [int(part) for part in version.split(".")], reverse=True)


def recorded_table(baseline: dict[str, dict]) -> str:
    """A baseline in Markdown, a line for each kernel and a column for each target. Left out are compilations for sizes
    of 1, and those for fp16, which equal the ones for bf16."""
    names = sorted({key.partition("@")[0] for key in baseline})
    lines = [f"| kernel | {' | '.join(TARGETS)} |", "|---|" + "---|" * len(TARGETS)]
    for name in names:
        if name.endswith(("_ones", "_fp16")):
            continue
        cells = []
        for row in (baseline.get(f"{name}@{target}") for target in TARGETS):
            facts = row and (row["registers"], row["spills"], f"{row['shared'] / 1024:.3g}", row["instructions"])
            cells.append(" / ".join(map(str, facts)) if facts else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def print_recorded(versions: list[str]) -> None:
    """Print the tables of the baselines."""
    found = []
    for version in versions:
        table = recorded_table(json.loads(baseline_path(version).read_text()))
        head = f"**Triton {version}**: registers / spills in bytes / shared memory in KiB / instructions"
        found.append(f"{head}\n\n{table}")
    print("\n\n".join(found))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default=",".join(TARGETS), help="default: %(default)s")
    parser.add_argument("-k", metavar="NAME", default="", help="only kernels whose name contains this")
    parser.add_argument("--update", action="store_true", help="write the results into the baseline")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument(
        "--table", nargs="*", metavar="VERSION", help="print what is recorded of these Triton versions, default: all"
    )
    parser.add_argument("-j", metavar="JOBS", type=int, default=os.cpu_count(), help="worker processes")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        work()
        return 0
    if options.table is not None:
        recorded = recorded_versions()
        missing = [version for version in options.table if version not in recorded]
        if missing:
            parser.error(f"--table: expected some of {', '.join(recorded)}, got {', '.join(missing)}")
        print_recorded(options.table or recorded)
        return 0
    targets = options.targets.split(",")
    unknown = [target for target in targets if target not in SHARED_MEMORY_LIMIT]
    if unknown:
        parser.error(f"--targets: expected some of {', '.join(SHARED_MEMORY_LIMIT)}, got {', '.join(unknown)}")

    from bench.aot.specs import specs

    wanted = {(target, spec.name): spec for target in targets for spec in specs(target) if options.k in spec.name}
    rows = compile_all(list(wanted), options.j)
    path = baseline_path()
    baseline = json.loads(path.read_text()) if path.exists() else {}
    print(f"Triton {triton_version()}\n{render(rows, options.markdown)}")
    failed = 0
    for row in rows:
        key = f"{row['name']}@{row['target']}"
        known = None if options.update else baseline.get(key)
        found = problems(row, wanted[row["target"], row["name"]], known)
        failed += bool(found)
        for problem in found:
            print(f"{key}: {problem}")
        if "error" not in row:
            baseline[key] = {k: v for k, v in row.items() if k not in ("name", "target", "seconds")}
    if options.update:
        current = {f"{spec.name}@{target}" for target in TARGETS for spec in specs(target)}
        baseline = {key: row for key, row in baseline.items() if key in current}
        path.write_text(json.dumps(baseline, indent=1, sort_keys=True) + "\n")
    print(f"{len(rows)} compiled, {failed} with problems")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
