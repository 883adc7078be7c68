"""Which cache slots hold which tokens, row by row.

Truncating, forking and reordering change this table, never keys or values: a prompt shared by
several rows is stored once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True)
class Row:
    """The ids of one sequence, in order, and the slot of each."""

    ids: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)


class SlotTable:
    """Rows over `capacity` slots.

    Attributes:
        capacity: slots of the cache.
        rows: the sequences.
        table: (B, capacity) int32 on `device`; the first len(ids) entries of a row are its slots.
    """

    def __init__(self, capacity: int, width: int = 1, device: torch.device | str = "cpu") -> None:
        self.capacity = capacity
        self.rows = [Row() for _ in range(width)]
        self.table = torch.zeros((width, capacity), dtype=torch.int32, device=device)
        self._free = list(range(capacity - 1, -1, -1))  # the lowest last
        self._uses = [0] * capacity

    def next_slots(self, n: int) -> list[int]:
        """The slots that the next n tokens would take. Nothing is taken until `append`."""
        assert 0 < n <= len(self._free)
        return self._free[: -n - 1 : -1]

    def append(self, row: int, ids: Sequence[int], slots: Sequence[int]) -> None:
        """Ids whose keys and values now are in `slots`, which came from `next_slots`."""
        start = len(self.rows[row].ids)
        assert len(ids) == len(slots)
        assert list(slots) == self.next_slots(len(slots))
        del self._free[len(self._free) - len(slots) :]
        for slot in slots:
            self._uses[slot] = 1
        self.rows[row].ids.extend(ids)
        self.rows[row].slots.extend(slots)
        self._write(row, start)

    def truncate(self, row: int, length: int) -> None:
        """Forget the row's tokens from `length` on."""
        self._release(self.rows[row].slots[length:])
        del self.rows[row].ids[length:], self.rows[row].slots[length:]

    def fork(self, parents: Sequence[int]) -> None:
        """Row i becomes what row parents[i] was; slots are shared, not copied."""
        assert len(parents) == len(self.rows)
        old, self.rows = self.rows, [
            Row(list(self.rows[p].ids), list(self.rows[p].slots)) for p in parents
        ]  # fmt: skip
        for row in self.rows:
            for slot in row.slots:
                self._uses[slot] += 1
        for row in old:
            self._release(row.slots)
        self.table = self.table[torch.tensor(parents, device=self.table.device)]

    def common_prefix(self, row: int, ids: Sequence[int]) -> int:
        """How many of `ids` the row begins with."""
        held = self.rows[row].ids
        shorter = min(len(held), len(ids))
        for i in range(shorter):
            if held[i] != ids[i]:
                return i
        return shorter

    def with_slots(self, row: int, slots: Sequence[int]) -> Tensor:
        """The table as it is once `slots` are appended: what a pass over them attends to."""
        self._write_at(row, len(self.rows[row].slots), slots)
        return self.table

    def _write(self, row: int, start: int) -> None:
        self._write_at(row, start, self.rows[row].slots[start:])

    def _write_at(self, row: int, start: int, slots: Sequence[int]) -> None:
        if len(slots) == 1:  # each step of decoding comes here: no tensor for one number
            self.table[row, start] = slots[0]
            return
        fresh = torch.tensor(slots, dtype=torch.int32, device=self.table.device)
        self.table[row, start : start + len(slots)] = fresh

    def _release(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self._uses[slot] -= 1
        self._free.extend(slot for slot in slots if not self._uses[slot])
        self._free.sort(reverse=True)
