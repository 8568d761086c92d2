"""The sink that routes lead to: keeps changes for those who come back, and publishes them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec

from walstream.changes import Change
from walstream.errors import SinkFailed, Unavailable
from walstream.live.clients import End
from walstream.live.hub import Hub
from walstream.lsn import Lsn
from walstream.positions import Position
from walstream.router import Route


class LiveSink:
    """Takes what its routes keep; of several that keep one change the first one counts.

    What comes again after a lost connection, or after a crash with a journal, is recognised by its
    position, and dropped.
    """

    def __init__(self, name: str, hub: Hub) -> None:
        self.name = name
        self.hub = hub

    async def open(self) -> None:
        """Take the journal's file, before a slot is made for it.

        Only when the stream begins it is known what it goes on from.

        Raises:
            SetupError: the file cannot be had, or row security cannot be asked by the role that is
                to ask.
            Unavailable: it cannot be had now: its disk is full, for example.
        """
        if self.hub.row_security is not None:
            await self.hub.row_security.prepare()
        try:
            await self.hub.history.prepare()
        except SinkFailed as failure:
            raise Unavailable(failure.message, hint=failure.hint) from failure

    async def begin(self, at: Lsn, history: str, *, accept_gap: bool = False) -> None:
        """A session begins.

        Args:
            at: the position of the slot.
            history: see `history_of`.
            accept_gap: forget what the journal has of another slot or cluster.

        Raises:
            SetupError: the journal cannot be used.
        """
        await self.hub.begin(at, history, accept_gap=accept_gap)

    async def take(self, changes: Sequence[Change]) -> None:
        """Keep the changes, and let those who are there have them.

        Raises:
            SinkFailed: they cannot be kept, or the catalog cannot be asked about them.
        """
        history = self.hub.history
        await history.append(_behind(history.position, changes))
        await self.hub.publish(_behind(self.hub.position, changes))

    async def cover(self, lsn: Lsn) -> None:
        """Note, before it is confirmed, that all up to a position is taken."""
        await self.hub.cover(lsn)

    async def close(self) -> None:
        """Let all clients go: they come back with the last id that they have got."""
        self.hub.finish(End.CLOSING)
        self.hub.has_begun = False
        if self.hub.row_security is not None:
            await self.hub.row_security.close()
        await self.hub.history.close()


def history_of(origin: str, routes: Sequence[Route], masking_key: bytes | None) -> str:
    """Say under which rules changes are kept: others must not be mixed with them.

    ``origin`` is slot and cluster, then, behind a blank, the timeline. What was received of a
    timeline that was left behind may never have happened on the new one, and positions mean
    something else there.

    A column that is masked from now on would otherwise be read, as it was, from what is kept.
    """
    rules = [
        (
            str(route.pattern),
            sorted(route.operations),
            route.explicit,
            str(route.where or ""),
            route.leaving,
            route.changed,
            None if route.projection is None else route.projection.rules,
        )
        for route in routes
    ]
    key = hashlib.sha256(masking_key or b"").hexdigest()
    text = msgspec.json.encode((rules, key))
    return f"{origin} {hashlib.sha256(text).hexdigest()}"


def _behind(position: Position, changes: Sequence[Change]) -> Sequence[Change]:
    """Return the changes behind a position, each once."""
    fresh = []
    for change in changes:
        its = Position.of(change)
        if its > position:
            fresh.append(change)
            position = its
    return fresh
