"""Values of every type outlive a restart: without the database they are what they were."""

from __future__ import annotations

from pathlib import Path

from tests.journals import HISTORY, journal_at, read_all
from tests.postgres import Database
from tests.streaming import Stream
from tests.test_types import AS_TEXT, INSIDE, NOT_A_NUMBER, OWN_TYPES, VALUES, create, fill, same
from walstream.changes import Change, Column
from walstream.journal import JournalReader

ALL: dict[str, list[str]] = {
    pg_type: [
        *VALUES.get(pg_type, []),
        *AS_TEXT.get(pg_type, []),
        *NOT_A_NUMBER.get(pg_type, []),
        *INSIDE.get(pg_type, []),
    ]
    for pg_type in [*VALUES, *(one for one in INSIDE if one not in VALUES)]
}


async def test_values_of_every_type_come_back_without_the_database(
    database: Database, tmp_path: Path
) -> None:
    database.execute(OWN_TYPES)
    changes = await inserted_updated_and_deleted(database)
    journal = journal_at(tmp_path / "journal")
    await journal.open(HISTORY)
    await journal.append(changes)
    await journal.close()
    database.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    reader = JournalReader(tmp_path / "journal")
    await reader.open()
    read = await read_all(reader)
    await reader.close()
    assert len(read) == len(changes)
    assert [one for one in zip(changes, read, strict=True) if not is_equal(*one)] == []


async def inserted_updated_and_deleted(database: Database) -> list[Change]:
    tables = create(database, ALL)
    stream = Stream(database)
    stream.record("public.*", "insert", "update", "delete")
    fill(database, ALL)
    for table in tables:
        database.execute(f"UPDATE {table} SET id = id + 100; DELETE FROM {table} WHERE id < 102")
    await stream.drain()
    return stream.changes


def is_equal(change: Change, read: Change) -> bool:
    """As JSON, as objects, by the names of their types, and by what filters compare."""
    return (
        change.to_json() == read.to_json()
        and same(list(change.row.values()), list(read.row.values()))
        and same(list(change.identity.values()), list(read.identity.values()))
        and type_names(change) == type_names(read)
        and keys(change) == keys(read)
    )


def type_names(change: Change) -> list[str]:
    return [change.layout.types.name(oid) for oid in change.layout.typeoids]


def keys(change: Change) -> list[str]:
    columns = change.new_columns or change.identity_columns or []
    return [key(change, column) for column in columns]


def key(change: Change, column: Column) -> str:
    types = change.layout.types
    if not types.supports(column.typeoid):
        return ""
    return repr(types.key_of(column.typeoid)(column.value))
