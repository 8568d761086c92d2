"""Running handlers and feeding sinks, in commit order, until every change is taken.

The contract: `Delivery.deliver` hands each change to its destination, and tells the acknowledger
that it is taken only after the handler has returned, or the sink has made it durable. A destination
that fails is tried again, with growing pauses, a bounded number of times; then the stream stops and
the slot stays before the transaction. Nothing is skipped.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import time
import traceback
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, Protocol, TypeAlias, runtime_checkable

import msgspec
import structlog

from walstream.acknowledger import Acknowledger, Ticket
from walstream.backoff import Backoff
from walstream.changes import Change
from walstream.errors import DeliveryError, HandlerFailed, SinkFailed, WalstreamError
from walstream.lsn import ZERO
from walstream.router import Route

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.delivery")

HandlerFunction: TypeAlias = Callable[[Change], Coroutine[Any, Any, None] | None]

Handed: TypeAlias = tuple[Route, Change, Ticket]
"""A change on its way to the destination of a route, and the transaction to take it from."""


class Handler:
    """A user's function. ``async def`` runs in the event loop, ``def`` in a thread.

    Partials of such functions, methods, and objects with a ``__call__`` are told apart likewise.
    """

    def __init__(self, function: HandlerFunction, *, name: str = "") -> None:
        """Wrap a function that takes a change.

        Raises:
            TypeError: it cannot be called with one argument, or it is a generator function, of
                which a call runs nothing.
        """
        _verify_signature(function)
        unwrapped = _unwrapped(function)
        code = unwrapped if inspect.isroutine(unwrapped) else type(unwrapped).__call__
        if inspect.isgeneratorfunction(code) or inspect.isasyncgenfunction(code):
            message = f"a handler does its work when it is called; {function!r} has a yield in it"
            raise TypeError(message)
        self.function: Callable[[Change], Any] = function
        self.name = name or getattr(unwrapped, "__qualname__", type(unwrapped).__qualname__)
        self.is_async = any(map(inspect.iscoroutinefunction, (function, code)))


def _verify_signature(function: HandlerFunction) -> None:
    try:
        with contextlib.suppress(ValueError):  # built-in ones may not tell their signature
            inspect.signature(function).bind(None)
    except TypeError:
        message = f"a handler takes one argument, the change; {function!r} does not"
        raise TypeError(message) from None


def _unwrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function or object behind partials and bound methods."""
    while True:
        if isinstance(function, functools.partial):
            function = function.func
        elif inspect.ismethod(function):
            function = function.__func__
        else:
            return function


@runtime_checkable
class Sink(Protocol):
    """A destination that keeps changes: a file, the standard output.

    ``take`` returns when the changes are as durable as the sink promises, and raises OSError or
    `SinkFailed` when they are not; it may then be called again with the same changes, and what the
    failed call left behind must not stay.
    """

    name: str

    async def open(self) -> None:
        """Make ready; called once before the first ``take``."""

    async def take(self, changes: Sequence[Change]) -> None:
        """Keep the changes, in this order."""

    async def close(self) -> None:
        """Let go; called once, whatever happened."""


class RetryPolicy(msgspec.Struct, frozen=True):
    """How often a failing destination is tried, and how long the pauses in between are."""

    attempts: int = 5
    backoff: Backoff = Backoff(0.2, 30.0)


class Held(msgspec.Struct, frozen=True):
    """What delivery is waiting for: a destination, a change, and since when (monotonic seconds)."""

    destination: str
    change_id: str
    since: float


class _NotRun(HandlerFailed):
    """A handler returned something that still has to run; to call it again would not help."""


class _SyncRun:
    """Changes that go to the handlers' thread in one hop."""

    def __init__(self, handed: Sequence[Handed], since: float) -> None:
        """Hand them to the thread; the first one is waited for since then (monotonic seconds)."""
        self.handed = handed
        self.held = _held(handed[0], since)
        self.abandoned = False  # nobody waits for it any more: no further handler is called


class Delivery:
    """Delivers changes one after another."""

    def __init__(self, policy: RetryPolicy, *, show_error_messages: bool = False) -> None:
        self._acknowledger = Acknowledger(ZERO)
        self._policy = policy
        self._show_error_messages = show_error_messages
        # One thread: sync handlers see changes in commit order, and never two at a time.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="walstream-handlers")
        self._held: tuple[str, Change, float] | None = None
        self._sync_run: _SyncRun | None = None
        self._current: Ticket | None = None
        self._cancellations = 0
        self._running = False
        self.delivered = 0
        self.retries = 0

    @property
    def held(self) -> Held | None:
        """What is being waited for at this moment."""
        held = self._held if self._sync_run is None else self._sync_run.held
        if held is None:
            return None
        destination, change, since = held
        return Held(destination, change.id, since)

    @property
    def is_busy(self) -> bool:
        """Whether a sync function still runs in the handlers' thread."""
        return self._running

    def attach(self, acknowledger: Acknowledger) -> None:
        """Take changes from a new session's acknowledger from now on.

        One delivery serves all sessions of a process: a sync function that the last session gave up
        waiting for must end before the next change is handed to its thread. What the last session
        still had for that thread is not begun.
        """
        self._abandon()
        self._acknowledger = acknowledger
        self._current = None
        self._held = None

    def close(self) -> None:
        """Let the handlers' thread end after the function that runs in it; begin no further one.

        This call does not wait for that function. The interpreter does, before it exits.
        """
        self._abandon()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def deliver(
        self, handed: Sequence[Handed], *, stopping: Callable[[], bool] = lambda: False
    ) -> bool:
        """Deliver in order, and take each change once its destination has.

        Args:
            handed: in commit order.
            stopping: asked between transactions; once it is true no further one is begun.

        Returns:
            Whether all was delivered, which it is unless ``stopping`` became true.

        Raises:
            HandlerFailed, SinkFailed: after all attempts. What came before it is taken.
            asyncio.CancelledError: the task was cancelled, also when a handler swallowed that. A
                handler that cancels its own task must uncancel it, as `asyncio.timeout` does.
        """
        self._cancellations = _task().cancelling()
        for_sinks: dict[Sink, list[Handed]] = {}
        try:
            complete = await self._deliver_to_handlers(handed, for_sinks, stopping)
        except WalstreamError:
            await self._deliver_to_sinks(for_sinks)
            raise
        await self._deliver_to_sinks(for_sinks)
        return complete

    def is_inside(self, ticket: Ticket | None) -> bool:
        """Whether the delivery of this transaction has begun."""
        return ticket is not None and ticket is self._current

    async def _deliver_to_handlers(
        self,
        handed: Sequence[Handed],
        for_sinks: dict[Sink, list[Handed]],
        stopping: Callable[[], bool],
    ) -> bool:
        take = self._acknowledger.take
        cancelling, cancellations = _task().cancelling, self._cancellations
        position = 0
        while position < len(handed):
            entry = handed[position]
            route, change, ticket = entry
            if ticket is not self._current:
                if stopping():
                    return False
                self._current = ticket
            destination = route.destination
            if type(destination) is not Handler:
                for_sinks.setdefault(destination, []).append(entry)
                position += 1
            elif destination.is_async:
                self._held = (destination.name, change, time.monotonic())
                try:
                    result = await destination.function(change)
                    if result is not None:
                        _verify_finished(destination, change, result)
                except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - user code
                    await self._call_again(entry, error)
                take(ticket)
                self.delivered += 1
                position += 1
                if cancelling() > cancellations:  # and the handler swallowed it
                    raise asyncio.CancelledError
            else:
                position += await self._call_in_thread(_sync_run(handed, position))
        self._held = None
        return True

    async def _call_in_thread(self, handed: Sequence[Handed]) -> int:
        """Call sync handlers for a run of changes with one hop to the thread; return how many."""
        done, error = await self._hop(_SyncRun(handed, time.monotonic()))
        for _, _, ticket in handed[:done]:
            self._acknowledger.take(ticket)
        self.delivered += done
        if error is not None:
            await self._call_again(handed[done], error)
            self._acknowledger.take(handed[done][2])
            self.delivered += 1
            done += 1
        return done

    async def _hop(self, run: _SyncRun) -> tuple[int, BaseException | None]:
        """Let the thread call the handlers of a run; return how many returned, and what one raised.

        Raises:
            asyncio.CancelledError: the run was given up. The call in hand is the last one.
        """
        self._sync_run = run
        try:
            loop = asyncio.get_running_loop()
            outcome = await loop.run_in_executor(self._thread, self._call_all, run)
        except BaseException:
            run.abandoned = True
            raise
        finally:
            if self._sync_run is run:
                self._sync_run = None
        if run.abandoned:
            raise asyncio.CancelledError
        self._held = run.held
        return outcome

    def _call_all(self, run: _SyncRun) -> tuple[int, BaseException | None]:
        """Run in the thread: call until one raises, or the run is given up.

        What was raised is returned: a StopIteration cannot be raised through a future, and a
        CancelledError of the handler's own would look like ours.
        """
        self._running = True
        try:
            for done, entry in enumerate(run.handed):
                if run.abandoned:
                    return done, None
                if done:
                    run.held = _held(entry, time.monotonic())
                error = _call(entry)
                if error is not None:
                    return done, error
            return len(run.handed), None
        finally:
            self._running = False

    def _abandon(self) -> None:
        if self._sync_run is not None:
            self._sync_run.abandoned = True
            self._sync_run = None

    async def _call_again(self, entry: Handed, error: BaseException) -> None:
        """Retry a handler that raised, until it returns or the attempts are used up."""
        route, change, _ = entry
        attempt = 1
        again: BaseException | None = error
        while again is not None:
            self._pass_cancellation()
            if isinstance(again, _NotRun):
                raise again
            await self._pause(HandlerFailed, route.destination.name, change, attempt, again)
            again = await self._call_once(entry)
            attempt += 1

    async def _call_once(self, entry: Handed) -> BaseException | None:
        """Call a handler where it belongs, and return what it raised."""
        route, change, _ = entry
        handler = route.destination
        if not handler.is_async:
            since = time.monotonic() if self._held is None else self._held[2]
            return (await self._hop(_SyncRun([entry], since)))[1]
        try:
            result = await handler.function(change)
            if result is not None:
                _verify_finished(handler, change, result)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - user code
            return error
        return None

    def _pass_cancellation(self) -> None:
        """Raise CancelledError when our task was cancelled, whatever user code made of that."""
        if _task().cancelling() > self._cancellations:
            raise asyncio.CancelledError

    async def _deliver_to_sinks(self, for_sinks: dict[Sink, list[Handed]]) -> None:
        for sink, handed in for_sinks.items():
            changes = [change for _, change, _ in handed]
            self._held = (sink.name, changes[0], time.monotonic())
            await self._fill(sink, changes)
            for _, _, ticket in handed:
                self._acknowledger.take(ticket)
            self.delivered += len(handed)
            self._pass_cancellation()
        self._held = None

    async def _fill(self, sink: Sink, changes: Sequence[Change]) -> None:
        attempt = 1
        while True:
            try:
                await sink.take(changes)
            except (OSError, SinkFailed) as error:
                self._pass_cancellation()
                await self._pause(SinkFailed, sink.name, changes[0], attempt, error)
                attempt += 1
            else:
                return

    async def _pause(
        self,
        kind: type[DeliveryError],
        destination: str,
        change: Change,
        attempt: int,
        error: BaseException,
    ) -> None:
        """Wait before the next attempt.

        Raises:
            DeliveryError: of this kind, when there is none.
        """
        described = self._describe(error)
        if attempt >= self._policy.attempts:
            message = (
                f"{destination} did not take change {change.id} in {attempt} attempts: {described}"
            )
            raise kind(message, hint=f"mend the cause and start again; {_COMES_AGAIN}") from error
        seconds = self._policy.backoff.pause_seconds(attempt)
        self.retries += 1
        log.warning(
            "delivery_retried",
            destination=destination,
            change=change.id,
            attempt=attempt,
            pause_seconds=round(seconds, 3),
            error=described,
        )
        await asyncio.sleep(seconds)

    def _describe(self, error: BaseException) -> str:
        """Name an error without its text, which may hold a row's values, unless asked for."""
        frames = traceback.extract_tb(error.__traceback__)
        place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        text = f": {error}" if self._show_error_messages else ""
        return f"{type(error).__name__}{place}{text}"


_UNFINISHED: Final = (Generator, AsyncGenerator, Future)

_COMES_AGAIN: Final = (
    "the slot was not moved past its transaction, and the change comes again with the same id"
)

MAX_SYNC_RUN: Final = 100
"""Changes that sync handlers get in one hop to their thread; between hops the loop takes stock."""


def _sync_run(handed: Sequence[Handed], start: int) -> Sequence[Handed]:
    """Return the changes from ``start`` on that sync handlers take without another in between.

    The run stays within one transaction, so that a stop between transactions is noticed.
    """
    ticket = handed[start][2]
    end = start
    for route, _, its_ticket in handed[start : start + MAX_SYNC_RUN]:
        destination = route.destination
        if type(destination) is not Handler or destination.is_async or its_ticket is not ticket:
            break
        end += 1
    return handed[start:end]


def _call(entry: Handed) -> BaseException | None:
    """Call a sync handler, and return what it raised."""
    route, change, _ = entry
    handler = route.destination
    try:
        result = handler.function(change)
        if result is not None:
            _verify_finished(handler, change, result)
    except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - user code
        return error
    return None


def _verify_finished(handler: Handler, change: Change, result: object) -> None:
    """Refuse a result that still has to run: the handler has not done its work.

    Raises:
        _NotRun: a handler of this kind cannot be recognised before it is called.
    """
    if not (inspect.isawaitable(result) or isinstance(result, _UNFINISHED)):
        return
    if isinstance(result, Coroutine | Generator):
        result.close()
    raise _NotRun(
        f"{handler.name} did not take change {change.id}: it returned an unfinished"
        f" {type(result).__name__}",
        hint="declare the handler, and each decorator's wrapper around it, with async def, and"
        f" await or finish everything in it; {_COMES_AGAIN}",
    )


def _held(entry: Handed, since: float) -> tuple[str, Change, float]:
    route, change, _ = entry
    return route.destination.name, change, since


def _task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - a coroutine runs in a task
    return task
