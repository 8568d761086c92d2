"""What is done with changes that no attempt delivered: stop, skip them, or keep them."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Final

import structlog

from walstream.calls import NotRun
from walstream.destinations import Handler, Item
from walstream.errors import (
    DeliveryError,
    HandlerFailed,
    OutputClosed,
    SetupError,
    SinkFailed,
    TransactionBroken,
    WalstreamError,
)
from walstream.flow import Handed
from walstream.outlets.in_hand import InHand
from walstream.outlets.items import parts_of, policy_of
from walstream.outlets.services import Services
from walstream.outlets.share import Share
from walstream.policy import OnFailure

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.delivery")

_COMES_AGAIN: Final = (
    "the slot was not moved past its transaction, and the change comes again with the same id"
)


class Failures:
    """Does what the policy of a route says."""

    def __init__(self, services: Services, in_hand: InHand, share: Share) -> None:
        self._parking = services.parking
        self._describe = services.describe
        self._in_hand = in_hand
        self._share = share

    async def put_aside(
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
        item = unit[0][1] if failed is None else failed
        on_failure = policy_of(unit[0]).on_failure
        if on_failure is OnFailure.STOP:
            raise self.failure(item, error, attempts)
        if on_failure is OnFailure.SKIP:
            self._skip(unit, item, error, attempts)
        else:
            await self._keep(unit, item, error, attempts)
        self._share.take(unit)

    def failure(self, item: Item, error: BaseException, attempts: int) -> WalstreamError:
        """Return what stops the stream."""
        if isinstance(error, OutputClosed | SetupError) and self.is_final(error):
            return error
        destination = self._in_hand.destination
        kind: type[DeliveryError] = (
            HandlerFailed if isinstance(destination, Handler) else SinkFailed
        )
        if isinstance(error, NotRun):
            why = f": {error.message}"
        else:
            times = f"in {attempts} attempts" if attempts > 1 else "in its only attempt"
            why = f" {times}: {self._describe(error)}"
        hint = error.hint if isinstance(error, WalstreamError) else ""
        failure = kind(
            f"{destination.name} did not take change {item.id}{why}",
            hint=f"{hint or 'mend the cause and start again'}; {_COMES_AGAIN}",
        )
        failure.__cause__ = error
        return failure

    def is_final(self, error: BaseException) -> bool:
        """Whether no attempt and no other change would fare better: the stream stops.

        A handler may raise errors of ours too, perhaps because it uses walstream: these are as any.
        """
        if isinstance(self._in_hand.destination, Handler):
            of_target = isinstance(error, SetupError | TransactionBroken)
            return isinstance(error, NotRun) or (of_target and self._is_transactional)
        return isinstance(error, OutputClosed)

    @property
    def _is_transactional(self) -> bool:
        return self._in_hand.options.transactional is not None

    def _skip(
        self, unit: Sequence[Handed], item: Item, error: BaseException, attempts: int
    ) -> None:
        self._share.counts.skipped += len(unit)
        log.error(
            "change_skipped",
            route=unit[0][0].name,
            change=item.id,
            changes=len(unit),
            attempts=attempts,
            error=self._describe(error),
        )

    async def _keep(
        self, unit: Sequence[Handed], item: Item, error: BaseException, attempts: int
    ) -> None:
        assert self._parking is not None  # noqa: S101 - made when a route asks for it
        described = self._describe(error)
        trace = "".join(traceback.format_tb(error.__traceback__))
        parts = parts_of(unit, self._in_hand.options.key)
        with self._in_hand.delayed(item, "it is put into the dead-letter store"):
            await self._parking.put_aside(parts, attempts, described, trace)
        self._share.counts.dead_lettered += len(unit)
        log.error(
            "change_dead_lettered",
            route=unit[0][0].name,
            change=item.id,
            changes=len(unit),
            attempts=attempts,
            error=described,
        )
