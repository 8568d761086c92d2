"""Logical messages reach the handlers that ask for their prefix, in order with the changes."""

from __future__ import annotations

import psycopg
import pytest

from tests.postgres import Database
from tests.streaming import Stream
from walstream import Change, Message
from walstream.errors import HandlerFailed


def emit(database: Database, prefix: str, content: str, *, transactional: bool = True) -> None:
    database.execute("SELECT pg_logical_emit_message(%s, %s, %s)", transactional, prefix, content)


async def test_messages_alone_need_no_route_on_a_table(database: Database) -> None:
    """The server is asked for no table at all, and still sends messages."""
    stream = Stream(database)
    seen: list[Message] = []
    stream.app.on_message("jobs.*")(seen.append)
    database.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)")
    emit(database, "jobs.mail", "welcome")
    emit(database, "jobs.", "empty")
    emit(database, "other", "not wanted")
    summary = await stream.drain()
    assert [(one.prefix, one.content) for one in seen] == [
        ("jobs.mail", "welcome"),
        ("jobs.", "empty"),
    ]
    assert [(route.name, route.matched) for route in summary.routes] == [("list.append", 2)]
    assert str(summary.flush_lsn) == stream.confirmed_flush_lsn()


async def test_a_message_has_its_place_among_the_changes_of_its_transaction(
    database: Database,
) -> None:
    database.execute("CREATE TABLE t (id int PRIMARY KEY)")
    stream = Stream(database)
    seen: list[str] = []

    @stream.app.on_message("note")
    async def message(note: Message) -> None:
        seen.append(note.id)

    @stream.app.on("public.t")
    async def change(one: Change) -> None:
        seen.append(one.id)

    with database.connect(autocommit=False) as connection:
        connection.execute("INSERT INTO t VALUES (1)")
        connection.execute("SELECT pg_logical_emit_message(true, 'note', 'between')")
        connection.execute("INSERT INTO t VALUES (2)")
    await stream.drain()
    assert sorted(one.partition(":")[2] for one in seen) == ["1", "2", "3"]
    assert len({one.partition(":")[0] for one in seen}) == 1


async def test_a_message_outside_of_transactions_survives_a_rollback(database: Database) -> None:
    stream = Stream(database)
    seen: list[Message] = []
    stream.app.on_message("*")(seen.append)
    with database.connect(autocommit=False) as connection:
        connection.execute("SELECT pg_logical_emit_message(true, 'rolled', 'back')")
        connection.execute("SELECT pg_logical_emit_message(false, 'stays', 'there')")
        connection.rollback()
    emit(database, "later", "flushes the one before")
    await stream.drain()
    assert [(one.prefix, one.content, one.transaction is None) for one in seen] == [
        ("stays", "there", True),
        ("later", "flushes the one before", False),
    ]


@pytest.mark.parametrize("transactional", [True, False])
async def test_a_message_that_is_not_taken_comes_again_and_one_that_is_does_not(
    database: Database, *, transactional: bool
) -> None:
    stream = Stream(database, handlers={"attempts": 1})
    seen: list[str] = []
    is_mended = False

    @stream.app.on_message("job")
    async def work(message: Message) -> None:
        seen.append(f"{message.content} {message.id}")
        if message.content == "second" and not is_mended:
            raise ValueError

    for content in ("first", "second", "third"):
        emit(database, "job", content, transactional=transactional)
    emit(database, "end", "flushes those before")
    with pytest.raises(HandlerFailed):
        await stream.drain()
    is_mended = True
    await stream.drain()
    contents = [one.partition(" ")[0] for one in seen]
    assert contents == ["first", "second", "second", "third"]
    assert seen[1] == seen[2]


async def test_messages_and_changes_come_through_one_transactional_handler_each(
    database: Database,
) -> None:
    """A message outside of transactions is recorded by its own position."""
    database.execute("CREATE TABLE heard (content text)")
    stream = Stream(database)

    @stream.app.on_message("job", transactional=database.dsn, name="hear")
    def hear(message: Message, connection: psycopg.Connection) -> None:
        connection.execute("INSERT INTO heard VALUES (%s)", [message.content])

    beginning = f"{stream.slot}_beginning"
    database.execute("SELECT pg_copy_logical_replication_slot(%s, %s)", stream.slot, beginning)
    for number in range(6):
        emit(database, "job", str(number), transactional=number % 2 == 0)
    emit(database, "end", "flushes those before")
    await stream.drain()
    database.execute("SELECT pg_drop_replication_slot(%s)", stream.slot)
    database.execute("SELECT pg_copy_logical_replication_slot(%s, %s)", beginning, stream.slot)
    summary = await stream.drain()
    assert [one.redelivered for one in summary.destinations] == [6]
    assert database.execute("SELECT * FROM heard") == [(str(number),) for number in range(6)]
