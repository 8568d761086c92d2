"""The replication connection: psycopg's low-level interface under asyncio.

psycopg has no replication API, but since 3.3 ``execute("START_REPLICATION ...")`` leaves the
connection in the state COPY_BOTH, and its ``pgconn`` reads and writes from there. psycopg's own
``wait`` is never used for that: when it is cancelled it cancels the query on the server, which ends
the stream. Waiting for the socket by the event loop can be cancelled without harm.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

import msgspec
import psycopg
from psycopg import AsyncConnection
from psycopg.pq import ExecStatus

from walstream.errors import (
    ConnectionLost,
    ProtocolError,
    ServerShutdown,
    SetupError,
    WalstreamError,
)
from walstream.lsn import Lsn
from walstream.postgres import connect, cut, impatient, server_error

if TYPE_CHECKING:
    from psycopg.rows import TupleRow

BATCH_BYTES: Final = 1 << 20
BATCH_MESSAGES: Final = 100
"""A batch ends when the socket is empty, or when one of these is reached.

They bound memory, and keep what is made of a batch in the processor's cache: with batches of 1,000
messages a row of a kilobyte costs 8.2 µs of CPU time, with 100 it costs 5.7 µs.
"""

HOT_MESSAGES_PER_SECOND: Final = 10_000
HOT_WAIT_SECONDS: Final = 0.002
"""While messages come this fast, the reader lets them collect instead of waking up for each.

The server sends one row with one system call; a reader that sleeps in between makes it pay for the
wake-up too. Measured over TCP with 200,000 rows: 145,000 rows a second instead of 90,000, with a
third of the client's CPU time. A Unix socket buffers too little for it.
"""


COMMAND_SECONDS: Final = 120.0
"""How long the server may take for a command before it streams.

The longest is the creation of a slot, which waits for transactions that were running before.
"""


class SystemIdentity(msgspec.Struct, frozen=True):
    """What IDENTIFY_SYSTEM answers: which cluster this is, and where it stands."""

    systemid: str
    timeline: int
    flush_lsn: Lsn
    database: str


class CreatedSlot(msgspec.Struct, frozen=True):
    """What CREATE_REPLICATION_SLOT answers."""

    name: str
    consistent_point: Lsn
    snapshot: str | None


class ReplicationConnection:
    """One walsender of the server, from connecting to the end of its stream."""

    def __init__(self, connection: AsyncConnection[TupleRow]) -> None:
        self._connection = connection
        self._pgconn = connection.pgconn
        self._ended: WalstreamError | None = None
        self._has_copied_all = False
        self._descriptor = -1
        self._ready: asyncio.Future[None] | None = None
        self._woken = False
        self._hot = False
        self._may_run_hot = False
        self._emptied = True
        self._read_at = 0.0
        self._counted = 0
        self._counted_since = 0.0

    @classmethod
    async def open(
        cls,
        dsn: str,
        *,
        application_name: str,
        on_notice: Callable[[str, str], None] | None = None,
    ) -> Self:
        """Connect in logical walsender mode, with the session's settings pinned.

        Args:
            dsn: a connection string of the server itself; a pooler cannot carry replication.
            application_name: what ``pg_stat_replication`` shows.
            on_notice: called with SQLSTATE and text of what the server warns about while it
                streams.

        Raises:
            Unavailable: the server cannot be reached, or not now.
            SetupError: the server refuses.
        """
        connection = await connect(dsn, application_name=application_name, replication=True)
        if on_notice is not None:
            connection.add_notice_handler(
                lambda diagnostic: on_notice(
                    diagnostic.sqlstate or "", diagnostic.message_primary or ""
                )
            )
        return cls(connection)

    async def __aenter__(self) -> Self:
        """Close the connection at the end of the block."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the connection; the server frees the slot."""
        await self.close()

    async def identify_system(self) -> SystemIdentity:
        """Ask which cluster this is."""
        row = await self._row("IDENTIFY_SYSTEM")
        return SystemIdentity(row[0], int(row[1]), Lsn.parse(row[2]), row[3])

    async def wal_sender_timeout_seconds(self) -> float:
        """Ask after how much silence of ours this walsender ends; 0 for never.

        Another session's may differ: it can be set for a role, a database, or in the dsn.
        """
        (seconds,) = await self._row(
            "SELECT setting::float8 / 1000 FROM pg_settings WHERE name = 'wal_sender_timeout'"
        )
        return float(seconds)

    async def timeline_history(self, timeline: int) -> tuple[tuple[int, Lsn], ...]:
        """Ask which timelines a timeline goes on from, and where each of them was left.

        To be asked before `start`. Nothing when the server has lost the file that tells.
        """
        try:
            with impatient(self._connection, COMMAND_SECONDS):
                cursor = await self._connection.execute(b"TIMELINE_HISTORY %d" % timeline)
        except psycopg.errors.UndefinedFile:
            return ()
        except psycopg.Error as error:
            raise server_error(error, replication=True) from error
        # As it was sent: versions before 15 call it bytea and send text.
        content = cursor.pgresult.get_value(0, 1) if cursor.pgresult is not None else None
        return _parse_history(content or b"")

    async def create_slot(
        self,
        name: str,
        *,
        temporary: bool = False,
        failover: bool = False,
        snapshot: str = "nothing",
        lock_timeout_seconds: int = 0,
    ) -> CreatedSlot:
        """Create a logical slot for wal2json.

        Args:
            name: of the slot.
            lock_timeout_seconds: how long it may wait for transactions that are running; 0 is for
                ever. ``statement_timeout`` does not bound it.
            temporary: the slot ends with this connection.
            failover: standbys keep a copy of the slot (PostgreSQL 17 and later).
            snapshot: ``export`` to read, in another session, exactly the rows that the stream does
                not bring; ``nothing`` otherwise.

        Raises:
            SlotCreationBlocked: transactions were still running after ``lock_timeout_seconds``.
            WalstreamError: the server refuses.
        """
        command = (
            f"CREATE_REPLICATION_SLOT {_identifier(name)}{' TEMPORARY' if temporary else ''}"
            " LOGICAL wal2json"
        )
        if failover:
            command += f" (SNAPSHOT '{snapshot}', FAILOVER true)"
        else:  # the form that versions before 15 understand as well
            command += " EXPORT_SNAPSHOT" if snapshot == "export" else " NOEXPORT_SNAPSHOT"
        await self._execute(f"SET lock_timeout = '{lock_timeout_seconds}s'")
        row = await self._row(command)
        return CreatedSlot(row[0], Lsn.parse(row[1]), row[2])

    async def alter_slot(self, name: str, *, failover: bool) -> None:
        """Let standbys keep a copy of a slot, or not any more (PostgreSQL 17 and later).

        Raises:
            SlotBusy, SlotMissing: as the server says.
        """
        text = "true" if failover else "false"
        await self._execute(f"ALTER_REPLICATION_SLOT {_identifier(name)} (FAILOVER {text})")

    async def start(self, slot: str, options: Mapping[str, str]) -> None:
        """Start to stream from the position that the server has recorded for the slot.

        Never from a position of ours: the server skips silently what lies before a later one.

        Raises:
            SlotBusy, SlotMissing, SlotUnfit, SlotLost, PluginRefused: as the server says.
        """
        listed = ", ".join(
            f"{_identifier(key)} {_literal(value)}" for key, value in options.items()
        )
        await self._execute(f"START_REPLICATION SLOT {_identifier(slot)} LOGICAL 0/0 ({listed})")
        self._may_run_hot = self._is_tcp()
        # One of our own: libpq closes its one as soon as it notices that the connection is cut, and
        # the number may be another connection's before the event loop has forgotten it.
        self._descriptor = os.dup(self._pgconn.socket)

    async def read(self) -> list[bytes]:
        """Wait for messages and return all that have come: at least one, unless `wake` is called.

        Cancelling it loses nothing.

        Raises:
            ServerShutdown: the server ended the stream because it shuts down.
            ConnectionLost: the connection was cut.
            WalstreamError: the server ended the stream with another error.
        """
        await self._rest()
        while not (batch := self._drain()):
            if self._ended is not None:
                raise self._ended
            if self._woken:
                self._woken = False
                break
            self._hot = False
            await self._readable()
        self._measure(len(batch))
        return batch

    async def _rest(self) -> None:
        """Let other tasks run, and while the stream is hot, let messages collect.

        As long as messages come faster than they are delivered nothing waits for the socket:
        without this no timer would go off, and no signal be seen, until the stream has caught up.
        """
        seconds = 0.0
        if self._hot and self._emptied:
            # Delivering the last batch took its time; messages have collected meanwhile.
            seconds = self._read_at + HOT_WAIT_SECONDS - time.monotonic()
        await asyncio.sleep(max(seconds, 0.0))

    def wake(self) -> None:
        """Let a `read` that waits return at once, with nothing if nothing has come."""
        self._woken = True
        if self._ready is not None:
            _wake(self._ready)

    def send(self, message: bytes) -> None:
        """Send a status update; the socket takes it at once unless the server does not read.

        Raises:
            ConnectionLost: the connection was cut.
        """
        try:
            self._pgconn.put_copy_data(message)
            self._pgconn.flush()
        except psycopg.Error as error:
            self._ended = self._ended or self._cut(error)
            self.wake()
            raise self._ended from error

    async def finish(self) -> None:
        """End the stream from our side and wait until the server has read what we sent.

        What the server still had to send is read and dropped; it comes again from the slot.
        """
        try:
            self._pgconn.put_copy_end()
            self._pgconn.flush()
            while self._ended is None:
                self._drain()
                if self._ended is None:
                    await self._readable()
        except psycopg.Error as error:
            raise self._cut(error) from error

    async def close(self) -> None:
        """Close the connection."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        await self._connection.close()

    def abandon(self) -> None:
        """Cut the connection: who waits for an answer gets an error at once."""
        cut(self._connection)

    @property
    def backend_pid(self) -> int:
        """Of the walsender."""
        return self._pgconn.backend_pid

    def _drain(self) -> list[bytes]:
        """Take what libpq and the socket hold, without waiting.

        One ``consume_input`` reads 16 KB at most, so it is repeated until nothing comes.
        """
        batch: list[bytes] = []
        self._emptied = False
        try:
            size = self._take(batch)
            while self._ended is None and size < BATCH_BYTES and len(batch) < BATCH_MESSAGES:
                self._pgconn.consume_input()
                taken = self._take(batch)
                if not taken:
                    self._emptied = True
                    break
                size += taken
        except psycopg.Error as error:
            self._ended = self._cut(error)
        return batch

    def _take(self, batch: list[bytes]) -> int:
        """Add the messages that libpq holds to the batch; return their length in bytes."""
        if self._has_copied_all:
            self._take_result()
            return 0
        get_copy_data = self._pgconn.get_copy_data
        size = 0
        while True:
            length, data = get_copy_data(1)
            if length <= 0:
                break
            batch.append(data)  # type: ignore[arg-type]  # bytes, whatever the annotation says
            size += length
        if length == -1:
            self._has_copied_all = True
            self._take_result()
        return size

    def _take_result(self) -> None:
        """Take how the server ended the stream, if that has come: libpq would block for it."""
        if not self._pgconn.is_busy():
            self._ended = self._end_of_stream()

    def _end_of_stream(self) -> WalstreamError:
        result = self._pgconn.get_result()
        if result is None or result.status in {ExecStatus.COMMAND_OK, ExecStatus.COPY_IN}:
            return ServerShutdown("the server ended the stream: it shuts down")
        return server_error(psycopg.errors.error_from_result(result), replication=True)

    def _cut(self, error: psycopg.Error) -> WalstreamError:
        """The connection is gone; a server that still had words for it said them before."""
        translated = server_error(error, replication=True)
        if isinstance(translated, SetupError):
            return translated
        text = " ".join(str(error).split())
        if "server closed the connection unexpectedly" in text:
            return ConnectionLost("the server closed the connection without a word")
        return ConnectionLost(f"the connection was cut: {text}")

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        ready = self._ready = loop.create_future()
        descriptor = self._descriptor
        loop.add_reader(descriptor, _wake, ready)
        try:
            await ready
        finally:
            self._ready = None
            loop.remove_reader(descriptor)

    def _measure(self, messages: int) -> None:
        """Decide from the rate of the last milliseconds whether to let messages collect.

        A single batch says nothing: a reader that wakes up for every message sees batches of one.
        """
        now = self._read_at = time.monotonic()
        self._counted += messages
        elapsed = now - self._counted_since
        if elapsed >= HOT_WAIT_SECONDS:
            self._hot = self._may_run_hot and self._counted > HOT_MESSAGES_PER_SECOND * elapsed
            self._counted, self._counted_since = 0, now

    def _is_tcp(self) -> bool:
        with socket.socket(fileno=os.dup(self._pgconn.socket)) as descriptor:
            return descriptor.family != socket.AF_UNIX

    async def _execute(self, command: str) -> psycopg.AsyncCursor[TupleRow]:
        try:
            with impatient(self._connection, COMMAND_SECONDS):
                return await self._connection.execute(command.encode())
        except psycopg.Error as error:
            raise server_error(error, replication=True) from error

    async def _row(self, command: str) -> TupleRow:
        cursor = await self._execute(command)
        row = await cursor.fetchone()
        if row is None:
            message = f"the server answered {command.split(maxsplit=1)[0]} with nothing"
            raise ProtocolError(message)
        return row


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


def _parse_history(content: bytes) -> tuple[tuple[int, Lsn], ...]:
    """Read a history file: a timeline, where it was left, and why, in each line."""
    lines = [line.split() for line in content.decode(errors="replace").splitlines()]
    return tuple(
        (int(fields[0]), Lsn.parse(fields[1]))
        for fields in lines
        if fields and not fields[0].startswith("#")
    )


def _identifier(name: str) -> str:
    """Quote a name; the replication grammar knows double quotes only, no Unicode escapes."""
    return '"' + name.replace('"', '""') + '"'


def _literal(value: str) -> str:
    """Quote a string for a replication command, which takes backslashes as they are."""
    return "'" + value.replace("'", "''") + "'"
