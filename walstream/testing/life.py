"""One life of a process under test: its handlers' calls are counted, and it can die at any time.

A crash is what ``kill -9`` does, seen from outside: a call that was to return does not, no other
begins, and the server hears nothing more. Only what cannot be interrupted, a plain function in its
thread, comes to its end, as it would until the kernel has ended the process.
"""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import msgspec

from walstream.app import Walstream
from walstream.config import Config
from walstream.daemon import Daemon
from walstream.destinations import Handler, Item
from walstream.lsn import ZERO, Lsn
from walstream.summary import Summary
from walstream.testing.databases import async_wait_until

END_SECONDS: Final = 10.0
"""How long a life that has crashed, or is given up, gets to end."""


class Crash:
    """When to die: after so many calls of handlers have returned, counted over all lives."""

    def __init__(self) -> None:
        self.calls_left: int | None = None
        self.armed_with = 0
        self._lock = threading.Lock()

    def arm(self, calls: int) -> None:
        """Die after so many calls."""
        self.calls_left = self.armed_with = calls

    def disarm(self) -> None:
        """Live on."""
        self.calls_left = None

    @property
    def is_due(self) -> bool:
        """Whether no further call may begin."""
        return self.calls_left == 0

    def count(self) -> None:
        """A call has returned."""
        with self._lock:
            if self.calls_left:
                self.calls_left -= 1


class Held(msgspec.Struct, frozen=True):
    """A call that has begun and not returned: of which handler, with what, since when."""

    handler: str
    item_id: str
    since: float

    def __str__(self) -> str:
        """Tell without row values."""
        seconds = time.monotonic() - self.since
        return f"{self.handler} has held {self.item_id} for {seconds:.1f} seconds"


class Life:
    """The handlers of an application, streaming until they are told to stop, fail, or die."""

    def __init__(
        self,
        app: Walstream,
        config: Config,
        crash: Crash,
        *,
        until: str | None = None,
        uncounted: Iterable[Handler] = (),
    ) -> None:
        """Make ready.

        Args:
            app: whose handlers are called; it stays as it is.
            config: what to stream.
            crash: when to die.
            until: an LSN or ``now``; None to stream until `stop`.
            uncounted: handlers of the test itself, whose calls do not count towards the crash.
        """
        self._app = copy.copy(app)
        self._app.handlers = [
            (spec, self._watched(handler, counted=handler not in set(uncounted)))
            for spec, handler in app.handlers
        ]
        self._config = config
        self._until = until
        self._crash = crash
        self._loop = asyncio.get_running_loop()
        self._dying = asyncio.Event()
        self._ended = threading.Event()
        self._calls: dict[object, Held] = {}
        self._process: Daemon | None = None
        self.crashed = False
        self.told = False
        """Whether somebody has waited for the end, and knows how it was."""
        self.called: list[str] = []
        """The ids of what handlers were called with, in the order of the calls."""
        self.task = asyncio.create_task(self._run())

    @property
    def held(self) -> list[Held]:
        """The calls that have begun and not returned, longest first."""
        return sorted(self._calls.values(), key=lambda held: held.since)

    @property
    def flush_lsn(self) -> Lsn:
        """Up to where everything is taken."""
        return ZERO if self._process is None else self._process.flush_lsn

    def summary(self) -> Summary:
        """Say what has been done so far, in a life that has begun to stream."""
        assert self._process is not None  # noqa: S101 - nobody asks before
        return self._process.summary()

    async def stop(self) -> None:
        """End in good order: what is being delivered is finished and confirmed."""
        await async_wait_until(lambda: self._process is not None or self.task.done())
        self._app.stop()

    async def kill(self) -> None:
        """Let it die from outside, as soon as it lives."""
        await async_wait_until(lambda: self._process is not None or self.task.done())
        self.die()

    def die(self) -> None:
        """Die at once; `task` ends when everything is over. Can be called from any thread."""
        self.crashed = True
        self._loop.call_soon_threadsafe(self._dying.set)

    async def _run(self) -> Summary:
        streaming = asyncio.create_task(self._app.run(self._config, until=self._until))
        dying = asyncio.create_task(self._dying.wait())
        try:
            await asyncio.sleep(0)  # with its first step the process is there
            self._process = self._app._daemon  # noqa: SLF001 - it has to be killed
            await asyncio.wait({streaming, dying}, return_when=asyncio.FIRST_COMPLETED)
            return self.summary() if self.crashed else await streaming
        finally:
            dying.cancel()
            if self.crashed and self._process is not None:
                self._process.crash()
            await self._end(streaming)

    async def _end(self, streaming: asyncio.Task[Summary]) -> None:
        """Let nothing go on: neither the stream, nor a function in a thread."""
        streaming.cancel()
        await asyncio.wait({streaming}, timeout=END_SECONDS)
        if streaming.done() and not streaming.cancelled():
            streaming.exception()  # of a crash nobody hears more
        self._ended.set()
        with suppress(AssertionError):
            await async_wait_until(lambda: not self._calls, END_SECONDS)

    def _watched(self, handler: Handler, *, counted: bool) -> Handler:
        """Return a handler that does the same under our eyes."""
        watched = copy.copy(handler)
        function = handler.function
        watched.function = (
            self._watched_async(handler.name, function, counted=counted)
            if handler.is_async
            else self._watched_sync(handler.name, function, counted=counted)
        )
        return watched

    def _watched_async(
        self, name: str, function: Callable[..., Any], *, counted: bool
    ) -> Callable[..., Coroutine[Any, Any, Any]]:
        async def call(payload: Any, *more: Any) -> Any:
            if self._is_over(counted=counted):
                await _for_ever()
            with self._call(name, payload):
                result = await function(payload, *more)
            if self._is_over_after(counted=counted):
                await _for_ever()
            return result

        return call

    def _watched_sync(
        self, name: str, function: Callable[..., Any], *, counted: bool
    ) -> Callable[..., Any]:
        def call(payload: Any, *more: Any) -> Any:
            if self._is_over(counted=counted):
                self._leave_thread()
            with self._call(name, payload):
                result = function(payload, *more)
            if self._is_over_after(counted=counted):
                self._leave_thread()
            return result

        return call

    def _is_over(self, *, counted: bool) -> bool:
        if counted and self._crash.is_due and not self.crashed:
            self.die()
        return self.crashed

    def _is_over_after(self, *, counted: bool) -> bool:
        """Count a call that has returned."""
        if counted and not self.crashed:
            self._crash.count()
        return self._is_over(counted=counted)

    @contextmanager
    def _call(self, name: str, payload: Any) -> Iterator[None]:
        items: list[Item] = payload if isinstance(payload, list) else [payload]
        self.called += [item.id for item in items]
        call = object()
        self._calls[call] = Held(name, items[0].id, time.monotonic())
        try:
            yield
        finally:
            del self._calls[call]

    def _leave_thread(self) -> None:
        """Keep the thread until the stream is gone, so that nothing is made of the call's end.

        Raises:
            asyncio.CancelledError: always.
        """
        self._ended.wait(2 * END_SECONDS)
        raise asyncio.CancelledError


async def _for_ever() -> None:
    """Wait for the cancellation that comes when a process dies."""
    await asyncio.get_running_loop().create_future()
