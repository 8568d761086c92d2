"""Questions to the server: whether it shows a row as a change has it.

A row counts as shown when the server, asked as somebody, returns a row of the same key whose
columns it prints as the change has them. Compared is what the type's output function prints, which
is what wal2json printed: no two values that differ there are taken for equal, whatever ``=`` of the
type says. Not compared are columns that are not passed on as they are, and those that the change
does not carry.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import msgspec
from psycopg import sql

from walstream.access.readers import Persona, Sight
from walstream.changes import Change, Column, Layout, Relation
from walstream.errors import DecodeError
from walstream.projection import Projection
from walstream.router import TablePattern
from walstream.values import FLOAT4_OID, FLOAT8_OID, NUMERIC_OID

Printed: TypeAlias = bytes | None
"""A value as the server prints it; None is null."""


class KeyColumn(msgspec.Struct, frozen=True):
    """A column of the primary key: its type as SQL has it, and how its index compares."""

    name: str
    type_name: str
    operator_schema: str
    operator: str


class Lookup(msgspec.Struct, frozen=True, cache_hash=True):
    """How rows of a table are found: in which relation, by which key. No key: they are not."""

    relation: Relation
    key: tuple[KeyColumn, ...]


class Asked(msgspec.Struct, frozen=True, eq=False):
    """A change to ask about: the values of its key, and what its columns have to be."""

    key: tuple[str, ...]
    columns: dict[str, Printed]


def asked_relation(sight: Sight, layout: Layout) -> Relation:
    """Return the table that the reader is to see the row in: the outermost that the sight is for.

    The policies of that table count: Postgres asks for those of the table that a query names, and
    of no partition below.
    """
    pattern = TablePattern.parse(sight.table)
    covered = [one for one in (layout.relation, *layout.ancestors) if pattern.covers(one)]
    return covered[-1] if covered else layout.relation


def asked_of(change: Change, lookup: Lookup, sight: Sight, masked: frozenset[str]) -> Asked | None:
    """Make of a change what is asked; None if nothing can be asked about it.

    Args:
        change: an insert or update, as the routes passed it on.
        lookup: of its table.
        sight: of the reader.
        masked: columns that routes pass on in another form.
    """
    if not lookup.key:
        return None
    row = change.sent_row
    types = change.layout.types
    try:
        key = [
            None if column is None or column.name in masked else types.text(*_sent(column))
            for column in (row.column(one.name) for one in lookup.key)
        ]
        compared = {
            name: _printed(change, row.column(name))
            for name in row
            if name not in masked and _shows(sight.projection, name)
        }
    except DecodeError:
        return None
    whole = tuple(one for one in key if one is not None and "\0" not in one)
    return Asked(whole, compared) if len(whole) == len(key) else None


def _shows(projection: Projection | None, name: str) -> bool:
    return projection is None or projection.shows(name)


def _sent(column: Column) -> tuple[int, msgspec.Raw]:
    return column.typeoid, column.value


def _printed(change: Change, column: Column | None) -> Printed:
    if column is None:
        return None
    text = change.layout.types.text(*_sent(column))
    return None if text is None else text.encode()


def is_shown(asked: Asked, shown: dict[str, Printed], layout: Layout) -> bool:
    """Whether the row that the server has returned is the one that was asked about."""
    return all(
        name in shown and _is_same(value, shown[name], layout.columns.get(name, 0))
        for name, value in asked.columns.items()
    )


_FLOATS: Final = frozenset({FLOAT4_OID, FLOAT8_OID, NUMERIC_OID})
"""Of these wal2json prints null for what no JSON number is."""

_NO_NUMBERS: Final = frozenset({b"NaN", b"Infinity", b"-Infinity"})


def _is_same(value: Printed, shown: Printed, typeoid: int) -> bool:
    if value == shown:
        return True
    return value is None and shown in _NO_NUMBERS and typeoid in _FLOATS


# ---- As SQL


class Question(msgspec.Struct, frozen=True, eq=False):
    """Some rows of a table, asked about at once: ``columns`` are what is compared of any of them.

    ``xids`` are the transactions that they are of.
    """

    persona: Persona
    lookup: Lookup
    columns: Sequence[str]
    asked: Sequence[Asked]
    xids: frozenset[int]


def query_of(question: Question) -> tuple[sql.Composed, list[list[str]]]:
    """Return the query for some rows, and its parameters.

    It returns the place of each row that is shown, from 1 on, and the columns. Each row is looked
    up by itself: a policy is asked about no other row, which it might stumble over. The keys are
    given their types before that, because what may fail would have to wait for the policies
    (https://www.postgresql.org/docs/current/rules-privileges.html).
    """
    lookup = question.lookup
    arrays = [[one.key[place] for one in question.asked] for place in range(len(lookup.key))]
    names = [sql.Identifier(f"k{place}") for place in range(len(lookup.key))]
    text = _QUESTION.format(
        given=sql.SQL(", ").join(names),
        typed=sql.SQL(", ").join(
            sql.SQL("given.{}::{} AS {}").format(name, _text(one.type_name), name)
            for name, one in zip(names, lookup.key, strict=True)
        ),
        arrays=sql.SQL(", ").join(sql.SQL("%s::text[]") for _ in names),
        columns=sql.SQL(", ").join(sql.SQL("t.{}").format(_name(one)) for one in question.columns),
        table=_name(lookup.relation.schema, lookup.relation.name),
        found=sql.SQL(" AND ").join(
            sql.SQL("t.{} OPERATOR({}.{}) asked.{}").format(
                _name(one.name),
                _name(one.operator_schema),
                _text(one.operator),
                name,
            )
            for name, one in zip(names, lookup.key, strict=True)
        ),
    )
    return text, arrays


def _name(*parts: str) -> sql.SQL:
    return _text(sql.Identifier(*parts).as_string(None))


def _text(text: str) -> sql.SQL:
    """Take over what the catalog says; a % would be taken for a parameter."""
    return sql.SQL(text.replace("%", "%%"))


_QUESTION: Final = sql.SQL(
    """
    WITH asked AS MATERIALIZED (
         SELECT given.place, {typed}
           FROM unnest({arrays}) WITH ORDINALITY AS given ({given}, place))
    SELECT asked.place, shown.*
      FROM asked
     CROSS JOIN LATERAL (
           SELECT {columns} FROM {table} AS t WHERE {found} LIMIT 1) AS shown
    """
)

LOOKUP: Final = b"""
    SELECT a.attname, format_type(a.atttypid, a.atttypmod), operators.nspname, o.oprname
      FROM pg_class c
      JOIN pg_namespace n ON n.oid = c.relnamespace
      JOIN pg_index i ON i.indrelid = c.oid AND i.indisprimary
     CROSS JOIN LATERAL unnest(i.indkey, i.indclass) WITH ORDINALITY AS k (attnum, opclass, place)
      JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.attnum
      JOIN pg_opclass s ON s.oid = k.opclass
      JOIN pg_amop m ON m.amopfamily = s.opcfamily AND m.amopstrategy = 3
                    AND m.amoplefttype = s.opcintype AND m.amoprighttype = s.opcintype
      JOIN pg_operator o ON o.oid = m.amopopr
      JOIN pg_namespace operators ON operators.oid = o.oprnamespace
     WHERE n.nspname = %s AND c.relname = %s AND k.place <= i.indnkeyatts
     ORDER BY k.place
"""
"""Of a B-tree, which a primary key always is, the third strategy is equality."""

BEGIN: Final = b"BEGIN READ ONLY"
END: Final = b"ROLLBACK"
"""It ends what functions of policies may have set, too."""

_RUNNING: Final = """
    SELECT EXISTS (
               SELECT FROM unnest(%(xids)s::bigint[]) AS those (xid)
                WHERE EXISTS (SELECT FROM pg_snapshot_xip(taken) AS running (xid)
                               WHERE running.xid::text::numeric %% 4294967296 = those.xid)
                   OR (those.xid + 4294967296
                       - pg_snapshot_xmax(taken)::text::numeric %% 4294967296)
                      %% 4294967296 < 2147483648)
      FROM pg_current_snapshot() AS taken
"""
"""Whether a transaction is not to be seen yet: the walsender is faster than the end of a commit."""

_SETTINGS: Final = {
    "bytea_output": "hex",
    "DateStyle": "ISO, MDY",
    "IntervalStyle": "postgres",
    "TimeZone": "UTC",
    "extra_float_digits": "1",
    "xmlbinary": "base64",
    # Keys are looked up by their index: on all rows of a small table a policy might stumble.
    "enable_seqscan": "off",
    "jit": "off",
}
"""As `postgres.SESSION_SETTINGS`, but for search_path: functions of policies may need theirs."""

_PREPARED: Final = "SELECT ({running}), {settings}"


def preparation_of(question: Question, timeout_seconds: float) -> tuple[bytes, dict[str, Any]]:
    """Return what comes before a question in its transaction; it tells if that is too early."""
    persona = question.persona
    settings = {
        **_SETTINGS,
        "statement_timeout": str(max(1, int(timeout_seconds * 1000))),
        "request.jwt.claims": persona.claims,
        "role": persona.postgres_role,
    }
    calls = [f"set_config('{name}', %(s{place})s, true)" for place, name in enumerate(settings)]
    values = {f"s{place}": value for place, value in enumerate(settings.values())}
    text = _PREPARED.format(running=_RUNNING, settings=", ".join(calls))
    return text.encode(), {"xids": list(question.xids), **values}
