"""Slow handlers, large transactions, quiet databases, a server that shuts down."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import StartCluster
from tests.postgres import Database, async_wait_until, create_database, wait_until
from tests.streaming import Stream
from walstream import Change, Lsn, Walstream
from walstream.cluster import PrivateCluster
from walstream.config import parse
from walstream.errors import SlotLost

IMPATIENT = {"wal_sender_timeout": "2s", "autovacuum": "off", "max_wal_size": "8GB"}
THREE_TIMEOUTS_SECONDS = 6.0


@pytest.fixture(scope="module")
def impatient(module_private_cluster: StartCluster) -> PrivateCluster:
    """A server that cuts a silent walsender off after two seconds."""
    return module_private_cluster(IMPATIENT)


@pytest.fixture
def impatient_database(impatient: PrivateCluster) -> Iterator[Database]:
    with create_database(impatient.conninfo(), "template0") as database:
        database.execute("CREATE TABLE t (id int PRIMARY KEY, v text)")
        database.execute("ALTER TABLE t REPLICA IDENTITY FULL")
        yield database


class Sleeper:
    """A handler that sleeps for a while with its first change, in the loop or in a thread."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.holding = threading.Event()
        self.changes: list[Change] = []
        self.woken = False

    async def in_the_loop(self, change: Change) -> None:
        self._hold(change)
        await asyncio.sleep(self.seconds)
        self.woken = True

    def in_a_thread(self, change: Change) -> None:
        self._hold(change)
        time.sleep(self.seconds)
        self.woken = True

    def _hold(self, change: Change) -> None:
        self.changes.append(change)
        self.holding.set()


@pytest.mark.parametrize("kind", ["in_the_loop", "in_a_thread"])
async def test_a_slow_handler_keeps_the_connection_and_holds_the_slot(
    impatient_database: Database, kind: str
) -> None:
    """Three times wal_sender_timeout: one session, and nothing confirmed before it is taken."""
    stream = Stream(impatient_database)
    sleeper = Sleeper(THREE_TIMEOUTS_SECONDS)
    stream.app.on("public.t")(getattr(sleeper, kind))
    impatient_database.execute("INSERT INTO t VALUES (1)")
    running = asyncio.create_task(stream.drain())
    await async_wait_until(sleeper.holding.is_set)
    end_lsn = sleeper.changes[0].end_lsn
    looked = 0
    while not running.done():
        position = Lsn.parse(stream.confirmed_flush_lsn())
        if sleeper.woken:  # taken by now
            break
        assert position < end_lsn
        looked += 1
        await asyncio.wait({running}, timeout=0.1)
    summary = await running
    assert looked > 20
    assert (summary.sessions, len(sleeper.changes)) == (1, 1)
    assert Lsn.parse(stream.confirmed_flush_lsn()) >= end_lsn


async def test_a_filtered_transaction_of_three_million_rows_passes(
    impatient_database: Database,
) -> None:
    """wal2json 2.5 is silent while it skips changes; status updates keep the walsender alive."""
    stream = Stream(impatient_database)
    stream.record("public.t")
    impatient_database.execute("CREATE TABLE other (id int)")
    impatient_database.execute("INSERT INTO other SELECT generate_series(1, 3000000)")
    impatient_database.execute("INSERT INTO t VALUES (1)")
    summary = await stream.drain()
    assert (summary.sessions, len(stream.changes)) == (1, 1)


def test_a_transaction_of_two_million_rows_passes_in_constant_memory(
    impatient_database: Database, tmp_path: Path
) -> None:
    """Under 120 MB resident, and flat: what is read is handed on, never collected."""
    stream = Stream(impatient_database)
    impatient_database.execute("INSERT INTO t SELECT g, 'x' FROM generate_series(1, 2000000) g")
    (tmp_path / "counting.py").write_text(
        "from walstream import Walstream\n"
        "stream = Walstream()\n"
        "@stream.on('public.t')\n"
        "async def count(change): pass\n"
    )
    with walstream(stream, tmp_path, "run", "counting:stream", "--until", "now") as process:
        samples = []
        while process.poll() is None:
            samples.append(resident_megabytes(process.pid))
            time.sleep(0.1)
    assert process.returncode == 0
    warm = samples[len(samples) // 4 : -2]
    assert len(warm) > 10
    assert max(samples) < 120, samples
    assert max(warm) - min(warm) < 10, warm
    ((waiting,),) = impatient_database.execute(
        "SELECT count(*) FROM pg_logical_slot_peek_changes(%s, NULL, NULL,"
        " 'format-version', '2', 'add-tables', 'public.t')",
        stream.slot,
    )
    assert waiting == 0


async def test_an_idle_database_does_not_hold_back_its_neighbours_wal(
    impatient: PrivateCluster, impatient_database: Database
) -> None:
    """Its slot advances with what the neighbour writes."""
    stream = Stream(impatient_database)
    stream.record("public.t")
    running = asyncio.create_task(stream.app.run(stream.config))
    with create_database(impatient.conninfo(), "template0") as neighbour:
        neighbour.execute("CREATE TABLE busy (id int)")
        neighbour.execute("INSERT INTO busy SELECT generate_series(1, 1000)")
        ((target,),) = neighbour.execute("SELECT pg_current_wal_flush_lsn()::text")
        await async_wait_until(lambda: Lsn.parse(stream.confirmed_flush_lsn()) >= Lsn.parse(target))
    stream.app.stop()
    assert (await running).changes == 0


@pytest.mark.parametrize("kind", ["in_the_loop", "in_a_thread"])
async def test_a_server_under_load_shuts_down_and_the_stream_goes_on_afterwards(
    private_cluster: StartCluster, kind: str
) -> None:
    """``pg_ctl stop -m fast`` ends within the drain deadline while a change is in flight."""
    cluster = private_cluster()
    with create_database(cluster.conninfo(), "template0") as database:
        database.execute("CREATE TABLE t (id int PRIMARY KEY)")
        stream = Stream(database, stream={"drain_seconds": 3, "after_shutdown_seconds": 0.2})
        sleeper = Sleeper(8)
        stream.app.on("public.t")(getattr(sleeper, kind))
        database.execute("INSERT INTO t VALUES (1)")
        database.execute("INSERT INTO t SELECT generate_series(2, 50000)")
        running = asyncio.create_task(stream.app.run(stream.config))
        await async_wait_until(sleeper.holding.is_set)
        database.close()
        begun = time.monotonic()
        await asyncio.to_thread(cluster.stop, "fast")
        assert time.monotonic() - begun < 3 + 3
        sleeper.seconds = 0
        cluster.start()
        await async_wait_until(lambda: len(sleeper.changes) >= 50_001, timeout_seconds=60)
        ids = [change.row["id"] for change in sleeper.changes]
        assert sorted(set(ids)) == list(range(1, 50_001))
        stream.app.stop()
        await running
        database.close()


async def test_a_server_shuts_down_in_the_middle_of_a_large_transaction(
    private_cluster: StartCluster,
) -> None:
    """No single handler takes long, but the server's wish stands behind all the changes."""
    cluster = private_cluster()
    with create_database(cluster.conninfo(), "template0") as database:
        database.execute("CREATE TABLE t (id int PRIMARY KEY, v text)")
        stream = Stream(database, stream={"drain_seconds": 2, "after_shutdown_seconds": 0.2})
        sleeper = Sleeper(0.005)
        stream.app.on("public.t")(sleeper.in_the_loop)
        database.execute("INSERT INTO t SELECT g, repeat('x', 500) FROM generate_series(1,20000) g")
        running = asyncio.create_task(stream.app.run(stream.config))
        await async_wait_until(sleeper.holding.is_set)
        database.close()
        begun = time.monotonic()
        await asyncio.to_thread(cluster.stop, "fast")
        assert time.monotonic() - begun < 2 + 4
        sleeper.seconds = 0
        cluster.start()
        await async_wait_until(
            lambda: {change.row["id"] for change in sleeper.changes} == set(range(1, 20001)),
            timeout_seconds=60,
        )
        stream.app.stop()
        await running
        database.close()


async def test_timers_go_off_while_a_backlog_is_delivered(database: Database) -> None:
    """Handlers that never wait, and a socket that is never empty, must not starve the loop."""
    database.execute("CREATE TABLE t (id int PRIMARY KEY, v text)")
    stream = Stream(database)
    seen_at: list[int] = []

    @stream.app.on("public.t")
    async def note(change: Change) -> None:
        seen_at.append(ticks)

    database.execute("INSERT INTO t SELECT g, repeat('x', 500) FROM generate_series(1, 20000) g")
    ticks = 0
    running = asyncio.create_task(stream.drain())
    while not running.done():
        ticks += 1
        await asyncio.sleep(0)
    await running
    assert len(seen_at) == 20_000
    longest_hold = max(seen_at.count(tick) for tick in set(seen_at))
    assert longest_hold <= 1_000


async def test_a_slot_that_vanished_is_not_made_again_in_silence(database: Database) -> None:
    """Not even with create = true: what was committed in between would be missing."""
    database.execute("CREATE TABLE t (id int PRIMARY KEY)")
    stream = Stream(database, stream={"reconnect_seconds": 0.2})
    stream.config = stream.config.model_copy(
        update={"slot": stream.config.slot.model_copy(update={"create": True})}
    )
    stream.record("public.t")
    running = asyncio.create_task(stream.app.run(stream.config))
    database.execute("INSERT INTO t VALUES (1)")
    await async_wait_until(lambda: stream.changes)
    ((pid,),) = database.execute(
        "SELECT active_pid FROM pg_replication_slots WHERE slot_name = %s", stream.slot
    )
    database.execute("SELECT pg_terminate_backend(%s, 5000)", pid)
    database.execute("SELECT pg_drop_replication_slot(%s)", stream.slot)
    with pytest.raises(SlotLost, match="was there and is gone"):
        await running


async def test_a_stop_while_connecting_ends_at_once() -> None:
    """There is nothing to finish."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        app = Walstream()

        @app.on("*.*")
        async def never(change: Change) -> None:
            """Never called."""

        config = parse({"postgres": {"dsn": f"host=127.0.0.1 port={port} user=x dbname=x"}})
        running = asyncio.create_task(app.run(config))
        accepted, _ = await asyncio.to_thread(silent.accept)
        with accepted:
            app.stop()
            async with asyncio.timeout(5):
                await running


def test_a_signal_drains_confirms_and_exits_with_zero(database: Database, tmp_path: Path) -> None:
    """The transaction in hand is finished, the next one comes at the next start."""
    stream = Stream(database)
    database.execute("CREATE TABLE t (id int PRIMARY KEY)")
    (tmp_path / "slow.py").write_text(
        "import asyncio\n"
        "from walstream import Walstream\n"
        "stream = Walstream()\n"
        "@stream.on('public.t')\n"
        "async def slow(change):\n"
        "    print(change.row['id'], flush=True)\n"
        "    await asyncio.sleep(1)\n"
    )
    database.execute("INSERT INTO t VALUES (1), (2)")
    database.execute("INSERT INTO t VALUES (3)")
    with walstream(stream, tmp_path, "run", "slow:stream", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"1\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == b"2\n"
    assert process.returncode == 0
    ((left,),) = database.execute(
        "SELECT count(*) FROM pg_logical_slot_peek_changes(%s, NULL, NULL,"
        " 'format-version', '2') WHERE data LIKE '%%\"action\":\"I\"%%'",
        stream.slot,
    )
    assert left == 1


def test_a_second_signal_exits_at_once(database: Database, tmp_path: Path) -> None:
    """Nobody waits for a handler that does not return."""
    stream = Stream(database)
    database.execute("CREATE TABLE t (id int PRIMARY KEY)")
    (tmp_path / "stuck.py").write_text(
        "import threading\n"
        "from walstream import Walstream\n"
        "stream = Walstream()\n"
        "@stream.on('public.t')\n"
        "def stuck(change):\n"
        "    print('stuck', flush=True)\n"
        "    threading.Event().wait()\n"
    )
    database.execute("INSERT INTO t VALUES (1)")
    with walstream(stream, tmp_path, "run", "stuck:stream", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"stuck\n"
        process.send_signal(signal.SIGINT)
        log = (tmp_path / "log").read_text
        wait_until(lambda: '"stopping"' in log())
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=5) == 128 + signal.SIGINT


def test_a_handler_that_is_stuck_gives_the_slot_up(database: Database, tmp_path: Path) -> None:
    """Another process may have more luck; the exit code says try again."""
    stream = Stream(database)
    database.execute("CREATE TABLE t (id int PRIMARY KEY)")
    (tmp_path / "stuck.py").write_text(
        "import threading\n"
        "from walstream import Walstream\n"
        "stream = Walstream()\n"
        "@stream.on('public.t')\n"
        "def stuck(change):\n"
        "    threading.Event().wait()\n"
    )
    (tmp_path / "walstream.toml").write_text("[stream]\nrelease_after_seconds = 1.5\n")
    database.execute("INSERT INTO t VALUES (1)")
    with walstream(stream, tmp_path, "run", "stuck:stream") as process:
        assert process.wait(timeout=20) == 75
    assert "stuck has held change" in (tmp_path / "log").read_text()


def test_a_record_that_does_not_decode_stops_the_stream_before_its_transaction(
    private_cluster: StartCluster, tmp_path: Path
) -> None:
    """With its position and its length, never its content; what came before it is taken."""
    cluster = private_cluster(encoding="SQL_ASCII")
    with create_database(cluster.conninfo(), "template0") as database:
        database.execute("SET client_encoding TO sql_ascii; CREATE TABLE t (v text)")
        stream = Stream(database)
        database.execute("INSERT INTO t VALUES ('good')")
        database.execute(r"INSERT INTO t VALUES (E'secret \xff')")
        database.execute("INSERT INTO t VALUES ('later')")
        (tmp_path / "walstream.toml").write_text(
            "[sinks.out]\ntype = 'stdout'\n[[routes]]\ntable = 'public.t'\nto = 'out'\n"
        )
        for expected in (1, 0):
            with walstream(
                stream, tmp_path, "run", "--until", "now", stdout=subprocess.PIPE
            ) as process:
                assert process.stdout is not None
                assert len(process.stdout.readlines()) == expected
            assert process.returncode == 70
            log = (tmp_path / "log").read_text()
            assert re.search(r"DecodeError: at [0-9A-F]+/[0-9A-F]+: a record of \d+ bytes", log)
            assert "secret" not in log


def walstream(
    stream: Stream, folder: Path, *arguments: str, **options: Any
) -> subprocess.Popen[bytes]:
    """Run the command line in a folder; its log goes to the file ``log``."""
    environment = {
        **os.environ,
        "WALSTREAM_POSTGRES_DSN": stream.database.dsn,
        "WALSTREAM_SLOT_NAME": stream.slot,
        "PYTHONPATH": os.pathsep.join([str(Path.cwd()), str(folder)]),
    }
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "walstream", *arguments],
            cwd=folder,
            env=environment,
            stderr=log,
            **options,
        )


def resident_megabytes(pid: int) -> float:
    """Return the resident memory of a process, 0 when it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
