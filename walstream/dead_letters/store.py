"""Where dead letters are kept: what every store promises, and how letters are asked for.

A store is for one slot: several can share a file or a table, and do not see each other's letters.
Two processes use a store at the same time, the daemon that adds and parks, and the command line
that replays and drops. Each method is one transaction of the store.

Letters have the order of the stream, which is not that in which they were stored: after a crash an
earlier change comes again, and may become a letter only then.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import Final, Protocol, TypeAlias

import msgspec

from walstream.dead_letters.letters import DeadLetter, Position
from walstream.errors import ReplayRuns
from walstream.keys import Key

PAGE: Final = 1000
"""How many letters are asked for at a time where all are wanted."""

Place: TypeAlias = tuple[Position, int]
"""A letter's position in the stream and its id: what letters are ordered by."""

Verify: TypeAlias = Callable[[], Awaitable[None]]
"""Raises when something does not hold any more."""


class StoredLetter(msgspec.Struct, frozen=True):
    """A letter with its number, which is never given to another one.

    ``last_failed_at`` is None when it is parked. ``deliveries`` counts how often the change came to
    be stored: more than once after a crash. ``size_bytes`` is known without the payload, too.
    """

    id: int
    letter: DeadLetter
    last_failed_at: datetime | None = None
    deliveries: int = 1
    size_bytes: int = 0

    @property
    def place(self) -> Place:
        """What `LetterQuery.after` takes for the next page."""
        return self.letter.position, self.id


class LetterQuery(msgspec.Struct, frozen=True):
    """Which letters are asked for: those that pass all that is not None.

    Attributes:
        ids: their numbers.
        route: the name of their route.
        table: ``schema.table``: the one that the change came from, or the partitioned one above.
        key_values: one of their keys has one of these values (the second part of a `Key`).
        operation: such as ``update``, or ``message``.
        parked: whether they wait behind another one and were never tried.
        error: is part of their error, in upper or lower case.
        stored_before: they were put here earlier than this.
        stored_after: they were put here at this time or later.
        after: only those behind this place.
        limit: not more than these.
    """

    ids: Sequence[int] | None = None
    route: str | None = None
    table: str | None = None
    key_values: Sequence[bytes] | None = None
    operation: str | None = None
    parked: bool | None = None
    error: str | None = None
    stored_before: datetime | None = None
    stored_after: datetime | None = None
    after: Place | None = None
    limit: int | None = None


class DeadLetterStore(Protocol):
    """Keeps dead letters, durably, within a bound.

    Every method raises `DeadLetterStoreFailed` when the store cannot do it; then nothing was done,
    or it is not known whether it was, and it can be asked for again: nothing is stored twice.
    """

    async def open(self, *, create: bool = True) -> None:
        """Make ready; a store that is not there yet is made, or an error without ``create``.

        Raises:
            SetupError: the configuration, or a right in the database, must be changed first.
        """

    async def close(self) -> None:
        """Let go; called once, whatever happened."""

    async def blocked(self) -> list[tuple[str, Key]]:
        """Return route and key of all letters, each pair once."""

    async def add(self, letters: Sequence[DeadLetter]) -> None:
        """Store letters, all or none; they are durable when it returns.

        One whose route and change are here already is not stored twice: when the stored one is
        parked and the new one is not, it becomes one that was tried.

        Raises:
            DeadLettersFull: there is no room for all of them.
        """

    async def park(self, letters: Sequence[DeadLetter], *, together: bool = False) -> list[bool]:
        """Store those, as parked, that another letter holds up; tell of each whether it is here.

        With ``together``, when one of them is here or held up, all are stored.

        What holds a change up is a letter of the same route with a conflicting key, also one of
        this call. It may be a later change's, when an earlier one comes again after a crash: that
        one was delivered already, and is once more before the later one. One whose route and change
        are here already stays.

        Raises:
            DeadLettersFull: there is no room for all that must be stored; none is.
        """

    async def select(self, query: LetterQuery, *, payloads: bool = True) -> list[StoredLetter]:
        """Return letters in the order of the stream.

        Args:
            query: which.
            payloads: with payload and traceback; otherwise these are empty.
        """

    async def count(self, query: LetterQuery) -> int:
        """Count the letters that a query gives."""

    async def size(self) -> tuple[int, int]:
        """Return the number of letters, and of their bytes."""

    async def drop(self, ids: Sequence[int]) -> int:
        """Remove letters, and return how many of them were here."""

    async def settle(self, letters: Sequence[StoredLetter]) -> list[bool]:
        """Remove letters that were delivered, but those whose change has come again meanwhile.

        After a crash of the daemon the changes before it may be delivered once more, and perhaps
        after this one: then it has to be delivered again, and stays here.

        Args:
            letters: as they were read.

        Returns:
            Of each whether it was removed; not when another one has removed it.
        """

    def exclusive(self) -> AbstractAsyncContextManager[Verify]:
        """Keep other processes from replaying letters of the slot, as long as the context lasts.

        It ends with the process, however that ends. What it gives is to be called from time to time
        and raises DeadLetterStoreFailed when others are kept out no more.

        Raises:
            ReplayRuns: another process replays now.
        """

    async def failed_again(
        self, letter_id: int, *, attempts: int, error: str, traceback: str, at: datetime
    ) -> bool:
        """Note that a replay failed too; the letter is no longer parked.

        Args:
            letter_id: its number.
            attempts: of all tries.
            error: as in `DeadLetter`.
            traceback: as in `DeadLetter`.
            at: when.

        Returns:
            Whether the letter is still here.
        """


async def pages(store: DeadLetterStore, query: LetterQuery) -> AsyncIterator[StoredLetter]:
    """Give letters without their payloads; however many there are, the store is not held up."""
    rest = query.limit
    while rest is None or rest > 0:
        limit = PAGE if rest is None else min(rest, PAGE)
        page = await store.select(msgspec.structs.replace(query, limit=limit), payloads=False)
        for stored in page:
            yield stored
        if len(page) < limit:
            return
        rest = None if rest is None else rest - limit
        query = msgspec.structs.replace(query, after=page[-1].place)


def replay_runs(slot: str) -> ReplayRuns:
    """Say that another process replays."""
    message = f"another process replays the dead letters of the slot {slot}"
    return ReplayRuns(message, hint="wait until it has ended, then try again")
