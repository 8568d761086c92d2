"""kill -9 at random moments loses nothing, and what comes again comes as it was."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Final

import pytest

from tests import workload
from tests.oracle import Twins, assert_same, canonical, lines_of
from tests.postgres import Database
from walstream.cluster import ServerPrograms

SEED: Final = int(os.environ.get("WALSTREAM_KILL_SEED") or random.SystemRandom().getrandbits(32))
"""Decides on the workload and on the moments; left to chance unless it is given."""

KILLS: Final = 25
TRANSACTIONS_PER_LIFE: Final = 60

STARTING_SECONDS: Final = 1.0
WRITING_BYTES: Final = 500_000
QUIET_SECONDS: Final = 0.3
AT_MOST_SECONDS: Final = 5.0

TORN: Final = b'{"id":"0/15'
"""What a write that a crash of the machine has cut short may leave behind."""


@pytest.mark.timeout(180)
def test_kill_9_loses_nothing_and_repeats_come_as_they_were(
    database: Database, server_programs: ServerPrograms, tmp_path: Path
) -> None:
    """25 times while the mixed workload goes on; then one more process finishes the work."""
    print(f"WALSTREAM_KILL_SEED={SEED}")  # noqa: T201 - pytest shows it when the test fails
    # Status updates come every 0.7 seconds then, and the slot moves between the kills.
    database.execute(f"ALTER DATABASE {database.name} SET wal_sender_timeout = '2s'")
    workload.prepare(database.dsn)
    with Twins(database, server_programs, tmp_path) as twins:
        lives = killed_lives(database, twins)
        until = twins.now()
        twins.run("now")
        lines = lines_of(twins.path)
        expected = twins.expected(until)

    ends = [*lives, len(lines)]
    first_seen: dict[str, bytes] = {}
    for line in lines:
        assert first_seen.setdefault(json.loads(line)["id"], line) == line
    assert_same([canonical(line) for line in first_seen.values()], expected)

    place = {identity: number for number, identity in enumerate(first_seen)}
    places = [place[json.loads(line)["id"]] for line in lines]
    for start, end in pairwise([0, *ends]):
        assert places[start:end] == [*range(places[start], places[start] + end - start)][: end - start] if end > start else True
    in_the_middle = [
        end
        for start, end in pairwise([0, *lives])
        if start < end and max(places[:end]) + 1 < len(expected)
    ]
    print(len(lines), len(expected), len(in_the_middle), len([e for e in lives if e and e<len(lines) and json.loads(lines[e-1])["end_lsn"] == json.loads(lines[e])["end_lsn"]]))
    assert 0


def killed_lives(database: Database, twins: Twins) -> list[int]:
    """Kill walstream again and again; return how many whole lines the file had each time."""
    chance = random.Random(SEED)  # noqa: S311 - repeatable
    moments: tuple[Callable[[subprocess.Popen[bytes]], None], ...] = (
        lambda process: wait_for_a_start(process, chance),
        lambda process: wait_for_growth(process, twins.path, chance),
        lambda process: wait_for_growth(process, twins.path, chance),
        lambda process: wait_for_a_confirmation(process, twins),
    )
    whole_lines = []
    with paced_workload(database.dsn, KILLS * TRANSACTIONS_PER_LIFE) as go_on:
        for _ in range(KILLS):
            go_on(TRANSACTIONS_PER_LIFE)
            process = twins.start()
            chance.choice(moments)(process)
            process.kill()
            assert process.wait() == -signal.SIGKILL, twins.log.read_text()[-4000:]
            whole_lines.append(whole_lines_in(twins.path))
    return whole_lines
