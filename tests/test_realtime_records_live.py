"""Rows as Realtime's clients get them, against what Realtime makes of the same rows.

The oracle is PostgreSQL, asked as Realtime asks it: wal2json's record by its own options, each
value of it cast to the column's type and to jsonb, a bytea taken as the text that it is.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any, Final

import psycopg
import pytest
from psycopg import sql

from tests.postgres import Database, create_database, drop_database
from tests.records import pinned
from tests.test_values_live import SET_UP, TYPES
from walstream.access import Sight
from walstream.catalog import Catalog
from walstream.changes import Change
from walstream.decoder import START_OPTIONS, Decoder, UnknownLayout
from walstream.live.subscriptions import Subscription
from walstream.live.views import Look, View
from walstream.realtime.records import RealtimeForm
from walstream.router import TablePattern
from walstream.values import BYTEA_OID

REALTIME_OPTIONS: Final = {
    "include-pk": "true",
    "include-transaction": "false",
    "include-timestamp": "true",
    "include-type-oids": "true",
    "format-version": "2",
}
NOT_FINITE: Final = {
    "float4": ["NaN", "Infinity", "-Infinity", "1.5"],
    "float8": ["NaN", "Infinity", "-Infinity", "1.5"],
    "numeric": ["NaN", "1.10", "1.100"],
    "numeric(10,2)": ["NaN", "1.1"],
}
ALL: Final = {**TYPES, **{name: [*TYPES.get(name, []), *more] for name, more in NOT_FINITE.items()}}
TYPE_OF: Final = """
    SELECT format('%%I.%%I', nspname, typname)
      FROM pg_type t JOIN pg_namespace n ON n.oid = typnamespace WHERE t.oid = %(typeoid)s
"""
"""Realtime says ``character`` and ``bit`` instead, which cut values to one character, one bit."""


class Slot:
    """A slot that is read by SQL."""

    def __init__(self, connection: psycopg.Connection, options: dict[str, str]) -> None:
        self._connection = connection
        self._name = f"records_{secrets.token_hex(4)}"
        self._options = [part for option in options.items() for part in option]
        connection.execute(
            "SELECT pg_create_logical_replication_slot(%s, 'wal2json')", [self._name]
        )

    def read(self) -> list[str]:
        rows = self._connection.execute(
            "SELECT data FROM pg_logical_slot_get_changes(%s, NULL, NULL, VARIADIC %s)",
            [self._name, self._options],
        )
        return [data for (data,) in rows]


class Both:
    """The same changes as walstream writes them, and as Realtime does."""

    def __init__(self, database: Database) -> None:
        self.connection = pinned(database)
        self.connection.execute("SET search_path TO public, pg_catalog")
        self._ours = Slot(self.connection, START_OPTIONS)
        self._theirs = Slot(self.connection, REALTIME_OPTIONS)
        self._catalog = Catalog(database.dsn, application_name="tests")
        self._decoder = Decoder()

    def execute(self, statement: str, *parameters: Any) -> None:
        self.connection.execute(statement.encode(), parameters or None)

    def begin(self, table: str) -> None:
        """Create the table ``t`` anew."""
        self.execute(f"DROP TABLE IF EXISTS t; CREATE TABLE t {table}")
        self._decoder = Decoder()

    def verify(self, count: int) -> None:
        """Compare the changes since the last call, so many."""
        ours, theirs = self._ours.read(), self._theirs.read()
        written = asyncio.run(self._written(ours))
        assert len(written) == count
        assert written == [self._change(json.loads(one, parse_float=str)) for one in theirs]

    async def _written(self, records: Sequence[str]) -> list[dict[str, Any]]:
        try:
            changes = [await self._decoded(record.encode()) for record in records]
        finally:
            await self._catalog.close()
        form = RealtimeForm(with_position=False)
        return [
            _exact(form.write(_view(change), change, Look.WHOLE))
            for change in changes
            if isinstance(change, Change)
        ]

    async def _decoded(self, record: bytes) -> Any:
        try:
            return self._decoder.decode(record)
        except UnknownLayout as question:
            self._decoder.learn(await self._catalog.layout(question))
            return self._decoder.decode(record)

    def _change(self, record: dict[str, Any]) -> dict[str, Any]:
        kind = {"I": "INSERT", "U": "UPDATE", "D": "DELETE"}[record["action"]]
        made = {
            "schema": record["schema"],
            "table": record["table"],
            "type": kind,
            "commit_timestamp": self._ask(
                'SELECT to_char(%(at)s::timestamptz, \'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"\')',
                at=record["timestamp"],
            ),
            "columns": self._columns(record),
            "errors": None,
        }
        new = {one["name"]: one for one in record.get("columns", [])}
        old = {one["name"]: one for one in record.get("identity", [])}
        if kind != "DELETE":
            made["record"] = self._row(old | new)
        if kind != "INSERT":
            made["old_record"] = self._row(old)
        return made

    def _columns(self, record: dict[str, Any]) -> list[dict[str, str]]:
        rows = self.connection.execute(
            "SELECT attname, typname FROM pg_attribute a JOIN pg_type t ON t.oid = atttypid"
            " WHERE attrelid = format('%%I.%%I', %s::text, %s::text)::regclass AND attnum > 0"
            " AND NOT attisdropped ORDER BY attnum",
            [record["schema"], record["table"]],
        )
        return [{"name": name, "type": type_name} for name, type_name in rows]

    def _row(self, columns: dict[str, dict[str, Any]]) -> dict[str, Any]:
        return {name: self._value(column) for name, column in columns.items()}

    def _value(self, column: dict[str, Any]) -> Any:
        value = column["value"]
        if value is None:
            return None
        # A number, too, goes through the text that it has in the record.
        text = {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)
        literal = sql.Literal(text).as_string(self.connection)
        if column["typeoid"] == BYTEA_OID:
            return _exact(self._ask(f"SELECT to_jsonb({literal}::text)::text"))
        type_name = self._ask(TYPE_OF, typeoid=column["typeoid"])
        return _exact(self._ask(f"SELECT to_jsonb({literal}::{type_name})::text"))

    def _ask(self, query: str, **parameters: Any) -> Any:
        row = self.connection.execute(query.encode(), parameters or None).fetchone()
        assert row is not None
        return row[0]


def _view(change: Change) -> View:
    pattern = TablePattern(change.relation.schema, change.relation.name)
    return View(Subscription(pattern), Sight("public.*"), change.layout, {})


def _exact(text: str | bytes) -> Any:
    """Read JSON so that numbers keep their digits, and true is not 1."""
    return json.loads(text, parse_float=Decimal, parse_int=Decimal)


@pytest.fixture(scope="module")
def both(server_dsn: str, database_template: str) -> Iterator[Both]:
    with create_database(server_dsn, database_template) as database:
        database.execute(SET_UP)
        both = Both(database)
        yield both
        both.connection.close()
    drop_database(server_dsn, database.name)


@pytest.mark.parametrize("pg_type", ALL)
def test_values_are_what_realtime_makes_of_them(both: Both, pg_type: str) -> None:
    both.begin(f"(id int PRIMARY KEY, v {pg_type})")
    for place, value in enumerate([*ALL[pg_type], None]):
        both.execute(f"INSERT INTO t VALUES (%s, %s::{pg_type})", place, value)
    both.verify(len(ALL[pg_type]) + 1)


LONG: Final = "(SELECT string_agg(md5(n::text), '') FROM generate_series(1, 300) AS n)"
IDENTITY: Final = "ALTER TABLE t REPLICA IDENTITY"
DOUBLE: Final = "double int GENERATED ALWAYS AS (a * 2) STORED"


@pytest.mark.parametrize(
    ("table", "statements"),
    [
        pytest.param(table, statements, id=name)
        for name, (table, statements) in {
            "key that stays": (
                "(a int, id int PRIMARY KEY, b text)",
                ["INSERT INTO t VALUES (1, 2, 'x')", "UPDATE t SET a = 3", "DELETE FROM t"],
            ),
            "key that changes": (
                "(id int PRIMARY KEY, b text)",
                ["INSERT INTO t VALUES (1, 'x')", "UPDATE t SET id = 2, b = 'y'"],
            ),
            "key of two columns in another order": (
                "(a int, b text, c bool, PRIMARY KEY (c, a))",
                ["INSERT INTO t VALUES (1, 'x', true)", "UPDATE t SET b = 'y'", "DELETE FROM t"],
            ),
            "full": (
                f"(id int PRIMARY KEY, b text); {IDENTITY} FULL",
                ["INSERT INTO t VALUES (1, 'x')", "UPDATE t SET b = NULL", "DELETE FROM t"],
            ),
            "another index": (
                f"(id int PRIMARY KEY, b text NOT NULL UNIQUE); {IDENTITY} USING INDEX t_b_key",
                ["INSERT INTO t VALUES (1, 'x')", "UPDATE t SET b = 'y'", "DELETE FROM t"],
            ),
            "unchanged": (
                "(id int PRIMARY KEY, long text, b int)",
                [f"INSERT INTO t VALUES (1, {LONG}, 1)", "UPDATE t SET b = 2", "DELETE FROM t"],
            ),
            "unchanged and full": (
                f"(id int PRIMARY KEY, long text, b int); {IDENTITY} FULL",
                [f"INSERT INTO t VALUES (1, {LONG}, 1)", "UPDATE t SET b = 2", "DELETE FROM t"],
            ),
            "odd names": (
                '("a ""quoted"" \\ name" int PRIMARY KEY, "€" text, "B" int)',
                ["INSERT INTO t VALUES (1, 'x')", 'UPDATE t SET "B" = 2', "DELETE FROM t"],
            ),
            "generated and dropped columns": (
                f"(id int PRIMARY KEY, gone int, a int, {DOUBLE}); ALTER TABLE t DROP COLUMN gone",
                ["INSERT INTO t (id, a) VALUES (1, 1)", "UPDATE t SET a = 2", "DELETE FROM t"],
            ),
        }.items()
    ],
)
def test_rows_are_what_realtime_makes_of_them(
    both: Both, table: str, statements: list[str]
) -> None:
    both.begin(table)
    for statement in statements:
        both.execute(statement)
    both.verify(len(statements))
