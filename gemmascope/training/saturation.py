"""When L0 no longer answers to λ, told from the rows that `SAETrainer.report` gives in the course of a training.

λ acts on L0 through the threshold's straight-through gradient alone, and that is a sum over the entries in the window
|z − θ| < ε/2. Where hardly any entry lies there, or θ has come to rest, no λ brings L0 to where it should be.
"""

import math
from collections.abc import Mapping, Sequence

from ..checks import check_type

FIGURES = ("step", "l0", "l0_coefficient", "lr", "window", "threshold")
# Rows to judge by, and the share of all steps so far that they must span: over less of them a slow descent looks flat.
ROWS, SPAN = 8, 0.25
# An L0 is off its target beyond the first; it comes nearer when the gap shrinks by the second over the rows.
MISSED, NEARER = 0.15, 0.05
# Over the rows λ rises by at least the first, without L0 falling by the second.
RISE, FALL = 0.25, 0.02
# The window is empty with less than that share of the entries; θ creeps, or is at rest, when it moves by less than the
# others of itself. Through a window nearly as empty θ still found its place in trials, as long as it moved.
EMPTY, CREEPS, AT_REST = 2e-3, 2e-2, 1e-3
# Beyond such a change of the learning rate in the meantime, θ may move or rest for that reason.
STEADY = 0.5


def saturated(rows: Sequence[Mapping[str, float]]) -> str | None:
    """Why L0 no longer answers to λ, as a sentence of figures; None while it does or nothing can be said yet.

    rows: those of one SAE, oldest first, with ``step``. Only the last `SPAN` of its steps count, of which there must be
    `ROWS` rows. It is said, and only while the learning rate is steady, when θ is at rest, or creeps and the window is
    empty, and

    * with a ``target_l0`` and λ at its end: L0 is more than 15 % off the target and comes no nearer;
    * while λ rises, unless L0 is at its target or below: L0 does not fall.

    So an SAE that a small λ leaves above its target, with a window that is full, is none of these.
    """
    check_type("rows", rows, Sequence)
    found = _last(rows)
    if len(found) < ROWS:
        return None
    first, last = found[: len(found) // 3], found[-(len(found) // 3) :]
    rates = [row["lr"] for row in found]
    window, moved = _mean(found, "window"), abs(_mean(last, "threshold") / (_mean(first, "threshold") or 1) - 1)
    if min(rates) < STEADY * max(rates) or moved >= (CREEPS if window < EMPTY else AT_REST):
        return None
    before, l0, target = _mean(first, "l0"), _mean(last, "l0"), found[-1].get("target_l0")
    what = f"{window:.2%} of the entries lie in the window below θ, and θ moved by {moved:.2%}"
    since = f"since step {found[0]['step']:g}"
    rise = found[-1]["l0_coefficient"] / found[0]["l0_coefficient"] - 1 if found[0]["l0_coefficient"] > 0 else 0.0
    if rise >= RISE and l0 > (1 - FALL) * before and (target is None or l0 > (1 + MISSED) * target):
        return f"L0 went from {before:.1f} to {l0:.1f} {since} while λ rose by {rise:.0%}: {what}"
    if target is None or rise:
        return None
    gap, gap_before = abs(l0 - target), abs(before - target)
    if gap > MISSED * target and gap > (1 - NEARER) * gap_before:
        return f"L0 went from {before:.1f} to {l0:.1f} {since}, its target is {target:g}: {what}"
    return None


def _last(rows: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """Rows of finite figures in the last `SPAN` of the steps, and the one before those; none if they span less."""
    found: list[Mapping[str, float]] = []
    for row in reversed(rows):
        if any(row[name] is None or not math.isfinite(row[name]) for name in FIGURES):
            continue
        found.append(row)
        if row["step"] <= (1 - SPAN) * found[0]["step"]:
            return found[::-1]
    return []


def _mean(rows: Sequence[Mapping[str, float]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


class History:
    """Rows of one SAE for `saturated`: every so many-th, so that there are never more than 64."""

    LIMIT = 64

    def __init__(self):
        self.rows: list[dict[str, float]] = []
        self._seen, self._stride = 0, 1

    def add(self, row: Mapping[str, float]) -> None:
        """The next row of `SAETrainer.report`."""
        if self._seen % self._stride == 0:
            self.rows.append(dict(row))
        self._seen += 1
        if len(self.rows) == self.LIMIT:
            self.rows, self._stride = self.rows[::2], 2 * self._stride
