"""What the connections of a server have in common: how many there are, and whose turn it is."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol, cast

import structlog
import uvicorn
from uvicorn.server import ServerState

from walstream.gateway.rounds import Rounds

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.gateway")

RESERVED: Final = 64
"""So many connections are there beyond ``http.max_connections``, for health and metrics."""

AT_ONCE: Final = 4
"""So many connections are taken and so many requests begun by one turn of the event loop."""

BODY_BYTES: Final = 1 << 20
"""So large a request's body may be, unless what is answered needs more."""

REQUEST_SECONDS: Final = 10.0
"""So long a request may take: to come, to be answered, and its answer to be fetched."""

_FULL_SECONDS: Final = 60.0


class Connected(Protocol):
    """A client's connection, whatever is spoken on it."""

    transport: asyncio.Transport
    lost: asyncio.Future[None]

    def shutdown(self) -> None:
        """Take no more, and end soon: the server closes."""


class Shared:
    """What the connections of a server have in common."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        config: uvicorn.Config,
        max_connections: int,
        max_body_bytes: int,
    ) -> None:
        self.loop = loop
        self.max_body_bytes = max_body_bytes
        self.config = config
        self.state = ServerState()
        self.connections = cast("set[Connected]", self.state.connections)
        self.rounds = Rounds(loop)
        self.starts = Starts(loop)
        self.is_closing = False
        self.idle: dict[Connected, None] = {}
        """Those that no answer is made for, the one that has been so for longest first."""
        self._max_connections = max_connections
        self._full_at = -_FULL_SECONDS

    def admit(self, connection: Connected) -> None:
        """Count a new connection as idle; of too many cut one that is."""
        self.idle[connection] = None
        if len(self.connections) > self._max_connections + RESERVED:
            longest = next(iter(self.idle))
            del self.idle[longest]
            log.debug("http_refused", reason="too many connections")
            longest.transport.abort()
            self._tell_full()

    def has_place(self, path: str) -> bool:
        """Whether a request that is no longer idle may be answered."""
        busy = len(self.connections) - len(self.idle)
        if busy <= self._max_connections or path == "/metrics" or path.startswith("/health/"):
            return True
        log.debug("http_refused", reason="too many requests at once")
        self._tell_full()
        return False

    def _tell_full(self) -> None:
        now = self.loop.time()
        if now - self._full_at >= _FULL_SECONDS:
            self._full_at = now
            log.warning(
                "http_full",
                max_connections=self._max_connections,
                hint="further clients are turned away: raise http.max_connections, or look for one"
                " that connects again and again",
            )


class Starts:
    """Begins requests, a few by each turn of the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[Callable[[], None]] = deque()
        self._is_called = False

    def add(self, begin: Callable[[], None]) -> None:
        """Begin a request when it is its turn."""
        self._waiting.append(begin)
        if not self._is_called:
            self._is_called = True
            self._loop.call_soon(self._run)

    def _run(self) -> None:
        for _ in range(min(AT_ONCE, len(self._waiting))):
            self._waiting.popleft()()
        self._is_called = bool(self._waiting)
        if self._is_called:
            self._loop.call_soon(self._run)
