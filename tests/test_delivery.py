"""Running handlers and feeding sinks: order, retries, and what is taken."""

from __future__ import annotations

import asyncio
import functools
import operator
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests import postgres
from walstream.acknowledger import Acknowledger, Ticket
from walstream.backoff import Backoff
from walstream.changes import Change, Layout, Operation, Relation, Transaction
from walstream.delivery import Delivery, Limits
from walstream.destinations import Handler, HandlerFunction, HandlerOptions, Sink
from walstream.errors import HandlerFailed, OutputClosed, SinkFailed
from walstream.flow import Handed
from walstream.lsn import Lsn
from walstream.policy import FailurePolicy
from walstream.router import Route, TablePattern
from walstream.values import Types

LAYOUT = Layout(Relation("public", "t"), [], [], [], Types(lambda _: bytes))
QUICK = FailurePolicy(attempts=3, backoff=Backoff(0.001, 0.001))


class MemorySink:
    """Keeps changes in a list; fails as often as it is told."""

    def __init__(self, *failures: Exception) -> None:
        self.name = "memory"
        self.failures = list(failures)
        self.taken: list[str] = []
        self.calls = 0

    async def open(self) -> None:
        """Nothing to make ready."""

    async def take(self, changes: Sequence[Change]) -> None:
        self.calls += 1
        if self.failures:
            raise self.failures.pop(0)
        self.taken += [change.id for change in changes]

    async def close(self) -> None:
        """Nothing to let go."""


class Line:
    """Changes on their way: each ``transaction`` hands some to destinations."""

    def __init__(self) -> None:
        self.acknowledger = Acknowledger(Lsn(0))
        self.handed: list[Handed] = []
        self.policy = QUICK
        self.options: dict[str, Any] = {}
        self.end = 0
        self._delivery: Delivery | None = None

    def transaction(self, *destinations: Handler | Sink) -> Ticket:
        self.end += 100
        ticket = self.acknowledger.open(Lsn(self.end))
        transaction = Transaction(1, Lsn(self.end - 10), Lsn(self.end), "2026-01-01 00:00:00+00")
        for ordinal, destination in enumerate(destinations, 1):
            route = Route("route", TablePattern(None, None), destination, policy=self.policy)
            change = Change(Operation.TRUNCATE, LAYOUT, transaction, ordinal)
            self.acknowledger.hand(ticket)
            self.handed.append((route, change, ticket, 100))
        self.acknowledger.close(ticket)
        return ticket

    @property
    def delivery(self) -> Delivery:
        """To all destinations that were handed something; made once."""
        if self._delivery is None:
            destinations = dict.fromkeys(route.destination for route, _, _, _ in self.handed)
            self._delivery = Delivery(destinations, Limits(), **self.options)
        return self._delivery

    async def deliver(self) -> None:
        """Deliver what was handed until now, in one session."""
        self.delivery.attach(self.acknowledger)
        self.delivery.hand(self.handed)
        self.delivery.finish()
        try:
            await self.delivery.run()
        finally:
            self.delivery.close()


@pytest.fixture
def line() -> Line:
    return Line()


async def test_async_and_sync_handlers_are_called_in_commit_order(line: Line) -> None:
    """Each by itself; a sync one in one thread that is not the loop's."""
    calls: dict[str, list[str]] = {"async": [], "sync": []}
    threads: set[int] = set()

    async def in_loop(change: Change) -> None:
        await asyncio.sleep(0)
        calls["async"].append(change.id)

    def in_thread(change: Change) -> None:
        threads.add(threading.get_ident())
        calls["sync"].append(change.id)

    a, s = Handler(in_loop), Handler(in_thread)
    line.transaction(a, s, s, a)
    line.transaction(s, a)
    await line.deliver()
    assert calls == {
        "async": ["0/64:1", "0/64:4", "0/C8:2"],
        "sync": ["0/64:2", "0/64:3", "0/C8:1"],
    }
    assert len(threads) == 1
    assert threads != {threading.get_ident()}
    assert (line.delivery.delivered, line.acknowledger.flush_lsn) == (6, 200)


async def test_a_transaction_is_acknowledged_before_the_next_one_is_delivered(line: Line) -> None:
    seen = []

    async def look(change: Change) -> None:
        seen.append(int(line.acknowledger.flush_lsn))

    handler = Handler(look)
    for _ in range(3):
        line.transaction(handler)
    await line.deliver()
    assert seen == [0, 100, 200]


@pytest.mark.parametrize("kind", ["async", "sync", "own cancellation"])
async def test_a_handler_that_raises_is_called_again(line: Line, kind: str) -> None:
    attempts = []

    def fail_twice(change: Change) -> None:
        attempts.append(change.id)
        if len(attempts) < 3:
            raise asyncio.CancelledError if kind == "own cancellation" else ValueError

    async def fail_twice_in_the_loop(change: Change) -> None:
        fail_twice(change)

    line.transaction(Handler(fail_twice if kind == "sync" else fail_twice_in_the_loop))
    await line.deliver()
    assert attempts == ["0/64:1"] * 3
    assert (line.delivery.retries, line.delivery.delivered, line.acknowledger.flush_lsn) == (
        2,
        1,
        100,
    )


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_after_the_last_attempt_the_slot_stays_before_the_transaction(
    line: Line, kind: str
) -> None:
    """What came before is taken; other destinations finish what they have begun, and no more."""
    calls = []
    sink = MemorySink()

    def poisoned(change: Change) -> None:
        calls.append(change.id)
        if change.id == "0/C8:2":
            raise ValueError("a row value")

    async def poisoned_in_the_loop(change: Change) -> None:
        poisoned(change)

    handler = Handler(poisoned if kind == "sync" else poisoned_in_the_loop, name="poisoned")
    line.transaction(handler, sink)
    line.transaction(sink, handler, sink)
    line.transaction(handler)
    with pytest.raises(HandlerFailed) as failed:
        await line.deliver()
    assert calls == ["0/64:1", "0/C8:2", "0/C8:2", "0/C8:2"]
    assert sink.taken == ["0/64:2", "0/C8:1", "0/C8:3"]
    assert line.acknowledger.flush_lsn == 100
    assert "poisoned did not take change 0/C8:2 in 3 attempts: ValueError at " in str(failed.value)
    assert "a row value" not in str(failed.value)


async def test_error_messages_are_shown_when_that_is_asked_for(line: Line) -> None:
    async def poisoned(change: Change) -> None:
        raise ValueError("a row value")

    line.transaction(Handler(poisoned))
    line.options["show_error_messages"] = True
    with pytest.raises(HandlerFailed, match="a row value"):
        await line.deliver()


async def test_a_sink_takes_a_batch_at_once_and_is_tried_again(line: Line) -> None:
    sink = MemorySink(OSError(28, "No space left on device"), SinkFailed("not now"))
    line.transaction(sink, sink)
    line.transaction(sink)
    await line.deliver()
    assert sink.calls == 3
    assert sink.taken == ["0/64:1", "0/64:2", "0/C8:1"]
    assert line.acknowledger.flush_lsn == 200


async def test_a_sink_that_keeps_failing_stops_the_stream(line: Line) -> None:
    line.transaction(MemorySink(*[OSError(28, "No space left on device")] * 3))
    with pytest.raises(SinkFailed, match="memory did not take change 0/64:1 in 3 attempts"):
        await line.deliver()
    assert line.acknowledger.flush_lsn == 0


async def test_an_output_that_nobody_reads_is_not_tried_again(line: Line) -> None:
    sink = MemorySink(OutputClosed("closed"))
    line.transaction(sink)
    with pytest.raises(OutputClosed):
        await line.deliver()
    assert sink.calls == 1


@pytest.mark.parametrize("kind", ["async", "sync", "lanes", "sink"])
async def test_a_stop_finishes_the_transactions_that_are_begun(line: Line, kind: str) -> None:
    calls: list[str] = []

    def stop(change: Change) -> None:
        calls.append(change.id)
        line.delivery.begin_no_more()

    async def stop_in_the_loop(change: Change) -> None:
        stop(change)
        await asyncio.sleep(0)

    class StoppingSink(MemorySink):
        async def take(self, changes: Sequence[Change]) -> None:
            calls.extend(change.id for change in changes)
            line.delivery.begin_no_more()

    destination: Handler | Sink
    match kind:
        case "async":
            destination = Handler(stop_in_the_loop)
        case "sync":
            destination = Handler(stop)
        case "lanes":
            destination = Handler(stop_in_the_loop, options=HandlerOptions(concurrency=2))
        case _:
            destination = StoppingSink()
    line.transaction(destination, destination)
    line.transaction(destination)
    await line.deliver()
    expected = ["0/64:1", "0/64:2"]
    # A sink that is given both transactions at once has begun both.
    assert calls == ([*expected, "0/C8:1"] if kind == "sink" else expected)
    assert line.acknowledger.flush_lsn == (200 if kind == "sink" else 100)


async def test_a_cancellation_of_ours_passes_through_a_handler(line: Line) -> None:
    started = asyncio.Event()

    async def wait(change: Change) -> None:
        started.set()
        await asyncio.Event().wait()

    line.transaction(Handler(wait, name="waiting"))
    task = asyncio.create_task(line.deliver())
    await started.wait()
    held = line.delivery.held
    assert held is not None
    assert (held.destination, held.change_id) == ("waiting", "0/64:1")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert line.acknowledger.flush_lsn == 0


@pytest.mark.parametrize("ending", ["returns", "raises"])
async def test_a_handler_cannot_swallow_our_cancellation(line: Line, ending: str) -> None:
    """What it took by returning is taken; it is not called again, and nothing after it is begun."""
    calls: list[str] = []
    started = asyncio.Event()

    async def swallow(change: Change) -> None:
        calls.append(change.id)
        if len(calls) > 1:
            return
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if ending == "raises":
                raise RuntimeError from None

    handler = Handler(swallow)
    line.transaction(handler)
    line.transaction(handler)
    task = asyncio.create_task(line.deliver())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert calls == ["0/64:1"]
    taken = ending == "returns"
    assert (line.delivery.delivered, line.acknowledger.flush_lsn) == (int(taken), 100 * taken)


async def test_a_retry_that_swallows_our_cancellation_is_the_last_one(line: Line) -> None:
    calls: list[str] = []
    retried = asyncio.Event()

    async def swallow(change: Change) -> None:
        calls.append(change.id)
        if len(calls) != 2:
            raise ValueError
        retried.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise ValueError from None

    line.transaction(Handler(swallow))
    task = asyncio.create_task(line.deliver())
    await retried.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(calls) == 2


@pytest.mark.parametrize("ending", ["returns", "raises"])
async def test_a_sink_cannot_swallow_our_cancellation(line: Line, ending: str) -> None:
    class Swallowing(MemorySink):
        async def take(self, changes: Sequence[Change]) -> None:
            await super().take(changes)
            if self.calls > 1:
                return
            started.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if ending == "raises":
                    raise OSError from None

    started = asyncio.Event()
    sink = Swallowing()
    line.transaction(sink)
    task = asyncio.create_task(line.deliver())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (sink.calls, line.delivery.retries) == (1, 0)
    assert line.acknowledger.flush_lsn == 100 * (ending == "returns")


async def test_a_timeout_of_the_handlers_own_is_no_cancellation_of_ours(line: Line) -> None:
    calls = []

    async def slow_once(change: Change) -> None:
        calls.append(change.id)
        async with asyncio.timeout(0 if len(calls) == 1 else None):
            await asyncio.sleep(0)

    line.transaction(Handler(slow_once))
    await line.deliver()
    assert (len(calls), line.delivery.retries) == (2, 1)


class Gate:
    """A sync handler that waits, from its ``closed_at``-th call on, until it is opened."""

    def __init__(self, closed_at: int = 1) -> None:
        self.closed_at = closed_at
        self.calls: list[str] = []
        self.called_at: list[float] = []
        self.entered = threading.Event()
        self.opened = threading.Event()

    def __call__(self, change: Change) -> None:
        self.calls.append(change.id)
        self.called_at.append(time.monotonic())
        if len(self.calls) < self.closed_at:
            raise ValueError
        self.entered.set()
        self.opened.wait(10)

    async def wait(self) -> None:
        await asyncio.to_thread(self.entered.wait, 10)


async def test_a_run_of_sync_calls_that_was_given_up_ends_with_the_call_in_hand(
    line: Line,
) -> None:
    """The next session waits until it has returned."""
    gate = Gate()
    line.transaction(*[Handler(gate)] * 5)
    task = asyncio.create_task(line.deliver())
    await gate.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert line.delivery.is_busy
    assert line.delivery.held is not None
    gate.opened.set()
    await postgres.async_wait_until(lambda: not line.delivery.is_busy)
    assert gate.calls == ["0/64:1"]
    assert (line.delivery.delivered, line.acknowledger.flush_lsn) == (0, 0)


async def test_a_session_waits_for_the_sync_call_that_the_last_one_gave_up(line: Line) -> None:
    gate = Gate()
    line.transaction(*[Handler(gate)] * 2)
    delivery = line.delivery
    delivery.attach(line.acknowledger)
    delivery.hand(line.handed)
    task = asyncio.create_task(delivery.run())
    await gate.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    task = asyncio.create_task(line.deliver())
    await asyncio.sleep(0)
    held = delivery.held
    assert held is not None
    assert held.change_id == "0/64:1"
    gate.opened.set()
    await task
    assert gate.calls == ["0/64:1", "0/64:1", "0/64:2"]


async def test_the_retry_of_a_sync_handler_is_seen_to_run(line: Line) -> None:
    """It counts as busy, and what it holds is told."""
    gate = Gate(closed_at=2)
    line.transaction(Handler(gate, name="gate"))
    task = asyncio.create_task(line.deliver())
    await gate.wait()
    busy = [line.delivery.is_busy]
    held = line.delivery.held
    assert held is not None
    assert (held.destination, held.change_id) == ("gate", "0/64:1")
    assert held.since <= gate.called_at[1]
    gate.opened.set()
    await task
    assert [*busy, line.delivery.is_busy] == [True, False]
    assert gate.calls == ["0/64:1"] * 2


@pytest.mark.parametrize("error", [StopIteration, asyncio.CancelledError, OSError])
async def test_whatever_a_sync_handler_raises_is_its_failure(
    line: Line, error: type[BaseException]
) -> None:
    """At its retries too: a future can carry no StopIteration, and nobody cancelled."""

    def fail(change: Change) -> None:
        raise error

    line.transaction(Handler(fail))
    with pytest.raises(HandlerFailed, match=f"in 3 attempts: {error.__name__}"):
        async with asyncio.timeout(5):
            await line.deliver()


async def test_an_oserror_of_an_async_handler_is_the_handlers(line: Line) -> None:
    async def refused(change: Change) -> None:
        raise ConnectionRefusedError

    line.transaction(Handler(refused))
    with pytest.raises(HandlerFailed, match="ConnectionRefusedError"):
        await line.deliver()


class CallableObject:
    """A handler may be any object that can be called."""

    async def __call__(self, change: Change) -> None:
        """Take it."""

    async def take(self, change: Change, *, twice: bool = False) -> None:
        """Take it."""


async def take(change: Change, *, twice: bool = False) -> None:
    """Take it."""


@pytest.mark.parametrize(
    ("function", "is_async", "name"),
    [
        (CallableObject(), True, "CallableObject"),
        (CallableObject().__call__, True, "CallableObject.__call__"),
        (functools.partial(take, twice=True), True, "take"),
        (functools.partial(CallableObject().take, twice=True), True, "CallableObject.take"),
        (functools.partial(CallableObject()), True, "CallableObject"),
        (print, False, "print"),
        (int, False, "int"),
    ],
)
def test_functions_and_callable_objects_are_handlers(
    function: HandlerFunction, *, is_async: bool, name: str
) -> None:
    handler = Handler(function)
    assert (handler.is_async, handler.name) == (is_async, name)


async def test_the_partial_of_an_async_function_runs(line: Line) -> None:
    calls = []

    async def handle(prefix: str, change: Change) -> None:
        await asyncio.sleep(0)
        calls.append(prefix + change.id)

    line.transaction(Handler(functools.partial(handle, "a ")))
    await line.deliver()
    assert calls == ["a 0/64:1"]


def sync_wrapper(change: Change) -> Coroutine[Any, Any, None]:
    return take(change)


async def forgotten_await(change: Change) -> Coroutine[Any, Any, None]:
    return take(change)


async def background_task(change: Change) -> asyncio.Task[None]:
    return asyncio.create_task(take(change))


def background_thread(change: Change) -> object:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(str, change)


def generator_expression(change: Change) -> object:
    return (change for _ in "x")


async def yielding(change: Change) -> AsyncIterator[Change]:
    yield change


def async_generator(change: Change) -> object:
    return yielding(change)


@pytest.mark.parametrize(
    ("function", "returned"),
    [
        (functools.wraps(take)(sync_wrapper), "coroutine"),
        (lambda change: take(change, twice=True), "coroutine"),
        (forgotten_await, "coroutine"),
        (background_task, "Task"),
        (background_thread, "Future"),
        (generator_expression, "generator"),
        (async_generator, "async_generator"),
    ],
)
@pytest.mark.parametrize("first_raises", [False, True])
async def test_a_handler_that_leaves_its_work_undone_has_not_taken_the_change(
    line: Line, function: Callable[[Change], Any], returned: str, *,
    first_raises: bool,
) -> None:  # fmt: skip
    """Once is enough: it is not called again. The message says what to do."""
    handler = Handler(function, name="h")
    calls = []

    def called(change: Change) -> Any:
        calls.append(change.id)
        if first_raises and len(calls) == 1:
            raise ValueError
        return function(change)

    handler.function = called
    line.transaction(handler, handler)
    with pytest.raises(HandlerFailed, match=f"returned an unfinished {returned}\n") as failed:
        await line.deliver()
    assert "with async def" in str(failed.value.hint)
    assert len(calls) == 1 + first_raises
    assert (line.delivery.delivered, line.acknowledger.flush_lsn) == (0, 0)


class Generating:
    def __call__(self, change: Change) -> Iterator[Change]:
        yield change


@pytest.mark.parametrize("function", [yielding, Generating(), functools.partial(Generating())])
def test_a_generator_function_is_refused(function: Any) -> None:
    with pytest.raises(TypeError, match="has a yield in it"):
        Handler(function)


@pytest.mark.parametrize("function", [locals, operator.add])
def test_a_function_that_does_not_take_one_argument_is_refused(
    function: Callable[[Change], None],
) -> None:
    with pytest.raises(TypeError, match="takes one argument, the change"):
        Handler(function)
