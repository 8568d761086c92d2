"""What one outlet has of what is in flight, and what became of it.

Here alone changes are taken; see the contract in `walstream.outlets`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

import msgspec

from walstream.acknowledger import Ticket
from walstream.flow import Flow, Handed
from walstream.lsn import Lsn
from walstream.outlets.together import is_told_to_end


class OutletCounts(msgspec.Struct):
    """What became of the changes that were handed to one destination.

    ``delivered`` were taken by it; of these ``redelivered`` were recognised as done before.
    ``skipped`` were given up, ``dead_lettered`` and ``parked`` are in the dead-letter store.
    ``retries`` counts calls after the first.
    """

    delivered: int = 0
    retries: int = 0
    skipped: int = 0
    dead_lettered: int = 0
    parked: int = 0
    redelivered: int = 0

    def __add__(self, other: OutletCounts) -> OutletCounts:
        """Count together."""
        mine, others = msgspec.structs.astuple(self), msgspec.structs.astuple(other)
        return OutletCounts(*map(sum, zip(mine, others, strict=True)))


class Share:
    """Of the `Flow`, what was handed to one outlet and is not taken."""

    def __init__(self, flow: Flow) -> None:
        self.counts = OutletCounts()
        self.in_flight = 0
        self._flow = flow
        self._in_flight_bytes = 0
        self._dropped_from: Lsn | None = None

    def attach(self) -> None:
        """Begin a session: nothing is in flight."""
        self.in_flight = self._in_flight_bytes = 0
        self._dropped_from = None

    def add(self, handed: Sequence[Handed]) -> None:
        """Changes were handed over."""
        size_bytes = sum([its_bytes for _, _, _, its_bytes in handed])
        self.in_flight += len(handed)
        self._in_flight_bytes += size_bytes
        self._flow.add(len(handed), size_bytes)

    def may_begin(self, ticket: Ticket) -> bool:
        """Whether a change of this transaction may be given to the destination.

        Of what comes after one that may not, nothing may: another destination, or another lane, may
        have begun a later transaction, and commit order would be lost.
        """
        dropped = self._dropped_from
        if (dropped is None or ticket.end_lsn < dropped) and self._flow.may_begin(ticket):
            return True
        self._dropped_from = ticket.end_lsn if dropped is None else min(dropped, ticket.end_lsn)
        return False

    def drop(self, entry: Handed) -> None:
        """Do not begin a change any more; it comes again."""
        self.in_flight -= 1
        self._in_flight_bytes -= entry[3]
        self._flow.drop(1, entry[3])

    def drop_all(self) -> None:
        """Do not begin anything any more; it comes again."""
        self._flow.drop(self.in_flight, self._in_flight_bytes)
        self.in_flight = self._in_flight_bytes = 0

    def delivered(self, unit: Sequence[Handed]) -> None:
        """Changes were delivered, and are taken.

        Raises:
            asyncio.CancelledError: the task is to end, and the handler has swallowed that.
        """
        self.counts.delivered += len(unit)
        self.take(unit)
        if is_told_to_end():
            raise asyncio.CancelledError

    def take(self, unit: Iterable[Handed]) -> None:
        """Tell that changes are taken, with one call for each transaction."""
        current: Ticket | None = None
        count = size_bytes = 0
        for _, _, ticket, its_bytes in unit:
            if ticket is not current:
                if current is not None:
                    self.took(current, count, size_bytes)
                current, count, size_bytes = ticket, 0, 0
            count += 1
            size_bytes += its_bytes
        if current is not None:
            self.took(current, count, size_bytes)

    def took(self, ticket: Ticket, count: int, size_bytes: int) -> None:
        """So many changes of a transaction are taken."""
        if not self._flow.is_current(ticket):
            return
        self.in_flight -= count
        self._in_flight_bytes -= size_bytes
        self._flow.take(ticket, count, size_bytes)
