"""The slot table against plain lists: nothing shared by mistake, nothing lost."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from llamachat.engine.rows import SlotTable

CAPACITY, WIDTH = 24, 3
ROWS = st.integers(0, WIDTH - 1)
APPEND = st.tuples(st.just("append"), ROWS, st.integers(1, 6))
TRUNCATE = st.tuples(st.just("truncate"), ROWS, st.integers(0, CAPACITY))
FORK = st.tuples(st.just("fork"), st.lists(ROWS, min_size=1, max_size=WIDTH + 2))


class Checked:
    """A slot table, the same rows as plain lists, and what was last written to each slot."""

    def __init__(self) -> None:
        self.slots = SlotTable(CAPACITY, WIDTH)
        self.rows: list[list[int]] = [[] for _ in range(WIDTH)]
        self.written: dict[int, tuple[int, ...]] = {}
        self.next_id = 0

    @property
    def held(self) -> set[int]:
        return {slot for row in self.slots.rows for slot in row.slots}

    def append(self, row: int, n: int) -> None:
        row %= len(self.rows)
        n = min(n, CAPACITY - len(self.held))
        if not n:
            return
        rows = [row] * n
        positions, new = self.slots.reserve(rows)
        assert positions == list(range(len(self.rows[row]), len(self.rows[row]) + n))
        assert not self.held & set(new)
        ids = list(range(self.next_id, self.next_id + n))
        self.next_id += n
        self.slots.append(rows, ids)
        self.rows[row] += ids
        for i, slot in enumerate(new):  # a key depends on all of the text before it
            self.written[slot] = tuple(self.rows[row][: len(self.rows[row]) - n + i + 1])

    def truncate(self, row: int, length: int) -> None:
        row %= len(self.rows)
        self.slots.truncate(row, length)
        del self.rows[row][length:]

    def fork(self, parents: list[int]) -> None:
        parents = [parent % len(self.rows) for parent in parents]
        self.slots.fork(parents)
        self.rows = [list(self.rows[parent]) for parent in parents]

    def check(self) -> None:
        for expected, row, table in zip(
            self.rows, self.slots.rows, self.slots.table.tolist(), strict=True
        ):
            assert row.ids == expected
            assert table[: len(expected)] == row.slots
            prefixes = [tuple(expected[: i + 1]) for i in range(len(expected))]
            assert [self.written[slot] for slot in row.slots] == prefixes
        n_free = CAPACITY - len(self.held)
        assert self.slots.n_free == n_free
        assert self.slots.width == len(self.rows)
        if n_free:
            _, free = self.slots.reserve([0] * n_free)
            assert sorted([*self.held, *free]) == list(range(CAPACITY))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(APPEND, TRUNCATE, FORK), max_size=25))
def test_a_slot_holds_the_text_of_every_row_that_names_it(steps: list[tuple[object, ...]]) -> None:
    table = Checked()
    for name, *arguments in steps:
        getattr(table, str(name))(*arguments)
        table.check()


@given(st.lists(st.integers(0, 2), max_size=8), st.lists(st.integers(0, 2), max_size=8))
def test_the_common_prefix_is_as_long_as_both_agree(held: list[int], asked: list[int]) -> None:
    table = SlotTable(8)
    if held:
        append(table, held)
    n = table.common_prefix(0, asked)
    assert held[:n] == asked[:n]
    assert held[n : n + 1] != asked[n : n + 1] or n == len(held) == len(asked)


def append(table: SlotTable, ids: list[int]) -> None:
    table.reserve([0] * len(ids))
    table.append([0] * len(ids), ids)


def test_slots_of_a_pass_show_in_the_table_before_they_are_taken() -> None:
    table = SlotTable(8)
    append(table, [5, 6])
    _, new = table.reserve([0, 0, 0])
    assert table.table[0, :5].tolist() == table.rows[0].slots + new
    assert table.reserve([0, 0, 0])[1] == new


def test_tokens_of_several_rows_take_their_places_in_one_pass() -> None:
    table = SlotTable(8)
    append(table, [5, 6])
    table.fork([0, 0])
    positions, slots = table.reserve([1, 0, 1])
    assert (positions, slots) == ([2, 2, 3], [2, 3, 4])
    table.append([1, 0, 1], [7, 8, 9])
    assert [row.ids for row in table.rows] == [[5, 6, 8], [5, 6, 7, 9]]
    assert [row.slots for row in table.rows] == [[0, 1, 3], [0, 1, 2, 4]]
    assert table.table[:, :4].tolist() == [[0, 1, 3, table.table[0, 3]], [0, 1, 2, 4]]


def test_slots_are_given_out_in_order_so_that_a_plain_row_is_one_slice() -> None:
    table = SlotTable(8)
    append(table, [5, 6, 7, 8])
    table.truncate(0, 1)
    append(table, [9, 10])
    assert table.rows[0].slots == [0, 1, 2]
