"""What must be right before streaming starts: the fatal part of ``walstream check``."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import Final

from walstream.catalog import Catalog, Server, Table
from walstream.changes import Relation
from walstream.destinations import Handler
from walstream.errors import ConfigError, DatabaseUnfit, RelationMissing, SetupError
from walstream.filters import Literal, literals
from walstream.postgres import RAISE_WAL_LEVEL
from walstream.router import Route
from walstream.values import Types

OLDEST_VERSION: Final = 140_000
"""PostgreSQL 14 is the oldest version that is supported upstream."""

STANDBY_VERSION: Final = 160_000
"""The first version whose standbys decode."""


def verify_server(server: Server) -> None:
    """Refuse a server that cannot stream.

    Raises:
        DatabaseUnfit: its version, also for being a standby, or its wal_level.
    """
    if server.version < OLDEST_VERSION:
        message = f"the server is PostgreSQL {server.version // 10_000}; 14 or later is needed"
        raise DatabaseUnfit(message)
    if server.in_recovery and server.version < STANDBY_VERSION:
        message = (
            f"the server is a standby with PostgreSQL {server.version // 10_000}: standbys decode"
            f" from {STANDBY_VERSION // 10_000} on"
        )
        raise DatabaseUnfit(
            message, hint="connect to the primary: target_session_attrs=read-write in the dsn"
        )
    if server.wal_level != "logical":
        message = f"wal_level is {server.wal_level}; logical decoding needs logical"
        raise DatabaseUnfit(message, hint=RAISE_WAL_LEVEL)


async def verify_routes(catalog: Catalog, routes: Iterable[Route]) -> None:
    """Check the routes that name one table against the database.

    Raises:
        ConfigError: tables and columns that are not there, filters that do not fit their types;
            one sentence for each.
    """
    problems = []
    for route in routes:
        try:
            await verify_route(catalog, route)
        except SetupError as error:
            problems.append(f"{route.name}: {error.message}")
    if problems:
        raise ConfigError(problems)


async def verify_route(catalog: Catalog, route: Route) -> None:
    """Check one route against the database; one whose table is a pattern fits anything.

    Raises:
        RelationMissing: its table or one of its columns is not there, or it is nothing that has
            changes.
        FilterError: its filter does not fit its columns' types.
    """
    relation = route.pattern.relation
    if relation is None:
        return
    table = await catalog.table(relation)
    if table is None:
        raise await _missing(catalog, relation)
    if reason := hopeless(table):
        raise RelationMissing(f"{relation} {reason}", hint=_HOPELESS)
    columns = {column.name: column.typeoid for column in table.columns}
    await catalog.learn_types(columns.values())
    await catalog.normalise(checked_literals(route, columns, catalog.types, relation))


def hopeless(table: Table) -> str:
    """Say why no change of a relation will ever come; nothing when they do."""
    if table.kind not in {"r", "p"}:
        kind = _KINDS.get(table.kind, "not a table")
        return f"is {kind}, which has no changes of its own"
    match table.persistence:
        case "t":
            return "is temporary: its changes never reach the WAL"
        case "u":
            return "is unlogged: its changes never reach the WAL"
        case _:
            return ""


_KINDS: Final = {"v": "a view", "m": "a materialized view", "f": "a foreign table"}

_HOPELESS: Final = "route the tables behind it, or ALTER TABLE ... SET LOGGED; see walstream check"


def checked_literals(
    route: Route, columns: Mapping[str, int], types: Types, relation: Relation
) -> list[Literal]:
    """Check a route against its table's columns; return what the server has to read.

    Args:
        route: on this one table.
        columns: the table's, with the OIDs of their types.
        types: at least those of the columns.
        relation: the table.

    Raises:
        RelationMissing: one of the route's columns is not there.
        FilterError: its filter does not fit its columns' types.
    """
    if route.projection is not None:
        route.projection.check(columns, relation)
    _check_changed(route, columns, relation)
    _check_handler(route, columns, relation)
    return [] if route.where is None else literals(route.where, columns, types)


def _check_changed(route: Route, columns: Collection[str], relation: Relation) -> None:
    unknown = [name for name in route.changed if name not in columns]
    if unknown:
        raise RelationMissing(
            f"{relation} has no column {', '.join(map(repr, unknown))}, which is to have changed",
            hint=f"its columns are {', '.join(columns)}",
        )


def _check_handler(route: Route, columns: Collection[str], relation: Relation) -> None:
    """Refuse a key, or a model's field, whose column the handler does not see."""
    if not isinstance(route.destination, Handler):
        return
    options = route.destination.options
    seen = [name for name in columns if route.projection is None or route.projection.passes(name)]
    wanted = {"key": [name for name in options.key or () if name not in seen]}
    if options.model is not None:
        wanted[f"model {options.model.name}"] = options.model.missing_columns(seen)
    for what, missing in wanted.items():
        if missing:
            raise RelationMissing(
                f"the {what} needs {', '.join(map(repr, missing))}, which the route does not"
                f" see of {relation}",
                hint=f"it sees {', '.join(seen)}",
            )


async def _missing(catalog: Catalog, relation: Relation) -> RelationMissing:
    """Say which table is missing, and which there are that may have been meant."""
    known = await catalog.tables()
    near = difflib.get_close_matches(str(relation), map(str, known), n=3)
    near += [
        str(other) for other in known if other.name == relation.name and str(other) not in near
    ]
    meant = f"; is {' or '.join(near)} meant?" if near else ""
    return RelationMissing(f"the table {relation} does not exist{meant}")
