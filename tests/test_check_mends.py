"""``walstream check`` names each planted problem, and what it prints, done literally, mends it.

Nothing here knows how a problem is mended: the steps are taken from the report, SQL as it stands,
commands as they stand, and a restart where one is asked for.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Final

import psycopg
import pytest

from tests.conftest import StartCluster
from walstream import config as configuration
from walstream.check import Finding, Status, check, transactions
from walstream.cluster import PrivateCluster
from walstream.errors import EX_OK
from walstream.state import STATE_DIRECTORY

REPOSITORY: Final = Path(__file__).parent.parent


class Operator:
    """Does what a report says, where walstream runs and on its server."""

    def __init__(self, cluster: PrivateCluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self._environment = {
            "PYTHONPATH": str(REPOSITORY),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        self._handlers = runpy.run_path(str(folder / "handlers.py"))["stream"].handlers

    async def check(self) -> dict[str, Finding]:
        """Ask; the findings by group and name, of which there is one each."""
        report = await check(configuration.load(self.folder / "walstream.toml"), self._handlers)
        findings = {f"{one.group}: {one.name}": one for one in report.findings}
        assert len(findings) == len(report.findings)
        return findings

    async def is_ok(self, name: str) -> bool:
        """Whether a line is in order; some are there only when they have something to say."""
        finding = (await self.check()).get(name)
        return finding is None or finding.status is Status.OK

    def carry_out(self, mend: str) -> None:
        """Do all that is said, from top to bottom."""
        assert mend
        for step in mend.splitlines():
            if step.startswith("$ "):
                done = self.run(step.removeprefix("$ "))
                assert done.returncode == 0, done.stderr
            elif step.startswith("-- "):
                if "restart the server" in step:
                    self.cluster.restart()
            else:
                assert step.endswith(";")
                self.execute(step)

    def execute(self, statement: str) -> None:
        with psycopg.connect(self.cluster.conninfo("app"), autocommit=True) as connection:
            connection.execute(statement.encode())

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["/bin/sh", "-c", command],
            capture_output=True,
            text=True,
            check=False,
            cwd=self.folder,
            env=self._environment,
            timeout=60,
        )


async def mend_all(operator: Operator, planted: set[str], left: set[str]) -> None:
    """Mend one finding after the other, in the order of the report, and look at it again.

    Args:
        operator: who does it.
        planted: what has to be found.
        left: what may be found besides.
    """
    findings = await operator.check()
    bad = {name for name, one in findings.items() if one.status not in {Status.OK, Status.SKIPPED}}
    assert planted <= bad, planted - bad
    assert bad - planted <= left, {name: findings[name] for name in bad - planted}
    for name in findings:
        if name in planted:
            operator.carry_out(findings[name].mend)
            # A reload reaches the sessions a moment later.
            await until_ok(operator, name)


async def until_ok(operator: Operator, name: str) -> None:
    """Ask again until the line is in order, for some seconds."""

    deadline = time.monotonic() + 10
    while not await operator.is_ok(name):
        assert time.monotonic() < deadline, (await operator.check())[name]


def command(operator: Operator) -> tuple[int, dict[str, str]]:
    """Exit code and findings that are not ok, as the command tells them."""
    done = operator.run("walstream check --json")
    assert done.stderr == ""
    findings = json.loads(done.stdout)["findings"]
    told = {f"{one['group']}: {one['name']}": one["status"] for one in findings}
    return done.returncode, {name: status for name, status in told.items() if status != "ok"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where walstream runs; to the checks of this process, what is open is open for long."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transactions, "LONG_SECONDS", 0)
    monkeypatch.delenv(STATE_DIRECTORY, raising=False)
    return tmp_path


# ---- Before the first start

APP: Final = """
from walstream import Walstream

stream = Walstream()

@stream.on("public.ledger", transactional={target!r})
def book(change, connection): ...

@stream.on("public.mails", attempts=1, on_failure="dead_letter")
def send(change): ...
"""

CONFIG: Final = """
[postgres]
dsn = "{dsn}"
application_name = "walstream"
[retained_wal]
warn_at_bytes = "1GB"
drop_slot_at_bytes = "20GB"
[state]
path = "state/walstream.json"
[stream]
heartbeat_seconds = 30
[handlers]
app = "handlers:stream"
[dead_letters]
store = "postgres"
schema = "letters"
[sinks.out]
type = "file"
path = "out/changes.jsonl"
[[routes]]
name = "unlogged"
table = "public.sessions"
to = "out"
[[routes]]
name = "no-identity"
table = "public.orders"
to = "out"
[[routes]]
name = "filtered-deletes"
table = "public.accounts"
operations = ["delete"]
where = "owner=eq.7"
to = "out"
[[routes]]
name = "long-values"
table = "public.notes"
operations = ["update"]
where = "body=like.*urgent*"
to = "out"
[[routes]]
name = "old-rows"
table = "public.prices"
operations = ["update"]
changed = ["amount"]
to = "out"
[[routes]]
name = "types"
table = "public.tickets"
operations = ["insert"]
where = "state=eq.open"
to = "out"
[[routes]]
name = "parts"
table = "public.events"
to = "out"
"""

ROLES: Final = """
    CREATE ROLE walstream LOGIN CONNECTION LIMIT 2;
    GRANT pg_read_all_settings TO walstream;
    ALTER ROLE walstream SET wal_sender_timeout = '2s';
    CREATE ROLE target LOGIN;
    SELECT pg_create_physical_replication_slot('forgotten');
"""

TABLES: Final = """
    DO $$ BEGIN
        EXECUTE (SELECT string_agg(
                            format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', oid::regprocedure),
                            ';')
                   FROM pg_proc
                  WHERE proname = 'pg_logical_emit_message');
    END $$;
    CREATE SCHEMA kinds;
    CREATE TYPE kinds.state AS ENUM ('open', 'closed');
    CREATE TABLE ledger (id int PRIMARY KEY);
    CREATE TABLE mails (id int PRIMARY KEY);
    CREATE UNLOGGED TABLE sessions (id int PRIMARY KEY);
    CREATE TABLE orders (id int PRIMARY KEY);
    ALTER TABLE orders REPLICA IDENTITY NOTHING;
    CREATE TABLE accounts (id int PRIMARY KEY, owner int);
    CREATE TABLE notes (id int PRIMARY KEY, body text);
    CREATE TABLE prices (id int PRIMARY KEY, amount int);
    CREATE TABLE tickets (id int PRIMARY KEY, state kinds.state);
    CREATE TABLE events (day date) PARTITION BY LIST (day);
    CREATE TABLE events_1 PARTITION OF events FOR VALUES IN ('2026-01-01');
    CREATE TABLE events_2 PARTITION OF events FOR VALUES IN ('2026-01-02');
"""


async def test_a_server_that_nothing_is_ready_on_is_made_ready_by_what_the_report_says(
    private_cluster: StartCluster, folder: Path
) -> None:
    cluster = private_cluster(
        {
            "wal_level": "replica",
            "max_replication_slots": "1",
            "max_wal_senders": "1",
            "max_prepared_transactions": "1",
        }
    )
    planted = {
        "server: wal_level",
        "server: max_slot_wal_keep_size",
        "server: wal_sender_timeout",
        "server: replication slots",
        "server: walsenders",
        "server: connections",
        "server: transactions",
        "role: replication",
        "role: drop_slot_at_bytes",
        "role: heartbeats",
        "slot: state",
        "routes: unlogged: public.sessions",
        "routes: no-identity: public.orders",
        "routes: filtered-deletes: public.accounts",
        "routes: long-values: public.notes",
        "routes: old-rows: public.prices",
        "routes: types: public.tickets",
        "routes: parts: public.events",
        "sinks: out",
        "targets: book",
        "dead letters: store",
        "here: state",
    }
    if cluster.knows_output_plugin_libraries:
        cluster.settings["output_plugin_libraries"] = "pgoutput, test_decoding"
        cluster.restart()
        planted.add("wal2json: allowed")
    with psycopg.connect(cluster.conninfo(), autocommit=True) as connection:
        connection.execute(ROLES.encode())
        connection.execute("CREATE DATABASE app")
    with psycopg.connect(cluster.conninfo("app"), autocommit=True) as connection:
        connection.execute(TABLES.encode())
        connection.execute("BEGIN; CREATE TABLE never (); PREPARE TRANSACTION 'forgotten'")
    (folder / "handlers.py").write_text(APP.format(target=cluster.conninfo("app", user="target")))
    (folder / "walstream.toml").write_text(
        CONFIG.format(dsn=cluster.conninfo("app", user="walstream"))
    )
    operator = Operator(cluster, folder)
    packages = {"server: version", "wal2json: version"}
    await mend_all(operator, planted, left=packages | {"connection: replication"})
    code, left = command(operator)
    assert code == EX_OK
    assert left.keys() <= packages


# ---- In operation

SERVICE: Final = """
from pathlib import Path

from walstream import Walstream

stream = Walstream()

@stream.on("public.mails", "insert", attempts=1, on_failure="dead_letter")
def send(change):
    if change.row["id"] == 7 and Path("broken").exists():
        raise RuntimeError
"""

SERVICE_CONFIG: Final = """
[postgres]
dsn = "{dsn}"
[retained_wal]
warn_at_bytes = "1MB"
[state]
path = "walstream.json"
[handlers]
app = "handlers:stream"
[dead_letters]
path = "letters.sqlite3"
"""


async def test_what_goes_wrong_in_operation_is_mended_by_what_the_report_says(
    private_cluster: StartCluster, folder: Path
) -> None:
    """WAL retained, transactions spilled to disk and left open, dead letters that wait."""
    cluster = private_cluster(
        {"logical_decoding_work_mem": "64kB", "max_slot_wal_keep_size": "1GB"}
    )
    with psycopg.connect(cluster.conninfo(), autocommit=True) as connection:
        connection.execute("CREATE DATABASE app")
    (folder / "handlers.py").write_text(SERVICE)
    (folder / "walstream.toml").write_text(SERVICE_CONFIG.format(dsn=cluster.conninfo("app")))
    operator = Operator(cluster, folder)
    operator.execute("CREATE TABLE mails (id int PRIMARY KEY, content text)")
    operator.execute("SELECT pg_create_logical_replication_slot('walstream', 'wal2json')")
    operator.execute(
        "INSERT INTO mails SELECT id, repeat('x', 500) FROM generate_series(1, 999) id"
    )
    (folder / "broken").touch()
    assert operator.run("walstream run --until now").returncode == EX_OK
    operator.execute("SELECT pg_logical_emit_message(true, '', repeat('x', 2000000))")
    with closing(psycopg.connect(cluster.conninfo("app"))) as forgotten:
        forgotten.execute("INSERT INTO mails VALUES (0)")
        (folder / "broken").unlink()  # "mend what failed"
        await mend_all(
            operator,
            {
                "server: transactions",
                "slot: retained WAL",
                "slot: spills",
                "dead letters: store",
            },
            left={"server: version", "wal2json: version", "wal2json: installed"},
        )
    code, left = command(operator)
    assert code == EX_OK
    assert left.keys() <= {"server: version", "wal2json: version"}
