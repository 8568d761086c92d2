"""Serves the application in the daemon's event loop, without holding up what else runs there.

It is uvicorn's HTTP protocol on sockets of ours, without uvicorn's server: that one would take the
process's signals, and log by itself. Requests are begun a few at a time and streams are written to
in slices (`streams.Rounds`), so that the replication stream is read between, however many clients
come at once.

What a client can hold is bounded: how many connections there are, how long a request may take from
its first byte to the end of its answer, how large its head and its body are, and what waits for it
in the transport. The answer that is a stream has no end; it is cut when nothing of it is fetched
for `STALL_SECONDS`. Streams cannot take the place of health and metrics: `RESERVED` connections are
for those, and when all are taken the one that has asked for nothing for the longest time is cut.

`Server.close` takes at most `CLOSE_SECONDS` twice, whatever clients do.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import Callable, Sequence
from email.utils import formatdate
from functools import partial
from http import HTTPStatus
from typing import Any, Final, Self, cast

import structlog
import uvicorn
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute
from starlette.types import ASGIApp
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from walstream.config.live import HttpConfig
from walstream.errors import SetupError
from walstream.gateway.app import make_app
from walstream.gateway.compression import Compressor
from walstream.gateway.listening import (
    BACKLOG,
    Address,
    address_of,
    allow_connections,
    listen_at,
    parse_listen,
)
from walstream.gateway.streams import EXTENSION, HIGH_BYTES, LOW_BYTES, DirectStream, Ended, Rounds
from walstream.logs import type_and_place
from walstream.vitals import Vitals

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.gateway")

RESERVED: Final = 64
"""So many connections are there beyond ``http.max_connections``, for health and metrics."""

HEADER_BYTES: Final = 1 << 14
BODY_BYTES: Final = 1 << 20
MAX_PIPELINED: Final = 32
REQUEST_SECONDS: Final = 10.0
IDLE_SECONDS: Final = 30
STALL_SECONDS: Final = 30.0
CLOSE_SECONDS: Final = 0.4

AT_ONCE: Final = 4
"""So many connections are taken and so many requests begun by one turn of the event loop."""

_LINGER_SECONDS: Final = 2.0
_FULL_SECONDS: Final = 60.0
_FEED_BYTES: Final = 1 << 13


class Server:
    """Listens until it is closed."""

    def __init__(self, servers: list[asyncio.Server], shared: _Shared, address: Address) -> None:
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
    ) -> Self:
        """Begin to listen at ``http.listen``, which must be given.

        Raises:
            ConfigError: ``http.listen`` is no address that can be resolved.
            SetupError: nothing can listen there.
        """
        config = _configure(make_app(vitals, routes, http))
        sockets = await listen_at(parse_listen(http.listen or ""))
        loop = asyncio.get_running_loop()
        shared = _Shared(loop, config, _allowed(http.max_connections))
        servers = [
            # asyncio takes as many connections at once as its backlog has; the real one is ours.
            await loop.create_server(lambda: _Connection(shared), sock=one, backlog=AT_ONCE)
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

    def _connections(self) -> list[_Connection]:
        return [one for one in self._state.connections if isinstance(one, _Connection)]


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
    if not hasattr(HttpToolsProtocol, "_start_asgi_task"):  # which `_Connection` overrides
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


class _Shared:
    """What the connections of a server have in common."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, config: uvicorn.Config, max_connections: int
    ) -> None:
        self.loop = loop
        self.config = config
        self.state = ServerState()
        self.rounds = Rounds(loop)
        self.turns = _Turns(loop)
        self.is_closing = False
        self.idle: dict[_Connection, None] = {}
        """Those that no answer is made for, the one that has been so for longest first."""
        self._max_connections = max_connections
        self._full_at = -_FULL_SECONDS

    def admit(self, connection: _Connection) -> None:
        """Count a new connection as idle; of too many cut one that is."""
        self.idle[connection] = None
        if len(self.state.connections) > self._max_connections + RESERVED:
            longest = next(iter(self.idle))
            del self.idle[longest]
            log.debug("http_refused", reason="too many connections")
            longest.transport.abort()
            self._tell_full()

    def has_place(self, path: str) -> bool:
        """Whether a request that is no longer idle may be answered."""
        busy = len(self.state.connections) - len(self.idle)
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


class _Turns:
    """Begins requests, a few by each turn of the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[Callable[[], None]] = deque()
        self._is_called = False

    def add(self, begin: Callable[[], None]) -> None:
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


class _Connection(HttpToolsProtocol):
    """A client's connection, with a deadline for each request."""

    def __init__(self, shared: _Shared) -> None:
        super().__init__(shared.config, shared.state, {}, shared.loop)
        self.logger = _LOGGER
        self.access_log = False
        self.lost: asyncio.Future[None] = self.loop.create_future()
        self._shared = shared
        self._deadline: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._stream: DirectStream | None = None
        self._is_deaf = False
        self._has_head = False
        self._head_bytes = 0
        self._body_bytes = 0

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=HIGH_BYTES, low=LOW_BYTES)
        self._expect()
        self._shared.admit(self)

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        self._expect()
        self.server_state.default_headers = [(b"date", formatdate(usegmt=True).encode())]
        for start in range(0, len(data), _FEED_BYTES):
            piece = data[start : start + _FEED_BYTES]
            super().data_received(piece)
            if not self._has_head:
                self._head_bytes += len(piece)
                if self._head_bytes > HEADER_BYTES:
                    self._refuse_head()
            if self._takes_no_more():
                return

    def pause_writing(self) -> None:
        super().pause_writing()
        self._look_again()
        if self._stream is not None:
            self._stream.pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
        if self._stream is not None:
            self._stream.resume()

    def eof_received(self) -> None:
        if self._stream is not None:
            # The transport would close once it is empty, which a client that reads nothing never
            # lets it be; and it takes no more of the stream.
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._rest()
        if self._stalled is not None:
            self._stalled.cancel()
        self._shared.idle.pop(self, None)
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        if self._stream is not None:
            self._stream.end(Ended.GONE)
        if not self.lost.done():
            self.lost.set_result(None)

    def shutdown(self) -> None:
        super().shutdown()
        if self._stream is not None:
            self._stream.close()

    # The request

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._has_head = False
        self._head_bytes = self._body_bytes = 0

    def on_headers_complete(self) -> None:
        self._has_head = True
        if self._is_deaf:
            return
        head_bytes = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if head_bytes > HEADER_BYTES:
            self._refuse_head()
        elif len(self.pipeline) >= MAX_PIPELINED:
            self._refuse(HTTPStatus.TOO_MANY_REQUESTS, "too many requests before an answer")
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self._is_deaf:
            return
        self._body_bytes += len(body)
        if self._body_bytes <= BODY_BYTES:
            super().on_body(body)
        elif not self.cycle.response_complete:
            hint = f"at most {BODY_BYTES} bytes are taken"
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "the body is too large", hint)

    def on_message_complete(self) -> None:
        if not self._is_deaf:
            super().on_message_complete()

    def _unsupported_upgrade_warning(self) -> None:
        """Answer a request that asks for another protocol by this one, and take no more."""
        self.cycle.keep_alive = False
        self._is_deaf = True

    def send_400_response(self, msg: str) -> None:
        """Answer what cannot be read."""
        self._refuse(HTTPStatus.BAD_REQUEST, msg)

    def _refuse_head(self) -> None:
        self._refuse(
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
            "the head of the request is too large",
            f"address and headers may have {HEADER_BYTES} bytes together",
        )

    def _refuse(self, status: HTTPStatus, error: str, hint: str = "") -> None:
        """Answer with an error and take no more of this connection."""
        if self._is_deaf:
            return
        self._is_deaf = True
        log.debug("http_refused", reason=error)
        if self._is_answering():
            if status is not HTTPStatus.REQUEST_ENTITY_TOO_LARGE or self.cycle.response_started:
                self.transport.abort()
                return
            # The answer is to this request: the application need not know.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._write(status, error, hint)
        self._linger()

    def _write(self, status: HTTPStatus, error: str, hint: str) -> None:
        body = json.dumps({"error": error, "hint": hint}).encode()
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\ncache-control: no-store\r\n"
            "x-content-type-options: nosniff\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)

    def _linger(self) -> None:
        """Let the client read the answer, which is lost when it still sends and we have closed."""
        self._is_deaf = True
        self.flow.resume_reading()
        if not self.transport.is_closing():
            self.transport.write_eof()
        self._rest()
        self._deadline = self.loop.call_later(_LINGER_SECONDS, self.transport.abort)

    # The answer

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._shared.idle.pop(self, None)
        if not self._shared.has_place(cycle.scope["path"]):
            app = cast("ASGI3Application", _answer_full)
        extensions: dict[str, Any] = {EXTENSION: partial(self._open_stream, cycle)}
        cycle.scope["extensions"] = extensions
        self._shared.turns.add(partial(super()._start_asgi_task, cycle, app))

    def _open_stream(
        self, cycle: RequestResponseCycle, compressor: Compressor | None, farewell: bytes
    ) -> DirectStream:
        is_chunked = cycle.scope["http_version"] == "1.1"
        if not is_chunked:  # then the end of the connection is the end of the answer
            cycle.chunked_encoding = False
        stream = DirectStream(
            self.transport, self._shared.rounds, compressor, farewell, is_chunked=is_chunked
        )
        if cycle.disconnected:
            stream.end(Ended.GONE)
        elif self._shared.is_closing:
            stream.end(Ended.CLOSING)
        elif self.flow.write_paused:
            stream.pause()
        self._rest()
        self._stream = stream
        return stream

    def on_response_complete(self) -> None:
        self._rest()
        self._stream = None
        self._shared.idle[self] = None
        if self.cycle.response_complete and self.cycle.more_body and self.cycle.keep_alive:
            self._linger()  # the rest of the body is of no use
            return
        super().on_response_complete()  # and begins with the next request, if it has come already
        if self._is_busy():
            self._expect()

    # Deadlines

    def _expect(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(REQUEST_SECONDS, self._give_up)

    def _rest(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _takes_no_more(self) -> bool:
        return self._is_deaf or self.transport.is_closing()

    def _is_answering(self) -> bool:
        # Before the first request there is no cycle, whatever its annotation says.
        return bool(self.cycle) and not self.cycle.response_complete

    def _is_busy(self) -> bool:
        """Whether an answer is not made, or not fetched."""
        made = bool(self.cycle) and self.cycle.response_complete
        return not made or self.transport.get_write_buffer_size() > 0

    def _is_streaming(self) -> bool:
        """Whether an answer without an end is on its way, for which there is `STALL_SECONDS`."""
        return self._stream is not None or (
            self._is_answering() and self.cycle.chunked_encoding is True
        )

    def _give_up(self) -> None:
        self._deadline = None
        if self._is_streaming():
            return
        # Also who sends what is no request, so that it is never idle for long.
        if self._is_busy() or self.timeout_keep_alive_task is None:
            log.debug("http_refused", reason="the request took too long")
            self.transport.abort()

    def _look_again(self) -> None:
        size = self.transport.get_write_buffer_size()
        self._stalled = self.loop.call_later(STALL_SECONDS, self._look, size)

    def _look(self, before: int) -> None:
        """Cut a client that has fetched nothing since the transport had enough."""
        if self.transport.get_write_buffer_size() < before:
            self._look_again()
            return
        log.debug("http_refused", reason="the answer is not fetched")
        self.transport.abort()


_answer_full: Final = JSONResponse(
    {
        "error": "too many clients are connected",
        "hint": "try again later; http.max_connections of walstream's configuration is the bound",
    },
    HTTPStatus.SERVICE_UNAVAILABLE,
    {"Cache-Control": "no-store", "Connection": "close", "Retry-After": "5"},
)


class _Told(logging.Handler):
    """Makes events of what uvicorn's protocol logs: a request of no use, an answer that failed."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            log.debug("http_refused", reason=record.getMessage())
        elif isinstance(error, ClientDisconnect | asyncio.CancelledError):
            log.debug("http_refused", reason="the client has gone")
        else:
            log.error("http_failed", error=type_and_place(error))


def _make_logger() -> logging.Logger:
    """Make a logger outside of the process's tree: uvicorn's own may be somebody else's."""
    logger = logging.Logger("walstream.gateway", logging.WARNING)  # noqa: LOG001 - outside of it
    logger.addHandler(_Told())
    return logger


_LOGGER: Final = _make_logger()
