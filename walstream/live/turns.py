"""Turns in the event loop for work that takes long: a few milliseconds, and then others go on."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Final

SLICE_SECONDS: Final = 0.004
"""So long one works before others in the event loop have their turn."""

AT_ONCE: Final = 16
"""So many who wait for their turn are called at once."""


class Turns:
    """Lets all who have much to do together have a few milliseconds in a turn of the event loop."""

    def __init__(self) -> None:
        self._spent_seconds = 0.0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._is_called = False

    async def begin(self) -> None:
        """Wait until there is time."""
        add = self._waiting.append
        while self._spent_seconds > SLICE_SECONDS:
            waiter = asyncio.get_running_loop().create_future()
            add(waiter)
            self._call()
            await waiter
            add = self._waiting.appendleft  # who was called and came too late is the next

    def end(self, began: float) -> None:
        """Count what was done since then, by `time.perf_counter`."""
        self._spent_seconds += time.perf_counter() - began
        if self._spent_seconds > SLICE_SECONDS:
            self._call()

    def _call(self) -> None:
        if not self._is_called:
            self._is_called = True
            asyncio.get_running_loop().call_soon(self._renew)

    def _renew(self) -> None:
        self._is_called = False
        self._spent_seconds = 0.0
        for _ in range(min(AT_ONCE, len(self._waiting))):
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
        if self._waiting:
            self._call()


class Turn:
    """A few milliseconds, after which others in the event loop have theirs."""

    def __init__(self) -> None:
        self._ends = time.perf_counter() + SLICE_SECONDS

    async def give_way(self) -> None:
        """Let others go on, if it is over."""
        if time.perf_counter() > self._ends:
            await asyncio.sleep(0)
            self._ends = time.perf_counter() + SLICE_SECONDS
