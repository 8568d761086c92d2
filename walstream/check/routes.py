"""The routes: whether their tables are there, and send what the routes want to see."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

import msgspec
import psycopg
from psycopg import sql

from walstream.catalog import Catalog, Table
from walstream.changes import Operation, Relation
from walstream.check.findings import (
    Finding,
    Outcome,
    Status,
    failed,
    identifier,
    ok,
    skipped,
    warning,
)
from walstream.check.site import Site
from walstream.config import RouteSpec
from walstream.destinations import Handler
from walstream.errors import WalstreamError
from walstream.filters import columns
from walstream.grammar import And, Comparison, Filter, Not, Or
from walstream.postgres import server_error
from walstream.preflight import verify_route
from walstream.router import Route


async def check_routes(
    site: Site, specs: Sequence[tuple[str, RouteSpec]], handlers: Mapping[str, Handler]
) -> list[Finding]:
    """Look at each route, at its handler if it has one, and at each table that it covers."""
    if not specs:
        nothing = warning(
            "nothing is routed anywhere",
            "name a handler (walstream check module:name), or write a [[routes]]",
        )
        return [Finding.of("routes", "routes", nothing)]
    return [
        Finding.of("routes", f"{name}: {spec.table}", outcome)
        for name, spec in specs
        for outcome in await _check_route(site, name, spec, handlers.get(name))
    ]


async def _check_route(
    site: Site, name: str, spec: RouteSpec, handler: Handler | None
) -> list[Outcome]:
    lacking = site.lacks("catalog")
    if lacking:
        return [skipped(lacking)]
    try:
        route = spec.route(name, handler, site.masking_key)
        await verify_route(site.catalog, route)
        tables = await _covered(site.catalog, route)
    except WalstreamError as error:
        return [failed(error)]
    except psycopg.Error as error:
        return [failed(server_error(error))]
    return _judge(tables, route, frozenset(spec.columns.mask))


async def _covered(catalog: Catalog, route: Route) -> list[Table]:
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


class _Concern(msgspec.Struct, frozen=True):
    """What is wrong with a table for a route; ``clause`` is the ALTER TABLE that mends it."""

    status: Status
    text: str
    clause: str = ""


def _judge(tables: Sequence[Table], route: Route, masked: frozenset[str]) -> list[Outcome]:
    """Tell each concern once, with all tables that have it."""
    if not tables:
        return [warning("there is no such table or partition now, nothing will come")]
    concerned: dict[_Concern, list[Table]] = {}
    for table in tables:
        for concern in _concerns(table, route, masked):
            concerned.setdefault(concern, []).append(table)
    if not concerned:
        return [ok(_summed(tables))]
    return [
        Outcome(
            concern.status,
            _named(having, route) + concern.text,
            "\n".join(_alter(table, concern.clause) for table in having if concern.clause),
        )
        for concern, having in concerned.items()
    ]


_IDENTITIES: Final = {"d": "default", "f": "full", "i": "using index", "n": "nothing"}

_KINDS: Final = {"v": "a view", "m": "a materialized view", "f": "a foreign table"}

_SHOWN: Final = 3
"""How many tables are named before the others are only counted."""


def _summed(tables: Sequence[Table]) -> str:
    identities = sorted({_IDENTITIES[table.replica_identity] for table in tables})
    count = f"{len(tables)} tables, " if len(tables) > 1 else ""
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


_FULL: Final = "REPLICA IDENTITY FULL"
_LOGGED: Final = "SET LOGGED"


def _concerns(table: Table, route: Route, masked: frozenset[str]) -> Iterator[_Concern]:
    if table.kind != "r":
        kind = _KINDS.get(table.kind, "not a table")
        yield _Concern(Status.PROBLEM, f"is {kind}, which has no changes of its own")
        return
    if table.persistence == "t":
        yield _Concern(Status.PROBLEM, "is temporary: its changes never reach the WAL")
        return
    if table.persistence == "u":
        yield _Concern(Status.PROBLEM, "is unlogged: its changes never reach the WAL", _LOGGED)
    if route.where is not None:
        unknown = columns(route.where) - {column.name for column in table.columns}
        if unknown:
            text = f"has no {_listed(unknown)}: the filter never matches"
            yield _Concern(Status.WARNING, text)
            return
    yield from _unchanging(table, route)
    if table.replica_identity != "f":
        yield from _partial_identity(table, route, masked)


def _unchanging(table: Table, route: Route) -> Iterator[_Concern]:
    """Look for columns that have to have changed, and of which that cannot be known."""
    if not route.changed or Operation.UPDATE not in route.operations:
        return
    changed = frozenset(route.changed)
    unknown = changed - {column.name for column in table.columns}
    if unknown:
        text = f"has no {_listed(unknown)}, which is to have changed"
        yield _Concern(Status.WARNING, text)
    carried = frozenset(table.identity)
    hidden = changed - unknown - carried
    if not hidden or not carried:  # without any identity there are no updates at all
        return
    text = (
        f"of the old row an update carries only {_listed(carried)}, so that nobody knows whether"
        f" {_listed(hidden)} changed: "
    )
    if changed & carried:
        text += f"updates that change nothing but {_listed(hidden)} are dropped"
        yield _Concern(Status.WARNING, text, _FULL)
    else:
        yield _Concern(Status.PROBLEM, text + "no update passes", _FULL)


def _partial_identity(table: Table, route: Route, masked: frozenset[str]) -> Iterator[_Concern]:
    """Look for what updates and deletes do not carry, and the route wants to see."""
    wanted = [one for one in (Operation.UPDATE, Operation.DELETE) if one in route.operations]
    carried = frozenset(table.identity)
    if not wanted:
        return
    if not carried:
        lost = " and ".join(f"{operation}s" for operation in wanted)
        text = f"{lost} are lost: there is no replica identity to send them by"
        yield _Concern(Status.PROBLEM, text, _FULL)
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


def _left_out(long: set[str], where: Filter | None, masked: frozenset[str]) -> Iterator[_Concern]:
    """Look at the columns whose values an update leaves out when they are long and unchanged."""
    text = "an update that leaves a value of 2 kB and more as it was does not carry it: "
    if where is not None and (read := long & columns(where)):
        outcome = f"then the filter on {_listed(read)} does not match"
        yield _Concern(Status.WARNING, text + outcome, _FULL)
    if hidden := long & masked:
        outcome = f"then {_listed(hidden)} comes as unchanged, not masked"
        yield _Concern(Status.WARNING, text + outcome, _FULL)


def _untestable(
    where: Filter, carried: frozenset[str], what: str, grave: Status
) -> Iterator[_Concern]:
    absent = columns(where) - carried
    if not absent:
        return
    text = f"{what} only {_listed(carried)}, the filter reads {_listed(absent)}: it"
    if _may_hold(where, carried):
        yield _Concern(Status.WARNING, f"{text} does not match where that decides", _FULL)
    else:
        yield _Concern(grave, f"{text} never matches", _FULL)


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


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


_PARTITIONS: Final = sql.SQL(
    """
    SELECT n.nspname, c.relname
      FROM pg_partition_tree(format('%%I.%%I', %(schema)s::text, %(name)s::text)::regclass) AS t
      JOIN pg_class c ON c.oid = t.relid
      JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE t.isleaf
     ORDER BY 1, 2
    """
)
