"""From a record to the routes that keep its change: where the catalog is asked.

The decoder and the router are pure: they say what they have to know, and here it is found out. The
catalog is younger than the records, and in one respect it can be older: a walsender sends a
transaction that no other session sees yet. Then it is waited for.
"""

from __future__ import annotations

import structlog

from walstream.catalog import Catalog
from walstream.changes import Begin, Change, Commit, Layout, Message, Relation
from walstream.decoder import Decoder, UnknownLayout, question_of
from walstream.errors import DecodeError, FilterError
from walstream.filters import Literal, columns
from walstream.router import MessageRoute, Route, Router
from walstream.values import UnknownLabel

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.binding")


class Binding:
    """Decodes and routes one stream, and learns the shapes of its relations on the way."""

    def __init__(
        self, catalog: Catalog, decoder: Decoder, router: Router, *, follow_partitions: bool
    ) -> None:
        """Start with nothing known.

        Args:
            catalog: to be asked.
            decoder: of the stream.
            router: with the routes; what it had bound is forgotten.
            follow_partitions: the server sends all tables, because some may be or become
                partitions of one that a route wants.
        """
        self._catalog = catalog
        self._decoder = decoder
        self._router = router
        self._follow_partitions = follow_partitions
        self._partitions_checked = False
        self._question: UnknownLayout | None = None
        self._unfit: set[tuple[str, Relation]] = set()
        self._missing: set[Relation] = set()
        router.unbind()

    def begin_batch(self) -> None:
        """A new batch: what was asked for the last one may have changed."""
        self._partitions_checked = False

    def decode(self, record: memoryview | bytes) -> Begin | Change | Commit | Message | None:
        """Decode a record, or return None when `learn` has to look its relation up first.

        Raises:
            DecodeError: the record is not one of wal2json's.
        """
        try:
            return self._decoder.decode(record)
        except UnknownLayout as question:
            self._question = question
            return None

    async def learn(self, record: memoryview | bytes) -> Begin | Change | Commit | Message:
        """Look up the relation of the record that `decode` did not know, and decode it.

        Raises:
            FilterError: a filter no longer fits its table.
            Unavailable: the catalog cannot be asked.
        """
        assert self._question is not None  # noqa: S101 - decode has left it
        for forgotten in self._decoder.learn(await self._layout(self._question)):
            self._router.forget(forgotten)
        return self._decoder.decode(record)

    def route(self, change: Change) -> list[tuple[Route, Change]] | None:
        """Return the routes that keep a change, each with what it shall see.

        None means that `route_anew` has to ask the catalog first.

        Raises:
            DecodeError: a value is not what wal2json writes for its type.
        """
        if self._follow_partitions and not self._partitions_checked and self._may_gain(change):
            return None
        try:
            return self._router.route(change)
        except UnknownLabel:
            return None

    async def route_anew(self, change: Change) -> list[tuple[Route, Change]]:
        """Route a change after looking at the partitions and the types again.

        Raises:
            DecodeError: a value is not what wal2json writes for its type.
            FilterError: a filter no longer fits its table.
            Unavailable: the catalog cannot be asked.
        """
        if self._follow_partitions and not self._partitions_checked and self._may_gain(change):
            await self._follow(change)
        try:
            return self._router.route(change)
        except UnknownLabel:
            await self._renew_types()
        try:
            return self._router.route(change)
        except UnknownLabel as unknown:
            message = f"a value of {change.relation} is {unknown}, and does not have now"
            raise DecodeError(
                message,
                hint="a label was renamed, and a filter needs its order: drop the filter until the"
                " older changes are through",
            ) from None

    def route_message(self, message: Message) -> list[tuple[MessageRoute, Message]]:
        """Return the routes that want a logical message."""
        return self._router.route_message(message)

    def _may_gain(self, change: Change) -> bool:
        return self._router.may_gain(change.layout)

    async def _layout(self, question: UnknownLayout) -> Layout:
        await self._catalog.wait_until_visible(question.xid)
        layout = await self._catalog.layout(question)
        if self._follow_partitions and not layout.in_catalog:
            self._report_missing(layout.relation)
        await self._bind(layout)
        return layout

    async def _follow(self, change: Change) -> None:
        """Notice that a table has become a partition, which leaves no trace in the stream.

        The catalog is asked once in a batch, and only for tables that some route does not want.
        """
        self._partitions_checked = True
        await self._catalog.wait_until_visible(change.xid)
        if await self._catalog.partitions_changed():
            self._decoder.forget()
            self._router.unbind()
        if change.layout not in self._router.layouts():
            change.layout = await self._layout(question_of(change))

    async def _renew_types(self) -> None:
        await self._catalog.renew_types()
        for layout in self._router.layouts():
            await self._bind(layout)

    async def _bind(self, layout: Layout) -> None:
        normalised: dict[Literal, str] = {}
        fitting = set()
        for route in self._router.wanting(layout):
            try:
                normalised |= await self._catalog.normalise(self._router.literals(route, layout))
            except FilterError as error:
                if route.pattern.relation is not None:
                    raise
                self._report_unfit(route, layout.relation, error)
            else:
                fitting.add(route)
                self._report_missing_columns(route, layout)
        self._router.bind(layout, fitting, normalised)

    def _report_missing_columns(self, route: Route, layout: Layout) -> None:
        """Log that a named table has lost a column of its route's filter since the start.

        Tables that a pattern covers may well not have it.
        """
        if route.where is None or route.pattern.relation is None:
            return
        missing = sorted(columns(route.where) - layout.columns.keys())
        if missing:
            error = FilterError(f"there is no column {', '.join(map(repr, missing))} any more")
            self._report_unfit(route, layout.relation, error)

    def _report_unfit(self, route: Route, relation: Relation, error: FilterError) -> None:
        """Log once that a table which a pattern covers cannot be filtered: its changes are dropped.

        One new table must not stop the stream of all others.
        """
        if (route.name, relation) not in self._unfit:
            self._unfit.add((route.name, relation))
            log.error(
                "filter_does_not_fit",
                route=route.name,
                table=str(relation),
                error=error.message,
                hint="its changes do not pass the filter, and are counted as absent",
            )

    def _report_missing(self, relation: Relation) -> None:
        """Log once that a table is gone, and with it what it was a partition of."""
        if relation not in self._missing:
            self._missing.add(relation)
            log.error(
                "relation_missing",
                table=str(relation),
                hint="it was dropped while its changes waited; if it was a partition of a routed"
                " table, these changes are not delivered",
            )
