"""What every stock client of Supabase shows, in the same words for each of them.

A module makes a class of its own of them, and has the fixtures ``told`` and ``service``.
"""

from __future__ import annotations

import json
import random
import re
import time
import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import jwt
import pytest

from tests.command_line import slot_name
from tests.postgres import Database
from tests.proxy import Proxy
from tests.supabase_service import SECRET, SupabaseService, supabase_service, token
from tests.told import Channel, Client, Failed, Told

ROWS: Final = """
    (1, 1, 'apple', true), (2, 2, 'Apple pie', false), (3, 3, 'banana', null),
    (4, null, null, true), (5, 10, 'a,b(c)', false), (6, -1, 'say "hi"', null)
"""

CONDITIONS: Final = (
    ("n=eq.2", "n = 2"),
    ("n=neq.2", "n <> 2"),
    ("n=lt.3", "n < 3"),
    ("n=lte.3", "n <= 3"),
    ("n=gt.2", "n > 2"),
    ("n=gte.2", "n >= 2"),
    ("n=in.(1,10)", "n IN (1, 10)"),
    ('word=in.(apple,"a,b(c)")', "word IN ('apple', 'a,b(c)')"),
    ("word=like.A%", "word LIKE 'A%'"),
    ("word=ilike.a%", "word ILIKE 'a%'"),
    ("n=is.null", "n IS NULL"),
    ("flag=is.true", "flag IS TRUE"),
    ("flag=is.false", "flag IS FALSE"),
    ("flag=is.unknown", "flag IS UNKNOWN"),
    ("word=match.^[a-b]", "word ~ '^[a-b]'"),
    ("word=imatch.^A.*e$", "word ~* '^A.*e$'"),
    ("n=isdistinct.2", "n IS DISTINCT FROM 2"),
    ('word=eq."a,b(c)"', "word = 'a,b(c)'"),
)
"""Filters with all thirteen operators, and what they say in SQL."""

SEVERAL: Final = (
    ("n=gt.0,n=lt.10", "n > 0 AND n < 10"),
    ("flag=is.true,word=not.is.null", "flag AND word IS NOT NULL"),
    ("n=gt.0,word=not.in.(apple,banana),flag=is.false", "n > 0 AND NOT flag"),
)

TIMESTAMP: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


def client_of(told: Told, service: SupabaseService, **options: Any) -> Client:
    return told.client(service.url, service.key, **options)


class ChangesTests:
    """``postgres_changes``."""

    def test_each_event_comes_to_those_who_asked_for_it(
        self, told: Told, service: SupabaseService
    ) -> None:
        table = service.table("id int PRIMARY KEY, note text", identity="FULL")
        channel = client_of(told, service).channel(service.topic())
        for event in ("INSERT", "UPDATE", "DELETE", "*"):
            channel.on_changes(event, event=event, table=table)
        channel.join()
        write_and_change(service, table)
        channel.wait_for(lambda it: len(it.changes("*")) == 3)
        seen = [change[:4] for change in channel.changes("*")]
        assert seen == [
            ("INSERT", {"id": 1, "note": "a"}, {}, table),
            ("UPDATE", {"id": 1, "note": "b"}, {"id": 1, "note": "a"}, table),
            ("DELETE", {}, {"id": 1, "note": "b"}, table),
        ]
        for number, event in enumerate(("INSERT", "UPDATE", "DELETE")):
            assert channel.changes(event) == [channel.changes("*")[number]]
        for change in channel.changes("*"):
            assert change.schema == "public"
            assert change.errors is None
            assert TIMESTAMP.fullmatch(change.commit_timestamp)

    def test_old_records_are_the_key_under_the_default_identity(
        self, told: Told, service: SupabaseService
    ) -> None:
        table = service.table("id int PRIMARY KEY, note text")
        channel = client_of(told, service).channel(service.topic()).on_changes(table=table).join()
        write_and_change(service, table)
        channel.wait_for(lambda it: len(it.changes()) == 3)
        assert [change.old for change in channel.changes()] == [{}, {"id": 1}, {"id": 1}]

    def test_each_operator_and_its_negation(self, told: Told, service: SupabaseService) -> None:
        table = service.table("id int PRIMARY KEY, n int, word text, flag bool")
        asked = [*CONDITIONS, *map(negated, CONDITIONS), *SEVERAL]
        client = client_of(told, service)
        channels = [client.channel(service.topic()) for _ in range(4)]
        for number, (filter_, _) in enumerate(asked):
            channels[number % 4].on_changes(filter_, table=table, filter=filter_)
        for channel in channels:
            channel.on_changes("all", table=table).join()  # called last
        service.execute(f"INSERT INTO {table} VALUES {ROWS}")
        for channel in channels:
            channel.wait_for(lambda it: len(it.ids("all")) == 6)
        got = {
            filter_: channels[number % 4].ids(filter_) for number, (filter_, _) in enumerate(asked)
        }
        query = f"SELECT id FROM {table} WHERE (%s) ORDER BY id"
        assert got == {
            filter_: [id_ for (id_,) in service.execute(query % condition)]
            for filter_, condition in asked
        }

    def test_a_filter_is_asked_of_the_new_row_and_of_what_is_deleted(
        self, told: Told, service: SupabaseService
    ) -> None:
        table = service.table("id int PRIMARY KEY, n int", identity="FULL")
        channel = client_of(told, service).channel(service.topic())
        channel.on_changes("some", table=table, filter="n=gt.5").on_changes("all", table=table)
        channel.join()
        for statement in (
            "INSERT INTO {} VALUES (1, 1), (2, 9)",
            "UPDATE {} SET n = 10 WHERE id = 1",
            "UPDATE {} SET n = 0 WHERE id = 2",
            "DELETE FROM {}",
        ):
            service.execute(statement.format(table))
        channel.wait_for(lambda it: len(it.changes("all")) == 6)
        seen = [(change.type, change.id) for change in channel.changes("some")]
        assert seen == [("INSERT", 2), ("UPDATE", 1), ("DELETE", 1)]

    def test_an_update_that_leaves_the_filter_can_be_asked_for(
        self, told: Told, service: SupabaseService
    ) -> None:
        table = service.table("id int PRIMARY KEY, n int", identity="FULL")
        channel = client_of(told, service).channel(service.topic())
        channel.on_changes(table=table, filter="n=gt.5", leaving=True).join()
        service.execute(f"INSERT INTO {table} VALUES (1, 9)")
        service.execute(f"UPDATE {table} SET n = 0")
        channel.wait_for(lambda it: len(it.changes()) == 2)
        assert channel.changes()[1].old["n"] == 9

    def test_select_gives_the_columns_and_the_key(
        self, told: Told, service: SupabaseService
    ) -> None:
        table = service.table("id int PRIMARY KEY, a text, b text, c text", identity="FULL")
        channel = client_of(told, service).channel(service.topic())
        channel.on_changes("b", table=table, select=["b"])
        channel.on_changes("all", table=table).join()
        service.execute(f"INSERT INTO {table} VALUES (1, 'x', 'y', 'z')")
        service.execute(f"UPDATE {table} SET b = 'w'")
        channel.wait_for(lambda it: len(it.changes("b")) == len(it.changes("all")) == 2)
        assert [(change.new, change.old) for change in channel.changes("b")] == [
            ({"id": 1, "b": "y"}, {}),
            ({"id": 1, "b": "w"}, {"id": 1, "b": "y"}),
        ]
        assert channel.changes("all")[0].new == {"id": 1, "a": "x", "b": "y", "c": "z"}

    def test_wildcards_for_tables_and_schemas(self, told: Told, service: SupabaseService) -> None:
        schema = f"apart{uuid.uuid4().hex[:8]}"
        service.execute(f"CREATE SCHEMA {schema}")
        first = service.table("id int PRIMARY KEY", schema=schema)
        second = service.table("id int PRIMARY KEY", schema=schema)
        other = service.table("id int PRIMARY KEY")
        channel = client_of(told, service).channel(service.topic())
        channel.on_changes("whole schema", schema=schema, table="*")
        channel.on_changes("no table", schema=schema)
        channel.on_changes("everything", schema="*")
        channel.on_changes("public", schema="public").join()
        service.execute(
            f"INSERT INTO {schema}.{first} VALUES (1); INSERT INTO {schema}.{second} VALUES (2);"
            f"INSERT INTO {other} VALUES (3)"
        )
        channel.wait_for(lambda it: it.ids("public") == [3])
        assert channel.ids("whole schema") == channel.ids("no table") == [1, 2]
        assert channel.ids("everything") == [1, 2, 3]
        assert [one.table for one in channel.changes("everything")] == [first, second, other]

    def test_values_of_many_types(self, told: Told, service: SupabaseService) -> None:
        table = service.table(
            "id int8 PRIMARY KEY, price numeric(9,2), flag bool, at timestamptz, day date,"
            " plain timestamp, tags text[], numbers int[], doc jsonb, uid uuid, raw bytea,"
            ' "Ünïcode" text, nothing text, real float8'
        )
        channel = client_of(told, service).channel(service.topic()).on_changes(table=table).join()
        uid = uuid.uuid4()
        service.execute(
            f"INSERT INTO {table} VALUES (4503599627370497, 1.10, true, '2020-01-01 10:00:00+02',"
            " '2020-02-29', '2020-01-01 10:00:00', '{a,\"b c\",null}', '{1,2}',"
            " '{\"a\": [1, null, \"x\"]}', %s, '\\x0102', 'é €😀 \"quoted\" \\', null, 0.1)",
            uid,
        )
        channel.wait_for(lambda it: it.changes())
        assert channel.changes()[0].new == {
            "id": 4503599627370497,
            "price": 1.1,
            "flag": True,
            "at": "2020-01-01T08:00:00+00:00",
            "day": "2020-02-29",
            "plain": "2020-01-01T10:00:00",
            "tags": ["a", "b c", None],
            "numbers": [1, 2],
            "doc": {"a": [1, None, "x"]},
            "uid": str(uid),
            "raw": "0102",
            "Ünïcode": 'é €😀 "quoted" \\',
            "nothing": None,
            "real": 0.1,
        }

    def test_columns_that_a_role_may_not_read_are_not_there(
        self, told: Told, service: SupabaseService
    ) -> None:
        service.execute("CREATE SCHEMA IF NOT EXISTS hidden")
        table = service.table("id int PRIMARY KEY, body text", identity="FULL", schema="hidden")
        channel = client_of(told, service).channel(service.topic())
        channel.on_changes(schema="hidden", table=table).join()
        service.execute(f"INSERT INTO hidden.{table} VALUES (1, 'secret')")
        channel.wait_for(lambda it: it.changes())
        assert channel.changes()[0].new == {"id": 1}

    def test_a_row_that_is_too_large_is_told_of(self, told: Told, service: SupabaseService) -> None:
        table = service.table("id int PRIMARY KEY, short text, long text")
        channel = client_of(told, service).channel(service.topic()).on_changes(table=table).join()
        service.execute(f"INSERT INTO {table} VALUES (1, 'a', repeat('x', 1100000))")
        channel.wait_for(lambda it: it.changes())
        (change,) = channel.changes()
        assert change.errors == ["Error 413: Payload Too Large"]
        assert change.new == {"id": 1, "short": "a"}

    def test_tables_without_a_key_give_an_error_for_a_row(
        self, told: Told, service: SupabaseService
    ) -> None:
        table = service.table("id int", identity="FULL")
        channel = client_of(told, service).channel(service.topic()).on_changes(table=table).join()
        service.execute(f"INSERT INTO {table} VALUES (1)")
        channel.wait_for(lambda it: it.changes())
        (change,) = channel.changes()
        assert change.errors == ["Error 400: Bad Request, no primary key"]
        assert change.new == {}

    def test_what_is_wrong_with_a_binding_is_told_and_the_others_live(
        self, told: Told, service: SupabaseService
    ) -> None:
        table = service.table("id int PRIMARY KEY, note text")
        for number, (asked, message) in enumerate(wrong_bindings(table)):
            channel = client_of(told, service).channel(service.topic())
            channel.on("system", "system").on_changes("right", table=table)
            channel.on_changes("wrong", **asked).subscribe()
            channel.wait_for(problems)
            assert problems(channel)[0] == message
            assert channel.statuses[0] == "SUBSCRIBED"
            if told.stays_joined_after_errors:
                service.execute(f"INSERT INTO {table} VALUES ({number})")
                channel.wait_for_payloads("postgres_changes", 1, "right")
                assert channel.ids("right")[-1] == number
            channel.remove()

    def test_who_leaves_hears_nothing_more_and_may_come_back(
        self, told: Told, service: SupabaseService
    ) -> None:
        table, topic = service.table("id int PRIMARY KEY"), service.topic()
        client = client_of(told, service)
        stays = client.channel(service.topic()).on_changes(table=table).join()
        leaves = client.channel(topic).on_changes(table=table).join()
        service.execute(f"INSERT INTO {table} VALUES (1)")
        leaves.wait_for(lambda it: it.ids() == [1])
        leaves.remove()
        service.execute(f"INSERT INTO {table} VALUES (2)")
        stays.wait_for(lambda it: it.ids() == [1, 2])
        again = client.channel(topic).on_changes(table=table).join()
        service.execute(f"INSERT INTO {table} VALUES (3)")
        again.wait_for(lambda it: it.ids() == [3])
        assert leaves.ids() == [1]

    def test_a_large_transaction_comes_whole_and_in_order(
        self, told: Told, service: SupabaseService
    ) -> None:
        table = service.table("id int PRIMARY KEY, note text")
        channel = client_of(told, service).channel(service.topic()).on_changes(table=table).join()
        service.execute(
            f"INSERT INTO {table} SELECT i, 'note ' || i FROM generate_series(1, 2000) i"
        )
        channel.wait_for(lambda it: len(it.payloads("postgres_changes")) >= 2000)
        assert channel.ids() == list(range(1, 2001))


class RoomsTests:
    """Broadcast and presence."""

    def test_what_is_said_comes_to_the_others(self, told: Told, service: SupabaseService) -> None:
        topic = service.topic()
        speaker = client_of(told, service).channel(topic).on("broadcast", event="shout").join()
        other = client_of(told, service).channel(topic)
        other.on("broadcast", "shout", event="shout").on("broadcast", "*", event="*").join()
        apart = client_of(told, service).channel(service.topic()).on("broadcast", event="*").join()
        for number in (1, 2):
            said = {"type": "broadcast", "event": "shout", "payload": {"n": number, "é": ["€"]}}
            assert speaker.tell("send", message=said) == "ok"
        said = {"type": "broadcast", "event": "whisper", "payload": {}}
        speaker.tell("send", message=said)
        other.wait_for(lambda it: len(it.payloads("broadcast", "*")) == 3)
        heard = [(one["event"], one["payload"]) for one in other.payloads("broadcast", "*")]
        assert heard[:2] == [("shout", {"n": 1, "é": ["€"]}), ("shout", {"n": 2, "é": ["€"]})]
        assert heard[2] == ("whisper", {})
        assert len(other.payloads("broadcast", "shout")) == 2
        assert speaker.payloads("broadcast") == apart.payloads("broadcast") == []

    def test_who_wants_to_hear_himself_does_and_what_arrived_is_acknowledged(
        self, told: Told, service: SupabaseService
    ) -> None:
        channel = client_of(told, service).channel(
            service.topic(), broadcast={"self": True, "ack": True}
        )
        channel.on("broadcast", event="x").join()
        said = {"type": "broadcast", "event": "x", "payload": {"n": 1}}
        assert channel.tell("send", message=said) == "ok"
        channel.wait_for(lambda it: it.payloads("broadcast"))
        assert channel.payloads("broadcast")[0]["payload"] == {"n": 1}

    def test_what_is_said_by_http(self, told: Told, service: SupabaseService) -> None:
        topic = service.topic()
        hears = client_of(told, service).channel(topic).on("broadcast", event="*").join()
        speaker = client_of(told, service).channel(topic)
        speaker.tell("httpSend", event="by http", payload={"n": 1})
        hears.wait_for(lambda it: it.payloads("broadcast"))
        (heard,) = hears.payloads("broadcast")
        assert (heard["event"], heard["payload"]) == ("by http", {"n": 1})

    def test_names_may_be_anything(self, told: Told, service: SupabaseService) -> None:
        topic = f"{service.topic()}/a b?c#d%2F:é😀\"\\'"
        event = "what/a b?c#d%2F:é😀\"\\' happened"
        hears = client_of(told, service).channel(topic).on("broadcast", event=event).join()
        speaker = client_of(told, service).channel(topic).join()
        speaker.tell("httpSend", event=event, payload={"n": 1})
        hears.wait_for_payloads("broadcast", 1)
        said = {"type": "broadcast", "event": event, "payload": {"n": 2}}
        speaker.tell("send", message=said)
        hears.wait_for_payloads("broadcast", 2)
        heard = [(one["event"], one["payload"]["n"]) for one in hears.payloads("broadcast")]
        assert heard == [(event, 1), (event, 2)]

    def test_what_is_said_by_http_in_private_is_for_those_who_may(
        self, told: Told, service: SupabaseService
    ) -> None:
        topic, ada = f"team:{service.topic()}", token("authenticated", sub="ada")
        hears = client_of(told, service, token=ada).channel(topic, private=True)
        hears.on("broadcast", event="x").join()
        with pytest.raises(Failed):
            client_of(told, service).channel(topic, private=True).tell(
                "httpSend", event="x", payload={"n": 1}
            )
        speaker = client_of(told, service, token=ada).channel(topic, private=True)
        speaker.tell("httpSend", event="x", payload={"n": 2})
        hears.wait_for_payloads("broadcast", 1)
        assert [one["payload"] for one in hears.payloads("broadcast")] == [{"n": 2}]

    def test_who_is_there_is_seen_by_all(self, told: Told, service: SupabaseService) -> None:
        topic = service.topic()
        ada = self._present(told, service, topic, "ada")
        ada.tell("track", payload={"mood": "fine"})
        ada.wait_for(lambda it: state(it) == {"ada": [{"mood": "fine"}]})
        bob = self._present(told, service, topic, "bob")
        bob.wait_for(lambda it: state(it) == {"ada": [{"mood": "fine"}]})
        bob.tell("track", payload={"mood": "new"})
        both = {"ada": [{"mood": "fine"}], "bob": [{"mood": "new"}]}
        for one in (ada, bob):
            one.wait_for(lambda it: state(it) == both)
        bob.tell("track", payload={"mood": "old"})
        changed = {"ada": [{"mood": "fine"}], "bob": [{"mood": "old"}]}
        for one in (ada, bob):
            one.wait_for(lambda it: state(it) == changed)
        bob.tell("untrack")
        for one in (ada, bob):
            one.wait_for(lambda it: state(it) == {"ada": [{"mood": "fine"}]})
        joins = [
            (one["key"], shown(one["newPresences"])) for one in ada.payloads("presence", "join")
        ]
        assert joins == [
            ("ada", [{"mood": "fine"}]),
            ("bob", [{"mood": "new"}]),
            ("bob", [{"mood": "old"}]),
        ]
        leaves = [
            (one["key"], shown(one["leftPresences"])) for one in ada.payloads("presence", "leave")
        ]
        assert leaves == [("bob", [{"mood": "new"}]), ("bob", [{"mood": "old"}])]
        assert ada.payloads("presence", "sync")

    def test_several_sockets_with_one_key(self, told: Told, service: SupabaseService) -> None:
        topic = service.topic()
        phone, laptop = (self._present(told, service, topic, "ada") for _ in range(2))
        phone.tell("track", payload={"on": "phone"})
        laptop.tell("track", payload={"on": "laptop"})
        for one in (phone, laptop):
            one.wait_for(lambda it: sorted(devices(it)) == ["laptop", "phone"])
        phone.remove()
        laptop.wait_for(lambda it: devices(it) == ["laptop"])

    def test_a_client_that_goes_is_gone(self, told: Told, service: SupabaseService) -> None:
        topic = service.topic()
        stays = self._present(told, service, topic, "stays")
        goes = client_of(told, service)
        channel = goes.channel(topic, presence={"key": "goes", "enabled": True}).join()
        channel.tell("track", payload={"n": 1})
        stays.wait_for(lambda it: state(it) == {"goes": [{"n": 1}]})
        goes.close()
        stays.wait_for(lambda it: state(it) == {})

    def _present(self, told: Told, service: SupabaseService, topic: str, key: str) -> Channel:
        channel = client_of(told, service).channel(topic, presence={"key": key, "enabled": True})
        for event in ("sync", "join", "leave"):
            channel.on("presence", event, event=event)
        return channel.join()


class AccessTests:
    """Tokens."""

    def test_who_may_not_join_is_told_why(self, told: Told, service: SupabaseService) -> None:
        good = token("authenticated", sub="ada")
        for name, given, config, message in (
            ("tokenless", "not.a.token", {}, "MalformedJWT: The token provided is not a valid JWT"),
            ("forged", forged(good), {}, "JwtSignatureError: Failed to validate JWT signature"),
            ("late", token(seconds=-7), {}, "InvalidJWTToken: Token has expired N seconds ago"),
            (
                "team:1",
                token(),
                {"private": True},
                "Unauthorized: You do not have permissions to read from this Channel topic: team:1",
            ),
            (
                "roleless",
                jwt.encode({"exp": int(time.time()) + 60}, SECRET, "HS256"),
                {},
                "InvalidJWTToken: Fields `role` and `exp` are required in JWT",
            ),
            ("", token(), {}, "TopicNameRequired: You must provide a topic name"),
        ):
            channel = client_of(told, service, token=given).channel(name, **config).subscribe()
            channel.wait_for(lambda it: it.errors)
            assert without_number(reason(channel.errors[0])) == message
            assert channel.statuses[0] == "CHANNEL_ERROR"

    def test_a_private_channel_is_for_those_who_may(
        self, told: Told, service: SupabaseService
    ) -> None:
        ada = token("authenticated", sub="ada")
        topic = f"team:{service.topic()}"
        channels = [
            client_of(told, service, token=ada)
            .channel(topic, private=True)
            .on("broadcast", event="x")
            .join()
            for _ in range(2)
        ]
        public = client_of(told, service).channel(topic).on("broadcast", event="x").join()
        said = {"type": "broadcast", "event": "x", "payload": {"n": 1}}
        channels[0].tell("send", message=said)
        channels[1].wait_for(lambda it: it.payloads("broadcast"))
        assert public.payloads("broadcast") == []

    def test_rows_are_those_of_the_reader_and_another_token_shows_others(
        self, told: Told, service: SupabaseService
    ) -> None:
        table = service.table("id int PRIMARY KEY, owner text", identity="FULL")
        client = client_of(told, service, token=token("authenticated", sub="ada"))
        channel = client.channel(service.topic()).on("system", "system").on_changes(table=table)
        channel.join()
        service.execute(f"INSERT INTO {table} VALUES (1, 'ada'), (2, 'bob'), (3, 'ada')")
        channel.wait_for(lambda it: it.ids() == [1, 3])
        before = len(channel.payloads("system", "system"))
        renew(client, token("authenticated", sub="bob"))
        channel.wait_for(lambda it: len(it.payloads("system", "system")) > before)
        service.execute(f"INSERT INTO {table} VALUES (4, 'ada'), (5, 'bob')")
        channel.wait_for(lambda it: it.ids() == [1, 3, 5])

    def test_an_expired_token_ends_a_channel_and_a_new_one_in_time_keeps_it(
        self, told: Told, service: SupabaseService
    ) -> None:
        table = service.table("id int PRIMARY KEY")
        clients = [client_of(told, service, token=token(seconds=2.99)) for _ in range(2)]
        expires, renewed = (
            client.channel(service.topic()).on("system", "system").on_changes(table=table).join()
            for client in clients
        )
        service.execute(f"INSERT INTO {table} VALUES (1)")
        for channel in (expires, renewed):
            channel.wait_for(lambda it: it.ids() == [1])
        renew(clients[1], token())
        expires.wait_for(lambda it: "CLOSED" in it.statuses)
        assert without_number(problems(expires)[0]) == "Token has expired N seconds ago"
        service.execute(f"INSERT INTO {table} VALUES (2)")
        renewed.wait_for(lambda it: it.ids() == [1, 2])
        assert expires.ids() == [1]
        assert renewed.statuses == ["SUBSCRIBED"]

    def test_a_table_that_a_role_may_not_read_seems_not_to_be_there(
        self, told: Told, service: SupabaseService
    ) -> None:
        table = service.table("id int PRIMARY KEY")
        client = client_of(told, service, token=token("nobody"))
        channel = client.channel(service.topic()).on("system", "system").on_changes(table=table)
        channel.subscribe().wait_for(problems)
        assert problems(channel)[0] == not_there(table)


class ReturnTests:
    """Connections that end."""

    def test_who_asks_for_what_is_not_kept_is_told_and_gets_what_comes(
        self, told: Told, service: SupabaseService
    ) -> None:
        table = service.table("id int PRIMARY KEY")
        channel = client_of(told, service).channel(service.topic()).on("system", "system")
        channel.on_changes(follow=True, table=table, since="0/1:1").join()
        channel.wait_for_payloads("system", 2, "system")
        messages = [one["message"] for one in channel.payloads("system", "system")]
        assert messages[0] == "Subscribed to PostgreSQL"
        assert messages[1].startswith("Changes may be missing: ")
        service.execute(f"INSERT INTO {table} VALUES (1), (2)")
        channel.wait_for(lambda it: it.ids() == [1, 2])
        assert channel.statuses == ["SUBSCRIBED"]

    def test_a_connection_that_is_cut_is_made_again_and_nothing_else_is_needed(
        self, told: Told, service: SupabaseService
    ) -> None:
        table, topic = service.table("id int PRIMARY KEY"), service.topic()
        channel = client_of(told, service).channel(topic, presence={"key": "a", "enabled": True})
        channel.on_changes(table=table).on("broadcast", event="x").join()
        other = client_of(told, service).channel(topic).join()
        for number in (1, 2):
            service.proxy.cut()
            for one in (channel, other):
                one.wait_for_joins(number + 1)
            service.execute(f"INSERT INTO {table} VALUES ({number})")
            said = {"type": "broadcast", "event": "x", "payload": {"n": number}}
            other.tell("send", message=said)
            channel.wait_for_payloads("broadcast", number)
            channel.wait_for_payloads("postgres_changes", number)
        assert channel.ids() == [1, 2]


def write_and_change(service: SupabaseService, table: str) -> None:
    service.execute(f"INSERT INTO {table} VALUES (1, 'a')")
    service.execute(f"UPDATE {table} SET note = 'b'")
    service.execute(f"DELETE FROM {table}")


def negated(condition: tuple[str, str]) -> tuple[str, str]:
    filter_, sql = condition
    column, _, value = filter_.partition("=")
    return f"{column}=not.{value}", f"NOT ({sql})"


def problems(channel: Channel) -> list[str]:
    """Return what system messages said was wrong: some clients hand them over as errors."""
    told = [
        one["message"] for one in channel.payloads("system", "system") if one["status"] == "error"
    ]
    return told or [json.loads(error)["message"] for error in channel.errors if "message" in error]


def reason(error: str) -> str:
    """Return what the server said: some clients hand over all of its answer."""
    return str(json.loads(error)["reason"]) if error.startswith("{") else error


def without_number(text: str) -> str:
    return re.sub(r"expired \d+ seconds", "expired N seconds", text)


def not_there(table: str) -> str:
    return (
        "Unable to subscribe to changes with given parameters. Please check Realtime is enabled"
        f" for the given connect parameters: [event: *, schema: public, table: {table},"
        " filters: [], select: nil]"
    )


def wrong_bindings(table: str) -> Sequence[tuple[dict[str, Any], str]]:
    parse = "Error parsing `filter` params: "
    sql = (
        "Unable to subscribe to changes with given parameters. An exception happened so please"
        f" check your connect parameters: [event: *, schema: public, table: {table},"
        " filters: [{0}], select: nil]. Exception: ERROR {1}"
    )
    no_column = (
        '{"nope", "eq", "1", false}',
        "P0001 (raise_exception) invalid column for filter nope",
    )
    return (
        ({"table": table, "filter": "id=foo.hey"}, f'{parse}["foo", "hey"]'),
        ({"table": table, "filter": "undefined"}, f'{parse}["undefined"]'),
        (
            {"table": table, "filter": "id=eq.1,,id=eq.2"},
            f"{parse}filter must not contain empty segments (check for extra commas)",
        ),
        (
            {"table": table, "filter": "id=in.1,2"},
            f"{parse}`in` filter value must be wrapped by parentheses",
        ),
        (
            {"table": "*", "select": ["id"]},
            (
                "Column selection is not supported for wildcard subscriptions. Provide an explicit"
                " schema and table name."
            ),
        ),
        ({"table": "doesnotexist"}, not_there("doesnotexist")),
        ({"table": table, "filter": "nope=eq.1"}, sql.format(*no_column)),
        (
            {"table": table, "filter": "id=eq.abc"},
            sql.format(
                '{"id", "eq", "abc", false}',
                '22P02 (invalid_text_representation) invalid input syntax for type integer: "abc"',
            ),
        ),
    )


def forged(good: str) -> str:
    head, _, signature = good.rpartition(".")
    return f"{head}.{signature[:-5]}{'A' * 5}"


def renew(client: Client, new: str) -> None:
    """Let a client use another token, as its documentation says."""
    client.tell("setAuth", token=new)


def state(channel: Channel) -> dict[str, list[Any]]:
    return {key: shown(metas) for key, metas in channel.tell("presenceState").items()}


def shown(presences: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in one.items() if name != "presence_ref"} for one in presences
    ]


def devices(channel: Channel) -> list[str]:
    return [one["on"] for one in state(channel).get("ada", [])]


# What needs a walstream of its own


def rejoins_after_a_restart(
    clients: Sequence[Told], database: Database, proxy: Proxy, folder: Path, *, origin: str = ""
) -> None:
    """Clients come back by themselves; who asks for it gets what it missed meanwhile."""
    journal = '[journal]\npath = "journal.db"\n'
    run = partial(
        supabase_service, folder, database, proxy, slot=slot_name(), more=journal, origin=origin
    )
    with run() as service:
        table, topic = service.table("id int PRIMARY KEY"), service.topic()
        service.execute(f"INSERT INTO {table} VALUES (0)")
        channels: list[Channel] = []
        for told in clients:
            plain = client_of(told, service).channel(topic).on("broadcast", event="x")
            channels.append(plain.on_changes(table=table).join())
        following = [following_all(told, service, table) for told in clients]
        service.execute(f"INSERT INTO {table} VALUES (1)")
        for channel in (*channels, *following):
            channel.wait_for(lambda it: 1 in it.ids())
    service.execute(f"INSERT INTO {table} VALUES (2)")
    for channel in (*channels, *following):
        channel.wait_for(lambda it: "CHANNEL_ERROR" in it.statuses)
    with run():
        for channel in (*channels, *following):
            channel.wait_for(lambda it: it.statuses[-1] == "SUBSCRIBED", 30)
        service.execute(f"INSERT INTO {table} VALUES (3)")
        said = {"type": "broadcast", "event": "x", "payload": {}}
        for channel in (*channels, *following):
            channel.wait_for(lambda it: 3 in it.ids())
        for speaker in channels:
            speaker.tell("send", message=said)
        others = len(channels) - 1
        for channel in channels:
            channel.wait_for(lambda it: len(it.payloads("broadcast")) == others)
        for channel in following:
            assert channel.ids() == [0, 1, 2, 3]
        for told in clients:
            told.close_all()


def every_change_comes_once(
    clients: Sequence[Told], service: SupabaseService, *, count: int = 10_000, rounds: int = 25
) -> None:
    """Whatever becomes of the connections, changes come in order, and each of them once.

    They are cut behind some bytes, mostly within a frame, when changes come as they are made and
    when they are read from what is kept; and now and then nobody listens.
    """
    table = service.table("id int PRIMARY KEY, note text")
    channels = [following_all(told, service, table) for told in clients]
    chance = random.Random(count)  # noqa: S311 - the same bytes each time
    done = 0
    for number in range(1, rounds + 1):
        if number % 5 == 0:
            service.proxy.refuse()
            service.proxy.cut()
        else:
            service.proxy.cut_after(chance.randrange(100 * count // rounds))
        upto = count * number // rounds
        for begin in range(done + 1, upto + 1, 150):
            end = min(begin + 149, upto)
            service.execute(
                f"INSERT INTO {table} SELECT i, 'note ' || i FROM generate_series({begin}, {end}) i"
            )
        done = upto
        service.proxy.restore()
        for channel in channels:
            channel.wait_for_joins(number + 1)
    for channel in channels:
        channel.wait_for(lambda it: has_come(it, count), 60)
        assert channel.ids() == list(range(1, count + 1))


def following_all(told: Told, service: SupabaseService, table: str) -> Channel:
    """Join from the beginning of what is kept, and go on wherever the last record was."""
    channel = client_of(told, service).channel(service.topic())
    return channel.on_changes(follow=True, table=table, since="beginning").join()


def has_come(channel: Channel, id_: int) -> bool:
    last = channel.last()
    return last is not None and last.id == id_
