"""The standard output: one JSON object a line."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Sequence
from typing import Final

from walstream.changes import Change
from walstream.errors import OutputClosed
from walstream.worker import Worker


class StdoutSink:
    """Writes changes to the standard output.

    A change is taken when the operating system has its line: what becomes of it in a pipe is the
    reader's. Lines arrive whole; those that a failed call had written come again.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    async def open(self) -> None:
        """Nothing to make ready."""

    async def take(self, changes: Sequence[Change]) -> None:
        """Write the changes' lines.

        Raises:
            OSError: they could not all be written.
            OutputClosed: nobody reads them any more.
        """
        lines = b"".join([change.to_json() + b"\n" for change in changes])
        await write_stdout(lines)

    async def close(self) -> None:
        """Nothing to let go."""


async def write_stdout(lines: bytes) -> None:
    """Write whole lines to the standard output without holding up the event loop.

    Raises:
        OSError: they could not all be written.
        OutputClosed: the reader of the pipe is gone.
    """
    try:
        await _worker.call(_stdout.write, lines)
    except BrokenPipeError:
        message = "the standard output was closed by its reader"
        raise OutputClosed(message) from None


class _Output:
    """A file descriptor that gets whole lines: a line that a failed call tore is finished first.

    ``sys.stdout`` is passed by: unbuffered it may write less than it is given, and buffered it
    keeps and repeats a part of what failed.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._torn = b""

    def write(self, lines: bytes) -> None:
        self._write_all(self._torn)
        self._torn = b""
        self._flush_prints()
        self._write_all(lines)

    def _write_all(self, lines: bytes) -> None:
        """Write all, also in small pieces, and remember the rest of the line where that fails."""
        position = 0
        try:
            while position < len(lines):
                try:
                    position += os.write(self._descriptor, memoryview(lines)[position:])
                except BlockingIOError:
                    self._wait_until_writable()
        except OSError:
            if position > 0 and not lines.endswith(b"\n", 0, position):
                self._torn = lines[position : lines.index(b"\n", position) + 1]
            raise

    def _flush_prints(self) -> None:
        """Let out first what handlers have printed.

        The wait comes before the flush, which would wait while it holds a lock that Python needs
        to exit.
        """
        while sys.stdout is not None and not sys.stdout.closed:
            self._wait_until_writable()
            try:
                sys.stdout.flush()
            except BlockingIOError:
                continue
            return

    def _wait_until_writable(self) -> None:
        select.select([], [self._descriptor], [])


_stdout: Final = _Output(1)
_worker: Final = Worker("walstream-stdout")
