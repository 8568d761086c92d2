"""A few connections that questions share, those that are slow all but one of them.

A question is one transaction, sent at once: begin, who asks, what is asked, roll back. Nothing of
it stays in the session, so that a pooler may stand in between.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final

import psycopg
from psycopg import AsyncConnection, AsyncCursor
from psycopg.pq import TransactionStatus

from walstream.access.questions import (
    BEGIN,
    END,
    LOOKUP,
    KeyColumn,
    Lookup,
    Printed,
    Question,
    preparation_of,
    query_of,
)
from walstream.changes import Relation
from walstream.errors import AccessRefused, ConnectionLost, ServerShutdown
from walstream.postgres import connect, impatient, server_error

CATALOG_SECONDS: Final = 10.0
"""How long the server may take to say who asks, or what a table's key is."""

GRACE_SECONDS: Final = 1.0
"""How long the server may take to end a question that has lasted too long."""

_WHO: Final = b"""
    SELECT session_user, rolsuper, rolbypassrls FROM pg_roles WHERE rolname = session_user
"""


class Connection:
    """One connection, by a role that row security holds for."""

    def __init__(self, connection: AsyncConnection[Any]) -> None:
        self._connection = connection

    @property
    def is_usable(self) -> bool:
        """Whether another question can be asked."""
        connection = self._connection
        return (
            not connection.closed and connection.info.transaction_status is TransactionStatus.IDLE
        )

    async def close(self) -> None:
        """Close it."""
        await self._connection.close()

    async def verify(self) -> None:
        """See who asks.

        Raises:
            AccessRefused: a role that row security does not hold for.
            WalstreamError: the server does not answer.
        """
        ((role, is_superuser, passes_by),) = await self._catalog_rows(_WHO, ())
        if is_superuser or passes_by:
            raise _too_mighty(role, "a superuser" if is_superuser else "one with BYPASSRLS")

    async def lookup(self, relation: Relation) -> Lookup:
        """Ask how rows of a table are found.

        Raises:
            WalstreamError: the server does not answer.
        """
        rows = await self._catalog_rows(LOOKUP, (relation.schema, relation.name))
        return Lookup(relation, tuple(KeyColumn(*row) for row in rows))

    async def _catalog_rows(self, query: bytes, parameters: tuple[str, ...]) -> list[Any]:
        try:
            with impatient(self._connection, CATALOG_SECONDS):
                async with self._connection.transaction():
                    await self._connection.execute(b"SET LOCAL search_path TO pg_catalog")
                    cursor = await self._connection.execute(query, parameters)
                    return await cursor.fetchall()
        except psycopg.Error as error:
            raise server_error(error) from error

    async def ask(
        self, question: Question, timeout_seconds: float
    ) -> dict[int, Sequence[Printed]] | None:
        """Return what is shown, by its place; None if it is too early to ask.

        Raises:
            psycopg.Error: the server refuses to answer, or has not done it in time.
            ConnectionLost: that happened.
            ServerShutdown: the same.
        """
        try:
            with impatient(self._connection, timeout_seconds + GRACE_SECONDS):
                try:
                    return await self._ask(question, timeout_seconds)
                finally:
                    await self._end()
        except psycopg.Error as error:
            ours = server_error(error)
            if isinstance(ours, ConnectionLost | ServerShutdown):
                raise ours from error
            raise

    async def _ask(
        self, question: Question, timeout_seconds: float
    ) -> dict[int, Sequence[Printed]] | None:
        connection = self._connection
        async with self._at_once():
            await connection.execute(BEGIN)
            prepared = await connection.execute(*preparation_of(question, timeout_seconds))
            answer = await connection.execute(*query_of(question))
            await connection.execute(END)
        ((is_early, *_),) = await prepared.fetchall()
        return None if is_early else _printed(answer)

    @contextlib.asynccontextmanager
    async def _at_once(self) -> AsyncIterator[None]:
        """Send what is executed without waiting for answers; raise the first error."""
        failure: psycopg.Error | None = None
        try:
            async with self._connection.pipeline():
                try:
                    yield
                except psycopg.Error as error:  # psycopg would log what follows from it
                    failure = error
        except psycopg.Error as error:
            failure = failure or error
        if failure is not None:
            raise failure

    async def _end(self) -> None:
        """End a transaction that an error has left."""
        connection = self._connection
        if connection.info.transaction_status is TransactionStatus.INERROR:
            await connection.execute(END)


def _printed(answer: AsyncCursor[Any]) -> dict[int, Sequence[Printed]]:
    """Take the rows as they came, which is as the types' output functions have printed them."""
    result = answer.pgresult
    assert result is not None  # noqa: S101 - it was a query
    rows: dict[int, Sequence[Printed]] = {}
    for row in range(result.ntuples):
        place, *values = (result.get_value(row, column) for column in range(result.nfields))
        rows[int(place or 0)] = values
    return rows


class Connections:
    """Opens connections when they are needed, and keeps them."""

    def __init__(
        self, dsn: str | Callable[[], str], *, application_name: str, max_connections: int
    ) -> None:
        self._dsn = dsn
        self._application_name = application_name
        self._idle: list[Connection] = []
        self._all = asyncio.Semaphore(max_connections)
        self._slow = asyncio.Semaphore(max(1, max_connections - 1))

    @contextlib.asynccontextmanager
    async def borrowed(self, *, is_slow: bool) -> AsyncIterator[Connection]:
        """Lend one; whoever came first gets it first.

        Raises:
            WalstreamError: there is none, and none can be opened.
        """
        async with contextlib.AsyncExitStack() as held:
            if is_slow:
                await held.enter_async_context(self._slow)
            await held.enter_async_context(self._all)
            connection = self._idle.pop() if self._idle else await self._open()
            try:
                yield connection
            finally:
                if connection.is_usable:
                    self._idle.append(connection)
                else:
                    await connection.close()

    async def close(self) -> None:
        """Close those that nobody has."""
        while self._idle:
            await self._idle.pop().close()

    async def _open(self) -> Connection:
        dsn = self._dsn if isinstance(self._dsn, str) else self._dsn()
        connection = Connection(await connect(dsn, application_name=self._application_name))
        try:
            await connection.verify()
        except BaseException:
            await connection.close()
            raise
        return connection


def _too_mighty(role: str, what: str) -> AccessRefused:
    return AccessRefused(
        f"row security is asked by the role {role}, which is {what}",
        hint="give [access.row_security] the dsn of a role made by CREATE ROLE <name> LOGIN"
        " NOINHERIT, and GRANT it the roles of the readers; see docs/access.md",
    )
