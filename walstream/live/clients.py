"""One client: what it asked for, what it is owed, and why it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Sequence
from enum import StrEnum
from typing import Protocol

from walstream.changes import Layout
from walstream.live.encodings import Encoding
from walstream.live.subscriptions import Subscription
from walstream.live.views import Sight, View


class Reader(Protocol):
    """Who reads; readers with equal ``grants`` see the same."""

    @property
    def grants(self) -> Hashable:
        """What decides what is seen."""

    def sight(self, layout: Layout) -> Sight | None:
        """Return what may be seen of a table; None for nothing of it."""


class End(StrEnum):
    """Why a stream ends before the client leaves; it can be taken up again at the last id."""

    SLOW = "slow"
    EXPIRED = "expired"
    CLOSING = "closing"
    LEFT = "left"
    """It is the client that has left."""


class Cohort:
    """All clients that see the same: what is written for one is written for all of them."""

    __slots__ = ("clients", "encoding", "entered", "reader", "subscriptions", "views")

    def __init__(
        self, subscriptions: Sequence[Subscription], reader: Reader, encoding: Encoding
    ) -> None:
        self.subscriptions = tuple(subscriptions)
        self.reader = reader
        self.encoding = encoding
        self.clients: dict[Client, None] = {}
        self.views: dict[Layout, list[View]] = {}
        self.entered: dict[Layout, list[View]] = {}

    @property
    def key(self) -> Hashable:
        """Equal for clients that see the same."""
        return self.subscriptions, self.reader.grants, self.encoding


class Client:
    """What waits for one client, up to a bound.

    One that does not keep up is cut off rather than waited for: it comes back with the last id that
    it has got, and reads what it missed from the history.
    """

    __slots__ = ("_max_bytes", "_pieces", "_waiter", "cohort", "end", "queued_bytes")

    def __init__(self, cohort: Cohort, max_queue_bytes: int) -> None:
        self.cohort = cohort
        self.end: End | None = None
        self.queued_bytes = 0
        self._max_bytes = max_queue_bytes
        self._pieces: list[bytes] = []
        self._waiter: asyncio.Future[None] | None = None

    @property
    def has_ended(self) -> bool:
        """Whether the stream is to end."""
        return self.end is not None

    def push(self, data: bytes) -> None:
        """Let something wait for the client, or give the client up."""
        if self.end is not None:
            return
        if self.queued_bytes and self.queued_bytes + len(data) > self._max_bytes:
            self.finish(End.SLOW)
            return
        self._pieces.append(data)
        self.queued_bytes += len(data)
        self._wake()

    def finish(self, end: End) -> None:
        """Let the stream end; what a slow client has not got is dropped."""
        if self.end is None:
            self.end = end
            if end is End.SLOW:
                self._pieces.clear()
                self.queued_bytes = 0
            self._wake()

    def take(self) -> bytes:
        """Return what waits; nothing for nothing."""
        pieces, self._pieces = self._pieces, []
        self.queued_bytes = 0
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def wait(self, seconds: float) -> None:
        """Wait until there is something to take, or to end for, but not longer."""
        if self._pieces or self.end is not None:
            return
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await asyncio.wait([self._waiter], timeout=seconds)
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
