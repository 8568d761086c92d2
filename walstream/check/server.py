"""The server: its version and settings, and the room that it has."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime
from typing import Final

import msgspec
from psycopg import sql

from walstream.check.findings import (
    RESTART,
    Outcome,
    identifier,
    in_words,
    ok,
    problem,
    set_to,
    warning,
)
from walstream.check.site import Question, Site
from walstream.errors import DatabaseUnfit
from walstream.postgres import python_encoding
from walstream.preflight import OLDEST_VERSION, STANDBY_VERSION

LAST_DAYS: Final = {
    14: date(2026, 11, 12),
    15: date(2027, 11, 11),
    16: date(2028, 11, 9),
    17: date(2029, 11, 8),
    18: date(2030, 11, 14),
}
"""When a version gets its last fixes: https://www.postgresql.org/support/versioning/."""

GUARDED_MINORS: Final = {14: 24, 15: 19, 16: 15, 17: 11, 18: 6}
"""The releases of August 2026, which brought output_plugin_libraries (CVE-2026-6471)."""

ALLOWED_PLUGINS: Final = "'pgoutput', 'test_decoding', 'wal2json'"
"""The default of output_plugin_libraries, and wal2json."""

SHORTEST_TIMEOUT_SECONDS: Final = 5.0
"""Below that a pause of some seconds, of whatever machine, ends the stream."""

SHORTEST_IDLE_SECONDS: Final = 86_400.0
"""What an outage of walstream may last at least, before its slot is invalidated."""

NEEDED_CONNECTIONS: Final = 3
"""The catalog's, one for dead letters or a handler, and one for who looks after them."""


async def _version(site: Site) -> Outcome:
    server = await site.catalog.server()
    major, minor = divmod(server.version, 10_000)
    named = f"PostgreSQL {major}.{minor}"
    if server.version < OLDEST_VERSION:
        oldest = OLDEST_VERSION // 10_000
        return problem(f"{named}; walstream needs {oldest} or later", "-- upgrade the server")
    if server.in_recovery:
        named += ", a standby"
        if server.version < STANDBY_VERSION:
            return problem(
                f"{named}: standbys decode from {STANDBY_VERSION // 10_000} on",
                "-- stream from the primary: target_session_attrs=read-write in the dsn",
            )
    return judge_version(major, minor, named, today())


def today() -> date:
    """Return the date."""
    return datetime.now(UTC).date()


def judge_version(major: int, minor: int, named: str, day: date) -> Outcome:
    """Say whether a version gets fixes, and whether the next one will refuse wal2json."""
    last_day = LAST_DAYS.get(major)
    if last_day is not None and day > last_day:
        return warning(
            f"{named}, which gets no fixes since {last_day}",
            "-- upgrade to a version that does: https://www.postgresql.org/support/versioning/",
        )
    guarded = GUARDED_MINORS.get(major, 0)
    if minor < guarded:
        return warning(
            f"{named} lacks the fix of CVE-2026-6471; {major}.{guarded}, which has it, refuses"
            " wal2json until that is allowed",
            f"-- upgrade the server to {major}.{guarded} or later, and right after that:",
            *set_to("output_plugin_libraries", ALLOWED_PLUGINS),
        )
    return ok(named)


async def _wal_level(site: Site) -> Outcome:
    level = (await site.catalog.server()).wal_level
    if level == "logical":
        return ok(level)
    return problem(
        f"{level}; decoding needs logical", "ALTER SYSTEM SET wal_level = logical;", RESTART
    )


async def _encoding(site: Site) -> Outcome:
    encoding = (await site.catalog.server()).encoding
    try:
        python_encoding(encoding)
    except DatabaseUnfit as unfit:
        return problem(unfit.message, *in_words(unfit.hint))
    if encoding == "SQL_ASCII":
        return warning(
            "SQL_ASCII, which vouches for nothing: the first text that is not UTF-8 ends the"
            " stream, each time",
            "-- move to a database in UTF8: an encoding is for ever",
        )
    return ok(encoding)


async def _kept_wal(site: Site) -> Outcome:
    ((bound,),) = await site.catalog.rows(_KEPT_WAL)
    if bound == "-1":
        return warning(
            "-1: nothing bounds the WAL that slots retain, one that nobody reads fills the disk",
            *set_to("max_slot_wal_keep_size", "'50GB'"),
        )
    return ok(f"{bound}: a slot that falls further behind is lost")


async def _idle_timeout(site: Site) -> Outcome | None:
    """Look at a setting of PostgreSQL 18, which is 0 unless somebody wants it."""
    ((text, seconds),) = await site.catalog.rows(_IDLE_TIMEOUT)
    if not seconds:
        return None
    if seconds < SHORTEST_IDLE_SECONDS:
        return warning(
            f"{text}: when walstream is away for longer, its slot is invalidated, and changes are"
            " lost",
            *set_to("idle_replication_slot_timeout", "'7d'"),
        )
    return ok(f"{text}: a slot that nobody reads for longer is invalidated")


async def _free_slots(site: Site) -> Outcome:
    ((most, used, exists, idle),) = await site.catalog.rows(_SLOTS_IN_USE, {"name": site.slot_name})
    outcome = _room("max_replication_slots", most, used, is_needed=not exists)
    if outcome.mend and idle:
        listed = ", ".join(idle)
        more = f"{outcome.mend}\n-- or drop what nobody reads, if nobody will: {listed}"
        return msgspec.structs.replace(outcome, mend=more)
    return outcome


async def _free_walsenders(site: Site) -> Outcome:
    own = site.walsender.pid if site.walsender else 0
    ((most, used, streaming),) = await site.catalog.rows(
        _WALSENDERS_IN_USE, {"name": site.slot_name, "own": own}
    )
    return _room("max_wal_senders", most, used, is_needed=not streaming)


def _room(setting: str, most: int, used: int, *, is_needed: bool) -> Outcome:
    """Judge what is left; ``is_needed`` says that walstream still has to get one of them."""
    found = f"{used} of {most} in use"
    more = (f"ALTER SYSTEM SET {setting} = {most + 10};", RESTART)
    free = most - used
    if free <= 0 and is_needed:
        return problem(f"{found}, none is left for walstream", *more)
    if free <= 1:
        return warning(f"{found}, {'one is' if free == 1 else 'none is'} left", *more)
    return ok(found)


async def _free_connections(site: Site) -> Outcome:
    """Look at the narrowest bound: the server's, the role's, or the database's."""
    (
        (most, used, of_role, by_role, of_database, in_database, role, database),
    ) = await site.catalog.rows(_CONNECTIONS)
    bounds = [
        ("connections", most, used, (f"ALTER SYSTEM SET max_connections = {most + 50};", RESTART)),
        (
            f"connections of {role}",
            of_role,
            by_role,
            (f"ALTER ROLE {identifier(role)} CONNECTION LIMIT {of_role + 10};",),
        ),
        (
            f"connections to {database}",
            of_database,
            in_database,
            (f"ALTER DATABASE {identifier(database)} CONNECTION LIMIT {of_database + 10};",),
        ),
    ]
    what, most, used, mend = min(
        (bound for bound in bounds if bound[1] >= 0), key=lambda bound: bound[1] - bound[2]
    )
    found = f"{used} of {most} {what} in use"
    if most - used < NEEDED_CONNECTIONS:
        return warning(f"{found}, {NEEDED_CONNECTIONS} should be left for walstream", *mend)
    return ok(found)


_TIMEOUT_NAME: Final = "wal_sender_timeout"


async def _wal_sender_timeout(site: Site) -> Outcome:
    """Ask the walsender itself: the role may have a setting of its own."""
    if site.walsender is not None:
        cursor = await site.walsender.session.execute(_TIMEOUT)
        (row,) = await cursor.fetchall()
        asked = site.walsender.user
    else:
        (row,) = await site.catalog.rows(_TIMEOUT)
        asked = site.catalog_user  # whose own setting was seen, be it not who streams
    text, milliseconds, source = row
    if milliseconds == 0:
        found = "0: a walsender whose client has vanished keeps the slot for hours"
    elif milliseconds < SHORTEST_TIMEOUT_SECONDS * 1000:
        found = f"{text}: a pause of that length, of the network or a machine, ends the stream"
    else:
        return ok(text)
    role = identifier(asked)
    database = identifier(site.links["catalog"].database if site.links else "")
    own = {
        "user": f"ALTER ROLE {role} RESET wal_sender_timeout;",
        "database": f"ALTER DATABASE {database} RESET wal_sender_timeout;",
        "database user": f"ALTER ROLE {role} IN DATABASE {database} RESET wal_sender_timeout;",
    }
    return warning(found, *([own[source]] if source in own else set_to(_TIMEOUT_NAME, "'60s'")))


async def _synchronous(site: Site) -> Outcome | None:
    """Look whether commits wait for walstream: a logical walsender counts as a standby, too."""
    ((names,),) = await site.catalog.rows(_SYNCHRONOUS)
    if not names:
        return None
    own = site.config.postgres.application_name
    listed = standby_names(names)
    if own.lower() in (name.lower() for name in listed):
        return warning(
            f"{names} names walstream: commits wait until it has delivered what they changed",
            f"-- set application_name under [postgres] to another name than {own}, or leave it"
            " out of synchronous_standby_names",
        )
    if "*" in listed:
        return warning(
            f"{names} means walstream, too: commits may wait until it has delivered what they"
            " changed",
            "-- name the standbys in synchronous_standby_names one by one",
        )
    return ok(f"{names} does not mean walstream")


def standby_names(setting: str) -> list[str]:
    """Read the names in ``synchronous_standby_names``, whatever is asked of them."""
    listed = re.fullmatch(r"\s*(?:(?:FIRST|ANY)\s+)?\d+\s*\((.*)\)\s*", setting, re.IGNORECASE)
    names = listed[1] if listed else setting
    return [
        quoted.replace('""', '"') if quoted else plain
        for quoted, plain in re.findall(r'"((?:[^"]|"")*)"|([^\s,"]+)', names)
    ]


QUESTIONS: Final = (
    Question("server", "version", _version, ("catalog",)),
    Question("server", "wal_level", _wal_level, ("catalog",)),
    Question("server", "encoding", _encoding, ("catalog",)),
    Question("server", "max_slot_wal_keep_size", _kept_wal, ("catalog",)),
    Question("server", "idle_replication_slot_timeout", _idle_timeout, ("catalog",)),
    Question("server", "wal_sender_timeout", _wal_sender_timeout, ("catalog",)),
    Question("server", "synchronous_standby_names", _synchronous, ("catalog",)),
    Question("server", "replication slots", _free_slots, ("catalog",)),
    Question("server", "walsenders", _free_walsenders, ("catalog",)),
    Question("server", "connections", _free_connections, ("catalog",)),
)

_KEPT_WAL: Final = sql.SQL("SELECT current_setting('max_slot_wal_keep_size')")

_IDLE_TIMEOUT: Final = sql.SQL(
    """
    SELECT setting, extract(epoch FROM setting::interval)::float8
      FROM current_setting('idle_replication_slot_timeout', true) AS setting
    """
)

_TIMEOUT: Final = b"""
    SELECT current_setting('wal_sender_timeout'), setting::int, source
      FROM pg_settings
     WHERE name = 'wal_sender_timeout'
"""

_SYNCHRONOUS: Final = sql.SQL("SELECT current_setting('synchronous_standby_names')")

_SLOTS_IN_USE: Final = sql.SQL(
    """
    SELECT current_setting('max_replication_slots')::int,
           count(*),
           coalesce(bool_or(slot_name = %(name)s), false),
           array_agg(slot_name::text ORDER BY slot_name) FILTER (WHERE NOT active)
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

_CONNECTIONS: Final = sql.SQL(
    """
    WITH others AS (
        SELECT usesysid, datid
          FROM pg_stat_activity
         WHERE usesysid IS NOT NULL AND datid IS NOT NULL AND pid <> pg_backend_pid()
           AND pid NOT IN (SELECT pid FROM pg_stat_get_wal_senders())
    )
    SELECT current_setting('max_connections')::int
           - current_setting('superuser_reserved_connections')::int
           - coalesce(current_setting('reserved_connections', true)::int, 0),
           (SELECT count(*) FROM others),
           CASE WHEN r.rolsuper THEN -1 ELSE r.rolconnlimit END,
           (SELECT count(*) FROM others WHERE usesysid = r.oid),
           CASE WHEN r.rolsuper THEN -1 ELSE d.datconnlimit END,
           (SELECT count(*) FROM others WHERE datid = d.oid),
           r.rolname,
           d.datname
      FROM pg_roles r, pg_database d
     WHERE r.rolname = current_user AND d.datname = current_database()
    """
)
