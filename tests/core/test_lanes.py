"""Which of the changes that wait may be delivered now."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walstream.keys import WHOLE_TABLE, Key
from walstream.lanes import Entry, Lanes


def keys(names: str) -> tuple[Key, ...]:
    """``ab`` stands for two keys, ``*`` for a whole table."""
    return tuple(("t", WHOLE_TABLE if name == "*" else name.encode()) for name in names)


def lanes_of(*items: str) -> Lanes[str]:
    """Items are called by their keys and a number, such as ``a1``."""
    lanes: Lanes[str] = Lanes()
    for item in items:
        lanes.add(item, keys(item.rstrip("0123456789")))
    return lanes


def items(entries: list[Entry[str]]) -> list[str]:
    return [entry.item for entry in entries]


def test_changes_of_one_key_come_one_after_another_and_others_meanwhile() -> None:
    lanes = lanes_of("a1", "a2", "b1")
    first = lanes.take() + lanes.take()
    assert items(first) == ["a1", "b1"]
    assert (lanes.take(), lanes.ready, lanes.waiting, len(lanes)) == ([], 0, 1, 3)
    lanes.done(first[:1])
    assert items(lanes.take()) == ["a2"]


def test_a_batch_has_changes_of_one_key_in_their_order() -> None:
    lanes = lanes_of("a1", "b1", "a2", "b2", "a3")
    taken = lanes.take(4)
    assert items(taken) == ["a1", "b1", "a2", "a3"]
    assert lanes.take() == []
    lanes.done(taken)
    assert items(lanes.take(4)) == ["b2"]


def test_a_change_of_two_keys_waits_for_both_and_holds_up_both() -> None:
    lanes = lanes_of("a1", "b1", "ab1", "a2", "b2")
    a, b = lanes.take() + lanes.take()
    lanes.done([a])
    assert lanes.ready == 0
    lanes.done([b])
    [both] = lanes.take()
    assert (both.item, lanes.ready) == ("ab1", 0)
    lanes.done([both])
    assert items(lanes.take(2)) == ["a2", "b2"]


def test_a_batch_leaves_out_what_waits_for_another_change_too() -> None:
    lanes = lanes_of("a1", "b1", "ab1")
    assert items(lanes.take(1)) == ["a1"]
    assert items(lanes.take(5)) == ["b1"]


def test_a_change_of_one_key_twice_is_one_of_it() -> None:
    lanes = lanes_of("aa1", "aa2", "a1")
    for expected in ["aa1", "aa2", "a1"]:
        [entry] = lanes.take()
        assert entry.item == expected
        lanes.done([entry])
    assert len(lanes) == 0


def test_a_change_of_the_whole_table_is_alone() -> None:
    lanes = lanes_of("a1", "*1", "*2", "b1", "c1")
    first = lanes.take(9)
    assert items(first) == ["a1"]
    lanes.done(first)
    for expected in ["*1", "*2"]:
        barrier = lanes.take(9)
        assert items(barrier) == [expected]
        assert lanes.take(9) == []
        lanes.done(barrier)
    assert items(lanes.take(9)) == ["b1", "c1"]


def test_what_comes_while_a_whole_table_is_in_hand_waits() -> None:
    lanes = lanes_of("*1")
    barrier = lanes.take()
    lanes.add("a1", keys("a"))
    assert lanes.take() == []
    lanes.done(barrier)
    assert items(lanes.take()) == ["a1"]


def test_nothing_is_remembered_of_what_is_done() -> None:
    lanes = lanes_of("a1", "ab1", "*1", "b1")
    while len(lanes):
        lanes.done(lanes.take())
    assert not lanes._last
    assert not lanes._ready
    assert not lanes._behind


@pytest.mark.parametrize("limit", [1, 3])
def test_a_key_with_many_changes_does_not_starve_others(limit: int) -> None:
    lanes = lanes_of(*[f"a{number}" for number in range(100)], "b1")
    seen: list[str] = []
    while "b1" not in seen:
        taken = lanes.take(limit)
        seen += items(taken)
        lanes.done(taken)
    assert len(seen) <= 2 * limit


KEYS = st.sampled_from(["a", "b", "c", "d", "ab", "ba", "bc", "cd", "aa", "*", "*a"])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), KEYS),
        st.tuples(st.just("take"), st.integers(1, 4)),
        st.tuples(st.just("done"), st.integers(0, 9)),
    ),
    max_size=60,
)


class Watched:
    """Lanes, and what they promise, looked at after every step."""

    def __init__(self) -> None:
        self.lanes: Lanes[int] = Lanes()
        self.keys: list[str] = []
        self.batches: list[list[Entry[int]]] = []
        self.began: list[int] = []

    def add(self, names: str) -> None:
        self.lanes.add(len(self.keys), keys(names))
        self.keys.append(names)

    def take(self, limit: int) -> None:
        batch = self.lanes.take(limit)
        numbers = [entry.item for entry in batch]
        assert len(batch) <= limit
        assert numbers == sorted(numbers)
        others = [entry.item for one in self.batches for entry in one]
        assert not any(self.in_conflict(one, other) for one in numbers for other in others)
        if any("*" in self.keys[one] for one in numbers):
            assert len(numbers + others) == 1
        # All before it that it conflicts with have begun, and are done or in this very batch.
        self.began += numbers
        for one in numbers:
            before = [other for other in range(one) if self.in_conflict(one, other)]
            assert set(before) <= set(self.began)
        if batch:
            self.batches.append(batch)
        else:
            assert self.lanes.ready == 0

    def done(self, choice: int) -> None:
        if self.batches:
            self.lanes.done(self.batches.pop(choice % len(self.batches)))

    def in_conflict(self, one: int, other: int) -> bool:
        if "*" in self.keys[one] + self.keys[other]:
            return True
        return not set(self.keys[one]).isdisjoint(self.keys[other])

    def verify_counts(self) -> None:
        in_hand = sum(len(batch) for batch in self.batches)
        assert self.lanes.waiting == len(self.keys) - len(self.began)
        assert len(self.lanes) == self.lanes.waiting + in_hand
        if not self.batches:  # whoever waits, waits for somebody
            assert bool(self.lanes.ready) == bool(len(self.lanes))


@given(STEPS)
def test_order_per_key_is_kept_and_nothing_is_lost(steps: list[tuple[str, int | str]]) -> None:
    watched = Watched()
    for step, value in steps:
        match step, value:
            case "add", str(names):
                watched.add(names)
            case "take", int(limit):
                watched.take(limit)
            case _, int(choice):
                watched.done(choice)
        watched.verify_counts()
    while watched.batches or watched.lanes.ready:
        watched.take(3)
        watched.done(0)
        watched.verify_counts()
    assert sorted(watched.began) == list(range(len(watched.keys)))
    assert len(watched.lanes) == 0
    assert not watched.lanes._last
