"""Cache slots for rows that come and go.

Slots are taken by the page, so that the keys of a row lie side by side. Rows with a common
beginning share the slots of it; a row that has ended is kept while there is room, for the next
prompt that begins like it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

PAGE = 128  # slots: what the native kernels attend to at once


@dataclass(slots=True, eq=False)
class Row:
    """One sequence.

    Attributes:
        index: of its line in the table.
        ids: what was run.
        slots: of each id.
        pages: that its slots lie in.
        open: the page that it takes slots from; no other row does.
        block: of the row, that the page is for.
    """

    index: int
    ids: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    pages: set[int] = field(default_factory=set)
    open: int | None = None
    block: int = -1


class SlotPool:
    """Pages of slots, and the rows over them.

    Attributes:
        n_pages: of `PAGE` slots each.
        table: (B, length) int32; the first entries of a line are the slots of its row.
        rows: those in use.
        kept: those that have ended, the least recently used first; dropped when room is short.
    """

    def __init__(self, n_pages: int, length: int, width: int) -> None:
        self.n_pages = n_pages
        self.table = torch.zeros((width, length), dtype=torch.int32)
        self.rows: list[Row] = []
        self.kept: list[Row] = []
        self._lines = list(range(width - 1, -1, -1))
        self._free = list(range(n_pages - 1, -1, -1))
        self._uses = [0] * n_pages

    @property
    def n_free(self) -> int:
        """Pages that no row uses."""
        return len(self._free)

    def begin(self, ids: Sequence[int], unbroken: Callable[[Sequence[int]], int]) -> Row:
        """A row that holds as much of the beginning of `ids` as any row does, but not all.

        Args:
            ids: a prompt.
            unbroken: how many of a row's ids can be shared only together.
        """
        best, length, ids = None, 0, list(ids)
        for row in (*self.kept, *self.rows):
            common = min(common_prefix(row.ids, ids), len(ids) - 1)
            if common > length and common >= max(unbroken(ids), unbroken(row.ids)):
                best, length = row, common
        if best is not None and best in self.kept:
            self.kept.remove(best)
            if length == len(best.ids) or not (self._lines or self.kept):
                self._copy(best, best, length)
                self.rows.append(best)
                return best
            self.kept.append(best)  # as the last to be dropped
        new = self.new()
        if best is not None:
            self._copy(best, new, length)
        return new

    def fork(self, rows: Sequence[Row], parents: Sequence[int]) -> list[Row]:
        """Row i becomes what rows[parents[i]] was, for as many rows as there are parents."""
        new = [*rows[: len(parents)], *(self.new() for _ in parents[len(rows) :])]
        old = [Row(row.index, row.ids, row.slots, row.pages) for row in rows]
        lines = self.table[[row.index for row in rows]] if len(rows) > 1 else None
        for row in old:
            self._hold(row.pages)
        for i, parent in enumerate(parents):
            if i != parent:
                self._copy(old[parent], new[i], len(old[parent].ids), lines, parent)
        for row in old:
            self._release(row.pages)
        for row in rows[len(parents) :]:
            self.drop(row)
        return new

    def extend(self, row: Row, ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """Take slots for the next ids of a row: their positions, and the slots."""
        start = len(row.ids)
        positions = list(range(start, start + len(ids)))
        slots = []
        for position in positions:
            if row.block != position // PAGE:
                self._open(row, position // PAGE)
            assert row.open is not None
            slots.append(row.open * PAGE + position % PAGE)
        self._adopt(row)
        row.ids += ids
        row.slots += slots
        if len(ids) == 1:  # each step comes here: no tensor for one number
            self.table[row.index, start] = slots[0]
        else:
            self.table[row.index, start : start + len(ids)] = torch.tensor(slots)
        return positions, slots

    def keep(self, row: Row) -> None:
        """The row has ended."""
        self.rows.remove(row)
        self.kept.append(row)

    def drop(self, row: Row) -> None:
        """Forget a row."""
        (self.rows if row in self.rows else self.kept).remove(row)
        self._clear(row)
        self._lines.append(row.index)

    def new(self) -> Row:
        """A row that holds nothing."""
        if not self._lines:
            self.drop(self.kept[0])
        row = Row(self._lines.pop())
        self.rows.append(row)
        return row

    def _copy(
        self,
        source: Row,
        to: Row,
        length: int,
        lines: torch.Tensor | None = None,
        line: int = 0,
    ) -> None:
        """Let a row begin as another; it goes on in pages of its own."""
        ids, slots = source.ids[:length], source.slots[:length]
        pages = set(source.pages) if length == len(source.ids) else {s // PAGE for s in slots}
        self._hold(pages)
        self._release(to.pages)
        if length < len(to.ids):  # what it took of its page may be in use
            self._close(to)
        to.ids, to.slots, to.pages = ids, slots, pages
        of_source = self.table[source.index] if lines is None else lines[line]
        self.table[to.index, :length] = of_source[:length]

    def _open(self, row: Row, block: int) -> None:
        self._close(row)
        while not self._free:
            self.drop(self.kept[0])
        row.open, row.block = self._free.pop(), block
        self._hold((row.open,))
        self._adopt(row)

    def _adopt(self, row: Row) -> None:
        """The open page is one that slots of the row lie in."""
        if row.open is not None and row.open not in row.pages:
            row.pages.add(row.open)
            self._hold((row.open,))

    def _close(self, row: Row) -> None:
        if row.open is not None:
            self._release((row.open,))
        row.open, row.block = None, -1

    def _clear(self, row: Row) -> None:
        self._release(row.pages)
        self._close(row)

    def _hold(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._uses[page] += 1

    def _release(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._uses[page] -= 1
            if not self._uses[page]:
                self._free.append(page)


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids both begin with."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low
