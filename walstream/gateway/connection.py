"""A client's connection that speaks HTTP: uvicorn's protocol, with a deadline for each request."""

from __future__ import annotations

import asyncio
from email.utils import formatdate
from functools import partial
from http import HTTPStatus
from typing import Any, Final, cast

import httptools
import structlog
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from walstream.gateway.compression import Compressor
from walstream.gateway.handshake import HandshakeRefused, accept, split_target
from walstream.gateway.notices import ANSWER_FULL, LOGGER, refusal
from walstream.gateway.rounds import DirectStream
from walstream.gateway.shared import REQUEST_SECONDS, Shared
from walstream.gateway.socket_connection import SocketConnection
from walstream.gateway.stalls import Stall
from walstream.gateway.streams import EXTENSION, HIGH_BYTES, LINGER_SECONDS, LOW_BYTES, Ended

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.gateway")

HEADER_BYTES: Final = 1 << 14
MAX_PIPELINED: Final = 32

_FEED_BYTES: Final = 1 << 13


class Connection(HttpToolsProtocol):
    """A client's connection, with a deadline for each request."""

    def __init__(self, shared: Shared) -> None:
        super().__init__(shared.config, shared.state, {}, shared.loop)
        self.logger = LOGGER
        self.access_log = False
        self.lost: asyncio.Future[None] = self.loop.create_future()
        self._shared = shared
        self._deadline: asyncio.TimerHandle | None = None
        self._stream: DirectStream | None = None
        self._is_deaf = False
        self._has_head = False
        self._head_bytes = 0
        self._body_bytes = 0

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the connection, and wait for a request."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=HIGH_BYTES, low=LOW_BYTES)
        self._stall = Stall(self.loop, transport)
        self._expect()
        self._shared.admit(self)

    def data_received(self, data: bytes) -> None:
        """Parse what came, a piece at a time."""
        if self._is_deaf:
            return
        self._expect()
        self.server_state.default_headers = [(b"date", formatdate(usegmt=True).encode())]
        for start in range(0, len(data), _FEED_BYTES):
            piece = data[start : start + _FEED_BYTES]
            self._feed(piece, data[start:])
            if not self._has_head:
                self._head_bytes += len(piece)
                if self._head_bytes > HEADER_BYTES:
                    self._refuse_head()
            if self._takes_no_more():
                return

    def _feed(self, piece: bytes, rest: bytes) -> None:
        """Parse a piece, which is the beginning of the rest of what came."""
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:
            if self._should_upgrade():
                self._hand_over(rest[upgrade.args[0] :])
            else:
                self._answer_by_http()
        except httptools.HttpParserError:
            self._refuse(HTTPStatus.BAD_REQUEST, "the request is not HTTP/1.1")

    def pause_writing(self) -> None:
        """Let nothing more be written: the transport has enough."""
        super().pause_writing()
        self._stall.begin()
        if self._stream is not None:
            self._stream.pause()

    def resume_writing(self) -> None:
        """Go on: the transport has sent nearly all."""
        super().resume_writing()
        self._stall.end()
        if self._stream is not None:
            self._stream.resume()

    def eof_received(self) -> None:
        """End a stream for a client that says no more."""
        if self._stream is not None:
            # The transport would close once it is empty, which a client that reads nothing never
            # lets it be; and it takes no more of the stream.
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let the application know."""
        self._forget()
        super().connection_lost(exc)
        if self._stream is not None:
            self._stream.end(Ended.GONE)

    def _forget(self) -> None:
        """Be no connection any more."""
        self._rest()
        self._stall.end()
        self._shared.idle.pop(self, None)
        self.connections.discard(self)
        self._unset_keepalive_if_required()
        if not self.lost.done():
            self.lost.set_result(None)

    def shutdown(self) -> None:
        """Finish the answer, or tell a stream that the server closes."""
        super().shutdown()
        if self._stream is not None:
            self._stream.say_farewell()

    # The request

    def on_message_begin(self) -> None:
        """Measure a new request."""
        super().on_message_begin()
        self._has_head = False
        self._head_bytes = self._body_bytes = 0

    def on_headers_complete(self) -> None:
        """Let the application answer, unless the head is too much."""
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
        """Keep a piece of the body for the application, unless it is too much."""
        if self._is_deaf:
            return
        self._body_bytes += len(body)
        if self._body_bytes <= self._shared.max_body_bytes:
            super().on_body(body)
        elif self._is_answering():
            hint = f"at most {self._shared.max_body_bytes} bytes are taken"
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "the body is too large", hint)

    def on_message_complete(self) -> None:
        """Let the application have the end of the body."""
        if not self._is_deaf:
            super().on_message_complete()

    def _should_upgrade(self) -> bool:
        return self._get_upgrade() == b"websocket"

    def _hand_over(self, early: bytes) -> None:
        """Let a connection of frames take the transport, if this asks for one as it must."""
        method = self.scope["method"]
        try:
            acceptance = accept(method, self.scope["http_version"], self.headers)
            path, raw_path, query = split_target(self.url)
        except HandshakeRefused as refused:
            self._refuse(HTTPStatus.BAD_REQUEST, refused.error, refused.hint)
            return
        if self._is_answering():
            self._refuse(HTTPStatus.BAD_REQUEST, "a WebSocket is asked for before an answer")
            return
        scope = {
            **self.scope,
            "type": "websocket",
            "scheme": "wss" if self.scheme == "https" else "ws",
            "path": path,
            "raw_path": raw_path,
            "query_string": query,
            "subprotocols": [],
        }
        self._is_deaf = True
        self._forget()
        # As uvicorn does at the end: it refers to this object.
        self.parser = None  # type: ignore[assignment]
        upgraded = SocketConnection(self._shared, self.transport, acceptance)
        upgraded.begin(scope, early, is_paused=self.flow.write_paused)

    def _answer_by_http(self) -> None:
        """Answer a request that asks for another protocol by this one, and take no more."""
        self.cycle.keep_alive = False
        self._is_deaf = True

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
        self.transport.write(refusal(status, error, hint))
        self._linger()

    def _linger(self) -> None:
        """Let the client read the answer, which is lost when it still sends and we have closed."""
        self._is_deaf = True
        self.flow.resume_reading()
        if not self.transport.is_closing():
            self.transport.write_eof()
        self._rest()
        self._deadline = self.loop.call_later(LINGER_SECONDS, self.transport.abort)

    # The answer

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._shared.idle.pop(self, None)
        if not self._shared.has_place(cycle.scope["path"]):
            app = cast("ASGI3Application", ANSWER_FULL)
        extensions: dict[str, Any] = {EXTENSION: partial(self._open_stream, cycle)}
        cycle.scope["extensions"] = extensions
        self._shared.starts.add(partial(super()._start_asgi_task, cycle, app))

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
        """Wait for the next request, or begin with one that waits."""
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
