"""Connecting to PostgreSQL: connection strings, pinned settings, and what its errors mean.

The one place where a server's error becomes one of ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import psycopg
from psycopg import AsyncConnection
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import TupleRow

from walstream.errors import (
    AccessRefused,
    ConfigError,
    ConnectionLost,
    DatabaseUnfit,
    PluginMissing,
    PluginRefused,
    PluginTooOld,
    RelationMissing,
    ServerFailed,
    ServerShutdown,
    SlotBusy,
    SlotCreationBlocked,
    SlotExhausted,
    SlotExists,
    SlotLost,
    SlotMissing,
    SlotUnfit,
    Unavailable,
    WalstreamError,
)

SESSION_SETTINGS: Final = {
    "bytea_output": "hex",
    "DateStyle": "ISO, MDY",
    "IntervalStyle": "postgres",
    "TimeZone": "'UTC'",
    "extra_float_digits": "1",
    "xmlbinary": "base64",
    "search_path": "pg_catalog",
}
"""As SQL writes them. What values look like in a session, whatever the role or the database says.

wal2json prints values by the settings of its session (``escape`` corrupts bytea silently, its issue
301). Set by plain SET, because poolers drop ``options=``. An empty path of schemas makes every name
that the server prints or reads a qualified one.
"""

_CONNECT_DEFAULTS: Final = {
    "connect_timeout": "10",
    # A peer that vanished without a word is noticed within a minute, not within two hours.
    "keepalives_idle": "15",
    "keepalives_interval": "5",
    "keepalives_count": "6",
    "tcp_user_timeout": "45000",
}


_PYTHON_ENCODINGS: Final = {
    "EUC_CN": "gb2312",
    "EUC_JIS_2004": "euc_jis_2004",
    "EUC_JP": "euc_jp",
    "EUC_KR": "euc_kr",
    "ISO_8859_5": "iso8859-5",
    "ISO_8859_6": "iso8859-6",
    "ISO_8859_7": "iso8859-7",
    "ISO_8859_8": "iso8859-8",
    "KOI8R": "koi8-r",
    "KOI8U": "koi8-u",
    **{f"LATIN{number}": f"latin{number}" for number in range(1, 11)},
    "SQL_ASCII": "utf-8",
    "WIN866": "cp866",
    "WIN874": "cp874",
    **{f"WIN{page}": f"cp{page}" for page in range(1250, 1259)},
}


def python_encoding(encoding: str) -> str | None:
    """Return Python's name of a database's encoding (PostgreSQL documentation, 24.3.1).

    None is UTF-8 that the server vouches for. SQL_ASCII vouches for nothing: its text is read as
    UTF-8, and refused where it is not.

    Raises:
        DatabaseUnfit: Python has no such encoding (EUC_TW, MULE_INTERNAL).
    """
    if encoding == "UTF8":
        return None
    try:
        return _PYTHON_ENCODINGS[encoding]
    except KeyError:
        message = f"the database's encoding is {encoding}, which Python cannot read"
        raise DatabaseUnfit(message, hint="use a database in UTF8") from None


def check_dsn(dsn: str) -> None:
    """Refuse a connection string that libpq cannot read.

    A URI with a bare ``@`` or ``/`` in its password is one to libpq, which takes the password's
    tail for the host, the port or the database, and names it in its errors.

    Raises:
        ValueError: the reason, without the string, which may hold a password.
    """
    try:
        parameters = conninfo_to_dict(dsn)
    except psycopg.ProgrammingError:
        message = (
            "is not a connection string; one looks like postgresql://user@host:5432/database"
            " or host=... dbname=..."
        )
        raise ValueError(message) from None
    if _is_torn(dsn) or not re.fullmatch(r"[\d,\s]*", str(parameters.get("port", ""))):
        message = (
            "has a host, port or database that cannot be one: in postgresql://... characters of a"
            " password such as @ / : ? # % must be percent-encoded (%40 for @, %2F for /), and a"
            " port is a number"
        )
        raise ValueError(message)


def _is_torn(dsn: str) -> bool:
    """Whether a URI has an ``@`` behind the one that ends user and password, as libpq reads it."""
    if not dsn.startswith(("postgresql://", "postgres://")):
        return False
    rest = dsn.partition("://")[2]
    userinfo, at, behind = rest.partition("@")
    if not at or "/" in userinfo:  # libpq: no user, all is host, port and database
        behind = rest
    return "@" in behind.partition("?")[0]


async def connect(
    dsn: str, *, application_name: str, replication: bool = False
) -> AsyncConnection[TupleRow]:
    """Open a connection in autocommit mode, for replication with `SESSION_SETTINGS`.

    An ordinary connection may be a pooler's, whose sessions others use next: nothing is set there.

    TLS, several hosts, service and password files are libpq's: whatever the connection string and
    the ``PG...`` environment variables say.

    Raises:
        Unavailable: the server cannot be reached, or not now.
        SetupError: the server refuses, or libpq does not know what a parameter says.
    """
    more = {"replication": "database"} if replication else {}
    conninfo = complete(dsn, application_name=application_name, **more)
    try:
        connection = await AsyncConnection.connect(
            conninfo, autocommit=True, prepare_threshold=None
        )
    except CONNECT_ERRORS as error:
        raise not_connected(error, dsn) from None  # its text is not scrubbed
    if not replication:
        return connection
    try:
        await _pin_settings(connection)
    except psycopg.Error as error:
        await connection.close()
        raise server_error(error, replication=True) from error
    except BaseException:
        await connection.close()
        raise
    return connection


PIN_SECONDS: Final = 30.0
"""How long the server may take for the settings of a session."""


@contextmanager
def impatient(connection: AsyncConnection[Any], seconds: float) -> Iterator[None]:
    """Cut the connection when the block lasts longer than it may.

    A time-out of asyncio's would not do: psycopg answers a cancellation by cancelling the query on
    the server, and waits for the result on the same wire, which may be what does not answer.
    """
    timer = asyncio.get_running_loop().call_later(seconds, cut, connection)
    try:
        yield
    finally:
        timer.cancel()


def cut(connection: AsyncConnection[Any]) -> None:
    """End a connection from below: whoever waits for the server gets an error at once."""
    if connection.closed:
        return
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as wire:
        wire.shutdown(socket.SHUT_RDWR)


CONNECT_ERRORS: Final = (psycopg.Error, UnicodeError)
"""What psycopg raises when it cannot connect; UnicodeError for what is no name of a host."""


def complete(dsn: str, *, application_name: str, **options: str) -> str:
    """Return a connection string with what every connection of ours has, unless it says otherwise.

    Raises:
        ConfigError: libpq cannot read it.
    """
    try:
        check_dsn(dsn)
    except ValueError as error:
        raise ConfigError([f"the connection string {error}"]) from None
    given = conninfo_to_dict(dsn)
    defaults: dict[str, Any] = {
        name: value for name, value in _CONNECT_DEFAULTS.items() if name not in given
    }
    defaults["fallback_application_name"] = application_name
    defaults["client_encoding"] = "UTF8"  # psycopg gives bytes for text in SQL_ASCII
    return make_conninfo(dsn, **defaults, **options)


def not_connected(error: Exception, dsn: str) -> WalstreamError:
    """Say what one of `CONNECT_ERRORS` means, without the secrets of the connection string."""
    given = conninfo_to_dict(dsn)
    return _with_hint_at_defaults(connect_error(error, _secrets(given)), given)


async def _pin_settings(connection: AsyncConnection[TupleRow]) -> None:
    with impatient(connection, PIN_SECONDS):
        for name, value in SESSION_SETTINGS.items():
            await connection.execute(f"SET {name} TO {value}".encode())


def _with_hint_at_defaults(error: WalstreamError, given: Mapping[str, Any]) -> WalstreamError:
    if not given and not error.hint:
        error.hint = (
            "no dsn is configured, so libpq's defaults and PG... variables were used: set dsn under"
            " [postgres], or WALSTREAM_POSTGRES_DSN"
        )
    return error


def _secrets(parameters: Mapping[str, Any]) -> list[str]:
    secrets = [str(value) for name, value in parameters.items() if "password" in name]
    return [*secrets, os.environ.get("PGPASSWORD", "")]


_SHORTEST_SECRET: Final = 3
"""Shorter ones are found in every sentence, and tell nothing there."""


def _scrubbed(text: str, secrets: Iterable[str]) -> str:
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, "***")
    return text


_UNUSABLE: Final = re.compile(
    r"invalid ([\w-]+|\"\w+\") value|invalid integer value|bad value for|invalid port number"
    r"|Servname not supported|could not match \d+|could not parse network address|weak sslmode"
    r"|invalid when SSL support is not compiled in"
    r"|invalid value for parameter|unrecognized configuration parameter"
    r"|definition of service|service file .* not found|in service file"
)
"""What libpq, psycopg and the resolver say of parameters that no server will ever take."""

_FULL: Final = re.compile(
    r"too many connections|too many clients|remaining connection slots|no more connections allowed"
)

_REFUSED: Final = re.compile(
    r"authentication failed|no password supplied|no pg_hba\.conf entry|pg_hba\.conf rejects"
    r'|role ".*" (does not exist|is not permitted)|permission denied for database'
    r"|certificate|private key file|does not support SSL"
)


def connect_error(  # noqa: PLR0911 - one table
    error: Exception, secrets: Iterable[str] = ()
) -> WalstreamError:
    """Say what a failed attempt to connect means.

    libpq gives no SQLSTATE for these, only the server's text.

    Args:
        error: what psycopg raised.
        secrets: what must not be in the message, whoever has put it there.
    """
    text = _scrubbed(" ".join(str(error).split()), secrets)
    if isinstance(error, psycopg.ProgrammingError | UnicodeError) or _UNUSABLE.search(text):
        return ConfigError(
            [f"the connection parameters cannot be used: {_last(text)}"],
            hint="check the dsn, and the PG... variables that libpq reads",
        )
    if "shutting down" in text:
        return ServerShutdown("the server is shutting down")
    if "unsupported startup parameter" in text:
        return DatabaseUnfit(f"replication does not pass: {_last(text)}", hint=NO_POOLER)
    if "must be superuser or replication role" in text or "REPLICATION attribute" in text:
        return AccessRefused(
            "the role may not use replication",
            hint="ALTER ROLE <role> REPLICATION; see sql/01_role_and_grants.sql",
        )
    if "database " in text and "does not exist" in text:
        return DatabaseUnfit(f"the database cannot be opened: {_last(text)}", hint="check the dsn")
    if "number of requested standby connections exceeds" in text:
        return SlotExhausted(
            "all walsenders of the server are in use", hint="raise max_wal_senders and restart"
        )
    if _FULL.search(text):
        return SlotExhausted(
            f"the server takes no further connection: {_last(text)}",
            hint="raise max_connections, or the connection limit of the role or the database",
        )
    if _REFUSED.search(text):
        return AccessRefused(
            f"the server refused the connection: {_last(text)}",
            hint="check role, password, sslmode, and the server's pg_hba.conf",
        )
    return ConnectionLost(f"no connection to the server: {_last(text)}")


def server_error(  # noqa: C901, PLR0911, PLR0912 - one table
    error: psycopg.Error, *, replication: bool = False
) -> WalstreamError:
    """Say what an error on an open connection means, who must act, and how.

    Args:
        error: what psycopg raised.
        replication: it came on a replication connection, which a pooler cannot carry.
    """
    state = error.sqlstate
    text = error.diag.message_primary or " ".join(str(error).split())
    match state:
        case None | "08006" | "08003" | "08000":
            return ConnectionLost(f"the connection was cut: {_last(text)}")
        case "57P01" | "57P02" | "57P03" | "57P05":
            return ServerShutdown(f"the server ended the connection: {text}")
        case "42501" if "output plugin" in text:
            return PluginRefused(
                f"the server refuses wal2json: {text}"
                + (f" ({error.diag.message_detail})" if error.diag.message_detail else ""),
                hint=ALLOW_PLUGIN,
            )
        case "42501":
            return AccessRefused(
                f"the role lacks a right: {text}",
                hint="grant what sql/01_role_and_grants.sql grants, and the REPLICATION attribute",
            )
        case "58P01" if "wal2json" in text:
            return PluginMissing(f"wal2json is not installed: {text}", hint=INSTALL_PLUGIN)
        case _ if "requested WAL segment" in text and "removed" in text:
            return _slot_lost(text)
        case "55006":
            return SlotBusy(text)
        case "55P03":
            return SlotCreationBlocked("the slot's creation waits for running transactions")
        case "42704" if "slot" in text:
            return SlotMissing(text, hint="walstream slot create, or create = true under [slot]")
        case "42710" if "slot" in text:
            return SlotExists(
                text, hint="walstream slot status shows it; drop it first to renew it"
            )
        case "42P01" | "42703" | "3F000":
            return RelationMissing(text)
        case "53400":
            return SlotExhausted(
                text, hint="drop slots that nobody uses, or raise max_replication_slots and restart"
            )
        case "53300":
            return SlotExhausted(text, hint="raise max_connections or max_wal_senders")
        case "55000" if "can no longer" in text or "invalidated" in text:
            return _slot_lost(text)
        case "55000" if "wal_level" in text:
            return DatabaseUnfit(text, hint=RAISE_WAL_LEVEL)
        case "55000":
            return SlotUnfit(text, hint="use a slot of this database, made for wal2json")
        case "22023" if "unknown" in text:
            return PluginTooOld(
                f"an option that wal2json is given is not one that it knows: {text}",
                hint="walstream needs wal2json 2.5 or later on the server",
            )
        case "22023":
            return SlotUnfit(text, hint="is it a slot for wal2json?")
        case "08P01" if replication:
            return DatabaseUnfit(f"replication does not pass: {text}", hint=NO_POOLER)
        case "08P01":  # a pooler that has no server for us, or lost it
            return ConnectionLost(f"the connection was cut: {text}")
        case "42601" if _REPLICATION_COMMAND.search(text):
            return DatabaseUnfit(f"replication does not pass: {text}", hint=NO_POOLER)
        case "57014" | "53000" | "53100" | "53200":
            return Unavailable(f"the server could not do it now: {text} (SQLSTATE {state})")
        case _:
            return ServerFailed(f"the server reports: {text} (SQLSTATE {state})")


_REPLICATION_COMMAND: Final = re.compile(
    "IDENTIFY_SYSTEM|CREATE_REPLICATION_SLOT|START_REPLICATION"
)


def _slot_lost(text: str) -> SlotLost:
    return SlotLost(
        f"the slot is lost, changes are missing: {text}",
        hint="drop and create the slot, then bring the missing changes over by other means;"
        " max_slot_wal_keep_size bounds what a slot may retain",
    )


INSTALL_PLUGIN: Final = (
    "install it on the server: apt-get install postgresql-<version>-wal2json on Debian and Ubuntu,"
    " dnf install wal2json_<version> on the PGDG's RPM repositories; no restart is needed"
)
ALLOW_PLUGIN: Final = (
    "add wal2json to output_plugin_libraries, keeping what is there, and reload: ALTER SYSTEM SET"
    " output_plugin_libraries = pgoutput, test_decoding, wal2json; SELECT pg_reload_conf();"
    " see sql/03_output_plugin_libraries.sql"
)
NO_POOLER: Final = (
    "a pooler cannot carry replication: give the server's own address as replication_dsn, and the"
    " pooler's as dsn"
)
RAISE_WAL_LEVEL: Final = "ALTER SYSTEM SET wal_level = logical; then restart the server"


def _last(text: str) -> str:
    """Return the end of libpq's message: with several hosts the last attempt is what counts."""
    return text.rsplit("connection failed: ", maxsplit=1)[-1]
