"""Which position may be confirmed: one contiguous watermark.

The delivery contract is kept here. The slot is confirmed up to the end of the last transaction of
which every change has been taken, and of which all before it have too: never the maximum, never
past a transaction in flight, never backwards.

A transaction is opened when its BEGIN arrives, its changes are handed out and taken in any order,
and it is closed when its COMMIT arrives. Between transactions a keepalive's ``wal_end`` counts as
an empty transaction, or the slot of a quiet database would hold back the WAL of its neighbours.
"""

from __future__ import annotations

from collections import deque

from walstream.changes import Transaction
from walstream.lsn import Lsn


class Ticket:
    """A transaction in flight: ``closed`` when all of it has come, ``begun`` when it is delivered.

    ``transaction`` is what its BEGIN said, for who wants to know its age. Only the acknowledger
    looks at the rest.
    """

    __slots__ = ("acknowledger", "begun", "closed", "end_lsn", "handed", "transaction", "untaken")

    def __init__(self, end_lsn: Lsn, acknowledger: Acknowledger | None = None) -> None:
        self.acknowledger = acknowledger
        self.end_lsn = end_lsn
        self.handed = 0
        self.untaken = 0
        self.closed = False
        self.begun = False
        self.transaction: Transaction | None = None


class Acknowledger:
    """Turns "this change was taken" into the position that the next status update reports."""

    def __init__(self, confirmed_flush_lsn: Lsn) -> None:
        """Start at the position that the server has already recorded for the slot."""
        self._flush_lsn = confirmed_flush_lsn
        self._tickets: deque[Ticket] = deque()
        self._beyond = 0

    @property
    def flush_lsn(self) -> Lsn:
        """The watermark: what the next status update may report."""
        return self._flush_lsn

    @property
    def in_flight(self) -> int:
        """How many transactions are open, or have changes that are not taken."""
        return len(self._tickets)

    @property
    def oldest(self) -> Ticket | None:
        """The transaction that the watermark stands before, if it is known."""
        return self._tickets[0] if self._tickets else None

    @property
    def progress(self) -> tuple[Lsn, int]:
        """What moves while changes get through: the watermark, and how much of the oldest is taken.

        A large transaction moves the second one for minutes before it moves the first.
        """
        oldest = self.oldest
        return self._flush_lsn, 0 if oldest is None else oldest.handed - oldest.untaken

    @property
    def is_waiting(self) -> bool:
        """Whether the watermark stands before changes that were handed out and are not taken."""
        oldest = self.oldest
        return oldest is not None and oldest.untaken > 0

    @property
    def beyond(self) -> int:
        """How many changes were handed out of complete transactions beyond the watermark.

        Taken or not, they come again when the process dies now.
        """
        return self._beyond

    def open(self, end_lsn: Lsn) -> Ticket:
        """A transaction begins that will end at ``end_lsn``."""
        ticket = Ticket(end_lsn, self)
        self._tickets.append(ticket)
        return ticket

    def hand(self, ticket: Ticket, count: int = 1) -> None:
        """``count`` changes of the transaction are on their way to handlers and sinks."""
        ticket.handed += count
        ticket.untaken += count

    def take(self, ticket: Ticket, count: int = 1) -> None:
        """``count`` of the changes that were handed out are taken.

        Raises:
            ValueError: more were taken than handed out, which would confirm too much.
        """
        if count > ticket.untaken:
            message = f"{count} changes taken, {ticket.untaken} were in flight"
            raise ValueError(message)
        ticket.untaken -= count
        if ticket.closed and ticket.untaken == 0:
            self._advance()

    def close(self, ticket: Ticket) -> None:
        """The transaction's COMMIT arrived: nothing more will be handed out for it."""
        ticket.closed = True
        self._beyond += ticket.handed
        tickets = self._tickets
        if not ticket.handed and len(tickets) > 1 and tickets[-1] is ticket and tickets[-2].closed:
            # Nothing was handed out for it: it is confirmed with the one before, however many such
            # come while that one is not taken.
            tickets.pop()
            tickets[-1].end_lsn = max(tickets[-1].end_lsn, ticket.end_lsn)
        self._advance()

    def keepalive(self, wal_end: Lsn) -> None:
        """Everything that commits before ``wal_end`` has been received."""
        newest = self._tickets[-1] if self._tickets else None
        if newest is None:
            self._flush_lsn = max(self._flush_lsn, wal_end)
        elif newest.closed:
            newest.end_lsn = max(newest.end_lsn, wal_end)
        # Inside a transaction the server's position says nothing about its commit.

    def _advance(self) -> None:
        tickets = self._tickets
        while tickets and tickets[0].closed and tickets[0].untaken == 0:
            ticket = tickets.popleft()
            self._beyond -= ticket.handed
            self._flush_lsn = max(self._flush_lsn, ticket.end_lsn)
