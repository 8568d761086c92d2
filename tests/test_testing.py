"""What is shipped for testing handlers: the plugin, streams that crash, changes made by hand."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
import threading
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from ipaddress import IPv4Address, IPv6Network
from typing import Any, Final
from uuid import UUID

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg.types.json import Jsonb
from psycopg.types.range import Range
from pydantic import BaseModel

from tests.postgres import Database, async_wait_until
from tests.test_documents import ROOT, blocks
from walstream import Change, Lsn, Message, UnchangedValueError, Walstream
from walstream.changes import Operation
from walstream.errors import ConfigError, FilterError, HandlerFailed, RowInvalid
from walstream.keys import keys_of
from walstream.testing import (
    DrainTimedOut,
    HandlerStream,
    MakeStream,
    NotCrashed,
    StartCluster,
    delete,
    insert,
    message,
    new_transaction,
    passes,
    routed,
    truncate,
    update,
)


@pytest.fixture
def orders(database: Database) -> Database:
    """A table to write to, and one for what handlers do about it."""
    database.execute(
        "CREATE TABLE orders (id int PRIMARY KEY, amount numeric);"
        "CREATE TABLE booked (order_id int, amount numeric)"
    )
    return database


def order(database: Database, *numbers: int) -> None:
    """Write each order in a transaction of its own."""
    for number in numbers:
        database.execute("INSERT INTO orders VALUES (%s, %s)", number, number)


class Ledger:
    """Handlers that book orders, each in its way."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.seen: list[int] = []
        self.release = threading.Event()

    async def in_the_loop(self, change: Change) -> None:
        await asyncio.sleep(0)
        self.seen.append(change.key["id"])

    def in_a_thread(self, change: Change) -> None:
        self.seen.append(change.key["id"])

    async def in_batches(self, changes: list[Change]) -> None:
        self.seen += [change.key["id"] for change in changes]

    async def never_returning(self, change: Change) -> None:
        self.seen.append(change.key["id"])
        await asyncio.get_running_loop().create_future()

    def until_released(self, change: Change) -> None:
        self.seen.append(change.key["id"])
        self.release.wait(20)

    async def once(self, change: Change, connection: psycopg.AsyncConnection) -> None:
        self.seen.append(change.key["id"])
        await connection.execute("INSERT INTO booked VALUES (%s, 1)", [change.key["id"]])


@pytest.fixture
def ledger(orders: Database) -> Ledger:
    return Ledger(orders)


# ---- Draining


@pytest.mark.parametrize("kind", ["in_the_loop", "in_a_thread"])
async def test_drain_returns_when_all_that_is_committed_is_taken(
    ledger: Ledger, walstream_stream: MakeStream, kind: str
) -> None:
    app = Walstream()
    app.on("public.orders")(getattr(ledger, kind))
    stream = walstream_stream(app)
    order(ledger.database, 1, 2)
    assert (await stream.drain()).changes == 2
    order(ledger.database, 3)
    assert (await stream.drain()).changes == 1
    assert ledger.seen == [1, 2, 3]


async def test_what_was_committed_before_the_stream_was_made_does_not_come(
    ledger: Ledger, walstream_stream: MakeStream
) -> None:
    order(ledger.database, 1)
    stream = walstream_stream()
    order(ledger.database, 2)
    await stream.drain()
    assert [change.key["id"] for change in stream.changes] == [2]
    assert isinstance(stream.confirmed_flush_lsn(), Lsn)
    assert stream.confirmed_flush_lsn() >= stream.changes[0].end_lsn


async def test_a_stream_beside_the_test_drains_again_and_again(
    ledger: Ledger, walstream_stream: MakeStream
) -> None:
    app = Walstream()
    app.on("public.orders")(ledger.in_the_loop)
    async with walstream_stream(app) as stream:
        for number in range(5):
            order(ledger.database, number)
            await stream.drain()
            assert ledger.seen == list(range(number + 1))
        with pytest.raises(RuntimeError, match="run already"):
            stream.start()
        with pytest.raises(RuntimeError, match="crash or stop"):
            await stream.redeliver()
    assert not stream.is_running
    assert stream.confirmed_flush_lsn() > Lsn(0)


async def test_the_application_stays_as_it_is(ledger: Ledger, walstream_stream: MakeStream) -> None:
    app = Walstream()
    app.on("public.orders")(ledger.in_the_loop)
    [(spec, handler)] = app.handlers
    function = handler.function
    stream = walstream_stream(app)
    stream.record("public.orders", "insert", exclude=["amount"])
    stream.app.on("public.orders")(ledger.in_a_thread)
    order(ledger.database, 1)
    await stream.drain()
    assert sorted(ledger.seen) == [1, 1]
    assert [dict(change.row) for change in stream.changes] == [{"id": 1}]
    assert app.handlers == [(spec, handler)]
    assert handler.function == function


async def test_messages_come_to_what_is_attached_for_the_test(
    ledger: Ledger, walstream_stream: MakeStream
) -> None:
    messages: list[Message] = []
    stream = walstream_stream()
    stream.app.on_message("jobs.*")(messages.append)
    ledger.database.execute("SELECT pg_logical_emit_message(true, 'jobs.a', 'mow')")
    await stream.drain()
    assert [(one.prefix, one.content) for one in messages] == [("jobs.a", "mow")]


async def test_what_a_handler_raised_is_the_cause(
    ledger: Ledger, walstream_stream: MakeStream
) -> None:
    """It is not called again, and its own traceback is there."""
    calls = []
    stream = walstream_stream()

    @stream.app.on("public.orders")
    async def fail(change: Change) -> None:
        calls.append(change.id)
        raise LookupError("no such customer")

    order(ledger.database, 1)
    with pytest.raises(HandlerFailed) as failed:
        await stream.drain()
    cause = failed.value.__cause__
    assert isinstance(cause, LookupError)
    places = [place.name for place in pytest.ExceptionInfo.from_exception(cause).traceback]
    assert places[-1] == "fail"
    assert len(calls) == 1
    async with stream:
        with pytest.raises(HandlerFailed):
            await stream.drain()
    with pytest.raises(HandlerFailed):  # also where nobody has waited for it
        async with stream:
            await async_wait_until(lambda: not stream.is_running)


async def test_the_configuration_is_the_test_s_own(
    ledger: Ledger, walstream_stream: MakeStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment may lead to a database that is no test's."""
    monkeypatch.setenv("WALSTREAM_POSTGRES_DSN", "host=production.example")
    monkeypatch.setenv("WALSTREAM_SLOT_NAME", "production")
    stream = walstream_stream(
        handlers={"attempts": 3, "backoff_seconds": 0.01},
        postgres={"dsn": "host=other.example"},
        slot={"name": "other"},
    )
    failures = [OSError(), OSError()]

    @stream.app.on("public.orders")
    async def fail_twice(_: Change) -> None:
        if failures:
            raise failures.pop()

    order(ledger.database, 1)
    assert (await stream.drain()).retries == 2
    assert stream.config.slot.name == stream.slot
    with pytest.raises(ConfigError, match=r"walstream_stream: handlers\.attempts"):
        walstream_stream(handlers={"attempts": 0})


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("kind", ["never_returning", "until_released"])
async def test_a_drain_that_takes_too_long_says_who_holds_what(
    ledger: Ledger, walstream_stream: MakeStream, kind: str, *, beside: bool
) -> None:
    stream = walstream_stream(stream={"drain_seconds": 0.1})
    stream.app.on("public.orders", name="hold")(getattr(ledger, kind))
    if beside:
        stream.start()
    order(ledger.database, 1)
    asyncio.get_running_loop().call_later(1.0, ledger.release.set)
    with pytest.raises(DrainTimedOut, match=r"0\.5 seconds: hold has held \w+/\w+:1 for 0\.\d"):
        await stream.drain(timeout_seconds=0.5)
    if beside:
        await stream.stop()
    assert ledger.seen == [1]


async def test_dead_letters_of_a_test_are_its_own(
    ledger: Ledger, walstream_stream: MakeStream
) -> None:
    stream = walstream_stream()

    @stream.app.on("public.orders", on_failure="dead_letter")
    async def fail(_: Change) -> None:
        raise OSError

    order(ledger.database, 1)
    await stream.drain()
    assert stream.config.dead_letters.path.exists()
    assert not stream.config.dead_letters.path.is_relative_to(ROOT)


async def test_the_slot_is_dropped_also_from_under_a_stream(
    ledger: Ledger, walstream_dsn: str
) -> None:
    stream = HandlerStream(walstream_dsn)
    stream.start()
    slots = "SELECT count(*) FROM pg_replication_slots WHERE slot_name LIKE %s"
    own = f"{stream.slot}%"
    await async_wait_until(lambda: ledger.database.execute(f"{slots} AND active", own) == [(1,)])
    assert ledger.database.execute(slots, own) == [(2,)]
    await stream.crash()
    stream.close()
    assert ledger.database.execute(slots, own) == [(0,)]


async def test_where_no_second_slot_is_free_nothing_is_left(
    walstream_private_cluster: StartCluster,
) -> None:
    with Database(walstream_private_cluster({"max_replication_slots": "1"}).conninfo()) as database:
        with pytest.raises(psycopg.errors.ConfigurationLimitExceeded):
            HandlerStream(database.dsn)
        assert database.execute("SELECT slot_name FROM pg_replication_slots") == []
        connected = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
        await async_wait_until(lambda: database.execute(connected) == [(1,)])


# ---- Crashing


@pytest.mark.parametrize("kind", ["in_the_loop", "in_a_thread"])
async def test_after_a_crash_nothing_is_called_and_nothing_confirmed(
    ledger: Ledger, walstream_stream: MakeStream, kind: str
) -> None:
    app = Walstream()
    app.on("public.orders")(getattr(ledger, kind))
    stream = walstream_stream(app)
    stream.record("public.orders")
    order(ledger.database, 1)
    await stream.drain()
    confirmed = stream.confirmed_flush_lsn()
    order(ledger.database, 2, 3, 4, 5)
    stream.crash_after(3)
    await stream.drain()
    assert (stream.crashed, ledger.seen) == (True, [1, 2, 3, 4])
    assert stream.confirmed_flush_lsn() == confirmed
    again = await stream.redeliver()
    assert (stream.crashed, ledger.seen) == (False, [1, 2, 3, 4, 2, 3, 4, 5])
    assert again[:3] == list(dict.fromkeys(change.id for change in stream.changes))[1:4]
    assert stream.confirmed_flush_lsn() > confirmed


async def test_everything_can_be_delivered_again_without_a_crash(
    ledger: Ledger, walstream_stream: MakeStream
) -> None:
    app = Walstream()
    app.on("public.orders")(ledger.in_the_loop)
    stream = walstream_stream(app)
    order(ledger.database, 1)
    await stream.drain()
    order(ledger.database, 2, 3)
    await stream.drain()
    assert len(await stream.redeliver()) == 2
    assert ledger.seen == [1, 2, 3, 2, 3]
    order(ledger.database, 4)
    assert len(await stream.redeliver()) == 2
    assert ledger.seen == [1, 2, 3, 2, 3, 2, 3, 4]


async def test_a_crash_before_the_first_call(ledger: Ledger, walstream_stream: MakeStream) -> None:
    app = Walstream()
    app.on("public.orders")(ledger.in_a_thread)
    stream = walstream_stream(app)
    order(ledger.database, 1)
    stream.crash_after(0)
    await stream.drain()
    assert (stream.crashed, ledger.seen) == (True, [])
    assert await stream.redeliver() == []
    assert ledger.seen == [1]


async def test_a_crash_that_is_not_reached_fails_the_test(
    ledger: Ledger, walstream_stream: MakeStream
) -> None:
    app = Walstream()
    app.on("public.orders")(ledger.in_the_loop)
    stream = walstream_stream(app)
    order(ledger.database, 1, 2)
    stream.crash_after(3)
    with pytest.raises(NotCrashed, match=r"crash_after\(3\) .* 2 calls"):
        await stream.drain()
    order(ledger.database, 3)
    await stream.drain()
    with pytest.raises(ValueError, match="not -1"):
        stream.crash_after(-1)


async def test_a_crash_beside_the_test(ledger: Ledger, walstream_stream: MakeStream) -> None:
    app = Walstream()
    app.on("public.orders")(ledger.in_the_loop)
    async with walstream_stream(app) as stream:
        order(ledger.database, 1)
        await stream.drain()
        stream.crash_after(1)
        order(ledger.database, 2, 3)
        await stream.drain()
        assert stream.crashed
        assert not stream.is_running
        stream.start()
        await stream.drain()
        assert ledger.seen == [1, 2, 1, 2, 3]
        await stream.crash()
        with pytest.raises(RuntimeError, match="nothing to crash"):
            await stream.crash()


async def test_a_crash_of_lanes_batches_and_messages(
    ledger: Ledger, walstream_stream: MakeStream
) -> None:
    """Calls are counted whatever they were called with; one that is in the middle never ends."""
    messages: list[str] = []
    stream = walstream_stream()
    stream.app.on("public.orders", batch=2)(ledger.in_batches)

    @stream.app.on_message("jobs.*")
    def note(taken: Message) -> None:
        messages.append(taken.content)

    order(ledger.database, 1, 2, 3, 4)
    ledger.database.execute("SELECT pg_logical_emit_message(true, 'jobs.a', 'mow')")
    stream.crash_after(2)
    await stream.drain()
    assert len(ledger.seen) / 2 + len(messages) == 2
    await stream.redeliver()
    assert set(ledger.seen) == {1, 2, 3, 4}
    assert set(messages) == {"mow"}
    other = walstream_stream()
    other.app.on("public.orders", concurrency=4)(ledger.never_returning)
    other.app.on("public.orders")(ledger.in_the_loop)
    order(ledger.database, 5, 6)
    other.crash_after(2)
    await other.drain()
    assert other.crashed


async def test_a_transactional_handler_has_done_it_once(
    ledger: Ledger, walstream_stream: MakeStream
) -> None:
    """The call that a crash follows is not committed; what is committed is not called again."""
    stream = walstream_stream()
    stream.app.on("public.orders", transactional=ledger.database.dsn, name="book")(ledger.once)
    order(ledger.database, 1, 2, 3)
    stream.crash_after(2)
    await stream.drain()
    assert ledger.database.execute("SELECT order_id FROM booked") == [(1,)]
    assert len(await stream.redeliver()) == 1
    assert ledger.seen == [1, 2, 2, 3]
    assert ledger.database.execute("SELECT order_id FROM booked") == [(1,), (2,), (3,)]
    assert await stream.redeliver() == []


# ---- The plugin


def test_the_plugin_is_cheap() -> None:
    """pytest loads it in every project: it brings nothing along."""
    code = "import sys, pytest; before = set(sys.modules); import _walstream_pytest;"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{code} print(*(set(sys.modules) - before))"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert done.stdout.split() == ["_walstream_pytest"]


def test_every_fixture_has_our_prefix_and_tells_what_it_is(pytester: pytest.Pytester) -> None:
    listed = pytester.runpytest_subprocess("-p", "no:cacheprovider", "--fixtures", "-v")
    [ours] = str(listed.stdout).split("fixtures defined from _walstream_pytest")[1:]
    ours = ours.partition("fixtures defined from")[0]
    assert "walstream_stream -- " in ours
    assert "no docstring available" not in ours
    names = [line.split()[0] for line in ours.splitlines() if " -- " in line]
    assert all(name.startswith("walstream_") for name in names)
    page = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
    assert [name for name in names if f"`{name}`" not in page] == []


SETTINGS: Final = """\
[pytest]
asyncio_mode = auto
asyncio_default_fixture_loop_scope = function
filterwarnings = error
"""


@pytest.fixture
def project(
    pytester: pytest.Pytester, walstream_server: str, monkeypatch: pytest.MonkeyPatch
) -> pytest.Pytester:
    """A user's project, with the server of this session."""
    for variable in ("WALSTREAM_PG_BIN", "CI"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("WALSTREAM_TEST_DSN", walstream_server)
    pytester.makeini(SETTINGS)
    return pytester


def run(project: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return project.runpytest_subprocess("-p", "no:cacheprovider", *arguments)


def test_a_project_that_does_not_use_it_notices_nothing(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where walstream cannot be imported, for want of libpq."""
    monkeypatch.setenv("PSYCOPG_IMPL", "missing")
    project.makepyfile(
        """
        import sys

        def test_nothing():
            assert "walstream" not in sys.modules
            assert "psycopg" not in sys.modules
        """
    )
    run(project, "-W", "error", "--strict-markers", "--strict-config").assert_outcomes(passed=1)


def test_each_test_has_a_database_of_its_own(
    project: pytest.Pytester, walstream_server: str
) -> None:
    project.makepyfile(
        """
        import pytest

        @pytest.mark.parametrize("number", [1, 2])
        def test_tables_do_not_meet(walstream_database, walstream_dsn, number):
            assert walstream_dsn == walstream_database.dsn
            walstream_database.execute("CREATE TABLE t ()")
            walstream_database.execute(
                "SELECT pg_create_logical_replication_slot(%s, 'wal2json')", f"left_behind_{number}"
            )

        async def test_what_still_runs_is_ended(walstream_stream, walstream_database):
            stream = walstream_stream()
            async with stream:
                await stream.drain()
            stream = walstream_stream()
            walstream_database.execute("CREATE TABLE t (id int PRIMARY KEY)")
            walstream_database.execute("INSERT INTO t VALUES (1)")
            await stream.drain()
            assert [change.row["id"] for change in stream.changes] == [1]
        """
    )
    run(project).assert_outcomes(passed=3)
    with psycopg.connect(walstream_server) as connection:
        left = connection.execute(
            "SELECT slot_name FROM pg_replication_slots WHERE slot_name LIKE 'left_behind_%'"
        ).fetchall()
    assert left == []


@pytest.mark.parametrize("way", ["option", "fixture", "argument"])
def test_a_database_of_ones_own_can_be_given(
    project: pytest.Pytester, database: Database, way: str
) -> None:
    database.execute("CREATE TABLE mine (id int PRIMARY KEY)")
    given = {"option": "", "fixture": "", "argument": f"dsn={database.dsn!r}"}
    if way == "option":
        project.makeini(f"{SETTINGS}walstream_dsn = {database.dsn}\n")
    if way == "fixture":
        project.makeconftest(
            f"""
            import pytest

            @pytest.fixture
            def walstream_dsn():
                return {database.dsn!r}
            """
        )
    project.makepyfile(
        f"""
        import psycopg

        async def test_mine(walstream_stream):
            stream = walstream_stream({given[way]})
            with psycopg.connect({database.dsn!r}) as connection:
                connection.execute("INSERT INTO mine VALUES (1)")
            await stream.drain()
            assert [str(change.relation) for change in stream.changes] == ["public.mine"]
        """
    )
    run(project).assert_outcomes(passed=1)
    assert database.execute("SELECT count(*) FROM mine") == [(1,)]
    slots = "SELECT slot_name FROM pg_replication_slots WHERE database = current_database()"
    assert database.execute(slots) == []


@pytest.mark.parametrize(("ci", "outcome"), [("", "skipped"), ("true", "errors")])
def test_without_a_server_tests_are_skipped_and_fail_under_ci(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, ci: str, outcome: str
) -> None:
    monkeypatch.delenv("WALSTREAM_TEST_DSN")
    monkeypatch.setenv("WALSTREAM_PG_BIN", str(project.path))
    monkeypatch.setenv("CI", ci)
    project.makepyfile("def test_something(walstream_database): pass")
    result = run(project, "-rs")
    result.assert_outcomes(**{outcome: 1})
    assert "WALSTREAM_PG_BIN" in str(result.stdout)


def test_a_private_cluster_is_started_with_settings(project: pytest.Pytester) -> None:
    project.makepyfile(
        """
        import psycopg

        def test_settings(walstream_private_cluster):
            cluster = walstream_private_cluster({"max_replication_slots": "3"})
            with psycopg.connect(cluster.conninfo()) as connection:
                assert connection.execute("SHOW max_replication_slots").fetchone() == ("3",)
        """
    )
    run(project).assert_outcomes(passed=1)


def test_the_page_about_testing_is_true(project: pytest.Pytester) -> None:
    """Its blocks are a project: an application, a conftest, and files of tests."""
    shown = blocks("python", documents=[ROOT / "docs" / "testing.md"])
    names = {"application": "orders.py", "conftest": "conftest.py"}
    tests = 0
    for number, block in enumerate(shown):
        [mark] = block.marks
        name = names.get(mark, f"test_{number}.py")
        assert mark in {"application", "conftest", "tests"}
        (project.path / name).write_text(block.text, encoding="utf-8")
        tests += block.text.count("def test_")
    result = run(project)
    result.assert_outcomes(passed=tests)
    assert tests > 5


# ---- Changes made by hand


def test_a_built_change_is_like_one_that_came() -> None:
    change = insert("public.orders", {"id": 1, "amount": Decimal("12.50"), "note": None})
    assert (change.operation, str(change.relation)) == (Operation.INSERT, "public.orders")
    assert dict(change.row) == {"id": 1, "amount": Decimal("12.50"), "note": None}
    assert (dict(change.key), dict(change.identity), change.unchanged) == ({"id": 1}, {}, ())
    as_json = json.loads(change.to_json())
    assert as_json["row"] == {"id": 1, "amount": 12.5, "note": None}
    assert as_json["id"] == change.id == f"{change.end_lsn}:1"
    assert change.commit_time.tzinfo is not None
    assert keys_of(change) == (("public.orders", b"[1]"),)


def test_an_update_carries_the_key_unless_more_is_said() -> None:
    change = update("public.orders", {"id": 1, "amount": 2}, unchanged=["notes"])
    assert (dict(change.identity), change.unchanged) == ({"id": 1}, ("notes",))
    with pytest.raises(UnchangedValueError):
        change.row["notes"]
    full = update("public.orders", {"id": 2, "amount": 2}, identity={"id": 1, "amount": 1})
    assert dict(full.identity) == {"id": 1, "amount": 1}
    assert full.layout.is_full
    assert len(keys_of(full)) == 2
    with pytest.raises(ValueError, match="amount: a column that is unchanged"):
        update("public.orders", {"id": 1, "amount": 2}, unchanged=["amount"])


def test_deletes_truncates_and_messages() -> None:
    gone = delete("public.orders", {"code": "a", "amount": None}, key=["code"])
    assert (dict(gone.row), dict(gone.key)) == ({}, {"code": "a"})
    empty = truncate("public.orders")
    assert (empty.operation, json.loads(empty.to_json())["row"]) == (Operation.TRUNCATE, None)
    said = message("jobs.mow", "the lawn")
    assert (said.prefix, said.content, said.id.endswith(":1")) == ("jobs.mow", "the lawn", True)
    alone = message("jobs.mow", "now", transactional=False)
    assert (alone.transaction, alone.id) == (None, str(alone.lsn))
    with pytest.raises(ValueError, match="belongs to no transaction"):
        message("a", "b", transactional=False, transaction=new_transaction())


def test_changes_have_their_places() -> None:
    first = insert("public.orders", {"id": 1})
    second = insert("public.orders", {"id": 1})
    third = insert("public.orders", {"id": 2}, transaction=second.transaction)
    fourth = message("a", "b", transaction=second.transaction)
    assert first.commit_lsn < first.end_lsn < second.commit_lsn < fourth.lsn
    assert first.xid < second.xid == third.xid
    assert [one.ordinal for one in (first, second, third, fourth)] == [1, 1, 2, 3]
    at = datetime(2026, 3, 4, 5, 6, 7, 8, tzinfo=timezone(timedelta(hours=2)))
    assert new_transaction(commit_time=at).commit_time == at


def test_what_cannot_come_is_refused() -> None:
    with pytest.raises(ValueError, match="not a table"):
        insert("orders", {"id": 1})
    with pytest.raises(ValueError, match="not one table"):
        insert("public.*", {"id": 1})
    with pytest.raises(ValueError, match="no such column"):
        insert("public.orders", {"id": 1}, key=["code"])
    with pytest.raises(ValueError, match="no such column"):
        insert("public.orders", {"id": 1}, types={"code": "text"})
    with pytest.raises(ValueError, match="not a built-in type"):
        insert("public.orders", {"id": 1}, types={"id": "order_id"})
    with pytest.raises(TypeError, match="cannot hold a value of the class object"):
        insert("public.orders", {"id": object()})
    with pytest.raises(TypeError, match="a list cannot be a value of the type int4"):
        insert("public.orders", {"id": [1]}, types={"id": "int4"})


VALUES: Final[list[tuple[str, Any]]] = [
    ("bool", True),
    ("int8", -(1 << 62)),
    ("int4", 7),
    ("numeric", Decimal("1.50")),
    ("numeric", 1 << 70),
    ("float8", 1.5),
    ("float8", -1e300),
    ("text", 'a "quoted" {Ünïcode} \\ text\n'),
    ("bytea", b"\x00\xff"),
    ("date", date(2024, 2, 29)),
    ("time", time(1, 2, 3, 450000)),
    ("timetz", time(1, 2, 3, tzinfo=timezone(timedelta(hours=2)))),
    ("timetz", time(1, 2, 3, tzinfo=timezone(timedelta(hours=-3, minutes=-30)))),
    ("timestamp", datetime(2024, 2, 29, 12, 0)),  # noqa: DTZ001 - of a column without a zone
    ("timestamptz", datetime(2024, 2, 29, 12, 0, 0, 120000, tzinfo=UTC)),
    ("timestamptz", datetime(2024, 2, 29, 12, tzinfo=timezone(timedelta(hours=5)))),
    ("interval", timedelta(days=1, hours=2, milliseconds=5)),
    ("interval", timedelta(hours=-2)),
    ("interval", timedelta(days=400)),
    ("interval", timedelta()),
    ("uuid", UUID("a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11")),
    ("jsonb", {"a": [1, None, "x"], "bc": 1.5}),
    ("inet", IPv4Address("10.0.0.1")),
    ("cidr", IPv6Network("2001:db8::/32")),
    ("int4range", Range(1, 5, "[)")),
    ("int8[]", [1, None, 3]),
    ("int8[]", [[1, 2], [3, 4]]),
    ("text[]", ["a", "", "NULL", 'say "hi"', "a,b", "{}", "\\", None]),
    ("text[]", []),
    ("bool[]", [True, False]),
    ("numeric[]", [Decimal("1.50")]),
    ("bytea[]", [b"\x00\xff"]),
    ("timestamptz[]", [datetime(2024, 2, 29, 12, tzinfo=UTC)]),
    ("uuid[]", [UUID("a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11")]),
    ("jsonb[]", [{"a": 1}, [2]]),
]


async def test_values_are_sent_as_wal2json_sends_them(
    database: Database, walstream_stream: MakeStream
) -> None:
    """The same type, the same text, the same object, the same JSON, for each kind of value."""
    columns = {f"c{number}": sql_type for number, (sql_type, _) in enumerate(VALUES)}
    row = {f"c{number}": value for number, (_, value) in enumerate(VALUES)}
    declared = ", ".join(f"{name} {sql_type}" for name, sql_type in columns.items())
    database.execute(f"CREATE TABLE t ({declared})")
    stream = walstream_stream()
    parameters = [
        [Jsonb(one) for one in value]
        if columns[name] == "jsonb[]"
        else Jsonb(value)
        if columns[name] == "jsonb"
        else value
        for name, value in row.items()
    ]
    database.execute(f"INSERT INTO t VALUES ({', '.join(['%s'] * len(row))})", *parameters)
    await stream.drain()
    [came] = stream.changes
    needs_telling = ("int4", "int4range", "jsonb[]")
    types = {name: one for name, one in columns.items() if one in needs_telling}
    built = insert("public.t", row, types=types)
    assert came.new_columns is not None
    assert built.new_columns is not None
    for one, other in zip(built.new_columns, came.new_columns, strict=True):
        assert (one.name, columns[one.name], one.typeoid) == (
            other.name, columns[other.name], other.typeoid,
        )  # fmt: skip
        assert bytes(one.value).strip(b'"') == bytes(other.value).strip(b'"'), columns[one.name]
    assert dict(built.row) == dict(came.row) == row
    assert json.loads(built.to_json())["row"] == json.loads(came.to_json())["row"]


PLAIN: Final = st.one_of(
    st.booleans(),
    st.integers(-(1 << 63), (1 << 63) - 1),
    st.decimals(allow_nan=False).filter(lambda value: not value.is_snan()),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    st.binary(),
    st.dates(),
    st.times(),
    st.datetimes(),
    st.datetimes(
        datetime(2, 1, 1),  # noqa: DTZ001 - Hypothesis adds the zone
        datetime(9998, 1, 1),  # noqa: DTZ001
        timezones=st.timezones(),
    ),
    st.timedeltas(timedelta(days=-100_000), timedelta(days=100_000)),
    st.uuids(),
)
JSON: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("ab"), inner),
    max_leaves=8,
)  # fmt: skip


@given(st.one_of(PLAIN, st.dictionaries(st.text("ab"), JSON)))
def test_a_value_is_read_as_it_was_given(value: Any) -> None:
    change = insert("public.t", {"v": value, "list": [value, None, value]})
    assert change.row["v"] == value
    assert type(change.row["v"]) is type(value)
    assert change.row["list"] == [value, None, value]
    json.loads(change.to_json())


def test_numbers_that_are_none() -> None:
    change = insert("public.t", {"f": math.nan, "n": Decimal("NaN"), "i": -math.inf})
    assert math.isnan(change.row["f"])
    assert change.row["n"].is_nan()
    assert change.row["i"] == -math.inf
    assert json.loads(change.to_json())["row"] == {"f": "NaN", "n": "NaN", "i": "-Infinity"}


SMALL: Final = st.integers(-3, 3)


@given(SMALL, SMALL, st.sampled_from(["int8", "int4", "numeric", "float8"]))
def test_filters_agree_on_numbers(value: int, bound: int, sql_type: str) -> None:
    change = insert("public.t", {"v": value}, types={"v": sql_type})
    assert passes(change, f"v=gte.{bound}") == (value >= bound)
    assert passes(change, f"v=eq.{bound}") == (value == bound)
    assert passes(change, f"v=in.({bound},{bound + 1})") == (value in (bound, bound + 1))
    assert passes(change, f"v=not.lt.{bound}") == (value >= bound)


TEXTS: Final = st.text("ab,() *", max_size=4)


@given(TEXTS, TEXTS)
def test_filters_agree_on_texts(value: str, other: str) -> None:
    change = insert("public.t", {"v": value})
    assert passes(change, f'v=eq."{other}"') == (value == other)
    assert passes(change, f'v=neq."{other}"') == (value != other)


@given(
    st.datetimes(timezones=st.just(UTC)).map(lambda one: one.replace(microsecond=0)),
    st.datetimes(timezones=st.just(UTC)).map(lambda one: one.replace(microsecond=0)),
)
def test_filters_agree_on_times(value: datetime, bound: datetime) -> None:
    change = insert("public.t", {"v": value})
    assert passes(change, f'v=lte."{bound.isoformat()}"') == (value <= bound)


def test_a_null_and_a_column_that_did_not_come_pass_nothing() -> None:
    assert not passes(insert("public.t", {"v": None}), "v=neq.1")
    assert passes(insert("public.t", {"v": None}), "v=is.null")
    assert not passes(update("public.t", {"id": 1}, unchanged=["v"]), "v=is.null")
    with pytest.raises(FilterError, match="no column"):
        passes(insert("public.t", {"v": 1}), "w=eq.1")
    with pytest.raises(FilterError, match="tells a server"):
        passes(insert("public.t", {"v": date(2024, 1, 1)}), "v=eq.yesterday")
    with pytest.raises(ConfigError):
        passes(insert("public.t", {"v": 1}), "v=what.1")


def test_a_route_shows_what_a_handler_would_get() -> None:
    change = insert("public.people", {"id": 1, "email": "ann@example.org", "age": 40})
    seen = routed(change, "insert", where="age=gte.18", mask={"email": "redact"}, exclude=["age"])
    assert seen is not None
    assert dict(seen.row) == {"id": 1, "email": "[redacted]"}
    assert routed(change, "delete") is None
    assert routed(truncate("public.people")) is not None
    left = update("public.people", {"id": 1, "age": 17}, identity={"id": 1, "age": 18})
    assert routed(left, where="age=gte.18") is None
    leaving = routed(left, where="age=gte.18", leaving=True)
    assert leaving is not None
    assert leaving.leaving
    assert routed(left, changed="age") is not None


class Person(BaseModel):
    id: int
    age: int


def test_a_route_with_a_model_gives_the_model() -> None:
    seen = routed(insert("public.people", {"id": 1, "age": 40}), model=Person)
    assert seen is not None
    assert seen.row == Person(id=1, age=40)
    with pytest.raises(RowInvalid):
        routed(insert("public.people", {"id": 1, "age": None}), model=Person)
