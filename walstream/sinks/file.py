"""A file of JSON lines, durable before a change counts as taken."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import structlog

from walstream.changes import Change
from walstream.errors import SinkFailed

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.sinks.file")

_TAIL_BYTES: Final = 1 << 16


class FileSink:
    """Appends changes to a file, one JSON object a line, and calls fsync before they are taken.

    The file holds whole lines only: what a crash or a failed write left of a line is cut off before
    the next one is written; its change was not taken and comes again. Another process that has the
    file open as a sink is refused.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.path = path
        self._descriptor = -1
        self._end = 0

    async def open(self) -> None:
        """Open the file, and make it when it is not there.

        Raises:
            SinkFailed: it cannot be opened, or another process writes to it.
        """
        try:
            await asyncio.to_thread(self._open)
        except BlockingIOError:
            message = f"sink {self.name}: another process writes to {self.path}"
            raise SinkFailed(message, hint="give each process a file of its own") from None
        except OSError as error:
            message = f"sink {self.name}: {self.path} cannot be opened: {error.strerror}"
            raise SinkFailed(message) from error

    async def take(self, changes: Sequence[Change]) -> None:
        """Append the changes' lines, durably.

        Raises:
            OSError: they are not in the file.
        """
        lines = b"".join([change.to_json() + b"\n" for change in changes])
        await asyncio.to_thread(self._append, lines)

    async def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _open(self) -> None:
        created = not self.path.exists()
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if created:
            _sync_directory(self.path.parent)
        self._end = _end_of_last_line(self._descriptor)
        if self._end < os.fstat(self._descriptor).st_size:
            log.warning("torn_line_removed", sink=self.name, path=str(self.path), at=self._end)
            os.ftruncate(self._descriptor, self._end)

    def _append(self, lines: bytes) -> None:
        try:
            position = self._end
            rest = memoryview(lines)
            while rest:
                written = os.pwrite(self._descriptor, rest, position)
                position += written
                rest = rest[written:]
            os.fsync(self._descriptor)
        except OSError:
            os.ftruncate(self._descriptor, self._end)
            raise
        self._end = position


def _end_of_last_line(descriptor: int) -> int:
    """Return the position behind the last line end, 0 when there is none."""
    end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - _TAIL_BYTES)
        found = os.pread(descriptor, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _sync_directory(directory: Path) -> None:
    """Make the new file's name durable too."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
