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
from walstream.worker import Worker

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.sinks.file")

_TAIL_BYTES: Final = 1 << 16
_CLOSE_SECONDS: Final = 1.0


class FileSink:
    """Appends changes to a file, one JSON object a line, and calls fsync before they are taken.

    The file holds whole lines only: what a crash or a failed write left of a line is cut off before
    the next one is written; its change was not taken and comes again. Another process that has the
    file open as a sink is refused. When the file is moved, removed or truncated by others, as
    logrotate does, the next lines go to the end of what is then at the path.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.path = path.absolute()
        # One call at a time: an append whose take was cancelled ends before the next one begins.
        self._worker = Worker(f"walstream-sink-{name}")
        self._descriptor = -1
        self._end = 0

    async def open(self) -> None:
        """Open the file, and make it when it is not there.

        Raises:
            SinkFailed: it cannot be opened, or another process writes to it.
        """
        try:
            await self._worker.call(self._open)
        except BlockingIOError:
            message = f"sink {self.name}: another process writes to {self.path}"
            hint = "give each process, and each sink, a file of its own"
            raise SinkFailed(message, hint=hint) from None
        except OSError as error:
            message = f"sink {self.name}: {self.path} cannot be opened: {error.strerror}"
            raise SinkFailed(message) from error

    async def take(self, changes: Sequence[Change]) -> None:
        """Append the changes' lines, durably.

        When it is cancelled they may still get into the file, before those of the next call.

        Raises:
            OSError: they are not in the file.
        """
        lines = b"".join([change.to_json() + b"\n" for change in changes])
        await self._worker.call(self._append, lines)

    async def close(self) -> None:
        """Close the file; where a hung append delays that, it is waited for a moment only."""
        closed = asyncio.wrap_future(self._worker.submit(self._close))
        done, _ = await asyncio.wait({closed}, timeout=_CLOSE_SECONDS)
        for future in done:
            future.result()

    def _open(self) -> None:
        created = not self.path.exists()
        descriptor = _open_locked(self.path)
        try:
            if created:
                _sync_directory(self.path.parent)
            self._find_end(descriptor)
        except OSError:
            os.close(descriptor)
            raise
        self._close()
        self._descriptor = descriptor

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _find_end(self, descriptor: int) -> None:
        """Go on behind the last whole line, and cut off what follows it."""
        self._end = _end_of_last_line(descriptor)
        if self._end < os.fstat(descriptor).st_size:
            log.warning("torn_line_removed", sink=self.name, path=str(self.path), at=self._end)
            os.ftruncate(descriptor, self._end)

    def _append(self, lines: bytes) -> None:
        kept = False
        while not kept:
            self._follow()
            try:
                _write_all(self._descriptor, lines)
                os.fsync(self._descriptor)
            except OSError:
                self._cut_off()
                raise
            self._end += len(lines)
            # Removed or truncated meanwhile: the lines may be gone, so they are written once more.
            now = os.fstat(self._descriptor)
            kept = now.st_nlink > 0 and now.st_size >= self._end

    def _follow(self) -> None:
        """Make sure of appending to what is at the path, behind its last whole line."""
        is_another = self._is_another_file()
        reason = is_another or self._is_another_size()
        if not reason:
            return
        if is_another:
            self._open()
        else:
            self._find_end(self._descriptor)
        log.warning("file_reopened", sink=self.name, path=str(self.path), reason=reason)

    def _is_another_file(self) -> str:
        """Say why the path no longer names the open file; nothing when it does."""
        opened = os.fstat(self._descriptor)
        try:
            named = self.path.stat()
        except FileNotFoundError:
            return "renamed" if opened.st_nlink else "removed"
        return "" if os.path.samestat(opened, named) else "replaced"

    def _is_another_size(self) -> str:
        """Say why the file does not end where we left it; nothing when it does."""
        size = os.fstat(self._descriptor).st_size
        return "" if size == self._end else "truncated" if size < self._end else "grown"

    def _cut_off(self) -> None:
        """Remove what a failed append has written; a file that is shorter by now stays so."""
        if os.fstat(self._descriptor).st_size > self._end:
            os.ftruncate(self._descriptor, self._end)


def _open_locked(path: Path) -> int:
    """Open a regular file and lock it.

    O_APPEND: whatever others do to the file, a write never leaves a hole, nor goes over a line.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        _refuse_all_but_files(descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _refuse_all_but_files(descriptor: int) -> None:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file")


def _write_all(descriptor: int, lines: bytes) -> None:
    rest = memoryview(lines)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


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
