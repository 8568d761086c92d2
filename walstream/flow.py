"""What is in flight between the reader and the destinations, and whether to go on.

The reader waits for room before it reads on: that is what bounds memory when a destination is slow,
and how far the others get ahead of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from enum import IntEnum
from typing import Any, TypeAlias

from walstream.acknowledger import Acknowledger, Ticket
from walstream.destinations import Item
from walstream.lsn import ZERO
from walstream.router import MessageRoute, Route

Handed: TypeAlias = tuple[Route | MessageRoute, Item, Ticket, int]
"""A change on its way to the destination of a route, the transaction to take it from, its bytes."""


class Halt(IntEnum):
    """How much is still begun: everything, the rest of begun transactions, or no further call."""

    GOING = 0
    FINISH_BEGUN = 1
    FINISH_CALLS = 2


class Flow:
    """Counts what is in flight, and tells the acknowledger what is taken."""

    def __init__(self, max_changes: int, max_bytes: int) -> None:
        self._max_changes = max_changes
        self._max_bytes = max_bytes
        self._acknowledger = Acknowledger(ZERO)
        self._room = asyncio.Event()
        self._halted = asyncio.Event()
        self.halt = Halt.GOING
        self.is_closed = False
        self.changes = 0
        self.size_bytes = 0

    def attach(self, acknowledger: Acknowledger) -> None:
        """Begin a session: nothing is in flight."""
        self._acknowledger = acknowledger
        self._room = asyncio.Event()
        self._halted = asyncio.Event()
        self.halt = Halt.GOING
        self.is_closed = False
        self.changes = self.size_bytes = 0

    def add(self, count: int, size_bytes: int) -> None:
        """So many changes are on their way."""
        self.changes += count
        self.size_bytes += size_bytes

    def take(self, ticket: Ticket, count: int, size_bytes: int) -> None:
        """So many changes of a transaction are taken."""
        if not self.is_current(ticket):
            return
        self._acknowledger.take(ticket, count)
        self._remove(count, size_bytes)

    def is_current(self, ticket: Ticket) -> bool:
        """Whether a transaction is of this session; one of an earlier session comes again."""
        return ticket.acknowledger in (None, self._acknowledger)

    @property
    def is_full(self) -> bool:
        """Whether the reader has to wait."""
        return (
            self.changes >= self._max_changes
            or self.size_bytes >= self._max_bytes
            # What is taken, and stands behind what is not, comes again after a crash.
            or (self.halt is Halt.GOING and self._acknowledger.beyond >= self._max_changes)
        )

    @property
    def max_bytes(self) -> int:
        """How many bytes of records may be in flight."""
        return self._max_bytes

    def wait_for_change(self) -> Coroutine[Any, Any, object]:
        """Wait until less is in flight than at this call, or until all is halted.

        What happens between the call and the await is noticed too.
        """
        self._room.clear()
        return self._room.wait()

    def may_begin(self, ticket: Ticket) -> bool:
        """Whether a change of this transaction may be given to its destination."""
        if self.halt is Halt.GOING:
            ticket.begun = True
            return True
        return self.halt is Halt.FINISH_BEGUN and ticket.begun

    def drop(self, count: int, size_bytes: int) -> None:
        """So many changes are not begun any more; they come again."""
        self._remove(count, size_bytes)

    def begin_no_more(self, halt: Halt) -> None:
        """Halt, or halt harder."""
        self.halt = max(self.halt, halt)
        self._halted.set()
        self._room.set()

    def _remove(self, count: int, size_bytes: int) -> None:
        self.changes -= count
        self.size_bytes -= size_bytes
        if not self._room.is_set():
            self._room.set()

    async def pause(self, seconds: float) -> bool:
        """Let time pass; return False when it was cut short because all is halted."""
        try:
            async with asyncio.timeout(seconds):
                await self._halted.wait()
        except TimeoutError:
            return True
        return False
