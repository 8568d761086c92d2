"""The roles: what they may do, and what they would need for more."""

from __future__ import annotations

from typing import Final

from psycopg import sql

from walstream.check.findings import Outcome, identifier, ok, problem, skipped, warning
from walstream.check.site import Question, Site


async def _replication(site: Site) -> Outcome:
    name = site.streaming_role
    rights = await _rights(site, name)
    if rights is None:
        return skipped(f"the catalog does not know {name}")
    is_superuser, may_replicate = rights
    if is_superuser:
        return ok(f"{name} is a superuser; LOGIN and REPLICATION would be enough")
    if may_replicate:
        return ok(f"{name} has REPLICATION")
    if site.walsender is not None:  # hosted servers have ways of their own
        return ok(f"{name} is let in for replication")
    return problem(f"{name} lacks REPLICATION", f"ALTER ROLE {identifier(name)} REPLICATION;")


async def _dropping(site: Site) -> Outcome | None:
    """Ask only who wishes it: the slot is dropped through the catalog's connection."""
    if site.config.retained_wal.drop_slot_at_bytes is None:
        return None
    name = site.catalog_user
    if any(await _rights(site, name) or ()):
        return ok(f"{name} may drop the slot at drop_slot_at_bytes")
    return problem(
        f"{name} lacks REPLICATION, and could not drop the slot at drop_slot_at_bytes",
        f"ALTER ROLE {identifier(name)} REPLICATION;",
    )


async def _heartbeat(site: Site) -> Outcome | None:
    """Ask only who wishes it: the message is written through the catalog's connection."""
    if site.config.stream.heartbeat_seconds is None:
        return None
    ((in_recovery, function, may),) = await site.catalog.rows(_MAY_WRITE)
    if in_recovery:
        return warning(
            "a standby cannot write heartbeats into the WAL",
            "-- leave out heartbeat_seconds under [stream], and let something write to the primary",
        )
    if may:
        return ok(f"{site.catalog_user} may write them")
    return warning(
        f"{site.catalog_user} may not write them",
        f"GRANT EXECUTE ON FUNCTION {function} TO {identifier(site.catalog_user)};",
    )


async def _rights(site: Site, name: str) -> tuple[bool, bool] | None:
    rows = await site.catalog.rows(_ROLE, {"name": name})
    return (bool(rows[0][0]), bool(rows[0][1])) if rows else None


QUESTIONS: Final = (
    Question("role", "replication", _replication, ("catalog",)),
    Question("role", "drop_slot_at_bytes", _dropping, ("catalog",)),
    Question("role", "heartbeats", _heartbeat, ("catalog",)),
)

_ROLE: Final = sql.SQL("SELECT rolsuper, rolreplication FROM pg_roles WHERE rolname = %(name)s")

_MAY_WRITE: Final = sql.SQL(
    """
    SELECT pg_is_in_recovery(),
           oid::regprocedure::text,
           has_function_privilege(oid, 'EXECUTE')
      FROM pg_proc
     WHERE proname = 'pg_logical_emit_message' AND proargtypes[2] = 'text'::regtype
    """
)
