"""The HTTP side with endpoints of a test's own, and clients that do not behave."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from tests import vitals
from walstream.cli.streaming import collect_less
from walstream.config.live import HttpConfig
from walstream.gateway import Gateway
from walstream.gateway.streams import Ended, Stream, open_stream

_WRITERS: Final[list[asyncio.StreamWriter]] = []
"""Clients that are closed when serving ends."""

FAREWELL: Final = b"event: end\n\n"


class Streams:
    """An endpoint whose streams the test writes to."""

    def __init__(self, *, compress: bool = False) -> None:
        self.open: list[Stream] = []
        self.ended: list[Ended] = []
        self.leave = asyncio.Event()
        self._compress = compress

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        async with open_stream(
            scope, receive, send, headers, farewell=FAREWELL, compress=self._compress
        ) as stream:
            self.open.append(stream)
            leaving = asyncio.ensure_future(self.leave.wait())
            ending = asyncio.ensure_future(stream.ended())
            await asyncio.wait([leaving, ending], return_when=asyncio.FIRST_COMPLETED)
            leaving.cancel()
            if ending.done():
                self.ended.append(ending.result())
            ending.cancel()


async def echo(request: Request) -> JSONResponse:
    """Tell what came, in a body as large as asked for."""
    size = int(request.query_params.get("size", "0"))
    return JSONResponse({"body": len(await request.body()), "filling": "x" * size})


@asynccontextmanager
async def serving(
    streams: Streams, *, more: Sequence[BaseRoute] = (), **http: Any
) -> AsyncIterator[Gateway]:
    """Serve `Streams` at ``/stream`` and `echo` at ``/echo``."""
    routes = [
        Route("/stream", streams),
        Route("/echo", echo, methods=["GET", "POST"]),
        *more,
    ]
    config = HttpConfig(**{"listen": "127.0.0.1:0", **http})
    try:
        async with Gateway.open(config, vitals.full, lambda: routes) as gateway:
            yield gateway
    finally:
        while _WRITERS:
            _WRITERS.pop().close()


def port_of(gateway: Gateway) -> int:
    return int(gateway.address.rpartition(":")[2])


async def connect(
    gateway: Gateway, request: bytes = b""
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(gateway))
    _WRITERS.append(writer)
    writer.write(request)
    return reader, writer


def get(path: str, *headers: str, version: str = "1.1") -> bytes:
    lines = [f"GET {path} HTTP/{version}", "Host: localhost", *headers]
    return "\r\n".join([*lines, "", ""]).encode()


@asynccontextmanager
async def heartbeat() -> AsyncIterator[list[float]]:
    """Beat in the event loop; the list has what was computed between two beats, in seconds.

    Processor time, for what other processes do meanwhile is not the loop's fault. As in a daemon,
    what was there before is not looked at for reference cycles.
    """
    between: list[float] = []

    async def beat() -> None:
        while True:
            before = time.thread_time()
            await asyncio.sleep(0.001)
            between.append(time.thread_time() - before)

    thresholds = gc.get_threshold()
    collect_less()
    task = asyncio.create_task(beat())
    try:
        yield between
    finally:
        task.cancel()
        gc.set_threshold(*thresholds)
        gc.unfreeze()


Line = Callable[[], Awaitable[str]]


@asynccontextmanager
async def clients(script: str, *arguments: object) -> AsyncIterator[Line]:
    """Run clients in a process of their own, so that they do not hold up the loop that is measured.

    The script reads ``sys.argv`` and prints lines; what is yielded waits for the next one.
    """
    command = [sys.executable, "-c", script, *(str(one) for one in arguments)]
    with subprocess.Popen(  # noqa: ASYNC220 - its lines are read by a thread
        command, stdout=subprocess.PIPE, text=True
    ) as process:
        stdout = process.stdout
        assert stdout is not None
        try:
            yield partial(asyncio.to_thread, stdout.readline)
        finally:
            process.kill()
