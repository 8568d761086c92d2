"""Dead letters while the daemon runs: which there are, and one replay at a time.

A replay here is the one of ``walstream dead-letters replay``: it has a catalog connection, sinks
and calls of its own beside those of the stream, and keeps other processes from replaying meanwhile.
So a handler may be called for a letter while it is called for another row's change. A sink that
wants what it writes to for itself cannot be replayed to while the stream has it; its letters stay.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Final, Protocol

import msgspec
import structlog

from walstream.dead_letters import LetterQuery, StoredLetter
from walstream.errors import ReplayRuns, WalstreamError
from walstream.logs import type_and_place

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.gateway")

_WAIT: Final = "wait until it has ended, then try again"


class Report(Protocol):
    """What became of one route's letters (`walstream.replay.RouteReport`)."""

    @property
    def route(self) -> str:
        """Its name."""

    @property
    def delivered(self) -> int:
        """How many are gone."""

    @property
    def failed(self) -> int:
        """How many have failed again."""

    @property
    def left(self) -> int:
        """How many are left, those that failed among them."""

    @property
    def added(self) -> int:
        """How many were not asked for, and belong to others."""

    @property
    def reason(self) -> str:
        """Why none was tried."""


class Replaying(Protocol):
    """One replay (`walstream.replay.Replay`)."""

    @property
    def is_busy(self) -> bool:
        """Whether a handler's function still runs although `run` has returned."""

    def stop(self) -> None:
        """Finish what is being delivered."""

    def run(
        self, query: LetterQuery, confirm: Callable[[Sequence[StoredLetter]], None]
    ) -> Awaitable[Sequence[Report]]:
        """Deliver letters, and return what became of them."""


class Letters(Protocol):
    """Where letters are kept (`walstream.parking.Parking`)."""

    async def letters(self, query: LetterQuery) -> list[StoredLetter]:
        """Return letters in the order of the stream, without their changes."""

    async def count(self) -> int:
        """Return how many there are."""


class ReplayState(msgspec.Struct):
    """How the last replay stands: begun, and perhaps ended, with reports or an error."""

    begun_at: datetime
    running: bool = True
    letters: int | None = None
    ended_at: datetime | None = None
    reports: Sequence[Report] = ()
    error: str = ""
    hint: str = ""


class Desk:
    """Shows dead letters, and has them delivered again."""

    def __init__(
        self, letters: Callable[[], Letters | None], make_replay: Callable[[], Replaying]
    ) -> None:
        """Begin nothing.

        Args:
            letters: the store as the daemon has it open; None where no route has dead letters.
            make_replay: of the configuration that holds now; it may raise a WalstreamError.
        """
        self._letters = letters
        self._make_replay = make_replay
        self._replay: Replaying | None = None
        self._running: asyncio.Task[None] | None = None
        self.state: ReplayState | None = None
        """The last replay, if there was one in this process."""

    async def show(self, query: LetterQuery) -> tuple[list[StoredLetter], int]:
        """Return letters without their changes, and how many there are in all.

        Raises:
            DeadLetterStoreFailed: they cannot be read.
        """
        letters = self._letters()
        if letters is None:
            return [], 0
        return await letters.letters(query), await letters.count()

    def replay(self, query: LetterQuery) -> ReplayState:
        """Begin to deliver letters again; `state` tells how it goes.

        Raises:
            ReplayRuns: one has not ended yet.
            WalstreamError: it cannot be made.
        """
        if self._running is not None and not self._running.done():
            raise ReplayRuns("a replay runs already", hint=_WAIT)
        if self._replay is not None and self._replay.is_busy:
            message = "a handler's function that the last replay has called still runs"
            raise ReplayRuns(message, hint=_WAIT)
        self._replay = self._make_replay()
        self.state = ReplayState(datetime.now(UTC))
        self._running = asyncio.create_task(self._run(self._replay, query, self.state))
        return self.state

    async def close(self, drain_seconds: float) -> None:
        """Let a replay finish what it is delivering, but not wait for longer."""
        if self._running is None:
            return
        if self._replay is not None:
            self._replay.stop()
        await asyncio.wait([self._running], timeout=drain_seconds)
        self._running.cancel()
        await asyncio.wait([self._running])

    async def _run(self, replay: Replaying, query: LetterQuery, state: ReplayState) -> None:
        def found(letters: Sequence[StoredLetter]) -> None:
            state.letters = len(letters)
            log.info("dead_letters_replaying", letters=len(letters))

        try:
            state.reports = await replay.run(query, found)
        except WalstreamError as error:
            state.error, state.hint = error.message, error.hint
            # Without the trace: who asked is told, and the letters are where they were.
            log.error("dead_letters_replay_failed", error=error.message, hint=error.hint)  # noqa: TRY400
        except Exception as error:  # noqa: BLE001 - a bug of ours must not end the stream
            state.error = type_and_place(error)
            log.error("dead_letters_replay_failed", error=state.error, hint="")  # noqa: TRY400
        else:
            log.info(
                "dead_letters_replayed",
                delivered=sum(report.delivered for report in state.reports),
                left=sum(report.left for report in state.reports),
            )
        finally:
            state.running = False
            state.ended_at = datetime.now(UTC)
