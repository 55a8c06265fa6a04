"""What the cards can do that the step is counted for, and how much of it a kernel is expected to get.

Sources: [1] NVIDIA H100 data sheet and Hopper architecture white paper (SXM5): 132 multiprocessors, 4 schedulers each,
65,536 registers, 228 KiB of shared memory of which a block gets 227, 64 warps, 32 blocks, 50 MB of L2, 989.4 TFLOP/s
of bf16 at 1.83 GHz, which is 2,048 multiply-adds a cycle and multiprocessor; highest clock 1.98 GHz. [2] NVIDIA H200
data sheet: the same chip with 4.8 TB/s of HBM3e. [3] Loads that hit L2, measured by others (te42kyfo/gpu-benches,
gpu-l2-cache/h200.txt and h100_pcie.txt): 9.5 to 9.9 TB/s over 12 to 37 MB on an H200, 37 bytes a cycle and
multiprocessor at 1.98 GHz; 6.9 TB/s on an H100 PCIe, 34.5 at 1.755 GHz with 114 of them. [A] Assumed, by us.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    name: str
    hbm: float
    """Bytes a second [1, 2]."""
    l2_bytes: int = 35
    """A cycle from L2 to a multiprocessor [3]."""
    multiprocessors: int = 132  # [1]
    schedulers: int = 4  # [1] of a multiprocessor, an instruction of a warp a cycle each
    clock: float = 1.98e9  # [1] the highest: no product heats the chip in the sparse passes
    tensor_clock: float = 1.83e9  # [1] that of the TFLOP/s of the data sheet
    multiply_adds: int = 2048  # [1] of bf16 a cycle and multiprocessor; a quarter with tf32
    registers: int = 65536  # [1]
    shared: int = 233472  # [1] of a multiprocessor
    shared_of_system: int = 1024  # [1] that each block takes besides its own
    warps: int = 64  # [1]
    blocks: int = 32  # [1]

    @property
    def issue(self) -> float:
        """Warp-instructions a second."""
        return self.multiprocessors * self.schedulers * self.clock

    @property
    def l2(self) -> float:
        """Bytes a second from L2 to loads."""
        return self.multiprocessors * self.l2_bytes * self.clock

    @property
    def l2_of_tiles(self) -> float:
        """The same beside tensor cores, whose clock is lower."""
        return self.multiprocessors * self.l2_bytes * self.tensor_clock


CARDS = {card.name: card for card in (Card("h100", 3.35e12), Card("h200", 4.8e12))}


@dataclass(frozen=True)
class Utilisation:
    """The share of each floor that a kernel is expected to reach."""

    issue: float = 0.65  # [A] warps that wait leave slots free; ncu calls it "issue active"
    hbm: float = 0.90  # [A] of what streaming kernels reach on these cards
    l2: float = 0.80  # [A]
    l2_of_tiles: float = 1.0  # [A] what plain loads reached, copies of whole tiles (TMA) should
    tensor: float = 0.80  # [A] 790 of 989 TFLOP/s: cuBLAS, which the power limit holds back


EXPECTED = Utilisation()
# [A] Cycles from one instruction of a warp to the next where no other program fills the gaps: the tail of a long one.
LONE_CYCLES = 2.6
# [A] Seconds a small launch takes on the device with the gap to the next, its bytes aside.
LAUNCH = 2.2e-6


@dataclass(frozen=True)
class Occupancy:
    """What fits a multiprocessor at once. limit: what fills up first."""

    blocks: int
    warps: int
    limit: str


def occupancy(card: Card, warps: int, registers: int, shared: int) -> Occupancy:
    """Of programs of so many warps, registers a thread and bytes of shared memory. Registers go in steps of 8 a thread,
    256 a warp."""
    of_warp = 32 * (-(-registers // 8) * 8)
    fits = {
        "registers": card.registers // (of_warp * warps),
        "shared memory": card.shared // (shared + card.shared_of_system),
        "warps": card.warps // warps,
        "blocks": card.blocks,
    }
    limit = min(fits, key=lambda name: fits[name])
    return Occupancy(fits[limit], fits[limit] * warps, limit)
