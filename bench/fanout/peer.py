"""The least that can be done in Python: ready-made bytes, written to sockets by asyncio.

It speaks as ``GET /changes`` or as the WebSocket does, to the same clients, and does nothing of
what comes before: no server is asked, nothing is decoded, filtered or rendered, and nobody is
checked. What it reaches is what asyncio's sockets give on this machine. It talks with
``bench.fanout.rounds`` by lines of JSON.
"""

from __future__ import annotations

import asyncio
import gc
import re
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Final

import msgspec

from bench.fanout.frames import SIGN
from bench.processes import cpu_seconds
from walstream.realtime.frames import text_frame

HEAD: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncache-control: no-store\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)

_EVENT: Final = (
    b'id: 0/%X:1\nevent: insert\ndata: {"id":"0/%X:1","operation":"insert","schema":"public",'
    b'"table":"messages","row":{"id":%d,"conversation_id":"conversation-%d","author":"ada",'
    b'"content":"message number %d","status":"sent","amount":%d.00,'
    b'"created_at":"2026-11-22T12:51:35.209600+00:00",'
    b'"updated_at":"2026-11-22T12:51:35.209600+00:00"},"identity":null,"unchanged":[],"xid":%d,'
    b'"commit_lsn":"0/%X","end_lsn":"0/%X","ordinal":1,'
    b'"commit_time":"2026-11-22T12:51:35.209600+00:00"}\n\n'
)

UPGRADED: Final = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: 3vaSsEYbZUvYHgOZDlVL6+GLHJM=\r\n\r\n"
)

JOINED: Final = text_frame(
    b'["1",null,"realtime:x","system",{"message":"Subscribed to PostgreSQL","status":"ok"}]'
)

_MESSAGE: Final = (
    b'[null,null,"realtime:conversation-%d","postgres_changes",{"ids":[1],"data":{"schema":"public",'
    b'"table":"messages","commit_timestamp":"2026-11-22T12:51:35.209Z","type":"INSERT","columns":['
    b'{"name":"id","type":"int8"},{"name":"conversation_id","type":"text"},{"name":"author","type":'
    b'"text"},{"name":"content","type":"text"},{"name":"status","type":"text"},{"name":"amount",'
    b'"type":"numeric"},{"name":"created_at","type":"timestamptz"},{"name":"updated_at","type":'
    b'"timestamptz"}],"record":{"id":%d,"conversation_id":"conversation-%d","author":"ada",'
    b'"content":"message number %d","status":"sent","amount":%d.00,'
    b'"created_at":"2026-11-22T12:51:35.2096+00:00",'
    b'"updated_at":"2026-11-22T12:51:35.2096+00:00"},"errors":null}}]'
)

_CONVERSATION: Final = re.compile(rb"conversation-(\d+)")

PAUSE: Final = 64
"""After so many writes the event loop has its turn."""


class Serve(msgspec.Struct, frozen=True):
    """Send a change for each row; ``transaction_rows`` of them are written at once.

    With ``conversations`` above 1 a change goes to those who asked for its conversation.
    """

    first: int
    stop: int
    transaction_rows: int
    conversations: int
    speech: str


class Listening(msgspec.Struct, frozen=True):
    """Where clients are expected."""

    address: str


class Served(msgspec.Struct, frozen=True):
    """When it began to write (monotonic clock), and what that took until the last write."""

    nanoseconds: int
    cpu_seconds: float


class _Subscriber(asyncio.Protocol):
    """A client; everything is done as soon as its request has come."""

    def __init__(self, server: _Server) -> None:
        self._server = server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.set_write_buffer_limits(high=1 << 20)

    def data_received(self, data: bytes) -> None:
        if data.startswith(SIGN):
            return
        if b"\r\nUpgrade: websocket\r\n" in data:
            self.transport.write(UPGRADED)
            return
        found = _CONVERSATION.search(data)
        self._server.subscribers[int(found[1]) if found else 0].append(self.transport)
        event = b'retry: 2000\nid: 0/1:0\nevent: streaming\ndata: {"since":null}\n\n'
        self.transport.write(HEAD + _chunk(event) if data.startswith(b"GET ") else JOINED)

    def pause_writing(self) -> None:
        self._server.full += 1
        self._server.has_room.clear()

    def resume_writing(self) -> None:
        self._server.full -= 1
        if not self._server.full:
            self._server.has_room.set()


class _Server:
    """All clients, by the conversation that they asked for."""

    def __init__(self) -> None:
        self.subscribers: defaultdict[int, list[asyncio.Transport]] = defaultdict(list)
        self.full = 0
        self.has_room = asyncio.Event()
        self.has_room.set()

    async def serve(self, order: Serve) -> Served:
        """Make everything ready, then look at the clock, and write."""
        pieces = _pieces(order)
        used_before, started = cpu_seconds(), time.monotonic_ns()
        writes = 0
        for conversation, piece in pieces:
            for transport in self.subscribers[conversation]:
                transport.write(piece)
            writes += len(self.subscribers[conversation])
            if writes >= PAUSE:
                writes = 0
                await asyncio.sleep(0)
                await self.has_room.wait()
        return Served(started, cpu_seconds() - used_before)


def _pieces(order: Serve) -> Sequence[tuple[int, bytes]]:
    pieces: list[tuple[int, bytes]] = []
    write, wrap = (_event, _chunk) if order.speech == "events" else (_frame, bytes)
    for first in range(order.first, order.stop, order.transaction_rows):
        by_conversation: defaultdict[int, list[bytes]] = defaultdict(list)
        for row in range(first, min(first + order.transaction_rows, order.stop)):
            by_conversation[row % order.conversations].append(write(row, order.conversations))
        pieces += [(one, wrap(b"".join(events))) for one, events in by_conversation.items()]
    return pieces


def _event(row: int, conversations: int) -> bytes:
    lsn = 0x1000000 + row * 0x100
    return _EVENT % (lsn, lsn, row, row % conversations, row, row, row, lsn, lsn)


def _frame(row: int, conversations: int) -> bytes:
    conversation = row % conversations
    return text_frame(_MESSAGE % (conversation, row, conversation, row, row))


def _chunk(text: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(text), text)


async def run() -> None:
    """Serve until there are no more orders."""
    loop = asyncio.get_running_loop()
    server = _Server()
    listener = await loop.create_server(lambda: _Subscriber(server), "127.0.0.1", 0, backlog=1024)
    host, port = listener.sockets[0].getsockname()
    _say(Listening(f"{host}:{port}"))
    orders = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    async for line in orders:
        _say(await server.serve(msgspec.json.decode(line, type=Serve)))


def _say(answer: msgspec.Struct) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    gc.disable()
    asyncio.run(run())
