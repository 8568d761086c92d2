"""Rows as Realtime's clients get them, against what Realtime makes of the same rows.

The oracle is PostgreSQL, asked as Realtime asks it: wal2json's record by its own options, each
value of it cast to the column's type and to jsonb, a bytea taken as the text that it is.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, Final

import psycopg
import pytest

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
VALUE_OF: Final = """
    SELECT CASE WHEN %(typeoid)s::regtype = 'bytea'::regtype THEN to_jsonb(%(text)s::text)
                ELSE to_jsonb(%(text)s::text::{type}) END::text
"""


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
        self._form = RealtimeForm(with_position=False)

    async def close(self) -> None:
        await self._catalog.close()
        self.connection.close()

    def execute(self, sql: str, *parameters: Any) -> None:
        self.connection.execute(sql.encode(), parameters)

    async def written(self) -> list[dict[str, Any]]:
        """Return what clients get of the changes since the last call."""
        changes = [await self._decoded(record.encode()) for record in self._ours.read()]
        return [
            _exact(self._form.write(_view(change), change, Look.WHOLE))
            for change in changes
            if isinstance(change, Change)
        ]

    async def _decoded(self, record: bytes) -> Any:
        try:
            return self._decoder.decode(record)
        except UnknownLayout as question:
            self._decoder.learn(await self._catalog.layout(question))
            return self._decoder.decode(record)

    def expected(self) -> list[dict[str, Any]]:
        """Return what Realtime makes of the changes since the last call."""
        return [self._change(json.loads(record, parse_float=str)) for record in self._theirs.read()]

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
        query = VALUE_OF.format(
            type=self._ask("SELECT %(oid)s::regtype::text", oid=column["typeoid"])
        )
        return _exact(self._ask(query, typeoid=column["typeoid"], text=text))

    def _ask(self, query: str, **parameters: Any) -> Any:
        row = self.connection.execute(query.encode(), parameters).fetchone()
        assert row is not None
        return row[0]


def _view(change: Change) -> View:
    pattern = TablePattern(change.relation.schema, change.relation.name)
    return View(Subscription(pattern), Sight("public.*"), change.layout, {})


def _exact(text: str | bytes) -> Any:
    """Read JSON so that numbers keep their digits, and true is not 1."""
    return json.loads(text, parse_float=Decimal, parse_int=Decimal)


@pytest.fixture(scope="module")
def module_database(server_dsn: str, database_template: str) -> Iterator[Database]:
    with create_database(server_dsn, database_template) as database:
        database.execute(SET_UP)
        yield database
    drop_database(server_dsn, database.name)


@pytest.mark.parametrize("pg_type", ALL)
async def test_values_are_what_realtime_makes_of_them(
    module_database: Database, pg_type: str
) -> None:
    both = Both(module_database)
    both.execute(f"CREATE TABLE t (id int PRIMARY KEY, v {pg_type})")
    for place, value in enumerate([*ALL[pg_type], None]):
        both.execute(f"INSERT INTO t VALUES (%s, %s::{pg_type})", place, value)
    written = await both.written()
    assert len(written) == len(ALL[pg_type]) + 1
    assert written == both.expected()
    both.execute("DROP TABLE t")
    await both.close()
