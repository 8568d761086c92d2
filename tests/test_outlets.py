"""Kinds of handlers: batches, whole transactions, lanes, models, messages; how each one ends."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Final

import pydantic
import pytest
from structlog.testing import capture_logs

from tests import postgres
from tests.lines import QUICK, SIZE_BYTES, Line, Recorder, called, handler
from walstream import worker
from walstream.acknowledger import Acknowledger
from walstream.backoff import Backoff
from walstream.calls import NotRun, Slot
from walstream.changes import Change
from walstream.delivery import Limits
from walstream.destinations import Handler, Item
from walstream.errors import (
    DecodeError,
    HandlerFailed,
    TargetUnavailable,
    TransactionBroken,
)
from walstream.lsn import Lsn
from walstream.policy import FailurePolicy, OnFailure
from walstream.router import Route, TablePattern
from walstream.typed import RowModel
from walstream.worker import Worker

FOREVER: Final = 3600.0
SKIP: Final = FailurePolicy(2, None, QUICK.backoff, OnFailure.SKIP)


class Gate:
    """Async calls that wait until they are let through, by name."""

    def __init__(self, *closed: str) -> None:
        self.closed = set(closed)
        self.entered: list[str] = []
        self.left: list[str] = []
        self._moved = asyncio.Event()

    async def __call__(self, item: Item | list[Item]) -> None:
        name = " ".join(map(called, item if isinstance(item, list) else [item]))
        self.entered.append(name)
        self._moved.set()
        await self.until(lambda: name not in self.closed)
        self.left.append(name)
        self._moved.set()

    def open(self, *names: str) -> None:
        """Let calls through; all without a name."""
        self.closed -= set(names or self.closed)
        self._moved.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                self._moved.clear()
                await self._moved.wait()
                self._moved.set()  # others wait too
                await asyncio.sleep(0)


# ---- Batches


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_a_batch_is_a_list_of_changes_of_several_transactions(kind: str) -> None:
    recorder = Recorder()
    function = recorder.in_loop if kind == "async" else recorder.in_thread
    line = Line(handler(function, batch=3))
    line.commit("a b", "c d", "e f g")
    await line.deliver()
    assert recorder.calls == ["a b c", "d e f", "g"]
    assert (line.taken, line.counts.delivered) == (300, 7)


async def test_a_batch_waits_for_more_and_is_called_when_it_is_full() -> None:
    gate = Gate()
    line = Line(handler(gate, batch=3, linger_seconds=FOREVER))
    line.commit("a")
    async with line.session():
        await asyncio.sleep(0)
        line.commit("b")
        line.hand()
        await asyncio.sleep(0)
        assert gate.entered == []
        line.commit("c d")
        line.hand()
        await gate.until(lambda: len(gate.left) == 1)
        assert gate.left == ["a b c"]
    assert gate.left == ["a b c", "d"]


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_a_batch_that_is_not_full_is_called_after_its_time(concurrency: int) -> None:
    gate = Gate()
    line = Line(handler(gate, batch=9, linger_seconds=0.01, concurrency=concurrency))
    line.commit("a", "b")
    async with line.session():
        await gate.until(lambda: len(gate.left) == 1)
        assert gate.left == ["a b"]


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("ending", ["finish", "stop", "calls only", "full"])
async def test_a_batch_does_not_wait_for_what_cannot_come(concurrency: int, ending: str) -> None:
    gate = Gate()
    limits = Limits(max_in_flight_changes=3) if ending == "full" else Limits()
    destination = handler(gate, batch=9, linger_seconds=FOREVER, concurrency=concurrency)
    line = Line(destination, limits=limits)
    line.commit("a", "b")
    async with asyncio.timeout(5), line.session() as running:
        await asyncio.sleep(0)
        match ending:
            case "stop":
                line.delivery.begin_no_more()
            case "calls only":
                line.delivery.finish(calls_only=True)
                await running
            case "full":
                line.commit("c")
                line.hand()
                await gate.until(lambda: len(gate.left) == 1)
    expected = {"finish": ["a b"], "full": ["a b c"]}
    assert gate.left == expected.get(ending, [])


async def test_lanes_fill_one_batch_and_not_one_for_each_worker() -> None:
    gate = Gate()
    line = Line(handler(gate, batch=4, linger_seconds=FOREVER, concurrency=3))
    async with line.session():
        for name in "abcdefgh":
            line.commit(name)
            line.hand()
            await asyncio.sleep(0)
        await gate.until(lambda: len(gate.left) == 2)
    assert gate.left == ["a b c d", "e f g h"]


# ---- Whole transactions


async def test_a_transaction_is_collected_until_its_commit() -> None:
    gate = Gate()
    other = Gate()
    one, another = handler(gate, transactions=True), handler(other, "other")
    line = Line(one, another)
    async with line.session():
        line.send("a b")
        line.send("x", to=another)
        line.hand()
        await other.until(lambda: other.left == ["x"])
        assert (gate.entered, line.delivery.in_flight) == ([], 0)
        line.send("c")
        line.hand()
        line.close()
        line.hand()  # nothing but the commit
        await gate.until(lambda: gate.left == ["a b c"])
        line.send("x", to=another)
        line.commit("", "d", "e f")
    assert gate.left == ["a b c", "d", "e f"]
    assert line.taken == 400


async def test_the_next_transaction_completes_the_one_before() -> None:
    recorder = Recorder()
    line = Line(handler(recorder.in_loop, transactions=True))
    line.commit("a b", "c", "d e")
    await line.deliver()
    assert recorder.calls == ["a b", "c", "d e"]


async def test_a_transaction_that_has_not_come_completely_is_not_called_for() -> None:
    recorder = Recorder()
    line = Line(handler(recorder.in_loop, transactions=True))
    line.commit("a")
    line.send("b c")
    await line.deliver()
    assert (recorder.calls, line.taken) == (["a"], 100)


async def test_a_transaction_may_be_larger_than_what_may_be_in_flight() -> None:
    """The reader does not wait for room that only the rest of the transaction makes."""
    recorder = Recorder()
    limits = Limits(max_in_flight_changes=2)
    line = Line(handler(recorder.in_loop, transactions=True), limits=limits)
    async with line.session():
        for name in "abcde":
            assert not line.delivery.is_full
            line.send(name)
            line.hand()
        line.close()
    assert recorder.calls == ["a b c d e"]


@pytest.mark.parametrize("bound", ["changes", "bytes"])
async def test_a_transaction_that_is_too_large_stops_the_stream(bound: str) -> None:
    recorder = Recorder()
    if bound == "changes":
        line = Line(handler(recorder.in_loop, transactions=True, max_transaction_changes=3))
    else:
        limits = Limits(max_in_flight_bytes=3 * SIZE_BYTES)
        line = Line(handler(recorder.in_loop, transactions=True), limits=limits)
    line.commit("a b c", "d e f g", "h")
    with pytest.raises(HandlerFailed, match="in its only attempt: TransactionTooLarge") as failed:
        await line.deliver()
    assert "take batches" in failed.value.hint
    assert (recorder.calls, line.taken) == (["a b c"], 100)


async def test_a_transaction_that_is_too_large_can_be_skipped() -> None:
    """Also what comes of it after it was found to be too large."""
    recorder = Recorder()
    line = Line(handler(recorder.in_loop, transactions=True, max_transaction_changes=2))
    line = Line(line.first, policy=SKIP)
    with capture_logs() as logs:
        async with line.session():
            line.commit("a")
            line.send("b c d")
            line.hand()
            line.send("e f")
            line.hand()
            line.send("g")
            await postgres.async_wait_until(lambda: line.delivery.in_flight == 0)
            line.hand()
            line.close()
            line.commit("h")
    assert recorder.calls == ["a", "h"]
    assert (line.counts.skipped, line.counts.delivered, line.taken) == (6, 2, 300)
    skipped = [one for one in logs if one["event"] == "change_skipped"]
    assert sum(one["changes"] for one in skipped) == 6
    assert len(skipped) < 6


async def test_a_transaction_that_fails_is_skipped_as_a_whole() -> None:
    recorder = Recorder(b=[ValueError()] * 9)
    line = Line(handler(recorder.in_loop, transactions=True), policy=SKIP)
    line.commit("a b", "c")
    await line.deliver()
    assert recorder.calls == ["a b", "a b", "c"]
    assert (line.counts.skipped, line.taken) == (2, 200)


# ---- Lanes


class Crew:
    """Calls of random duration, and how many there were at a time."""

    def __init__(self) -> None:
        self.at_a_time = self.most = 0
        self.order: dict[str, list[str]] = defaultdict(list)
        self.began: list[str] = []
        self.inside: set[str] = set()
        self._lock = threading.Lock()

    def begin(self, items: list[Item]) -> None:
        with self._lock:
            self.at_a_time += 1
            self.most = max(self.most, self.at_a_time)
            names = {called(item) for item in items}
            assert names.isdisjoint(self.inside), "two calls of one key"
            assert not ("*" in names and self.inside), "something beside a truncate"
            assert "*" not in self.inside, "something beside a truncate"
            self.inside |= names
            for item in items:
                self.began.append(item.id)
                self.order[called(item)].append(item.id)

    def end(self, items: list[Item]) -> None:
        with self._lock:
            self.at_a_time -= 1
            self.inside -= {called(item) for item in items}

    async def in_loop(self, item: Any) -> None:
        items = item if isinstance(item, list) else [item]
        self.begin(items)
        try:
            for _ in range(random.randrange(4)):  # noqa: S311 - any duration
                await asyncio.sleep(0)
        finally:
            self.end(items)

    def in_thread(self, item: Any) -> None:
        items = item if isinstance(item, list) else [item]
        self.begin(items)
        try:
            time.sleep(random.random() / 2000)  # noqa: S311 - any duration
        finally:
            self.end(items)


@pytest.mark.parametrize("kind", ["async", "sync"])
@pytest.mark.parametrize("batch", [0, 5])
async def test_lanes_keep_the_order_of_each_key(kind: str, batch: int) -> None:
    """Never more calls at a time than are allowed, and a truncate is alone."""
    crew = Crew()
    function = crew.in_loop if kind == "async" else crew.in_thread
    options: dict[str, Any] = {"batch": batch, "linger_seconds": 0.0} if batch else {}
    line = Line(handler(function, concurrency=4, **options))
    names = [*"abcdefghij"]
    sent: dict[str, list[str]] = defaultdict(list)
    async with line.session():
        for _ in range(60):
            wanted = random.choices(names, k=random.randrange(1, 9))  # noqa: S311
            if random.random() < 0.1:  # noqa: S311
                wanted.append("*")
            line.send(" ".join(wanted))
            for _, item, _, _ in line.handed:
                sent[called(item)].append(item.id)
            line.close()
            line.hand()
            await asyncio.sleep(0)
    assert crew.order == sent
    assert 1 < crew.most <= 4
    assert line.taken == line.end
    assert line.delivery.in_flight == 0


async def test_a_change_of_key_waits_for_both_rows_and_holds_up_both() -> None:
    gate = Gate("a", "b", "a>b")
    line = Line(handler(gate, concurrency=4))
    line.commit("a b a>b c", "a", "b")
    async with line.session():
        await gate.until(lambda: gate.left == ["c"])
        assert sorted(gate.entered) == ["a", "b", "c"]
        gate.open("a")
        await gate.until(lambda: gate.left == ["c", "a"])
        assert len(gate.entered) == 3
        gate.open("b")
        await gate.until(lambda: len(gate.entered) == 4)
        assert gate.entered[-1] == "a>b"
        gate.open()
    assert sorted(gate.left[4:]) == ["a", "b"]
    assert line.taken == 300


async def test_the_position_waits_for_the_slowest_key() -> None:
    gate = Gate("a")
    line = Line(handler(gate, concurrency=2))
    line.commit("a", "b", "c")
    async with line.session():
        await gate.until(lambda: gate.left == ["b", "c"])
        assert line.taken == 0
        gate.open()
        await gate.until(lambda: len(gate.left) == 3)
    assert line.taken == 300


async def test_other_columns_make_the_lanes() -> None:
    """None of these rows has a status: each change could be about any row."""
    crew = Crew()
    line = Line(handler(crew.in_loop, concurrency=4, key=("status",)))
    line.commit("a b c d")
    await line.deliver()
    assert crew.most == 1


async def test_lanes_that_fail_for_good_let_the_calls_in_hand_finish() -> None:
    gate = Gate("a")

    async def fail(change: Change) -> None:
        await gate(change)
        if called(change) == "b":
            raise ValueError

    line = Line(handler(fail, concurrency=2), policy=FailurePolicy(1))
    line.commit("a", "b", "c", "d")

    async def open_later() -> None:
        async with line.session():
            await gate.until(lambda: "b" in gate.left)
            await asyncio.sleep(0)
            gate.open()

    with pytest.raises(HandlerFailed, match="0/C8:1"):
        await open_later()
    assert sorted(gate.left) == ["a", "b"]
    assert line.taken == 100


async def test_lanes_that_fail_for_good_do_not_wait_for_a_call_that_hangs() -> None:
    gate = Gate("a")

    async def fail(change: Change) -> None:
        await gate(change)
        raise ValueError

    limits = Limits(drain_seconds=0.01)
    line = Line(handler(fail, concurrency=2), policy=FailurePolicy(1), limits=limits)
    line.commit("a", "b")
    with pytest.raises(HandlerFailed, match="0/C8:1"):
        async with asyncio.timeout(5):
            await line.deliver()


async def test_lanes_that_fail_for_good_do_not_wait_for_pauses_of_others() -> None:
    recorder = Recorder(a=[ValueError()] * 9, b=[NotRun("no")])
    slow = FailurePolicy(9, None, Backoff(FOREVER, FOREVER))
    line = Line(handler(recorder.in_loop, concurrency=2), policy=slow)
    line.commit("a", "b")
    with pytest.raises(HandlerFailed):
        async with asyncio.timeout(5):
            await line.deliver()


# ---- Models, visible rows, messages


class Order(pydantic.BaseModel):
    id: str = pydantic.Field(max_length=1)

    @pydantic.field_validator("id")
    @classmethod
    def _breaks(cls, value: str) -> str:
        if value == "?":
            raise KeyError(value)
        return value


MODEL: Final = RowModel(Order)
OPTIONS: Final[dict[str, dict[str, Any]]] = {
    "async": {},
    "sync": {},
    "lanes": {"concurrency": 2, "batch": 9},
    "batch": {"batch": 9},
    "transactions": {"transactions": True},
}


@pytest.mark.parametrize("kind", ["async", "sync", "lanes", "batch"])
async def test_rows_come_as_models(kind: str) -> None:
    rows: list[Any] = []

    def take(one: Any) -> None:
        rows.extend(change.row for change in (one if isinstance(one, list) else [one]))

    async def take_in_loop(one: Any) -> None:
        take(one)

    options = OPTIONS[kind]
    function = take if kind == "sync" else take_in_loop
    line = Line(handler(function, model=MODEL, **options))
    line.commit("a b")
    await line.deliver()
    assert rows == [Order(id="a"), Order(id="b")]


@pytest.mark.parametrize("bad", ["zz", "?"])
@pytest.mark.parametrize("kind", ["async", "sync", "lanes", "batch", "transactions"])
@pytest.mark.parametrize("policy", [QUICK, SKIP], ids=["stop", "skip"])
async def test_a_row_that_does_not_fit_its_model_follows_the_policy(
    kind: str, bad: str, policy: FailurePolicy
) -> None:
    """Without another attempt; what came before is delivered. So when a validator breaks."""
    recorder = Recorder()
    options = OPTIONS[kind]
    function = recorder.in_thread if kind == "sync" else recorder.in_loop
    line = Line(handler(function, model=MODEL, **options), policy=policy)
    line.commit("a", f"b {bad} c", "d")
    if policy is SKIP:
        await line.deliver()
        whole = kind == "transactions"
        assert " ".join(recorder.calls) == ("a d" if whole else "a b c d")
        assert (line.counts.skipped, line.taken) == (3 if whole else 1, 300)
    else:
        error = "RowInvalid: a row of public.orders" if bad == "zz" else "KeyError at "
        with pytest.raises(HandlerFailed, match=f"0/C8:2 in its only attempt: {error}") as failed:
            await line.deliver()
        assert bad not in failed.value.message.partition("attempt")[2].replace("outlets", "")
        assert " ".join(recorder.calls) == ("a" if kind == "transactions" else "a b")
        assert line.taken == 100
    assert line.counts.retries == 0


@pytest.mark.parametrize("kind", ["async", "sync", "lanes", "batch", "transactions"])
async def test_changes_are_held_until_their_transaction_is_visible(kind: str) -> None:
    seen: list[str] = []
    visible = asyncio.Event()

    async def wait(xid: int) -> None:
        seen.append(f"asked {xid}")
        if xid == 200:
            await visible.wait()

    recorder = Recorder()
    options = {**OPTIONS[kind], "batch": int(kind == "batch")}
    function = recorder.in_thread if kind == "sync" else recorder.in_loop
    line = Line(handler(function, visible=True, **options), wait_until_visible=wait)
    line.commit("a", "b", "c")
    async with line.session():
        await postgres.async_wait_until(lambda: "asked 200" in seen and "a" in recorder.calls)
        assert "b" not in recorder.calls
        visible.set()
    assert sorted(recorder.calls) == ["a", "b", "c"]
    assert sorted(seen) == ["asked 100", "asked 200", "asked 300"]


async def test_the_changes_of_a_transaction_are_asked_about_once() -> None:
    asked: list[int] = []

    async def wait(xid: int) -> None:
        asked.append(xid)

    line = Line(handler(Recorder().in_loop, visible=True), wait_until_visible=wait)
    line.commit("a b c", "d")
    await line.deliver()
    assert asked == [100, 200]


@pytest.mark.parametrize("options", [{}, {"visible": True}, {"model": MODEL}, {"concurrency": 3}])
async def test_messages_are_delivered(options: dict[str, Any]) -> None:
    """In their order per prefix; those outside of transactions are visible at once."""
    recorder = Recorder(b=[ValueError()])

    async def never(xid: int) -> None:
        raise AssertionError

    line = Line(handler(recorder.in_loop, **options), wait_until_visible=never)
    for content in "abc":
        line.message(content)
    await line.deliver()
    assert recorder.calls == ["a", "b", "b", "c"]
    assert line.taken == 300


# ---- Destinations by themselves


async def test_a_destination_that_is_slow_holds_up_others_only_when_too_much_is_in_flight() -> None:
    slow, quick = Gate("a"), Gate()
    one, other = handler(slow, "slow"), handler(quick, "quick")
    line = Line(one, other, limits=Limits(max_in_flight_changes=23))
    async with line.session():
        line.commit("a", to=one)
        for number in range(20):
            line.commit(f"q{number}", to=other)
            line.hand()
            await quick.until(lambda number=number: len(quick.left) == number + 1)  # type: ignore[misc]
        assert (line.delivery.in_flight, line.delivery.is_full, line.taken) == (1, False, 0)
        line.commit("b", "c", to=one)
        line.hand()
        assert line.delivery.is_full
        room = asyncio.create_task(line.delivery.wait_for_change())
        await asyncio.sleep(0)
        assert not room.done()
        slow.open()
        await asyncio.wait_for(room, 5)
    assert (slow.left, line.taken) == (["a", "b", "c"], line.end)


async def test_a_destination_that_is_tried_again_does_not_hold_up_others() -> None:
    failing = Recorder(a=[ValueError()] * 2)
    quick = Gate()
    one, other = handler(failing.in_loop, "failing"), handler(quick, "quick")
    policy = FailurePolicy(3, None, Backoff(0.02, 0.02))
    line = Line(one, other, policies={one: policy})
    line.commit("a", to=one)
    line.commit("b", "c", to=other)
    async with line.session():
        await quick.until(lambda: quick.left == ["b", "c"])
        assert failing.calls == ["a"]
        assert line.taken == 0
    assert (failing.calls, line.taken) == (["a"] * 3, 300)


async def test_counts_of_destinations_with_one_name_are_added() -> None:
    one, other = handler(Recorder().in_loop, "same"), handler(Recorder().in_loop, "same")
    line = Line(one, other)
    line.commit("a b", to=one)
    line.commit("c", to=other)
    await line.deliver()
    assert line.counts.delivered == 3


async def test_a_handler_that_never_waits_lets_others_have_the_loop() -> None:
    for options in ({}, {"model": MODEL}, {"concurrency": 2}, {"transactions": True}, {"batch": 1}):
        recorder = Recorder()
        line = Line(handler(recorder.in_loop, **options))
        for _ in range(30):
            line.commit(*["a"] * 100)
        async with line.session() as running:
            turns = 0
            while line.taken < line.end:
                assert not running.done()
                turns += 1
                await asyncio.sleep(0)
        assert turns > 2, options


# ---- The end

KINDS: Final[dict[str, dict[str, Any]]] = {
    "plain": {},
    "unit": {"visible": True},
    "batch": {"batch": 2, "linger_seconds": 0.0},
    "lanes": {"concurrency": 2},
    "transactions": {"transactions": True},
}


@pytest.mark.parametrize("kind", KINDS)
async def test_a_stop_finishes_what_is_begun_and_begins_nothing_else(kind: str) -> None:
    """Also changes of a begun transaction that come after the stop."""
    gate = Gate("a", "a b")
    line = Line(handler(gate, **KINDS[kind]))
    line.send("a b")
    async with line.session():
        if kind == "transactions":
            line.close()
            line.hand()
        await gate.until(lambda: bool(gate.entered))
        line.delivery.begin_no_more()
        if kind != "transactions":
            line.commit("c")
        line.commit("x y")
        line.hand()
        gate.open()
    names = sorted(" ".join(gate.left).split())
    assert names == (["a", "b"] if kind == "transactions" else ["a", "b", "c"])
    assert (line.taken, line.delivery.in_flight) == (100, 0)


@pytest.mark.parametrize("kind", [*KINDS, "sync"])
async def test_only_calls_in_hand_are_finished_when_that_is_asked_for(kind: str) -> None:
    entered, opened = threading.Event(), threading.Event()
    calls: list[str] = []

    def hold(change: Change) -> None:
        calls.append(called(change))
        entered.set()
        opened.wait(10)

    gate = Gate("a", "b", "a b")
    destination = handler(hold) if kind == "sync" else handler(gate, **KINDS[kind])
    line = Line(destination)
    line.commit("a b", "a c")
    in_hand = 2 if kind == "lanes" else 1
    async with line.session() as running:
        await postgres.async_wait_until(lambda: entered.is_set() or len(gate.entered) == in_hand)
        line.delivery.finish(calls_only=True)
        await asyncio.sleep(0)
        assert not running.done()
        gate.open()
        opened.set()
        await running
    whole = kind in ("batch", "transactions")
    names = [*calls, *gate.left]
    assert sorted(names) == (["a b"] if whole else ["a", "b"] if kind == "lanes" else ["a"])
    assert line.taken == (100 if whole or kind == "lanes" else 0)
    assert line.counts.delivered == len(" ".join(names).split())


@pytest.mark.parametrize("kind", [*KINDS, "lanes of batches"])
async def test_a_stop_cuts_attempts_short_and_lets_go_of_the_rest(kind: str) -> None:
    """There is room at once, for the reader that is in the middle of the transaction."""
    recorder = Recorder(a=[ValueError()] * 9)
    options = {"concurrency": 2, "batch": 2, "linger_seconds": 0.0}
    slow = FailurePolicy(9, None, Backoff(FOREVER, FOREVER))
    line = Line(
        handler(recorder.in_loop, **KINDS.get(kind, options)),
        policy=slow,
        limits=Limits(max_in_flight_changes=4),
    )
    line.commit("a a a a")
    async with asyncio.timeout(5), line.session():
        await postgres.async_wait_until(lambda: line.counts.retries == 1)
        was_full = line.delivery.is_full
        line.delivery.begin_no_more()
        await postgres.async_wait_until(lambda: line.delivery.in_flight == 0)
        line.commit("a b c d e f")
        line.hand()
        assert (was_full, line.delivery.is_full) == (True, False)
    assert len(recorder.calls) == 1
    assert line.taken == 0


@pytest.mark.parametrize("kind", [*KINDS, "sync"])
async def test_what_is_cancelled_in_the_middle_comes_again_in_the_next_session(kind: str) -> None:
    calls: list[str] = []
    entered, opened = threading.Event(), threading.Event()

    def hold(change: Change) -> None:
        calls.append(called(change))
        entered.set()
        opened.wait(10)

    gate = Gate("a", "a b", "b")
    destination = handler(hold) if kind == "sync" else handler(gate, **KINDS[kind])
    line = Line(destination)
    line.commit("a b", "c")
    async with line.session() as running:
        await postgres.async_wait_until(lambda: entered.is_set() or bool(gate.entered))
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert len(asyncio.all_tasks()) == 1
    assert line.taken == 0
    is_sync = kind == "sync"
    assert (line.delivery.held is not None, line.delivery.is_busy) == (is_sync, is_sync)
    gate.open()
    opened.set()
    line.acknowledger = Acknowledger(Lsn(0))
    line.end = 0
    line.commit("a b", "c")
    await line.deliver()
    assert line.taken == 200
    names = calls or gate.left
    assert sorted(" ".join(names).split()) == ["a", *(["a"] if is_sync else []), "b", "c"]
    line.delivery.close()


async def test_a_session_waits_for_all_sync_calls_that_the_last_one_left() -> None:
    opened = threading.Event()
    inside: list[str] = []

    def hold(change: Change) -> None:
        inside.append(called(change))
        opened.wait(10)

    line = Line(handler(hold, concurrency=3))
    line.commit("a", "b", "c", "d")
    async with line.session() as running:
        await postgres.async_wait_until(lambda: len(inside) == 3)
        running.cancel()
        await asyncio.wait([running])
    was_busy = line.delivery.is_busy
    line.acknowledger, line.end = Acknowledger(Lsn(0)), 0
    line.commit("a", "b", "c", "d")
    async with line.session():
        await asyncio.sleep(0)
        assert len(inside) == 3
        opened.set()
    assert sorted(inside[3:]) == ["a", "b", "c", "d"]
    await postgres.async_wait_until(lambda: not line.delivery.is_busy)
    assert was_busy
    line.delivery.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_handler_may_stop_the_stream(kind: str) -> None:
    """The call in hand is taken."""
    calls = []

    async def stop(one: Any) -> None:
        calls.append(one)
        line.delivery.begin_no_more()
        line.delivery.finish()

    line = Line(handler(stop, **KINDS[kind]))
    line.commit("a", "a", "a", "a")
    await line.deliver()
    assert len(calls) == 1
    assert line.taken == (200 if kind == "batch" else 100)


async def test_a_sink_that_cancels_itself_has_failed() -> None:
    class Cancelling:
        name = "cancelling"
        calls = 0

        async def open(self) -> None:
            """Nothing to make ready."""

        async def close(self) -> None:
            """Nothing to let go."""

        async def take(self, changes: Sequence[Change]) -> None:
            self.calls += 1
            if self.calls == 1:
                raise asyncio.CancelledError

    sink = Cancelling()
    line = Line(sink)
    line.commit("a")
    await line.deliver()
    assert (sink.calls, line.taken) == (2, 100)


# ---- Transactional


class Target:
    """A database that records what was applied, in memory; away as often as it is told."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.recorded: set[str] = set()
        self.runs = 0

    async def open(
        self,
        *,
        systemid: str,
        flush_lsn: Lsn,
        timeline: int | None = None,
        history: Sequence[tuple[int, Lsn]] = (),
    ) -> None:
        """Nothing to make ready."""

    def _new(self, items: Sequence[Item]) -> list[Item]:
        self.runs += 1
        if self.failures:
            raise self.failures.pop(0)
        return [item for item in items if item.id not in self.recorded]

    async def run(
        self, items: Sequence[Item], call: Callable[[list[Item], Any], Coroutine[Any, Any, None]]
    ) -> int:
        new = self._new(items)
        if new:
            await call(new, self)
        self.recorded |= {item.id for item in new}
        return len(items) - len(new)

    def run_sync(self, items: Sequence[Item], call: Callable[[list[Item], Any], None]) -> int:
        new = self._new(items)
        if new:
            call(new, self)
        self.recorded |= {item.id for item in new}
        return len(items) - len(new)

    async def close(self) -> None:
        """Nothing to let go."""


def transactional(
    recorder: Recorder, target: Target, *, sync: bool = False, **options: Any
) -> tuple[Handler, dict[str, Any]]:
    async def apply(one: Any, connection: Any) -> None:
        assert connection is target
        recorder.note(one)

    def apply_in_thread(one: Any, connection: Any) -> None:
        assert connection is target
        recorder.note(one)

    destination = handler(apply_in_thread if sync else apply, transactional="dbname=x", **options)
    return destination, {"targets": {destination: target}}


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("batch", [0, 5])
async def test_a_target_that_is_away_is_waited_for(*, sync: bool, batch: int) -> None:
    """It is nobody's fault: no attempt is used up."""
    target = Target(*[TargetUnavailable("away")] * 9)
    recorder = Recorder(a=[ValueError()])
    options = {"batch": batch, "linger_seconds": 0.0} if batch else {}
    destination, more = transactional(recorder, target, sync=sync, **options)
    line = Line(destination, policy=FailurePolicy(2, 5.0, QUICK.backoff), **more)
    line.commit("a", "b")
    with capture_logs() as logs:
        await line.deliver()
    assert line.taken == 200
    assert line.counts.retries == 10
    attempts = [one["attempt"] for one in logs if one["event"] == "delivery_retried"]
    assert attempts == [0] * 9 + [1]


async def test_a_target_that_is_away_costs_no_change_of_a_batch_its_delivery() -> None:
    """Although each is delivered by itself, because one of them fails."""
    away = TargetUnavailable("away")
    recorder = Recorder(b=[ValueError(), ValueError(), away, ValueError()])
    destination, more = transactional(recorder, Target(), batch=3)
    line = Line(destination, policy=SKIP, **more)
    line.commit("a b c")
    await line.deliver()
    assert recorder.calls == ["a b c", "a b c", "a", "b", "b", "c"]
    assert (line.counts.delivered, line.counts.skipped) == (2, 1)


@pytest.mark.parametrize("sync", [False, True])
async def test_what_was_applied_before_is_counted(*, sync: bool) -> None:
    target = Target()
    recorder = Recorder()
    destination, more = transactional(recorder, target, sync=sync)
    line = Line(destination, **more)
    target.recorded = {"0/64:1", "0/64:2"}
    line.commit("a b c")
    await line.deliver()
    assert recorder.calls == ["c"]
    assert (line.counts.delivered, line.counts.redelivered) == (3, 2)


async def test_a_handler_that_breaks_its_transaction_is_not_called_again() -> None:
    recorder = Recorder(a=[TransactionBroken("ended", hint="leave it")] * 9)
    destination, more = transactional(recorder, Target())
    line = Line(destination, **more)
    line.commit("a")
    with pytest.raises(HandlerFailed, match="TransactionBroken: ended") as failed:
        await line.deliver()
    assert recorder.calls == ["a"]
    assert failed.value.hint.startswith("leave it")


# ---- Stuck handlers


async def sleeping_deep(gate: Gate, change: Change) -> None:
    await gate(change)


async def generating(gate: Gate, change: Change) -> AsyncIterator[None]:
    await gate(change)
    yield


HERE: Final = Path(__file__)


@pytest.mark.parametrize("kind", [*KINDS, "model"])
async def test_a_call_that_lasts_too_long_is_told_once_with_its_stack(kind: str) -> None:
    gate = Gate("a", "a b")

    async def outer(one: Any) -> None:
        await sleeping_deep(gate, one)

    options = {"model": MODEL} if kind == "model" else KINDS[kind]
    line = Line(handler(outer, **options), limits=Limits(stuck_after_seconds=60))
    line.commit("a b")
    with capture_logs() as logs:
        async with line.session():
            await gate.until(lambda: bool(gate.entered))
            now = time.monotonic()
            for later in (1, 59, 61, 62, 1000):
                line.delivery.watch(now + later)
                assert line.delivery.is_stuck is (later > 60)
            gate.open()
            await gate.until(lambda: len(gate.left) > 0)
        line.delivery.watch(now + 1000)
        assert not line.delivery.is_stuck
        line.delivery.watch(now + 1000)
    [stuck, moves] = [one for one in logs if one["event"].startswith("handler_")]
    assert stuck["event"] == "handler_stuck"
    assert stuck["destination"] == "handler"
    assert stuck["change"] == "0/64:1"
    assert stuck["key"] == 'public.orders ["a"]'
    assert 60 < stuck["seconds"] < 63
    assert stuck["frames"][0].startswith(f"{HERE}:")
    names = [place.rpartition(" ")[2] for place in stuck["frames"]]
    assert names[:4] == ["outer", "sleeping_deep", "__call__", "until"]
    assert (moves["event"], moves["destination"]) == ("handler_moves_again", "handler")


async def test_another_call_that_is_stuck_is_told_when_the_first_one_moves() -> None:
    gate = Gate("a", "b")
    line = Line(handler(gate, concurrency=2))
    line.commit("a", "b")
    with capture_logs() as logs:
        async with line.session():
            await gate.until(lambda: len(gate.entered) == 2)
            line.delivery.watch(time.monotonic() + 100)
            gate.open("a")
            await gate.until(lambda: gate.left == ["a"])
            line.delivery.watch(time.monotonic() + 100)
            assert line.delivery.is_stuck
            gate.open()
    assert [one["change"] for one in logs] == ["0/64:1", "0/C8:1"]


async def test_handlers_of_one_name_are_watched_each_by_itself() -> None:
    gate = Gate("a")
    one, other = handler(gate, "same"), handler(gate, "same")
    line = Line(one, other)
    line.commit("a", to=one)
    with capture_logs() as logs:
        async with line.session():
            await gate.until(lambda: bool(gate.entered))
            for later in (100, 101, 102):
                line.delivery.watch(time.monotonic() + later)
            gate.open()
    assert [one["event"] for one in logs] == ["handler_stuck"]


@pytest.mark.parametrize("options", [{}, {"concurrency": 2}, {"batch": 1}])
async def test_the_stack_of_a_sync_handler_begins_with_it(options: dict[str, Any]) -> None:
    entered, opened = threading.Event(), threading.Event()

    def inner() -> None:
        entered.set()
        opened.wait(10)

    def outer(one: Any) -> None:
        inner()

    line = Line(handler(outer, key=("id",), **options))
    line.commit("a")
    with capture_logs() as logs:
        async with line.session():
            await postgres.async_wait_until(entered.is_set)
            line.delivery.watch(time.monotonic() + 100)
            opened.set()
    [stuck] = logs
    assert stuck["frames"][0].startswith(f"{HERE}:")
    assert [place.rpartition(" ")[2] for place in stuck["frames"][:2]] == ["outer", "inner"]
    line.delivery.close()


async def test_the_stack_of_a_sink_of_ours_is_told_too() -> None:
    opened = threading.Event()
    stuck = asyncio.create_task(Worker("stuck").call(opened.wait, 10))
    await asyncio.sleep(0)
    slot = Slot()
    assert slot.frames() == []
    slot.task = stuck
    assert slot.frames()[0].startswith(f"{worker.__file__}:")
    opened.set()
    await stuck


async def test_a_call_that_ended_with_its_session_is_not_held_by_the_next_one() -> None:
    """Or a long outage would look like a handler that is stuck."""
    gate = Gate("a")
    line = Line(handler(gate, batch=1))
    line.commit("a")
    async with line.session() as running:
        await gate.until(lambda: bool(gate.entered))
        running.cancel()
        await asyncio.wait([running])
    line.delivery.attach(line.acknowledger)
    assert line.delivery.held is None


async def test_a_huge_number_of_keys_is_forgotten_when_it_is_done() -> None:
    recorder = Recorder()
    line = Line(handler(recorder.in_loop, concurrency=8), limits=Limits(100_000))
    line.commit(" ".join(f"k{number}" for number in range(20_000)))
    await line.deliver()
    [outlet] = line.delivery._outlets.values()
    assert len(recorder.calls) == line.counts.delivered == 20_000
    assert not outlet._lanes._last  # type: ignore[attr-defined]
    assert all(slot.item is None for slot in outlet.in_hand.slots)


async def test_a_route_of_its_own_policy_for_each_table_of_a_sink() -> None:
    """A change is tried as often as its own route says, by itself when a batch fails."""

    class Sink:
        name = "sink"

        def __init__(self) -> None:
            self.taken: list[str] = []
            self.calls: list[str] = []

        async def open(self) -> None:
            """Nothing to make ready."""

        async def close(self) -> None:
            """Nothing to let go."""

        async def take(self, changes: Sequence[Change]) -> None:
            self.calls.append(" ".join(map(called, changes)))
            if any(called(change) == "b" for change in changes):
                raise OSError
            self.taken += map(called, changes)

    sink = Sink()
    line = Line(sink, policy=FailurePolicy(1, None, QUICK.backoff))
    patient = FailurePolicy(4, None, QUICK.backoff, OnFailure.SKIP)
    other = Route("other", TablePattern(None, None), sink, policy=patient)
    line.send("a")
    line.send("b", by=other)
    line.send("c")
    line.close()
    await line.deliver()
    assert sink.calls == ["a b c", "a", "b", "b", "b", "c"]
    assert sink.taken == ["a", "c"]
    assert (line.counts.skipped, line.taken) == (1, 100)


# ---- When one destination fails for good


@pytest.mark.parametrize("ending", ["finishes", "hangs"])
async def test_others_may_finish_what_they_have_begun_when_one_fails_for_good(ending: str) -> None:
    """For some time; nothing else is begun."""
    gate = Gate("a")
    failing, other = handler(Recorder(p=[NotRun("no")]).in_loop), handler(gate, "other")
    limits = Limits(drain_seconds=0.01 if ending == "hangs" else 10)
    line = Line(failing, other, limits=limits)
    line.commit("a b", "c", to=other)
    line.commit("p")

    async def open_later() -> None:
        async with line.session() as running:
            await gate.until(lambda: bool(gate.entered))
            await asyncio.sleep(0)
            assert not running.done()
            if ending == "finishes":
                gate.open()
            else:
                await asyncio.wait([running])

    with pytest.raises(HandlerFailed):
        await open_later()
    assert gate.left == (["a", "b"] if ending == "finishes" else [])
    assert line.taken == (100 if ending == "finishes" else 0)
    assert len(asyncio.all_tasks()) == 1


async def test_a_mistake_in_a_sink_is_no_failure_of_its_destination() -> None:
    class Mistaken(Recorder):
        name = "mistaken"

        async def open(self) -> None:
            """Nothing to make ready."""

        async def close(self) -> None:
            """Nothing to let go."""

        async def take(self, changes: Sequence[Change]) -> None:
            raise TypeError

    line = Line(Mistaken(), policy=SKIP)
    line.commit("a")
    with pytest.raises(TypeError):
        await line.deliver()
    assert line.taken == 0


async def test_a_change_that_cannot_be_decoded_is_not_the_models_fault() -> None:
    class Broken(RowModel[Order]):
        def apply(self, change: Change[Any]) -> Change[Order]:
            raise DecodeError("x")

    line = Line(handler(Recorder().in_loop, model=Broken(Order)), policy=SKIP)
    line.commit("a")
    with pytest.raises(DecodeError):
        await line.deliver()


@pytest.mark.parametrize("kind", KINDS)
async def test_what_waits_and_what_is_in_flight_is_known(kind: str) -> None:
    gate = Gate("a", "a b", "b")
    line = Line(handler(gate, **KINDS[kind]))
    line.commit("a b", "c d", "e f")
    async with line.session():
        await gate.until(lambda: bool(gate.entered))
        [outlet] = line.delivery._outlets.values()
        in_hand = 1 if kind in ("plain", "unit") else 2
        await gate.until(lambda: outlet.waiting == 6 - in_hand)
        assert outlet.in_flight == line.delivery.in_flight == 6
        gate.open()
    assert (outlet.waiting, outlet.in_flight) == (0, 0)
