"""Changes that wait for the server to say who may see them, while others go on.

A cohort some of whose tables are under row security gets all that it sees through its sieve: in
order, whatever of it is to be asked about. The stream does not wait for sieves. What waits is
bounded, and clients whose sieve is full are cut off as slow: they come back with the last id that
they have got, and read what they missed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Final, Protocol, TypeAlias

import msgspec

from walstream.access.readers import Sight
from walstream.changes import Change, Layout
from walstream.live.clients import Client, Cohort, End
from walstream.live.encodings import Encoding, Sighting
from walstream.positions import BEGINNING, Position
from walstream.vitals import RowSecurityVitals

MAX_WAITING: Final = 10_000
"""So many changes may wait for a cohort."""

MAX_WAITING_BYTES: Final = 64 << 20
"""So much those may take; what waits for several cohorts is mostly the same."""

MAX_WAITING_TOGETHER: Final = 200_000
"""So many may wait for all."""

BATCH: Final = 500

Doubt: TypeAlias = tuple[Sight, Sighting]
"""What is seen if the server shows the row to whom the sight is for."""


class RowSecurity(Protocol):
    """Says what the server's row security shows (`walstream.access.row_security`)."""

    async def prepare(self) -> None:
        """See that it can be asked.

        Raises:
            WalstreamError: it cannot.
        """

    async def visible(
        self, sight: Sight, changes: Sequence[Change], masked: frozenset[str]
    ) -> list[bool]:
        """Say of each of some changes of one layout whether its new row is shown."""

    def vitals(self) -> RowSecurityVitals:
        """Say what was asked."""

    async def close(self) -> None:
        """Stop asking."""


Masks: TypeAlias = Callable[[Layout], frozenset[str]]
"""Says which columns of a layout come here in another form than they have in the table."""


class Held(msgspec.Struct, frozen=True, eq=False):
    """What a cohort sees of a change, and what it sees only if it is shown.

    ``size_bytes`` is about what the change takes in memory.
    """

    change: Change
    sightings: Sequence[Sighting]
    doubts: Sequence[Doubt]
    size_bytes: int = 0


class Judge:
    """Turns what is held into what is sent."""

    def __init__(self, row_security: RowSecurity | None, masks: Masks) -> None:
        self._row_security = row_security
        self._masks = masks

    async def frames(self, held: Iterable[Held], encoding: Encoding) -> list[bytes | None]:
        """Write each for its cohort; None of what is not seen at all."""
        held = list(held)
        shown = await self._shown(held)
        return [_frame(one, encoding, shown) for one in held]

    async def _shown(self, held: Sequence[Held]) -> _Shown:
        """Ask about all at once, table by table."""
        asked: dict[tuple[Sight, Layout], dict[Change, None]] = {}
        for one in held:
            for sight, _ in one.doubts:
                asked.setdefault((sight, one.change.layout), {})[one.change] = None
        if not asked or self._row_security is None:  # nobody says so: it is not shown
            return frozenset()
        answers = await asyncio.gather(
            *(
                self._row_security.visible(sight, list(changes), self._masks(layout))
                for (sight, layout), changes in asked.items()
            )
        )
        return frozenset(
            (sight, change)
            for ((sight, _), changes), verdicts in zip(asked.items(), answers, strict=True)
            for change, is_shown in zip(changes, verdicts, strict=True)
            if is_shown
        )


_Shown: TypeAlias = frozenset[tuple[Sight, Change]]


def _frame(held: Held, encoding: Encoding, shown: _Shown) -> bytes | None:
    sightings = list(held.sightings)
    sightings += [sighting for sight, sighting in held.doubts if (sight, held.change) in shown]
    return encoding.address(sightings) if sightings else None


class Backlog:
    """What waits in all sieves together, and what they have sent."""

    __slots__ = ("sent_changes", "waiting")

    def __init__(self) -> None:
        self.waiting = 0
        self.sent_changes = 0


class Sieve:
    """Holds what a cohort sees until it is known that it may."""

    def __init__(self, cohort: Cohort, judge: Judge, backlog: Backlog) -> None:
        self.added = 0
        """How much has been held so far."""
        self._cohort = cohort
        self._judge = judge
        self._backlog = backlog
        self._waiting: deque[Held] = deque()
        self._waiting_bytes = 0
        self._position = BEGINNING
        self._task: asyncio.Task[None] | None = None

    def add(self, held: Held, behind: Position) -> None:
        """Let something wait; ``behind`` is the position before it."""
        backlog = self._backlog
        if self._is_full or backlog.waiting >= MAX_WAITING_TOGETHER:
            self._give_up()
            return
        if not self._waiting:
            self._position = behind
        self._waiting.append(held)
        self._waiting_bytes += held.size_bytes
        self.added += 1
        backlog.waiting += 1
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="sieve")

    @property
    def _is_full(self) -> bool:
        return len(self._waiting) >= MAX_WAITING or self._waiting_bytes >= MAX_WAITING_BYTES

    def reached(self, client: Client) -> Position | None:
        """Return up to where a client has got all; None when nothing waits."""
        if not self._waiting:
            return None
        done = self.added - len(self._waiting)
        return self._position if done > client.joined.held else client.joined.position

    def clear(self) -> None:
        """Forget what waits."""
        self._backlog.waiting -= len(self._waiting)
        self._waiting.clear()
        self._waiting_bytes = 0

    def close(self) -> None:
        """Stop: nobody is there any more."""
        self.clear()
        if self._task is not None:
            self._task.cancel()

    def _give_up(self) -> None:
        """Cut off all who wait; they come back."""
        for client in self._cohort.clients:
            client.has_missed = True
            client.finish(End.SLOW)
        self.clear()

    async def _run(self) -> None:
        try:
            while self._waiting:
                batch = list(islice(self._waiting, BATCH))
                frames = await self._judge.frames(batch, self._cohort.encoding)
                if self._waiting and self._waiting[0] is batch[0]:  # it was not forgotten
                    await self._send(batch, frames)
        finally:
            self._task = None

    async def _send(self, batch: Sequence[Held], frames: Sequence[bytes | None]) -> None:
        first = self.added - len(self._waiting)
        clients = list(self._cohort.clients)
        for client in clients:
            self._push(client, frames[max(0, client.joined.held - first) :])
        for one in batch:
            self._waiting.popleft()
            self._waiting_bytes -= one.size_bytes
        self._backlog.waiting -= len(batch)
        self._position = Position.of(batch[-1].change)
        for client in clients:  # nobody is cut off because we ask faster than we send
            while client.outflow.is_behind and not client.has_ended():
                await client.outflow.moved()

    def _push(self, client: Client, frames: Sequence[bytes | None]) -> None:
        pieces = [frame for frame in frames if frame is not None]
        if pieces:
            self._backlog.sent_changes += len(pieces)
            client.push(b"".join(pieces))
