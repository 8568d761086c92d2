"""What was published and can be asked for again: in the journal, or in memory for some time."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from itertools import islice
from typing import Final, NamedTuple, Protocol

from walstream.changes import Change, memory_bytes
from walstream.journal import JournalTrimmed
from walstream.lsn import ZERO, Lsn
from walstream.positions import BEGINNING, Position
from walstream.vitals import JournalVitals

PIECE: Final = 500
"""Changes that are read at once."""


class History(Protocol):
    """Keeps changes in their order.

    ``begins``: all that is behind it, up to ``position``, is here. ``covered``: of what the server
    has sent up to there nothing is missing.
    """

    @property
    def begins(self) -> Position:
        """Where it begins."""

    @property
    def position(self) -> Position:
        """Where the last change stands."""

    @property
    def covered(self) -> Lsn:
        """Up to where it is known to be complete."""

    def vitals(self) -> JournalVitals | None:
        """Say how it is; None when it is in memory."""

    async def prepare(self) -> None:
        """Take what is needed, before it is known what is kept."""

    async def open(self, history: str, *, accept_gap: bool = False) -> None:
        """Begin, or go on; what was kept under other rules is forgotten."""

    async def append(self, changes: Sequence[Change]) -> None:
        """Keep changes that stand behind ``position``."""

    async def cover(self, lsn: Lsn) -> None:
        """Note that nothing is missing up to there."""

    async def interrupt(self, at: Lsn) -> None:
        """Begin anew: what is kept is not connected with what comes after this position."""

    async def close(self) -> None:
        """Let go."""

    def read(self, after: Position, upto: Position) -> AsyncIterator[Sequence[Change]]:
        """Read what stands behind the one position, up to the other, in pieces.

        Raises:
            JournalTrimmed: ``after`` is before ``begins``.
        """

    async def position_before(self, time: datetime) -> Position | None:
        """Return a position behind which all stands that was committed then or later.

        None means that what is kept does not go back so far.
        """


class _Kept(NamedTuple):
    position: Position
    change: Change
    size_bytes: int


class Recent:
    """Keeps the last changes in memory, for clients whose connection was cut for a moment."""

    def __init__(self, max_changes: int, max_bytes: int) -> None:
        self._max_changes = max_changes
        self._max_bytes = max_bytes
        self._kept: deque[_Kept] = deque()
        self._size_bytes = 0
        self._history = ""
        self.begins = BEGINNING
        self.position = BEGINNING
        self.covered = ZERO

    def vitals(self) -> None:
        """Say nothing: there is no file."""

    async def prepare(self) -> None:
        """Take nothing: it is memory."""

    async def open(self, history: str, *, accept_gap: bool = False) -> None:
        """Begin, or go on; what was kept under other rules is forgotten."""
        del accept_gap  # nobody asked for it to be kept
        if history != self._history:
            self._forget()
            self._history = history
            self.covered = ZERO

    async def append(self, changes: Sequence[Change]) -> None:
        """Keep changes that stand behind ``position``, and let go of the oldest."""
        for change in changes:
            size = memory_bytes(change)
            self.position = Position.of(change)
            self._kept.append(_Kept(self.position, change, size))
            self._size_bytes += size
        while len(self._kept) > self._max_changes or self._size_bytes > self._max_bytes:
            oldest = self._kept.popleft()
            self._size_bytes -= oldest.size_bytes
            self.begins = oldest.position

    async def cover(self, lsn: Lsn) -> None:
        """Note that nothing is missing up to there."""
        self.covered = max(self.covered, lsn)

    async def interrupt(self, at: Lsn) -> None:
        """Begin anew at a position."""
        self._forget()
        self.begins = self.position = Position.after(at)
        self.covered = at

    async def close(self) -> None:
        """Let go of everything: a process that comes back may have missed something."""
        self._forget()
        self._history = ""
        self.begins = self.position  # who still reads is told

    async def read(self, after: Position, upto: Position) -> AsyncIterator[Sequence[Change]]:
        """Read what stands behind the one position, up to the other, in pieces.

        Raises:
            JournalTrimmed: ``after`` is before ``begins``.
        """
        while True:
            if after < self.begins:
                raise JournalTrimmed(self.begins)
            begin = bisect_right(self._kept, after, key=lambda kept: kept.position)
            some = islice(self._kept, begin, begin + PIECE)
            piece = [kept for kept in some if kept.position <= upto]
            if not piece:
                return
            yield [kept.change for kept in piece]
            after = piece[-1].position

    async def position_before(self, time: datetime) -> Position | None:
        """Return a position behind which all stands that was committed then or later."""
        before = None
        for kept in self._kept:
            if kept.change.commit_time >= time:
                break
            before = kept.position
        return before  # with nothing before it, it is not known what there was at that time

    def _forget(self) -> None:
        self._kept.clear()
        self._size_bytes = 0
