"""The composition root: builds the path of a change, and keeps it going.

A session ends for a reason. What the reason means is decided in `recovery`; here it is carried out.
Whatever else a process does for its whole life is started and ended here too: the eye on the slot,
heartbeats, and the HTTP side.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
import structlog

from walstream.acknowledger import Acknowledger
from walstream.assembly import Assembly, Attached, needs_everything
from walstream.audience import Audience
from walstream.backoff import Backoff
from walstream.binding import Binding
from walstream.catch_up import CatchUp, verify_attached, with_history
from walstream.changes import Relation
from walstream.config import Config, RouteSpec
from walstream.decoder import Decoder
from walstream.delivery import Delivery
from walstream.destinations import Sink
from walstream.errors import (
    ChangeUnsendable,
    ConnectionLost,
    RetainedWalExceeded,
    RoutesChanged,
    ServerFailed,
    ServerShutdown,
    Unavailable,
    UsageError,
    WalstreamError,
)
from walstream.gateway import Gateway
from walstream.gateway.parts import Parts
from walstream.health import Lag, stalled, stuck_seconds
from walstream.heartbeat import Heartbeat
from walstream.live.hub import Hub
from walstream.loop_watch import watch_loop
from walstream.lsn import ZERO, Lsn
from walstream.outlets import Held
from walstream.parking import Parking
from walstream.playback import Watch
from walstream.positions import Position
from walstream.postgres import python_encoding
from walstream.preflight import verify_routes
from walstream.protocol import status_update
from walstream.pushdown import PushedDown
from walstream.recording import Recorder, RecordingBinding
from walstream.recovery import SERVER_FAILURES, Action, Decision, Pauses, decide
from walstream.reload import exchange_sinks, verify_reloadable
from walstream.replay import Replay
from walstream.router import Router
from walstream.slot_watch import SlotWatch
from walstream.source import Source, Started
from walstream.stream import (
    STATUS_INTERVAL_SECONDS,
    Counts,
    LostChanges,
    Session,
    first_failure,
    refuse_stuck,
)
from walstream.summary import DestinationSummary, RouteSummary, Summary
from walstream.vitals import LostCount, Phase, Vitals

if TYPE_CHECKING:
    from starlette.routing import BaseRoute

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.daemon")

PROBE_SECONDS: Final = 1.0
"""How often a server that shuts down is looked at: it may only have ended our connection."""


class Daemon:
    """Streams with one configuration, through lost connections and restarts of the server."""

    def __init__(  # noqa: PLR0913 - what a run is made of
        self,
        config: Config,
        handlers: Sequence[Attached] = (),
        *,
        sinks: Sequence[tuple[RouteSpec, Sink]] = (),
        temporary_slot: bool = False,
        reconnect: bool = True,
        until: str | None = None,
        recorder: Recorder | None = None,
        accept_gap: bool = False,
    ) -> None:
        """Build everything that needs no connection.

        Args:
            config: what to do.
            handlers: what was attached to the application.
            sinks: destinations besides those of the configuration.
            temporary_slot: stream from now on through a slot that ends with the connection.
            reconnect: whether to go on after what can be waited out.
            until: an LSN, or ``now``.
            recorder: writes down what comes.
            accept_gap: begin at the slot's position, whatever was confirmed before.

        Raises:
            UsageError: ``until`` is neither, or nothing is routed anywhere.
            ConfigError: a route cannot be made.
        """
        self._config = config
        self._handlers = handlers
        self._extra_sinks = sinks
        self._until_now = until == "now"
        self._until = None if until is None or self._until_now else _parse_until(until)
        self._is_temporary = temporary_slot
        self._reconnect = reconnect
        self._recorder = recorder
        self._assembly = Assembly(config, handlers, sinks=sinks)
        _verify_attached(config, self._assembly)
        self._accept_gap = accept_gap
        self._catching_up: CatchUp | None = None
        self._audience = Audience(self._assembly, accept_gap=accept_gap)
        self._catalog = self._assembly.catalog
        self._parking = self._assembly.parking()
        self._parts: Parts | None = None
        self._delivery = self._assembly.delivery(self._parking)
        self._lost = LostChanges(self._covers)
        self._source = Source(
            config,
            self._catalog,
            is_temporary=temporary_slot,
            accept_gap=accept_gap,
            on_notice=self._lost.notice,
        )
        self._slot_watch = SlotWatch(self._catalog, config.slot.name, config.retained_wal)
        self._heartbeat: Heartbeat | None = None
        if config.stream.heartbeat_seconds is not None:
            self._heartbeat = Heartbeat(
                self._catalog,
                config.slot.name,
                interval_seconds=config.stream.heartbeat_seconds,
            )
        self._acknowledger = Acknowledger(ZERO)
        self._counts = Counts()
        self._sessions = 0
        self._reconnects: Counter[str] = Counter()
        self._reloads: Counter[bool] = Counter()
        self._reloading = asyncio.Lock()
        self._session: Session | None = None
        self._started: Started | None = None
        self._attempt: asyncio.Task[None] | None = None
        self._stopped = asyncio.Event()
        self._failure: WalstreamError | None = None
        self._next: _Reload | None = None
        self._adopting: asyncio.Task[None] | None = None
        self._phase, self._phase_since, self._reason = Phase.CONNECTING, time.monotonic(), ""
        self._lag = Lag(time.time())
        self._letters: int | None = None
        self._sinks_are_open = False
        self._server_lsn = ZERO

    # What others ask and tell

    @property
    def router(self) -> Router:
        """The routes, with what they have counted."""
        return self._assembly.router

    def _covers(self, relation: Relation) -> bool:
        return self.router.covers(relation)

    def stop(self, because: WalstreamError | None = None) -> None:
        """Finish the transaction that is being delivered, confirm what is taken, and return.

        Args:
            because: raised by `run` then, when it is not a stop that was wished for.
        """
        self._failure = self._failure or because
        self._stopped.set()
        if self._session is not None:
            self._enter(Phase.STOPPING)
            self._session.stop()
        elif self._catching_up is not None:
            self._enter(Phase.STOPPING)
            self._catching_up.stop()
        else:
            self._source.abandon()  # still connecting: there is nothing to finish
            if self._attempt is not None:
                self._attempt.cancel()

    def crash(self) -> None:
        """End as a killed process would: nothing more is confirmed, `run` is cancelled.

        For tests that prove what comes again.
        """
        if self._session is not None:
            self._session.abort()
        if self._attempt is not None:
            self._attempt.cancel()

    async def reload(self, load: Callable[[], Config]) -> Config:
        """Go on with the routes, sinks and failure policies of another configuration.

        The stream is not left, unless the new routes need what the server was not asked for: then
        it begins anew at once, from where it was. Either everything is changed or nothing.

        Args:
            load: reads it.

        Returns:
            What holds now.

        Raises:
            WalstreamError: it cannot be used; all goes on as it was.
        """
        async with self._reloading:
            try:
                config = load()
                await self._reload(config)
            except WalstreamError:
                self._reloads[False] += 1
                raise
            self._reloads[True] += 1
            return config

    async def reopen_sinks(self) -> None:
        """Let sinks that want to open anew what they write to, as after logrotate."""
        for sink in self._assembly.sinks:
            reopen = getattr(sink, "reopen", None)
            if reopen is None:
                continue
            try:
                await reopen()
            except (OSError, WalstreamError) as error:  # the next change shows how it is
                log.warning(
                    "sink_not_reopened", sink=sink.name, error=self._delivery.describe(error)
                )

    @property
    def is_ready(self) -> bool:
        """Whether changes get through."""
        return self.vitals().is_ready

    @property
    def drain_seconds(self) -> float:
        """How long a stop may wait for what is being delivered."""
        return self._config.stream.drain_seconds

    @property
    def held(self) -> Held | None:
        """The handler's call that lasts longest, if there is one."""
        return self._delivery.held

    @property
    def flush_lsn(self) -> Lsn:
        """Up to where all is taken."""
        return self._acknowledger.flush_lsn

    @property
    def is_busy(self) -> bool:
        """Whether a handler's function still runs although `run` has returned."""
        return self._delivery.is_busy

    def hub(self) -> Hub | None:
        """Return what clients by HTTP read from, if a route leads there."""
        return self._audience.hub

    @property
    def parking(self) -> Parking | None:
        """Where dead letters are, when a route has them."""
        return self._parking

    def make_replay(self) -> Replay:
        """Make a replay of dead letters, under the configuration that holds now.

        Raises:
            WalstreamError: it cannot be made.
        """
        return Replay(self._config, self._handlers)

    def summary(self) -> Summary:
        """Say what has been done so far."""
        return Summary(
            transactions=self._counts.transactions,
            changes=self._counts.changes,
            delivered=self._delivery.delivered,
            retries=self._delivery.retries,
            sessions=self._sessions,
            lost=self._lost.counts.total(),
            flush_lsn=self._acknowledger.flush_lsn,
            routes=self._routes(),
            destinations=tuple(
                DestinationSummary(name=name, **msgspec.structs.asdict(counts))
                for name, counts in self._delivery.counts.items()
            ),
        )

    def vitals(self) -> Vitals:
        """Say how the process is at this moment."""
        now, session, delivery = time.monotonic(), self._session, self._delivery
        stalled_seconds, stalled_because = 0.0, ""
        if self._phase is Phase.STREAMING and session is not None:
            stalled_seconds, stalled_because = stalled(session, delivery, now)
        received_lsn = self.flush_lsn if session is None else session.received_lsn
        if session is not None:
            self._server_lsn = session.server_lsn
        stream, hub, beating = self._config.stream, self._audience.hub, self._heartbeat
        return Vitals(
            phase=self._phase,
            phase_seconds=now - self._phase_since,
            slot_name=self._config.slot.name,
            is_ready=self._phase is Phase.STREAMING
            and stalled_seconds < stream.stalled_after_seconds,
            is_alive=stuck_seconds(session, delivery, now) < stream.stuck_after_seconds,
            reason=self._reason,
            stalled_seconds=stalled_seconds,
            stalled_because=stalled_because,
            received_lsn=received_lsn,
            flush_lsn=self.flush_lsn,
            server_lsn=max(self._server_lsn, received_lsn),
            lag_bytes=self._lag_bytes(),
            lag_seconds=self._lag.seconds(
                self._acknowledger, time.time(), is_streaming=self._phase is Phase.STREAMING
            ),
            in_flight_changes=delivery.in_flight,
            in_flight_bytes=delivery.in_flight_bytes,
            in_flight_transactions=self._acknowledger.in_flight,
            transactions=self._counts.transactions,
            changes_received=self._counts.changes,
            messages=self._counts.messages,
            sessions=self._sessions,
            reconnects=dict(self._reconnects),
            reloads=self._reloads[True],
            reloads_refused=self._reloads[False],
            slot=self._slot_watch.vitals,
            changes=self.router.change_counts(),
            dead_letters=self._letters,
            lost=tuple(
                LostCount(table, operation, count)
                for (operation, table), count in self._lost.counts.items()
            ),
            routes=self._routes(),
            destinations=delivery.destinations(),
            heartbeat_seconds=None if beating is None else beating.last_round_trip_seconds,
            live=None if hub is None else hub.vitals(),
            realtime=None if self._parts is None else self._parts.realtime_vitals(),
            journal=None if hub is None else hub.history.vitals(),
        )

    def _routes(self) -> tuple[RouteSummary, ...]:
        return tuple(
            RouteSummary(route.name, counts.matched, counts.filtered, counts.absent)
            for route, counts in self.router.counted()
        )

    def _lag_bytes(self) -> int:
        """Return how far the slot is behind, from the server's words when nothing streams here."""
        slot = self._slot_watch.vitals
        if self._session is None and slot is not None and slot.lag_bytes is not None:
            return slot.lag_bytes
        return max(0, self._server_lsn - self.flush_lsn)

    # The life of the process

    async def run(self) -> Summary:
        """Stream until `stop`, or until the wished position is acknowledged.

        Raises:
            WalstreamError: what cannot be waited out.
        """
        async with AsyncExitStack() as opened:
            opened.push_async_callback(self._close)
            opened.enter_context(
                watch_loop(asyncio.get_running_loop(), self._config.stream.stuck_after_seconds)
            )
            if self._config.http.listen is not None:
                await self._open_gateway(opened)
            if self._parking is not None:
                await self._parking.open()
            await self._source.prepare()
            await self._stream_in_company()
        self._enter(Phase.STOPPED)
        if self._failure is not None:
            raise self._failure
        return self.summary()

    async def _open_gateway(self, opened: AsyncExitStack) -> None:
        parts = self._parts = Parts.of(
            self._config,
            vitals=self.vitals,
            hub=self.hub,
            letters=lambda: self._parking,
            make_replay=self.make_replay,
        )
        opened.push_async_callback(parts.close, self.drain_seconds)

        def make_paths() -> Sequence[BaseRoute]:
            from walstream.gateway.paths import make_paths  # noqa: PLC0415 - needs the extra

            return make_paths(parts)

        gateway = Gateway.open(
            self._config.http, self.vitals, make_paths, max_body_bytes=parts.max_body_bytes
        )
        await opened.enter_async_context(gateway)

    async def _close(self) -> None:
        """Let go of everything that the process has opened, in the order in which it is used."""
        self._refuse_next()
        if self._adopting is not None:
            await asyncio.wait([self._adopting], timeout=self.drain_seconds)
            self._adopting.cancel()
        async with AsyncExitStack() as opened:
            opened.callback(self._delivery.close)
            opened.push_async_callback(self._catalog.close)
            for target in self._assembly.targets.values():
                opened.push_async_callback(target.close)
            if self._parking is not None:
                opened.push_async_callback(self._parking.close)
            opened.push_async_callback(self._close_sinks)

    async def _stream_in_company(self) -> None:
        """Stream, beside what else a process does for as long as it streams."""
        try:
            async with asyncio.TaskGroup() as group:
                companions = [group.create_task(one) for one in self._companions()]
                await self._keep_streaming()
                for task in companions:
                    task.cancel()
        except ExceptionGroup as failures:
            first = first_failure(failures)
            raise first from first.__cause__

    def _companions(self) -> list[Coroutine[Any, Any, None]]:
        companions = [self._count_letters()]
        if not self._is_temporary:
            companions.append(self._watch_slot())
        return companions

    async def _watch_slot(self) -> None:
        try:
            await self._slot_watch.run()
        except RetainedWalExceeded as exceeded:
            self.stop(because=exceeded)

    async def _count_letters(self) -> None:
        while True:
            if self._parking is not None:
                with contextlib.suppress(WalstreamError):  # delivery tells when it needs the store
                    self._letters = await self._parking.count()
            await asyncio.sleep(COUNT_SECONDS)

    async def _keep_streaming(self) -> None:
        failures = 0
        while not self._stopped.is_set():
            before = self.flush_lsn
            await self._adopt_next()
            if self._stopped.is_set():
                break
            try:
                await self._attempt_stream()
            except WalstreamError as reason:
                failures = failures + 1 if self.flush_lsn == before else 1
                decision = decide(reason, failures, self._pauses())
                if decision.action is Action.STOP or not self._reconnect:
                    raise _at_position(reason, failures, self.flush_lsn) from reason.__cause__
                await self._wait_out(reason, decision)
            else:
                break
        if isinstance(self._failure, RetainedWalExceeded) and self._failure.drop:
            await self._slot_watch.drop()

    def _pauses(self) -> Pauses:
        stream = self._config.stream
        return Pauses(
            Backoff(stream.reconnect_seconds, stream.max_reconnect_seconds),
            stream.after_shutdown_seconds,
            stream.standby_poll_seconds,
        )

    async def _wait_out(self, reason: WalstreamError, decision: Decision) -> None:
        """Pause before the next attempt, or until `stop`."""
        if decision.action is Action.STAND_BY:
            if (self._phase, self._reason) != (Phase.STANDING_BY, reason.message):
                log.info(
                    "standing_by",
                    error=reason.message,
                    then=decision.sentence,
                    hint="" if self._config.slot.shared else _SHARED,
                )
                self._reconnects[type(reason).__name__] += 1
            await self._close_sinks()
            self._enter(Phase.STANDING_BY, reason.message)
            await self._pause(decision.pause_seconds)
            return
        self._reconnects[type(reason).__name__] += 1
        log.warning(
            "reconnecting",
            reason=type(reason).__name__,
            error=reason.message,
            hint=reason.hint,
            then=decision.sentence,
            pause_seconds=round(decision.pause_seconds, 2),
        )
        self._enter(Phase.WAITING, reason.message)
        if decision.action is Action.LEAVE_ALONE:
            await self._leave_alone(decision.pause_seconds)
        else:
            await self._pause(decision.pause_seconds)

    async def _leave_alone(self, seconds: float) -> None:
        """Pause, unless the server answers as if nothing were: it only ended our connection."""
        deadline = time.monotonic() + seconds
        while (rest := deadline - time.monotonic()) > 0 and not self._stopped.is_set():
            await self._pause(min(PROBE_SECONDS, rest))
            probing = asyncio.create_task(self._catalog.probe())
            await self._finished(probing)
            probing.cancel()
            if probing.done() and not probing.cancelled() and probing.exception() is None:
                return

    async def _finished(self, task: asyncio.Task[None]) -> None:
        """Wait for a task to end, or for `stop`."""
        stopped = asyncio.create_task(self._stopped.wait())
        try:
            await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stopped.wait()
        except TimeoutError:
            pass

    def _enter(self, phase: Phase, reason: str = "") -> None:
        if phase is not self._phase:
            self._phase_since = time.monotonic()
        self._phase, self._reason = phase, reason

    # One session

    async def _attempt_stream(self) -> None:
        """Stream through one connection, or return when `stop` comes before it streams."""
        sessions = self._sessions
        if self._phase is not Phase.STANDING_BY:
            self._enter(Phase.CONNECTING, self._reason)
        self._attempt = asyncio.create_task(self._stream())
        try:
            await self._attempt
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._stopped.is_set() or (task is not None and task.cancelling()):
                raise
        except Unavailable:
            if not self._stopped.is_set() or self._sessions > sessions:
                raise
        finally:
            self._attempt = None

    async def _stream(self) -> None:
        """Stream through one connection."""
        everything = needs_everything(self.router)
        async with self._source.streaming(
            self.router, everything=everything, on_free=self._open_sinks
        ) as started:
            if self._until_now and self._until is None:
                self._until = started.server.flush_lsn
            await self._open_targets(started)
            await self._audience.begin(started.identity, started.confirmed)
            if not await self._catch_up_handlers(started):
                return
            self._acknowledger = Acknowledger(started.confirmed)
            self._delivery.attach(self._acknowledger)
            session = self._new_session(started)
            self._sessions += 1
            log.info(
                "streaming",
                slot=self._config.slot.name,
                confirmed_flush_lsn=str(started.confirmed),
                routes=len(self._assembly.routes),
            )
            self._session, self._started = session, started
            self._enter(Phase.STREAMING)
            if self._next is not None:  # reloaded while it was being connected
                session.stop(because=RoutesChanged("the routes are reloaded: streaming anew"))
            try:
                await self._run_session(session)
            finally:
                self._session = self._started = None
                log.info("stream_ended", flush_lsn=str(self.flush_lsn))

    async def _run_session(self, session: Session) -> None:
        if self._heartbeat is None:
            await session.run()
            return
        beating = asyncio.create_task(self._heartbeat.run())
        try:
            await session.run()
        finally:
            beating.cancel()

    async def _open_sinks(self) -> None:
        """Open them once the slot is free: a process that stands by leaves files to the other."""
        if not self._sinks_are_open:
            await exchange_sinks([], self._assembly.sinks)
            self._sinks_are_open = True

    async def _close_sinks(self) -> None:
        if self._sinks_are_open:
            self._sinks_are_open = False
            async with AsyncExitStack() as opened:
                for sink in self._assembly.sinks:
                    opened.push_async_callback(sink.close)

    async def _open_targets(self, started: Started) -> None:
        for target in self._assembly.targets.values():
            # Asked now that the slot is ours: whoever had it before records nothing any more.
            flush_lsn = (await self._catalog.server()).flush_lsn
            await target.open(
                systemid=started.identity.systemid,
                flush_lsn=flush_lsn,
                timeline=started.identity.timeline,
                history=started.history,
            )

    async def _catch_up_handlers(self, started: Started) -> bool:
        """Give handlers with history what they have not got; False when stopped before the end."""
        routes, journal = with_history(self.router.routes), self._audience.journal
        if not routes or journal is None:
            return True
        slot = self._config.slot.name
        self._catching_up = CatchUp(
            journal,
            f"{started.identity.systemid}/{slot}",
            routes,
            self._catalog,
            self._delivery,
            router=self.router,
            drain_seconds=self.drain_seconds,
            accept_gap=self._accept_gap,
        )
        try:
            interval = _status_interval(started.wal_sender_timeout_seconds)
            watch = Watch(partial(self._keep_slot, started), min(interval, 1.0))
            return await self._catching_up.run(Position.after(started.confirmed), watch)
        finally:
            self._catching_up = None

    async def _keep_slot(self, started: Started) -> None:
        """Show the server that we are alive, although nothing is streamed yet.

        Raises:
            WalstreamError: the connection is lost, the server shuts down, or a handler is stuck.
        """
        if self._catching_up is not None:
            self._enter(self._phase, f"{self._catching_up.handler} gets what was before")
        started.connection.send(status_update(started.confirmed, now=time.time()))
        now = time.monotonic()
        self._delivery.watch(now)
        refuse_stuck(self._delivery.held, now, self._config.stream.release_after_seconds)
        try:
            await self._catalog.probe()
        except ServerShutdown:
            raise
        except WalstreamError as error:
            log.debug("probe_failed", error=error.message)  # the connection shows how it is

    async def _record(self, flush_lsn: Lsn) -> None:
        """Note, before it is confirmed, that all up to a position is taken."""
        await self._audience.cover(flush_lsn)
        await self._source.record(flush_lsn)

    def _new_session(self, started: Started) -> Session:
        stream = self._config.stream
        return Session(
            started.connection,
            self._catalog,
            self._binding(started, self.router),
            self._delivery,
            self._acknowledger,
            self._counts,
            check_routes=partial(self._check_routes, started),
            record=self._record,
            on_message=None if self._heartbeat is None else self._heartbeat.received,
            drain_seconds=stream.drain_seconds,
            release_after_seconds=stream.release_after_seconds,
            receive_timeout_seconds=stream.receive_timeout_seconds,
            status_interval_seconds=_status_interval(started.wal_sender_timeout_seconds),
            until=self._until,
        )

    def _binding(self, started: Started, router: Router) -> Binding:
        decoder = Decoder(encoding=python_encoding(started.server.encoding))
        follow = started.pushed_down.follow_partitions
        if self._recorder is None:
            return Binding(self._catalog, decoder, router, follow_partitions=follow)
        return RecordingBinding(
            self._catalog,
            decoder,
            router,
            follow_partitions=follow,
            recorder=self._recorder,
        )

    async def _check_routes(self, started: Started) -> None:
        """End the session when a routed table has become a partitioned one.

        The server was asked for the table alone and does not send its partitions.
        """
        try:
            now = await self._pushed_down(self.router)
            await self._source.note_missing(self.router)
        except WalstreamError:
            return  # asked again soon; the stream itself shows how the server is
        if not started.pushed_down.includes(now):
            log.error(
                "routed_table_partitioned",
                since=str(self.flush_lsn),
                hint="a routed table was replaced by a partitioned one while streaming: changes of"
                " its partitions in the last seconds may be missing",
            )
            raise ConnectionLost("a routed table has become a partitioned one: streaming anew")

    async def _pushed_down(self, router: Router) -> PushedDown:
        return await self._source.push_down(router, everything=needs_everything(router))

    # Other routes

    async def _reload(self, config: Config) -> None:
        if self._stopped.is_set() or self._phase is Phase.STOPPED:
            raise Unavailable(_ENDS)
        verify_reloadable(self._config, config)
        assembly = Assembly(config, self._handlers, sinks=self._extra_sinks, before=self._assembly)
        _verify_attached(config, assembly)
        await verify_routes(self._catalog, assembly.router.routes)
        pushed_down = await self._pushed_down(assembly.router)
        # From here on nothing refuses it but sinks that cannot be opened.
        adopted = asyncio.get_running_loop().create_future()
        self._next = _Reload(config, assembly, adopted)
        session, started = self._session, self._started
        if session is not None and started is not None:
            why = "the reloaded routes need other tables: streaming anew"
            if started.pushed_down == pushed_down:
                session.exchange(partial(self._exchange, started))
                await asyncio.wait([adopted], timeout=self._config.stream.drain_seconds)
                why = "the routes are reloaded, and what is in hand does not end: streaming anew"
            if not adopted.done():
                session.stop(because=RoutesChanged(why))
        await adopted

    async def _exchange(self, started: Started) -> tuple[Binding, Delivery]:
        """Make what the session goes on with: what it had, when the new sinks cannot be opened."""
        await self._adopt_next()
        self._delivery.attach(self._acknowledger)
        return self._binding(started, self.router), self._delivery

    async def _adopt_next(self) -> None:
        """Take over what was made for a reload, if there is something.

        It is done to its end, also when the session that waits for it is cancelled: half of the
        sinks exchanged would be neither the old configuration nor the new one.
        """
        if self._next is not None and self._adopting is None:
            reload, self._next = self._next, None
            self._adopting = asyncio.create_task(self._adopt_or_refuse(reload))
        if self._adopting is not None:
            await self._finished(self._adopting)
            if self._adopting.done():
                self._adopting.result()
                self._adopting = None

    async def _adopt_or_refuse(self, reload: _Reload) -> None:
        try:
            await self._adopt(reload.assembly)
        except WalstreamError as error:
            if not reload.adopted.done():
                reload.adopted.set_exception(error)
        else:
            self._config = reload.config
            self._slot_watch.policy = reload.config.retained_wal
            if not reload.adopted.done():
                reload.adopted.set_result(None)
        finally:
            reload.adopted.cancel()  # where it is not resolved, a bug is on its way up

    def _refuse_next(self) -> None:
        """Tell who waits for a reload that the stream has ended before it."""
        reload, self._next = self._next, None
        if reload is not None and not reload.adopted.done():
            reload.adopted.set_exception(Unavailable(_ENDS))

    async def _adopt(self, new: Assembly) -> None:
        """Take over other routes and sinks.

        Raises:
            WalstreamError: a sink cannot be opened; all is as it was.
        """
        async with AsyncExitStack() as opened:
            parking = self._parking or new.parking()
            if parking is not None and self._parking is None:
                await parking.open()
                opened.push_async_callback(parking.close)
            if self._sinks_are_open:
                await exchange_sinks(self._assembly.sinks, new.sinks)
            opened.pop_all()  # it is used from here on
        new.router.adopt_counts(self.router)
        delivery = new.delivery(parking)
        delivery.adopt(self._delivery)
        self._delivery.close()
        self._assembly, self._parking, self._delivery = new, parking, delivery
        session = self._session
        try:
            await self._audience.reload(new, None if session is None else self.flush_lsn)
        except Unavailable as reason:  # the next session tries it again
            if session is not None:
                session.stop(because=reason)


class _Reload(NamedTuple):
    """What a reload has made, and where it is told how it went."""

    config: Config
    assembly: Assembly
    adopted: asyncio.Future[None]


COUNT_SECONDS: Final = 10.0
"""How often the dead letters are counted."""


_ENDS: Final = "the stream ends, nothing was reloaded"

_SHARED: Final = (
    "two processes of one service both need shared = true under [slot], or the one that is started"
    " after the other has streamed takes that for a gap"
)


def _verify_attached(config: Config, assembly: Assembly) -> None:
    verify_attached(
        assembly.router.routes,
        assembly.live_routes(),
        has_journal=config.journal.path is not None,
    )


def _at_position(reason: WalstreamError, failures: int, flush_lsn: Lsn) -> WalstreamError:
    """Say of a failure of the server that it comes again and again, and how to get past it."""
    if not isinstance(reason, ServerFailed) or failures < SERVER_FAILURES:
        return reason
    return ChangeUnsendable(
        f"{reason.message}; so the stream ended {failures} times in a row, each time after"
        f" {flush_lsn}",
        hint="what follows that position cannot be sent, such as a row that is too large for"
        " wal2json: route other tables by name, so that this one is not asked for; or give the"
        ' transaction up, as docs/operations.md says under "a row too large"',
    )


def _parse_until(text: str) -> Lsn:
    try:
        return Lsn.parse(text)
    except ValueError as error:
        message = f"until: {error}"
        raise UsageError(message, hint="give an LSN, or now") from None


def _status_interval(wal_sender_timeout_seconds: float) -> float:
    """Often enough that two lost status updates do not cost the connection."""
    if wal_sender_timeout_seconds == 0:
        return STATUS_INTERVAL_SECONDS
    return min(wal_sender_timeout_seconds / 3, STATUS_INTERVAL_SECONDS)
