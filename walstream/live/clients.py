"""One client: what it asked for, what it is owed, and why it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Sequence
from enum import StrEnum
from typing import NamedTuple, Protocol

from walstream.access.readers import Reader
from walstream.changes import Layout
from walstream.live.encodings import Encoding
from walstream.live.subscriptions import Subscription
from walstream.live.views import View
from walstream.positions import BEGINNING, Position


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


class Outflow(Protocol):
    """The way to one client; `walstream.gateway.streams.Stream` is one."""

    @property
    def waiting_bytes(self) -> int:
        """What has been written and the client has not fetched."""

    def write(self, piece: bytes) -> None:
        """Send a piece, soon and in order."""

    @property
    def is_behind(self) -> bool:
        """Whether much waits that the client could have: it is not the client that is slow."""

    async def moved(self) -> None:
        """Wait until some of that has been sent, or the client is slow, or gone."""

    def drop(self) -> None:
        """Forget what has not been sent."""

    async def room(self) -> None:
        """Wait until the client has fetched nearly all."""


class Joined(NamedTuple):
    """When a client joined: at which position, and what its cohort's sieve had held by then."""

    position: Position = BEGINNING
    held: int = 0


class Client:
    """One client, and how much may wait for it.

    One that does not keep up is cut off rather than waited for: it comes back with the last id that
    it has got, and reads what it missed from the history.
    """

    __slots__ = (
        "_ended",
        "_last_bytes",
        "_max_bytes",
        "cohort",
        "end",
        "has_missed",
        "joined",
        "outflow",
    )

    def __init__(self, cohort: Cohort, outflow: Outflow, max_queue_bytes: int) -> None:
        self.cohort = cohort
        self.outflow = outflow
        self.end: End | None = None
        self.has_missed = False
        """Whether something was not sent, since it came after the end."""
        self.joined = Joined()
        self._max_bytes = max_queue_bytes
        self._last_bytes = 0
        self._ended: asyncio.Future[None] | None = None

    def has_ended(self) -> bool:
        """Whether the stream is to end."""
        return self.end is not None

    def push(self, data: bytes) -> None:
        """Send something, or give the client up."""
        if self.end is not None:
            self.has_missed = True
            return
        # The last piece does not count: a row larger than the bound is no slowness.
        if self.outflow.waiting_bytes - self._last_bytes > self._max_bytes:
            self.has_missed = True
            self.finish(End.SLOW)
        else:
            self.outflow.write(data)
            self._last_bytes = len(data)

    def finish(self, end: End) -> None:
        """Let the stream end; what a slow client has not fetched is dropped."""
        if self.end is not None:
            return
        self.end = end
        if end is End.SLOW:
            self.outflow.drop()
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    async def wait(self, seconds: float) -> None:
        """Wait until the stream is to end, but not longer."""
        if self.end is not None:
            return
        self._ended = asyncio.get_running_loop().create_future()
        await asyncio.wait([self._ended], timeout=seconds)
