"""`python -m bench.aot --model`: the counted step of each case as a table, and as JSON."""

import argparse
import os
from dataclasses import asdict

from bench.aot import launches, model, trips
from bench.aot.cards import CARDS, Card, occupancy
from bench.aot.compilation import compile_all
from bench.aot.dense import dense
from bench.aot.launches import Operation, small
from bench.aot.lists import Case
from bench.cases import shape_of

RESOURCES = ("issue", "hbm", "l2", "tensor")
TIMES = (*RESOURCES, "floor", "expected")
COLUMNS = ("kernel", "M instr.", "HBM GB", "L2 GB", "warps", *TIMES, "binds")


def cases(options: argparse.Namespace) -> list[Case]:
    shapes = [shape_of(text) for text in options.shapes]
    return [
        Case(shape.d_model, shape.d_sae, l0, skew, options.tokens, beta1)
        for shape in shapes
        for l0 in options.l0
        for skew in options.skew
        for beta1 in options.beta1
    ]


def compiled(given: list[Case], workers: int | None = None) -> dict[str, dict]:
    """A row for each kernel of the step and of the selection, counted in the given cases. Raises RuntimeError where one
    does not compile."""
    jobs = [(trips.TARGET, name) for name in sorted(trips.names(given))]
    rows = compile_all(jobs, workers or os.cpu_count() or 1, [asdict(case) for case in given])
    for row in rows:
        if "error" in row:
            raise RuntimeError(f"{row['name']}: {row['error']}")
    return {row["name"]: row for row in rows}


def step_of(case: Case, rows: dict[str, dict], card: Card, operations: list[Operation]) -> dict:
    """The step of a case on a card, seconds: of each kernel, together, and of the dense alternatives.

    overlapped: what each resource is busy for. No step of many SAEs at once can be shorter than the longest.
    """
    kernels = [_kernel(step, case, rows, card) for step in trips.passes(case)]
    lights = trips.lights(case)
    launched = sum(step.launches for step in (*trips.passes(case), *lights))
    rest = small(operations, case, card, launched, sum(light.hbm for light in lights))
    return {
        "case": asdict(case),
        "card": card.name,
        "kernels": kernels,
        "small": asdict(rest),
        "floor": sum(kernel["seconds"]["floor"] for kernel in kernels),
        "overlapped": {name: sum(kernel["seconds"][name] for kernel in kernels) for name in RESOURCES},
        "expected": sum(kernel["seconds"]["expected"] for kernel in kernels) + rest.seconds,
        "dense": dense(case, card),
        "selection": {
            kind: [_kernel(step, case, rows, card) for step in of_kind]
            for kind, of_kind in trips.selection(case).items()
        },
    }


def _kernel(step: trips.Pass, case: Case, rows: dict[str, dict], card: Card) -> dict:
    row = rows[step.spec]
    counts = model.Counts(**row["counts"][case.title][step.name])
    found = model.times(step, counts, row, row["warps"], card)
    fits = occupancy(card, row["warps"], row["registers"], row["shared"])
    facts = {"kernel": step.name, "launches": step.launches, "hbm_bytes": step.hbm, "occupancy": asdict(fits)}
    return facts | asdict(counts) | {"seconds": asdict(found)}


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3f}" if seconds < 0.01 else f"{1e3 * seconds:.1f}"


def table(step: dict) -> list[list[str]]:
    """Rows of cells, the head first; times in ms."""
    found = [list(COLUMNS)]
    found += [_cells(kernel) for kernel in step["kernels"]]
    rest = step["small"]
    name = f"{rest['calls']} small operations"
    found.append(
        [name, "", f"{rest['bytes'] / 1e9:.2f}", *[""] * 7, _ms(rest["seconds"]), f"{rest['launches']} launches"]
    )
    found.append(["**step**", *[""] * 8, _ms(step["floor"]), _ms(step["expected"]), ""])
    selected = dict(step["selection"])
    product = selected.pop("product", [])
    found += [_cells(kernel) for kernel in product]
    for kind, kernels in selected.items():
        found += [_cells(kernel | {"kernel": f"{kind}: {kernel['kernel']}"}) for kernel in kernels]
        times = [kernel["seconds"] for kernel in (*product, *kernels)]
        gaps = launches.LAUNCH * sum(kernel["launches"] for kernel in (*product, *kernels))
        floor, expected = (sum(seconds[name] for seconds in times) for name in ("floor", "expected"))
        found.append([f"**{kind}**", *[""] * 8, _ms(floor), _ms(expected + gaps), ""])
    return found


def _cells(kernel: dict) -> list[str]:
    seconds = kernel["seconds"]
    binds = seconds["binds"]
    if seconds["tail"] > 0.05 * seconds["expected"] and binds != "tail":
        binds += f" + tail {_ms(seconds['tail'])}"
    return [
        kernel["kernel"] + (f" x{kernel['launches']}" if kernel["launches"] > 1 else ""),
        f"{kernel['warp_instructions'] / 1e6:.1f}",
        f"{kernel['hbm_bytes'] / 1e9:.2f}",
        f"{kernel['l2'] / 1e9:.2f}",
        f"{kernel['occupancy']['warps']}",
        *(_ms(seconds[name]) for name in TIMES),
        binds,
    ]


def render(step: dict, markdown: bool) -> str:
    case = Case(**step["case"])
    dense_times = ", ".join(f"{name} {_ms(seconds)}" for name, seconds in step["dense"].items())
    head = f"{case.title}, {step['card'].upper()}: expected {_ms(step['expected'])} ms; {dense_times} (by arithmetic)"
    busiest = max(step["overlapped"], key=lambda name: step["overlapped"][name])
    head += f"; many at once: not below {_ms(step['overlapped'][busiest])} ({busiest})"
    rows = table(step)
    if markdown:
        lines = [f"| {' | '.join(cells)} |" for cells in rows]
        return "\n".join([f"**{head}**", "", lines[0], "|---" + "|---:" * (len(COLUMNS) - 2) + "|---|", *lines[1:]])
    widths = [max(len(row[i].strip("*")) for row in rows) for i in range(len(COLUMNS))]
    lines = []
    for row in rows:
        cells = [cell.strip("*") for cell in row]
        middle = (cell.rjust(width) for cell, width in zip(cells[1:-1], widths[1:-1], strict=True))
        lines.append("  ".join([cells[0].ljust(widths[0]), *middle, cells[-1]]).rstrip())
    return "\n".join([head, *lines])


def main(options: argparse.Namespace) -> int:
    import json

    given = cases(options)
    rows = compiled(given, options.j)
    _, operations = launches.recorded()
    steps = [step_of(case, rows, CARDS[name], operations) for case in given for name in options.card]
    if options.json:
        print(json.dumps({"target": trips.TARGET, "steps": steps}))
    else:
        print("Counted from the compiled kernels, not timed. Milliseconds: the floor of each resource, and expected.\n")
        print("\n\n".join(render(step, options.markdown) for step in steps))
    return 0
