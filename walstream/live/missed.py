"""What a client has missed: read from the history until nothing lies between that and live."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Hashable, Sequence
from datetime import datetime
from typing import Final

from walstream.changes import Change
from walstream.journal import JournalTrimmed
from walstream.live.clients import Client
from walstream.live.compiled import Prepared
from walstream.live.encodings import Sighting
from walstream.live.hub import SLICE_BYTES, Hub, look_at
from walstream.live.sieves import Doubt, Held
from walstream.live.subscriptions import RequestRefused
from walstream.live.turns import SLICE_SECONDS
from walstream.live.views import Look
from walstream.positions import Position
from walstream.values import UnknownLabel

HELD_BYTES: Final = 1 << 10
"""What something counts for that the server decides about, before it is known how long it is."""

MAX_QUOTED: Final = 40
"""So many characters of what cannot be read are quoted."""

_ALLOWED: Final = (
    "the id of a change (0/16274F8:3), an LSN, a time (2026-11-22T12:00:00Z),"
    ' or "beginning" for all that is kept'
)


class Missed:
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
        beginnings = hub.beginnings
        prepared = await hub.compiled.prepare(client.cohort)
        while not client.has_ended():  # who has ended is not told that it has got all
            if hub.beginnings != beginnings:  # what was read is not connected with what comes
                raise JournalTrimmed(hub.history.begins)
            if self.position >= hub.position:
                if hub.join(client, prepared):
                    return
                prepared = await hub.compiled.prepare(client.cohort)
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
            views = await self._views(changes)
            done = 0
            while done < len(changes):
                # All who replay together take no more of the event loop than one.
                await hub.turns.begin()
                began = time.perf_counter()
                done, is_known, seen = self._seen(changes, done, views)
                hub.turns.end(began)
                frames = await self._sifted(seen)
                if done:
                    self.position = Position.of(changes[done - 1])
                if frames:
                    hub.sent_changes += len(frames)
                    yield b"".join(frames)
                if not is_known:  # an enum has got a label while no client compared with it
                    self._has_renewed = True
                    await hub.compiled.renew_types()
                    self._client.cohort.views.clear()  # it need not be one that the hub knows
                    views = await self._views(changes)

    async def _views(self, changes: Sequence[Change]) -> Prepared:
        """Compile; what the hub forgets meanwhile is kept here."""
        cohort = self._client.cohort
        layouts = dict.fromkeys(change.layout for change in changes)
        return {layout: await self._hub.compiled.views(cohort, layout) for layout in layouts}

    def _seen(
        self, changes: Sequence[Change], begin: int, views: Prepared
    ) -> tuple[int, bool, list[bytes | Held]]:
        """Go on for a few milliseconds, or until there is a piece.

        Returns how far it came, whether labels are known, and what the client sees.
        """
        deadline = time.perf_counter() + SLICE_SECONDS
        frames: list[bytes | Held] = []
        done, size = begin, 0
        try:
            while done < len(changes) and size < SLICE_BYTES:
                frame = self._frame(changes[done], views)
                done += 1
                if frame is not None:
                    frames.append(frame)
                    size += len(frame) if isinstance(frame, bytes) else HELD_BYTES
                if time.perf_counter() > deadline:
                    break
        except UnknownLabel:
            return done, False, frames
        return done, True, frames

    async def _sifted(self, seen: Sequence[bytes | Held]) -> list[bytes]:
        """Return what is sent of what is seen: of some of it the server decides."""
        held = [one for one in seen if isinstance(one, Held)]
        if not held:
            return [one for one in seen if isinstance(one, bytes)]
        frames = iter(await self._hub.judge.frames(held, self._client.cohort.encoding))
        sent = [next(frames) if isinstance(one, Held) else one for one in seen]
        return [frame for frame in sent if frame is not None]

    def _frame(self, change: Change, views: Prepared) -> bytes | Held | None:
        encoding = self._client.cohort.encoding
        bodies: dict[Hashable, bytes] = {}
        sightings: list[Sighting] = []
        doubts: list[Doubt] = []
        for view in views[change.layout]:
            look = look_at(view, change, strict=not self._has_renewed)
            if look is None:
                continue
            key = (view.shape, look)
            if key not in bodies:
                bodies[key] = encoding.form.write(view, change, look)
            sighting = (view.rank, bodies[key])
            if view.is_secured and look is not Look.BY_KEY:
                doubts.append((view.sight, sighting))
            else:
                sightings.append(sighting)
        if doubts:
            return Held(change, sightings, doubts)
        return encoding.address(sightings) if sightings else None


async def resolve(since: str, hub: Hub) -> Position | None:
    """Return behind what a client wants changes; None when the history does not reach back so far.

    Args:
        since: the id of a change, an LSN, a time as ISO 8601 has it, or ``beginning``.
        hub: with the history.

    Raises:
        RequestRefused: it is none of these.
    """
    if since == "beginning":
        return hub.history.begins
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
        message = f"since cannot be read: found {text[:MAX_QUOTED]!r}"
        raise RequestRefused(400, message, hint=_ALLOWED) from None
    if instant.tzinfo is None:
        raise RequestRefused(400, "since: a time needs its zone", hint="2026-11-22T12:00:00Z")
    return instant
