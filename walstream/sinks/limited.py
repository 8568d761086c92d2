"""Sinks that show less: a number of changes, or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from walstream.changes import Change
from walstream.destinations import Sink


class LimitedSink:
    """Passes so many changes on, then none."""

    def __init__(
        self, sink: Sink, limit: int, *, on_full: Callable[[], object] = lambda: None
    ) -> None:
        """Begin with nothing passed on.

        Args:
            sink: takes the changes.
            limit: how many.
            on_full: called once, when it has taken the last one.
        """
        self.name = sink.name
        self._sink = sink
        self._left = limit
        self.on_full = on_full

    async def open(self) -> None:
        """Open the sink."""
        await self._sink.open()

    async def take(self, changes: Sequence[Change]) -> None:
        """Pass on what is still wanted.

        Raises:
            OSError, SinkFailed: as the sink.
        """
        wanted = changes[: self._left]
        if not wanted:
            return
        await self._sink.take(wanted)
        self._left -= len(wanted)
        if not self._left:
            self.on_full()

    async def close(self) -> None:
        """Close the sink."""
        await self._sink.close()


class NullSink:
    """Takes everything and keeps nothing."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def open(self) -> None:
        """Nothing to make ready."""

    async def take(self, changes: Sequence[Change]) -> None:
        """Nothing to keep."""

    async def close(self) -> None:
        """Nothing to let go."""
