"""Clients that behave badly, at the running process: it costs the others nothing."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Final
from urllib.parse import urlencode, urlsplit

import httpx
import pytest
from starlette.applications import Starlette

from tests.command_line import CommandLine, slot_name
from tests.live_service import ANYBODY, Event, LiveService, events_of, live_service
from tests.postgres import wait_until
from walstream.access import Gate
from walstream.config.access import AccessConfig
from walstream.config.live import LiveConfig
from walstream.gateway.changes import changes_routes
from walstream.live.history import Recent
from walstream.live.hub import Hub
from walstream.testing import Database

SCHEMA: Final = "CREATE TABLE orders (id int PRIMARY KEY, note text)"
SMALL: Final = f"""
[live]
max_queue_bytes = "1MB"
recent_bytes = "200MB"
recent_changes = 1000000
{ANYBODY}
"""
ORDERS: Final = [("table", "public.orders")]
PIECE: Final = 2000


@pytest.fixture
def service(database: Database, tmp_path: Path) -> Iterator[LiveService]:
    """A process that lets little wait for a client."""
    database.execute(SCHEMA)
    with live_service(CommandLine(tmp_path), database.dsn, slot_name(), more=SMALL) as service:
        yield service


def write(database: Database, ids: range) -> None:
    """Write rows of some length in one transaction."""
    database.execute(
        "INSERT INTO orders SELECT i, repeat('x', %s) FROM unnest(%s::int[]) i", PIECE, list(ids)
    )


def write_and_read(database: Database, events: Iterator[Event], ids: range) -> list[int]:
    """Write a hundred rows after another, each when the client has read the last ones."""
    read: list[int] = []
    for begin in range(ids.start, ids.stop, 100):
        some = ids[begin - ids.start : begin - ids.start + 100]
        write(database, some)
        read += [one.content["row"]["id"] for one in inserts(events, len(some))]
    return read


def inserts(events: Iterator[Event], count: int) -> list[Event]:
    return list(islice((one for one in events if one.name == "insert"), count))


@contextmanager
def connected(
    service: LiveService, parameters: Sequence[tuple[str, str]]
) -> Iterator[socket.socket]:
    """Ask for a stream, over a connection that takes little at once."""
    address = urlsplit(service.url)
    assert address.hostname
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.settimeout(20)
        one.connect((address.hostname, address.port))
        head = f"GET /changes?{urlencode(parameters)} HTTP/1.0\r\nHost: {address.netloc}\r\n\r\n"
        one.sendall(head.encode())
        yield one


def count_of(service: LiveService, metric: str) -> float:
    text = httpx.get(f"{service.url}/metrics").text
    found = re.search(rf"^walstream_live_{metric} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def clients_of(service: LiveService) -> float:
    return count_of(service, r"clients\{[^}]*\}")


def test_a_slow_client_is_cut_and_goes_on_where_it_was(
    service: LiveService, database: Database
) -> None:
    """It misses nothing, and who reads along with it gets everything meanwhile."""
    with connected(service, ORDERS) as slow, service.stream(ORDERS) as events:
        next(events)
        wait_until(lambda: clients_of(service) == 2)
        ids = write_and_read(database, events, range(5000))
        assert ids == list(range(5000))
        wait_until(lambda: clients_of(service) == 1)
        received = b""
        while piece := slow.recv(1 << 16):
            received += piece
    lines = received.partition(b"\r\n\r\n")[2].decode().splitlines()
    got = list(events_of(iter(lines)))
    assert (got[-1].name, got[-1].content) == ("end", {"reason": "slow"})
    rows = [one for one in got if one.name == "insert"]
    assert 0 < len(rows) < 5000
    headers = {"Last-Event-ID": rows[-1].id}
    with service.stream(ORDERS, headers=headers) as events:
        rows += inserts(events, 5000 - len(rows))
    assert [one.content["row"]["id"] for one in rows] == list(range(5000))


def test_clients_that_never_read_hold_up_nobody(service: LiveService, database: Database) -> None:
    """They are given up, and those that read of the past cost nobody else anything."""
    with ExitStack() as opened, service.stream(ORDERS) as events:
        begin = next(events).id
        for _ in range(20):
            opened.enter_context(connected(service, ORDERS))
        wait_until(lambda: clients_of(service) == 21)
        assert write_and_read(database, events, range(5000)) == list(range(5000))
        for _ in range(20):
            opened.enter_context(connected(service, [*ORDERS, ("since", begin)]))
        took_seconds = []
        for number in range(5000, 5020):
            began = time.perf_counter()
            database.execute("INSERT INTO orders VALUES (%s, 'now')", number)
            (insert,) = inserts(events, 1)
            assert insert.content["row"]["id"] == number
            took_seconds.append(time.perf_counter() - began)
        assert sorted(took_seconds)[10] < 1
        # Those who read of the past are waited for, each by itself, until the server cuts them.
        wait_until(lambda: clients_of(service) == 21)


def test_two_hundred_clients_that_leave_at_once_leave_nothing(
    service: LiveService, database: Database
) -> None:
    """Whether they wait for an answer or not, and for what they missed or not."""
    write(database, range(300))

    def visit(number: int) -> None:
        parameters = [*ORDERS, ("where", f"id=eq.{number % 40}")]
        if number % 3 == 0:
            parameters = [*ORDERS, ("since", "0/1")]
        with connected(service, parameters) as one:
            if number % 2:
                one.recv(100)

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(visit, range(200)))
    wait_until(lambda: clients_of(service) == 0)
    assert count_of(service, r"cohorts\{[^}]*\}") == 0
    with service.stream(ORDERS) as events:
        next(events)
        database.execute("INSERT INTO orders VALUES (1000, 'still there')")
        assert next(events).content["row"]["note"] == "still there"


# Before the stream has begun


async def test_an_event_source_is_told_to_come_back_and_others_get_a_status() -> None:
    """To a status other than 200 an EventSource never comes back."""
    hub = Hub(None, Recent(1, 1))  # type: ignore[arg-type]
    access = AccessConfig.model_validate(
        {"anonymous_role": "any", "roles": {"any": {"tables": [{"table": "*.*"}]}}}
    )
    routes = changes_routes(lambda: hub, Gate(access), LiveConfig(retry_seconds=3))
    transport = httpx.ASGITransport(Starlette(routes=routes))
    client = httpx.AsyncClient(transport=transport, base_url="http://walstream")
    query = {"table": "public.orders"}
    answer = await client.get("/changes", params=query, headers={"Accept": "text/event-stream"})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.startswith("retry: 3000\n")
    (event,) = events_of(iter(answer.text.splitlines()))
    assert (event.name, event.id, event.content) == ("end", "", {"reason": "unavailable"})
    for path, accepted in (("/changes", "*/*"), ("/changes.jsonl", "text/event-stream")):
        answer = await client.get(path, params=query, headers={"Accept": accepted})
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert json.loads(answer.text)["error"]
