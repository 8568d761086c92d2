"""What the server need not send: the tables and operations of all routes, as wal2json's options."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

from walstream.catalog import Catalog
from walstream.changes import Operation
from walstream.router import Route

_SPECIAL: Final = re.compile(r"[ \t\n\v\f\r',.*\\]")
"""Characters that wal2json wants a backslash before (its README, ``filter-tables``).

Its parser ends a name at whatever C's isspace() takes for white space, not at a space alone.
"""


TABLES_OPTION: Final = "add-tables"
"""Absent from the options when the tables have to be sorted out on our side."""


async def server_side_filter(catalog: Catalog, routes: Sequence[Route]) -> dict[str, str]:
    """Ask the server for what the routes can need, and for nothing else.

    Partitions are sent under their own names, and new ones may be made at any time: when a route
    wants a partitioned table, the tables are sorted out on our side.
    """
    options = {"actions": ",".join(sorted(_operations(routes)))}
    for route in routes:
        relation = route.pattern.relation
        table = await catalog.table(relation) if relation is not None else None
        if route.pattern.is_everything or (table is not None and table.is_partitioned):
            return options
    tables = sorted({_table_option(route) for route in routes})
    return {**options, TABLES_OPTION: ",".join(tables)}


def _operations(routes: Iterable[Route]) -> set[Operation]:
    return {
        operation
        for route in routes
        for operation in route.operations
        if operation is not Operation.TRUNCATE or route.wants_truncate()
    }


def _table_option(route: Route) -> str:
    """Write a pattern as wal2json's ``add-tables`` wants it."""
    pattern = route.pattern
    parts = [
        part if part == "*" else _SPECIAL.sub(r"\\\g<0>", part)
        for part in (pattern.schema, pattern.name)
    ]
    return ".".join(parts)
