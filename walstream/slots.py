"""The replication slot: creating, dropping, looking at, and advancing it."""

from __future__ import annotations

import asyncio
from typing import Final

import msgspec
import structlog
from psycopg import sql

from walstream.catalog import Catalog, Server
from walstream.connection import CreatedSlot, ReplicationConnection
from walstream.errors import (
    DatabaseUnfit,
    SlotBusy,
    SlotCreationBlocked,
    SlotLost,
    SlotMissing,
    SlotUnfit,
    UsageError,
)
from walstream.lsn import Lsn

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.slots")

PLUGIN: Final = "wal2json"

CREATE_WAIT_SECONDS: Final = 10
"""How long the creation of a slot waits for transactions that were running before it."""

STANDBY_CREATE_WAIT_SECONDS: Final = 30
"""How long it waits on a standby for the primary to say which transactions run.

A primary that is being written to says so every 15 seconds, an idle one does not.
"""

FAILOVER_VERSION: Final = 170_000
"""The first version whose standbys keep copies of slots."""

AT_RISK_FRACTION: Final = 0.1
"""So little of max_slot_wal_keep_size left is a risk."""


class Holder(msgspec.Struct, frozen=True):
    """Who streams from a slot. Without the rights of pg_monitor only the PID is known."""

    pid: int
    application_name: str | None
    client_address: str | None

    def __str__(self) -> str:
        """Print for an error message."""
        application = f", application {self.application_name}" if self.application_name else ""
        address = f", address {self.client_address}" if self.client_address else ""
        return f"PID {self.pid}{application}{address}"


class SlotStatus(msgspec.Struct, frozen=True):
    """What the server's views say of a slot; sizes in bytes.

    None is what the server's version does not tell. ``failover`` says that standbys keep a copy,
    ``synced`` that this is one. ``spilled_bytes`` is what was written to disk because
    ``logical_decoding_work_mem`` did not hold it, since the slot's statistics were reset.
    """

    name: str
    plugin: str | None
    database: str | None
    temporary: bool
    active: bool
    holder: Holder | None
    restart_lsn: Lsn | None
    confirmed_flush_lsn: Lsn | None
    wal_status: str | None
    safe_wal_size_bytes: int | None
    retained_wal_bytes: int | None
    lag_bytes: int | None
    invalidation_reason: str | None
    max_slot_wal_keep_size_bytes: int | None = None
    failover: bool | None = None
    synced: bool | None = None
    spilled_transactions: int | None = None
    spills: int | None = None
    spilled_bytes: int | None = None

    @property
    def is_at_risk(self) -> bool:
        """Whether the server is about to give the slot up, and the changes with it."""
        safe, keep = self.safe_wal_size_bytes, self.max_slot_wal_keep_size_bytes
        if self.wal_status == "unreserved":
            return True
        return safe is not None and keep is not None and safe < keep * AT_RISK_FRACTION


async def slot_status(catalog: Catalog, name: str) -> SlotStatus:
    """Look at a slot.

    Raises:
        SlotMissing: there is none of that name.
    """
    rows = await catalog.rows(_STATUS, {"name": name})
    if not rows:
        message = f"the replication slot {name} does not exist"
        raise SlotMissing(
            message, hint=f"walstream slot create --name {name}, or create = true under [slot]"
        )
    (
        plugin, database, temporary, active, pid, application_name, client_address,
        restart, confirmed, wal_status, safe, retained, lag, reason, keep, failover, synced,
        spilled_transactions, spills, spilled_bytes,
    ) = rows[0]  # fmt: skip
    return SlotStatus(
        name=name,
        plugin=plugin,
        database=database,
        temporary=temporary,
        active=active,
        holder=None if pid is None else Holder(pid, application_name, client_address),
        restart_lsn=Lsn.parse(restart) if restart else None,
        confirmed_flush_lsn=Lsn.parse(confirmed) if confirmed else None,
        wal_status=wal_status,
        safe_wal_size_bytes=safe,
        retained_wal_bytes=retained,
        lag_bytes=lag,
        invalidation_reason=reason,
        max_slot_wal_keep_size_bytes=keep,
        failover=failover,
        synced=synced,
        spilled_transactions=spilled_transactions,
        spills=spills,
        spilled_bytes=spilled_bytes,
    )


async def usable_slot(catalog: Catalog, name: str) -> SlotStatus:
    """Look at a slot that is to be streamed from, and refuse one that cannot be.

    Raises:
        SlotMissing, SlotUnfit, SlotLost, SlotBusy: as it is.
    """
    status = await slot_status(catalog, name)
    ((database, in_recovery),) = await catalog.rows(
        sql.SQL("SELECT current_database(), pg_is_in_recovery()")
    )
    if status.plugin != PLUGIN:
        kind = f"made for the plugin {status.plugin}" if status.plugin else "a physical one"
        message = f"the slot {name} is {kind}, not for {PLUGIN}"
        raise SlotUnfit(message, hint="choose another name under [slot]")
    if status.database != database:
        message = f"the slot {name} belongs to the database {status.database}, not to {database}"
        raise SlotUnfit(message, hint="choose another name under [slot], or another dsn")
    if status.wal_status == "lost":
        reason = f" ({status.invalidation_reason})" if status.invalidation_reason else ""
        message = f"the slot {name} is lost{reason}: changes that it had to keep are gone"
        raise SlotLost(
            message,
            hint=f"walstream slot drop --name {name}, create it again, bring what is missing over"
            " by other means, and start with --accept-gap where a state file is kept;"
            " max_slot_wal_keep_size bounds what a slot may retain",
        )
    if status.synced and in_recovery:
        message = f"the slot {name} is this standby's copy of the primary's until it is promoted"
        raise SlotBusy(
            message, hint="connect to the primary: target_session_attrs=read-write in the dsn"
        )
    if status.active:
        message = f"the slot {name} is in use by {status.holder}"
        raise SlotBusy(
            message,
            hint="stop that process, or wait until it ends",
            confirmed_flush_lsn=status.confirmed_flush_lsn,
        )
    return status


async def create_slot(
    connection: ReplicationConnection,
    catalog: Catalog,
    name: str,
    *,
    temporary: bool = False,
    failover: bool = False,
    wait_seconds: int = CREATE_WAIT_SECONDS,
) -> CreatedSlot:
    """Create a slot for wal2json.

    Raises:
        SlotCreationBlocked: transactions that were running before did not end in time; or, on a
            standby, the primary did not say in time which ones run.
        DatabaseUnfit: the server knows no failover slots.
        PluginMissing, PluginRefused, SlotExhausted, SlotBusy: as the server says.
    """
    server = await catalog.server()
    if failover:
        verify_failover(server)
    try:
        # A standby waits for a record in the WAL, which no lock_timeout ends.
        async with asyncio.timeout(STANDBY_CREATE_WAIT_SECONDS if server.in_recovery else None):
            created = await connection.create_slot(
                name, temporary=temporary, failover=failover, lock_timeout_seconds=wait_seconds
            )
    except TimeoutError:
        message = (
            "the slot's creation on a standby waits for the primary to say which transactions run"
        )
        raise SlotCreationBlocked(
            message, hint="SELECT pg_log_standby_snapshot() on the primary, and try again"
        ) from None
    except SlotCreationBlocked as blocked:
        blockers = await catalog.rows(_BLOCKERS)
        listed = ", ".join(f"{who} since {since}" for who, since in blockers) or "none is left now"
        message = f"{blocked.message}: {listed}"
        raise SlotCreationBlocked(message, hint="end these transactions, or try again") from None
    log.info(
        "slot_created",
        slot=name,
        temporary=temporary,
        failover=failover,
        position=str(created.consistent_point),
    )
    return created


def verify_failover(server: Server) -> None:
    """Refuse a server on which no slot can be made that standbys keep a copy of.

    Raises:
        DatabaseUnfit: its version, or that it is a standby itself.
    """
    hint = "leave out failover = true under [slot], or --failover"
    if server.version < FAILOVER_VERSION:
        message = (
            f"the server is PostgreSQL {server.version // 10_000}; failover slots need"
            f" {FAILOVER_VERSION // 10_000} or later"
        )
        raise DatabaseUnfit(message, hint=hint)
    if server.in_recovery:
        message = "the server is a standby, and failover slots are those of a primary"
        raise DatabaseUnfit(message, hint=hint)


def note_failover(status: SlotStatus) -> None:
    """Warn when a slot that is there is not the failover slot that the configuration wishes.

    Raises:
        DatabaseUnfit: the server knows no failover slots.
    """
    if status.failover is None:
        message = f"failover slots need PostgreSQL {FAILOVER_VERSION // 10_000} or later"
        raise DatabaseUnfit(message, hint="leave out failover = true under [slot]")
    if not status.failover:
        log.warning(
            "slot_without_failover",
            slot=status.name,
            hint="standbys keep no copy of it, a failover loses it; while nobody streams from it:"
            f" walstream slot alter --failover --name {status.name}",
        )


async def alter_slot(
    connection: ReplicationConnection, catalog: Catalog, name: str, *, failover: bool
) -> None:
    """Let standbys keep a copy of a slot that nobody streams from, or not any more.

    Raises:
        DatabaseUnfit: the server knows no failover slots.
        SlotMissing, SlotUnfit, SlotLost, SlotBusy: as it is.
    """
    verify_failover(await catalog.server())
    await usable_slot(catalog, name)
    await connection.alter_slot(name, failover=failover)


async def drop_slot(catalog: Catalog, name: str) -> None:
    """Drop a slot that nobody streams from; the server may then remove the WAL it retained.

    Raises:
        SlotMissing: there is none of that name.
        SlotBusy: somebody streams from it.
    """
    status = await slot_status(catalog, name)
    if status.active:
        message = f"the slot {name} is in use by {status.holder} and cannot be dropped"
        raise SlotBusy(message, hint="stop that process first")
    await catalog.rows(sql.SQL("SELECT pg_drop_replication_slot(%(name)s)"), {"name": name})


async def advance_slot(catalog: Catalog, name: str, to: Lsn) -> Lsn:
    """Move a slot forward without reading what lies between: those changes are given up.

    Returns:
        Where the slot stands now.

    Raises:
        UsageError: ``to`` lies before the slot's position, or beyond the server's.
        SlotMissing, SlotUnfit, SlotLost, SlotBusy: as it is.
    """
    status = await usable_slot(catalog, name)
    server = await catalog.server()
    confirmed = status.confirmed_flush_lsn or Lsn(0)
    if not confirmed <= to <= server.flush_lsn:
        message = (
            f"the slot {name} can be advanced from {confirmed} to {server.flush_lsn} at most,"
            f" not to {to}"
        )
        raise UsageError(message)
    (row,) = await catalog.rows(
        sql.SQL("SELECT end_lsn::text FROM pg_replication_slot_advance(%(name)s, %(to)s::pg_lsn)"),
        {"name": name, "to": str(to)},
    )
    return Lsn.parse(row[0])


_STATUS: Final = sql.SQL(
    """
    SELECT s.plugin, s.database, s.temporary, s.active, s.active_pid,
           a.application_name, a.client_addr::text,
           s.restart_lsn::text, s.confirmed_flush_lsn::text, s.wal_status, s.safe_wal_size,
           pg_wal_lsn_diff(here.lsn, s.restart_lsn)::bigint,
           pg_wal_lsn_diff(here.lsn, s.confirmed_flush_lsn)::bigint,
           coalesce(to_jsonb(s) ->> 'invalidation_reason',
                    CASE WHEN to_jsonb(s) ->> 'conflicting' = 'true' THEN 'conflicting' END),
           nullif(pg_size_bytes(current_setting('max_slot_wal_keep_size')), -1),
           (to_jsonb(s) ->> 'failover')::boolean, (to_jsonb(s) ->> 'synced')::boolean,
           t.spill_txns, t.spill_count, t.spill_bytes
      FROM pg_replication_slots s
      LEFT JOIN pg_stat_activity a ON a.pid = s.active_pid
      LEFT JOIN pg_stat_replication_slots t ON t.slot_name = s.slot_name
     CROSS JOIN (SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn()
                             ELSE pg_current_wal_lsn() END AS lsn) here
     WHERE s.slot_name = %(name)s
    """
)

_BLOCKERS: Final = sql.SQL(
    """
    SELECT format('PID %s (%s)', pid, coalesce(nullif(application_name, ''), 'no name')),
           date_trunc('second', xact_start)::text
      FROM pg_stat_activity
     WHERE backend_xid IS NOT NULL AND pid <> pg_backend_pid()
     UNION ALL
    SELECT format('prepared transaction %s', gid), date_trunc('second', prepared)::text
      FROM pg_prepared_xacts
     ORDER BY 2
    """
)
