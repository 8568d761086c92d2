"""An eye on the slot: what it holds back on the server, and what is done when that is too much.

A slot that is not confirmed keeps WAL until the server's disk is full, which ends the database and
not only the stream. So the slot is looked at for the process' whole life, also while it cannot
connect for streaming or stands by, over the catalog's connection.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final

import msgspec
import structlog

from walstream.catalog import Catalog
from walstream.config import RetainedWalConfig
from walstream.errors import (
    RetainedWalExceeded,
    SlotBusy,
    SlotMissing,
    Unavailable,
    WalstreamError,
)
from walstream.lsn import ZERO
from walstream.slots import SlotStatus, drop_slot, slot_status
from walstream.vitals import SlotVitals

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.slot_watch")

INTERVAL_SECONDS: Final = 10.0
"""How often the slot is looked at."""

PATIENT_LOOKS: Final = 6
"""So many looks in a row may fail before it is said, where waiting may help."""

FREE_SECONDS: Final = 10.0
FREE_PAUSE_SECONDS: Final = 0.1
"""How long, and in which steps, it is waited for the walsender to let go of the slot."""


class SlotWatch:
    """Looks at a slot again and again, and applies the policy for retained WAL.

    ``policy`` may be replaced at any time; it holds from the next look on.
    """

    def __init__(
        self,
        catalog: Catalog,
        slot_name: str,
        policy: RetainedWalConfig,
        *,
        interval_seconds: float = INTERVAL_SECONDS,
    ) -> None:
        self._catalog = catalog
        self._slot_name = slot_name
        self.policy = policy
        self._interval_seconds = interval_seconds
        self._said: SlotVitals | None = None
        self._looked_at = 0.0
        self._failed_looks = 0
        self._warned_of_failure: str | None = None
        self._warned_of_bytes: int | None = None
        self._at_risk = False

    @property
    def vitals(self) -> SlotVitals | None:
        """What the server said last; None before that, and while there is no such slot."""
        if self._said is None:
            return None
        age_seconds = time.monotonic() - self._looked_at
        return msgspec.structs.replace(self._said, age_seconds=age_seconds)

    async def run(self) -> None:
        """Look until cancelled.

        A server that does not answer ends nothing here: the stream itself shows how it is. But it
        may go on while the catalog refuses, and then nobody applies the policy: that is said.

        Raises:
            RetainedWalExceeded: the slot retains more than the policy allows.
        """
        while True:
            try:
                await self.look()
            except RetainedWalExceeded:
                raise
            except SlotMissing as error:  # the server has answered
                log.debug("slot_look_failed", slot=self._slot_name, error=error.message)
                self._note_success()
            except WalstreamError as error:
                log.debug("slot_look_failed", slot=self._slot_name, error=error.message)
                self._note_failure(error)
            else:
                self._note_success()
            await asyncio.sleep(self._interval_seconds)

    async def look(self) -> None:
        """Look once, and apply the policy.

        Raises:
            RetainedWalExceeded: the slot retains more than the policy allows.
            WalstreamError: the server cannot be asked; ``vitals`` stay as they were.
        """
        try:
            status = await slot_status(self._catalog, self._slot_name)
        except SlotMissing:
            self._said = None
            raise
        self._said, self._looked_at = _vitals(status), time.monotonic()
        self._apply(status)

    async def drop(self) -> None:
        """Drop the slot, once nobody streams from it any more: what it still holds is lost.

        To be called when the session is over. Another process that watches the same slot may have
        been quicker.

        Raises:
            SlotBusy: another process goes on streaming from it.
            WalstreamError: the server cannot be reached, or refuses.
        """
        try:
            status = await self._freed()
            await drop_slot(self._catalog, self._slot_name)
        except SlotMissing:
            return
        self._said = None
        log.error(
            "slot_dropped",
            slot=self._slot_name,
            confirmed_flush_lsn=str(status.confirmed_flush_lsn),
            retained_wal_bytes=status.retained_wal_bytes,
            hint="what was committed after this position is not delivered: bring it over by other"
            " means, then walstream slot create",
        )

    def _note_failure(self, error: WalstreamError) -> None:
        """Warn once of each reason; of one that may pass by itself, when it has not for a while."""
        self._failed_looks += 1
        may_pass = isinstance(error, Unavailable)
        # Of what passes the words may change with each attempt.
        reason = type(error).__name__ if may_pass else error.message
        if reason == self._warned_of_failure or (may_pass and self._failed_looks < PATIENT_LOOKS):
            return
        self._warned_of_failure = reason
        log.warning(
            "slot_unwatched",
            slot=self._slot_name,
            error=error.message,
            hint="until dsn under [postgres] works again, [retained_wal] is not applied, and"
            " metrics of the slot are old",
        )

    def _note_success(self) -> None:
        self._failed_looks = 0
        if self._warned_of_failure is not None:
            self._warned_of_failure = None
            log.info("slot_watched_again", slot=self._slot_name)

    async def _freed(self) -> SlotStatus:
        """Wait until the walsender is gone, which outlives its connection by a moment."""
        deadline = time.monotonic() + FREE_SECONDS
        while (status := await slot_status(self._catalog, self._slot_name)).active:
            if time.monotonic() > deadline:
                message = f"the slot {self._slot_name} is in use by {status.holder}, not dropped"
                raise SlotBusy(message, hint="stop that process, or drop the slot by hand")
            await asyncio.sleep(FREE_PAUSE_SECONDS)
        return status

    def _apply(self, status: SlotStatus) -> None:
        retained_bytes = status.retained_wal_bytes
        if retained_bytes is not None:
            self._refuse(retained_bytes, status)
            self._warn(retained_bytes, status)
        self._warn_of_loss(status)

    def _refuse(self, retained_bytes: int, status: SlotStatus) -> None:
        policy = self.policy
        said = (
            f"the slot {self._slot_name} retains {retained_bytes} bytes of WAL"
            f" ({status.lag_bytes} of them not confirmed)"
        )
        if policy.drop_slot_at_bytes is not None and retained_bytes >= policy.drop_slot_at_bytes:
            raise RetainedWalExceeded(
                f"{said}; it is dropped at {policy.drop_slot_at_bytes}, as the configuration says",
                hint="bring what it held over by other means, then walstream slot create",
                drop=True,
            )
        if policy.stop_at_bytes is not None and retained_bytes >= policy.stop_at_bytes:
            raise RetainedWalExceeded(
                f"{said}; stop_at_bytes under [retained_wal] is {policy.stop_at_bytes}",
                hint=f"{_why(status)}; to let walstream catch up, start it with a higher"
                " WALSTREAM_RETAINED_WAL_STOP_AT_BYTES; to give the changes up, walstream slot drop"
                " and walstream slot create, then start with --accept-gap",
            )

    def _warn(self, retained_bytes: int, status: SlotStatus) -> None:
        """Warn when the limit is crossed, and again each time that the amount has doubled."""
        limit, before = self.policy.warn_at_bytes, self._warned_of_bytes
        if limit is None:
            return
        if retained_bytes >= (limit if before is None else 2 * before):
            self._warned_of_bytes = retained_bytes
            log.warning(
                "retained_wal_high",
                slot=self._slot_name,
                retained_wal_bytes=retained_bytes,
                lag_bytes=status.lag_bytes,
                warn_at_bytes=limit,
                hint=_why(status),
            )
        elif before is not None and retained_bytes < limit:
            self._warned_of_bytes = None
            log.info("retained_wal_normal", slot=self._slot_name, retained_wal_bytes=retained_bytes)

    def _warn_of_loss(self, status: SlotStatus) -> None:
        """Warn once when the server is about to give the slot up."""
        was_at_risk, self._at_risk = self._at_risk, status.is_at_risk
        if self._at_risk and not was_at_risk:
            log.warning(
                "slot_at_risk",
                slot=self._slot_name,
                wal_status=status.wal_status,
                safe_wal_size_bytes=status.safe_wal_size_bytes,
                retained_wal_bytes=status.retained_wal_bytes,
                hint="the server gives the slot up beyond max_slot_wal_keep_size, and the changes"
                " with it: raise it, a reload is enough",
            )
        elif was_at_risk and not self._at_risk:
            log.info("slot_safe_again", slot=self._slot_name, wal_status=status.wal_status)


def _vitals(status: SlotStatus) -> SlotVitals:
    return SlotVitals(
        confirmed_flush_lsn=status.confirmed_flush_lsn or ZERO,
        restart_lsn=status.restart_lsn,
        wal_status=status.wal_status,
        lag_bytes=status.lag_bytes,
        retained_wal_bytes=status.retained_wal_bytes,
        safe_wal_size_bytes=status.safe_wal_size_bytes,
        spilled_transactions=status.spilled_transactions,
        spills=status.spills,
        spilled_bytes=status.spilled_bytes,
    )


def _why(status: SlotStatus) -> str:
    """Say where to look: behind us, or at a transaction that the server cannot forget."""
    retained_bytes, lag_bytes = status.retained_wal_bytes or 0, status.lag_bytes or 0
    if lag_bytes < retained_bytes / 2:
        return (
            "most of it is confirmed: the server lets go of it when it next logs which transactions"
            " run, within a minute of writes, unless one runs for long; see"
            " pg_stat_activity.xact_start and pg_prepared_xacts"
        )
    if not status.active:
        return "nobody streams from the slot at this moment"
    return "changes come faster than they are taken: see which destination is slow or fails"
