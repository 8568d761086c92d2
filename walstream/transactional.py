"""Exactly once into PostgreSQL: a handler's work and its position, in one transaction.

A change comes again when walstream or a server crashed before it was confirmed. A transactional
handler works inside a transaction of the database that it writes to, and the same transaction
records the change's position in ``walstream.progress``. So both are there, or neither is, and what
comes again up to the recorded position is recognised and left out.

The position of a change is the pair of its transaction's ``end_lsn`` and its ordinal. One route
gets its changes in commit order and one at a time, so positions only grow, and one row for each
slot and route tells everything. Three things hold that up:

- Ordinals count what the server sends. They may not depend on which routes there are, so with a
  transactional route the server is asked for everything, whatever else could be pushed down to it.
- A non-transactional message has the position ``(lsn, 0)``. The server reads the WAL in order. It
  sends a message when it comes to its record, which ends at ``lsn``, and a transaction when it
  comes to its commit record, which ends at ``end_lsn``. So all these positions come in ascending
  order, no message falls inside of a transaction, and two records never end at the same place.
- The names of transactional routes are unique within a slot and stay: a route with a new name
  knows of nothing that was applied before.
- A position means something on its timeline only. After a failover, or a restore to an earlier
  time, the WAL goes on from where the new timeline began, and what comes then may have positions
  that were recorded for what was lost. So the timeline is recorded too, and a position beyond the
  place where it was left is refused.

A dead letter is replayed after changes that came behind it. Its position is recorded by itself, in
``walstream.replayed``, and that of the route stays: the daemon may have parked the letter while
changes before it were still to be applied.

The row is locked while a handler works. Of two processes, such as one that is stuck and its
successor, the second one waits for the first, sees the position that it recorded, and applies only
what lies beyond it.

What PostgreSQL promises at COMMIT is what counts: in a database with ``synchronous_commit = off`` a
crash may take back what was confirmed, and such changes do not come again.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Final, TypeAlias

import psycopg
import structlog
from psycopg import AsyncConnection, BaseConnection, Connection, sql
from psycopg.pq import TransactionStatus
from psycopg.rows import TupleRow, tuple_row

from walstream.changes import Message
from walstream.destinations import Item
from walstream.errors import (
    AccessRefused,
    ProgressUnfit,
    TargetUnavailable,
    TransactionBroken,
    Unavailable,
    WalstreamError,
)
from walstream.lsn import ZERO, Lsn
from walstream.postgres import CONNECT_ERRORS, complete, connect, not_connected, server_error

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.transactional")

Position: TypeAlias = tuple[Lsn, int]
"""Where a change is in the order in which changes come: its ``end_lsn`` and its ordinal there."""

NOTHING: Final[Position] = (ZERO, 0)
"""Before every change."""


def position_of(item: Item) -> Position:
    """Return the position of a change or message."""
    if item.transaction is not None:
        return item.transaction.end_lsn, item.ordinal
    assert isinstance(item, Message)  # noqa: S101 - every change has a transaction
    return item.lsn, 0


class _HandlersAsyncConnection(AsyncConnection[TupleRow]):
    """What ``async def`` handlers get: it is not theirs to end the transaction."""

    async def commit(self) -> None:
        raise _not_yours("commit()")

    async def rollback(self) -> None:
        raise _not_yours("rollback()")

    async def close(self) -> None:
        raise _not_yours("close()")


class _HandlersConnection(Connection[TupleRow]):
    """What ``def`` handlers get."""

    def commit(self) -> None:
        raise _not_yours("commit()")

    def rollback(self) -> None:
        raise _not_yours("rollback()")

    def close(self) -> None:
        raise _not_yours("close()")


class TransactionalTarget:
    """The database that one transactional handler writes to.

    Connections are opened when they are needed, and given up when they fail; what was committed is
    read from the table again. They are in autocommit mode with an explicit transaction, so that
    ``connection.transaction()`` in a handler is a savepoint. psycopg prepares statements that come
    often: behind a pooler that cannot follow, a handler sets ``connection.prepare_threshold`` to
    None. What a handler sets on the connection stays until the connection is renewed.
    """

    def __init__(
        self, dsn: str, *, slot: str, route: str, application_name: str, replaying: bool = False
    ) -> None:
        """Name the database and the row of the table.

        Args:
            dsn: a connection string.
            slot: from which the changes come.
            route: unique among the transactional routes of the slot.
            application_name: as the database shows it.
            replaying: what comes are dead letters. They may lie before what is recorded, and are
                applied unless they themselves are recorded as replayed.
        """
        self._dsn = dsn
        self._application_name = application_name
        self._route = route
        self._replaying = replaying
        self._statements = (_ReplayStatements if replaying else _Statements)(slot, route)
        self._systemid = ""
        self._timeline: int | None = None
        self._xid = ""  # of the transaction that a handler is working in, as its database calls it
        self._recorded = NOTHING  # at least; the table knows better
        self._replayed: frozenset[Position] = frozenset()
        self._connection: _HandlersAsyncConnection | None = None
        self._reader: AsyncConnection[TupleRow] | None = None
        self._thread_connection: _HandlersConnection | None = None
        self._in_thread = threading.Lock()
        self._is_closed = False

    async def open(
        self,
        *,
        systemid: str,
        flush_lsn: Lsn,
        timeline: int | None = None,
        history: Sequence[tuple[int, Lsn]] = (),
    ) -> None:
        """Make sure that the table is there, and that what it has recorded is about this source.

        To be called at the start of each session.

        Args:
            systemid: of the cluster that the changes come from.
            flush_lsn: how far its WAL goes, asked for when the slot was already ours: a process
                that had it before may record what it was sent until then.
            timeline: on which the cluster is; None when it was not asked, nothing of it is
                compared or recorded then.
            history: which timelines that one goes on from, and where each of them was left.

        Raises:
            TargetUnavailable: the database cannot be reached or written to now.
            AccessRefused: the table is not there and may not be made, or not be written to.
            ProgressUnfit: what is recorded is of another cluster, or lies beyond its WAL, or on a
                timeline that the cluster does not go on from.
            SetupError: the connection string cannot be used.
        """
        self._is_closed = False
        self._systemid, self._timeline = systemid, None
        async with self._questions() as connection:
            row = await self._prepare(connection, timeline)
            rows = await (await connection.execute(self._statements.replayed)).fetchall()
            replayed = frozenset((Lsn.parse(end_lsn), ordinal) for end_lsn, ordinal in rows)
            recorded = self._position(row)
            furthest = max({recorded, *replayed})[0]
            if furthest > flush_lsn:
                raise self._beyond(furthest, flush_lsn)
            if row is not None and timeline is not None and row[3] != timeline:
                self._verify_timeline(furthest, row[3], timeline, history)
                await self._go_on(connection, row, timeline)
        self._recorded, self._replayed, self._timeline = recorded, replayed, timeline

    async def has_applied(self, item: Item) -> bool:
        """Ask whether an item has been applied, in its turn or as a dead letter.

        For what would be parked: it may come again after a crash. While replaying nothing is known.

        Raises:
            TargetUnavailable, SetupError: as `open`.
        """
        if self._replaying:
            return False
        if position_of(item) <= self._recorded:
            return True
        self._reader = self._reader or await self._reached()
        try:
            with self._asking():
                row = await _ask(self._reader, self._statements.applied(position_of(item)))
        except BaseException:
            self._discard(self._reader)
            raise
        return row is not None

    async def forget_replayed(self) -> None:
        """Remove what was recorded of replayed letters that the route's position covers by now.

        To be called when the route has no letters any more.

        Raises:
            TargetUnavailable, SetupError: as `open`.
        """
        async with self._questions() as connection:
            await connection.execute(self._statements.forget)

    async def run(
        self, items: Sequence[Item], call: Callable[[list[Item], AsyncConnection], Awaitable[None]]
    ) -> int:
        """Apply in one transaction what has not been applied before.

        Args:
            items: in the order in which they came.
            call: the handler, for those that are new; it is not called when there is none.

        Returns:
            How many were left out because they had been applied before.

        Raises:
            TargetUnavailable: the database cannot be used now, or went away; perhaps in the middle
                of COMMIT. To be called again with the same items, whatever became of them.
            TransactionBroken: the handler ended the transaction, or left it failed.
            ProgressUnfit: the table's row belongs to another cluster or timeline by now.
            SetupError: the database must be changed first.
            Exception: what the handler raised, or the database at COMMIT; all is rolled back.
        """
        items_left = self._beyond_recorded(items)
        if items_left:
            connection = self._connection = self._connection or await self._connected()
            try:
                items_left = await self._apply(connection, items_left, call)
            except BaseException as error:
                await self._roll_back(connection, error)
                raise
        return len(items) - len(items_left)

    def run_sync(
        self, items: Sequence[Item], call: Callable[[list[Item], Connection], None]
    ) -> int:
        """As `run`, for a handler that blocks, in its thread."""
        try:
            with self._in_thread:
                return self._run_in_thread(items, call)
        finally:
            if self._is_closed:
                self._close_threads()

    async def close(self) -> None:
        """Close the connections; that of a function that still runs, when it returns."""
        self._is_closed = True
        self._close_threads()
        for connection in (self._connection, self._reader):
            if connection is not None:
                self._discard(connection)

    def _close_threads(self) -> None:
        if self._in_thread.acquire(blocking=False):
            try:
                if self._thread_connection is not None:
                    self._discard(self._thread_connection)
            finally:
                self._in_thread.release()

    # The table

    @asynccontextmanager
    async def _questions(self) -> AsyncIterator[AsyncConnection[TupleRow]]:
        """Open a connection of our own, outside of the handler's transactions."""
        connection = await self._reached()
        try:
            with self._asking():
                yield connection
        finally:
            await connection.close()

    async def _reached(self) -> AsyncConnection[TupleRow]:
        try:
            return await connect(self._dsn, application_name=self._application_name)
        except WalstreamError as error:
            raise self._unreachable(error) from None

    async def _prepare(
        self, connection: AsyncConnection[TupleRow], timeline: int | None
    ) -> TupleRow | None:
        """Make what is missing, and read the row."""
        there = await connection.execute(_THERE)
        if await there.fetchone() is None:
            await connection.execute(_CREATE)
        await connection.execute(_TRY_RIGHTS)
        await connection.execute(self._statements.insert(self._systemid, timeline))
        durability = await (await connection.execute("SHOW synchronous_commit")).fetchone()
        if durability == ("off",):
            log.warning("target_not_durable", route=self._route, synchronous_commit="off")
        return await (await connection.execute(self._statements.read)).fetchone()

    def _position(self, row: TupleRow | None) -> Position:
        """Read the table's row.

        Raises:
            ProgressUnfit: it belongs to another cluster, or to another timeline by now.
        """
        if row is None:  # somebody wants to begin anew, and has deleted it in this very moment
            return NOTHING
        end_lsn, ordinal, systemid, timeline = row[:4]
        if systemid != self._systemid:
            message = (
                f"walstream.progress has recorded positions of the cluster {systemid} for this slot"
                f" and the route {self._route}, and the changes come from {self._systemid}"
            )
            hint = (
                "is this the right source? If it is, bring over what is missing, then delete the"
                f" row: {self._statements.delete}. If two sources write into this database, name"
                " the slot or the handler of one of them otherwise"
            )
            raise ProgressUnfit(message, hint=hint)
        if None not in {timeline, self._timeline} and timeline != self._timeline:
            message = (
                f"another process records positions of timeline {timeline} for the route"
                f" {self._route} by now, and the changes come from timeline {self._timeline}"
            )
            raise ProgressUnfit(message, hint=_OLD_PRIMARY)
        return Lsn.parse(end_lsn), ordinal

    def _verify_timeline(
        self,
        end_lsn: Lsn,
        recorded: int | None,
        timeline: int,
        history: Sequence[tuple[int, Lsn]],
    ) -> None:
        """Make sure that a position on the recorded timeline is one of this timeline too.

        Rows of versions that recorded no timeline are taken as they are.

        Raises:
            ProgressUnfit: it is not, or nobody knows.
        """
        if recorded is None or end_lsn == ZERO:
            return
        ends = dict(history)
        if recorded not in ends:
            raise self._unknown_timeline(end_lsn, recorded, timeline)
        if end_lsn > ends[recorded]:
            raise self._lost_future(end_lsn, recorded, timeline, ends[recorded])

    async def _go_on(
        self, connection: AsyncConnection[TupleRow], row: TupleRow, timeline: int
    ) -> None:
        """Record the timeline that a verified row goes on with, if it is still the same row."""
        updated = await connection.execute(self._statements.go_on(row, timeline))
        if not updated.rowcount:
            raise self._unavailable("another process was quicker", _OTHER_PROCESS)

    def _unknown_timeline(self, end_lsn: Lsn, recorded: int, timeline: int) -> ProgressUnfit:
        message = (
            f"walstream.progress has recorded that the route {self._route} came to {end_lsn} on"
            f" timeline {recorded}, and as far as the server knows its timeline {timeline} does not"
            " go on from that one: changes could be left out wrongly"
        )
        hint = (
            f"was the source restored to an earlier time? {_TAKE_BACK} the row:"
            f" {self._statements.delete}. If nothing that was recorded is lost there, instead:"
            f" {self._statements.set_timeline(timeline)}"
        )
        return ProgressUnfit(message, hint=hint)

    def _lost_future(
        self, end_lsn: Lsn, recorded: int, timeline: int, switch_lsn: Lsn
    ) -> ProgressUnfit:
        message = (
            f"walstream.progress has recorded that the route {self._route} came to {end_lsn} on"
            f" timeline {recorded}, which the server left at {switch_lsn} for timeline {timeline}:"
            " what was applied beyond that is not there any more, and changes would be left out"
            " wrongly"
        )
        hint = (
            "the source was restored to an earlier time, or failed over to a standby that had not"
            f" received everything. {_TAKE_BACK} the row: {self._statements.delete}"
        )
        return ProgressUnfit(message, hint=hint)

    def _beyond(self, end_lsn: Lsn, flush_lsn: Lsn) -> ProgressUnfit:
        message = (
            f"walstream.progress has recorded that the route {self._route} came to {end_lsn}, and"
            f" the WAL of the cluster ends at {flush_lsn}: changes would be left out wrongly"
        )
        hint = (
            f"was the source restored to an earlier time? {_TAKE_BACK} the row:"
            f" {self._statements.delete}"
        )
        return ProgressUnfit(message, hint=hint)

    def _beyond_row(self, row: TupleRow | None, items: Sequence[Item]) -> list[Item]:
        """Return what the locked row does not cover, and note whose transaction it is."""
        if row is None:  # somebody has deleted it again
            raise self._unavailable("another process was quicker", _OTHER_PROCESS)
        self._recorded = self._position(row)
        self._xid = row[4]
        if not self._replaying:
            return self._beyond_recorded(items)
        replayed = {_parse_position(text) for text in row[5]}
        return [item for item in items if position_of(item) not in replayed]

    def _beyond_recorded(self, items: Sequence[Item]) -> list[Item]:
        if self._replaying:
            return list(items)
        recorded, replayed = self._recorded, self._replayed
        items = [item for item in items if position_of(item) > recorded]
        return [item for item in items if position_of(item) not in replayed] if replayed else items

    def _note(self, items: Sequence[Item]) -> None:
        if not self._replaying:
            self._recorded = position_of(items[-1])

    # A transaction, in the event loop

    async def _connected(self) -> _HandlersAsyncConnection:
        with self._connecting():
            return await _HandlersAsyncConnection.connect(self._conninfo(), autocommit=True)

    async def _apply(
        self,
        connection: _HandlersAsyncConnection,
        items: list[Item],
        call: Callable[[list[Item], AsyncConnection], Awaitable[None]],
    ) -> list[Item]:
        self._xid = ""
        with self._asking():
            row = await _ask(connection, self._statements.begin(items))
            if row is None:  # it was deleted
                insert = self._statements.insert_and_lock(self._systemid, self._timeline, items)
                row = await _ask(connection, insert)
        items = self._beyond_row(row, items)
        if not items:
            with self._asking():
                await _ask(connection, b"ROLLBACK")
            return items
        with self._handling(connection):
            await call(items, connection)
        with self._noticing_loss(connection), _noticing_another_transaction():
            await _ask(connection, self._statements.record_and_commit(items, self._xid))
        self._note(items)
        return items

    async def _roll_back(self, connection: _HandlersAsyncConnection, error: BaseException) -> None:
        """Leave no transaction behind; give up a connection of which that is not certain.

        Raises:
            TransactionBroken: the handler had committed before it raised.
        """
        row = None
        try:
            if _can_roll_back(connection, error):
                with suppress(psycopg.Error):
                    row = await _ask(connection, _rollback(self._xid))
        finally:
            if not _is_idle(connection):
                self._discard(connection)
        if row == _COMMITTED and not isinstance(error, TransactionBroken):
            raise _broken(TransactionStatus.IDLE) from error

    # The same in a thread

    def _run_in_thread(
        self, items: Sequence[Item], call: Callable[[list[Item], Connection], None]
    ) -> int:
        items_left = self._beyond_recorded(items)
        if items_left:
            connection = self._thread_connection = (
                self._thread_connection or self._connected_in_thread()
            )
            try:
                items_left = self._apply_in_thread(connection, items_left, call)
            except BaseException as error:
                self._roll_back_in_thread(connection, error)
                raise
        return len(items) - len(items_left)

    def _connected_in_thread(self) -> _HandlersConnection:
        with self._connecting():
            return _HandlersConnection.connect(self._conninfo(), autocommit=True)

    def _apply_in_thread(
        self,
        connection: _HandlersConnection,
        items: list[Item],
        call: Callable[[list[Item], Connection], None],
    ) -> list[Item]:
        self._xid = ""
        with self._asking():
            row = _ask_in_thread(connection, self._statements.begin(items))
            if row is None:
                insert = self._statements.insert_and_lock(self._systemid, self._timeline, items)
                row = _ask_in_thread(connection, insert)
        items = self._beyond_row(row, items)
        if not items:
            with self._asking():
                _ask_in_thread(connection, b"ROLLBACK")
            return items
        with self._handling(connection):
            call(items, connection)
        with self._noticing_loss(connection), _noticing_another_transaction():
            _ask_in_thread(connection, self._statements.record_and_commit(items, self._xid))
        self._note(items)
        return items

    def _roll_back_in_thread(self, connection: _HandlersConnection, error: BaseException) -> None:
        row = None
        try:
            if _can_roll_back(connection, error):
                with suppress(psycopg.Error):
                    row = _ask_in_thread(connection, _rollback(self._xid))
        finally:
            if not _is_idle(connection):
                self._discard(connection)
        if row == _COMMITTED and not isinstance(error, TransactionBroken):
            raise _broken(TransactionStatus.IDLE) from error

    def _conninfo(self) -> str:
        return complete(self._dsn, application_name=self._application_name)

    def _discard(self, connection: BaseConnection[TupleRow]) -> None:
        """Cut a connection; the server rolls back what was not committed."""
        connection.pgconn.finish()
        self._recorded = NOTHING  # the next server may have been restored from a backup
        if connection is self._connection:
            self._connection = None
        elif connection is self._reader:
            self._reader = None
        else:
            self._thread_connection = None

    # What errors mean

    @contextmanager
    def _connecting(self) -> Iterator[None]:
        try:
            yield
        except CONNECT_ERRORS as error:
            raise self._unreachable(not_connected(error, self._dsn)) from None

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Translate the errors of statements that are ours."""
        try:
            yield
        except psycopg.Error as error:
            raise self._translated(error) from None

    @contextmanager
    def _noticing_loss(self, connection: BaseConnection[TupleRow]) -> Iterator[None]:
        """Tell the loss of the connection from errors that are about what the handler did."""
        try:
            yield
        except Exception as error:
            if connection.broken:
                raise self._lost(error) from error
            raise

    @contextmanager
    def _handling(self, connection: BaseConnection[TupleRow]) -> Iterator[None]:
        """Look at what a handler leaves behind, whether it returned or raised."""
        with self._noticing_loss(connection):
            try:
                yield
            except Exception as error:
                if _is_idle(connection) and not isinstance(error, TransactionBroken):
                    raise _broken(TransactionStatus.IDLE) from error
                raise
        if connection.broken:
            raise self._lost(None)
        status = connection.info.transaction_status
        if status != TransactionStatus.INTRANS:
            raise _broken(status)

    def _translated(self, error: psycopg.Error) -> WalstreamError:
        match error.sqlstate:
            case "42501":
                return AccessRefused(
                    f"the route {self._route} may not record how far it has come:"
                    f" {error.diag.message_primary}",
                    hint=_GRANT,
                )
            case "25006":
                return self._unavailable(
                    "it is read-only",
                    "is it a standby? target_session_attrs=read-write in the connection string"
                    " finds the primary among several hosts",
                )
            case "55P03":
                return self._unavailable("another process holds the route's row", _OTHER_PROCESS)
            case "23505" | "40001" | "40P01" | "42P06" | "42P07":
                return self._unavailable("another process was quicker", "")
            case _:
                return self._unreachable(server_error(error))

    def _lost(self, error: Exception | None) -> TargetUnavailable:
        """Say why the connection is gone. Other errors of a handler may tell of rows."""
        state = getattr(error, "sqlstate", None) or ""
        if state in {"25P03", "25P04"}:
            return self._unavailable("the server ended a transaction that took too long", _TOO_SLOW)
        if isinstance(error, psycopg.OperationalError) and state[:2] in {"", "08", "57"}:
            return self._unavailable(server_error(error).message, "")
        return self._unavailable("the connection was cut", "")

    def _unreachable(self, error: WalstreamError) -> WalstreamError:
        """Say of which database an error is."""
        if isinstance(error, Unavailable):
            return self._unavailable(error.message, error.hint)
        error.message = f"the database of the transactional route {self._route}: {error.message}"
        return error

    def _unavailable(self, reason: str, hint: str) -> TargetUnavailable:
        message = f"the database of the transactional route {self._route}: {reason}"
        return TargetUnavailable(message, hint=hint)


_COLUMNS: Final = "end_lsn::text, ordinal, system_identifier, timeline"
_XID: Final = "pg_catalog.txid_current()::text"  # every version has it under this name
_COMMITTED: Final = ("committed",)


class _Statements:
    """The statements about one row, as text: several go to the server in one round trip."""

    def __init__(self, slot: str, route: str) -> None:
        self._slot, self._route = _literal(slot), _literal(route)
        self._row = row = f"slot = {self._slot} AND route = {self._route}"
        self.delete = (
            f"DELETE FROM walstream.progress WHERE {row};"  # noqa: S608 - quoted literals
            f" DELETE FROM walstream.replayed WHERE {row}"
        )
        self.read = f"SELECT {_COLUMNS} FROM walstream.progress WHERE {row}".encode()  # noqa: S608
        self.replayed = (
            f"SELECT end_lsn::text, ordinal FROM walstream.replayed WHERE {row}"  # noqa: S608
        ).encode()
        self.forget = (
            f"DELETE FROM walstream.replayed WHERE {row} AND (end_lsn, ordinal) <="  # noqa: S608
            f" (SELECT end_lsn, ordinal FROM walstream.progress WHERE {row})"
        ).encode()
        self._lock = (
            f"SELECT {_COLUMNS}, {_XID} FROM walstream.progress"  # noqa: S608
            f" WHERE {row} FOR UPDATE"
        ).encode()
        self._begin = b"BEGIN; " + self._lock
        self._end = f", recorded_at = now() WHERE {row}; COMMIT".encode()

    def begin(self, _: Sequence[Item]) -> bytes:
        """The start of a transaction about these items; it locks and reads the row."""
        return self._begin

    def insert(self, systemid: str, timeline: int | None) -> bytes:
        """Make the row, unless it is there: only what is there can be locked."""
        return (
            "INSERT INTO walstream.progress"  # noqa: S608
            f" (slot, route, system_identifier, timeline) VALUES ({self._slot}, {self._route},"
            f" {_literal(systemid)}, {_number(timeline)}) ON CONFLICT DO NOTHING"
        ).encode()

    def set_timeline(self, timeline: int) -> str:
        """Record another timeline, as text."""
        return f"UPDATE walstream.progress SET timeline = {timeline} WHERE {self._row}"  # noqa: S608

    def go_on(self, row: TupleRow, timeline: int) -> bytes:
        """Record another timeline in a row that was read, unless it is another one by now."""
        end_lsn, ordinal, _, recorded = row
        return (
            f"{self.set_timeline(timeline)}"
            f" AND (end_lsn, ordinal) = ('{end_lsn}', {ordinal})"
            f" AND timeline IS NOT DISTINCT FROM {_number(recorded)}"
        ).encode()

    def insert_and_lock(self, systemid: str, timeline: int | None, _: Sequence[Item]) -> bytes:
        """Within the transaction that did not find the row."""
        return self.insert(systemid, timeline) + b"; " + self._lock

    def record_and_commit(self, items: Sequence[Item], xid: str) -> bytes:
        """The end of a transaction; it fails in another one than that which was begun."""
        end_lsn, ordinal = position_of(items[-1])
        return b"UPDATE walstream.progress SET end_lsn = '%b', ordinal = %b%b" % (
            str(end_lsn).encode(),
            _only_in(xid, ordinal).encode(),
            self._end,
        )

    def applied(self, position: Position) -> bytes:
        """Give a row when the route has come to a position, or its letter was replayed."""
        values = _values([position])
        return (
            f"SELECT 1 FROM walstream.progress WHERE {self._row}"  # noqa: S608
            f" AND (end_lsn, ordinal) >= {values} UNION ALL SELECT 1 FROM walstream.replayed"
            f" WHERE {self._row} AND (end_lsn, ordinal) = {values}"
        ).encode()


class _ReplayStatements(_Statements):
    """Those of a replay: every letter is recorded by itself, and the row stays as it is."""

    def begin(self, items: Sequence[Item]) -> bytes:
        """As for the daemon; the row comes with the positions that are recorded as replayed."""
        return b"BEGIN; " + self._lock + b"; " + self._read_with_replayed(items)

    def insert_and_lock(self, systemid: str, timeline: int | None, items: Sequence[Item]) -> bytes:
        """Within the transaction that did not find the row."""
        locked = super().insert_and_lock(systemid, timeline, items)
        return locked + b"; " + self._read_with_replayed(items)

    def record_and_commit(self, items: Sequence[Item], xid: str) -> bytes:
        """The end of a transaction; it fails in another one than that which was begun."""
        values = ", ".join(
            f"({self._slot}, {self._route}, '{end_lsn}', {_only_in(xid, ordinal)})"
            for end_lsn, ordinal in map(position_of, items)
        )
        return (
            "INSERT INTO walstream.replayed (slot, route, end_lsn, ordinal)"  # noqa: S608
            f" VALUES {values}; COMMIT"
        ).encode()

    def _read_with_replayed(self, items: Sequence[Item]) -> bytes:
        """Read with a snapshot of its own: what was committed while it waited for the lock."""
        values = _values(map(position_of, items))
        return (
            f"SELECT {_COLUMNS}, {_XID}, ARRAY("  # noqa: S608
            f"SELECT end_lsn || ':' || ordinal FROM walstream.replayed WHERE {self._row}"
            f" AND (end_lsn, ordinal) IN ({values})) FROM walstream.progress WHERE {self._row}"
        ).encode()


def _only_in(xid: str, ordinal: int) -> str:
    """Null, which the table does not take, in a transaction that the handler has begun."""
    return f"CASE WHEN {_XID} = '{xid}' THEN {ordinal} END"


def _rollback(xid: str) -> bytes:
    """Roll back, and ask what became of the transaction that was begun for the handler."""
    return f"ROLLBACK; SELECT pg_catalog.txid_status({xid})".encode() if xid else b"ROLLBACK"


def _number(value: int | None) -> str:
    return "NULL" if value is None else str(value)


def _values(positions: Iterable[Position]) -> str:
    return ", ".join(f"('{end_lsn}'::pg_lsn, {ordinal})" for end_lsn, ordinal in positions)


def _parse_position(text: str) -> Position:
    end_lsn, _, ordinal = text.partition(":")
    return Lsn.parse(end_lsn), int(ordinal)


async def _ask(connection: AsyncConnection[TupleRow], statements: bytes) -> TupleRow | None:
    """Run statements in one round trip; return the first row of the last one."""
    cursor = connection.cursor(row_factory=tuple_row)  # the handler may have set another one
    await cursor.execute(statements)
    while cursor.nextset():
        pass
    return await cursor.fetchone() if cursor.description else None


def _ask_in_thread(connection: Connection[TupleRow], statements: bytes) -> TupleRow | None:
    cursor = connection.cursor(row_factory=tuple_row)
    cursor.execute(statements)
    while cursor.nextset():
        pass
    return cursor.fetchone() if cursor.description else None


@contextmanager
def _noticing_another_transaction() -> Iterator[None]:
    """Translate what recording says in a transaction that the handler has begun."""
    try:
        yield
    except psycopg.errors.NotNullViolation as error:
        if (error.diag.schema_name, error.diag.column_name) == ("walstream", "ordinal"):
            raise _broken(TransactionStatus.IDLE) from None
        raise


def _is_idle(connection: BaseConnection[TupleRow]) -> bool:
    return connection.info.transaction_status == TransactionStatus.IDLE


def _can_roll_back(connection: BaseConnection[TupleRow], error: BaseException) -> bool:
    """Whether the connection is in order; a cancellation may have hit it anywhere."""
    return isinstance(error, Exception) and connection.info.transaction_status in {
        TransactionStatus.INTRANS,
        TransactionStatus.INERROR,
    }


def _literal(text: str) -> str:
    return sql.Literal(text).as_string()


def _not_yours(call: str) -> TransactionBroken:
    return TransactionBroken(f"a transactional handler called {call}", hint=_LEAVE_IT)


def _broken(status: TransactionStatus) -> TransactionBroken:
    match status:
        case TransactionStatus.IDLE:
            message = "a transactional handler ended its transaction: what it did may be committed"
        case TransactionStatus.INERROR:
            message = "a transactional handler returned although a statement had failed"
            return TransactionBroken(message, hint=_SAVEPOINT)
        case _:
            message = "a transactional handler returned in the middle of a statement"
    return TransactionBroken(message, hint=_LEAVE_IT)


_LEAVE_IT: Final = (
    "return to commit and raise to roll back; connection.transaction() is a savepoint; COMMIT and"
    " ROLLBACK are walstream's, so that the change and its position are recorded together"
)
_SAVEPOINT: Final = (
    "the transaction can only be rolled back: let the error out of the handler, or put the"
    " statement that may fail into a savepoint, with connection.transaction()"
)
_TOO_SLOW: Final = (
    "idle_in_transaction_session_timeout or transaction_timeout is shorter than the handler takes:"
    " raise it for this role, or make the handler quicker"
)
_OTHER_PROCESS: Final = (
    "it works on the same slot and route, or is stuck there; the table must be left to walstream"
)

_OLD_PRIMARY: Final = (
    "the server failed over or was restored, and this process streams from the one that was left:"
    " stop it, and that server"
)
_TAKE_BACK: Final = (
    "Then take back in the target what is not there any more, bring over what is missing, and"
    " delete"
)

_PROGRESS: Final = (
    "slot text, route text, system_identifier text NOT NULL,"
    " end_lsn pg_lsn NOT NULL DEFAULT '0/0', ordinal bigint NOT NULL DEFAULT 0,"
    " recorded_at timestamptz NOT NULL DEFAULT now(), timeline int, PRIMARY KEY (slot, route)"
)
_REPLAYED: Final = (
    "slot text, route text, end_lsn pg_lsn, ordinal bigint,"
    " replayed_at timestamptz NOT NULL DEFAULT now(), PRIMARY KEY (slot, route, end_lsn, ordinal)"
)
_ADD_TIMELINE: Final = "ALTER TABLE walstream.progress ADD COLUMN IF NOT EXISTS timeline int"
"""Tables of versions that did not record it have no such column."""

_THERE: Final = b"""
    SELECT FROM pg_attribute
     WHERE attrelid = to_regclass('walstream.progress') AND attname = 'timeline'
       AND to_regclass('walstream.replayed') IS NOT NULL"""
_TRY_RIGHTS: Final = b"""
    UPDATE walstream.progress SET end_lsn = '0/0', ordinal = 0, recorded_at = now(), timeline = NULL
     WHERE false;
    INSERT INTO walstream.replayed (slot, route, end_lsn, ordinal)
    SELECT '', '', '0/0', 0 WHERE false;
    DELETE FROM walstream.replayed WHERE false"""
"""Whether the role may do what comes later is asked of the server for no row at all."""

_CREATE: Final = f"""
DO $$
BEGIN
    -- One after another: IF NOT EXISTS does not see what another session has not committed.
    PERFORM pg_advisory_xact_lock(hashtextextended('walstream.progress', 0));
    -- Only then, because IF NOT EXISTS asks for the right to create in any case.
    IF to_regnamespace('walstream') IS NULL THEN
        CREATE SCHEMA walstream;
    END IF;
    CREATE TABLE IF NOT EXISTS walstream.progress ({_PROGRESS});
    {_ADD_TIMELINE};
    CREATE TABLE IF NOT EXISTS walstream.replayed ({_REPLAYED});
END
$$""".encode()
_GRANT: Final = (
    "let the owner of the database run sql/06_progress.sql, or: CREATE SCHEMA IF NOT EXISTS"
    f" walstream; CREATE TABLE IF NOT EXISTS walstream.progress ({_PROGRESS}); {_ADD_TIMELINE};"
    f" CREATE TABLE IF NOT EXISTS walstream.replayed ({_REPLAYED});"
    " GRANT USAGE ON SCHEMA walstream TO <role>; GRANT SELECT, INSERT, UPDATE ON walstream.progress"
    " TO <role>; GRANT SELECT, INSERT, DELETE ON walstream.replayed TO <role>"
)
