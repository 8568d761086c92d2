"""The proxy does to connections what the tests of faults say that it does."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator

import psycopg
import pytest
from psycopg.pq.abc import PGconn

from tests.postgres import Database, wait_until
from tests.proxy import LOOPBACK, Connection, Direction, Proxy, Which

LINE = "SELECT repeat('x', 1000)"


@pytest.fixture
def proxy(database: Database) -> Iterator[Proxy]:
    with Proxy(database.dsn) as proxy:
        yield proxy


@pytest.fixture
def through(database: Database, proxy: Proxy) -> Iterator[psycopg.Connection]:
    with psycopg.connect(proxy.dsn(database.dsn), autocommit=True) as connection:
        yield connection


def test_connections_pass_and_replication_is_recognised(database: Database, proxy: Proxy) -> None:
    dsn = proxy.dsn(database.dsn)
    with (
        psycopg.connect(dsn, application_name="one") as one,
        psycopg.connect(dsn, replication="database", autocommit=True) as other,
    ):
        assert one.execute("SELECT 1").fetchone() == (1,)
        other.execute("IDENTIFY_SYSTEM")
        kinds = [(seen.replication, seen.application_name) for seen in proxy.connections]
        assert kinds == [(False, "one"), (True, "")]
        assert all(seen.to_client_bytes > 100 for seen in proxy.connections)
    wait_until(lambda: not proxy.connections)


def test_a_cut_resets_those_that_are_meant(database: Database, proxy: Proxy) -> None:
    dsn = proxy.dsn(database.dsn)
    one = psycopg.connect(dsn, autocommit=True)
    other = psycopg.connect(dsn, replication="database", autocommit=True)
    assert proxy.cut(Which.REPLICATION) == 1
    with pytest.raises(psycopg.OperationalError):
        other.execute("IDENTIFY_SYSTEM")
    one.execute("SELECT 1")
    assert proxy.cut() == 1
    with pytest.raises(psycopg.OperationalError):
        one.execute("SELECT 1")
    psycopg.connect(dsn).close()


def test_a_cut_behind_some_bytes_lets_those_arrive(
    proxy: Proxy, through: psycopg.Connection
) -> None:
    passed = proxy.connections[0].to_client_bytes
    proxy.cut_after(500)
    seen: list[Connection] = []
    with pytest.raises(psycopg.OperationalError):
        through.execute(LINE)
    seen += proxy.connections
    assert all(one.to_client_bytes == passed + 500 for one in seen)


def test_a_cut_can_wait_for_the_next_connection(database: Database, proxy: Proxy) -> None:
    proxy.cut_after(10)
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(proxy.dsn(database.dsn))
    psycopg.connect(proxy.dsn(database.dsn)).close()


@pytest.mark.parametrize("direction", [*Direction])
def test_a_stall_holds_everything_until_it_is_over(
    proxy: Proxy, through: psycopg.Connection, direction: Direction
) -> None:
    pgconn = through.pgconn
    before = proxy.connections[0]
    proxy.stall(direction=direction)
    pgconn.send_query(LINE.encode())
    pgconn.flush()
    if direction is Direction.TO_CLIENT:
        wait_until(lambda: proxy.connections[0].to_server_bytes > before.to_server_bytes)
    assert proxy.connections[0].to_client_bytes == before.to_client_bytes
    pgconn.consume_input()
    assert pgconn.is_busy()
    proxy.restore()
    wait_until(lambda: has_answer(pgconn))
    result = pgconn.get_result()
    assert result is not None
    assert len(result.get_value(0, 0) or b"") == 1000
    assert pgconn.get_result() is None


def test_a_new_connection_into_a_stall_is_taken_and_not_answered(
    database: Database, proxy: Proxy
) -> None:
    proxy.stall()
    dsn = proxy.dsn(database.dsn)
    with pytest.raises(psycopg.OperationalError, match="timeout"):
        psycopg.connect(dsn, connect_timeout=2)
    proxy.restore()
    psycopg.connect(dsn).close()


def test_who_is_refused_is_told_at_once(
    database: Database, proxy: Proxy, through: psycopg.Connection
) -> None:
    proxy.refuse()
    with pytest.raises(psycopg.OperationalError, match="refused"):
        psycopg.connect(proxy.dsn(database.dsn))
    through.execute("SELECT 1")
    proxy.restore()
    psycopg.connect(proxy.dsn(database.dsn)).close()


def test_one_byte_at_a_time_is_all_the_same(proxy: Proxy, through: psycopg.Connection) -> None:
    proxy.trickle()
    assert through.execute(LINE).fetchone() == ("x" * 1000,)


def test_a_delay_comes_before_each_piece(proxy: Proxy, through: psycopg.Connection) -> None:
    proxy.delay(0.1, direction=Direction.TO_CLIENT)
    begun = time.monotonic()
    through.execute("SELECT 1")
    assert time.monotonic() - begun >= 0.1


def test_the_client_sees_the_end_and_the_server_does_not(proxy: Proxy) -> None:
    startup = struct.pack("!i", 196608) + b"user\0nobody\0replication\0database\0\0"
    with socket.create_connection((LOOPBACK, proxy.port)) as client:
        client.sendall(struct.pack("!i", len(startup) + 4) + startup[:10])
        wait_until(lambda: proxy.connections)
        client.sendall(startup[10:])
        wait_until(lambda: proxy.connections[0].replication)
        wait_until(lambda: proxy.half_close(Direction.TO_CLIENT))
        while client.recv(1000):
            pass
        client.sendall(b"x")


def test_the_server_sees_the_end_and_the_client_is_told_by_it(
    database: Database, proxy: Proxy, through: psycopg.Connection
) -> None:
    pid = through.info.backend_pid
    proxy.half_close(Direction.TO_SERVER)
    wait_until(lambda: not database.execute("SELECT 1 FROM pg_stat_activity WHERE pid = %s", pid))
    with pytest.raises(psycopg.OperationalError):
        through.execute("SELECT 1")


def test_it_can_lead_elsewhere(database: Database, proxy: Proxy) -> None:
    proxy.lead_to("host=127.0.0.1 port=1")
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(proxy.dsn(database.dsn))
    proxy.lead_to(database.dsn)
    psycopg.connect(proxy.dsn(database.dsn)).close()


def has_answer(pgconn: PGconn) -> bool:
    """Whether `get_result` would return at once: while it waits no other thread runs."""
    pgconn.consume_input()
    return not pgconn.is_busy()
