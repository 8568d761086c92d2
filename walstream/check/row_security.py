"""Whether the server can be asked what its row security shows, and what it would say.

Also: tables with row security that a role reads as if they had none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec

from walstream.access.connections import Connection
from walstream.catalog import Catalog, Table
from walstream.changes import Relation
from walstream.check.findings import Outcome, Status, identifier, ok, problem, warning
from walstream.check.routes import Concern, listed
from walstream.check.site import Question, Site
from walstream.config.access import AccessConfig, RoleConfig, TableConfig
from walstream.projection import Projection
from walstream.router import TablePattern

# ---- Who asks


async def _asks(site: Site) -> Outcome | None:
    """Look at the role that asks, and at those that it asks as.

    Raises:
        WalstreamError: it cannot connect, or row security does not hold for it.
    """
    access = site.config.access
    if not access.asks_row_security:
        return None
    dsn = access.row_security.own_dsn() or site.config.postgres.catalog_dsn()
    connection = await site.connect(dsn)
    await Connection(connection).verify()
    personas = _personas(access)
    cursor = await connection.execute(_PERSONAS, (personas,))
    found = [_Persona(*row) for row in await cursor.fetchall()]
    unknown = [one.name for one in found if not one.exists]
    if unknown:
        return problem(
            f"there is no role {listed(unknown)} on the server: its readers see nothing",
            *(f"CREATE ROLE {identifier(name)} NOLOGIN;" for name in unknown),
            "-- or set postgres_role under [access.roles.<name>]",
        )
    asker = found[0].asker
    foreign = [one.name for one in found if not one.may_be]
    if foreign:
        return problem(
            f"{asker} may not act as {listed(foreign)}: its readers see nothing",
            *(f"GRANT {identifier(name)} TO {identifier(asker)};" for name in foreign),
        )
    mighty = [one.name for one in found if one.is_mighty]
    if mighty:
        return warning(
            f"row security does not hold for {listed(mighty)}: its readers see all rows",
            '-- set rows = "all" in place of rls = true, which asks for nothing',
        )
    return ok(f"{asker} asks as {listed(personas)}")


class _Persona(msgspec.Struct, frozen=True):
    name: str
    asker: str
    exists: bool
    may_be: bool
    is_mighty: bool


def _personas(access: AccessConfig) -> list[str]:
    asked = {
        role.postgres_role or name
        for name, role in access.roles.items()
        if any(table.rls for table in role.tables)
    }
    return sorted(asked)


_PERSONAS: Final = b"""
    SELECT named.name, session_user, r.oid IS NOT NULL,
           coalesce(pg_has_role(session_user, r.oid,
               CASE WHEN current_setting('server_version_num')::int >= 160000
                    THEN 'SET' ELSE 'MEMBER' END), false),
           coalesce(r.rolsuper OR r.rolbypassrls, false)
      FROM unnest(%s::text[]) AS named (name)
      LEFT JOIN pg_roles r ON r.rolname = named.name
     ORDER BY 1
"""

QUESTIONS: Final = (Question("access", "row security", _asks),)

# ---- Tables


async def concerns(
    catalog: Catalog, table: Table, section: TableConfig, role: tuple[str, RoleConfig]
) -> list[Concern]:
    """Say what row security means for a role that reads a table.

    Raises:
        WalstreamError: the catalog cannot be asked.
    """
    if not section.rls:
        is_told = section.rows is None and section.condition is None
        return [_IGNORED] if table.has_row_security and is_told else []
    pattern = TablePattern.parse(section.table)
    covered = [one for one in (table.relation, *table.ancestors) if pattern.covers(one)]
    name, settings = role
    persona = settings.postgres_role or name
    rows = await catalog.rows(_SECURITY, _asked(covered[-1], persona))
    projection = section.columns.projection(b"-")
    return [one for row in rows for one in _judged(_Security(*row), persona, table, projection)]


_IGNORED: Final = Concern(
    Status.WARNING,
    "has row security, which does not count here: the role reads all rows (set rls = true, a"
    ' where, or rows = "all")',
)


class _Security(msgspec.Struct, frozen=True):
    is_enabled: bool
    has_key: bool
    has_policies: bool
    is_owner: bool
    readable: list[str]


def _asked(relation: Relation, persona: str) -> dict[str, str]:
    return {"schema": relation.schema, "name": relation.name, "role": persona}


def _judged(
    found: _Security, persona: str, table: Table, projection: Projection | None
) -> Iterator[Concern]:
    if not found.has_key:
        text = "has no primary key, by which row security is asked: no row of it is seen"
        yield Concern(Status.PROBLEM, text)
    if not found.is_enabled:
        text = f"has no row security: what {persona} may SELECT is seen, which is all rows"
        yield Concern(Status.WARNING, text, "ENABLE ROW LEVEL SECURITY")
    elif found.is_owner:
        text = f"belongs to {persona}, whom its row security does not hold for"
        yield Concern(Status.WARNING, text, "FORCE ROW LEVEL SECURITY")
    elif not found.has_policies:
        text = f"has no policy that lets {persona} SELECT: no row of it is seen"
        yield Concern(Status.WARNING, text)
    read = {one.name for one in table.columns if projection is None or projection.shows(one.name)}
    hidden = (read | set(table.key)) - set(found.readable)
    if hidden:
        text = f"{persona} may not SELECT {listed(hidden)}: no row of it is seen"
        yield Concern(Status.PROBLEM, text)


_SECURITY: Final = b"""
    SELECT c.relrowsecurity,
           EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary),
           EXISTS (SELECT FROM pg_policy p
                    WHERE p.polrelid = c.oid AND p.polpermissive AND p.polcmd IN ('r', '*')
                      AND (0 = ANY (p.polroles)
                           OR EXISTS (SELECT FROM unnest(p.polroles) AS listed (oid)
                                       WHERE pg_has_role(r.oid, listed.oid, 'USAGE')))),
           pg_has_role(r.oid, c.relowner, 'USAGE') AND NOT c.relforcerowsecurity,
           ARRAY(SELECT a.attname::text
                   FROM pg_attribute a
                  WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
                    AND has_schema_privilege(r.oid, n.oid, 'USAGE')
                    AND has_column_privilege(r.oid, c.oid, a.attnum, 'SELECT'))
      FROM pg_class c
      JOIN pg_namespace n ON n.oid = c.relnamespace
      JOIN pg_roles r ON r.rolname = %(role)s
     WHERE n.nspname = %(schema)s AND c.relname = %(name)s
"""
