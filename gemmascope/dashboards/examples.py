"""`Slots`: of each of many groups of examples the first few by a priority, kept while they stream by."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .table import Examples

# Elements of windows that are moved at once.
MOVED = 1 << 22


class Items(NamedTuple):
    """Examples without a place yet, [n] each: group int64, row and position int64, value fp32."""

    group: Tensor
    row: Tensor
    position: Tensor
    value: Tensor

    def __getitem__(self, which) -> "Items":  # type: ignore[override]
        return Items(*(part[which] for part in self._asdict().values()))


Priority = Callable[[Items], Tensor]
Windows = Callable[[Tensor], Tensor]


class Slots:
    """``slots`` places for each of ``groups`` groups, taken by the items of smallest ``priority`` int64, in its order.

    Of equal priorities the one that came first stays. What is held depends on the items alone, not on how they are
    parted into calls of `merge`.
    """

    def __init__(self, groups: int, slots: int, window: int, priority: Priority):
        self.priority = priority
        empty = {"dtype": torch.int32, "device": "cpu"}
        numbers = {"dtype": torch.float32, "device": "cpu"}
        self.held = Examples(
            torch.full((groups, slots), -1, **empty),
            torch.full((groups, slots), -1, **empty),
            torch.zeros(groups, slots, **numbers),
            torch.zeros(groups, slots, window, **numbers),
        )

    @property
    def slots(self) -> int:
        return self.held.row.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.held)

    def merge(self, items: Items, windows: Windows) -> None:
        """Add ``items``. windows: of some of them by their numbers, fp32 [n, window]."""
        may = self._may_enter(items).nonzero().squeeze(1)
        may = may[items.group[may].sort(stable=True).indices]
        touched, counts = items.group[may].unique_consecutive(return_counts=True)
        ends = counts.cumsum(0)
        step = max(1, MOVED // (self.slots * self.held.window.shape[2]))
        for first in range(0, len(touched), step):
            groups = touched[first : first + step]
            start = int(ends[first - 1]) if first else 0
            self._merge(groups, may[start : int(ends[first + len(groups) - 1])], items, windows)

    def _may_enter(self, items: Items) -> Tensor:
        """Which items are before the last that is held of their group, or find a place free."""
        last = self._held_at(items.group, torch.full_like(items.group, self.slots - 1))
        return (last.row < 0) | (self.priority(items) < self.priority(last))

    def _held_at(self, groups: Tensor, slots: Tensor) -> Items:
        row, position, value, _ = self.held
        return Items(groups, row[groups, slots].long(), position[groups, slots].long(), value[groups, slots])

    def _merge(self, groups: Tensor, numbers: Tensor, items: Items, windows: Windows) -> None:
        """Of ``groups``, ascending, the items ``numbers``."""
        local, slot = self.held.row[groups].ge(0).nonzero(as_tuple=True)
        before = self._held_at(groups[local], slot)
        both = Items(*(torch.cat(parts) for parts in zip(before, items[numbers], strict=True)))
        order = self.priority(both).sort(stable=True).indices
        order = order[both.group[order].sort(stable=True).indices]
        group = torch.searchsorted(groups, both.group[order])
        starts = torch.searchsorted(group, torch.arange(len(groups), dtype=torch.int64, device="cpu"))
        rank = torch.arange(len(order), dtype=torch.int64, device="cpu") - starts[group]
        stays = rank < self.slots
        order, group, rank = order[stays], group[stays], rank[stays]
        window = torch.empty(len(order), self.held.window.shape[2], dtype=torch.float32, device="cpu")
        old = order < len(local)
        window[old] = self.held.window[groups[local[order[old]]], slot[order[old]]]
        window[~old] = windows(numbers[order[~old] - len(local)])
        self.clear(groups)
        at = (groups[group], rank)
        row, position, value = both.row[order].int(), both.position[order].int(), both.value[order]
        for held, new in zip(self.held, (row, position, value, window), strict=True):
            held[at] = new

    def clear(self, groups: Tensor) -> None:
        for held, nothing in zip(self.held, (-1, -1, 0, 0), strict=True):
            held[groups] = nothing

    def take(self, groups: Tensor) -> tuple[Items, Tensor]:
        """What ``groups`` hold, and their windows; they are empty afterwards."""
        local, slot = self.held.row[groups].ge(0).nonzero(as_tuple=True)
        items, windows = self._held_at(groups[local], slot), self.held.window[groups[local], slot]
        self.clear(groups)
        return items, windows


def by_value(items: Items) -> Tensor:
    """The priority by which the largest value, > 0, comes first."""
    return -items.value.view(torch.int32).long()  # the bits of positive floats ascend as they do
