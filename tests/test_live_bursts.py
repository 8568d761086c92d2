"""Clients while changes are published faster than they are sent."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from tests.command_line import CommandLine, slot_name
from tests.live_service import live_service
from walstream.testing import Database

ROWS = 150
ROW_BYTES = 20_000


def test_a_burst_larger_than_the_queue_cuts_off_nobody_who_reads(
    database: Database, tmp_path: Path
) -> None:
    """Three times as much as may wait for a client comes in one transaction."""
    database.execute("CREATE TABLE notes (id int PRIMARY KEY, content text)")
    with (
        live_service(CommandLine(tmp_path), database.dsn, slot_name()) as service,
        service.stream([("table", "public.notes")]) as events,
    ):
        next(events)
        database.execute(
            f"INSERT INTO notes SELECT i, repeat('x', {ROW_BYTES}) FROM generate_series(1, {ROWS}) i"
        )
        burst = list(islice(events, ROWS))
    assert {one.name for one in burst} == {"insert"}
    assert [one.content["row"]["id"] for one in burst] == list(range(1, ROWS + 1))
