"""The slot: whether it can be streamed from, where it stands, and what it costs the server."""

from __future__ import annotations

from typing import Final

from psycopg import sql

from walstream.check.findings import (
    RELOAD,
    Outcome,
    duration,
    identifier,
    in_words,
    literal,
    ok,
    problem,
    size,
    skipped,
    warning,
)
from walstream.check.site import Question, Site
from walstream.errors import SlotBusy, SlotLost, SlotMissing, SlotUnfit
from walstream.slots import FAILOVER_VERSION, PLUGIN, slot_status, usable_slot

SPILLED_FRACTION: Final = 0.1
"""So much of what was decoded may go through the disk."""

OLD_XMIN: Final = 200_000_000
"""At this age, the default of autovacuum_freeze_max_age, what holds back vacuum is noticed."""


async def _state(site: Site) -> Outcome:
    name = site.slot_name
    try:
        status = await slot_status(site.catalog, name)
    except SlotMissing as missing:
        if site.config.slot.create:  # whether it was there before is a line of its own
            return ok(f"{name} does not exist yet, the first start creates it")
        return problem(missing.message, *_create(site))
    site.slot_exists = True
    try:
        await usable_slot(site.catalog, name)
    except SlotBusy as busy:
        if status.active:
            return ok(f"{name} is in use by {status.holder}")
        return problem(busy.message, *in_words(busy.hint))
    except (SlotUnfit, SlotLost) as error:
        mend = (
            [*_create_again(site), _GONE] if isinstance(error, SlotLost) else in_words(error.hint)
        )
        return problem(error.message, *mend)
    ((idle_seconds,),) = await site.catalog.rows(_IDLE, {"name": name})
    since = "" if idle_seconds is None else f", for {duration(idle_seconds)} now"
    return ok(f"{name} is there, nobody streams from it{since}")


async def _position(site: Site) -> Outcome:
    """Compare the slot with the server, which stores a position that it has not reached itself."""
    status = await slot_status(site.catalog, site.slot_name)
    if status.confirmed_flush_lsn is None or status.lag_bytes is None:
        return skipped("the slot has none")
    if status.lag_bytes < 0:
        return problem(
            f"{status.confirmed_flush_lsn} is beyond the server's own: until it is there, no change"
            " is sent",
            *_create_again(site),
        )
    return ok(f"{status.confirmed_flush_lsn}, {size(status.lag_bytes)} behind the server's")


async def _retained_wal(site: Site) -> Outcome:
    status = await slot_status(site.catalog, site.slot_name)
    retained = status.retained_wal_bytes
    if retained is None:
        return skipped("the slot retains none")
    found = f"{size(retained)}, wal_status {status.wal_status}"
    catch_up = _HELD_BACK if status.active else _catch_up(site)
    limits = site.config.retained_wal
    for key, limit, then in (
        ("drop_slot_at_bytes", limits.drop_slot_at_bytes, "drops the slot, and changes are lost"),
        ("stop_at_bytes", limits.stop_at_bytes, "stops at once"),
    ):
        if limit is not None and retained >= limit:
            return problem(
                f"{found}: above {key} ({size(limit)}), walstream {then}",
                f"-- raise {key} under [retained_wal]; or give up what is retained:",
                *_create_again(site),
                "-- and start once with --accept-gap, where a state file is kept",
            )
    if status.is_at_risk:
        return warning(f"{found}: the slot is about to be lost", *catch_up, _RAISE)
    if limits.warn_at_bytes is not None and retained >= limits.warn_at_bytes:
        return warning(f"{found}: above warn_at_bytes ({size(limits.warn_at_bytes)})", *catch_up)
    is_much = status.wal_status == "extended"
    return warning(f"{found}: more than max_wal_size", *catch_up) if is_much else ok(found)


async def _vacuum(site: Site) -> Outcome | None:
    """Look at the oldest transaction whose traces in the catalog the slot still needs."""
    ((age,),) = await site.catalog.rows(_XMIN_AGE, {"name": site.slot_name})
    if age is None or age < OLD_XMIN:
        return None
    return warning(
        f"its catalog_xmin is {age:,} transactions old: vacuum cannot clean the system catalogs,"
        " and the server nears a wraparound",
        *_catch_up(site),
    )


async def _spills(site: Site) -> Outcome | None:
    rows = await site.catalog.rows(_SPILLS, {"name": site.slot_name})
    if not rows or not rows[0][0]:
        return None
    ((transactions, spilled_bytes, total_bytes, work_mem, work_mem_text),) = rows
    found = f"{transactions} transactions, {size(spilled_bytes)} of {size(total_bytes)}"
    if spilled_bytes < SPILLED_FRACTION * total_bytes:
        return ok(found)
    role = identifier(site.streaming_role)
    return warning(
        f"{found} went through the disk: logical_decoding_work_mem is {work_mem_text}",
        f"ALTER ROLE {role} SET logical_decoding_work_mem = '{_more(work_mem)}MB';",
        f"SELECT pg_stat_reset_replication_slot({literal(site.slot_name)});",
    )


def _more(work_mem_bytes: int) -> int:
    """Return four times as much, in whole MB, and at least Postgres' default."""
    return max(4 * work_mem_bytes >> 20, 64)


async def _failover(site: Site) -> Outcome | None:
    """Compare the wish for copies of the slot on standbys with what is there."""
    server = await site.catalog.server()
    wished = site.config.slot.failover
    if server.version < FAILOVER_VERSION:
        if not wished:
            return None
        return problem(
            f"failover = true needs PostgreSQL {FAILOVER_VERSION // 10_000} or later",
            "-- leave out failover = true under [slot]",
        )
    try:
        status = await slot_status(site.catalog, site.slot_name)
    except SlotMissing:
        return None
    if wished and not status.failover:
        return warning(
            "standbys keep no copy of the slot: a failover loses it",
            f"$ walstream slot alter --failover --name {site.slot_name}",
        )
    if not status.failover:
        return None
    return await _synchronized(site)


async def _synchronized(site: Site) -> Outcome:
    """A failover slot waits for the standbys that synchronized_standby_slots names."""
    ((setting, missing, kept, standbys),) = await site.catalog.rows(_STANDBY_SLOTS)
    if missing:
        return problem(
            f"walstream gets nothing: synchronized_standby_slots names {', '.join(missing)}, which"
            " no standby streams from",
            f"ALTER SYSTEM SET synchronized_standby_slots = {_literals(kept)};",
            RELOAD,
            "-- or start the standby",
        )
    if setting:
        return ok(f"standbys keep a copy of the slot, {setting} before walstream gets a change")
    if not standbys:
        return warning(
            "no standby streams through a slot of its own, which copies of the slot need",
            "-- set primary_slot_name, sync_replication_slots and hot_standby_feedback there",
        )
    return warning(
        "walstream may be ahead of the standby that is promoted: synchronized_standby_slots is"
        " empty",
        f"ALTER SYSTEM SET synchronized_standby_slots = {_literals(standbys)};",
        RELOAD,
    )


def _literals(names: list[str] | None) -> str:
    return ", ".join(map(literal, names)) if names else "''"


def _create_again(site: Site) -> list[str]:
    return [f"SELECT pg_drop_replication_slot({literal(site.slot_name)});", *_create(site)]


def _create(site: Site) -> list[str]:
    failover = ", failover => true" if site.config.slot.failover else ""
    name = literal(site.slot_name)
    return [f"SELECT pg_create_logical_replication_slot({name}, '{PLUGIN}'{failover});"]


def _catch_up(site: Site) -> list[str]:
    """Deliver what is retained: the slot lets go of WAL when it has come past a checkpoint."""
    return ["CHECKPOINT;", site.command("run", "--until now")]


_GONE: Final = "-- bring what was lost meanwhile over by other means"
_HELD_BACK: Final = ("-- see what walstream waits for: a handler, a sink, or a long transaction",)
_RAISE: Final = "-- or raise max_slot_wal_keep_size"

QUESTIONS: Final = (
    Question("slot", "state", _state, ("catalog",)),
    Question("slot", "position", _position, ("catalog", "slot")),
    Question("slot", "retained WAL", _retained_wal, ("catalog", "slot")),
    Question("slot", "vacuum", _vacuum, ("catalog", "slot")),
    Question("slot", "spills", _spills, ("catalog", "slot")),
    Question("slot", "failover", _failover, ("catalog",)),
)

_IDLE: Final = sql.SQL(
    """
    SELECT extract(epoch FROM clock_timestamp()
                              - (to_jsonb(s) ->> 'inactive_since')::timestamptz)::float8
      FROM pg_replication_slots s
     WHERE slot_name = %(name)s
    """
)

_XMIN_AGE: Final = sql.SQL(
    "SELECT age(catalog_xmin) FROM pg_replication_slots WHERE slot_name = %(name)s"
)

_SPILLS: Final = sql.SQL(
    """
    SELECT t.spill_txns, t.spill_bytes, t.total_bytes,
           pg_size_bytes(current_setting('logical_decoding_work_mem')),
           current_setting('logical_decoding_work_mem')
      FROM pg_stat_replication_slots t
     WHERE t.slot_name = %(name)s
    """
)

_STANDBY_SLOTS: Final = sql.SQL(
    """
    WITH named AS (
        SELECT trim(both ' "' FROM name) AS name
          FROM regexp_split_to_table(
                   current_setting('synchronized_standby_slots', true), ',') AS name
         WHERE trim(name) <> ''
    ), streaming AS (
        SELECT slot_name::text AS name
          FROM pg_replication_slots
         WHERE slot_type = 'physical' AND active
    )
    SELECT current_setting('synchronized_standby_slots', true),
           (SELECT array_agg(name) FROM named WHERE name NOT IN (SELECT name FROM streaming)),
           (SELECT array_agg(name) FROM named WHERE name IN (SELECT name FROM streaming)),
           (SELECT array_agg(name) FROM streaming)
    """
)
