"""A handler that asks for it gets a change only when other sessions see its transaction."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg

from tests.conftest import StartCluster
from tests.postgres import Database
from tests.streaming import Stream
from walstream import Change


async def test_a_change_is_held_until_a_new_snapshot_sees_it(
    private_cluster: StartCluster, async_wait_until: Callable[..., Any]
) -> None:
    """Under synchronous replication to a standby that is not there, it is sent and not seen."""
    cluster = private_cluster()
    with Database(cluster.conninfo(), "postgres") as database, ThreadPoolExecutor(1) as thread:
        database.execute("CREATE TABLE t (id int PRIMARY KEY)")
        stream = Stream(database)
        at_once: list[int] = []
        held: list[int] = []

        @stream.app.on("public.t")
        async def see(change: Change) -> None:
            at_once.append(change.row["id"])

        @stream.app.on("public.t", visible=True)
        def look(change: Change) -> None:
            with database.connect() as connection:
                held.extend(row[0] for row in connection.execute("SELECT id FROM t"))

        database.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        database.execute("SELECT pg_reload_conf()")
        async with stream:
            insert = thread.submit(commit, database.dsn)
            await async_wait_until(lambda: at_once == [1])
            await asyncio.sleep(0.2)  # nothing can be waited for: it must not come
            assert held == []
            database.execute("ALTER SYSTEM RESET synchronous_standby_names")
            database.execute("SELECT pg_reload_conf()")
            await async_wait_until(lambda: held == [1])
            insert.result()


def commit(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("SET synchronous_commit = 'on'")
        connection.execute("INSERT INTO t VALUES (1)")
