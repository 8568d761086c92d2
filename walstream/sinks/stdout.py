"""The standard output: one JSON object a line."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from walstream.changes import Change
from walstream.errors import OutputClosed


class StdoutSink:
    """Writes changes to the standard output.

    A change is taken when the operating system has its line: what becomes of it in a pipe is the
    reader's.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    async def open(self) -> None:
        """Nothing to make ready."""

    async def take(self, changes: Sequence[Change]) -> None:
        """Write the changes' lines and flush them.

        Raises:
            OutputClosed: nobody reads them any more.
        """
        lines = b"".join([change.to_json() + b"\n" for change in changes])
        await write_stdout(lines)

    async def close(self) -> None:
        """Nothing to let go."""


async def write_stdout(lines: bytes) -> None:
    """Write to the standard output without holding up the event loop.

    Raises:
        OutputClosed: the reader of the pipe is gone.
    """
    try:
        await asyncio.to_thread(_write, lines)
    except BrokenPipeError:
        message = "the standard output was closed by its reader"
        raise OutputClosed(message) from None


def _write(lines: bytes) -> None:
    sys.stdout.buffer.write(lines)
    sys.stdout.buffer.flush()
