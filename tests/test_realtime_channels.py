"""Channels over a real socket: what is true when a join is answered, and what ends it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from websockets.exceptions import ConnectionClosed

from tests.command_line import CommandLine, slot_name
from tests.live_service import LiveService, configure, live_service
from tests.phoenix import Phoenix, phoenix
from tests.tokens import signed
from walstream.testing.databases import Database, create_database, drop_database

SECRET = "of-the-tests-alone-and-long-enough"  # noqa: S105 - of no value

SCHEMA = """
CREATE TABLE notes (id int PRIMARY KEY, owner text, body text);
ALTER TABLE notes REPLICA IDENTITY FULL;
"""

CONFIGURATION = f"""
[live]
max_queue_bytes = "64kB"
[realtime]
enabled = true
refusal_seconds = 0
messages_per_second = 20
[[realtime.private]]
topic = "user:{{claims.sub}}"
read = ["owner"]
write = ["owner"]
[[realtime.private]]
topic = "news"
read = ["owner"]
[access]
secret = "{SECRET}"
leeway_seconds = 0
[access.roles.everybody]
tables = [{{ table = "public.notes" }}]
[access.roles.nobody]
[access.roles.owner]
tables = [{{ table = "public.notes", where = "owner=eq.{{claims.sub}}" }}]
"""

NOTES = {"event": "*", "schema": "public", "table": "notes"}


def token(role: str = "everybody", *, seconds: float = 600, **claims: Any) -> str:
    return signed(SECRET, role, seconds=seconds, **claims)


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
    folder = CommandLine(tmp_path_factory.mktemp("channels"))
    with live_service(folder, database.dsn, slot_name(), more=CONFIGURATION) as service:
        yield service


@pytest.fixture
def client(service: LiveService) -> Iterator[Phoenix]:
    with phoenix(service.url, token()) as client:
        yield client


def ids(changes: list[Any]) -> list[int]:
    return [(change.get("record") or change["old_record"])["id"] for change in changes]


def test_what_is_committed_after_the_reply_comes(client: Phoenix, database: Database) -> None:
    """At once, without a pause for the subscription to become true."""
    reply = client.join("now", [NOTES])
    assert reply.payload["status"] == "ok"
    database.execute("INSERT INTO notes VALUES (100, 'ada', 'x')")
    [change] = client.changes(1)
    assert change["record"] == {"id": 100, "owner": "ada", "body": "x"}


def test_reply_then_state_then_system_message(client: Phoenix) -> None:
    """In this order, each with the ref of the join where the original has it."""
    reply = client.join("order", [NOTES], presence={"enabled": True, "key": ""})
    state, system = client.hear(), client.hear()
    assert reply.payload["response"]["postgres_changes"][0].items() >= NOTES.items()
    assert (state.event, state.payload) == ("presence_state", {})
    assert system.event == "system"
    assert system.payload == {
        "channel": "order",
        "extension": "postgres_changes",
        "message": "Subscribed to PostgreSQL",
        "status": "ok",
    }


def test_since_brings_what_was_missed_and_then_what_comes(
    client: Phoenix, service: LiveService, database: Database
) -> None:
    """Each once: a binding carries the position that a record had."""
    client.join("first", [{**NOTES, "since": None}])
    database.execute("INSERT INTO notes SELECT i, 'ada', 'x' FROM generate_series(200, 209) i")
    position = client.changes(3)[-1]["record"]["$position"]
    with phoenix(service.url, token()) as later:
        later.join("second", [{**NOTES, "since": position}])
        database.execute("INSERT INTO notes VALUES (210, 'ada', 'x')")
        assert ids(later.changes(8)) == list(range(203, 211))


def test_a_since_that_cannot_be_read_is_told_and_the_channel_stays(client: Phoenix) -> None:
    reply = client.join("bad-since", [{**NOTES, "since": "yesterday"}])
    assert reply.payload["status"] == "ok"
    system = client.wait_for(lambda heard: heard.event == "system")
    assert system.payload["status"] == "error"
    assert "since cannot be read: found 'yesterday'" in system.payload["message"]
    assert '"beginning"' in system.payload["message"]


def test_the_wal_of_another_server_is_told_as_a_reset(client: Phoenix) -> None:
    client.join("foreign", [{**NOTES, "since": "FFFF/0:1"}])
    system = client.wait_for(
        lambda heard: heard.event == "system" and heard.payload["status"] == "error"
    )
    assert "Changes may be missing" in system.payload["message"]


def test_another_token_changes_what_is_seen_from_then_on(
    service: LiveService, database: Database
) -> None:
    """Without a gap, and nothing of what the new reader may not see."""
    with phoenix(service.url, token()) as client:
        client.join("rights", [NOTES], token=token("owner", sub="ada"))
        client.wait_for(lambda heard: heard.event == "system")
        database.execute("INSERT INTO notes VALUES (300, 'ada', 'x'), (301, 'bob', 'x')")
        assert ids(client.changes(1)) == [300]
        new = {"access_token": token("owner", sub="bob")}
        client.send("realtime:rights", "access_token", new, join_ref="1")
        client.wait_for(lambda heard: heard.event == "system")
        database.execute("INSERT INTO notes VALUES (302, 'ada', 'x'), (303, 'bob', 'x')")
        assert ids(client.changes(1)) == [303]
        assert client.is_quiet()


def test_nothing_is_lost_while_tokens_are_renewed(service: LiveService, database: Database) -> None:
    with (
        phoenix(service.url, token()) as client,
        psycopg.connect(database.dsn, autocommit=True) as writer,
    ):
        client.join("renewing", [NOTES], token=token("owner", sub="eve", turn=0))
        for turn in range(15):
            roles = {"access_token": token("owner" if turn % 2 else "everybody", sub="eve", n=turn)}
            client.send("realtime:renewing", "access_token", roles, join_ref="1")
            writer.execute("INSERT INTO notes VALUES (%s, 'eve', 'x')", [400 + turn])
        assert ids(client.changes(15)) == list(range(400, 415))


def test_what_the_first_token_may_not_read_comes_by_the_next_one(
    service: LiveService, database: Database
) -> None:
    """A client joins with its API key, before it knows the user's token."""
    with phoenix(service.url, token("nobody")) as client:
        client.join("first-key", [{**NOTES, "filter": "owner=eq.key"}])
        system = client.wait_for(lambda heard: heard.event == "system")
        assert system.payload["status"] == "error"
        client.send("realtime:first-key", "access_token", {"access_token": token()}, join_ref="1")
        system = client.wait_for(lambda heard: heard.event == "system")
        assert system.payload["message"] == "Subscribed to PostgreSQL"
        database.execute("INSERT INTO notes VALUES (350, 'key', 'x')")
        assert ids(client.changes(1)) == [350]
        nobody = {"access_token": token("nobody")}
        client.send("realtime:first-key", "access_token", nobody, join_ref="1")
        system = client.wait_for(lambda heard: heard.event == "system")
        assert "Please check Realtime is enabled" in system.payload["message"]
        database.execute("INSERT INTO notes VALUES (351, 'key', 'x')")
        assert client.is_quiet()


def test_a_token_that_is_refused_closes_the_channel(client: Phoenix) -> None:
    client.join("closing", [NOTES])
    client.wait_for(lambda heard: heard.event == "system")
    bad = {"access_token": token() + "x"}
    client.send("realtime:closing", "access_token", bad, join_ref="1")
    system, close = client.hear(), client.hear()
    assert (system.event, system.payload["status"]) == ("system", "error")
    assert (close.event, close.ref) == ("phx_close", "1")


def test_the_end_of_a_token_ends_the_channel(service: LiveService, database: Database) -> None:
    """What is committed after that does not come."""
    with phoenix(service.url, token()) as client:
        client.join("expiring", [NOTES], token=token(seconds=1.5))
        client.wait_for(lambda heard: heard.event == "system")
        system = client.wait_for(lambda heard: heard.event == "system")
        assert system.payload["message"].startswith("Token has expired ")
        assert client.hear().event == "phx_close"
        database.execute("INSERT INTO notes VALUES (500, 'ada', 'x')")
        assert client.is_quiet()
    told = httpx.get(f"{service.url}/metrics").text
    assert re.search(r'\nwalstream_realtime_refusals_total{reason="expired",.*} [1-9]', told)


def test_private_channels_are_for_whom_the_configuration_names(service: LiveService) -> None:
    ada = token("owner", sub="ada")
    with phoenix(service.url, token()) as client:
        refused = client.join("user:ada", private=True)
        assert refused.payload == {
            "status": "error",
            "response": {
                "reason": "Unauthorized: You do not have permissions to read from this Channel"
                " topic: user:ada"
            },
        }
        assert client.join("user:ada", token=ada, private=True).payload["status"] == "ok"
        assert client.join("user:bob", token=ada, private=True).payload["status"] == "error"


def test_who_may_only_read_a_private_channel_says_nothing_there(service: LiveService) -> None:
    with phoenix(service.url, token("owner", sub="ada")) as client:
        reply = client.join("news", private=True, broadcast={"ack": True, "self": True})
        said = {"type": "broadcast", "event": "x", "payload": {}}
        client.send("realtime:news", "broadcast", said, join_ref=reply.ref)
        answer = client.wait_for(lambda heard: heard.event == "phx_reply")
        assert answer.payload["status"] == "error"
        assert client.is_quiet()


def test_a_public_and_a_private_channel_of_one_name_do_not_hear_each_other(
    service: LiveService,
) -> None:
    ada = token("owner", sub="ada")
    with phoenix(service.url, ada) as public, phoenix(service.url, ada) as private:
        public.join("user:ada")
        private.join("user:ada", private=True, broadcast={"self": True})
        said = {"type": "broadcast", "event": "x", "payload": {}}
        private.send("realtime:user:ada", "broadcast", said, join_ref="1")
        private.wait_for(lambda heard: heard.event == "broadcast")
        public.wait_for(lambda heard: heard.event == "presence_state")
        assert public.is_quiet()


def test_a_client_that_says_too_much_is_told_and_cut_off(client: Phoenix) -> None:
    client.join("loud")
    said = {"type": "broadcast", "event": "x", "payload": {}}
    with suppress(ConnectionClosed):
        for _ in range(1000):
            client.send("realtime:loud", "broadcast", said, join_ref="1")
    with pytest.raises(ConnectionClosed) as closed:
        client.wait_for(lambda _: False)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1008


def test_a_client_that_reads_nothing_is_cut_off_and_others_are_not(
    service: LiveService, database: Database
) -> None:
    few = {**NOTES, "filter": "owner=eq.few"}
    with (
        phoenix(service.url, token(), reads_ahead=False) as slow,
        phoenix(service.url, token()) as quick,
    ):
        slow.join("slow", [NOTES])
        quick.join("quick", [few])
        database.execute(
            "INSERT INTO notes SELECT i, 'many', repeat('x', 1000)"
            " FROM generate_series(10000, 29999) i"
        )
        database.execute("INSERT INTO notes VALUES (600, 'few', 'x')")
        assert ids(quick.changes(1, seconds=30)) == [600]
        with pytest.raises(ConnectionClosed) as closed:
            slow.changes(20_000)
    assert closed.value.rcvd is None or closed.value.rcvd.code == 1013


def test_a_join_is_answered_once_changes_are_sure_to_come(
    database: Database, tmp_path: Path
) -> None:
    """A standby has none: it answers when it has taken over, or when the client's time is up."""
    slot = slot_name()
    active, standby = CommandLine(tmp_path / "active"), CommandLine(tmp_path / "standby")
    for one in (active, standby):
        one.folder.mkdir()
        configure(one, database.dsn, slot, more=CONFIGURATION)
    with active.running("run") as process:
        active.wait_for("streaming")
        with (
            standby.running("run"),
            phoenix(f"http://{standby.wait_for('http_listening')['address']}", token()) as client,
        ):
            patient = {"wait": True, "timeout": 300}
            reply = client.join("early", [NOTES], postgres_changes_options=patient)
            assert reply.payload["response"]["reason"] == (
                "PostgresChangesSubscribeTimeout: Timed out after 300ms waiting for the"
                " postgres_changes subscription"
            )
            join = {"config": {"postgres_changes": [NOTES]}}
            ref = client.send("realtime:later", "phx_join", join)
            process.terminate()
            reply = client.wait_for(lambda heard: heard.ref == ref)
            assert reply.payload["status"] == "ok"
            database.execute("INSERT INTO notes VALUES (700, 'ada', 'x')")
            assert ids(client.changes(1)) == [700]


def test_a_broadcast_by_http_may_be_as_large_as_one_by_a_socket(
    client: Phoenix, service: LiveService
) -> None:
    client.join("large")
    payload = {"text": "x" * 2_500_000}
    address = f"{service.url}/realtime/v1/api/broadcast/large/events/x"
    response = httpx.post(address, json=payload, headers={"apikey": token()})
    assert response.status_code == 202
    heard = client.wait_for(lambda heard: heard.event == "broadcast")
    assert heard.payload["payload"] == payload


@pytest.mark.parametrize(("key", "value"), [("since", 5), ("leaving", "yes")])
def test_what_walstream_adds_to_a_binding_is_verified(
    client: Phoenix, key: str, value: object
) -> None:
    client.join(f"wrong-{key}", [{**NOTES, key: value}])
    system = client.wait_for(lambda heard: heard.event == "system")
    assert system.payload["message"].startswith(f"Error parsing `{key}` params: expected ")
