"""Handlers that reject, fail, hold, hang and cancel, and processes that are killed under them."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import psycopg
import pytest

from tests import faults, stages
from tests.faults import HANDLERS, JOBS, LANES, Entry, Gate, Phase
from tests.oracle import Twins
from tests.postgres import Database, wait_until
from tests.stages import Expected, Life, Watcher
from walstream.cluster import ServerPrograms
from walstream.errors import EX_TEMPFAIL
from walstream.lsn import Lsn

SEED: Final = int(os.environ.get("WALSTREAM_FAULTS_SEED") or random.SystemRandom().getrandbits(32))
"""Decides on the workload, the faults and the moments; left to chance unless it is given."""

ROUNDS: Final = 10
SOAK_ROUNDS: Final = int(os.environ.get("WALSTREAM_FAULTS_ROUNDS") or 150)
TRANSACTIONS: Final = 45
"""So many more may begin with each new process."""

SHARE: Final = 0.03
"""Of the changes; with so many of them something goes wrong, for each handler."""

MAX_IN_FLIGHT: Final = 400
BATCH_MESSAGES: Final = 1000
"""What one read of the socket brings at most; so much is handed over beyond the limit."""

STATUS_SECONDS: Final = 1.0
LATE_SECONDS: Final = 2.0
"""How late a status update may be when the machine is busy."""

STREAM: Final = {
    "max_in_flight_changes": MAX_IN_FLIGHT,
    "stuck_after_seconds": 0.5,
    "release_after_seconds": 1.5,
    "drain_seconds": 1.0,
}
ATTEMPTS: Final = {
    "attempts": faults.ATTEMPTS,
    "backoff_seconds": 0.01,
    "max_backoff_seconds": 0.05,
}

ROUTES: Final = len(HANDLERS) + 1
END_OF_WAL: Final = Lsn(2**64 - 1)
SINK: Final = "sink"

HANDLERS_MODULE: Final = """
from pathlib import Path
from tests.faults import make_stream

stream = make_stream(Path(__file__).parent, {seed}, {share})
"""

TABLES: Final = """
    CREATE TABLE items (id int PRIMARY KEY, version int);
    CREATE TABLE pairs (a int, b text, version int, PRIMARY KEY (a, b));
    CREATE TABLE notes (note text);
"""


@pytest.mark.timeout(180)
def test_nothing_is_lost_whatever_handlers_do_and_whenever_they_are_killed(
    database: Database, server_programs: ServerPrograms, tmp_path: Path
) -> None:
    """All kinds of handlers in one process that is killed, stopped, stuck or gives up."""
    play(database, server_programs, tmp_path, ROUNDS)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_nothing_is_lost_in_a_long_run(
    database: Database, server_programs: ServerPrograms, tmp_path: Path
) -> None:
    """The same for many rounds: WALSTREAM_FAULTS_ROUNDS."""
    play(database, server_programs, tmp_path, SOAK_ROUNDS)


def play(database: Database, programs: ServerPrograms, folder: Path, rounds: int) -> None:
    """Let processes live and die while the workload goes on; then look at what they left."""
    print(f"WALSTREAM_FAULTS_SEED={SEED}")  # noqa: T201 - pytest shows it when the test fails
    database.execute(f"ALTER DATABASE {database.name} SET wal_sender_timeout = '3s'")
    database.execute(TABLES)
    (folder / "handlers.py").write_text(HANDLERS_MODULE.format(seed=SEED, share=SHARE))
    with Twins(database, programs, folder, app="handlers:stream") as twins:
        configured = stages.settings(twins._config.read_text(), stream=STREAM, handlers=ATTEMPTS)
        twins._config.write_text(configured)
        journals = {name: faults.journal(folder, name) for name in (*HANDLERS, JOBS)}
        journals[SINK] = twins.path
        watcher = Watcher(database.dsn, twins._slot, journals, Gate(folder))
        with watcher.watching():
            with workload(database, rounds) as pace:
                lives = live_and_die(twins, pace, rounds)
            until = twins.now()
            lives += finish(twins, until)
        records = twins.records(until)
    assert_kept(
        {name: faults.entries(path) for name, path in journals.items() if name != SINK},
        stages.sink_entries(twins.path),
        {
            "changes": stages.expected_of(records),
            JOBS: stages.expected_of(records, "M"),
        },
        lives,
        watcher,
    )


def live_and_die(twins: Twins, pace: threading.Semaphore, rounds: int) -> list[Life]:
    """Start processes one after another, each of which ends in some way."""
    chance = random.Random(SEED)  # noqa: S311 - repeatable
    lives = []
    for _ in range(rounds):
        for _ in range(TRANSACTIONS):
            pace.release()
        started_at = Lsn.parse(twins.confirmed())
        process = twins.start()
        if chance.random() < 0.85:
            wait_until(lambda: process.poll() is not None or is_streaming(twins), 20)  # noqa: B023
        wait_for_end(process, chance.uniform(0, 2.5))
        how = signal.SIGKILL if chance.random() < 0.7 else signal.SIGTERM
        if process.poll() is None:
            process.send_signal(how)
        code = process.wait(timeout=30)
        assert code in {0, EX_TEMPFAIL, -how}, twins.log.read_text()[-4000:]
        lives.append(dead(twins, process, started_at))
    return lives


def finish(twins: Twins, until: str) -> list[Life]:
    """Start processes until one comes to the end."""
    lives = []
    for _ in range(sum(faults.LIMITS.values()) + 1):
        started_at = Lsn.parse(twins.confirmed())
        process = twins.start("--until", until)
        code = process.wait(timeout=90)
        assert code in {0, EX_TEMPFAIL}, twins.log.read_text()[-4000:]
        lives.append(dead(twins, process, started_at))
        if code == 0:
            return lives
    raise AssertionError(twins.log.read_text()[-4000:])


def is_streaming(twins: Twins) -> bool:
    return bool(
        twins._database.execute(
            "SELECT 1 FROM pg_replication_slots WHERE slot_name = %s AND active", twins._slot
        )
    )


def wait_for_end(process: subprocess.Popen[bytes], seconds: float) -> None:
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def dead(twins: Twins, process: subprocess.Popen[bytes], started_at: Lsn) -> Life:
    """Note how a process ended; its last status update is read before the walsender goes."""
    ended = time.monotonic()
    wait_until(lambda: not is_streaming(twins), 20)
    how = {0: "stopped", EX_TEMPFAIL: "gave up"}.get(process.returncode, "killed")
    return Life(process.pid, how, ended, started_at, Lsn.parse(twins.confirmed()))


@contextmanager
def workload(database: Database, rounds: int) -> Iterator[threading.Semaphore]:
    """Write in a thread; a transaction begins when the semaphore is released."""
    pace = threading.Semaphore(0)
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(write, database.dsn, rounds * TRANSACTIONS, pace)
        try:
            yield pace
        finally:
            pace.release(rounds * TRANSACTIONS)
            running.result()


def write(dsn: str, transactions: int, pace: threading.Semaphore) -> None:
    """Run transactions of few changes, and some of many, over few rows."""
    chance = random.Random(f"{SEED} workload")  # noqa: S311 - repeatable
    with psycopg.connect(dsn) as connection:
        for number in range(transactions):
            pace.acquire()
            size = chance.choice((60, 150)) if chance.random() < 0.04 else chance.randrange(1, 7)
            for _ in range(size):
                connection.execute(statement(chance, number).encode())
            if chance.random() < 0.1:
                connection.rollback()
            connection.commit()


def statement(chance: random.Random, number: int) -> str:
    """Return a change of one row, of all, of a key, or a message."""
    row, other = chance.randrange(40), chance.randrange(40)
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
            f"INSERT INTO pairs VALUES ({row % 5}, 'b{other % 3}', {number})"
            f" ON CONFLICT (a, b) DO UPDATE SET version = {number}"
        ),
        f"DELETE FROM pairs WHERE a = {row % 5}",
        f"INSERT INTO notes VALUES ('{number}')",
        f"SELECT pg_logical_emit_message(true, 'jobs {row % 3}', '{number}')",
        f"TRUNCATE {chance.choice(('items', 'pairs', 'notes'))}",
    )
    return chance.choices(statements, (40, 12, 8, 12, 5, 12, 8, 0.3))[0]


def assert_kept(
    journals: dict[str, list[Entry]],
    sink: list[Entry],
    expected: dict[str, Expected],
    lives: list[Life],
    watcher: Watcher,
) -> None:
    """What the suite is about, for each handler and for the sink."""
    changes = expected["changes"]
    wanted = {name: expected.get(name, changes) for name in (*journals, SINK)}
    all_of_them = {**journals, SINK: sink}
    for name, entries in all_of_them.items():
        stages.assert_nothing_missing(name, entries, wanted[name])
        stages.assert_position_never_passed_untaken(name, entries, wanted[name], watcher.samples)
    for name, entries in journals.items():
        effects = stages.units_of(entries, Phase.EFFECT)
        if name in LANES:
            ids = [identity for unit in effects for identity in unit]
            assert stages.assert_in_order_per_key(name, ids, changes) > 20
        else:
            stages.assert_in_commit_order(name, effects, wanted[name])
            for life in lives:
                of_life = stages.units_of(entries, Phase.EFFECT, life.pid)
                stages.assert_no_gap_within_a_process(name, of_life, wanted[name], life.started_at)
    stages.assert_in_commit_order(SINK, stages.units_of(sink, Phase.DONE), changes)
    repeats = [assert_repeats_bounded(journals, expected, life) for life in lives[:-1]]
    assert sum(life.ended == "killed" for life in lives) >= len(lives) // 4
    assert sum(map(bool, repeats)) >= 2
    assert len(set().union(*map(played, journals.values()))) >= len(faults.Fault) - 4
    print(summary(journals, lives, repeats, watcher))  # noqa: T201 - shown by pytest -s


def assert_repeats_bounded(
    journals: dict[str, list[Entry]], expected: dict[str, Expected], life: Life
) -> int:
    """What comes again after the end of a process was in flight, or was not yet confirmed.

    In flight: of what has begun up to the furthest change of any handler, so many deliveries are
    not done as may be in flight, and one read of the socket brings. Not yet confirmed: what all
    handlers had done longer ago than a status update takes is behind the position.

    Returns:
        How many changes come again to the handler that gets the most.
    """
    changes = expected["changes"]
    first, beyond = changes.first_beyond(life.started_at), changes.first_beyond(life.confirmed)
    own = {
        name: [entry for entry in entries if entry.pid == life.pid]
        for name, entries in journals.items()
    }
    begun = {name: places_of(own[name], Phase.BEGUN, changes) for name in HANDLERS}
    done = {name: places_of(own[name], Phase.DONE, changes) for name in HANDLERS}
    end = max((place + 1 for places in begun.values() for place in places), default=first)
    undone = [place for name in HANDLERS for place in range(first, end) if place not in done[name]]
    assert len(undone) <= MAX_IN_FLIGHT + BATCH_MESSAGES * ROUTES
    assert end - min(undone, default=end) <= MAX_IN_FLIGHT + BATCH_MESSAGES
    settled = min(settled_before(own[name], expected.get(name, changes), life) for name in journals)
    limit = max((lsn for lsn in changes.end_lsns if lsn < settled), default=life.started_at)
    assert life.confirmed >= limit, f"{life}: all was done before {settled}, and not confirmed"
    return max(sum(place >= beyond for place in places) for places in begun.values())


def places_of(entries: list[Entry], phase: Phase, changes: Expected) -> set[int]:
    return {
        changes.place[identity]
        for entry in entries
        if entry.phase is phase
        for identity in entry.ids
    }


def settled_before(entries: list[Entry], expected: Expected, life: Life) -> Lsn:
    """Return the end of the first transaction that a handler had not done some time ago."""
    some_time_ago = life.end - STATUS_SECONDS - LATE_SECONDS
    done = {
        identity
        for entry in entries
        if entry.phase is Phase.DONE and entry.time < some_time_ago
        for identity in entry.ids
    }
    first = expected.first_beyond(life.started_at)
    return next(
        (stages.end_lsn(identity) for identity in expected.ids[first:] if identity not in done),
        END_OF_WAL,
    )


def summary(
    journals: dict[str, list[Entry]], lives: list[Life], repeats: list[int], watcher: Watcher
) -> str:
    """Say what was played."""
    first = (
        f"{len(lives)} processes: {dict(Counter(life.ended for life in lives))};"
        f" repeats {repeats}; {len(watcher.samples)} looks at the position"
    )
    lines = [first]
    for name, entries in journals.items():
        calls = Counter(str(entry.phase) for entry in entries)
        lines.append(f"{name}: {dict(calls)} {dict(played(entries))}")
    return "\n".join(lines)


def played(entries: list[Entry]) -> Counter[str]:
    """Count what went wrong."""
    return Counter(
        entry.fault
        for entry in entries
        if entry.phase is Phase.BEGUN and entry.fault != faults.Fault.NONE
    )
