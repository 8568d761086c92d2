"""What becomes of changes that a handler does not take: attempts, skips, dead letters, parking."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Final

import pydantic
import pytest
from structlog.testing import capture_logs

from tests import postgres
from tests.lines import QUICK, Line, Recorder, called, handler
from walstream.acknowledger import Acknowledger
from walstream.backoff import Backoff
from walstream.calls import NotRun
from walstream.changes import Change, Message
from walstream.dead_letters import LetterQuery, SqliteStore, StoredLetter
from walstream.destinations import Destination, Item
from walstream.errors import (
    DeadLettersFull,
    DeadLetterStoreFailed,
    DeliveryError,
    HandlerFailed,
    OutputClosed,
    SetupError,
    TargetUnavailable,
    TransactionBroken,
)
from walstream.keys import WHOLE_TABLE
from walstream.lsn import Lsn
from walstream.outlets import OutletCounts
from walstream.parking import Parking
from walstream.policy import FailurePolicy, OnFailure, Retry
from walstream.typed import RowModel

PACE: Final = QUICK.backoff
STOP: Final = FailurePolicy(2, None, PACE)
SKIP: Final = FailurePolicy(2, None, PACE, OnFailure.SKIP)
ASIDE: Final = FailurePolicy(2, None, PACE, OnFailure.DEAD_LETTER)
ALL: Final = LetterQuery()
TABLE: Final = "public.orders"

KINDS: Final[dict[str, dict[str, Any]]] = {
    "plain": {},
    "sync": {},
    "unit": {"visible": True},
    "batch": {"batch": 9},
    "lanes": {"concurrency": 3},
    "lanes of batches": {"concurrency": 3, "batch": 2, "linger_seconds": 0.0},
}


def destination(recorder: Recorder, kind: str, **options: Any) -> Destination:
    function = recorder.in_thread if kind == "sync" else recorder.in_loop
    return handler(function, **KINDS[kind], **options)


def always() -> list[BaseException]:
    return [ValueError("a row's value") for _ in range(99)]


def make_store(tmp_path: Path, max_letters: int = 1000) -> SqliteStore:
    return SqliteStore(
        tmp_path / "letters.sqlite3", slot="s", max_letters=max_letters, max_bytes=1 << 20
    )


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    store = make_store(tmp_path)
    yield store
    await store.close()


@pytest.fixture
async def parking(store: SqliteStore) -> Parking:
    parking = Parking(store)
    await parking.open()
    return parking


async def letters(store: SqliteStore) -> list[tuple[str, bool]]:
    """Which changes are in the store, and whether they are parked."""
    return [(stored.letter.change_id, stored.letter.parked) for stored in await store.select(ALL)]


# ---- Attempts


@pytest.mark.parametrize("kind", KINDS)
async def test_a_change_is_tried_as_often_as_its_policy_says(kind: str) -> None:
    """Then it is given up, told of, and all others are delivered."""
    recorder = Recorder(p=always())
    line = Line(destination(recorder, kind), policy=SKIP)
    line.commit("a b", "c p", "d")
    with capture_logs() as logs:
        await line.deliver()
    in_batches = KINDS[kind].get("batch")
    alone = [names for names in recorder.calls if names == "p"]
    assert len(alone) == (1 if in_batches else 2)
    assert {*" ".join(recorder.calls).split()} == {*"abcdp"}
    assert (line.counts.skipped, line.counts.delivered, line.taken) == (1, 4, 300)
    [skipped] = [one for one in logs if one["event"] == "change_skipped"]
    assert skipped["log_level"] == "error"
    assert (skipped["route"], skipped["change"], skipped["changes"]) == ("handler", "0/C8:2", 1)
    assert skipped["attempts"] == (3 if in_batches else 2)
    assert skipped["error"].startswith("ValueError at ")
    assert "value" not in str(logs).replace("ValueError", "")


@pytest.mark.parametrize("kind", KINDS)
async def test_by_default_the_stream_stops(kind: str) -> None:
    recorder = Recorder(p=always())
    line = Line(destination(recorder, kind), policy=STOP)
    line.commit("a b", "c p", "d")
    with pytest.raises(HandlerFailed, match="in 2 attempts: ValueError at ") as failed:
        await line.deliver()
    assert "a row's value" not in str(failed.value)
    assert line.taken <= 100


async def test_the_poison_of_a_batch_is_found_by_delivering_each_change_alone() -> None:
    recorder = Recorder(p=always(), q=always())
    line = Line(handler(recorder.in_loop, batch=5), policy=SKIP)
    line.commit("a p b", "q c", "d")
    await line.deliver()
    assert recorder.calls == ["a p b q c"] * 2 + [*"apbqc", "d"]
    assert line.counts == OutletCounts(delivered=4, retries=6, skipped=2)


async def test_a_batch_that_is_well_at_a_later_attempt_is_not_taken_apart() -> None:
    recorder = Recorder(p=[ValueError()])
    line = Line(handler(recorder.in_loop, batch=5), policy=SKIP)
    line.commit("a p b")
    await line.deliver()
    assert recorder.calls == ["a p b"] * 2


async def test_the_pause_may_be_the_handlers_choice() -> None:
    recorder = Recorder(a=[Retry(delay_seconds=0), Retry("later", delay_seconds=0.001)])
    line = Line(handler(recorder.in_loop), policy=FailurePolicy(3, None, Backoff(9, 9)))
    line.commit("a")
    with capture_logs() as logs:
        async with asyncio.timeout(5):
            await line.deliver()
    assert [(one["attempt"], one["pause_seconds"]) for one in logs] == [(1, 0), (2, 0.001)]
    assert "later" not in str(logs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outages", [0, 5])
async def test_the_deadline_counts_from_the_first_attempt(
    kind: str, outages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time that it takes counts too; an outage does not."""
    clock, passed = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock() + passed[0])

    class Slow(Recorder):
        def note(self, item: Item | list[Item]) -> None:
            passed[0] += 40
            super().note(item)

    recorder = Slow(a=[TargetUnavailable("x")] * outages + always())
    policy = FailurePolicy(99, 100.0, Backoff(0.001, 0.001))
    line = Line(destination(recorder, kind), policy=policy)
    line.commit("a")
    with pytest.raises(HandlerFailed, match="in 3 attempts"):
        await line.deliver()
    assert recorder.calls == ["a"] * (3 + outages)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [NotRun("x")])
async def test_what_no_attempt_would_mend_stops_the_stream_whatever_the_policy(
    kind: str, error: Exception
) -> None:
    recorder = Recorder(a=[error])
    line = Line(destination(recorder, kind), policy=SKIP)
    line.commit("a b")
    with pytest.raises((DeliveryError, SetupError)):
        await line.deliver()
    assert recorder.calls[0].startswith("a")
    assert recorder.calls.count("a") <= 1
    assert (line.counts.skipped, line.counts.retries) == (0, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "error",
    [SetupError("x"), OutputClosed("x"), TransactionBroken("x"), SystemExit(0), BaseException("x")],
)
async def test_whatever_a_handler_raises_is_its_failure(kind: str, error: BaseException) -> None:
    """Errors of ours too, for it may use walstream itself, and what would end the program."""
    recorder = Recorder(a=[error] * 99)
    line = Line(destination(recorder, kind), policy=SKIP)
    line.commit("a")
    await line.deliver()
    assert (line.counts.skipped, line.taken) == (1, 100)


async def test_poison_that_no_attempt_would_mend_stops_the_stream_when_it_is_alone_too() -> None:
    recorder = Recorder(p=[ValueError(), ValueError(), NotRun("x")])
    line = Line(handler(recorder.in_loop, batch=5), policy=SKIP)
    line.commit("a", "p b")
    with pytest.raises(HandlerFailed):
        await line.deliver()
    assert (line.counts.skipped, line.taken) == (0, 100)


@pytest.mark.parametrize("calls_only", [False, True])
async def test_a_stop_while_a_batch_is_taken_apart(*, calls_only: bool) -> None:
    """When only calls in hand are to be finished, no other one is begun."""
    line: Line

    class Stopping(Recorder):
        def note(self, item: Item | list[Item]) -> None:
            super().note(item)
            if self.calls[-1] == "a":
                line.delivery.finish(calls_only=calls_only)

    recorder = Stopping(p=always())
    line = Line(handler(recorder.in_loop, batch=5), policy=SKIP)
    line.commit("a p b")
    await line.deliver()
    assert recorder.calls[2:] == (["a"] if calls_only else [*"apb"])
    assert line.taken == (0 if calls_only else 100)


@pytest.mark.parametrize("show", [False, True])
async def test_texts_of_exceptions_are_told_only_when_that_is_asked_for(
    store: SqliteStore, parking: Parking, *, show: bool
) -> None:
    """The traceback that is stored has frames alone."""
    recorder = Recorder(a=always())
    line = Line(handler(recorder.in_loop), policy=ASIDE, parking=parking, show_error_messages=show)
    line.commit("a")
    with capture_logs() as logs:
        await line.deliver()
    [stored] = await store.select(ALL)
    assert ("a row's value" in str(logs)) is show
    assert ("a row's value" in stored.letter.error) is show
    assert "a row's value" not in stored.letter.traceback
    assert "in note" in stored.letter.traceback


# ---- Dead letters


@pytest.mark.parametrize("kind", KINDS)
async def test_a_poisoned_row_is_put_aside_and_what_is_about_it_waits_behind(
    kind: str, store: SqliteStore, parking: Parking
) -> None:
    """Also of the same batch; other rows are delivered. The slot advances."""
    recorder = Recorder(p=always())
    line = Line(destination(recorder, kind), policy=ASIDE, parking=parking)
    line.commit("a p p b", "p", "c p>q q", "d")
    with capture_logs() as logs:
        await line.deliver()
    assert await letters(store) == [
        ("0/64:2", False),
        ("0/64:3", True),
        ("0/C8:1", True),
        ("0/12C:2", True),
        ("0/12C:3", True),
    ]
    assert (line.taken, line.delivery.in_flight) == (400, 0)
    counts = line.counts
    assert (counts.delivered, counts.dead_lettered, counts.parked) == (4, 1, 4)
    [told] = [one for one in logs if one["event"] == "change_dead_lettered"]
    assert (told["log_level"], told["route"], told["change"]) == ("error", "handler", "0/64:2")
    [poison] = await store.select(LetterQuery(parked=False))
    assert poison.letter.keys == ((TABLE, b'["p"]'),)
    assert poison.letter.attempts == told["attempts"]
    assert poison.letter.error == told["error"]


async def test_what_was_put_aside_stays_there_when_it_comes_again(
    store: SqliteStore, parking: Parking
) -> None:
    recorder = Recorder(p=always())
    line = Line(handler(recorder.in_loop), policy=ASIDE, parking=parking)
    for _ in range(2):
        line.acknowledger, line.end = Acknowledger(Lsn(0)), 0
        line.commit("p", "p")
        await line.deliver()
    assert recorder.calls == ["p"] * 2
    assert await letters(store) == [("0/64:1", False), ("0/C8:1", True)]
    assert (line.counts.parked, line.taken) == (3, 200)


async def test_letters_of_an_earlier_process_are_known(
    store: SqliteStore, parking: Parking
) -> None:
    line = Line(handler(Recorder(p=always()).in_loop), policy=ASIDE, parking=parking)
    line.commit("p")
    await line.deliver()
    again = Parking(store)
    await again.open()
    recorder = Recorder()
    later = Line(handler(recorder.in_loop), policy=STOP, parking=again)
    later.end = 100
    later.commit("p a")
    await later.deliver()
    assert recorder.calls == ["a"]
    assert later.counts.parked == 1


async def test_rows_whose_letters_are_gone_are_delivered_again(
    store: SqliteStore, parking: Parking
) -> None:
    """The store is asked once more, and not for every change after that."""
    recorder = Recorder(p=always(), **{"*": always()})
    line = Line(handler(recorder.in_loop, concurrency=2), policy=ASIDE, parking=parking)
    line.commit("p p", "*", "a b")
    await line.deliver()
    assert recorder.calls == ["p", "p"]  # all of a truncate's table waits
    await store.drop([stored.id for stored in await store.select(ALL)])
    recorder.errors.clear()
    line.commit("a", "p b")
    await line.deliver()
    assert sorted(recorder.calls[2:]) == ["a", "b", "p"]
    assert not parking.is_used
    assert not parking.may_block("handler", [(TABLE, WHOLE_TABLE)])


async def test_a_truncate_waits_behind_a_letter_of_any_row(
    store: SqliteStore, parking: Parking
) -> None:
    recorder = Recorder(p=always())
    line = Line(handler(recorder.in_loop), policy=ASIDE, parking=parking)
    line.commit("p", "a", "*", "b")
    await line.deliver()
    assert recorder.calls == ["p", "p", "a"]
    assert line.counts.parked == 2
    # Its letters are dropped, and a truncate asks about every row.
    await store.drop([stored.id for stored in await store.select(ALL)])
    line.commit("*", "p")
    recorder.errors.clear()
    await line.deliver()
    assert recorder.calls[3:] == ["*", "p"]
    assert not parking.is_used


async def test_what_is_remembered_of_other_rows_stays() -> None:
    class Store:
        """Has no letters any more, and says so."""

        async def park(self, letters: Sequence[Any], *, together: bool) -> list[bool]:
            return [False] * len(letters)

    parking = Parking(Store())  # type: ignore[arg-type]
    one, other, another = (TABLE, b"[1]"), (TABLE, b"[2]"), ("public.other", b"[1]")
    for route, key in [("h", one), ("h", other), ("h", another), ("g", one)]:
        parking._remember(route, [key])
    message = Message("jobs", "x", Lsn(1))
    assert await parking.park([("h", message, (one,))]) is False
    assert not parking.may_block("h", [one])
    assert all(parking.may_block("h", [key]) for key in (other, another))
    assert parking.may_block("g", [one])
    assert not parking.may_block("other", [one])
    assert await parking.park([("h", message, (other,)), ("h", message, (another,))]) is False
    assert await parking.park([("g", message, (one,))]) is False
    assert not parking.is_used


async def test_messages_are_put_aside_by_their_prefix(store: SqliteStore, parking: Parking) -> None:
    recorder = Recorder(a=always())
    line = Line(handler(recorder.in_loop), policy=ASIDE, parking=parking)
    line.message("a")
    line.message("b")
    await line.deliver()
    assert await letters(store) == [("0/64", False), ("0/C8", True)]


class Order(pydantic.BaseModel):
    id: str = pydantic.Field(max_length=1)


async def test_a_row_that_fits_no_model_is_put_aside_as_it_was_routed(
    store: SqliteStore, parking: Parking
) -> None:
    recorder = Recorder(p=always())
    destination = handler(recorder.in_loop, model=RowModel(Order), batch=9)
    line = Line(destination, policy=ASIDE, parking=parking)
    line.commit("a xx p xx")
    await line.deliver()
    stored: list[StoredLetter] = await store.select(ALL)
    assert [(one.letter.change_id, one.letter.parked) for one in stored] == [
        ("0/64:2", False),
        ("0/64:3", False),
        ("0/64:4", True),
    ]
    assert b"xx" in stored[0].letter.payload
    assert b'"p"' in stored[1].letter.payload
    assert "RowInvalid" in stored[0].letter.error
    assert "xx" not in stored[0].letter.error


@pytest.mark.parametrize("fails", ["handler", "model"])
async def test_a_transaction_is_put_aside_as_a_whole_and_so_are_those_behind_it(
    store: SqliteStore, parking: Parking, fails: str
) -> None:
    """A handler of whole transactions never gets a part of one."""
    poison = "p" if fails == "handler" else "xx"
    recorder = Recorder(p=always())
    line = Line(
        handler(recorder.in_loop, model=RowModel(Order), transactions=True),
        policy=ASIDE,
        parking=parking,
    )
    line.commit(f"a {poison}", "b c", "a d", "d", "e")
    await line.deliver()
    assert [calls for calls in recorder.calls if "p" not in calls] == ["b c", "e"]
    assert await letters(store) == [
        ("0/64:1", False),
        ("0/64:2", False),
        ("0/12C:1", True),
        ("0/12C:2", True),
        ("0/190:1", True),
    ]
    assert (line.counts.dead_lettered, line.counts.parked, line.taken) == (2, 3, 500)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_store_that_is_full_stops_the_stream(kind: str, tmp_path: Path) -> None:
    store = make_store(tmp_path, max_letters=1)
    parking = Parking(store)
    await parking.open()
    recorder = Recorder(p=always())
    line = Line(destination(recorder, kind), policy=ASIDE, parking=parking)
    line.commit("a", "p", "b p", "c")
    with pytest.raises(DeadLettersFull):
        await line.deliver()
    assert 100 <= line.taken <= 200
    await parking.close()


async def test_what_comes_before_a_change_that_cannot_be_parked_is_delivered(
    tmp_path: Path,
) -> None:
    store = make_store(tmp_path, max_letters=1)
    parking = Parking(store)
    await parking.open()
    recorder = Recorder(p=always())
    line = Line(handler(recorder.in_thread), policy=ASIDE, parking=parking)
    line.commit("p", "a b p c")
    with pytest.raises(DeadLettersFull):
        await line.deliver()
    assert recorder.calls == ["p", "p", "a", "b"]
    await parking.close()


async def test_a_store_that_fails_stops_the_stream(store: SqliteStore, parking: Parking) -> None:
    await store.close()
    line = Line(handler(Recorder(a=always()).in_loop), policy=ASIDE, parking=parking)
    line.commit("a")
    with pytest.raises(DeadLetterStoreFailed):
        await line.deliver()
    assert (line.taken, line.counts.dead_lettered) == (0, 0)


async def test_a_change_is_taken_when_its_letter_is_durable_and_not_before() -> None:
    asked, stored = asyncio.Event(), asyncio.Event()

    class Store:
        async def add(self, letters: Sequence[Any]) -> None:
            asked.set()
            await stored.wait()

    recorder = Recorder(a=always())
    parking = Parking(Store())  # type: ignore[arg-type]
    line = Line(handler(recorder.in_loop), policy=ASIDE, parking=parking)
    line.commit("a")
    async with line.session():
        await asyncio.wait_for(asked.wait(), 5)
        assert line.taken == 0
        stored.set()
        await postgres.async_wait_until(lambda: line.taken == 100)


async def test_destinations_have_letters_of_their_own(store: SqliteStore, parking: Parking) -> None:
    poisoned, well = Recorder(p=always()), Recorder()
    one, other = handler(poisoned.in_loop, "one"), handler(well.in_loop, "other")
    line = Line(one, other, policy=ASIDE, parking=parking)
    line.commit("p p", to=one)
    await line.deliver()
    line.commit("p", to=other)
    await line.deliver()
    assert well.calls == ["p"]
    assert line.counts == OutletCounts(retries=1, dead_lettered=1, parked=1)


async def test_random_failures_lose_nothing_and_keep_order(
    store: SqliteStore, parking: Parking
) -> None:
    """Of each row a beginning is delivered in order, and the rest is in the store."""
    delivered: dict[str, list[str]] = {}
    poisoned = {"0/64:3", "0/12C:1", "0/320:2"}

    async def take(changes: list[Change]) -> None:
        await asyncio.sleep(0)
        if any(change.id in poisoned for change in changes):
            raise ValueError
        for change in changes:
            delivered.setdefault(called(change), []).append(change.id)

    line = Line(
        handler(take, concurrency=3, batch=4, linger_seconds=0.0), policy=ASIDE, parking=parking
    )
    sent: dict[str, list[str]] = {}
    for number in range(10):
        line.send(" ".join("abcdefgh"[(number * 3 + one) % 8] for one in range(4)))
        line.close()
    for _, item, _, _ in line.handed:
        sent.setdefault(called(item), []).append(item.id)
    await line.deliver()
    kept: dict[str, list[str]] = {}
    for stored in await store.select(ALL):
        [(_, values)] = stored.letter.keys
        kept.setdefault(values.decode()[2:-2], []).append(stored.letter.change_id)
    assert {key: delivered.get(key, []) + kept.get(key, []) for key in sent} == sent
    assert line.taken == line.end
    assert line.counts.dead_lettered <= 3
