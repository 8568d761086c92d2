"""The server's side of a stream: the slot, recognised and started, one connection at a time.

What is asked here is the fatal part of ``walstream check``, in an order that costs the server
least: a process that stands by for another one opens no walsender.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Final

import msgspec
import structlog

from walstream.catalog import Catalog, Server
from walstream.changes import Relation
from walstream.config import Config
from walstream.connection import ReplicationConnection, SystemIdentity
from walstream.decoder import START_OPTIONS
from walstream.errors import ConfigError, PluginTooOld, SlotBusy, SlotMissing
from walstream.lineage import Lineage, Standing, verify
from walstream.lsn import ZERO, Lsn
from walstream.preflight import verify_routes, verify_server
from walstream.pushdown import PushedDown, push_down
from walstream.router import Router
from walstream.slots import SlotStatus, create_slot, note_failover, usable_slot
from walstream.state import StateFile, state_path

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.source")


class Started(msgspec.Struct, frozen=True):
    """A connection that streams.

    ``history`` lists the timelines before the server's, and where each was left; ``confirmed`` is
    the position that the slot goes on from.
    """

    connection: ReplicationConnection
    server: Server
    identity: SystemIdentity
    history: tuple[tuple[int, Lsn], ...]
    wal_sender_timeout_seconds: float
    pushed_down: PushedDown
    confirmed: Lsn


_UNFIT: Final = "other routes go on; the next start refuses this one: mend the route, or the table"

_NUMBERS: Final = "numeric-data-types-as-string"
"""Came with wal2json 2.6; without it NaN and infinity in float and numeric columns are null."""


class Source:
    """The slot of a configuration, and what was confirmed of it last."""

    def __init__(
        self,
        config: Config,
        catalog: Catalog,
        *,
        is_temporary: bool = False,
        accept_gap: bool = False,
        on_notice: Callable[[str, str], None],
    ) -> None:
        """Connect to nothing yet.

        Args:
            config: names the slot, and says whether it is made when it is missing.
            catalog: of the same server.
            is_temporary: make a slot that ends with the connection.
            accept_gap: begin at the slot's position, whatever was confirmed before.
            on_notice: called with SQLSTATE and text of what the server warns about.
        """
        self._config = config
        self._catalog = catalog
        self._is_temporary = is_temporary
        self._on_notice = on_notice
        self._numbers_as_strings = True
        self._connection: ReplicationConnection | None = None
        path = None if is_temporary else state_path(config.state.path, config.slot.name)
        self._state = None if path is None else StateFile(path, config.slot.name)
        self._accept_gap = accept_gap
        self._others_stream = config.slot.shared
        self._has_streamed = False
        self._missing: set[Relation | None] = set()
        self.lineage: Lineage | None = None

    async def prepare(self) -> None:
        """Read what was confirmed last.

        Raises:
            SetupError: the state file cannot be read, or not be written later.
        """
        if self._state is None:
            return
        await self._state.verify_writable()

    async def record(self, flush_lsn: Lsn) -> None:
        """Note, before it is confirmed, that all up to a position is taken.

        After that a slot that stands beyond what is recorded was moved by others.
        """
        if self.lineage is None or flush_lsn <= self.lineage.flush_lsn:
            return
        self.lineage = msgspec.structs.replace(self.lineage, flush_lsn=flush_lsn)
        if self._state is not None:
            await self._state.record(self.lineage)

    def abandon(self) -> None:
        """Cut what is being connected: nobody waits for it any more."""
        self._catalog.abandon()
        if self._connection is not None:
            self._connection.abandon()

    async def push_down(self, router: Router, *, everything: bool) -> PushedDown:
        """Say what the server need not send for these routes.

        Args:
            router: with the routes.
            everything: it has to send all the same.
        """
        return push_down(router.routes, await self._catalog.partitioned(), everything=everything)

    @asynccontextmanager
    async def streaming(
        self,
        router: Router,
        *,
        everything: bool,
        on_free: Callable[[], Awaitable[None]],
    ) -> AsyncIterator[Started]:
        """Connect, make sure that it is the slot that was streamed from before, and start.

        Args:
            router: with the routes, which are checked against the tables.
            everything: the server has to send all changes, whatever the routes want.
            on_free: called when nobody else streams from the slot, before anything is made.

        Raises:
            WalstreamError: what keeps it from streaming.
        """
        server = await self._catalog.server()
        verify_server(server)
        await self._verify_routes(router)
        status = None if self._is_temporary else await self._look()
        await on_free()
        postgres = self._config.postgres
        async with await ReplicationConnection.open(
            postgres.streaming_dsn(),
            application_name=postgres.application_name,
            on_notice=self._on_notice,
        ) as connection:
            self._connection = connection
            try:
                identity = await connection.identify_system()
                history = await self._history(connection, identity)
                await self._recognise(server, identity, history, status)
                timeout_seconds = await connection.wal_sender_timeout_seconds()
                pushed_down = await self.push_down(router, everything=everything)
                await self._catalog.partitions_changed()
                options = {**START_OPTIONS, **pushed_down.options}
                confirmed = await self._start(connection, options, status)
                await self._begin(identity, confirmed)
                yield Started(
                    connection,
                    server,
                    identity,
                    history,
                    timeout_seconds,
                    pushed_down,
                    confirmed,
                )
            finally:
                self._connection = None

    async def _verify_routes(self, router: Router) -> None:
        """Check the routes; what has become wrong while others stream does not end those."""
        try:
            await verify_routes(self._catalog, router.routes)
        except ConfigError as error:
            if not self._has_streamed:
                raise
            log.error("routes_unfit", error=error.message, hint=_UNFIT)  # noqa: TRY400

    async def note_missing(self, router: Router) -> None:
        """Log routed tables that are not there any more, once each.

        Raises:
            WalstreamError: the catalog cannot be asked.
        """
        named = {route.pattern.relation for route in router.routes} - {None}
        missing = named.difference(await self._catalog.tables())
        for relation in sorted(map(str, missing - self._missing)):
            log.error("routed_table_missing", table=relation, hint=_UNFIT)
        self._missing = missing

    async def _look(self) -> SlotStatus | None:
        """Look at the slot; None when it is missing, which may be as it should be."""
        if self._state is not None and self.lineage is None:
            last = await self._state.load()
            # Until it streams the file says what it said: what is accepted is one start's gap.
            self.lineage = None if self._accept_gap else last
        try:
            status = await usable_slot(self._catalog, self._config.slot.name)
        except SlotMissing:
            if self.lineage is None and not self._config.slot.create:
                raise
            return None
        except SlotBusy as busy:
            self._observe(busy)
            raise
        if self._config.slot.failover:
            note_failover(status)
        return status

    def _observe(self, busy: SlotBusy) -> None:
        """What the process that we stand by for confirms is confirmed for us, too."""
        self._others_stream = True
        if self.lineage is not None and busy.confirmed_flush_lsn is not None:
            flush_lsn = max(self.lineage.flush_lsn, Lsn(busy.confirmed_flush_lsn))
            self.lineage = msgspec.structs.replace(self.lineage, flush_lsn=flush_lsn)

    async def _history(
        self, connection: ReplicationConnection, identity: SystemIdentity
    ) -> tuple[tuple[int, Lsn], ...]:
        """Ask which timelines this one goes on from; the first one has none."""
        if identity.timeline == 1:
            return ()
        return await connection.timeline_history(identity.timeline)

    async def _recognise(
        self,
        server: Server,
        identity: SystemIdentity,
        history: tuple[tuple[int, Lsn], ...],
        status: SlotStatus | None,
    ) -> None:
        """Refuse a server that is not the continuation of the one before."""
        last = self.lineage
        if last is None or self._is_temporary:
            return
        slot_lsn = None if status is None else status.confirmed_flush_lsn or ZERO
        standing = Standing(
            systemid=identity.systemid,
            timeline=identity.timeline,
            flush_lsn=identity.flush_lsn,
            slot_lsn=slot_lsn,
            in_recovery=server.in_recovery,
            others_stream=self._others_stream,
            history=history,
        )
        slot = self._config.slot.name
        verify(last, standing, slot)
        if identity.timeline != last.timeline:
            log.warning("timeline_changed", slot=slot, was=last.timeline, now=identity.timeline)
        if slot_lsn is not None and slot_lsn > last.flush_lsn:
            log.warning(
                "slot_moved",
                slot=slot,
                flush_lsn=str(last.flush_lsn),
                confirmed_flush_lsn=str(slot_lsn),
                hint="another process has streamed from it in between",
            )

    async def _begin(self, identity: SystemIdentity, confirmed: Lsn) -> None:
        """Record where the stream goes on from; a slot that is behind has nothing to tell."""
        last = None if self.lineage is None else self.lineage.flush_lsn
        flush_lsn = max(confirmed, last or ZERO)
        self.lineage = Lineage(identity.systemid, identity.timeline, flush_lsn)
        self._accept_gap, self._has_streamed = False, True
        self._others_stream = self._config.slot.shared
        if self._state is not None:
            await self._state.record(self.lineage)

    async def _start(
        self,
        connection: ReplicationConnection,
        options: Mapping[str, str],
        status: SlotStatus | None,
    ) -> Lsn:
        """Start with the options that the installed wal2json knows; return the slot's position."""
        name = self._config.slot.name
        confirmed = await self._position(connection, status)
        if self._numbers_as_strings:
            try:
                await connection.start(name, {**options, _NUMBERS: "1"})
            except PluginTooOld:
                self._numbers_as_strings = False
                log.info(
                    "plugin_limited",
                    missing=_NUMBERS,
                    hint="before wal2json 2.6 NaN and infinity in float and numeric columns arrive"
                    " as null",
                )
                if self._is_temporary:  # an error ends the temporary slots of its session
                    confirmed = await self._position(connection, None)
            else:
                return confirmed
        await connection.start(name, options)
        return confirmed

    async def _position(self, connection: ReplicationConnection, status: SlotStatus | None) -> Lsn:
        """Return the slot's position, after making the slot when there is none."""
        if status is not None:
            return status.confirmed_flush_lsn or ZERO
        created = await create_slot(
            connection,
            self._catalog,
            self._config.slot.name,
            temporary=self._is_temporary,
            failover=self._config.slot.failover and not self._is_temporary,
        )
        return created.consistent_point
