"""A few connections that questions share, those that are slow all but one of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import psycopg
from psycopg import AsyncConnection
from psycopg.pq import TransactionStatus

from walstream.errors import AccessRefused
from walstream.postgres import connect, impatient, server_error

Connection: TypeAlias = AsyncConnection[Any]

_WHO = b"""
    SELECT session_user, rolsuper, rolbypassrls FROM pg_roles WHERE rolname = session_user
"""

WHO_SECONDS = 10.0


class Connections:
    """Opens connections when they are needed, and keeps them."""

    def __init__(self, dsn: str, *, application_name: str, max_connections: int) -> None:
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
            connection = self._idle.pop() if self._idle else await self.open()
            try:
                yield connection
            finally:
                await self._take_back(connection)

    async def open(self) -> Connection:
        """Open one, by a role that row security holds for.

        Raises:
            AccessRefused: it is for none that passes it by.
            WalstreamError: it cannot be opened.
        """
        connection = await connect(self._dsn, application_name=self._application_name)
        try:
            with impatient(connection, WHO_SECONDS):
                row = await (await connection.execute(_WHO)).fetchone()
        except psycopg.Error as error:
            await connection.close()
            raise server_error(error) from error
        except BaseException:
            await connection.close()
            raise
        if row is not None and (row[1] or row[2]):
            await connection.close()
            raise _too_mighty(row[0], "a superuser" if row[1] else "one with BYPASSRLS")
        return connection

    async def close(self) -> None:
        """Close those that nobody has."""
        while self._idle:
            await self._idle.pop().close()

    async def _take_back(self, connection: Connection) -> None:
        """Keep it, unless it has been left in the middle of something."""
        idle = connection.info.transaction_status is TransactionStatus.IDLE
        if not connection.closed and idle:
            self._idle.append(connection)
        else:
            await connection.close()


def _too_mighty(role: str, what: str) -> AccessRefused:
    return AccessRefused(
        f"row security is asked by the role {role}, which is {what}",
        hint="give [access.row_security] the dsn of a role made by CREATE ROLE <name> LOGIN"
        " NOINHERIT, and GRANT it the roles of the readers; see docs/access.md",
    )
