"""Recordings: made by ``walstream tail``, routed again by ``walstream test`` without a database."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

import pytest

from tests import workload
from tests.conftest import StartCluster
from tests.core.test_offline import READ
from tests.postgres import Database, wait_until
from walstream import Change, Message, Walstream
from walstream.assembly import make_router
from walstream.binding import Binding
from walstream.catalog import Catalog
from walstream.changes import Begin
from walstream.config import parse
from walstream.daemon import Daemon
from walstream.decoder import START_OPTIONS, Decoder
from walstream.errors import FilterError, RelationMissing, SinkFailed, UsageError
from walstream.explain import explain_recording
from walstream.filters import Literal
from walstream.lsn import Lsn
from walstream.offline import read_offline
from walstream.postgres import python_encoding
from walstream.recording import Recorder, Recording, RecordingBinding, replay
from walstream.router import Router
from walstream.testing import new_transaction

EVERYTHING: Final = "*.*"


def router_of(app: Walstream) -> Router:
    return make_router(parse({}), app.handlers)


def routing(table: str = EVERYTHING, *operations: str, **route: Any) -> Router:
    app = Walstream()
    app.on(table, *operations, **route)(print)
    return router_of(app)


async def outcome(
    path: Path, router: Router, dsn: str | None = None
) -> list[tuple[str, bytes | str]]:
    """Route a recording; return what each route gets."""
    return [
        (route.name, item.to_json() if isinstance(item, Change) else item.content)
        async for _, routed in replay(Recording(path), router, dsn=dsn)
        for route, item in routed
    ]


class Slot:
    """A slot of a test's database, whose changes are recorded."""

    def __init__(self, database: Database) -> None:
        self.name = f"recording_{secrets.token_hex(4)}"
        self.config = parse({"postgres": {"dsn": database.dsn}, "slot": {"name": self.name}})
        self._database = database
        database.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", self.name)

    async def record(self, path: Path, app: Walstream, limit: int | None = None) -> Recorder:
        """Stream what there is by now."""
        with Recorder(path, limit=limit) as recorder:
            daemon = Daemon(self.config, app.handlers, recorder=recorder, until="now")
            recorder.on_full = daemon.stop
            await daemon.run()
        return recorder


@pytest.fixture
def orders(database: Database) -> Database:
    database.execute(
        """
        CREATE TYPE mood AS ENUM ('sad', 'happy');
        CREATE DOMAIN price AS numeric CHECK (VALUE >= 0);
        CREATE TYPE pair AS (number int, mood mood);
        CREATE TABLE orders (
            id int PRIMARY KEY, status text, amount price, mood mood, pair pair, tags mood[]
        );
        """
    )
    return database


def trade(database: Database) -> None:
    database.execute(
        """
        BEGIN;
        INSERT INTO orders VALUES (1, 'new', 1.50, 'sad', '(1,happy)', '{sad,happy}');
        INSERT INTO orders VALUES (2, 'new', 20, 'happy', NULL, NULL);
        COMMIT;
        """
    )
    database.execute("UPDATE orders SET status = 'old' WHERE id = 1")
    database.execute("DELETE FROM orders WHERE id = 1")


# ---- What comes out is what went in


async def test_a_replay_gives_what_the_stream_gave(database: Database, tmp_path: Path) -> None:
    """On the random workload: tables that change their form, partitions, all kinds of records."""
    workload.prepare(database.dsn)
    slot = Slot(database)
    workload.run(database.dsn, 20261123, 300)
    app = Walstream()
    seen: list[tuple[str, bytes | str]] = []

    def attach(name: str, table: str, *operations: str, **spec: Any) -> None:
        @app.on(table, *operations, **spec, name=name)
        def keep(change: Change) -> None:
            seen.append((name, change.to_json()))

    attach("all", EVERYTHING)
    attach("updates", "public.*", "update", changed=["balance", "day"])
    attach("readings", "public.readings", where="value=gte.10", exclude=["remark"])
    attach("profiles", "public.profiles", where="id=lt.500", leaving=True, mask={"bio": "redact"})

    @app.on_message("work*", name="messages")
    def keep_message(message: Message) -> None:
        seen.append(("messages", message.content))

    path = tmp_path / "recording"
    recorder = await slot.record(path, app)
    names = ["all", "updates", "readings", "profiles", "messages"]
    replayed = await outcome(path, router_of(app))
    assert recorder.changes > 300
    for name in names:
        found = [what for route, what in replayed if route == name]
        assert found == [what for route, what in seen if route == name]
        assert found


async def test_a_recording_has_the_types_that_it_needs(orders: Database, tmp_path: Path) -> None:
    """Values load, print and compare without a database."""
    slot = Slot(orders)
    trade(orders)
    app = Walstream()
    app.on("public.orders")(lambda _: None)
    await slot.record(tmp_path / "recording", app)
    router = routing(where="mood=lt.happy,amount=lte.1.5,tags=is.not_null")
    rows = [
        change.row
        async for _, routed in replay(Recording(tmp_path / "recording"), router)
        for _, change in routed
        if isinstance(change, Change)
    ]
    assert [row["id"] for row in rows] == [1, 1]
    assert rows[0]["tags"] == ["sad", "happy"]
    assert rows[0]["pair"].mood == "happy"
    assert str(rows[0]["amount"]) == "1.50"


async def test_a_recording_is_explained_too(orders: Database, tmp_path: Path) -> None:
    slot = Slot(orders)
    trade(orders)
    orders.execute("SELECT pg_logical_emit_message(true, 'mail', 'hello')")
    app = Walstream()
    app.on("public.orders")(lambda _: None)
    app.on_message("*")(lambda _: None)
    await slot.record(tmp_path / "recording", app)
    router = routing(where="amount=gte.10")
    told = [
        (one.explanations[0].kept, one.explanations[0].reason) if one.explanations else None
        async for one in explain_recording(tmp_path / "recording", router)
    ]
    assert told == [
        (False, "amount=gte.10 is false for the new row"),
        (True, "is for insert of *.*; the new row passes amount=gte.10"),
        (False, "amount=gte.10 is false for the new row"),
        (False, "amount=gte.10: the identity does not carry 'amount'"),
        None,
    ]


async def test_tables_that_no_route_wants_are_left_out(orders: Database, tmp_path: Path) -> None:
    """A pattern makes the server send them all. What a filter drops is there."""
    orders.execute("CREATE SCHEMA private; CREATE TABLE private.t (id int PRIMARY KEY)")
    slot = Slot(orders)
    trade(orders)
    orders.execute("INSERT INTO private.t VALUES (4711)")
    app = Walstream()
    app.on("public.*", where="id=eq.99")(lambda _: None)
    recorder = await slot.record(tmp_path / "recording", app)
    assert recorder.changes == 4
    assert b"4711" not in (tmp_path / "recording").read_bytes()
    assert len(await outcome(tmp_path / "recording", routing())) == 4


async def test_a_table_that_becomes_a_partition_is_recorded_as_one(
    database: Database, tmp_path: Path
) -> None:
    database.execute(
        """
        CREATE TABLE whole (id int PRIMARY KEY) PARTITION BY RANGE (id);
        CREATE TABLE part (id int PRIMARY KEY);
        """
    )
    slot = Slot(database)
    database.execute("INSERT INTO part VALUES (1)")
    app = Walstream()
    app.on("public.*")(lambda _: None)
    app.on("public.whole")(lambda _: None)
    path = tmp_path / "recording"
    catalog = Catalog(database.dsn, application_name="test")
    with Recorder(path) as recorder:
        router = router_of(app)
        binding = RecordingBinding(
            catalog, Decoder(), router, follow_partitions=True, recorder=recorder
        )
        await catalog.partitions_changed()
        await pass_through(binding, records(database, slot))
        database.execute("ALTER TABLE whole ATTACH PARTITION part FOR VALUES FROM (1) TO (9)")
        database.execute("SELECT pg_replication_slot_advance(%s, pg_current_wal_lsn())", slot.name)
        database.execute("INSERT INTO part VALUES (2)")
        await pass_through(binding, records(database, slot))
    await catalog.close()
    found = await outcome(path, routing("public.whole"))
    assert [json.loads(line)["row"]["id"] for _, line in found] == [2]


def records(database: Database, slot: Slot) -> list[bytes]:
    options = [text for option in START_OPTIONS.items() for text in option]
    rows = database.execute(
        "SELECT data FROM pg_logical_slot_peek_changes(%s, NULL, NULL, VARIADIC %s::text[])",
        slot.name,
        options,
    )
    return [data.encode() for (data,) in rows]


async def pass_through(binding: Binding, records: Sequence[bytes]) -> None:
    """Do what a session does with a batch."""
    binding.begin_batch()
    for record in records:
        decoded = binding.decode(record)
        if decoded is None:
            decoded = await binding.learn(record)
        if isinstance(decoded, Change) and binding.route(decoded) is None:
            await binding.route_anew(decoded)


async def test_records_of_another_encoding_are_written_in_utf_8(
    private_cluster: StartCluster, tmp_path: Path
) -> None:
    cluster = private_cluster(encoding="LATIN1")
    with Database(cluster.conninfo(), "postgres") as database:
        database.execute("CREATE TABLE t (id int PRIMARY KEY, text text)")
        slot = Slot(database)
        database.execute(r"INSERT INTO t VALUES (1, U&'Gr\00F6\00DFe')")
        assert python_encoding("LATIN1") == "latin1"
        app = Walstream()
        app.on("public.t")(lambda _: None)
        await slot.record(tmp_path / "recording", app)
    ((_, line),) = await outcome(tmp_path / "recording", routing(where="text=eq.Größe"))
    assert json.loads(line)["row"]["text"] == "Größe"


# ---- The file


async def test_nobody_else_may_read_it(orders: Database, tmp_path: Path) -> None:
    """Nor is one overwritten."""
    path = tmp_path / "recording"
    with Recorder(path):
        pass
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(UsageError, match="is there already"):
        Recorder(path)
    with pytest.raises(UsageError, match="cannot be made: No such file"):
        Recorder(tmp_path / "nowhere" / "recording")
    assert await outcome(path, routing()) == []


def test_an_error_leaves_no_empty_recording_behind(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Recorder(tmp_path / "recording"):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it is written, and when what is held back is."""

    def on_full_disk(_: int, mode: str, **options: Any) -> IO[Any]:
        return open(os.open("/dev/full", os.O_RDWR), mode, **options)  # noqa: PTH123

    told = "the recording .* cannot be written: No space left"
    with monkeypatch.context() as patched:
        patched.setattr(os, "fdopen", on_full_disk)
        with pytest.raises(SinkFailed, match=told), Recorder(tmp_path / "held back"):
            pass
        recorder = Recorder(tmp_path / "at once")
        large = Message("", "", Lsn(1))
        with pytest.raises(SinkFailed, match=told):
            recorder.record(b"1" * 1_000_000, large)
        with pytest.raises(SinkFailed, match=told):
            recorder.close()
        recorder = Recorder(tmp_path / "at the next session")
        begin = Begin(new_transaction())
        recorder.record(b"1", begin)
        with pytest.raises(SinkFailed, match=told) as failed:
            recorder.record(b"1", begin)
        assert "see to its disk" in failed.value.hint
        with pytest.raises(SinkFailed, match=told):
            recorder.close()


async def test_it_ends_with_the_transaction_in_which_the_limit_is_reached(
    orders: Database, tmp_path: Path
) -> None:
    slot = Slot(orders)
    trade(orders)
    app = Walstream()
    app.on("public.orders")(lambda _: None)
    recorder = await slot.record(tmp_path / "recording", app, limit=1)
    assert recorder.changes == 2
    assert len(await outcome(tmp_path / "recording", routing())) == 2


@pytest.mark.parametrize("cut", [1, 60, 400])
async def test_a_transaction_without_its_end_is_not_read(
    orders: Database, tmp_path: Path, cut: int
) -> None:
    """The process was killed while it wrote."""
    slot = Slot(orders)
    trade(orders)
    app = Walstream()
    app.on("public.orders")(lambda _: None)
    path = tmp_path / "recording"
    await slot.record(path, app)
    path.write_bytes(path.read_bytes()[:-cut])
    assert len(await outcome(path, routing())) == 3


async def test_a_new_session_begins_where_the_last_whole_transaction_ended(
    orders: Database, tmp_path: Path
) -> None:
    """What was cut comes again, with its types and shapes."""
    slot = Slot(orders)
    trade(orders)
    path = tmp_path / "recording"
    catalog = Catalog(orders.dsn, application_name="test")
    came = records(orders, slot)
    router = routing("public.orders")
    with Recorder(path) as recorder:
        for received in (came[:2], came, came[:-1]):
            binding = RecordingBinding(
                catalog, Decoder(), router, follow_partitions=False, recorder=recorder
            )
            await pass_through(binding, received)
        assert recorder.changes == 4 + 3
    await catalog.close()
    assert len(await outcome(path, routing(where="mood=is.not_null"))) == 3 + 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "line 1: not what a recording holds"),
        ("hello\n", "line 1: not what a recording holds"),
        ('{"line":"types","types":[]}\n', "line 1: not what a recording holds"),
        ('{"line":"recording","version":2}\n', "is a recording of version 2, not of 1"),
        ('{"line":"recording","version":1}\n{}\n', "line 2: not what a recording holds"),
        (
            '{"line":"recording","version":1}\n{"line":"record","record":1}\n',
            "line 2: not what a recording holds",
        ),
    ],
)
def test_what_is_no_recording_is_refused(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "recording"
    path.write_text(content)
    with pytest.raises(UsageError, match=said):
        Recording(path)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        Recording(tmp_path / "recording")


async def test_a_record_before_its_shape_is_told(orders: Database, tmp_path: Path) -> None:
    slot = Slot(orders)
    trade(orders)
    app = Walstream()
    app.on("public.orders")(lambda _: None)
    path = tmp_path / "recording"
    await slot.record(path, app)
    lines = [line for line in path.read_text().splitlines() if '"line":"layout"' not in line]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UsageError, match=r"a record of public\.orders before its shape"):
        await outcome(path, routing())


# ---- Filters without a server


@pytest.fixture
async def recorded(orders: Database, tmp_path: Path) -> Path:
    slot = Slot(orders)
    trade(orders)
    app = Walstream()
    app.on("public.orders")(lambda _: None)
    await slot.record(tmp_path / "recording", app)
    return tmp_path / "recording"


async def test_a_value_that_only_a_server_can_read_needs_one(
    recorded: Path, orders: Database
) -> None:
    router = routing("public.orders", where="amount=gte.1e1")
    with pytest.raises(UsageError, match="only a server can read '1e1'") as refused:
        await outcome(recorded, router)
    assert "--dsn" in refused.value.hint
    assert len(await outcome(recorded, router, orders.dsn)) == 1
    with pytest.raises(FilterError, match="invalid input syntax"):
        await outcome(recorded, routing("public.orders", where="amount=gte.x"), orders.dsn)


async def test_a_pattern_does_not_hide_what_only_a_server_can_read(recorded: Path) -> None:
    with pytest.raises(UsageError, match="only a server can read 'angry'"):
        await outcome(recorded, routing("public.*", where="mood=eq.angry"))


@pytest.mark.parametrize(
    ("route", "error"),
    [
        ({"where": "ghost=eq.1"}, FilterError),
        ({"changed": ["ghost"]}, RelationMissing),
        ({"include": ["ghost"]}, RelationMissing),
    ],
)
async def test_a_route_that_does_not_fit_its_table_is_told(
    recorded: Path, route: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error, match="no column 'ghost'"):
        await outcome(recorded, routing("public.orders", **route))


async def test_what_is_read_without_a_server_is_what_a_server_reads(database: Database) -> None:
    """Compared as filters compare: by their keys."""
    database.execute("CREATE TYPE mood AS ENUM ('sad', 'happy'); CREATE EXTENSION citext")
    catalog = Catalog(database.dsn, application_name="test")
    for type_name, text, _ in READ:
        where = "public" if type_name in ("mood", "citext") else "pg_catalog"
        ((oid,),) = database.execute(
            "SELECT oid::bigint FROM pg_type WHERE typname = %s"
            " AND typnamespace = %s::regnamespace",
            type_name,
            where,
        )
        await catalog.learn_types([oid])
        literal = Literal("column", oid, catalog.types.name(oid), text)
        (read,) = (await catalog.normalise([literal])).values()
        offline = read_offline(literal, catalog.types)
        assert offline is not None
        key = catalog.types.comparable(oid)
        assert key(offline) == key(read), (type_name, text)
    await catalog.close()


# ---- The commands


class Commands:
    """Runs walstream in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **{key: one for key, one in os.environ.items() if not key.startswith("WALSTREAM_")},
            "PYTHONPATH": str(Path.cwd()),
        }

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "walstream", *arguments],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    @contextmanager
    def running(self, database: Database, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """Run a command that streams when this begins."""
        with subprocess.Popen(
            [sys.executable, "-m", "walstream", *arguments, "--dsn", database.dsn],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                wait_until(lambda: is_streaming(database))
                yield process
            finally:
                process.kill()


def is_streaming(database: Database) -> bool:
    return bool(
        database.execute(
            "SELECT 1 FROM pg_replication_slots JOIN pg_stat_replication ON pid = active_pid"
            " WHERE state IN ('catchup', 'streaming') AND database = %s",
            database.name,
        )
    )


@pytest.fixture
def commands(tmp_path: Path) -> Commands:
    (tmp_path / "handlers.py").write_text(
        """
from walstream import Walstream

stream = Walstream()

@stream.on("public.orders", "insert", where="amount=gte.10", mask={"status": "redact"})
async def send_mail(change): raise RuntimeError("handlers are not called")

@stream.on_message("mail")
async def post(message): raise RuntimeError("handlers are not called")
"""
    )
    return Commands(tmp_path)


def test_a_recording_is_made_tried_and_compared(orders: Database, commands: Commands) -> None:
    """tail --record, then test: prints, writes what is expected, finds the difference (65)."""
    arguments = ("tail", "public.orders", "--record", "recording", "--limit", "4")
    with commands.running(orders, *arguments) as process:
        trade(orders)
        printed, told = process.communicate(timeout=30)
    assert (process.returncode, printed) == (0, "")
    assert told.endswith("recorded 4 changes in recording\n")

    done = commands.run("test", "recording", "handlers:stream")
    assert done.returncode == 0, done.stderr
    (line,) = map(json.loads, done.stdout.splitlines())
    assert (line["route"], line["change"]["row"]["status"]) == ("send_mail", "[redacted]")
    assert done.stderr == (
        "send_mail: 1 kept, 1 dropped, 0 dropped for what they do not carry\npost: 0 kept\n"
    )

    expect = ("test", "recording", "handlers:stream", "--expect", "expected.jsonl")
    assert commands.run(*expect).returncode == 64
    assert commands.run(*expect, "--write").returncode == 0
    assert (commands.folder / "expected.jsonl").read_text() == done.stdout
    same = commands.run(*expect)
    assert (same.returncode, same.stdout) == (0, "")

    handlers = commands.folder / "handlers.py"
    handlers.write_text(handlers.read_text().replace("gte.10", "gte.1"))
    other = commands.run(*expect)
    assert other.returncode == 65
    first, second, _, added, kept = other.stdout.splitlines()
    assert (first, second) == ("--- expected.jsonl", "+++ recording")
    assert added.startswith('+{"route":"send_mail"')
    assert kept == f" {done.stdout}".rstrip()


def test_ctrl_c_ends_a_recording_with_a_whole_transaction(
    orders: Database, commands: Commands
) -> None:
    arguments = ("tail", "--record", "recording", "--json")
    with commands.running(orders, *arguments) as process:
        trade(orders)
        assert process.stdout is not None
        shown = [json.loads(process.stdout.readline()) for _ in range(4)]
        process.send_signal(signal.SIGINT)
        process.wait(30)
    assert [line["operation"] for line in shown] == ["insert", "insert", "update", "delete"]
    replayed = asyncio.run(outcome(commands.folder / "recording", routing()))
    assert [json.loads(line) for _, line in replayed] == shown


def test_tail_ends_after_so_many_changes(orders: Database, commands: Commands) -> None:
    with commands.running(orders, "tail", "--limit", "3") as process:
        trade(orders)
        printed, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert len(printed.splitlines()) == 3


def test_messages_are_tried_too(orders: Database, commands: Commands) -> None:
    with commands.running(orders, "tail", "--record", "recording", "--limit", "1") as process:
        orders.execute(
            """
            BEGIN;
            SELECT pg_logical_emit_message(true, 'mail', 'hello');
            INSERT INTO orders (id) VALUES (1);
            COMMIT;
            """
        )
        process.wait(30)
    done = commands.run("test", "recording", "handlers:stream")
    (line,) = map(json.loads, done.stdout.splitlines())
    assert line["route"] == "post"
    assert {**line["message"], "id": None} == {"id": None, "prefix": "mail", "content": "hello"}


def test_wrong_files_are_told(commands: Commands) -> None:
    (commands.folder / "empty").write_text('{"line":"recording","version":1}\n')
    (commands.folder / "binary").write_bytes(b"\xff\n")
    test = ("test", "empty", "handlers:stream")
    assert "does not say where to" in commands.run(*test, "--write").stderr
    assert "is not UTF-8" in commands.run(*test, "--expect", "binary").stderr
    written = commands.run(*test, "--expect", "nowhere/expected", "--write")
    assert (written.returncode, "cannot be written" in written.stderr) == (64, True)
    assert commands.run("explain", "handlers:stream", "--recording", "empty").returncode == 0
