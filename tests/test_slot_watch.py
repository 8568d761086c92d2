"""The slot is watched: what it retains is known, warned of, and bounded if that is wished."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from structlog.testing import capture_logs

from tests.conftest import StartCluster
from tests.postgres import Database, async_wait_until, wait_until
from tests.streaming import Stream
from walstream import config, slot_watch, slots
from walstream.catalog import Catalog, Server
from walstream.cluster import PrivateCluster
from walstream.config import RetainedWalConfig
from walstream.connection import ReplicationConnection
from walstream.errors import (
    ConfigError,
    DatabaseUnfit,
    RetainedWalExceeded,
    SlotBusy,
    SlotCreationBlocked,
    SlotMissing,
)
from walstream.lsn import Lsn
from walstream.preflight import verify_server
from walstream.slot_watch import SlotWatch
from walstream.slots import (
    FAILOVER_VERSION,
    SlotStatus,
    alter_slot,
    create_slot,
    note_failover,
    slot_status,
    usable_slot,
)

MEGABYTE = 1 << 20


@pytest.fixture
async def catalog(database: Database) -> AsyncIterator[Catalog]:
    one = Catalog(database.dsn, application_name="watch")
    yield one
    await one.close()


@pytest.fixture
def slot(database: Database) -> str:
    name = f"watched_{secrets.token_hex(4)}"
    database.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", name)
    return name


def write_wal(database: Database, size_bytes: int) -> None:
    """Write so many bytes of WAL in one transaction, whose commit flushes them."""
    database.execute(
        "SELECT count(pg_logical_emit_message(true, 'filling', repeat('x', 100000)))"
        " FROM generate_series(1, %s)",
        size_bytes // 100_000 + 1,
    )


def confirm_all(database: Database, slot: str) -> None:
    """Confirm everything, until the server may forget the WAL before it.

    ``restart_lsn`` follows at a record of the running transactions, which a checkpoint writes.
    """

    def retained_bytes() -> int:
        database.execute("CHECKPOINT")
        database.execute("SELECT pg_replication_slot_advance(%s, pg_current_wal_flush_lsn())", slot)
        ((size,),) = database.execute(
            "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)::bigint"
            " FROM pg_replication_slots WHERE slot_name = %s",
            slot,
        )
        return int(size)

    wait_until(lambda: retained_bytes() < MEGABYTE // 2)


def said(logs: list[MutableMapping[str, Any]]) -> list[tuple[str, str]]:
    return [(one["event"], one["log_level"]) for one in logs]


# ---- What is known


async def test_vitals_are_what_the_server_says_of_the_slot(
    catalog: Catalog, database: Database, slot: str
) -> None:
    watch = SlotWatch(catalog, slot, RetainedWalConfig())
    before = watch.vitals
    assert before is None
    write_wal(database, MEGABYTE)
    await watch.look()
    ((confirmed, restart),) = database.execute(
        "SELECT confirmed_flush_lsn::text, restart_lsn::text FROM pg_replication_slots"
        " WHERE slot_name = %s",
        slot,
    )
    vitals = watch.vitals
    assert vitals is not None
    assert vitals.confirmed_flush_lsn == Lsn.parse(confirmed)
    assert vitals.restart_lsn == Lsn.parse(restart)
    assert vitals.wal_status == "reserved"
    assert vitals.retained_wal_bytes is not None
    assert vitals.retained_wal_bytes >= MEGABYTE
    assert (vitals.spilled_transactions, vitals.spills, vitals.spilled_bytes) == (0, 0, 0)
    assert vitals.age_seconds < 10


async def test_what_the_walsender_spills_to_disk_is_counted(
    catalog: Catalog, database: Database
) -> None:
    database.execute("CREATE TABLE t (id int PRIMARY KEY, filling text)")
    database.execute(f"ALTER DATABASE {database.name} SET logical_decoding_work_mem = '64kB'")
    stream = Stream(database)
    stream.record("public.t")
    database.execute("INSERT INTO t SELECT i, repeat('x', 100) FROM generate_series(1, 5000) i")
    await stream.drain()
    watch = SlotWatch(catalog, stream.slot, RetainedWalConfig(), interval_seconds=0.01)
    task = asyncio.create_task(watch.run())
    await async_wait_until(lambda: watch.vitals and (watch.vitals.spilled_bytes or 0) > 100 * 5000)
    task.cancel()
    assert watch.vitals is not None
    assert watch.vitals.spilled_transactions == 1
    assert (watch.vitals.spills or 0) > 1


async def test_a_server_that_does_not_answer_ends_nothing_and_the_last_answer_stays(
    private_cluster: StartCluster,
) -> None:
    cluster = private_cluster()
    with Database(cluster.conninfo()) as database:
        database.execute("SELECT pg_create_logical_replication_slot('watched', 'wal2json')")
    catalog = Catalog(cluster.conninfo(), application_name="watch")
    watch = SlotWatch(catalog, "watched", RetainedWalConfig(), interval_seconds=0.01)
    with capture_logs() as logs:
        task = asyncio.create_task(watch.run())
        await async_wait_until(lambda: watch.vitals)
        await asyncio.to_thread(cluster.stop, "immediate")
        await async_wait_until(lambda: ("slot_unwatched", "warning") in said(logs))
        before = watch.vitals
        assert before is not None
        await asyncio.to_thread(cluster.start)
        await async_wait_until(
            lambda: watch.vitals and watch.vitals.age_seconds < before.age_seconds
        )
        assert not task.done()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    await catalog.close()
    shown = [one for one in said(logs) if one[1] != "debug"]
    assert shown == [("slot_unwatched", "warning"), ("slot_watched_again", "info")]
    first = said(logs).index(("slot_unwatched", "warning"))
    assert first == slot_watch.PATIENT_LOOKS  # each of which was told, too


async def test_a_catalog_that_refuses_is_told_at_once_for_each_reason_and_when_it_works_again(
    database: Database, slot: str
) -> None:
    role = f"{slot}_role"
    database.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'first'")
    dsn = make_conninfo(database.dsn, user=role, password="first")  # noqa: S106
    catalog = Catalog(dsn, application_name="watch")
    watch = SlotWatch(catalog, slot, RetainedWalConfig(), interval_seconds=0.01)

    def told() -> list[MutableMapping[str, Any]]:
        return [one for one in logs if one["log_level"] != "debug"]

    async def refused(change: str, times: int) -> None:
        database.execute(f"ALTER ROLE {role} {change}")
        database.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s", role
        )
        await async_wait_until(lambda: len(told()) == times)
        failed = len(logs)
        await async_wait_until(lambda: len(logs) > failed + 3)  # it is not said again

    with capture_logs() as logs:
        task = asyncio.create_task(watch.run())
        await async_wait_until(lambda: watch.vitals)
        await refused("NOLOGIN", 1)
        await refused("LOGIN CONNECTION LIMIT 0", 2)
        assert watch.vitals is not None
        assert watch.vitals.age_seconds > 0.03
        database.execute(f"ALTER ROLE {role} CONNECTION LIMIT -1")
        await async_wait_until(lambda: len(told()) == 3)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    await catalog.close()
    database.execute(f"DROP ROLE {role}")
    assert said(told()) == [
        ("slot_unwatched", "warning"),
        ("slot_unwatched", "warning"),
        ("slot_watched_again", "info"),
    ]
    assert "not permitted to log in" in told()[0]["error"]
    assert "too many connections" in told()[1]["error"]


async def test_of_a_slot_that_is_gone_nothing_is_known(
    catalog: Catalog, database: Database, slot: str
) -> None:
    watch = SlotWatch(catalog, slot, RetainedWalConfig())
    await watch.look()
    database.execute("SELECT pg_drop_replication_slot(%s)", slot)
    with pytest.raises(SlotMissing):
        await watch.look()
    assert watch.vitals is None


# ---- What is done about retained WAL


async def test_much_retained_wal_is_warned_of_once_and_again_when_it_has_doubled(
    catalog: Catalog, database: Database, slot: str
) -> None:
    watch = SlotWatch(catalog, slot, RetainedWalConfig(warn_at_bytes=2 * MEGABYTE))
    with capture_logs() as logs:
        await watch.look()
        assert said(logs) == []
        write_wal(database, 2 * MEGABYTE)
        await watch.look()
        await watch.look()
        assert said(logs) == [("retained_wal_high", "warning")]
        assert "nobody streams from the slot" in logs[0]["hint"]
        write_wal(database, 3 * MEGABYTE)
        await watch.look()
        assert said(logs) == [("retained_wal_high", "warning")] * 2
        await asyncio.to_thread(confirm_all, database, slot)
        await watch.look()
        await watch.look()
        assert said(logs)[2:] == [("retained_wal_normal", "info")]
        write_wal(database, 2 * MEGABYTE)
        await watch.look()
    assert said(logs)[3:] == [("retained_wal_high", "warning")]


async def test_wal_that_a_long_transaction_holds_back_is_told_apart(
    catalog: Catalog, database: Database, slot: str
) -> None:
    """The slot is confirmed, and walstream can do nothing more about it."""
    watch = SlotWatch(catalog, slot, RetainedWalConfig(warn_at_bytes=2 * MEGABYTE))
    with database.connect(autocommit=False) as long, capture_logs() as logs:
        long.execute("CREATE TABLE long (id int)")
        write_wal(database, 2 * MEGABYTE)
        database.execute("SELECT pg_replication_slot_advance(%s, pg_current_wal_flush_lsn())", slot)
        await watch.look()
        long.rollback()
    assert said(logs) == [("retained_wal_high", "warning")]
    assert "unless one runs for long" in logs[0]["hint"]


async def test_without_a_policy_nothing_is_said_of_retained_wal(
    catalog: Catalog, database: Database, slot: str
) -> None:
    watch = SlotWatch(catalog, slot, RetainedWalConfig(warn_at_bytes=None))
    write_wal(database, 2 * MEGABYTE)
    with capture_logs() as logs:
        await watch.look()
    assert logs == []


async def test_too_much_retained_wal_ends_the_process_and_leaves_the_slot(
    catalog: Catalog, database: Database, slot: str
) -> None:
    policy = RetainedWalConfig(warn_at_bytes=None, stop_at_bytes=2 * MEGABYTE)
    watch = SlotWatch(catalog, slot, policy, interval_seconds=0.01)
    task = asyncio.create_task(watch.run())
    await async_wait_until(lambda: watch.vitals)
    assert not task.done()
    write_wal(database, 2 * MEGABYTE)
    with pytest.raises(RetainedWalExceeded, match=f"the slot {slot} retains") as caught:
        await asyncio.wait_for(task, 10)
    assert not caught.value.drop
    assert caught.value.exit_code == 78  # systemd does not start it again for ever
    assert "stop_at_bytes under [retained_wal] is 2097152" in caught.value.message
    assert "WALSTREAM_RETAINED_WAL_STOP_AT_BYTES" in caught.value.hint
    assert (await slot_status(catalog, slot)).wal_status == "reserved"


async def test_the_slot_is_dropped_only_when_that_is_asked_for_and_its_stream_is_over(
    catalog: Catalog, database: Database
) -> None:
    stream = Stream(database)
    policy = RetainedWalConfig(warn_at_bytes=None, drop_slot_at_bytes=2 * MEGABYTE)
    watch = SlotWatch(catalog, stream.slot, policy)
    write_wal(database, 2 * MEGABYTE)
    stream.app.on_message("never")(print)
    stream.start()
    await async_wait_until(lambda: is_active(database, stream.slot))
    with pytest.raises(RetainedWalExceeded, match="it is dropped at 2097152") as caught:
        await watch.look()
    assert caught.value.drop
    with capture_logs() as logs:
        dropping = asyncio.create_task(watch.drop())
        await stream.stop()
        await dropping
    assert said([one for one in logs if one["event"] == "slot_dropped"]) == [
        ("slot_dropped", "error")
    ]
    assert watch.vitals is None
    with pytest.raises(SlotMissing):
        await slot_status(catalog, stream.slot)
    await watch.drop()  # another process may have been quicker


async def test_a_slot_that_another_process_streams_from_is_not_dropped(
    catalog: Catalog, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slot_watch, "FREE_SECONDS", 0.1)
    stream = Stream(database)
    stream.app.on_message("never")(print)
    stream.start()
    await async_wait_until(lambda: is_active(database, stream.slot))
    with pytest.raises(SlotBusy, match="is in use by PID"):
        await SlotWatch(catalog, stream.slot, RetainedWalConfig()).drop()
    await stream.stop()


def is_active(database: Database, slot: str) -> bool:
    ((active,),) = database.execute(
        "SELECT active FROM pg_replication_slots WHERE slot_name = %s", slot
    )
    return bool(active)


async def test_a_slot_that_the_server_is_about_to_give_up_is_warned_of(
    private_cluster: StartCluster,
) -> None:
    cluster = private_cluster({"max_slot_wal_keep_size": "48MB", "max_wal_size": "32MB"})
    catalog = Catalog(cluster.conninfo(), application_name="watch")
    watch = SlotWatch(catalog, "watched", RetainedWalConfig())
    with Database(cluster.conninfo()) as database, capture_logs() as logs:
        database.execute("SELECT pg_create_logical_replication_slot('watched', 'wal2json')")
        await watch.look()
        assert watch.vitals is not None
        assert (watch.vitals.safe_wal_size_bytes or 0) > 40 * MEGABYTE
        assert logs == []
        while not logs:
            write_wal(database, 2 * MEGABYTE)
            await watch.look()
        assert said(logs) == [("slot_at_risk", "warning")]
        assert logs[0]["wal_status"] != "lost"
        await watch.look()
        await asyncio.to_thread(confirm_all, database, "watched")
        await watch.look()
    await catalog.close()
    assert said(logs) == [("slot_at_risk", "warning"), ("slot_safe_again", "info")]


@pytest.mark.parametrize(
    ("limits", "wrong"),
    [
        (
            {"warn_at_bytes": "2GB", "stop_at_bytes": "1GB"},
            "found stop_at_bytes = 1073741824; allowed: more than warn_at_bytes",
        ),
        (
            {"stop_at_bytes": "50GB", "drop_slot_at_bytes": "50GB"},
            "found drop_slot_at_bytes = 53687091200; allowed: more than stop_at_bytes",
        ),
    ],
)
def test_limits_that_do_not_ascend_are_a_mistake(limits: dict[str, str], wrong: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse({"retained_wal": limits})
    assert "retained_wal: found " in str(caught.value)
    assert wrong in str(caught.value)


def test_the_default_warning_gives_way_to_a_lower_limit() -> None:
    def warns_at(**limits: object) -> int | None:
        return config.parse({"retained_wal": limits}).retained_wal.warn_at_bytes

    assert warns_at() == warns_at(stop_at_bytes="50GB") == 10 << 30
    assert warns_at(stop_at_bytes="5GB") == warns_at(drop_slot_at_bytes="5GB") == 4 << 30


def test_limits_that_ascend_are_taken() -> None:
    limits = {"warn_at_bytes": "1MB", "stop_at_bytes": 2 << 20, "drop_slot_at_bytes": "3 MB"}
    taken = config.parse({"retained_wal": limits}).retained_wal
    assert taken.drop_slot_at_bytes == 3 * MEGABYTE


# ---- Failover slots, standbys


def status_of(slot: str, **known: Any) -> SlotStatus:
    """What an idle slot is like, for what this server's version does not have."""
    return SlotStatus(
        **{
            **dict.fromkeys(SlotStatus.__struct_fields__),
            "name": slot,
            "plugin": "wal2json",
            "temporary": False,
            "active": False,
            "wal_status": "reserved",
            **known,
        }
    )


async def test_failover_slots_are_refused_before_creation_where_there_are_none(
    catalog: Catalog, database: Database
) -> None:
    version = (await catalog.server()).version
    if version >= FAILOVER_VERSION:
        pytest.skip("this server has failover slots")
    async with await ReplicationConnection.open(database.dsn, application_name="watch") as one:
        with pytest.raises(DatabaseUnfit, match=f"PostgreSQL {version // 10_000}; failover slots"):
            await create_slot(one, catalog, "never", failover=True)
        with pytest.raises(DatabaseUnfit, match="need 17 or later"):
            await alter_slot(one, catalog, "never", failover=True)
    with pytest.raises(SlotMissing):
        await slot_status(catalog, "never")
    with pytest.raises(DatabaseUnfit, match="need PostgreSQL 17"):
        note_failover(status_of("old"))


async def test_a_failover_slot_is_made_altered_and_shown(
    catalog: Catalog, database: Database, slot: str
) -> None:
    version = (await catalog.server()).version
    if version < FAILOVER_VERSION:
        pytest.skip(f"PostgreSQL {version // 10_000} has no failover slots")
    made = f"{slot}_failover"
    async with await ReplicationConnection.open(database.dsn, application_name="watch") as one:
        await create_slot(one, catalog, made, failover=True)
        status = await slot_status(catalog, made)
        assert (status.failover, status.synced) == (True, False)
        await alter_slot(one, catalog, made, failover=False)
        assert (await slot_status(catalog, made)).failover is False
        await alter_slot(one, catalog, made, failover=True)
    with capture_logs() as logs:
        note_failover(await slot_status(catalog, made))
        note_failover(await slot_status(catalog, slot))
    assert said(logs) == [("slot_without_failover", "warning")]
    assert f"walstream slot alter --failover --name {slot}" in logs[0]["hint"]


def test_a_slot_without_the_wished_copy_on_standbys_is_warned_of() -> None:
    with capture_logs() as logs:
        note_failover(status_of("copied", failover=True))
        note_failover(status_of("alone", failover=False))
    assert [(one["event"], one["slot"]) for one in logs] == [("slot_without_failover", "alone")]


@pytest.mark.parametrize("version", [140_000, 159_999])
def test_a_standby_before_16_is_refused(version: int) -> None:
    server = Server(
        version,
        "logical",
        in_recovery=True,
        encoding="UTF8",
        flush_lsn=Lsn(1),
    )
    with pytest.raises(DatabaseUnfit, match="is a standby with PostgreSQL 1"):
        verify_server(server)


def test_a_standby_from_16_on_is_taken() -> None:
    verify_server(
        Server(
            160_000,
            "logical",
            in_recovery=True,
            encoding="UTF8",
            flush_lsn=Lsn(1),
        )
    )


@contextmanager
def as_standby(cluster: PrivateCluster) -> Iterator[None]:
    """Let a cluster go on as a standby of nobody, and promote it at the end."""
    cluster.stop("fast")
    (cluster.data / "standby.signal").touch()
    cluster.start()
    yield
    with psycopg.connect(cluster.conninfo(), autocommit=True) as connection:
        connection.execute("SELECT pg_promote()")


async def test_on_a_standby_the_copy_of_a_slot_is_busy_until_it_is_promoted(
    private_cluster: StartCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def synced(_catalog: Catalog, name: str) -> SlotStatus:
        return status_of(name, database="postgres", failover=True, synced=True, active=True)

    monkeypatch.setattr(slots, "slot_status", synced)
    cluster = private_cluster()
    catalog = Catalog(cluster.conninfo(), application_name="watch")
    copy = "this standby's copy of the primary's"
    with as_standby(cluster), pytest.raises(SlotBusy, match=copy):
        await usable_slot(catalog, "copy")
    with pytest.raises(SlotBusy, match="in use by"):  # the promoted one's is a slot like others
        await usable_slot(catalog, "copy")
    await catalog.close()


async def test_the_creation_of_a_slot_on_a_standby_is_bounded(
    private_cluster: StartCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for the primary to say which transactions run, which an idle one does not."""
    cluster = private_cluster()
    catalog = Catalog(cluster.conninfo(), application_name="watch")
    with as_standby(cluster):
        version = (await catalog.server()).version
        if version < 160_000:
            await catalog.close()
            pytest.skip(f"standbys of PostgreSQL {version // 10_000} do not decode")
        monkeypatch.setattr(slots, "STANDBY_CREATE_WAIT_SECONDS", 0.5)
        async with await ReplicationConnection.open(
            cluster.conninfo(), application_name="watch"
        ) as connection:
            with pytest.raises(SlotCreationBlocked) as caught:
                await create_slot(connection, catalog, "on_standby")
            assert "pg_log_standby_snapshot() on the primary" in caught.value.hint
            with pytest.raises(SlotMissing):
                await slot_status(catalog, "on_standby")
            if version >= FAILOVER_VERSION:
                with pytest.raises(DatabaseUnfit, match="the server is a standby"):
                    await create_slot(connection, catalog, "on_standby", failover=True)
    await catalog.close()
