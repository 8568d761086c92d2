"""Running handlers and feeding sinks, in commit order, until every change is taken.

The contract: `Delivery.deliver` hands each change to its destination, and tells the acknowledger
that it is taken only after the handler has returned, or the sink has made it durable. A destination
that fails is tried again, with growing pauses, a bounded number of times; then the stream stops and
the slot stays before the transaction. Nothing is skipped.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Protocol, TypeAlias, runtime_checkable

import msgspec
import structlog

from walstream.acknowledger import Acknowledger, Ticket
from walstream.backoff import Backoff
from walstream.changes import Change
from walstream.errors import HandlerFailed, SinkFailed, WalstreamError
from walstream.lsn import ZERO
from walstream.router import Route

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.delivery")

HandlerFunction: TypeAlias = Callable[[Change], Awaitable[None] | None]

Handed: TypeAlias = tuple[Route, Change, Ticket]
"""A change on its way to the destination of a route, and the transaction to take it from."""


class Handler:
    """A user's function. ``async def`` runs in the event loop, ``def`` in a thread."""

    def __init__(self, function: HandlerFunction, *, name: str = "") -> None:
        """Wrap a function that takes a change.

        Raises:
            TypeError: it cannot be called with one argument.
        """
        try:
            with contextlib.suppress(ValueError):  # built-in ones may not tell their signature
                inspect.signature(function).bind(None)
        except TypeError:
            message = f"a handler takes one argument, the change; {function!r} does not"
            raise TypeError(message) from None
        self.function = function
        self.name = name or getattr(function, "__qualname__", repr(function))
        self.is_async = inspect.iscoroutinefunction(
            function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004
        )


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


class Delivery:
    """Delivers changes one after another."""

    def __init__(self, policy: RetryPolicy, *, show_error_messages: bool = False) -> None:
        self._acknowledger = Acknowledger(ZERO)
        self._policy = policy
        self._show_error_messages = show_error_messages
        # One thread: sync handlers see changes in commit order, and never two at a time.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="walstream-handlers")
        self._held: tuple[str, Change, float] | None = None
        self._current: Ticket | None = None
        self._running = False
        self.delivered = 0
        self.retries = 0

    @property
    def held(self) -> Held | None:
        """What is being waited for at this moment."""
        if self._held is None:
            return None
        destination, change, since = self._held
        return Held(destination, change.id, since)

    @property
    def is_busy(self) -> bool:
        """Whether a sync function still runs in the handlers' thread."""
        return self._running

    def attach(self, acknowledger: Acknowledger) -> None:
        """Take changes from a new session's acknowledger from now on.

        One delivery serves all sessions of a process: a sync function that the last session gave up
        waiting for must end before the next change is handed to its thread.
        """
        self._acknowledger = acknowledger
        self._current = None
        self._held = None

    def close(self) -> None:
        """Let the handlers' thread end; a function that still runs in it is not waited for."""
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
        """
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
                    await destination.function(change)  # type: ignore[misc]  # is_async
                except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - user code
                    await self._call_again(destination, change, error)
                take(ticket)
                self.delivered += 1
                position += 1
            else:
                position += await self._call_in_thread(_sync_run(handed, position))
        self._held = None
        return True

    async def _call_in_thread(self, run: Sequence[Handed]) -> int:
        """Call sync handlers for a run of changes with one hop to the thread; return how many."""
        loop = asyncio.get_running_loop()
        self._held = (run[0][0].destination.name, run[0][1], time.monotonic())
        done, error = await loop.run_in_executor(self._thread, self._call_all, run)
        for _, _, ticket in run[:done]:
            self._acknowledger.take(ticket)
        self.delivered += done
        if error is not None:
            route, change, ticket = run[done]
            await self._call_again(route.destination, change, error)
            self._acknowledger.take(ticket)
            self.delivered += 1
            done += 1
        return done

    def _call_all(self, run: Sequence[Handed]) -> tuple[int, Exception | None]:
        """Run in the thread: call until one raises."""
        self._running = True
        try:
            for done, (route, change, _) in enumerate(run):
                self._held = (route.destination.name, change, time.monotonic())
                try:
                    route.destination.function(change)
                except Exception as error:  # noqa: BLE001 - user code
                    return done, error
            return len(run), None
        finally:
            self._running = False

    async def _call_again(self, handler: Handler, change: Change, error: BaseException) -> None:
        """Retry a handler that raised, until it returns or the attempts are used up."""
        attempt = 1
        while True:
            _reraise_our_own_cancellation(error)
            await self._pause(handler.name, change.id, attempt, error)
            try:
                if handler.is_async:
                    await handler.function(change)  # type: ignore[misc]  # is_async
                else:
                    loop = asyncio.get_running_loop()
                    await loop.run_in_executor(self._thread, handler.function, change)
            except (Exception, asyncio.CancelledError) as again:  # noqa: BLE001 - user code
                error = again
                attempt += 1
            else:
                return

    async def _deliver_to_sinks(self, for_sinks: dict[Sink, list[Handed]]) -> None:
        for sink, handed in for_sinks.items():
            changes = [change for _, change, _ in handed]
            self._held = (sink.name, changes[0], time.monotonic())
            await self._fill(sink, changes)
            for _, _, ticket in handed:
                self._acknowledger.take(ticket)
            self.delivered += len(handed)
        self._held = None

    async def _fill(self, sink: Sink, changes: Sequence[Change]) -> None:
        attempt = 1
        while True:
            try:
                await sink.take(changes)
            except (OSError, SinkFailed) as error:
                await self._pause(sink.name, changes[0].id, attempt, error)
                attempt += 1
            else:
                return

    async def _pause(
        self, destination: str, change_id: str, attempt: int, error: BaseException
    ) -> None:
        """Wait before the next attempt.

        Raises:
            HandlerFailed, SinkFailed: there is none.
        """
        described = self._describe(error)
        if attempt >= self._policy.attempts:
            kind = SinkFailed if isinstance(error, OSError | SinkFailed) else HandlerFailed
            message = (
                f"{destination} did not take change {change_id} in {attempt} attempts: {described}"
            )
            raise kind(
                message,
                hint="the slot was not moved past its transaction; mend the cause and start again,"
                " and the change comes again with the same id",
            ) from error
        seconds = self._policy.backoff.pause_seconds(attempt)
        self.retries += 1
        log.warning(
            "delivery_retried",
            destination=destination,
            change=change_id,
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


def _reraise_our_own_cancellation(error: BaseException) -> None:
    """Let our own cancellation through; a handler may also end by a CancelledError of its own."""
    task = asyncio.current_task()
    if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
        raise error
