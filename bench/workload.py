"""The table that is updated, and the slots that remember the updates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import psycopg

from walstream.lsn import Lsn

TABLE: Final = "public.messages"

FILTER: Final = "status=eq.sent"
"""What the one handler asks for; every updated row passes."""

CLUSTER_SETTINGS: Final = {
    # What happens in the background would happen in the middle of somebody's round.
    "autovacuum": "off",
    "checkpoint_timeout": "1h",
    "max_wal_size": "8GB",
    # What each client asks wal2json for then stands in the log.
    "log_replication_commands": "on",
}

_TABLE_SQL: Final = """
    CREATE TABLE public.messages (
        id bigint PRIMARY KEY,
        conversation_id text NOT NULL,
        author text NOT NULL,
        content text NOT NULL,
        status text NOT NULL,
        amount numeric(12, 2) NOT NULL,
        created_at timestamptz NOT NULL,
        updated_at timestamptz NOT NULL
    );
    ALTER TABLE public.messages REPLICA IDENTITY FULL;
"""

_FILL_SQL: Final = """
    INSERT INTO public.messages
    SELECT i, 'conversation-' || i %% 1000, 'ada', 'message number ' || i, 'queued', i / 100.0, t, t
      FROM generate_series(1, %s) AS i, now() AS t
"""

_UPDATE_SQL: Final = """
    DO $$
    BEGIN
        FOR start IN 1..{rows} BY {transaction_rows} LOOP
            UPDATE public.messages
               SET status = 'sent', updated_at = clock_timestamp()
             WHERE id >= start AND id < least(start + {transaction_rows}, {rows} + 1);
            COMMIT;
        END LOOP;
    END $$
"""


def create_table(connection: psycopg.Connection, rows: int) -> None:
    """Make the table with ``rows`` rows, and nothing left to do for the background."""
    connection.execute(_TABLE_SQL)
    connection.execute(_FILL_SQL, [rows])
    connection.execute("VACUUM ANALYZE public.messages")
    connection.execute("CHECKPOINT")


def update_rows(connection: psycopg.Connection, rows: int, transaction_rows: int) -> Lsn:
    """Update every row once, ``transaction_rows`` in a transaction; return where the WAL ends."""
    connection.execute(_UPDATE_SQL.format(rows=rows, transaction_rows=transaction_rows).encode())
    return end_of_wal(connection)


def end_of_wal(connection: psycopg.Connection) -> Lsn:
    """Return the end of what has been written."""
    return Lsn.parse(_one(connection, "SELECT pg_current_wal_insert_lsn()::text"))


@contextmanager
def slot(connection: psycopg.Connection, name: str, *, copy_of: str = "") -> Iterator[str]:
    """Keep a slot for wal2json, at the end of the WAL or where another slot stands."""
    if copy_of:
        _one(connection, "SELECT pg_copy_logical_replication_slot(%s, %s)", copy_of, name)
    else:
        _one(connection, "SELECT pg_create_logical_replication_slot(%s, 'wal2json')", name)
    try:
        yield name
    finally:
        drop_slot(connection, name)


def drop_slot(connection: psycopg.Connection, name: str) -> None:
    """Drop a slot, also when somebody still holds it; nothing happens where there is none."""
    # The walsender of a client that has just gone still holds it for a moment.
    connection.execute(
        "SELECT pg_terminate_backend(active_pid, 10000) FROM pg_replication_slots"
        " WHERE slot_name = %s",
        [name],
    )
    connection.execute(
        "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = %s",
        [name],
    )


def confirmed(connection: psycopg.Connection, slot_name: str) -> Lsn:
    """Return the position that the server has recorded for a slot."""
    query = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = %s"
    return Lsn.parse(_one(connection, query, slot_name))


def somebody_streams(connection: psycopg.Connection) -> bool:
    """Whether a client has caught up with the end of the WAL."""
    query = "SELECT EXISTS (SELECT FROM pg_stat_replication WHERE state = 'streaming')"
    return bool(_one(connection, query))


def record_bytes(connection: psycopg.Connection, slot_name: str, options: dict[str, str]) -> float:
    """Return the mean length of an update's record among the first 1,000 of a slot."""
    listed = [part for option in options.items() for part in option]
    query = """
        SELECT avg(octet_length(data))
          FROM pg_logical_slot_peek_changes(%s, NULL, 1000, VARIADIC %s)
         WHERE data LIKE '{"action":"U"%%'
    """
    return float(_one(connection, query, slot_name, listed))


def _one(connection: psycopg.Connection, query: str, *parameters: object) -> Any:
    """Return the first value of the first row."""
    row = connection.execute(query.encode(), parameters or None).fetchone()
    assert row is not None, f"no row: {query}"
    return row[0]
