"""The connections, the server behind them, and the role that replicates."""

from __future__ import annotations

from typing import Final

from psycopg import AsyncConnection, sql
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import TupleRow

from walstream.check.findings import Outcome, identifier, ok, problem, skipped, warning
from walstream.check.site import Question, Site, Walsender
from walstream.connection import ReplicationConnection
from walstream.postgres import RAISE_WAL_LEVEL, python_encoding
from walstream.preflight import OLDEST_VERSION

OLDEST_DECODING_STANDBY: Final = 160_000
"""Standbys decode since PostgreSQL 16."""


async def _catalog_connection(site: Site) -> Outcome:
    async with await site.connect(site.config.postgres.catalog_dsn()) as connection:
        site.catalog_user = connection.info.user
        return ok(_describe(connection))


async def _replication_connection(site: Site) -> Outcome:
    dsn = site.config.postgres.streaming_dsn()
    connection = await site.connect(dsn, replication=True)
    info = connection.info
    site.walsender = Walsender(
        ReplicationConnection(connection),
        info.user,
        info.backend_pid,
        info.server_version // 10_000,
    )
    return ok(_describe(connection))


def _describe(connection: AsyncConnection[TupleRow]) -> str:
    info = connection.info
    if info.host.startswith("/"):
        way = f"through the socket in {info.host}"
    else:
        tls = "with TLS" if connection.pgconn.ssl_in_use else "without TLS"
        way = f"at {info.host}:{info.port} {tls}"
    return f"database {info.dbname} as {info.user} {way}"


async def _same_database(site: Site) -> Outcome:
    """Ask both connections where they lead: another database's catalog describes other tables."""
    streamed = await site.replication.identify_system()
    ((systemid, database),) = await site.catalog.rows(_IDENTITY)
    if streamed.systemid != systemid:
        return problem(
            "dsn and replication_dsn lead to two different clusters",
            "let both lead to the same server",
        )
    if streamed.database != database:
        return problem(
            f"dsn leads to the database {database}, replication_dsn to {streamed.database}",
            "let both name the same database",
        )
    return ok(f"both connections lead to {database} of the cluster {systemid}")


async def _version(site: Site) -> Outcome:
    server = await site.catalog.server()
    named = f"PostgreSQL {server.version // 10_000}.{server.version % 10_000}"
    if server.version < OLDEST_VERSION:
        return problem(f"{named}; walstream needs 14 or later", "upgrade the server")
    if not server.in_recovery:
        return ok(named)
    if server.version < OLDEST_DECODING_STANDBY:
        return problem(
            f"{named}, a standby: standbys decode since PostgreSQL 16", "stream from the primary"
        )
    return ok(f"{named}, a standby")


async def _wal_level(site: Site) -> Outcome:
    level = (await site.catalog.server()).wal_level
    if level == "logical":
        return ok(level)
    return problem(f"{level}; decoding needs logical", RAISE_WAL_LEVEL)


async def _encoding(site: Site) -> Outcome:
    encoding = (await site.catalog.server()).encoding
    python_encoding(encoding)
    return ok(encoding)


async def _kept_wal(site: Site) -> Outcome:
    ((size,),) = await site.catalog.rows(_KEPT_WAL)
    if size != "-1":
        return ok(f"{size}: a slot that falls further behind is lost")
    return warning(
        "-1: nothing bounds the WAL that slots retain, one that nobody reads fills the disk",
        "ALTER SYSTEM SET max_slot_wal_keep_size = '50GB';\nSELECT pg_reload_conf();",
    )


async def _free_slots(site: Site) -> Outcome:
    ((most, used, exists),) = await site.catalog.rows(_SLOTS_IN_USE, {"name": site.slot_name})
    return _room("max_replication_slots", most, used, is_needed=not exists)


async def _free_walsenders(site: Site) -> Outcome:
    own = site.walsender.pid if site.walsender else 0
    ((most, used, streaming),) = await site.catalog.rows(
        _WALSENDERS_IN_USE, {"name": site.slot_name, "own": own}
    )
    return _room("max_wal_senders", most, used, is_needed=not streaming)


def _room(setting: str, most: int, used: int, *, is_needed: bool) -> Outcome:
    """Judge what is left; ``is_needed`` says that walstream still has to get one of them."""
    found = f"{used} of {most} in use"
    more = f"ALTER SYSTEM SET {setting} = {most + 10};\n-- then restart the server"
    free = most - used
    if free <= 0 and is_needed:
        return problem(f"{found}, none is left for walstream", more)
    if free <= 1:
        return warning(f"{found}, {'one is' if free == 1 else 'none is'} left", more)
    return ok(found)


async def _role(site: Site) -> Outcome:
    name = _role_name(site)
    rows = await site.catalog.rows(_ROLE, {"name": name})
    if not rows:
        return skipped(f"the catalog does not know {name}")
    ((is_superuser, may_replicate),) = rows
    if is_superuser:
        return ok(f"{name} is a superuser; LOGIN and REPLICATION would be enough")
    if may_replicate:
        return ok(f"{name} has REPLICATION")
    if site.walsender is not None:  # hosted servers have ways of their own
        return ok(f"{name} is let in for replication")
    return problem(f"{name} lacks REPLICATION", f"ALTER ROLE {identifier(name)} REPLICATION;")


def _role_name(site: Site) -> str:
    """Whom replication connects as, or would if it were let in."""
    if site.walsender is not None:
        return site.walsender.user
    named = conninfo_to_dict(site.config.postgres.streaming_dsn()).get("user")
    return str(named or site.catalog_user)


QUESTIONS: Final = (
    Question("connection", "catalog", _catalog_connection),
    Question("connection", "replication", _replication_connection),
    Question("connection", "same database", _same_database, ("catalog", "replication")),
    Question("server", "version", _version, ("catalog",)),
    Question("server", "wal_level", _wal_level, ("catalog",)),
    Question("server", "encoding", _encoding, ("catalog",)),
    Question("server", "max_slot_wal_keep_size", _kept_wal, ("catalog",)),
    Question("server", "replication slots", _free_slots, ("catalog",)),
    Question("server", "walsenders", _free_walsenders, ("catalog",)),
    Question("role", "replication", _role, ("catalog",)),
)

_IDENTITY: Final = sql.SQL(
    "SELECT system_identifier::text, current_database() FROM pg_control_system()"
)

_KEPT_WAL: Final = sql.SQL("SELECT current_setting('max_slot_wal_keep_size')")

_SLOTS_IN_USE: Final = sql.SQL(
    """
    SELECT current_setting('max_replication_slots')::int,
           count(*),
           coalesce(bool_or(slot_name = %(name)s), false)
      FROM pg_replication_slots
    """
)

_WALSENDERS_IN_USE: Final = sql.SQL(
    """
    SELECT current_setting('max_wal_senders')::int,
           (SELECT count(*) FROM pg_stat_get_wal_senders() WHERE pid <> %(own)s),
           EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = %(name)s AND active)
    """
)

_ROLE: Final = sql.SQL("SELECT rolsuper, rolreplication FROM pg_roles WHERE rolname = %(name)s")
