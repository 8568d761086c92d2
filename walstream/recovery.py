"""What the end of a session means: whether to go on, after which pause, and what to tell.

The one place where that is decided. `decide` is a single match over the tree of errors: what is
`Unavailable` is waited out, each kind in its own way; everything else ends the process, whose exit
code tells the supervisor whether to start it again.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

import msgspec

from walstream.backoff import Backoff
from walstream.errors import (
    DeliveryError,
    RoutesChanged,
    ServerFailed,
    ServerShutdown,
    SetupError,
    SlotBusy,
    Unavailable,
    WalstreamError,
)


class Action(StrEnum):
    """What follows the end of a session."""

    CONNECT = "connect"
    STAND_BY = "stand_by"
    LEAVE_ALONE = "leave_alone"
    STOP = "stop"


class Decision(msgspec.Struct, frozen=True):
    """An action, the pause before it, and the sentence that an operator reads in the log."""

    action: Action
    pause_seconds: float
    sentence: str


class Pauses(msgspec.Struct, frozen=True):
    """How long is waited, by what ended the session."""

    reconnect: Backoff
    after_shutdown_seconds: float
    standby_poll_seconds: float


SERVER_FAILURES: Final = 3
"""So often in a row the server may end the stream with an error of its own at one position.

Some of them pass, such as a full disk for what a decoder spills. One that does not, such as a row
too large for wal2json's text, comes at the same position each time.
"""


def decide(  # noqa: PLR0911 - one table
    reason: WalstreamError, failures: int, pauses: Pauses
) -> Decision:
    """Decide what follows.

    Args:
        reason: what ended the session, or the attempt at one.
        failures: how many times in a row that happened without any progress in between.
        pauses: as configured.
    """
    match reason:
        case RoutesChanged():
            return Decision(Action.CONNECT, 0.0, "it begins anew at once, from where it was")
        case SlotBusy():
            return Decision(
                Action.STAND_BY,
                pauses.standby_poll_seconds,
                "another process streams from the slot; this one takes over when it is free",
            )
        case ServerShutdown():
            return Decision(
                Action.LEAVE_ALONE,
                pauses.after_shutdown_seconds,
                "it is asked each second whether it is back, and connected to when it is",
            )
        case Unavailable():
            return Decision(
                Action.CONNECT,
                pauses.reconnect.pause_seconds(failures),
                "nothing is lost; it is tried again, after longer pauses each time",
            )
        case ServerFailed() if failures < SERVER_FAILURES:
            return Decision(
                Action.CONNECT,
                pauses.reconnect.pause_seconds(failures),
                "the server may have recovered; it is tried again a few times",
            )
        case ServerFailed():
            return _stop("the server fails at this position each time: somebody must look at it")
        case SetupError():
            return _stop("the configuration or the database must be changed first")
        case DeliveryError():
            return _stop("the slot stays before what was not taken, which comes again")
        case _:
            return _stop("the slot stays before what could not be read; please report it")


def _stop(sentence: str) -> Decision:
    return Decision(Action.STOP, 0.0, sentence)
