"""A handler that is attached with history gets what was before, then what comes, and no gap."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest
import structlog

from tests.command_line import CommandLine
from tests.conftest import StartCluster
from tests.postgres import Database, wait_until
from tests.streaming import Stream
from walstream import Change, Walstream
from walstream.assembly import make_router
from walstream.config import parse
from walstream.coverage import disguised, uncovered
from walstream.daemon import Daemon
from walstream.errors import ConfigError, HandlerFailed, HistoryMissing
from walstream.journal import trim
from walstream.lsn import Lsn
from walstream.moments import parse_moment
from walstream.positions import BEGINNING, Position

EVERYTHING: Final = [{"table": "*.*", "to": "live"}]

MakeStream = Callable[..., Stream]


class Book:
    """What a handler was called with."""

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self.poison: set[int] = set()

    async def take(self, taken: Change | list[Change]) -> None:
        for change in taken if isinstance(taken, list) else [taken]:
            if change.row.get("id") in self.poison:
                raise ValueError("poison")
            self.changes.append(change)

    @property
    def ids(self) -> list[str]:
        return [change.id for change in self.changes]

    @property
    def numbers(self) -> list[int]:
        return [change.row["id"] for change in self.changes]


@pytest.fixture
def orders(database: Database) -> Database:
    database.execute("CREATE TABLE orders (id int PRIMARY KEY, status text, note text)")
    return database


@pytest.fixture
def make_stream(orders: Database, tmp_path: Path) -> Iterator[MakeStream]:
    """Make a stream with a journal, whose routes to the live sink can be said."""
    made: list[Stream] = []

    def make(routes: list[dict[str, Any]] = EVERYTHING, **config: Any) -> Stream:
        sections = {
            "journal": {"path": tmp_path / "journal"},
            "sinks": {"live": {"type": "live"}},
            "routes": routes,
            "handlers": {"backoff_seconds": 0.001, "max_backoff_seconds": 0.001, "attempts": 2},
            **config,
        }
        stream = Stream(orders, **sections)
        stream.record()
        made.append(stream)
        return stream

    yield make
    for stream in made:
        stream.close()


@pytest.fixture
def book() -> Book:
    return Book()


def write(database: Database, *numbers: int, status: str = "new") -> None:
    for number in numbers:
        database.execute("INSERT INTO orders VALUES (%s, %s, 'a note')", number, status)


def attach(stream: Stream, book: Book, **options: Any) -> None:
    route = {"since": "beginning", "name": "late", **options}
    stream.app.on("public.orders", "insert", **route)(book.take)


# ---- What a moment is


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2h", timedelta(hours=2)),
        ("90 s", timedelta(seconds=90)),
        ("30m", timedelta(minutes=30)),
        ("30min", timedelta(minutes=30)),
        ("7d", timedelta(days=7)),
        ("beginning", BEGINNING),
        ("0/16274F8:3", Position(Lsn(0x16274F8), 3)),
        ("0/16274F8", Position.after(Lsn(0x16274F8))),
        ("2026-11-22T12:00", datetime(2026, 11, 22, 12, tzinfo=UTC)),
        ("2026-11-22T12:00+02:00", datetime(2026, 11, 22, 10, tzinfo=UTC)),
        ("2026-11-22", datetime(2026, 11, 22, tzinfo=UTC)),
    ],
)
def test_a_moment_is_so_long_ago_a_time_or_a_place(text: str, moment: object) -> None:
    found = parse_moment(text)
    assert found == moment
    assert type(found) is type(moment)


@pytest.mark.parametrize("text", ["", "h", "2 hours", "-2h", "0/", "0/1:x", "now", "9999999999h"])
def test_anything_else_is_no_moment(text: str) -> None:
    with pytest.raises(ValueError, match="allowed: so long ago"):
        parse_moment(text)
    with pytest.raises(ConfigError, match=r"handler of a\.b: since: .*allowed: so long ago"):
        Walstream().on("a.b", since=text)


# ---- History, then live


async def test_history_comes_before_live_without_a_gap(
    make_stream: MakeStream, orders: Database, book: Book
) -> None:
    stream = make_stream()
    write(orders, *range(20))
    await stream.drain()
    attach(stream, book)
    write(orders, *range(20, 25))
    async with stream:
        await stream.drain()
        write(orders, *range(25, 30))
        await stream.drain()
    assert book.numbers == [*range(30)]
    assert book.ids == [change.id for change in stream.changes]
    assert book.changes[3].to_json() == stream.changes[3].to_json()


async def test_a_later_start_does_not_begin_again(
    make_stream: MakeStream, orders: Database, book: Book
) -> None:
    stream = make_stream()
    write(orders, 1, 2)
    await stream.drain()
    attach(stream, book)
    summary = await stream.drain()
    assert [route.matched for route in summary.routes if route.name == "late"] == [2]
    write(orders, 3)
    await stream.drain()
    await stream.drain()
    assert book.numbers == [1, 2, 3]


async def test_what_was_not_confirmed_comes_once(
    make_stream: MakeStream, orders: Database, book: Book
) -> None:
    """The journal has it already, and the stream brings it."""
    stream = make_stream()
    stream.app.on("public.orders", name="first")(Book().take)
    write(orders, 1, 2, 3)
    stream.crash_after(2)
    await stream.drain()
    assert stream.crashed
    attach(stream, book)
    await stream.drain()
    assert book.numbers == [1, 2, 3]


async def test_since_a_time_or_an_id(make_stream: MakeStream, orders: Database, book: Book) -> None:
    stream = make_stream()
    write(orders, 1, 2, 3, 4)
    await stream.drain()
    by_id, by_time, by_lsn = Book(), Book(), Book()
    second, third = stream.changes[1:3]
    attach(stream, by_id, since=second.id, name="by_id")
    attach(stream, by_lsn, since=str(second.end_lsn), name="by_lsn")
    attach(stream, by_time, since=third.commit_time.isoformat(), name="by_time")
    await stream.drain()
    assert by_id.numbers == by_lsn.numbers == by_time.numbers == [3, 4]


async def test_history_is_filtered_and_shown_as_the_route_says(
    make_stream: MakeStream, orders: Database, book: Book
) -> None:
    stream = make_stream(
        [{"table": "public.orders", "to": "live", "columns": {"mask": {"note": "redact"}}}]
    )
    write(orders, 1, 2)
    write(orders, 3, 4, status="paid")
    await stream.drain()
    attach(stream, book, where="status=eq.paid,id=gte.4", exclude="status")
    write(orders, 5, status="paid")
    await stream.drain()
    rows = [dict(change.row) for change in book.changes]
    assert rows == [{"id": 4, "note": "[redacted]"}, {"id": 5, "note": "a note"}]


@pytest.mark.parametrize(
    "options",
    [{"batch": 7}, {"transactions": True}, {"concurrency": 3}, {"visible": True}],
    ids=str,
)
async def test_handlers_of_all_kinds_get_history(
    make_stream: MakeStream, orders: Database, book: Book, options: dict[str, Any]
) -> None:
    stream = make_stream()
    orders.execute("INSERT INTO orders SELECT n FROM generate_series(1, 1200) n")
    write(orders, *range(1201, 1211))
    await stream.drain()
    attach(stream, book, **options)
    write(orders, 1211)
    await stream.drain()
    assert sorted(book.numbers) == [*range(1, 1212)]
    assert "concurrency" in options or book.numbers == sorted(book.numbers)


async def test_a_function_in_a_thread_gets_history(
    make_stream: MakeStream, orders: Database
) -> None:
    stream, numbers = make_stream(), []
    write(orders, 1, 2, 3)
    await stream.drain()

    @stream.app.on("public.orders", since="beginning")
    def late(change: Change) -> None:
        numbers.append(change.row["id"])

    await stream.drain()
    assert numbers == [1, 2, 3]


async def test_a_transactional_handler_gets_history_once(
    make_stream: MakeStream, orders: Database
) -> None:
    orders.execute("CREATE TABLE booked (id int)")
    stream = make_stream()
    write(orders, 1, 2, 3, 4)
    await stream.drain()

    @stream.app.on("public.orders", "insert", since="beginning", transactional=orders.dsn)
    async def book(change: Change, connection: Any) -> None:
        await connection.execute("INSERT INTO booked VALUES (%s)", [change.row["id"]])

    stream.crash_after(2)
    await stream.drain()
    write(orders, 5)
    await stream.drain()
    assert orders.execute("SELECT id FROM booked ORDER BY id") == [(n,) for n in (1, 2, 3, 4, 5)]


# ---- When it is interrupted


async def test_a_crash_while_catching_up_loses_nothing(
    make_stream: MakeStream, orders: Database, book: Book
) -> None:
    stream = make_stream()
    write(orders, *range(30))
    await stream.drain()
    attach(stream, book)
    lives = []
    for calls in (7, 5, 9):
        stream.crash_after(calls)
        await stream.drain()
        assert stream.crashed
        lives.append(len(book.changes))
    write(orders, 30)
    await stream.drain()
    assert list(dict.fromkeys(book.numbers)) == [*range(31)]


async def test_a_handler_that_fails_goes_on_where_it_was(
    make_stream: MakeStream, orders: Database, book: Book
) -> None:
    stream = make_stream()
    write(orders, *range(10))
    await stream.drain()
    attach(stream, book)
    book.poison = {4}
    with pytest.raises(HandlerFailed, match="late did not take change"):
        await stream.drain()
    assert book.numbers == [0, 1, 2, 3]
    book.poison.clear()
    await stream.drain()
    assert book.numbers == [*range(10)]


async def test_what_fails_becomes_a_dead_letter_when_its_route_says_so(
    make_stream: MakeStream, orders: Database, book: Book
) -> None:
    stream = make_stream()
    write(orders, *range(5))
    await stream.drain()
    attach(stream, book, on_failure="dead_letter")
    book.poison = {2}
    summary = await stream.drain()
    assert book.numbers == [0, 1, 3, 4]
    [late] = [one for one in summary.destinations if one.name == "late"]
    assert (late.delivered, late.dead_lettered) == (4, 1)


async def test_a_stop_finishes_what_is_in_hand(
    make_stream: MakeStream, orders: Database, async_wait_until: Callable[..., Any]
) -> None:
    stream = make_stream()
    write(orders, *range(5))
    await stream.drain()
    begun, may_end, numbers = asyncio.Event(), asyncio.Event(), []

    @stream.app.on("public.orders", since="beginning")
    async def late(change: Change) -> None:
        begun.set()
        await may_end.wait()
        numbers.append(change.row["id"])

    stream.start()
    await asyncio.wait_for(begun.wait(), 10)
    stopping = asyncio.create_task(stream.stop())
    asyncio.get_running_loop().call_later(0.1, may_end.set)
    await stopping
    assert numbers == [0]
    await stream.drain()
    assert numbers == [*range(5)]


async def test_the_server_waits_while_history_is_delivered(
    make_stream: MakeStream, orders: Database
) -> None:
    """Longer than wal_sender_timeout, with more on its way than the socket takes."""
    orders.execute(f"ALTER DATABASE {orders.name} SET wal_sender_timeout = '1s'")
    stream, numbers = make_stream(), []
    write(orders, 1, 2)
    await stream.drain()

    @stream.app.on("public.orders", since="beginning")
    async def late(change: Change) -> None:
        if change.row["id"] < 3:
            await asyncio.sleep(0.9)
        numbers.append(change.row["id"])

    orders.execute("INSERT INTO orders SELECT n, repeat('x', 900) FROM generate_series(3, 9999) n")
    summary = await stream.drain()
    assert numbers == [*range(1, 10_000)]
    assert summary.sessions == 1


async def test_a_server_that_shuts_down_is_not_held_up(
    private_cluster: StartCluster, tmp_path: Path, async_wait_until: Callable[..., Any]
) -> None:
    cluster = private_cluster()
    with Database(cluster.conninfo("postgres")) as database:
        database.execute("CREATE TABLE orders (id int PRIMARY KEY, status text, note text)")
        stream = Stream(
            database,
            journal={"path": tmp_path / "journal"},
            sinks={"live": {"type": "live"}},
            routes=EVERYTHING,
            stream={"after_shutdown_seconds": 0.2, "reconnect_seconds": 0.1},
        )
        stream.record()
        write(database, *range(40))
        await stream.drain()
        numbers: list[int] = []

        @stream.app.on("public.orders", since="beginning")
        async def late(change: Change) -> None:
            numbers.append(change.row["id"])
            await asyncio.sleep(0.03)

        stream.start()
        await async_wait_until(lambda: len(numbers) > 10)
    await asyncio.to_thread(cluster.stop)
    stopped_at = len(numbers)
    assert stopped_at < 40
    await asyncio.to_thread(cluster.start)
    await async_wait_until(lambda: numbers[-1] == 39, 20)
    await stream.stop()
    assert list(dict.fromkeys(numbers)) == [*range(40)]


HANDLERS: Final = """
import asyncio, os, pathlib
from walstream import Change, Walstream

seen = os.open(pathlib.Path(__file__).with_name("seen"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
stream = Walstream()

@stream.on("public.orders", "insert", since="beginning")
async def late(change: Change) -> None:
    await asyncio.sleep(0.01)
    os.write(seen, change.id.encode() + b"\\n")
"""


async def test_kill_9_while_catching_up_loses_nothing(
    make_stream: MakeStream, orders: Database, tmp_path: Path
) -> None:
    stream, command_line = make_stream(), CommandLine(tmp_path)
    orders.execute("INSERT INTO orders SELECT n FROM generate_series(1, 200) n")
    write(orders, *range(201, 301))
    await stream.drain()
    command_line.write(
        "walstream.toml",
        f"""
[postgres]
dsn = "{orders.dsn}"
[slot]
name = "{stream.slot}"
[journal]
path = "journal"
[sinks.live]
type = "live"
[[routes]]
table = "*.*"
to = "live"
""",
    )
    command_line.write("handlers.py", HANDLERS)
    seen = tmp_path / "seen"
    ends = [0]
    for _ in range(2):
        with command_line.running("run", "handlers:stream") as process:
            wait_until(lambda: seen.exists() and lines_of(seen) >= ends[-1] + 130, 20)
            process.send_signal(signal.SIGKILL)
            process.wait(10)
        ends.append(lines_of(seen))
    write(orders, 301)
    assert command_line.run("run", "handlers:stream", "--until", "now").returncode == 0
    expected = [change.id for change in stream.changes]
    ids = seen.read_text().split()
    assert list(dict.fromkeys(ids))[:-1] == expected
    assert len(expected) == 300
    assert ids[ends[1]] != expected[0]  # it does not begin again


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n")


# ---- When the journal does not go back far enough


async def test_a_journal_that_begins_later_is_refused(
    make_stream: MakeStream, orders: Database, book: Book
) -> None:
    stream = make_stream()
    write(orders, 1)
    await stream.drain()
    attach(stream, book, since="2h")
    with pytest.raises(HistoryMissing, match="late: the journal begins behind") as refused:
        await stream.drain()
    assert 'since="beginning"' in refused.value.hint
    assert book.numbers == []


async def test_all_that_there_is_can_be_asked_for(
    make_stream: MakeStream, orders: Database, book: Book, tmp_path: Path
) -> None:
    """The gap is told, and what is left comes."""
    stream = make_stream()
    write(orders, 1, 2)
    await stream.drain()
    attach(stream, book)
    book.poison = {2}
    with pytest.raises(HandlerFailed):
        await stream.drain()
    book.poison.clear()
    trim(tmp_path / "journal")
    write(orders, 3)
    with structlog.testing.capture_logs() as logs:
        await stream.drain()
    assert [log["handler"] for log in logs if log["event"] == "history_gap"] == ["late"]
    assert book.numbers == [1, 3]


# ---- What it needs


def configured(app: Walstream, **sections: Any) -> str:
    """Return what is wrong."""
    try:
        Daemon(parse(sections), app.handlers)
    except ConfigError as error:
        return "\n".join(error.problems)
    return ""


JOURNALED: Final = {"journal": {"path": "journal"}, "sinks": {"live": {"type": "live"}}}


def test_history_needs_a_journal_and_a_live_sink() -> None:
    app = Walstream()

    @app.on("public.orders", since="2h")
    async def late(change: Change) -> None: ...

    assert "late: since needs a journal" in configured(app)
    assert 'a sink of type "live"' in configured(app, journal={"path": "journal"})
    assert "none keeps each delete, insert, truncate, update" in configured(
        app, **JOURNALED, routes=[{"table": "public.customers", "to": "live"}]
    )
    assert not configured(app, **JOURNALED, routes=EVERYTHING)


def test_a_name_is_for_one_handler_with_history() -> None:
    app = Walstream()
    for _ in range(2):

        @app.on("public.orders", since="2h")
        async def late(change: Change) -> None: ...

    assert "late: 2 routes have this name" in configured(app, **JOURNALED, routes=EVERYTHING)


COVERED: Final[list[tuple[dict[str, Any], dict[str, Any], list[str]]]] = [
    ({}, {"table": "public.orders"}, []),
    ({}, {"table": "public.*"}, []),
    ({}, {"table": "*.orders"}, []),
    ({}, {"table": "public.order"}, ["delete", "insert", "truncate", "update"]),
    ({}, {"operations": ["insert", "update"]}, ["delete", "truncate"]),
    ({"operations": ["insert"]}, {"operations": ["insert", "update"]}, []),
    ({}, {"where": "id=gt.1"}, ["delete", "insert", "truncate", "update"]),
    ({"where": "id=gt.1"}, {"where": "id=gt.1"}, []),
    ({"where": "id=gt.1", "leaving": True}, {"where": "id=gt.1"}, ["delete", "insert", "update"]),
    ({"where": "id=gt.1", "leaving": True}, {"where": "id=gt.1", "leaving": True}, []),
    ({"where": "id=gt.1"}, {"where": "id=gt.2"}, ["delete", "insert", "update"]),
    ({}, {"changed": ["status"]}, ["update"]),
    ({"changed": ["status"]}, {"changed": ["status", "note"]}, []),
    ({"changed": ["status", "note"]}, {"changed": ["status"]}, ["update"]),
    (
        {"table": "public.*"},
        {"table": "public.orders", "operations": ["insert"]},
        ["delete", "insert", "truncate", "update"],
    ),
]


@pytest.mark.parametrize(("handler", "live", "lacking"), COVERED, ids=str)
def test_what_the_journal_lacks_is_named(
    handler: dict[str, Any], live: dict[str, Any], lacking: list[str]
) -> None:
    route, kept = routes_of(handler, live)
    assert uncovered(route, [kept]) == lacking


@pytest.mark.parametrize(
    ("handler", "columns", "found"),
    [
        ({"where": "note=eq.x,id=gt.1"}, {"mask": {"note": "redact"}}, ["note"]),
        ({"where": "note=eq.x"}, {"exclude": ["note"]}, ["note"]),
        ({"changed": ["note", "status"]}, {"include": ["id", "status"]}, ["note"]),
        ({"where": "id=gt.1"}, {"mask": {"note": "redact"}}, []),
        ({}, {"mask": {"note": "redact"}}, []),
    ],
    ids=str,
)
def test_a_filter_reads_no_masked_column(
    handler: dict[str, Any], columns: dict[str, Any], found: list[str]
) -> None:
    route, kept = routes_of(handler, {"columns": columns})
    assert disguised(route, [kept]) == found


def routes_of(handler: dict[str, Any], live: dict[str, Any]) -> tuple[Any, Any]:
    table = {"table": "public.orders"}
    routes = [
        {**table, **handler, "to": "out", "name": "handler"},
        {**table, **live, "to": "live", "name": "live"},
    ]
    sinks = {"out": {"type": "stdout"}, "live": {"type": "live"}}
    found = make_router(parse({"routes": routes, "sinks": sinks}), []).routes
    return found[0], found[1]
