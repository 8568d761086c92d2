"""Serves the application inside of the daemon's event loop.

It is uvicorn's HTTP protocol on sockets of ours, without uvicorn's server: that one would take the
process's signals, and log by itself. What a client can hold is bounded: how many connections there
are, how long a request may take from its first byte to the end of its answer, and how large its
headers are. `Server.close` takes at most `CLOSE_SECONDS` twice, whatever clients do.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Callable, Sequence
from email.utils import formatdate
from pathlib import Path
from typing import Final, Self

import structlog
import uvicorn
from starlette.routing import BaseRoute
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from walstream.gateway.app import make_app
from walstream.gateway.listening import Address, address_of, listen_at, parse_listen
from walstream.config.live import HttpConfig
from walstream.vitals import Vitals

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.gateway")

MAX_REQUESTS: Final = 64
"""So many connections are answered; further ones get 503, and beyond twice as many they are cut."""

HEADER_BYTES: Final = 1 << 14
REQUEST_SECONDS: Final = 10.0
IDLE_SECONDS: Final = 30
CLOSE_SECONDS: Final = 0.4


class Server:
    """Listens until it is closed."""

    def __init__(self, servers: list[asyncio.Server], state: ServerState, address: Address) -> None:
        """Take what `open` has begun."""
        self.address: Final = str(address)
        """Where it listens, with the port that it has got."""
        self._servers = servers
        self._state = state

    @classmethod
    async def open(
        cls, http: HttpConfig, vitals: Callable[[], Vitals], routes: Sequence[BaseRoute] = ()
    ) -> Self:
        """Begin to listen.

        Raises:
            ConfigError: ``listen`` is no address that can be resolved.
            SetupError: nothing can listen there.
        """
        sockets = await listen_at(parse_listen(http.listen or ""))
        config = _configure(vitals, routes, http)
        state = ServerState()
        loop = asyncio.get_running_loop()
        servers = [
            await loop.create_server(lambda: _Connection(config, state), sock=one)
            for one in sockets
        ]
        address = address_of(sockets[0])
        log.info("http_listening", address=str(address))
        if not all(address_of(one).is_loopback for one in sockets):
            log.warning(
                "http_exposed",
                address=str(address),
                hint="whoever reaches this address can read names of tables, routes and"
                " destinations; 127.0.0.1 is for this machine only",
            )
        return cls(servers, state, address)

    async def close(self) -> None:
        """Take no more requests, finish those in hand, and cut off who does not read its answer."""
        for server in self._servers:
            server.close()
        for connection in self._connections():
            connection.shutdown()
        await self._gone()
        for connection in self._connections():
            connection.transport.abort()
        await self._gone()
        for task in self._state.tasks:
            task.cancel()

    async def _gone(self) -> None:
        """Wait for the connections, and the requests on them, to end, but not long."""
        ends = [*(one.lost for one in self._connections()), *self._state.tasks]
        if ends:
            await asyncio.wait(ends, timeout=CLOSE_SECONDS)

    def _connections(self) -> list[_Connection]:
        return [one for one in self._state.connections if isinstance(one, _Connection)]


def _configure(vitals: Callable[[], Vitals], routes: Sequence[BaseRoute], http: HttpConfig) -> uvicorn.Config:
    config = uvicorn.Config(
        make_app(vitals, routes, http),
        http=_Connection,
        ws="none",
        lifespan="off",
        interface="asgi3",
        workers=1,
        log_config=None,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=MAX_REQUESTS + 1,  # uvicorn refuses the one that reaches it
        timeout_keep_alive=IDLE_SECONDS,
        h11_max_incomplete_event_size=HEADER_BYTES,
    )
    config.load()
    return config


class _Connection(H11Protocol):
    """A client's connection, with a deadline for each request."""

    def __init__(self, config: uvicorn.Config, state: ServerState) -> None:
        super().__init__(config, state, {})
        self.logger = _LOGGER
        self.access_log = False
        self.lost: asyncio.Future[None] = self.loop.create_future()
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect()
        if len(self.connections) > 2 * MAX_REQUESTS:
            log.debug("http_refused", reason="too many connections")
            transport.abort()

    def data_received(self, data: bytes) -> None:
        self._expect()
        self.server_state.default_headers = [(b"date", formatdate(usegmt=True).encode())]
        super().data_received(data)

    def on_response_complete(self) -> None:
        self._rest()
        super().on_response_complete()  # and begins with the next request, if it has come already
        if self._is_busy():
            self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        self._rest()
        super().connection_lost(exc)
        if not self.lost.done():
            self.lost.set_result(None)

    def _expect(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(REQUEST_SECONDS, self._give_up)

    def _rest(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _is_busy(self) -> bool:
        """Whether an answer is not made, or not fetched."""
        # Before the first request there is no cycle, whatever its annotation says.
        made = bool(self.cycle) and self.cycle.response_complete
        return not made or self.transport.get_write_buffer_size() > 0

    def _give_up(self) -> None:
        self._deadline = None
        if self._is_busy():
            log.debug("http_refused", reason="the request took too long")
            self.transport.abort()


class _Told(logging.Handler):
    """Makes events of what uvicorn's protocol logs: a request of no use, an answer that failed."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            log.debug("http_refused", reason=record.getMessage())
        else:
            log.error("http_failed", error=_describe(error))


def _describe(error: BaseException) -> str:
    """Say type and place of an exception; its text may have anything in it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}"


def _make_logger() -> logging.Logger:
    """Make a logger outside of the process's tree: uvicorn's own may be somebody else's."""
    logger = logging.Logger("walstream.gateway", logging.WARNING)  # noqa: LOG001 - outside of it
    logger.addHandler(_Told())
    return logger


_LOGGER: Final = _make_logger()
