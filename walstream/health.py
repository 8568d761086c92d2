"""Whether changes get through, whether a restart would help, and how far behind it is.

Asked from outside at any moment. What is measured here is time without progress: by a call that
does not end, a watermark that does not move, a server or a catalog that does not answer.
"""

from __future__ import annotations

from typing import Final

from walstream.acknowledger import Acknowledger
from walstream.delivery import Delivery
from walstream.stream import ASK_SECONDS, Session

ANSWER_SECONDS: Final = 2 * ASK_SECONDS
"""After so much silence the server has been asked for a sign of life, and has not given one."""

SOON_SECONDS: Final = 0.5
"""What has stood still for less is nothing to talk about."""


def stalled(session: Session, delivery: Delivery, now: float) -> tuple[float, str]:
    """Say how long changes have not got through although there is work, and why.

    Args:
        session: that streams.
        delivery: where it hands changes to.
        now: monotonic seconds.

    Returns:
        Seconds and a sentence; nothing for a sentence when it is not worth one.
    """
    silent_seconds = session.silent_seconds
    causes = [
        _stalled_delivery(session, delivery, now),
        (session.asking_seconds, "the catalog does not say what a table looks like"),
        (
            silent_seconds if silent_seconds > ANSWER_SECONDS else 0.0,
            "the server says nothing, although it was asked",
        ),
    ]
    seconds, because = max(causes)
    return seconds, "" if seconds < SOON_SECONDS else because


def stuck_seconds(session: Session | None, delivery: Delivery, now: float) -> float:
    """Say how long something has stood still that a new process would do anew.

    That is a call that does not end, or a watermark that no destination explains. What is tried
    again and again is moving: a restart would try the same.

    Args:
        session: that streams, if there is one.
        delivery: where changes are handed to.
        now: monotonic seconds.
    """
    held = delivery.held
    if held is not None:
        return now - held.since
    if session is None or delivery.stalled(now)[0]:
        return 0.0
    return session.standstill_seconds(now)


class Lag:
    """How old the oldest change is that is not acknowledged, as far as that is known."""

    def __init__(self, now: float) -> None:
        """Before anything has come it counts from now, in seconds since the Unix epoch."""
        self._caught_up_at = now

    def seconds(self, acknowledger: Acknowledger, now: float, *, is_streaming: bool) -> float:
        """Return its age by the server's clock, or how long ago there was none.

        Args:
            acknowledger: of the last session.
            now: seconds since the Unix epoch.
            is_streaming: whether nothing in flight means that all is acknowledged.
        """
        oldest = acknowledger.oldest
        if oldest is not None and oldest.transaction is not None:
            return max(0.0, now - oldest.transaction.commit_time.timestamp())
        if is_streaming:
            self._caught_up_at = now
        return max(0.0, now - self._caught_up_at)


def _stalled_delivery(session: Session, delivery: Delivery, now: float) -> tuple[float, str]:
    seconds, because = delivery.stalled(now)
    longest = max(seconds, session.standstill_seconds(now))
    if seconds < longest / 2:  # what a destination does not explain; both begin about together
        because = "changes wait, and the watermark stands still"
    return longest, because
