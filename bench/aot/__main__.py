"""Compile the shipped kernels for GPUs that are not here, and judge registers, spills and instructions.

    python -m bench.aot [--targets sm_80,sm_90,sm_100,gfx942] [-k NAME] [--update] [--markdown] [-j JOBS]
    python -m bench.aot --table [VERSION ...]    what is recorded, as a Markdown table; compiles nothing
    python -m bench.aot --model [--shapes DxF ...] [--l0 ...] [--skew ...] [--beta1 ...] [--card h100 h200]
                        [--markdown | --json]
                        what a sparse training step should take, counted from the compiled kernels

No GPU or driver is needed. Exit status 1 when a kernel does not compile, spills more than its specification allows,
needs more shared memory than the target has (not a compile error: it would fail at launch), lacks an instruction it is
expected to have, is worse than the baseline of this Triton version in ``bench/aot/baselines``, or, on sm_90, a program
of the training step takes more instructions than ``bench/aot/counts`` has (``--update`` rewrites both).
"""

import argparse
import json
import os
import sys
from pathlib import Path

from bench.aot.cards import CARDS
from bench.aot.compilation import compile_all, work

MODEL_TARGET = "sm_90"  # `trips.TARGET`, which needs Triton to be asked
MODEL_SHAPES = ("2304x16384", "3584x131072", "2304x1048576")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
BASELINES = Path(__file__).parent / "baselines"
COUNTS = Path(__file__).parent / "counts"
# Of a row, what its baseline has not.
BESIDE = ("name", "target", "seconds", "warps", "programs", "counts")

# Bytes of shared memory one block may use (CUDA C++ programming guide, technical specifications; LDS of CDNA 3).
SHARED_MEMORY_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}


def triton_version() -> str:
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def worse(now: dict[str, int], recorded: dict[str, int], allowed: float = 0.01) -> list[str]:
    """What programs take more instructions than recorded, and by how much."""
    found = []
    for length, before in recorded.items():
        after = now.get(length)
        if after is None:
            found.append(f"a program of length {length} was recorded and is not counted")
        elif after > (1 + allowed) * before:
            rise = after - before
            found.append(
                f"a program of length {length} takes {after} warp-instructions, recorded {before}: {rise} more, "
                f"{rise / before:+.1%}"
            )
    return found


def problems(row: dict, spec, baseline: dict | None, programs: dict[str, int] | None = None) -> list[str]:
    """What is wrong with a row, measured by its specification, its target, the baseline's row and what is recorded of
    the instructions of its programs."""
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
    if programs:
        found += worse(row.get("programs", {}), programs)
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


def counts_path() -> Path:
    """Instructions of the programs of the training step, for the Triton that is installed."""
    return COUNTS / f"triton-{triton_version()}.json"


def recorded_counts() -> dict[str, dict[str, int]]:
    """By kernel, of programs by length; {} for a Triton that has no record."""
    return json.loads(counts_path().read_text()) if counts_path().exists() else {}


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


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", action="store_true", help="print what a training step should take, from the code")
    parser.add_argument(
        "--shapes", nargs="+", default=MODEL_SHAPES, metavar="DxF", help="of --model; default: %(default)s"
    )
    parser.add_argument("--l0", nargs="+", type=float, default=(64.0,), help="of --model; default: 64")
    parser.add_argument("--skew", nargs="+", type=float, default=(0.7,), help="of --model, in decades; default: .7")
    parser.add_argument(
        "--beta1",
        nargs="+",
        type=float,
        default=(0.0,),
        help="of --model, Adam's: above 0 with first moments; default: 0",
    )
    parser.add_argument("--tokens", type=int, default=4096, help="of --model; default: %(default)s")
    parser.add_argument(
        "--card", nargs="+", choices=tuple(CARDS), default=tuple(CARDS), help="of --model; default: %(default)s"
    )
    parser.add_argument("--json", action="store_true", help="with --model: one JSON document instead of a table")


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
    add_model_arguments(parser)
    options = parser.parse_args(argv)
    if options.worker:
        work()
        return 0
    if options.model:
        from bench.aot import expectation

        try:
            return expectation.main(options)
        except ValueError as error:
            parser.error(str(error))
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
    from bench.aot.trips import names
    from bench.aot.trips import specs as step_specs

    wanted = {(target, spec.name): spec for target in targets for spec in specs(target) if options.k in spec.name}
    if MODEL_TARGET in targets:
        wanted |= {(MODEL_TARGET, spec.name): spec for spec in step_specs() if options.k in spec.name}
    rows = compile_all(list(wanted), options.j)
    path = baseline_path()
    baseline = json.loads(path.read_text()) if path.exists() else {}
    counts = recorded_counts()
    print(f"Triton {triton_version()}\n{render(rows, options.markdown)}")
    failed = 0
    for row in rows:
        key = f"{row['name']}@{row['target']}"
        known = None if options.update else baseline.get(key)
        programs = counts.get(row["name"]) if row["target"] == MODEL_TARGET and not options.update else None
        found = problems(row, wanted[row["target"], row["name"]], known, programs)
        failed += bool(found)
        for problem in found:
            print(f"{key}: {problem}")
        if "error" not in row:
            baseline[key] = {k: v for k, v in row.items() if k not in BESIDE}
            if "programs" in row:
                counts[row["name"]] = row["programs"]
    if options.update:
        current = {f"{spec.name}@{target}" for target in TARGETS for spec in specs(target)}
        baseline = {key: row for key, row in baseline.items() if key in current}
        path.write_text(json.dumps(baseline, indent=1, sort_keys=True) + "\n")
        counts = {name: counts[name] for name in sorted(counts) if name in names()}
        COUNTS.mkdir(exist_ok=True)
        counts_path().write_text(json.dumps(counts, indent=1) + "\n")
    print(f"{len(rows)} compiled, {failed} with problems")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
