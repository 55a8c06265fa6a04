"""How often each block of a kernel runs: its control flow followed, with the arguments and lists it would be given.

    slice = the instructions that some branch depends on, through registers, predicates and shared memory
    counts[block] = warps that run it, the slice being computed for every thread of one program

Only the slice is computed, on whole numbers, every thread at once: the branches of our kernels depend on sizes, on the
offsets of lists and on bits, never on what is summed. So unrolling, pipelining and what the assembler made of them need
no description; and every instruction of a block counts, also where its predicate is false, because it is issued.

A branch on something that is not known (a float, memory that was not given) is `Assumed`: forwards it is taken, since
it leads around the rare case of a function such as exp2; a wait for a barrier ends at once; backwards it is an error.
Threads that part meet again at the lowest address, as they do on the device.
"""

import functools
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from bench.aot.sass import PREDICATE, Block, Code, Instruction

MASK = 0xFFFFFFFF
POINTER_BITS = 36  # pointer i is i + 1 shifted by this: what it points to is found from an address
SHARED_BYTES = 1 << 18
GRID_AT = 0xC  # where constants hold the sizes of the grid
MOST_BLOCKS = 3_000_000
Value = np.ndarray | None  # int64 with 32 bits in use, or bool, one a thread; None: not known


class NotFollowedError(ValueError):
    pass


def needed(code: Code) -> list[list[Instruction]]:
    """Of each block the instructions of the slice, by walking backwards until nothing is added."""
    shared = False
    while True:
        kept, reads_shared = _needed(code, shared)
        if reads_shared == shared:
            return kept
        shared = reads_shared


def _needed(code: Code, shared: bool) -> tuple[list[list[Instruction]], bool]:
    before: list[frozenset[str]] = [frozenset()] * len(code.blocks)
    kept: list[list[Instruction]] = [[] for _ in code.blocks]
    changed = True
    while changed:
        changed = False
        for number in reversed(range(len(code.blocks))):
            block = code.blocks[number]
            live = set().union(*(before[follower] for follower in block.following))
            mine = []
            for instruction in reversed(block.instructions):
                stores = shared and instruction.base in ("STS", "STSM")
                if not (instruction.leaves or stores or instruction.writes & live):
                    continue
                mine.append(instruction)
                if instruction.guard is None:
                    live -= instruction.writes
                if instruction.leaves and instruction.base != "RET":
                    live |= {instruction.guard} - {None, "PT", "UPT"}
                else:
                    live |= instruction.reads
            mine.reverse()
            if frozenset(live) != before[number] or mine != kept[number]:
                before[number], kept[number], changed = frozenset(live), mine, True
    loads = any(instruction.base in ("LDS", "LDSM") for block in kept for instruction in block)
    return kept, loads or shared


@dataclass(frozen=True)
class Given:
    """What one program is given. scalars: integer arguments by name. memory: what a pointer points to; the rest is not
    known. program: its index in the grid. threads: of the program. grid: its sizes, where the kernel asks for them."""

    scalars: Mapping[str, int]
    memory: Mapping[str, np.ndarray]
    threads: int
    program: tuple[int, int, int] = (0, 0, 0)
    grid: tuple[int, ...] = ()


@dataclass
class Walk:
    counts: np.ndarray
    """[blocks] Warps that ran each."""
    assumed: set[int] = field(default_factory=set)
    """Addresses of branches that depend on what is not known."""


class _Machine:
    def __init__(self, given: Given, constants: dict[int, tuple[int, int]], arguments: list[np.ndarray | None]):
        self.threads = given.threads
        self.registers: dict[str, Value] = {}
        self.constants = constants
        self.arguments = arguments
        self.shared = np.zeros(SHARED_BYTES, np.uint8)
        self.stored = np.zeros(SHARED_BYTES, bool)
        thread = np.arange(given.threads, dtype=np.int64)
        zero = np.zeros_like(thread)
        self.special = {
            "SR_TID.X": thread,
            "SR_LANEID": thread % 32,
            "SRZ": zero,
            "SR_CgaCtaId": zero,
            "SR_TID.Y": zero,
            "SR_TID.Z": zero,
            **{f"SR_CTAID.{axis}": zero + given.program[i] for i, axis in enumerate("XYZ")},
        }
        self.mask = np.ones(given.threads, bool)

    # ---- operands
    def bits(self, text: str) -> Value:
        """A source operand as a whole number of 32 bits."""
        sign = text[0] if text[0] in "-~" else ""
        text = text.lstrip("-~+")
        if text.startswith(("RZ", "URZ")):
            value = np.zeros(self.threads, np.int64)
        elif text[0] in "RU" and re.fullmatch(r"U?R\d+(\.\w+)*", text):
            value = self.registers.get(text.split(".")[0])
        elif text.startswith("c["):
            value = self.constant(text)
        elif re.fullmatch(r"0x[0-9a-f]+|\d+", text):
            value = np.full(self.threads, int(text, 0) & MASK, np.int64)
        else:
            return None
        if value is None:
            return None
        if sign == "-":
            return -value & MASK
        return ~value & MASK if sign == "~" else value

    def constant(self, text: str, word: int = 0) -> Value:
        match = re.fullmatch(r"c\[0x0\]\[0x([0-9a-f]+)\]", text)
        if not match:
            return None
        at = int(match[1], 16) + 4 * word
        for start, (size, value) in self.constants.items():
            if start <= at < start + size:
                return np.full(self.threads, value >> 8 * (at - start) & MASK, np.int64)
        return None

    def predicate(self, text: str) -> Value:
        negated, name = text[0] == "!", text.lstrip("!")
        if name in ("PT", "UPT"):
            value = np.ones(self.threads, bool)
        else:
            value = self.registers.get(name)
        return value if value is None or not negated else ~value

    def pair(self, text: str) -> Value:
        """Two registers as one number of 64 bits."""
        name = text.removesuffix(".64")
        if name in ("RZ", "URZ"):
            return np.zeros(self.threads, np.uint64)
        match = re.fullmatch(r"(U?R)(\d+)", name)
        if not match:
            value = self.bits(text)
            return None if value is None else value.astype(np.uint64)
        low, high = (self.registers.get(f"{match[1]}{int(match[2]) + i}") for i in (0, 1))
        if low is None or high is None:
            return None
        return low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)

    def address(self, text: str) -> Value:
        inside = text[text.rindex("[") + 1 : -1]
        total = np.zeros(self.threads, np.int64)
        for term in re.findall(r"-?[^+-]+", inside):
            if re.fullmatch(r"U?R\d+\.64", term):
                value = self.pair(term)
            else:
                number = re.fullmatch(r"(-?)(0x[0-9a-f]+)", term)
                value = (
                    np.int64(int(number[1] + number[2], 16)) if number else self.bits(re.sub(r"\.[XU]\w*", "", term))
                )
            if value is None:
                return None
            total = total + value.astype(np.int64)
        return total

    # ---- results
    def write(self, name: str, value: Value, guard: Value, certain: bool) -> None:
        if name in ("RZ", "URZ", "PT", "UPT"):
            return
        if value is not None and guard is not None and not (certain and self.mask.all()):
            where = guard & self.mask
            if not where.all():
                old = self.registers.get(name)
                value = None if old is None else np.where(where, value, old)
        self.registers[name] = None if guard is None else value


def _signed(value: np.ndarray) -> np.ndarray:
    return (value ^ 0x80000000) - 0x80000000


COMPARE: dict[str, Callable] = {
    "LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge, "EQ": operator.eq, "NE": operator.ne,
}  # fmt: skip
JOIN: dict[str, Callable] = {"AND": operator.and_, "OR": operator.or_, "XOR": operator.xor}


def _lut(table: int, a, b, c, one: int):
    found = np.zeros_like(a)
    for row in range(8):
        if table >> row & 1:
            term = (a if row & 4 else a ^ one) & (b if row & 2 else b ^ one) & (c if row & 1 else c ^ one)
            found = found | term
    return found


def _set_predicate(m: _Machine, i: Instruction, sources: tuple[str, ...]) -> list[Value]:
    _, comparison, *options = i.opcode.split(".")
    a, b, joined = m.bits(sources[0]), m.bits(sources[1]), m.predicate(sources[2])
    if a is None or b is None:
        return [None, None]
    if "U32" not in options:
        a, b = _signed(a), _signed(b)
    holds = COMPARE[comparison](a, b)
    if "EX" in options:  # the high words: the low ones decide where these are equal
        low = m.predicate(sources[3])
        if low is None:
            return [None, None]
        equal = a == b
        strict = {"LE": operator.lt, "GE": operator.gt}.get(comparison, COMPARE[comparison])(a, b)
        holds = (a != b) | low if comparison == "NE" else equal & low if comparison == "EQ" else strict | (equal & low)
    if joined is None:
        return [None, None]
    join = JOIN[next(option for option in options if option in JOIN)]
    return [join(holds, joined), join(~holds, joined)]


def _terms(m: _Machine, sources: tuple[str, ...], carry: bool) -> list[Value]:
    """Addends. Where a carry leaves, −x is ~x + 1 in 33 bits, so that −0 carries."""
    found = []
    for text in sources:
        value = m.bits(text)
        found.append((~m.bits(text[1:]) & MASK) + 1 if carry and value is not None and text[0] == "-" else value)
    return found


def _sum(m: _Machine, i: Instruction, sources: tuple[str, ...], results: tuple[str, ...]) -> list[Value]:
    """IADD3: up to three terms, carries in (X) and up to two out."""
    carries_in = [s for s in sources if re.fullmatch(r"!?U?P(T|\d)", s)]
    terms = _terms(m, tuple(s for s in sources if s not in carries_in), len(results) > 1)
    carried = [m.predicate(text) for text in carries_in] if "X" in i.parts else []
    if any(value is None for value in (*terms, *carried)):
        return [None] * len(results)
    total = sum(terms) + sum(carry.astype(np.int64) for carry in carried)
    over = total >> 32
    return [total & MASK, over > 0, over > 1][: len(results)]


def _multiply(m: _Machine, i: Instruction, sources: tuple[str, ...], results: tuple[str, ...]) -> list[Value]:
    """IMAD in all its forms."""
    count = 2 if "WIDE" in i.parts else 1
    extra = len(results) - 1
    a, b = m.bits(sources[0]), m.bits(sources[1])
    long = {"WIDE", "HI"} & i.parts
    c = m.pair(sources[2]) if long else m.bits(sources[2])
    if a is None or b is None or c is None:
        return [None] * (count + extra)
    if not long:
        carry = m.predicate(sources[3]) if "X" in i.parts else np.zeros(m.threads, np.int64)
        if carry is None:
            return [None] * (count + extra)
        with np.errstate(over="ignore"):
            return [a * b + c + carry & MASK] + [None] * extra
    with np.errstate(over="ignore"):
        if "U32" in i.parts:
            product = a.astype(np.uint64) * b.astype(np.uint64)
        else:
            product = (_signed(a) * _signed(b)).astype(np.uint64)
        total = product + c
    low, high = (total & np.uint64(MASK)).astype(np.int64), (total >> np.uint64(32)).astype(np.int64)
    return [low, high] + [None] * extra if count == 2 else [high] + [None] * extra


def _lea(m: _Machine, i: Instruction, sources: tuple[str, ...], results: tuple[str, ...]) -> list[Value]:
    """(a << s) + b; HI: the high word of the shifted pair (c, a), or of a with its sign (SX32)."""
    high = "HI" in i.parts
    a, b = m.bits(sources[0]), m.bits(sources[1])
    pair = high and "SX32" not in i.parts
    c = m.bits(sources[2]) if pair else None
    shift, rest = int(sources[3 if pair else 2], 0), sources[4 if pair else 3 :]
    carry = m.predicate(rest[0]) if "X" in i.parts else np.zeros(m.threads, bool)
    if a is None or b is None or carry is None or (pair and c is None):
        return [None] * len(results)
    if sources[1][0] == "-" and len(results) > 1:
        b = (~m.bits(sources[1][1:]) & MASK) + 1
    if pair:
        word = (((c << shift) & MASK) | (a >> (32 - shift))) & MASK
    elif high:
        word = (_signed(a) << shift) >> 32 & MASK
    else:
        word = a << shift & MASK
    total = word + b + carry
    return [total & MASK, total >> 32 > 0][: len(results)]


def _shift(m: _Machine, i: Instruction, sources: tuple[str, ...]) -> list[Value]:
    low, by, high = (m.bits(text) for text in sources)
    if low is None or by is None or high is None:
        return [None]
    by = np.minimum(by, 63)
    wide = _signed(high) << 32 | low if "S32" in i.parts or "S64" in i.parts else (high << 32 | low)
    if "L" in i.parts:
        if "HI" in i.parts:
            return [((high << by) | np.where(by > 0, low >> (32 - np.clip(by, 1, 32)), 0)) & MASK]
        return [np.where(by < 32, low << np.minimum(by, 31), 0) & MASK]
    if "HI" in i.parts:
        value = _signed(high) if "S32" in i.parts else high
        return [value >> np.minimum(by, 32) & MASK]
    unsigned = wide.astype(np.uint64) >> by.astype(np.uint64)
    return [((wide >> by) if "S64" in i.parts else unsigned.astype(np.int64)) & MASK]


def _logic(m: _Machine, i: Instruction, sources: tuple[str, ...], results: tuple[str, ...]) -> list[Value]:
    a, b, c = (m.bits(text) for text in sources[:3])
    table = int(sources[3], 16)
    if a is None or b is None or c is None:
        return [None] * len(results)
    value = _lut(table, a, b, c, MASK)
    return [value] if len(results) == 1 else [value != 0, value]


def _predicates(m: _Machine, i: Instruction, sources: tuple[str, ...]) -> list[Value]:
    values = [m.predicate(text) for text in sources[:3]]
    found: list[Value] = []
    for text in sources[3:5]:
        table = int(text, 16)
        if table in (0, 255):
            found.append(np.full(m.threads, table == 255))
            continue
        # A row of the table that no value of an unknown one changes is decided without it.
        places = [value is None for value in values]
        if any(places):
            found.append(None)
            continue
        found.append(_lut(table, *(v.astype(np.int64) for v in values), 1).astype(bool))
    return found


def _extremum(m: _Machine, i: Instruction, sources: tuple[str, ...]) -> list[Value]:
    """Of two or three numbers; VIADDMNMX: of the sum of the first two, and the third."""
    *texts, which = sources
    values, least = [m.bits(text) for text in texts], m.predicate(which)
    if any(value is None for value in values) or least is None:
        return [None]
    if i.base == "VIADDMNMX":
        values = [values[0] + values[1] & MASK, values[2]]
    if "U32" not in i.parts:
        values = [_signed(value) for value in values]
    low, high = functools.reduce(np.minimum, values), functools.reduce(np.maximum, values)
    return [np.where(least, low, high) & MASK]


def _shuffle(m: _Machine, i: Instruction, sources: tuple[str, ...]) -> list[Value]:
    value, by, clamp = (m.bits(text) for text in sources)
    if value is None or by is None or clamp is None:
        return [None, None]
    lane = np.arange(m.threads) % 32
    segment = clamp >> 8 & 31
    low, most = lane & segment, (lane & segment) | (clamp & 31 & ~segment)
    mode = i.opcode.split(".")[1]
    if mode == "UP":
        source = lane - by
        inside = source >= most
    else:
        source = {"DOWN": lane + by, "BFLY": lane ^ by, "IDX": low | (by & ~segment)}[mode]
        inside = source <= most
    source = np.where(inside, source, lane)
    return [inside, value[np.arange(m.threads) // 32 * 32 + source]]


def _reduce(m: _Machine, i: Instruction, sources: tuple[str, ...]) -> list[Value]:
    value = m.bits(sources[0])
    if value is None:
        return [None]
    if "S32" in i.parts:
        value = _signed(value)
    names = {"MAX": np.maximum, "MIN": np.minimum, "SUM": np.add, "AND": np.bitwise_and, "OR": np.bitwise_or}
    how = next((function for name, function in names.items() if name in i.parts), np.bitwise_xor)
    found = how.reduce(np.reshape(value, (-1, 32)), 1)
    return [np.repeat(found, 32) & MASK]


def _vote(m: _Machine, i: Instruction, sources: tuple[str, ...], results: tuple[str, ...]) -> list[Value]:
    value = m.predicate(sources[-1])
    if value is None:
        return [None] * len(results)
    lanes = (value & m.mask).reshape(-1, 32)
    ballot = (lanes.astype(np.int64) << np.arange(32)).sum(1)
    held = (value | ~m.mask).reshape(-1, 32).all(1) if "ALL" in i.parts else lanes.any(1)
    by_name = {True: np.repeat(held, 32), False: np.repeat(ballot, 32)}
    return [by_name[bool(re.fullmatch(r"U?P(T|\d)", name))] for name in results]


def _load(m: _Machine, i: Instruction, sources: tuple[str, ...], guard: Value) -> list[Value]:
    size = 16 if "128" in i.parts else 8 if "64" in i.parts else 4
    narrow = next((width for name, width in (("U8", 1), ("S8", 1), ("U16", 2), ("S16", 2)) if name in i.parts), None)
    unknown: list[Value] = [None] * i.width
    at = m.address(sources[0])
    if at is None or guard is None:
        return unknown
    where = guard & m.mask
    if not where.any():
        return [np.zeros(m.threads, np.int64)] * i.width
    read = narrow or size
    if i.base == "LDS":
        data, offsets, valid = m.shared, at, m.stored
    else:
        pointers = np.unique(at[where] >> POINTER_BITS)
        if len(pointers) != 1 or not 0 < pointers[0] <= len(m.arguments):
            return unknown
        data = m.arguments[int(pointers[0]) - 1]
        offsets, valid = at & (1 << POINTER_BITS) - 1, None
    if data is None:
        return unknown
    chosen = offsets[where]
    if chosen.min() < 0 or chosen.max() + read > len(data):
        return unknown
    index = np.where(where, offsets, chosen[0])[:, None] + np.arange(read)
    if valid is not None and not valid[index].all():
        return unknown
    raw = data[index]
    if narrow:
        value = raw.astype(np.int64) @ (1 << 8 * np.arange(narrow))
        if i.parts & {"S8", "S16"}:
            value = ((value ^ 1 << 8 * narrow - 1) - (1 << 8 * narrow - 1)) & MASK
        return [value]
    words = raw.reshape(m.threads, i.width, 4).astype(np.int64) @ (1 << 8 * np.arange(4, dtype=np.int64))
    return [words[:, word] for word in range(i.width)]


def _store(m: _Machine, i: Instruction, guard: Value) -> None:
    size = 16 if "128" in i.parts else 8 if "64" in i.parts else 1 if "U8" in i.parts else 2 if "U16" in i.parts else 4
    at = m.address(i.operands[0])
    if at is None or guard is None or i.base != "STS":
        m.stored[:] = False  # it may have gone anywhere
        return
    where = guard & m.mask
    if not where.any():
        return
    index = at[where][:, None] + np.arange(size)
    name = i.operands[1]
    match = re.fullmatch(r"(U?R)(\d+)(\.\w+)*", name)
    words = max(1, size // 4)
    texts = [name] * words if not match else [f"{match[1]}{int(match[2]) + word}" for word in range(words)]
    values = [m.bits(text) for text in texts]
    if any(value is None for value in values):
        m.stored[index] = False
        return
    raw = np.stack(values, 1).astype("<u4").view(np.uint8).reshape(m.threads, 4 * words)
    m.shared[index] = raw[where][:, :size]
    m.stored[index] = True


def _floats(m: _Machine, i: Instruction, sources: tuple[str, ...]) -> list[Value]:
    """What a division of whole numbers needs of floats."""
    value = m.bits(sources[0])
    if value is None:
        return [None]
    if i.base == "I2F":
        exact = (value if "U32" in i.parts else _signed(value)).astype(np.float64)
        single = exact.astype(np.float32)
        if "RP" in i.parts:
            single = np.where(single < exact, np.nextafter(single, np.float32(np.inf)), single)
        return [single.astype(np.float32).view(np.uint32).astype(np.int64)]
    single = value.astype(np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        if i.base == "MUFU" and "RCP" in i.parts:
            return [(np.float32(1) / single).view(np.uint32).astype(np.int64)]
        if i.base == "F2I" and "TRUNC" in i.parts and "U32" in i.parts:
            return [np.clip(np.nan_to_num(single.astype(np.float64)), 0, MASK).astype(np.int64)]
    return [None]


def _compute(m: _Machine, i: Instruction, guard: Value) -> list[Value]:
    """Values of the operands an instruction writes, wide ones word by word. What is not written here is not known."""
    results, sources = i.split
    base = i.base.removeprefix("U") if i.base not in ("USEL",) else "SEL"
    match base:
        case "ISETP":
            return _set_predicate(m, i, sources)
        case "IADD3":
            return _sum(m, i, sources, results)
        case "VIADD" | "IADD":
            a, b = m.bits(sources[0]), m.bits(sources[1])
            return [None if a is None or b is None else a + b & MASK]
        case "IMAD":
            return _multiply(m, i, sources, results)
        case "LEA":
            return _lea(m, i, sources, results)
        case "SHF":
            return _shift(m, i, sources)
        case "LOP3":
            return _logic(m, i, sources, results)
        case "PLOP3":
            return _predicates(m, i, sources)
        case "MOV":
            return [m.bits(sources[0])]
        case "R2UR":
            return [None] * (len(results) - 1) + [m.bits(sources[0])]
        case "SEL" | "FSEL":
            a, b, which = m.bits(sources[0]), m.bits(sources[1]), m.predicate(sources[2])
            return [None if a is None or b is None or which is None else np.where(which, a, b)]
        case "S2R" | "S2UR":
            return [m.special.get(sources[0])]
        case "CS2R":
            return [m.special.get(sources[0])] * i.width
        case "LDC":
            return [m.constant(sources[0], word) for word in range(i.width)]
        case "LDG" | "LDS":
            return _load(m, i, sources, guard)
        case "VIMNMX" | "IMNMX" | "VIMNMX3" | "VIADDMNMX":
            return _extremum(m, i, sources)
        case "SHFL":
            return _shuffle(m, i, sources)
        case "REDUX":
            return _reduce(m, i, sources)
        case "VOTE":
            return _vote(m, i, sources, results)
        case "POPC":
            value = m.bits(sources[0])
            return [None if value is None else np.bitwise_count(value).astype(np.int64)]
        case "IABS":
            value = m.bits(sources[0])
            return [None if value is None else np.abs(_signed(value))]
        case "I2F" | "F2I" | "MUFU":
            return _floats(m, i, sources)
        case "SGXT":
            value, width = m.bits(sources[0]), int(sources[1], 0)
            if value is None:
                return [None]
            kept = value & (1 << width) - 1
            return [kept if "U32" in i.parts else ((kept ^ 1 << width - 1) - (1 << width - 1)) & MASK]
        case "PRMT":
            a, which, b = (m.bits(text) for text in sources)
            if a is None or which is None or b is None:
                return [None]
            both, value = a | b << 32, 0
            for byte in range(4):
                at = which >> 4 * byte & 15
                value = value | (both >> 8 * (at & 7) & 255) << 8 * byte
            return [value]
        case "HFMA2" if sources[0].endswith("RZ") and sources[1] == "RZ":  # 0·0 + c: how a constant is loaded
            high, low = (np.float16(text).view(np.uint16) for text in sources[2:4])
            return [np.full(m.threads, int(high) << 16 | int(low), np.int64)]
        case "P2R":
            bits, mask = m.bits(sources[1]), int(sources[2], 16)
            if bits is None:
                return [None]
            value = bits & ~mask
            for place in range(7):
                if mask >> place & 1:
                    held = m.registers.get(f"P{place}")
                    if held is None:
                        return [None]
                    value = value | held.astype(np.int64) << place
            return [value]
        case "ELECT":
            return [np.arange(m.threads) % 32 == 0] + [None] * (len(results) - 1)
        case "SYNCS":
            return [np.ones(m.threads, bool)] + [None] * (len(results) - 1)
    return [None] * max(len(results), i.width)


def _run(m: _Machine, i: Instruction) -> None:
    if i.guard is None:
        guard: Value = m.mask
    else:
        guard = m.predicate(("!" if i.negated else "") + i.guard)
    if i.base in ("STS", "STSM"):
        return _store(m, i, guard)
    if i.base == "R2P":
        bits, mask = m.bits(i.operands[1]), int(i.operands[2], 16)
        for place in range(7):
            if mask >> place & 1:
                held = None if bits is None else (bits >> place & 1).astype(bool)
                m.write(f"P{place}", held, guard, i.guard is None)
        return None
    values = iter(_compute(m, i, guard))
    for name in i.split[0]:
        match = re.fullmatch(r"(U?R)(\d+)(\.\w+)*", name)
        if match:
            for word in range(i.width):
                m.write(f"{match[1]}{int(match[2]) + word}", next(values, None), guard, i.guard is None)
        elif PREDICATE.fullmatch(name):
            m.write(name, next(values, None), guard, i.guard is None)
        else:
            next(values, None)
    return None


class Follower:
    """Follows one kernel as often as wanted.

    arguments: of the kernel in the order of its signature, (name, bytes) each, a descriptor with its sizes and strides.
    """

    def __init__(self, code: Code, arguments: list[tuple[str, int]]):
        self.code, self.arguments = code, arguments
        self.slices = needed(code)
        if len(code.parameters) < len(arguments):
            raise ValueError(f"arguments: the kernel has {len(code.parameters)}, got {len(arguments)}")

    def walk(self, given: Given) -> Walk:
        """Raises `NotFollowedError` where a loop depends on what is not known."""
        names = {name for name, _ in self.arguments}
        for name in (*given.scalars, *given.memory):
            if name not in names:
                raise ValueError(f"given: the kernel has no argument {name}")
        constants, data = {GRID_AT + 4 * axis: (4, size) for axis, size in enumerate(given.grid)}, []
        for place, (name, size) in enumerate(self.arguments):
            at = self.code.parameters[place]
            if name in given.scalars:
                constants[at] = size, given.scalars[name] & (1 << 8 * size) - 1
            elif size == 8 and name.endswith("_ptr"):
                constants[at] = size, place + 1 << POINTER_BITS
            held = given.memory.get(name)
            data.append(None if held is None else np.ascontiguousarray(held).view(np.uint8).ravel())
        return self._walk(_Machine(given, constants, data))

    def _walk(self, m: _Machine) -> Walk:
        blocks: list[Block] = self.code.blocks
        walk = Walk(np.zeros(len(blocks), np.int64))
        at = np.zeros(m.threads, np.int64)  # block of each thread
        ended = len(blocks)
        for _ in range(MOST_BLOCKS):
            number = int(at.min())
            if number == ended:
                return walk
            m.mask = at == number
            walk.counts[number] += int(m.mask.reshape(-1, 32).any(1).sum())
            last = None
            for instruction in self.slices[number]:
                if instruction.leaves:
                    last = instruction
                else:
                    _run(m, instruction)
            at[m.mask] = number + 1
            if last is not None:
                self._leave(m, last, number, at, walk)
        raise NotFollowedError(f"more than {MOST_BLOCKS} blocks")

    def _leave(self, m: _Machine, last: Instruction, number: int, at: np.ndarray, walk: Walk) -> None:
        if last.base == "EXIT":
            target = len(self.code.blocks)
        elif last.base in ("BRA", "CALL"):
            target = self.code.starts[last.target]
        else:
            raise NotFollowedError(f"{last.address:#x}: {last.opcode} is not followed")
        taken = np.ones(m.threads, bool)
        if last.guard is not None:
            taken = m.predicate(("!" if last.negated else "") + last.guard)
        if taken is None:
            if target <= number or last.base == "EXIT":
                raise NotFollowedError(f"{last.address:#x}: {last.opcode} depends on what is not known")
            walk.assumed.add(last.address)
            taken = np.ones(m.threads, bool)
        at[m.mask & taken] = target
