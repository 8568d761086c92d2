"""What the server need not send: the tables and operations of all routes, as wal2json's options.

Logical messages are always sent: wal2json's ``actions`` and ``add-tables`` do not touch them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Final

import msgspec

from walstream.changes import Operation, Relation
from walstream.router import Route

_SPECIAL: Final = re.compile(r"[ \t\n\v\f\r',.*\\]")
"""Characters that wal2json wants a backslash before (its README, ``filter-tables``).

Its parser ends a name at whatever C's isspace() takes for white space, not at a space alone.
"""


class PushedDown(msgspec.Struct, frozen=True):
    """What is asked of the server, and what that leaves to us.

    ``operations`` and ``tables`` are those that it sends, None for all. ``follow_partitions``: a
    route wants a partitioned table, or its pattern may cover one; then it has to be found out for
    each table that comes whether it is a partition.
    """

    operations: frozenset[Operation] | None
    tables: frozenset[Relation] | None
    follow_partitions: bool

    @property
    def options(self) -> dict[str, str]:
        """wal2json's options that say so."""
        options = {}
        if self.operations is not None:
            options["actions"] = ",".join(sorted(self.operations))
        if self.tables:
            options["add-tables"] = ",".join(sorted(map(_table_option, self.tables)))
        return options

    def includes(self, other: PushedDown) -> bool:
        """Whether the server sends all that it would have to send for the other."""
        return self.operations in (None, other.operations) and (
            self.tables is None or (other.tables is not None and other.tables <= self.tables)
        )

    def sends(self, relation: Relation, operation: Operation) -> bool:
        """Whether the server sends such a change."""
        return (self.operations is None or operation in self.operations) and (
            self.tables is None or relation in self.tables
        )


def push_down(
    routes: Sequence[Route], partitioned: Collection[Relation], *, everything: bool = False
) -> PushedDown:
    """Ask the server for what the routes can need, and for nothing else.

    Partitions are sent under their own names, of whatever schema, and new ones may be made at any
    time: when a route wants a partitioned table, or its pattern may cover one, the tables are
    sorted out on our side.

    Args:
        routes: all of them.
        partitioned: the partitioned tables of the database.
        everything: ask for all changes. A change's ordinal counts what the server sent of its
            transaction: only so it does not depend on which other routes there are.
    """
    relations = {route.pattern.relation for route in routes}
    follow = any(relation is None or relation in partitioned for relation in relations)
    if everything:
        return PushedDown(None, None, follow)
    tables = frozenset(relation for relation in relations if relation is not None)
    return PushedDown(_operations(routes), None if follow else tables, follow)


def _operations(routes: Iterable[Route]) -> frozenset[Operation]:
    return frozenset(
        operation
        for route in routes
        for operation in route.operations
        if operation is not Operation.TRUNCATE or route.wants_truncate()
    )


def _table_option(relation: Relation) -> str:
    """Write a table as wal2json's ``add-tables`` wants it."""
    return ".".join(_SPECIAL.sub(r"\\\g<0>", part) for part in (relation.schema, relation.name))
