"""The clients of the live sink, through sessions and reloads: what they may be told, and from when.

`walstream.live` knows neither slots nor routes' configurations; the daemon knows no history. Here
both meet: each session begins where the slot stands, under the rules that hold, and nothing is
confirmed to the server before it is noted as kept.
"""

from __future__ import annotations

import asyncio
from typing import Final

import structlog

from walstream.assembly import Assembly
from walstream.connection import SystemIdentity
from walstream.errors import SinkFailed, Unavailable
from walstream.journal import Journal
from walstream.live.hub import Hub
from walstream.live.sink import LiveSink
from walstream.lsn import Lsn

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.audience")

COVER_PAUSE_SECONDS: Final = 1.0
"""How long a journal that cannot be written is left alone."""


class Audience:
    """Whoever reads changes by HTTP, if a route leads there."""

    def __init__(self, assembly: Assembly, *, accept_gap: bool = False) -> None:
        self._assembly = assembly
        self._accept_gap = accept_gap
        self._identity: SystemIdentity | None = None
        self._history = ""
        self._is_covered = True

    @property
    def hub(self) -> Hub | None:
        """What they read from."""
        live = self._live
        return None if live is None else live.hub

    @property
    def journal(self) -> Journal | None:
        """Where changes are kept for them, when that is on disk."""
        history = None if self.hub is None else self.hub.history
        return history if isinstance(history, Journal) else None

    async def begin(self, identity: SystemIdentity, at: Lsn) -> None:
        """A session begins at the slot's position.

        Raises:
            SetupError: the journal cannot be used.
            Unavailable: it cannot be used now, its disk is full for example.
        """
        self._identity = identity
        self._history = ""
        await self._begin(at)

    async def reload(self, assembly: Assembly, at: Lsn | None) -> None:
        """Take over what a reload has made; under other routes the history begins anew.

        Args:
            assembly: from now on.
            at: up to where all is taken; None while nothing streams: the next session begins it.

        Raises:
            Unavailable: the journal cannot be used now.
        """
        self._assembly = assembly
        if at is not None:
            await self._begin(at)

    async def cover(self, flush_lsn: Lsn) -> None:
        """Note that all up to a position is kept; wait for as long as that cannot be written."""
        while not await self._cover(flush_lsn):  # noqa: ASYNC110 - room on a disk
            await asyncio.sleep(COVER_PAUSE_SECONDS)

    @property
    def _live(self) -> LiveSink | None:
        return self._assembly.live

    async def _begin(self, at: Lsn) -> None:
        live = self._live
        if live is None or self._identity is None:
            return
        live.hub.requests.routes = self._assembly.live_routes()
        history = self._assembly.live_history(self._identity)
        if history == self._history and live.hub.has_begun:
            return
        try:
            await live.begin(at, history, accept_gap=self._accept_gap)
        except SinkFailed as failure:
            raise Unavailable(failure.message, hint=failure.hint) from failure
        self._history = history

    async def _cover(self, flush_lsn: Lsn) -> bool:
        if self._live is None:
            return True
        try:
            await self._live.cover(flush_lsn)
        except SinkFailed as failure:
            self._tell_not_covered(failure)
            return False
        self._is_covered = True
        return True

    def _tell_not_covered(self, failure: SinkFailed) -> None:
        if self._is_covered:
            self._is_covered = False
            log.error(
                "journal_not_written",
                error=failure.message,
                hint=failure.hint or "nothing is confirmed to the server until it can be",
            )
