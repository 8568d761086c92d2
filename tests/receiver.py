"""A receiver of webhooks on loopback: a small HTTP server that answers as a test has scripted."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections import deque
from collections.abc import AsyncIterator
from typing import Any, Final

import msgspec


class Received(msgspec.Struct):
    """A request; ``connection`` counts the connections that there were."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    connection: int

    @property
    def ids(self) -> list[str]:
        """Of the changes, in whatever format."""
        if self.headers["content-type"] == "application/x-ndjson":
            return [json.loads(line)["id"] for line in self.body.splitlines()]
        content: Any = json.loads(self.body)
        changes = content["changes"] if isinstance(content, dict) else content
        return [change["id"] for change in changes]


class Answer(msgspec.Struct):
    """``status`` 0 closes the connection without a word; ``hold`` is waited for first."""

    status: int = 200
    headers: dict[str, str] = {}
    body: bytes = b""
    hold: asyncio.Event | None = None


DROPPED: Final = Answer(0)


class Receiver:
    """Reads requests, and takes one scripted answer after another; then it answers 200."""

    def __init__(self) -> None:
        self.requests: list[Received] = []
        self.answers: deque[Answer] = deque()
        self.arrived = asyncio.Event()
        self.connections = 0
        self.at_once = 0
        self.most_at_once = 0
        self.port = 0
        self.scheme = "http"
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}/changes"

    @property
    def ids(self) -> list[str]:
        """Of all changes in all requests."""
        return [one for request in self.requests for one in request.ids]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        connection = self.connections
        self._writers.add(writer)
        try:
            while request := await _read(reader, connection):
                if not await self._answer(request, writer):
                    break
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _answer(self, request: Received, writer: asyncio.StreamWriter) -> bool:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            self.requests.append(request)
            self.arrived.set()
            answer = self.answers.popleft() if self.answers else Answer()
            if answer.hold is not None:
                await answer.hold.wait()
            if not answer.status:
                return False
            headers = {"content-length": str(len(answer.body)), **answer.headers}
            lines = [f"HTTP/1.1 {answer.status} Whatever"]
            lines += [f"{name}: {value}" for name, value in headers.items()]
            writer.write("\r\n".join([*lines, "", ""]).encode() + answer.body)
            await writer.drain()
            return True
        finally:
            self.at_once -= 1

    def hang_up(self) -> None:
        """Close all connections."""
        for writer in self._writers:
            writer.transport.abort()


async def _read(reader: asyncio.StreamReader, connection: int) -> Received | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.decode().strip().split("\r\n")
    method, target, _ = first.split(" ")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Received(method, target, headers, body, connection)


@contextlib.asynccontextmanager
async def receiving(tls: ssl.SSLContext | None = None) -> AsyncIterator[Receiver]:
    """Serve while the block runs."""
    receiver = Receiver()
    server = await asyncio.start_server(receiver.serve, "127.0.0.1", 0, ssl=tls)
    receiver.port = server.sockets[0].getsockname()[1]
    receiver.scheme = "http" if tls is None else "https"
    try:
        yield receiver
    finally:
        server.close()
        receiver.hang_up()
        await server.wait_closed()
