"""Each planted problem is named by ``walstream check``, and what it prints, done literally, mends it.

Nothing here knows how a problem is mended: the steps are taken from the report, SQL as it stands,
commands as they stand, and a restart where one is asked for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest

from tests.conftest import StartCluster
from tests.postgres import wait_until
from walstream import config as configuration
from walstream.check import Status, check, transactions
from walstream.cluster import PrivateCluster, ServerPrograms
from walstream.errors import EX_CONFIG, EX_OK

REPOSITORY: Final = Path(__file__).parent.parent


class Operator:
    """Does what a report says, where walstream runs and on its server."""

    def __init__(self, cluster: PrivateCluster, folder: Path, *arguments: str) -> None:
        self.cluster = cluster
        self.folder = folder
        self.arguments = arguments
        self.newer: ServerPrograms | None = None
        self._environment = {
            "PYTHONPATH": str(REPOSITORY),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def check(self) -> dict[str, dict[str, str]]:
        """Ask; the findings by group and name, of which there is one each."""
        done = self.run(f"walstream check --json {' '.join(self.arguments)}")
        assert done.stderr == ""
        report = json.loads(done.stdout)
        findings = {f"{one['group']}: {one['name']}": one for one in report["findings"]}
        assert len(findings) == len(report["findings"])
        is_bad = any(one["status"] in {"problem", "unreachable"} for one in findings.values())
        assert done.returncode == (EX_CONFIG if is_bad else EX_OK)
        return findings

    def carry_out(self, mend: str) -> None:
        """Do all that is said, from top to bottom."""
        assert mend
        for step in mend.splitlines():
            if step.startswith("$ "):
                done = self.run(step.removeprefix("$ "))
                assert done.returncode == 0, done.stderr
            elif step.startswith("-- "):
                self._do_in_words(step)
            else:
                assert step.endswith(";")
                self.execute(step)

    def _do_in_words(self, step: str) -> None:
        if "restart the server" in step:
            self.cluster.restart()
        if "upgrade the server to" in step and self.newer is not None:
            self.cluster.stop()
            self.cluster.programs = self.newer
            self.cluster.start()

    def execute(self, statement: str) -> None:
        with psycopg.connect(self.cluster.conninfo("app"), autocommit=True) as connection:
            connection.execute(statement.encode())

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            shell=True,
            capture_output=True,
            text=True,
            check=False,
            cwd=self.folder,
            env=self._environment,
            timeout=60,
        )


def assert_mended(operator: Operator, planted: set[str], left: dict[str, str]) -> None:
    """Mend one finding after the other, in the order of the report, and look at it again.

    Args:
        operator: who does it.
        planted: what has to be found.
        left: what may stay otherwise than ok, with the status.
    """
    findings = operator.check()
    found = {name for name, one in findings.items() if one["status"] in {"warning", "problem"}}
    assert planted <= found, planted - found
    assert found - planted <= left.keys(), found - planted - left.keys()
    for name in findings:
        if name not in planted:
            continue
        operator.carry_out(findings[name]["mend"])
        # A reload reaches the sessions a moment later.
        wait_until(lambda name=name: operator.check()[name]["status"] == "ok", 20)
    at_the_end = {
        name: one["status"] for name, one in operator.check().items() if one["status"] != "ok"
    }
    assert at_the_end.items() <= left.items()


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

TABLES: Final = """
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

ROLES: Final = """
    CREATE ROLE walstream LOGIN CONNECTION LIMIT 2;
    CREATE ROLE target LOGIN;
    ALTER ROLE walstream SET wal_sender_timeout = '2s';
    REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA pg_catalog FROM PUBLIC;
    GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA pg_catalog TO PUBLIC;
"""


def test_a_server_that_nothing_is_ready_on_is_made_ready_by_what_the_report_says(
    private_cluster: StartCluster, tmp_path: Path
) -> None:
    cluster = private_cluster(
        {
            "wal_level": "replica",
            "max_replication_slots": "1",
            "max_wal_senders": "1",
            "max_prepared_transactions": "1",
            "synchronous_standby_names": "",
        }
    )
    with psycopg.connect(cluster.conninfo(), autocommit=True) as connection:
        connection.execute("CREATE DATABASE app")
        connection.execute("CREATE ROLE walstream LOGIN CONNECTION LIMIT 2")
        connection.execute("ALTER ROLE walstream SET wal_sender_timeout = '2s'")
        connection.execute("CREATE ROLE target LOGIN")
        connection.execute("SELECT pg_create_physical_replication_slot('forgotten')")
    with psycopg.connect(cluster.conninfo("app"), autocommit=True) as connection:
        connection.execute(TABLES.encode())
        connection.execute(
            "DO $$ BEGIN EXECUTE (SELECT string_agg(format('REVOKE EXECUTE ON FUNCTION %s FROM"
            " PUBLIC', oid::regprocedure), ';') FROM pg_proc"
            " WHERE proname = 'pg_logical_emit_message'); END $$"
        )
        connection.execute("BEGIN; CREATE TABLE never (); PREPARE TRANSACTION 'forgotten'")
    planted = {
        "server: wal_level",
        "server: max_slot_wal_keep_size",
        "server: wal_sender_timeout",
        "server: replication slots",
        "server: walsenders",
        "server: connections",
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
    (tmp_path / "handlers.py").write_text(
        APP.format(target=cluster.conninfo("app", user="target"))
    )
    (tmp_path / "walstream.toml").write_text(
        CONFIG.format(dsn=cluster.conninfo("app", user="walstream"))
    )
    left = {
        "server: version": "warning",  # the server's packages
        "wal2json: version": "warning",
        "connection: replication": "problem",  # until the role may
    }
    findings = Operator(cluster, tmp_path).check()
    for one in findings.values(): print(one)
    assert_mended(Operator(cluster, tmp_path), planted, left)
