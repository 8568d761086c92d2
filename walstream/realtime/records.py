"""A change as the clients of Supabase Realtime read it: the ``data`` of ``postgres_changes``.

Values are what ``to_jsonb`` gives in a session whose TimeZone is UTC, with two exceptions: a bytea
is its hexadecimal digits alone, and NaN and the infinities are null. ``columns`` lists what the
reader may see of the table, in its order, also what the change does not carry. An unchanged TOASTed
value that Postgres did not send is missing in ``record``.

Three things are told in ``errors``: a table without a primary key (400) and a primary key that the
reader may not see (401) leave nothing of an insert and an update, and of a change of more than
`MAX_CHANGE_BYTES` (413) only short values are left. What the reader may not see does not count: by
values of one's own beside it its length could be found out.

What Realtime does not have: ``leaving`` and ``"$leaving"`` for an update that takes the row away
from the client, and ``"$position"``, the id of the change, to go on from. Those with a ``$`` stand
in the record, because the JavaScript client hands nothing else over to its application.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final

import msgspec

from walstream.changes import Change, Column, Layout, Operation
from walstream.live.views import Look, View
from walstream.projection import MaskKind, Projection
from walstream.values import BYTEA_OID, FLOAT4_OID, FLOAT8_OID, NUMERIC_OID, TEXT_OID, Types

MAX_CHANGE_BYTES: Final = 1 << 20
MAX_SHORT_BYTES: Final = 64
"""What a value may have that is left of a change that is too large."""

MAX_SHAPES: Final = 2048
"""So many layouts, each as somebody sees it, are remembered."""

_UPDATE: Final = Operation.UPDATE
_DELETE: Final = Operation.DELETE


class RealtimeForm:
    """Writes changes for Realtime's clients; with their positions when ``with_position``."""

    def __init__(self, *, with_position: bool) -> None:
        self._with_position = with_position
        self._shapes: dict[tuple[Layout, Any], _Shape] = {}

    def write(self, view: View, change: Change, look: Look) -> bytes:
        """Write the change as it is seen."""
        shape = self._shape(view, change.layout)
        shown = view.show(change, look)
        extra = self._extra(shown)
        if shape.refusal and change.operation is not _DELETE:
            return _assembled(shape.no_columns, shape.refusal, shown, (extra, b""))
        members, errors = _members, b"null"
        if _is_too_large(change) and _is_too_large(view.permit(change, look)):
            members, errors = _short_members, _TOO_LARGE
        record = members(shown, shown.new_columns)
        past = members(shown, _past(change, shown, look))
        if change.operation is _DELETE:
            past = _both(past, extra)
        else:
            record = _both(record, extra)
        return _assembled(shape.columns, errors, shown, (record, past))

    def _extra(self, shown: Change) -> bytes:
        """Return the members that the record has beside the columns."""
        leaving = _LEAVING if shown.leaving else b""
        if not self._with_position:
            return leaving
        return _both(leaving, b'"$position":"%b"' % shown.id.encode())

    def _shape(self, view: View, layout: Layout) -> _Shape:
        key = (layout, view.shape)
        shape = self._shapes.get(key)
        if shape is None:
            if len(self._shapes) >= MAX_SHAPES:
                del self._shapes[next(iter(self._shapes))]
            shape = self._shapes[key] = _shape_of(layout, *view.shape)
        return shape


class _Shape(msgspec.Struct, eq=False, frozen=True):
    """What changes of a layout that are seen alike begin with, with their columns and without.

    ``refusal`` is what stands in ``errors`` when inserts and updates cannot be shown at all.
    """

    columns: bytes
    no_columns: bytes
    refusal: bytes


def _shape_of(
    layout: Layout, projection: Projection | None, columns: frozenset[str] | None
) -> _Shape:
    relation = layout.relation
    head = b'{"schema":%b,"table":%b,"columns":[' % (_json(relation.schema), _json(relation.name))
    listed = [
        b'{"name":%b,"type":%b}' % (_json(name), _json(_type_name(layout, projection, name)))
        for name in layout.columns
        if (projection is None or projection.passes(name)) and (columns is None or name in columns)
    ]
    refusal = _refusal(layout, projection)
    return _Shape(b"%b%b]" % (head, b",".join(listed)), head + b"]", refusal)


def _refusal(layout: Layout, projection: Projection | None) -> bytes:
    if not layout.key:
        return _NO_KEY
    if projection is not None and not all(map(projection.passes, layout.key)):
        return _KEY_HIDDEN
    return b""


def _type_name(layout: Layout, projection: Projection | None, name: str) -> str:
    """Return ``pg_type.typname``, by which the JavaScript client converts values.

    What a mask has put in the place of a number is none.
    """
    mask = None if projection is None else projection.masks.get(name)
    is_text = mask is not None and mask.kind is not MaskKind.NULL
    return _typname(layout, TEXT_OID if is_text else layout.columns[name])


def _assembled(head: bytes, errors: bytes, shown: Change, rows: tuple[bytes, bytes]) -> bytes:
    """Put together: record and old record are there as the operation has them."""
    operation = shown.operation
    return b"".join(
        [
            head,
            _TYPES[operation],
            _commit_time(shown.transaction.commit_timestamp),
            b'","errors":',
            errors,
            b',"leaving":true' if shown.leaving else b"",
            b"" if operation is _DELETE else b',"record":{%b}' % rows[0],
            b',"old_record":{%b}' % rows[1] if operation in _WITH_PAST else b"",
            b"}",
        ]
    )


def _members(shown: Change, columns: Sequence[Column] | None) -> bytes:
    """Write columns as the members of an object."""
    if not columns:
        return b""
    types = shown.layout.types
    to_json = types.to_json
    return b",".join(
        [
            _key(column.name)
            + (
                to_json(column.typeoid, column.value)
                if column.typeoid not in _OTHERWISE
                else _OTHERWISE[column.typeoid](types, column)
            )
            for column in columns
        ]
    )


def _short_members(shown: Change, columns: Sequence[Column] | None) -> bytes:
    """Write the columns whose values are short, and not null."""
    return b",".join(
        [
            member
            for column in columns or ()
            if bytes(column.value) != b"null"
            and len(member := _members(shown, (column,)))
            <= len(_key(column.name)) + MAX_SHORT_BYTES
        ]
    )


def _digits(types: Types, column: Column) -> bytes:
    r"""Write a bytea without ``\x``."""
    written = types.to_json(column.typeoid, column.value)
    return written.replace(_BYTEA_PREFIX, b"", 1)


def _finite(types: Types, column: Column) -> bytes:
    """Write a number; what is none is null, as wal2json has it when it writes numbers bare."""
    written = types.to_json(column.typeoid, column.value)
    return b"null" if written.startswith(b'"') else written


def _past(change: Change, shown: Change, look: Look) -> Sequence[Column] | None:
    """Return the old row; of one that the reader did not see the key, if the new row has it."""
    if change.operation not in _WITH_PAST:
        return None
    if look is not Look.WITHOUT_PAST:
        return shown.identity_columns
    key = change.layout.key
    if any(change.identity.column(name) != change.sent_row.column(name) for name in key):
        return None
    return [column for column in shown.new_columns or () if column.name in key]


def _is_too_large(change: Change) -> bool:
    """Whether wal2json's record is too large as Realtime reads it.

    That is a jsonb, which names the types: here by names without modifiers, some bytes less.
    """
    sent = change.sent_identity
    size = _values_bytes(change.new_columns)
    size += len(sent) if isinstance(sent, msgspec.Raw) else _values_bytes(sent)
    if size + _MOST_BESIDES * (len(change.layout.columns) + 1) <= MAX_CHANGE_BYTES:
        return False
    return _record_bytes(change) > MAX_CHANGE_BYTES


def _values_bytes(columns: Sequence[Column] | None) -> int:
    return sum([len(column.value) for column in columns]) if columns else 0


def _record_bytes(change: Change) -> int:
    layout = change.layout
    # What an update has filled in from the old row was not sent twice.
    new = [column for column in change.new_columns or () if column.name in layout.places]
    record = {
        "pk": [{"name": name, "type": ""} for name in layout.key],
        "table": layout.relation.name,
        "action": " ",
        "schema": layout.relation.schema,
        "timestamp": change.transaction.commit_timestamp,
    }
    size = len(json.dumps(record, ensure_ascii=False).encode())
    size += sum(len(_typname(layout, layout.columns[name])) for name in layout.key)
    if new:
        size += len('"columns": [], ') + _columns_bytes(layout, new)
    if change.identity_columns:
        size += len('"identity": [], ') + _columns_bytes(layout, change.identity_columns)
    return size


def _columns_bytes(layout: Layout, columns: Sequence[Column]) -> int:
    punctuation = len('{"name": , "type": "", "value": , "typeoid": }, ')
    size = sum(
        punctuation
        + len(_json(column.name))
        + len(_typname(layout, column.typeoid))
        + len(column.value)
        + len(str(column.typeoid))
        for column in columns
    )
    return size - len(", ")


def _typname(layout: Layout, typeoid: int) -> str:
    pg_type = layout.types.get(typeoid)
    return "unknown" if pg_type is None else pg_type.name


@lru_cache(maxsize=256)
def _commit_time(timestamp: str) -> bytes:
    """Write a time of UTC in milliseconds, cut off as ``to_char`` does."""
    time = datetime.fromisoformat(timestamp).astimezone(UTC)
    return f"{time:%Y-%m-%dT%H:%M:%S}.{time.microsecond // 1000:03}Z".encode()


@lru_cache(maxsize=4096)
def _key(name: str) -> bytes:
    return _json(name) + b":"


def _both(members: bytes, more: bytes) -> bytes:
    return b"%b,%b" % (members, more) if members and more else members or more


_json: Final = msgspec.json.Encoder().encode

_BYTEA_PREFIX: Final = rb"\\x"
_OTHERWISE: Final[dict[int, Callable[[Types, Column], bytes]]] = {
    BYTEA_OID: _digits,
    FLOAT4_OID: _finite,
    FLOAT8_OID: _finite,
    NUMERIC_OID: _finite,
}
"""Types of which Realtime's JSON is not that of ``to_jsonb``; of domains over them it is."""

_MOST_BESIDES: Final = 1500
"""What a record has at most for a column besides its values: its name three times, and types."""

_WITH_PAST: Final = frozenset({_UPDATE, _DELETE})
_NO_KEY: Final = b'["Error 400: Bad Request, no primary key"]'
_KEY_HIDDEN: Final = b'["Error 401: Unauthorized"]'
_TOO_LARGE: Final = b'["Error 413: Payload Too Large"]'
_LEAVING: Final = b'"$leaving":true'

_TYPES: Final = {
    # A row of a snapshot is new to the client.
    operation: b',"type":"%b","commit_timestamp":"' % word.encode()
    for operation, word in {
        Operation.INSERT: "INSERT",
        Operation.READ: "INSERT",
        Operation.UPDATE: "UPDATE",
        Operation.DELETE: "DELETE",
        Operation.TRUNCATE: "TRUNCATE",
    }.items()
}
