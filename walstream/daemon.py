"""The composition root: builds the path of a change, and keeps it going.

A session ends for a reason. Here, and only here, it is decided what the reason means: an
`Unavailable` is waited out, everything else goes up to the caller.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial

import msgspec
import structlog

from walstream.acknowledger import Acknowledger
from walstream.assembly import Assembly, needs_everything
from walstream.backoff import Backoff
from walstream.binding import Binding
from walstream.catalog import Server
from walstream.config import Config, MessageSpec, RouteSpec
from walstream.connection import ReplicationConnection, SystemIdentity
from walstream.decoder import START_OPTIONS, Decoder
from walstream.destinations import Handler, Sink
from walstream.errors import (
    ConnectionLost,
    PluginTooOld,
    ServerShutdown,
    SlotLost,
    SlotMissing,
    Unavailable,
    UsageError,
    WalstreamError,
)
from walstream.lsn import ZERO, Lsn
from walstream.outlets import Held
from walstream.postgres import python_encoding
from walstream.preflight import verify_routes, verify_server
from walstream.pushdown import PushedDown, push_down
from walstream.recording import Recorder, RecordingBinding
from walstream.slots import create_slot, usable_slot
from walstream.stream import STATUS_INTERVAL_SECONDS, Counts, LostChanges, Session

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.daemon")


class RouteSummary(msgspec.Struct, frozen=True):
    """What became of one route's changes."""

    name: str
    matched: int
    filtered: int
    absent: int


class DestinationSummary(msgspec.Struct, frozen=True):
    """What became of the changes that were handed to one handler or sink.

    ``delivered`` were taken, ``skipped`` given up, ``dead_lettered`` and ``parked`` are in the
    dead-letter store, ``redelivered`` were recognised as done before by a transactional handler.
    """

    name: str
    delivered: int
    retries: int
    skipped: int
    dead_lettered: int
    parked: int
    redelivered: int


class Summary(msgspec.Struct, frozen=True):
    """What a run has done."""

    transactions: int
    changes: int
    delivered: int
    retries: int
    sessions: int
    lost: int
    flush_lsn: Lsn
    routes: tuple[RouteSummary, ...]
    destinations: tuple[DestinationSummary, ...]


class Daemon:
    """Streams with one configuration, through lost connections and restarts of the server."""

    def __init__(  # noqa: PLR0913 - what a run is made of
        self,
        config: Config,
        handlers: Sequence[tuple[RouteSpec | MessageSpec, Handler]] = (),
        *,
        sinks: Sequence[tuple[RouteSpec, Sink]] = (),
        temporary_slot: bool = False,
        reconnect: bool = True,
        until: str | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """Build everything that needs no connection.

        Args:
            config: what to do.
            handlers: what was attached to the application.
            sinks: destinations besides those of the configuration.
            temporary_slot: stream from now on through a slot that ends with the connection.
            reconnect: whether to wait out what is `Unavailable`.
            until: an LSN, or ``now``.
            recorder: writes down what comes.

        Raises:
            UsageError: ``until`` is neither, or nothing is routed anywhere.
            ConfigError: a route cannot be made.
        """
        self._config = config
        self._until_now = until == "now"
        self._until = None if until is None or self._until_now else _parse_until(until)
        self._temporary_slot = temporary_slot
        self._reconnect = reconnect
        self._recorder = recorder
        assembly = Assembly(config, handlers, sinks=sinks)
        self._sinks = assembly.sinks
        self.router = assembly.router
        self._catalog = assembly.catalog
        self._targets = assembly.targets
        self._parking = assembly.parking()
        self._delivery = assembly.delivery(self._parking)
        self._lost = LostChanges(self.router.covers)
        self._acknowledger = Acknowledger(ZERO)
        self._counts = Counts()
        self._sessions = 0
        self._session: Session | None = None
        self._stopped = asyncio.Event()
        self._numbers_as_strings = True
        self._systemid: str | None = None
        self._attempt: asyncio.Task[None] | None = None

    def stop(self) -> None:
        """Finish the transaction that is being delivered, confirm what is taken, and return."""
        self._stopped.set()
        if self._session is not None:
            self._session.stop()
        elif self._attempt is not None:
            self._attempt.cancel()  # still connecting: there is nothing to finish

    def crash(self) -> None:
        """End as a killed process would: nothing more is confirmed, `run` is cancelled.

        For tests that prove what comes again.
        """
        if self._session is not None:
            self._session.abort()
        if self._attempt is not None:
            self._attempt.cancel()

    @property
    def is_ready(self) -> bool:
        """Whether it streams, and no handler is stuck."""
        return self._session is not None and not self._delivery.is_stuck

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
            routes=tuple(
                RouteSummary(route.name, counts.matched, counts.filtered, counts.absent)
                for route, counts in self.router.counted()
            ),
            destinations=tuple(
                DestinationSummary(name=name, **msgspec.structs.asdict(counts))
                for name, counts in self._delivery.counts.items()
            ),
        )

    async def run(self) -> Summary:
        """Stream until `stop`, or until the wished position is acknowledged.

        Raises:
            WalstreamError: what cannot be waited out.
        """
        async with AsyncExitStack() as opened:
            opened.callback(self._delivery.close)
            opened.push_async_callback(self._catalog.close)
            for target in self._targets.values():
                opened.push_async_callback(target.close)
            if self._parking is not None:
                opened.push_async_callback(self._parking.close)
                await self._parking.open()
            for sink in self._sinks:
                await sink.open()
                opened.push_async_callback(sink.close)
            await self._keep_streaming()
        return self.summary()

    async def _keep_streaming(self) -> None:
        failures = 0
        while not self._stopped.is_set():
            before = self._acknowledger.flush_lsn
            try:
                await self._attempt_stream()
            except Unavailable as reason:
                if not self._reconnect:
                    raise
                failures = failures + 1 if self._acknowledger.flush_lsn == before else 1
                await self._wait_out(reason, failures)
            else:
                return

    async def _attempt_stream(self) -> None:
        """Stream through one connection, or return when `stop` comes before it streams."""
        self._attempt = asyncio.create_task(self._stream())
        try:
            await self._attempt
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._stopped.is_set() or (task is not None and task.cancelling()):
                raise
        finally:
            self._attempt = None

    async def _wait_out(self, reason: Unavailable, failures: int) -> None:
        """Pause before the next attempt, longer each time, or until `stop`."""
        stream = self._config.stream
        backoff = Backoff(stream.reconnect_seconds, stream.max_reconnect_seconds)
        seconds = backoff.pause_seconds(failures)
        if isinstance(reason, ServerShutdown):
            seconds = stream.after_shutdown_seconds
        log.warning(
            "reconnecting",
            reason=type(reason).__name__,
            error=reason.message,
            hint=reason.hint,
            pause_seconds=round(seconds, 2),
        )
        try:
            async with asyncio.timeout(seconds):
                await self._stopped.wait()
        except TimeoutError:
            pass

    async def _stream(self) -> None:
        """Stream through one connection."""
        config = self._config
        server = await self._catalog.server()
        verify_server(server)
        await verify_routes(self._catalog, self.router.routes)
        if self._until_now and self._until is None:
            self._until = server.flush_lsn
        async with await ReplicationConnection.open(
            config.postgres.streaming_dsn(),
            application_name=config.postgres.application_name,
            on_notice=self._lost.notice,
        ) as connection:
            identity = await self._recognise(connection)
            history = await self._timeline_history(connection, identity.timeline)
            pushed_down = await self._pushed_down()
            await self._catalog.partitions_changed()
            confirmed = await self._start(connection, {**START_OPTIONS, **pushed_down.options})
            for target in self._targets.values():
                # Asked now that the slot is ours: whoever had it before records nothing any more.
                flush_lsn = (await self._catalog.server()).flush_lsn
                await target.open(
                    systemid=identity.systemid,
                    flush_lsn=flush_lsn,
                    timeline=identity.timeline,
                    history=history,
                )
            self._acknowledger = Acknowledger(confirmed)
            self._delivery.attach(self._acknowledger)
            binding = self._binding(server, pushed_down)
            self._sessions += 1
            log.info(
                "streaming",
                slot=config.slot.name,
                confirmed_flush_lsn=str(confirmed),
                routes=len(self.router.routes) + len(self.router.message_routes),
            )
            self._session = Session(
                connection,
                self._catalog,
                binding,
                self._delivery,
                self._acknowledger,
                self._counts,
                check_routes=partial(self._check_pushed_down, pushed_down),
                drain_seconds=config.stream.drain_seconds,
                release_after_seconds=config.stream.release_after_seconds,
                status_interval_seconds=_status_interval(server.wal_sender_timeout_seconds),
                until=self._until,
            )
            try:
                await self._session.run()
            finally:
                self._session = None
                log.info("stream_ended", flush_lsn=str(self._acknowledger.flush_lsn))

    def _binding(self, server: Server, pushed_down: PushedDown) -> Binding:
        decoder = Decoder(encoding=python_encoding(server.encoding))
        follow = pushed_down.follow_partitions
        if self._recorder is None:
            return Binding(self._catalog, decoder, self.router, follow_partitions=follow)
        return RecordingBinding(
            self._catalog,
            decoder,
            self.router,
            follow_partitions=follow,
            recorder=self._recorder,
        )

    async def _slot(self, connection: ReplicationConnection) -> Lsn:
        """Find the slot, or create it when that is wished; return its position."""
        name = self._config.slot.name
        if self._temporary_slot:
            created = await create_slot(connection, self._catalog, name, temporary=True)
            return created.consistent_point
        try:
            status = await usable_slot(self._catalog, name)
        except SlotMissing:
            if self._sessions:
                message = f"the slot {name} was there and is gone: changes since then are missing"
                raise SlotLost(
                    message,
                    hint="somebody dropped it, or this is another server after a failover; create"
                    " it again, and bring what is missing over by other means",
                ) from None
            if not self._config.slot.create:
                raise
            return (await create_slot(connection, self._catalog, name)).consistent_point
        confirmed = status.confirmed_flush_lsn or ZERO
        if self._sessions and confirmed > self._acknowledger.flush_lsn:
            log.warning(
                "slot_moved",
                slot=name,
                flush_lsn=str(self._acknowledger.flush_lsn),
                confirmed_flush_lsn=str(confirmed),
                hint="another process has streamed from it, or advanced it, in between",
            )
        return confirmed

    async def _recognise(self, connection: ReplicationConnection) -> SystemIdentity:
        """Ask which cluster it is; refuse another one than that which was begun with."""
        identity = await connection.identify_system()
        systemid = identity.systemid
        if self._systemid not in {None, systemid}:
            message = (
                f"the server is the cluster {systemid}, and was {self._systemid} before: its slot"
                " knows nothing of what was confirmed"
            )
            raise SlotLost(message, hint="check the dsn; start anew if this is intended")
        self._systemid = systemid
        return identity

    async def _timeline_history(
        self, connection: ReplicationConnection, timeline: int
    ) -> tuple[tuple[int, Lsn], ...]:
        """Ask for what transactional handlers compare their positions with; the first has none."""
        if not self._targets or timeline == 1:
            return ()
        return await connection.timeline_history(timeline)

    async def _pushed_down(self) -> PushedDown:
        return push_down(
            self.router.routes,
            await self._catalog.partitioned(),
            everything=needs_everything(self.router),
        )

    async def _check_pushed_down(self, pushed_down: PushedDown) -> None:
        """End the session when a routed table has become a partitioned one.

        The server was asked for the table alone and does not send its partitions.
        """
        try:
            now = await self._pushed_down()
        except WalstreamError:
            return  # asked again soon; the stream itself shows how the server is
        if now != pushed_down:
            log.error(
                "routed_table_partitioned",
                since=str(self._acknowledger.flush_lsn),
                hint="a routed table was replaced by a partitioned one while streaming: changes of"
                " its partitions in the last seconds may be missing",
            )
            raise ConnectionLost("a routed table has become a partitioned one: streaming anew")

    async def _start(self, connection: ReplicationConnection, options: dict[str, str]) -> Lsn:
        """Start with the options that the installed wal2json knows; return the slot's position.

        Without ``numeric-data-types-as-string``, which came with wal2json 2.6, NaN and infinity in
        float and numeric columns arrive as null.
        """
        name = self._config.slot.name
        confirmed = await self._slot(connection)
        if self._numbers_as_strings:
            try:
                await connection.start(name, {**options, "numeric-data-types-as-string": "1"})
            except PluginTooOld:
                self._numbers_as_strings = False
                log.info(
                    "plugin_limited",
                    missing="numeric-data-types-as-string",
                    hint="before wal2json 2.6 NaN and infinity in float and numeric columns arrive"
                    " as null",
                )
                if self._temporary_slot:  # an error ends the temporary slots of its session
                    confirmed = await self._slot(connection)
            else:
                return confirmed
        await connection.start(name, options)
        return confirmed


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
