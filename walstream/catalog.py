"""What the database's catalog knows: types, relations, server settings.

An ordinary connection, opened when it is first needed. It may go through a pooler: nothing is left
in the session, settings that matter are set inside of the transaction that needs them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import msgspec
import psycopg
import structlog
from psycopg import AsyncConnection, sql
from psycopg.rows import TupleRow

from walstream.changes import Layout, Relation
from walstream.decoder import UnknownLayout
from walstream.errors import FilterError
from walstream.filters import Literal
from walstream.loaders import TextLoaders
from walstream.lsn import Lsn
from walstream.postgres import SESSION_SETTINGS, connect, cut, impatient, server_error
from walstream.values import Kind, PgType, Types

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.catalog")

PINNED: Final = b"; ".join(
    b"SET LOCAL %b TO %b" % (name.encode(), value.encode())
    for name, value in SESSION_SETTINGS.items()
)
"""SQL that pins the session's settings for one transaction."""

QUERY_SECONDS: Final = 30.0
"""How long the server may take to answer a question; none of ours is hard."""

PROBE_SECONDS: Final = 5.0
"""The same, for questions that only ask whether the server is there."""

VISIBLE_SECONDS: Final = 5.0
VISIBLE_PAUSE_SECONDS: Final = 0.002
"""How long, and in which steps, a transaction is waited for that is not visible yet."""

HOLD_PAUSE_SECONDS: Final = 0.1
"""The steps afterwards, for who waits longer."""


class TableColumn(msgspec.Struct, frozen=True):
    """A column as it is now; ``toastable`` says that its values may be stored out of line."""

    name: str
    typeoid: int
    toastable: bool


class Table(msgspec.Struct, frozen=True):
    """A relation as it is now.

    ``kind`` is ``pg_class.relkind``, ``replica_identity`` is ``pg_class.relreplident``;
    ``identity`` names the columns that an update or delete is identified by, ``ancestors`` the
    partitioned tables above, nearest first. ``has_row_security`` is about all of these.
    """

    relation: Relation
    kind: str
    persistence: str
    replica_identity: str
    columns: tuple[TableColumn, ...]
    key: tuple[str, ...]
    identity: tuple[str, ...]
    ancestors: tuple[Relation, ...]
    has_row_security: bool = False

    @property
    def is_partitioned(self) -> bool:
        """Whether its rows live in partitions, under whose names they are sent."""
        return self.kind == "p"


class Server(msgspec.Struct, frozen=True):
    """The server's facts that streaming depends on."""

    version: int
    wal_level: str
    in_recovery: bool
    encoding: str
    flush_lsn: Lsn


Query: TypeAlias = sql.SQL | bytes


class Catalog:
    """Answers questions about the database, and remembers its types."""

    def __init__(self, dsn: str | Callable[[], str], *, application_name: str) -> None:
        """Connect to nothing yet.

        Args:
            dsn: a connection string, or what says it anew for each connection: a file that holds
                it may change while the process runs.
            application_name: what ``pg_stat_activity`` shows.
        """
        self._dsn = dsn
        self._application_name = application_name
        self._connection: AsyncConnection[TupleRow] | None = None
        self._lock = asyncio.Lock()
        self._normalised: dict[Literal, str] = {}
        self._partitions: TupleRow | None = None
        self._loaders = TextLoaders()
        self.types = Types(self._loaders)

    async def close(self) -> None:
        """Close the connection; the next question opens another."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    def abandon(self) -> None:
        """Cut the connection: who waits for an answer gets an error at once."""
        if self._connection is not None:
            cut(self._connection)

    async def probe(self) -> None:
        """Ask for the smallest possible answer.

        The server's shutdown ends ordinary connections first and refuses new ones with words of its
        own, long before a walsender with unconfirmed changes lets anything be known.

        Raises:
            ServerShutdown: the server is shutting down.
            Unavailable: the server cannot be reached.
        """
        await self.rows(sql.SQL("SELECT"), seconds=PROBE_SECONDS)

    async def is_decoding(self, pid: int) -> bool | None:
        """Whether a walsender is at work, and neither idle nor waiting for its client.

        Args:
            pid: of the walsender.

        Returns:
            None when the walsender is another role's, whose activity this one may not see.

        Raises:
            WalstreamError: the server cannot be asked, or does not answer soon.
        """
        rows = await self.rows(_WAITS_FOR, {"pid": pid}, seconds=PROBE_SECONDS)
        if not rows:
            return False
        state, waits_for = rows[0]
        return None if state is None else waits_for not in _IDLE

    async def server(self) -> Server:
        """Ask for the server's facts."""
        (row,) = await self.rows(_SERVER)
        return Server(row[0], row[1], row[2], row[3], Lsn.parse(row[4]))

    async def system_identifier(self) -> str:
        """Return the cluster's identifier, as a replication connection tells it too."""
        [(systemid,)] = await self.rows(
            sql.SQL("SELECT system_identifier::text FROM pg_control_system()")
        )
        return str(systemid)

    async def table(self, relation: Relation) -> Table | None:
        """Describe a relation, or return None when there is none of that name."""
        rows = await self.rows(_TABLE, {"schema": relation.schema, "name": relation.name})
        if not rows:
            return None
        kind, persistence, replica_identity, columns, key, identity, ancestors, secured = rows[0]
        return Table(
            relation,
            kind,
            persistence,
            replica_identity,
            tuple([TableColumn(*column) for column in columns]),
            tuple(key),
            tuple(identity),
            tuple([Relation(*ancestor) for ancestor in ancestors]),
            secured,
        )

    async def tables(self, schema: str | None = None, name: str | None = None) -> list[Relation]:
        """List the tables of a schema and name; None stands for all."""
        rows = await self.rows(_TABLES, {"schema": schema, "name": name})
        return [Relation(*row) for row in rows]

    async def layout(self, question: UnknownLayout) -> Layout:
        """Describe the shape that a record came in.

        The record's own names and types are what counts: the catalog is younger than the record.
        From the catalog come the partition's ancestors, and which columns a record may leave out.
        """
        table = await self.table(question.relation)
        now = table.columns if table else ()
        columns = {column.name: column.typeoid for column in now}
        columns |= dict(zip(question.identity_names, question.identity_typeoids, strict=True))
        columns |= dict(zip(question.names, question.typeoids, strict=True))
        await self.learn_types(columns.values())
        # Of a list: a tuple of a generator is cut to its length, and Python keeps 2,000 of each
        # length when they are gone, until it looks for cycles everywhere.
        toastable = tuple([column.name for column in now if column.toastable])
        sent = set(question.names)
        return Layout(
            relation=question.relation,
            names=question.names,
            typeoids=question.typeoids,
            key=question.key,
            types=self.types,
            ancestors=table.ancestors if table else (),
            columns=columns,
            missing=tuple([name for name in toastable if name not in sent]),
            toastable=toastable,
            is_full=table is not None and table.replica_identity == "f",
            in_catalog=table is not None,
            table_columns=tuple([(column.name, column.typeoid) for column in now]),
        )

    async def learn_types(self, oids: Iterable[int]) -> None:
        """Fetch the types that are not built in and not known yet, with all they are built on."""
        unknown = sorted({oid for oid in oids if oid not in self.types})
        if unknown:
            await self._fetch_types(unknown)

    async def renew_types(self) -> None:
        """Fetch all types again that are not built in: one of them has changed."""
        self._normalised.clear()
        await self._fetch_types(sorted(self.types.learned()))

    async def wait_until_visible(self, xid: int) -> None:
        """Wait until what a transaction has done to the catalog can be seen, for some seconds.

        The walsender sends a transaction before other sessions see it, by less than a millisecond
        or, under synchronous replication, until the standbys have it. The wait has an end because
        we may be such a standby.
        """
        try:
            async with asyncio.timeout(VISIBLE_SECONDS):
                while await self._is_running(xid):  # noqa: ASYNC110 - a row
                    await asyncio.sleep(VISIBLE_PAUSE_SECONDS)
        except TimeoutError:
            log.warning("transaction_not_visible", xid=xid, waited_seconds=VISIBLE_SECONDS)

    async def hold_until_visible(self, xid: int) -> None:
        """Wait until a new snapshot sees a transaction, however long that takes.

        Under synchronous replication it takes until the standbys have it.
        """
        await self.wait_until_visible(xid)
        while await self._is_running(xid):  # noqa: ASYNC110 - a row
            await asyncio.sleep(HOLD_PAUSE_SECONDS)

    async def _is_running(self, xid: int) -> bool:
        ((is_running,),) = await self.rows(_RUNNING, {"xid": xid})
        return bool(is_running)

    async def partitioned(self) -> set[Relation]:
        """List the partitioned tables."""
        return {Relation(*row) for row in await self.rows(_PARTITIONED)}

    async def partitions_changed(self) -> bool:
        """Whether tables have become or ceased to be partitions since this was last asked."""
        (row,) = await self.rows(_PARTITIONS)
        before, self._partitions = self._partitions, row
        return before != row

    async def normalise(
        self, literals: Sequence[Literal], *, remember: bool = True
    ) -> dict[Literal, str]:
        """Let the server read a filter's values as the types of their columns.

        Args:
            literals: the values.
            remember: keep the answers; not for what strangers ask.

        Raises:
            FilterError: a value does not parse; the column, its type and the server's reason.
        """
        answers: dict[Literal, str] = {}
        for literal in literals:
            if literal in self._normalised:
                answers[literal] = self._normalised[literal]
                continue
            try:
                (row,) = await self._retrying(literal.sql.encode(), (literal.text,))
            except psycopg.DataError as error:
                reason = error.diag.message_primary or type(error).__name__
                message = f"column {literal.column} of type {literal.type_name}: {reason}"
                raise FilterError(
                    message, sqlstate=error.diag.sqlstate or "", reason=reason
                ) from None
            except psycopg.Error as error:
                raise server_error(error) from error
            answers[literal] = row[0]
            if remember:
                self._normalised[literal] = row[0]
        return answers

    async def _fetch_types(self, oids: list[int]) -> None:
        rows = await self.rows(_TYPES, {"oids": oids})
        fetched = [_pg_type(row) for row in rows]
        self._loaders.register(fetched)
        for pg_type in fetched:
            self.types.add(pg_type)

    async def rows(
        self,
        query: Query,
        parameters: Mapping[str, Any] | Sequence[Any] | None = None,
        *,
        seconds: float = QUERY_SECONDS,
    ) -> list[TupleRow]:
        """Run a query; a connection that went away since the last one is replaced once.

        Args:
            query: one statement.
            parameters: of it.
            seconds: how long the server may take to answer, before the connection is cut.

        Raises:
            WalstreamError: the server cannot be reached, refuses, or does not answer.
        """
        try:
            return await self._retrying(query, parameters, seconds)
        except psycopg.Error as error:
            raise server_error(error) from error

    async def _retrying(
        self,
        query: Query,
        parameters: Mapping[str, Any] | Sequence[Any] | None,
        seconds: float = QUERY_SECONDS,
    ) -> list[TupleRow]:
        async with self._lock:
            if self._connection is not None:
                try:
                    with impatient(self._connection, seconds):
                        return await self._run(self._connection, query, parameters)
                except psycopg.OperationalError:
                    await self.close()
            dsn = self._dsn if isinstance(self._dsn, str) else self._dsn()
            self._connection = await connect(dsn, application_name=self._application_name)
            with impatient(self._connection, seconds):
                return await self._run(self._connection, query, parameters)

    async def _run(
        self,
        connection: AsyncConnection[TupleRow],
        query: Query,
        parameters: Mapping[str, Any] | Sequence[Any] | None,
    ) -> list[TupleRow]:
        """Run a query with the pinned settings, which a pooler may have given to someone else."""
        async with connection.transaction():
            await connection.execute(PINNED)
            cursor = await connection.execute(query, parameters)
            return await cursor.fetchall() if cursor.description else []


def _pg_type(row: TupleRow) -> PgType:
    oid, name, schema, kind, element, base, delimiter, attributes, labels, json_cast, sql_name = row
    return PgType(
        oid=oid,
        name=name,
        schema=schema,
        kind=Kind(kind),
        element=element,
        base=base,
        delimiter=delimiter,
        attributes=tuple((attribute, typeoid) for attribute, typeoid in attributes),
        labels=tuple(labels),
        json_cast=json_cast,
        sql_name=sql_name,
    )


_SERVER: Final = sql.SQL(
    """
    SELECT current_setting('server_version_num')::int,
           current_setting('wal_level'),
           pg_is_in_recovery(),
           pg_encoding_to_char(encoding),
           CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn()
                ELSE pg_current_wal_flush_lsn() END::text
      FROM pg_database
     WHERE datname = current_database()
    """
)

_WAITS_FOR: Final = sql.SQL(
    "SELECT state, wait_event_type FROM pg_stat_activity WHERE pid = %(pid)s"
)

_IDLE: Final = {"Activity", "Client"}
"""What a walsender waits for that has nothing to send, or whose client does not read.

https://www.postgresql.org/docs/current/monitoring-stats.html#WAIT-EVENT-TABLE
"""

_TABLE: Final = sql.SQL(
    """
    SELECT c.relkind::text,
           c.relpersistence::text,
           c.relreplident::text,
           ARRAY(SELECT jsonb_build_array(
                            a.attname, a.atttypid::bigint, a.attlen = -1 AND a.attstorage <> 'p')
                   FROM pg_attribute a
                  WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
                  ORDER BY a.attnum),
           ARRAY(SELECT a.attname::text
                   FROM pg_index i,
                        unnest(i.indkey) WITH ORDINALITY AS k (attnum, place)
                   JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.attnum
                  WHERE i.indrelid = c.oid AND i.indisprimary
                  ORDER BY k.place),
           ARRAY(SELECT a.attname::text
                   FROM pg_attribute a
                  WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
                    AND (c.relreplident = 'f'
                         OR EXISTS (SELECT FROM pg_index i
                                     WHERE i.indrelid = c.oid AND a.attnum = ANY (i.indkey)
                                       AND (c.relreplident = 'd' AND i.indisprimary
                                            AND i.indimmediate
                                            OR c.relreplident = 'i' AND i.indisreplident)))
                  ORDER BY a.attnum),
           ARRAY(SELECT jsonb_build_array(pn.nspname, p.relname)
                   FROM pg_partition_ancestors(c.oid) WITH ORDINALITY AS up (oid, place)
                   JOIN pg_class p ON p.oid = up.oid AND p.oid <> c.oid
                   JOIN pg_namespace pn ON pn.oid = p.relnamespace
                  ORDER BY up.place),
           c.relrowsecurity
           OR EXISTS (SELECT FROM pg_partition_ancestors(c.oid) AS up (oid)
                        JOIN pg_class p ON p.oid = up.oid
                       WHERE p.relrowsecurity)
      FROM pg_class c
      JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE n.nspname = %(schema)s AND c.relname = %(name)s
    """
)

_TABLES: Final = sql.SQL(
    """
    SELECT n.nspname, c.relname
      FROM pg_class c
      JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE c.relkind IN ('r', 'p')
       AND n.nspname NOT IN ('pg_catalog', 'information_schema')
       AND n.nspname NOT LIKE 'pg\\_toast%%' AND n.nspname NOT LIKE 'pg\\_temp%%'
       AND n.nspname = coalesce(%(schema)s::text, n.nspname)
       AND c.relname = coalesce(%(name)s::text, c.relname)
     ORDER BY 1, 2
    """
)

_RUNNING: Final = sql.SQL(
    """
    SELECT EXISTS (SELECT FROM pg_snapshot_xip(taken) AS running (xid)
                    WHERE running.xid::text::numeric %% 4294967296 = %(xid)s)
           OR (%(xid)s + 4294967296 - pg_snapshot_xmax(taken)::text::numeric %% 4294967296)
              %% 4294967296 < 2147483648
      FROM pg_current_snapshot() AS taken
    """
)
"""A snapshot does not see what it lists as running, nor what is not older than its xmax.

The server's xids are of 64 bits there, wal2json's are of 32: they compare as on a circle.
"""

_PARTITIONED: Final = sql.SQL(
    """
    SELECT n.nspname, c.relname
      FROM pg_class c
      JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE c.relkind = 'p'
    """
)

_PARTITIONS: Final = sql.SQL(
    """
    SELECT count(*), sum(hashint8(inhrelid::bigint << 32 | inhparent::bigint)::bigint)
      FROM pg_inherits
    """
)

_TYPES: Final = sql.SQL(
    """
    WITH RECURSIVE needed (oid) AS (
        SELECT unnest(%(oids)s::oid[])
         UNION
        SELECT part.oid
          FROM needed
          JOIN pg_type t ON t.oid = needed.oid
         CROSS JOIN LATERAL (
               SELECT t.typbasetype WHERE t.typtype = 'd'
               UNION ALL
               SELECT t.typelem
                WHERE t.typtype <> 'd' AND t.typcategory = 'A' AND t.typlen = -1
               UNION ALL
               SELECT r.rngsubtype FROM pg_range r WHERE t.oid IN (r.rngtypid, r.rngmultitypid)
               UNION ALL
               SELECT a.atttypid FROM pg_attribute a
                WHERE t.typtype = 'c' AND a.attrelid = t.typrelid
                  AND a.attnum > 0 AND NOT a.attisdropped
               ) AS part (oid)
    )
    SELECT t.oid::bigint,
           t.typname,
           n.nspname,
           CASE WHEN t.typtype <> 'd' AND t.typcategory = 'A' AND t.typlen = -1 THEN 'array'
                ELSE CASE t.typtype WHEN 'c' THEN 'composite' WHEN 'd' THEN 'domain'
                                    WHEN 'e' THEN 'enum' WHEN 'r' THEN 'range'
                                    WHEN 'm' THEN 'multirange' ELSE 'base' END END,
           coalesce(CASE WHEN t.typtype <> 'd' AND t.typcategory = 'A' AND t.typlen = -1
                         THEN t.typelem
                         ELSE (SELECT r.rngsubtype FROM pg_range r
                                WHERE t.oid IN (r.rngtypid, r.rngmultitypid)) END,
                    0)::bigint,
           t.typbasetype::bigint,
           coalesce((SELECT e.typdelim FROM pg_type e WHERE e.oid = t.typelem), t.typdelim)::text,
           ARRAY(SELECT jsonb_build_array(a.attname, a.atttypid::bigint)
                   FROM pg_attribute a
                  WHERE t.typtype = 'c' AND a.attrelid = t.typrelid
                    AND a.attnum > 0 AND NOT a.attisdropped
                  ORDER BY a.attnum),
           ARRAY(SELECT e.enumlabel::text FROM pg_enum e
                  WHERE e.enumtypid = t.oid ORDER BY e.enumsortorder),
           EXISTS (SELECT FROM pg_cast c
                    WHERE c.castsource = t.oid AND c.castmethod = 'f'
                      AND c.casttarget = 'json'::regtype),
           format_type(t.oid, NULL)
      FROM (SELECT DISTINCT oid FROM needed) AS listed
      JOIN pg_type t ON t.oid = listed.oid
      JOIN pg_namespace n ON n.oid = t.typnamespace
     ORDER BY t.typtype = 'd', t.oid
    """
)
"""Types with all that they are built on; domains last, for they take over their base's loader."""
