"""Clients that fetch nothing of what they asked for are cut."""

from __future__ import annotations

import asyncio
from typing import Final

import structlog

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.gateway")

STALL_SECONDS: Final = 30.0


class Stall:
    """Looks after one connection while its transport has enough."""

    def __init__(self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport) -> None:
        self._loop = loop
        self._transport = transport
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Cut the client when it fetches nothing for `STALL_SECONDS` from now."""
        size = self._transport.get_write_buffer_size()
        self._timer = self._loop.call_later(STALL_SECONDS, self._look, size)

    def end(self) -> None:
        """Look no more: it has fetched nearly all, or has gone."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self, before: int) -> None:
        if self._transport.get_write_buffer_size() < before:
            self.begin()
            return
        log.debug("http_refused", reason="the answer is not fetched")
        self._transport.abort()
