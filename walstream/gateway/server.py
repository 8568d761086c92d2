"""Serves the application in the daemon's event loop, without holding up what else runs there.

It is uvicorn's HTTP protocol on sockets of ours, without uvicorn's server: that one would take the
process's signals, and log by itself. Requests are begun a few at a time and streams are written to
in slices (`rounds.Rounds`), so that the replication stream is read between, however many clients
come at once.

What a client can hold is bounded: how many connections there are, how long a request may take from
its first byte to the end of its answer, how large its head and its body are, and what waits for it
in the transport. The answer that is a stream has no end; it is cut when nothing of it is fetched
for `STALL_SECONDS`. So is a WebSocket, of which `socket_connection` tells. Streams cannot take the
place of health and metrics: `RESERVED` connections are for those, and when all are taken the one
that has asked for nothing for the longest time is cut.

`Server.close` takes at most `CLOSE_SECONDS` twice, whatever clients do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final, Self, cast

import structlog
import uvicorn
from starlette.routing import BaseRoute
from starlette.types import ASGIApp
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from walstream.config.live import HttpConfig
from walstream.errors import SetupError
from walstream.gateway.app import make_app
from walstream.gateway.connection import Connection
from walstream.gateway.listening import (
    BACKLOG,
    Address,
    address_of,
    allow_connections,
    listen_at,
    parse_listen,
)
from walstream.gateway.shared import AT_ONCE, BODY_BYTES, RESERVED, Connected, Shared
from walstream.vitals import Vitals

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.gateway")

IDLE_SECONDS: Final = 30
CLOSE_SECONDS: Final = 0.4


class Server:
    """Listens until it is closed."""

    def __init__(self, servers: list[asyncio.Server], shared: Shared, address: Address) -> None:
        """Take what `open` has begun."""
        self.address: Final = str(address)
        """Where it listens, with the port that it has got."""
        self._servers = servers
        self._shared = shared
        self._state = shared.state

    @classmethod
    async def open(
        cls,
        http: HttpConfig,
        vitals: Callable[[], Vitals],
        routes: Sequence[BaseRoute] = (),
        max_body_bytes: int = BODY_BYTES,
    ) -> Self:
        """Begin to listen at ``http.listen``, which must be given.

        Raises:
            ConfigError: ``http.listen`` is no address that can be resolved.
            SetupError: nothing can listen there.
        """
        config = _configure(make_app(vitals, routes, http))
        sockets = await listen_at(parse_listen(http.listen or ""))
        loop = asyncio.get_running_loop()
        shared = Shared(loop, config, _allowed(http.max_connections), max_body_bytes)
        servers = [
            # asyncio takes as many connections at once as its backlog has; the real one is ours.
            await loop.create_server(lambda: Connection(shared), sock=one, backlog=AT_ONCE)
            for one in sockets
        ]
        for one in sockets:
            one.listen(BACKLOG)
        address = address_of(sockets[0])
        log.info("http_listening", address=str(address))
        if not all(address_of(one).is_loopback for one in sockets):
            log.warning(
                "http_exposed",
                address=str(address),
                hint="whoever reaches this address can read names of tables, routes and"
                " destinations; 127.0.0.1 is for this machine only",
            )
        return cls(servers, shared, address)

    async def close(self) -> None:
        """Take no more requests, finish those in hand, and cut off who does not read its answer.

        Streams are told, if their endpoints have a farewell, and end.
        """
        self._shared.is_closing = True
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

    def _connections(self) -> list[Connected]:
        return list(self._shared.connections)


def _configure(app: ASGIApp) -> uvicorn.Config:
    served = cast("ASGI3Application", app)  # Starlette and uvicorn have types of their own for this
    config = uvicorn.Config(
        served,
        http="httptools",
        ws="none",
        lifespan="off",
        interface="asgi3",
        workers=1,
        log_config=None,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=IDLE_SECONDS,
    )
    if not hasattr(HttpToolsProtocol, "_start_asgi_task"):  # which `Connection` overrides
        message = (
            f"http.listen is set, and uvicorn {uvicorn.__version__} is none that it works with"
        )
        raise SetupError(message, hint='pip install --upgrade "walstream[http]"')
    config.load()
    # It may have put something around that logs whole requests, tokens and all.
    config.loaded_app = served
    return config


def _allowed(wanted: int) -> int:
    """Return how many connections besides the reserved ones the system allows, and tell if less."""
    allowed = max(1, allow_connections(wanted + RESERVED) - RESERVED)
    if allowed < wanted:
        log.warning(
            "http_connections_limited",
            max_connections=wanted,
            allowed=allowed,
            hint="the process may not open more files: raise its hard limit (LimitNOFILE= of"
            " systemd, ulimit -Hn), or lower http.max_connections",
        )
    return allowed
