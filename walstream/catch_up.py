"""Handlers that are attached with history (``since=``) get it before the stream begins.

It is delivered from the journal up to the slot's position, and what stands behind that comes by the
stream: nothing is missing in between, and nothing comes twice. The journal notes how far a handler
is. One that was interrupted goes on from there; one that has all never begins again.

Meanwhile nothing is streamed to anybody: the slot is ours, and retains what is written. So it costs
the others as much time as the handler takes, once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from datetime import UTC, datetime

import structlog

from walstream.catalog import Catalog
from walstream.coverage import disguised, uncovered
from walstream.delivery import Delivery
from walstream.destinations import since_of
from walstream.errors import ConfigError, HistoryMissing, SinkFailed, Unavailable
from walstream.journal import Attachment, Journal
from walstream.moments import FROM_BEGINNING
from walstream.playback import Playback, Routing, Span, Watch, position_of
from walstream.positions import BEGINNING, Position
from walstream.router import Route, Router

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.catch_up")


def with_history(routes: Sequence[Route]) -> list[Route]:
    """List the routes to handlers that are attached with history."""
    return [route for route in routes if since_of(route.destination) is not None]


def verify_attached(
    routes: Sequence[Route], live_routes: Sequence[Route], *, has_journal: bool
) -> None:
    """Refuse handlers with history where there is none, or not all of it.

    Args:
        routes: all.
        live_routes: those to the live sink: what they keep is in the journal.
        has_journal: whether there is one.

    Raises:
        ConfigError: with what is missing.
    """
    attached = with_history(routes)
    problems = [
        problem
        for route in attached
        for problem in _problems(route, live_routes, has_journal=has_journal)
    ]
    if problems:
        raise ConfigError(problems, hint="docs/handlers.md, under: With what was before")


def _problems(route: Route, live_routes: Sequence[Route], *, has_journal: bool) -> list[str]:
    name = f"{route.name}: since"
    if not has_journal:
        return [f"{name} needs a journal: set path under [journal]"]
    if not live_routes:
        routed = f"a [[routes]] to it that keeps what the handler wants of {route.pattern}"
        return [f'{name} needs a sink of type "live", and {routed}']
    problems = []
    if operations := uncovered(route, live_routes):
        problems.append(
            f"{name} needs a [[routes]] to the live sink that keeps all that the handler wants;"
            f" of {route.pattern} none keeps each {', '.join(operations)}: widen its table,"
            " operations or where"
        )
    if columns := disguised(route, live_routes):
        problems.append(
            f"{name}: the filter of the handler reads {', '.join(map(repr, columns))}, and a route"
            " to the live sink masks that or leaves it out"
        )
    return problems


class CatchUp:
    """Delivers to handlers with history what they have not got of it."""

    def __init__(  # noqa: PLR0913 - what the daemon has
        self,
        journal: Journal,
        stream: str,
        routes: Sequence[Route],
        catalog: Catalog,
        delivery: Delivery,
        *,
        router: Router,
        drain_seconds: float,
        accept_gap: bool,
    ) -> None:
        """Begin nothing yet.

        Args:
            journal: open.
            stream: stands for slot and cluster, of which its positions are.
            routes: of the handlers with history.
            catalog: asked for values of filters that only a server can read.
            delivery: the way to the handlers; nothing else uses it meanwhile.
            router: that of the stream; it counts what is delivered here, too.
            drain_seconds: how long a stop waits for what is being delivered.
            accept_gap: begin where the journal does when it does not go back far enough.
        """
        self._journal = journal
        self._stream = stream
        self._routes = routes
        self._catalog = catalog
        self._delivery = delivery
        self._router = router
        self._drain_seconds = drain_seconds
        self._accept_gap = accept_gap
        self._playback: Playback | None = None
        self._is_stopped = False
        self.handler = ""
        """Whose turn it is."""

    async def run(self, upto: Position, watch: Watch) -> bool:
        """Deliver to one handler after another; return whether all have got everything.

        Args:
            upto: what stands behind it comes by the stream.
            watch: what is done meanwhile; what it raises ends this.

        Raises:
            HistoryMissing: the journal does not go back to where a handler is to begin.
            Unavailable: the journal cannot be written to now.
            WalstreamError: a handler did not take a change, or what the watch raised.
        """
        try:
            for route in self._routes:
                if self._is_stopped or not await self._catch_up(route, upto, watch):
                    return False
        except SinkFailed as failure:  # the journal's: of handlers it is HandlerFailed
            raise Unavailable(failure.message, hint=failure.hint) from failure
        return True

    def stop(self) -> None:
        """Finish what is being delivered, and let `run` return."""
        self._is_stopped = True
        if self._playback is not None:
            self._playback.stop()

    async def _catch_up(self, route: Route, upto: Position, watch: Watch) -> bool:
        """Deliver to one handler what it has not got; return whether it has got everything."""
        after = await self._begin(route)
        if after is None:
            return True
        log.info("catching_up", handler=route.name, after=str(after), upto=str(upto))
        self.handler = route.name
        began_at, noted = time.monotonic(), after
        routing = Routing([route], self._catalog, Router([]))

        async def look_and_note() -> None:
            nonlocal noted
            if playback.position != noted:
                noted = playback.position
                await self._note(route, Attachment(noted, is_done=False))
            await watch.look()

        playback = self._playback = Playback(
            self._journal,
            Span(after, max(after, upto)),
            routing,
            self._delivery,
            drain_seconds=self._drain_seconds,
            watch=Watch(look_and_note, watch.every_seconds),
        )
        try:
            await playback.run()
        finally:
            self._playback = None
            self._router.adopt_counts(routing.router)
            if not _is_cancelled():  # else this process is given up
                is_done = playback.is_done
                await self._note(route, Attachment(playback.position, is_done=is_done))
        position = str(playback.position)
        if not playback.is_done:
            log.info("catch_up_interrupted", handler=route.name, position=position)
            return False
        log.info(
            "caught_up",
            handler=route.name,
            position=position,
            changes=playback.changes,
            kept=routing.router.counts[0].matched,
            seconds=round(time.monotonic() - began_at, 1),
        )
        return True

    async def _begin(self, route: Route) -> Position | None:
        """Return behind what the handler's history begins; None when it has got everything."""
        begins = self._journal.begins
        known = await self._journal.attachment(self._stream, route.name)
        if known is not None and known.is_done:
            return None
        after: Position | None
        since = since_of(route.destination)
        assert since is not None  # noqa: S101 - see with_history
        if known is None:
            after = await position_of(since, self._journal, begins, datetime.now(UTC))
        else:
            after = known.position if known.position >= begins else None
        if after is None:
            after = self._accept(route, known)
        if known is None:
            await self._note(route, Attachment(after, is_done=False))
        return after

    def _accept(self, route: Route, known: Attachment | None) -> Position:
        """Begin where the journal does, if that was said to be right."""
        begins = self._journal.begins
        wanted = "what its handler is to get first" if known is None else str(known.position)
        if not self._accept_gap and since_of(route.destination) != BEGINNING:
            oldest = self._journal.vitals().oldest_time
            at = "" if oldest is None else f", at what was committed {oldest:%Y-%m-%d %H:%M:%S}Z"
            raise HistoryMissing(
                f"{route.name}: the journal begins behind {begins}{at}, and does not go back to"
                f" {wanted}",
                hint=f'since="{FROM_BEGINNING}" takes what there is, and so does walstream run'
                " --accept-gap, once",
            )
        log.warning("history_gap", handler=route.name, begins=str(begins), wanted=wanted)
        return begins

    async def _note(self, route: Route, attachment: Attachment) -> None:
        await self._journal.attach(self._stream, route.name, attachment)


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and bool(task.cancelling())
