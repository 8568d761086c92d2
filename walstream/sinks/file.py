"""A file of JSON lines: durable before a change counts as taken, rotated when large or old."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import stat
import time
from collections.abc import Sequence
from concurrent.futures import Future
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal, TypeAlias

import msgspec
import structlog

from walstream.changes import Change
from walstream.errors import DeliveryError, SinkFailed
from walstream.files import sync_directory
from walstream.sinks.rotation import Shelf
from walstream.worker import Worker

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.sinks.file")

Fsync: TypeAlias = Literal["always", "interval", "never"]

_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_PLACE: Final = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EINVAL,
)
_TAIL_BYTES: Final = 1 << 16
_CLOSE_SECONDS: Final = 1.0
_SHORTEST_SLEEP_SECONDS: Final = 0.005
_LONGEST_SLEEP_SECONDS: Final = 60.0
"""The clock may be set while the end of an age is waited for."""


class FileOptions(msgspec.Struct, frozen=True):
    """When a file is durable, and when the next one is begun.

    ``fsync``: ``always`` before changes are taken; ``interval`` at most ``fsync_seconds`` later;
    ``never``: when the operating system likes to. A process that is killed loses nothing with any
    of them; a machine that crashes loses what was not synced, and it does not come again.

    A file is rotated before it would get larger than ``max_bytes``. ``max_age_seconds`` divides the
    time since 1970, in UTC, into windows (3600: the hours, 86400: the days), and a file holds what
    was written in one of them. ``keep`` bounds the number of rotated files, ``compress`` makes them
    gzip files.
    """

    fsync: Fsync = "always"
    fsync_seconds: float = 1.0
    max_bytes: int | None = None
    max_age_seconds: float | None = None
    keep: int | None = None
    compress: bool = False


class FileSink:
    """Appends changes to a file, one JSON object a line.

    The file holds whole lines only: what a crash or a failed write left of a line is cut off before
    the next one is written; its change was not taken and comes again. Another process that has the
    file open as a sink is refused. When the file is moved, removed or truncated by others, as
    logrotate does, the next lines go to the end of what is then at the path.

    What one ``take`` brings is never divided between two files.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        options: FileOptions = FileOptions(),  # noqa: B008 - it is frozen
    ) -> None:
        self.name = name
        self.path = path.absolute()
        self._options = options
        # One call at a time: an append whose take was cancelled ends before the next one begins.
        self._worker = Worker(f"walstream-sink-{name}")
        self._shelf = Shelf(self.path, keep=options.keep, compress=options.compress)
        # Compression takes its time; the stream goes on meanwhile.
        self._housekeeper = Worker(f"walstream-rotated-{name}")
        self._tidied: Future[None] | None = None
        self._upkeep: asyncio.Task[None] | None = None
        self._descriptor = -1
        self._end = 0
        self._window = 0
        self._is_unsynced = False
        self._lost: DeliveryError | None = None

    async def open(self) -> None:
        """Open the file, and make it when it is not there.

        Raises:
            SinkFailed: it cannot be opened, or another process writes to it.
        """
        try:
            await self._worker.call(self._open_first)
        except OSError as error:
            raise self._failure(error, "cannot be opened") from error
        if self._options.fsync != "always":
            log.warning(
                "file_not_durable", sink=self.name, path=str(self.path), fsync=self._options.fsync
            )
        if self._options.fsync == "interval" or self._options.max_age_seconds is not None:
            self._upkeep = asyncio.create_task(self._keep_up())

    async def take(self, changes: Sequence[Change]) -> None:
        """Append the changes' lines, as durably as the options say.

        When it is cancelled they may still get into the file, before those of the next call.

        Raises:
            SinkFailed: they are not in the file.
            DeliveryError: what was taken before may be lost, because it could not be synced.
        """
        lines = b"".join([change.to_json() + b"\n" for change in changes])
        try:
            await self._worker.call(self._append, lines)
        except OSError as error:
            raise self._failure(error, "cannot be written to") from error

    async def reopen(self) -> None:
        """Look at once whether the file was moved, removed or truncated, and go on at the path.

        Without this it is looked at before the next line, which may be long in coming.

        Raises:
            SinkFailed: what is at the path cannot be opened; it is tried again with the next line.
        """
        try:
            await self._worker.call(self._reopen)
        except OSError as error:
            raise self._failure(error, "cannot be opened") from error

    async def close(self) -> None:
        """Close the file; where a hung append delays that, it is waited for a moment only.

        Raises:
            DeliveryError: what was taken may be lost, because it could not be synced.
        """
        if self._upkeep is not None:
            self._upkeep.cancel()
            await asyncio.wait({self._upkeep})
        closed = asyncio.wrap_future(self._worker.submit(self._close))
        await asyncio.wait({closed}, timeout=_CLOSE_SECONDS)
        if self._tidied is not None:  # what it leaves undone is done after the next start
            await asyncio.wait({asyncio.wrap_future(self._tidied)}, timeout=_CLOSE_SECONDS)
        if closed.done():
            closed.result()
        if self._lost is not None:
            raise self._lost

    def _failure(self, error: OSError, what: str) -> SinkFailed:
        if isinstance(error, BlockingIOError):
            return SinkFailed(
                f"sink {self.name}: another process writes to {self.path}",
                hint="give each process, and each sink, a file of its own",
            )
        if error.errno in _FULL:
            hint = "make room on its file system"
        elif error.errno in _NO_PLACE:
            hint = f"path under [sinks.{self.name}] has to name a file, in a folder that is there"
            hint += " and that walstream may write to"
        else:
            hint = ""
        why = error.strerror or type(error).__name__
        return SinkFailed(f"sink {self.name}: {self.path} {what}: {why}", hint=hint)

    # Opening and closing; all that follows runs in the worker's thread

    def _open_first(self) -> None:
        self._open()
        if self._is_rotating or self._shelf.has_rules:
            self._shelf.clear()  # only now nobody else writes here
        self._tidy()

    @property
    def _is_rotating(self) -> bool:
        options = self._options
        return options.max_bytes is not None or options.max_age_seconds is not None

    def _open(self) -> None:
        created = not self.path.exists()
        descriptor = _open_locked(self.path)
        try:
            if created:
                sync_directory(self.path.parent)
            self._find_end(descriptor)
        except OSError:
            os.close(descriptor)
            raise
        self._window = self._window_of(os.fstat(descriptor).st_mtime)
        try:
            self._close()
        finally:
            self._descriptor = descriptor

    def _close(self) -> None:
        """Let go of the file; all that is in it is synced before, unless it never is."""
        if self._descriptor < 0:
            return
        descriptor, self._descriptor = self._descriptor, -1
        try:
            self._sync(descriptor)
        finally:
            os.close(descriptor)

    def _find_end(self, descriptor: int) -> None:
        """Go on behind the last whole line, and cut off what follows it."""
        self._end = _end_of_last_line(descriptor)
        if self._end < os.fstat(descriptor).st_size:
            log.warning("torn_line_removed", sink=self.name, path=str(self.path), at=self._end)
            os.ftruncate(descriptor, self._end)

    # Appending

    def _append(self, lines: bytes) -> None:
        if self._lost is not None:
            raise self._lost
        kept = False
        while not kept:
            self._follow()
            if self._is_due(len(lines)):
                self._rotate()
            self._window = self._window_now()
            self._write(lines)
            self._end += len(lines)
            # Removed or truncated meanwhile: the lines may be gone, so they are written once more.
            now = os.fstat(self._descriptor)
            kept = now.st_nlink > 0 and now.st_size >= self._end

    def _write(self, lines: bytes) -> None:
        """Write all, or nothing."""
        try:
            _write_all(self._descriptor, lines)
            if self._options.fsync == "always":
                os.fsync(self._descriptor)
        except OSError:
            self._cut_off()
            raise
        self._is_unsynced = self._options.fsync == "interval"

    def _sync(self, descriptor: int) -> None:
        """Make durable what an interval has left.

        Raises:
            DeliveryError: it may be lost. A second fsync would succeed and prove nothing: the
                kernel has forgotten the pages that it could not write.
        """
        if not self._is_unsynced:
            return
        self._is_unsynced = False
        try:
            os.fsync(descriptor)
        except OSError as error:
            log.error(  # noqa: TRY400 - where it was raised says nothing
                "sync_failed", sink=self.name, path=str(self.path), error=error.strerror
            )
            self._lost = DeliveryError(
                f"sink {self.name}: changes that were taken may be missing at the end of"
                f" {self.path}: it could not be synced: {error.strerror}",
                hint="look at the disk, and compare the end of the file with the database; with"
                ' fsync = "always" such changes come again',
            )
            raise self._lost from error

    def _reopen(self) -> None:
        if self._descriptor >= 0:
            self._follow()

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

    # Rotating

    def _is_due(self, added_bytes: int) -> bool:
        """Whether the next lines go into a file of their own; an empty one is never rotated."""
        if not self._end:
            return False
        largest = self._options.max_bytes
        is_full = largest is not None and self._end + added_bytes > largest
        return is_full or self._window_now() > self._window

    def _window_now(self) -> int:
        return self._window_of(time.time())

    def _window_of(self, seconds: float) -> int:
        age = self._options.max_age_seconds
        return 0 if age is None else int(seconds // age)

    def _rotate(self) -> None:
        """Give the file the name of a rotated one, and begin the next.

        Killed in between, the next start finds an empty file of that name, or none at the path:
        both are right again when it has opened the file.
        """
        self._sync(self._descriptor)
        rotated = self._shelf.reserve(datetime.now(UTC))
        try:
            self.path.rename(rotated)
        except OSError:
            self._shelf.release(rotated)
            raise
        size_bytes = self._end
        self._open()
        log.info(
            "file_rotated",
            sink=self.name,
            path=str(self.path),
            rotated=rotated.name,
            bytes=size_bytes,
        )
        self._tidy()

    def _tidy(self) -> None:
        if self._shelf.has_rules:
            self._tidied = self._housekeeper.submit(self._tidy_shelf)

    def _tidy_shelf(self) -> None:
        """Apply the rules to rotated files; what fails is tried again after the next rotation."""
        try:
            self._shelf.tidy()
        except OSError as error:
            log.warning("tidying_failed", sink=self.name, path=str(self.path), error=error.strerror)

    # Between the takes

    async def _keep_up(self) -> None:
        """Sync at intervals, and rotate a file that nothing is written to any more."""
        while True:
            await asyncio.sleep(self._seconds_to_upkeep())
            await self._worker.call(self._keep_up_once)

    def _seconds_to_upkeep(self) -> float:
        options = self._options
        seconds = options.fsync_seconds if options.fsync == "interval" else _LONGEST_SLEEP_SECONDS
        if options.max_age_seconds is not None:
            left = options.max_age_seconds - time.time() % options.max_age_seconds
            seconds = min(seconds, left)
        return min(max(seconds, _SHORTEST_SLEEP_SECONDS), _LONGEST_SLEEP_SECONDS)

    def _keep_up_once(self) -> None:
        try:
            self._sync(self._descriptor)
            self._follow()
            if self._is_due(0):
                self._rotate()
        except DeliveryError:  # logged, and raised by the next take
            return
        except OSError as error:  # the next take meets it again
            log.warning(
                "rotation_failed", sink=self.name, path=str(self.path), error=error.strerror
            )


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
