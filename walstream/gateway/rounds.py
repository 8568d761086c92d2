"""Streams under walstream's own server: written to in rounds that leave the loop to others."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

from walstream.gateway.compression import Compressor
from walstream.gateway.streams import HIGH_BYTES, LOW_BYTES, Ended, Stream

SLICE_SECONDS: Final = 0.003
"""So long streams are written to before the loop does what else there is."""

REST_FACTOR: Final = 1.5
"""Rounds that took long are followed by a rest that is so much longer."""

_UNNOTICED_SECONDS: Final = 0.001
_LONGEST_REST_SECONDS: Final = 0.05


class DirectStream(Stream):
    """Writes to the transport of a connection."""

    def __init__(
        self,
        transport: asyncio.Transport,
        rounds: Rounds,
        compressor: Compressor | None,
        farewell: bytes,
        *,
        is_chunked: bool,
    ) -> None:
        super().__init__(compressor)
        self._transport = transport
        self._rounds = rounds
        self._farewell = farewell
        self._is_chunked = is_chunked
        self._is_called = True  # `begin` does it
        self._is_paused = False

    @property
    def waiting_bytes(self) -> int:
        """What has been written and the system has not taken for the client."""
        return self._waiting + self._transport.get_write_buffer_size()

    @property
    def is_behind(self) -> bool:
        """Whether much waits here that the transport would take."""
        if self._is_paused or self._ended is not None or self._transport.is_closing():
            return False
        return self._waiting > HIGH_BYTES

    def begin(self) -> None:
        """Send from now on: the head is out."""
        self._is_called = False
        if self._pieces:
            self._call()

    def pause(self) -> None:
        """Leave pieces here: the transport has enough."""
        self._is_paused = True

    def resume(self) -> None:
        """Go on: the transport has sent nearly all."""
        self._is_paused = False
        self._tell_moved()
        if self._pieces:
            self._call()

    def say_farewell(self) -> None:
        """Tell the client that the server closes, at once, and take no more."""
        if self._ended is None:
            self.write(self._farewell)
            if not self._is_paused:
                self.flush()
            self.end(Ended.CLOSING)

    def flush(self) -> None:
        """Send what waits, as much as the transport takes; for `Rounds`."""
        self._is_called = False
        if self._ended is not None or self._is_paused or not self._pieces:
            return
        if self._transport.is_closing():
            return
        data = self._take()
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._is_chunked else data)
        if self._pieces and not self._is_paused:
            self._call()
        self._tell_moved()

    def _has_room(self) -> bool:
        # What is in the transport goes by itself; it tells only when it had had too much.
        return not self._is_paused and self._waiting <= LOW_BYTES

    def _call(self) -> None:
        if not self._is_called and not self._is_paused:
            self._is_called = True
            self._rounds.add(self)


class Rounds:
    """Writes to the streams that have something, to each once a round.

    A round is cut into slices, between which the loop does what else there is to do: it reads the
    replication stream, too. After a long round the streams rest, so that they have no more than
    `1 / (1 + REST_FACTOR)` of the loop's time, and more pieces are sent by the next one.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._next: list[DirectStream] = []
        self._now: deque[DirectStream] = deque()
        self._is_called = False
        self._took_seconds = 0.0
        self._rests_until = 0.0

    def add(self, stream: DirectStream) -> None:
        """Flush this stream in the next round."""
        self._next.append(stream)
        if not self._is_called:
            self._is_called = True
            rest_seconds = self._rests_until - self._loop.time()
            if rest_seconds <= 0:
                self._loop.call_soon(self._begin)
            else:
                self._loop.call_later(rest_seconds, self._begin)

    def _begin(self) -> None:
        self._now.extend(self._next)
        self._next.clear()
        self._took_seconds = 0.0
        self._go_on()

    def _go_on(self) -> None:
        now = began = self._loop.time()
        try:
            while self._now and now - began < SLICE_SECONDS:
                self._now.popleft().flush()
                now = self._loop.time()
        finally:  # a piece that is none must not hold up the others
            self._took_seconds += now - began
            if self._now:
                self._loop.call_soon(self._go_on)
            else:
                self._rest(now)

    def _rest(self, now: float) -> None:
        self._is_called = False
        if self._took_seconds > _UNNOTICED_SECONDS:
            rest_seconds = min(self._took_seconds * REST_FACTOR, _LONGEST_REST_SECONDS)
            self._rests_until = now + rest_seconds
        if self._next:
            self._is_called = True
            self._loop.call_at(max(self._rests_until, now), self._begin)
