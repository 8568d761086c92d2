"""What the server need not send: the tables and operations of all routes, as wal2json's options."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Final

from walstream.changes import Operation, Relation
from walstream.router import Route

_SPECIAL: Final = re.compile(r"[ \t\n\v\f\r',.*\\]")
"""Characters that wal2json wants a backslash before (its README, ``filter-tables``).

Its parser ends a name at whatever C's isspace() takes for white space, not at a space alone.
"""


TABLES_OPTION: Final = "add-tables"
"""Absent from the options when the tables have to be sorted out on our side."""


def server_side_filter(
    routes: Sequence[Route], partitioned: Collection[Relation]
) -> dict[str, str]:
    """Ask the server for what the routes can need, and for nothing else.

    Partitions are sent under their own names, of whatever schema, and new ones may be made at any
    time: when a route wants a partitioned table, or its pattern may cover one, the tables are
    sorted out on our side.

    Args:
        routes: all of them.
        partitioned: the partitioned tables of the database.
    """
    options = {"actions": ",".join(sorted(_operations(routes)))}
    relations = [route.pattern.relation for route in routes]
    if any(relation is None or relation in partitioned for relation in relations):
        return options
    tables = sorted({_table_option(relation) for relation in relations if relation})
    return {**options, TABLES_OPTION: ",".join(tables)}


def _operations(routes: Iterable[Route]) -> set[Operation]:
    return {
        operation
        for route in routes
        for operation in route.operations
        if operation is not Operation.TRUNCATE or route.wants_truncate()
    }


def _table_option(relation: Relation) -> str:
    """Write a table as wal2json's ``add-tables`` wants it."""
    return ".".join(_SPECIAL.sub(r"\\\g<0>", part) for part in (relation.schema, relation.name))
