"""A transactional handler's work and its position are committed together, or not at all."""

from __future__ import annotations

import asyncio
import json
import random
import secrets
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, Literal, TypeAlias

import psycopg
import pytest
from psycopg import AsyncConnection, Connection
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import dict_row
from structlog.testing import capture_logs

from tests.conftest import StartCluster
from tests.postgres import Database, async_wait_until
from tests.test_sql import run_twice
from walstream.changes import Message, Transaction
from walstream.destinations import Item
from walstream.errors import (
    AccessRefused,
    ConfigError,
    ProgressUnfit,
    TargetUnavailable,
    TransactionBroken,
)
from walstream.lsn import Lsn
from walstream.transactional import TransactionalTarget, position_of

SYSTEM: Final = "7412345678901234567"
FLUSH_LSN: Final = Lsn.parse("1/0")

APPLIED: Final = "CREATE TABLE applied (position text PRIMARY KEY, times int DEFAULT 1)"
APPLY: Final = """
    INSERT INTO applied VALUES (%s) ON CONFLICT (position) DO UPDATE SET times = applied.times + 1
"""

Kind: TypeAlias = Literal["async def", "def"]
Step: TypeAlias = str | Callable[[Any], object]
"""What a handler does after it has noted its items: SQL, or something with its connection."""


def items_of(*ends: int, changes: int = 2) -> list[Item]:
    """Transactions that end at these LSNs, with so many changes each."""
    return [
        Message("m", "", Lsn(end - 1), Transaction(7, Lsn(end - 2), Lsn(end), ""), ordinal)
        for end in ends
        for ordinal in range(1, changes + 1)
    ]


def names_of(items: Sequence[Item]) -> list[str]:
    return [item.id for item in items]


class Route:
    """A transactional route of a process: a handler that notes what it got, and its target."""

    def __init__(
        self, kind: Kind, dsn: str, name: str = "notes", *, replaying: bool = False
    ) -> None:
        self.kind = kind
        self.dsn = dsn
        self.target = TransactionalTarget(
            dsn, slot="s", route=name, application_name=f"of {kind}", replaying=replaying
        )
        self.called: list[list[str]] = []

    async def open(
        self,
        systemid: str = SYSTEM,
        flush_lsn: Lsn = FLUSH_LSN,
        timeline: int | None = 1,
        history: Sequence[tuple[int, Lsn]] = (),
    ) -> None:
        await self.target.open(
            systemid=systemid, flush_lsn=flush_lsn, timeline=timeline, history=history
        )

    async def run(self, items: Sequence[Item], *steps: Step) -> int:
        """Let the handler note the items, and do the steps; return how many were left out."""
        if self.kind == "def":
            return await asyncio.to_thread(
                self.target.run_sync, items, lambda fresh, of: self._call(fresh, of, steps)
            )
        return await self.target.run(items, lambda fresh, of: self._await(fresh, of, steps))

    async def run_until_applied(self, items: Sequence[Item], *steps: Step) -> int:
        """Try again as long as the target is unavailable, as delivery does; count the failures."""
        failures = 0
        while True:
            try:
                await self.run(items, *steps)
            except TargetUnavailable:
                failures += 1
                assert failures < 100
                await asyncio.sleep(0.01)
            else:
                return failures

    async def _await(
        self, items: list[Item], connection: AsyncConnection, steps: Sequence[Step]
    ) -> None:
        self.called.append(names_of(items))
        for item in items:
            await connection.execute(APPLY, [item.id])
        for step in steps:
            if isinstance(step, str):
                await connection.execute(step.encode())
            elif isinstance(result := step(connection), Awaitable):
                await result

    def _call(self, items: list[Item], connection: Connection, steps: Sequence[Step]) -> None:
        self.called.append(names_of(items))
        for item in items:
            connection.execute(APPLY, [item.id])
        for step in steps:
            if isinstance(step, str):
                connection.execute(step.encode())
            else:
                step(connection)


@pytest.fixture(params=["async def", "def"])
def kind(request: pytest.FixtureRequest) -> Kind:
    kind: Kind = request.param
    return kind


@pytest.fixture
async def processes(database: Database, kind: Kind) -> AsyncIterator[Callable[..., Route]]:
    """Makes routes as different processes have them."""
    database.execute(APPLIED)
    routes: list[Route] = []

    def start(dsn: str = database.dsn, **options: Any) -> Route:
        routes.append(Route(kind, dsn, **options))
        return routes[-1]

    yield start
    for route in routes:
        await route.target.close()


@pytest.fixture
async def route(processes: Callable[..., Route]) -> Route:
    route = processes()
    await route.open()
    return route


def applied(database: Database) -> dict[str, int]:
    return dict(database.execute("SELECT position, times FROM applied"))


def recorded(database: Database) -> list[tuple[Any, ...]]:
    return database.execute("SELECT end_lsn::text, ordinal FROM walstream.progress")


def once(items: Sequence[Item]) -> dict[str, int]:
    return dict.fromkeys(names_of(items), 1)


def terminate(database: Database, kind: Kind) -> None:
    """End the backends of a kind of handler, and wait until they are gone."""
    database.execute(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
        " WHERE application_name = %s AND datname = current_database()",
        f"of {kind}",
    )


def backends(database: Database, kind: Kind) -> list[int]:
    rows = database.execute(
        "SELECT pid FROM pg_stat_activity"
        " WHERE application_name = %s AND datname = current_database()",
        f"of {kind}",
    )
    return [pid for (pid,) in rows]


def wait_for(event: threading.Event) -> Step:
    """Hold the transaction open, for ten seconds at most."""

    def wait(connection: Any) -> Awaitable[bool] | None:
        if isinstance(connection, AsyncConnection):
            return asyncio.to_thread(event.wait, 10)
        event.wait(10)
        return None

    return wait


# ---- What is applied, and what is left out


async def test_work_and_position_are_recorded_together(database: Database, route: Route) -> None:
    items = items_of(10, 20)
    assert await route.run(items) == 0
    assert applied(database) == once(items)
    assert recorded(database) == [("0/14", 2)]


async def test_what_comes_again_is_left_out(
    database: Database, processes: Callable[..., Route], route: Route
) -> None:
    items = items_of(10, 20, 30)
    await route.run(items[:3])
    successor = processes()
    await successor.open()
    assert await successor.run(items[:3]) == 3
    assert await successor.run(items) == 3
    assert successor.called == [names_of(items[3:])]
    assert applied(database) == once(items)


async def test_another_process_is_noticed_at_each_transaction(
    database: Database, processes: Callable[..., Route], route: Route
) -> None:
    """Both were opened before either had applied anything."""
    other = processes()
    await other.open()
    items = items_of(10, 20, 30)
    await route.run(items[:4])
    assert await other.run(items[:2]) == 2
    assert await other.run(items[2:]) == 2
    assert await route.run(items) == 6
    assert other.called == [names_of(items[4:])]
    assert applied(database) == once(items)


async def test_of_two_processes_at_once_the_second_one_waits_and_leaves_out(
    database: Database, kind: Kind, processes: Callable[..., Route], route: Route
) -> None:
    other = processes()
    await other.open()
    items = items_of(10, 20)
    go_on = threading.Event()
    first = asyncio.create_task(route.run(items[:2], wait_for(go_on)))
    try:
        await async_wait_until(lambda: route.called)
        second = asyncio.create_task(other.run(items))
        await async_wait_until(lambda: database.execute("SELECT 1 FROM pg_locks WHERE NOT granted"))
        assert other.called == []
    finally:
        go_on.set()
    assert await first == 0
    assert await second == 2
    assert other.called == [names_of(items[2:])]
    assert applied(database) == once(items)


async def test_routes_do_not_know_of_each_other(
    database: Database, processes: Callable[..., Route], route: Route
) -> None:
    other = processes(name="Odd \"name\" of 'it' \\ %s")
    await other.open()
    items = items_of(10)
    await route.run(items)
    assert await other.run(items) == 0
    assert await other.run(items) == 2
    assert sorted(recorded(database)) == [("0/A", 2), ("0/A", 2)]


async def test_a_row_that_was_deleted_is_made_again(database: Database, route: Route) -> None:
    await route.run(items_of(10))
    database.execute("DELETE FROM walstream.progress")
    items = items_of(20)
    await route.run(items)
    assert recorded(database) == [("0/14", 2)]


async def test_dead_letters_are_applied_although_the_route_has_gone_on(
    database: Database, processes: Callable[..., Route], route: Route
) -> None:
    dead, later = items_of(10), items_of(20)
    await route.run(later)
    replay = processes(replaying=True)
    await replay.open()
    with pytest.raises(OwnError):
        await replay.run(dead, fail)
    assert await replay.run(dead) == 0
    assert applied(database) == once(dead + later)
    assert recorded(database) == [("0/14", 2)]
    assert await route.run(later) == 2


async def test_a_dead_letter_is_replayed_once(
    database: Database, processes: Callable[..., Route], route: Route
) -> None:
    """By a second replay, by the same one after it lost the answer, and by the daemon."""
    first, second = items_of(10)
    later = items_of(20)
    for left_out in (0, 1):
        replay = processes(replaying=True)
        await replay.open()
        assert await replay.run([first]) == left_out
        assert await replay.run([first]) == 1
    assert await route.target.has_applied(first)
    assert not await route.target.has_applied(second)
    again = processes()
    await again.open()
    assert await again.run([first, second, *later]) == 1
    assert applied(database) == once([first, second, *later])


async def test_what_was_replayed_is_forgotten_when_the_route_has_gone_on(
    database: Database, processes: Callable[..., Route], route: Route
) -> None:
    dead, later, ahead = items_of(10), items_of(20), items_of(30)
    replay = processes(replaying=True)
    await replay.open()
    await replay.run(dead)
    await replay.run(ahead)
    await route.run(later)
    await replay.target.forget_replayed()
    left = database.execute("SELECT end_lsn::text, ordinal FROM walstream.replayed ORDER BY 2")
    assert left == [("0/1E", 1), ("0/1E", 2)]
    assert [await route.target.has_applied(item) for item in (*dead, *later, *ahead)] == [True] * 6


async def test_positions_come_in_ascending_order_with_messages_between(database: Database) -> None:
    """Random transactions side by side, and messages in and outside of them, as the server sends.

    A message that stands alone ends where its record ends, a transaction where its commit does.
    """
    chance = random.Random(5)  # noqa: S311 - repeatable
    database.execute("CREATE TABLE t (n int)")
    slot = f"order_{secrets.token_hex(4)}"
    database.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", slot)
    sessions = [database.connect(autocommit=False) for _ in range(4)]
    for _ in range(400):
        session = chance.choice(sessions)
        match chance.randrange(5):
            case 0:
                session.execute("SELECT pg_logical_emit_message(false, 'alone', 'x')")
            case 1:
                session.execute("SELECT pg_logical_emit_message(true, 'inside', 'x')")
            case 2 | 3:
                session.execute("INSERT INTO t VALUES (1)")
            case _:
                chance.choice([session.commit, session.commit, session.rollback])()
    for session in sessions:
        session.commit()
        session.close()
    records = database.execute(
        "SELECT data::text FROM pg_logical_slot_get_changes(%s, NULL, NULL,"
        " 'format-version', '2', 'include-lsn', '1')",
        slot,
    )
    positions = list(positions_of(json.loads(record) for (record,) in records))
    assert len(positions) > 200
    assert positions == sorted(set(positions))


def positions_of(records: Iterator[dict[str, Any]]) -> Iterator[tuple[Lsn, int]]:
    transaction = None
    ordinal = 0
    for record in records:
        match record["action"]:
            case "B":
                end_lsn = Lsn.parse(record["nextlsn"])
                transaction, ordinal = Transaction(1, Lsn.parse(record["lsn"]), end_lsn, ""), 0
            case "C":
                transaction = None
            case "M" if not record["transactional"]:
                yield position_of(Message("alone", "x", Lsn.parse(record["lsn"])))
            case _:
                ordinal += 1
                yield position_of(Message("", "", Lsn(0), transaction, ordinal))


# ---- Handlers that fail


class OwnError(Exception):
    pass


def fail(_: Any) -> None:
    raise OwnError


async def test_what_a_handler_raises_takes_its_work_back(
    database: Database, kind: Kind, route: Route
) -> None:
    items = items_of(10)
    with pytest.raises(OwnError):
        await route.run(items, fail)
    assert applied(database) == {}
    assert recorded(database) == [("0/0", 0)]
    connections = backends(database, kind)
    assert await route.run(items) == 0
    assert applied(database) == once(items)
    assert backends(database, kind) == connections  # it is no reason to connect again


@pytest.mark.parametrize(
    ("statement", "error"),
    [
        ("INSERT INTO applied VALUES ('0/A:1')", psycopg.errors.UniqueViolation),
        ("INSERT INTO late VALUES (1), (1)", psycopg.errors.UniqueViolation),  # at COMMIT
        ("SELECT 1 / 0", psycopg.errors.DivisionByZero),
        ("no such statement", psycopg.errors.SyntaxError),
    ],
)
async def test_an_sql_error_goes_up_as_it_is(
    database: Database, route: Route, statement: str, error: type[Exception]
) -> None:
    database.execute("CREATE TABLE late (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
    items = items_of(10)
    with pytest.raises(error):
        await route.run(items, statement)
    assert applied(database) == {}
    assert recorded(database) == [("0/0", 0)]
    await route.run(items)
    assert applied(database) == once(items)


async def test_a_serialization_failure_goes_up_as_it_is(
    database: Database, processes: Callable[..., Route]
) -> None:
    isolation = "-c default_transaction_isolation=repeatable\\ read"
    route = processes(make_conninfo(database.dsn, options=isolation))
    await route.open()
    database.execute("CREATE TABLE total (n int); INSERT INTO total VALUES (0)")
    add = "UPDATE total SET n = n + 1"
    items = items_of(10)
    with pytest.raises(psycopg.errors.SerializationFailure):
        await route.run(items, lambda _: database.execute(add) and None, add)
    await route.run(items, add)
    assert database.execute("SELECT n FROM total") == [(2,)]
    assert applied(database) == once(items)


async def test_a_savepoint_lets_a_handler_go_on(database: Database, route: Route) -> None:
    async def awaited(connection: AsyncConnection) -> None:
        with suppress(psycopg.errors.UniqueViolation):
            async with connection.transaction():
                await connection.execute("INSERT INTO applied VALUES ('0/A:1')")

    def called(connection: Connection) -> None:
        with suppress(psycopg.errors.UniqueViolation), connection.transaction():
            connection.execute("INSERT INTO applied VALUES ('0/A:1')")

    items = items_of(10)
    await route.run(items, awaited if route.kind == "async def" else called)
    assert applied(database) == once(items)


def with_block(connection: Any) -> Awaitable[None] | None:
    """``with connection:`` commits and closes at its end."""

    async def awaited() -> None:
        async with connection:
            pass

    if isinstance(connection, AsyncConnection):
        return awaited()
    with connection:
        return None


@pytest.mark.parametrize(
    "step",
    [
        lambda connection: connection.commit(),
        lambda connection: connection.rollback(),
        lambda connection: connection.close(),
        with_block,
    ],
    ids=["commit", "rollback", "close", "with"],
)
async def test_a_handler_may_not_end_its_transaction(
    database: Database, route: Route, step: Step
) -> None:
    """It is refused before anything is committed."""
    items = items_of(10)
    with pytest.raises(TransactionBroken, match=r"(commit|rollback|close)\(\)") as caught:
        await route.run(items, step)
    assert "transaction()" in caught.value.hint
    assert applied(database) == {}
    await route.run(items)
    assert applied(database) == once(items)


@pytest.mark.parametrize("steps", [["COMMIT"], ["COMMIT", fail], ["ROLLBACK"]])
async def test_a_transaction_ended_by_sql_is_noticed(
    database: Database, route: Route, steps: list[Step]
) -> None:
    with pytest.raises(TransactionBroken, match="may be committed"):
        await route.run(items_of(10), *steps)
    assert recorded(database) == [("0/0", 0)]


def name_of(step: Step) -> str:
    return step if isinstance(step, str) else step.__name__


ANOTHER: Final[tuple[list[Step], ...]] = (
    ["COMMIT AND CHAIN"],
    ["COMMIT; BEGIN"],
    ["COMMIT", "BEGIN", "SELECT 1"],
    ["COMMIT AND CHAIN", fail],
    ["COMMIT; BEGIN", "SELECT 1 / 0"],
    ["COMMIT; BEGIN; SELECT 1 / 0"],
)


@pytest.mark.parametrize("replaying", [False, True])
@pytest.mark.parametrize("steps", ANOTHER, ids=lambda steps: ", ".join(map(name_of, steps)))
async def test_a_transaction_that_a_handler_put_in_place_of_ours_is_noticed(
    database: Database, processes: Callable[..., Route], steps: list[Step], *, replaying: bool
) -> None:
    """It would be applied again by the next attempt, whose failure says nothing of it."""
    route = processes(replaying=replaying)
    await route.open()
    with pytest.raises(TransactionBroken, match="may be committed") as caught:
        await route.run(items_of(10), *steps)
    assert "COMMIT" in caught.value.hint
    assert recorded(database) == [("0/0", 0)]
    assert database.execute("SELECT FROM walstream.replayed") == []


async def test_a_transaction_rolled_back_and_begun_anew_leaves_what_a_handler_raises(
    route: Route,
) -> None:
    """Nothing is committed, so it may be tried again."""
    with pytest.raises(OwnError):
        await route.run(items_of(10), "ROLLBACK AND CHAIN", fail)
    with pytest.raises(TransactionBroken):
        await route.run(items_of(10), "ROLLBACK AND CHAIN")


async def test_a_handlers_own_null_is_its_own_error(database: Database, route: Route) -> None:
    database.execute("CREATE TABLE full_of (ordinal int NOT NULL)")
    with pytest.raises(psycopg.errors.NotNullViolation):
        await route.run(items_of(10), "INSERT INTO full_of VALUES (NULL)")


def swallow(connection: Any) -> Awaitable[None] | None:
    async def awaited() -> None:
        with suppress(psycopg.Error):
            await connection.execute("SELECT 1 / 0")

    if isinstance(connection, AsyncConnection):
        return awaited()
    with suppress(psycopg.Error):
        connection.execute("SELECT 1 / 0")
    return None


async def test_an_error_that_a_handler_keeps_to_itself_is_noticed(
    database: Database, route: Route
) -> None:
    items = items_of(10)
    with pytest.raises(TransactionBroken, match="although a statement had failed") as caught:
        await route.run(items, swallow)
    assert "savepoint" in caught.value.hint
    assert applied(database) == {}
    await route.run(items)
    assert applied(database) == once(items)


async def test_a_statement_that_still_runs_is_noticed(database: Database, route: Route) -> None:
    items = items_of(10)
    with pytest.raises(TransactionBroken, match="in the middle of a statement"):
        await route.run(items, lambda connection: connection.pgconn.send_query(b"SELECT 1"))
    await route.run(items)
    assert applied(database) == once(items)


async def test_what_a_handler_sets_does_not_disturb(database: Database, route: Route) -> None:
    def set_factory(connection: Any) -> None:
        connection.row_factory = dict_row

    await route.run(items_of(10), set_factory, "SET search_path TO pg_catalog")
    assert await route.run(items_of(10)) == 2
    with pytest.raises(psycopg.errors.UndefinedTable):
        await route.run(items_of(20))


async def test_a_cancelled_call_leaves_nothing_behind(database: Database) -> None:
    database.execute(APPLIED)
    route = Route("async def", database.dsn)
    await route.open()
    items = items_of(10)
    call = asyncio.create_task(route.run(items, lambda _: asyncio.Event().wait()))
    await async_wait_until(lambda: route.called)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await route.run(items)
    assert applied(database) == once(items)
    await route.target.close()


async def test_the_connection_of_a_function_that_still_runs_is_closed_when_it_returns(
    database: Database,
) -> None:
    database.execute(APPLIED)
    route = Route("def", database.dsn)
    await route.open()
    go_on = threading.Event()
    items = items_of(10)
    call = asyncio.create_task(route.run(items, wait_for(go_on)))
    await async_wait_until(lambda: route.called)
    await route.target.close()
    assert backends(database, "def")
    go_on.set()
    await call
    await async_wait_until(lambda: not backends(database, "def"))
    assert applied(database) == once(items)


# ---- Connections that are lost


@pytest.mark.parametrize("moment", ["before", "inside", "at the end", "in a statement"])
async def test_a_backend_that_is_terminated_is_waited_out(
    database: Database, kind: Kind, route: Route, moment: str
) -> None:
    first, items = items_of(10), items_of(20)
    await route.run(first)
    left = ["once"]

    def terminate_once(_: Any) -> None:
        if left:
            left.clear()
            terminate(database, kind)

    if moment == "before":
        terminate_once(None)
        assert await route.run_until_applied(items) == 1
    elif moment == "inside":
        assert await route.run_until_applied(items, terminate_once, "SELECT 1") == 1
    elif moment == "at the end":
        assert await route.run_until_applied(items, terminate_once) == 1
    else:
        sleep = "SELECT pg_sleep(CASE WHEN (SELECT count(*) FROM slow) = 0 THEN 60 ELSE 0 END)"
        database.execute("CREATE TABLE slow (n int)")
        call = asyncio.create_task(route.run_until_applied(items, sleep))
        await async_wait_until(
            lambda: database.execute("SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'")
        )
        database.execute("INSERT INTO slow VALUES (1)")
        terminate(database, kind)
        assert await call == 1
    assert applied(database) == once(first + items)


async def test_a_lost_connection_goes_before_what_the_handler_made_of_it(
    database: Database, kind: Kind, route: Route
) -> None:
    """It raised something of its own, or swallowed everything."""
    items = items_of(10)
    with pytest.raises(TargetUnavailable) as caught:
        await route.run(items, lambda _: terminate(database, kind), swallow, fail)
    assert "connection was cut" in caught.value.message
    with pytest.raises(TargetUnavailable):
        await route.run(items, lambda _: terminate(database, kind), swallow)
    await route.run(items)
    assert applied(database) == once(items)


async def test_a_connection_of_the_handlers_own_is_its_own_matter(
    database: Database, route: Route
) -> None:
    def lose_another(_: Any) -> None:
        with database.connect() as other:
            other.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    with pytest.raises(psycopg.errors.AdminShutdown):
        await route.run(items_of(10), lose_another)


class Proxy:
    """Stands between a client and the server, and cuts the wire once, at what the client sends."""

    def __init__(self, dsn: str) -> None:
        parameters = conninfo_to_dict(dsn)
        self._host, self._port = str(parameters["host"]), int(parameters.get("port") or 5432)
        self._server: asyncio.Server | None = None
        self._cut: tuple[bytes, bool] | None = None
        self._links: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def listening(self, dsn: str) -> AsyncIterator[str]:
        """Give a connection string that leads through the proxy."""
        async with await asyncio.start_server(self._connected, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            yield make_conninfo(
                dsn, host="127.0.0.1", port=port, sslmode="disable", gssencmode="disable"
            )
        for link in self._links:
            link.cancel()

    def cut_at(self, text: bytes, *, answered: bool) -> None:
        """Cut when the client sends this text; ``answered``: after the server has done it."""
        self._cut = (text, answered)

    @property
    def has_cut(self) -> bool:
        return self._cut is None

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._links.add(task)
        connecting = (
            asyncio.open_unix_connection(f"{self._host}/.s.PGSQL.{self._port}")
            if self._host.startswith("/")
            else asyncio.open_connection(self._host, self._port)
        )
        try:
            from_server, to_server = await connecting
            await self._relay(reader, writer, from_server, to_server)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()
            self._links.discard(task)

    async def _relay(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        from_server: asyncio.StreamReader,
        to_server: asyncio.StreamWriter,
    ) -> None:
        answers = asyncio.create_task(self._forward(from_server, writer))
        try:
            while sent := await reader.read(65536):
                if self._cut is not None and self._cut[0] in sent:
                    _, answered = self._cut
                    self._cut = None
                    if not answered:
                        return
                    answers.cancel()
                    to_server.write(sent)
                    await from_server.read(65536)
                    return
                to_server.write(sent)
        finally:
            answers.cancel()
            to_server.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while received := await reader.read(65536):
                writer.write(received)


@pytest.mark.parametrize("answered", [False, True], ids=["not done", "done"])
@pytest.mark.parametrize("text", [b"BEGIN", b"ON CONFLICT (position)", b"COMMIT"])
async def test_a_wire_that_is_cut_leaves_each_change_applied_once(
    database: Database, processes: Callable[..., Route], text: bytes, *, answered: bool
) -> None:
    """Cut at COMMIT, nobody is told what became of it: the table tells."""
    proxy = Proxy(database.dsn)
    async with proxy.listening(database.dsn) as dsn:
        route = processes(dsn)
        await route.open()
        first, items = items_of(10), items_of(20, 30)
        await route.run(first)
        proxy.cut_at(text, answered=answered)
        assert await route.run_until_applied(items) == 1
        assert proxy.has_cut
        await route.target.close()
    assert applied(database) == once(first + items)
    was_committed = text == b"COMMIT" and answered
    assert route.called[1:] == [names_of(items)] * (1 if was_committed or text == b"BEGIN" else 2)


async def test_a_server_that_restarts_or_crashes_is_waited_out(
    private_cluster: StartCluster, kind: Kind
) -> None:
    cluster = private_cluster()
    dsn = cluster.conninfo()
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(APPLIED.encode())
    route = Route(kind, dsn)
    await route.open()
    items = items_of(*range(10, 40, 10))
    await route.run(items[:2])
    cluster.stop("fast")
    for _ in range(2):
        with pytest.raises(TargetUnavailable):
            await route.run(items[2:4])
        with pytest.raises(TargetUnavailable):
            await route.open()
    cluster.start()
    assert await route.run_until_applied(items[2:4]) == 0
    assert (
        await route.run_until_applied(
            items[4:], lambda _: None if len(route.called) > 3 else cluster.restart("immediate")
        )
        == 1
    )
    with psycopg.connect(dsn) as connection:
        assert dict(connection.execute("SELECT position, times FROM applied")) == once(items)
    await route.target.close()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("idle_in_transaction_session_timeout=50", "took too long"),
        ("lock_timeout=50", "another process holds"),
        ("statement_timeout=50", "statement timeout"),
    ],
)
async def test_timeouts_of_the_server_are_named(
    database: Database, processes: Callable[..., Route], route: Route, option: str, message: str
) -> None:
    impatient = processes(make_conninfo(database.dsn, options=f"-c {option}"))
    await impatient.open()
    items = items_of(10)
    if option.startswith("idle"):
        pause = threading.Event()
        with pytest.raises(TargetUnavailable, match=message) as caught:
            await impatient.run(items, lambda _: (pause.wait(0.5), None)[1])
        assert "idle_in_transaction_session_timeout" in caught.value.hint
        return
    with database.connect(autocommit=False) as other:
        other.execute("SELECT 1 FROM walstream.progress FOR UPDATE")
        with pytest.raises(TargetUnavailable, match=message):
            await impatient.run(items)
    assert await impatient.run(items) == 0


async def test_a_read_only_database_is_waited_out(
    database: Database, processes: Callable[..., Route], route: Route
) -> None:
    """As a primary is that has become a standby."""
    database.execute(f"ALTER DATABASE {database.name} SET default_transaction_read_only = on")
    other = processes()
    with pytest.raises(TargetUnavailable, match="read-only") as caught:
        await other.open()
    assert "target_session_attrs" in caught.value.hint
    with pytest.raises(TargetUnavailable, match="read-only"):
        await route.run(items_of(10))


# ---- What must be right before


async def test_the_table_is_made_once_however_many_want_it(database: Database) -> None:
    routes = [Route("async def", database.dsn, f"route {number}") for number in range(8)]
    await asyncio.gather(*[route.open() for route in routes])
    assert len(recorded(database)) == 8


async def test_another_cluster_is_refused(
    database: Database, processes: Callable[..., Route], route: Route
) -> None:
    await route.run(items_of(10))
    other = processes()
    with pytest.raises(ProgressUnfit, match=SYSTEM) as caught:
        await other.open(systemid="7499999999999999999")
    [delete] = [part for part in caught.value.hint.split(": ") if part.startswith("DELETE")]
    database.execute(delete.partition(". ")[0])
    await other.open(systemid="7499999999999999999")
    assert await other.run(items_of(10)) == 0
    with pytest.raises(ProgressUnfit):  # the first one, which is told at its next transaction
        await route.run(items_of(20))


async def test_a_position_beyond_the_servers_wal_is_refused(
    database: Database, processes: Callable[..., Route], route: Route
) -> None:
    await route.run(items_of(0x20))
    other = processes()
    with pytest.raises(ProgressUnfit, match="0/20") as caught:
        await other.open(flush_lsn=Lsn(0x1F))
    assert "slot = 's' AND route = 'notes'" in caught.value.hint
    await other.open(flush_lsn=Lsn(0x20))


def timelines(database: Database) -> list[tuple[Any, ...]]:
    return database.execute("SELECT timeline FROM walstream.progress")


async def test_a_position_beyond_where_its_timeline_was_left_is_refused(
    database: Database, processes: Callable[..., Route], route: Route
) -> None:
    """The WAL of the new timeline may have grown past it since."""
    await route.run(items_of(0x20))
    other = processes()
    with pytest.raises(ProgressUnfit, match=r"0/20 on timeline 1, .* left at 0/1F ") as caught:
        await other.open(timeline=3, history=[(1, Lsn(0x1F)), (2, Lsn(0x40))])
    assert timelines(database) == [(1,)]
    [delete] = [part for part in caught.value.hint.split("row: ") if part.startswith("DELETE")]
    database.execute(delete)
    await other.open(timeline=3, history=[(1, Lsn(0x1F)), (2, Lsn(0x40))])
    assert await other.run(items_of(0x20)) == 0
    assert timelines(database) == [(3,)]


async def test_a_position_up_to_where_its_timeline_was_left_goes_on(
    database: Database, processes: Callable[..., Route], route: Route
) -> None:
    await route.run(items_of(0x20))
    other = processes()
    await other.open(timeline=2, history=[(1, Lsn(0x20))])
    assert await other.run(items_of(0x20, 0x30)) == 2
    assert timelines(database) == [(2,)]
    await other.open(timeline=3, history=[(1, Lsn(0x20)), (2, Lsn(0x30))])
    assert timelines(database) == [(3,)]
    with pytest.raises(ProgressUnfit, match=r"timeline 3 .* from timeline 1"):
        await route.run(items_of(0x40))  # from the server that was left


@pytest.mark.parametrize("history", [[], [(1, Lsn(0x40))]])
async def test_a_timeline_that_the_server_does_not_come_from_is_refused(
    database: Database, processes: Callable[..., Route], history: list[tuple[int, Lsn]]
) -> None:
    """It was restored to before that timeline began, or has lost the file that tells."""
    route = processes()
    await route.open(timeline=2)
    await route.run(items_of(0x20))
    other = processes()
    with pytest.raises(ProgressUnfit, match="does not go on from that one"):
        await other.open(timeline=1)
    with pytest.raises(ProgressUnfit, match="does not go on from that one") as caught:
        await other.open(timeline=3, history=history)
    database.execute(caught.value.hint.rpartition("instead: ")[2])
    await other.open(timeline=3, history=history)
    assert await other.run(items_of(0x20)) == 2


async def test_a_letter_replayed_beyond_where_its_timeline_was_left_is_refused_too(
    processes: Callable[..., Route], route: Route
) -> None:
    await route.run(items_of(0x10))
    replay = processes(replaying=True)
    await replay.open(timeline=None)
    await replay.run(items_of(0x20))
    with pytest.raises(ProgressUnfit, match="0/20 on timeline 1"):
        await processes().open(timeline=2, history=[(1, Lsn(0x1F))])


async def test_an_unknown_timeline_is_filled_in(
    database: Database, processes: Callable[..., Route]
) -> None:
    """A table of a version that did not record it; nothing of it is lost."""
    await processes().open()
    database.execute("ALTER TABLE walstream.progress DROP COLUMN timeline")
    database.execute("UPDATE walstream.progress SET end_lsn = '0/A', ordinal = 2")
    route = processes()
    await route.open(timeline=2, history=[(1, Lsn(0x5))])
    assert timelines(database) == [(2,)]
    assert await route.run(items_of(10, 20)) == 2


async def test_what_was_recorded_while_the_timeline_was_looked_at_is_not_overlooked(
    database: Database, kind: Kind, processes: Callable[..., Route], route: Route
) -> None:
    """A process still has a transaction open on the timeline that was left."""
    go_on = threading.Event()
    first = asyncio.create_task(route.run(items_of(0x20), wait_for(go_on)))
    other = processes()
    try:
        await async_wait_until(lambda: route.called)
        second = asyncio.create_task(other.open(timeline=2, history=[(1, Lsn(0x1F))]))
        await async_wait_until(lambda: len(backends(database, kind)) > 1)
        await async_wait_until(lambda: database.execute("SELECT 1 FROM pg_locks WHERE NOT granted"))
    finally:
        go_on.set()
    await first
    with pytest.raises(TargetUnavailable, match="quicker"):
        await second
    with pytest.raises(ProgressUnfit, match="left at"):
        await other.open(timeline=2, history=[(1, Lsn(0x1F))])


@pytest.fixture
def stranger(database: Database) -> Iterator[str]:
    """A role that may connect, and nothing more."""
    name = f"stranger_{secrets.token_hex(4)}"
    database.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'hunter2'")
    yield name
    database.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


async def test_a_role_that_may_not_make_the_table_is_told_what_to_run(
    database: Database, stranger: str
) -> None:
    dsn = make_conninfo(database.dsn, user=stranger, password="hunter2")  # noqa: S106 - made here
    route = Route("async def", dsn)
    with pytest.raises(AccessRefused, match="may not record") as caught:
        await route.open()
    statements = caught.value.hint.partition("or: ")[2].replace("<role>", stranger)
    database.execute(statements)
    await route.open()
    database.execute(f"REVOKE UPDATE ON walstream.progress FROM {stranger}")
    with pytest.raises(AccessRefused):
        await route.run(items_of(10))
    await route.target.close()


@pytest.mark.parametrize(
    "right",
    [
        "SELECT ON walstream.progress",
        "INSERT ON walstream.progress",
        "UPDATE ON walstream.progress",
        "SELECT ON walstream.replayed",
        "INSERT ON walstream.replayed",
        "DELETE ON walstream.replayed",
    ],
)
async def test_a_right_that_is_missing_is_told_at_the_start(
    database: Database, stranger: str, right: str
) -> None:
    """Not at the first change, or when the first dead letter is replayed."""
    run_twice(database.dsn, "06_progress.sql", role=stranger)
    dsn = make_conninfo(database.dsn, user=stranger, password="hunter2")  # noqa: S106 - made here
    route = Route("async def", dsn)
    await route.open()
    database.execute(f"REVOKE {right} FROM {stranger}")
    with pytest.raises(AccessRefused, match="may not record"):
        await route.open()


async def test_a_table_without_the_timeline_is_told_to_a_role_that_may_not_add_it(
    database: Database, stranger: str
) -> None:
    run_twice(database.dsn, "06_progress.sql", role=stranger)
    database.execute("ALTER TABLE walstream.progress DROP COLUMN timeline")
    dsn = make_conninfo(database.dsn, user=stranger, password="hunter2")  # noqa: S106 - made here
    route = Route("async def", dsn)
    with pytest.raises(AccessRefused, match="may not record") as caught:
        await route.open()
    database.execute(caught.value.hint.partition("or: ")[2].replace("<role>", stranger))
    await route.open()


async def test_the_file_for_operators_makes_the_same_tables(
    database: Database, stranger: str
) -> None:
    def columns() -> list[tuple[Any, ...]]:
        return database.execute(
            "SELECT attrelid::regclass::text, attname, format_type(atttypid, atttypmod),"
            " attnotnull, pg_get_expr(adbin, adrelid), conkey FROM pg_attribute"
            " LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum"
            " JOIN pg_constraint ON conrelid = attrelid AND contype = 'p'"
            " WHERE attrelid IN ('walstream.progress'::regclass, 'walstream.replayed'::regclass)"
            " AND attnum > 0 ORDER BY attrelid::regclass::text, attnum"
        )

    run_twice(database.dsn, "06_progress.sql", role=stranger)
    by_file = columns()
    route = Route(
        "async def",
        make_conninfo(database.dsn, user=stranger, password="hunter2"),  # noqa: S106 - made here
    )
    await route.open()
    await route.target.close()
    database.execute("DROP SCHEMA walstream CASCADE")
    route = Route("async def", database.dsn)
    await route.open()
    assert columns() == by_file


async def test_a_database_that_forgets_at_a_crash_is_told(database: Database) -> None:
    route = Route("def", make_conninfo(database.dsn, options="-c synchronous_commit=off"))
    with capture_logs() as logs:
        await route.open()
    assert [entry["event"] for entry in logs] == ["target_not_durable"]


@pytest.mark.parametrize(
    ("dsn", "error"),
    [
        ("host=hunter2.invalid password=hunter2", TargetUnavailable),
        ("host=/hunter2/hunter2 password=hunter2", TargetUnavailable),
        ("host=/nowhere port=hunter2", ConfigError),
        ("postgresql://me:hunter2@[", ConfigError),
    ],
)
async def test_no_error_holds_the_password(dsn: str, error: type[Exception], kind: Kind) -> None:
    route = Route(kind, dsn)
    with pytest.raises(error) as caught:
        await route.open()
    assert "hunter2" not in str(caught.value) + repr(caught.value)
    with pytest.raises(error) as caught:
        await route.run(items_of(10))
    assert "hunter2" not in str(caught.value) + repr(caught.value)
    assert caught.value.__cause__ is None
