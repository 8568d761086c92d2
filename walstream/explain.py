"""``walstream explain``: which routes keep what waits in the slot, and why; nothing is moved.

The slot is peeked at through the catalog's role. All of its changes are asked for, also those that
a stream would not ask the server for; ids are those that the stream would give.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Final

import msgspec
import psycopg
from psycopg import AsyncConnection, sql
from psycopg.rows import TupleRow

from walstream.assembly import needs_everything
from walstream.binding import Binding
from walstream.catalog import PINNED, Catalog
from walstream.changes import Change, Message, Transaction
from walstream.config import Config
from walstream.decoder import START_OPTIONS, Decoder
from walstream.errors import PluginTooOld, SlotBusy
from walstream.postgres import connect, server_error
from walstream.preflight import verify_routes
from walstream.pushdown import PushedDown, push_down
from walstream.recording import Recording, decode_record, find_routes, replay
from walstream.router import Explanation, Router
from walstream.slots import usable_slot

RECORDS_PER_CHANGE: Final = 3
"""A transaction of one change is three records: so many are asked for at first."""

FETCHED_RECORDS: Final = 1000
"""How many records are held at a time."""

_BUSY: Final = (
    "a slot is peeked at only while nobody streams from it: stop that process, or record with"
    " walstream tail --record FILE and explain with --recording FILE"
)


class Explained(msgspec.Struct, frozen=True):
    """A change or a message, and what each route does with it, in the order of the routes.

    ``is_sent`` is false for a change that a stream would not ask the server for; its id has no
    meaning then.
    """

    item: Change | Message
    explanations: list[Explanation]
    is_sent: bool = True


async def explain_slot(
    config: Config, router: Router, *, limit: int
) -> AsyncGenerator[Explained, None]:
    """Explain what waits in the slot, from its position on.

    Args:
        config: where the slot is.
        router: with the routes.
        limit: how many changes and messages at most.

    Raises:
        SlotBusy: somebody streams from it, or has moved it meanwhile.
        SlotMissing, SlotUnfit, SlotLost: as it is.
        ConfigError: a route does not fit the database.
    """
    dsn, name = config.postgres.catalog_dsn(), config.postgres.application_name
    slot = config.slot.name
    catalog = Catalog(dsn, application_name=name)
    try:
        await usable_slot(catalog, slot)
        await verify_routes(catalog, router.routes)
        options = await _known_options(catalog, slot)
        pushed_down = push_down(
            router.routes, await catalog.partitioned(), everything=needs_everything(router)
        )
        await catalog.partitions_changed()
        explainer = _Explainer(catalog, router, pushed_down)
        async with (
            await connect(dsn, application_name=name) as connection,
            aclosing(_peek(connection, slot, RECORDS_PER_CHANGE * limit, options)) as records,
            aclosing(explainer.explain(records)) as found,
        ):
            async for explained in found:
                yield explained
                limit -= 1
                if limit == 0:
                    return
    except SlotBusy as busy:
        raise SlotBusy(busy.message, hint=_BUSY) from None
    finally:
        await catalog.close()


async def explain_recording(path: Path, router: Router) -> AsyncGenerator[Explained, None]:
    """Explain what was recorded.

    Raises:
        UsageError: the file is no recording, or only a server can read a filter's value.
        FilterError, RelationMissing: a route does not fit its table.
    """
    async for item, _ in replay(Recording(path), router):
        yield Explained(item, _explanations(router, item))


class _Explainer:
    """Decodes, numbers and explains records."""

    def __init__(self, catalog: Catalog, router: Router, pushed_down: PushedDown) -> None:
        self._router = router
        self._pushed_down = pushed_down
        self._binding = Binding(
            catalog, Decoder(), router, follow_partitions=pushed_down.follow_partitions
        )
        self._transaction: Transaction | None = None
        self._ordinal = 0

    async def explain(self, batches: AsyncIterator[list[bytes]]) -> AsyncGenerator[Explained, None]:
        async for batch in batches:
            self._binding.begin_batch()
            for record in batch:
                decoded = await decode_record(self._binding, record)
                if decoded is not None:
                    is_sent = self._is_sent(decoded)
                    item = self._numbered(decoded) if is_sent else decoded
                    await find_routes(self._binding, self._router, item)
                    yield Explained(item, _explanations(self._router, item), is_sent)

    def _is_sent(self, item: Change | Message) -> bool:
        return isinstance(item, Message) or self._pushed_down.sends(item.relation, item.operation)

    def _numbered(self, item: Change | Message) -> Change | Message:
        """Give it the ordinal that it has when the server sends only what is asked for."""
        if item.transaction is None:
            return item
        if item.transaction is not self._transaction:
            self._transaction, self._ordinal = item.transaction, 0
        self._ordinal += 1
        return msgspec.structs.replace(item, ordinal=self._ordinal)


def _explanations(router: Router, item: Change | Message) -> list[Explanation]:
    if isinstance(item, Message):
        return router.explain_message(item)
    return router.explain(item)


async def _known_options(catalog: Catalog, slot: str) -> Mapping[str, str]:
    """Return what the installed wal2json knows of what a stream asks it for."""
    options = {**START_OPTIONS, "numeric-data-types-as-string": "1"}
    try:
        await catalog.rows(_PEEK_AT_NOTHING, {"slot": slot, "options": _listed(options)})
    except PluginTooOld:
        return START_OPTIONS
    return options


async def _peek(
    connection: AsyncConnection[TupleRow], slot: str, records: int, options: Mapping[str, str]
) -> AsyncGenerator[list[bytes], None]:
    """Read records from the slot and leave it where it is, a bounded number at a time.

    The server begins at the slot's position each time, ends with the transaction in which there are
    as many records as were asked for, and keeps what is not fetched. The records can be those of
    transactions without any change, so it is asked for more until no more come.
    """
    passed, asked = 0, 0
    position = None
    try:
        async with connection.transaction():
            # Values are printed by the settings of the session that peeks.
            await connection.execute(PINNED)
            while passed >= asked and asked < _MOST_RECORDS:
                asked = min(max(records, 2 * passed), _MOST_RECORDS)
                position = await _position(connection, slot, position)
                parameters = {
                    "slot": slot,
                    "records": asked,
                    "passed": passed,
                    "options": _listed(options),
                }
                async with connection.cursor("walstream_explain") as cursor:
                    await cursor.execute(_PEEK, parameters)
                    while rows := await cursor.fetchmany(FETCHED_RECORDS):
                        passed += len(rows)
                        yield [data.encode() for (data,) in rows]
    except psycopg.Error as error:
        raise server_error(error) from error


async def _position(
    connection: AsyncConnection[TupleRow], slot: str, before: str | None
) -> str | None:
    """Return the slot's position, which has to be the one of before."""
    cursor = await connection.execute(_POSITION, {"slot": slot})
    position: str | None
    (position,) = await cursor.fetchone() or (None,)
    if before not in {None, position}:
        raise SlotBusy(f"the slot {slot} was moved while it was looked into")
    return position


def _listed(options: Mapping[str, str]) -> list[str]:
    return [text for option in options.items() for text in option]


_MOST_RECORDS: Final = 2**31 - 1

_PEEK: Final = sql.SQL(
    """
    SELECT data
      FROM pg_logical_slot_peek_changes(
               %(slot)s, NULL, %(records)s::int, VARIADIC %(options)s::text[])
    OFFSET %(passed)s
    """
)

_POSITION: Final = sql.SQL(
    """
    SELECT confirmed_flush_lsn::text
      FROM pg_replication_slots
     WHERE slot_name = %(slot)s
    """
)

_PEEK_AT_NOTHING: Final = sql.SQL(
    """
    SELECT
      FROM pg_logical_slot_peek_changes(%(slot)s, '0/1', 1, VARIADIC %(options)s::text[])
    """
)
"""wal2json reads its options, and the server stops at the first record of the WAL."""
