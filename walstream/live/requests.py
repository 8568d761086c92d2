"""What a client may ask for: tables that come here, columns that it reads, values of their types.

Of what a reader may not see nothing is told, not even whether it is there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Final

import msgspec
import structlog

from walstream.access.readers import Reader, Sight
from walstream.catalog import Catalog, Table
from walstream.changes import Layout, Relation
from walstream.errors import FilterError, Unavailable
from walstream.filters import Filter, Literal, literals
from walstream.live.literals import Literals
from walstream.live.subscriptions import RequestRefused, Subscription, named_columns
from walstream.live.views import literals_of
from walstream.offline import read_offline
from walstream.router import Route, TablePattern

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.live")

MAX_ASKED: Final = 100
"""Values of one filter that the server is asked about: the stream asks by the same connection."""

AT_ONCE: Final = 4
"""So many questions of clients wait for the catalog: the stream's own are next to them in line."""

MAX_TABLES: Final = 512

TABLE_SECONDS: Final = 10.0
"""So long an answer of the catalog is good for those who subscribe."""


UNUSABLE_TOLD_SECONDS: Final = 60.0
"""So seldom it is told of one table that a role's condition does not fit it."""


class VisibleTable(msgspec.Struct, frozen=True):
    """A table whose changes come here, and what a reader sees of it."""

    layout: Layout
    sight: Sight


class Requests:
    """Verifies what clients ask for before they get anything."""

    def __init__(self, catalog: Catalog, literals: Literals) -> None:
        self.routes: Sequence[Route] = ()
        """Those that lead to the clients: more than they keep nobody sees."""
        self._catalog = catalog
        self._literals = literals
        self._tables: dict[Relation, tuple[float, Table | None]] = {}
        self._open: set[tuple[Relation, str]] = set()
        self._unusable_told_at: dict[Relation, float] = {}
        self._asking = asyncio.Semaphore(AT_ONCE)

    def masked(self, layout: Layout) -> frozenset[str]:
        """Return the columns that routes pass on in another form than they have in the table."""
        return frozenset(
            name
            for one in self.routes
            if one.projection is not None and one.wants(layout.relation, layout.ancestors)
            for name in one.projection.masks
        )

    async def check(self, subscriptions: Sequence[Subscription], reader: Reader) -> None:
        """Refuse what the reader may not ask for, or what cannot be read.

        Of what it may not see nothing is told, not even whether it is there.

        Raises:
            RequestRefused: with the status and the reason.
        """
        try:
            for subscription in subscriptions:
                await self._check(subscription, reader)
        except FilterError as error:
            raise RequestRefused(400, f"where: {error.message}", hint=error.hint) from None
        except Unavailable:
            raise RequestRefused(503, "the database cannot be asked at this moment") from None

    async def visible(self, pattern: TablePattern, reader: Reader) -> AsyncIterator[VisibleTable]:
        """Go through the tables of a pattern that come here and that the reader may read.

        Raises:
            Unavailable: the catalog cannot be asked.
        """
        relation = pattern.relation
        named = [relation] if relation else await self._named(pattern)
        for one in named:
            table = await self._table(one)
            layout = _layout_of(one, table, self._catalog)
            sight = self._sight(reader, layout, table)
            if table is None or sight is None or not self._comes(layout):
                continue
            await self._catalog.learn_types(layout.columns.values())
            try:
                await self._check_condition(sight, layout, reader)
            except RequestRefused:
                continue
            yield VisibleTable(layout, sight)

    def may_compare(self, column: str, table: VisibleTable) -> bool:
        """Whether a client may have a column in its filter: what it would tell, it may know."""
        is_known = column in table.layout.columns and table.sight.reads(column)
        return is_known and not self._is_masked(column, table.layout)

    async def read_values(self, where: Filter, table: VisibleTable) -> None:
        """Let the server read the values of a client's filter.

        Raises:
            FilterError: the filter does not fit the table, or a value its column; or there are too
                many that only the server can read.
            Unavailable: the catalog cannot be asked.
        """
        layout = table.layout
        asked = literals(where, layout.columns, layout.types, layout.relation, is_linear=True)
        await self._read(asked, layout)

    async def _check(self, subscription: Subscription, reader: Reader) -> None:
        relation = subscription.pattern.relation
        if relation is None:
            await self._check_pattern(subscription, reader)
            return
        table = await self._table(relation)
        layout = _layout_of(relation, table, self._catalog)
        sight = self._sight(reader, layout, table)
        if sight is None:
            raise RequestRefused(403, f"{relation} may not be read")
        if table is None:
            raise RequestRefused(404, f"there is no table {relation}")
        if not self._comes(layout):
            hint = "a [[routes]] that leads to the live sink decides what can be asked for"
            raise RequestRefused(404, f"no changes of {relation} come here", hint=hint)
        self._check_columns(subscription, sight, layout)
        await self._catalog.learn_types(layout.columns.values())
        await self._check_condition(sight, layout, reader)
        await self._read(literals_of(subscription, sight, layout), layout)

    async def _read(self, asked: Sequence[Literal], layout: Layout) -> None:
        if sum(read_offline(literal, layout.types) is None for literal in asked) > MAX_ASKED:
            message = f"more than {MAX_ASKED} values that only the server can read"
            raise FilterError(message, hint="write them as the server prints them")
        async with self._asking:
            await self._literals.normalise(asked, layout)

    async def _check_condition(self, sight: Sight, layout: Layout, reader: Reader) -> None:
        """Refuse when the role's own condition does not fit; it may name what is hidden."""
        if sight.where is None:
            return
        try:
            asked = literals(sight.where, layout.columns, layout.types)
            async with self._asking:
                await self._literals.normalise(asked, layout)
        except FilterError as error:
            self._tell_unusable(layout.relation, reader, error)
            hint = "the role's condition on rows does not fit the table, or the token's claims"
            message = f"{layout.relation} may not be read"
            raise RequestRefused(403, message, hint=hint) from None

    def _tell_unusable(self, relation: Relation, reader: Reader, error: FilterError) -> None:
        """Tell the operator, too: clients cannot mend it, and may not be told anything."""
        now = time.monotonic()
        told_at = self._unusable_told_at.get(relation)
        if told_at is not None and now - told_at < UNUSABLE_TOLD_SECONDS:
            return
        if len(self._unusable_told_at) >= MAX_TABLES:
            self._unusable_told_at.clear()
        self._unusable_told_at[relation] = now
        log.warning(
            "role_condition_unusable",
            relation=str(relation),
            role=reader.role,
            error=_without_value(error),
            hint="the role gets nothing of the table: its where does not fit, or a token's claim",
        )

    async def _check_pattern(self, subscription: Subscription, reader: Reader) -> None:
        pattern = subscription.pattern
        for relation in await self._named(pattern):
            table = await self._table(relation)
            layout = _layout_of(relation, table, self._catalog)
            if self._sight(reader, layout, table) is not None:
                return
        raise RequestRefused(403, f"{pattern} may not be read")

    def _sight(self, reader: Reader, layout: Layout, table: Table | None) -> Sight | None:
        """Return what is seen of a table, and tell once that its row security does not count."""
        sight = reader.sight(layout)
        if sight is None or table is None or not table.has_row_security or sight.narrows:
            return sight
        known = (layout.relation, reader.role)
        if known not in self._open and len(self._open) < MAX_TABLES:
            self._open.add(known)
            log.warning(
                "row_security_ignored",
                relation=str(layout.relation),
                role=reader.role,
                hint='the role reads all rows: set rls = true, a where, or rows = "all"',
            )
        return sight

    def _check_columns(self, subscription: Subscription, sight: Sight, layout: Layout) -> None:
        table = VisibleTable(layout, sight)
        for name in sorted(named_columns(subscription)):
            if not self.may_compare(name, table):
                raise RequestRefused(403, f"where: the column {name!r} may not be read")
        for name in sorted(subscription.columns or ()):
            if not is_sent(name, table):
                raise RequestRefused(403, f"columns: the column {name!r} may not be read")

    def _comes(self, layout: Layout) -> bool:
        return any(route.wants(layout.relation, layout.ancestors) for route in self.routes)

    def _is_masked(self, name: str, layout: Layout) -> bool:
        """Whether no route passes the column on as it is."""
        leading = [one for one in self.routes if one.wants(layout.relation, layout.ancestors)]
        return not any(one.projection is None or one.projection.shows(name) for one in leading)

    async def _named(self, pattern: TablePattern) -> list[Relation]:
        async with self._asking:
            return await self._catalog.tables(pattern.schema, pattern.name)

    async def _table(self, relation: Relation) -> Table | None:
        if self._is_old(relation):
            async with self._asking:
                if self._is_old(relation):  # many who come at once ask for the same
                    table = await self._catalog.table(relation)
                    if len(self._tables) >= MAX_TABLES:
                        self._tables.clear()
                    self._tables[relation] = (time.monotonic(), table)
                    return table
        return self._tables[relation][1]

    def _is_old(self, relation: Relation) -> bool:
        known = self._tables.get(relation)
        return known is None or time.monotonic() - known[0] > TABLE_SECONDS


def is_sent(column: str, table: VisibleTable) -> bool:
    """Whether a reader may have a column, masked or not."""
    projection = table.sight.projection
    return column in table.layout.columns and (projection is None or projection.passes(column))


def _without_value(error: FilterError) -> str:
    """Return the message, or in place of the server's, which quotes a claim perhaps, its code."""
    if not error.reason:
        return error.message
    return f"a value cannot be read as the type of its column: SQLSTATE {error.sqlstate}"


def _layout_of(relation: Relation, table: Table | None, catalog: Catalog) -> Layout:
    columns = () if table is None else table.columns
    return Layout(
        relation=relation,
        names=[column.name for column in columns],
        typeoids=[column.typeoid for column in columns],
        key=[] if table is None else list(table.key),
        types=catalog.types,
        ancestors=() if table is None else table.ancestors,
        columns={column.name: column.typeoid for column in columns},
        in_catalog=table is not None,
    )
