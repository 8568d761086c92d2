"""Where dead letters are kept, and the databases that transactional handlers write to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import psycopg
from psycopg import AsyncConnection, sql
from psycopg.rows import TupleRow

from walstream.assembly import letters_of
from walstream.check.findings import (
    Finding,
    Outcome,
    identifier,
    ok,
    problem,
    size,
    skipped,
    warning,
)
from walstream.check.place import unwritable_folder
from walstream.check.site import Question, Site, answered
from walstream.destinations import Handler
from walstream.lsn import Lsn
from walstream.policy import OnFailure

NEARLY_FULL: Final = 0.8

# ---- Dead letters


async def _dead_letters(site: Site) -> Outcome | None:
    router = site.router()
    if router is None or all(
        route.policy.on_failure is not OnFailure.DEAD_LETTER
        for route in (*router.routes, *router.message_routes)
    ):
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
    own = section.own_dsn()
    schema = section.schema_name
    async with await site.connect(own or site.config.postgres.catalog_dsn()) as connection:
        cursor = await connection.execute(_LETTERS, [["dead_letters", "dead_letter_keys"], schema])
        (row,) = await cursor.fetchall()
        role, where = identifier(connection.info.user), _where(site, connection)
    has_schema, may_create_schema, may_create, has_tables, may_use = row
    name = identifier(schema)
    if not has_schema and not may_create_schema:
        return problem(
            f"there is no schema {schema}, and the role may not make it",
            *where,
            f"CREATE SCHEMA {name} AUTHORIZATION {role};",
        )
    if has_schema and not has_tables and not may_create:
        return problem(
            f"the schema {schema} has no tables of dead letters, and the role may not make them",
            *where,
            f"GRANT USAGE, CREATE ON SCHEMA {name} TO {role};",
        )
    if not has_tables:
        return ok(f"the schema {schema}, in which the first start makes the tables")
    if not may_use:
        return problem(
            f"the role may not use the tables of dead letters in {schema}",
            *where,
            f"GRANT USAGE ON SCHEMA {name} TO {role};",
            "GRANT SELECT, INSERT, UPDATE, DELETE ON"
            f" {identifier(schema, 'dead_letters')}, {identifier(schema, 'dead_letter_keys')}"
            f" TO {role};",
            f"GRANT SELECT ON {identifier(schema, 'dead_letters_version')} TO {role};",
        )
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
        "$ walstream dead-letters replay --all --yes",
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
        cursor = await connection.execute(_TARGET)
        (row,) = await cursor.fetchall()
        has_schema, has_tables, may_create_schema, may_create, may_use, in_recovery, commit = row
        role, where = identifier(connection.info.user), _where(site, connection)
        database = connection.info.dbname
        if in_recovery:
            return problem(
                "it is a standby, which takes no writes",
                "-- add target_session_attrs=read-write to the handler's connection string",
            )
        if not has_schema and not may_create_schema:
            return problem(
                f"{database} has no schema walstream, and the role may not make it",
                *where,
                f"CREATE SCHEMA walstream AUTHORIZATION {role};",
            )
        if has_schema and not has_tables and not may_create:
            return problem(
                f"{database} has no table walstream.progress, and the role may not make it",
                *where,
                f"GRANT USAGE, CREATE ON SCHEMA walstream TO {role};",
            )
        if has_tables and not may_use:
            return problem(
                f"the role may not write to walstream.progress of {database}",
                *where,
                f"GRANT USAGE ON SCHEMA walstream TO {role};",
                f"GRANT SELECT, INSERT, UPDATE ON walstream.progress TO {role};",
                f"GRANT SELECT, INSERT, DELETE ON walstream.replayed TO {role};",
            )
        if commit == "off":
            return warning(
                f"synchronous_commit is off in {database}: a crash takes back what was recorded,"
                " and it does not come again",
                *where,
                f"ALTER ROLE {role} SET synchronous_commit = on;",
            )
        if not has_tables:
            return ok(f"{database}, in which the first start makes walstream.progress")
        return await _progress(site, route, connection)


async def _progress(site: Site, route: str, connection: AsyncConnection[TupleRow]) -> Outcome:
    """Compare what is recorded with the server, as the handler will; see walstream/transactional."""
    cursor = await connection.execute(_PROGRESS, [site.slot_name, route])
    rows = await cursor.fetchall()
    if not rows:
        return ok("walstream.progress is there, nothing is recorded yet")
    ((systemid, end_lsn),) = rows
    lacking = site.lacks("catalog")
    if lacking:
        return skipped(lacking)
    again = (
        "-- is this the right source? Then bring over what is missing, and let it begin anew:",
        *_where(site, connection),
        f"DELETE FROM walstream.progress WHERE slot = {_literal(site.slot_name)} AND route ="
        f" {_literal(route)};",
    )
    if systemid != await site.catalog.system_identifier():
        return problem("what is recorded is of another cluster than changes come from", *again)
    if Lsn.parse(end_lsn) > (await site.catalog.server()).flush_lsn:
        return problem(
            f"it came to {end_lsn}, which the server has not reached: was that restored?", *again
        )
    return ok(f"recorded up to {end_lsn}")


def _literal(text: str) -> str:
    return sql.Literal(text).as_string()


def _where(site: Site, connection: AsyncConnection[TupleRow]) -> list[str]:
    """Say in which database SQL is to be run, when it is not that which is streamed from."""
    info, link = connection.info, site.links.get("catalog")
    here = f"{info.host}:{info.port}" if info.hostaddr else info.host
    if link is not None and (link.host, link.database) == (here, info.dbname):
        return []
    return [f"-- in the database {info.dbname} at {here}:"]


QUESTIONS: Final = (Question("dead letters", "store", _dead_letters),)

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
           p.oid IS NOT NULL AND r.oid IS NOT NULL,
           has_database_privilege(current_database(), 'CREATE'),
           coalesce(has_schema_privilege(n.oid, 'CREATE')
                    AND has_schema_privilege(n.oid, 'USAGE'), false),
           coalesce(has_schema_privilege(n.oid, 'USAGE')
                    AND has_table_privilege(p.oid, 'SELECT')
                    AND has_table_privilege(p.oid, 'INSERT')
                    AND has_table_privilege(p.oid, 'UPDATE')
                    AND has_table_privilege(r.oid, 'SELECT')
                    AND has_table_privilege(r.oid, 'INSERT')
                    AND has_table_privilege(r.oid, 'DELETE'), false),
           pg_is_in_recovery(),
           current_setting('synchronous_commit')
      FROM (SELECT) AS one
      LEFT JOIN pg_namespace n ON n.nspname = 'walstream'
      LEFT JOIN pg_class p ON p.relnamespace = n.oid AND p.relname = 'progress'
      LEFT JOIN pg_class r ON r.relnamespace = n.oid AND r.relname = 'replayed'
"""

_PROGRESS: Final = """
    SELECT system_identifier, end_lsn::text FROM walstream.progress WHERE slot = %s AND route = %s
"""
