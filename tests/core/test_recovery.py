"""What follows the end of a session, for every error that there is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from walstream import errors
from walstream.backoff import Backoff
from walstream.errors import (
    DeliveryError,
    RoutesChanged,
    ServerFailed,
    ServerShutdown,
    SlotBusy,
    Unavailable,
    WalstreamError,
)
from walstream.recovery import SERVER_FAILURES, Action, Pauses, decide

PAUSES = Pauses(Backoff(0.5, 30.0), after_shutdown_seconds=10.0, standby_poll_seconds=1.0)


def kinds(kind: type[WalstreamError]) -> Iterator[type[WalstreamError]]:
    for one in kind.__subclasses__():
        if one.__module__ == errors.__name__:
            yield one
            yield from kinds(one)


@pytest.mark.parametrize("kind", list(kinds(WalstreamError)))
def test_what_is_unavailable_is_waited_out_and_nothing_else(kind: type[WalstreamError]) -> None:
    decision = decide(kind("it"), 1, PAUSES)
    waits = issubclass(kind, Unavailable) or kind is ServerFailed
    assert (decision.action is not Action.STOP) == waits
    assert decision.sentence


def test_who_may_start_again_is_told_by_the_exit_code() -> None:
    """What stops and may pass is tried again by a supervisor; what must be mended is not."""
    assert decide(DeliveryError("it"), 1, PAUSES).action is Action.STOP
    assert DeliveryError.exit_code == errors.EX_TEMPFAIL


@pytest.mark.parametrize(
    ("reason", "action", "seconds"),
    [
        (SlotBusy("it"), Action.STAND_BY, 1.0),
        (ServerShutdown("it"), Action.LEAVE_ALONE, 10.0),
        (RoutesChanged("it"), Action.CONNECT, 0.0),
    ],
)
def test_each_reason_has_its_own_pause(
    reason: WalstreamError, action: Action, seconds: float
) -> None:
    decision = decide(reason, 7, PAUSES)
    assert (decision.action, decision.pause_seconds) == (action, seconds)


def test_pauses_before_connecting_again_grow() -> None:
    pauses = [decide(Unavailable("it"), failures, PAUSES).pause_seconds for failures in (1, 4, 20)]
    assert 0.25 <= pauses[0] <= 0.5 < pauses[1] <= 4.0 < pauses[2] <= 30.0


def test_a_server_that_fails_at_one_position_is_given_up() -> None:
    actions = [decide(ServerFailed("it"), one, PAUSES).action for one in range(1, 5)]
    assert actions == [Action.CONNECT] * (SERVER_FAILURES - 1) + [Action.STOP] * 2
