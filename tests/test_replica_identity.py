"""What a handler gets under each replica identity (the matrix of wal2json's behaviour)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import structlog

from tests.conftest import StartCluster
from tests.postgres import Database, async_wait_until, create_database
from tests.streaming import Stream
from walstream import Change, Lsn, UnchangedValueError

BIG = "x" * 9_000

SCHEMA = """
    CREATE TABLE plain (id int, code text NOT NULL, note text, big text, PRIMARY KEY (id));
    ALTER TABLE plain ALTER big SET STORAGE EXTERNAL;
    CREATE UNIQUE INDEX plain_code ON plain (code);
"""


async def changes_of(database: Database, identity: str, *statements: str) -> list[Change]:
    """Run statements on a row of a table with a replica identity; return what a handler gets."""
    database.execute(SCHEMA)
    database.execute(f"ALTER TABLE plain REPLICA IDENTITY {identity}")
    database.execute("INSERT INTO plain VALUES (1, 'a', 'old', %s)", BIG)
    stream = Stream(database)
    for statement in statements:
        database.execute(statement)
    await stream.drain()
    return stream.changes


async def change_of(database: Database, identity: str, statement: str) -> Change:
    (change,) = await changes_of(database, identity, statement)
    return change


UPDATE = "UPDATE plain SET note = 'new'"
UPDATE_KEY = "UPDATE plain SET id = 2"
UPDATE_BIG = "UPDATE plain SET big = 'small'"
DELETE = "DELETE FROM plain"

WHOLE = {"id": 1, "code": "a", "note": "old", "big": BIG}


@pytest.mark.parametrize("identity", ["DEFAULT", "USING INDEX plain_code", "FULL", "NOTHING"])
async def test_an_insert_is_whole_under_every_identity(database: Database, identity: str) -> None:
    change = await change_of(database, identity, "INSERT INTO plain VALUES (2, 'b', NULL, 'c')")
    assert change.operation == "insert"
    assert dict(change.row) == {"id": 2, "code": "b", "note": None, "big": "c"}
    assert (dict(change.identity), change.key, change.unchanged) == ({}, {"id": 2}, ())


async def test_default_identifies_an_update_by_the_key(database: Database) -> None:
    change = await change_of(database, "DEFAULT", UPDATE)
    assert dict(change.row) == {"id": 1, "code": "a", "note": "new"}
    assert dict(change.identity) == {"id": 1}
    assert change.unchanged == ("big",)
    with pytest.raises(UnchangedValueError, match=r"'big' of public\.plain is unchanged"):
        change.row["big"]


async def test_default_sends_the_old_key_when_it_changes(database: Database) -> None:
    change = await change_of(database, "DEFAULT", UPDATE_KEY)
    assert (change.key, dict(change.identity)) == ({"id": 2}, {"id": 1})


async def test_default_sends_a_changed_big_value(database: Database) -> None:
    change = await change_of(database, "DEFAULT", UPDATE_BIG)
    assert (change.row["big"], change.unchanged) == ("small", ())


async def test_default_identifies_a_delete_by_the_key(database: Database) -> None:
    change = await change_of(database, "DEFAULT", DELETE)
    assert (dict(change.row), dict(change.identity), change.key) == ({}, {"id": 1}, {"id": 1})


async def test_an_index_identifies_by_its_columns(database: Database) -> None:
    update, delete = await changes_of(database, "USING INDEX plain_code", UPDATE, DELETE)
    assert dict(update.identity) == {"code": "a"}
    assert update.key == {"id": 1}
    assert update.unchanged == ("big",)
    assert dict(delete.identity) == {"code": "a"}
    assert delete.key == {}


async def test_full_sends_whole_old_rows_and_fills_in_unchanged_values(database: Database) -> None:
    update, key, delete = await changes_of(database, "FULL", UPDATE, UPDATE_KEY, DELETE)
    assert list(update.row.items()) == list({**WHOLE, "note": "new"}.items())
    assert dict(update.identity) == WHOLE
    assert update.unchanged == ()
    assert (key.identity["id"], key.key) == (1, {"id": 2})
    assert dict(delete.identity) == {**WHOLE, "id": 2, "note": "new"}


@pytest.mark.parametrize(
    "identity",
    ["NOTHING", "DEFAULT; ALTER TABLE plain DROP CONSTRAINT plain_pkey"],
    ids=["nothing", "default without a key"],
)
async def test_changes_without_an_identity_are_counted_and_logged_once_a_table(
    database: Database, identity: str
) -> None:
    database.execute(SCHEMA)
    database.execute(f"ALTER TABLE plain REPLICA IDENTITY {identity}")
    database.execute("INSERT INTO plain SELECT g, g::text FROM generate_series(1, 3) g")
    stream = Stream(database)
    database.execute("UPDATE plain SET note = 'new'")
    database.execute("DELETE FROM plain")
    database.execute("INSERT INTO plain VALUES (9, 'z')")
    with structlog.testing.capture_logs() as logs:
        summary = await stream.drain()
    assert [change.key or change.row["id"] for change in stream.changes] in ([{"id": 9}], [9])
    assert summary.lost == 6
    lost = [entry for entry in logs if entry["event"] == "changes_lost"]
    assert [entry["table"] for entry in lost] == ["public.plain"]


async def test_a_move_between_partitions_is_a_delete_and_an_insert(database: Database) -> None:
    database.execute(
        """
        CREATE TABLE whole (id int, region text, PRIMARY KEY (id, region))
            PARTITION BY LIST (region);
        CREATE TABLE part_a PARTITION OF whole FOR VALUES IN ('a');
        CREATE TABLE part_b PARTITION OF whole FOR VALUES IN ('b', 'c') PARTITION BY LIST (region);
        CREATE TABLE part_b_deep PARTITION OF part_b FOR VALUES IN ('b');
        """
    )
    stream = Stream(database)
    stream.record("public.whole")
    database.execute("INSERT INTO whole VALUES (1, 'a')")
    database.execute("UPDATE whole SET region = 'b'")
    database.execute("CREATE TABLE part_b_late PARTITION OF part_b FOR VALUES IN ('c')")
    database.execute("INSERT INTO whole VALUES (2, 'c')")
    await stream.drain()
    seen: list[Any] = [(c.operation, c.relation.name, str(c.root)) for c in stream.changes]
    assert seen == [
        ("insert", "part_a", "public.whole"),
        ("delete", "part_a", "public.whole"),
        ("insert", "part_b_deep", "public.whole"),
        ("insert", "part_b_late", "public.whole"),
    ]


async def test_a_table_that_becomes_a_partition_is_followed(database: Database) -> None:
    """ATTACH PARTITION leaves no trace in the stream."""
    database.execute("CREATE TABLE whole (id int) PARTITION BY LIST (id)")
    database.execute("CREATE TABLE loose (id int)")
    stream = Stream(database)
    stream.record("public.whole")
    running = asyncio.create_task(stream.app.run(stream.config))
    database.execute("INSERT INTO loose VALUES (1)")
    ((before,),) = database.execute("SELECT pg_current_wal_flush_lsn()::text")
    await async_wait_until(lambda: Lsn.parse(stream.confirmed_flush_lsn()) >= Lsn.parse(before))
    database.execute("ALTER TABLE whole ATTACH PARTITION loose FOR VALUES IN (1)")
    database.execute("INSERT INTO loose VALUES (1)")
    await async_wait_until(lambda: stream.changes)
    stream.app.stop()
    await running
    assert [(change.relation.name, str(change.root)) for change in stream.changes] == [
        ("loose", "public.whole")
    ]


async def test_columns_that_come_and_go_are_told_apart_from_unchanged_ones(
    database: Database,
) -> None:
    """The catalog is younger than the records, and may have gained or lost columns."""
    database.execute(SCHEMA)
    database.execute("INSERT INTO plain VALUES (1, 'a', 'old', %s)", BIG)
    stream = Stream(database)
    database.execute("UPDATE plain SET note = 'one'")
    database.execute("ALTER TABLE plain DROP COLUMN big")
    database.execute("UPDATE plain SET note = 'two'")
    database.execute("ALTER TABLE plain ADD COLUMN size int DEFAULT 7")
    database.execute("UPDATE plain SET note = 'three'")
    await stream.drain()
    assert [dict(change.row) for change in stream.changes] == [
        {"id": 1, "code": "a", "note": "one"},
        {"id": 1, "code": "a", "note": "two"},
        {"id": 1, "code": "a", "note": "three", "size": 7},
    ]


async def test_a_pattern_covers_partitions_of_other_schemas_and_names(database: Database) -> None:
    """The server reports partitions under their own names, so it must not sort tables out."""
    database.execute(
        """
        CREATE SCHEMA elsewhere;
        CREATE TABLE whole (id int) PARTITION BY LIST (id);
        CREATE TABLE elsewhere.part PARTITION OF whole FOR VALUES IN (1);
        """
    )
    stream = Stream(database)
    stream.record("public.*")
    stream.record("*.whole")
    database.execute("INSERT INTO whole VALUES (1)")
    await stream.drain()
    assert [str(change.relation) for change in stream.changes] == ["elsewhere.part"] * 2


async def test_a_table_that_another_route_wants_already_is_followed_too(
    database: Database,
) -> None:
    database.execute("CREATE TABLE whole (id int) PARTITION BY LIST (id)")
    database.execute("CREATE TABLE loose (id int)")
    stream = Stream(database)
    everything: list[Change] = []

    @stream.app.on("*.*")
    async def keep(change: Change) -> None:
        everything.append(change)

    stream.record("public.whole")
    running = asyncio.create_task(stream.app.run(stream.config))
    database.execute("INSERT INTO loose VALUES (1)")
    await async_wait_until(lambda: everything)
    database.execute(
        """
        BEGIN;
        ALTER TABLE whole ATTACH PARTITION loose FOR VALUES IN (1);
        INSERT INTO loose VALUES (1);
        COMMIT;
        """
    )
    await async_wait_until(lambda: stream.changes)
    stream.app.stop()
    await running
    assert len(everything) == 2


async def test_a_partition_that_is_gone_before_its_changes_come_is_told(
    database: Database,
) -> None:
    """Nobody knows any more what it was a partition of."""
    database.execute(
        "CREATE TABLE whole (id int) PARTITION BY LIST (id);"
        "CREATE TABLE part PARTITION OF whole FOR VALUES IN (1)"
    )
    stream = Stream(database)
    stream.record("public.whole")
    database.execute("INSERT INTO whole VALUES (1), (1)")
    database.execute("DROP TABLE part")
    with structlog.testing.capture_logs() as logs:
        await stream.drain()
    missing = [entry["table"] for entry in logs if entry["event"] == "relation_missing"]
    assert (stream.changes, missing) == ([], ["public.part"])


async def test_one_table_that_does_not_fit_a_pattern_does_not_stop_the_others(
    database: Database,
) -> None:
    database.execute("CREATE TABLE good (id int PRIMARY KEY, status text)")
    stream = Stream(database)
    stream.record("public.*", where="status=eq.active")
    database.execute("CREATE TABLE bad (status int)")
    database.execute("INSERT INTO bad VALUES (1), (2)")
    database.execute("INSERT INTO good VALUES (1, 'active')")
    with structlog.testing.capture_logs() as logs:
        summary = await stream.drain()
    assert [str(change.relation) for change in stream.changes] == ["public.good"]
    assert [e["table"] for e in logs if e["event"] == "filter_does_not_fit"] == ["public.bad"]
    assert summary.routes[0].absent == 2


async def test_lost_changes_of_tables_that_nobody_wants_do_not_count(database: Database) -> None:
    database.execute("CREATE TABLE whole (id int PRIMARY KEY) PARTITION BY LIST (id)")
    database.execute("CREATE TABLE keyless (id int)")
    database.execute("INSERT INTO keyless VALUES (1)")
    stream = Stream(database)
    stream.record("public.whole")
    database.execute("UPDATE keyless SET id = 2")
    assert (await stream.drain()).lost == 0


async def test_a_table_whose_name_is_not_ascii_comes_from_a_latin1_database(
    private_cluster: StartCluster,
) -> None:
    cluster = private_cluster(encoding="LATIN1")
    with create_database(cluster.conninfo(), "template0") as latin1:
        with latin1.connect(client_encoding="utf8") as connection:
            connection.execute('CREATE TABLE "größe" ("maß" int PRIMARY KEY)')
            stream = Stream(latin1)
            stream.record("public.größe", where="maß=gte.1")
            connection.execute('INSERT INTO "größe" VALUES (1)')
        await stream.drain()
        assert [dict(change.row) for change in stream.changes] == [{"maß": 1}]
