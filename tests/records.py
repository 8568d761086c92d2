"""What wal2json writes for rows, without walstream's stream: for tests of values and filters."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterable

import msgspec
import psycopg
import pytest

from tests.postgres import Database
from walstream.catalog import Catalog
from walstream.changes import Column
from walstream.decoder import START_OPTIONS
from walstream.postgres import SESSION_SETTINGS
from walstream.values import Types


class _Insert(msgspec.Struct, tag_field="action", tag="I"):
    columns: list[Column]


class _Other(msgspec.Struct, tag_field="action", tag="B"):
    pass


class _Commit(msgspec.Struct, tag_field="action", tag="C"):
    pass


class Records:
    """A slot, read through SQL in a session with walstream's settings."""

    def __init__(self, database: Database) -> None:
        self.connection = pinned(database)
        self.slot = f"records_{secrets.token_hex(4)}"
        self.connection.execute(
            "SELECT pg_create_logical_replication_slot(%s, 'wal2json')", [self.slot]
        )
        self.options = dict(START_OPTIONS)
        self.numbers_as_strings = self._knows("numeric-data-types-as-string")
        if self.numbers_as_strings:
            self.options["numeric-data-types-as-string"] = "1"

    def inserted(self) -> list[list[Column]]:
        """Return the columns of each row inserted since the last call."""
        rows = self._read("pg_logical_slot_get_changes", self.options)
        decode = msgspec.json.Decoder(_Insert | _Other | _Commit).decode
        records = [decode(row) for row in rows]
        return [record.columns for record in records if isinstance(record, _Insert)]

    def _knows(self, option: str) -> bool:
        try:
            self._read("pg_logical_slot_peek_changes", {**self.options, option: "1"})
        except psycopg.errors.InvalidParameterValue:
            return False
        return True

    def _read(self, function: str, options: dict[str, str]) -> list[str]:
        flat = [part for option in options.items() for part in option]
        rows = self.connection.execute(
            f"SELECT data FROM {function}(%s, NULL, NULL, VARIADIC %s)".encode(), [self.slot, flat]
        )
        return [data for (data,) in rows]


def pinned(database: Database) -> psycopg.Connection:
    """Open a connection whose values look as on the replication connection."""
    connection = database.connect(client_encoding="utf8")
    for name, value in SESSION_SETTINGS.items():
        connection.execute(f"SET {name} TO {value}".encode())
    return connection


def learned_types(database: Database, oids: Iterable[int]) -> Types:
    """Return types as the catalog knows them."""

    async def learn() -> Types:
        catalog = Catalog(database.dsn, application_name="tests")
        try:
            await catalog.learn_types(oids)
        finally:
            await catalog.close()
        return catalog.types

    return asyncio.run(learn())


def utf8_collation(connection: psycopg.Connection) -> str:
    """Name a collation of libc under which letters beyond ASCII have cases."""
    row = connection.execute(
        "SELECT quote_ident(collname) FROM pg_collation"
        " WHERE collprovider = 'c' AND collctype ~* 'utf-?8$' AND collencoding IN (-1, 6)"
        " ORDER BY collctype !~ '^C', collname LIMIT 1"
    ).fetchone()
    if row is None:
        pytest.skip("the server has no UTF-8 locale")
    return str(row[0])
