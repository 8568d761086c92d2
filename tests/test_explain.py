"""``walstream explain``: it agrees with the real run, and leaves the slot where it is."""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from pydantic import BaseModel

from tests import workload
from tests.postgres import Database, wait_until
from tests.test_documents import ROOT, blocks, the_block
from tests.workload import Kind, Table
from walstream import Change, Message, Walstream
from walstream.assembly import make_router
from walstream.config import Config, parse
from walstream.errors import ConfigError, SlotBusy, SlotMissing, UsageError
from walstream.explain import Explained, explain_slot
from walstream.router import Router, Rule, TablePattern

SEED: Final = 20261122
TRANSACTIONS: Final = 250
ROUTES: Final = 60


def make_slot(database: Database) -> Config:
    name = f"explain_{secrets.token_hex(4)}"
    database.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", name)
    return parse({"postgres": {"dsn": database.dsn}, "slot": {"name": name}})


def confirmed(database: Database, config: Config) -> Any:
    return database.execute(
        "SELECT confirmed_flush_lsn, active FROM pg_replication_slots WHERE slot_name = %s",
        config.slot.name,
    )


async def explain(config: Config, router: Router, *, limit: int = 1_000_000) -> list[Explained]:
    return [explained async for explained in explain_slot(config, router, limit=limit)]


# ---- Agreement with the real run


@pytest.mark.parametrize("kind", ["tables", "patterns", "everything"])
async def test_explain_and_the_real_run_agree(database: Database, kind: str) -> None:
    """On thousands of changes and random routes: the same for the same routes, counted alike.

    With ``tables`` the server is asked for some tables only, and ids depend on that; a
    transactional route makes a stream ask for ``everything``.
    """
    chance = random.Random(f"{SEED} {kind}")  # noqa: S311 - repeatable
    workload.prepare(database.dsn)
    config = make_slot(database)
    workload.run(database.dsn, SEED, TRANSACTIONS)
    app = Walstream()
    seen: set[tuple[int, str, bytes]] = set()
    specs = [
        {"on": ("public.profiles",), "where": "visits=gte.500", "leaving": True},
        *[random_route(chance, database, patterns=kind == "patterns") for _ in range(ROUTES - 1)],
    ]
    for number, spec in enumerate(specs):
        attach(app, number, spec, seen)
    if kind == "everything":
        database.execute("CREATE TABLE nothing_comes (id int PRIMARY KEY)")
        app.on("public.nothing_comes", transactional=database.dsn)(
            lambda _change, _connection: None
        )
    before = confirmed(database, config)
    router = make_router(config, app.handlers)
    explained = await explain(config, router)
    assert confirmed(database, config) == before
    summary = await app.run(config, until="now")
    kept = {
        (place, explanation.seen.id, explanation.seen.to_json())
        for one in explained
        for place, explanation in enumerate(one.explanations)
        if explanation.seen is not None
    }
    assert kept == seen
    assert_counted_alike(explained, router, summary.routes[:ROUTES])
    assert_is_mixed(explained, kind)


def attach(
    app: Walstream, number: int, spec: dict[str, Any], seen: set[tuple[int, str, bytes]]
) -> None:
    @app.on(*spec.pop("on"), **spec, name=f"route {number}")
    async def keep(change: Change) -> None:
        seen.add((number, change.id, change.to_json()))


def assert_counted_alike(
    explained: list[Explained], router: Router, summaries: tuple[Any, ...]
) -> None:
    """What explanations say adds up to what the run counted."""
    for place, summary in enumerate(summaries):
        rules = Counter(one.explanations[place].rule for one in explained if is_change(one))
        counts = router.counts[place]
        assert summary.matched == counts.matched == rules[Rule.KEPT]
        assert summary.filtered == counts.filtered == rules[Rule.FILTER] + rules[Rule.CHANGED]
        assert summary.absent == counts.absent == rules[Rule.ABSENT]


def is_change(explained: Explained) -> bool:
    return isinstance(explained.item, Change)


def assert_is_mixed(explained: list[Explained], kind: str) -> None:
    """The comparison would say little if nothing was dropped, or everything."""
    changes = [one for one in explained if is_change(one)]
    assert len(changes) > 1000
    rules = Counter(told.rule for one in changes for told in one.explanations)
    assert rules.keys() == {*Rule} - {Rule.PREFIX}
    assert all(not told.kept for one in changes if not one.is_sent for told in one.explanations)
    assert any(not one.is_sent for one in changes) is (kind == "tables")
    kept = [told for one in changes for told in one.explanations if told.seen is not None]
    assert any(told.masked for told in kept)
    assert any(told.left_out for told in kept)
    assert any(told.seen.leaving for told in kept if told.seen is not None)


def random_route(chance: random.Random, database: Database, *, patterns: bool) -> dict[str, Any]:
    """Make a route on one of the workload's tables, of columns that are still there."""
    tables = [one for name, one in workload.make_tables().items() if name != "readings" or patterns]
    table = chance.choice(tables + 2 * [one for one in tables if one.is_full])
    columns = known_columns(database, table)
    pattern = TablePattern(table.schema, table.name)
    if patterns and chance.random() < 0.3:
        pattern = TablePattern(chance.choice([None, table.schema]), None)
    operations = chance.sample(["insert", "update", "delete", "truncate"], chance.randint(0, 3))
    where = [random_condition(chance, *chance.choice(columns)) for _ in range(chance.randint(0, 3))]
    if len(where) > 1 and chance.random() < 0.5:
        where = [f"or({','.join(where)})"]
    names = [name for name, _ in columns]
    return {
        "on": (str(pattern), *operations),
        "where": ",".join(where) or None,
        "changed": chance.sample(names, chance.choice([0, 0, 1, 2])) or None,
        "leaving": chance.random() < 0.5,
        "exclude": chance.sample(names, chance.choice([0, 0, 1])),
        "mask": dict.fromkeys(chance.sample(names, chance.choice([0, 0, 1])), "redact"),
    }


def known_columns(database: Database, table: Table) -> list[tuple[str, Kind]]:
    now = database.execute(
        "SELECT column_name FROM information_schema.columns"
        " WHERE (table_schema, table_name) = (%s, %s)",
        table.schema,
        table.name,
    )
    known = {table.key: Kind.INT, **table.columns}
    return [(name, known[name]) for (name,) in now if name in known]


def random_condition(chance: random.Random, column: str, kind: Kind) -> str:
    quoted = '"' + column.replace("\\", "\\\\").replace('"', '\\"') + '"'
    choices = {
        Kind.BOOL: ["is.true", "eq.false", "is.not_null"],
        Kind.INT: ["gte.0", "lt.500", "not.lt.1000", "in.(0,-1,7)", "isdistinct.0"],
        Kind.NUMERIC: ["gt.0", "eq.0.0", "neq.-1.5"],
        Kind.TEXT: ["like.*e*", 'neq.""', "gt.a", "not.ilike.n*", "is.null", "match.^[a-f0-9]+$"],
        Kind.BIG: ["like.*a*", 'neq.""', "is.not_null"],
        Kind.DAY: ["lt.20", "gte.10"],
        Kind.PARENT: ["is.null", "gt.10"],
    }
    return f"{quoted}={chance.choice(choices[kind])}"


# ---- The slot


@pytest.fixture
def orders(database: Database) -> Database:
    database.execute("CREATE TABLE orders (id int PRIMARY KEY, status text, secret text)")
    database.execute("CREATE TABLE other (id int PRIMARY KEY)")
    return database


def routes(**spec: Any) -> Router:
    app = Walstream()
    app.on("public.orders", **spec)(print)
    return Router(make_router(parse({}), app.handlers).routes)


async def test_a_slot_that_somebody_streams_from_is_not_peeked_at(orders: Database) -> None:
    config = make_slot(orders)
    with streaming(orders, config), pytest.raises(SlotBusy, match="is in use by PID") as busy:
        await explain(config, routes())
    assert "--recording FILE" in busy.value.hint


@contextmanager
def streaming(database: Database, config: Config) -> Iterator[None]:
    """walstream in a process of its own."""
    environment = {
        **os.environ,
        "WALSTREAM_POSTGRES_DSN": database.dsn,
        "WALSTREAM_SLOT_NAME": config.slot.name,
        "WALSTREAM_ROUTES": '[{"table":"*.*","to":"out"}]',
        "WALSTREAM_SINKS": '{"out":{"type":"stdout"}}',
    }
    with subprocess.Popen(
        [sys.executable, "-m", "walstream", "run"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            wait_until(lambda: confirmed(database, config)[0][1])
            yield
        finally:
            process.kill()


async def test_a_slot_that_is_not_there_is_told(orders: Database) -> None:
    config = parse({"postgres": {"dsn": orders.dsn}, "slot": {"name": "nothing_here"}})
    with pytest.raises(SlotMissing, match="the replication slot nothing_here does not exist"):
        await explain(config, routes())


async def test_a_route_that_does_not_fit_is_told(orders: Database) -> None:
    config = make_slot(orders)
    with pytest.raises(ConfigError, match="has no column 'ghost', which is to have changed"):
        await explain(config, routes(changed=["ghost"]))


def test_something_must_be_routed() -> None:
    with pytest.raises(UsageError, match="nothing is routed"):
        make_router(parse({}), [])


async def test_no_more_is_explained_than_was_asked_for(orders: Database) -> None:
    """The server ends with a transaction: that a large one is not held, the cursor sees to."""
    config = make_slot(orders)
    orders.execute("INSERT INTO orders SELECT n, 'new' FROM generate_series(1, 5000) AS n")
    found = await explain(config, routes(), limit=3)
    assert [one.item.ordinal for one in found] == [1, 2, 3]
    assert confirmed(orders, config)[0][1] is False


async def test_what_waits_behind_many_empty_transactions_is_explained(orders: Database) -> None:
    """Each of them is two records; what has been explained is not explained, or counted, again."""
    config = make_slot(orders)
    orders.execute("INSERT INTO orders VALUES (1)")
    for _ in range(200):
        orders.execute("CREATE TEMP TABLE passing (id int); DROP TABLE passing")
    orders.execute("INSERT INTO orders VALUES (2); INSERT INTO orders VALUES (3)")
    router = routes()
    for limit in (5, 1):
        items = [one.item for one in await explain(config, router, limit=limit)]
        ids = [item.row["id"] for item in items if isinstance(item, Change)]
        assert ids == [1, 2, 3][:limit]
    assert router.counts[0].matched == 3 + 1


async def test_a_slot_that_moves_meanwhile_is_told(orders: Database) -> None:
    """What comes behind what was explained would not be the next."""
    config = make_slot(orders)
    orders.execute("INSERT INTO orders VALUES (1)")
    for _ in range(20):
        orders.execute("CREATE TEMP TABLE passing (id int); DROP TABLE passing")
    orders.execute("INSERT INTO orders VALUES (2)")
    found = explain_slot(config, routes(), limit=2)
    assert (await anext(found)).explanations[0].kept
    orders.execute("SELECT pg_replication_slot_advance(%s, pg_current_wal_lsn())", config.slot.name)
    with pytest.raises(SlotBusy, match="was moved"):
        await anext(found)


async def test_what_would_not_run_is_not_explained(orders: Database) -> None:
    """The routes are those of the real run, with its checks of names and of models."""
    config = make_slot(orders)
    twice = Walstream()
    for _ in range(2):
        twice.on("public.orders", name="twice", on_failure="dead_letter")(print)
    with pytest.raises(ConfigError, match="twice: 2 routes have this name"):
        make_router(config, twice.handlers)

    class Wide(BaseModel):
        missing: int

    with pytest.raises(ConfigError, match="the model Wide needs 'missing'"):
        await explain(config, routes(model=Wide))


async def test_ids_are_those_of_the_stream(orders: Database) -> None:
    """What the server is not asked for takes no number; a message in a transaction does."""
    config = make_slot(orders)
    orders.execute(
        """
        BEGIN;
        INSERT INTO other VALUES (1);
        SELECT pg_logical_emit_message(true, 'mail', 'hello');
        INSERT INTO orders VALUES (1, 'new');
        SELECT pg_logical_emit_message(false, 'mail', 'now');
        COMMIT;
        """
    )
    app = Walstream()
    app.on("public.orders")(print)
    app.on_message("ma*")(print)
    router = make_router(config, app.handlers)
    found = await explain(config, router)
    told = {
        ("message" if isinstance(one.item, Message) else str(one.item.relation)): (
            one.item.ordinal,
            one.is_sent,
            [explanation.kept for explanation in one.explanations],
        )
        for one in found
        if not (isinstance(one.item, Message) and one.item.transaction is None)
    }
    assert told == {
        "public.other": (1, False, [False]),
        "message": (1, True, [True]),
        "public.orders": (2, True, [True]),
    }
    (alone,) = [
        one.item for one in found if isinstance(one.item, Message) and one.item.transaction is None
    ]
    assert (alone.content, alone.ordinal) == ("now", 0)


async def test_values_are_printed_as_the_stream_prints_them(database: Database) -> None:
    """Whatever the database's settings are."""
    for setting in ("DateStyle = 'German'", "bytea_output = 'escape'", "TimeZone = 'Asia/Tokyo'"):
        database.execute(f'ALTER DATABASE "{database.name}" SET {setting}')
    database.execute("CREATE TABLE t (id int PRIMARY KEY, day date, at timestamptz, raw bytea)")
    config = make_slot(database)
    database.execute(r"INSERT INTO t VALUES (1, '2026-02-01', '2026-02-01 00:00:00+00', '\x00ff')")
    app = Walstream()
    app.on("public.t", where="day=eq.2026-02-01")(print)
    (one,) = await explain(config, make_router(config, app.handlers))
    seen = one.explanations[0].seen
    assert seen is not None
    assert json.loads(seen.to_json())["row"] == {
        "id": 1,
        "day": "2026-02-01",
        "at": "2026-02-01T00:00:00+00:00",
        "raw": "\\x00ff",
    }


# ---- The command


@pytest.fixture
def command(orders: Database, tmp_path: Path) -> Any:
    config = make_slot(orders)
    (tmp_path / "handlers.py").write_text(
        """
from walstream import Walstream

stream = Walstream()

@stream.on("public.orders", where="status=eq.new", exclude=["id"], mask={"secret": "redact"})
async def send_mail(change): ...

@stream.on("public.orders", "update", changed=["status"])
async def notice(change): ...

@stream.on_message("mail")
async def post(message): ...
"""
    )

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {key: one for key, one in os.environ.items() if "WALSTREAM_" not in key}
        return subprocess.run(
            [sys.executable, "-m", "walstream", "explain", "handlers:stream", *arguments],
            cwd=tmp_path,
            env={
                **environment,
                "PYTHONPATH": str(Path.cwd()),
                "WALSTREAM_POSTGRES_DSN": orders.dsn,
                "WALSTREAM_SLOT_NAME": config.slot.name,
            },
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    orders.execute("INSERT INTO orders VALUES (1, 'new', 'swordfish')")
    orders.execute("UPDATE orders SET status = 'old', secret = 'xyzzy'")
    orders.execute("INSERT INTO other VALUES (1)")
    orders.execute("SELECT pg_logical_emit_message(true, 'mail', 'hello')")
    return run


def test_the_command_tells_which_route_and_why(command: Any) -> None:
    done = command()
    assert done.returncode == 0, done.stderr
    headlines = [line for line in done.stdout.splitlines() if not line.startswith("  ")]
    assert [line.split("  ", maxsplit=1)[-1] for line in headlines] == [
        "insert public.orders",
        "update public.orders",
        "no route needs it: it is not asked of the server",
        "message mail",
    ]
    assert (
        "  kept     send_mail  is for insert of public.orders; the new row passes status=eq.new;"
        " masked: secret (redact); left out: id\n"
    ) in done.stdout
    assert "send_mail  status=eq.new is false for the new row" in done.stdout
    assert "notice     whether 'status' changed is not known" in done.stdout
    assert "kept     post  is for the prefix mail" in done.stdout
    assert "swordfish" not in done.stdout + done.stderr
    assert done.stderr.splitlines() == [
        "send_mail: 1 kept, 1 dropped, 0 dropped for what they do not carry",
        "notice: 0 kept, 0 dropped, 1 dropped for what they do not carry",
        "post: 1 kept",
    ]


def test_the_command_prints_json(command: Any) -> None:
    done = command("--json", "--rows", "--only", "kept", "--limit", "3")
    assert done.returncode == 0, done.stderr
    (line,) = map(json.loads, done.stdout.splitlines())
    (told,) = line.pop("routes")
    assert (line.pop("operation"), line.pop("schema"), line.pop("table")) == (
        "insert",
        "public",
        "orders",
    )
    assert line.pop("sent") is True
    assert told.pop("change")["row"] == {"status": "new", "secret": "[redacted]"}
    assert told == {
        "route": "send_mail",
        "kept": True,
        "rule": "kept",
        "reason": "is for insert of public.orders; the new row passes status=eq.new",
        "left_out": ["id"],
        "masked": {"secret": "redact"},
    }
    assert done.stderr.endswith("looked at 3, and there may be more: --limit\n")


def test_the_command_shows_tables(command: Any) -> None:
    done = command("--table", "*.other", "--only", "dropped", "--json")
    (line,) = map(json.loads, done.stdout.splitlines())
    assert (line["id"], line["table"], line["sent"]) == (None, "other", False)
    assert [told["rule"] for told in line["routes"]] == ["table", "table"]
    assert command("--table", "other").returncode == 64


def test_the_document_shows_what_the_command_prints(database: Database, tmp_path: Path) -> None:
    config = make_shop(database)
    (tmp_path / "handlers.py").write_text(the_block("python", "docs/explain-and-test.md").text)
    environment = {key: one for key, one in os.environ.items() if "WALSTREAM_" not in key}
    done = subprocess.run(
        [sys.executable, "-m", "walstream", "explain", "handlers:stream", "--limit", "3"],
        cwd=tmp_path,
        env={
            **environment,
            "PYTHONPATH": str(Path.cwd()),
            "WALSTREAM_POSTGRES_DSN": database.dsn,
            "WALSTREAM_SLOT_NAME": config.slot.name,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    shown, _ = blocks("text", documents=[ROOT / "docs/explain-and-test.md"])
    assert without_lsns(done.stdout) == without_lsns(shown.text), done.stderr


def make_shop(database: Database) -> Config:
    database.execute(the_block("sql", "docs/filters.md").text)
    config = make_slot(database)
    trade_in_orders(database)
    return config


def trade_in_orders(database: Database) -> None:
    database.execute(
        "INSERT INTO orders (id, status, amount) VALUES (1, 'active', 12.50), (2, 'new', 3)"
    )
    database.execute("UPDATE orders SET amount = 15 WHERE id = 1")


def without_lsns(text: str) -> str:
    return re.sub(r"^[0-9A-F]+/[0-9A-F]+:", "LSN:", text, flags=re.MULTILINE)
