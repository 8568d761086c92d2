"""What becomes of a change that its destination does not take."""

from __future__ import annotations

import math
from enum import StrEnum

import msgspec

from walstream.backoff import Backoff


class OnFailure(StrEnum):
    """What is done with a change after the last attempt.

    ``stop`` ends the stream with the slot before the change. ``dead_letter`` keeps the change in
    the dead-letter store, ``skip`` gives it up; both go on with the next one.
    """

    STOP = "stop"
    DEAD_LETTER = "dead_letter"
    SKIP = "skip"


class Retry(Exception):
    """Raised by a handler that wants the change again, perhaps after a certain time.

    It counts as an attempt like any other exception; only the pause is the handler's choice.
    """

    def __init__(self, reason: str = "", *, delay_seconds: float | None = None) -> None:
        """Ask for another attempt.

        Args:
            reason: for the log, when it shows error messages.
            delay_seconds: how long to wait; None for the route's own pause.

        Raises:
            ValueError: the delay is negative.
        """
        if delay_seconds is not None and not 0 <= delay_seconds < math.inf:
            message = f"a delay is a number of seconds, 0 or more, not {delay_seconds}"
            raise ValueError(message)
        super().__init__(reason)
        self.delay_seconds = delay_seconds


class FailurePolicy(msgspec.Struct, frozen=True):
    """How often, how long and at what pauses a change is tried; what becomes of it then.

    ``attempts`` counts the first one too. ``deadline_seconds`` counts from the first attempt: when
    the next one would begin later, there is none.
    """

    attempts: int = 5
    deadline_seconds: float | None = None
    backoff: Backoff = Backoff(0.2, 30.0)
    on_failure: OnFailure = OnFailure.STOP

    def pause_seconds(
        self, attempt: int, error: BaseException, elapsed_seconds: float
    ) -> float | None:
        """Return the pause before the next attempt; None when there is none.

        Args:
            attempt: how many there were.
            error: what the last one raised.
            elapsed_seconds: since the first one began.
        """
        if attempt >= self.attempts:
            return None
        wished = error.delay_seconds if isinstance(error, Retry) else None
        pause = self.backoff.pause_seconds(attempt) if wished is None else wished
        if self.deadline_seconds is not None and elapsed_seconds + pause > self.deadline_seconds:
            return None
        return pause
