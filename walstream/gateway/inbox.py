"""What a WebSocket client has sent and the application has not taken, and how much that may be.

Frames are decoded a few at a time, so that no client holds up the event loop; while enough messages
wait, nothing more is read of the connection. So what a client can hold is bounded: by `MAX_WAITING`
messages, by `HIGH_BYTES` and one message more, by one message as bytes and by one read.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final, TypeAlias

from walstream.gateway.incoming import Closing, Incoming, Ping, Violation
from walstream.gateway.streams import HIGH_BYTES
from walstream.realtime.frames import CloseCode

MAX_WAITING: Final = 32
"""So many messages wait for the application."""

MAX_IDLE_FRAMES: Final = 1000
"""So many pings, pongs and fragments a client may send in a second."""

AT_ONCE: Final = 64
"""So many frames are decoded by one turn of the event loop."""

_Tell: TypeAlias = Callable[[Ping | Closing | Violation], None]


class Inbox:
    """One client's messages."""

    def __init__(self, transport: asyncio.ReadTransport, max_bytes: int, tell: _Tell) -> None:
        """Begin with nothing.

        Args:
            transport: paused while enough waits.
            max_bytes: of a message.
            tell: called for what is no message, and to be answered.
        """
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        self._tell = tell
        self._incoming = Incoming(max_bytes)
        self._messages: deque[str | bytes] = deque()
        self._bytes = 0
        self._taken = 0
        self._idle_frames = 0
        self._second = 0.0
        self._is_called = False
        self._has_stopped = False
        self._has_all = False
        self._is_discarding = False
        self._is_over = False
        self._arrived: asyncio.Future[None] | None = None

    @property
    def unfinished(self) -> int | None:
        """Which message has begun and not come to its end, unless that is for us to read."""
        is_ours = self._is_called or self._is_full
        return None if is_ours or not self._incoming.is_within else self._taken

    @property
    def _is_full(self) -> bool:
        return len(self._messages) >= MAX_WAITING or self._bytes > HIGH_BYTES

    def feed(self, data: bytes) -> None:
        """Take what came; behind the last word nothing is of interest."""
        if self._is_over:
            return
        self._incoming.feed(data)
        if not self._is_called:
            self._decode()

    async def take(self) -> str | bytes | None:
        """Return the next message, or None when there will be none."""
        while not self._messages:
            if self._is_over or self._is_discarding:
                return None
            self._arrived = self._loop.create_future()
            await self._arrived
        message = self._messages.popleft()
        self._bytes -= len(message)
        if self._has_stopped and not self._messages:
            self._call()
        return message

    def end(self) -> None:
        """Hand over what has come: nothing more will come."""
        self._has_all = True
        if not self._is_called:
            self._decode()

    def discard(self) -> None:
        """Hand over nothing more: only that the client closes is of interest."""
        self._messages.clear()
        self._bytes = 0
        self._is_discarding = True
        self._wake()
        self._call()

    def _call(self) -> None:
        if not self._is_called and not self._is_over:
            self._is_called = True
            self._loop.call_soon(self._decode)

    def _decode(self) -> None:
        self._is_called = False
        try:
            self._read_some()
        except Violation as violation:
            self._finish()
            self._tell(violation)
        self._has_stopped = self._is_full
        if self._is_called or self._has_stopped:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _read_some(self) -> None:
        for _ in range(AT_ONCE):
            if self._is_over or self._is_full:
                return
            arrival = self._incoming.read()
            if arrival is None:
                if self._has_all:
                    self._finish()
                return
            if isinstance(arrival, str | bytes):
                self._hand_over(arrival)
            else:
                self._count_idle()
                if isinstance(arrival, Closing):
                    self._finish()
                if isinstance(arrival, Ping | Closing):
                    self._tell(arrival)
        self._call()

    def _hand_over(self, message: str | bytes) -> None:
        if self._is_discarding:
            return
        self._messages.append(message)
        self._bytes += len(message)
        self._taken += 1
        self._wake()

    def _count_idle(self) -> None:
        now = self._loop.time()
        if now - self._second >= 1.0:
            self._second, self._idle_frames = now, 0
        self._idle_frames += 1
        if self._idle_frames > MAX_IDLE_FRAMES:
            reason = f"at most {MAX_IDLE_FRAMES} pings, pongs and fragments are taken in a second"
            raise Violation(CloseCode.POLICY_VIOLATION, reason)

    def _finish(self) -> None:
        self._is_over = True
        self._wake()

    def _wake(self) -> None:
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)
