"""Which rows a change is about: what must stay in order when changes are delivered in parallel.

Two changes have to keep their order when their keys conflict. The key of a row is what its primary
key's columns were sent as; a route can name other columns. A change that moves a row from one key
to another has both. Where a key cannot be known, the change is about the whole table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, TypeAlias

from walstream.changes import Change, Column, Operation, Row

Key: TypeAlias = tuple[str, bytes]
"""The table, and a JSON array of the values of the key's columns.

The table is the partitioned one for a partition: a row may move from one partition to another.
"""

NO_KEY: Final = b"*"
"""In the place of the values for a table that has no key: its changes all keep their order."""

WHOLE_TABLE: Final = b""
"""In the place of the values when a change is about all rows, or about which is not known."""


def keys_of(change: Change[Any], columns: Sequence[str] | None = None) -> tuple[Key, ...]:
    """Return the keys of a change: one, or two when an update has changed the key.

    Args:
        change: as the route sees it: columns that are masked or left out are no key.
        columns: of which the key consists; None for the primary key.
    """
    layout = change.layout
    table = str(layout.root or layout.relation)
    if change.operation is Operation.TRUNCATE:
        return ((table, WHOLE_TABLE),)
    names = layout.key if columns is None else columns
    if not names:
        return ((table, NO_KEY),)
    if change.new_columns is None:
        return ((table, _values(change.identity, names)),)
    new = _values(change.sent_row, names)
    if change.operation is not Operation.UPDATE or new == WHOLE_TABLE:
        return ((table, new),)
    old = _values(change.identity, names)
    if old == WHOLE_TABLE and columns is None and change.identity:
        # The identity is that of another index: the update may have changed the primary key.
        return ((table, WHOLE_TABLE),)
    # Without the old values the new ones count.
    return ((table, new),) if old in (new, WHOLE_TABLE) else ((table, old), (table, new))


def conflict(one: Iterable[Key], other: Iterable[Key]) -> bool:
    """Whether two changes with these keys have to keep their order."""
    others = set(other)
    return any(
        table == its_table and (values == its_values or WHOLE_TABLE in (values, its_values))
        for table, values in one
        for its_table, its_values in others
    )


def _values(row: Row, names: Sequence[str]) -> bytes:
    columns = [row.column(name) for name in names]
    if not all(columns):
        return WHOLE_TABLE
    return b"[%b]" % b",".join([_value(column) for column in columns if column is not None])


_NUMBERS: Final = frozenset((20, 21, 23, 26, 700, 701, 1700))
"""int8, int2, int4, oid, float4, float8, numeric."""


def _value(column: Column) -> bytes:
    """Return a value as it was sent; a number the same from all versions of wal2json.

    From 2.6 on numbers are sent as strings. What is kept by a key outlives an upgrade.
    """
    value = bytes(column.value)
    is_number = column.typeoid in _NUMBERS and value.startswith(b'"')
    return value[1:-1] if is_number else value
