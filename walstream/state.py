"""The state file: which cluster and position were confirmed last, across restarts.

It only helps to refuse: the slot's own record on the server says where to go on from. It is
written, durably, before a position is confirmed, once a second at most: so a slot that stands
beyond it was moved by somebody else. When it cannot be written it is removed, because an old one
would refuse what is right.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

import msgspec
import structlog

from walstream.errors import SetupError
from walstream.files import sync_directory
from walstream.lineage import Lineage
from walstream.lsn import Lsn
from walstream.worker import Worker

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.state")

STATE_DIRECTORY: Final = "STATE_DIRECTORY"
"""systemd's, for ``StateDirectory=``: the first of several, which are separated by colons."""


class _Content(msgspec.Struct, frozen=True):
    slot: str
    systemid: str
    timeline: int
    flush_lsn: str


def state_path(configured: Path | None, slot: str) -> Path | None:
    """Return where the state of a slot is kept; None when it is not kept."""
    if configured is not None:
        return configured
    folder = os.environ.get(STATE_DIRECTORY, "").partition(":")[0]
    return Path(folder, f"{slot}.json") if folder else None


async def note_given_up(path: Path | None, slot: str, flush_lsn: Lsn) -> None:
    """Record that somebody has given up, in so many words, what lies before a position.

    Raises:
        SetupError: the file cannot be read, or is that of another slot.
    """
    if path is None:
        return
    state = StateFile(path, slot)
    last = await state.load()
    if last is not None:
        await state.record(Lineage(last.systemid, last.timeline, flush_lsn))


class StateFile:
    """One slot's state. Two processes that stand by for each other may share it."""

    def __init__(self, path: Path, slot: str) -> None:
        self.path = path.absolute()
        self._slot = slot
        self._worker = Worker("walstream-state")
        self._recorded: Lineage | None = None
        self._failed = False

    async def load(self) -> Lineage | None:
        """Read what was confirmed last; None when there is no file yet.

        Raises:
            SetupError: the file cannot be read, or is that of another slot.
        """
        return await self._worker.call(self._load)

    async def record(self, lineage: Lineage) -> None:
        """Write down what is confirmed; a file that cannot be written is logged once."""
        if lineage == self._recorded:
            return
        try:
            await self._worker.call(self._write, lineage)
        except OSError as error:
            with contextlib.suppress(OSError):
                await self._worker.call(self.forget)
            if not self._failed:
                self._failed = True
                log.error(  # noqa: TRY400 - the reason says it all
                    "state_not_written",
                    path=str(self.path),
                    error=error.strerror,
                    hint="if the old file stays, a start may take for a gap what is none, and wants"
                    " --accept-gap then",
                )
        else:
            self._failed = False

    async def verify_writable(self) -> None:
        """Refuse a folder that the file cannot be written to.

        Raises:
            SetupError: with the reason.
        """
        try:
            await self._worker.call(self._try_folder)
        except OSError as error:
            raise SetupError(
                f"the state file {self.path} cannot be written: {error.strerror}",
                hint="path under [state], or STATE_DIRECTORY, must be in a folder that is there and"
                " may be written to",
            ) from None

    def forget(self) -> None:
        """Remove the file: what comes next begins anew."""
        self.path.unlink(missing_ok=True)
        self._recorded = None

    def _load(self) -> Lineage | None:
        try:
            content = msgspec.json.decode(self.path.read_bytes(), type=_Content)
            lineage = Lineage(content.systemid, content.timeline, Lsn.parse(content.flush_lsn))
        except FileNotFoundError:
            return None
        except OSError as error:
            message = f"the state file {self.path} cannot be read: {error.strerror}"
            raise SetupError(message) from None
        except (msgspec.MsgspecError, ValueError):
            message = f"{self.path} is not a state file of walstream's"
            raise SetupError(
                message, hint="move it away; walstream then begins at the slot's position"
            ) from None
        if content.slot != self._slot:
            message = f"the state file {self.path} is that of the slot {content.slot}"
            raise SetupError(message, hint="give each slot a file of its own: path under [state]")
        return lineage

    def _write(self, lineage: Lineage) -> None:
        content = _Content(self._slot, lineage.systemid, lineage.timeline, str(lineage.flush_lsn))
        # Never half a file: a reader sees the old one or the new one.
        written = self.path.with_name(f"{self.path.name}.{os.getpid()}.new")
        with written.open("wb") as file:
            file.write(msgspec.json.encode(content) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        written.replace(self.path)
        sync_directory(self.path.parent)
        self._recorded = lineage

    def _try_folder(self) -> None:
        probe = self.path.with_name(f"{self.path.name}.{os.getpid()}.new")
        probe.touch()
        probe.unlink()
