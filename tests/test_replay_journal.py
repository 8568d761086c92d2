"""What is in the journal is delivered again, to one handler or sink, beside whatever runs."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import pytest
from typer.testing import CliRunner

from tests.command_line import CommandLine, slot_name
from tests.postgres import Database, wait_until
from tests.streaming import Stream
from walstream import Change, Walstream
from walstream.cli import app
from walstream.config import RouteSpec, parse
from walstream.errors import (
    ConfigError,
    ConnectionLost,
    HandlerFailed,
    HistoryMissing,
    UsageError,
)
from walstream.journal_replay import HistoryReplay, HistoryReport, Wish
from walstream.moments import parse_moment
from walstream.positions import BEGINNING, Position

EVERYTHING: Final = [{"table": "*.*", "to": "live"}]
NOWHERE: Final = "postgresql://nobody@127.0.0.1:1/nothing"

MakeStream = Callable[..., Stream]


class Book:
    """What a handler was called with."""

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self.calls: list[list[str]] = []
        self.poison: set[int] = set()

    async def take(self, taken: Change | list[Change]) -> None:
        changes = taken if isinstance(taken, list) else [taken]
        if any(change.row.get("id") in self.poison for change in changes):
            raise ValueError("poison")
        self.changes += changes
        self.calls.append([change.id for change in changes])

    @property
    def ids(self) -> list[str]:
        return [change.id for change in self.changes]

    @property
    def numbers(self) -> list[int]:
        return [change.row["id"] for change in self.changes]


@pytest.fixture
def orders(database: Database) -> Database:
    database.execute("CREATE TABLE orders (id int PRIMARY KEY, status text, note text)")
    database.execute("CREATE TABLE customers (id int PRIMARY KEY)")
    return database


@pytest.fixture
def make_stream(orders: Database, tmp_path: Path) -> Iterator[MakeStream]:
    """Make a stream with a journal, whose routes can be said."""
    made: list[Stream] = []

    def make(routes: Sequence[dict[str, Any]] = EVERYTHING, **config: Any) -> Stream:
        sections = {
            "journal": {"path": tmp_path / "journal"},
            "sinks": {
                "live": {"type": "live"},
                "file": {"type": "file", "path": tmp_path / "lines"},
            },
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


def application(book: Book, **options: Any) -> Walstream:
    app = Walstream()
    app.on("public.orders", **{"name": "again", **options})(book.take)
    return app


def replaying(stream: Stream, app: Walstream, **wish: Any) -> HistoryReplay:
    if "select" in wish:
        wish["selection"] = (RouteSpec.declared("options", **wish.pop("select")),)
    asked = wish.get("since", "beginning")
    moments: dict[str, Any]
    moments = {name: parse_moment(wish[name]) for name in ("since", "until") if name in wish}
    wish = {"to": "again", "since": BEGINNING, "asked": asked, **wish, **moments}
    return HistoryReplay(stream.config, app.handlers, Wish(**wish))


async def replay(stream: Stream, app: Walstream, **wish: Any) -> HistoryReport:
    again = replaying(stream, app, **wish)
    await again.run()
    return again.report()


# ---- What comes


async def test_everything_comes_again_as_it_was(
    make_stream: MakeStream, orders: Database, book: Book
) -> None:
    stream = make_stream()
    write(orders, 1, 2)
    orders.execute("UPDATE orders SET status = 'paid' WHERE id = 1")
    orders.execute("DELETE FROM orders WHERE id = 2")
    orders.execute("TRUNCATE orders")
    await stream.drain()
    confirmed = stream.confirmed_flush_lsn()
    report = await replay(stream, application(book))
    assert [one.to_json() for one in book.changes] == [one.to_json() for one in stream.changes]
    assert (report.delivered, report.kept, report.changes, report.is_done) == (5, 5, 5, True)
    assert report.position == str(Position.of(stream.changes[-1]))
    assert not report.lacking
    assert stream.confirmed_flush_lsn() == confirmed


@pytest.mark.parametrize(
    ("wish", "numbers"),
    [
        ({}, [1, 2, 3, 4]),
        ({"select": {"table": "public.orders"}}, [1, 2, 3, 4]),
        ({"select": {"table": "public.customers"}}, []),
        ({"select": {"table": "*.*", "where": "id=gte.3"}}, [3, 4]),
        ({"select": {"table": "*.*", "operations": ["update"]}}, []),
        ({"select": {"table": "*.*", "operations": ["insert"], "where": "status=eq.paid"}}, [4]),
    ],
    ids=str,
)
async def test_the_options_select(
    make_stream: MakeStream, orders: Database, book: Book, wish: dict[str, Any], numbers: list[int]
) -> None:
    stream = make_stream()
    orders.execute("INSERT INTO customers VALUES (1), (3)")
    write(orders, 1, 2, 3)
    write(orders, 4, status="paid")
    await stream.drain()
    await replay(stream, application(book), **wish)
    assert book.numbers == numbers


async def test_the_route_filters_and_shows_what_was_masked(
    make_stream: MakeStream, orders: Database, book: Book
) -> None:
    masked = {"mask": {"note": "redact"}}
    stream = make_stream([{"table": "public.orders", "to": "live", "columns": masked}])
    write(orders, 1, 2)
    write(orders, 3, 4, status="paid")
    await stream.drain()
    app = application(book, where="status=eq.paid,id=gte.4", exclude="status")
    report = await replay(stream, app)
    assert [dict(change.row) for change in book.changes] == [{"id": 4, "note": "[redacted]"}]
    assert (report.changes, report.kept) == (4, 1)


async def test_a_span_is_from_behind_one_id_to_another(
    make_stream: MakeStream, orders: Database, book: Book
) -> None:
    stream = make_stream()
    write(orders, *range(8))
    await stream.drain()
    ids, changes = [change.id for change in stream.changes], stream.changes
    app = application(book)
    await replay(stream, app, since=ids[2], until=ids[5])
    await replay(stream, app, since=str(changes[2].end_lsn), until=str(changes[5].end_lsn))
    times = [change.commit_time.isoformat() for change in changes]
    await replay(stream, app, since=times[3], until=times[6])
    assert book.numbers == [3, 4, 5] * 3


@pytest.mark.parametrize("options", [{"batch": 10}, {"concurrency": 4}, {"visible": True}], ids=str)
async def test_it_goes_through_batches_and_lanes(
    make_stream: MakeStream, orders: Database, book: Book, options: dict[str, Any]
) -> None:
    stream = make_stream()
    orders.execute("INSERT INTO orders SELECT n FROM generate_series(1, 1500) n")
    await stream.drain()
    report = await replay(stream, application(book, **options))
    assert sorted(book.numbers) == [*range(1, 1501)]
    assert len(book.calls) == (150 if "batch" in options else 1500)
    assert (report.delivered, report.is_done) == (1500, True)


async def test_whole_transactions_stay_whole(
    make_stream: MakeStream, orders: Database, book: Book
) -> None:
    """Also when the ids that are asked for are in the middle of one, or little may be in flight."""
    stream = make_stream(stream={"max_in_flight_changes": 100})
    for first in (1, 1301, 1311):
        last = 1300 if first == 1 else first + 9
        orders.execute(f"INSERT INTO orders SELECT n FROM generate_series({first}, {last}) n")
    await stream.drain()
    ids = [change.id for change in stream.changes]
    app = application(book, transactions=True)
    await replay(stream, app, since=ids[1200], until=ids[1304])
    assert [len(call) for call in book.calls] == [1300, 10]
    report = await replay(stream, app, since=str(stream.changes[1304].end_lsn))
    assert book.calls[2] == ids[1310:]
    assert report.is_done


async def test_a_sink_gets_it_too(
    make_stream: MakeStream, orders: Database, tmp_path: Path, book: Book
) -> None:
    routes = [*EVERYTHING, {"table": "public.orders", "to": "file", "where": "id=gt.1"}]
    stream = make_stream(routes)
    write(orders, 1, 2, 3)
    await stream.drain()
    lines = (tmp_path / "lines").read_bytes()
    report = await replay(stream, application(book), to="file")
    assert (tmp_path / "lines").read_bytes() == lines * 2
    assert report.delivered == 2


async def test_no_database_is_needed(make_stream: MakeStream, orders: Database, book: Book) -> None:
    stream = make_stream()
    write(orders, 1, 2, 3)
    await stream.drain()
    elsewhere = stream.config.postgres.declared("test", dsn=NOWHERE)
    stream.config = stream.config.model_copy(update={"postgres": elsewhere})
    await replay(stream, application(book, where="id=gte.2"))
    assert book.numbers == [2, 3]
    orders.execute("DROP TABLE orders")
    with pytest.raises(ConnectionLost):  # only a server reads such a number
        await replay(stream, application(book, where="id=gte. 2"))


async def test_a_dry_run_calls_nobody(
    make_stream: MakeStream, orders: Database, book: Book
) -> None:
    stream = make_stream()
    write(orders, 1, 2, 3)
    await stream.drain()
    report = await replay(stream, application(book, where="id=gt.1"), is_dry=True)
    assert (report.changes, report.kept, report.delivered, book.calls) == (3, 2, 0, [])


async def test_a_label_that_came_later_is_known(
    make_stream: MakeStream, orders: Database, book: Book
) -> None:
    orders.execute("CREATE TYPE mood AS ENUM ('sad', 'fine')")
    orders.execute("CREATE TABLE people (id int PRIMARY KEY, mood mood)")
    stream = make_stream()
    orders.execute("INSERT INTO people VALUES (1, 'sad'), (2, 'fine')")
    await stream.drain()
    async with stream:
        orders.execute("INSERT INTO people VALUES (3, 'fine')")
        await stream.drain()
        orders.execute("ALTER TYPE mood ADD VALUE 'happy'")
        orders.execute("INSERT INTO people VALUES (4, 'happy'), (5, 'sad')")
        await stream.drain()
    again = Walstream()
    again.on("public.people", where="mood=gte.fine", name="again")(book.take)
    await replay(stream, again)
    assert book.numbers == [2, 3, 4]
    assert [change.row["mood"] for change in book.changes] == ["fine", "fine", "happy"]


async def test_a_table_that_was_altered_is_shown_as_it_was(
    make_stream: MakeStream, orders: Database, book: Book
) -> None:
    stream = make_stream()
    write(orders, 1)
    await stream.drain()
    orders.execute("ALTER TABLE orders ADD weight int; INSERT INTO orders VALUES (2, 'new', '', 7)")
    await stream.drain()
    report = await replay(stream, application(book, where="weight=gt.5"))
    assert (book.numbers, report.absent) == ([2], 1)
    orders.execute("DROP TABLE orders")
    await replay(stream, application(book))
    assert [sorted(change.row) for change in book.changes[1:]] == [
        ["id", "note", "status"],
        ["id", "note", "status", "weight"],
    ]


async def test_leaving_is_what_the_handler_asks_for(
    make_stream: MakeStream, orders: Database, book: Book
) -> None:
    stream = make_stream(
        [{"table": "*.*", "to": "live", "where": "status=eq.new", "leaving": True}]
    )
    orders.execute("ALTER TABLE orders REPLICA IDENTITY FULL")
    write(orders, 1)
    orders.execute("UPDATE orders SET status = 'paid'")
    await stream.drain()
    await replay(stream, application(book))
    await replay(stream, application(book, where="status=eq.new", leaving=True))
    seen = [(str(change.operation), change.leaving) for change in book.changes]
    assert seen == [("insert", False), ("update", False), ("insert", False), ("update", True)]


# ---- When it does not go through


async def test_it_goes_on_where_it_failed(
    make_stream: MakeStream, orders: Database, book: Book
) -> None:
    stream = make_stream()
    write(orders, *range(10))
    await stream.drain()
    book.poison = {4}
    again = replaying(stream, application(book))
    with pytest.raises(HandlerFailed, match="again did not take change"):
        await again.run()
    report = again.report()
    assert (report.delivered, report.is_done, report.position) == (
        4,
        False,
        stream.changes[3].id,
    )
    book.poison.clear()
    report = await replay(stream, application(book), since=report.position)
    assert book.numbers == [*range(10)]
    assert report.is_done


async def test_a_failure_is_what_the_route_says(
    make_stream: MakeStream, orders: Database, book: Book
) -> None:
    stream = make_stream()
    write(orders, *range(5))
    orders.execute("UPDATE orders SET status = 'paid' WHERE id = 2")
    await stream.drain()
    book.poison = {2}
    report = await replay(stream, application(book, on_failure="skip"))
    assert (report.delivered, report.skipped, report.is_done) == (4, 2, True)
    report = await replay(stream, application(book, on_failure="dead_letter"))
    assert (report.delivered, report.dead_lettered, report.parked) == (4, 1, 1)


async def test_a_stop_finishes_what_is_in_hand_and_tells_where_to_go_on(
    make_stream: MakeStream, orders: Database, async_wait_until: Callable[..., Any]
) -> None:
    stream, numbers = make_stream(), []
    write(orders, *range(6))
    await stream.drain()
    app, may_go_on = Walstream(), asyncio.Event()

    @app.on("public.orders", name="again")
    async def slow(change: Change) -> None:
        numbers.append(change.row["id"])
        if len(numbers) == 3:
            await may_go_on.wait()

    again = replaying(stream, app)
    running = asyncio.create_task(again.run())
    await async_wait_until(lambda: len(numbers) == 3)
    again.stop()
    may_go_on.set()
    await running
    report = again.report()
    assert (numbers, report.is_done) == ([0, 1, 2], False)
    assert report.position == stream.changes[2].id
    await replay(stream, app, since=report.position)
    assert numbers == [*range(6)]


async def test_a_journal_that_begins_later_is_refused_unless_the_gap_is_accepted(
    make_stream: MakeStream, orders: Database, book: Book
) -> None:
    stream = make_stream()
    write(orders, 1, 2)
    await stream.drain()
    app = application(book)
    for since in ("2h", "0/1"):
        with pytest.raises(HistoryMissing, match=f"does not go back to {since}: it begins behind"):
            await replay(stream, app, since=since)
    assert not book.calls
    await replay(stream, app, since="2h", accept_gap=True)
    assert book.numbers == [1, 2]


# ---- What is refused


def refused(message: str, app: Walstream, **wish: Any) -> None:
    config = parse(
        {
            "journal": {"path": "journal"},
            "sinks": {"live": {"type": "live"}, "out": {"type": "stdout"}},
            "routes": [
                {"table": "*.*", "to": "live", "columns": {"mask": {"note": "redact"}}},
                {"table": "*.*", "to": "out"},
            ],
        }
    )
    with pytest.raises(UsageError, match=message):
        HistoryReplay(config, app.handlers, Wish(**{"since": timedelta(hours=2), **wish}))


def test_only_what_can_get_it_again_gets_it(book: Book) -> None:
    app = application(book)
    refused("--to: no route leads to a handler or sink called 'nobody'", app, to="nobody")
    refused("--to: live is the live sink", app, to="live")
    refused("a handler and a sink are both called out", application(book, name="out"), to="out")

    @app.on("public.orders", name="exactly", transactional=NOWHERE)
    async def exactly(change: Change, connection: Any) -> None: ...

    refused("--to: exactly is transactional", app, to="exactly")


def test_a_filter_reads_no_masked_column(book: Book) -> None:
    selection = (RouteSpec.declared("options", table="*.*", where="note=eq.x"),)
    refused("--where: the filter reads 'note'", application(book), to="again", selection=selection)
    app = application(book, where="note=eq.x")
    refused("again: the filter reads 'note', which a route", app, to="again")


def test_a_journal_is_needed(book: Book) -> None:
    with pytest.raises(ConfigError, match=r"journal\.path: is needed"):
        HistoryReplay(parse({}), application(book).handlers, Wish("again", BEGINNING))


# ---- The command


HANDLERS: Final = """
import asyncio, os, pathlib, sys
from walstream import Change, Walstream

stream = Walstream()

@stream.on("public.orders", "insert")
async def again(change: Change) -> None:
    if "replay" in sys.argv:
        print(change.row["id"], flush=True)
        await asyncio.sleep(float(os.environ.get("SLOW", "0")))
"""


@pytest.fixture
def command_line(orders: Database, tmp_path: Path) -> Iterator[CommandLine]:
    """A folder with a configuration; the slot is made with the first run."""
    command_line, slot = CommandLine(tmp_path), slot_name()
    command_line.write(
        "walstream.toml",
        f"""
[postgres]
dsn = "{orders.dsn}"
[slot]
name = "{slot}"
create = true
[handlers]
app = "handlers:stream"
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
    yield command_line
    orders.execute("SELECT pg_drop_replication_slot(%s)", slot)


def test_it_works_beside_a_running_walstream(command_line: CommandLine, orders: Database) -> None:
    with command_line.running("run") as process:
        command_line.wait_for("streaming")
        write(orders, *range(20))
        replays = ("replay", "--from-beginning", "--to", "again")

        def in_journal() -> bool:
            done = command_line.run(*replays, "--dry-run", "--json")
            return done.returncode == 0 and json.loads(done.stdout)["kept"] == 20

        wait_until(in_journal, 20)
        done = command_line.run(*replays, "--where", "id=gte.15")
        assert (done.returncode, done.stdout.split("\n")[:5]) == (0, ["15", "16", "17", "18", "19"])
        assert "again: 5 delivered of 20 changes behind 0/" in done.stdout
        assert "nothing is left" in done.stdout
        refusal = command_line.run("replay", "--since", "7d", "--to", "again")
        assert refusal.returncode == 78
        assert "HistoryMissing: the journal does not go back to 7d" in refusal.stderr
        process.terminate()
        assert process.wait(20) == 0
    assert not [line for line in command_line.log() if line["level"] in ("warning", "error")]


async def test_ctrl_c_stops_at_a_change(
    make_stream: MakeStream, orders: Database, tmp_path: Path
) -> None:
    stream, command_line = make_stream(), CommandLine(tmp_path)
    write(orders, *range(100))
    await stream.drain()
    command_line.write(
        "walstream.toml", '[handlers]\napp = "handlers:stream"\n[journal]\npath = "journal"'
    )
    command_line.write("handlers.py", HANDLERS)
    command_line.environment["SLOW"] = "0.02"
    with command_line.running("replay", "--from-beginning", "--to", "again") as process:
        assert process.stdout is not None
        first = [process.stdout.readline() for _ in range(5)]
        process.send_signal(signal.SIGINT)
        first += process.stdout.readlines()
        assert process.wait(20) == 0
    numbers = [int(line) for line in first if line.strip().isdecimal()]
    assert len(numbers) < 100
    position = first[-1].rpartition("go on with --since ")[2].strip()
    command_line.environment["SLOW"] = "0"
    rest = command_line.run("replay", "--since", position, "--to", "again").stdout.splitlines()
    numbers += [int(line) for line in rest if line.isdecimal()]
    assert numbers == [*range(100)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "again"], "replay since when?"),
        (["--since", "2h"], "replay to whom?"),
        (
            ["--to", "again", "--since", "2h", "--from-beginning"],
            "--since goes without --from-beginning",
        ),
        (
            ["--to", "again", "--since", "yesterday"],
            "--since: found 'yesterday'; allowed: so long ago",
        ),
        (["--to", "again", "--since", "2h", "-o", "insert,drop"], "options: operations"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["replay", *options])
    assert isinstance(done.exception, UsageError | ConfigError)
    assert message in done.exception.message
