"""The messages of the streaming replication protocol, inside CopyData.

PostgreSQL documentation, 55.4 Streaming Replication Protocol, START_REPLICATION. All integers are
big-endian; times are microseconds since midnight of 2000-01-01 UTC.
"""

from __future__ import annotations

import struct
from typing import Final

import msgspec

from walstream.errors import ProtocolError
from walstream.lsn import Lsn

POSTGRES_EPOCH_SECONDS: Final = 946_684_800
"""2000-01-01 00:00 UTC as seconds since the Unix epoch."""

XLOG_DATA: Final = ord("w")
KEEPALIVE: Final = ord("k")
HEADER_BYTES: Final = 25
"""The length of an XLogData message before its record starts."""

_HEADER: Final = struct.Struct(">BQQq")
_KEEPALIVE: Final = struct.Struct(">BQqB")
_STATUS_UPDATE: Final = struct.Struct(">cQQQqB")


class XLogData(msgspec.Struct, frozen=True, gc=False):
    """One record of the output plugin.

    ``data_start`` is the position that the server attaches to the record: of a commit it is the
    end of the transaction, of other records no more than a hint.
    """

    data_start: int
    wal_end: int
    send_time: int
    record: memoryview | bytes


class PrimaryKeepalive(msgspec.Struct, frozen=True, gc=False):
    """A sign of life: everything that commits before ``wal_end`` has been sent."""

    wal_end: int
    send_time: int
    reply_requested: bool


def record_of(data: bytes) -> memoryview | None:
    """Return the record inside an XLogData message, or None for a message of another kind.

    The hot path: `parse` reads the rest of the message, which is needed for errors only.
    """
    if len(data) >= HEADER_BYTES and data[0] == XLOG_DATA:
        return memoryview(data)[HEADER_BYTES:]
    return None


def parse(data: bytes) -> XLogData | PrimaryKeepalive:
    """Read the content of one CopyData message.

    Raises:
        ProtocolError: the message is of no known kind, or shorter or longer than its kind.
    """
    kind = data[0] if data else None
    if kind == XLOG_DATA and len(data) >= HEADER_BYTES:
        _, data_start, wal_end, send_time = _HEADER.unpack_from(data)
        return XLogData(data_start, wal_end, send_time, memoryview(data)[HEADER_BYTES:])
    if kind == KEEPALIVE and len(data) == _KEEPALIVE.size:
        _, wal_end, send_time, reply_requested = _KEEPALIVE.unpack(data)
        return PrimaryKeepalive(wal_end, send_time, bool(reply_requested))
    message = f"a CopyData message of kind {kind!r} and {len(data)} bytes is not in the protocol"
    raise ProtocolError(message, hint="is a pooler or proxy standing before the server?")


def status_update(flush_lsn: Lsn, *, now: float, reply_requested: bool = False) -> bytes:
    """Build the StandbyStatusUpdate that reports ``flush_lsn`` as written, flushed and applied.

    One position serves as all three: what is acknowledged is safe with its handlers and sinks.

    Args:
        flush_lsn: the end of the last transaction that is taken completely.
        now: seconds since the Unix epoch.
        reply_requested: ask the server to answer at once.
    """
    microseconds = int((now - POSTGRES_EPOCH_SECONDS) * 1_000_000)
    return _STATUS_UPDATE.pack(b"r", flush_lsn, flush_lsn, flush_lsn, microseconds, reply_requested)
