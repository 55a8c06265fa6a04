"""The runner: gate, set up, warm, time in turn, weigh. A contender that cannot do its part is a row that says why."""

import gc
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from bench import gate, measure
from bench.cases import Case, make
from bench.contenders import Contender, Inputs, UnavailableError
from bench.inputs import activations, construct
from bench.measure import Clock, is_out_of_memory
from bench.ours import OPERAND_DTYPES, Ours
from bench.work import Size, measure_size, operator_work, part_work
from gemmascope import step as step_module
from gemmascope.kernels.dispatch import choose
from gemmascope.kernels.training import training_operators
from gemmascope.sae import JumpReLUSAE

WARM_UPS = 2
DETERMINISM_RUNS = 50
MIB = measure.MIB
# Main memory that a trainer takes: weights, gradients and two moments of [d_model, d_sae] twice, and some [N, d_sae].
TRAINING_WEIGHTS, INFERENCE_WEIGHTS, TRAINING_CODES, INFERENCE_CODES = 8, 2, 8, 3


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
        first = (reason.strip().splitlines() or ["no reason given"])[0]
        self.rows.append({"kind": "skipped", "contender": contender.name, "ours": contender.ours, "reason": first})

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


def check_room(case: Case, device: torch.device) -> None:
    """Raise MemoryError before the system starts to swap or to kill; a GPU's allocator does so by itself."""
    free = measure.available_bytes()
    if device.type == "cuda" or free is None:
        return
    training = "step" in case.parts
    weights, codes = (
        (TRAINING_WEIGHTS, TRAINING_CODES) if training else (INFERENCE_WEIGHTS * case.shape.count, INFERENCE_CODES)
    )
    needed = 4 * case.shape.d_sae * (weights * case.shape.d_model + codes * case.tokens)
    if needed > free:
        raise MemoryError(f"about {needed / 2**30:.1f} GiB needed, {free / 2**30:.1f} GiB available")


class Gates:
    """Parity of ours, once for each implementation, route, shape and dtype."""

    def __init__(self) -> None:
        self.shares: dict[tuple, dict[str, float]] = {}

    def check(self, contender: Ours, case: Case, device: torch.device, narrow: Inputs) -> dict[str, float]:
        training = any(part in case.parts for part in ("step", "forward", "backward"))
        key = (contender.impl, contender.route, case.shape, case.dtype, training)
        if key not in self.shares:
            d, f = case.shape.d_model, case.shape.d_sae
            shares = {}
            if training:
                base = JumpReLUSAE(d, f, impl=contender.impl, generator=torch.Generator().manual_seed(0))
                x = activations(gate.GATE_TOKENS, d, device, seed=0)
                shares["step"] = gate.step_gate(contender.route, base, x, case.dtype)
            if len(contender.parts) > 1:
                shares["operators"] = gate.operator_gate(contender.impl, narrow)
            self.shares[key] = shares
        return self.shares[key]


class Repeated(Contender):
    """Inference by many SAEs, one after another, each with weights of its own."""

    parts = ("infer",)

    def __init__(self, name: str, case: Case):
        self.contenders = [[make(name) for _ in range(shape.count)] for shape in case.shape.all]
        one = self.contenders[0][0]
        self.name, self.ours, self.differs, self.requires = one.name, one.ours, one.differs, one.requires
        if "infer" not in one.parts:
            self.parts = ()

    def check_available(self, device: torch.device) -> None:
        self.contenders[0][0].check_available(device)

    def set_up_all(self, inputs: list[Inputs]) -> None:
        for group, given in zip(self.contenders, inputs, strict=True):
            for contender in group:
                contender.set_up(given)

    def infer(self) -> None:
        for group in self.contenders:
            for contender in group:
                contender.infer()


def contender_of(name: str, case: Case) -> Contender:
    return Repeated(name, case) if case.shape.more else make(name)


def set_up(contender: Contender, inputs: list[Inputs]) -> None:
    if isinstance(contender, Repeated):
        contender.set_up_all(inputs)
    else:
        contender.set_up(inputs[0])


def warm(contender: Contender, parts: tuple[str, ...], clock: Clock) -> None:
    for part in parts:
        for _ in range(WARM_UPS):
            contender.before(part)
            getattr(contender, part)()
    clock.synchronise()


def all_inputs(case: Case, device: torch.device) -> list[Inputs]:
    options = {"dtype": case.dtype, "skew": case.skew}
    return [construct(s.d_model, s.d_sae, case.tokens, case.l0, device, **options) for s in case.shape.all]


def admitted(bench: Bench, inputs: list[Inputs], gates: Gates) -> dict[str, dict[str, Any]]:
    """The contenders that may be timed, each with what its gate found."""
    found, exact, narrow = {}, None, gate.narrowed(inputs[0])
    for name in bench.case.contenders:
        bench.options.report(f"gate of {name}", 0)
        one = Contender()
        one.name = name
        try:
            one = make(name)
            if not set(one.parts) & set(bench.case.parts):
                continue
            one.check_available(bench.options.device)
            facts: dict[str, Any] = {"versions": one.versions()}
            if isinstance(one, Ours):
                facts["impl"] = choose(one.impl, bench.options.device, OPERAND_DTYPES[bench.case.dtype]).impl
                facts["gate"] = gates.check(one, bench.case, bench.options.device, narrow)
            exact = exact or gate.exact_outputs(narrow)
            facts["agreement"] = gate.agreement(one, narrow, exact)
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
            if clock.cuda and options.memory:
                running[name].before(part)
                transient = measure.device_peak_mib(getattr(running[name], part), options.device)
                row |= {"held_mib": group.held_mib[name], "peak_mib": group.held_mib[name] + transient}
            group.times[name][part] = row
    for contender in list(group.contenders.values()):
        try:
            contender.check_made()
        except Exception as error:
            group.lose(contender, error, bench)


def timed(bench: Bench, names: list[str], inputs: list[Inputs]) -> Iterator[tuple[Contender, str, dict[str, Any]]]:
    """(contender, part, times) for all that can be timed."""
    waiting = names
    while waiting:
        group = gather(bench, waiting, inputs)
        time_group(bench, group)
        for name, parts in group.times.items():
            for part, row in parts.items():
                yield group.contenders[name], part, row
        waiting = group.postponed
        group.contenders.clear()
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
        ceiling = measure.ceilings(clock, enough, case.shape.d_model, case.shape.d_sae, case.dtype)
        passed = admitted(bench, inputs, gates)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return [case.facts() | {"kind": "skipped", "contender": "all", "ours": False, "reason": str(error)}], False

    shared = {"l0": sizes[0].active / sizes[0].n, "entries": sizes[0].entries / sizes[0].n} | {
        "touched": sizes[0].touched / sizes[0].f,
        "ceilings": ceiling,
    }
    for contender, part, times in timed(bench, list(passed), inputs):
        parts = [part_work(part, size) for size in sizes]
        work = tuple(sum(w[i] * shape.count for w, shape in zip(parts, case.shape.all, strict=True)) for i in (0, 1))
        least = measure.floor_ms(work, ceiling)
        row = {"kind": "time", "contender": contender.name, "ours": contender.ours, "part": part} | times
        row |= {"differs": contender.differs, "flops": work[0], "bytes": work[1], "floor_ms": least}
        bench.rows.append(row | {"pct_roofline": 100 * least / times["p50_ms"]} | passed[contender.name] | shared)
        if isinstance(contender, Ours) and part == "step" and contender.route == "sparse" and case.operators:
            bench.rows += operator_rows(contender, sizes[0], clock, options.rounds, ceiling)
        if isinstance(contender, Ours) and part == "step" and options.determinism:
            different = changed_bits(contender, DETERMINISM_RUNS)
            row = {"kind": "determinism", "contender": contender.name, "ours": True}
            bench.rows.append(row | {"runs": DETERMINISM_RUNS, "different": different})
            bench.failed |= different > 0
    add_ratios(bench.rows)
    return [case.facts() | row for row in bench.rows], bench.failed


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """`ratio_to`: how many times as long as each of ours, in the same part."""
    ours = {(row["part"], row["contender"]): row["p50_ms"] for row in rows if row["kind"] == "time" and row["ours"]}
    for row in rows:
        if row["kind"] == "time":
            mine = {name: ms for (part, name), ms in ours.items() if part == row["part"] and name != row["contender"]}
            row["ratio_to"] = {name: row["p50_ms"] / ms for name, ms in mine.items()}


class TimedOperators:
    """An implementation of the training operators that keeps the time of each call."""

    def __init__(self, impl: str, clock: Clock):
        self.operators, self.clock, self.calls = training_operators(impl), clock, []

    def __getattr__(self, name: str) -> Callable:
        operator = getattr(self.operators, name)

        def measured(*arguments, **named):
            start = self.clock.mark()
            result = operator(*arguments, **named)
            self.calls.append((name, start, self.clock.mark()))
            return result

        return measured


def operator_rows(
    ours: Ours, size: Size, clock: Clock, rounds: int, ceiling: dict[str, float]
) -> Iterator[dict[str, Any]]:
    """A row for each operator of the sparse step, timed within it."""
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        operators = TimedOperators(ours.state.impl, clock)
        clock.head_start()
        with mock.patch.object(step_module, "training_operators", lambda impl, operators=operators: operators):
            ours.step()
        clock.synchronise()
        for name, start, end in operators.calls:
            found.setdefault(name, []).append(clock.between(start, end))
    for name, times in found.items():
        flops, n_bytes = operator_work(name, size)
        least = measure.floor_ms((flops, n_bytes), ceiling)
        row = {"kind": "operator", "contender": ours.name, "ours": True, "operator": name, "floor_ms": least}
        row |= measure.percentiles(times) | {"flops": flops, "bytes": n_bytes} | size._asdict()
        yield row | {"pct_roofline": 100 * least / row["p50_ms"]}


def changed_bits(ours: Ours, repeats: int) -> int:
    """Of ``repeats`` steps from one state, how many end in other bits than the first."""
    state = ours.state
    tensors = [t for t in state.latents if t is not None]
    tensors += [state.sae.b_dec.data, state.b_dec_v, state.updates, state.tokens_since_fired]
    start = [t.clone() for t in tensors]

    def result() -> list[torch.Tensor]:
        for tensor, value in zip(tensors, start, strict=True):
            tensor.copy_(value)
        ours.step()
        return tensors

    first = [t.clone() for t in result()]
    return sum(not all(map(torch.equal, result(), first)) for _ in range(repeats - 1))


def add_host_memory(rows: list[dict[str, Any]], case: Case) -> None:
    """`held_mib` and `peak_mib` of each row, from a fresh process for each contender."""
    for name in dict.fromkeys(row["contender"] for row in rows if row["kind"] == "time"):
        peaks = measure.peaks_in_fresh_process(worker_arguments(case, name))
        for row in rows:
            if row["kind"] == "time" and row["contender"] == name and row["part"] in peaks:
                row |= peaks[row["part"]]


def worker_arguments(case: Case, contender: str) -> list[str]:
    """Command line from which `worker` makes the same case with one contender."""
    return [
        *("--suite", case.suite, "--shape", case.shape.name, "--tokens", str(case.tokens), "--l0", str(case.l0)),
        *("--dtype", case.dtype, "--skew", str(case.skew), "--contender", contender, "--parts", *case.parts),
    ]
