"""Changes made by hand, for tests that need no PostgreSQL.

They are the same objects that a stream brings, over JSON text as wal2json writes it: filters,
masks, models and ``to_json`` work on them as on any other. Each call gets a later place in an
imagined WAL.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from walstream import filters
from walstream.app import Walstream
from walstream.changes import Change, Column, Layout, Message, Operation, Relation, Transaction
from walstream.config import RouteSpec
from walstream.errors import FilterError
from walstream.filters import Literal
from walstream.loaders import TextLoaders
from walstream.lsn import Lsn
from walstream.offline import read_offline
from walstream.router import Route, Router, TablePattern
from walstream.testing.texts import oid_named, oid_of, raw_of
from walstream.values import Types


def insert(
    table: str,
    row: Mapping[str, Any],
    *,
    key: Sequence[str] | None = None,
    types: Mapping[str, str] | None = None,
    transaction: Transaction | None = None,
) -> Change:
    """Make the insert of a row.

    Args:
        table: ``schema.table``.
        row: the columns and their values, as ``change.row`` shall give them.
        key: the primary key's columns; ``id`` without, if there is such a column.
        types: PostgreSQL's types by column, such as ``int4`` or ``text[]``, where another one is
            wanted than the value's own: int8, float8, numeric, text, bool, bytea, date, timestamp,
            timestamptz, interval, uuid, jsonb for a dict, an array for a list. A ``str`` is a value
            of any type, as PostgreSQL prints it.
        transaction: the one that the change belongs to, such as ``other_change.transaction``;
            without it there is a new one.

    Raises:
        TypeError, ValueError: such a change cannot come.
    """
    shape = _Shape(table, [row], key, types)
    return shape.change(Operation.INSERT, transaction, row=row)


def update(  # noqa: PLR0913 - what an update carries, each by its name
    table: str,
    row: Mapping[str, Any],
    *,
    identity: Mapping[str, Any] | None = None,
    unchanged: Sequence[str] = (),
    key: Sequence[str] | None = None,
    types: Mapping[str, str] | None = None,
    transaction: Transaction | None = None,
) -> Change:
    """Make the update of a row.

    Args:
        table: as for `insert`.
        row: the new values.
        identity: the old values that Postgres sends: all of them under REPLICA IDENTITY FULL,
            otherwise the key. Without it the key has not changed.
        unchanged: columns that Postgres left out because the update did not touch them.
        key: as for `insert`.
        types: as for `insert`.
        transaction: as for `insert`.

    Raises:
        TypeError, ValueError: such a change cannot come.
    """
    both = sorted(set(unchanged) & set(row))
    if both:
        message = f"{', '.join(both)}: a column that is unchanged is not in the row"
        raise ValueError(message)
    shape = _Shape(table, [row, identity or {}, dict.fromkeys(unchanged)], key, types)
    if identity is None:
        identity = {name: row[name] for name in shape.key if name in row}
    change = shape.change(Operation.UPDATE, transaction, row=row, identity=identity)
    change.unchanged = tuple(unchanged)
    return change


def delete(
    table: str,
    identity: Mapping[str, Any],
    *,
    key: Sequence[str] | None = None,
    types: Mapping[str, str] | None = None,
    transaction: Transaction | None = None,
) -> Change:
    """Make the delete of a row; ``identity`` as for `update`, the rest as for `insert`.

    Raises:
        TypeError, ValueError: such a change cannot come.
    """
    shape = _Shape(table, [identity], key, types)
    return shape.change(Operation.DELETE, transaction, identity=identity)


def truncate(table: str, *, transaction: Transaction | None = None) -> Change:
    """Make the truncate of a table."""
    return _Shape(table, [], None, None).change(Operation.TRUNCATE, transaction)


def message(
    prefix: str,
    content: str,
    *,
    transactional: bool = True,
    transaction: Transaction | None = None,
) -> Message:
    """Make a logical message, as ``pg_logical_emit_message(transactional, prefix, content)`` does.

    Raises:
        ValueError: it is to belong to a transaction, and not to be transactional.
    """
    if not transactional:
        if transaction is not None:
            raise ValueError("a message that is not transactional belongs to no transaction")
        return Message(prefix, content, Lsn(next(_positions)))
    transaction = transaction or new_transaction()
    return Message(prefix, content, Lsn(next(_positions)), transaction, _next_ordinal(transaction))


def new_transaction(*, commit_time: datetime | None = None) -> Transaction:
    """Begin a transaction, to be given to several changes.

    Args:
        commit_time: with a time zone; now without.
    """
    commit_time = datetime.now(UTC) if commit_time is None else commit_time.astimezone(UTC)
    text = commit_time.isoformat(" ", timespec="microseconds").removesuffix(":00")
    commit_lsn = next(_positions)
    return Transaction(next(_xids), Lsn(commit_lsn), Lsn(commit_lsn + 0x30), text)


def passes(change: Change[Any], where: str) -> bool:
    """Whether a route with this filter keeps a change.

    Raises:
        ConfigError, FilterError: the filter cannot be read, or does not fit the columns.
    """
    return routed(change, where=where) is not None


def routed(change: Change[Any], *operations: str, **route: Any) -> Change[Any] | None:
    """Return what a handler would get of a change, or None when it does not get it.

    Args:
        change: of any table.
        *operations: as for ``Walstream.on``.
        **route: ``where``, ``changed``, ``include``, ``exclude``, ``mask``, ``leaving`` and
            ``model`` as for ``Walstream.on``. Hashes are made with the key ``testing``.

    Raises:
        ConfigError, FilterError: the route is wrong, or its filter does not fit the columns.
        RowInvalid: the row does not fit the model.
    """
    app = Walstream()
    table = TablePattern(change.relation.schema, change.relation.name)
    app.on(str(table), *operations, **route)(lambda *_: None)
    [(spec, handler)] = app.handlers
    assert isinstance(spec, RouteSpec)  # noqa: S101 - what `on` makes
    router = Router([spec.route("routed", handler, b"testing")])
    [only] = router.routes
    _verify_columns(only, change)
    literals = router.literals(only, change.layout)
    router.bind(change.layout, {only}, {one: _read(one, change.layout.types) for one in literals})
    kept = [seen for _, seen in router.route(change)]
    if not kept:
        return None
    model = handler.options.model
    return kept[0] if model is None else model.apply(kept[0])


class _Shape:
    """A relation as the columns of one change show it."""

    def __init__(
        self,
        table: str,
        rows: Iterable[Mapping[str, Any]],
        key: Sequence[str] | None,
        types: Mapping[str, str] | None,
    ) -> None:
        self._types = types or {}
        self.columns: dict[str, int] = {}
        for row in rows:
            for name, value in row.items():
                if value is not None or name not in self.columns:
                    self.columns[name] = self._oid(name, value)
        unknown = sorted({*self._types, *(key or ())}.difference(self.columns))
        if unknown:
            text = f"{', '.join(unknown)}: the change has no such column"
            raise ValueError(text)
        self.relation = _relation(table)
        self.key = _usual_key(self.columns) if key is None else list(key)

    def change(
        self,
        operation: Operation,
        transaction: Transaction | None,
        *,
        row: Mapping[str, Any] | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> Change:
        transaction = transaction or new_transaction()
        return Change(
            operation=operation,
            layout=self._layout(identity if row is None else row, identity or {}),
            transaction=transaction,
            ordinal=_next_ordinal(transaction),
            new_columns=self._sent(row),
            sent_identity=self._sent(identity),
        )

    def _oid(self, name: str, value: Any) -> int:
        return oid_named(self._types[name]) if name in self._types else oid_of(value)

    def _layout(self, carried: Mapping[str, Any] | None, identity: Mapping[str, Any]) -> Layout:
        names = list(carried or {})
        return Layout(
            relation=self.relation,
            names=names,
            typeoids=[self.columns[name] for name in names],
            key=self.key,
            types=_TYPES,
            columns=self.columns,
            is_full=set(identity) > set(self.key),
        )

    def _sent(self, values: Mapping[str, Any] | None) -> list[Column] | None:
        if values is None:
            return None
        columns = self.columns
        return [
            Column(name, raw_of(value, columns[name], _TYPES), columns[name])
            for name, value in values.items()
        ]


def _relation(table: str) -> Relation:
    relation = TablePattern.parse(table).relation
    if relation is None:
        text = f"{table!r} is not one table"
        raise ValueError(text)
    return relation


def _usual_key(columns: Mapping[str, int]) -> list[str]:
    return ["id"] if "id" in columns else []


def _verify_columns(route: Route, change: Change[Any]) -> None:
    """Refuse a filter on columns that the table seems not to have, as the start of a stream does.

    Of a delete it cannot be told: it carries the identity alone.
    """
    if route.where is None or change.new_columns is None:
        return
    unknown = sorted(filters.columns(route.where) - change.layout.columns.keys())
    if unknown:
        text = f"{change.relation}: the change has no column {', '.join(map(repr, unknown))}"
        raise FilterError(text, hint="a column that Postgres left out is named by unchanged=[...]")


def _read(literal: Literal, types: Types) -> str:
    """Read a filter's value as the server would.

    Raises:
        FilterError: only a server could tell.
    """
    read = read_offline(literal, types)
    if read is None:
        text = f"{literal.column}: what {literal.text!r} is as {literal.type_name} tells a server"
        raise FilterError(
            text, hint="write it as PostgreSQL prints it, or test this filter with walstream_stream"
        )
    return read


def _next_ordinal(transaction: Transaction) -> int:
    _ordinals[transaction.end_lsn] += 1
    return _ordinals[transaction.end_lsn]


_TYPES: Final = Types(TextLoaders())
_positions: Final = itertools.count(0x1000000, 0x100)
_xids: Final = itertools.count(1000)
_ordinals: Final[defaultdict[int, int]] = defaultdict(int)
