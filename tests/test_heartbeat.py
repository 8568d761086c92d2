"""Heartbeats go the way of every change and come back, and disturb nobody who did not ask."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
from structlog.testing import capture_logs

from tests.conftest import StartCluster
from tests.postgres import Database, async_wait_until
from tests.streaming import Stream
from walstream import Message, heartbeat
from walstream.catalog import Catalog
from walstream.heartbeat import Heartbeat
from walstream.lsn import Lsn
from walstream.router import HEARTBEAT_PREFIX


@pytest.fixture
async def catalog(database: Database) -> AsyncIterator[Catalog]:
    one = Catalog(database.dsn, application_name="heartbeat")
    yield one
    await one.close()


@asynccontextmanager
async def beating(beat: Heartbeat) -> AsyncIterator[None]:
    task = asyncio.create_task(beat.run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_a_heartbeat_comes_back_and_its_round_trip_is_known(
    catalog: Catalog, database: Database
) -> None:
    stream = Stream(database)
    beat = Heartbeat(catalog, stream.slot, interval_seconds=0.05)
    seen: list[Message] = []

    @stream.app.on_message(HEARTBEAT_PREFIX)
    async def take(message: Message) -> None:
        seen.append(message)
        beat.received(message)

    async with stream, beating(beat):
        await async_wait_until(lambda: len(seen) >= 3)
    assert beat.written >= 3
    assert beat.last_round_trip_seconds is not None
    assert 0 < beat.last_round_trip_seconds < 10
    assert json.loads(seen[0].content)["slot"] == stream.slot
    assert seen[0].transaction is not None


async def test_no_handler_gets_heartbeats_that_does_not_name_their_prefix_exactly(
    catalog: Catalog, database: Database
) -> None:
    stream = Stream(database)
    seen: list[str] = []
    for prefix in ("*", "walstream.*", "walstream.heartbeat*"):

        @stream.app.on_message(prefix, name=prefix)
        async def take(message: Message) -> None:
            seen.append(message.prefix)

    beat = Heartbeat(catalog, stream.slot, interval_seconds=0.01)
    async with beating(beat):
        await async_wait_until(lambda: beat.written >= 3)
    database.execute("SELECT pg_logical_emit_message(true, 'walstream.heartbeats', '')")
    summary = await stream.drain()
    assert seen == ["walstream.heartbeats"] * 3
    assert summary.transactions >= 4
    assert stream.confirmed_flush_lsn() == str(summary.flush_lsn)


async def test_heartbeats_move_a_slot_in_whose_database_nothing_is_written(
    catalog: Catalog, database: Database
) -> None:
    stream = Stream(database)
    stream.app.on_message("never")(print)
    beat = Heartbeat(catalog, stream.slot, interval_seconds=0.01)
    before = Lsn.parse(stream.confirmed_flush_lsn())
    async with beating(beat):
        await async_wait_until(lambda: beat.written >= 3)
    summary = await stream.drain()
    assert summary.transactions >= 3
    assert Lsn.parse(stream.confirmed_flush_lsn()) > before


@pytest.mark.parametrize(
    "content",
    [
        "",
        "not JSON",
        '{"slot": "mine"}',
        '{"slot": "mine", "writer": "another", "seconds": 1.0}',
    ],
)
def test_heartbeats_of_others_say_nothing_of_the_round_trip(content: str) -> None:
    beat = Heartbeat(Catalog("", application_name="heartbeat"), "mine", interval_seconds=1)
    beat.received(Message(HEARTBEAT_PREFIX, content, Lsn(1)))
    beat.received(Message("another.prefix", "", Lsn(1)))
    assert beat.last_round_trip_seconds is None


async def test_a_role_without_the_right_is_told_of_once_and_the_right_may_come_later(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "REFUSED_PAUSE_SECONDS", 0.01)
    ((function,),) = database.execute(  # it has one more argument from 17 on
        "SELECT min(oid::regprocedure::text) FROM pg_proc"
        " WHERE proname = 'pg_logical_emit_message' AND proargtypes[2] = 'text'::regtype"
    )
    database.execute(f"CREATE ROLE unheard; REVOKE EXECUTE ON FUNCTION {function} FROM PUBLIC")
    role = Database(f"{database.dsn} options='-c role=unheard'")
    catalog = Catalog(role.dsn, application_name="heartbeat")
    beat = Heartbeat(catalog, "mine", interval_seconds=0.01)
    try:
        with capture_logs() as logs:
            async with beating(beat):
                await async_wait_until(lambda: logs)
                for _ in range(5):
                    await catalog.probe()
                database.execute(f"GRANT EXECUTE ON FUNCTION {function} TO PUBLIC")
                await async_wait_until(lambda: beat.written > 1)
        [said] = logs
        assert (said["event"], said["log_level"]) == ("heartbeat_failed", "warning")
        assert "permission denied for function pg_logical_emit_message" in said["error"]
        assert "GRANT EXECUTE" in said["hint"]
    finally:
        await catalog.close()
        database.execute("DROP ROLE unheard")


async def test_a_standby_is_told_of_once_and_may_be_promoted(
    private_cluster: StartCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "REFUSED_PAUSE_SECONDS", 0.01)
    cluster = private_cluster()
    cluster.stop("fast")
    (cluster.data / "standby.signal").touch()
    cluster.start()
    catalog = Catalog(cluster.conninfo(), application_name="heartbeat")
    beat = Heartbeat(catalog, "mine", interval_seconds=0.01)
    with capture_logs() as logs, Database(cluster.conninfo()) as database:
        async with beating(beat):
            await async_wait_until(lambda: logs)
            database.execute("SELECT pg_promote()")
            await async_wait_until(lambda: beat.written > 1)
    await catalog.close()
    [said] = logs
    assert (said["event"], said["error"]) == (
        "heartbeat_failed",
        "a standby writes no WAL, and so no heartbeats",
    )


async def test_a_server_that_is_away_is_left_to_those_who_stream_from_it(
    private_cluster: StartCluster,
) -> None:
    cluster = private_cluster()
    catalog = Catalog(cluster.conninfo(), application_name="heartbeat")
    beat = Heartbeat(catalog, "mine", interval_seconds=0.01)
    with capture_logs() as logs:
        async with beating(beat):
            await async_wait_until(lambda: beat.written)
            await asyncio.to_thread(cluster.restart, "immediate")
            written = beat.written
            await async_wait_until(lambda: beat.written > written)
    await catalog.close()
    assert logs == []
