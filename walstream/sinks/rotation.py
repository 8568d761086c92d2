"""The files that a file sink has filled: their names, how many there are, and their compression.

Names are those of the sink's file with the time of the rotation in UTC: ``changes.jsonl`` becomes
``changes-20261122T174056.340568Z.jsonl``. They sort in the order of the stream, also when the clock
was set back in between, and none is ever used twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import os
import re
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from walstream.files import sync_directory

_TIME_FORMAT: Final = "%Y%m%dT%H%M%S.%fZ"
_TIME: Final = r"\d{8}T\d{6}\.\d{6}Z"
_COMPRESSED: Final = ".gz"
_UNFINISHED: Final = ".gz.part"
_CHUNK_BYTES: Final = 1 << 20
_COMPRESSION_LEVEL: Final = 6


class Shelf:
    """The rotated files of one sink, beside the file itself."""

    def __init__(self, path: Path, *, keep: int | None = None, compress: bool = False) -> None:
        """Name the files.

        Args:
            path: the sink's own file.
            keep: how many rotated ones there may be; None for any number.
            compress: whether they become gzip files.
        """
        self._path = path
        self._keep = keep
        self._compress = compress
        stem, suffix = re.escape(path.stem), re.escape(path.suffix)
        self._name = re.compile(rf"({stem}-({_TIME}){suffix})(\.gz|\.gz\.part)?")

    @property
    def has_rules(self) -> bool:
        """Whether `tidy` has anything to do."""
        return self._keep is not None or self._compress

    def reserve(self, now: datetime) -> Path:
        """Make an empty file that the sink's own is to take the place of; it was not there before.

        Raises:
            OSError: it cannot be made.
        """
        while True:
            path = self._path.with_name(self._named_after(now))
            with contextlib.suppress(FileExistsError):
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                os.close(os.open(path, flags, 0o640))
                return path
            now += timedelta(microseconds=1)

    def release(self, path: Path) -> None:
        """Give a reserved name back, unless a file has taken its place."""
        if not _size(path):
            path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove what a crash has left: reserved names, and gzip files that were not finished.

        Raises:
            OSError: they cannot be removed.
        """
        for path in self._files():
            if path.name.endswith(_UNFINISHED) or not _size(path):
                path.unlink(missing_ok=True)

    def tidy(self) -> None:
        """Remove the oldest files, as many as are too many, and compress the others.

        Raises:
            OSError: it cannot be done.
        """
        # A reserved name is not a file yet: removed or compressed it would take the next one along.
        kept = self._names(self._filled())
        if self._keep is not None:
            kept, removed = kept[-self._keep :], kept[: -self._keep]
            for name in removed:
                for form in (name, name + _COMPRESSED):
                    self._path.with_name(form).unlink(missing_ok=True)
        if self._compress:
            for name in kept:
                _compress(self._path.with_name(name))

    def _named_after(self, now: datetime) -> str:
        newest = self._newest()
        if newest is not None and now <= newest:  # the clock was set back
            now = newest + timedelta(microseconds=1)
        return f"{self._path.stem}-{now.strftime(_TIME_FORMAT)}{self._path.suffix}"

    def _newest(self) -> datetime | None:
        for name in reversed(self._names(self._files())):
            matched = self._name.fullmatch(name)
            with contextlib.suppress(ValueError):  # the 31st of February
                if matched is not None:
                    return datetime.strptime(matched[2], _TIME_FORMAT).replace(tzinfo=UTC)
        return None

    def _names(self, files: list[Path]) -> list[str]:
        """Return the names of rotated files without ``.gz``, in the order of the stream."""
        matches = [self._name.fullmatch(path.name) for path in files]
        return sorted({one[1] for one in matches if one is not None and one[3] != _UNFINISHED})

    def _filled(self) -> list[Path]:
        return [path for path in self._files() if _size(path)]

    def _files(self) -> list[Path]:
        return [path for path in self._path.parent.iterdir() if self._name.fullmatch(path.name)]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _compress(path: Path) -> None:
    """Put a gzip file in the place of a file; whatever happens one of them is there, whole."""
    compressed = path.with_name(path.name + _COMPRESSED)
    with contextlib.suppress(FileNotFoundError), path.open("rb") as source:
        try:
            fcntl.flock(source, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another one is at it
            return
        if not compressed.exists():
            _write_whole(compressed, lambda descriptor: _compress_into(source.fileno(), descriptor))
        path.unlink(missing_ok=True)


def _write_whole(path: Path, write: Callable[[int], None]) -> None:
    """Make a file that has its name only when it is complete and durable."""
    unfinished = path.with_name(path.name.removesuffix(_COMPRESSED) + _UNFINISHED)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    descriptor = os.open(unfinished, flags, 0o640)
    try:
        write(descriptor)
        os.fsync(descriptor)
        unfinished.rename(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    sync_directory(path.parent)


def _compress_into(source: int, target: int) -> None:
    status = os.fstat(source)
    os.fchmod(target, status.st_mode & 0o777)
    with (
        os.fdopen(os.dup(source), "rb") as reader,
        os.fdopen(os.dup(target), "wb") as raw,
        gzip.GzipFile("", "wb", _COMPRESSION_LEVEL, raw, status.st_mtime) as writer,
    ):
        shutil.copyfileobj(reader, writer, _CHUNK_BYTES)
