"""WebSockets: stock clients, and clients that do not behave; each gets its bound."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.routing import WebSocketRoute
from starlette.types import Receive, Scope, Send
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as connect_socket

from tests.serving import Streams, port_of, serving
from walstream.gateway import Gateway
from walstream.gateway.sockets import Socket, open_socket, refuse
from walstream.gateway.streams import Ended
from walstream.realtime.frames import binary_frame, text_frame

Waits = Callable[..., Awaitable[Any]]

MAX_BYTES = 1 << 17


class Sockets:
    """An endpoint that echoes, and whose sockets the test writes to."""

    def __init__(self) -> None:
        self.open: list[Socket] = []
        self.heard: list[str | bytes] = []
        self.ended: list[Ended] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if b"apikey" not in scope["query_string"]:
            await refuse(scope, receive, send, 401, {"error": "API key is missing"})
            return
        async with open_socket(scope, receive, send, max_bytes=MAX_BYTES) as socket:
            self.open.append(socket)
            while (message := await socket.receive()) is not None:
                self.heard.append(message)
                if message == "bye":
                    await socket.close(4000, "as asked for")
                elif message != "quiet":
                    socket.write(_echo(message))
            self.ended.append(await socket.ended())


def _echo(message: str | bytes) -> bytes:
    if isinstance(message, str):
        return text_frame(message.encode())
    return binary_frame(message)


@asynccontextmanager
async def serving_sockets(sockets: Sockets, **http: Any) -> AsyncIterator[Gateway]:
    more = [WebSocketRoute("/socket", sockets)]
    async with serving(Streams(), more=more, **http) as gateway:
        yield gateway


def client_of(gateway: Gateway, path: str = "/socket?apikey=k", **options: Any) -> Any:
    return connect_socket(f"ws://127.0.0.1:{port_of(gateway)}{path}", **options)


async def test_messages_of_both_kinds_come_and_go(async_wait_until: Waits) -> None:
    sockets = Sockets()
    async with serving_sockets(sockets) as gateway:
        client: ClientConnection
        async with client_of(gateway) as client:
            for message in ("one", b"\x00two", "", "ü" * 1000, b"x" * 100_000):
                await client.send(message)
                assert await client.recv() == message
        await async_wait_until(lambda: sockets.ended == [Ended.GONE])
        assert client.close_code == 1000
