"""What a sparse training step should take on a card, counted from the compiled kernels: no GPU needed, none timed.

    counted     warp-instructions and tensor-core cycles of each kernel, from its disassembly (`follow`) and its `Pass`
    floor       the longest of  warp-instructions/issue rate,  HBM bytes/rate,  L2 bytes/rate,  tensor cycles/clock
                (L2 bytes: those that the lanes ask for, as if nothing hit the first-level cache)
    expected    the longest of the same, each divided by the share of it a kernel gets (`cards.EXPECTED`), + the tail
    tail        the longest single program where it may start last: instructions of one warp · `LONE_CYCLES`

Where one block fills a multiprocessor, nothing runs beside a product's epilogue: its issue time is added to the tensor
cores' time. And the last wave of tiles takes as long as a full one.
Counts of two lengths a period apart differ by a constant once a list is long, or rise at few lengths: so a few that are
followed give all.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import numpy as np

from bench.aot import trips
from bench.aot.cards import EXPECTED, LONE_CYCLES, Card, Utilisation, occupancy
from bench.aot.follow import Follower, Given, NotFollowedError
from bench.aot.lists import Case
from bench.aot.sass import MATRIX, Code
from bench.aot.trips import Pass

# Up to so many lengths each is followed.
FOLLOWED = 70
PERIODS = (1, 2, 4, 8, 16, 32, 64)
MOST_LEVELS = 100
# From one of these, or from the least length that there is, every pipeline is full and every first tile.
STARTS = (33, 129)
# Beyond it: around multiples of every period, where its turns begin.
PROBES = (0, 1, 2, 3, 6, 7, 14, 15, 30, 31, 32, 39, 47, 63)
MULTIPLY_ADDS = 2048  # of bf16 operands, a cycle of a multiprocessor; others in proportion
OPERAND_BITS = {"BF16": 16, "F16": 16, "TF32": 32, "E4M3": 8, "E5M2": 8}


@dataclass(frozen=True)
class Counts:
    """Of one kernel in one case."""

    warp_instructions: float
    tensor_cycles: float
    """Of multiprocessors, all programs together."""
    longest: float
    """Instructions of one warp of the longest program."""
    programs: float
    l2: float
    """Bytes that the lanes ask for."""
    beside: float = 0.0
    """Warp-instructions outside the loop of the matrix products."""
    assumed: int = 0
    """Branches that depend on what is not known, see `follow`."""


def matrix_cycles(code: Code) -> np.ndarray:
    """[blocks] cycles of the tensor cores for one warp running each block once: a product is that of four warps."""
    found = np.zeros(len(code.blocks))
    for number, block in enumerate(code.blocks):
        for instruction in block.instructions:
            if match := MATRIX.search(instruction.opcode):
                bits = next((OPERAND_BITS[part] for part in instruction.opcode.split(".") if part in OPERAND_BITS), 16)
                m, n, k = map(int, match.groups())
                found[number] += m * n * k / (MULTIPLY_ADDS * 16 / bits) / 4
    return found


class Counter:
    """Instructions and tensor cycles of programs of any length, from a few that are followed."""

    def __init__(self, code: Code, spec):
        self.follower = Follower(code, trips.argument_sizes(spec))
        self.threads = 32 * spec.num_warps
        self.sizes = np.array([len(block.instructions) for block in code.blocks])
        self.cycles = matrix_cycles(code)
        self.assumed: set[int] = set()
        self.known: dict[tuple, np.ndarray] = {}

    def program(self, step: Pass, length: int) -> np.ndarray:
        """Warp-instructions, tensor cycles, and the warp-instructions of blocks that run less often than products."""
        scalars, memory = step.given(length)
        key = (
            step.program,
            step.grid,
            *sorted(scalars.items()),
            *((name, memory[name].tobytes()) for name in sorted(memory)),
        )
        if key not in self.known:
            self.known[key] = self._program(Given(scalars, memory, self.threads, step.program, step.grid))
        return self.known[key]

    def _program(self, given: Given) -> np.ndarray:
        walk = self.follower.walk(given)
        self.assumed |= walk.assumed
        in_loop = walk.counts[self.cycles > 0].max(initial=0)
        beside = walk.counts @ (self.sizes * (walk.counts < in_loop))
        return np.array([walk.counts @ self.sizes, walk.counts @ self.cycles, beside], np.float64)

    def programs(self, step: Pass, lengths: np.ndarray) -> np.ndarray:
        """[lengths, 3]. Raises `NotFollowedError` where no period is found."""

        def at(length: int) -> np.ndarray:
            return self.program(step, length)

        wanted = [int(length) for length in lengths]
        if len(wanted) <= FOLLOWED:
            return np.array([at(length) for length in wanted])
        for first in sorted({max(start, next(length for length in wanted if length > 0)) for start in STARTS}):
            if first + PROBES[-1] + PERIODS[-1] > wanted[-1]:
                continue
            for period in PERIODS:
                rises = [at(first + beyond + period) - at(first + beyond) for beyond in PROBES]
                if not all(np.array_equal(rise, rises[0]) for rise in rises):
                    continue
                rows = []
                for length in wanted:
                    over = max(0, -(-(length - first - period + 1) // period))
                    rows.append(at(length - over * period) + over * rises[0])
                if np.array_equal(rows[-1], at(wanted[-1])):
                    return np.array(rows)
        return _of_few_levels(at, wanted)


def _of_few_levels(at: Callable[[int], np.ndarray], wanted: list[int]) -> np.ndarray:
    """Rows of rising lengths whose counts rise at a few of them only: what lies between two equal ones equals them."""
    found = {0: at(wanted[0]), len(wanted) - 1: at(wanted[-1])}
    open_ends = [(0, len(wanted) - 1)]
    while open_ends:
        low, high = open_ends.pop()
        if high - low > 1 and not np.array_equal(found[low], found[high]):
            middle = (low + high) // 2
            found[middle] = at(wanted[middle])
            open_ends += [(low, middle), (middle, high)]
        if len(found) > MOST_LEVELS:
            raise NotFollowedError(f"lengths from {wanted[0]} to {wanted[-1]} show none of the periods {PERIODS}")
    known = np.array(sorted(found))
    return np.array([found[known[np.searchsorted(known, place, "right") - 1]] for place in range(len(wanted))])


def count(code: Code, spec, cases: Iterable[Case]) -> dict[str, dict[str, dict]]:
    """`Counts` of a kernel of the step in each case, by the case's title and the pass's name; {} for another kernel."""
    counter, found = None, {}
    for case in cases:
        for step in trips.every(case):
            if step.spec != spec.name:
                continue
            counter = counter or Counter(code, spec)
            found.setdefault(case.title, {})[step.name] = asdict(_count(counter, step, spec))
    return found


# Of programs whose instructions are recorded: none, one entry, few, those of a token at L0 64, many.
RECORDED_LENGTHS = (0, 1, 17, 67, 300)


def of_programs(code: Code, spec) -> dict[str, int]:
    """Warp-instructions of one program of a kernel of the step, by its length: cheap, and worse when the code is."""
    every = (step for case in trips.RECORDED for step in trips.every(case))
    step = next(step for step in every if step.spec == spec.name)
    counter, lengths = Counter(code, spec), step.programs.length
    if len(lengths) > 1:
        lengths = [length for length in RECORDED_LENGTHS if length <= step.most]
    return {str(length): int(counter.program(step, int(length))[0]) for length in lengths}


def _count(counter: Counter, step: Pass, spec) -> Counts:
    lengths, weight = step.programs.length, step.programs.count
    rows = counter.programs(step, lengths)
    longest = counter.programs(step, np.array([step.programs.longest]))[0, 0] / spec.num_warps
    l2 = sum(step.requested(int(length)) * number for length, number in zip(lengths, weight, strict=True))
    instructions, cycles, beside = map(float, weight @ rows)
    return Counts(instructions, cycles, longest, step.programs.lists, l2, beside, len(counter.assumed))


@dataclass(frozen=True)
class Times:
    """Seconds."""

    issue: float
    hbm: float
    l2: float
    tensor: float
    floor: float
    expected: float
    tail: float
    binds: str


def times(step: Pass, counts: Counts, row: dict, warps: int, card: Card, share: Utilisation = EXPECTED) -> Times:
    """row: registers and shared memory of the compiled kernel."""
    fits = occupancy(card, warps, row["registers"], row["shared"])
    if fits.blocks == 0:
        raise ValueError(f"{step.name}: a block does not fit a multiprocessor ({fits.limit})")
    waves = counts.programs / max(1, step.launches) / (card.multiprocessors * fits.blocks)
    rounding = np.ceil(waves) / waves if step.tiles else 1.0  # the last wave of tiles is not full
    l2, share_of_l2 = (card.l2_of_tiles, share.l2_of_tiles) if step.tiles else (card.l2, share.l2)
    parts = {
        "issue": counts.warp_instructions / card.issue,
        "HBM": step.hbm / card.hbm,
        "L2": counts.l2 / l2,
        "tensor": counts.tensor_cycles / (card.multiprocessors * card.tensor_clock),
    }
    shares = {"issue": share.issue, "HBM": share.hbm, "L2": share_of_l2, "tensor": share.tensor}
    expected = {name: seconds / shares[name] for name, seconds in parts.items()}
    if counts.tensor_cycles and fits.blocks == 1:
        expected["tensor"] += counts.beside / card.issue / share.issue
    expected["tensor"] *= rounding
    binds = max(expected, key=lambda name: expected[name])
    lone = counts.longest * LONE_CYCLES / card.clock
    # A program that starts with the last ones ends so much later; that of a full wave is in the rate already.
    mean = counts.warp_instructions / counts.programs / warps * LONE_CYCLES / card.clock
    tail = 0.0 if counts.tensor_cycles else max(0.0, lone - mean)
    if step.longest_first:
        tail = max(0.0, lone - expected[binds])
    seconds = max(expected[binds] + tail, lone)  # no kernel is over before its longest program
    alone = seconds == lone or tail >= expected[binds]
    return Times(*parts.values(), max(parts.values()), seconds, tail, "tail" if alone else binds)
