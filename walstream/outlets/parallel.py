"""Handlers that are called in parallel."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

from walstream.calls import Caller, Slot
from walstream.destinations import Handler
from walstream.flow import Halt, Handed
from walstream.lanes import Entry, Lanes
from walstream.outlets.attempts import CutShort
from walstream.outlets.items import keys_of_item
from walstream.outlets.outlet import Outlet
from walstream.outlets.services import Services
from walstream.outlets.together import run_together


class LaneOutlet(Outlet):
    """A handler that is called in parallel, in order per key."""

    def __init__(self, destination: Handler, caller: Caller, services: Services) -> None:
        super().__init__(destination, caller, services, destination.options.concurrency)
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
        self._share.add(handed)
        key = self._options.key
        for entry in handed:
            self._lanes.add(entry, keys_of_item(entry[1], key))
        self.wake()

    def wake(self) -> None:
        """Wake as many workers as there is work for; all when there will be no more."""
        if self._is_lingering:
            self._news.set()
            if not self._is_over:
                return  # the one that lingers wakes the others
        if not self._idle:
            return
        count = len(self.in_hand.slots) if self._is_over else self._lanes.ready
        while self._idle and count > 0:
            waiter = self._idle.popleft()
            if not waiter.done():
                waiter.set_result(None)
                count -= 1

    async def _work(self) -> None:
        self._busy = 0
        await run_together(
            [self._work_in_lanes(slot) for slot in self.in_hand.slots],
            on_failure=self._fail,
            drain_seconds=self._services.drain_seconds,
        )
        if self._is_cut_short:
            raise CutShort

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
        self.in_hand.note_worker()
        while entries := await self._next_entries():
            self._busy += 1
            try:
                if unit := self._begin(entries):
                    await self._attempts.deliver(unit, slot)
                self._lanes.done(entries)
            except CutShort:
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
            if self._share.may_begin(entry.item[2]):
                unit.append(entry.item)
            else:
                self._share.drop(entry.item)
        return unit
