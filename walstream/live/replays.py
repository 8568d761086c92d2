"""What a client has missed: read from the history until nothing lies between that and live."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import Final

from walstream.changes import Change
from walstream.live.clients import Client
from walstream.live.hub import Hub, Prepared, look_at
from walstream.live.subscriptions import RequestRefused
from walstream.positions import Position
from walstream.values import UnknownLabel

TURN: Final = 100
"""Changes of a replay between two turns of the others in the event loop."""


class Replay:
    """Reads for one client what it missed, until nothing lies between that and live.

    ::

        async for data in replay:   # bytes for the client
            ...
        # the client has joined
    """

    def __init__(self, hub: Hub, client: Client, after: Position) -> None:
        self._hub = hub
        self._client = client
        self._has_renewed = False
        self.position = after

    async def __aiter__(self) -> AsyncIterator[bytes]:
        hub, client = self._hub, self._client
        prepared = await hub.prepare(client.cohort)
        while True:
            if self.position >= hub.position:
                if hub.join(client, prepared):
                    return
                prepared = await hub.prepare(client.cohort)
                continue
            upto = hub.position
            async for piece in self.read(upto):
                yield piece
            self.position = upto

    async def read(self, upto: Position) -> AsyncIterator[bytes]:
        """Read up to a position.

        Raises:
            JournalTrimmed: what is missed is not kept any more.
        """
        hub = self._hub
        async for changes in hub.history.read(self.position, upto):
            frames: list[bytes] = []
            for begin in range(0, len(changes), TURN):
                some = changes[begin : begin + TURN]
                frames += await self._frames(some)
                self.position = Position.of(some[-1])
                await asyncio.sleep(0)
            if frames:
                hub.sent_changes += len(frames)
                yield b"".join(frames)

    async def _frames(self, changes: Sequence[Change]) -> list[bytes]:
        try:
            return self._seen(changes, await self._views(changes), strict=not self._has_renewed)
        except UnknownLabel:  # an enum has got it while no client compared with it
            self._has_renewed = True
            await self._hub.renew_types()
            self._client.cohort.views.clear()  # it need not be one that the hub knows
            return self._seen(changes, await self._views(changes), strict=False)

    async def _views(self, changes: Sequence[Change]) -> Prepared:
        """Compile; what the hub forgets meanwhile is kept here."""
        cohort = self._client.cohort
        layouts = dict.fromkeys(change.layout for change in changes)
        return {layout: await self._hub.views(cohort, layout) for layout in layouts}

    def _seen(self, changes: Sequence[Change], views: Prepared, *, strict: bool) -> list[bytes]:
        encoding = self._client.cohort.encoding
        frames = []
        for change in changes:
            for view in views[change.layout]:
                look = look_at(view, change, strict=strict)
                if look is not None:
                    frames.append(encoding.frame(view.show(change, look)))
                    break
        return frames


async def resolve(since: str, hub: Hub) -> Position | None:
    """Return behind what a client wants changes; None when the history does not reach back so far.

    Args:
        since: the id of a change, an LSN, or a time as ISO 8601 has it.
        hub: with the history.

    Raises:
        RequestRefused: it is none of these.
    """
    try:
        position = Position.parse(since)
    except ValueError:
        instant = _instant(since)
        return await hub.history.position_before(instant)
    return None if position < hub.history.begins else position


def _instant(text: str) -> datetime:
    try:
        # In a query an unescaped + of the zone has become a space.
        instant = datetime.fromisoformat(text.replace(" ", "+") if "T" in text else text)
    except ValueError:
        hint = "the id of a change (0/16274F8:3), an LSN, or a time (2026-11-22T12:00:00Z)"
        raise RequestRefused(400, "since cannot be read", hint=hint) from None
    if instant.tzinfo is None:
        raise RequestRefused(400, "since: a time needs its zone", hint="2026-11-22T12:00:00Z")
    return instant
