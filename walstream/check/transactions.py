"""Transactions that do not end: a new slot waits for them, and an old one keeps their WAL."""

from __future__ import annotations

from typing import Final

import msgspec
from psycopg import sql

from walstream.check.findings import (
    Outcome,
    duration,
    identifier,
    literal,
    ok,
    skipped,
    warning,
)
from walstream.check.site import Question, Site

LONG_SECONDS: Final = 60.0
"""How long a transaction may be open before it is named."""

_NAMED: Final = 3


class Blocker(msgspec.Struct, frozen=True):
    """A transaction that has changed something; ``age_seconds`` is None where that is hidden."""

    pid: int | None
    gid: str
    application_name: str
    database: str | None
    age_seconds: float | None

    def __str__(self) -> str:
        """Name it for an operator."""
        who = f"prepared transaction {self.gid!r}" if self.pid is None else f"PID {self.pid}"
        application = f" ({self.application_name})" if self.application_name else ""
        age = "" if self.age_seconds is None else f" for {duration(self.age_seconds)}"
        return f"{who}{application}{age}"


async def blockers(site: Site) -> list[Blocker]:
    """List the transactions that a new slot would wait for, the oldest first."""
    return [Blocker(*row) for row in await site.catalog.rows(_BLOCKERS)]


async def ends_of(site: Site, found: list[Blocker]) -> list[str]:
    """Write the steps that end transactions, whatever they have done."""
    ((here,),) = await site.catalog.rows(sql.SQL("SELECT current_database()"))
    steps = ["-- let them end; what they have done so far is taken back by:"]
    for blocker in found:
        if blocker.pid is not None:
            steps.append(f"SELECT pg_terminate_backend({blocker.pid});")
            continue
        if blocker.database != here:
            steps.append(f"-- in the database {blocker.database}:")
        steps.append(f"ROLLBACK PREPARED {literal(blocker.gid)};")
    return steps


def listed(found: list[Blocker]) -> str:
    """Name the first of them."""
    rest = len(found) - _NAMED
    more = f" and {rest} more" if rest > 0 else ""
    return ", ".join(map(str, found[:_NAMED])) + more


async def _long(site: Site) -> Outcome:
    found = await blockers(site)
    long = [one for one in found if one.age_seconds is not None and one.age_seconds >= LONG_SECONDS]
    if long:
        verb = "keeps" if len(long) == 1 else "keep"
        text = f"{listed(long)}: {verb} WAL, and a new slot waits for it"
        return warning(text, *await ends_of(site, long))
    hidden = [one for one in found if one.age_seconds is None]
    if hidden:
        return skipped(
            f"since when {listed(hidden)} runs is hidden from {site.catalog_user}",
            f"GRANT pg_monitor TO {identifier(site.catalog_user)};",
        )
    return ok(f"none has been open for {duration(LONG_SECONDS)}")


QUESTIONS: Final = (Question("server", "transactions", _long, ("catalog",)),)

_BLOCKERS: Final = sql.SQL(
    """
    SELECT pid, '', coalesce(application_name, ''), datname::text,
           extract(epoch FROM clock_timestamp() - xact_start)::float8
      FROM pg_stat_activity
     WHERE backend_xid IS NOT NULL AND pid <> pg_backend_pid()
     UNION ALL
    SELECT NULL, gid, '', database::text, extract(epoch FROM clock_timestamp() - prepared)::float8
      FROM pg_prepared_xacts
     ORDER BY 5 DESC NULLS LAST
    """
)
