"""Under ``rls`` a reader gets of the changes what the server's policies show it, and no row more.

Policies, roles and rows are those of a real server. A mark closes each scene: it comes to everybody
behind all that was before it, and so nothing has to be waited for that does not come.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest
from structlog.testing import capture_logs

from tests.checks import mend
from tests.command_line import CommandLine
from tests.conftest import StartCluster
from tests.hubs import Sent
from tests.live_service import live_service
from tests.phoenix import Phoenix, phoenix
from tests.postgres import Database, async_wait_until
from tests.tokens import signed
from walstream import Walstream, config
from walstream.access import Gate, Grant, Reader, Sight
from walstream.check import Finding, Status, check
from walstream.config.access import RoleConfig
from walstream.errors import AccessRefused
from walstream.grammar import parse as parse_filter
from walstream.live.clients import Client
from walstream.live.encodings import JSON_LINES
from walstream.live.hub import Hub
from walstream.live.streams import begin_at, serve
from walstream.live.subscriptions import Limits, Subscription, parse_subscriptions
from walstream.router import TablePattern

KEY: Final = "correct horse battery staple, and more of it"

ROLES: Final = """
CREATE ROLE anon NOLOGIN;
CREATE ROLE member NOLOGIN;
CREATE ROLE auditor NOLOGIN BYPASSRLS;
CREATE ROLE stranger NOLOGIN;
CREATE ROLE asker LOGIN NOINHERIT;
GRANT anon, member, auditor TO asker;
"""

SCHEMA: Final = """
CREATE SCHEMA auth;
CREATE FUNCTION auth.uid() RETURNS text LANGUAGE sql STABLE
    AS $$ SELECT current_setting('request.jwt.claims', true)::json ->> 'sub' $$;
CREATE FUNCTION auth.role() RETURNS text LANGUAGE sql STABLE
    AS $$ SELECT current_setting('request.jwt.claims', true)::json ->> 'role' $$;
GRANT USAGE ON SCHEMA auth, public TO public;

CREATE TABLE marks (id int PRIMARY KEY);

CREATE TABLE notes (id int PRIMARY KEY, owner text, is_public bool, body text);
ALTER TABLE notes REPLICA IDENTITY FULL;
ALTER TABLE notes ENABLE ROW LEVEL SECURITY;
CREATE POLICY of_all ON notes TO anon USING (is_public AND auth.role() = 'anon');
CREATE POLICY of_owner ON notes TO member USING (is_public OR owner = auth.uid());

CREATE TABLE teams (id int PRIMARY KEY, who text);
CREATE TABLE plans (id int PRIMARY KEY, team int, body text);
ALTER TABLE plans ENABLE ROW LEVEL SECURITY;
CREATE POLICY of_team ON plans TO member
    USING (team IN (SELECT t.id FROM teams t WHERE t.who = auth.uid()));

CREATE TABLE ratios (id int PRIMARY KEY, v int);
ALTER TABLE ratios ENABLE ROW LEVEL SECURITY;
CREATE POLICY of_ratio ON ratios TO member USING (10 / v > 0);

CREATE TABLE slow (id int PRIMARY KEY, body text);
ALTER TABLE slow ENABLE ROW LEVEL SECURITY;
CREATE POLICY of_sloth ON slow TO member
    USING (CASE WHEN auth.uid() = 'sloth' THEN (SELECT true FROM pg_sleep(30)) ELSE true END);

CREATE TABLE parts (id int PRIMARY KEY, owner text) PARTITION BY RANGE (id);
CREATE TABLE parts_low PARTITION OF parts FOR VALUES FROM (0) TO (1000);
ALTER TABLE parts ENABLE ROW LEVEL SECURITY;
CREATE POLICY of_owner ON parts TO member USING (owner = auth.uid());

CREATE TABLE cards (id int PRIMARY KEY, owner text, pin text, note text);
ALTER TABLE cards ENABLE ROW LEVEL SECURITY;
CREATE POLICY of_owner ON cards TO member USING (owner = auth.uid());

CREATE TABLE shut (id int PRIMARY KEY);
ALTER TABLE shut ENABLE ROW LEVEL SECURITY;
CREATE TABLE keyless (body text);
CREATE TABLE wide (id int PRIMARY KEY, is_public bool, body text);
ALTER TABLE wide ALTER body SET STORAGE EXTERNAL;
CREATE TABLE sums (id int PRIMARY KEY, v numeric);
CREATE FUNCTION auth.tricky() RETURNS bool LANGUAGE plpgsql AS $$ BEGIN
    PERFORM set_config('request.jwt.claims', '{"sub":"bob","role":"member"}', false);
    PERFORM set_config('statement_timeout', '1', false);
    RETURN true;
END $$;
CREATE TABLE tricks (id int PRIMARY KEY);
ALTER TABLE tricks ENABLE ROW LEVEL SECURITY;
CREATE POLICY trick ON tricks TO member USING (auth.tricky());
GRANT SELECT ON ALL TABLES IN SCHEMA public TO anon, member, auditor;
REVOKE SELECT ON cards FROM member;
GRANT SELECT (id, owner, note) ON cards TO member;
"""

MARKS: Final[dict[str, Any]] = {"table": "public.marks"}
ASKED: Final[dict[str, Any]] = {"table": "public.*", "rls": True}
CARDS: Final[dict[str, Any]] = {
    "table": "public.cards",
    "rls": True,
    "columns": {"mask": {"pin": "redact"}},
}
TOLD: Final[dict[str, Any]] = {"table": "public.notes", "rls": True, "deletes": "key"}

READERS: Final[dict[str, Any]] = {
    "anon": {"tables": [MARKS, ASKED]},
    "member": {"tables": [MARKS, CARDS, ASKED]},
    "told": {"tables": [MARKS, TOLD], "postgres_role": "member"},
    "auditor": {"tables": [MARKS, ASKED]},
    "stranger": {"tables": [MARKS, ASKED]},
    "open": {"tables": [MARKS, {"table": "public.*", "rows": "all"}]},
    "both": {
        "tables": [MARKS, {"table": "public.notes", "rls": True, "where": "body=neq.no"}],
        "postgres_role": "member",
    },
}


@pytest.fixture(scope="module")
def server(module_private_cluster: StartCluster) -> Iterator[Database]:
    """A database with policies, for all tests together; the roles are the server's."""
    with Database(module_private_cluster().conninfo(), "postgres") as database:
        database.execute(ROLES)
        database.execute(SCHEMA)
        yield database


@pytest.fixture
def shop(server: Database) -> Iterator[Database]:
    """The database, with empty tables."""
    tables = [name for (name,) in server.execute(TABLES)]
    server.execute(f"TRUNCATE {', '.join(tables)}")
    yield server
    server.execute("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots")
    server.close()  # with its settings


TABLES: Final = """
SELECT format('%I', relname) FROM pg_class
 WHERE relkind IN ('r', 'p') AND relnamespace = 'public'::regnamespace
"""


def asker(database: Database) -> str:
    return psycopg.conninfo.make_conninfo(database.dsn, user="asker")


def settings(database: Database, folder: Path, **more: Any) -> config.Config:
    access = {
        "secret": KEY,
        "anonymous_role": "anon",
        "roles": READERS,
        "row_security": {"dsn": asker(database)} | more.pop("row_security", {}),
    }
    return config.parse(
        {
            "postgres": {"dsn": database.dsn},
            "slot": {"name": f"slot_{secrets.token_hex(4)}", "create": True},
            "state": {"path": str(folder / "state.json")},
            "dead_letters": {"path": str(folder / "letters.sqlite3")},
            "routes": more.pop("routes", [{"table": "public.*", "to": "live"}]),
            "sinks": {"live": {"type": "live"}},
            "access": access,
            **more,
        }
    )


class Site:
    """walstream in this process, and who listens to it."""

    def __init__(self, database: Database, hub: Hub, gate: Gate) -> None:
        self.database = database
        self.hub = hub
        self.gate = gate
        self.marks = 0
        self.tasks: list[asyncio.Task[Any]] = []

    async def listener(
        self, role: str | None, since: str | None = None, query: str = "", **claims: Any
    ) -> Listener:
        """Let somebody listen to everything, or to what is asked for."""
        token = None if role is None else token_of(role, **claims)
        reader = await self.gate.admit(token)
        pairs = [tuple(one.split("=", 1)) for one in query.split("&")] if query else []
        asked: Any = [*pairs, ("table", "public.marks")] if pairs else [("table", "public.*")]
        subscriptions = parse_subscriptions(asked, Limits())
        outflow = Sent()
        cohort = self.hub.cohort(subscriptions, reader, JSON_LINES)
        client = Client(cohort, outflow, 1 << 24)
        serving = serve(self.hub, client, await begin_at(self.hub, since), 60.0)
        self.tasks.append(asyncio.create_task(serving))
        if since is None:
            await async_wait_until(lambda: client in client.cohort.clients)
        return Listener(client, outflow)

    async def mark(self, *listeners: Listener, seconds: float = 10.0) -> None:
        """Return when all have all that was before."""
        self.marks += 1
        self.database.execute(f"INSERT INTO marks VALUES ({self.marks})")
        mark = ("marks", self.marks)
        await async_wait_until(
            lambda: all(mark in one.seen for one in listeners), timeout_seconds=seconds
        )

    async def do(self, statements: str, *listeners: Listener) -> None:
        """Change something, in one transaction, and wait until all have what they get of it."""
        self.database.execute(statements)
        await self.mark(*listeners)


class Listener:
    """What somebody has got."""

    def __init__(self, client: Client, outflow: Sent) -> None:
        self.client = client
        self.outflow = outflow

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [one for one in map(json.loads, self.outflow.lines) if "operation" in one]

    @property
    def seen(self) -> list[tuple[str, Any]]:
        return [(one["table"], (one["row"] or one["identity"])["id"]) for one in self.lines]

    def of(self, table: str) -> list[dict[str, Any]]:
        return [one for one in self.lines if one["table"] == table]

    def ids(self, table: str) -> list[Any]:
        return [identity for name, identity in self.seen if name == table]

    def text(self) -> str:
        return b"".join(self.outflow.pieces).decode()


@asynccontextmanager
async def running(database: Database, folder: Path, **more: Any) -> AsyncIterator[Site]:
    chosen = settings(database, folder, **more)
    app, gate = Walstream(), Gate(chosen.access, masking_key=b"key")
    task = asyncio.create_task(app.run(chosen))
    site: Site | None = None
    try:
        await async_wait_until(lambda: task.done() or app.is_ready)
        if task.done():
            await task
        assert app._daemon is not None
        hub = app._daemon.hub()
        assert hub is not None
        site = Site(database, hub, gate)
        yield site
    finally:
        app.stop()
        await task
        await asyncio.gather(*(() if site is None else site.tasks))


async def test_each_of_many_readers_sees_exactly_its_rows(shop: Database, tmp_path: Path) -> None:
    names = [f"user{number}" for number in range(12)]
    async with running(shop, tmp_path) as site:
        members = {name: await site.listener("member", sub=name) for name in names}
        twins = {name: await site.listener("member", sub=name) for name in names[:2]}
        anonymous = await site.listener(None)
        also_anonymous = await site.listener("anon", sub="user1")
        auditor = await site.listener("auditor", sub="a")
        stranger = await site.listener("stranger", sub="user1")
        everything = await site.listener("open")
        everybody = [
            *members.values(),
            *twins.values(),
            anonymous,
            also_anonymous,
            auditor,
            stranger,
            everything,
        ]
        for round_ in range(3):
            shop.execute(
                "INSERT INTO notes SELECT %s + i, 'user' || i %% 13, i %% 10 = 0, 'SECRET' || i"
                "  FROM generate_series(0, 99) AS i",
                round_ * 100,
            )
            shop.execute("UPDATE notes SET body = body || '!' WHERE id %% 3 = 0 AND id >= %s", 0)
            await site.mark(*everybody)
        rows = shop.execute("SELECT id, owner, is_public FROM notes")
        for name, listener in [*members.items(), *twins.items()]:
            mine = {identity for identity, owner, public in rows if public or owner == name}
            assert set(listener.ids("notes")) == mine
            for one in listener.of("notes"):
                assert one["row"]["owner"] == name or one["row"]["is_public"]
                assert one["identity"] is None, "nothing is told of the old row"
        public = {identity for identity, _, public in rows if public}
        assert set(anonymous.ids("notes")) == set(also_anonymous.ids("notes")) == public
        assert (
            set(auditor.ids("notes")) == set(everything.ids("notes")) == {one for one, *_ in rows}
        )
        assert stranger.ids("notes") == [], "nobody granted that role to who asks"
        assert all(one.client.end is None for one in everybody)


async def test_what_was_hidden_stays_hidden_when_the_row_is_shown_later(
    shop: Database, tmp_path: Path
) -> None:
    async with running(shop, tmp_path) as site:
        ann = await site.listener("member", sub="ann")
        await site.do(
            """
            BEGIN;
            INSERT INTO notes VALUES (1, 'bob', false, 'SECRET');
            UPDATE notes SET owner = 'ann', body = 'for ann' WHERE id = 1;
            INSERT INTO notes VALUES (2, 'ann', false, 'first');
            UPDATE notes SET owner = 'bob', body = 'SECRET' WHERE id = 2;
            INSERT INTO notes VALUES (3, 'ann', false, 'gone');
            DELETE FROM notes WHERE id = 3;
            COMMIT;
            """,
            ann,
        )
        assert [one["row"]["body"] for one in ann.of("notes")] == ["for ann"]
        await site.do("UPDATE notes SET body = 'mine' WHERE id = 1", ann)
        await site.do("UPDATE notes SET owner = 'bob', body = 'SECRET' WHERE id = 1", ann)
        await site.do("UPDATE notes SET body = 'SECRET' WHERE id = 1", ann)
        await site.do("UPDATE notes SET owner = 'ann', body = 'back' WHERE id = 1", ann)
        await site.do("DELETE FROM notes; TRUNCATE notes", ann)
        assert [one["row"]["body"] for one in ann.of("notes")] == ["for ann", "mine", "back"]
        assert "SECRET" not in ann.text()


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_happens_a_reader_ends_up_with_what_it_may_see(
    shop: Database, tmp_path: Path, seed: int
) -> None:
    """And gets no version of a row on the way that it may not see."""
    rng = random.Random(seed)  # noqa: S311 - a workload
    names = ["ann", "bob", "cid"]
    async with running(shop, tmp_path) as site:
        readers = {name: await site.listener("member", sub=name) for name in names}
        with shop.connect(autocommit=False) as connection:
            for _ in range(150):
                for _ in range(rng.randint(1, 5)):
                    connection.execute(*random_statement(rng, [*names, "nobody"]))
                connection.rollback() if rng.random() < 0.1 else connection.commit()
                await asyncio.sleep(rng.choice([0, 0, 0.002]))
        late = {name: await site.listener("member", "beginning", sub=name) for name in names}
        await site.mark(*readers.values(), *late.values())
        rows = shop.execute("SELECT id, owner, is_public, body FROM notes")
        for name, listener in [*readers.items(), *late.items()]:
            held: dict[int, tuple[Any, ...]] = {}
            for one in listener.of("notes"):
                row = one["row"]
                assert row["is_public"] or row["owner"] == name
                held[row["id"]] = tuple(row.values())
            visible = {row[0]: row for row in rows if row[2] or row[1] == name}
            assert visible.items() <= held.items()
        assert any(one.of("notes") for one in readers.values())


def random_statement(rng: random.Random, names: list[str]) -> tuple[str, list[Any]]:
    identity, owner, public = rng.randint(1, 30), rng.choice(names), rng.random() < 0.2
    body = str(rng.random())
    match rng.randint(0, 3):
        case 0:
            return "DELETE FROM notes WHERE id = %s", [identity]
        case 1:
            return MOVE, [body, identity]
        case _:
            return PUT, [identity, owner, public, body]


MOVE: Final = """
UPDATE notes SET id = id + 100, body = %s
 WHERE id = %s AND id NOT IN (SELECT id - 100 FROM notes)
"""
PUT: Final = """
INSERT INTO notes VALUES (%s, %s, %s, %s)
    ON CONFLICT (id) DO UPDATE
   SET owner = excluded.owner, is_public = excluded.is_public, body = excluded.body
"""


async def test_a_clients_filter_tells_nothing_of_old_rows(shop: Database, tmp_path: Path) -> None:
    async with running(shop, tmp_path) as site:
        query = "table=public.notes&where=body=eq.SECRET&leaving=true"
        ann = await site.listener("member", query=query, sub="ann")
        spy = await site.listener("told", query=query, sub="ann")
        keyed = await site.listener("told", query="table=public.notes&where=id=eq.1", sub="ann")
        deaf = await site.listener("member", query="table=public.notes&where=id=eq.1", sub="ann")
        everybody = (ann, spy, keyed, deaf)
        await site.do("INSERT INTO notes VALUES (1, 'bob', false, 'SECRET')", *everybody)
        await site.do("UPDATE notes SET owner = 'ann', body = 'x'", *everybody)
        await site.do("UPDATE notes SET owner = 'bob', body = 'SECRET'", *everybody)
        await site.do("DELETE FROM notes", *everybody)
        assert ann.of("notes") == spy.of("notes") == []
        assert [(one["operation"], one["row"]) for one in deaf.of("notes")] == [
            ("update", {"id": 1, "owner": "ann", "is_public": False, "body": "x"})
        ]
        update, delete = keyed.of("notes")
        assert (update["operation"], update["identity"]) == ("update", None)
        assert (delete["operation"], delete["identity"]) == ("delete", {"id": 1})


async def test_a_condition_and_row_security_both_have_to_pass(
    shop: Database, tmp_path: Path
) -> None:
    async with running(shop, tmp_path) as site:
        ann = await site.listener("both", sub="ann")
        await site.do(
            "INSERT INTO notes VALUES (1, 'ann', false, 'no'), (2, 'ann', false, 'yes'),"
            " (3, 'bob', false, 'yes')",
            ann,
        )
        assert ann.ids("notes") == [2]


async def test_a_policy_may_look_into_other_tables(shop: Database, tmp_path: Path) -> None:
    async with running(shop, tmp_path) as site:
        ann = await site.listener("member", sub="ann")
        await site.do("INSERT INTO plans VALUES (1, 7, 'before')", ann)
        shop.execute("INSERT INTO teams VALUES (7, 'ann')")
        await site.do("INSERT INTO plans VALUES (2, 7, 'during')", ann)
        shop.execute("DELETE FROM teams")
        await site.do("INSERT INTO plans VALUES (3, 7, 'after')", ann)
        assert ann.ids("plans") == [2]


async def test_a_policy_that_stumbles_over_a_row_hides_that_row(
    shop: Database, tmp_path: Path
) -> None:
    shop.execute("INSERT INTO ratios SELECT i, 0 FROM generate_series(1000, 1010) AS i")
    async with running(shop, tmp_path) as site:
        ann = await site.listener("member", sub="ann")
        with capture_logs() as logs:
            await site.do(
                "INSERT INTO ratios SELECT i, CASE i %% 50 WHEN 0 THEN 0 ELSE 1 END"
                "  FROM generate_series(1, 200) AS i".replace("%%", "%"),
                ann,
            )
            await site.do("INSERT INTO ratios VALUES (900, 0), (901, 1)", ann)
        expected = [one for one in range(1, 201) if one % 50] + [901]
        assert ann.ids("ratios") == expected
        [failed] = [one for one in logs if one["event"] == "row_security_failed"]
        assert (failed["sqlstate"], failed["error"]) == ("22012", "DivisionByZero")
        vitals = site.hub.vitals().row_security
        assert vitals is not None
        assert vitals.hidden == vitals.failed == 5


async def test_a_slow_policy_delays_nobody_else(shop: Database, tmp_path: Path) -> None:
    async with running(shop, tmp_path, row_security={"timeout_seconds": 0.2}) as site:
        sloths = [await site.listener("member", sub="sloth", n=n) for n in range(2)]
        ann = await site.listener("member", sub="ann")
        shop.execute("INSERT INTO slow VALUES (0, '')")
        await site.mark(ann, *sloths)
        began = time.monotonic()
        for number in range(1, 6):
            await site.do(f"INSERT INTO slow VALUES ({number}, '')", ann)
        assert time.monotonic() - began < 0.5
        await site.mark(*sloths, seconds=20.0)
        assert ann.ids("slow") == [0, 1, 2, 3, 4, 5]
        assert all(one.ids("slow") == [] for one in sloths)


async def test_replays_are_asked_about_as_well(shop: Database, tmp_path: Path) -> None:
    async with running(shop, tmp_path) as site:
        first = await site.listener("open")
        await site.do("INSERT INTO notes VALUES (1, 'ann', false, 'a')", first)
        since = first.lines[0]["id"]
        await site.do(
            """
            INSERT INTO notes SELECT i, CASE i % 2 WHEN 0 THEN 'ann' ELSE 'bob' END, false, 'SECRET'
              FROM generate_series(2, 2000) AS i;
            UPDATE notes SET body = 'kept' WHERE id % 4 = 0;
            DELETE FROM notes WHERE id % 10 = 0;
            """,
            first,
        )
        ann = await site.listener("member", since=since, sub="ann")
        bob = await site.listener("member", since=since, sub="bob")
        await site.mark(ann, bob)
        kept = [one for one in range(2, 2001) if one % 10]
        assert ann.ids("notes") == [
            *(one for one in kept if one % 4 == 2),
            *(one for one in kept if one % 4 == 0),
        ]
        assert bob.ids("notes") == [one for one in kept if one % 2]
        assert [one["row"]["body"] for one in ann.of("notes")].count("kept") == 400


async def test_a_client_that_comes_while_others_wait_gets_each_once(
    shop: Database, tmp_path: Path
) -> None:
    async with running(shop, tmp_path) as site:
        listeners = [await site.listener("member", since="beginning", sub="ann")]
        for number in range(30):
            shop.execute(
                "INSERT INTO notes SELECT %s * 10 + i, 'ann', false, ''"
                "  FROM generate_series(0, 9) AS i",
                number,
            )
            listeners.append(await site.listener("member", since="beginning", sub="ann"))
        await site.mark(*listeners)
        assert all(one.ids("notes") == list(range(300)) for one in listeners)
        assert len({one.client.cohort for one in listeners}) == 1


async def test_of_a_partition_the_policies_of_its_table_count(
    shop: Database, tmp_path: Path
) -> None:
    async with running(shop, tmp_path) as site:
        ann = await site.listener("member", sub="ann")
        await site.do("INSERT INTO parts VALUES (1, 'ann'), (2, 'bob')", ann)
        assert ann.ids("parts_low") == [1]


async def test_masked_columns_are_not_asked_for(shop: Database, tmp_path: Path) -> None:
    """The role of the server may not even read one of them."""
    routes = [{"table": "public.*", "to": "live", "columns": {"mask": {"note": "keep-last-2"}}}]
    async with running(shop, tmp_path, routes=routes) as site:
        ann = await site.listener("member", sub="ann")
        await site.do(
            "INSERT INTO cards VALUES (1, 'ann', '1234', '98765'), (2, 'bob', '1', '2')", ann
        )
        [card] = ann.of("cards")
        assert card["row"] == {"id": 1, "owner": "ann", "pin": "[redacted]", "note": "***65"}


async def test_what_cannot_be_asked_about_is_not_seen(shop: Database, tmp_path: Path) -> None:
    async with running(shop, tmp_path) as site:
        ann, stranger = await site.listener("member", sub="a"), await site.listener("stranger")
        with capture_logs() as logs:
            await site.do("INSERT INTO keyless VALUES ('x')", ann, stranger)
            shop.execute("CREATE TABLE mine (id int PRIMARY KEY)")
            await site.do("INSERT INTO mine VALUES (1); INSERT INTO mine VALUES (2)", ann, stranger)
        assert {name for one in (ann, stranger) for name, _ in one.seen} == {"marks"}
        failed = [one for one in logs if one["event"] == "row_security_failed"]
        assert sorted((one["relation"], one["postgres_role"], one["error"]) for one in failed) == [
            (
                "public.keyless",
                "member",
                "the table has no primary key, or what comes of it does not carry it as it is",
            ),
            (
                "public.keyless",
                "stranger",
                "the table has no primary key, or what comes of it does not carry it as it is",
            ),
            ("public.mine", "member", "permission denied for table mine"),
            ("public.mine", "stranger", 'permission denied to set role "stranger"'),
        ]


KINDS_TABLE: Final = 'many %s "kinds"'
QUOTED: Final = '"' + KINDS_TABLE.replace('"', '""') + '"'

TYPES: Final = """
CREATE TYPE mood AS ENUM ('low', 'high');
CREATE TYPE pair AS (a int, b text);
CREATE DOMAIN yes AS bool;
CREATE DOMAIN raw AS bytea;
CREATE TABLE TABLE_NAME (
    id numeric, "100%" char(5), "at" timestamptz,
    a smallint, b bigint, c real, d double precision, e numeric, f bool, g yes, h bytea, i raw,
    j json, k jsonb, l text[], m int[][], n pair, o mood, p interval, q uuid, r inet, s int4range,
    t xml, u money, v point, w bit(3), x tsvector, y name, z pair[], za date, zb timetz,
    PRIMARY KEY (id, "100%", "at"));
GRANT SELECT ON TABLE_NAME TO member;
"""

KINDS: Final = """
    1, 2, 1.5, 'NaN', 'Infinity', true, false, 'ab\\000', '\\xff', '{"a" :  1.0}', '{"b": [1.10]}',
    '{"a,b",NULL,"NULL"}', '{{1,2},{3,4}}', '(1,"x y")', 'high', '1 mon 2 days 03:04:05.6',
    'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11', '10.0.0.1/8', '[1,5)', '<a/>', '12.34', '(1.5,2)',
    B'101', 'a fat cat', 'name', ARRAY[(1,'q')::pair], '2020-02-29', '10:00:00+05:30'
"""


async def test_values_of_all_kinds_are_compared_as_they_are_printed(
    shop: Database, tmp_path: Path
) -> None:
    shop.execute(TYPES.replace("TABLE_NAME", QUOTED))
    async with running(shop, tmp_path) as site:
        ann = await site.listener("member", sub="ann")
        shop.execute("SET timezone = 'Asia/Kolkata'; SET bytea_output = 'escape'")
        shop.execute(f"INSERT INTO {QUOTED} VALUES (1.10, 'a', '2020-01-01', {KINDS})")
        shop.execute(f"INSERT INTO {QUOTED} VALUES (2, 'é \"x', '-infinity'), (3, '', 'now')")
        await site.mark(ann)
        assert [str(one) for one in ann.ids(KINDS_TABLE)] == ["1.1", "2", "3"]


async def test_a_value_that_is_equal_but_not_the_same_is_another(
    shop: Database, tmp_path: Path
) -> None:
    """An update to 1.0 of what was 1.00 in a change that is asked about too late."""
    async with running(shop, tmp_path) as site:
        ann = await site.listener("member", sub="ann")
        await site.do(
            "BEGIN; INSERT INTO sums VALUES (1, 1.00); UPDATE sums SET v = 1.0; COMMIT", ann
        )
        assert [one["operation"] for one in ann.of("sums")] == ["update"]


async def test_unchanged_long_values_need_not_be_there(shop: Database, tmp_path: Path) -> None:
    async with running(shop, tmp_path) as site:
        ann = await site.listener("member", sub="ann")
        await site.do("INSERT INTO wide VALUES (1, false, repeat('x', 9000))", ann)
        await site.do("UPDATE wide SET is_public = true", ann)
        assert [one["unchanged"] for one in ann.of("wide")] == [[], ["body"]]


async def test_a_transaction_is_asked_about_when_it_can_be_seen(
    shop: Database, tmp_path: Path
) -> None:
    """Under synchronous replication to a standby that is not there, it is sent and not seen."""
    async with running(shop, tmp_path) as site:
        ann = await site.listener("member", sub="ann")
        await site.do("INSERT INTO notes VALUES (1, 'ann', false, 'a')", ann)
        shop.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        shop.execute("SELECT pg_reload_conf()")
        try:
            with ThreadPoolExecutor(1) as thread:
                insert = thread.submit(commit, shop.dsn)
                await async_wait_until(lambda: site.hub.vitals().published_changes >= 3)
                await asyncio.sleep(0.2)  # nothing can be waited for: it must not come
                assert ann.ids("notes") == [1]
                shop.execute("ALTER SYSTEM RESET synchronous_standby_names")
                shop.execute("SELECT pg_reload_conf()")
                await async_wait_until(lambda: ann.ids("notes") == [1, 2])
                insert.result()
        finally:
            shop.execute("ALTER SYSTEM RESET synchronous_standby_names")
            shop.execute("SELECT pg_reload_conf()")


def commit(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("SET synchronous_commit = 'on'")
        connection.execute("INSERT INTO notes VALUES (2, 'ann', false, 'b')")


async def test_a_connection_that_is_lost_is_replaced(shop: Database, tmp_path: Path) -> None:
    async with running(shop, tmp_path) as site:
        ann = await site.listener("member", sub="ann")
        for number in range(3):
            shop.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'asker'"
            )
            await site.do(f"INSERT INTO notes VALUES ({number}, 'ann', false, '')", ann)
        assert ann.ids("notes") == [0, 1, 2]


async def test_who_asks_may_not_be_above_policies(shop: Database, tmp_path: Path) -> None:
    with pytest.raises(AccessRefused, match="which is a superuser") as caught:
        async with running(shop, tmp_path, row_security={"dsn": shop.dsn}):
            pass
    assert "CREATE ROLE" in caught.value.hint
    auditor = psycopg.conninfo.make_conninfo(shop.dsn, user="auditor")
    shop.execute("ALTER ROLE auditor LOGIN")
    with pytest.raises(AccessRefused, match="which is one with BYPASSRLS"):
        async with running(shop, tmp_path, row_security={"dsn": auditor}):
            pass


async def test_what_a_policys_function_sets_is_gone_with_the_question(
    shop: Database, tmp_path: Path
) -> None:
    async with running(shop, tmp_path, row_security={"max_connections": 1}) as site:
        ann = await site.listener("member", sub="ann")
        for number in range(3):
            await site.do(
                f"INSERT INTO tricks VALUES ({number}); INSERT INTO notes VALUES"
                f" ({number}, 'bob', false, 'SECRET')",
                ann,
            )
        assert ann.ids("tricks") == [0, 1, 2]
        assert ann.ids("notes") == []
        rows = shop.execute("SELECT count(*) FROM pg_stat_activity WHERE usename = 'asker'")
        assert rows == [(1,)]


async def test_who_asks_for_the_same_as_the_same_is_asked_for_once(
    shop: Database, tmp_path: Path
) -> None:
    async with running(shop, tmp_path) as site:
        queries = [f"table=public.notes&where=id=gte.{number}" for number in range(10)]
        anns = [await site.listener("member", query=query, sub="ann", exp=4e9) for query in queries]
        await site.do("INSERT INTO notes VALUES (20, 'ann', false, '')", *anns)
        assert all(one.ids("notes") == [20] for one in anns)
        vitals = site.hub.vitals()
        assert vitals.cohorts == 10
        assert vitals.row_security is not None
        assert (vitals.row_security.asked, vitals.row_security.questions) == (1, 1)


# ---- walstream check


async def checked(
    database: Database, folder: Path, *tables: dict[str, Any], **more: Any
) -> list[Finding]:
    """What is said of the role member, or another one, with these tables."""
    role = {"tables": list(tables)} | more.pop("role", {})
    chosen = settings(database, folder, **more)
    access = chosen.access.model_copy(update={"roles": {"member": RoleConfig(**role)}})
    report = await check(chosen.model_copy(update={"access": access}))
    return [one for one in report.findings if one.group == "access" and one.name != "tokens"]


async def test_a_check_of_row_security_that_is_right(shop: Database, tmp_path: Path) -> None:
    found = await checked(shop, tmp_path, CARDS, {"table": "public.notes", "rls": True})
    assert [(one.name, one.status, one.found) for one in found] == [
        ("row security", Status.OK, "asker asks as member"),
        ("member: public.cards", Status.OK, "the table is there, what row security shows"),
        ("member: public.notes", Status.OK, "the table is there, what row security shows"),
    ]


async def test_a_check_tells_who_may_not_ask_as_whom(shop: Database, tmp_path: Path) -> None:
    notes = {"table": "public.notes", "rls": True}
    [found, *_] = await checked(shop, tmp_path, notes, row_security={"dsn": shop.dsn})
    assert (found.name, found.status) == ("row security", Status.PROBLEM)
    assert "which is a superuser" in found.found
    for role, said in (
        ("nobody_yet", "there is no role nobody_yet on the server: its readers see nothing"),
        ("nobody_yet", "asker may not act as nobody_yet: its readers see nothing"),
    ):
        [found, *_] = await checked(shop, tmp_path, notes, role={"postgres_role": role})
        assert (found.status, found.found) == (Status.PROBLEM, said)
        mend(shop, found)
    [found, *_] = await checked(shop, tmp_path, notes, role={"postgres_role": "nobody_yet"})
    assert found.status is Status.OK
    shop.execute("DROP ROLE nobody_yet")
    [found, *_] = await checked(shop, tmp_path, notes, role={"postgres_role": "auditor"})
    assert (found.status, found.found) == (
        Status.WARNING,
        "row security does not hold for auditor: its readers see all rows",
    )


@pytest.mark.parametrize(
    ("table", "status", "said"),
    [
        (
            {"table": "public.notes"},
            Status.WARNING,
            "has row security, which does not count here: the role reads all rows",
        ),
        (
            {"table": "public.parts"},
            Status.WARNING,
            "public.parts_low: has row security, which does not count here",
        ),
        ({"table": "public.notes", "rows": "all"}, Status.OK, "the table is there, all rows"),
        ({"table": "public.notes", "where": "id=eq.1"}, Status.OK, "the table is there, some rows"),
        ({"table": "public.marks"}, Status.OK, "the table is there, all rows"),
        ({"table": "public.keyless", "rls": True}, Status.PROBLEM, "has no primary key"),
        (
            {"table": "public.sums", "rls": True},
            Status.WARNING,
            "has no row security: what member may SELECT is seen, which is all rows",
        ),
        (
            {"table": "public.cards", "rls": True},
            Status.PROBLEM,
            "member may not SELECT pin: no row of it is seen",
        ),
        (
            {"table": "public.shut", "rls": True},
            Status.WARNING,
            "has no policy that lets member SELECT: no row of it is seen",
        ),
    ],
)
async def test_a_check_tells_what_row_security_would_show(
    shop: Database, tmp_path: Path, table: dict[str, Any], status: Status, said: str
) -> None:
    found = await checked(shop, tmp_path, table)
    assert [one for one in found if one.status is status and one.found.startswith(said)], found


async def test_a_table_whose_policies_do_not_count_is_told_when_somebody_subscribes(
    shop: Database, tmp_path: Path
) -> None:
    async with running(shop, tmp_path) as site:
        sights: dict[str, dict[str, Any]] = {
            "public.notes": {},
            "public.plans": {"is_open": True},
            "public.parts": {"where": parse_filter("owner=eq.ann")},
            "public.marks": {},
        }
        grants = [
            Grant(TablePattern.parse(table), Sight(table, **sight))
            for table, sight in sights.items()
        ]
        reader = Reader("simple", grants=tuple(grants))
        with capture_logs() as logs:
            for table in [*sights, "public.notes", "public.*"]:
                await site.hub.requests.check([Subscription(TablePattern.parse(table))], reader)
        [told] = [one for one in logs if one["event"] == "row_security_ignored"]
        assert (told["relation"], told["role"]) == ("public.notes", "simple")


# ---- By WebSocket

REALTIME: Final = f"""
[realtime]
enabled = true
refusal_seconds = 0
[access]
secret = "{KEY}"
leeway_seconds = 0
api_keys = [{{ key = "sb_publishable_of_these_tests", role = "anon" }}]
row_security = {{ dsn = "%s" }}
[access.roles.anon]
tables = [{{ table = "public.marks" }}, {{ table = "public.*", rls = true }}]
[access.roles.member]
tables = [{{ table = "public.marks" }}, {{ table = "public.*", rls = true }}]
[access.roles.told]
postgres_role = "member"
tables = [{{ table = "public.marks" }}, {{ table = "public.*", rls = true, deletes = "key" }}]
[access.roles.open]
tables = [{{ table = "public.marks" }}, {{ table = "public.notes", rows = "all" }}]
"""

SCENE: Final = """
INSERT INTO notes SELECT i, 'user' || i % 12, i % 10 = 0, 'SECRET of user' || i % 12
  FROM generate_series(0, 119) AS i;
BEGIN;
INSERT INTO notes VALUES (200, 'nobody', false, 'SECRET of nobody');
UPDATE notes SET owner = 'user1', body = 'for user1' WHERE id = 200;
INSERT INTO notes VALUES (201, 'user1', false, 'SECRET of before');
UPDATE notes SET owner = 'nobody', body = 'SECRET of nobody' WHERE id = 201;
COMMIT;
DELETE FROM notes WHERE id = 11;
INSERT INTO marks VALUES (1);
"""


def test_by_websocket_each_reader_sees_exactly_its_rows(shop: Database, tmp_path: Path) -> None:
    command_line = CommandLine(tmp_path)
    names = [f"user{number}" for number in range(12)]
    tokens: dict[str, str | None] = {name: token_of("member", sub=name) for name in names}
    tokens |= {"told": token_of("told", sub="user3"), "open": token_of("open"), "anon": None}
    more = REALTIME % asker(shop).replace('"', "'").replace("\\", "\\\\")
    with (
        live_service(command_line, shop.dsn, "websockets", more=more) as service,
        ExitStack() as stack,
    ):
        clients = {
            name: stack.enter_context(phoenix(service.url, "sb_publishable_of_these_tests"))
            for name in tokens
        }
        tables = [
            {"event": "*", "schema": "public", "table": table} for table in ("notes", "marks")
        ]
        for name, client in clients.items():
            reply = client.join("room", tables, token=tokens[name])
            assert reply.payload["status"] == "ok"
        shop.execute(SCENE)
        got = {name: until_the_mark(client) for name, client in clients.items()}
    for number, name in enumerate(names):
        changes = got[name]
        new = {one["record"]["id"] for one in changes if one["type"] != "DELETE"}
        visible = {one for one in range(120) if one % 12 == number or one % 10 == 0} - {11}
        extra = {200} if name == "user1" else set()
        assert new - {11} == visible | extra
        assert not [one for one in changes if one["type"] == "DELETE"]
        for one in changes:
            assert one["record"]["is_public"] or one["record"]["owner"] == name
        hidden = json.dumps([one for one in changes if not one["record"]["is_public"]])
        assert re.sub(f"SECRET of {name}\\b", "", hidden).count("SECRET") == 0
    [update] = [one for one in got["user1"] if one["type"] == "UPDATE"]
    assert update["old_record"] == {"id": 200}, "the key, which the new row has too"
    assert {one["record"]["id"] for one in got["anon"]} == set(range(0, 120, 10))
    [deleted] = [one for one in got["told"] if one["type"] == "DELETE"]
    assert deleted["old_record"] == {"id": 11}
    assert len(got["open"]) == 125


def token_of(role: str, **claims: Any) -> str:
    return signed(KEY, role, **claims)


def until_the_mark(client: Phoenix) -> list[dict[str, Any]]:
    changes: list[dict[str, Any]] = []
    while True:
        heard = client.wait_for(lambda heard: heard.event == "postgres_changes")
        data = heard.payload["data"]
        if data["table"] == "marks":
            return changes
        changes.append(data)
