"""Dead letters are delivered again: in order, once each, and nothing is lost on the way."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from tests.postgres import Database, async_wait_until
from tests.streaming import Stream
from tests.test_dead_letters import TABLE, change, letter
from walstream import Change, Message, Walstream
from walstream.assembly import letters_of
from walstream.calls import NotRun
from walstream.config import Config, parse
from walstream.dead_letters import DeadLetterStore, LetterQuery, StoredLetter, payload_of
from walstream.dead_letters.bounds import HeldUp
from walstream.errors import DeadLetterStoreFailed, HandlerFailed, ReplayRuns
from walstream.keys import WHOLE_TABLE, conflict
from walstream.replay import Replay, RouteReport, Unit, _chunks, plan

ALL: Final = LetterQuery()

IN_REPLAY: Final = ContextVar("in_replay", default=False)

Note: TypeAlias = tuple[str, int, str | None]
"""Operation, id and status of a change."""


def note(change: Change) -> Note:
    row = change.row if change.operation in ("insert", "update") else change.identity
    return (str(change.operation), row.get("id", 0), row.get("status"))


class Book:
    """What a handler does; it refuses the ids in ``poison``."""

    def __init__(self) -> None:
        self.poison: set[int] = set()
        self.notes: list[Note] = []
        self.calls: list[list[str]] = []

    def take(self, *changes: Change) -> None:
        notes = [note(change) for change in changes]
        self.calls.append([change.id for change in changes])
        if any(number in self.poison for _, number, _ in notes):
            raise ValueError("poison")
        self.notes += notes

    def of(self, number: int) -> list[Note]:
        return [one for one in self.notes if one[1] == number]


@pytest.fixture(params=["sqlite", "postgres"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def book() -> Book:
    return Book()


@pytest.fixture
def orders(database: Database) -> Database:
    database.execute("CREATE TABLE orders (id int PRIMARY KEY, status text)")
    return database


@pytest.fixture
def stream(orders: Database, kind: str, tmp_path: Path) -> Iterator[Stream]:
    yield from make_stream(orders, kind, tmp_path)


@pytest.fixture
def file_stream(orders: Database, tmp_path: Path) -> Iterator[Stream]:
    """For what does not depend on the store."""
    yield from make_stream(orders, "sqlite", tmp_path)


@pytest.fixture
def table_stream(orders: Database, tmp_path: Path) -> Iterator[Stream]:
    """For what depends on a store in Postgres."""
    yield from make_stream(orders, "postgres", tmp_path)


def make_stream(database: Database, kind: str, folder: Path) -> Iterator[Stream]:
    stream = Stream(
        database,
        dead_letters={"store": kind, "path": folder / "letters.sqlite3"},
        handlers={
            "attempts": 2,
            "on_failure": "dead_letter",
            "backoff_seconds": 0.001,
            "max_backoff_seconds": 0.001,
        },
    )
    yield stream
    stream.close()


async def replay(
    stream: Stream, query: LetterQuery = ALL, *, config: Config | None = None
) -> dict[str, RouteReport]:
    replay = Replay(config or stream.config, stream.app.handlers)
    reports = await replay.run(query, lambda _: None)
    return {report.route: report for report in reports}


@asynccontextmanager
async def opened(config: Config) -> AsyncIterator[DeadLetterStore]:
    store = letters_of(config)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


async def letters(stream: Stream, **query: Any) -> list[StoredLetter]:
    async with opened(stream.config) as store:
        return await store.select(LetterQuery(**query))


def trade(database: Database, *numbers: int) -> None:
    """Three changes for each order, those of different orders between each other."""
    for number in numbers:
        database.execute("INSERT INTO orders VALUES (%s, 'new')", number)
    for number in numbers:
        database.execute("UPDATE orders SET status = 'paid' WHERE id = %s", number)
    for number in numbers:
        database.execute("DELETE FROM orders WHERE id = %s", number)


def life_of(number: int) -> list[Note]:
    return [("insert", number, "new"), ("update", number, "paid"), ("delete", number, None)]


# ---- Which letters are delivered


def stored(number: int, *keys: bytes, size_bytes: int = 0, **fields: Any) -> StoredLetter:
    pairs = tuple((TABLE, key) for key in keys)
    return StoredLetter(number, letter(number, keys=pairs, **fields), size_bytes=size_bytes)


def planned(
    letters: Sequence[StoredLetter],
    wanted: Collection[int],
    failed: Collection[int] = (),
    touched: HeldUp | None = None,
    **options: Any,
) -> tuple[list[list[int]], list[int]]:
    found = plan(letters, wanted, failed, touched or HeldUp(), **options)
    units = [[one.id for one in unit.letters] for unit in found.units]
    return units, [one.id for one in found.left]


def test_what_is_asked_for_takes_its_key_along() -> None:
    letters = [stored(1, b"[1]"), stored(2, b"[2]"), stored(3, b"[1]"), stored(4, b"[1]")]
    assert planned(letters, {3}) == ([[1], [3], [4]], [])
    assert planned(letters, {2}) == ([[2]], [])
    assert planned(letters, set()) == ([], [])


def test_a_change_of_the_key_takes_both_along() -> None:
    moved = [stored(1, b"[2]"), stored(2, b"[1]"), stored(3, b"[1]", b"[2]"), stored(4, b"[2]")]
    assert planned(moved, {2}) == ([[2]], [3])
    assert planned(moved, {3}) == ([[1], [2], [3], [4]], [])


def test_a_truncate_stays_as_long_as_one_letter_before_it() -> None:
    letters = [stored(1, b"[1]"), stored(2, b"[2]"), stored(3, WHOLE_TABLE), stored(4, b"[1]")]
    assert planned(letters, {1}) == ([[1]], [3, 4])
    assert planned(letters, {4}) == ([[1], [2], [3], [4]], [])


def test_what_failed_stays_with_all_behind_it() -> None:
    letters = [stored(1, b"[1]"), stored(2, b"[2]"), stored(3, b"[1]"), stored(4, b"[2]")]
    assert planned(letters, {1, 2, 3, 4}, failed={1}) == ([[2], [4]], [1, 3])


def test_what_comes_behind_delivered_letters_goes_along() -> None:
    touched = HeldUp()
    touched.add(letter(1, key=1))
    assert planned([stored(2, b"[1]"), stored(3, b"[2]")], {1}, touched=touched) == ([[2]], [])


def test_a_transaction_goes_as_a_whole() -> None:
    def change(number: int, ordinal: int, key: bytes) -> StoredLetter:
        return stored(10 * number + ordinal, key, change_id=f"0/{number}:{ordinal}")

    letters = [change(1, 1, b"[1]"), change(1, 2, b"[2]"), change(2, 1, b"[3]")]
    letters += [change(3, 1, b"[2]"), change(3, 2, b"[3]")]
    assert planned(letters, {11}, whole_transactions=True) == ([[11, 12]], [31, 32])
    assert planned(letters, {31}, whole_transactions=True) == ([[11, 12], [21], [31, 32]], [])
    assert planned(letters, {31}, {12}, whole_transactions=True) == ([[21]], [11, 12, 31, 32])


some_keys = st.lists(
    st.sampled_from([b"[1]", b"[2]", b"[3]", b"[4]", WHOLE_TABLE]), min_size=1, max_size=2
)


@given(st.lists(some_keys, max_size=10), st.sets(st.integers(0, 9)), st.sets(st.integers(0, 9)))
def test_nothing_overtakes_what_it_conflicts_with(
    keys: list[list[bytes]], wanted: set[int], failed: set[int]
) -> None:
    letters = [stored(number, *its_keys) for number, its_keys in enumerate(keys)]
    units, left = planned(letters, wanted, failed)
    delivered = [number for [number] in units]
    assert delivered == sorted(delivered)
    assert not failed.intersection(delivered)
    for number in delivered:
        for before in range(number):
            if before not in delivered:
                assert not conflict(letters[before].letter.keys, letters[number].letter.keys)
    assert wanted.intersection(range(len(keys))) <= {*delivered, *left}


# ---- Through the same delivery


def attach(stream: Stream, book: Book, how: str) -> None:
    """Attach a handler of a kind to the orders, under the name ``book``."""

    def one(change: Change) -> None:
        book.take(change)

    def many(changes: list[Change]) -> None:
        book.take(*changes)

    async def one_async(change: Change) -> None:
        await asyncio.sleep(0)
        book.take(change)

    async def many_async(changes: list[Change]) -> None:
        book.take(*changes)

    functions: dict[str, tuple[Any, dict[str, Any]]] = {
        "async": (one_async, {}),
        "sync": (one, {}),
        "async lanes": (one_async, {"concurrency": 4}),
        "sync lanes": (one, {"concurrency": 4}),
        "batches in lanes": (many_async, {"concurrency": 2, "batch": 3, "linger_seconds": 0}),
        "batch": (many, {"batch": 7, "linger_seconds": 0}),
        "transactions": (many_async, {"transactions": True}),
        "visible": (one_async, {"visible": True}),
    }
    function, options = functions[how]
    stream.app.on("public.orders", name="book", **options)(function)


KINDS: Final = (
    "async",
    "sync",
    "async lanes",
    "sync lanes",
    "batches in lanes",
    "batch",
    "transactions",
    "visible",
)


@pytest.mark.parametrize("how", KINDS)
async def test_each_kind_of_handler_gets_its_letters_in_order(
    orders: Database, file_stream: Stream, book: Book, how: str
) -> None:
    attach(file_stream, book, how)
    book.poison = {2, 4}
    trade(orders, 1, 2, 3, 4, 5)
    await file_stream.drain()
    assert [book.of(number) for number in (1, 3, 5)] == [life_of(number) for number in (1, 3, 5)]
    assert len(await letters(file_stream, parked=True)) == 4
    book.poison = set()
    reports = await replay(file_stream)
    assert reports == {"book": RouteReport("book", delivered=6)}
    assert [book.of(number) for number in (2, 4)] == [life_of(2), life_of(4)]
    assert await letters(file_stream) == []


async def test_letters_go_in_the_order_of_the_stream_and_are_gone(
    orders: Database, stream: Stream, book: Book
) -> None:
    attach(stream, book, "async")
    book.poison = {1, 2}
    trade(orders, 1, 2)
    await stream.drain()
    assert book.notes == []
    book.poison = set()
    await replay(stream)
    assert book.notes == [
        one for three in zip(life_of(1), life_of(2), strict=True) for one in three
    ]
    assert await letters(stream) == []
    orders.execute("INSERT INTO orders VALUES (1, 'again')")
    await stream.drain()
    assert book.notes[-1] == ("insert", 1, "again")


async def test_a_letter_that_fails_again_stays_with_those_behind_it(
    orders: Database, stream: Stream, book: Book
) -> None:
    attach(stream, book, "async")
    book.poison = {1, 2}
    trade(orders, 1, 2)
    await stream.drain()
    book.poison = {1}
    book.calls.clear()
    reports = await replay(stream)
    assert reports == {
        "book": RouteReport(
            "book", delivered=3, failed=1, left=3, blocked=(("public.orders", b"[1]"),)
        )
    }
    assert book.notes == life_of(2)
    first, *others = await letters(stream)
    assert (first.letter.attempts, [one.letter.parked for one in others]) == (4, [True, True])
    assert first.last_failed_at is not None
    assert first.letter.first_failed_at is not None
    assert first.last_failed_at > first.letter.first_failed_at
    assert len(book.calls) == 5, "the routes' attempts count: two for the first, one for others"
    book.poison = set()
    assert (await replay(stream))["book"].delivered == 3
    assert book.of(1) == life_of(1)


async def test_one_of_a_key_takes_those_before_and_behind_it_along(
    orders: Database, stream: Stream, book: Book
) -> None:
    attach(stream, book, "async")
    book.poison = {1, 2}
    trade(orders, 1, 2)
    await stream.drain()
    book.poison = set()
    found = await letters(stream, key_values=[b"[2]"])
    reports = await replay(stream, LetterQuery(ids=[found[1].id]))
    assert reports == {"book": RouteReport("book", delivered=3, added=2)}
    assert book.notes == life_of(2)
    assert {one.letter.keys for one in await letters(stream)} == {(("public.orders", b"[1]"),)}


async def test_a_truncate_waits_for_all_rows(orders: Database, stream: Stream, book: Book) -> None:
    attach(stream, book, "async lanes")
    book.poison = {1, 2}
    orders.execute("INSERT INTO orders VALUES (1, 'new'), (2, 'new'), (3, 'new')")
    orders.execute("TRUNCATE orders")
    orders.execute("INSERT INTO orders VALUES (3, 'again')")
    await stream.drain()
    assert book.notes == [("insert", 3, "new")]
    book.poison = {2}
    reports = await replay(stream)
    assert book.notes[1:] == [("insert", 1, "new")]
    assert (reports["book"].failed, reports["book"].left) == (1, 3)
    assert ("public.orders", WHOLE_TABLE) in reports["book"].blocked
    book.poison = set()
    await replay(stream)
    assert book.notes[2:] == [
        ("insert", 2, "new"),
        ("truncate", 0, None),
        ("insert", 3, "again"),
    ]


async def test_whole_transactions_go_again_as_a_whole(
    orders: Database, file_stream: Stream, book: Book
) -> None:
    attach(file_stream, book, "transactions")
    book.poison = {2}
    orders.execute("INSERT INTO orders VALUES (1, 'new'), (2, 'new')")
    orders.execute("INSERT INTO orders VALUES (3, 'new'), (4, 'new')")
    orders.execute("UPDATE orders SET status = 'paid' WHERE id IN (1, 4)")
    await file_stream.drain()
    assert book.notes == [("insert", 3, "new"), ("insert", 4, "new")]
    book.calls.clear()
    book.poison = set()
    [last] = await letters(file_stream, key_values=[b"[4]"])
    await replay(file_stream, LetterQuery(ids=[last.id]))
    assert [len(call) for call in book.calls] == [2, 2]
    assert await letters(file_stream) == []


class Order(BaseModel):
    id: int
    status: str


async def test_rows_become_models_and_those_that_do_not_fit_stay(
    orders: Database, file_stream: Stream
) -> None:
    rows: list[Order] = []
    refusing = True

    @file_stream.app.on("public.orders", "insert", model=Order, name="book")
    async def take(change: Change[Order]) -> None:
        if refusing:
            raise ValueError
        rows.append(change.row)

    orders.execute("INSERT INTO orders VALUES (1, 'new'), (2, NULL)")
    await file_stream.drain()
    refusing = False
    reports = await replay(file_stream)
    assert rows == [Order(id=1, status="new")]
    assert (reports["book"].delivered, reports["book"].failed) == (1, 1)


async def test_what_is_masked_is_not_masked_again(orders: Database, tmp_path: Path) -> None:
    """And types that the catalog alone knows are values again."""
    orders.execute("CREATE TYPE mood AS ENUM ('good', 'bad')")
    orders.execute("ALTER TABLE orders ADD mood mood, ADD moods mood[]")
    seen: list[dict[str, Any]] = []
    refusing = False
    stream = Stream(
        orders,
        masking={"key": "secret"},
        dead_letters={"path": tmp_path / "letters.sqlite3"},
        handlers={"attempts": 1, "on_failure": "dead_letter"},
    )

    @stream.app.on("public.orders", "insert", mask={"status": "hash"}, name="book")
    async def take(change: Change) -> None:
        if refusing:
            raise ValueError
        seen.append(dict(change.row))

    for number, refusing in ((1, False), (2, True)):  # noqa: B007 - the handler looks at it
        orders.execute("INSERT INTO orders VALUES (%s, 'new', 'good', '{bad}')", number)
        await stream.drain()
    refusing = False
    await replay(stream)
    stream.close()
    assert seen[1] == {**seen[0], "id": 2}
    assert (seen[1]["mood"], seen[1]["moods"]) == ("good", ["bad"])


async def test_messages_go_again(orders: Database, stream: Stream) -> None:
    contents: list[str] = []
    refusing = True

    @stream.app.on_message("jobs.*", name="work")
    def take(message: Message) -> None:
        if refusing:
            raise ValueError
        contents.append(message.content)

    for transactional in ("false", "true"):  # only a commit flushes the WAL
        orders.execute(f"SELECT pg_logical_emit_message({transactional}, 'jobs.a', 'one')")
        orders.execute(f"SELECT pg_logical_emit_message({transactional}, 'jobs.a', 'two')")
    await stream.drain()
    refusing = False
    assert (await replay(stream))["work"].delivered == 4
    assert contents == ["one", "two"] * 2


async def test_letters_go_to_the_sink_that_their_route_leads_to_now(
    orders: Database, file_stream: Stream, book: Book, tmp_path: Path
) -> None:
    attach(file_stream, book, "async")
    book.poison = {1}
    trade(orders, 1)
    await file_stream.drain()
    lines = tmp_path / "lines.jsonl"
    content = file_stream.config.model_dump()
    config = parse(
        {
            **{name: content[name] for name in ("postgres", "slot")},
            "dead_letters": {"path": tmp_path / "letters.sqlite3"},
            "sinks": {"lines": {"type": "file", "path": lines}},
            "routes": [{"table": "public.orders", "to": "lines", "name": "book"}],
        }
    )
    replaying = Replay(config)
    [report] = await replaying.run(ALL, lambda _: None)
    assert report == RouteReport("book", delivered=3)
    operations = [json.loads(line)["operation"] for line in lines.read_text().splitlines()]
    assert operations == ["insert", "update", "delete"]


async def test_letters_without_a_route_are_told_and_stay(
    orders: Database, stream: Stream, book: Book
) -> None:
    attach(stream, book, "async")
    book.poison = {1}
    trade(orders, 1)
    await stream.drain()
    book.poison = set()
    handlers = stream.app.handlers
    stream.app.handlers = []
    stream.app.on("public.orders", name="other")(book.take)
    reports = await replay(stream)
    assert reports == {
        "book": RouteReport(
            "book", left=3, blocked=(("public.orders", b"[1]"),), reason="there is no such route"
        )
    }
    stream.app.handlers = handlers
    assert (await replay(stream))["book"].left == 0


async def test_what_no_letter_could_be_delivered_to_ends_the_replay(
    orders: Database, file_stream: Stream, book: Book
) -> None:
    """What was delivered before is gone, and nothing has failed again."""
    attach(file_stream, book, "async")
    book.poison = {1, 2}
    trade(orders, 1, 2)
    await file_stream.drain()
    before = [one.letter for one in await letters(file_stream)]

    def later(change: Change) -> Any:
        if len(book.notes) == 2:
            return asyncio.sleep(0)
        book.notes.append(note(change))
        return None

    file_stream.app.handlers = []
    file_stream.app.on("public.orders", name="book")(later)
    with pytest.raises(HandlerFailed, match="unfinished coroutine") as caught:
        await replay(file_stream)
    assert isinstance(caught.value.__cause__, NotRun)
    assert [one.letter for one in await letters(file_stream)] == before[2:]


async def test_a_store_that_fails_ends_the_replay_and_keeps_its_letters(
    orders: Database, file_stream: Stream, book: Book
) -> None:
    attach(file_stream, book, "async")
    book.poison = {1, 2}
    trade(orders, 1, 2)
    await file_stream.drain()
    path = file_stream.config.dead_letters.path
    elsewhere = path.with_name("elsewhere")

    async def take(change: Change) -> None:
        if path.exists():
            path.rename(elsewhere)
        await asyncio.sleep(0.01)

    file_stream.app.handlers = []
    file_stream.app.on("public.orders", name="book")(take)
    with pytest.raises(DeadLetterStoreFailed, match="removed or replaced"):
        await replay(file_stream)
    elsewhere.rename(path)
    file_stream.app.handlers = []
    attach(file_stream, book, "async")
    book.poison = set()
    await replay(file_stream)
    assert book.of(2) == life_of(2)
    assert await letters(file_stream) == []


# ---- At the same time


def narrow(config: Config, max_in_flight_changes: int) -> Config:
    limits = config.stream.model_copy(update={"max_in_flight_changes": max_in_flight_changes})
    return config.model_copy(update={"stream": limits})


async def fill(config: Config, count: int) -> None:
    """Store letters of one row each."""
    async with opened(config) as store:
        await store.add(
            [
                letter(number, key=number, payload=payload_of(change(number)))
                for number in range(1, count + 1)
            ]
        )


@pytest.mark.parametrize("is_async", [True, False])
async def test_more_letters_than_may_be_in_flight_are_delivered(
    file_stream: Stream, *, is_async: bool
) -> None:
    """Also where all that is in flight is taken before the reader begins to wait."""
    found: list[str] = []

    async def take_async(change: Change) -> None:
        found.append(change.id)

    def take(change: Change) -> None:
        found.append(change.id)

    file_stream.app.on("public.orders", name="book")(take_async if is_async else take)
    await fill(file_stream.config, 200)
    async with asyncio.timeout(30):
        reports = await replay(file_stream, config=narrow(file_stream.config, 10))
    assert reports["book"].delivered == len(found) == 200


@pytest.mark.parametrize(
    ("watch_seconds", "fetched_letters"), [(0.01, 100), (60, 1)], ids=["watch", "chunk"]
)
async def test_a_replay_that_lost_its_lock_stops_when_another_one_may_run(
    orders: Database,
    table_stream: Stream,
    monkeypatch: pytest.MonkeyPatch,
    watch_seconds: float,
    fetched_letters: int,
) -> None:
    monkeypatch.setattr("walstream.replay.WATCH_SECONDS", watch_seconds)
    monkeypatch.setattr("walstream.replay.FETCHED_LETTERS", fetched_letters)
    config = narrow(table_stream.config, 1)
    await fill(config, 10)
    first, second = Walstream(), Walstream()
    by_first, by_second = [], []

    @second.on("public.orders", name="book")
    async def take_too(change: Change) -> None:
        by_second.append(change.id)

    @first.on("public.orders", name="book")
    async def take(change: Change) -> None:
        by_first.append(change.id)
        if len(by_first) == 1:
            orders.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                " WHERE datname = current_database() AND state = 'idle in transaction'"
            )
            [report] = await Replay(config, second.handlers).run(ALL, lambda _: None)
            assert report.delivered == 10
            if watch_seconds < 1:
                await async_wait_until(lambda: bool(replaying._delivery._flow.halt))

    replaying = Replay(config, first.handlers)
    with pytest.raises(DeadLetterStoreFailed, match="dead letters in the schema"):
        await replaying.run(ALL, lambda _: None)
    assert len(by_second) == 10
    # One more had passed before the lock was lost, perhaps.
    assert len(by_first) <= (1 if watch_seconds < 1 else 2)


def test_no_more_is_read_at_a_time_than_may_be_in_flight() -> None:
    units = [Unit([stored(number, b"[1]", size_bytes=400)]) for number in range(1, 6)]
    found = [[one.letters[0].id for one in chunk] for chunk in _chunks(units, 1000)]
    assert found == [[1, 2, 3], [4, 5]]
    assert len(list(_chunks(units, 10_000))) == 1


async def test_letters_that_are_dropped_meanwhile_were_not_delivered(
    file_stream: Stream,
) -> None:
    await fill(file_stream.config, 3)

    @file_stream.app.on("public.orders", name="book")
    async def take(change: Change) -> None:
        if change.id == "0/2:1":
            async with opened(file_stream.config) as store:
                others = [one for one in await store.select(ALL) if one.letter.position[0] > 1]
                await store.drop([one.id for one in others])

    report = (await replay(file_stream))["book"]
    assert (report.delivered, report.left) == (1, 0)


def test_reports_and_plans_print_no_values() -> None:
    secret = b'["123-45-6789"]'
    report = RouteReport("book", left=1, blocked=((TABLE, secret),))
    found = plan([stored(1, secret)], {1}, (), HeldUp())
    assert "123-45-6789" not in repr(report) + repr(found)
    assert "blocked=1" in repr(report)


async def test_a_second_replay_is_refused(orders: Database, stream: Stream, book: Book) -> None:
    attach(stream, book, "async")
    book.poison = {1}
    trade(orders, 1)
    await stream.drain()
    book.poison = set()
    async with opened(stream.config) as store, store.exclusive():
        with pytest.raises(ReplayRuns):
            await replay(stream)
    assert (await replay(stream))["book"].delivered == 3


async def test_a_letter_that_comes_again_meanwhile_is_delivered_again(
    orders: Database, stream: Stream
) -> None:
    calls: list[Note] = []
    come_again = [False]

    @stream.app.on("public.orders", name="book")
    async def take(change: Change) -> None:
        if not stream.is_running and come_again.pop():
            async with opened(stream.config) as store:
                [stored, *_] = await store.select(ALL)
                assert await store.park([stored.letter]) == [True]
        if stream.is_running:
            raise ValueError
        calls.append(note(change))

    async with stream:
        trade(orders, 1)
        await stream.drain()
    come_again[:] = [False, False, False, True]
    reports = await replay(stream)
    assert reports["book"].delivered == 3
    assert calls == [*life_of(1), life_of(1)[0]]
    assert await letters(stream) == []


async def test_the_daemon_parks_until_the_last_letter_is_gone(
    orders: Database, stream: Stream, book: Book
) -> None:
    """While letters are replayed, changes of their row go on; none is lost or overtakes another."""
    statuses: list[str] = []
    by_replay: list[str] = []
    poisoned = True

    @stream.app.on("public.orders", name="book")
    async def take(change: Change) -> None:
        status = str(change.row["status"])
        if poisoned:
            raise ValueError
        await asyncio.sleep(0.001)
        statuses.append(status)
        by_replay.extend([status] if IN_REPLAY.get() else [])

    orders.execute("INSERT INTO orders VALUES (1, '0'), (2, '0')")
    async with stream:
        await stream.drain()
        written = ["0"]
        finished = threading.Event()

        def write() -> None:
            with orders.connect() as connection:
                while not finished.wait(0.01):  # seconds between two changes
                    written.append(str(len(written)))
                    connection.execute("UPDATE orders SET status = %s WHERE id = 1", written[-1:])

        writing = asyncio.create_task(asyncio.to_thread(write))
        async with opened(stream.config) as store:
            while await store.count(ALL) < 20:  # noqa: ASYNC110 - a row
                await asyncio.sleep(0.005)
        poisoned = False
        IN_REPLAY.set(True)  # and in the tasks that begin now
        await replay(stream, LetterQuery(key_values=[b"[1]"]))
        assert len(by_replay) > 20
        await async_wait_until(lambda: len(statuses) > len(by_replay) + 20)
        finished.set()
        await writing
        await stream.drain()
    assert statuses == written
    assert [one.letter.keys for one in await letters(stream)] == [(("public.orders", b"[2]"),)]


async def test_a_stop_finishes_what_is_in_hand(
    orders: Database, file_stream: Stream, book: Book
) -> None:
    attach(file_stream, book, "async")
    book.poison = {1}
    trade(orders, 1)
    await file_stream.drain()
    book.poison = set()

    def take(change: Change) -> None:
        book.take(change)
        if len(book.notes) == 2:
            replaying.stop()

    file_stream.app.handlers = []

    @file_stream.app.on("public.orders", name="book")
    async def take_async(change: Change) -> None:
        take(change)

    replaying = Replay(file_stream.config, file_stream.app.handlers)
    [report] = await replaying.run(ALL, lambda _: None)
    assert (report.delivered, report.failed, report.left) == (2, 0, 1)
    assert len(await letters(file_stream)) == 1


# ---- Exactly once


TRANSACTIONAL: Final = """
    CREATE TABLE booked (id int PRIMARY KEY, status text, times int DEFAULT 1)
"""
BOOK: Final = """
    INSERT INTO booked VALUES (%s, %s)
    ON CONFLICT (id) DO UPDATE SET status = excluded.status, times = booked.times + 1
"""


def attach_transactional(
    stream: Stream, dsn: str, poison: set[int], how: str, calls: list[int]
) -> None:
    options: dict[str, Any] = {"batch": {"batch": 10}, "transactions": {"transactions": True}}
    options = {"name": "book", "transactional": dsn, **options.get(how, {})}

    def rows(given: Change | list[Change]) -> list[tuple[int, str]]:
        changes = given if isinstance(given, list) else [given]
        found = [(change.row["id"], change.row["status"]) for change in changes]
        calls.extend(number for number, _ in found)
        return found

    def verify(number: int) -> None:
        if number in poison:
            raise ValueError

    if how == "def":

        @stream.app.on("public.orders", **options)
        def book(change: Change, connection: Any) -> None:
            for number, status in rows(change):
                connection.execute(BOOK, [number, status])
                verify(number)

    else:

        @stream.app.on("public.orders", **options)
        async def book_async(given: Any, connection: Any) -> None:
            for number, status in rows(given):
                await connection.execute(BOOK, [number, status])
                verify(number)


@pytest.mark.parametrize("how", ["async def", "def", "batch", "transactions"])
async def test_a_transactional_handler_applies_each_letter_once(
    orders: Database, file_stream: Stream, how: str
) -> None:
    """Although it has gone on, and although all of it comes again afterwards."""
    orders.execute(TRANSACTIONAL)
    poison, calls = {2}, list[int]()
    attach_transactional(file_stream, orders.dsn, poison, how, calls)
    for status in ("new", "paid"):
        for number in (1, 2, 3):
            orders.execute(
                "INSERT INTO orders VALUES (%s, %s)"
                " ON CONFLICT (id) DO UPDATE SET status = excluded.status",
                number,
                status,
            )
    await file_stream.drain()
    expected = [(number, "paid", 2) for number in (1, 3)]
    assert orders.execute("SELECT * FROM booked ORDER BY id") == expected
    poison.clear()
    await replay(file_stream)
    expected.insert(1, (2, "paid", 2))
    assert orders.execute("SELECT * FROM booked ORDER BY id") == expected
    calls.clear()
    await file_stream.redeliver()
    assert calls == []
    assert orders.execute("SELECT * FROM booked ORDER BY id") == expected


async def test_what_a_transactional_handler_has_applied_is_not_parked(
    orders: Database, file_stream: Stream
) -> None:
    """A change that came before a letter of its row comes again, and is not replayed with it."""
    orders.execute(TRANSACTIONAL)
    poison, calls = set[int](), list[int]()
    attach_transactional(file_stream, orders.dsn, poison, "async def", calls)
    orders.execute("INSERT INTO orders VALUES (1, 'new')")
    async with file_stream:
        await file_stream.drain()
        poison.add(1)
        orders.execute("UPDATE orders SET status = 'paid' WHERE id = 1")
        await file_stream.drain()
    await file_stream.redeliver()
    poison.clear()
    [report] = (await replay(file_stream)).values()
    assert report.delivered == 1
    assert orders.execute("SELECT * FROM booked") == [(1, "paid", 2)]


async def test_a_letter_replayed_before_anything_else_is_applied_once(
    orders: Database, file_stream: Stream
) -> None:
    """Nothing is recorded beyond it: that it was replayed is what tells it."""
    orders.execute(TRANSACTIONAL)
    poison, calls = {1}, list[int]()
    attach_transactional(file_stream, orders.dsn, poison, "def", calls)
    orders.execute("INSERT INTO orders VALUES (1, 'new')")
    await file_stream.drain()
    poison.clear()
    await replay(file_stream)
    await file_stream.redeliver()
    assert orders.execute("SELECT * FROM booked") == [(1, "new", 1)]
    orders.execute("INSERT INTO orders VALUES (2, 'new')")
    await file_stream.drain()
    assert orders.execute("SELECT count(*) FROM walstream.replayed") == [(1,)]


# ---- The command line, and kill -9

HANDLERS: Final = """
import asyncio, os, pathlib
from walstream import Change, Walstream

here = pathlib.Path(__file__).parent
stream = Walstream()

def mended():
    return (here / "mended").exists()

@stream.on("public.orders", name="notes")
async def take(change: Change) -> None:
    if not mended():
        raise ValueError
    with (here / "seen").open("a") as seen:
        print(change.id, file=seen)
    await asyncio.sleep(float(os.environ.get("PAUSE", "0")))

@stream.on("public.orders", "insert", name="ledger", transactional=os.environ["TARGET"])
async def apply(change: Change, connection) -> None:
    if not mended():
        raise ValueError
    await connection.execute(
        "INSERT INTO booked VALUES (%s, %s) ON CONFLICT (id) DO UPDATE"
        " SET times = booked.times + 1", [change.row["id"], change.row["status"]]
    )
"""


class Program:
    """Runs walstream in a folder with handlers and a configuration."""

    def __init__(
        self, folder: Path, database: Database, kind: str, handlers: str = HANDLERS
    ) -> None:
        self.folder = folder
        self.database = database
        (folder / "handlers.py").write_text(handlers)
        (folder / "walstream.toml").write_text(f"""
            [postgres]
            dsn = "{database.dsn}"
            [slot]
            name = "{database.name}"
            [handlers]
            app = "handlers:stream"
            attempts = 1
            on_failure = "dead_letter"
            [dead_letters]
            store = "{kind}"
            [log]
            format = "json"
        """)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        kept = {name: value for name, value in os.environ.items() if "WALSTREAM" not in name}
        return subprocess.Popen(
            [sys.executable, "-m", "walstream", *arguments],
            cwd=self.folder,
            env={
                **kept,
                "PYTHONPATH": str(Path.cwd()),
                "TARGET": self.database.dsn,
                "COLUMNS": "200",
                **environment,
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, code: int = 0, timeout_seconds: float = 60) -> tuple[str, str]:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=timeout_seconds)
        assert process.returncode == code, err
        return out, err

    def mend(self) -> None:
        (self.folder / "mended").touch()

    @property
    def seen(self) -> list[str]:
        path = self.folder / "seen"
        return path.read_text().split() if path.exists() else []

    def has_seen(self, count: int) -> bool:
        return len(self.seen) >= count

    def left(self) -> int:
        out, _ = self.run("dead-letters", "list", "--json")
        return len(out.splitlines())


@pytest.fixture
def program(orders: Database, kind: str, tmp_path: Path) -> Program:
    orders.execute(TRANSACTIONAL)
    orders.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", orders.name)
    return Program(tmp_path, orders, kind)


def test_the_command_says_what_became_of_the_letters(orders: Database, program: Program) -> None:
    trade(orders, 1, 2)
    program.run("run", "--until", "now")
    out, err = program.run("dead-letters", "replay", "--route", "notes", "--yes", code=75)
    assert out == (
        "notes: 0 delivered, 2 failed again, 4 left\n"
        "still held up: public.orders [1] of notes\n"
        "still held up: public.orders [2] of notes\n"
    )
    assert "LettersLeft: 0 delivered, 6 dead letters left" in err
    program.mend()
    first = json.loads(program.run("dead-letters", "list", "--json")[0].splitlines()[0])
    out, _ = program.run(
        "dead-letters", "replay", "handlers:stream", str(first["id"]), "--yes", "--json"
    )
    [report] = [json.loads(line) for line in out.splitlines()]
    assert (report["delivered"], report["added"], report["blocked"]) == (3, 2, [])
    out, _ = program.run("dead-letters", "replay", "--all", "--yes")
    assert sorted(out.splitlines()) == [
        "ledger: 2 delivered, 0 failed again",
        "notes: 3 delivered, 0 failed again",
    ]
    assert program.run("dead-letters", "replay", "--all", "--yes")[0] == "no dead letters\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "replay which letters?"),
        (("--all", "7"), "--all goes without"),
        (("a:b", "c:d", "--all"), "'c:d' is not the number of a letter"),
        (("17", "--yes"), "there is no dead letter 17"),
        (("--all",), "would be replayed, and nobody is here to ask"),
    ],
)
def test_mistakes_are_told(
    orders: Database, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    orders.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", orders.name)
    program = Program(tmp_path, orders, "sqlite")
    trade(orders, 1)
    program.run("run", "--until", "now")
    assert said in program.run("dead-letters", "replay", *arguments, code=64)[1]


@pytest.mark.timeout(180)
def test_a_killed_replay_loses_nothing(
    orders: Database, program: Program, wait_until: Callable[..., Any]
) -> None:
    """What was delivered and not removed comes again; what is transactional is applied once."""
    numbers = range(1, 101)
    for number in numbers:
        orders.execute("INSERT INTO orders VALUES (%s, 'new')", number)
    program.run("run", "--until", "now")
    assert program.left() == 200
    program.mend()
    for goal in (10, 25, 60):
        process = program.start("dead-letters", "replay", "--all", "--yes", PAUSE="0.005")
        wait_until(partial(program.has_seen, goal))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert 0 < program.left() < 200
    program.run("dead-letters", "replay", "--all", "--yes")
    assert program.left() == 0
    ids = list(dict.fromkeys(program.seen))
    assert len(ids) == 100
    assert program.seen.count(ids[0]) <= 4
    assert orders.execute("SELECT count(*), sum(times) FROM booked") == [(100, 100)]
    program.run("run", "--until", "now")
    assert orders.execute("SELECT count(*), sum(times) FROM booked") == [(100, 100)]


def test_a_signal_finishes_what_is_in_hand(
    orders: Database, tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    orders.execute(TRANSACTIONAL)
    orders.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", orders.name)
    program = Program(tmp_path, orders, "sqlite")
    orders.execute("INSERT INTO orders SELECT id, 'new' FROM generate_series(1, 100) AS id")
    program.run("run", "--until", "now")
    program.mend()
    process = program.start("dead-letters", "replay", "--route", "notes", "-y", PAUSE="0.05")
    wait_until(partial(program.has_seen, 3))
    process.terminate()
    out, err = process.communicate(timeout=30)
    assert process.returncode == 75, err
    done = len(program.seen)
    assert out.startswith(f"notes: {done} delivered, 0 failed again, {100 - done} left\n")
    assert program.left() == 200 - done
    program.run("dead-letters", "replay", "--all", "--yes")
    assert len(program.seen) == len(set(program.seen)) == 100


JOURNAL: Final = """
    CREATE TABLE journal (
        place bigint GENERATED ALWAYS AS IDENTITY,
        id int,
        version text,
        times int DEFAULT 1,
        PRIMARY KEY (id, version)
    )
"""

LEDGER: Final = """
import os, pathlib
from walstream import Change, Walstream

mended = pathlib.Path(__file__).with_name("mended")
stream = Walstream()

@stream.on("public.orders", name="ledger", transactional=os.environ["TARGET"])
async def apply(change: Change, connection) -> None:
    await connection.execute(
        "INSERT INTO journal (id, version) VALUES (%s, %s)"
        " ON CONFLICT (id, version) DO UPDATE SET times = journal.times + 1",
        [change.row["id"], change.row["status"]],
    )
    if change.row["id"] % 4 == 0 and not mended.exists():
        raise ValueError
"""


@pytest.mark.timeout(180)
def test_each_change_is_applied_once_although_daemon_and_replay_are_killed(
    orders: Database, kind: str, tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    """Both at the same time, while the rows change."""
    orders.execute(JOURNAL)
    orders.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", orders.name)
    orders.execute("INSERT INTO orders SELECT id, '0' FROM generate_series(1, 20) AS id")
    program = Program(tmp_path, orders, kind, LEDGER)
    finished = threading.Event()

    def write() -> None:
        with orders.connect() as connection:
            while not finished.wait(0.01):  # seconds between two transactions
                connection.execute("UPDATE orders SET status = (status::int + 1)::text")

    def applied() -> int:
        return int(orders.execute("SELECT count(*) FROM journal")[0][0])

    def has_applied(count: int) -> bool:
        return applied() >= count

    writing = threading.Thread(target=write)
    writing.start()
    try:
        for is_mended in (False, False, True, True, True):
            if is_mended:
                program.mend()
            processes = [program.start("run")]
            wait_until(partial(has_applied, applied() + 50), 30)
            processes.append(program.start("dead-letters", "replay", "--all", "--yes"))
            wait_until(partial(has_applied, applied() + 300), 30)
            for process in processes:
                process.kill()
                process.communicate()
    finally:
        finished.set()
        writing.join()
    program.run("run", "--until", "now")
    program.run("dead-letters", "replay", "--all", "--yes")
    program.run("run", "--until", "now")
    assert program.left() == 0
    [(last,)] = orders.execute("SELECT DISTINCT status::int FROM orders")
    expected = [(number, str(version)) for number in range(1, 21) for version in range(last + 1)]
    rows = orders.execute("SELECT id, version FROM journal ORDER BY id, place")
    assert rows == expected
    assert orders.execute("SELECT count(*) FROM journal WHERE times > 1") == [(0,)]


# ---- Letters do not feed on themselves


async def test_a_route_for_everything_does_not_get_the_letters(
    orders: Database, tmp_path: Path
) -> None:
    """They are in the database that changes come from; only who names the table gets its rows."""
    named: list[str] = []
    stream = Stream(
        orders,
        dead_letters={"store": "postgres", "schema": "own"},
        handlers={"attempts": 1, "on_failure": "dead_letter"},
    )

    @stream.app.on("*.*", name="everything")
    async def fail(change: Change) -> None:
        raise ValueError

    @stream.app.on("own.dead_letters", "insert", name="watch")
    async def watch(change: Change) -> None:
        named.append(change.row["route"])

    orders.execute("INSERT INTO orders VALUES (1, 'new')")
    for _ in range(3):
        await stream.drain()
    assert [one.letter.route for one in await letters(stream)] == ["everything"]
    assert named == ["everything"]
    stream.close()


async def test_a_transactional_route_for_everything_does_not_get_its_own_position(
    orders: Database, file_stream: Stream
) -> None:
    calls: list[str] = []

    @file_stream.app.on("*.*", transactional=orders.dsn, name="everything")
    async def take(change: Change, connection: Any) -> None:
        calls.append(str(change.relation))
        if len(calls) == 1:
            raise ValueError

    orders.execute("INSERT INTO orders VALUES (1, 'new'), (2, 'new')")
    for _ in range(3):
        await file_stream.drain()
    await replay(file_stream)
    await file_stream.drain()
    assert set(calls) == {"public.orders"}
    assert len(calls) == 3
