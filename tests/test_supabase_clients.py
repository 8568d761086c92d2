"""The stock client of Supabase in Node, by both versions of the protocol."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from tests.postgres import Database, wait_until
from tests.proxy import Proxy
from tests.supabase_service import SupabaseService, module_service, supabase_service, token
from tests.supabase_tests import (
    AccessTests,
    ChangesTests,
    ReturnTests,
    RoomsTests,
    client_of,
    every_change_comes_once,
    problems,
    rejoins_after_a_restart,
)
from tests.told import Client, NodeClient, Told

VERSIONS = ("1.0.0", "2.0.0")


@pytest.fixture(scope="module")
def service(
    server_dsn: str, database_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SupabaseService]:
    with module_service(tmp_path_factory.mktemp("service"), server_dsn, database_template) as it:
        yield it


@pytest.fixture(scope="module")
def programs(
    node_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Told]]:
    """A client of each version."""
    with ExitStack() as programs:
        log = tmp_path_factory.mktemp("node")
        yield {
            version: programs.enter_context(NodeClient(node_folder, log / version, version))
            for version in VERSIONS
        }


@pytest.fixture(params=VERSIONS)
def told(request: pytest.FixtureRequest, programs: dict[str, Told]) -> Iterator[Told]:
    told = programs[request.param]
    yield told
    told.close_all()


@pytest.fixture
def both(programs: dict[str, Told]) -> Iterator[list[Told]]:
    yield list(programs.values())
    for told in programs.values():
        told.close_all()


class TestChanges(ChangesTests):
    pass


class TestRooms(RoomsTests):
    pass


class TestAccess(AccessTests):
    pass


class TestReturn(ReturnTests):
    pass


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with Proxy("host=127.0.0.1 port=1", is_postgres=False) as proxy:
        yield proxy


def test_a_restart_of_walstream(
    both: list[Told], database: Database, proxy: Proxy, tmp_path: Path
) -> None:
    rejoins_after_a_restart(both, database, proxy, tmp_path)


def test_connections_that_are_cut_lose_and_double_nothing(
    both: list[Told], database: Database, proxy: Proxy, tmp_path: Path
) -> None:
    with supabase_service(tmp_path, database, proxy) as service:
        every_change_comes_once(both, service)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_connections_that_are_cut_hundreds_of_times(
    both: list[Told], database: Database, proxy: Proxy, tmp_path: Path
) -> None:
    with supabase_service(tmp_path, database, proxy) as service:
        every_change_comes_once(both, service, count=150_000, rounds=400)


HARD: Final = (
    "a,b",
    "(c)",
    'say "hi"',
    "back\\slash",
    " spaced ",
    "it's",
    "a.b=c",
    "é😀",
    "%",
)
"""Values that mean something in filters."""


class TestNode:
    """What only this client has."""

    def test_filters_that_the_client_has_built(self, told: Told, service: SupabaseService) -> None:
        table = service.table("id int PRIMARY KEY, word text")
        ids = list(range(len(HARD)))
        asked: dict[str, list[Any]] = {
            f"eq {id_}": [["eq", "word", word]] for id_, word in zip(ids, HARD, strict=True)
        }
        asked["in"] = [["in", "word", HARD], ["gt", "id", 0]]
        asked["not in"] = [["not", "word", "in", HARD[1:]]]
        channel = client_of(told, service).channel(service.topic())
        for label, calls in asked.items():
            channel.on_changes(label, table=table, filter={"$calls": calls})
        channel.join()
        service.execute(
            f"INSERT INTO {table} SELECT i - 1, w FROM unnest(%s::text[]) WITH ORDINALITY a (w, i)",
            list(HARD),
        )
        channel.wait_for(lambda it: it.ids("in")[-1:] == ids[-1:])
        assert [channel.ids(f"eq {id_}") for id_ in ids] == [[id_] for id_ in ids]
        assert channel.ids("in") == ids[1:]
        assert channel.ids("not in") == ids[:1]

    def test_who_has_no_key_does_not_come_in(self, told: Told, service: SupabaseService) -> None:
        channel = told.client(service.url, "no key").channel(service.topic()).subscribe()
        channel.wait_for(lambda it: it.errors)
        assert channel.statuses == ["CHANNEL_ERROR"]

    def test_what_is_sent_before_the_join_goes_by_http(
        self, told: Told, service: SupabaseService
    ) -> None:
        topic = service.topic()
        hears = client_of(told, service).channel(topic).on("broadcast", event="*").join()
        speaker = client_of(told, service).channel(topic)
        said = {"type": "broadcast", "event": "early", "payload": {"n": 1}}
        assert speaker.tell("send", message=said) == "ok"
        hears.wait_for(lambda it: it.payloads("broadcast"))
        (heard,) = hears.payloads("broadcast")
        assert (heard["event"], heard["payload"]) == ("early", {"n": 1})

    def test_a_binding_is_live_when_the_client_asked_to_wait_for_it(
        self, told: Told, service: SupabaseService
    ) -> None:
        table = service.table("id int PRIMARY KEY")
        channel = client_of(told, service).channel(
            service.topic(),
            postgres_changes_options={"wait": True},
            broadcast={"replication_ready": True},
        )
        channel.on("system", "system").on_changes(table=table).join()
        service.execute(f"INSERT INTO {table} VALUES (1)")
        channel.wait_for(lambda it: it.ids() == [1])
        assert [
            (one["extension"], one["message"]) for one in channel.payloads("system", "system")
        ] == [
            ("system", "Replication connection established"),
            ("postgres_changes", "Subscribed to PostgreSQL"),
        ]


def test_heartbeats_are_answered_and_bring_another_token_along(
    both: list[Told], service: SupabaseService
) -> None:
    table = service.table("id int PRIMARY KEY")
    clients = [
        client_of(told, service, token=token(seconds=2.99), heartbeatMs=100) for told in both
    ]
    channels = [
        client.channel(service.topic()).on("system", "system").on_changes(table=table).join()
        for client in clients
    ]
    for client in clients:
        client.tell("onHeartbeat")
        client.tell("token", token=token())
    for told, client in zip(both, clients, strict=True):
        wait_until(partial(_are_answered, told, client))
    service.execute(f"INSERT INTO {table} VALUES (1)")
    for channel in channels:
        channel.wait_for(lambda it: it.ids() == [1])
        assert channel.statuses == ["SUBSCRIBED"]
        assert problems(channel) == []


def _are_answered(told: Told, client: Client) -> bool:
    return [one["payload"] for one in told.events("heartbeat", client.name)].count("ok") > 30


def test_bytes_come_to_those_who_can_have_them(both: list[Told], service: SupabaseService) -> None:
    """By version 2.0.0; others get what is JSON."""
    topic = service.topic()
    old, new = (client_of(told, service).channel(topic) for told in both)
    speaker = client_of(both[1], service).channel(topic, broadcast={"ack": True}).join()
    for channel in (old, new):
        channel.on("broadcast", event="*").join()
    raw = {"$bytes": "AAEC/w=="}
    for payload in (raw, {"n": 1}):
        said = {"type": "broadcast", "event": "x", "payload": payload}
        assert speaker.tell("send", message=said) == "ok"
        speaker.tell("httpSend", event="by http", payload=payload)
    new.wait_for(lambda it: len(it.payloads("broadcast")) == 4)
    old.wait_for(lambda it: len(it.payloads("broadcast")) == 2)
    assert [one["payload"] for one in new.payloads("broadcast")] == [raw, raw, {"n": 1}, {"n": 1}]
    assert [one["payload"] for one in old.payloads("broadcast")] == [{"n": 1}, {"n": 1}]


def test_any_json_can_be_said(both: list[Told], service: SupabaseService) -> None:
    topic = service.topic()
    channels = [
        client_of(told, service).channel(topic, broadcast={"self": True}).on("broadcast", event="*")
        for told in both
    ]
    for channel in channels:
        channel.join()
    payloads = [
        {"a": {"b": None}},
        [1, "two"],
        "text é😀",
        1.5,
        True,
        {"ids": [1]},
        {},
        "x" * 10**6,
    ]
    for channel in channels:
        for payload in payloads:
            said = {"type": "broadcast", "event": "x", "payload": payload}
            channel.tell("send", message=said)
        for one in channels:
            one.wait_for_payloads("broadcast", len(payloads))
    for channel in channels:
        channel.wait_for_payloads("broadcast", 2 * len(payloads))
        heard = [one["payload"] for one in channel.payloads("broadcast")]
        for payload in payloads:
            assert heard.count(payload) == 2


def test_what_is_too_large_is_not_acknowledged(both: list[Told], service: SupabaseService) -> None:
    for told in both:
        channel = client_of(told, service).channel(service.topic(), broadcast={"ack": True}).join()
        said = {"type": "broadcast", "event": "x", "payload": {"a": "x" * 3_000_001}}
        assert channel.tell("send", message=said) == "error"


def test_limits_are_told(
    both: list[Told], database: Database, proxy: Proxy, tmp_path: Path
) -> None:
    limits = "max_channels = 2\nmax_bindings = 2\njoins_per_second = 4\nmessages_per_second = 2"
    with supabase_service(tmp_path, database, proxy, limits=limits) as service:
        for told in both:
            _verify_channels(told, service)
            _verify_joins(told, service)
            _verify_bindings(told, service)
            _verify_messages(told, service)
            _verify_presence(told, service)
            told.close_all()


def _verify_channels(told: Told, service: SupabaseService) -> None:
    client = client_of(told, service)
    for _ in range(2):
        client.channel(service.topic()).join()
    third = client.channel(service.topic()).subscribe()
    third.wait_for(lambda it: it.errors)
    assert third.errors[0] == "ChannelRateLimitReached: Too many channels"


def _verify_joins(told: Told, service: SupabaseService) -> None:
    client = client_of(told, service)
    channels = []
    for _ in range(5):
        channels.append(client.channel(service.topic()).subscribe())
        channels[-1].wait_for(lambda it: it.statuses)
        channels[-1].remove()
    told_why = [one.errors for one in channels if one.errors]
    assert told_why == [["ClientJoinRateLimitReached: Too many joins per second"]]


def _verify_bindings(told: Told, service: SupabaseService) -> None:
    channel = client_of(told, service).channel(service.topic()).on("system", "system")
    for number in range(3):
        channel.on_changes(str(number), table=service.table("id int PRIMARY KEY"))
    channel.join().wait_for(problems)
    assert problems(channel)[0].startswith("Too many postgres_changes: 3")


def _verify_messages(told: Told, service: SupabaseService) -> None:
    channel = client_of(told, service).channel(service.topic()).on("system", "system").join()
    for number in range(130):
        said = {"type": "broadcast", "event": "x", "payload": {"n": number}}
        channel.tell("send", message=said)
    channel.wait_for(problems)
    assert problems(channel)[0] == "Too many messages per second"


def _verify_presence(told: Told, service: SupabaseService) -> None:
    channel = client_of(told, service).channel(service.topic()).on("system", "system").join()
    for number in range(6):
        channel.tell("track", payload={"n": number}, opts={"timeout": 500})
    channel.wait_for(problems)
    assert problems(channel)[0] == "Client presence rate limit exceeded"


def test_a_project_may_have_private_channels_only(
    both: list[Told], database: Database, proxy: Proxy, tmp_path: Path
) -> None:
    with supabase_service(tmp_path, database, proxy, limits="public_channels = false") as service:
        for told in both:
            channel = client_of(told, service).channel("room").subscribe()
            channel.wait_for(lambda it: it.errors)
            assert channel.errors[0] == ("PrivateOnly: This project only allows private channels")
