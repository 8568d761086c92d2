"""Dead letters in a Postgres table, by configuration.

Every method is one transaction under an advisory lock for the slot, so that two processes do not
decide by what the other one is changing; it works through a pooler. ``synchronous_commit`` is never
off. A connection that was lost is replaced once in a call: doing it twice stores nothing twice.

When the table is in the database that changes come from, its own rows come through the slot too.
Routes for patterns such as ``*.*`` do not get them: when such a route fails, each letter would make
another one.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, TypeAlias, TypeVar

import psycopg
from psycopg import AsyncConnection, sql
from psycopg.pq import TransactionStatus
from psycopg.rows import TupleRow

from walstream import postgres
from walstream.dead_letters.bounds import Room, letters_to_park, new_letters
from walstream.dead_letters.letters import DeadLetter, Identity, storable
from walstream.dead_letters.rows import (
    COLUMNS,
    INSERTED,
    INSERTED_COUNT,
    Dialect,
    inserted_values,
    stored_letter,
    text_bytes,
    tried_values,
    where,
)
from walstream.dead_letters.store import LetterQuery, StoredLetter, Verify, replay_runs
from walstream.errors import (
    AccessRefused,
    ConfigError,
    DatabaseUnfit,
    DeadLetterStoreFailed,
    SetupError,
    WalstreamError,
)
from walstream.keys import Key

T = TypeVar("T")

SCHEMA_VERSION: Final = 1

LOCK_SECONDS: Final = 30
"""How long another process may hold the lock."""

_Connection: TypeAlias = AsyncConnection[TupleRow]


class PostgresStore:
    """A `DeadLetterStore` in a Postgres schema: its tables ``dead_letters``, ``dead_letter_keys``.

    They are made at the first start where the role may do that; otherwise sql/05_dead_letters.sql
    makes them.
    """

    def __init__(
        self,
        dsn: str,
        *,
        slot: str,
        max_letters: int,
        max_bytes: int,
        schema: str = "walstream",
        application_name: str = "walstream",
    ) -> None:
        _verify_schema(schema)
        self._dsn = dsn
        self._slot = slot
        self._schema = schema
        self._application_name = application_name
        self._room = Room(max_letters, max_bytes)
        self._one_at_a_time = asyncio.Lock()
        self._connection: _Connection | None = None
        self._dialect = Dialect(
            keys="{keys}",  # named with the rest of the statement
            mark="%s",
            within="= ANY(%s)",
            find="strpos",
            members=list,
            time=lambda time: time.astimezone(UTC),
            lsn=str,
        )

    async def open(self, *, create: bool = True) -> None:
        """See `DeadLetterStore`."""

        async def prepare(connection: _Connection) -> None:
            # Stores of other slots may make the same tables at this moment.
            await connection.execute(_LOCK, [f"walstream {self._schema}"])
            await self._make_tables(connection, create=create)
            await self._verify_tables(connection)

        try:
            await self._run(prepare)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """See `DeadLetterStore`."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def blocked(self) -> list[tuple[str, Key]]:
        """See `DeadLetterStore`."""
        rows = await self._rows(_BLOCKED, [self._slot])
        return [(route, (relation, values.encode())) for route, relation, values in rows]

    async def add(self, letters: Sequence[DeadLetter]) -> None:
        """See `DeadLetterStore`."""

        async def add(connection: _Connection) -> None:
            here = await self._come_again(connection, letters)
            tried = [one for one in letters if one.identity in here and not one.parked]
            await self._note_tried(connection, tried)
            await self._insert(connection, new_letters(letters, here))

        await self._run(add)

    async def park(self, letters: Sequence[DeadLetter], *, together: bool = False) -> list[bool]:
        """See `DeadLetterStore`."""

        async def park(connection: _Connection) -> list[bool]:
            here = await self._come_again(connection, letters)
            held_up = await self._held_up(connection, letters)
            new, is_here = letters_to_park(letters, here, held_up, together=together)
            await self._insert(connection, new)
            return is_here

        return await self._run(park)

    async def select(self, query: LetterQuery, *, payloads: bool = True) -> list[StoredLetter]:
        """See `DeadLetterStore`."""
        conditions, parameters = where(query, self._slot, self._dialect)
        wide = "payload, traceback" if payloads else "''::bytea, ''"
        rows = await self._rows(_SELECT.replace("{wide}", wide) + conditions, parameters)
        return [stored_letter(row, lambda time: time.astimezone(UTC)) for row in rows]

    async def count(self, query: LetterQuery) -> int:
        """See `DeadLetterStore`."""
        conditions, parameters = where(query, self._slot, self._dialect)
        [(count,)] = await self._rows(_COUNT.replace("{conditions}", conditions), parameters)
        return int(count)

    async def size(self) -> tuple[int, int]:
        """See `DeadLetterStore`."""
        return await self._run(self._size, locked=False)

    async def drop(self, ids: Sequence[int]) -> int:
        """See `DeadLetterStore`."""
        return await self._change(_DROP, [self._slot, list(ids)])

    async def settle(self, letters: Sequence[StoredLetter]) -> list[bool]:
        """See `DeadLetterStore`."""
        ids = [stored.id for stored in letters]
        deliveries = [stored.deliveries for stored in letters]

        async def settle(connection: _Connection) -> list[bool]:
            found = await self._execute(connection, _SETTLE, [ids, deliveries, self._slot])
            removed = {letter_id for (letter_id,) in await found.fetchall()}
            return [letter_id in removed for letter_id in ids]

        return await self._run(settle)

    @asynccontextmanager
    async def exclusive(self) -> AsyncIterator[Verify]:
        """See `DeadLetterStore`: a transaction that stays open, and so works through a pooler."""
        try:
            connection = await postgres.connect(self._dsn, application_name=self._application_name)
        except WalstreamError as error:
            raise self._failed(error) from error
        try:
            await self._lock_replays(connection)
            yield partial(self._verify_lock, connection)
        finally:
            await connection.close()  # the server rolls back

    async def _lock_replays(self, connection: _Connection) -> None:
        try:
            await connection.execute(b"BEGIN")
            await connection.execute(_NO_TIMEOUT)
            locked = await connection.execute(
                _TRY_LOCK, [f"walstream replay {self._schema} {self._slot}"]
            )
            if await locked.fetchone() == (False,):
                raise replay_runs(self._slot)
        except psycopg.Error as error:
            raise self._failed(postgres.server_error(error)) from error

    async def _verify_lock(self, connection: _Connection) -> None:
        try:
            await connection.execute("SELECT")
        except psycopg.Error as error:
            raise self._failed(postgres.server_error(error)) from error

    async def failed_again(
        self, letter_id: int, *, attempts: int, error: str, traceback: str, at: datetime
    ) -> bool:
        """See `DeadLetterStore`."""
        failed = [attempts, storable(error), storable(traceback), at, at]
        size_bytes = text_bytes(error, traceback)
        return await self._change(_FAILED, [*failed, size_bytes, self._slot, letter_id]) > 0

    # ---- Tables

    async def _make_tables(self, connection: _Connection, *, create: bool) -> None:
        exists = "SELECT FROM pg_namespace WHERE nspname = %s"
        has_schema = await connection.execute(exists, [self._schema])
        has_tables = await connection.execute(_HAS_TABLES, [self._schema])
        if has_tables.rowcount:
            return
        if not create:
            message = f"there is no table of dead letters in the schema {self._schema!r}"
            hint = (
                "walstream run makes it when a route has on_failure = dead_letter; are schema and"
                " dsn under [dead_letters] right?"
            )
            raise DeadLetterStoreFailed(message, hint=hint)
        try:
            if not has_schema.rowcount:
                await self._execute(connection, "CREATE SCHEMA {schema}")
            for statement in _SCHEMA:
                await self._execute(connection, statement)
        except psycopg.errors.InsufficientPrivilege as error:
            schema = self._quoted(self._schema)
            role = self._quoted(connection.info.user)
            reason = error.diag.message_primary
            message = f"the role may not make the tables of dead letters: {reason}"
            statement = (
                f"GRANT USAGE, CREATE ON SCHEMA {schema} TO {role}"
                if has_schema.rowcount
                else f"CREATE SCHEMA {schema} AUTHORIZATION {role}"
            )
            hint = f"have an administrator run {statement}; or sql/05_dead_letters.sql"
            raise AccessRefused(message, hint=hint) from error

    async def _verify_tables(self, connection: _Connection) -> None:
        [encoding] = await self._one(connection, "SELECT getdatabaseencoding()")
        if encoding not in ("UTF8", "SQL_ASCII"):
            message = f"the encoding of the dead letters' database is {encoding}"
            raise DatabaseUnfit(message, hint="give them a database in UTF8")
        [may] = await self._one(connection, _PRIVILEGES, [self._schema])
        if not may:
            role = self._quoted(connection.info.user)
            schema = self._quoted(self._schema)
            message = f"the role may not use the tables of dead letters in {self._schema!r}"
            hint = (
                f"GRANT USAGE ON SCHEMA {schema} TO {role}; GRANT SELECT, INSERT, UPDATE, DELETE ON"
                f" ALL TABLES IN SCHEMA {schema} TO {role}"
            )
            raise AccessRefused(message, hint=hint)
        [version] = await self._one(connection, "SELECT max(version) FROM {version}")
        if version != SCHEMA_VERSION:
            message = (
                f"the dead letters in {self._schema!r} have schema version {version}, this"
                f" walstream knows {SCHEMA_VERSION}"
            )
            hint = "another version of walstream made them: use that one"
            raise DeadLetterStoreFailed(message, hint=hint)

    # ---- Letters

    async def _come_again(
        self, connection: _Connection, letters: Sequence[DeadLetter]
    ) -> set[Identity]:
        """Return those that are here already; that they came again is noted."""
        routes = [letter.route for letter in letters]
        change_ids = [letter.change_id for letter in letters]
        came = await self._execute(connection, _CAME_AGAIN, [self._slot, routes, change_ids])
        return {(route, change_id) for route, change_id in await came.fetchall()}

    async def _held_up(self, connection: _Connection, letters: Sequence[DeadLetter]) -> set[int]:
        """Return the places of those that a letter in the store holds up."""
        asked = [
            (place, letter.route, table, values.decode())
            for place, letter in enumerate(letters)
            for table, values in letter.keys
        ]
        if not asked:
            return set()
        columns = [list(column) for column in zip(*asked, strict=True)]
        found = await self._execute(connection, _HELD_UP, [*columns, *[self._slot] * 3])
        return {place for (place,) in await found.fetchall()}

    async def _note_tried(self, connection: _Connection, letters: Sequence[DeadLetter]) -> None:
        rows = []
        for letter in letters:
            size_bytes = text_bytes(letter.error, letter.traceback)
            tried = tried_values(letter, self._dialect)
            rows.append([*tried, size_bytes, self._slot, *letter.identity])
            self._room.grown(size_bytes)
        async with connection.cursor() as cursor:
            await cursor.executemany(self._named(_TRIED).encode(), rows)

    async def _insert(self, connection: _Connection, letters: Sequence[DeadLetter]) -> None:
        if not letters:
            return
        await self._take_room(connection, letters)
        rows = []
        for letter in letters:
            keys = list(dict.fromkeys(letter.keys))
            tables = [table for table, _ in keys]
            values = [values.decode() for _, values in keys]
            rows.append(
                [
                    *inserted_values(letter, self._slot, self._dialect),
                    self._slot,
                    letter.route,
                    tables,
                    values,
                ]
            )
        async with connection.cursor() as cursor:
            await cursor.executemany(self._named(_INSERT).encode(), rows)

    async def _take_room(self, connection: _Connection, letters: Sequence[DeadLetter]) -> None:
        more = len(letters), sum(letter.size_bytes for letter in letters)
        if self._room.take(*more):
            return
        self._room.measured(*await self._size(connection))
        if not self._room.take(*more):
            raise self._room.full(*more)

    async def _size(self, connection: _Connection) -> tuple[int, int]:
        letters, size_bytes = await self._one(connection, _SIZE, [self._slot])
        return letters, size_bytes

    # ---- Transactions

    async def _rows(self, statement: str, parameters: Sequence[Any]) -> list[TupleRow]:
        async def ask(connection: _Connection) -> list[TupleRow]:
            return await (await self._execute(connection, statement, parameters)).fetchall()

        return await self._run(ask, locked=False)

    async def _change(self, statement: str, parameters: Sequence[Any]) -> int:
        async def change(connection: _Connection) -> int:
            return (await self._execute(connection, statement, parameters)).rowcount

        return await self._run(change)

    async def _one(
        self, connection: _Connection, statement: str, parameters: Sequence[Any] = ()
    ) -> TupleRow:
        [row] = await (await self._execute(connection, statement, parameters)).fetchall()
        return row

    async def _execute(
        self, connection: _Connection, statement: str, parameters: Sequence[Any] = ()
    ) -> psycopg.AsyncCursor[TupleRow]:
        return await connection.execute(self._named(statement).encode(), parameters)

    def _named(self, statement: str) -> str:
        """Put the tables' names into a statement, at once: a schema's may look like a mark."""
        schema = self._quoted(self._schema).replace("%", "%%")
        names = {mark: f"{schema}.{name}" for mark, name in _TABLES.items()}
        names["{schema}"] = schema
        return _MARK.sub(lambda mark: names[mark[0]], statement)

    @staticmethod
    def _quoted(name: str) -> str:
        return sql.Identifier(name).as_string(None)

    async def _run(self, work: Callable[[_Connection], Awaitable[T]], *, locked: bool = True) -> T:
        """Do it in a transaction; where the connection turns out to be lost, once more."""
        async with self._one_at_a_time:
            had_connection = self._connection is not None
            try:
                try:
                    return await self._once(work, locked=locked)
                except psycopg.OperationalError:
                    if not had_connection or self._is_usable():
                        raise
                    return await self._once(work, locked=locked)
            except psycopg.Error as error:
                raise self._failed(postgres.server_error(error)) from error

    async def _once(self, work: Callable[[_Connection], Awaitable[T]], *, locked: bool) -> T:
        connection = await self._connected()
        async with connection.transaction():
            await connection.execute(_BEGIN, [str(LOCK_SECONDS * 1000)])
            if locked:
                await connection.execute(_LOCK, [f"walstream {self._schema} {self._slot}"])
            return await work(connection)

    async def _connected(self) -> _Connection:
        if self._connection is not None and self._is_usable():
            return self._connection
        await self.close()
        try:
            self._connection = await postgres.connect(
                self._dsn, application_name=self._application_name
            )
        except WalstreamError as error:
            raise self._failed(error) from error
        return self._connection

    def _is_usable(self) -> bool:
        """Whether it is connected, and a call that was cancelled left no transaction open."""
        connection = self._connection
        return (
            connection is not None
            and not connection.closed
            and connection.info.transaction_status == TransactionStatus.IDLE
        )

    def _failed(self, error: WalstreamError) -> WalstreamError:
        if isinstance(error, SetupError | DeadLetterStoreFailed):
            return error
        message = f"the dead letters in the schema {self._schema!r}: {error.message}"
        hint = error.hint or "see that the database of the dead letters can be reached and written"
        return DeadLetterStoreFailed(message, hint=hint)


def _verify_schema(name: str) -> None:
    if "\0" in name or not 0 < len(name.encode(errors="replace")) <= _MAX_NAME_BYTES:
        problem = (
            f"dead_letters.schema: found {name!r}; a name in Postgres has 1 to {_MAX_NAME_BYTES}"
            " bytes and no NUL"
        )
        raise ConfigError([problem])


_MAX_NAME_BYTES: Final = 63

_TABLES: Final = {
    "{letters}": "dead_letters",
    "{keys}": "dead_letter_keys",
    "{version}": "dead_letters_version",
}
_MARK: Final = re.compile(r"\{(letters|keys|version|schema)\}")

# Locks wait for lock_timeout, too. Settings of the role or the database must not change what names
# mean, or what COMMIT promises.
_BEGIN: Final = b"""
    SELECT pg_catalog.set_config('search_path', 'pg_catalog', true),
           pg_catalog.set_config('lock_timeout', %s, true),
           pg_catalog.set_config('synchronous_commit',
                                 CASE pg_catalog.current_setting('synchronous_commit')
                                 WHEN 'off' THEN 'on'
                                 ELSE pg_catalog.current_setting('synchronous_commit') END, true)
"""

_LOCK: Final = b"SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))"

_TRY_LOCK: Final = b"SELECT pg_try_advisory_xact_lock(hashtextextended(%s, 0))"

_NO_TIMEOUT: Final = b"""
    SELECT set_config(name, '0', true)
      FROM pg_settings
     WHERE name IN ('idle_in_transaction_session_timeout', 'transaction_timeout')
"""

_HAS_TABLES: Final = """
    SELECT
      FROM pg_class AS c
      JOIN pg_namespace AS n ON n.oid = c.relnamespace
     WHERE n.nspname = %s AND c.relname = 'dead_letters_version'
"""

_PRIVILEGES: Final = """
    SELECT has_schema_privilege(n.oid, 'USAGE')
           AND bool_and(has_table_privilege(c.oid, 'SELECT'))
           AND bool_and(has_table_privilege(c.oid, p) OR c.relname = 'dead_letters_version')
      FROM pg_namespace AS n
      JOIN pg_class AS c ON c.relnamespace = n.oid,
           unnest(ARRAY['INSERT', 'UPDATE', 'DELETE']) AS p
     WHERE n.nspname = %s
       AND c.relname IN ('dead_letters', 'dead_letter_keys', 'dead_letters_version')
     GROUP BY n.oid
"""

_SCHEMA: Final = (
    """
    CREATE TABLE {letters} (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        slot text NOT NULL,
        route text NOT NULL,
        change_id text NOT NULL,
        lsn pg_lsn NOT NULL,
        ordinal bigint NOT NULL,
        operation text NOT NULL,
        relation_schema text,
        relation_name text,
        keys text NOT NULL,
        attempts integer NOT NULL,
        error text NOT NULL,
        traceback text NOT NULL,
        first_failed_at timestamptz,
        last_failed_at timestamptz,
        size_bytes bigint NOT NULL,
        parked boolean NOT NULL,
        stored_at timestamptz NOT NULL,
        payload bytea NOT NULL,
        deliveries integer NOT NULL DEFAULT 1,
        UNIQUE (slot, route, change_id)
    )
    """,
    "CREATE INDEX dead_letters_in_order ON {letters} (slot, lsn, ordinal, id)",
    """
    CREATE TABLE {keys} (
        letter_id bigint NOT NULL REFERENCES {letters} ON DELETE CASCADE,
        slot text NOT NULL,
        route text NOT NULL,
        relation text NOT NULL,
        key_values text NOT NULL
    )
    """,
    "CREATE INDEX dead_letter_keys_by_letter ON {keys} (letter_id)",
    # A B-tree refuses long values.
    """
    CREATE INDEX dead_letter_keys_by_key
        ON {keys} (slot, route, relation, left(key_values, 200))
    """,
    "CREATE TABLE {version} (version integer NOT NULL)",
    f"INSERT INTO {{version}} VALUES ({SCHEMA_VERSION})",  # noqa: S608 - our own number
)

_BLOCKED: Final = """
    SELECT DISTINCT route, relation, key_values FROM {keys} WHERE slot = %s
"""

_CAME_AGAIN: Final = """
    UPDATE {letters} SET deliveries = deliveries + 1
     WHERE slot = %s
       AND (route, change_id) IN (SELECT * FROM unnest(%s::text[], %s::text[]))
 RETURNING route, change_id
"""

_HELD_UP: Final = """
    SELECT asked.place
      FROM unnest(%s::int[], %s::text[], %s::text[], %s::text[])
           AS asked (place, route, relation, key_values)
     WHERE EXISTS (
           SELECT
             FROM {keys} AS k
            WHERE k.slot = %s AND k.route = asked.route AND k.relation = asked.relation
              AND left(k.key_values, 200) = left(asked.key_values, 200)
              AND k.key_values = asked.key_values)
        OR EXISTS (
           SELECT
             FROM {keys} AS k
            WHERE k.slot = %s AND k.route = asked.route AND k.relation = asked.relation
              AND left(k.key_values, 200) = '')
        OR asked.key_values = '' AND EXISTS (
           SELECT
             FROM {keys} AS k
            WHERE k.slot = %s AND k.route = asked.route AND k.relation = asked.relation)
"""
"""The whole table is an empty key."""

_SELECT: Final = f"SELECT {COLUMNS}, {{wide}} FROM {{letters}} AS l WHERE "  # noqa: S608 - no values

_COUNT: Final = "SELECT count(*) FROM (SELECT FROM {letters} AS l WHERE {conditions}) AS found"

_SIZE: Final = """
    SELECT count(*), coalesce(sum(size_bytes), 0)::bigint FROM {letters} WHERE slot = %s
"""

_TRIED: Final = """
    UPDATE {letters}
       SET attempts = %s, error = %s, traceback = %s, first_failed_at = %s, last_failed_at = %s,
           size_bytes = size_bytes + %s - octet_length(error) - octet_length(traceback),
           parked = false
     WHERE slot = %s AND route = %s AND change_id = %s AND parked
"""

_FAILED: Final = """
    UPDATE {letters}
       SET attempts = %s, error = %s, traceback = %s,
           first_failed_at = coalesce(first_failed_at, %s), last_failed_at = %s, parked = false,
           size_bytes = size_bytes + %s - octet_length(error) - octet_length(traceback)
     WHERE slot = %s AND id = %s
"""

_INSERT: Final = f"""
    WITH letter AS (
        INSERT INTO {{letters}} ({INSERTED}) VALUES ({", ".join(["%s"] * INSERTED_COUNT)})
        RETURNING id
    )
    INSERT INTO {{keys}} (letter_id, slot, route, relation, key_values)
    SELECT letter.id, %s, %s, key.relation, key.key_values
      FROM letter, unnest(%s::text[], %s::text[]) AS key (relation, key_values)
"""  # noqa: S608 - no values

_DROP: Final = "DELETE FROM {letters} WHERE slot = %s AND id = ANY(%s)"

_SETTLE: Final = """
    DELETE FROM {letters} AS l
     USING unnest(%s::bigint[], %s::int[]) AS delivered (id, deliveries)
     WHERE l.slot = %s AND l.id = delivered.id AND l.deliveries = delivered.deliveries
 RETURNING l.id
"""
