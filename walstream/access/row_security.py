"""What the server's row security shows to whom: asked as that role, with those claims.

What is not known to be shown is not: an error, an answer that does not come in time, a row that
says something else by now. That is so for those rows and those readers alone, and it is logged and
counted. Nobody waits for it but they: a question that is slow leaves a connection to the others.

Whoever asks for the same rows as the same is answered by one query.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from itertools import islice
from typing import Final, TypeVar

import msgspec
import psycopg

from walstream.access.connections import Connections
from walstream.access.failures import Failures
from walstream.access.questions import (
    Asked,
    Lookup,
    Printed,
    Question,
    asked_of,
    asked_relation,
    is_shown,
)
from walstream.access.readers import Persona, Sight
from walstream.changes import Change, Layout, Relation
from walstream.errors import Unavailable, WalstreamError
from walstream.vitals import RowSecurityVitals

MAX_ROWS: Final = 500
"""So many are asked about at once."""

SLOW_SECONDS: Final = 0.1
SLOW_ROW_SECONDS: Final = 0.001
"""Who was answered so late, and so much later for each row, gets no connection others need."""

MAX_SLOW: Final = 1000

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

MAX_LOOKUPS: Final = 512
MAX_PREPARED: Final = 4096
"""So many changes are remembered as they are asked about: others ask about the same ones."""


class RowSecurity:
    """Asks."""

    def __init__(
        self,
        dsn: str | Callable[[], str],
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
        self._inquiries: dict[Hashable, _Inquiry] = {}
        self._slow: dict[Hashable, None] = {}
        self._lookups: dict[tuple[Layout, Relation], Lookup] = {}
        self._prepared: dict[Hashable, Asked | None] = {}
        self._failures = Failures()
        self._asked = self._hidden = self._questions = 0

    async def prepare(self) -> None:
        """See that the server can be asked.

        Raises:
            WalstreamError: it cannot be reached, or the role is one that row security is not for.
        """
        async with self._connections.borrowed(is_slow=False):
            pass

    async def visible(
        self, sight: Sight, changes: Sequence[Change], masked: frozenset[str]
    ) -> list[bool]:
        """Say of each of some changes whether its new row is shown.

        Args:
            sight: with a persona.
            changes: inserts and updates of one layout, at least one.
            masked: columns that they carry in another form than the table.
        """
        inquiry = self._inquiry(sight, changes[0].layout, masked)
        answers = [inquiry.take(change) for change in changes]
        await asyncio.wait(answers)  # which are others' answers, too: they are not cancelled
        return [answer.result() for answer in answers]

    def vitals(self) -> RowSecurityVitals:
        """Say what was asked, and what came of it."""
        return RowSecurityVitals(
            questions=self._questions,
            asked=self._asked,
            hidden=self._hidden,
            failed=self._failures.count,
        )

    async def close(self) -> None:
        """Stop asking; what is not answered is not shown."""
        tasks = [inquiry.task for inquiry in self._inquiries.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._prepared.clear()
        await self._connections.close()

    def _inquiry(self, sight: Sight, layout: Layout, masked: frozenset[str]) -> _Inquiry:
        key = (sight, layout, masked)
        inquiry = self._inquiries.get(key)
        if inquiry is None:

            async def answer(changes: Sequence[Change]) -> list[bool]:
                return await self._answer(sight, changes, masked)

            inquiry = _Inquiry(answer, lambda: self._inquiries.pop(key))
            self._inquiries[key] = inquiry
        return inquiry

    async def _answer(
        self, sight: Sight, changes: Sequence[Change], masked: frozenset[str]
    ) -> list[bool]:
        """Answer an inquiry."""
        layout, persona = changes[0].layout, sight.persona
        assert persona is not None  # noqa: S101 - nobody else inquires
        relation = asked_relation(sight, layout)
        try:
            lookup = await self._lookup(layout, relation)
        except (psycopg.Error, WalstreamError) as error:
            self._failures.note(persona, relation, error)
            return [False] * len(changes)
        asked = [self._asked_of(change, lookup, sight, masked) for change in changes]
        if None in asked:
            self._failures.note_unaskable(persona, relation)
        sure = [one for one in asked if one is not None]
        xids = frozenset(change.xid for change in changes)
        batch = _Batch(persona, lookup, layout, xids, time.monotonic())
        shown = iter(await self._ask(batch, sure) if sure else [])
        verdicts = [one is not None and next(shown) for one in asked]
        self._asked += len(verdicts)
        self._hidden += verdicts.count(False)
        return verdicts

    def _asked_of(
        self, change: Change, lookup: Lookup, sight: Sight, masked: frozenset[str]
    ) -> Asked | None:
        """Return what is asked about a change, the same for all who are sent the same columns."""
        key = (change, lookup, sight.projection, masked)
        if key not in self._prepared:
            if len(self._prepared) >= MAX_PREPARED:
                self._prepared.clear()
            self._prepared[key] = asked_of(change, lookup, sight, masked)
        return self._prepared[key]

    async def _ask(self, batch: _Batch, asked: Sequence[Asked]) -> list[bool]:
        """Ask about some rows; if that fails for one of them, about fewer at a time."""
        try:
            return await self._query(batch, asked)
        except (psycopg.Error, WalstreamError) as error:
            half = len(asked) // 2
            has_time = time.monotonic() < batch.began + PARTS * self._timeout_seconds
            if half and has_time and _is_of_a_row(error):
                first = await self._ask(batch, asked[:half])
                return first + await self._ask(batch, asked[half:])
            self._failures.note(batch.persona, batch.lookup.relation, error)
            return [False] * len(asked)

    async def _query(self, batch: _Batch, asked: Sequence[Asked]) -> list[bool]:
        """Ask once, but again when the connection was lost, or when it is too early.

        Raises:
            psycopg.Error: the server has refused to answer, or not done it in time.
            WalstreamError: it cannot be reached.
        """
        columns = sorted({name for one in asked for name in one.columns})
        question = Question(batch.persona, batch.lookup, columns, asked, batch.xids)
        began = time.monotonic()
        while True:
            rows = await _persistent(lambda: self._rows(batch, question))
            if rows is not None:
                break
            if time.monotonic() - began > EARLY_SECONDS:
                raise Unavailable("what has been committed cannot be seen yet")
            await asyncio.sleep(EARLY_PAUSE_SECONDS)
        return [
            place in rows
            and is_shown(one, dict(zip(columns, rows[place], strict=True)), batch.layout)
            for place, one in enumerate(asked, start=1)
        ]

    async def _rows(self, batch: _Batch, question: Question) -> dict[int, Sequence[Printed]] | None:
        """Return what is shown, by place, and note who is slow; None when it is too early."""
        who = (batch.persona, batch.lookup.relation)
        async with self._connections.borrowed(is_slow=who in self._slow) as connection:
            began = time.monotonic()
            self._questions += 1
            try:
                return await connection.ask(question, self._timeout_seconds)
            finally:
                allowed = SLOW_SECONDS + SLOW_ROW_SECONDS * len(question.asked)
                if time.monotonic() - began < min(allowed, self._timeout_seconds):
                    self._slow.pop(who, None)
                else:
                    self._slow[who] = None
                    if len(self._slow) > MAX_SLOW:
                        del self._slow[next(iter(self._slow))]

    async def _lookup(self, layout: Layout, relation: Relation) -> Lookup:
        """Ask how rows of a table are found, once for each shape of it."""

        async def ask() -> Lookup:
            async with self._connections.borrowed(is_slow=False) as connection:
                return await connection.lookup(relation)

        known = self._lookups.get((layout, relation))
        if known is None:
            known = await _persistent(ask)
            if len(self._lookups) >= MAX_LOOKUPS:
                self._lookups.clear()
            self._lookups[layout, relation] = known
        return known


_T = TypeVar("_T")


async def _persistent(ask: Callable[[], Awaitable[_T]]) -> _T:
    """Ask again, for some seconds, when the server cannot be reached."""
    began = time.monotonic()
    while True:
        try:
            return await ask()
        except Unavailable:
            if time.monotonic() - began > RETRY_SECONDS:
                raise
        await asyncio.sleep(RETRY_PAUSE_SECONDS)


class _Batch(msgspec.Struct, frozen=True, eq=False):
    """What is asked together: as whom, about which table, since when."""

    persona: Persona
    lookup: Lookup
    layout: Layout
    xids: frozenset[int]
    began: float


class _Inquiry:
    """Collects what is asked of one table as one reader, and has it answered in turn."""

    def __init__(
        self,
        answer: Callable[[Sequence[Change]], Awaitable[list[bool]]],
        at_end: Callable[[], object],
    ) -> None:
        self._answer = answer
        self._at_end = at_end
        self._waiting: dict[Change, asyncio.Future[bool]] = {}
        self.task = asyncio.create_task(self._run(), name="row security")

    def take(self, change: Change) -> asyncio.Future[bool]:
        """Take a question; one that is asked already is not asked again."""
        answer = self._waiting.get(change)
        if answer is None:
            answer = self._waiting[change] = asyncio.get_running_loop().create_future()
        return answer

    async def _run(self) -> None:
        try:
            while self._waiting:
                some = list(islice(self._waiting, MAX_ROWS))
                for change, verdict in zip(some, await self._answer(some), strict=True):
                    self._waiting.pop(change).set_result(verdict)
        finally:
            self._at_end()
            for answer in self._waiting.values():  # nothing is shown that is not known to be
                answer.set_result(False)


_OF_A_ROW: Final = frozenset({"21", "22", "23", "38", "39", "54", "P0", "XX"})
"""Classes of errors that a policy raises for one row and not for another."""

_TIMEOUT: Final = "57014"


def _is_of_a_row(error: Exception) -> bool:
    state = (error.sqlstate or "") if isinstance(error, psycopg.Error) else ""
    return state[:2] in _OF_A_ROW or state == _TIMEOUT
