"""What a dense training step should take, by arithmetic, to stand beside the sparse one.

    5 products of 2·N·d·F operations + bytes an entry of [N, F] + Adam, copies and projection of 2·d·F weights

In plain PyTorch, bf16 products, fused Adam with its first moment: 54 bytes an entry of elementwise passes in eager
mode, 12 compiled; a weight costs 28 bytes in Adam and 6 in copies, one of W_dec 28 in projection and norm, 14
compiled. notes/2026-11-23-what-should-a-training-step-cost-on-a-gpu.md has the figures for 2304 x 16384.
"""

from bench.aot.cards import EXPECTED, Card, Utilisation
from bench.aot.lists import Case

ENTRY_BYTES = {"dense eager": 54, "dense compiled": 12}
ROW_BYTES = {"dense eager": 28, "dense compiled": 14}


def dense(case: Case, card: Card, share: Utilisation = EXPECTED) -> dict[str, float]:
    """Seconds of each."""
    product = case.tokens * case.d * case.F / (card.multiprocessors * card.multiply_adds * card.tensor_clock)
    weights = case.d * case.F
    found = {}
    for name, entry in ENTRY_BYTES.items():
        moved = entry * case.tokens * case.F + (28 + 6) * 2 * weights + ROW_BYTES[name] * weights
        found[name] = 5 * product / share.tensor + moved / card.hbm / share.hbm
    return found
