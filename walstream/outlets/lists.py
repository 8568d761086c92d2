"""Destinations that take lists: sinks, handlers of batches, handlers of whole transactions."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

from walstream.acknowledger import Ticket
from walstream.calls import Caller
from walstream.destinations import Handler
from walstream.errors import TransactionTooLarge
from walstream.flow import Handed
from walstream.outlets.admission import TransactionAdmission
from walstream.outlets.outlet import Outlet
from walstream.outlets.services import Services

MAX_SINK_BATCH: Final = 1000
"""Changes that a sink gets at once."""


class UnitOutlet(Outlet):
    """A sink, a handler of lists, or one whose calls need more than its function."""

    async def _work(self) -> None:
        slot = self.in_hand.slots[0]
        limit = self._limit
        while await self._more():
            if self._options.batch and not self._has_batch:
                await self._linger()
            unit = self._next(limit)
            if unit:
                await self._attempts.deliver(unit, slot)

    @property
    def _limit(self) -> int:
        if isinstance(self.destination, Handler):
            return self._options.batch or 1
        return getattr(self.destination, "max_changes", MAX_SINK_BATCH)


class TransactionOutlet(Outlet):
    """A handler that takes whole transactions.

    What is collected of a transaction that has not come completely is not counted as in flight: the
    reader would wait for room that only the rest of the transaction makes. It has its own bound.
    """

    _admission_kind = TransactionAdmission

    def __init__(self, destination: Handler, caller: Caller, services: Services) -> None:
        super().__init__(destination, caller, services)
        self._collected: list[Handed] = []
        self._collected_bytes = 0
        self._refused: Ticket | None = None
        self._units: deque[tuple[list[Handed], bool]] = deque()

    @property
    def waiting(self) -> int:
        """How many changes wait for a call."""
        return len(self._collected) + sum(len(unit) for unit, _ in self._units)

    def attach(self) -> None:
        """Forget what the last session has left: it comes again."""
        super().attach()
        self._collected = []
        self._collected_bytes = 0
        self._refused = None
        self._units.clear()

    def add(self, handed: Sequence[Handed]) -> None:
        """Collect changes until their transaction is complete, or too large."""
        if self._has_let_go:
            return
        for entry in handed:
            ticket = entry[2]
            if self._collected and self._collected[0][2] is not ticket:
                self._complete()
            if ticket is self._refused:
                self._refuse_too(entry)
                continue
            self._collected.append(entry)
            self._collected_bytes += entry[3]
            if self._is_too_large:
                self._refused = ticket
                self._complete(is_refused=True)
        if self._collected and self._collected[0][2].closed:
            self._complete()
        self.wake()

    @property
    def _is_too_large(self) -> bool:
        return (
            len(self._collected) > self._options.max_transaction_changes
            or self._collected_bytes > self._flow.max_bytes
        )

    def _complete(self, *, is_refused: bool = False) -> None:
        unit, self._collected, self._collected_bytes = self._collected, [], 0
        self._let_wait(unit, is_refused=is_refused)

    def _let_wait(self, unit: list[Handed], *, is_refused: bool) -> None:
        self._share.add(unit)
        self._units.append((unit, is_refused))

    def _refuse_too(self, entry: Handed) -> None:
        """Refuse what still comes of a transaction that is too large."""
        if self._units and self._units[-1][0][0][2] is entry[2]:
            self._share.add([entry])
            self._units[-1][0].append(entry)
        else:
            self._let_wait([entry], is_refused=True)

    async def _work(self) -> None:
        slot = self.in_hand.slots[0]
        while await self._more():
            unit, is_refused = self._units.popleft()
            if not self._share.may_begin(unit[0][2]):
                for entry in unit:
                    self._share.drop(entry)
            elif is_refused:
                await self._refuse(unit)
            else:
                await self._attempts.deliver(unit, slot)

    @property
    def _is_waiting(self) -> bool:
        return bool(self._units)

    def _let_go(self) -> None:
        super()._let_go()
        self._collected = []
        self._units.clear()

    async def _refuse(self, unit: list[Handed]) -> None:
        error = TransactionTooLarge(
            f"{self.name}: a transaction has more than"
            f" {self._options.max_transaction_changes} changes, or {self._flow.max_bytes} bytes",
            hint="raise max_transaction_changes or stream.max_in_flight_bytes, take batches"
            " instead of transactions, or narrow the route",
        )
        await self._failures.put_aside(unit, error, 1)
