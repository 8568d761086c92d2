"""What PostgreSQL's and libpq's errors mean: who must act, and that no password is in them."""

from __future__ import annotations

import secrets

import psycopg
import pytest
from psycopg import errors
from psycopg.conninfo import make_conninfo

from tests.postgres import Database
from walstream.errors import (
    AccessRefused,
    ConfigError,
    ConnectionLost,
    DatabaseUnfit,
    ServerFailed,
    ServerShutdown,
    SlotExhausted,
    SlotLost,
    Unavailable,
    WalstreamError,
)
from walstream.postgres import connect, connect_error, server_error

FAILED = 'connection failed: connection to server at "127.0.0.1", port 5432 failed: FATAL:  '


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('too many connections for role "lim"', SlotExhausted),
        ('too many connections for database "db"', SlotExhausted),
        ("sorry, too many clients already", SlotExhausted),
        ("remaining connection slots are reserved for roles with SUPERUSER", SlotExhausted),
        ("no more connections allowed (max_client_conn)", SlotExhausted),
        ("number of requested standby connections exceeds max_wal_senders", SlotExhausted),
        ('password authentication failed for user "me"', AccessRefused),
        ('LDAP authentication failed for user "me"', AccessRefused),
        ('role "me" does not exist', AccessRefused),
        ('role "me" is not permitted to log in', AccessRefused),
        ('no pg_hba.conf entry for host "::1", user "me", database "db"', AccessRefused),
        ("must be superuser or replication role to start walsender", AccessRefused),
        ('database "db" does not exist', DatabaseUnfit),
        ("unsupported startup parameter: replication", DatabaseUnfit),
        ('unrecognized configuration parameter "foo"', ConfigError),
        ("the database system is shutting down", ServerShutdown),
        ("the database system is starting up", ConnectionLost),
        ("role of the server is being switched", ConnectionLost),
    ],
)
def test_what_a_refused_connection_means(text: str, kind: type[WalstreamError]) -> None:
    error = connect_error(psycopg.OperationalError(FAILED + text))
    assert type(error) is kind
    assert "connection failed:" not in error.message


@pytest.mark.parametrize(
    "dsn",
    [
        "host=127.0.0.1 port=1 connect_timeout=abc",
        "host=127.0.0.1 port=1 sslmode=nonsense",
        "host=127.0.0.1 port=1 channel_binding=nonsense",
        "host=127.0.0.1 port=1 keepalives=nonsense",
        "host=127.0.0.1 port=1 target_session_attrs=nonsense",
        "host=127.0.0.1 port=1 ssl_min_protocol_version=nonsense",
        "host=127.0.0.1 port=99999",
        "host=127.0.0.1 port=1,2,3",
        "hostaddr=nonsense",
        "service=nonsense",
        "host=no..host",
        "postgresql://me:hunter2@no@host/db",
    ],
)
async def test_parameters_that_no_server_will_take_are_the_operators(dsn: str) -> None:
    with pytest.raises(ConfigError) as caught:
        await connect(dsn, application_name="test")
    assert caught.value.exit_code == 78
    assert "hunter2" not in str(caught.value)


async def test_a_server_that_is_not_there_is_waited_for() -> None:
    for dsn in ("host=127.0.0.1 port=1", "host=/nowhere", "host=nowhere.invalid"):
        with pytest.raises(ConnectionLost):
            await connect(dsn, application_name="test")


async def test_a_role_that_has_all_its_connections_is_waited_for(database: Database) -> None:
    role = f"limited_{secrets.token_hex(4)}"
    database.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'hunter2' CONNECTION LIMIT 1")
    dsn = make_conninfo(database.dsn, user=role, password="hunter2")  # noqa: S106 - made here
    try:
        with psycopg.connect(dsn), pytest.raises(SlotExhausted, match=role):
            await connect(dsn, application_name="test")
    finally:
        database.execute(f"DROP ROLE {role}")


@pytest.mark.parametrize(
    "parameters",
    [
        "host=hunter2.invalid password=hunter2",
        "host=/hunter2/hunter2 password=hunter2",
        "postgresql://me:hunt%40er2@%2Fhunt%40er2/db",
    ],
)
async def test_no_error_of_connecting_holds_the_password(parameters: str) -> None:
    with pytest.raises(ConnectionLost) as caught:
        await connect(parameters, application_name="test")
    assert "er2" not in str(caught.value) + repr(caught.value)
    assert "***" in caught.value.message
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


async def test_the_password_of_the_environment_is_in_no_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PGPASSWORD", "hunter2")
    with pytest.raises(ConnectionLost) as caught:
        await connect("host=hunter2.invalid", application_name="test")
    assert "hunter2" not in str(caught.value)


def test_a_password_of_one_letter_does_not_garble_every_message() -> None:
    error = connect_error(psycopg.OperationalError(f"{FAILED}starting up"), ["a", ""])
    assert "starting up" in error.message


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (errors.UndefinedFile("requested WAL segment 000001 has already been removed"), SlotLost),
        (errors.InternalError_("requested WAL segment 01 has already been removed"), SlotLost),
        (errors.TooManyConnections("too many connections"), SlotExhausted),
        (errors.QueryCanceled("canceling statement due to statement timeout"), Unavailable),
        (errors.DiskFull("could not write to file"), Unavailable),
        (errors.OutOfMemory("out of memory"), Unavailable),
        (errors.ProtocolViolation("query_wait_timeout"), ConnectionLost),
        (errors.SyntaxError('syntax error at or near "IDENTIFY_SYSTEM"'), DatabaseUnfit),
        (errors.SyntaxError('syntax error at or near "x"'), ServerFailed),
        (errors.InternalError_("unexpected"), ServerFailed),
    ],
)
def test_what_an_error_of_the_server_means(
    raised: psycopg.Error, kind: type[WalstreamError]
) -> None:
    assert type(server_error(raised)) is kind


def test_a_protocol_violation_is_a_poolers_doing_only_where_it_replicates() -> None:
    error = server_error(errors.ProtocolViolation("no such thing"), replication=True)
    assert type(error) is DatabaseUnfit
    assert "pooler" in error.hint
