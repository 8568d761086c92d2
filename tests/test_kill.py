"""kill -9 at random moments loses nothing, and what comes again comes as it was."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Final, TypeAlias

import pytest

from tests import workload
from tests.oracle import Twins, assert_same, canonical, lines_of
from tests.postgres import Database, wait_until
from walstream.cluster import ServerPrograms

SEED: Final = int(os.environ.get("WALSTREAM_KILL_SEED") or random.SystemRandom().getrandbits(32))
"""Decides on the workload and on the moments; left to chance unless it is given."""

KILLS: Final = 25
HANDLER_KILLS: Final = 6
TRANSACTIONS: Final = 60
"""So many more may begin with each new process."""

STARTING_SECONDS: Final = 1.0
WRITTEN_BYTES: Final = 500_000
QUIET_SECONDS: Final = 0.2
WRITING_SECONDS: Final = 5.0

TORN: Final = b'{"id":"0/15A3'
"""What a power cut may leave of a line; kill -9 alone hardly ever does."""

HANDLERS: Final = """
import asyncio, os, pathlib
from walstream import Change, Walstream

seen = os.open(pathlib.Path(__file__).with_name("seen"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
stream = Walstream()

@stream.on("*.*")
async def remember(change: Change) -> None:
    if change.ordinal == 1:
        await asyncio.sleep(0.02)
    os.write(seen, change.id.encode() + b"\\n")
"""

Moment: TypeAlias = Callable[[subprocess.Popen[bytes]], None]
"""Waits until the process is to be killed."""


@pytest.mark.timeout(180)
def test_kill_9_loses_nothing_and_repeats_come_as_they_were(
    database: Database, server_programs: ServerPrograms, tmp_path: Path
) -> None:
    """25 times while the mixed workload goes on; then one more process finishes the work."""
    chance = random.Random(SEED)  # noqa: S311 - repeatable
    ends = []
    with Twins(database, server_programs, tmp_path) as twins:
        with paced_workload(database, KILLS * TRANSACTIONS) as pace:
            for _ in range(KILLS):
                pace.release(TRANSACTIONS)
                kill(twins, random_moment(twins, chance))
                ends.append(whole_lines(twins.path))
                if chance.random() < 0.3:
                    tear(twins.path)
        until = twins.now()
        twins.run("now")
        lines, expected = lines_of(twins.path), twins.expected(until)

    ids = [json.loads(line)["id"] for line in lines]
    first: dict[str, bytes] = {}
    for identity, line in zip(ids, lines, strict=True):
        assert first.setdefault(identity, line) == line
    assert_same([canonical(line) for line in first.values()], expected)
    places = places_of(ids)
    for start, end in pairwise([0, *ends, len(lines)]):
        assert all(later - earlier == 1 for earlier, later in pairwise(places[start:end]))
    hits = hits_in_the_middle(places, ends)
    assert len(hits) >= KILLS // 2
    transactions = [identity.partition(":")[0] for identity in first]
    assert any(transactions[hit] == transactions[hit + 1] for hit in hits)


@pytest.mark.timeout(120)
def test_kill_9_loses_nothing_that_a_slow_handler_has_not_seen(
    database: Database, server_programs: ServerPrograms, tmp_path: Path
) -> None:
    """Killed when it has just confirmed, while more is received than handled."""
    (tmp_path / "handlers.py").write_text(HANDLERS)
    seen = tmp_path / "seen"
    ends = []
    with Twins(database, server_programs, tmp_path, routes=(), app="handlers:stream") as twins:
        with paced_workload(database, HANDLER_KILLS * TRANSACTIONS) as pace:
            for _ in range(HANDLER_KILLS):
                pace.release(TRANSACTIONS)
                kill(twins, lambda process: until_it_confirms(process, twins))
                ends.append(whole_lines(seen))
        until = twins.now()
        twins.run("now")
        expected = [json.loads(line)["id"] for line in twins.expected(until)]
    ids = seen.read_text().split()
    assert list(dict.fromkeys(ids)) == expected
    assert len(hits_in_the_middle(places_of(ids), ends)) >= HANDLER_KILLS // 2


def places_of(ids: Sequence[str]) -> list[int]:
    """Number the ids in the order in which each came first."""
    place = {identity: number for number, identity in enumerate(dict.fromkeys(ids))}
    return [place[identity] for identity in ids]


def hits_in_the_middle(places: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Return where the kills hit that came after a process had written, and before all was."""
    return [
        places[end - 1]
        for start, end in pairwise([0, *ends])
        if start < end and max(places[:end]) < max(places)
    ]


@contextmanager
def paced_workload(database: Database, transactions: int) -> Iterator[threading.Semaphore]:
    """Run the workload in a thread; a transaction begins when the semaphore is released."""
    print(f"WALSTREAM_KILL_SEED={SEED}")  # noqa: T201 - pytest shows it when the test fails
    # A third of it is the pause between status updates: the slot is to move between the kills.
    database.execute(f"ALTER DATABASE {database.name} SET wal_sender_timeout = '2s'")
    workload.prepare(database.dsn)
    pace = threading.Semaphore(0)
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(workload.run, database.dsn, SEED, transactions, pace.acquire)
        try:
            yield pace
        finally:
            pace.release(transactions)
            running.result()


def kill(twins: Twins, moment: Moment) -> None:
    """Start a process, and kill it at its moment."""
    process = twins.start()
    moment(process)
    process.kill()
    assert process.wait() == -signal.SIGKILL, twins.log.read_text()[-4000:]


def random_moment(twins: Twins, chance: random.Random) -> Moment:
    (kind,) = chance.choices(("starting", "writing", "confirming"), weights=(1, 5, 3))
    match kind:
        case "starting":
            return lambda process: pause(process, chance.uniform(0, STARTING_SECONDS))
        case "writing":
            target = chance.randrange(WRITTEN_BYTES)
            return lambda process: while_it_writes(process, twins.path, target)
        case _:
            return lambda process: until_it_confirms(process, twins)


def pause(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Let so much time pass, unless the process ends by itself."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def while_it_writes(process: subprocess.Popen[bytes], path: Path, target: int) -> None:
    """Wait until the file has grown by so many bytes, or has grown and does so no more."""
    began = grown = time.monotonic()
    before = size = size_of(path)
    while process.poll() is None and size - before < target:
        now, last, size = time.monotonic(), size, size_of(path)
        if size != last:
            grown = now
        has_paused = size > before and now - grown > QUIET_SECONDS
        if has_paused or now - began > WRITING_SECONDS:
            break
        pause(process, 0.002)


def until_it_confirms(process: subprocess.Popen[bytes], twins: Twins) -> None:
    """Wait until it has moved the slot."""
    before = twins.confirmed()
    wait_until(lambda: twins.confirmed() != before or process.poll() is not None)


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def whole_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def tear(path: Path) -> None:
    """Leave a part of a line, as if its write had been cut short."""
    with path.open("ab") as file:
        file.write(TORN)
