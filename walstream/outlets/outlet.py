"""The base of all outlets: what waits for a destination, and until when."""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import ClassVar, Final

from walstream.acknowledger import Ticket
from walstream.calls import CallClock, Caller
from walstream.destinations import Destination
from walstream.flow import Halt, Handed
from walstream.outlets.admission import Admission
from walstream.outlets.attempts import Attempts, CutShort
from walstream.outlets.failures import Failures
from walstream.outlets.in_hand import Held, InHand
from walstream.outlets.services import Services
from walstream.outlets.share import OutletCounts, Share

MAX_CALLS_IN_A_ROW: Final = 100
"""Calls after which others get the loop, however little each of them waits itself."""


class Outlet(ABC):
    """What waits for one destination. Subclasses say what is given to it at once."""

    _admission_kind: ClassVar[type[Admission]] = Admission

    def __init__(
        self, destination: Destination, caller: Caller, services: Services, concurrency: int = 1
    ) -> None:
        self.destination = destination
        self.in_hand = InHand(destination, caller, concurrency)
        self._share = Share(services.flow)
        self._failures = Failures(services, self.in_hand, self._share)
        self._admission = self._admission_kind(services, self.in_hand, self._share, self._failures)
        self._attempts = Attempts(
            services, self.in_hand, self._share, self._admission, self._failures
        )
        self._services = services
        self._flow = services.flow
        self._options = self.in_hand.options
        self._waiting: deque[Handed] = deque()
        self._news = asyncio.Event()
        self._calls_in_a_row = 0
        self._has_let_go = False
        self.waits_for_batch = False

    def adopt(self, before: Outlet) -> None:
        """Take over from the outlet that led to the same destination before a reload.

        It counts on, and knows of a call that does not end when it is told to: that one must return
        before the destination is called again. The other outlet is of no use afterwards.
        """
        self._share.counts = before.counts
        self.in_hand.adopt(before.in_hand)

    @property
    def name(self) -> str:
        """Of the destination."""
        return self.destination.name

    @property
    def caller(self) -> Caller:
        """How the destination is called."""
        return self.in_hand.caller

    @property
    def clock(self) -> CallClock:
        """How long calls took."""
        return self.in_hand.clock

    @property
    def counts(self) -> OutletCounts:
        """What became of the changes."""
        return self._share.counts

    @property
    def wants_more(self) -> bool:
        """Whether it has not let go of everything."""
        return not self._has_let_go

    @property
    def is_busy(self) -> bool:
        """Whether a call goes on that does not end when it is told to."""
        return self.in_hand.is_busy

    @property
    def held(self) -> Held | None:
        """The call that lasts longest, if there is one."""
        return self.in_hand.held

    def stalled(self, now: float) -> tuple[float, str]:
        """Say how long it has been at the change that it has held longest, and why.

        That is a call, or all attempts with the pauses between them, or what comes before and after
        them. A batch that waits for more is not held up.

        Args:
            now: monotonic seconds.

        Returns:
            Seconds, and a sentence without a row's value; 0 and nothing when it is at nothing.
        """
        return self.in_hand.stalled(now)

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
        return self._share.in_flight

    def attach(self) -> None:
        """Forget what the last session has left: it comes again."""
        self._waiting.clear()
        self._news = asyncio.Event()
        self._share.attach()
        self._has_let_go = False
        self.in_hand.clear_unless_busy()

    def add(self, handed: Sequence[Handed]) -> None:
        """Let changes wait, in commit order."""
        if self._has_let_go:
            return
        self._share.add(handed)
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
        await self.in_hand.settle()
        self.in_hand.note_worker()
        self.in_hand.clear()
        try:
            await self._work()
        except CutShort:
            self._let_go()
        finally:
            self.in_hand.clear_unless_busy()

    @abstractmethod
    async def _work(self) -> None: ...

    def _let_go(self) -> None:
        """Begin nothing more, of what waits and of what is still to come.

        It comes again. The reader, which may be in the middle of a transaction, need not wait until
        there is room for it.
        """
        self._has_let_go = True
        self._waiting.clear()
        self._share.drop_all()

    # What subclasses use

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

    def _next(self, limit: int) -> list[Handed]:
        """Return what may be begun of the next changes."""
        waiting, share = self._waiting, self._share
        unit: list[Handed] = []
        begun: Ticket | None = None
        while waiting and len(unit) < limit:
            entry = waiting.popleft()
            ticket = entry[2]
            if ticket is begun or share.may_begin(ticket):
                begun = ticket
                unit.append(entry)
            else:
                share.drop(entry)
        return unit
