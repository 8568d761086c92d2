"""The calls for one unit: the first one, further ones when it fails, and giving up."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from typing import Final

import structlog

from walstream.calls import PASSING, Slot
from walstream.destinations import Handler, Item
from walstream.errors import (
    OutputClosed,
    RowInvalid,
    SinkFailed,
    SinkRefused,
    TargetUnavailable,
    TransactionTooLarge,
)
from walstream.flow import Halt, Handed
from walstream.outlets.admission import Admission
from walstream.outlets.failures import Failures
from walstream.outlets.in_hand import InHand
from walstream.outlets.items import policy_of
from walstream.outlets.services import Services
from walstream.outlets.share import Share
from walstream.outlets.together import is_told_to_end, settle_cancellation
from walstream.policy import FailurePolicy, OnFailure

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.delivery")

_SAME_AGAIN: Final = (RowInvalid, SinkRefused, TransactionTooLarge)
"""The same change would fail the same way: no further attempt, then the policy."""


class CutShort(Exception):
    """All is halted: what is being tried again is not waited for, and comes again."""


class Attempts:
    """Calls a destination for what it is given, until all of that is taken."""

    def __init__(
        self,
        services: Services,
        in_hand: InHand,
        share: Share,
        admission: Admission,
        failures: Failures,
    ) -> None:
        self._flow = services.flow
        self._describe = services.describe
        self._in_hand = in_hand
        self._share = share
        self._admission = admission
        self._failures = failures

    async def deliver(self, unit: list[Handed], slot: Slot) -> None:
        """Call with all of a unit at once; afterwards all of it is taken.

        Raises:
            DeliveryError: it is not, and the policy is to stop.
            CutShort: it is not, because all is halted.
            asyncio.CancelledError: the task was cancelled, whatever the handler made of that.
        """
        while unit:
            admitted, items, unit = await self._admission.admit_all(unit)
            if not admitted:
                return
            error = await self._try(items, slot)
            if error is None:
                self._share.delivered(admitted)
            else:
                await self.recover(admitted, items, error, slot)

    async def recover(
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

        Raises:
            DeliveryError: the unit is not taken, and the policy is to stop.
            CutShort: it is not, because all is halted.
        """
        tries = _Tries(policy_of(unit[0]), attempts, slot.since)
        with self._in_hand.delayed(items[0], "", slot.since) as delay:
            while True:
                pause = tries.pause_after(error, is_final=self._is_last(error))
                delay.note = tries.note
                if pause is None:
                    break
                self._tell_retry(items[0], tries.count, pause, error)
                if not await self._flow.pause(pause):
                    raise CutShort
                tries.begin_next()
                delay.note = tries.note
                again = await self._try(items, slot)
                if again is None:
                    self._share.delivered(unit)
                    return
                error = again
        await self._give_up(unit, items, error, tries.count, slot)

    def _is_last(self, error: BaseException) -> bool:
        """Whether a further attempt is of no use."""
        return self._failures.is_final(error) or isinstance(error, _SAME_AGAIN)

    async def _try(self, items: Sequence[Item], slot: Slot) -> BaseException | None:
        """Call once; return what it raised."""
        slot.begin(items[0])
        try:
            redelivered, error = await self._in_hand.caller.call(items, slot)
        except PASSING:
            raise
        except BaseException as raised:
            await settle_cancellation()
            if not isinstance(self._in_hand.destination, Handler) and not isinstance(
                raised, OSError | SinkFailed | OutputClosed | asyncio.CancelledError
            ):
                raise  # a sink's own mistake
            slot.end()
            return raised
        slot.end()
        self._share.counts.redelivered += redelivered
        if not is_told_to_end():  # what it has taken by returning is told first
            await settle_cancellation()
        return error

    def _tell_retry(
        self, item: Item, attempt: int, pause_seconds: float, error: BaseException
    ) -> None:
        self._share.counts.retries += 1
        log.warning(
            "delivery_retried",
            destination=self._in_hand.destination.name,
            change=item.id,
            attempt=attempt,
            pause_seconds=round(pause_seconds, 3),
            error=self._describe(error),
        )

    async def _give_up(
        self,
        unit: list[Handed],
        items: list[Item],
        error: BaseException,
        attempts: int,
        slot: Slot,
    ) -> None:
        """Do with a unit that was not taken what the policy says; each change by itself."""
        if self._failures.is_final(error):
            raise self._failures.failure(items[0], error, attempts)
        if len(unit) == 1 or self._in_hand.options.transactions:
            await self._failures.put_aside(unit, error, attempts)
            return
        if all(policy_of(entry).on_failure is OnFailure.STOP for entry in unit):
            raise self._failures.failure(items[0], error, attempts)
        for entry in unit:
            if self._flow.halt is Halt.FINISH_CALLS:
                raise CutShort
            await self._deliver_alone(entry, attempts, slot)

    async def _deliver_alone(self, entry: Handed, attempts: int, slot: Slot) -> None:
        """Deliver one change of a unit that was not taken; its attempts count on."""
        # Of two changes of one row the second one is parked once the first one has failed.
        item = await self._admission.admit(entry)
        if item is None:
            return
        self._share.counts.retries += 1
        error = await self._try([item], slot)
        if error is None:
            self._share.delivered([entry])
        else:
            await self.recover([entry], [item], error, slot, attempts + 1)


class _Tries:
    """How often a unit was tried, and since when; ``note`` says where that stands.

    That the database of a transactional handler is away is not the change's fault: it is waited
    out, and is no attempt.
    """

    def __init__(self, policy: FailurePolicy, count: int, since: float) -> None:
        self.count = count
        self.note = ""
        self._policy = policy
        self._since = since
        self._is_outage = False
        self._outages = 0

    def pause_after(self, error: BaseException, *, is_final: bool) -> float | None:
        """Return the pause before the next attempt; None when there is none.

        Args:
            error: what the last one raised.
            is_final: whether a further one is of no use.
        """
        policy = self._policy
        self._is_outage = isinstance(error, TargetUnavailable)
        if self._is_outage:
            self.count -= 1
            self._outages += 1
            self.note = "its database cannot be used"
            return policy.backoff.pause_seconds(self._outages)
        self.note = f"{self.count}{_of_how_many(policy)} attempts failed"
        if is_final:
            return None
        return policy.pause_seconds(self.count, error, time.monotonic() - self._since)

    def begin_next(self) -> None:
        """The pause is over."""
        if self._is_outage:
            self._since = time.monotonic()
        self.count += 1
        self.note = f"attempt {self.count}{_of_how_many(self._policy)}"


def _of_how_many(policy: FailurePolicy) -> str:
    """Say how many there may be, unless it is tried without end, as for clients by HTTP."""
    return "" if policy.attempts == sys.maxsize else f" of {policy.attempts}"
