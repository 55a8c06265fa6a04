"""The runner: gate, set up, warm, time in turn, weigh. A contender that cannot do its part is a row that says why."""

import gc
import statistics
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.arithmetic import OPERAND_DTYPES
from bench.cases import Case, make
from bench.contenders import Contender, Inputs, UnavailableError
from bench.ours import Ours
from bench.timing import gate, measure
from bench.timing.inputs import activations
from bench.timing.measure import Clock, is_out_of_memory
from bench.timing.prepare import all_inputs, check_room, contender_of, set_up, small_inputs, warm
from bench.timing.probe import changed_bits, operator_rows
from bench.timing.work import measure_size, part_work
from gemmascope.kernels.dispatch import choose
from gemmascope.saes import JumpReLUSAE

DETERMINISM_RUNS = 50
LONGEST_REASON = 300
MIB = measure.MIB


@dataclass
class Options:
    """How a suite is run."""

    device: torch.device
    rounds: int
    memory: bool = True
    determinism: bool = False
    report: Callable[[str, int], None] = lambda note, calls: None
    """Told of calls that are done."""


@dataclass
class Bench:
    """One case while it is run."""

    case: Case
    options: Options
    clock: Clock
    rows: list[dict[str, Any]] = field(default_factory=list)
    failed: bool = False
    """Whether something of ours was wrong."""

    def skip(self, contender: Contender, reason: str) -> None:
        short = textwrap.shorten(reason, LONGEST_REASON, placeholder=" …")
        self.rows.append({"kind": "skipped", "contender": contender.name, "ours": contender.ours, "reason": short})

    def fail(self, contender: Contender, error: Exception) -> None:
        """A row for what went wrong; an exit status for what of ours went wrong."""
        if isinstance(error, UnavailableError):
            self.skip(contender, str(error))
        elif is_out_of_memory(error):
            self.skip(contender, f"out of memory: {error}")
        elif isinstance(error, gate.RedGateError):
            self.failed |= contender.ours
            self.skip(contender, f"red gate, not timed: {error}")
        else:
            self.failed |= contender.ours
            self.skip(contender, f"failed: {type(error).__name__}: {error}")


def settle() -> None:
    """Give back what the last contender held."""
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Gates:
    """Parity of ours, once for each implementation, route, shape, dtype, launch and β1."""

    def __init__(self) -> None:
        self.shares: dict[tuple, dict[str, float]] = {}

    def check(self, contender: Ours, case: Case, device: torch.device, small: Inputs) -> dict[str, float]:
        training = any(part in case.parts for part in ("step", "forward", "backward"))
        tokens = gate.gate_tokens(case.tokens)
        key = (contender.impl, contender.route, case.shape, case.dtype, training, tokens, case.beta1)
        if key not in self.shares:
            d, f = case.shape.d_model, case.shape.d_sae
            shares = {}
            if training:
                base = JumpReLUSAE(d, f, impl=contender.impl, generator=torch.Generator().manual_seed(0))
                x = activations(gate.drawn(tokens), d, device, seed=0)
                shares["step"] = gate.step_gate(contender.route, base, x, case.dtype, tokens, case.beta1)
            if len(contender.parts) > 1:
                shares["operators"] = gate.operator_gate(contender.impl, small)
            self.shares[key] = shares
        return self.shares[key]


def admitted(bench: Bench, gates: Gates) -> dict[str, dict[str, Any]]:
    """The contenders that may be timed, each with what its gate found."""
    found, exact, small = {}, None, small_inputs(bench.case, bench.options.device)[0]
    for name in bench.case.contenders:
        bench.options.report(f"gate of {name}", 0)
        one = Contender()
        one.name = name
        try:
            one = make(name)
            if not set(one.parts) & set(bench.case.parts):
                continue
            one.check_beta1(bench.case.beta1)
            one.check_available(bench.options.device)
            facts: dict[str, Any] = {"versions": one.versions()}
            if isinstance(one, Ours):
                facts["impl"] = choose(one.impl, bench.options.device, OPERAND_DTYPES[bench.case.dtype]).impl
                facts["gate"] = gates.check(one, bench.case, bench.options.device, small)
            exact = exact or gate.exact_outputs(small)
            facts["agreement"] = gate.agreement(one, small, exact)
        except Exception as error:
            bench.fail(one, error)
        else:
            found[name] = facts
        del one
        settle()
    return found


@dataclass
class Group:
    """Contenders that are set up together, and the times of their parts so far."""

    contenders: dict[str, Contender] = field(default_factory=dict)
    held_mib: dict[str, float] = field(default_factory=dict)
    times: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    postponed: list[str] = field(default_factory=list)

    def lose(self, contender: Contender, error: Exception, bench: Bench) -> None:
        """Leave a contender out; one that wants for memory gets a second chance, alone."""
        self.contenders.pop(contender.name, None)
        self.times.pop(contender.name, None)
        if is_out_of_memory(error) and self.contenders:
            self.postponed.append(contender.name)
        else:
            bench.fail(contender, error)


def gather(bench: Bench, names: list[str], inputs: list[Inputs]) -> Group:
    """As many contenders as fit into memory, set up and warm."""
    group, device, cuda = Group(), bench.options.device, bench.clock.cuda
    for name in names:
        contender = contender_of(name, bench.case)
        bench.options.report(f"warming {name}", 0)
        try:
            check_room(bench.case, device)
            before = torch.cuda.memory_allocated(device) if cuda else 0
            set_up(contender, inputs)
            warm(contender, [part for part in bench.case.parts if part in contender.parts], bench.clock)
            if cuda:
                group.held_mib[name] = (torch.cuda.memory_allocated(device) - before) / MIB
            group.contenders[name] = contender
            group.times[name] = {}
        except Exception as error:
            group.lose(contender, error, bench)
        del contender
        gc.collect()
    return group


def time_group(bench: Bench, group: Group) -> None:
    options, clock = bench.options, bench.clock
    for part in bench.case.parts:
        running = {name: one for name, one in group.contenders.items() if part in one.parts}
        calls = {name: (lambda c=c, p=part: c.before(p), getattr(c, part)) for name, c in running.items()}

        def lost(name: str, error: Exception, running=running) -> None:
            group.lose(running[name], error, bench)

        def done(name: str, part=part) -> None:
            options.report(f"{part} of {name}", 1)

        for name, found in measure.interleaved(clock, calls, options.rounds, lost, done).items():
            row = measure.percentiles(found["ms"]) | {"in_turn_with": len(running) - 1}
            if found["latency_ms"]:
                row["latency_p50_ms"] = statistics.median(found["latency_ms"])
            group.times[name][part] = row
    for contender in list(group.contenders.values()):
        try:
            contender.check_made()
            if clock.cuda and options.memory:
                add_device_memory(contender, group, options.device)
        except Exception as error:
            group.lose(contender, error, bench)


def add_device_memory(contender: Contender, group: Group, device: torch.device) -> None:
    held = group.held_mib[contender.name]
    for part, row in group.times[contender.name].items():
        contender.before(part)
        row |= {"held_mib": held, "peak_mib": held + measure.device_peak_mib(getattr(contender, part), device)}


def time_all(bench: Bench, names: list[str], inputs: list[Inputs], weigh: Callable[[Group], None]) -> None:
    """Time those that fit into memory together, then those that did not; ``weigh`` is given each group while it is set
    up, and must keep nothing of it."""
    waiting = names
    while waiting:
        group = gather(bench, waiting, inputs)
        time_group(bench, group)
        weigh(group)
        waiting = group.postponed
        del group
        settle()


def run_case(case: Case, options: Options, clock: Clock, gates: Gates) -> tuple[list[dict[str, Any]], bool]:
    """Rows of a case, without provenance, and whether something of ours was wrong."""
    bench = Bench(case, options, clock)
    try:
        options.report("constructing inputs", 0)
        inputs = all_inputs(case, options.device)
        sizes = [measure_size(one) for one in inputs]
        # A product too small to fill the machine says nothing about its rate.
        enough = max(case.tokens, 4096 if clock.cuda else 512)
        at_best = (clock, enough, case.shape.d_model, case.shape.d_sae, case.dtype)
        ceiling = measure.ceilings(*at_best)
        passed = admitted(bench, gates)
    except Exception as error:
        red = isinstance(error, gate.RedGateError)
        if not red and not is_out_of_memory(error):
            raise
        return [case.facts() | {"kind": "skipped", "contender": "all", "ours": False, "reason": str(error)}], red

    shared = {"l0": sizes[0].active / sizes[0].n, "entries": sizes[0].entries / sizes[0].n} | {
        "touched": sizes[0].touched / sizes[0].f
    }

    def weigh(group: Group) -> None:
        # Again after the timing: a ceiling taken in a bad moment would flatter everyone.
        ceiling.update({name: max(rate, ceiling[name]) for name, rate in measure.ceilings(*at_best).items()})
        for name, times_by_part in group.times.items():
            contender = group.contenders[name]
            same = {"contender": name, "ours": contender.ours}
            for part, times in times_by_part.items():
                parts = [part_work(part, size) for size in sizes]
                flops, n_bytes = (
                    sum(work[i] * shape.count for work, shape in zip(parts, case.shape.all, strict=True))
                    for i in (0, 1)
                )
                least = measure.floor_ms((flops, n_bytes), ceiling)
                row = {"kind": "time"} | same | {"part": part} | times | {"differs": contender.differs}
                row |= {"flops": flops, "bytes": n_bytes, "floor_ms": least}
                row["pct_roofline"] = 100 * least / times["p50_ms"]
                bench.rows.append(row | passed[name] | shared | {"ceilings": dict(ceiling)})
            if not isinstance(contender, Ours) or "step" not in times_by_part:
                continue
            if case.operators and contender.route == "sparse":
                bench.rows += operator_rows(contender, sizes[0], clock, options.rounds, ceiling)
            if options.determinism:
                different = changed_bits(contender, DETERMINISM_RUNS)
                row = {"kind": "determinism"} | same
                bench.rows.append(row | {"runs": DETERMINISM_RUNS, "different": different})
                bench.failed |= different > 0

    time_all(bench, list(passed), inputs, weigh)
    add_ratios(bench.rows)
    return [case.facts() | row for row in bench.rows], bench.failed


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """`ratio_to`: how many times as long as each of ours, in the same part."""
    ours = {(row["part"], row["contender"]): row["p50_ms"] for row in rows if row["kind"] == "time" and row["ours"]}
    for row in rows:
        if row["kind"] == "time":
            mine = {name: ms for (part, name), ms in ours.items() if part == row["part"] and name != row["contender"]}
            row["ratio_to"] = {name: row["p50_ms"] / ms for name, ms in mine.items()}
