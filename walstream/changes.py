"""What flows: transactions, changes, messages, and the rows inside them.

A change is plain and complete when it is built. Its values stay the JSON text that wal2json sent
until something looks at them: then they become the Python object that a psycopg ``SELECT`` of the
column would give, or the JSON that ``to_jsonb`` would give.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from enum import StrEnum
from functools import lru_cache
from typing import Any, Final, Generic

import msgspec
from typing_extensions import TypeVar

from walstream.errors import DecodeError
from walstream.lsn import Lsn
from walstream.values import Types


class Operation(StrEnum):
    """What happened to a relation. ``read`` marks the rows of a snapshot."""

    INSERT = "insert"
    UPDATE = "update"
    DELETE = "delete"
    TRUNCATE = "truncate"
    READ = "read"


class Relation(msgspec.Struct, frozen=True, order=True):
    """A table by its schema and name, as they are in the catalog: unquoted, case-sensitive."""

    schema: str
    name: str

    def __str__(self) -> str:
        """Print as ``schema.name``, for people."""
        return f"{self.schema}.{self.name}"


class Column(msgspec.Struct, gc=False):
    """One value of a record: the JSON scalar that wal2json wrote, and the OID of its type."""

    name: str
    value: msgspec.Raw
    typeoid: int


class Layout(msgspec.Struct, eq=False, frozen=True):
    """The shape of a relation's records: made once, shared by all changes of that shape.

    ``key`` names the primary key's columns, ``ancestors`` the partitioned tables above a partition,
    nearest first. ``columns`` are all columns of the table in its order, with their types;
    ``missing`` names those that records of this shape leave out and that can hold TOASTed values.
    ``toastable`` are all that can, and ``is_full`` tells of REPLICA IDENTITY FULL, both as the
    catalog had it when the shape first came; ``in_catalog`` that it had the relation at all.
    ``table_columns`` are the table's columns and types then: shapes of different ones are of
    different times.
    """

    relation: Relation
    names: list[str]
    typeoids: list[int]
    key: list[str]
    types: Types
    ancestors: tuple[Relation, ...] = ()
    columns: Mapping[str, int] = msgspec.field(default_factory=dict)
    missing: tuple[str, ...] = ()
    toastable: tuple[str, ...] = ()
    is_full: bool = False
    in_catalog: bool = True
    table_columns: tuple[tuple[str, int], ...] = ()
    places: dict[str, int] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Note where in a record each column is."""
        self.places.update({name: place for place, name in enumerate(self.names)})

    @property
    def root(self) -> Relation | None:
        """The partitioned table that the relation is a partition of, at whatever depth."""
        return self.ancestors[-1] if self.ancestors else None


class Transaction(msgspec.Struct, eq=False, frozen=True):
    """The transaction that a change belongs to.

    ``commit_lsn`` is where its commit record starts, ``end_lsn`` where it ends: the position that
    is confirmed once every change of the transaction is taken.
    """

    xid: int
    commit_lsn: Lsn
    end_lsn: Lsn
    commit_timestamp: str

    @property
    def commit_time(self) -> datetime:
        """When it was committed, by the server's clock."""
        return datetime.fromisoformat(self.commit_timestamp)


class Begin(msgspec.Struct, frozen=True):
    """A committed transaction starts to arrive."""

    transaction: Transaction


class Commit(msgspec.Struct, frozen=True):
    """The transaction has arrived completely."""

    transaction: Transaction


class UnchangedValueError(KeyError):
    """The value of an unchanged TOASTed column was asked for, and Postgres did not send it."""

    def __init__(self, relation: Relation, column: str) -> None:
        super().__init__(column)
        self.relation = relation
        self.column = column

    def __str__(self) -> str:
        """Say what to do about it."""
        return (
            f"column {self.column!r} of {self.relation} is unchanged, and Postgres does not send"
            " unchanged TOASTed values; use row.get(), look into change.unchanged, or set"
            " REPLICA IDENTITY FULL on the table"
        )


class Row(Mapping[str, Any]):
    """Column names and their values, in the order of the table.

    A value is converted when it is first asked for. Columns that Postgres left out are not in the
    mapping; asking for one raises `UnchangedValueError`, which is a `KeyError`.
    """

    __slots__ = ("_by_name", "_columns", "_layout", "_loaded", "_unchanged")

    def __init__(
        self, layout: Layout, columns: list[Column], unchanged: tuple[str, ...] = ()
    ) -> None:
        self._layout = layout
        self._columns = columns
        self._by_name: dict[str, Column] | None = None
        self._loaded: dict[str, Any] = {}
        self._unchanged = unchanged

    def __getitem__(self, name: str) -> Any:
        """Return the value as psycopg would load it.

        Raises:
            UnchangedValueError: Postgres did not send the value because it did not change.
            KeyError: the row has no such column.
        """
        loaded = self._loaded
        if name in loaded:
            return loaded[name]
        column = self.column(name)
        if column is None:
            if name in self._unchanged:
                raise UnchangedValueError(self._layout.relation, name)
            raise KeyError(name)
        value = loaded[name] = self._layout.types.load(column.typeoid, column.value)
        return value

    def __iter__(self) -> Iterator[str]:
        """Iterate over the column names."""
        return iter([column.name for column in self._columns])

    def __len__(self) -> int:
        """Count the columns that are there."""
        return len(self._columns)

    def __repr__(self) -> str:
        """Print the column names only: values must not reach a log by accident."""
        return f"Row({', '.join(self)})"

    def column(self, name: str) -> Column | None:
        """Return the column as it was sent, or None when it was not."""
        # Nearly always a column is where the layout has it: a dictionary for every row would cost
        # more than all that is done with most rows.
        columns = self._columns
        place = self._layout.places.get(name, len(columns))
        if place < len(columns) and columns[place].name == name:
            return columns[place]
        if self._by_name is None:
            self._by_name = {column.name: column for column in columns}
        return self._by_name.get(name)


RowT = TypeVar("RowT", default=Row)


class Change(msgspec.Struct, Generic[RowT], eq=False, gc=False):
    """One row inserted, updated or deleted, or one table truncated.

    ``new_columns`` and ``identity_columns`` are what was sent; ``row``, ``identity`` and ``key``
    are the views that handlers want. ``Change[Order]`` is a change whose ``row`` is a model
    (`walstream.typed`), and ``Change`` alone is ``Change[Row]``.

    The identity of an update stays JSON (``sent_identity``) until somebody looks at it: few do, and
    under REPLICA IDENTITY FULL it is half of the record.

    ``unchanged`` names the columns that Postgres left out: TOASTed values that an UPDATE did not
    touch. ``leaving`` is true for an UPDATE that a route asked for because its new row no longer
    passes the filter that its old row passed.
    """

    operation: Operation
    layout: Layout
    transaction: Transaction
    ordinal: int
    new_columns: list[Column] | None = None
    sent_identity: list[Column] | msgspec.Raw | None = None
    unchanged: tuple[str, ...] = ()
    leaving: bool = False
    _row: RowT | None = None
    _identity: Row | None = None

    @property
    def relation(self) -> Relation:
        """The table, or the partition, that the row is in."""
        return self.layout.relation

    @property
    def root(self) -> Relation | None:
        """The partitioned table that ``relation`` is a partition of."""
        return self.layout.root

    @property
    def identity_columns(self) -> list[Column] | None:
        """The old values that Postgres sent, as they were sent.

        Raises:
            DecodeError: they are not what wal2json writes.
        """
        sent = self.sent_identity
        if isinstance(sent, msgspec.Raw):
            sent = self.sent_identity = decode_columns(sent)
        return sent

    @property
    def row(self) -> RowT:
        """The new values; for a delete and a truncate an empty `Row`, also with a model."""
        row = self._row
        if row is None:
            # A change that was given no model is a Change[Row].
            row = self._row = Row(self.layout, self.new_columns or [], self.unchanged)  # type: ignore[assignment]
        return row  # type: ignore[return-value]

    @property
    def sent_row(self) -> Row:
        """The new values as a mapping: ``row``, where that is not a model."""
        row = self._row
        if isinstance(row, Row):
            return row
        return Row(self.layout, self.new_columns or [], self.unchanged)

    @property
    def identity(self) -> Row:
        """The old values that Postgres sent; empty for an insert and a truncate."""
        identity = self._identity
        if identity is None:
            identity = self._identity = Row(self.layout, self.identity_columns or [])
        return identity

    @property
    def key(self) -> Mapping[str, Any]:
        """The primary key's values: the new ones, of a delete the old ones.

        Empty when the table has no primary key. A delete under REPLICA IDENTITY USING INDEX need
        not carry them; the key then holds what was sent.
        """
        source = self.identity if self.new_columns is None else self.sent_row
        return {name: source[name] for name in self.layout.key if name in source}

    @property
    def xid(self) -> int:
        """The number of the transaction."""
        return self.transaction.xid

    @property
    def commit_lsn(self) -> Lsn:
        """Where the transaction's commit record starts."""
        return self.transaction.commit_lsn

    @property
    def end_lsn(self) -> Lsn:
        """Where the transaction's commit record ends."""
        return self.transaction.end_lsn

    @property
    def commit_time(self) -> datetime:
        """When the transaction was committed, by the server's clock."""
        return self.transaction.commit_time

    @property
    def id(self) -> str:
        """``"{end_lsn}:{ordinal}"``: the same at every redelivery."""
        return f"{self.transaction.end_lsn}:{self.ordinal}"

    def __repr__(self) -> str:
        """Print what is safe to log."""
        return f"Change({self.operation} {self.relation} {self.id})"

    def to_json(self) -> bytes:
        """Return the change as one JSON object without a line end, keys in the documented order.

        Values are what ``to_jsonb`` would give in a session whose TimeZone is UTC. ``leaving``
        is there only when it is true.
        """
        transaction = self.transaction
        relation = self.layout.relation
        root = self.layout.root
        members = [
            b'{"id":"%b:%d"' % (str(transaction.end_lsn).encode(), self.ordinal),
            b',"operation":"%b","schema":%b,"table":%b'
            % (self.operation.encode(), _quoted(relation.schema), _quoted(relation.name)),
            b"" if root is None else b',"root":%b' % _quoted(str(root)),
            b',"row":%b' % self._columns_to_json(self.new_columns),
            b',"identity":%b' % self._columns_to_json(self.identity_columns),
            b',"unchanged":%b' % msgspec.json.encode(self.unchanged),
            b',"leaving":true' if self.leaving else b"",
            b',"xid":%d,"commit_lsn":"%b"'
            % (transaction.xid, str(transaction.commit_lsn).encode()),
            b',"end_lsn":"%b","ordinal":%d' % (str(transaction.end_lsn).encode(), self.ordinal),
            b',"commit_time":"%b"}'
            % transaction.commit_time.isoformat(timespec="microseconds").encode(),
        ]
        return b"".join(members)

    def _columns_to_json(self, columns: list[Column] | None) -> bytes:
        if columns is None:
            return b"null"
        to_json = self.layout.types.to_json
        return b"{%b}" % b",".join(
            [
                b"%b:%b" % (_quoted(column.name), to_json(column.typeoid, column.value))
                for column in columns
            ]
        )


class Message(msgspec.Struct, eq=False, frozen=True):
    """A logical message, written by ``pg_logical_emit_message``.

    A transactional one belongs to a ``transaction`` and has an ``ordinal`` there; another one
    stands alone at its ``lsn``, comes as soon as it is written, and survives a rollback.
    """

    prefix: str
    content: str
    lsn: Lsn
    transaction: Transaction | None = None
    ordinal: int = 0

    @property
    def id(self) -> str:
        """The same at every redelivery."""
        if self.transaction is None:
            return str(self.lsn)
        return f"{self.transaction.end_lsn}:{self.ordinal}"

    def __repr__(self) -> str:
        """Print what is safe to log."""
        return f"Message({self.prefix} {self.id})"


def memory_bytes(change: Change) -> int:
    """Return about what a change takes in memory."""
    sent = change.sent_identity
    identity = len(sent) if isinstance(sent, msgspec.Raw) else _columns_bytes(sent)
    return 200 + identity + _columns_bytes(change.new_columns)


def _columns_bytes(columns: list[Column] | None) -> int:
    return sum(len(column.value) + 60 for column in columns or ())


def decode_columns(sent: msgspec.Raw) -> list[Column]:
    """Read a record's list of columns.

    Raises:
        DecodeError: it is not what wal2json writes.
    """
    try:
        return _COLUMNS.decode(sent)
    except msgspec.DecodeError as error:
        message = f"the columns of a record are not what wal2json writes: {error}"
        raise DecodeError(message) from None


_COLUMNS: Final = msgspec.json.Decoder(list[Column])


@lru_cache(maxsize=4096)
def _quoted(text: str) -> bytes:
    return msgspec.json.encode(text)
