"""Handlers that take one change after another."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from walstream.acknowledger import Ticket
from walstream.calls import PASSING, QUICK_SECONDS, Slot, ThreadCaller, verify_finished
from walstream.destinations import Handler, Item
from walstream.flow import Halt, Handed
from walstream.outlets.outlet import Outlet
from walstream.outlets.together import settle_cancellation

MAX_ASYNC_RUN: Final = 1000
"""Calls of an async handler after which others get the loop, however little it waits itself."""

MAX_SYNC_RUN: Final = 100
"""Changes that a sync handler gets in one visit to its thread; in between the loop takes stock."""


class PlainOutlet(Outlet):
    """An ``async def`` handler that takes one change after another: the shortest way there is."""

    async def _work(self) -> None:
        slot = self.in_hand.slots[0]
        slot.task = asyncio.current_task()
        parking = self._services.parking
        while await self._more():
            # A handler has one route; letters of others are none of its business.
            if parking is not None and parking.has_letters(self._waiting[0][0].name):
                for entry in self._next(1):
                    await self._attempts.deliver([entry], slot)
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
        share, admission, clock = self._share, self._admission, self.in_hand.clock
        quick = clock.counts
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
                if not share.may_begin(ticket):
                    share.drop(entry)
                    continue
                if visible:
                    await admission.wait_until_visible(item)
                since = monotonic()
            if model is not None:
                slot.item = None
                modelled = admission.modelled(item)
                if isinstance(modelled, Exception):
                    if count:
                        self._called(current, count, size_bytes)
                    await self._failures.put_aside([entry], modelled, 1)
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
                await settle_cancellation()
                await self._attempts.recover([entry], [item], error, slot)
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
        await settle_cancellation()

    def _called(self, ticket: Ticket, count: int, size_bytes: int) -> None:
        share = self._share
        share.counts.delivered += count
        share.took(ticket, count, size_bytes)


class ThreadOutlet(Outlet):
    """A ``def`` handler that takes one change after another: several in a visit to its thread."""

    async def _work(self) -> None:
        slot = self.in_hand.slots[0]
        while await self._more():
            unit, items, rest = await self._admission.admit_all(self._next_run())
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
        self._share.delivered(unit[:done])
        is_failed = error is not None
        self._waiting.extendleft(reversed(unit[done + is_failed :]))
        if error is not None:
            await self._attempts.recover([unit[done]], [items[done]], error, slot)

    def _may_go_on(self) -> bool:
        return self._flow.halt is not Halt.FINISH_CALLS
