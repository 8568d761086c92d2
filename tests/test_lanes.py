"""Lanes: as many calls at a time as are asked for, and the order of each row exact."""

from __future__ import annotations

import asyncio
import json
import os
import random
import threading
import time
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, Final

import pytest

from tests import stages
from tests.faults import Entry, Phase
from tests.oracle import Record
from tests.postgres import Database
from tests.stages import Expected, Sample
from tests.streaming import Stream
from walstream import Change, Lsn, stream
from walstream.decoder import START_OPTIONS

SEED: Final = int(os.environ.get("WALSTREAM_LANES_SEED") or random.SystemRandom().getrandbits(32))
"""Decides on changes and durations; left to chance unless it is given."""

LANES: Final = 8
ROUNDS: Final = 50
KEYS: Final = 1000
TRANSACTIONS: Final = 500
LONGEST_SECONDS: Final = 0.02

TABLES: Final = """
    CREATE TABLE items (id int PRIMARY KEY, version int);
    CREATE TABLE pairs (a int, b text, version int, PRIMARY KEY (a, b));
    CREATE TABLE notes (note text);
    CREATE TABLE tags (id text, version int);
    ALTER TABLE tags REPLICA IDENTITY FULL;
"""


class Rendezvous:
    """Handlers of which each call waits until as many others are there: it counts how often."""

    def __init__(self, parties: int) -> None:
        self.inside = self.most = self.calls = 0
        self.rounds = 0
        self._in_loop = asyncio.Barrier(parties)
        self._in_threads = threading.Barrier(parties, timeout=20)
        self._lock = threading.Lock()

    async def in_loop(self, change: Change) -> None:
        self._enter()
        self._count(await self._in_loop.wait())
        self._leave()

    def in_thread(self, change: Change) -> None:
        self._enter()
        self._count(self._in_threads.wait())
        self._leave()

    def _enter(self) -> None:
        with self._lock:
            self.calls += 1
            self.inside += 1
            self.most = max(self.most, self.inside)

    def _count(self, place: int) -> None:
        if place == 0:
            self.rounds += 1

    def _leave(self) -> None:
        with self._lock:
            self.inside -= 1


@pytest.mark.parametrize("way", ["in_loop", "in_thread"])
async def test_so_many_calls_run_at_a_time_and_no_more(database: Database, way: str) -> None:
    """400 rows in 50 rounds of 8 calls, each of which waits for the seven others."""
    database.execute("CREATE TABLE items (id int PRIMARY KEY)")
    rendezvous = Rendezvous(LANES)
    lanes = Stream(database)
    lanes.app.on("public.items", concurrency=LANES)(getattr(rendezvous, way))
    database.execute(f"INSERT INTO items SELECT generate_series(1, {LANES * ROUNDS})")
    await lanes.drain()
    assert (rendezvous.most, rendezvous.rounds) == (LANES, ROUNDS)
    assert rendezvous.calls == LANES * ROUNDS


async def test_changes_of_one_row_are_never_delivered_at_a_time(database: Database) -> None:
    database.execute("CREATE TABLE items (id int PRIMARY KEY, version int)")
    lanes = Stream(database)
    seen, inside = [], []

    @lanes.app.on("public.items", concurrency=LANES)
    async def take(change: Change) -> None:
        inside.append(change.id)
        await asyncio.sleep(0)
        assert inside == [change.id]
        inside.clear()
        seen.append(change.row["version"])

    database.execute("INSERT INTO items VALUES (1, 0)")
    for version in range(1, 50):
        database.execute(f"UPDATE items SET version = {version}")
    await lanes.drain()
    assert seen == list(range(50))


class Recorder:
    """A handler of random duration, and when each of its calls began and was done."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.entries: list[Entry] = []
        self._lock = threading.Lock()

    async def in_loop(self, change: Change) -> None:
        self._note(Phase.BEGUN, [change])
        await asyncio.sleep(self._duration(change))
        self._note(Phase.DONE, [change])

    def in_thread(self, change: Change) -> None:
        self._note(Phase.BEGUN, [change])
        time.sleep(self._duration(change))
        self._note(Phase.DONE, [change])

    async def in_batches(self, changes: list[Change]) -> None:
        self._note(Phase.BEGUN, changes)
        await asyncio.sleep(self._duration(changes[0]))
        self._note(Phase.DONE, changes)

    def ids(self, phase: Phase) -> list[str]:
        return [one for entry in self.entries if entry.phase is phase for one in entry.ids]

    def most_at_a_time(self) -> int:
        inside = most = 0
        for entry in self.entries:
            inside += 1 if entry.phase is Phase.BEGUN else -1
            most = max(most, inside)
        return most

    def _duration(self, change: Change) -> float:
        chance = random.Random(f"{SEED} {self.name} {change.id}")  # noqa: S311 - repeatable
        return chance.uniform(0, LONGEST_SECONDS)

    def _note(self, phase: Phase, changes: Sequence[Change]) -> None:
        ids = tuple(change.id for change in changes)
        with self._lock:
            end = len(self.entries) + 1
            self.entries.append(Entry(phase, 0, time.monotonic(), "", ids, end))


async def test_the_order_of_each_row_is_exact_whatever_calls_last(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,000 keys that come, change, go and come again; the position is looked at all the time.

    Rows of one column as key, of two, of a column that is no key, and of a table without any.
    """
    print(f"WALSTREAM_LANES_SEED={SEED}")  # noqa: T201 - pytest shows it when the test fails
    monkeypatch.setattr(stream, "WATCH_SECONDS", 0.02)
    database.execute(TABLES)
    lanes = Stream(database, stream={"max_in_flight_changes": 1000})
    twin = f"{lanes.slot}_twin"
    database.execute("SELECT pg_copy_logical_replication_slot(%s, %s)", lanes.slot, twin)
    recorders = {
        name: attach(lanes, name, table, function, **options)
        for name, table, function, options in (
            ("in the loop", "public.*", "in_loop", {"concurrency": 16}),
            ("in threads", "public.*", "in_thread", {"concurrency": 12}),
            ("in batches", "public.*", "in_batches", {"concurrency": 4, "batch": 5}),
            ("by column", "public.tags", "in_loop", {"concurrency": 8, "key": "id"}),
            ("by two", "public.pairs", "in_thread", {"concurrency": 8, "key": ("b", "a")}),
        )
    }
    write(database)
    samples = await drained(lanes, recorders)
    expected = stages.expected_of(records(database, twin))
    assert len({sample.confirmed for sample in samples}) > 10
    for name, recorder in recorders.items():
        table = {"by column": "tags", "by two": "pairs"}.get(name)
        wanted = of_table(expected, table) if table else without_tags(expected)
        assert_order(name, recorder, wanted)
        whole = of_table(expected, table) if table else expected
        stages.assert_nothing_missing(name, recorder.entries, whole)
        stages.assert_position_never_passed_untaken(name, recorder.entries, whole, samples)
        assert recorder.most_at_a_time() > 2


def attach(lanes: Stream, name: str, table: str, function: str, **options: Any) -> Recorder:
    recorder = Recorder(name)
    lanes.app.on(table, name=name, **options)(getattr(recorder, function))
    return recorder


async def drained(lanes: Stream, recorders: dict[str, Recorder]) -> list[Sample]:
    """Let the stream drain; meanwhile read the position, and then what has been done by now."""
    samples = []
    running = asyncio.create_task(lanes.drain(timeout_seconds=90))
    while not running.done():
        confirmed = Lsn.parse(lanes.confirmed_flush_lsn())
        sizes = {name: len(recorder.entries) for name, recorder in recorders.items()}
        samples.append(Sample(confirmed, sizes))
        await asyncio.wait({running}, timeout=0.02)
    await running
    return samples


def assert_order(name: str, recorder: Recorder, expected: Expected) -> None:
    """Calls about one row began in commit order, each after the one before was done."""
    kept = set(expected.ids)
    begun = [one for one in recorder.ids(Phase.BEGUN) if one in kept]
    assert stages.assert_in_order_per_key(name, begun, expected) >= 10
    begun_at: dict[str, int] = {}
    done_at: dict[str, int] = {}
    for number, entry in enumerate(recorder.entries):
        places = begun_at if entry.phase is Phase.BEGUN else done_at
        places.update(dict.fromkeys(entry.ids, number))
    for ids in expected.by_key().values():
        for one, later in pairwise(ids):
            together = begun_at[one] == begun_at[later]  # in one list
            assert together or done_at[one] < begun_at[later], f"{name}: {one} and {later} overlap"


def of_table(expected: Expected, table: str) -> Expected:
    kept = [one for one in expected.ids if any(key[0] == table for key in expected.keys[one])]
    return stages.restricted(expected, kept)


def without_tags(expected: Expected) -> Expected:
    """Leave out what has another key for the route by column."""
    kept = [one for one in expected.ids if all(key[0] != "tags" for key in expected.keys[one])]
    return stages.restricted(expected, kept)


def records(database: Database, slot: str) -> Iterable[Record]:
    flat = [part for option in START_OPTIONS.items() for part in option]
    rows = database.execute(
        "SELECT data FROM pg_logical_slot_get_changes(%s, NULL, NULL, VARIADIC %s)", slot, flat
    )
    return [json.loads(data) for (data,) in rows]


def write(database: Database) -> None:
    chance = random.Random(f"{SEED} workload")  # noqa: S311 - repeatable
    with database.connect(autocommit=False) as connection:
        connection.execute(f"INSERT INTO items SELECT g, 0 FROM generate_series(1, {KEYS}) g")
        connection.commit()
        for number in range(TRANSACTIONS):
            for _ in range(chance.randrange(1, 9)):
                connection.execute(statement(chance, number).encode())
            connection.commit()


def statement(chance: random.Random, number: int) -> str:
    """Return a change; few rows are changed often, many seldom."""
    row = chance.randrange(1, 20) if chance.random() < 0.5 else chance.randrange(1, KEYS + 1)
    other = chance.randrange(1, KEYS + 50)
    statements = (
        (
            f"INSERT INTO items VALUES ({row}, {number})"
            f" ON CONFLICT (id) DO UPDATE SET version = {number}"
        ),
        f"DELETE FROM items WHERE id = {row}",
        (
            f"UPDATE items SET id = {other} WHERE id = {row}"
            f" AND NOT EXISTS (SELECT FROM items WHERE id = {other})"
        ),
        (
            f"INSERT INTO pairs VALUES ({row % 9}, 'b{other % 5}', {number})"
            f" ON CONFLICT (a, b) DO UPDATE SET version = {number}"
        ),
        f"DELETE FROM pairs WHERE a = {row % 9} AND b = 'b{other % 5}'",
        f"INSERT INTO tags VALUES ('{row % 30}', {number})",
        f"UPDATE tags SET id = '{other % 30}' WHERE id = '{row % 30}'",
        f"INSERT INTO notes VALUES ('{number}')",
        f"TRUNCATE {chance.choice(('items', 'pairs', 'notes', 'tags'))}",
    )
    return chance.choices(statements, (30, 12, 12, 12, 8, 12, 5, 8, 0.2))[0]
