"""The routes: whether their tables are there, and send what the routes want to see."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, TypeAlias

import msgspec
from psycopg import sql

from walstream.assembly import make_router
from walstream.catalog import Catalog, Table
from walstream.changes import Operation, Relation
from walstream.check.findings import (
    Finding,
    Outcome,
    Status,
    failed,
    identifier,
    in_words,
    ok,
    problem,
    skipped,
    warning,
)
from walstream.check.site import Site, answered
from walstream.config import RouteSpec
from walstream.destinations import Handler
from walstream.errors import AccessRefused, ConfigError, UsageError
from walstream.filters import columns
from walstream.grammar import And, Comparison, Filter, Not, Or
from walstream.preflight import hopeless, verify_route
from walstream.router import Route


async def check_routes(site: Site) -> list[Finding]:
    """Look at each route, at its handler if it has one, and at each table that it covers."""
    specs = _specs(site)
    findings = [
        Finding.of("routes", f"{name}: {spec.table}", outcome)
        for name, spec, handler in specs
        for outcome in await _check_route(site, name, spec, handler)
    ]
    together = _check_together(site, specs)
    return [*findings, *([Finding.of("routes", "routes", together)] if together else [])]


_Spec: TypeAlias = tuple[str, RouteSpec, Handler | None]


def _specs(site: Site) -> list[_Spec]:
    """List all that would be routed, each with the name that it is reported by."""
    to_handlers: list[_Spec] = [
        (handler.name, spec, handler)
        for spec, handler in site.handlers
        if isinstance(spec, RouteSpec)
    ]
    return to_handlers + [
        (spec.name or f"routes[{place}]", spec, None)
        for place, spec in enumerate(site.config.routes)
    ]


def _check_together(site: Site, specs: Sequence[_Spec]) -> Outcome | None:
    """Make the routes as a run does, which refuses none at all, and two of one name."""
    try:
        make_router(site.config, site.handlers)
    except UsageError as nothing:  # there may be nothing yet when a database is made ready
        return warning(nothing.message, *in_words(nothing.hint))
    except ConfigError as error:
        # One that cannot be made by itself has been told of already.
        return None if _unmakeable(site, specs) else failed(error)
    return None


def _unmakeable(site: Site, specs: Sequence[_Spec]) -> bool:
    try:
        for name, spec, handler in specs:
            spec.route(name, handler, site.masking_key)
    except ConfigError:
        return True
    return False


async def _check_route(
    site: Site, name: str, spec: RouteSpec, handler: Handler | None
) -> list[Outcome]:
    found: list[Outcome] = []

    async def ask() -> Outcome | None:
        found.extend(await _judged(site, spec.route(name, handler, site.masking_key), spec))
        return None

    lacking = site.lacks("catalog")
    if lacking:
        return [skipped(lacking)]
    error = await answered(site, ask())
    return found if error is None else [error]


async def _judged(site: Site, route: Route, spec: RouteSpec) -> list[Outcome]:
    tables = await covered(site.catalog, route)
    named = [table for table in tables if table.relation == route.pattern.relation]
    if not any(map(hopeless, named)):  # told below, with what mends it
        try:
            await verify_route(site.catalog, route)
        except AccessRefused as refused:
            return [_refused(site, refused)]
    keyed = await immediately_keyed(site.catalog, tables)
    return _judge(tables, route, frozenset(spec.columns.mask), keyed)


def _refused(site: Site, refused: AccessRefused) -> Outcome:
    """The server reads a filter's values as their columns' types, which it has to be let name."""
    schema = _DENIED.search(refused.message)
    if schema is None:
        return failed(refused)
    role = identifier(site.catalog_user)
    return problem(
        f"{site.catalog_user} may not use the schema {schema[1]}, which a type of a column is in",
        f"GRANT USAGE ON SCHEMA {identifier(schema[1])} TO {role};",
    )


_DENIED: Final = re.compile(r"permission denied for schema (.+)$")


async def covered(catalog: Catalog, route: Route) -> list[Table]:
    """List what a route covers: in place of a partitioned table the partitions with its rows."""
    pattern = route.pattern
    relations = (
        await catalog.tables(pattern.schema, pattern.name)
        if pattern.relation is None
        else [pattern.relation]
    )
    found: dict[Relation, Table | None] = {}
    for named in relations:
        if not route.wants(named, ()):
            continue  # walstream's own
        found[named] = table = await catalog.table(named)
        if table is not None and table.is_partitioned:
            for partition in await _partitions(catalog, named):
                found[partition] = await catalog.table(partition)
    return [table for table in found.values() if table is not None and not table.is_partitioned]


async def _partitions(catalog: Catalog, root: Relation) -> list[Relation]:
    rows = await catalog.rows(_PARTITIONS, {"schema": root.schema, "name": root.name})
    return [Relation(*row) for row in rows]


async def immediately_keyed(catalog: Catalog, tables: Sequence[Table]) -> frozenset[Relation]:
    """Return the tables whose primary key could be their identity, and is not."""
    if all(table.replica_identity in "df" or not table.key for table in tables):
        return frozenset()
    return frozenset(Relation(*row) for row in await catalog.rows(_KEYED))


class Concern(msgspec.Struct, frozen=True):
    """What is wrong with a table for a route; ``clause`` is the ALTER TABLE that mends it."""

    status: Status
    text: str
    clause: str = ""


def _judge(
    tables: Sequence[Table], route: Route, masked: frozenset[str], keyed: frozenset[Relation]
) -> list[Outcome]:
    """Tell each concern once, with all tables that have it."""
    if not tables:
        return [warning("there is no such table or partition now, nothing will come")]
    concerned: dict[Concern, list[Table]] = {}
    for table in tables:
        for concern in _with_cheapest(table, route, masked, is_keyed=table.relation in keyed):
            concerned.setdefault(concern, []).append(table)
    return told(concerned, route) if concerned else [ok(_summed(tables))]


def told(concerned: Mapping[Concern, Sequence[Table]], route: Route) -> list[Outcome]:
    """Tell each concern with all tables that have it."""
    return [
        Outcome(
            concern.status,
            _named(having, route) + concern.text,
            "\n".join(_alter(table, concern.clause) for table in having if concern.clause),
        )
        for concern, having in concerned.items()
    ]


_IDENTITIES: Final = {"d": "default", "f": "full", "i": "using index", "n": "nothing"}

_SHOWN: Final = 3
"""How many tables are named before the others are only counted."""


def _summed(tables: Sequence[Table]) -> str:
    identities = sorted({_IDENTITIES[table.replica_identity] for table in tables})
    what = "partitions" if all(table.ancestors for table in tables) else "tables"
    count = f"{len(tables)} {what}, " if len(tables) > 1 else ""
    return f"{count}replica identity {' and '.join(identities)}"


def _named(tables: Sequence[Table], route: Route) -> str:
    """Name the tables that a concern is about, unless the route does it itself."""
    relations = [table.relation for table in tables]
    if relations == [route.pattern.relation]:
        return ""
    rest = len(relations) - _SHOWN
    names = ", ".join(map(str, relations[:_SHOWN]))
    return f"{names} and {rest} more: " if rest > 0 else f"{names}: "


def _alter(table: Table, clause: str) -> str:
    return f"ALTER TABLE {identifier(table.relation.schema, table.relation.name)} {clause};"


FULL: Final = "REPLICA IDENTITY FULL"
BY_KEY: Final = "REPLICA IDENTITY DEFAULT"
_LOGGED: Final = "SET LOGGED"


def _with_cheapest(
    table: Table, route: Route, masked: frozenset[str], *, is_keyed: bool
) -> list[Concern]:
    """List the concerns; they are mended by the key where that is enough, which costs no WAL."""
    concerns = list(_concerns(table, route, masked))
    if is_keyed and any(concern.clause == FULL for concern in concerns):
        by_key = msgspec.structs.replace(table, replica_identity="d", identity=table.key)
        if not any(concern.clause == FULL for concern in _concerns(by_key, route, masked)):
            return [
                msgspec.structs.replace(concern, clause=BY_KEY)
                if concern.clause == FULL
                else concern
                for concern in concerns
            ]
    return concerns


def _concerns(table: Table, route: Route, masked: frozenset[str]) -> Iterator[Concern]:
    if reason := hopeless(table):
        clause = _LOGGED if table.persistence == "u" else ""
        yield Concern(Status.PROBLEM, reason, clause)
        if not clause:
            return
    if route.where is not None:
        unknown = columns(route.where) - {column.name for column in table.columns}
        if unknown:
            text = f"has no {listed(unknown)}: the filter never matches"
            yield Concern(Status.WARNING, text)
            return
    yield from _unchanging(table, route)
    if table.replica_identity != "f":
        yield from _partial_identity(table, route, masked)


def _unchanging(table: Table, route: Route) -> Iterator[Concern]:
    """Look for columns that have to have changed, and of which that cannot be known."""
    if not route.changed or Operation.UPDATE not in route.operations:
        return
    changed = frozenset(route.changed)
    unknown = changed - {column.name for column in table.columns}
    if unknown:
        text = f"has no {listed(unknown)}, which is to have changed"
        yield Concern(Status.WARNING, text)
    carried = frozenset(table.identity)
    hidden = changed - unknown - carried
    if not hidden or not carried:  # without any identity there are no updates at all
        return
    text = (
        f"of the old row an update carries only {listed(carried)}, so that nobody knows whether"
        f" {listed(hidden)} changed: "
    )
    if changed & carried:
        text += f"updates that change nothing but {listed(hidden)} are dropped"
        yield Concern(Status.WARNING, text, FULL)
    else:
        yield Concern(Status.PROBLEM, text + "no update passes", FULL)


def _partial_identity(table: Table, route: Route, masked: frozenset[str]) -> Iterator[Concern]:
    """Look for what updates and deletes do not carry, and the route wants to see."""
    wanted = [one for one in (Operation.UPDATE, Operation.DELETE) if one in route.operations]
    carried = frozenset(table.identity)
    if not wanted:
        return
    if not carried:
        lost = " and ".join(f"{operation}s" for operation in wanted)
        text = f"{lost} are lost: there is no replica identity to send them by"
        yield Concern(Status.PROBLEM, text, FULL)
        return
    where = route.where
    if where is not None and Operation.DELETE in wanted:
        # A route that just wants everything still gets its inserts and updates.
        grave = Status.PROBLEM if route.explicit else Status.WARNING
        yield from _untestable(where, carried, "a delete carries", grave)
    if where is not None and Operation.UPDATE in wanted and route.leaving:
        yield from _untestable(where, carried, "of the old row an update carries", Status.PROBLEM)
    if Operation.UPDATE in wanted:
        long = {column.name for column in table.columns if column.toastable} - carried
        yield from _left_out(long, where, masked)


def _left_out(long: set[str], where: Filter | None, masked: frozenset[str]) -> Iterator[Concern]:
    """Look at the columns whose values an update leaves out when they are long and unchanged."""
    text = "an update that leaves a value of 2 kB and more as it was does not carry it: "
    if where is not None and (read := long & columns(where)):
        outcome = f"then the filter on {listed(read)} does not match"
        yield Concern(Status.WARNING, text + outcome, FULL)
    if hidden := long & masked:
        outcome = f"then {listed(hidden)} comes as unchanged, not masked"
        yield Concern(Status.WARNING, text + outcome, FULL)


def _untestable(
    where: Filter, carried: frozenset[str], what: str, grave: Status
) -> Iterator[Concern]:
    absent = columns(where) - carried
    if not absent:
        return
    text = f"{what} only {listed(carried)}, the filter reads {listed(absent)}: it"
    if _may_hold(where, carried):
        yield Concern(Status.WARNING, f"{text} does not match where that decides", FULL)
    else:
        yield Concern(grave, f"{text} never matches", FULL)


def _may_hold(where: Filter, carried: frozenset[str], *, negated: bool = False) -> bool:
    """Whether a filter can be true, or when ``negated`` false, by the carried columns alone."""
    match where:
        case Comparison(column=column):
            return column in carried
        case Not(negated=inner):
            return _may_hold(inner, carried, negated=not negated)
        case And(parts) | Or(parts):
            held = (_may_hold(part, carried, negated=negated) for part in parts)
            # De Morgan: for an Or to be false, all of its parts must be.
            return all(held) if isinstance(where, And) is not negated else any(held)


def listed(names: Iterable[str]) -> str:
    """Write names with commas between them, in order."""
    return ", ".join(sorted(names))


_PARTITIONS: Final = sql.SQL(
    """
    SELECT pn.nspname, p.relname
      FROM pg_class c
      JOIN pg_namespace n ON n.oid = c.relnamespace
     CROSS JOIN pg_partition_tree(c.oid) AS t
      JOIN pg_class p ON p.oid = t.relid
      JOIN pg_namespace pn ON pn.oid = p.relnamespace
     WHERE n.nspname = %(schema)s AND c.relname = %(name)s AND t.isleaf
     ORDER BY 1, 2
    """
)

_KEYED: Final = sql.SQL(
    """
    SELECT n.nspname, c.relname
      FROM pg_index i
      JOIN pg_class c ON c.oid = i.indrelid
      JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE i.indisprimary AND i.indimmediate AND c.relreplident NOT IN ('d', 'f')
    """
)
