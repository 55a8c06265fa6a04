"""The disassembly of a compiled kernel: instructions, basic blocks, and where the kernel's arguments lie.

    Code = instructions in order → blocks, each from a branch target or the instruction after a branch to the next one

Registers are named "R7", "UR7" (one for a warp), "P3", "UP3" (predicates). What an instruction reads and writes is
taken from its text; where the width of an operand is in doubt, more is said to be read than is, never less.
"""

import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ZERO = ("RZ", "URZ", "PT", "UPT")
LINE = re.compile(r"^\s*/\*([0-9a-f]{4,6})\*/\s+(?:@(!?)(U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.MULTILINE)
REGISTER = re.compile(r"\b(UR|R)(\d+)\b")
PREDICATE = re.compile(r"\b(UP|P)(\d)\b")
MATRIX = re.compile(r"GMMA\.(\d+)x(\d+)x(\d+)")

# No operand of these is written.
WRITE_NOTHING = re.compile(
    r"(ST[GSL]?|RED|REDG|REDUXS|BAR|BRA|BRX|EXIT|RET|CALL|NOP|BSSY|BSYNC|WARPSYNC|DEPBAR|LDGDEPBAR|LDGSTS|UTMA\w+|"
    r"SYNCS\.(ARRIVE|CCTL|EXCH)|MEMBAR|ERRBAR|CCTL\w*|FENCE|WARPGROUP|YIELD|NANOSLEEP|UTMACMDFLUSH|PREEXIT)\b"
)
TWO_PREDICATES = re.compile(r"(U?ISETP|[FDH]SETP\w*|U?PLOP3|HSETP2)\b")


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str | None  # the predicate it is executed under, in this thread
    negated: bool
    opcode: str
    operands: tuple[str, ...]

    @functools.cached_property
    def base(self) -> str:
        return self.opcode.split(".")[0]

    @functools.cached_property
    def parts(self) -> frozenset[str]:
        return frozenset(self.opcode.split(".")[1:])

    @property
    def leaves(self) -> bool:
        """Whether control may go elsewhere after it."""
        return self.base in ("BRA", "BRX", "EXIT", "RET", "CALL")

    @property
    def target(self) -> int:
        return int(self.operands[-1].strip("`()"), 16)

    @functools.cached_property
    def width(self) -> int:
        """Registers of its result."""
        if match := MATRIX.search(self.opcode):
            return int(match[1]) * int(match[2]) // 128  # of a warpgroup
        if self.base in ("LDG", "LDS", "LDC", "ULDC", "LDL", "LD", "ATOM", "ATOMG", "ATOMS"):
            return 4 if "128" in self.parts else 2 if "64" in self.parts else 1
        if self.base == "LDSM":
            return int(self.opcode[-1]) if self.opcode[-2:] in (".2", ".4") else 1
        if self.base == "CS2R":
            return 1 if "32" in self.parts else 2
        if "WIDE" in self.parts or self.base in ("DADD", "DMUL", "DFMA", "DMNMX"):
            return 2
        if (self.base in ("I2F", "F2F") and self.opcode.split(".")[1] == "F64") or (
            self.base == "F2I" and {"S64", "U64"} & self.parts
        ):
            return 2
        return 4 if self.base in ("HMMA", "IMMA", "DMMA") else 1

    @functools.cached_property
    def split(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Its operands: those it writes and those it reads."""
        if WRITE_NOTHING.match(self.opcode):
            return (), self.operands
        if self.base == "R2P":
            return self.operands[:1], self.operands[1:]
        if TWO_PREDICATES.match(self.opcode):
            return self.operands[:2], self.operands[2:]
        count, registers = 0, 0
        for operand in self.operands:
            if re.fullmatch(r"U?P(T|\d)", operand):
                # Predicates may stand before the result, and after it as carries; a source may be one too.
                if registers and self.base not in ("IADD3", "UIADD3", "LEA", "ULEA", "IMAD", "UIMAD"):
                    break
                if registers and ("X" in self.parts and not self._carries_out(count)):
                    break
            elif registers or not re.fullmatch(r"U?R(Z|\d+)(\.\w+)*", operand):
                break
            else:
                registers = 1
            count += 1
        return self.operands[:count], self.operands[count:]

    def _carries_out(self, place: int) -> bool:
        """Whether the predicate at ``place``, right after the result, is one it writes: sources come after it."""
        return any(re.match(r"[-~|]?(U?R|c\[|-?0x)", operand) for operand in self.operands[place + 1 :])

    @functools.cached_property
    def writes(self) -> frozenset[str]:
        found = set()
        for operand in self.split[0]:
            if operand == "PR":
                found |= {f"P{i}" for i in range(7) if int(self.operands[-1], 16) >> i & 1}
            elif match := re.fullmatch(r"(UR|R)(\d+)(\.\w+)*", operand):
                found |= {f"{match[1]}{int(match[2]) + i}" for i in range(self.width)}
            elif operand not in ZERO and re.fullmatch(r"U?P\d", operand):
                found.add(operand)
        return frozenset(found)

    @functools.cached_property
    def reads(self) -> frozenset[str]:
        found = {self.guard} if self.guard and self.guard not in ZERO else set()
        wide = 1
        if (
            "64" in self.parts
            or "WIDE" in self.parts
            or "HI" in self.parts
            or self.base[0] == "D"
            or self.base == "F2F"
        ):
            wide = 2
        if "128" in self.parts or self.base in ("HMMA", "IMMA", "DMMA"):
            wide = 4
        for operand in self.split[1]:
            if operand == "PR":
                found |= {f"P{i}" for i in range(7) if int(self.operands[-1], 16) >> i & 1}
                continue
            found |= {match[0] for match in PREDICATE.finditer(operand)}
            for match in REGISTER.finditer(operand):
                span = 2 if operand[match.end() : match.end() + 3] == ".64" else wide
                found |= {f"{match[1]}{int(match[2]) + i}" for i in range(span)}
        return frozenset(found)


@dataclass
class Block:
    """Instructions that are executed one after the other."""

    instructions: list[Instruction]
    following: list[int] = field(default_factory=list)
    """Blocks that control may go to: by falling through, then by the branch."""


@dataclass
class Code:
    blocks: list[Block]
    starts: dict[int, int]
    """Block of an address."""
    parameters: dict[int, int] = field(default_factory=dict)
    """Offset in constant bank 0 of each argument, by its position in the kernel's signature without constants."""

    @property
    def instructions(self) -> int:
        return sum(len(block.instructions) for block in self.blocks)


def operands_of(text: str) -> tuple[str, ...]:
    found, depth, current = [], 0, ""
    for letter in text:
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and depth == 0:
            found.append(current.strip())
            current = ""
        else:
            current += letter
    found.append(current.strip())
    return tuple(operand.removesuffix(".reuse").replace(".reuse", "") for operand in found if operand)


def parse(text: str) -> Code:
    """The code of one kernel, from the text that cuobjdump prints. Raises ValueError where there is none."""
    instructions = [
        Instruction(int(address, 16), guard or None, bool(negated), opcode, operands_of(operands))
        for address, negated, guard, opcode, operands in LINE.findall(text)
    ]
    while instructions and (
        instructions[-1].base == "NOP"
        or (instructions[-1].base == "BRA" and instructions[-1].target == instructions[-1].address)
    ):
        instructions.pop()  # the filling after the last instruction
    if not instructions:
        raise ValueError("text: expected the disassembly of a kernel, found no instruction")
    heads = {instructions[0].address}
    for instruction, after in zip(instructions, [*instructions[1:], None], strict=True):
        if instruction.leaves and after:
            heads.add(after.address)
        if instruction.base in ("BRA", "CALL"):
            heads.add(instruction.target)
    blocks: list[Block] = []
    starts = {}
    for instruction in instructions:
        if instruction.address in heads:
            starts[instruction.address] = len(blocks)
            blocks.append(Block([]))
        blocks[-1].instructions.append(instruction)
    for number, block in enumerate(blocks):
        last = block.instructions[-1]
        ends = last.base in ("BRA", "EXIT", "RET") and last.guard is None
        if number + 1 < len(blocks) and not ends:
            block.following.append(number + 1)
        if last.base in ("BRA", "CALL"):
            block.following.append(starts[last.target])
    return Code(blocks, starts)


def parameters(elf: str) -> dict[int, int]:
    """Where the arguments lie in constant bank 0, from what cuobjdump prints of the cubin's sections."""
    base = int(re.search(r"EIATTR_PARAM_CBANK\s+Format:\s+\w+\s+Value:\s+0x\w+\s+0x(\w+)", elf)[1], 16) & 0xFFFF
    found = re.findall(r"Ordinal : 0x(\w+)\s+Offset\s+: 0x(\w+)", elf)
    return {int(ordinal, 16): base + int(offset, 16) for ordinal, offset in found}


def disassemble(cubin: bytes) -> Code:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(option: str) -> str:
            return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout

        code = parse(dump("-sass"))
        code.parameters = parameters(dump("-elf"))
    return code
