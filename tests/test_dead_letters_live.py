"""Poisoned rows, live: the rest flows, and after the handlers are mended nothing is missing."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from tests.postgres import Database, wait_until
from tests.test_replay import Program

ROWS: Final = 2000
POISONED: Final = range(100, ROWS + 1, 100)
STEP: Final = 100
"""Rows of one transaction."""

SCHEMA: Final = """
    CREATE TABLE source (id int PRIMARY KEY, version int NOT NULL, note text);
    CREATE TABLE lanes (id int PRIMARY KEY, version int NOT NULL, note text, late int DEFAULT 0);
    CREATE TABLE sync (LIKE lanes INCLUDING ALL);
    CREATE TABLE batch (LIKE lanes INCLUDING ALL);
"""
"""``late`` counts the changes of a row that were applied after a later one."""

TARGETS: Final = ("lanes", "sync", "batch")

HANDLERS: Final = """
import asyncio, os, pathlib
import psycopg
from walstream import Change, Walstream

mended = pathlib.Path(__file__).with_name("mended")
stream = Walstream()
idle = []
one = None

def statements(change, table):
    if change.operation == "truncate":
        yield f"TRUNCATE {table}", []
        return
    ids = {change.row.get("id"), change.identity.get("id")} - {None}
    if any(number % 100 == 0 for number in ids) and not mended.exists():
        raise ValueError
    if change.operation == "delete":
        yield f"DELETE FROM {table} WHERE id = %s", [change.identity["id"]]
        return
    row = change.row
    old = change.identity.get("id", row["id"])
    if old != row["id"]:
        yield f"DELETE FROM {table} WHERE id = %s", [old]
    yield f'''
        INSERT INTO {table} VALUES (%s, %s, %s)
        ON CONFLICT (id) DO UPDATE
        SET version = excluded.version, note = excluded.note,
            late = {table}.late + ({table}.version >= excluded.version)::int
    ''', [row["id"], row["version"], row["note"]]

async def apply(connection, changes, table):
    for change in changes:
        for sql, parameters in statements(change, table):
            await connection.execute(sql, parameters)

async def connect():
    return await psycopg.AsyncConnection.connect(os.environ["TARGET"], autocommit=True)

@stream.on("public.source", concurrency=8, name="lanes")
async def in_lanes(change: Change) -> None:
    connection = idle.pop() if idle else await connect()
    try:
        await apply(connection, [change], "lanes")
    finally:
        idle.append(connection)

@stream.on("public.source", name="sync")
def in_thread(change: Change) -> None:
    global one
    one = one or psycopg.connect(os.environ["TARGET"], autocommit=True)
    for sql, parameters in statements(change, "sync"):
        one.execute(sql, parameters)

@stream.on("public.source", batch=50, linger_seconds=0.01, name="batch")
async def in_batches(changes: list[Change]) -> None:
    async with await connect() as connection, connection.transaction():
        await apply(connection, changes, "batch")
"""


@pytest.fixture
def source(database: Database) -> Database:
    database.execute(SCHEMA)
    database.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", database.name)
    database.execute(f"ALTER DATABASE {database.name} SET wal_sender_timeout = '2s'")
    return database


@contextmanager
def daemon(program: Program) -> Iterator[subprocess.Popen[str]]:
    """``walstream run`` beside the test; what it logs is read away."""
    process = program.start("run")
    reading = threading.Thread(target=process.communicate)
    reading.start()
    try:
        yield process
    finally:
        process.terminate()
        reading.join(30)
    assert process.returncode in (0, -signal.SIGKILL)


def write(database: Database) -> None:
    """Three changes of each row, of every 13th the delete too."""
    for first in range(1, ROWS + 1, STEP):
        database.execute(
            "INSERT INTO source SELECT id, 1, 'new' FROM generate_series(%s::int, %s::int) AS id",
            first,
            first + STEP - 1,
        )
    for version in (2, 3):
        for first in range(1, ROWS + 1, STEP):
            database.execute(
                "UPDATE source SET version = %s, note = md5(id::text || %s) WHERE id >= %s"
                " AND id < %s",
                version,
                str(version),
                first,
                first + STEP,
            )
    database.execute("DELETE FROM source WHERE id %% 13 = 0 AND id > %s", 0)


def move_and_truncate(database: Database) -> None:
    """Rows leave a poisoned key, and come to one; then all go, and some come again."""
    database.execute("UPDATE source SET id = 100201, version = 4 WHERE id = 200")
    database.execute("DELETE FROM source WHERE id = 400")
    database.execute("UPDATE source SET id = 400, version = 4 WHERE id = 401")
    database.execute("TRUNCATE source")
    database.execute("INSERT INTO source SELECT id, 9, 'late' FROM generate_series(1, 300) AS id")


def go_on(database: Database, finished: threading.Event) -> None:
    """Change all kinds of rows, over and over."""
    while not finished.is_set():
        database.execute("UPDATE source SET version = version + 1 WHERE id % 50 = 0")
        finished.wait(0.02)  # seconds between two transactions
    database.close()


def wait_until_confirmed(database: Database) -> None:
    """Wait until the slot is at the end of what is written now."""
    [(now,)] = database.execute("SELECT pg_current_wal_lsn()::text")

    def is_confirmed() -> bool:
        [(there,)] = database.execute(
            "SELECT confirmed_flush_lsn >= %s::pg_lsn FROM pg_replication_slots"
            " WHERE slot_name = %s",
            now,
            database.name,
        )
        return bool(there)

    wait_until(is_confirmed, 120)


def rows(database: Database, table: str, condition: str = "true") -> list[tuple[Any, ...]]:
    return database.execute(f"SELECT id, version, note FROM {table} WHERE {condition} ORDER BY id")


def letters(program: Program) -> list[dict[str, Any]]:
    out, _ = program.run("dead-letters", "list", "--json")
    return [json.loads(line) for line in out.splitlines()]


def kill_in_between(program: Program, source: Database) -> None:
    """Kill the daemon twice, each time when it has put some more letters aside."""
    for version in (1, 3):
        with daemon(program) as process:
            wait_until(partial_count(source, version), 60)
            process.kill()
            process.wait()


def partial_count(source: Database, version: int) -> Callable[[], bool]:
    def has_come() -> bool:
        found = source.execute("SELECT count(*) FROM lanes WHERE version >= %s", version)
        return bool(found[0][0] > ROWS // 10)

    return has_come


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("sqlite", "kill -9"),
        ("postgres", "truncate"),
        # The other pairs of the two, which take half a minute more.
        pytest.param("sqlite", "nothing", marks=pytest.mark.soak),
        pytest.param("postgres", "nothing", marks=pytest.mark.soak),
        pytest.param("sqlite", "truncate", marks=pytest.mark.soak),
    ],
)
def test_the_rest_flows_and_after_a_replay_nothing_is_missing(
    source: Database, tmp_path: Path, kind: str, more: str
) -> None:
    program = Program(tmp_path, source, kind, HANDLERS)
    write(source)
    if more == "truncate":
        move_and_truncate(source)
    if more == "kill -9":
        kill_in_between(program, source)
    with daemon(program):
        wait_until_confirmed(source)
        if more != "truncate":
            verify_the_rest_has_come(program, source)
        (tmp_path / "mended").touch()
        finished = threading.Event()
        writing = threading.Thread(target=go_on, args=(Database(source.dsn), finished))
        writing.start()
        try:
            out, _ = program.run("dead-letters", "replay", "--all", "--yes", timeout_seconds=180)
        finally:
            finished.set()
            writing.join()
        assert sorted(line.partition(":")[0] for line in out.splitlines()) == sorted(TARGETS)
        wait_until_confirmed(source)
    assert letters(program) == []
    expected = rows(source, "source")
    assert len(expected) > 100
    for target in TARGETS:
        assert rows(source, target) == expected, target
        if more != "kill -9":
            assert source.execute(f"SELECT count(*) FROM {target} WHERE late > 0") == [(0,)]


def verify_the_rest_has_come(program: Program, source: Database) -> None:
    """The slot is at the end; of each poisoned row the first change has failed, others wait."""
    others = "id % 100 <> 0"
    found = letters(program)
    for target in TARGETS:
        assert rows(source, target, others) == rows(source, "source", others), target
        assert rows(source, target, "id % 100 = 0") == []
        own = [one for one in found if one["route"] == target]
        by_row: dict[str, list[dict[str, Any]]] = {}
        for one in own:
            by_row.setdefault(str(one["keys"][0]["values"]), []).append(one)
        assert len(by_row) == len(POISONED)
        for its_own in by_row.values():
            assert [one["parked"] for one in its_own] == [False] + [True] * (len(its_own) - 1)
            operations = [one["operation"] for one in its_own]
            assert operations[:3] == ["insert", "update", "update"]
        assert Counter(one["operation"] for one in own)["delete"] == len(
            [number for number in POISONED if number % 13 == 0]
        )
