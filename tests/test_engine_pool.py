"""Rows that come and go over pages of slots, against plain lists: nothing shared by mistake."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamachat.engine.pool import PAGE, Row, SlotPool, common_prefix

WIDTH, LENGTH, LANES = 12, 4 * PAGE, 3
N_PAGES = WIDTH * LANES * 5
SIZES = (1, 1, 2, PAGE // 2, PAGE - 1, PAGE, PAGE + 3)


def keys(text: list[int]) -> list[int]:
    """What is in the slot of each id: it depends on all of the text before."""
    return [*accumulate(text, lambda before, token: hash((before, token)))]


@dataclass
class Checked:
    """A pool, groups of its rows with the texts that they should hold, and what was written."""

    pool: SlotPool = field(default_factory=lambda: SlotPool(N_PAGES, LENGTH, WIDTH))
    groups: list[tuple[list[Row], list[list[int]]]] = field(default_factory=list)
    written: dict[int, int] = field(default_factory=dict)
    next_id: int = 0

    def new_ids(self, n: int) -> list[int]:
        self.next_id += n
        return list(range(self.next_id - n, self.next_id))

    def begin(self, which: int, n: int) -> None:
        if sum(len(rows) for rows, _ in self.groups) + 1 > WIDTH - LANES:
            return
        texts = [row.ids for row in (*self.pool.rows, *self.pool.kept)] or [[]]
        shared = texts[which % len(texts)][: n * 2]
        prompt = [*shared, *self.new_ids(1)]
        row = self.pool.begin(prompt, lambda _: 0)
        assert len(row.ids) == len(shared)
        self.groups.append(([row], [list(shared)]))

    def extend(self, which: int, n: int) -> None:
        if not self.groups:
            return
        rows, texts = self.groups[which % len(self.groups)]
        row, text = rows[which % len(rows)], texts[which % len(rows)]
        ids = self.new_ids(min(n, LENGTH - len(text)))
        if ids:
            positions, slots = self.pool.extend(row, ids)
            assert positions == list(range(len(text), len(text) + len(ids)))
            text += ids
            for slot, key in zip(slots, keys(text)[positions[0] :], strict=True):
                self.written[slot] = key

    def fork(self, which: int, parents: list[int]) -> None:
        others = sum(len(rows) for rows, _ in self.groups)
        if self.groups and others + LANES <= WIDTH:
            which %= len(self.groups)
            rows, texts = self.groups[which]
            parents = [parent % len(rows) for parent in parents]
            self.groups[which] = (
                self.pool.fork(rows, parents),
                [list(texts[parent]) for parent in parents],
            )

    def keep(self, which: int, _: int) -> None:
        if self.groups:
            for row in self.groups.pop(which % len(self.groups))[0]:
                self.pool.keep(row)

    def drop(self, which: int, _: int) -> None:
        if self.groups:
            for row in self.groups.pop(which % len(self.groups))[0]:
                self.pool.drop(row)

    def check(self) -> None:
        for rows, texts in self.groups:
            assert [row.ids for row in rows] == texts
        for row in (*self.pool.rows, *self.pool.kept):
            assert self.pool.table[row.index, : len(row.ids)].tolist() == row.slots
            assert [self.written[slot] for slot in row.slots] == keys(row.ids)
        indices = [row.index for row in (*self.pool.rows, *self.pool.kept)]
        assert len(set(indices)) == len(indices)


@pytest.mark.parametrize("seed", range(6))
def test_each_row_holds_its_own_text_whatever_others_do(seed: int) -> None:
    checked, rng = Checked(), random.Random(seed)
    for _ in range(120):
        which = rng.randrange(10)
        match rng.choice(["begin", "extend", "extend", "extend", "fork", "fork", "keep", "drop"]):
            case "fork":
                parents = [rng.randrange(10) for _ in range(rng.randint(1, LANES))]
                checked.fork(which, parents)
            case action:
                getattr(checked, action)(which, rng.choice(SIZES))
        checked.check()
    while checked.groups:
        checked.drop(0, 0)
    for row in [*checked.pool.kept]:
        checked.pool.drop(row)
    assert checked.pool.n_free == N_PAGES


def test_the_slots_of_a_row_lie_side_by_side_though_others_grow_with_it() -> None:
    pool = SlotPool(8, 4 * PAGE, 2)
    rows = [pool.new(), pool.new()]
    for token in range(PAGE):
        for row in rows:
            pool.extend(row, [token])
    for row in rows:
        first = row.slots[0]
        assert first % PAGE == 0
        assert row.slots == list(range(first, first + PAGE))


def test_the_least_recently_used_row_is_dropped_when_pages_run_short() -> None:
    pool = SlotPool(3, 4 * PAGE, 4)
    for n in range(3):
        row = pool.new()
        pool.extend(row, [100 * n, 1, 2])
        pool.keep(row)
    pool.drop(pool.begin([0, 1, 7], lambda _: 0))  # the first is used again
    pool.extend(pool.new(), [5])
    assert [row.ids[0] for row in pool.kept] == [200, 0]


def test_a_row_that_a_prompt_begins_with_goes_on_in_place() -> None:
    pool = SlotPool(4, 4 * PAGE, 2)
    row = pool.new()
    pool.extend(row, [1, 2, 3])
    pool.keep(row)
    assert pool.begin([1, 2, 3, 4], lambda _: 0) is row
    assert not pool.kept


def test_a_beginning_that_must_stay_whole_is_not_cut() -> None:
    pool = SlotPool(4, 4 * PAGE, 3)
    row = pool.new()
    pool.extend(row, [1, 2, 3])
    pool.keep(row)
    assert pool.begin([1, 2, 9, 9], lambda _: 3).ids == []


@given(st.lists(st.integers(0, 1)), st.lists(st.integers(0, 1)))
def test_the_common_prefix_is_found(one: list[int], other: list[int]) -> None:
    n = common_prefix(one, other)
    assert one[:n] == other[:n]
    assert n in (len(one), len(other)) or one[n] != other[n]


def test_a_row_that_takes_a_longer_text_overwrites_nothing_of_its_old_one() -> None:
    pool = SlotPool(8, 4 * PAGE, 4)
    one, other, third = pool.fork([pool.new()], [0, 0, 0])
    pool.extend(one, list(range(20)))
    pool.extend(other, list(range(PAGE + 5)))
    one, other, third = pool.fork([one, other, third], [1, 1, 0])
    _, taken = pool.extend(one, [7])
    assert not {*taken} & {*third.slots, *other.slots}
