"""``/changes``: what clients get as it is committed, and what they missed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import httpx
import pytest

from tests.command_line import CommandLine, slot_name
from tests.live_service import LiveService, live_service
from walstream.testing.databases import Database, create_database, drop_database

SCHEMA = """
CREATE TABLE orders (id int PRIMARY KEY, customer text, total numeric, secret text);
ALTER TABLE orders REPLICA IDENTITY FULL;
CREATE TABLE customers (id int PRIMARY KEY, name text);
"""


@pytest.fixture(scope="module")
def database(server_dsn: str, database_template: str) -> Iterator[Database]:
    """One for all tests: each writes ids of its own."""
    with create_database(server_dsn, database_template) as database:
        database.execute(SCHEMA)
        yield database
    drop_database(server_dsn, database.name)


@pytest.fixture(scope="module")
def service(database: Database, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveService]:
    """A process for all tests."""
    folder = CommandLine(tmp_path_factory.mktemp("changes"))
    with live_service(folder, database.dsn, slot_name()) as service:
        yield service


def test_a_row_comes_as_it_is_committed(service: LiveService, database: Database) -> None:
    """With its id, its operation and the JSON of a change."""
    with service.stream([("table", "public.orders")]) as events:
        assert next(events).name == "streaming"
        database.execute("INSERT INTO orders VALUES (10, 'ada', 1.50, 'x')")
        event = next(events)
    assert event.name == "insert"
    assert event.content["id"] == event.id
    assert event.content["row"] == {"id": 10, "customer": "ada", "total": 1.50, "secret": "x"}


def test_a_filter_and_columns_narrow_what_comes(service: LiveService, database: Database) -> None:
    """And rows of other tables do not come."""
    parameters = [
        ("table", "public.orders"),
        ("operations", "insert,update"),
        ("where", "customer=eq.ada"),
        ("columns", "id,total"),
    ]
    with service.stream(parameters) as events:
        next(events)
        database.execute("INSERT INTO customers VALUES (20, 'ada')")
        database.execute("INSERT INTO orders VALUES (21, 'bob', 1, 'x')")
        database.execute("INSERT INTO orders VALUES (22, 'ada', 2, 'x')")
        database.execute("DELETE FROM orders WHERE id = 22")
        database.execute("INSERT INTO orders VALUES (23, 'ada', 3, 'x')")
        rows = [event.content["row"] for event in islice(events, 2)]
    assert rows == [{"id": 22, "total": 2}, {"id": 23, "total": 3}]


def test_several_subscriptions_share_a_stream_in_commit_order(
    service: LiveService, database: Database
) -> None:
    """A change that several keep comes once, with the columns of the first."""
    parameters = [
        ("table", "public.customers"),
        ("columns", "name"),
        ("table", "public.*"),
        ("operations", "insert"),
    ]
    with service.stream(parameters) as events:
        next(events)
        for number in range(101, 151):
            database.execute(
                "WITH one AS (INSERT INTO orders VALUES (%s))"
                " INSERT INTO customers VALUES (%s, 'ada')",
                number,
                number,
            )
        got = list(islice(events, 100))
    assert [event.content["table"] for event in got].count("customers") == 50
    ids = [event.content["end_lsn"] + f"{event.content['ordinal']:05}" for event in got]
    assert len(set(ids)) == 100
    rows = [event.content["row"] for event in got if event.content["table"] == "customers"]
    assert rows == [{"name": "ada"}] * 50


def test_a_client_that_was_away_gets_what_it_missed(
    service: LiveService, database: Database
) -> None:
    """All of it, once, in order, and then what comes."""
    with service.stream([("table", "public.orders")]) as events:
        next(events)
        database.execute("INSERT INTO orders VALUES (1000)")
        last = next(events).id
    database.execute("INSERT INTO orders SELECT n FROM generate_series(1001, 2000) n")
    headers = {"Last-Event-ID": last}
    with service.stream([("table", "public.orders")], headers=headers) as events:
        assert next(events).name == "streaming"
        got = [event.content["row"]["id"] for event in islice(events, 1000)]
        database.execute("INSERT INTO orders VALUES (2001)")
        got.append(next(events).content["row"]["id"])
    assert got == list(range(1001, 2002))


def test_what_is_not_kept_any_more_is_told_by_a_reset(
    service: LiveService, database: Database
) -> None:
    """And the stream goes on from now."""
    with service.stream([("table", "public.orders"), ("since", "0/1:1")]) as events:
        assert [next(events).name, next(events).name] == ["streaming", "reset"]
        database.execute("INSERT INTO orders VALUES (30)")
        assert next(events).name == "insert"


def test_lines_can_be_read_as_a_page(service: LiveService, database: Database) -> None:
    """``until=now`` ends with what there is; a page that is not kept any more is 410."""
    url = f"{service.url}/changes.jsonl"
    with service.stream([("table", "public.orders")]) as events:
        begin = next(events).id
        database.execute("INSERT INTO orders SELECT n FROM generate_series(41, 43) n")
        list(islice(events, 3))
    parameters = {"table": "public.orders", "until": "now", "since": begin}
    lines = httpx.get(url, params=parameters).text.splitlines()
    assert len([line for line in lines if '"operation":"insert"' in line]) == 3
    gone = httpx.get(url, params={**parameters, "since": "0/1"})
    assert gone.status_code == 410


def test_a_filter_asks_the_server_for_few_values(service: LiveService, database: Database) -> None:
    """The stream asks it by the same connection."""
    database.execute("CREATE TABLE hosts (id int PRIMARY KEY, address inet)")
    addresses = ",".join(f"10.0.0.{number}" for number in range(101))
    parameters = {"table": "public.hosts", "where": f"address=in.({addresses})"}
    refused = httpx.get(f"{service.url}/changes", params=parameters)
    assert refused.status_code == 400
    assert "100 values" in refused.json()["error"]
