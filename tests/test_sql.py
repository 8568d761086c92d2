"""The files of sql/, run by psql as an operator runs them: each one twice."""

from __future__ import annotations

import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.conftest import StartCluster
from tests.postgres import Database

FOLDER = Path(__file__).parent.parent / "sql"

pytestmark = pytest.mark.skipif(shutil.which("psql") is None, reason="needs psql")


def run(dsn: str, name: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run one file; ``variables`` are psql's."""
    assignments = [f"--set={variable}={value}" for variable, value in variables.items()]
    return subprocess.run(
        ["psql", "--no-psqlrc", f"--dbname={dsn}", *assignments, f"--file={FOLDER / name}"],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    )


def run_twice(dsn: str, name: str, **variables: str) -> str:
    """The output of the second run, when both went without an error or a warning."""
    outputs = []
    for _ in range(2):
        done = run(dsn, name, **variables)
        assert done.returncode == 0, done.stderr
        assert not done.stderr
        outputs.append(done.stdout)
    return outputs[1]


@pytest.fixture
def role(database: Database) -> Iterator[str]:
    """A role's name that needs quotes; the role is taken away afterwards if it was made."""
    name = f'Wal "{secrets.token_hex(4)}"'
    yield name
    done = run(database.dsn, "09_tear_down.sql", role=name, slot="")
    assert done.returncode == 0, done.stderr


def replica_identity(database: Database, table: str) -> str:
    [(identity,)] = database.execute(
        "SELECT relreplident::text FROM pg_class WHERE oid = %s::regclass", table
    )
    return str(identity)


def test_the_role_may_replicate_and_read(database: Database, role: str) -> None:
    database.execute('CREATE SCHEMA "Odd one"; CREATE TABLE "Odd one".t (); CREATE TABLE t ()')
    run_twice(database.dsn, "01_role_and_grants.sql", role=role, schemas="public, Odd one")
    assert database.execute(
        "SELECT rolcanlogin, rolreplication, rolsuper FROM pg_roles WHERE rolname = %s", role
    ) == [(True, True, False)]
    database.execute('CREATE TABLE "Odd one".made_later ()')
    for table in ("t", '"Odd one".t', '"Odd one".made_later'):
        assert database.execute(
            "SELECT has_table_privilege(oid, %s, 'SELECT'), has_table_privilege(oid, %s, 'INSERT')"
            " FROM pg_roles WHERE rolname = %s",
            table,
            table,
            role,
        ) == [(True, False)]


def test_names_have_defaults(private_cluster: StartCluster) -> None:
    dsn = private_cluster().conninfo()
    output = run_twice(dsn, "01_role_and_grants.sql")
    assert "walstream | t     | t           | f" in output
    run_twice(dsn, "09_tear_down.sql")


def test_monitoring_is_granted_and_revoked(database: Database, role: str) -> None:
    def is_monitor() -> list[tuple[bool]]:
        return database.execute(
            "SELECT pg_has_role(oid, 'pg_monitor', 'member') FROM pg_roles WHERE rolname = %s", role
        )

    run_twice(database.dsn, "01_role_and_grants.sql", role=role, monitor="on")
    assert is_monitor() == [(True,)]
    run_twice(database.dsn, "01_role_and_grants.sql", role=role)
    assert is_monitor() == [(False,)]


def test_replica_identities_are_set_and_set_back(database: Database) -> None:
    database.execute("""
        CREATE TABLE first (id int PRIMARY KEY, code text NOT NULL);
        CREATE UNIQUE INDEX "First code" ON first (code);
        CREATE SCHEMA "Odd";
        CREATE TABLE "Odd"."Na.me" (n int);
    """)
    file = "02_replica_identity.sql"
    output = run_twice(database.dsn, file)
    assert "none: updates and deletes are lost" in output

    output = run_twice(database.dsn, file, full='first, "Odd"."Na.me"')
    assert "every column" in output
    assert [replica_identity(database, t) for t in ("first", '"Odd"."Na.me"')] == ["f", "f"]

    output = run_twice(database.dsn, file, index="public.first:First code")
    assert 'index "First code"' in output
    assert replica_identity(database, "first") == "i"

    run_twice(database.dsn, file, default='public.first,"Odd"."Na.me"')
    assert [replica_identity(database, t) for t in ("first", '"Odd"."Na.me"')] == ["d", "d"]


def test_one_unknown_table_leaves_all_identities_alone(database: Database) -> None:
    database.execute("CREATE TABLE first (id int PRIMARY KEY)")
    done = run(database.dsn, "02_replica_identity.sql", full="first,no_such_table")
    assert done.returncode == 3
    assert '"no_such_table" does not exist' in done.stderr
    assert replica_identity(database, "first") == "d"


def test_wal2json_is_added_to_the_libraries_that_are_allowed(
    private_cluster: StartCluster,
) -> None:
    cluster = private_cluster()
    if not cluster.knows_output_plugin_libraries:
        pytest.skip(f"PostgreSQL {cluster.programs.version} has no output_plugin_libraries")
    cluster.settings["output_plugin_libraries"] = "pgoutput, test_decoding"
    cluster.restart()
    create_slot = b"SELECT pg_create_logical_replication_slot('s', 'wal2json', true)"
    with psycopg.connect(cluster.conninfo(), autocommit=True) as connection:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(create_slot)
        output = run_twice(cluster.conninfo(), "03_output_plugin_libraries.sql")
        assert "pgoutput, test_decoding, wal2json" in output
    with psycopg.connect(cluster.conninfo(), autocommit=True) as connection:
        connection.execute(create_slot)


def test_a_server_without_the_setting_is_left_alone(private_cluster: StartCluster) -> None:
    cluster = private_cluster()
    if cluster.knows_output_plugin_libraries:
        pytest.skip(f"PostgreSQL {cluster.programs.version} has output_plugin_libraries")
    output = run_twice(cluster.conninfo(), "03_output_plugin_libraries.sql")
    assert "does not know the setting" in output
    cluster.restart()


def test_monitoring_shows_the_slot_and_who_reads_it(database: Database) -> None:
    slot = f"{database.name}_slot"
    database.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", slot)
    with psycopg.connect(f"{database.dsn} replication=database", autocommit=True) as walsender:
        walsender.execute(f'START_REPLICATION SLOT "{slot}" LOGICAL 0/0'.encode())
        output = run_twice(database.dsn, "04_monitoring.sql", slot=slot)
        walsender.pgconn.finish()
    assert output.count(slot) == 3
    assert "reserved" in output
    assert slot in run_twice(database.dsn, "04_monitoring.sql")


LIVE = ("messages_v2", "reminders", "user_interactions")


def test_tables_to_be_followed_live_are_made_and_may_be_read(database: Database, role: str) -> None:
    run_twice(database.dsn, "01_role_and_grants.sql", role=role)
    output = run_twice(database.dsn, "07_live_tables.sql", role=role, schema="Odd one")
    assert output.count('"Odd one".') == len(LIVE)
    identities = [replica_identity(database, f'"Odd one".{table}') for table in LIVE]
    assert identities == ["f", "d", "d"]
    for table in LIVE:
        assert database.execute(
            "SELECT has_table_privilege(oid, %s, 'SELECT') FROM pg_roles WHERE rolname = %s",
            f'"Odd one".{table}',
            role,
        ) == [(True,)]


def test_tables_that_are_there_keep_their_columns_and_rows(database: Database) -> None:
    database.execute(
        "CREATE TABLE messages_v2 (id int PRIMARY KEY); INSERT INTO messages_v2 VALUES (1)"
    )
    run_twice(database.dsn, "07_live_tables.sql", role="nobody")
    assert database.execute("TABLE messages_v2") == [(1,)]
    assert replica_identity(database, "messages_v2") == "f"


def test_row_security_shows_the_conversations_of_the_claims(private_cluster: StartCluster) -> None:
    dsn = private_cluster().conninfo()
    run_twice(dsn, "07_live_tables.sql")
    output = run_twice(dsn, "08_row_security.sql")
    assert output.count("| t            |") == len(LIVE)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO messages_v2 (conversation_id, sender, content)"
            " VALUES ('a', 'Ada', '1'), ('b', 'Ben', '2'), ('c', 'Cem', '3')"
        )
        connection.execute("SET SESSION AUTHORIZATION walstream_asks")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("TABLE messages_v2")
        connection.execute("SET ROLE authenticated")
        assert connection.execute("TABLE messages_v2").fetchall() == []
        connection.execute(
            """SELECT set_config('request.jwt.claims', '{"conversations": ["a", "c"]}', false)"""
        )
        shown = connection.execute("SELECT sender FROM messages_v2 ORDER BY id").fetchall()
        assert shown == [("Ada",), ("Cem",)]


def test_tear_down_leaves_no_role_and_no_slot(database: Database, role: str) -> None:
    slot = f"{database.name}_slot"
    database.execute("CREATE TABLE t ()")
    database.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", slot)
    run_twice(database.dsn, "01_role_and_grants.sql", role=role)
    run_twice(database.dsn, "09_tear_down.sql", role=role, slot=slot)
    assert not database.execute("SELECT FROM pg_roles WHERE rolname = %s", role)
    assert not database.execute("SELECT FROM pg_replication_slots WHERE slot_name = %s", slot)


def test_tear_down_does_not_drop_what_the_role_owns(database: Database, role: str) -> None:
    run_twice(database.dsn, "01_role_and_grants.sql", role=role)
    quoted = '"' + role.replace('"', '""') + '"'
    database.execute(f"CREATE TABLE precious (); ALTER TABLE precious OWNER TO {quoted}")
    done = run(database.dsn, "09_tear_down.sql", role=role, slot="")
    assert done.returncode == 3
    assert "owns table precious" in done.stderr
    assert database.execute("SELECT to_regclass('precious') IS NOT NULL") == [(True,)]
    database.execute("DROP TABLE precious")
