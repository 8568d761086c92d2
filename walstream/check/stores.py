"""Where dead letters and the journal are kept; the databases of transactional handlers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec
from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from walstream.assembly import letters_of
from walstream.check.findings import (
    Finding,
    Outcome,
    duration,
    identifier,
    literal,
    ok,
    problem,
    size,
    skipped,
    warning,
)
from walstream.check.place import unwritable_folder
from walstream.check.site import Question, Site, answered
from walstream.destinations import Handler
from walstream.journal import JournalReader, sizes
from walstream.lsn import Lsn
from walstream.policy import OnFailure

NEARLY_FULL: Final = 0.8

# ---- Dead letters


async def _dead_letters(site: Site) -> Outcome | None:
    router = site.router()
    if router is None:
        return None
    policies = [route.policy for route in router.routes]
    policies += [route.policy for route in router.message_routes]
    if all(policy.on_failure is not OnFailure.DEAD_LETTER for policy in policies):
        return None
    if site.config.dead_letters.store == "postgres":
        return await _in_postgres(site)
    return await _in_sqlite(site)


async def _in_sqlite(site: Site) -> Outcome:
    path = site.config.dead_letters.path.absolute()
    unwritable = unwritable_folder(path)
    if unwritable is not None:
        return unwritable
    if not path.exists() or not path.stat().st_size:  # opening it would make the tables
        return ok(f"{path}, which the first start makes")
    return await _letters(site, str(path))


async def _in_postgres(site: Site) -> Outcome:
    """Look at the tables, or whether they may be made; opening the store would make them."""
    section = site.config.dead_letters
    schema, tables = section.schema_name, ("dead_letters", "dead_letter_keys")
    async with await site.connect(
        section.own_dsn() or site.config.postgres.catalog_dsn()
    ) as connection:
        role = identifier(connection.info.user)
        listed = ", ".join(identifier(schema, table) for table in tables)
        grants = (
            f"GRANT SELECT, INSERT, UPDATE, DELETE ON {listed} TO {role};",
            f"GRANT SELECT ON {identifier(schema, 'dead_letters_version')} TO {role};",
        )
        rights = await _rights(connection, _LETTERS, [list(tables), schema])
        unusable = _unusable(rights, schema, role, grants, _where(site, connection))
    if unusable is not None:
        return unusable
    if not rights.has_tables:
        return ok(f"the schema {schema}, in which the first start makes the tables")
    return await _letters(site, f"the schema {schema}")


async def _letters(site: Site, where: str) -> Outcome:
    """Count what waits; a store of another program or version refuses to be opened."""
    store = letters_of(site.config)
    try:
        await store.open(create=False)
        letters, size_bytes = await store.size()
    finally:
        await store.close()
    section = site.config.dead_letters
    if not letters:
        return ok(f"{where}, none waits")
    found = f"{where}: {letters} wait, {size(size_bytes)}"
    steps = (
        "-- mend what failed (walstream dead-letters list tells), then:",
        site.command("dead-letters replay", "--all --yes"),
    )
    filled = max(letters / section.max_letters, size_bytes / section.max_bytes)
    if filled >= NEARLY_FULL:
        return warning(f"{found}: {filled:.0%} of what there is room for", *steps)
    return warning(found, *steps)


# ---- Transactional handlers


async def check_targets(site: Site) -> list[Finding]:
    """Look at the database of each transactional handler."""
    findings = []
    for handler, dsn in _transactional(site):
        outcome = await answered(site, _target(site, handler.name, dsn))
        if outcome is not None:
            findings.append(Finding.of("targets", handler.name, outcome))
    return findings


def _transactional(site: Site) -> Iterator[tuple[Handler, str]]:
    for _, handler in site.handlers:
        if handler.options.transactional is not None:
            yield handler, handler.options.transactional


async def _target(site: Site, route: str, dsn: str) -> Outcome:
    async with await site.connect(dsn) as connection:
        database, role = connection.info.dbname, identifier(connection.info.user)
        where = _where(site, connection)
        ((in_recovery, commit),) = await (await connection.execute(_WRITES)).fetchall()
        if in_recovery:
            return problem(
                "it is a standby, which takes no writes",
                "-- add target_session_attrs=read-write to the handler's connection string",
            )
        grants = (
            f"GRANT SELECT, INSERT, UPDATE ON walstream.progress TO {role};",
            f"GRANT SELECT, INSERT, DELETE ON walstream.replayed TO {role};",
        )
        rights = await _rights(connection, _TARGET)
        unusable = _unusable(rights, "walstream", role, grants, where)
        if unusable is not None:
            return unusable
        if commit == "off":
            return warning(
                f"synchronous_commit is off in {database}: a crash takes back what was recorded,"
                " and it does not come again",
                *where,
                f"ALTER ROLE {role} SET synchronous_commit = on;",
            )
        if not rights.has_tables:
            return ok(f"{database}, in which the first start makes walstream.progress")
        return await _progress(site, route, connection)


async def _progress(site: Site, route: str, connection: AsyncConnection[TupleRow]) -> Outcome:
    """Compare what is recorded with the server, as `walstream.transactional` will."""
    cursor = await connection.execute(_PROGRESS, [site.slot_name, route])
    rows = await cursor.fetchall()
    if not rows:
        return ok("walstream.progress is there, nothing is recorded yet")
    ((systemid, end_lsn),) = rows
    lacking = site.lacks("catalog")
    if lacking:
        return skipped(lacking)
    row = f"slot = {literal(site.slot_name)} AND route = {literal(route)}"
    again = (
        "-- is this the right source? Then bring over what is missing, and let it begin anew:",
        *_where(site, connection),
        f"DELETE FROM walstream.progress WHERE {row};",  # noqa: S608 - to be shown
    )
    if systemid != await site.catalog.system_identifier():
        return problem("what is recorded is of another cluster than changes come from", *again)
    if Lsn.parse(end_lsn) > (await site.catalog.server()).flush_lsn:
        return problem(
            f"it came to {end_lsn}, which the server has not reached: was that restored?", *again
        )
    return ok(f"recorded up to {end_lsn}")


# ---- Tables in a schema


class _Rights(msgspec.Struct, frozen=True):
    """What is there, and what the role may do with it."""

    has_schema: bool
    may_create_schema: bool
    may_create: bool
    has_tables: bool
    may_use: bool


async def _rights(
    connection: AsyncConnection[TupleRow], query: bytes, parameters: Sequence[object] = ()
) -> _Rights:
    cursor = await connection.execute(query, parameters)
    (row,) = await cursor.fetchall()
    return _Rights(*map(bool, row))


def _unusable(
    rights: _Rights, schema: str, role: str, grants: Sequence[str], where: Sequence[str]
) -> Outcome | None:
    """Say what the role lacks, with the least that mends it."""
    name = identifier(schema)
    if not rights.has_schema and not rights.may_create_schema:
        return problem(
            f"there is no schema {schema}, and the role may not make it",
            *where,
            f"CREATE SCHEMA {name} AUTHORIZATION {role};",
        )
    if rights.has_schema and not rights.has_tables and not rights.may_create:
        return problem(
            f"the schema {schema} has no such tables, and the role may not make them",
            *where,
            f"GRANT USAGE, CREATE ON SCHEMA {name} TO {role};",
        )
    if rights.has_tables and not rights.may_use:
        return problem(
            f"the role may not use the tables in the schema {schema}",
            *where,
            f"GRANT USAGE ON SCHEMA {name} TO {role};",
            *grants,
        )
    return None


def _where(site: Site, connection: AsyncConnection[TupleRow]) -> list[str]:
    """Say in which database SQL is to be run, when it is not that which is streamed from."""
    info, link = connection.info, site.links.get("catalog")
    here = f"{info.host}:{info.port}" if info.hostaddr else info.host
    if link is not None and (link.host, link.database) == (here, info.dbname):
        return []
    return [f"-- in the database {info.dbname} at {here}:"]


# ---- The journal


async def _journal(site: Site) -> Outcome | None:
    """Look at the journal's file, and whether the disk has what the journal may take of it."""
    section = site.config.journal
    if section.path is None:
        return None
    path = section.path.absolute()
    if all(sink.type != "live" for sink in site.config.sinks.values()):
        return warning(
            "nothing is written to it: no sink is of the type live",
            '-- write [sinks.NAME] with type = "live" and routes to it, or remove [journal]',
        )
    unwritable = unwritable_folder(path)
    if unwritable is not None:
        return unwritable
    taken = sum(sizes(path))
    found = f"{path}, which the first start makes"
    if path.exists() and path.stat().st_size:
        found = await _in_journal(path)
    free = shutil.disk_usage(path.parent).free
    if free + taken < section.max_bytes:
        return warning(
            f"{found}: it may take {size(section.max_bytes)}, and {size(free)} are free",
            "-- make room, or set max_bytes under [journal] lower",
        )
    return ok(found)


async def _in_journal(path: Path) -> str:
    reader = JournalReader(path)
    await reader.open()
    try:
        status = await reader.status()
    finally:
        await reader.close()
    found = f"{path}: {status.state.changes:,} changes, {size(status.bytes)}"
    if status.oldest_time is None:
        return found
    age = datetime.now(UTC) - status.oldest_time
    return f"{found}, back to {duration(max(age.total_seconds(), 0))} ago"


QUESTIONS: Final = (
    Question("dead letters", "store", _dead_letters),
    Question("journal", "file", _journal),
)

_LETTERS: Final = b"""
    SELECT n.oid IS NOT NULL,
           has_database_privilege(current_database(), 'CREATE'),
           coalesce(has_schema_privilege(n.oid, 'CREATE')
                    AND has_schema_privilege(n.oid, 'USAGE'), false),
           EXISTS (SELECT FROM pg_class c
                    WHERE c.relnamespace = n.oid AND c.relname = 'dead_letters_version'),
           coalesce(has_schema_privilege(n.oid, 'USAGE'), false)
           AND (SELECT bool_and(has_table_privilege(c.oid, 'SELECT')
                                AND (c.relname = 'dead_letters_version'
                                     OR has_table_privilege(c.oid, 'INSERT')
                                    AND has_table_privilege(c.oid, 'UPDATE')
                                    AND has_table_privilege(c.oid, 'DELETE')))
                  FROM pg_class c
                 WHERE c.relnamespace = n.oid
                   AND c.relname = ANY (%s || ARRAY['dead_letters_version']))
      FROM (SELECT) AS one
      LEFT JOIN pg_namespace n ON n.nspname = %s
"""

_TARGET: Final = b"""
    SELECT n.oid IS NOT NULL,
           has_database_privilege(current_database(), 'CREATE'),
           coalesce(has_schema_privilege(n.oid, 'CREATE')
                    AND has_schema_privilege(n.oid, 'USAGE'), false),
           p.oid IS NOT NULL AND r.oid IS NOT NULL,
           coalesce(has_schema_privilege(n.oid, 'USAGE')
                    AND has_table_privilege(p.oid, 'SELECT')
                    AND has_table_privilege(p.oid, 'INSERT')
                    AND has_table_privilege(p.oid, 'UPDATE')
                    AND has_table_privilege(r.oid, 'SELECT')
                    AND has_table_privilege(r.oid, 'INSERT')
                    AND has_table_privilege(r.oid, 'DELETE'), false)
      FROM (SELECT) AS one
      LEFT JOIN pg_namespace n ON n.nspname = 'walstream'
      LEFT JOIN pg_class p ON p.relnamespace = n.oid AND p.relname = 'progress'
      LEFT JOIN pg_class r ON r.relnamespace = n.oid AND r.relname = 'replayed'
"""

_WRITES: Final = b"SELECT pg_is_in_recovery(), current_setting('synchronous_commit')"

_PROGRESS: Final = """
    SELECT system_identifier, end_lsn::text FROM walstream.progress WHERE slot = %s AND route = %s
"""
