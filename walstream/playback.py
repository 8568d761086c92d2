"""Changes that were kept are delivered again: routed anew, and handed over as a stream's are.

What a handler or sink gets went through two routes: the one to the live sink, which decides what is
kept and how it is masked, and its own. A change counts as delivered when its destination has taken
it; `Playback.position` is never behind one that was not. So whoever goes on from there misses
nothing, and gets with the same ids what was taken behind it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from typing import Final, NamedTuple, Protocol

import msgspec
import structlog

from walstream.acknowledger import Acknowledger, Ticket
from walstream.catalog import Catalog
from walstream.changes import Change, Layout, Transaction, memory_bytes
from walstream.delivery import Delivery
from walstream.destinations import Handler
from walstream.errors import DecodeError, FilterError, HistoryMissing
from walstream.filters import Literal
from walstream.flow import Handed
from walstream.journal import JournalTrimmed
from walstream.lsn import ZERO
from walstream.moments import Moment
from walstream.offline import read_offline
from walstream.positions import BEGINNING, Position
from walstream.router import Route, Router
from walstream.values import UnknownLabel

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.playback")

HANDED_CHANGES: Final = 100
"""So many are routed before they are handed over, and before others have their turn."""


class Watch(NamedTuple):
    """What is done beside a playback, and how often; what it raises ends the playback."""

    look: Callable[[], Awaitable[None]]
    every_seconds: float = 1.0


class Kept(Protocol):
    """What is read from: a journal."""

    def read(self, after: Position, upto: Position) -> AsyncIterator[Sequence[Change]]:
        """Read what stands behind the one position, up to the other, in order and in pieces."""

    async def position_before(self, time: datetime) -> Position | None:
        """Return a position behind which all stands that was committed then or later.

        None means that it does not go back so far.
        """


async def position_of(
    moment: Moment, kept: Kept, begins: Position, now: datetime
) -> Position | None:
    """Return the position behind which a moment begins; None when it is before what is kept.

    Args:
        moment: when.
        kept: the journal.
        begins: where that begins.
        now: what so long ago counts from.
    """
    if isinstance(moment, timedelta):
        return await kept.position_before(now - moment)
    if isinstance(moment, datetime):
        return await kept.position_before(moment)
    if moment == BEGINNING:
        return begins
    return None if moment < begins else moment


class Routing:
    """Routes changes that were kept, with the types that they were kept with.

    The database is asked only for values of filters that nobody else can read.
    """

    def __init__(self, routes: Sequence[Route], catalog: Catalog, selection: Router) -> None:
        """Begin.

        Args:
            routes: where changes go.
            catalog: may be asked.
            selection: a change that none of its routes keeps is passed over; without routes all
                are selected.
        """
        self.router = Router(routes)
        self._catalog = catalog
        self._selection = selection
        self._known: dict[Layout, Layout] = {}

    async def route(self, change: Change) -> list[tuple[Route, Change]]:
        """Return the routes that keep a change, each with what it shall see.

        Raises:
            DecodeError: a value in a filter cannot be read.
            Unavailable: the catalog has to be asked, and cannot be.
        """
        layout = self._known.get(change.layout)
        if layout is None:
            layout = await self._bind(change.layout, change.layout)
        if change.leaving or layout is not change.layout:
            # The route to the live sink may have asked for it. Other readers share the change.
            change = msgspec.structs.replace(
                change, layout=layout, leaving=False, _row=None, _identity=None
            )
        try:
            return self._route(change)
        except UnknownLabel:
            layout = await self._renew(change.layout)
        change = msgspec.structs.replace(change, layout=layout, _row=None, _identity=None)
        try:
            return self._route(change)
        except UnknownLabel as unknown:
            message = f"a value of {change.relation} is {unknown}, and does not have now"
            raise DecodeError(
                message, hint="a label was renamed: a filter that needs its order cannot be tested"
            ) from None

    def _route(self, change: Change) -> list[tuple[Route, Change]]:
        if self._selection.routes and not self._selection.route(change):
            return []
        return self.router.route(change)

    async def _renew(self, layout: Layout) -> Layout:
        """Bind a shape to the types as the database has them now."""
        await self._catalog.renew_types()
        await self._catalog.learn_types(layout.columns.values())
        return await self._bind(layout, msgspec.structs.replace(layout, types=self._catalog.types))

    async def _bind(self, kept: Layout, layout: Layout) -> Layout:
        for router in (self.router, self._selection):
            normalised: dict[Literal, str] = {}
            fitting = set()
            for route in router.wanting(layout):
                try:
                    normalised |= await self._normalise(router.literals(route, layout), layout)
                except FilterError as error:
                    _report_unfit(route, layout, error)
                else:
                    fitting.add(route)
            router.bind(layout, fitting, normalised)
        self._known[kept] = layout
        return layout

    async def _normalise(self, literals: Sequence[Literal], layout: Layout) -> dict[Literal, str]:
        answers = {literal: read_offline(literal, layout.types) for literal in literals}
        unread = [literal for literal, text in answers.items() if text is None]
        read = {literal: text for literal, text in answers.items() if text is not None}
        return read | (await self._catalog.normalise(unread) if unread else {})


def _report_unfit(route: Route, layout: Layout, error: FilterError) -> None:
    log.error(
        "filter_does_not_fit",
        route=route.name,
        table=str(layout.relation),
        error=error.message,
        hint="its changes do not pass the filter, and are counted as absent",
    )


class Span(NamedTuple):
    """What is to be delivered: what stands behind ``after``, up to ``upto``."""

    after: Position
    upto: Position


class _Sent:
    """What goes together to its destinations, and where it ends in the stream."""

    __slots__ = ("position", "ticket", "transaction")

    def __init__(self, ticket: Ticket, transaction: Transaction) -> None:
        self.ticket = ticket
        self.transaction = transaction
        self.position = BEGINNING


class Playback:
    """Delivers what was kept of a span, once.

    What goes together is one change, where a handler takes whole transactions one of these.
    """

    def __init__(
        self,
        kept: Kept,
        span: Span,
        routing: Routing,
        delivery: Delivery,
        *,
        drain_seconds: float,
        watch: Watch,
    ) -> None:
        """Begin nothing yet.

        Args:
            kept: to be read.
            span: what of it.
            routing: where it goes.
            delivery: the way there; nothing else uses it meanwhile.
            drain_seconds: how long a stop waits for what is being delivered.
            watch: what is done meanwhile.
        """
        self._kept = kept
        self._span = span
        self._routing = routing
        self._delivery = delivery
        self._drain_seconds = drain_seconds
        self._watch = watch
        self._acknowledger = Acknowledger(ZERO)
        self._whole_transactions = any(
            isinstance(route.destination, Handler) and route.destination.options.transactions
            for route in routing.router.routes
        )
        self._sent: deque[_Sent] = deque()
        self._position = self._fed = span.after
        self._is_stopped = False
        self._delivering: asyncio.Task[None] | None = None
        self.changes = 0
        """How many were read."""

    @property
    def position(self) -> Position:
        """Up to where all is taken."""
        sent = self._sent
        while sent and sent[0].ticket.closed and not sent[0].ticket.untaken:
            self._position = sent.popleft().position
        if not sent:
            self._position = max(self._position, self._fed)
        return self._position

    @property
    def is_done(self) -> bool:
        """Whether all of the span is taken."""
        return self.position >= self._span.upto

    def stop(self) -> None:
        """Finish what is being delivered, and let `run` return."""
        if self._is_stopped:
            return
        self._is_stopped = True
        self._delivery.begin_no_more()
        if self._delivering is not None:
            asyncio.get_running_loop().call_later(self._drain_seconds, self._delivering.cancel)

    async def run(self) -> None:
        """Deliver until all is taken, or `stop` is called.

        Raises:
            HistoryMissing: it was removed from the journal meanwhile.
            WalstreamError: a destination did not take a change, or what the watch raised.
        """
        self._delivery.attach(self._acknowledger)
        if self._is_stopped:  # `attach` has forgotten it
            return
        delivering = self._delivering = asyncio.create_task(self._delivery.run())
        feeding = asyncio.create_task(self._feed())
        looking = asyncio.create_task(self._keep_looking())
        tasks = [delivering, feeding, looking]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if feeding.done() and feeding.exception() is None:
                self._delivery.finish()
                await asyncio.wait([delivering, looking], return_when=asyncio.FIRST_COMPLETED)
            if not delivering.done():
                self._delivery.finish(calls_only=True)
                await asyncio.wait([delivering], timeout=self._drain_seconds)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in tasks:
            if not task.cancelled():
                task.result()

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(self._watch.every_seconds)
            await self._watch.look()

    async def _feed(self) -> None:
        """Hand over until all is handed over, or `stop` is called."""
        try:
            async for changes in self._kept.read(self._span.after, self._span.upto):
                for begin in range(0, len(changes), HANDED_CHANGES):
                    await self._hand(changes[begin : begin + HANDED_CHANGES])
                    if self._is_stopped:
                        return
        except JournalTrimmed:
            raise HistoryMissing(
                f"what stands behind {self._fed} was removed from the journal while it was read",
                hint="the journal is too small for what is written meanwhile: raise max_bytes or"
                " max_age_seconds under [journal]",
            ) from None
        self._close(self._fed)
        self._delivery.hand([])
        self._fed = self._span.upto

    async def _hand(self, changes: Sequence[Change]) -> None:
        handed: list[Handed] = []
        for change in changes:
            routed = await self._routing.route(change)
            if routed:
                ticket = self._ticket(change)
                self._acknowledger.hand(ticket, len(routed))
                size = memory_bytes(change)
                handed += [(route, seen, ticket, size) for route, seen in routed]
            self._fed = Position.of(change)
            if not self._whole_transactions:
                self._close(self._fed)
        self.changes += len(changes)
        self._delivery.hand(handed)  # first: what waits for it may be what makes room
        await asyncio.sleep(0)
        while self._delivery.is_full and not self._is_stopped:
            await self._delivery.wait_for_change()

    def _ticket(self, change: Change) -> Ticket:
        transaction = change.transaction
        last = self._sent[-1] if self._sent else None
        if last is not None and not last.ticket.closed:
            if last.transaction.end_lsn == transaction.end_lsn:
                return last.ticket
            self._close(Position.after(last.transaction.end_lsn))
        ticket = self._acknowledger.open(transaction.end_lsn)
        ticket.transaction = transaction
        self._sent.append(_Sent(ticket, transaction))
        return ticket

    def _close(self, position: Position) -> None:
        """Nothing more belongs to what was sent last; it ends at a position."""
        if self._sent and not self._sent[-1].ticket.closed:
            self._sent[-1].position = position
            self._acknowledger.close(self._sent[-1].ticket)
