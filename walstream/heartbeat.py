"""Heartbeats: a logical message that walstream writes into the WAL now and then, and gets back.

A heartbeat is not needed to let the server forget WAL. A slot in a quiet database beside busy ones
is confirmed up to the position that keepalives tell, and ``restart_lsn`` follows (measured with
PostgreSQL 15.18: within 3 seconds of each checkpoint). It is for those who want to *see* that
changes get through, in a database in which nothing is written for hours: the message goes the way
of every change, from the commit through the WAL, the walsender and the decoder, and its round trip
is the lag from end to end.

Each one is a transaction: some 200 bytes of WAL, one transaction id, and a flush. No route gets it
unless it names the prefix exactly.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Final

import msgspec
import structlog
from psycopg import sql

from walstream.catalog import Catalog
from walstream.changes import Message
from walstream.errors import AccessRefused, DatabaseUnfit, Unavailable, WalstreamError
from walstream.router import HEARTBEAT_PREFIX

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.heartbeat")

REFUSED_PAUSE_SECONDS: Final = 300.0
"""How long at least after the server has refused a heartbeat the next one is tried."""

_GRANT: Final = (
    "GRANT EXECUTE ON FUNCTION pg_logical_emit_message(boolean, text, text) TO <role>, from"
    " PostgreSQL 17 on with a fourth argument (boolean); or leave out heartbeat_seconds under"
    " [stream]"
)


class _Content(msgspec.Struct, frozen=True):
    """Of which slot the heartbeat is, who wrote it, and when, by a clock of the writer's own."""

    slot: str
    writer: str
    seconds: float


class Heartbeat:
    """Writes a message every so many seconds, and knows it again when the stream brings it.

    ``last_round_trip_seconds`` is how long the last one that came was under way, from before its
    commit until it was decoded; None until one has come.
    """

    def __init__(self, catalog: Catalog, slot_name: str, *, interval_seconds: float) -> None:
        self.written = 0
        self.last_round_trip_seconds: float | None = None
        self._catalog = catalog
        self._slot_name = slot_name
        self._interval_seconds = interval_seconds
        self._writer = secrets.token_hex(4)
        self._is_refused = False

    async def run(self) -> None:
        """Write heartbeats until cancelled; run it while changes are streamed.

        A server that cannot be reached is left to those who stream from it. One that refuses is
        told of once, and tried again rarely: the right may be granted, the standby promoted.
        """
        while True:
            seconds = await self._beat()
            await asyncio.sleep(seconds)

    def received(self, message: Message) -> None:
        """Take a message that the stream has brought; those of others are no concern."""
        if message.prefix != HEARTBEAT_PREFIX:
            return
        try:
            content = msgspec.json.decode(message.content, type=_Content)
        except msgspec.MsgspecError:  # anybody may write such a message
            return
        if content.writer == self._writer:
            self.last_round_trip_seconds = time.monotonic() - content.seconds

    async def _beat(self) -> float:
        """Write one heartbeat; return how long to pause until the next."""
        try:
            await self._write()
        except Unavailable:
            return self._interval_seconds
        except WalstreamError as error:
            if not self._is_refused:
                hint = _GRANT if isinstance(error, AccessRefused) else error.hint
                log.warning(
                    "heartbeat_failed", slot=self._slot_name, error=error.message, hint=hint
                )
            self._is_refused = True
            return max(self._interval_seconds, REFUSED_PAUSE_SECONDS)
        self._is_refused = False
        self.written += 1
        return self._interval_seconds

    async def _write(self) -> None:
        content = _Content(self._slot_name, self._writer, time.monotonic())
        ((position, *_),) = await self._catalog.rows(
            _EMIT,
            {"prefix": HEARTBEAT_PREFIX, "content": msgspec.json.encode(content).decode()},
        )
        if position is None:
            message = "a standby writes no WAL, and so no heartbeats"
            raise DatabaseUnfit(message, hint="leave out heartbeat_seconds under [stream]")


# The catalog waits for this commit: not for the standbys of synchronous replication, which may be
# away. The text is cast because there is a function for bytea too.
_EMIT: Final = sql.SQL(
    """
    SELECT CASE WHEN NOT pg_is_in_recovery()
                THEN pg_logical_emit_message(true, %(prefix)s, %(content)s::text)::text END,
           set_config('synchronous_commit', 'local', true)
    """
)
