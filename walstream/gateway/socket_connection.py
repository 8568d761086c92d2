"""A client's connection from its request for a WebSocket on, under walstream's own server.

The application accepts or refuses it within `REQUEST_SECONDS`. Then the connection is of no age: it
ends when one side closes it, when the client is not heard of any more (it is asked by a ping), when
a message does not come to its end, or when nothing is fetched (`Stall`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from http import HTTPStatus
from typing import Final, TypeAlias, cast

import structlog
from starlette.types import ASGIApp, Message, Scope

from walstream.gateway.inbox import Inbox
from walstream.gateway.incoming import Closing, Ping, Violation
from walstream.gateway.notices import ANSWER_FULL, answer, refusal, tell_failed
from walstream.gateway.rounds import DirectStream, Rounds
from walstream.gateway.shared import REQUEST_SECONDS, Shared
from walstream.gateway.sockets import DENIAL, EXTENSION, Socket
from walstream.gateway.stalls import Stall
from walstream.gateway.streams import LINGER_SECONDS, Ended
from walstream.realtime.frames import PING, PONG, CloseCode, close_frame, control_frame

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.gateway")

PING_SECONDS: Final = 30.0
"""After so long without a word a client is asked; after twice that it has gone."""

_Part: TypeAlias = Callable[[int, str], None]


class DirectSocket(DirectStream, Socket):
    """Frames to the transport of a connection, and messages from it."""

    def __init__(
        self, transport: asyncio.Transport, rounds: Rounds, inbox: Inbox, part: _Part
    ) -> None:
        """Begin; ``part`` says goodbye for the connection."""
        super().__init__(transport, rounds, None, b"", is_chunked=False)
        self.inbox = inbox
        self._part = part
        self._pong: bytes | None = None
        self.begin()

    async def receive(self) -> str | bytes | None:
        """Return the next message, or None when there will be none."""
        return await self.inbox.take()

    async def close(self, code: int = CloseCode.NORMAL, reason: str = "") -> None:
        """Send what waits, for `LINGER_SECONDS` at most, and say goodbye."""
        await self.finish_soon()
        self._part(code, reason)

    def answer_ping(self, payload: bytes) -> None:
        """Send a pong; of several that a slow client waits for the last one will do (5.5.3)."""
        if self._is_paused:
            self._pong = payload
        else:
            self.write(control_frame(PONG, payload))

    def resume(self) -> None:
        """Go on: the transport has sent nearly all."""
        if self._pong is not None:
            self.write(control_frame(PONG, self._pong))
            self._pong = None
        super().resume()

    def say_last(self, frame: bytes, why: Ended) -> None:
        """Send this behind what the transport takes at once, and no more."""
        self.flush()
        self.drop()
        self._transport.write(frame)
        self.end(why)


class SocketConnection(asyncio.Protocol):
    """One client that asked for a WebSocket."""

    def __init__(self, shared: Shared, transport: asyncio.Transport, acceptance: bytes) -> None:
        """Take the connection over; ``acceptance`` is the head of the answer that accepts."""
        self.transport = transport
        self.lost: asyncio.Future[None] = shared.loop.create_future()
        self._shared = shared
        self._acceptance = acceptance
        self._early = b""
        self._denial: Message | None = None
        self._is_asked = False
        self._is_answered = False
        self._is_paused = False
        self._socket: DirectSocket | None = None
        self._stall = Stall(shared.loop, transport)
        self._is_heard = True
        self._is_pinged = False
        self._unfinished: int | None = None
        self._timer = shared.loop.call_later(REQUEST_SECONDS, self._cut, "the answer took too long")

    def begin(self, scope: Scope, early: bytes, *, is_paused: bool) -> None:
        """Let the application answer.

        Args:
            scope: of the request, to which the extensions are added.
            early: what came behind the head.
            is_paused: whether the transport has enough already.
        """
        self._shared.connections.add(self)
        self.transport.set_protocol(self)
        if is_paused:
            self.pause_writing()
        if early:
            self.data_received(early)
        app = cast("ASGIApp", self._shared.config.loaded_app)
        if not self._shared.has_place(scope["path"]):
            app = ANSWER_FULL
        scope["extensions"] = {DENIAL: {}, EXTENSION: self._open}
        self._shared.starts.add(partial(self._start, app, scope))

    # The transport

    def data_received(self, data: bytes) -> None:
        """Take frames; until the connection is accepted they wait."""
        self._is_heard = True
        if self._socket is not None:
            self._socket.inbox.feed(data)
        elif not self._is_answered:
            self._early += data
            self.transport.pause_reading()

    def eof_received(self) -> None:
        """Cut who has left without a goodbye."""
        if not self._is_ending():
            # The transport would close once it is empty, which a client that reads nothing never
            # lets it be.
            self.transport.abort()

    def pause_writing(self) -> None:
        """Leave frames in the socket: the transport has enough."""
        self._is_paused = True
        self._stall.begin()
        if self._socket is not None:
            self._socket.pause()

    def resume_writing(self) -> None:
        """Go on: the transport has sent nearly all."""
        self._is_paused = False
        self._stall.end()
        if self._socket is not None:
            self._socket.resume()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - whatever it was
        """Let the application know, which still gets what had come."""
        self._timer.cancel()
        self._stall.end()
        self._shared.connections.discard(self)
        # The application may hold the socket for longer: no cycle is left for the collector.
        socket, self._socket = self._socket, None
        if socket is not None:
            socket.inbox.end()
            socket.end(Ended.GONE)
        self.lost.set_result(None)

    def shutdown(self) -> None:
        """Let the client come back later: the server closes."""
        if self._socket is None:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "the server closes", "try again later")
        else:
            self._socket.inbox.discard()
            self._part(CloseCode.SERVICE_RESTART, "", Ended.CLOSING)

    # The answer

    def _start(self, app: ASGIApp, scope: Scope) -> None:
        if self.transport.is_closing():
            return
        answering = cast("Coroutine[None, None, None]", app(scope, self._receive, self._send))
        task = self._shared.loop.create_task(answering)
        self._shared.state.tasks.add(task)
        task.add_done_callback(self._done)

    async def _receive(self) -> Message:
        if not self._is_asked:
            self._is_asked = True
            return {"type": "websocket.connect"}
        await asyncio.shield(self.lost)
        return {"type": "websocket.disconnect", "code": 1006}

    async def _send(self, message: Message) -> None:
        if message["type"] == f"{DENIAL}.start":
            self._denial = message
        elif message["type"] == f"{DENIAL}.body" and self._denial is not None:
            head = self._denial
            self._deny(answer(head["status"], head["headers"], message.get("body", b"")))
        elif message["type"] == "websocket.close":
            self._refuse(HTTPStatus.FORBIDDEN, "the connection is not accepted")
        else:
            unknown = f"found {message['type']}; allowed: what open_socket and refuse send"
            raise RuntimeError(unknown)

    def _open(self, max_bytes: int) -> Socket:
        """Accept the client; for `open_socket`."""
        inbox = Inbox(self.transport, max_bytes, self._take_notice)
        part = partial(self._leave, inbox)
        socket = DirectSocket(self.transport, self._shared.rounds, inbox, part)
        if self._is_answered or self.lost.done():
            inbox.discard()
            socket.end(Ended.CLOSING if self._shared.is_closing else Ended.GONE)
            return socket
        self._is_answered = True
        self._socket = socket
        self.transport.write(self._acceptance)
        if self._is_paused:
            socket.pause()
        self._wait(PING_SECONDS, self._tick)
        early, self._early = self._early, b""
        inbox.feed(early)
        return socket

    def _done(self, task: asyncio.Task[None]) -> None:
        """Answer for an application that has not."""
        self._shared.state.tasks.discard(task)
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is not None:
            tell_failed(error)
        if not self._is_answered:
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, "the answer could not be made")
        elif self._socket is not None:
            self._part(CloseCode.INTERNAL_ERROR, "", Ended.GONE)

    def _refuse(self, status: HTTPStatus, error: str, hint: str = "") -> None:
        self._deny(refusal(status, error, hint))

    def _deny(self, whole: bytes) -> None:
        if self._is_answered:
            return
        self._is_answered = True
        self.transport.resume_reading()  # or what is not read would let the answer be lost
        self.transport.write(whole)
        self._end_sending()

    # Frames

    def _take_notice(self, arrival: Ping | Closing | Violation) -> None:
        if self._socket is None:  # it has gone meanwhile
            return
        if isinstance(arrival, Ping):
            self._socket.answer_ping(arrival.payload)
        elif isinstance(arrival, Closing):
            self._part(arrival.code, "", Ended.GONE)
            self.transport.close()
        else:
            log.debug("http_refused", reason=arrival.reason)
            self._part(arrival.code, arrival.reason, Ended.GONE)
            self._end_sending()

    def _leave(self, inbox: Inbox, code: int, reason: str) -> None:
        inbox.discard()
        self._part(code, reason, Ended.GONE)

    def _part(self, code: int | None, reason: str, why: Ended) -> None:
        """Say goodbye, unless that was said."""
        if self._socket is not None and not self._socket.is_over:
            self._socket.say_last(close_frame(code, reason), why)
            self._wait(LINGER_SECONDS, self.transport.abort)

    def _end_sending(self) -> None:
        if not self.transport.is_closing():
            self.transport.write_eof()
        self._wait(LINGER_SECONDS, self.transport.abort)

    # Deadlines

    def _tick(self) -> None:
        """Look whether the client is there, and says to the end what it begins."""
        if self._socket is None:
            return
        unfinished, before = self._socket.inbox.unfinished, self._unfinished
        if unfinished is not None and unfinished == before:
            self._cut("a message took too long")
            return
        if self._is_heard or self._is_paused or not self.transport.is_reading():
            self._is_pinged = False
        elif self._is_pinged:
            self._cut("the client is not heard of any more")
            return
        else:
            self._is_pinged = True
            self._socket.write(control_frame(PING))
        self._is_heard, self._unfinished = False, unfinished
        self._wait(PING_SECONDS, self._tick)

    def _wait(self, seconds: float, then: Callable[[], object]) -> None:
        self._timer.cancel()
        self._timer = self._shared.loop.call_later(seconds, then)

    def _cut(self, reason: str) -> None:
        log.debug("http_refused", reason=reason)
        self.transport.abort()

    def _is_ending(self) -> bool:
        return self._is_answered and (self._socket is None or self._socket.is_over)
