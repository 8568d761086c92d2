"""``walstream demo``: the whole thing, on a PostgreSQL that is made for it and thrown away.

A chat application writes, three handlers get what they asked for, and at the end it is checked that
nothing is missing between the two.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import psycopg
from psycopg import AsyncConnection
from pydantic import SecretStr

from walstream.cluster import PrivateCluster
from walstream.config import Config, PostgresConfig, SlotConfig
from walstream.daemon import Daemon
from walstream.demo import handlers
from walstream.demo.screen import (
    show_code,
    show_figure,
    show_heading,
    show_remark,
)
from walstream.demo.workload import TABLES, Application, Tally
from walstream.errors import ClusterFailed, ServerProgramsMissing, SetupError, StreamBroken
from walstream.lsn import Lsn
from walstream.summary import Summary

DATABASE: Final = "chat"
ROLE: Final = "walstream"
SLOT: Final = "walstream"

DRAIN_SECONDS: Final = 15.0
"""How long the last changes may take to arrive before they count as missing."""

_LOOK_SECONDS: Final = 0.02


class Balance(msgspec.Struct, frozen=True):
    """What the application has committed, what walstream has done, and where both stand."""

    committed: Tally
    summary: Summary
    confirmed_flush_lsn: Lsn
    server_lsn: Lsn


async def demonstrate(seconds: float) -> None:
    """Show walstream at work, until the time is over or a signal comes; the second one kills.

    Raises:
        ServerProgramsMissing: PostgreSQL or wal2json is not installed; the hint installs it.
        StreamBroken: what was committed and what arrived are not the same.
    """
    stopped = _stopped_by_signals()
    sql = _sql_folder()
    show_remark("Starting a private PostgreSQL ...")
    with PrivateCluster() as cluster:
        version = ".".join(map(str, cluster.programs.version))
        show_remark(f"PostgreSQL {version} with wal2json runs in {cluster.folder}.")
        _prepare(cluster, sql)
        show_heading("These handlers are attached to it:")
        show_code(_handlers_code())
        show_heading("What the application does, and what arrives:")
        balance = await _stream(cluster, seconds, stopped)
    _show_balance(balance)
    show_remark("Nothing is left of the private PostgreSQL.")
    _verify(balance)


def _stopped_by_signals() -> asyncio.Event:
    """Return an event that SIGINT and SIGTERM set."""
    stopped = asyncio.Event()

    def on_signal(number: signal.Signals) -> None:
        if stopped.is_set():
            os._exit(128 + number)  # the watcher of the cluster removes what is left
        stopped.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
    return stopped


# ---- Before


def _sql_folder() -> Path:
    """Find the files of sql/: in an installed package, or beside it in the source tree."""
    package = Path(__file__).parent.parent
    for folder in (package / "sql", package.parent / "sql"):
        if folder.is_dir():
            return folder
    raise SetupError("the files of sql/ are not there", hint="install walstream again")


def _prepare(cluster: PrivateCluster, sql: Path) -> None:
    """Set the database up as its operator would."""
    with psycopg.connect(cluster.conninfo(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {DATABASE}".encode())
    with psycopg.connect(cluster.conninfo(DATABASE), autocommit=True) as connection:
        connection.execute(TABLES.encode())
    show_heading("Applied by psql, as on any server:")
    _psql(cluster, sql / "03_output_plugin_libraries.sql")
    _psql(cluster, sql / "01_role_and_grants.sql", role=ROLE)
    _psql(
        cluster,
        sql / "02_replica_identity.sql",
        full="public.messages_v2",
        index="public.user_interactions:one_reaction",
    )


def _psql(cluster: PrivateCluster, file: Path, **variables: str) -> None:
    options = [f"--set={name}={value}" for name, value in variables.items()]
    show_remark(
        " ".join([f"sql/{file.name}", *(option.removeprefix("--set=") for option in options)])
    )
    done = subprocess.run(
        [
            _psql_program(cluster),
            "--no-psqlrc",
            "--quiet",
            f"--dbname={cluster.conninfo(DATABASE)}",
            *options,
            f"--file={file}",
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,  # a Ctrl-C in the terminal is for us
    )
    if done.returncode != 0:
        raise ClusterFailed(f"sql/{file.name} failed\n{done.stderr.strip()}")


def _psql_program(cluster: PrivateCluster) -> str:
    beside = cluster.programs.path("psql")
    found = beside if os.access(beside, os.X_OK) else shutil.which("psql")
    if found is None:
        major = cluster.programs.version[0]
        raise ServerProgramsMissing(
            "psql is not installed", hint=f"apt-get install postgresql-client-{major}"
        )
    return found


def _handlers_code() -> str:
    """Return the handlers as they stand in their file, without its docstring."""
    source = Path(handlers.__file__).read_text(encoding="utf-8")
    return source[source.index("from walstream import") :].rstrip()


# ---- During


async def _stream(cluster: PrivateCluster, seconds: float, stopped: asyncio.Event) -> Balance:
    daemon = Daemon(_config(cluster), handlers.stream.handlers)
    try:
        async with asyncio.TaskGroup() as group:
            streaming = group.create_task(daemon.run())
            await _until(lambda: daemon.summary().sessions > 0 or stopped.is_set())
            committed = await _work(cluster, daemon, seconds, stopped)
            daemon.stop()
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    confirmed, server = _positions(cluster)
    return Balance(committed, streaming.result(), confirmed, server)


def _config(cluster: PrivateCluster) -> Config:
    """Make the configuration without its environment variables, which may name a real database."""
    dsn = SecretStr(cluster.conninfo(DATABASE, ROLE))
    return Config.model_construct(
        postgres=PostgresConfig(dsn=dsn), slot=SlotConfig(name=SLOT, create=True)
    )


async def _work(
    cluster: PrivateCluster, daemon: Daemon, seconds: float, stopped: asyncio.Event
) -> Tally:
    """Let the application work, and all that it has committed arrive."""
    conninfo = cluster.conninfo(DATABASE, application_name="chat")
    async with await AsyncConnection.connect(conninfo, autocommit=True) as connection:
        application = Application(connection)
        await application.work(seconds, stopped)
        end = await application.position()
    try:
        async with asyncio.timeout(DRAIN_SECONDS):
            await _until(lambda: daemon.summary().flush_lsn >= end)
    except TimeoutError:
        pass  # the balance will tell what is missing
    return application.tally


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what is looked at are figures, which tell nobody
        await asyncio.sleep(_LOOK_SECONDS)


def _positions(cluster: PrivateCluster) -> tuple[Lsn, Lsn]:
    with psycopg.connect(cluster.conninfo(DATABASE)) as connection:
        cursor = connection.execute(
            "SELECT confirmed_flush_lsn::text, pg_current_wal_lsn()::text"
            " FROM pg_replication_slots WHERE slot_name = %s",
            [SLOT],
        )
        confirmed, server = cursor.fetchone() or ("0/0", "0/0")
    return Lsn.parse(confirmed), Lsn.parse(server)


# ---- After


def _show_balance(balance: Balance) -> None:
    committed, summary = balance.committed, balance.summary
    handled = ", ".join(f"{route.name} {route.matched}" for route in summary.routes)
    filtered = sum(route.filtered + route.absent for route in summary.routes)
    unasked = summary.changes - summary.delivered - filtered
    show_heading("In the end:")
    show_figure(
        "committed",
        f"{_counted(committed.changes, 'change')} in"
        f" {_counted(committed.transactions, 'transaction')}; rolled back: {committed.rolled_back}",
    )
    show_figure("delivered", f"{summary.delivered}: {handled}")
    show_figure(
        "filtered",
        f"{filtered + unasked}: {filtered} by a where, {unasked} that no handler asks for",
    )
    show_figure(
        "slot", f"{balance.confirmed_flush_lsn} confirmed, the server is at {balance.server_lsn}"
    )


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _verify(balance: Balance) -> None:
    committed, summary = balance.committed, balance.summary
    wanted = committed.wanted
    figures = [
        ("the stream", committed.changes, summary.changes),
        *((route.name, wanted[route.name], route.matched) for route in summary.routes),
        ("all handlers together", wanted.total(), summary.delivered),
    ]
    for taker, expected, arrived in figures:
        if arrived != expected:
            raise StreamBroken(
                f"{taker} had to get {_counted(expected, 'change')} that were committed, and got"
                f" {arrived}"
            )
