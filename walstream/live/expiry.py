"""The end of a token: what somebody has by it ends with it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from walstream.access.readers import Reader

LOOK_AGAIN_SECONDS: Final = 86_400.0
"""After so long at most the clock is looked at: it may have been set, or the machine have slept."""

_EARLY_SECONDS: Final = 1.0
"""A timer that comes so much before the end is no reason for another one."""


class Expiry:
    """Waits for the end of a reader's token."""

    __slots__ = ("_timer",)

    def __init__(self) -> None:
        self._timer: asyncio.TimerHandle | None = None

    def renew(self, reader: Reader, on_end: Callable[[], object]) -> None:
        """Call ``on_end`` when this token ends, and nothing when one before does."""
        self.cancel()
        if reader.expires_at is not None:
            self._wait(reader.expires_at, on_end)

    def cancel(self) -> None:
        """Wait no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait(self, ends_at: float, on_end: Callable[[], object]) -> None:
        seconds = min(max(0.0, ends_at - time.time()), LOOK_AGAIN_SECONDS)
        self._timer = asyncio.get_running_loop().call_later(seconds, self._look, ends_at, on_end)

    def _look(self, ends_at: float, on_end: Callable[[], object]) -> None:
        if ends_at - time.time() > _EARLY_SECONDS:
            self._wait(ends_at, on_end)
        else:
            self._timer = None
            on_end()
