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
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from typing import Any, Final
from weakref import WeakSet

import msgspec
import structlog

from walstream.acknowledger import Ticket
from walstream.calls import (
    PASSING,
    QUICK_SECONDS,
    CallClock,
    Caller,
    NotRun,
    Slot,
    ThreadCaller,
    verify_finished,
)
from walstream.changes import Change, Message
from walstream.destinations import Destination, Handler, HandlerOptions, Item
from walstream.errors import (
    DeliveryError,
    HandlerFailed,
    OutputClosed,
    RowInvalid,
    SetupError,
    SinkFailed,
    SinkRefused,
    StreamBroken,
    TargetUnavailable,
    TransactionBroken,
    TransactionTooLarge,
    WalstreamError,
)
from walstream.flow import Flow, Halt, Handed
from walstream.keys import Key, conflict, keys_of
from walstream.lanes import Entry, Lanes
from walstream.lsn import Lsn
from walstream.parking import Parking, Part
from walstream.policy import FailurePolicy, OnFailure

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.delivery")

MAX_SYNC_RUN: Final = 100
"""Changes that a sync handler gets in one visit to its thread; in between the loop takes stock."""

MAX_SINK_BATCH: Final = 1000
"""Changes that a sink gets at once."""

MAX_ASYNC_RUN: Final = 1000
"""Calls of an async handler after which others get the loop, however little it waits itself."""

MAX_CALLS_IN_A_ROW: Final = 100
"""The same of all other calls, which cost more."""

_CANCEL_SECONDS: Final = 2.0
"""How long a handler gets to end when it is cancelled."""

_SAME_AGAIN: Final = (RowInvalid, SinkRefused, TransactionTooLarge)
"""The same change would fail the same way: no further attempt, then the policy."""

_COMES_AGAIN: Final = (
    "the slot was not moved past its transaction, and the change comes again with the same id"
)


class _Behind(Exception):
    """What is about to be put aside has to wait for a change of its row that is not called yet."""


class _CutShort(Exception):
    """All is halted: what is being tried again is not waited for, and comes again."""


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


class Services(msgspec.Struct, frozen=True):
    """What outlets need of others.

    ``wait_until_visible`` takes an xid and returns when other sessions see that transaction.
    ``describe`` names an error without what may be a row's values. ``drain_seconds`` is how long
    calls may go on when another one of their destination has failed for good.
    """

    flow: Flow
    parking: Parking | None
    wait_until_visible: Callable[[int], Awaitable[None]]
    describe: Callable[[BaseException], str]
    drain_seconds: float = 10.0


class Held(msgspec.Struct, frozen=True):
    """What an outlet is waiting for, and since when (monotonic seconds).

    ``key_columns`` make its key; None for the primary key.
    """

    destination: str
    item: Item
    since: float
    slot: Slot
    key_columns: tuple[str, ...] | None = None

    @property
    def change_id(self) -> str:
        """Of the first change of the call."""
        return self.item.id

    @property
    def key(self) -> str:
        """The key of the change as its route sees it, as a table and JSON."""
        keys = _keys(self.item, self.key_columns)
        return ", ".join(f"{table} {values.decode()}" for table, values in keys)


class _Delay(msgspec.Struct, eq=False):
    """What keeps a change besides a first call, and since when; ``note`` says what it is."""

    item: Item
    since: float
    note: str


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
        self.clock = CallClock()
        self._slots = [Slot(self.clock)]
        self._delays: list[_Delay] = []
        self._waiting: deque[Handed] = deque()
        self._news = asyncio.Event()
        self._visible_xid = 0
        self._calls_in_a_row = 0
        self._in_flight = 0
        self._in_flight_bytes = 0
        self._has_let_go = False
        self._dropped_from: Lsn | None = None
        self._running: set[asyncio.Task[None]] = set()
        self.waits_for_batch = False

    def adopt(self, before: Outlet) -> None:
        """Take over from the outlet that led to the same destination before a reload.

        It counts on, and knows of a call that does not end when it is told to: that one must return
        before the destination is called again. The other outlet is of no use afterwards.
        """
        self.counts, self.clock = before.counts, before.clock
        self._slots, self._running = before._slots, before._running
        self.caller, before.caller = before.caller, self.caller
        self.clock.go_on_from(before.clock)

    @property
    def wants_more(self) -> bool:
        """Whether it has not let go of everything."""
        return not self._has_let_go

    @property
    def is_busy(self) -> bool:
        """Whether a call goes on that does not end when it is told to."""
        return self.caller.is_busy or bool(self._running)

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
        if item is None:  # its thread has just finished it
            return None
        return Held(self.name, item, slot.since, slot, self._options.key)

    def stalled(self, now: float) -> tuple[float, str]:
        """Say how long it has been at the change that it has held longest, and why.

        That is a call, or all attempts with the pauses between them, or what comes before and after
        them. A batch that waits for more is not held up.

        Args:
            now: monotonic seconds.

        Returns:
            Seconds, and a sentence without a row's value; 0 and nothing when it is at nothing.
        """
        held = self.held
        delays = [*self._delays]
        if held is not None:
            delays.insert(0, _Delay(held.item, held.since, ""))
        if not delays:
            return 0.0, ""
        delay = min(reversed(delays), key=_since)  # of a call and its attempts the latter
        seconds = max(now - delay.since, 0.0)
        kind = "handler" if isinstance(self.destination, Handler) else "sink"
        note = f" ({delay.note})" if delay.note else ""
        return seconds, f"{kind} {self.name} has held {_what(delay.item)} for {seconds:.0f} s{note}"

    @property
    def calls_ended(self) -> int:
        """How many calls have ended: what is taken is told for several calls together."""
        return sum(self.clock.counts)

    @property
    def waiting(self) -> int:
        """How many changes wait for a call."""
        return len(self._waiting)

    @property
    def in_flight(self) -> int:
        """How many changes were handed over and are not taken."""
        return self._in_flight

    def attach(self) -> None:
        """Forget what the last session has left: it comes again."""
        self._waiting.clear()
        self._news = asyncio.Event()
        self._in_flight = self._in_flight_bytes = 0
        self._has_let_go = False
        self._dropped_from = None
        self._clear_slots()

    def add(self, handed: Sequence[Handed]) -> None:
        """Let changes wait, in commit order."""
        if self._has_let_go:
            return
        self._count(handed)
        self._waiting.extend(handed)
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
        if self._running:  # a call of an earlier session that does not end when it is told to
            await asyncio.wait(self._running)
        self._is_running()
        for slot in self._slots:
            slot.clear()
        try:
            await self._work()
        except _CutShort:
            self._let_go()
        finally:
            self._clear_slots()

    def _is_running(self) -> None:
        """Note that the current task works for this outlet until it ends."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine runs in a task
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    @abstractmethod
    async def _work(self) -> None: ...

    def _clear_slots(self) -> None:
        """What was cancelled is not held any more; what goes on still is."""
        if not self.caller.is_busy and self._running <= {asyncio.current_task()}:
            for slot in self._slots:
                slot.clear()

    @contextlib.contextmanager
    def _delayed(self, item: Item, note: str, since: float | None = None) -> Iterator[_Delay]:
        """Note what keeps a change while the block runs."""
        delay = _Delay(item, time.monotonic() if since is None else since, note)
        self._delays.append(delay)
        try:
            yield delay
        finally:
            self._delays.remove(delay)

    # What is in flight

    def _count(self, handed: Sequence[Handed]) -> None:
        size_bytes = sum([its_bytes for _, _, _, its_bytes in handed])
        self._in_flight += len(handed)
        self._in_flight_bytes += size_bytes
        self._flow.add(len(handed), size_bytes)

    def _took(self, ticket: Ticket, count: int, size_bytes: int) -> None:
        if not self._flow.is_current(ticket):
            return
        self._in_flight -= count
        self._in_flight_bytes -= size_bytes
        self._flow.take(ticket, count, size_bytes)

    def _drop(self, entry: Handed) -> None:
        """Do not begin a change any more; it comes again."""
        self._in_flight -= 1
        self._in_flight_bytes -= entry[3]
        self._flow.drop(1, entry[3])

    def _let_go(self) -> None:
        """Begin nothing more, of what waits and of what is still to come.

        It comes again. The reader, which may be in the middle of a transaction, need not wait until
        there is room for it.
        """
        self._has_let_go = True
        self._waiting.clear()
        self._flow.drop(self._in_flight, self._in_flight_bytes)
        self._in_flight = self._in_flight_bytes = 0

    # What waits

    async def _more(self) -> bool:
        """Wait until something waits; return False when nothing will."""
        if self._is_long_run():
            await asyncio.sleep(0)
        while not self._is_waiting:
            if self._flow.is_closed or self._flow.halt is Halt.FINISH_CALLS:
                return False
            self._news.clear()
            await self._news.wait()
        return self._flow.halt is not Halt.FINISH_CALLS

    @property
    def _is_waiting(self) -> bool:
        return bool(self._waiting)

    def _is_long_run(self) -> bool:
        """Whether it is time to let others have the loop: not every call waits for something."""
        self._calls_in_a_row = (self._calls_in_a_row + 1) % MAX_CALLS_IN_A_ROW
        return not self._calls_in_a_row

    async def _linger(self) -> None:
        """Wait for the rest of a batch, as long as the handler wants to."""
        self.waits_for_batch = True
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._options.linger_seconds):
                    while not self._has_batch:
                        self._news.clear()
                        await self._news.wait()
        finally:
            self.waits_for_batch = False

    @property
    def _has_batch(self) -> bool:
        """Whether a batch is as large as it will get."""
        flow = self._flow
        return bool(
            self.waiting >= self._options.batch or flow.is_full or flow.is_closed or flow.halt
        )

    def _may_begin(self, ticket: Ticket) -> bool:
        """Whether a change of this transaction may be given to the destination.

        Of what comes after one that may not, nothing may: another destination, or another lane, may
        have begun a later transaction, and commit order would be lost.
        """
        dropped = self._dropped_from
        if (dropped is None or ticket.end_lsn < dropped) and self._flow.may_begin(ticket):
            return True
        self._dropped_from = ticket.end_lsn if dropped is None else min(dropped, ticket.end_lsn)
        return False

    async def _settle_cancellation(self) -> None:
        """Pass a cancellation of ours on; one that the handler has made itself is over now.

        Raises:
            asyncio.CancelledError: the task is to end, whatever the handler made of that.
        """
        task = asyncio.current_task()
        if task is None or not task.cancelling():
            return
        if task not in _told_to_end:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0)  # what the handler has left for the next await
        if task in _told_to_end:
            raise asyncio.CancelledError
        while task.uncancel():
            pass

    def _next(self, limit: int) -> list[Handed]:
        """Return what may be begun of the next changes."""
        waiting = self._waiting
        unit: list[Handed] = []
        begun: Ticket | None = None
        while waiting and len(unit) < limit:
            entry = waiting.popleft()
            ticket = entry[2]
            if ticket is begun or self._may_begin(ticket):
                begun = ticket
                unit.append(entry)
            else:
                self._drop(entry)
        return unit

    # What may be called

    async def _admit(self, entry: Handed, before: Sequence[Handed] = ()) -> Item | None:
        """Return what the handler shall get; None when it gets nothing and the change is taken.

        Args:
            entry: the change.
            before: changes that the handler gets with it, or rather before it.

        Raises:
            DeliveryError: the change stops the stream.
            _Behind: it is to be put aside, and one before is about the same row.
        """
        if await self._is_parked([entry], before):
            return None
        await self._wait_until_visible(entry[1])
        item = self._modelled(entry[1])
        if isinstance(item, Exception):
            self._verify_first(entry, before)
            await self._put_aside([entry], item, 1)
            return None
        return item

    def _verify_first(self, entry: Handed, before: Sequence[Handed]) -> None:
        key = self._options.key
        keys = _keys(entry[1], key)
        if any(conflict(keys, _keys(item, key)) for _, item, _, _ in before):
            raise _Behind

    async def _admit_all(self, unit: list[Handed]) -> tuple[list[Handed], list[Item], list[Handed]]:
        """Return what is called for at once, what it is called with, and the rest.

        The rest begins with a change that is likely to stop the stream, or is to be put aside and
        is about the same row as one before: what is before it is delivered first.
        """
        if not self._has_conditions:
            return unit, [entry[1] for entry in unit], []
        admitted: list[Handed] = []
        items: list[Item] = []
        for place, entry in enumerate(unit):
            try:
                item = await self._admit(entry, admitted)
            except (DeliveryError, _Behind):
                if not admitted:
                    raise
                return admitted, items, unit[place:]
            if item is not None:
                admitted.append(entry)
                items.append(item)
        return admitted, items, []

    @property
    def _has_conditions(self) -> bool:
        """Whether `_admit` has anything to do."""
        parking, options = self._services.parking, self._options
        return (
            (parking is not None and parking.is_used)
            or options.visible
            or options.model is not None
        )

    async def _is_parked(self, unit: Sequence[Handed], before: Sequence[Handed] = ()) -> bool:
        """Whether changes have to wait in the dead-letter store; then they are there, and taken."""
        parking = self._services.parking
        if parking is None or not parking.is_used:
            return False
        parts = self._parts(unit)
        if not any(parking.may_block(route, keys) for route, _, keys in parts):
            return False
        for entry in unit:
            self._verify_first(entry, before)
        # What a transactional handler has applied comes again after a crash: parked, a replay would
        # apply it once more. Where the letters are gone, a replay may just have applied it.
        with self._delayed(unit[0][1], "it is being parked"):
            if await self._is_applied(unit):
                return True
            if not await parking.park(parts):
                return await self._is_applied(unit)
        self.counts.parked += len(unit)
        self._take(unit)
        return True

    async def _is_applied(self, unit: Sequence[Handed]) -> bool:
        """Whether it is recorded that changes were applied; then they are taken."""
        for _, item, _, _ in unit:
            if not await self.caller.has_applied(item):
                return False
        self.counts.redelivered += len(unit)
        self._delivered(unit)
        return True

    def _parts(self, unit: Sequence[Handed]) -> list[Part]:
        key = self._options.key
        return [(route.name, item, _keys(item, key)) for route, item, _, _ in unit]

    def _modelled(self, item: Item) -> Item | Exception:
        """Return what the handler gets, or why its model does not take the row.

        Raises:
            StreamBroken: the change is not what wal2json writes.
        """
        model = self._options.model
        if model is None or not isinstance(item, Change):
            return item
        try:
            return model.apply(item)
        except StreamBroken:
            raise
        except Exception as error:  # noqa: BLE001 - a validator is the user's code
            return error

    async def _wait_until_visible(self, item: Item) -> None:
        if not self._options.visible:
            return
        transaction = item.transaction
        if transaction is not None and transaction.xid != self._visible_xid:
            with self._delayed(item, "until other sessions see it"):
                await self._services.wait_until_visible(transaction.xid)
            self._visible_xid = transaction.xid

    # What is called, and what then

    async def _deliver(self, unit: list[Handed], slot: Slot) -> None:
        """Call with all of a unit at once; afterwards all of it is taken.

        Raises:
            DeliveryError: it is not, and the policy is to stop.
            asyncio.CancelledError: the task was cancelled, whatever the handler made of that.
        """
        while unit:
            admitted, items, unit = await self._admit_all(unit)
            if not admitted:
                return
            error = await self._try(items, slot)
            if error is None:
                self._delivered(admitted)
            else:
                await self._recover(admitted, items, error, slot)

    async def _try(self, items: Sequence[Item], slot: Slot) -> BaseException | None:
        """Call once; return what it raised."""
        slot.begin(items[0])
        try:
            redelivered, error = await self.caller.call(items, slot)
        except PASSING:
            raise
        except BaseException as raised:
            await self._settle_cancellation()
            if not isinstance(self.destination, Handler) and not isinstance(
                raised, OSError | SinkFailed | OutputClosed | asyncio.CancelledError
            ):
                raise  # a sink's own mistake
            slot.end()
            return raised
        slot.end()
        self.counts.redelivered += redelivered
        if not _is_told_to_end():  # what it has taken by returning is told first
            await self._settle_cancellation()
        return error

    async def _recover(
        self,
        unit: list[Handed],
        items: list[Item],
        error: BaseException,
        slot: Slot,
        attempts: int = 1,
    ) -> None:
        """Try again, as often as the policy says; then do what it says.

        Args:
            unit: what was called for at once.
            items: what it was called with.
            error: what the last call raised.
            slot: of that call.
            attempts: how many there were.
        """
        policy = _policy(unit[0])
        started = slot.since
        outages = 0
        with self._delayed(items[0], "", started) as delay:
            while True:
                is_outage = self._is_outage(error)
                if is_outage:  # not the change's fault: it is waited out, and is no attempt
                    attempts -= 1
                    outages += 1
                    pause: float | None = policy.backoff.pause_seconds(outages)
                    delay.note = "its database cannot be used"
                else:
                    pause = self._pause(policy, attempts, error, time.monotonic() - started)
                    delay.note = f"{attempts} of {policy.attempts} attempts failed"
                if pause is None:
                    break
                self._tell_retry(items[0], attempts, pause, error)
                if not await self._flow.pause(pause):
                    raise _CutShort
                if is_outage:
                    started = time.monotonic()
                delay.note = f"attempt {attempts + 1} of {policy.attempts}"
                again = await self._try(items, slot)
                if again is None:
                    self._delivered(unit)
                    return
                error = again
                attempts += 1
        await self._give_up(unit, items, error, attempts, slot)

    def _is_outage(self, error: BaseException) -> bool:
        """Whether it is the database of a transactional handler that is away."""
        return isinstance(error, TargetUnavailable)

    def _is_final(self, error: BaseException) -> bool:
        """Whether no attempt and no other change would fare better: the stream stops.

        A handler may raise errors of ours too, perhaps because it uses walstream: these are as any.
        """
        if isinstance(self.destination, Handler):
            of_target = isinstance(error, SetupError | TransactionBroken)
            return isinstance(error, NotRun) or (of_target and self._is_transactional)
        return isinstance(error, OutputClosed)

    @property
    def _is_transactional(self) -> bool:
        return self._options.transactional is not None

    def _pause(
        self, policy: FailurePolicy, attempt: int, error: BaseException, elapsed_seconds: float
    ) -> float | None:
        if self._is_final(error) or isinstance(error, _SAME_AGAIN):
            return None
        return policy.pause_seconds(attempt, error, elapsed_seconds)

    async def _give_up(
        self,
        unit: list[Handed],
        items: list[Item],
        error: BaseException,
        attempts: int,
        slot: Slot,
    ) -> None:
        """Do with a unit that was not taken what the policy says; each change by itself."""
        if self._is_final(error):
            raise self._failure(items[0], error, attempts)
        if len(unit) == 1 or self._options.transactions:
            await self._put_aside(unit, error, attempts)
            return
        if all(_policy(entry).on_failure is OnFailure.STOP for entry in unit):
            raise self._failure(items[0], error, attempts)
        for entry in unit:
            if self._flow.halt is Halt.FINISH_CALLS:
                raise _CutShort
            await self._deliver_alone(entry, attempts, slot)

    async def _deliver_alone(self, entry: Handed, attempts: int, slot: Slot) -> None:
        """Deliver one change of a unit that was not taken; its attempts count on."""
        # Of two changes of one row the second one is parked once the first one has failed.
        item = await self._admit(entry)
        if item is None:
            return
        self.counts.retries += 1
        error = await self._try([item], slot)
        if error is None:
            self._delivered([entry])
        else:
            await self._recover([entry], [item], error, slot, attempts + 1)

    async def _put_aside(
        self,
        unit: Sequence[Handed],
        error: BaseException,
        attempts: int,
        failed: Item | None = None,
    ) -> None:
        """Stop, skip changes, or keep them in the dead-letter store.

        Args:
            unit: one change, or those of a transaction.
            error: why.
            attempts: how many there were.
            failed: which of them it is about; None for the first one, or all.

        Raises:
            DeliveryError: the policy is to stop, or the store does not take them.
        """
        route, first, _, _ = unit[0]
        item = first if failed is None else failed
        policy = _policy(unit[0])
        if policy.on_failure is OnFailure.STOP:
            raise self._failure(item, error, attempts)
        described = self._services.describe(error)
        if policy.on_failure is OnFailure.SKIP:
            self.counts.skipped += len(unit)
            log.error(
                "change_skipped",
                route=route.name,
                change=item.id,
                changes=len(unit),
                attempts=attempts,
                error=described,
            )
        else:
            parking = self._services.parking
            assert parking is not None  # noqa: S101 - made when a route asks for it
            trace = "".join(traceback.format_tb(error.__traceback__))
            with self._delayed(item, "it is put into the dead-letter store"):
                await parking.put_aside(self._parts(unit), attempts, described, trace)
            self.counts.dead_lettered += len(unit)
            log.error(
                "change_dead_lettered",
                route=route.name,
                change=item.id,
                changes=len(unit),
                attempts=attempts,
                error=described,
            )
        self._take(unit)

    def _failure(self, item: Item, error: BaseException, attempts: int) -> WalstreamError:
        """Return what stops the stream."""
        if isinstance(error, OutputClosed | SetupError) and self._is_final(error):
            return error
        kind: type[DeliveryError] = (
            HandlerFailed if isinstance(self.destination, Handler) else SinkFailed
        )
        if isinstance(error, NotRun):
            why = f": {error.message}"
        else:
            times = f"in {attempts} attempts" if attempts > 1 else "in its only attempt"
            why = f" {times}: {self._services.describe(error)}"
        hint = error.hint if isinstance(error, WalstreamError) else ""
        failure = kind(
            f"{self.name} did not take change {item.id}{why}",
            hint=f"{hint or 'mend the cause and start again'}; {_COMES_AGAIN}",
        )
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
        if _is_told_to_end():  # and the handler has swallowed it
            raise asyncio.CancelledError

    def _take(self, unit: Iterable[Handed]) -> None:
        """Tell that changes are taken, with one call for each transaction."""
        current: Ticket | None = None
        count = size_bytes = 0
        for _, _, ticket, its_bytes in unit:
            if ticket is not current:
                if current is not None:
                    self._took(current, count, size_bytes)
                current, count, size_bytes = ticket, 0, 0
            count += 1
            size_bytes += its_bytes
        if current is not None:
            self._took(current, count, size_bytes)


class PlainOutlet(Outlet):
    """An ``async def`` handler that takes one change after another: the shortest way there is."""

    async def _work(self) -> None:
        slot = self._slots[0]
        slot.task = asyncio.current_task()
        parking = self._services.parking
        while await self._more():
            # A handler has one route; letters of others are none of its business.
            if parking is not None and parking.has_letters(self._waiting[0][0].name):
                for entry in self._next(1):
                    await self._deliver([entry], slot)
            else:
                await self._call_all(slot)
                if self._waiting:
                    await asyncio.sleep(0)

    async def _call_all(  # noqa: C901, PLR0912, PLR0915 - calls in between would cost more than all it does
        self, slot: Slot
    ) -> None:
        """Call for what waits; what was called is taken when a transaction is through."""
        handler = self.destination
        assert isinstance(handler, Handler)  # noqa: S101 - see outlet_of
        function, options = handler.function, handler.options
        model, visible = options.model, options.visible
        waiting, flow, monotonic = self._waiting, self._flow, time.monotonic
        clock, quick = self.clock, self.clock.counts
        task = slot.task
        assert task is not None  # noqa: S101 - set by _work
        current: Ticket | None = None
        count = size_bytes = 0
        since = 0.0
        for _ in range(min(len(waiting), MAX_ASYNC_RUN)):
            entry = waiting.popleft()
            _, item, ticket, its_bytes = entry
            if ticket is not current or flow.halt:
                if current is not None and count:
                    self._called(current, count, size_bytes)
                count = size_bytes = 0
                current = ticket
                slot.item = None
                if not self._may_begin(ticket):
                    self._drop(entry)
                    continue
                if visible:
                    await self._wait_until_visible(item)
                since = monotonic()
            if model is not None:
                slot.item = None
                modelled = self._modelled(item)
                if isinstance(modelled, Exception):
                    if count:
                        self._called(current, count, size_bytes)
                    await self._put_aside([entry], modelled, 1)
                    return
                item = modelled
                since = monotonic()
            slot.item = item
            slot.since = since
            try:
                result = await function(item)
                if result is not None:
                    verify_finished(handler, result)
            except PASSING:
                raise
            except BaseException as error:  # noqa: BLE001 - user code, which may even exit
                slot.end()
                if count:
                    self._called(current, count, size_bytes)
                await self._settle_cancellation()
                await self._recover([entry], [item], error, slot)
                return
            ended = monotonic()
            seconds = ended - since
            if seconds <= QUICK_SECONDS:  # as `CallClock.add` counts it
                quick[0] += 1
                clock.total_seconds += seconds
            else:
                clock.add(seconds)
            since = ended  # nothing comes in between that takes time
            count += 1
            size_bytes += its_bytes
            if task.cancelling():  # and the handler swallowed it
                break
        slot.item = None
        if current is not None and count:
            self._called(current, count, size_bytes)
        await self._settle_cancellation()

    def _called(self, ticket: Ticket, count: int, size_bytes: int) -> None:
        self.counts.delivered += count
        self._took(ticket, count, size_bytes)


class ThreadOutlet(Outlet):
    """A ``def`` handler that takes one change after another: several in a visit to its thread."""

    async def _work(self) -> None:
        slot = self._slots[0]
        while await self._more():
            unit, items, rest = await self._admit_all(self._next_run())
            # It waits in front of all that has come since, or commit order would be lost.
            self._waiting.extendleft(reversed(rest))
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
        done, repeated, error = await caller.call_each(items, slot, self._may_go_on)
        slot.item = None  # the thread has timed each call
        self.counts.redelivered += repeated
        self._delivered(unit[:done])
        is_failed = error is not None
        self._waiting.extendleft(reversed(unit[done + is_failed :]))
        if error is not None:
            await self._recover([unit[done]], [items[done]], error, slot)

    def _may_go_on(self) -> bool:
        return self._flow.halt is not Halt.FINISH_CALLS


class UnitOutlet(Outlet):
    """A sink, a handler of lists, or one whose calls need more than its function."""

    async def _work(self) -> None:
        slot = self._slots[0]
        limit = self._limit
        while await self._more():
            if self._options.batch and not self._has_batch:
                await self._linger()
            unit = self._next(limit)
            if unit:
                await self._deliver(unit, slot)

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
        self._count(unit)
        self._units.append((unit, is_refused))

    def _refuse_too(self, entry: Handed) -> None:
        """Refuse what still comes of a transaction that is too large."""
        if self._units and self._units[-1][0][0][2] is entry[2]:
            self._count([entry])
            self._units[-1][0].append(entry)
        else:
            self._let_wait([entry], is_refused=True)

    async def _work(self) -> None:
        slot = self._slots[0]
        while await self._more():
            unit, is_refused = self._units.popleft()
            if not self._may_begin(unit[0][2]):
                for entry in unit:
                    self._drop(entry)
            elif is_refused:
                await self._refuse(unit)
            else:
                await self._deliver(unit, slot)

    @property
    def _is_waiting(self) -> bool:
        return bool(self._units)

    def _let_go(self) -> None:
        super()._let_go()
        self._collected = []
        self._units.clear()

    async def _admit_all(self, unit: list[Handed]) -> tuple[list[Handed], list[Item], list[Handed]]:
        """Return a transaction as a whole, or nothing when one of its changes cannot be called."""
        if not self._has_conditions:
            return unit, [entry[1] for entry in unit], []
        if await self._is_parked(unit):
            return [], [], []
        items: list[Item] = []
        for _, as_routed, _, _ in unit:
            await self._wait_until_visible(as_routed)
            item = self._modelled(as_routed)
            if isinstance(item, Exception):
                await self._put_aside(unit, item, 1, as_routed)
                return [], [], []
            items.append(item)
        return unit, items, []

    async def _refuse(self, unit: list[Handed]) -> None:
        error = TransactionTooLarge(
            f"{self.name}: a transaction has more than"
            f" {self._options.max_transaction_changes} changes, or {self._flow.max_bytes} bytes",
            hint="raise max_transaction_changes or stream.max_in_flight_bytes, take batches"
            " instead of transactions, or narrow the route",
        )
        await self._put_aside(unit, error, 1)


class LaneOutlet(Outlet):
    """A handler that is called in parallel, in order per key."""

    def __init__(self, destination: Handler, caller: Caller, services: Services) -> None:
        super().__init__(destination, caller, services)
        self._slots = [Slot(self.clock) for _ in range(destination.options.concurrency)]
        self._lanes: Lanes[Handed] = Lanes()
        self._idle: deque[asyncio.Future[None]] = deque()
        self._busy = 0
        self._is_lingering = False
        self._has_failed = False
        self._is_cut_short = False

    @property
    def waiting(self) -> int:
        """How many changes wait for a call."""
        return self._lanes.waiting

    def attach(self) -> None:
        """Forget what the last session has left: it comes again."""
        super().attach()
        self._lanes = Lanes()
        self._idle.clear()
        self._is_lingering = self._has_failed = self._is_cut_short = False

    def add(self, handed: Sequence[Handed]) -> None:
        """Let changes wait for those before them that are about the same rows."""
        if self._has_let_go:
            return
        self._count(handed)
        key = self._options.key
        for entry in handed:
            self._lanes.add(entry, _keys(entry[1], key))
        self.wake()

    def wake(self) -> None:
        """Wake as many workers as there is work for; all when there will be no more."""
        if self._is_lingering:
            self._news.set()
            if not self._is_over:
                return  # the one that lingers wakes the others
        if not self._idle:
            return
        count = len(self._slots) if self._is_over else self._lanes.ready
        while self._idle and count > 0:
            waiter = self._idle.popleft()
            if not waiter.done():
                waiter.set_result(None)
                count -= 1

    async def _work(self) -> None:
        self._busy = 0
        await run_together(
            [self._work_in_lanes(slot) for slot in self._slots],
            on_failure=self._fail,
            drain_seconds=self._services.drain_seconds,
        )
        if self._is_cut_short:
            raise _CutShort

    def _fail(self) -> None:
        """Let the calls in hand of the other workers finish, and nothing else."""
        self._has_failed = True
        self._flow.begin_no_more(Halt.FINISH_BEGUN)
        self.wake()

    @property
    def _is_over(self) -> bool:
        """Whether a worker that finds nothing to do may go."""
        if self._has_failed or self._flow.halt is Halt.FINISH_CALLS:
            return True
        # What is left then waits behind attempts that were cut short.
        will_be_no_more = self._flow.is_closed or self._is_cut_short
        return will_be_no_more and not self._lanes.ready and not self._busy

    async def _work_in_lanes(self, slot: Slot) -> None:
        self._is_running()
        while entries := await self._next_entries():
            self._busy += 1
            try:
                if unit := self._begin(entries):
                    await self._deliver(unit, slot)
                self._lanes.done(entries)
            except _CutShort:
                self._is_cut_short = True
            except Exception:
                self._fail()
                raise
            finally:
                self._busy -= 1
                self.wake()

    async def _next_entries(self) -> list[Entry[Handed]]:
        """Wait for something to do; return nothing when there will be nothing more."""
        if self._is_long_run():
            await asyncio.sleep(0)
        limit = self._options.batch or 1
        has_lingered = False
        while not self._is_over:
            if not self._lanes.ready or self._is_lingering:
                waiter = asyncio.get_running_loop().create_future()
                self._idle.append(waiter)
                await waiter
                has_lingered = False
            elif limit == 1 or has_lingered or self._has_batch:
                entries = self._lanes.take(limit)
                if has_lingered:
                    self.wake()  # the others have waited for that
                return entries
            else:
                await self._linger_alone()
                has_lingered = True
        return []

    async def _linger_alone(self) -> None:
        """Linger for all: what comes is one batch, and not one for each worker."""
        self._is_lingering = True
        try:
            await self._linger()
        finally:
            self._is_lingering = False

    def _begin(self, entries: Sequence[Entry[Handed]]) -> list[Handed]:
        """Return what may be begun; the rest is dropped, and comes again."""
        unit = []
        for entry in entries:
            if self._may_begin(entry.item[2]):
                unit.append(entry.item)
            else:
                self._drop(entry.item)
        return unit


def outlet_of(  # noqa: PLR0911 - one for each kind
    destination: Destination, caller: Caller, services: Services
) -> Outlet:
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
    if options.transactional is not None:
        return UnitOutlet(destination, caller, services)
    return PlainOutlet(destination, caller, services)


async def run_together(
    coroutines: Iterable[Coroutine[Any, Any, None]],
    *,
    on_failure: Callable[[], None],
    drain_seconds: float,
) -> None:
    """Run until all have returned, or one has failed and the others have finished.

    Args:
        coroutines: what to run.
        on_failure: called when one fails while others still run: they shall finish.
        drain_seconds: how long they may take for that.

    Raises:
        Exception: what one of them raised.
    """
    tasks = [asyncio.create_task(_watched(coroutine)) for coroutine in coroutines]
    try:
        _, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        if pending:
            on_failure()
            await asyncio.wait(pending, timeout=drain_seconds)
    finally:
        _told_to_end.update(tasks)
        for task in tasks:
            task.cancel()
        # One that swallows its cancellation for ever is left behind: `Outlet.is_busy`.
        await asyncio.wait(tasks, timeout=_CANCEL_SECONDS)
    for task in tasks:
        if task.done() and not task.cancelled():
            task.result()


async def _watched(coroutine: Coroutine[Any, Any, None]) -> None:
    try:
        await coroutine
    except asyncio.CancelledError:
        if _is_told_to_end():
            raise
        raise HandlerFailed(
            "a task that delivers was cancelled from outside",
            hint="a handler, or a library that it uses, cancels the task that has called it when"
            " the call is over",
        ) from None


_told_to_end: Final[WeakSet[asyncio.Task[None]]] = WeakSet()
"""Tasks that `run_together` has cancelled: any other cancellation is a handler's own."""


def _is_told_to_end() -> bool:
    return asyncio.current_task() in _told_to_end


def _keys(item: Item, columns: Sequence[str] | None) -> tuple[Key, ...]:
    """Return what an item is about; messages are in order per prefix."""
    if isinstance(item, Message):
        return ((f"message {item.prefix}", b"*"),)
    return keys_of(item, columns)


def _since(delay: _Delay) -> float:
    return delay.since


def _what(item: Item) -> str:
    return f"{'message' if isinstance(item, Message) else 'change'} {item.id}"


def _policy(entry: Handed) -> FailurePolicy:
    policy: FailurePolicy = entry[0].policy
    return policy
