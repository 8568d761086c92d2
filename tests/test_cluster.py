"""The private cluster: what it starts, what it survives, and that it leaves nothing behind."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from tests.conftest import StartCluster
from tests.postgres import Database, wait_until
from walstream.cluster import DURABLE, PrivateCluster, ServerPrograms, find_programs
from walstream.errors import ClusterFailed, ServerProgramsMissing


def show(cluster: PrivateCluster, setting: str) -> str:
    with psycopg.connect(cluster.conninfo()) as connection:
        row = connection.execute(f"SHOW {setting}".encode()).fetchone()
    assert row is not None
    return str(row[0])


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A process whose parent does not wait for it is a zombie: gone, but for its number.
    return ") Z " not in Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")


def test_a_cluster_takes_wal2json_slots_and_is_gone_after_its_block(
    server_programs: ServerPrograms,
) -> None:
    with PrivateCluster(programs=server_programs) as cluster:
        with psycopg.connect(cluster.conninfo(), autocommit=True) as connection:
            connection.execute("SELECT pg_create_logical_replication_slot('s', 'wal2json')")
        pid = cluster.pid
        assert stat.S_IMODE(cluster.folder.stat().st_mode) == 0o700
        assert show(cluster, "listen_addresses") == ""
    assert not cluster.folder.exists()
    assert not is_alive(pid)
    assert not cluster.running


def test_a_copy_of_a_template_is_a_cluster_of_its_own(private_cluster: StartCluster) -> None:
    first, second = private_cluster(), private_cluster()
    with psycopg.connect(first.conninfo(), autocommit=True) as connection:
        connection.execute("CREATE DATABASE only_here")
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        psycopg.connect(second.conninfo("only_here"))


def test_settings_of_the_caller_go_before_the_defaults(private_cluster: StartCluster) -> None:
    cluster = private_cluster({"wal_sender_timeout": "2s", "application_name": r"it's \one"})
    assert show(cluster, "wal_sender_timeout") == "2s"
    assert show(cluster, "application_name") == r"it's \one"
    assert show(cluster, "fsync") == "off"


def test_changed_settings_hold_from_the_next_start(private_cluster: StartCluster) -> None:
    cluster = private_cluster()
    cluster.settings.update(DURABLE)
    cluster.restart()
    assert show(cluster, "fsync") == "on"


def test_wal2json_is_allowed_only_where_the_server_asks_for_it(
    private_cluster: StartCluster,
) -> None:
    cluster = private_cluster()
    configuration = (cluster.data / "walstream.conf").read_text(encoding="utf-8")
    assert ("output_plugin_libraries" in configuration) == cluster.knows_output_plugin_libraries


def test_a_latin1_cluster(private_cluster: StartCluster) -> None:
    cluster = private_cluster(encoding="LATIN1")
    assert show(cluster, "server_encoding") == "LATIN1"


def test_loopback_asks_for_the_password(private_cluster: StartCluster) -> None:
    cluster = private_cluster(loopback=True)
    with psycopg.connect(cluster.loopback_conninfo()) as connection:
        assert connection.info.host == "127.0.0.1"
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(cluster.loopback_conninfo(password="wrong"))  # noqa: S106


@pytest.mark.parametrize("how", ["stop", "restart", "immediate", "kill"])
def test_committed_rows_survive(private_cluster: StartCluster, how: str) -> None:
    cluster = private_cluster()
    with psycopg.connect(cluster.conninfo(), autocommit=True) as connection:
        connection.execute("CREATE TABLE t AS SELECT 1 AS n")
        match how:
            case "stop":
                cluster.stop()
                assert not cluster.running
                cluster.start()
            case "restart":
                cluster.restart()
            case "immediate":
                cluster.stop("immediate")
                cluster.start()
            case _:
                cluster.kill()
                assert not cluster.running
                cluster.start()
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT")
    with psycopg.connect(cluster.conninfo()) as connection:
        assert connection.execute("SELECT n FROM t").fetchone() == (1,)


def test_a_killed_cluster_leaves_nothing_in_the_kernel(private_cluster: StartCluster) -> None:
    cluster = private_cluster()
    lock_file = (cluster.data / "postmaster.pid").read_text(encoding="utf-8")
    segment = lock_file.splitlines()[6].split()[1]
    cluster.kill()
    segments = Path("/proc/sysvipc/shm").read_text(encoding="utf-8").splitlines()[1:]
    assert segment not in {line.split()[1] for line in segments}


def test_a_server_that_does_not_start_says_why(private_cluster: StartCluster) -> None:
    cluster = private_cluster()
    cluster.settings["no_such_setting"] = "on"
    with pytest.raises(ClusterFailed, match="no_such_setting"):
        cluster.restart()
    assert not cluster.running
    assert "no_such_setting" in cluster.log_tail()


def test_a_failing_initdb_says_why_and_leaves_nothing(server_programs: ServerPrograms) -> None:
    cluster = PrivateCluster(programs=server_programs, encoding="NO_SUCH")
    with pytest.raises(ClusterFailed, match="NO_SUCH"), cluster:
        pytest.fail("it started")
    assert not cluster.folder.exists()


def test_a_stop_that_takes_too_long_is_an_error(private_cluster: StartCluster) -> None:
    cluster = private_cluster()
    with psycopg.connect(cluster.conninfo()):
        # A smart shutdown waits for its clients.
        with pytest.raises(ClusterFailed, match="did not stop"):
            cluster.stop("smart", timeout_seconds=0.1)
        assert cluster.running


def test_stop_kill_and_remove_may_be_repeated(private_cluster: StartCluster) -> None:
    cluster = private_cluster()
    cluster.stop()
    cluster.stop()
    cluster.kill()
    assert not cluster.running
    with pytest.raises(ClusterFailed, match="not running"):
        _ = cluster.pid
    cluster.remove()
    cluster.remove()
    assert cluster.log_tail() == ""


OWNER = """
import time
from walstream.cluster import PrivateCluster

with PrivateCluster() as cluster:
    print(cluster.pid, cluster.folder, flush=True)
    time.sleep(100)
"""


@pytest.mark.usefixtures("server_programs")
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_the_program_is_ended(end: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        pid, folder = owner.stdout.readline().decode().split()
        assert is_alive(int(pid))
        owner.send_signal(end)
    wait_until(lambda: not Path(folder).exists())
    assert not is_alive(int(pid))


@pytest.mark.usefixtures("server_programs")
@pytest.mark.parametrize("moment_seconds", [0.1, 0.2, 0.3, 0.4, 0.5])
def test_nothing_is_left_when_the_program_is_ended_while_it_starts(
    tmp_path: Path, moment_seconds: float
) -> None:
    # pytest's own folder is too deep for a socket and closed to others: make one beside it.
    parent = Path(f"/tmp/walstream-test-{os.getpid()}-{tmp_path.name[-8:]}")  # noqa: S108
    parent.mkdir()
    parent.chmod(0o755)
    try:
        environment = {**os.environ, "TMPDIR": str(parent)}
        with subprocess.Popen(
            [sys.executable, "-c", OWNER],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as owner:
            with pytest.raises(subprocess.TimeoutExpired):
                owner.wait(moment_seconds)
            owner.send_signal(signal.SIGINT)
        wait_until(lambda: not list(parent.iterdir()))
    finally:
        parent.rmdir()


def test_the_folder_is_elsewhere_when_the_usual_one_is_too_deep_for_a_socket(
    server_programs: ServerPrograms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    cluster = PrivateCluster(programs=server_programs)
    assert not cluster.folder.is_relative_to(deep)


def test_the_named_folder_of_programs_must_have_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WALSTREAM_PG_BIN", str(tmp_path))
    with pytest.raises(ServerProgramsMissing, match="not found") as missing:
        find_programs()
    assert "WALSTREAM_PG_BIN" in missing.value.hint


def test_programs_without_wal2json_name_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WALSTREAM_PG_BIN", raising=False)
    monkeypatch.setattr("walstream.cluster._installed_folders", lambda: iter([tmp_path]))
    for program in ("initdb", "postgres"):
        script = tmp_path / program
        script.write_text("#!/bin/sh\necho 'postgres (PostgreSQL) 17.11 (Debian 17.11-1)'\n")
        script.chmod(0o755)
    with pytest.raises(ServerProgramsMissing, match="wal2json is not installed") as missing:
        find_programs()
    assert missing.value.hint.endswith("apt-get install postgresql-17-wal2json")


def test_without_a_server_the_hint_installs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WALSTREAM_PG_BIN", raising=False)
    monkeypatch.setattr("walstream.cluster._installed_folders", lambda: iter([]))
    with pytest.raises(ServerProgramsMissing, match="no PostgreSQL server") as missing:
        find_programs()
    assert "apt-get install postgresql-" in missing.value.hint
    assert missing.value.hint.endswith("-wal2json")


def test_each_test_has_a_database_of_its_own(database: Database) -> None:
    assert database.execute("SELECT current_database()") == [(database.name,)]
    assert database.execute("CREATE TABLE t (n int); INSERT INTO t VALUES (1)") == []
    assert database.execute("SELECT n FROM t WHERE n = %s", 1) == [(1,)]
    with database.connect() as connection:
        assert connection.autocommit


def test_a_database_is_dropped_with_slots_that_are_in_use(database: Database) -> None:
    """The fixture's end is the test: the slot is streaming when it comes."""
    database.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", database.name)
    walsender = psycopg.connect(f"{database.dsn} replication=database", autocommit=True)
    walsender.execute(f'START_REPLICATION SLOT "{database.name}" LOGICAL 0/0'.encode())
    walsender.pgconn.finish()
