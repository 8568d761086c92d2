"""WebSockets: frames are given ready-made, messages are taken one by one.

An endpoint refuses, or opens the socket and reads until it is over::

    if (answer := refusal(scope)) is not None:
        return await refuse(scope, receive, send, 401, {"error": answer})
    async with open_socket(scope, receive, send, max_bytes=1 << 20) as socket:
        hub.attach(socket.write)
        while (message := await socket.receive()) is not None:
            ...

A `Socket` is a `Stream` whose pieces are complete frames of a server, one or more of them: the same
bytes go to all who get the same, and what waits goes out in one write. Under walstream's own server
(`EXTENSION` in the scope) they go straight to the connection. Under any other ASGI server they are
taken apart, and go through ``send``.

Pings are answered, and sent, by the server; so is the closing handshake.
"""

from __future__ import annotations

import asyncio
import json
from abc import abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, TypeAlias

from starlette.types import Message, Receive, Scope, Send

from walstream.gateway.streams import LINGER_SECONDS, Ended, Stream, ThroughStream
from walstream.realtime.frames import CloseCode, split

EXTENSION: Final = "walstream.socket"
"""In ``scope["extensions"]`` an `OpenSocket` when the server is walstream's own."""

DENIAL: Final = "websocket.http.response"


class Socket(Stream):
    """What one client gets, frame by frame, and what it says."""

    @abstractmethod
    async def receive(self) -> str | bytes | None:
        """Return the next message, or None when there will be none: the stream is over."""

    @abstractmethod
    async def close(self, code: int = CloseCode.NORMAL, reason: str = "") -> None:
        """Send what waits, for `LINGER_SECONDS` at most, and say why the connection ends."""

    async def finish_soon(self) -> None:
        """Wait until what was written is on its way, for `LINGER_SECONDS` at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                await self.finish()


OpenSocket: TypeAlias = Callable[[int], Socket]
"""Accepts the client whose scope has this, with the bytes that its messages may have."""


@asynccontextmanager
async def open_socket(
    scope: Scope, receive: Receive, send: Send, *, max_bytes: int
) -> AsyncIterator[Socket]:
    """Accept a client; it is told goodbye at the end of the block, if it is there still.

    Args:
        scope: the connection's, as are ``receive`` and ``send``.
        receive: asked for messages, where the server does not hand them over by itself.
        send: likewise.
        max_bytes: a larger message ends the connection with 1009.
    """
    open_direct: OpenSocket | None = scope.get("extensions", {}).get(EXTENSION)
    if open_direct is not None:
        socket = open_direct(max_bytes)
        async with _closing(socket):
            yield socket
        return
    await receive()  # websocket.connect
    await send({"type": "websocket.accept"})
    through = ThroughSocket(receive, send, max_bytes)
    sending = asyncio.ensure_future(through.run())
    try:
        async with _closing(through):
            yield through
    finally:
        sending.cancel()
        # What a server raises for a client that has gone is the server's own.
        await asyncio.gather(sending, return_exceptions=True)


@asynccontextmanager
async def _closing(socket: Socket) -> AsyncIterator[None]:
    code = CloseCode.INTERNAL_ERROR
    try:
        yield
        code = CloseCode.NORMAL
    finally:
        await socket.close(code)


async def refuse(
    scope: Scope, receive: Receive, send: Send, status: int, body: Mapping[str, Any]
) -> None:
    """Answer by HTTP with this status and JSON, instead of accepting.

    A server that can only accept or close answers 403 without a body.
    """
    await receive()  # websocket.connect
    if DENIAL not in scope.get("extensions", {}):
        await send({"type": "websocket.close"})
        return
    content = json.dumps(body).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
        (b"cache-control", b"no-store"),
    ]
    await send({"type": f"{DENIAL}.start", "status": status, "headers": headers})
    await send({"type": f"{DENIAL}.body", "body": content})


class ThroughSocket(ThroughStream, Socket):
    """Speaks by ASGI's ``receive`` and ``send``."""

    def __init__(self, receive: Receive, send: Send, max_bytes: int) -> None:
        super().__init__(send, None)
        self._receive = receive
        self._max_bytes = max_bytes

    async def receive(self) -> str | bytes | None:
        """Return the next message, or None when there will be none."""
        if self._ended is not None:
            return None
        message = await self._receive()
        if message["type"] != "websocket.receive":
            self.end(Ended.GONE)
            return None
        said = _said(message)
        if len(said if isinstance(said, bytes) else said.encode()) > self._max_bytes:
            await self.close(CloseCode.TOO_BIG, f"a message may have {self._max_bytes} bytes")
            return None
        return said

    async def close(self, code: int = CloseCode.NORMAL, reason: str = "") -> None:
        """Send what waits, for `LINGER_SECONDS` at most, and say goodbye."""
        await self.finish_soon()
        if self._ended is None:
            self.end(Ended.GONE)
            with suppress(OSError):  # so servers tell of a client that has gone meanwhile
                await self._send({"type": "websocket.close", "code": code, "reason": reason})

    async def _send_piece(self, data: bytes) -> None:
        self._sending = len(data)
        for is_text, payload in split(data):
            content = {"text": payload.decode()} if is_text else {"bytes": payload}
            await self._send({"type": "websocket.send", **content})
        self._sending = 0
        self._tell_moved()


def _said(message: Message) -> str | bytes:
    """Return what was said: ASGI gives one of two keys, or both and one of them None."""
    text: str | None = message.get("text")
    return message["bytes"] if text is None else text
