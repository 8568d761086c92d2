"""``walstream check``: each planted problem is named, and what it proposes mends it."""

from __future__ import annotations

import json
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from tests.checks import finding, findings, mend, route_findings, routed, settings
from tests.conftest import StartCluster
from tests.postgres import Database, async_wait_until, wait_until
from walstream import Walstream
from walstream.check import QUESTIONS, Finding, Report, Status, check
from walstream.config import Config
from walstream.connection import ReplicationConnection
from walstream.decoder import START_OPTIONS
from walstream.errors import EX_CONFIG, EX_OK, EX_TEMPFAIL, EX_USAGE
from walstream.lsn import Lsn
from walstream.protocol import status_update


def is_probe_left(database: Database) -> bool:
    return bool(
        database.execute(
            "SELECT FROM pg_replication_slots"
            " WHERE database = %s AND slot_name LIKE 'walstream\\_check\\_%%'",
            database.name,
        )
    )


# ---- A server that is fine


async def test_a_server_that_is_fine_has_no_problem(database: Database) -> None:
    database.execute("CREATE TABLE t (id int PRIMARY KEY)")
    report = await check(routed(database.dsn, table="public.t"))
    assert {found.status for found in report.findings} <= {
        Status.OK,
        Status.WARNING,
        Status.SKIPPED,
    }
    assert report.exit_code == EX_OK
    [route] = [found for found in report.findings if found.group == "routes"]
    assert route.found == "replica identity default"


async def test_nothing_is_left_on_the_server(database: Database) -> None:
    await check(settings(database.dsn))
    assert not is_probe_left(database)


async def test_nothing_routed_is_a_warning(database: Database) -> None:
    assert (await finding(settings(database.dsn), "routes", "routes")).status is Status.WARNING


def test_every_question_is_documented_and_no_other() -> None:
    """Those that can be silent are marked with a star."""
    page = Path(__file__).parent.parent.joinpath("docs", "check.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`[^|]+)\|", page, re.MULTILINE)
    documented = set(re.findall(r"`([^`]+)`", " ".join(cells))) - set(Status)
    assert documented == {question.name for question in QUESTIONS} | {"routes"}


# ---- Connections


async def test_a_server_that_is_not_there_is_unreachable_and_the_rest_is_skipped() -> None:
    config = routed("host=127.0.0.1 port=1", table="public.t")
    report = await check(config)
    catalog, replication, *others = report.findings
    assert catalog.status is replication.status is Status.UNREACHABLE
    rest = [found for found in others if found.group not in {"here", "sinks"}]
    assert {found.status for found in rest} == {Status.SKIPPED}
    assert all(found.found for found in rest)
    assert report.exit_code == EX_TEMPFAIL


async def test_one_connection_is_enough_for_what_needs_only_one(database: Database) -> None:
    unreachable = "host=127.0.0.1 port=1"
    report = await check(settings(database.dsn, replication_dsn=unreachable))
    statuses = {(found.group, found.name): found.status for found in report.findings}
    assert statuses["connection", "replication"] is Status.UNREACHABLE
    assert statuses["server", "wal_level"] is Status.OK
    assert statuses["wal2json", "installed"] is Status.SKIPPED


async def test_two_dsns_that_lead_to_two_databases_are_a_problem(
    database: Database, server_dsn: str
) -> None:
    config = settings(server_dsn, replication_dsn=database.dsn)
    found = await finding(config, "connection", "same database")
    assert found.status is Status.PROBLEM
    assert database.name in found.found


async def test_a_problem_is_graver_than_an_unreachable_server(database: Database) -> None:
    config = settings(database.dsn, replication_dsn="host=127.0.0.1 port=1", create=False)
    assert (await check(config)).exit_code == EX_CONFIG


# ---- The role


@pytest.fixture
def login(database: Database) -> Iterator[str]:
    """The connection string of a role that may log in and nothing else."""
    name, password = f"walstream_test_{secrets.token_hex(4)}", secrets.token_hex(8)
    database.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{password}'")
    yield make_conninfo(database.dsn, user=name, password=password)
    database.execute(f"DROP ROLE {name}")


async def test_a_role_without_the_right_to_replicate_is_named(
    database: Database, login: str
) -> None:
    config = settings(login)
    refused = await finding(config, "connection", "replication")
    assert refused.status is Status.PROBLEM
    found = await finding(config, "role", "replication")
    assert found.status is Status.PROBLEM
    assert "lacks REPLICATION" in found.found
    mend(database, found)
    for group in ("role", "connection"):
        assert (await finding(config, group, "replication")).status is Status.OK


async def test_a_role_that_only_replicates_can_ask_everything(
    database: Database, login: str
) -> None:
    database.execute("CREATE TABLE t (id int PRIMARY KEY, status text)")
    mend(database, await finding(settings(login), "role", "replication"))
    report = await check(
        routed(login, table="public.t", operations=["insert"], where="status=eq.new")
    )
    assert report.exit_code == EX_OK, report.findings


# ---- The server's settings


def restarted(cluster: Any, statement: str) -> None:
    """Run what mends a setting, then restart as it says."""
    with psycopg.connect(cluster.conninfo(), autocommit=True) as connection:
        connection.execute(statement.partition(";")[0].encode())
    cluster.restart()


async def test_a_wal_level_below_logical_is_named(private_cluster: StartCluster) -> None:
    cluster = private_cluster({"wal_level": "replica"})
    config = settings(cluster.conninfo())
    found = await finding(config, "server", "wal_level")
    assert (found.status, found.found) == (Status.PROBLEM, "replica; decoding needs logical")
    assert (await finding(config, "wal2json", "installed")).status is Status.SKIPPED
    restarted(cluster, found.mend)
    assert (await finding(config, "server", "wal_level")).status is Status.OK
    assert (await finding(config, "wal2json", "installed")).status is Status.OK


async def test_a_slot_may_not_keep_all_wal(private_cluster: StartCluster) -> None:
    cluster = private_cluster()
    config = settings(cluster.conninfo())
    found = await finding(config, "server", "max_slot_wal_keep_size")
    assert found.status is Status.WARNING
    with psycopg.connect(cluster.conninfo(), autocommit=True) as connection:
        for statement in found.mend.splitlines():
            connection.execute(statement.encode())
    await _until_ok(config, "server", "max_slot_wal_keep_size")


async def test_too_few_slots_and_walsenders_are_told_before_they_are_missed(
    private_cluster: StartCluster,
) -> None:
    cluster = private_cluster({"max_replication_slots": "2", "max_wal_senders": "2"})
    config = settings(cluster.conninfo())
    with psycopg.connect(cluster.conninfo(), autocommit=True) as connection:
        connection.execute("SELECT pg_create_physical_replication_slot('a')")
        found = await finding(config, "server", "replication slots")
        assert (found.status, found.found) == (Status.WARNING, "1 of 2 in use, one is left")
        # The slot that the check itself tried is gone when its walsender is.
        used = "SELECT count(*) FROM pg_replication_slots"
        await async_wait_until(lambda: connection.execute(used).fetchone() == (1,))
        connection.execute("SELECT pg_create_physical_replication_slot('b')")
        found = await finding(config, "server", "replication slots")
        assert found.status is Status.PROBLEM
        assert (await finding(config, "wal2json", "installed")).status is Status.SKIPPED
    restarted(cluster, found.mend)
    assert (await finding(config, "server", "replication slots")).status is Status.OK

    replication = f"{cluster.conninfo()} replication=database"
    with psycopg.connect(replication), psycopg.connect(replication):
        assert (await finding(config, "connection", "replication")).status is Status.UNREACHABLE
        found = await finding(config, "server", "walsenders")
        assert (found.status, found.found) == (
            Status.PROBLEM,
            "2 of 2 in use, none is left for walstream",
        )
    restarted(cluster, found.mend)
    assert (await finding(config, "server", "walsenders")).status is Status.OK


# ---- wal2json


async def test_a_server_without_wal2json_is_told_the_package(
    private_cluster: StartCluster,
) -> None:
    cluster = private_cluster({"dynamic_library_path": "/nowhere"})
    found = await finding(settings(cluster.conninfo()), "wal2json", "installed")
    assert found.status is Status.PROBLEM
    package = f"postgresql-{cluster.programs.version[0]}-wal2json"
    assert found.mend.splitlines()[0] == f"$ apt-get install {package}"


async def test_a_server_that_does_not_allow_wal2json_is_told_the_setting(
    private_cluster: StartCluster,
) -> None:
    cluster = private_cluster()
    if not cluster.knows_output_plugin_libraries:
        pytest.skip(f"PostgreSQL {cluster.programs.version} has no output_plugin_libraries")
    cluster.settings["output_plugin_libraries"] = "pgoutput, test_decoding"
    cluster.restart()
    config = settings(cluster.conninfo())
    found = await finding(config, "wal2json", "allowed")
    assert found.status is Status.PROBLEM
    refused = await finding(config, "wal2json", "installed")
    assert (refused.status, refused.mend.splitlines()[1:]) == (
        Status.PROBLEM,
        found.mend.splitlines(),
    )
    with psycopg.connect(cluster.conninfo(), autocommit=True) as connection:
        for statement in found.mend.splitlines():
            connection.execute(statement.encode())
    await _until_ok(config, "wal2json", "allowed")
    assert (await finding(config, "wal2json", "installed")).status is Status.OK

    with psycopg.connect(cluster.conninfo(), autocommit=True) as connection:
        connection.execute("CREATE ROLE plain LOGIN REPLICATION")
    plain = settings(cluster.conninfo(user="plain"))
    assert (await finding(plain, "wal2json", "allowed")).status is Status.SKIPPED
    assert (await finding(plain, "wal2json", "installed")).status is Status.OK


async def test_what_an_older_wal2json_cannot_say_is_a_warning(database: Database) -> None:
    database.execute(
        "SELECT pg_create_logical_replication_slot(%s, 'wal2json', true)", database.name
    )
    try:
        database.execute(
            "SELECT FROM pg_logical_slot_peek_changes("
            "%s, NULL, NULL, 'numeric-data-types-as-string', '1')",
            database.name,
        )
        expected = Status.OK
    except psycopg.errors.InvalidParameterValue:
        expected = Status.WARNING
    assert (await finding(settings(database.dsn), "wal2json", "version")).status is expected


async def test_transactions_that_hold_up_a_slot_are_named(database: Database) -> None:
    with database.connect(autocommit=False, application_name="the old one") as blocker:
        blocker.execute("CREATE TABLE t ()")
        found = await finding(settings(database.dsn), "wal2json", "installed")
        assert found.status is Status.WARNING
        assert f"PID {blocker.info.backend_pid} (the old one)" in found.found
    assert (await finding(settings(database.dsn), "wal2json", "installed")).status is Status.OK


# ---- The slot


async def test_a_missing_slot_is_a_problem_unless_it_is_to_be_made(database: Database) -> None:
    config = settings(database.dsn, name=database.name, create=False)
    found = await finding(config, "slot", "state")
    assert found.status is Status.PROBLEM
    mend(database, found)
    assert {one.status for one in await findings(config, "slot")} == {Status.OK}


async def test_a_slot_of_another_plugin_is_named(database: Database) -> None:
    database.execute(
        "SELECT pg_create_logical_replication_slot(%s, 'test_decoding')", database.name
    )
    found = await finding(settings(database.dsn, name=database.name), "slot", "state")
    assert found.status is Status.PROBLEM
    assert "test_decoding" in found.found


async def test_a_slot_in_use_is_fine_and_says_by_whom(database: Database) -> None:
    database.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", database.name)
    async with await ReplicationConnection.open(
        database.dsn, application_name="the other one"
    ) as other:
        await other.start(database.name, START_OPTIONS)
        found = await finding(settings(database.dsn, name=database.name), "slot", "state")
    assert found.status is Status.OK
    assert "application the other one" in found.found


async def test_a_slot_beyond_the_servers_position_is_a_problem(database: Database) -> None:
    database.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", database.name)
    async with await ReplicationConnection.open(database.dsn, application_name="eager") as eager:
        await eager.start(database.name, START_OPTIONS)
        eager.send(status_update(Lsn.parse("FFFF/0"), now=time.time()))
        await eager.finish()
    config = settings(database.dsn, name=database.name)
    wait_until(lambda: not database.execute("SELECT FROM pg_replication_slots WHERE active"))
    found = await finding(config, "slot", "position")
    assert found.status is Status.PROBLEM
    mend(database, found)
    assert (await finding(config, "slot", "position")).status is Status.OK


async def test_a_lost_slot_is_a_problem(private_cluster: StartCluster) -> None:
    cluster = private_cluster({"max_slot_wal_keep_size": "1MB", "wal_keep_size": "0"})
    config = settings(cluster.conninfo())
    with psycopg.connect(cluster.conninfo(), autocommit=True) as connection:
        connection.execute(
            "SELECT pg_create_logical_replication_slot('walstream_checked', 'wal2json')"
        )
        for _ in range(4):
            connection.execute("SELECT pg_switch_wal() FROM pg_logical_emit_message(true, '', '')")
            connection.execute("CHECKPOINT")
        found = await finding(config, "slot", "state")
        assert found.status is Status.PROBLEM
        assert "is lost" in found.found
        for statement in found.mend.splitlines()[:2]:
            connection.execute(statement.encode())
    assert {one.status for one in await findings(config, "slot")} == {Status.OK}


async def _until_ok(config: Config, group: str, name: str) -> None:
    """A reload reaches the sessions a moment later."""
    for _ in range(100):
        if (await finding(config, group, name)).status is Status.OK:
            return
    pytest.fail(f"{group}: {name} is not ok")


# ---- The routes


KEYED = "CREATE TABLE t (id int PRIMARY KEY, status text, n int)"
KEYLESS = "CREATE TABLE t (id int, status text)"


@pytest.mark.parametrize(
    ("made", "route", "status", "sentence"),
    [
        pytest.param(KEYLESS, {}, Status.PROBLEM, "updates and deletes are lost", id="no identity"),
        pytest.param(
            f"{KEYED}; ALTER TABLE t REPLICA IDENTITY NOTHING",
            {"operations": ["update"]},
            Status.PROBLEM,
            "updates are lost",
            id="identity nothing",
        ),
        pytest.param(
            "CREATE TABLE t (id int PRIMARY KEY DEFERRABLE)",
            {"operations": ["delete"]},
            Status.PROBLEM,
            "deletes are lost",
            id="deferrable key",
        ),
        pytest.param(
            KEYED,
            {"operations": ["delete"], "where": "id=gt.1,n=eq.1"},
            Status.PROBLEM,
            "a delete carries only id, the filter reads n: it never matches",
            id="filter on what a delete does not carry",
        ),
        pytest.param(
            KEYED,
            {"operations": ["delete"], "where": "or(id.gt.1,n.eq.1)"},
            Status.WARNING,
            "it does not match where that decides",
            id="filter partly on what a delete does not carry",
        ),
        pytest.param(
            KEYED,
            {"operations": ["delete"], "where": "not.and(id.gt.1,n.eq.1)"},
            Status.WARNING,
            "it does not match where that decides",
            id="negated filter partly on what a delete does not carry",
        ),
        pytest.param(
            KEYED,
            {"operations": ["update"], "where": "n=eq.1", "leaving": True},
            Status.PROBLEM,
            "of the old row an update carries only id, the filter reads n: it never matches",
            id="leaving without the old row",
        ),
        pytest.param(
            KEYED,
            {"operations": ["update"], "changed": ["n"]},
            Status.PROBLEM,
            "so that nobody knows whether n changed: no update passes",
            id="changed without the old row",
        ),
        pytest.param(
            "CREATE TABLE t (id int PRIMARY KEY, n int)",
            {"changed": ["n", "id"]},
            Status.WARNING,
            "updates that change nothing but n are dropped",
            id="changed partly without the old row",
        ),
        pytest.param(
            KEYED,
            {"operations": ["update"], "where": "status=eq.new"},
            Status.WARNING,
            "the filter on status does not match",
            id="filter on a long value",
        ),
        pytest.param(
            KEYED,
            {"operations": ["update"], "columns": {"mask": {"status": "redact"}}},
            Status.WARNING,
            "status comes as unchanged, not masked",
            id="mask of a long value",
        ),
        pytest.param(
            "CREATE UNLOGGED TABLE t (id int PRIMARY KEY)",
            {},
            Status.PROBLEM,
            "is unlogged",
            id="unlogged",
        ),
        pytest.param(
            "CREATE TABLE t (id int PRIMARY KEY) PARTITION BY RANGE (id);"
            "CREATE TABLE low PARTITION OF t FOR VALUES FROM (0) TO (10);"
            "CREATE TABLE high PARTITION OF t FOR VALUES FROM (10) TO (20);"
            "ALTER TABLE t REPLICA IDENTITY FULL; ALTER TABLE low REPLICA IDENTITY NOTHING",
            {},
            Status.PROBLEM,
            "public.low: updates and deletes are lost",
            id="partition without an identity",
        ),
        pytest.param(
            'CREATE SCHEMA "Odd"; CREATE TABLE "Odd"."Na.me" (n int); CREATE TABLE "Odd".b (n int);'
            'CREATE TABLE "Odd".c (n int); CREATE TABLE "Odd".d (n int PRIMARY KEY);'
            'CREATE TABLE "Odd".e (n int)',
            {"table": '"Odd".*'},
            Status.PROBLEM,
            "Odd.Na.me, Odd.b, Odd.c and 1 more: updates and deletes are lost",
            id="pattern",
        ),
    ],
)
async def test_a_table_that_does_not_fit_its_route_is_named_and_mended(
    database: Database, made: str, route: dict[str, Any], status: Status, sentence: str
) -> None:
    database.execute(made)
    [found] = await route_findings(database, **{"table": "public.t", **route})
    assert found.status is status
    assert sentence in found.found
    mend(database, found)
    [mended] = await route_findings(database, **{"table": "public.t", **route})
    assert mended.status is Status.OK


@pytest.mark.parametrize(
    "route",
    [
        {"operations": ["insert"], "where": "status=eq.new"},
        {"operations": ["truncate"]},
        {"operations": ["delete"], "where": "id=gt.1"},
        {"operations": ["delete"], "where": "or(id.eq.1,not.and(id.gt.5,id.lt.9))"},
        {"operations": ["update"], "where": "n=eq.1"},
        {"operations": ["update"], "where": "id=eq.1", "leaving": True},
        {"operations": ["update"], "changed": ["id"]},
        {"operations": ["insert"], "changed": ["status"]},
        {"operations": ["update"], "columns": {"mask": {"n": "null"}}},
    ],
)
async def test_a_key_is_identity_enough_for_what_it_carries(
    database: Database, route: dict[str, Any]
) -> None:
    database.execute(KEYED)
    [found] = await route_findings(database, table="public.t", **route)
    assert (found.status, found.found) == (Status.OK, "replica identity default")


async def test_a_full_identity_is_enough_for_everything(database: Database) -> None:
    database.execute(f"{KEYLESS}; ALTER TABLE t REPLICA IDENTITY FULL")
    [found] = await route_findings(
        database,
        table="public.t",
        where="status=eq.new",
        leaving=True,
        changed=["status"],
        columns={"mask": {"status": "redact"}},
    )
    assert (found.status, found.found) == (Status.OK, "replica identity full")


@pytest.mark.parametrize(
    ("made", "kind"),
    [
        ("CREATE VIEW t AS SELECT 1 AS id", "a view"),
        ("CREATE MATERIALIZED VIEW t AS SELECT 1 AS id", "a materialized view"),
        ("CREATE SEQUENCE t", "not a table"),
    ],
)
async def test_what_is_no_table_has_no_changes(database: Database, made: str, kind: str) -> None:
    database.execute(made)
    [found] = await route_findings(database, table="public.t")
    assert found.status is Status.PROBLEM
    assert found.found == f"is {kind}, which has no changes of its own"


@pytest.mark.parametrize(
    ("route", "sentence"),
    [
        ({"table": "public.messages"}, "the table public.messages does not exist; is"),
        ({"table": "public.messages_v2", "where": "nobody=eq.1"}, "nobody"),
        ({"table": "public.messages_v2", "where": "id=eq.one"}, "invalid input syntax"),
        ({"table": "public.messages_v2", "columns": {"exclude": ["nobody"]}}, "nobody"),
        ({"table": "public.messages_v2", "columns": {"mask": {"id": "hash"}}}, "key"),
    ],
)
async def test_a_route_that_does_not_fit_the_database_says_why(
    database: Database, route: dict[str, Any], sentence: str
) -> None:
    database.execute("CREATE TABLE messages_v2 (id int PRIMARY KEY)")
    [found] = await route_findings(database, **route)
    assert found.status is Status.PROBLEM
    assert sentence in found.found


async def test_a_pattern_of_no_table_is_a_warning(database: Database) -> None:
    [found] = await route_findings(database, table="nowhere.*")
    assert found.status is Status.WARNING


async def test_a_pattern_says_which_tables_lack_the_columns_of_its_filter(
    database: Database,
) -> None:
    database.execute("CREATE TABLE a (id int PRIMARY KEY, n int); CREATE TABLE b (id int)")
    [found] = await route_findings(
        database, table="public.*", operations=["insert"], where="n=eq.1"
    )
    assert (found.status, found.found) == (
        Status.WARNING,
        "public.b: has no n: the filter never matches",
    )


# ---- The command


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "walstream", "check", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={"PYTHONPATH": str(Path(__file__).parent.parent)},
    )


def write_handlers(folder: Path, where: str) -> None:
    folder.joinpath("handlers.py").write_text(
        "from walstream import Change, Walstream\n"
        "stream = Walstream()\n"
        f"@stream.on('public.t', 'delete', where='{where}')\n"
        "def gone(change: Change) -> None: ...\n"
    )


def test_handlers_are_checked_and_the_exit_code_tells(database: Database, tmp_path: Path) -> None:
    database.execute("CREATE TABLE t (id int PRIMARY KEY, n int)")
    (tmp_path / "walstream.toml").write_text('[slot]\ncreate = true\nname = "walstream_checked"\n')
    write_handlers(tmp_path, "id=eq.1")
    done = run("handlers:stream", "--dsn", database.dsn, folder=tmp_path)
    assert (done.returncode, done.stderr) == (EX_OK, "")
    assert "gone: public.t" in done.stdout

    write_handlers(tmp_path, "n=eq.1")
    done = run("handlers:stream", "--dsn", database.dsn, folder=tmp_path)
    assert (done.returncode, done.stderr) == (EX_CONFIG, "")
    assert 'ALTER TABLE "public"."t" REPLICA IDENTITY FULL;' in done.stdout
    assert "1 problem" in done.stdout.splitlines()[-1]


def test_as_json_it_is_one_object_with_a_list(database: Database, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("""
        [[routes]]
        table = "public.t"
        to = "out"
        [sinks.out]
        type = "stdout"
    """)
    done = run("-c", "mine.toml", "--dsn", database.dsn, "--json", folder=tmp_path)
    assert done.returncode == EX_CONFIG
    report = json.loads(done.stdout)
    assert report["status"] == "problem"
    [route] = [found for found in report["findings"] if found["group"] == "routes"]
    assert route == {
        "group": "routes",
        "name": "routes[0]: public.t",
        "status": "problem",
        "found": "the table public.t does not exist",
        "mend": "",
    }


def test_a_server_that_cannot_be_reached_is_to_be_tried_again(tmp_path: Path) -> None:
    done = run("--dsn", "host=127.0.0.1 port=1", "--json", folder=tmp_path)
    assert done.returncode == EX_TEMPFAIL
    assert json.loads(done.stdout)["status"] == "unreachable"


def test_handlers_that_are_not_there_are_a_usage_error(tmp_path: Path) -> None:
    assert run("nowhere:stream", folder=tmp_path).returncode == EX_USAGE


def test_a_long_list_of_what_mends_is_shortened(database: Database, tmp_path: Path) -> None:
    database.execute(";".join(f"CREATE TABLE t{number} ()" for number in range(10)))
    (tmp_path / "walstream.toml").write_text("""
        [[routes]]
        table = "public.*"
        to = "out"
        [sinks.out]
        type = "stdout"
    """)
    done = run("--dsn", database.dsn, folder=tmp_path)
    assert "... 4 more lines with --json" in done.stdout


def test_a_report_is_as_grave_as_its_gravest_finding() -> None:
    grave = [Finding("", "", status, "", "") for status in Status]
    assert Report(tuple(grave)).status is Status.PROBLEM
    assert Report(()).status is Status.OK


async def test_what_a_handler_needs_of_its_table_is_looked_at(database: Database) -> None:
    """As at the start of a run: the columns of its key, and of its model."""
    database.execute("CREATE TABLE t (id int PRIMARY KEY)")
    stream = Walstream()
    stream.on("public.t", concurrency=2, key="nope", name="lanes")(print)
    report = await check(settings(database.dsn), stream.handlers)
    [found] = [one for one in report.findings if one.group == "routes"]
    assert found.status is Status.PROBLEM
    assert "'nope'" in found.found
