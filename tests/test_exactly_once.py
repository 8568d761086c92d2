"""A transactional handler applies each change once, whatever is killed and whenever."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self

import psycopg
import pytest

from tests.conftest import StartCluster
from walstream import Change, Walstream, config
from walstream.cluster import PrivateCluster
from walstream.errors import ProgressUnfit

ROOT: Final = Path(__file__).parent.parent

SEED: Final = int(os.environ.get("WALSTREAM_KILL_SEED") or random.SystemRandom().getrandbits(32))
"""Decides on the workload and on the moments; left to chance unless it is given."""

CHANGES: Final = 10_000
KEYS: Final = 300
LONGEST: Final = 60
"""Changes in a transaction, at most."""

STARTING_SECONDS: Final = 1.0
APPLYING_SECONDS: Final = 2.0

SLOT: Final = "exactly_once"

SOURCE: Final = """
    CREATE TABLE source (key int PRIMARY KEY, value int NOT NULL);
    CREATE TABLE journal (key int NOT NULL);
    CREATE FUNCTION write_journal() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            INSERT INTO journal VALUES (coalesce(NEW.key, OLD.key));
            RETURN NULL;
        END
    $$;
    CREATE TRIGGER journal AFTER INSERT OR UPDATE OR DELETE ON source
        FOR EACH ROW EXECUTE FUNCTION write_journal();
"""
"""The journal tells how many changes of each key were committed, also when a crash left it open."""

MIRRORS: Final = ("one_by_one", "in_batches")

TARGET: Final = "".join(
    f"CREATE TABLE {mirror} (key int PRIMARY KEY, value int NOT NULL);"
    f"CREATE TABLE {mirror}_tally (key int PRIMARY KEY, applied int NOT NULL);"
    for mirror in MIRRORS
)

HANDLERS: Final = """
from walstream import Change, Walstream

TARGET = {target!r}
stream = Walstream()

def statements(mirror, change):
    "None of them can be run twice without a trace."
    key = change.key["key"]
    match change.operation:
        case "insert":
            yield f"INSERT INTO {{mirror}} VALUES (%s, %s)", (key, change.row["value"])
        case "update":
            yield f"UPDATE {{mirror}} SET value = %s WHERE key = %s", (change.row["value"], key)
        case "delete":
            yield f"DELETE FROM {{mirror}} WHERE key = %s", (key,)
    yield (
        f"INSERT INTO {{mirror}}_tally VALUES (%s, 1)"
        f" ON CONFLICT (key) DO UPDATE SET applied = {{mirror}}_tally.applied + 1",
        (key,),
    )

@stream.on("public.source", transactional=TARGET, name="one by one")
async def apply_one(change: Change, connection) -> None:
    for statement, parameters in statements("one_by_one", change):
        cursor = await connection.execute(statement, parameters)
        assert cursor.rowcount == 1

@stream.on("public.source", transactional=TARGET, batch=50, linger_seconds=0.01, name="in batches")
def apply_many(changes: list[Change], connection) -> None:
    for change in changes:
        for statement, parameters in statements("in_batches", change):
            assert connection.execute(statement, parameters).rowcount == 1
"""

CONFIGURATION: Final = """
[postgres]
dsn = "{source}"
[slot]
name = "{slot}"
[stream]
reconnect_seconds = 0.05
max_reconnect_seconds = 0.5
after_shutdown_seconds = 0.2
[handlers]
app = "handlers:stream"
backoff_seconds = 0.05
max_backoff_seconds = 0.5
"""


async def test_a_source_restored_to_an_earlier_time_is_refused(
    private_cluster: StartCluster,
) -> None:
    """Also when its WAL has grown past what is recorded; a failover that loses nothing goes on."""
    source = private_cluster()
    target = private_cluster().conninfo()
    ask(source.conninfo(), "CREATE TABLE source (key int PRIMARY KEY)")
    ask(target, "CREATE TABLE applied (key int)")
    await mirror(source, target)
    ask(source.conninfo(), "INSERT INTO source VALUES (1)")
    await mirror(source, target)
    source.stop()
    promote(source)
    ask(source.conninfo(), "INSERT INTO source VALUES (2)")
    await mirror(source, target)
    source.stop()
    backup = copy(source.data)
    source.start()
    ask(source.conninfo(), "INSERT INTO source SELECT generate_series(1000, 2000)")
    await mirror(source, target)
    source.stop()
    shutil.rmtree(source.data)
    backup.rename(source.data)
    promote(source)
    ask(source.conninfo(), "INSERT INTO source SELECT generate_series(10000, 13000)")
    with pytest.raises(ProgressUnfit, match="on timeline 2, which the server left at"):
        await mirror(source, target)
    assert ask(target, "SELECT count(*) FROM applied WHERE key < 1000") == [(2,)]
    assert ask(target, "SELECT count(*) FROM applied") == [(1003,)]
    ask(target, "DELETE FROM walstream.progress")
    await mirror(source, target)
    assert ask(target, "SELECT count(*) FROM applied WHERE key >= 10000") == [(3001,)]


async def mirror(source: PrivateCluster, target: str) -> None:
    """Apply everything that the source has by now."""
    stream = Walstream()

    @stream.on("public.source", "insert", transactional=target, name="mirror")
    async def apply(change: Change, connection: psycopg.AsyncConnection) -> None:
        await connection.execute("INSERT INTO applied VALUES (%s)", [change.key["key"]])

    slot = {"name": SLOT, "create": True}
    configuration = config.parse({"postgres": {"dsn": source.conninfo()}, "slot": slot})
    await stream.run(configuration, until="now")


def copy(data: Path) -> Path:
    """Copy a data folder, with the owner of each file."""
    backup = data.with_name("backup")
    subprocess.run(["cp", "-a", data, backup], check=True)  # noqa: S607 - of every system
    return backup


def promote(cluster: PrivateCluster) -> None:
    """Start what was stopped as a standby, and make it a primary: it goes on with a timeline."""
    (cluster.data / "standby.signal").touch()
    cluster.start()
    ask(cluster.conninfo(), "SELECT pg_promote()")


def ask(dsn: str, statements: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        cursor = connection.execute(statements.encode())
        return cursor.fetchall() if cursor.description else []


@pytest.mark.timeout(180)
def test_kill_9_and_a_crash_of_the_server_leave_each_change_applied_once(
    private_cluster: StartCluster, tmp_path: Path
) -> None:
    survive(private_cluster(), tmp_path, kills=10, crashes=1)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_many_kills_and_crashes_leave_each_change_applied_once(
    private_cluster: StartCluster, tmp_path: Path
) -> None:
    survive(private_cluster(), tmp_path, kills=50, crashes=5)


def survive(cluster: PrivateCluster, folder: Path, *, kills: int, crashes: int) -> None:
    """Kill the daemon so often while it applies all changes, and crash the server; then compare."""
    chance = random.Random(SEED)  # noqa: S311 - repeatable
    began = time.monotonic()
    print(f"WALSTREAM_KILL_SEED={SEED}")  # noqa: T201 - pytest shows it when the test fails
    with Stage(cluster, folder) as stage, stage.writing(kills, chance.getrandbits(32)) as release:
        hits = 0
        crashing = set(chance.sample(range(kills), crashes))
        for number in range(kills):
            release()
            process = stage.start()
            moment(stage, process, chance, CHANGES // kills)
            if number in crashing:
                cluster.restart("immediate")
                moment(stage, process, chance, CHANGES // kills)
            process.kill()
            assert process.wait() == -signal.SIGKILL, stage.log.read_text()[-4000:]
            hits += stage.has_more_recorded_than_confirmed()
    stage.finish()
    committed = stage.committed()
    print(  # noqa: T201
        f"{sum(committed.values())} changes, {kills} kills ({hits} with applied changes that were"
        f" not confirmed), {crashes} crashes, {time.monotonic() - began:.0f} s"
    )
    assert sum(committed.values()) >= CHANGES
    for mirror in MIRRORS:
        assert stage.applied(mirror) == committed
        assert stage.rows("target", mirror) == stage.rows("postgres", "source")
    assert hits >= kills // 2


def moment(
    stage: Stage, process: subprocess.Popen[bytes], chance: random.Random, written: int
) -> None:
    """Wait until something is to be killed: while it starts, or after it has applied so much."""
    if chance.random() < 0.2:
        stage.pause(process, chance.uniform(0, STARTING_SECONDS))
        return
    mirror = chance.choice(MIRRORS)
    wanted = stage.total(mirror) + chance.randrange(1, written // 2)  # so some are always left
    deadline = time.monotonic() + APPLYING_SECONDS
    while stage.total(mirror) < wanted and time.monotonic() < deadline and process.poll() is None:
        stage.pause(process, 0.002)
    stage.pause(process, chance.uniform(0, 0.02))


class Stage:
    """One server with the source and the target, and the daemon between them."""

    def __init__(self, cluster: PrivateCluster, folder: Path) -> None:
        self._cluster = cluster
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self.log = folder / "walstream.log"
        self._ask("postgres", "CREATE DATABASE target")
        self._ask("postgres", SOURCE)
        self._ask("target", TARGET)
        self._ask("postgres", f"SELECT pg_create_logical_replication_slot('{SLOT}', 'wal2json')")
        source, target = cluster.conninfo(), cluster.conninfo("target")
        (folder / "handlers.py").write_text(HANDLERS.format(target=target))
        (folder / "walstream.toml").write_text(CONFIGURATION.format(source=source, slot=SLOT))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    @contextmanager
    def writing(self, steps: int, seed: int) -> Iterator[Callable[[], None]]:
        """Write all changes in a thread, a step of them for each release; the rest at the end."""
        allowed = threading.Semaphore(0)
        ended: list[BaseException] = []

        def write() -> None:
            chance = random.Random(seed)  # noqa: S311 - repeatable
            try:
                for step in range(1, steps + 1):
                    allowed.acquire()
                    self._write_until(CHANGES * step // steps, chance)
            except BaseException as error:  # noqa: BLE001 - told by the test
                ended.append(error)

        thread = threading.Thread(target=write)
        thread.start()
        try:
            yield allowed.release
        finally:
            allowed.release(steps)
            thread.join()
        assert not ended, ended

    def _write_until(self, count: int, chance: random.Random) -> None:
        while True:
            try:
                with psycopg.connect(self._cluster.conninfo()) as connection:
                    while journalled(connection) < count:
                        write_transaction(connection, chance)
            except psycopg.OperationalError:  # the server crashed; whether it committed, it knows
                time.sleep(0.01)
            else:
                return

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        """Start ``walstream run`` as a process of its own."""
        ours = {
            name: value for name, value in os.environ.items() if not name.startswith("WALSTREAM_")
        }
        config = str(self._folder / "walstream.toml")
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "walstream", "run", "-c", config, *options],
                cwd=ROOT,
                env={**ours, "PYTHONPATH": str(self._folder)},
                stdout=log,
                stderr=log,
            )
        self._processes.append(process)
        return process

    def pause(self, process: subprocess.Popen[bytes], seconds: float) -> None:
        """Let so much time pass, unless the process ends by itself."""
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return

    def finish(self) -> None:
        """Apply the rest."""
        process = self.start("--until", "now")
        try:
            assert process.wait(timeout=120) == 0, self.log.read_text()[-4000:]
        finally:
            process.kill()
            process.wait()

    def has_more_recorded_than_confirmed(self) -> bool:
        """Whether changes will come again that are applied already."""
        [(confirmed,)] = self._ask(
            "postgres",
            f"SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE '{SLOT}' = slot_name",
        )
        [(more,)] = (
            self._ask(
                "target",
                f"SELECT coalesce(max(end_lsn) > '{confirmed}', false) FROM walstream.progress",
            )
            if self._ask("target", "SELECT to_regclass('walstream.progress')") != [(None,)]
            else [(False,)]
        )
        return bool(more)

    def committed(self) -> Mapping[int, int]:
        """How many changes of each key the source has committed."""
        return dict(self._ask("postgres", "SELECT key, count(*) FROM journal GROUP BY key"))

    def applied(self, mirror: str) -> Mapping[int, int]:
        """How often a handler has applied a change of each key."""
        return dict(self._ask("target", f"SELECT key, applied FROM {mirror}_tally"))

    def total(self, mirror: str) -> int:
        """How many changes a handler has applied."""
        [(total,)] = self._ask("target", f"SELECT coalesce(sum(applied), 0) FROM {mirror}_tally")
        return int(total)

    def rows(self, database: str, table: str) -> list[tuple[Any, ...]]:
        return self._ask(database, f"SELECT key, value FROM {table} ORDER BY key")

    def _ask(self, database: str, statements: str) -> list[tuple[Any, ...]]:
        return ask(self._cluster.conninfo(database), statements)


def journalled(connection: psycopg.Connection) -> int:
    [(count,)] = connection.execute("SELECT count(*) FROM journal")
    return int(count)


def write_transaction(connection: psycopg.Connection, chance: random.Random) -> None:
    """Change some keys; one in seven transactions is taken back, one in seven in part."""
    length = chance.choice((1, 1, 1, 2, 3, 5, 10, LONGEST))
    for _ in range(length):
        change(connection, chance)
    match chance.randrange(7):
        case 0:
            connection.rollback()
        case 1:
            with connection.transaction():
                change(connection, chance)
                raise psycopg.Rollback
    connection.commit()


def change(connection: psycopg.Connection, chance: random.Random) -> None:
    key, value = chance.randrange(KEYS), chance.randrange(1_000_000)
    match chance.randrange(4):
        case 0:
            connection.execute("DELETE FROM source WHERE key = %s", [key])
        case 1:
            connection.execute("UPDATE source SET value = %s WHERE key = %s", [value, key])
        case _:
            connection.execute(
                "INSERT INTO source VALUES (%s, %s)"
                " ON CONFLICT (key) DO UPDATE SET value = excluded.value",
                [key, value],
            )
