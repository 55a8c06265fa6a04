"""A process for one contender: `memory` measures its peaks, `serve` times a part whenever it is asked to."""

import argparse
import gc
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any

import torch

from bench.cases import Case, shape_of
from bench.timing import measure
from bench.timing.prepare import all_inputs, contender_of, needed_bytes, set_up, small_inputs, warm


def arguments_of(case: Case, contender: str) -> list[str]:
    """Command line from which `parse` makes the same case with one contender."""
    return [
        *("--suite", case.suite, "--shape", case.shape.name, "--tokens", str(case.tokens), "--l0", str(case.l0)),
        *("--dtype", case.dtype, "--skew", str(case.skew), "--beta1", str(case.beta1)),
        *("--contender", contender, "--parts", *case.parts),
    ]


def parse(arguments: list[str]) -> tuple[Case, str, torch.device]:
    parser = argparse.ArgumentParser(prog="python -m bench memory")
    parser.add_argument("--suite", required=True)
    parser.add_argument("--shape", required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--l0", type=float, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--skew", type=float, required=True)
    parser.add_argument("--beta1", type=float, required=True)
    parser.add_argument("--contender", required=True)
    parser.add_argument("--parts", nargs="+", required=True)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(arguments)
    case = Case(
        given.suite,
        shape_of(given.shape),
        given.tokens,
        given.l0,
        given.dtype,
        tuple(given.parts),
        (given.contender,),
        given.skew,
        beta1=given.beta1,
    )
    return case, given.contender, torch.device(given.device)


def memory(arguments: list[str]) -> int:
    """Print, by part, what the contender holds beyond the inputs once it is set up and warm, and its peak."""
    case, name, device = parse(arguments)
    clock = measure.Clock(device)
    with redirect_stdout(sys.stderr):
        inputs = all_inputs(case, device)
        small = contender_of(name, case)
        set_up(small, small_inputs(case, device))  # the packages it imports are not its work
        warm(small, small.parts[:1], clock)
        del small
        gc.collect()
        before = measure.resident_mib()
        contender = contender_of(name, case)
        set_up(contender, inputs)
        parts = [part for part in case.parts if part in contender.parts]
        warm(contender, parts, clock)
        found = {}
        for part in parts:
            contender.before(part)
            held = measure.resident_mib() - before
            found[part] = {"held_mib": held, "peak_mib": held + measure.host_peak_mib(getattr(contender, part))}
    print(json.dumps(found), flush=True)
    return 0


def serve(arguments: list[str]) -> int:
    """Print the parts, then the milliseconds of a call for each line of standard input that names one."""
    case, name, device = parse(arguments)
    clock, answers = measure.Clock(device), sys.stdout
    with redirect_stdout(sys.stderr):
        contender = contender_of(name, case)
        set_up(contender, all_inputs(case, device))
        parts = [part for part in case.parts if part in contender.parts]
        warm(contender, parts, clock)
        print(json.dumps(parts), file=answers, flush=True)
        for line in sys.stdin:
            part = line.strip()
            contender.before(part)
            print(json.dumps(clock.time(getattr(contender, part))), file=answers, flush=True)
    return 0


def add_host_memory(rows: list[dict[str, Any]], case: Case, told: Callable[[str], None] = lambda name: None) -> None:
    """`held_mib` and `peak_mib` of the case's first part, from a fresh process for each contender; `no_memory` says why
    there are none. Two at once where there is room, each with half of the threads: nothing is timed. Calls ``told``
    with every contender that is done."""
    part = case.parts[0]
    waiting = [row for row in rows if row["kind"] == "time" and row["part"] == part]
    free, threads = measure.available_bytes(), torch.get_num_threads()
    at_once = 2 if threads > 1 and free is not None and free > 2 * needed_bytes(case) else 1

    def weigh(row: dict[str, Any]) -> None:
        arguments = arguments_of(replace(case, parts=(part,)), row["contender"])
        try:
            found = measure.peaks_in_fresh_process(arguments, threads // at_once)
        except RuntimeError as error:
            row["no_memory"] = str(error)
        else:
            row |= found[part]

    with ThreadPoolExecutor(at_once) as pool:
        for row, _ in zip(waiting, pool.map(weigh, waiting), strict=True):
            told(row["contender"])
