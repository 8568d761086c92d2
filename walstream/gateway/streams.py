r"""Answers that go on: pieces are given when they come, and nothing waits for a client.

An endpoint opens its stream and writes to it from wherever it likes in the event loop::

    async with open_stream(scope, receive, send, headers, farewell=b"event: end\n\n") as stream:
        hub.attach(stream.write)
        await stream.ended()

``write`` takes whole pieces (an event, a line) and returns at once. `Stream.waiting_bytes` says
what the client has not fetched: who gives more than that may grow to must look at it, and drop the
client. Under walstream's own server (`EXTENSION` in the scope) pieces go straight to the socket, so
that a piece costs what sending it costs; under any other ASGI server they go through ``send``.

What is written by one turn of the event loop, and while the streams rest, is sent as one: with many
clients the sending is what costs. `walstream.gateway.rounds` sees to it that it leaves the loop to
others.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from enum import StrEnum
from typing import Final, TypeAlias

from starlette.types import Receive, Scope, Send

from walstream.gateway.compression import Compressor, accepts_gzip

EXTENSION: Final = "walstream.stream"
"""In ``scope["extensions"]`` an `Open` when the server is walstream's own."""

HIGH_BYTES: Final = 1 << 16
"""So much may wait in the transport; the rest waits in the stream, shared between streams."""

LOW_BYTES: Final = 1 << 14

LINGER_SECONDS: Final = 2.0
"""So long a connection that ends waits for its client: to fetch what waits, to say goodbye."""


class Ended(StrEnum):
    """Why a stream can take no more: the client has gone, or the server closes."""

    GONE = "gone"
    CLOSING = "closing"


Heads: TypeAlias = Sequence[tuple[bytes, bytes]]


@asynccontextmanager
async def open_stream(
    scope: Scope,
    receive: Receive,
    send: Send,
    headers: Heads,
    *,
    farewell: bytes = b"",
    compress: bool = False,
) -> AsyncIterator[Stream]:
    """Answer 200 with these headers, and with what is written while the block runs.

    At the end of the block the client gets what waits, and the end of the answer.

    Args:
        scope: the request's, as are ``receive`` and ``send``.
        receive: asked for the end of the connection, where the server does not tell by itself.
        send: takes the head and the end, and elsewhere than under walstream's server all.
        headers: of the answer, names in lower case; without those of length and encoding.
        farewell: the last piece for a client that is cut because the server closes.
        compress: whether to compress when the client accepts that.
    """
    compressor = None
    if compress:
        headers = [*headers, (b"vary", b"accept-encoding")]
        if accepts_gzip(scope["headers"]):
            headers = [*headers, (b"content-encoding", b"gzip")]
            compressor = Compressor()
    open_direct: Open | None = scope.get("extensions", {}).get(EXTENSION)
    if scope["method"] == "HEAD":
        opened = _open_nothing()
    elif open_direct is not None:
        opened = _open_direct(open_direct(compressor, farewell))
    else:
        opened = _open_through(receive, send, compressor)
    async with opened as stream:
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        stream.begin()
        yield stream
        await stream.finish()
    await send({"type": "http.response.body", "body": stream.tail(), "more_body": False})


class Stream(ABC):
    """What one client gets, piece by piece."""

    def __init__(self, compressor: Compressor | None) -> None:
        self._compressor = compressor
        self._pieces: deque[bytes] = deque()
        self._waiting = 0
        self._ended: Ended | None = None
        self._over = asyncio.Event()
        self._moved: asyncio.Future[None] | None = None

    @property
    def waiting_bytes(self) -> int:
        """What has been written and the client's connection has not taken."""
        return self._waiting

    @property
    def is_over(self) -> bool:
        """Whether nothing more reaches the client; what is written then is dropped."""
        return self._ended is not None

    def write(self, piece: bytes) -> None:
        """Send a piece, soon and in order; it is not copied before that."""
        if self._ended is None and piece:
            self._pieces.append(piece)
            self._waiting += len(piece)
            self._call()

    @property
    def is_behind(self) -> bool:
        """Whether much waits here that the client could have: it is not the client that is slow."""
        return False

    async def moved(self) -> None:
        """Wait until some of what waits has been sent, or the stream is over."""
        if self._ended is None:
            await self._next_move()

    def drop(self) -> None:
        """Forget pieces of which no byte has been sent, as for a client that is too slow."""
        self._pieces.clear()
        self._waiting = 0
        self._tell_moved()

    async def room(self) -> None:
        """Wait until the client has fetched nearly all, or the stream is over.

        For who has much to send at once, such as what a client has missed.
        """
        while self._ended is None and not self._has_room():
            await self._next_move()

    async def ended(self) -> Ended:
        """Wait until nothing more reaches the client, and say why."""
        await self._over.wait()
        return self._ended or Ended.GONE

    def end(self, why: Ended) -> None:
        """Take no more; for the server."""
        if self._ended is None:
            self._ended = why
            self._over.set()
            self._tell_moved()

    def begin(self) -> None:  # noqa: B027 - nothing to do for most
        """Send from now on: the head is out."""

    async def finish(self) -> None:
        """Wait until all that was written is on its way, or the stream is over."""
        while self._ended is None and self._pieces:
            await self._next_move()

    def tail(self) -> bytes:
        """Return the last bytes of the answer."""
        if self._compressor is None or self._ended is Ended.GONE:
            return b""
        return self._compressor.end()

    @abstractmethod
    def _call(self) -> None:
        """See to it that pieces are sent."""

    def _has_room(self) -> bool:
        return self.waiting_bytes <= LOW_BYTES

    def _take(self) -> bytes:
        """Return pieces that wait, whole ones, and not many more than `HIGH_BYTES`."""
        if self._waiting <= HIGH_BYTES:
            taken, size = list(self._pieces), self._waiting
            self._pieces.clear()
        else:
            taken, size = [], 0
            while self._pieces and size < HIGH_BYTES:
                taken.append(self._pieces.popleft())
                size += len(taken[-1])
        self._waiting -= size
        data = b"".join(taken)
        return data if self._compressor is None else self._compressor.piece(data)

    async def _next_move(self) -> None:
        if self._moved is None:
            self._moved = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._moved)

    def _tell_moved(self) -> None:
        if self._moved is not None:
            if not self._moved.done():
                self._moved.set_result(None)
            self._moved = None


Open: TypeAlias = Callable[[Compressor | None, bytes], Stream]
"""Makes the stream of the request that has this in its scope, with compressor and farewell."""


class ThroughStream(Stream):
    """Sends by ASGI's ``send``, which waits for the client."""

    def __init__(self, send: Send, compressor: Compressor | None) -> None:
        super().__init__(compressor)
        self._send = send
        self._called = asyncio.Event()
        self._sending = 0

    @property
    def waiting_bytes(self) -> int:
        """What has been written and the server has not taken."""
        return self._waiting + self._sending

    async def run(self) -> None:
        """Send until cancelled, or the server says that the client has gone."""
        try:
            while True:
                await self._called.wait()
                self._called.clear()
                while self._pieces:
                    await self._send_piece(self._take())
        finally:
            self.end(Ended.GONE)

    async def watch(self, receive: Receive) -> None:
        """End the stream when the client has gone."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.end(Ended.GONE)

    async def finish(self) -> None:
        """Wait until all that was written has been sent, or the client has gone."""
        while self._ended is None and (self._pieces or self._sending):
            await self._next_move()

    async def _send_piece(self, data: bytes) -> None:
        self._sending = len(data)
        await self._send({"type": "http.response.body", "body": data, "more_body": True})
        self._sending = 0
        self._tell_moved()

    def _call(self) -> None:
        self._called.set()


class _NoStream(Stream):
    """The body of an answer to HEAD."""

    def _call(self) -> None:
        self.drop()


@asynccontextmanager
async def _open_direct(stream: Stream) -> AsyncIterator[Stream]:
    yield stream


@asynccontextmanager
async def _open_through(
    receive: Receive, send: Send, compressor: Compressor | None
) -> AsyncIterator[Stream]:
    stream = ThroughStream(send, compressor)
    tasks = [asyncio.ensure_future(one) for one in (stream.run(), stream.watch(receive))]
    try:
        yield stream
    finally:
        for task in tasks:
            task.cancel()
        # What a server raises for a client that has gone is the server's own.
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def _open_nothing() -> AsyncIterator[Stream]:
    stream = _NoStream(None)
    stream.end(Ended.GONE)
    yield stream
