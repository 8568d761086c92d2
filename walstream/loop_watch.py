"""A thread that notices when the event loop is blocked, which the loop itself cannot tell.

An ``async def`` handler that blocks (``time.sleep``, a blocking driver, a long computation) stops
everything: other handlers, status updates, health, signals. The loop ticks a clock; a daemon thread
looks at it, and logs once when it stands still for too long, with where the loop is, and once when
it goes on.

A process that was stopped as a whole (SIGSTOP, a suspended machine) is not blocked: then the thread
has not run either, and no processor time was used. A call that holds Python's lock all the time,
such as a regular expression that backtracks, stops the thread too, but uses the processor: it is
logged as soon as the thread runs again.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import structlog

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.loop_watch")

TICK_SECONDS: Final = 1.0
"""How often the loop ticks at least, and the thread looks."""

_OWN: Final = str(Path(__file__).parent)
_LOOP: Final = asyncio.events.__file__


@contextmanager
def watch_loop(loop: asyncio.AbstractEventLoop, after_seconds: float) -> Iterator[None]:
    """Watch the loop while the block runs; to be entered in the thread of the loop.

    Args:
        loop: that runs now.
        after_seconds: how long it may be blocked before that is logged.
    """
    watch = _LoopWatch(loop, after_seconds)
    thread = threading.Thread(target=watch.run, name="walstream loop watch", daemon=True)
    watch.tick()
    thread.start()
    try:
        yield
    finally:
        watch.end()
        thread.join()


class _LoopWatch:
    """``tick`` and ``end`` run in the loop's thread, all else in the one that looks."""

    def __init__(self, loop: asyncio.AbstractEventLoop, after_seconds: float) -> None:
        self._loop = loop
        self._after_seconds = after_seconds
        self._interval_seconds = min(TICK_SECONDS, after_seconds / 4)
        self._thread = threading.get_ident()
        self._over = threading.Event()
        self._next_tick: asyncio.TimerHandle | None = None
        self._ticked_at = time.monotonic()

    def tick(self) -> None:
        """Show that the loop runs, from now on again and again."""
        self._ticked_at = time.monotonic()
        self._next_tick = self._loop.call_later(self._interval_seconds, self.tick)

    def end(self) -> None:
        """Let the thread end."""
        if self._next_tick is not None:
            self._next_tick.cancel()
        self._over.set()

    def run(self) -> None:
        """Look at the loop's clock until the end."""
        excused_until = blocked_since = 0.0
        looked_at, used = time.monotonic(), time.process_time()
        while not self._over.wait(self._interval_seconds):
            now, used_now = time.monotonic(), time.process_time()
            if _was_stopped(now - looked_at, used_now - used, self._interval_seconds):
                excused_until = now
            looked_at, used = now, used_now
            ticked_at = self._ticked_at
            if blocked_since:
                if ticked_at > blocked_since:
                    _tell_moving(ticked_at - blocked_since)
                    blocked_since = 0.0
            elif now - max(ticked_at, excused_until) > self._after_seconds:
                blocked_since = ticked_at
                self._tell_blocked(now - ticked_at)
        if blocked_since:
            _tell_moving(time.monotonic() - blocked_since)

    def _tell_blocked(self, seconds: float) -> None:
        log.error(
            "event_loop_blocked",
            seconds=round(seconds, 1),
            frames=_frames(self._thread),
            hint="an async def handler must not block: make it a plain def, which gets a thread",
        )


def _was_stopped(gap_seconds: float, used_seconds: float, interval_seconds: float) -> bool:
    """Whether the whole process stood still between two looks, and did not compute either."""
    missing_seconds = gap_seconds - interval_seconds
    # On a machine that is busy a process that computes may get little of the processor.
    return missing_seconds > interval_seconds and used_seconds < missing_seconds / 10


def _tell_moving(seconds: float) -> None:
    log.info("event_loop_moves_again", seconds=round(seconds, 1))


def _frames(thread: int) -> list[str]:
    """Say where a thread stands, outermost first: ``file:line function`` each.

    It begins with what the loop's innermost callback runs, a handler mostly: the way to it through
    asyncio and walstream is left out.
    """
    frame = sys._current_frames().get(thread)  # noqa: SLF001 - documented so
    places = traceback.extract_stack(frame) if frame is not None else []
    while any(place.filename == _LOOP for place in places):
        places.pop(0)
    told = list(places)
    while told and told[0].filename.startswith(_OWN):
        told.pop(0)
    return [f"{place.filename}:{place.lineno} {place.name}" for place in told or places]
