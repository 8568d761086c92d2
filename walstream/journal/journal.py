"""The journal, as the process has it that writes it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Final, TypeVar

import structlog

from walstream.changes import Change
from walstream.journal.attachments import Attachment
from walstream.journal.blocks import time_of
from walstream.journal.file import JournalTrimmed
from walstream.journal.reader import JournalReader
from walstream.journal.writer import Bounds, Writer
from walstream.lsn import Lsn
from walstream.positions import BEGINNING, Position
from walstream.vitals import JournalVitals
from walstream.worker import Worker

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.journal")

CLOSE_SECONDS: Final = 5.0
"""So long a disk that does not answer is waited for at the end."""

OVERRUN_TOLD_SECONDS: Final = 60.0
"""So seldom it is told that what comes is more than there is room for."""

T = TypeVar("T")


class Journal:
    """Keeps changes on disk, within bounds, for those who ask for them again.

    All that is behind ``begins``, up to ``position``, can be read. One process writes; others may
    read (`JournalReader`) and trim beside it.
    """

    def __init__(
        self, path: Path, *, max_bytes: int, max_age_seconds: float, durable: bool
    ) -> None:
        """Open nothing yet.

        Args:
            path: the file; others are made beside it.
            max_bytes: how large it may get, with its ``-wal``.
            max_age_seconds: how long ago the commits may be.
            durable: an append is on disk when it returns. Otherwise a process that is killed loses
                nothing, and a machine that crashes perhaps the last of it: `covered` tells.
        """
        self.path = path.absolute()
        self._durable = durable
        self._worker = Worker("walstream-journal")
        self._writer = Writer(self.path, Bounds(max_bytes, max_age_seconds), durable=durable)
        self._reader = JournalReader(self.path)
        self._told = BEGINNING
        self._overrun_told_at = -OVERRUN_TOLD_SECONDS

    @property
    def begins(self) -> Position:
        """What stands behind it can be read."""
        return self._writer.state.begins

    @property
    def position(self) -> Position:
        """Where the last change stands."""
        return self._writer.state.position

    @property
    def covered(self) -> Lsn:
        """Up to there all changes were appended."""
        return self._writer.state.covered

    def vitals(self) -> JournalVitals:
        """Tell how it is; nothing is asked for it."""
        writer = self._writer
        front, newest = writer.front, writer.newest_time
        return JournalVitals(
            bytes=writer.sizes.total_bytes,
            changes=writer.state.changes,
            oldest_time=None if front is None else time_of(front.oldest_time),
            newest_time=None if front is None or newest is None else time_of(newest),
            oldest_seconds=None if front is None else time.time() - front.oldest_time / 1_000_000,
            begins=writer.state.begins,
            appended=writer.appended,
            durable=self._durable,
            failure=writer.failure,
        )

    async def prepare(self) -> None:
        """Take the file, before it is known what is kept in it.

        Raises:
            SetupError: another process writes it, or something has to be changed first.
            SinkFailed: it cannot be written to now.
        """
        await self._call(self._writer.prepare)

    async def open(self, history: str, *, accept_gap: bool = False) -> None:
        """Go on, or begin anew when the changes that are here were kept under other rules.

        Opening it again only compares the rules.

        Args:
            history: stands for the rules; any text. Up to its first blank it says of what the
                changes are.
            accept_gap: begin anew also when what is here is of something else.

        Raises:
            SetupError: another process writes it, it is of something else, or something has to be
                changed first.
            SinkFailed: it cannot be written to now.
        """
        forgotten = await self._call(self._writer.open, history, accept_gap)
        if forgotten:
            log.warning(
                "journal_begun_anew",
                path=str(self.path),
                changes=forgotten,
                hint="the routes to the live sink, or their masks, are others than before, or the"
                " server is on another timeline: what was kept is not given out any more",
            )
        await self._reader.open()
        self._told = self.position

    async def append(self, changes: Sequence[Change]) -> None:
        """Keep changes that stand behind ``position``, in order; all or none.

        When it is cancelled they may still be kept; to append them again then does no harm.

        Raises:
            ValueError: they are not in order.
            SinkFailed: they are not kept.
        """
        if changes:
            await self._call(self._writer.append, changes, self._told)
            self._told = self.position
            if self._writer.state.changes < len(changes):
                self._tell_overrun(len(changes))

    def _tell_overrun(self, appended: int) -> None:
        now = time.monotonic()
        if now - self._overrun_told_at >= OVERRUN_TOLD_SECONDS:
            self._overrun_told_at = now
            log.warning(
                "journal_overrun",
                path=str(self.path),
                appended=appended,
                kept=self._writer.state.changes,
                hint="what came at once is larger than there is room for, and all that was kept"
                " before is gone: raise journal.max_bytes, of which one row may take an eighth",
            )

    async def cover(self, lsn: Lsn) -> None:
        """Note that all changes up to a position were appended; also removes what is too old.

        Raises:
            SinkFailed: it cannot be written to.
        """
        await self._call(self._writer.cover, lsn)

    async def interrupt(self, at: Lsn) -> None:
        """Forget everything: it is not connected with what comes behind this position.

        Raises:
            SinkFailed: it cannot be written to.
        """
        await self._call(self._writer.interrupt, at)
        self._told = self.position

    async def close(self) -> None:
        """Let go of the file, behind what is being written."""
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._reader.close()
                await self._worker.call(self._writer.close)
        except TimeoutError:  # its thread ends with the process
            log.error(  # noqa: TRY400 - the reason says it all
                "journal_not_closed",
                path=str(self.path),
                hint="the disk does not answer; what was appended before is in the file",
            )

    async def read(self, after: Position, upto: Position) -> AsyncIterator[Sequence[Change]]:
        """Read what stands behind the one position, up to the other, in order and in pieces.

        Raises:
            JournalTrimmed: what stands behind ``after`` is not complete any more.
            SinkFailed: it cannot be read.
        """
        try:
            async for changes in self._reader.read(after, upto):
                yield changes
        except JournalTrimmed:
            await self._call(self._writer.refresh)  # another process may have trimmed it
            raise

    async def position_before(self, time: datetime) -> Position | None:
        """Return a position behind which all stands that was committed then or later.

        None means that what is here does not go back so far.

        Raises:
            SinkFailed: it cannot be read.
        """
        return await self._reader.position_before(time)

    async def attachment(self, stream: str, route: str) -> Attachment | None:
        """Return how far a handler is that was attached with history; None when it never was.

        Args:
            stream: of which slot and cluster.
            route: the handler's name.

        Raises:
            SinkFailed: it cannot be read.
        """
        return await self._call(self._writer.attachment, stream, route)

    async def attach(self, stream: str, route: str, attachment: Attachment) -> None:
        """Note how far a handler is that is attached with history.

        Raises:
            SinkFailed: it cannot be written to.
        """
        await self._call(self._writer.attach, stream, route, attachment)

    async def _call(self, function: Callable[..., T], *arguments: object) -> T:
        return await self._worker.call(self._writer.attempt, function, *arguments)
