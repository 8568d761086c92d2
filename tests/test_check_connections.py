"""``walstream check``: what stands between us and the server, and a server that does not answer."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import msgspec
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from tests.checks import finding, settings
from tests.conftest import StartCluster
from tests.postgres import Database, wait_until
from tests.proxy import Direction, Proxy, Which
from walstream import Walstream
from walstream.check import Status, check, connections, site
from walstream.check.connections import is_exposed
from walstream.check.findings import duration, size
from walstream.check.server import judge_version, standby_names
from walstream.check.site import Link
from walstream.cluster import PrivateCluster
from walstream.errors import ConfigError, UsageError

LINK = Link(
    user="walstream",
    host="db.example.org:5432",
    address="192.0.2.7",
    database="app",
    is_encrypted=False,
    sslmode="prefer",
    announced_pid=1,
    backend_pid=1,
    started_at="",
    in_recovery=False,
    ahead_seconds=0.0,
    error_seconds=0.0,
)

# ---- TLS


@pytest.mark.parametrize(
    ("address", "is_encrypted", "exposed"),
    [
        ("192.0.2.7", False, True),
        ("192.0.2.7", True, False),
        ("127.0.0.1", False, False),
        ("::1", False, False),
        ("fe80::1%eth0", False, True),
        ("", False, False),
    ],
)
def test_only_what_crosses_a_network_unencrypted_is_exposed(
    address: str, *, is_encrypted: bool, exposed: bool
) -> None:
    link = msgspec.structs.replace(LINK, address=address, is_encrypted=is_encrypted)
    assert is_exposed(link) is exposed


async def test_a_connection_across_a_network_without_tls_is_a_warning(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "is_exposed", lambda _: True)
    found = await finding(settings(database.dsn), "connection", "TLS")
    assert found.status is Status.WARNING
    assert found.found.startswith("catalog and replication: ")


async def test_an_encrypted_connection_says_whether_the_certificate_is_verified(
    private_cluster: StartCluster, tmp_path: Path
) -> None:
    cluster = private_cluster(loopback=True)
    certificate = _make_certificate(cluster, tmp_path)
    cluster.settings |= {"ssl": "on"}
    cluster.restart()
    for sslmode, told in {"require": "is not verified", "verify-ca": "is verified"}.items():
        dsn = cluster.loopback_conninfo(sslmode=sslmode, sslrootcert=str(certificate))
        found = await finding(settings(dsn), "connection", "TLS")
        assert found.status is Status.OK
        # With a file of authorities libpq verifies under require, too; its words do not say so.
        assert told in found.found


def _make_certificate(cluster: PrivateCluster, folder: Path) -> Path:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl")
    made = [
        *(openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"),
        *("-subj", "/CN=localhost", "-keyout", str(cluster.data / "server.key")),
        *("-out", str(cluster.data / "server.crt")),
    ]
    subprocess.run(made, check=True, capture_output=True)
    owner = cluster.data.stat()
    for name in ("server.key", "server.crt"):
        (cluster.data / name).chmod(0o600)
        os.chown(cluster.data / name, owner.st_uid, owner.st_gid)
    copy = folder / "server.crt"
    copy.write_bytes((cluster.data / "server.crt").read_bytes())
    return copy


# ---- Poolers


@contextmanager
def pooler(dsn: str, folder: Path) -> Iterator[str]:
    """PgBouncer before a server; the connection string through it."""
    program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("there is no pgbouncer")
    server = conninfo_to_dict(dsn)
    # Only its socket, in a folder of its own: whatever port is free elsewhere.
    folder.chmod(0o755)
    sockets = folder / "sockets"
    sockets.mkdir(mode=0o777)
    sockets.chmod(0o777)
    configuration = folder / "pgbouncer.ini"
    configuration.write_text(
        f"[databases]\n* = host={server['host']} port={server['port']} user={server['user']}"
        f" password={server.get('password', 'none')}\n"
        "[pgbouncer]\nlisten_addr =\nlisten_port = 6432\nauth_type = any\npool_mode = transaction\n"
        f"unix_socket_dir = {sockets}\n"
    )
    process = subprocess.Popen(
        [program, "-q", str(configuration)],
        user=_owner(str(server["host"])),
        stderr=subprocess.DEVNULL,
    )
    try:
        through = f"host={sockets} port=6432 user={server['user']} dbname={server['dbname']}"
        wait_until(lambda: _answers(through))
        yield through
    finally:
        process.terminate()
        process.wait()


def _answers(dsn: str) -> bool:
    try:
        psycopg.connect(dsn).close()
    except psycopg.OperationalError:
        return False
    return True


def _owner(host: str) -> int | None:
    """Who may reach the server: the pooler refuses to run as root."""
    if os.geteuid():
        return None
    return Path(host).stat().st_uid if host.startswith("/") else pwd.getpwnam("nobody").pw_uid


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that a program under another name can reach."""
    with tempfile.TemporaryDirectory(prefix="ws-") as folder:
        yield Path(folder)


async def test_a_pooler_is_fine_for_queries_and_named_where_it_is_to_carry_replication(
    database: Database, open_folder: Path
) -> None:
    with pooler(database.dsn, open_folder) as dsn:
        found = await finding(settings(dsn), "connection", "pooler")
        assert found.status is Status.PROBLEM
        assert "cannot carry replication" in found.found
        both = settings(dsn, replication_dsn=database.dsn)  # what it says
        found = await finding(both, "connection", "pooler")
        assert found.status is Status.OK
        assert "as it should be" in found.found
        assert (await finding(both, "wal2json", "installed")).status is Status.OK


async def test_without_a_pooler_there_is_none(database: Database) -> None:
    found = await finding(settings(database.dsn), "connection", "pooler")
    assert (found.status, found.found) == (Status.OK, "none")


# ---- Which server


async def test_connections_to_two_servers_of_one_cluster_are_told_apart(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when one of two lists of hosts leads to a standby."""
    whole = connections._link
    began = iter(["then", "now"])

    async def link(connection: psycopg.AsyncConnection) -> Link:
        return msgspec.structs.replace(await whole(connection), started_at=next(began))

    monkeypatch.setattr(connections, "_link", link)
    found = await finding(settings(database.dsn), "connection", "same database")
    assert found.status is Status.PROBLEM
    assert "another server of the same cluster" in found.found


async def test_several_hosts_may_lead_to_a_standby() -> None:
    several = "host=127.0.0.1,127.0.0.2 port=1"
    found = await finding(settings(several), "connection", "hosts")
    assert found.status is Status.WARNING
    with pytest.raises(ValueError, match="not enough values"):
        await finding(settings(f"{several} target_session_attrs=read-write"), "connection", "hosts")


async def test_a_clock_that_differs_is_told_with_the_side(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (await finding(settings(database.dsn), "connection", "clock")).status is Status.OK
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 90)
    found = await finding(settings(database.dsn), "connection", "clock")
    assert found.status is Status.WARNING
    assert found.found.startswith("90.0 s behind the server's")


# ---- A server that does not answer


async def test_a_locked_catalog_is_given_up_soon(
    private_cluster: StartCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site, "QUERY_SECONDS", 0.3)
    cluster = private_cluster()
    with psycopg.connect(cluster.conninfo()) as locker:
        locker.execute("LOCK pg_catalog.pg_database IN ACCESS EXCLUSIVE MODE")
        began = time.monotonic()
        async with asyncio.timeout(15):
            report = await check(settings(cluster.conninfo("postgres", connect_timeout=2)))
        assert report.status in {Status.UNREACHABLE, Status.PROBLEM}
        assert time.monotonic() - began < 10
        locker.rollback()
    assert (await check(settings(cluster.conninfo()))).status <= Status.WARNING


@pytest.mark.parametrize("which", [Which.ALL, Which.REPLICATION])
async def test_a_network_that_carries_nothing_any_more_is_given_up(
    database: Database, monkeypatch: pytest.MonkeyPatch, which: Which
) -> None:
    monkeypatch.setattr(site, "QUERY_SECONDS", 0.3)
    monkeypatch.setattr(site, "QUESTION_SECONDS", 0.6)
    with Proxy(database.dsn) as proxy:
        whole = connections._same_server

        async def stall(looked_at: site.Site) -> object:
            outcome = await whole(looked_at)
            await asyncio.to_thread(proxy.stall, which, Direction.BOTH)
            return outcome

        monkeypatch.setattr(
            "walstream.check._OF_THE_SERVER",
            [
                msgspec.structs.replace(question, ask=stall)
                if question.name == "same database"
                else question
                for question in connections.QUESTIONS
            ],
        )
        async with asyncio.timeout(10):
            report = await check(settings(proxy.dsn(database.dsn)))
    late = [one for one in report.findings if one.found == "the server does not answer in time"]
    assert late[0].status is Status.UNREACHABLE
    assert {one.status for one in late[1:]} == {Status.SKIPPED}


# ---- Versions and names


@pytest.mark.parametrize(
    ("version", "day", "status", "sentence"),
    [
        ((15, 20), date(2026, 12, 1), Status.OK, "named"),
        ((15, 18), date(2026, 12, 1), Status.WARNING, "15.19, which has it, refuses wal2json"),
        ((14, 24), date(2026, 11, 12), Status.OK, "named"),
        ((14, 24), date(2026, 11, 13), Status.WARNING, "gets no fixes since 2026-11-12"),
        ((19, 0), date(2026, 11, 13), Status.OK, "named"),
    ],
)
def test_a_version_says_whether_it_gets_fixes_and_what_the_next_brings(
    version: tuple[int, int], day: date, status: Status, sentence: str
) -> None:
    outcome = judge_version(*version, "named", day)
    assert outcome.status is status
    assert sentence in outcome.found


def test_what_only_the_next_minor_knows_is_not_to_be_run_before_it() -> None:
    steps = judge_version(15, 18, "named", date(2026, 9, 1)).mend.splitlines()
    assert steps[0] == "-- upgrade the server to 15.19 or later, and right after that:"
    assert "output_plugin_libraries" in steps[1]


@pytest.mark.parametrize(
    ("setting", "names"),
    [
        ("a", ["a"]),
        ("a, b", ["a", "b"]),
        ("2 (a, b,c)", ["a", "b", "c"]),
        ('FIRST 1 ("a b", "c""d")', ["a b", 'c"d']),
        ("any 1 (*)", ["*"]),
    ],
)
def test_the_names_of_synchronous_standbys_are_read(setting: str, names: list[str]) -> None:
    assert standby_names(setting) == names


async def test_commits_that_would_wait_for_walstream_are_told(
    private_cluster: StartCluster,
) -> None:
    cluster = private_cluster({"synchronous_standby_names": "FIRST 1 (other, Walstream)"})
    config = settings(cluster.conninfo())
    found = await finding(config, "server", "synchronous_standby_names")
    assert found.status is Status.WARNING
    assert "commits wait until it has delivered" in found.found
    another = config.model_copy(
        update={"postgres": config.postgres.model_copy(update={"application_name": "changes"})}
    )
    assert (await finding(another, "server", "synchronous_standby_names")).status is Status.OK


async def test_a_database_without_an_encoding_is_a_warning(private_cluster: StartCluster) -> None:
    cluster = private_cluster(encoding="SQL_ASCII")
    found = await finding(settings(cluster.conninfo()), "server", "encoding")
    assert found.status is Status.WARNING


@pytest.mark.parametrize(
    ("seconds", "text"), [(5.4, "5 s"), (61, "1 minute"), (7300, "2 hours"), (200_000, "2 days")]
)
def test_durations_are_told_by_their_largest_unit(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sizes_are_told_as_postgres_takes_them() -> None:
    assert [size(1), size(2048), size(5 << 20), size(3 << 30)] == [
        "1 bytes",
        "2 kB",
        "5 MB",
        "3.0 GB",
    ]


# ---- What a run refuses, too


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        ("CREATE VIEW t AS SELECT 1 AS id", "is a view, which has no changes of its own"),
        ("CREATE UNLOGGED TABLE t (id int)", "is unlogged: its changes never reach the WAL"),
    ],
)
async def test_a_run_refuses_what_no_change_will_ever_come_from(
    database: Database, made: str, reason: str
) -> None:
    database.execute(made)
    stream = Walstream()
    stream.on("public.t")(print)
    with pytest.raises(ConfigError, match=f"public.t {reason}"):
        await stream.run(settings(database.dsn, name=database.name), until="now")


async def test_nothing_routed_is_told_in_the_words_of_a_run(database: Database) -> None:
    with pytest.raises(UsageError) as refused:
        await Walstream().run(settings(database.dsn), until="now")
    found = await finding(settings(database.dsn), "routes", "routes")
    assert (found.found, found.mend) == (refused.value.message, f"-- {refused.value.hint}")
