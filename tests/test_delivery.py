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

from walstream.acknowledger import Acknowledger, Ticket
from walstream.backoff import Backoff
from walstream.changes import Change, Layout, Operation, Relation, Transaction
from walstream.delivery import Delivery, Handed, Handler, HandlerFunction, RetryPolicy, Sink
from walstream.errors import HandlerFailed, OutputClosed, SinkFailed
from walstream.lsn import Lsn
from walstream.router import Route, TablePattern
from walstream.values import Types

LAYOUT = Layout(Relation("public", "t"), [], [], [], Types(lambda _: bytes))
QUICK = RetryPolicy(3, Backoff(0.001, 0.001))


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
        self.end = 0

    def transaction(self, *destinations: Handler | Sink) -> Ticket:
        self.end += 100
        ticket = self.acknowledger.open(Lsn(self.end))
        transaction = Transaction(1, Lsn(self.end - 10), Lsn(self.end), "2026-01-01 00:00:00+00")
        for ordinal, destination in enumerate(destinations, 1):
            route = Route("route", TablePattern(None, None), destination)
            change = Change(Operation.TRUNCATE, LAYOUT, transaction, ordinal)
            self.acknowledger.hand(ticket)
            self.handed.append((route, change, ticket))
        self.acknowledger.close(ticket)
        return ticket

    async def deliver(self, delivery: Delivery, stopping: Callable[[], bool] = bool) -> bool:
        delivery.attach(self.acknowledger)
        try:
            return await delivery.deliver(self.handed, stopping=stopping)
        finally:
            delivery.close()


@pytest.fixture
def line() -> Line:
    return Line()


@pytest.fixture
def delivery() -> Delivery:
    return Delivery(QUICK)


async def test_async_and_sync_handlers_are_called_in_commit_order(
    line: Line, delivery: Delivery
) -> None:
    """Also where they alternate; sync ones run in one thread that is not the loop's."""
    calls: list[str] = []
    threads: set[int] = set()

    async def in_loop(change: Change) -> None:
        await asyncio.sleep(0)
        calls.append(f"async {change.id}")

    def in_thread(change: Change) -> None:
        threads.add(threading.get_ident())
        calls.append(f"sync {change.id}")

    a, s = Handler(in_loop), Handler(in_thread)
    line.transaction(a, s, s, a)
    line.transaction(s, a)
    assert await line.deliver(delivery)
    assert calls == [
        "async 0/64:1", "sync 0/64:2", "sync 0/64:3", "async 0/64:4", "sync 0/C8:1", "async 0/C8:2",
    ]  # fmt: skip
    assert len(threads) == 1
    assert threads != {threading.get_ident()}
    assert (delivery.delivered, line.acknowledger.flush_lsn) == (6, 200)


async def test_a_transaction_is_acknowledged_before_the_next_one_is_delivered(
    line: Line, delivery: Delivery
) -> None:
    seen = []

    async def look(change: Change) -> None:
        seen.append(int(line.acknowledger.flush_lsn))

    handler = Handler(look)
    for _ in range(3):
        line.transaction(handler)
    await line.deliver(delivery)
    assert seen == [0, 100, 200]


@pytest.mark.parametrize("kind", ["async", "sync", "own cancellation"])
async def test_a_handler_that_raises_is_called_again(
    line: Line, delivery: Delivery, kind: str
) -> None:
    attempts = []

    def fail_twice(change: Change) -> None:
        attempts.append(change.id)
        if len(attempts) < 3:
            raise asyncio.CancelledError if kind == "own cancellation" else ValueError

    async def fail_twice_in_the_loop(change: Change) -> None:
        fail_twice(change)

    line.transaction(Handler(fail_twice if kind == "sync" else fail_twice_in_the_loop))
    await line.deliver(delivery)
    assert attempts == ["0/64:1"] * 3
    assert (delivery.retries, delivery.delivered, line.acknowledger.flush_lsn) == (2, 1, 100)


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_after_the_last_attempt_the_slot_stays_before_the_transaction(
    line: Line, delivery: Delivery, kind: str
) -> None:
    """What came before is taken, by sinks too; what comes after is not begun."""
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
        await line.deliver(delivery)
    assert calls == ["0/64:1", "0/C8:2", "0/C8:2", "0/C8:2"]
    assert sink.taken == ["0/64:2", "0/C8:1"]
    assert line.acknowledger.flush_lsn == 100
    assert "poisoned did not take change 0/C8:2 in 3 attempts: ValueError at " in str(failed.value)
    assert "a row value" not in str(failed.value)


async def test_error_messages_are_shown_when_that_is_asked_for(line: Line) -> None:
    async def poisoned(change: Change) -> None:
        raise ValueError("a row value")

    line.transaction(Handler(poisoned))
    with pytest.raises(HandlerFailed, match="a row value"):
        await line.deliver(Delivery(QUICK, show_error_messages=True))


async def test_a_sink_takes_a_batch_at_once_and_is_tried_again(
    line: Line, delivery: Delivery
) -> None:
    sink = MemorySink(OSError(28, "No space left on device"), SinkFailed("not now"))
    line.transaction(sink, sink)
    line.transaction(sink)
    await line.deliver(delivery)
    assert sink.calls == 3
    assert sink.taken == ["0/64:1", "0/64:2", "0/C8:1"]
    assert line.acknowledger.flush_lsn == 200


async def test_a_sink_that_keeps_failing_stops_the_stream(line: Line, delivery: Delivery) -> None:
    line.transaction(MemorySink(*[OSError(28, "No space left on device")] * 3))
    with pytest.raises(SinkFailed, match="memory did not take change 0/64:1 in 3 attempts"):
        await line.deliver(delivery)
    assert line.acknowledger.flush_lsn == 0


async def test_an_output_that_nobody_reads_is_not_tried_again(
    line: Line, delivery: Delivery
) -> None:
    sink = MemorySink(OutputClosed("closed"))
    line.transaction(sink)
    with pytest.raises(OutputClosed):
        await line.deliver(delivery)
    assert sink.calls == 1


async def test_a_stop_finishes_the_transaction_in_hand(line: Line, delivery: Delivery) -> None:
    calls: list[str] = []

    async def handle(change: Change) -> None:
        calls.append(change.id)

    handler = Handler(handle)
    first = line.transaction(handler, handler)
    line.transaction(handler)
    assert not await line.deliver(delivery, stopping=lambda: bool(calls))
    assert calls == ["0/64:1", "0/64:2"]
    assert delivery.is_inside(first)
    assert not delivery.is_inside(None)


async def test_a_cancellation_of_ours_passes_through_a_handler(
    line: Line, delivery: Delivery
) -> None:
    started = asyncio.Event()

    async def wait(change: Change) -> None:
        started.set()
        await asyncio.Event().wait()

    line.transaction(Handler(wait, name="waiting"))
    task = asyncio.create_task(line.deliver(delivery))
    await started.wait()
    held = delivery.held
    assert held is not None
    assert (held.destination, held.change_id) == ("waiting", "0/64:1")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert line.acknowledger.flush_lsn == 0


@pytest.mark.parametrize("ending", ["returns", "raises"])
async def test_a_handler_cannot_swallow_our_cancellation(
    line: Line, delivery: Delivery, ending: str
) -> None:
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
    task = asyncio.create_task(line.deliver(delivery))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert calls == ["0/64:1"]
    taken = ending == "returns"
    assert (delivery.delivered, line.acknowledger.flush_lsn) == (int(taken), 100 * taken)


async def test_a_retry_that_swallows_our_cancellation_is_the_last_one(
    line: Line, delivery: Delivery
) -> None:
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
    task = asyncio.create_task(line.deliver(delivery))
    await retried.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(calls) == 2


@pytest.mark.parametrize("ending", ["returns", "raises"])
async def test_a_sink_cannot_swallow_our_cancellation(
    line: Line, delivery: Delivery, ending: str
) -> None:
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
    task = asyncio.create_task(line.deliver(delivery))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (sink.calls, delivery.retries) == (1, 0)
    assert line.acknowledger.flush_lsn == 100 * (ending == "returns")


async def test_a_timeout_of_the_handlers_own_is_no_cancellation_of_ours(
    line: Line, delivery: Delivery
) -> None:
    calls = []

    async def slow_once(change: Change) -> None:
        calls.append(change.id)
        async with asyncio.timeout(0 if len(calls) == 1 else None):
            await asyncio.sleep(0)

    line.transaction(Handler(slow_once))
    assert await line.deliver(delivery)
    assert (len(calls), delivery.retries) == (2, 1)


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


@pytest.mark.parametrize("given_up_by", ["cancel", "attach", "close"])
async def test_a_run_of_sync_calls_that_was_given_up_ends_with_the_call_in_hand(
    line: Line, delivery: Delivery, given_up_by: str
) -> None:
    gate = Gate()
    line.transaction(*[Handler(gate)] * 5)
    delivery.attach(line.acknowledger)
    task = asyncio.create_task(delivery.deliver(line.handed))
    await gate.wait()
    match given_up_by:
        case "cancel":
            task.cancel()
            await asyncio.wait([task])
        case "attach":
            delivery.attach(Acknowledger(Lsn(0)))
        case _:
            delivery.close()
    gate.opened.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.to_thread(delivery._thread.shutdown)
    assert gate.calls == ["0/64:1"]
    assert not delivery.is_busy
    assert delivery.held is None
    assert (delivery.delivered, line.acknowledger.flush_lsn) == (0, 0)


async def test_the_retry_of_a_sync_handler_is_seen_to_run(line: Line, delivery: Delivery) -> None:
    """It counts as busy, and what it holds has been held since its first call."""
    gate = Gate(closed_at=2)
    line.transaction(Handler(gate, name="gate"))
    task = asyncio.create_task(line.deliver(delivery))
    await gate.wait()
    busy = [delivery.is_busy]
    held = delivery.held
    assert held is not None
    assert (held.destination, held.change_id) == ("gate", "0/64:1")
    assert held.since <= gate.called_at[0]
    gate.opened.set()
    assert await task
    assert [*busy, delivery.is_busy] == [True, False]
    assert gate.calls == ["0/64:1"] * 2


@pytest.mark.parametrize("error", [StopIteration, asyncio.CancelledError, OSError])
async def test_whatever_a_sync_handler_raises_is_its_failure(
    line: Line, delivery: Delivery, error: type[BaseException]
) -> None:
    """At its retries too: a future can carry no StopIteration, and nobody cancelled."""

    def fail(change: Change) -> None:
        raise error

    line.transaction(Handler(fail))
    with pytest.raises(HandlerFailed, match=f"in 3 attempts: {error.__name__}"):
        async with asyncio.timeout(5):
            await line.deliver(delivery)


async def test_an_oserror_of_an_async_handler_is_the_handlers(
    line: Line, delivery: Delivery
) -> None:
    async def refused(change: Change) -> None:
        raise ConnectionRefusedError

    line.transaction(Handler(refused))
    with pytest.raises(HandlerFailed, match="ConnectionRefusedError"):
        await line.deliver(delivery)


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


async def test_the_partial_of_an_async_function_runs(line: Line, delivery: Delivery) -> None:
    calls = []

    async def handle(prefix: str, change: Change) -> None:
        await asyncio.sleep(0)
        calls.append(prefix + change.id)

    line.transaction(Handler(functools.partial(handle, "a ")))
    await line.deliver(delivery)
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
    line: Line, delivery: Delivery, function: Callable[[Change], Any], returned: str, *,
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
        await line.deliver(delivery)
    assert "with async def" in str(failed.value.hint)
    assert len(calls) == 1 + first_raises
    assert (delivery.delivered, line.acknowledger.flush_lsn) == (0, 0)


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
