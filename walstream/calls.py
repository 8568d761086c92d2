"""One call of a destination: in the event loop, in a thread, or a sink's ``take``.

A `Slot` tells others what a call is about while it lasts, and where it stands; a `CallClock` how
long calls took.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import sys
import threading
import time
import traceback
from bisect import bisect_left
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterable, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import dropwhile
from pathlib import Path
from types import FrameType
from typing import Any, Final, Protocol, TypeAlias

from psycopg import AsyncConnection, Connection

from walstream.changes import Change
from walstream.destinations import Handler, Item, Sink
from walstream.errors import HandlerFailed
from walstream.lsn import Lsn
from walstream.vitals import CALL_SECONDS_BOUNDS, CallTimes

QUICK_SECONDS: Final = CALL_SECONDS_BOUNDS[0]
"""Most calls take no longer: they are counted where they end, which costs less."""

_MODULES: Final = ("calls.py", "tracing.py", "transactional.py")
_UNFINISHED: Final = (Generator, AsyncGenerator, Future)

_WAY_TO_CALLS: Final = (
    *[str(Path(__file__).with_name(name)) for name in _MODULES],
    f"{Path(__file__).with_name('outlets')}{os.sep}",
    threading.__file__,
    f"{Path(futures.__file__).parent}{os.sep}",
)


PASSING: Final = (KeyboardInterrupt, GeneratorExit)
"""What a call raises that is not its own: the terminal's Ctrl-C, and Python closing a coroutine."""


class CallClock:
    """Counts how long the calls of one destination took, failed ones too.

    ``counts`` are those within each of `CALL_SECONDS_BOUNDS`, and those that took longer.
    """

    __slots__ = ("counts", "total_seconds")

    def __init__(self) -> None:
        self.counts = [0] * (len(CALL_SECONDS_BOUNDS) + 1)
        self.total_seconds = 0.0

    def add(self, seconds: float) -> None:
        """A call took so long."""
        self.counts[bisect_left(CALL_SECONDS_BOUNDS, seconds)] += 1
        self.total_seconds += seconds

    @staticmethod
    def together(clocks: Iterable[CallClock]) -> CallTimes:
        """Say what several have counted until now."""
        listed = list(clocks)
        counts = zip(*(clock.counts for clock in listed), strict=True)
        return CallTimes(tuple(map(sum, counts)), sum(clock.total_seconds for clock in listed))


class Slot:
    """What one worker has in hand; ``item`` is None between two calls."""

    __slots__ = ("clock", "item", "since", "task", "thread")

    def __init__(self, clock: CallClock | None = None) -> None:
        self.clock = clock or CallClock()
        self.item: Item | None = None
        self.since = 0.0
        self.task: asyncio.Task[Any] | None = None
        self.thread: int | None = None

    def begin(self, item: Item) -> None:
        """Note that a call begins now."""
        self.item = item
        self.since = time.monotonic()

    def end(self) -> None:
        """Note that it is over, and how long it took."""
        seconds = time.monotonic() - self.since
        clock = self.clock
        if seconds <= QUICK_SECONDS:  # as `CallClock.add` counts it
            clock.counts[0] += 1
            clock.total_seconds += seconds
        else:
            clock.add(seconds)
        self.item = None

    def clear(self) -> None:
        """Let go of all that the last session has left."""
        self.item = self.task = None

    def frames(self) -> list[str]:
        """Say where the call stands, outermost first: ``file:line function`` each.

        It begins with the handler or sink: the way to it is left out.
        """
        thread = self.thread  # the call may return meanwhile
        if thread is not None:
            frame = sys._current_frames().get(thread)  # noqa: SLF001 - documented so
            places = traceback.extract_stack(frame) if frame is not None else []
        else:
            places = traceback.StackSummary.extract(
                (frame, frame.f_lineno) for frame in _suspended(self.task)
            )
        own = dropwhile(lambda place: place.filename.startswith(_WAY_TO_CALLS), places)
        return [f"{place.filename}:{place.lineno} {place.name}" for place in own]


def _suspended(task: asyncio.Task[Any] | None) -> list[FrameType]:
    """Return the frames of a task that waits, from its coroutine to the one that waits."""
    frames = []
    waiting: Any = None if task is None else task.get_coro()
    while waiting is not None:
        frame = getattr(waiting, "cr_frame", None) or getattr(waiting, "gi_frame", None)
        if frame is not None:
            frames.append(frame)
        waiting = getattr(waiting, "cr_await", None) or getattr(waiting, "gi_yieldfrom", None)
    return frames


class NotRun(HandlerFailed):
    """A handler returned something that still has to run; to call it again would not help."""


class Target(Protocol):
    """The database of a transactional handler, which records how far it is."""

    async def open(
        self,
        *,
        systemid: str,
        flush_lsn: Lsn,
        timeline: int | None = None,
        history: Sequence[tuple[int, Lsn]] = (),
    ) -> None:
        """Make ready for a session with this cluster."""

    async def run(
        self,
        items: Sequence[Item],
        call: Callable[[list[Item], AsyncConnection], Coroutine[Any, Any, None]],
    ) -> int:
        """Call in a transaction that records the items; return how many were recorded before."""

    def run_sync(
        self, items: Sequence[Item], call: Callable[[list[Item], Connection], None]
    ) -> int:
        """As `run`, for a function that blocks."""

    async def has_applied(self, item: Item) -> bool:
        """Ask whether an item was recorded before."""

    async def close(self) -> None:
        """Close the connections."""


Outcome: TypeAlias = tuple[int, BaseException | None]
"""How many of a call's items were recognised as repeated, and what it raised in its thread."""


class Caller(Protocol):
    """How a destination is called."""

    async def call(self, items: Sequence[Item], slot: Slot) -> Outcome:
        """Call with all items at once; raises what the call raised in the event loop."""

    async def has_applied(self, item: Item, /) -> bool:
        """Whether it is recorded that the destination has taken an item before."""

    async def settle(self) -> None:
        """Wait for what an earlier session has left running."""

    def close(self) -> None:
        """Begin nothing more."""

    @property
    def is_busy(self) -> bool:
        """Whether something runs that cannot be interrupted."""


class AsyncCaller:
    """Awaits an ``async def`` function in the event loop."""

    is_busy: Final = False

    def __init__(self, handler: Handler, target: Target | None) -> None:
        self._handler = handler
        self._target = target

    async def call(self, items: Sequence[Item], slot: Slot) -> Outcome:
        """Await the function."""
        slot.task = asyncio.current_task()
        if self._target is not None:
            return await self._target.run(items, self._call_with), None
        await self._call(_payload(self._handler, items))
        return 0, None

    async def has_applied(self, item: Item) -> bool:
        """Ask the target, if there is one."""
        return self._target is not None and await self._target.has_applied(item)

    async def settle(self) -> None:
        """Nothing is left behind: tasks end with their session."""

    def close(self) -> None:
        """Nothing to close."""

    async def _call_with(self, items: list[Item], connection: AsyncConnection) -> None:
        await self._call(_payload(self._handler, items), connection)

    async def _call(self, *arguments: Any) -> None:
        result = await self._handler.function(*arguments)
        if result is not None:
            verify_finished(self._handler, result)


class _Hop:
    """A visit to a thread; nobody waits for it any more once it is abandoned."""

    __slots__ = ("abandoned", "may_go_on")

    def __init__(self, may_go_on: Callable[[], bool]) -> None:
        self.abandoned = False
        self.may_go_on = may_go_on

    @property
    def is_over(self) -> bool:
        """Whether no further call is to be begun."""
        return self.abandoned or not self.may_go_on()


class ThreadCaller:
    """Calls a ``def`` function in threads of its own, as many as are called at a time."""

    def __init__(self, handler: Handler, target: Target | None) -> None:
        self._handler = handler
        self._target = target
        self._threads = ThreadPoolExecutor(
            handler.options.concurrency, thread_name_prefix=f"walstream {handler.name}"
        )
        self._running: set[Future[Any]] = set()

    @property
    def is_busy(self) -> bool:
        """Whether the function still runs, perhaps because nobody waits for it any more."""
        # Of a copy: threads that are done take themselves out.
        return any(future.running() for future in list(self._running))

    async def call(self, items: Sequence[Item], slot: Slot) -> Outcome:
        """Call the function with all items at once."""
        _, repeated, error = await self._hop(self._call_once, items, slot)
        return repeated, error

    async def call_each(
        self, items: Sequence[Item], slot: Slot, may_go_on: Callable[[], bool] = lambda: True
    ) -> tuple[int, int, BaseException | None]:
        """Call the function with one item after another, all in one visit to the thread.

        Args:
            items: at least one.
            slot: tells which of them is in hand.
            may_go_on: asked in the thread before each call.

        Returns:
            How many calls returned, how many items were repeated ones, and what a call raised.
        """
        return await self._hop(self._call_each, items, slot, may_go_on)

    async def has_applied(self, item: Item) -> bool:
        """Ask the target, if there is one."""
        return self._target is not None and await self._target.has_applied(item)

    async def settle(self) -> None:
        """Wait until the function has returned that an earlier session gave up waiting for."""
        for future in list(self._running):
            await asyncio.wait([asyncio.wrap_future(future)])

    def close(self) -> None:
        """Begin no further call; the one that runs is not waited for here."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _hop(
        self,
        work: Callable[[_Hop, Sequence[Item], Slot], tuple[int, int, BaseException | None]],
        items: Sequence[Item],
        slot: Slot,
        may_go_on: Callable[[], bool] = lambda: True,
    ) -> tuple[int, int, BaseException | None]:
        """Let a thread do it.

        What the function raised is returned: a StopIteration cannot be raised through a future, and
        a CancelledError of the function's own would look like ours.

        Raises:
            asyncio.CancelledError: the visit was given up. The call in hand is its last one.
        """
        hop = _Hop(may_go_on)
        future = self._threads.submit(work, hop, items, slot)
        self._running.add(future)
        future.add_done_callback(self._running.discard)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            hop.abandoned = True
            raise

    def _call_once(
        self, _: _Hop, items: Sequence[Item], slot: Slot
    ) -> tuple[int, int, BaseException | None]:
        slot.thread = threading.get_ident()
        try:
            return len(items), self._call(items), None
        except PASSING:
            raise
        except BaseException as error:  # noqa: BLE001 - user code, which may even exit
            return 0, 0, error
        finally:
            slot.thread = None

    def _call_each(
        self, hop: _Hop, items: Sequence[Item], slot: Slot
    ) -> tuple[int, int, BaseException | None]:
        slot.thread = threading.get_ident()
        repeated = 0
        try:
            for done, item in enumerate(items):
                if hop.is_over:
                    return done, repeated, None
                slot.begin(item)
                try:
                    repeated += self._call([item])
                except PASSING:
                    raise
                except BaseException as error:  # noqa: BLE001 - user code, which may even exit
                    slot.end()
                    return done, repeated, error
                slot.end()
            return len(items), repeated, None
        finally:
            slot.thread = None

    def _call(self, items: Sequence[Item]) -> int:
        if self._target is not None:
            return self._target.run_sync(items, self._call_with)
        self._call_function(_payload(self._handler, items))
        return 0

    def _call_with(self, items: list[Item], connection: Connection) -> None:
        self._call_function(_payload(self._handler, items), connection)

    def _call_function(self, *arguments: Any) -> None:
        result = self._handler.function(*arguments)
        if result is not None:
            verify_finished(self._handler, result)


class SinkCaller:
    """Gives a sink its changes."""

    is_busy: Final = False  # a sink's thread is a daemon that no exit waits for

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    async def call(self, items: Sequence[Item], slot: Slot) -> Outcome:
        """Let the sink take them."""
        slot.task = asyncio.current_task()
        await self._sink.take([item for item in items if isinstance(item, Change)])
        return 0, None

    async def has_applied(self, _: Item) -> bool:
        """Nothing is recorded of what a sink takes."""
        return False

    async def settle(self) -> None:
        """A sink does one thing after another by itself."""

    def close(self) -> None:
        """Whoever opened the sink closes it."""


def caller_of(destination: Handler | Sink, target: Target | None = None) -> Caller:
    """Return how a destination is called."""
    if not isinstance(destination, Handler):
        return SinkCaller(destination)
    if destination.is_async:
        return AsyncCaller(destination, target)
    return ThreadCaller(destination, target)


def verify_finished(handler: Handler, result: object) -> None:
    """Refuse a result that still has to run: the handler has not done its work.

    Raises:
        NotRun: a handler of this kind cannot be recognised before it is called.
    """
    if not (inspect.isawaitable(result) or isinstance(result, _UNFINISHED)):
        return
    if isinstance(result, Coroutine | Generator):
        result.close()
    raise NotRun(
        f"{handler.name} returned an unfinished {type(result).__name__}",
        hint="declare the handler, and each decorator's wrapper around it, with async def, and"
        " await or finish everything in it",
    )


def _payload(handler: Handler, items: Sequence[Item]) -> Item | list[Item]:
    return list(items) if handler.options.takes_list else items[0]
