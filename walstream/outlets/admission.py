"""What comes before a call: is a change parked, is it applied, is it visible, does it fit."""

from __future__ import annotations

from collections.abc import Sequence

from walstream.changes import Change
from walstream.destinations import Item
from walstream.errors import DeliveryError, StreamBroken
from walstream.flow import Handed
from walstream.keys import conflict
from walstream.outlets.failures import Failures
from walstream.outlets.in_hand import InHand
from walstream.outlets.items import keys_of_item, parts_of
from walstream.outlets.services import Services
from walstream.outlets.share import Share


class _Behind(Exception):
    """What is about to be put aside has to wait for a change of its row that is not called yet."""


class Admission:
    """Says what of the changes whose turn it is a destination is called with."""

    def __init__(
        self, services: Services, in_hand: InHand, share: Share, failures: Failures
    ) -> None:
        self._services = services
        self._options = in_hand.options
        self._in_hand = in_hand
        self._share = share
        self._failures = failures
        self._visible_xid = 0

    async def admit_all(self, unit: list[Handed]) -> tuple[list[Handed], list[Item], list[Handed]]:
        """Return what is called for at once, what it is called with, and the rest.

        The rest begins with a change that is likely to stop the stream, or is to be put aside and
        is about the same row as one before: what is before it is delivered first.

        Raises:
            DeliveryError: the first change stops the stream.
        """
        if not self._has_conditions:
            return unit, [entry[1] for entry in unit], []
        admitted: list[Handed] = []
        items: list[Item] = []
        for place, entry in enumerate(unit):
            try:
                item = await self.admit(entry, admitted)
            except (DeliveryError, _Behind):
                if not admitted:
                    raise
                return admitted, items, unit[place:]
            if item is not None:
                admitted.append(entry)
                items.append(item)
        return admitted, items, []

    async def admit(self, entry: Handed, before: Sequence[Handed] = ()) -> Item | None:
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
        await self.wait_until_visible(entry[1])
        item = self.modelled(entry[1])
        if isinstance(item, Exception):
            self._verify_first(entry, before)
            await self._failures.put_aside([entry], item, 1)
            return None
        return item

    async def wait_until_visible(self, item: Item) -> None:
        """Wait until other sessions see a change's transaction, if the handler wants that."""
        if not self._options.visible:
            return
        transaction = item.transaction
        if transaction is not None and transaction.xid != self._visible_xid:
            with self._in_hand.delayed(item, "until other sessions see it"):
                await self._services.wait_until_visible(transaction.xid)
            self._visible_xid = transaction.xid

    def modelled(self, item: Item) -> Item | Exception:
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

    @property
    def _has_conditions(self) -> bool:
        """Whether `admit` has anything to do."""
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
        parts = parts_of(unit, self._options.key)
        if not any(parking.may_block(route, keys) for route, _, keys in parts):
            return False
        for entry in unit:
            self._verify_first(entry, before)
        # What a transactional handler has applied comes again after a crash: parked, a replay would
        # apply it once more. Where the letters are gone, a replay may just have applied it.
        with self._in_hand.delayed(unit[0][1], "it is being parked"):
            if await self._is_applied(unit):
                return True
            if not await parking.park(parts):
                return await self._is_applied(unit)
        self._share.counts.parked += len(unit)
        self._share.take(unit)
        return True

    def _verify_first(self, entry: Handed, before: Sequence[Handed]) -> None:
        key = self._options.key
        keys = keys_of_item(entry[1], key)
        if any(conflict(keys, keys_of_item(item, key)) for _, item, _, _ in before):
            raise _Behind

    async def _is_applied(self, unit: Sequence[Handed]) -> bool:
        """Whether it is recorded that changes were applied; then they are taken."""
        for _, item, _, _ in unit:
            if not await self._in_hand.caller.has_applied(item):
                return False
        self._share.counts.redelivered += len(unit)
        self._share.delivered(unit)
        return True


class TransactionAdmission(Admission):
    """Admits a transaction as a whole, or nothing when one of its changes cannot be called."""

    async def admit_all(self, unit: list[Handed]) -> tuple[list[Handed], list[Item], list[Handed]]:
        """Return all of the unit and no rest, or nothing when all of it is taken."""
        if not self._has_conditions:
            return unit, [entry[1] for entry in unit], []
        if await self._is_parked(unit):
            return [], [], []
        items: list[Item] = []
        for _, as_routed, _, _ in unit:
            await self.wait_until_visible(as_routed)
            item = self.modelled(as_routed)
            if isinstance(item, Exception):
                await self._failures.put_aside(unit, item, 1, as_routed)
                return [], [], []
            items.append(item)
        return unit, items, []
