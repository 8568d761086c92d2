"""What the server's row security shows to whom: asked as that role, with those claims.

What is not known to be shown is not: an error, an answer that does not come in time, a row that
says something else by now. That is so for those rows and those readers alone, and it is logged and
counted. Nobody waits for it but they: a question that is slow leaves a connection to the others.

Whoever asks for the same rows as the same, while they wait for a connection, is answered by one
query.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Final

import msgspec
import psycopg
import structlog
from psycopg import sql

from walstream.access.connections import Connection, Connections
from walstream.access.questions import (
    BEGIN,
    END,
    LOOKUP,
    Asked,
    Lookup,
    KeyColumn,
    Printed,
    asked_of,
    asked_relation,
    is_shown,
    preparation,
    question,
)
from walstream.access.readers import Persona, Sight
from walstream.changes import Change, Layout, Relation
from walstream.errors import ConnectionLost, Unavailable, WalstreamError
from walstream.postgres import impatient, server_error
from walstream.vitals import RowSecurityVitals

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.access")

MAX_ROWS: Final = 500
"""So many are asked about at once."""

SLOW_SECONDS: Final = 0.1
"""Who was answered so late is asked by a connection that others do not need."""

PARTS: Final = 4
"""So many times the time of a question may be taken to find the row that it stumbles over."""

EARLY_SECONDS: Final = 5.0
"""So long a transaction is waited for that the walsender knows of and other sessions do not.

Under synchronous replication that takes until the standbys have it.
"""

EARLY_PAUSE_SECONDS: Final = 0.005

RETRY_SECONDS: Final = 10.0
"""So long it is tried to reach a server that cannot be reached."""

RETRY_PAUSE_SECONDS: Final = 0.2

LOG_SECONDS: Final = 60.0
"""A failure of one kind is logged so often at most."""

MAX_LOOKUPS: Final = 512
MAX_LOGGED: Final = 1000


class RowSecurity:
    """Asks."""

    def __init__(
        self,
        dsn: str,
        *,
        application_name: str,
        max_connections: int = 2,
        timeout_seconds: float = 1.0,
    ) -> None:
        """Connect to nothing yet."""
        self._connections = Connections(
            dsn, application_name=application_name, max_connections=max_connections
        )
        self._timeout_seconds = timeout_seconds
        self._desks: dict[Hashable, _Desk] = {}
        self._slow: dict[Hashable, None] = {}
        self._lookups: dict[tuple[Layout, Relation], Lookup] = {}
        self._logged: dict[Hashable, float] = {}
        self._vitals = RowSecurityVitals()
        self.masked: Callable[[Layout], frozenset[str]] = _nothing
        """Which columns of a table come here in another form than they have there."""

    async def prepare(self) -> None:
        """See that the server can be asked.

        Raises:
            WalstreamError: it cannot be reached, or the role is one that row security is not for.
        """
        async with self._connections.borrowed(is_slow=False):
            pass

    async def visible(self, sight: Sight, changes: Sequence[Change]) -> list[bool]:
        """Say of each of some inserts and updates whether it is shown."""
        if sight.persona is None:
            return [True] * len(changes)
        answers = [self._desk(sight, change.layout).take(change) for change in changes]
        await asyncio.wait(answers)  # which are others' answers, too: they are not cancelled
        return [answer.result() for answer in answers]

    def vitals(self) -> RowSecurityVitals:
        """Say what was asked, and what came of it."""
        return self._vitals

    async def close(self) -> None:
        """Stop asking; what is not answered is not shown."""
        desks = list(self._desks.values())
        self._desks.clear()
        for desk in desks:
            desk.close()
        await asyncio.gather(*(desk.task for desk in desks), return_exceptions=True)
        await self._connections.close()

    def _desk(self, sight: Sight, layout: Layout) -> _Desk:
        key = (sight, layout)
        desk = self._desks.get(key)
        if desk is None:
            desk = self._desks[key] = _Desk(self._answer, sight, layout)
            desk.task.add_done_callback(lambda _: self._desks.pop(key, None))
        return desk

    async def _answer(self, sight: Sight, layout: Layout, changes: Sequence[Change]) -> list[bool]:
        """Answer a desk."""
        persona = sight.persona
        assert persona is not None  # noqa: S101 - nobody else has a desk
        try:
            lookup = await self._lookup(sight, layout)
        except psycopg.Error as error:
            self._note(persona, asked_relation(sight, layout), error)
            return [False] * len(changes)
        except WalstreamError as error:
            self._note_unasked(persona, asked_relation(sight, layout), error)
            return [False] * len(changes)
        masked = self.masked(layout)
        asked = [asked_of(change, lookup, sight, masked) for change in changes]
        if None in asked:
            self._note_unaskable(persona, lookup)
        batch = _Batch(persona, lookup, layout, {change.xid for change in changes})
        sure = [one for one in asked if one is not None]
        shown = await self._ask(batch, sure, time.monotonic() + PARTS * self._timeout_seconds)
        found = {id(one) for one, is_there in zip(sure, shown, strict=True) if is_there}
        verdicts = [one is not None and id(one) in found for one in asked]
        self._count(asked=len(verdicts), hidden=verdicts.count(False))
        return verdicts

    async def _ask(self, batch: _Batch, asked: Sequence[Asked], until: float) -> list[bool]:
        """Ask about some rows; if that fails for a row's sake, about fewer at a time."""
        if not asked:
            return []
        try:
            return await self._query(batch, asked)
        except psycopg.Error as error:
            half = len(asked) // 2
            if half and _is_of_a_row(error) and time.monotonic() < until:
                first = await self._ask(batch, asked[:half], until)
                return first + await self._ask(batch, asked[half:], until)
            self._note(batch.persona, batch.lookup.relation, error)
        except WalstreamError as error:
            self._note_unasked(batch.persona, batch.lookup.relation, error)
        return [False] * len(asked)

    async def _query(self, batch: _Batch, asked: Sequence[Asked]) -> list[bool]:
        """Ask once, but again when the connection was lost, or when it is too early.

        Raises:
            psycopg.Error: the server has refused to answer, or not done it in time.
            WalstreamError: it cannot be reached.
        """
        columns = sorted({name for one in asked for name in one.columns})
        query = question(batch.lookup, columns, asked)
        began = time.monotonic()
        while True:
            answer = await self._rows(batch, query, began)
            if answer is not None:
                break
            if time.monotonic() - began > EARLY_SECONDS:
                raise Unavailable("a transaction cannot be seen yet that has been committed")
            await asyncio.sleep(EARLY_PAUSE_SECONDS)
        shown = [False] * len(asked)
        for place, *values in answer:
            one = asked[int(place) - 1]
            row = dict(zip(columns, values, strict=True))
            shown[int(place) - 1] = is_shown(one, row, batch.layout)
        return shown

    async def _rows(
        self, batch: _Batch, query: tuple[sql.Composed, Any], began: float
    ) -> list[list[Any]] | None:
        """Return what the server returns as it prints it; None when it is too early."""
        while True:
            try:
                async with self._connections.borrowed(is_slow=batch.speed in self._slow) as one:
                    return await self._timed(one, batch, query)
            except (psycopg.OperationalError, ConnectionLost) as error:
                is_lost = isinstance(error, WalstreamError) or error.sqlstate in _LOST
                if not is_lost or time.monotonic() - began > RETRY_SECONDS:
                    raise
            await asyncio.sleep(RETRY_PAUSE_SECONDS)

    async def _timed(
        self, connection: Connection, batch: _Batch, query: tuple[sql.Composed, Any]
    ) -> list[list[Any]] | None:
        began = time.monotonic()
        try:
            with impatient(connection, self._timeout_seconds + 1):
                return await _run(connection, batch, query, self._timeout_seconds)
        finally:
            if time.monotonic() - began > min(SLOW_SECONDS, self._timeout_seconds):
                self._slow[batch.speed] = None
                while len(self._slow) > MAX_LOGGED:
                    del self._slow[next(iter(self._slow))]
            else:
                self._slow.pop(batch.speed, None)

    async def _lookup(self, sight: Sight, layout: Layout) -> Lookup:
        """Ask how rows of a table are found, once for each shape of it."""
        relation = asked_relation(sight, layout)
        known = self._lookups.get((layout, relation))
        if known is None:
            async with self._connections.borrowed(is_slow=False) as connection:
                with impatient(connection, self._timeout_seconds + 1):
                    known = await _looked_up(connection, relation)
            if len(self._lookups) >= MAX_LOOKUPS:
                self._lookups.clear()
            self._lookups[layout, relation] = known
        return known
