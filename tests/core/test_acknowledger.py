"""The watermark: one contiguous position, never past what is not taken."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from walstream.acknowledger import Acknowledger, Ticket
from walstream.lsn import Lsn


def test_a_transaction_without_changes_is_confirmed_at_its_end() -> None:
    """DDL and filtered transactions arrive empty, and must not hold back the slot."""
    acknowledger = Acknowledger(Lsn(100))
    ticket = acknowledger.open(Lsn(200))
    assert acknowledger.flush_lsn == 100
    acknowledger.close(ticket)
    assert acknowledger.flush_lsn == 200
    assert acknowledger.in_flight == 0


def test_the_watermark_waits_for_the_oldest_transaction() -> None:
    """A later transaction that is taken first does not move it."""
    acknowledger = Acknowledger(Lsn(100))
    older, newer = acknowledger.open(Lsn(200)), acknowledger.open(Lsn(300))
    for ticket in (older, newer):
        acknowledger.hand(ticket, 2)
        acknowledger.close(ticket)
    acknowledger.take(newer, 2)
    acknowledger.take(older)
    assert acknowledger.flush_lsn == 100
    acknowledger.take(older)
    assert acknowledger.flush_lsn == 300


def test_a_keepalive_moves_an_idle_watermark() -> None:
    """The slot of a quiet database must not hold back its neighbours' WAL."""
    acknowledger = Acknowledger(Lsn(100))
    acknowledger.keepalive(Lsn(500))
    assert acknowledger.flush_lsn == 500


def test_a_keepalive_inside_a_transaction_means_nothing() -> None:
    """Its position can lie behind the commit that is still to come."""
    acknowledger = Acknowledger(Lsn(100))
    ticket = acknowledger.open(Lsn(200))
    acknowledger.keepalive(Lsn(500))
    acknowledger.close(ticket)
    assert acknowledger.flush_lsn == 200


def test_a_keepalive_behind_a_transaction_in_flight_counts_once_that_is_taken() -> None:
    """Until then it is never confirmed."""
    acknowledger = Acknowledger(Lsn(100))
    ticket = acknowledger.open(Lsn(200))
    acknowledger.hand(ticket)
    acknowledger.close(ticket)
    acknowledger.keepalive(Lsn(500))
    acknowledger.keepalive(Lsn(600))
    assert (acknowledger.flush_lsn, acknowledger.in_flight) == (100, 1)
    acknowledger.take(ticket)
    assert (acknowledger.flush_lsn, acknowledger.in_flight) == (600, 0)


def test_transactions_of_which_nothing_is_wanted_take_no_room_behind_one_that_waits() -> None:
    acknowledger = Acknowledger(Lsn(100))
    ticket = acknowledger.open(Lsn(200))
    acknowledger.hand(ticket)
    acknowledger.close(ticket)
    for end in range(300, 1300):
        acknowledger.close(acknowledger.open(Lsn(end)))
    assert (acknowledger.flush_lsn, acknowledger.in_flight, acknowledger.beyond) == (100, 1, 1)
    acknowledger.take(ticket)
    assert acknowledger.flush_lsn == 1299


def test_the_watermark_never_goes_backwards() -> None:
    """Not even when the server repeats an old position."""
    acknowledger = Acknowledger(Lsn(100))
    acknowledger.keepalive(Lsn(50))
    acknowledger.close(acknowledger.open(Lsn(60)))
    assert acknowledger.flush_lsn == 100


def test_taking_more_than_was_handed_out_is_refused() -> None:
    """It would confirm too much."""
    acknowledger = Acknowledger(Lsn(0))
    ticket = acknowledger.open(Lsn(10))
    acknowledger.hand(ticket)
    with pytest.raises(ValueError, match="2 changes taken, 1 were in flight"):
        acknowledger.take(ticket, 2)


class Transactions(RuleBasedStateMachine):
    """Transactions whose changes are taken in any order, beside a model that remembers all."""

    def __init__(self) -> None:
        super().__init__()
        self.acknowledger = Acknowledger(Lsn(1))
        self.position = 1
        self.untaken: list[tuple[Lsn, Ticket]] = []
        self.open: Ticket | None = None

    @rule(size=st.integers(1, 100))
    @precondition(lambda self: self.open is None)
    def begin(self, size: int) -> None:
        """A transaction starts to arrive."""
        self.position += size
        self.open = self.acknowledger.open(Lsn(self.position))

    @rule(count=st.integers(1, 3))
    @precondition(lambda self: self.open is not None)
    def hand(self, count: int) -> None:
        """Some of its changes are handed out."""
        assert self.open is not None
        self.acknowledger.hand(self.open, count)
        self.untaken += [(Lsn(self.position), self.open)] * count

    @rule()
    @precondition(lambda self: self.open is not None)
    def commit(self) -> None:
        """It has arrived."""
        assert self.open is not None
        self.acknowledger.close(self.open)
        self.open = None

    @rule(data=st.data())
    @precondition(lambda self: self.untaken)
    def take(self, data: st.DataObject) -> None:
        """Any change that is in flight is taken."""
        index = data.draw(st.integers(0, len(self.untaken) - 1))
        _, ticket = self.untaken.pop(index)
        self.acknowledger.take(ticket)

    @rule(size=st.integers(0, 100))
    def keepalive(self, size: int) -> None:
        """The server tells its position, also inside a transaction."""
        if self.open is None:
            self.position += size
            self.acknowledger.keepalive(Lsn(self.position))
        else:
            self.acknowledger.keepalive(Lsn(self.position + size))

    @invariant()
    def never_passes_an_untaken_change(self) -> None:
        """The contract."""
        waiting = [end for end, _ in self.untaken]
        if self.open is not None:
            waiting.append(self.open.end_lsn)
        if waiting:
            assert self.acknowledger.flush_lsn < min(waiting)
        else:
            assert self.acknowledger.flush_lsn == self.position
            assert self.acknowledger.in_flight == 0


TestTransactions = Transactions.TestCase
