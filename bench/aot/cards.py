"""What the cards can do that the step is counted for, and how much of it a kernel is expected to get.

Sources: [1] NVIDIA H100 data sheet and Hopper architecture white paper (SXM5): 132 multiprocessors, 4 schedulers each,
65,536 registers, 228 KiB of shared memory of which a block gets 227, 64 warps, 32 blocks, 50 MB of L2, 989.4 TFLOP/s
of bf16 at 1.83 GHz, which is 2,048 multiply-adds a cycle and multiprocessor; highest clock 1.98 GHz. [2] NVIDIA H200
data sheet: the same chip with 4.8 TB/s of HBM3e. [3] Not documented by NVIDIA: what others measured, loads that hit.
[A] Assumed, by us.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    name: str
    hbm: float
    """Bytes a second [1, 2]."""
    l2_bytes: int = 50_000_000  # [1]
    l2: float = 5.5e12
    """Bytes a second from L2 to threads that load [3]."""
    tile_bytes: int = 64
    """Bytes a cycle from L2 to a multiprocessor, which copies of whole tiles (TMA) come near to [3]."""
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


CARDS = {card.name: card for card in (Card("h100", 3.35e12), Card("h200", 4.8e12))}


@dataclass(frozen=True)
class Utilisation:
    """The share of each floor that a kernel is expected to reach."""

    issue: float = 0.65  # [A] warps that wait leave slots free; ncu calls it "issue active"
    hbm: float = 0.90  # [A] of what streaming kernels reach on these cards
    l2: float = 0.80  # [A]
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
