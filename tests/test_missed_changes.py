"""What a client asks for again is what it would have got, whatever has changed since."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Final

import httpx
import pytest

from tests.command_line import CommandLine, slot_name
from tests.live_service import LiveService, live_service
from walstream.testing import Database


@pytest.fixture
def service(database: Database, tmp_path: Path) -> Iterator[LiveService]:
    """Run it on a database with a table of moods."""
    database.execute(
        "CREATE TYPE mood AS ENUM ('sad', 'happy');"
        "CREATE TABLE people (id int PRIMARY KEY, mood mood);"
        "CREATE TABLE marks (id int PRIMARY KEY)"
    )
    with live_service(CommandLine(tmp_path), database.dsn, slot_name()) as service:
        yield service


def test_a_label_that_an_enum_got_meanwhile_is_compared_as_it_is_now(
    service: LiveService, database: Database
) -> None:
    """Nobody was there to compare it when it came."""
    wanted = [("table", "public.people"), ("where", "mood=gt.sad")]
    with service.stream(wanted) as events:
        next(events)
        database.execute("INSERT INTO people VALUES (1, 'happy')")
        last = next(events).id
    with service.stream([("table", "public.marks")]) as events:
        next(events)
        database.execute("ALTER TYPE mood ADD VALUE 'glad' AFTER 'sad'")
        database.execute("INSERT INTO people VALUES (2, 'glad'), (3, 'sad'), (4, 'happy')")
        database.execute("INSERT INTO marks VALUES (1)")
        next(events)
    with service.stream([*wanted, ("since", last)]) as events:
        next(events)
        assert [event.content["row"]["id"] for event in islice(events, 2)] == [2, 4]
        database.execute("INSERT INTO people VALUES (5, 'glad')")
        assert next(events).content["row"]["id"] == 5


def test_with_nothing_kept_a_time_is_answered_by_a_reset(
    service: LiveService, database: Database
) -> None:
    """It is not known that nothing was missed."""
    parameters = [("table", "public.people"), ("since", "2020-01-01T00:00:00Z")]
    with service.stream(parameters) as events:
        assert [next(events).name, next(events).name] == ["streaming", "reset"]
    url = f"{service.url}/changes.jsonl?table=public.people&until=now&since=2020-01-01T00:00:00Z"
    assert httpx.get(url).status_code == 410


ENDS: Final = (
    "0001-01-01T00:00:00+14:00",
    "9999-12-31T23:59:59-14:00",
    "2026-W01-1T00:00:00Z",
    "FFFFFFFF/FFFFFFFF",
    "FFFFFFFF/FFFFFFFF:2147483647",
    "0/0",
    "0/0:0",
)


def test_places_at_the_ends_of_the_world_are_answered(
    service: LiveService, database: Database
) -> None:
    """What lies beyond all that was written is of another server, and so is told of by a reset."""
    for number, since in enumerate(ENDS):
        with service.stream([("table", "public.people"), ("since", since)]) as events:
            assert next(events).name == "streaming"
            database.execute("INSERT INTO people VALUES (%s, 'sad')", number)
            names = []
            for event in events:
                names.append(event.name)
                if event.name == "insert" and event.content["row"]["id"] == number:
                    break
        assert names.count("reset") == (0 if since.startswith("9999") else 1)
