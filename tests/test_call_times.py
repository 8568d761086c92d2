"""How long calls take, and what is said of a change that is held up."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import Any, Final

import pytest

from tests.lines import QUICK, Line, Recorder, called, handler
from tests.postgres import async_wait_until
from tests.test_outlets import KINDS, SKIP
from walstream.backoff import Backoff
from walstream.calls import CallClock
from walstream.changes import Change
from walstream.delivery import Delivery, Limits
from walstream.destinations import Handler
from walstream.errors import HandlerFailed, TargetUnavailable
from walstream.parking import Parking
from walstream.policy import FailurePolicy, OnFailure
from walstream.typed import RowModel
from walstream.vitals import CALL_SECONDS_BOUNDS, CallTimes, DestinationVitals

SLOW_SECONDS: Final = 0.12
PATIENT: Final = FailurePolicy(5, None, Backoff(3600, 3600))


class MemorySink:
    def __init__(self, name: str = "memory") -> None:
        self.name = name
        self.may_take = asyncio.Event()

    async def open(self) -> None:
        """Nothing to make ready."""

    async def close(self) -> None:
        """Nothing to let go."""

    async def take(self, changes: Sequence[Change]) -> None:
        if any(called(change) == "slow" for change in changes):
            await asyncio.sleep(SLOW_SECONDS)
        if any(called(change) == "held" for change in changes):
            await self.may_take.wait()


def vitals(line: Line) -> DestinationVitals:
    [destination] = line.delivery.destinations()
    return destination


def calls(line: Line) -> CallTimes:
    return vitals(line).calls


def counted(line: Line) -> tuple[int, int]:
    """How many calls there were, and how many of them took long."""
    counts = calls(line).counts
    bound = max(place for place, bound in enumerate(CALL_SECONDS_BOUNDS) if bound < SLOW_SECONDS)
    return sum(counts), sum(counts[bound + 1 :])


# ---- How long calls take


@pytest.mark.parametrize(
    ("seconds", "place"),
    [(0.0, 0), (0.001, 0), (0.0011, 1), (0.0025, 1), (30.0, 13), (30.1, 14), (1e9, 14)],
)
def test_a_bound_belongs_to_its_bucket_as_prometheus_has_it(seconds: float, place: int) -> None:
    clock = CallClock()
    clock.add(seconds)
    times = CallClock.together([clock])
    assert [number for number, count in enumerate(times.counts) if count] == [place]
    assert (len(times.counts), times.total_seconds) == (len(CALL_SECONDS_BOUNDS) + 1, seconds)


@pytest.mark.parametrize("kind", [*KINDS, "sync", "sync lanes", "sync batch", "sink"])
async def test_each_call_is_timed(kind: str) -> None:
    def in_thread(item: Any) -> None:
        changes = item if isinstance(item, list) else [item]
        if any(called(change) == "slow" for change in changes):
            time.sleep(SLOW_SECONDS)

    async def in_loop(item: Any) -> None:
        changes = item if isinstance(item, list) else [item]
        if any(called(change) == "slow" for change in changes):
            await asyncio.sleep(SLOW_SECONDS)

    options: dict[str, dict[str, Any]]
    options = {"sync": {}, "sync lanes": {"concurrency": 2}, "sync batch": {"batch": 2}}
    destination: Any = MemorySink()
    if kind in options:
        destination = handler(in_thread, **options[kind])
    elif kind != "sink":
        destination = handler(in_loop, **KINDS[kind])
    line = Line(destination)
    line.commit("a b", "slow c", "d e")
    await line.deliver()
    expected = 1 if kind == "sink" else 3 if kind in ("batch", "sync batch", "transactions") else 6
    assert counted(line) == (expected, 1)
    assert SLOW_SECONDS <= calls(line).total_seconds < 1


@pytest.mark.parametrize("kind", [*KINDS, "sync"])
async def test_calls_that_fail_are_timed_too(kind: str) -> None:
    recorder = Recorder(a=[ValueError()] * 2)
    destination = handler(
        recorder.in_thread if kind == "sync" else recorder.in_loop, **KINDS.get(kind, {})
    )
    line = Line(destination, policy=QUICK)
    line.commit("a b")
    await line.deliver()
    assert sum(calls(line).counts) == len(recorder.calls)


async def test_what_comes_before_a_call_is_not_its_time() -> None:
    """Waiting until the change is visible, and making the model."""

    class Slow(RowModel[Any]):
        def __init__(self) -> None:
            """No type: `apply` is all that is asked for."""

        def apply(self, change: Change[Any]) -> Change[Any]:
            time.sleep(SLOW_SECONDS)
            return change

    async def wait(_: int) -> None:
        await asyncio.sleep(SLOW_SECONDS)

    recorder = Recorder()
    for options in ({"visible": True}, {"model": Slow()}):
        line = Line(handler(recorder.in_loop, **options), wait_until_visible=wait)
        line.commit("a", "b c")
        await line.deliver()
        assert counted(line) == (3, 0)
        assert calls(line).total_seconds < SLOW_SECONDS


async def test_destinations_of_one_name_are_told_together() -> None:
    recorder = Recorder()
    one, another, other = (handler(recorder.in_loop, name) for name in ("greet", "greet", "other"))
    line = Line(one, another, other)
    line.commit("a b")
    line.commit("c", to=another)
    line.commit("d", to=other)
    await line.deliver()
    greet, rest = line.delivery.destinations()
    assert (greet.name, greet.delivered, sum(greet.calls.counts)) == ("greet", 3, 3)
    assert (rest.name, rest.delivered, sum(rest.calls.counts)) == ("other", 1, 1)


# ---- What is held up


async def test_nothing_is_held_where_nothing_is_called() -> None:
    line = Line(handler(Recorder().in_loop, batch=9, linger_seconds=3600))
    assert line.delivery.stalled(time.monotonic() + 9) == (0.0, "")
    line.commit("a")
    async with line.session():
        await asyncio.sleep(0)
        assert line.delivery.in_flight == 1  # and lingers for more
        assert line.delivery.stalled(time.monotonic() + 9) == (0.0, "")
    assert line.delivery.stalled(time.monotonic() + 9) == (0.0, "")
    assert Delivery([], Limits()).stalled(9) == (0.0, "")


@pytest.mark.parametrize("kind", [*KINDS, "sync", "sink"])
async def test_a_call_that_lasts_is_told(kind: str) -> None:
    entered, opened = threading.Event(), threading.Event()

    def in_thread(_: Change) -> None:
        entered.set()
        opened.wait(10)

    async def in_loop(_: Any) -> None:
        entered.set()
        await async_wait_until(opened.is_set)

    sink = MemorySink("orders")
    destination: Any = sink
    if kind != "sink":
        function = in_thread if kind == "sync" else in_loop
        destination = handler(function, "greet", **KINDS.get(kind, {}))
    line = Line(destination)
    line.commit("held b")
    async with line.session():
        await async_wait_until(lambda: entered.is_set() or line.delivery.held is not None)
        seconds, because = line.delivery.stalled(time.monotonic() + 60)
        name = "sink orders" if kind == "sink" else "handler greet"
        assert 60 <= seconds < 61
        assert because == f"{name} has held change 0/64:1 for {seconds:.0f} s"
        assert 0 <= vitals(line).held_seconds < 1
        opened.set()
        sink.may_take.set()
    assert vitals(line).held_seconds == 0


async def test_a_retry_is_held_from_the_first_attempt_on_also_while_it_pauses() -> None:
    entered, opened = asyncio.Event(), asyncio.Event()
    attempts = 0

    async def function(_: Change) -> None:
        nonlocal attempts
        attempts += 1
        if attempts < 3:
            raise ValueError
        entered.set()
        await opened.wait()

    line = Line(handler(function, "greet"), policy=FailurePolicy(5, None, Backoff(0.05, 0.05)))
    line.commit("a")
    began = time.monotonic()
    async with line.session():
        await async_wait_until(lambda: line.counts.retries == 1)
        assert line.delivery.held is None  # no call lasts
        seconds, because = line.delivery.stalled(began + 60)
        assert 59 < seconds <= 60
        assert because == "handler greet has held change 0/64:1 for 60 s (1 of 5 attempts failed)"
        await entered.wait()
        seconds, because = line.delivery.stalled(began + 60)
        assert 59 < seconds <= 60  # and not since this attempt
        assert because == "handler greet has held change 0/64:1 for 60 s (attempt 3 of 5)"
        opened.set()
    assert line.delivery.stalled(began + 60) == (0.0, "")


@pytest.mark.parametrize("kind", [*KINDS, "sync"])
async def test_a_pause_of_any_kind_of_handler_is_told_and_ends_with_its_session(kind: str) -> None:
    recorder = Recorder(a=[ValueError()] * 9)
    function = recorder.in_thread if kind == "sync" else recorder.in_loop
    line = Line(handler(function, **KINDS.get(kind, {})), policy=PATIENT)
    line.commit("a b")
    async with line.session():
        await async_wait_until(lambda: line.counts.retries == 1)
        _, because = line.delivery.stalled(time.monotonic())
        assert because.endswith("has held change 0/64:1 for 0 s (1 of 5 attempts failed)")
        line.delivery.begin_no_more()
    assert line.delivery.stalled(time.monotonic()) == (0.0, "")


async def test_of_several_the_one_that_is_held_longest_is_told() -> None:
    opened = asyncio.Event()

    async def wait(_: Change) -> None:
        await opened.wait()

    one, other = handler(wait, "one"), handler(wait, "other", concurrency=3)
    line = Line(one, other)
    async with line.session():
        line.commit("a", "b", to=other)
        line.hand()
        await async_wait_until(lambda: line.delivery.held is not None)
        line.commit("c")
        line.hand()
        await async_wait_until(lambda: vitals_of(line, "one").held_seconds > 0)
        _, because = line.delivery.stalled(time.monotonic())
        assert because.startswith("handler other has held change 0/64:1 for")
        assert vitals_of(line, "other").held_seconds > vitals_of(line, "one").held_seconds
        opened.set()


def vitals_of(line: Line, name: str) -> DestinationVitals:
    [found] = [one for one in line.delivery.destinations() if one.name == name]
    return found


async def test_a_message_that_is_held_is_called_so() -> None:
    opened = asyncio.Event()

    async def wait(_: Any) -> None:
        await opened.wait()

    line = Line(handler(wait))
    line.message("x")
    async with line.session():
        await async_wait_until(lambda: line.delivery.held is not None)
        _, because = line.delivery.stalled(time.monotonic())
        assert because == "handler handler has held message 0/64 for 0 s"
        opened.set()


@pytest.mark.parametrize("options", [{}, {"batch": 2}])
async def test_waiting_for_other_sessions_to_see_a_change_is_told(options: dict[str, Any]) -> None:
    asked, seen = asyncio.Event(), asyncio.Event()

    async def wait(_: int) -> None:
        asked.set()
        await seen.wait()

    line = Line(handler(Recorder().in_loop, visible=True, **options), wait_until_visible=wait)
    line.commit("a")
    async with line.session():
        await asked.wait()
        _, because = line.delivery.stalled(time.monotonic())
        assert because == (
            "handler handler has held change 0/64:1 for 0 s (until other sessions see it)"
        )
        seen.set()


async def test_waiting_for_the_dead_letter_store_is_told() -> None:
    asked, stored = asyncio.Event(), asyncio.Event()

    class Store:
        async def add(self, _: Sequence[Any]) -> None:
            asked.set()
            await stored.wait()

        async def park(self, letters: Sequence[Any], *, together: bool) -> list[bool]:
            assert together
            asked.set()
            await stored.wait()
            return [True] * len(letters)

    parking = Parking(Store())  # type: ignore[arg-type]
    policy = FailurePolicy(1, None, QUICK.backoff, OnFailure.DEAD_LETTER)
    recorder = Recorder(a=[ValueError()])
    line = Line(handler(recorder.in_loop), policy=policy, parking=parking)
    for what in ("put into the dead-letter store", "being parked"):
        asked.clear()
        stored.clear()
        line.commit("a")
        async with line.session():
            await asked.wait()
            _, because = line.delivery.stalled(time.monotonic())
            assert because.endswith(f"for 0 s (it is {what})")
            stored.set()
    assert (line.counts.dead_lettered, line.counts.parked) == (1, 1)


async def test_a_target_that_is_away_is_told_and_is_no_attempt() -> None:
    """Also when the change itself has failed before."""
    errors: list[BaseException] = [ValueError(), TargetUnavailable("away")]
    line = Line(
        handler(Recorder(a=errors).in_loop),
        policy=FailurePolicy(5, None, Backoff(0.05, 0.05)),
    )
    line.commit("a")
    told = set()
    async with line.session():
        while line.taken < 100:
            told.add(line.delivery.stalled(time.monotonic())[1].partition("(")[2])
            await asyncio.sleep(0.001)
    assert {"1 of 5 attempts failed)", "its database cannot be used)"} <= told


# ---- After a reload


async def test_another_delivery_counts_on_for_the_same_destination() -> None:
    recorder = Recorder(b=[ValueError()] * 2)
    destination = handler(recorder.in_loop)
    line = Line(destination, policy=SKIP)
    line.commit("a b")
    await line.deliver()
    before = line.delivery
    line.delivery = Delivery([destination, handler(recorder.in_loop, "new")], Limits())
    line.delivery.adopt(before)
    before.close()
    line.commit("c")
    await line.deliver()
    one, new = line.delivery.destinations()
    assert (one.delivered, one.skipped, sum(one.calls.counts)) == (2, 1, 4)
    assert (new.delivered, sum(new.calls.counts)) == (0, 0)


@pytest.mark.parametrize("concurrency", [1, 3])
async def test_a_function_that_still_runs_is_not_called_by_another_delivery(
    concurrency: int,
) -> None:
    """Nor is it forgotten that it runs, and where it stands."""
    entered, opened = threading.Event(), threading.Event()
    running = most = 0

    def hold(_: Change) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        entered.set()
        opened.wait(10)
        running -= 1

    destination: Handler = handler(hold, concurrency=concurrency)
    line = Line(destination)
    line.commit("a")
    async with line.session() as session:
        await async_wait_until(entered.is_set)
        session.cancel()
        await asyncio.wait([session])
    before = line.delivery
    line.delivery = Delivery([destination], Limits())
    line.delivery.adopt(before)
    before.close()
    assert line.delivery.is_busy
    assert line.delivery.stalled(time.monotonic())[1].startswith("handler handler has held")
    line.commit("a")
    async with line.session():
        await asyncio.sleep(0.05)
        assert most == 1
        opened.set()
    assert (most, line.counts.delivered) == (1, 1)
    line.delivery.close()


async def test_a_failure_that_stops_the_stream_leaves_nothing_held() -> None:
    line = Line(handler(Recorder(a=[ValueError()] * 9).in_loop), policy=QUICK)
    line.commit("a")
    with pytest.raises(HandlerFailed):
        await line.deliver()
    assert line.delivery.stalled(time.monotonic()) == (0.0, "")
