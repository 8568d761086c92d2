"""From wal2json's records, format version 2, to changes.

The letters that wal2json uses for actions (B, C, I, U, D, T, M) live in this module only. Its
README (https://github.com/eulerto/wal2json) documents the records; ``START_OPTIONS`` asks for the
form that this decoder reads.

The decoder does no I/O. When it meets a relation in a shape that it has not seen, it raises
`UnknownLayout`; the caller looks the relation up in the catalog, tells `Decoder.learn`, and decodes
the same record again.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from walstream.changes import (
    Begin,
    Change,
    Column,
    Commit,
    Layout,
    Message,
    Operation,
    Relation,
    Transaction,
    decode_columns,
)
from walstream.errors import DecodeError
from walstream.lsn import Lsn

START_OPTIONS: Final = {
    "format-version": "2",
    "include-types": "0",
    "include-type-oids": "1",
    "include-lsn": "1",
    "include-xids": "1",
    "include-timestamp": "1",
    "include-pk": "1",
}
"""What wal2json is asked for.

Type OIDs, because type names cost the server half as much again and are invalid JSON for quoted
names (wal2json issue 296). The primary key, because only the server knows which columns it had when
the transaction ran.
"""


class UnknownLayout(Exception):
    """A relation came in a shape that is not known yet: a question to the caller, not an error.

    `Decoder.learn` takes the answer.
    """

    def __init__(
        self,
        relation: Relation,
        columns: list[Column],
        identity: list[Column],
        key: list[str],
        xid: int,
    ) -> None:
        super().__init__(str(relation))
        self.xid = xid
        self.relation = relation
        self.names = [column.name for column in columns]
        self.typeoids = [column.typeoid for column in columns]
        self.identity_names = [column.name for column in identity]
        self.identity_typeoids = [column.typeoid for column in identity]
        self.key = key


def question_of(change: Change) -> UnknownLayout:
    """Ask again for the shape of a change that has been decoded."""
    columns = change.identity_columns if change.new_columns is None else change.new_columns
    layout = change.layout
    identity = change.identity_columns or []
    return UnknownLayout(layout.relation, columns or [], identity, layout.key, change.xid)


class _KeyColumn(msgspec.Struct, gc=False):
    name: str


class _Begin(msgspec.Struct, tag_field="action", tag="B", gc=False):
    xid: int
    timestamp: str
    lsn: str
    nextlsn: str


class _Commit(msgspec.Struct, tag_field="action", tag="C", gc=False):
    nextlsn: str


class _Insert(msgspec.Struct, tag_field="action", tag="I", gc=False):
    schema: str
    table: str
    columns: list[Column]
    pk: list[_KeyColumn]


class _Update(msgspec.Struct, tag_field="action", tag="U", gc=False):
    schema: str
    table: str
    columns: list[Column]
    identity: msgspec.Raw
    pk: list[_KeyColumn]


class _Delete(msgspec.Struct, tag_field="action", tag="D", gc=False):
    schema: str
    table: str
    identity: list[Column]
    pk: list[_KeyColumn]


class _Truncate(msgspec.Struct, tag_field="action", tag="T", gc=False):
    schema: str
    table: str


class _Message(msgspec.Struct, tag_field="action", tag="M", gc=False):
    lsn: str
    transactional: bool
    prefix: str
    content: str


_Record = _Begin | _Commit | _Insert | _Update | _Delete | _Truncate | _Message


MOST_SHAPES_OF_A_TABLE: Final = 128
MOST_SHAPES: Final = 20_000
"""How many shapes are remembered, some 10 kB each with what is bound to them.

A table has one more for each combination of long columns that updates leave out, and for each time
that it was altered.
"""


class Decoder:
    """Decodes the records of one stream in the order in which they come.

    It knows the transaction it is in and counts its changes: the ``ordinal`` of a change is its
    place among the records that the server sent for the transaction, beginning with 1.
    """

    def __init__(self, *, encoding: str | None = None) -> None:
        """Start between two transactions.

        Args:
            encoding: Python's name of the database's encoding; wal2json sends text in it, whatever
                the ``client_encoding`` is. None is UTF-8 that the server vouches for.
        """
        self._encoding = encoding
        self._layouts: dict[tuple[str, str], list[Layout]] = {}
        self._count = 0
        self._transaction: Transaction | None = None
        self._ordinal = 0
        self._decode: Any = msgspec.json.Decoder(_Record).decode

    @property
    def encoding(self) -> str | None:
        """Python's name of the encoding that records come in; None for UTF-8."""
        return self._encoding

    @property
    def in_transaction(self) -> bool:
        """Whether a BEGIN has come whose COMMIT has not."""
        return self._transaction is not None

    def learn(self, layout: Layout) -> list[Layout]:
        """Add a shape that `UnknownLayout` asked for; the newest shapes are tried first.

        Those are forgotten that were learned when the table had other columns: what they leave out
        may be another thing now, and most do not come again. And the oldest are, when there are too
        many.

        Returns:
            What was forgotten; it may be asked for again.
        """
        name = (layout.relation.schema, layout.relation.name)
        known = self._layouts.pop(name, [])  # it comes last now: tables that are in use stay
        current = [one for one in known if _is_of_one_time(one, layout)]
        self._layouts[name] = kept = [layout, *current][:MOST_SHAPES_OF_A_TABLE]
        forgotten = [one for one in known if one not in kept]
        self._count += 1 - len(forgotten)
        while self._count > MOST_SHAPES:
            oldest = self._layouts.pop(next(iter(self._layouts)))
            self._count -= len(oldest)
            forgotten += oldest
        return forgotten

    def forget(self) -> None:
        """Drop all shapes: a type that they are built on has changed."""
        self._layouts.clear()
        self._count = 0

    def decode(  # noqa: PLR0911 - a return for each kind of record
        self, record: bytes | memoryview
    ) -> Begin | Commit | Change | Message:
        """Decode one record.

        Raises:
            UnknownLayout: the caller must `learn` the shape first and then call again.
            DecodeError: the record is not JSON, not in the documented form, or out of order.
        """
        try:
            if self._encoding is not None:
                record = bytes(record).decode(self._encoding).encode()
            decoded: _Record = self._decode(record)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise _undecodable(record, _reason(error)) from None
        # In the order of how often they come.
        if type(decoded) is _Update:
            return self._update(decoded)
        if type(decoded) is _Insert:
            layout = self._layout(decoded.schema, decoded.table, decoded.columns, decoded.pk)
            return self._change(Operation.INSERT, layout, decoded.columns, None)
        if type(decoded) is _Delete:
            layout = self._layout(decoded.schema, decoded.table, decoded.identity, decoded.pk)
            return self._change(Operation.DELETE, layout, None, decoded.identity)
        if type(decoded) is _Begin:
            return self._begin(record, decoded)
        if type(decoded) is _Commit:
            return self._commit(record, decoded)
        if type(decoded) is _Truncate:
            layout = self._layout(decoded.schema, decoded.table, [], [])
            return self._change(Operation.TRUNCATE, layout, None, None)
        return self._message(record, decoded)  # type: ignore[arg-type]

    def _update(self, decoded: _Update) -> Change:
        columns = decoded.columns
        sent = decoded.identity
        layout = self._layout(decoded.schema, decoded.table, columns, decoded.pk, sent)
        if not layout.missing and _length(sent) <= len(columns):
            return self._change(Operation.UPDATE, layout, columns, sent)
        identity = decode_columns(sent)
        columns, unchanged = _fill_in(layout, columns, identity)
        return self._change(Operation.UPDATE, layout, columns, identity, unchanged)

    def _layout(
        self,
        schema: str,
        table: str,
        columns: list[Column],
        key: list[_KeyColumn],
        sent_identity: msgspec.Raw | None = None,
    ) -> Layout:
        names = [column.name for column in columns]
        typeoids = [column.typeoid for column in columns]
        key_names = [column.name for column in key]
        for layout in self._layouts.get((schema, table), ()):
            if layout.names == names and layout.typeoids == typeoids and layout.key == key_names:
                return layout
        identity = [] if sent_identity is None else decode_columns(sent_identity)
        xid = self._transaction.xid if self._transaction else 0
        raise UnknownLayout(Relation(schema, table), columns, identity, key_names, xid)

    def _change(
        self,
        operation: Operation,
        layout: Layout,
        columns: list[Column] | None,
        identity: list[Column] | msgspec.Raw | None,
        unchanged: tuple[str, ...] = (),
    ) -> Change:
        transaction = self._transaction
        if transaction is None:
            message = f"a change of {layout.relation} came outside of a transaction"
            raise DecodeError(message)
        self._ordinal += 1
        return Change(operation, layout, transaction, self._ordinal, columns, identity, unchanged)

    def _begin(self, record: bytes | memoryview, decoded: _Begin) -> Begin:
        if self._transaction is not None:
            raise _undecodable(record, "a transaction began inside another one")
        try:
            self._transaction = Transaction(
                decoded.xid,
                Lsn.parse(decoded.lsn),
                Lsn.parse(decoded.nextlsn),
                decoded.timestamp,
            )
        except ValueError as error:
            raise _undecodable(record, str(error)) from None
        self._ordinal = 0
        return Begin(self._transaction)

    def _commit(self, record: bytes | memoryview, decoded: _Commit) -> Commit:
        transaction, self._transaction = self._transaction, None
        if transaction is None or decoded.nextlsn != str(transaction.end_lsn):
            raise _undecodable(
                record, "a commit came that is not that of the transaction before it"
            )
        return Commit(transaction)

    def _message(self, record: bytes | memoryview, decoded: _Message) -> Message:
        try:
            lsn = Lsn.parse(decoded.lsn)
        except ValueError as error:
            raise _undecodable(record, str(error)) from None
        if not decoded.transactional:
            return Message(decoded.prefix, decoded.content, lsn)
        self._ordinal += 1
        return Message(decoded.prefix, decoded.content, lsn, self._transaction, self._ordinal)


def _is_of_one_time(one: Layout, other: Layout) -> bool:
    return one.table_columns == other.table_columns and one.toastable == other.toastable


def _length(columns: msgspec.Raw) -> int:
    """Count columns without decoding them; a quote inside of a value is escaped."""
    return bytes(columns).count(b'{"name"')


def _fill_in(
    layout: Layout, columns: list[Column], identity: list[Column]
) -> tuple[list[Column], tuple[str, ...]]:
    """Take unchanged TOASTed values from the identity; name those that it does not have.

    An identity that is FULL has every column that the table had when the update ran, in the order
    of then: a column that the catalog knows beyond these was added later, or dropped before. The
    catalog's word that it is FULL may be younger than the record: the key alone is not the whole.
    """
    by_name = {column.name: column for column in (*identity, *columns)}
    is_whole = (
        layout.is_full
        and len(identity) >= len(columns)
        and [column.name for column in identity] != layout.key
    )
    unchanged = () if is_whole else tuple([name for name in layout.missing if name not in by_name])
    if len(by_name) == len(columns):
        return columns, unchanged
    order = [column.name for column in identity] if is_whole else layout.columns
    ordered = [by_name.pop(name) for name in order if name in by_name]
    return [*ordered, *by_name.values()], unchanged


def _reason(error: Exception) -> str:
    # The text of a UnicodeError holds the bytes around the fault, which are row values.
    return type(error).__name__ if isinstance(error, UnicodeError | RecursionError) else str(error)


def _undecodable(record: bytes | memoryview, reason: str) -> DecodeError:
    message = f"a record of {len(record)} bytes is not one of wal2json's: {reason}"
    return DecodeError(
        message,
        hint="walstream reads wal2json 2.5 and later, format-version 2; the slot was not moved",
    )
