"""Databases for tests: made from a template, dropped with everything that clings to them."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self, TypeVar

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

T = TypeVar("T")


class Database:
    """One database of the test server, with a connection for what a test does to it.

    ``dsn`` is a libpq connection string that also serves for replication.
    """

    def __init__(self, dsn: str, name: str = "") -> None:
        """Name a database that is there; without a name it is the connection string's own."""
        self.dsn = make_conninfo(dsn, dbname=name) if name else dsn
        self.name = name
        self._connection: psycopg.Connection | None = None

    def __repr__(self) -> str:
        """Print without the connection string."""
        return f"Database({self.name!r})"

    def execute(self, query: str, *parameters: object) -> list[tuple[Any, ...]]:
        """Run SQL in autocommit and return the rows, if there are any.

        Without parameters it may be several statements, and ``%`` is just a character.
        """
        if self._connection is None:
            self._connection = self.connect()
        cursor = self._connection.execute(query.encode(), parameters or None)
        return cursor.fetchall() if cursor.description else []

    def connect(self, **parameters: Any) -> psycopg.Connection:
        """Open a further connection, in autocommit unless said otherwise; the caller closes it."""
        return psycopg.connect(self.dsn, **{"autocommit": True, **parameters})

    def close(self) -> None:
        """Close the connection that ``execute`` uses; the next call opens another one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def create_template(dsn: str) -> Database:
    """Make an empty database in UTF-8 that others can be copies of."""
    name = f"walstream_template_{secrets.token_hex(4)}"
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE template0 ENCODING 'UTF8'").format(
                sql.Identifier(name)
            )
        )
    return Database(dsn, name)


def create_database(dsn: str, template: str) -> Database:
    """Copy a template of the server that a connection string reaches."""
    name = f"walstream_test_{secrets.token_hex(4)}"
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(
                sql.Identifier(name), sql.Identifier(template)
            )
        )
    return Database(dsn, name)


def drop_database(dsn: str, name: str) -> None:
    """Drop a database and its slots, whoever still uses them."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        # An abandoned walsender, told to go, still holds its slot for a moment.
        wait_until(lambda: not _slots_left(connection, name))
        connection.execute(
            sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name))
        )


def drop_slots(connection: psycopg.Connection, *names: str) -> None:
    """Drop slots by name, whoever streams from them; those that are gone are no concern."""
    wait_until(
        lambda: (
            not _drop_each(
                connection,
                connection.execute(
                    "SELECT slot_name, active_pid FROM pg_replication_slots"
                    " WHERE slot_name = ANY (%s)",
                    [list(names)],
                ).fetchall(),
            )
        )
    )


def _slots_left(connection: psycopg.Connection, database: str) -> bool:
    return _drop_each(
        connection,
        connection.execute(
            "SELECT slot_name, active_pid FROM pg_replication_slots WHERE database = %s", [database]
        ).fetchall(),
    )


def _drop_each(connection: psycopg.Connection, slots: list[tuple[Any, ...]]) -> bool:
    """Drop what nobody uses, and send the others' users away; return whether there was one."""
    for slot, walsender in slots:
        if walsender is not None:
            connection.execute("SELECT pg_terminate_backend(%s)", [walsender])
            continue
        try:
            connection.execute("SELECT pg_drop_replication_slot(%s)", [slot])
        except (psycopg.errors.ObjectInUse, psycopg.errors.UndefinedObject):
            # Taken by another walsender, or a temporary one that is gone: look again.
            continue
    return bool(slots)


def wait_until(condition: Callable[[], T], timeout_seconds: float = 10.0) -> T:
    """Ask until the answer is true, and return it; fail when the time is over.

    For synchronous tests: it blocks the event loop.
    """
    deadline = time.monotonic() + timeout_seconds
    while not (answer := condition()):
        if time.monotonic() > deadline:
            raise _never_true(condition, timeout_seconds)
        time.sleep(0.005)
    return answer


async def async_wait_until(
    condition: Callable[[], T | Awaitable[T]], timeout_seconds: float = 10.0
) -> T:
    """``wait_until`` for asynchronous tests; the condition may be a coroutine function."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        answer = condition()
        if isinstance(answer, Awaitable):
            answer = await answer
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise _never_true(condition, timeout_seconds)
        await asyncio.sleep(0.005)


def _never_true(condition: Callable[[], object], timeout_seconds: float) -> AssertionError:
    code = getattr(condition, "__code__", None)
    place = f"{code.co_filename}:{code.co_firstlineno}" if code else repr(condition)
    return AssertionError(f"not true within {timeout_seconds:g} seconds: {place}")
