"""The slot table against plain lists: nothing shared by mistake, nothing lost."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from llamachat.engine.rows import SlotTable

CAPACITY, WIDTH = 24, 3
ROWS = st.integers(0, WIDTH - 1)
APPEND = st.tuples(st.just("append"), ROWS, st.integers(1, 6))
TRUNCATE = st.tuples(st.just("truncate"), ROWS, st.integers(0, CAPACITY))
FORK = st.tuples(st.just("fork"), st.lists(ROWS, min_size=WIDTH, max_size=WIDTH))


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
        n = min(n, CAPACITY - len(self.held))
        if not n:
            return
        new = self.slots.next_slots(n)
        assert not self.held & set(new)
        ids = list(range(self.next_id, self.next_id + n))
        self.next_id += n
        self.slots.append(row, ids, new)
        self.rows[row] += ids
        for i, slot in enumerate(new):  # a key depends on all of the text before it
            self.written[slot] = tuple(self.rows[row][: len(self.rows[row]) - n + i + 1])

    def truncate(self, row: int, length: int) -> None:
        self.slots.truncate(row, length)
        del self.rows[row][length:]

    def fork(self, parents: list[int]) -> None:
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
        free = self.slots.next_slots(n_free) if n_free else []
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
        table.append(0, held, table.next_slots(len(held)))
    n = table.common_prefix(0, asked)
    assert held[:n] == asked[:n]
    assert held[n : n + 1] != asked[n : n + 1] or n == len(held) == len(asked)


def test_slots_of_a_pass_show_in_the_table_before_they_are_taken() -> None:
    table = SlotTable(8)
    table.append(0, [5, 6], table.next_slots(2))
    new = table.next_slots(3)
    assert table.with_slots(0, new)[0, :5].tolist() == table.rows[0].slots + new
    assert table.next_slots(3) == new


def test_slots_are_given_out_in_order_so_that_a_plain_row_is_one_slice() -> None:
    table = SlotTable(8)
    table.append(0, [5, 6, 7, 8], table.next_slots(4))
    table.truncate(0, 1)
    table.append(0, [9, 10], table.next_slots(2))
    assert table.rows[0].slots == [0, 1, 2]
