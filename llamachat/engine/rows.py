"""Which cache slots hold which tokens, row by row.

Truncating, forking and reordering change this table, never keys or values: a prompt shared by
several rows is stored once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch


@dataclass(slots=True)
class Row:
    """Ids of one sequence, in order, and the slot of each."""

    ids: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)

    def __add__(self, other: Row) -> Row:
        return Row(self.ids + other.ids, self.slots + other.slots)

    def cut(self, length: int) -> Row:
        """Take off, and return, what follows the first `length` tokens."""
        rest = Row(self.ids[length:], self.slots[length:])
        del self.ids[length:], self.slots[length:]
        return rest


class SlotTable:
    """Rows over `capacity` slots.

    What a fork leaves in common to all rows is their trunk. It is held once, so that the next fork
    costs what differs, however long the prompt.

    Attributes:
        capacity: slots of the cache.
        table: (B, capacity) int32; the first entries of a row are its slots.
    """

    def __init__(self, capacity: int, width: int = 1) -> None:
        self.capacity = capacity
        self.table = torch.zeros((width, capacity), dtype=torch.int32)
        self._trunk = Row()
        self._tails = [Row() for _ in range(width)]
        self._free = list(range(capacity - 1, -1, -1))  # the lowest last

    @property
    def rows(self) -> list[Row]:
        """The sequences, whole."""
        return [self._trunk + tail for tail in self._tails]

    def ids(self, row: int) -> list[int]:
        """Those of one row."""
        return self._trunk.ids + self._tails[row].ids

    @property
    def width(self) -> int:
        """Rows there are."""
        return len(self._tails)

    @property
    def n_free(self) -> int:
        """Slots that no row uses."""
        return len(self._free)

    def reserve(self, rows: Sequence[int]) -> tuple[list[int], list[int]]:
        """Positions and slots that the next tokens of `rows`, one for each entry, would take.

        The table already shows them, as a pass over these tokens needs it. They are not taken
        until `append`.
        """
        assert 0 < len(rows) <= len(self._free)
        slots = self._free[: -len(rows) - 1 : -1]
        ends = [len(self._trunk.ids) + len(tail.ids) for tail in self._tails]
        positions = []
        for row in rows:
            positions.append(ends[row])
            ends[row] += 1
        if len(rows) == 1:  # each step of one row comes here: no tensor for one number
            self.table[rows[0], positions[0]] = slots[0]
        else:
            at = torch.tensor([rows, positions, slots])
            self.table[at[0], at[1]] = at[2].int()
        return positions, slots

    def append(self, rows: Sequence[int], ids: Sequence[int]) -> None:
        """Take what `reserve` gave for the same `rows`, or the first of it: it holds `ids` now."""
        for row, token in zip(rows, ids, strict=True):
            self._tails[row].ids.append(token)
            self._tails[row].slots.append(self._free.pop())

    def truncate(self, row: int, length: int) -> None:
        """Forget the row's tokens from `length` on."""
        common = self._trunk.cut(length)
        self._tails = [common + tail for tail in self._tails]
        dropped = self._tails[row].cut(length - len(self._trunk.ids))
        self._release(dropped.slots)

    def fork(self, parents: Sequence[int]) -> None:
        """Row i becomes what row parents[i] was, for as many rows as there are parents."""
        old = self._tails
        self._tails = [Row() + old[parent] for parent in parents]
        index = torch.tensor(parents)
        if len(parents) != len(old):
            self.table = self.table[index]
        else:
            start = len(self._trunk.ids)
            end = start + max(len(tail.ids) for tail in old)
            self.table[:, start:end] = self.table[index, start:end]
        self._release(slot for tail in old for slot in tail.slots)
        self._extend_trunk()

    def common_prefix(self, row: int, ids: Sequence[int]) -> int:
        """How many of `ids` the row begins with."""
        held = self.ids(row)
        shorter = min(len(held), len(ids))
        for i in range(shorter):
            if held[i] != ids[i]:
                return i
        return shorter

    def _extend_trunk(self) -> None:
        """Move what all tails begin with to the trunk."""
        n_common = 0
        for slots in zip(*(tail.slots for tail in self._tails), strict=False):
            if len(set(slots)) > 1:
                break
            n_common += 1
        rests = [tail.cut(n_common) for tail in self._tails]
        self._trunk.ids += self._tails[0].ids
        self._trunk.slots += self._tails[0].slots
        self._tails = rests

    def _release(self, slots: Iterable[int]) -> None:
        """Free those of `slots` that no tail uses any more."""
        used = {slot for tail in self._tails for slot in tail.slots}
        self._free.extend(set(slots) - used)
        self._free.sort(reverse=True)
