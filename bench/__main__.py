"""python -m bench run --suite step|kernels|inference|topk|cpu|accelerate, report, compare, quality, aot."""

import argparse
import json
import sys
from pathlib import Path

import torch

from bench.cases import CONTENDERS, SHAPES, SKEW, SUITES, Case, cases, judge
from bench.reporting import compare, records, report, tables
from bench.timing import worker
from bench.timing.measure import Clock
from bench.timing.run import Gates, Options, run_case
from gemmascope.training.config import COMPUTE_DTYPES

QUICK_ROUNDS = 3
HELP = """\
run      time a suite: a green gate first, contenders in turn, a table, one JSON document as the last line
report   tables, PNG and one HTML page from recorded rows
compare  two files of rows, ratio by ratio
quality  train the same SAE with every trainer and compare what comes out
aot      compile the kernels for GPUs that are not here; --model: what a training step should take, counted
"""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m bench", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="time a suite")
    run.add_argument("--suite", choices=tuple(SUITES), default="cpu")
    run.add_argument("--only", nargs="+", choices=tuple(CONTENDERS), default=(), metavar="CONTENDER")
    run.add_argument("--parts", nargs="+", default=(), help="only these, such as step or infer")
    run.add_argument("--shapes", nargs="+", default=(), help=f"{', '.join(map(repr, SHAPES))} or d_model x d_sae")
    run.add_argument("--l0", nargs="+", type=float, default=())
    run.add_argument("--tokens", nargs="+", type=int, default=())
    run.add_argument("--dtype", choices=COMPUTE_DTYPES, default=None, help="of our products and plain PyTorch's")
    run.add_argument("--device", default=None, help="default: that of the suite")
    run.add_argument(
        "--skew", type=float, default=SKEW, help="decades by which firing frequencies differ; 0: all alike"
    )
    run.add_argument(
        "--beta1", type=float, default=0.0, help="Adam's; above 0 with a first moment, and only what trains is timed"
    )
    run.add_argument("--rounds", type=int, default=None, help="calls of every part of every contender")
    run.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds, no memory pass")
    run.add_argument("--no-memory", action="store_true", help="leave the memory pass out")
    run.add_argument("--determinism", action="store_true", help="also repeat a step of ours 50 times, bit for bit")
    run.add_argument("--save", action="store_true", help="append the rows to the results")
    run.add_argument("--results", type=Path, default=records.RESULTS, help="folder of the results")
    run.add_argument("--compare", metavar="REV", help="time ours at another revision in turn with this tree instead")
    show = commands.add_parser("report", help="tables and pictures from rows")
    report.add_arguments(show)
    two = commands.add_parser("compare", help="two files of rows")
    two.add_argument("before", type=Path)
    two.add_argument("after", type=Path)
    return top


class NoProgress:
    """Where rich is not installed, as on a machine that has torch and Triton alone."""

    def __enter__(self) -> "NoProgress":
        return self

    def __exit__(self, *exception) -> None:
        pass

    def update(self, step: int, note: str = "") -> None:
        pass


def progress(title: str, total: int):
    try:
        from gemmascope.reporting.progress import StageProgress
    except ImportError:
        return NoProgress()
    return StageProgress(title, total, "call")


def planned_calls(case: Case, rounds: int) -> int:
    return len(case.parts) * len(case.contenders) * rounds


def run(given: argparse.Namespace) -> int:
    suite = SUITES[given.suite]
    device = torch.device(given.device or suite.device)
    rounds = given.rounds or (QUICK_ROUNDS if given.quick else suite.rounds)
    plan = cases(
        given.suite, shapes=given.shapes, tokens=given.tokens, l0=given.l0, dtype=given.dtype, only=given.only,
        parts=given.parts, skew=given.skew, beta1=given.beta1,
    )  # fmt: skip
    if given.compare:
        return compare.revisions(given.compare, plan, device, rounds)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(f"suite {given.suite!r} needs a GPU and there is none; --device cpu runs it, slowly")
        machine = records.provenance(torch.device("cpu"))
        rows = [
            case.facts() | {"kind": "skipped", "contender": "all", "ours": False, "reason": "no GPU"} for case in plan
        ]
        return finish(given, rows, machine, failed=False)
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # whose streams the clock's events are of
    machine = records.provenance(device)
    print(tables.machine_line(machine), flush=True)
    clock, gates, rows, failed, done = Clock(device), Gates(), [], False, 0
    memory = not (given.quick or given.no_memory)
    with progress(given.suite, sum(planned_calls(case, rounds) for case in plan)) as bar:
        bar.update(0)
        for number, case in enumerate(plan, start=1):
            start = done

            def told(note: str, calls: int, number: int = number) -> None:
                nonlocal done
                done += calls
                bar.update(done, f"{number}/{len(plan)} {note}")

            options = Options(device, rounds, memory, given.determinism, told)
            found, wrong = run_case(case, options, clock, gates)
            failed |= wrong
            if memory and device.type == "cpu":
                told("memory", 0)
                worker.add_host_memory(found, case, lambda name, told=told: told(f"memory of {name}", 0))
            told("done", start + planned_calls(case, rounds) - done)
            rows += found
            if given.save:
                records.append(given.suite, [row | {"machine": machine} for row in found], given.results)
            print("\n".join(["", tables.case_title(case.facts()), *tables.case_lines(found)]), flush=True)
    return finish(given, rows, machine, failed)


def finish(given: argparse.Namespace, rows: list[dict], machine: dict, failed: bool) -> int:
    """The bars, and the rows as one JSON document."""
    bars = [] if given.beta1 else judge(given.suite, rows)
    if bars:
        print("\n".join(["", *tables.bar_lines(bars)]))
    print(json.dumps({"suite": given.suite, "machine": machine, "rows": rows, "bars": bars}), flush=True)
    return int(failed)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["quality"]:
        from bench.quality import __main__ as quality

        return quality.main(arguments[1:])
    if arguments[:1] == ["aot"]:
        from bench.aot import __main__ as aot

        return aot.main(arguments[1:])
    if arguments[:1] == ["memory"]:
        return worker.memory(arguments[1:])
    if arguments[:1] == ["serve"]:
        return worker.serve(arguments[1:])
    top = parser()
    given = top.parse_args(arguments)
    try:
        if given.command == "run":
            return run(given)
        if given.command == "report":
            return report.main(given)
        return compare.files(given.before, given.after)
    except (ValueError, OSError) as error:
        top.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
