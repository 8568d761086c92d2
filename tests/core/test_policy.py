"""How often, how long and at what pauses a change is tried."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walstream.backoff import Backoff
from walstream.policy import FailurePolicy, OnFailure, Retry


def policy(attempts: int = 3, deadline_seconds: float | None = None) -> FailurePolicy:
    return FailurePolicy(attempts, deadline_seconds, Backoff(1.0, 8.0))


def test_attempts_count_the_first_one_too() -> None:
    pauses = [policy().pause_seconds(attempt, ValueError(), 0) for attempt in (1, 2, 3, 4)]
    assert [pause is None for pause in pauses] == [False, False, True, True]


def test_pauses_become_longer() -> None:
    for attempt, longest in [(1, 1.0), (2, 2.0), (5, 8.0)]:
        pause = policy(10).pause_seconds(attempt, ValueError(), 0)
        assert pause is not None
        assert longest / 2 <= pause <= longest


@given(st.floats(0, 100), st.floats(0, 100))
def test_no_attempt_begins_after_the_deadline(elapsed: float, deadline: float) -> None:
    pause = policy(deadline_seconds=deadline).pause_seconds(1, ValueError(), elapsed)
    assert pause is None or elapsed + pause <= deadline
    assert (pause is not None) or elapsed + 1.0 > deadline


@pytest.mark.parametrize("delay", [0, 0.0, 3.5, 100])
def test_a_handler_may_choose_the_pause(delay: float) -> None:
    assert policy().pause_seconds(1, Retry(delay_seconds=delay), 0) == delay


def test_a_handler_that_asks_for_another_attempt_has_no_more_of_them() -> None:
    assert policy().pause_seconds(3, Retry(delay_seconds=1), 0) is None
    assert policy(deadline_seconds=5).pause_seconds(1, Retry(delay_seconds=6), 0) is None


def test_without_a_delay_the_pause_is_the_routes() -> None:
    pause = policy().pause_seconds(1, Retry("busy"), 0)
    assert pause is not None
    assert 0.5 <= pause <= 1.0
    assert str(Retry("busy")) == "busy"


@pytest.mark.parametrize("delay", [-1, -0.001, math.nan])
def test_a_delay_is_no_negative_time(delay: float) -> None:
    with pytest.raises(ValueError, match="a number of seconds, 0 or more"):
        Retry(delay_seconds=delay)


def test_by_default_the_stream_stops() -> None:
    assert FailurePolicy().on_failure is OnFailure.STOP
