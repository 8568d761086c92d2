"""``walstream replay``: what is in the journal, delivered again to one handler or sink.

It goes through the same delivery as the stream: the route's filter and columns, attempts, batches,
lanes, and what is done with a change that fails. The journal is only read, and may be written by a
running walstream meanwhile; the slot is not touched.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime

import msgspec

from walstream.assembly import Assembly, Attached
from walstream.config import Config, RouteSpec
from walstream.coverage import disguised, uncovered
from walstream.destinations import Destination, Handler
from walstream.errors import ConfigError, HistoryMissing, SinkFailed, UsageError
from walstream.journal import JournalReader, State
from walstream.live.sink import LiveSink
from walstream.moments import FROM_BEGINNING, Moment
from walstream.outlets import OutletCounts
from walstream.playback import Playback, Routing, Span, Watch, position_of
from walstream.policy import OnFailure
from walstream.positions import BEGINNING, Position
from walstream.router import Route, RouteCounts, Router


class Wish(msgspec.Struct, frozen=True):
    """What is to be delivered again.

    Attributes:
        to: the name of a handler or a sink.
        since: the moment behind which it begins; ``asked`` is how that was said.
        until: the moment up to which it goes; None for what is there now.
        selection: changes that none of these keeps are passed over; without any all are meant.
        accept_gap: begin where the journal does when it does not go back so far.
        is_dry: count what would be delivered, and call nobody.
    """

    to: str
    since: Moment
    asked: str = FROM_BEGINNING
    until: Moment | None = None
    selection: tuple[RouteSpec, ...] = ()
    accept_gap: bool = False
    is_dry: bool = False


class HistoryReport(msgspec.Struct, frozen=True):
    """What became of it.

    Attributes:
        to: where it was delivered.
        begin: behind what it began.
        position: up to where all is taken; what is left stands behind it.
        is_done: whether nothing is left.
        changes: how many were read from the journal.
        kept: how many of them the routes to the destination kept, as often as they did.
        absent: how many they did not keep because a column of a filter is not carried.
        delivered: how many were taken. ``skipped``, ``dead_lettered`` and ``parked`` were not.
        retries: calls after the first.
        lacking: operations that no route to the live sink keeps all of: they are not, or not all,
            in the journal.
    """

    to: str
    begin: str
    position: str
    is_done: bool
    changes: int = 0
    kept: int = 0
    absent: int = 0
    delivered: int = 0
    skipped: int = 0
    dead_lettered: int = 0
    parked: int = 0
    retries: int = 0
    lacking: tuple[str, ...] = ()


class HistoryReplay:
    """Delivers what is in the journal again."""

    def __init__(self, config: Config, handlers: Sequence[Attached], wish: Wish) -> None:
        """Build everything that needs no connection.

        Args:
            config: with the journal, and the routes of the file.
            handlers: what was attached to the application.
            wish: what is to be done.

        Raises:
            UsageError: there is no such destination, or it cannot be delivered to again.
            ConfigError: there is no journal, or a route cannot be made.
        """
        if config.journal.path is None:
            raise ConfigError(
                ["journal.path: is needed: what is delivered again is read from the journal"],
                hint="docs/journal.md says how changes get there",
            )
        self._config = config
        self._wish = wish
        self._assembly = Assembly(config, handlers)
        self._routes = _routes_to(self._assembly, wish.to)
        self._selection = [
            spec.route("selection", None, config.masking.secret(), own_tables=config.own_tables())
            for spec in wish.selection
        ]
        self._verify_filters()
        self._reader = JournalReader(config.journal.path)
        self._parking = None
        if any(route.policy.on_failure is OnFailure.DEAD_LETTER for route in self._routes):
            self._parking = self._assembly.parking()
        self._delivery = self._assembly.delivery(self._parking)
        self._routing = Routing(self._routes, self._assembly.catalog, Router(self._selection))
        self._playback: Playback | None = None
        self._dry_changes = 0
        self._span = Span(BEGINNING, BEGINNING)
        self._is_stopped = False

    @property
    def is_busy(self) -> bool:
        """Whether a handler's function still runs although `run` has returned."""
        return self._delivery.is_busy

    def stop(self) -> None:
        """Finish what is being delivered, and let `run` return."""
        self._is_stopped = True
        if self._playback is not None:
            self._playback.stop()

    async def run(self) -> None:
        """Deliver.

        Raises:
            HistoryMissing: the journal does not go back far enough.
            SetupError: there is no journal, or it cannot be read.
            WalstreamError: the destination did not take a change; `report` tells how far it came.
        """
        async with AsyncExitStack() as opened:
            opened.callback(self._delivery.close)
            opened.push_async_callback(self._assembly.catalog.close)
            opened.push_async_callback(self._reader.close)
            await self._reader.open()
            self._span = await self._find_span(await self._reader.state())
            if self._wish.is_dry:
                await self._count()
                return
            await self._open_destinations(opened)
            self._playback = Playback(
                self._reader,
                self._span,
                self._routing,
                self._delivery,
                drain_seconds=self._config.stream.drain_seconds,
                watch=Watch(self._look),
            )
            if not self._is_stopped:
                await self._playback.run()

    def report(self) -> HistoryReport:
        """Say what became of it, so far."""
        playback, routed = self._playback, RouteCounts()
        for counts in self._routing.router.counts:
            routed.add(counts)
        position = self._span.after if playback is None else playback.position
        taken = self._delivery.counts.get(self._wish.to, OutletCounts())
        return HistoryReport(
            to=self._wish.to,
            begin=str(self._span.after),
            position=str(position),
            is_done=playback is not None and playback.is_done,
            changes=self._dry_changes if playback is None else playback.changes,
            kept=routed.matched,
            absent=routed.absent,
            delivered=taken.delivered,
            skipped=taken.skipped,
            dead_lettered=taken.dead_lettered,
            parked=taken.parked,
            retries=taken.retries,
            lacking=self._lacking(),
        )

    def _lacking(self) -> tuple[str, ...]:
        live_routes = self._assembly.live_routes()
        return tuple(sorted({name for one in self._routes for name in uncovered(one, live_routes)}))

    def _verify_filters(self) -> None:
        """Refuse filters that would be tested on what a mask has left."""
        live_routes = self._assembly.live_routes()
        for route in (*self._routes, *self._selection):
            if columns := disguised(route, live_routes):
                name = "--where" if route in self._selection else route.name
                raise UsageError(
                    f"{name}: the filter reads {', '.join(map(repr, columns))}, which a route to"
                    " the live sink masks or leaves out: what is in the journal cannot be tested",
                    hint="let the [[routes]] to the live sink pass the column on, for what comes"
                    " from now on",
                )

    async def _find_span(self, state: State) -> Span:
        wish, now = self._wish, datetime.now(UTC)
        after = await position_of(wish.since, self._reader, state.begins, now)
        if after is None:
            if not wish.accept_gap:
                raise await self._refused(state)
            after = state.begins
        upto: Position | None = state.position
        if wish.until is not None:
            upto = await position_of(wish.until, self._reader, state.begins, now)
        upto = min(upto or after, state.position)
        if any(_takes_transactions(route.destination) for route in self._routes):
            after, upto = (
                max(_before_transaction(after), state.begins),
                Position.after(upto.end_lsn),
            )
        return Span(after, max(after, upto))

    async def _refused(self, state: State) -> HistoryMissing:
        status = await self._reader.status()
        oldest = status.oldest_time
        what = "" if oldest is None else f", at what was committed {oldest:%Y-%m-%d %H:%M:%S}Z"
        return HistoryMissing(
            f"the journal does not go back to {self._wish.asked}: it begins behind"
            f" {state.begins}{what}",
            hint="--accept-gap begins there, and so does --from-beginning",
        )

    async def _count(self) -> None:
        async for changes in self._reader.read(*self._span):
            for change in changes:
                await self._routing.route(change)
            self._dry_changes += len(changes)
            if self._is_stopped:
                return

    async def _open_destinations(self, opened: AsyncExitStack) -> None:
        if self._parking is not None:
            opened.push_async_callback(self._parking.close)
            await self._parking.open()
        for destination in dict.fromkeys(route.destination for route in self._routes):
            if isinstance(destination, Handler):
                continue
            try:
                await destination.open()
            except SinkFailed as error:
                raise SinkFailed(
                    f"{error.message}; a daemon that runs has its sinks for itself", hint=error.hint
                ) from error
            opened.push_async_callback(destination.close)

    async def _look(self) -> None:
        self._delivery.watch(time.monotonic())


def _routes_to(assembly: Assembly, to: str) -> list[Route]:
    """Return the routes to a destination.

    Raises:
        UsageError: there are none, or they lead where nothing can be delivered again.
    """
    named: dict[bool, list[Route]] = {True: [], False: []}
    for route in assembly.router.routes:
        if route.destination.name == to:
            named[isinstance(route.destination, Handler)].append(route)
    handlers, sinks = named[True], named[False]
    if handlers and sinks:
        raise UsageError(
            f"--to: a handler and a sink are both called {to}",
            hint="give the handler another name (name= where it is attached)",
        )
    if not handlers and not sinks:
        names = dict.fromkeys(route.destination.name for route in assembly.router.routes)
        raise UsageError(
            f"--to: no route leads to a handler or sink called {to!r}",
            hint=f"there are {', '.join(names)}",
        )
    for route in (*handlers, *sinks):
        _verify_destination(route.destination)
    return handlers + sinks


def _verify_destination(destination: Destination) -> None:
    if isinstance(destination, LiveSink):
        raise UsageError(
            f"--to: {destination.name} is the live sink, which what is in the journal came from",
            hint="its clients ask for what they missed themselves (since, Last-Event-ID)",
        )
    if isinstance(destination, Handler) and destination.options.transactional is not None:
        raise UsageError(
            f"--to: {destination.name} is transactional: it has recorded how far it is, and what"
            " comes again does not reach it",
            hint="attach the function once more, under another name and without transactional=, for"
            " replays",
        )


def _takes_transactions(destination: Destination) -> bool:
    return isinstance(destination, Handler) and destination.options.transactions


def _before_transaction(position: Position) -> Position:
    """Return a position that no part of a transaction stands before, and not behind this one."""
    if position == Position.after(position.end_lsn):
        return position
    return Position(position.end_lsn, 0)
