"""The way to one destination: what waits for it, who calls it, and what is done when it fails.

Every destination has its own outlet, so that one that is slow or fails holds up no other until too
much is in flight. The contract: a change is taken only after the handler has returned, or the sink
has made it durable, or the dead-letter store has it, or its route says that it may be skipped.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final

import msgspec
import structlog

from walstream.acknowledger import Ticket
from walstream.calls import Caller, NotRun, Slot, ThreadCaller, verify_finished
from walstream.changes import Change, Message
from walstream.destinations import Destination, Handler, HandlerOptions, Item
from walstream.errors import (
    DeliveryError,
    HandlerFailed,
    OutputClosed,
    RowInvalid,
    SetupError,
    SinkFailed,
    TransactionTooLarge,
    Unavailable,
    WalstreamError,
)
from walstream.flow import Flow, Halt, Handed
from walstream.keys import Key, keys_of
from walstream.lanes import Entry, Lanes
from walstream.parking import Parking
from walstream.policy import FailurePolicy, OnFailure

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.delivery")

MAX_SYNC_RUN: Final = 100
"""Changes that a sync handler gets in one visit to its thread; in between the loop takes stock."""

MAX_SINK_BATCH: Final = 1000
"""Changes that a sink gets at once."""

_NEVER_AGAIN: Final = (NotRun, OutputClosed, SetupError)
"""No attempt and no other change would fare better: whatever the policy, the stream stops."""

_SAME_AGAIN: Final = (RowInvalid, TransactionTooLarge)
"""The same change would fail the same way: no further attempt, then the policy."""

_COMES_AGAIN: Final = (
    "the slot was not moved past its transaction, and the change comes again with the same id"
)


class _CutShort(Exception):
    """All is halted: what is being tried again is not waited for, and comes again."""


class OutletCounts(msgspec.Struct):
    """What became of the changes that were handed to one destination.

    ``delivered`` were taken by it, ``skipped`` were given up, ``dead_lettered`` and ``parked`` are
    in the dead-letter store, ``redelivered`` were recognised as done before. ``retries`` counts
    calls after the first.
    """

    delivered: int = 0
    retries: int = 0
    skipped: int = 0
    dead_lettered: int = 0
    parked: int = 0
    redelivered: int = 0


class Services(msgspec.Struct, frozen=True):
    """What outlets need of others.

    ``wait_until_visible`` takes an xid and returns when other sessions see that transaction.
    ``describe`` names an error without what may be a row's values.
    """

    flow: Flow
    parking: Parking | None
    wait_until_visible: Callable[[int], Awaitable[None]]
    describe: Callable[[BaseException], str]


class Held(msgspec.Struct, frozen=True):
    """What an outlet is waiting for, and since when (monotonic seconds)."""

    destination: str
    item: Item
    since: float
    slot: Slot

    @property
    def change_id(self) -> str:
        """Of the first change of the call."""
        return self.item.id

    @property
    def key(self) -> str:
        """The key of the change, as a table and JSON."""
        return ", ".join(f"{table} {values.decode()}" for table, values in _keys(self.item, None))


class Outlet(ABC):
    """What waits for one destination. Subclasses say what is given to it at once."""

    def __init__(self, destination: Destination, caller: Caller, services: Services) -> None:
        self.destination = destination
        self.caller = caller
        self.counts = OutletCounts()
        self._services = services
        self._flow = services.flow
        self._options = (
            destination.options if isinstance(destination, Handler) else HandlerOptions()
        )
        self._slots = [Slot()]
        self._waiting: deque[Handed] = deque()
        self._news = asyncio.Event()
        self._visible_xid = 0

    @property
    def name(self) -> str:
        """Of the destination."""
        return self.destination.name

    @property
    def held(self) -> Held | None:
        """The call that lasts longest, if there is one."""
        busy = [slot for slot in self._slots if slot.item is not None]
        if not busy:
            return None
        slot = min(busy, key=lambda one: one.since)
        item = slot.item
        return None if item is None else Held(self.name, item, slot.since, slot)

    @property
    def waiting(self) -> int:
        """How many changes wait for a call."""
        return len(self._waiting)

    def attach(self) -> None:
        """Forget what the last session has left: it comes again."""
        self._waiting.clear()
        self._news = asyncio.Event()

    def add(self, handed: Iterable[Handed]) -> None:
        """Let changes wait, in commit order."""
        for entry in handed:
            self._flow.add(entry)
            self._waiting.append(entry)
        self.wake()

    def wake(self) -> None:
        """Something has changed: there is more, or there will be no more."""
        self._news.set()

    async def run(self) -> None:
        """Deliver until the flow is closed and nothing waits.

        Raises:
            DeliveryError: a change was not taken, and its policy is to stop.
        """
        await self.caller.settle()
        for slot in self._slots:
            slot.end()
        with contextlib.suppress(_CutShort):
            await self._work()

    @abstractmethod
    async def _work(self) -> None: ...

    # What waits

    async def _more(self) -> bool:
        """Wait until something waits; return False when nothing will."""
        while not self._waiting:
            if self._flow.is_closed or self._flow.halt is Halt.FINISH_CALLS:
                return False
            self._news.clear()
            await self._news.wait()
        return self._flow.halt is not Halt.FINISH_CALLS

    def _next(self, limit: int) -> list[Handed]:
        """Return what may be begun of the next changes."""
        waiting, may_begin = self._waiting, self._flow.may_begin
        unit: list[Handed] = []
        while waiting and len(unit) < limit:
            entry = waiting.popleft()
            if may_begin(entry[2]):
                unit.append(entry)
            else:
                self._flow.drop(entry)
        return unit

    # What may be called

    async def _admit(self, entry: Handed) -> Item | None:
        """Return what the handler shall get; None when it gets nothing and the change is taken."""
        route, item, _, _ = entry
        options, parking = self._options, self._services.parking
        if parking is not None and parking.is_used:
            keys = _keys(item, options.key)
            if parking.may_block(route.name, keys) and await parking.park(route.name, item, keys):
                self.counts.parked += 1
                self._take([entry])
                return None
        if options.visible:
            await self._wait_until_visible(item)
        if options.model is not None and isinstance(item, Change):
            try:
                return options.model.apply(item)
            except RowInvalid as error:
                await self._put_aside(entry, item, error, 1)
                return None
        return item

    async def _admit_all(self, unit: list[Handed]) -> tuple[list[Handed], list[Item]]:
        if not self._has_conditions:
            return unit, [entry[1] for entry in unit]
        admitted: list[Handed] = []
        items: list[Item] = []
        for entry in unit:
            item = await self._admit(entry)
            if item is not None:
                admitted.append(entry)
                items.append(item)
        return admitted, items

    @property
    def _has_conditions(self) -> bool:
        """Whether `_admit` has anything to do."""
        parking, options = self._services.parking, self._options
        return (
            (parking is not None and parking.is_used)
            or options.visible
            or options.model is not None
        )

    async def _wait_until_visible(self, item: Item) -> None:
        transaction = item.transaction
        if transaction is not None and transaction.xid != self._visible_xid:
            await self._services.wait_until_visible(transaction.xid)
            self._visible_xid = transaction.xid

    # What is called, and what then

    async def _deliver(self, unit: list[Handed], slot: Slot) -> None:
        """Call with all of a unit at once; afterwards all of it is taken.

        Raises:
            DeliveryError: it is not, and the policy is to stop.
            asyncio.CancelledError: the task was cancelled, whatever the handler made of that.
        """
        unit, items = await self._admit_all(unit)
        if not unit:
            return
        error = await self._try(items, slot)
        if error is None:
            self._delivered(unit)
        else:
            await self._recover(unit, items, error, slot)

    async def _try(self, items: Sequence[Item], slot: Slot) -> BaseException | None:
        """Call once; return what it raised."""
        slot.begin(items[0])
        try:
            redelivered, error = await self.caller.call(items, slot)
        except (Exception, asyncio.CancelledError) as raised:
            _pass_cancellation()
            if not isinstance(self.destination, Handler) and not isinstance(
                raised, OSError | SinkFailed | OutputClosed
            ):
                raise  # a sink's own mistake
            slot.end()
            return raised
        slot.end()
        self.counts.redelivered += redelivered
        return error

    async def _recover(
        self, unit: list[Handed], items: list[Item], error: BaseException, slot: Slot
    ) -> None:
        """Try again, as often as the policy says; then do what it says."""
        policy = _policy(unit[0])
        started = time.monotonic()
        attempt, outages = 1, 0
        while True:
            if isinstance(error, Unavailable):  # not the change's fault: it is waited out
                outages += 1
                pause: float | None = policy.backoff.pause_seconds(outages)
            else:
                pause = _pause(policy, attempt, error, time.monotonic() - started)
                attempt += 1
            if pause is None:
                await self._give_up(unit, items, error, attempt - 1, slot)
                return
            self._tell_retry(items[0], attempt - 1, pause, error)
            if not await self._flow.pause(pause):
                raise _CutShort
            again = await self._try(items, slot)
            if again is None:
                self._delivered(unit)
                return
            error = again

    async def _give_up(
        self,
        unit: list[Handed],
        items: list[Item],
        error: BaseException,
        attempts: int,
        slot: Slot,
    ) -> None:
        """Do with a unit that was not taken what the policy says; each change by itself."""
        if isinstance(error, _NEVER_AGAIN):
            raise self._failure(items[0], error, attempts)
        if len(unit) == 1 or self._options.transactions:
            for entry, item in zip(unit, items, strict=True):
                await self._put_aside(entry, item, error, attempts)
            return
        if all(_policy(entry).on_failure is OnFailure.STOP for entry in unit):
            raise self._failure(items[0], error, attempts)
        for entry in unit:
            # Of two changes of one row the second one is parked once the first one has failed.
            admitted = await self._admit(entry)
            if admitted is None:
                continue
            alone = await self._try([admitted], slot)
            if alone is None:
                self._delivered([entry])
            else:
                await self._put_aside(entry, admitted, alone, attempts + 1)

    async def _put_aside(
        self, entry: Handed, item: Item, error: BaseException, attempts: int
    ) -> None:
        """Stop, skip a change, or keep it in the dead-letter store.

        Raises:
            DeliveryError: the policy is to stop, or the store does not take it.
        """
        route, as_routed, _, _ = entry
        policy = _policy(entry)
        if policy.on_failure is OnFailure.STOP:
            raise self._failure(item, error, attempts)
        described = self._services.describe(error)
        if policy.on_failure is OnFailure.SKIP:
            self.counts.skipped += 1
            log.error(
                "change_skipped",
                route=route.name,
                change=item.id,
                attempts=attempts,
                error=described,
            )
        else:
            parking = self._services.parking
            assert parking is not None  # noqa: S101 - made when a route asks for it
            keys = _keys(as_routed, self._options.key)
            trace = "".join(traceback.format_tb(error.__traceback__))
            await parking.put_aside(route.name, as_routed, keys, attempts, described, trace)
            self.counts.dead_lettered += 1
            log.error(
                "change_dead_lettered",
                route=route.name,
                change=item.id,
                attempts=attempts,
                error=described,
            )
        self._take([entry])

    def _failure(self, item: Item, error: BaseException, attempts: int) -> WalstreamError:
        """Return what stops the stream."""
        if isinstance(error, OutputClosed | SetupError):
            return error
        kind: type[DeliveryError] = (
            HandlerFailed if isinstance(self.destination, Handler) else SinkFailed
        )
        if isinstance(error, NotRun):
            message = f"{self.name} did not take change {item.id}: {error.message}"
            failure: DeliveryError = kind(message, hint=f"{error.hint}; {_COMES_AGAIN}")
        else:
            times = f"in {attempts} attempts" if attempts > 1 else "in its only attempt"
            described = self._services.describe(error)
            message = f"{self.name} did not take change {item.id} {times}: {described}"
            failure = kind(message, hint=f"mend the cause and start again; {_COMES_AGAIN}")
        failure.__cause__ = error
        return failure

    def _tell_retry(
        self, item: Item, attempt: int, pause_seconds: float, error: BaseException
    ) -> None:
        self.counts.retries += 1
        log.warning(
            "delivery_retried",
            destination=self.name,
            change=item.id,
            attempt=attempt,
            pause_seconds=round(pause_seconds, 3),
            error=self._services.describe(error),
        )

    def _delivered(self, unit: Sequence[Handed]) -> None:
        self.counts.delivered += len(unit)
        self._take(unit)
        _pass_cancellation()  # the handler may have swallowed it

    def _take(self, unit: Iterable[Handed]) -> None:
        """Tell that changes are taken, with one call for each transaction."""
        current: Ticket | None = None
        count = size_bytes = 0
        for _, _, ticket, its_bytes in unit:
            if ticket is not current:
                if current is not None:
                    self._flow.take(current, count, size_bytes)
                current, count, size_bytes = ticket, 0, 0
            count += 1
            size_bytes += its_bytes
        if current is not None:
            self._flow.take(current, count, size_bytes)


class PlainOutlet(Outlet):
    """An ``async def`` handler that takes one change after another: the shortest way there is."""

    async def _work(self) -> None:
        slot = self._slots[0]
        slot.task = asyncio.current_task()
        while await self._more():
            if self._has_conditions:
                for entry in self._next(1):
                    await self._deliver([entry], slot)
            else:
                await self._call_all(slot)

    async def _call_all(self, slot: Slot) -> None:
        """Call for all that waits; what was called is taken when a transaction is through."""
        handler = self.destination
        assert isinstance(handler, Handler)  # noqa: S101 - see outlet_of
        function = handler.function
        waiting, flow, monotonic = self._waiting, self._flow, time.monotonic
        task = slot.task
        assert task is not None  # noqa: S101 - set by _work
        current: Ticket | None = None
        count = size_bytes = 0
        while waiting:
            entry = waiting.popleft()
            _, item, ticket, its_bytes = entry
            if ticket is not current or flow.halt:
                if current is not None and count:
                    self._called(current, count, size_bytes)
                count = size_bytes = 0
                current = ticket
                if not flow.may_begin(ticket):
                    flow.drop(entry)
                    continue
            slot.item = item
            slot.since = monotonic()
            try:
                result = await function(item)
                if result is not None:
                    verify_finished(handler, result)
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - user code
                slot.end()
                if count:
                    self._called(current, count, size_bytes)
                _pass_cancellation()
                await self._recover([entry], [item], error, slot)
                return
            count += 1
            size_bytes += its_bytes
            if task.cancelling():  # and the handler swallowed it
                break
        slot.end()
        if current is not None and count:
            self._called(current, count, size_bytes)
        _pass_cancellation()

    def _called(self, ticket: Ticket, count: int, size_bytes: int) -> None:
        self.counts.delivered += count
        self._flow.take(ticket, count, size_bytes)


class ThreadOutlet(Outlet):
    """A ``def`` handler that takes one change after another: several in a visit to its thread."""

    async def _work(self) -> None:
        slot = self._slots[0]
        while await self._more():
            unit, items = await self._admit_all(self._next_run())
            if unit:
                await self._call_each(unit, items, slot)

    def _next_run(self) -> list[Handed]:
        """Return the next changes of one transaction, so that a stop in between is noticed."""
        unit = self._next(1)
        waiting = self._waiting
        while unit and waiting and len(unit) < MAX_SYNC_RUN and waiting[0][2] is unit[0][2]:
            unit.append(waiting.popleft())
        return unit

    async def _call_each(self, unit: list[Handed], items: list[Item], slot: Slot) -> None:
        caller = self.caller
        assert isinstance(caller, ThreadCaller)  # noqa: S101 - see outlet_of
        slot.begin(items[0])
        done, repeated, error = await caller.call_each(items, slot)
        slot.end()
        self.counts.redelivered += repeated
        self._delivered(unit[:done])
        if error is not None:
            # The rest waits in front of all that has come since, or commit order would be lost.
            self._waiting.extendleft(reversed(unit[done + 1 :]))
            await self._recover([unit[done]], [items[done]], error, slot)


class UnitOutlet(Outlet):
    """A sink, a handler of lists, or one whose calls need more than its function."""

    async def _work(self) -> None:
        slot = self._slots[0]
        limit = self._limit
        while await self._more():
            if self._options.batch:
                await self._linger()
            unit = self._next(limit)
            if unit:
                await self._deliver(unit, slot)

    @property
    def _limit(self) -> int:
        if isinstance(self.destination, Handler):
            return self._options.batch or 1
        return MAX_SINK_BATCH

    async def _linger(self) -> None:
        """Wait for the rest of a batch, as long as the handler wants to."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self._options.linger_seconds
        timer = loop.call_at(end, self.wake)
        try:
            while (
                len(self._waiting) < self._options.batch
                and loop.time() < end
                and not (self._flow.is_closed or self._flow.halt)
            ):
                self._news.clear()
                await self._news.wait()
        finally:
            timer.cancel()


class TransactionOutlet(Outlet):
    """A handler that takes whole transactions.

    What is collected of a transaction that has not come completely is not counted as in flight: the
    reader would wait for room that only the rest of the transaction makes. It has its own bound.
    """

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

    def add(self, handed: Iterable[Handed]) -> None:
        """Collect changes until their transaction is complete, or too large."""
        for entry in handed:
            ticket = entry[2]
            if self._collected and self._collected[0][2] is not ticket:
                self._complete()
            if ticket is self._refused:
                self._let_wait([entry], is_refused=True)
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
        for entry in unit:
            self._flow.add(entry)
        self._units.append((unit, is_refused))

    async def _work(self) -> None:
        slot = self._slots[0]
        while await self._more_units():
            unit, is_refused = self._units.popleft()
            if not self._flow.may_begin(unit[0][2]):
                for entry in unit:
                    self._flow.drop(entry)
                continue
            if is_refused:
                await self._refuse(unit)
            else:
                await self._deliver(unit, slot)

    async def _more_units(self) -> bool:
        while not self._units:
            if self._flow.is_closed or self._flow.halt is Halt.FINISH_CALLS:
                return False
            self._news.clear()
            await self._news.wait()
        return self._flow.halt is not Halt.FINISH_CALLS

    async def _refuse(self, unit: list[Handed]) -> None:
        error = TransactionTooLarge(
            f"{self.name}: a transaction has more than"
            f" {self._options.max_transaction_changes} changes, or {self._flow.max_bytes} bytes",
            hint="raise max_transaction_changes or stream.max_in_flight_bytes, take batches"
            " instead of transactions, or narrow the route",
        )
        for entry in unit:
            await self._put_aside(entry, entry[1], error, 1)


class LaneOutlet(Outlet):
    """A handler that is called in parallel, in order per key."""

    def __init__(self, destination: Handler, caller: Caller, services: Services) -> None:
        super().__init__(destination, caller, services)
        self._slots = [Slot() for _ in range(destination.options.concurrency)]
        self._lanes: Lanes[Handed] = Lanes()
        self._idle: deque[asyncio.Future[None]] = deque()
        self._busy = 0
        self._failed: WalstreamError | None = None

    @property
    def waiting(self) -> int:
        """How many changes wait for a call, or are in one."""
        return len(self._lanes)

    def attach(self) -> None:
        """Forget what the last session has left: it comes again."""
        super().attach()
        self._lanes = Lanes()
        self._idle.clear()
        self._busy = 0
        self._failed = None

    def add(self, handed: Iterable[Handed]) -> None:
        """Let changes wait for those before them that are about the same rows."""
        key = self._options.key
        for entry in handed:
            self._flow.add(entry)
            self._lanes.add(entry, _keys(entry[1], key))
        self.wake()

    def wake(self) -> None:
        """Wake as many workers as there is work for; all when there will be no more."""
        count = len(self._slots) if self._is_over else self._lanes.ready
        while self._idle and count > 0:
            waiter = self._idle.popleft()
            if not waiter.done():
                waiter.set_result(None)
                count -= 1

    async def _work(self) -> None:
        async with asyncio.TaskGroup() as group:
            for slot in self._slots:
                group.create_task(self._work_in_lanes(slot))
        if self._failed is not None:
            raise self._failed

    @property
    def _is_over(self) -> bool:
        """Whether a worker that finds nothing to do may go."""
        return (
            self._failed is not None
            or self._flow.halt is Halt.FINISH_CALLS
            # What is left then waits behind attempts that were cut short.
            or (self._flow.is_closed and not self._lanes.ready and not self._busy)
        )

    async def _work_in_lanes(self, slot: Slot) -> None:
        limit = self._options.batch or 1
        while entries := await self._next_entries(limit):
            self._busy += 1
            try:
                unit = self._begin(entries)
                if unit:
                    await self._deliver(unit, slot)
                self._lanes.done(entries)
            except _CutShort:
                pass
            except WalstreamError as failure:
                # The calls in hand of the other workers are let finish.
                self._failed = self._failed or failure
            finally:
                self._busy -= 1
                self.wake()

    async def _next_entries(self, limit: int) -> list[Entry[Handed]]:
        while not self._is_over:
            if limit > 1 and 0 < self._lanes.ready < limit and not self._flow.is_closed:
                await self._flow.pause(self._options.linger_seconds)
            if entries := self._lanes.take(limit):
                return entries
            waiter = asyncio.get_running_loop().create_future()
            self._idle.append(waiter)
            await waiter
        return []

    def _begin(self, entries: Sequence[Entry[Handed]]) -> list[Handed]:
        """Return what may be begun; the rest is dropped, and comes again."""
        unit = []
        for entry in entries:
            if self._flow.may_begin(entry.item[2]):
                unit.append(entry.item)
            else:
                self._flow.drop(entry.item)
        return unit


def outlet_of(destination: Destination, caller: Caller, services: Services) -> Outlet:
    """Return the way to a destination."""
    if not isinstance(destination, Handler):
        return UnitOutlet(destination, caller, services)
    options = destination.options
    if options.transactions:
        return TransactionOutlet(destination, caller, services)
    if options.concurrency > 1:
        return LaneOutlet(destination, caller, services)
    if options.batch:
        return UnitOutlet(destination, caller, services)
    if not destination.is_async:
        return ThreadOutlet(destination, caller, services)
    return (PlainOutlet if options.is_plain else UnitOutlet)(destination, caller, services)


def _keys(item: Item, columns: Sequence[str] | None) -> tuple[Key, ...]:
    """Return what an item is about; messages are in order per prefix."""
    if isinstance(item, Message):
        return ((f"message {item.prefix}", b"*"),)
    return keys_of(item, columns)


def _policy(entry: Handed) -> FailurePolicy:
    policy: FailurePolicy = entry[0].policy
    return policy


def _pause(
    policy: FailurePolicy, attempt: int, error: BaseException, elapsed_seconds: float
) -> float | None:
    if isinstance(error, _NEVER_AGAIN + _SAME_AGAIN):
        return None
    return policy.pause_seconds(attempt, error, elapsed_seconds)


def _pass_cancellation() -> None:
    """Raise CancelledError when our task was cancelled, whatever user code made of that."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
